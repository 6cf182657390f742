"""Classification: ns a pixel of the fused kernel, beside scipy + scikit-learn and beside a plain copy of the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import ndimage
from sklearn.metrics import pairwise_distances_argmin_min
from threadpoolctl import threadpool_limits

from streamprior.prior import Geometry, Prior
from streamprior.stages.classify import Classifier
from streamprior.stages.features import features
from streamprior_bench.measure import interleaved

SIZES = (104, 512, 2048)
CLASSES = (3, 7)
COMPONENTS = 6


def run(repeats: int = 7) -> Iterator[dict[str, Any]]:
    """One measurement a dict: one core, float32 frames, contestants interleaved within the run, medians over `repeats`."""
    with threadpool_limits(1):
        for size in SIZES:
            for classes in CLASSES:
                yield _one(size, classes, repeats)


def _one(size: int, classes: int, repeats: int) -> dict[str, Any]:
    frames = synthetic_frames(size)
    prior = synthetic_prior(frames, classes)
    classifier = Classifier(prior)
    valid = ~prior.invalid
    ids = np.empty(frames.shape, np.uint8)
    copied = np.empty_like(frames)

    def floor() -> None:
        # The bytes that any version must move: counts in, classes out.
        np.copyto(copied, frames)
        ids.fill(0)

    seconds = interleaved(
        {"ours": lambda: classifier.classes(frames, valid), "naive": lambda: _naive(frames[0], prior), "floor": floor}, repeats
    )
    pixels = {"ours": frames.size, "naive": frames[0].size, "floor": frames.size}
    each = {name: 1e9 * seconds[name] / pixels[name] for name in seconds}
    agreement = float(np.mean(classifier.classes(frames, valid).ids[0] == _naive(frames[0], prior)[0]))
    return {
        "size": size,
        "classes": classes,
        "components": COMPONENTS,
        "frames": len(frames),
        "repeats": repeats,
        "ours_ns_per_pixel": round(each["ours"], 3),
        "naive_ns_per_pixel": round(each["naive"], 2),
        "floor_ns_per_pixel": round(each["floor"], 3),
        "naive_over_ours": round(each["naive"] / each["ours"], 1),
        "frames_per_second": round(1e9 / (each["ours"] * size * size), 1),
        "label_agreement": round(agreement, 7),
    }


def synthetic_frames(size: int) -> np.ndarray[Any, Any]:
    """(B, size, size) float32 Poisson counts of a core, a ring and a background; about a million pixels, and at least one frame."""
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    radius = np.hypot(rows, columns)
    ideal = 900 * np.exp(-((radius / 0.03) ** 2)) + 60 * np.exp(-(((radius - 0.2) / 0.03) ** 2)) + 0.5
    rng = np.random.default_rng(0)
    return np.stack([rng.poisson(ideal) for _ in range(max(1, 2**20 // size**2))]).astype(np.float32)


def synthetic_prior(frames: np.ndarray[Any, Any], classes: int) -> Prior:
    """Scaled features, random orthonormal projections, and pixels of the frame as centroids: all that the cost depends on."""
    size = frames.shape[1]
    normaliser = float(frames.mean())
    table = features(frames[0], normaliser).reshape(9, -1).T.astype(np.float64)
    mean, scale = table.mean(0), 1 / table.std(0)
    scale[7] = 0.0
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.normal(size=(9, 9)))[0][:COMPONENTS]
    centroids = ((table[rng.integers(len(table), size=classes)] - mean) * scale) @ components.T
    nothing = np.zeros((size, size), np.bool_)
    return Prior(
        geometry=Geometry((size, size), (size // 2, size // 2), (size, size)),
        normaliser=normaliser,
        feature_mean=mean.astype(np.float32),
        feature_scale=scale.astype(np.float32),
        pca_components=components.astype(np.float32),
        centroids=centroids.astype(np.float32),
        class_names=tuple(f"class_{k}" for k in range(classes)),
        reference=nothing.astype(np.uint8),
        support=nothing,
        invalid=nothing,
    )


def _naive(counts: np.ndarray[Any, Any], prior: Prior) -> tuple[np.ndarray[Any, Any], float]:
    """Classes (H, W) and mean distance of one frame, as one would write them at the first try: a pass for each step."""
    image = counts.astype(np.float32) * np.float32(prior.normaliser / counts.mean())
    height, width = image.shape
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    rows, columns = rows - height // 2, columns - width // 2
    mean5 = ndimage.uniform_filter(image, 5)
    gradient = np.gradient(np.pad(image, 1, mode="symmetric"))
    maps = [
        image,
        np.log1p(image),
        ndimage.uniform_filter(image, 3),
        np.sqrt(np.maximum(ndimage.uniform_filter(image**2, 5) - mean5**2, 0)),
        ndimage.laplace(image),
        np.hypot(*gradient)[1:-1, 1:-1],
        np.hypot(rows, columns),
        np.arctan2(rows, columns),
        image - ndimage.gaussian_filter(image, 2.0),
    ]
    table = np.stack(maps).reshape(len(maps), -1).T
    projected = ((table - prior.feature_mean) * prior.feature_scale) @ prior.pca_components.T
    nearest, distance = pairwise_distances_argmin_min(projected, prior.centroids)
    return nearest.astype(np.uint8).reshape(image.shape), float(distance.mean())
