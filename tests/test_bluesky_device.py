"""The daemon as a Bluesky device: real HTTP, a real RunEngine, and numbers that are those of the point they are recorded with."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import bluesky.plans as bp
import event_model
import pytest
from bluesky import RunEngine
from bluesky.protocols import Readable, Stageable, Triggerable
from ophyd.sim import NullStatus, motor
from ophyd_async.core import NotConnectedError, init_devices, set_mock_value, soft_signal_rw

from streamprior.alarms import AlarmBook
from streamprior.bluesky import StreampriorDevice
from streamprior.bluesky.numbers import Asker, NoAnswer, parse
from streamprior.config import HttpSettings
from streamprior.errors import ConfigError
from streamprior.records import Flag
from streamprior.server import HttpServer, make_app, numbers_now
from streamprior.sinks.archive import read_run, run_folders
from streamprior.wire.dectris_v2 import encode_end
from tests.builders import NAMES, diffraction, make_run
from tests.test_daemon import daemon
from tests.test_daemon import place as place
from tests.test_path import series
from tests.test_server import Served, shown


class Beamline(Served):
    """The daemon's real HTTP side around a ledger and a page, which the test feeds in place of a path."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: set[str] = set()
        self.server.stop()
        self.book = AlarmBook({"flux": 5.0})
        self.server = HttpServer(make_app(self.meters, self.ledger, self.page, lambda: self.state, None, self.book), HttpSettings(port=0))
        self.server.start()

    def receive(self, index: int, run: str = "run-1") -> None:
        if run not in self.opened:
            self.opened.add(run)
            self.ledger.open_run(make_run(run))
        self.ledger.received(run, index)

    def show(self, index: int, run: str = "run-1", alarms: tuple[str, ...] = (), **changes: Any) -> None:
        self.page.write([replace(shown(index, run=run, **changes), alarms=alarms)])

    def settle(self, index: int, run: str = "run-1") -> None:
        self.ledger.published(run, "archive", [index])

    def frame(self, index: int, run: str = "run-1", **changes: Any) -> None:
        """A frame goes through the whole path."""
        self.receive(index, run)
        self.show(index, run, **changes)
        self.settle(index, run)

    def again(self) -> None:
        """The daemon comes back on its port."""
        port = int(self.server.url.rpartition(":")[2])
        self.server = HttpServer(make_app(self.meters, self.ledger, self.page, lambda: self.state), HttpSettings(port=port))
        self.server.start()


@pytest.fixture
def beamline() -> Iterator[Beamline]:
    served = Beamline()
    yield served
    served.server.stop()


@pytest.fixture(scope="module")
def engine() -> Iterator[RunEngine]:
    engine = RunEngine({}, call_returns_result=True)
    yield engine
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join(10)
    engine.loop.close()


def call(engine: RunEngine, coroutine: Any) -> Any:
    """Wait for a coroutine in the RunEngine's loop."""
    return asyncio.run_coroutine_threadsafe(coroutine, engine.loop).result(30)


@contextlib.contextmanager
def connected(engine: RunEngine, url: str, **options: Any) -> Iterator[StreampriorDevice]:
    device = StreampriorDevice(url, **options)
    call(engine, device.connect())
    try:
        yield device
    finally:
        call(engine, device.disconnect())


def events(engine: RunEngine, plan: Any) -> list[dict[str, Any]]:
    """Data of the events of a plan; all its documents obey the schemas."""
    seen: list[dict[str, Any]] = []

    def hear(name: str, document: dict[str, Any]) -> None:
        event_model.schema_validators[event_model.DocumentNames[name]].validate(document)
        if name == "event":
            seen.append(document["data"])

    engine(plan, hear)
    return seen


def until_looked(device: StreampriorDevice, said: Any) -> None:
    """Wait until the device has looked and `said()` holds."""
    found = threading.Event()

    def look() -> None:
        if said():
            found.set()

    device.follow(look)
    try:
        assert found.wait(30)
    finally:
        device.unfollow(look)


