"""Images from odd and from even frames -> how far they agree: Fourier ring correlation, resolution, disagreement, uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.ndimage import gaussian_filter

WELL_LIT = 0.6
"""Part of the light's 90th percentile from which a place counts as well lit: the rim of a scan was seen by few frames."""

_EDGE_PX = 8.0
"""Softness of the mask before the transform (sigma of a Gaussian): a sharp one correlates with itself at every frequency."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of two images of one object; arrays (K,) float32, K rings a pixel of the spectrum wide.

    frequency : cycles per pixel. correlation : of the rings, -1..1. threshold : the half-bit curve. resolution_px : half period at which
    the correlation falls below it for good, NaN where it never lies above. disagreement : rms difference over the contrast. difference :
    (rows, columns) complex64, the first image less the second one brought onto it; NaN where either had no light.
    """

    frequency: npt.NDArray[np.float32]
    correlation: npt.NDArray[np.float32]
    threshold: npt.NDArray[np.float32]
    resolution_px: float
    disagreement: float
    difference: npt.NDArray[np.complex64]


def agreement(first: npt.NDArray[Any], second: npt.NDArray[Any], light: npt.NDArray[Any]) -> Agreement:
    """Compare two images that lie on each other.

    Parameters
    ----------
    first, second : (rows, columns) complex. They may differ by a factor and a linear phase, which the probe may carry as well.
    light : (rows, columns), what fell on both.
    """
    lit = well_lit(light)
    if not lit.any():
        nothing = np.empty(0, np.float32)
        return Agreement(nothing, nothing, nothing, float("nan"), float("nan"), np.full(first.shape, np.nan, np.complex64))
    other = onto(first, second, lit)
    difference = np.where(light > 0, first - other, np.nan).astype(np.complex64)
    frequency, correlation, threshold = ring_correlation(first, other, lit)
    return Agreement(
        frequency, correlation, threshold, resolution(frequency, correlation, threshold), _relative(difference, first, lit), difference
    )


def well_lit(light: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where light is at least WELL_LIT of what most places have had."""
    if not (light > 0).any():
        return np.zeros(light.shape, np.bool_)
    return np.asarray(light > WELL_LIT * np.percentile(light[light > 0], 90))


def onto(reference: npt.NDArray[Any], image: npt.NDArray[Any], lit: npt.NDArray[np.bool_]) -> npt.NDArray[np.complex64]:
    """The image times the factor and the linear phase that bring it closest to the reference where it is lit."""
    across = np.where(lit, reference * np.conj(image), 0).astype(np.complex128)
    # Mean phase step from pixel to pixel: what a linear phase adds to each.
    slopes = [
        np.angle((np.take(across, range(1, n), axis) * np.conj(np.take(across, range(n - 1), axis))).sum())
        for axis, n in enumerate(lit.shape)
    ]
    phase = np.exp(1j * (slopes[0] * np.arange(lit.shape[0])[:, None] + slopes[1] * np.arange(lit.shape[1])))
    tilted = image * phase
    factor = np.vdot(tilted[lit], reference[lit]) / max(float(np.vdot(tilted[lit], tilted[lit]).real), 1e-30)
    return np.asarray(tilted * factor, np.complex64)


def _relative(difference: npt.NDArray[Any], image: npt.NDArray[Any], lit: npt.NDArray[np.bool_]) -> float:
    contrast = np.sqrt(np.mean(np.abs(image[lit] - image[lit].mean()) ** 2))
    return float(np.sqrt(np.mean(np.abs(difference[lit]) ** 2)) / contrast) if contrast > 0 else float("nan")


def ring_correlation(
    first: npt.NDArray[Any], second: npt.NDArray[Any], lit: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Fourier ring correlation and its half-bit threshold (van Heel & Schatz, J. Struct. Biol. 151, 250, 2005).

    Returns frequency (cycles per pixel, up to 0.5), correlation and threshold, each (K,). The mask's soft edge leaves fewer independent
    points in a ring than pixels: the threshold counts those.
    """
    rows, columns = (np.flatnonzero(lit.any(axis)) for axis in (1, 0))
    cut = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    mask = np.clip(2 * gaussian_filter(lit[cut].astype(np.float64), _EDGE_PX, mode="constant") - 1, 0, 1)
    spectra = []
    for image in (first[cut], second[cut]):
        mean = (image * mask).sum() / max(mask.sum(), 1e-30)
        spectra.append(scipy.fft.fft2((image - mean) * mask))
    radius = np.hypot(scipy.fft.fftfreq(mask.shape[0])[:, None], scipy.fft.fftfreq(mask.shape[1])[None, :])
    side = min(mask.shape)
    ring = np.rint(radius * side).astype(np.int64).ravel()
    number = side // 2 + 1

    def summed(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        return np.asarray(np.bincount(ring, values.ravel(), minlength=number)[:number], np.float64)

    across = spectra[0] * np.conj(spectra[1])
    power = summed(np.abs(spectra[0]) ** 2) * summed(np.abs(spectra[1]) ** 2)
    correlation = summed(across.real) / np.sqrt(np.maximum(power, 1e-30))
    points = np.maximum(np.bincount(ring, minlength=number)[:number] * float((mask**2).mean()), 1.0)
    threshold = (0.2071 + 1.9102 / np.sqrt(points)) / (1.2071 + 0.9102 / np.sqrt(points))
    return tuple(np.asarray(one, np.float32) for one in (np.arange(number) / side, correlation, threshold))  # type: ignore[return-value]


def resolution(frequency: npt.NDArray[Any], correlation: npt.NDArray[Any], threshold: npt.NDArray[Any]) -> float:
    """Half period, pixels, of the first crossing below the threshold; 1 pixel where there is none; NaN where no ring lies above it.

    The first rings hold a handful of points each and may lie anywhere: a crossing counts from the first ring above the threshold on, and
    only where the next ring lies below it too.
    """
    below = correlation < threshold
    above = np.flatnonzero(~below[1:]) + 1
    if not above.size:
        return float("nan")
    start = int(above[0])
    lost = [k for k in range(start, len(below) - 1) if below[k] and below[k + 1]]
    if not lost:
        return 1.0
    k = lost[0]
    # Between the last ring above and the first below, linear.
    high, low = correlation[k - 1] - threshold[k - 1], correlation[k] - threshold[k]
    at = frequency[k - 1] + (frequency[k] - frequency[k - 1]) * high / max(high - low, 1e-12)
    return float(0.5 / at) if at > 0 else float("nan")
