"""A recording -> the messages of a wire, with faults among them where they are asked for -> a socket, at a fixed rate."""

from __future__ import annotations

import datetime
import itertools
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import zmq

from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.seams import Document, Parts
from streamprior.wire.keys import Key, parse_key
from streamprior_sim.faults import NO_TROUBLE, Forecast, Trouble, forecast, inject
from streamprior_sim.twin import Progress, Recording
from streamprior_sim.wires import STREAM_V2, Sensor, Wire, dialect

_HIGH_WATER = 200
"""Messages that wait in the sender: 2 s at 100 Hz. Beyond it `send` blocks, as a detector's buffer would fill."""

_LINGER_MS = 5000
"""How long a closing socket waits for the receiver to take the last messages."""

Message = bytes | Parts
"""What a socket sends at once: a message of one part is its bytes."""


class Sender(Protocol):
    """Where messages go, or documents."""

    def send(self, message: Any, /) -> None: ...


@dataclass(frozen=True, slots=True)
class Emitted:
    """What `emit` did: messages sent, seconds it took, turns that came more than a period after their time."""

    sent: int
    seconds: float
    late: int


def emit(
    recording: Recording,
    sender: Sender,
    rate_hz: float | None,
    frames: slice | None = None,
    progress: Progress | None = None,
    wire: Wire = STREAM_V2,
    trouble: Trouble = NO_TROUBLE,
) -> Emitted:
    """Send a recording as one series of a DECTRIS stream.

    Parameters
    ----------
    recording : a `Twin` renders some hundred frames a second; wrap it in `Prerendered` for more.
    sender : for example `zmq_sender(address)`.
    rate_hz : images a second, None as fast as the receiver takes them.
    frames : which of the recording's frames; the wire numbers them from 0, `origin` keeps their index in the recording.
    progress : called with (start, images and end sent, of how many) after each one.
    wire : what is spoken. trouble : what goes wrong on the way; its indices are the wire's.

    Raises
    ------
    ConfigError
        The faults contradict each other or the wire, or no frame is left.
    SinkUnavailable
        The receiver took nothing for the sender's timeout.
    """
    total = len(_chosen(recording, frames)) + 2
    turns = _turns(recording, rate_hz, frames, wire, trouble)
    return pace(turns, sender, rate_hz, None if progress is None else lambda done: progress(min(done, total), total))


def foreseen(recording: Recording, wire: Wire, trouble: Trouble, frames: slice | None = None) -> Forecast:
    """What a correct receiver makes of what `emit` sends. Raises ConfigError where the faults contradict each other or the wire."""
    return forecast(trouble.faults, len(_chosen(recording, frames)), wire)


@dataclass(frozen=True, slots=True)
class Keys:
    """For a receiver that takes CURVE alone. own : our pair. server : the receiver's public key."""

    own: Key
    server: bytes

    def give(self, socket: zmq.Socket[bytes]) -> None:
        """To a socket that is not connected yet."""
        socket.setsockopt(zmq.CURVE_PUBLICKEY, self.own.public)
        socket.setsockopt(zmq.CURVE_SECRETKEY, self.own.secret or b"")
        socket.setsockopt(zmq.CURVE_SERVERKEY, self.server)


def load_keys(secret: Path, server: Path) -> Keys:
    """Keys out of files of `streamprior keys`. Raises ConfigError."""
    read = []
    for file in (secret, server):
        try:
            read.append(parse_key(file.read_text("utf-8", "replace"), str(file)))
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read ({error.strerror})") from None
    if read[0].secret is None:
        raise ConfigError(f"{secret}: holds a public key alone; name the file that ends in .key_secret")
    return Keys(read[0], read[1].public)


def send(
    recording: Recording,
    to: str,
    rate_hz: float | None,
    wire: Wire,
    trouble: Trouble,
    progress: Progress | None = None,
    keys: Keys | None = None,
) -> Emitted:
    """Send a recording over `wire` to the address "tcp://HOST:PORT": a receiver of a DECTRIS stream, or a proxy or subscriber of documents.

    Raises
    ------
    ConfigError
        As `emit`; or nobody listens there.
    SinkUnavailable
        As `emit`.
    """
    foreseen(recording, wire, trouble)
    if wire.kind != "documents":
        with zmq_sender(to, keys=keys) as sender:
            return emit(recording, sender, rate_hz, None, progress, wire, trouble)
    from streamprior_sim.documents import documents, zmq_publisher

    total = len(recording) + 3  # start, descriptor and stop
    with zmq_publisher(to, prepare=keys.give if keys is not None else None) as publisher:
        whole: Iterable[tuple[Message | Document, ...]] = ((document,) for document in documents(recording, rate_hz))
        run = _turns(recording, rate_hz, None, wire, trouble) if trouble.faults else whole
        return pace(run, publisher, rate_hz, None if progress is None else lambda done: progress(min(done, total), total))


