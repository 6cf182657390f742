"""deploy/: dashboards that Grafana can read and a real Prometheus can answer, beside files that find each other."""

from __future__ import annotations

import enum
import itertools
import json
import math
import re
import runpy
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from streamprior import cli
from streamprior.config import make_config
from streamprior.prior import save_prior
from tests.builders import diffraction, small_prior
from tests.prometheus_fixture import DEPLOY, RunningPrometheus, prometheus
from tests.test_daemon import daemon, free_port
from tests.test_mosaic_path import messages, twin
from tests.test_mosaic_path import recorded as recorded
from tests.test_path import series

PAGES: dict[str, str] = runpy.run_path(str(DEPLOY / "dashboards.py"))["pages"]()
DASHBOARDS: dict[str, Any] = {name: json.loads(text) for name, text in PAGES.items()}
PROVISIONING = DEPLOY / "grafana" / "provisioning"

OF_THE_MOSAIC = {
    "streamprior_mosaic_resolution_metres",
    "streamprior_mosaic_resolution_pixels",
    "streamprior_mosaic_disagreement",
    "streamprior_mosaic_chi2",
}
"""Not known where no image of the sample is put together: the series is there, and its value is NaN."""

OF_A_LIBRARY = {"streamprior_prior_distance"}
"""Not known with a prior that holds no prototypes."""


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARDS[name]["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    """Every question of both dashboards, as Grafana puts it when all daemons and sources are chosen."""
    asked = [target["expr"] for name in DASHBOARDS for panel in panels(name) for target in panel["targets"]]
    asked += [note["expr"] for one in DASHBOARDS.values() for note in one["annotations"]["list"]]
    chosen = {"$instance": ".+", "$source": ".+", "$__rate_interval": "1m"}
    for variable, value in chosen.items():
        asked = [ask.replace(variable, value) for ask in asked]
    assert not any("$" in ask for ask in asked)
    return [*dict.fromkeys(asked)]


@pytest.mark.parametrize("name", PAGES)
def test_a_dashboard_is_what_its_tables_say(name: str) -> None:
    stale = f"deploy/grafana/{name} is stale: run `python deploy/dashboards.py`"
    assert (DEPLOY / "grafana" / name).read_text() == PAGES[name], stale


@pytest.mark.parametrize("name", PAGES)
def test_every_panel_says_what_it_shows_in_which_unit_and_within_which_bounds(name: str) -> None:
    titles = [panel["title"] for panel in DASHBOARDS[name]["panels"]]
    assert titles[0] == "Now"
    for panel in panels(name):
        field = panel["fieldConfig"]["defaults"]
        assert panel["title"], panel
        assert panel["description"].endswith("."), panel["title"]
        assert field["unit"], panel["title"]
        assert "min" in field or "axisSoftMin" in field["custom"], f"{panel['title']}: where does its axis begin?"
        assert field["thresholds"]["steps"][0]["value"] is None, panel["title"]
        assert all("__field.labels.instance" in link["url"] for link in field["links"])
        assert [target["refId"] for target in panel["targets"]] == [*"ABCDEF"[: len(panel["targets"])]]
        assert panel["type"] == "table" or all(target["legendFormat"] for target in panel["targets"]), panel["title"]


@pytest.mark.parametrize("name", PAGES)
def test_no_panel_hides_another(name: str) -> None:
    placed = DASHBOARDS[name]["panels"]
    assert len({panel["id"] for panel in placed}) == len(placed)
    squares = [
        (x, y)
        for place in (panel["gridPos"] for panel in placed)
        for x, y in itertools.product(range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"]))
    ]
    assert len(squares) == len(set(squares))
    assert all(0 <= x < 24 for x, _ in squares)


@pytest.mark.parametrize("name", PAGES)
def test_the_dashboards_follow_the_schema_that_grafana_publishes(name: str) -> None:
    schema = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="pip install grafana-foundation-sdk")
    from grafana_foundation_sdk.cog.plugins import register_default_plugins

    register_default_plugins()
    assert [*strange(DASHBOARDS[name], schema.Dashboard, name)] == []
    wrong = json.loads(PAGES[name])
    wrong["panels"][1]["gridPos"]["h"] = "high"
    wrong["panels"][1]["fieldConfig"]["defaults"]["units"] = "s"
    wrong["panels"][2]["options"]["colorMode"] = "gaudy"
    wrong["panels"][3]["targets"][0]["exemplar"] = 1
    wrong["templating"]["list"][1]["type"] = "guess"
    assert len([*strange(wrong, schema.Dashboard, name)]) == 5, "the check itself sees wrong types, unknown keys and unknown words"
    assert DASHBOARDS[name]["schemaVersion"] == schema.Dashboard().schema_version


def strange(value: Any, hint: Any, where: str) -> Iterator[str]:
    """What in a document is not as the schema's classes have it: unknown keys, other types, words that are none of the enumerated."""
    origin, given = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        found = [[*strange(value, one, where)] for one in given]
        yield from min(found, key=len)
    elif origin is typing.Literal:
        if value not in given:
            yield f"{where}: {value!r} is none of {given}"
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where}: {value!r} is no list"
            return
        for i, one in enumerate(value):
            yield from strange(one, given[0], f"{where}[{i}]")
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        if value not in [one.value for one in hint]:
            yield f"{where}: {value!r} is no {hint.__name__}"
    elif hasattr(hint, "from_json") and isinstance(value, dict):
        yield from _strange_record(value, hint, where)
    elif hint in (int, float, str, bool, type(None)) or hasattr(hint, "from_json"):
        # JSON does not tell 1 from 1.0; True is a number to Python alone.
        right = (int, float) if hint is float else hint
        if not isinstance(value, right) or (isinstance(value, bool) and hint is not bool):
            yield f"{where}: {value!r} is no {hint.__name__}"


