"""Frames and readings are joined whichever comes first, by number or by time, and nothing waits longer than it may."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from streamprior.config import PositionSettings
from streamprior.join import Joiner
from streamprior.records import Detector, Exposures, Flag, Frame, Positions, Reading, SeriesEnd, SeriesStart
from streamprior.seams import Decoded

COUNTS = np.zeros((4, 4), np.uint16)


def frame(index: int, series: str = "S1", at: float = 0.0, **more: Any) -> Frame:
    return Frame("eiger", series, index, COUNTS, received=at, **more)


def start(series: str = "S1", **metadata: Any) -> SeriesStart:
    return SeriesStart("eiger", series, None, Detector(), metadata)


def reading(number: int, scan: str = "scan-1", at: float = 0.0) -> Reading:
    return Reading("documents", scan, number, at, (number * 1e-6, -number * 1e-6))


def joiner(separate: bool = True, **settings: Any) -> Joiner:
    return Joiner(PositionSettings(x="motor_x", y="motor_y", **settings), separate)


def frames_of(records: list[Decoded]) -> list[tuple[int, tuple[float, float] | None, int]]:
    return [(one.index, one.position, one.flags) for one in records if isinstance(one, Frame)]


def scan_started(house: Joiner, uid: str = "scan-1", now: float = 0.0, **metadata: Any) -> None:
    assert not list(house.of_scan(SeriesStart("documents", uid, None, Detector(), metadata), now))


def test_without_a_motor_named_everything_goes_through_untouched() -> None:
    house = Joiner(PositionSettings(), separate=False)
    records = [start(), frame(0), SeriesEnd("eiger", "S1")]
    assert [one for record in records for one in house.of_frames(record, 0.0)] == records


@pytest.mark.parametrize("readings_first", [True, False])
def test_a_frame_gets_its_position_whichever_comes_first(readings_first: bool) -> None:
    house = joiner()
    scan_started(house)
    out: list[Decoded] = []
    steps = [("reading", n) for n in range(3)], [("frame", n) for n in range(3)]
    for kind, n in (steps[0] + steps[1]) if readings_first else (steps[1] + steps[0]):
        out += house.of_scan(reading(n), 0.1) if kind == "reading" else house.of_frames(frame(n), 0.1)
    assert frames_of(out) == [(n, (n * 1e-6, -n * 1e-6), 0) for n in range(3)]
    assert house.nbytes == 0


def test_a_frame_whose_position_never_comes_goes_on_flagged_after_the_wait_and_not_before() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    assert not list(house.of_frames(frame(0), now=10.0))
    assert house.nbytes > 0
    assert not list(house.due(10.9))
    (gone,) = house.due(11.0)
    assert isinstance(gone, Frame)
    assert (gone.position, gone.flags) == (None, Flag.NO_POSITION)


def test_a_position_that_comes_after_the_wait_is_told_of_its_frame() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    list(house.of_frames(frame(0), now=0.0))
    list(house.due(2.0))
    assert list(house.of_scan(reading(0), 3.0)) == [Positions("", "S1", {0: (0.0, -0.0)})]


def test_order_is_kept_behind_a_frame_that_waits() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    out = list(house.of_scan(reading(1), 0.0))
    for record in (start(), frame(0), frame(1), SeriesEnd("eiger", "S1")):
        out += house.of_frames(record, 0.0)
    assert [type(one) for one in out] == [SeriesStart]
    out += house.due(1.0)
    assert [type(one).__name__ for one in out] == ["SeriesStart", "Frame", "Frame", "SeriesEnd"]
    assert [position for _, position, _ in frames_of(out)] == [None, (1e-6, -1e-6)]


def test_a_frame_that_brought_its_position_keeps_it() -> None:
    house = joiner()
    scan_started(house)
    list(house.of_scan(reading(0), 0.0))
    (out,) = house.of_frames(frame(0, position=(5.0, 6.0)), 0.0)
    assert isinstance(out, Frame)
    assert out.position == (5.0, 6.0)


def test_what_waits_is_bounded_in_bytes_and_the_oldest_goes_on_without() -> None:
    house = joiner(hold_mb=1, wait_s=1000.0)
    scan_started(house)
    big = np.zeros((512, 512), np.uint16)  # half a MiB
    out = [one for n in range(4) for one in house.of_frames(Frame("eiger", "S1", n, big, received=0.0), 0.0)]
    assert [(index, flags) for index, _, flags in frames_of(out)] == [(n, Flag.NO_POSITION) for n in range(3)]
    assert house.nbytes <= 2**20


def test_everything_goes_on_when_the_path_ends() -> None:
    house = joiner(wait_s=1000.0)
    list(house.of_frames(start(), 0.0))
    list(house.of_frames(frame(0), 0.0))
    assert len(list(house.due(math.inf))) == 2


def test_documents_that_name_the_frames_of_a_reading_are_believed_rather_than_the_count() -> None:
    # Frame 1 was exposed twice: the plan was paused and went back to its checkpoint.
    house = joiner()
    scan_started(house)
    for first, number in ((0, 0), (2, 1), (3, 2)):
        list(house.of_scan(Exposures("documents", "scan-1", first, 1, number, 1), 0.0))
        list(house.of_scan(reading(number), 0.0))
    out = [one for n in range(4) for one in house.of_frames(frame(n), 0.0)]
    out += house.due(math.inf)
    assert [position and position[0] for _, position, _ in frames_of(out)] == [0.0, None, 1e-6, 2e-6]


def test_several_frames_of_one_reading_share_its_position() -> None:
    house = joiner()
    scan_started(house)
    list(house.of_scan(Exposures("documents", "scan-1", 0, 6, 0, 2), 0.0))
    for n in (0, 1):
        list(house.of_scan(reading(n), 0.0))
    out = [one for n in range(6) for one in house.of_frames(frame(n), 0.0)]
    assert [position and position[0] for _, position, _ in frames_of(out)] == [0.0] * 3 + [1e-6] * 3


def test_a_series_waits_for_the_scan_that_it_belongs_to_and_takes_its_start_document_along() -> None:
    house = joiner(wait_s=1.0)
    assert not list(house.of_frames(start(series_id=1), 0.0))
    (out,) = house.of_scan(SeriesStart("documents", "scan-1", None, Detector(), {"start": {"uid": "scan-1"}}), 0.3)
    assert isinstance(out, SeriesStart)
    assert out.metadata == {"series_id": 1, "start": {"uid": "scan-1"}}


def test_a_series_without_any_scan_goes_on_after_its_first_frame_has_waited() -> None:
    house = joiner(wait_s=1.0)
    assert not list(house.of_frames(start(), 0.0))
    assert not list(house.of_frames(frame(0), 30.0))
    assert not list(house.due(30.9))
    assert [type(one) for one in house.due(31.0)] == [SeriesStart, Frame]


def test_a_detector_that_is_armed_long_before_its_scan_begins_has_positions_and_start_document() -> None:
    house = joiner(wait_s=1.0)
    out = list(house.of_frames(start(series_id=1), 0.0))
    out += house.due(5.0)
    out += house.of_scan(SeriesStart("documents", "scan-1", None, Detector(), {"start": {"uid": "scan-1"}}), 8.0)
    out += house.of_frames(frame(0), 8.1)
    out += house.of_scan(reading(0), 8.2)
    assert [type(one) for one in out] == [SeriesStart, Frame]
    assert out[0].metadata == {"series_id": 1, "start": {"uid": "scan-1"}}  # type: ignore[union-attr]
    assert frames_of(out) == [(0, (0.0, -0.0), 0)]


def test_a_scan_that_is_over_is_not_taken_while_the_right_one_may_still_begin() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, "alignment", now=0.0)
    list(house.of_scan(Reading("documents", "alignment", 0, 0.0, (9.0, 9.0)), 0.5))
    list(house.of_scan(SeriesEnd("documents", "alignment"), 1.0))
    out = list(house.of_frames(start(), 2.0))  # armed, then the scan begins
    out += house.of_scan(SeriesStart("documents", "scan-1", None, Detector()), 2.1)
    out += house.of_frames(frame(0), 2.2)
    out += house.of_scan(reading(0), 2.3)
    assert frames_of(out) == [(0, (0.0, -0.0), 0)]


def test_frames_that_come_behind_the_end_of_their_scan_still_have_its_positions() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, now=0.0)
    list(house.of_scan(reading(0), 0.1))
    list(house.of_scan(SeriesEnd("documents", "scan-1"), 0.2))
    out = list(house.of_frames(start(), 5.0))
    out += house.of_frames(frame(0), 5.0)
    assert not out
    assert frames_of(list(house.due(6.0))) == [(0, (0.0, -0.0), 0)]


def test_exposures_by_hand_long_after_a_scan_have_no_positions() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, now=0.0)
    list(house.of_scan(reading(0), 0.1))
    list(house.of_scan(SeriesEnd("documents", "scan-1"), 0.2))
    list(house.of_frames(frame(0), 100.0))
    assert frames_of(list(house.due(101.0))) == [(0, None, Flag.NO_POSITION)]


def test_a_series_of_the_same_name_after_the_detectors_restart_has_the_positions_of_its_own_scan() -> None:
    house = joiner(wait_s=1.0)
    out: list[Decoded] = []
    for n in (1, 2):
        scan_started(house, f"scan-{n}", now=10.0 * n)
        out += house.of_frames(start("1"), 10.0 * n)
        for k in range(2):
            list(house.of_scan(Reading("documents", f"scan-{n}", k, 0.0, (float(n), k)), 10.0 * n))
            out += house.of_frames(frame(k, "1"), 10.0 * n)
        out += house.of_frames(SeriesEnd("eiger", "1"), 10.0 * n)
        list(house.of_scan(SeriesEnd("documents", f"scan-{n}"), 10.0 * n))
    assert [position for _, position, _ in frames_of(out)] == [(1.0, 0), (1.0, 1), (2.0, 0), (2.0, 1)]


def test_a_late_position_of_a_series_is_not_told_of_the_next_one_of_that_name() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, now=0.0)
    for record in (start("1"), frame(0, "1"), SeriesEnd("eiger", "1")):
        list(house.of_frames(record, 0.0))
    list(house.due(1.0))
    scan_started(house, "scan-2", now=2.0)
    list(house.of_frames(start("1"), 2.0))
    assert not list(house.of_scan(reading(0), 2.1))


def test_the_end_of_a_series_waits_for_positions_that_may_still_come() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    out = [one for record in (start(), frame(0)) for one in house.of_frames(record, 0.0)]
    out += house.due(1.0)
    out += house.of_frames(SeriesEnd("eiger", "S1"), 1.1)
    assert [type(one) for one in out] == [SeriesStart, Frame]
    assert [type(one) for one in house.of_scan(reading(0), 1.5)] == [Positions, SeriesEnd]


@pytest.mark.parametrize("scan_over", [True, False])
def test_the_end_of_a_series_waits_no_longer_than_its_scan_or_the_bound(scan_over: bool) -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    list(house.of_frames(frame(0), 0.0))
    list(house.due(1.0))
    assert not list(house.of_frames(SeriesEnd("eiger", "S1"), 1.1))
    out = house.of_scan(SeriesEnd("documents", "scan-1"), 1.2) if scan_over else house.due(2.1)
    assert [type(one) for one in out] == [SeriesEnd]


def test_a_stream_without_start_messages_that_counts_from_1_again_has_the_positions_of_its_own_scan() -> None:
    house = joiner(wait_s=1.0)
    out: list[Decoded] = []
    for n in (1, 2):
        scan_started(house, f"scan-{n}", now=100.0 * n)
        list(house.of_scan(Reading("documents", f"scan-{n}", 0, 0.0, (float(n), 0.0)), 100.0 * n))
        out += [one for record in (frame(0, "1"), SeriesEnd("eiger", "1")) for one in house.of_frames(record, 100.0 * n)]
    assert [position for _, position, _ in frames_of(out)] == [(1.0, 0.0), (2.0, 0.0)]


def test_a_series_without_frames_leaves_the_scan_to_the_next_one() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    list(house.of_scan(reading(0), 0.0))
    out = [one for record in (start("S1"), SeriesEnd("eiger", "S1"), start("S2"), frame(0, "S2")) for one in house.of_frames(record, 0.0)]
    assert frames_of(out) == [(0, (0.0, -0.0), 0)]


def test_a_stray_frame_of_the_series_before_does_not_take_the_next_scan() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, now=0.0)
    list(house.of_frames(frame(0, "S1"), 0.0))
    list(house.of_frames(start("S2"), 10.0))
    list(house.of_frames(frame(1, "S1"), 10.1))
    list(house.due(11.2))
    scan_started(house, "scan-2", now=11.3)
    list(house.of_scan(Reading("documents", "scan-2", 0, 0.0, (2.0, 2.0)), 11.4))
    out = list(house.of_frames(frame(0, "S2"), 11.5))
    assert frames_of(out) == [(0, (2.0, 2.0), 0)]


def test_scans_of_somebody_else_on_the_same_proxy_do_not_take_the_place_of_the_one_in_use() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, now=0.0)
    list(house.of_scan(reading(1), 0.0))
    list(house.of_frames(frame(0), 0.0))
    list(house.due(1.0))
    for n in range(10):
        scan_started(house, f"other-{n}", now=2.0)
    (out,) = house.of_frames(frame(1), 2.0)
    assert isinstance(out, Frame)
    assert out.position == (1e-6, -1e-6)


def test_an_image_larger_than_all_that_may_wait_waits_alone() -> None:
    house = joiner(wait_s=1.0, hold_mb=1)
    scan_started(house)
    list(house.of_frames(Frame("eiger", "S1", 0, np.zeros((1024, 1024), np.uint32), received=0.0), 0.0))
    (out,) = house.of_scan(reading(0), 0.5)
    assert isinstance(out, Frame)
    assert out.position == (0.0, -0.0)


def test_a_document_that_names_millions_of_frames_costs_no_more_than_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    list(house.of_frames(frame(7), 0.0))
    list(house.due(1.0))
    looked: list[int] = []
    place = house._place
    monkeypatch.setattr(house, "_place", lambda scan, index, at, late: looked.append(index) or place(scan, index, at, late))
    list(house.of_scan(Exposures("documents", "scan-1", 0, 10_000_000, 0, 1), 2.0))
    assert looked == [7]
    assert len(house._touched(house._scans["scan-1"], Exposures("documents", "scan-1", 0, 10_000_000, 0, 1))) == 1


def test_each_series_has_a_scan_of_its_own_even_where_the_one_before_is_not_over() -> None:
    house = joiner(wait_s=1.0)
    out: list[Decoded] = []
    for n in (1, 2):
        scan_started(house, f"scan-{n}", now=10.0 * n)
        list(house.of_scan(Reading("documents", f"scan-{n}", 0, 0.0, (float(n), 0.0)), 10.0 * n))
        out += house.of_frames(frame(0, f"S{n}"), 10.0 * n)
    assert [position for _, position, _ in frames_of(out)] == [(1.0, 0.0), (2.0, 0.0)]


def test_a_scan_that_begins_long_after_a_series_is_not_taken_for_it() -> None:
    house = joiner(wait_s=1.0)
    list(house.of_frames(frame(0), 0.0))
    out = list(house.of_scan(SeriesStart("documents", "scan-1", None, Detector()), 50.0))
    assert not list(house.of_scan(reading(0), 50.0))
    assert [position for _, position, _ in frames_of(out)] == [None]


def test_a_scan_without_frames_does_not_take_those_of_the_next() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house, "alignment", now=0.0)
    list(house.of_scan(SeriesEnd("documents", "alignment"), 1.0))
    scan_started(house, "scan-1", now=2.0)
    list(house.of_scan(reading(0), 2.0))
    (out,) = house.of_frames(frame(0), 2.1)
    assert isinstance(out, Frame)
    assert out.position == (0.0, -0.0)


def test_a_late_subscriber_that_missed_the_start_still_joins_what_it_hears() -> None:
    house = joiner()
    list(house.of_scan(reading(7), 0.0))
    (out,) = house.of_frames(frame(7), 0.0)
    assert isinstance(out, Frame)
    assert out.position == (7e-6, -7e-6)


def test_frames_out_of_documents_belong_to_the_scan_of_their_own_name() -> None:
    house = joiner(separate=False)
    out: list[Decoded] = []
    for record in (start("scan-1", start={"uid": "scan-1"}), reading(0), frame(0, "scan-1"), SeriesEnd("documents", "scan-1")):
        out += house.of_frames(record, 0.0)
    assert [type(one).__name__ for one in out] == ["SeriesStart", "Frame", "SeriesEnd"]
    assert frames_of(out) == [(0, (0.0, -0.0), 0)]


def by_time(**settings: Any) -> Joiner:
    house = joiner(join="time", **settings)
    scan_started(house)
    return house


def test_joined_by_time_a_frame_between_two_readings_is_between_them() -> None:
    house = by_time()
    out = list(house.of_scan(reading(0, at=100.0), 100.0))
    out += house.of_frames(frame(0, at=100.1), 100.1)
    assert not out
    out += house.of_scan(reading(1, at=100.4), 100.4)
    ((_, position, _),) = frames_of(out)
    assert position == pytest.approx((0.25e-6, -0.25e-6))


def test_joined_by_time_the_nearest_reading_counts_when_no_later_one_comes() -> None:
    house = by_time(wait_s=1.0)
    list(house.of_scan(reading(3, at=100.0), 100.0))
    assert not list(house.of_frames(frame(0, at=100.3), 100.3))
    assert frames_of(list(house.due(101.3))) == [(0, (3e-6, -3e-6), 0)]


def test_joined_by_time_a_reading_too_far_away_counts_as_none() -> None:
    house = by_time(wait_s=1.0, near_s=0.5)
    list(house.of_scan(reading(3, at=100.0), 100.0))
    list(house.of_frames(frame(0, at=102.0), 102.0))
    assert frames_of(list(house.due(103.0))) == [(0, None, Flag.NO_POSITION)]


def test_joined_by_time_a_detector_clock_that_is_years_off_is_not_believed() -> None:
    house = by_time()
    for n, at in ((0, 100.0), (1, 100.4)):
        list(house.of_scan(reading(n, at=at), at))
    (out,) = house.of_frames(frame(0, at=100.2, detector_time=3e8), 100.5)
    assert isinstance(out, Frame)
    assert out.position == pytest.approx((0.5e-6, -0.5e-6))


def test_joined_by_time_a_late_reading_still_tells_of_frames_that_went_on() -> None:
    house = by_time(wait_s=1.0)
    list(house.of_frames(frame(0, at=100.0), 100.0))
    list(house.due(101.0))
    assert list(house.of_scan(reading(1, at=100.0), 102.0)) == [Positions("", "S1", {0: (1e-6, -1e-6)})]


def test_documents_that_name_frames_tell_late_positions_of_the_right_ones() -> None:
    house = joiner(wait_s=1.0)
    scan_started(house)
    for n in range(4):
        list(house.of_frames(frame(n), 0.0))
    list(house.due(1.0))
    list(house.of_scan(Exposures("documents", "scan-1", 0, 1, 0, 1), 2.0))
    list(house.of_scan(Exposures("documents", "scan-1", 2, 2, 1, 2), 2.0))  # frame 1 was exposed for nothing
    told = [one for n in range(3) for one in house.of_scan(reading(n), 2.0)]
    assert told == [Positions("", "S1", {index: (n * 1e-6, -n * 1e-6)}) for n, index in enumerate((0, 2, 3))]


def test_joined_by_time_a_detector_clock_of_another_time_zone_is_not_believed() -> None:
    house = by_time()
    for n, at in ((0, 5000.0), (1, 5000.4)):
        list(house.of_scan(reading(n, at=at), at))
    (out,) = house.of_frames(frame(0, at=5000.2, detector_time=5000.1 + 3600), 5000.5)
    assert isinstance(out, Frame)
    assert out.position == pytest.approx((0.5e-6, -0.5e-6))


def test_joined_by_time_the_lines_of_a_fly_scan_may_be_series_of_their_own() -> None:
    house = by_time(wait_s=1.0)
    out: list[Decoded] = []
    for line in range(3):
        at = 100.0 + 10 * line
        out += house.of_frames(start(f"S{line}"), at)
        list(house.of_scan(Reading("documents", "scan-1", 2 * line, at, (float(line), 0.0)), at))
        out += house.of_frames(frame(0, f"S{line}", at=at + 0.1), at + 0.1)
        out += house.of_scan(Reading("documents", "scan-1", 2 * line + 1, at + 0.2, (float(line), 0.0)), at + 0.2)
        out += house.due(at + 2)
    assert [position for _, position, _ in frames_of(out)] == [(0.0, 0.0), (1.0, 0.0), (2.0, 0.0)]


def test_joined_by_time_a_reading_looks_only_at_the_frames_near_it(monkeypatch: pytest.MonkeyPatch) -> None:
    house = by_time(wait_s=1.0, near_s=0.5)
    for n in range(1000):  # the detector's clock is a minute ahead: none of them ever finds its reading
        list(house.of_frames(frame(n, at=100.0 + n, detector_time=160.0 + n), 100.0 + n))
    list(house.due(2000.0))
    looked: list[int] = []
    monkeypatch.setattr(house, "_place", lambda scan, index, at, late: looked.append(index))
    list(house.of_scan(reading(0, at=300.0), 2000.0))
    assert looked == [140]
