"""The demo: twin -> real socket -> daemon -> embedded Tiled, on this machine alone, and a summary of what happened."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from streamprior import daemon
from streamprior.config import make_config
from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.ledger import account_line
from streamprior.records import Result, RunStarted
from streamprior.sinks.archive import read_about, read_run, run_folders
from streamprior.sinks.embedded import EmbeddedTiled, embedded_tiled
from streamprior.sinks.rows import read_columns


@dataclass(frozen=True, slots=True)
class DemoSettings:
    """scenario of the twin, frames and frames a second, whether it ends by itself, port of the page (0: any free one), and for a
    ptychography scan the file with its probe."""

    scenario: str
    frames: int
    rate_hz: float
    headless: bool
    port: int
    probe: Path | None = None


@contextmanager
def workplace(folder: Path | None) -> Iterator[Path]:
    """The demo's folder; a temporary one is removed with everything in it."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.absolute()
        return
    with tempfile.TemporaryDirectory(prefix="streamprior-demo-") as temporary:
        yield Path(temporary)


class Stopwatch:
    """Keeps the clocks of the newest results; it stands in the path where the drift watch does."""

    name = "stopwatch"

    def __init__(self, most: int = 100_000) -> None:
        self.results: deque[tuple[float, tuple[tuple[str, float], ...]]] = deque(maxlen=most)

    def begin(self, run: RunStarted) -> None: ...

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        for result in results:
            exposed = result.detector_time if result.detector_time is not None else result.received
            self.results.append((exposed, (("receive", result.received), *result.clock)))
        return list(results)


def run(settings: DemoSettings, place: Path, prior: Path, out: Console) -> int:
    """Start everything, wait (for the run's end when headless, for Ctrl-C otherwise), print the summary. Returns the exit code."""
    archive = place / "archive"
    archive.mkdir(exist_ok=True)
    with out.status("starting Tiled, which takes some seconds"), tiled_beside(place, [archive]) as tiled:
        stopwatch = Stopwatch()
        config = make_config(
            {
                "prior": str(prior),
                "source": {"address": "tcp://127.0.0.1:*", "name": "twin"},
                "archive": {"folder": str(archive)},
                "tiled": {"uri": tiled.uri, "api_key_file": str(key_file(place, tiled))},
                "http": {"port": settings.port},
                "log": {"level": "warning"},
                **({"recipe": "ptycho", "mosaic": {"probe": str(settings.probe)}} if settings.probe is not None else {}),
            },
            "demo",
        )
        daemon.configure_logging(config.log)
        running = daemon.build(config, [stopwatch])
        return _play(settings, running, stopwatch, tiled, archive, out)


def _play(settings: DemoSettings, running: daemon.Daemon, stopwatch: Stopwatch, tiled: EmbeddedTiled, archive: Path, out: Console) -> int:
    twins: list[subprocess.Popen[bytes]] = []
    said: list[str] = []

    def until() -> bool:
        """Called over and over by the daemon: starts the twin once the socket is there, and says when the run is over."""
        if not twins:
            print_places(running, tiled, archive, out)
            ending = "ends by itself" if settings.headless else "Ctrl-C ends it"
            out.print(f"{settings.frames} frames of scenario {settings.scenario} at {settings.rate_hz:g} Hz; {ending}", highlight=False)
            twins.append(_start_twin(settings, running.source))
        accounts = running.ledger.runs()
        if twins[0].poll() not in (None, 0) and not accounts:
            return True
        over = bool(accounts) and accounts[0]["closed"] is not None and not (running.mosaic is not None and running.mosaic.busy)
        if over and not said and not settings.headless:
            said.append("The run is over and archived; page and Tiled stay up until Ctrl-C.")
            out.print(said[0])
        return settings.headless and over

    try:
        code = daemon.run(running, until)
    finally:
        for process in twins:
            process.terminate()
            process.wait()
    return max(code, _summary(settings, running, stopwatch, archive, out))


def _start_twin(settings: DemoSettings, source: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "streamprior.cli", "twin", settings.scenario, "--to", source.address]
    return subprocess.Popen([*command, "--rate", str(settings.rate_hz), "--frames", str(settings.frames)], stderr=subprocess.DEVNULL)


@contextmanager
def tiled_beside(place: Path, readable: Sequence[Path]) -> Iterator[EmbeddedTiled]:
    """A Tiled in this folder that may read those. Raises ConfigError where it does not start."""
    try:
        with embedded_tiled(place / "tiled", readable) as tiled:
            yield tiled
    except SinkUnavailable as error:
        raise ConfigError(f"{place}: {error}") from None


def key_file(place: Path, tiled: EmbeddedTiled) -> Path:
    """The server's key, in a file that only its owner reads."""
    file = place / "tiled-api-key"
    file.touch(mode=0o600)
    file.write_text(tiled.api_key)
    return file


