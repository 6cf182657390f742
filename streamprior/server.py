"""HTTP on one port: /metrics /healthz /readyz /ledger /alarms /status and the live page with its pictures, /live and /mosaic."""

from __future__ import annotations

import hashlib
import hmac
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from streamprior import __version__
from streamprior.alarm_routes import alarm_routes
from streamprior.alarms import AlarmBook
from streamprior.config import HttpSettings
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger, answer
from streamprior.metrics import Meters
from streamprior.records import Flag, Result
from streamprior.sinks.page import LivePage

_MOST_DIGITS = 30
"""Of a frame index in a question; Python reads longer numbers in quadratic time, or refuses."""

Health = Callable[[], Mapping[str, bool]]
"""What must be true for the daemon to be ready: name -> whether it is."""


def make_app(
    meters: Meters, ledger: Ledger, page: LivePage, ready: Health, token: str | None = None, book: AlarmBook | None = None
) -> ASGIApp:
    """The routes. Every handler is a plain function: Starlette runs it in a thread, so no request holds up another.

    token : that all but /metrics, /healthz and /readyz take, as `Authorization: Bearer TOKEN`; None asks for none. A browser is given it
    once, as /?token=TOKEN, and gets a cookie. book : of the alarms; None where nobody keeps one.
    """
    alarms = book or AlarmBook({})

    def metrics(request: Request) -> Response:
        text, content_type = meters.render(request.headers.get("accept", ""))
        return Response(text, media_type=content_type)

    def healthz(request: Request) -> Response:
        return JSONResponse({"alive": True})

    def readyz(request: Request) -> Response:
        state = dict(ready())
        return JSONResponse({"ready": all(state.values()), **state}, 200 if all(state.values()) else 503)

    def accounts(request: Request) -> Response:
        run, frame = request.query_params.get("run"), request.query_params.get("frame")
        if frame is not None and (not frame.isdecimal() or len(frame) > _MOST_DIGITS):
            return JSONResponse({"error": f"frame={frame[:_MOST_DIGITS]!r} is not a frame index"}, 400)
        try:
            asked = int(frame) if frame is not None else None
            return JSONResponse(answer(ledger, run or None, asked, "left_out" in request.query_params))
        except KeyError:
            return JSONResponse({"error": f"no run {run or 'yet'}; /ledger lists those there are"}, 404)

    def status(request: Request) -> Response:
        return JSONResponse(numbers_now(meters, ledger, page) | {"muted": _muted_of(page.newest, alarms)})

    def live(request: Request) -> Response:
        # A page asks for a mosaic when it hears of one here: most runs have none, and five requests a second in vain add up.
        return _picture(page.picture(_after(request)), {"Mosaic": str(page.mosaic_serial)})

    def mosaic(request: Request) -> Response:
        return _picture(page.mosaic_picture(_after(request)), {})

    def index(request: Request) -> Response:
        return HTMLResponse(files("streamprior").joinpath("page.html").read_text())

    def script(request: Request) -> Response:
        return Response(files("streamprior").joinpath("page_mosaic.js").read_text(), media_type="text/javascript")

    paths = {"/metrics": metrics, "/healthz": healthz, "/readyz": readyz, "/ledger": accounts, "/live": live, "/mosaic": mosaic}
    paths |= {"/status": status, "/": index, "/page_mosaic.js": script}
    app = Starlette(routes=[Route(path, handler) for path, handler in paths.items()] + alarm_routes(alarms, token is None))
    return app if token is None else _guarded(app, token)


_OPEN_TO_ALL = ("/metrics", "/healthz", "/readyz")


