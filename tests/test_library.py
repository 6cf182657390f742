"""A frame finds the prototype that looks like it, whatever intensity cannot know; a frame like none of them is left to a flat start."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from streamprior_sim.crystals import MORPHOLOGIES, grow_crystal

from streamprior.align import twin
from streamprior.arrays import far_field
from streamprior.config import PrepareSettings, RefineSettings
from streamprior.crew import think
from streamprior.prior import Library, freeze
from streamprior.records import FLAT, UNUSED, Batch, Flag, Photons
from streamprior.stages.classify import classify
from streamprior.stages.match import MARGIN, Matcher, Nearest, cells, match
from streamprior.stages.recipe import Recipe, plan_of
from streamprior.stages.refine import Refiner, Solver, refine
from streamprior.train.solve import Solved, canonical, cell_of, plain_library
from tests.builders import make_frame, make_recipe, make_run, small_prior
from tests.naive_refine import centred_box, prior_for

Array = npt.NDArray[Any]
SHAPE = (64, 64)
EACH = 3


def crystals(first: int = 0) -> Array:
    """(21, 64, 64) complex64: EACH crystals of the seven morphologies, sum |psi|^2 = 1."""
    return np.stack([grow_crystal(name, first + i, SHAPE) for i in range(EACH) for name in MORPHOLOGIES])


def frames_of(psi: Array, photons: float, seed: int = 0) -> Array:
    """(B, ...) float32 Poisson counts of objects, so many photons each."""
    ideal = np.abs(far_field(psi)) ** 2
    power = ideal.reshape(len(psi), -1).sum(1).reshape(-1, *[1] * (psi.ndim - 1))
    return np.random.default_rng(seed).poisson(photons * ideal / power).astype(np.float32)


def photons_of(counts: Array, valid: Array | None = None) -> Photons:
    return Photons(counts, np.ones(counts.shape[1:], bool) if valid is None else valid, np.zeros(len(counts), np.uint32))


def library_of(psi: Array, photons: float = 1e6) -> Library:
    """Every object a prototype, as if it had been solved without an error."""
    objects = np.stack([canonical(one) for one in psi])
    inside = np.abs(objects) > 0.1 * np.abs(objects).max(tuple(range(1, psi.ndim)), keepdims=True)
    none = np.ones(len(psi))
    return plain_library(photons_of(frames_of(psi, photons)), Solved(objects, inside, none, none))


@pytest.fixture(scope="module")
def seen() -> Array:
    return crystals()


@pytest.fixture(scope="module")
def library(seen: Array) -> Library:
    return library_of(seen)


@pytest.fixture(scope="module")
def unseen() -> Array:
    return crystals(100)


def masks() -> dict[str, Array]:
    """What a detector may not measure: a beam stop of 4 px, one pixel in twenty, both."""
    radius = np.hypot(*(np.mgrid[:64, :64] - 32))
    alive = np.random.default_rng(3).random(SHAPE) > 0.05
    return {"all": np.ones(SHAPE, bool), "stop": radius > 4, "dead": alive, "both": alive & (radius > 4)}


@pytest.mark.parametrize("hidden", masks())
@pytest.mark.parametrize("dose", [1e6, 2e4])
def test_every_frame_finds_its_own_prototype(seen: Array, library: Library, hidden: str, dose: float) -> None:
    valid = masks()[hidden]
    counts = frames_of(seen, dose, 1)
    counts[:, ~valid] = 1e6  # what stands there was not measured
    start = match(photons_of(counts, valid), library)
    assert start.unit.tolist() == [[i] for i in range(len(seen))]
    assert start.distance.max() < (0.02 if dose == 1e6 else 0.1)
    # Behind the stop too the prototype has all its photons: those that were not measured it supplies.
    np.testing.assert_allclose((np.abs(start.psi) ** 2).sum((1, 2, 3)), dose, rtol=0.05 if dose == 1e6 else 0.15)
    outside = ~start.support[:, 0]
    assert (np.abs(start.psi[:, 0]) * outside).max() <= 0.1 * np.abs(start.psi).max()


def test_the_nearest_come_first_and_their_supports_are_widened(unseen: Array, library: Library) -> None:
    start = match(frames_of(unseen, 1e6), library, k=5)
    assert start.psi.shape == start.support.shape == (len(unseen), 5, *SHAPE)
    assert (np.diff(start.distance, axis=1) >= 0).all()
    assert all(len(set(row)) == 5 for row in start.unit)
    own = library.support[start.unit]
    assert (start.support | own == start.support).all()
    rows = np.flatnonzero(start.support[0, 0].any(1)), np.flatnonzero(own[0, 0].any(1))
    assert rows[0][0] == rows[1][0] - MARGIN
    assert rows[0][-1] == rows[1][-1] + MARGIN


def test_twin_place_and_phase_of_a_prototype_make_no_difference(unseen: Array, library: Library) -> None:
    other = [np.roll(np.exp(2j * i) * (twin(psi) if i % 2 else psi), (i % 5, -3), (0, 1)) for i, psi in enumerate(library.psi)]
    counts = frames_of(unseen, 1e5)
    before, after = match(counts, library, k=3), match(counts, replace(library, psi=np.stack(other).astype(np.complex64)), k=3)
    np.testing.assert_array_equal(before.unit, after.unit)
    np.testing.assert_allclose(before.distance, after.distance, atol=1e-5)


def test_the_distance_does_not_change_with_the_dose_in_the_mean(unseen: Array, library: Library) -> None:
    bright, faint = (match(frames_of(unseen, dose, 2), library).distance.mean() for dose in (1e7, 2e4))
    assert bright > 0.02, "unseen crystals are somewhere else than the prototypes"
    assert faint == pytest.approx(bright, rel=0.1)


@pytest.mark.parametrize("cell", [2, 4, 8])
def test_a_gate_holds_for_whatever_is_measured(seen: Array, unseen: Array, library: Library, cell: int) -> None:
    patterns = np.sqrt(np.stack([cells(one, cell, np.sum) for one in frames_of(seen, 1e6)])).astype(np.float32)
    coarse = replace(library, patterns=patterns, cell=cell)
    whole = Nearest(coarse).gate(photons_of(frames_of(unseen, 1e6)))
    assert 0.05 < whole < 0.6
    for valid in masks().values():
        photons = photons_of(frames_of(unseen, 1e6), valid)
        # A gate of cells that a stop cuts was three times too wide before their measured part alone was compared.
        assert Nearest(coarse).gate(photons) == pytest.approx(whole, rel=0.4)
        assert np.count_nonzero(Matcher(coarse).starts(photons)[1]) <= 4, "hardly any but the three diffuse ones, which are like no other"


def test_what_the_classes_call_background_counts_as_dark(unseen: Array, library: Library) -> None:
    prior = freeze(replace(small_prior(SHAPE), library=library, support=library.control))
    counts = frames_of(unseen, 1e5)
    ids = classify(counts, prior).ids
    dark = np.where(ids == prior.class_names.index("background"), np.float32(0), counts)
    assert (dark.sum((1, 2)) < counts.sum((1, 2))).all()
    start, expected = match(counts, prior, k=2), Nearest(library).starts(photons_of(dark), 2)
    for name in ("psi", "support", "unit", "distance"):
        np.testing.assert_array_equal(getattr(start, name), getattr(expected, name))
    photons = photons_of(counts)
    staged = Matcher(prior, 2)(Batch(make_run(), (), photons=photons, classes=classify(photons, prior)))
    assert staged.start is not None
    np.testing.assert_array_equal(staged.start.psi[:, :2], start.psi)


def speckle() -> Array:
    """(1, 64, 64) float32: fully developed speckle over the whole frame, like no crystal at all."""
    rng = np.random.default_rng(5)
    return rng.poisson(250 * rng.exponential(1, (1, *SHAPE))).astype(np.float32)


def test_a_strange_frame_is_abstained_from_flagged_and_refined_as_without_a_library(seen: Array, library: Library) -> None:
    prior = replace(prior_for(library.control), library=library)
    plan = plan_of(RefineSettings())
    photons = photons_of(np.concatenate([frames_of(seen[:2], 1e6), speckle()]))
    batch = Refiner(prior, plan)(Matcher(prior, 3)(Batch(make_run(), (), photons=photons)))
    assert batch.start is not None
    assert batch.reconstruction is not None
    assert batch.photons is not None
    assert batch.photons.flags.tolist() == batch.reconstruction.flags.tolist() == [0, 0, Flag.ABSTAINED]
    assert batch.start.unit[2].tolist() == [UNUSED] * 3 + [FLAT]
    assert batch.start.distance[2, 0] > 0.4, "how far it is stays told"
    assert (batch.start.unit[:2] != UNUSED).all()
    assert plan.alone is not None
    alone = refine(speckle(), match(speckle(), prior_for(library.control)), schedule=str(plan.alone))
    np.testing.assert_array_equal(batch.reconstruction.psi[2], alone.psi[0])
    np.testing.assert_array_equal(batch.reconstruction.chi2[2], alone.chi2[0])
    assert np.isnan(batch.reconstruction.trial[2]).all()
    assert np.isfinite(batch.reconstruction.trial[:2]).all()


def test_a_result_names_its_prototype_and_an_abstention(seen: Array, library: Library) -> None:
    # No class is called background here, as this library's frames had none.
    prior = freeze(small_prior(SHAPE, library=library, support=library.control, class_names=("core", "ring", "halo")))
    counts = np.concatenate([frames_of(seen[4:6], 1e6), speckle()]).astype(np.uint32)
    frames = [make_frame(one, i) for i, one in enumerate(counts)]
    own, other, strange = think(make_recipe(prior).stages(), prior, make_run(shape=SHAPE), frames)
    assert [(one.unit, one.arm, one.flags) for one in (own, other)] == [(4, "prototype", 0), (5, "prototype", 0)]
    assert (strange.unit, strange.arm, strange.flags) == (FLAT, "flat", Flag.ABSTAINED)
    assert own.distance < 0.01 < 0.4 < strange.distance


def test_a_frame_gives_the_same_result_in_any_batch(unseen: Array, library: Library) -> None:
    prior = freeze(replace(small_prior(SHAPE), library=library, support=library.control))
    recipe = Recipe(prior, PrepareSettings(), RefineSettings(), make_recipe(prior).drift)
    counts = frames_of(unseen[:4], 1e6).astype(np.uint16)
    counts[1, 20:40, 20:60] = 65535  # saturated: this frame alone measures less
    counts[3] = 0
    frames = [make_frame(one, i) for i, one in enumerate(counts)]
    together = think(recipe.stages(), prior, make_run(shape=SHAPE), frames)
    for i, frame in enumerate(frames):
        (alone,) = think(recipe.stages(), prior, make_run(shape=SHAPE), [frame])
        np.testing.assert_array_equal(together[i].object, alone.object)
        for name in ("unit", "arm", "flags", "distance", "chi2", "r_factor"):
            np.testing.assert_equal(getattr(together[i], name), getattr(alone, name), err_msg=f"frame {i}: {name}")
    assert together[1].flags & Flag.SATURATED
    assert together[3].flags & Flag.EMPTY


def test_more_neighbours_than_prototypes_are_refused_by_match_and_cut_by_the_stage(library: Library) -> None:
    counts = frames_of(library.psi[:2], 1e5)
    with pytest.raises(ValueError, match=r"k is 22, but the library holds 21 prototypes"):
        match(counts, library, k=22)
    with pytest.raises(ValueError, match="k is 0"):
        match(counts, library, k=0)
    few = replace(library, psi=library.psi[:2], support=library.support[:2], unit=np.minimum(library.unit, 1))
    start, _ = Matcher(few, 9).starts(photons_of(counts))
    assert start.unit.tolist() == [[0, 1, FLAT], [1, 0, FLAT]]
    assert Matcher(library, 0).starts(photons_of(counts))[0].unit.tolist() == [[FLAT], [FLAT]]


def test_frames_of_another_shape_are_refused(library: Library) -> None:
    with pytest.raises(ValueError, match=r"counts have shape \(1, 32, 64\), this prior was made for \(B, 64, 64\)"):
        match(np.ones((1, 32, 64), np.float32), library)


def test_a_library_of_one_has_no_gate(seen: Array) -> None:
    one = library_of(seen[:1])
    start, strange = Matcher(one).starts(photons_of(speckle()))
    assert not strange.any()
    assert start.unit.tolist() == [[0, FLAT]]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -1.0])
def test_a_hopeless_frame_starts_from_nothing_and_is_not_called_strange(library: Library, value: float) -> None:
    counts = np.concatenate([frames_of(library.psi[:1], 1e5), np.full((1, *SHAPE), value, np.float32)])
    start, strange = Matcher(library).starts(photons_of(counts))
    assert not strange.any()
    assert not start.psi[1].any()
    assert np.isnan(start.distance[1]).all()
    assert start.unit[1].tolist() == [UNUSED] * 3 + [FLAT], "no prototype is counted as kept for it"
    assert start.unit[0, 0] == 0
    found = Solver(SHAPE, plan_of(RefineSettings())).solve(counts, start, np.ones(counts.shape, bool), None)
    assert found.flags[0] == 0
    assert found.flags[1] & (Flag.EMPTY | Flag.NONFINITE)


def test_frames_of_which_nothing_is_measured_start_from_nothing(library: Library) -> None:
    start, strange = Matcher(library).starts(photons_of(frames_of(library.psi[:2], 1e5), np.zeros(SHAPE, bool)))
    assert not start.psi.any()
    assert not strange.any()


def test_a_prototype_that_no_measured_pixel_sees_is_as_far_as_can_be(library: Library) -> None:
    corner = np.zeros(SHAPE, bool)
    corner[:8, :8] = True
    dark = replace(library, psi=np.concatenate([0 * library.psi[:1], library.psi[1:]]))
    start = match(photons_of(np.ones((1, *SHAPE), np.float32), corner), dark, k=21)
    assert np.isfinite(start.psi).all()
    assert start.distance[0, start.unit[0] == 0] == pytest.approx(1, abs=0.3)


def test_photons_beyond_single_precision_still_find_their_prototype(seen: Array, library: Library) -> None:
    counts = frames_of(seen[3:5], 1e6) * np.float32(1e31)
    assert match(counts, library).unit.tolist() == [[3], [4]]


def test_volumes_are_matched_as_frames_are() -> None:
    rng = np.random.default_rng(0)
    inside = centred_box((16, 20, 18), 8)
    psi = (inside * np.exp(1j * rng.uniform(0, 3, (4, *inside.shape)))).astype(np.complex64)
    library = library_of(psi)
    start = match(frames_of(psi, 1e6, 1), library, k=2)
    assert start.psi.shape == (4, 2, 16, 20, 18)
    assert start.unit[:, 0].tolist() == [0, 1, 2, 3]
    refined = refine(frames_of(psi, 1e6, 1), start, schedule="5*ER", trial=2)
    assert refined.psi.shape == (4, 16, 20, 18)
    assert (refined.kept == 0).all()


@pytest.mark.parametrize(
    ("shape", "cell"),
    [
        ((64, 64), 2),
        ((104, 104), 2),
        ((128, 96), 2),
        ((65, 65), 1),
        ((33, 47), 1),
        ((7, 9), 1),
        ((256, 256), 8),
        ((64, 64, 64), 2),
        ((130, 128), 2),
    ],
)
def test_cells_cover_the_whole_frame_whatever_its_size(shape: tuple[int, ...], cell: int) -> None:
    assert cell_of(shape) == cell
    counts = np.random.default_rng(0).poisson(2.0, shape).astype(np.float64)
    folded = cells(counts, cell, np.sum)
    assert folded.size == counts.size // cell ** len(shape)
    assert folded.sum() == counts.sum()
