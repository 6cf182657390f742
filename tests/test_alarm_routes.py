"""Alarms as people and programs meet them: HTTP, command line, a whole daemon with a webhook and its archive."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from streamprior.alarms import RUNS, AlarmBook
from streamprior.cli import app
from streamprior.config import HttpSettings
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.prior import save_prior
from streamprior.server import HttpServer, make_app
from streamprior.sinks.archive import read_about, run_folders
from streamprior.sinks.page import LivePage
from streamprior.wire.dectris_v2 import encode_end
from tests.builders import NAMES, diffraction, make_run, small_prior
from tests.test_daemon import Running, daemon
from tests.test_drift import make_result
from tests.test_path import series
from tests.test_recovery import COUNT, Hall, kill, send
from tests.test_recovery import hall as hall
from tests.test_server import shown
from tests.test_webhook import Receiver

TOKEN = "a-token-that-nobody-else-knows-0123456789"


class Served:
    """The real server around a book in which an alarm of flux stands since frame 5."""

    def __init__(self, token: str | None = None) -> None:
        self.book = AlarmBook({"flux": 5.0, "chi2": 1.0}, patience=1)
        self.book.begin(make_run("run-1"))
        self.book([make_result(index=5, score={"flux": 8.0}, drift={"flux": 13.0}, alarms=("flux",))])
        meters = Meters("eiger", ["classify"], ["archive"], NAMES, ["flux"])
        self.page = LivePage(small_prior())
        self.server = HttpServer(make_app(meters, Ledger(["archive"]), self.page, lambda: {}, token, self.book), HttpSettings(port=0))
        self.server.start()

    def ask(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any]:
        asked = urllib.request.Request(self.server.url + path, method=method, headers=headers)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def post(self, path: str, **headers: str) -> tuple[int, Any]:
        return self.ask(path, "POST", **headers)


@pytest.fixture
def served() -> Iterator[Served]:
    one = Served()
    yield one
    one.server.stop()


def test_what_stands_is_told_with_its_cause_and_its_first_frame(served: Served) -> None:
    status, told = served.ask("/alarms")
    (alarm,) = told["standing"]
    assert (status, told["run"], told["signals"], told["muted"]) == (200, "run-1", ["flux", "chi2"], {})
    assert (alarm["signal"], alarm["first_frame"], alarm["cause"]) == ("flux", 5, "flux 5 -> 13 photons a pixel, +8.0 sigma")
    assert (alarm["acknowledged"], alarm["cleared"], alarm["muted_until"]) == (None, None, None)


def test_a_run_is_asked_for_by_the_beginning_of_its_uid(served: Served) -> None:
    served.book.begin(make_run("other"))
    assert served.ask("/alarms")[1]["standing"] == []
    status, told = served.ask("/alarms?run=run")
    assert (status, told["run"], [one["signal"] for one in told["alarms"]], told["left_out"]) == (200, "run-1", ["flux"], 0)
    for unknown in ("x", "", "run-1-and-more"):
        status, told = served.ask(f"/alarms?run={unknown}")
        assert status == 404
        assert "run.json in the archive" in told["error"]
    assert len(served.ask("/alarms")[1]["runs"]) == 2 <= RUNS


def test_an_alarm_is_acknowledged_by_name_and_one_that_does_not_stand_is_not(served: Served) -> None:
    status, told = served.post("/alarms/flux/acknowledge?by=Ada%0A%00L")
    assert (status, told["acknowledged_by"]) == (200, "AdaL")
    assert served.ask("/alarms")[1]["standing"][0]["acknowledged"] == told["acknowledged"]
    assert served.post("/alarms/chi2/acknowledge")[0] == 409
    status, told = served.post("/alarms/nothing/acknowledge")
    assert status == 404
    assert "flux, chi2" in told["error"]


def test_nothing_is_changed_by_asking(served: Served) -> None:
    with pytest.raises(urllib.error.HTTPError, match="405"):
        urllib.request.urlopen(f"{served.server.url}/alarms/flux/mute", timeout=10)
    assert served.ask("/alarms")[1]["muted"] == {}


def test_a_muted_alarm_is_in_status_and_holds_nobody_up(served: Served) -> None:
    served.page.write([shown(5)])
    assert served.ask("/status")[1]["muted"] == []
    status, told = served.post("/alarms/flux/mute?minutes=5")
    assert (status, told["signal"]) == (200, "flux")
    told = served.ask("/status")[1]
    assert (told["alarms"], told["alarm"], told["muted"]) == (["flux"], True, ["flux"])
    assert list(served.ask("/alarms")[1]["muted"]) == ["flux"]
    served.post("/alarms/flux/mute?minutes=0")
    assert served.ask("/status")[1]["muted"] == []


@pytest.mark.parametrize("minutes", ["-1", "x", "nan", "inf", "1e9", ""])
def test_a_mute_of_no_sensible_length_is_refused(minutes: str, served: Served) -> None:
    status, told = served.post(f"/alarms/flux/mute?minutes={minutes}")
    assert status == 400
    assert "1440" in told["error"]


def test_a_page_of_somebody_else_changes_nothing(served: Served) -> None:
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": served.server.url.replace("127.0.0.1", "localhost")},  # another origin, to a browser
        {"Origin": "http://evil.example", "Host": "evil.example"},  # a name that was made to lead here
        {"Host": "evil.example"},
        {"Host": "["},
    ):
        for path in ("/alarms/flux/mute", "/alarms/flux/acknowledge"):
            status, told = served.post(path, **headers)
            assert status == 403, headers
            assert "page" in told["error"] or "http.token_file" in told["error"]
    assert served.book.muted() == {}
    assert served.post("/alarms/flux/mute", Origin=served.server.url)[0] == 200, "our own page"


def test_with_a_token_the_name_is_anyones_and_the_token_is_needed() -> None:
    served = Served(TOKEN)
    try:
        assert served.post("/alarms/flux/mute")[0] == 401
        assert served.ask("/alarms")[0] == 401
        with_token = {"Authorization": f"Bearer {TOKEN}"}
        assert served.post("/alarms/flux/mute", Host="beamline.example", Origin="https://beamline.example", **with_token)[0] == 200
        assert served.post("/alarms/flux/mute", Origin="https://evil.example", **with_token)[0] == 403
    finally:
        served.server.stop()


def said(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["alarms", *words])
    return result.exit_code, result.output


def test_the_command_line_lists_acknowledges_and_mutes(served: Served) -> None:
    url = ("--url", served.server.url)
    code, text = said(*url)
    assert code == 1, "one stands, for scripts"
    assert "flux 5 -> 13 photons a pixel, +8.0 sigma, from frame 5 to 5, raised " in text
    code, text = said(*url, "--acknowledge", "flux", "--by", "Ada")
    assert code == 1, "seen is not over"
    assert "by Ada" in text
    code, text = said(*url, "--mute", "flux", "--minutes", "5")
    assert code == 0
    assert "flux is muted until" in text
    served.book.begin(make_run("run-2"))
    assert said(*url)[1].startswith("no alarm stands\nflux is muted until ")
    code, text = said(*url, "--run", "run-1")
    assert (code, text.count("flux 5 -> 13")) == (0, 1)
    assert said(*url, "--run", "run-2") == (0, "no alarm in run run-2\n")
    assert json.loads(said(*url, "--json")[1])["run"] == "run-2"


def test_the_command_line_repeats_what_the_daemon_refuses(served: Served) -> None:
    for words, sentence in (
        (("--mute", "a/b?c"), "no signal 'a/b?c'"),
        (("--acknowledge", "chi2"), "no alarm stands for chi2"),
        (("--mute", "flux", "--minutes", "5000"), "1440"),
        (("--run", "x"), "no run 'x'"),
    ):
        code, text = said("--url", served.server.url, *words)
        assert code == 2, text
        assert sentence in text


def test_a_daemon_tells_of_a_beam_that_loses_half_its_flux_and_the_archive_keeps_it(tmp_path: Path) -> None:
    save_prior(small_prior(baselines={"flux": (19.5, 0.15)}), tmp_path / "prior.h5")
    there = Receiver()
    frames = np.concatenate([diffraction(count=20), diffraction(count=20, photons=1e4), diffraction(count=10)])
    token = tmp_path / "hook.token"
    token.touch(0o600)
    token.write_text(TOKEN)
    settings = {"webhook": there.url, "webhook_token_file": "hook.token", "page": "http://beamline:9870/"}
    try:
        with daemon(tmp_path, alarms=settings, overload={"furthest": "nothing"}) as running:
            with running.sender() as push:
                for message in series(frames):
                    push.send(message)
                running.until("run closed")
            _, headers, raised = there.taken.get(timeout=20)
            cleared = there.next()
            told = running.get("/alarms")
            history = running.get(f"/alarms?run={told['run'][:8]}")
            scraped = running.get("/metrics")
            running.process.terminate()
            _, logged = running.process.communicate(timeout=60)
            logged += str(running.log)
    finally:
        there.close()
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert (raised["event"], raised["signal"], raised["frame"], raised["source"]) == ("raised", "flux", 20, "detector")
    assert raised["page"] == f"http://beamline:9870/?run={told['run']}&frame=20"
    assert (cleared["event"], cleared["frame"], cleared["alarm"]["last_frame"]) == ("cleared", 42, 39)
    assert told["standing"] == []
    (kept,) = read_about(run_folders(tmp_path / "archive")[0])["alarms"]
    assert history["alarms"] == [kept]
    assert (kept["signal"], kept["first_frame"], kept["last_frame"]) == ("flux", 20, 39)
    assert kept["peak_sigmas"] < -60
    assert "streamprior_webhook_up 1.0" in scraped
    assert "streamprior_webhook_undelivered_total 0.0" in scraped
    assert TOKEN not in logged
    assert "s3cret" not in logged


def test_an_alarm_outlives_a_kill_of_the_daemon_and_nobody_hears_of_it_twice(hall: Hall) -> None:
    save_prior(small_prior(baselines={"flux": (19.5, 0.15)}), hall.folder / "prior.h5")
    hall.frames[10:40] = diffraction(count=30, photons=1e4)
    there = Receiver()
    settings = {"recovery": hall.recovery(), "alarms": {"webhook": there.url}}
    try:
        with hall.daemon(**settings) as running:
            send(running, [hall.start(), *hall.images(0, 20)])
            raised = there.next()
            assert CliRunner().invoke(app, ["alarms", "--url", url_of(running), "--acknowledge", "flux", "--by", "Ada"]).exit_code == 1
            send(running, hall.images(20, 25))
            settled(running, 25)
            kill(running)
        with hall.daemon(**settings) as running:
            send(running, [*hall.images(25, COUNT), encode_end(1, "S1")])
            running.until("run closed")
            cleared = there.next()
            assert running.leave()[0] == 0
    finally:
        there.close()
    assert (raised["event"], raised["frame"]) == ("raised", 10)
    assert (cleared["event"], cleared["frame"]) == ("cleared", 42)
    (run,) = hall.runs()
    (kept,) = run.about["alarms"]
    assert (kept["first_frame"], kept["last_frame"], kept["acknowledged_by"], kept["raised"]) == (10, 39, "Ada", raised["at"])


def url_of(running: Running) -> str:
    return f"http://127.0.0.1:{running.http}"


def settled(running: Running, count: int) -> None:
    """Wait until so many frames are archived."""
    while running.get("/status")["ledger"]["published"] < count:
        time.sleep(0.01)


def test_a_disk_that_is_nearly_full_is_an_alarm_before_any_run(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    there = Receiver()
    try:
        with daemon(tmp_path, alarms={"webhook": there.url}, archive={"short_mb": 2**40, "full_mb": 0}) as running:
            body = there.next()
            told = running.get("/alarms")
            running.leave()
    finally:
        there.close()
    assert (body["event"], body["signal"], body["run"], body["frame"]) == ("raised", "disk_short", None, None)
    assert "nearly full: nothing is refined; free space on it" in body["text"]
    assert body["page"] == f"http://127.0.0.1:{running.http}/"
    assert ([one["signal"] for one in told["standing"]], told["run"]) == (["disk_short"], None)
    assert {"flux", "ledger", "overload", "card", "disk_full", "sink_archive"} <= set(told["signals"])
