"""A daemon under attack: what is hostile is refused with its reason and counted, memory stays flat, and the good run after it is whole."""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families

from streamprior.prior import save_prior
from streamprior.records import Detector
from streamprior.wire.dectris_v1 import encode_end as encode_v1_end
from streamprior.wire.dectris_v1 import encode_image as encode_v1_image
from streamprior.wire.dectris_v1 import encode_start as encode_v1_start
from streamprior.wire.documents import dump_body, dump_document
from tests.builders import diffraction, small_prior
from tests.test_daemon import Running, daemon
from tests.test_path import series

GROWTH_MB = 64
"""What a daemon may grow by while it refuses claims of gigabytes; its own caches and the messages themselves are in it."""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_prior(small_prior(), tmp_path / "prior.h5")
    return tmp_path


def peak_mb(running: Running) -> float:
    """The largest that the process has ever been (VmHWM), MB."""
    status = Path(f"/proc/{running.process.pid}/status").read_text()
    return float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


def quarantined(running: Running) -> dict[str, float]:
    families = text_string_to_metric_families(running.get("/metrics"))
    (family,) = [one for one in families if one.name == "streamprior_frames_quarantined"]
    return {sample.labels["reason"]: sample.value for sample in family.samples if sample.name.endswith("_total") and sample.value}


def wait_for(running: Running, expected: dict[str, float]) -> None:
    deadline = time.monotonic() + 60
    while (found := quarantined(running)) != expected and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found == expected


@contextmanager
def publisher(running: Running) -> Iterator[zmq.Socket[bytes]]:
    """A PUB socket that the daemon has subscribed to."""
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.setsockopt(zmq.LINGER, 5000)
        socket.setsockopt(zmq.RCVTIMEO, 30_000)
        socket.connect(f"tcp://127.0.0.1:{running.port}")
        assert socket.recv() == b"\x01"
        yield socket


