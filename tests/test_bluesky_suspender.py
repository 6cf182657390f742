"""The drift suspender: a real RunEngine beside a real daemon's HTTP side is held up while an alarm stands, and only then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import bluesky.plan_stubs as bps
import bluesky.plans as bp
import pytest
from bluesky import RunEngine
from ophyd.sim import motor
from ophyd.status import Status
from ophyd_async.core import soft_signal_rw

from streamprior.bluesky import DriftSuspender, StreampriorDevice
from streamprior.bluesky.numbers import Numbers
from streamprior.bluesky.suspender import Trial
from tests.test_bluesky_device import Beamline, call, connected, until_looked
from tests.test_bluesky_device import beamline as beamline
from tests.test_bluesky_device import engine as engine


class Detector:
    """Each exposure sends the daemon the next frame, which drifts or does not as the test says, and ends when the device has seen it."""

    name, parent = "detector", None

    def __init__(self, beamline: Beamline, device: StreampriorDevice, drifts: Callable[[int], bool]) -> None:
        self._beamline, self._device, self._drifts = beamline, device, drifts
        self.exposures = 0

    def trigger(self) -> Status:
        index, self.exposures = self.exposures, self.exposures + 1
        expose(self._beamline, index, self._drifts(index))
        status = Status(self)

        def look() -> None:
            if not status.done and self._device.numbers is not None and self._device.numbers.frame >= index:
                status.set_finished()
                self._device.unfollow(look)

        self._device.follow(look)
        return status

    def read(self) -> dict[str, Any]:
        return {}

    describe = read_configuration = describe_configuration = read


def expose(beamline: Beamline, index: int, drifts: bool) -> None:
    score = {"flux": 8.14 if drifts else 0.2}
    beamline.receive(index)
    beamline.show(index, score=score, alarms=("flux",) if drifts else ())
    beamline.settle(index)


class Diary:
    """What the RunEngine did when it was suspended and when it went on: plans of its own, which bluesky runs at those moments."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.then: Callable[[], None] = lambda: None

    def before(self) -> Iterator[Any]:
        self.lines.append("suspended")
        self.then()
        yield from bps.null()

    def after(self) -> Iterator[Any]:
        self.lines.append("resumed")
        yield from bps.null()


@contextmanager
def suspending(engine: RunEngine, device: StreampriorDevice, **options: Any) -> Iterator[Diary]:
    diary = Diary()
    engine.install_suspender(DriftSuspender(device, pre_plan=diary.before, post_plan=diary.after, **options))
    try:
        yield diary
    finally:
        engine.clear_suspenders()


@pytest.fixture
def device(engine: RunEngine, beamline: Beamline) -> Iterator[StreampriorDevice]:
    with connected(engine, beamline.server.url, period_s=0.01) as device:
        yield device


