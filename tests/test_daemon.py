"""The daemon as a process: signals, exit codes, HTTP, and what a restart finds; real sockets, a real scrape."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
import zmq
from prometheus_client.parser import text_string_to_metric_families

from streamprior.config import Config
from streamprior.daemon import Daemon, run
from streamprior.prior import save_prior
from streamprior.records import Detector, RunStarted
from streamprior.sinks.archive import read_run, run_folders
from streamprior.wire.dectris_v2 import encode_end, encode_start
from tests.builders import diffraction, small_prior
from tests.test_path import House, Kept, Scripted, image, series

START_S = 90
PATIENCE_S = 600.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """A daemon's process, its sender's socket and its HTTP port."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.port, self.http = free_port(), free_port()
        whole: dict[str, Any] = {
            "prior": "prior.h5",
            "source": {"address": f"tcp://127.0.0.1:{self.port}"},
            "http": {"port": self.http},
            "runs": {"late_s": 0.2},
            "log": {"format": "json"},
        }
        for section, values in settings.items():
            whole[section] = whole.get(section, {}) | values if isinstance(values, dict) else values
        (folder / "daemon.yaml").write_text(yaml.safe_dump(whole))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "streamprior.cli", "run", "daemon.yaml"],
            cwd=folder,
            env={**os.environ, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log: list[dict[str, Any]] = []

    def until(self, event: str) -> dict[str, Any]:
        """Read the log up to an event; what came before stays in `log`. A daemon that does not say it in ten minutes is killed."""
        assert self.process.stderr is not None
        patience = threading.Timer(PATIENCE_S, self.process.kill)
        patience.start()
        try:
            for line in self.process.stderr:
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        finally:
            patience.cancel()
        raise AssertionError(f"the daemon ended before {event!r}: {self.log} {self.process.wait()}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=10) as answer:
            return json.load(answer) if "json" in answer.headers["content-type"] else answer.read().decode()

    @contextmanager
    def sender(self) -> Iterator[zmq.Socket[bytes]]:
        with zmq.Context() as context, context.socket(zmq.PUSH) as push:
            push.setsockopt(zmq.LINGER, 5000)
            push.connect(f"tcp://127.0.0.1:{self.port}")
            yield push

    def leave(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal, wait; the exit code and what was printed."""
        self.process.send_signal(number)
        printed, _ = self.process.communicate(timeout=60)
        return self.process.returncode, printed


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_prior(small_prior(), tmp_path / "prior.h5")
    return tmp_path


@contextmanager
def daemon(place: Path, environment: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Running]:
    running = Running(place, settings, environment)
    try:
        running.until("ready")
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
        running.process.communicate()


def test_a_series_is_archived_scraped_and_accounted_for(place: Path) -> None:
    frames = diffraction(count=30)
    with daemon(place) as running:
        assert running.get("/healthz") == {"alive": True}
        with running.sender() as push:
            for message in series(frames):
                push.send(message)
            running.until("run closed")
        scraped = {
            (sample.name, *sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(running.get("/metrics"))
            for sample in family.samples
        }
        assert scraped["streamprior_frames_received_total", ("source", "detector")] == 30
        assert scraped["streamprior_frames_published_total", ("sink", "archive")] == 30
        assert scraped["streamprior_latency_seconds_count", ("output", "reconstruction")] == 30
        assert scraped["streamprior_frames_quarantined_total", ("reason", "not_cbor")] == 0, "zeros are there before the first fault"
        assert scraped[("streamprior_frames_in_flight",)] == 0
        assert 0 < scraped[("streamprior_chi2",)] < 1
        assert running.get("/readyz")["ready"]
        account = running.get("/ledger")["runs"][0]
        assert (account["published"], account["balanced"]) == (30, True)
        assert running.get("/ledger?frame=7")["fate"] == "published"
        assert "canvas" in running.get("/")
        assert running.leave()[0] == 0
    run = read_run(run_folders(place / "archive")[0])
    assert run.classes.shape == (30, 32, 32)
    assert run.about["status"] == "complete"
    assert run.frames["index"].to_pylist() == list(range(30))
    assert run.about["provenance"]["prior_hash"] == small_prior().content_hash


def test_an_unknown_run_or_frame_is_answered_with_a_sentence(place: Path) -> None:
    with daemon(place) as running:
        for path, status, words in (("/ledger?run=nobody", 404, "no run nobody"), ("/ledger?run=nobody&frame=3", 404, "no run nobody")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                running.get(path)
            assert refused.value.code == status
            assert words in json.load(refused.value)["error"]


def test_odd_questions_are_answered_without_an_error_of_ours(place: Path) -> None:
    with daemon(place) as running:
        for after in ("", "%C2%B2", "-1", "9" * 5000):
            with urllib.request.urlopen(f"http://127.0.0.1:{running.http}/live?after={after}", timeout=10) as answer:
                assert answer.status == 204
        with running.sender() as push:
            push.send(series(diffraction(count=1))[0])
            running.until("run opened")
        for frame, status in (("9" * 5000, 400), ("x", 400), ("", 400), ("-1", 400)):
            with pytest.raises(urllib.error.HTTPError) as refusal:
                running.get(f"/ledger?frame={frame}")
            with refusal.value as answer:
                assert answer.code == status
        assert running.get(f"/ledger?frame={2**70}")["fate"] == "never received"


def test_after_a_kill_the_next_daemon_knows_every_frame_of_the_run_that_was_cut_short(place: Path) -> None:
    frames = diffraction(count=40)
    with daemon(place, archive={"chunk_frames": 4}) as running:
        with running.sender() as push:
            push.send(encode_start(1, "S1", Detector(shape=frames.shape[1:]), 50, frames.dtype, {}))
            for message in series(frames)[1:-1]:
                push.send(message)
            while not running.get("/status")["ledger"] or running.get("/status")["ledger"]["published"] < 8:
                pass
        uid = running.get("/status")["run"]
        running.process.kill()
        running.process.communicate()
    with daemon(place) as again:
        (event,) = [event for event in again.log if event["event"].startswith("run was interrupted") and event["run"] == uid]
        account = again.get(f"/ledger?run={uid}")
        archived = set(read_run(run_folders(place / "archive")[0]).frames["index"].to_pylist())
        assert (account["reason"], account["balanced"], account["published"]) == ("interrupted", True, len(archived))
        assert account["received"] == len(archived) + account["dropped"].get("path/crash", 0)
        assert f"{account['received']} received" in event["ledger"]
        assert account["missing"] == 50 - account["received"]
        assert uid in {one["run"] for one in again.get("/ledger")["earlier"]}
        assert again.get("/status")["ledger"] is None, "no run of this process yet"
        told = {index: again.get(f"/ledger?run={uid}&frame={index}") for index in range(50)}
        assert {index for index, one in told.items() if one["fate"] == "published"} == archived
        assert told[49]["fate"] == "never received"
        assert f"{account['received']} came of 50 expected" in told[49]["why"]
        assert again.leave()[0] == 0


def test_a_failed_room_ends_the_process_though_another_one_is_stuck(place: Path) -> None:
    class Failing(Scripted):
        def receive(self, timeout_s: float) -> bytes | None:
            if self._messages:
                return self._messages.popleft()
            if not timeout_s:
                return None
            assert stuck.entered.wait(30)
            raise ZeroDivisionError("a bug")

    class Stuck(Kept):
        entered, left = threading.Event(), threading.Event()

        def begin(self, run: RunStarted) -> None:
            self.entered.set()
            self.left.wait(60)

    stuck = Stuck()
    house = House([], [stuck])
    source = Failing(series(diffraction(count=3))[:-1])
    house.path._frames = replace(house.path._frames, source=source)
    config = Config(prior=place / "prior.h5", runs={"drain_s": 0.1})
    idle = SimpleNamespace(warm_up=lambda: None, start=lambda: None, stop=lambda: None, open=lambda: None, look=lambda: None, url="")
    codes: list[int] = []
    whole = Daemon(config, idle, house.ledger, [source], house.path, idle, idle, {}, idle, lambda: None, None, idle)
    process = threading.Thread(target=lambda: codes.append(run(whole)), daemon=True)
    process.start()
    process.join(30)
    ended_with = list(codes)
    stuck.left.set()
    assert house.path.join(30)
    assert ended_with == [1]
    assert isinstance(house.path.failure, ZeroDivisionError)


def test_sigterm_in_mid_run_archives_everything_accepted_and_a_restart_goes_on(place: Path) -> None:
    frames = diffraction(count=40)
    start = encode_start(1, "S1", Detector(shape=(32, 32)), 40, frames.dtype, {})
    with daemon(place) as running:
        with running.sender() as push:
            push.send(start)
            for index in range(25):
                push.send(image(frames[index], index))
            running.until("run opened")
            # The sender's socket closes once the daemon has taken everything: 25 frames are accepted.
        code, printed = running.leave()
        assert code == 0
        assert "25 received = 25 published" in printed
    (first,) = run_folders(place / "archive")
    interrupted = read_run(first)
    assert interrupted.about["status"] == "interrupted"
    assert interrupted.frames["index"].to_pylist() == list(range(25))
    with daemon(place) as running:
        with running.sender() as push:
            for index in range(25, 40):
                push.send(image(frames[index], index))
            push.send(encode_end(1, "S1"))
            running.until("run closed")
        assert running.leave()[0] == 0
    second = read_run(run_folders(place / "archive")[-1])
    assert second.frames["index"].to_pylist() == list(range(25, 40))
    assert len(run_folders(place / "archive")) == 2


def test_a_second_signal_leaves_at_once_and_says_what_was_left(place: Path) -> None:
    with daemon(place, archive={"folder": "archive"}) as running:
        # The archive's folder becomes a file: writes fail from now on, and the drain would last its whole time.
        with running.sender() as push:
            push.send(series(diffraction(count=1))[0])
            running.until("run opened")
            while not run_folders(place / "archive"):
                assert running.process.poll() is None
            os.rename(place / "archive", place / "gone")
            for index, counts in enumerate(diffraction(count=3)):
                push.send(image(counts, index))
            running.until("sink unavailable")
        running.process.send_signal(signal.SIGTERM)
        running.until("draining")
        code, printed = running.leave()
    assert code == 3
    assert "path/shutdown" in printed or "archive/unavailable" in printed
    assert "balanced" in printed


def test_a_file_source_gives_bit_identical_results_to_the_wire(place: Path) -> None:
    frames = diffraction(count=20)
    np.save(place / "frames.npy", frames)
    with daemon(place) as running:
        with running.sender() as push:
            for message in series(frames):
                push.send(message)
            running.until("run closed")
        running.leave()
    from_file = Running(place, {"source": {"kind": "file", "path": "frames.npy"}, "archive": {"folder": "offline"}})
    printed, _ = from_file.process.communicate(timeout=START_S)
    assert from_file.process.returncode == 0, printed
    live, offline = (read_run(run_folders(place / name)[0]) for name in ("archive", "offline"))
    np.testing.assert_array_equal(live.classes, offline.classes)
    np.testing.assert_array_equal(live.objects, offline.objects)
    for column in ("chi2", "chi2_floor", "r_factor", "class_distance", "flux", "iou_core", "iou_previous_core", "flags"):
        np.testing.assert_array_equal(live.frames[column].to_numpy(), offline.frames[column].to_numpy())


def refused(place: Path, text: str, command: str = "run", **environment: str) -> tuple[int, str]:
    (place / "daemon.yaml").write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "streamprior.cli", command, "daemon.yaml"],
        cwd=place,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prior: prior.h5\nsource: {adress: tcp://127.0.0.1:1}\n", ["daemon.yaml", "source.adress", "'address'"]),
        ("prior: missing.h5\n", ["missing.h5", "no such file", "streamprior train"]),
        ("prior: daemon.yaml\n", ["cannot be read"]),
        ("source: {name: x}\n", ["'prior' is missing"]),
        ("prior: [\n", ["daemon.yaml", "not YAML"]),
        ("prior: prior.h5\nrefine: {schedule: '10*ER+5*XYZ'}\n", ["refine.schedule", "XYZ"]),
        ("prior: prior.h5\nsource: {kind: file, path: nowhere.npy}\n", ["nowhere.npy", "no such file"]),
        ("prior: prior.h5\nsource: {address: 'tcp:/oops'}\nhttp: {port: 0}\n", ["source.address", "tcp://HOST:PORT"]),
        ("prior: prior.h5\npositions: {y: motor_y}\n", ["daemon.yaml: positions", "y has no effect without x"]),
        ("prior: prior.h5\npositions: {address: 'tcp://h:1'}\n", ["daemon.yaml: positions", "address has no effect without x"]),
    ],
)
def test_what_the_operator_got_wrong_ends_with_exit_2_and_a_sentence(place: Path, text: str, words: list[str]) -> None:
    code, said = refused(place, text)
    assert code == 2, said
    for word in words:
        assert word in said


def test_a_busy_port_is_named_by_run_and_by_check(place: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        text = f"prior: prior.h5\nsource: {{address: 'tcp://127.0.0.1:{port}'}}\nhttp: {{port: 0}}\n"
        for command in ("run", "check"):
            code, said = refused(place, text, command)
            assert code == 2
            assert str(port) in said
            assert "in use" in said
        code, said = refused(place, f"prior: prior.h5\nsource: {{address: 'tcp://127.0.0.1:*'}}\nhttp: {{port: {port}}}\n")
        assert code == 2
        assert "http.port" in said


def test_the_socket_that_positions_come_over_is_looked_at_too(place: Path) -> None:
    rest = "prior: prior.h5\nsource: {address: 'tcp://127.0.0.1:*'}\nhttp: {port: 0}\n"
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        text = f"{rest}positions: {{x: motor, attach: bind, address: 'tcp://127.0.0.1:{port}'}}\n"
        for command in ("run", "check"):
            code, said = refused(place, text, command)
            assert code == 2
            assert "positions.address: cannot bind" in " ".join(said.split())
    code, said = refused(place, f"{rest}positions: {{x: motor, address: 'tcp://127.0.0.1:5578'}}\n", "check")
    assert "motor, in msgpack" in " ".join(said.split())
    assert "FAIL positions" not in " ".join(said.split())
    code, said = refused(place, f"{rest}positions: {{x: motor}}\n", "check")
    assert code == 2
    assert "dectris_v2 brings no documents" in " ".join(said.split())


def test_check_finds_every_fault_at_once_and_names_a_remedy(place: Path) -> None:
    (place / "a file").write_text("")
    text = (
        "prior: missing.h5\nsource: {address: 'tcp://127.0.0.1:*'}\narchive: {folder: a file/archive}\ntiled: {uri: 'http://127.0.0.1:9'}\n"
    )
    code, said = refused(place, text, "check")
    assert code == 2
    assert said.count("FAIL") == 3
    for words in ("streamprior train", "archive.folder", "tiled.uri"):
        assert words in said


def test_a_second_daemon_on_the_same_archive_is_refused_before_it_accepts_a_frame(place: Path) -> None:
    with daemon(place):
        text = "prior: prior.h5\nsource: {address: 'tcp://127.0.0.1:*'}\nhttp: {port: 0}\n"
        for command in ("run", "check"):
            code, said = refused(place, text, command)
            assert code == 2
            assert "another streamprior writes to it" in said


def test_an_unreachable_tiled_does_not_stop_the_daemon_and_shows_in_readyz(place: Path) -> None:
    with daemon(
        place, {"TILED_API_KEY": "not-in-any-log"}, tiled={"uri": f"http://127.0.0.1:{free_port()}"}, runs={"drain_s": 2}
    ) as running:
        with running.sender() as push:
            for message in series(diffraction(count=5)):
                push.send(message)
            running.until("run closed")
        with pytest.raises(urllib.error.HTTPError) as refusal:
            running.get("/readyz")
        state = json.load(refusal.value)
        assert (refusal.value.code, state["tiled"], state["sink_archive"]) == (503, False, True)
        assert running.get("/ledger")["runs"][0]["published"] == 5
        code, printed = running.leave()
        assert code == 0
        assert "not-in-any-log" not in printed + json.dumps(running.log)


def test_the_environment_wins_over_the_file(place: Path) -> None:
    code, said = refused(place, "prior: prior.h5\nhttp: {port: 0}\n", STREAMPRIOR_PRIOR="elsewhere.h5")
    assert code == 2
    assert "elsewhere.h5" in said
    code, said = refused(place, "prior: prior.h5\n", STREAMPRIOR_HTP__PORT="1")
    assert code == 2
    assert "STREAMPRIOR_HTP__PORT" in said
    assert "'http'" in said


def test_a_service_manager_is_told_of_every_turn_and_fed_while_the_path_moves(place: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place / "notify"))
        manager.settimeout(30)
        with daemon(place, environment={"NOTIFY_SOCKET": str(place / "notify"), "WATCHDOG_USEC": "500000"}) as running:
            said = [manager.recv(1000).decode() for _ in range(3)]
            assert running.leave()[0] == 0
        while not said[-1].startswith("STOPPING=1"):
            said.append(manager.recv(1000).decode())
    assert said[0].startswith("READY=1\nSTATUS=frames from tcp://127.0.0.1:")
    assert set(said[1:-1]) == {"WATCHDOG=1"}