def test_status_names_classes_and_signals_before_the_first_frame(beamline: Beamline) -> None:
    status, said = beamline.json("/status")
    assert status == 200
    assert [said[name] for name in ("run", "index", "series", "received", "age_s", "chi2", "distance", "ledger")] == [None] * 8
    assert said["iou"] == {name: {"prior": None, "previous": None} for name in NAMES}
    assert said["score"] == {"flux": None}
    assert (said["alarm"], said["alarms"], said["flags"], said["frames_behind"], said["degradation_level"]) == (False, [], [], 0, 0)


def test_status_holds_the_newest_result_and_the_account_of_its_run(beamline: Beamline) -> None:
    beamline.frame(7, alarms=("flux",), flags=int(Flag.ABSTAINED | Flag.SATURATED), chi2_floor=float("nan"))
    beamline.receive(8)
    said = beamline.json("/status")[1]
    assert (said["run"], said["series"], said["index"], said["chi2"], said["chi2_floor"]) == ("run-1", "S1", 7, 0.1, None)
    assert said["iou"]["core"] == {"prior": 0.5, "previous": None}
    assert (said["alarm"], said["alarms"], said["flags"]) == (True, ["flux"], ["SATURATED", "ABSTAINED"])
    assert (said["frames_received"], said["frames_behind"], said["ledger"]["published"]) == (2, 1, 1)
    assert said["age_s"] > 0


def test_a_frame_is_behind_until_its_numbers_are_shown(beamline: Beamline) -> None:
    def behind() -> int:
        return int(numbers_now(beamline.meters, beamline.ledger, beamline.page)["frames_behind"])

    beamline.receive(0)
    assert behind() == 1
    beamline.settle(0)
    assert behind() == 1, "the archive has it, the page does not"
    beamline.show(0)
    assert behind() == 0
    beamline.receive(2)
    beamline.receive(1)
    beamline.show(2)
    beamline.settle(2)
    assert behind() == 1
    beamline.show(1)
    assert behind() == 1
    beamline.settle(1)
    assert behind() == 0, "frames may come in any order"
    beamline.frame(0, "run-2")
    assert behind() == 0


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b"null", b"\xff", b'{"version": 1}', b"[" * 100_000, b'{"version":"1","run":"","index":1e999}']
)
def test_what_is_no_status_is_no_answer(body: bytes) -> None:
    with pytest.raises(NoAnswer, match="not what a streamprior daemon says"):
        parse(body, "http://127.0.0.1:1")


def test_it_is_what_plans_take_for_a_detector(engine: RunEngine, beamline: Beamline) -> None:
    with connected(engine, beamline.server.url) as device:
        assert isinstance(device, Readable)
        assert isinstance(device, Triggerable)
        assert isinstance(device, Stageable)
        keys = call(engine, device.describe())
        assert {f"streamprior-mask_iou-{name}" for name in NAMES} | {"streamprior-drift-flux", "streamprior-alarm"} < set(keys)
        assert keys["streamprior-drift-flux"]["units"] == "sigma"
        assert keys["streamprior-chi2"]["precision"] == 4
        assert device.hints == {"fields": ["streamprior-chi2", "streamprior-mask_iou_mean"]}


def test_a_plan_records_the_newest_numbers(engine: RunEngine, beamline: Beamline) -> None:
    with connected(engine, beamline.server.url) as device:
        (before,) = events(engine, bp.count([device]))
        beamline.frame(7, alarms=("flux",))
        (after,) = events(engine, bp.count([device]))
    assert (before["streamprior-run"], before["streamprior-frame"], before["streamprior-up"]) == ("", -1, True)
    assert before["streamprior-chi2"] != before["streamprior-chi2"]
    assert (after["streamprior-run"], after["streamprior-frame"], after["streamprior-chi2"]) == ("run-1", 7, 0.1)
    assert (after["streamprior-mask_iou-core"], after["streamprior-mask_iou_mean"]) == (0.5, 0.5)
    assert (after["streamprior-alarm"], after["streamprior-alarms"]) == (True, "flux")


