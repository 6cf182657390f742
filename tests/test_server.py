"""HTTP: every route answers what it promises, and the live page's picture is made once for all who look."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from streamprior.config import HttpSettings
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.records import NOT_MEASURED, Flag, Result, RunEnded
from streamprior.server import HttpServer, make_app
from streamprior.sinks.page import LivePage
from tests.builders import NAMES, make_run, small_prior
from tests.test_drift import make_result


def shown(index: int = 7, **changes: Any) -> Result:
    """A result whose images are all different."""
    classes = np.arange(32 * 32, dtype=np.uint8).reshape(32, 32) % 3
    classes[0, 0] = NOT_MEASURED
    psi = np.array([[1, 1j, -2], [0, 4, 1 - 1j]], np.complex64)
    counts = np.arange(32 * 32, dtype=np.float32).reshape(32, 32)
    result = make_result(classes, counts, iou={"core": 0.5, "ring": float("nan")}, score={"chi2": -1.5}, alarms=("flux",))
    return replace(result, index=index, object=psi, **changes)


def unpack(picture: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and images, as the page reads them."""
    length = int.from_bytes(picture[:4], "little")
    header = json.loads(picture[4 : 4 + length])
    at, images = 4 + length, {}
    for name, (height, width) in header["images"].items():
        images[name] = np.frombuffer(picture, np.uint8, height * width, at).reshape(height, width)
        at += height * width
    assert at == len(picture), "nothing is left over"
    return header, images


def test_a_picture_holds_the_frame_the_classes_and_the_object_as_bytes() -> None:
    page = LivePage(small_prior())
    page.write([shown(6), replace(shown(7), chi2_floor=float("nan"))])
    picture = page.picture()
    assert picture is not None
    header, images = unpack(picture)
    result = shown()
    assert (header["index"], header["run"], header["serial"], header["arm"]) == (7, "run-1", 1, "flat")
    assert header["class_names"] == list(NAMES)
    assert header["chi2"] == pytest.approx(0.1)
    assert header["chi2_floor"] is None, "JSON has no NaN"
    assert header["iou"] == {"core": 0.5, "ring": None}
    assert header["score"] == {"chi2": -1.5}
    assert header["alarms"] == ["flux"]
    assert header["most_counts"] == 1023
    np.testing.assert_array_equal(images["classes"], result.classes)
    np.testing.assert_array_equal(
        images["frame"], (np.log1p(result.counts) * np.float32(255 / np.log1p(np.float32(1023)))).astype(np.uint8)
    )
    assert images["amplitude"].tolist() == [[63, 63, 127], [0, 255, 90]]
    assert images["phase"].tolist() == [[127, 191, 255], [127, 127, 95]]


def test_an_empty_frame_has_a_picture_too() -> None:
    page = LivePage(small_prior())
    black = np.zeros((32, 32), np.float32)
    page.write([replace(shown(), counts=black, object=np.zeros((2, 3), np.complex64), flags=int(Flag.EMPTY), chi2=float("nan"))])
    picture = page.picture()
    assert picture is not None
    header, images = unpack(picture)
    assert header["chi2"] is None
    assert not images["frame"].any()
    assert not images["amplitude"].any()


def test_a_frame_that_was_not_refined_has_no_object() -> None:
    page = LivePage(small_prior())
    page.write([shown(flags=int(Flag.NOT_REFINED))])
    picture = page.picture()
    assert picture is not None
    assert set(unpack(picture)[1]) == {"frame", "classes"}


def test_nothing_newer_is_nothing() -> None:
    page = LivePage(small_prior())
    assert page.picture() is None
    page.write([shown()])
    assert page.picture(after=0) is not None
    assert page.picture(after=1) is None
    page.write([shown()])
    assert page.picture(after=1) is not None


def test_everyone_who_looks_shares_one_picture() -> None:
    page = LivePage(small_prior())
    page.write([shown()])
    assert page.picture() is page.picture()
    with ThreadPoolExecutor(4) as pool:
        pictures = list(pool.map(lambda _: page.picture(), range(40)))
    assert len({id(picture) for picture in pictures}) == 1
    first = page.picture()
    page.write([shown(8)])
    assert page.picture() is not first


