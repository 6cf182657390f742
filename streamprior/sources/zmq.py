"""ZMQ PULL or SUB socket -> raw messages; the only door to pyzmq for what comes in."""

from __future__ import annotations

import time
from typing import Literal

import zmq
from zmq.utils.monitor import recv_monitor_message

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.seams import Parts
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
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None

    def open(self) -> None:
        settings = self._settings
        self._context = zmq.Context()
        socket = self._context.socket(zmq.PULL)
        socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        if settings.attach == "bind":
            # Anyone may connect, and makes a connection that is cut anew. A detector that we connect to is ours, and libzmq would never
            # connect again: there the decoder's limit is the only one.
            socket.setsockopt(zmq.MAXMSGSIZE, _OVER * settings.max_message_mb * 2**20)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            _bind_or_connect(socket, settings.attach, settings.address, "source.address")
        except ConfigError:
            socket.close()
            self._context.term()
            raise
        self._socket = socket

    @property
    def address(self) -> str:
        """The address as bound: with port * it names the port that was found."""
        assert self._socket is not None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        """A message of one part is its bytes, one of several a tuple of them."""
        assert self._socket is not None
        message = _at_once(self._socket)
        if message is None and self._socket.poll(round(timeout_s * 1000)):
            message = _at_once(self._socket)
        return message

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            self._socket.close()
            self._context.term()
        self._socket = self._context = None


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
    ) -> None:
        self.name = name
        self._endpoint, self._attach, self._setting = address, attach, setting
        self._high_water_mark, self._max_message_bytes = high_water_mark, max_message_bytes
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._socket: zmq.Socket[bytes] | None = None
        self._monitor: zmq.Socket[bytes] | None = None
        self._lost_at: float | None = None  # monotonic; a connection that libzmq has not said it would make again

    def open(self) -> None:
        self._context = zmq.Context()
        socket = self._context.socket(zmq.SUB)
        socket.setsockopt(zmq.RCVHWM, 100 * self._high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, _OVER * self._max_message_bytes)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket = socket
        if self._attach == "connect":
            self._monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_CONNECTED)
        try:
            _bind_or_connect(socket, self._attach, self._endpoint, self._setting)
        except ConfigError:
            self.close()
            raise

    @property
    def address(self) -> str:
        """The address as bound: with port * it names the port that was found."""
        assert self._socket is not None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        """A message of one part is its bytes, one of several, which no Bluesky publisher sends, a tuple of them."""
        assert self._socket is not None
        message = _at_once(self._socket)
        if message is None and self._connected_anew():  # only where nothing comes can the connection be gone
            return REFUSED_BY_TRANSPORT
        if message is None and self._socket.poll(round(timeout_s * 1000)):
            message = _at_once(self._socket)
        return message

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            if self._monitor is not None:
                self._socket.disable_monitor()
                self._monitor.close(0)
            self._socket.close()
            self._context.term()
        self._socket = self._context = self._monitor = None

    def _connected_anew(self) -> bool:
        """Whether the transport had refused a message and given the connection up; then it has been made again."""
        if self._monitor is None or self._socket is None:
            return False
        while self._monitor.poll(0):
            lost = recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED
            self._lost_at = time.monotonic() if lost else None
        if self._lost_at is None or time.monotonic() < self._lost_at + _GIVEN_UP_S:
            return False
        self._lost_at = None
        self._socket.disconnect(self._endpoint)
        _bind_or_connect(self._socket, self._attach, self._endpoint, self._setting)
        return True


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
