"""A whole beamtime on this machine: RunEngine and twin, proxy, daemon and Tiled -> scans, and an account of what they left behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from streamprior import daemon
from streamprior.config import make_config
from streamprior.demo import key_file, print_places, tiled_beside
from streamprior.ledger import account_line
from streamprior.sinks.archive import read_about, read_run, run_folders
from streamprior.sinks.embedded import EmbeddedTiled

RAW = "raw"
"""Container in Tiled that the RunEngine's own documents go into."""

Report = Callable[[str, int, int], None]

_SETTLE_S = 60.0
"""How long the last run may take to be archived and registered after the last scan."""


@dataclass(frozen=True, slots=True)
class BeamtimeSettings:
    """scenario of the twin, how many scans of how many rows and columns, which scan is disturbed (from 1; 0: none), whether it ends by
    itself, port of the page (0: any free one), file with the probe of a ptychography scan."""

    scenario: str
    scans: int
    rows: int
    columns: int
    disturbed: int
    headless: bool
    port: int
    probe: Path | None = None


@dataclass
class Diary:
    """What the beamline said: (Unix seconds, what, particulars), and the scans by number."""

    entries: list[tuple[float, str, Mapping[str, Any]]] = field(default_factory=list)
    scans: dict[int, dict[str, Any]] = field(default_factory=dict)

    def write(self, what: str, told: Mapping[str, Any]) -> None:
        if what == "scan":
            self.scans[told["number"]] = dict(told)
        elif what == "done":
            self.scans[told["number"]] |= told
        if what != "event":
            self.entries.append((time.time(), what, told))

    def count(self, what: str) -> int:
        return sum(one == what for _, one, _ in self.entries)


@dataclass(frozen=True, slots=True)
class Found:
    """What a scan left behind. frames, positions : results archived, and those of them with a position. raw, results, documents : whether
    Tiled has the raw run, our results by its uid, and our numbers as a Bluesky run. alarms : drift signals whose alarm was on -> how
    many frames."""

    number: int
    uid: str
    frames: int
    positions: int
    raw: bool
    results: bool
    documents: bool
    alarms: Mapping[str, int]


def run(settings: BeamtimeSettings, place: Path, prior: Path, out: Console, progress: Report) -> int:
    """Start everything, scan, print what became of it. Returns the exit code: 0 where every scan is whole, linked and found."""
    archive, frames = place / "archive", place / "detector"
    for folder in (archive, frames):
        folder.mkdir(exist_ok=True)
    with out.status("starting Tiled, which takes some seconds"), tiled_beside(place, [archive, frames]) as tiled, proxy() as (into, out_of):
        config = make_config(_config(settings, place, prior, tiled, out_of), "beamtime")
        daemon.configure_logging(config.log)
        running = daemon.build(config)
        return _play(settings, running, tiled, place, into, out, progress)


def _config(settings: BeamtimeSettings, place: Path, prior: Path, tiled: EmbeddedTiled, documents: str) -> dict[str, Any]:
    return {
        "prior": str(prior),
        "source": {"address": "tcp://127.0.0.1:*", "name": "twin"},
        "positions": {"x": "x", "y": "y", "address": f"tcp://{documents}", "wait_s": 2.0},
        "runs": {"late_s": 3.0},
        "archive": {"folder": str(place / "archive")},
        "tiled": {"uri": tiled.uri, "api_key_file": str(key_file(place, tiled)), "documents": True},
        "http": {"port": settings.port},
        "log": {"level": "warning"},
        **({"recipe": "ptycho", "mosaic": {"probe": str(settings.probe)}} if settings.probe is not None else {}),
    }


@contextmanager
def proxy() -> Iterator[tuple[str, str]]:
    """Bluesky's own proxy in a process of its own: (HOST:PORT that publishers connect to, HOST:PORT that consumers connect to)."""
    into, out_of = (f"127.0.0.1:{port}" for port in _free_ports(2))
    command = [sys.executable, "-m", "bluesky.commandline.zmq_proxy", "--in-address", into, "--out-address", out_of]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield into, out_of
    finally:
        process.terminate()
        process.wait(10)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _play(
    settings: BeamtimeSettings, running: daemon.Daemon, tiled: EmbeddedTiled, place: Path, into: str, out: Console, progress: Report
) -> int:
    diary = Diary()
    beamlines: list[subprocess.Popen[str]] = []
    over_at: list[float] = []

    def until() -> bool:
        """Called over and over by the daemon: starts the beamline once the sockets are there, and says when everything is over."""
        if not beamlines:
            print_places(running, tiled, place / "archive", out)
            beamlines.append(_start_beamline(settings, running, tiled, place / "detector", into))
            threading.Thread(target=_listen, args=(beamlines[0], diary, settings, out, progress), daemon=True).start()
        if beamlines[0].poll() is None:
            return False
        over_at.append(time.monotonic())
        accounts = running.ledger.runs()
        closed = bool(accounts) and all(one["closed"] is not None for one in accounts if one["run"] is not None)
        settled = closed and not (running.mosaic is not None and running.mosaic.busy)
        if len(over_at) == 1 and not settings.headless:
            out.print("The beamtime is over; page and Tiled stay up until Ctrl-C.")
        return settings.headless and (settled or time.monotonic() - over_at[0] > _SETTLE_S)

    try:
        code = daemon.run(running, until)
    finally:
        for process in beamlines:
            process.terminate()
            process.wait()
    return max(code, beamlines[0].returncode != 0 if settings.headless else 0, _summary(settings, running, diary, tiled, place, out))


