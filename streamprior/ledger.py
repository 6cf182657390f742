"""What became of every frame, and when: received = published + dropped + quarantined + in flight, per run, kept on disk."""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import structlog

from streamprior.account import Fate, RunAccount, account_line, folded, stretches
from streamprior.fates import SPAN, Fates, InUse, forget, in_use
from streamprior.records import Detector, RunEnded, RunStarted

__all__ = ["KEPT_BYTES", "KEPT_RUNS", "Ledger", "account_line", "answer", "catch_up", "frames_up_to", "read_ledger"]

log = structlog.get_logger(__name__)

KEPT_RUNS = 64
"""Runs that are kept after they ended, newest first, those of earlier processes among them; their results are in the archive for good."""

KEPT_BYTES = 2**31
"""On disk, of runs that ended: twelve runs of 1e7 frames, or all 64 of up to 1.9 million."""

_HELD_BYTES = 2**28
"""In memory, of runs that ended, where the disk did not take them."""

_MOST_RANGES = 10_000
"""Ranges of frames in one answer; every second frame of 1e7 would be five million."""


_CRASH, _SHUTDOWN = Fate("dropped", "path", "crash"), Fate("dropped", "path", "shutdown")


class Ledger:
    """Counts every frame once when it arrives and once when its fate is known; safe to call from any thread.

    What it is told goes into a file a run at once ([`Fates`][streamprior.fates.Fates]), so that it survives the process. A folder that
    cannot be written stops nothing: the ledger goes on in memory, says so, and `on_disk` is False.

    Parameters
    ----------
    complete_sinks : names of the sinks that account for every frame; a frame is published once all of them have it.
    folder : where the files are; None keeps everything in memory. Several processes may share it.
    reread : messages of an earlier process are received again, so that what was on its way then is not lost.
    """

    def __init__(self, complete_sinks: Iterable[str], folder: Path | None = None, reread: bool = False) -> None:
        self._complete = frozenset(complete_sinks)
        self._again = (_CRASH, _SHUTDOWN) if reread else ()
        self._folder = folder
        self._runs: OrderedDict[str, RunAccount] = OrderedDict()
        self._earlier: OrderedDict[str, RunAccount] = OrderedDict()
        self._missing = 0
        self._forgotten = 0  # messages of runs that are no longer kept
        self._unaccounted = 0  # frames of these that nobody accounted for
        self._published: tuple[str, int] | None = None
        self._stray = RunAccount(None, Fates(None))  # messages that belong to no run, because none was open
        self._lock = threading.Lock()

    def recall(self, safe: Callable[[str], Iterable[int]] = lambda uid: ()) -> list[dict[str, Any]]:
        """Read what earlier processes left; runs they did not close are closed as `interrupted`, with what was in flight dropped at
        path: crash. Returns the accounts of these.

        safe : called with the uid of each such run, tells the frames that every complete sink has; a process that is killed between
            writing and saying so has left some of them in flight, which are published.

        What another process is writing is left alone; what cannot be read is said and left where it is.
        """
        interrupted = []
        with self._lock:
            for uid, run in _read(self._folder, "again"):
                self._earlier[uid] = run
                if run.closed is not None:
                    continue
                last = run.fates.last_time()
                run.settle_safe(np.fromiter(safe(uid), np.int64), last)
                run.write_off(_CRASH, last)
                run.close(RunEnded(uid, "interrupted", last or (run.started.opened if run.started is not None else 0.0)))
                interrupted.append(run.sums())
            self._forget()
            self._sweep()
        return interrupted

    def open_run(self, run: RunStarted) -> None:
        """A run opens; one that `recall` found goes on. Where its messages are received again, what it had in flight has never come."""
        with self._lock:
            if run.uid in self._earlier and self._resume(run.uid):
                return
            path = self._folder / f"{quote(run.uid, safe='')}.fates" if self._folder is not None else None
            # Without mask and flat field: 64 runs of a 16M detector would keep 6 GB of them.
            self._runs[run.uid] = RunAccount(replace(run, detector=Detector(), metadata={}), Fates(path))
            for one in self._runs.values():
                if one.closed is not None:
                    one.mend()
            self._forget()

    def received(self, uid: str, index: int, at: float | None = None) -> bool:
        """A frame came in (`at` Unix seconds; None: now); False when this run already had it: the caller then drops the duplicate."""
        with self._lock:
            return self._run(uid).arrive(index, time.time() if at is None else at)

    def received_unread(self, uid: str | None) -> None:
        """A message came in that could not be identified; a call of `quarantined` or `dropped` without an index must follow."""
        with self._lock:
            self._run(uid).arrive_unread()

    def turned_away(self, uid: str | None, stage: str, reason: str) -> None:
        """A message came in and was left out at once. One step, because its run may be opened by another thread between two."""
        with self._lock:
            self._run(uid).turn_away(Fate("dropped", stage, reason))

    def dropped(self, uid: str | None, index: int | None, stage: str, reason: str) -> None:
        """A frame (or, without an index, an unidentified message or a duplicate) was left out at `stage` for `reason`.

        A frame whose fate is known keeps it: of two sinks that give it up only the first counts.
        """
        with self._lock:
            self._run(uid).settle(index, Fate("dropped", stage, reason), time.time())

    def quarantined(self, uid: str | None, index: int | None, reason: str) -> None:
        """As `dropped`, for what the sender got wrong."""
        with self._lock:
            self._run(uid).settle(index, Fate("quarantined", "", reason), time.time())

    def published(self, uid: str, sink: str, indices: Iterable[int], unrefined: Mapping[int, str] = {}) -> None:
        """`sink` has these frames safe. unrefined : index -> why, of those with a mask alone."""
        safe = np.fromiter(indices, np.int64)
        with self._lock:
            last = self._run(uid).take(sink, safe, self._complete, time.time(), unrefined) if len(safe) else None
            if last is not None:
                self._published = uid, last

    def close_run(self, ended: RunEnded) -> dict[str, Any]:
        """The run has left every complete sink; returns its balance."""
        with self._lock:
            run = self._run(ended.uid)
            run.close(ended)
            self._missing += run.missing()
        return self.balance(ended.uid)

    def write_off(self) -> int:
        """The path was left before it was empty: whatever is in flight becomes dropped at path: shutdown. Returns how many."""
        with self._lock:
            now = time.time()
            return sum(run.write_off(_SHUTDOWN, now) for run in self._own())

    def distinct(self, uid: str) -> int:
        """Frames of the run that came in, without duplicates and those beyond the number that it expected."""
        with self._lock:
            return self._run(uid).awaited()

    def knows(self, uid: str, index: int) -> bool:
        """Whether the run has this frame already."""
        with self._lock:
            return self._run(uid).fate(index).kind != "never received"

    def settled(self, uid: str, indices: Sequence[int]) -> bool:
        """Whether each of these frames has a fate."""
        with self._lock:
            return uid not in self._runs or not self._runs[uid].is_flying(np.asarray(indices, np.int64))

    def is_over(self, uid: str) -> bool:
        """Whether the run has left every complete sink."""
        with self._lock:
            return uid not in self._runs or self._runs[uid].closed is not None

    def find(self, name: str) -> str:
        """The uid of the run that a person means: by uid, the beginning of one, or its series. KeyError where that is none, or several."""
        with self._lock:
            kept = self._earlier | self._runs
            series = [uid for uid, run in kept.items() if run.started is not None and run.started.series == name]
            found = {uid for uid in kept if uid.startswith(name)} | set(series[-1:])
        if len(found) != 1:
            raise KeyError(name)
        return found.pop()

    def balance(self, uid: str) -> dict[str, Any]:
        """The run's account as JSON-able numbers; `balanced` is True when every frame's fate is known. KeyError for an unknown run."""
        with self._lock:
            return self._kept(uid).sums()

    def runs(self) -> list[dict[str, Any]]:
        """All accounts of this process, newest run first; messages that belonged to no run come last, if there were any."""
        with self._lock:
            accounts = [self._fresh(self._runs, uid).sums() for uid in reversed(self._runs)]
            return accounts + ([self._stray.sums()] if self._stray.received else [])

    def earlier(self) -> list[dict[str, Any]]:
        """All accounts that earlier processes left, newest run first."""
        with self._lock:
            return [self._fresh(self._earlier, uid).sums() for uid in reversed(self._earlier)]

    def frame(self, uid: str, index: int) -> str:
        """The fate of one frame in words. KeyError for an unknown run."""
        with self._lock:
            return self._kept(uid).fate(index).words

    def why(self, uid: str, index: int) -> dict[str, Any]:
        """What is known of one frame, JSON-able: see `RunAccount.story`. KeyError for an unknown run."""
        with self._lock:
            return self._kept(uid).story(index)

    def left_out(self, uid: str, most: int = _MOST_RANGES) -> dict[str, Any]:
        """Ranges of frames that are not published, or without refinement, JSON-able: `left_out`, a list of (fate, first, last), and
        where it is a part of these that repeats: `frames` of each `period`, from `first` on; `more`, ranges beyond `most`.

        Frames that never came are among them, up to the number that the run expected. KeyError for an unknown run.
        """
        ranges: list[dict[str, Any]] = []
        more = 0
        with self._lock:
            names = self._kept(uid).names()
        for one in folded(stretches(self._pieces(uid))):
            if one.number >= len(names):  # new since
                with self._lock:
                    names = self._kept(uid).names()
            if names[one.number].is_whole:
                continue
            if len(ranges) == most:
                more += 1
                continue
            repeats = {"frames": one.length, "period": one.period} if one.count > 1 else {}
            ranges.append({"fate": names[one.number].words, "first": one.first, "last": one.last} | repeats)
        return {"run": uid, "left_out": sorted(ranges, key=lambda one: int(one["first"])), "more": more}

    def in_flight(self) -> int:
        with self._lock:
            return sum(run.in_flight() for run in self._own())

    def total_received(self) -> int:
        """Messages of all runs of this process that came in; it only grows."""
        with self._lock:
            return self._forgotten + sum(run.received for run in self._own())

    def last_published(self) -> tuple[str, int] | None:
        """(run, index) of the frame that was published last."""
        with self._lock:
            return self._published

    def missing(self) -> int:
        """Frames that runs expected and had not seen when they closed; it only grows."""
        with self._lock:
            return self._missing

    def unaccounted(self) -> int:
        """Frames whose fate nobody knows and nobody will know: 0, unless streamprior itself has lost some."""
        with self._lock:
            return self._unaccounted + sum(run.unaccounted() for run in self._runs.values()) + abs(self._stray.residue())

    def on_disk(self) -> bool:
        """Whether what is kept here would survive the process."""
        with self._lock:
            return self._folder is not None and not any(run.fates.failing for run in self._runs.values())

    def is_balanced(self) -> bool:
        with self._lock:
            return not any(run.unaccounted() for run in self._own())

    def _resume(self, uid: str) -> bool:
        """Whether the run of an earlier process can go on."""
        earlier = self._fresh(self._earlier, uid)
        del self._earlier[uid]
        try:
            earlier.reopen(Fates(earlier.fates.path, "again"), self._again)
        except (InUse, OSError, ValueError) as error:
            log.warning("a run goes on with a new ledger: the one it had cannot be read", run=uid, error=str(error))
            return False
        self._runs[uid] = earlier
        return True

    def _own(self) -> list[RunAccount]:
        return [*self._runs.values(), self._stray]

    def _run(self, uid: str | None) -> RunAccount:
        run = self._runs.get(uid, self._stray) if uid is not None else self._stray
        return run if run.closed is None or uid is None else self._fresh(self._runs, uid)

    def _kept(self, uid: str) -> RunAccount:
        return self._fresh(self._runs if uid in self._runs else self._earlier, uid)

    def _fresh(self, runs: OrderedDict[str, RunAccount], uid: str) -> RunAccount:
        """The account of a run, read again where another process has caught up with it. KeyError for an unknown run."""
        run = runs[uid]
        if run.is_stale():
            assert run.fates.path is not None
            try:
                run.fates.look_again()
                runs[uid] = RunAccount.read(json.loads(run.fates.path.with_suffix(".json").read_text()), run.fates)
            except (OSError, ValueError, KeyError, TypeError) as error:
                log.warning("what was written about a run cannot be read", run=uid, error=repr(error))
        return runs[uid]

    def _pieces(self, uid: str) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        """(first index, fates) of all frames up to the last that came or was expected; the path goes on between two pieces."""
        with self._lock:
            run = self._kept(uid)
            end = max(run.extent, (run.started.expected if run.started is not None else None) or 0)
        for first in range(0, end, SPAN):
            with self._lock:
                codes = run.fates.piece(first // SPAN)
            yield first, (np.zeros(SPAN, np.uint8) if codes is None else codes)[: end - first]

    def _forget(self) -> None:
        """Of runs that ended the oldest go, until what is left is within its bounds."""
        closed = [(runs, uid) for runs in (self._earlier, self._runs) for uid, run in runs.items() if run.closed is not None]
        disk = sum(runs[uid].fates.disk_bytes for runs, uid in closed)
        held = sum(runs[uid].fates.held_bytes for runs, uid in closed)
        while closed and (len(closed) > KEPT_RUNS or disk > KEPT_BYTES or held > _HELD_BYTES):
            runs, uid = closed.pop(0)
            run = runs.pop(uid)
            disk -= run.fates.disk_bytes
            held -= run.fates.held_bytes
            if runs is self._runs:
                self._forgotten += run.received
                self._unaccounted += run.unaccounted()
            if run.fates.path is not None:
                forget(run.fates.path)

    def _sweep(self) -> None:
        """Files that could not be read stay for a person to look at, but no more than KEPT_RUNS of them."""
        if self._folder is None:
            return
        known = {run.fates.path for run in self._earlier.values()}
        strange = {self._folder / f"{path.name.partition('.')[0]}.fates" for path in self._folder.glob("*.*")} - known
        for path in sorted(strange, key=_changed)[:-KEPT_RUNS]:
            if not in_use(path):
                forget(path)


def _changed(path: Path) -> float:
    """When a run's file, or its head where there is no file, was changed last; Unix seconds."""
    return max((one.stat().st_mtime for one in (path, path.with_suffix(".json")) if one.exists()), default=0.0)


def read_ledger(folder: Path) -> Ledger:
    """What processes have left in a ledger's folder, or are writing there now, as it lies on disk; nothing is changed."""
    ledger = Ledger(())
    ledger._earlier.update(_read(folder, "look"))
    return ledger


def catch_up(folder: Path, uid: str, indices: npt.NDArray[np.int64]) -> int:
    """The archive now has these frames (N,) of a run whole: tell the ledger that processes have left in `folder`.

    Returns how many of them it did not know to be. A daemon that is running sees it.

    Raises
    ------
    KeyError : it keeps no such run.
    InUse : a process has the run's file open; or was killed, and none has closed the run since.
    OSError, ValueError, TypeError : what lies there cannot be read, or not be written.
    """
    path = folder / f"{quote(uid, safe='')}.fates"
    try:
        head, fates = json.loads(path.with_suffix(".json").read_text()), Fates(path, "again")
    except FileNotFoundError:
        raise KeyError(uid) from None
    if head["closed"] is None:
        fates.release()
        raise InUse(str(path))
    return RunAccount.read(head, fates).catch_up(indices, time.time())


def frames_up_to(folder: Path, uid: str) -> int:
    """The highest index that came in of a run that ended, plus one; 0 where no ledger in `folder` says."""
    try:
        head = json.loads((folder / f"{quote(uid, safe='')}.json").read_text())
        return int(head["sums"]["extent"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _read(folder: Path | None, mode: Literal["again", "look"]) -> Iterator[tuple[str, RunAccount]]:
    """(uid, account) of the runs in a folder, oldest first."""
    heads = []
    for path in folder.glob("*.json") if folder is not None else ():
        try:
            heads.append((float((head := json.loads(path.read_text()))["opened"]), path.name, head))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("a run's ledger cannot be read", file=str(path), error=repr(error))
    for _, name, head in sorted(heads, key=lambda one: one[:2]):
        assert folder is not None
        path = (folder / name).with_suffix(".fates")
        try:
            fates = Fates(path, mode)
        except InUse:
            continue
        except (OSError, ValueError) as error:
            log.warning("a run's ledger cannot be read", file=str(path), error=repr(error))
            continue
        try:
            run = RunAccount.read(head, fates)
        except (OSError, KeyError, TypeError, IndexError) as error:
            log.warning("a run's ledger cannot be read", file=str(path), error=repr(error))
            fates.release()
            continue
        if mode == "look" or run.closed is not None:
            fates.release()
        yield head["run"], run


def answer(ledger: Ledger, run: str | None, frame: int | None, left_out: bool) -> dict[str, Any]:
    """What a person asks: of one frame, of the frames that a run left out, of one run, or of all of them; JSON-able.

    Without a run, a question about frames is about the newest. Raises KeyError where there is no such run.
    """
    if run is None and frame is None and not left_out:
        return {"runs": ledger.runs(), "earlier": ledger.earlier(), "balanced": ledger.is_balanced()}
    uid = ledger.find(run) if run is not None else _newest(ledger)
    if frame is not None:
        return ledger.why(uid, frame)
    return ledger.left_out(uid) if left_out else ledger.balance(uid)


def _newest(ledger: Ledger) -> str:
    for account in (*ledger.runs(), *ledger.earlier()):
        if account["run"] is not None:
            return str(account["run"])
    raise KeyError("no run")
