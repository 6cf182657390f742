"""The twin's crystals, a measured rocking curve and kept measurements -> the pictures of docs/prior.md.

Used by make_pictures.py. Every comparison shows frames that the prior has not seen.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from streamprior_sim.crystals import MORPHOLOGIES
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin

from streamprior.align import align
from streamprior.evaluate.arms import compare_arms
from streamprior.evaluate.drawing import ARM_STYLES, CLASS_COLOURS, log_scale, new_figure
from streamprior.evaluate.metrics import PRESENT, model_of, phase_origin
from streamprior.evaluate.records import DAEMON, FULL_SOLVE, Comparison
from streamprior.evaluate.study import choose
from streamprior.prior import Geometry, Library, Prior
from streamprior.sources.files import Recording
from streamprior.stages.match import match
from streamprior.stages.prepare import Corrections, merged, prepare
from streamprior.stages.refine import refine
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings

LEARNED, JUDGED = 280, 140
STOP_PX = 3
SHOWN = ("compact symmetric core", "ring / vortex", "core with vertical tail")
HALF = 16
"""Pixels on either side of the middle that are shown of an object: it is at most 0.4 of 64 wide."""

CHARTS = PATTERN, AMPLITUDE, PHASE = "viridis", "cividis", "twilight"
TURN = Normalize(-np.pi, np.pi)
OBJECT_KEYS = ((AMPLITUDE, Normalize(0, 1), "amplitude over the largest"), (PHASE, TURN, "phase, rad (grey: no object)"))


def pictures(rocking: tuple[Recording, Prior] | None, results: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every picture.

    rocking : odd frames of the rocking curve and the prior of its even ones. results : what `streamprior bench prior --json` printed.
    """
    prior = crystal_prior()
    assert prior.library is not None
    compared, names = behind_stop(prior)
    yield "crystals", crystals()
    yield "prototypes", prototypes(prior.library, [MORPHOLOGIES[i % len(MORPHOLOGIES)] for i in range(LEARNED)])
    yield "beam-stop", beam_stop(compared, names)
    comparisons = [compared]
    if rocking is not None:
        scan, grown = rocking
        chosen = choose(grown, scan)
        measured = compare_arms(chosen.photons, grown, title="measured rocking curve, even to odd frames", frames=chosen.frames, seeds=5)
        comparisons.append(measured)
        yield "measured-objects", measured_objects(measured, grown)
    yield "convergence", convergence(comparisons)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    yield "morphology", confusion([row for row in rows if row.get("benchmark") == "morphology"])


def crystal_prior() -> Prior:
    """The prior of the study of crystals (benchmarks/streamprior_bench/crystals.py): Set 1, no beam stop."""
    twin = Twin(load_scenario("crystals", {"frames": LEARNED}))
    frames = np.stack([twin.frame(i) for i in range(LEARNED)])
    return grow_prior(frames, geometry=Geometry((64, 64), (32, 32), (64, 64)), settings=TrainSettings(classes=3))


def behind_stop(prior: Prior) -> tuple[Comparison, np.ndarray]:
    """All arms on Set 2 behind a beam stop, and the frames' morphologies."""
    changes = {"frames": JUDGED, "sample.first": LEARNED, "detector.beam_stop_radius_px": STOP_PX}
    twin = Twin(load_scenario("crystals", changes))
    known = merged(Corrections(), twin.detector(), prior.geometry.detector_shape)
    photons = prepare(np.stack([twin.frame(i) for i in range(JUDGED)]), prior, known.mask)
    truths = [twin.truth(i) for i in range(JUDGED)]
    title = f"the twin's crystals behind a beam stop of {STOP_PX} px, 1e6 photons"
    compared = compare_arms(photons, prior, title=title, truth=np.stack([one.object for one in truths]), seeds=5)
    return compared, np.array([one.morphology for one in truths])


def crystals() -> Figure:
    """Three crystals of each morphology: pattern, amplitude, phase."""
    twin = Twin(load_scenario("crystals"))
    number, examples = len(MORPHOLOGIES), 3
    figure, axes = new_figure(number, 3 * examples, (7.6, 6.8))
    norms = (LogNorm(1, 1e5), Normalize(0, 1), TURN)
    for kind, row in enumerate(axes):
        for example, part in enumerate(row.reshape(examples, 3)):
            i = example * number + kind
            psi = twin.truth(i).object
            shown = (np.maximum(twin.frame(i), 1), _cut(np.abs(psi) / np.abs(psi).max()), _phase(_cut(psi)))
            for axis, values, chart, norm in zip(part, shown, CHARTS, norms, strict=True):
                _bare(axis, values, chart, norm)
        row[0].set_ylabel(textwrap.fill(MORPHOLOGIES[kind], 14), fontsize=7)
    labels = (
        "photons a pixel, all 64 x 64",
        f"amplitude over its largest, middle {2 * HALF} x {2 * HALF} pixels",
        "phase, rad (grey: no object)",
    )
    _keys(figure, axes, zip(CHARTS, norms, labels, strict=True))
    figure.suptitle("Crystals of seven morphologies, 1e6 photons: diffraction pattern, amplitude and phase of three examples each")
    return figure


