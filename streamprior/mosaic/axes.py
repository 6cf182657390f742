"""The first frames of a scan -> which axes and which probe explain them: says so where another setting does better than the one in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
import numpy.typing as npt

from streamprior.config import Axes
from streamprior.mosaic.mosaic import Mosaic, Shot
from streamprior.mosaic.overlap import Overlap, Rule
from streamprior.mosaic.probe import Modes

TRIAL_FRAMES = 64
"""Frames of a trial. On the measured Siemens star the right axes had a third of the others' chi2 after as many."""

_SWEEPS = 2
_BETTER = 1.25
"""How much lower another setting's chi2 must be before anything is said: with a wrong probe all axes are nearly alike (1.03-1.2)."""

_PROBE_BETTER = 2.0
_GAIN = 0.5


def oriented(positions: npt.NDArray[np.float64], axes: Axes) -> npt.NDArray[np.float64]:
    """(B, 2) positions (x, y) of the stage -> (B, 2) (row, column) on the detector's axes, same unit."""
    signs = [-1.0 if f"-{name}" in axes else 1.0 for name in "xy"]
    signed = positions * np.array(signs)
    columns, rows = (signed[:, 0], signed[:, 1]) if axes.replace("-", "") == "xy" else (signed[:, 1], signed[:, 0])
    return np.stack([rows, columns], axis=1)


def trial(
    shots: Sequence[Shot],
    stage: npt.NDArray[np.float64],
    probe: Modes,
    axes: Axes,
    refined: bool,
    overlap: Callable[[], Overlap],
    rule: Rule,
) -> str | None:
    """Put the same frames together with every setting of the axes, and with a refined probe; a sentence where one is clearly better.

    Parameters
    ----------
    shots : the frames; their own positions are not looked at. stage : (B, 2) their (x, y) in object pixels. probe : as the run began with.
    axes, refined : what the run uses.
    """

    def chi2(one: Axes, gain: float) -> float:
        mosaic = Mosaic(probe, rule, overlap, halves=False, gain=gain)
        places = oriented(stage, one)
        mosaic.add([replace(shot, position=(float(row), float(column))) for shot, (row, column) in zip(shots, places, strict=True)])
        for seed in range(_SWEEPS):
            for _ in mosaic.sweep(seed=seed):
                pass
        return mosaic.chi2()

    found = {one: chi2(one, _GAIN if refined else 0.0) for one in get_args(Axes)}
    best = min(found, key=lambda one: found[one])
    if best != axes and found[axes] > _BETTER * found[best]:
        return (
            f"the residual rises with overlap: check the signs and the order of the positions. chi2 of the first {len(shots)} frames is"
            f" {found[axes]:.3g} with mosaic.axes {axes!r} and {found[best]:.3g} with {best!r}"
        )
    better = chi2(axes, _GAIN) if not refined else found[axes]
    if not refined and found[axes] > _PROBE_BETTER * better:
        return (
            f"the probe does not fit: chi2 of the first {len(shots)} frames is {found[axes]:.3g} with it and {better:.3g} once it is"
            " refined; set mosaic.refine, or give the probe of this scan"
        )
    return None
