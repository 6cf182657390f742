"""What became of every frame: received = published + dropped + quarantined + in flight, per run, one byte a frame."""

from __future__ import annotations

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from streamprior.records import Detector, RunEnded, RunStarted

KEPT_RUNS = 64
"""Runs that stay in memory after they ended, newest first; their results are in the archive for good."""

_UNSEEN, _IN_FLIGHT, _PUBLISHED = 0, 1, 2


class Ledger:
    """Counts every frame once when it arrives and once when its fate is known; safe to call from any thread.

    Parameters
    ----------
    complete_sinks : names of the sinks that account for every frame; a frame is published once all of them have it.
    """

    def __init__(self, complete_sinks: Iterable[str]) -> None:
        self._complete = frozenset(complete_sinks)
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._missing = 0
        self._forgotten = 0  # messages of runs that are no longer kept
        self._published: tuple[str, int] | None = None
        self._stray = _Run(None)  # messages that belong to no run, because none was open
        # Fates beyond the first three are "dropped: stage/reason" and "quarantined: reason", numbered as they first occur.
        self._fates = ["never received", "in flight", "published"]
        self._lock = threading.Lock()

    def open_run(self, run: RunStarted) -> None:
        with self._lock:
            # Without mask and flat field: 64 runs of a 16M detector would keep 6 GB of them.
            self._runs[run.uid] = _Run(replace(run, detector=Detector(), metadata={}))
            closed = [uid for uid, one in self._runs.items() if one.closed is not None]
            for uid in closed[: max(0, len(closed) - KEPT_RUNS)]:
                self._forgotten += self._runs.pop(uid).received

    def received(self, uid: str, index: int) -> bool:
        """A frame came in; False when this run already had it (the caller then drops the duplicate)."""
        with self._lock:
            run = self._run(uid)
            run.received += 1
            if run.fate(index) != _UNSEEN:
                run.in_flight_extra += 1
                return False
            run.distinct += 1
            run.set_fate(index, _IN_FLIGHT)
            return True

    def received_unread(self, uid: str | None) -> None:
        """A message came in that could not be identified; a call of `quarantined` or `dropped` without an index must follow."""
        with self._lock:
            run = self._run(uid)
            run.received += 1
            run.in_flight_extra += 1

    def turned_away(self, uid: str | None, stage: str, reason: str) -> None:
        """A message came in and was left out at once. One step, because its run may be opened by another thread between two."""
        with self._lock:
            run = self._run(uid)
            run.received += 1
            run.dropped[(stage, reason)] += 1

    def dropped(self, uid: str | None, index: int | None, stage: str, reason: str) -> None:
        """A frame (or, without an index, an unidentified message or a duplicate) was left out at `stage` for `reason`.

        A frame whose fate is known keeps it: of two sinks that give it up only the first counts.
        """
        with self._lock:
            run = self._run(uid)
            if index is not None and run.fate(index) != _IN_FLIGHT:
                return
            run.dropped[(stage, reason)] += 1
            self._settle(run, index, f"dropped at {stage}: {reason}")

    def quarantined(self, uid: str | None, index: int | None, reason: str) -> None:
        with self._lock:
            run = self._run(uid)
            run.quarantined[reason] += 1
            self._settle(run, index, f"quarantined: {reason}")

    def published(self, uid: str, sink: str, indices: Iterable[int]) -> None:
        """`sink` has these frames safe."""
        with self._lock:
            run = self._run(uid)
            for index in indices:
                run.by_sink[sink] += 1
                if run.fate(index) != _IN_FLIGHT or sink not in self._complete:
                    continue
                if len(self._complete) > 1:
                    have = run.partly.setdefault(index, set())
                    have.add(sink)
                    if have != self._complete:
                        continue
                    del run.partly[index]
                run.set_fate(index, _PUBLISHED)
                run.published += 1
                self._published = uid, index

    def close_run(self, ended: RunEnded) -> dict[str, Any]:
        """The run has left every complete sink; returns its balance."""
        with self._lock:
            run = self._run(ended.uid)
            run.closed, run.reason = ended.closed, ended.reason
            self._missing += run.missing()
        return self.balance(ended.uid)

    def write_off(self) -> int:
        """The path was left before it was empty: whatever is in flight becomes dropped at path: shutdown. Returns how many."""
        with self._lock:
            count = 0
            for run in [*self._runs.values(), self._stray]:
                lost = [index for index, fate in enumerate(run.fates) if fate == _IN_FLIGHT]
                for index in lost:
                    self._settle(run, index, "dropped at path: shutdown")
                run.dropped["path", "shutdown"] += len(lost) + run.in_flight_extra
                count += len(lost) + run.in_flight_extra
                run.in_flight_extra = 0
                if not run.dropped["path", "shutdown"]:
                    del run.dropped["path", "shutdown"]
            return count

    def distinct(self, uid: str) -> int:
        """Frames of the run that came in, duplicates not counted."""
        with self._lock:
            return self._run(uid).distinct

    def find(self, name: str) -> str:
        """The uid of the run that a person means: by uid, the beginning of one, or its series. KeyError where that is none, or several."""
        with self._lock:
            series = [uid for uid, run in self._runs.items() if run.started is not None and run.started.series == name]
            found = {uid for uid in self._runs if uid.startswith(name)} | set(series[-1:])
        if len(found) != 1:
            raise KeyError(name)
        return found.pop()

    def balance(self, uid: str) -> dict[str, Any]:
        """The run's account as JSON-able numbers; `balanced` is True when every frame's fate is known. KeyError for an unknown run."""
        with self._lock:
            return self._runs[uid].account()

    def runs(self) -> list[dict[str, Any]]:
        """All accounts, newest run first; messages that belonged to no run come last, if there were any."""
        with self._lock:
            accounts = [run.account() for run in reversed(self._runs.values())]
            return accounts + ([self._stray.account()] if self._stray.received else [])

    def frame(self, uid: str, index: int) -> str:
        """The fate of one frame in words. KeyError for an unknown run."""
        with self._lock:
            return self._fates[self._runs[uid].fate(index)]

    def in_flight(self) -> int:
        with self._lock:
            return sum(run.in_flight() for run in [*self._runs.values(), self._stray])

    def total_received(self) -> int:
        """Messages of all runs that came in; it only grows."""
        with self._lock:
            return self._forgotten + sum(run.received for run in [*self._runs.values(), self._stray])

    def last_published(self) -> tuple[str, int] | None:
        """(run, index) of the frame that was published last."""
        with self._lock:
            return self._published

    def missing(self) -> int:
        """Frames that runs expected and had not seen when they closed; it only grows."""
        with self._lock:
            return self._missing

    def is_balanced(self) -> bool:
        with self._lock:
            return all(run.account()["balanced"] for run in [*self._runs.values(), self._stray])

    def _run(self, uid: str | None) -> _Run:
        return self._runs.get(uid, self._stray) if uid is not None else self._stray

    def _settle(self, run: _Run, index: int | None, fate: str) -> None:
        if index is None:
            run.in_flight_extra -= 1
            return
        if fate not in self._fates:
            self._fates.append(fate)
        run.partly.pop(index, None)
        run.set_fate(index, self._fates.index(fate))


