"""Measured scans and the digital twin -> the pictures of docs/gallery.md, docs/prior.md, docs/mosaic.md and docs/bluesky.md.

Run from the repository: python docs/make_pictures.py [FOLDER] [--only GROUP]. Groups are frames, prior, mosaic and beamtime. Measured
data are read from $STREAMPRIOR_DATA or ../shared/data; a picture whose data are absent is left out. So is that of the beamtime, unless
--beamtime names the folder of one: `streamprior beamtime gold_balls --headless --folder FOLDER`. Priors are grown on even frames, and every
measured frame that is shown by itself is an odd one. Growing three priors takes some minutes.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # there may be no display, and pyplot would look for one

import numpy as np
import pictures_beamtime
import pictures_mosaic
import pictures_prior
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import build

import streamprior as sp
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED
from streamprior.sources.files import Recording, open_recording
from streamprior.train.grow import grow_prior

HERE = Path(__file__).parent
DATA = Path(os.environ.get("STREAMPRIOR_DATA", HERE.parents[1] / "shared" / "data"))
ROCKING = DATA / "bcdi_gold_rocking_curve.cxi"
SIEMENS = DATA / "ptycho_siemens_star.cxi"
BALLS = DATA / "gold_balls_cxidb65_reconstruction.h5"
RESULTS = HERE.parent / "benchmarks" / "results"

# The class colours of the live page (streamprior/page.html): Okabe and Ito, core first. A pixel that was not measured is grey.
COLOURS = ("#f0e442", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
UNMEASURED = "#3c3c3c"

STYLE = {"font.size": 8, "axes.titlesize": 8, "figure.dpi": 110, "savefig.dpi": 110, "image.interpolation": "nearest"}
ENOUGH = 0.1
"""Part of the largest amplitude below which a phase means nothing and is not shown (docs/physics.md: where the amplitude exceeds 10 %)."""


def main(folder: Path, only: str | None = None, beamtime: Path | None = None) -> None:
    """Make the pictures of one group, or of all, whose data are at hand; says what was left out."""
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams.update(STYLE)
    groups: dict[str, Callable[[], Iterator[tuple[str, Figure]]]] = {
        "frames": frame_pictures,
        "prior": prior_pictures,
        "mosaic": mosaic_pictures,
        "beamtime": lambda: beamtime_pictures(beamtime),
    }
    for make in [groups[only]] if only is not None else groups.values():
        for name, figure in make():
            _save(figure, folder / f"{name}.png")


def frame_pictures() -> Iterator[tuple[str, Figure]]:
    """Frames and what the stages make of them."""
    # Rocking curve: the peak and its flanks. Siemens star: places spread over the scan.
    measured: dict[str, tuple[Path, Callable[[Recording, Prior], Figure]]] = {
        "class-maps": (ROCKING, lambda scan, prior: class_maps(scan, prior, around_peak(scan, prior))),
        "siemens-classes": (SIEMENS, lambda scan, prior: class_maps(scan, prior, [25, 75, 125, 175, 225])),
        "reconstruction": (ROCKING, reconstruction),
    }
    for name, (file, draw) in measured.items():
        if _there(file):
            yield name, draw(open_recording(file, "1::2"), _grown(file))
    priors = {file.name: _grown(file) for file in (ROCKING, SIEMENS) if file.exists()}
    if priors:
        yield "elbow", elbow(priors)
    yield "twin", twin_frames({"bragg": 200, "gold_balls": 800})


def prior_pictures() -> Iterator[tuple[str, Figure]]:
    rocking = (open_recording(ROCKING, "1::2"), _grown(ROCKING)) if _there(ROCKING) else None
    yield from pictures_prior.pictures(rocking, max(RESULTS.glob("*-prior.jsonl")))


def mosaic_pictures() -> Iterator[tuple[str, Figure]]:
    for file in (SIEMENS, BALLS):
        _there(file)
    yield from pictures_mosaic.pictures(SIEMENS, BALLS, max(RESULTS.glob("*-scans.jsonl")))


def beamtime_pictures(folder: Path | None) -> Iterator[tuple[str, Figure]]:
    if folder is None:
        sys.stderr.write("no --beamtime FOLDER: its picture is left out\n")
    else:
        yield from pictures_beamtime.pictures(folder)


def _there(file: Path) -> bool:
    if not file.exists():
        sys.stderr.write(f"no {file}: pictures of it are left out\n")
    return file.exists()


@cache
def _grown(file: Path) -> Prior:
    """A prior is grown once, though several pictures ask for it."""
    return grow_prior(open_recording(file, "0::2"))


def around_peak(scan: Recording, prior: Prior) -> list[int]:
    """Five frames of the scan, evenly spaced over those with at least 5e4 photons (the useful ones)."""
    flux = np.array([sp.prepare(scan[i], prior).counts.sum() for i in range(len(scan))])
    useful = np.flatnonzero(flux >= 5e4)
    return [int(useful[at]) for at in np.linspace(0, len(useful) - 1, 5).round().astype(int)]


def class_maps(scan: Recording, prior: Prior, chosen: Sequence[int]) -> Figure:
    """Frames above, their class maps below, the prior's reference map beside them."""
    photons = sp.prepare(np.stack([scan[i] for i in chosen]), prior)
    classes = sp.classify(photons, prior)
    figure, axes = plt.subplots(2, len(chosen) + 1, figsize=(2.05 * (len(chosen) + 1), 5.3), layout="constrained")
    norm = LogNorm(1, float(photons.counts.max()))
    shades = np.array(COLOURS)[np.arange(len(prior.class_names)) % len(COLOURS)]
    for column, i in enumerate(chosen):
        counts, ids = photons.counts[column], classes.ids[column]
        shown = axes[0, column].imshow(np.maximum(counts, 1), norm=norm, cmap="viridis")
        axes[0, column].set_title(f"frame {scan.origin(i)}\n{counts.sum():.3g} photons")
        _paint_classes(axes[1, column], ids, shades)
        axes[1, column].set_title(f"IoU to reference, class by class\n{_ious(ids, prior)}", fontsize=6.5)
    # The corner above the reference map is free for the scale of the counts.
    axes[0, -1].set_axis_off()
    figure.colorbar(shown, cax=axes[0, -1].inset_axes((0.05, 0.0, 0.08, 1.0)), label="photons a pixel")
    _paint_classes(axes[1, -1], prior.reference, shades)
    axes[1, -1].set_title("reference: classes of\nthe mean training frame")
    keys = [Patch(color=shade, label=_named(name)) for name, shade in zip(prior.class_names, shades, strict=True)]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys), frameon=False)
    number = len(prior.class_names)
    figure.suptitle(f"{scan.name}: {number} pixel classes grown on even frames, applied to odd ones; axes in pixels of the prepared frame")
    return figure


