"""Frames at their places on a canvas -> the canvas after them, on a CUDA card: what overlap.py does on the CPU, many frames at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import BACKWARD, FORWARD, load_cupy, page_locked, plan_cufft
from streamprior.mosaic.overlap import DIM, FLOOR, Canvas, Corners, Rule, Shots, light_without
from streamprior.mosaic.probe import ProbePlaces

SOURCE = Path(__file__).with_name("kernels.cu")

KERNELS = ("illuminate", "illuminate_patch", "constrain", "step_patch", "step_canvas", "compare_probe", "gather", "add_up")

F32, I32 = np.float32, np.int32
C64 = np.complex64

_THREADS = 256
"""As in kernels.cu."""

_FIELD_BYTES = 2**28
"""Of the far fields that are computed together. Larger batches gain nothing: this is more than the card's cache and fills all of it."""

_LARGEST_BATCH = 1024
"""Frames; bounds the number of plans, each of which keeps a workspace of its own."""

Batch = tuple[int, int]
"""First frame of a launch in the order of the call, and the one after its last."""


def independent(corners: npt.NDArray[np.int64], shape: tuple[int, int]) -> list[npt.NDArray[np.int64]]:
    """Frames in the order of the scan -> groups that may be put in one after another, all frames of a group at once.

    The windows of a group do not overlap, and of two frames whose windows do, the earlier one lies in an earlier group: the result is that
    of the frames one after another. Each frame lies in the first group that allows it.

    Parameters
    ----------
    corners : (B, 2), row and column of each window. shape : (H, W) of the windows.

    Returns
    -------
    Indices into corners, ascending within each group.
    """
    groups = np.zeros(len(corners), np.int64)
    for frame in range(1, len(corners)):
        over = (np.abs(corners[:frame] - corners[frame]) < shape).all(1)
        if over.any():
            groups[frame] = groups[:frame][over].max() + 1
    return [np.flatnonzero(groups == group) for group in range(int(groups.max(initial=-1)) + 1)]


@dataclass(frozen=True, slots=True)
class _Landed:
    """Shots on the card, in the order in which they are computed. corners, slots : int32. trust_apart : elements, 0 where one serves all.
    partials : (B, quantities, blocks) float64, sums over blocks of threads."""

    corners: Any
    slots: Any
    targets: Any
    trust: Any
    trust_apart: np.int32
    probes: Any
    partials: Any

    @property
    def apart(self) -> np.int32:
        return I32(self.partials.shape[1] * self.partials.shape[2])


