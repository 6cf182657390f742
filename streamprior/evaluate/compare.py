"""Two objects -> their Agreement: ambiguities removed, then object error, SSIM and PSNR. The only door to scikit-image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from skimage.metrics import structural_similarity

from streamprior import align as alignment
from streamprior.evaluate.metrics import PRESENT, phase_origin

WINDOW = 7
"""Pixels along each side of the window of SSIM (Wang 2004 in scikit-image's form, uniform weights)."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """An object brought onto a reference, and what is left between the two.

    psi : complex64 like the reference, aligned. error : |psi - reference| / |reference| in the complex domain.
    ssim, psnr : of amplitude / largest amplitude of the reference, data range 1; psnr in dB.
    phase_ssim, phase_psnr : of the phase where the reference's amplitude exceeds 10 % of its maximum, data range 2 pi.
    twin : the conjugate inversion was taken. shift, ramp : pixels along each axis. factor : complex, phase and scale.
    All numbers are NaN where either field is zero or not finite.
    """

    psi: npt.NDArray[np.complex64]
    error: float
    ssim: float
    psnr: float
    phase_ssim: float
    phase_psnr: float
    twin: bool
    shift: tuple[float, ...]
    ramp: tuple[float, ...]
    factor: complex


def compare(psi: npt.NDArray[Any], reference: npt.NDArray[Any]) -> Agreement:
    """Remove the trivial ambiguities and measure what is left; public as `streamprior.evaluate.align`.

    The object error is taken first, in the complex domain (`streamprior.align`). SSIM and PSNR follow on the smallest box that holds
    both objects: an oversampled field is empty for the greater part, and agreement on nothing would only flatter.

    Parameters
    ----------
    psi, reference : (H, W) or (D, H, W) complex
        Centred fields of the same shape, at least 7 pixels along each axis. The scale of either does not matter.

    Returns
    -------
    Agreement

    Raises
    ------
    ValueError
        The shapes differ, or an axis is shorter than the window.
    """
    if min(reference.shape) < WINDOW:
        raise ValueError(f"fields have shape {reference.shape}; SSIM needs at least {WINDOW} pixels along each axis")
    found = alignment.align(psi, reference)
    numbers = _numbers(found.psi, np.asarray(reference, np.complex128)) if np.isfinite(found.error) else (float("nan"),) * 4
    return Agreement(found.psi, found.error, *numbers, found.twin, found.shift, found.ramp, found.factor)


def _numbers(psi: npt.NDArray[Any], goal: npt.NDArray[Any]) -> tuple[float, float, float, float]:
    """SSIM and PSNR of the amplitude, then of the phase."""
    box = _object_box(np.maximum(np.abs(goal) / np.abs(goal).max(), np.abs(psi) / np.abs(psi).max()) > PRESENT)
    return *_amplitude_agreement(psi[box], goal[box]), *_phase_agreement(psi[box], goal[box])


def _object_box(present: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """The bounding box of what is present, half a window wider on each side and never shorter than a window."""
    box = []
    for axis, size in enumerate(present.shape):
        across = tuple(other for other in range(present.ndim) if other != axis)
        found = np.flatnonzero(present.any(across))
        first, last = max(int(found[0]) - WINDOW // 2, 0), min(int(found[-1]) + WINDOW // 2 + 1, size)
        first = max(min(first, last - WINDOW), 0)
        box.append(slice(first, max(last, first + WINDOW)))
    return tuple(box)


def _amplitude_agreement(psi: npt.NDArray[Any], goal: npt.NDArray[Any]) -> tuple[float, float]:
    """(SSIM, PSNR in dB) of the amplitudes, both divided by the reference's largest: the alignment has settled their scale."""
    largest = float(np.abs(goal).max())
    one, other = np.abs(psi).astype(np.float64) / largest, np.abs(goal) / largest
    alike = structural_similarity(one, other, win_size=WINDOW, data_range=1.0)
    return float(alike), _decibel(1.0, float(np.mean((one - other) ** 2)))


def _phase_agreement(psi: npt.NDArray[Any], goal: npt.NDArray[Any]) -> tuple[float, float]:
    """(SSIM, PSNR in dB) of the phases over the reference's object; a difference is wrapped, so that the cut of arg() costs nothing."""
    present = np.abs(goal) > PRESENT * np.abs(goal).max()
    wanted = np.where(present, np.angle(goal * phase_origin(goal)), 0.0)
    apart = np.where(present, np.angle(psi * np.conj(goal)), 0.0)
    _, alike = structural_similarity(wanted + apart, wanted, win_size=WINDOW, data_range=2 * np.pi, full=True)
    return float(alike[present].mean()), _decibel(2 * np.pi, float(np.mean(apart[present] ** 2)))


def _decibel(data_range: float, squared_error: float) -> float:
    """PSNR; infinite for equal images."""
    return 10 * float(np.log10(data_range**2 / squared_error)) if squared_error > 0 else float("inf")
