"""deploy/prometheus-rules.yaml: every alert asks for metrics that the daemon has, and says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from streamprior.metrics import Meters

RULES = Path(__file__).parents[1] / "deploy" / "prometheus-rules.yaml"


def test_the_alerts_ask_for_metrics_that_there_are() -> None:
    meters = Meters("eiger", ["classify"], ["archive"], ("core",), ["flux"])
    meters.watch(lambda: 0, lambda: 0, {})
    meters.watch_ledger(lambda: 0, lambda: True)
    meters.watch_space(lambda: 0.0, lambda: 0.0)
    meters.watch_path(lambda: False)
    meters.watch_crew(lambda: 0, lambda: False, lambda: 0)
    samples = [sample for family in meters.registry.collect() for sample in family.samples]
    there = {sample.name for sample in samples}
    labels = {pair for sample in samples for pair in sample.labels.items()}
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) > 8
    for rule in rules:
        asked = set(re.findall(r"streamprior_\w+", rule["expr"]))
        assert asked
        assert asked <= there, rule["alert"]
        assert set(re.findall(r'(\w+)="(\w+)"', rule["expr"])) <= labels, rule["alert"]
        assert rule["annotations"]["summary"]
