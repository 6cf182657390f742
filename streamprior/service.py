"""What the daemon is at -> the service manager: systemd's notify protocol, and its watchdog for as long as the path moves.

The protocol (sd_notify(3)) is a datagram of KEY=VALUE lines to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping

import structlog

log = structlog.get_logger(__name__)

STALL_S = 30.0
"""A step that takes longer is stuck: none takes more than seconds, and where the world is away its room says so."""


class Service:
    """Tells the service manager that the daemon is ready, how it is, and that it is alive; silent where there is none.

    Parameters
    ----------
    stalled : names the room that holds the path up, "" while all moves. While one does, the watchdog is not fed, so the manager restarts
        the daemon. environment : where NOTIFY_SOCKET and WATCHDOG_USEC (microseconds between two signs of life) stand.
    """

    def __init__(
        self,
        stalled: Callable[[float], str],
        environment: Mapping[str, str] = os.environ,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is abstract: the kernel wants a zero byte there.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        watched = environment.get("WATCHDOG_USEC", "")
        self._every_s = float(watched) / 2e6 if watched.isdigit() else 0.0
        self._stalled, self._clock = stalled, clock
        self._fed = 0.0
        self._room = ""

    def ready(self, status: str) -> None:
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        self._tell("STOPPING=1\nSTATUS=draining")

    def tick(self) -> None:
        """Some times a second: looks whether the path moves, says once where it does not, and feeds the watchdog where it does."""
        room = self._stalled(STALL_S)
        if room != self._room:
            self._room = room
            if room:
                log.error("a room is stalled, the path stands still behind it", room=room, longer_than_s=STALL_S)
            else:
                log.info("the path moves again")
            self._tell(f"STATUS={'stalled in ' + room if room else 'running'}")
        now = self._clock()
        if self._every_s and not room and now - self._fed >= self._every_s:
            self._fed = now
            self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
            try:
                channel.sendto(text.encode(), self._address)
            except OSError as error:  # a manager that is gone is no reason to stop
                log.warning("the service manager does not listen", error=str(error))
                self._address = ""
