"""What `streamprior bench prior --json` measured -> docs/prior.md: its tables, its targets and whether they are met.

The words are in prior.md.in; what stands there in braces is made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from markdown_table import table

Row = Mapping[str, Any]
Arms = Mapping[str, Row]
Cells = Mapping[tuple[float, float, float], Arms]
"""(photons, radius of the beam stop in pixels, share of dead pixels) -> arm -> its row."""

OURS, FULL, FLAT, PLAN, RANDOM, ORACLE = "streamprior", "full solve", "flat", "flat + plan", "random", "oracle"

MOST_OF_FULL = {1e6: 1.05, 1e5: 1.10}
"""Photons -> largest ratio to the full solve's object error that was asked for; at 2e4 none was."""

MOST_OF_FLAT = 0.4
"""Largest ratio to the better of the two flat starts, behind a beam stop."""

MOST_OF_PLAN = 1.02
"""Largest ratio to a flat start with a schedule of equal cost, anywhere."""

INTERLEAVED, BLOCKED = ("0::2 -> 1::2", "1::2 -> 0::2"), (":100 -> 100:", "100: -> :100")
NEAR_FULL, LEAST_ACCURACY = 0.7, 0.85

SPLIT_COLUMNS = {
    "chi2_at_10": ("chi2 at 10", 4),
    "chi2_at_50": ("at 50", 4),
    "chi2": ("at the end", 4),
    "chi2_over_floor": ("/ floor", 2),
    "free_llk": ("free llk", 2),
    "near_full_at_50": ("near full at 50", 2),
    "near_full": ("near full", 2),
    "area_px": ("support, px", 0),
    "unlike_full": ("unlike full", 2),
    "abstained": ("abstained", 2),
}
"""Key -> head and decimals."""


