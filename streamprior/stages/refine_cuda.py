"""Photons, Start -> Reconstruction on a CUDA card: what refine.py does frame by frame, many frames at once, copies beside computing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import card_errors, load_cupy, page_locked
from streamprior.records import FLAT, UNUSED, Reconstruction, Start
from streamprior.stages.iterate_cuda import C64, F32, I32, SOURCE, THREADS, Objects, centred_places, make_engine
from streamprior.stages.landing_cuda import Landing, copy_items, map_apart, power_of_two
from streamprior.stages.schedule import Iterate, Plan, Schedule, ShrinkWrap
from streamprior.stages.shrink import AREA_LIMITS
from streamprior.stages.told_cuda import ERRORS, Group, Told, reconstruction

KERNELS = (
    *("load_counts", "load_objects", "project_modulus", "update_object", "add_misfits", "score", "choose", "take_modulus", "blur"),
    *("find_support", "judge_held_out", "finish"),
)

_BLUR_SIGMAS = 4.0
"""Where the Gaussian of a shrink-wrap is cut: scipy.ndimage's default."""

_SLOTS = 2
"""Chunks on their way: while one is computed the next one comes in, and then the last one leaves."""


class CudaSolver:
    """Owns streams of a card with their plans and buffers for frames of one shape, for one thread; several may be in flight.

    `solve` does what `refine.Solver.solve` does, but for the rounding of float32. It gives the same bits when a call is repeated, and
    whatever other frames came with a frame.

    A call is cut into chunks. A chunk is copied into page-locked memory, goes to the card on one stream, is computed on a second and leaves
    on a third, and nothing waits for the card before the last chunk but what would overwrite a chunk still in use. psi and support of
    the result lie in page-locked memory, which the card writes to directly.

    Parameters
    ----------
    shape, plan, weight : as of `refine.Solver`.
    held_out : bool of that shape, centred: pixels that judge the result (`refine.free_islands`).
    engine : {"auto", "cufft", "fused"}, see `iterate_cuda.make_engine`.
    room : frames in a chunk, or what suits the engine.

    Raises
    ------
    ConfigError
        There is no card, or no cupy.
    ValueError
        A weight or a trial below 0, or an engine that does not fit.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        plan: Plan,
        weight: float,
        held_out: npt.NDArray[np.bool_],
        engine: str = "auto",
        room: int | None = None,
    ) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight is {weight}; the proximal weight is a finite number from 0")
        if plan.trial < 0:
            raise ValueError(f"trial is {plan.trial}; an arm is tried for 0 iterations or more")
        self._cupy = load_cupy()
        self._shape, self._steps, self._weight = shape, plan, weight
        self._trial = Schedule((Iterate("ER", plan.trial),) if plan.trial else ())
        self._pixels, self._width = I32(math.prod(shape)), I32(shape[-1])
        self._length = ERRORS + plan.longest + 1
        streams = (self._cupy.cuda.Stream(non_blocking=True) for _ in range(3))
        self._up, self._stream, self._down = streams
        module = self._cupy.RawModule(code=SOURCE.read_text())
        self._kernels = {name: module.get_function(name) for name in KERNELS}
        self._held = held_out
        self._build(engine, room)

    @property
    def engine(self) -> str:
        """The name of what iterates: "cufft" or "fused"."""
        return self._engine.name

    @property
    def room(self) -> int:
        """Frames in a chunk."""
        return self._engine.room

    def _build(self, engine: str, room: int | None) -> None:
        cupy = self._cupy
        with self._stream:
            self._engine = make_engine(cupy, self._kernels, self._shape, engine, room)
            # In the sample plane always in FFT order; in the detector plane as the engine has it.
            self._object_places = tuple(cupy.asarray(places) for places in centred_places(self._shape))
            self._field_places = tuple(cupy.asarray(places) for places in (self._engine.rows, self._engine.columns))
            self._held_out = cupy.asarray(self._held.astype(np.uint8))
            centred = (self._engine.rows[:, None] * self._width + self._engine.columns).reshape(-1)
            places = np.flatnonzero(self._held.reshape(-1)[centred])
            self._held_places = (cupy.asarray(places.astype(I32)), cupy.asarray(centred[places].astype(I32)))
            shrinks = [step for schedule in (self._steps.schedule, self._steps.alone) if schedule for step in schedule.steps]
            self._taps = {step.sigma: cupy.asarray(_gaussian(step.sigma)) for step in shrinks if isinstance(step, ShrinkWrap)}
            self._make_room(self._engine.room if self._engine.fixed else 1)
            self._stream.synchronize()  # sync: tables were copied from memory that is not locked
        self._slots = [_Slot(cupy, self._shape, self._length) for _ in range(_SLOTS)]

    def _make_room(self, objects: int) -> None:
        """Buffers for so many objects in hand; what was in hand is lost."""
        cupy = self._cupy
        self._engine.prepare(objects, self._steps.longest)
        self._frames = self._objects(cupy.zeros((objects, *self._shape), F32))
        self._arms: Objects | None = None
        self._smooth = [cupy.empty((objects if self._taps else 0, *self._shape), F32) for _ in range(2)]
        self._graphs: dict[tuple[bool, int, Schedule], Any] = {}

    def _objects(self, target: Any) -> Objects:
        cupy, room = self._cupy, len(target)
        # Zeros, not whatever was there: where an engine computes its whole room, nothing is slower than denormal numbers.
        psi, inside = cupy.zeros((room, *self._shape), C64), cupy.zeros((room, *self._shape), np.uint8)
        anchor = cupy.empty((room, *self._shape), C64) if self._weight > 0 else psi
        numbers = cupy.zeros((room, self._length), np.float64)
        return Objects(psi, anchor, inside, target, cupy.asarray(np.arange(room, dtype=I32)), numbers)

    def solve(
        self, counts: npt.NDArray[Any], arms: Start, valid: npt.NDArray[np.bool_], flags: npt.NDArray[np.uint32] | None
    ) -> Reconstruction:
        """Refine frames: counts and valid (B, *shape), arms (B, k, *shape); see `refine.refine`.

        Raises
        ------
        MemoryError
            There was no room for so many frames. What is left half made here is not to be used again; a new solver is.
        DeviceLost
            The card has failed for this process.
        """
        with card_errors(self._cupy, (self._up, self._stream, self._down)):
            return self._solve(counts, arms, valid, flags)

    def _solve(
        self, counts: npt.NDArray[Any], arms: Start, valid: npt.NDArray[np.bool_], flags: npt.NDArray[np.uint32] | None
    ) -> Reconstruction:
        used = arms.unit != UNUSED
        if used.sum(1).max(initial=0) > self._engine.room:
            self._build(self._engine.name, int(used.sum(1).max()))
        groups = self._groups(used, arms.unit)
        told = Told(
            psi=page_locked(self._cupy, (len(counts), *self._shape), C64),
            support=page_locked(self._cupy, (len(counts), *self._shape), np.uint8),
            numbers=page_locked(self._cupy, (len(counts), self._length), np.float64),
            trial=page_locked(self._cupy, (int(used.sum()),), np.float64),
        )
        chunks = [(group, index) for group in groups for index in self._chunks(group)]
        self._hold(max((min(int(used[index].sum()), self._engine.room) for _, index in chunks), default=1))
        place = [0, 0]  # of the chunk's first frame and first arm in what is told
        try:
            for number, (group, index) in enumerate(chunks):
                slot = self._slots[number % _SLOTS]
                slot.free.synchronize()  # sync: the chunk that was in it has left
                slot.fill(counts, arms, valid, index, used)
                self._send(slot)
                self._compute(slot, group)
                self._fetch(slot, told, *place)
                place = [place[0] + slot.frames, place[1] + slot.arms]
        finally:
            self._down.synchronize()  # sync: the caller wants the result; nor may its memory be written later
        return reconstruction(told, groups, used, self._steps.trial, flags)

    def _groups(self, used: npt.NDArray[np.bool_], unit: npt.NDArray[np.int32]) -> list[Group]:
        several = used.sum(1) > 1
        flat = ~several & (np.where(used, unit, FLAT) == FLAT).all(1)
        abstained = flat if self._steps.alone is not None else np.zeros_like(flat)
        groups = [
            Group(np.flatnonzero(several), True, self._steps.schedule),
            Group(np.flatnonzero(~several & ~abstained), False, self._steps.schedule),
            Group(np.flatnonzero(abstained), False, self._steps.alone or self._steps.schedule),
        ]
        return [group for group in groups if len(group.index)]

    def _hold(self, objects: int) -> None:
        """Room for so many objects, and twice as many as before, so that there is an end to making room."""
        if len(self._frames.psi) < objects:
            with self._stream:
                self._make_room(min(self._engine.room, max(objects, 2 * len(self._frames.psi))))

    def _chunks(self, group: Group) -> Iterator[npt.NDArray[np.intp]]:
        for first in range(0, len(group.index), self._engine.room):
            yield group.index[first : first + self._engine.room]

    def _send(self, slot: _Slot) -> None:
        for landing in slot.inputs:
            landing.send(self._up)
        slot.landed.record(self._up)
        self._stream.wait_event(slot.landed)

    def _compute(self, slot: _Slot, group: Group) -> None:
        """Everything that is done to a chunk; nothing here waits."""
        frames, done = self._frames, 0
        row = (I32(self._length), self._width, self._pixels)
        with self._stream:
            counted = (slot.counts.card, slot.valid.card, map_apart(slot.valid, self._pixels), self._held_out)
            self._one_block_each("load_counts", slot.frames, *counted, *self._field_places, frames.target, frames.numbers, *row)
            if group.trial:
                done = self._steps.trial
                for first, last in _rounds(slot.first_arm.host[: slot.frames + 1], len(frames.psi)):
                    self._try(slot, first, last)
            else:
                self._load_objects(slot, frames, 0, slot.frames)
            done = self._run(frames, slot.frames, group.schedule, done)
            self._engine.transform(frames, slot.frames)
            self._score(frames, slot.frames, done)
            held = (*self._held_places, I32(len(self._held_places[0])))
            judged = (slot.counts.card, slot.valid.card, map_apart(slot.valid, self._pixels), *held)
            self._one_block_each(
                "judge_held_out", slot.frames, self._engine.field, *judged, frames.numbers, I32(self._length), self._pixels
            )
            came = (slot.start.card, slot.support.card, map_apart(slot.support, self._pixels), slot.first_arm.card, *self._object_places)
            left = (slot.object, slot.object_support, slot.numbers, self._width, self._pixels)
            noted = (frames.numbers, I32(self._length), I32(done))
            self._one_block_each("finish", slot.frames, frames.psi, frames.inside, *came, *noted, *left)
            slot.computed.record(self._stream)

    def _try(self, slot: _Slot, first: int, last: int) -> None:
        """The trial of all arms of some frames of the chunk; the best of each frame is in hand after it."""
        if self._arms is None:
            self._arms = self._objects(self._frames.target)
        arms, frames, first_arm = self._arms, self._frames, slot.first_arm.host
        skipped, count = int(first_arm[first]), int(first_arm[last] - first_arm[first])
        self._load_objects(slot, arms, skipped, count)
        done = self._run(arms, count, self._trial, 0)
        self._engine.transform(arms, count)
        self._score(arms, count, done)
        tried = (arms.psi, arms.inside, arms.anchor, arms.numbers, slot.first_arm.card, I32(skipped), I32(first))
        kept = (frames.psi, frames.inside, frames.anchor, F32(self._weight), frames.numbers, slot.trial)
        self._one_block_each("choose", last - first, *tried, *kept, I32(self._length), I32(done), self._pixels)

    def _load_objects(self, slot: _Slot, objects: Objects, first: int, count: int) -> None:
        own = slot.support.number > 1
        support = slot.support.card[first:] if own else slot.support.card
        came = (slot.start.card[first:], support, map_apart(slot.support, self._pixels), slot.owner.card[first:], *self._object_places)
        goal = (objects.frame_of, objects.psi, objects.inside, objects.anchor, F32(self._weight), objects.numbers)
        self._one_block_each("load_objects", count, *came, *goal, I32(self._length), self._width, self._pixels)

    def _run(self, objects: Objects, count: int, schedule: Schedule, done: int) -> int:
        """All steps of a schedule; returns the iterations done after it.

        Where the launches do not depend on the number of objects they are captured in a graph: the CPU then takes one call where it took
        four an iteration. Not the first time, which also loads kernels, and may be the only one.
        """
        if not self._engine.fixed or not schedule.steps:
            self._launch(objects, count, schedule, done)
            return done + schedule.iterations
        key = (objects is self._arms, done, schedule)
        graph = self._graphs.get(key)
        if graph is None and key in self._graphs:
            graph = self._graphs[key] = self._captured(lambda: self._launch(objects, self._engine.room, schedule, done))
        if graph is None:
            self._graphs[key] = None
            self._launch(objects, self._engine.room, schedule, done)
        else:
            graph.launch(stream=self._stream)
        return done + schedule.iterations

    def _captured(self, work: Callable[[], None]) -> Any:
        # Other threads go on with what a capture of everybody's calls would forbid, memory among it.
        self._stream.begin_capture(self._cupy.cuda.runtime.streamCaptureModeThreadLocal)
        try:
            work()
        finally:
            graph = self._stream.end_capture()
        return graph

    def _launch(self, objects: Objects, count: int, schedule: Schedule, done: int) -> None:
        for step in schedule.steps:
            if isinstance(step, ShrinkWrap):
                self._shrink(objects, count, step)
            else:
                self._engine.iterate(objects, count, step, self._weight, done)
                done += step.times

    def _shrink(self, objects: Objects, count: int, step: ShrinkWrap) -> None:
        taps = self._taps[step.sigma]
        reach = len(taps) - 1
        grid = (-(-int(self._pixels) // THREADS), count)
        smooth, other = self._smooth
        self._kernels["take_modulus"](grid, (THREADS,), (objects.psi, smooth, self._pixels))
        for axis, length in enumerate(self._shape if reach else ()):
            apart = I32(math.prod(self._shape[axis + 1 :]))
            self._kernels["blur"](grid, (THREADS,), (smooth, other, taps, I32(reach), apart, I32(length), self._pixels))
            smooth, other = other, smooth
        limits = (np.float64(limit) for limit in AREA_LIMITS)
        found = (smooth, F32(step.threshold), *limits, objects.inside, objects.numbers)
        self._one_block_each("find_support", count, *found, I32(self._length), self._pixels)

    def _score(self, objects: Objects, count: int, done: int) -> None:
        fields = (self._engine.field, objects.target, objects.frame_of, objects.numbers)
        self._one_block_each("score", count, *fields, I32(self._length), I32(done), self._pixels)

    def _one_block_each(self, name: str, count: int, *arguments: Any) -> None:
        self._kernels[name]((count,), (THREADS,), arguments)

    def _fetch(self, slot: _Slot, told: Told, first: int, first_arm: int) -> None:
        """Send a chunk's results to their places; returns before they are there."""
        self._down.wait_event(slot.computed)
        for card, host in ((slot.object, told.psi), (slot.object_support, told.support), (slot.numbers, told.numbers)):
            card[: slot.frames].get(stream=self._down, out=host[first : first + slot.frames], blocking=False)
        slot.trial[: slot.arms].get(stream=self._down, out=told.trial[first_arm : first_arm + slot.arms], blocking=False)
        slot.free.record(self._down)


