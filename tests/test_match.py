"""Starts are flat in the prior's support and carry the energy of their frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamprior.records import Batch, Detector, Photons, RunStarted
from streamprior.stages.match import Matcher, match
from tests.naive_refine import centred_box, forward, prior_for

SHAPE = (24, 20)


def test_a_flat_start_has_the_energy_of_its_frame() -> None:
    counts = np.random.default_rng(0).poisson(3.0, (4, *SHAPE)).astype(np.uint16)
    start = match(counts, prior_for(centred_box(SHAPE, 8)))
    assert start.psi.shape == start.support.shape == (4, 1, *SHAPE)
    assert start.psi.dtype == np.complex64
    assert start.support.dtype == np.bool_
    for psi, frame in zip(start.psi[:, 0], counts, strict=True):
        assert (np.abs(forward(psi)) ** 2).sum() == pytest.approx(frame.sum(), rel=1e-5)
        assert np.unique(psi[centred_box(SHAPE, 8)]).size == 1
        assert not psi[~centred_box(SHAPE, 8)].any()
    assert (start.unit == -1).all()
    assert np.isnan(start.distance).all()


def test_pixels_that_were_not_measured_do_not_count() -> None:
    counts = np.ones((1, *SHAPE), np.float32)
    counts[0, 3, 3] = 1e6
    prior = prior_for(centred_box(SHAPE, 8))
    prior.invalid[3, 3] = True
    by_prior = match(counts, prior)
    own_map = Photons(counts, ~prior.invalid[None], np.zeros(1, np.uint32))
    assert (np.abs(by_prior.psi) ** 2).sum() == pytest.approx(counts.size - 1, rel=1e-5)
    np.testing.assert_array_equal(match(own_map, prior).psi, by_prior.psi)


def test_a_frame_does_not_touch_its_neighbours() -> None:
    counts = np.random.default_rng(0).poisson(3.0, (3, *SHAPE)).astype(np.float32)
    counts[1] = 0
    counts[2, 5, 5] = np.nan
    prior = prior_for(centred_box(SHAPE, 8))
    start = match(counts, prior)
    np.testing.assert_array_equal(start.psi[:1], match(counts[:1], prior).psi)
    assert not start.psi[1].any()
    assert np.isfinite(start.psi).all()


def test_an_empty_support_gives_an_empty_start() -> None:
    start = match(np.ones((1, *SHAPE), np.float32), prior_for(np.zeros(SHAPE, bool)))
    assert not start.psi.any()
    assert not start.support.any()


def test_the_stage_fills_in_the_start() -> None:
    prior = prior_for(centred_box(SHAPE, 8))
    photons = Photons(np.ones((2, *SHAPE), np.float32), np.ones(SHAPE, bool), np.zeros(2, np.uint32))
    stage = Matcher(prior)
    batch = stage(Batch(RunStarted("r", "s", "1", 0.0, None, Detector()), (), photons=photons))
    assert stage.name == "match"
    assert batch.start is not None
    np.testing.assert_array_equal(batch.start.psi, match(photons, prior).psi)
    with pytest.raises(ValueError, match="prepare comes before match"):
        stage(Batch(batch.run, ()))


def test_what_cannot_be_matched_is_said_in_a_sentence() -> None:
    prior = prior_for(centred_box(SHAPE, 8))
    with pytest.raises(ValueError, match="holds no library of prototypes"):
        match(np.ones((1, *SHAPE), np.float32), prior, k=5)
    with pytest.raises(ValueError, match="this prior was made for"):
        match(np.ones((1, 20, 24), np.float32), prior)
    with pytest.raises(ValueError, match="this prior was made for"):
        match(np.ones(SHAPE, np.float32), prior)


def test_a_measured_frame_starts_with_its_photons(data_folder: Path) -> None:
    counts = np.load(data_folder / "bcdi_gold_64cube_set1_set2.npz")["set1"][28:36]
    start = match(counts, prior_for(centred_box((64, 64), 20)))
    np.testing.assert_allclose((np.abs(start.psi) ** 2).sum((1, 2, 3)), counts.sum((1, 2)), rtol=1e-5)
