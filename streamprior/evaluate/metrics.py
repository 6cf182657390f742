"""Objects and frames -> how well an object explains what was measured: model, residuals, profiles, transfer function."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior import align as alignment

PRESENT = 0.1
"""Part of the largest amplitude from which a pixel belongs to the object: below it the phase means nothing (docs/physics.md section 2)."""


def phase_origin(psi: npt.NDArray[Any]) -> complex:
    """The factor that makes the amplitude-weighted mean phasor real: the global phase is free, and this one wraps least."""
    return complex(np.exp(-1j * np.angle(np.sum(psi * np.abs(psi)))))


def model_of(psi: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """|F psi|, (..., H, W) float: the magnitude that a centred object of the last two (or all three) axes gives on the detector."""
    axes = tuple(range(psi.ndim))
    return np.asarray(np.abs(scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(psi, axes), norm="ortho"), axes)))


def residuals(counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_], psi: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Model minus measured magnitude in standard deviations of photon noise, like counts; NaN on pixels that were not measured.

    sqrt(counts) of a Poisson number has the deviation 1/2 whatever its mean (Bartlett 1936), from about 4 photons on; below, the true
    deviation is smaller.
    """
    magnitude = np.sqrt(np.maximum(counts, 0.0, dtype=np.float64))
    return np.where(valid, 2.0 * (model_of(psi) - magnitude), np.nan)


def radial_profile(image: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean over shells of one pixel about the centre, out to the nearest edge: (radius in pixels, mean), NaN where a shell has no pixel."""
    shells = _shells(image.shape)
    used = valid & np.isfinite(image)
    number = min(image.shape) // 2
    pixels = np.bincount(shells[used], minlength=number)[:number]
    total = np.bincount(shells[used], weights=image[used].astype(np.float64), minlength=number)[:number]
    mean = np.divide(total, pixels, out=np.full(number, np.nan), where=pixels > 0)
    return np.arange(number, dtype=np.float64), mean


def _shells(shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    square = np.zeros(shape)
    for axis, size in enumerate(shape):
        square += ((np.arange(size) - size // 2) ** 2).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return np.sqrt(square).round().astype(np.intp)


def prtf(
    runs: npt.NDArray[np.complex64], counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Phase-retrieval transfer function: how far independent runs agree on the phase of each spatial frequency.

    PRTF(q) = |<exp(i phi)>|, averaged over the measured pixels with photons in a shell (Chapman 2006). n runs that share nothing still give
    about 0.89/sqrt(n). All runs are brought onto the first before they are averaged: a translation alone would scramble every phase.

    Parameters
    ----------
    runs : (n, *shape) complex, at least two
        Objects retrieved from independent starts.
    counts, valid : (*shape)

    Returns
    -------
    (radius, prtf)
        Pixels from the centre, and 0..1.

    Raises
    ------
    ValueError
        Fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(f"{len(runs)} run; agreement takes at least two")
    first = np.asarray(runs[0], np.complex128)
    total = np.zeros(counts.shape, np.complex128)
    for run in runs:
        found = alignment.align(run, first)
        # Without the ramp: the frame itself says where the diffraction lies, so between runs on one frame it is no freedom.
        turned = alignment.twin(run.astype(np.complex128)) if found.twin else run.astype(np.complex128)
        moved = alignment.transformed(turned, np.array(found.shift), np.zeros(counts.ndim))
        far = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(moved * np.exp(1j * np.angle(np.vdot(moved, first))))))
        total += np.exp(1j * np.angle(far))
    return radial_profile(np.abs(total) / len(runs), valid & (counts > 0))
