"""Comparison -> Judged: every arm's object beside the reference, one row of numbers an arm, and what went wrong in words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.evaluate.compare import Agreement, compare
from streamprior.evaluate.records import DAEMON, FULL_SOLVE, Arm, Comparison, Tick

NEAR = 1.1
"""A frame counts as solved when its chi2 is within this factor of the full solve's."""

EARLY = 50
"""Iterations that the field's comparisons are made at; in the middle of HIO or RAAR an object has no chi2 to speak of."""

WORSE = 1.02
"""An arm is called worse than a baseline when its median is more than 2 % above."""

LOST = 0.5
"""Object error from which an object is called another one than the reference."""

BASELINES = ("flat", "flat + plan", "random", "shuffled prototype")
"""Arms that cost nothing to have; what the daemon runs must not be worse than any of them."""

QUALITY = ("error", "ssim", "psnr", "phase_ssim", "phase_psnr")
"""Numbers of an `Agreement`, in the order in which they are stored."""

COLUMNS: Mapping[str, str] = {
    "iterations": "iterations a frame, trial arms included",
    "ffts": "Fourier transforms a frame",
    "chi2": "median of sum (|F psi| - magnitude)^2 / sum magnitude^2",
    "chi2_over_floor": "median of chi2 over what photon noise alone gives",
    "r_factor": "median R-factor",
    "free_llk": "median Poisson log-likelihood of pixels that the retrieval never saw; 1 for a perfect model",
    "error": "median object error after alignment, in the complex domain",
    "error_p75": "75th percentile of the object error",
    "ssim": "median SSIM of the amplitude",
    "psnr": "median PSNR of the amplitude, dB",
    "phase_ssim": "median SSIM of the phase",
    "phase_psnr": "median PSNR of the phase, dB",
    "area": "median pixels (voxels) of the support; chi2 falls when it grows",
    "near_full_at_50": f"share of frames whose kept object has, after 50 iterations, a chi2 within {NEAR} times the full solve's",
    "near_full": "the same after all iterations",
    "abstained": "share of frames beyond the distance gate",
}
"""Columns of the summary and what they mean."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A comparison with its numbers.

    quality : arm name -> (5, B) float64, the QUALITY numbers of each frame against the reference. rows : one an arm, arm name and COLUMNS.
    """

    comparison: Comparison
    quality: Mapping[str, npt.NDArray[np.float64]]
    rows: tuple[Mapping[str, Any], ...]

    @property
    def shown(self) -> Arm:
        """The arm that the pictures show: what the daemon runs, or else the last one."""
        named = {arm.name: arm for arm in self.comparison.arms}
        return named.get(DAEMON, self.comparison.arms[-1])


def judge(comparison: Comparison, progress: Tick | None = None) -> Judged:
    """Align every arm's objects with the reference and sum up; the arm that is the reference has no error of its own."""
    tick = progress or (lambda what, done, total: None)
    total = len(comparison.arms) * len(comparison.frames)
    quality: dict[str, npt.NDArray[np.float64]] = {}
    for a, arm in enumerate(comparison.arms):
        found = np.empty((len(QUALITY), len(comparison.frames)))
        for i, (psi, reference) in enumerate(zip(arm.psi, comparison.reference, strict=True)):
            found[:, i] = np.nan if arm.name == comparison.reference_is else _numbers(compare(psi, reference))
            tick(f"aligning {comparison.title}", a * len(comparison.frames) + i + 1, total)
        quality[arm.name] = found
    full = next((arm.chi2 for arm in comparison.arms if arm.name == FULL_SOLVE), None)
    return Judged(comparison, quality, tuple(_row(arm, quality[arm.name], full) for arm in comparison.arms))


def _numbers(agreement: Agreement) -> tuple[float, ...]:
    return tuple(getattr(agreement, name) for name in QUALITY)


