"""Results -> one folder a run on disk: class maps, objects, the frames table and run.json, each by frame index; mosaic.nxs beside them."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import structlog
import zarr

from streamprior.errors import DiskFull, SinkUnavailable
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Flag, MosaicImage, Positions, Result, RunEnded, RunStarted
from streamprior.sinks.chunks import FrameArray, Layout, replace_whole
from streamprior.sinks.mosaic_file import MOSAIC_FILE, summary, write_mosaic
from streamprior.sinks.rows import FrameTable, read_columns, read_indices, read_table
from streamprior.sinks.space import SpaceWatch

log = structlog.get_logger(__name__)

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
FORMAT_VERSION = 1

ENDED_RUNS = 16
"""Runs that are over and may still get an image, from the last sweeps over their frames."""

LATE_POSITIONS = 100_000
"""Positions of a run that are kept for frames whose rows are still to come, or come again: 10 MB, the newest."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_NOT_REFINED = int(Flag.NOT_REFINED)  # an int: `&` on the enum itself takes a microsecond

_REMEDIES = {
    errno.ENOSPC: "free space on that disk",
    errno.EDQUOT: "raise the quota or remove old runs",
    errno.EROFS: "mount it writable",
    errno.EACCES: "let the daemon's user write there",
    errno.EPERM: "let the daemon's user write there",
    errno.ENOENT: "mount the disk or make the folder",
    errno.ENOTDIR: "name a folder, not a file",
    errno.EEXIST: "name a folder, not a file",
    errno.ESTALE: "mount the network disk again",
}


@dataclass
class _Run:
    """What the archive owns of one open run. `about` is the content of run.json, `late` the positions that came by themselves.

    constant : text of what does not change from write to write in run.json; "" where that is to be made again.
    """

    folder: Path
    arrays: Mapping[str, FrameArray]
    frames: FrameTable
    about: dict[str, Any]
    constant: str = ""
    late: OrderedDict[int, tuple[float, float]] = field(default_factory=OrderedDict)


