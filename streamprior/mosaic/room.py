"""Results in order -> images of the sample: the sink that builds mosaics, and the hand that judges, polishes and finishes them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import structlog

from streamprior.config import MosaicSettings
from streamprior.mosaic.mosaic import Mosaic, Shot
from streamprior.mosaic.overlap import Overlap, Rule
from streamprior.mosaic.probe import Modes
from streamprior.mosaic.scan import Scan
from streamprior.prior import Prior
from streamprior.records import MosaicImage, Positions, Result, RunEnded, RunStarted
from streamprior.seams import Timing

log = structlog.get_logger(__name__)

_IDLE_S = 0.2
"""Without a frame for so long, the hand polishes."""

_BEAT_S = 0.05

_SHARE = 10
"""An image that takes t seconds to judge is followed by the next after 10 t at the earliest: no more than a tenth of a core."""


@dataclass
class _Job:
    """A run's scan and what is left to do for it. due : when the next image may be made. finishing : the passes after its end."""

    scan: Scan
    due: float = 0.0
    heard: float = 0.0
    serial: int = 0
    news: bool = False
    ended: bool = False
    finishing: Iterator[None] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class MosaicRoom:
    """The sink of the ptycho recipe. It is given every result, in order; frames go into the mosaic in the sink's own thread, while a second
    thread, the hand, does what need not be done at once: images, further passes while no frame comes, the passes after a run.

    Parameters
    ----------
    prior : geometry and classes. settings : of the mosaic. probe : None to model it. overlap : makes what computes, for so many modes.
    publish : called with each image, from the hand's thread. hurry : True once somebody wants the path to end: passes after a run are
    then left undone. timing : ("mosaic", seconds a frame) once a call.
    """

    name = "mosaic"
    complete = False

    def __init__(
        self,
        prior: Prior,
        settings: MosaicSettings,
        probe: Modes | None,
        overlap: Callable[[int], Overlap],
        publish: Callable[[MosaicImage], None],
        hurry: Callable[[], bool] = lambda: False,
        timing: Timing = lambda stage, seconds: None,
    ) -> None:
        self._prior, self._settings, self._probe, self._overlap = prior, settings, probe, overlap
        self._publish, self._hurry, self._timing = publish, hurry, timing
        self._jobs: deque[_Job] = deque()
        self._closing = threading.Event()
        self._hand: threading.Thread | None = None
        self.failure: BaseException | None = None

    def warm_up(self) -> None:
        """Compile the kernels and plan the FFTs on blank frames: the first frames would otherwise wait for it, and masks beside them."""
        settings, shape = self._settings, self._prior.geometry.shape
        modes = settings.modes or (1 if self._probe is None else len(self._probe))
        probe = np.ones((modes, *shape), np.complex64)
        blank = Mosaic(probe, Rule(), lambda: self._overlap(modes), settings.halves, settings.gain if settings.refine else 0.0)
        blank.add([Shot(i, (0.5 * i, 0.0), np.ones(shape, np.float32)) for i in range(2)])
        for _ in (*blank.sweep(), *blank.average()):
            pass
        blank.close()

    def open(self) -> None:
        if self._hand is None:
            self._hand = threading.Thread(target=self._work, name="mosaic-hand", daemon=True)
            self._hand.start()

    def begin(self, run: RunStarted) -> None:
        # Runs shorter than their own passes would otherwise gather, each with its frames.
        for job in [job for job in list(self._jobs) if job.ended][:-1]:
            job.finishing = iter(())
        self._jobs.append(_Job(Scan(run, self._prior, self._settings, self._probe, self._overlap), heard=time.monotonic()))

    def write(self, results: Sequence[Result]) -> None:
        """Put frames into the mosaic of their run."""
        self._raise()
        job = self._of(results[0].run)
        if job is None:
            return
        started = time.monotonic()
        with job.lock:
            job.scan.take(results)
        job.heard, job.news = time.monotonic(), True
        self._timing("mosaic", (job.heard - started) / len(results))

    def note(self, item: Positions | MosaicImage) -> None:
        """Late positions; images are its own."""
        job = self._of(item.run) if isinstance(item, Positions) else None
        if job is not None and isinstance(item, Positions):
            with job.lock:
                job.scan.locate(item)
            job.heard, job.news = time.monotonic(), True

    def end(self, run: RunEnded) -> None:
        """Leave the run to the hand."""
        job = self._of(run.uid)
        if job is not None:
            with job.lock:
                job.scan.close()
                job.finishing = job.scan.finish() if run.reason != "shutdown" else iter(())
                job.ended = True

    def close(self) -> None:
        """Wait until the hand has finished every run; with `hurry` that is at once."""
        for job in list(self._jobs):
            if not job.ended:
                with job.lock:
                    job.scan.close()
                    job.finishing, job.ended = iter(()), True
        self._closing.set()
        if self._hand is not None:
            self._hand.join()
        self._raise()

    @property
    def busy(self) -> bool:
        """A run is open, or its passes and its last image are not through."""
        return bool(self._jobs)

    def step(self) -> bool:
        """One short piece of the hand's work; False where there was nothing to do."""
        return any([self._attend(job) for job in list(self._jobs)])

    def _work(self) -> None:
        try:
            while self._jobs or not self._closing.is_set():
                if not self.step():
                    self._closing.wait(_BEAT_S)
        except BaseException as error:
            log.exception("the mosaic's hand failed")
            self.failure = error

    def _raise(self) -> None:
        """A failure of the hand is ours: it ends the path as a room's own would."""
        if self.failure is not None:
            raise RuntimeError("the mosaic's hand failed") from self.failure

    def _attend(self, job: _Job) -> bool:
        now = time.monotonic()
        with job.lock:
            job.scan.tick()
            doubt = job.scan.suspicion() if not self._hurry() else None
        if doubt is not None:
            self._examine(job, doubt)
        elif job.ended:
            return self._finish(job)
        elif job.news and now >= job.due:
            self._show(job, final=False)
        elif now - job.heard > _IDLE_S:
            with job.lock:
                polished = job.scan.polish()
            job.news |= polished
            return polished
        else:
            return False
        return True

    def _finish(self, job: _Job) -> bool:
        """A step of the passes after a run; the last image when they are through."""
        assert job.finishing is not None
        with job.lock:
            over = self._hurry() or next(job.finishing, _OVER) is _OVER
        if over:
            self._show(job, final=True)
            self._jobs.remove(job)
            job.scan.release()
        elif time.monotonic() >= job.due:
            self._show(job, final=False)
        return True

    def _examine(self, job: _Job, doubt: Callable[[], str | None]) -> None:
        sentence = doubt()
        if sentence is not None:
            with job.lock:
                job.scan.warn("axes", sentence)
            job.news = True

    def _show(self, job: _Job, final: bool) -> None:
        started = time.monotonic()
        job.news = False
        with job.lock:
            snapshot = job.scan.snapshot(whole=final)
        if snapshot is None:
            return
        job.serial += 1
        self._publish(job.scan.image(snapshot, job.serial, final))
        now = time.monotonic()
        job.due = now + max(1.0 / self._settings.live_hz, _SHARE * (now - started))

    def _of(self, uid: str) -> _Job | None:
        # A copy: the hand takes out the runs that it has finished.
        return next((job for job in list(self._jobs) if job.scan.run.uid == uid), None)


_OVER = object()
