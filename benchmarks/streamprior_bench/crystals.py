"""The prior on the twin's crystals: learned on one set, judged on another, over photons, beam stops and dead pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin

from streamprior.align import align
from streamprior.evaluate.arms import compare_arms
from streamprior.evaluate.records import Arm
from streamprior.prior import Geometry, Prior
from streamprior.stages.prepare import Corrections, merged, prepare
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings

PHOTONS = (1e6, 1e5, 2e4)
STOPS_PX = (0.0, 3.0, 5.0)
DEAD_SHARE = (0.0, 0.02)
"""Of the pixels, unknown to the detector's own mask."""

PIXELS = 64 * 64


@dataclass(frozen=True)
class Sets:
    """How many crystals of each morphology are learned from, and how many others are judged."""

    learned: int = 40
    judged: int = 20


def run(repeats: int = 1, sets: Sets | None = None) -> Iterator[dict[str, Any]]:
    """One dict for each arm in each cell of the grid: object error against the truth (median, 75th percentile), chi2 / floor, cost.

    The prior is grown once, on Set 1 at 1e6 photons without a beam stop or dead pixels; Set 2 are crystals of other seeds. `repeats` has no
    meaning here: nothing is timed.
    """
    chosen = sets or Sets()
    first = Twin(load_scenario("crystals", {"frames": 7 * chosen.learned}))
    frames = np.stack([first.frame(i) for i in range(len(first))])
    prior = grow_prior(frames, geometry=Geometry((64, 64), (32, 32), (64, 64)), settings=TrainSettings(classes=3))
    for photons in PHOTONS:
        for stop in STOPS_PX:
            for dead in DEAD_SHARE:
                yield from _cell(prior, chosen, {"photons": photons, "stop_px": stop, "dead_share": dead})


def _cell(prior: Prior, sets: Sets, cell: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    changes = {
        "frames": 7 * sets.judged,
        "sample.first": 7 * sets.learned,
        "dose_photons": cell["photons"],
        "detector.beam_stop_radius_px": cell["stop_px"],
        "detector.dead": round(cell["dead_share"] * PIXELS),
        "detector.unknown_share": 1.0,
    }
    twin = Twin(load_scenario("crystals", changes))
    truths = [twin.truth(i) for i in range(len(twin))]
    known = merged(Corrections(), twin.detector(), prior.geometry.detector_shape)
    photons = prepare(np.stack([twin.frame(i) for i in range(len(twin))]), prior, known.mask)
    truth = np.stack([one.object for one in truths])
    names = np.array([one.morphology for one in truths])
    for arm in compare_arms(photons, prior, truth=truth).arms:
        error = np.array([align(psi, reference).error for psi, reference in zip(arm.psi, truth, strict=True)])
        yield {**cell, **_row(arm, error, names)}


def _row(arm: Arm, error: npt.NDArray[np.float64], names: npt.NDArray[np.str_]) -> dict[str, Any]:
    return {
        "arm": arm.name,
        "frames": len(error),
        "iterations": arm.iterations,
        "ffts": arm.ffts,
        "error": round(float(np.median(error)), 4),
        "error_p75": round(float(np.percentile(error, 75)), 4),
        "chi2_over_floor": round(float(np.nanmedian(arm.chi2 / arm.floor)), 3),
        "free_llk": round(float(np.nanmedian(arm.free_llk)), 3),
        "abstained": round(float(arm.abstained.mean()), 3),
        **{str(name): round(float(np.median(error[names == name])), 3) for name in np.unique(names)},
    }
