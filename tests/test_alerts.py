"""deploy/prometheus-rules.yaml: every alert asks for metrics that there are, says what to do, fires when it should and at no other time."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from streamprior.metrics import Meters

RULES = Path(__file__).parents[1] / "deploy" / "prometheus-rules.yaml"
GROUPS = yaml.safe_load(RULES.read_text())["groups"]
EVERY = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = [rule for rule in EVERY if "alert" in rule]
PROMTOOL = shutil.which("promtool")

QUIET_FOR = "x720"
"""Steps of 5 s: an hour."""

QUIET = {
    'up{job="streamprior"}': "1",
    "streamprior_ledger_residue": "0",
    "streamprior_ledger_on_disk": "1",
    "streamprior_spool_up": "1",
    'streamprior_frames_received_total{source="detector"}': "0+500",
    'streamprior_frames_quarantined_total{reason="not_cbor"}': "0",
    "streamprior_frames_missing_total": "0",
    "streamprior_connections_refused_total": "0",
    "streamprior_archive_space_level": "0",
    "streamprior_archive_free_bytes": "1000000000000-10000000",
    'streamprior_sink_up{sink="archive"}': "1",
    'streamprior_sink_up{sink="live"}': "1",
    'streamprior_frames_dropped_total{stage="archive",reason="disk_full"}': "0",
    'streamprior_frames_dropped_total{stage="receive",reason="queue_full"}': "0",
    'streamprior_frames_dropped_total{stage="refine",reason="out_of_memory"}': "0",
    "streamprior_path_stalled": "0",
    "streamprior_degradation_level": "0",
    'streamprior_latency_seconds_bucket{output="mask",le="0.5"}': "0+495",
    'streamprior_latency_seconds_bucket{output="mask",le="1"}': "0+500",
    'streamprior_latency_seconds_bucket{output="mask",le="10"}': "0+500",
    'streamprior_latency_seconds_bucket{output="mask",le="+Inf"}': "0+500",
    "streamprior_card_lost": "0",
    "streamprior_workers_away_from_card": "0",
    "streamprior_out_of_memory_total": "0",
    'streamprior_drift_alarm{signal="flux"}': "0",
    "streamprior_chi2": "0.2",
    "streamprior_chi2_floor": "0.1",
}
"""What a scrape tells while all is well: 100 frames a second, one in a hundred of them slow, and a disk that fills slowly."""


def turned(before: str, after: str) -> str:
    """Ten minutes of one value, then of another."""
    return f"{before}x119 {after}x600"


FAULTS: Mapping[str, Mapping[str, str]] = {
    "StreampriorDown": {'up{job="streamprior"}': turned("1", "0")},
    "StreampriorLedgerResidue": {"streamprior_ledger_residue": turned("0", "-2")},
    "StreampriorLedgerNotOnDisk": {"streamprior_ledger_on_disk": turned("1", "0")},
    "StreampriorSpoolNotOnDisk": {"streamprior_spool_up": turned("1", "0")},
    "StreampriorFramesQuarantined": {'streamprior_frames_quarantined_total{reason="not_cbor"}': turned("0", "1")},
    "StreampriorFramesMissing": {"streamprior_frames_missing_total": turned("7", "9")},
    "StreampriorConnectionsRefused": {"streamprior_connections_refused_total": turned("0", "3")},
    "StreampriorDiskNearlyFull": {"streamprior_archive_space_level": turned("0", "1")},
    "StreampriorDiskFull": {"streamprior_archive_space_level": turned("0", "2")},
    "StreampriorDiskFillsWithinTheHour": {"streamprior_archive_free_bytes": "100000000000x119 99000000000-200000000x600"},
    "StreampriorArchiveAway": {'streamprior_sink_up{sink="archive"}': turned("1", "0")},
    "StreampriorLiveSinkAway": {'streamprior_sink_up{sink="live"}': turned("1", "0")},
    "StreampriorFramesLeftOutOfTheArchive": {
        'streamprior_frames_dropped_total{stage="archive",reason="disk_full"}': turned("0", "12"),
    },
    "StreampriorPathStalled": {"streamprior_path_stalled": turned("0", "1")},
    "StreampriorRefinementLeftOut": {"streamprior_degradation_level": turned("0", "1")},
    "StreampriorFramesLeftOut": {"streamprior_degradation_level": turned("0", "3")},
    "StreampriorFramesDroppedAtIngest": {'streamprior_frames_dropped_total{stage="receive",reason="queue_full"}': turned("0", "1")},
    "StreampriorLate": {
        'streamprior_latency_seconds_bucket{output="mask",le="0.5"}': "0+495x119 58905+0x600",
        'streamprior_latency_seconds_bucket{output="mask",le="1"}': "0+500x119 59500+480x600",
    },
    "StreampriorCardLost": {"streamprior_card_lost": turned("0", "1"), "streamprior_workers_away_from_card": turned("0", "2")},
    "StreampriorCardFull": {"streamprior_workers_away_from_card": turned("0", "2")},
    "StreampriorOutOfMemory": {"streamprior_out_of_memory_total": turned("0", "1")},
    "StreampriorFramesLeftOutForWantOfMemory": {
        'streamprior_frames_dropped_total{stage="refine",reason="out_of_memory"}': turned("0", "1"),
    },
    "StreampriorDrift": {'streamprior_drift_alarm{signal="flux"}': turned("0", "1")},
}
"""Alert -> the numbers that go wrong after ten minutes, and no others."""


def asked_of_promtool(folder: Path, changes: Mapping[str, str], expected: Mapping[str, list[str]]) -> None:
    """Let promtool compare: time -> the alerts that fire then, and no others."""
    assert PROMTOOL is not None
    assert changes.keys() <= QUIET.keys()
    series = [
        {"series": _of_instance(name), "values": values if "x" in values else _constant(values)}
        for name, values in (QUIET | changes).items()
    ]
    asked = [
        {
            "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
            "eval_time": at,
            "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts],
        }
        for at, alerts in expected.items()
    ]
    test = {"interval": "5s", "input_series": series, "promql_expr_test": asked}
    whole = {"rule_files": [str(RULES)], "evaluation_interval": "5s", "tests": [test]}
    (folder / "case.yaml").write_text(yaml.safe_dump(whole))
    done = subprocess.run([PROMTOOL, "test", "rules", "case.yaml"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def _of_instance(name: str) -> str:
    bare, _, labels = name.rstrip("}").partition("{")
    return f'{bare}{{{labels + "," if labels else ""}instance="127.0.0.1:9870"}}'


def _constant(values: str) -> str:
    return values + ("" if re.search(r"\d[+-]\d", values) else "+0") + QUIET_FOR


needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: apt-get install prometheus")


def test_the_rules_ask_for_metrics_that_there_are() -> None:
    meters = Meters("eiger", ["classify"], ["archive"], ("core",), ["flux"])
    meters.watch(lambda: 0, lambda: 0, {})
    meters.watch_ledger(lambda: 0, lambda: True)
    meters.watch_space(lambda: 0.0, lambda: 0.0)
    meters.watch_path(lambda: False)
    meters.watch_spool(lambda: 0, lambda: True)
    meters.watch_crew(lambda: 0, lambda: False, lambda: 0)
    samples = [sample for family in meters.registry.collect() for sample in family.samples]
    recorded = {rule["record"] for rule in EVERY if "record" in rule}
    there = {sample.name for sample in samples} | recorded | {"up"}
    own = {pair for rule in EVERY for pair in rule.get("labels", {}).items()} | {("job", "streamprior")}
    labels = {pair for sample in samples for pair in sample.labels.items()} | own
    for rule in EVERY:
        asked = set(re.findall(r"\bstreamprior[_:][\w:]+|\bup\b", rule["expr"]))
        assert asked
        assert asked <= there, rule
        assert set(re.findall(r'(\w+)="(\w+)"', rule["expr"])) <= labels, rule


def test_every_alert_says_what_is_wrong_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS) > 20
    for rule in ALERTS:
        told = rule["annotations"]
        assert all(told[about] for about in ("summary", "description", "runbook")), rule["alert"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        if rule["alert"] == "StreampriorDrift":
            continue  # a sample that changes is no fault, and has no row there
        found = re.search(r"docs/(\w+\.md), ([\w ]+)\.$", told["runbook"])
        assert found, f"{rule['alert']} names no section"
        assert f"\n## {found[2]}\n" in (RULES.parents[1] / "docs" / found[1]).read_text(), rule["alert"]


def test_every_alert_has_a_case_and_nothing_else_has() -> None:
    assert FAULTS.keys() == {rule["alert"] for rule in ALERTS}


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, "check", "rules", "--lint=all", "--lint-fatal", str(RULES)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_no_alert_fires_in_an_hour_without_faults(tmp_path: Path) -> None:
    asked_of_promtool(tmp_path, {}, {f"{minute}m": [] for minute in range(0, 60)})


@needs_promtool
@pytest.mark.parametrize("alert", FAULTS)
def test_an_alert_fires_for_its_fault_alone_and_not_before_it(alert: str, tmp_path: Path) -> None:
    """Thirteen minutes: no alert waits longer than two but that of the disk, which looks back for fifteen."""
    at = "25m" if alert == "StreampriorDiskFillsWithinTheHour" else "13m"
    asked_of_promtool(tmp_path, FAULTS[alert], {"9m50s": [], at: [alert]})


def test_a_rule_that_nobody_reads_is_no_rule() -> None:
    looked_at = "".join(file.read_text() for file in (RULES.parent / "grafana").glob("*.json")) + "".join(rule["expr"] for rule in ALERTS)
    for rule in EVERY:
        assert "alert" in rule or rule["record"] in looked_at
