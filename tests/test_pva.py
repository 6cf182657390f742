"""pvapy's servers -> the channel's monitor, the path and the daemon: frames counted, pixels compared, a server that goes and comes back.

Servers and clients find each other on loopback, by ports of their own, so that no IOC of the network is heard.
"""

from __future__ import annotations

import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import bitshuffle
import h5py
import hdf5plugin
import lz4.block
import numpy as np
import pytest

from streamprior.config import Config, SourceSettings
from streamprior.errors import ConfigError
from streamprior.preflight import inspect
from streamprior.prior import save_prior
from streamprior.records import Frame
from streamprior.seams import Document
from streamprior.sources.pva import PvaMonitor
from streamprior.wire.ntnd import NtndDecoder
from tests.builders import diffraction, small_prior
from tests.test_daemon import Running, daemon, free_port
from tests.test_foreign_producers import Station, station

if not any("test_pva" in argument for argument in sys.argv):
    # pvapy may end a process in which RunEngines and event loops have run (seen with 5.6.0), and every other test with it.
    pytest.skip("it needs a process of its own: pytest tests/test_pva.py", allow_module_level=True)

pva = pytest.importorskip("pvaccess", reason="pvapy, which brings EPICS' pvAccess, is not installed")
ad = pytest.importorskip("pvapy.utility.adImageUtility", reason="pvapy is not installed").AdImageUtility
ad_sim_server = pytest.importorskip("pvapy.cli.adSimServer", reason="pvapy is not installed")

PATIENCE_S = 60
CHANNEL = "13SIM1:Pva1:Image"


@pytest.fixture(scope="module", autouse=True)
def loopback() -> Iterator[None]:
    """pvAccess reads its environment once, when the first server or channel of a process is made."""
    search, server = free_port(), free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EPICS_PVA_ADDR_LIST", "EPICS_PVAS_INTF_ADDR_LIST", "EPICS_PVAS_BEACON_ADDR_LIST"):
            patch.setenv(name, "127.0.0.1")
        for name in ("EPICS_PVA_AUTO_ADDR_LIST", "EPICS_PVAS_AUTO_BEACON_ADDR_LIST"):
            patch.setenv(name, "NO")
        for name in ("EPICS_PVA_BROADCAST_PORT", "EPICS_PVAS_BROADCAST_PORT"):
            patch.setenv(name, str(search))
        patch.setenv("EPICS_PVA_SERVER_PORT", str(server))
        patch.setenv("EPICS_PVAS_SERVER_PORT", str(server))
        yield


def serve(told: Connection, channel: str) -> None:
    """A process that is an IOC: it does what it is told, one thing after another, until it is ended."""
    server: Any = None
    detector: Any = None
    while True:
        do, *things = told.recv()
        if do == "serve":
            server = pva.PvaServer(channel, pva.NtNdArray())
        elif do == "post":
            number, pixels, attributes = things
            update = ad.generateNtNdArray2D(number, pixels)
            listed = [pva.NtAttribute("ColorMode", pva.PvInt(0))]
            update["attribute"] = listed + [pva.NtAttribute(name, pva.PvDouble(value)) for name, value in attributes.items()]
            server.update(update)
        elif do == "post_packed":
            number, shape, dtype, codec, blob = things
            server.update(ad.generateNtNdArray2D(number, np.frombuffer(blob, np.uint8), shape[1], shape[0], dtype, codec))
        elif do == "post_colour":
            server.update(ad.generateNtNdArray(things[0], things[1], colorMode=ad.COLOR_MODE_RGB1))
        elif do == "simulate":
            detector = simulator(*things)
        elif do == "start":
            detector.start()
        told.send(detector and detector.compressorName)


class Ioc:
    """An IOC in a process of its own, as they are; it posts images as areaDetector's plugin does."""

    def __init__(self, does: tuple[Any, ...] = ("serve",)) -> None:
        self.ids = itertools.count(1)
        self.start(does)

    def start(self, does: tuple[Any, ...] = ("serve",)) -> None:
        apart = multiprocessing.get_context("spawn")
        self._told, theirs = apart.Pipe()
        self._process = apart.Process(target=serve, args=(theirs, CHANNEL), daemon=True)
        self._process.start()
        theirs.close()
        self.compressor = self.tell(*does)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def tell(self, *what: Any) -> Any:
        self._told.send(what)
        assert self._told.poll(PATIENCE_S), f"no answer to {what[0]}"
        return self._told.recv()

    def post(self, pixels: np.ndarray, number: int | None = None, **attributes: float) -> None:
        self.tell("post", next(self.ids) if number is None else number, pixels, attributes)

    def post_packed(self, pixels: np.ndarray, codec: str, blob: bytes) -> None:
        self.tell("post_packed", next(self.ids), pixels.shape, pixels.dtype, codec, blob)

    def post_colour(self, pixels: np.ndarray) -> None:
        self.tell("post_colour", next(self.ids), pixels)