def prior_page(template: Path, results: Path) -> str:
    """The page: the template with the numbers of one file of results."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    machine = next(line["machine"] for line in lines if "machine" in line)
    rows: dict[str, list[Row]] = {}
    for line in lines:
        rows.setdefault(line.get("benchmark", ""), []).append(line)
    cells = _cells(rows["crystals"])
    splits = _splits(rows["measured"])
    volumes = [row for row in rows["measured"] if "volumes" in row]
    morphology = rows["morphology"]
    parts = {
        "file": results.name,
        "cpu": machine["cpu"],
        "version": machine["versions"]["streamprior"],
        "targets": table(("asked for", "measured", ""), _targets(cells, splits, volumes, morphology)),
        "overview": _overview(cells),
        "morphologies": "\n".join(_morphologies(cells)),
        "worse": _worse(cells),
        "splits": "\n".join(f"### {title}, {_frames(arms)} frames\n\n{_split(arms)}" for title, arms in splits.items()),
        **_measured(splits),
        "volumes": _volumes(volumes),
        "accuracies": table(("photons", "stop, px", "balanced accuracy"), [_accuracy(row) for row in morphology]),
        "behind_stop": " and ".join(f"{row['balanced_accuracy']:.2f}" for row in morphology if row["stop_px"]),
        "confusions": "\n".join(_confusion(row) for row in morphology),
        "reuse": _reuse(row for row in rows["reuse"] if "flux" in row),
        "shifted": _shifted(row for row in rows["reuse"] if "shift_px" in row),
        "cells": "\n".join(_every_cell(cells)),
    }
    return template.read_text().format_map(parts)


def _frames(arms: Arms) -> int:
    return int(next(iter(arms.values()))["frames"])


def _cells(rows: Iterable[Row]) -> dict[tuple[float, float, float], dict[str, Row]]:
    cells: dict[tuple[float, float, float], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault((row["photons"], row["stop_px"], row["dead_share"]), {})[row["arm"]] = row
    return cells


def _splits(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    splits: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "split" in row:
            splits.setdefault(row["split"], {})[row["arm"]] = row
    return splits


def _targets(cells: Cells, splits: Mapping[str, Arms], volumes: Sequence[Row], morphology: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """(what was asked for, what was measured, met or missed)."""
    for photons, most in MOST_OF_FULL.items():
        ratios = [_ratio(arms, "error", FULL) for (light, _, _), arms in cells.items() if light == photons]
        yield _bound(f"object error <= {most:.2f} x the full solve's at {_short(photons)} photons", ratios, most)
    stopped = [arms for (_, stop, _), arms in cells.items() if stop]
    yield _bound(f"object error <= {MOST_OF_FLAT} x any flat start's behind a stop", [_over_flat(arms) for arms in stopped], MOST_OF_FLAT)
    yield _bound("75th percentile below the full solve's behind a stop", [_ratio(arms, "error_p75", FULL) for arms in stopped], 1.0)
    every = [_ratio(arms, "error", PLAN) for arms in cells.values()]
    yield _bound(f"object error <= {MOST_OF_PLAN} x flat + plan's everywhere", every, MOST_OF_PLAN)
    for split in INTERLEAVED:
        ours, other = splits[split][OURS]["chi2_at_10"], splits[split][RANDOM]["chi2_at_50"]
        yield f"measured `{split}`: chi2 at 10 iterations below random's at 50", f"{ours:.4f} against {other:.4f}", _met(ours < other)
        near = splits[split][OURS]["near_full_at_50"]
        yield f"measured `{split}`: {NEAR_FULL} of the frames within 1.1 x the full solve at 50", f"{near:.2f}", _met(near >= NEAR_FULL)
    for split in BLOCKED:
        yield _bound(f"measured `{split}`: chi2 <= {MOST_OF_PLAN} x flat's", [_ratio(splits[split], "chi2", FLAT)], MOST_OF_PLAN)
    yield _bound("volumes: chi2 of 20 iterations <= 1.02 x that of 640", [row["prior_over_640"] for row in volumes], 1.02)
    accuracy = morphology[0]["balanced_accuracy"]
    yield f"morphology: balanced accuracy >= {LEAST_ACCURACY}", f"{accuracy:.2f}", _met(accuracy >= LEAST_ACCURACY)


def _bound(words: str, ratios: Sequence[float], most: float) -> tuple[str, str, str]:
    """A bound on several ratios: their range, and where it is broken."""
    broken = sum(ratio > most for ratio in ratios)
    span = f"{min(ratios):.2f}" if len(ratios) == 1 else f"{min(ratios):.2f} to {max(ratios):.2f}"
    return words, span, f"**missed** in {broken} of {len(ratios)}" if broken else "met"


def _overview(cells: Cells) -> str:
    rows = []
    for (photons, stop, dead), arms in cells.items():
        spread = f"{arms[OURS]['error_p75']:.2f} / {arms[FULL]['error_p75']:.2f}"
        rows.append(
            (
                _short(photons),
                f"{stop:g}",
                f"{dead:.0%}",
                *(f"{arms[name]['error']:.3f}" for name in (OURS, FULL, PLAN, FLAT)),
                _judged(_ratio(arms, "error", FULL), MOST_OF_FULL.get(photons)),
                _judged(_over_flat(arms), MOST_OF_FLAT if stop else None),
                f"**{spread}**" if stop and _ratio(arms, "error_p75", FULL) > 1 else spread,
                _judged(_ratio(arms, "error", PLAN), MOST_OF_PLAN),
            )
        )
    full, flat, plan = "1.05 at 1e6, 1.10 at 1e5", f"{MOST_OF_FLAT} behind a stop", f"{MOST_OF_PLAN}"
    rows.append(("", "", "*bound*", "", "", "", "", full, flat, "below 1 behind a stop", plan))
    head = ("photons", "stop, px", "dead", OURS, FULL, PLAN, FLAT, "/ full", "/ any flat", "75th percentile, ours / full", "/ flat + plan")
    return table(head, rows)


def _bright(cells: Cells) -> Iterator[tuple[str, Arms]]:
    """The cells of 1e6 photons without dead pixels, by their beam stop."""
    for (photons, stop, dead), arms in cells.items():
        if photons == 1e6 and not dead:
            yield f"beam stop of {stop:g} px" if stop else "no beam stop", arms


def _names(arms: Arms) -> list[str]:
    """The morphologies: keys of several words; a row's others are one."""
    return [name for name in arms[OURS] if " " in name]


def _morphologies(cells: Cells) -> Iterator[str]:
    shown = (OURS, FULL, PLAN, "nearest solved frame", ORACLE)
    for stop, arms in _bright(cells):
        rows = [
            (name, *(f"{arms[arm][name]:.3f}" for arm in shown), _judged(arms[OURS][name] / arms[PLAN][name], MOST_OF_PLAN))
            for name in _names(arms)
        ]
        yield f"{stop.capitalize()}:\n"
        yield table(("morphology", *shown, "/ flat + plan"), rows)


def _worse(cells: Cells) -> str:
    """In words: where the daemon's arm is behind flat + plan, and where behind the full solve."""
    behind = [
        f"{name} ({stop}: {arms[OURS][name]:.3f} against {arms[PLAN][name]:.3f})"
        for stop, arms in _bright(cells)
        for name in _names(arms)
        if arms[OURS][name] > MOST_OF_PLAN * arms[PLAN][name]
    ]
    _, whole = next(_bright(cells))
    better = [name for name in _names(whole) if whole[FULL][name] < whole[OURS][name]]
    return (
        f"Worse than flat + plan by more than 2 %: {', '.join(behind) or 'no kind'}.\n"
        f"The full solve is ahead, without a stop, on: {', '.join(better) or 'no kind'}."
    )


