"""Code that is not ours -> the daemon, as a process, on real sockets: every frame accounted for, class maps equal those made offline.

The producers are libertem-dectris' detector, Bluesky's RunEngine, Publisher and proxy, ophyd's and ophyd-async's devices, and recordings of
real detectors and scans. What the daemon archives is compared, bit for bit, with what the composed stages make of the producer's frames.
"""

from __future__ import annotations

import json
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cbor2
import h5py
import numpy as np
import pytest
import zmq
from bluesky import RunEngine
from bluesky import plans as bp
from bluesky.callbacks.zmq import Publisher
from ophyd.sim import SynAxis, SynSignal, SynSignalWithRegistry
from prometheus_client.parser import text_string_to_metric_families
from streamprior_sim.twin import Twin

from streamprior.config import DriftSettings, PrepareSettings, RefineSettings
from streamprior.crew import think
from streamprior.prior import save_prior
from streamprior.records import Detector, Flag, Result, RunStarted
from streamprior.sinks.archive import ArchivedRun, read_about, read_run, run_folders
from streamprior.stages.recipe import Recipe
from streamprior.wire.dectris_v1 import encode_end, encode_image, encode_start
from tests.builders import diffraction, make_frame, small_prior
from tests.test_attacks import accounts, quarantined
from tests.test_bluesky_device import engine as engine
from tests.test_daemon import START_S, Running, daemon
from tests.test_documents_0mq import Proxy, publisher_options
from tests.test_documents_0mq import proxy as proxy
from tests.test_twin_ophyd import Beamline, Make, fly
from tests.test_twin_ophyd import beamline as beamline
from tests.test_twin_ophyd import twin as twin
from tests.test_v2_foreign import pixels
from tests.test_v2_foreign import unpack as unpack

PATIENCE_S = 60
V2_FOLDERS = ("bslz4_16bit", "bslz4_32bit", "lz4_8bit")
DOCUMENT_REFUSALS = {
    "internal_events": None,  # numbers alone: no frames, so no run of ours
    "external_assets": {"bad_document": 1, "outside_folder": 3},  # a second image, of which it is told once
    "external_assets_legacy": {"outside_folder": 3},
    "external_assets_single_key": {"outside_folder": 8},
}
"""Recorded scans whose files are of another machine -> what of them is refused."""


class Run(NamedTuple):
    """A run that is over: its account in the ledger and what is in the archive."""

    account: Mapping[str, Any]
    archived: ArchivedRun

    @property
    def counts(self) -> tuple[int, int]:
        return self.account["received"], self.account["published"]

    @property
    def positions(self) -> np.ndarray:
        """(N, 2) metres, x then y, by frame."""
        return np.array([self.archived.frames[f"position_{axis}"].to_numpy() for axis in "xy"]).T


def thought(recipe: Recipe, frames: np.ndarray, detector: Detector | None = None) -> list[Result]:
    """What the composed stages make of frames, a few at a time."""
    stages = recipe.stages()
    run = RunStarted("offline", "", "", 0.0, None, detector or Detector(shape=frames.shape[1:]))
    batches = [range(first, min(first + 8, len(frames))) for first in range(0, len(frames), 8)]
    return [one for batch in batches for one in think(stages, recipe.prior, run, [make_frame(frames[i], i) for i in batch])]


