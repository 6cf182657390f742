"""The archive: results by frame index on disk, whatever order they come in and whatever ends the process."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from streamprior.errors import SinkUnavailable
from streamprior.prior import Geometry, Prior, freeze
from streamprior.records import Detector, Flag, Positions, Result, RunEnded, RunStarted
from streamprior.sinks.archive import ENDED_RUNS, LATE_POSITIONS, Archive, read_about, read_run, run_folders, run_key
from streamprior.sinks.mosaic_file import MOSAIC_FILE, read_mosaic, summary
from streamprior.sinks.rows import NO_ORIGIN, OPEN_PARTS, PART_ROWS
from tests.test_mosaic_file import make_image

HEIGHT, WIDTH = 24, 20
NAMES = ("background", "ring", "core")
DRIFT = ("flux", "centre_row")
PROVENANCE = {"prior": "ab" * 32, "version": "0.1.0", "device": "cpu"}


def make_prior() -> Prior:
    support = np.zeros((HEIGHT, WIDTH), bool)
    support[9:15, 8:12] = True
    return freeze(
        Prior(
            geometry=Geometry((HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2), (HEIGHT, WIDTH)),
            normaliser=1.0,
            feature_mean=np.zeros(9, np.float32),
            feature_scale=np.ones(9, np.float32),
            pca_components=np.eye(6, 9, dtype=np.float32),
            centroids=np.zeros((3, 6), np.float32),
            class_names=NAMES,
            reference=np.zeros((HEIGHT, WIDTH), np.uint8),
            support=support,
            invalid=np.zeros((HEIGHT, WIDTH), bool),
        )
    )


def make_result(index: int, run: str = "uid-0001-abcdef", salt: int = 0) -> Result:
    random = np.random.default_rng((index, salt))
    return Result(
        run=run,
        index=index,
        classes=random.integers(0, 3, (HEIGHT, WIDTH)).astype(np.uint8),
        object=(random.standard_normal((14, 12)) + 1j * random.standard_normal((14, 12))).astype(np.complex64),
        counts=np.zeros((HEIGHT, WIDTH), np.float32),
        received=1000.0 + index,
        detector_time=None if index % 2 else 999.0 + index,
        position=(1e-6 * index, 2e-6) if index % 3 else None,
        origin=None if index % 2 else 2 * index,
        class_distance=0.5,
        chi2=0.01 * index,
        chi2_floor=0.001,
        r_factor=0.1,
        free_llk=1.2,
        unit=index % 5,
        distance=0.25,
        arm="prototype",
        flags=32,
        iou={"ring": 0.9, "core": 0.8},
        iou_previous={"ring": 0.99},
        drift={"flux": float(index)},
    )


def make_run(uid: str = "uid-0001-abcdef", expected: int | None = None) -> RunStarted:
    return RunStarted(uid, "detector", "6", 1_700_000_000.0, expected, Detector(), {"sample": "gold", "offset": float("nan"), "blob": b"x"})


def ignore(folder: Path) -> None:
    """Nobody listens for growth."""


def make_archive(folder: Path, chunk_frames: int = 8) -> Archive:
    return Archive(folder, make_prior(), PROVENANCE, ignore, DRIFT, chunk_frames)


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[Archive]:
    """An open archive in tmp_path / "disk"."""
    one = make_archive(tmp_path / "disk")
    one.open()
    yield one
    one.close()


def write_run(folder: Path, batches: list[list[int]], expected: int | None = None) -> Path:
    archive = make_archive(folder)
    archive.open()
    archive.begin(make_run(expected=expected))
    for batch in batches:
        archive.write([make_result(index) for index in batch])
    archive.end(RunEnded("uid-0001-abcdef", "end", 1_700_000_060.0))
    archive.close()
    (run,) = run_folders(folder)
    return run


@pytest.mark.parametrize("expected", [None, 5, 30, 1000])
def test_results_come_back_by_index_whatever_their_order(tmp_path: Path, expected: int | None) -> None:
    order = np.random.default_rng(1).permutation(30)
    batches = [[int(index) for index in part] for part in np.array_split(order, 7)]
    run = read_run(write_run(tmp_path, batches, expected))
    assert run.about["status"] == "complete"
    assert (run.about["frames"], run.about["extent"]) == (30, 30)
    assert run.classes.shape == (30, HEIGHT, WIDTH)
    assert run.objects.shape == (30, 14, 12)
    for index in range(30):
        np.testing.assert_array_equal(run.classes[index], make_result(index).classes)
        np.testing.assert_array_equal(run.objects[index], make_result(index).object)
    assert run.frames["index"].to_pylist() == list(range(30))


def test_a_missing_frame_is_told_by_fill_values_and_an_absent_row(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, [[0, 1, 2], [5, 19]]))
    assert run.about["frames"] == 5
    assert run.about["extent"] == 20
    assert run.frames["index"].to_pylist() == [0, 1, 2, 5, 19]
    missing = [index for index in range(20) if index not in (0, 1, 2, 5, 19)]
    assert (run.classes[missing] == 255).all()
    assert np.isnan(run.objects[missing]).all()
    np.testing.assert_array_equal(run.classes[19], make_result(19).classes)


def test_a_repeated_index_replaces_its_row_and_its_image(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(6)])
    archive.write([make_result(index) for index in range(6)])
    archive.write([replace(make_result(3, salt=1), chi2=7.0)])
    run = read_run(tmp_path / "disk" / run_key(make_run()))
    assert run.about["frames"] == 6
    assert run.frames["index"].to_pylist() == list(range(6))
    assert run.frames["chi2"].to_pylist()[3] == 7.0
    np.testing.assert_array_equal(run.classes[3], make_result(3, salt=1).classes)
    np.testing.assert_array_equal(run.classes[4], make_result(4).classes)


def test_a_chunk_and_a_part_that_left_memory_are_completed_by_late_frames(tmp_path: Path) -> None:
    first = [0, 8, 16, 24, 32, 40, 48, 56]  # eight chunks of eight, four of them in memory
    far = [PART_ROWS * part + 1 for part in range(1, 7)]  # six more parts of the table
    run = read_run(write_run(tmp_path, [first, far, [3, 12], [PART_ROWS + 2]]))
    written = sorted([*first, *far, 3, 12, PART_ROWS + 2])
    assert run.frames["index"].to_pylist() == written
    for index in written:
        np.testing.assert_array_equal(run.classes[index], make_result(index).classes)


def test_every_number_of_a_result_has_its_column(tmp_path: Path) -> None:
    frames = read_run(write_run(tmp_path, [[4, 5]])).frames
    four, five = frames.to_pylist()
    assert (four["origin"], five["origin"]) == (8, NO_ORIGIN)
    assert four["detector_time"] == 1003.0
    assert np.isnan(five["detector_time"])
    assert (four["position_x"], four["position_y"]) == (4e-6, 2e-6)
    assert four["chi2"] == 0.04
    assert (four["arm"], four["unit"], four["flags"]) == ("prototype", 4, 32)
    assert (four["iou_ring"], four["iou_core"], four["iou_previous_ring"]) == (0.9, 0.8, 0.99)
    assert np.isnan(four["iou_background"])
    assert four["flux"] == 4.0
    assert np.isnan(four["centre_row"])
    assert four["published"] > four["received"]


def test_run_json_tells_what_ran_and_how_it_ended(tmp_path: Path) -> None:
    about = read_about(write_run(tmp_path, [[0]], expected=10))
    assert about["provenance"] == PROVENANCE
    assert (about["expected"], about["source"], about["series"], about["end_reason"]) == (10, "detector", "6", "end")
    assert about["metadata"] == {"sample": "gold", "offset": None, "blob": "b'x'"}
    assert about["object_offset"] == [5, 4]


def test_a_run_cut_short_by_shutdown_is_not_called_complete(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.end(RunEnded("uid-0001-abcdef", "shutdown", 1.0))
    run = read_run(tmp_path / "disk" / run_key(make_run()))
    assert (run.about["status"], run.about["end_reason"]) == ("interrupted", "shutdown")
    assert run.classes.shape == (0, HEIGHT, WIDTH)


def test_runs_that_overlap_in_time_go_to_their_own_folders(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run("first-aa"))
    archive.begin(make_run("other-bb"))
    archive.write([make_result(0, "first-aa"), make_result(1, "other-bb"), make_result(1, "first-aa")])
    assert read_run(tmp_path / "disk" / run_key(make_run("first-aa"))).frames["index"].to_pylist() == [0, 1]
    assert read_run(tmp_path / "disk" / run_key(make_run("other-bb"))).frames["index"].to_pylist() == [1]


def test_growth_is_told_after_every_write_and_at_the_end(tmp_path: Path) -> None:
    extents: list[int] = []
    archive = Archive(tmp_path, make_prior(), {}, lambda folder: extents.append(read_about(folder)["extent"]), (), 8)
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(0)])
    archive.write([make_result(9)])
    archive.end(RunEnded("uid-0001-abcdef", "idle", 1.0))
    archive.close()
    assert extents == [1, 10, 10]


def test_begin_again_continues_the_run(tmp_path: Path) -> None:
    write_run(tmp_path, [[0, 1, 2], [9]])
    archive = make_archive(tmp_path)
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(3)])
    archive.close()
    run = read_run(tmp_path / run_key(make_run()))
    assert (run.about["frames"], run.about["extent"], run.about["status"]) == (5, 10, "running")
    for index in (0, 1, 2, 3, 9):
        np.testing.assert_array_equal(run.classes[index], make_result(index).classes)


def test_a_table_that_an_earlier_version_began_is_continued(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [[0, 1, 5]])
    part = folder / "frames" / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["iou_ring", "arm"]), part, compression="zstd")
    archive = make_archive(tmp_path)
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(3)])
    archive.close()
    frames = read_run(folder).frames
    assert frames["index"].to_pylist() == [0, 1, 3, 5]
    assert frames["chi2"].to_pylist() == [0.0, 0.01, 0.03, 0.05]
    assert frames["arm"].to_pylist() == ["", "", "prototype", ""]
    assert np.isnan(frames["iou_ring"].to_numpy()).tolist() == [True, True, False, True]


def test_frames_that_were_not_refined_have_no_object_whatever_they_carry(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.write([without(index) for index in range(20)])
    folder = tmp_path / "disk" / run_key(make_run())
    assert [path.name for path in (folder / "objects").iterdir()] == ["zarr.json"]
    archive.write([make_result(9)])
    run = read_run(folder)
    np.testing.assert_array_equal(run.objects[9], make_result(9).object)
    assert np.isnan(np.delete(run.objects, 9, 0)).all()
    np.testing.assert_array_equal(run.classes[3], make_result(3).classes)


def test_two_writers_in_one_archive_are_refused(tmp_path: Path) -> None:
    first, second = make_archive(tmp_path), make_archive(tmp_path)
    first.open()
    with pytest.raises(SinkUnavailable, match="another streamprior"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_a_file_where_the_folder_should_be_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SinkUnavailable, match=r"file.*name a folder"):
        make_archive(tmp_path / "file" / "archive").open()


def test_a_full_disk_is_unavailable_and_the_same_batch_goes_in_later(
    archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(5)])
    batch = [make_result(index) for index in range(5, 12)]
    rename = Path.replace

    def full(path: Path, target: Path) -> Path:
        if "objects" in str(target):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        for _ in range(2):
            with pytest.raises(SinkUnavailable, match=r"No space left.*free space"):
                archive.write(batch)
    assert read_run(tmp_path / "disk" / run_key(make_run())).about["frames"] == 5
    archive.write(batch)
    run = read_run(tmp_path / "disk" / run_key(make_run()))
    assert run.frames["index"].to_pylist() == list(range(12))
    for index in range(12):
        np.testing.assert_array_equal(run.objects[index], make_result(index).object)


def test_a_vanished_folder_is_unavailable_and_not_made_again(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.write([make_result(0)])
    (tmp_path / "disk").rename(tmp_path / "away")
    with pytest.raises(SinkUnavailable, match="mount the disk"):
        archive.write([make_result(1)])
    assert not (tmp_path / "disk").exists()
    (tmp_path / "away").rename(tmp_path / "disk")
    archive.write([make_result(1)])
    assert read_run(tmp_path / "disk" / run_key(make_run())).frames["index"].to_pylist() == [0, 1]


def test_the_newest_image_of_the_sample_lies_beside_its_frames(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.write([make_result(0)])
    archive.note(make_image((20, 20)))
    archive.note(make_image((30, 25), serial=2))
    archive.write([make_result(1)])
    folder = tmp_path / "disk" / run_key(make_run())
    np.testing.assert_array_equal(read_mosaic(folder / MOSAIC_FILE).object, make_image((30, 25)).object)
    about = read_about(folder)
    assert about["mosaic"] == summary(make_image((30, 25), serial=2))
    assert about["frames"] == 2
    archive.end(RunEnded("uid-0001-abcdef", "end", 1.0))
    assert read_about(folder)["mosaic"]["serial"] == 2


def test_an_image_that_comes_after_its_run_has_ended_is_kept_and_told(tmp_path: Path) -> None:
    told: list[Path] = []
    archive = Archive(tmp_path, make_prior(), {}, told.append, DRIFT, 8)
    archive.open()
    for number in range(ENDED_RUNS + 1):
        archive.begin(make_run(f"{number:02d}-run"))
        archive.end(RunEnded(f"{number:02d}-run", "end", 1.0))
    told.clear()
    last = tmp_path / run_key(make_run(f"{ENDED_RUNS:02d}-run"))
    archive.note(make_image(run=f"{ENDED_RUNS:02d}-run", final=True))
    assert told == [last]
    about = read_about(last)
    assert (about["status"], about["mosaic"]["final"]) == ("complete", True)
    archive.note(make_image(run="00-run"))  # too long ago
    archive.note(make_image(run="never-heard-of"))
    assert told == [last]
    assert [path.parent for path in tmp_path.rglob("*.nxs")] == [last]
    archive.close()


def test_positions_alone_leave_no_trace(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    folder = tmp_path / "disk" / run_key(make_run())
    before = read_about(folder)
    archive.note(Positions("detector", "6", {0: (1.0, 2.0)}, "uid-0001-abcdef"))
    assert read_about(folder) == before


def rows_of(folder: Path, *indices: int) -> list[tuple[float, float, int]]:
    """(x, y, flags) of these frames as the table on disk has them."""
    table = read_run(folder).frames
    rows = dict(zip(table["index"].to_pylist(), zip(*(table[name].to_pylist() for name in COLUMNS), strict=True), strict=True))
    return [rows[index] for index in indices]


COLUMNS = ("position_x", "position_y", "flags")
WITHOUT = Flag.NOT_REFINED | Flag.NO_POSITION


def without(index: int) -> Result:
    return replace(make_result(index), position=None, flags=int(WITHOUT))


def note(archive: Archive, positions: dict[int, tuple[float, float]], run: str = "uid-0001-abcdef") -> None:
    archive.note(Positions("detector", "6", positions, run))


def test_a_late_position_goes_into_the_row_of_its_frame_and_the_flag_goes_out(tmp_path: Path) -> None:
    told: list[Path] = []
    archive = Archive(tmp_path, make_prior(), PROVENANCE, told.append, DRIFT, 8)
    archive.open()
    archive.begin(make_run())
    archive.write([without(index) for index in range(3)])
    told.clear()
    note(archive, {1: (4e-6, -5e-6)})
    folder = tmp_path / run_key(make_run())
    assert told == [folder]
    (x, y, flags), located, (_, _, last) = rows_of(folder, 0, 1, 2)
    assert located == (4e-6, -5e-6, Flag.NOT_REFINED)
    assert math.isnan(x)
    assert math.isnan(y)
    assert flags == last == WITHOUT
    assert read_run(folder).frames.num_rows == read_about(folder)["frames"] == 3
    archive.close()


def test_late_positions_reach_parts_that_are_long_on_disk(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    far = [part * PART_ROWS + 7 for part in range(OPEN_PARTS + 3)]
    archive.write([without(index) for index in far])
    note(archive, {index: (1e-9 * index, 0.0) for index in (*far, 3)})
    folder = tmp_path / "disk" / run_key(make_run())
    assert rows_of(folder, *far) == [(1e-9 * index, 0.0, Flag.NOT_REFINED) for index in far]
    assert read_run(folder).frames.num_rows == len(far)


def test_a_position_waits_for_the_row_of_its_frame_and_outlives_a_repeated_write(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    note(archive, {0: (1.0, 2.0), 5: (3.0, 4.0)})
    folder = tmp_path / "disk" / run_key(make_run())
    archive.write([without(0), without(1)])
    archive.write([without(5)])
    archive.write([without(5), without(0)])
    first, (x, _, flags), third = rows_of(folder, 0, 1, 5)
    assert (first, third) == ((1.0, 2.0, Flag.NOT_REFINED), (3.0, 4.0, Flag.NOT_REFINED))
    assert math.isnan(x)
    assert flags == WITHOUT


def test_of_positions_that_no_frame_asks_for_only_the_newest_are_kept(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    note(archive, {index: (1.0, 2.0) for index in range(LATE_POSITIONS + 1)})
    archive.write([without(0), without(LATE_POSITIONS)])
    folder = tmp_path / "disk" / run_key(make_run())
    (x, _, flags), newest = rows_of(folder, 0, LATE_POSITIONS)
    assert newest == (1.0, 2.0, Flag.NOT_REFINED)
    assert math.isnan(x)
    assert flags == WITHOUT


def test_positions_of_a_run_that_is_over_or_unknown_change_nothing(archive: Archive, tmp_path: Path) -> None:
    archive.begin(make_run())
    archive.write([without(0)])
    archive.end(RunEnded("uid-0001-abcdef", "end", 1.0))
    note(archive, {0: (1.0, 2.0)})
    note(archive, {0: (1.0, 2.0)}, "never-heard-of")
    assert rows_of(tmp_path / "disk" / run_key(make_run()), 0)[0][2] == WITHOUT


def test_positions_for_which_the_disk_has_no_room_go_in_later(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.begin(make_run())
    archive.write([without(0)])

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(SinkUnavailable, match="free space"):
            note(archive, {0: (1.0, 2.0)})
    note(archive, {0: (1.0, 2.0)})
    assert rows_of(tmp_path / "disk" / run_key(make_run()), 0) == [(1.0, 2.0, Flag.NOT_REFINED)]


def test_a_run_that_is_continued_keeps_its_image(tmp_path: Path) -> None:
    for _ in range(2):
        archive = make_archive(tmp_path)
        archive.open()
        archive.begin(make_run())
        if not (tmp_path / run_key(make_run()) / MOSAIC_FILE).exists():
            archive.note(make_image())
        archive.close()
    assert read_about(tmp_path / run_key(make_run()))["mosaic"]["serial"] == 1


def test_an_image_for_which_the_disk_has_no_room_goes_in_later(archive: Archive, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive.begin(make_run())
    archive.note(make_image())
    folder = tmp_path / "disk" / run_key(make_run())

    def full(file: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("streamprior.sinks.chunks.os.write", full)
        with pytest.raises(SinkUnavailable, match=r"No space left.*free space"):
            archive.note(make_image(serial=2))
    assert read_mosaic(folder / MOSAIC_FILE).serial == read_about(folder)["mosaic"]["serial"] == 1
    archive.note(make_image(serial=2))
    assert read_mosaic(folder / MOSAIC_FILE).serial == read_about(folder)["mosaic"]["serial"] == 2


def test_a_recipe_without_objects_leaves_no_array_of_them(tmp_path: Path) -> None:
    archive = Archive(tmp_path, make_prior(), {}, ignore, DRIFT, 8, objects=False)
    archive.open()
    archive.begin(make_run())
    archive.write([replace(make_result(index), object=np.empty((0, 0), np.complex64)) for index in range(3)])
    archive.end(RunEnded("uid-0001-abcdef", "end", 1.0))
    archive.close()
    (folder,) = run_folders(tmp_path)
    assert not (folder / "objects").exists()
    run = read_run(folder)
    assert list(run.about["arrays"]) == ["classes"]
    assert len(run.objects) == 0
    np.testing.assert_array_equal(run.classes[2], make_result(2).classes)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.test_archive import make_archive, make_result, make_run
archive = make_archive(Path(sys.argv[1]))
archive.open()
archive.begin(make_run())
index = 0
while True:
    archive.write([make_result(index + step) for step in range(3)])
    index += 3
    sys.stdout.write(f"{index}\\n")
    sys.stdout.flush()
"""


def test_a_killed_writer_leaves_whole_chunks_and_whole_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parents[1])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        told = 0
        for line in writer.stdout:
            told = int(line)
            if told >= 60:
                os.kill(writer.pid, signal.SIGKILL)
                break
        told = max([told, *(int(line) for line in writer.stdout)])
    (folder,) = run_folders(tmp_path)
    run = read_run(folder)
    assert run.about["status"] == "running"
    assert run.about["frames"] >= told  # what a write returned for is there
    indices = run.frames["index"].to_pylist()
    assert indices == list(range(len(indices)))
    for index in range(run.about["extent"]):
        np.testing.assert_array_equal(run.classes[index], make_result(index).classes)
        np.testing.assert_array_equal(run.objects[index], make_result(index).object)

    (folder / "objects" / "left.partial").write_bytes(b"half a chunk")
    grown: list[Path] = []
    archive = Archive(tmp_path, make_prior(), {}, grown.append, DRIFT, 8)
    archive.open()
    assert json.loads((folder / "run.json").read_text())["status"] == "interrupted"
    assert grown == [folder]
    assert not list(tmp_path.rglob("*.partial"))
    archive.close()
