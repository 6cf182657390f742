"""Half an hour at a third of what can be refined: is anything lost, and does memory, a descriptor or a thread stay behind? A verdict."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior import daemon
from streamprior.prior import save_prior
from streamprior.records import Flag
from streamprior_bench.path import make_path_config, path_prior, rate_through, through

LENGTH_S, WARM_S, LOOK_S = 1800.0, 60.0, 2.0
"""Of the run; of its beginning, which is left out; between two looks at what the process holds."""

PART = 1 / 3
"""Of the rate that can be sustained."""


def run(repeats: int = 1) -> Iterator[dict[str, Any]]:
    """One row. Memory is flat where its slope is within twice its own error, or comes to less than 1 MB an hour."""
    with tempfile.TemporaryDirectory() as folder:
        save_prior(path_prior(), Path(folder) / "prior.h5")
        config = make_path_config(Path(folder), True)
        rate_hz = PART * rate_through(config, 1500)[0]
        running = daemon.build(config)
        looks: list[tuple[float, ...]] = []
        over = threading.Event()
        looking = threading.Thread(target=_look, args=(looks, over), daemon=True)
        looking.start()
        count = round(LENGTH_S * rate_hz)
        rows = through(running, config, count, over.set, ("--rate-hz", str(rate_hz), "--long"))
        looking.join()
        yield _verdict(np.array(looks), count, len(rows), int(np.count_nonzero(rows["flags"].to_numpy() & int(Flag.NOT_REFINED))), rate_hz)


def _look(looks: list[tuple[float, ...]], over: threading.Event) -> None:
    """Seconds, resident bytes, open descriptors and threads of this process, again and again."""
    page, number = os.sysconf("SC_PAGE_SIZE"), 0
    while not over.wait(LOOK_S):
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
        looks.append((number * LOOK_S, resident, len(os.listdir("/proc/self/fd")), threading.active_count()))
        number += 1


def _verdict(looks: npt.NDArray[np.float64], sent: int, archived: int, unrefined: int, rate_hz: float) -> dict[str, Any]:
    warm = looks[looks[:, 0] > WARM_S]
    # What came before the first frame (the sender encodes nothing, but its process starts) lies within the minute that is left out.
    (slope, level), covariance = np.polyfit(warm[:, 0], warm[:, 1], 1, cov=True)
    error = float(np.sqrt(covariance[0, 0]))
    flat = slope < max(2 * error, 1e6 / 3600)
    # A look may fall into the writing of a file: what counts is whether any stays open.
    quarter = max(1, len(warm) // 4)
    constant = np.array_equal(np.median(warm[:quarter, 2:], 0), np.median(warm[-quarter:, 2:], 0))
    return {
        "what": f"{LENGTH_S:.0f} s at a third of what can be refined",
        "rate_hz": rate_hz,
        "sent": sent,
        "archived": archived,
        "unrefined": unrefined,
        "resident_mb": float(level) / 1e6,
        "resident_mb_per_hour": 3600e-6 * float(slope),
        "error_mb_per_hour": 3600e-6 * error,
        "descriptors": [int(warm[:, 2].min()), int(warm[:, 2].max())],
        "threads": [int(warm[:, 3].min()), int(warm[:, 3].max())],
        "verdict": "kept" if sent == archived and not unrefined and flat and constant else "MISSED",
    }
