"""Bluesky documents become the frames and readings that their writers meant, whatever order, form or file they come in."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.config import DocumentsSettings, PositionSettings, SourceSettings
from streamprior.errors import ConfigError, WireError
from streamprior.records import Exposures, Frame, Reading, SeriesEnd, SeriesStart
from streamprior.sources import documents as module
from streamprior.sources.document_feeds import DocumentFile, Subscription
from streamprior.sources.documents import DocumentsDecoder

RECORDINGS = ("internal_events", "external_assets", "external_assets_legacy", "external_assets_single_key")
SHAPE = (12, 10)


def decoder(positions: Mapping[str, Any] | None = None, pixels: bool = True, most: int = 10**8, **more: Any) -> DocumentsDecoder:
    return DocumentsDecoder("beamline", DocumentsSettings(**more), PositionSettings(**(positions or {})), pixels, most)


def told(of: DocumentsDecoder, documents: Any, received: float = 100.0) -> list[Any]:
    """The records of documents; a refused one is its WireError."""
    records: list[Any] = []
    for document in documents:
        try:
            records += of.decode(document, received)
        except WireError as error:
            records.append(error)
    return records


def of_kind(records: list[Any], kind: type) -> list[Any]:
    return [one for one in records if isinstance(one, kind)]


def reasons(records: list[Any]) -> list[str]:
    return [one.reason for one in of_kind(records, WireError)]


def pixels(count: int = 6, shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(2).poisson(4, (count, *shape)).astype(np.uint16)


def start(uid: str = "run", **more: Any) -> tuple[str, dict]:
    return "start", {"uid": uid, "time": 1.0, "scan_id": 1, "plan_name": "scan", **more}


def stop(uid: str = "run") -> tuple[str, dict]:
    return "stop", {"uid": f"stop-{uid}", "run_start": uid, "time": 9.0, "exit_status": "success"}


def descriptor(keys: Mapping[str, Any], uid: str = "run", name: str = "primary") -> tuple[str, dict]:
    made = {key: told if isinstance(told, dict) else {"shape": told, "dtype": "array", "source": "x"} for key, told in keys.items()}
    return "descriptor", {"uid": f"{uid}-{name}", "run_start": uid, "name": name, "time": 2.0, "data_keys": made}


def event(number: int, data: Mapping[str, Any], uid: str = "run", name: str = "primary", **stamps: float) -> tuple[str, dict]:
    times = {key: stamps.get(key, 50.0 + number) for key in data}
    return "event", {
        "uid": f"e{number}",
        "descriptor": f"{uid}-{name}",
        "seq_num": number,
        "time": 60.0 + number,
        "data": dict(data),
        "timestamps": times,
        "filled": {},
    }


def inline(frames: np.ndarray, uid: str = "run", **more: Any) -> Iterator[tuple[str, dict]]:
    yield start(uid, **more)
    yield descriptor({"det": list(frames.shape[1:])}, uid)
    for i, counts in enumerate(frames):
        yield event(i + 1, {"det": counts}, uid)
    yield stop(uid)


def streamed(path: Path, count: int, uid: str = "run", each: int = 2, per_event: int = 1, **parameters: Any) -> Iterator[tuple[str, dict]]:
    """What ophyd-async writes: a stream_resource and stream_datums of `each` events."""
    yield start(uid)
    yield descriptor({"det": {"shape": [per_event, *SHAPE], "dtype": "array", "external": "STREAM:", "source": "x"}}, uid)
    resource = {"dataset": "d", "chunk_shape": (1, *SHAPE), **parameters}
    yield (
        "stream_resource",
        {
            "uid": f"{uid}-r",
            "run_start": uid,
            "data_key": "det",
            "mimetype": "application/x-hdf5",
            "uri": f"file://localhost{path}",
            "parameters": resource,
        },
    )
    for i in range(0, count // per_event, each):
        yield stream_datum(i, i + each, uid)
    yield stop(uid)


def stream_datum(first: int, last: int, uid: str = "run", resource: str | None = None, seq: int | None = None) -> tuple[str, dict]:
    seq = first + 1 if seq is None else seq
    ranges = {"indices": {"start": first, "stop": last}, "seq_nums": {"start": seq, "stop": seq + last - first}}
    return "stream_datum", {"uid": f"{uid}/{first}", "stream_resource": resource or f"{uid}-r", "descriptor": f"{uid}-primary", **ranges}


def file_of(path: Path, frames: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset("d", data=frames, chunks=(1, *frames.shape[1:]))
    return path


def recorded(folder: Path, name: str) -> DocumentFile:
    source = DocumentFile(SourceSettings(kind="documents", path=folder / "wire" / "bluesky_documents" / f"{name}.json"))
    source.open()
    return source


def everything(source: DocumentFile) -> list[tuple[str, Any]]:
    found = []
    while not source.exhausted:
        document = source.receive(0)
        if document is not None:
            found.append(document)
    source.close()
    return found


# Recordings


@pytest.mark.parametrize(
    ("name", "refusals"),
    [
        ("internal_events", []),
        ("external_assets", ["bad_document", *["outside_folder"] * 3]),
        ("external_assets_legacy", ["outside_folder"] * 3),
        ("external_assets_single_key", ["outside_folder"] * 8),
    ],
)
def test_a_recording_whose_files_are_of_another_machine_is_refused_frame_by_frame(
    data_folder: Path, name: str, refusals: list[str]
) -> None:
    of = decoder()
    records = told(of, everything(recorded(data_folder, name))) + list(of.due(math.inf))
    assert sorted(reasons(records)) == sorted(refusals)
    # A run without frames is no run of ours: no start, no end.
    assert [type(one) for one in records if isinstance(one, SeriesStart | SeriesEnd)] == ([SeriesStart, SeriesEnd] if refusals else [])


@pytest.mark.parametrize("name", RECORDINGS[1:])
def test_a_recording_whose_files_are_here_gives_their_pixels(data_folder: Path, name: str, tmp_path: Path) -> None:
    frames = np.random.default_rng(0).integers(0, 100, (8, 13, 17))
    count = 8 if name == "external_assets_single_key" else 3
    for part, rows in (("dataset", slice(3)), ("dataset_part2", slice(3, 8))):
        with h5py.File(tmp_path / f"{part}.h5", "w") as file:
            file["entry/data/data_2"] = frames[rows, None] if name == "external_assets" else frames[rows]
    documents = everything(recorded(data_folder, name))
    root = "{{ root_path }}" if name == "external_assets_legacy" else "/{{ root_path }}"
    of = decoder(folders=(tmp_path,), moved={root: tmp_path}, image="det-key2")
    records = told(of, documents)
    assert reasons(records) == []
    found = of_kind(records, Frame)
    assert [frame.index for frame in found] == list(range(count))
    np.testing.assert_array_equal([frame.counts for frame in found], frames[:count])
    assert isinstance(records[-1], SeriesEnd)


def test_several_images_in_a_run_are_named_once_with_the_setting(data_folder: Path) -> None:
    records = told(decoder(), everything(recorded(data_folder, "external_assets")))
    (error,) = [one for one in of_kind(records, WireError) if one.reason == "bad_document"]
    assert "det-key2" in error.detail
    assert "det-key3" in error.detail
    assert "documents.image" in error.detail


# A RunEngine in this process


def listened(plan: Any, **subscribed: Any) -> list[tuple[str, Any]]:
    """What a Subscription receives of a plan that runs in a thread beside it."""
    from bluesky import RunEngine

    source = Subscription("engine", **subscribed)
    engine = RunEngine({}, context_managers=[])
    engine.subscribe(source)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(engine, plan)
        future.add_done_callback(lambda done: source.close())
        found = []
        while not source.exhausted:
            document = source.receive(10)
            if document is not None:
                found.append(document)
        future.result()
    engine.loop.call_soon_threadsafe(engine.loop.stop)
    engine._th.join()  # its loop outlives it, and nobody else closes that
    engine.loop.close()
    return found


def test_a_scan_of_simulated_motors_and_a_camera_with_files(tmp_path: Path) -> None:
    from bluesky import plans
    from ophyd.sim import SynSignalWithRegistry, motor1, motor2

    frames = pixels(4)
    taken = iter([frames[0], *frames])
    camera = SynSignalWithRegistry(func=lambda: next(taken), name="cam", save_path=str(tmp_path))
    documents = listened(plans.scan([camera], motor1, -1, 2, motor2, 0, 3, num=4))
    of = decoder({"x": "motor1", "y": "motor2"}, folders=(tmp_path,))
    records = told(of, documents)
    assert reasons(records) == []
    assert isinstance(records[0], SeriesStart)
    assert isinstance(records[-1], SeriesEnd)
    assert records[0].expected == 4
    assert records[0].metadata["start"]["plan_name"] == "scan"
    json.dumps(records[0].metadata)
    found = of_kind(records, Frame)
    np.testing.assert_array_equal([frame.counts for frame in found], frames)
    np.testing.assert_allclose([frame.position for frame in found], [(-1e-3, 0), (0, 1e-3), (1e-3, 2e-3), (2e-3, 3e-3)])
    assert [reading.position for reading in of_kind(records, Reading)] == [frame.position for frame in found]
    assert [reading.number for reading in of_kind(records, Reading)] == [0, 1, 2, 3]
    dates = [doc["timestamps"]["cam"] for name, doc in documents if name == "event"]
    assert [frame.detector_time for frame in found] == dates


def flying(folder: Path, frames: np.ndarray) -> Any:
    """An ophyd-async detector that writes SWMR HDF5, a frame each time it is asked how many there are."""
    from ophyd_async import core

    written, set_written = core.soft_signal_r_and_setter(int)
    held: dict[str, Any] = {}

    class Trigger(core.DetectorTriggerLogic):
        def get_deadtime(self, config_values: Any) -> float:
            return 1e-4

        async def prepare_internal(self, num: int, livetime: float, deadtime: float) -> None: ...

        async def default_trigger_info(self) -> Any:
            return core.TriggerInfo(number_of_events=1)

    class Acquire(core.DetectorAcquireLogic):
        async def start_acquiring(self) -> None:
            held["task"] = asyncio.create_task(self.take())

        async def take(self) -> None:
            for i, counts in enumerate(frames):
                held["data"].resize(i + 1, 0)
                held["data"][i] = counts
                held["data"].flush()
                set_written(i + 1)
                await asyncio.sleep(0.002)

        async def wait_for_idle(self) -> None:
            await held["task"]

        async def ensure_stopped(self) -> None: ...

    class Writing(core.DetectorDataLogic):
        async def prepare_unbounded(self, datakey_name: str) -> Any:
            file = held["file"] = h5py.File(folder / "fly.h5", "w", libver="latest")
            held["data"] = file.create_dataset("d", (0, *SHAPE), "u2", maxshape=(None, *SHAPE), chunks=(1, *SHAPE))
            file.swmr_mode = True
            told = core.StreamResourceInfo(
                data_key=datakey_name, shape=SHAPE, chunk_shape=(1, *SHAPE), dtype_numpy="<u2", parameters={"dataset": "d"}
            )
            return core.StreamResourceDataProvider(
                uri=f"file://localhost{folder}/fly.h5",
                mimetype="application/x-hdf5",
                collections_written_signal=written,
                resources=[told],
            )

        async def stop(self) -> None:
            if "file" in held:
                held.pop("file").close()

        def get_hinted_fields(self, datakey_name: str) -> list[str]:
            return [datakey_name]

    class Detector(core.StandardDetector):
        def __init__(self) -> None:
            self.add_detector_logics(Trigger(), Acquire(), Writing())
            super().__init__(name="cam")

    return Detector()


def test_a_fly_scan_of_an_ophyd_async_detector_over_a_small_subscription(tmp_path: Path) -> None:
    from bluesky import plan_stubs, preprocessors
    from ophyd_async.core import TriggerInfo
    from ophyd_async.plan_stubs import ensure_connected

    frames = pixels(20)

    def plan() -> Iterator[Any]:
        detector = flying(tmp_path, frames)
        yield from ensure_connected(detector)

        @preprocessors.stage_decorator([detector])
        @preprocessors.run_decorator()
        def fly() -> Iterator[Any]:
            yield from plan_stubs.prepare(detector, TriggerInfo(number_of_events=20, livetime=0.001), wait=True)
            yield from plan_stubs.declare_stream(detector, name="primary")
            yield from plan_stubs.kickoff(detector, wait=True)
            yield from plan_stubs.collect_while_completing(flyers=[detector], dets=[detector], flush_period=0.01, stream_name="primary")

        yield from fly()

    documents = listened(plan(), most_bytes=4000)
    of = decoder(folders=(tmp_path,))
    records = told(of, documents) + list(of.due(math.inf))
    assert reasons(records) == []
    found = of_kind(records, Frame)
    assert [frame.index for frame in found] == list(range(20))
    np.testing.assert_array_equal([frame.counts for frame in found], frames)
    spans = of_kind(records, Exposures)
    assert [one.first for one in spans] == [one.number for one in spans]
    assert sum(one.frames for one in spans) == sum(one.readings for one in spans) == 20
    assert isinstance(records[-1], SeriesEnd)


def test_a_full_subscription_makes_the_engine_wait_and_closing_it_lets_go() -> None:
    source = Subscription(most_bytes=5000)
    sent: list[int] = []

    def send() -> None:
        for i in range(10):
            source("event", {"seq_num": i})
            sent.append(i)

    thread = threading.Thread(target=send)
    thread.start()
    assert source.receive(10) == ("event", {"seq_num": 0})
    assert source.receive(10) == ("event", {"seq_num": 1})
    assert len(sent) <= 5
    source.close()
    thread.join(10)
    assert not thread.is_alive()
    held = [source.receive(0) for _ in range(2)]
    assert all(one is None or one[0] == "event" for one in held)
    assert source.exhausted


# Events


@pytest.mark.parametrize("dtype", ["u1", ">u2", "<u4", "i4", "f4", "f8"])
def test_inline_frames_arrive_as_they_were_sent(dtype: str) -> None:
    frames = pixels().astype(dtype)
    records = told(decoder(), inline(frames, num_points=6))
    assert [type(one) for one in records] == [SeriesStart, *[Frame] * 6, SeriesEnd]
    assert (records[0].series, records[0].expected) == ("run", 6)
    for i, frame in enumerate(records[1:-1]):
        assert (frame.index, frame.detector_time, frame.received, frame.position) == (i, 51.0 + i, 100.0, None)
        assert frame.counts.dtype == np.dtype("f4" if dtype == "f8" else dtype).newbyteorder("=")
        np.testing.assert_array_equal(frame.counts, frames[i])


def test_lists_of_numbers_have_the_type_that_the_descriptor_says() -> None:
    frames = pixels(2)
    for told_dtype, expected in (("<u2", "u2"), ("<u8", "u8"), ("|u1", "u1"), ("nonsense", "u4"), (None, "u4")):
        key = {"shape": list(SHAPE), "dtype": "array", "source": "x"} | ({"dtype_numpy": told_dtype} if told_dtype else {})
        documents = [start(), descriptor({"det": key}), event(1, {"det": frames[0].tolist()})]
        (frame,) = of_kind(told(decoder(), map(tuple, json.loads(json.dumps(documents)))), Frame)
        assert frame.counts.dtype == expected
        np.testing.assert_array_equal(frame.counts, frames[0])


def test_several_frames_an_event_are_numbered_through_and_belong_to_its_reading() -> None:
    frames = pixels(6).reshape(3, 2, *SHAPE)
    records = told(
        decoder({"x": "m"}),
        [start(num_points=3), descriptor({"det": [2, *SHAPE], "m": []}), *(event(i + 1, {"det": frames[i], "m": i}) for i in range(3))],
    )
    assert records[0].expected is None
    assert [frame.index for frame in of_kind(records, Frame)] == list(range(6))
    np.testing.assert_allclose([frame.position for frame in of_kind(records, Frame)], [(i // 2 * 1e-3, 0.0) for i in range(6)])
    assert [(one.first, one.frames, one.number, one.readings) for one in of_kind(records, Exposures)] == [
        (0, 2, 0, 1),
        (2, 2, 1, 1),
        (4, 2, 2, 1),
    ]


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((3, *SHAPE)), "wrong_shape"),
        (np.zeros(7), "wrong_shape"),
        (np.zeros((0, 0)), "wrong_shape"),
        (np.zeros(SHAPE, complex), "wrong_dtype"),
        (np.full(SHAPE, "a"), "wrong_dtype"),
        ([[1, 2], [3]], "bad_document"),
        (7, "wrong_type"),
        (None, "wrong_type"),
        (np.zeros((400, 400)), "too_large"),
        ("no-such-datum", "bad_document"),
    ],
)
def test_a_field_that_is_no_frame_is_refused_and_the_next_one_is_not(image: Any, reason: str) -> None:
    of = decoder(most=100_000)
    frame = pixels(1)[0]
    records = told(of, [start(), descriptor({"det": list(SHAPE)}), event(1, {"det": image}), event(2, {"det": frame}), stop()])
    records += list(of.due(math.inf))
    assert reasons(records) == [reason]
    assert [one.index for one in of_kind(records, Frame)] == [1]
    assert isinstance(records[-1], SeriesEnd)


def test_shape_and_type_may_not_change_within_a_run() -> None:
    frames = pixels(2)
    documents = [start(), descriptor({"det": []})]
    documents += [event(i + 1, {"det": one}) for i, one in enumerate([frames[0], frames[1][:-1], frames[1].astype("f4"), frames[1]])]
    records = told(decoder(image="det"), documents)
    assert reasons(records) == ["wrong_shape", "wrong_dtype"]
    assert [frame.index for frame in of_kind(records, Frame)] == [0, 3]


def test_pages_and_bulk_documents_hold_the_same_as_single_ones() -> None:
    from event_model import pack_event_page

    frames = pixels(4)
    singles = [event(i + 1, {"det": counts.tolist(), "m": float(i)}) for i, counts in enumerate(frames)]
    bodies = [doc for _, doc in singles]
    page = json.loads(json.dumps(pack_event_page(*copy.deepcopy(bodies))))
    results = []
    for documents in (singles, [("event_page", page)], [("bulk_events", {"primary": bodies})]):
        records = told(decoder({"x": "m"}), [start(), descriptor({"det": list(SHAPE), "m": []}), *documents, stop()])
        assert reasons(records) == []
        np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame)], frames)
        results.append([(one.index, one.position, one.detector_time) for one in of_kind(records, Frame)] + of_kind(records, Reading))
    assert results[0] == results[1] == results[2]
    # One wrong event of a page costs itself alone.
    page["data"]["det"][1] = [[1, 2], [3, 4]]
    records = told(decoder(), [start(), descriptor({"det": list(SHAPE)}), ("event_page", page)])
    assert [frame.index for frame in of_kind(records, Frame)] == [0, 2, 3]
    assert reasons(records) == ["wrong_shape"]


@pytest.mark.parametrize("form", ["datum", "datum_page", "bulk_datum"])
@pytest.mark.parametrize("late", [False, True])
def test_datums_may_come_in_any_form_and_after_their_events(tmp_path: Path, form: str, late: bool) -> None:
    frames = pixels(3)
    for i, counts in enumerate(frames):
        tifffile.imwrite(tmp_path / f"cam_{i:06d}.tif", counts)
    kwargs = {"template": "%s%s_%6.6d.tif", "filename": "cam", "frame_per_point": 1}
    assets: list[tuple[str, dict]] = [
        ("resource", {"uid": "r", "spec": "AD_TIFF", "root": str(tmp_path), "resource_path": "", "resource_kwargs": kwargs})
    ]
    names = [f"r/{i}" for i in range(3)]
    if form == "datum":
        assets += [("datum", {"resource": "r", "datum_id": name, "datum_kwargs": {"point_number": i}}) for i, name in enumerate(names)]
    elif form == "datum_page":
        assets += [("datum_page", {"resource": "r", "datum_id": names, "datum_kwargs": {"point_number": [0, 1, 2]}})]
    else:
        assets += [("bulk_datum", {"resource": "r", "datum_ids": names, "datum_kwarg_list": [{"point_number": i} for i in range(3)]})]
    events = [event(i + 1, {"det": name}) for i, name in enumerate(names)]
    of = decoder(folders=(tmp_path,))
    ordered = [*events, *assets] if late else [*assets, *events]
    records = told(of, [start(), descriptor({"det": {"shape": list(SHAPE), "external": "FILESTORE:", "source": "x"}}), *ordered, stop()])
    # An event before its datum waits for it; with the stop document the file is looked at once more.
    records += list(of.due(100.0))
    assert reasons(records) == []
    np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame)], frames)
    assert isinstance(records[-1], SeriesEnd)


# Motors


@pytest.mark.parametrize(
    ("unit", "told_unit", "metres"),
    [
        (None, "mm", 1e-3),
        (None, "um", 1e-6),
        (None, "µm", 1e-6),
        (None, "μm", 1e-6),
        (None, "microns", 1e-6),
        (None, "nm", 1e-9),
        (None, "m", 1.0),
        (None, "", 1e-3),
        (None, None, 1e-3),
        ("um", "deg", 1e-6),
    ],
)
def test_positions_are_metres_whatever_the_motor_says(unit: str | None, told_unit: str | None, metres: float) -> None:
    key = {"shape": [], "dtype": "number", "source": "x"} | ({} if told_unit is None else {"units": told_unit})
    of = decoder({"x": "sx", "y": "sy", "unit": unit}, pixels=False)
    records = told(of, [start(), descriptor({"sx": key, "sy": key}), event(1, {"sx": 3.0, "sy": np.float64(-4)}, sx=7.0, sy=8.0)])
    assert isinstance(records[0], SeriesStart)
    assert records[1] == Reading("beamline", "run", 0, 8.0, pytest.approx((3 * metres, -4 * metres)))


def test_an_angle_is_no_position_and_is_said_once() -> None:
    key = {"shape": [], "dtype": "number", "source": "x", "units": "deg"}
    of = decoder({"x": "sx"}, pixels=False)
    documents = [start(), descriptor({"sx": key}), event(1, {"sx": 3.0}), descriptor({"sx": key}, name="more"), event(2, {"sx": 3.0})]
    records = told(of, documents)
    (error,) = of_kind(records, WireError)
    assert "deg" in error.detail
    assert "positions.unit" in error.detail
    assert not of_kind(records, Reading)


def test_the_baseline_and_other_streams_are_no_points_of_the_scan() -> None:
    streams = [descriptor({"m": []}, name=name) for name in ("baseline", "primary", "after")]
    events = [event(1, {"m": float(i)}, name=name) for i, name in enumerate(("baseline", "primary", "after", "baseline"))]
    records = told(decoder({"x": "m"}, pixels=False), [start(), *streams, *events])
    assert [reading.position for reading in of_kind(records, Reading)] == [(1e-3, 0.0)]


@pytest.mark.parametrize(("named", "expected"), [(None, [0, 0]), ("primary", [7, 7, 7])])
def test_a_stream_of_dark_frames_before_the_scan_is_left_out_where_the_scans_is_named(named: str | None, expected: list[int]) -> None:
    keys = {"det": list(SHAPE)}
    documents = [start(), descriptor(keys, name="dark"), descriptor(keys)]
    documents += [event(i + 1, {"det": np.zeros(SHAPE, np.uint16)}, name="dark") for i in range(2)]
    documents += [event(i + 1, {"det": np.full(SHAPE, 7, np.uint16)}) for i in range(3)]
    frames = of_kind(told(decoder(stream=named), documents), Frame)
    assert [int(frame.counts[0, 0]) for frame in frames] == expected


def test_motors_that_are_monitored_one_by_one_stand_where_they_last_were() -> None:
    streams = [descriptor({"sx": []}, name="sx_monitor"), descriptor({"sy": []}, name="sy_monitor")]
    events = [
        event(1, {"sx": 1.0}, name="sx_monitor", sx=5.0),
        event(1, {"sy": 2.0}, name="sy_monitor", sy=6.0),
        event(2, {"sx": 3.0}, name="sx_monitor", sx=7.0),
    ]
    positions = {"x": "sx", "y": "sy", "join": "time", "unit": "m"}
    records = told(decoder(positions, pixels=False), [start(), *streams, *events])
    assert [(one.time, one.position) for one in of_kind(records, Reading)] == [(6.0, (1.0, 2.0)), (7.0, (3.0, 2.0))]


def test_readings_before_the_first_frame_are_kept_until_its_run_is_announced() -> None:
    documents = [start(), descriptor({"m": []}, name="first"), event(1, {"m": 1.0}, name="first"), descriptor({"det": list(SHAPE)})]
    records = told(decoder({"x": "m"}), documents)
    assert [type(one) for one in records] == [SeriesStart, Reading]


def test_a_companion_wire_gives_readings_and_exposures_and_touches_no_file(tmp_path: Path) -> None:
    motors = [descriptor({"m": []}, name="motors"), event(1, {"m": 5.0}, name="motors")]
    documents = list(streamed(tmp_path / "absent.h5", 8, per_event=2))
    records = told(decoder({"x": "m"}, pixels=False), [documents[0], *motors, *documents[1:]])
    assert reasons(records) == []
    assert [type(one) for one in records] == [SeriesStart, Reading, Exposures, Exposures, SeriesEnd]
    assert [(one.first, one.frames, one.number, one.readings) for one in records[2:4]] == [(0, 4, 0, 2), (4, 4, 2, 2)]
    legacy = told(
        decoder({"x": "m"}, pixels=False), [start(), descriptor({"det": list(SHAPE), "m": []}), event(1, {"det": "r/0", "m": 1}), stop()]
    )
    assert [type(one) for one in legacy] == [SeriesStart, Reading, SeriesEnd]


# References


@pytest.mark.parametrize("per_event", [1, 3])
def test_referenced_frames_are_read_one_by_one_as_they_are_asked_for(tmp_path: Path, per_event: int) -> None:
    frames = pixels(12)
    path = file_of(tmp_path / "a.h5", frames)
    of = decoder(folders=(tmp_path,))
    documents = list(streamed(path, 12, each=4, per_event=per_event))
    told(of, documents[:3])
    asked = iter(of.decode(documents[3], 5.0))
    assert isinstance(next(asked), Exposures)
    first = next(asked)
    assert isinstance(first, Frame)
    assert first.index == 0
    # What has not been asked for is not read: the file may change under it.
    of._assets.close()  # HDF5 does not let one process read and write a file
    with h5py.File(path, "r+") as file:
        file["d"][1] = 7
    assert (next(asked).counts == 7).all()


def test_frames_whose_file_comes_late_grows_late_or_never_comes(tmp_path: Path) -> None:
    frames, path = pixels(6), tmp_path / "late.h5"
    of = decoder(folders=(tmp_path,), flush_s=10.0)
    records = told(of, streamed(path, 6), received=100.0)
    assert [type(one) for one in records] == [SeriesStart, *[Exposures] * 3]
    assert list(of.due(101.0)) == []
    with h5py.File(path, "w", libver="latest") as file:
        data = file.create_dataset("d", (0, *SHAPE), "u2", maxshape=(None, *SHAPE), chunks=(1, *SHAPE))
        file.swmr_mode = True
        for count in (3, 4):
            data.resize(count, 0)
            data[:] = frames[:count]
            data.flush()
            records += of.due(102.0)
            assert [frame.index for frame in of_kind(records, Frame)] == list(range(count))
    assert not of_kind(records, SeriesEnd)
    records += of.due(109.0)
    assert reasons(records) == []
    records += of.due(110.0)
    assert reasons(records) == ["file_absent", "file_absent"]
    assert isinstance(records[-1], SeriesEnd)
    np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame)], frames[:4])
    assert list(of.due(math.inf)) == []


def test_a_file_is_waited_for_no_longer_when_the_clock_was_set_back(tmp_path: Path) -> None:
    of = decoder(folders=(tmp_path,), flush_s=10.0)
    records = told(of, streamed(tmp_path / "late.h5", 2), received=10_000.0)
    records += [*of.due(6400.0), *of.due(6409.0)]
    assert reasons(records) == []
    records += of.due(6410.0)
    assert reasons(records) == ["file_absent"] * 2
    assert isinstance(records[-1], SeriesEnd)


def test_a_run_does_not_begin_before_the_run_before_it_has_its_last_frames(tmp_path: Path) -> None:
    frames = pixels(4)
    of = decoder(folders=(tmp_path,))
    records = told(of, [*streamed(tmp_path / "late.h5", 4, "one"), *inline(frames, "two"), *streamed(tmp_path / "never.h5", 4, "three")])
    assert {one.series for one in of_kind(records, SeriesStart)} == {"one"}
    file_of(tmp_path / "late.h5", frames)
    records += of.due(101.0)
    ends = [(type(one).__name__, one.series) for one in records if isinstance(one, SeriesStart | SeriesEnd)]
    assert ends == [("SeriesStart", "one"), ("SeriesEnd", "one"), ("SeriesStart", "two"), ("SeriesEnd", "two"), ("SeriesStart", "three")]
    assert [(frame.series, frame.index) for frame in of_kind(records, Frame)] == [(run, i) for run in ("one", "two") for i in range(4)]
    records += of.due(math.inf)
    assert reasons(records) == ["file_absent"] * 4
    assert isinstance(records[-1], SeriesEnd)


def test_what_may_wait_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WAITING", 5)
    monkeypatch.setattr(module, "_HELD_BYTES", 5000)
    frames = pixels(30)
    of = decoder(folders=(tmp_path,))
    # References to absent files: the oldest are refused before their time.
    records = told(of, list(streamed(tmp_path / "absent.h5", 16))[:-1])
    assert len(reasons(records)) >= 4
    assert of._wanted <= 5
    # Inline frames behind them: the wait ends when they are too much to hold.
    records = told(of, [stop(), *inline(frames, "two")])
    assert of._held <= 5000 + frames[0].nbytes + 200
    assert len(of_kind(records, Frame)) == 30
    # Runs whose stop document is lost, what documents tell of, and readings of runs without frames.
    monkeypatch.setattr(module, "_REMEMBERED_BYTES", 10_000)
    for i in range(100):
        told(
            of,
            [start(f"lost-{i}"), descriptor({"m": []}, f"lost-{i}"), ("datum", {"resource": "r", "datum_id": str(i), "datum_kwargs": {}})],
        )
    assert len(of._runs) <= 16
    assert len(of._datums._found) < 60


def test_one_stream_datum_cannot_ask_for_more_than_a_run_holds(tmp_path: Path) -> None:
    of = decoder(folders=(tmp_path,))
    documents = list(streamed(tmp_path / "absent.h5", 4))
    told(of, documents[:3])
    assert reasons(told(of, [stream_datum(0, 10**9), stream_datum(0, 2**50), stream_datum(5, 4)])) == [
        "bad_index",
        "bad_document",
        "bad_document",
    ]
    # A million frames of a file that never comes are not a million messages.
    records = told(of, [stream_datum(0, 10**6)]) + list(of.due(math.inf))
    assert set(reasons(records)) == {"file_absent"}
    assert len(reasons(records)) == module._REFUSALS
    assert "999000 after it" in of_kind(records, WireError)[-1].detail


@pytest.mark.parametrize("restart", [False, True])
def test_a_scan_that_goes_on_in_a_second_file_counts_its_frames_on(tmp_path: Path, restart: bool) -> None:
    frames = pixels(8)
    first, second = file_of(tmp_path / "a.h5", frames[:4]), file_of(tmp_path / "b.h5", frames[4:])
    documents = list(streamed(first, 4))[:-1]
    name, resource = copy.deepcopy(documents[2])
    resource |= {"uid": "second", "uri": f"file://localhost{second}"}
    more = [stream_datum(i - 4 if restart else i, i + 2 - (4 if restart else 0), resource="second", seq=i + 1) for i in (4, 6)]
    records = told(decoder(folders=(tmp_path,)), [*documents, (name, resource), *more, stop()])
    assert reasons(records) == []
    assert [frame.index for frame in of_kind(records, Frame)] == list(range(8))
    np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame)], frames)
    assert [(one.first, one.number) for one in of_kind(records, Exposures)] == [(i, i) for i in (0, 2, 4, 6)]


def test_references_out_of_the_folders_are_refused_and_memory_stays_flat(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    outside = file_of(tmp_path / "a.h5", pixels(2))
    (tmp_path / "in" / "link.h5").symlink_to(outside)
    for path in (outside, tmp_path / "in" / ".." / "a.h5", tmp_path / "in" / "link.h5", Path("/etc/passwd")):
        of = decoder(folders=(tmp_path / "in",))
        records = told(of, streamed(path, 2))
        assert reasons(records) == ["outside_folder"] * 2
        assert isinstance(records[-1], SeriesEnd)
    resource = {"uid": "r", "spec": "AD_HDF5", "root": str(tmp_path / "in"), "resource_path": "../../etc/passwd", "resource_kwargs": {}}
    datum = {"resource": "r", "datum_id": "d", "datum_kwargs": {"point_number": 0}}
    documents = [start(), descriptor({"det": list(SHAPE)}), ("resource", resource), ("datum", datum), event(1, {"det": "d"})]
    assert reasons(told(decoder(folders=(tmp_path / "in",)), documents)) == ["outside_folder"]


def test_files_are_closed_when_no_run_is_open(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    of = decoder(folders=(tmp_path,))
    told(of, streamed(file_of(tmp_path / "a.h5", pixels(2)), 2))
    assert len(os.listdir("/proc/self/fd")) == before


# Runs


def test_two_interleaved_runs_keep_their_frames_apart() -> None:
    frames = pixels(4)
    pairs = zip(inline(frames, "one"), inline(frames[::-1], "two"), strict=True)
    records = told(decoder(), [document for pair in pairs for document in pair])
    assert reasons(records) == []
    for uid, expected in (("one", frames), ("two", frames[::-1])):
        np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame) if frame.series == uid], expected)
    assert [one.series for one in of_kind(records, SeriesEnd)] == ["one", "two"]


def test_a_late_subscriber_has_the_frames_of_which_it_knows_the_descriptor() -> None:
    documents = list(inline(pixels(3)))
    records = told(decoder(), documents[1:])
    assert [type(one) for one in records] == [SeriesStart, *[Frame] * 3, SeriesEnd]
    assert records[0].metadata == {}
    assert reasons(told(decoder(), documents[2:])) == ["bad_document"] * 4


def test_a_start_document_of_any_size_leaves_metadata_of_bounded_size() -> None:
    records = told(decoder(), inline(pixels(1), junk="x" * 10**6, array=np.zeros(5), deep={"a": [1, (2, 3)]}))
    assert records[0].metadata == {"start": {"uid": "run", "scan_id": 1, "time": 1.0, "plan_name": "scan"}}
    records = told(decoder(), inline(pixels(1), array=np.zeros(5), deep={"a": [1, (2, 3)]}))
    assert json.loads(json.dumps(records[0].metadata))["start"]["deep"] == {"a": [1, [2, 3]]}


# Files of documents


@pytest.mark.parametrize("form", ["list", "lines", "pairs", "lines of pairs"])
def test_a_file_of_documents_in_any_of_its_forms(tmp_path: Path, form: str) -> None:
    frames = pixels(3)
    documents = [(name, {**doc, "data": {"det": doc["data"]["det"].tolist()}} if name == "event" else doc) for name, doc in inline(frames)]
    items: list[Any] = (
        [{"name": name, "doc": doc} for name, doc in documents] if "pairs" not in form else [list(pair) for pair in documents]
    )
    path = tmp_path / "run.json"
    path.write_text("\n\n".join(map(json.dumps, items)) if "lines" in form else json.dumps(items, indent=1 if form == "list" else None))
    source = DocumentFile(SourceSettings(kind="documents", path=path))
    source.open()
    records = told(decoder(), everything(source))
    assert reasons(records) == []
    np.testing.assert_array_equal([frame.counts for frame in of_kind(records, Frame)], frames)


def test_a_damaged_line_is_refused_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text(json.dumps(["start", {"uid": "a"}]) + "\n{ no json\n[1]\n" + json.dumps(["stop", {"uid": "b", "run_start": "a"}]))
    source = DocumentFile(SourceSettings(kind="documents", path=path))
    source.open()
    assert reasons(told(decoder(), everything(source))) == ["not_document"] * 2


@pytest.mark.parametrize("content", [b"", b"no json", b'{"a": 1}', None])
def test_a_file_that_holds_no_documents_is_the_operators_business(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_bytes(content)
    source = DocumentFile(SourceSettings(kind="documents", path=path))
    with pytest.raises(ConfigError, match=r"run\.json"):
        source.open()
    source.close()


# Strangers


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"garbage",
        (b"a", b"b"),
        ("event", 3),
        ("no such", {}),
        (1, 2, 3),
        ("start", {}),
        ("event_page", {}),
        ("stop", {"run_start": "x"}),
    ],
)
def test_what_is_no_document_is_refused(message: Any) -> None:
    (reason,) = reasons(told(decoder(), [message]))
    assert reason in ("not_document", "bad_document")


def test_documents_off_the_wire_are_those_of_this_process() -> None:
    import msgpack
    import msgpack_numpy

    frames = pixels(2)
    messages = [b"beam " + name.encode() + b" " + msgpack.packb(doc, default=msgpack_numpy.encode) for name, doc in inline(frames)]
    records = told(decoder(prefix="beam"), messages)
    assert [type(one) for one in records] == [SeriesStart, Frame, Frame, SeriesEnd]
    np.testing.assert_array_equal([frame.counts for frame in records[1:-1]], frames)
    assert told(decoder(prefix="other"), messages) == []


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(
        [
            [],
            {},
            [[1, 2], [3, 4]],
            [0, 10],
            {"start": 0, "stop": 3},
            {"start": 0, "stop": 2**39},
            ["r/0"],
            "run",
            "run-primary",
            "../../etc/passwd",
            "%9d",
            "\ud800",
            b"x",
            np.zeros((12, 10)),
            np.array(["a"], object),
        ]
    ),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place within a document."""
    found = [at] if at else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        found += places(one, (*at, key))
    return found


