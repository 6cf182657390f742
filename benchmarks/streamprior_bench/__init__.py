"""The benchmarks and studies: one module for each hot path or question, a JSON line a measurement, ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamprior_bench import classify, crystals, gpu, kills, measured, morphology, mosaic, overload, path, refine, reuse, scans, soak, wire
from streamprior_bench.measure import machine as machine

BENCHMARKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "classify": classify.run,
    "refine": refine.run,
    "mosaic": mosaic.run,
    "path": path.run,
    "wire": wire.run,
    "gpu": gpu.run,
}
"""Name -> run(repeats), which yields a dict for each measurement as it is made."""

CHOOSING = ("classify", "refine", "gpu")
"""Benchmarks that take `only` and measure nothing but the rows asked for; of the others everything is measured, and the rest left out."""

STUDIES: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {
    "crystals": crystals.run,
    "kills": kills.run,
    "measured": measured.run,
    "morphology": morphology.run,
    "overload": overload.run,
    "reuse": reuse.run,
    "scans": scans.run,
    "soak": soak.run,
}
"""What the results are worth, in the same form; little is timed, and the same machine gives the same numbers."""

PRIOR = ("crystals", "measured", "morphology", "reuse")
"""The studies of the prior. Together: `bench prior`."""


def rows(name: str, repeats: int, only: str = "") -> Iterator[dict[str, Any]]:
    """Rows of a benchmark or study as they are made, of those whose name (`what`) holds `only`; and of every peer that is not there."""
    run = {**BENCHMARKS, **STUDIES}[name]
    made = run(repeats=repeats, only=only) if name in CHOOSING else run(repeats=repeats)
    return (row for row in made if only in row.get("what", "") or "skipped" in row)
