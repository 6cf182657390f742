"""Bluesky documents over 0MQ, on real sockets: a RunEngine to us, the twin to Bluesky's dispatcher, messages without end."""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import zmq
from streamprior_sim.documents import DATASET, Pixels, documents, zmq_publisher
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin, build

from streamprior.errors import ConfigError, SinkUnavailable, WireError
from streamprior.sources.zmq import ZmqSubscribe
from streamprior.wire.documents import REFUSED_BY_TRANSPORT, Serializer, dump_document, load_document

event_model = pytest.importorskip("event_model")
pytest.importorskip("bluesky")

LIMIT = 2**20
PROBE = {"uid": "probe", "time": 0.0}


class Proxy(NamedTuple):
    """Where documents go in and come out."""

    into: str
    out: str


@contextmanager
def child(*command: str) -> Iterator[subprocess.Popen[str]]:
    """A process of our own whose lines can be read as it writes them; it ends with the context."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=20)


def line_of(process: subprocess.Popen[str], pattern: str) -> re.Match[str]:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if match := re.search(pattern, line):
            return match
    raise AssertionError(f"the process ended without {pattern!r}: {''.join(said)}")


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    """Bluesky's own proxy, in a process of its own."""
    command = Path(sys.executable).with_name("bluesky-0MQ-proxy")
    with child(str(command), "--in-address", "127.0.0.1:0", "--out-address", "127.0.0.1:0") as process:
        told = line_of(process, r"Receiving on address (tcp://\S+); publishing to address (tcp://\S+?)\.?$")
        yield Proxy(told[1], told[2])


@contextmanager
def subscribed(address: str, attach: Any = "connect", limit: int = LIMIT) -> Iterator[ZmqSubscribe]:
    source = ZmqSubscribe("bluesky", address, attach, 256, limit)
    source.open()
    try:
        yield source
    finally:
        source.close()


def until(source: ZmqSubscribe, wanted: Callable[[Any], bool], seconds: float = 60.0) -> list[Any]:
    """Messages up to and with the first that is wanted."""
    messages: list[Any] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        message = source.receive(0.1)
        if message is not None:
            messages.append(message)
            if wanted(message):
                return messages
    raise AssertionError(f"not among {len(messages)} messages in {seconds} s")


def listened(publish: Callable[[str, dict[str, Any]], None], source: ZmqSubscribe) -> None:
    """Returns once what is published arrives: publishers cannot know who is connected already."""
    for _ in range(600):
        publish("start", PROBE)
        if source.receive(0.1) is not None:
            return
    raise AssertionError("no probe arrived")


def as_lists(value: Any) -> Any:
    """What a serializer without tuples makes of a document."""
    if isinstance(value, Mapping):
        return {key: as_lists(one) for key, one in value.items()}
    return [as_lists(one) for one in value] if isinstance(value, list | tuple) else value


def as_numbers(value: Any) -> Any:
    """What a serializer without arrays makes of it too."""
    if isinstance(value, Mapping):
        return {key: as_numbers(one) for key, one in value.items()}
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return [as_numbers(one) for one in value] if isinstance(value, list | tuple) else value


def publisher_options(serializer: Serializer) -> dict[str, Any]:
    """How a beamline sets up Bluesky's Publisher."""
    if serializer == "pickle":
        return {}
    if serializer == "json":
        return {"serializer": lambda document: json.dumps(document, cls=event_model.NumpyEncoder).encode()}
    import msgpack
    import msgpack_numpy

    return {"serializer": functools.partial(msgpack.packb, default=msgpack_numpy.encode)}


