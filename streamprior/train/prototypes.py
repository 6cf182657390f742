"""Solved frames of Set 1 -> Library: a SOM over the frames' patterns, and a complex prototype for each kind of object on its units."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA

from streamprior.align import align
from streamprior.prior import Library
from streamprior.records import Photons
from streamprior.train.classes import train_map
from streamprior.train.region import Tick
from streamprior.train.settings import TrainSettings
from streamprior.train.solve import Solved, SolveSettings, canonical, plain_library, solve_frames

COMPONENTS = 16
"""Principal components of the patterns that the frame SOM is trained on."""

EPOCHS = 20
"""Passes of the frame SOM over the frames: there are hundreds of them, where the pixel SOM has tens of thousands of pixels."""

Floats = npt.NDArray[np.float32]


def grow_library(photons: Photons, settings: TrainSettings, tick: Tick, keep: Path | None = None) -> Library:
    """Solve the frames and gather their objects into prototypes.

    Parameters
    ----------
    photons : Photons
        Set 1: counts (N, H, W) or (N, D, H, W), photons; valid like counts.
    settings : TrainSettings
    tick : callable
        tick(stage, done, total), with the stages "solve", "polish" and "prototypes".
    keep : Path, optional
        Folder in which solved frames are kept, so that training goes on where it was stopped.

    Returns
    -------
    Library
        The same frames and settings give the same library.
    """
    return gather(photons, solve_library(photons, settings, tick, keep), settings, tick)


def solve_library(photons: Photons, settings: TrainSettings, tick: Tick, keep: Path | None = None) -> Solved:
    """The first half of `grow_library`: the frames' objects."""
    how = SolveSettings(settings.schedule, settings.starts, settings.polish, settings.neighbours, settings.seed)
    return solve_frames(photons, how, tick, keep)


def gather(photons: Photons, solved: Solved, settings: TrainSettings, tick: Tick, dark: npt.NDArray[np.bool_] | None = None) -> Library:
    """Prototypes of solved frames.

    Frames of one unit of the SOM become one prototype where their objects agree: the best solved is the medoid that the others are
    aligned to, those whose overlap with it reaches `settings.coherence` are averaged, and what is left over makes further prototypes by
    the same rule. Frames of different objects are never averaged: a mean of phases that disagree is no object (docs/physics.md section
    5). `dark` (N, ...) marks pixels of the background class.
    """
    plain = plain_library(photons, solved, dark)
    winners, side = _winners(plain.patterns, settings.seed)
    prototypes: list[tuple[npt.NDArray[np.complex64], npt.NDArray[np.bool_], int, list[int], float]] = []
    for done, unit in enumerate(np.unique(winners)):
        left = sorted(np.flatnonzero(winners == unit).tolist(), key=lambda i: solved.chi2[i] / solved.floor[i])
        while left:
            members, psi, coherence = _coherent(solved.psi, left, settings.coherence)
            support = solved.support[members[0]] if len(members) == 1 else np.abs(psi) > 0.1 * np.abs(psi).max()
            prototypes.append((psi, support, int(unit), members, coherence))
            left = [i for i in left if i not in members]
        tick("prototypes", done + 1, len(np.unique(winners)))
    unit_of = np.empty(len(solved.psi), np.int32)
    for number, (_, _, _, members, _) in enumerate(prototypes):
        unit_of[members] = number
    return Library(
        psi=np.stack([one[0] for one in prototypes]),
        support=np.stack([one[1] for one in prototypes]),
        control=plain.control,
        place=np.array([divmod(one[2], side) for one in prototypes], np.int32),
        members=np.array([len(one[3]) for one in prototypes], np.int32),
        coherence=np.array([one[4] for one in prototypes], np.float32),
        patterns=plain.patterns,
        unit=unit_of,
        cell=plain.cell,
        gate=settings.gate,
    )


def _winners(patterns: Floats, seed: int) -> tuple[npt.NDArray[np.intp], int]:
    """Unit of each frame on a SOM (Kohonen 1982) of about as many units as there are frames, and its side.

    Patterns are normalised first, so that the dose does not order them.
    """
    side = max(1, math.ceil(math.sqrt(len(patterns))))
    if len(patterns) < 3:
        return np.arange(len(patterns), dtype=np.intp) % (side * side), side
    scaled = patterns / np.maximum(np.linalg.norm(patterns, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    if not np.ptp(scaled, axis=0).any():  # frames that are all the same span no map
        return np.zeros(len(patterns), np.intp), 1
    components = min(COMPONENTS, len(patterns) - 1, patterns.shape[1])
    projected = PCA(components, svd_solver="full").fit_transform(scaled.astype(np.float64))
    units, _ = train_map(projected, side, EPOCHS, seed)
    return np.square(projected[:, None] - units[None]).sum(2).argmin(1), side


def _coherent(psi: npt.NDArray[np.complex64], left: list[int], least: float) -> tuple[list[int], npt.NDArray[np.complex64], float]:
    """The first of `left` and those that agree with it: (members, their mean brought to the canonical frame, coherence)."""
    medoid = psi[left[0]]
    members, total, moduli = [left[0]], medoid.astype(np.complex128), np.abs(medoid).astype(np.float64)
    for i in left[1:]:
        found = align(psi[i], medoid)
        if math.sqrt(max(0.0, 1 - found.error**2)) >= least:
            members.append(i)
            # The factor makes the member like the medoid; the scale is taken back so that each counts alike.
            one = found.psi / np.linalg.norm(found.psi)
            total, moduli = total + one, moduli + np.abs(one)
    mean = canonical(total.astype(np.complex64)) if len(members) > 1 else medoid
    return members, mean, float(np.linalg.norm(total) / np.linalg.norm(moduli))


def summary(library: Library) -> dict[str, Any]:
    """Numbers for people: frames, prototypes, how many are means, units that hold any."""
    return {
        "frames": len(library.unit),
        "prototypes": len(library.psi),
        "means": int((library.members > 1).sum()),
        "units": len(np.unique(library.place, axis=0)),
    }
