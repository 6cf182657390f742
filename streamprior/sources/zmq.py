"""ZMQ PULL socket -> raw messages; the only door to pyzmq for what comes in."""

from __future__ import annotations

import zmq

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.seams import Parts


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
            # Anyone may connect: a message far beyond the decoder's limit is refused by the transport before memory is taken for it, and
            # costs its sender the connection, which it makes anew; one a little beyond is received, quarantined and counted.
            # A detector that we connect to is ours, and libzmq would never connect again: there the decoder's limit is the only one.
            socket.setsockopt(zmq.MAXMSGSIZE, 4 * settings.max_message_mb * 2**20)
        socket.setsockopt(zmq.LINGER, 0)
        try:
            (socket.bind if settings.attach == "bind" else socket.connect)(settings.address)
        except zmq.ZMQError as error:
            socket.close()
            self._context.term()
            raise ConfigError(
                f"source.address: cannot {settings.attach} to {settings.address} ({error.strerror}); "
                "stop the process that holds the port, choose another port, or check host and spelling (tcp://HOST:PORT)"
            ) from None
        self._socket = socket

    @property
    def address(self) -> str:
        """The address as bound: with port * it names the port that was found."""
        assert self._socket is not None
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        """A message of one part is its bytes, one of several a tuple of them."""
        assert self._socket is not None
        try:
            parts = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            if not self._socket.poll(round(timeout_s * 1000)):
                return None
            parts = self._socket.recv_multipart()
        return parts[0] if len(parts) == 1 else tuple(parts)

    def close(self) -> None:
        if self._socket is not None and self._context is not None:
            self._socket.close()
            self._context.term()
        self._socket = self._context = None
