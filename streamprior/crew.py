"""Frames -> results, in order again: workers that run the composed stages, and a sequencer that restores the order of arrival."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from streamprior.mailbox import Mailbox
from streamprior.prior import Prior
from streamprior.records import FLAT, Batch, Flag, Frame, Positions, Result, RunEnded, RunStarted
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
    stages: Sequence[Stage], prior: Prior, run: RunStarted, frames: Sequence[Frame], timing: Timing = lambda stage, seconds: None
) -> list[Result]:
    """Run the composed stages over frames of one run: the very same call live, in replay, in the benchmark and in the tests."""
    done = time.time()
    batch = Batch(run, tuple(frames), clock=(("wait", done),))
    for stage in stages:
        batch = stage(batch)
        started, done = done, time.time()
        batch = replace(batch, clock=(*batch.clock, (stage.name, done)))
        timing(stage.name, (done - started) / len(frames))
    return results_of(batch, prior)


def results_of(batch: Batch, prior: Prior) -> list[Result]:
    """One Result a frame out of a batch that has been through prepare and classify at least."""
    photons, classes, start, found = batch.photons, batch.classes, batch.start, batch.reconstruction
    assert photons is not None
    assert classes is not None
    rows, columns = prior.object_box
    unknown = np.full((rows.stop - rows.start, columns.stop - columns.start), complex("nan+nanj"), np.complex64)
    results = []
    for i, frame in enumerate(batch.frames):
        unit = int(start.unit[i, found.kept[i]]) if start is not None and found is not None else FLAT
        results.append(
            Result(
                run=batch.run.uid,
                index=frame.index,
                classes=classes.ids[i],
                # A copy, so that a result does not keep the whole frame's psi alive.
                object=found.psi[i][rows, columns].copy() if found is not None else unknown,
                counts=photons.counts[i],
                received=frame.received,
                detector_time=frame.detector_time,
                position=frame.position,
                origin=frame.origin,
                class_distance=float(classes.distance[i]),
                chi2=float(found.chi2[i]) if found is not None else float("nan"),
                chi2_floor=float(found.floor[i]) if found is not None else float("nan"),
                r_factor=float(found.r_factor[i]) if found is not None else float("nan"),
                free_llk=float(found.free_llk[i]) if found is not None else float("nan"),
                unit=unit,
                distance=float(start.distance[i, 0]) if start is not None else float("nan"),
                arm="none" if found is None else "flat" if unit == FLAT else "prototype",
                flags=frame.flags | int(photons.flags[i]) | (int(found.flags[i]) if found is not None else int(Flag.NOT_REFINED)),
                clock=batch.clock,
            )
        )
    return results


class Crew(Protocol):
    """The compute seam: takes jobs, gives path items back in order. Threads here; actors on other machines later."""

    def submit(self, job: Job) -> None: ...

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
    budget_bytes : bound of the queue before the workers, and again of the results that wait for an earlier one.
    """

    def __init__(
        self,
        factory: StageFactory,
        prior: Prior,
        workers: int,
        batch_frames: int,
        budget_bytes: int,
        timing: Timing = lambda stage, seconds: None,
    ) -> None:
        self._factory = factory
        self._prior = prior
        self._timing = timing
        self._batch_frames = batch_frames
        self._inbox: Mailbox[Job] = Mailbox(budget_bytes)
        self._sequencer = Sequencer(budget_bytes)
        self._left = workers
        self._lock = threading.Lock()
        self.workers: tuple[Callable[[], bool], ...] = tuple(_Worker(self).step for _ in range(workers))

    @property
    def queued_bytes(self) -> int:
        return self._inbox.nbytes

    @property
    def waiting_bytes(self) -> int:
        """Bytes of results that wait for an earlier one."""
        return self._sequencer.nbytes

    def submit(self, job: Job) -> None:
        self._inbox.put(job)

    def pass_on(self, ticket: int, item: RunStarted | Positions | RunEnded) -> None:
        self._sequencer.put(ticket, item)

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


class _Worker:
    """One thread's part of a crew: takes jobs of one run, thinks, hands the results to the sequencer."""

    def __init__(self, crew: ThreadCrew) -> None:
        self._crew = crew
        self._stages: Sequence[Stage] | None = None

    def step(self) -> bool:
        """One batch; False when the crew is closed and its queue is empty."""
        crew = self._crew
        if self._stages is None:
            self._stages = crew._factory()
        jobs = crew._inbox.take(crew._batch_frames)
        if jobs is None:
            crew._worker_left()
            return False
        while jobs:
            run = jobs[0].run
            mine = [job for job in jobs if job.run.uid == run.uid]
            jobs = [job for job in jobs if job.run.uid != run.uid]
            for job, result in zip(mine, think(self._stages, crew._prior, run, [job.frame for job in mine], crew._timing), strict=True):
                crew._sequencer.put(job.ticket, replace(result, clock=(("decode", job.decoded), *result.clock)))
        return True


class Sequencer:
    """Items with tickets, in any order -> the items in the order of their tickets. Bounded: who is far ahead waits."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._waiting: dict[int, PathItem] = {}
        self._bytes = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        return self._bytes

    def put(self, ticket: int, item: PathItem) -> None:
        """Waits while the budget is spent, unless this is the very next item: that one always gets in, so nothing locks up."""
        with self._changed:
            self._changed.wait_for(lambda: ticket == self._next or self._bytes + item.nbytes <= self._budget or self._closed)
            self._waiting[ticket] = item
            self._bytes += item.nbytes
            if ticket == self._next:
                self._changed.notify_all()

    def take(self, limit: int, timeout_s: float | None = None) -> list[PathItem] | None:
        """Up to `limit` items in order; an empty list after `timeout_s`; None when closed and nothing is left that could come in order."""
        with self._changed:
            self._changed.wait_for(lambda: self._next in self._waiting or self._closed, timeout_s)
            items: list[PathItem] = []
            while len(items) < limit and self._next in self._waiting:
                item = self._waiting.pop(self._next)
                self._next += 1
                self._bytes -= item.nbytes
                items.append(item)
            if items:
                self._changed.notify_all()
                return items
            return None if self._closed else []

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
