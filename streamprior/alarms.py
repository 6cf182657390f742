"""Results in order -> the alarms that stand and those that stood: cause, frames, who has seen them, which are muted."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import structlog

from streamprior.records import Flag, Result, RunStarted

log = structlog.get_logger(__name__)

HISTORY = 100
"""Alarms of a run that are kept, the newest: run.json is written four times a second, and one that flickers all night must not grow it."""

RUNS = 16
"""Runs whose alarms are kept in memory; earlier ones are in the archive."""

LONGEST_MUTE_MIN = 24 * 60
"""A mute that outlives the shift that asked for it hides the next alarm from people who do not know of it."""

_LOOK_BACK = 4
"""Times `patience` frames that are looked through for the first one beyond the limit: those without a number may lie between."""

_EMPTY = int(Flag.EMPTY)
"""An int: `&` on the enum itself takes a microsecond."""

_UNITS = {"flux": "photons a pixel", "centre_row": "px", "centre_column": "px", "chi2": "times its floor"}


@dataclass(frozen=True, slots=True)
class Alarm:
    """A signal that has left its baseline (`drift`), or something wrong with the daemon itself (`daemon`).

    run, series : in which it was raised; "" before the first. cause : in words. first_frame, last_frame : first and newest frame beyond the
    limit, by index; of the daemon's own the newest frame then, and None. raised, cleared, acknowledged, muted_until : Unix seconds. cleared
    is None while it stands, and stays so where it stood at the end of its run. peak_sigmas : the score furthest from 0, standard deviations
    of the prior's baseline; None for the daemon's own.
    """

    signal: str
    kind: Literal["drift", "daemon"]
    run: str
    series: str
    cause: str
    first_frame: int | None
    last_frame: int | None
    raised: float
    peak_sigmas: float | None
    cleared: float | None = None
    acknowledged: float | None = None
    acknowledged_by: str = ""
    muted_until: float | None = None

    def muted(self, now: float) -> bool:
        """Whether it is muted at `now`, Unix seconds."""
        return self.muted_until is not None and self.muted_until > now


@dataclass(frozen=True, slots=True)
class Change:
    """What somebody is told of: an alarm was raised, or it was cleared. at : Unix seconds. frame : index, None where there is none."""

    what: Literal["raised", "cleared"]
    alarm: Alarm
    at: float
    frame: int | None


@dataclass(slots=True)
class _History:
    """Alarms of one run that no longer stand, oldest first, and how many before them were forgotten."""

    alarms: deque[Alarm]
    left_out: int = 0


class AlarmBook:
    """The alarms of the run in hand, and those before; a watch behind the drift watch, whose alarms it keeps.

    Every method may be called from any thread. An alarm that stands when its run ends stands until the next run begins. A muted signal
    goes on being watched and shown; nobody is told that its alarm was raised until the mute is over, and plans are not suspended by it.
    Who was told that an alarm was raised is told that it was cleared.

    Parameters
    ----------
    means : signal -> mean of the prior's baseline, NaN where it has none; names the signals there are.
    limit, patience : as in `DriftWatch`.
    tell : called with every change; must not wait.
    clock : Unix seconds.
    """

    name = "alarms"

    def __init__(
        self,
        means: Mapping[str, float],
        limit: float = 5.0,
        patience: int = 3,
        tell: Callable[[Change], None] = lambda change: None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._means = dict(means)
        self._limit, self._tell, self._clock = limit, tell, clock
        self._changing = threading.Lock()
        self._run = self._series = ""
        self._frame: int | None = None
        self._standing: dict[str, Alarm] = {}
        self._told: set[str] = set()
        self._furthest: dict[str, tuple[int, float]] = {}  # signal -> last frame and peak of this batch: a new record a frame is slow
        self._muted: dict[str, float] = {}
        self._histories: OrderedDict[str, _History] = OrderedDict()
        self._before: dict[str, tuple[list[Alarm], list[Alarm]]] = {}
        self._recent: deque[tuple[int, Mapping[str, float]]] = deque(maxlen=_LOOK_BACK * patience)
        self._troubles: set[str] = set()

    @property
    def run(self) -> str:
        """Uid of the run in hand, "" before the first."""
        return self._run

    @property
    def names(self) -> tuple[str, ...]:
        """What there may be an alarm for."""
        return (*self._means, *sorted(self._troubles))

    def begin(self, run: RunStarted) -> None:
        """The next run: what stood in the one before is over."""
        now = self._clock()
        with self._changing:
            for alarm in [one for one in self._standing.values() if one.kind == "drift"]:
                self._put_away(alarm, replace(alarm, cleared=now))
            self._run, self._series, self._frame = run.uid, run.series, None
            self._recent.clear()
            past, standing = self._before.pop(run.uid, ([], []))
            self._histories[run.uid] = _History(deque(past))
            self._histories.move_to_end(run.uid)
            while len(self._histories) > RUNS:
                self._histories.popitem(last=False)
            for alarm in standing:
                self._standing[alarm.signal] = alarm
                self._told.add(alarm.signal)
                if alarm.muted(now) and alarm.muted_until is not None:
                    self._muted[alarm.signal] = alarm.muted_until

    def resume(self, uid: str, kept: Sequence[Mapping[str, Any]], on: Collection[str]) -> None:
        """A run of an earlier process will go on, and with it the alarms that it had.

        kept : its alarms as run.json has them, oldest first; they may be ahead of the frames. on : signals whose alarm was on in the
        newest frame that the archive has.
        """
        known = {field.name for field in fields(Alarm)}
        alarms = [Alarm(**{key: value for key, value in one.items() if key in known}) for one in kept]
        newest = {alarm.signal: alarm for alarm in alarms}
        standing = [replace(newest[signal], cleared=None) for signal in on if signal in newest]
        ids = {id(newest[alarm.signal]) for alarm in standing}
        past = [alarm for alarm in alarms if id(alarm) not in ids and alarm.cleared is not None]
        self._before[uid] = past[-HISTORY:], standing

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        """Keep what the drift watch says of each; gives back what it was given."""
        # Nearly always nothing stands: then a frame costs an entry in the list of those that are looked back at.
        if self._standing or any(result.alarms for result in results):
            now = self._clock()
            with self._changing:
                for result in results:
                    self._see(result, now)
                for signal in list(self._furthest):
                    self._standing[signal] = self._up_to_date(signal)
                self._announce(now)
        else:
            self._recent.extend((result.index, result.score) for result in results)
        if results:
            self._frame = results[-1].index
        return list(results)

    def troubles(self, found: Mapping[str, str]) -> None:
        """What is wrong with the daemon at this moment: name -> sentence, empty where nothing is."""
        now = self._clock()
        with self._changing:
            self._troubles = self._troubles | found.keys()  # a new one: `names` goes through it in other threads
            for name, sentence in found.items():
                alarm = self._standing.get(name)
                if sentence and alarm is None:
                    self._stand(Alarm(name, "daemon", self._run, self._series, sentence, self._frame, None, now, None))
                elif not sentence and alarm is not None:
                    self._put_away(alarm, replace(alarm, cleared=now))
            self._announce(now)

    def standing(self) -> list[Alarm]:
        """The alarms that stand, oldest first."""
        with self._changing:
            return list(self._standing.values())

    def muted(self) -> dict[str, float]:
        """Signal -> Unix seconds until which it is muted, whether its alarm stands or not."""
        now = self._clock()
        with self._changing:
            return {signal: until for signal, until in self._muted.items() if until > now}

    def runs(self) -> list[str]:
        """Uids of the runs whose alarms are kept, newest first."""
        with self._changing:
            return list(reversed(self._histories))

    def of_run(self, uid: str) -> tuple[list[Alarm], int]:
        """(alarms of a run, oldest first, with those that stand; how many older ones were forgotten). Raises KeyError for another run."""
        with self._changing:
            history = self._histories[uid]
            here = [alarm for alarm in self._standing.values() if alarm.run == uid]
            return [*history.alarms, *here], history.left_out

    def acknowledge(self, signal: str, by: str = "") -> Alarm:
        """Somebody has seen an alarm that stands. Raises KeyError where none stands."""
        with self._changing:
            alarm = replace(self._standing[signal], acknowledged=self._clock(), acknowledged_by=by)
            self._standing[signal] = alarm
        log.info("alarm acknowledged", signal=signal, by=by)
        return alarm

    def mute(self, signal: str, minutes: float) -> float:
        """Mute a signal from now on, 0 minutes to end that; returns until when, Unix seconds. Raises KeyError for an unknown one."""
        if signal not in self.names:
            raise KeyError(signal)
        now = self._clock()
        until = now + 60 * min(minutes, LONGEST_MUTE_MIN)
        with self._changing:
            self._muted[signal] = until
            if signal in self._standing:
                self._standing[signal] = replace(self._standing[signal], muted_until=until)
            self._announce(now)
        log.info("alarm muted" if until > now else "alarm no longer muted", signal=signal, minutes=minutes)
        return until

    def _see(self, result: Result, now: float) -> None:
        """One frame. An empty one says nothing for or against an alarm."""
        for signal in result.alarms:
            if signal not in self._standing:
                self._stand(self._of_drift(signal, result, now))
        drifting = () if result.flags & _EMPTY else [(signal, one) for signal, one in self._standing.items() if one.kind == "drift"]
        for signal, alarm in drifting:
            score = result.score.get(signal, math.nan)
            if signal not in result.alarms:
                self._put_away(alarm, replace(self._up_to_date(signal), cleared=now), result.index)
            elif abs(score) > self._limit:
                before = self._furthest.get(signal, (0, 0.0))[1]
                self._furthest[signal] = result.index, max(before, score, key=abs)
        self._recent.append((result.index, result.score))

    def _up_to_date(self, signal: str) -> Alarm:
        """An alarm that stands, with what this batch has added."""
        alarm = self._standing[signal]
        if signal not in self._furthest:
            return alarm
        frame, peak = self._furthest.pop(signal)
        return replace(alarm, last_frame=frame, peak_sigmas=max(alarm.peak_sigmas or 0.0, peak, key=abs))

    def _of_drift(self, signal: str, result: Result, now: float) -> Alarm:
        """An alarm that this frame has raised; it began some frames before, as the watch is patient."""
        score = result.score.get(signal, math.nan)
        first, peak = result.index, score
        for index, scores in reversed(self._recent):
            before = scores.get(signal, math.nan)
            if abs(before) <= self._limit:
                break
            if not math.isnan(before):
                first, peak = index, max(peak, before, key=abs)
        cause = _in_words(signal, self._means.get(signal, math.nan), value_of(result, signal), score)
        return Alarm(signal, "drift", self._run, self._series, cause, first, result.index, now, peak)

    def _stand(self, alarm: Alarm) -> None:
        until = self._muted.get(alarm.signal)
        self._standing[alarm.signal] = replace(alarm, muted_until=until) if until is not None and until > alarm.raised else alarm
        # At once: one batch may hold the frame that clears it, too.
        self._announce(alarm.raised)

    def _announce(self, now: float) -> None:
        """Tell of every alarm that stands, once, and not while it is muted."""
        for signal, alarm in self._standing.items():
            if signal not in self._told and not alarm.muted(now):
                self._told.add(signal)
                self._tell(Change("raised", alarm, now, alarm.first_frame))

    def _put_away(self, alarm: Alarm, over: Alarm, frame: int | None = None) -> None:
        """It stands no longer. frame : that cleared it; None where its run ended."""
        del self._standing[alarm.signal]
        # What stood at the end of its run did not clear: the archive has it so, too.
        kept = alarm if frame is None and alarm.kind == "drift" else over
        history = self._histories.get(alarm.run)
        if history is not None:
            history.alarms.append(kept)
            if len(history.alarms) > HISTORY:
                history.alarms.popleft()
                history.left_out += 1
        if alarm.signal in self._told:
            self._told.remove(alarm.signal)
            self._tell(Change("cleared", over, over.cleared or 0.0, frame))


def value_of(result: Result, signal: str) -> float:
    """A signal's value in a frame, in the units of the prior's baseline; NaN where the frame has none."""
    if signal == "chi2":
        return result.chi2 / result.chi2_floor if result.chi2_floor else math.nan
    other = {"class_distance": result.class_distance, "prior_distance": result.distance}
    return other[signal] if signal in other else result.drift.get(signal, math.nan)


def _in_words(signal: str, mean: float, value: float, score: float) -> str:
    unit = f" {_UNITS[signal]}" if signal in _UNITS else ""
    return f"{signal} {mean:.4g} -> {value:.4g}{unit}, {score:+.1f} sigma"


def as_json(alarm: Alarm) -> dict[str, Any]:
    """An alarm as JSON has it: no infinity, which a frame without noise may give."""
    told = asdict(alarm)
    peak = alarm.peak_sigmas
    return told | {"peak_sigmas": peak if peak is not None and math.isfinite(peak) else None}


def archived(book: AlarmBook, uid: str) -> dict[str, Any]:
    """What run.json tells of a run's drift alarms: `alarms`, oldest first, and `alarms_left_out`, how many older ones it has not."""
    try:
        alarms, left_out = book.of_run(uid)
    except KeyError:  # it ended many runs ago
        return {}
    return {"alarms": [as_json(alarm) for alarm in alarms if alarm.kind == "drift"], "alarms_left_out": left_out}
