"""The archive in a real Tiled: registered while it grows, caught up after an outage, read from another process."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamprior.errors import SinkUnavailable
from streamprior.records import MosaicImage, Positions, RunEnded
from streamprior.sinks.archive import Archive, run_key
from streamprior.sinks.catalog import mirror_archive
from streamprior.sinks.embedded import embedded_tiled
from streamprior.sinks.live import MESSAGE_BYTES, TILE, LatestArrays, thinning
from streamprior.sinks.mirror import Mirror
from streamprior.sinks.rows import PART_ROWS
from streamprior.tiled_api import TiledApi, probe
from tests.test_archive import DRIFT, PROVENANCE, make_prior, make_result, make_run
from tests.test_mosaic_file import make_image
from tests.tiled_fixture import RunningTiled

UID = "uid-0001-abcdef"
KEY = run_key(make_run())


@pytest.fixture
def folder(tiled_server: RunningTiled, request: pytest.FixtureRequest) -> Path:
    """An archive folder of this test's own that Tiled may read."""
    return tiled_server.readable / request.node.name


@pytest.fixture
def catalog(tiled_server: RunningTiled, folder: Path) -> Iterator[Mirror]:
    """A catalog that the test steps by hand; its container in Tiled is the test's own, too."""
    one = mirror_archive(tiled_server.uri, tiled_server.api_key, folder, parent=f"tests/{folder.name}")
    yield one
    one.close(0)


@pytest.fixture
def archive(folder: Path, catalog: Mirror) -> Iterator[Archive]:
    one = Archive(folder, make_prior(), PROVENANCE, catalog.announce, DRIFT, 8)
    one.open()
    yield one
    one.close()


@contextmanager
def connected(uri: str, api_key: str) -> Iterator[Any]:
    """A client of Tiled's own making, as a user has it."""
    from tiled.client import from_uri

    client = from_uri(uri, api_key=api_key)
    try:
        yield client
    finally:
        client.context.close()


@pytest.fixture(scope="session")
def client(tiled_server: RunningTiled) -> Iterator[Any]:
    """The container that holds a container for each test."""
    with connected(tiled_server.uri, tiled_server.api_key) as root:
        if "tests" not in root:  # other files keep their containers there, too
            root.create_container("tests")
        yield root["tests"]


def write(archive: Archive, indices: range) -> None:
    archive.write([make_result(index) for index in indices])


def end(archive: Archive) -> None:
    archive.end(RunEnded(UID, "end", 1_700_000_060.0))


def check_images(node: Any, indices: list[int]) -> None:
    classes, objects = node["classes"].read(), node["objects"].read()
    for index in indices:
        np.testing.assert_array_equal(classes[index], make_result(index).classes)
        np.testing.assert_array_equal(objects[index], make_result(index).object)


