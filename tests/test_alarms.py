"""The alarm book: what stands and since which frame, who has seen it, what is muted, and who is told of what."""

from __future__ import annotations

import gc
import json
import math
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from streamprior.alarms import HISTORY, RUNS, Alarm, AlarmBook, Change, archived, as_json
from streamprior.records import Flag, Result
from streamprior.troubles import Look, TroubleWatch
from tests.builders import make_run
from tests.test_drift import make_result

MEANS = {"flux": 3.2, "chi2": 1.0, "centre_row": 64.0}


class Kept:
    """A book whose clock stands still until the test moves it, and what it has told."""

    def __init__(self, patience: int = 3) -> None:
        self.now = 1000.0
        self.told: list[Change] = []
        self.book = AlarmBook(MEANS, 5.0, patience, self.told.append, lambda: self.now)
        self.book.begin(make_run("run-1"))
        self.index = 0

    def frames(self, scores: Sequence[float], on: str, signal: str = "flux", flags: int = 0) -> None:
        """One frame for each score; `on` says with 1 in which of them the alarm stands."""
        results = []
        for score, standing in zip(scores, on, strict=True):
            alarms = (signal,) if standing == "1" else ()
            value = {"score": {signal: score}, "drift": {signal: 3.2 + 0.1 * score}, "flags": flags}
            results.append(make_result(index=self.index, alarms=alarms, **value))
            self.index += 1
        assert self.book(results) == results

    def one(self) -> Alarm:
        (alarm,) = self.book.standing()
        return alarm

    def events(self) -> list[tuple[str, str]]:
        return [(change.what, change.alarm.signal) for change in self.told]


@pytest.fixture
def kept() -> Kept:
    return Kept()


def test_an_alarm_begins_with_the_first_frame_beyond_the_limit_and_says_how_far_it_went(kept: Kept) -> None:
    kept.frames([0.1, 1.0, -5.5, -6.0, -6.1, -9.0, -7.0], "0000111")
    alarm = kept.one()
    assert (alarm.first_frame, alarm.last_frame) == (2, 6), "two frames before the one that raised it"
    assert alarm.cause == "flux 3.2 -> 2.59 photons a pixel, -6.1 sigma"
    assert alarm.peak_sigmas == -9.0
    assert (alarm.run, alarm.raised, alarm.cleared) == ("run-1", 1000.0, None)


def test_the_first_frame_is_found_in_the_batches_before_it_and_over_frames_that_were_not_measured(kept: Kept) -> None:
    kept.frames([0.0, 8.0], "00")
    kept.frames([math.nan, 6.0], "00")
    kept.frames([7.0], "1")
    assert (kept.one().first_frame, kept.one().peak_sigmas) == (1, 8.0)


def test_an_alarm_that_clears_is_kept_with_its_last_frame_beyond_the_limit(kept: Kept) -> None:
    kept.frames([6, 6, 6, 1, 1], "00111")
    kept.now = 1010.0
    kept.frames([1], "0")
    assert kept.book.standing() == []
    (alarm,), left_out = kept.book.of_run("run-1")
    assert (alarm.first_frame, alarm.last_frame, alarm.cleared, left_out) == (0, 2, 1010.0, 0)
    assert kept.events() == [("raised", "flux"), ("cleared", "flux")]
    assert [change.frame for change in kept.told] == [0, 5]


def test_an_alarm_that_comes_and_goes_within_one_batch_is_told(kept: Kept) -> None:
    kept.frames([6, 6, 6, 0], "0010")
    assert kept.events() == [("raised", "flux"), ("cleared", "flux")]


def test_an_empty_frame_neither_raises_nor_clears(kept: Kept) -> None:
    kept.frames([6, 6, 6], "001")
    kept.frames([math.nan] * 3, "000", flags=int(Flag.EMPTY))
    assert kept.one().last_frame == 2
    assert kept.events() == [("raised", "flux")]


def test_what_stands_at_the_end_of_a_run_stands_until_the_next_begins_and_is_archived_as_not_cleared(kept: Kept) -> None:
    kept.frames([6, 6, 6], "001")
    kept.book.begin(make_run("run-2"))
    assert kept.book.standing() == []
    assert kept.events() == [("raised", "flux"), ("cleared", "flux")]
    assert [one["cleared"] for one in archived(kept.book, "run-1")["alarms"]] == [None]
    assert archived(kept.book, "run-2") == {"alarms": [], "alarms_left_out": 0}


def test_an_acknowledged_alarm_says_by_whom_and_the_next_one_is_new(kept: Kept) -> None:
    kept.frames([6, 6, 6], "001")
    kept.now = 1005.0
    kept.book.acknowledge("flux", "Ada")
    kept.frames([6], "1")
    assert (kept.one().acknowledged, kept.one().acknowledged_by) == (1005.0, "Ada")
    kept.frames([0, 6], "01")
    assert kept.one().acknowledged is None
    with pytest.raises(KeyError):
        kept.book.acknowledge("chi2", "Ada")


