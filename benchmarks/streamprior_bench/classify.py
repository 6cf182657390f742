"""Classification, ns a pixel: ours beside what the machine's arithmetic and memory allow, beside scipy + scikit-learn and MiniSom."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from streamprior.prior import Geometry, Prior
from streamprior.stages.classify import Classifier
from streamprior.stages.features import features
from streamprior_bench import limits
from streamprior_bench.measure import Case, absent, beside, rows_of, spread, timed
from streamprior_bench.peers_classify import minisom_classes, minisom_of, projected, scipy_classes

SIZES = (104, 512, 2048)
CLASSES = (3, 7, 49)
PATH_SIZE = 128
COMPONENTS = 6
PEERS = {"scikit-learn": ("sklearn.metrics", "scikit-learn"), "MiniSom": ("minisom", "minisom")}

MINISOM_PIXELS = 2000
"""MiniSom goes pixel by pixel, so that so many tell the cost of each."""

FEATURE_FLOPS = {
    "counts scaled, and their sum for the scale": 2,
    "log intensity: 1 + x, its mantissa, a polynomial of degree 8, and the exponent's multiply-add": 20,
    "local mean: six additions and a factor": 7,
    "local deviation: sums of five along (12, with their squares), down (8), two factors, variance, bound, root": 26,
    "Laplacian: a multiply-add, as its sum of four is the local mean's": 2,
    "gradient: two differences, their squares, root, factor": 7,
    "radius: a multiply-add and a root": 3,
    "residual: 17 symmetric taps along (two of its sums are there already) and down, and a difference": 49,
}
"""Feature -> floating-point operations a pixel in the arrangement of stages/features.py, a multiply-add counted as two. The angle has no
weight and costs nothing."""

WEIGHTED = 8
"""Features with a weight: all but the angle."""


def flops(classes: int, components: int) -> int:
    """Operations a pixel in the arrangement of stages/classify.py: the features; P components, each a multiply-add a feature but for those
    that a triangular projection leaves out; K scores, each a multiply-add a component, a comparison and two choices; a multiply-add for the
    square of each component; sum, bound, root and sum of the distance."""
    projection = sum(2 * (WEIGHTED - p) for p in range(min(components, WEIGHTED)))
    return sum(FEATURE_FLOPS.values()) + projection + classes * (2 * components + 3) + 2 * components + 4


def run(repeats: int = 5, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each size, number of classes and dtype on one core, then for each size on two; contestants interleaved within a row."""
    missing = absent(PEERS)
    yield from missing.values()
    yield from rows_of(cases(missing), repeats, only)


def cases(missing: Collection[str]) -> list[Case]:
    """All rows, without the peers that are missing."""
    alone = [(size, classes, np.float32) for size in SIZES for classes in CLASSES]
    alone += [(PATH_SIZE, 3, dtype) for dtype in (np.float32, np.uint16)]
    return [
        *(Case(f"{_named(*one)}, one core", partial(_one_core, *one, missing)) for one in alone),
        *(Case(f"{_named(size, 3, np.float32)}, two cores", partial(_two_cores, size)) for size in SIZES),
        Case(f"{_named(SIZES[-1], 3, np.float32)}, two cores in a frame", partial(_within_a_frame, SIZES[-1])),
    ]


def _named(size: int, classes: int, dtype: type) -> str:
    return f"{size}x{size} K={classes} {np.dtype(dtype).name}"


