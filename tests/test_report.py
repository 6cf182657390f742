"""The report: every number in JSON, a page that needs nothing but itself, and failures that are said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamprior as sp
from streamprior.evaluate.judge import COLUMNS, QUALITY, failures, judge, median, percentile, representatives, share_near
from streamprior.evaluate.page import Section, Table, page, shown
from streamprior.evaluate.records import LEAK, Arm, Comparison
from streamprior.evaluate.report import plain, write_report
from streamprior.prior import Library, Prior, freeze
from streamprior.records import Photons
from tests.builders import diffraction, small_prior

FRAMES = 4


def make_arm(name: str, photons: Photons, psi: np.ndarray, support: np.ndarray, schedule: str, **changes: Any) -> Arm:
    found = sp.refine(photons, psi, support, schedule=schedule)
    number = len(psi)
    arm = Arm(
        name,
        found.psi,
        found.support,
        found.chi2,
        found.floor,
        found.r_factor,
        found.free_llk,
        found.history,
        found.history.shape[1],
        2 * found.history.shape[1] + 1,
        np.full(number, -1, np.int32),
        np.full(number, np.nan),
        np.zeros(number, bool),
        (name,) * number,
    )
    return replace(arm, **changes)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Four frames, four arms; the last frame is one that the daemon abstained from."""
    prior = small_prior()
    counts = diffraction(count=FRAMES).astype(np.float32)
    photons = Photons(counts, ~prior.invalid, np.zeros(FRAMES, np.uint32))
    flat = sp.match(photons, prior)
    support = np.ascontiguousarray(flat.support[:, 0])
    random = np.random.default_rng(0)
    starts = [flat.psi[:, 0] * np.exp(2j * np.pi * random.random(support.shape)).astype(np.complex64) for _ in range(3)]
    full = make_arm("full solve", photons, flat.psi[:, 0], support, "60*HIO+40*ER")
    abstained = np.array([False, False, False, True])
    arms = (
        make_arm("random", photons, starts[0], support, "20*ER"),
        make_arm("flat", photons, flat.psi[:, 0], support, "20*ER"),
        full,
        make_arm("streamprior", photons, full.psi, support, "20*ER", abstained=abstained, distance=np.array([1.0, 2.0, 3.0, 9.0])),
    )
    runs = np.stack([sp.refine(photons, one, support, iterations=20).psi for one in starts])
    valid = np.broadcast_to(~prior.invalid, counts.shape)
    return Comparison("even -> odd", tuple(range(1, 8, 2)), counts, valid, full.psi, "full solve", arms, ("A note.",), runs, 5.0)


@pytest.fixture(scope="module")
def single(comparison: Comparison) -> Comparison:
    """The first frame alone, from a flat start."""
    arm = comparison.arms[1]
    parts = ("psi", "support", "chi2", "floor", "r_factor", "free_llk", "history", "unit", "distance", "abstained", "kept")
    one = replace(arm, **{name: getattr(arm, name)[:1] for name in parts})
    first = {name: getattr(comparison, name)[:1] for name in ("frames", "counts", "valid", "reference")}
    return replace(comparison, arms=(one,), random_runs=None, **first)


@pytest.fixture(scope="module")
def written(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prior = replace(small_prior(), provenance={"file": "scan.cxi", "frames": "0::2"})
    other = replace(comparison, title="odd -> even", random_runs=None)
    folder = tmp_path_factory.mktemp("report")
    tables = {"Centroid reuse": [{"frame": 5, "IoU": 0.91}, {"frame": 10, "IoU": float("nan")}]}
    return write_report(folder, prior, [comparison, other], {"full": 100}, tables)


def test_the_page_needs_nothing_but_itself(written: Path) -> None:
    text = written.read_text()
    assert "<script" not in text
    assert not re.findall(r"""(?:src|href)="(?!data:)|url\(|@import|<link""", text)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]+", "", text)


