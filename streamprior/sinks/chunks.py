"""Images by frame index -> one Zarr array a run, in whole chunks of frames."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec

OPEN_CHUNKS = 4
"""Chunks kept in memory a run: the growing one, and a few for frames that come late."""

GROW_CHUNKS = 16
"""Chunks the array is lengthened by when the number of frames is unknown: fewer rewrites of its metadata."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How one array of a run is stored: frame_shape (h, w), dtype, the value of frames that were never written, frames a chunk."""

    name: str
    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fill: Any
    chunk_frames: int

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        return (self.chunk_frames, *self.frame_shape)


class FrameArray:
    """An array (N, ...) on disk that is written by frame index, in any order, as often as one likes.

    zarr makes the array, lengthens it, cuts it and reads it. Chunks are encoded and written here, with the codec and under the key that
    the array's own metadata name: zarr's event loop and its threads take several times as long as compressing does, most of it in Python
    that every other thread waits for. The length is a multiple of the chunk length until `trim`, so a chunk is always whole. A chunk
    without any image has no file: Zarr reads it as the fill value.

    Parameters
    ----------
    path : folder of the Zarr array; made if absent, continued if present, then with the chunk length and the codec it was made with.
    layout : shape, dtype, fill and chunk length.
    expected : frames to make room for at once, None where unknown.
    """

    def __init__(self, path: Path, layout: Layout, expected: int | None) -> None:
        self._path = path
        self._layout = layout
        self._open: OrderedDict[int, npt.NDArray[Any] | None] = OrderedDict()  # None: no image in it, no file of it
        present = (path / "zarr.json").exists()
        # Memory of a chunk that fell out: faulting in a new megabyte takes longer than filling it.
        self._spare: npt.NDArray[Any] | None = None
        self._array = zarr.open_array(path, mode="r+") if present else _made(path, layout, expected)
        self._chunk_frames: int = self._array.chunks[0]
        self._length: int = self._array.shape[0]
        self._encode = _encoder(self._array)
        # From this chunk on nothing was ever written, so nothing need be read.
        self._fresh = -(-self._length // self._chunk_frames) if present else 0

    def write(self, indices: Sequence[int], images: Sequence[npt.NDArray[Any] | None]) -> None:
        """Put images at their indices, None for the fill value; when it returns, the chunks they touch are on disk."""
        self._reach(max(indices) + 1)
        touched: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            touched.setdefault(index // self._chunk_frames, []).append(place)
        for number, places in touched.items():
            chunk = self._chunk(number)
            if chunk is None and any(images[place] is not None for place in places):
                chunk = self._open[number] = self._blank()
            if chunk is not None:
                for place in places:  # one by one: np.stack of a whole chunk is no faster
                    image = images[place]
                    chunk[indices[place] % self._chunk_frames] = self._layout.fill if image is None else image
                self._store(number, chunk)

    def forget(self) -> None:
        """What a failed write put into memory is not written any more: the disk alone counts."""
        self._open.clear()

    def trim(self, extent: int) -> None:
        """Cut the array to `extent` frames; room that was made for frames that never came goes."""
        self._resize(extent)

    def _resize(self, length: int) -> None:
        if self._length != length:
            self._array.resize((length, *self._layout.frame_shape))
            self._length = length

    def _reach(self, extent: int) -> None:
        if self._length < extent:
            step = GROW_CHUNKS * self._chunk_frames
            self._resize(-(-extent // step) * step)
        else:  # trimmed when its run ended, and now continued
            self._resize(-(-self._length // self._chunk_frames) * self._chunk_frames)

    def _chunk(self, number: int) -> npt.NDArray[Any] | None:
        known = number in self._open
        chunk = self._open.pop(number, None)
        if not known and number < self._fresh and _is_there(self._file(number)):
            first = number * self._chunk_frames
            chunk = self._blank()
            chunk[:] = self._array[first : first + self._chunk_frames]
        self._fresh = max(self._fresh, number + 1)
        self._open[number] = chunk
        # What falls out is on disk: `write` stores a chunk before it opens the next, and a write that failed is repeated whole.
        while len(self._open) > OPEN_CHUNKS:
            _, oldest = self._open.popitem(last=False)
            self._spare = self._spare if oldest is None else oldest
        return chunk

    def _blank(self) -> npt.NDArray[Any]:
        chunk, self._spare = self._spare, None
        if chunk is None:
            # Little-endian, as zarr stores numbers unless told otherwise.
            chunk = np.empty((self._chunk_frames, *self._layout.frame_shape), self._layout.dtype.newbyteorder("<"))
        chunk[:] = self._layout.fill
        return chunk

    def _file(self, number: int) -> Path:
        key: str = self._array.metadata.encode_chunk_key((number, *(0 for _ in self._layout.frame_shape)))
        return self._path / key

    def _store(self, number: int, chunk: npt.NDArray[Any]) -> None:
        file, content = self._file(number), self._encode(chunk)
        try:
            replace_whole(file, content)
        except FileNotFoundError:
            # Only folders inside the array: on an unmounted disk, making the array's own would fill the mount point, without a word.
            for folder in reversed(file.parents[: len(file.relative_to(self._path).parents) - 1]):
                folder.mkdir(exist_ok=True)
            replace_whole(file, content)


def replace_whole(path: Path, content: bytes | memoryview) -> None:
    """Put a file in the place of another: a reader sees the old one or the new one, whole. A kill leaves `NAME.partial` behind at most."""
    partial = path.with_name(f"{path.name}.partial")
    # Without Python's buffered file: a third of the system calls, and at each of them another thread may take the interpreter.
    file = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(content)
        while rest:  # a disk that is nearly full takes a part, and refuses the next
            rest = rest[os.write(file, rest) :]
    except OSError:
        # On a full disk the half file takes room that nobody has.
        with suppress(OSError):
            partial.unlink()
        raise
    finally:
        os.close(file)
    partial.replace(path)


def _is_there(path: Path) -> bool:
    """Not `exists`, which newer Pythons answer with False for every error: a chunk on a disk that hiccups would be begun anew."""
    try:
        path.stat()
    except FileNotFoundError:
        return False
    return True


def _made(path: Path, layout: Layout, expected: int | None) -> zarr.Array:
    return zarr.create_array(
        path,
        shape=(-(-(expected or 0) // layout.chunk_frames) * layout.chunk_frames, *layout.frame_shape),
        chunks=layout.chunk_shape,
        dtype=layout.dtype,
        fill_value=layout.fill,
        compressors=_codec(layout.dtype),
        # One file a chunk, c.5.0.0: Zarr's default, c/5/0/0, makes two folders for each besides.
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=("frame", "row", "column")[: 1 + len(layout.frame_shape)],
    )


def _codec(dtype: np.dtype[Any]) -> BloscCodec:
    # Measured on chunks of 64 x 128 x 128. Class maps, bits shuffled: 11 us a frame and 20 % of their size where every border is noise,
    # 7 us and 8 % where they are smooth; zstd took 33 us for 17 % and 7 us for 4 %, in a noisy run half of all that the archive does.
    # Smooth complex objects inside a support, bytes shuffled: 58-66 %, faster than no compression, as less is written.
    if dtype.kind == "c":
        return BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=dtype.itemsize // 2)
    return BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle", typesize=dtype.itemsize)


_SHUFFLES = ("noshuffle", "shuffle", "bitshuffle")
"""Zarr's names of what numcodecs counts."""


def _encoder(array: zarr.Array) -> Callable[[npt.NDArray[Any]], bytes]:
    """What zarr would do to a chunk of this array, as its metadata tell; the interpreter is free while it compresses."""
    (codec,) = array.compressors
    told = codec.to_dict()
    settings = dict(told["configuration"])
    if "shuffle" in settings:
        settings["shuffle"] = _SHUFFLES.index(settings["shuffle"])
    encode: Callable[[npt.NDArray[Any]], bytes] = numcodecs.get_codec({"id": told["name"], **settings}).encode
    return encode
