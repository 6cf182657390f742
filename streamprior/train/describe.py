"""Class maps of the training frames -> what each class is in physical terms, and its name."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.prior import FEATURES
from streamprior.records import Photons
from streamprior.stages.features import features

HOLE = 0.5
"""A class has a hole in its middle where its share at the centre is below this part of its largest share at any radius."""

CENTRE_PX = 2
"""Pixels from the beam that are the middle: a Bragg peak's core has a radius of three."""

Floats = npt.NDArray[np.float64]


def describe_classes(ids: npt.NDArray[np.uint8], photons: Photons, normaliser: float, number: int) -> dict[str, npt.NDArray[Any]]:
    """What the pixels of each class have in common; for K classes and R whole radii about the beam, from 0 to the corners.

    Parameters
    ----------
    ids : (B, H, W) uint8, class maps of the frames
    photons : Photons of the same frames; valid is (B, H, W)
    normaliser : float, as in `Prior`
    number : int, K

    Returns
    -------
    dict of float64
        class_share (K,), part of the measured pixels. class_mean_radius, class_std_radius (K,), pixels. class_mean_intensity (K,),
        photons at the normaliser's dose. class_features (K, 9), mean raw features in the order of `FEATURES`. profile_share (K, R),
        part of the pixels at each radius. profile_photons (K, R), their mean photons; NaN where the class has none.
    """
    ring = beam_radius(ids.shape[1:])
    whole = np.rint(ring).astype(np.intp)
    sums, squares = np.zeros((number, len(FEATURES))), np.zeros(number)
    pixels, light = np.zeros((number, int(whole.max()) + 1)), np.zeros((number, int(whole.max()) + 1))
    for classes, counts, valid in zip(ids, photons.counts, photons.valid, strict=True):
        maps = features(counts, normaliser, valid)
        for k in range(number):
            members = classes == k
            sums[k] += maps[:, members].sum(1, dtype=np.float64)
            squares[k] += (ring[members] ** 2).sum()
            pixels[k] += np.bincount(whole[members], minlength=pixels.shape[1])
            light[k] += np.bincount(whole[members], maps[0][members], minlength=pixels.shape[1])
    size = np.maximum(pixels.sum(1), 1)
    means = sums / size[:, None]
    radius = means[:, FEATURES.index("radius")]
    return {
        "class_share": pixels.sum(1) / max(pixels.sum(), 1),
        "class_mean_radius": radius,
        "class_std_radius": np.sqrt(np.maximum(squares / size - radius**2, 0)),
        "class_mean_intensity": means[:, FEATURES.index("intensity")],
        "class_features": means,
        "profile_share": pixels / np.maximum(pixels.sum(0), 1),
        "profile_photons": np.divide(light, pixels, out=np.full_like(light, np.nan), where=pixels > 0),
    }


def beam_radius(shape: tuple[int, ...]) -> Floats:
    """(H, W) distance from the beam at (H//2, W//2), pixels."""
    rows, columns = (np.arange(size) - size // 2 for size in shape)
    return np.hypot(rows[:, None], columns[None, :])


def class_names(described: dict[str, npt.NDArray[Any]]) -> tuple[str, ...]:
    """A name for each class, by what `describe_classes` found, each name once.

    background : the class of least intensity. ring : another with a hole in its middle. core : the brightest class, where it has none.
    A single class that is none of these is a halo. Several of a kind are numbered from the first class on (ring_1, ring_2, class_1).
    """
    intensity, share = described["class_mean_intensity"], described["profile_share"]
    middle = share[:, : CENTRE_PX + 1].mean(1)
    # A class that no pixel of the training frames fell into has no intensity; it is not the background for that.
    background = int(np.argmin(np.where(described["class_share"] > 0, intensity, np.inf)))
    brightest = int(np.argmax(intensity))
    kinds = []
    for k in range(len(intensity)):
        if k == background:
            kinds.append("background")
        elif middle[k] < HOLE * share[k].max():
            kinds.append("ring")
        else:
            kinds.append("core" if k == brightest else "class")
    return _numbered(["halo" if kind == "class" and kinds.count("class") == 1 else kind for kind in kinds])


def _numbered(kinds: list[str]) -> tuple[str, ...]:
    return tuple(kind if kinds.count(kind) == 1 else f"{kind}_{kinds[: k + 1].count(kind)}" for k, kind in enumerate(kinds))
