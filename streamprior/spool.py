"""Messages off the wire -> files that a killed process leaves, and back: what was accepted and is not yet archived."""

from __future__ import annotations

import heapq
import json
import math
import mmap
import os
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from streamprior.records import Detector, RunStarted
from streamprior.seams import Message, Parts

log = structlog.get_logger(__name__)

_HEAD, _IMAGE, _RUN = range(3)
"""Kinds of records: a message that its run cannot do without, one image and nothing else, a run that was opened."""

_RECORD = struct.Struct("<4sBBHdQ")
"""Magic, kind, wire, parts, Unix seconds, number; then the length of each part, uint32, and the parts. No parts: one, as plain bytes."""

_LENGTH = struct.Struct("<I")

_MAGIC = b"SPm1"

_STATE = struct.Struct("<4q")
"""Numbers of the messages that were decoded last, of wire 0 and of wire 1, and of the first that are needed again, of either."""

_SEGMENT_BYTES = 2**25
"""A file of images is removed whole: 32 MiB are half a second of a fast detector."""

_BUFFERS = 512
"""Of one call of writev, which takes 1024."""

_TIDY_S = 0.25
"""Between two looks at what may go."""

_AGAIN_S = 10.0
"""After the disk refused to take something, until it is offered more."""


@dataclass(frozen=True, slots=True)
class Spooled:
    """A message as it was received.

    number : counts the messages of all wires. at : Unix seconds, when it left its socket. wire : 0 frames, 1 readings.
    decoded : the process that received it had decoded it, so that what was wrong with it has been counted.
    """

    number: int
    at: float
    wire: int
    message: Message
    decoded: bool


@dataclass(slots=True)
class _Segment:
    """A file of images, numbers first to last. passed : when decoding went past it, on the path's clock; waits_for : frames by run."""

    path: Path
    last: int
    nbytes: int
    passed: float | None = None
    waits_for: dict[str, list[int]] | None = None


@dataclass(slots=True)
class _Open:
    """A run that is not over: the first message that it needs, and the one that ended it."""

    uid: str
    first: int
    ended: int | None = None


