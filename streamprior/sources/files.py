"""Recorded frames (HDF5, .npy, image files, a run in Tiled) -> recordings, and the source that replays one."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import structlog

from streamprior.config import SourceSettings, TiledSettings, tiled_api_key
from streamprior.errors import ConfigError, SinkUnavailable, WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Decoded, Message
from streamprior.sources.follow import GrowingFile
from streamprior.sources.hdf5 import open_hdf5
from streamprior.sources.images import is_image, open_images
from streamprior.sources.recording import FrameDamaged, Stack, chosen, unmapped, whole
from streamprior.sources.recording import Recording as Recording

log = structlog.get_logger(__name__)

_IN_TILED = re.compile(r"tiled:(https?://(?:\[[0-9a-fA-F:.]+\])?.*?)::(.+?)(?:::(.+))?")


def open_recording(file: str | os.PathLike[str], frames: str = ":", skip: Sequence[int] = ()) -> Recording:
    """Open a recorded run.

    Parameters
    ----------
    file : CXI, NeXus or other HDF5 (`FILE::/path/in/file` picks a dataset), .npy, TIFF or EDF (one file, or a folder of them in the order
        of their names), or a run in Tiled: `tiled:http://HOST:PORT::RUN` or `tiled:http://HOST:PORT::RUN::ARRAY`, with the key in
        $TILED_API_KEY.
    frames : a Python slice, for example "1::2", or a single index.
    skip : frames that are left out, by their index in the file.

    Raises
    ------
    ConfigError
        The file is absent, of no known kind, holds no stack of frames (or several), or the slice picks none.
    """
    name, _, inside = os.fspath(file).partition("::")
    if name.startswith("tiled:"):
        return _open_tiled(os.fspath(file), frames, skip)
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    if path.is_dir() or is_image(path):
        recording = open_images(path)
    elif path.suffix == ".npy":
        recording = whole(path, _load_npy(path))
    elif h5py.is_hdf5(path):
        recording = open_hdf5(path, inside)
    else:
        raise ConfigError(f"{path}: neither HDF5 (CXI, NeXus), .npy, TIFF, EDF nor a folder of images")
    return chosen(recording, frames, skip)


def _open_tiled(text: str, frames: str, skip: Sequence[int]) -> Recording:
    from streamprior.sources.tiled import open_tiled

    parts = _IN_TILED.fullmatch(text)
    if parts is None:
        raise ConfigError(f"{text}: not a run in Tiled; write tiled:http://HOST:PORT::RUN, for example tiled:http://127.0.0.1:8000::latest")
    uri, run, array = parts.groups()
    return open_tiled(uri, tiled_api_key(TiledSettings()), run, array, frames, skip)


@dataclass(frozen=True)
class Recordings:
    """Several recordings as one, for training: their chosen frames, one file after another.

    geometry : of the first file, with the pixels masked that any of them masks.
    """

    members: tuple[Recording, ...]
    geometry: Detector

    @property
    def name(self) -> str:
        return ", ".join(one.name for one in self.members)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self), *self.members[0].shape[1:]

    def __len__(self) -> int:
        return sum(map(len, self.members))

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"frame {i} of {len(self)}")
        for one in self.members:
            if i < len(one):
                break
            i -= len(one)
        return one[i]


def open_recordings(files: Sequence[str | os.PathLike[str]], frames: str = ":") -> Recordings:
    """Open several recorded runs of one detector.

    Parameters
    ----------
    files : as `open_recording` takes them, at least one.
    frames : a Python slice, applied to each file.

    Raises
    ------
    ConfigError
        As `open_recording`; or two files have frames of different shapes, or one is named twice.
    """
    parts = tuple(open_recording(file, frames) for file in files)
    for i, (file, part) in enumerate(zip(files, parts, strict=True)):
        if part.shape[1:] != parts[0].shape[1:]:
            raise ConfigError(
                f"{parts[0].path} has frames of {_size(parts[0])}, {part.path} of {_size(part)}: one prior is for one detector"
            )
        if file in files[:i]:
            raise ConfigError(f"{file}: named twice; its frames would count double")
    masks = [part.geometry.mask for part in parts if part.geometry.mask is not None]
    mask = np.logical_or.reduce(masks) if masks else None
    return Recordings(parts, replace(parts[0].geometry, mask=mask))


def _size(recording: Recording) -> str:
    return f"{recording.shape[1]} x {recording.shape[2]}"


def file_source(settings: SourceSettings) -> FileSource | GrowingFile:
    """The source for a recorded file, or for one that is still being written where the settings say so."""
    return GrowingFile(settings) if settings.follow_s else FileSource(settings)


class FileSource:
    """The source that is a recording: records come out as fast as the path takes them, and the daemon ends with the last one.

    A frame that cannot be read is handed over as the bytes of a sentence that says so; `AsRead` turns it into a WireError.

    Parameters
    ----------
    find : opens the recording; where it is left out, that is the file of the settings.
    """

    def __init__(self, settings: SourceSettings, find: Callable[[], Recording] | None = None) -> None:
        self.name = settings.name
        self._settings = settings
        self._find = find
        self._next = -1
        self._away = False
        self.exhausted = False
        self._recording: Recording | None = None

    def open(self) -> None:
        settings = self._settings
        if self._find is not None:
            self._recording = self._find()
        elif settings.path is None:
            raise ConfigError("source.path: a file source needs the path of a recorded run")
        else:
            self._recording = open_recording(settings.path, settings.frames, settings.skip)

    def receive(self, timeout_s: float) -> Message | None:
        recording = self._recording
        assert recording is not None
        i, series = self._next, recording.name
        if i < 0:
            message: Message | None = SeriesStart(self.name, series, len(recording), recording.geometry, recording.metadata)
        elif i >= len(recording):
            self.exhausted = True
            message = SeriesEnd(self.name, series) if i == len(recording) else None
        else:
            try:
                message = self._frame(recording, i)
            except SinkUnavailable as error:
                self._wait(error, timeout_s)
                return None
        self._next, self._away = i + 1, False
        return message

    def close(self) -> None:
        self._recording = None

    def _frame(self, recording: Recording, i: int) -> Frame | bytes:
        try:
            counts = recording[i]
        except FrameDamaged as damage:
            return str(damage).encode()
        return Frame(self.name, recording.name, i, counts, 0.0, None, recording.position(i), recording.origin(i))

    def _wait(self, error: SinkUnavailable, timeout_s: float) -> None:
        """A server that is away is waited for, like any part of the world: the next call asks for the same frame again."""
        if not self._away:
            log.warning("source unavailable", source=self.name, error=str(error))
        self._away = True
        time.sleep(timeout_s)


class AsRead:
    """The decoder of a source that has nothing to decode: stamps each frame with the time it was read."""

    def decode(self, message: Message, received: float) -> tuple[Decoded]:
        if isinstance(message, bytes):
            raise WireError("file_damaged", message.decode())
        assert not isinstance(message, tuple)
        return (replace(message, received=received) if isinstance(message, Frame) else message,)

    def due(self, now: float) -> tuple[()]:
        return ()

    def expendable(self, message: Message) -> bool:
        return isinstance(message, Frame)


def _load_npy(path: Path) -> Stack:
    try:
        stack = unmapped(path, np.load(path, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as .npy ({error}); copy it again") from None
    return stack