class Archive:
    """The complete sink: every result of every run, by index, and the newest image of the sample, at disk speed.

    `write` returns when chunks, rows and run.json are written and renamed, in this order: what run.json counts is there. It does
    not fsync: SIGKILL loses nothing the kernel has taken, only a power cut could, and waiting for the platters on every batch costs
    more time than the batch has.

    Parameters
    ----------
    folder : made by `open` if absent.
    prior : shapes of class maps and objects, names of the classes.
    provenance : goes into every run.json (hash of prior and configuration, version, source run uid, device).
    growth : called with the run's folder when frames or an image have been written and when the run has ended; must not block.
    drift_columns : keys of `Result.drift` that become columns.
    chunk_frames : frames a chunk; the growing chunk is rewritten by each write, so a larger one costs more where frames are few.
    objects : False for a recipe that makes no object of a single frame; then there is no such array.
    space : looked at before results are written; None where nobody minds.
    alarms : uid of a run -> what run.json tells of its alarms.

    A frame is archived once it has its row in the frames table: of frames that were given up on a full disk an image may be left without.
    """

    name = "archive"
    complete = True

    def __init__(
        self,
        folder: Path,
        prior: Prior,
        provenance: Mapping[str, Any],
        growth: Callable[[Path], None],
        drift_columns: Sequence[str] = (),
        chunk_frames: int = 64,
        objects: bool = True,
        space: SpaceWatch | None = None,
        alarms: Callable[[str], Mapping[str, Any]] = lambda uid: {},
    ) -> None:
        rows, columns = prior.object_box
        box = (rows.stop - rows.start, columns.stop - columns.start)
        self._folder = folder
        self._layouts = [Layout("classes", prior.geometry.shape, np.dtype(np.uint8), NOT_MEASURED, chunk_frames)]
        if objects:
            self._layouts.append(Layout("objects", box, np.dtype(np.complex64), complex("nan+nanj"), chunk_frames))
        self._class_names = prior.class_names
        self._drift_columns = tuple(drift_columns)
        self._provenance = dict(provenance)
        self._object_box = [rows.start, columns.start]
        self._growth = growth
        self._runs: dict[str, _Run] = {}
        self._ended: OrderedDict[str, Path] = OrderedDict()
        self._lock: IO[bytes] | None = None
        self._mark = b""
        self._space, self._alarms = space, alarms
        self._frame_bytes = frame_bytes(prior, objects)
        self._failed: Sequence[Result] | None = (
            None  # results that a write could not store: the next call brings them again, or gives them up
        )

    def open(self) -> None:
        """Make the folder, see that it can be written, and mark runs that an earlier process left running as interrupted.

        Raises
        ------
        SinkUnavailable
            The folder cannot be made or written, or another process writes to it.
        """
        pa.array([""])  # Arrow imports pandas with its first array: a third of a second, which the first frames need not wait for
        if self._lock is not None:
            self._see_folder()
        with self._disk(self._folder):
            if self._lock is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._lock = claim(self._folder)
                self._mark = _marked(self._folder)
            for folder in run_folders(self._folder):
                about = read_about(folder)
                if about["status"] == "running" and about["uid"] not in self._runs:
                    # A kill between write and rename leaves the temporary file behind.
                    for partial in folder.rglob("*.partial"):
                        partial.unlink()
                    _replace_json(folder / RUN_FILE, about | {"status": "interrupted"})
                    self._growth(folder)

    def begin(self, run: RunStarted) -> None:
        """Make the run's folder, or continue it where it exists.

        Raises
        ------
        SinkUnavailable
            The disk is full, read-only or gone: nothing is made where the archive's disk is not mounted.
        """
        self._see_folder()
        self._give_up_failed(None)
        folder = self._folder / run_key(run)
        with self._disk(folder):
            folder.mkdir(exist_ok=True)
            arrays = {layout.name: FrameArray(folder / layout.name, layout, run.expected) for layout in self._layouts}
            frames = FrameTable(folder / "frames", self._class_names, self._drift_columns)
            about = self._about(run) | {"frames": frames.rows, "extent": frames.extent}
            before = read_about(folder) if (folder / RUN_FILE).exists() else {}
            about |= {key: before[key] for key in ("mosaic", "alarms", "alarms_left_out") if key in before}
            _replace_json(folder / RUN_FILE, about)
        self._runs[run.uid] = _Run(folder, arrays, frames, about)
        self._ended.pop(run.uid, None)
        if self._space is not None and run.expected is not None:
            self._space.foresee(run.series, (run.expected - about["frames"]) * self._frame_bytes)

    def write(self, results: Sequence[Result]) -> None:
        """Store results of open runs by index: late, repeated and missing indices are all fine.

        Raises
        ------
        DiskFull
            There is no room; writing the same results again later is safe, and so is going on with others.
        SinkUnavailable
            The disk is read-only or gone; writing the same results again later is safe.
        """
        self._give_up_failed(results)
        self._failed = results
        if self._space is not None:
            self._space.check()
        by_run: dict[str, list[Result]] = {}
        for result in results:
            by_run.setdefault(result.run, []).append(result)
        for uid, part in by_run.items():
            run = self._runs[uid]
            alarms = self._alarms(uid)
            if not alarms.items() <= run.about.items():
                run.about |= alarms
                run.constant = ""
            with self._disk(run.folder):
                _store(run, part)
            self._growth(run.folder)
        self._failed = None
        if self._space is not None:
            self._space.taken()

    def note(self, item: Positions | MosaicImage) -> None:
        """Replace the run's image of the sample, also of a run that ended not long ago; or put late positions into the rows of an open one.

        A position whose frame has no row yet is kept in memory until that row comes; it is not kept beyond the end of the run.

        Raises
        ------
        SinkUnavailable
            The disk is full, read-only or gone; noting the same again later is safe.
        """
        self._give_up_failed(None)
        if isinstance(item, Positions):
            self._locate(item)
            return
        run = self._runs.get(item.run)
        folder = run.folder if run is not None else self._ended.get(item.run)
        if folder is None:
            log.warning("image of a run that the archive does not know is left out", run=item.run, serial=item.serial)
            return
        with self._disk(folder):
            about = read_about(folder) if run is None else run.about
            write_mosaic(item, folder / MOSAIC_FILE, _origin_of(about))
            about["mosaic"] = summary(item)
            if run is not None:
                run.constant = ""
            _replace_json(folder / RUN_FILE, about)
        self._growth(folder)

    def end(self, run: RunEnded) -> None:
        """Close the run: arrays are cut to the extent, run.json tells how it ended."""
        self._give_up_failed(None)
        ended = self._runs[run.uid]
        with self._disk(ended.folder):
            (ended.folder / RUN_FILE).stat()
            for array in ended.arrays.values():
                array.trim(ended.about["extent"])
            # A run that our own shutdown or a kill cut short is not complete, whatever reached the disk.
            status = "interrupted" if run.reason in ("shutdown", "interrupted") else "complete"
            over = {"status": status, "end_reason": run.reason, "closed": run.closed}
            _replace_json(ended.folder / RUN_FILE, {**ended.about, **self._alarms(run.uid), **over})
        del self._runs[run.uid]
        self._ended[run.uid] = ended.folder
        while len(self._ended) > ENDED_RUNS:
            self._ended.popitem(last=False)
        self._growth(ended.folder)

    def close(self) -> None:
        """Let go of the folder. A run that was not ended stays `running` on disk; the next `open` marks it interrupted."""
        self._runs.clear()
        self._ended.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _give_up_failed(self, results: Sequence[Result] | None) -> None:
        """Results that failed and are not brought again count as dropped; then nothing of them may be written with those that follow."""
        if self._failed is None or self._failed is results:
            return
        for uid in {result.run for result in self._failed} & self._runs.keys():
            run = self._runs[uid]
            run.frames.forget()
            for array in run.arrays.values():
                array.forget()
        self._failed = None

    def _see_folder(self) -> None:
        """Raises SinkUnavailable where another folder lies in the archive's place: the one that a disk is mounted on must stay empty."""
        lock = self._folder / LOCK_FILE
        try:
            mark, found = lock.read_bytes(), lock.stat()
        except FileNotFoundError:
            mark = b""
        except OSError as error:
            raise SinkUnavailable(_sentence(self._folder, error)) from error
        if mark != self._mark:
            raise SinkUnavailable(
                f"archive {self._folder}: this is not the folder that was opened (its {LOCK_FILE} is gone, or another's); mount its disk"
                " again, writing goes on by itself, and until then nothing is made there"
            )
        assert self._lock is not None
        held = os.fstat(self._lock.fileno())
        if (held.st_dev, held.st_ino) != (found.st_dev, found.st_ino):  # mounted again: ours is the lock of the mount that is gone
            with self._disk(self._folder):
                again = claim(self._folder)
            self._lock.close()
            self._lock = again

    @contextmanager
    def _disk(self, path: Path) -> Iterator[None]:
        """As `_disk`; a full one is told to who looks at it, too."""
        try:
            with _disk(path):
                yield
        except DiskFull:
            if self._space is not None:
                self._space.refused()
            raise

    def _locate(self, item: Positions) -> None:
        run = self._runs.get(item.run)
        if run is None:
            log.warning("positions of a run that is not open are left out", run=item.run, positions=len(item.positions))
            return
        run.late.update(item.positions)
        while len(run.late) > LATE_POSITIONS:
            run.late.popitem(last=False)
        with self._disk(run.folder):
            (run.folder / RUN_FILE).stat()
            found = run.frames.locate(item.positions)
        if found:
            self._growth(run.folder)

    def _about(self, run: RunStarted) -> dict[str, Any]:
        return {
            "format": "streamprior-run",
            "format_version": FORMAT_VERSION,
            "status": "running",
            "uid": run.uid,
            "source": run.source,
            "series": run.series,
            "expected": run.expected,
            "opened": run.opened,
            "closed": None,
            "end_reason": None,
            "arrays": {
                layout.name: {
                    "frame_shape": list(layout.frame_shape),
                    "dtype": layout.dtype.name,
                    "chunk_frames": layout.chunk_frames,
                }
                for layout in self._layouts
            },
            "object_offset": self._object_box,
            "class_names": list(self._class_names),
            "provenance": _plain(self._provenance),
            "metadata": _plain(run.metadata),
        }


