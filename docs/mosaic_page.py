"""What `streamprior bench scans --json` measured -> docs/mosaic.md: its tables, its targets and whether they are met.

The words are in mosaic.md.in; what stands there in braces is made here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import table

Row = Mapping[str, Any]

STREAMED, UNSETTLED = "streamed", "streamed, not settled"

MOST_DISAGREEMENT, MOST_CHI2, MOST_RESOLUTION, MOST_ERROR = 0.26, 0.017, 1.10, 1.1
"""What was asked for: of the star, its halves, its chi2 and its resolution over Pty-Chi's; of the gold balls, the error over offline's."""

NOISE = 0.02
"""Part by which an error may rise above the lowest before it and still count as monotone within noise."""

SPOILT = 1.25
"""Error over that of the scan without the fault from which an image counts as spoilt; no number was asked for."""

WRONG_AXES = ("sign of x", "sign of y", "axes swapped")


def mosaic_page(template: Path, results: Path) -> str:
    """The page: the template with the numbers of one file of results."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    machine = next(line["machine"] for line in lines if "machine" in line)
    parts: dict[str, list[Row]] = {}
    for line in lines:
        parts.setdefault(line.get("part", ""), []).append(line)
    star, balls, faults, rules = parts["star"], parts["gold balls"], parts["faults"], parts["rules"]
    return template.read_text().format_map(
        {
            "file": results.name,
            "cpu": machine["cpu"],
            "version": machine["versions"]["streamprior"],
            "targets": table(("asked for", "measured", ""), [*_of_star(star), *_of_balls(balls), *_of_faults(faults)]),
            "star_live": _star_live(star),
            "star_arms": _star_arms(star),
            "notes": "".join(f"* {row['arm']}: {row['note']}\n" for row in [*star, *balls] if "note" in row),
            "rules_star": _grid(rules, "star", "halves_disagreement"),
            "rules_star_px": _grid(rules, "star", "halves_resolution_px", 2),
            "rules_balls": _grid(rules, "gold balls", "error"),
            "others": _other_rules(rules),
            "curve": _curve(balls),
            "balls_arms": _balls_arms(balls),
            "faults": _faults(faults),
        }
    )


