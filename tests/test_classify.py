"""Pixel classes: what the fused kernel promises, on measured frames and beside its naive twin."""

from __future__ import annotations

from dataclasses import replace

import h5py
import numpy as np
import pytest

import streamprior as sp
from streamprior.prior import freeze
from streamprior.records import NOT_MEASURED, Batch, Detector, Frame, Photons, RunStarted
from streamprior.stages.classify import Classifier
from streamprior.stages.features import features
from tests import naive

DATA = "entry_1/instrument_1/detector_1/data"


@pytest.fixture(scope="module")
def measured(data_folder):
    """name -> (B, 128, 128) uint16: measured frames of both kinds, the bright part of the rocking curve cropped around its peak."""
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        curve = file[DATA][()]
    with h5py.File(data_folder / "ptycho_siemens_star.cxi") as file:
        star = file[DATA][::16]
    bright = curve[curve.sum((1, 2)) > 5e4][::4, 62:190, 63:191]
    return {"bragg": np.minimum(bright, 65534).astype(np.uint16), "ptycho": star}


def synthetic(shape=(2, 48, 40), seed=0, flux=40.0):
    """(B, H, W) float64 mean photons: a bright core, a ring and a background, as frames of the twin look."""
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    radius = np.hypot(rows - shape[1] // 2, columns - shape[2] // 2)
    ideal = flux * (10 * np.exp(-((radius / 3) ** 2)) + 2 * np.exp(-(((radius - 12) / 2) ** 2)) + 0.02)
    return np.random.default_rng(seed).poisson(ideal, size=shape)


@pytest.mark.parametrize("kind", ["bragg", "ptycho"])
@pytest.mark.parametrize("classes", [3, 5, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_classes_agree_with_the_naive_version_on_measured_frames(measured, kind, classes, dtype):
    counts = np.minimum(measured[kind], 255 if dtype == np.uint8 else 65535).astype(dtype)
    prior = naive.prior(counts[::3], classes)
    ours = sp.classify(counts, prior)
    theirs = [naive.classify(frame, prior) for frame in counts]
    assert np.mean(ours.ids == np.stack([ids for ids, _ in theirs])) >= 0.9999
    np.testing.assert_allclose(ours.distance, [distance for _, distance in theirs], rtol=1e-4)
    assert len(np.unique(ours.ids)) == classes


@pytest.mark.parametrize("kind", ["bragg", "ptycho"])
def test_features_agree_with_the_naive_version(measured, kind):
    for counts in measured[kind][:3]:
        ours, theirs = features(counts, 5.0), naive.features(counts, 5.0)
        spread = theirs.std((1, 2), keepdims=True)
        assert np.abs((ours - theirs) / spread).max() < 3e-3
        assert np.abs((ours - theirs) / spread).mean() < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (3, 5), (16, 16), (17, 33), (50, 31)])
def test_features_hold_at_frames_smaller_than_the_stencil(shape):
    counts = np.random.default_rng(0).poisson(30, size=shape).astype(np.uint16)
    np.testing.assert_allclose(features(counts, 30.0), naive.features(counts, 30.0), rtol=1e-4, atol=2e-3)


def test_a_frame_gets_the_same_bits_alone_and_in_a_batch():
    counts = synthetic((64, 48, 40)).astype(np.float32)
    prior = naive.prior(counts[:4], 4)
    whole = sp.classify(counts, prior)
    alone = [sp.classify(counts[i : i + 1], prior) for i in range(64)]
    assert np.array_equal(whole.ids, np.concatenate([one.ids for one in alone]))
    assert np.array_equal(whole.distance, np.concatenate([one.distance for one in alone]))


def test_classes_hold_at_a_tenth_of_the_flux(measured):
    for frames in measured.values():
        prior = naive.prior(frames[::3], 3)
        bright = sp.classify(frames.astype(np.float32), prior)
        dim = sp.classify(frames.astype(np.float32) * np.float32(0.1), prior)
        assert np.mean(bright.ids == dim.ids) > 0.99999


def test_the_map_does_not_depend_on_where_the_angle_starts():
    counts = synthetic()
    prior = naive.prior(counts, 3)
    turned = replace(prior, feature_mean=prior.feature_mean + np.eye(9, dtype=np.float32)[7] * 1.5)
    assert np.array_equal(sp.classify(counts.astype(np.uint16), prior).ids, sp.classify(counts.astype(np.uint16), turned).ids)


def test_a_prior_that_weighs_the_angle_is_still_classified_as_it_says():
    counts = synthetic().astype(np.uint16)
    prior = naive.prior(counts, 4, angle=1.0)
    ours = sp.classify(counts, prior)
    theirs = np.stack([naive.classify(frame, prior)[0] for frame in counts])
    assert np.mean(ours.ids == theirs) > 0.999
    off = replace(prior, feature_scale=np.where(np.arange(9) == 7, 0, prior.feature_scale))
    assert not np.array_equal(ours.ids, sp.classify(counts, off).ids)


def test_pixels_that_were_not_measured_get_no_class_and_do_not_count():
    counts = synthetic().astype(np.float32)
    invalid = np.zeros((48, 40), bool)
    invalid[5:9, 7:30] = True
    prior = freeze(replace(naive.prior(counts, 3), invalid=invalid))
    ours = sp.classify(counts, prior)
    ids, distance = naive.classify(counts[1], prior)
    assert np.array_equal(ours.ids == NOT_MEASURED, np.broadcast_to(invalid, counts.shape))
    assert np.mean(ours.ids[1] == ids) > 0.999
    assert ours.distance[1] == pytest.approx(distance, rel=1e-4)


def test_each_frame_may_have_bad_pixels_of_its_own():
    counts = synthetic().astype(np.float32)
    valid = np.ones(counts.shape, bool)
    valid[1, :10] = False
    prior = naive.prior(counts, 3)
    ours = sp.classify(Photons(counts, valid, np.zeros(2, np.uint32)), prior)
    assert np.array_equal(ours.ids == NOT_MEASURED, ~valid)
    assert ours.distance[1] == pytest.approx(naive.classify(counts[1], prior, valid[1])[1], rel=1e-4)


def test_a_dark_frame_is_classified_and_a_frame_without_a_valid_pixel_has_no_distance():
    prior = naive.prior(synthetic(), 3)
    dark = sp.classify(np.zeros((1, 48, 40), np.uint16), prior)
    assert dark.ids.max() < 3
    assert np.isfinite(dark.distance[0])
    blind = sp.classify(Photons(np.ones((1, 48, 40), np.float32), np.zeros((48, 40), bool), np.zeros(1, np.uint32)), prior)
    assert (blind.ids == NOT_MEASURED).all()
    assert np.isnan(blind.distance[0])


def test_the_stage_fills_in_classes_and_nothing_else_and_keeps_no_hold_on_them():
    counts = synthetic().astype(np.float32)
    prior = naive.prior(counts, 3)
    run = RunStarted("uid", "source", "1", 0.0, None, Detector())
    frames = tuple(Frame("source", "1", i, counts[i], 0.0) for i in range(2))
    batch = Batch(run, frames, photons=Photons(counts, np.ones((48, 40), bool), np.zeros(2, np.uint32)))
    stage = Classifier(prior)
    first = stage(batch)
    kept = first.classes.ids.copy()
    stage(replace(batch, photons=Photons(counts[::-1].copy(), np.ones((48, 40), bool), np.zeros(2, np.uint32))))
    assert np.array_equal(first.classes.ids, kept)
    assert first == replace(batch, classes=first.classes)
    with pytest.raises(ValueError, match="prepare comes before classify"):
        stage(replace(batch, photons=None))


def test_no_frame_no_class():
    prior = naive.prior(synthetic(), 3)
    nothing = sp.classify(np.zeros((0, 48, 40), np.uint16), prior)
    assert nothing.ids.shape == (0, 48, 40)
    assert nothing.distance.shape == (0,)


@pytest.mark.parametrize("dtype", [np.int32, np.float64, ">u2", np.complex64, bool])
def test_other_dtypes_are_refused_with_a_remedy(dtype):
    prior = naive.prior(synthetic(), 3)
    with pytest.raises(TypeError, match=r"convert with counts\.astype"):
        sp.classify(np.zeros((1, 48, 40), dtype), prior)


@pytest.mark.parametrize("shape", [(48, 40), (1, 40, 48), (1, 1, 48, 40)])
def test_other_shapes_are_refused_and_the_priors_is_named(shape):
    prior = naive.prior(synthetic(), 3)
    with pytest.raises(ValueError, match=r"\(B, 48, 40\)"):
        sp.classify(np.zeros(shape, np.uint16), prior)


def test_counts_that_are_not_numbers_are_refused():
    prior = naive.prior(synthetic(), 3)
    counts = synthetic().astype(np.float32)
    counts[1, 3, 4] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        sp.classify(counts, prior)


@pytest.mark.parametrize("rows", [1025, 2048])
def test_a_large_frame_gets_the_same_bits_with_any_number_of_threads(rows):
    frames = synthetic((2, rows, 1031)).astype(np.uint16)
    prior = naive.prior(synthetic((2, 48, 40)), 3)
    nothing = np.zeros(frames.shape[1:], bool)
    geometry = replace(prior.geometry, shape=nothing.shape, detector_shape=nothing.shape)
    prior = replace(prior, geometry=geometry, reference=nothing.astype(np.uint8), support=nothing, invalid=nothing)
    valid = np.random.default_rng(1).random(frames.shape[1:]) > 0.1
    alone = Classifier(prior).classes(frames, valid)
    for threads in (2, 3):
        stage = Classifier(prior, threads=threads)
        for i in range(2):
            ours = stage.classes(frames[i : i + 1], valid)
            assert np.array_equal(ours.ids[0], alone.ids[i])
            assert ours.distance[0] == alone.distance[i]


@pytest.mark.parametrize("components", [2, 6, 7, 9])
@pytest.mark.parametrize("width", [5, 16, 40, 47])
def test_any_number_of_components_and_any_width_is_classified_as_the_naive_version_does(components, width):
    counts = np.random.default_rng(2).poisson(20, size=(2, 33, width)).astype(np.uint16)
    prior = naive.prior(counts, 4, angle=1.0, components=components)
    ours = sp.classify(counts, prior)
    for i in range(2):
        ids, distance = naive.classify(counts[i], prior)
        assert np.mean(ours.ids[i] == ids) > 0.99
        assert ours.distance[i] == pytest.approx(distance, rel=1e-4)
