"""Pixel classes on a card: the CPU's labels, from the card's own kernels run on the CPU, and from a card where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from streamprior.arrays import cuda_missing
from streamprior.errors import ConfigError
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Batch, Detector, Frame, Photons, RunStarted
from streamprior.stages import classify_cuda
from streamprior.stages.classify import Classifier
from streamprior.stages.classify_cuda import COUNTS, KERNELS, CudaClassifier, make_classifier, source_for
from tests import naive
from tests.host_cuda import Card
from tests.test_classify import synthetic

Maker = Callable[[Prior], CudaClassifier]


@pytest.fixture(params=["kernels on the cpu", "cuda"])
def maker(request: pytest.FixtureRequest) -> Maker:
    if request.param == "cuda":
        missing = cuda_missing()
        if missing is not None:
            pytest.skip(f"no CUDA card: {missing}")
    else:
        request.getfixturevalue("card")
    return CudaClassifier


def everywhere(counts: np.ndarray) -> np.ndarray:
    return np.ones(counts.shape[1:], np.bool_)


@pytest.mark.parametrize("dtype", sorted(COUNTS))
@pytest.mark.parametrize("classes", [3, 49])
def test_labels_and_distances_are_those_of_the_cpu(maker: Maker, dtype: str, classes: int) -> None:
    counts = synthetic((3, 104, 104), flux=2.0 if dtype == "uint8" else 40.0).astype(dtype)
    prior = naive.prior(counts, classes)
    ours, theirs = maker(prior).classes(counts, everywhere(counts)), Classifier(prior).classes(counts, everywhere(counts))
    assert np.mean(ours.ids == theirs.ids) >= 0.999998 - 1 / counts.size
    np.testing.assert_allclose(ours.distance, theirs.distance, rtol=1e-5)
    assert len(np.unique(ours.ids)) == classes


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 40), (2, 3, 5), (1, 16, 32), (1, 17, 33), (1, 50, 31)])
def test_frames_smaller_than_a_tile_or_the_stencil_are_classified(maker: Maker, shape: tuple[int, ...]) -> None:
    counts = np.random.default_rng(0).poisson(30, size=shape).astype(np.uint16)
    prior = replace(naive.prior(synthetic(), 4), geometry=replace(naive.prior(synthetic(), 4).geometry, shape=shape[1:]))
    ours, theirs = maker(prior).classes(counts, everywhere(counts)), Classifier(prior).classes(counts, everywhere(counts))
    np.testing.assert_array_equal(ours.ids, theirs.ids)
    # The standard deviation of a flat patch is rounding alone.
    np.testing.assert_allclose(ours.distance, theirs.distance, rtol=1e-4)


def test_pixels_that_were_not_measured_get_no_class_and_do_not_count(maker: Maker) -> None:
    counts = synthetic().astype(np.float32)
    prior = naive.prior(counts, 3)
    own = np.ones(counts.shape, bool)
    own[1, :10] = False
    own[0, 3, 4] = False
    for valid in (own, own[1]):
        ours, theirs = maker(prior).classes(counts, valid), Classifier(prior).classes(counts, valid)
        assert np.array_equal(ours.ids == NOT_MEASURED, np.broadcast_to(~valid, counts.shape))
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.distance, theirs.distance, rtol=1e-5)
    blind = maker(prior).classes(counts, np.zeros(counts.shape[1:], bool))
    assert (blind.ids == NOT_MEASURED).all()
    assert np.isnan(blind.distance).all()


def test_a_dark_frame_is_classified(maker: Maker) -> None:
    prior = naive.prior(synthetic(), 3)
    dark = maker(prior).classes(np.zeros((1, 48, 40), np.uint16), np.ones((48, 40), bool))
    assert dark.ids.max() < 3
    assert np.isfinite(dark.distance[0])


def test_a_prior_that_weighs_the_angle_is_classified_as_it_says(maker: Maker) -> None:
    counts = synthetic().astype(np.uint16)
    prior = naive.prior(counts, 4, angle=1.0)
    ours, theirs = maker(prior).classes(counts, everywhere(counts)), Classifier(prior).classes(counts, everywhere(counts))
    np.testing.assert_array_equal(ours.ids, theirs.ids)


def test_a_frame_gets_the_same_bits_alone_in_a_batch_and_in_any_chunk(maker: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = synthetic((7, 48, 40)).astype(np.float32)
    classifier = maker(naive.prior(counts, 4))
    whole = classifier.classes(counts, everywhere(counts))
    alone = [classifier.classes(counts[i : i + 1], everywhere(counts)) for i in range(7)]
    monkeypatch.setattr(classify_cuda, "_CHUNK_PIXELS", 2 * counts[0].size)
    for other in (classifier.classes(counts, everywhere(counts)), classifier.classes(counts[:, ::1].copy(order="F"), everywhere(counts))):
        assert np.array_equal(whole.ids, other.ids)
        assert np.array_equal(whole.distance, other.distance)
    assert np.array_equal(whole.ids, np.concatenate([one.ids for one in alone]))
    assert np.array_equal(whole.distance, np.concatenate([one.distance for one in alone]))


def test_the_order_of_threads_changes_no_bit_and_a_call_waits_once(card: Card) -> None:
    counts = synthetic((3, 48, 40)).astype(np.uint16)
    prior, results = naive.prior(counts, 5), []
    for descending in (False, True):
        card.descending = descending
        classifier, before = CudaClassifier(prior), card.waits
        results.append(classifier.classes(counts, everywhere(counts)))
        assert card.waits == before + 1
    assert np.array_equal(results[0].ids, results[1].ids)
    assert np.array_equal(results[0].distance, results[1].distance)


def test_the_stage_fills_in_classes_and_what_does_not_fit_is_refused(maker: Maker) -> None:
    counts = synthetic().astype(np.float32)
    stage = maker(naive.prior(counts, 3))
    frames = tuple(Frame("source", "1", i, counts[i], 0.0) for i in range(2))
    batch = Batch(RunStarted("uid", "source", "1", 0.0, None, Detector()), frames)
    done = stage(replace(batch, photons=Photons(counts, everywhere(counts), np.zeros(2, np.uint32))))
    assert done.classes is not None
    assert done.classes.ids.shape == counts.shape
    assert stage.classes(counts[:0], everywhere(counts)).ids.shape == (0, 48, 40)
    with pytest.raises(ValueError, match="prepare comes before classify"):
        stage(batch)
    with pytest.raises(ValueError, match=r"\(B, 48, 40\)"):
        stage.classes(counts[:, 1:], everywhere(counts))
    with pytest.raises(ValueError, match="valid has shape"):
        stage.classes(counts, everywhere(counts)[1:])
    with pytest.raises(TypeError, match=r"convert with counts\.astype"):
        stage.classes(counts.astype(np.float64), everywhere(counts))


def test_a_card_is_taken_where_it_is_there_and_asked_for(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = naive.prior(synthetic(), 3)
    assert isinstance(make_classifier(prior), CudaClassifier)
    assert isinstance(make_classifier(prior, "cpu"), Classifier)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert isinstance(make_classifier(prior), Classifier)
    with pytest.raises(ConfigError, match="set backend to 'auto' or 'cpu'"):
        make_classifier(prior, "cuda")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("kind", sorted(COUNTS))
def test_the_kernels_compile_for_a_card(architecture: str, kind: str, tmp_path: Path) -> None:
    """A100; H100 and H200."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the kernels cannot be compiled for a card")
    (tmp_path / "k.cu").write_text(source_for(kind))
    command = [nvcc, "-cubin", f"-arch={architecture}", "--Werror", "all-warnings", "-o", "k.cubin", "k.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name.encode() in (tmp_path / "k.cubin").read_bytes() for name in KERNELS)
