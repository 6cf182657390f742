"""Runs of the archive as Bluesky runs in a real Tiled, read with the clients of the Bluesky family."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_model import DocumentNames, schema_validators

from streamprior.errors import ConfigError
from streamprior.records import RunEnded
from streamprior.sinks.archive import RUN_FILE, Archive, read_about, run_folders
from streamprior.sinks.bluesky_run import mirror_as_documents, runs_path
from streamprior.sinks.embedded import embedded_tiled
from streamprior.sinks.mirror import Mirror
from streamprior.sinks.rows import PART_ROWS
from streamprior.sinks.run_as_documents import run_documents
from streamprior.tiled_api import TiledApi
from tests.test_archive import DRIFT, PROVENANCE, ignore, make_prior, make_result, make_run
from tests.tiled_fixture import RunningTiled

UID = "5f0c2a4e-7d1b-4c39-9a51-0d6f2b8e4a01"
RAW = {"uid": "raw-9d2f44d0", "scan_id": 7, "plan_name": "grid_scan"}

pytestmark = [
    # databroker and the clients it stands on are older than the libraries below them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def archived(folder: Path, indices: range, uid: str = UID, ends: str | None = "end", opened: float = 1_700_000_000.0) -> Path:
    """A run in the archive: its folder."""
    archive = Archive(folder, make_prior(), PROVENANCE, ignore, DRIFT, 64)
    archive.open()
    archive.begin(replace(make_run(uid), metadata={"start": RAW, "offset": float("nan")}, opened=opened))
    archive.write([make_result(index, uid) for index in indices])
    if ends is not None:
        archive.end(RunEnded(uid, ends, opened + 60))
    archive.close()
    return next(one for one in run_folders(folder) if read_about(one)["uid"] == uid)


@contextmanager
def writing(server: RunningTiled | Any, folder: Path, **more: Any) -> Iterator[Mirror]:
    """A writer that the test steps by hand, with containers of the test's own."""
    one = mirror_as_documents(server.uri, server.api_key, folder, f"tests/{folder.name}", **more)
    yield one
    one.close(0)


@contextmanager
def catalog(server: RunningTiled | Any, folder: Path) -> Iterator[Any]:
    """The runs as databroker's client has them."""
    from databroker.client import CatalogOfBlueskyRuns
    from tiled.client import from_uri

    root = from_uri(server.uri, api_key=server.api_key)
    runs = root["/".join(runs_path(f"tests/{folder.name}"))]
    assert isinstance(runs, CatalogOfBlueskyRuns)
    yield runs
    root.context.close()


@pytest.fixture
def folder(tiled_server: RunningTiled, request: pytest.FixtureRequest) -> Path:
    return tiled_server.readable / request.node.name


# --- documents ---------------------------------------------------------------------------------------------------------------------


def test_documents_of_a_run_are_what_event_model_says(tmp_path: Path) -> None:
    run = archived(tmp_path, range(PART_ROWS - 5, PART_ROWS + 5))
    documents = list(run_documents(run, "streamprior/one"))
    assert [name for name, _ in documents] == ["start", "descriptor", "event_page", "event_page", "stop"]
    for name, document in documents:
        schema_validators[DocumentNames[name]].validate(document)
    start, descriptor, first, second, stop = (document for _, document in documents)
    assert (start["uid"], start["raw"], start["scan_id"], start["plan_name"]) == (UID, RAW["uid"], 7, "streamprior")
    assert (start["prior"], start["archive"]) == (PROVENANCE["prior"], "streamprior/one")
    assert descriptor["data_keys"]["chi2"]["dtype_numpy"] == "<f8"
    assert descriptor["data_keys"]["position_x"]["units"] == "m"
    assert descriptor["data_keys"]["alarms"]["dtype"] == "string"
    assert first["seq_num"] + second["seq_num"] == list(range(1, 11))
    assert first["data"]["index"] + second["data"]["index"] == list(range(PART_ROWS - 5, PART_ROWS + 5))
    assert (stop["exit_status"], stop["reason"], stop["num_events"]) == ("success", "end", {"primary": 10})


def test_the_same_run_is_the_same_documents(tmp_path: Path) -> None:
    run = archived(tmp_path, range(5))
    documents = [list(run_documents(run, "a")) for _ in range(2)]
    assert json.dumps(documents[0]) == json.dumps(documents[1])


