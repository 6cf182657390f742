"""The frame map on the twin's crystals: grown without labels on one set, matched to the seven names on another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from streamprior_sim.crystals import MORPHOLOGIES
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin

from streamprior.prior import Geometry, Prior
from streamprior.stages.classify import classify
from streamprior.stages.prepare import Corrections, merged, prepare
from streamprior.train.grow import grow_prior
from streamprior.train.morphology import describe, grow_morphology, morphology_of
from streamprior.train.settings import TrainSettings

CELLS = ((1e6, 0.0), (1e5, 0.0), (2e4, 0.0), (1e6, 3.0))
"""(photons, radius of the beam stop in pixels) of the judged set; the map is grown at 1e6 photons without a stop."""


def run(repeats: int = 1) -> Iterator[dict[str, Any]]:
    """One dict for each cell: balanced accuracy after optimal matching and the confusion matrix; nothing is timed."""
    first = Twin(load_scenario("crystals"))
    frames = np.stack([first.frame(i) for i in range(len(first))])
    settings = TrainSettings(classes=3, library=0)
    prior = grow_prior(frames, geometry=Geometry((64, 64), (32, 32), (64, 64)), settings=settings)
    grown = grow_morphology(_described(first, prior)[0], groups=len(MORPHOLOGIES))
    for photons, stop in CELLS:
        changes = {"frames": 140, "sample.first": 280, "dose_photons": photons, "detector.beam_stop_radius_px": stop}
        described, names = _described(Twin(load_scenario("crystals", changes)), prior)
        table = _matched(names, morphology_of(described, grown))
        yield {
            "photons": photons,
            "stop_px": stop,
            "frames": len(names),
            "balanced_accuracy": round(float(np.mean(np.diag(table) / table.sum(1))), 4),
            "names": list(MORPHOLOGIES),
            "confusion": table.tolist(),
        }


def _described(twin: Twin, prior: Prior) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.intp]]:
    """Descriptors of all frames, and the number of each one's true name."""
    mask = merged(Corrections(), twin.detector(), prior.geometry.detector_shape).mask
    photons = prepare(np.stack([twin.frame(i) for i in range(len(twin))]), prior, mask)
    assert prior.background is not None
    described = describe(photons.counts, classify(photons, prior).ids, photons.valid, prior.background)
    return described, np.array([MORPHOLOGIES.index(str(twin.truth(i).morphology)) for i in range(len(twin))])


def _matched(names: npt.NDArray[np.intp], groups: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    """(7, 7) frames of each name (row) in each group, the groups in the order that agrees best with the names; NO_GROUP counts as wrong."""
    number = len(MORPHOLOGIES)
    table = np.zeros((number, number), np.intp)
    for name, group in zip(names, groups, strict=True):
        table[name, group if group < number else (name + 1) % number] += 1
    _, order = linear_sum_assignment(-table)
    return table[:, order]
