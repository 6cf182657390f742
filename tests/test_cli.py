"""The command line: teaches, refuses with a remedy, and leaves with the exit code it promises."""

from __future__ import annotations

import json
import os
import re
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import structlog
import zmq
from typer.testing import CliRunner, Result

from streamprior import __version__
from streamprior.cli import app
from streamprior.config import load_config
from streamprior.prior import load_prior, save_prior
from streamprior.records import SeriesEnd
from streamprior.sources.files import open_recording
from streamprior.wire.dectris_v2 import StreamV2Decoder
from tests.builders import diffraction, small_prior
from tests.test_daemon import free_port

COMMANDS = ("demo", "run", "check", "replay", "twin", "train", "evaluate", "export", "ledger", "alarms", "bench")


@pytest.fixture(autouse=True)
def log() -> Iterator[None]:
    """Some commands set the log of this process up; what is tested behind them hears of warnings again."""
    yield
    structlog.reset_defaults()


def streamprior(*words: object) -> Result:
    """As typed in a terminal of 200 columns, so that no sentence is broken."""
    return CliRunner(env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).invoke(app, [str(word) for word in words])


def test_without_a_command_the_commands_are_listed() -> None:
    said = streamprior("--help")
    assert said.exit_code == 0
    for command in COMMANDS:
        assert re.search(rf"^\W*{command}\s", said.output, re.MULTILINE), command


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str) -> None:
    for flag in ("--help", "-h"):
        said = streamprior(command, flag)
        assert said.exit_code == 0
        assert f"Example: streamprior {command}" in said.output


def test_the_version_is_printed() -> None:
    said = streamprior("--version")
    assert (said.exit_code, said.output.strip()) == (0, __version__)


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("fly",), "No such command"),
        (("run",), "Missing argument"),
        (("run", "missing.yaml"), "streamprior check --example"),
        (("check",), "--example"),
        (("replay", "missing.cxi"), "no such file"),
        (("replay", "scan.cxi", "--wire", "dectris-v3"), "'dectris-v1' or 'documents'"),
        (("replay", "scan.cxi", "--framing", "parts"), "choose that wire"),
        (("replay", "scan.cxi", "--faults", "lost=many"), "lost=3"),
        (("twin", "bragg", "--to", "tcp://127.0.0.1:1", "--faults", "truncted=2"), "did you mean truncated"),
        (("replay", "scan.cxi", "--rate", "0"), "--rate"),
        (("twin", "bragg"), "--to ADDRESS or --save FILE"),
        (("twin", "no-such-scenario", "--to", "tcp://127.0.0.1:1"), "gold_balls"),
        (("twin", "bragg", "--to", "tcp://127.0.0.1:1", "--save", "x.cxi"), "either"),
        (("twin", "bragg", "--save", "no/such/folder/x.cxi"), "make it first"),
        (("train", "missing.cxi"), "no such file"),
        (("train", "a.cxi", "b.cxi"), "a.cxi: no such file"),
        (("train", "a.cxi", "--classes", "1"), "--classes"),
        (("bench", "nothing"), "choose from classify, refine"),
        (("demo", "--frames", "2"), "--frames"),
        (("beamtime", "--scans", "2", "--disturbed", "3"), "--disturbed"),
        (("demo", "--scenario", "no-such-scenario"), "gold_balls"),
    ],
)
def test_what_is_typed_wrong_ends_with_exit_2_and_a_remedy(words: tuple[str, ...], remedy: str) -> None:
    said = streamprior(*words)
    assert said.exit_code == 2, said.output
    assert remedy in said.output
    assert "Traceback" not in said.output


def test_the_example_configuration_can_be_loaded(tmp_path: Path) -> None:
    said = streamprior("check", "--example")
    assert said.exit_code == 0
    (tmp_path / "beamline.yaml").write_text(said.stdout)
    assert load_config(tmp_path / "beamline.yaml").http.port == 9870


