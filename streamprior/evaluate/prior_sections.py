"""Prior -> the report's sections on what was learned: classes, centroids, prototypes."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from streamprior.evaluate.drawing import UNMEASURED, class_colour, class_map, drawn, image, new_figure, plane
from streamprior.evaluate.judge import median
from streamprior.evaluate.metrics import PRESENT, phase_origin
from streamprior.evaluate.page import Picture, Section, Table
from streamprior.prior import FEATURES, Library, Prior

_CENTROID_WORDS = (
    "Centroids in physical terms: what the pixels of each class have in common on the training frames, at the prior's dose; features are "
    "the raw ones."
)
_LIBRARY_WORDS = (
    "Objects that a frame may start from, at the place of their unit on the map of the frames: neighbours have similar diffraction. The "
    "number is the prototype's, as the column unit of the frames table names it; in brackets the training frames that it stands for. "
    "Where several share a unit, the one that stands for the most is shown. Phase where the amplitude exceeds 10 %."
)
_ELBOW_WORDS = (
    "The inertia's elbow gives the number of classes; a silhouette that peaks elsewhere is a reason to overrule it, "
    "with streamprior train --classes."
)
_QUALITY = {
    "stability_seeds": "agreement of class maps over seeds (mean adjusted Rand index, 1 for the same map)",
    "stability_frames": "agreement of class maps grown on disjoint halves of the frames (the same)",
    "quantization_error": "mean distance of a pixel from its SOM unit, PCA units",
    "topographic_error": "share of pixels whose two nearest SOM units are no neighbours",
}
_PER_CLASS = {
    "class_share": "share of pixels",
    "class_mean_radius": "radius, px",
    "class_std_radius": "± px",
    "class_mean_intensity": "photons a pixel",
}
_PROFILES = {
    "profile_share": ("share of the pixels", "where each class lies"),
    "profile_photons": ("photons a pixel", "how bright it is there"),
}


def prior_sections(prior: Prior) -> list[Section]:
    """Sections on the pixel classes and, where the prior has a library, on its prototypes."""
    sections = [_classes(prior)]
    if prior.library is not None:
        sections.append(_prototypes(prior.library))
    return sections


def _prototypes(library: Library) -> Section:
    numbers: dict[str, Any] = {
        "prototypes": len(library.psi),
        "training frames": len(library.unit),
        "of several frames": int(np.sum(library.members > 1)),
        "median coherence of these": median(library.coherence[library.members > 1]),
        "pixels of a support, median": median(library.support.reshape(len(library.support), -1).sum(1)),
        "pixels of the control's support": int(library.control.sum()),
        "gate, percentile of their own distances": float(library.gate),
    }
    return Section(
        "Prototypes of the prior", [Picture("prior-prototypes", drawn(library_picture, library), _LIBRARY_WORDS), Table([numbers])]
    )


def _classes(prior: Prior) -> Section:
    words = (
        "Which pixel belongs to which class in the mean training frame, the share of each class's pixels at every radius, "
        "and how bright they are there."
    )
    parts: list[Any] = [Picture("prior-classes", drawn(classes_picture, prior), words), Table(_centroid_rows(prior), _CENTROID_WORDS)]
    quality = {words: float(np.mean(prior.training[key])) for key, words in _QUALITY.items() if key in prior.training}
    if quality:
        parts.append(Table([{"number": words, "value": value} for words, value in quality.items()]))
    if "elbow_k" in prior.training:
        parts.append(Picture("prior-elbow", drawn(elbow_picture, prior), _ELBOW_WORDS))
    return Section("Pixel classes of the prior", parts)


def _centroid_rows(prior: Prior) -> list[dict[str, Any]]:
    training = prior.training
    rows = []
    for k, name in enumerate(prior.class_names):
        row: dict[str, Any] = {"class": name}
        row |= {words: float(training[key][k]) for key, words in _PER_CLASS.items() if key in training}
        if "class_features" in training:
            numbers = training["class_features"][k]
            row |= {f"mean feature|{feature.replace('_', ' ')}": float(value) for feature, value in zip(FEATURES, numbers, strict=True)}
        rows.append(row)
    return rows


def classes_picture(prior: Prior) -> Figure:
    """The reference map; where training says so, each class's share of the pixels at every radius and their mean photons."""
    profiles = [key for key in ("profile_share", "profile_photons") if key in prior.training]
    figure, axes = new_figure(1, 1 + len(profiles), (4.6 * (1 + len(profiles)), 4.2))
    number = len(prior.class_names)
    class_map(axes[0, 0], prior.reference, number, "class map of the mean training frame")
    keys = [Patch(color=class_colour(k), label=name.replace("_", " ")) for k, name in enumerate(prior.class_names)]
    if prior.invalid.any():
        keys.append(Patch(color=UNMEASURED, label="not measured"))
    shown = min(prior.reference.shape) // 2  # beyond, a ring is cut by the frame's edge
    for axis, key in zip(axes[0, 1:], profiles, strict=True):
        for k, profile in enumerate(prior.training[key]):
            axis.plot(np.arange(shown), profile[:shown], color=class_colour(k), lw=2)
        axis.set(xlabel="radius, pixels", ylabel=_PROFILES[key][0], title=_PROFILES[key][1])
    if "profile_photons" in profiles:
        axes[0, -1].set_yscale("log")
        axes[0, -1].set_ylim(bottom=max(1e-2, axes[0, -1].get_ylim()[0]))
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))
    return figure