@pytest.mark.parametrize("serializer", ["msgpack", "json", "pickle"])
@pytest.mark.parametrize("route", ["proxy", "direct"])
def test_a_run_engines_documents_arrive_as_they_were_published(proxy: Proxy, route: str, serializer: Serializer) -> None:
    from bluesky import RunEngine
    from bluesky.callbacks.zmq import Publisher
    from bluesky.plans import scan
    from ophyd.sim import SynSignal, det, motor

    frames: list[np.ndarray] = []

    def exposure() -> np.ndarray:
        frames.append(np.random.default_rng(len(frames)).poisson(3, (32, 24)).astype("u2"))
        return frames[-1]

    image = SynSignal(func=exposure, name="image")
    published: list[tuple[str, Any]] = []
    with subscribed(proxy.out if route == "proxy" else "tcp://127.0.0.1:*", "connect" if route == "proxy" else "bind") as source:
        publisher = Publisher(proxy.into if route == "proxy" else source.address, prefix=b"beam1", **publisher_options(serializer))
        try:
            listened(publisher, source)
            engine = RunEngine({"sample": "ç"}, context_managers=[])
            engine.subscribe(publisher)
            engine.subscribe(lambda name, document: published.append((name, copy.deepcopy(document))))
            engine(scan([det, image], motor, -1, 1, 5))
            messages = until(source, lambda message: b" stop " in message)
        finally:
            publisher.close()
    received = [load_document(message, b"beam1", serializer, LIMIT) for message in messages if b"probe" not in message]
    assert [name for name, _ in received] == ["start", "descriptor", *["event"] * 5, "stop"]
    alike = {"pickle": lambda document: document, "msgpack": as_lists, "json": as_numbers}[serializer]
    for (name, document), (told, original) in zip(received, published, strict=True):
        assert name == told
        np.testing.assert_equal(document, alike(original))
    if serializer != "json":
        for frame, (_, event) in zip(frames[-5:], received[2:7], strict=True):
            np.testing.assert_array_equal(event["data"]["image"], frame, strict=True)


@pytest.fixture(scope="module")
def twin() -> Twin:
    return build(load_scenario("gold_balls"))


def events_of(published: list[tuple[str, Any]]) -> list[Any]:
    return [document for name, document in published if name == "event"]


@pytest.mark.parametrize("name", ["gold_balls", "bragg"])
@pytest.mark.parametrize("pixels", ["inline", "files", "datum"])
def test_the_twins_documents_are_valid(name: str, pixels: Pixels, tmp_path: Path) -> None:
    told = list(documents(build(load_scenario(name)), 100.0, slice(0, 6, 2), pixels, tmp_path))
    for kind, document in told:
        event_model.schema_validators[event_model.DocumentNames[kind]].validate(document)
    kinds = [kind for kind, _ in told]
    assert (kinds[0], kinds[1], kinds[-1]) == ("start", "descriptor", "stop")
    assert told[0][1]["num_points"] == 3
    events = events_of(told)
    assert len(events) == (0 if (name, pixels) == ("bragg", "files") else 3)
    assert np.diff([event["time"] for event in events]) == pytest.approx(0.01)
    assert [event["seq_num"] for event in events] == list(range(1, len(events) + 1))


def test_motors_stand_where_the_recording_says(twin: Twin) -> None:
    told = list(documents(twin, None, slice(3, 6)))
    keys = told[1][1]["data_keys"]
    assert (keys["x"]["units"], keys["y"]["units"]) == ("um", "um")
    for index, event in zip(range(3, 6), events_of(told), strict=True):
        assert (event["data"]["x"] * 1e-6, event["data"]["y"] * 1e-6) == pytest.approx(twin.position(index), rel=1e-12)


def test_a_reference_to_a_frame_goes_out_when_the_frame_can_be_read(twin: Twin, tmp_path: Path) -> None:
    path, seen = None, 0
    for name, document in documents(twin, None, slice(0, 4), "files", tmp_path):
        if name == "stream_resource":
            assert document["uri"].startswith("file://localhost/")
            path = Path(document["uri"].removeprefix("file://localhost"))
            assert document["parameters"] == {"dataset": DATASET, "chunk_shape": (1, *twin.detector().shape)}
        if name == "stream_datum":
            assert path is not None
            with h5py.File(path, swmr=True) as file:
                np.testing.assert_array_equal(file[DATASET][document["indices"]["start"]], twin.frame(seen))
            seen += 1
    assert seen == 4


def test_the_old_reference_fills_with_blueskys_handler(twin: Twin, tmp_path: Path) -> None:
    from ophyd.sim import NumpySeqHandler

    with event_model.Filler({"NPY_SEQ": NumpySeqHandler}, inplace=False) as filler:
        filled = [filler(name, document) for name, document in documents(twin, None, slice(0, 3), "datum", tmp_path)]
    for index, event in enumerate(events_of(filled)):
        np.testing.assert_array_equal(event["data"]["image"], twin.frame(index))