def reconstruction(scan: Recording, prior: Prior) -> Figure:
    """The brightest frame, its model after 50 steps of error reduction, amplitude and phase of the object, chi2 beside its floor."""
    flux = np.array([sp.prepare(scan[i], prior).counts.sum() for i in range(len(scan))])
    brightest = int(flux.argmax())
    photons = sp.prepare(scan[brightest], prior)
    start = sp.match(photons, prior)
    solved = sp.refine(photons, start, iterations=50)
    psi = solved.psi[0]
    figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), layout="constrained")
    norm = LogNorm(1, float(photons.counts.max()))
    _image(
        axes[0],
        np.maximum(photons.counts[0], 1),
        f"measured, frame {scan.origin(brightest)}\n{flux[brightest]:.3g} photons",
        "viridis",
        norm=norm,
    )
    model = np.abs(_transform(psi)) ** 2
    _image(axes[1], np.maximum(model, 1), f"|F psi|² after 50 ER\nR-factor {solved.r_factor[0]:.3f}", "viridis", norm=norm)
    _show_object(axes[2:4], psi, solved.support[0], prior)
    history = solved.history[0]
    axes[4].semilogy(np.arange(1, len(history) + 1), history, color=COLOURS[2], label=f"chi², {history[-1]:.4f} at the end")
    axes[4].axhline(solved.floor[0], color=COLOURS[1], linestyle="--", label=f"photon noise alone, {solved.floor[0]:.4f}")
    axes[4].set(xlabel="iteration", title=f"chi² over its floor: {history[-1] / solved.floor[0]:.1f}")
    axes[4].legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 0.1))
    figure.suptitle(f"{scan.name}: 50 steps of error reduction from the nearest prototype, number {start.unit[0, 0]}; axes in pixels")
    return figure


def elbow(priors: dict[str, Prior]) -> Figure:
    """Inertia of the gathered SOM units and silhouette over the number of classes, with the number that was chosen."""
    figure, axes = plt.subplots(1, len(priors), figsize=(5.2 * len(priors), 3.4), layout="constrained", squeeze=False)
    for axis, (name, prior) in zip(axes[0], priors.items(), strict=True):
        numbers, inertia = prior.training["elbow_k"], prior.training["elbow_inertia"]
        chosen = len(prior.class_names)
        (left,) = axis.plot(numbers, inertia / inertia[0], "o-", color=COLOURS[2], label="inertia, part of that of two classes")
        other = axis.twinx()
        (right,) = other.plot(numbers, prior.training["silhouette"], "s--", color=COLOURS[1], label="silhouette (right)")
        line = axis.axvline(chosen, color="0.4", linestyle=":", label=f"chosen: {chosen} classes")
        axis.set(xlabel="classes", ylabel="inertia", ylim=(0, 1.05), title=name)
        other.set(ylabel="silhouette", ylim=(0, 1.05))
        axis.legend(handles=[left, right, line], frameon=False)
    return figure


