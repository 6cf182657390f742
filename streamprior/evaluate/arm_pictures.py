"""All arms of a comparison -> pictures: convergence, object error, transfer function, and what the distance foretells."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from streamprior.evaluate.drawing import ARM_STYLES, OTHER_ARM, log_scale, new_figure
from streamprior.evaluate.judge import Judged, over
from streamprior.evaluate.metrics import prtf
from streamprior.evaluate.records import FULL_SOLVE, Arm, Comparison

PRTF_FRAMES = 6
"""Frames whose transfer functions are drawn, evenly spaced over the comparison."""

NOTHING_SHARED = np.sqrt(np.pi / 4)
"""Times 1/sqrt(n): mean length of the average of n phasors with random phases (Rayleigh)."""


def convergence_picture(judged: Judged) -> Figure:
    """Median chi2 after each iteration, every arm; the quartiles of the one that the daemon runs."""
    figure, axes = new_figure(1, 1, (8.6, 4.6))
    axis = axes[0, 0]
    for arm in judged.comparison.arms:
        # Frames that are abstained from go through more iterations than the others: beyond those a median would be of them alone.
        known = arm.history[:, np.isfinite(arm.history).sum(0) * 2 > len(arm.history)]
        if not known.size:
            continue
        steps = np.arange(1, known.shape[1] + 1)
        colour, dashes, width = ARM_STYLES.get(arm.name, OTHER_ARM)
        axis.plot(steps, np.nanmedian(known, 0), color=colour, linestyle=dashes, lw=width, label=arm.name)
        if arm.name == judged.shown.name:
            axis.fill_between(steps, *np.nanpercentile(known, (25, 75), axis=0), color=colour, alpha=0.18, lw=0)
    floor = _median(judged.shown.floor)
    if floor > 0:
        axis.axhline(floor, color="0.5", lw=1, linestyle=(0, (1, 3)), label="photon noise alone")
    axis.set(xlabel="iteration of the arm that is kept", ylabel="chi², median over frames")
    # HIO leaves the support on purpose: its excursions would squeeze everything else into the lower half.
    first = [float(np.nanmedian(arm.history[:, 0])) for arm in judged.comparison.arms if np.isfinite(arm.history[:, :1]).any()]
    axis.set_yscale("log")
    axis.set_ylim(top=1.5 * max(first, default=1.0))
    log_scale(axis, "x")
    log_scale(axis, "y")
    axis.set_title(f"{judged.comparison.title}: convergence of every arm, band = quartiles of {judged.shown.name}")
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def error_picture(judged: Judged) -> Figure:
    """Every frame's object error and chi2 over its floor, one row an arm: chi2 flatters, the error does not."""
    arms = judged.comparison.arms
    figure, axes = new_figure(1, 2, (12.0, 0.9 + 0.36 * len(arms)))
    values = [judged.quality[arm.name][0] for arm in arms]
    reference_is = judged.comparison.reference_is
    _rows(axes[0, 0], arms, values, reference_is)
    axes[0, 0].set_xlabel(f"object error against the {reference_is}")
    _rows(axes[0, 1], arms, [over(arm.chi2, arm.floor) for arm in arms], "")
    axes[0, 1].set_xlabel("chi² over its noise floor")
    log_scale(axes[0, 1], "x")
    axes[0, 1].set_yticklabels([])
    figure.suptitle(f"{judged.comparison.title}: a dot a frame, the bar is the median, the tick the 75th percentile")
    return figure


def _rows(axis: Any, arms: tuple[Arm, ...], values: list[npt.NDArray[Any]], reference_is: str) -> None:
    for row, (arm, numbers) in enumerate(zip(arms, values, strict=True)):
        known = numbers[np.isfinite(numbers)]
        colour = ARM_STYLES.get(arm.name, OTHER_ARM)[0]
        # Spread by rank, not by chance: the same report looks the same twice.
        offsets = ((np.arange(known.size) * 0.618) % 1 - 0.5) * 0.6
        axis.scatter(known, row + offsets, s=12, color=colour, alpha=0.7, linewidths=0)
        if known.size:
            axis.plot([np.median(known)] * 2, [row - 0.4, row + 0.4], color="black", lw=2)
            axis.plot([np.percentile(known, 75)] * 2, [row - 0.2, row + 0.2], color="black", lw=1)
        else:
            axis.annotate(
                "is the reference" if arm.name == reference_is else "undefined",
                (0.01, row),
                xycoords=("axes fraction", "data"),
                va="center",
            )
    axis.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axis.set_ylim(len(arms) - 0.4, -0.6)


def prtf_picture(comparison: Comparison) -> Figure:
    """Transfer function of independent random starts, a line a frame; the dotted line is what runs that share nothing give."""
    runs = comparison.random_runs
    assert runs is not None
    figure, axes = new_figure(1, 1, (7.0, 4.2))
    axis = axes[0, 0]
    number = len(comparison.frames)
    chosen = np.unique(np.linspace(0, number - 1, min(number, PRTF_FRAMES)).round().astype(int))
    curves = [prtf(runs[:, i], comparison.counts[i], comparison.valid[i]) for i in chosen]
    for i, (radius, agreement) in zip(chosen, curves, strict=True):
        axis.plot(radius, agreement, lw=1, alpha=0.7, color="#56b4e9", label="one frame" if i == chosen[0] else None)
    table = np.array([agreement for _, agreement in curves])
    seen = ~np.isnan(table).all(0)
    axis.plot(curves[0][0][seen], np.nanmedian(table[:, seen], 0), lw=2.4, color="#0072b2", label="median")
    axis.axhline(NOTHING_SHARED / np.sqrt(len(runs)), color="0.4", linestyle=":", label=f"no agreement, 0.89/√{len(runs)}")
    axis.axhline(1 / np.e, color="0.7", lw=0.8, label="1/e")
    axis.set(xlabel="spatial frequency, pixels from the centre", ylabel="PRTF", ylim=(0, 1.05))
    axis.set_title(f"{comparison.title}: agreement of {len(runs)} random starts on {len(chosen)} frames")
    axis.legend(loc="upper right")
    return figure


def distance_picture(judged: Judged) -> Figure:
    """Does the distance to the nearest prototype foretell the result? chi2 of the daemon's arm over the full solve's."""
    arm, comparison = judged.shown, judged.comparison
    full = next((one.chi2 for one in comparison.arms if one.name == FULL_SOLVE), arm.floor)
    against = "the full solve's" if any(one.name == FULL_SOLVE for one in comparison.arms) else "its noise floor"
    ratio = over(arm.chi2, full)
    figure, axes = new_figure(1, 1, (7.0, 4.2))
    axis = axes[0, 0]
    for chosen, colour, marker, name in ((~arm.abstained, "#0072b2", "o", "kept"), (arm.abstained, "#d55e00", "x", "abstained")):
        if (chosen & np.isfinite(ratio) & np.isfinite(arm.distance)).any():
            axis.scatter(arm.distance[chosen], ratio[chosen], s=22, color=colour, marker=marker, label=name)
    if np.isfinite(comparison.distance_gate):
        axis.axvline(comparison.distance_gate, color="0.3", linestyle="--", label="gate")
    axis.axhline(1.0, color="0.6", lw=1)
    log_scale(axis, "y")
    axis.set(xlabel="distance: part of the photons that the nearest prototype leaves unexplained", ylabel=f"chi² over {against}")
    axis.set_title(f"{comparison.title}: what the distance foretells")
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
    return figure


def _median(values: npt.NDArray[Any]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else float("nan")
