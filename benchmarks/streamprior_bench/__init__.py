"""The benchmarks and studies: one module for each hot path or question, a JSON line a measurement, ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamprior_bench import classify, crystals, measured, morphology, path, refine, reuse
from streamprior_bench.measure import machine as machine

BENCHMARKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"classify": classify.run, "refine": refine.run, "path": path.run}
"""Name -> run(repeats), which yields a dict for each measurement as it is made."""

STUDIES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "crystals": crystals.run,
    "measured": measured.run,
    "morphology": morphology.run,
    "reuse": reuse.run,
}
"""What the prior is worth, in the same form; nothing is timed, and the same machine gives the same numbers. Together: `bench prior`."""
