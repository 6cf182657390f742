"""A disk that fills, is read-only or goes away under the archive: real small disks, mounted for each test where that is allowed."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from streamprior.config import Config
from streamprior.errors import DiskFull, SinkUnavailable
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.outbox import Outbox
from streamprior.preflight import Finding, inspect
from streamprior.prior import save_prior
from streamprior.records import Flag, RunEnded
from streamprior.sinks.archive import Archive, frame_bytes, read_run, run_folders, run_key
from streamprior.sinks.space import SpaceWatch
from tests.builders import diffraction, small_prior
from tests.test_archive import DRIFT, PROVENANCE, ignore, make_archive, make_prior, make_result, make_run
from tests.test_cli import streamprior
from tests.test_daemon import daemon
from tests.test_path import series

UID = "uid-0001-abcdef"
KEY = run_key(make_run())
MIB = 2**20


def mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"this process may not mount: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 2 MiB."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, left: int) -> Path:
    """A file that leaves so many bytes free, in whole pages; freeing it gives the room back."""
    ballast = disk / "ballast"
    ballast.unlink(missing_ok=True)
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    ballast.write_bytes(bytes(max(0, free - left)))
    return ballast


def write_until_full(archive: Archive, first: int = 0) -> tuple[int, list[Any]]:
    """(frames that went in, the batch that did not)."""
    index = first
    while True:
        batch = [make_result(index + step) for step in range(3)]
        try:
            archive.write(batch)
        except DiskFull:
            return index, batch
        index += 3


def check_frames(folder: Path, indices: list[int]) -> None:
    run = read_run(folder)
    assert run.frames["index"].to_pylist() == indices
    assert run.about["frames"] == len(indices)
    for index in indices:
        np.testing.assert_array_equal(run.classes[index], make_result(index).classes)
        np.testing.assert_array_equal(run.objects[index], make_result(index).object)


def test_a_disk_is_short_then_full_then_has_room_again_and_each_is_told_once(disk: Path) -> None:
    shortage: list[bool] = []
    space = SpaceWatch(disk, MIB, MIB // 4, shortage.append)
    with capture_logs() as logs:
        space.look()
        assert (space.level, space.short, space.full) == (0, False, False)
        assert space.free_bytes == 2 * MIB
        ballast = fill(disk, MIB // 2)
        space.look()
        space.look()
        assert (space.short, space.full) == (True, False)
        fill(disk, MIB // 8)
        space.look()
        assert (space.short, space.full) == (True, True)
        with pytest.raises(DiskFull, match=r"less than 0.25 MiB.*free space"):
            space.check()
        ballast.unlink()
        space.look()
        space.check()
        assert space.level == 0
    assert shortage == [True, False], "who can leave something out hears of it once"
    assert [line["log_level"] for line in logs] == ["error", "error", "info"]
    assert ["nearly full" in line["event"] for line in logs] == [True, False, False]


def test_a_limit_that_is_just_reached_again_does_not_ring_again(disk: Path) -> None:
    space = SpaceWatch(disk, short_bytes=MIB, full_bytes=0)
    with capture_logs() as logs:
        for left in (MIB - 8192, MIB + 8192, MIB - 8192, MIB + 8192):
            fill(disk, left)
            space.look()
    assert (space.short, len(logs)) == (True, 1)


def test_a_run_that_will_not_fit_is_told_when_it_begins(disk: Path, tmp_path: Path) -> None:
    space = SpaceWatch(disk, 0, 0)
    archive = Archive(disk / "archive", make_prior(), PROVENANCE, ignore, DRIFT, 8, space=space)
    archive.open()
    few, many = MIB // frame_bytes(make_prior(), True), 3 * MIB // frame_bytes(make_prior(), True)
    with capture_logs() as logs:
        archive.begin(make_run("few", few))
        assert not logs
        archive.begin(make_run("many", many))
    archive.close()
    (line,) = logs
    assert "too small for this run" in line["event"]
    assert line["needed_bytes"] > line["free_bytes"] > 0


def test_the_estimate_of_a_frame_is_on_the_safe_side(tmp_path: Path) -> None:
    archive = make_archive(tmp_path, chunk_frames=64)
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(256)])
    archive.close()
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    # The worst there is: random maps of three classes (2 bits a pixel) and random objects, which hardly shrink.
    assert taken / 256 < 1.5 * frame_bytes(make_prior(), True)


@pytest.mark.parametrize("left", [0, 4096, 3 * 4096, 8 * 4096, 40 * 4096])
def test_on_a_full_disk_every_file_stays_whole_and_writing_goes_on_when_there_is_room(disk: Path, left: int) -> None:
    archive = make_archive(disk / "archive")
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(12)])
    ballast = fill(disk, left)
    told, batch = write_until_full(archive, 12)
    with pytest.raises(DiskFull, match="free space on that disk"):
        archive.write(batch)
    assert not list(disk.rglob("*.partial")), "half a file takes room that nobody has"
    folder = disk / "archive" / KEY
    check_frames(folder, list(range(told)))
    ballast.unlink()
    archive.write(batch)
    archive.end(RunEnded(UID, "end", 1.0))
    archive.close()
    check_frames(folder, list(range(told + 3)))


@pytest.mark.parametrize("left", [0, 4096, 2 * 4096, 3 * 4096, 4 * 4096, 5 * 4096])
def test_a_run_begins_on_a_full_disk_as_soon_as_there_is_room(disk: Path, left: int) -> None:
    archive = make_archive(disk / "archive")
    archive.open()
    ballast = fill(disk, left)
    try:  # with the last of these it begins, and the first frames are refused
        archive.begin(make_run())
    except DiskFull:
        assert left < 5 * 4096
    else:
        write_until_full(archive)
    ballast.unlink()
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(20)])
    archive.close()
    check_frames(disk / "archive" / KEY, list(range(20)))


def test_frames_that_were_given_up_leave_no_row_behind_and_those_after_them_are_right(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(5)])
    ballast = fill(disk, 0)
    told, lost = write_until_full(archive, 5)
    ballast.unlink()
    after = range(lost[-1].index + 1, lost[-1].index + 30)
    archive.write([make_result(index) for index in after])
    archive.end(RunEnded(UID, "end", 1.0))
    archive.close()
    check_frames(disk / "archive" / KEY, [*range(told), *after])


def test_rows_for_which_there_was_no_room_do_not_come_with_later_ones_when_they_were_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_archive(tmp_path / "archive")
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(index) for index in range(4)])

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("pyarrow.parquet.write_table", full)
        with pytest.raises(DiskFull):
            archive.write([make_result(index) for index in range(4, 8)])
    archive.write([make_result(index) for index in range(8, 12)])
    archive.close()
    check_frames(tmp_path / "archive" / KEY, [0, 1, 2, 3, 8, 9, 10, 11])


def test_check_tells_that_a_recording_will_not_fit(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    monkeypatch.setattr("streamprior.preflight._LEAST_FREE_BYTES", 0)

    def finding(frames: int) -> Finding:
        np.save(tmp_path / "frames.npy", np.zeros((frames, 32, 32), np.uint16))
        config = Config(
            prior=tmp_path / "prior.h5",
            source={"kind": "file", "path": tmp_path / "frames.npy"},
            archive={"folder": disk, "short_mb": 0, "full_mb": 1},
        )
        return next(one for one in inspect(config) if one.what == "archive")

    assert finding(100).fine
    assert "frames at least" in finding(100).sentence
    too_many = finding(3000)
    assert not too_many.fine
    assert "the source has 3000" in too_many.sentence


def test_a_disk_below_its_last_limit_takes_no_results_but_starts_and_ends_of_runs(disk: Path) -> None:
    space = SpaceWatch(disk, 0, MIB)
    archive = Archive(disk / "archive", make_prior(), PROVENANCE, ignore, DRIFT, 8, space=space)
    archive.open()
    fill(disk, MIB // 2)
    space.look()
    archive.begin(make_run())
    with pytest.raises(DiskFull, match=r"archive\.full_mb"):
        archive.write([make_result(0)])
    archive.end(RunEnded(UID, "end", 1.0))
    archive.close()
    assert read_run(disk / "archive" / KEY).about["status"] == "complete"


def test_a_quota_is_a_full_disk_too_though_no_look_at_the_disk_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    space = SpaceWatch(tmp_path, 0, 0)
    archive = Archive(tmp_path / "archive", make_prior(), PROVENANCE, ignore, DRIFT, 8, space=space)
    archive.open()
    archive.begin(make_run())

    def over(file: int, content: bytes) -> int:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr("streamprior.sinks.chunks.os.write", over)
        with pytest.raises(DiskFull, match="raise the quota"):
            archive.write([make_result(0)])
    space.look()
    assert space.level == 2, "only a write that goes through tells that there is room"
    archive.write([make_result(0)])
    assert space.level == 0
    archive.close()


def make_outbox(archive: Archive, ledger: Ledger, budget_bytes: int, drop: bool) -> Outbox:
    meters = Meters("detector", [], ["archive"], [], [])
    return Outbox(archive, budget_bytes, ledger, meters, drop_when_full=drop)


def test_told_to_drop_the_archive_keeps_the_path_going_and_lists_every_frame_it_left_out(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    ledger = Ledger(["archive"])
    one = make_result(0).nbytes
    outbox = make_outbox(archive, ledger, 60 * one, drop=True)
    ledger.open_run(make_run())
    writer = threading.Thread(target=lambda: all(iter(outbox.step, False)))
    outbox.put(make_run())
    assert outbox.step()
    ballast = fill(disk, 0)
    writer.start()
    for index in range(600):  # ten times what the mailbox holds: each of these would wait for ever if the path were slowed
        ledger.received(UID, index)
        outbox.put(make_result(index))
    ballast.unlink()
    for index in range(600, 620):
        ledger.received(UID, index)
        outbox.put(make_result(index))
    outbox.put(RunEnded(UID, "end", 1.0))
    outbox.leave()
    writer.join(60)
    account = ledger.balance(UID)
    dropped = [index for index in range(620) if ledger.frame(UID, index) == "dropped at archive: disk_full"]
    assert (account["balanced"], account["in_flight"]) == (True, 0)
    assert account["dropped"] == {"archive/disk_full": len(dropped)}
    assert len(dropped) > 400
    check_frames(disk / "archive" / KEY, [index for index in range(620) if index not in set(dropped)])
    assert read_run(disk / "archive" / KEY).about["status"] == "complete"


def test_a_short_trouble_costs_nothing_also_where_frames_may_be_dropped(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    ledger = Ledger(["archive"])
    outbox = make_outbox(archive, ledger, 100 * make_result(0).nbytes, drop=True)
    ledger.open_run(make_run())
    ballast = fill(disk, 0)
    writer = threading.Thread(target=lambda: all(iter(outbox.step, False)))
    outbox.put(make_run())
    for index in range(40):
        ledger.received(UID, index)
        outbox.put(make_result(index))
    writer.start()
    ballast.unlink()
    outbox.leave()
    writer.join(60)
    assert ledger.balance(UID)["published"] == 40
    check_frames(disk / "archive" / KEY, list(range(40)))


def test_a_run_that_began_and_ended_on_a_full_disk_is_written_down_when_there_is_room(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    ledger = Ledger(["archive"])
    outbox = make_outbox(archive, ledger, 10_000, drop=True)
    archive.open()
    ballast = fill(disk, 0)
    ledger.open_run(make_run())
    ledger.received(UID, 0)
    writer = threading.Thread(target=lambda: all(iter(outbox.step, False)))
    for item in (make_run(), make_result(0), RunEnded(UID, "end", 1.0)):
        outbox.mailbox.put(item)
    writer.start()
    ballast.unlink()
    outbox.leave()
    writer.join(60)
    assert ledger.is_balanced()
    assert read_run(disk / "archive" / KEY).about["status"] == "complete"


def test_told_to_wait_nothing_is_lost_on_a_full_disk(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    ledger = Ledger(["archive"])
    outbox = make_outbox(archive, ledger, 20 * make_result(0).nbytes, drop=False)
    ledger.open_run(make_run())
    outbox.put(make_run())
    assert outbox.step()
    ballast = fill(disk, 0)
    writer = threading.Thread(target=lambda: all(iter(outbox.step, False)))
    writer.start()
    sender = threading.Thread(target=lambda: [outbox.put(make_result(index)) for index in range(100)])
    for index in range(100):
        ledger.received(UID, index)
    sender.start()
    while outbox.up:  # until the disk has refused a batch
        threading.Event().wait(0.01)
    ballast.unlink()
    sender.join(60)
    outbox.leave()
    writer.join(60)
    assert ledger.balance(UID)["published"] == 100
    check_frames(disk / "archive" / KEY, list(range(100)))


def test_a_disk_that_becomes_read_only_is_waited_for(disk: Path) -> None:
    archive = make_archive(disk / "archive")
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(0)])
    # Over itself, read-only: while the archive holds its lock the kernel alone, on a damaged disk, could make the mount read-only.
    mount("--bind", str(disk), str(disk))
    mount("-o", "remount,bind,ro", str(disk))
    for call in (
        lambda: archive.write([make_result(1)]),
        lambda: archive.begin(make_run("other-run")),
        lambda: archive.end(RunEnded(UID, "end", 1.0)),
    ):
        with pytest.raises(SinkUnavailable, match=r"mounted/archive.*[Rr]ead-only.*mount it writable") as refusal:
            call()
        assert not isinstance(refusal.value, DiskFull)
    subprocess.run(["umount", "-l", str(disk)], check=True)
    archive.write([make_result(1)])
    archive.end(RunEnded(UID, "end", 1.0))
    archive.close()
    check_frames(disk / "archive" / KEY, [0, 1])


@pytest.mark.parametrize("under_it", [False, True])
def test_nothing_is_written_where_the_archives_disk_is_not_mounted(disk: Path, tmp_path: Path, under_it: bool) -> None:
    point = tmp_path / "point"
    point.mkdir()
    if under_it:  # a daemon once ran before the disk was mounted
        earlier = make_archive(point)
        earlier.open()
        earlier.close()
    mount("--bind", str(disk), str(point))
    archive = make_archive(point)
    archive.open()
    archive.begin(make_run())
    archive.write([make_result(0)])
    subprocess.run(["umount", "-l", str(point)], check=True)
    before = sorted(point.rglob("*"))
    for call in (
        archive.open,
        lambda: archive.begin(make_run("other-run")),
        lambda: archive.write([make_result(1)]),
        lambda: archive.end(RunEnded(UID, "end", 1.0)),
    ):
        with pytest.raises(SinkUnavailable, match=rf"{point}.*mount"):
            call()
    assert sorted(point.rglob("*")) == before
    mount("--bind", str(disk), str(point))
    archive.begin(make_run("other-run"))
    archive.write([make_result(1)])
    archive.end(RunEnded(UID, "end", 1.0))
    archive.close()
    check_frames(point / KEY, [0, 1])
    subprocess.run(["umount", "-l", str(point)], check=True)


def test_an_archive_that_comes_back_as_another_mount_is_locked_again(tmp_path: Path) -> None:
    archive = make_archive(tmp_path / "disk")
    archive.open()
    archive.begin(make_run())
    (tmp_path / "disk").rename(tmp_path / "away")
    with pytest.raises(SinkUnavailable, match="mount its disk again"):
        archive.begin(make_run("other-run"))
    shutil.copytree(tmp_path / "away", tmp_path / "disk")  # other numbers of device and file, as a network disk has them
    archive.begin(make_run("other-run"))
    with pytest.raises(SinkUnavailable, match="another streamprior"):
        make_archive(tmp_path / "disk").open()
    archive.write([make_result(0)])
    archive.close()
    check_frames(tmp_path / "disk" / KEY, [0])


def gauge(text: str, name: str) -> float:
    return next(sample.value for family in text_string_to_metric_families(text) for sample in family.samples if sample.name == name)


def test_a_daemon_on_a_disk_that_fills_says_so_goes_on_and_archives_again_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    settings = {"archive": {"folder": str(disk / "archive"), "short_mb": 1, "full_mb": 0}, "queues": {"outbox_mb": 1}}
    with daemon(tmp_path, **settings) as running, running.sender() as push:
        ballast = fill(disk, 64 * 1024)
        level = running.until("degradation level changed")
        assert (level["refine_every"], level["classify_every"], level["why"]) == (0, 1, "a nearly full disk")
        running.until("disk nearly full: free space on it, or the archive will stop")
        for message in series(diffraction(count=400)):
            push.send(message)
        said = running.until("sink unavailable")
        assert "free space" in said["error"]
        while not running.get("/ledger")["runs"][0]["dropped"]:
            threading.Event().wait(0.05)
        text = running.get("/metrics")
        assert gauge(text, "streamprior_archive_space_level") == 2
        assert gauge(text, "streamprior_archive_free_bytes") < 100_000
        ballast.unlink()
        running.until("run closed")
        for message in series(diffraction(count=30), number=8):
            push.send(message)
        running.until("run closed")
        later, first = running.get("/ledger")["runs"]
        assert (later["published"], later["balanced"]) == (30, True)
        assert first["balanced"]
        assert first["dropped"]["archive/disk_full"] + first["published"] == 400
        whole, after = (read_run(folder) for folder in run_folders(disk / "archive"))
        assert len(whole.frames) == first["published"]
        assert len(after.frames) == 30
        # What there was no room for is computed from the file, beside the daemon, which hears of it.
        np.save(tmp_path / "scan.npy", diffraction(count=400))
        done = streamprior("catchup", run_folders(disk / "archive")[0], tmp_path / "scan.npy", "--config", tmp_path / "daemon.yaml")
        assert (done.exit_code, "the run is complete" in done.output) == (0, True), done.output
        later, first = running.get("/ledger")["runs"]
        assert (first["published"], first["caught_up"], first["dropped"], first["balanced"]) == (400, 400, {}, True)
        assert running.leave()[0] == 0
    complete = read_run(run_folders(disk / "archive")[0])
    assert complete.frames["index"].to_pylist() == list(range(400))
    assert not any(flags & Flag.NOT_REFINED for flags in complete.frames["flags"].to_pylist())
    assert np.isfinite(complete.objects).all()
    np.testing.assert_array_equal(complete.classes[whole.frames["index"]], whole.classes[whole.frames["index"]])
