"""Objects on a card -> objects some iterations later: by planned cuFFT, or by a kernel that keeps each frame in shared memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import BACKWARD, FORWARD, plan_cufft
from streamprior.stages.schedule import OUTSIDE, Iterate

FOLDER = Path(__file__).parent
SOURCE = FOLDER / "refine.cu"
FUSED_SOURCE = FOLDER / "refine_fused.cu"

F32, I32 = np.float32, np.int32
C64 = np.complex64

THREADS = 256
EACH = 4
"""As in refine.cu."""

_CUFFT_PIXELS = 2**20
"""Of the frames that cuFFT transforms together. 64 frames of 128 x 128 fill a card; with target and support they take 22 MB, which stay in
the second-level cache (40 MB on an A100, 50 MB on an H100 or H200) from one iteration to the next."""

_ROUNDS = 4
"""Rounds of blocks, all multiprocessors busy, in a full launch of the fused kernel: whole ones, so that none is left waiting for a few."""

_LARGEST_RADIX = 16
"""A butterfly of 16 complex numbers and what it needs beside them fit the registers of a thread; the next larger one would not."""

_THREADS_OF_A_PROCESSOR = {8: 1024, 13: 768, 16: 512}
"""Largest radix -> threads that share a multiprocessor's 65,536 registers without any being spilled (ptxas -v: 62, 80, 127)."""

_OWN_OF_A_BLOCK = 1024 + 8 * 1024
"""Shared memory that a block has beside the frame, bytes, at most: what the system takes, sums and the list of rows."""


@dataclass(frozen=True, slots=True)
class Objects:
    """Objects in hand on the card, n of them and room for more; see refine.cu for the order of pixels.

    psi, anchor : (room, *shape) complex64. inside : uint8. target : float32, (frames, *shape). frame_of : (room,) int32, whose target is an
    object's. numbers : (room, ERRORS + iterations + 1) float64.
    """

    psi: Any
    anchor: Any
    inside: Any
    target: Any
    frame_of: Any
    numbers: Any


