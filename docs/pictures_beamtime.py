"""The archive of a simulated beamtime -> the picture of docs/bluesky.md.

Used by make_pictures.py. The beamtime is one of `streamprior beamtime gold_balls --headless --folder FOLDER`: its second scan loses half of
the flux for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pictures_mosaic import extent_of, phase_of, where_lit

from streamprior.config import DriftSettings
from streamprior.mosaic.agreement import onto, well_lit
from streamprior.prior import load_prior
from streamprior.records import MosaicImage
from streamprior.sinks.archive import read_about, read_run, run_folders
from streamprior.sinks.mosaic_file import read_mosaic

PAUSE_S = 2.0
"""Seconds without a frame from which the plan is taken to have been held up: a frame takes 0.03."""

GOOD, ALARM = "#0072b2", "#d55e00"


@dataclass(frozen=True, slots=True)
class Scan:
    """time : (N,) seconds since the first frame. score : (N,) of the flux. alarm : (N,) bool, it stood."""

    time: Any
    score: Any
    alarm: Any
    image: MosaicImage


def pictures(folder: Path) -> Iterator[tuple[str, Figure]]:
    """(name, figure). folder : of the beamtime."""
    scans = {number: _scan(folder, number) for number in (1, 2)}
    figure = Figure(figsize=(10.5, 6.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.45))
    _timeline(above.subplots(), scans[2])
    _images(below, scans[1].image, scans[2].image)
    figure.suptitle(
        "A simulated beamtime: half of the flux is lost during scan 2, the alarm holds up the plan, the scan goes on and ends whole"
    )
    yield "beamtime", figure


def _scan(folder: Path, number: int) -> Scan:
    """What the archive has of the scan of this number."""
    runs = run_folders(folder / "archive")
    run = next(one for one in runs if read_about(one)["metadata"]["start"]["scan_id"] == number)
    frames = read_run(run).frames
    mean, deviation = load_prior(next(folder.glob("prior-*.h5"))).baselines["flux"]
    at = frames["detector_time"].to_numpy()
    alarm = np.array(["flux" in alarms.split(",") for alarms in frames["alarms"].to_pylist()])
    return Scan(at - at[0], (frames["flux"].to_numpy() - mean) / deviation, alarm, read_mosaic(run / "mosaic.nxs"))


def _timeline(axis: Any, scan: Scan) -> None:
    limit = DriftSettings().limit
    axis.axhspan(-limit, limit, color="0.87", zorder=0, label=f"within {limit:g} deviations")
    for after in np.flatnonzero(np.diff(scan.time) > PAUSE_S):
        begun, over = scan.time[after], scan.time[after + 1]
        axis.axvspan(begun, over, color="#f0e442", alpha=0.5, zorder=0, label=f"the plan is paused, {over - begun:.1f} s")
    axis.plot(scan.time[~scan.alarm], scan.score[~scan.alarm], ".", color=GOOD, ms=4, label="frames of scan 2")
    axis.plot(scan.time[scan.alarm], scan.score[scan.alarm], "o", color=ALARM, ms=5, label="frames while the alarm stands")
    axis.set(xlabel="s since the first frame of scan 2", ylabel="flux, deviations from the prior's")
    axis.legend(facecolor="white", framealpha=1, loc="lower right")


def _images(figure: Any, first: MosaicImage, second: MosaicImage) -> None:
    """Phase of both, on one scale, and what is left between them; cut to where light was."""
    axes = figure.subplots(1, 3)
    scale = _scale(first)
    for axis, image, number in zip(axes, (first, second), (1, 2), strict=False):
        phase = axis.imshow(where_lit(image, phase_of(image)), cmap="cividis", extent=extent_of(image), **scale)
        axis.set_title(f"phase, scan {number}: halves differ by {image.disagreement:.3f}")
    left = np.abs(onto(first.object, second.object, well_lit(first.light)) - first.object)
    difference = axes[2].imshow(where_lit(first, left), cmap="viridis", vmin=0, vmax=0.5, extent=extent_of(first))
    axes[2].set_title("|scan 2 - scan 1|: the line that was begun\nin half of the light")
    figure.colorbar(phase, ax=axes[:2], label="phase, rad", shrink=0.8)
    figure.colorbar(difference, ax=axes[2], shrink=0.8)
    (left_px, right_px), (top_px, bottom_px) = _frame(first)
    for axis in axes:
        axis.set(xlim=(left_px, right_px), ylim=(bottom_px, top_px), facecolor="0.55", xlabel="object pixels")


def _scale(image: MosaicImage) -> dict[str, float]:
    """What nearly all phases of the image lie in."""
    low, high = np.percentile(phase_of(image)[well_lit(image.light)], (0.2, 99.8))
    return {"vmin": float(low), "vmax": float(high)}


def _frame(image: MosaicImage) -> tuple[tuple[float, float], tuple[float, float]]:
    """First and last column, first and last row of what was lit, with a margin, in the picture's coordinates."""
    rows, columns = np.nonzero(~np.isnan(where_lit(image, image.light)))
    left, _, _, top = extent_of(image)
    margin = 6
    return (left + columns.min() - margin, left + columns.max() + margin), (top + rows.min() - margin, top + rows.max() + margin)
