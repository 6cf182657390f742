"""The twin as an ophyd-async detector under a real RunEngine: step and fly scans into files and over V2, whatever interrupts them."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import bluesky.plan_stubs as bps
import bluesky.plans as bp
import bluesky.preprocessors as bpp
import h5py
import numpy as np
import pytest
import zmq
from bluesky import RunEngine
from bluesky.suspenders import SuspendBoolHigh
from bluesky.utils import RunEngineInterrupted
from event_model import DocumentNames, schema_validators
from ophyd import Signal
from ophyd_async.core import StaticPathProvider, TriggerInfo, UUIDFilenameProvider
from streamprior_sim.ophyd import DATASET, Disturbance, TwinDetector, TwinMotors, twin_motors
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin, build

from streamprior.errors import ConfigError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.wire.dectris_v2 import StreamV2Decoder

SIDE = 21


@pytest.fixture(scope="module")
def twin() -> Twin:
    """A raster of 21 x 21 positions, 30 nm apart."""
    changes = {"frames": SIDE**2, "detector.shape": [32, 32], "rate_hz": 1000, "sample.scan": "raster", "dose_photons": 1e5}
    return build(load_scenario("gold_balls", changes))


@pytest.fixture(scope="module")
def engine() -> Iterator[RunEngine]:
    one = RunEngine({}, call_returns_result=True)
    yield one
    one.loop.call_soon_threadsafe(one.loop.stop)


class Beamline:
    """A RunEngine whose documents are kept, and a detector and motors that live in its loop."""

    def __init__(self, engine: RunEngine, twin: Twin, folder: Path | None, wire: str | None = None, moves: bool = True) -> None:
        self.engine, self.twin, self.documents = engine, twin, list[tuple[str, Any]]()
        provider = None if folder is None else StaticPathProvider(UUIDFilenameProvider(), folder)
        self.motors: TwinMotors | None = twin_motors(twin) if moves else None
        self.detector = TwinDetector(twin, provider, wire=wire, motors=self.motors)
        for device in (self.detector, *(self.motors or ())):
            asyncio.run_coroutine_threadsafe(device.connect(), engine.loop).result()
        self._token = engine.subscribe(self._keep)

    def _keep(self, name: str, document: Any) -> None:
        schema_validators[DocumentNames[name]].validate(document)
        self.documents.append((name, document))

    def close(self) -> None:
        self.engine.unsubscribe(self._token)
        self.engine.msg_hook = None

    def of(self, name: str) -> list[Any]:
        return [document for kind, document in self.documents if kind == name]

    def grid(self, side: int = 3) -> Any:
        """A plan of side x side points, two raster steps apart."""
        assert self.motors is not None
        (x, y), (right, bottom) = self.twin.position(0), self.twin.position(2 * (side - 1) * (SIDE + 1))
        axes = (self.motors.y, y * 1e3, bottom * 1e3, side, self.motors.x, x * 1e3, right * 1e3, side)
        return bp.grid_scan([self.detector], *axes)

    def path(self) -> str:
        (resource,) = self.of("stream_resource")
        assert resource["mimetype"] == "application/x-hdf5"
        assert resource["parameters"]["dataset"] == DATASET
        return urlparse(resource["uri"]).path

    def frames(self) -> np.ndarray:
        with h5py.File(self.path()) as file:
            return np.asarray(file[DATASET])

    def map(self) -> list[tuple[int, int]]:
        """(frame, seq_num), one after the other, as the stream_datum documents have them."""
        pairs = []
        for datum in self.of("stream_datum"):
            indices, numbers = datum["indices"], datum["seq_nums"]
            pairs += list(zip(range(indices["start"], indices["stop"]), range(numbers["start"], numbers["stop"]), strict=True))
        return pairs

    def expected(self, count: int) -> np.ndarray:
        """The frames as they should be, from where the events say that the motors stood."""
        events = self.of("event")
        assert len(events) == count
        return np.array([self.twin.exposed(index, (one["data"]["x"] * 1e-3, one["data"]["y"] * 1e-3)) for index, one in enumerate(events)])


Make = Callable[..., Beamline]


@pytest.fixture
def beamline(engine: RunEngine, twin: Twin) -> Iterator[Make]:
    made: list[Beamline] = []

    def make(folder: Path | None, wire: str | None = None, moves: bool = True, of: Twin = twin) -> Beamline:
        made.append(Beamline(engine, of, folder, wire, moves))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Receiver:
    """A PULL socket and what came in, decoded."""

    def __init__(self) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self.address = f"tcp://127.0.0.1:{self._socket.bind_to_random_port('tcp://127.0.0.1')}"

    def series(self) -> list[SeriesStart | Frame | SeriesEnd]:
        """Everything up to the end of one series."""
        decoder = StreamV2Decoder("twin")
        records: list[Any] = []
        while not records or not isinstance(records[-1], SeriesEnd):
            assert self._socket.poll(20_000)
            records += decoder.decode(self._socket.recv(), 0.0)
        return records

    def close(self) -> None:
        self._socket.close()
        self._context.term()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.close()


def fly(detector: TwinDetector, count: int, period_s: float = 0.002) -> Any:
    """A plan of one flight."""

    @bpp.stage_decorator([detector])
    @bpp.run_decorator()
    def inner() -> Any:
        yield from bps.prepare(detector, TriggerInfo(number_of_events=count, livetime=period_s), wait=True)
        yield from bps.declare_stream(detector, name="primary")
        yield from bps.kickoff(detector, wait=True)
        yield from bps.collect_while_completing(flyers=[detector], dets=[detector], flush_period=0.02, stream_name="primary")

    yield from inner()


def suspend_at(engine: RunEngine, number: int) -> list[str]:
    """Suspend the plan for a moment while it handles message `number`; the list fills with the messages' commands."""
    commands: list[str] = []

    def hook(message: Any) -> None:
        commands.append(message.command)
        if len(commands) == number + 1:
            engine.request_suspend(lambda: asyncio.sleep(0.001))

    engine.msg_hook = hook
    return commands


