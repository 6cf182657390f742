"""What pixel classes are: how many, what they are called, what is said of them, and that they are found again."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

import streamprior as sp
from streamprior.prior import FEATURES, Geometry
from streamprior.records import Photons
from streamprior.stages.features import features
from streamprior.train import TrainSettings
from streamprior.train.classes import CURVATURE, ELBOW, choose_number, grow_classes, regrow_classes, sample_pixels
from streamprior.train.describe import beam_radius, class_names, describe_classes
from streamprior.train.grow import empty_prior, with_centroids
from streamprior.train.stability import stability

QUICK = TrainSettings(pixels=4000)
DATA = "entry_1/instrument_1/detector_1/data"


def no_tick(*call: object) -> None:
    """Nobody watches."""


def photons_of(counts: np.ndarray) -> Photons:
    return Photons(np.ascontiguousarray(counts, np.float32), np.ones(counts.shape, bool), np.zeros(len(counts), np.uint32))


def rings(size: int = 64, frames: int = 4, seed: int = 0) -> Photons:
    """Frames of a bright disc of 5 px, a ring of 12..20 px, and next to nothing around."""
    radius = beam_radius((size, size))
    ideal = np.where(radius < 5, 2000.0, np.where((radius > 12) & (radius < 20), 80.0, 0.5))
    return photons_of(np.random.default_rng(seed).poisson(ideal, (frames, size, size)))


def described_of(share: list[list[float]], intensity: list[float]) -> dict[str, np.ndarray]:
    profile = np.array(share)
    return {"class_mean_intensity": np.array(intensity), "profile_share": profile, "class_share": profile.mean(1)}


@pytest.mark.parametrize(
    ("share", "intensity", "names"),
    [
        ([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]], [900, 40, 1], ("core", "ring", "background")),
        # The Siemens star: a bright ring in a dim halo that fills its middle.
        ([[0, 0, 0, 1, 0, 0], [1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1]], [230, 30, 1], ("ring", "halo", "background")),
        (
            [[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 0, 0, 1]],
            [900, 300, 40, 1],
            ("core", "ring_1", "ring_2", "background"),
        ),
        ([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], [900, 1], ("core", "background")),
        # By its light, not by its place: an absorber leaves the middle dark.
        ([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]], [1, 900], ("background", "ring")),
        # A class that no pixel of the frames fell into is not the background.
        ([[1, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0]], [900, 1, 0], ("core", "background", "halo")),
    ],
)
def test_a_class_is_named_by_its_light_and_by_where_it_lies(share, intensity, names) -> None:
    assert class_names(described_of(share, intensity)) == names


@pytest.mark.parametrize(
    ("knee", "gain", "number"),
    [(3, 0.0, 3), (5, 0.0, 3), (5, 0.04, 3), (5, 0.06, 5), (2, 0.0, 3), (8, 0.06, 7)],
)
def test_more_than_three_classes_need_an_elbow_and_a_better_silhouette(knee, gain, number) -> None:
    k = np.array(ELBOW)
    inertia = np.where(k <= knee, 100.0 - 10 * (k - 2), 100.0 - 10 * (knee - 2) - 0.1 * (k - knee))
    if knee == 2:
        inertia = 100.0 - 10.0 * k
    silhouettes = np.full(k.size, 0.4)
    silhouettes[number - 2 if gain > 0.05 else min(knee, 7) - 2] += gain
    assert choose_number(inertia, silhouettes) == number


def test_classes_are_what_was_drawn_and_are_described_so() -> None:
    photons = rings()
    sample = sample_pixels(photons.counts, photons.valid, 50.0, 4000, np.random.default_rng(0))
    grown = grow_classes(sample, QUICK.model_copy(update={"classes": 3}))
    prior = with_centroids(empty_prior(Geometry((64, 64), (32, 32), (64, 64))), grown, 50.0)
    ids = sp.classify(photons, prior).ids
    told = describe_classes(ids, photons, 50.0, 3)
    assert class_names(told) == ("core", "ring", "background")
    np.testing.assert_array_equal(told["profile_share"].sum(0), 1)
    assert told["class_share"].sum() == pytest.approx(1)
    assert told["profile_share"][0, 2] == 1
    assert told["profile_share"][1, 16] == 1
    assert told["profile_share"][2, 40] == 1
    # 80 photons in a frame that is scaled to a mean of 50.
    frame_mean = photons.counts.mean()
    assert told["profile_photons"][1, 16] == pytest.approx(80 * 50 / frame_mean, rel=0.05)
    assert np.isnan(told["profile_photons"][0, 40])


def test_the_table_of_centroids_is_the_mean_of_the_raw_features() -> None:
    photons = rings(frames=2)
    ids = (beam_radius((64, 64)) > 10).astype(np.uint8)[None].repeat(2, 0)
    told = describe_classes(ids, photons, 50.0, 2)
    maps = np.stack([features(frame, 50.0) for frame in photons.counts], 1)
    for k in (0, 1):
        np.testing.assert_allclose(told["class_features"][k], maps[:, ids == k].mean(1, dtype=float), rtol=1e-4, atol=1e-4)
        radius = maps[FEATURES.index("radius")][ids == k]
        assert told["class_mean_radius"][k] == pytest.approx(radius.mean(), rel=1e-4)
        assert told["class_std_radius"][k] == pytest.approx(radius.std(), rel=1e-3)


def test_pixels_that_were_not_measured_are_in_no_profile() -> None:
    photons = rings(frames=1)
    ids = np.zeros((1, 64, 64), np.uint8)
    ids[:, :, 32:] = 255
    told = describe_classes(ids, photons, 0.0, 1)
    assert told["class_share"].tolist() == [1]
    assert np.all(told["class_features"][0, FEATURES.index("radius")] < 46)


def test_what_is_drawn_is_found_again_and_noise_is_not() -> None:
    def judged(photons: Photons) -> dict[str, np.ndarray]:
        sample = sample_pixels(photons.counts, photons.valid, 1.0, 4000, np.random.default_rng(0))
        return stability(photons, grow_classes(sample, QUICK.model_copy(update={"classes": 4})), 1.0, QUICK, no_tick)

    drawn = rings()
    sample = sample_pixels(drawn.counts, drawn.valid, 1.0, 4000, np.random.default_rng(0))
    three = stability(drawn, grow_classes(sample, QUICK.model_copy(update={"classes": 3})), 1.0, QUICK, no_tick)
    assert three["stability_seeds"].min() > 0.95
    assert three["stability_frames"].min() > 0.95
    noise = judged(photons_of(np.random.default_rng(3).poisson(5.0, (4, 64, 64))))
    assert noise["stability_frames"].mean() < three["stability_frames"].mean() - 0.1


def test_the_curves_do_not_change_the_classes() -> None:
    photons = rings()
    sample = sample_pixels(photons.counts, photons.valid, 50.0, 4000, np.random.default_rng(0))
    told = grow_classes(sample, QUICK.model_copy(update={"classes": 3}))
    again = regrow_classes(sample, 3, QUICK)
    np.testing.assert_array_equal(told.centroids, again.centroids)
    assert "elbow_inertia" in told.training
    assert "elbow_inertia" not in again.training


def test_labels_of_a_sample_are_those_of_the_map() -> None:
    photons = rings(frames=1)
    sample = sample_pixels(photons.counts, photons.valid, 50.0, 4000, np.random.default_rng(0))
    grown = grow_classes(sample, QUICK.model_copy(update={"classes": 3}))
    prior = with_centroids(empty_prior(Geometry((64, 64), (32, 32), (64, 64))), grown, 50.0)
    table = features(photons.counts[0], 50.0).reshape(9, -1).T
    assert (grown.label(table) == sp.classify(photons, prior).ids.ravel()).mean() > 0.999


def lonely(ids: np.ndarray) -> float:
    """Part of the pixels (rows, columns) that share their class with at most two of eight neighbours."""
    steps = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    return float((sum(np.roll(ids, step, (0, 1)) == ids for step in steps) <= 2).mean())


def test_the_ring_of_the_siemens_star_is_one_class_and_not_salt_and_pepper(data_folder) -> None:
    with h5py.File(data_folder / "ptycho_siemens_star.cxi") as file:
        counts = np.asarray(file[DATA][::32], np.float32)
    photons = photons_of(counts)
    sample = sample_pixels(counts, photons.valid, float(counts.mean()), 16_000, np.random.default_rng(0))
    share = {}
    for weight in (0.2, 1.0):
        grown = grow_classes(sample, TrainSettings(classes=3, curvature=weight))
        prior = with_centroids(empty_prior(Geometry((128, 128), (64, 64), (128, 128))), grown, float(counts.mean()))
        assert grown.feature_scale[CURVATURE].all()
        share[weight] = lonely(sp.classify(counts.mean(0)[None], prior).ids[0])
    assert share[0.2] < 0.005 < share[1.0]
