"""Scores of one signal, frame by frame -> an EWMA chart beside them, and the limit that gives a wanted number of false alarms."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy.special import ndtr

WEIGHT = 0.2
"""Of the newest frame. At one false alarm in 10,000 quiet frames (a limit of 3.83) 0.2 finds a shift of 1 standard deviation in 22
frames on average, of 2 in 5 and of 3 in 3; a single score beyond 5 takes 31,573, 741 and 44, at one in 1.7 million (`run_length`)."""

_STATES = 201
"""Of the Markov chain; with twice as many the run length changes by 0.1 %."""


class Ewma:
    """An exponentially weighted mean of scores, in its own standard deviations: small lasting changes show that no single frame does.

    Roberts (1959), with the exact variance of a chart that has just begun. Owns one mean a signal.

    Parameters
    ----------
    signals : how many, S. weight : of the newest frame, above 0 and at most 1; 1 is the score itself.
    """

    def __init__(self, signals: int, weight: float = WEIGHT) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight is {weight}; it takes a number above 0 and at most 1")
        self._weight = weight
        self._mean = np.zeros(signals)
        self._faded = np.ones(signals)  # (1 - weight) ^ (2 frames so far)

    def begin(self) -> None:
        """A new run knows nothing of the one before."""
        self._mean[:] = 0.0
        self._faded[:] = 1.0

    def __call__(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Charts of frames in their order.

        scores : (B, S), standard deviations of the baseline; NaN and infinity say nothing and change nothing. Returns (B, S), the same in
        standard deviations of the chart, NaN where the frame had no score.
        """
        charts = np.full(scores.shape, np.nan)
        for row, chart in zip(scores, charts, strict=True):
            known = np.isfinite(row)
            self._mean[known] += self._weight * (row[known] - self._mean[known])
            self._faded[known] *= (1 - self._weight) ** 2
            variance = self._weight / (2 - self._weight) * (1 - self._faded[known])
            chart[known] = self._mean[known] / np.sqrt(variance)
        return charts


def run_length(limit: float, weight: float = WEIGHT, shift: float = 0.0) -> float:
    """Frames on average until a chart is beyond its limit, in either direction, from a mean of 0 on.

    For independent normal scores; by a Markov chain over equal parts of the band (Lucas and Saccucci 1990, Technometrics 32, 1).

    limit : standard deviations of the settled chart. shift : of the scores' mean, in their standard deviations.
    """
    band = limit * math.sqrt(weight / (2 - weight))
    width = 2 * band / _STATES
    centres = -band + width * (np.arange(_STATES) + 0.5)
    # From the middle of a part to the edges of every part: the score that it takes.
    edges = -band + width * np.arange(_STATES + 1)
    reached = (edges[None, :] - (1 - weight) * centres[:, None]) / weight - shift
    step = np.diff(_normal(reached), axis=1)
    return float(np.linalg.solve(np.eye(_STATES) - step, np.ones(_STATES))[_STATES // 2])


def limit_for(frames: float, weight: float = WEIGHT) -> float:
    """The limit of a chart that is beyond it once in so many quiet frames, on average; `frames` from 10 to a million."""
    if not 10 <= frames <= 1e6:
        raise ValueError(f"frames is {frames}; it takes a number from 10 to a million")
    low, high = 0.5, 6.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if run_length(middle, weight) < frames else (low, middle)
    return high


def spread(scores: npt.ArrayLike) -> tuple[float, float]:
    """(centre, standard deviation) of a quiet stretch, by median and interquartile range, so that a few wild frames do not widen it.

    scores : (N,), NaN is left out. Raises ValueError below 20 numbers, of which no quartile is known well.
    """
    known = np.asarray(scores, np.float64)
    known = known[np.isfinite(known)]
    if len(known) < _LEAST:
        raise ValueError(f"{len(known)} frames with a number are no quiet stretch; it takes {_LEAST} or more")
    lower, middle, upper = np.quantile(known, (0.25, 0.5, 0.75))
    return float(middle), float((upper - lower) / _QUARTILES)


_LEAST = 20

_QUARTILES = 1.3489795003921634
"""Distance of a normal distribution's quartiles, in its standard deviations."""


def _normal(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Part of a normal distribution below x."""
    return np.asarray(ndtr(x))