# --- the picture -------------------------------------------------------------------------------------------------------------------


def test_a_frame_is_the_same_wherever_its_position_comes_from(twin: Twin) -> None:
    for index in (0, 7, 100):
        np.testing.assert_array_equal(twin.exposed(index, twin.position(index)), twin.frame(index))
    assert (twin.exposed(0, twin.position(7)) != twin.frame(0)).any()


def test_between_two_pixels_the_picture_changes_smoothly(twin: Twin) -> None:
    scan = twin.scan()
    assert scan is not None
    x, y = scan.true_position_m(100)
    field = np.ones(scan.probe.shape[1:], np.complex64)
    here, near, far = (scan.photons(100, field, (x + step, y)) for step in (0.0, 1e-11, 5e-9))
    assert 0 < np.abs(near - here).sum() < 0.01 * np.abs(far - here).sum()


def test_a_stage_that_errs_does_so_wherever_it_is_sent() -> None:
    rough = build(load_scenario("gold_balls_rough", {"frames": 30}))
    scan = rough.scan()
    assert scan is not None
    for index in range(30):
        told = rough.position(index)
        if told is not None:
            np.testing.assert_allclose(scan.corner(index, told), scan.corners[index], atol=1e-5)


@pytest.mark.parametrize(("x", "y"), [(0.0, 1e-6), (1e-6, 1.0)])
def test_a_place_beyond_the_sample_is_refused_with_the_room_there_is(twin: Twin, x: float, y: float) -> None:
    with pytest.raises(ConfigError, match="leaves the sample; stay within x 0"):
        twin.exposed(0, (x, y))
    scan = twin.scan()
    assert scan is not None
    for corner in zip(*scan.reach_m, strict=True):
        twin.exposed(0, corner)


