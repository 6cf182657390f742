"""The daemon's /status -> Numbers, asked for over HTTP; the only door to httpx of the Bluesky side."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

from streamprior.config import own_token
from streamprior.errors import ConfigError

_MOST_BYTES = 2**20
"""A daemon's answer has some kilobytes; whatever else listens on that port is not read to its end."""

NAN = float("nan")


class NoAnswer(Exception):  # noqa: N818 - it names a state of the world
    """The daemon does not answer, or something else answers in its place; the text says which."""


@dataclass(frozen=True, slots=True)
class Numbers:
    """What the daemon said of its newest frame and of its path; NaN, -1 and "" where it knows nothing yet.

    iou : class -> intersection over union with the prior's reference mask. score : signal -> standard deviations of the prior's baseline.
    alarms : signals whose alarm stands. muted : those of them that nobody is to be held up by.
    received : frames since the daemon started. behind : frames of those that are not in these numbers yet.
    """

    version: str
    run: str = ""
    frame: int = -1
    chi2: float = NAN
    distance: float = NAN
    iou: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    muted: tuple[str, ...] = ()
    received: int = 0
    behind: int = 0

    @property
    def holding(self) -> tuple[str, ...]:
        """Signals whose alarm stands and is not muted: what a plan waits for."""
        return tuple(signal for signal in self.alarms if signal not in self.muted)

    @property
    def mean_iou(self) -> float:
        """Over the classes that are in the mask or in the reference."""
        known = [value for value in self.iou.values() if not math.isnan(value)]
        return sum(known) / len(known) if known else NAN


class Asker:
    """Owns the connections to one daemon. Used from one event loop at a time.

    Parameters
    ----------
    url : of the daemon's page, http://HOST:PORT.
    timeout_s : for each question.
    token : that a daemon beyond loopback asks for; None: $STREAMPRIOR_HTTP_TOKEN, where that is set.

    Raises
    ------
    ConfigError
        The address is none.
    """

    def __init__(self, url: str, timeout_s: float = 2.0, token: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise ConfigError(f"{url!r} is no address of a daemon ({error}); write http://HOST:PORT, as its log names it") from None
        # A proxy does not know this machine's loopback.
        trust = host not in ("localhost", "127.0.0.1", "::1")
        token = token or own_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.AsyncClient(timeout=timeout_s, trust_env=trust, headers=headers)

    async def ask(self) -> Numbers:
        """The daemon's numbers at this moment. Raises NoAnswer."""
        try:
            # httpx bounds each wait, but not all of them together: whoever sends a byte a second would be read for weeks.
            async with asyncio.timeout(self._timeout_s), self._client.stream("GET", f"{self.url}/status") as answer:
                body = b""
                async for part in answer.aiter_bytes():
                    body += part
                    if len(body) > _MOST_BYTES:
                        raise NoAnswer(f"{self.url}/status: more than {_MOST_BYTES} bytes, that is not a streamprior daemon")
        except (httpx.RequestError, TimeoutError) as error:
            raise NoAnswer(
                f"{self.url}: no answer ({type(error).__name__}: {error}); start the daemon or correct the address, which its log names"
            ) from None
        if answer.status_code == 401:
            raise NoAnswer(
                f"{self.url}: the daemon takes a token, and ours is not its; set $STREAMPRIOR_HTTP_TOKEN or give the device `token`"
            )
        if answer.status_code != 200:
            raise NoAnswer(f"{self.url}/status: HTTP {answer.status_code}; that is not a streamprior daemon, or one before 0.4")
        return parse(body, self.url)

    async def close(self) -> None:
        await self._client.aclose()


def parse(body: bytes, url: str) -> Numbers:
    """The JSON of /status as numbers. Raises NoAnswer where it is something else."""
    try:
        said = json.loads(body)
        return Numbers(
            version=str(said["version"]),
            run=str(said["run"] or ""),
            frame=-1 if said["index"] is None else int(said["index"]),
            chi2=_number(said["chi2"]),
            distance=_number(said["distance"]),
            iou={str(name): _number(values["prior"]) for name, values in said["iou"].items()},
            score={str(signal): _number(value) for signal, value in said["score"].items()},
            alarms=tuple(map(str, said["alarms"])),
            muted=tuple(map(str, said.get("muted", ()))),  # earlier daemons mute nothing
            received=int(said["frames_received"]),
            behind=int(said["frames_behind"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise NoAnswer(
            f"{url}/status: not what a streamprior daemon says ({type(error).__name__}: {error}); something else listens there"
        ) from None


def _number(value: Any) -> float:
    return NAN if value is None else float(value)