@dataclass
class Station:
    """A daemon whose runs are asked for one after another, and the recipe that it follows."""

    running: Running
    recipe: Recipe
    seen: set[str] = field(default_factory=set)

    def runs(self, count: int = 1) -> list[Run]:
        """The next `count` runs that are over, oldest first; every one balanced, and no other one closed or open."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            new = [one for one in reversed(accounts(self.running)) if one["run"] not in self.seen]
            if len(new) >= count and all(one["closed"] is not None for one in new):
                break
            time.sleep(0.05)
        assert len(new) == count, accounts(self.running)
        assert all(one["balanced"] and one["closed"] is not None and one["residue"] == 0 for one in new)
        self.seen |= {one["run"] for one in new}
        folders = {read_about(folder)["uid"]: folder for folder in run_folders(self.running.folder / "archive")}
        return [Run(one, read_run(folders[one["run"]])) for one in new]

    def check(self, run: Run, frames: np.ndarray, detector: Detector | None = None) -> None:
        """The run holds these frames, each once, as the composed stages make them."""
        assert run.counts == (len(frames), len(frames))
        assert (run.account["dropped"], run.account["quarantined"], run.account["missing"]) == ({}, {}, 0)
        assert run.archived.about["status"] == "complete"
        assert run.archived.frames["index"].to_pylist() == list(range(len(frames)))
        offline = thought(self.recipe, frames, detector)
        apart = {one.classes.tobytes() + one.object.tobytes() for one in offline}
        assert len(apart) == len(frames), "frames that neither class map nor object tells apart prove nothing"
        np.testing.assert_array_equal(run.archived.classes, [one.classes for one in offline])
        np.testing.assert_array_equal(run.archived.objects, [one.object for one in offline])


@contextmanager
def station(
    folder: Path, shape: tuple[int, int] = (32, 32), prepare: Mapping[str, Any] | None = None, **settings: Any
) -> Iterator[Station]:
    """A daemon with a prior for frames of `shape`; it leaves with every frame accounted for."""
    prior = small_prior(shape)
    save_prior(prior, folder / "prior.h5")
    # Objects of large frames take seconds each, and class maps are compared anyway.
    refine = {"iterations": 5} if shape == (32, 32) else {"enabled": False}
    told = {key: str(value) for key, value in (prepare or {}).items()}
    with daemon(folder, refine=refine, prepare=told, **settings) as running:
        yield Station(running, Recipe(prior, PrepareSettings(**(prepare or {})), RefineSettings(**refine), DriftSettings()))
        code, printed = running.leave()
        assert code == 0, printed


def until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# --- DECTRIS stream V1 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    """A daemon that connects to a detector. Each pixel has a dark of its own: frames whose pixels are all alike, as those of
    libertem-dectris' mock are, then still differ in their class maps."""
    folder = tmp_path_factory.mktemp("v1")
    np.save(folder / "dark.npy", np.random.default_rng(0).uniform(0, 100, (512, 512)).astype(np.float32))
    with station(folder, (512, 512), {"dark": folder / "dark.npy"}, source={"kind": "dectris_v1", "attach": "connect"}) as one:
        yield one


def told_of(simulator: Any) -> Detector:
    """What libertem-dectris' configuration says of its detector."""
    config = json.loads(simulator.get_detector_config_raw())
    shape = config["y_pixels_in_detector"], config["x_pixels_in_detector"]
    return Detector(shape, saturation=config.get("countrate_correction_count_cutoff"))


def acquire(station: Station, count: int, log: Path | None = None) -> tuple[Run, Detector]:
    """A series of libertem-dectris' detector, mocked or as a log has it, from the address that the daemon is connected to."""
    libertem_dectris = pytest.importorskip("libertem_dectris", reason="libertem-dectris is not installed (no wheel for this machine?)")
    address = f"tcp://127.0.0.1:{station.running.port}"
    kind = libertem_dectris.DectrisSim
    simulator = kind.new_mocked(address, count) if log is None else kind(address, str(log))
    simulator.send_headers()
    simulator.send_frames()
    simulator.send_footer()
    (run,) = station.runs()
    return run, told_of(simulator)


def mocked(count: int) -> np.ndarray:
    """The mock's pixels are the number of their frame."""
    return np.broadcast_to(np.arange(count, dtype=np.uint16)[:, None, None], (count, 512, 512))


def test_a_series_of_libertems_mock_detector(v1: Station) -> None:
    run, detector = acquire(v1, 100)
    assert (run.account["series"], run.account["expected"], run.account["reason"]) == ("34", 100, "end")
    assert run.archived.about["metadata"]["detector_description"] == "Dectris QUADRO Si 250K"
    v1.check(run, mocked(100), detector)