def test_a_disturbance_takes_flux_and_moves_the_beam(twin: Twin) -> None:
    whole, half = twin.exposed(0), twin.exposed(0, disturbance=Disturbance(flux=0.5))
    assert half.sum() == pytest.approx(whole.sum() / 2, rel=0.01)
    moved = twin.exposed(0, disturbance=Disturbance(centre_px=(4, 0)))
    assert np.corrcoef(np.roll(whole, 4, 0).ravel(), moved.ravel())[0, 1] > 0.95 > np.corrcoef(whole.ravel(), moved.ravel())[0, 1]


def test_bragg_has_no_stage() -> None:
    bragg = build(load_scenario("bragg", {"frames": 5}))
    with pytest.raises(ConfigError, match="no stage to move"):
        bragg.exposed(0, (0.0, 0.0))
    with pytest.raises(ConfigError, match="for example gold_balls"):
        twin_motors(bragg)


# --- plans -------------------------------------------------------------------------------------------------------------------------


def test_a_grid_scan_writes_the_sample_where_the_motors_stood(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path)
    result = line.engine(line.grid())
    assert result.exit_status == "success"
    np.testing.assert_array_equal(line.frames(), line.expected(9))
    assert line.map() == [(index, index + 1) for index in range(9)]
    keys = line.of("descriptor")[0]["data_keys"]
    assert (keys["twin"]["shape"], keys["twin"]["dtype_numpy"], keys["x"]["units"]) == ([32, 32], "<u2", "mm")


def test_each_scan_begins_with_frame_0_in_a_file_of_its_own(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path)
    for _ in range(2):
        line.documents.clear()
        line.engine(bp.count([line.detector], 4))
        assert line.map() == [(index, index + 1) for index in range(4)]
        assert len(line.frames()) == 4
    assert len(list(tmp_path.iterdir())) == 2


def test_without_motors_frames_are_those_of_the_scenario(beamline: Make, tmp_path: Path, twin: Twin) -> None:
    line = beamline(tmp_path, moves=False)
    line.engine(bp.count([line.detector], 3))
    np.testing.assert_array_equal(line.frames(), [twin.frame(index) for index in range(3)])


def test_a_flight_is_told_of_in_blocks_and_has_every_frame(beamline: Make, tmp_path: Path, twin: Twin) -> None:
    line = beamline(tmp_path, moves=False)
    line.engine(fly(line.detector, 40))
    assert not line.of("event")
    assert line.map() == [(index, index + 1) for index in range(40)]
    np.testing.assert_array_equal(line.frames(), [twin.frame(index) for index in range(40)])


def test_the_file_is_read_while_it_is_written(beamline: Make, tmp_path: Path, twin: Twin) -> None:
    line = beamline(tmp_path, moves=False)
    seen: list[int] = []

    def read(name: str, document: Any) -> None:
        if name == "stream_datum":
            with h5py.File(line.path(), "r", libver="latest", swmr=True) as file:
                last = document["indices"]["stop"] - 1
                np.testing.assert_array_equal(file[DATASET][last], twin.frame(last))
                seen.append(last)

    line.engine(fly(line.detector, 30), read)
    line.documents.clear()
    line.engine(bp.count([line.detector], 3), read)
    assert seen[-4:] == [29, 0, 1, 2]


def test_without_a_file_an_event_holds_the_frames_number(beamline: Make) -> None:
    line = beamline(None)
    line.engine(line.grid(2))
    assert [event["data"]["twin-frame"] for event in line.of("event")] == [0, 1, 2, 3]
    assert set(Counter(name for name, _ in line.documents)) == {"start", "descriptor", "event", "stop"}


