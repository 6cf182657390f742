"""Looks at the daemon itself (disk, sinks, ledger, card, overload) -> alarms beside those of the drift watch."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from streamprior.alarms import AlarmBook

LOOK_S = 1.0
"""Between two looks."""


@dataclass(frozen=True, slots=True)
class Look:
    """found : a sentence where something is wrong, "" where nothing is; must not wait. hold_s : how long it must be wrong to be told."""

    found: Callable[[], str]
    hold_s: float = 0.0


class TroubleWatch:
    """Looks once a second, in a thread of its own.

    Parameters
    ----------
    book : is told what stands. looks : name -> look. clock : monotonic seconds.
    """

    def __init__(self, book: AlarmBook, looks: Mapping[str, Look], clock: Callable[[], float] = time.monotonic) -> None:
        self._book, self._looks, self._clock = book, dict(looks), clock
        self._since: dict[str, float] = {}
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="troubles", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._leaving.set()

    def look(self) -> None:
        """At everything, once."""
        now, found = self._clock(), {}
        for name, look in self._looks.items():
            sentence = look.found()
            if not sentence:
                self._since.pop(name, None)
            lasted_s = now - self._since.setdefault(name, now) if sentence else 0.0
            found[name] = sentence if lasted_s >= look.hold_s else ""
        self._book.troubles(found)

    def _run(self) -> None:
        while not self._leaving.wait(LOOK_S):
            self.look()
