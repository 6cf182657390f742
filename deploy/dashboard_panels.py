"""Panels -> what Grafana reads: places on a grid of 24 columns, queries, units, colours and links to the daemon."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

SCHEMA = 41
"""Of Grafana 11.6; later ones read it too."""

SOURCE = {"type": "prometheus", "uid": "${datasource}"}

# Blue, orange and dark red stay apart for those who do not tell red from green.
GOOD, WARNING, BAD, PLAIN = "blue", "orange", "dark-red", "text"

Steps = tuple[tuple[float | None, str], ...]
"""From which value a colour holds; None: from the beginning."""

OK_AT_0: Steps = ((None, GOOD), (1, BAD))
OK_AT_1: Steps = ((None, BAD), (1, GOOD))
ONLY_0: Steps = ((None, BAD), (0, GOOD), (1, BAD))
LEVELS: Steps = ((None, GOOD), (1, WARNING), (2, BAD))
NONE: Steps = ((None, PLAIN),)


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture.

    asks : (PromQL, legend) each; `{i}` in PromQL becomes the chosen instances. low, high : of the axis, which ends there where it is `firm`
    and grows with the data where not. steps : colours by value. words : what a value is called where numbers say little. bands : regular
    expression for the legends of lines that are limits, drawn dashed.
    """

    title: str
    description: str
    unit: str
    asks: Sequence[tuple[str, str]]
    kind: str = "timeseries"
    low: float | None = 0
    high: float | None = None
    steps: Steps = NONE
    words: Sequence[tuple[float, str]] = ()
    width: int = 8
    height: int = 8
    decimals: int | None = None
    firm: bool = True
    bands: str | None = None


@dataclass(frozen=True, slots=True)
class Dashboard:
    """A page of rows. rows : (title, panels) each, from left to right and then down, 24 columns wide."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]


def stat(
    title: str, description: str, unit: str, ask: str, steps: Steps = NONE, words: Sequence[tuple[float, str]] = (), **more: Any
) -> Panel:
    """A number that is read from across the room."""
    return Panel(title, description, unit, [(ask, "{{instance}}")], "stat", steps=steps, words=words, **{"width": 4, "height": 4, **more})


def states(
    title: str, description: str, asks: Sequence[tuple[str, str]], steps: Steps, words: Sequence[tuple[float, str]], **more: Any
) -> Panel:
    """Coloured bars over time: when it began, and when it ended."""
    return Panel(title, description, "none", asks, "state-timeline", steps=steps, words=words, **more)


YES_NO = ((0, "no"), (1, "yes"))
UP = ((0, "down"), (1, "up"))


def dashboard(one: Dashboard) -> dict[str, Any]:
    """What Grafana reads."""
    return {
        "uid": one.uid,
        "title": one.title,
        "description": one.description,
        "tags": ["streamprior"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "timezone": "browser",
        "graphTooltip": 1,
        "refresh": "5s",
        "time": {"from": "now-15m", "to": "now"},
        "templating": {"list": _variables()},
        "annotations": {"list": [_alarms()]},
        "links": _links(),
        "panels": [*_laid_out(one.rows)],
    }


def _variables() -> list[dict[str, Any]]:
    return [
        {"name": "datasource", "type": "datasource", "label": "Prometheus", "query": "prometheus", "refresh": 1},
        _choice("instance", "Daemon", "label_values(streamprior_build_info, instance)"),
        _choice("source", "Source", 'label_values(streamprior_frames_received_total{instance=~"$instance"}, source)'),
    ]


def _choice(name: str, label: str, ask: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": ask,
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".+",
        "sort": 1,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def _alarms() -> dict[str, Any]:
    """A line over every panel where an alert began."""
    return {
        "name": "Alerts",
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": BAD,
        "expr": 'ALERTS{alertname=~"Streamprior.+", alertstate="firing", instance=~"$instance"}',
    }


def _links() -> list[dict[str, Any]]:
    """To the other dashboard, with the same daemon and time. The daemons' own pages are linked from each value: here there may be many."""
    return [
        {
            "title": "streamprior",
            "type": "dashboards",
            "icon": "external link",
            "tooltip": "The other dashboard",
            "url": "",
            "tags": ["streamprior"],
            "asDropdown": False,
            "targetBlank": False,
            "includeVars": True,
            "keepTime": True,
        }
    ]


