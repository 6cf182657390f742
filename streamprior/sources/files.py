"""Recorded frames (CXI, NeXus/HDF5, .npy, TIFFs) -> one lazily read stack, with positions and geometry where the file has them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import h5py
import hdf5plugin  # noqa: F401 - registers the filters that detector files are compressed with
import numpy as np
import numpy.typing as npt
import tifffile

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Decoded, Message

_JOULES_PER_EV = 1.602176634e-19

# Where the formats keep their frames, in the order of trying; the last resort is the only three-dimensional dataset.
_STACKS = (
    "entry_1/instrument_1/detector_1/data",  # CXI
    "entry_1/data_1/data",
    "entry/data/data",  # NeXus, NXptycho
    "entry/instrument/detector/data",
)


_DETECTORS = ("entry_1/instrument_1/detector_1", "entry/instrument/detector")


class Stack(Protocol):
    """What frames are read from: (N, rows, columns), one index at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True)
class Recording:
    """A file of frames; item i is the i-th chosen one.

    indices : those that were asked for. geometry : what the file says of the detector. positions : (N, 2) metres, x then y, of the
    probe on the sample; object pixels in a file that gives pixels and does not say how large they are.
    """

    path: Path
    stack: Stack
    indices: Sequence[int]
    geometry: Detector
    positions: npt.NDArray[np.float64] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.indices), *self.stack.shape[1:]

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.stack.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        return self.frame(i)

    def frame(self, i: int) -> npt.NDArray[Any]:
        """The i-th chosen frame, (rows, columns)."""
        return np.asarray(self.stack[self.indices[i]])

    def origin(self, i: int) -> int:
        """Its index in the file."""
        return self.indices[i]

    def detector(self) -> Detector:
        return self.geometry

    def position(self, i: int) -> tuple[float, float] | None:
        if self.positions is None:
            return None
        x, y = self.positions[self.indices[i]]
        # A row that is no number is a position that the stage never gave.
        return (float(x), float(y)) if np.isfinite(x) and np.isfinite(y) else None


def open_recording(file: str | os.PathLike[str], frames: str = ":") -> Recording:
    """Open a recorded run.

    Parameters
    ----------
    file : CXI, NeXus or other HDF5 (`FILE::/path/in/file` picks a dataset), .npy, or a folder of TIFFs (in the order of their names).
    frames : a Python slice, for example "1::2", or a single index.

    Raises
    ------
    ConfigError
        The file is absent, of no known kind, holds no stack of frames (or several), or the slice picks none.
    """
    name, _, inside = os.fspath(file).partition("::")
    path = Path(name)
    if not path.exists():
        raise ConfigError(f"{path}: no such file")
    if path.is_dir():
        recording = _open_tiffs(path)
    elif path.suffix == ".npy":
        recording = _whole(path, _load_npy(path))
    elif h5py.is_hdf5(path):
        recording = _open_hdf5(path, inside)
    else:
        raise ConfigError(f"{path}: neither HDF5 (CXI, NeXus), .npy nor a folder of TIFFs")
    if len(recording.stack.shape) != 3:
        raise ConfigError(f"{path}: frames must be a stack (N, rows, columns), found shape {recording.stack.shape}")
    if recording.dtype.kind not in "uif":
        raise ConfigError(f"{path}: pixels of type {recording.dtype}; photons are integers or real numbers")
    return _chosen(recording, frames)


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


class FileSource:
    """The source that is a file: records come out as fast as the path takes them, and the daemon ends with the last one."""

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._settings = settings
        self._next = -1
        self.exhausted = False
        self._recording: Recording | None = None

    def open(self) -> None:
        if self._settings.path is None:
            raise ConfigError("source.path: a file source needs the path of a recorded run")
        self._recording = open_recording(self._settings.path, self._settings.frames)

    def receive(self, timeout_s: float) -> Message | None:
        recording = self._recording
        assert recording is not None
        i, self._next = self._next, self._next + 1
        series = recording.path.name
        if i < 0:
            return SeriesStart(self.name, series, len(recording), recording.geometry, recording.metadata)
        if i >= len(recording):
            self.exhausted = True
            return SeriesEnd(self.name, series) if i == len(recording) else None
        return Frame(self.name, series, i, recording[i], 0.0, None, recording.position(i), recording.origin(i))

    def close(self) -> None:
        self._recording = None


class AsRead:
    """The decoder of a source that has nothing to decode: stamps each frame with the time it was read."""

    def decode(self, message: Message, received: float) -> tuple[Decoded]:
        assert not isinstance(message, bytes | tuple)
        return (replace(message, received=received) if isinstance(message, Frame) else message,)

    def due(self, now: float) -> tuple[()]:
        return ()


def _load_npy(path: Path) -> npt.NDArray[Any]:
    try:
        stack: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as .npy ({error}); copy it again") from None
    return stack


