"""The benchmarks of the kernels: contestants compute the same, rows can be had alone, the page says what was missed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks_page import benchmarks_page, head, shown
from streamprior_bench import classify, limits, measure, refine, rows
from streamprior_bench.peers_classify import minisom_classes, minisom_of, projected, scipy_classes
from streamprior_bench.peers_refine import cohere_er, numpy_er, scipy_er
from typer.testing import CliRunner

from streamprior.cli import app
from streamprior.stages.classify import Classifier
from streamprior.stages.refine import Solver
from streamprior.stages.schedule import Plan, parse_schedule

F32 = np.float32
MACHINE = {"cpu": "a processor", "cores": 2, "load_1min": 0.0, "python": "3.11", "versions": {"numpy": "2"}}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of each contestant is a measurement: nothing here depends on the clock."""
    monkeypatch.setattr(measure, "SECONDS", 0.0)


@pytest.mark.parametrize("shape", [(24, 20), (12, 10, 8)])
@pytest.mark.parametrize("peer", [scipy_er, numpy_er, cohere_er])
def test_every_peer_makes_the_iterations_that_we_make(shape: tuple[int, ...], peer: Any) -> None:
    counts, flat, valid = refine.made_frames(shape, 1)
    # The transform of a flat box has exact zeros, whose phase is whatever rounding makes it.
    start = replace(flat, psi=refine.with_prototypes(flat, 1).psi[:, :1])
    ours = Solver(shape, Plan(parse_schedule(20))).solve(counts, start, valid, None)
    try:
        theirs = peer(counts[0], start.psi[0, 0], start.support[0, 0], 21)
    except ImportError as error:
        pytest.skip(f"this peer is not installed: {error}")
    psi, misfits = theirs()
    # They note the misfit before an iteration, we after it; cohere's object has a scale of its own.
    np.testing.assert_allclose(ours.history[0], misfits[1:], rtol=1e-3)
    again = theirs()[0]
    np.testing.assert_array_equal(psi, again, err_msg="a second solution does not begin where the first began")
    inside = start.support[0, 0]
    likeness = np.abs(np.vdot(psi[inside], ours.psi[0][inside])) / (np.linalg.norm(psi[inside]) * np.linalg.norm(ours.psi[0][inside]))
    assert likeness > 0.999


def test_every_peer_finds_the_classes_that_we_find() -> None:
    pytest.importorskip("sklearn.metrics")
    pytest.importorskip("minisom")
    frames = classify.synthetic_frames(104)[:1]
    prior = classify.synthetic_prior(frames, 7)
    ours = Classifier(prior).classes(frames, ~prior.invalid).ids[0]
    assert np.mean(ours == scipy_classes(frames[0], prior)[0]) > 0.9999
    table = projected(frames[0], prior)[:500]
    assert np.mean(ours.ravel()[:500] == minisom_classes(minisom_of(prior), table)) > 0.99


def test_the_multiply_adds_are_as_many_as_are_counted() -> None:
    numbers = np.linspace(0.25, 1.25, 32, dtype=F32)
    chains = numbers[:, None] - np.arange(8) / 8
    for _ in range(limits._LINKS):
        chains = chains * chains - 0.5
    limits._multiply_adds(numbers, F32(-0.5), 1)
    np.testing.assert_allclose(numbers, chains.max(1), rtol=1e-5)
    assert chains.shape[1] == limits._CHAINS


def test_what_streams_reads_every_count_and_writes_every_id() -> None:
    counts = np.random.default_rng(0).poisson(3, (2, 700)).astype(np.uint16)
    valid, ids = np.arange(700) % 5 > 0, np.empty((2, 700), np.uint8)
    limits._streamed(counts, valid, ids)
    mean = (counts * valid).sum(1, keepdims=True) / 700
    np.testing.assert_array_equal(ids, np.where(valid, counts > mean, 255))


@pytest.mark.usefixtures("quick")
def test_a_slow_contestant_is_called_three_times_at_most() -> None:
    calls: list[str] = []
    spent = measure.timed({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 5)
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 3}
    assert "".join(calls) == "ab" * 5, "they do not take turns, or do not warm up"