class CudaOverlap:
    """A stream of a CUDA card with its FFT plans and buffers. It owns no canvas; for one thread at a time.

    Frames whose windows overlap are put in one after another, in their order; the others together (`independent`). Results are those of
    `CpuOverlap` but for the rounding of float32, and the same bits when a call is repeated.

    Parameters
    ----------
    shape : (H, W) of a frame. modes : of the probe.

    Raises
    ------
    ConfigError
        There is no card, or no cupy.
    """

    def __init__(self, shape: tuple[int, int], modes: int) -> None:
        self._cupy = load_cupy()
        # Not a non-blocking one: what its owner does to a canvas on the default stream must wait, and be waited for.
        self._stream = self._cupy.cuda.Stream()
        module = self._cupy.RawModule(code=SOURCE.read_text())
        self._kernels = {name: module.get_function(name) for name in KERNELS}
        self._shape, self._modes = shape, modes
        self._extents = (I32(modes), I32(shape[0]), I32(shape[1]))
        self._pixels = shape[0] * shape[1]
        self._blocks = -(-self._pixels // _THREADS)
        self._largest = _power_of_two(min(_LARGEST_BATCH, max(1, _FIELD_BYTES // (modes * self._pixels * 8))), down=True)
        self._corners, self._slots = (_Landing(self._cupy, self._stream, I32) for _ in range(2))
        self._targets, self._trust = (_Landing(self._cupy, self._stream, F32) for _ in range(2))
        self._probes = _CardProbes(self._cupy, self._stream, (modes, *shape))
        self._plans: dict[int, Any] = {}
        with self._stream:
            self._field = self._cupy.empty((0, modes, *shape), C64)
            self._patch = self._cupy.empty((0, *shape), C64)
            self._gradient = self._cupy.zeros((0, modes, *shape), C64)
            self._dose = self._cupy.zeros(shape, F32)
        self._asked = 0  # slots that the gradient has been added to

    def canvas(self, rows: int, columns: int) -> Canvas:
        with self._stream:
            canvas = Canvas(self._cupy.ones((rows, columns), C64), self._cupy.zeros((rows, columns), F32))
            self._stream.synchronize()  # sync: another overlap may use the canvas, on a stream of its own
        return canvas

    def grow(self, canvas: Canvas, rows: int, columns: int, row: int, column: int) -> Canvas:
        """A canvas of (rows, columns) that holds the old one from (row, column) on."""
        grown = self.canvas(rows, columns)
        height, width = canvas.light.shape
        with self._stream:
            grown.image[row : row + height, column : column + width] = canvas.image
            grown.light[row : row + height, column : column + width] = canvas.light
            self._stream.synchronize()  # sync: as for a new canvas
        return grown

    def passes(self, canvas: Canvas, shots: Shots, places: ProbePlaces, rule: Rule, refine: bool) -> npt.NDArray[np.float64]:
        """Put frames in, with the result of one after another. Returns (B, 3): sum (|field| - target)^2 before the first and the last
        update of each, and the part of its light that fell where others had been."""
        found = np.zeros((len(shots), 3))
        if not len(shots):
            return found
        groups = independent(shots.corners, self._shape)
        order = np.concatenate(groups)
        weights = (F32(rule.weight * places.peak), F32(rule.memory))
        levels = (F32(DIM * places.peak), F32(rule.lit))
        with self._stream:
            landed = self._landed(shots, order, places, 4)
            gradient = self._gradient_room(places, shots) if refine else None
            for batch in self._batches([len(group) for group in groups]):
                self._predict(canvas, landed, batch, 0)
                for step in range(1, rule.iterations):
                    self._step_patch(canvas, landed, batch, weights)
                    self._predict_again(landed, batch, step)
                if gradient is not None:
                    self._compare(canvas, landed, batch, gradient)
                self._step_canvas(canvas, landed, batch, (*weights, *levels))
            sums = self._fetched_sums(landed)
        found[order, 0] = sums[:, 0]
        found[order, 1] = sums[:, 0 if rule.iterations == 1 else 1]
        found[order, 2] = np.divide(sums[:, 2], sums[:, 3], out=np.zeros(len(shots)), where=sums[:, 3] > 0)
        return found

    def gather(self, canvas: Canvas, total: Canvas, shots: Shots, places: ProbePlaces, refine: bool) -> npt.NDArray[np.float64]:
        """Add to `total` what frames ask of a canvas that stands still; `project` then moves it. Returns (B,): sum (|field| - target)^2 of
        each."""
        if not len(shots):
            return np.zeros(0)
        with self._stream:
            landed = self._landed(shots, np.arange(len(shots)), places, 1)
            gradient = self._gradient_room(places, shots) if refine else None
            for first, last in self._batches([len(shots)]):
                self._predict(canvas, landed, (first, last), 0)
                if gradient is not None:
                    self._compare(canvas, landed, (first, last), gradient)
                self._gather(canvas, total, landed, (first, last), shots.corners[first:last])
            return self._fetched_sums(landed)[:, 0]

    def project(self, canvas: Canvas, total: Canvas) -> None:
        """The overlap projection: image += total / light."""
        cupy = self._cupy
        with self._stream:
            canvas.image += total.image / (total.light + cupy.maximum(total.light.max(), F32(1e-30)) * F32(FLOOR))
            self._stream.synchronize()  # sync: as for a new canvas

    def take_gradient(self) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]:
        """What the frames since the last call ask of the probe (slots, modes, H, W), and the sum of |object|^2 under it (H, W); the slots
        are those up to the last that a frame had."""
        with self._stream:
            asked = self._gradient[: self._asked]
            gradient, dose = asked.get(), self._dose.get()  # sync: the probe is moved on the CPU
            asked[...] = 0
            self._dose[...] = 0
        self._asked = 0
        return gradient, dose

    def without(self, canvas: Canvas, corners: Corners, slots: npt.NDArray[np.int64], places: ProbePlaces) -> Canvas:
        """As `CpuOverlap.without`, on the host: it is asked once a sweep."""
        with self._stream:
            light = light_without(canvas.light.get(), corners, slots, places)  # sync: the light leaves the card
            return Canvas(canvas.image, self._cupy.asarray(light))

    def fetch(self, canvas: Canvas) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]:
        with self._stream:
            return canvas.image.get(), canvas.light.get()  # sync: the picture leaves the card

    def _landed(self, shots: Shots, order: npt.NDArray[np.int64], places: ProbePlaces, quantities: int) -> _Landed:
        """Send shots to the card in this order; returns before they are there."""
        own = len(shots.trust) > 1
        return _Landed(
            corners=self._corners.land(shots.corners.astype(I32), order),
            slots=self._slots.land(shots.slots.astype(I32), order),
            targets=self._targets.land(shots.targets, order),
            trust=self._trust.land(shots.trust, order if own else np.zeros(1, np.int64)),
            trust_apart=I32(self._pixels if own else 0),
            probes=self._probes.holding(places, shots.slots),
            partials=self._cupy.empty((len(shots), quantities, self._blocks), np.float64),
        )

    def _batches(self, sizes: list[int]) -> Iterator[Batch]:
        """Groups of these sizes, one behind the other -> launches that the buffers hold."""
        end = 0
        for size in sizes:
            start, end = end, end + size
            for first in range(start, end, self._largest):
                yield first, min(first + self._largest, end)

    def _predict(self, canvas: Canvas, landed: _Landed, batch: Batch, step: int) -> None:
        """The mosaic's far fields of these frames, held to what was counted, and back again."""
        field = self._field_room(batch[1] - batch[0])
        source = (landed.slots, landed.corners, landed.probes, canvas.image, I32(canvas.image.shape[1]))
        self._launch("illuminate", batch, *source, field)
        self._constrain(landed, batch, step)

    def _predict_again(self, landed: _Landed, batch: Batch, step: int) -> None:
        """The same, of the frames' own patches."""
        self._launch("illuminate_patch", batch, landed.slots, landed.probes, self._patch, self._field)
        self._constrain(landed, batch, step)

    def _constrain(self, landed: _Landed, batch: Batch, step: int) -> None:
        # cuFFT wants to know its batch when a plan is made. Powers of two keep plans few; what lies in the field behind the frames is
        # transformed with them and never read.
        size = _power_of_two(batch[1] - batch[0])
        field = self._field[:size]
        plan = self._plans.get(size)
        if plan is None:
            plan = self._plans[size] = plan_cufft(self._cupy, self._shape, size * self._modes)
        plan.fft(field, field, FORWARD)
        misfit = landed.partials[:, min(step, 1)]
        self._launch("constrain", batch, landed.targets, landed.trust, landed.trust_apart, field, misfit, landed.apart)
        plan.fft(field, field, BACKWARD)

    def _step_patch(self, canvas: Canvas, landed: _Landed, batch: Batch, weights: tuple[np.float32, np.float32]) -> None:
        if len(self._patch) < batch[1] - batch[0]:
            self._patch = self._cupy.empty((len(self._field), *self._shape), C64)
        source = (landed.slots, landed.corners, landed.probes, canvas.image, canvas.light, I32(canvas.image.shape[1]))
        self._launch("step_patch", batch, *source, self._field, self._patch, *weights)

    def _step_canvas(self, canvas: Canvas, landed: _Landed, batch: Batch, numbers: tuple[np.float32, ...]) -> None:
        source = (landed.slots, landed.corners, landed.probes, canvas.image, canvas.light, I32(canvas.image.shape[1]))
        seen, everywhere = landed.partials[:, 2], landed.partials[:, 3]
        self._launch("step_canvas", batch, *source, self._field, *numbers, seen, everywhere, landed.apart)

    def _compare(self, canvas: Canvas, landed: _Landed, batch: Batch, gradient: Any) -> None:
        first, last = batch
        source = (landed.slots, landed.corners, landed.probes, canvas.image, I32(canvas.image.shape[1]), self._field)
        kernel = self._kernels["compare_probe"]
        arguments = (I32(first), I32(last - first), *source, gradient, self._dose, *self._extents)
        kernel((self._blocks, self._modes), (_THREADS,), arguments)

    def _gather(self, canvas: Canvas, total: Canvas, landed: _Landed, batch: Batch, corners: npt.NDArray[np.int64]) -> None:
        """Only pixels of the canvas that a frame of the batch has under its window are looked at."""
        first, last = batch
        top, left = (int(corner) for corner in corners.min(0))
        rows, across = (int(corner) + length for corner, length in zip(np.ptp(corners, 0), self._shape, strict=True))
        source = (landed.slots, landed.corners, landed.probes, canvas.image, I32(canvas.image.shape[1]), self._field)
        kernel = self._kernels["gather"]
        box = (I32(top), I32(left), I32(rows), I32(across))
        arguments = (I32(first), I32(last - first), *source, total.image, total.light, *box, *self._extents)
        kernel((-(-rows * across // _THREADS),), (_THREADS,), arguments)

    def _launch(self, name: str, batch: Batch, *arguments: Any) -> None:
        self._kernels[name]((self._blocks, batch[1] - batch[0]), (_THREADS,), (I32(batch[0]), *arguments, *self._extents))

    def _fetched_sums(self, landed: _Landed) -> npt.NDArray[np.float64]:
        """(B, quantities): the partial sums added up, on the CPU."""
        frames, quantities, blocks = landed.partials.shape
        sums = self._cupy.empty((frames, quantities), np.float64)
        kernel = self._kernels["add_up"]
        kernel((frames * quantities,), (_THREADS,), (landed.partials, sums, I32(blocks)))
        return np.asarray(sums.get())  # sync: the only one of a call; the caller wants to know

    def _field_room(self, frames: int) -> Any:
        if len(self._field) < frames:
            self._field = self._cupy.empty((_power_of_two(frames), self._modes, *self._shape), C64)
        return self._field

    def _gradient_room(self, places: ProbePlaces, shots: Shots) -> Any:
        if len(self._gradient) < len(places.probes):
            grown = self._cupy.zeros((len(places.probes), self._modes, *self._shape), C64)
            grown[: len(self._gradient)] = self._gradient
            self._gradient = grown
        self._asked = max(self._asked, int(shots.slots.max()) + 1)
        return self._gradient


class _Landing:
    """Owns an array on the card and the page-locked memory that it is filled from; a copy out of other memory would hold up the thread.

    Every call to the overlap ends with a wait for the card, so that a copy has been made before the memory is written again.
    """

    def __init__(self, cupy: Any, stream: Any, kind: type) -> None:
        self._cupy, self._stream, self._kind = cupy, stream, kind
        self._host: npt.NDArray[Any] = np.empty(0, kind)
        self._card: Any = None

    def land(self, rows: npt.NDArray[Any], order: npt.NDArray[np.int64]) -> Any:
        """rows, in this order -> their copy on the card, when the stream gets there."""
        shape = (len(order), *rows.shape[1:])
        size = int(np.prod(shape))
        if self._host.size < size:
            self._host = page_locked(self._cupy, (_power_of_two(size),), self._kind)
            self._card = self._cupy.empty(self._host.shape, self._kind)
        host, card = self._host[:size].reshape(shape), self._card[:size].reshape(shape)
        np.take(rows, order, 0, host, "clip")  # "raise" would go through a buffer of its own
        card.set(host, self._stream)
        return card


class _CardProbes:
    """Owns the card's copies of the probes that frames have needed. shape : (M, H, W)."""

    def __init__(self, cupy: Any, stream: Any, shape: tuple[int, int, int]) -> None:
        self._cupy, self._stream, self._shape = cupy, stream, shape
        self._of: tuple[ProbePlaces, int] | None = None
        self._held: set[int] = set()
        self._host: npt.NDArray[Any] = np.empty((0, *shape), C64)
        with stream:
            self._card = cupy.empty((0, *shape), C64)

    def holding(self, places: ProbePlaces, slots: npt.NDArray[np.int64]) -> Any:
        """(S, M, H, W) on the card, right at these slots when the stream gets there; only what is not there yet is sent."""
        if self._of is None or self._of[0] is not places or self._of[1] != places.version:
            self._of = (places, places.version)
            self._held.clear()
        if len(self._card) < len(places.probes):
            grown = self._cupy.empty((len(places.probes), *self._shape), C64)
            grown[: len(self._card)] = self._card
            self._card = grown
        fresh = sorted(set(slots.tolist()) - self._held)
        if len(self._host) < len(fresh):
            self._host = page_locked(self._cupy, (_power_of_two(len(fresh)), *self._shape), C64)
        for slot, host in zip(fresh, self._host, strict=False):
            host[...] = places.probes[slot]
            self._card[slot].set(host, self._stream)
        self._held.update(fresh)
        return self._card


def _power_of_two(number: int, down: bool = False) -> int:
    """The first power of two from `number` on, or the last one up to it."""
    exponent = number.bit_length() - 1 if down else (number - 1).bit_length()
    return 1 << exponent
