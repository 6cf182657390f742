"""Object -> a tighter support: where its blurred modulus exceeds a part of its maximum, within bounds on the area."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from streamprior.jit import kernel
from streamprior.stages.schedule import ShrinkWrap

F32 = np.float32

AREA_LIMITS = (0.3, 3.0)
"""Shrink-wrap keeps the support's area between these multiples of the first one: a bad frame neither empties nor floods it."""

TRUNCATE = 4.0
"""The Gaussian ends after so many sigma, as scipy's does."""


def shrink_wrap(psi: npt.NDArray[np.complex64], step: ShrinkWrap, area: int, inside: npt.NDArray[np.bool_]) -> None:
    """Write the new support into `inside`, in the layout of psi (corner or centred: both are periodic); `area` is the first support's."""
    smooth = blurred_modulus(psi, step.sigma)
    peak = smooth.max()
    if not 0 < peak < np.inf:  # nothing to go by: the support stays
        return
    np.greater(smooth, F32(step.threshold) * peak, out=inside)
    low, high = (min(max(1, round(limit * area)), psi.size) for limit in AREA_LIMITS)
    found = np.count_nonzero(inside)
    if not low <= found <= high:
        kept = low if found < low else high
        np.greater_equal(smooth, np.partition(smooth, psi.size - kept, axis=None)[psi.size - kept], out=inside)


def blurred_modulus(psi: npt.NDArray[np.complex64], sigma: float) -> npt.NDArray[np.float32]:
    """|psi| under a periodic Gaussian of `sigma` pixels, axis by axis; what scipy's gaussian_filter(mode="wrap") gives, to rounding."""
    one, other = np.empty(psi.shape, F32), np.empty(psi.shape, F32)
    _modulus(psi.reshape(-1).view(F32), one.reshape(-1))
    reach = np.arange(int(TRUNCATE * sigma + 0.5) + 1)
    weights = np.exp(-0.5 * (reach / max(sigma, 1e-9)) ** 2)
    half = (weights / (2 * weights.sum() - weights[0])).astype(F32)
    for axis in range(psi.ndim - 1):
        layout = (math.prod(psi.shape[:axis]), psi.shape[axis], math.prod(psi.shape[axis + 1 :]))
        _blur_columns(one.reshape(layout), half, other.reshape(layout))
        one, other = other, one
    _blur_rows(one.reshape(-1, psi.shape[-1]), half, other.reshape(-1, psi.shape[-1]))
    return other


@kernel
def _modulus(psi, modulus):  # type: ignore[no-untyped-def]
    for i in range(modulus.size):
        modulus[i] = np.sqrt(psi[2 * i] * psi[2 * i] + psi[2 * i + 1] * psi[2 * i + 1])


@kernel
def _blur_columns(source, weights, goal):  # type: ignore[no-untyped-def]
    length = source.shape[1]
    for z in range(source.shape[0]):
        for y in range(length):
            line, centre = goal[z, y], source[z, y]
            for x in range(line.size):
                line[x] = weights[0] * centre[x]
            for k in range(1, weights.size):
                _add_pair(weights[k], source[z, (y - k) % length], source[z, (y + k) % length], line)


@kernel
def _blur_rows(source, weights, goal):  # type: ignore[no-untyped-def]
    rows, length = source.shape
    reach = weights.size - 1
    around = np.empty(length + 2 * reach, np.float32)  # a row and its neighbours of the next periods
    for y in range(rows):
        for x in range(length):  # an assignment of slices brings its error's text along: two seconds of compiling
            around[reach + x] = source[y, x]
        for x in range(reach):
            around[x], around[reach + length + x] = source[y, (x - reach) % length], source[y, x % length]
        line = goal[y]
        for x in range(length):
            line[x] = weights[0] * around[x + reach]
        for k in range(1, reach + 1):
            _add_pair(weights[k], around[reach - k : reach - k + length], around[reach + k : reach + k + length], line)


@kernel
def _add_pair(weight, before, after, line):  # type: ignore[no-untyped-def]
    for x in range(line.size):
        line[x] += weight * (before[x] + after[x])
