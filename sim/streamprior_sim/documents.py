"""A recording -> the documents of a Bluesky run -> a 0MQ publisher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import h5py
import numpy as np
import numpy.typing as npt
import zmq

from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.seams import Document
from streamprior.wire.documents import Serializer, dump_document
from streamprior_sim.twin import Recording

Pixels = Literal["inline", "files", "datum"]

IMAGE = "image"
"""Data key of the frames; the motors' are x and y."""

DATASET = "/entry/data/data"

_STREAM = "primary"
_MICRONS_A_METRE = 1e6
_HIGH_WATER = 1000
"""Documents that wait in the publisher, as Bluesky's own has it; beyond it `send` blocks instead of losing them."""

_LINGER_MS = 5000


class _Pixels(Protocol):
    """Where the frames of a run go; a context that ends with the run."""

    external: str | None
    """What the descriptor says of them."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *error: object) -> None: ...

    def announce(self) -> Iterator[Document]:
        """What goes before the first event."""

    def put(self, number: int, counts: npt.NDArray[Any], descriptor: Mapping[str, Any]) -> Iterator[Document]:
        """Frame `number` is stored; what goes before its event."""

    def reading(self, counts: npt.NDArray[Any]) -> dict[str, Any]:
        """What its event holds."""


def documents(
    recording: Recording,
    rate_hz: float | None,
    frames: slice | None = None,
    pixels: Pixels = "inline",
    folder: Path | None = None,
) -> Iterator[Document]:
    """The documents of one run, each composed when it is asked for: start, descriptor, an event a frame with the motors, stop.

    Parameters
    ----------
    recording : its positions are the readings of motors x and y, micrometres; NaN where the stage reported nothing.
    rate_hz : event k is stamped k / rate_hz after the first; None: when it is composed.
    frames : which of the recording's frames.
    pixels : where the frames are. "inline": arrays within the events. "files": one HDF5 file, written in SWMR mode as the frames go, with
        stream_resource and stream_datum as ophyd-async writes them; no events where there are no motors. "datum": a .npy file a frame,
        with resource (NPY_SEQ) and datum, as ophyd has them. A document that refers to a frame goes out when the frame is flushed.
    folder : where the files are made; it must be there.

    Raises
    ------
    ConfigError
        event-model is not installed, no frame is left, or files cannot be made in the folder.
    """
    try:
        from event_model import compose_run
    except ImportError:
        raise ConfigError("documents need event-model, which is not installed: pip install 'streamprior[bluesky]'") from None
    chosen = range(*(frames or slice(None)).indices(len(recording)))
    if not chosen:
        raise ConfigError(f"{recording.name}: no frame is left of {len(recording)} by {frames}; choose others")
    motors = ("x", "y") if any(recording.position(index) is not None for index in chosen) else ()
    run = compose_run(metadata=_about(recording, len(chosen), motors))
    first = recording.frame(chosen[0])
    with _place(pixels, folder, run, first) as place:
        yield "start", dict(run.start_doc)
        keys = _data_keys(recording, first, place.external, motors)
        described = run.compose_descriptor(_STREAM, keys, object_keys={key: [key] for key in keys}, configuration=_unconfigured(keys))
        yield "descriptor", dict(described.descriptor_doc)
        yield from place.announce()
        began = time.time()
        for number, index in enumerate(chosen):
            at = began + number / rate_hz if rate_hz else time.time()
            counts = recording.frame(index)
            yield from place.put(number, counts, described.descriptor_doc)
            data = place.reading(counts) | _where(recording.position(index), motors)
            if data:
                # Where the frames are in a file there is nothing to say without motors, and the RunEngine says nothing.
                filled = {} if place.external is None else {key: False for key in data if key == IMAGE}
                yield "event", dict(described.compose_event(data, dict.fromkeys(data, at), filled=filled, time=at))
    yield "stop", dict(run.compose_stop())


class Publisher(Protocol):
    """Where documents go."""

    def send(self, document: Document | bytes) -> None:
        """A document, or a message as it is."""


@contextmanager
def zmq_publisher(
    address: str,
    prefix: bytes = b"",
    serializer: Serializer = "msgpack",
    timeout_s: float = 10.0,
    prepare: Callable[[zmq.Socket[bytes]], None] | None = None,
) -> Iterator[Publisher]:
    """A publisher connected to `address` ("tcp://HOST:PORT"): to a Bluesky proxy, where documents go in, or to a bound subscriber.

    It begins when it is subscribed to, so that the first documents are not lost. A Bluesky proxy subscribes to everything by itself and
    does not tell who listens behind it: a consumer that comes later than this to a proxy misses documents.

    Raises
    ------
    ConfigError
        The address is malformed, or nobody subscribes within `timeout_s`.
    SinkUnavailable
        From `send`: the subscriber took nothing for `timeout_s`.
    """
    with zmq.Context() as context, context.socket(zmq.XPUB) as socket:
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        # A publisher drops what its subscriber is too slow for; the twin waits instead.
        socket.setsockopt(zmq.XPUB_NODROP, 1)
        if prepare is not None:  # keys
            prepare(socket)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot publish to {address}: {error}; name it as tcp://HOST:PORT") from None
        if not socket.poll(round(timeout_s * 1000), zmq.POLLIN):
            raise ConfigError(
                f"nobody subscribes at {address} ({timeout_s:g} s); start the proxy or the receiver first, or name its address"
            )
        try:
            yield _Xpub(socket, address, prefix, serializer, timeout_s)
        except SinkUnavailable:
            # Nobody takes the rest either.
            socket.setsockopt(zmq.LINGER, 0)
            raise


class _Xpub:
    """The socket with its errors told in the house's words."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, prefix: bytes, serializer: Serializer, timeout_s: float) -> None:
        self._socket, self._address, self._prefix = socket, address, prefix
        self._serializer, self._timeout_s = serializer, timeout_s

    def send(self, document: Document | bytes) -> None:
        message = document if isinstance(document, bytes) else dump_document(*document, self._serializer, self._prefix)
        try:
            self._socket.send(message)
        except zmq.Again:
            raise SinkUnavailable(f"{self._address} took no document for {self._timeout_s:g} s: is the subscriber stuck?") from None