@pytest.mark.parametrize("written", [True, False])
def test_stream_v2_carries_the_same_pixels_as_one_series_a_scan(beamline: Make, receiver: Receiver, tmp_path: Path, written: bool) -> None:
    line = beamline(tmp_path if written else None, receiver.address)
    names = set()
    for _ in range(2):
        line.documents.clear()
        line.engine(line.grid(2))
        start, *frames, end = receiver.series()
        assert isinstance(start, SeriesStart)
        assert start.expected is None
        assert start.detector.shape == (32, 32)
        assert {start.series, end.series, *(frame.series for frame in frames)} == {start.series}
        assert [frame.index for frame in frames] == [0, 1, 2, 3]
        np.testing.assert_array_equal([frame.counts for frame in frames], line.expected(4))
        names.add(start.series)
        if written:
            np.testing.assert_array_equal(line.frames(), line.expected(4))
    assert len(names) == 2


def test_a_flight_goes_over_the_wire_without_a_file(beamline: Make, receiver: Receiver, twin: Twin) -> None:
    line = beamline(None, receiver.address, moves=False)
    line.engine(fly(line.detector, 12))
    _, *frames, _ = receiver.series()
    np.testing.assert_array_equal([frame.counts for frame in frames], [twin.frame(index) for index in range(12)])
    assert not line.of("stream_datum")


def test_a_disturbance_lasts_as_long_as_somebody_wants_it(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path, moves=False)

    def disturb(name: str, document: Any) -> None:
        if name == "event":
            line.detector.disturbance = {3: Disturbance(flux=0.5)}.get(document["seq_num"])

    line.engine(bp.count([line.detector], 6), disturb)
    flux = line.frames().sum((1, 2), dtype=float)
    assert list(flux / flux[0]) == pytest.approx([1.0, 1.0, 1.0, 0.5, 1.0, 1.0], rel=0.15)


# --- what goes wrong ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [True, False])
def test_a_plan_that_is_suspended_anywhere_has_each_frame_once(beamline: Make, tmp_path: Path, file: bool) -> None:
    line = beamline(tmp_path if file else None)
    commands = suspend_at(line.engine, -10)
    line.engine(line.grid(2))
    last = len(commands) - 1 - commands[::-1].index("save")
    # Between close_run and unstage bluesky itself replays the last point without a run (1.15.1), whatever the detector.
    for number in [one for one in range(len(commands)) if one != last]:
        line.documents.clear()
        suspend_at(line.engine, number)
        assert line.engine(line.grid(2)).exit_status == "success"
        assert [event["seq_num"] for event in line.of("event")] == [1, 2, 3, 4], number
        if file:
            assert line.map() == [(0, 1), (1, 2), (2, 3), (3, 4)], number
            np.testing.assert_array_equal(line.frames(), line.expected(4))
        else:
            assert [event["data"]["twin-frame"] for event in line.of("event")] == [0, 1, 2, 3], number


def test_a_point_that_is_paused_is_exposed_again_under_its_number(beamline: Make, receiver: Receiver, tmp_path: Path) -> None:
    line = beamline(tmp_path, receiver.address)
    paused = False

    @bpp.stage_decorator([line.detector])
    @bpp.run_decorator()
    def plan() -> Any:
        nonlocal paused
        for number in range(3):
            yield from bps.checkpoint()
            line.detector.disturbance = Disturbance(flux=0.5) if number == 1 and not paused else None
            yield from bps.trigger(line.detector, wait=True)
            if number == 1 and not paused:
                paused = True
                yield from bps.pause()
            yield from bps.create()
            yield from bps.read(line.detector)
            yield from bps.save()

    with pytest.raises(RunEngineInterrupted):
        line.engine(plan())
    line.detector.disturbance = None
    line.engine.resume()
    assert line.map() == [(0, 1), (1, 2), (2, 3)]
    _, *frames, _ = receiver.series()
    assert [frame.index for frame in frames] == [0, 1, 1, 2]
    np.testing.assert_array_equal([frame.counts for frame in frames if frame is not frames[1]], line.frames())
    assert frames[1].counts.sum() == pytest.approx(frames[2].counts.sum() / 2, rel=0.02)


