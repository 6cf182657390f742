"""Photons -> Start: the nearest complex prototypes of the frozen library, and a flat start beside them as a control."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import binary_dilation

from streamprior.arrays import far_field
from streamprior.prior import Library, Prior
from streamprior.records import FLAT, UNUSED, Batch, Flag, Photons, Start
from streamprior.stages.classify import classify

MARGIN = 2
"""Pixels that a prototype's support is widened by: 1 to 3 serve, as objects of other frames differ a little (docs/physics.md section 5)."""

F32 = np.float32


def match(counts: Photons | npt.NDArray[Any], prior: Prior | Library, k: int = 1) -> Start:
    """Choose the starts of every frame: its k nearest prototypes, or without a library constant in the prior's support.

    The distance compares moduli on the measured pixels alone, so it does not depend on the dose, on a beam stop, or on what no intensity
    knows (global phase, translation, conjugate inversion). Pixels of the background class count as dark: what noise is left there says
    nothing about the object. A start has the least-squares scale of the frame; a flat one its energy.

    Parameters
    ----------
    counts : Photons, or (B, H, W) or (B, D, H, W) real, photons
        With a plain array the pixels that the prior marks invalid are the ones not measured.
    prior : Prior, or Library (which is all that volumes need)
    k : int
        Starts a frame.

    Returns
    -------
    Start
        psi (B, k, H, W) complex64, the nearest first; support (B, k, H, W) bool, read-only; unit (B, k) int32, FLAT for a flat start;
        distance (B, k) float32, NaN for a flat start. A frame without photons starts from zero. No abstention: a frame beyond the gate gets
        its nearest prototypes all the same (`Matcher` abstains).

    Raises
    ------
    ValueError
        k is more than there are prototypes, or the counts have another shape than the prior's.
    """
    library = prior.library if isinstance(prior, Prior) else prior
    if library is None and k != 1:
        raise ValueError(f"k is {k}, but this prior holds no library of prototypes: only the flat start, k=1, can be had from it")
    if library is not None and not 1 <= k <= len(library.psi):
        raise ValueError(f"k is {k}, but the library holds {len(library.psi)} prototypes")
    photons = counts if isinstance(counts, Photons) else _photons(np.asarray(counts), prior)
    if library is None:
        assert isinstance(prior, Prior)
        return Control(prior.support).starts(photons)
    _check_shape(photons, library.control.shape)
    return Nearest(library).starts(photons, k, dark_pixels(photons, prior))


def dark_pixels(photons: Photons, prior: Prior | Library) -> npt.NDArray[np.bool_] | None:
    """(B, H, W) where the frames show the background class; None where no class is the background, or there are no classes."""
    if isinstance(prior, Library) or prior.background is None:
        return None
    return np.asarray(classify(photons, prior).ids == prior.background)


def _photons(counts: npt.NDArray[Any], prior: Prior | Library) -> Photons:
    valid = ~prior.invalid if isinstance(prior, Prior) else np.ones(counts.shape[1:], np.bool_)
    return Photons(counts, valid, np.zeros(counts.shape[:1], np.uint32))


def _check_shape(photons: Photons, shape: tuple[int, ...]) -> None:
    if photons.counts.shape[1:] != shape or photons.counts.ndim != len(shape) + 1:
        expected = ", ".join(str(n) for n in shape)
        raise ValueError(f"counts have shape {photons.counts.shape}, this prior was made for (B, {expected})")


