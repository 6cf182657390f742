"""Prepared frames -> pixel classes: sampled features, scaling, PCA, a SOM, and its units gathered into few classes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from kneed import KneeLocator
from minisom import MiniSom
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances, silhouette_score

from streamprior.prior import FEATURES
from streamprior.stages.features import features

ANGLE = FEATURES.index("angle")
RADIUS = FEATURES.index("radius")
INTENSITY = FEATURES.index("intensity")

STRATA = 5
"""Steps of radius, and of log intensity, that pixels are drawn from in equal numbers."""

ELBOW = tuple(range(2, 11))
"""Numbers of classes on the elbow curve."""

FEWEST, MOST = 3, 7
"""What the elbow may choose: core, ring and background are expected; more than seven no person can name."""

JUDGED = 2000
"""Pixels that the silhouette is computed from; its cost grows with their square."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class PixelClasses:
    """What a prior keeps of the classes (see `Prior` for shapes) and what a person needs to overrule them (`Prior.training`)."""

    feature_mean: npt.NDArray[np.float32]
    feature_scale: npt.NDArray[np.float32]
    pca_components: npt.NDArray[np.float32]
    centroids: npt.NDArray[np.float32]
    names: tuple[str, ...]
    training: dict[str, npt.NDArray[Any]]