def _whole(path: Path, stack: Any, **more: Any) -> Recording:
    geometry = more.pop("geometry", None) or Detector(shape=tuple(stack.shape[1:3]))
    return Recording(path, stack, range(stack.shape[0]), geometry, **more)


def _chosen(recording: Recording, frames: str) -> Recording:
    total = recording.stack.shape[0]
    parts = frames.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        if len(parts) == 1:
            index = int(frames)
            chosen: Sequence[int] = range(total)[index : index + 1 or None]
        else:
            chosen = range(total)[slice(*numbers)]
    except (ValueError, TypeError):
        raise ConfigError(f"--frames {frames!r}: not a Python slice; write for example 0::2, :100 or 17") from None
    if not len(chosen):
        raise ConfigError(f"--frames {frames!r}: picks none of the {total} frames of {recording.path}")
    return replace(recording, indices=chosen)


class _Tiffs:
    def __init__(self, files: list[Path]) -> None:
        self._files = files
        try:
            first = tifffile.imread(files[0])
        except (OSError, tifffile.TiffFileError) as error:
            raise ConfigError(f"{files[0]}: cannot be read as TIFF ({error}); copy it again or take it out of the folder") from None
        self.shape = (len(files), *first.shape)
        self.dtype = first.dtype

    def __getitem__(self, index: int) -> Any:
        return tifffile.imread(self._files[index])


def _open_tiffs(folder: Path) -> Recording:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in (".tif", ".tiff"))
    if not files:
        raise ConfigError(f"{folder}: a folder without TIFF files")
    return _whole(folder, _Tiffs(files))


def _open_hdf5(path: Path, inside: str) -> Recording:
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as HDF5 ({error}); copy it again") from None
    stack = _dataset(path, file, inside)
    # `data_1` and `data` only link to the frames; what is known of them stands with the detector.
    detector_group = next((file[name] for name in _DETECTORS if isinstance(file.get(name), h5py.Group)), stack.parent)
    mask = detector_group.get("mask", detector_group.get("pixel_mask"))
    shape = (int(stack.shape[1]), int(stack.shape[2])) if stack.ndim == 3 else None
    joules = _number(file.get("entry_1/instrument_1/source_1/energy"))
    title = file.get("entry_1/title")
    geometry = Detector(
        shape=shape,
        mask=np.asarray(mask[()]) != 0 if mask is not None and mask.shape == shape else None,
        pixel_m=_number(detector_group.get("x_pixel_size")),
        distance_m=_number(detector_group.get("distance")),
        # CXI keeps the energy in joules.
        energy_ev=joules / _JOULES_PER_EV if joules is not None else None,
        frame_time_s=_number(detector_group.get("count_time")),
    )
    positions = _positions(file, stack.shape[0], geometry)
    return _whole(path, stack, geometry=geometry, positions=positions, metadata={"file": path.name, "title": _text(title)})


def _dataset(path: Path, file: h5py.File, inside: str) -> Any:
    if inside:
        found = file.get(inside)
        if not isinstance(found, h5py.Dataset):
            raise ConfigError(f"{path}: no dataset {inside}")
        return found
    for name in _STACKS:
        if isinstance(file.get(name), h5py.Dataset):
            return file[name]
    stacks: list[str] = []
    file.visititems(lambda name, item: stacks.append(name) if isinstance(item, h5py.Dataset) and item.ndim == 3 else None)
    if len(stacks) != 1:
        listed = ", ".join(f"{path}::/{name}" for name in stacks[:8])
        raise ConfigError(
            f"{path}: {'several stacks of frames; name one: ' + listed if stacks else 'no stack of frames (N, rows, columns)'}"
        )
    return file[stacks[0]]


def _positions(file: h5py.File, count: int, geometry: Detector) -> npt.NDArray[np.float64] | None:
    """Probe positions, x then y. CXI's translation is the motion of the sample in metres: the probe moves the other way on it.
    position_px is (row, column) of the probe's window in object pixels, as programs that cannot know the pixel's size leave it."""
    for name in ("translation", "position_px"):
        found = file.get(f"entry_1/sample_1/geometry_1/{name}")
        if not (isinstance(found, h5py.Dataset) and found.ndim == 2 and found.shape[0] == count and found.shape[1] >= 2):
            continue
        pairs = np.asarray(found[:, :2], np.float64)
        if name == "translation":
            return -pairs
        # Where the file tells the pixel's size after all, they are metres like any other.
        scale = geometry.reach_m / np.array(geometry.shape) if geometry.reach_m is not None and geometry.shape is not None else 1.0
        return np.ascontiguousarray((pairs * scale)[:, ::-1])
    return None


def _number(dataset: Any) -> float | None:
    """A scalar, or an array that holds a single number, as some writers leave it."""
    return float(np.asarray(dataset[()]).item()) if isinstance(dataset, h5py.Dataset) and dataset.size == 1 else None


def _text(dataset: Any) -> str:
    value = dataset[()] if dataset is not None and dataset.shape == () else b""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