def prototypes(library: Library, names: Sequence[str]) -> Figure:
    """The prototype of most members on each unit of the frame SOM; the frame's colour is the true morphology of its first member."""
    side, size = int(library.place.max()) + 1, 2 * HALF
    figure, axes = new_figure(1, 2, (9.0, 5.8))
    shades = dict(zip(MORPHOLOGIES, CLASS_COLOURS, strict=True))
    amplitude, phase = (mpl.colormaps[chart].with_extremes(bad="0.55") for chart in (AMPLITUDE, PHASE))
    tiles = np.ones((2, side * size, side * size, 4))  # white where the map has no frame
    for u in np.argsort(library.members, kind="stable"):  # the last one on a unit stays
        row, column = library.place[u] * size
        psi = _cut(library.psi[u])
        here = (slice(row, row + size), slice(column, column + size))
        tiles[0][here], tiles[1][here] = amplitude(np.abs(psi) / np.abs(psi).max()), phase(TURN(np.ma.masked_invalid(_phase(psi))))
        shade = shades[names[int(np.flatnonzero(library.unit == u)[0])]]
        for axis in axes[0]:
            axis.add_patch(Rectangle((column - 0.5, row - 0.5), size, size, fill=False, edgecolor=shade, lw=1.6))
    for axis, values in zip(axes[0], tiles, strict=True):
        axis.imshow(values)
        axis.set_axis_off()
    _keys(figure, axes, OBJECT_KEYS)
    keys = [Patch(facecolor="none", edgecolor=shade, lw=2, label=name) for name, shade in shades.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    number, units = len(library.psi), len(np.unique(library.place, axis=0))
    figure.suptitle(f"{number} prototypes of {len(library.unit)} crystals on {units} units of a {side} x {side} map grown without labels")
    return figure


def beam_stop(compared: Comparison, names: np.ndarray) -> Figure:
    """One crystal of each shown morphology, that of median error: measured and complete pattern, truth, and three arms' objects."""
    arms = {arm.name: arm for arm in compared.arms}
    own = np.array([align(psi, truth).error for psi, truth in zip(arms[DAEMON].psi, compared.reference, strict=True)])
    figure, axes = new_figure(2 * len(SHOWN), 5, (8.6, 11.8))
    for (above, below), name in zip(axes.reshape(len(SHOWN), 2, 5), SHOWN, strict=True):
        frames = np.flatnonzero(names == name)
        i = int(frames[np.argsort(own[frames])[len(frames) // 2]])
        truth = compared.reference[i]
        norm = LogNorm(1, float((model_of(truth) ** 2).max()))
        counts = np.where(compared.valid[i], np.maximum(compared.counts[i], 1), np.nan)
        _bare(above[0], _cut(counts), PATTERN, norm, f"{name}\nmeasured")
        _bare(below[0], _cut(np.maximum(model_of(truth) ** 2, 1)), PATTERN, norm, "without the stop")
        _pair((above[1], below[1]), truth, truth, "truth")
        for column, arm in enumerate(("flat + plan", FULL_SOLVE, DAEMON), 2):
            found = align(arms[arm].psi[i], truth)
            title = f"{arm}: error {found.error:.2f}\n{arms[arm].iterations:,} iterations"
            _pair((above[column], below[column]), found.psi, truth, title)
    for row, label in zip(axes, ("amplitude", "phase") * len(SHOWN), strict=True):
        row[1].set_ylabel(label)
    _keys(figure, axes, OBJECT_KEYS)
    figure.suptitle(f"Behind a beam stop of {STOP_PX} px (grey), middle {2 * HALF} x {2 * HALF} pixels: what three arms make of it")
    return figure


def measured_objects(compared: Comparison, prior: Prior) -> Figure:
    """Three frames over the peak: ten iterations of error reduction from the nearest prototype, beside the full solve."""
    full = next(arm for arm in compared.arms if arm.name == FULL_SOLVE)
    flux = compared.counts.sum((1, 2))
    peak = int(flux.argmax())
    flanks = [int(np.abs(flux[part] - flux[peak] / 4).argmin()) + part.start for part in (slice(0, peak), slice(peak, len(flux)))]
    chosen = [flanks[0], peak, flanks[1]]
    start = match(compared.counts[chosen], prior)
    quick = refine(compared.counts[chosen], start, iterations=10, valid=compared.valid[chosen])
    figure, axes = new_figure(len(chosen), 5, (11.4, 7.6))
    box = prior.object_box
    light = LogNorm(1, float(compared.counts[chosen].max()))
    for row, i, psi, chi2, distance in zip(axes, chosen, quick.psi, quick.chi2, start.distance[:, 0], strict=True):
        found = align(psi, full.psi[i])
        _bare(row[0], np.maximum(compared.counts[i], 1), PATTERN, light, f"frame {compared.frames[i]}\n{_short(flux[i])} photons")
        title = f"prior + 10 ER\nchi² {chi2:.4f}, distance {distance:.3f}"
        _pair(row[1:3], found.psi, full.psi[i], title, box)
        title = f"full solve\nchi² {full.chi2[i]:.4f}, differs by {found.error:.2f}"
        _pair(row[3:5], full.psi[i], full.psi[i], title, box)
    _keys(figure, axes, ((PATTERN, light, "photons a pixel"), *OBJECT_KEYS))
    figure.suptitle("Measured rocking curve, prior of even frames, three odd frames: chi² agrees, the objects do not")
    return figure


def convergence(comparisons: Sequence[Comparison]) -> Figure:
    """Median chi2 of every arm after each iteration, a panel a comparison; the full solve's end as a line."""
    figure, axes = new_figure(1, len(comparisons), (5.2 * len(comparisons), 5.0))
    for axis, compared in zip(axes[0], comparisons, strict=True):
        floor, first = float(np.median(compared.arms[0].floor)), 0.0
        for arm in compared.arms:
            colour, dashes, width = ARM_STYLES[arm.name]
            if arm.name == FULL_SOLVE:
                axis.axhline(
                    float(np.median(arm.chi2)),
                    color=colour,
                    linestyle=dashes,
                    lw=width,
                    label=f"{FULL_SOLVE}, {arm.iterations:,} iterations",
                )
                continue
            # Beyond the schedule only frames that were abstained from go on; a median over those few would not be the arm's.
            most = np.isfinite(arm.history).mean(0) > 0.5
            history = np.nanmedian(arm.history[:, most], 0)
            axis.plot(np.arange(1, len(history) + 1), history, color=colour, linestyle=dashes, lw=width, label=arm.name)
            first = max(first, float(history[0]))
        axis.axhline(floor, color="0.5", lw=1, linestyle=(0, (1, 3)), label="photon noise alone")
        axis.set(xlabel="iteration of the arm that is kept", ylabel="chi², median over frames", title=compared.title)
        log_scale(axis, "x")
        log_scale(axis, "y")
        axis.set_ylim(0.8 * floor, 1.2 * first)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def confusion(rows: Sequence[dict[str, Any]]) -> Figure:
    """Confusion matrices of the morphology map, a panel a row."""
    figure, axes = new_figure(1, len(rows), (3.1 * len(rows) + 1.5, 4.4))
    for axis, row in zip(axes[0], rows, strict=True):
        table = np.array(row["confusion"])
        axis.imshow(table / table.sum(1, keepdims=True), cmap="Blues", vmin=0, vmax=1)
        for (r, c), number in np.ndenumerate(table):
            if number:
                axis.text(
                    c, r, str(number), ha="center", va="center", color="white" if number > table[r].sum() / 2 else "black", fontsize=8
                )
        stop = f"stop of {row['stop_px']:g} px" if row["stop_px"] else "no stop"
        axis.set_title(f"{_short(row['photons'])} photons, {stop}\nbalanced accuracy {row['balanced_accuracy']:.2f}")
        axis.set_xticks(range(len(table)), row["names"], rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
        axis.set_yticks(range(len(table)), row["names"] if axis is axes[0, 0] else [""] * len(table), fontsize=7)
    axes[0, 0].set_ylabel("true morphology")
    figure.supxlabel("group of the map, named afterwards", fontsize=8)
    return figure


def _pair(axes: Iterable[Any], psi: Any, like: Any, title: str, box: tuple[slice, slice] | None = None) -> None:
    """Amplitude and phase of an object that lies on a reference, on the reference's scale and phase origin."""
    part, whole = (one[box] if box else _cut(one) for one in (psi, like))
    above, below = axes
    _bare(above, np.abs(part) / np.abs(whole).max(), AMPLITUDE, Normalize(0, 1), title)
    _bare(below, _phase(part, whole), PHASE, TURN)


def _keys(figure: Figure, axes: Any, keys: Iterable[tuple[str, Normalize, str]]) -> None:
    """Colour bars (chart, norm, label) side by side below all axes."""
    chosen = list(keys)
    columns = np.array_split(np.arange(axes.shape[1])[::-1], len(chosen))[::-1]  # the last ones get what is left over
    for (chart, norm, label), part in zip(chosen, columns, strict=True):
        bar = figure.colorbar(ScalarMappable(norm, chart), ax=list(axes[:, part].flat), location="bottom", shrink=0.8, aspect=30, pad=0.02)
        bar.set_label(label, fontsize=8)


def _bare(axis: Any, values: Any, chart: str, norm: Normalize, title: str = "") -> None:
    axis.imshow(values, cmap=mpl.colormaps[chart].with_extremes(bad="0.55"), norm=norm)
    axis.set_title(title, fontsize=8)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _phase(psi: Any, like: Any = None) -> Any:
    """Phase where the amplitude is at least 10 % of the largest, its weighed mean taken off; NaN elsewhere."""
    turned = psi * phase_origin(psi if like is None else like)
    return np.where(np.abs(psi) > PRESENT * np.abs(psi).max(), np.angle(turned), np.nan)


def _short(photons: float) -> str:
    return f"{photons:.0e}".replace("+0", "")


def _cut(field: Any) -> Any:
    """The middle of a field."""
    return field[tuple(slice(n // 2 - HALF, n // 2 + HALF) for n in field.shape)]