class Outline(HTMLParser):
    """Checks that tags close in order, and keeps what stands in headings and cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.append((self.open[-1], data.strip()))


def test_the_page_is_whole_and_shows_both_directions_side_by_side(written: Path) -> None:
    outline = Outline()
    outline.feed(written.read_text())
    assert outline.open == []
    headings = [text for tag, text in outline.texts if tag == "h2"]
    assert headings[:3] == ["Summary", "What failed, and what to keep in mind", "Centroid reuse"]
    assert headings[3:5] == ["even -> odd", "odd -> even"]
    assert ("th", "even -> odd") in outline.texts
    assert ("td", "0.91") in outline.texts


def test_every_picture_is_in_the_page_and_beside_it(written: Path) -> None:
    names = {path.stem for path in (written.parent / "pictures").glob("*.png")}
    assert {
        "1-convergence",
        "1-errors",
        "1-distance",
        "1-prtf",
        "1-frame-best",
        "1-frame-worst",
        "1-frame-abstained",
        "prior-classes",
    } <= names
    assert "2-prtf" not in names, "without random runs there is no transfer function"
    assert written.read_text().count("data:image/png;base64,") == len(names)


def test_the_json_holds_every_number(written: Path, comparison: Comparison) -> None:
    report = json.loads((written.parent / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert report["format"] == "streamprior-report"
    assert report["prior"]["content_hash"] == small_prior().content_hash
    assert report["settings"] == {"full": 100}
    first = report["comparisons"][0]
    assert first["frames"] == [1, 3, 5, 7]
    assert [row["arm"] for row in first["summary"]] == ["random", "flat", "full solve", "streamprior"]
    for row in first["summary"]:
        assert set(row) == {"arm", *COLUMNS}
    for arm in comparison.arms:
        stored = first["arms"][arm.name]
        assert stored["chi2"] == pytest.approx(arm.chi2.tolist())
        assert len(stored["history"]) == FRAMES
        assert {len(stored[name]) for name in QUALITY} == {FRAMES}
    assert first["arms"]["full solve"]["error"] == [None] * FRAMES, "the reference has no error of its own"
    assert first["arms"]["flat"]["distance"] == [None] * FRAMES


def test_a_second_report_replaces_the_first(single: Comparison, tmp_path: Path) -> None:
    first = write_report(tmp_path, small_prior(), [replace(single, title="one")])
    second = write_report(tmp_path, small_prior(), [replace(single, title="two")])
    assert first == second
    assert "two" in second.read_text()


def test_a_report_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        write_report(tmp_path, small_prior(), [])


def test_titles_and_names_cannot_break_the_page() -> None:
    text = page("<b>&", "", "", [Section("<script>", ["a < b", Table([{"arm": "<i>", "n": 1}])])])
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    assert "&lt;i&gt;" in text


def test_a_leak_stands_in_red_above_everything(single: Comparison, tmp_path: Path) -> None:
    note = f"{LEAK}: 3 of 4 frames are among the training frames."
    text = write_report(tmp_path, small_prior(), [replace(single, notes=(note,))]).read_text()
    assert text.index('class="alarm"') < text.index("<h2>")
    assert note in text


def test_the_failures_are_said(comparison: Comparison) -> None:
    arms = {arm.name: arm for arm in comparison.arms}
    worse = replace(arms["random"], name="streamprior", chi2=2 * arms["flat"].chi2)
    undefined = replace(arms["flat"], name="prototype", chi2=np.array([np.nan, 0.1, 0.1, 0.1]))
    found = " ".join(failures(judge(replace(comparison, arms=(arms["flat"], undefined, worse)))))
    assert "worse than flat in median chi²" in found
    assert "(2.00 times)" in found
    assert "prototype has no chi² on 1 of 4" in found
    assert "1 of 4 frames lie beyond the distance gate" in " ".join(failures(judge(comparison)))


def test_the_frames_shown_are_the_extremes_the_middle_and_one_abstained(comparison: Comparison, single: Comparison) -> None:
    judged = judge(comparison)
    chosen = representatives(judged)
    error = judged.quality["streamprior"][0]
    assert chosen["best"] == int(np.argmin(error[:3]))
    assert chosen["worst"] == int(np.argmax(error[:3]))
    assert chosen["abstained"] == 3
    assert representatives(judge(single)) == {"best": 0}


def test_summary_numbers_ignore_what_is_undefined() -> None:
    assert median(np.array([1.0, np.nan, 3.0])) == 2.0
    assert np.isnan(median(np.array([np.nan])))
    assert percentile(np.array([1.0, np.inf, np.inf]), 75) == np.inf
    assert share_near(np.array([1.0, 1.2, np.nan, 1.0]), np.array([1.0, 1.0, 1.0, np.nan])) == pytest.approx(1 / 3)


def test_cells_are_short_and_say_what_is_undefined() -> None:
    assert [shown(one) for one in (float("nan"), None, 0.123456, 12, 1.5e7, float("inf"), "a")] == [
        "-",
        "-",
        "0.123",
        "12",
        "1.50e+07",
        "∞",
        "a",
    ]


def test_numbers_that_json_cannot_hold_become_null() -> None:
    assert plain({"a": np.float32("nan"), "b": np.array([1, 2]), 3: (np.inf, True, None)}) == {
        "a": None,
        "b": [1, 2],
        "3": [None, True, None],
    }


def test_a_prior_with_more_to_tell_has_it_shown(single: Comparison, tmp_path: Path) -> None:
    training = {"elbow_k": np.arange(2, 6), "elbow_inertia": np.array([4.0, 2, 1, 0.9]), "silhouette": np.array([0.5, 0.6, 0.5, 0.4])}
    more: Prior = freeze(replace(small_prior(), training=training, library=small_library()))
    written = write_report(tmp_path, more, [single])
    assert (written.parent / "pictures" / "prior-elbow.png").exists()
    assert (written.parent / "pictures" / "prior-prototypes.png").exists()
    assert "Prototypes of the prior" in written.read_text()


def small_library() -> Library:
    """Three prototypes on a map of two by two units; the last two share one."""
    support = np.broadcast_to(small_prior().support, (3, 32, 32))
    psi = (support / np.sqrt(support[0].sum())).astype(np.complex64)
    place = np.array([[0, 0], [1, 1], [1, 1]], np.int32)
    members = np.array([2, 1, 4], np.int32)
    patterns = np.zeros((7, 16), np.float32)
    unit = np.array([0, 0, 1, 2, 2, 2, 2], np.int32)
    return Library(psi, support, support[0], place, members, np.ones(3, np.float32), patterns, unit, 8, 1.0)


def test_a_volume_is_shown_by_its_middle_slice(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    psi = np.zeros((2, 16, 16, 16), np.complex64)
    psi[:, 5:11, 5:11, 5:11] = np.exp(1j * random.normal(size=(2, 6, 6, 6)))
    counts = (1000 * np.abs(np.fft.fftshift(np.fft.fftn(psi, axes=(1, 2, 3), norm="ortho"), (1, 2, 3))) ** 2).astype(np.float32)
    photons = Photons(counts, np.ones((16, 16, 16), bool), np.zeros(2, np.uint32))
    arm = make_arm("streamprior", photons, psi, np.abs(psi) > 0, "5*ER")
    volumes = Comparison("set1 -> set2", (0, 1), counts, np.ones(counts.shape, bool), psi, "truth", (arm,))
    written = write_report(tmp_path, small_prior(), [volumes])
    assert (written.parent / "pictures" / "1-frame-best.png").exists()
