"""Start and end messages are hints: runs open and close rightly whichever of them the wire lost."""

from __future__ import annotations

import numpy as np
import pytest
from structlog.testing import capture_logs

from streamprior.records import Detector, Frame, RunEnded, RunStarted, SeriesEnd, SeriesStart
from streamprior.runs import LateFrame, Runs


class Hall:
    """Runs with a clock and a count that the test moves by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.count = 0
        self.runs = Runs(lambda uid: self.count, late_s=1.0, idle_s=60.0, clock=lambda: self.now)


def start(series: str = "A", expected: int | None = 3) -> SeriesStart:
    return SeriesStart("eiger", series, expected, Detector(shape=(4, 4)))


def frame(series: str = "A", index: int = 0) -> Frame:
    return Frame("eiger", series, index, np.zeros((4, 4), np.uint16), 0.0)


def test_a_whole_series_opens_and_closes_by_its_messages() -> None:
    hall = Hall()
    (opened,) = hall.runs.start(start())
    assert isinstance(opened, RunStarted)
    assert opened.expected == 3
    assert hall.runs.frame(frame()) == []
    assert hall.runs.current == opened
    hall.count = 3
    (ended,) = hall.runs.end(SeriesEnd("eiger", "A"))
    assert (ended.uid, ended.reason) == (opened.uid, "end")


def test_a_frame_opens_a_run_when_its_start_is_missing() -> None:
    hall = Hall()
    (opened,) = hall.runs.frame(frame("B"))
    assert isinstance(opened, RunStarted)
    assert (opened.series, opened.expected) == ("B", None)
    assert hall.runs.current == opened


def test_an_end_message_waits_for_frames_that_are_still_under_way() -> None:
    hall = Hall()
    hall.runs.start(start())
    hall.count = 2
    assert hall.runs.end(SeriesEnd("eiger", "A")) == []
    hall.now = 0.5
    hall.runs.frame(frame(index=2))
    hall.count = 3
    (ended,) = hall.runs.tick()
    assert ended.reason == "end"


def test_an_end_message_with_missing_frames_closes_after_the_late_time() -> None:
    hall = Hall()
    hall.runs.start(start())
    hall.runs.end(SeriesEnd("eiger", "A"))
    hall.now = 0.9
    assert hall.runs.tick() == []
    hall.now = 1.1
    assert [ended.reason for ended in hall.runs.tick()] == ["end"]


def test_a_missing_end_message_closes_when_all_frames_are_in() -> None:
    hall = Hall()
    hall.runs.start(start())
    hall.count = 3
    assert hall.runs.tick() == []
    hall.now = 1.1
    assert [ended.reason for ended in hall.runs.tick()] == ["complete"]


def test_a_new_series_closes_the_old_one() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("A"))
    ended, second = hall.runs.start(start("B"))
    assert isinstance(ended, RunEnded)
    assert (ended.uid, ended.reason) == (first.uid, "new_series")
    assert second.series == "B"


def test_a_frame_of_a_closed_series_is_late_and_names_its_run() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("A"))
    hall.runs.start(start("B"))
    with pytest.raises(LateFrame) as late:
        hall.runs.frame(frame("A"))
    assert late.value.uid == first.uid
    assert hall.runs.current.series == "B", "a stray frame does not reopen its series"


def test_a_frame_of_a_series_that_was_over_for_long_is_of_another_one_of_that_name() -> None:
    hall = Hall()
    hall.runs.frame(frame("1"))
    hall.runs.end(SeriesEnd("eiger", "1"))
    hall.now = 1.0
    (ended,) = hall.runs.tick()
    for hall.now in (30.0, 80.0):  # each late frame shows that the old one is still on its way
        with pytest.raises(LateFrame):
            hall.runs.frame(frame("1"))
    hall.now = 140.0
    (opened,) = hall.runs.frame(frame("1"))
    assert isinstance(opened, RunStarted)
    assert hall.runs.current == opened
    assert opened.uid != ended.uid


def test_a_series_that_starts_again_is_a_new_run() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("A"))
    hall.runs.start(start("B"))
    *_, again = hall.runs.start(start("A"))
    assert again.uid != first.uid
    assert hall.runs.frame(frame("A")) == []
    assert hall.runs.current == again


def test_a_repeated_start_changes_nothing_and_a_stray_end_neither() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("A"))
    assert hall.runs.start(start("A")) == []
    assert hall.runs.end(SeriesEnd("eiger", "Z")) == []
    assert hall.runs.current == first


def test_a_start_after_frames_or_after_the_end_is_a_sender_that_counts_anew() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("1"))
    hall.count = 2
    ended, second = hall.runs.start(start("1"))
    assert isinstance(ended, RunEnded)
    assert (ended.uid, ended.reason) == (first.uid, "new_series")
    hall.count = 0
    assert hall.runs.end(SeriesEnd("eiger", "1")) == []
    _, third = hall.runs.start(start("1"))
    assert len({first.uid, second.uid, third.uid}) == 3


def test_a_start_that_comes_behind_its_first_frames_changes_nothing() -> None:
    hall = Hall()
    hall.runs.frame(frame("A"))
    hall.count = 1
    assert hall.runs.start(start("A")) == []


def test_a_scan_that_was_paused_goes_on_in_a_new_run_with_the_same_detector() -> None:
    hall = Hall()
    (first,) = hall.runs.start(start("A"))
    hall.now = 61.0
    assert [ended.reason for ended in hall.runs.tick()] == ["idle"]
    (second,) = hall.runs.frame(frame("A", 2))
    assert second.uid != first.uid
    assert hall.runs.current == second
    assert second.detector is first.detector


def test_an_expected_number_of_zero_does_not_close_the_run_before_its_first_frame() -> None:
    hall = Hall()
    (opened,) = hall.runs.start(start(expected=0))
    hall.now = 30.0
    assert hall.runs.tick() == []
    assert hall.runs.frame(frame()) == []
    assert hall.runs.current == opened


def test_silence_closes_a_run_without_end() -> None:
    hall = Hall()
    hall.runs.frame(frame("A"))
    hall.now = 59.0
    assert hall.runs.tick() == []
    hall.now = 60.0
    assert [ended.reason for ended in hall.runs.tick()] == ["idle"]
    assert hall.runs.tick() == []


def test_another_receiver_on_the_same_stream_is_known_by_its_gaps_and_said_once() -> None:
    hall = Hall()
    hall.runs.start(start(expected=400))
    with capture_logs() as said:
        for index in [*range(0, 120, 1), 125, 126, *range(130, 330, 2)]:
            hall.runs.frame(frame(index=index))
    assert [(line["event"].partition(":")[0], line["n"]) for line in said] == [("only every n-th frame comes", 2)]


def test_after_a_restart_a_series_goes_on_in_the_run_that_it_had() -> None:
    hall = Hall()
    hall.runs.resume([RunStarted("before", "eiger", "A", 7.0, None, Detector())])
    (opened,) = hall.runs.start(start("A"), again=True)
    assert (opened.uid, opened.opened, opened.expected) == ("before", 7.0, 3)
    hall.count = 1
    assert hall.runs.frame(frame("A")) == []
    ended, other = hall.runs.start(start("A"))
    assert isinstance(ended, RunEnded)
    assert (ended.uid, ended.reason) == ("before", "new_series")
    assert isinstance(other, RunStarted)
    assert other.uid != "before"


def test_a_run_that_cannot_go_on_gives_its_start_to_the_one_that_the_next_frame_opens() -> None:
    hall = Hall()
    assert hall.runs.start(start("A"), again=True) == []
    (opened,) = hall.runs.frame(frame("A", 7))
    assert (opened.series, opened.detector.shape, opened.expected) == ("A", (4, 4), None)


def test_a_run_that_goes_on_and_hears_nothing_is_interrupted() -> None:
    hall = Hall()
    for fresh, reason in ((False, "interrupted"), (True, "new_series")):
        hall.runs.resume([RunStarted(f"before {fresh}", "eiger", "A", 7.0, None, Detector())])
        hall.runs.start(start("A"), again=True)
        hall.runs.frame(frame("A"), again=True)
        if fresh:
            hall.runs.frame(frame("A", 1))
        ended, _ = hall.runs.start(start("B"))
        assert isinstance(ended, RunEnded)
        assert (ended.uid, ended.reason) == (f"before {fresh}", reason)
