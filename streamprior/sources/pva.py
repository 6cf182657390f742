"""EPICS channel with NTNDArrays (areaDetector over pvAccess) -> updates in plain values; the only door to pvaccess."""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from typing import Any

import structlog

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.seams import Document, document_nbytes

log = structlog.get_logger(__name__)

_MOST_QUEUED = 64
"""Images that pvAccess may hold, here and in the IOC, where nobody counts their bytes: no more than 64, whatever `high_water_mark` says.
It holds few when it is not told: of 2000 images of 128 x 128 sent without a pause 595 were run over, with room for 64 it was 3."""


_ATTRIBUTE_BYTES = 500  # a small dict, a union as a tuple of two more


class PvaMonitor:
    """Owns the monitor of one channel. What its callback finds no room for is left out, and shows as a gap in the ids.

    pvAccess finds the channel as the environment says (EPICS_PVA_ADDR_LIST), waits for it, and connects again whenever it comes back. Where
    an IOC's beacons do not get through it asks less and less often, so that one that comes late is found after half a minute.
    At most `max_message_mb` of images wait here; then the newest of them makes way for the next, so that the last one always arrives and
    every loss lies between two images that did. That is how the monitor's own queue goes about it, too.

    Raises ConfigError where no channel is named, and from `open` where pvapy is not installed.
    """

    exhausted = False

    def __init__(self, settings: SourceSettings) -> None:
        if not settings.pv:
            raise ConfigError("source.pv: name the channel of the images, for example 13SIM1:Pva1:Image")
        self.name = settings.name
        self.address = settings.pv
        self._most_bytes = settings.max_message_mb * 2**20
        self._queued = min(settings.high_water_mark, _MOST_QUEUED)
        self._channel: Any = None
        self._held: deque[tuple[Document, int]] = deque()
        self._bytes = 0
        self.left_out = 0  # images, since it was opened
        self._fresh = True  # the next update tells what was there before we listened
        self._turn = threading.Condition()

    def open(self) -> None:
        try:
            import pvaccess
        except ImportError:
            raise ConfigError("source.kind: pva needs pvapy, which is not installed: pip install 'streamprior[epics]'") from None
        self._channel = pvaccess.Channel(self.address)
        self._channel.setConnectionCallback(self._connected)
        self._channel.subscribe(self.name, self._hear)
        self._channel.startMonitor(f"record[queueSize={self._queued}]field()")

    def receive(self, timeout_s: float) -> Document | None:
        """("ntnd", the fields of an NTNDArray): the selected array of the union `value` as `data`, and `first`, as the decoder explains."""
        with self._turn:
            if not self._turn.wait_for(lambda: bool(self._held), timeout_s):
                return None
            update, nbytes = self._held.popleft()
            self._bytes -= nbytes
            return update

    def close(self) -> None:
        if self._channel is None:
            return
        self._channel.stopMonitor()
        self._channel.unsubscribe(self.name)
        # Never destroyed: a thread of pvapy's, which makes the connection, may still be in it (5.6.0: the process then ended in
        # Channel::issueConnect with std::bad_weak_ptr, one time in sixty).
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._channel))
        overruns = self._channel.getMonitorCounters().get("nOverruns", 0)
        self._channel = None
        with self._turn:
            left_out, self._held, self._bytes = self.left_out, deque(), 0
        if left_out or overruns:
            log.warning("images were left out for want of room", pv=self.address, here=left_out, in_the_monitor=overruns)

    def _hear(self, update: Any) -> None:
        """pvAccess' thread: what it does not take at once, the monitor leaves out, so nothing is looked at here."""
        fields = update.get()
        union = fields.pop("value", None)
        array = union[0] if isinstance(union, tuple) and union and isinstance(union[0], dict) else {}
        fields |= {"data": array, "attribute": _named(fields.get("attribute"))}
        with self._turn:
            fields["first"] = self._fresh
            if self._fresh:
                log.info("channel connected", pv=self.address)
            self._fresh = False
            nbytes = document_nbytes(fields) + _ATTRIBUTE_BYTES * len(fields["attribute"])
            while self._held and self._bytes + nbytes > self._most_bytes:
                self._bytes -= self._held.pop()[1]
                self.left_out += 1
            self._held.append((("ntnd", fields), nbytes))
            self._bytes += nbytes
            self._turn.notify()

    def _connected(self, there: bool) -> None:
        """pvAccess' thread, when the channel comes or goes."""
        with self._turn:
            if not there and not self._fresh:
                log.warning("channel lost", pv=self.address)
                self._fresh = True


def _named(attributes: Any) -> list[dict[str, Any]]:
    """Name and value of each: with its alarm and its time stamps one takes ten times the memory, and an image may have a hundred."""
    listed = attributes if isinstance(attributes, list) else []
    return [{"name": one.get("name"), "value": one.get("value")} for one in listed if isinstance(one, dict)]