class Matcher:
    """The stage: k nearest prototypes within the gate, and the control as the last arm.

    A frame beyond the gate is abstained from: its prototypes' arms are UNUSED and it is flagged. A prior without a library gives the
    control alone.
    """

    name = "match"

    def __init__(self, prior: Prior | Library, k: int = 3) -> None:
        library = prior.library if isinstance(prior, Prior) else prior
        self._control = Control(library.control if library is not None else prior.support)
        self._nearest = None if library is None else Nearest(library)
        self._k = 0 if library is None else min(k, len(library.psi))
        self._background = prior.background if isinstance(prior, Prior) else None

    def __call__(self, batch: Batch) -> Batch:
        if batch.photons is None:
            raise ValueError("the batch holds no photons: prepare comes before match")
        dark = None
        if batch.classes is not None and self._background is not None:
            dark = batch.classes.ids == self._background
        start, strange = self.starts(batch.photons, dark)
        flags = batch.photons.flags | np.where(strange, np.uint32(Flag.ABSTAINED), np.uint32(0))
        return replace(batch, start=start, photons=replace(batch.photons, flags=flags))

    def starts(self, photons: Photons, dark: npt.NDArray[np.bool_] | None = None) -> tuple[Start, npt.NDArray[np.bool_]]:
        """The arms of every frame, the control last, and (B,) which frames are beyond the gate; `dark` as in `Nearest.starts`."""
        control = self._control.starts(photons)
        if self._nearest is None or not self._k:
            return control, np.zeros(len(photons.counts), np.bool_)
        near = self._nearest.starts(photons, self._k, dark)
        nearest = near.distance[:, 0]
        strange = nearest > self._nearest.gate(photons)
        # A frame without photons is near to none and not strange either: refine flags it.
        near.unit[strange | np.isnan(nearest)] = UNUSED
        return (
            Start(
                psi=np.concatenate([near.psi, control.psi], axis=1),
                support=np.concatenate([near.support, control.support], axis=1),
                unit=np.concatenate([near.unit, control.unit], axis=1),
                distance=np.concatenate([near.distance, control.distance], axis=1),
            ),
            strange,
        )


class Control:
    """Owns the flat start of unit energy in a support."""

    def __init__(self, support: npt.NDArray[np.bool_]) -> None:
        self._support = support
        self._flat = (support / np.sqrt(max(int(np.count_nonzero(support)), 1))).astype(np.complex64)

    def starts(self, photons: Photons) -> Start:
        """Constant, with the energy of the measured pixels: the unitary transform keeps it, so sum |psi|^2 equals their photons."""
        _check_shape(photons, self._flat.shape)
        number, axes = len(photons.counts), tuple(range(1, photons.counts.ndim))
        # Summed in double precision, and without what is not a number of photons: refine flags such a frame, the start stays finite.
        amplitude = np.sqrt(np.sum(photons.counts, axis=axes, where=_usable(photons), dtype=np.float64)).astype(F32)
        return Start(
            psi=(amplitude.reshape(-1, *(1 for _ in axes)) * self._flat)[:, None],
            support=np.broadcast_to(self._support, (number, 1, *self._flat.shape)),
            unit=np.full((number, 1), FLAT, np.int32),
            distance=np.full((number, 1), np.nan, F32),
        )


