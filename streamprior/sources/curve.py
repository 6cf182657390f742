"""Key files -> who may connect to a ZMQ socket, or whom it connects to: CURVE, the answer to each handshake, and what was refused."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import zmq
from zmq.utils.monitor import recv_monitor_message
from zmq.utils.z85 import encode

from streamprior.config import PositionSettings, SourceSettings, read_secret
from streamprior.errors import ConfigError
from streamprior.wire.keys import Key, key_text, parse_key

log = structlog.get_logger(__name__)

_SAY_AGAIN_S = 10.0
"""A sender that is refused tries again ten times a second; it is counted each time and said this often."""

_TRY_AGAIN_S = 1.0
"""libzmq gives a connection up whose handshake failed; the other side may have been given our key since."""

_MOST_KEY_BYTES = 10_000
_CURVE = b"CURVE"


@dataclass(frozen=True, slots=True)
class KeyFiles:
    """What a section of the settings says. section : that errors name."""

    section: str
    secret: Path
    server: Path | None
    clients: Path | None


def key_files(settings: SourceSettings | PositionSettings, section: str) -> KeyFiles | None:
    """Which keys a socket has to have; None: it is open to whoever reaches it.

    Raises ConfigError where the settings say half of what is needed, or what the other way to attach needs.
    """
    secret, server, clients = settings.curve_secret_file, settings.curve_server_public_file, settings.curve_clients_folder
    needed, other = ("curve_clients_folder", server) if settings.attach == "bind" else ("curve_server_public_file", clients)
    wrong = "curve_server_public_file" if settings.attach == "bind" else "curve_clients_folder"
    if secret is None and server is None and clients is None:
        return None
    if other is not None:
        raise ConfigError(f"{section}.{wrong}: has no effect with {section}.attach: {settings.attach}, which takes {section}.{needed}")
    if secret is None:
        raise ConfigError(f"{section}.curve_secret_file: is missing; `streamprior keys FOLDER` makes our own pair of keys")
    if (server or clients) is None:
        raise ConfigError(f"{section}.{needed}: is missing; beside our own secret it takes the public keys of the other side")
    return KeyFiles(section, secret, server, clients)


def load_own(files: KeyFiles) -> Key:
    """Our own pair. Raises ConfigError where it cannot be read, others may read it, or its halves are of different pairs."""
    place = f"{files.section}.curve_secret_file: {files.secret}"
    key = parse_key(read_secret(files.secret, f"{files.section}.curve_secret_file"), place)
    if key.secret is None:
        raise ConfigError(f"{place}: holds a public key alone; name the file that ends in .key_secret")
    if zmq.curve_public(key.secret) != key.public:
        raise ConfigError(f"{place}: its secret and its public key are of different pairs; make a new one with `streamprior keys FOLDER`")
    return key


def load_public(file: Path, setting: str) -> bytes:
    """The public key in a file. Raises ConfigError."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_MOST_KEY_BYTES).decode("utf-8", "replace")
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read ({error.strerror})") from None
    return parse_key(text, f"{setting}: {file}").public


def load_clients(files: KeyFiles) -> dict[bytes, str]:
    """Public key -> name, of everybody who may connect. Raises ConfigError where the folder cannot be read or a file holds no key."""
    assert files.clients is not None
    setting = f"{files.section}.curve_clients_folder"
    try:
        found = sorted(file for file in files.clients.iterdir() if file.suffix == ".key")
    except OSError as error:
        raise ConfigError(
            f"{setting}: {files.clients} cannot be read ({error.strerror}); make it, and copy senders' .key files there"
        ) from None
    return {load_public(file, setting): file.stem for file in found}


def make_keys(folder: Path, name: str) -> tuple[Path, Path]:
    """Make a pair: (secret file, which only its owner may read; public file). Raises ConfigError where they are there or cannot be made."""
    public, secret = zmq.curve_keypair()
    files = folder / f"{name}.key_secret", folder / f"{name}.key"
    _write_new(folder, ((files[0], key_text(Key(public, secret)), 0o600), (files[1], key_text(Key(public)), 0o644)))
    return files


def make_token(folder: Path, name: str) -> Path:
    """Make a token of 256 bits in a file that only its owner may read. Raises ConfigError where it is there or cannot be made."""
    file = folder / f"{name}.token"
    _write_new(folder, ((file, secrets.token_urlsafe(32) + "\n", 0o600),))
    return file