def test_a_log_that_libertems_replayer_sends(v1: Station, tmp_path: Path) -> None:
    frames = diffraction((512, 512), 6, photons=1e8)
    messages = [
        encode_start(5, Detector(frames.shape[1:]), len(frames), frames.dtype, {}, "basic"),
        *(encode_image(5, index, counts, 0.01 * index) for index, counts in enumerate(frames)),
        encode_end(5),
    ]
    log = tmp_path / "zmqlog"
    log.write_bytes(b"".join(struct.pack("<q", len(part)) + part for message in messages for part in message))
    run, detector = acquire(v1, len(frames), log)
    v1.check(run, frames, detector)


@pytest.mark.parametrize("framing", ["multipart", "part by part"])
def test_a_recorded_series_with_cut_blobs_is_refused_frame_by_frame_and_the_one_behind_it_is_whole(
    v1: Station, data_folder: Path, framing: str
) -> None:
    with (data_folder / "wire/dectris_v1/eiger2_9m_header_detail_all.cbors").open("rb") as file:
        messages = [tuple(cbor2.load(file)) for _ in range(5)]
    if framing == "part by part":
        messages = [(part,) for message in messages for part in message]
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.SNDTIMEO, 1000 * PATIENCE_S)
        push.bind(f"tcp://127.0.0.1:{v1.running.port}")
        for message in messages:
            push.send_multipart(message)
        (run,) = v1.runs()
    assert (run.account["series"], run.account["expected"], run.account["missing"]) == ("6", 3, 3)
    assert run.account["quarantined"] == {"wrong_hash": 3, "wrong_shape": 1}, "three images, and the tables of the header once"
    assert run.counts == (4, 0)
    assert len(run.archived.classes) == 0
    assert run.archived.about["metadata"]["detector_description"] == "Dectris EIGER2 CdTe 9M"
    run, detector = acquire(v1, 10)
    v1.check(run, mocked(10), detector)


# --- DECTRIS stream V2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def v2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Station]:
    with station(tmp_path_factory.mktemp("v2"), (514, 1030)) as one:
        yield one


def test_recorded_images_of_every_compression_become_runs_without_a_start(
    v2: Station, data_folder: Path, unpack: Callable[..., bytes]
) -> None:
    for folder in V2_FOLDERS:
        messages = [file.read_bytes() for file in sorted((data_folder / "wire/dectris_v2" / folder).glob("*.cbor"))]
        with v2.running.sender() as push:
            for message in messages:
                push.send(message)
            (run,) = v2.runs()
        *images, end = [cbor2.loads(message) for message in messages]
        assert (run.account["series"], run.account["reason"]) == (end["series_unique_id"], "end")
        v2.check(run, np.array([pixels(image["data"]["threshold_1"], unpack) for image in images]))


def test_a_recorded_start_and_end_without_images_leave_an_empty_run(v2: Station, data_folder: Path) -> None:
    with v2.running.sender() as push:
        for name in ("start", "end"):
            push.send((data_folder / f"wire/dectris_v2/eiger2_16m/{name}.cbor").read_bytes())
        (run,) = v2.runs()
    assert run.counts == (0, 0)
    assert (run.account["expected"], run.account["missing"], run.account["reason"]) == (1, 1, "end")
    assert (run.archived.about["status"], len(run.archived.classes), run.archived.frames.num_rows) == ("complete", 0, 0)


# --- Bluesky documents from a file -------------------------------------------------------------------------------------------------


def recording(data_folder: Path, name: str) -> Path:
    return data_folder / "wire/bluesky_documents" / f"{name}.json"


def from_file(folder: Path, path: Path, **documents: Any) -> tuple[str, list[ArchivedRun]]:
    """What a daemon prints and archives of a file of documents, with which it ends."""
    save_prior(small_prior((13, 17)), folder / "prior.h5")
    source = {"kind": "documents", "path": str(path)}
    running = Running(folder, {"source": source, "documents": documents, "refine": {"enabled": False}})
    printed, log = running.process.communicate(timeout=START_S)
    assert running.process.returncode == 0, log
    return printed, [read_run(one) for one in run_folders(folder / "archive")]