def test_a_twin_that_cannot_compose_says_why(twin: Twin, tmp_path: Path) -> None:
    for wrong, words in (
        ({"frames": slice(0, 0)}, "no frame is left"),
        ({"pixels": "files"}, "name a folder"),
        ({"pixels": "files", "folder": tmp_path / "absent"}, "cannot be made"),
        ({"pixels": "datum", "folder": tmp_path / "absent"}, "no such folder"),
    ):
        with pytest.raises(ConfigError, match=words):
            next(documents(twin, None, **wrong))


DISPATCHER = """
import functools, json, sys
import event_model, msgpack, msgpack_numpy
from bluesky.callbacks.zmq import RemoteDispatcher

def told(name, document):
    event_model.schema_validators[event_model.DocumentNames[name]].validate(document)
    image = document.get("data", {}).pop("image", None)
    pixels = None if image is None else [image.dtype.str, image.shape, image.tobytes().hex()]
    print(json.dumps([name, document, pixels]))

dispatcher = RemoteDispatcher(
    sys.argv[1], prefix=b"beam1", strict=True, deserializer=functools.partial(msgpack.unpackb, object_hook=msgpack_numpy.decode)
)
dispatcher.subscribe(lambda name, document: told(name.name if hasattr(name, "name") else name, document))
dispatcher.start()
"""


def test_blueskys_dispatcher_receives_the_twins_documents(proxy: Proxy, twin: Twin) -> None:
    published = list(documents(twin, None, slice(0, 40)))
    with child(sys.executable, "-c", DISPATCHER, proxy.out) as dispatcher, zmq_publisher(proxy.into, b"beam1") as publisher:
        heard, done = threading.Event(), threading.Event()
        lines: list[str] = []

        def listen() -> None:
            assert dispatcher.stdout is not None
            for line in dispatcher.stdout:
                lines.append(line)
                heard.set()
                if line.startswith('["stop"'):
                    done.set()
                    return

        listener = threading.Thread(target=listen)
        listener.start()
        for _ in range(600):
            publisher.send(("start", PROBE))
            if heard.wait(0.1):
                break
        for document in published:
            publisher.send(document)
        assert done.wait(60), "".join(lines)
        listener.join()
    received = [one for one in map(json.loads, lines) if one[1]["uid"] != "probe"]
    assert [name for name, _, _ in received] == [name for name, _ in published]
    images = 0
    for (name, document, pixels), (_, original) in zip(received, published, strict=True):
        if name == "event":
            dtype, shape, data = pixels
            np.testing.assert_array_equal(np.frombuffer(bytes.fromhex(data), dtype).reshape(shape), twin.frame(images), strict=True)
            images += 1
            original = original | {"data": {key: value for key, value in original["data"].items() if key != "image"}}
        assert document == as_lists(original)
    assert images == 40


def test_the_twins_documents_reach_us_without_a_proxy(twin: Twin) -> None:
    published = list(documents(twin, None, slice(0, 5)))
    with subscribed("tcp://127.0.0.1:*", "bind") as source:

        def publish() -> None:
            with zmq_publisher(source.address, b"beam1") as publisher:
                for document in published:
                    publisher.send(document)

        thread = threading.Thread(target=publish)
        thread.start()
        messages = until(source, lambda message: b" stop " in message)
        thread.join()
    for message, original in zip(messages, published, strict=True):  # none is lost, not even the first
        np.testing.assert_equal(load_document(message, b"beam1", "msgpack", LIMIT), as_lists(original))


def test_a_publisher_without_subscriber_says_so() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as socket:
        free = socket.bind_to_random_port("tcp://127.0.0.1")
        socket.unbind(f"tcp://127.0.0.1:{free}")
    with pytest.raises(ConfigError, match="nobody subscribes"), zmq_publisher(f"tcp://127.0.0.1:{free}", timeout_s=0.05):
        pass
    with pytest.raises(ConfigError, match="tcp://HOST:PORT"), zmq_publisher("127.0.0.1"):
        pass