def _write_new(folder: Path, files: Sequence[tuple[Path, str, int]]) -> None:
    """(file, text, mode) each, with its mode from the first moment on, and never over one that is in use."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, text, mode in files:
            with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as opened:
                opened.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename}: is there already; name another with --name, or remove the old one first") from None
    except OSError as error:
        raise ConfigError(f"{folder}: keys cannot be written ({error.strerror})") from None


class Door:
    """Owns what decides about a socket's connections. `look` is called by the thread that receives, and waits for nothing.

    Where we bind, each handshake is answered from the folder of public keys, which is read anew each time: a key that is added lets its
    owner in at once, one that is removed keeps the next connection out. Where we connect, a handshake that failed is tried again.

    Parameters
    ----------
    socket : neither bound nor connected yet. address : that it will be. name : of the source.
    also : events of the socket's monitor that `look` is to hand on.

    Raises ConfigError, from the constructor.
    """

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], files: KeyFiles, address: str, name: str, also: int = 0
    ) -> None:
        self.refused = 0
        """Handshakes that failed since the start; one that was refused by its key may count again as the sender leaves."""
        self.failing = False
        """We connect, and the newest handshake failed; it is due again."""
        self._socket, self._files, self._address, self._name = socket, files, address, name
        self._said_at = self._failed_at = -_SAY_AGAIN_S
        self._asked = _guard(context, socket, files)
        self._events: int = zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        if self._asked is None:  # where we bind, who is refused by name is counted as its handshake is answered
            self._events |= zmq.EVENT_HANDSHAKE_FAILED_AUTH
        self._monitor = socket.get_monitor_socket(self._events | also)

    def wait(self, timeout_s: float) -> bool:
        """Until a message is there, or a handshake wants its answer; whether it is a message."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if self._asked is not None:
            poller.register(self._asked, zmq.POLLIN)
        return any(socket is self._socket for socket, _ in poller.poll(round(timeout_s * 1000)))

    def look(self) -> list[int]:
        """Answer the handshakes that wait and count those that failed. Returns the monitor's other events."""
        while self._asked is not None and self._asked.poll(0):
            self._answer(self._asked, self._asked.recv_multipart())
        others = []
        for event, value in told(self._monitor):
            if event & self._events:
                self._note(event, value)
            else:
                others.append(event)
        if self.failing and time.monotonic() > self._failed_at + _TRY_AGAIN_S:
            self.failing = False
            self._socket.disconnect(self._address)
            self._socket.connect(self._address)
        return others

    def close(self) -> None:
        """Before the socket is."""
        self._socket.disable_monitor()
        self._monitor.close(0)
        if self._asked is not None:
            self._asked.close()

    def _note(self, event: int, value: int) -> None:
        if self._asked is None:
            self.failing, self._failed_at = True, time.monotonic()
            self._refuse("the other side refused our key, has another than its file says, or has none; compare both sides' .key files")
        elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL or value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            # Both sides see that they differ: where the sender is the first, all that we see is that it left.
            self._refuse("the sender has no keys, and this socket takes nothing without; give the sender a pair (`streamprior keys`)")
        else:
            self._refuse("the sender knows another public key than ours; give it the .key file of this daemon")

    def _answer(self, asked: zmq.Socket[bytes], request: list[bytes]) -> None:
        """ZAP 1.0 (rfc.zeromq.org/spec/27): version, request, domain, address, identity, mechanism, credentials."""
        whose = self._whose(request)
        status = [b"200", b"OK"] if whose is not None else [b"400", b"not allowed"]
        asked.send_multipart([b"1.0", request[1] if len(request) > 1 else b"", *status, (whose or "").encode(), b""])
        if whose is not None:
            log.info("a sender with a known key is let in", source=self._name, key_file=f"{whose}.key", address=request[3].decode())

    def _whose(self, request: list[bytes]) -> str | None:
        """Name of the key's file; None, and said, where it is nobody's."""
        if len(request) != 7 or request[5] != _CURVE or len(request[6]) != 32:
            self._refuse("a handshake without a CURVE key")
            return None
        public = encode(request[6])
        try:
            allowed = load_clients(self._files)
        except ConfigError as error:  # a file that somebody has spoilt since the start
            self._refuse(str(error))
            return None
        if public not in allowed:
            self._refuse(
                f"the key {public.decode()} of a sender at {request[3].decode()} is not among the .key files of {self._files.clients};"
                " copy its file there if it may send"
            )
        return allowed.get(public)

    def _refuse(self, why: str) -> None:
        self.refused += 1
        now = time.monotonic()
        if now >= self._said_at + _SAY_AGAIN_S:
            self._said_at = now
            log.warning("connection refused", source=self._name, why=why, refused_so_far=self.refused)


def _guard(context: zmq.Context[zmq.Socket[bytes]], socket: zmq.Socket[bytes], files: KeyFiles) -> zmq.Socket[bytes] | None:
    """Give the socket its keys; the socket that handshakes ask where we bind. Raises ConfigError."""
    own = load_own(files)
    assert own.secret is not None
    socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
    if files.server is not None:
        socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        socket.setsockopt(zmq.CURVE_SERVERKEY, load_public(files.server, f"{files.section}.curve_server_public_file"))
        return None
    load_clients(files)  # what is wrong with the folder shows before anybody knocks
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    asked = context.socket(zmq.REP)
    asked.setsockopt(zmq.LINGER, 0)
    asked.bind("inproc://zeromq.zap.01")
    return asked


def told(monitor: zmq.Socket[bytes]) -> Iterator[tuple[int, int]]:
    """(event, value) of everything that a socket's monitor has to tell at this moment."""
    while monitor.poll(0):
        message = recv_monitor_message(monitor)
        yield int(message["event"]), int(message["value"])
