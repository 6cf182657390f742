"""What a forged message may cost: no more than a few times its own size, whatever it claims; and the quarantine folder keeps its bounds."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from streamprior.config import DocumentsSettings, PositionSettings
from streamprior.errors import WireError
from streamprior.quarantine import Quarantine
from streamprior.sources.documents import DocumentsDecoder
from streamprior.wire.dectris_v1 import StreamV1Decoder
from streamprior.wire.dectris_v2 import StreamV2Decoder

MOST_BYTES = 64 * 2**20
V2 = bytes.fromhex("d9d9f7")
DEEP, WIDE = 300_000, 3_000_000

FORGED: dict[str, tuple[str, Any]] = {
    "CBOR, lists within lists": ("v2", V2 + b"\x81" * DEEP),
    "CBOR, a list of four billion": ("v2", V2 + b"\x9a\xff\xff\xff\xff"),
    "CBOR, bytes of four billion": ("v2", V2 + b"\x5a\xff\xff\xff\xff"),
    "CBOR, millions of empty lists": ("v2", V2 + b"\x9a" + struct.pack(">I", WIDE) + b"\x80" * WIDE),
    "V1, lists within lists": ("v1", (b'{"htype":"dheader-1.0","x":' + b"[" * DEEP, b"{}")),
    "V1, millions of empty lists": ("v1", (b'{"htype":"dheader-1.0","x":[' + b"[]," * WIDE + b"0]}", b"{}")),
    "JSON, lists within lists": ("json", b" event " + b"[" * DEEP),
    "JSON, millions of empty lists": ("json", b' event {"x":[' + b"[]," * WIDE + b"0]}"),
    "JSON, a number of millions of digits": ("json", b' event {"x":' + b"9" * WIDE + b"}"),
    "msgpack, lists within lists": ("msgpack", b" event " + b"\x91" * DEEP),
    "msgpack, a list of four billion": ("msgpack", b" event \xdd\xff\xff\xff\xff"),
    "msgpack, millions of empty lists": ("msgpack", b" event \x81\xa1x\xdd" + struct.pack(">I", WIDE) + b"\x90" * WIDE),
    "pickle, millions of empty lists": ("pickle", b" event \x80\x04(" + b"]" * WIDE + b"t."),
}


def decoder(wire: str) -> Callable[[Any, float], Iterable[object]]:
    if wire == "v2":
        return StreamV2Decoder("eiger", max_message_bytes=MOST_BYTES).decode
    if wire == "v1":
        return StreamV1Decoder("eiger", MOST_BYTES).decode
    return DocumentsDecoder("bluesky", DocumentsSettings(serializer=wire), PositionSettings(), True, MOST_BYTES).decode  # type: ignore[arg-type]


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_message_costs_a_few_times_its_own_size_and_is_refused(name: str) -> None:
    wire, message = FORGED[name]
    size = len(message) if isinstance(message, bytes) else sum(map(len, message))
    decode = decoder(wire)
    tracemalloc.start()
    try:
        found = list(decode(message, 0.0))
    except WireError as refused:
        found = [refused]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found
    assert all(isinstance(one, WireError) for one in found)
    assert peak < 8 * size + 2**20


def kept(folder: Path) -> tuple[int, int]:
    files = list(folder.iterdir())
    return len(files), sum(file.stat().st_size for file in files)


def test_the_quarantine_keeps_its_bounds_under_a_flood_a_giant_and_what_earlier_processes_left(tmp_path: Path) -> None:
    for number in range(50):  # an earlier process, whose bounds were wider
        (tmp_path / f"20200101-000000-{number:09d}-0-not_cbor.message").write_bytes(b"\0" * 1000)
    seconds = iter(range(10_000))
    quarantine = Quarantine(tmp_path, most_files=10, most_bytes=20_000, clock=lambda: float(next(seconds)))
    refused = WireError("not_cbor", "forged")
    quarantine.keep(b"\0" * 10_000_000, refused)
    count, nbytes = kept(tmp_path)
    assert count <= 20
    assert nbytes <= 20_000
    for _ in range(200):
        quarantine.keep((b"\0" * 3000, b"\1" * 3000), refused)
        count, nbytes = kept(tmp_path)
        assert count <= 20
        assert nbytes <= 20_000
    assert not [file for file in tmp_path.iterdir() if file.name.startswith("2020")], "the oldest go first"


def test_a_frame_that_is_refused_counts_in_the_quarantine_as_bytes(tmp_path: Path) -> None:
    import numpy as np

    from streamprior.records import Frame

    quarantine = Quarantine(tmp_path, most_files=10, most_bytes=20_000)
    quarantine.keep(Frame("eiger", "1", 0, np.zeros((500, 500), np.uint16), 0.0, 0.0), WireError("wrong_shape", "another detector's"))
    assert kept(tmp_path)[1] <= 20_000
