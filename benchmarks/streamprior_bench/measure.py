"""Functions -> seconds, measured in turn, alone or beside each other; rows of a benchmark by their names; and what machine it was."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

SECONDS = 0.2
"""Length of a repeat: a few milliseconds would fall whole into another process's turn on the core."""

SLOW_REPEATS = 3
"""Calls of a contestant that alone takes longer than that: a peer at a tenth of our speed need not be known to the percent."""

VERSIONS = ("numpy", "scipy", "numba", "streamprior", "pyfftw", "cohere-core", "scikit-learn", "minisom", "cupy")


@dataclass(frozen=True, slots=True)
class Case:
    """A row of a benchmark that can be had alone. what : its name. row : repeats -> its numbers."""

    what: str
    row: Callable[[int], dict[str, Any]]


def rows_of(cases: Sequence[Case], repeats: int, only: str) -> Iterator[dict[str, Any]]:
    """Measure the cases that have `only` in their name, each on one core but where it makes threads of its own."""
    with one_core():
        for case in cases:
            if only in case.what:
                yield {"what": case.what, **case.row(repeats)}


def one_core() -> AbstractContextManager[object]:
    """Hold back the thread pools of BLAS and OpenMP, so that a peer on one core is on one core."""
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:  # scikit-learn brings it; no other contestant has such a pool
        return nullcontext()
    limits: AbstractContextManager[object] = threadpool_limits(1)
    return limits


def interleaved(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each contestant; see `timed`."""
    return {name: statistics.median(times) for name, times in timed(contestants, repeats).items()}


def timed(contestants: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each contestant.

    They run in turn, so that a slow moment of the machine hits all of them alike, after one call each that compiles and plans. A repeat
    is as many rounds as go into SECONDS, at least one. A contestant that takes longer than SECONDS by itself is in the first round of a
    repeat only, and in no more than SLOW_REPEATS of them.
    """
    for work in contestants.values():
        work()
    cost = {name: _seconds(work) for name, work in contestants.items()}
    slow = {name for name, seconds in cost.items() if seconds > SECONDS}
    quick = sum(seconds for name, seconds in cost.items() if name not in slow)
    rounds = max(1, round(SECONDS / quick)) if quick else 1
    spent: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats):
        for turn in range(rounds):
            for name, work in contestants.items():
                if name not in slow or (turn == 0 and repeat < SLOW_REPEATS):
                    spent[name].append(_seconds(work))
    return spent


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def spread(times: Sequence[float]) -> float:
    """(90th - 10th percentile) / median: how far two calls in ten are from the usual one."""
    low, middle, high = np.percentile(times, (10, 50, 90))
    return float((high - low) / middle)


def beside(*works: Callable[[], object]) -> Callable[[], None]:
    """All of them at the same time, each on a thread of its own; ends with the last, and raises what any of them raised."""
    pool = ThreadPoolExecutor(len(works))

    def together() -> None:
        for future in [pool.submit(work) for work in works]:
            future.result()

    return together


def absent(peers: Mapping[str, tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """Peer -> its row, for those that cannot be imported. peers : name -> (module, package that brings it)."""
    rows = {}
    for name, (module, package) in peers.items():
        try:
            import_module(module)
        except ImportError as error:
            rows[name] = {"what": name, "skipped": f"{name} cannot be imported ({error}): pip install {package}"}
    return rows


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
        "versions": {name: found for name in VERSIONS if (found := _version(name)) is not None},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