def test_init_devices_and_a_baseline_take_it(engine: RunEngine, beamline: Beamline) -> None:
    from bluesky.preprocessors import baseline_wrapper

    with init_devices():
        prior = StreampriorDevice(beamline.server.url, name="")
    try:
        assert prior.chi2.name == "prior-chi2"
        assert prior.drift["flux"].name == "prior-drift-flux"
        streams: list[str] = []
        engine(
            baseline_wrapper(bp.scan([], motor, 0, 1, 2), [prior]), {"descriptor": [lambda _, document: streams.append(document["name"])]}
        )
        assert streams == ["baseline", "primary"]
    finally:
        call(engine, prior.disconnect())


def test_an_event_holds_the_numbers_of_its_own_frame(engine: RunEngine, beamline: Beamline) -> None:
    """The detector's trigger ends before its frame is through the path; the device of the same point waits for it."""
    through: list[threading.Timer] = []

    class Detector:
        name, parent = "detector", None
        points = 0

        def trigger(self) -> Any:
            from ophyd.status import Status

            index, self.points = self.points, self.points + 1
            beamline.receive(index)
            # A frame becomes a result only some time after the exposure.
            through.append(threading.Timer(0.1, lambda: (beamline.settle(index), beamline.show(index, chi2=float(index)))))
            through[-1].start()
            status = Status(self)
            status.set_finished()
            return status

        def read(self) -> dict[str, Any]:
            return {}

        describe = read_configuration = describe_configuration = read

    with connected(engine, beamline.server.url, wait_frames=1, wait_s=30) as device:
        recorded = events(engine, bp.scan([Detector(), device], motor, 0, 1, 5))
    for timer in through:
        timer.join()
    assert [event["streamprior-frame"] for event in recorded] == [0, 1, 2, 3, 4]
    assert [event["streamprior-chi2"] for event in recorded] == [0, 1, 2, 3, 4]
    assert all(event["streamprior-caught_up"] for event in recorded)


def test_an_event_beside_a_real_daemon_holds_the_numbers_of_its_own_frame(engine: RunEngine, place: Path) -> None:
    frames = diffraction(count=6)
    start, *images, _ = series(frames)

    class Detector:
        name, parent = "detector", None

        def __init__(self, push: Any) -> None:
            self._push, self._images = push, iter(images)

        def trigger(self) -> NullStatus:
            self._push.send(next(self._images))
            return NullStatus()

        def read(self) -> dict[str, Any]:
            return {}

        describe = read_configuration = describe_configuration = read

    with daemon(place) as running, running.sender() as push:
        push.send(start)
        with connected(engine, f"http://127.0.0.1:{running.http}", wait_frames=1, wait_s=60) as device:
            recorded = events(engine, bp.scan([Detector(push), device], motor, 0, 1, 6))
        push.send(encode_end(1, "S1"))
        running.until("run closed")
    run = read_run(run_folders(place / "archive")[0])
    assert [event["streamprior-frame"] for event in recorded] == [0, 1, 2, 3, 4, 5]
    assert [event["streamprior-chi2"] for event in recorded] == pytest.approx(run.frames["chi2"].to_pylist(), rel=1e-6)
    assert [event["streamprior-mask_iou-core"] for event in recorded] == pytest.approx(run.frames["iou_core"].to_pylist(), rel=1e-6)


def test_a_frame_that_never_comes_is_not_waited_for_for_ever(engine: RunEngine, beamline: Beamline) -> None:
    beamline.frame(0)
    with connected(engine, beamline.server.url, wait_frames=1, wait_s=0.05) as device:
        (event,) = events(engine, bp.count([device]))
    assert (event["streamprior-frame"], event["streamprior-caught_up"], event["streamprior-up"]) == (0, False, True)


def test_the_signals_follow_a_daemon_that_goes_and_comes_back(engine: RunEngine, beamline: Beamline) -> None:
    beamline.frame(7)
    with connected(engine, beamline.server.url, period_s=0.02) as device:
        beamline.server.stop()
        until_looked(device, lambda: not device.answers)
        (away,) = events(engine, bp.count([device]))
        beamline.again()
        until_looked(device, lambda: device.answers)
        beamline.frame(8)
        until_looked(device, lambda: device.numbers is not None and device.numbers.frame == 8)
        frame = call(engine, device.frame.get_value())
    assert (away["streamprior-frame"], away["streamprior-up"]) == (7, False), "the last value stays"
    assert frame == 8