class Nearest:
    """Owns the moduli of the library's prototypes, and what has been worked out for the pixels that a run measures.

    The patterns of prototypes under a valid map are made once and kept, as a run's map rarely changes; frames with bad pixels of their own
    leave those cells out.
    """

    def __init__(self, library: Library) -> None:
        self._library = library
        self._photons = np.abs(far_field(library.psi)) ** 2
        self.supports = np.stack([binary_dilation(one, iterations=MARGIN) for one in library.support])
        self._valid = np.empty(0, np.bool_)
        self._moduli = self._powers = np.empty((0, 0), F32)  # (U, C), and their squares
        self._share = np.empty(0)  # of each cell's pixels that the run measures
        self._gate = math.nan

    def gate(self, photons: Photons) -> float:
        """Largest distance that is not strange, on the pixels that the run measures."""
        self._look(_known(photons))
        return self._gate

    def starts(self, photons: Photons, k: int, dark: npt.NDArray[np.bool_] | None = None) -> Start:
        """The k nearest prototypes of every frame; `dark` (B, ...) marks pixels whose counts are noise and taken as none."""
        unit, distance, scale = self.order(photons, k, dark)
        psi = np.empty((*unit.shape, *self._library.control.shape), np.complex64)
        for i in range(len(psi)):
            np.multiply(self._library.psi[unit[i]], scale[i].reshape(-1, *(1 for _ in self._library.control.shape)), out=psi[i])
        return Start(psi, self.supports[unit], unit, distance)

    def order(
        self, photons: Photons, k: int, dark: npt.NDArray[np.bool_] | None = None
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """(B, k) each: the k nearest units of every frame, their distances, and the scales that make their moduli the frame's."""
        self._look(_known(photons))
        usable = np.broadcast_to(_usable(photons), photons.counts.shape)
        unit, (distance, scale) = np.empty((len(usable), k), np.int32), np.empty((2, len(usable), k), F32)
        for i, counts in enumerate(photons.counts):
            seen = counts if dark is None else np.where(dark[i], F32(0), counts)
            unit[i], distance[i], scale[i] = self._order(seen, usable[i], k)
        return unit, distance, scale

    def _order(
        self, counts: npt.NDArray[np.float32], usable: npt.NDArray[np.bool_], k: int
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float64], npt.NDArray[np.float32]]:
        """The k nearest units of a frame, their distances and the least-squares scales of their moduli."""
        cell = self._library.cell
        # A cell is compared on the pixels that the run measures; where the frame lacks one of them, it is left out.
        used = (self._share > 0) & ~cells(self._valid & ~usable, cell, np.any)
        seen = cells(np.where(usable & self._valid, counts, 0.0), cell, np.sum) * used
        photons = float(seen.sum())
        if not photons > 0:
            return np.arange(k), np.full(k, np.nan), np.zeros(k, F32)
        # Of norm 1: single precision then holds its products with the moduli whatever the dose.
        across = self._moduli @ np.sqrt(seen / photons).astype(F32)
        power = np.maximum(self._powers @ used.astype(F32), np.finfo(F32).tiny)
        unlike = 1 - across**2 / power
        nearest = np.argsort(unlike, kind="stable")[:k]
        # sqrt of a Poisson number has the variance 1/4 (Bartlett 1936), and none where no photon came.
        noise = np.count_nonzero(seen) / (4 * photons)
        return nearest, np.maximum(unlike[nearest] - noise, 0), across[nearest] * F32(math.sqrt(photons)) / power[nearest]

    def _look(self, valid: npt.NDArray[np.bool_]) -> None:
        """Work out patterns and gate for the pixels that are measured, unless they are those of the last time."""
        if np.array_equal(valid, self._valid):
            return
        library = self._library
        self._valid = valid.copy()
        self._share = cells(valid, library.cell, np.mean)
        self._powers = np.stack([cells(one * valid, library.cell, np.sum) for one in self._photons])
        self._moduli = np.sqrt(self._powers)
        self._gate = gate_of(library, self._moduli, self._share)


def gate_of(library: Library, moduli: npt.NDArray[np.float32], share: npt.NDArray[np.floating[Any]]) -> float:
    """The library's percentile of how far its own training frames are from their nearest prototype but their own.

    moduli : (U, C) of the prototypes on the measured pixels. share : (C,) of each cell's pixels that are measured: where it is a part, so
    much of the training frames' photons is taken, as their pixels are not kept. A library of one prototype has no other: its gate is open
    (infinite).
    """
    if len(moduli) < 2:
        return math.inf
    patterns = library.patterns * np.sqrt(share).astype(F32)
    photons = np.square(patterns).sum(1)
    power = np.square(moduli).sum(1)
    unlike = 1 - (patterns @ moduli.T) ** 2 / np.maximum(power * photons[:, None], np.finfo(F32).tiny)
    unlike -= (np.count_nonzero(patterns, axis=1) / (4 * np.maximum(photons, 1)))[:, None]
    unlike[np.arange(len(unlike)), library.unit] = np.inf
    return float(np.percentile(np.maximum(unlike.min(1), 0), library.gate))


def cells(frame: npt.NDArray[Any], cell: int, fold: Any) -> npt.NDArray[Any]:
    """Frame -> (C,), cells of `cell` pixels a side folded by np.sum, np.mean or np.any."""
    split = [part for n in frame.shape for part in (n // cell, cell)]
    return np.asarray(fold(frame.reshape(split), axis=tuple(range(1, 2 * frame.ndim, 2)))).ravel()


def _known(photons: Photons) -> npt.NDArray[np.bool_]:
    if photons.known is not None:
        return photons.known
    return np.asarray(photons.valid.all(0)) if photons.valid.ndim == photons.counts.ndim else photons.valid


def _usable(photons: Photons) -> npt.NDArray[np.bool_]:
    return np.asarray(photons.valid & np.isfinite(photons.counts) & (photons.counts >= 0))