def print_places(running: daemon.Daemon, tiled: EmbeddedTiled, archive: Path, out: Console) -> None:
    """Where to look while it runs."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("live page", running.server.url)
    table.add_row("metrics", f"{running.server.url}/metrics")
    table.add_row("ledger", f"{running.server.url}/ledger")
    table.add_row("Tiled", f"{tiled.uri}?api_key={tiled.api_key}")
    table.add_row("in Python", f'tiled.client.from_uri("{tiled.uri}", api_key="{tiled.api_key}")["streamprior"]')
    table.add_row("archive", str(archive))
    out.print(table, soft_wrap=True)


def _summary(settings: DemoSettings, running: daemon.Daemon, stopwatch: Stopwatch, archive: Path, out: Console) -> int:
    """Ledger, rate and latencies; 1 unless every frame of a headless demo is published and the ledger balances."""
    accounts = running.ledger.runs()
    for account in accounts:
        out.print(account_line(account), markup=False, highlight=False, soft_wrap=True)
    if stopwatch.results:
        _print_latencies(stopwatch, archive, out)
    if running.mosaic is not None:
        _print_mosaic(archive, out)
    if accounts:
        _print_left_out(accounts[0], out)
    if stopwatch.results:
        _print_alarms(archive, out)
    published = accounts[0]["published"] if accounts else 0
    whole = running.ledger.is_balanced() and (published == settings.frames or not settings.headless)
    out.print(f"{published} of {settings.frames} published, ledger {'balanced' if running.ledger.is_balanced() else 'NOT balanced'}")
    return 0 if whole else 1


def _print_left_out(account: Mapping[str, Any], out: Console) -> None:
    """What the path did without, and why; where it was behind, a lower --rate shows all of it."""
    unrefined, dropped = account["unrefined"], sum(account["dropped"].values())
    if not unrefined and not dropped:
        out.print("nothing was left out")
        return
    why = f" ({', '.join(f'{reason} {count}' for reason, count in unrefined.items())})" if unrefined else ""
    out.print(f"{sum(unrefined.values())} frames have a mask alone{why}, {dropped} were left out altogether", highlight=False)
    if "overload" in unrefined or "classify/overload" in account["dropped"]:
        out.print("this machine was behind; a lower --rate leaves it time for all of them")


def _print_alarms(archive: Path, out: Console) -> None:
    """The drift alarms of the run: which signals, in how many frames, and whether they stood to its end."""
    index, alarms = read_columns(run_folders(archive)[-1] / "frames", ("index", "alarms"))
    standing = {name: [i for i, names in zip(index.tolist(), alarms, strict=True) if name in names.split(",")] for name in _named(alarms)}
    for name, frames in standing.items():
        until = "to the end" if frames[-1] == index[-1] else f"to frame {frames[-1]}"
        out.print(f"drift alarm: {name}, in {len(frames)} frames, from frame {frames[0]} {until}", highlight=False)
    if not standing:
        out.print("no drift alarm")


def _named(alarms: Iterable[str]) -> list[str]:
    return sorted({name for names in alarms for name in names.split(",") if name})


def _print_latencies(stopwatch: Stopwatch, archive: Path, out: Console) -> None:
    results = list(stopwatch.results)
    received = np.array([dict(clock)["receive"] for _, clock in results])
    rate = (len(results) - 1) / max(received[-1] - received[0], 1e-9) if len(results) > 1 else 0.0
    out.print(f"{rate:.1f} frames/s")
    table = Table("milliseconds", "p50", "p99", title="time a frame spends, by stage", title_justify="left")
    for stage, seconds in time_spent(results).items():
        _add(table, {"receive": "wire: exposure to socket", "wait": "queue before the worker"}.get(stage, stage), seconds)
    table.add_section()
    for output, stage in (("mask", "classify"), ("reconstruction", "refine")):
        latencies = [dict(clock)[stage] - exposed for exposed, clock in results if stage in dict(clock)]
        if latencies:
            _add(table, f"latency of the {output}", latencies)
    frames = read_run(run_folders(archive)[-1]).frames
    _add(table, "latency of the archive", frames["published"].to_numpy() - frames["detector_time"].to_numpy())
    out.print(table)


def time_spent(results: Sequence[tuple[float, tuple[tuple[str, float], ...]]]) -> dict[str, list[float]]:
    """(exposed, clock) of each frame -> stage -> seconds in it, of the frames that went through it: under overload some miss a few."""
    spent: dict[str, list[float]] = {stage: [] for stage, _ in max((clock for _, clock in results), key=len)}
    for exposed, clock in results:
        before = exposed
        for stage, done in clock:
            spent[stage].append(done - before)
            before = done
    return spent


def _print_mosaic(archive: Path, out: Console) -> None:
    """What the image of the sample is worth, and where it lies."""
    folder = run_folders(archive)[-1]
    about = read_about(folder).get("mosaic")
    if about is None:
        out.print("no mosaic: no frame had a position")
        return
    scale, unit = (1e9, "nm") if about["unit"] == "m" else (1.0, "px")
    known = {name: about[name] for name in ("resolution", "disagreement", "chi2") if about[name] is not None}
    words = [f"{about['shape'][0]} x {about['shape'][1]} pixels of {about['pixel'][0] * scale:.3g} {unit} from {about['frames_in']} frames"]
    words += [f"resolution {known['resolution'] * scale:.3g} {unit} (half period)"] if "resolution" in known else []
    words += [f"odd and even frames differ by {known['disagreement']:.0%} of the contrast"] if "disagreement" in known else []
    out.print(f"mosaic: {', '.join(words)}: {folder / about['file']}", highlight=False, soft_wrap=True)
    for warning in about["warnings"]:
        out.print(f"mosaic: {warning}", markup=False, highlight=False, soft_wrap=True)


def _add(table: Table, name: str, seconds: Any) -> None:
    table.add_row(name, f"{1e3 * np.percentile(seconds, 50):.2f}", f"{1e3 * np.percentile(seconds, 99):.2f}")