def elbow_picture(prior: Prior) -> Figure:
    """Inertia and silhouette over the number of classes, with the number that was chosen."""
    figure, axes = new_figure(1, 1, (6.4, 3.8))
    axis = axes[0, 0]
    numbers, inertia = prior.training["elbow_k"], prior.training["elbow_inertia"]
    (left,) = axis.plot(numbers, inertia / inertia[0], "o-", color="#0072b2", label="inertia, part of the first")
    other = axis.twinx()
    (right,) = other.plot(numbers, prior.training["silhouette"], "s--", color="#d55e00", label="silhouette (right)")
    chosen = len(prior.class_names)
    line = axis.axvline(chosen, color="0.4", linestyle=":", label=f"chosen: {chosen} classes")
    axis.set(xlabel="classes", ylabel="inertia", ylim=(0, 1.05), title="how many classes: the elbow of the inertia")
    other.set(ylabel="silhouette", ylim=(0, 1.05))
    other.spines["right"].set_visible(True)
    axis.legend(handles=[left, right, line])
    return figure


def library_picture(library: Library) -> Figure:
    """Amplitude and phase of the prototypes, each in the tile of its unit."""
    rows, columns = (int(extent) + 1 for extent in library.place.max(0))
    seen = plane(np.asarray(library.support.any(0)))
    box = tuple(slice(int(found.min()), int(found.max()) + 1) for found in np.nonzero(seen)) if seen.any() else (slice(None), slice(None))
    height, width = seen[box].shape
    amplitude = np.full((rows * (height + 1), columns * (width + 1)), np.nan)
    phase = amplitude.copy()
    figure, axes = new_figure(1, 2, (15.0, 1.2 + 7.0 * amplitude.shape[0] / amplitude.shape[1]))
    for number in _foremost(library):
        psi = plane(library.psi[number])[box]
        size = np.abs(psi) / (np.abs(psi).max() or 1.0)
        row, column = int(library.place[number, 0]) * (height + 1), int(library.place[number, 1]) * (width + 1)
        tile = slice(row, row + height), slice(column, column + width)
        amplitude[tile], phase[tile] = size, np.where(size > PRESENT, np.angle(psi * phase_origin(psi)), np.nan)
        words = f"{number} ({library.members[number]})"
        axes[0, 0].text(column + 0.5, row + 0.5, words, color="white", fontsize=7, va="top")
    image(axes[0, 0], amplitude, f"amplitude, {len(library.psi)} prototypes on {rows} x {columns} units", "cividis", vmin=0, vmax=1)
    image(axes[0, 1], phase, "phase", "twilight", "rad", vmin=-np.pi, vmax=np.pi)
    return figure


def _foremost(library: Library) -> list[int]:
    """Of the prototypes that share a place, the one with the most members."""
    best: dict[tuple[int, ...], int] = {}
    for number in np.argsort(-library.members, kind="stable"):
        best.setdefault(tuple(library.place[number].tolist()), int(number))
    return sorted(best.values())
