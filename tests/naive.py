"""The obvious version of every fast kernel of classification: scipy.ndimage and scikit-learn, float64, a pass for each step."""

from __future__ import annotations

import numpy as np
from scipy import ndimage
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_argmin_min
from sklearn.preprocessing import StandardScaler

from streamprior.prior import Geometry, Prior, freeze
from streamprior.records import NOT_MEASURED


def features(counts, normaliser, valid=None):
    """(9, H, W) float64 features of one frame, scaled to `normaliser` photons per valid pixel."""
    image = counts.astype(np.float64)
    mean = image[valid].mean() if valid is not None else image.mean()
    if mean > 0 and normaliser > 0:
        image = image * (normaliser / mean)
    height, width = image.shape
    rows, columns = np.mgrid[:height, :width]
    rows, columns = rows - height // 2, columns - width // 2
    mean5 = ndimage.uniform_filter(image, 5, mode="reflect")
    square5 = ndimage.uniform_filter(image**2, 5, mode="reflect")
    down = ndimage.correlate1d(image, [-0.5, 0, 0.5], axis=0, mode="reflect")
    across = ndimage.correlate1d(image, [-0.5, 0, 0.5], axis=1, mode="reflect")
    return np.stack(
        [
            image,
            np.log1p(np.maximum(image, 0)),
            ndimage.uniform_filter(image, 3, mode="reflect"),
            np.sqrt(np.maximum(square5 - mean5**2, 0)),
            ndimage.laplace(image, mode="reflect"),
            np.hypot(down, across),
            np.hypot(rows, columns),
            np.arctan2(rows, columns),
            image - ndimage.gaussian_filter(image, 2.0, mode="reflect", truncate=4.0),
        ]
    )


def classify(counts, prior, valid=None):
    """(ids (H, W) uint8, mean distance) of one frame."""
    known = ~prior.invalid if valid is None else valid
    x = features(counts, prior.normaliser, known).reshape(9, -1).T
    z = ((x - prior.feature_mean) * prior.feature_scale) @ prior.pca_components.astype(np.float64).T
    ids, distance = pairwise_distances_argmin_min(z, prior.centroids.astype(np.float64))
    ids = ids.astype(np.uint8).reshape(counts.shape)
    ids[~known] = NOT_MEASURED
    return ids, distance.reshape(counts.shape)[known].mean()


def prior(frames, classes, angle=0.0, components=6):
    """A prior by k-means on the features of a few frames (B, H, W); `angle` weighs that feature (0 switches it off)."""
    normaliser = float(frames.mean())
    x = np.concatenate([features(frame, normaliser).reshape(9, -1).T[::7] for frame in frames])
    scaler = StandardScaler().fit(x)
    scale = 1 / scaler.scale_
    scale[7] *= angle
    z = (x - scaler.mean_) * scale
    pca = PCA(components, random_state=0).fit(z)
    centroids = KMeans(classes, n_init=1, random_state=0).fit(z @ pca.components_.T).cluster_centers_
    height, width = frames.shape[1:]
    nothing = np.zeros((height, width), bool)
    return freeze(
        Prior(
            geometry=Geometry((height, width), (height // 2, width // 2), (height, width)),
            normaliser=normaliser,
            feature_mean=scaler.mean_.astype(np.float32),
            feature_scale=scale.astype(np.float32),
            pca_components=pca.components_.astype(np.float32),
            centroids=centroids.astype(np.float32),
            class_names=tuple(f"class_{k}" for k in range(classes)),
            reference=np.zeros((height, width), np.uint8),
            support=nothing,
            invalid=nothing,
        )
    )