def stream(
    recording: Recording,
    rate_hz: float | None,
    frames: slice | None = None,
    wire: Wire = STREAM_V2,
    trouble: Trouble = NO_TROUBLE,
    unique_id: str | None = None,
    series: int = 1,
) -> Iterator[Message]:
    """The messages of one series; each is encoded when it is asked for.

    The detector's clock begins at the first image; with a rate, frame k is stamped k / rate_hz later, otherwise when it is encoded.

    Parameters
    ----------
    unique_id : the series' name on stream V2, one is made where it is None. series : its number; all that stream V1 knows it by.
    """
    return itertools.chain.from_iterable(_turns(recording, rate_hz, frames, wire, trouble, unique_id, series))


def records(
    recording: Recording, chosen: range, rate_hz: float | None, name: str, date: datetime.datetime
) -> Iterator[SeriesStart | Frame | SeriesEnd]:
    """A start, the chosen frames as images in order, an end; each is rendered when it is asked for. date : of the first image."""
    yield SeriesStart(recording.name, name, len(chosen), recording.detector(), {"name": recording.name})
    began = time.perf_counter()
    for number, index in enumerate(chosen):
        elapsed_s = number / rate_hz if rate_hz else time.perf_counter() - began
        place, origin = recording.position(index), recording.origin(index)
        yield Frame(recording.name, name, number, recording.frame(index), 0.0, date.timestamp() + elapsed_s, place, origin)
    yield SeriesEnd(recording.name, name)


def _turns(
    recording: Recording,
    rate_hz: float | None,
    frames: slice | None,
    wire: Wire,
    trouble: Trouble,
    unique_id: str | None = None,
    series: int = 1,
) -> Iterator[tuple[Message, ...]]:
    """The messages that leave together, at one period's distance from the next ones: many parts may be one image."""
    chosen = _chosen(recording, frames)
    if trouble.faults:
        forecast(trouble.faults, len(chosen), wire)  # what is wrong with them is said before the first message leaves
    name = str(series) if wire.kind == "dectris-v1" else unique_id or f"{recording.name}-{uuid.uuid4().hex[:12]}"
    date, dtype = datetime.datetime.now(datetime.UTC), recording.frame(chosen[0]).dtype
    told = records(recording, chosen, rate_hz, name, date)
    for messages in inject(told, trouble, wire, dialect(wire, Sensor(dtype, date, 1 / rate_hz if rate_hz else 0.0), series)):
        yield tuple(parts[0] if len(parts) == 1 else parts for parts in messages)


def _chosen(recording: Recording, frames: slice | None) -> range:
    chosen = range(*(frames or slice(None)).indices(len(recording)))
    if not chosen:
        raise ConfigError(f"{recording.name}: no frame is left of {len(recording)} by {frames}; choose others")
    return chosen


def pace(
    turns: Iterable[tuple[Message | Document, ...]], sender: Sender, rate_hz: float | None, progress: Callable[[int], None] | None = None
) -> Emitted:
    """Send at a fixed rate: turn n leaves at n / rate_hz after the first, so that one delay does not move the rest."""
    period_s = 1 / rate_hz if rate_hz else 0.0
    sent = late = 0
    began = time.perf_counter()
    for turn, messages in enumerate(turns):
        if turn == 0:
            # The first message may have waited for a sample to be rendered.
            began = time.perf_counter()
        elif period_s:
            ahead_s = began + turn * period_s - time.perf_counter()
            late += ahead_s < -period_s
            time.sleep(max(0.0, ahead_s))
        for message in messages:
            sender.send(message)
        sent += len(messages)
        if progress is not None:
            progress(turn + 1)
    return Emitted(sent, time.perf_counter() - began, late)


@contextmanager
def zmq_sender(address: str, timeout_s: float = 10.0, keys: Keys | None = None) -> Iterator[Sender]:
    """A PUSH socket connected to `address` ("tcp://HOST:PORT"); it is closed, its last messages taken, when the context ends.

    Raises
    ------
    ConfigError
        The address is malformed, or nobody listens there within `timeout_s`.
    SinkUnavailable
        From `send`: the receiver took nothing for `timeout_s`.
    """
    with zmq.Context() as context, context.socket(zmq.PUSH) as socket:
        socket.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        socket.setsockopt(zmq.SNDTIMEO, round(timeout_s * 1000))
        socket.setsockopt(zmq.LINGER, _LINGER_MS)
        # Without it messages queue for a receiver that may never come, and nobody is told.
        socket.setsockopt(zmq.IMMEDIATE, 1)
        if keys is not None:
            keys.give(socket)
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot send to {address}: {error}; name it as tcp://HOST:PORT") from None
        if not socket.poll(round(timeout_s * 1000), zmq.POLLOUT):
            raise ConfigError(
                f"nobody listens at {address} ({timeout_s:g} s), or not to us; start the receiver first, name its address, or compare keys"
            )
        try:
            yield _Push(socket, address, timeout_s)
        except SinkUnavailable:
            # Nobody takes the rest either.
            socket.setsockopt(zmq.LINGER, 0)
            raise


class _Push:
    """The socket with its errors told in the house's words."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, timeout_s: float) -> None:
        self._socket = socket
        self._address = address
        self._timeout_s = timeout_s

    def send(self, message: Message) -> None:
        try:
            self._socket.send_multipart((message,) if isinstance(message, bytes) else message)
        except zmq.Again:
            raise SinkUnavailable(f"{self._address} took no message for {self._timeout_s:g} s: is the receiver stuck or gone?") from None
