"""Photons -> Classes on a CUDA card: what classify.py does, many frames at once, copies beside computing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import card_errors, check_backend, load_cupy, page_locked
from streamprior.prior import FEATURES, Prior
from streamprior.records import Batch, Classes
from streamprior.stages.classify import Classifier, fold
from streamprior.stages.landing_cuda import Landing, copy_items, map_apart, power_of_two

SOURCE = Path(__file__).with_name("classify.cu")
KERNELS = ("add_photons", "find_scales", "classify_tiles", "find_means")
COUNTS = {"uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int", "float32": "float"}
"""dtype of counts -> C's word for it."""

F32, I32 = np.float32, np.int32

_THREADS, _ACROSS, _DOWN = 256, 32, 16
"""As in classify.cu."""

_CHUNK_PIXELS = 2**22
"""Of the frames that travel together: enough to fill a card, little enough that the first one is there soon."""

_MOST_BLOCKS = 64
"""Blocks of threads that add up one frame's photons."""


def make_classifier(prior: Prior, backend: str = "auto") -> Classifier | CudaClassifier:
    """What classifies a prior's frames on "cpu", "cuda", or "auto": a CUDA card where there is one.

    Raises ConfigError where the backend cannot compute here, MemoryError where the card has no room, DeviceLost where it has failed.
    """
    if check_backend(backend, ("cpu", "cuda")) == "cpu":
        return Classifier(prior)
    with card_errors(load_cupy()):
        return CudaClassifier(prior)


def source_for(kind: str) -> str:
    """What the compiler is given for counts of this dtype, a key of COUNTS."""
    return f"typedef {COUNTS[kind]} count_t;\n{SOURCE.read_text()}"