def test_a_subscriber_hears_of_changes_and_of_nothing_else(engine: RunEngine, beamline: Beamline) -> None:
    heard: list[bool] = []
    with connected(engine, beamline.server.url, period_s=0.01) as device:

        async def listen() -> None:
            device.alarm.subscribe(lambda reading: heard.append(reading["streamprior-alarm"]["value"]))

        call(engine, listen())
        for index in range(6):
            beamline.frame(index, alarms=("flux",) if index >= 3 else ())
            until_looked(device, lambda index=index: device.numbers.frame == index)
    assert heard == [False, True]


def test_a_daemon_with_another_prior_adds_its_signals(engine: RunEngine, beamline: Beamline) -> None:
    with connected(engine, beamline.server.url) as device:
        beamline.meters.classes = ("core", "speckle")
        call(engine, device.connect(force_reconnect=True))
        assert set(device.mask_iou) == {*NAMES, "speckle"}
        assert len(call(engine, device.read())) == len(call(engine, device.describe())), "each of them once"


def test_nobody_there_is_an_error_that_says_so(engine: RunEngine) -> None:
    device = StreampriorDevice("http://127.0.0.1:9", name="prior", period_s=0.01)
    with pytest.raises(NotConnectedError, match=r"no answer .* start the daemon"):
        call(engine, device.connect(timeout=0.05))
    with pytest.raises(ConfigError, match="no address of a daemon"):
        StreampriorDevice("http://127.0.0.1:port")


def test_a_mock_needs_no_daemon(engine: RunEngine) -> None:
    device = StreampriorDevice(name="prior", wait_frames=1)
    call(engine, device.connect(mock=True))
    set_mock_value(device.chi2, 0.25)
    (event,) = events(engine, bp.count([device]))
    assert event["prior-chi2"] == 0.25


def test_it_works_beside_other_devices_in_an_event_loop_of_ones_own(beamline: Beamline) -> None:
    async def alone() -> tuple[int, bool]:
        device = StreampriorDevice(beamline.server.url)
        other = soft_signal_rw(float, name="other")
        await asyncio.gather(device.connect(), other.connect())
        beamline.frame(3)
        await device.trigger()
        return (await device.read())["streamprior-frame"]["value"], device.answers

    assert asyncio.run(alone()) == (3, True)


def test_a_process_that_ends_with_a_connected_device_says_nothing(beamline: Beamline) -> None:
    code = f"""
from bluesky import RunEngine
from ophyd_async.core import init_devices
from streamprior.bluesky import StreampriorDevice
RE = RunEngine({{}})
with init_devices():
    device = StreampriorDevice({beamline.server.url!r})
print(device.answers)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["ophyd_async"] = None
from streamprior.errors import ConfigError
import streamprior.bluesky
try:
    streamprior.bluesky.StreampriorDevice
except ConfigError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "pip install 'streamprior[bluesky]'" in done.stdout


def test_the_device_does_not_load_the_daemon() -> None:
    code = "import sys\nfrom streamprior.bluesky import StreampriorDevice, DriftSuspender\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "streamprior.daemon" not in done.stdout
    assert "streamprior.bluesky.device" in done.stdout


def test_whoever_answers_a_byte_at_a_time_is_given_up_and_holds_up_no_plan() -> None:
    over = asyncio.Event()

    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10000\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while not reader.at_eof() and not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)
        with contextlib.suppress(ConnectionError):
            writer.close()
            await writer.wait_closed()
        over.set()

    async def ask() -> None:
        server = await asyncio.start_server(drip, "127.0.0.1", 0)
        asker = Asker(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", timeout_s=0.3)
        try:
            with pytest.raises(NoAnswer, match="no answer"):
                await asker.ask()
        finally:
            await asker.close()
            await over.wait()
            server.close()

    asyncio.run(asyncio.wait_for(ask(), 15))
