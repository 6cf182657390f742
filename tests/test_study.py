"""What an evaluation is run on: frames the prior can judge, leaks looked for, and refusals with a remedy."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamprior_sim.crystals import MORPHOLOGIES, grow_crystal

from streamprior.arrays import far_field
from streamprior.config import RefineSettings
from streamprior.errors import ConfigError
from streamprior.evaluate.arms import compare_arms
from streamprior.evaluate.records import FULL_SOLVE, LEAK
from streamprior.evaluate.study import choose, leak_note, leaks, swapped, title_of
from streamprior.prior import Prior, frame_hashes, save_prior
from streamprior.sources.files import open_recording
from streamprior.stages.match import Matcher
from streamprior.stages.prepare import Corrections, prepare
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings
from tests.builders import diffraction, small_prior
from tests.test_cli import streamprior

QUICK = TrainSettings(classes=3, pixels=5_000, control=1, schedule="20*HIO+5*ER+SW(2.0,0.1)+10*ER", starts=1, neighbours=0)


def crystals(seeds: range) -> np.ndarray[Any, Any]:
    """(N, 64, 64) uint32 at 1e5 photons, of the morphologies in turn."""
    psi = np.stack([grow_crystal(MORPHOLOGIES[seed % len(MORPHOLOGIES)], seed) for seed in seeds])
    return np.random.default_rng(0).poisson(1e5 * np.abs(far_field(psi)) ** 2).astype(np.uint32)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    """Ten frames, the last two of them a hundred times fainter."""
    bright, faint = diffraction(count=8), diffraction(count=2, photons=200)
    np.save(tmp_path / "scan.npy", np.concatenate([bright, faint]))
    return tmp_path / "scan.npy"


def knowing(**changes: Any) -> Prior:
    prior = small_prior()
    return replace(prior, baselines={**prior.baselines, "flux_least": (2.0, 0.0)}, **changes)


def test_frames_fainter_than_the_training_are_left_out_and_counted(scan: Path) -> None:
    chosen = choose(knowing(), open_recording(scan, "1::2"))
    assert chosen.frames == (1, 3, 5, 7)
    assert chosen.faint == 1
    assert chosen.photons.counts.shape == chosen.photons.valid.shape == (4, 32, 32)


def test_many_frames_are_thinned_evenly(scan: Path) -> None:
    assert choose(knowing(), open_recording(scan), most=3).frames == (0, 4, 7)


def test_pixels_that_the_file_calls_bad_are_not_judged(scan: Path) -> None:
    recording = open_recording(scan)
    mask = np.zeros((32, 32), bool)
    mask[2, 3] = True
    masked = replace(recording, geometry=replace(recording.geometry, mask=mask))
    valid = choose(knowing(), masked).photons.valid
    assert not valid[:, 2, 3].any()
    assert valid.sum() == valid.size - len(valid)


def test_a_recording_of_another_detector_is_refused(scan: Path) -> None:
    with pytest.raises(ConfigError, match=r"its frames are 32 x 32, the prior was grown on 16 x 16"):
        choose(small_prior((16, 16)), open_recording(scan))


def test_a_recording_too_faint_to_judge_is_refused(scan: Path) -> None:
    with pytest.raises(ConfigError, match="none of its 2 frames is as bright"):
        choose(knowing(), open_recording(scan, "8:"))


def test_frames_of_the_training_are_found_by_content() -> None:
    counts = diffraction(count=6).astype(np.float32)
    prior = replace(small_prior(), training={"frame_hashes": frame_hashes(counts[::2])})
    assert leaks(prior, counts).tolist() == [0, 2, 4]
    assert leaks(prior, counts[1::2]).tolist() == []
    assert leaks(prior, counts + np.float32(1)).tolist() == []


def test_a_prior_that_does_not_say_what_it_knows_cannot_be_checked() -> None:
    with pytest.raises(ValueError, match="no hashes"):
        leaks(small_prior(), diffraction(count=1).astype(np.float32))


def test_the_leak_check_says_none_or_names_the_frames_or_that_it_cannot_tell(scan: Path) -> None:
    prior = knowing()
    chosen = choose(prior, open_recording(scan))
    assert "no hashes" in leak_note(prior, chosen)
    of_others = knowing(training={"frame_hashes": frame_hashes(diffraction(count=3, seed=9).astype(np.float32))})
    assert "none of the 8 frames" in leak_note(of_others, chosen)
    of_these = knowing(training={"frame_hashes": chosen.hashes[[2, 5]]})
    assert leak_note(of_these, chosen).startswith(LEAK)
    assert "2 of the 8 frames are among the prior's training frames (2, 5)" in leak_note(of_these, chosen)


@pytest.mark.parametrize(
    ("story", "title"),
    [
        ({"file": "scan.npy", "frames": "0::2"}, "0::2 -> 1::2"),
        ({"files": ["scan.npy"], "frames": "0::2"}, "0::2 -> 1::2"),
        ({"files": ["a.cxi", "b.cxi"], "frames": ":"}, "unknown [:] -> scan.npy [1::2]"),
        ({"file": "other.cxi", "frames": ":5"}, "other.cxi [:5] -> scan.npy [1::2]"),
        ({}, "unknown [?] -> scan.npy [1::2]"),
    ],
)
def test_the_title_says_what_was_learned_on_and_what_it_is_judged_on(scan: Path, story: dict[str, Any], title: str) -> None:
    assert title_of(knowing(provenance=story), open_recording(scan, "1::2"), "1::2") == title


@pytest.mark.parametrize("story", [{}, {"file": "other.cxi", "frames": "0::2"}, {"file": "scan.npy"}])
def test_the_other_direction_needs_to_know_what_the_prior_was_grown_on(scan: Path, story: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="leave --swap out"):
        swapped(knowing(provenance=story), str(scan), "1::2")


def test_evaluate_refuses_with_a_remedy_before_it_works(scan: Path, tmp_path: Path) -> None:
    save_prior(small_prior((16, 16)), tmp_path / "small.h5")
    save_prior(knowing(), tmp_path / "prior.h5")
    cases = (
        (("missing.h5", scan), "no such file"),
        ((tmp_path / "small.h5", scan), "the prior was grown on 16 x 16"),
        ((tmp_path / "prior.h5", tmp_path / "nothing.cxi"), "no such file"),
        ((tmp_path / "prior.h5", scan, "--frames", "x"), "not a Python slice"),
        ((tmp_path / "prior.h5", scan, "-o", scan), "no folder that can be written to"),
    )
    for words, says in cases:
        said = streamprior("evaluate", "-o", tmp_path / "report", *words)
        assert said.exit_code == 2, said.output
        assert says in said.output
    assert not (tmp_path / "report").exists()


def test_evaluate_writes_a_report_in_both_directions(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.repeat(diffraction(count=4), 2, axis=0) + diffraction(count=8, seed=3) // 20)
    quick = TrainSettings(schedule="20*HIO+20*ER+SW(2.0)+20*ER", pixels=2000, shape=32, classes=3)
    story = {"files": ["scan.npy"], "frames": "0::2"}
    save_prior(grow_prior(open_recording(tmp_path / "scan.npy", "0::2"), settings=quick, provenance=story), tmp_path / "prior.h5")
    words = (tmp_path / "prior.h5", tmp_path / "scan.npy", "--frames", "1::2", "-o", tmp_path / "report")
    said = streamprior("evaluate", *words, "--most", "2", "--swap")
    assert said.exit_code == 0, said.output
    assert "0::2 -> 1::2: 2 frames" in said.output
    assert "1::2 -> 0::2: 2 frames" in said.output
    assert "none of the 2 frames is among the prior's training frames" in said.output
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [one["title"] for one in content["comparisons"]] == ["0::2 -> 1::2", "1::2 -> 0::2"]
    named = {row["arm"] for row in content["comparisons"][0]["summary"]}
    assert {
        "random",
        "flat",
        "flat + plan",
        "zero phase",
        "prototype",
        "shuffled prototype",
        "full solve",
        "oracle",
        "streamprior",
    } <= named
    words = (tmp_path / "prior.h5", tmp_path / "scan.npy", "--frames", "0::4", "-o", tmp_path / "leaking")
    said = streamprior("evaluate", *words)
    assert said.exit_code == 0
    assert "LEAK: 2 of the 2 frames" in said.output
    assert 'class="alarm"' in (tmp_path / "leaking" / "report.html").read_text()


def test_one_frames_bad_pixels_change_no_other_frames_distance(tmp_path: Path) -> None:
    prior = grow_prior(crystals(range(8)), settings=QUICK)
    frames = crystals(range(4))
    frames[1, 36:44, 10:54] = np.iinfo(frames.dtype).max
    np.save(tmp_path / "scan.npy", frames)
    chosen = choose(replace(prior, baselines={}), open_recording(tmp_path / "scan.npy"))
    assert chosen.frames == (0, 1, 2, 3)
    together = chosen.photons
    matcher = Matcher(prior)
    start, strange = matcher.starts(together)
    for i, frame in enumerate(frames):
        alone, strange_alone = matcher.starts(prepare(frame, prior))
        np.testing.assert_array_equal(start.unit[i], alone.unit[0])
        np.testing.assert_array_equal(start.distance[i], alone.distance[0])
        assert strange[i] == strange_alone[0]


def test_a_dark_hides_no_leak_and_may_not_be_forgotten(tmp_path: Path) -> None:
    frames = crystals(range(6)) + 3
    dark = np.full(frames.shape[1:], 3, np.float32)
    np.save(tmp_path / "scan.npy", frames)
    corrections = Corrections(dark=dark)
    prior = grow_prior(frames, settings=QUICK, corrections=corrections, provenance={"dark": "dark.npy"})
    recording = open_recording(tmp_path / "scan.npy")
    with pytest.raises(ConfigError, match=r"grown with --dark dark\.npy"):
        choose(prior, recording)
    chosen = choose(prior, recording, corrections=corrections)
    assert leak_note(prior, chosen).startswith(f"{LEAK}: 6 of the 6 frames")


def test_every_arm_but_the_full_solve_costs_the_same_whatever_the_settings() -> None:
    prior = grow_prior(crystals(range(8)), settings=QUICK)
    photons = prepare(crystals(range(8, 10)), prior)
    for settings in (RefineSettings(), RefineSettings(iterations=50), RefineSettings(candidates=5)):
        arms = compare_arms(photons, prior, settings=settings, seeds=3).arms
        assert len({arm.iterations for arm in arms if arm.name != FULL_SOLVE}) == 1, settings