def test_check_finds_nothing_wrong_with_a_configuration_that_is_fine(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    text = "prior: prior.h5\nsource: {address: 'tcp://127.0.0.1:*'}\nhttp: {port: 0}\n"
    (tmp_path / "beamline.yaml").write_text(text)
    said = streamprior("check", tmp_path / "beamline.yaml")
    assert said.exit_code == 0, said.output
    assert "FAIL" not in said.output
    assert small_prior().content_hash[:12] in said.output
    assert (tmp_path / "archive").is_dir()


def test_a_prior_is_trained_on_a_small_file(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", diffraction(count=12))
    said = streamprior("train", tmp_path / "scan.npy", "--frames", "0::2", "--classes", "3", "-o", tmp_path / "prior.h5")
    assert said.exit_code == 0, said.output
    prior = load_prior(tmp_path / "prior.h5")
    assert prior.content_hash in said.output
    assert len(prior.class_names) == 3
    assert prior.provenance["files"] == ["scan.npy"]
    assert prior.provenance["frames"] == "0::2"
    for name in prior.class_names:
        assert name in said.output
    assert prior.library is not None
    assert f"library of {len(prior.library.psi)} prototypes" in said.output
    assert f"from {len(prior.library.unit)} frames" in said.output
    assert sorted(file.name for file in tmp_path.iterdir()) == ["prior.h5", "scan.npy"]


def test_an_interrupted_training_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from streamprior.train import grow

    np.save(tmp_path / "scan.npy", diffraction(count=6))
    words = ("train", tmp_path / "scan.npy", "--classes", "3", "--starts", "1", "--library", "4")
    assert streamprior(*words, "-o", tmp_path / "whole.h5").exit_code == 0
    gather = grow.gather

    def interrupted(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(grow, "gather", interrupted)
    assert streamprior(*words, "-o", tmp_path / "prior.h5").exit_code != 0
    assert not (tmp_path / "prior.h5").exists()
    assert len(list((tmp_path / "prior.h5.solving").glob("*.h5"))) == 4
    monkeypatch.setattr(grow, "gather", gather)
    said = streamprior(*words, "-o", tmp_path / "prior.h5")
    assert said.exit_code == 0, said.output
    assert "4 frames solved before" in said.output
    assert not (tmp_path / "prior.h5.solving").exists()
    assert load_prior(tmp_path / "prior.h5").content_hash == load_prior(tmp_path / "whole.h5").content_hash


def test_a_prior_without_a_library_says_so(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", diffraction(count=6))
    said = streamprior("train", tmp_path / "scan.npy", "--classes", "3", "--library", "0", "-o", tmp_path / "prior.h5")
    assert said.exit_code == 0, said.output
    assert "no library of prototypes" in said.output
    assert load_prior(tmp_path / "prior.h5").library is None


@pytest.mark.parametrize(
    ("frames", "words"),
    [(np.zeros((3, 32, 32), np.uint16), "photon"), (np.ones((3, 32, 32), complex), "complex128")],
)
def test_frames_that_teach_nothing_are_refused(frames: np.ndarray, words: str, tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", frames)
    said = streamprior("train", tmp_path / "scan.npy", "-o", tmp_path / "prior.h5")
    assert said.exit_code == 2, said.output
    assert words in said.output
    assert "scan.npy" in said.output
    assert not (tmp_path / "prior.h5").exists()


def test_where_a_prior_cannot_be_written_is_said_before_the_training(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", diffraction(count=4))
    for place, words in ((tmp_path / "no" / "prior.h5", "make it first"), (tmp_path, "is a folder")):
        said = streamprior("train", tmp_path / "scan.npy", "-o", place)
        assert said.exit_code == 2
        assert words in said.output
        assert "survey" not in said.output


@pytest.fixture
def still(tmp_path: Path) -> Path:
    """A scenario of eight small frames on the peak."""
    (tmp_path / "still.yaml").write_text(
        "name: still\nseed: 1\nframes: 8\nrate_hz: 1000\ndose_photons: 2.0e+5\nenergy_ev: 9000\n"
        "sample: {kind: bragg, rocking_range_deg: 0.0}\ndetector: {shape: [32, 32], pixel_um: 55, distance_m: 0.5}\n"
    )
    return tmp_path / "still.yaml"


def test_what_the_twin_saves_can_be_read_and_trained_on(still: Path, tmp_path: Path) -> None:
    saved = streamprior("twin", still, "--save", tmp_path / "still.cxi")
    assert saved.exit_code == 0, saved.output
    recording = open_recording(tmp_path / "still.cxi")
    assert recording.shape == (8, 32, 32)
    assert recording.detector().mask is not None
    assert recording.detector().energy_ev == pytest.approx(9000)
    trained = streamprior("train", tmp_path / "still.cxi", "--classes", "3", "-o", tmp_path / "prior.h5")
    assert trained.exit_code == 0, trained.output
    assert load_prior(tmp_path / "prior.h5").geometry.detector_shape == (32, 32)


@contextmanager
def receiving() -> Iterator[tuple[str, Callable[[], list[Any]]]]:
    """A receiver's address, and what came up to the end of a series, decoded."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        decoder = StreamV2Decoder("eiger")

        def come() -> list[Any]:
            records: list[Any] = []
            while not records or not isinstance(records[-1], SeriesEnd):
                assert pull.poll(10_000), f"{len(records)} messages, and no end"
                records.append(decoder.decode(pull.recv(), 0.0)[0])
            return records

        yield f"tcp://127.0.0.1:{port}", come


@pytest.mark.parametrize("frames", [3, 20])
def test_the_twin_sends_as_many_frames_as_it_is_told(still: Path, frames: int) -> None:
    with receiving() as (address, come):
        said = streamprior("twin", still, "--to", address, "--frames", frames)
        assert said.exit_code == 0, said.output
        start, *images, _ = come()
    assert start.expected == frames
    assert [image.index for image in images] == list(range(frames))
    assert f"{frames + 2} messages sent" in said.output


def test_replay_sends_the_chosen_frames_with_their_index_in_the_file_and_their_position(tmp_path: Path) -> None:
    counts = diffraction(count=6)
    with h5py.File(tmp_path / "scan.cxi", "w") as file:
        file["entry_1/instrument_1/detector_1/data"] = counts
        file["entry_1/sample_1/geometry_1/translation"] = np.arange(18).reshape(6, 3) * 1e-6
    with receiving() as (address, come):
        said = streamprior("replay", tmp_path / "scan.cxi", "--to", address, "--rate", 1000, "--frames", "-3::2")
        assert said.exit_code == 0, said.output
        start, *images, _ = come()
    assert start.expected == 2
    assert [image.origin for image in images] == [3, 5]
    np.testing.assert_array_equal([image.counts for image in images], counts[[3, 5]])
    np.testing.assert_allclose([image.position for image in images], [(-9e-6, -10e-6), (-15e-6, -16e-6)])


def test_the_ledger_of_nobody_names_address_and_remedy() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    said = streamprior("ledger", "--url", url)
    assert said.exit_code == 2
    assert f"no daemon answers at {url}" in said.output
    assert "http.port" in said.output


@pytest.mark.parametrize("url", ["127.0.0.1:9870", "nowhere", "ftp://", "http://127.0.0.1:port"])
def test_the_ledger_of_an_address_that_is_none_is_no_traceback(url: str) -> None:
    said = streamprior("ledger", "--url", url)
    assert said.exit_code == 2
    assert "no daemon answers at" in said.output


@contextmanager
def answering(status: str, body: str) -> Iterator[str]:
    """A server that answers everything alike; its address."""

    class Answer(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while self.rfile.readline().strip():
                pass
            self.wfile.write(f"HTTP/1.0 {status}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())

    with socketserver.TCPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (
            "200 OK",
            json.dumps({"run": "u", "frame": 7, "fate": "dropped at receive: queue_full"}),
            0,
            "frame 7 of run u: dropped at receive",
        ),
        ("200 OK", json.dumps({"runs": [], "balanced": True}), 0, "no run yet"),
        ("200 OK", json.dumps({"runs": [], "balanced": False}), 1, "no run yet"),
        ("404 Not Found", json.dumps({"error": "no run x [yet]"}), 2, "no run x [yet]"),
        ("502 Bad Gateway", "<html>", 2, "answered 502; is that a streamprior daemon?"),
        ("200 OK", "<html>", 2, "no daemon answers"),
    ],
)
def test_the_ledger_repeats_what_the_daemon_says(status: str, body: str, code: int, words: str) -> None:
    with answering(status, body) as url:
        said = streamprior("ledger", "--url", url)
    assert said.exit_code == code, said.output
    assert words in said.output


def test_the_ledger_as_json_is_what_the_daemon_sent() -> None:
    body = {"runs": [], "balanced": True}
    with answering("200 OK", json.dumps(body)) as url:
        said = streamprior("ledger", "--url", f"{url}/", "--json")
    assert json.loads(said.stdout) == body


def test_a_state_folder_that_cannot_be_made_is_exit_2(tmp_path: Path) -> None:
    """In a process of its own: the cache is looked for when the kernels are imported."""
    (tmp_path / "file").write_text("")
    (tmp_path / "beamline.yaml").write_text("prior: prior.h5\n")
    for command in ("run", "check"):
        done = subprocess.run(
            [sys.executable, "-m", "streamprior.cli", command, str(tmp_path / "beamline.yaml")],
            env={**os.environ, "STREAMPRIOR_STATE": str(tmp_path / "file" / "state")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "set STREAMPRIOR_STATE" in done.stderr
