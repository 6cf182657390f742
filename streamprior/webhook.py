"""Changes of alarms -> JSON messages to one address, from a thread of its own that tries again with growing pauses."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

import structlog

from streamprior import __version__
from streamprior.alarms import Change, as_json
from streamprior.config import AlarmSettings, read_secret
from streamprior.errors import ConfigError

log = structlog.get_logger(__name__)

_WAITING = 100
"""Messages that wait at most: who could not be reached for so long wants the newest, not all."""

_TIMEOUT_S, _FIRST_PAUSE_S, _LONGEST_PAUSE_S, _GIVE_UP_S = 5.0, 1.0, 60.0, 600.0
"""For a connection and for each wait of its answer; between two tries; until a message is given up: it tells of a moment."""

_LAST_S = 2.0
"""For what still waits when the daemon leaves."""

_TRY_AGAIN = (408, 425, 429)
"""Answers below 500 that say: later."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where messages go. The path may be a secret (chat services have them so): `place` is what may be shown."""

    secure: bool
    host: str
    port: int | None
    path: str

    @property
    def place(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}" + (f":{self.port}" if self.port is not None else "")


def address_of(url: str) -> Address:
    """Raises ConfigError, which shows nothing of the address, where it is none."""
    wrong = "alarms.webhook: this is no address to send to; write http://HOST:PORT/PATH or https://..., without spaces"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigError(wrong) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(wrong)
    if parts.username is not None or parts.password is not None:
        raise ConfigError("alarms.webhook: a name or password in the address would be seen; put a token into alarms.webhook_token_file")
    return Address(parts.scheme == "https", parts.hostname, port, (parts.path or "/") + (f"?{parts.query}" if parts.query else ""))


def webhook_token(settings: AlarmSettings) -> str | None:
    """The token from its file, None where none is named. Raises ConfigError where it cannot be had."""
    if settings.webhook_token_file is None:
        return None
    token = read_secret(settings.webhook_token_file, "alarms.webhook_token_file").strip()
    if not token or not token.isprintable() or " " in token:
        raise ConfigError(
            f"alarms.webhook_token_file: {settings.webhook_token_file} holds no token; write the token alone on its first line"
        )
    return token


def message(change: Change, source: str, page: str) -> dict[str, Any]:
    """What is sent: `text` for people (chat services show it as it is), the rest for programs.

    `id` is the same in every try. source : of the configuration. page : address of the live page.
    """
    alarm = change.alarm
    frame = f", frame {change.frame}" if change.frame is not None else ""
    run = f" of run {alarm.run}" if alarm.run else ""
    link = f"{page}/?run={quote(alarm.run)}" + (f"&frame={change.frame}" if change.frame is not None else "") if alarm.run else f"{page}/"
    words = alarm.cause if change.what == "raised" else f"over: {alarm.cause}"
    kind = "drift alarm" if alarm.kind == "drift" else f"alarm ({alarm.signal})"
    return {
        "text": f"streamprior {source}, {kind}: {words}{frame}{run} {link}",
        "event": change.what,
        "id": f"{alarm.run}/{alarm.signal}/{alarm.raised:.6f}/{change.what}",
        "signal": alarm.signal,
        "source": source,
        "run": alarm.run or None,
        "frame": change.frame,
        "at": change.at,
        "page": link,
        "alarm": as_json(alarm),
    }


@dataclass(frozen=True, slots=True)
class _Trouble:
    """Why a message was not taken; `final` where it will not be taken later either."""

    sentence: str
    final: bool = False


class Webhook:
    """Sends messages in their order, each until it is taken, refused or ten minutes old. Owns the thread and what waits.

    A proxy is not used and a redirection not followed: the token goes where the operator said, nowhere else.

    Parameters
    ----------
    address : where to. token : sent as `Authorization: Bearer`; None sends none.
    compose : change -> JSON-able message.
    timeout_s, first_pause_s, longest_pause_s, give_up_s : of one wait for the other side, between two tries, and for one message.
    """

    def __init__(
        self,
        address: Address,
        token: str | None,
        compose: Callable[[Change], dict[str, Any]],
        *,
        timeout_s: float = _TIMEOUT_S,
        first_pause_s: float = _FIRST_PAUSE_S,
        longest_pause_s: float = _LONGEST_PAUSE_S,
        give_up_s: float = _GIVE_UP_S,
    ) -> None:
        self._address, self._compose = address, compose
        self._headers = {"Content-Type": "application/json", "User-Agent": f"streamprior/{__version__}"}
        self._headers |= {"Authorization": f"Bearer {token}"} if token is not None else {}
        self._timeout_s, self._give_up_s = timeout_s, give_up_s
        self._first_pause_s, self._longest_pause_s = first_pause_s, longest_pause_s
        self._waiting: deque[Change] = deque()
        self._changed = threading.Condition()
        self._leaving = threading.Event()
        self._said = ""  # the trouble that the log has: it comes back with every try
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self.delivered = 0
        self.undelivered = 0
        self.up = True
        """Whether the last try was taken; True before the first."""

    def tell(self, change: Change) -> None:
        """Send it when its turn comes; never waits. Beyond a hundred the oldest is left out, and counted."""
        with self._changed:
            self._waiting.append(change)
            if len(self._waiting) > _WAITING:
                self._waiting.popleft()
                self.undelivered += 1
            self._changed.notify()

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Try what waits once more, for a moment, and leave."""
        self._leaving.set()
        with self._changed:
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_LAST_S)
        if self._waiting or self._thread.is_alive():
            log.error("messages about alarms were left unsent", to=self._address.place, waiting=len(self._waiting))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._leaving.is_set())
                if not self._waiting:
                    return
                change = self._waiting.popleft()
            self._deliver(change)

    def _deliver(self, change: Change) -> None:
        """Until it is taken or nobody will take it; once the daemon leaves, one try."""
        body = json.dumps(self._compose(change), allow_nan=False).encode()
        began, pause_s = time.monotonic(), self._first_pause_s
        while (trouble := self._post(body)) is not None:
            self._complain(trouble)
            late = time.monotonic() - began > self._give_up_s
            if trouble.final or late or self._leaving.wait(pause_s):
                with self._changed:
                    self.undelivered += 1
                log.error("message about an alarm not delivered", to=self._address.place, signal=change.alarm.signal, what=change.what)
                return
            pause_s = min(2 * pause_s, self._longest_pause_s)
        self.delivered += 1
        self.up = True
        if self._said:
            log.info("messages about alarms are taken again", to=self._address.place)
            self._said = ""

    def _post(self, body: bytes) -> _Trouble | None:
        """One try. What the other side says beyond its status is not read."""
        kind = http.client.HTTPSConnection if self._address.secure else http.client.HTTPConnection
        connection = kind(self._address.host, self._address.port, timeout=self._timeout_s)
        try:
            connection.request("POST", self._address.path, body, self._headers)
            status = connection.getresponse().status
        except (OSError, http.client.HTTPException) as error:
            return _Trouble(f"no answer ({type(error).__name__}: {error}); see that it runs and that this machine reaches it")
        finally:
            connection.close()
        if 200 <= status < 300:
            return None
        if status >= 500 or status in _TRY_AGAIN:
            return _Trouble(f"it answers {status}")
        return _Trouble(f"it answers {status} and will not take this later; see alarms.webhook and alarms.webhook_token_file", final=True)

    def _complain(self, trouble: _Trouble) -> None:
        self.up = False
        if trouble.sentence != self._said:
            log.warning("messages about alarms are not taken", to=self._address.place, error=trouble.sentence)
            self._said = trouble.sentence
