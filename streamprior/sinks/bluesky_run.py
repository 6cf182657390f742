"""A finished run of the archive -> a Bluesky run of its own in Tiled: the numbers of its frames as documents, linked to the raw run.

Everything is read back from the archive, so nothing is lost while Tiled is away. The arrays stay where the catalog has registered them: the
Bluesky family's readers know no zarr (bluesky-tiled-plugins 2.0), and the start document says where they are.

`python -m streamprior.sinks.bluesky_run` reads a job (JSON) from standard input and names each run that it has written in a line: a process
of its own, because the TiledWriter brings 270 MB and seconds of imports, retries for most of a minute, and builds every row in Python.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import structlog

from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.seams import Document
from streamprior.sinks.archive import read_about, run_folders
from streamprior.sinks.registration import RunUnreadable
from streamprior.sinks.rows import part_paths
from streamprior.tiled_api import TiledApi, TiledRefused, create, make_containers, node_path

log = structlog.get_logger(__name__)

STREAM = "primary"
CATALOG_SPEC = {"name": "CatalogOfBlueskyRuns", "version": "3.0"}
"""Makes clients of the Bluesky family find runs in the container by uid and by scan number."""

MAX_WAITING = 1000
"""Folders remembered by name while Tiled is away; beyond, the archive folder itself is the memory and is scanned again."""

RUNS_A_PASS = 16
REFUSED_S = 30.0
"""How long a run that could not be written waits, while the others go on."""

LONGEST_PAUSE_S = 30.0
LONGEST_WRITE_S = 3600.0
"""A million frames take minutes; a writer that is stuck is ended."""

_UNITS = {"detector_time": "s", "received": "s", "published": "s", "position_x": "m", "position_y": "m"}
_NAMESPACE = uuid.UUID("f2f5ad0c-1d0a-4a1e-9d5f-6f1d5b0c7f5e")
"""Of the uids of our documents, so that a run that is written again is the same run."""


def runs_path(parent: str) -> list[str]:
    """The container of the Bluesky runs, beside that of the archive's runs: `streamprior_runs` for `streamprior`."""
    *above, last = [part for part in parent.split("/") if part] or [""]
    return [*above, f"{last}_runs".removeprefix("_")]


def run_documents(folder: Path, archived_at: str) -> Iterator[Document]:
    """One run of the archive as Bluesky documents: start, a descriptor, an event page for each part of the frames table, stop.

    Events are in the order of the frames' indices; the column `index` says which frames there are. Their time is the detector's, or when
    the frame was received where the detector gives none; time stamps of the numbers are when the archive took them.

    Parameters
    ----------
    folder : of a run that is not running any more.
    archived_at : path in Tiled of the archive's own node, which holds class maps, objects and the image of the sample.
    """
    about = read_about(folder)
    uid, parts = about["uid"], part_paths(folder / "frames")
    yield "start", _start(about, archived_at)
    descriptor = _uid(uid, STREAM)
    if parts:
        yield "descriptor", _descriptor(uid, descriptor, about["opened"], pq.read_schema(parts[0]))
    events, last = 0, float(about["opened"])
    for part in parts:
        table = pq.read_table(part)
        page = _page(uid, descriptor, table, events)
        yield "event_page", page
        events, last = events + table.num_rows, max(last, *page["timestamps"]["index"])
    yield (
        "stop",
        {
            "uid": _uid(uid, "stop"),
            "run_start": uid,
            "time": about["closed"] or last,
            "exit_status": "success" if about["status"] == "complete" else "abort",
            "reason": about["end_reason"] or about["status"],
            "num_events": {STREAM: events} if parts else {},
        },
    )


def _start(about: Mapping[str, Any], archived_at: str) -> dict[str, Any]:
    raw = about["metadata"].get("start") if isinstance(about["metadata"].get("start"), Mapping) else {}
    links = {"raw": raw["uid"]} if isinstance(raw.get("uid"), str) else {}
    if isinstance(raw.get("scan_id"), int):
        links["scan_id"] = raw["scan_id"]
    return {
        **{_key(name): value for name, value in about["provenance"].items()},
        "uid": about["uid"],
        "time": about["opened"],
        "plan_name": "streamprior",
        "source": about["source"],
        "series": about["series"],
        "class_names": about["class_names"],
        "archive": archived_at,
        **links,
    }


def _descriptor(run: str, uid: str, opened: float, schema: pa.Schema) -> dict[str, Any]:
    keys = {_key(column.name): _data_key(column) for column in schema}
    return {
        "uid": uid,
        "run_start": run,
        "time": opened,
        "name": STREAM,
        "data_keys": keys,
        "object_keys": {"streamprior": list(keys)},
        "configuration": {"streamprior": {"data": {}, "timestamps": {}, "data_keys": {}}},
        "hints": {"streamprior": {"fields": ["chi2"]}},
    }