@pytest.fixture
def ioc() -> Iterator[Ioc]:
    one = Ioc()
    yield one
    one.stop()


@pytest.fixture
def monitor() -> Iterator[Callable[..., PvaMonitor]]:
    """Makes monitors that have heard what stands in their channel, and closes them."""
    made: list[PvaMonitor] = []

    def make(**more: Any) -> PvaMonitor:
        made.append(PvaMonitor(SourceSettings(kind="pva", pv=CHANNEL, **more)))
        made[-1].open()
        assert received(made[-1], 1)[0][1]["first"]
        return made[-1]

    yield make
    for one in made:
        one.close()


def received(source: PvaMonitor, count: int) -> list[Document]:
    deadline = time.monotonic() + PATIENCE_S
    found = []
    while len(found) < count:
        if (message := source.receive(0.1)) is not None:
            found.append(message)
        assert time.monotonic() < deadline, f"{len(found)} of {count} updates came"
    return found


def decoded(messages: list[Document], one: NtndDecoder | None = None) -> list[Frame]:
    one = one or NtndDecoder("pilatus", CHANNEL, 60.0)
    return [record for message in messages for record in one.decode(message, time.time()) if isinstance(record, Frame)]


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8"])
def test_pixels_of_every_type_arrive_as_they_were_posted(ioc: Ioc, monitor: Callable[..., PvaMonitor], dtype: str) -> None:
    source = monitor()
    frames = np.random.default_rng(1).poisson(5, (3, 5, 7)).astype(dtype)
    for pixels in frames:
        ioc.post(pixels)
    for frame, pixels in zip(decoded(received(source, 3)), frames, strict=True):
        np.testing.assert_array_equal(frame.counts, pixels)
        assert frame.detector_time is not None
        assert abs(frame.detector_time - time.time()) < PATIENCE_S


def test_compressed_pixels_arrive_and_pvapy_reads_them_alike(ioc: Ioc, monitor: Callable[..., PvaMonitor]) -> None:
    source = monitor()
    frames = np.random.default_rng(2).poisson(3, (2, 130, 70)).astype(np.uint16)
    seen: list[np.ndarray] = []
    channel = pva.Channel(CHANNEL)
    ioc.post_packed(frames[0], "bslz4", bitshuffle.compress_lz4(frames[0].ravel(), 0).tobytes())
    seen.append(ad.reshapeNtNdArray(channel.get("field()"))[1])
    ioc.post_packed(frames[1], "lz4", lz4.block.compress(frames[1].tobytes(), store_size=False))
    seen.append(ad.reshapeNtNdArray(channel.get("field()"))[1])
    for frame, theirs, pixels in zip(decoded(received(source, 2)), seen, frames, strict=True):
        np.testing.assert_array_equal(frame.counts, pixels)
        np.testing.assert_array_equal(frame.counts, theirs)


def test_the_newest_waiting_image_makes_way_so_that_every_loss_is_a_gap(ioc: Ioc, monitor: Callable[..., PvaMonitor]) -> None:
    source = monitor(max_message_mb=1)
    pixels = np.zeros((300, 500), np.uint16)
    for _ in range(10):  # three of them fit
        ioc.post(pixels)
    deadline = time.monotonic() + PATIENCE_S
    while source.left_out < 7 and time.monotonic() < deadline:
        time.sleep(0.01)
    frames = decoded(received(source, 3))
    assert [frame.index for frame in frames] == [0, 1, 9]
    assert source.receive(0) is None


def test_a_channel_without_a_name_is_the_operators_to_give() -> None:
    with pytest.raises(ConfigError, match=r"source\.pv"):
        PvaMonitor(SourceSettings(kind="pva"))


def test_without_pvapy_the_operator_is_told_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pvaccess", None)
    with pytest.raises(ConfigError, match=r"streamprior\[epics\]"):
        PvaMonitor(SourceSettings(kind="pva", pv=CHANNEL)).open()


