"""Objects solved offline: found again after a stop, the same on any number of threads, and averaged only where they are one object."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from streamprior_sim.crystals import grow_crystal

from streamprior.align import align, twin
from streamprior.arrays import far_field
from streamprior.prior import Library
from streamprior.records import Photons
from streamprior.stages.match import match
from streamprior.stages.prepare import prepare
from streamprior.stages.refine import Solver, refine
from streamprior.stages.schedule import parse_schedule
from streamprior.train import TrainSettings, grow_prior
from streamprior.train.prototypes import gather, grow_library, summary
from streamprior.train.solve import LARGEST, SMALLEST, Solved, SolveSettings, autocorrelation_support, canonical, control_of, solve_frames
from tests.builders import small_prior

Array = npt.NDArray[Any]
HOW = SolveSettings("20*HIO+5*ER+SW(2.0)+10*ER", starts=2, polish="10*ER", neighbours=2)
SETTINGS = TrainSettings(schedule=HOW.schedule, starts=2, polish=HOW.polish, neighbours=2)


def silent(stage: str, done: int, total: int) -> None: ...


NAMES = ("compact symmetric core", "elongated core", "needle streak")


def measured(names: tuple[str, ...] = NAMES, each: int = 2, seed: int = 0) -> Photons:
    """Frames of 48 x 48 and 1e5 photons, each of another crystal."""
    psi = np.stack([grow_crystal(name, i, (48, 48)) for i in range(each) for name in names])
    counts = np.random.default_rng(seed).poisson(1e5 * np.abs(far_field(psi)) ** 2).astype(np.float32)
    return Photons(counts, np.ones(counts.shape, bool), np.zeros(len(counts), np.uint32))


def same(one: Solved | Library, other: Solved | Library) -> None:
    for field in fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize("shape", [(32, 32), (33, 35), (12, 13, 14)], ids=str)
def test_the_canonical_object_is_one_for_all_that_diffract_alike(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    psi = np.zeros(shape, np.complex64)
    psi[tuple(slice(2, 2 + n // 2) for n in shape)] = rng.uniform(0.2, 1, [n // 2 for n in shape])
    psi *= np.exp(1j * rng.uniform(0, 2, shape))
    expected = canonical(psi)
    axes = tuple(range(len(shape)))
    for other in (psi * (3 - 4j), np.roll(psi, [5] * len(shape), axes), twin(psi), np.roll(1j * twin(psi), [-7] * len(shape), axes)):
        np.testing.assert_allclose(canonical(other.astype(np.complex64)), expected, atol=1e-6)
    assert np.sum(np.abs(expected) ** 2) == pytest.approx(1, rel=1e-5)
    assert np.angle(np.sum(expected * np.abs(expected) ** 2)) == pytest.approx(0, abs=1e-4)
    for axis, size in enumerate(shape):
        profile = (np.abs(expected) ** 2).sum(tuple(a for a in axes if a != axis))
        assert abs(profile @ np.arange(size) - size // 2) < 0.6
    assert not canonical(0 * psi).any()


@pytest.mark.parametrize("shape", [(64, 64), (65, 33), (20, 20, 21)], ids=str)
@pytest.mark.parametrize("light", ["one", "flat", "nothing", "noise"])
def test_the_first_support_keeps_to_its_bounds_whatever_the_frame(light: str, shape: tuple[int, ...]) -> None:
    counts = np.zeros(shape, np.float32)
    if light == "one":
        counts[tuple(n // 2 for n in shape)] = 100
    if light == "flat":
        counts += 100
    if light == "noise":
        counts += np.random.default_rng(0).poisson(0.01, shape)
    support = autocorrelation_support(counts)
    assert SMALLEST * support.size <= np.count_nonzero(support) <= LARGEST * support.size


def test_solved_objects_explain_their_frames_and_look_like_what_made_them() -> None:
    photons = measured(each=1)
    schedule = "40*HIO+10*ER+SW(2.5)+40*HIO+10*ER+SW(2.0)+40*HIO+10*ER+SW(1.5)+40*HIO+10*ER+SW(1.0)+30*ER"
    solved = solve_frames(photons, SolveSettings(schedule, 4, HOW.polish, 0), silent)
    assert (solved.chi2 < 6 * solved.floor).all()
    np.testing.assert_allclose((np.abs(solved.psi) ** 2).sum((1, 2)), 1, rtol=1e-5)
    for psi, support, name in zip(solved.psi, solved.support, NAMES, strict=True):
        assert align(psi, grow_crystal(name, 0, (48, 48))).error < 0.45
        np.testing.assert_array_equal(support, np.abs(psi) > 0.1 * np.abs(psi).max())


def test_polishing_never_makes_a_frame_worse() -> None:
    """Frames of one crystal that were hardly solved: a neighbour's object takes each of them further."""
    photons = measured(("elongated core",), 1)
    counts = np.random.default_rng(1).poisson(np.repeat(photons.counts, 4, 0)).astype(np.float32)
    frames = Photons(counts, np.ones(counts.shape, bool), np.zeros(4, np.uint32))
    alone, polished = (solve_frames(frames, SolveSettings("15*ER", 1, "30*ER", number), silent) for number in (0, 3))
    assert (polished.chi2 <= alone.chi2).all()
    assert (polished.chi2 < 0.9 * alone.chi2).any()
    untouched, kept = (solve_frames(frames, SolveSettings("60*ER", 1, "1*HIO", number), silent) for number in (0, 3))
    np.testing.assert_array_equal(kept.chi2, untouched.chi2)
    np.testing.assert_allclose(kept.psi, untouched.psi, atol=1e-6)


