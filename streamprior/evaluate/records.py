"""The nouns of an evaluation: an Arm is one way to start and iterate, a Comparison is all arms on the same frames."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Tick = Callable[[str, int, int], None]
"""(what, done, total): how long work says where it stands."""

FULL_SOLVE = "full solve"
"""Name of the arm that every other one is measured by: many iterations, several starts, nothing from the prior."""

RANDOM = "random"
FLAT = "flat"
LEAK = "LEAK"
"""How a comparison's note begins that says the prior was grown on frames of it; a report shows it in red."""

DAEMON = "streamprior"
"""Name of the arm that the daemon runs: match with its control, gate and schedule."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to start and iterate, on the B frames of a comparison.

    name : "random", "flat", "flat + plan", "zero phase", "prototype", "best of k", "shuffled prototype", "nearest solved frame",
        "full solve", "oracle", "streamprior" (what the daemon runs).
    psi : (B, *shape) complex64, centred. support : (B, *shape) bool.
    chi2, floor, r_factor, free_llk : (B,) float; NaN where undefined.
    history : (B, n) chi2 after each iteration; NaN where a frame has fewer.
    iterations, ffts : spent on a frame, trial arms included.
    unit : (B,) int32, the prototype that was started from, -1 for none. distance : (B,) float, to it; NaN for none.
    abstained : (B,) bool, beyond the gate. kept : arm that was kept, a frame.
    """

    name: str
    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    chi2: npt.NDArray[Any]
    floor: npt.NDArray[Any]
    r_factor: npt.NDArray[Any]
    free_llk: npt.NDArray[Any]
    history: npt.NDArray[Any]
    iterations: int
    ffts: int
    unit: npt.NDArray[np.int32]
    distance: npt.NDArray[Any]
    abstained: npt.NDArray[np.bool_]
    kept: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """All arms on one split.

    title : such as "even -> odd". frames : indices in the file, of Set 2.
    counts : (B, *shape) float32, photons. valid : (B, *shape) bool.
    reference : (B, *shape) complex64, what `reference_is` says: "truth" or "full solve".
    notes : sentences for a person: failures, abstentions, the leak check.
    random_runs : (runs, B, *shape) complex64, independent runs from random starts, for the phase-retrieval transfer function.
    distance_gate : frame-to-prototype distance beyond which the daemon abstains; NaN without a gate.
    """

    title: str
    frames: tuple[int, ...]
    counts: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    reference: npt.NDArray[np.complex64]
    reference_is: str
    arms: tuple[Arm, ...]
    notes: tuple[str, ...] = ()
    random_runs: npt.NDArray[np.complex64] | None = None
    distance_gate: float = float("nan")
