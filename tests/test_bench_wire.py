"""The benchmark of the decoders: its contestants decode the same pixels, and its rows say what was measured."""

from __future__ import annotations

import numpy as np
import pytest
from streamprior_bench import BENCHMARKS, wire

SMALL = tuple(wire.Case(case.wire, case.encoding, case.dtype, (24, 40)) for case in wire.CASES)


@pytest.mark.parametrize("case", SMALL)
def test_every_contestant_gives_the_pixels_that_were_sent(case: wire.Case) -> None:
    messages, decoder = wire.encoded(case), wire.decoder_of(case)
    for sent, message in zip(wire.frames(case.shape, case.dtype, len(messages)), messages, strict=True):
        np.testing.assert_array_equal(wire.pixels_of(decoder, message), sent)
        for unpack in wire.bare_unpackers(case).values():
            np.testing.assert_array_equal(wire.bare(case, message, unpack), sent)


def test_a_row_for_each_case_with_rates_and_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "CASES", SMALL[:1] + SMALL[3:4])
    monkeypatch.setattr(wire, "_PIXELS", 24 * 40 * 4)
    rows = list(BENCHMARKS["wire"](repeats=1))
    assert [row["what"] for row in rows] == ["v2 bslz4 uint16 24x40", "v2 lz4 uint16 24x40"]
    for row, name in zip(rows, ("bitshuffle", "lz4"), strict=True):
        assert row["ours_gb_per_s"] == pytest.approx(row["ours_messages_per_s"] * 24 * 40 * 2 / 1e9, rel=0.5, abs=1e-3)
        assert row[f"{name}_over_ours"] > 0
        assert row["ours_spread"] >= 0
