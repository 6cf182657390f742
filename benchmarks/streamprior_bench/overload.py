"""More frames than can be refined: are all of them accounted for, do all have masks, and is everything done again afterwards? Verdicts."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import Table

from streamprior import daemon
from streamprior.catchup import CatchUp
from streamprior.config import Config, state_folder
from streamprior.ladder import Rung
from streamprior.ledger import read_ledger
from streamprior.prior import save_prior
from streamprior.records import Flag
from streamprior.sinks.archive import read_about, run_folders
from streamprior_bench.path import SIZE, Stopwatch, make_path_config, path_prior, rate_through, through
from streamprior_bench.send_frames import repeated_frames

THOUSAND_HZ, THOUSAND_S = 1000.0, 60.0
TIMES, OVERLOAD_S, AFTER_S = 5.0, 60.0, 20.0
CAUGHT_S = 5.0
"""Length of the overload whose frames are computed afterwards: that takes as long as not leaving them out would have."""

NORMAL_S = 0.25
"""A mask that is younger is as quick as without overload, to who looks."""

_NOT_REFINED = int(Flag.NOT_REFINED)


def run(repeats: int = 1) -> Iterator[dict[str, Any]]:
    """A minute at 1,000 frames/s; a minute at five times what can be refined, then at half of it; a short overload and its catch-up."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        save_prior(path_prior(), place / "prior.h5")
        config = make_path_config(place, True)
        sustained = statistics.median(rate_through(config, 1500)[0] for _ in range(max(1, repeats)))
        config = config.model_copy(update={"overload": config.overload.model_copy(update={"furthest": "masks"})})
        yield {"what": "what can be refined", "frames_per_s": sustained}
        yield _overload("60 s at 1,000 frames/s", config, THOUSAND_HZ, THOUSAND_S, sustained, 0.0)
        yield _overload("60 s at five times what can be refined", config, TIMES * sustained, OVERLOAD_S, sustained, AFTER_S)
        yield _caught_up(place, config, TIMES * sustained, sustained)


def _overload(what: str, config: Config, rate_hz: float, seconds: float, sustained: float, after_s: float) -> dict[str, Any]:
    rows, rungs, stopwatch = _sent(config, rate_hz, seconds, sustained, after_s)
    due = np.array([exposed for exposed, _, _ in stopwatch.seen])
    age = np.array([clock["classify"] for *_, clock in stopwatch.seen]) - due
    flags, count = rows["flags"].to_numpy(), round(rate_hz * seconds) + round(after_s * sustained / 2)
    refined = int(np.count_nonzero(flags & _NOT_REFINED == 0))
    slow = due >= due.min() + seconds
    late = due[slow & (age > NORMAL_S)]
    found: dict[str, Any] = {
        "what": what,
        "sent": count,
        "masks": len(flags),
        "refined": refined,
        "deepest_level": max((rung.level for _, rung in rungs), default=0),
        "steps": len(rungs),
        "mask_p50_ms": 1e3 * float(np.percentile(age, 50)),
        "mask_p99_ms": 1e3 * float(np.percentile(age, 99)),
    }
    kept = len(flags) == count and refined > 0
    if after_s:
        back_s = float(late.max() - due[slow].min()) if late.size else 0.0
        found |= {"normal_after_s": back_s, "refined_share_at_the_end": float(np.mean(flags[-100:] & _NOT_REFINED == 0))}
        kept = kept and back_s < 2.0 and bool(rungs)
    return found | {"verdict": "kept" if kept else "MISSED"}


def _sent(
    config: Config, rate_hz: float, seconds: float, sustained: float, after_s: float
) -> tuple[Table, list[tuple[float, Rung]], Stopwatch]:
    """(frames table, rungs with the Unix time that each was reached, when each result was there)."""
    stopwatch, rungs = Stopwatch(), list[tuple[float, Rung]]()
    running = daemon.build(config, [stopwatch], heard=lambda rung: rungs.append((time.time(), rung)))
    first, later = round(rate_hz * seconds), round(after_s * sustained / 2)
    pace = ["--rate-hz", str(rate_hz), *(["--then", str(first), str(sustained / 2)] if later else [])]
    return through(running, config, first + later, lambda: None, pace, lossless=False), rungs, stopwatch


def _caught_up(place: Path, config: Config, rate_hz: float, sustained: float) -> dict[str, Any]:
    rows, _, _ = _sent(config, rate_hz, CAUGHT_S, sustained, 0.0)
    count = round(rate_hz * CAUGHT_S)
    np.save(place / "scan.npy", np.stack(repeated_frames(SIZE, count)))
    folder, ledger = run_folders(config.archive.folder)[-1], state_folder() / "ledger"
    begun = time.perf_counter()
    task = CatchUp(folder, place / "scan.npy", config, ledger)
    written = sum(task.work())
    took_s = time.perf_counter() - begun
    task.tell_ledger()
    left = len(CatchUp(folder, place / "scan.npy", config, ledger).gap.indices)
    account = read_ledger(ledger).balance(read_about(folder)["uid"])
    told = account["balanced"] and account["published"] == count and not account["unrefined"]
    return {
        "what": "catch-up",
        "sent": count,
        "masks": len(rows),
        "written": written,
        "catch_up_frames_per_s": written / took_s,
        "left": left,
        "verdict": "kept" if written and not left and told else "MISSED",
    }