def test_a_stopped_training_goes_on_where_it_was_and_ends_with_the_same_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photons = measured()
    expected = grow_library(photons, SETTINGS, silent)

    class StoppedError(Exception):
        pass

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "solve" and done == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        grow_library(photons, SETTINGS, stop, tmp_path / "kept")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "kept").iterdir()}
    assert len(files) >= 3
    assert all(file.suffix == ".h5" for file in files)
    solves: list[int] = []
    counted = Solver.solve

    def count(self: Solver, *arguments: Any) -> Any:
        solves.append(1)
        return counted(self, *arguments)

    monkeypatch.setattr(Solver, "solve", count)
    same(grow_library(photons, SETTINGS, silent, tmp_path / "kept"), expected)
    assert {file: file.stat().st_mtime_ns for file in files} == files, "what was solved is not solved again"
    left, polishes = 6 - len(files), 6 * SETTINGS.neighbours
    assert len(solves) == left * SETTINGS.starts + polishes
    solves.clear()
    same(grow_library(photons, SETTINGS, silent, tmp_path / "kept"), expected)
    assert len(solves) == polishes


@pytest.mark.parametrize("change", [{"starts": 1}, {"seed": 1}, {"schedule": "30*ER"}])
def test_what_was_solved_in_another_way_is_solved_again(change: dict[str, Any], tmp_path: Path) -> None:
    photons = measured(each=1)
    solve_frames(photons, HOW, silent, tmp_path)
    other = SolveSettings(**{**{field.name: getattr(HOW, field.name) for field in fields(HOW)}, **change})
    same(solve_frames(photons, other, silent, tmp_path), solve_frames(photons, other, silent))