def _split(arms: Arms) -> str:
    rows = [(name, *(f"{row[key]:.{decimals}f}" for key, (_, decimals) in SPLIT_COLUMNS.items())) for name, row in arms.items()]
    return table(("arm", *(head for head, _ in SPLIT_COLUMNS.values())), rows)


def _measured(splits: Mapping[str, Arms]) -> dict[str, str]:
    """The numbers that the words about the measured curve hold."""
    interleaved, blocked = [splits[one] for one in INTERLEAVED], [splits[one] for one in BLOCKED]
    unlike = [row["unlike_full"] for arms in interleaved for name, row in arms.items() if name not in (FULL, ORACLE)]
    return {
        "near_random": _span([arms[RANDOM]["near_full"] for arms in interleaved]),
        "unlike": _span(unlike),
        "unlike_oracle": _span([arms[ORACLE]["unlike_full"] for arms in interleaved]),
        "llk": " and ".join(" / ".join(f"{arms[name]['free_llk']:.1f}" for name in (OURS, PLAN, FULL)) for arms in interleaved),
        "areas": " and ".join(f"{arms[OURS]['area_px']:.0f} against {arms[RANDOM]['area_px']:.0f}" for arms in interleaved),
        "abstained": " and ".join(f"{arms[OURS]['abstained']:.2f}" for arms in blocked),
    }


def _volumes(rows: Sequence[Row]) -> str:
    shown = [
        (
            row["volumes"],
            str(row["area_voxels"]),
            *(f"{row[key]:.4f}" for key in ("prior_20_er", "flat_20_er", "random_640_er_hio")),
            _judged(row["prior_over_640"], 1.02),
        )
        for row in rows
    ]
    return table(("volumes", "support, voxels", "20 ER from the prior", "20 ER from flat", "640 HIO/ER from random", "prior / 640"), shown)


def _accuracy(row: Row) -> tuple[str, str, str]:
    return _short(row["photons"]), f"{row['stop_px']:g}", f"{row['balanced_accuracy']:.2f}"


def _confusion(row: Row) -> str:
    stop = f"a beam stop of {row['stop_px']:g} px" if row["stop_px"] else "no beam stop"
    rows = [(name, *(str(one) if one else "" for one in line)) for name, line in zip(row["names"], row["confusion"], strict=True)]
    return f"{_short(row['photons'])} photons, {stop}; a row is a true morphology:\n\n{table(('', *row['names']), rows)}"


def _reuse(rows: Iterable[Row]) -> str:
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["set"], str(row["train_at"]), f"{row['flux']:g}", row["class"]), []).append(row)
    columns = ("reused", "null", "ceiling", "full_dose")
    shown = [(*key, *(_mean(row[name] for row in group) for name in columns)) for key, group in groups.items()]
    return table(("set", "learned on frame", "flux", "class", "reused", "null", "ceiling", "full dose"), shown)


def _shifted(rows: Iterable[Row]) -> str:
    return table(
        ("set", "class", "followed", "static"),
        [(row["set"], row["class"], f"{row['followed']:.2f}", f"{row['static']:.2f}") for row in rows],
    )


def _every_cell(cells: Cells) -> Iterator[str]:
    for (photons, stop, dead), arms in cells.items():
        rows = [
            (
                name,
                f"{row['error']:.3f}",
                f"{row['error_p75']:.3f}",
                f"{row['chi2_over_floor']:.2f}",
                f"{row['ffts']}",
                f"{row['abstained']:.0%}",
            )
            for name, row in arms.items()
        ]
        yield f"### {_short(photons)} photons, {f'stop of {stop:g} px' if stop else 'no stop'}, {dead:.0%} dead\n"
        yield table(("arm", "object error", "75th percentile", "chi2 / floor", "FFTs", "abstained"), rows)


def _ratio(arms: Arms, key: str, other: str) -> float:
    return float(arms[OURS][key] / arms[other][key])


def _over_flat(arms: Arms) -> float:
    return float(arms[OURS]["error"] / min(arms[FLAT]["error"], arms[PLAN]["error"]))


def _judged(ratio: float, most: float | None) -> str:
    return f"**{ratio:.2f}**" if most is not None and ratio > most else f"{ratio:.2f}"


def _met(met: bool) -> str:
    return "met" if met else "**missed**"


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


def _short(photons: float) -> str:
    return f"{photons:.0e}".replace("+0", "")


def _mean(values: Iterable[float | None]) -> str:
    known = [one for one in values if one is not None]
    return f"{fmean(known):.2f}" if known else "-"
