"""Hints from the wire (start, image, end) -> runs that open and close, whatever the wire lost."""

from __future__ import annotations

import math
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

import structlog

from streamprior.records import Detector, Frame, RunEnded, RunStarted, SeriesEnd, SeriesStart

log = structlog.get_logger(__name__)

_REMEMBERED = 16
"""Closed series whose late frames are still recognised as late rather than taken for a new run."""


class LateFrame(Exception):  # noqa: N818 - an answer, not a failure
    """The frame belongs to a run that is closed; it is counted there."""

    def __init__(self, uid: str) -> None:
        super().__init__(uid)
        self.uid = uid


class Runs:
    """At most one open run a source. It opens on a start message or on its first frame; it closes on its end message once all
    frames are in (or `late_s` after it), on a new series, or when nothing came for `idle_s`.

    Parameters
    ----------
    distinct : callable uid -> number of different frames received, the ledger's count.
    late_s : seconds that frames may come after the end message, or after the last expected frame when no end message comes.
    idle_s : seconds without any message after which a run is closed; and after which a frame of a closed series is not late but of
        another series: a detector that was started again counts from 1 again, and not every stream has start messages.
    """

    def __init__(self, distinct: Callable[[str], int], late_s: float, idle_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._distinct = distinct
        self._late_s = late_s
        self._idle_s = idle_s
        self._clock = clock
        self._open: RunStarted | None = None
        self._heard = 0.0
        self._ending: str | None = None  # why the run is about to close
        self._announced = False  # the open run began with a start message
        self._closed: OrderedDict[str, tuple[str, float]] = OrderedDict()  # series -> uid, when it was heard of last
        self._paused: RunStarted | None = None  # closed because nothing came; its series may go on
        self._interrupted: list[RunStarted] = []
        self._silent = False  # the open run is an interrupted one, of which nothing came since
        self._share = _Share()

    def resume(self, interrupted: Iterable[RunStarted]) -> None:
        """Runs that an earlier process was killed in, oldest first: they go on where the next run of their series would begin."""
        self._interrupted = [*interrupted]

    @property
    def current(self) -> RunStarted | None:
        return self._open

    def start(self, hint: SeriesStart, again: bool = False) -> list[RunStarted | RunEnded]:
        """A start message. A repeated one changes nothing: the run's detector is fixed by its first hint.

        After frames and a start message, or after the end message, it is no repetition: the sender counts its series from 1 again, and
        the frames to come would all be taken for duplicates. One that a restart reads `again` opens the run that it had opened; where that
        one cannot go on, another is opened by the next frame of the series, if there is any.
        """
        self._heard = self._clock()
        if self._open is not None and self._open.series == hint.series:
            anew = self._announced and self._distinct(self._open.uid) > 0
            if not (anew or self._ending):
                return []
        if again and not any(_is_of(hint, one) for one in self._interrupted):
            ended = self._close("new_series")
            self._paused = RunStarted("", hint.source, hint.series, 0.0, None, hint.detector, hint.metadata)
            return [*ended]
        ended, started = self._close("new_series"), self._begin(hint)
        self._announced = True
        return [*ended, started]

    def frame(self, frame: Frame, again: bool = False) -> list[RunStarted | RunEnded]:
        """A frame: what it opened or closed; it belongs to the run that is then `current`. Raises LateFrame for a closed run's.

        again : it is read again after a restart, and does not show that its sender is still there.
        """
        if self._open is not None and self._open.series == frame.series:
            self._heard, self._silent = self._clock(), self._silent and again
            self._share.saw(frame.index, frame.series)
            return []
        now = self._clock()
        uid, last = self._closed.get(frame.series, ("", -math.inf))
        if now - last < self._idle_s:
            self._closed[frame.series] = uid, now
            raise LateFrame(uid)
        self._heard = now
        hint = SeriesStart(frame.source, frame.series, None, Detector(shape=(frame.counts.shape[0], frame.counts.shape[1])))
        if self._paused is not None and self._paused.series == frame.series:
            hint = replace(hint, detector=self._paused.detector, metadata=self._paused.metadata)
        ended, started = self._close("new_series"), self._begin(hint)
        self._silent = self._silent and again
        return [*ended, started]

    def end(self, hint: SeriesEnd) -> list[RunEnded]:
        """An end message; one for another series than the open one says nothing."""
        if self._open is None or self._open.series != hint.series:
            return []
        self._heard, self._ending = self._clock(), "end"
        return self.tick()

    def tick(self) -> list[RunEnded]:
        """Called now and then: closes what is over. Returns the end of the run, or nothing."""
        if self._open is None:
            return []
        quiet = self._clock() - self._heard
        whole = self._open.expected is not None and self._distinct(self._open.uid) >= self._open.expected
        if self._ending and (whole or quiet >= self._late_s):
            return self._close(self._ending)
        if whole and quiet >= self._late_s:
            return self._close("complete")
        return self._close("idle") if quiet >= self._idle_s else []

    def shutdown(self) -> list[RunEnded]:
        return self._close(self._ending or "shutdown")

    def _begin(self, hint: SeriesStart) -> RunStarted:
        before = next((one for one in self._interrupted if _is_of(hint, one)), None)
        if before is not None:
            self._interrupted.remove(before)
        uid, opened = (str(uuid.uuid4()), time.time()) if before is None else (before.uid, before.opened)
        self._silent = before is not None
        # 0 expected frames stand for an unknown number: the run would otherwise be whole before its first one.
        self._open = RunStarted(uid, hint.source, hint.series, opened, hint.expected or None, hint.detector, hint.metadata)
        self._ending, self._announced, self._paused = None, False, None
        self._closed.pop(hint.series, None)
        return self._open

    def _close(self, reason: str) -> list[RunEnded]:
        if self._open is None:
            return []
        run, self._open, self._ending = self._open, None, None
        if self._silent and reason in ("new_series", "idle"):
            reason = "interrupted"
        if reason == "idle":
            # A scan that waits for a trigger or is paused by hand goes on after any time: its next frame opens a run again.
            self._paused = run
        else:
            self._closed[run.series] = run.uid, self._clock()
        while len(self._closed) > _REMEMBERED:
            self._closed.popitem(last=False)
        return [RunEnded(run.uid, reason, time.time())]


def _is_of(hint: SeriesStart, run: RunStarted) -> bool:
    return (hint.source, hint.series) == (run.source, run.series)


_SAME = 50
"""Frames in a row that are equally far apart: no chance, and half a second of a slow detector."""


class _Share:
    """Looks for the pattern that another receiver leaves: a PUSH socket deals frames in turn, so with n of them every n-th comes here."""

    def __init__(self) -> None:
        self._last, self._step, self._times = 0, 1, 0

    def saw(self, index: int, series: str) -> None:
        step, self._last = index - self._last, index
        if step == self._step and step > 1:
            self._times += 1
            if self._times == _SAME:
                log.warning(
                    "only every n-th frame comes: another receiver takes the rest, as a PUSH socket deals them in turn; stop that one",
                    n=step,
                    series=series,
                    frame=index,
                )
        else:
            self._step, self._times = step, 0