def _strange_record(value: dict[str, Any], kind: Any, where: str) -> Iterator[str]:
    read = kind.from_json(value)
    for key in value.keys() - read.to_json().keys():
        if value[key] is not None:
            yield f"{where}: no {kind.__name__} has a key {key}"
    hints = typing.get_type_hints(kind)
    named = {_as_json(name): name for name in vars(read)}
    for key, one in value.items():
        name = named.get(key.lower())
        if name is None:
            continue
        # Options, queries and drawing styles depend on the panel's kind: the schema leaves them open, the reader knows their classes.
        held = getattr(read, name)
        known = type(held) if hasattr(type(held), "from_json") else hints[name]
        if isinstance(held, list) and held and all(hasattr(type(item), "from_json") for item in held):
            for i, (item, piece) in enumerate(zip(held, one, strict=True)):
                yield from strange(piece, type(item), f"{where}.{key}[{i}]")
        else:
            yield from strange(one, known, f"{where}.{key}")


def _as_json(name: str) -> str:
    """The schema's Python names are those of JSON with underscores; a suffix keeps them off Python's own words."""
    return name.removesuffix("_val").replace("_", "").lower()


def test_what_is_started_together_finds_each_other() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    port = make_config({"prior": "prior.h5"}, "defaults").http.port
    (job,) = scraped["scrape_configs"]
    assert (job["job_name"], job["static_configs"]) == ("streamprior", [{"targets": [f"127.0.0.1:{port}"]}])
    assert scraped["rule_files"] == ["prometheus-rules.yaml"]
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    (source,) = yaml.safe_load((PROVISIONING / "datasources" / "streamprior.yaml").read_text())["datasources"]
    assert source["url"] == f"http://{_option(services['prometheus'], 'web.listen-address')}"
    assert all(f":{port}/ledger?" in link["url"] for link in source["jsonData"]["exemplarTraceIdDestinations"])
    (provider,) = yaml.safe_load((PROVISIONING / "dashboards" / "streamprior.yaml").read_text())["providers"]
    inside = dict(reversed(mount.removesuffix(":ro").split(":")) for mount in services["grafana"]["volumes"])
    assert {f"{provider['options']['path']}/{name}": f"./grafana/{name}" for name in PAGES}.items() <= inside.items()
    assert services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in inside
    assert inside["/etc/grafana/provisioning"] == "./grafana/provisioning"
    assert _option(services["prometheus"], "config.file") == "/etc/prometheus/prometheus.yaml"


def _option(service: dict[str, Any], name: str) -> str:
    (value,) = [word.split("=", 1)[1] for word in service["command"] if word.startswith(f"--{name}=")]
    return str(value)


