"""Photons -> Classes: nearest frozen centroid, one fused pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import inlined, kernel
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Batch, Classes, Photons
from streamprior.stages.features import (
    F32,
    REACH,
    aligned,
    beam_angle,
    feature_rows,
    fill_ring,
    frame_scale,
    gaussian_taps,
    load_row,
    scratch_rows,
)

DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.uint32), np.dtype(np.float32))


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
    """The stage: owns the folded weights of one prior, line buffers and scratch rows; one for each thread."""

    name = "classify"

    def __init__(self, prior: Prior) -> None:
        self._shape = prior.geometry.shape
        self._normaliser = float(prior.normaliser)
        self._tables = fold(prior)
        self._scratch = scratch_rows(self._shape[1])
        self._lines = aligned(2, self._scratch.rows.shape[1])

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
        _classify(counts, masks, self._normaliser, self._tables, self._scratch, self._lines, ids, distance)
        return Classes(ids, distance)


class Tables(NamedTuple):
    """A prior folded for the kernel: K scores and P projections, each an affine form of the raw features.

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


@kernel
def _classify(counts, masks, normaliser, tables, scratch, lines, ids, distance):  # type: ignore[no-untyped-def]
    """Frame by frame, so that a result does not depend on the batch it came in."""
    for b in range(counts.shape[0]):
        frame = counts[b]
        valid = masks[b] if masks.shape[0] > 1 else masks[0]
        scale = frame_scale(frame, valid, normaliser)
        fill_ring(frame, scale, scratch.ring)
        total = 0.0
        for y in range(frame.shape[0]):
            load_row(frame, y + REACH, scale, scratch.ring)
            feature_rows(scratch, y, frame.shape, tables.taps)
            if tables.angle.size:
                _angle_row(tables.angle, y, scratch.rows)
            _nearest(tables, scratch.rows, lines)
            _squares(tables, scratch.rows, lines)
            total += _finish(lines, valid, y, ids[b])
        distance[b] = total / np.sum(valid)


@inlined
def _angle_row(angle, y, rows):  # type: ignore[no-untyped-def]
    for x in range(angle.shape[1]):
        rows[7, x] = angle[y, x]


@inlined
def _form(w, rows, x):  # type: ignore[no-untyped-def]
    """The part of an affine form that depends on the pixel."""
    counts = w[0] * rows[0, x] + w[1] * rows[1, x] + w[2] * rows[2, x] + w[3] * rows[3, x]
    edges = w[4] * rows[4, x] + w[5] * rows[5, x] + w[8] * rows[8, x]
    return counts + edges + w[6] * rows[6, x] + w[7] * rows[7, x]


@inlined
def _nearest(tables, rows, lines):  # type: ignore[no-untyped-def]
    """lines[0] <- smallest score of each pixel in the row, lines[1] <- its class.

    The class is kept as a float32, of the same width as the score: a select between equal widths vectorises.
    """
    lines[0] = F32(np.inf)
    for k in range(tables.classes):
        offset = tables.offsets[k]
        w = _weights(tables.weights, k)
        index = F32(k)
        for x in range(rows.shape[1]):
            score = offset + _form(w, rows, x)
            better = score < lines[0, x]
            lines[1, x] = index if better else lines[1, x]
            lines[0, x] = score if better else lines[0, x]


@inlined
def _squares(tables, rows, lines):  # type: ignore[no-untyped-def]
    """lines[0] <- squared distance to the nearest centroid: the smallest score and the square of every projection."""
    for p in range(tables.classes, tables.offsets.shape[0]):
        offset = tables.offsets[p]
        w = _weights(tables.weights, p)
        for x in range(rows.shape[1]):
            z = offset + _form(w, rows, x)
            lines[0, x] += z * z


@inlined
def _weights(weights, i):  # type: ignore[no-untyped-def]
    """Row i as a tuple, which stays in registers while the loop runs."""
    w = weights
    return w[i, 0], w[i, 1], w[i, 2], w[i, 3], w[i, 4], w[i, 5], w[i, 6], w[i, 7], w[i, 8]


@inlined
def _finish(lines, valid, y, ids):  # type: ignore[no-untyped-def]
    """Write one row of classes; returns the sum of its pixels' distances."""
    total = F32(0)
    for x in range(ids.shape[1]):
        ids[y, x] = np.uint8(np.int32(lines[1, x])) if valid[y, x] else np.uint8(NOT_MEASURED)
    for x in range(ids.shape[1]):
        total += np.sqrt(max(lines[0, x], F32(0))) if valid[y, x] else F32(0)
    return np.float64(total)
