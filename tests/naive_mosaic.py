"""The obvious version of ptychography: centred arrays, scipy.fft, one frame at a time, in the precision of the probe.

A probe is (modes, H, W) or (H, W), its sum of |probe|^2 the photons of a frame where the object is 1; a corner is the (row, column) of the
object's pixel under the probe's pixel (0, 0), whole pixels. What lies between two pixels is for the probe: see `fourier_shift`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

Array = npt.NDArray[Any]
PLANE = (-2, -1)


def far(psi: Array) -> Array:
    """Exit waves (..., H, W) -> the fields on the detector, orthonormal, direct beam at (H // 2, W // 2)."""
    return scipy.fft.fftshift(scipy.fft.fft2(scipy.fft.ifftshift(psi, PLANE), norm="ortho"), PLANE)


def near(field: Array) -> Array:
    """The inverse of `far`, and its adjoint."""
    return scipy.fft.fftshift(scipy.fft.ifft2(scipy.fft.ifftshift(field, PLANE), norm="ortho"), PLANE)


def window_at(corner: Array, probe: Array) -> tuple[slice, slice]:
    """The part of the object that the probe lies on."""
    row, column = (int(c) for c in corner)
    return slice(row, row + probe.shape[-2]), slice(column, column + probe.shape[-1])


def forward(mosaic: Array, probe: Array, corner: Array) -> Array:
    """The field of every mode on the detector; the shape of the probe."""
    return far(probe * mosaic[window_at(corner, probe)])


def modulus(field: Array) -> Array:
    """(modes, H, W) -> (H, W): modes add as intensities (Thibault & Menzel, Nature 494, 68, 2013)."""
    return np.sqrt((np.abs(field) ** 2).sum(0))


def chi2_of(counts: Array, mosaic: Array, probe: Array, corners: Array) -> float:
    """Sum over all frames of (|F psi| - sqrt(counts))^2, over the sum of counts."""
    probe = probe.reshape(-1, *probe.shape[-2:])
    misfit = sum(
        ((modulus(forward(mosaic, probe, corner)) - np.sqrt(frame, dtype=np.float64)) ** 2).sum()
        for frame, corner in zip(counts, corners, strict=True)
    )
    return float(misfit / counts.sum(dtype=np.float64))


def epie(
    counts: Array,
    probe: Array,
    corners: Array,
    shape: tuple[int, int],
    sweeps: int,
    step: float = 1.0,
    *,
    rng: np.random.Generator,
    probe_from: int | None = None,
) -> tuple[Array, Array]:
    """ePIE (Maiden & Rodenburg, Ultramicroscopy 109, 1256, 2009) from an object of ones, frames in a new order each sweep.

    counts (N, H, W), corners (N, 2) whole pixels, shape (rows, columns) of the object; the probe moves in the sweeps from `probe_from` on,
    counted from 0, and never where that is None. Out: the object (rows, columns) and the probe as (modes, H, W), both complex.
    """
    probe = probe.reshape(-1, *probe.shape[-2:]).copy()
    mosaic = np.ones(shape, probe.dtype)
    magnitude = np.sqrt(counts.astype(probe.real.dtype))
    for sweep in range(sweeps):
        for frame in rng.permutation(len(counts)):
            here = window_at(corners[frame], probe)
            seen = mosaic[here].copy()
            psi = probe * seen
            field = far(psi)
            # a pixel without any predicted light has no phase to keep: it stays dark instead of becoming NaN
            change = near(field * (magnitude[frame] / np.maximum(modulus(field), np.finfo(magnitude.dtype).tiny))) - psi
            brightest = (np.abs(probe) ** 2).sum(0).max()
            mosaic[here] += step * (probe.conj() * change).sum(0) / brightest
            if probe_from is not None and sweep >= probe_from:
                probe += step * seen.conj() * change / (np.abs(seen) ** 2).max()
    return mosaic, probe


def fourier_shift(probe: Array, shift: tuple[float, float]) -> Array:
    """The probe moved by (rows, columns) pixels towards higher indices, fractions allowed; what leaves comes back on the other side."""
    rows, columns = (scipy.fft.fftfreq(n) for n in probe.shape[-2:])
    ramp = np.exp(-2j * np.pi * (rows[:, None] * shift[0] + columns * shift[1]))
    return scipy.fft.ifft2(scipy.fft.fft2(probe) * ramp).astype(probe.dtype)


def fourier_ring_correlation(a: Array, b: Array) -> tuple[Array, Array]:
    """Spatial frequency (cycles per pixel, up to 0.5) and the correlation of two images of one shape in rings one frequency step wide.

    The real part of sum(A conj(B)) / sqrt(sum |A|^2 sum |B|^2) (van Heel & Schatz, J. Struct. Biol. 151, 250, 2005): images that
    differ by a phase or a ramp must be aligned first, and images that do not fade at their border windowed.
    """
    spectra = [scipy.fft.fft2(image) for image in (a, b)]
    rows, columns = (scipy.fft.fftfreq(n) for n in a.shape)
    width = 1 / min(a.shape)
    ring = np.rint(np.hypot(rows[:, None], columns) / width).astype(int)
    rings = np.arange(int(0.5 / width) + 1)

    def per_ring(values: Array) -> Array:
        return np.bincount(ring.ravel(), values.ravel(), minlength=rings.size)[: rings.size]

    together = per_ring((spectra[0] * spectra[1].conj()).real)
    return rings * width, together / np.sqrt(per_ring(np.abs(spectra[0]) ** 2) * per_ring(np.abs(spectra[1]) ** 2))
