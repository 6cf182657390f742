"""The numbers of an evaluation: known answers, the ambiguities that must not count, and the naive form of every average."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

import streamprior as sp
from streamprior.evaluate.compare import compare
from streamprior.evaluate.metrics import model_of, prtf, radial_profile, residuals

ALL = np.ones((32, 32), bool)


def crystal(seed: int = 0, shape: tuple[int, ...] = (32, 32)) -> np.ndarray:
    """A smooth complex object in the middle third of the field."""
    random = np.random.default_rng(seed)
    axes = [(np.arange(n) - n // 2) / (0.15 * n) for n in shape]
    place = np.meshgrid(*axes, indexing="ij")
    amplitude = np.exp(-sum(one**4 for one in place))
    phase = sum(random.normal() * one for one in place) + random.normal() * place[0] * place[1]
    return (30 * amplitude * np.exp(1j * phase)).astype(np.complex64)


def test_the_public_align_removes_what_no_intensity_can_know() -> None:
    psi = crystal()
    twin = np.roll(np.conj(psi[::-1, ::-1]), (1, 1), (0, 1))
    moved = 3 * np.exp(2j) * np.roll(twin, (2, -3), (0, 1))
    found = sp.evaluate.align(moved, psi)
    assert found.twin
    assert found.error < 1e-3
    assert found.ssim == pytest.approx(1.0, abs=1e-4)
    assert found.phase_ssim == pytest.approx(1.0, abs=1e-3)
    assert found.psnr > 60
    np.testing.assert_allclose(found.psi, psi, atol=0.05)


def test_an_object_equals_itself() -> None:
    found = compare(crystal(), crystal())
    assert found.error < 1e-3
    assert found.ssim == pytest.approx(1.0)
    assert found.phase_ssim == pytest.approx(1.0)


def test_worse_objects_score_worse_in_every_number() -> None:
    psi = crystal()
    noise = crystal(1) * np.exp(1j * np.random.default_rng(2).normal(size=psi.shape))
    near, far = compare(psi + 0.1 * noise, psi), compare(psi + 0.5 * noise, psi)
    assert near.error < far.error
    for name in ("ssim", "psnr", "phase_ssim", "phase_psnr"):
        assert getattr(near, name) > getattr(far, name), name


def test_the_empty_field_around_an_object_does_not_flatter() -> None:
    psi, other = crystal(), crystal(5)
    wide, wider = (np.pad(one, 16) for one in (psi, other)), (np.pad(one, 48) for one in (psi, other))
    small, large = compare(*wide), compare(*wider)
    assert small.ssim == pytest.approx(large.ssim, abs=0.02)
    assert small.psnr == pytest.approx(large.psnr, abs=0.3)


def test_a_phase_that_wraps_costs_nothing() -> None:
    psi = np.zeros((32, 32), np.complex64)
    psi[8:24, 8:24] = -1  # its phase is pi: a hair more, and arg() would jump to -pi
    found = compare(psi * np.exp(1e-3j * np.random.default_rng(0).normal(size=psi.shape)), psi)
    assert found.phase_psnr > 60
    assert found.phase_ssim > 0.99


def test_psnr_of_a_known_difference() -> None:
    psi = np.zeros((32, 32), np.complex64)
    psi[8:24, 8:24] = 1
    other = psi.copy()
    other[8:24, 8:24] += 0.1 * np.where(np.indices((16, 16)).sum(0) % 2, 1, -1)
    # The box is the object and half a window around it: 22 x 22, of which 16 x 16 differ by 0.1 (after the least-squares scale 1/1.01).
    squared = (16 * 16) * (0.1**2 + 0.01**2) / 22**2 / 1.01
    assert compare(other, psi).psnr == pytest.approx(-10 * np.log10(squared), abs=0.1)


@pytest.mark.parametrize("bad", [np.zeros((32, 32), complex), np.full((32, 32), np.nan + 0j)])
def test_without_an_object_every_number_is_undefined(bad: np.ndarray) -> None:
    found = compare(bad, crystal())
    assert all(np.isnan([found.error, found.ssim, found.psnr, found.phase_ssim, found.phase_psnr]))


def test_fields_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        compare(crystal(), crystal(shape=(32, 30)))
    with pytest.raises(ValueError, match="at least 7"):
        compare(np.ones((5, 32)), np.ones((5, 32)))


def test_volumes_are_compared_as_frames_are() -> None:
    psi = crystal(shape=(16, 16, 16))
    found = compare(np.roll(psi, (1, 0, -2), (0, 1, 2)) * 1j, psi)
    assert found.error < 1e-3
    assert found.ssim == pytest.approx(1.0, abs=1e-3)


def test_the_model_is_the_unitary_transform() -> None:
    psi = crystal()
    naive = np.abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(psi), norm="ortho")))
    np.testing.assert_allclose(model_of(psi), naive, atol=1e-3)
    assert np.sum(model_of(psi) ** 2) == pytest.approx(np.sum(np.abs(psi) ** 2), rel=1e-4)


def test_residuals_of_the_truth_have_the_deviation_of_photon_noise() -> None:
    psi = 100 * crystal()
    expected = model_of(psi) ** 2
    bright = expected > 30
    counts = np.random.default_rng(0).poisson(expected).astype(np.float32)
    left = residuals(counts, bright, psi)
    assert np.isnan(left[~bright]).all()
    assert np.nanstd(left) == pytest.approx(1.0, abs=0.12)


@pytest.mark.parametrize("shape", [(16, 20), (9, 9), (8, 10, 12)])
def test_radial_profile_equals_its_naive_form(shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    image, valid = random.random(shape), random.random(shape) > 0.3
    radius, mean = radial_profile(image, valid)
    assert len(radius) == min(shape) // 2
    for r in range(len(radius)):
        members = [
            image[at]
            for at in np.ndindex(shape)
            if valid[at] and round(sum((i - n // 2) ** 2 for i, n in zip(at, shape, strict=True)) ** 0.5) == r
        ]
        assert mean[r] == pytest.approx(np.mean(members)) if members else np.isnan(mean[r])


def test_runs_that_agree_have_a_transfer_function_of_one_whatever_their_place() -> None:
    psi = crystal()
    runs = np.stack([psi, np.roll(psi, (3, -2), (0, 1)) * 1j, np.conj(np.roll(psi[::-1, ::-1], (1, 1), (0, 1)))])
    _, agreement = prtf(runs, model_of(psi) ** 2, ALL)
    assert agreement[:8].min() > 0.98


def test_runs_that_share_nothing_have_a_transfer_function_of_one_over_the_root_of_their_number() -> None:
    random = np.random.default_rng(0)
    runs = (random.normal(size=(9, 32, 32)) + 1j * random.normal(size=(9, 32, 32))).astype(np.complex64)
    _, agreement = prtf(runs, np.ones((32, 32)), ALL)
    assert np.nanmean(agreement[4:]) == pytest.approx(np.sqrt(np.pi / 4) / 3, abs=0.03)


def test_a_transfer_function_takes_two_runs() -> None:
    with pytest.raises(ValueError, match="two"):
        prtf(crystal()[None], np.ones((32, 32)), ALL)


def test_the_light_import_finds_the_package_without_its_libraries() -> None:
    code = "import sys, streamprior as sp; sp.evaluate; print([n for n in ('numpy', 'skimage', 'matplotlib') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
