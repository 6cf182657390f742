"""Comparisons -> report.json with every number, report.html that a person reads, and the pictures as files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from streamprior import __version__
from streamprior.evaluate.arm_pictures import convergence_picture, distance_picture, error_picture, prtf_picture
from streamprior.evaluate.drawing import drawn
from streamprior.evaluate.frame_pictures import frame_picture
from streamprior.evaluate.judge import COLUMNS, QUALITY, Judged, failures, judge, representatives
from streamprior.evaluate.page import Picture, Section, Table, page
from streamprior.evaluate.prior_sections import prior_sections
from streamprior.evaluate.records import LEAK, Arm, Comparison, Tick
from streamprior.prior import Prior

FORMAT = "streamprior-report"
FORMAT_VERSION = 1

_SUMMARY_WORDS = (
    "Every arm starts and iterates in its own way on the same frames. The object error against the reference is the headline: chi² "
    "falls when the support loosens, and never stands alone. Numbers are medians over the frames; p75 is the 75th percentile, 'near "
    "full' the share of frames whose chi² is within 1.1 times the full solve's."
)
_CONVERGENCE_WORDS = (
    "Lower and further to the left is better. An arm that starts near the solution begins low; one that only fits noise ends low with "
    "a wrong object, which the next picture shows. HIO leaves the support on purpose: chi² rises, out of this picture, and falls back "
    "with the next ER."
)
_ERROR_WORDS = (
    "Left: how wrong the object is. Right: how well it explains the frame. An arm that is far left on the right panel and far right "
    "on the left one flatters itself."
)
_DISTANCE_WORDS = (
    "Each dot is a frame. Frames right of the gate are abstained from; dots high up on the left are failures that the distance did "
    "not foretell."
)
_PRTF_WORDS = "Where the curve meets the dotted line, independent starts share no phase: detail finer than that is not to be trusted."
_FRAME_WORDS = (
    "Above: photons as measured and as the retrieved object gives them, on one logarithmic scale; their difference in standard "
    "deviations of photon noise (structure means that the object is wrong there; grey was not measured); means over rings; the "
    "differences as a histogram beside photon noise alone (the outermost bars hold what lies beyond; pixels without photons crowd at "
    "zero). Below: pixel classes; amplitude and phase after the trivial ambiguities were removed, beside the reference, the phase "
    "where the amplitude exceeds 10 %."
)

_SIDE_BY_SIDE = ("iterations", "chi2_over_floor", "error", "error_p75", "near_full_at_50", "near_full", "abstained")


def write_report(
    folder: str | Path,
    prior: Prior,
    comparisons: Sequence[Comparison],
    settings: Mapping[str, Any] | None = None,
    tables: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    progress: Tick | None = None,
) -> Path:
    """Judge the comparisons and write `report.json`, `report.html` and `pictures/*.png` into a folder.

    Parameters
    ----------
    folder : made if absent; files of an earlier report are replaced.
    prior : the one that was evaluated. Comparisons of another one (a swapped split) may be among them; their titles say so.
    comparisons : at least one.
    settings : how the arms were run; goes into report.json.
    tables : title -> rows, further studies (centroid reuse, a confusion matrix), shown as they are.
    progress : progress(what, done, total).

    Returns
    -------
    Path
        Of report.html.

    Raises
    ------
    ValueError
        No comparison.
    """
    if not comparisons:
        raise ValueError("a report needs at least one comparison")
    target = Path(folder)
    (target / "pictures").mkdir(parents=True, exist_ok=True)
    judged = [judge(one, progress) for one in comparisons]
    content = _content(prior, judged, settings or {}, tables or {})
    (target / "report.json").write_text(json.dumps(plain(content), allow_nan=False) + "\n")
    sections = _sections(prior, judged, tables or {}, progress)
    for part in (part for section in sections for part in section.parts if isinstance(part, Picture)):
        (target / "pictures" / f"{part.name}.png").write_bytes(part.png)
    alarm = " ".join(note for one in comparisons for note in one.notes if note.startswith(LEAK))
    written = target / "report.html"
    written.write_text(page(_title(judged), _subtitle(prior, content), alarm, sections), encoding="utf-8")
    return written


def plain(value: Any) -> Any:
    """What JSON can hold: arrays become lists, NaN and infinities null."""
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _content(prior: Prior, judged: Sequence[Judged], settings: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "streamprior": __version__,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "prior": {"content_hash": prior.content_hash, "classes": prior.class_names, "provenance": prior.provenance},
        "settings": settings,
        "columns": dict(COLUMNS),
        "comparisons": [
            {
                "title": one.comparison.title,
                "frames": one.comparison.frames,
                "reference_is": one.comparison.reference_is,
                "notes": one.comparison.notes,
                "findings": failures(one),
                "summary": one.rows,
                "arms": {arm.name: _arm(arm, one) for arm in one.comparison.arms},
            }
            for one in judged
        ],
        "tables": tables,
    }


def _arm(arm: Arm, judged: Judged) -> dict[str, Any]:
    numbers = ("chi2", "floor", "r_factor", "free_llk", "history", "unit", "distance", "abstained", "kept", "iterations", "ffts")
    area = arm.support.reshape(len(arm.support), -1).sum(1)
    quality = dict(zip(QUALITY, judged.quality[arm.name], strict=True))
    return {name: getattr(arm, name) for name in numbers} | {"support_pixels": area} | quality


def _title(judged: Sequence[Judged]) -> str:
    return "Error analysis: " + ", ".join(dict.fromkeys(one.comparison.title for one in judged))


def _subtitle(prior: Prior, content: Mapping[str, Any]) -> str:
    story = prior.provenance
    files = ", ".join(map(str, story.get("files") or [story.get("file", "unknown frames")]))
    grown = f"{files} [{story.get('frames', ':')}]"
    return f"prior {prior.content_hash[:16]}, grown on {grown}; streamprior {__version__}, written {content['written']}"


def _sections(prior: Prior, judged: Sequence[Judged], tables: Mapping[str, Any], progress: Tick | None) -> list[Section]:
    tick = progress or (lambda what, done, total: None)
    sections = [_summary(judged), _failures(judged), *(Section(title, [Table(rows)]) for title, rows in tables.items())]
    for number, one in enumerate(judged):
        sections.append(_comparison(one, prior, f"{number + 1}-"))
        tick("pictures", number + 1, len(judged) + 1)
    sections += prior_sections(prior)
    tick("pictures", len(judged) + 1, len(judged) + 1)
    return sections


def _summary(judged: Sequence[Judged]) -> Section:
    """All comparisons side by side, one row an arm: the numbers that decide."""
    names = dict.fromkeys(row["arm"] for one in judged for row in one.rows)
    rows = []
    for name in names:
        cells: dict[str, Any] = {"arm": name}
        for one in judged:
            found = next((row for row in one.rows if row["arm"] == name), {})
            cells |= {f"{one.comparison.title}|{label(column)}": found.get(column) for column in _SIDE_BY_SIDE}
        rows.append(cells)
    return Section("Summary", [_SUMMARY_WORDS, Table(rows, mark=judged[0].shown.name)])


def label(column: str) -> str:
    """A column's name as a person reads it."""
    written = column.replace("chi2_over_floor", "χ²/floor").replace("chi2", "χ²").replace("r_factor", "R").replace("_", " ")
    return written.replace("llk", "LLK").replace("ssim", "SSIM").replace("psnr", "PSNR").replace("ffts", "FFTs")


