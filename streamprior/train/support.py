"""Bright prepared frames -> support: each is solved from its autocorrelation, and the solutions vote."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.fft import fftshift, ifft2, ifftshift
from scipy.ndimage import binary_dilation, gaussian_filter

from streamprior.records import Photons
from streamprior.stages.refine import refine
from streamprior.train.region import Tick

AUTOCORRELATION = 0.04
"""Part of the maximum at which the autocorrelation is cut for the first support (Marchesini 2003)."""

ROUNDS = 2
"""Shrink-wrap runs after one another: one run may not shrink a support below 0.3 of its first area, and an autocorrelation covers four
times the object's."""

SMALLEST, LARGEST = 0.002, 0.25
"""Area of the support as part of the frame. Below, nothing can be refined; above, the sampling no longer determines a phase."""

MARGIN = 2
"""Pixels that the voted support is widened by, since objects of other frames differ a little."""


def find_support(photons: Photons, schedule: str, seed: int, tick: Tick) -> npt.NDArray[np.bool_]:
    """One support for all frames.

    Parameters
    ----------
    photons : Photons
        The brightest frames, the brightest first; (B, H, W).
    schedule : str
        Steps of each solve (`streamprior.stages.schedule`).
    seed : int
        Of the random phases that the solves begin with.
    tick : callable
        tick(stage, done, total)

    Returns
    -------
    (H, W) bool, centred; its area lies between SMALLEST and LARGEST of the frame.
    """
    rng = np.random.default_rng(seed)
    valid = np.broadcast_to(photons.valid, photons.counts.shape)
    supports: list[npt.NDArray[np.bool_]] = []
    for i in range(len(photons.counts)):
        solved = _centred(_solve(photons.counts[i : i + 1], valid[i : i + 1], schedule, rng))
        supports.append(_like(solved, supports[0]) if supports else solved)
        tick("support", i + 1, len(photons.counts))
    votes = gaussian_filter(np.mean(supports, axis=0), 1.0)
    return _within_area(binary_dilation(votes >= 0.5, iterations=MARGIN), votes)


def autocorrelation_support(counts: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """(H, W) bool: where the autocorrelation of the object, the transform of its (H, W) counts, exceeds AUTOCORRELATION of its maximum."""
    autocorrelation = np.abs(fftshift(ifft2(ifftshift(counts))))
    inside = autocorrelation > AUTOCORRELATION * autocorrelation.max()
    return _within_area(inside, autocorrelation)


def _solve(counts: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], schedule: str, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Support of one frame (1, H, W) after ROUNDS runs, the first from random phases in the autocorrelation's support."""
    support = autocorrelation_support(counts[0])[None]
    start = support * np.exp(2j * np.pi * rng.random(counts.shape))
    start *= np.sqrt(counts.sum() / max(1, np.count_nonzero(support)))
    psi = start.astype(np.complex64)
    for _ in range(ROUNDS):
        solved = refine(counts, psi, support, schedule=schedule, valid=valid, backend="cpu")
        psi, support = solved.psi, solved.support
    return np.asarray(support[0])


def _centred(support: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The support with its centre of mass moved to (H//2, W//2); the field is periodic, so the mean is that of angles."""
    shifts = []
    for axis, size in enumerate(support.shape):
        profile = support.sum(1 - axis)
        turn = np.angle(np.sum(profile * np.exp(2j * np.pi * np.arange(size) / size)))
        shifts.append(size // 2 - round(float(turn) * size / (2 * np.pi)))
    return np.roll(support, shifts, (0, 1))


def _like(support: npt.NDArray[np.bool_], first: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The support or its twin, whichever covers more of the first one: a pattern does not tell an object from its inversion."""
    twin = _centred(support[::-1, ::-1])
    return twin if np.count_nonzero(twin & first) > np.count_nonzero(support & first) else support


def _within_area(support: npt.NDArray[np.bool_], weight: npt.NDArray[np.floating]) -> npt.NDArray[np.bool_]:
    """The support, or where its area is out of bounds the pixels of largest weight up to the nearer bound."""
    area = np.count_nonzero(support)
    allowed = min(max(area, int(np.ceil(SMALLEST * support.size))), int(LARGEST * support.size))
    if area == allowed:
        return support
    best = np.argsort(-weight, axis=None, kind="stable")[:allowed]
    chosen = np.zeros(support.size, np.bool_)
    chosen[best] = True
    return chosen.reshape(support.shape)