def test_a_run_without_frames_or_raw_run_is_a_run_too(tmp_path: Path) -> None:
    run = archived(tmp_path, range(0))
    about = read_about(run)
    (run / RUN_FILE).write_text(json.dumps(about | {"metadata": {}}))
    (_, start), (_, stop) = run_documents(run, "a")
    assert "raw" not in start
    assert "scan_id" not in start
    assert stop["num_events"] == {}


def test_class_names_that_documents_cannot_hold_are_spelled_otherwise(tmp_path: Path) -> None:
    archive = Archive(tmp_path, replace(make_prior(), class_names=("a.b", "c/d", "e")), PROVENANCE, ignore, DRIFT, 8)
    archive.open()
    archive.begin(make_run(UID))
    archive.write([make_result(0, UID)])
    archive.end(RunEnded(UID, "idle", 1_700_000_060.0))
    archive.close()
    (run,) = run_folders(tmp_path)
    _, (_, descriptor), (_, page), _ = run_documents(run, "a")
    schema_validators[DocumentNames.descriptor].validate(descriptor)
    assert {"iou_a_b", "iou_c_d", "iou_e"} < set(descriptor["data_keys"]) == set(page["data"])


@pytest.mark.parametrize(("parent", "runs"), [("streamprior", ["streamprior_runs"]), ("a/b", ["a", "b_runs"]), ("", ["runs"])])
def test_the_runs_stand_beside_the_archives_own(parent: str, runs: list[str]) -> None:
    assert runs_path(parent) == runs


# --- in Tiled ----------------------------------------------------------------------------------------------------------------------


def test_databroker_reads_an_archived_run(tiled_server: RunningTiled, folder: Path) -> None:
    from databroker.client import BlueskyRun
    from tiled.queries import Eq

    run = archived(folder, range(30))
    with writing(tiled_server, folder) as documents:
        assert documents.step()
        assert (documents.up, documents.error, documents.pending()) == (True, "", False)
    with catalog(tiled_server, folder) as runs:
        found = runs[UID]
        assert isinstance(found, BlueskyRun)
        assert (found.start["raw"], found.stop["num_events"]["primary"]) == (RAW["uid"], 30)
        assert found.start["archive"] == f"tests/{folder.name}/{run.name}"
        table = found["primary"].read()
        np.testing.assert_allclose(table["chi2"], [0.01 * index for index in range(30)])
        np.testing.assert_array_equal(table["index"], np.arange(30))
        assert np.isnan(table["position_x"][0])
        assert set(table["arm"].values) == {"prototype"}
        assert list(runs.search(Eq("raw", RAW["uid"]))) == list(runs.search(Eq("start.scan_id", 7))) == [UID]
        assert runs[7].start["uid"] == runs[UID[:8]].start["uid"] == runs[-1].start["uid"] == UID


def test_a_run_is_written_once_however_often_it_is_announced(tiled_server: RunningTiled, folder: Path) -> None:
    run = archived(folder, range(10))
    with writing(tiled_server, folder) as documents:
        documents.announce(run)
        documents.step()
        documents.announce(run)
        documents.announce(run)
        assert documents.step()
    with writing(tiled_server, folder) as again:  # a daemon that was started anew
        assert again.step()
        assert not again.pending()
    with catalog(tiled_server, folder) as runs:
        assert list(runs) == [UID]
        assert len(runs[UID]["primary"].read()["chi2"]) == 10


def test_a_run_that_still_grows_waits_for_its_end(tiled_server: RunningTiled, folder: Path) -> None:
    archived(folder, range(4), ends=None)
    with writing(tiled_server, folder) as documents:
        assert documents.step()
        assert not documents.pending()
        with catalog(tiled_server, folder) as runs:
            assert list(runs) == []
            documents.announce(archived(folder, range(4, 9), ends="shutdown"))
            assert documents.step()
            assert (runs[UID].stop["exit_status"], runs[UID].stop["num_events"]["primary"]) == ("abort", 9)


def test_what_an_interrupted_writer_left_is_written_anew(tiled_server: RunningTiled, folder: Path) -> None:
    archived(folder, range(10))
    with writing(tiled_server, folder) as documents:
        documents.step()
        with catalog(tiled_server, folder) as runs:
            runs[UID].update_metadata({"stop": None})
            again = mirror_as_documents(tiled_server.uri, tiled_server.api_key, folder, f"tests/{folder.name}")
            assert again.step()
            again.close(0)
            assert runs[UID].stop["num_events"]["primary"] == len(runs[UID]["primary"].read()["chi2"]) == 10


