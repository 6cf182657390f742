"""A recording: one lazily read stack of frames with positions and geometry, whatever kind of file or server it comes from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior.records import Detector

_METRES = {
    **dict.fromkeys(("m", "metre", "metres", "meter", "meters"), 1.0),
    **dict.fromkeys(("mm", "millimetre", "millimetres", "millimeter", "millimeters"), 1e-3),
    **dict.fromkeys(("um", "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m", "micron", "microns", "micrometer", "micrometers"), 1e-6),
    **dict.fromkeys(("nm", "nanometre", "nanometres", "nanometer", "nanometers"), 1e-9),
    **dict.fromkeys(("angstrom", "angstroms", "a", "\N{LATIN SMALL LETTER A WITH RING ABOVE}"), 1e-10),
}


FRAME_BYTES = 2**30
"""A larger frame is not read; an EIGER2 16M has 72 MB. Damaged files have claimed terabytes."""


class FrameDamaged(ConfigError):  # noqa: N818 - it names a state of the file
    """One frame of a recording cannot be read. A replay goes on with the next; what needs every frame ends with this sentence."""


class Stack(Protocol):
    """What frames are read from: (N, rows, columns), one index at a time. A frame that cannot be read is an OSError."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: int) -> Any: ...


class Unmapped:
    """A stack that lies in a file as it is, read frame by frame: pixels of a mapped file that somebody has made shorter meanwhile, as
    copying over it does, end the process.

    mapped : the stack as NumPy or tifffile maps it, (N, rows, columns), the last axis fastest.
    """

    def __init__(self, path: PurePath, mapped: np.memmap[Any, Any]) -> None:
        self.shape: tuple[int, ...] = mapped.shape
        self.dtype: np.dtype[Any] = mapped.dtype
        self._path, self._offset = path, mapped.offset

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        nbytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self._path, "rb") as file:
            file.seek(self._offset + index * nbytes)
            pixels = file.read(nbytes)
        if len(pixels) < nbytes:
            raise OSError("the file has become shorter")
        return np.frombuffer(pixels, self.dtype).reshape(self.shape[1:])


def unmapped(path: PurePath, stack: npt.NDArray[Any]) -> Stack:
    """A mapped stack as one that may be cut off while it is read; another order of the axes, which nobody writes, stays mapped."""
    return Unmapped(path, stack) if isinstance(stack, np.memmap) and stack.ndim == 3 and stack.flags.c_contiguous else stack


@dataclass(frozen=True)
class Recording:
    """Recorded frames; item i is the i-th chosen one.

    path : of the file, or of the run in Tiled. indices : those that were asked for. geometry : what is said of the detector. positions :
    (N, 2) metres, x then y, of the probe on the sample; object pixels in a file that gives pixels and does not say how large they are.
    """

    path: PurePath
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
        """The i-th chosen frame, (rows, columns). Raises FrameDamaged where it cannot be read or is of another shape than the first."""
        index = self.indices[i]
        try:
            counts = np.asarray(self.stack[index])
        except OSError as error:
            raise FrameDamaged(f"{self.path}: frame {index} cannot be read ({error}); copy it again or leave this frame out") from None
        if counts.shape != self.shape[1:]:
            raise FrameDamaged(f"{self.path}: frame {index} has shape {counts.shape}, the first has {self.shape[1:]}; leave this frame out")
        return counts

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


def check_size(path: PurePath, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises ConfigError for a frame, the last two axes of `shape`, that is larger than any detector's: then the file is damaged."""
    if math.prod(shape[-2:]) * dtype.itemsize > FRAME_BYTES:
        raise ConfigError(f"{path}: frames of {' x '.join(map(str, shape[-2:]))} {dtype} pixels are larger than {FRAME_BYTES} bytes")


def whole(path: PurePath, stack: Stack, geometry: Detector | None = None, **more: Any) -> Recording:
    """Every frame of a stack (N, rows, columns).

    Raises
    ------
    ConfigError
        It is no such stack, its frames are too large, or its pixels are no numbers.
    """
    if len(stack.shape) != 3:
        raise ConfigError(f"{path}: frames must be a stack (N, rows, columns), found shape {stack.shape}")
    if stack.dtype.kind not in "uif":
        raise ConfigError(f"{path}: pixels of type {stack.dtype}; photons are integers or real numbers")
    check_size(path, stack.shape, stack.dtype)
    shape = int(stack.shape[1]), int(stack.shape[2])
    return Recording(path, stack, range(stack.shape[0]), geometry or Detector(shape=shape), **more)


def chosen(recording: Recording, frames: str, skip: Sequence[int] = ()) -> Recording:
    """The frames that a Python slice picks, without those listed in `skip` by their index in the file.

    Raises
    ------
    ConfigError
        It is no slice, picks nothing, or an index in `skip` is beyond the file.
    """
    total = recording.stack.shape[0]
    parts = slice_numbers(frames)
    if len(parts) == 1:
        index = parts[0] or 0
        picked: Sequence[int] = range(total)[index : index + 1 or None]
    else:
        picked = range(total)[slice(*parts)]
    if not len(picked):
        raise ConfigError(f"--frames {frames!r}: picks none of the {total} frames of {recording.path}")
    if skip:
        beyond = [index for index in skip if index >= total]
        if beyond:
            raise ConfigError(f"source.skip: {beyond[0]} is no frame of {recording.path}, which has {total}; they are counted from 0")
        out = frozenset(skip)
        picked = [index for index in picked if index not in out]
        if not picked:
            raise ConfigError(f"source.skip: leaves none of the frames {frames!r} of {recording.path}; list fewer")
    return replace(recording, indices=picked)


def slice_numbers(frames: str) -> list[int | None]:
    """The numbers of a Python slice, or the one number of an index. Raises ConfigError where it is neither."""
    parts = frames.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
        # An index must be a number, and a step not 0: both show only when they are used.
        range(1)[slice(*numbers) if len(parts) > 1 else int(frames) * 0]
    except (ValueError, TypeError):
        raise ConfigError(f"--frames {frames!r}: not a Python slice; write for example 0::2, :100 or 17") from None
    return numbers


def metres(unit: str) -> float | None:
    """Metres in a unit of length as files and descriptors name it; None for one that is not known here."""
    return _METRES.get(unit.strip().lower())