def test_a_growing_run_is_read_through_tiled_at_every_step(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    assert catalog.step()
    runs = client[folder.name]
    assert list(runs) == [KEY]
    assert list(runs[KEY]) == []
    for extent in (3, 20, 21):
        write(archive, range(extent - 3, extent))
        assert catalog.step()
        node = runs[KEY]
        assert node["classes"].shape == (extent, 24, 20)
        assert node["objects"].dtype == np.complex64
        check_images(node, [extent - 3, extent - 1])
        assert node["frames"].read()["index"].iloc[-1] == extent - 1
    assert runs[KEY].metadata["status"] == "running"
    assert catalog.up
    assert not catalog.error


def test_a_finished_run_carries_its_metadata_and_spec(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(10))
    end(archive)
    assert catalog.step()
    node = client[folder.name][KEY]
    assert [spec.name for spec in node.specs] == ["StreampriorRun"]
    assert node.metadata["status"] == "complete"
    assert node.metadata["provenance"]["prior"] == PROVENANCE["prior"]
    assert (node.metadata["frames"], node.metadata["extent"]) == (10, 10)
    frames = node["frames"].read()
    np.testing.assert_allclose(frames["chi2"], [0.01 * index for index in range(10)])
    assert set(frames["arm"]) == {"prototype"}
    assert not catalog.pending()


def test_a_search_for_the_raw_run_finds_its_results_too(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    from tiled.queries import Key

    start = {"uid": "raw-run-uid", "scan_id": 7, "sample": {"name": "gold"}}
    there = client.create_container(folder.name)
    raw = there.create_container("raw", metadata={"start": start})
    linked = replace(make_run(), metadata={"start": start, "operator": "night shift"})
    for status in ("running", "complete"):
        if status == "running":
            archive.begin(linked)
            write(archive, range(3))
        else:
            end(archive)
        assert catalog.step()
        found = there.search(Key("start.uid") == "raw-run-uid")
        assert set(found) == {"raw", KEY}
        results = found[KEY]
        assert (results.metadata["status"], [spec.name for spec in results.specs]) == (status, ["StreampriorRun"])
        assert results.metadata["start"] == raw.metadata["start"] == start
        assert results.metadata["metadata"] == {"operator": "night shift"}
    assert set(there.search(Key("start.scan_id") == 7)) == {"raw", KEY}


def test_a_run_that_goes_on_after_its_end_goes_on_in_tiled(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    for extent in (5, 9):
        archive.begin(make_run())
        catalog.step()
        write(archive, range(extent - 4, extent))
        end(archive)
        assert catalog.step()
        node = client[folder.name][KEY]
        assert (node.metadata["status"], node.metadata["extent"]) == ("complete", extent)
        check_images(node, [extent - 1])


def test_late_missing_and_repeated_frames_are_right_in_tiled(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(0, 4))
    write(archive, range(30, 34))
    catalog.step()
    write(archive, range(2, 6))
    catalog.step()
    node = client[folder.name][KEY]
    check_images(node, [0, 3, 4, 5, 30, 33])
    assert (node["classes"][10] == 255).all()
    assert np.isnan(node["objects"][10]).all()
    assert list(node["frames"].read()["index"]) == [0, 1, 2, 3, 4, 5, 30, 31, 32, 33]


def test_parts_of_the_table_stand_in_the_order_of_their_frames(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    for first in (0, 2 * PART_ROWS, PART_ROWS, 3 * PART_ROWS):  # the second part appears between the first and the third
        write(archive, range(first, first + 2))
        assert catalog.step()
    frames = client[folder.name][KEY]["frames"]
    assert frames.structure().npartitions == 4
    assert list(frames.read()["index"] // PART_ROWS) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_syncing_again_changes_nothing(archive: Archive, catalog: Mirror, client: Any, tiled_server: RunningTiled, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(10))
    catalog.step()
    node = client[folder.name][KEY]
    before = node["classes"].data_sources()[0].id
    again = mirror_archive(tiled_server.uri, tiled_server.api_key, folder, parent=f"tests/{folder.name}")
    assert again.step()
    write(archive, range(10, 20))
    again.announce(folder / KEY)
    assert again.step()
    catalog.announce(folder / KEY)
    assert catalog.step()
    again.close(0)
    node = client[folder.name][KEY]
    assert node["classes"].data_sources()[0].id == before
    check_images(node, list(range(20)))
    assert list(node["frames"].read()["index"]) == list(range(20))


def test_subscribers_hear_of_growth_and_can_fetch_it(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(5))
    catalog.step()
    heard: list[Any] = []
    enough = threading.Event()

    def hear(update: Any) -> None:
        heard.append((update.type, tuple(update.patch.offset), update.data()))
        if len(heard) == 2:
            enough.set()

    subscription = client[folder.name][f"{KEY}/classes"].subscribe()
    subscription.new_data.add_callback(hear)
    subscription.start_in_thread()
    for first in (5, 12):
        write(archive, range(first, first + 7))
        catalog.step()
    assert enough.wait(30)
    subscription.disconnect()
    assert [(kind, offset) for kind, offset, _ in heard] == [("array-ref", (5, 0, 0)), ("array-ref", (12, 0, 0))]
    np.testing.assert_array_equal(heard[1][2], [make_result(index).classes for index in range(12, 19)])


def test_the_image_of_the_sample_is_read_through_tiled_as_the_canvas_grows(
    archive: Archive, catalog: Mirror, client: Any, folder: Path
) -> None:
    archive.begin(make_run())
    write(archive, range(3))
    catalog.step()
    assert "mosaic" not in client[folder.name][KEY]
    for serial, shape in ((1, (30, 20)), (2, (50, 45)), (3, (40, 60))):
        image = make_image(shape, serial=serial, origin=(-1e-6 * serial, 2e-6))
        archive.note(image)
        if serial == 2:  # a reader that comes before Tiled was told gets the image that is on disk
            assert client[folder.name][KEY]["mosaic/phase"].read().shape == shape
        assert catalog.step()
        mosaic = client[folder.name][KEY]["mosaic"]
        assert {"amplitude", "phase", "object", "light", "uncertainty"} <= set(mosaic)
        np.testing.assert_array_equal(mosaic["object"].read(), image.object)
        np.testing.assert_array_equal(mosaic["phase"].read(), np.angle(image.object))
        np.testing.assert_allclose(mosaic["y"].read(), image.origin[0] + 2e-8 * np.arange(shape[0]))
        assert mosaic.metadata["serial"] == mosaic["light"].metadata["serial"] == serial
        assert list(mosaic.metadata["origin"]) == list(mosaic["light"].metadata["origin"]) == list(image.origin)
        assert (mosaic.metadata["unit"], mosaic.metadata["resolution"]) == ("m", 4.5e-8)
        assert list(mosaic.metadata["axes"]) == mosaic["light"].metadata["dims"] == ["y", "x"]


def test_the_final_image_reaches_tiled_after_its_run_has_ended(
    archive: Archive, catalog: Mirror, client: Any, tiled_server: RunningTiled, folder: Path
) -> None:
    archive.begin(make_run())
    write(archive, range(3))
    archive.note(make_image())
    end(archive)
    catalog.step()
    again = mirror_archive(tiled_server.uri, tiled_server.api_key, folder, parent=f"tests/{folder.name}")  # a daemon that was started anew
    archive.note(make_image((50, 50), seed=1, serial=2, final=True))
    assert again.step()
    again.close(0)
    run = client[folder.name][KEY]
    assert run["mosaic"].metadata["final"]
    assert (run.metadata["status"], run.metadata["mosaic"]["serial"]) == ("complete", 2)
    np.testing.assert_array_equal(run["mosaic/light"].read(), make_image((50, 50), seed=1).light)


def test_who_subscribes_to_a_run_hears_of_each_new_image(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(3))
    archive.note(make_image())
    catalog.step()
    heard: list[Any] = []
    enough = threading.Event()

    def hear(update: Any) -> None:
        heard.append((update.key, update.metadata["serial"]))
        if len(heard) == 2:
            enough.set()

    subscription = client[folder.name][KEY].subscribe()
    subscription.child_metadata_updated.add_callback(hear)
    subscription.start_in_thread()
    for serial in (2, 3):
        archive.note(make_image(serial=serial))
        catalog.step()
    catalog.announce(folder / KEY)
    catalog.step()
    assert enough.wait(30)
    subscription.disconnect()
    assert heard == [("mosaic", 2), ("mosaic", 3)]


MOSAIC_READER = """
import sys, json
from tiled.client import from_uri
uri, key, path = sys.argv[1:]
run = from_uri(uri, api_key=key)[path]
for line in sys.stdin:
    light = run["mosaic/light"]
    print(json.dumps([light.metadata["serial"], float(light.read().sum())]), flush=True)
"""


def test_another_process_reads_each_new_image(archive: Archive, catalog: Mirror, tiled_server: RunningTiled, folder: Path) -> None:
    archive.begin(make_run())
    write(archive, range(3))
    archive.note(make_image())
    catalog.step()
    command = [sys.executable, "-c", MOSAIC_READER, tiled_server.uri, tiled_server.api_key, f"tests/{folder.name}/{KEY}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for serial in (1, 2, 3):
            image = make_image((40 + 10 * serial, 30), seed=serial, serial=serial)
            archive.note(image)
            catalog.step()
            reader.stdin.write("read\n")
            reader.stdin.flush()
            assert json.loads(reader.stdout.readline()) == [serial, pytest.approx(float(image.light.sum()))]
        reader.stdin.close()


READER = """
import sys, json
import numpy as np
from tiled.client import from_uri
uri, key, path = sys.argv[1:]
node = from_uri(uri, api_key=key)[path]
for line in sys.stdin:
    classes, frames = node["classes"], node["frames"].read()
    last = classes[classes.shape[0] - 1]
    print(json.dumps([classes.shape[0], int(last.sum()), len(frames), float(frames["chi2"].iloc[-1])]), flush=True)
"""


def test_another_process_reads_the_run_while_it_is_written(
    archive: Archive, catalog: Mirror, tiled_server: RunningTiled, folder: Path
) -> None:
    archive.begin(make_run())
    write(archive, range(6))
    catalog.step()
    command = [sys.executable, "-c", READER, tiled_server.uri, tiled_server.api_key, f"tests/{folder.name}/{KEY}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reader:
        assert reader.stdin is not None
        assert reader.stdout is not None
        for extent in (6, 17, 18):
            if extent > 6:
                write(archive, range(extent - 11 if extent == 17 else 17, extent))
                catalog.step()
            reader.stdin.write("read\n")
            reader.stdin.flush()
            seen = json.loads(reader.stdout.readline())
            assert seen == [extent, int(make_result(extent - 1).classes.sum()), extent, pytest.approx(0.01 * (extent - 1))]
        reader.stdin.close()


def test_close_registers_the_last_of_a_run_that_the_thread_mirrors(
    archive: Archive, client: Any, tiled_server: RunningTiled, folder: Path
) -> None:
    catalog = mirror_archive(tiled_server.uri, tiled_server.api_key, folder, parent=f"tests/{folder.name}")
    catalog.start()
    archive.begin(make_run())
    for first in range(0, 40, 8):
        write(archive, range(first, first + 8))
        catalog.announce(folder / KEY)
    end(archive)
    catalog.announce(folder / KEY)
    assert catalog.close(30)
    node = client[folder.name][KEY]
    assert node.metadata["status"] == "complete"
    check_images(node, list(range(40)))


def test_a_tiled_that_starts_after_the_run_and_then_loses_its_memory_is_caught_up(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    catalog = mirror_archive(f"http://127.0.0.1:{port}", "secretofours", tmp_path / "archive")
    archive = Archive(tmp_path / "archive", make_prior(), PROVENANCE, catalog.announce, DRIFT, 8)
    request.addfinalizer(archive.close)
    archive.open()
    archive.begin(make_run("first-run"))
    archive.write([replace(make_result(index), run="first-run") for index in range(12)])
    assert not catalog.step()
    assert not catalog.up
    assert "start it" in catalog.error
    assert "secret" not in catalog.error
    archive.end(RunEnded("first-run", "end", 1_700_000_060.0))
    archive.begin(make_run())
    write(archive, range(4))
    for memory in ("first", "second"):  # the second is empty again, as a temporary catalog is
        with embedded_tiled(tmp_path / memory, [tmp_path], api_key="secretofours", port=port) as back:
            write(archive, range(4, 9))
            assert catalog.step()
            assert catalog.step()  # an empty Tiled is noticed by the first, compared with the archive by the second
            assert not catalog.pending()
            assert catalog.up
            with connected(back.uri, back.api_key) as root:
                runs = root["streamprior"]
                assert set(runs) == {run_key(make_run("first-run")), KEY}
                check_images(runs[run_key(make_run("first-run"))], list(range(12)))
                check_images(runs[KEY], list(range(9)))
                assert runs[run_key(make_run("first-run"))].metadata["status"] == "complete"
    catalog.close(0)


def test_files_that_tiled_may_not_read_are_told_with_the_remedy(tiled_server: RunningTiled, tmp_path: Path) -> None:
    catalog = mirror_archive(tiled_server.uri, tiled_server.api_key, tmp_path, parent="tests/unreadable")
    archive = Archive(tmp_path, make_prior(), PROVENANCE, catalog.announce, DRIFT, 8)
    archive.open()
    archive.begin(make_run())
    write(archive, range(3))
    assert catalog.step()
    assert not catalog.up
    assert "readable_storage" in catalog.error
    assert str(tmp_path) in catalog.error
    assert catalog.pending()
    archive.close()
    assert not catalog.close(0)


def test_one_unreadable_run_does_not_hold_up_the_others(archive: Archive, catalog: Mirror, client: Any, folder: Path) -> None:
    (folder / "99990101-000000-broken").mkdir()
    (folder / "99990101-000000-broken" / "run.json").write_text("{}")
    archive.begin(make_run())
    write(archive, range(3))
    assert catalog.step()
    assert "broken" in catalog.error
    check_images(client[folder.name][KEY], [0, 1, 2])


def test_probe_tells_a_right_key_from_a_wrong_one_and_from_no_server(tiled_server: RunningTiled) -> None:
    assert probe(tiled_server.uri, tiled_server.api_key) is None
    assert probe(f"{tiled_server.uri}/api/v1?api_key={tiled_server.api_key}", None) is None
    wrong = probe(tiled_server.uri, "not-the-key")
    assert wrong is not None
    assert "API key" in wrong
    assert "not-the-key" not in wrong
    nobody = probe("http://127.0.0.1:1?api_key=hidden", None)
    assert nobody is not None
    assert "start it" in nobody
    assert "hidden" not in nobody


def test_subscribers_of_the_latest_arrays_get_the_newest_result(client: Any, tiled_server: RunningTiled) -> None:
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/newest", max_hz=1000)
    live.open()
    live.begin(make_run())
    live.write([make_result(0)])
    heard: dict[str, Any] = {}
    both = threading.Event()

    def hear(update: Any) -> None:
        heard[update.subscription.segments[-1]] = update.data()
        if len(heard) == 2:
            both.set()

    latest = client["newest"]["latest"]
    subscriptions = [latest[name].subscribe() for name in ("classes", "object")]
    for subscription in subscriptions:
        subscription.new_data.add_callback(hear)
        subscription.start_in_thread()
    live.write([make_result(1), make_result(2)])
    assert both.wait(30)
    for subscription in subscriptions:
        subscription.disconnect()
    live.end(RunEnded(UID, "end", 1.0))
    live.close()
    np.testing.assert_array_equal(heard["classes"], make_result(2).classes)
    np.testing.assert_array_equal(heard["object"], make_result(2).object)
    np.testing.assert_array_equal(latest["object"].read(), make_result(2).object)
    assert latest["object"].metadata["run"] == UID


def test_latest_arrays_change_their_shape_with_the_prior_and_come_back_when_lost(client: Any, tiled_server: RunningTiled) -> None:
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/shapes", max_hz=1000)
    live.open()
    live.write([make_result(0)])
    live.close()
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/shapes", max_hz=1000)
    live.open()
    large = replace(make_result(1), classes=np.full((2000, 900), 7, np.uint8))
    live.write([large])
    classes = client["shapes"]["latest/classes"]
    assert (classes.shape, classes.metadata["stride"], classes.metadata["full_shape"]) == ((1000, 450), 2, [2000, 900])
    assert (classes.read() == 7).all()
    api = TiledApi(tiled_server.uri, tiled_server.api_key)
    api.delete("/metadata/tests/shapes/latest")
    api.close()
    with pytest.raises(SinkUnavailable):
        live.write([large])
    live.write([large])
    live.close()
    assert client["shapes"]["latest/classes"].shape == (1000, 450)


class Listener:
    """Puts a mosaic together from what its subscription hears, as a viewer does; `wait` returns when it shows an image."""

    def __init__(self, node: Any) -> None:
        self.canvas = node.read()
        self.blocks: list[tuple[int, ...]] = []
        self._news = threading.Condition()
        self._subscription = node.subscribe()
        self._subscription.new_data.add_callback(self._hear)
        self._subscription.start_in_thread()

    def _hear(self, update: Any) -> None:
        with self._news:
            row, column = update.offset or (TILE * update.block[0], TILE * update.block[1])
            rows, columns = row + TILE, column + TILE
            more = [(0, max(0, end - side)) for end, side in zip((rows, columns), self.canvas.shape, strict=True)]
            self.canvas = np.pad(self.canvas, more)
            self.canvas[row:rows, column:columns] = update.data()
            self.blocks.append((row // TILE, column // TILE))
            self._news.notify_all()

    def wait(self, wanted: np.ndarray) -> list[tuple[int, ...]]:
        """Until the canvas holds `wanted`; the blocks that were heard."""
        with self._news:
            assert self._news.wait_for(lambda: np.array_equal(self.canvas, wanted, equal_nan=True), 30)
            heard, self.blocks = self.blocks, []
            return heard

    def close(self) -> None:
        self._subscription.disconnect()


def on_tiles(image: MosaicImage, first: tuple[int, int], count: tuple[int, int]) -> np.ndarray:
    """The phase of an image of pixel 1 on a canvas of whole tiles, NaN where no light was."""
    canvas = np.full((TILE * count[0], TILE * count[1]), np.nan, np.float16)
    row, column = (int(image.origin[axis]) - TILE * first[axis] for axis in (0, 1))
    phase = np.where(image.light > 0, np.angle(image.object), np.nan)
    canvas[row : row + phase.shape[0], column : column + phase.shape[1]] = phase
    return canvas


def pixels(shape: tuple[int, int], origin: tuple[int, int], **changes: Any) -> MosaicImage:
    return make_image(shape, unit="px", pixel=(1.0, 1.0), origin=(float(origin[0]), float(origin[1])), **changes)


def test_subscribers_of_the_mosaic_get_the_tiles_that_changed(client: Any, tiled_server: RunningTiled) -> None:
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/tiles", max_hz=1000)
    live.open()
    image = pixels((700, 300), (-100, 20))
    live.note(image)
    live.note(Positions("detector", "6", {}))
    node = client["tiles"]["latest/mosaic_phase"]
    assert (node.shape, node.dtype, node.dims) == ((3 * TILE, TILE), np.float16, ("y", "x"))
    assert node.dtype.itemsize * TILE * TILE < MESSAGE_BYTES
    np.testing.assert_array_equal(node.read(), on_tiles(image, (-1, 0), (3, 1)))
    assert (node.metadata["origin"], node.metadata["tile"], node.metadata["run"]) == ([-TILE, 0.0], [TILE, TILE], UID)
    listener = Listener(node)
    changed = image.object.copy()
    changed[650:660, 10:20] *= -1
    second = replace(image, object=changed, serial=2)
    live.note(second)
    assert listener.wait(on_tiles(second, (-1, 0), (3, 1))) == [(2, 0)]
    live.note(replace(second, serial=3))  # nothing new
    third = replace(second, object=-changed)
    live.note(third)
    assert listener.wait(on_tiles(third, (-1, 0), (3, 1))) == [(0, 0), (1, 0), (2, 0)]
    listener.close()
    live.close()


def test_a_growing_mosaic_keeps_its_subscribers_whichever_way_it_grows(client: Any, tiled_server: RunningTiled) -> None:
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/growing", max_hz=1000)
    live.open()
    live.note(pixels((200, 200), (10, 10)))
    node = client["growing"]["latest/mosaic_phase"]
    listener = Listener(node)
    for image, first, count, heard in (
        (pixels((600, 200), (10, 10), serial=2), (0, 0), (2, 1), {(0, 0), (1, 0)}),
        (pixels((600, 300), (10, -90), serial=3), (0, -1), (2, 2), {(0, 0), (0, 1), (1, 0), (1, 1)}),
        (pixels((100, 100), (10, 10), serial=4), (0, -1), (2, 2), None),
        (pixels((100, 100), (7000, 10), run="another"), (13, 0), (2, 2), None),
    ):
        live.note(image)
        blocks = listener.wait(on_tiles(image, first, count))
        assert heard is None or set(blocks) == heard
        node = client["growing"]["latest/mosaic_phase"]
        np.testing.assert_array_equal(node.read(), on_tiles(image, first, count))
        assert node.metadata["origin"] == [TILE * first[0], TILE * first[1]]
    assert node.metadata["run"] == "another"
    listener.close()
    live.close()


def test_a_mosaic_that_tiled_lost_is_sent_again_whole(client: Any, tiled_server: RunningTiled) -> None:
    live = LatestArrays(tiled_server.uri, tiled_server.api_key, parent="tests/lost", max_hz=1000)
    live.open()
    image = pixels((100, 100), (0, 0))
    live.note(image)
    api = TiledApi(tiled_server.uri, tiled_server.api_key)
    api.delete("/metadata/tests/lost/latest")
    api.close()
    newer = replace(image, object=-image.object)
    with pytest.raises(SinkUnavailable):
        live.note(newer)
    live.note(newer)
    live.close()
    np.testing.assert_array_equal(client["lost"]["latest/mosaic_phase"].read(), on_tiles(newer, (0, 0), (1, 1)))


def test_an_image_is_thinned_by_the_smallest_stride_that_fits() -> None:
    assert thinning(np.zeros((104, 104), np.complex64)) == 1
    assert thinning(np.zeros((1000, 900), np.uint8)) == 1
    assert thinning(np.zeros((1000, 901), np.uint8)) == 2
    assert thinning(np.zeros((1062, 1028), np.complex64)) == 4
