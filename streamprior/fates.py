"""A frame's fate and its two times -> a byte and two numbers in a file that is mapped piece by piece: a killed process leaves all of it."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import struct
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import structlog

log = structlog.get_logger(__name__)

SPAN = 65_536
"""Frames of a piece. 17 bytes each are 1.1 MB, and a multiple of every page size up to 64 KiB, as mapping asks."""

_PIECE_BYTES = SPAN * (1 + 8 + 8)

_HEAD_BYTES = 65_536
"""In front of the pieces: `SLOTS` numbers of the account's, then one a piece, which is 1 where the file has it."""

SLOTS = 512
_MOST_PIECES = _HEAD_BYTES // 8 - SLOTS  # half a billion frames; what is beyond stays in memory

_MAPPED = 4
"""Pieces of a run that are mapped at once: mapped pages count as the process's own, which a long run must not add to."""


class InUse(Exception):  # noqa: N818 - an answer, not a failure
    """Another process is writing this file."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Views of one piece: `fate` uint8; `received` and `decided` float64, Unix seconds, 0 where it has not come to that. SPAN of each."""

    fate: memoryview
    received: memoryview[float]
    decided: memoryview[float]


def _views(of: mmap.mmap) -> _Piece:
    whole = memoryview(of)
    return _Piece(whole[:SPAN], whole[SPAN : 9 * SPAN].cast("d"), whole[9 * SPAN :].cast("d"))


