"""Frames -> results, in order again: workers that run the composed stages, and a sequencer that restores the order of arrival."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from streamprior.ladder import Ladder
from streamprior.mailbox import BEAT_S, Mailbox
from streamprior.prior import Prior
from streamprior.records import FLAT, Batch, Flag, Frame, Positions, Reconstruction, Result, RunEnded, RunStarted
from streamprior.seams import PathItem, Stage, StageFactory, Timing


@dataclass(frozen=True, slots=True)
class Job:
    """A frame with its place in the order and the run it belongs to. decoded: Unix seconds."""

    ticket: int
    run: RunStarted
    frame: Frame
    decoded: float

    @property
    def nbytes(self) -> int:
        return self.frame.nbytes


def think(
    stages: Sequence[Stage],
    prior: Prior,
    run: RunStarted,
    frames: Sequence[Frame],
    timing: Timing = lambda stage, seconds: None,
    decoded: Sequence[float] = (),
) -> list[Result]:
    """Run the composed stages over frames of one run: the very same call live, in replay, in the benchmark and in the tests.

    decoded : Unix seconds when each frame was, for its clock; none where they did not come by a wire.
    """
    done = time.time()
    batch = Batch(run, tuple(frames), clock=(("wait", done),))
    for stage in stages:
        batch = stage(batch)
        started, done = done, time.time()
        batch = replace(batch, clock=(*batch.clock, (stage.name, done)))
        timing(stage.name, (done - started) / len(frames))
    return results_of(batch, prior, decoded)


def results_of(batch: Batch, prior: Prior, decoded: Sequence[float] = ()) -> list[Result]:
    """One Result a frame out of a batch that has been through prepare and classify at least; decoded as in `think`."""
    photons, classes, start, found = batch.photons, batch.classes, batch.start, batch.reconstruction
    assert photons is not None
    assert classes is not None
    number = len(batch.frames)
    unknown = [math.nan] * number
    # Whole columns become Python numbers at once: one by one they cost more than the stages' own overhead.
    distances, flags = classes.distance.tolist(), photons.flags.tolist()
    chi2, floor, r_factor, free_llk = (
        (found.chi2.tolist(), found.floor.tolist(), found.r_factor.tolist(), found.free_llk.tolist())
        if found is not None
        else (unknown, unknown, unknown, unknown)
    )
    found_flags = found.flags.tolist() if found is not None else [int(Flag.NOT_REFINED)] * number
    units = start.unit[np.arange(number), found.kept].tolist() if start is not None and found is not None else [FLAT] * number
    nearest = start.distance[:, 0].tolist() if start is not None else unknown
    objects = _objects(found, prior, number)
    return [
        Result(
            run=batch.run.uid,
            index=frame.index,
            classes=classes.ids[i],
            object=objects[i],
            counts=photons.counts[i],
            received=frame.received,
            detector_time=frame.detector_time,
            position=frame.position,
            origin=frame.origin,
            class_distance=distances[i],
            chi2=chi2[i],
            chi2_floor=floor[i],
            r_factor=r_factor[i],
            free_llk=free_llk[i],
            unit=units[i],
            distance=nearest[i],
            arm="none" if found is None else "flat" if units[i] == FLAT else "prototype",
            flags=frame.flags | flags[i] | found_flags[i],
            clock=(("decode", decoded[i]), *batch.clock) if decoded else batch.clock,
        )
        for i, frame in enumerate(batch.frames)
    ]


def _objects(found: Reconstruction | None, prior: Prior, number: int) -> Sequence[npt.NDArray[np.complex64]]:
    """Objects cropped to the prior's box. Copies, so that a result does not keep the whole frame's psi alive."""
    rows, columns = prior.object_box
    if found is not None:
        return [psi[rows, columns].copy() for psi in found.psi]
    unknown = np.full((rows.stop - rows.start, columns.stop - columns.start), complex("nan+nanj"), np.complex64)
    return [unknown] * number


class Crew(Protocol):
    """The compute seam: takes jobs, gives path items back in order. Threads here; actors on other machines later."""

    def submit(self, jobs: Sequence[Job]) -> None: ...

    def pass_on(self, ticket: int, item: RunStarted | Positions | RunEnded) -> None: ...

    def take(self, limit: int, timeout_s: float) -> list[PathItem] | None: ...

    def close(self) -> None: ...

    def abort(self) -> None: ...


class ThreadCrew:
    """Threads of this process; each has a stage set of its own, because stages own buffers and FFT plans.

    Parameters
    ----------
    workers : number of threads. One FFT runs on one thread; frames run beside each other.
    batch_frames : most frames that a worker takes at once. Idle, it takes single frames: that costs no latency.
    batch_s : seconds that a batch should take at most: what it adds to the latency of its first frame.
    budget_bytes : bound of the queue before the workers, and again of the results that wait for an earlier one.
    ladder : hears how old frames are when they are taken, and says which of them are refined.
    """

    def __init__(
        self,
        factory: StageFactory,
        prior: Prior,
        workers: int,
        batch_frames: int,
        batch_s: float,
        budget_bytes: int,
        timing: Timing = lambda stage, seconds: None,
        ladder: Ladder | None = None,
    ) -> None:
        self._factory = factory
        self._ladder = ladder or Ladder("nothing", math.inf, math.inf)
        self._prior = prior
        self._timing = timing
        self._batch_frames, self._batch_s = batch_frames, batch_s
        self._inbox: Mailbox[Job] = Mailbox(budget_bytes)
        self._sequencer = Sequencer(budget_bytes)
        self._number = self._left = workers
        self._lock = threading.Lock()
        self.workers: tuple[Callable[[], bool], ...] = tuple(_Worker(self).step for _ in range(workers))

    @property
    def queued_bytes(self) -> int:
        return self._inbox.nbytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of results that wait for an earlier one."""
        return self._sequencer.nbytes

    def submit(self, jobs: Sequence[Job]) -> None:
        self._inbox.put_all(jobs)

    def pass_on(self, ticket: int, item: RunStarted | Positions | RunEnded) -> None:
        self._sequencer.put([(ticket, item)])

    def take(self, limit: int, timeout_s: float) -> list[PathItem] | None:
        return self._sequencer.take(limit, timeout_s)

    def close(self) -> None:
        self._inbox.close()

    def abort(self) -> None:
        self._inbox.abort()
        self._sequencer.close()

    def _worker_left(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._sequencer.close()


REFINEMENT = ("match", "refine")
"""Stages that are left out first; a frame's mask needs none of them."""

_UNDIVIDED_S = 0.001
"""What takes less is not divided between workers: a batch has a price of its own, and so has waking the other."""


class _Worker:
    """One thread's part of a crew: takes jobs of one run, thinks, hands the results to the sequencer."""

    def __init__(self, crew: ThreadCrew) -> None:
        self._crew = crew
        self._stages: Sequence[Stage] | None = None
        self._each_s = math.inf  # what a frame took lately

    def step(self) -> bool:
        """One batch; False when the crew is closed and its queue is empty."""
        crew = self._crew
        if self._stages is None:
            self._stages = crew._factory()
        most, least = self._in(crew._batch_s, crew._batch_frames), self._in(_UNDIVIDED_S)
        jobs = crew._inbox.take(most, timeout_s=BEAT_S, takers=crew._number, at_least=least)
        if jobs is None:
            crew._worker_left()
            return False
        if not jobs:
            return True
        crew._ladder.observe(time.time() - jobs[0].decoded)
        rung = crew._ladder.rung
        while jobs:
            run, refined = jobs[0].run, rung.refines(jobs[0].frame.index)
            alike = [job.run.uid == run.uid and rung.refines(job.frame.index) == refined for job in jobs]
            self._think(run, [job for job, same in zip(jobs, alike, strict=True) if same], refined)
            jobs = [job for job, same in zip(jobs, alike, strict=True) if not same]
        return True

    def _think(self, run: RunStarted, jobs: Sequence[Job], refined: bool) -> None:
        crew = self._crew
        assert self._stages is not None
        stages = self._stages if refined else [stage for stage in self._stages if stage.name not in REFINEMENT]
        begun = time.perf_counter()
        results = think(stages, crew._prior, run, [job.frame for job in jobs], crew._timing, decoded=[job.decoded for job in jobs])
        self._learn((time.perf_counter() - begun) / len(jobs))
        crew._sequencer.put([(job.ticket, result) for job, result in zip(jobs, results, strict=True)])

    def _in(self, seconds: float, most: float = math.inf) -> int:
        """Frames that are computed in so many seconds, by the last ones: dozens that are only classified, one that is refined."""
        return int(max(1, min(most, seconds / self._each_s)))

    def _learn(self, each_s: float) -> None:
        # Over some batches, so that one that another process held up does not halve the next.
        self._each_s = each_s if self._each_s == math.inf else 0.75 * self._each_s + 0.25 * each_s


class Sequencer:
    """Items with tickets, in any order -> the items in the order of their tickets. Bounded: who is far ahead waits."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._waiting: dict[int, tuple[PathItem, int]] = {}
        self._bytes = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        return self._bytes

    def put(self, items: Sequence[tuple[int, PathItem]]) -> None:
        """Items with their tickets, ascending. Waits while the budget is spent, unless an item is the very next: that one always gets
        in, so nothing locks up."""
        with self._changed:
            for ticket, item in items:
                nbytes = item.nbytes
                if self._next in self._waiting and self._bytes + nbytes > self._budget:
                    self._changed.notify_all()  # of what this call has put in already
                self._changed.wait_for(partial(self._admits, ticket, nbytes))
                self._waiting[ticket] = item, nbytes
                self._bytes += nbytes
            if self._next in self._waiting:
                self._changed.notify_all()

    def _admits(self, ticket: int, nbytes: int) -> bool:
        return ticket == self._next or self._bytes + nbytes <= self._budget or self._closed

    def take(self, limit: int, timeout_s: float | None = None) -> list[PathItem] | None:
        """Up to `limit` items in order; an empty list after `timeout_s`; None when closed and nothing is left that could come in order."""
        with self._changed:
            self._changed.wait_for(lambda: self._next in self._waiting or self._closed, timeout_s)
            items: list[PathItem] = []
            while len(items) < limit and self._next in self._waiting:
                item, nbytes = self._waiting.pop(self._next)
                self._next += 1
                self._bytes -= nbytes
                items.append(item)
            if items:
                self._changed.notify_all()
                return items
            return None if self._closed else []

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
