"""The whole path, socket to archive, beside what its stages alone could do on the same cores: frames a second and their ratio."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import Table

from streamprior import daemon
from streamprior.config import Config, make_config
from streamprior.crew import think
from streamprior.prior import Prior, save_prior
from streamprior.records import Detector, Frame, Result, RunStarted
from streamprior.sinks.archive import read_run, run_folders
from streamprior.stages.recipe import Recipe
from streamprior_bench.classify import synthetic_frames, synthetic_prior
from streamprior_bench.measure import spread
from streamprior_bench.send_frames import repeated_frames

SIZE = 128
BLOCK = 16
"""Frames that the stages alone are given at once."""

LATENCY_S = 10.0
"""Length of the run whose latencies are taken, and how much of its beginning is left out: the first frames meet cold caches."""
WARM_S = 1.0


def run(repeats: int = 3, only: str = "") -> Iterator[dict[str, Any]]:
    """Rates with refinement on (its defaults, from a flat start) and off, then latencies at half of each rate, 128 x 128 uint16; the sender
    is a process of its own that shares the cores."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        prior = path_prior()
        save_prior(prior, Path(folder) / "prior.h5")
        for refine, frames in ((True, 6000), (False, 40000)):
            what = f"{SIZE}x{SIZE} uint16, refinement {'on' if refine else 'off'}"
            if only not in f"{what}, half load":
                continue
            config = make_path_config(Path(folder), refine)
            alone, through, rooms = [], [], []
            for _ in range(repeats):
                alone.append(_stages_alone(config, prior, cores, min(frames, 2000)))
                rate, busy = rate_through(config, frames)
                through.append(rate)
                rooms.append(busy)
            kernels, path = statistics.median(alone), statistics.median(through)
            yield {
                "what": what,
                "frames": frames,
                "cores": cores,
                "path_frames_per_s": path,
                "path_spread": spread(through),
                "stages_alone_frames_per_s": kernels,
                "path_over_stages": path / kernels,
            }
            yield {
                "what": f"{what}, CPU microseconds a frame by room",
                **{room: statistics.median(one[room] for one in rooms) for room in rooms[0]},
            }
            yield {"what": f"{what}, half load", **_latencies(config, path / 2)}