@pytest.mark.parametrize("name", DOCUMENT_REFUSALS)
def test_a_file_of_recorded_documents_whose_frames_are_elsewhere_is_refused_frame_by_frame(
    name: str, data_folder: Path, tmp_path: Path
) -> None:
    printed, runs = from_file(tmp_path, recording(data_folder, name))
    refusals = DOCUMENT_REFUSALS[name]
    assert [len(run.classes) for run in runs] == ([] if refusals is None else [0])
    if refusals is not None:
        told = ", ".join(f"{reason} {count}" for reason, count in refusals.items())
        total = sum(refusals.values())
        assert f"{total} received = 0 published + 0 dropped + {total} ({told}) quarantined + 0 in flight" in printed
    assert "NOT BALANCED" not in printed


def test_a_file_of_recorded_documents_whose_frames_are_here_is_processed_whole(data_folder: Path, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 100, (8, 13, 17)).astype(np.uint16)
    for part, rows in (("dataset", slice(3)), ("dataset_part2", slice(3, 8))):
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["entry/data/data_2"] = frames[rows]
    path = recording(data_folder, "external_assets_single_key")
    printed, (run,) = from_file(tmp_path, path, folders=[str(tmp_path)], moved={"/{{ root_path }}": str(tmp_path)})
    assert "8 received = 8 published + 0 dropped + 0 quarantined + 0 in flight" in printed
    recipe = Recipe(small_prior((13, 17)), PrepareSettings(), RefineSettings(enabled=False), DriftSettings())
    offline = thought(recipe, frames)
    np.testing.assert_array_equal(run.classes, [one.classes for one in offline])


# --- Bluesky documents over 0MQ ----------------------------------------------------------------------------------------------------


class Broadcast:
    """Bluesky's own Publisher, and the daemon that hears it. Nobody tells a publisher whether it is heard, or how far."""

    def __init__(self, station: Station, publisher: Publisher) -> None:
        self.station, self.publish = station, publisher

    def begin(self) -> None:
        """Returns once the daemon hears what is published: it refuses the end of a scan of which it knows nothing."""
        before = self._refused("bad_document")
        for _ in range(PATIENCE_S):
            self.publish("stop", {"uid": "probe", "run_start": "nobody's", "time": 0.0, "exit_status": "success"})
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                if self._refused("bad_document") > before:
                    return
                time.sleep(0.02)
        raise AssertionError("the daemon hears nothing of what is published")

    def flush(self) -> None:
        """Returns once the daemon has read all that was published: it refuses the last document for its size."""
        before = self._refused("too_large")
        self.publish("stop", {"uid": "mark", "run_start": "x" * (2 * 2**20), "time": 0.0, "exit_status": "success"})
        until(lambda: self._refused("too_large") > before, "the daemon has not read what was published")

    def _refused(self, reason: str) -> float:
        return quarantined(self.station.running).get(reason, 0)


@contextmanager
def broadcasting(station: Station, proxy: Proxy, serializer: Any) -> Iterator[Broadcast]:
    publisher = Publisher(proxy.into, prefix=b"beam1", **publisher_options(serializer))
    try:
        broadcast = Broadcast(station, publisher)
        broadcast.begin()
        yield broadcast
    finally:
        publisher.close()


@contextmanager
def listening(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy, serializer: str) -> Iterator[Station]:
    folder = tmp_path_factory.mktemp(serializer)
    (folder / "frames").mkdir()
    with station(
        folder,
        source={"kind": "documents", "address": proxy.out, "attach": "connect", "max_message_mb": 1},
        documents={"prefix": "beam1", "serializer": serializer, "folders": [str(folder / "frames")]},
        positions={"x": "x", "y": "y", "wait_s": 2.0},
    ) as one:
        yield one


