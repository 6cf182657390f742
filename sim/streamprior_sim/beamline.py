"""A twin with motors -> a Bluesky beamline: a RunEngine, grid scans, and something that goes wrong during one of them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bluesky.plans as bp
from bluesky import RunEngine
from ophyd_async.core import StaticPathProvider, UUIDFilenameProvider

from streamprior.errors import ConfigError
from streamprior_sim.ophyd import Disturbance, TwinDetector, TwinMotors, twin_motors
from streamprior_sim.twin import Twin

Say = Callable[[str, Mapping[str, Any]], None]
"""(what happened, its particulars): called from the RunEngine's thread."""


_HALF_THE_FLUX = Disturbance(flux=0.5)


@dataclass(frozen=True, slots=True)
class Beamtime:
    """What is scanned, and what goes wrong.

    scans : how many. rows, columns : points of a scan. disturbed : which scan is, from 1; 0: none. at : point at which it begins.
    recovers_s : seconds after which it is over. settle_s : between two scans, so that a receiver closes one before the next.
    """

    scans: int
    rows: int
    columns: int
    disturbed: int = 2
    at: int = 100
    recovers_s: float = 8.0
    settle_s: float = 0.5
    disturbance: Disturbance = _HALF_THE_FLUX


def run_beamtime(
    engine: RunEngine, detector: TwinDetector, motors: TwinMotors, box_m: Sequence[tuple[float, float]], beamtime: Beamtime, say: Say
) -> None:
    """Scan after scan, line by line.

    Parameters
    ----------
    box_m : first and last place of each, metres.
    say : told of "scan" (number, uid, scan_id), "event" (number, seq_num), "disturbed", "recovered" and "done" (number, exit_status,
        events).
    """
    (x, y), (x_m, y_m) = motors, box_m
    axes = (y, y_m[0] * 1e3, y_m[1] * 1e3, beamtime.rows, x, x_m[0] * 1e3, x_m[1] * 1e3, beamtime.columns)
    for number in range(1, beamtime.scans + 1):
        watch = _Watch(detector, beamtime, number, say)
        engine(bp.grid_scan([detector], *axes, snake_axes=False, md={"sample": detector.name, "purpose": "simulated beamtime"}), watch)
        time.sleep(beamtime.settle_s)


def box_of(twin: Twin) -> tuple[tuple[float, float], tuple[float, float]]:
    """First and last place of x and of y that the scenario's scan reaches, metres. Raises ConfigError for a scenario without one."""
    places = [place for place in (twin.position(index) for index in range(len(twin))) if place is not None]
    if not places:
        raise ConfigError(f"scenario {twin.name}: has no positions to scan; choose one of ptychography, for example gold_balls")
    xs, ys = zip(*places, strict=True)
    return (min(xs), max(xs)), (min(ys), max(ys))


def station(engine: RunEngine, twin: Twin, folder: Path, wire: str) -> tuple[TwinDetector, TwinMotors]:
    """The detector, which writes into `folder` and sends over stream V2 to `wire`, and the motors, connected in the engine's event loop."""

    async def connected() -> tuple[TwinDetector, TwinMotors]:
        motors = twin_motors(twin)
        detector = TwinDetector(twin, StaticPathProvider(UUIDFilenameProvider(), folder.absolute()), wire=wire, motors=motors)
        for device in (detector, *motors):
            await device.connect()
        return detector, motors

    return asyncio.run_coroutine_threadsafe(connected(), engine.loop).result()


class _Watch:
    """Hears the documents of one scan, and disturbs the beam where that is due."""

    def __init__(self, detector: TwinDetector, beamtime: Beamtime, number: int, say: Say) -> None:
        self._detector, self._beamtime, self._number, self._say = detector, beamtime, number, say

    def __call__(self, name: str, document: Mapping[str, Any]) -> None:
        if name == "start":
            self._say("scan", {"number": self._number, "uid": document["uid"], "scan_id": document["scan_id"]})
        elif name == "event":
            self._say("event", {"number": self._number, "seq_num": document["seq_num"]})
            if self._number == self._beamtime.disturbed and document["seq_num"] == self._beamtime.at:
                self._disturb()
        elif name == "stop":
            events = sum(document["num_events"].values()) if document.get("num_events") else 0
            self._say("done", {"number": self._number, "exit_status": document["exit_status"], "events": events})

    def _disturb(self) -> None:
        self._detector.disturbance = self._beamtime.disturbance
        self._say("disturbed", {"number": self._number, "for_s": self._beamtime.recovers_s})
        recovery = threading.Timer(self._beamtime.recovers_s, self._recover)
        recovery.daemon = True
        recovery.start()

    def _recover(self) -> None:
        self._detector.disturbance = None
        self._say("recovered", {"number": self._number})