def path_prior() -> Prior:
    """Three classes and a support of a third of the field."""
    prior = synthetic_prior(synthetic_frames(SIZE), 3)
    support = np.zeros((SIZE, SIZE), np.bool_)
    support[SIZE // 3 : -SIZE // 3, SIZE // 3 : -SIZE // 3] = True
    return replace(prior, support=support)


def make_path_config(folder: Path, refine: bool) -> Config:
    return make_config(
        {
            "prior": str(folder / "prior.h5"),
            "source": {"address": "tcp://127.0.0.1:*"},
            "refine": {"enabled": refine},
            "overload": {"furthest": "nothing"},
            "archive": {"folder": str(folder / "archive")},
            "http": {"port": 0},
            "log": {"level": "error"},
        },
        "benchmark",
    )


def _stages_alone(config: Config, prior: Prior, workers: int, count: int) -> float:
    """Frames a second of the composed stages on `workers` threads, without sockets, ledger and disk."""
    recipe = Recipe(prior, config.prepare, config.refine, config.drift)
    run_started = RunStarted("bench", "", "", 0.0, None, Detector(shape=(SIZE, SIZE)))
    frames = [Frame("", "", i, counts, 0.0) for i, counts in enumerate(repeated_frames(SIZE, count))]
    sets = [recipe.stages() for _ in range(workers)]

    def work(n: int) -> None:
        mine = frames[n::workers]
        for first in range(0, len(mine), BLOCK):
            think(sets[n], prior, run_started, mine[first : first + BLOCK])

    for stages in sets:
        think(stages, prior, run_started, frames[:BLOCK])
    threads = [threading.Thread(target=work, args=(n,)) for n in range(workers)]
    begun = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return count / (time.perf_counter() - begun)


class Stopwatch:
    """Stands behind the drift watch and keeps what every result's clock says, and when it was there itself."""

    name = "stopwatch"

    def __init__(self) -> None:
        self.seen: list[tuple[float, float, dict[str, float]]] = []

    def begin(self, run: RunStarted) -> None: ...

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        now = time.time()
        self.seen += [(result.detector_time or math.nan, now, dict(result.clock)) for result in results]
        return list(results)


def rate_through(config: Config, count: int) -> tuple[float, dict[str, float]]:
    """Frames a second from the first message out of the socket to the archive's last block, and the CPU time of each room."""
    running = daemon.build(config)
    before = _cpu_seconds()  # of threads that outlive a daemon: those of libraries
    busy: dict[str, float] = {}
    rows = through(running, config, count, lambda: busy.update(_cpu_seconds()))
    rate = count / float(rows["published"].to_numpy().max() - rows["received"].to_numpy().min())
    return rate, {room: 1e6 * (seconds - before.get(room, 0.0)) / count for room, seconds in busy.items()}


def _latencies(config: Config, rate_hz: float) -> dict[str, Any]:
    """Milliseconds since a frame was due at the sender: its class map and object computed, on their way to the sinks ("out"), archived."""
    stopwatch = Stopwatch()
    running = daemon.build(config, [stopwatch])
    rows = through(running, config, round(LATENCY_S * rate_hz), lambda: None, ("--rate-hz", str(rate_hz)))
    seen = stopwatch.seen[round(WARM_S * rate_hz) :]
    exposed = np.array([due for due, _, _ in seen])
    at = {"mask": [clock["classify"] for *_, clock in seen], "out": [out for _, out, _ in seen]}
    if "refine" in seen[0][2]:
        at["reconstruction"] = [clock["refine"] for *_, clock in seen]
    found: dict[str, Any] = {"rate_hz": rate_hz, "frames": len(seen)}
    archived = 1e3 * (rows["published"].to_numpy() - rows["detector_time"].to_numpy())[-len(seen) :]
    for name, late in {**{name: 1e3 * (np.array(times) - exposed) for name, times in at.items()}, "archive": archived}.items():
        found |= {f"{name}_p50_ms": float(np.percentile(late, 50)), f"{name}_p99_ms": float(np.percentile(late, 99))}
    return found


def through(
    running: daemon.Daemon, config: Config, count: int, over: Callable[[], None], pace: Sequence[str] = (), lossless: bool = True
) -> Table:
    """Send frames through a daemon; calls `over` when the run has been closed and every thread is still there. Returns the frames table.

    pace : options of the sender; without any it sends as fast as frames are taken. lossless : every frame must be in the archive, not only
    in the ledger.
    """
    daemon.configure_logging(config.log)
    sender: list[subprocess.Popen[bytes]] = []

    def until() -> bool:
        if not sender:
            address = running.source.address  # type: ignore[attr-defined]
            command = [sys.executable, str(Path(__file__).with_name("send_frames.py")), address, str(SIZE), str(count)]
            sender.append(subprocess.Popen([*command, *pace]))
        accounts = running.ledger.runs()
        closed = bool(accounts) and accounts[0]["closed"] is not None
        if closed:
            over()
        return closed

    code = daemon.run(running, until)
    # A sender whose receiver has failed would wait for ever.
    sender[0].kill()
    sender[0].wait()
    account = running.ledger.runs()[0]
    if code or (account["published"] != count and (lossless or account["received"] != count)):
        raise RuntimeError(f"the path lost frames, its rate means nothing: {account}")
    return read_run(run_folders(config.archive.folder)[-1]).frames


def _cpu_seconds() -> dict[str, float]:
    """CPU time of each of this process's threads, the libraries' own together; those of the crew together too."""
    names = {thread.native_id: thread.name.rstrip("-0123456789") for thread in threading.enumerate()}
    spent: dict[str, float] = {}
    for task in Path("/proc/self/task").iterdir():
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        name = names.get(int(task.name), "libraries")
        if name != "MainThread":
            spent[name] = spent.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent
