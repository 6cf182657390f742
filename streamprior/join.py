"""Frames and the readings of a scan -> frames with positions, whichever of the two comes first, within a bounded wait."""

from __future__ import annotations

import bisect
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamprior.config import PositionSettings
from streamprior.records import Exposures, Flag, Frame, Positions, Reading, SeriesEnd, SeriesStart
from streamprior.seams import Decoded

_SCANS = 4
"""Scans remembered: the one that runs, the next one that begins before its frames are through, and some that never had frames."""

_READINGS = 200_000
"""Readings of one scan that are kept, the newest: 50 MB."""

_CLOCK_S = 1800.0
"""A detector's clock that is off by more than this is not believed: one in another time zone or in summer time is off by an hour."""

_OVER_S = 60.0
"""A scan that was over for longer when a series' first frame came has nothing to do with it, however far behind the path is."""

_LATE = 10_000
"""Frames that went on without their position and may still get it."""


@dataclass
class _Scan:
    """What is known of one Bluesky run. times, places : readings in the order of their time, where they are joined by it."""

    uid: str
    opened: float
    metadata: Mapping[str, Any]
    taken: bool = False  # a series has its frames
    over: float = math.inf  # when its end was heard of
    by_number: OrderedDict[int, tuple[float, float]] = field(default_factory=OrderedDict)
    times: list[float] = field(default_factory=list)
    places: list[tuple[float, float]] = field(default_factory=list)
    exposures: list[Exposures] = field(default_factory=list)  # in the order of `first`
    numbered: bool = False  # its documents say which frames belong to which readings


@dataclass(eq=False, slots=True)
class _Series:
    """A series of frames. Its name is no identity: a detector that was started again counts from 1 again.

    first : when its first record behind the start message came; detectors are armed before the scan begins, sometimes long before.
    """

    name: str
    announced: bool = False
    first: float = math.inf
    heard: float = -math.inf
    over: bool = False
    scan: str = ""
    missed: int = 0  # frames that went on without a position and may still get it


class _Missed:
    """Frames that went on without a position, the newest `_LATE`; found by number or by time."""

    def __init__(self) -> None:
        self._frames: OrderedDict[int, tuple[_Series, float]] = OrderedDict()
        self._times: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._frames)

    def add(self, index: int, series: _Series, at: float) -> None:
        self.forget(index)
        self._frames[index] = series, at
        series.missed += 1
        bisect.insort(self._times, (at, index))
        if len(self._frames) > _LATE:
            self.forget(next(iter(self._frames)))

    def get(self, index: int) -> tuple[_Series | None, float]:
        return self._frames.get(index, (None, 0.0))

    def forget(self, index: int) -> None:
        if index in self._frames:
            series, at = self._frames.pop(index)
            series.missed -= 1
            del self._times[bisect.bisect_left(self._times, (at, index))]

    def forget_series(self, name: str) -> None:
        for index in [index for index, (series, _) in self._frames.items() if series.name == name]:
            self.forget(index)

    def among(self, told: range) -> Sequence[int]:
        """Those of `told`, and perhaps others that are none: a document may name millions of frames."""
        return told if len(told) < len(self._frames) else [index for index in self._frames if index in told]

    def near(self, time: float, near_s: float) -> Sequence[int]:
        first = bisect.bisect_left(self._times, (time - near_s, -1))
        return [index for _, index in self._times[first : bisect.bisect_right(self._times, (time + near_s, math.inf))]]


@dataclass(slots=True)
class _Held:
    record: SeriesStart | Frame | Positions | SeriesEnd
    until: float
    series: _Series


