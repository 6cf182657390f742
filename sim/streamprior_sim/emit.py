"""A recording -> DECTRIS stream V2 messages -> a socket, at a fixed rate."""

from __future__ import annotations

import datetime
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import zmq

from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.wire.dectris_v2 import encode_end, encode_image, encode_start
from streamprior_sim.faults import Fault, inject
from streamprior_sim.twin import Progress, Recording

_HIGH_WATER = 200
"""Messages that wait in the sender: 2 s at 100 Hz. Beyond it `send` blocks, as a detector's buffer would fill."""

_LINGER_MS = 5000
"""How long a closing socket waits for the receiver to take the last messages."""


class Sender(Protocol):
    """Where messages go."""

    def send(self, message: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class Emitted:
    """What `emit` did: messages sent, seconds it took, messages that left more than a period after their time."""

    sent: int
    seconds: float
    late: int


def emit(
    recording: Recording,
    sender: Sender,
    rate_hz: float | None,
    frames: slice | None = None,
    progress: Progress | None = None,
    faults: Sequence[Fault] = (),
) -> Emitted:
    """Send a recording as one series.

    Parameters
    ----------
    recording : a `Twin` renders some hundred frames a second; wrap it in `Prerendered` for more.
    sender : for example `zmq_sender(address)`.
    rate_hz : messages a second, None as fast as the receiver takes them.
    frames : which of the recording's frames; the wire numbers them from 0, `origin` keeps their index in the recording.
    progress : called with (messages sent, messages in all) after each one.
    faults : what goes wrong on the way (`faults.inject`); their indices are the wire's.

    Raises
    ------
    SinkUnavailable
        The receiver took nothing for the sender's timeout.
    """
    total = len(range(*(frames or slice(None)).indices(len(recording)))) + 2
    messages: Iterable[bytes] = stream(recording, rate_hz, frames)
    if faults:
        messages = inject(messages, faults)
    return pace(messages, sender, rate_hz, None if progress is None else lambda sent: progress(min(sent, total), total))


def stream(
    recording: Recording,
    rate_hz: float | None,
    frames: slice | None = None,
    series: int = 1,
    unique_id: str | None = None,
    compression: str | None = "bslz4",
) -> Iterator[bytes]:
    """A start message, the images in order, an end message; each is encoded when it is asked for.

    The detector's clock begins at the first image; with a rate, frame k is stamped k / rate_hz later, otherwise when it is encoded.
    """
    chosen = range(*(frames or slice(None)).indices(len(recording)))
    name = unique_id or f"{recording.name}-{uuid.uuid4().hex[:12]}"
    exposure_s = 1 / rate_hz if rate_hz else 0.0
    first = recording.frame(chosen[0]) if chosen else None
    if first is None:
        raise ConfigError(f"{recording.name}: no frame is left of {len(recording)} by {frames}; choose others")
    yield encode_start(series, name, recording.detector(), len(chosen), first.dtype, {"name": recording.name})
    date, began = datetime.datetime.now(datetime.UTC), time.perf_counter()
    for number, index in enumerate(chosen):
        user_data: dict[str, object] = {"origin": recording.origin(index)}
        position = recording.position(index)
        if position is not None:
            user_data["position_m"] = list(position)
        elapsed_s = number / rate_hz if rate_hz else time.perf_counter() - began
        yield encode_image(series, name, number, recording.frame(index), elapsed_s, date, exposure_s, user_data, compression)
    yield encode_end(series, name)


def pace(messages: Iterable[bytes], sender: Sender, rate_hz: float | None, progress: Callable[[int], None] | None = None) -> Emitted:
    """Send messages at a fixed rate: message n leaves at n / rate_hz after the first, so that one delay does not move the rest."""
    period_s = 1 / rate_hz if rate_hz else 0.0
    sent = late = 0
    began = time.perf_counter()
    for message in messages:
        if sent == 0:
            # The first message may have waited for a sample to be rendered.
            began = time.perf_counter()
        elif period_s:
            ahead_s = began + sent * period_s - time.perf_counter()
            late += ahead_s < -period_s
            time.sleep(max(0.0, ahead_s))
        sender.send(message)
        sent += 1
        if progress is not None:
            progress(sent)
    return Emitted(sent, time.perf_counter() - began, late)


@contextmanager
def zmq_sender(address: str, timeout_s: float = 10.0) -> Iterator[Sender]:
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
        try:
            socket.connect(address)
        except zmq.ZMQError as error:
            raise ConfigError(f"cannot send to {address}: {error}; name it as tcp://HOST:PORT") from None
        if not socket.poll(round(timeout_s * 1000), zmq.POLLOUT):
            raise ConfigError(f"nobody listens at {address} ({timeout_s:g} s); start the receiver first, or name its address")
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

    def send(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except zmq.Again:
            raise SinkUnavailable(f"{self._address} took no message for {self._timeout_s:g} s: is the receiver stuck or gone?") from None