def _laid_out(rows: Sequence[tuple[str, Sequence[Panel]]]) -> Iterator[dict[str, Any]]:
    """Rows and panels with their places; a line is as high as its highest panel."""
    number, y = 1, 0
    for title, panels in rows:
        yield {"type": "row", "id": number, "title": title, "collapsed": False, "panels": [], "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}}
        number, y, x, tallest = number + 1, y + 1, 0, 0
        for panel in panels:
            if x + panel.width > 24:
                x, y, tallest = 0, y + tallest, 0
            yield _panel(panel, number, {"h": panel.height, "w": panel.width, "x": x, "y": y})
            number, x, tallest = number + 1, x + panel.width, max(tallest, panel.height)
        y += tallest


def _panel(panel: Panel, number: int, place: dict[str, int]) -> dict[str, Any]:
    # A coloured field says good or bad; a number that is neither has none.
    plain = {"colorMode": "value"} if panel.kind == "stat" and panel.steps is NONE else {}
    return {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": SOURCE,
        "gridPos": place,
        "targets": [_target(panel, letter, *ask) for letter, ask in zip("ABCDEF", panel.asks, strict=False)],
        "fieldConfig": {"defaults": _field(panel), "overrides": _dashed(panel.bands)},
        "options": _OPTIONS[panel.kind] | plain,
    }


def _target(panel: Panel, letter: str, ask: str, legend: str) -> dict[str, Any]:
    now = panel.kind in ("stat", "table")
    return {
        "refId": letter,
        "datasource": SOURCE,
        "expr": ask.replace("{i}", '{instance=~"$instance"}'),
        "legendFormat": legend,
        "range": not now,
        "instant": now,
        "exemplar": "_bucket" in ask,
        **({"format": "table"} if panel.kind == "table" else {}),
    }


def _field(panel: Panel) -> dict[str, Any]:
    field: dict[str, Any] = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if panel.kind == "timeseries" else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in panel.steps]},
        "mappings": [{"type": "value", "options": {f"{value:g}": {"text": text} for value, text in panel.words}}] if panel.words else [],
        "links": [
            {"title": "Live page of ${__field.labels.instance}", "url": "http://${__field.labels.instance}/", "targetBlank": True},
            {"title": "Ledger of ${__field.labels.instance}", "url": "http://${__field.labels.instance}/ledger", "targetBlank": True},
        ],
        "custom": _custom(panel),
    }
    bounds = {"min": panel.low, "max": panel.high} if panel.firm else {}
    told = {"decimals": panel.decimals, **bounds}
    return field | {name: value for name, value in told.items() if value is not None}


def _custom(panel: Panel) -> dict[str, Any]:
    """What belongs to one kind of picture."""
    if panel.kind == "state-timeline":
        return {"lineWidth": 0, "fillOpacity": 80}
    if panel.kind != "timeseries":
        return {}
    soft = {"axisSoftMin": panel.low, "axisSoftMax": panel.high} if not panel.firm else {}
    lines = {"thresholdsStyle": {"mode": "dashed"}} if len(panel.steps) > 1 else {}
    # Gaps stay gaps: a line across a pause would be made up.
    return {"lineWidth": 1, "fillOpacity": 0, "showPoints": "auto", "spanNulls": False, **lines, **soft}


def _dashed(bands: str | None) -> list[dict[str, Any]]:
    if bands is None:
        return []
    properties = [
        {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 8]}},
        {"id": "color", "value": {"mode": "fixed", "fixedColor": BAD}},
    ]
    return [{"matcher": {"id": "byRegexp", "options": bands}, "properties": properties}]


_LEGEND = {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []}
_OPTIONS: dict[str, dict[str, Any]] = {
    "timeseries": {"legend": _LEGEND, "tooltip": {"mode": "multi", "sort": "desc"}},
    "state-timeline": {
        "legend": _LEGEND,
        "tooltip": {"mode": "single", "sort": "none"},
        "showValue": "never",
        "mergeValues": True,
        "rowHeight": 0.8,
        "alignValue": "left",
    },
    "stat": {
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "textMode": "auto",
        "colorMode": "background",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
    },
    "table": {"showHeader": True, "frameIndex": 0},
}