class _Inline:
    """Frames within the events."""

    external = None

    def __enter__(self) -> _Inline:
        return self

    def __exit__(self, *error: object) -> None: ...

    def announce(self) -> Iterator[Document]:
        return iter(())

    def put(self, number: int, counts: npt.NDArray[Any], descriptor: Mapping[str, Any]) -> Iterator[Document]:
        return iter(())

    def reading(self, counts: npt.NDArray[Any]) -> dict[str, Any]:
        return {IMAGE: counts}


class _Hdf5:
    """One file of frames that can be read while it is written."""

    external = "STREAM:"

    def __init__(self, folder: Path, run: Any, first: npt.NDArray[Any]) -> None:
        path = folder / f"{run.start_doc['uid']}.h5"
        try:
            self._file = h5py.File(path, "w", libver="latest")
        except OSError as error:
            raise ConfigError(f"{path}: cannot be made ({error}); make the folder, or name another one") from None
        chunk = (1, *first.shape)
        self._stack = self._file.create_dataset(DATASET, (0, *first.shape), first.dtype, maxshape=(None, *first.shape), chunks=chunk)
        self._file.swmr_mode = True
        self._resource = run.compose_stream_resource(
            mimetype="application/x-hdf5",
            uri=f"file://localhost{path.absolute()}",
            data_key=IMAGE,
            parameters={"dataset": DATASET, "chunk_shape": chunk},
        )

    def __enter__(self) -> _Hdf5:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def announce(self) -> Iterator[Document]:
        yield "stream_resource", dict(self._resource.stream_resource_doc)

    def put(self, number: int, counts: npt.NDArray[Any], descriptor: Mapping[str, Any]) -> Iterator[Document]:
        self._stack.resize(number + 1, axis=0)
        self._stack[number] = counts
        self._stack.flush()
        indices, events = {"start": number, "stop": number + 1}, {"start": number + 1, "stop": number + 2}
        yield "stream_datum", dict(self._resource.compose_stream_datum(indices, events, descriptor))

    def reading(self, counts: npt.NDArray[Any]) -> dict[str, Any]:
        return {}


class _NpySequence:
    """A file a frame, named by its number."""

    external = "FILESTORE:"

    def __init__(self, folder: Path, run: Any) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; make it, or name another one")
        self._stem = folder / run.start_doc["uid"]
        self._resource = run.compose_resource("NPY_SEQ", str(folder.absolute()), self._stem.name, {})
        self._datum_id = ""

    def __enter__(self) -> _NpySequence:
        return self

    def __exit__(self, *error: object) -> None: ...

    def announce(self) -> Iterator[Document]:
        yield "resource", dict(self._resource.resource_doc)

    def put(self, number: int, counts: npt.NDArray[Any], descriptor: Mapping[str, Any]) -> Iterator[Document]:
        np.save(f"{self._stem}_{number}.npy", counts)
        datum = self._resource.compose_datum({"index": number})
        self._datum_id = datum["datum_id"]
        yield "datum", dict(datum)

    def reading(self, counts: npt.NDArray[Any]) -> dict[str, Any]:
        return {IMAGE: self._datum_id}


def _place(pixels: Pixels, folder: Path | None, run: Any, first: npt.NDArray[Any]) -> _Pixels:
    if pixels == "inline":
        return _Inline()
    if folder is None:
        raise ConfigError(f"documents with pixels={pixels!r} refer to files: name a folder for them")
    return _Hdf5(folder, run, first) if pixels == "files" else _NpySequence(folder, run)


def _about(recording: Recording, frames: int, motors: tuple[str, ...]) -> dict[str, Any]:
    """The start document beside uid and time, as a plan of the RunEngine would have it."""
    return {
        "scan_id": 1,
        "plan_name": "scan" if motors else "count",
        "plan_type": "generator",
        "num_points": frames,
        "detectors": [IMAGE],
        "motors": list(motors),
        "sample_name": recording.name,
        "hints": {"dimensions": [[list(motors) or ["time"], _STREAM]]},
    }


def _data_keys(recording: Recording, first: npt.NDArray[Any], external: str | None, motors: tuple[str, ...]) -> dict[str, Any]:
    image = {
        "source": f"SIM:{recording.name}",
        "dtype": "array",
        "dtype_numpy": first.dtype.str,
        "shape": list(first.shape),
        "object_name": IMAGE,
    }
    motor = {"dtype": "number", "dtype_numpy": "<f8", "shape": [], "units": "um"}
    return {IMAGE: image if external is None else image | {"external": external}} | {
        name: motor | {"source": f"SIM:{name}", "object_name": name} for name in motors
    }


def _unconfigured(keys: Mapping[str, Any]) -> dict[str, Any]:
    return {key: {"data": {}, "timestamps": {}, "data_keys": {}} for key in keys}


def _where(position: tuple[float, float] | None, motors: tuple[str, ...]) -> dict[str, float]:
    metres = position or (float("nan"), float("nan"))
    return {name: at * _MICRONS_A_METRE for name, at in zip(motors, metres, strict=False)}