def _one_core(size: int, classes: int, dtype: type, missing: Collection[str], repeats: int) -> dict[str, Any]:
    frames = synthetic_frames(size).astype(dtype)
    prior = synthetic_prior(frames, classes)
    classifier, valid = Classifier(prior), ~prior.invalid
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: classifier.classes(frames, valid),
        "streamed": limits.streamed(frames, valid),
        "multiply_adds": limits.multiply_adds(),
    }
    pixels = {"ours": frames.size, "streamed": frames.size}
    if "scikit-learn" not in missing:
        works["scipy"], pixels["scipy"] = lambda: scipy_classes(frames[0], prior), frames[0].size
    if "MiniSom" not in missing:
        som, table = minisom_of(prior), projected(frames[0], prior)[:: max(1, frames[0].size // MINISOM_PIXELS)]
        works["minisom"], pixels["minisom"] = lambda: minisom_classes(som, table), len(table)
    spent = timed(works, repeats)
    agreement = None if "scikit-learn" in missing else _agreement(classifier, frames, prior)
    return _row(spent, pixels, flops(classes, COMPONENTS), frames) | {"label_agreement": agreement, "repeats": repeats}


def _row(
    spent: Mapping[str, Sequence[float]], pixels: Mapping[str, int], flops_a_pixel: int, frames: np.ndarray[Any, Any]
) -> dict[str, Any]:
    """ns a pixel of everyone; the limit is the longer of the two times, as arithmetic and memory work at the same time."""
    each = {name: 1e9 * statistics.median(spent[name]) / number for name, number in pixels.items()}
    rate = limits.FLOPS / statistics.median(spent["multiply_adds"])
    arithmetic = 1e9 * flops_a_pixel / rate
    limit = max(arithmetic, each["streamed"])
    peers = {name: each.get(name) for name in ("scipy", "minisom")}
    return {
        "limit_ns": limit,
        "ours_ns": each["ours"],
        "limit_over_ours": limit / each["ours"],
        "ours_spread": spread(spent["ours"]),
        **{f"{name}_ns": ns for name, ns in peers.items()},
        **{f"{name}_over_ours": None if ns is None else ns / each["ours"] for name, ns in peers.items()},
        "ours_frames_per_s": 1e9 / (each["ours"] * frames[0].size),
        "flops_per_pixel": flops_a_pixel,
        "bytes_per_pixel": 2 * (frames.itemsize + 1) + 1,
        "gflops_per_s": rate / 1e9,
        "arithmetic_ns": arithmetic,
        "memory_ns": each["streamed"],
    }


def _agreement(classifier: Classifier, frames: np.ndarray[Any, Any], prior: Prior) -> float:
    return float(np.mean(classifier.classes(frames[:1], ~prior.invalid).ids[0] == scipy_classes(frames[0], prior)[0]))


def _two_cores(size: int, repeats: int) -> dict[str, Any]:
    """As many frames on each of two threads as on the one beside them."""
    frames = synthetic_frames(size)
    prior = synthetic_prior(frames, 3)
    turns = min(40, max(1, _TURN_PIXELS // frames.size))
    works = [_again(partial(Classifier(prior).classes, frames, ~prior.invalid), turns) for _ in range(2)]
    return _two_over_one(works[0], beside(*works), turns * len(frames), 2 * turns * len(frames), repeats)


_TURN_PIXELS = 2**25
"""Of a thread in one turn: a tenth of a second, as the system takes some milliseconds to move a woken thread to the idle core."""


def _again(work: Callable[[], object], turns: int) -> Callable[[], None]:
    def works() -> None:
        for _ in range(turns):
            work()

    return works


def _within_a_frame(size: int, repeats: int) -> dict[str, Any]:
    """A large frame that comes alone, its rows shared by two threads."""
    frame = synthetic_frames(size)[:1]
    prior = synthetic_prior(frame, 3)
    one, two = (partial(Classifier(prior, threads).classes, frame, ~prior.invalid) for threads in (1, 2))
    return _two_over_one(one, two, 1, 1, repeats)


def _two_over_one(one: Callable[[], object], two: Callable[[], object], frames_one: int, frames_two: int, repeats: int) -> dict[str, Any]:
    """Rates, and what multiply-adds gain from the second core in the same run: that is what the machine gives."""
    sums = [limits.multiply_adds() for _ in range(2)]
    spent = timed({"one": one, "two": two, "one sum": sums[0], "two sums": beside(*sums)}, repeats)
    median = {name: statistics.median(times) for name, times in spent.items()}
    rate_one, rate_two = frames_one / median["one"], frames_two / median["two"]
    return {
        "one_core_frames_per_s": rate_one,
        "two_cores_frames_per_s": rate_two,
        "two_over_one": rate_two / rate_one,
        "limit_two_over_one": 2 * median["one sum"] / median["two sums"],
        "two_spread": spread(spent["two"]),
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
