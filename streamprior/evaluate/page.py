"""What a report holds -> one HTML page that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { margin-top: 2.4rem; border-bottom: 2px solid #0072b2; } h3 { margin-top: 1.6rem; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; font-size: .87rem; }
th, td { padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } th.group { text-align: center; border-bottom: 1px solid #999; }
thead th { border-bottom: 2px solid #555; vertical-align: bottom; } tr.mark td { background: #fff3e8; font-weight: 600; }
figure { margin: 1rem 0; break-inside: avoid; } figure img { max-width: 100%; height: auto; }
figcaption, .small { color: #444; font-size: .88rem; max-width: 62rem; }
.failures { border-left: 5px solid #d55e00; background: #fff6ef; padding: .4rem 1.2rem; }
.alarm { border: 3px solid #b00020; color: #b00020; padding: .5rem 1rem; font-weight: 600; }
.wide { overflow-x: auto; }
@media print { body { max-width: none; margin: 0; font-size: 11px; } h2 { break-after: avoid; } .wide { overflow: visible; } }
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG with the sentences that say what one sees."""

    name: str
    png: bytes
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of a table; every row holds the same keys, the first names the row. A key "group|column" stands under a heading of its group.

    `mark` is the row that stands out.
    """

    rows: Sequence[Mapping[str, Any]]
    caption: str = ""
    mark: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and what stands under it, in order: a str is a paragraph, a tuple of str a list."""

    title: str
    parts: Sequence[str | tuple[str, ...] | Picture | Table] = field(default_factory=tuple)
    kind: str = ""  # "failures" stands out


def page(title: str, subtitle: str, alarm: str, sections: Sequence[Section]) -> str:
    """The whole page as HTML; `alarm` is shown in red above everything where it is not empty."""
    body = "".join(_section(one) for one in sections)
    warned = f'<p class="alarm">{html.escape(alarm)}</p>' if alarm else ""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1><p class="small">{html.escape(subtitle)}</p>{warned}{body}</body></html>\n'
    )


def _section(section: Section) -> str:
    parts = "".join(_part(one) for one in section.parts)
    return f'<section class="{section.kind}"><h2>{html.escape(section.title)}</h2>{parts}</section>\n'


def _part(part: str | tuple[str, ...] | Picture | Table) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(part)}</p>"
    if isinstance(part, tuple):
        return "<ul>" + "".join(f"<li>{html.escape(one)}</li>" for one in part) + "</ul>"
    if isinstance(part, Picture):
        data = base64.b64encode(part.png).decode()
        words = html.escape(part.caption)
        return f'<figure><img alt="{html.escape(part.name)}" src="data:image/png;base64,{data}"><figcaption>{words}</figcaption></figure>'
    return _table(part)


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    columns = list(table.rows[0])
    rows = []
    for row in table.rows:
        mark = ' class="mark"' if table.mark and row[columns[0]] == table.mark else ""
        rows.append(f"<tr{mark}>" + "".join(f"<td>{html.escape(shown(row.get(one)))}</td>" for one in columns) + "</tr>")
    caption = f'<p class="small">{html.escape(table.caption)}</p>' if table.caption else ""
    return f'<div class="wide"><table><thead>{_head(columns)}</thead><tbody>{"".join(rows)}</tbody></table></div>{caption}'


def _head(columns: Sequence[str]) -> str:
    """One row of column names, and one of groups above it where there are any."""
    names = "".join(f"<th>{html.escape(one.rpartition('|')[2])}</th>" for one in columns)
    groups = [(name, len(list(members))) for name, members in groupby(one.rpartition("|")[0] for one in columns)]
    above = "".join(f'<th class="group" colspan="{width}">{html.escape(name)}</th>' for name, width in groups)
    return (f"<tr>{above}</tr>" if any(name for name, _ in groups) else "") + f"<tr>{names}</tr>"


def shown(value: Any) -> str:
    """A cell: three significant digits, a dash for what is undefined."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.3g}" if abs(value) < 1e5 else f"{value:.2e}"
    return str(value)