def test_a_twin_whose_subscriber_is_stuck_waits_and_then_says_so() -> None:
    failures: list[str] = []

    def publish() -> None:
        document = ("event", {"data": {"image": np.zeros(10_000, "u2")}})
        try:
            with zmq_publisher(source.address, timeout_s=0.5) as publisher:
                for _ in range(5000):
                    publisher.send(document)
        except SinkUnavailable as error:
            failures.append(str(error))

    source = ZmqSubscribe("bluesky", "tcp://127.0.0.1:*", "bind", 1, LIMIT)
    source.open()
    thread = threading.Thread(target=publish)
    thread.start()
    until(source, bool)
    thread.join(60)
    source.close()
    assert len(failures) == 1
    assert "is the subscriber stuck" in failures[0]


def peak_mb() -> float:
    """Most resident memory since the mark was last set."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000


FLOOD = """
import sys, zmq
with zmq.Context() as context, context.socket(zmq.PUB) as socket:
    socket.connect(sys.argv[1]) if sys.argv[2] == "connect" else print(socket.bind(sys.argv[1]).addr)
    for line in sys.stdin:
        socket.send(b" start " + (bytes(int(line)) if int(line) else b"\\x80"))
"""


@contextmanager
def flood(address: str, attach: str) -> Iterator[Callable[[int], None]]:
    """A publisher in a process of its own; called with a number it sends a document of so many bytes, with 0 a good one."""
    command = [sys.executable, "-c", FLOOD, address, attach]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None

        def send(nbytes: int) -> None:
            process.stdin.write(f"{nbytes}\n")
            process.stdin.flush()

        try:
            yield send
        finally:
            process.terminate()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux' /proc")
@pytest.mark.parametrize("route", ["proxy", "direct"])
def test_a_message_beyond_every_limit_costs_no_memory_and_not_the_next(proxy: Proxy, route: str) -> None:
    through = route == "proxy"
    address = proxy.out if through else "tcp://127.0.0.1:*"
    with (
        subscribed(address, "connect" if through else "bind") as source,
        flood(proxy.into if through else source.address, "connect") as send,
    ):
        listened(lambda *document: send(0), source)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_mb()
        send(50_000_000)
        messages = []
        if through:
            messages = until(source, lambda message: message == REFUSED_BY_TRANSPORT)
        listened(lambda *document: send(0), source)
        assert peak_mb() - before < 20
    assert max((len(message) for message in messages), default=0) < 100
    with pytest.raises(WireError) as caught:
        load_document(REFUSED_BY_TRANSPORT, b"", "msgpack", LIMIT)
    assert caught.value.reason == "too_large"


def test_a_message_a_little_beyond_the_limit_is_received_and_counted(proxy: Proxy) -> None:
    with subscribed(proxy.out) as source, flood(proxy.into, "connect") as send:
        listened(lambda *document: send(0), source)
        send(2 * LIMIT)
        *_, message = until(source, lambda message: len(message) > 100)
        with pytest.raises(WireError, match="too_large"):
            load_document(message, b"", "msgpack", LIMIT)
        listened(lambda *document: send(0), source)


def test_a_proxy_that_comes_back_is_no_loss_that_is_counted() -> None:
    with zmq.Context() as context:
        socket = context.socket(zmq.PUB)
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        with subscribed(f"tcp://127.0.0.1:{port}") as source:
            for _ in range(2):
                got: list[Any] = []

                def publish(name: str, document: dict[str, Any], socket: zmq.Socket[bytes] = socket) -> None:
                    socket.send(dump_document(name, document))

                listened(publish, source)
                socket.close(0)
                # Longer than the silence after which a connection counts as given up.
                deadline = time.monotonic() + 1.0
                while time.monotonic() < deadline:
                    got.append(source.receive(0.05))
                assert REFUSED_BY_TRANSPORT not in got
                socket = context.socket(zmq.PUB)
                socket.bind(f"tcp://127.0.0.1:{port}")
            socket.close(0)


def test_an_address_that_cannot_be_had_is_the_operators() -> None:
    with subscribed("tcp://127.0.0.1:*", "bind") as first:
        second = ZmqSubscribe("bluesky", first.address, "bind", 256, LIMIT, setting="positions.address")
        with pytest.raises(ConfigError, match=r"positions\.address: cannot bind"):
            second.open()
    with pytest.raises(ConfigError, match=r"source\.address: cannot connect"):
        ZmqSubscribe("bluesky", "tcp://no host:1", "connect", 256, LIMIT).open()