class Spool:
    """Owns a folder with the messages that a restart needs.

    Messages that a run cannot do without (starts, ends, documents) are kept until the run is over, images until the frames in them are
    archived, dropped or quarantined. What the kernel has taken survives SIGKILL; nothing is synced, so a power cut costs the last seconds.
    A disk that takes nothing stops nothing: it is said once, `failing` is True, and a kill then loses what is on its way.

    The receiving threads call `keep`, the decoding one everything else.

    Parameters
    ----------
    folder : of this daemon alone; made if absent.
    images : False keeps what a run cannot do without and no image.
    most_bytes : beyond it the oldest images go, or where there are none, what the runs need.
    hold_s : how long a decoded frame may be held before it is told to `entered`.
    settled : (run, frames) -> whether all of them have a fate. over : run -> whether it is closed.
    """

    def __init__(
        self,
        folder: Path,
        images: bool,
        most_bytes: int,
        hold_s: float,
        settled: Callable[[str, Sequence[int]], bool],
        over: Callable[[str], bool],
    ) -> None:
        self._folder, self._images, self._most_bytes, self._hold_s = folder, images, most_bytes, hold_s
        self._settled, self._over = settled, over
        self._turn = threading.Lock()
        self._number = 0
        self._segments: deque[_Segment] = deque()
        self._image_file: int | None = None
        self._head_file: int | None = None
        self._head_bytes = self._image_bytes = 0
        self._state: memoryview | None = None
        self._before = [-1, -1]  # decoded by the process before this one
        self._decoded, self._needed = [-1, -1], [0, 0]
        self._passed = -1  # as `_decoded` of wire 0, by this process
        self._entered: dict[str, list[int]] = {}
        self._seen: dict[str, int] = {}  # series -> the first message of its that is needed
        self._begun: set[str] = set()  # of these, those whose run is open
        self._runs: deque[_Open] = deque()
        self._starts: set[int] = set()  # messages that opened the runs which `open` found
        self._looked = self._refused = -math.inf
        self._told_full = False
        self.failing = False

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._head_bytes + self._image_bytes

    def open(self) -> list[RunStarted]:
        """See what an earlier process left; returns the runs that it had not closed, oldest first, without their detectors."""
        runs: list[RunStarted] = []
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._map_state()
            runs = self._find()
        except OSError as error:
            self._fail(error)
        return runs

    def recovered(self) -> Iterator[Spooled]:
        """What is needed again of what `open` found, in the order that it was received."""
        files = [self._folder / "heads", *(segment.path for segment in self._segments)]
        needed, end = tuple(self._needed), self._number
        were = tuple(self._before)
        found = (_records(path) for path in files if path.exists())
        for kind, spooled, _ in heapq.merge(*found, key=lambda one: one[1].number):
            if kind == _RUN or spooled.number >= end:
                continue
            if spooled.number >= needed[spooled.wire]:
                yield replace(spooled, decoded=spooled.number <= were[spooled.wire])

    def opened_by(self, number: int) -> bool:
        """Whether one of the runs that `open` found was opened by this message. A start that opened none was a repetition."""
        return number in self._starts

    def keep(self, wire: int, messages: Iterable[tuple[Message, float, bool]]) -> int:
        """Write messages down: (message, Unix seconds, whether it is one image and nothing else). Returns the number of the first."""
        with self._turn:
            first = self._number
            heads: list[bytes] = []
            images: list[bytes] = []
            for message, at, image in messages:
                if not image:
                    heads += _record(_HEAD, wire, at, self._number, message)
                elif self._images:
                    images += _record(_IMAGE, wire, at, self._number, message)
                self._number += 1
            if heads or images:
                self._write(heads, images)
            return first

    def decoded(self, wire: int, number: int) -> None:
        """Everything up to this message of a wire has been decoded."""
        if wire == 0:
            self._passed = number
        self._decoded[wire] = max(self._decoded[wire], number)
        self._save()

    def seen(self, series: str, number: int, starts: bool) -> None:
        """A message holds a frame of a series, or starts it."""
        if series not in self._seen or (starts and series in self._begun):
            self._seen[series] = number
            self._begun.discard(series)

    def entered(self, uid: str, index: int) -> None:
        """A frame has joined its run."""
        if self._segments:
            self._entered.setdefault(uid, []).append(index)

    def opened(self, run: RunStarted, number: int) -> None:
        """A run was opened while this message was decoded."""
        first = self._seen.setdefault(run.series, number)
        self._begun.add(run.series)
        self._runs.append(_Open(run.uid, first))
        told = {"run": run.uid, "source": run.source, "series": run.series, "opened": run.opened, "first": first}
        with self._turn:
            self._write(_record(_RUN, 0, run.opened, number, json.dumps(told).encode()), [])

    def ended(self, uid: str) -> None:
        """A run was closed by what was decoded so far; its frames may still be on their way."""
        for run in self._runs:
            if run.uid == uid:
                run.ended = self._passed

    def tidy(self, now: float) -> None:
        """Let go of what a restart would not need any more. now : seconds, of a clock that nobody sets."""
        if time.monotonic() < self._looked + _TIDY_S:
            return
        self._looked = time.monotonic()
        self._forget_runs()
        with self._turn:
            # Into the newest more may come.
            closed = [*self._segments][: None if self._image_file is None else -1]
        for segment in closed:
            if segment.waits_for is None and segment.last <= self._passed:
                segment.passed = now if segment.passed is None else segment.passed
                if now - segment.passed >= self._hold_s:
                    segment.waits_for, self._entered = self._entered, {}
        for segment in closed:
            if segment.waits_for is None or not all(self._settled(uid, told) for uid, told in segment.waits_for.items()):
                break
            with self._turn:
                if self._segments and self._segments[0] is segment:
                    self._drop_oldest()

    def _forget_runs(self) -> None:
        """Of runs that are over nothing is needed; but the readings of the next scan may have begun while the last run was open."""
        while self._runs and self._runs[0].ended is not None and self._over(self._runs[0].uid):
            over = self._runs.popleft()
            assert over.ended is not None
            self._needed = [self._runs[0].first if self._runs else over.ended + 1, over.first]
            self._save()
            if not self._runs:
                self._seen.clear()
                self._begun.clear()
            with self._turn:
                self._cut_heads()

    def close(self, empty: bool) -> None:
        """Leave the folder; `empty`: nothing of it is needed, as all that was accepted has a fate."""
        with self._turn:
            for file in (self._head_file, self._image_file):
                if file is not None:
                    os.close(file)
            self._head_file = self._image_file = None
            if self._state is not None:
                self._state.release()
                self._state = None
        with suppress(OSError):  # what is left is passed over by the next process: all of it has a fate
            for path in [*self._folder.glob("*")] if empty else []:
                path.unlink(missing_ok=True)

    def _map_state(self) -> None:
        path = self._folder / "state"
        with path.open("r+b" if path.exists() else "w+b") as file:
            if len(file.read()) < _STATE.size:
                # Before it is mapped: a process that writes to a page which a full disk has no block for is killed.
                file.seek(0)
                file.write(_STATE.pack(-1, -1, 0, 0))
                file.flush()
            self._state = memoryview(mmap.mmap(file.fileno(), _STATE.size))
        *self._decoded, first, reading = _STATE.unpack(self._state)
        self._needed = [first, reading]
        self._before = [*self._decoded]

    def _save(self) -> None:
        if self._state is not None:
            _STATE.pack_into(self._state, 0, *self._decoded, *self._needed)

    def _find(self) -> list[RunStarted]:
        """Segments and runs of an earlier process; what a kill cut off at the end of the heads is removed."""
        runs: dict[str, RunStarted] = {}
        last, heads = max(self._decoded), self._folder / "heads"
        for path in (heads, *sorted(self._folder.glob("images-*"))):
            end, newest = 0, -1
            for kind, spooled, whole in _records(path, bodies=path is heads) if path.exists() else ():
                end = whole
                if kind != _RUN:
                    newest = spooled.number
                elif (told := _told(spooled.message))["first"] >= self._needed[0]:
                    runs[told["run"]] = RunStarted(told["run"], told["source"], told["series"], told["opened"], None, Detector())
                    self._starts.add(told["first"])
            if path is not heads:
                self._segments.append(_Segment(path, newest, end))
                self._image_bytes += end
            elif path.exists():
                os.truncate(path, end)
                self._head_bytes = end
            last = max(last, newest)
        self._number = last + 1
        return [*runs.values()]

    def _write(self, heads: Sequence[bytes], images: Sequence[bytes]) -> None:
        if time.monotonic() < self._refused + _AGAIN_S:
            return
        try:
            if heads:
                self._append_heads(heads)
            if images:
                self._append_images(images)
        except OSError as error:
            self._fail(error)
            return
        if self.failing:
            log.info("the spool takes again what it is given", folder=str(self._folder))
        self.failing = False

    def _append_heads(self, heads: Sequence[bytes]) -> None:
        nbytes = sum(map(len, heads))
        if self._head_bytes + nbytes > self._most_bytes:
            self._say_full("what runs cannot do without")
            return
        if self._head_file is None:
            self._head_file = os.open(self._folder / "heads", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        _append(self._head_file, heads, self._head_bytes)
        self._head_bytes += nbytes

    def _append_images(self, images: Sequence[bytes]) -> None:
        nbytes = sum(map(len, images))
        while self._segments and self.nbytes + nbytes > self._most_bytes:
            if len(self._segments) == 1:
                self._close_images()
            self._drop_oldest()
            self._say_full("the oldest images")
        if self._image_file is None:
            path = self._folder / f"images-{self._number:015d}"
            self._image_file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._segments.append(_Segment(path, -1, 0))
        newest = self._segments[-1]
        _append(self._image_file, images, newest.nbytes)
        newest.nbytes += nbytes
        self._image_bytes += nbytes
        newest.last = self._number - 1
        if newest.nbytes >= _SEGMENT_BYTES:
            self._close_images()

    def _close_images(self) -> None:
        if self._image_file is not None:
            os.close(self._image_file)
            self._image_file = None

    def _drop_oldest(self) -> None:
        oldest = self._segments.popleft()
        self._image_bytes -= oldest.nbytes
        oldest.path.unlink(missing_ok=True)

    def _cut_heads(self) -> None:
        """Write the heads anew without those that nobody needs. What a kill leaves of that is not looked at."""
        heads, new = self._folder / "heads", self._folder / "heads.new"
        if self._head_file is not None:
            os.close(self._head_file)
            self._head_file = None
        try:
            with new.open("wb") as file:
                for kind, one, _ in _records(heads) if heads.exists() else ():
                    first = _told(one.message)["first"] if kind == _RUN else one.number
                    if first >= self._needed[one.wire]:
                        file.writelines(_record(kind, one.wire, one.at, one.number, one.message))
                self._head_bytes = file.tell()
            new.replace(heads)
        except OSError as error:
            self._fail(error)
        self._told_full = False

    def _say_full(self, what: str) -> None:
        if not self._told_full:
            log.error(
                "the spool is full: were this process killed now, a restart would lack " + what + "; raise recovery.most_mb",
                folder=str(self._folder),
            )
        self._told_full = True

    def _fail(self, error: OSError) -> None:
        if not self.failing:
            log.error("the spool cannot be written: were this process killed now, what is on its way would be lost", error=str(error))
        self.failing, self._refused = True, time.monotonic()
        self._close_images()


def spooled_images(folder: Path) -> Iterator[Message]:
    """Images in the spools below a folder, as they lie there; nothing is changed."""
    for path in sorted(folder.glob("**/images-*")):
        for _, spooled, _ in _records(path):
            yield spooled.message


def _record(kind: int, wire: int, at: float, number: int, message: Message) -> list[bytes]:
    """A message as it is written. Raises TypeError for what is no message off a wire."""
    if isinstance(message, bytes):
        return [_RECORD.pack(_MAGIC, kind, wire, 0, at, number), _LENGTH.pack(len(message)), message]
    if isinstance(message, tuple) and all(isinstance(part, bytes) for part in message):
        parts = [part for part in message if isinstance(part, bytes)]
        head = _RECORD.pack(_MAGIC, kind, wire, len(parts), at, number)
        return [head, *(_LENGTH.pack(len(part)) for part in parts), *parts]
    raise TypeError(f"{type(message).__name__} did not come off a wire")


def _told(message: Message) -> dict[str, Any]:
    """What the record of a run says; of one that a power cut has spoilt, that nobody needs it."""
    try:
        told = json.loads(message) if isinstance(message, bytes) else None
    except ValueError:
        told = None
    return told if isinstance(told, dict) else {"first": -1}


def _records(path: Path, bodies: bool = True) -> Iterator[tuple[int, Spooled, int]]:
    """(kind, message, where its record ends) of a file, up to the first that is not whole. Without `bodies` messages are empty."""
    size = path.stat().st_size
    with path.open("rb") as file:
        while len(head := file.read(_RECORD.size)) == _RECORD.size:
            magic, kind, wire, count, at, number = _RECORD.unpack(head)
            told = file.read(_LENGTH.size * max(1, count))
            if magic != _MAGIC or len(told) != _LENGTH.size * max(1, count):
                return
            lengths = [length for (length,) in _LENGTH.iter_unpack(told)]
            end = file.tell() + sum(lengths)
            if end > size:
                return
            if bodies:
                parts: Parts = tuple(file.read(length) for length in lengths)
            else:
                file.seek(end)
                parts = (b"",)
            yield kind, Spooled(number, at, wire, parts if count else parts[0], False), end


def _append(file: int, buffers: Sequence[bytes], good: int) -> None:
    """Write everything, or raise OSError and leave the file as long as it was."""
    try:
        for first in range(0, len(buffers), _BUFFERS):
            some = buffers[first : first + _BUFFERS]
            written, whole = os.writev(file, some), sum(map(len, some))
            rest = memoryview(b"".join(some))[written:] if written < whole else memoryview(b"")
            while rest:  # a disk that is nearly full takes a part, and refuses the next
                rest = rest[os.write(file, rest) :]
    except OSError:
        with suppress(OSError):
            os.truncate(file, good)
        raise
