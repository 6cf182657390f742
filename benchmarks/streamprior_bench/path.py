"""The whole path, socket to archive, beside what its stages alone could do on the same cores: frames a second and their ratio."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from streamprior import daemon
from streamprior.config import Config, make_config
from streamprior.crew import think
from streamprior.prior import Prior, save_prior
from streamprior.records import Detector, Frame, RunStarted
from streamprior.sinks.archive import read_run, run_folders
from streamprior.stages.recipe import Recipe
from streamprior_bench.classify import synthetic_frames, synthetic_prior
from streamprior_bench.send_frames import repeated_frames

SIZE = 128
BLOCK = 16
"""Frames a worker takes at once, as the daemon's default."""


def run(repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Refinement on (its defaults, from a flat start) and off, 128 x 128 uint16, a sender in a process of its own that shares the cores."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        prior = _prior()
        save_prior(prior, Path(folder) / "prior.h5")
        for refine, frames in ((True, 3000), (False, 12000)):
            config = _config(Path(folder), refine)
            alone, through = [], []
            for _ in range(repeats):
                alone.append(_stages_alone(config, prior, cores, min(frames, 2000)))
                through.append(_through(config, frames))
            kernels, path = statistics.median(alone), statistics.median(through)
            yield {
                "what": f"{SIZE}x{SIZE} uint16, refinement {'on' if refine else 'off'}",
                "frames": frames,
                "cores": cores,
                "path_frames_per_s": path,
                "stages_alone_frames_per_s": kernels,
                "path_over_stages": path / kernels,
            }


def _prior() -> Prior:
    """Three classes and a support of a third of the field."""
    prior = synthetic_prior(synthetic_frames(SIZE), 3)
    support = np.zeros((SIZE, SIZE), np.bool_)
    support[SIZE // 3 : -SIZE // 3, SIZE // 3 : -SIZE // 3] = True
    return replace(prior, support=support)


def _config(folder: Path, refine: bool) -> Config:
    return make_config(
        {
            "prior": str(folder / "prior.h5"),
            "source": {"address": "tcp://127.0.0.1:*"},
            "refine": {"enabled": refine},
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


def _through(config: Config, count: int) -> float:
    """Frames a second from the first message out of the socket to the archive's last block."""
    daemon.configure_logging(config.log)
    running = daemon.build(config)
    sender: list[subprocess.Popen[bytes]] = []

    def until() -> bool:
        if not sender:
            address = running.source.address  # type: ignore[attr-defined]
            sender.append(
                subprocess.Popen([sys.executable, str(Path(__file__).with_name("send_frames.py")), address, str(SIZE), str(count)])
            )
        accounts = running.ledger.runs()
        return bool(accounts) and accounts[0]["closed"] is not None

    code = daemon.run(running, until)
    # A sender whose receiver has failed would wait for ever.
    sender[0].kill()
    sender[0].wait()
    account = running.ledger.runs()[0]
    if code or account["published"] != count:
        raise RuntimeError(f"the path lost frames, its rate means nothing: {account}")
    rows = read_run(run_folders(config.archive.folder)[-1]).frames
    return count / float(rows["published"].to_numpy().max() - rows["received"].to_numpy().min())