def _guarded(app: ASGIApp, token: str) -> ASGIApp:
    """The application behind a token."""
    # Cookies go to every port of a host: another service there is not to see the token itself.
    pass_for_pages = hashlib.sha256(b"streamprior page " + token.encode()).hexdigest()

    async def guard(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        cookie = f"streamprior_{request.url.port or 0}"  # of this daemon: two may share a host
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        asked = request.query_params.get("token", "")
        if scope["path"] in _OPEN_TO_ALL or (scheme.lower() == "bearer" and _same(given.strip(), token)):
            await app(scope, receive, send)
        elif scope["path"] == "/" and _same(asked, token):
            answer = RedirectResponse("/", 303, headers={"Cache-Control": "no-store", "Referrer-Policy": "no-referrer"})
            answer.set_cookie(cookie, pass_for_pages, httponly=True, samesite="strict")
            await answer(scope, receive, send)
        elif _same(request.cookies.get(cookie, ""), pass_for_pages):
            await app(scope, receive, send)
        else:
            wrong = "this daemon takes a token, as `Authorization: Bearer TOKEN`; a browser is given it once, as /?token=TOKEN"
            await JSONResponse({"error": wrong}, 401, headers={"WWW-Authenticate": "Bearer"})(scope, receive, send)

    return guard


def _same(given: str, expected: str) -> bool:
    """In a time that does not tell how much of it is right."""
    return hmac.compare_digest(given.encode(), expected.encode())


def numbers_now(meters: Meters, ledger: Ledger, page: LivePage) -> dict[str, Any]:
    """What the daemon knows at this moment as JSON-able numbers, for programs that follow it: null where there is nothing to tell.

    The newest result: run (uid), series, index, received (Unix s), age_s, chi2, chi2_floor, distance, iou (class -> prior and previous),
    score (signal -> standard deviations of the prior's baseline), alarms (signals), alarm (whether any stands), flags (names). Classes
    and signals are named before the first frame.
    The path: frames_received since the daemon started, frames_behind (received and not settled yet, or settled and not in these numbers
    yet), ledger (account of the newest run), degradation_level, version.
    """
    # In this order: what comes in meanwhile makes these numbers look older than they are, never newer.
    received, behind, published = ledger.total_received(), ledger.in_flight(), ledger.last_published()
    result = page.newest
    if published is not None and not behind and not _shows(result, published, ledger):
        behind = 1
    accounts = [account for account in ledger.runs() if account["run"] is not None]
    series = next((account["series"] for account in accounts if result is not None and account["run"] == result.run), None)
    return {
        "version": __version__,
        **_of_result(result, meters),
        "series": series,
        "frames_received": received,
        "frames_behind": behind,
        "ledger": accounts[0] if accounts else None,
        "degradation_level": meters.degradation_level,
    }


def _shows(result: Result | None, published: tuple[str, int], ledger: Ledger) -> bool:
    """Whether a result is as new as the frame that was published last: the page may be ahead of the archive, or behind it."""
    if result is None:
        return False
    try:
        return (result.run, result.index) == published or ledger.frame(result.run, result.index) == "in flight"
    except KeyError:
        return False


def _of_result(result: Result | None, meters: Meters) -> dict[str, Any]:
    """The newest frame's own numbers; JSON has no NaN."""
    iou, previous, score = ({}, {}, {}) if result is None else (result.iou, result.iou_previous, result.score)
    alarms, flags = ((), 0) if result is None else (result.alarms, result.flags)
    return {
        "run": result.run if result is not None else None,
        "index": result.index if result is not None else None,
        **{name: _known(getattr(result, name, None)) for name in ("received", "chi2", "chi2_floor", "distance")},
        "age_s": max(0.0, time.time() - result.received) if result is not None else None,
        "iou": {name: {"prior": _known(iou.get(name)), "previous": _known(previous.get(name))} for name in meters.classes},
        "score": {signal: _known(score.get(signal)) for signal in meters.signals},
        "alarms": list(alarms),
        "alarm": bool(alarms),
        "flags": [flag.name for flag in Flag if flags & flag],
    }


def _muted_of(result: Result | None, book: AlarmBook) -> list[str]:
    """Alarms of the newest frame that nobody is to be held up by."""
    muted = book.muted()
    return [signal for signal in result.alarms if signal in muted] if result is not None else []


def _known(value: float | None) -> float | None:
    """None in place of what is not a number."""
    return float(value) if value is not None and math.isfinite(value) else None


def _after(request: Request) -> int:
    after = request.query_params.get("after", "0")
    # A serial has few digits; isdigit alone also holds for superscripts, which int refuses.
    return int(after) if after.isdecimal() and len(after) < 20 else 0


def _picture(picture: bytes | None, headers: dict[str, str]) -> Response:
    if picture is None:
        return Response(status_code=204, headers=headers)
    return Response(picture, media_type="application/octet-stream", headers=headers)


class HttpServer:
    """Owns the listening socket and uvicorn's thread."""

    def __init__(self, app: ASGIApp, settings: HttpSettings) -> None:
        self._settings = settings
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
        self._thread: threading.Thread | None = None
        self._socket: socket.socket | None = None
        self.url = ""

    def listen(self) -> None:
        """Take the port. Raises ConfigError where it is taken or the host is not ours."""
        host, port = self._settings.host, self._settings.port
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            # From here on a request waits for the server's thread instead of being refused.
            self._socket.listen(128)
        except (OSError, UnicodeError) as error:
            self.stop()
            raise ConfigError(
                f"http.port: cannot listen on {host}:{port} ({error}); stop the process that holds it or set http.port to another"
            ) from None
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"

    def start(self) -> None:
        """Listen and serve."""
        self.listen()
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, name="http", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join(5)
        if self._socket is not None:
            self._socket.close()
