"""The benchmarks and studies: one module for each hot path or question, a JSON line a measurement, ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamprior_bench import classify, crystals, measured, morphology, mosaic, path, refine, reuse, scans, wire
from streamprior_bench.measure import machine as machine

BENCHMARKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "classify": classify.run,
    "refine": refine.run,
    "mosaic": mosaic.run,
    "path": path.run,
    "wire": wire.run,
}
"""Name -> run(repeats), which yields a dict for each measurement as it is made."""

STUDIES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "crystals": crystals.run,
    "measured": measured.run,
    "morphology": morphology.run,
    "reuse": reuse.run,
    "scans": scans.run,
}
"""What the results are worth, in the same form; little is timed, and the same machine gives the same numbers."""

PRIOR = ("crystals", "measured", "morphology", "reuse")
"""The studies of the prior. Together: `bench prior`."""