def test_a_suspender_holds_a_scan_and_lets_it_go(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path)
    shutter = Signal(name="shutter", value=0)
    suspender = SuspendBoolHigh(shutter)
    line.engine.install_suspender(suspender)

    def trip(name: str, document: Any) -> None:
        if name == "event" and document["seq_num"] == 4:
            shutter.put(1)
            threading.Timer(0.05, shutter.put, (0,)).start()

    line.engine(line.grid(), trip)
    line.engine.remove_suspender(suspender)
    assert line.map() == [(index, index + 1) for index in range(9)]
    np.testing.assert_array_equal(line.frames(), line.expected(9))


def test_a_flight_that_is_suspended_anywhere_has_each_frame_once(beamline: Make, tmp_path: Path, twin: Twin) -> None:
    line = beamline(tmp_path, moves=False)
    commands = suspend_at(line.engine, -10)
    line.engine(fly(line.detector, 30))
    for number in range(min(commands.index("collect") + 3, len(commands) - 3)):
        line.documents.clear()
        suspend_at(line.engine, number)
        assert line.engine(fly(line.detector, 30)).exit_status == "success"
        assert line.map() == [(index, index + 1) for index in range(30)], (number, commands[number])
        np.testing.assert_array_equal(line.frames(), [twin.frame(index) for index in range(30)])


def test_a_flight_that_is_paused_lands_first(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path, moves=False)

    def pause(name: str, document: Any) -> None:
        if name == "stream_datum" and document["indices"]["start"] == 0:
            threading.Thread(target=line.engine.request_pause).start()

    with pytest.raises(RunEngineInterrupted):
        line.engine(fly(line.detector, 100), pause)
    assert line.engine.resume().exit_status == "success"
    assert line.map() == [(index, index + 1) for index in range(100)]


def test_a_flight_without_an_end_is_refused(beamline: Make, tmp_path: Path) -> None:
    line = beamline(tmp_path, moves=False)
    with pytest.raises(Exception, match="give TriggerInfo a number_of_events"):
        line.engine(fly(line.detector, 0))


@pytest.mark.parametrize("flies", [True, False])
def test_a_scan_of_more_frames_than_the_scenario_has_says_so(beamline: Make, tmp_path: Path, flies: bool) -> None:
    short = build(load_scenario("bragg", {"frames": 4, "detector.shape": [32, 32], "rate_hz": 1000}))
    line = beamline(tmp_path, moves=False, of=short)
    with pytest.raises(Exception, match=r"frame 4 of scenario bragg, which has 4; set its frames") as failure:
        line.engine(fly(line.detector, 6) if flies else bp.count([line.detector], 6))
    causes = [failure.value, failure.value.__cause__, *failure.value.args]
    assert any(isinstance(one, ConfigError) for one in causes)
    line.documents.clear()
    line.engine(bp.count([line.detector], 4))
    np.testing.assert_array_equal(line.frames(), [short.frame(index) for index in range(4)])


def test_a_scan_that_is_aborted_ends_its_series_and_leaves_the_detector_ready(beamline: Make, receiver: Receiver, tmp_path: Path) -> None:
    line = beamline(tmp_path, receiver.address)

    def plan() -> Any:
        yield from bpp.stage_wrapper(bpp.run_wrapper(interrupted()), [line.detector])

    def interrupted() -> Any:
        yield from bps.trigger_and_read([line.detector])
        yield from bps.checkpoint()
        yield from bps.trigger(line.detector)
        yield from bps.pause()

    with pytest.raises(RunEngineInterrupted):
        line.engine(plan())
    line.engine.abort()
    receiver.series()
    line.documents.clear()
    line.engine(line.grid(2))
    assert line.map() == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert len(receiver.series()) == 6
