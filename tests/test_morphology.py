"""The morphology map: frames described by what intensity can know, grouped without labels."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from streamprior_sim.crystals import MORPHOLOGIES, grow_crystal
from streamprior_sim.optics import intensity, ramp
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import build

from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED
from streamprior.stages.classify import classify
from streamprior.stages.prepare import prepare
from streamprior.train.classes import regrow_classes, sample_pixels
from streamprior.train.morphology import DESCRIPTOR, NO_GROUP, MorphologyMap, describe, grow_morphology, morphology_of
from streamprior.train.settings import TrainSettings
from tests.builders import small_prior

SHAPE = (64, 64)
BACKGROUND = 2
EVERYWHERE = np.ones(SHAPE, bool)


def by_brightness(counts: np.ndarray) -> np.ndarray:
    """(B, H, W) class maps without a prior: core over 10 % of the maximum, background below 0.1 %."""
    share = counts / counts.max((1, 2), keepdims=True)
    return np.where(share > 0.1, 0, np.where(share > 1e-3, 1, BACKGROUND)).astype(np.uint8)


def described(*patterns: np.ndarray, valid: np.ndarray = EVERYWHERE) -> np.ndarray:
    counts = np.array(patterns)
    return describe(counts, by_brightness(counts), valid, BACKGROUND)


def number(name: str, descriptors: np.ndarray) -> np.ndarray:
    return descriptors[:, DESCRIPTOR.index(name)]


def patterns(morphology: str, count: int = 8, photons: float = 1e6) -> list[np.ndarray]:
    return [intensity(grow_crystal(morphology, seed)) * photons for seed in range(count)]


# --- the descriptor --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("morphology", MORPHOLOGIES)
def test_what_intensity_cannot_know_does_not_change_the_descriptor(morphology: str) -> None:
    psi = grow_crystal(morphology, 1)
    twin = np.roll(psi[::-1, ::-1].conj(), (1, 1), (0, 1))
    same = (psi, twin, np.roll(psi, (3, -4), (0, 1)), psi * np.exp(0.7j).astype(np.complex64))
    found = described(*[1e6 * intensity(one) for one in same])
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=2e-3)


@pytest.mark.parametrize("morphology", MORPHOLOGIES)
def test_neither_a_pattern_s_place_nor_its_side_changes_the_descriptor(morphology: str) -> None:
    # Zeroed outside the middle, so that nothing leaves the frame when it moves.
    pattern = patterns(morphology, 1)[0]
    pattern = np.where(by_brightness(pattern[None])[0] < BACKGROUND, pattern, 0)
    pattern[[*range(4), *range(60, 64)]] = 0
    pattern[:, [*range(4), *range(60, 64)]] = 0
    found = described(pattern, np.roll(pattern, (2, -3), (0, 1)), pattern[::-1, ::-1])
    np.testing.assert_allclose(found, np.broadcast_to(found[0], found.shape), atol=1e-4)


@pytest.mark.parametrize("morphology", [name for name in MORPHOLOGIES if "vertical" not in name])
def test_a_quarter_turn_changes_the_tail_alone(morphology: str) -> None:
    pattern = patterns(morphology, 1)[0]
    found = described(pattern, np.rot90(pattern))
    others = [k for k, name in enumerate(DESCRIPTOR) if name != "tail"]
    np.testing.assert_allclose(found[1][others], found[0][others], atol=1e-4)


def test_a_tail_is_one_along_the_rows_only() -> None:
    tails = patterns("core with vertical tail")
    assert number("tail", described(*tails)).min() > 0.2
    assert number("tail", described(*[np.rot90(one) for one in tails])).max() < 0.1


def test_the_dose_changes_a_descriptor_less_than_the_morphology_does() -> None:
    rng = np.random.default_rng(0)
    bright = np.concatenate([described(*patterns(name, 5)) for name in MORPHOLOGIES])
    noisy = np.concatenate(
        [described(*[rng.poisson(one).astype(np.float64) for one in patterns(name, 5, photons=5e4)]) for name in MORPHOLOGIES]
    )
    # The foreground and the count of maxima are what noise reaches first.
    steady = [k for k, name in enumerate(DESCRIPTOR) if name not in ("log_foreground", "speckle")]
    change = np.sqrt(((noisy - bright) ** 2).mean(0))
    assert (change[steady] < 0.3 * bright.std(0)[steady]).all()


def test_each_number_knows_its_morphology() -> None:
    middle = {name: np.median(described(*patterns(name)), axis=0) for name in MORPHOLOGIES}

    def highest(what: str) -> str:
        return max(middle, key=lambda name: middle[name][DESCRIPTOR.index(what)])

    assert highest("elongation") == "needle streak"
    assert highest("tail") == "core with vertical tail"
    assert highest("hole") == "ring / vortex"
    assert highest("speckle") == highest("log_size") == highest("log_area") == "diffuse cloud"


def test_background_and_unmeasured_pixels_are_left_out() -> None:
    pattern = patterns("elongated core", 1)[0]
    ids = by_brightness(pattern[None])
    spoiled = pattern.copy()
    spoiled[2:5, 2:5] += 1e5  # a far stray count that the class map calls background
    valid = EVERYWHERE.copy()
    valid[50:53, 10:13] = False
    spoiled[50:53, 10:13] = 1e6
    ids[0, 50:53, 10:13] = NOT_MEASURED
    clean, found = describe(pattern[None], ids, valid, BACKGROUND), describe(spoiled[None], ids, valid, BACKGROUND)
    moments = [DESCRIPTOR.index(name) for name in ("log_size", "log_area", "log_foreground", "elongation", "tail")]
    np.testing.assert_array_equal(found[0][moments], clean[0][moments])


def test_a_frame_without_photons_is_not_described_and_belongs_nowhere() -> None:
    counts = np.stack([patterns("needle streak", 1)[0], np.zeros(SHAPE)])
    ids = np.zeros(counts.shape, np.uint8)
    found = describe(counts, ids, EVERYWHERE, BACKGROUND)
    assert np.isfinite(found[0]).all()
    assert np.isnan(found[1]).all()
    assert list(morphology_of(found, one_map())) == [morphology_of(found[:1], one_map())[0], NO_GROUP]


def test_no_frames_give_no_descriptors() -> None:
    assert describe(np.zeros((0, 8, 8)), np.zeros((0, 8, 8), np.uint8), np.ones((8, 8), bool), BACKGROUND).shape == (0, len(DESCRIPTOR))


def test_shapes_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts \(1, 8, 8\), ids \(1, 8, 9\) and valid \(8, 8\) do not belong together"):
        describe(np.zeros((1, 8, 8)), np.zeros((1, 8, 9), np.uint8), np.ones((8, 8), bool), BACKGROUND)


def test_a_shifted_centre_changes_little() -> None:
    for morphology in MORPHOLOGIES:
        psi = grow_crystal(morphology, 2)
        still, moved = (intensity(one) * 1e6 for one in (psi, psi * ramp(SHAPE, (1.4, -0.7))))
        steady = [DESCRIPTOR.index(name) for name in ("log_size", "log_area", "elongation", "tail")]
        change = np.abs(np.subtract(*described(still, moved)))[steady]
        assert change.max() < 0.15


# --- the map ---------------------------------------------------------------------------------------------------------------------


@cache
def one_map() -> MorphologyMap:
    return grow_morphology(np.concatenate([described(*patterns(name)) for name in MORPHOLOGIES]), epochs=5)


def test_the_same_frames_give_the_same_map_and_groups_are_ordered_by_size() -> None:
    descriptors = np.concatenate([described(*patterns(name)) for name in MORPHOLOGIES])
    grown, again = one_map(), grow_morphology(descriptors, epochs=5)
    np.testing.assert_array_equal(grown.codebook, again.codebook)
    np.testing.assert_array_equal(grown.group, again.group)
    assert (grown.codebook.dtype, grown.group.dtype) == (np.float32, np.uint8)
    groups = morphology_of(descriptors, grown)
    sizes = [number("log_size", descriptors)[groups == one].mean() for one in range(7)]
    assert sizes == sorted(sizes)
    assert grown.share.sum() == pytest.approx(1)


def test_a_number_that_never_changes_is_switched_off() -> None:
    descriptors = np.random.default_rng(0).normal(size=(40, 7))
    descriptors[:, 5] = 0.25
    grown = grow_morphology(descriptors, groups=3, side=4)
    assert grown.scale[5] == 0
    moved = descriptors.copy()
    moved[:, 5] = 9.0
    np.testing.assert_array_equal(morphology_of(descriptors, grown), morphology_of(moved, grown))


def test_fewer_frames_than_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="2 frames that can be described are fewer than 7 groups"):
        grow_morphology(np.array([[0.0] * 7, [1.0] * 7, [np.nan] * 7]))


# --- the twin's two sets ---------------------------------------------------------------------------------------------------------


def scan(first: int, frames: int, photons: float = 1e6) -> tuple[np.ndarray, np.ndarray]:
    """Frames, and the number of each one's morphology."""
    twin = build(load_scenario("crystals", {"sample.first": first, "frames": frames, "dose_photons": photons}))
    names = [MORPHOLOGIES.index(str(twin.truth(index).morphology)) for index in range(frames)]
    return np.stack([twin.frame(index) for index in range(frames)]), np.array(names)


