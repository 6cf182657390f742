"""Results in order -> the same results with their drift numbers: mask IoU, flux, centre of mass, chi2 against the prior's baseline."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from streamprior.jit import addresses, array_at, inlined, kernel
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Flag, Result, RunStarted

log = structlog.get_logger(__name__)

_FAINT = 0.9
"""Part of the faintest training frame's flux: photon noise alone may take a frame as faint as that one below it."""

NOTHING = (0.0, 0.0)
"""Baseline of what no training frame has."""


def signals(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the scalars that are watched."""
    return ("chi2", "class_distance", "prior_distance", *measured_here(class_names))


def measured_here(class_names: tuple[str, ...]) -> tuple[str, ...]:
    """Those that this stage measures itself: keys of `Result.drift` and columns of the archive."""
    return ("flux", "centre_row", "centre_column", *(f"fraction_{name}" for name in class_names))


@dataclass(frozen=True, slots=True)
class MaskNumbers:
    """What class maps say beside two others, B of them; float64, NaN where a class is in neither map.

    iou, iou_previous : (B, K), intersection over union with the reference and with the frame before. fraction : (B, K), share of measured
    pixels. centre_row, centre_column : (B,), centroid of class 0 (the core), prepared pixels. flux : (B,), mean photons per measured pixel.
    """

    iou: npt.NDArray[np.float64]
    iou_previous: npt.NDArray[np.float64]
    fraction: npt.NDArray[np.float64]
    centre_row: npt.NDArray[np.float64]
    centre_column: npt.NDArray[np.float64]
    flux: npt.NDArray[np.float64]


def mask_numbers(
    ids: Sequence[npt.NDArray[np.uint8]],
    counts: Sequence[npt.NDArray[np.float32]],
    reference: npt.NDArray[np.uint8],
    previous: npt.NDArray[np.uint8],
    classes: int,
) -> MaskNumbers:
    """Compare class maps with a reference and each with the one before it, over the pixels that are measured in both.

    ids : B maps (H, W), NOT_MEASURED is left out. counts : B frames (H, W). reference : (H, W). previous : the map before the first.
    """
    ids, counts = [np.ascontiguousarray(one) for one in ids], [np.ascontiguousarray(one) for one in counts]
    table = np.zeros((len(ids), 5, classes), np.int64)
    sums = np.zeros((len(ids), 5))
    _compare_all(addresses(ids), addresses(counts), reference, previous, table, sums)
    size, both, either, both_previous, either_previous = np.moveaxis(table, 1, 0)
    rows, columns, core, photons, measured = sums.T
    with np.errstate(invalid="ignore", divide="ignore"):
        return MaskNumbers(
            iou=both / either,
            iou_previous=both_previous / either_previous,
            fraction=size / measured[:, None],
            centre_row=rows / core,
            centre_column=columns / core,
            flux=np.where(measured > 0, photons / measured, 0.0),
        )


class DriftWatch:
    """Sees a run's results in order; owns the mask of the frame before.

    Parameters
    ----------
    limit : standard deviations of the prior's baseline beyond which a signal counts as drifted.
    patience : frames in a row that must be beyond the limit before the alarm is on, and within it before it is off again.
    """

    name = "drift"

    def __init__(self, prior: Prior, limit: float = 5.0, patience: int = 3) -> None:
        self._prior = prior
        self._limit = limit
        self.patience = patience
        self._measured = measured_here(prior.class_names)
        self._signals = (*self._measured, "chi2", "class_distance", "prior_distance")
        self._mean, self._deviation = _baselines(prior, self._signals)
        self._previous: npt.NDArray[np.uint8] | None = None
        self._on: set[str] = set()
        self._contrary: dict[str, int] = {}  # frames in a row that speak against the alarm's present state, where there are any
        self._before: dict[str, tuple[npt.NDArray[np.uint8], set[str], dict[str, int]]] = {}

    def begin(self, run: RunStarted) -> None:
        self._previous, self._on, self._contrary = self._before.pop(run.uid, (None, set(), {}))

    def resume(self, uid: str, classes: npt.NDArray[np.uint8], rows: Sequence[Mapping[str, Any]]) -> None:
        """A run of an earlier process will go on: it begins where the frames end that were seen then.

        classes : (H, W), map of the last one. rows : the last `patience` of the archive's frames table, the newest last.
        """
        on = {signal for signal in rows[-1]["alarms"].split(",") if signal}
        values = np.array([[row[name] for name in self._measured] for row in rows])
        others = np.array([[row[name] for name in ("chi2", "chi2_floor", "class_distance", "distance")] for row in rows])
        contrary: dict[str, int] = {}
        for row, scores in zip(rows, self._scores(values, others).tolist(), strict=True):
            for signal, value in zip(self._signals, scores, strict=True):
                if row["flags"] & Flag.EMPTY or math.isnan(value):
                    continue
                before = contrary.pop(signal, 0)
                if (abs(value) > self._limit) != (signal in on):
                    contrary[signal] = before + 1
        self._before[uid] = classes, on, contrary

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        names = self._prior.class_names
        ids = [result.classes for result in results]
        before = ids[0] if self._previous is None else self._previous
        numbers = mask_numbers(ids, [result.counts for result in results], self._prior.reference, before, len(names))
        self._previous = results[-1].classes
        values = np.column_stack([numbers.flux, numbers.centre_row, numbers.centre_column, numbers.fraction])
        others = np.array([(result.chi2, result.chi2_floor, result.class_distance, result.distance) for result in results])
        scores = self._scores(values, others)
        beyond = np.any(np.abs(scores) > self._limit, axis=1)
        now = time.time()
        rows = zip(
            results, numbers.iou.tolist(), numbers.iou_previous.tolist(), values.tolist(), scores.tolist(), beyond.tolist(), strict=True
        )
        seen = []
        for result, iou, iou_previous, value, row, out in rows:
            score = dict(zip(self._signals, row, strict=True))
            seen.append(
                replace(
                    result,
                    iou=dict(zip(names, iou, strict=True)),
                    iou_previous=dict(zip(names, iou_previous, strict=True)),
                    drift=dict(zip(self._measured, value, strict=True)),
                    score=score,
                    alarms=self._alarms(result, score) if out or self._on or self._contrary else (),
                    clock=(*result.clock, (self.name, now)),
                )
            )
        return seen

    def _scores(self, values: npt.NDArray[np.float64], others: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(B, signals), deviations from the baseline; NaN where there is nothing to judge by.

        A frame fainter than any the prior was grown on is judged by its flux alone: where there are few photons, centre, classes and
        chi2 are those of the noise, and every rocking curve would end in an alarm.
        """
        with np.errstate(invalid="ignore", divide="ignore"):
            # The same misfit is much at the peak and little on the flank: what counts is how far above its noise it lies.
            misfit = others[:, 0] / others[:, 1]
            scores = (np.column_stack([values, misfit, others[:, 2:]]) - self._mean) / self._deviation
        least, _ = self._prior.baselines.get("flux_least", (0.0, 0.0))
        scores[values[:, 0] < _FAINT * least, 1:] = np.nan
        return np.asarray(scores)

    def _alarms(self, result: Result, score: Mapping[str, float]) -> tuple[str, ...]:
        """An alarm changes its state after `patience` frames in a row that speak for the other one: it flickers neither on nor off."""
        if result.flags & Flag.EMPTY:
            return ()
        for signal, value in score.items():
            if math.isnan(value):
                # Not measured (a frame without refinement, a class without a pixel): says nothing for or against.
                continue
            contrary = self._contrary.pop(signal, 0) + 1
            if (abs(value) > self._limit) == (signal in self._on):
                continue
            if contrary >= self.patience:
                self._on ^= {signal}
                log.warning("drift alarm", signal=signal, on=signal in self._on, frame=result.index, sigmas=round(value, 1))
            else:
                self._contrary[signal] = contrary
        return tuple(signal for signal in score if signal in self._on)


def baseline_means(prior: Prior) -> dict[str, float]:
    """Signal -> mean of the prior's baseline, NaN where it has none; that of chi2 is over its floor."""
    names = signals(prior.class_names)
    return dict(zip(names, _baselines(prior, names)[0].tolist(), strict=True))


def _baselines(prior: Prior, names: Sequence[str]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and standard deviation of each signal; NaN without a baseline. One without spread still gives a finite score."""
    known = {**prior.baselines, "chi2": prior.baselines.get("chi2_over_floor"), "prior_distance": prior.baselines.get("distance")}
    # Without a library, or with one prototype alone, training has no distance: its baseline is then (0, 0), which judges nothing.
    if known["prior_distance"] == NOTHING:
        known["prior_distance"] = None
    pairs = np.array([known.get(name) or (math.nan, math.nan) for name in names])
    mean = pairs[:, 0]
    return mean, np.maximum(pairs[:, 1], 1e-6 * np.maximum(np.abs(mean), 1e-6))


_HOLE = np.uint8(NOT_MEASURED)


@kernel
def _compare_all(ids, counts, reference, previous, table, sums):  # type: ignore[no-untyped-def]
    """ids, counts: addresses of B maps and of B frames. previous: the map before the first."""
    pixels = np.empty((0, 0), np.float32)
    before = previous
    for b in range(ids.size):
        own = array_at(ids[b], reference.shape, reference)
        _compare(own, array_at(counts[b], reference.shape, pixels), reference, before, table[b], sums[b])
        before = own


_LINE = 128
"""Pixels that are counted in bytes, 64 to an instruction, before the counts could overflow."""


@kernel
def _compare(ids, counts, reference, previous, table, sums):  # type: ignore[no-untyped-def]
    """Table rows: pixels of the class, then in both and in either map for the reference, then the same for the frame before.

    A pass a class with sums of comparisons, which vectorises; counting each pixel into its own cell is one pass but ten times slower.
    """
    for y in range(ids.shape[0]):
        for first in range(0, ids.shape[1], _LINE):
            here = slice(first, min(first + _LINE, ids.shape[1]))
            own, light = ids[y, here], counts[y, here]
            for k in range(table.shape[1]):
                _compare_line(own, reference[y, here], previous[y, here], np.uint8(k), table[:, k])
            core = measured = np.uint8(0)
            for x in range(own.size):
                core = np.uint8(core + np.uint8(own[x] == np.uint8(0)))
                measured = np.uint8(measured + np.uint8(own[x] != _HOLE))
            across, photons = np.int32(0), np.float32(0)
            for x in range(own.size):
                across += np.int32(x) if own[x] == np.uint8(0) else np.int32(0)
                photons += light[x] if own[x] != _HOLE else np.float32(0)
            sums[0] += y * np.int64(core)
            sums[1] += first * np.int64(core) + across
            sums[2] += core
            sums[3] += photons
            sums[4] += measured


@inlined
def _compare_line(own, one, two, name, column):  # type: ignore[no-untyped-def]
    size = both_one = either_one = both_two = either_two = np.uint8(0)
    for x in range(own.size):
        here, first, second = own[x] == name, one[x] == name, two[x] == name
        measured = own[x] != _HOLE
        # Cut to a byte at every step, as Python's + would make it 8.
        size = np.uint8(size + np.uint8(here))
        both_one = np.uint8(both_one + np.uint8(here & first))
        both_two = np.uint8(both_two + np.uint8(here & second))
        either_one = np.uint8(either_one + np.uint8((here & (one[x] != _HOLE)) | (first & measured)))
        either_two = np.uint8(either_two + np.uint8((here & (two[x] != _HOLE)) | (second & measured)))
    column[0] += size
    column[1] += both_one
    column[2] += either_one
    column[3] += both_two
    column[4] += either_two