def _start_beamline(
    settings: BeamtimeSettings, running: daemon.Daemon, tiled: EmbeddedTiled, folder: Path, into: str
) -> subprocess.Popen[str]:
    told = {
        "--to": getattr(running.source, "address", ""),
        "--documents": into,
        "--daemon": running.server.url,
        "--tiled": tiled.uri,
        "--folder": str(folder),
        "--scans": str(settings.scans),
        "--rows": str(settings.rows),
        "--columns": str(settings.columns),
        "--disturbed": str(settings.disturbed),
    }
    command = [
        sys.executable,
        "-m",
        "streamprior.cli",
        "beamline",
        settings.scenario,
        "--json",
        *(part for one in told.items() for part in one),
    ]
    log = (folder.parent / "beamline.log").open("w")
    environment = {**os.environ, "TILED_API_KEY": tiled.api_key}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)


def _listen(process: subprocess.Popen[str], diary: Diary, settings: BeamtimeSettings, out: Console, progress: Report) -> None:
    """The beamline's words: a JSON object a line, among what the RunEngine itself prints."""
    assert process.stdout is not None
    for line in process.stdout:
        if not line.startswith("{"):
            continue
        told = json.loads(line)
        what = told.pop("what")
        diary.write(what, told)
        if what == "event":
            progress(f"scan {told['number']}", told["seq_num"], settings.rows * settings.columns)
        elif what in _WORDS:
            out.print(f"{time.strftime('%H:%M:%S')} {_WORDS[what].format(**told)}", markup=False, highlight=False, soft_wrap=True)


_WORDS = {
    "scan": "scan {number} begins: {uid}",
    "disturbed": "the beam is disturbed for {for_s:g} s",
    "recovered": "the beam has recovered",
    "paused": "the plan is paused: {why}",
    "resumed": "the plan goes on",
    "done": "scan {number} is over: {exit_status}, {events} events",
}


def _summary(settings: BeamtimeSettings, running: daemon.Daemon, diary: Diary, tiled: EmbeddedTiled, place: Path, out: Console) -> int:
    for account in running.ledger.runs():
        out.print(account_line(account), markup=False, highlight=False, soft_wrap=True)
    found = [look_up(number, scan["uid"], place / "archive", tiled) for number, scan in sorted(diary.scans.items())]
    table = Table("scan", "results", "with position", "raw run", "results by its uid", "Bluesky run of results", "alarms")
    for one in found:
        marks = ["yes" if there else "NO" for there in (one.raw, one.results, one.documents)]
        alarms = ", ".join(f"{signal} on {count} frames" for signal, count in one.alarms.items())
        table.add_row(str(one.number), str(one.frames), str(one.positions), *marks, alarms or "none")
    out.print(table)
    out.print(f"paused {diary.count('paused')} times, resumed {diary.count('resumed')} times", highlight=False)
    points = settings.rows * settings.columns
    whole = len(found) == settings.scans and all(one.positions == points and one.raw and one.results and one.documents for one in found)
    disturbed = not settings.disturbed or (diary.count("paused") > 0 and diary.count("resumed") > 0)
    return 0 if whole and disturbed and running.ledger.is_balanced() else 1


def look_up(number: int, uid: str, archive: Path, tiled: EmbeddedTiled) -> Found:
    """Everything that a scan left, found by the uid of its start document."""
    from streamprior.sources.tiled import find_by_start

    results, x = 0, np.empty(0)
    alarms: dict[str, int] = {}
    for folder in run_folders(archive):
        if read_about(folder)["metadata"].get("start", {}).get("uid") == uid:
            frames = read_run(folder).frames
            results, x = frames.num_rows, frames["position_x"].to_numpy()
            on = [signal for row in frames["alarms"].to_pylist() for signal in row.split(",") if signal]
            alarms = {signal: on.count(signal) for signal in sorted(set(on))}
    kinds = find_by_start(tiled.uri, tiled.api_key, uid)
    return Found(
        number=number,
        uid=uid,
        frames=results,
        positions=int(np.isfinite(x).sum()),
        raw="raw" in kinds,
        results="results" in kinds,
        documents="documents" in kinds,
        alarms=alarms,
    )
