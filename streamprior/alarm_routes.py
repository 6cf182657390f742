"""The alarm book over HTTP: /alarms, and POST to acknowledge one or to mute a signal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streamprior.alarms import LONGEST_MUTE_MIN, AlarmBook, as_json
from streamprior.config import is_loopback

_LONGEST_NAME = 80
"""Characters of who has acknowledged an alarm."""


def alarm_routes(book: AlarmBook, open_to_all: bool) -> list[Route]:
    """open_to_all : no token is asked for, so that the address by which we are called must be loopback's."""

    def alarms(request: Request) -> Response:
        asked = request.query_params.get("run")
        if asked is None:
            return JSONResponse(standing_now(book))
        uid = next((one for one in book.runs() if asked and one.startswith(asked)), None)
        if uid is None:
            wrong = f"no run {asked[:_LONGEST_NAME]!r} among the newest; /alarms names those, run.json in the archive has every run's"
            return JSONResponse({"error": wrong}, 404)
        kept, left_out = book.of_run(uid)
        return JSONResponse({"run": uid, "alarms": [as_json(alarm) for alarm in kept], "left_out": left_out})

    def acknowledge(request: Request) -> Response:
        signal, by = request.path_params["signal"], request.query_params.get("by", "")
        try:
            return JSONResponse(as_json(book.acknowledge(signal, _shown(by))))
        except KeyError:
            if signal not in book.names:
                return _unknown(book, signal)
            return JSONResponse({"error": f"no alarm stands for {signal}; nothing to acknowledge"}, 409)

    def mute(request: Request) -> Response:
        signal, minutes = request.path_params["signal"], _minutes(request.query_params.get("minutes", "30"))
        if minutes is None:
            return JSONResponse({"error": f"minutes takes a number from 0 (no longer muted) to {LONGEST_MUTE_MIN}"}, 400)
        try:
            return JSONResponse({"signal": signal, "muted_until": book.mute(signal, minutes)})
        except KeyError:
            return _unknown(book, signal)

    def guarded(handler: Callable[[Request], Response]) -> Callable[[Request], Response]:
        def guard(request: Request) -> Response:
            refusal = foreign(request, open_to_all)
            return handler(request) if refusal is None else JSONResponse({"error": refusal}, 403)

        return guard

    return [
        Route("/alarms", alarms),
        Route("/alarms/{signal:path}/acknowledge", guarded(acknowledge), methods=["POST"]),
        Route("/alarms/{signal:path}/mute", guarded(mute), methods=["POST"]),
    ]


def standing_now(book: AlarmBook) -> dict[str, Any]:
    """What stands at this moment, as JSON.

    run (uid), at (Unix s), standing (alarms, oldest first), muted (signal -> Unix seconds until which), signals (all that there may be an
    alarm for), runs (uids that may be asked for, newest first).
    """
    return {
        "run": book.run or None,
        "at": time.time(),
        "standing": [as_json(alarm) for alarm in book.standing()],
        "muted": book.muted(),
        "signals": list(book.names),
        "runs": book.runs(),
    }


def foreign(request: Request, open_to_all: bool) -> str | None:
    """Why a request that changes something is refused: a page of somebody else's has made the browser send it. None where it is ours.

    A browser names the page's origin in every POST; other programs name none. Where no token keeps others out, a foreign name that
    was made to lead to this machine (DNS rebinding) would be its own origin: then only loopback's names will do.
    """
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
        return f"the request comes from a page of {origin[:_LONGEST_NAME]}; alarms are changed from this daemon's own page alone"
    if open_to_all and not is_loopback(_name_in(host)):
        return f"the daemon was called {host[:_LONGEST_NAME]!r}; without a token it is changed as localhost alone (http.token_file)"
    return None


def _name_in(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _unknown(book: AlarmBook, signal: str) -> Response:
    return JSONResponse({"error": f"no signal {signal[:_LONGEST_NAME]!r}; there are {', '.join(book.names)}"}, 404)


def _minutes(text: str) -> float | None:
    try:
        minutes = float(text)
    except ValueError:
        return None
    return minutes if math.isfinite(minutes) and 0 <= minutes <= LONGEST_MUTE_MIN else None


def _shown(name: str) -> str:
    """Who it was, as one line."""
    return "".join(one for one in name if one.isprintable())[:_LONGEST_NAME]