class Served:
    """The real server on a free port, around a ledger, meters and a page that the test holds."""

    def __init__(self) -> None:
        self.ledger = Ledger(["archive"])
        self.meters = Meters("eiger", ["classify"], ["archive"], NAMES, ["flux"])
        self.meters.watch(self.ledger.in_flight, self.ledger.missing, {"receive": lambda: 12})
        self.page = LivePage(small_prior())
        self.state = {"path": True, "sink_archive": True}
        self.server = HttpServer(make_app(self.meters, self.ledger, self.page, lambda: self.state), HttpSettings(port=0))
        self.server.start()

    def get(self, path: str) -> tuple[int, str, bytes]:
        """(status, content type, body)."""
        try:
            with urllib.request.urlopen(self.server.url + path, timeout=10) as answer:
                return answer.status, answer.headers.get("content-type", ""), answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers.get("content-type", ""), error.read()

    def header(self, path: str, name: str) -> str | None:
        with urllib.request.urlopen(self.server.url + path, timeout=10) as answer:
            value: str | None = answer.headers.get(name)
            return value

    def json(self, path: str) -> tuple[int, Any]:
        status, kind, body = self.get(path)
        assert kind == "application/json"
        return status, json.loads(body)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    served = Served()
    yield served
    served.server.stop()


def test_healthz_says_that_the_process_lives(server: Served) -> None:
    assert server.json("/healthz") == (200, {"alive": True})


def test_readyz_is_503_while_anything_is_not_up_and_says_what(server: Served) -> None:
    assert server.json("/readyz") == (200, {"ready": True, "path": True, "sink_archive": True})
    server.state["sink_archive"] = False
    assert server.json("/readyz") == (503, {"ready": False, "path": True, "sink_archive": False})
    server.state["sink_archive"] = True


