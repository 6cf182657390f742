"""A measured Siemens star, the twin's gold balls and kept measurements -> the pictures of docs/mosaic.md.

Used by make_pictures.py. The frames are streamed by the very stages that the daemon runs, with the settings of the study
(benchmarks/streamprior_bench/scans.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from streamprior_bench.scans import BALLS, STAR
from streamprior_sim.cxi import save
from streamprior_sim.gold_balls import Scan
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import build

from streamprior.config import MosaicSettings
from streamprior.evaluate.mosaics import stream_mosaic
from streamprior.mosaic.agreement import onto, well_lit
from streamprior.mosaic.probe import load_probe
from streamprior.prior import Prior
from streamprior.records import MosaicImage
from streamprior.sources.files import Recording, open_recording
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings

DIM = 0.02
"""Part of the light's 90th percentile below which an image is shown grey."""

BALLS_CUT = (slice(240, 330), slice(240, 330))
"""Rows and columns of the truth that are enlarged, inside the field that is well lit."""

BALLS_FIELD = (slice(190, 420), slice(190, 420))
"""Rows and columns that any frame sees."""

COLOURS = ("#56b4e9", "#009e73", "#0072b2", "#d55e00", "#cc79a7", "#e69f00")


def pictures(star: Path, balls: Path, results: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every picture whose file is there.

    star : the measured scan. balls : the published reconstruction that the twin's scan is made of. results : what `streamprior bench scans
    --json` printed.
    """
    if star.exists():
        images = star_images(star)
        yield "mosaic-star", growing(images)
        yield "mosaic-rings", rings(images)
        yield "mosaic-probe", probes(star, images[-1])
    if balls.exists():
        yield "mosaic-balls", gold_balls(balls)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    yield "mosaic-error", error_curve([row for row in rows if row.get("part") == "gold balls"])


def star_images(file: Path, settings: MosaicSettings = STAR) -> list[MosaicImage]:
    """After a quarter, a half and all of the frames, and after the passes."""
    recording, prior = open_recording(file), _prior(open_recording(file, "0::4"))
    quarters = [round(len(recording) * part / 4) for part in (1, 2)]
    return list(stream_mosaic(recording, prior, settings, load_probe(file, prior.geometry.shape), quarters))


def growing(images: Sequence[MosaicImage]) -> Figure:
    """Phase, light and uncertainty as the scan goes on, one column an image."""
    figure = Figure(figsize=(9.6, 7.3), layout="constrained")
    axes = figure.subplots(3, len(images), sharex=True, sharey=True)
    brightest = float(images[-1].light.max())
    for column, image in enumerate(images):
        phase = where_lit(image, phase_of(image))
        first = axes[0, column].imshow(phase, cmap="cividis", vmin=-0.7, vmax=0.4, extent=extent_of(image))
        second = axes[1, column].imshow(image.light, cmap="viridis", vmin=0, vmax=brightest, extent=extent_of(image))
        third = axes[2, column].imshow(
            where_lit(image, image.uncertainty), cmap="viridis", vmin=0, vmax=_largest(images), extent=extent_of(image)
        )
        axes[0, column].set_title(
            f"{_stage(image)}\nhalves differ by {image.disagreement:.2f}\nhalf period {image.resolution / image.pixel[0]:.1f} px"
        )
    for row, (shown, label) in enumerate(((first, "phase, rad"), (second, "light, photons a pixel"), (third, "uncertainty"))):
        figure.colorbar(shown, ax=axes[row], label=label, shrink=0.85)
    _framed(axes, images[-1])
    figure.suptitle("A measured Siemens star, streamed in the order of the scan; axes in object pixels, grey: hardly any light")
    return figure


def rings(images: Sequence[MosaicImage]) -> Figure:
    """Fourier ring correlation of odd and even frames at the same moments, with the threshold of the last."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axis = figure.subplots()
    for image, colour in zip(images, COLOURS, strict=False):
        label = f"{_stage(image)}: {image.resolution / image.pixel[0]:.1f} px"
        axis.plot(image.frequency, image.correlation, color=colour, label=label)
    axis.plot(images[-1].frequency, images[-1].threshold, color="0.35", linestyle="--", label="half-bit threshold of the last")
    axis.set(xlabel="cycles per object pixel", ylabel="ring correlation", ylim=(-0.15, 1.02), xlim=(0, 0.5))
    axis.legend(frameon=False, title="half period at the crossing")
    figure.suptitle("The measured star: images from odd and from even frames, one probe for both")
    return figure


def probes(file: Path, refined: MosaicImage) -> Figure:
    """The probe of the file and what comes of it where it stands, beside the refined one with its two modes."""
    *_, given = star_images(file, MosaicSettings())
    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=(1, 1, 1.35))
    for row, (image, name) in zip(axes, ((given, "as given, held"), (refined, "refined, two modes")), strict=True):
        power = (np.abs(image.probe) ** 2).sum((1, 2))
        for axis, mode in zip(row, range(2), strict=False):
            if mode >= len(image.probe):
                axis.set_axis_off()
                continue
            shown = axis.imshow(np.abs(image.probe[mode]), cmap="viridis")
            axis.set_title(f"probe {name}: mode {mode + 1}, {power[mode] / power.sum():.0%} of the light")
            figure.colorbar(shown, ax=axis, shrink=0.75, label="modulus, root photons")
        shown = row[2].imshow(where_lit(image, phase_of(image)), cmap="cividis", vmin=-0.7, vmax=0.4, extent=extent_of(image))
        row[2].set_title(f"phase after all passes: halves differ by {image.disagreement:.2f}, chi² {image.chi2:.4f}")
        figure.colorbar(shown, ax=row[2], shrink=0.85, label="phase, rad")
        _framed(row[2:], image)
    figure.suptitle("The measured star with the probe of its file, which has another focus, and with a refined one; axes in object pixels")
    return figure


def gold_balls(file: Path) -> Figure:
    """Truth, images during and after the scan, and the difference that is left; whole and enlarged."""
    twin = build(load_scenario("gold_balls", {"sample.data": str(file)}))
    scan = twin.scan()
    assert scan is not None
    with TemporaryDirectory() as place:
        recording = open_recording(save(twin, Path(place) / "balls.cxi"))
        images = list(stream_mosaic(recording, _prior(recording), BALLS, scan.probe, [round(len(recording) / 4)]))
    columns = [("truth", scan.object)]
    for image in images:
        # Each image is brought onto the truth where it is lit itself: after a quarter the rest is empty.
        had = _laid(image.light, image, scan)
        brought = onto(scan.object, _laid(image.object, image, scan, 1.0), well_lit(had))
        columns.append((_stage(image), np.where(had > DIM * np.percentile(had[had > 0], 90), brought, np.nan)))
    return _against_truth(columns, well_lit(had), scan)


def _against_truth(columns: Sequence[tuple[str, Any]], lit: Any, scan: Scan) -> Figure:
    """columns : (name, object) of truth and images. lit : where the last one was well lit."""
    error = np.abs(columns[-1][1] - scan.object)
    contrast = np.sqrt(np.mean(np.abs(scan.object[lit] - scan.object[lit].mean()) ** 2))
    low, high = np.percentile(np.angle(scan.object[lit]), (0.2, 99.8))
    figure = Figure(figsize=(12, 5.3), layout="constrained")
    axes = figure.subplots(2, len(columns) + 1)
    for row, cut in zip(axes, (BALLS_FIELD, BALLS_CUT), strict=True):
        for axis, (_, field) in zip(row, columns, strict=False):
            phase = axis.imshow(np.angle(field)[cut], cmap="cividis", vmin=low, vmax=high, extent=_microns(scan, cut))
        left = row[-1].imshow(error[cut], cmap="viridis", vmin=0, vmax=float(np.percentile(error[lit], 99.5)), extent=_microns(scan, cut))
    for axis, (name, _) in zip(axes[0], columns, strict=False):
        axis.set_title(name)
    axes[0, -1].set_title(f"difference: {np.sqrt(np.mean(error[lit] ** 2)) / contrast:.3f} of the\ncontrast (rms, well lit part)")
    figure.colorbar(phase, ax=axes[:, :-1], shrink=0.4, aspect=40, label="phase, rad", location="bottom")
    figure.colorbar(left, ax=axes[:, -1], shrink=0.9, label="|image - truth|", location="bottom")
    for axis in axes.ravel():
        axis.set_facecolor("0.55")
    figure.suptitle("Gold balls of the twin: phase of the whole scan, and enlarged; axes in micrometres, grey: hardly any light")
    return figure


def error_curve(rows: Sequence[dict[str, Any]]) -> Figure:
    """Error against the truth as frames come, of all that is well lit and of what was well lit first, beside offline reconstructions."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for arm, colour in zip(("streamed", "streamed, not settled"), (COLOURS[2], COLOURS[3]), strict=True):
        live = [row for row in rows if row["arm"] == arm and not row["final"]]
        frames = [row["frames"] for row in live]
        axis.plot(frames, [row["error"] for row in live], "o-", color=colour, label=f"{arm}:\nall that is well lit by then", ms=4)
        axis.plot(
            frames, [row["error_of_the_first_region"] for row in live], "s:", color=colour, label="only what was well lit first", ms=3
        )
        last = next(row["error"] for row in rows if row["arm"] == arm and row["final"])
        axis.plot([frames[-1] * 1.04], [last], "*", color=colour, ms=10, label="all, after the passes")
    offline = [row for row in rows if "offline" in row["arm"] and "error" in row]
    for row in offline:
        if row["passes"] == max(one["passes"] for one in offline):
            axis.axhline(row["error"], color="0.6", linewidth=0.8, zorder=0)
    passes = sorted({row["passes"] for row in offline})
    axis.plot([], [], color="0.6", linewidth=0.8, label=f"offline programs, {passes[-1]} passes")
    axis.set(
        xlabel="frames streamed", ylabel="error over the contrast", yscale="log", yticks=(0.02, 0.05, 0.1, 0.2, 0.5), ylim=(0.012, 0.7)
    )
    axis.yaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()
    figure.legend(loc="outside right center", frameon=False)
    figure.suptitle("Gold balls: error against the truth as the scan goes on")
    return figure


def _prior(recording: Recording) -> Prior:
    return grow_prior(recording, settings=TrainSettings(library=0, frames=32, survey=64))


def _stage(image: MosaicImage) -> str:
    number = len(image.frames.index)
    return f"{number} frames and the passes" if image.final else f"{number} frames"


def phase_of(image: MosaicImage) -> Any:
    """The phase, the median of its well lit part at 0: no intensity knows it."""
    lit = well_lit(image.light)
    turned = image.object * np.exp(-1j * np.angle(image.object[lit].mean()))
    return np.angle(turned * np.exp(-1j * np.median(np.angle(turned[lit]))))


def where_lit(image: MosaicImage, values: Any) -> Any:
    return np.where(image.light > DIM * np.percentile(image.light[image.light > 0], 90), values, np.nan)


def _largest(images: Sequence[MosaicImage]) -> float:
    """A common end of the scale of uncertainty: what nearly all of the last live image lies below."""
    image = images[-2]
    return float(np.nanpercentile(image.uncertainty[well_lit(image.light)], 99))


def extent_of(image: MosaicImage) -> tuple[float, float, float, float]:
    """Left, right, bottom, top for imshow, object pixels."""
    top, left = (image.origin[axis] / image.pixel[axis] - 0.5 for axis in (0, 1))
    return left, left + image.object.shape[1], top + image.object.shape[0], top


def _framed(axes: Any, image: MosaicImage) -> None:
    left, right, bottom, top = extent_of(image)
    for axis in np.ravel(axes):
        axis.set(xlim=(left, right), ylim=(bottom, top), facecolor="0.55")


def _microns(scan: Scan, cut: tuple[slice, slice]) -> tuple[float, float, float, float]:
    rows, columns = cut
    y, x = (side * 1e6 for side in scan.pixel_m)
    return columns.start * x, columns.stop * x, rows.stop * y, rows.start * y


def _laid(values: Any, image: MosaicImage, scan: Scan, empty: float = 0.0) -> Any:
    """Values of an image's pixels on the truth's; what reaches beyond is cut."""
    laid = np.full(scan.object.shape, empty, values.dtype)
    row, column = (round(image.origin[axis] / scan.pixel_m[axis]) for axis in (0, 1))
    top, left = max(0, row), max(0, column)
    bottom, right = (min(laid.shape[0], row + values.shape[0]), min(laid.shape[1], column + values.shape[1]))
    laid[top:bottom, left:right] = values[top - row : bottom - row, left - column : right - column]
    return laid
