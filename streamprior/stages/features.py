"""Prepared frame -> nine features of each pixel, row by row: the stencil that classification and training share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import inlined, kernel
from streamprior.prior import FEATURES

REACH = 8
"""Pixels around a pixel that its features look at: a Gaussian of sigma 2 px cut at 4 sigma, scipy.ndimage's default."""

RING = 2 * REACH + 1
"""Rows of a frame that are at hand at one time; a ring of rows stays in the cache where a padded frame would not."""

LANES = 16
"""float32 numbers in the widest vector register (64 bytes). Rows start on such a boundary and are as many times as long, so that
loops have no remainder and loads do not straddle cache lines; the ring's left margin is one register for the same reason."""

F32 = np.float32


class Scratch(NamedTuple):
    """Rows that the stencil works on, float32: a ring of padded rows of the frame, two work rows as long, nine feature rows."""

    ring: npt.NDArray[np.float32]
    work: npt.NDArray[np.float32]
    rows: npt.NDArray[np.float32]


def scratch_rows(width: int) -> Scratch:
    """Scratch for frames of this width; one for each thread."""
    pitch = -(-width // LANES) * LANES
    return Scratch(aligned(RING, pitch + 2 * LANES), aligned(2, pitch + 2 * LANES), aligned(len(FEATURES), pitch))


def aligned(rows: int, pitch: int) -> npt.NDArray[np.float32]:
    """Zeros of (rows, pitch) float32 that start on a register boundary."""
    raw = np.zeros(rows * pitch + LANES, F32)
    skip = -(raw.ctypes.data // 4) % LANES
    return raw[skip : skip + rows * pitch].reshape(rows, pitch)


def features(counts: npt.NDArray[Any], normaliser: float, valid: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float32]:
    """The nine features of every pixel of one frame, for training and for people; the path never stores them.

    Parameters
    ----------
    counts : (H, W) uint8, uint16, uint32 or float32, photons
    normaliser : float
        Mean photons per valid pixel that the frame is scaled to first; 0 leaves the frame as it is.
    valid : (H, W) bool, optional
        Pixels that count for the mean; all by default.

    Returns
    -------
    (9, H, W) float32, in the order of `streamprior.prior.FEATURES`. Radius in pixels, angle in radians.
    """
    frame = np.ascontiguousarray(counts)
    known = np.ones(frame.shape, np.bool_) if valid is None else np.ascontiguousarray(valid)
    maps = np.empty((len(FEATURES), *frame.shape), F32)
    scale = frame_scale(frame, known, normaliser)
    _feature_maps(frame, scale, gaussian_taps(), scratch_rows(frame.shape[1]), maps)
    maps[7] = beam_angle(frame.shape)
    return maps


def beam_angle(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """(H, W) float32: atan2(row, column) about the beam at (H//2, W//2), radians."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return np.asarray(np.arctan2(rows - shape[0] // 2, columns - shape[1] // 2), F32)


def gaussian_taps() -> npt.NDArray[np.float32]:
    """(9,) float32: centre and one side of a normalised Gaussian of sigma 2 px."""
    side = np.exp(-0.5 * (np.arange(REACH + 1) / 2.0) ** 2)
    return np.asarray(side / (side[0] + 2 * side[1:].sum()), F32)


@kernel
def frame_scale(frame, valid, normaliser):  # type: ignore[no-untyped-def]
    """normaliser / mean photons on valid pixels; 1 for a dark frame.

    Without it, centroids of a bright frame are useless at a tenth of its flux (IoU 0 against 0.89, docs/physics.md section 3).
    """
    total = np.float64(0)
    pixels = np.int64(0)
    for y in range(frame.shape[0]):
        row = F32(0)  # summed in float32 along a row, which vectorises, and in float64 over rows
        good = np.int32(0)
        for x in range(frame.shape[1]):
            row += F32(frame[y, x]) if valid[y, x] else F32(0)
            good += np.int32(valid[y, x])
        total += row
        pixels += good
    return F32(normaliser * pixels / total) if total > 0.0 and normaliser > 0.0 else F32(1.0)


@kernel
def _feature_maps(frame, scale, taps, scratch, maps):  # type: ignore[no-untyped-def]
    fill_ring(frame, scale, scratch.ring)
    for y in range(frame.shape[0]):
        load_row(frame, y + REACH, scale, scratch.ring)
        feature_rows(scratch, y, frame.shape, taps)
        for f in range(maps.shape[0]):
            for x in range(maps.shape[2]):
                maps[f, y, x] = scratch.rows[f, x]


@inlined
def fill_ring(frame, scale, ring):  # type: ignore[no-untyped-def]
    """The rows that row 0 needs before `load_row` brings its last one."""
    for y in range(-REACH, REACH):
        load_row(frame, y, scale, ring)


@inlined
def load_row(frame, y, scale, ring):  # type: ignore[no-untyped-def]
    """Scale row y of the frame into its place in the ring, edges mirrored (scipy's "reflect": the edge pixel is repeated)."""
    height, width = frame.shape
    source = mirrored(y, height)
    place = slot(y)
    for x in range(width):
        ring[place, x + LANES] = F32(frame[source, x]) * scale
    for x in range(1, REACH + 1):
        ring[place, LANES - x] = ring[place, LANES + mirrored(-x, width)]
        ring[place, LANES + width - 1 + x] = ring[place, LANES + mirrored(width - 1 + x, width)]


@inlined
def slot(y):  # type: ignore[no-untyped-def]
    """Where row y of the (padded) frame is in the ring."""
    return (y + RING) % RING


@inlined
def mirrored(i, n):  # type: ignore[no-untyped-def]
    folded = i % (2 * n)
    return folded if folded < n else 2 * n - 1 - folded


@inlined
def feature_rows(scratch, y, shape, taps):  # type: ignore[no-untyped-def]
    """Every feature of row y but the angle (a map of its own, rarely used); each loop reads few rows, so that all of them vectorise.

    Rows are indexed, never sliced: a slice costs two reference counts, and there would be fifty a row.
    """
    ring, work, rows = scratch.ring, scratch.work, scratch.rows
    centre = slot(y)
    for x in range(rows.shape[1]):
        rows[0, x] = ring[centre, x + LANES]
    down = F32(y - shape[0] // 2)
    for x in range(rows.shape[1]):
        across = F32(x - shape[1] // 2)
        rows[6, x] = np.sqrt(down * down + across * across)
    _log1p_row(work, rows)
    _neighbour_rows(ring, y, rows)
    _deviation_row(ring, y, work, rows)
    _residual_row(ring, y, taps, work, rows)


@inlined
def _log1p_row(work, rows):  # type: ignore[no-untyped-def]
    """log(1 + intensity), negative counts as 0; without a call per pixel, so that it vectorises.

    Exponent by its bits, mantissa by the polynomial of Abramowitz & Stegun 4.1.44 (absolute error below 3e-8).
    """
    bits = work.view(np.int32)
    for x in range(rows.shape[1]):
        work[0, x] = F32(1) + max(rows[0, x], F32(0))
    for x in range(rows.shape[1]):
        rows[1, x] = F32((bits[0, x] >> 23) - 127)
        bits[0, x] = (bits[0, x] & 0x7FFFFF) | 0x3F800000
    for x in range(rows.shape[1]):
        m = work[0, x] - F32(1)
        p = F32(-0.0064535442) * m + F32(0.0360884937)
        p = p * m + F32(-0.0953293897)
        p = p * m + F32(0.1676540711)
        p = p * m + F32(-0.2407338084)
        p = p * m + F32(0.3317990258)
        p = p * m + F32(-0.4998741238)
        p = p * m + F32(0.9999964239)
        rows[1, x] = rows[1, x] * F32(0.69314718) + p * m


@inlined
def _neighbour_rows(ring, y, rows):  # type: ignore[no-untyped-def]
    """Mean over 3x3, five-point Laplacian, and magnitude of the central-difference gradient."""
    u, c, d = slot(y - 1), slot(y), slot(y + 1)
    for x in range(rows.shape[1]):
        i = x + LANES
        up, down, left, right = ring[u, i], ring[d, i], ring[c, i - 1], ring[c, i + 1]
        cross = up + down + left + right
        corners = ring[u, i - 1] + ring[u, i + 1] + ring[d, i - 1] + ring[d, i + 1]
        rows[2, x] = (corners + cross + ring[c, i]) * F32(1 / 9)
        rows[4, x] = cross - F32(4) * ring[c, i]
        rows[5, x] = F32(0.5) * np.sqrt((right - left) * (right - left) + (down - up) * (down - up))


@inlined
def _deviation_row(ring, y, work, rows):  # type: ignore[no-untyped-def]
    """Standard deviation over 5x5 pixels: column sums of the counts and of their squares first, then five of them side by side."""
    a, b, c, d, e = slot(y - 2), slot(y - 1), slot(y), slot(y + 1), slot(y + 2)
    for x in range(ring.shape[1]):
        work[0, x] = ring[a, x] + ring[b, x] + ring[c, x] + ring[d, x] + ring[e, x]
        squares = ring[a, x] * ring[a, x] + ring[b, x] * ring[b, x] + ring[c, x] * ring[c, x]
        work[1, x] = squares + ring[d, x] * ring[d, x] + ring[e, x] * ring[e, x]
    for x in range(rows.shape[1]):
        i = x + LANES
        mean = (work[0, i - 2] + work[0, i - 1] + work[0, i] + work[0, i + 1] + work[0, i + 2]) * F32(1 / 25)
        square = (work[1, i - 2] + work[1, i - 1] + work[1, i] + work[1, i + 1] + work[1, i + 2]) * F32(1 / 25)
        rows[3, x] = np.sqrt(max(square - mean * mean, F32(0)))  # rounding may leave a flat patch just below zero


@inlined
def _residual_row(ring, y, taps, work, rows):  # type: ignore[no-untyped-def]
    """Counts minus their Gaussian blur, which is done down the columns first, then along the row."""
    c = slot(y)
    for x in range(ring.shape[1]):
        work[0, x] = taps[0] * ring[c, x]
    for j in range(1, REACH + 1, 2):
        w, v = taps[j], taps[j + 1]
        a, b, d, e = slot(y - j - 1), slot(y - j), slot(y + j), slot(y + j + 1)
        for x in range(ring.shape[1]):
            work[0, x] += w * (ring[b, x] + ring[d, x]) + v * (ring[a, x] + ring[e, x])
    for x in range(rows.shape[1]):
        i = x + LANES
        near = taps[0] * work[0, i] + taps[1] * (work[0, i - 1] + work[0, i + 1]) + taps[2] * (work[0, i - 2] + work[0, i + 2])
        middle = taps[3] * (work[0, i - 3] + work[0, i + 3]) + taps[4] * (work[0, i - 4] + work[0, i + 4])
        far = taps[5] * (work[0, i - 5] + work[0, i + 5]) + taps[6] * (work[0, i - 6] + work[0, i + 6])
        edge = taps[7] * (work[0, i - 7] + work[0, i + 7]) + taps[8] * (work[0, i - 8] + work[0, i + 8])
        rows[8, x] = rows[0, x] - (near + middle + far + edge)
