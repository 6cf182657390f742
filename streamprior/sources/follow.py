"""An HDF5 file that is still being written -> its frames as they come, until it has not grown for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.seams import Message
from streamprior.sources.hdf5 import LessDark, Raster, open_hdf5
from streamprior.sources.recording import FrameDamaged, Recording, Stack, slice_numbers

log = structlog.get_logger(__name__)

_LOOK_S = 0.1
"""How often the file is looked at: opening and refreshing take a millisecond or two, on a network disk some more."""


class GrowingFile:
    """The source that is a file with a writer (SWMR): waits for it, then for its frames, and ends when `follow_s` brought nothing new.

    A frame counts as written once its chunk is in the file: writers make the dataset longer first, or make it whole at the start. One that
    is missing between others is waited for like any other, and at the end told as damaged. How many come is not known, and positions are
    not read: they may not be there yet.
    """

    def __init__(self, settings: SourceSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self.name = settings.name
        self.exhausted = False
        self._settings = settings
        self._clock = clock
        self._recording: Recording | None = None
        self._file: Any = None
        self._grown = 0.0  # when there was something new
        self._stop: int | None = None
        self._step = 1
        self._extent = 0
        self._last = -1  # highest frame that was written, looked for when nothing new comes
        self._at = 0  # index in the file
        self._handed = 0

    def open(self) -> None:
        """Raises ConfigError where path or slice cannot be followed; the file itself may come later."""
        path = self._settings.path
        if path is None:
            raise ConfigError("source.path: a file source needs the path of a recorded run")
        file = Path(str(path).partition("::")[0])
        if file.is_dir() or not file.parent.is_dir():
            raise ConfigError(f"source.follow_s: {file} is no HDF5 file to be; only those are followed while they are written")
        numbers = slice_numbers(self._settings.frames)
        if len(numbers) == 1 or any(number is not None and number < 0 for number in numbers):
            raise ConfigError(f"source.frames: {self._settings.frames!r} needs an end, which the file has not yet; write for example 1::2")
        start, self._stop, step = (*numbers, None)[:3]
        self._at, self._step = start or 0, step or 1
        self._grown = self._clock()

    def receive(self, timeout_s: float) -> Message | None:
        message = self._next()
        if message is None and not self.exhausted and timeout_s:
            time.sleep(min(timeout_s, _LOOK_S))
            message = self._next()
        return message

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._recording = self._file = None

    def _next(self) -> Message | None:
        if self.exhausted:
            return None
        if self._recording is None:
            return self._begin()
        try:
            return self._onward(self._recording)
        except (OSError, RuntimeError, LookupError, ValueError, TypeError) as error:  # of h5py, for a file that was written over
            log.error("the file that was followed is another one now", path=str(self._recording.path), error=str(error))
            return self._end(self._recording)

    def _onward(self, recording: Recording) -> Message | None:
        over = self._is_over(recording)
        while self._at in self._settings.skip:
            self._at += self._step
        if self._stop is not None and self._at >= self._stop:
            return self._end(recording)
        if self._at < self._extent and _is_written(recording.stack, self._at):
            return self._frame(recording, over)
        if not over:
            return None
        if self._at < self._last:
            self._at += self._step
            return f"{recording.path}: frame {self._at - self._step} was never written".encode()
        return self._end(recording)

    def _is_over(self, recording: Recording) -> bool:
        """Look how far the file is now; True when it has been no further for too long."""
        _dataset(recording.stack).refresh()
        if recording.stack.shape[0] != self._extent:
            self._extent, self._grown, self._last = recording.stack.shape[0], self._clock(), -1
        over = self._clock() - self._grown > self._settings.follow_s
        if over and self._last < 0:
            self._last = next((index for index in range(self._extent - 1, -1, -1) if _is_written(recording.stack, index)), 0)
        return over

    def _begin(self) -> SeriesStart | None:
        name, _, inside = str(self._settings.path).partition("::")
        try:
            recording = open_hdf5(Path(name), inside, swmr=True)
        except ConfigError as error:
            if self._clock() - self._grown > self._settings.follow_s:
                log.error("nothing to follow", waited_s=self._settings.follow_s, error=str(error))
                self.exhausted = True
            return None
        self._recording, self._file, self._grown = recording, _dataset(recording.stack).file, self._clock()
        return SeriesStart(self.name, recording.name, None, recording.geometry, recording.metadata)

    def _frame(self, recording: Recording, over: bool) -> Message | None:
        index = self._at
        try:
            counts = replace(recording, indices=(index,)).frame(0)
        except FrameDamaged as damage:
            if not over:  # it may be half on its way
                return None
            self._at += self._step
            return str(damage).encode()
        self._grown, self._at, self._handed = self._clock(), index + self._step, self._handed + 1
        return Frame(self.name, recording.name, self._handed - 1, counts, 0.0, origin=index)

    def _end(self, recording: Recording) -> SeriesEnd:
        self.exhausted = True
        return SeriesEnd(self.name, recording.name)


def _dataset(stack: Stack) -> Any:
    """The dataset under what was done to it."""
    while isinstance(stack, LessDark):
        stack = stack.raw
    return stack.dataset if isinstance(stack, Raster) else stack


def _is_written(stack: Stack, index: int) -> bool:
    """The chunks of the frame's first and of its last pixel are in the file. Only a chunked dataset can grow."""
    dataset = _dataset(stack)
    if dataset.chunks is None:
        return True
    lead, chunk = dataset.shape[:-2], dataset.chunks
    corners = (0, 0), (dataset.shape[-2] - 1, dataset.shape[-1] - 1)
    pixels = ((*(int(one) for one in np.unravel_index(index, lead)), *corner) for corner in corners)
    firsts = (tuple(at // side * side for at, side in zip(pixel, chunk, strict=True)) for pixel in pixels)
    return all(dataset.id.get_chunk_info_by_coord(first).byte_offset is not None for first in firsts)
