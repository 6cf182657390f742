"""What this machine can do at most: single-precision multiply-adds a second, and frames streamed from counts to ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.jit import inlined, kernel

F32 = np.float32
Array = npt.NDArray[Any]

_CHAINS, _LINKS = 8, 16
_LENGTH = 2048  # numbers of 4 bytes: 8 kB, which stay in the nearest cache
_SWEEPS = 2048
_OFF = tuple(F32(0.125 * i) for i in range(1, _CHAINS))  # the chains begin apart, or they would be one
FLOPS = 2 * _CHAINS * _LINKS * _LENGTH * _SWEEPS
"""Of one call of what `multiply_adds` returns; a multiply-add is two."""


def multiply_adds() -> Callable[[], object]:
    """Multiply-adds in registers and nothing else that counts: the processor's peak rate in single precision, as numba reaches it."""
    numbers = np.linspace(0.25, 1.25, _LENGTH, dtype=F32)
    return lambda: _multiply_adds(numbers, F32(-0.5), _SWEEPS)


@kernel
def _multiply_adds(numbers, term, sweeps):  # type: ignore[no-untyped-def]
    """x -> x * x + term, _LINKS times in _CHAINS chains beside each other: a processor that starts two vectors of them each cycle and
    ends them four cycles later is kept busy by eight. The map is bounded, and not linear: the compiler would fold a linear one."""
    for _ in range(sweeps):
        for i in range(numbers.size):
            x = numbers[i]
            chains = (x, x - _OFF[0], x - _OFF[1], x - _OFF[2], x - _OFF[3], x - _OFF[4], x - _OFF[5], x - _OFF[6])
            chains = _four_links(_four_links(chains, term), term)
            a, b, c, d, e, f, g, h = _four_links(_four_links(chains, term), term)
            numbers[i] = max(max(max(a, b), max(c, d)), max(max(e, f), max(g, h)))


@inlined
def _four_links(chains, term):  # type: ignore[no-untyped-def]
    return _link(_link(_link(_link(chains, term), term), term), term)


@inlined
def _link(chains, t):  # type: ignore[no-untyped-def]
    a, b, c, d, e, f, g, h = chains
    return a * a + t, b * b + t, c * c + t, d * d + t, e * e + t, f * f + t, g * g + t, h * h + t


def streamed(counts: Array, valid: Array) -> Callable[[], object]:
    """The bytes that any classifier moves, and next to no arithmetic: every frame is read twice, as its mean must be known before its
    first pixel can be scaled, its map of measured pixels with it, and an id a pixel is written.

    counts : (B, H, W). valid : (H, W) bool, for all frames.
    """
    ids = np.empty(counts.shape, np.uint8)
    return lambda: _streamed(counts.reshape(len(counts), -1), valid.reshape(-1), ids.reshape(len(counts), -1))


@kernel
def _streamed(counts, valid, ids):  # type: ignore[no-untyped-def]
    for b in range(counts.shape[0]):
        total = 0.0
        for first in range(0, valid.size, 256):  # in single precision by blocks, which vectorises
            pixels = min(256, valid.size - first)
            total += _photons(counts[b, first : first + pixels], valid[first : first + pixels])
        _compare(counts[b], valid, F32(total / valid.size), ids[b])


@kernel
def _photons(counts, valid):  # type: ignore[no-untyped-def]
    photons = F32(0)
    for i in range(counts.size):
        photons += F32(counts[i]) if valid[i] else F32(0)
    return np.float64(photons)


@kernel
def _compare(counts, valid, mean, ids):  # type: ignore[no-untyped-def]
    for i in range(counts.size):
        ids[i] = np.uint8(F32(counts[i]) > mean) if valid[i] else np.uint8(255)
