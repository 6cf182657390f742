"""Photons -> Classes: nearest frozen centroid, one fused pass."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import bare_kernel, inlined, kernel
from streamprior.jit.wide import WIDE, choose, load, root, spread, store_bytes, total, where
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Batch, Classes, Photons
from streamprior.stages.features import (
    F32,
    REACH,
    Scratch,
    beam_angle,
    feature_lanes,
    frame_scale,
    gaussian_taps,
    next_row,
    open_window,
    positive,
    scratch_rows,
)

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.float32))

LARGE = 2**20
"""Pixels from which on a frame that comes alone is worth more than one thread: two of them wait for each other for some 50 us."""

AXES = 9
"""Components that the kernel can hold; it always computes the first six, the others where a prior keeps more."""


def classify(counts: Photons | npt.NDArray[Any], prior: Prior) -> Classes:
    """Give every pixel the class of its nearest centroid.

    Each frame is scaled to the prior's mean count; nine features a pixel are scaled, projected (PCA) and compared with the
    frozen centroids (docs/physics.md section 3).

    Parameters
    ----------
    counts : Photons, or (B, H, W) uint8, uint16, uint32 or float32, photons
        Prepared frames. With a plain array the pixels that the prior marks invalid are the ones not measured.
    prior : Prior

    Returns
    -------
    Classes
        ids (B, H, W) uint8, NOT_MEASURED on invalid pixels; distance (B,) float32, mean over valid pixels of the Euclidean distance
        between a pixel and its centroid in PCA space, NaN where no pixel is valid.

    Raises
    ------
    TypeError
        Counts of another dtype.
    ValueError
        Counts of another shape than the prior's, or not finite.
    """
    classifier = Classifier(prior)
    if isinstance(counts, Photons):
        return classifier.classes(counts.counts, counts.valid)
    array = np.asarray(counts)
    if array.dtype not in DTYPES:
        raise TypeError(
            f"counts are {array.dtype}; classify takes uint8, uint16, uint32 and float32 in this machine's byte order: "
            "convert with counts.astype(np.float32), or prepare raw frames with streamprior.prepare(frames, prior)"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError("counts are not finite: prepare raw frames with streamprior.prepare(frames, prior), which marks such pixels")
    return classifier.classes(np.ascontiguousarray(array), ~prior.invalid)


class Classifier:
    """The stage: owns the folded weights of one prior and scratch rows; one for each worker.

    Parameters
    ----------
    prior : Prior
    threads : int
        Cores for a frame that comes alone and has more than `LARGE` pixels; the result has the same bits with any number of them.
    """

    name = "classify"

    def __init__(self, prior: Prior, threads: int = 1) -> None:
        self._shape = prior.geometry.shape
        self._normaliser = float(prior.normaliser)
        self._tables = turn_axes(prior)
        parts = min(threads, self._shape[0]) if self._shape[0] * self._shape[1] > LARGE else 1
        self._scratch = [scratch_rows(self._shape) for _ in range(parts)]
        self._pool = ThreadPoolExecutor(parts - 1, "classify") if parts > 1 else None

    def __call__(self, batch: Batch) -> Batch:
        if batch.photons is None:
            raise ValueError("the batch holds no photons: prepare comes before classify")
        return replace(batch, classes=self.classes(batch.photons.counts, batch.photons.valid))

    def classes(self, counts: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> Classes:
        """Classes of counts (B, H, W), contiguous; valid is (H, W) or (B, H, W). Only what is returned is allocated.

        Raises ValueError where the shapes are not the prior's.
        """
        if counts.ndim != 3 or counts.shape[1:] != self._shape:
            raise ValueError(f"counts have shape {counts.shape}, this prior classifies (B, {self._shape[0]}, {self._shape[1]})")
        if valid.shape not in (self._shape, counts.shape):
            raise ValueError(f"valid has shape {valid.shape}, the counts {counts.shape}")
        ids = np.empty(counts.shape, np.uint8)
        distance = np.empty(len(counts), F32)
        masks = valid.reshape(-1, *self._shape)
        if self._pool is None or len(counts) != 1:
            _classify(counts, masks, self._normaliser, self._tables, self._scratch[0], (0, self._shape[0]), ids, distance)
        else:
            self._in_parts(self._pool, counts, masks, ids, distance)
        return Classes(ids, distance)

    def _in_parts(self, pool: ThreadPoolExecutor, counts: npt.NDArray[Any], masks: npt.NDArray[np.bool_], *out: npt.NDArray[Any]) -> None:
        """One frame, a band of rows to each thread; the mean count is taken by each of them, which costs less than a rendezvous."""
        ids, distance = out
        parts = len(self._scratch)
        edges = [self._shape[0] * i // parts for i in range(parts + 1)]
        bands = [(scratch, *rows) for scratch, rows in zip(self._scratch, pairwise(edges), strict=True)]

        def band(scratch: Scratch, first: int, last: int) -> None:
            _classify(counts, masks, self._normaliser, self._tables, scratch, (first, last), ids, np.empty(1, F32))

        running = [pool.submit(band, *one) for one in bands[1:]]
        band(*bands[0])
        sums = self._scratch[0].sums
        for (scratch, first, last), done in zip(bands[1:], running, strict=True):
            done.result()
            sums[first:last] = scratch.sums[first:last]
        distance[0] = _mean(sums, np.float64(np.count_nonzero(masks[0])))


class Tables(NamedTuple):
    """A prior folded for a kernel: K scores and P projections, each an affine form of the raw features.

    weights : (K + P, 9) float32. offsets : (K + P,) float32. classes : K. taps : (9,) float32, the Gaussian.
    angle : (H, W) float32, radians; (0, 0) where no weight asks for it, which is how priors are grown here.
    """

    weights: npt.NDArray[np.float32]
    offsets: npt.NDArray[np.float32]
    classes: int
    taps: npt.NDArray[np.float32]
    angle: npt.NDArray[np.float32]


def fold(prior: Prior) -> Tables:
    """Fold scaling, projection and centroids into affine forms of the raw features.

    With z = C((x - m) s), the squared distance |z - c|^2 is |z|^2 + (|c|^2 - 2 c.z). The first term is common to all classes, the second is
    affine in x: its smallest value over the classes names the class, and with |z|^2 gives the distance.
    """
    projection = prior.pca_components.astype(np.float64) * prior.feature_scale
    shift = -projection @ prior.feature_mean
    centroids = prior.centroids.astype(np.float64)
    weights = np.concatenate([-2.0 * centroids @ projection, projection]).astype(F32)
    offsets = np.concatenate([(centroids**2).sum(1) - 2.0 * centroids @ shift, shift]).astype(F32)
    angle = beam_angle(prior.geometry.shape) if weights[:, 7].any() else np.zeros((0, 0), F32)
    return Tables(weights, offsets, len(centroids), gaussian_taps(), angle)


class Turned(NamedTuple):
    """A prior folded for the kernel of the CPU: components of the raw features, and scores of the components. Each row ends in its offset.

    axes : (9, 10) float32, components turned so that row p asks for no feature before the p-th; features in the order of the prior, but the
    angle last. scores : (K, 10) float32. wide : whether there are more than six components. taps : (9,) float32, the Gaussian. angle :
    (H, W) float32, radians, rows padded to whole registers; (0, 0) where no weight asks for it, which is how priors are grown here.
    """

    axes: npt.NDArray[np.float32]
    scores: npt.NDArray[np.float32]
    wide: bool
    taps: npt.NDArray[np.float32]
    angle: npt.NDArray[np.float32]


def turn_axes(prior: Prior) -> Turned:
    """What `fold` gives, with fewer multiplications and smaller numbers.

    Distances do not change when the axes turn and the origin moves. A QR decomposition makes the projection triangular, and scores of six
    components cost less than scores of nine features; the centroids' mean as origin leaves small numbers to subtract from each other.
    """
    order = [0, 1, 2, 3, 4, 5, 6, 8, 7]
    projection = prior.pca_components.astype(np.float64) * prior.feature_scale
    turn, triangle = np.linalg.qr(projection[:, order])
    centroids = prior.centroids.astype(np.float64)
    origin = centroids.mean(0)
    components = len(triangle)
    axes = np.zeros((AXES, AXES + 1), F32)
    axes[:components, :AXES] = triangle
    axes[:components, AXES] = -(projection @ prior.feature_mean + origin) @ turn
    scores = np.zeros((len(centroids), AXES + 1), F32)
    scores[:, :components] = -2.0 * (centroids - origin) @ turn
    scores[:, AXES] = ((centroids - origin) ** 2).sum(1)
    angle = np.zeros((0, 0), F32)
    if axes[:, 8].any():
        angle = beam_angle(prior.geometry.shape)
        angle = np.pad(angle, ((0, 0), (0, -angle.shape[1] % WIDE)))
    return Turned(axes, scores, components > 6, gaussian_taps(), angle)


@bare_kernel
def _classify(counts, masks, normaliser, tables, scratch, band, ids, distance):  # type: ignore[no-untyped-def]
    """Frame by frame, so that a result does not depend on the batch it came in; of each frame the rows of the band, first to last."""
    first, last = band
    flags, numbers = scratch.flags, scratch.numbers
    height, width = counts.shape[1:]
    for b in range(counts.shape[0]):
        frame, found = counts[b], ids[b]
        valid = masks[b] if masks.shape[0] > 1 else masks[0]
        ratio, pixels = frame_scale(frame, valid, normaliser)
        scale = F32(ratio)
        open_window(frame, first, scale, tables.taps, scratch)
        top = np.int64(first - REACH)
        for y in range(first, last):
            top = next_row(frame, y, top, scale, tables.taps, scratch)
            far = spread(F32(0))
            for x in range(0, width, WIDE):
                row = feature_lanes(scratch.window, x // WIDE, y - top, y - height // 2, x - width // 2, tables.taps)
                nearest, square = _nearest(row, tables, y, x)
                away = root(positive(square))
                if x + WIDE <= width:
                    store_bytes(found, valid, y, x, nearest, np.uint8(NOT_MEASURED))
                    far = far + where(valid, y, x, away)
                else:
                    for i in range(WIDE):
                        flags[0, i] = valid[y, x + i] if x + i < width else False
                    store_bytes(numbers, flags, 0, 0, nearest, np.uint8(NOT_MEASURED))
                    far = far + where(flags, 0, 0, away)
                    for i in range(width - x):
                        found[y, x + i] = numbers[0, i]
            scratch.sums[y] = total(far)
        distance[b] = _mean(scratch.sums, pixels)


@kernel
def _mean(sums, pixels):  # type: ignore[no-untyped-def]
    """Row by row in order; NaN where no pixel is valid."""
    all_rows = np.float64(0)
    for y in range(sums.shape[0]):
        all_rows += sums[y]
    return F32(all_rows / pixels)


@inlined
def _nearest(f, tables, y, x):  # type: ignore[no-untyped-def]
    """(class, squared distance to its centroid) of sixteen pixels with features f.

    The class is kept as a float32, of the same width as the score: a select between equal widths is one instruction.
    """
    w, s = tables.axes, tables.scores
    low = w[0, 9] + w[0, 0] * f[0] + w[0, 1] * f[1] + w[0, 2] * f[2] + w[0, 3] * f[3]
    z0 = low + w[0, 4] * f[4] + w[0, 5] * f[5] + w[0, 6] * f[6] + w[0, 7] * f[7]
    low = w[1, 9] + w[1, 1] * f[1] + w[1, 2] * f[2] + w[1, 3] * f[3]
    z1 = low + w[1, 4] * f[4] + w[1, 5] * f[5] + w[1, 6] * f[6] + w[1, 7] * f[7]
    z2 = w[2, 9] + w[2, 2] * f[2] + w[2, 3] * f[3] + w[2, 4] * f[4] + w[2, 5] * f[5] + w[2, 6] * f[6] + w[2, 7] * f[7]
    z3 = w[3, 9] + w[3, 3] * f[3] + w[3, 4] * f[4] + w[3, 5] * f[5] + w[3, 6] * f[6] + w[3, 7] * f[7]
    z4 = w[4, 9] + w[4, 4] * f[4] + w[4, 5] * f[5] + w[4, 6] * f[6] + w[4, 7] * f[7]
    z5 = w[5, 9] + w[5, 5] * f[5] + w[5, 6] * f[6] + w[5, 7] * f[7]
    z6, z7, z8 = spread(F32(0)), spread(F32(0)), spread(F32(0))
    if tables.wide:
        z6 = w[6, 9] + w[6, 6] * f[6] + w[6, 7] * f[7]
        z7 = w[7, 9] + w[7, 7] * f[7]
        z8 = spread(w[8, 9])
    if tables.angle.size:
        angle = load(tables.angle, y, x)
        z0, z1, z2 = z0 + w[0, 8] * angle, z1 + w[1, 8] * angle, z2 + w[2, 8] * angle
        z3, z4, z5 = z3 + w[3, 8] * angle, z4 + w[4, 8] * angle, z5 + w[5, 8] * angle
        z6, z7, z8 = z6 + w[6, 8] * angle, z7 + w[7, 8] * angle, z8 + w[8, 8] * angle
    best, nearest = spread(F32(np.inf)), spread(F32(0))
    for k in range(s.shape[0]):
        score = s[k, 9] + s[k, 0] * z0 + s[k, 1] * z1 + s[k, 2] * z2 + s[k, 3] * z3 + s[k, 4] * z4 + s[k, 5] * z5
        if tables.wide:
            score = score + s[k, 6] * z6 + s[k, 7] * z7 + s[k, 8] * z8
        nearest = choose(score, best, spread(F32(k)), nearest)
        best = choose(score, best, score, best)
    square = z0 * z0 + z1 * z1 + z2 * z2 + z3 * z3 + z4 * z4 + z5 * z5
    if tables.wide:
        square = square + z6 * z6 + z7 * z7 + z8 * z8
    return nearest, square + best