def sample_pixels(
    counts: npt.NDArray[np.float32], valid: npt.NDArray[np.bool_], normaliser: float, pixels: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """(N, 9) features of about `pixels` pixels of (B, H, W) counts; valid is (B, H, W).

    In every frame the same number is drawn from each cell of radius and log intensity, because a core has ten pixels where the background
    has ten thousand, and a uniform sample would not know the core.
    """
    drawn = []
    for frame, known in zip(counts, valid, strict=True):
        table = features(frame, normaliser, known).reshape(len(FEATURES), -1).T[known.ravel()]
        cells = _steps(table[:, RADIUS]) * STRATA + _steps(np.log1p(table[:, INTENSITY]))
        found = np.unique(cells)
        quota = max(1, pixels // (len(counts) * len(found)))
        for cell in found:
            members = np.flatnonzero(cells == cell)
            drawn.append(table[rng.permutation(members)[:quota]])
    return np.concatenate(drawn)[rng.permutation(sum(map(len, drawn)))]


def _steps(values: npt.NDArray[np.float32]) -> npt.NDArray[np.intp]:
    """Which of STRATA equal steps between the smallest and the largest value each value lies in."""
    edges = np.linspace(values.min(), values.max(), STRATA + 1)[1:-1]
    return np.searchsorted(edges, values, side="right")


def grow_classes(
    sample: npt.NDArray[np.float32], variance: float, som_side: int, som_epochs: int, classes: int | None, seed: int
) -> PixelClasses:
    """Pixel classes of a sample (N, 9) of features.

    Scaling and PCA, a self-organising map (Kohonen 1982; MiniSom) on the projections, and k-means over its units, each weighed by its
    pixels. A centroid is the mean of its class's pixels. Without `classes` their number is the elbow of the inertia (Satopaa 2011; kneed).
    """
    raw = sample.astype(np.float64)
    mean, deviation = raw.mean(0), raw.std(0)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 0)
    # The angle has a seam: turning its arbitrary zero by 90 degrees changed a map of five classes to an agreement of ARI 0.28 [measured].
    scale[ANGLE] = 0.0
    scaled = (raw - mean) * scale
    pca = PCA(svd_solver="full").fit(scaled)
    explained = np.cumsum(pca.explained_variance_ratio_)
    components = pca.components_[: int(np.searchsorted(explained, variance - 1e-9)) + 1]
    projected = scaled @ components.T
    units, quality = _map(projected, som_side, som_epochs, seed)
    nearest = pairwise_distances(projected, units).argmin(1)
    hits = np.bincount(nearest, minlength=len(units)).astype(np.float64)
    gathered = {k: _gather(units, hits, k, seed) for k in ELBOW}
    inertia = np.array([gathered[k].inertia_ for k in ELBOW])
    number = classes or _elbow(inertia)
    chosen = gathered.get(number) or _gather(units, hits, number, seed)
    order, members = _in_order(raw, chosen.labels_[nearest], number)
    unit_class = order[chosen.labels_]
    return PixelClasses(
        feature_mean=mean.astype(np.float32),
        feature_scale=scale.astype(np.float32),
        pca_components=components.astype(np.float32),
        centroids=_means(projected, members, number).astype(np.float32),
        names=class_names(number),
        training={
            "elbow_k": np.array(ELBOW),
            "elbow_inertia": inertia,
            "silhouette": _silhouettes(projected, nearest, gathered),
            "som_codebook": units.astype(np.float32),
            "som_class": unit_class.astype(np.uint8),
            "explained_variance": pca.explained_variance_ratio_,
            "class_mean_radius": _means(raw[:, [RADIUS]], members, number)[:, 0],
            "class_mean_intensity": _means(raw[:, [INTENSITY]], members, number)[:, 0],
            **quality,
        },
    )


def class_names(number: int) -> tuple[str, ...]:
    """Names in canonical order: core first, background last."""
    between = ("ring",) if number == 3 else tuple(f"class_{k}" for k in range(1, number - 1))
    return ("core", *between, "background")


def _map(projected: Floats, side: int, epochs: int, seed: int) -> tuple[Floats, dict[str, npt.NDArray[Any]]]:
    """Units (side * side, P) of a trained SOM, and its two error numbers."""
    # A neighbourhood of a third of the map orders it, and MiniSom lets it shrink from there.
    som = MiniSom(side, side, projected.shape[1], sigma=side / 3, learning_rate=0.5, random_seed=seed)
    if projected.shape[1] > 1:
        som.pca_weights_init(projected)
    else:
        som.random_weights_init(projected)
    som.train(projected, epochs * len(projected))
    quality = {
        "quantization_error": np.array(som.quantization_error(projected)),
        "topographic_error": np.array(som.topographic_error(projected)),
    }
    return som.get_weights().reshape(side * side, -1), quality


def _gather(units: Floats, hits: Floats, number: int, seed: int) -> Any:
    """k-means of the units, each weighed by its pixels: fitted, with labels_ and inertia_."""
    return KMeans(number, n_init=10, random_state=seed).fit(units, sample_weight=hits)


def _elbow(inertia: Floats) -> int:
    """The number of classes at the knee of the curve, within FEWEST..MOST; FEWEST where there is no knee."""
    with warnings.catch_warnings():  # kneed warns where it finds none, and says so by None as well
        warnings.simplefilter("ignore")
        knee = KneeLocator(ELBOW, inertia, curve="convex", direction="decreasing").knee
    return min(max(int(knee or FEWEST), FEWEST), MOST)


def _in_order(raw: Floats, labels: npt.NDArray[Any], number: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Canonical ids: (number,) new id of each old one, and the (N,) new ids of the pixels.

    By mean radius to a whole pixel, then the brighter first. Without it ids jump between trainings (0.30 raw agreement at ARI 0.96).
    """
    radius = np.round(_means(raw[:, [RADIUS]], labels, number)[:, 0])
    intensity = _means(raw[:, [INTENSITY]], labels, number)[:, 0]
    new = np.empty(number, np.intp)
    new[np.lexsort((-intensity, radius))] = np.arange(number)
    return new, new[labels]


def _means(values: Floats, labels: npt.NDArray[Any], number: int) -> Floats:
    """(number, ...) mean of each class's rows; a class without pixels keeps the mean of all."""
    return np.stack([values[labels == k].mean(0) if (labels == k).any() else values.mean(0) for k in range(number)])


def _silhouettes(projected: Floats, nearest: npt.NDArray[Any], gathered: dict[int, Any]) -> Floats:
    """(len(ELBOW),) mean silhouette (Rousseeuw 1987) of the first JUDGED pixels (the sample is shuffled).

    NaN where one class holds them all.
    """
    distances = pairwise_distances(projected[:JUDGED])
    np.fill_diagonal(distances, 0.0)
    scores = []
    for k in ELBOW:
        labels = gathered[k].labels_[nearest[:JUDGED]]
        found = len(np.unique(labels))
        scores.append(silhouette_score(distances, labels, metric="precomputed") if 2 <= found < len(labels) else np.nan)
    return np.array(scores)
