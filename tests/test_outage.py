"""Tiled that is away, out of order or slow, while the path goes on: a real Tiled behind a proxy that the test turns against it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from structlog.testing import capture_logs

from streamprior.prior import save_prior
from streamprior.records import RunEnded
from streamprior.sinks.archive import Archive, read_about, read_run, run_folders, run_key
from streamprior.sinks.catalog import mirror_archive
from streamprior.sinks.embedded import embedded_tiled
from streamprior.sinks.live import LatestArrays
from streamprior.sinks.mirror import Mirror
from tests.builders import diffraction, small_prior
from tests.test_archive import DRIFT, PROVENANCE, make_prior, make_result, make_run
from tests.test_catalog import KEY, UID, check_images, connected, write
from tests.test_daemon import daemon, free_port
from tests.test_path import series
from tests.tiled_fixture import RunningTiled

Verdict = Callable[[int], str]


class Between(ThreadingHTTPServer):
    """Stands before a Tiled and hands requests on: `verdict` says of each, by its number, what happens to it.

    pass; 500, 409: answered so without Tiled hearing of it; after: Tiled does it, and 500 is answered nevertheless; away: the line is cut;
    held: it waits for `release`. rate : bytes a second that get through; None: all.
    """

    daemon_threads = True

    def __init__(self, uri: str) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        parts = urlsplit(uri)
        assert parts.hostname is not None
        assert parts.port is not None
        self.target = parts.hostname, parts.port
        self.uri = f"http://127.0.0.1:{self.server_address[1]}"
        self.verdict: Verdict = lambda number: "pass"
        self.rate: float | None = None
        self.release, self.reached = threading.Event(), threading.Event()
        self.made: list[str] = []  # what Tiled was made to make: path and name of each
        self.seen = 0
        self.counting = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who is cut off says nothing."""


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _hand_on(self) -> None:
        between = self.server
        assert isinstance(between, Between)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with between.counting:
            between.seen += 1
            verdict = between.verdict(between.seen)
        between.reached.set()
        if verdict == "held":
            between.release.wait(60)
        if verdict == "away":
            self.close_connection = True
            return
        status, content, kind = (int(verdict), b"out of order", "text/plain") if verdict in ("500", "409") else self._ask(between, body)
        if verdict == "after":
            status, content, kind = 500, b"out of order", "text/plain"
        if between.rate is not None:
            time.sleep((len(body) + len(content)) / between.rate)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _ask(self, between: Between, body: bytes) -> tuple[int, bytes, str]:
        link = http.client.HTTPConnection(*between.target, timeout=60)
        try:
            kept = {name: value for name, value in self.headers.items() if name.lower() not in ("host", "connection", "accept-encoding")}
            link.request(self.command, self.path, body or None, kept)
            answer = link.getresponse()
            content = answer.read()
            if self.command == "POST" and answer.status < 300:
                between.made.append(f"{self.path} {json.loads(body)['id']}")
            return answer.status, content, answer.headers.get("Content-Type", "application/json")
        finally:
            link.close()

    do_GET = do_PUT = do_POST = do_PATCH = do_DELETE = _hand_on  # noqa: N815 - http.server's names

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nobody reads it."""


@pytest.fixture
def between(tiled_server: RunningTiled) -> Iterator[Between]:
    one = Between(tiled_server.uri)
    thread = threading.Thread(target=one.serve_forever)
    thread.start()
    yield one
    one.release.set()
    one.shutdown()
    thread.join(30)
    one.server_close()


@pytest.fixture
def folder(tiled_server: RunningTiled, request: pytest.FixtureRequest) -> Path:
    name = "".join(one if one.isalnum() else "-" for one in request.node.name)
    return tiled_server.readable / f"outage-{name}"


@pytest.fixture
def mirror(between: Between, tiled_server: RunningTiled, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    """A mirror that the test steps by hand, through the proxy; refused runs are due again at once."""
    monkeypatch.setattr("streamprior.sinks.mirror.REFUSED_S", 0.0)
    one = mirror_archive(between.uri, tiled_server.api_key, folder, parent=f"tests/{folder.name}", period_s=0.001)
    yield one
    one.close(0)


@pytest.fixture
def archive(folder: Path, mirror: Mirror) -> Iterator[Archive]:
    one = Archive(folder, make_prior(), PROVENANCE, mirror.announce, DRIFT, 8)
    one.open()
    yield one
    one.close()


def check_run(server: RunningTiled, folder: Path, count: int) -> None:
    """The run is in Tiled, complete: every frame once, at its place."""
    with connected(server.uri, server.api_key) as root:
        node = root["tests"][folder.name][KEY]
        assert node.metadata["status"] == "complete"
        assert sorted(node) == ["classes", "frames", "objects"]
        assert list(node["frames"].read()["index"]) == list(range(count))
        assert len(node["classes"].read()) == count
        check_images(node, list(range(count)))


@pytest.mark.parametrize("fault", ["500", "after", "away"])
@pytest.mark.parametrize("every", [2, 3, 5])
def test_a_tiled_that_fails_now_and_then_gets_the_run_whole_in_order_and_once(
    archive: Archive, mirror: Mirror, between: Between, tiled_server: RunningTiled, folder: Path, fault: str, every: int
) -> None:
    between.verdict = lambda number: fault if number % every == 0 else "pass"
    archive.begin(make_run())
    for first in range(0, 40, 4):
        write(archive, range(first, first + 4))
        mirror.step()
    archive.end(RunEnded(UID, "end", 1.0))
    assert read_run(folder / KEY).about["frames"] == 40, "the archive is complete whatever Tiled does"
    between.verdict = lambda number: "pass"
    while mirror.pending():
        mirror.step()
    assert mirror.up
    check_run(tiled_server, folder, 40)
    nodes = [one for one in between.made if KEY in one]
    assert sorted(one.split()[-1] for one in nodes) == sorted([KEY, "classes", "frames", "objects"]), "each was made once"


@pytest.mark.parametrize("fault", ["500", "away"])
def test_a_tiled_that_is_out_of_order_for_a_while_in_mid_run_costs_only_delay(
    archive: Archive, mirror: Mirror, between: Between, tiled_server: RunningTiled, folder: Path, fault: str
) -> None:
    archive.begin(make_run())
    write(archive, range(12))
    assert mirror.step()
    between.verdict = lambda number: fault
    write(archive, range(12, 24))
    for _ in range(3):
        assert not mirror.step()
        assert not mirror.up
    assert "500" in mirror.error or "no answer" in mirror.error
    assert read_run(folder / KEY).about["frames"] == 24
    between.verdict = lambda number: "pass"
    write(archive, range(24, 36))
    archive.end(RunEnded(UID, "end", 1.0))
    while mirror.pending():
        mirror.step()
    check_run(tiled_server, folder, 36)


def test_the_archive_never_waits_for_a_tiled_that_does_not_answer(
    archive: Archive, mirror: Mirror, between: Between, tiled_server: RunningTiled, folder: Path
) -> None:
    between.verdict = lambda number: "held"
    mirror.start()
    archive.begin(make_run())
    write(archive, range(4))
    assert between.reached.wait(30)
    for index in range(4, 64):
        write(archive, range(index, index + 1))
    archive.end(RunEnded(UID, "end", 1.0))
    assert read_run(folder / KEY).about["status"] == "complete", "while the first request still waits"
    between.verdict = lambda number: "pass"
    between.release.set()
    assert mirror.close(60)
    check_run(tiled_server, folder, 64)


def test_a_tiled_that_comes_back_empty_in_mid_run_is_said_and_told_everything_though_the_live_sink_was_there_first(tmp_path: Path) -> None:
    port, key, folder = free_port(), "secretofours", tmp_path / "archive"
    mirror = mirror_archive(f"http://127.0.0.1:{port}", key, folder)
    archive = Archive(folder, make_prior(), PROVENANCE, mirror.announce, DRIFT, 8)
    archive.open()
    with embedded_tiled(tmp_path / "first", [tmp_path], api_key=key, port=port):
        archive.begin(make_run("first-run"))
        archive.write([replace(make_result(index), run="first-run") for index in range(12)])
        archive.end(RunEnded("first-run", "end", 1.0))
        archive.begin(make_run())
        write(archive, range(4))
        assert mirror.step()
        assert not mirror.pending()
    with embedded_tiled(tmp_path / "second", [tmp_path], api_key=key, port=port) as back:
        live = LatestArrays(back.uri, key)
        live.open()  # makes the container in which the runs were
        live.close()
        write(archive, range(4, 9))
        with capture_logs() as logs:
            mirror.step()
            while mirror.pending():
                assert mirror.step()
        assert any("lost what it was told" in line["event"] for line in logs)
        with connected(back.uri, back.api_key) as root:
            runs = root["streamprior"]
            assert set(runs) == {run_key(make_run("first-run")), KEY, "latest"}
            check_images(runs[run_key(make_run("first-run"))], list(range(12)))
            check_images(runs[KEY], list(range(9)))
    archive.close()
    mirror.close(0)


def test_a_daemon_archives_through_every_outage_and_all_is_in_tiled_at_the_end(
    between: Between, tiled_server: RunningTiled, folder: Path, tmp_path: Path
) -> None:
    """Away before the start, then 500s, 409s, 1 MB/s, then cut off in mid-run: each run is closed by the archive while that lasts, and the
    next one, with Tiled in order, is in Tiled like all the others; as documents too.
    """
    save_prior(small_prior(), tmp_path / "prior.h5")
    between.verdict = lambda number: "away"
    tiled = {"uri": between.uri, "parent": f"tests/{folder.name}", "documents": True}
    with daemon(
        tmp_path, {"TILED_API_KEY": tiled_server.api_key}, tiled=tiled, archive={"folder": str(folder)}, runs={"drain_s": 120}
    ) as running:
        with running.sender() as push:

            def send(number: int, change: Callable[[], None] = lambda: None) -> None:
                messages = series(diffraction(count=40), number=number)
                for message in messages[:20]:
                    push.send(message)
                change()
                for message in messages[20:]:
                    push.send(message)
                running.until("run closed")

            send(1)
            between.verdict = lambda number: "500"
            send(2)
            between.verdict = lambda number: "409"
            send(3)
            between.verdict, between.rate = lambda number: "pass", 1e6
            send(4)
            send(5, lambda: setattr(between, "verdict", lambda number: "away"))
            between.verdict, between.rate = lambda number: "pass", None
            send(6)
            accounts = running.get("/ledger")["runs"]
            assert [(one["published"], one["dropped"], one["balanced"]) for one in accounts] == [(40, {}, True)] * 6
        assert running.leave()[0] == 0
    with connected(tiled_server.uri, tiled_server.api_key) as root:
        runs = root["tests"][folder.name]
        keys = [one.name for one in run_folders(folder)]
        assert len(keys) == 6
        as_documents = root["tests"][f"{folder.name}_runs"]
        assert {uid: one.metadata["stop"]["num_events"] for uid, one in as_documents.items()} == {
            read_about(folder / key)["uid"]: {"primary": 40} for key in keys
        }
        assert set(runs) - {"latest"} == set(keys)
        for key in keys:
            assert runs[key].metadata["status"] == "complete"
            assert list(runs[key]["frames"].read()["index"]) == list(range(40))
            np.testing.assert_array_equal(runs[key]["classes"].read(), read_run(folder / key).classes)
            np.testing.assert_array_equal(runs[key]["objects"].read(), read_run(folder / key).objects)
