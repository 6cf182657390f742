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

_CLOCK_S = 3600.0
"""A detector's clock that is off by more than this is not believed."""

_LATE = 10_000
"""Frames that went on without their position and may still get it."""


@dataclass
class _Scan:
    """What is known of one Bluesky run. times, places : readings in the order of their time, where they are joined by it."""

    uid: str
    opened: float
    metadata: Mapping[str, Any]
    taken: str = ""  # the series that this scan's frames are of
    over: bool = False
    by_number: OrderedDict[int, tuple[float, float]] = field(default_factory=OrderedDict)
    times: list[float] = field(default_factory=list)
    places: list[tuple[float, float]] = field(default_factory=list)
    exposures: list[Exposures] = field(default_factory=list)  # in the order of `first`
    numbered: bool = False  # its documents say which frames belong to which readings


@dataclass(frozen=True, slots=True)
class _Held:
    record: SeriesStart | Frame | Positions | SeriesEnd
    until: float
    series: str


class Joiner:
    """Holds frames for at most `wait_s`, in order, until the reading that belongs to them has come. Owns what waits.

    A series belongs to the scan of its own name (frames out of documents), otherwise to the newest scan that began before it, or not later
    than the wait, and that no other series has. A frame that came with a position keeps it.

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
        self._series = ""
        self._opened = math.inf  # when the newest series was first heard of
        self._missed: OrderedDict[int, tuple[str, float]] = OrderedDict()  # frame -> its series and time, gone on without a position

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
                scan.over = True
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
            late = head.until <= now or self._bytes > self._settings.hold_mb * 2**20
            record = self._joined(head, late)
            if record is None:
                return
            self._held.popleft()
            self._bytes -= head.record.nbytes
            yield record

    def _hold(self, record: SeriesStart | Frame | Positions | SeriesEnd, now: float) -> None:
        if record.series != self._series:
            self._series, self._opened = record.series, now
            if not self._separate and isinstance(record, SeriesStart):
                self._begin(record, now)
        self._held.append(_Held(record, now + self._settings.wait_s, record.series))
        self._bytes += record.nbytes

    def _begin(self, start: SeriesStart, now: float) -> None:
        self._scans[start.series] = _Scan(start.series, now, start.metadata)
        while len(self._scans) > _SCANS:
            self._scans.popitem(last=False)

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
        found: dict[int, tuple[float, float]] = {}
        for index in self._touched(scan, record):
            series, at = self._missed.get(index, ("", 0.0))
            if series == scan.taken and (place := self._place(scan, index, at, False)) is not None:
                found[index] = place
        for index in found:
            del self._missed[index]
        if found:
            yield Positions("", scan.taken, found)

    def _touched(self, scan: _Scan, record: Reading | Exposures) -> Sequence[int]:
        """Frames whose position this record may tell."""
        if isinstance(record, Exposures):
            return range(record.first, record.first + record.frames)
        if self._settings.join == "time":
            return list(self._missed)
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
        if isinstance(record, Positions | SeriesEnd):
            return record
        scan = self._scan_of(head.series)
        if isinstance(record, SeriesStart):
            if not self._separate:
                return record
            if scan is None:
                return record if late else None
            return replace(record, metadata={**record.metadata, **scan.metadata})
        if record.position is not None:
            return record
        at = record.received
        if record.detector_time is not None and abs(record.detector_time - record.received) < _CLOCK_S:
            at = record.detector_time
        place = self._place(scan, record.index, at, late) if scan is not None else None
        if place is not None:
            return replace(record, position=place)
        if not late:
            return None
        self._missed[record.index] = (record.series, at)
        if len(self._missed) > _LATE:
            self._missed.popitem(last=False)
        return replace(record, flags=record.flags | Flag.NO_POSITION)

    def _scan_of(self, series: str) -> _Scan | None:
        """The scan whose frames this series holds; taken when it is first asked for."""
        if series in self._scans:
            self._scans[series].taken = series
            return self._scans[series]
        for scan in self._scans.values():
            if scan.taken == series:
                return scan
        if series != self._series:
            return None
        free = [scan for scan in self._scans.values() if not scan.taken and scan.opened <= self._opened + self._settings.wait_s]
        if not free:
            return None
        # One that still runs before one that is over: between two scans with frames there may be one without.
        scan = max(free, key=lambda one: (not one.over, one.opened))
        scan.taken = series
        return scan

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
        if not sides or (after == len(scan.times) and not late and not scan.over):
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
