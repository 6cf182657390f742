"""Rows of numbers that a card told -> Reconstruction: the arithmetic that is done once a frame, on the CPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamprior.records import Reconstruction
from streamprior.stages.schedule import Schedule

PHOTONS, PIXELS, FLAGS, KEPT, _AREA, _START_FLAGS, RESIDUAL, MODULI, FREE_SUM, FREE_PIXELS, ERRORS = range(11)
"""Places in a frame's row of numbers, as in refine.cu."""


@dataclass(frozen=True, slots=True)
class Group:
    """Frames that go through the same: with several arms through the trial, then all through the schedule. index : ascending."""

    index: npt.NDArray[np.intp]
    trial: bool
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class Told:
    """What leaves the card, page-locked, in the order in which it is computed. trial : misfit of every arm."""

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.uint8]
    numbers: npt.NDArray[np.float64]
    trial: npt.NDArray[np.float64]


def reconstruction(
    told: Told, groups: list[Group], used: npt.NDArray[np.bool_], trial: int, flags: npt.NDArray[np.uint32] | None
) -> Reconstruction:
    """What the card told, in the order of the call. Frames that are flagged have no numbers.

    Parameters
    ----------
    told, groups : of all frames of the call, group by group.
    used : (B, k) bool, the arms that a start has.
    trial : iterations that every arm of a group with a trial got.
    flags : (B,) uint32, what was known of the frames before.
    """
    number, pixels = len(used), math.prod(told.psi.shape[1:])
    back = np.argsort(np.concatenate([np.zeros(0, np.intp), *(group.index for group in groups)]))
    # Nearly always all frames go through the same, and nothing has to be moved.
    as_it_is = np.array_equal(back, np.arange(number))
    psi, support = (told.psi, told.support) if as_it_is else (told.psi[back], told.support[back])
    row = told.numbers if as_it_is else told.numbers[back]
    done = np.zeros(number, np.intp)
    for group in groups:
        done[group.index] = group.schedule.iterations + (trial if group.trial else 0)
    fit = row[:, FLAGS] == 0
    kept, tried = _arms_of(told.trial, row, groups, used, pixels)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        history = row[:, ERRORS + 1 :] / (row[:, PHOTONS, None] * pixels)
        history[(np.arange(history.shape[1]) >= done[:, None]) | ~fit[:, None]] = np.nan
        measured = (
            row[:, PIXELS] / (4 * row[:, PHOTONS]),
            row[:, RESIDUAL] / row[:, MODULI],
            2 * row[:, FREE_SUM] / row[:, FREE_PIXELS],
        )
        floor, r_factor, free_llk = (np.where(fit, numbers, np.nan).astype(np.float32) for numbers in measured)
    given = np.zeros(number, np.uint32) if flags is None else flags.astype(np.uint32)
    return Reconstruction(
        psi=psi,
        support=support.view(np.bool_),
        chi2=history[np.arange(number), done - 1].astype(np.float32),
        history=history.astype(np.float32),
        floor=floor,
        r_factor=r_factor,
        free_llk=free_llk,
        flags=given | row[:, FLAGS].astype(np.uint32),
        kept=kept,
        trial=tried,
    )


def _arms_of(
    misfits: npt.NDArray[np.float64], row: npt.NDArray[np.float64], groups: list[Group], used: npt.NDArray[np.bool_], pixels: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Which arm of its start each frame kept, and chi2 of every arm after its trial. misfits : of all arms, in the order of the groups."""
    kept = np.zeros(len(used), np.int32)
    trial = np.full((len(used), used.shape[1] if used.shape[1] > 1 else 0), np.nan, np.float32)
    first = 0
    for group in groups:
        for frame in group.index:
            arms = np.flatnonzero(used[frame])
            kept[frame] = arms[int(row[frame, KEPT])]
            if group.trial:
                with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                    trial[frame, arms] = misfits[first : first + len(arms)] / (row[frame, PHOTONS] * pixels)
            first += len(arms)
    return kept, trial