def _of_star(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    """(what was asked for, what was measured, met or missed)."""
    quarter, ours = _live(rows, STREAMED)[0], _after(rows)
    halves = ours["halves_disagreement"]
    yield f"star: odd and even frames agree to {MOST_DISAGREEMENT} of the contrast", f"{halves:.3f}", _met(halves <= MOST_DISAGREEMENT)
    yield f"star: chi2 over all frames <= {MOST_CHI2}", f"{ours['chi2']:.4f}", _met(ours["chi2"] <= MOST_CHI2)
    half_period = f"half period {quarter['live_resolution_px']:.1f} px"
    yield "star: the image after 25 % of the frames shows the spokes", half_period, "see the picture"
    others = [row for row in rows if row["arm"].startswith("Pty-Chi") and "halves_resolution_px" in row]
    asked = "star: resolution within 10 % of the best of Pty-Chi at equal passes"
    if others:
        best = min(row["halves_resolution_px"] for row in others)
        words = f"{ours['halves_resolution_px']:.2f} px against {best:.2f} px"
        yield asked, words, _met(ours["halves_resolution_px"] <= MOST_RESOLUTION * best)
    else:
        yield asked, "Pty-Chi was not at hand", "not measured"


def _of_balls(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    ours = next(row for row in rows if row["arm"] == STREAMED and row["final"])["error"]
    offline = _offline(rows)
    most = max(row["passes"] for row in offline)
    best = min(row["error"] for row in offline if row["passes"] == most)
    words = f"{ours:.3f} against {best:.3f} after {most} passes"
    yield f"gold balls: error <= {MOST_ERROR} x the best offline one at equal passes", words, _met(ours <= MOST_ERROR * best)
    asked = "gold balls: the image never gets worse by going on"
    live = _live(rows, STREAMED)
    rises = {
        f"any of the {live[-1]['regions']} regions, followed from when it was first lit": max(
            row["worst_rise_of_any_region"] for row in live
        )
        - 1,
        "all that is well lit by then": _rise([row["error"] for row in live]),
    }
    for where, rise in rises.items():
        words = f"rises by {rise:.1%} above its lowest" if rise > 0 else "never rises"
        yield f"{asked}: error of {where}", words, _met(rise <= NOISE)


def _of_faults(rows: Sequence[Row]) -> Iterator[tuple[str, str, str]]:
    said = [row["said"] != "nothing" for row in rows if row["fault"] in (*WRONG_AXES, "wrong probe")]
    yield "wrong axes and a wrong probe are said", f"{sum(said)} of {len(said)}", _met(all(said))
    right = next(row for row in rows if row["fault"] == "none")["error"]
    for row in rows:
        if row["fault"] not in ("none", "wrong probe", *WRONG_AXES):
            ratio = row["error"] / right
            yield f"{row['fault']} does not spoil the image", f"{ratio:.2f} x the error without", _met(ratio <= SPOILT)


def _star_live(rows: Sequence[Row]) -> str:
    shown = [
        (
            f"{row['frames']}{' and the passes' if row['final'] else ''}",
            f"{row['passes']:.1f}",
            f"{row['live_disagreement']:.3f}",
            f"{row['live_resolution_px']:.2f}",
            f"{row['chi2']:.4f}",
            f"{row['seconds']:.1f}",
        )
        for row in rows
        if row["arm"] == STREAMED
    ]
    return table(("frames", "passes a frame", "halves differ by", "half period, px", "chi2", "seconds so far"), shown)


def _star_arms(rows: Sequence[Row]) -> str:
    ours = _after(rows)
    spent = next(row for row in rows if row["arm"] == STREAMED and row["final"])["seconds"]
    shown = [
        (
            row["arm"],
            str(row["passes"]),
            f"{row['halves_disagreement']:.3f}",
            f"{row['halves_resolution_px']:.2f}",
            f"{row['chi2']:.4f}",
            f"{row.get('seconds', spent):.1f}",
        )
        for row in (ours, *(row for row in rows if "offline" in row["arm"] and "halves_disagreement" in row))
    ]
    return table(("arm", "passes", "halves differ by", "half period, px", "chi2", "seconds"), shown)


def _grid(rows: Sequence[Row], name: str, key: str, decimals: int = 3) -> str:
    """Weights down, memories across; the default is bold."""
    plain = {(row["weight"], row["memory"]): row[key] for row in rows if row["set"] == name and _is_plain(row)}
    weights, memories = (sorted({pair[axis] for pair in plain}) for axis in (0, 1))
    shown = []
    for weight in weights:
        cells = [f"{plain[weight, memory]:.{decimals}f}" for memory in memories]
        bold = [f"**{cell}**" if (weight, memory) == (0.05, 0.3) else cell for memory, cell in zip(memories, cells, strict=True)]
        shown.append((f"{weight:g}", *bold))
    return table(("weight", *(f"memory {memory:g}" for memory in memories)), shown)


def _is_plain(row: Row) -> bool:
    return row["iterations"] == 1 and row["background_trust"] == 1


def _other_rules(rows: Sequence[Row]) -> str:
    chosen = [row for row in rows if (row["weight"], row["memory"]) == (0.05, 0.3)]
    shown = [
        (
            row["set"],
            str(row["iterations"]),
            f"{row['background_trust']:g}",
            f"{row['halves_disagreement']:.3f}",
            f"{row['halves_resolution_px']:.2f}",
            "-" if row["error"] is None else f"{row['error']:.3f}",
        )
        for row in chosen
    ]
    return table(("set", "iterations a frame", "trust of the background", "halves differ by", "half period, px", "error"), shown)


def _curve(rows: Sequence[Row]) -> str:
    shown = []
    for settled, plain in zip(
        (row for row in rows if row["arm"] == STREAMED), (row for row in rows if row["arm"] == UNSETTLED), strict=True
    ):
        numbers = [f"{row[key]:.3f}" for row in (settled, plain) for key in ("error", "worst_rise_of_any_region")]
        passes = [f"{row['passes']:.1f}" for row in (settled, plain)]
        shown.append(
            (f"{settled['frames']}{' and the passes' if settled['final'] else ''}", passes[0], *numbers[:2], passes[1], *numbers[2:])
        )
    head = ("frames", "passes a frame", "error", "worst region", "passes, not settled", "error", "worst region")
    return table(head, shown)


def _balls_arms(rows: Sequence[Row]) -> str:
    ours = [row for arm in (STREAMED, UNSETTLED) for row in rows if row["arm"] == arm and row["final"]]
    once = _live(rows, UNSETTLED)[-1]
    shown = [("streamed once, not settled", f"{once['passes']:.1f}", f"{once['error']:.3f}", f"{once['seconds']:.1f}")]
    shown += [(f"{row['arm']}, then passes", f"{row['passes']:.1f}", f"{row['error']:.3f}", f"{row['seconds']:.1f}") for row in ours]
    shown += [(row["arm"], f"{row['passes']}", f"{row['error']:.3f}", f"{row['seconds']:.1f}") for row in _offline(rows)]
    return table(("arm", "passes", "error", "seconds"), shown)


def _faults(rows: Sequence[Row]) -> str:
    shown = [
        (row["fault"], "-" if row["error"] is None else f"{row['error']:.3f}", f"{row['chi2']:.5f}", str(row["left_out"]), row["said"])
        for row in rows
    ]
    return table(("fault", "error", "chi2", "frames left out", "what is said"), shown)


def _live(rows: Sequence[Row], arm: str) -> list[Row]:
    """The images of an arm before the passes after the run."""
    return [row for row in rows if row["arm"] == arm and not row["final"]]


def _after(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row["arm"] == "streamed, then passes after the run")


def _offline(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "offline" in row["arm"] and "error" in row]


def _rise(errors: Sequence[float]) -> float:
    """The largest part by which an error lies above the lowest before it."""
    return max(later / min(errors[:i]) - 1 for i, later in enumerate(errors) if i)


def _met(met: bool) -> str:
    return "met" if met else "**missed**"