def _failures(judged: Sequence[Judged]) -> Section:
    parts: list[Any] = []
    for one in judged:
        parts += [f"{one.comparison.title}:", tuple((*failures(one), *one.comparison.notes)) or ("Nothing to report.",)]
    return Section("What failed, and what to keep in mind", parts, "failures")


def _comparison(judged: Judged, prior: Prior, prefix: str) -> Section:
    comparison = judged.comparison
    full = Table(
        [{label(key): value for key, value in row.items()} for row in judged.rows],
        "; ".join(f"{label(name)}: {meaning}" for name, meaning in COLUMNS.items()) + ".",
        judged.shown.name,
    )
    words = f"{len(comparison.frames)} frames of Set 2; the reference is the {comparison.reference_is}."
    parts: list[Any] = [words, full, *_arm_pictures(judged, prefix)]
    for name, place in representatives(judged).items():
        png = drawn(frame_picture, judged, prior, place)
        parts.append(
            Picture(f"{prefix}frame-{name}", png, f"{name.capitalize()} frame by object error ({judged.shown.name}). {_FRAME_WORDS}")
        )
    return Section(comparison.title, parts)


def _arm_pictures(judged: Judged, prefix: str) -> list[Picture]:
    found = [
        Picture(f"{prefix}convergence", drawn(convergence_picture, judged), _CONVERGENCE_WORDS),
        Picture(f"{prefix}errors", drawn(error_picture, judged), _ERROR_WORDS),
    ]
    if np.isfinite(judged.shown.distance).any():
        found.append(Picture(f"{prefix}distance", drawn(distance_picture, judged), _DISTANCE_WORDS))
    if judged.comparison.random_runs is not None and len(judged.comparison.random_runs) > 1:
        found.append(Picture(f"{prefix}prtf", drawn(prtf_picture, judged.comparison), _PRTF_WORDS))
    return found