def _row(arm: Arm, quality: npt.NDArray[np.float64], full: npt.NDArray[Any] | None) -> dict[str, Any]:
    numbers = {name: median(values) for name, values in zip(QUALITY, quality, strict=True)} | {
        "iterations": arm.iterations,
        "ffts": arm.ffts,
        "chi2": median(arm.chi2),
        "chi2_over_floor": median(over(arm.chi2, arm.floor)),
        "r_factor": median(arm.r_factor),
        "free_llk": median(arm.free_llk),
        "error_p75": percentile(quality[0], 75),
        "area": float(np.median(np.count_nonzero(arm.support, axis=tuple(range(1, arm.support.ndim))))),
        "near_full_at_50": float("nan") if full is None or arm.history.shape[1] < EARLY else share_near(arm.history[:, EARLY - 1], full),
        "near_full": float("nan") if full is None else share_near(arm.chi2, full),
        "abstained": float(np.mean(arm.abstained)),
    }
    return {"arm": arm.name} | {name: numbers[name] for name in COLUMNS}


def share_near(chi2: npt.NDArray[Any], full: npt.NDArray[Any]) -> float:
    """Share of the frames, of those that the full solve has a chi2 for, whose chi2 is within NEAR times it; NaN without any."""
    known = np.isfinite(full)
    return float(np.mean(np.nan_to_num(chi2[known], nan=np.inf) <= NEAR * full[known])) if known.any() else float("nan")


def over(values: npt.NDArray[Any], floor: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """values / floor, NaN where the floor is zero or undefined."""
    wide, low = np.asarray(values, np.float64), np.asarray(floor, np.float64)
    return np.asarray(np.divide(wide, low, out=np.full(wide.shape, np.nan), where=low > 0))


def median(values: npt.NDArray[Any]) -> float:
    """Over the numbers that are defined (an infinite PSNR is one); NaN without any."""
    return percentile(values, 50)


def percentile(values: npt.NDArray[Any], share: float) -> float:
    """The same for another share, in percent."""
    known = np.asarray(values, np.float64)
    known = known[~np.isnan(known)]
    # Interpolating between infinities gives NaN: the nearest number then, as it is.
    if known.size and np.isinf(known).any():
        return float(np.sort(known)[round((known.size - 1) * share / 100)])
    return float(np.percentile(known, share)) if known.size else float("nan")


def representatives(judged: Judged) -> dict[str, int]:
    """Frames worth showing, name -> position in the comparison: best, median and worst by object error, and an abstained one."""
    arm = judged.shown
    error = np.where(np.isnan(judged.quality[arm.name][0]), np.inf, judged.quality[arm.name][0])
    taken = np.flatnonzero(~arm.abstained)
    order = taken[np.argsort(error[taken], kind="stable")] if taken.size else np.argsort(error, kind="stable")
    chosen = {"best": int(order[0]), "median": int(order[len(order) // 2]), "worst": int(order[-1])}
    if taken.size and arm.abstained.any():
        chosen["abstained"] = int(np.flatnonzero(arm.abstained)[np.argmax(error[arm.abstained])])
    return {name: place for i, (name, place) in enumerate(chosen.items()) if place not in list(chosen.values())[:i]}


def failures(judged: Judged) -> tuple[str, ...]:
    """What a reader must know before believing the table; empty where nothing of the kind was found."""
    shown = judged.shown
    rows = {str(row["arm"]): row for row in judged.rows}
    found = [*_worse(rows, shown.name), *_undefined(judged)]
    total = len(judged.comparison.frames)
    abstained = int(shown.abstained.sum())
    if abstained:
        found.append(f"{abstained} of {total} frames lie beyond the distance gate: {shown.name} abstained from the prior there.")
    error = judged.quality[shown.name][0]
    lost = int(np.sum((error > LOST) & ~shown.abstained))
    if lost:
        found.append(
            f"{lost} of {total} frames have an object error above {LOST} though {shown.name} did not abstain: the gate did not see them."
        )
    return tuple(found)


def _worse(rows: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    found = []
    for baseline in BASELINES:
        if baseline not in rows or baseline == name:
            continue
        for column, words in (("error", "object error"), ("chi2", "chi²")):
            ours, theirs = rows[name][column], rows[baseline][column]
            if ours > WORSE * theirs:
                found.append(
                    f"{name} is worse than {baseline} in median {words}: {ours:.3g} against {theirs:.3g} ({ours / theirs:.2f} times)."
                )
    return found


def _undefined(judged: Judged) -> list[str]:
    found = []
    for arm in judged.comparison.arms:
        number = int(np.sum(~np.isfinite(arm.chi2)))
        if number:
            found.append(
                f"{arm.name} has no chi² on {number} of {len(arm.chi2)} frames (empty, or without support): left out of its medians."
            )
    return found