class CufftEngine:
    """Owns cuFFT's plan for `room` frames of one shape and their far fields.

    It always transforms so many, whatever there is: cuFFT may round otherwise in another batch, and a frame's bits would depend on how many
    came with it. What lies behind the frames in hand is computed with them and never read.

    rows, columns : (n,) int32, centred place of each row and column of a field. fixed : a launch is the same for any number of objects.
    """

    name = "cufft"
    fixed = True

    def __init__(self, cupy: Any, kernels: dict[str, Any], shape: tuple[int, ...], room: int | None) -> None:
        self._cupy, self._kernels = cupy, kernels
        self._pixels = math.prod(shape)
        self.room = room or max(1, _CUFFT_PIXELS // self._pixels)
        self.rows, self.columns = centred_places(shape)
        self._plan = plan_cufft(cupy, shape, self.room)
        self._blocks = -(-self._pixels // (THREADS * EACH))
        self.field = cupy.zeros((self.room, *shape), C64)
        self._misfits = cupy.empty((0, self.room, self._blocks), np.float64)

    def prepare(self, objects: int, iterations: int) -> None:
        """Make room for so many objects and the misfits of so many iterations."""
        if len(self._misfits) < iterations:
            self._misfits = self._cupy.empty((iterations, self.room, self._blocks), np.float64)

    def iterate(self, objects: Objects, count: int, step: Iterate, weight: float, done: int) -> None:
        if step.times == 0:
            return
        old, fresh = (F32(share) for share in OUTSIDE[step.rule])
        grid, pixels = (self._blocks, self.room), I32(self._pixels)
        rule = (objects.inside, objects.anchor, old, fresh, F32(weight), pixels)
        for i in range(step.times):
            self._plan.fft(objects.psi, self.field, FORWARD)
            held = (self.field, objects.target, objects.frame_of, self._misfits[i], F32(1 / self._pixels), pixels)
            self._kernels["project_modulus"](grid, (THREADS,), held)
            self._plan.fft(self.field, self.field, BACKWARD)
            self._kernels["update_object"](grid, (THREADS,), (objects.psi, self.field, *rule))
        counts = (I32(done), I32(step.times), I32(self.room), I32(self._blocks))
        sums = (self._misfits, objects.numbers, I32(objects.numbers.shape[1]), *counts)
        self._kernels["add_misfits"]((-(-step.times * self.room // THREADS),), (THREADS,), sums)

    def transform(self, objects: Objects, count: int) -> None:
        """Fill `field` from psi."""
        self._plan.fft(objects.psi, self.field, FORWARD)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a frame of (height, width) lies in shared memory, and who works on it.

    row_radices, column_radices : lengths of the stages of a transform along a row and along a column. pitch : of a row. blocks : frames
    that share a multiprocessor. shared_bytes : of one frame.
    """

    height: int
    width: int
    pitch: int
    row_radices: tuple[int, ...]
    column_radices: tuple[int, ...]
    threads: int
    blocks: int

    @property
    def shared_bytes(self) -> int:
        return 8 * (self.height * self.pitch + self.width + self.height)

    @property
    def source(self) -> str:
        """What the compiler is given."""
        values = {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "PITCH": self.pitch,
            "ROW_RADICES": ", ".join(map(str, self.row_radices)),
            "COLUMN_RADICES": ", ".join(map(str, self.column_radices)),
            "FUSED_THREADS": self.threads,
            "BLOCKS": self.blocks,
        }
        defined = "".join(f"#define {name} {value}\n" for name, value in values.items())
        return SOURCE.read_text() + defined + FUSED_SOURCE.read_text()


def fused_layout(shape: tuple[int, ...], block_bytes: int, processor_bytes: int) -> Layout | None:
    """The layout of frames that fit; None for volumes, lengths with a prime factor above 13, and frames larger than shared memory.

    Parameters
    ----------
    shape : of a frame. block_bytes, processor_bytes : shared memory that a block of threads may ask for, and that a multiprocessor has.
    """
    radices = [_radices(length) for length in shape]
    if len(shape) != 2 or not all(radices):
        return None
    height, width = shape
    largest = max(max(one) for one in radices)
    limit = next(threads for radix, threads in _THREADS_OF_A_PROCESSOR.items() if largest <= radix)
    frame = Layout(height, width, width | 1, radices[1], radices[0], 32, 1)
    if frame.shared_bytes + _OWN_OF_A_BLOCK > block_bytes:
        return None
    blocks = max(1, min(4, processor_bytes // (frame.shared_bytes + _OWN_OF_A_BLOCK)))
    # No more threads than a pass has butterflies for.
    wanted = -(-height * width // min(radices[0][0], radices[1][0]))
    threads = max(32, min(limit // blocks, 512, -(-wanted // 32) * 32) // 32 * 32)
    return Layout(height, width, width | 1, radices[1], radices[0], threads, blocks)


@cache
def _radices(length: int) -> tuple[int, ...]:
    """Factors of a length, at most 16 each, as few and as equal as can be, the largest first; none where there are none."""

    def factors(rest: int, largest: int) -> Iterator[tuple[int, ...]]:
        if rest == 1:
            yield ()
        for radix in range(min(rest, largest), 1, -1):
            if rest % radix == 0:
                yield from ((radix, *others) for others in factors(rest // radix, radix))

    found = list(factors(length, _LARGEST_RADIX)) if length > 1 else []
    return min(found, key=lambda radices: (len(radices), radices), default=())


class FusedEngine:
    """Owns the kernel for frames of one layout and their far fields. Attributes as of CufftEngine; any number of objects up to `room`."""

    name = "fused"
    fixed = False

    def __init__(self, cupy: Any, layout: Layout, room: int | None) -> None:
        shape = (layout.height, layout.width)
        self._cupy, self._layout = cupy, layout
        self._pixels = math.prod(shape)
        self.room = room or _ROUNDS * layout.blocks * cupy.cuda.Device().attributes["MultiProcessorCount"]
        rows, columns = centred_places(shape)
        self.rows = rows[frequency_order(layout.column_radices)]
        self.columns = columns[frequency_order(layout.row_radices)]
        module = cupy.RawModule(code=layout.source, options=("-std=c++17",))
        self._iterate, self._transform = (module.get_function(name) for name in ("iterate_objects", "transform_objects"))
        for kernel in (self._iterate, self._transform):
            kernel.max_dynamic_shared_size_bytes = layout.shared_bytes
        self._turns = cupy.asarray(np.concatenate([turns(length) for length in (layout.width, layout.height)]))
        self.field = cupy.empty((0, *shape), C64)

    def prepare(self, objects: int, iterations: int) -> None:
        """Make room for so many objects."""
        if len(self.field) < objects:
            self.field = self._cupy.empty((objects, *self.field.shape[1:]), C64)

    def iterate(self, objects: Objects, count: int, step: Iterate, weight: float, done: int) -> None:
        if step.times == 0:
            return
        old, fresh = (F32(share) for share in OUTSIDE[step.rule])
        frames = (objects.target, objects.frame_of, objects.inside, objects.anchor, objects.psi)
        notes = (objects.numbers, I32(objects.numbers.shape[1]), I32(done), I32(step.times))
        arguments = (self._turns, *frames, *notes, old, fresh, F32(weight), F32(1 / self._pixels))
        self._iterate((count,), (self._layout.threads,), arguments, shared_mem=self._layout.shared_bytes)

    def transform(self, objects: Objects, count: int) -> None:
        """Fill `field` from psi."""
        arguments = (self._turns, objects.psi, self.field)
        self._transform((count,), (self._layout.threads,), arguments, shared_mem=self._layout.shared_bytes)


def make_engine(
    cupy: Any, kernels: dict[str, Any], shape: tuple[int, ...], engine: str = "auto", room: int | None = None
) -> CufftEngine | FusedEngine:
    """The engine of that name, for frames of one shape.

    Parameters
    ----------
    engine : {"auto", "cufft", "fused"}
        auto is the fused kernel where a frame fits into shared memory.
    room : frames in hand together, or what suits the engine.

    Raises
    ------
    ValueError
        A word that names no engine, or a frame that does not fit the fused one.
    """
    if engine not in ("auto", "cufft", "fused"):
        raise ValueError(f"engine is {engine!r}; on a card it is 'auto', 'cufft' or 'fused'")
    attributes = cupy.cuda.Device().attributes
    limits = attributes["MaxSharedMemoryPerBlockOptin"], attributes["MaxSharedMemoryPerMultiprocessor"]
    layout = None if engine == "cufft" else fused_layout(shape, *limits)
    if layout is not None:
        return FusedEngine(cupy, layout, room)
    if engine == "fused":
        raise ValueError(
            f"frames of {shape} do not fit the fused kernel: it takes two dimensions, sides that are products of factors up to 16, and no "
            f"more complex64 pixels than go into the {limits[0]} bytes of shared memory that this card gives a block; let engine be 'auto'"
        )
    return CufftEngine(cupy, kernels, shape, room)


def centred_places(shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """For arrays in FFT order: the centred row of each row (a volume's planes below each other) and the centred column of each column."""
    above = shape[:-1]
    rows = np.fft.ifftshift(np.arange(math.prod(above), dtype=I32).reshape(above)).reshape(-1)
    return rows, np.fft.ifftshift(np.arange(shape[-1], dtype=I32))


def frequency_order(radices: tuple[int, ...]) -> npt.NDArray[np.intp]:
    """Which frequency a transform by these stages leaves in each place: its mixed-radix digits, the first stage's changing slowest."""
    order, apart = np.zeros(1, np.intp), 1
    for radix in radices:
        order = (order[:, None] + apart * np.arange(radix)).reshape(-1)
        apart *= radix
    return order


def turns(length: int) -> npt.NDArray[np.complex64]:
    """exp(-2 pi i k / length), (length,): in double, then rounded."""
    return np.asarray(np.exp(-2j * np.pi * np.arange(length) / length), C64)
