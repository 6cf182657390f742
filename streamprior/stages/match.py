"""Photons -> Start: where refinement begins, flat in the prior's support."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.prior import Prior
from streamprior.records import Batch, Photons, Start


def match(counts: Photons | npt.NDArray[Any], prior: Prior, k: int = 1) -> Start:
    """Choose the start of every frame: constant in the prior's support, with the energy of the frame.

    The unitary transform keeps energy, so sum |psi|^2 equals the photons on the measured pixels.

    Parameters
    ----------
    counts : Photons, or (B, H, W) real, photons
        With a plain array the pixels that the prior marks invalid are the ones not measured.
    prior : Prior
    k : int
        Starts a frame. Only 1: a flat start has no second nearest.

    Returns
    -------
    Start
        psi (B, 1, H, W) complex64; support (B, 1, H, W) bool, read-only; unit (B, 1) int32, -1 for a flat start; distance (B, 1) float32,
        NaN because a flat start has no prototype to be distant from. A frame without photons starts from zero.

    Raises
    ------
    ValueError
        k is not 1, or the counts have another shape than the prior's.
    """
    if k != 1:
        raise ValueError(f"k is {k}, but this prior holds no library of prototypes: only the flat start, k=1, can be had from it")
    if isinstance(counts, Photons):
        return Matcher(prior).starts(counts)
    array = np.asarray(counts)
    return Matcher(prior).starts(Photons(array, ~prior.invalid, np.zeros(array.shape[:1], np.uint32)))


class Matcher:
    """The stage: owns the flat start of unit energy."""

    name = "match"

    def __init__(self, prior: Prior) -> None:
        self._support = prior.support
        area = max(int(np.count_nonzero(prior.support)), 1)
        self._flat = (prior.support / np.sqrt(area)).astype(np.complex64)

    def __call__(self, batch: Batch) -> Batch:
        if batch.photons is None:
            raise ValueError("the batch holds no photons: prepare comes before match")
        return replace(batch, start=self.starts(batch.photons))

    def starts(self, photons: Photons) -> Start:
        counts = photons.counts
        if counts.ndim != 3 or counts.shape[1:] != self._flat.shape:
            raise ValueError(f"counts have shape {counts.shape}, this prior was made for (B, {self._flat.shape[0]}, {self._flat.shape[1]})")
        number = len(counts)
        # Summed in double precision, and without what is not a number of photons: refine flags such a frame, the start stays finite.
        measured = photons.valid & np.isfinite(counts) & (counts > 0)
        amplitude = np.sqrt(np.sum(counts, axis=(1, 2), where=measured, dtype=np.float64)).astype(np.float32)
        return Start(
            psi=amplitude[:, None, None, None] * self._flat,
            support=np.broadcast_to(self._support, (number, 1, *self._flat.shape)),
            unit=np.full((number, 1), -1, np.int32),
            distance=np.full((number, 1), np.nan, np.float32),
        )
