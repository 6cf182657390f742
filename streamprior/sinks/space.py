"""A folder -> how much room is left on its disk: warned of early, short, or full."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from pathlib import Path

import structlog

from streamprior.errors import DiskFull

log = structlog.get_logger(__name__)

LOOK_S = 1.0
"""Between two looks. 1,000 frames/s with objects are 25 MB/s: a look is so much late."""

BACK = 1.25
"""Times a limit must be free again before its state is left: a limit that is crossed with every file would ring all day."""


class SpaceWatch:
    """Looks at the disk under a folder, in a thread of its own: of a network disk that hangs, the question hangs too.

    Reading `free_bytes` (NaN where not known), `short` and `full` is safe from any thread and never waits.

    Parameters
    ----------
    folder : on the disk that is looked at.
    short_bytes : with less than these free, `short`: what can be left out is to be left out (refinement, whose objects are most of it).
    full_bytes : with less, `full`: nothing large is written, so that the ends of runs still find room.
    shortage : called with True when the disk becomes short, with False when it has room again.
    """

    def __init__(self, folder: Path, short_bytes: int, full_bytes: int, shortage: Callable[[bool], None] = lambda short: None) -> None:
        self.free_bytes = math.nan
        self._folder, self._short_bytes, self._full_bytes = folder, max(short_bytes, full_bytes), full_bytes
        self._low = self._empty = False
        self._shortage = shortage
        self._refused = False  # the disk itself said so: a quota, which no look at the disk shows
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="space", daemon=True)

    @property
    def short(self) -> bool:
        return self._low or self.full

    @property
    def full(self) -> bool:
        return self._empty or self._refused

    @property
    def level(self) -> int:
        """0: room; 1: short; 2: full."""
        return 2 if self.full else int(self.short)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._leaving.set()

    def look(self) -> None:
        """Measure, and say aloud what has changed. Of a folder that is gone nothing is known: whoever writes there says what to do."""
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            self.free_bytes = math.nan
            return
        free = disk.f_bavail * disk.f_frsize
        before = self.level
        self.free_bytes = float(free)
        self._low = free < self._short_bytes * (BACK if self._low else 1)
        self._empty = free < self._full_bytes * (BACK if self._empty else 1)
        self._tell(before)

    def check(self) -> None:
        """Raises DiskFull below the last limit."""
        if self._empty:
            # No number in it: the same trouble is the same sentence, and is told once.
            raise DiskFull(
                f"archive {self._folder}: less than {_mib(self._full_bytes)} are free (archive.full_mb); free space on that disk,"
                " writing goes on by itself"
            )

    def refused(self) -> None:
        """A write failed for want of room, whatever the last look says."""
        before, self._refused = self.level, True
        self._tell(before)

    def taken(self) -> None:
        """A write went through."""
        if self._refused:
            before, self._refused = self.level, False
            self._tell(before)

    def foresee(self, series: str, needed_bytes: int) -> bool:
        """Whether a run that is expected to take so many bytes fits; says so where it does not."""
        self.look()
        fits = not self.free_bytes - self._full_bytes < needed_bytes  # also where it is not known
        if not fits:
            log.warning(
                "the disk is too small for this run; free space while it lasts",
                series=series,
                needed_bytes=needed_bytes,
                free_bytes=self.free_bytes,
                folder=str(self._folder),
            )
        return fits

    def _run(self) -> None:
        while not self._leaving.wait(LOOK_S):
            self.look()

    def _tell(self, before: int) -> None:
        if (self.level > 0) != (before > 0):
            self._shortage(self.short)
        facts = {"folder": str(self._folder), "free_bytes": self.free_bytes}
        if self.level > before and self.full:
            log.error("disk full: nothing is archived until there is room; free space on it", **facts)
        elif self.level > before:
            log.error("disk nearly full: free space on it, or the archive will stop", **facts)
        elif self.level < before:
            log.info("the disk has room again" if not self.short else "the disk has some room again, but is nearly full", **facts)


def _mib(size: int) -> str:
    return f"{size / 2**20:g} MiB"