def test_the_check_looks_at_the_source(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    config = Config(prior=tmp_path / "prior.h5", source={"kind": "pva", "pv": CHANNEL})
    finding = next(one for one in inspect(config) if one.what == "source")
    assert finding.fine
    assert CHANNEL in finding.sentence


@pytest.fixture
def beside(ioc: Ioc, tmp_path: Path) -> Iterator[Station]:
    """A daemon that has heard what stands in the channel."""
    with station(tmp_path, source={"kind": "pva", "pv": CHANNEL}, runs={"late_s": 0.2, "idle_s": 1.5}) as one:
        heard(one.running)
        yield one


def heard(running: Running) -> None:
    """It has what stands in the channel, which it may have said before it was ready."""
    if not any(line["event"] == "channel connected" for line in running.log):
        running.until("channel connected")


def test_every_frame_of_an_acquisition_is_archived_and_a_restart_is_another_run(beside: Station, ioc: Ioc) -> None:
    first, second = diffraction(count=20), diffraction(count=12, seed=1)
    for pixels in first:
        ioc.post(pixels)
    for number, pixels in enumerate(second, 1):
        ioc.post(pixels, number)
    runs = beside.runs(2)
    beside.check(runs[0], first)
    beside.check(runs[1], second)
    assert [run.account["reason"] for run in runs] == ["new_series", "idle"]
    assert runs[1].account["series"].startswith(CHANNEL)
    assert runs[0].archived.about["metadata"]["pv"] == CHANNEL


def test_ids_that_never_came_are_missing_frames_of_the_run(beside: Station, ioc: Ioc) -> None:
    for number in (5, 6, 9, 12):
        ioc.post(diffraction()[0], number)
    (run,) = beside.runs()
    assert (run.account["received"], run.account["published"], run.account["missing"]) == (4, 4, 4)


def test_colour_and_unknown_codecs_are_quarantined_and_the_run_goes_on(beside: Station, ioc: Ioc) -> None:
    frames = diffraction(count=4)
    ioc.post(frames[0])
    ioc.post_colour(np.zeros((32, 32, 3), np.uint8))
    ioc.post_packed(frames[1], "jpeg", b"\xff\xd8" * 40)
    ioc.post(frames[2])
    (run,) = beside.runs()
    assert run.account["quarantined"] == {"bad_compression": 1, "wrong_shape": 1}
    assert (run.account["published"], run.account["missing"]) == (2, 2)


def test_a_server_that_goes_and_comes_back_is_heard_again(beside: Station, ioc: Ioc) -> None:
    frames = diffraction(count=6)
    for pixels in frames[:3]:
        ioc.post(pixels)
    beside.running.until("run opened")
    ioc.stop()
    beside.running.until("channel lost")
    ioc.start()
    beside.running.until("channel connected")
    for number, pixels in enumerate(frames[3:], 1):
        ioc.post(pixels, number)
    runs = beside.runs(2)
    beside.check(runs[0], frames[:3])
    beside.check(runs[1], frames[3:])


def test_positions_among_the_attributes_are_the_frames(tmp_path: Path, ioc: Ioc) -> None:
    positions = {"x": "SamX", "y": "SamY", "unit": "um"}
    with station(tmp_path, source={"kind": "pva", "pv": CHANNEL}, runs={"idle_s": 1.5}, positions=positions) as one:
        heard(one.running)
        for number, pixels in enumerate(diffraction(count=5)):
            ioc.post(pixels, SamX=float(number), SamY=-2.0 * number)
        (run,) = one.runs()
    np.testing.assert_allclose(run.positions, [(number * 1e-6, -2e-6 * number) for number in range(5)])


def simulator(file: Path, chunks: bool) -> Any:
    """pvapy-ad-sim-server, which begins when it is told to; it has its channel from now on."""
    images = {"inputDirectory": None, "inputFile": str(file), "mmapMode": False, "hdfDataset": "data", "hdfCompressionMode": chunks}
    images |= {"cfgFile": None, "nFrames": 0, "cacheSize": 1, "nx": 0, "ny": 0, "colorMode": 0, "datatype": "uint16"}
    images |= {"minimum": None, "maximum": None}
    pace = {"frameRate": 200, "runtime": PATIENCE_S, "startDelay": 0, "shutdownDelay": 0, "reportPeriod": 0, "disableCurses": True}
    return ad_sim_server.AdSimServer(channelName=CHANNEL, notifyPv=None, notifyPvValue=None, metadataPv=None, **images, **pace)


@pytest.mark.parametrize("codec", ["plain", "bslz4", "lz4"])
def test_the_simulator_that_comes_with_pvapy_fills_a_run(tmp_path: Path, codec: str) -> None:
    """Of a file that is compressed it sends the chunks as they are, header and all."""
    frames = diffraction(count=30)
    filters: Any = {"plain": {}, "bslz4": hdf5plugin.Bitshuffle(cname="lz4"), "lz4": hdf5plugin.LZ4()}[codec]
    with h5py.File(tmp_path / "frames.h5", "w") as file:
        file.create_dataset("data", data=frames, chunks=(1, *frames.shape[1:]), **filters)
    detector = Ioc(("simulate", tmp_path / "frames.h5", codec != "plain"))
    try:
        assert detector.compressor == (None if codec == "plain" else codec)
        with station(tmp_path, source={"kind": "pva", "pv": CHANNEL}, runs={"idle_s": 1.5}) as one:
            heard(one.running)
            detector.tell("start")
            (run,) = one.runs()
            one.check(run, frames)
    finally:
        detector.stop()


def test_a_daemon_leaves_at_once_while_images_pour_in(tmp_path: Path, ioc: Ioc) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    settings = {"source": {"kind": "pva", "pv": CHANNEL}, "refine": {"enabled": False}}
    with daemon(tmp_path, **settings) as running:
        heard(running)
        pixels = diffraction()[0]
        for _ in range(300):
            ioc.post(pixels)
        running.process.terminate()
        while running.process.poll() is None:
            ioc.post(pixels)
            time.sleep(0.001)
        code, printed = running.leave()
    assert code == 0, printed
