"""Frames -> results, in order again: workers that run the composed stages, in smaller parts or elsewhere where these do not go through."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import structlog

from streamprior.errors import DeviceLost, OutOfMemory
from streamprior.ladder import Ladder
from streamprior.mailbox import BEAT_S, Mailbox
from streamprior.portion import Portion
from streamprior.prior import Prior
from streamprior.records import FLAT, Batch, Flag, Frame, Positions, Reconstruction, Result, RunEnded, RunStarted
from streamprior.seams import LeftOut, PathItem, Stage, StageFactory, Timing
from streamprior.sequencer import Sequencer

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A frame with its place in the order and the run it belongs to. decoded: Unix seconds. entered: by a clock that nobody sets."""

    ticket: int
    run: RunStarted
    frame: Frame
    decoded: float
    entered: float = field(default_factory=time.monotonic)

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
    skipped: str = "",
) -> list[Result]:
    """Run the composed stages over frames of one run: the very same call live, in replay, in the benchmark and in the tests.

    decoded : Unix seconds when each frame was, for its clock; none where they did not come by a wire.
    skipped : why stages of the recipe are not among these; empty where all are.

    Raises
    ------
    OutOfMemory
        A stage had no room for so many frames; the stages are then not to be used again.
    DeviceLost
        The card that a stage computes on has failed.
    """
    done, at = time.perf_counter(), ""
    batch = Batch(run, tuple(frames), clock=(("wait", time.time()),), skipped=skipped)
    try:
        for stage in stages:
            at = stage.name
            batch = stage(batch)
            started, done = done, time.perf_counter()
            batch = replace(batch, clock=(*batch.clock, (stage.name, time.time())))
            timing(stage.name, (done - started) / len(frames))
        return results_of(batch, prior, decoded)
    except MemoryError as error:
        raise OutOfMemory(at, str(error)) from error


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
            skipped=batch.skipped,
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
    spare : stages that compute without the card that `factory`'s use, where it has failed or has no room; None: there is no card.
    left_out : hears of each frame that cannot be computed. Its place in the order stays empty.
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
        spare: StageFactory | None = None,
        left_out: LeftOut = lambda uid, index, stage, reason: None,
    ) -> None:
        self._factory, self._spare, self._left_out = factory, spare, left_out
        self.out_of_memory = 0
        self.card_lost = False
        self._ladder = ladder or Ladder("nothing", math.inf, math.inf)
        self._prior = prior
        self._timing = timing
        self._batch_frames, self._batch_s = batch_frames, batch_s
        self._inbox: Mailbox[Job] = Mailbox(budget_bytes)
        self._sequencer = Sequencer(budget_bytes)
        self._number = self._left = workers
        self._lock = threading.Lock()
        self._crew = tuple(_Worker(self) for _ in range(workers))
        self.workers: tuple[Callable[[], bool], ...] = tuple(worker.step for worker in self._crew)

    @property
    def away_from_card(self) -> int:
        """Workers that compute on the CPU now although there is a card for them."""
        return sum(worker.away for worker in self._crew)

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

    def _lose_card(self, error: DeviceLost) -> None:
        """Every worker goes on without the card, for as long as the process lives."""
        if self._spare is None:
            raise error
        with self._lock:
            first, self.card_lost = not self.card_lost, True
        if first:
            log.error(
                "the card has failed and this process cannot use it any more: frames are computed on the CPU, none is lost;"
                " restart the daemon between two runs to have the card again, and look for the cause (dmesg | grep Xid, nvidia-smi -q)",
                error=str(error),
            )

    def _count_out_of_memory(self) -> None:
        with self._lock:
            self.out_of_memory += 1

    def _worker_left(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._sequencer.close()


REFINEMENT = ("match", "refine")
"""Stages that are left out first; a frame's mask needs none of them."""

_AWAY = int(Flag.AWAY_FROM_CARD)

_UNDIVIDED_S = 0.001
"""What takes less is not divided between workers: a batch has a price of its own, and so has waking the other."""


class _Worker:
    """One thread's part of a crew: takes jobs of one run, thinks, hands the results to the sequencer.

    away : whether it computes with the spare stages, because the card has failed or does not take even one frame.
    """

    def __init__(self, crew: ThreadCrew) -> None:
        self._crew = crew
        self._stages: Sequence[Stage] | None = None
        self._each_s = math.inf  # what a frame took lately
        self.away = False
        self._home = Portion(crew._batch_frames, least=0 if crew._spare is not None else 1)
        self._elsewhere = Portion(crew._batch_frames, least=1)
        self._refused: int | None = None  # ticket of the last frame that did not go through alone
        self._giving_up = False

    def step(self) -> bool:
        """One batch; False when the crew is closed and its queue is empty."""
        crew = self._crew
        self._try_more()
        self._prepare()
        most, least = self._in(crew._batch_s, self._portion.frames), self._in(_UNDIVIDED_S)
        jobs = crew._inbox.take(most, timeout_s=BEAT_S, takers=crew._number, at_least=least)
        if jobs is None:
            crew._worker_left()
            return False
        if not jobs:
            return True
        crew._ladder.observe(time.monotonic() - jobs[0].entered)
        rung = crew._ladder.rung
        while jobs:
            run, refined = jobs[0].run, rung.refines(jobs[0].frame.index)
            alike = [job.run.uid == run.uid and rung.refines(job.frame.index) == refined for job in jobs]
            self._think(run, [job for job, same in zip(jobs, alike, strict=True) if same], "" if refined else rung.why)
            jobs = [job for job, same in zip(jobs, alike, strict=True) if not same]
        return True

    def _think(self, run: RunStarted, jobs: Sequence[Job], skipped: str) -> None:
        """All of the jobs, in parts that go through."""
        left = jobs
        while left:
            self._prepare()
            results = self._attempt(run, left[: self._portion.frames], skipped)
            done, left = left[: len(results)], left[len(results) :]
            self._crew._sequencer.put([(job.ticket, result) for job, result in zip(done, results, strict=True)])

    def _attempt(self, run: RunStarted, jobs: Sequence[Job], skipped: str) -> Sequence[Result | None]:
        """Results of these jobs, None for one that cannot be had; nothing where they have to be tried again, otherwise."""
        crew = self._crew
        assert self._stages is not None
        stages = [stage for stage in self._stages if not (skipped and stage.name in REFINEMENT)]
        if len(stages) == len(self._stages):  # of a recipe that refines no frame nothing is left out
            skipped = ""
        begun = time.perf_counter()
        try:
            results = think(stages, crew._prior, run, [job.frame for job in jobs], crew._timing, [job.decoded for job in jobs], skipped)
        except OutOfMemory as error:
            return [None] if self._give_up(error, run, jobs) else []
        except DeviceLost as error:
            self._stages = None
            crew._lose_card(error)
            return []
        self._giving_up = False
        self._learn((time.perf_counter() - begun) / len(jobs))
        return [replace(result, flags=result.flags | _AWAY) for result in results] if self.away else results

    def _give_up(self, error: OutOfMemory, run: RunStarted, jobs: Sequence[Job]) -> bool:
        """A batch did not go through: True for a frame that nothing takes; otherwise the next attempt takes less, or is made elsewhere.

        A frame alone has a second chance: the stages that it failed in are gone by then, and so may be what there was no room beside.
        """
        crew, portion, tried = self._crew, self._portion, len(jobs)
        crew._count_out_of_memory()
        self._stages = None  # they are half filled
        hopeless = tried == 1 and self._refused == jobs[0].ticket and (self.away or crew._spare is None)
        self._refused = jobs[0].ticket if tried == 1 else None
        before = portion.frames
        portion.refused(tried, time.monotonic())
        if hopeless:
            self._say_left_out(error, run, jobs[0])
            crew._left_out(run.uid, jobs[0].frame.index, error.stage, "out_of_memory")
        elif portion.frames != before:
            others = ", or see with nvidia-smi who else uses the card (0 at once: the CPU computes)" if crew._spare is not None else ""
            log.warning(
                "out of memory: the frames are computed again, fewer at once; if it stays so, set compute.batch_frames or compute.workers"
                f" lower{others}",
                stage=error.stage,
                tried=tried,
                frames_at_once=portion.frames,
                error=str(error),
            )
        return hopeless

    def _say_left_out(self, error: OutOfMemory, run: RunStarted, job: Job) -> None:
        """Of frames that are left out one after another only the first: the ledger names them all."""
        if not self._giving_up:
            log.error(
                "out of memory for a single frame: it is left out, and so are those after it that do not go through; give the machine"
                " memory, then `streamprior catchup` computes them",
                stage=error.stage,
                run=run.uid,
                frame=job.frame.index,
                error=str(error),
            )
        self._giving_up = True

    @property
    def _portion(self) -> Portion:
        return self._elsewhere if self.away else self._home

    def _try_more(self) -> None:
        """After some time more frames are tried at once, and the card again that took none."""
        now = time.monotonic()
        for portion in (self._elsewhere, *([] if self._crew.card_lost else [self._home])):
            if portion.grow(now):
                log.info("more frames at once are tried again after a want of memory", frames_at_once=portion.frames)

    def _prepare(self) -> None:
        """Stages to compute with: made anew where those of before ran out of memory, or are for another place than the one in hand.

        Not where the error is: as long as that is in hand, it keeps the memory of the stages that it came from.
        """
        crew = self._crew
        while True:
            away = crew.card_lost or self._home.frames == 0
            if self._stages is not None and away == self.away:
                return
            if away != self.away:  # nothing that was learnt there holds here
                self.away, self._each_s, self._refused = away, math.inf, None
            self._stages = None
            self._stages = crew._spare() if away and crew._spare is not None else self._at_home()

    def _at_home(self) -> Sequence[Stage] | None:
        """The crew's own stages, unless the card does not take them."""
        crew = self._crew
        try:
            return crew._factory()
        except MemoryError as error:
            if crew._spare is None:
                raise
            crew._count_out_of_memory()
            self._home.refused(1, time.monotonic())
            log.warning("out of memory: the card has no room for a worker, which computes on the CPU for now", error=str(error))
        except DeviceLost as error:
            crew._lose_card(error)
        return None

    def _in(self, seconds: float, most: float = math.inf) -> int:
        """Frames that are computed in so many seconds, by the last ones: dozens that are only classified, one that is refined."""
        return int(max(1, min(most, seconds / self._each_s)))

    def _learn(self, each_s: float) -> None:
        # Over some batches, so that one that another process held up does not halve the next.
        self._each_s = each_s if self._each_s == math.inf else 0.75 * self._each_s + 0.25 * each_s
