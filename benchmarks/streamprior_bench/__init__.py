"""The benchmarks: one module for each hot path, a JSON line a measurement, ratios within one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from streamprior_bench import classify, path, refine
from streamprior_bench.measure import machine as machine

BENCHMARKS: dict[str, Callable[..., Iterator[dict[str, Any]]]] = {"classify": classify.run, "refine": refine.run, "path": path.run}
"""Name -> run(repeats), which yields a dict for each measurement as it is made."""
