"""A finished run of the archive -> a Bluesky run of its own in Tiled, written by a process that this file is, too.

Everything is read back from the archive, so nothing is lost while Tiled is away. The arrays stay where the catalog has registered them.

`python -m streamprior.sinks.bluesky_run` reads a job (JSON) from standard input and names each run that it has written in a line: a process
of its own, because the TiledWriter brings 270 MB and seconds of imports, retries for most of a minute, and builds every row in Python.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamprior.errors import ConfigError
from streamprior.sinks.archive import read_about
from streamprior.sinks.mirror import Mirror, Work
from streamprior.sinks.registration import RunUnreadable
from streamprior.sinks.run_as_documents import run_documents
from streamprior.tiled_api import TiledApi, TiledRefused, create, make_containers, node_path

CATALOG_SPEC = {"name": "CatalogOfBlueskyRuns", "version": "3.0"}
"""Makes clients of the Bluesky family find runs in the container by uid and by scan number."""

QUIET_S = 30.0
"""Tiled is asked for a sign of life this often when no run ends."""

LONGEST_WRITE_S = 3600.0
"""A million frames take minutes; a writer that is stuck is ended."""


def runs_path(parent: str) -> list[str]:
    """The container of the Bluesky runs, beside that of the archive's runs: `streamprior_runs` for `streamprior`."""
    *above, last = [part for part in parent.split("/") if part] or [""]
    return [*above, f"{last}_runs".removeprefix("_")]


def mirror_as_documents(uri: str, api_key: str | None, archive_folder: Path, parent: str = "streamprior", period_s: float = 1.0) -> Mirror:
    """What writes each finished run of the archive into Tiled as a Bluesky run, once, the oldest first.

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
    if importlib.util.find_spec("bluesky_tiled_plugins") is None:
        raise ConfigError(
            "tiled.documents: writing Bluesky runs needs bluesky-tiled-plugins; pip install 'streamprior[bluesky]', or set it to false"
        )
    folder = archive_folder.resolve()
    writer = _Writer(uri, api_key, folder, parent)
    return Mirror("documents", folder, Work(writer.greet, writer.tell, writer.close), period_s, QUIET_S, newest_first=False)


class _Writer:
    """Looks which runs are to be written, and has them written."""

    def __init__(self, uri: str, api_key: str | None, folder: Path, parent: str) -> None:
        self._folder, self._parent, self._path = folder, parent.strip("/"), runs_path(parent)
        self._key = api_key
        self._api = TiledApi(uri, api_key)

    def close(self) -> None:
        self._api.close()

    def greet(self) -> bool:
        if self._api.get(f"/metadata/{node_path(self._path)}") is not None:
            return True
        make_containers(self._api, self._path[:-1])
        create(self._api, self._path[:-1], {"id": self._path[-1], "structure_family": "container", "specs": [CATALOG_SPEC]})
        return False

    def tell(self, names: Sequence[str], given_up: Callable[[], bool]) -> Iterator[tuple[str, str | None]]:
        wanted: list[str] = []
        for name in names:
            try:
                if self._is_due(name):
                    wanted.append(name)
                else:
                    yield name, None
            except (TiledRefused, RunUnreadable) as refusal:
                yield name, str(refusal)
        if not wanted:
            return
        written, trouble = _in_a_process(self._job(wanted), given_up)
        yield from ((name, None) for name in wanted if name in written)
        # The writer goes in order, so the trouble is the first one's; those behind it are tried again at once.
        yield from [(name, self._told(trouble)) for name in wanted if name not in written][:1]

    def _is_due(self, name: str) -> bool:
        """A run that is over and not, or not whole, in Tiled. What is there of it in parts is removed: it is written whole."""
        try:
            about = read_about(self._folder / name)
            uid, running, frames = about["uid"], about["status"] == "running", about["frames"]
        except (OSError, ValueError, KeyError, TypeError) as error:
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

    def _job(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "uri": f"{self._api.base}/metadata/{node_path(self._path)}",
            "api_key": self._key,
            "folders": [str(self._folder / name) for name in names],
            "parent": self._parent,
        }

    def _told(self, trouble: str) -> str:
        return f"Tiled at {self._api.base}: a run could not be written as Bluesky documents: {trouble}; it is tried again"


def _in_a_process(job: Mapping[str, Any], given_up: Callable[[], bool]) -> tuple[set[str], str]:
    """Names of the runs that were written, and what stopped it before the others."""
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
                    if given_up() or time.monotonic() - began > LONGEST_WRITE_S:
                        writer.kill()
        complaints.seek(0)
        said = [line.strip() for line in complaints if line.strip()]
    return set(told.split("\n")), said[-1][:300] if said else f"ended with {writer.returncode}"


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
