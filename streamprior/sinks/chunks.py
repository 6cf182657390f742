"""Images by frame index -> one Zarr array a run, in whole chunks of frames."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

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

    Its length is a multiple of the chunk length until `trim`, so that every write is one whole chunk: zarr then neither reads
    before it writes nor leaves half a chunk (it writes to a temporary name and renames).

    Parameters
    ----------
    path : folder of the Zarr array; made if absent, continued if present.
    layout : shape, dtype, fill and chunk length.
    expected : frames to make room for at once, None where unknown.
    """

    def __init__(self, path: Path, layout: Layout, expected: int | None) -> None:
        self._layout = layout
        self._open: OrderedDict[int, npt.NDArray[Any]] = OrderedDict()
        self._fresh = 0  # from this chunk on nothing was ever written, so nothing need be read
        if (path / "zarr.json").exists():
            self._array = zarr.open_array(path, mode="r+")
            self._fresh = self._whole(self._array.shape[0]) // layout.chunk_frames
        else:
            self._array = zarr.create_array(
                path,
                shape=(self._whole(expected or 0), *layout.frame_shape),
                chunks=layout.chunk_shape,
                dtype=layout.dtype,
                fill_value=layout.fill,
                compressors=_codec(layout.dtype),
                dimension_names=("frame", "row", "column")[: 1 + len(layout.frame_shape)],
            )

    def write(self, indices: Sequence[int], images: Sequence[npt.NDArray[Any]]) -> None:
        """Put images at their indices; when it returns, the chunks they touch are on disk."""
        self._reach(max(indices) + 1)
        touched: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            touched.setdefault(index // self._layout.chunk_frames, []).append(place)
        for number, places in touched.items():
            chunk = self._chunk(number)
            for place in places:
                chunk[indices[place] % self._layout.chunk_frames] = images[place]
            first = number * self._layout.chunk_frames
            self._array[first : first + self._layout.chunk_frames] = chunk

    def trim(self, extent: int) -> None:
        """Cut the array to `extent` frames; room that was made for frames that never came goes."""
        if self._array.shape[0] != extent:
            self._array.resize((extent, *self._layout.frame_shape))

    def _whole(self, frames: int) -> int:
        return -(-frames // self._layout.chunk_frames) * self._layout.chunk_frames

    def _reach(self, extent: int) -> None:
        present = self._array.shape[0]
        if present < extent:
            step = GROW_CHUNKS * self._layout.chunk_frames
            self._array.resize((-(-extent // step) * step, *self._layout.frame_shape))
        elif present != self._whole(present):  # trimmed when its run ended, and now continued
            self._array.resize((self._whole(present), *self._layout.frame_shape))

    def _chunk(self, number: int) -> npt.NDArray[Any]:
        chunk = self._open.pop(number, None)
        if chunk is None and number >= self._fresh:
            chunk = np.full(self._layout.chunk_shape, self._layout.fill, self._layout.dtype)
        elif chunk is None:
            first = number * self._layout.chunk_frames
            chunk = np.array(self._array[first : first + self._layout.chunk_frames])
        self._fresh = max(self._fresh, number + 1)
        self._open[number] = chunk
        # What falls out is on disk: `write` stores a chunk before it opens the next, and a write that failed is repeated whole.
        while len(self._open) > OPEN_CHUNKS:
            self._open.popitem(last=False)
        return chunk


def _codec(dtype: np.dtype[Any]) -> BloscCodec | ZstdCodec:
    # Measured on class maps and smooth complex objects inside a support, a chunk of 64 x 104 x 104: zstd stores class maps in
    # 6 % of their size; shuffled lz4 stores objects in 58-66 % of it and is faster than no compression, as less is written.
    if dtype.kind == "c":
        return BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=dtype.itemsize // 2)
    return ZstdCodec(level=1)