def test_a_tiled_that_lost_its_memory_gets_the_runs_again(tiled_server: RunningTiled, folder: Path) -> None:
    archived(folder, range(4))
    api = TiledApi(tiled_server.uri, tiled_server.api_key)
    with writing(tiled_server, folder) as documents:
        documents.step()
        api.delete(f"/metadata/{'/'.join(runs_path(f'tests/{folder.name}'))}")
        documents.announce(archived(folder, range(3), f"9{UID[1:]}", opened=1_700_000_100.0))
        assert documents.step()
        assert not documents.pending()
    api.close()
    with catalog(tiled_server, folder) as runs:
        assert set(runs) == {UID, f"9{UID[1:]}"}


def test_one_run_that_cannot_be_read_does_not_hold_up_the_others(tiled_server: RunningTiled, folder: Path) -> None:
    first, second, third = (archived(folder, range(4), f"{number}{UID[1:]}", opened=1_700_000_000.0 + number) for number in range(3))
    (first / RUN_FILE).write_text("{")
    next((second / "frames").iterdir()).write_bytes(b"no parquet")
    with writing(tiled_server, folder) as documents:
        documents.step()
        assert documents.step()
        assert not documents.up
        assert "could not be written" in documents.error or "cannot be read" in documents.error
        assert documents.pending()
    with catalog(tiled_server, folder) as runs:
        stopped = [uid for uid in runs if runs[uid].metadata.get("stop")]
        assert stopped == [read_about(third)["uid"]]


def test_a_tiled_that_starts_after_the_run_gets_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder, key = tmp_path / "archive", "a" * 32
    archived(folder, range(6))
    documents = mirror_as_documents(f"http://127.0.0.1:{port}", key, folder, "tests/archive", period_s=0.05)
    assert not documents.step()
    assert "no answer" in documents.error
    assert key not in documents.error
    documents.start()
    with embedded_tiled(tmp_path / "tiled", [folder], key, port) as server:
        assert documents.close(300)
        with catalog(server, folder) as runs:
            assert len(runs[UID]["primary"].read()["chi2"]) == 6


def test_a_tiled_that_takes_connections_and_says_nothing_is_left_in_time(tmp_path: Path) -> None:
    archived(tmp_path, range(6))
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        documents = mirror_as_documents(f"http://127.0.0.1:{deaf.getsockname()[1]}", None, tmp_path, period_s=0.05)
        documents.start()
        assert not documents.close(0.1)
        assert not documents.up
    documents._thread.join(20)  # the socket is closed: its last question has an answer
    assert not documents._thread.is_alive()


def test_a_writer_that_is_stuck_is_ended_with_the_daemon(
    tiled_server: RunningTiled, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stuck, begun = tmp_path / "stuck", tmp_path / "begun"
    os.mkfifo(begun)
    stuck.write_text(f"#!/bin/sh\necho > {begun}\nexec sleep 1000\n")
    stuck.chmod(0o755)
    monkeypatch.setattr("streamprior.sinks.bluesky_run.sys.executable", str(stuck))
    archived(folder, range(6))
    with writing(tiled_server, folder) as documents:
        documents.start()
        begun.read_text()  # blocks until the writer runs
        assert not documents.close(0.1)
        documents._thread.join(20)
        assert not documents._thread.is_alive()


def test_a_wrong_key_is_told_with_the_remedy(tiled_server: RunningTiled, folder: Path) -> None:
    archived(folder, range(3))
    documents = mirror_as_documents(tiled_server.uri, "wrong", folder, f"tests/{folder.name}")
    documents.step()
    assert not documents.up
    assert "does not know the API key" in documents.error
    documents.close(0)


def test_without_the_packages_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'streamprior\[bluesky\]'"):
        mirror_as_documents("http://127.0.0.1:1", None, tmp_path)


def test_the_container_is_known_as_a_catalog_of_runs(tiled_server: RunningTiled, folder: Path) -> None:
    archived(folder, range(3))
    with writing(tiled_server, folder) as documents:
        documents.step()
    api = TiledApi(tiled_server.uri, tiled_server.api_key)
    node = api.get(f"/metadata/{'/'.join(runs_path(f'tests/{folder.name}'))}")
    api.close()
    assert node["data"]["attributes"]["specs"] == [{"name": "CatalogOfBlueskyRuns", "version": "3.0"}]