class Joiner:
    """Holds frames for at most `wait_s`, in order, until the reading that belongs to them has come. Owns what waits.

    A series belongs to the scan of its own name (frames out of documents), otherwise to the newest scan that began before its first frame,
    or not later than the wait, and that no other series has; joined by time, series may share one that goes on. What is over or shared is
    taken only once nothing better came within the wait. A frame that came with a position keeps it.

    Parameters
    ----------
    settings : which motors, joined how, how long and how much may wait. Without `x` everything goes through at once.
    separate : readings come over a wire of their own; otherwise scan and series are one.
    """

    def __init__(self, settings: PositionSettings, separate: bool) -> None:
        self._settings = settings
        self._active = settings.x is not None
        self._separate = separate
        self._scans: OrderedDict[str, _Scan] = OrderedDict()
        self._held: deque[_Held] = deque()
        self._bytes = 0
        self._known: OrderedDict[str, _Series] = OrderedDict()  # by name, the newest of that name, in the order that they began
        self._missed = _Missed()

    @property
    def nbytes(self) -> int:
        """Bytes of the frames that wait."""
        return self._bytes

    def of_scan(self, record: Decoded, now: float) -> Iterator[Decoded]:
        """A record of the wire that brings readings alone: nothing but readings, and when a scan begins and ends, is taken from it."""
        if isinstance(record, SeriesStart):
            self._begin(record, now)
        elif isinstance(record, SeriesEnd):
            if (scan := self._scans.get(record.series)) is not None:
                scan.over = now
        elif isinstance(record, Reading | Exposures):
            yield from self._learn(record)
        yield from self.due(now)

    def of_frames(self, record: Decoded, now: float) -> Iterator[Decoded]:
        """A record of the wire that brings the frames."""
        if not self._active:
            yield record
            return
        if isinstance(record, Reading | Exposures):
            yield from self._learn(record)
        else:
            self._hold(record, now)
        yield from self.due(now)

    def due(self, now: float) -> Iterator[Decoded]:
        """What may go on, in order: whatever has its position, has waited long enough or is too much to hold. Infinity: everything."""
        while self._held:
            head = self._held[0]
            # One alone may always wait: an image of 16 million pixels of 32 bit has more than the default.
            late = head.until <= now or (self._bytes > self._settings.hold_mb * 2**20 and len(self._held) > 1)
            record = self._joined(head, late)
            if record is None:
                return
            self._held.popleft()
            self._bytes -= head.record.nbytes
            yield record

    def _hold(self, record: SeriesStart | Frame | Positions | SeriesEnd, now: float) -> None:
        series = self._series_of(record, now)
        until = now + self._settings.wait_s
        if self._held and self._held[-1].until == math.inf:
            self._held[-1].until = until
        # A start message goes with its first frame: until then nobody misses it, and its scan may still begin.
        self._held.append(_Held(record, math.inf if isinstance(record, SeriesStart) else until, series))
        self._bytes += record.nbytes

    def _series_of(self, record: SeriesStart | Frame | Positions | SeriesEnd, now: float) -> _Series:
        """The series of this name; another one of the same name where a start message comes behind its frames or its end, or where there
        are none, anything comes long after its end."""
        series = self._known.get(record.series)
        starts = isinstance(record, SeriesStart)
        anew = series is not None and (
            series.over or (series.announced and series.first < math.inf) if starts else series.over and now - series.heard > _OVER_S
        )
        if series is None or anew:
            self._known.pop(record.series, None)
            series = self._known[record.series] = _Series(record.series)
            if isinstance(record, SeriesStart) and not self._separate:
                self._begin(record, now)
            self._missed.forget_series(record.series)
            while len(self._known) > _SCANS:
                self._known.popitem(last=False)
        if starts:
            series.announced = True
        else:
            series.first = min(series.first, now)
        series.heard, series.over = now, series.over or isinstance(record, SeriesEnd)
        return series

    def _begin(self, start: SeriesStart, now: float) -> None:
        self._scans[start.series] = _Scan(start.series, now, start.metadata)
        in_use = {series.scan for series in list(self._known.values())[-1:]}
        for uid in [uid for uid in self._scans if uid not in in_use][: max(0, len(self._scans) - _SCANS)]:
            del self._scans[uid]

    def _learn(self, record: Reading | Exposures) -> Iterator[Positions]:
        """Remember it; yields the positions of frames that went on without."""
        scan = self._scans.get(record.scan)
        if scan is None:  # a late subscriber misses the beginning
            scan = self._scans[record.scan] = _Scan(record.scan, -math.inf, {})
        if isinstance(record, Exposures):
            _add_exposures(scan, record)
        elif self._settings.join == "number":
            scan.by_number[record.number] = record.position
            if len(scan.by_number) > _READINGS:
                scan.by_number.popitem(last=False)
        else:
            at = bisect.bisect(scan.times, record.time)
            scan.times.insert(at, record.time)
            scan.places.insert(at, record.position)
            if len(scan.times) > _READINGS:
                del scan.times[0], scan.places[0]
        if self._missed:
            yield from self._caught_up(scan, record)

    def _caught_up(self, scan: _Scan, record: Reading | Exposures) -> Iterator[Positions]:
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for index in self._touched(scan, record):
            series, at = self._missed.get(index)
            if series is not None and series.scan == scan.uid and (place := self._place(scan, index, at, False)) is not None:
                found.setdefault(series.name, {})[index] = place
        for name, places in found.items():
            for index in places:
                self._missed.forget(index)
            yield Positions("", name, places)

    def _touched(self, scan: _Scan, record: Reading | Exposures) -> Sequence[int]:
        """Frames whose position this record may tell."""
        if isinstance(record, Exposures):
            return self._missed.among(range(record.first, record.first + record.frames))
        if self._settings.join == "time":
            return self._missed.near(record.time, self._settings.near_s)
        if not scan.numbered:
            return (record.number,)
        known = bisect.bisect(scan.exposures, record.number, key=lambda one: one.number) - 1
        if known < 0:
            return ()
        one = scan.exposures[known]
        each = one.frames // one.readings
        return range(one.first + (record.number - one.number) * each, one.first + (record.number - one.number + 1) * each)

    def _joined(self, head: _Held, late: bool) -> SeriesStart | Frame | Positions | SeriesEnd | None:
        """The record as it may go on; None where it should wait."""
        record = head.record
        if isinstance(record, Positions):
            return record
        if isinstance(record, SeriesEnd):
            # The run is over with it, and positions that come later find no frames any more.
            known = self._scans.get(head.series.scan)
            return None if head.series.missed and known is not None and known.over == math.inf and not late else record
        scan = self._scan_of(head.series, late)
        if isinstance(record, SeriesStart):
            if not self._separate:
                return record
            if scan is None:
                return record if late else None
            return replace(record, metadata={**record.metadata, **scan.metadata})
        if record.position is not None:
            return record
        if scan is not None:
            scan.taken = True
        at = record.received
        if record.detector_time is not None and abs(record.detector_time - record.received) < _CLOCK_S:
            at = record.detector_time
        place = self._place(scan, record.index, at, late) if scan is not None else None
        if place is not None:
            return replace(record, position=place)
        if not late:
            return None
        self._missed.add(record.index, head.series, at)
        return replace(record, flags=record.flags | Flag.NO_POSITION)

    def _scan_of(self, series: _Series, late: bool) -> _Scan | None:
        """The scan whose frames this series holds."""
        if not series.scan:
            scan = self._scans.get(series.name) or self._free(series, late)
            if scan is None:
                return None
            series.scan = scan.uid
        return self._scans.get(series.scan)

    def _free(self, series: _Series, late: bool) -> _Scan | None:
        """The newest scan that could be this series'."""
        if self._known.get(series.name) is not series or next(reversed(self._known)) != series.name:
            return None
        soon = [scan for scan in self._scans.values() if scan.opened <= series.first + self._settings.wait_s]
        running = [scan for scan in soon if scan.over == math.inf]
        over = [scan for scan in soon if late and series.first - _OVER_S <= scan.over < math.inf]
        # Between two scans with frames there may be one without, and detectors are armed before their scan begins.
        for scans in (running, over):
            if free := [scan for scan in scans if not scan.taken]:
                return max(free, key=lambda one: one.opened)
        shared = late and self._settings.join == "time"
        return max(running, key=lambda one: one.opened) if running and shared else None

    def _place(self, scan: _Scan, index: int, at: float, late: bool) -> tuple[float, float] | None:
        return self._by_number(scan, index) if self._settings.join == "number" else self._by_time(scan, at, late)

    def _by_number(self, scan: _Scan, index: int) -> tuple[float, float] | None:
        if not scan.numbered:
            return scan.by_number.get(index)
        known = bisect.bisect(scan.exposures, index, key=lambda one: one.first) - 1
        if known < 0:
            return None
        one = scan.exposures[known]
        if index >= one.first + one.frames:
            return None
        return scan.by_number.get(one.number + (index - one.first) * one.readings // one.frames)

    def _by_time(self, scan: _Scan, at: float, late: bool) -> tuple[float, float] | None:
        """Between the readings around `at`; the nearest one where the other is too far away, once no later one can be waited for."""
        near_s = self._settings.near_s
        after = bisect.bisect_left(scan.times, at)
        sides = [i for i in (after - 1, after) if 0 <= i < len(scan.times) and abs(scan.times[i] - at) <= near_s]
        if len(sides) == 2:
            first, second = sides
            part = (at - scan.times[first]) / max(scan.times[second] - scan.times[first], 1e-12)
            (x0, y0), (x1, y1) = scan.places[first], scan.places[second]
            return x0 + part * (x1 - x0), y0 + part * (y1 - y0)
        if not sides or (after == len(scan.times) and not late and scan.over == math.inf):
            return None
        return scan.places[sides[0]]


def _add_exposures(scan: _Scan, new: Exposures) -> None:
    """In the order of their frames; what goes on where the last one ended makes it longer, as a scan has one document a point."""
    scan.numbered = True
    last = scan.exposures[-1] if scan.exposures else None
    follows = last is not None and (new.first, new.number) == (last.first + last.frames, last.number + last.readings)
    if last is not None and follows and new.frames * last.readings == last.frames * new.readings:
        scan.exposures[-1] = replace(last, frames=last.frames + new.frames, readings=last.readings + new.readings)
    else:
        bisect.insort(scan.exposures, new, key=lambda one: one.first)
        del scan.exposures[:-_READINGS]