class Evil:
    """Unpickled, it would make a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def inline_run(frames: np.ndarray, serializer: str = "msgpack") -> list[bytes]:
    """A scan with pixels in its events."""
    image = {"source": "SIM", "dtype": "array", "shape": list(frames.shape[1:]), "dtype_numpy": frames.dtype.str}
    documents = [
        ("start", {"uid": "good", "time": 1.0, "scan_id": 1}),
        ("descriptor", {"uid": "d", "run_start": "good", "time": 1.0, "name": "primary", "data_keys": {"image": image}}),
    ]
    documents += [("event", event(n, {"image": counts})) for n, counts in enumerate(frames)]
    documents.append(
        ("stop", {"uid": "s", "run_start": "good", "time": 2.0, "exit_status": "success", "num_events": {"primary": len(frames)}})
    )
    return [dump_document(name, document, serializer) for name, document in documents]


def event(number: int, data: dict[str, Any], descriptor: str = "d") -> dict[str, Any]:
    return {
        "uid": f"e{number}",
        "descriptor": descriptor,
        "seq_num": number + 1,
        "time": 1.0,
        "data": data,
        "timestamps": dict.fromkeys(data, 1.0),
        "filled": {},
    }


def referring(path: str, uri: bool) -> list[bytes]:
    """A scan whose frames are said to be in a file that is none of ours."""
    image = {"source": "SIM", "dtype": "array", "shape": [32, 32], "dtype_numpy": "<u2", "external": "STREAM:" if uri else "FILESTORE:"}
    documents: list[tuple[str, dict[str, Any]]] = [
        ("start", {"uid": "evil", "time": 1.0, "scan_id": 1}),
        ("descriptor", {"uid": "de", "run_start": "evil", "time": 1.0, "name": "primary", "data_keys": {"image": image}}),
    ]
    if uri:
        resource = {"uid": "r", "run_start": "evil", "mimetype": "application/x-hdf5", "uri": path, "data_key": "image"}
        whole = {"uid": "r/0", "stream_resource": "r", "descriptor": "de"}
        parts = {"indices": {"start": 0, "stop": 1}, "seq_nums": {"start": 1, "stop": 2}}
        documents += [("stream_resource", {**resource, "parameters": {"dataset": "/x"}}), ("stream_datum", whole | parts)]
    else:
        resource = {"uid": "r", "run_start": "evil", "spec": "NPY_SEQ", "root": "/", "resource_path": path, "resource_kwargs": {}}
        documents += [
            ("resource", {**resource, "path_semantics": "posix"}),
            ("datum", {"datum_id": "r/0", "resource": "r", "datum_kwargs": {"index": 0}}),
            ("event", event(0, {"image": "r/0"}, "de") | {"filled": {"image": False}}),
        ]
    documents.append(("stop", {"uid": "se", "run_start": "evil", "time": 2.0, "exit_status": "success"}))
    return [dump_document(name, document) for name, document in documents]


def accounts(running: Running) -> list[dict[str, Any]]:
    return [one for one in running.get("/ledger")["runs"] if one["run"] is not None]


def wait_until_closed(running: Running, series: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        closed = [one for one in accounts(running) if one["series"] == series and one["closed"] is not None]
        if closed:
            return closed[0]
        time.sleep(0.05)
    raise AssertionError(f"series {series} did not end: {accounts(running)}")


def test_hostile_documents_cost_the_daemon_nothing(place: Path) -> None:
    frames = diffraction(count=20)
    claim = {b"nd": True, b"type": "<u2", b"kind": b"", b"shape": [100_000, 50_000], b"data": b"\0" * 100}  # an array of 10 GB
    head = b" event "
    source = {"kind": "documents", "max_message_mb": 4}
    documents = {"image": "image", "folders": [str(place)], "flush_s": 0.2}
    with daemon(place, source=source, documents=documents) as running, publisher(running) as push:
        before = peak_mb(running)
        # A byte string of 4 GB and a list of 4 billion items: msgpack claims either in five bytes.
        for message in (
            head + dump_body({"data": claim}),
            head + b"\x81\xa4data\xc6\xff\xff\xff\xff",
            head + b"\x81\xa4data\xdd\xff\xff\xff\xff",
            head + b"\xff" * 100,
            head + b"\0" * (8 * 2**20),
        ):
            push.send(message)
        wait_for(running, {"wrong_shape": 1, "not_document": 3, "too_large": 1})
        for message in (*referring("../../../../../../etc/passwd", False), *referring("file://localhost/etc/passwd", True)):
            push.send(message)
        for message in inline_run(frames):
            push.send(message)
        account = wait_until_closed(running, "good")
        assert quarantined(running) == {"wrong_shape": 1, "not_document": 3, "too_large": 1, "outside_folder": 2}
        assert (account["received"], account["published"], account["balanced"]) == (20, 20, True)
        assert peak_mb(running) - before < GROWTH_MB
        code, _ = running.leave()
    assert code == 0


def test_a_pickle_that_would_run_code_is_refused_and_runs_none(place: Path) -> None:
    frames = diffraction(count=5)
    proof = place / "was-here"
    source = {"kind": "documents", "max_message_mb": 4}
    with daemon(place, source=source, documents={"serializer": "pickle"}) as running, publisher(running) as push:
        before = peak_mb(running)
        for attack in (pickle.dumps({"data": Evil(proof)}), pickle.dumps(Evil(proof), 2), b"cbuiltins\neval\n(S'1+1'\ntR."):
            push.send(b" event " + attack)
        # numpy.zeros would take 8 TB; a memo index of 2**31 takes its gigabytes in the C reader of pickles.
        push.send(b" event " + pickle.dumps(_Zeros()))
        push.send(b" event \x80\x04]r\xff\xff\xff\x7f.")
        for message in inline_run(frames, "pickle"):
            push.send(message)
        account = wait_until_closed(running, "good")
        assert (account["received"], account["published"], account["balanced"]) == (5, 5, True)
        # Protocols before 3 are not read at all; the memo's index is passed over, and what is left is a list.
        assert quarantined(running) == {"unsafe_pickle": 2, "not_document": 2, "bad_document": 1}
        assert not proof.exists()
        assert peak_mb(running) - before < GROWTH_MB
        code, _ = running.leave()
    assert code == 0


class _Zeros:
    def __reduce__(self) -> Any:
        return np.zeros, ((10**12,),)


@pytest.mark.parametrize("kind", ["dectris_v1", "dectris_v2"])
def test_a_blob_whose_header_claims_100_gb_costs_nothing(kind: str, place: Path) -> None:
    frames = diffraction(count=10)
    claim = struct.pack(">QI", 100 * 10**9, 8192) + b"\0" * 100
    with daemon(place, source={"kind": kind}) as running, running.sender() as push:
        before = peak_mb(running)
        if kind == "dectris_v2":
            for size in ((32, 32), (250_000, 200_000)):
                typed = cbor2.CBORTag(40, [list(size), cbor2.CBORTag(69, cbor2.CBORTag(56500, ["bslz4", 2, claim]))])
                image = {"type": "image", "series_id": 9, "image_id": 0, "data": {"threshold_1": typed}}
                push.send(cbor2.dumps(cbor2.CBORTag(55799, image)))
            wait_for(running, {"bad_compression": 1, "wrong_shape": 1})
            for message in series(frames):
                push.send(message)
        else:
            head, described, _, config = encode_v1_image(9, 0, frames[0], 0.0)
            for size in ([32, 32], [250_000, 200_000]):
                told = json.loads(described) | {"shape": size, "size": len(claim)}
                plain = json.loads(head) | {"hash": ""}
                push.send_multipart([json.dumps(plain).encode(), json.dumps(told).encode(), claim, config])
            wait_for(running, {"bad_compression": 1, "wrong_shape": 1})
            push.send_multipart(encode_v1_start(1, Detector(frames.shape[1:]), len(frames), frames.dtype, {}))
            for n, counts in enumerate(frames):
                push.send_multipart(encode_v1_image(1, n, counts, 0.01 * n))
            push.send_multipart(encode_v1_end(1))
        account = wait_until_closed(running, "S1" if kind == "dectris_v2" else "1")
        assert (account["received"], account["published"], account["balanced"]) == (10, 10, True)
        assert peak_mb(running) - before < GROWTH_MB
        code, _ = running.leave()
    assert code == 0
