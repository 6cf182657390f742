"""The service manager hears that the daemon is ready, and its watchdog is fed only while the path moves."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from streamprior.service import STALL_S, Service
from tests.builders import diffraction
from tests.test_path import House, Kept, series


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
        channel.bind(str(tmp_path / "notify"))
        channel.settimeout(10)
        yield channel


def environment(manager: socket.socket, **more: str) -> dict[str, str]:
    return {"NOTIFY_SOCKET": manager.getsockname(), **more}


def heard(manager: socket.socket) -> list[str]:
    manager.setblocking(False)
    said = []
    try:
        while True:
            said.append(manager.recv(1000).decode())
    except BlockingIOError:
        return said


def test_the_manager_hears_when_the_daemon_is_ready_and_when_it_leaves(manager: socket.socket) -> None:
    service = Service(lambda after_s: "", environment(manager))
    service.ready("frames from here")
    service.stopping()
    assert heard(manager) == ["READY=1\nSTATUS=frames from here", "STOPPING=1\nSTATUS=draining"]


def test_the_watchdog_is_fed_twice_an_interval_and_not_while_a_room_is_stalled(manager: socket.socket) -> None:
    room, now = [""], [100.0]
    service = Service(lambda after_s: room[0], environment(manager, WATCHDOG_USEC="10000000"), clock=lambda: now[0])
    for _ in range(200):
        now[0] += 0.1
        service.tick()
    assert heard(manager) == ["WATCHDOG=1"] * 4
    room[0] = "compute-1"
    for _ in range(200):
        now[0] += 0.1
        service.tick()
    assert heard(manager) == ["STATUS=stalled in compute-1"]
    room[0] = ""
    now[0] += 0.1
    service.tick()
    assert heard(manager) == ["STATUS=running", "WATCHDOG=1"]


def test_without_a_manager_or_with_one_that_is_gone_nothing_happens(tmp_path: Path) -> None:
    Service(lambda after_s: "", {}).ready("anything")
    gone = Service(lambda after_s: "", {"NOTIFY_SOCKET": str(tmp_path / "nobody"), "WATCHDOG_USEC": "1000"})
    gone.ready("anything")
    gone.tick()


def test_the_room_that_holds_the_path_up_is_named() -> None:
    """The archive is stuck; the rooms before it wait for it, one after another, and are not what is to be mended."""
    archive, live = Kept(), Kept("live", complete=False)
    archive.stuck = live.stuck = threading.Event()
    house = House(series(diffraction(count=400)), [archive, live])
    house.path.start()
    deadline = time.monotonic() + 30
    # Nothing but the stuck call takes longer: the first frames wait for a worker that makes its plans.
    while house.path.stalled(1.5) != "publish-archive" and time.monotonic() < deadline:
        threading.Event().wait(0.05)
    assert house.path.stalled(1.5) == "publish-archive"
    assert house.path.stalled(STALL_S) == ""
    archive.stuck.set()
    assert house.path.join(60)
    assert len(archive.results) == 400


def test_a_disk_that_is_away_is_no_stalled_room() -> None:
    house = House([], [Kept(), Kept("live", complete=False)])
    archive, live = house.path._outboxes
    house.path._began = {"decode": -1e9, "publish-live": -1e9}
    archive.up, live.up = False, True
    assert house.path.stalled(STALL_S) == ""
    archive.up = True
    assert house.path.stalled(STALL_S) == "decode"
    house.path._began = {"publish-live": -1e9}
    assert house.path.stalled(STALL_S) == ""
