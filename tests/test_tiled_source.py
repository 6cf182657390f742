"""A run in a real Tiled as a source: written by Bluesky's own writer, found by uid or search, read frame for frame."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamprior.config import PositionSettings, SourceSettings, TiledSettings, make_config
from streamprior.errors import ConfigError, WireError
from streamprior.preflight import inspect
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.sources.files import AsRead, open_recording
from streamprior.sources.recording import FrameDamaged
from streamprior.sources.tiled import find_by_start, open_tiled, tiled_source
from tests.tiled_fixture import RunningTiled

SHAPE = (4, 5)
EVENTS = 7

# Tiled sorts numbers as text: that is right for times of as many digits, as all real ones have.
LONG_AGO = 1_000_000_000.0


@pytest.fixture(scope="module")
def root(tiled_server: RunningTiled) -> Iterator[Any]:
    from tiled.client import from_uri

    client = from_uri(tiled_server.uri, api_key=tiled_server.api_key)
    yield client
    client.context.close()


@pytest.fixture(scope="module")
def scans(root: Any) -> list[str]:
    """uids of two scans that a RunEngine has made and TiledWriter has written: motors sx, sy, an image a point."""
    pytest.importorskip("bluesky_tiled_plugins")
    from bluesky import RunEngine
    from bluesky.plans import scan
    from bluesky_tiled_plugins import TiledWriter
    from ophyd.sim import SynAxis, SynSignal

    sx, sy = SynAxis(name="sx"), SynAxis(name="sy")
    camera = SynSignal(name="camera", func=lambda: picture(round(sx.position)))
    engine = RunEngine({}, context_managers=[])
    engine.subscribe(TiledWriter(root, batch_size=1))
    made = [engine(scan([camera], sx, 0, EVENTS - 1, sy, 5, 5, EVENTS), sample=sample)[0] for sample in ("gold", "copper")]
    return [str(uid) for uid in made]


def picture(number: int) -> np.ndarray:
    return np.arange(20, dtype=np.float64).reshape(SHAPE) + 100 * number


def container(root: Any, name: str, arrays: dict[str, np.ndarray], start: dict[str, Any] | None = None) -> Any:
    """A run of our own making, deep as TiledWriter's older layout is."""
    run = root.create_container(name, metadata={"start": {"uid": name, "time": LONG_AGO} | (start or {})})
    stream = run.create_container("streams").create_container("primary")
    for key, values in arrays.items():
        stream.write_array(values, key=key)
    return stream


def test_a_scan_of_a_run_engine_is_read_as_it_was_written(scans: list[str], tiled_server: RunningTiled) -> None:
    motors = PositionSettings(x="sx", y="sy", unit="um")
    recording = open_tiled(tiled_server.uri, tiled_server.api_key, scans[0], positions=motors)
    assert (recording.name, recording.shape, recording.detector().shape) == (scans[0], (EVENTS, *SHAPE), SHAPE)
    for i in range(EVENTS):
        np.testing.assert_array_equal(recording.frame(i), picture(i))
        assert recording.position(i) == pytest.approx((1e-6 * i, 5e-6))
    start = recording.metadata["start"]
    assert (start["uid"], start["sample"], start["plan_name"]) == (scans[0], "gold", "scan")


def test_a_run_is_found_by_uid_its_beginning_number_search_and_age(scans: list[str], tiled_server: RunningTiled) -> None:
    for run, expected in {
        scans[0]: scans[0],
        scans[0][:8]: scans[0],
        "1": scans[0],
        "2": scans[1],
        "sample=gold": scans[0],
        "start.sample = copper": scans[1],
        "scan_id=2": scans[1],
        "latest": scans[1],
    }.items():
        assert open_tiled(tiled_server.uri, tiled_server.api_key, run).name == expected, run