class _Slot:
    """Owns the places of a chunk on its way: what comes in, what leaves, and the events by which the streams wait for each other.

    frames, arms : in the chunk.  owner : frame of the chunk that an arm is of; first_arm : of a frame.
    """

    def __init__(self, cupy: Any, shape: tuple[int, ...], length: int) -> None:
        self._cupy = cupy
        self.counts, self.start = Landing(cupy, shape, F32), Landing(cupy, shape, C64)
        self.valid, self.support = Landing(cupy, shape, np.uint8), Landing(cupy, shape, np.uint8)
        self.owner, self.first_arm = Landing(cupy, (), I32), Landing(cupy, (), I32)
        self.object, self.object_support = cupy.empty((0, *shape), C64), cupy.empty((0, *shape), np.uint8)
        self.numbers, self.trial = cupy.empty((0, length), np.float64), cupy.empty((0,), np.float64)
        self.landed, self.computed, self.free = (cupy.cuda.Event(disable_timing=True) for _ in range(3))
        self.frames = self.arms = 0

    @property
    def inputs(self) -> tuple[Landing, ...]:
        return self.counts, self.valid, self.start, self.support, self.owner, self.first_arm

    def fill(
        self,
        counts: npt.NDArray[Any],
        arms: Start,
        valid: npt.NDArray[np.bool_],
        index: npt.NDArray[np.intp],
        used: npt.NDArray[np.bool_],
    ) -> None:
        """Copy the frames of a chunk into page-locked memory; maps that are one for all frames only once."""
        of_frame, arm = np.nonzero(used[index])
        self.frames, self.arms = len(index), len(of_frame)
        with np.errstate(over="ignore", invalid="ignore"):  # a double too large for a float becomes infinite and is flagged
            copy_items(self.counts.holding(self.frames), counts, (index,))
            copy_items(self.start.holding(self.arms), arms.psi, (index[of_frame], arm))
        shared = valid.strides[0] == 0
        copy_items(self.valid.holding(1 if shared else self.frames), valid, (index[:1] if shared else index,))
        shared = arms.support.strides[0] == 0 and (arms.support.shape[1] == 1 or arms.support.strides[1] == 0)
        last = 1 if shared else self.arms
        copy_items(self.support.holding(last), arms.support, (index[of_frame[:last]], arm[:last]))
        self.owner.holding(self.arms)[:] = of_frame
        self.first_arm.holding(self.frames + 1)[:] = np.searchsorted(of_frame, np.arange(self.frames + 1))
        if len(self.object) < self.frames:
            room = power_of_two(self.frames)
            self.object, self.object_support, self.numbers = (
                self._cupy.empty((room, *array.shape[1:]), array.dtype) for array in (self.object, self.object_support, self.numbers)
            )
        if len(self.trial) < self.arms:
            self.trial = self._cupy.empty((power_of_two(self.arms),), np.float64)


def _rounds(first_arm: npt.NDArray[np.int32], room: int) -> Iterator[tuple[int, int]]:
    """Frames of a chunk -> (first, one after the last) of rounds whose arms are in hand together, at most `room`."""
    first = 0
    while first < len(first_arm) - 1:
        last = int(np.searchsorted(first_arm, first_arm[first] + room, "right")) - 1
        yield first, last
        first = last


def _gaussian(sigma: float) -> npt.NDArray[np.float32]:
    """The centre and one side of a normalised Gaussian, cut where scipy.ndimage cuts it; a single 1 for no blur."""
    reach = int(_BLUR_SIGMAS * sigma + 0.5) if sigma > 0 else 0
    side = np.exp(-0.5 * (np.arange(reach + 1) / (sigma or 1)) ** 2)
    return np.asarray(side / (side[0] + 2 * side[1:].sum()), F32)