def corpus(folder: Path) -> list[tuple[str, dict]]:
    """A run with everything in it: frames inline, by stream and by datum, motors, pages."""
    path = file_of(folder / "a.h5", pixels(4))
    frame = pixels(1)[0].tolist()
    key = {"shape": list(SHAPE), "dtype": "array", "dtype_numpy": "<u2", "source": "x"}
    resource = {
        "uid": "q",
        "spec": "AD_HDF5_SWMR_STREAM",
        "root": str(folder),
        "resource_path": "a.h5",
        "resource_kwargs": {"dataset": "d", "template": "%s%s_%d.h5", "frame_per_point": 1},
    }
    page = {
        "descriptor": "run-primary",
        "seq_num": [2, 3],
        "time": [1.0, 2.0],
        "data": {"det": [frame, "q/0"], "m": [1.0, 2.0]},
        "timestamps": {"m": [1.0, 2.0]},
    }
    return [
        *list(streamed(path, 4))[:1],
        descriptor({"det": key, "m": {"shape": [], "dtype": "number", "units": "mm", "source": "x"}}),
        *list(streamed(path, 4))[2:-1],
        ("resource", resource),
        ("resource", resource | {"uid": "t", "spec": "AD_TIFF"}),
        ("datum", {"resource": "q", "datum_id": "q/0", "datum_kwargs": {"frame": 0}}),
        ("datum_page", {"resource": "q", "datum_id": ["q/1"], "datum_kwargs": {"frame": [1]}}),
        ("bulk_datum", {"resource": "t", "datum_ids": ["t/1"], "datum_kwarg_list": [{"point_number": 1}]}),
        event(1, {"det": frame, "m": 1.0}),
        ("event_page", page),
        ("bulk_events", {"primary": [event(4, {"det": "q/1", "m": 3.0})[1], event(5, {"det": "t/1"})[1]]}),
        stop(),
    ]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_mutated_documents_raise_nothing_but_wire_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    documents = copy.deepcopy(corpus(folder))
    for _ in range(data.draw(st.integers(1, 4))):
        _, doc = documents[data.draw(st.integers(0, len(documents) - 1))]
        where = places(doc)
        if not where:
            continue
        *path, last = where[data.draw(st.integers(0, len(where) - 1))]
        holder: Any = doc
        for key in path:
            holder = holder[key]
        if isinstance(holder, dict) and data.draw(st.booleans()):
            del holder[last]
        else:
            holder[last] = copy.deepcopy(data.draw(JUNK))
    if data.draw(st.booleans()):
        documents = data.draw(st.permutations(documents))
    of = decoder({"x": "m"}, pixels=data.draw(st.booleans()), folders=(folder,), flush_s=1.0)
    records = told(of, documents) + list(of.due(100.5)) + list(of.due(math.inf))
    for one in records:
        assert isinstance(one, SeriesStart | Frame | Reading | Exposures | SeriesEnd | WireError)
        if isinstance(one, Frame):
            assert one.counts.ndim == 2
        if isinstance(one, SeriesStart):
            json.dumps(dict(one.metadata))
        if isinstance(one, WireError):
            one.detail.encode()
    of._assets.close()
