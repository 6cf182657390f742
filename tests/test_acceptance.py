"""The claim as a whole, on measured data: recorded frames over a real socket to class maps and objects that a Tiled client sees grow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cbor2
import h5py
import numpy as np
import pytest
from streamprior_sim.emit import stream
from streamprior_sim.faults import Fault, Trouble, forecast

import streamprior as sp
from streamprior.prior import Prior
from streamprior.sinks.archive import read_run, run_folders
from streamprior.sources.files import open_recording
from tests import naive
from tests.test_daemon import Running
from tests.tiled_fixture import RunningTiled

RATE_HZ = 50
ODD = 100
"""Odd frames of the measured curve."""
TIMES = 6
"""They come several times over, so that the run is long enough to be watched: six seconds."""
FRAMES = TIMES * ODD

# Another process that has nothing of ours but the address: what a user's notebook does while the scan runs.
READER = """
    import json, sys, time
    from tiled.client import from_uri

    uri, parent = sys.argv[1:]
    root = from_uri(uri, api_key=sys.stdin.readline().strip())
    print(json.dumps("connected"), flush=True)
    # A user looks now and then: who asks without a pause takes the server's time from the daemon.
    seen, deadline = [], time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.05)
        runs = root[parent] if parent in root else {}
        keys = [key for key in runs if key != "latest"]
        run = runs[keys[0]] if keys else {}
        if "classes" in run:
            status, number = run.metadata["status"], run["classes"].shape[0]
            if not seen or seen[-1] != number:
                seen.append(number)
            if status != "running":
                break
    answer = {
        "seen": seen,
        "status": run.metadata["status"],
        "provenance": run.metadata["provenance"],
        "classes": run["classes"].shape,
        "objects": run["objects"].shape,
        "classes_sum": int(run["classes"].read().sum()),
        "objects_dtype": str(run["objects"].dtype),
        "index": run["frames"].read()["index"].tolist(),
        "chi2": run["frames"].read()["chi2"].tolist(),
    }
    print(json.dumps(answer), flush=True)
    root.context.close()
"""


@dataclass(frozen=True)
class Beamtime:
    """A run that went over the wire: what the reader saw, what the ledger said, what lies in the archive."""

    prior: Prior
    prior_file: Path
    place: Path
    running: Running
    read: dict[str, Any]
    account: dict[str, Any]
    folder: Path


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "streamprior.cli", *words]


@pytest.fixture(scope="module")
def recording(data_folder: Path) -> str:
    return str(data_folder / "bcdi_gold_rocking_curve.cxi")


@pytest.fixture(scope="module")
def odd_frames(recording: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that refers to the odd frames of the measured one, several times over."""
    path = tmp_path_factory.mktemp("odd") / "odd.h5"
    with h5py.File(recording) as file:
        source = h5py.VirtualSource(file["entry_1/instrument_1/detector_1/data"])
        layout = h5py.VirtualLayout((FRAMES, *source.shape[1:]), source.dtype)
    for time in range(TIMES):
        layout[time * ODD : (time + 1) * ODD] = source[1::2]
    with h5py.File(path, "w") as file:
        file.create_virtual_dataset("entry/data/data", layout)
    return path


