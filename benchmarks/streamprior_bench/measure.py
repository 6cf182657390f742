"""Functions -> medians, measured in turn; and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECONDS = 0.2
"""Length of a repeat: a few milliseconds would fall whole into another process's turn on the core."""


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant; see `timed`."""
    return {name: statistics.median(times) for name, times in timed(contestants, repeats).items()}


def timed(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each contestant.

    They run in turn, so that a slow moment of the machine hits all of them alike, after one call each that compiles and plans. A repeat
    is as many rounds as go into SECONDS, at least one.
    """
    for work in contestants.values():
        work()
    begun = time.perf_counter()
    for work in contestants.values():
        work()
    rounds = max(1, round(SECONDS / (time.perf_counter() - begun)))
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats * rounds):
        for name, work in contestants.items():
            begun = time.perf_counter()
            work()
            spent[name].append(time.perf_counter() - begun)
    return spent


def machine() -> dict[str, Any]:
    """What a reader needs to compare numbers: processor, cores, versions, and how busy it was."""
    named = (
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return {
        "cpu": named[0].partition(":")[2].strip() if named else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("numpy", "scipy", "numba", "streamprior")},
    }