@pytest.fixture(scope="module")
def by_msgpack(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> Iterator[Station]:
    with listening(tmp_path_factory, proxy, "msgpack") as one:
        yield one


@pytest.fixture(scope="module")
def by_pickle(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> Iterator[Station]:
    with listening(tmp_path_factory, proxy, "pickle") as one:
        yield one


@pytest.mark.parametrize("name", DOCUMENT_REFUSALS)
def test_recorded_documents_that_are_published_are_refused_as_those_of_a_file(
    name: str, by_msgpack: Station, proxy: Proxy, data_folder: Path
) -> None:
    with broadcasting(by_msgpack, proxy, "msgpack") as broadcast:
        before = Counter(quarantined(by_msgpack.running))
        for item in json.loads(recording(data_folder, name).read_text()):
            broadcast.publish(item["name"], item["doc"])
        refusals = DOCUMENT_REFUSALS[name]
        if refusals is not None:
            (run,) = by_msgpack.runs()
            assert (run.account["quarantined"], run.counts) == (refusals, (sum(refusals.values()), 0))
        broadcast.flush()
        assert Counter(quarantined(by_msgpack.running)) - before == Counter({**(refusals or {}), "too_large": 1})
        by_msgpack.runs(0)


def stood(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """Where the motors of a scan were, in metres; they tell it in millimetres."""
    return [(event["data"]["x"] * 1e-3, event["data"]["y"] * 1e-3) for event in events]


@pytest.mark.parametrize("serializer", ["msgpack", "pickle"])
def test_a_run_engines_scan_with_pixels_in_its_events(
    serializer: str, request: pytest.FixtureRequest, proxy: Proxy, engine: RunEngine
) -> None:
    one: Station = request.getfixturevalue(f"by_{serializer}")
    frames = diffraction(count=12, seed=3)
    taken = iter([frames[0], *frames])  # ophyd's signal has a value before the first trigger
    image, x, y = SynSignal(func=lambda: next(taken), name="image"), SynAxis(name="x"), SynAxis(name="y")
    documents: list[tuple[str, Any]] = []
    with broadcasting(one, proxy, serializer) as broadcast:
        plan = bp.grid_scan([image], y, -1, 1, 3, x, 0, 0.3, 4)
        uid = engine(plan, [broadcast.publish, lambda *document: documents.append(document)]).run_start_uids[0]
        (run,) = one.runs()
    events = [document for name, document in documents if name == "event"]
    assert (run.account["series"], run.account["expected"], run.account["reason"]) == (uid, 12, "end")
    assert run.archived.about["metadata"]["start"]["plan_name"] == "grid_scan"
    one.check(run, frames)
    np.testing.assert_array_equal(run.positions, stood(events))
    np.testing.assert_array_equal(run.archived.frames["detector_time"], [event["timestamps"]["image"] for event in events])


@pytest.mark.parametrize("serializer", ["msgpack", "pickle"])
def test_a_run_engines_scan_with_a_file_for_each_frame(
    serializer: str, request: pytest.FixtureRequest, proxy: Proxy, engine: RunEngine
) -> None:
    """Old ophyd's way: resource and datum documents."""
    one: Station = request.getfixturevalue(f"by_{serializer}")
    frames = diffraction(count=6, seed=5)
    taken = iter([frames[0], *frames])
    camera = SynSignalWithRegistry(func=lambda: next(taken), name="camera", save_path=str(one.running.folder / "frames"))
    with broadcasting(one, proxy, serializer) as broadcast:
        uid = engine(bp.scan([camera], SynAxis(name="x"), 0, 1, num=6), broadcast.publish).run_start_uids[0]
        (run,) = one.runs()
    assert run.account["series"] == uid
    one.check(run, frames)


@pytest.mark.parametrize("serializer", ["msgpack", "pickle"])
def test_grid_scans_in_a_row_of_an_ophyd_async_detector_are_read_from_its_files(
    serializer: str, request: pytest.FixtureRequest, proxy: Proxy, beamline: Make
) -> None:
    one: Station = request.getfixturevalue(f"by_{serializer}")
    line = beamline(one.running.folder / "frames")
    scans = []
    with broadcasting(one, proxy, serializer) as broadcast:
        for _ in range(3):
            line.documents.clear()
            line.engine(line.grid(), broadcast.publish)
            scans.append((line.of("start")[0]["uid"], line.frames(), stood(line.of("event"))))
        runs = one.runs(3)
    for run, (uid, frames, places) in zip(runs, scans, strict=True):
        assert (run.account["series"], run.account["expected"], run.account["reason"]) == (uid, 9, "end")
        one.check(run, frames)
        np.testing.assert_array_equal(run.positions, places)
        assert not any(run.archived.frames["flags"].to_numpy() & Flag.NO_POSITION)


def test_a_fly_scan_without_motors_is_read_from_its_file(by_msgpack: Station, proxy: Proxy, beamline: Make) -> None:
    line = beamline(by_msgpack.running.folder / "frames", moves=False)
    with broadcasting(by_msgpack, proxy, "msgpack") as broadcast:
        line.engine(fly(line.detector, 40), broadcast.publish)
        (run,) = by_msgpack.runs()
    by_msgpack.check(run, line.frames())
    assert np.isnan(run.positions).all()
    assert all(run.archived.frames["flags"].to_numpy() & Flag.NO_POSITION)


# --- frames over V2, positions over documents --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_wires(tmp_path_factory: pytest.TempPathFactory, proxy: Proxy) -> Iterator[Station]:
    with station(
        tmp_path_factory.mktemp("two"),
        source={"max_message_mb": 1},
        documents={"prefix": "beam1"},
        positions={"x": "x", "y": "y", "address": proxy.out, "wait_s": 10},
    ) as one:
        yield one


def waiting(running: Running) -> float:
    """Bytes of frames that wait for their positions."""
    families = text_string_to_metric_families(running.get("/metrics"))
    (family,) = [one for one in families if one.name == "streamprior_queue_bytes"]
    (value,) = [sample.value for sample in family.samples if sample.labels["queue"] == "positions"]
    return float(value)


def scanned(order: str, line: Beamline, broadcast: Broadcast, frames: zmq.Socket[bytes]) -> None:
    """A grid scan. "documents first": all of them are read before the first frame is sent; "frames first": the other way round."""
    running = broadcast.station.running
    if order == "frames first":
        line.engine(line.grid())
        until(lambda: waiting(running) >= 9 * 32 * 32 * 2, "the frames do not wait for their positions")
        for name, document in line.documents:
            broadcast.publish(name, document)
        return
    line.engine(line.grid(), broadcast.publish)
    if order == "documents first":
        broadcast.flush()
        with running.sender() as push:
            for _ in range(11):  # start, 9 images, end
                push.send(frames.recv())


@pytest.mark.parametrize("order", ["as they come", "documents first", "frames first"])
def test_frames_over_v2_meet_the_positions_of_their_scan(order: str, two_wires: Station, proxy: Proxy, beamline: Make, twin: Twin) -> None:
    with broadcasting(two_wires, proxy, "msgpack") as broadcast, zmq.Context() as context, context.socket(zmq.PULL) as frames:
        frames.setsockopt(zmq.RCVTIMEO, 1000 * PATIENCE_S)
        held = frames.bind_to_random_port("tcp://127.0.0.1")
        line = beamline(None, f"tcp://127.0.0.1:{held if order == 'documents first' else two_wires.running.port}")
        scanned(order, line, broadcast, frames)
        (run,) = two_wires.runs()
    two_wires.check(run, line.expected(9), twin.detector())
    np.testing.assert_array_equal(run.positions, stood(line.of("event")))
    assert not any(run.archived.frames["flags"].to_numpy() & Flag.NO_POSITION)
    assert run.archived.about["metadata"]["start"]["uid"] == line.of("start")[0]["uid"]