def test_beside_each_other_means_at_the_same_time_and_an_error_is_not_lost() -> None:
    together = threading.Barrier(2, timeout=30)
    measure.beside(together.wait, together.wait)()

    def fails() -> None:
        raise ValueError("of this one")

    with pytest.raises(ValueError, match="of this one"):
        measure.beside(fails, lambda: None)()


def test_the_spread_is_that_of_the_middle_eight_in_ten() -> None:
    assert measure.spread([*range(5, 16)]) == pytest.approx(0.8)


def test_only_the_rows_asked_for_are_measured() -> None:
    def never(repeats: int) -> dict[str, Any]:
        raise AssertionError("a row was measured that nobody asked for")

    cases = [measure.Case("64x64, one core", never), measure.Case("128x128, one core", lambda repeats: {"ours_ms": repeats})]
    assert list(measure.rows_of(cases, 3, "128x128")) == [{"what": "128x128, one core", "ours_ms": 3}]


@pytest.mark.usefixtures("quick")
def test_a_peer_that_is_not_installed_has_its_row_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refine, "PEERS", {"cohere": ("no_such_module", "cohere-core")})
    monkeypatch.setattr(refine, "SHAPES", ((16, 16),))
    skipped, row = rows("refine", 1, "16x16, one core")
    assert skipped["what"] == "cohere"
    assert "pip install cohere-core" in skipped["skipped"]
    assert row["cohere_ms"] is None
    assert row["scipy_ms"] > 0


def test_a_name_that_no_row_has_is_the_operators_mistake() -> None:
    result = CliRunner().invoke(app, ["bench", "refine", "--only", "7x7"])
    assert result.exit_code == 2
    assert "'7x7'" in result.output