def twin_frames(frames: dict[str, int]) -> Figure:
    """One frame of each scenario with the truth behind it."""
    figure, axes = plt.subplots(len(frames), 3, figsize=(10.5, 3.3 * len(frames)), layout="constrained")
    for row, (name, index) in zip(axes, frames.items(), strict=True):
        twin = build(load_scenario(name))
        counts, truth = twin.frame(index), twin.truth(index)
        measured = np.where(truth.valid, np.maximum(counts, 1), np.nan)
        bad = int(np.count_nonzero(~truth.valid))
        title = f"{name}, frame {index}: {counts.sum(where=truth.valid):.3g} photons, {bad} bad pixels"
        _image(row[0], measured, title, "viridis", norm=LogNorm(1, float(np.nanmax(measured))), label="photons a pixel")
        _show_truth(row[1:], truth.object)
    figure.suptitle("The digital twin: what the detector sees and what is behind it; axes in pixels")
    return figure


def _show_truth(axes: Any, psi: Any) -> None:
    """Amplitude and phase of what is behind a frame, cut to the object with a margin where it does not fill the field."""
    amplitude, phase = np.abs(psi), np.angle(psi)
    rows, columns = np.nonzero(amplitude > 0.01 * amplitude.max())
    shown = amplitude > ENOUGH * amplitude.max()
    title = f"truth: amplitude, {amplitude.min():.3g} to {amplitude.max():.3g}"
    _image(axes[0], amplitude, title, "viridis")
    title = f"truth: phase, {phase[shown].min():.2f} to {phase[shown].max():.2f} rad"
    _image(axes[1], np.where(shown, phase, np.nan), title, "twilight", vmin=-np.pi, vmax=np.pi)
    height, width = amplitude.shape
    for axis in axes:
        axis.set_xlim(max(columns.min() - 8, 0) - 0.5, min(columns.max() + 8, width - 1) + 0.5)
        axis.set_ylim(min(rows.max() + 8, height - 1) + 0.5, max(rows.min() - 8, 0) - 0.5)


def _show_object(axes: Any, psi: Any, support: Any, prior: Prior) -> None:
    """Amplitude and phase inside the prior's object box, with the support's outline; the phase's mean is taken off."""
    rows, columns = prior.object_box
    extent = (columns.start - 0.5, columns.stop - 0.5, rows.stop - 0.5, rows.start - 0.5)
    part = psi[prior.object_box]
    amplitude = np.abs(part)
    # A global phase is free: the amplitude-weighted mean phasor becomes real.
    phase = np.angle(part * np.exp(-1j * np.angle(np.sum(part * amplitude))))
    shown = amplitude > ENOUGH * amplitude.max()
    area = np.count_nonzero(support)
    _image(axes[0], amplitude, f"amplitude, to {amplitude.max():.3g}\nsupport of {area} pixels outlined", "viridis", extent=extent)
    spread = float(np.sqrt(np.average(phase[shown] ** 2, weights=amplitude[shown] ** 2)))
    title = f"phase, rms {spread:.2f} rad\nwhere the amplitude exceeds {ENOUGH:.0%}"
    _image(axes[1], np.where(shown, phase, np.nan), title, "twilight", vmin=-np.pi, vmax=np.pi, extent=extent)
    for axis in axes:
        axis.contour(
            np.arange(columns.start, columns.stop),
            np.arange(rows.start, rows.stop),
            support[prior.object_box],
            [0.5],
            colors=COLOURS[1],
        )


def _image(axis: Any, values: Any, title: str, colours: str, label: str = "", **more: Any) -> None:
    """One picture with its colour bar; NaN is grey."""
    chart = plt.get_cmap(colours).copy()
    chart.set_bad("0.55")  # neither end of viridis nor any phase of twilight is a middle grey
    shown = axis.imshow(values, cmap=chart, **more)
    axis.set_title(title)
    axis.figure.colorbar(shown, ax=axis, shrink=0.75, label=label)


def _paint_classes(axis: Any, ids: Any, shades: Any) -> None:
    number = len(shades)
    axis.imshow(np.where(ids == NOT_MEASURED, number, ids), cmap=ListedColormap([*shades, UNMEASURED]), vmin=-0.5, vmax=number + 0.5)


def _ious(ids: Any, prior: Prior) -> str:
    both = [np.sum((ids == k) & (prior.reference == k)) for k in range(len(prior.class_names))]
    either = [np.sum((ids == k) | (prior.reference == k)) for k in range(len(prior.class_names))]
    return "  ".join(f"{b / max(e, 1):.2f}" for b, e in zip(both, either, strict=True))


def _named(name: str) -> str:
    return name.replace("_", " ")


def _transform(psi: Any) -> Any:
    """The forward model: the unitary transform of the centred field."""
    return np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(psi), norm="ortho"))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, pil_kwargs={"optimize": True})
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE / "pictures")
    parser.add_argument("--only", choices=("frames", "prior", "mosaic", "beamtime"))
    parser.add_argument("--beamtime", type=Path, help="folder of a simulated beamtime")
    main(**vars(parser.parse_args()))