def classes_of(frames: np.ndarray) -> Prior:
    """Three pixel classes, grown without labels."""
    photons = prepare(frames, small_prior(SHAPE))
    normaliser = float(np.median(photons.counts.mean((1, 2))))
    valid = np.ones(photons.counts.shape, bool)
    sample = sample_pixels(photons.counts, valid, normaliser, 10_000, np.random.default_rng(0))
    grown = regrow_classes(sample, 3, TrainSettings())
    return small_prior(
        SHAPE,
        normaliser=normaliser,
        feature_mean=grown.feature_mean,
        feature_scale=grown.feature_scale,
        pca_components=grown.pca_components,
        centroids=grown.centroids,
    )


def described_by(prior: Prior, frames: np.ndarray) -> np.ndarray:
    photons = prepare(frames, prior)
    return describe(photons.counts, classify(photons, prior).ids, photons.valid, len(prior.class_names) - 1)


def balanced_accuracy(groups: np.ndarray, truth: np.ndarray) -> float:
    """Mean share of each morphology in the group that is matched with it."""
    confusion = np.zeros((len(MORPHOLOGIES), len(MORPHOLOGIES)))
    np.add.at(confusion, (truth, groups), 1)
    confusion /= confusion.sum(1, keepdims=True)
    rows, columns = linear_sum_assignment(-confusion)
    return float(confusion[rows, columns].mean())


def test_groups_grown_without_labels_are_the_morphologies_of_unseen_crystals() -> None:
    seen, _ = scan(0, 280)
    prior = classes_of(seen[::4])
    grown = grow_morphology(described_by(prior, seen))
    for photons in (1e6, 2e4):
        unseen, truth = scan(280, 140, photons)
        assert balanced_accuracy(morphology_of(described_by(prior, unseen), grown), truth) >= 0.85
