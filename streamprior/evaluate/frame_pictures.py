"""One frame and what became of it -> a picture: measured, model, residual, object beside the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from streamprior.evaluate.compare import Agreement, compare
from streamprior.evaluate.drawing import MEASURED_LINE, MODEL_LINE, class_map, image, new_figure, plane
from streamprior.evaluate.judge import Judged
from streamprior.evaluate.metrics import PRESENT, model_of, phase_origin, radial_profile, residuals
from streamprior.prior import Prior
from streamprior.records import Photons
from streamprior.stages.classify import classify

MARGIN_PX = 4
"""Empty pixels around the object that are shown."""


def frame_picture(judged: Judged, prior: Prior, place: int) -> Figure:
    """Two rows: the diffraction as measured, as modelled and what is left; the object beside its reference."""
    comparison, arm = judged.comparison, judged.shown
    counts, valid, psi = comparison.counts[place], comparison.valid[place], arm.psi[place]
    found = compare(psi, comparison.reference[place])
    figure, axes = new_figure(2, 5, (15.5, 6.3))
    _draw_diffraction(axes[0], counts, valid, psi)
    _draw_classes(axes[1, 0], counts, valid, prior)
    _draw_objects(axes[1, 1:], found, comparison.reference[place], comparison.reference_is)
    figure.suptitle(_headline(judged, place, found))
    return figure


def _headline(judged: Judged, place: int, found: Agreement) -> str:
    comparison, arm = judged.comparison, judged.shown
    photons = float(comparison.counts[place].sum(where=comparison.valid[place], dtype=np.float64))
    ratio = arm.chi2[place] / arm.floor[place] if arm.floor[place] > 0 else np.nan
    fate = "abstained: beyond the gate, the control ran on" if arm.abstained[place] else f"kept: {arm.kept[place]}"
    return (
        f"{comparison.title}, frame {comparison.frames[place]}: {photons:.3g} photons, chi² {arm.chi2[place]:.4f} "
        f"({ratio:.1f} x noise floor), object error {found.error:.2f}, {fate}"
    )


def _draw_diffraction(axes: Any, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_], psi: npt.NDArray[Any]) -> None:
    seen, shown = plane(counts), plane(valid)
    model = model_of(psi) ** 2
    norm = LogNorm(0.5, max(float(seen.max(where=shown, initial=1.0)), 1.0))
    image(axes[0], np.where(shown, np.maximum(seen, 0.5), np.nan), "measured", "viridis", "photons", norm=norm)
    image(axes[1], np.maximum(plane(model), 0.5), "model |F psi|²", "viridis", "photons", norm=norm)
    left = residuals(counts, valid, psi)
    image(axes[2], plane(left), "model - measured", "RdBu_r", "noise deviations", vmin=-5, vmax=5)
    _draw_profile(axes[3], counts, valid, model)
    _draw_histogram(axes[4], left)


def _draw_profile(axis: Any, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_], model: npt.NDArray[Any]) -> None:
    radius, measured = radial_profile(counts, valid)
    _, modelled = radial_profile(model, valid)
    axis.semilogy(radius, np.maximum(measured, 1e-3), color=MEASURED_LINE, lw=2.2, label="measured")
    axis.semilogy(radius, np.maximum(modelled, 1e-3), color=MODEL_LINE, lw=1.3, label="model")
    axis.set(xlabel="radius, pixels", ylabel="mean photons a pixel", title="radial profile")
    axis.legend()


def _draw_histogram(axis: Any, left: npt.NDArray[np.float64]) -> None:
    known = left[np.isfinite(left)]
    edges = np.linspace(-6, 6, 61)
    axis.hist(np.clip(known, -6, 6), edges, density=True, color="#56b4e9", label="pixels")
    middle = (edges[1:] + edges[:-1]) / 2
    axis.plot(middle, np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi), color=MEASURED_LINE, lw=1.3, label="photon noise alone")
    axis.set_yscale("log")
    axis.set(xlabel="model - measured, noise deviations", ylabel="density", ylim=(1e-4, None), title="histogram of residuals")
    axis.legend(loc="upper left", fontsize=8)


def _draw_classes(axis: Any, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_], prior: Prior) -> None:
    if counts.shape != prior.geometry.shape:
        axis.set_axis_off()  # a volume has no class map
        return
    photons = Photons(np.ascontiguousarray(counts[None], np.float32), valid[None], np.zeros(1, np.uint32))
    class_map(axis, classify(photons, prior).ids[0], len(prior.class_names), "pixel classes")


def _draw_objects(axes: Any, found: Agreement, reference: npt.NDArray[Any], reference_is: str) -> None:
    goal = plane(reference)
    turn = phase_origin(goal)
    pair = ((plane(found.psi) * turn, "retrieved"), (goal * turn, reference_is))
    largest = float(np.abs(goal).max()) or 1.0
    window = _window(np.maximum(*(np.abs(one) for one, _ in pair)) > PRESENT * largest)
    for column, (psi, name) in enumerate(pair):
        amplitude = np.abs(psi[window]) / largest
        image(axes[column], amplitude, f"amplitude, {name}", "cividis", vmin=0, vmax=1.1)
        phase = np.where(amplitude > PRESENT, np.angle(psi[window]), np.nan)
        image(axes[2 + column], phase, f"phase, {name}", "twilight", "rad", vmin=-np.pi, vmax=np.pi)
    axes[0].set_xlabel(f"SSIM {found.ssim:.3f}, PSNR {found.psnr:.1f} dB")
    axes[2].set_xlabel(f"SSIM {found.phase_ssim:.3f}, PSNR {found.phase_psnr:.1f} dB")


def _window(present: npt.NDArray[np.bool_]) -> tuple[slice, slice]:
    """A square around what is present, so that objects keep their shape and pictures their size."""
    rows, columns = np.nonzero(present) if present.any() else np.nonzero(np.ones_like(present))
    half = max(int(np.ptp(rows)), int(np.ptp(columns))) // 2 + 1 + MARGIN_PX
    middle = (int(rows.min()) + int(rows.max()) + 1) // 2, (int(columns.min()) + int(columns.max()) + 1) // 2
    return tuple(slice(max(m - half, 0), min(m + half, n)) for m, n in zip(middle, present.shape, strict=True))  # type: ignore[return-value]