@pytest.fixture(scope="session")
def measured_prior(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grown by the command line on the even frames of the measured rocking curve."""
    path = tmp_path_factory.mktemp("prior") / "prior.h5"
    words = command("train", str(data_folder / "bcdi_gold_rocking_curve.cxi"), "--frames", "0::2", "-o", str(path))
    trained = subprocess.run(words, capture_output=True, text=True, timeout=300, check=False)
    assert trained.returncode == 0, trained.stdout + trained.stderr
    return path


@contextmanager
def reading(tiled: RunningTiled, parent: str) -> Iterator[Callable[[], dict[str, Any]]]:
    """A Tiled client in a process of its own, connected when the context begins; call what it yields for what was seen."""
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(READER), tiled.uri, parent],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def seen() -> dict[str, Any]:
        printed, errors = reader.communicate(timeout=90)
        assert reader.returncode == 0, errors
        answer: dict[str, Any] = json.loads(printed)
        return answer

    try:
        assert reader.stdin is not None
        assert reader.stdout is not None
        reader.stdin.write(tiled.api_key + "\n")
        reader.stdin.flush()
        assert reader.stdout.readline().strip() == '"connected"'
        yield seen
    finally:
        reader.kill()
        reader.communicate()


@pytest.fixture(scope="module")
def beamtime(
    measured_prior: Path, odd_frames: Path, tiled_server: RunningTiled, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Beamtime]:
    """Even frames taught the prior, the odd ones come over the wire at 50 Hz; the daemon lives on for the tests that send it rubbish."""
    place = tmp_path_factory.mktemp("beamtime")
    archive = tiled_server.readable / "acceptance"
    settings = {
        "prior": str(measured_prior),
        "archive": {"folder": str(archive), "chunk_frames": 16},
        "source": {"max_message_mb": 1},
        "tiled": {"uri": tiled_server.uri, "parent": "acceptance"},
        # Every frame is compared with its reconstruction, however busy the machine is.
        "overload": {"furthest": "nothing"},
    }
    environment = {"TILED_API_KEY": tiled_server.api_key, "STREAMPRIOR_STATE": os.environ["STREAMPRIOR_STATE"]}
    running = Running(place, settings, environment)
    try:
        running.until("ready")
        with reading(tiled_server, "acceptance") as seen:
            words = command("replay", str(odd_frames), "--to", f"tcp://127.0.0.1:{running.port}", "--rate", str(RATE_HZ))
            replayed = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
            assert replayed.returncode == 0, replayed.stderr
            running.until("run closed")
            account = running.get("/ledger")["runs"][0]
            yield Beamtime(sp.load_prior(measured_prior), measured_prior, place, running, seen(), account, run_folders(archive)[0])
        code, printed = running.leave(signal.SIGTERM)
        assert code == 0, printed
    finally:
        running.process.kill()
        running.process.communicate()


def test_every_frame_is_published_and_the_ledger_balances(beamtime: Beamtime) -> None:
    account = beamtime.account
    assert (account["expected"], account["received"], account["published"]) == (FRAMES, FRAMES, FRAMES)
    assert (account["missing"], account["in_flight"], account["balanced"]) == (0, 0, True)


def test_a_tiled_client_in_another_process_sees_the_run_grow(beamtime: Beamtime) -> None:
    seen = beamtime.read["seen"]
    assert seen[-1] == FRAMES
    assert len([number for number in seen if number < FRAMES]) >= 2, f"two different numbers of frames before the end: {seen}"
    assert seen == sorted(seen)
    assert beamtime.read["status"] == "complete"


def test_what_tiled_gives_is_what_the_archive_holds(beamtime: Beamtime) -> None:
    archived = read_run(beamtime.folder)
    read, prior = beamtime.read, beamtime.prior
    rows, columns = prior.object_box
    assert tuple(read["classes"]) == (FRAMES, *prior.geometry.shape) == archived.classes.shape
    assert tuple(read["objects"]) == (FRAMES, rows.stop - rows.start, columns.stop - columns.start) == archived.objects.shape
    assert read["objects_dtype"] == "complex64"
    assert read["index"] == list(range(FRAMES))
    assert read["classes_sum"] == int(archived.classes.sum())
    np.testing.assert_array_equal(read["chi2"], archived.frames["chi2"].to_numpy())
    assert np.isfinite(archived.frames["chi2"].to_numpy()).all()


def test_results_say_which_prior_and_which_configuration_made_them(beamtime: Beamtime) -> None:
    provenance = beamtime.read["provenance"]
    assert provenance["prior_hash"] == beamtime.prior.content_hash
    assert len(provenance["configuration_hash"]) == 64
    assert provenance["version"] == sp.__version__


def test_classes_are_those_of_the_obvious_version(beamtime: Beamtime, recording: str) -> None:
    archived, frames = read_run(beamtime.folder), open_recording(recording, "1::2")
    for index in (10, 45, 50, 55, 90):
        photons = sp.prepare(frames.frame(index), beamtime.prior)
        expected, _ = naive.classify(photons.counts[0], beamtime.prior, photons.valid.reshape(beamtime.prior.geometry.shape))
        assert (archived.classes[index] == expected).mean() >= 0.9999
        assert archived.frames["origin"].to_pylist()[index] == index, "in the file that was replayed"


def test_from_the_file_the_same_frames_give_the_same_bits(beamtime: Beamtime, recording: str) -> None:
    place = beamtime.place / "offline"
    place.mkdir()
    source = {"kind": "file", "path": recording, "frames": "1::2"}
    from_file = Running(place, {"prior": str(beamtime.prior_file), "source": source})
    _, errors = from_file.process.communicate(timeout=90)
    assert from_file.process.returncode == 0, errors
    live, offline = read_run(beamtime.folder), read_run(run_folders(place / "archive")[0])
    assert offline.classes.shape == (ODD, *beamtime.prior.geometry.shape)
    assert offline.frames["origin"].to_pylist() == list(range(1, 2 * ODD, 2))
    for time in range(TIMES):
        again = slice(time * ODD, (time + 1) * ODD)
        np.testing.assert_array_equal(live.classes[again], offline.classes)
        np.testing.assert_array_equal(live.objects[again], offline.objects)
    for column in live.frames.column_names:
        if column not in ("index", "origin", "received", "published", "detector_time"):
            measured = live.frames[column].to_numpy()[:ODD]
            np.testing.assert_array_equal(measured, offline.frames[column].to_numpy(), err_msg=column)


def altered(message: bytes, **changes: Any) -> bytes:
    """An image message with other values under some keys; None takes the key away."""
    item = dict(cbor2.loads(message)) | changes
    return cbor2.dumps(cbor2.CBORTag(55799, {key: value for key, value in item.items() if value is not None}))


def hostile(image: bytes) -> list[tuple[bytes, str]]:
    """(message, the reason it must be quarantined for), made from a good image message."""
    bomb = cbor2.CBORTag(56500, ["bslz4", 4, (2**40).to_bytes(8, "big") + (8192).to_bytes(4, "big") + b"0" * 100])
    pixels = cbor2.CBORTag(40, [[256, 256], cbor2.CBORTag(70, bomb)])
    short = cbor2.CBORTag(40, [[256, 256], cbor2.CBORTag(70, b"1234")])
    return [
        (b"", "not_cbor"),
        (b"\xff" * 50, "not_cbor"),
        (image[: len(image) // 3], "not_cbor"),
        (b"GET / HTTP/1.1\r\n\r\n", "not_cbor"),  # its first letter announces seven bytes, which is a whole CBOR item; more follow
        (cbor2.dumps(42), "not_stream_v2"),
        (cbor2.dumps({"type": "picture"}), "not_stream_v2"),
        (altered(image, image_id="seven"), "bad_index"),
        (altered(image, image_id=-1), "bad_index"),
        (altered(image, image_id=2**60), "bad_index"),
        (altered(image, data={"difference": 1}), "no_channel"),
        (altered(image, data=None), "no_channel"),
        (altered(image, data={"threshold_1": "pixels"}), "wrong_type"),
        (altered(image, data={"threshold_1": pixels}), "bad_compression"),
        (altered(image, data={"threshold_1": short}), "wrong_shape"),
        (altered(image, series_id=None, series_unique_id=None), "missing_key"),
        (bytes(2**20 + 1), "too_large"),
    ]


FAULTS = (
    Fault("garbage", 3),
    Fault("truncated", 7),
    Fault("oversized", 11),
    Fault("wrong_dtype", 15),
    Fault("wrong_shape", 19),
    Fault("duplicated", 23),
    Fault("late", 27),
    Fault("lost", 31),
)


def test_rubbish_between_good_frames_is_quarantined_by_reason_and_every_good_frame_is_published(beamtime: Beamtime, recording: str) -> None:
    number, running = 36, beamtime.running
    good = open_recording(recording, f"80:{80 + number}")
    messages = list(stream(good, None, trouble=Trouble(FAULTS, oversized_bytes=2**20 + 1), unique_id="hostile"))
    rubbish = hostile(messages[1])
    expected = forecast(FAULTS, number)
    reasons = Counter(expected.quarantined) + Counter(reason for _, reason in rubbish)
    with running.sender() as push:
        for place, message in enumerate(messages):
            push.send(message)
            # Behind the first image, so that the series' shape is known; the end message stays last.
            if 1 <= place <= len(rubbish):
                push.send(rubbish[place - 1][0])
        running.until("run closed")
    account = running.get("/ledger")["runs"][0]
    assert account["series"] == "hostile"
    assert account["quarantined"] == dict(reasons)
    assert account["published"] == len(expected.published)
    assert account["dropped"] == {"decode/duplicate": 1}
    assert account["received"] == expected.received + len(rubbish)
    assert (account["missing"], account["in_flight"], account["balanced"]) == (expected.missing, 0, True)
    assert running.get("/healthz") == {"alive": True}
    assert running.get("/readyz")["ready"]
    assert running.get("/ledger?frame=31")["fate"] == "never received"
    said = Counter(line["reason"] for line in running.log if line["event"] == "message quarantined")
    assert said == reasons
    (folder,) = [one for one in run_folders(beamtime.folder.parent) if one != beamtime.folder]
    assert tuple(read_run(folder).frames["index"].to_pylist()) == expected.published
