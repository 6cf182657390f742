"""Raw frames -> Geometry and the pixels that no frame measures: where the beam is, how much around it, what is hot or dead."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import median_filter, minimum_filter

from streamprior.prior import Geometry, Prior
from streamprior.stages.prepare import Corrections, prepare

WHOLE = 128
"""Pixels a side up to which a detector is kept whole, and to which a larger one is cropped (docs/physics.md section 4's sizes)."""

NEIGHBOURS = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], bool)

Tick = Callable[[str, int, int], None]
"""progress(stage, done, total)"""


def find_geometry(mean: npt.NDArray[np.float64], shape: int | None = None, binning: int = 1) -> Geometry:
    """Choose the region of interest.

    Parameters
    ----------
    mean : (rows, columns) float64
        Mean frame, photons.
    shape : int, optional
        Side of the prepared frame; chosen where it is None.
    binning : int

    Raises
    ------
    ValueError
        The detector has fewer pixels than the region asks for.
    """
    rows, columns = mean.shape
    small = (rows // binning // 2 * 2, columns // binning // 2 * 2)
    if shape is not None and shape > min(small):
        raise ValueError(f"a prepared frame of {shape} pixels at binning {binning} does not fit on a detector of {rows} x {columns}")
    if shape is None and max(small) <= WHOLE:
        return Geometry((rows, columns), (rows // 2, columns // 2), small, binning)
    side = shape or _fast_side(min(WHOLE, *small))
    return Geometry((rows, columns), centre_of_mass(mean), (side, side), binning)


def centre_of_mass(mean: npt.NDArray[np.float64]) -> tuple[int, int]:
    """(row, column) of the pixel where the photons above the background lie; the background is the median, cut at three deviations."""
    background = float(np.median(mean))
    spread = 1.4826 * float(np.median(np.abs(mean - background)))
    above = np.clip(mean - background - 3 * spread, 0, None)
    total = float(above.sum())
    if total == 0:
        return mean.shape[0] // 2, mean.shape[1] // 2
    row = float(above.sum(1) @ np.arange(mean.shape[0])) / total
    column = float(above.sum(0) @ np.arange(mean.shape[1])) / total
    return round(row), round(column)


def _fast_side(limit: int) -> int:
    """Largest even number up to the limit without a prime factor above 7."""
    return next(side for side in range(limit // 2 * 2, 0, -2) if _largest_factor(side) <= 7)


def _largest_factor(number: int) -> int:
    for factor in (2, 3, 5, 7):
        while number % factor == 0:
            number //= factor
    return number


def mean_frame(frames: Any, chosen: npt.NDArray[np.intp], mask: npt.NDArray[np.bool_] | None, tick: Tick) -> npt.NDArray[np.float64]:
    """(rows, columns) mean over the chosen frames of what was measured: not masked, not negative, a number, not at the dtype's maximum."""
    total = np.zeros(frames.shape[1:])
    times = np.zeros(frames.shape[1:], np.int64)
    for done, index in enumerate(chosen):
        raw = np.asarray(frames[int(index)])
        measured = np.isfinite(raw) & (raw >= 0)
        if raw.dtype.kind in "ui":
            measured &= raw < np.iinfo(raw.dtype).max
        total += np.where(measured, raw, 0)
        times += measured
        tick("survey", done + 1, len(chosen))
    if mask is not None:
        total[mask] = 0
    return np.asarray(total / np.maximum(times, 1))


def find_invalid(frames: Any, chosen: npt.NDArray[np.intp], empty: Prior, corrections: Corrections, tick: Tick) -> npt.NDArray[np.bool_]:
    """Pixels of the prepared frame that cannot be believed.

    Never measured: at the dtype's maximum, negative or no number in nine frames of ten. Hot: more than 20 times the median of their
    neighbours and 10 counts above it, in nine frames of ten; a Bragg peak is sampled over several pixels and stays far below that. Dead:
    no photon in any frame where each neighbour counted a hundred.

    empty : a prior that holds the geometry, at binning 1, and no invalid pixel.
    """
    shape = empty.geometry.shape
    unmeasured, hot = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    total = np.zeros(shape)
    for done, index in enumerate(chosen):
        photons = prepare(np.asarray(frames[int(index)]), empty, corrections.mask, corrections.flat, corrections.dark)
        counts = photons.counts[0]
        usual = median_filter(counts, footprint=NEIGHBOURS, mode="nearest")
        unmeasured += ~photons.valid.reshape(shape)
        hot += counts > 20 * usual + 10
        total += counts
        tick("pixels", done + 1, len(chosen))
    often = 0.9 * len(chosen)
    dead = (total == 0) & (minimum_filter(total, footprint=NEIGHBOURS, mode="nearest") >= 100)
    return np.asarray((unmeasured > often) | (hot > often) | dead)