def test_the_command_line_names_a_run_in_tiled_like_a_file(
    scans: list[str], tiled_server: RunningTiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILED_API_KEY", tiled_server.api_key)
    recording = open_recording(f"tiled:{tiled_server.uri}::{scans[1]}::primary/camera", "1::2", skip=(3,))
    assert [recording.origin(i) for i in range(len(recording))] == [1, 5]
    np.testing.assert_array_equal(recording[1], picture(5))
    with pytest.raises(ConfigError, match="write tiled:http://HOST:PORT::RUN"):
        open_recording("tiled:here")


def test_the_source_hands_over_start_frames_with_positions_and_end(scans: list[str], tiled_server: RunningTiled, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(tiled_server.api_key)
    source = tiled_source(
        SourceSettings(kind="tiled", run=scans[0], skip=(2,)),
        TiledSettings(uri=tiled_server.uri, api_key_file=key),
        PositionSettings(x="sx"),
    )
    source.open()
    messages = []
    while not source.exhausted:
        messages.append(source.receive(0.1))
    source.close()
    start, *frames, end = messages
    assert isinstance(start, SeriesStart)
    assert (start.series, start.expected, start.metadata["start"]["uid"]) == (scans[0], EVENTS - 1, scans[0])
    assert end == SeriesEnd("detector", scans[0])
    seen = [frame for frame in frames if isinstance(frame, Frame)]
    assert [(one.index, one.origin) for one in seen] == list(enumerate([0, 1, 3, 4, 5, 6]))
    # A motor without a unit is in millimetres, and a scan along x alone stays on y = 0.
    np.testing.assert_allclose([one.position for one in seen], [(1e-3 * i, 0.0) for i in (0, 1, 3, 4, 5, 6)])


def test_results_are_found_by_a_search_for_the_raw_run(scans: list[str], root: Any, tiled_server: RunningTiled) -> None:
    from tiled.queries import Key

    from streamprior.sinks.archive import Archive
    from streamprior.sinks.catalog import mirror_archive
    from tests.test_archive import DRIFT, PROVENANCE, make_prior, make_result, make_run

    metadata = open_tiled(tiled_server.uri, tiled_server.api_key, scans[0]).metadata
    folder = tiled_server.readable / "linked"
    catalog = mirror_archive(tiled_server.uri, tiled_server.api_key, folder, parent="linked")
    archive = Archive(folder, make_prior(), PROVENANCE, catalog.announce, DRIFT, 8)
    archive.open()
    archive.begin(replace(make_run("linked-run"), metadata=metadata))
    archive.write([make_result(0, "linked-run")])
    assert catalog.step()
    catalog.close(0)
    archive.close()
    same = Key("start.uid") == scans[0]
    assert list(root.search(same)) == [scans[0]]
    (results,) = root["linked"].search(same).values()
    assert [spec.name for spec in results.specs] == ["StreampriorRun"]
    assert results["classes"].shape[0] == 1
    assert find_by_start(tiled_server.uri, tiled_server.api_key, scans[0]) == {"raw", "results"}
    root["linked"].create_container("numbers", metadata={"start": {"uid": "numbers", "raw": scans[0]}})
    assert find_by_start(tiled_server.uri, tiled_server.api_key, scans[0]) == {"raw", "results", "documents"}
    assert find_by_start(tiled_server.uri, tiled_server.api_key, scans[1]) == {"raw"}


def test_event_rows_of_one_or_several_images_are_frames_in_order(root: Any, tiled_server: RunningTiled) -> None:
    images = np.arange(3 * 2 * 20, dtype=np.uint16).reshape(3, 2, *SHAPE)
    stream = container(root, "burst", {"one": images[:, :1], "two": images})
    stream.write_array(np.array([1.0, 2.0]), key="mx", metadata={"units": "um"})
    motors = PositionSettings(x="mx")
    one = open_tiled(tiled_server.uri, tiled_server.api_key, "burst", "one", positions=motors)
    two = open_tiled(tiled_server.uri, tiled_server.api_key, "burst", "streams/primary/two", positions=motors)
    np.testing.assert_array_equal([one[i] for i in range(3)], images[:, 0])
    np.testing.assert_array_equal([two[i] for i in range(6)], images.reshape(6, *SHAPE))
    assert [one.position(i) for i in range(3)] == [pytest.approx((1e-6, 0)), pytest.approx((2e-6, 0)), None]
    assert [two.position(i) for i in (0, 1, 2, 4)] == [*[pytest.approx((1e-6, 0))] * 2, pytest.approx((2e-6, 0)), None]


def test_frames_come_in_few_requests_and_whatever_order_they_are_asked_in(
    root: Any, tiled_server: RunningTiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    from streamprior.tiled_api import TiledApi

    images = np.random.default_rng(0).integers(0, 999, (40, *SHAPE)).astype(">i4")
    container(root, "blocks", {"img": images})
    monkeypatch.setattr("streamprior.sources.tiled._BLOCK_BYTES", 16 * 4 * 20)
    asked: list[str] = []
    read = TiledApi.read
    monkeypatch.setattr(TiledApi, "read", lambda self, path, **query: asked.append(query["slice"]) or read(self, path, **query))
    recording = open_tiled(tiled_server.uri, tiled_server.api_key, "blocks")
    np.testing.assert_array_equal([recording[i] for i in range(40)], images)
    assert asked == ["0:16", "16:32", "32:40"]
    for i in (39, 0, 17):
        np.testing.assert_array_equal(recording[i], images[i])


def test_what_is_not_there_is_said_with_what_there_is(scans: list[str], root: Any, tiled_server: RunningTiled) -> None:
    container(root, "several", {"left": np.zeros((2, *SHAPE)), "right": np.zeros((2, *SHAPE)), "line": np.zeros(3)})
    container(root, "flat", {"line": np.zeros(3)})
    alike = [root.create_container(f"alike-{n}", metadata={"start": {"uid": f"alike-{n}", "time": LONG_AGO + n}}) for n in range(2)]
    motors = PositionSettings(x="nowhere")
    degrees = container(root, "angles", {"img": np.zeros((2, *SHAPE))})
    degrees.write_array(np.zeros(2), key="theta", metadata={"units": "deg"})
    for changes, words in [
        ({"run": "no-such"}, rf"no run 'no-such' .* the newest are {scans[1][:8]} \(scan 2\), {scans[0][:8]} \(scan 1\)"),
        ({"run": "999"}, "no run '999'"),
        ({"run": "sample=lead"}, "no run 'sample=lead'"),
        ({"run": "nowhere/latest"}, "there is none in nowhere"),
        ({"run": "alike"}, "begins the uid of several runs: alike-"),
        ({"run": "several"}, "several stacks of images: streams/primary/left, streams/primary/right; name one"),
        ({"run": "several", "array": "line"}, "streams/primary/line is no stack of images"),
        ({"run": "several", "array": "ight"}, "no array 'ight' among streams/primary/left"),
        ({"run": "flat"}, "no stack of images"),
        ({"run": scans[0], "positions": motors}, "no column 'nowhere'; it has .*sx"),
        ({"run": "angles", "positions": PositionSettings(x="theta")}, "'theta' is in 'deg', which is no length"),
        ({"run": scans[0], "frames": "9:"}, "picks none of the 7 frames"),
    ]:
        with pytest.raises(ConfigError, match=words):
            open_tiled(tiled_server.uri, tiled_server.api_key, **changes)
    assert len(alike) == 2


def test_a_server_that_is_away_and_a_key_that_is_refused_are_told_apart(tiled_server: RunningTiled) -> None:
    with pytest.raises(ConfigError, match=r"no Tiled answers at http://127\.0\.0\.1:9/api/v1; start it"):
        open_tiled("http://127.0.0.1:9", None)
    with pytest.raises(ConfigError, match="does not know the API key"):
        open_tiled(tiled_server.uri, "wrong")
    with pytest.raises(ConfigError, match=r"needs the address of a server, here or in tiled\.uri"):
        tiled_source(SourceSettings(kind="tiled"), TiledSettings(), PositionSettings())


def test_a_frame_that_tiled_cannot_read_costs_itself_alone(root: Any, tiled_server: RunningTiled) -> None:
    folder = tiled_server.readable / "broken"
    folder.mkdir()
    import tifffile
    from tiled.structures.array import ArrayStructure, BuiltinDtype
    from tiled.structures.core import StructureFamily
    from tiled.structures.data_source import Asset, DataSource

    for n in range(5):
        tifffile.imwrite(folder / f"{n}.tif", np.full(SHAPE, n, np.uint16))
    structure = ArrayStructure(
        shape=(5, *SHAPE), chunks=((1,) * 5, (4,), (5,)), data_type=BuiltinDtype.from_numpy_dtype(np.dtype(np.uint16))
    )
    assets = [Asset(data_uri=f"file://localhost{folder / f'{n}.tif'}", is_directory=False, parameter="data_uris", num=n) for n in range(5)]
    run = root.create_container("damaged", metadata={"start": {"uid": "damaged", "time": LONG_AGO}})
    source_of = DataSource(
        structure_family=StructureFamily.array,
        structure=structure,
        mimetype="multipart/related;type=image/tiff",
        parameters={},
        assets=assets,
        management="external",
    )
    run.new(StructureFamily.array, [source_of], key="img")
    recording = open_tiled(tiled_server.uri, tiled_server.api_key, "damaged")
    (folder / "3.tif").write_bytes(b"no image")
    for i in (0, 1, 2, 4):
        np.testing.assert_array_equal(recording[i], np.full(SHAPE, i))
    with pytest.raises(FrameDamaged, match="frame 3 cannot be read"):
        recording[3]
    source = tiled_source(
        SourceSettings(kind="tiled", run="damaged", frames="3"), TiledSettings(uri=with_key(tiled_server)), PositionSettings()
    )
    source.open()
    source.receive(0)
    with pytest.raises(WireError, match="file_damaged: damaged: frame 3"):
        AsRead().decode(source.receive(0), 0.0)


def with_key(server: RunningTiled) -> str:
    return f"{server.uri}?api_key={server.api_key}"


def test_a_tiled_that_goes_away_is_waited_for_in_mid_run(root: Any, tiled_server: RunningTiled, monkeypatch: pytest.MonkeyPatch) -> None:
    import httpx

    container(root, "outage", {"img": np.arange(40, dtype=np.uint16).reshape(2, *SHAPE)})
    source = tiled_source(SourceSettings(kind="tiled", run="outage"), TiledSettings(uri=with_key(tiled_server)), PositionSettings())
    source.open()
    assert isinstance(source.receive(0), SeriesStart)
    gone = threading.Event()
    gone.set()
    request = httpx.Client.request

    def cut(self: httpx.Client, *arguments: Any, **options: Any) -> httpx.Response:
        if gone.is_set():
            raise httpx.ConnectError("cut")
        return request(self, *arguments, **options)

    monkeypatch.setattr(httpx.Client, "request", cut)
    assert [source.receive(0) for _ in range(3)] == [None] * 3
    gone.clear()
    frames = [source.receive(0), source.receive(0)]
    assert [frame.index for frame in frames if isinstance(frame, Frame)] == [0, 1]
    assert isinstance(source.receive(0), SeriesEnd)


def test_a_start_document_beyond_all_measure_is_cut_down_to_what_links(root: Any, tiled_server: RunningTiled) -> None:
    container(root, "wordy", {"img": np.zeros((2, *SHAPE), np.uint8)}, {"notes": ["x" * 1000] * 200, "scan_id": 77, "poem": "y" * 5000})
    start = open_tiled(tiled_server.uri, tiled_server.api_key, "wordy").metadata["start"]
    assert start == {"uid": "wordy", "time": LONG_AGO, "scan_id": 77}


def test_check_tells_what_comes_out_of_tiled_out_of_a_file_and_out_of_documents(
    scans: list[str], tiled_server: RunningTiled, tmp_path: Path
) -> None:
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"name": "start", "doc": {"uid": "a", "time": 1.0}}\n')
    for source, fine, words in [
        ({"kind": "tiled", "run": scans[0], "uri": with_key(tiled_server)}, True, f"run {scans[0]} in Tiled: 7 frames"),
        ({"kind": "tiled", "run": "nowhere", "uri": with_key(tiled_server)}, False, "no run 'nowhere'"),
        ({"kind": "file", "path": str(tmp_path / "later.h5"), "follow_s": 3.0}, True, "until nothing new has come for 3 s"),
        ({"kind": "documents", "path": str(documents)}, True, "can be read"),
        ({"kind": "documents", "path": str(tmp_path / "none")}, False, "cannot be read"),
        ({"kind": "documents", "address": "tcp://127.0.0.1:*"}, True, "can be bound"),
        ({"kind": "dectris_v1", "address": "tcp://127.0.0.1:*"}, True, "can be bound"),
    ]:
        config = make_config({"prior": "prior.h5", "source": source}, "test")
        found = next(one for one in inspect(config) if one.what == "source")
        assert (found.fine, words in found.sentence) == (fine, True), found
    missing = make_config({"prior": "p", "source": {"kind": "documents"}, "documents": {"folders": [str(tmp_path / "x")]}}, "test")
    found = next(one for one in inspect(missing) if one.what == "source")
    assert not found.fine
    assert "is no folder" in found.sentence