def test_frames_that_are_equal_to_the_last_photon_are_kept_side_by_side(tmp_path: Path) -> None:
    one = measured(each=1)
    twice = Photons(np.repeat(one.counts[:1], 6, 0), np.ones((6, 48, 48), bool), np.zeros(6, np.uint32))
    solved = solve_frames(twice, HOW, silent, tmp_path)
    for psi in solved.psi[1:]:
        np.testing.assert_array_equal(psi, solved.psi[0])
    assert len(list(tmp_path.iterdir())) == 1
    library = gather(twice, solved, SETTINGS, silent)
    assert library.members.tolist() == [6]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_library(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    photons = measured()
    expected = grow_library(photons, SETTINGS, silent)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    same(grow_library(photons, SETTINGS, silent), expected)


def test_a_frames_object_does_not_depend_on_the_other_frames() -> None:
    photons = measured()
    few = Photons(photons.counts[2:4], photons.valid[2:4], photons.flags[2:4])
    how = SolveSettings(HOW.schedule, 2, HOW.polish, 0)
    np.testing.assert_array_equal(solve_frames(few, how, silent).psi, solve_frames(photons, how, silent).psi[2:4])


def test_what_dead_pixels_said_changes_nothing() -> None:
    counts = measured(each=1).counts.astype(np.uint32)
    dead = np.random.default_rng(0).random((48, 48)) > 0.95
    prior = small_prior((48, 48), invalid=dead)

    def grown(frames: Array) -> Library:
        photons = prepare(frames, prior)
        return grow_library(replace(photons, valid=np.broadcast_to(photons.valid, photons.counts.shape)), SETTINGS, silent)

    same(grown(np.where(dead, np.uint32(100_000), counts)), grown(counts))


def pretended(psi: Array, photons: Photons) -> Solved:
    """Objects as if they had been solved, the first one best."""
    objects = np.stack([canonical(one) for one in psi])
    inside = np.abs(objects) > 0.1 * np.abs(objects).max((1, 2), keepdims=True)
    return Solved(objects, inside, np.linspace(1, 2, len(psi)), np.ones(len(psi)))


def test_copies_of_one_object_become_one_prototype_and_different_objects_never_do() -> None:
    crystals = [grow_crystal(name, 0, (48, 48)) for name in ("compact symmetric core", "needle streak")]
    rng = np.random.default_rng(0)
    copies = []
    for psi in crystals:
        for k in range(4):
            noise = rng.normal(size=psi.shape) + 1j * rng.normal(size=psi.shape)
            noisy = psi + (np.abs(psi) > 0) * noise * 0.15 * np.linalg.norm(psi) / np.linalg.norm(noise * (np.abs(psi) > 0))
            copies.append(np.roll(np.exp(1j * k) * (twin(noisy) if k % 2 else noisy), (k, -2), (0, 1)))
    truth = np.repeat(np.stack(crystals), 4, 0)
    counts = 1e6 * np.abs(far_field(truth)) ** 2
    photons = Photons(counts.astype(np.float32), np.ones(counts.shape, bool), np.zeros(8, np.uint32))
    library = gather(photons, pretended(np.stack(copies), photons), SETTINGS, silent)
    assert sorted(library.members.tolist()) == [4, 4]
    assert len(set(library.unit[:4])) == len(set(library.unit[4:])) == 1
    assert (library.coherence > 0.97).all()
    assert summary(library) == {"frames": 8, "prototypes": 2, "means": 2, "units": 2}
    for psi, unit in zip(crystals, library.unit[[0, 4]], strict=True):
        single = align(copies[0 if psi is crystals[0] else 4], psi).error
        assert align(library.psi[unit], psi).error < 0.7 * single, "the mean of four is less noisy than one"


def test_objects_that_look_alike_in_intensity_but_are_none_of_the_same_stay_apart() -> None:
    psi = grow_crystal("compact symmetric core", 0, (48, 48))
    rng = np.random.default_rng(0)
    wrong = np.stack([np.abs(psi) * np.exp(1j * rng.uniform(-3, 3, psi.shape)) for _ in range(3)]).astype(np.complex64)
    counts = np.repeat(1e6 * np.abs(far_field(psi[None])) ** 2, 3, 0).astype(np.float32)
    photons = Photons(counts, np.ones(counts.shape, bool), np.zeros(3, np.uint32))
    library = gather(photons, pretended(wrong, photons), SETTINGS, silent)
    assert library.members.tolist() == [1, 1, 1]
    assert library.coherence.tolist() == [1, 1, 1]
    np.testing.assert_array_equal(library.psi[library.unit[0]], canonical(wrong[0]))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_library_of_very_few_frames_can_be_matched(number: int) -> None:
    photons = measured(each=1)
    few = Photons(photons.counts[:number], photons.valid[:number], photons.flags[:number])
    library = grow_library(few, SETTINGS, silent)
    assert len(library.psi) == len(library.members) == number
    assert library.unit.tolist() == list(range(number)) or number == 3
    start = match(photons.counts, library)
    assert refine(photons.counts, start, iterations=5).flags.tolist() == [0, 0, 0]


def test_the_control_is_where_objects_mostly_are() -> None:
    supports = np.zeros((10, 20, 20), bool)
    supports[:, 10, 10] = True
    supports[:2, 10, 3] = True
    control = control_of(supports)
    assert control[10, 10]
    assert not control[10, 3]
    assert np.count_nonzero(control) == 13, "widened by two pixels"
    supports[:, 10, 10] = False
    assert control_of(supports)[10, 3], "the most frequent pixel where none is frequent"


@pytest.mark.parametrize("library", [0, 1, 2, 5])
def test_a_prior_is_grown_with_a_library_of_any_size(library: int) -> None:
    frames = measured().counts.astype(np.uint32)
    prior = grow_prior(frames, settings=SETTINGS.model_copy(update={"pixels": 2000, "library": library, "control": 2}))
    assert (prior.library is None) == (library == 0)
    assert prior.support.any()
    assert np.isfinite(list(prior.baselines.values())).all()
    assert (prior.baselines["distance"] == (0.0, 0.0)) == (library < 2)
    if prior.library is not None:
        assert len(prior.library.unit) == library
        assert len(prior.training["solved_psi"]) == library
        np.testing.assert_array_equal(prior.support, prior.library.control)


def test_a_kept_frame_that_was_cut_short_is_solved_again(tmp_path: Path) -> None:
    photons = measured(each=1)
    first = solve_frames(photons, HOW, silent, tmp_path)
    kept = sorted(tmp_path.glob("*.h5"))
    assert len(kept) == len(photons.counts)
    kept[0].write_bytes(kept[0].read_bytes()[:1000])
    kept[1].write_bytes(b"")
    same(solve_frames(photons, HOW, silent, tmp_path), first)
    assert not list(tmp_path.glob("*.partial"))


def test_twenty_iterations_from_the_other_halfs_volume_equal_hundreds_from_random_phases(data_folder: Path) -> None:
    with np.load(data_folder / "bcdi_gold_64cube_set1_set2.npz") as file:
        one, other = (Photons(file[name][None].astype(np.float32), np.ones((1, 64, 64, 64), bool), np.zeros(1, np.uint32)) for name in file)
    library = grow_library(one, TrainSettings(starts=4), silent)
    assert library.psi.shape == (1, 64, 64, 64)
    start = match(other, library)
    # The same support for all: a looser one would lower chi2 by itself.
    support, level = start.support[:, 0], np.sqrt(other.counts.sum() / np.count_nonzero(start.support))
    short = refine(other, start, iterations=20).chi2[0]
    long = "+".join(["40*HIO+10*ER"] * 12 + ["40*ER"])
    assert parse_schedule(long).iterations == 640
    # Over ten seeds and two plans of FFTW, which round differently, short / long was seen from 0.95 to 1.08, its median 1.03.
    ends = []
    for seed in range(3):
        phases = np.exp(2j * np.pi * np.random.default_rng(seed).random(support.shape))
        ends.append(refine(other, (level * support * phases).astype(np.complex64), support, schedule=long).chi2[0])
    assert short < 1.1 * np.median(ends)
    assert short < 0.8 * refine(other, (level * support).astype(np.complex64), support, iterations=20).chi2[0]