def test_a_plan_waits_while_an_alarm_stands_and_is_told_why(
    engine: RunEngine, beamline: Beamline, device: StreampriorDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    detector = Detector(beamline, device, lambda index: index == 3)
    with suspending(engine, device, retry_s=1000, tripped_message="call the crystal's owner") as diary:
        diary.then = lambda: expose(beamline, 100, False)
        result = engine(bp.scan([detector], motor, 0, 1, 8))
    said = capsys.readouterr().out
    assert result.exit_status == "success"
    assert diary.lines == ["suspended", "resumed"]
    assert "drift alarm: flux 8.1 sigma (streamprior, frame 3 of run run-1): call the crystal's owner" in said
    assert "drift alarm of streamprior" in said, "who reports a return to nominal conditions"


def test_the_point_of_the_alarm_is_taken_again_with_motors_of_ophyd_async(
    engine: RunEngine, beamline: Beamline, device: StreampriorDevice
) -> None:
    stage = soft_signal_rw(float, name="stage")
    call(engine, stage.connect())
    detector = Detector(beamline, device, lambda index: index == 2)
    places: list[float] = []
    with suspending(engine, device, retry_s=1000) as diary:
        diary.then = lambda: expose(beamline, 100, False)
        engine(bp.scan([detector], stage, 0, 3, 4), {"event": [lambda _, event: places.append(event["data"]["stage"])]})
    assert diary.lines == ["suspended", "resumed"]
    assert places == [0, 1, 2, 3]


def test_a_muted_alarm_holds_up_nothing_and_one_beside_it_does(engine: RunEngine, beamline: Beamline, device: StreampriorDevice) -> None:
    beamline.book.mute("flux", 30)
    detector = Detector(beamline, device, lambda index: index >= 3)
    with suspending(engine, device, retry_s=1000) as diary:
        result = engine(bp.scan([detector], motor, 0, 1, 8))
    assert result.exit_status == "success"
    assert diary.lines == []
    assert device.numbers is not None
    assert (device.numbers.alarms, device.numbers.holding) == (("flux",), ())
    both = Numbers("", alarms=("flux", "chi2"), muted=("flux",))
    assert Trial(10.0, 3).holds(both, 0.0)


def test_a_standing_alarm_is_tried_again_until_frames_are_good(engine: RunEngine, beamline: Beamline, device: StreampriorDevice) -> None:
    """The plan is what takes frames: while it is held up nothing can end the alarm."""
    detector = Detector(beamline, device, lambda index: 2 <= index < 9)
    with suspending(engine, device, retry_s=0.05, retry_frames=3) as diary:
        result = engine(bp.count([detector], num=8))
    assert result.exit_status == "success"
    assert diary.lines[:4] == ["suspended", "resumed"] * 2, "it still stood after the first try"
    assert detector.exposures > 9


def test_an_alarm_that_already_stands_holds_up_the_beginning(
    engine: RunEngine, beamline: Beamline, device: StreampriorDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    expose(beamline, 0, True)
    until_looked(device, lambda: device.numbers.alarms)
    commands: list[str] = []

    def hook(message: Any) -> None:
        commands.append(message.command)
        if message.command == "wait_for":
            expose(beamline, 1, False)

    with suspending(engine, device, retry_s=1000) as diary:
        engine.msg_hook = hook
        try:
            engine([*bps.null(), *bps.null()])
        finally:
            engine.msg_hook = None
    assert commands == ["wait_for", "null", "null"]
    assert diary.lines == []
    assert "drift alarm: flux 8.1 sigma" in capsys.readouterr().out


def test_a_plan_after_a_run_that_ended_with_an_alarm_begins_after_a_while(
    engine: RunEngine, beamline: Beamline, device: StreampriorDevice
) -> None:
    expose(beamline, 0, True)
    until_looked(device, lambda: device.numbers.alarms)
    with suspending(engine, device, retry_s=0.05):
        assert engine(bps.null()).exit_status == "success"


def test_one_that_was_removed_heeds_nothing(engine: RunEngine, beamline: Beamline, device: StreampriorDevice) -> None:
    detector = Detector(beamline, device, lambda index: index >= 1)
    with suspending(engine, device, retry_s=1000) as diary:
        (suspender,) = engine.suspenders
        engine.remove_suspender(suspender)
        assert engine(bp.count([detector], num=4)).exit_status == "success"
        assert diary.lines == []
        assert not suspender.tripped


def test_one_that_is_removed_while_it_holds_up_a_plan_lets_it_go(engine: RunEngine, beamline: Beamline, device: StreampriorDevice) -> None:
    detector = Detector(beamline, device, lambda index: index >= 1)
    with suspending(engine, device, retry_s=1000) as diary:
        (suspender,) = engine.suspenders
        diary.then = lambda: engine.remove_suspender(suspender)
        assert engine(bp.count([detector], num=4)).exit_status == "success"
    assert diary.lines == ["suspended", "resumed"]


def test_a_daemon_that_is_away_holds_up_nothing(engine: RunEngine, beamline: Beamline, device: StreampriorDevice) -> None:
    expose(beamline, 0, True)
    until_looked(device, lambda: device.numbers.alarms)
    with suspending(engine, device, retry_s=1000):
        (suspender,) = engine.suspenders
        assert suspender.tripped
        beamline.server.stop()
        until_looked(device, lambda: not device.answers)
        assert engine(bps.null()).exit_status == "success"
        assert not suspender.tripped


def test_it_can_hold_up_the_plan_until_the_daemon_is_back(
    engine: RunEngine, beamline: Beamline, device: StreampriorDevice, capsys: pytest.CaptureFixture[str]
) -> None:
    with suspending(engine, device, suspend_when_away=True) as diary:

        def plan() -> Iterator[Any]:
            yield from bps.checkpoint()
            beamline.server.stop()
            while not diary.lines:
                yield from bps.sleep(0.01)

        diary.then = beamline.again
        assert engine(plan()).exit_status == "success"
    assert diary.lines == ["suspended", "resumed"]
    assert f"the daemon at {beamline.server.url} does not answer" in capsys.readouterr().out


def said(frame: int, *alarms: str, run: str = "run-1") -> Numbers:
    return Numbers("0", run=run, frame=frame, alarms=alarms)


def test_after_a_while_without_a_frame_as_many_are_let_through_as_were_promised() -> None:
    trial = Trial(retry_s=10, retry_frames=3)
    assert not trial.holds(said(5), 0)
    assert trial.holds(said(6, "flux"), 1)
    assert trial.holds(said(8, "flux"), 4), "frames of a detector that runs by itself: nothing is tried"
    assert trial.holds(said(8, "flux"), 13.9)
    assert not trial.holds(said(8, "flux"), 14)
    assert not trial.holds(said(8, "flux"), 1000), "for as long as none comes"
    assert not trial.holds(said(9, "flux"), 1001)
    assert not trial.holds(said(10, "flux"), 1002)
    assert trial.holds(said(11, "flux"), 1003), "the third tells"
    assert trial.holds(said(11, "flux"), 1012)
    assert not trial.holds(said(11, "flux"), 1013)
    assert not trial.holds(said(12), 1014)
    assert trial.holds(said(13, "flux"), 1015), "a new alarm counts at once"


def test_frames_of_a_new_run_count_from_its_beginning() -> None:
    trial = Trial(retry_s=10, retry_frames=3)
    assert trial.holds(said(50, "flux"), 0)
    assert not trial.holds(said(50, "flux"), 10)
    assert not trial.holds(said(1, "flux", run="run-2"), 11)
    assert trial.holds(said(2, "flux", run="run-2"), 12)
