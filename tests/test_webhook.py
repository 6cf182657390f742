"""The webhook: what a real HTTP server on loopback is sent, whatever it answers, and that nobody waits for it."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from structlog.testing import capture_logs

from streamprior.alarms import Alarm, Change
from streamprior.config import AlarmSettings, Config
from streamprior.errors import ConfigError
from streamprior.preflight import inspect
from streamprior.webhook import Webhook, address_of, message, webhook_token

SECRET = "T0ken-that-nobody-sees"


class Receiver:
    """A server that answers with one status after another (the last one for ever) and keeps what it was sent."""

    def __init__(self, statuses: Sequence[int] = (200,)) -> None:
        self.taken: Queue[tuple[str, dict[str, str], dict[str, Any]]] = Queue()
        waiting = list(statuses)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler) -> None:  # noqa: N805 - http.server's name; self is the receiver
                body = json.loads(handler.rfile.read(int(handler.headers["content-length"])))
                handler.send_response(waiting.pop(0) if len(waiting) > 1 else waiting[0])
                handler.send_header("Location", "http://127.0.0.1:9/elsewhere")
                handler.send_header("Content-Length", "0")
                handler.end_headers()
                self.taken.put((handler.path, dict(handler.headers), body))

            def log_message(handler, *args: Any) -> None:  # noqa: N805
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook/s3cret?team=5"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def next(self) -> dict[str, Any]:
        return self.taken.get(timeout=20)[2]

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def receiver() -> Iterator[Callable[..., Receiver]]:
    made: list[Receiver] = []

    def make(*statuses: int) -> Receiver:
        made.append(Receiver(statuses or (200,)))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def hook() -> Iterator[Callable[..., Webhook]]:
    made: list[Webhook] = []

    def make(url: str, token: str | None = None, **settings: float) -> Webhook:
        compose = lambda change: message(change, "eiger", "http://beamline:9870")  # noqa: E731
        made.append(Webhook(address_of(url), token, compose, **{"first_pause_s": 0.01, "longest_pause_s": 0.02, **settings}))
        made[-1].start()
        return made[-1]

    yield make
    for one in made:
        one.stop()


def change(what: Any = "raised", frame: int = 812, signal: str = "flux") -> Change:
    alarm = Alarm(signal, "drift", "run-1", "7", "flux 3.2 -> 2.9 photons a pixel, -6.1 sigma", frame, frame + 2, 1000.5, -6.1)
    return Change(what, alarm, 1001.0, frame)


def until(holds: Callable[[], bool]) -> None:
    """Another thread makes it true; a hundredth of a second is only how often we look."""
    pause = threading.Event()
    for _ in range(2000):
        if holds():
            return
        pause.wait(0.01)
    raise AssertionError("it did not happen within 20 s")


def test_a_message_has_the_alarm_the_run_the_frame_and_a_link(receiver: Callable[..., Receiver], hook: Callable[..., Webhook]) -> None:
    there = receiver()
    hook(there.url, SECRET).tell(change())
    path, headers, body = there.taken.get(timeout=20)
    assert path == "/hook/s3cret?team=5"
    assert headers["Authorization"] == f"Bearer {SECRET}"
    assert headers["Content-Type"] == "application/json"
    assert (body["event"], body["signal"], body["run"], body["frame"], body["source"]) == ("raised", "flux", "run-1", 812, "eiger")
    assert body["page"] == "http://beamline:9870/?run=run-1&frame=812"
    assert body["alarm"]["peak_sigmas"] == -6.1
    assert body["text"] == (
        "streamprior eiger, drift alarm: flux 3.2 -> 2.9 photons a pixel, -6.1 sigma, frame 812 of run run-1"
        " http://beamline:9870/?run=run-1&frame=812"
    )


def test_a_server_that_answers_500_gets_the_same_message_again_and_the_next_one_behind_it(
    receiver: Callable[..., Receiver], hook: Callable[..., Webhook]
) -> None:
    there = receiver(500, 503, 429, 204)
    sender = hook(there.url)
    with capture_logs() as logs:
        sender.tell(change())
        sender.tell(change("cleared", 900))
        got = [there.next() for _ in range(5)]
        until(lambda: sender.delivered == 2)
    assert len({one["id"] for one in got[:4]}) == 1
    assert [one["event"] for one in got] == ["raised"] * 4 + ["cleared"]
    assert (sender.undelivered, sender.up) == (0, True)
    assert [one["event"] for one in logs][-1] == "messages about alarms are taken again"


@pytest.mark.parametrize("status", [302, 401, 404])
def test_a_server_that_will_not_take_it_is_not_asked_again(
    status: int, receiver: Callable[..., Receiver], hook: Callable[..., Webhook]
) -> None:
    there = receiver(status, 200)
    sender = hook(there.url)
    sender.tell(change())
    sender.tell(change("cleared"))
    assert [there.next()["event"], there.next()["event"]] == ["raised", "cleared"]
    until(lambda: (sender.undelivered, sender.delivered) == (1, 1))


def test_a_server_that_hangs_delays_nobody_and_gets_the_message_when_it_wakes(hook: Callable[..., Webhook]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        sender = hook(f"http://127.0.0.1:{hanging.getsockname()[1]}/", timeout_s=0.1)
        first, second = change(), change("cleared")
        for one in (first, second):  # returns though nobody answers
            sender.tell(one)
        silent, _ = hanging.accept()
        again, _ = hanging.accept()  # it tries anew
        with silent, again:
            assert not sender.up
            assert sender.delivered == 0
            again.settimeout(20)
            assert b'"event": "raised"' in received(again)


def received(connection: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


def test_what_is_too_old_is_given_up_and_counted(receiver: Callable[..., Receiver], hook: Callable[..., Webhook]) -> None:
    sender = hook(receiver(500).url, give_up_s=0.0)
    sender.tell(change())
    until(lambda: sender.undelivered == 1)
    assert sender.delivered == 0


def test_beyond_a_hundred_the_oldest_is_left_out_and_counted() -> None:
    sender = Webhook(address_of("http://127.0.0.1:9/"), None, lambda one: {})  # not started: nothing leaves
    for frame in range(130):
        sender.tell(change(frame=frame))
    assert sender.undelivered == 30
    assert [one.frame for one in sender._waiting][::99] == [30, 129]


def test_what_waits_is_tried_once_more_when_the_daemon_leaves(receiver: Callable[..., Receiver]) -> None:
    there = receiver(500, 200)
    sender = Webhook(address_of(there.url), None, lambda one: message(one, "eiger", ""), first_pause_s=600.0)
    sender.start()
    sender.tell(change())
    there.next()
    sender.tell(change("cleared"))
    sender.stop()
    assert there.next()["event"] == "cleared"
    assert (sender.undelivered, sender.delivered) == (1, 1)


def test_neither_the_token_nor_the_path_is_in_the_log(hook: Callable[..., Webhook], receiver: Callable[..., Receiver]) -> None:
    there = receiver(401)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"http://127.0.0.1:{gone.getsockname()[1]}/hook/s3cret"
    with capture_logs() as logs:
        refused, unheard = hook(there.url, SECRET), hook(nobody, SECRET, give_up_s=0.0)
        for one in (refused, unheard):
            one.tell(change())
        until(lambda: refused.undelivered + unheard.undelivered == 2)
    assert len(logs) >= 4
    assert "s3cret" not in repr(logs)
    assert SECRET not in repr(logs)


@pytest.mark.parametrize(
    "url", ["", "hooks.example/x", "ftp://host/", "http://", "http://host:99999/", "http://h/a b", "http://h/\r\nX: y"]
)
def test_an_address_that_is_none_is_the_operators_mistake(url: str) -> None:
    with pytest.raises(ConfigError, match=r"alarms\.webhook"):
        address_of(url)


def test_a_password_in_the_address_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="webhook_token_file") as error:
        address_of("https://user:hunter2@host/")
    assert "hunter2" not in str(error.value)


def test_a_token_comes_from_a_file_that_others_cannot_read(tmp_path: Path) -> None:
    file = tmp_path / "hook.token"
    file.write_text(SECRET + "\n")
    file.chmod(0o600)
    settings = AlarmSettings(webhook="https://host/", webhook_token_file=file)
    assert webhook_token(settings) == SECRET
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        webhook_token(settings)
    file.chmod(0o600)
    file.write_text("\n")
    with pytest.raises(ConfigError, match="holds no token"):
        webhook_token(settings)


def test_check_says_where_messages_will_go_and_sends_none(receiver: Callable[..., Receiver], tmp_path: Path) -> None:
    there = receiver()
    config = Config(prior=tmp_path / "none.h5", alarms={"webhook": there.url}, http={"port": 0}, archive={"folder": tmp_path})
    sentence = next(finding.sentence for finding in inspect(config) if finding.what == "alarms")
    assert f"sent to http://127.0.0.1:{there.server.server_port} when" in sentence
    assert "s3cret" not in sentence
    with pytest.raises(Empty):
        there.taken.get_nowait()


def test_check_warns_of_a_token_that_the_network_sees(tmp_path: Path) -> None:
    file = tmp_path / "hook.token"
    file.write_text(SECRET)
    file.chmod(0o600)
    settings = {"webhook": "http://hooks.example/x", "webhook_token_file": file}
    config = Config(prior=tmp_path / "none.h5", alarms=settings, http={"port": 0}, archive={"folder": tmp_path})
    finding = next(finding for finding in inspect(config) if finding.what == "alarms")
    assert finding.warns
    assert "use https" in finding.sentence