def test_a_muted_alarm_stands_and_nobody_is_told_until_the_mute_is_over(kept: Kept) -> None:
    kept.book.mute("flux", 1)
    kept.frames([6, 6, 6], "001")
    assert kept.one().muted(kept.now)
    assert kept.told == []
    kept.now += 61
    kept.frames([6], "1")
    assert kept.events() == [("raised", "flux")]
    assert kept.book.muted() == {}


def test_an_alarm_that_came_and_went_while_muted_is_told_to_nobody_and_kept(kept: Kept) -> None:
    kept.book.mute("flux", 30)
    kept.frames([6, 6, 6, 0], "0010")
    assert kept.told == []
    assert [one["signal"] for one in archived(kept.book, "run-1")["alarms"]] == ["flux"]


def test_who_heard_of_an_alarm_hears_that_it_cleared_though_it_was_muted_meanwhile(kept: Kept) -> None:
    kept.frames([6, 6, 6], "001")
    kept.book.mute("flux", 30)
    kept.frames([0], "0")
    assert kept.events() == [("raised", "flux"), ("cleared", "flux")]


def test_a_mute_outlives_the_run_and_is_ended_by_one_of_no_minutes(kept: Kept) -> None:
    kept.book.mute("flux", 30)
    kept.book.begin(make_run("run-2"))
    kept.frames([6, 6, 6], "001")
    assert kept.told == []
    kept.book.mute("flux", 0)
    assert kept.events() == [("raised", "flux")]
    with pytest.raises(KeyError):
        kept.book.mute("no such", 1)


def test_an_alarm_that_comes_and_goes_all_night_grows_nothing(kept: Kept) -> None:
    kept = Kept(patience=1)
    for _ in range(HISTORY + 7):
        kept.frames([6, 0], "10")
    alarms, left_out = kept.book.of_run("run-1")
    assert (len(alarms), left_out, alarms[-1].first_frame) == (HISTORY, 7, 2 * (HISTORY + 6))
    for number in range(RUNS + 5):
        kept.book.begin(make_run(f"later-{number}"))
    assert len(kept.book.runs()) == RUNS
    assert archived(kept.book, "run-1") == {}


def test_a_frame_without_noise_makes_no_json_that_cannot_be_read(kept: Kept) -> None:
    kept.frames([math.inf] * 3, "001")
    assert json.loads(json.dumps(as_json(kept.one()), allow_nan=False))["peak_sigmas"] is None


def test_a_run_that_goes_on_after_a_kill_has_its_alarms_and_tells_nobody_twice(kept: Kept) -> None:
    kept.frames([6, 6, 6, 0], "0010")
    kept.frames([6, 6, 6, 7], "0011")
    kept.book.acknowledge("flux", "Ada")
    kept.book.mute("flux", 5)
    lists = json.loads(json.dumps(archived(kept.book, "run-1")["alarms"]))
    again = Kept()
    again.index = kept.index
    again.book.resume("run-1", lists, ["flux"])
    again.book.begin(make_run("run-1"))
    again.frames([8, 0], "10")
    before, after = again.book.of_run("run-1")[0]
    assert (before.first_frame, before.last_frame) == (0, 2)
    assert (after.first_frame, after.last_frame, after.peak_sigmas, after.acknowledged_by) == (4, 8, 8, "Ada")
    assert again.events() == [("cleared", "flux")]
    assert again.book.muted() == {"flux": 1300.0}


def test_an_alarm_that_the_archive_has_and_its_frames_have_not_is_raised_again(kept: Kept) -> None:
    kept.frames([6, 6, 6], "001")
    again = Kept()
    again.book.resume("run-1", archived(kept.book, "run-1")["alarms"], [])
    again.book.begin(make_run("run-1"))
    assert again.book.standing() == []
    again.frames([6, 6, 6], "001")
    assert again.events() == [("raised", "flux")]


def test_trouble_is_an_alarm_once_it_has_lasted_and_is_told_once(kept: Kept) -> None:
    state: dict[str, Any] = {"now": 0.0, "disk": "", "sink": ""}
    looks = {"disk_full": Look(lambda: state["disk"]), "sink_archive": Look(lambda: state["sink"], 30.0)}
    watch = TroubleWatch(kept.book, looks, lambda: state["now"])

    def look(at: float, **now: str) -> list[str]:
        state.update(now, now=at)
        watch.look()
        return [alarm.signal for alarm in kept.book.standing()]

    assert look(0.0) == []
    assert look(1.0, disk="full", sink="away") == ["disk_full"]
    assert look(20.0, sink="") == ["disk_full"], "back before its time"
    assert look(21.0, sink="away") == ["disk_full"]
    assert look(50.0) == ["disk_full"]
    assert look(51.0) == ["disk_full", "sink_archive"]
    assert look(52.0, disk="") == ["sink_archive"]
    assert kept.events() == [("raised", "disk_full"), ("raised", "sink_archive"), ("cleared", "disk_full")]
    assert archived(kept.book, "run-1")["alarms"] == [], "the ledger tells what was lost; run.json has what drifted"
    assert "sink_archive" in kept.book.names


def test_a_result_is_neither_kept_nor_changed(kept: Kept) -> None:

    result: Result = make_result(index=0, score={"flux": 0.1})
    counts = weakref.ref(result.counts)
    kept.book([result])
    del result
    gc.collect()
    assert counts() is None