class CudaClassifier:
    """The stage on a card: owns its streams, the folded weights of one prior, and the places of frames on their way; one for each thread.

    Classes are those of `classify.Classifier` but where float32 rounds a tie another way; the same bits when a call is repeated, whatever
    frames come together. Frames travel in chunks: one comes in while the one before is computed and its classes leave.

    Raises ConfigError where there is no card, or no cupy.
    """

    name = "classify"

    def __init__(self, prior: Prior) -> None:
        cupy = self._cupy = load_cupy()
        self._shape = prior.geometry.shape
        self._normaliser = np.float64(prior.normaliser)
        self._pixels = I32(math.prod(self._shape))
        self._tiles = -(-self._shape[0] // _DOWN) * -(-self._shape[1] // _ACROSS)
        self._blocks = min(_MOST_BLOCKS, -(-int(self._pixels) // (4 * _THREADS)))
        tables = fold(prior)
        forms = np.concatenate([tables.weights, tables.offsets[:, None]], 1)
        self._numbers = (I32(tables.classes), I32(len(forms)))
        self._has_angle = I32(tables.angle.size > 0)
        self._shared = 4 * (len(FEATURES) + forms.size)
        self._up, self._stream, self._down = (cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        with self._stream:
            self._forms, self._taps, self._angle = (cupy.asarray(array) for array in (forms, tables.taps, tables.angle))
            self._stream.synchronize()  # sync: once; tables were copied from memory that is not locked
        self._kernels: dict[str, dict[str, Any]] = {}
        self._slots: dict[str, tuple[_Slot, _Slot]] = {}

    def __call__(self, batch: Batch) -> Batch:
        if batch.photons is None:
            raise ValueError("the batch holds no photons: prepare comes before classify")
        return replace(batch, classes=self.classes(batch.photons.counts, batch.photons.valid))

    def classes(self, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Classes:
        """Classes of counts (B, H, W); valid is (H, W) or (B, H, W).

        Raises
        ------
        ValueError
            The shapes are not the prior's.
        TypeError
            Counts of another dtype than uint8, uint16, uint32 and float32.
        MemoryError
            There was no room for so many frames. What is left half made here is not to be used again; a new classifier is.
        DeviceLost
            The card has failed for this process.
        """
        if counts.ndim != 3 or counts.shape[1:] != self._shape:
            raise ValueError(f"counts have shape {counts.shape}, this prior classifies (B, {self._shape[0]}, {self._shape[1]})")
        if valid.shape not in (self._shape, counts.shape):
            raise ValueError(f"valid has shape {valid.shape}, the counts {counts.shape}")
        with card_errors(self._cupy, (self._up, self._stream, self._down)):
            return self._classes(counts, valid)

    def _classes(self, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Classes:
        slots = self._prepared(counts.dtype)
        ids = page_locked(self._cupy, counts.shape, np.uint8)
        distance = page_locked(self._cupy, (len(counts),), F32)
        room = max(1, _CHUNK_PIXELS // int(self._pixels))
        masks = np.broadcast_to(valid, counts.shape)
        try:
            for number, first in enumerate(range(0, len(counts), room)):
                index = np.arange(first, min(first + room, len(counts)))
                slot = slots[number % len(slots)]
                slot.free.synchronize()  # sync: the chunk that was in it has left
                slot.fill(counts, masks, index, self._blocks, self._tiles)
                self._compute(slot, self._kernels[counts.dtype.name])
                self._down.wait_event(slot.computed)
                for card, host in ((slot.ids, ids), (slot.means, distance)):
                    card[: len(index)].get(stream=self._down, out=host[first : first + len(index)], blocking=False)
                slot.free.record(self._down)
        finally:
            self._down.synchronize()  # sync: the caller wants the result; nor may its memory be written later
        return Classes(ids, distance)

    def _prepared(self, dtype: np.dtype[Any]) -> tuple[_Slot, _Slot]:
        """Kernels and places for counts of this dtype, made when the first of them come."""
        if dtype.name not in COUNTS:
            raise TypeError(f"counts are {dtype}; a card classifies {', '.join(COUNTS)}: convert with counts.astype(np.float32)")
        if dtype.name not in self._kernels:
            module = self._cupy.RawModule(code=source_for(dtype.name))
            self._kernels[dtype.name] = {name: module.get_function(name) for name in KERNELS}
            self._slots[dtype.name] = (_Slot(self._cupy, self._shape, dtype.name), _Slot(self._cupy, self._shape, dtype.name))
        return self._slots[dtype.name]

    def _compute(self, slot: _Slot, kernels: dict[str, Any]) -> None:
        """Everything that is done to a chunk; nothing here waits."""
        for landing in (slot.counts, slot.valid):
            landing.send(self._up)
        slot.landed.record(self._up)
        self._stream.wait_event(slot.landed)
        frames, height, width = slot.counts.number, *(I32(length) for length in self._shape)
        came = (slot.counts.card, slot.valid.card, map_apart(slot.valid, self._pixels))
        tables = (self._taps, self._forms, *self._numbers, self._angle, self._has_angle)
        with self._stream:
            kernels["add_photons"]((self._blocks, frames), (_THREADS,), (*came, slot.photons, self._pixels))
            kernels["find_scales"]((frames,), (_THREADS,), (slot.photons, self._normaliser, slot.scales, I32(self._blocks)))
            arguments = (*came, slot.scales, *tables, slot.ids, slot.sums, height, width)
            kernels["classify_tiles"]((self._tiles, frames), (_THREADS,), arguments, shared_mem=self._shared)
            kernels["find_means"]((frames,), (_THREADS,), (slot.sums, slot.scales, slot.means, I32(self._tiles)))
            slot.computed.record(self._stream)


class _Slot:
    """Owns the places of a chunk on its way, and the events by which the streams wait for each other."""

    def __init__(self, cupy: Any, shape: tuple[int, ...], kind: str) -> None:
        self._cupy, self._shape = cupy, shape
        self.counts, self.valid = Landing(cupy, shape, kind), Landing(cupy, shape, np.uint8)
        self.landed, self.computed, self.free = (cupy.cuda.Event(disable_timing=True) for _ in range(3))
        self._room = 0

    def fill(self, counts: npt.NDArray[Any], masks: npt.NDArray[np.bool_], index: npt.NDArray[np.intp], blocks: int, tiles: int) -> None:
        """Copy frames into page-locked memory; a mask that is one for all only once."""
        copy_items(self.counts.holding(len(index)), counts, (index,))
        index_of_masks = index[:1] if masks.strides[0] == 0 else index
        copy_items(self.valid.holding(len(index_of_masks)), masks, (index_of_masks,))
        if self._room < len(index):
            room = self._room = power_of_two(len(index))
            self.ids = self._cupy.empty((room, *self._shape), np.uint8)
            self.means = self._cupy.empty((room,), F32)
            self.photons = self._cupy.empty((room, 2, blocks), np.float64)
            self.scales = self._cupy.empty((room, 2), np.float64)
            self.sums = self._cupy.empty((room, tiles), np.float64)