def _data_key(column: pa.Field) -> dict[str, Any]:
    key: dict[str, Any] = {"source": "streamprior", "shape": [], "object_name": "streamprior"}
    if pa.types.is_string(column.type):
        return key | {"dtype": "string"}
    key |= {"dtype": "number" if pa.types.is_floating(column.type) else "integer", "dtype_numpy": column.type.to_pandas_dtype()().dtype.str}
    return key | ({"units": _UNITS[column.name]} if column.name in _UNITS else {})


def _page(run: str, descriptor: str, table: pa.Table, before: int) -> dict[str, Any]:
    rows = table.to_pydict()
    times = [detector if math.isfinite(detector) else own for detector, own in zip(rows["detector_time"], rows["received"], strict=True)]
    return {
        "uid": [_uid(run, f"event {index}") for index in rows["index"]],
        "descriptor": descriptor,
        "seq_num": list(range(before + 1, before + table.num_rows + 1)),
        "time": times,
        "data": {_key(name): values for name, values in rows.items()},
        "timestamps": {_key(name): rows["published"] for name in rows},
        "filled": {},
    }


def _key(name: str) -> str:
    """A name as documents can have it: class names are free, and Bluesky reserves dots and slashes."""
    return re.sub(r"[./]", "_", name)


def _uid(run: str, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{run} {name}"))


class RunDocuments:
    """Writes each finished run of the archive into Tiled as a Bluesky run, once. `announce` is all the archive sees of it, and never waits.

    Reading `up` (Tiled took what it was told last) and `error` (why not, and what to do; never the API key) is safe from any thread.

    Parameters
    ----------
    uri, api_key : the Tiled server; a key in the uri's query is taken too.
    archive_folder : where the runs are.
    parent : container of the archive's own runs; the Bluesky runs are in `runs_path(parent)`.
    period_s : runs are looked for this often.

    Raises
    ------
    ConfigError
        The packages that write such runs are not installed.
    """

    def __init__(self, uri: str, api_key: str | None, archive_folder: Path, parent: str = "streamprior", period_s: float = 1.0) -> None:
        if importlib.util.find_spec("bluesky_tiled_plugins") is None:
            raise ConfigError(
                "tiled.documents: writing Bluesky runs needs bluesky-tiled-plugins; pip install 'streamprior[bluesky]', or set it to false"
            )
        self.up = False
        self.error = "Tiled was not asked yet"
        self._folder, self._parent, self._path = archive_folder.resolve(), parent.strip("/"), runs_path(parent)
        self._key = api_key
        self._api = TiledApi(uri, api_key)
        self._period_s = period_s
        self._lock = threading.Lock()
        self._waiting: dict[str, float] = {}  # folder's name -> not before this monotonic time
        self._rescan = True
        self._closing = threading.Event()
        self._news = threading.Event()
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="documents", daemon=True)

    def start(self) -> None:
        """Begin with everything the archive holds."""
        self._thread.start()

    def announce(self, run_folder: Path) -> None:
        """This run's folder has changed."""
        with self._lock:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.setdefault(run_folder.name, 0.0)
            else:
                self._rescan = True
        self._news.set()

    def pending(self) -> bool:
        """Something that was announced, or lies in the archive, is not yet known to be in Tiled."""
        with self._lock:
            return self._rescan or bool(self._waiting)

    def step(self) -> bool:
        """One pass over what waits, oldest run first. False where Tiled did not answer."""
        try:
            refusals = self._pass()
        except SinkUnavailable as error:
            self._complain(str(error))
            self._rescan = True  # it may come back empty
            return False
        if refusals:
            self._complain(refusals[-1])
        elif not self._refused():
            self.up, self.error = True, ""
        return True

    def close(self, timeout_s: float) -> bool:
        """Write what is left, for at most `timeout_s`. True where nothing is left; what is left, the next start finds."""
        self._closing.set()
        self._news.set()
        if self._thread.ident is None:
            self._gave_up.set()
            self._api.close()
        else:
            self._thread.join(timeout_s)
            self._gave_up.set()
            self._thread.join(1.0)
        return not self._thread.is_alive() and not self.pending()

    def _work(self) -> None:
        pause = 0.0
        try:
            while not self._closing.wait(pause):
                answered = self.step()
                pause = self._period_s if answered else min(LONGEST_PAUSE_S, max(self._period_s, 2 * pause))
                if answered and not self._due() and not self._closing.is_set():
                    self._news.wait(REFUSED_S)
                    self._news.clear()
            with self._lock:
                self._waiting = dict.fromkeys(self._waiting, 0.0)
            while self.pending() and not self._gave_up.is_set():
                if not self.step():
                    self._gave_up.wait(self._period_s)
                elif not self._due():
                    break
        finally:
            self.up = False
            self._api.close()

    def _pass(self) -> list[str]:
        if self._rescan:
            found = {folder.name: 0.0 for folder in run_folders(self._folder)}
            self._rescan = False
            with self._lock:
                self._waiting = found | self._waiting
            self._greet()
        refusals: list[str] = []
        wanted: list[str] = []
        for name in self._due()[:RUNS_A_PASS]:
            with self._lock:
                # Taken out first: what is announced while Tiled is being told must be looked at again.
                del self._waiting[name]
            try:
                if self._is_due(name):
                    wanted.append(name)
            except (TiledRefused, RunUnreadable) as refusal:
                refusals.append(self._later(name, str(refusal)))
        return refusals + (self._write(wanted) if wanted else [])

    def _is_due(self, name: str) -> bool:
        """A run that is over and not, or not whole, in Tiled. What is there of it in parts is removed: it is written whole."""
        try:
            about = read_about(self._folder / name)
            uid, running, frames = about["uid"], about["status"] == "running", about["frames"]
        except (OSError, ValueError, KeyError) as error:
            raise RunUnreadable(f"run {self._folder / name}: cannot be read ({error}); restore it or move it out of the archive") from error
        if running:
            return False  # its end is announced
        path = f"/metadata/{node_path([*self._path, uid])}"
        node = self._api.get(path)
        if node is None:
            return True
        stop = node["data"]["attributes"]["metadata"].get("stop")
        if stop is not None and sum(stop.get("num_events", {}).values()) == frames:
            return False
        self._api.delete(path)
        return True

    def _greet(self) -> None:
        if self._api.get(f"/metadata/{node_path(self._path)}") is None:
            make_containers(self._api, self._path[:-1])
            create(self._api, self._path[:-1], {"id": self._path[-1], "structure_family": "container", "specs": [CATALOG_SPEC]})

    def _write(self, names: Sequence[str]) -> list[str]:
        self._greet()
        written, trouble = self._in_a_process(names)
        left = [name for name in names if name not in written]
        if not left:
            return []
        with self._lock:
            self._waiting = dict.fromkeys(left[1:], 0.0) | self._waiting
        return [self._later(left[0], trouble)]

    def _in_a_process(self, names: Sequence[str]) -> tuple[set[str], str]:
        """Names of the runs that were written, and what stopped it before the others."""
        job = {
            "uri": f"{self._api.base}/metadata/{node_path(self._path)}",
            "api_key": self._key,
            "folders": [str(self._folder / name) for name in names],
            "parent": self._parent,
        }
        local = {"NO_PROXY": ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", "::1"]))}
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as complaints:
            command = [sys.executable, "-m", __name__]
            with subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, text=True, env=os.environ | local
            ) as writer:
                given: str | None = json.dumps(job)
                while True:
                    try:
                        told, _ = writer.communicate(given, timeout=0.2)
                        break
                    except subprocess.TimeoutExpired:
                        given = None
                        if self._gave_up.is_set() or time.monotonic() - began > LONGEST_WRITE_S:
                            writer.kill()
            complaints.seek(0)
            said = [line.strip() for line in complaints if line.strip()]
        reason = said[-1][:300] if said else f"ended with {writer.returncode}"
        return set(
            told.split("\n")
        ), f"Tiled at {self._api.base}: a run could not be written as Bluesky documents: {reason}; it is tried again"

    def _later(self, name: str, why: str) -> str:
        with self._lock:
            self._waiting[name] = time.monotonic() + REFUSED_S
        return why

    def _due(self) -> list[str]:
        now = time.monotonic()
        with self._lock:
            return sorted(name for name, earliest in self._waiting.items() if earliest <= now)

    def _refused(self) -> bool:
        with self._lock:
            return any(self._waiting.values())

    def _complain(self, error: str) -> None:
        """Once for each new trouble: the same one comes back with every try."""
        if error != self.error:
            log.warning("Tiled lags behind the archive's runs", error=error)
        self.up, self.error = False, error


def write_runs(job: Mapping[str, Any]) -> Iterator[str]:
    """Write the runs in job["folders"] with the TiledWriter into the container job["uri"]; the name of each when it is there."""
    from bluesky_tiled_plugins import TiledWriter

    # Nothing to normalise: our documents are of the newest schema, and checking each event would take most of the time.
    writer = TiledWriter.from_uri(job["uri"], api_key=job["api_key"], normalizer=None, batch_size=1000)
    for folder in map(Path, job["folders"]):
        for name, document in run_documents(folder, f"{job['parent']}/{folder.name}"):
            writer(name, document)
        yield folder.name


if __name__ == "__main__":
    for one in write_runs(json.load(sys.stdin)):
        sys.stdout.write(f"{one}\n")
        sys.stdout.flush()