def test_compose_mounts_what_there_is_and_listens_on_this_machine_alone() -> None:
    whole = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    for name, service in whole["services"].items():
        assert service["network_mode"] == "host", name
        assert "build" in service or re.fullmatch(r"[\w-]+/[\w-]+:v?\d+\.\d+\.\d+", service["image"]), f"{name}: a name and a version"
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in whole["volumes"], f"{name}: {source}"
    build = whole["services"]["streamprior"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).exists()
    assert _option(whole["services"]["prometheus"], "web.listen-address").startswith("127.0.0.1:")
    assert whole["services"]["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    name, *options = whole["services"]["streamprior"]["command"]
    commands: Any = typer.main.get_command(cli.app)
    assert commands.commands[name].make_context(name, options).params["frames"] > 1000, "options that the command has"


def test_a_real_prometheus_answers_every_question_and_sees_an_alarm_begin(tmp_path: Path) -> None:
    calm = {"flux": (20.0, 10.0), "chi2": (1.0, 0.5), "chi2_over_floor": (1.0, 0.5)}
    save_prior(small_prior(baselines=calm), tmp_path / "prior.h5")
    frames = diffraction(count=40)
    sent = series(frames)
    with daemon(tmp_path, recovery={"mode": "complete"}) as running, prometheus(tmp_path / "numbers", free_port(), running.http) as asked:
        asked.until("streamprior_build_info")
        with running.sender() as push:
            for message in sent[:21]:
                push.send(message)
            asked.until('streamprior_frames_published_total{sink="archive"} == 20')
            for message in sent[21:]:
                push.send(message)
            asked.until('streamprior_frames_published_total{sink="archive"} == 40')
            asked.until('streamprior:latency_seconds:quantile1m{output="archive"} > 0 and on (instance) streamprior:chi2_over_floor')
            assert_every_question_has_an_answer(asked)
            assert_rules_are_well(asked)
            assert_exemplars_lead_to_frames(asked, running.get("/ledger")["runs"][0]["run"], len(frames))
            for message in series(diffraction(count=10, photons=2e5), 2):
                push.send(message)
            asked.until('ALERTS{alertname="StreampriorDrift", alertstate="firing", signal="flux"}')
            asked.until("max by (instance) (abs(streamprior_drift_score)) > on (instance) streamprior_drift_limit")


def test_what_the_dashboards_ask_of_a_mosaic_is_known_once_there_is_one(recorded: Path, tmp_path: Path) -> None:
    mosaic = {"probe": "probe.npy", "polish": False, "least_iou": 0.0, "finish": 0}
    settings: dict[str, Any] = {"recipe": "ptycho", "mosaic": mosaic, "compute": {"backend": "cpu"}}
    with daemon(recorded, **settings) as running, prometheus(tmp_path / "numbers", free_port(), running.http) as asked:
        with running.sender() as push:
            for message in messages(twin()):
                push.send(message)
        for name in sorted(OF_THE_MOSAIC):
            asked.until(f"{name} > 0")
        asked.until('sum(streamprior_mosaic_frames{place="in"}) > 60')
        assert any(asked.values('streamprior_stage_seconds_count{stage="mosaic"}'))


def assert_every_question_has_an_answer(asked: RunningPrometheus) -> None:
    answers = {expression: asked.values(expression) for expression in expressions()}
    for expression in answers:
        for told in asked.ask("query", query=expression)["result"]:
            assert told["metric"].get("instance"), f"{expression}: a click on it would lead nowhere"
    empty = {expression for expression, values in answers.items() if not values}
    assert empty == {one for one in answers if one.startswith("ALERTS")}, "on a quiet run no alert fires, and all else has data"
    unknown = {expression for expression, values in answers.items() if values and all(map(math.isnan, values))}
    assert {one.split("{")[0] for one in unknown} == OF_THE_MOSAIC | OF_A_LIBRARY


def assert_rules_are_well(asked: RunningPrometheus) -> None:
    rules = [rule for group in asked.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    for rule in rules:
        asked.values(rule["query"])
        assert rule["type"] == "alerting" or asked.values(rule["name"]), f"{rule['name']} records nothing"


def assert_exemplars_lead_to_frames(asked: RunningPrometheus, uid: str, frames: int) -> None:
    """A slow frame in a latency panel has a run and an index that the ledger knows."""
    when = {"start": "0", "end": "4000000000"}
    found = asked.ask("query_exemplars", query='streamprior_latency_seconds_bucket{output="archive"}', **when)
    told = [one["labels"] for one_series in found for one in one_series["exemplars"]]
    assert told
    assert {one["run"] for one in told} == {uid}
    assert all(0 <= int(one["frame"]) < frames for one in told)