def small_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Every row of the benchmarks, under its name, with the numbers of a small one of its kind."""
    named = {"classify": classify.cases(()), "refine": refine.cases(())}
    monkeypatch.setattr(classify, "SIZES", (16,))
    monkeypatch.setattr(classify, "PATH_SIZE", 16)
    monkeypatch.setattr(refine, "SHAPES", ((12, 12), (6, 6, 6)))
    monkeypatch.setattr(refine, "VARIED", ((12, 12),))
    monkeypatch.setattr(refine, "PIXELS_A_THREAD", 1)
    small = {"classify": classify.cases(()), "refine": refine.cases(())}
    for benchmark, cases in named.items():
        for case in cases:
            words = [word for word in case.what.replace(",", " ").split() if not any(map(str.isdigit, word))]
            like = next(one for one in small[benchmark] if all(word in one.what for word in words))
            yield {"benchmark": benchmark, "what": case.what, **like.row(1)}


@pytest.fixture(scope="module")
def measured_rows() -> list[dict[str, Any]]:
    pytest.importorskip("sklearn.metrics")
    pytest.importorskip("minisom")
    pytest.importorskip("cohere_core.controller.phasing", exc_type=ImportError)
    with pytest.MonkeyPatch.context() as monkeypatch, measure.one_core():
        monkeypatch.setattr(measure, "SECONDS", 0.0)
        return list(small_rows(monkeypatch))


def page_of(folder: Path, lines: list[dict[str, Any]]) -> str:
    file = folder / "machine.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in [{"machine": MACHINE}, *lines]))
    return benchmarks_page(file, [])


def target(page: str, words: str) -> str:
    """The line of the table of targets."""
    return next(line for line in page.partition("## classify")[0].splitlines() if line.startswith(f"| {words}"))


CHANGED = (
    ("classify 104x104 K=3 float32, one core", "classify", "104x104 K=3 float32, one core", {"ours_ns": 5.9}, {"ours_ns": 6.1}),
    ("classify 2048x2048 K=49 float32, one", "classify", "2048x2048 K=49 float32, one core", {"ours_ns": 19.0}, {"ours_ns": 21.0}),
    ("classify 104x104 K=3 float32, two", "classify", "104x104 K=3 float32, two cores", {"two_over_one": 1.81}, {"two_over_one": 1.79}),
    ("refine ER-50 128x128, one core", "refine", "ER-50 128x128, one core", {"floor_over_ours": 0.91}, {"floor_over_ours": 0.89}),
    ("refine ER-50 64x64x64, two cores", "refine", "ER-50 64x64x64, two cores", {"two_over_one": 1.86}, {"two_over_one": 1.84}),
    ("path 128x128 uint16, refinement on", "path", "128x128 uint16, refinement on", {"path_over_stages": 0.86}, {"path_over_stages": 0.84}),
    ("path frames/s without", "path", "128x128 uint16, refinement off", {"path_frames_per_s": 5100.0}, {"path_frames_per_s": 4900.0}),
    ("path p99 latency of the mask", "path", "128x128 uint16, half load", {"mask_p99_ms": 4.9}, {"mask_p99_ms": 5.1}),
)
RATES = {"path_frames_per_s": 1.0, "stages_alone_frames_per_s": 2.0}
PATHS = [{"benchmark": "path", "what": f"128x128 uint16, {words}", **RATES} for words in ("refinement on", "refinement off", "half load")]


def test_targets_are_met_and_missed_by_their_own_numbers(tmp_path: Path, measured_rows: list[dict[str, Any]]) -> None:
    for words, benchmark, what, good, bad in CHANGED:
        for change, verdict in ((good, "| met |"), (bad, "| **missed** |")):
            lines = [
                {**line, **change} if (line["benchmark"], line["what"]) == (benchmark, what) else line for line in [*measured_rows, *PATHS]
            ]
            assert verdict in target(page_of(tmp_path, lines), words), (words, change)


def test_one_shape_at_which_a_variant_is_slow_misses_its_target(tmp_path: Path, measured_rows: list[dict[str, Any]]) -> None:
    shares = [{**line, "floor_over_ours": 1.0} if "over_plain" in line else line for line in measured_rows]
    assert "| met |" in target(page_of(tmp_path, shares), "refine HIO")
    slow = [{**line, "floor_over_ours": 0.89} if line["what"] == "HIO, 50 iterations 256x256" else line for line in shares]
    assert "| **missed** |" in target(page_of(tmp_path, slow), "refine HIO")
    assert "| met |" in target(page_of(tmp_path, slow), "refine RAAR")


def test_every_target_of_the_kernels_has_a_row_and_the_command_that_repeats_it(tmp_path: Path, measured_rows: list[dict[str, Any]]) -> None:
    names = {benchmark: [line["what"] for line in measured_rows if line["benchmark"] == benchmark] for benchmark in ("classify", "refine")}
    lines = [line for line in page_of(tmp_path, measured_rows).splitlines() if line.startswith(("| classify ", "| refine "))]
    assert len(lines) == 4 + 2 + 4 + 4 + 7
    for line in lines:
        assert "not measured" not in line
        benchmark, _, only = line.rsplit("| `", 1)[1].removesuffix("` |").partition(" --only ")
        assert any(only.strip('"') in name for name in names[benchmark]), line


def test_what_was_not_measured_is_said(tmp_path: Path) -> None:
    page = page_of(tmp_path, [{"benchmark": "refine", "what": "cohere", "skipped": "cohere cannot be imported: pip install cohere-core"}])
    assert "not measured" in target(page, "classify 104x104")
    assert "Not measured: cohere cannot be imported: pip install cohere-core." in page


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("ours_ns", "ours, ns/pixel"),
        ("floor_over_ours", "floor / ours"),
        ("frames_per_s", "frames/s"),
        ("ours_spread", "spread of ours"),
        ("what", "what"),
    ],
)
def test_heads_of_columns_have_units(key: str, words: str) -> None:
    assert head(key) == words


@pytest.mark.parametrize(
    ("value", "words"), [(13775.2, "13,800"), (999.9, "1,000"), (0.25779, "0.258"), (4.0, "4"), (None, "-"), ("fftw", "fftw"), (7, "7")]
)
def test_cells_have_three_significant_digits(value: object, words: str) -> None:
    assert shown("ours_ms", value) == words