def test_metrics_can_be_parsed_and_hold_zeros(server: Served) -> None:
    status, kind, body = server.get("/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    families = text_string_to_metric_families(body.decode())
    samples = {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}
    assert samples["streamprior_queue_bytes", "receive"] == 12
    assert samples["streamprior_frames_dropped_total", "queue_full", "receive"] == 0
    assert samples["streamprior_drift_alarm", "flux"] == 0


def test_starts_and_abstentions_are_counted_and_the_distance_is_that_of_the_prototype() -> None:
    meters = Meters("eiger", ["classify"], ["archive"], NAMES, ["flux", "chi2"])

    def scraped() -> dict[tuple[str, ...], float]:
        families = text_string_to_metric_families(meters.render("text/plain")[0].decode())
        return {(one.name, *one.labels.values()): one.value for family in families for one in family.samples}

    assert [scraped()["streamprior_arm_kept_total", arm] for arm in ("prototype", "flat", "none")] == [0, 0, 0]
    assert scraped()["streamprior_frames_abstained_total",] == 0
    for result in (shown(arm="prototype", unit=3), shown(arm="prototype"), shown(flags=Flag.ABSTAINED), shown(arm="none")):
        meters.thought([result])
    assert [scraped()["streamprior_arm_kept_total", arm] for arm in ("prototype", "flat", "none")] == [2, 1, 1]
    assert scraped()["streamprior_frames_abstained_total",] == 1
    meters.newest(replace(shown(distance=0.25, class_distance=1.5), iou={}, score={}))
    assert scraped()["streamprior_prior_distance",] == 0.25
    assert scraped()["streamprior_class_distance",] == 1.5


def test_the_slowest_frame_of_a_batch_is_the_exemplar_of_its_latency_for_those_who_ask_for_one() -> None:
    meters = Meters("eiger", ["classify"], ["archive"], NAMES, ["flux"])
    batch = [replace(shown(), run="r" * 300, index=index, received=100.0 - wait) for index, wait in ((7, 0.3), (8, 0.4), (9, 0.05))]
    meters.archived(batch, 100.0)
    meters.thought([shown()])  # a batch that no stage has timed
    text = meters.render("application/openmetrics-text; version=1.0.0")[0].decode()
    told = [line for line in text.splitlines() if "# {" in line]
    assert len(told) == 1
    assert 'le="0.5",output="archive"' in told[0]
    assert f'# {{frame="8",run="{"r" * 64}"}}' in told[0] or f'# {{run="{"r" * 64}",frame="8"}}' in told[0], (
        "no scrape fails for a long uid"
    )
    assert "# {" not in meters.render("text/plain")[0].decode()


def test_the_page_is_told_which_start_was_kept() -> None:
    page = LivePage(small_prior())
    for given, told in (
        ({"arm": "prototype", "unit": 12, "distance": 0.25}, ("prototype", 12, 0.25, False)),
        ({"flags": Flag.ABSTAINED, "distance": 0.5}, ("flat", -1, 0.5, True)),
        ({}, ("flat", -1, None, False)),
    ):
        page.write([shown(**given)])
        picture = page.picture()
        assert picture is not None
        header, _ = unpack(picture)
        assert tuple(header[name] for name in ("arm", "unit", "distance", "abstained")) == told


def test_the_ledger_answers_for_all_runs_one_run_and_one_frame() -> None:
    served = Served()
    try:
        assert served.json("/ledger") == (200, {"runs": [], "earlier": [], "balanced": True})
        assert served.json("/ledger?frame=1")[0] == 404
        served.ledger.open_run(make_run("one"))
        served.ledger.received("one", 0)
        served.ledger.received("one", 1)
        served.ledger.dropped("one", 1, "receive", "queue_full")
        status, told = served.json("/ledger?frame=0")
        assert (status, told["run"], told["frame"], told["fate"]) == (200, "one", 0, "in flight")
        served.ledger.published("one", "archive", [0])
        served.ledger.close_run(RunEnded("one", "end", 1.0))
        status, everything = served.json("/ledger")
        assert (status, everything["balanced"], [one["run"] for one in everything["runs"]]) == (200, True, ["one"])
        status, account = served.json("/ledger?run=one")
        assert (status, account["published"], account["dropped"]) == (200, 1, {"receive/queue_full": 1})
        assert served.json("/ledger?run=one&frame=0")[1]["fate"] == "published"
        assert served.json("/ledger?frame=1")[1]["fate"] == "dropped at receive: queue_full"
        assert served.json("/ledger?frame=999")[1]["fate"] == "never received"
        assert served.json("/ledger?left_out")[1]["left_out"] == [{"fate": "dropped at receive: queue_full", "first": 1, "last": 1}]
        for query, code, words in (("run=two", 404, "no run two"), ("frame=x", 400, "not a frame index"), ("run=two&frame=0", 404, "two")):
            status, answer = served.json(f"/ledger?{query}")
            assert status == code
            assert words in answer["error"]
    finally:
        served.server.stop()


def test_live_is_204_until_something_is_newer(server: Served) -> None:
    assert server.get("/live")[0] == 204
    server.page.write([shown()])
    status, kind, body = server.get("/live?after=0")
    assert (status, kind) == (200, "application/octet-stream")
    header, _ = unpack(body)
    assert server.get(f"/live?after={header['serial']}")[0] == 204
    for after in ("-1", "x", "", "%C2%B2", "9" * 400):
        assert server.get(f"/live?after={after}")[0] in (200, 204), after


def test_the_page_is_html_that_asks_for_live(server: Served) -> None:
    status, kind, body = server.get("/")
    assert status == 200
    assert kind.startswith("text/html")
    assert b"/live?after=" in body
    assert b"canvas" in body


def test_an_unknown_path_is_404(server: Served) -> None:
    assert server.get("/nothing")[0] == 404


def test_a_port_that_is_taken_is_the_operators_fault() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"http\.port: cannot listen on 127\.0\.0\.1:{port} .* another"):
            HttpServer(lambda *_: None, HttpSettings(port=port)).listen()  # type: ignore[arg-type,return-value]


def test_a_request_before_the_thread_serves_waits_instead_of_being_refused() -> None:
    served = HttpServer(lambda *_: None, HttpSettings(port=0))  # type: ignore[arg-type,return-value]
    served.listen()
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=5):
        pass
    served.stop()
