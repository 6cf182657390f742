"""One frame and a prior -> classes as others make them: scipy.ndimage with scikit-learn, and MiniSom's own winner."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from streamprior.prior import Prior

Array = npt.NDArray[Any]


def scipy_classes(counts: Array, prior: Prior) -> tuple[Array, float]:
    """Classes (H, W) uint8 and mean distance of one frame, as one would write them at the first try: a pass for each step.

    Raises ImportError where scikit-learn is not installed.
    """
    from sklearn.metrics import pairwise_distances_argmin_min

    nearest, distance = pairwise_distances_argmin_min(projected(counts, prior), prior.centroids)
    return nearest.astype(np.uint8).reshape(counts.shape), float(distance.mean())


def projected(counts: Array, prior: Prior) -> Array:
    """(H * W, P) float32: every pixel's nine features, scaled and projected."""
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
    return np.asarray(((table - prior.feature_mean) * prior.feature_scale) @ prior.pca_components.T)


def minisom_of(prior: Prior) -> Any:
    """A MiniSom whose K units are the prior's centroids. Raises ImportError where it is not installed."""
    from minisom import MiniSom

    units, components = prior.centroids.shape
    som = MiniSom(1, units, components, random_seed=0)
    som.get_weights()[0] = prior.centroids
    return som


def minisom_classes(som: Any, table: Array) -> Array:
    """Classes (N,) uint8 of projected pixels (N, P): its `winner`, pixel by pixel, which is what it offers for mapping."""
    return np.array([som.winner(pixel)[1] for pixel in table], np.uint8)