@dataclass
class _Run:
    """One run's account. `fates` holds one byte a frame; `in_flight_extra` counts duplicates and unread messages on their way out."""

    started: RunStarted | None
    received: int = 0
    distinct: int = 0
    published: int = 0
    in_flight_extra: int = 0
    dropped: Counter[tuple[str, str]] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)
    by_sink: Counter[str] = field(default_factory=Counter)
    fates: bytearray = field(default_factory=bytearray)
    partly: dict[int, set[str]] = field(default_factory=dict)
    flying: int = 0
    extent: int = 0  # highest index that came in, plus one
    closed: float | None = None
    reason: str | None = None

    def fate(self, index: int) -> int:
        return self.fates[index] if 0 <= index < len(self.fates) else _UNSEEN

    def set_fate(self, index: int, fate: int) -> None:
        if index >= len(self.fates):
            # Grow by half, so that a long run of unknown length is not copied for every frame.
            self.fates.extend(bytes(max(index + 1 - len(self.fates), len(self.fates) // 2, 1024)))
        # Kept up to date here, where alone fates change: counting ten million bytes for every scrape would hold up the path.
        self.flying += (fate == _IN_FLIGHT) - (self.fates[index] == _IN_FLIGHT)
        self.extent = max(self.extent, index + 1)
        self.fates[index] = fate

    def in_flight(self) -> int:
        """From the frames themselves, not from the sums: a frame that a room lost stays visible here for ever."""
        return self.flying + self.in_flight_extra

    def missing(self) -> int:
        expected = self.started.expected if self.started is not None else None
        return max(0, (self.extent if expected is None else expected) - self.distinct)

    def account(self) -> dict[str, Any]:
        in_flight = self.in_flight()
        dropped, quarantined = sum(self.dropped.values()), sum(self.quarantined.values())
        residue = self.received - self.published - dropped - quarantined - in_flight
        run = self.started
        return {
            "run": run.uid if run else None,
            "source": run.source if run else None,
            "series": run.series if run else None,
            "opened": run.opened if run else None,
            "closed": self.closed,
            "reason": self.reason,
            "expected": run.expected if run else None,
            "received": self.received,
            "published": self.published,
            "dropped": {f"{stage}/{reason}": count for (stage, reason), count in sorted(self.dropped.items())},
            "quarantined": dict(sorted(self.quarantined.items())),
            "in_flight": in_flight,
            "missing": self.missing(),
            "sinks": dict(sorted(self.by_sink.items())),
            "residue": residue,
            # A run still open may have frames on their way; a closed one may not.
            "balanced": residue == 0 and (in_flight == 0 or (run is not None and self.closed is None)),
        }


def account_line(account: dict[str, Any]) -> str:
    """One run's account as a line for people: 400 received = 400 published + 0 dropped + 0 quarantined + 0 in flight."""

    def by_reason(total: dict[str, int]) -> str:
        detail = ", ".join(f"{reason} {count}" for reason, count in total.items())
        return f"{sum(total.values())}" + (f" ({detail})" if detail else "")

    opened = time.strftime("%H:%M:%S", time.localtime(account["opened"])) if account["opened"] else "--:--:--"
    whose = f"{account['series'] or 'no run'} ({(account['run'] or '-')[:8]})"
    return (
        f"{opened} {whose}: {account['received']} received = {account['published']} published"
        f" + {by_reason(account['dropped'])} dropped + {by_reason(account['quarantined'])} quarantined + {account['in_flight']} in flight;"
        f" {account['missing']} missing; {'balanced' if account['balanced'] else 'NOT BALANCED, residue ' + str(account['residue'])}"
    )
