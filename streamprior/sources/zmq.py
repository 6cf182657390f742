"""ZMQ PULL or SUB socket -> raw messages; the only door to pyzmq for what comes in."""

from __future__ import annotations

import time
from typing import Literal

import zmq

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.seams import Parts
from streamprior.sources.curve import Door, KeyFiles, key_files, told
from streamprior.wire.documents import REFUSED_BY_TRANSPORT

_OVER = 4
"""A message of up to so many times the decoder's limit is received, quarantined and counted; a larger one costs its sender the connection
before memory is taken for it."""

_GIVEN_UP_S = 0.3
"""libzmq says at once when it will connect again; silence for so long after a connection was lost means that it will not."""


class ZmqPull:
    """Owns one PULL socket. Back-pressure is the protocol's: what is not received waits with the sender.

    Raises ConfigError from `open` where the address is taken, not ours or malformed.
    """

    exhausted = False

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self._settings = settings
        self._files = key_files(settings, "source")
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._door: Door | None = None

    def open(self) -> None:
        settings = self._settings
        self._context = zmq.Context()
        socket = self._socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        if settings.attach == "bind":
            # Anyone may connect, and makes a connection that is cut anew. A detector that we connect to is ours, and libzmq would never
            # connect again: there the decoder's limit is the only one.
            socket.setsockopt(zmq.MAXMSGSIZE, _OVER * settings.max_message_mb * 2**20)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            if self._files is not None:
                self._door = Door(self._context, socket, self._files, settings.address, self.name)
            _bind_or_connect(socket, settings.attach, settings.address, "source.address")
        except ConfigError:
            self.close()
            raise

    @property
    def refused(self) -> int:
        """Connections that were refused for want of the right key."""
        return self._door.refused if self._door is not None else 0

    @property
    def address(self) -> str:
        """The address as bound: with port * it names the port that was found."""
        assert self._socket is not None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        """A message of one part is its bytes, one of several a tuple of them."""
        assert self._socket is not None
        if self._door is not None:
            self._door.look()
        message = _at_once(self._socket)
        if message is None and _ready(self._socket, self._door, timeout_s):
            message = _at_once(self._socket)
        return message

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            if self._door is not None:
                self._door.close()
            self._socket.close()
            self._context.term()
        self._socket = self._context = self._door = None


class ZmqSubscribe:
    """Owns one SUB socket that takes every document of its publishers. They never wait: what finds no room here is lost without a word.

    A message far beyond the limit (4 times) is refused by the transport. Where we connect, that ends the connection and libzmq makes no
    other: then it is made anew here, and REFUSED_BY_TRANSPORT is handed over so that the loss is counted; what the proxy sends in between,
    half a second, is lost. Where we bind, the sender makes it anew, and nothing tells its leaving from any other.

    Parameters
    ----------
    name : of the source.
    address : ZMQ address. attach : "connect" to the side of a Bluesky proxy where documents come out, or "bind" for publishers without one.
    high_water_mark : messages that ZMQ may hold are 100 times as many.
    max_message_bytes : the decoder's limit.
    setting : what an error about the address names.
    files : keys; None takes documents from whoever reaches the socket.

    Raises ConfigError from `open` where the address is taken, not ours or malformed.
    """

    exhausted = False

    def __init__(
        self,
        name: str,
        address: str,
        attach: Literal["bind", "connect"],
        high_water_mark: int,
        max_message_bytes: int,
        setting: str = "source.address",
        files: KeyFiles | None = None,
    ) -> None:
        self.name = name
        self._endpoint, self._attach, self._setting = address, attach, setting
        self._high_water_mark, self._max_message_bytes, self._files = high_water_mark, max_message_bytes, files
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._door: Door | None = None
        self._lost_at: float | None = None  # monotonic; a connection that libzmq has not said it would make again

    def open(self) -> None:
        self._context = zmq.Context()
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 100 * self._high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, _OVER * self._max_message_bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket = socket
        losses = zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECTED if self._attach == "connect" else 0
        try:
            if self._files is not None:
                self._door = Door(self._context, socket, self._files, self._endpoint, self.name, losses)
            elif losses:
                self._monitor = socket.get_monitor_socket(losses)
            _bind_or_connect(socket, self._attach, self._endpoint, self._setting)
        except ConfigError:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The address as bound: with port * it names the port that was found."""
        assert self._socket is not None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    @property
    def refused(self) -> int:
        """Connections that were refused for want of the right key."""
        return self._door.refused if self._door is not None else 0

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        """A message of one part is its bytes, one of several, which no Bluesky publisher sends, a tuple of them."""
        assert self._socket is not None
        if self._door is not None:
            self._note(self._door.look())
        message = _at_once(self._socket)
        if message is None and self._connected_anew():  # only where nothing comes can the connection be gone
            return REFUSED_BY_TRANSPORT
        if message is None and _ready(self._socket, self._door, timeout_s):
            message = _at_once(self._socket)
        return message

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            if self._monitor is not None:
                self._socket.disable_monitor()
                self._monitor.close(0)
            if self._door is not None:
                self._door.close()
            self._socket.close()
            self._context.term()
        self._socket = self._context = self._monitor = self._door = None

    def _connected_anew(self) -> bool:
        """Whether the transport had refused a message and given the connection up; then it has been made again."""
        if self._socket is None or self._attach == "bind":
            return False
        if self._monitor is not None:
            self._note([event for event, _ in told(self._monitor)])
        if self._door is not None and self._door.failing:  # no message was refused: nobody was let in, and the door tries again
            self._lost_at = None
        if self._lost_at is None or time.monotonic() < self._lost_at + _GIVEN_UP_S:
            return False
        self._lost_at = None
        self._socket.disconnect(self._endpoint)
        _bind_or_connect(self._socket, self._attach, self._endpoint, self._setting)
        return True

    def _note(self, events: list[int]) -> None:
        for event in events:
            self._lost_at = time.monotonic() if event == zmq.EVENT_DISCONNECTED else None


def _ready(socket: zmq.Socket[bytes], door: Door | None, timeout_s: float) -> bool:
    """Wait for a message; a handshake that has to be answered ends it too."""
    return bool(socket.poll(round(timeout_s * 1000))) if door is None else door.wait(timeout_s)


def _at_once(socket: zmq.Socket[bytes]) -> bytes | Parts | None:
    try:
        parts = socket.recv_multipart(zmq.NOBLOCK)
    except zmq.Again:
        return None
    return parts[0] if len(parts) == 1 else tuple(parts)


def _bind_or_connect(socket: zmq.Socket[bytes], attach: Literal["bind", "connect"], address: str, setting: str) -> None:
    """Bind or connect. Raises ConfigError, naming the setting."""
    try:
        (socket.bind if attach == "bind" else socket.connect)(address)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"{setting}: cannot {attach} to {address} ({error.strerror}); "
            "stop the process that holds the port, choose another port, or check host and spelling (tcp://HOST:PORT)"
        ) from None