class Fates:
    """Owns the rows of one run's frames: in a file, or in memory where there is no path or the disk does not take them.

    A file costs no memory but a few mapped pieces, and disk space only where frames came: a leap in the index leaves a hole. Space is
    allocated before it is mapped, because a process that writes to a mapped page which a full disk has no block for is killed (SIGBUS).
    Not safe to call from several threads; the ledger holds a lock.

    Parameters
    ----------
    path : of the file; None keeps everything in memory.
    mode : "new" makes the file and locks it; "again" opens one that was left, and locks it; "look" only reads.

    Raises
    ------
    InUse : mode is "again", and another process holds the lock.
    OSError, ValueError : mode is "again" or "look", and the file cannot be read, or is shorter than its head says.
    """

    def __init__(self, path: Path | None, mode: Literal["new", "again", "look"] = "new") -> None:
        self.path = path
        self.failing = False
        self._look = mode == "look"
        self._file: int | None = None
        self._on_disk: set[int] = set()
        self._held: dict[int, _Piece] = {}  # in memory
        self._mapped: OrderedDict[int, _Piece] = OrderedDict()
        if path is not None and mode == "new":
            self._make(path)
        elif path is not None:
            self._find(path, mode == "again")

    def _make(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.posix_fallocate(self._file, 0, _HEAD_BYTES)
        except OSError as error:
            self._fail(error)

    def _find(self, path: Path, lock: bool) -> None:
        file = os.open(path, (os.O_RDWR if lock else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            if lock:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._on_disk = _pieces_in(file)
            if os.fstat(file).st_size < _HEAD_BYTES + _PIECE_BYTES * (max(self._on_disk, default=-1) + 1):
                raise ValueError(f"{path} is shorter than its head says: it was cut, or copied while it was written")
        except BlockingIOError:
            os.close(file)
            raise InUse(str(path)) from None
        except (OSError, ValueError):
            os.close(file)
            raise
        self._file = file

    def code(self, index: int) -> int:
        """The number of a frame's fate; 0 where it never came."""
        piece = self._piece(index // SPAN)
        return piece.fate[index % SPAN] if piece is not None else 0

    def row(self, index: int) -> tuple[int, float, float]:
        """(number of the fate, received, decided) of a frame; the times are Unix seconds, 0 where it has not come to that."""
        piece, at = self._piece(index // SPAN), index % SPAN
        return (piece.fate[at], piece.received[at], piece.decided[at]) if piece is not None else (0, 0.0, 0.0)

    def arrive(self, index: int, fate: int, at: float) -> None:
        """A frame's first fate; makes room for it."""
        piece = self._piece(index // SPAN) or self._new(index // SPAN)
        piece.received[index % SPAN] = at
        # The fate last: a process that is killed between the two leaves a frame that never came.
        piece.fate[index % SPAN] = fate

    def decide_one(self, index: int, fate: int, at: float) -> None:
        """As `decide`, of one frame: under overload thousands a second are left out one by one."""
        piece = self._piece(index // SPAN)
        if piece is not None:
            piece.decided[index % SPAN] = at
            piece.fate[index % SPAN] = fate

    def decide(self, indices: npt.NDArray[np.int64], fate: int, at: float) -> None:
        """The fate of frames that have arrived, and when it was decided."""
        for number in np.unique(indices // SPAN):
            piece = self._piece(int(number))
            if piece is not None:
                within = indices[indices // SPAN == number] % SPAN
                np.asarray(piece.decided)[within] = at
                np.frombuffer(piece.fate, np.uint8)[within] = fate

    def unmake(self, fate: int) -> int:
        """Frames of this fate have never come. Returns how many that were."""
        count = 0
        for number in self.numbers():
            piece = self._piece(number)
            if piece is not None:
                gone = np.flatnonzero(np.asarray(piece.fate) == fate)
                np.asarray(piece.fate)[gone] = 0
                np.asarray(piece.received)[gone] = np.asarray(piece.decided)[gone] = 0
                count += len(gone)
        return count

    def codes(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The numbers of many frames' fates."""
        found = np.zeros(len(indices), np.uint8)
        for number in np.unique(indices // SPAN):
            piece = self._piece(int(number))
            if piece is not None:
                here = indices // SPAN == number
                found[here] = np.frombuffer(piece.fate, np.uint8)[indices[here] % SPAN]
        return found

    def numbers(self) -> list[int]:
        """Pieces that there are, in their order."""
        return sorted(self._on_disk | self._held.keys())

    def piece(self, number: int) -> npt.NDArray[np.uint8] | None:
        """(SPAN,) copy of the fates of frames from number * SPAN on; None where none of them came."""
        piece = self._piece(number)
        return np.frombuffer(piece.fate, np.uint8).copy() if piece is not None else None

    def last_time(self) -> float:
        """The newest of all times; 0 where no frame came."""
        pieces = [piece for number in self.numbers() if (piece := self._piece(number)) is not None]
        return max((float(np.asarray(one).max()) for piece in pieces for one in (piece.received, piece.decided)), default=0.0)

    def put(self, slot: int, value: int) -> None:
        """One of the account's own numbers, at once on disk."""
        self._write(8 * slot, value)

    def slots(self) -> list[int]:
        """All of the account's own numbers."""
        if self.path is None or not self._on_disk_at_all():
            return [0] * SLOTS
        with self._opened() as file:
            return list(struct.unpack(f"<{SLOTS}q", os.pread(file, 8 * SLOTS, 0).ljust(8 * SLOTS, b"\0")))

    @property
    def disk_bytes(self) -> int:
        return _HEAD_BYTES + len(self._on_disk) * _PIECE_BYTES if self._on_disk_at_all() else 0

    @property
    def held_bytes(self) -> int:
        return len(self._held) * _PIECE_BYTES

    def mend(self) -> None:
        """Offer the disk what it did not take; `failing` is False where it now has all rows.

        The account's own numbers are to be put again.
        """
        if self.path is None or self._look:
            return
        self.failing = False
        if not self._on_disk_at_all():
            self._on_disk.clear()
            self._make(self.path)
        for number in [] if self.failing else [*self._held]:
            piece = self._allocated(number)
            if piece is None:
                break
            held = self._held.pop(number)
            piece.fate[:], piece.received[:], piece.decided[:] = held.fate, held.received, held.decided

    def look_again(self) -> None:
        """Another process may have written to the file of a run that is over: see the pieces that are new in it."""
        with self._opened() as file:
            self._on_disk = _pieces_in(file)

    def release(self) -> None:
        """The run is over: descriptor, lock and mapped pieces go. Reading goes on."""
        self._mapped.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _on_disk_at_all(self) -> bool:
        return self.path is not None and (self._file is not None or self.path.exists())

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The file's descriptor: the one that is held while the run is open, or one for the moment."""
        if self._file is not None:
            yield self._file
            return
        assert self.path is not None
        file = os.open(self.path, (os.O_RDONLY if self._look else os.O_RDWR) | os.O_CLOEXEC)
        try:
            yield file
        finally:
            os.close(file)

    def _piece(self, number: int) -> _Piece | None:
        piece = self._mapped.get(number)
        if piece is not None:
            self._mapped.move_to_end(number)
            return piece
        if number in self._held:
            return self._held[number]
        return self._map(number) if number in self._on_disk else None

    def _map(self, number: int) -> _Piece | None:
        """A piece of the file. None where the file is gone: somebody has tidied up, and its frames have no fate any more."""
        access = mmap.ACCESS_READ if self._look else mmap.ACCESS_WRITE
        try:
            with self._opened() as file:
                piece = _views(mmap.mmap(file, _PIECE_BYTES, access=access, offset=_HEAD_BYTES + number * _PIECE_BYTES))
        except (OSError, ValueError) as error:
            self._fail(error)
            return None
        self._mapped[number] = piece
        while len(self._mapped) > _MAPPED:
            self._mapped.popitem(last=False)
        return piece

    def _new(self, number: int) -> _Piece:
        piece = self._allocated(number) if self._file is not None else None
        if piece is None:
            piece = self._held[number] = _views(mmap.mmap(-1, _PIECE_BYTES))
        return piece

    def _allocated(self, number: int) -> _Piece | None:
        """A new piece of the file; None where the disk has no room for it."""
        if number >= _MOST_PIECES:
            return None
        try:
            with self._opened() as file:
                os.posix_fallocate(file, _HEAD_BYTES + number * _PIECE_BYTES, _PIECE_BYTES)
        except OSError as error:
            self._fail(error)
            return None
        self._on_disk.add(number)
        self._write(8 * (SLOTS + number), 1)
        return self._map(number)

    def _write(self, offset: int, value: int) -> None:
        if not self._on_disk_at_all():
            return
        try:
            with self._opened() as file:
                os.pwrite(file, struct.pack("<q", value), offset)
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError | ValueError) -> None:
        if not self.failing:
            log.warning("a file of the ledger cannot be used, and what is new goes on in memory", file=str(self.path), error=str(error))
        self.failing = True


def _pieces_in(file: int) -> set[int]:
    """Numbers of the pieces that a file has, as its head says."""
    head = np.frombuffer(os.pread(file, _HEAD_BYTES, 0).ljust(_HEAD_BYTES, b"\0"), "<i8")
    return {int(number) for number in np.flatnonzero(head[SLOTS:])}


def in_use(path: Path) -> bool:
    """Whether a process, this one too, holds the lock of a run's file."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def forget(path: Path) -> None:
    """Remove a run's file and its head beside it."""
    for one in (path, path.with_suffix(".json"), path.with_suffix(".json.new")):
        try:
            one.unlink(missing_ok=True)
        except OSError as error:
            log.warning("the ledger of an old run cannot be removed", file=str(one), error=str(error))


def write_head(path: Path, head: dict[str, Any]) -> bool:
    """Replace the JSON beside a run's file in one step; False, and a line in the log, where the disk does not take it."""
    new = path.with_suffix(".json.new")
    try:
        new.write_text(json.dumps(head))
        new.replace(path.with_suffix(".json"))
    except OSError as error:
        log.warning("the head of a run's ledger cannot be written", file=str(path), error=str(error))
        return False
    return True


def head_stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever the JSON beside a run's file is replaced; None where it is not there."""
    try:
        found = path.with_suffix(".json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size