class Reopened:
    """A run that has ended, open again to fill in what it lacks; the folder stays as it was in everything else."""

    def __init__(self, folder: Path, drift_columns: Sequence[str]) -> None:
        about = read_about(folder)
        layouts = [
            Layout(
                name,
                tuple(one["frame_shape"]),
                np.dtype(one["dtype"]),
                NOT_MEASURED if name == "classes" else complex("nan+nanj"),
                one["chunk_frames"],
            )
            for name, one in about["arrays"].items()
        ]
        arrays = {layout.name: FrameArray(folder / layout.name, layout, None) for layout in layouts}
        self._run = _Run(folder, arrays, FrameTable(folder / "frames", about["class_names"], drift_columns), about)
        self._classes = zarr.open_array(folder / "classes", mode="r")

    def columns(self, *names: str) -> list[npt.NDArray[Any]]:
        """Columns of the frames table as it lies on disk, (N,) each, by frame index."""
        return read_columns(self._run.folder / "frames", names)

    def rows(self, indices: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Index -> row of the frames table, for those of these frames that have one."""
        return self._run.frames.read(indices)

    def classes(self, index: int) -> npt.NDArray[np.uint8]:
        """The map that the run has of a frame, (H, W)."""
        return np.asarray(self._classes[index], np.uint8)

    def write(self, results: Sequence[Result]) -> None:
        """As `Archive.write`."""
        with _disk(self._run.folder):
            _store(self._run, results)

    def finish(self, number: int) -> None:
        """Cut the arrays to what is there; run.json tells how many frames were filled in, and when."""
        run = self._run
        with _disk(run.folder):
            for array in run.arrays.values():
                array.trim(run.about["extent"])
            before = run.about.get("caught_up", {"frames": 0})
            _replace_json(run.folder / RUN_FILE, run.about | {"caught_up": {"frames": before["frames"] + number, "at": time.time()}})


def run_key(run: RunStarted) -> str:
    """Folder name of a run, `YYYYMMDD-HHMMSS-uid`: when it opened in UTC, so that names sort by time also in the night clocks change."""
    return f"{datetime.fromtimestamp(run.opened, UTC):%Y%m%d-%H%M%S}-{run.uid[:8]}"


def run_folders(folder: Path) -> list[Path]:
    """Folders of the runs in an archive, oldest first."""
    return sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))


def read_about(folder: Path) -> dict[str, Any]:
    """Content of a run's run.json."""
    about: dict[str, Any] = json.loads((folder / RUN_FILE).read_text())
    return about


@dataclass(frozen=True, slots=True)
class ArchivedRun:
    """A run as read back: about is run.json; classes (N, H, W) uint8; objects (N, h, w) complex64, empty where the recipe makes none;
    frames one row a frame."""

    about: Mapping[str, Any]
    classes: npt.NDArray[np.uint8]
    objects: npt.NDArray[np.complex64]
    frames: pa.Table


def read_run(folder: Path) -> ArchivedRun:
    """Read one run of an archive, also while it is being written: N is the extent that run.json counted."""
    about = read_about(folder)
    arrays = {name: np.asarray(zarr.open_array(folder / name, mode="r")[: about["extent"]]) for name in about["arrays"]}
    objects = arrays.get("objects", np.empty((0, 0, 0), np.complex64))
    return ArchivedRun(about, arrays["classes"], objects, read_table(folder / "frames"))


def archived_frames(folder: Path, uid: str) -> npt.NDArray[np.int64]:
    """(N,) indices of a run's frames that an archive has whole; none where it does not know the run."""
    run = archived_run(folder, uid)
    return np.empty(0, np.int64) if run is None else read_indices(run / "frames")


def archived_run(folder: Path, uid: str) -> Path | None:
    """The folder of a run in an archive; None where it does not know the run."""
    for run in folder.glob(f"*-{uid[:8]}"):
        if (run / RUN_FILE).exists() and read_about(run)["uid"] == uid:
            return run
    return None


def _origin_of(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a file that leaves the archive must carry with it of run.json."""
    title = f"image of the sample from {about['source']}, series {about['series']}"
    return {"title": title, **{key: about[key] for key in ("uid", "source", "series", "opened", "provenance", "metadata")}}


def frame_bytes(prior: Prior, objects: bool) -> int:
    """What a frame takes in the archive, on the safe side: class maps shrink to a fifth where every border is noise, objects to two thirds
    (measured, see chunks.py), and a row of numbers is some hundred bytes."""
    height, width = prior.geometry.shape
    rows, columns = prior.object_box
    box = (rows.stop - rows.start) * (columns.stop - columns.start)
    return height * width // 4 + (box * 8 * 3 // 4 if objects else 0) + 400


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Errors of the operating system become SinkUnavailable or DiskFull, naming the path and a remedy."""
    try:
        yield
    except OSError as error:
        kind = DiskFull if error.errno in _NO_ROOM else SinkUnavailable
        raise kind(_sentence(path, error)) from error


def _sentence(path: Path, error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0, "see to that disk")
    return f"archive {path}: {error.strerror or error}; {remedy}, writing goes on by itself"


def claim(folder: Path) -> IO[bytes]:
    """The folder's lock file, held: two daemons in one archive would mark each other's runs as interrupted."""
    lock = (folder / LOCK_FILE).open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise SinkUnavailable(
            f"archive {folder}: another streamprior writes to it; stop that one or give this one its own folder"
        ) from None
    return lock


def _store(run: _Run, results: Sequence[Result]) -> None:
    """Chunks, then rows, then the count in run.json."""
    # zarr makes missing folders when it lengthens an array; on an unmounted disk that would fill the mount point in silence.
    (run.folder / RUN_FILE).stat()
    indices = [result.index for result in results]
    for name, array in run.arrays.items():
        array.write(indices, [_image(name, result) for result in results])
    run.frames.write(results, time.time(), run.late)
    _count(run, run.frames.rows, max(run.about["extent"], max(indices) + 1))


def _marked(folder: Path) -> bytes:
    """What tells this folder from every other, also from the one that its disk is mounted on; made if absent."""
    lock = folder / LOCK_FILE
    mark = lock.read_bytes()
    if not mark:
        mark = uuid.uuid4().hex.encode()
        lock.write_bytes(mark)  # the same file, which is locked
    return mark


def _image(name: str, result: Result) -> npt.NDArray[Any] | None:
    """What of a result goes into an array of a run; None where its object was not made."""
    if name == "classes":
        return result.classes
    return None if result.flags & _NOT_REFINED else result.object


def _count(run: _Run, frames: int, extent: int) -> None:
    """Bring the counts in run.json up to date; the rest of it is made into text only when it has changed."""
    counts = {"frames": frames, "extent": extent}
    if counts.items() <= run.about.items():
        return
    if not run.constant:
        run.constant = _text({key: value for key, value in run.about.items() if key not in counts}).removesuffix("\n}")
    replace_whole(run.folder / RUN_FILE, f"{run.constant},{_text(counts).removeprefix('{')}".encode())
    run.about |= counts


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, allow_nan=False)


def _replace_json(path: Path, content: Mapping[str, Any]) -> None:
    replace_whole(path, _text(content).encode())


def _plain(value: Any) -> Any:
    """What JSON can hold: a start message's metadata may carry NaN, bytes and arrays, and must not cost us the run."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
