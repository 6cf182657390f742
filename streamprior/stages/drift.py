"""Results in order -> the same results with their drift numbers: mask IoU, flux, centre of mass, chi2 against the prior's baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import structlog

from streamprior.jit import kernel
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
    """What one class map says beside two others; arrays are (K,) float64, NaN where a class is in neither map.

    iou, iou_previous : intersection over union with the reference and with the frame before. fraction : share of measured pixels.
    centre_row, centre_column : centroid of class 0 (the core), prepared pixels. flux : mean photons per measured pixel.
    """

    iou: npt.NDArray[np.float64]
    iou_previous: npt.NDArray[np.float64]
    fraction: npt.NDArray[np.float64]
    centre_row: float
    centre_column: float
    flux: float


def mask_numbers(
    ids: npt.NDArray[np.uint8],
    counts: npt.NDArray[np.float32],
    reference: npt.NDArray[np.uint8],
    previous: npt.NDArray[np.uint8],
    classes: int,
) -> MaskNumbers:
    """Compare class maps (H, W) over the pixels that are measured in both; ids of NOT_MEASURED are left out."""
    table = np.zeros((5, classes), np.int64)
    sums = np.zeros(5)
    _compare(ids, counts, reference, previous, table, sums)
    size, both, either, both_previous, either_previous = table
    with np.errstate(invalid="ignore", divide="ignore"):
        return MaskNumbers(
            iou=both / either,
            iou_previous=both_previous / either_previous,
            fraction=size / sums[4],
            centre_row=float(sums[0] / sums[2]) if sums[2] else float("nan"),
            centre_column=float(sums[1] / sums[2]) if sums[2] else float("nan"),
            flux=float(sums[3] / sums[4]) if sums[4] else 0.0,
        )


class DriftWatch:
    """Sees a run's results one by one; owns the mask of the frame before.

    Parameters
    ----------
    limit : standard deviations of the prior's baseline beyond which a signal counts as drifted.
    patience : frames in a row that must be beyond the limit before the alarm is on, and within it before it is off again.
    """

    name = "drift"

    def __init__(self, prior: Prior, limit: float = 5.0, patience: int = 3) -> None:
        self._prior = prior
        self._limit = limit
        self._patience = patience
        self._previous: npt.NDArray[np.uint8] | None = None
        self._on: set[str] = set()
        self._contrary: dict[str, int] = {}  # frames in a row that speak against the alarm's present state

    def begin(self, run: RunStarted) -> None:
        self._previous = None
        self._on = set()
        self._contrary = {}

    def __call__(self, result: Result) -> Result:
        prior = self._prior
        numbers = mask_numbers(
            result.classes,
            result.counts,
            prior.reference,
            result.classes if self._previous is None else self._previous,
            len(prior.class_names),
        )
        self._previous = result.classes
        values = {
            "flux": numbers.flux,
            "centre_row": numbers.centre_row,
            "centre_column": numbers.centre_column,
        } | {f"fraction_{name}": float(share) for name, share in zip(prior.class_names, numbers.fraction, strict=True)}
        score = self._scores(values, result)
        before = self._on.copy()
        alarms = self._alarms(score) if not result.flags & Flag.EMPTY else ()
        for signal in self._on ^ before:
            log.warning("drift alarm", signal=signal, on=signal in self._on, frame=result.index, sigmas=round(score[signal], 1))
        return replace(
            result,
            iou=dict(zip(prior.class_names, map(float, numbers.iou), strict=True)),
            iou_previous=dict(zip(prior.class_names, map(float, numbers.iou_previous), strict=True)),
            drift=values,
            score=score,
            alarms=alarms,
        )

    def _scores(self, values: Mapping[str, float], result: Result) -> dict[str, float]:
        """Deviations from the baseline; NaN where there is nothing to judge by.

        A frame fainter than any the prior was grown on is judged by its flux alone: where there are few photons, centre, classes and
        chi2 are those of the noise, and every rocking curve would end in an alarm.
        """
        baselines = self._prior.baselines
        score = {signal: _score(value, baselines.get(signal)) for signal, value in values.items()}
        # The same misfit is much at the peak and little on the flank: what counts is how far above its noise it lies.
        score["chi2"] = _score(result.chi2 / result.chi2_floor, baselines.get("chi2_over_floor"))
        score["class_distance"] = _score(result.class_distance, baselines.get("class_distance"))
        # Without a library, or with one prototype alone, training has no distance: its baseline is then (0, 0), which judges nothing.
        distance = baselines.get("distance", NOTHING)
        score["prior_distance"] = _score(result.distance, None if distance == NOTHING else distance)
        least, _ = baselines.get("flux_least", (0.0, 0.0))
        if values["flux"] < _FAINT * least:
            score |= dict.fromkeys(score.keys() - {"flux"}, float("nan"))
        return score

    def _alarms(self, score: Mapping[str, float]) -> tuple[str, ...]:
        """An alarm changes its state after `patience` frames in a row that speak for the other one: it flickers neither on nor off."""
        for signal, value in score.items():
            if np.isnan(value):
                # Not measured (a frame without refinement, a class without a pixel): says nothing for or against.
                continue
            contrary = (abs(value) > self._limit) != (signal in self._on)
            self._contrary[signal] = self._contrary.get(signal, 0) + 1 if contrary else 0
            if self._contrary[signal] >= self._patience:
                self._on ^= {signal}
                self._contrary[signal] = 0
        return tuple(signal for signal in score if signal in self._on)


def _score(value: float, baseline: tuple[float, float] | None) -> float:
    """Deviation in standard deviations; NaN without a baseline. A baseline without spread still gives a finite score."""
    if baseline is None:
        return float("nan")
    mean, deviation = baseline
    return (value - mean) / max(deviation, 1e-6 * max(abs(mean), 1e-6))


_HOLE = np.uint8(NOT_MEASURED)


@kernel
def _compare(ids, counts, reference, previous, table, sums):  # type: ignore[no-untyped-def]
    """Table rows: pixels of the class, then in both and in either map for the reference, then the same for the frame before.

    A pass a class with sums of comparisons, which vectorises; counting each pixel into its own cell is one pass but ten times slower.
    """
    for k in range(table.shape[1]):
        name = np.uint8(k)  # compared as bytes, 32 to an instruction
        for y in range(ids.shape[0]):
            own, one, two = ids[y], reference[y], previous[y]
            size = both_one = either_one = both_two = either_two = np.int32(0)
            for x in range(own.size):
                here, first, second = own[x] == name, one[x] == name, two[x] == name
                measured = own[x] != _HOLE
                size += here
                both_one += here & first
                both_two += here & second
                either_one += (here & (one[x] != _HOLE)) | (first & measured)
                either_two += (here & (two[x] != _HOLE)) | (second & measured)
            table[0, k] += size
            table[1, k] += both_one
            table[2, k] += either_one
            table[3, k] += both_two
            table[4, k] += either_two
    for y in range(ids.shape[0]):
        own = ids[y]
        core = across = measured = np.int32(0)
        photons = np.float32(0)
        for x in range(own.size):
            inside = np.int32(own[x] == np.uint8(0))
            core += inside
            across += inside * np.int32(x)
            measured += own[x] != _HOLE
            photons += counts[y, x] if own[x] != _HOLE else np.float32(0)
        sums[0] += y * core
        sums[1] += across
        sums[2] += core
        sums[3] += photons
        sums[4] += measured
