"""Prepared frame -> nine features of each pixel, row by row: the stencil that classification and training share."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import bare_kernel, inlined
from streamprior.jit.wide import WIDE, backwards, choose, exponent, load, mantissa, moved, ramp, root, spread, store, total, where
from streamprior.prior import FEATURES

REACH = 8
"""Pixels around a pixel that its features look at: a Gaussian of sigma 2 px cut at 4 sigma, scipy.ndimage's default."""

DEPTH = 80
"""Rows in the window. Seventeen are in use; when the last place is taken, the sixteen that are still needed move to the front."""

F32 = np.float32

FIELDS = 6
ITSELF, PAIR, SLOPE, BLUR, FIVE, SQUARES = range(FIELDS)
"""What a row of the window keeps of each pixel, all that looks along the row: the count, the sum and the difference of its two neighbours,
the Gaussian blur, the sums of five counts and of their squares. What looks across rows is then a sum of whole registers, unshifted."""

RECORD = FIELDS * WIDE


class Scratch(NamedTuple):
    """What the stencil works on; one for each thread.

    line : (1, pitch + 32) float32, a scaled row with a register of mirrored pixels on either side. window : (pitch / 16, DEPTH * RECORD)
    float32: for sixteen columns the rows that are at hand, one below the other, so that a column of the stencil is contiguous. tail,
    numbers, flags : (1, 16) float32, uint8 and bool, for the last, incomplete register of a row. sums : (H,) float64, of each row's
    distances.
    """

    line: npt.NDArray[np.float32]
    window: npt.NDArray[np.float32]
    tail: npt.NDArray[np.float32]
    numbers: npt.NDArray[np.uint8]
    flags: npt.NDArray[np.bool_]
    sums: npt.NDArray[np.float64]


def scratch_rows(shape: tuple[int, ...]) -> Scratch:
    """Scratch for frames of this shape; one for each thread."""
    vectors = -(-shape[1] // WIDE)
    line, window = aligned(1, (vectors + 2) * WIDE), aligned(vectors, DEPTH * RECORD)
    tail = (aligned(1, WIDE), np.zeros((1, WIDE), np.uint8), np.zeros((1, WIDE), np.bool_))
    return Scratch(line, window, *tail, np.zeros(shape[0]))


def aligned(rows: int, pitch: int) -> npt.NDArray[np.float32]:
    """Zeros of (rows, pitch) float32 that start on a register boundary."""
    raw = np.zeros(rows * pitch + WIDE, F32)
    skip = -(raw.ctypes.data // 4) % WIDE
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
    _feature_maps(frame, known, normaliser, gaussian_taps(), scratch_rows(frame.shape), maps)
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


@inlined
def frame_scale(frame, valid, normaliser):  # type: ignore[no-untyped-def]
    """(normaliser / mean photons on valid pixels, 1 for a dark frame; number of valid pixels).

    Without it, centroids of a bright frame are useless at a tenth of its flux (IoU 0 against 0.89, docs/physics.md section 3).
    """
    whole = frame.shape[1] - frame.shape[1] % WIDE
    photons = np.float64(0)
    pixels = np.float64(0)
    for y in range(frame.shape[0]):
        counts, good = spread(F32(0)), spread(F32(0))  # summed in float32 along a row, and in float64 over rows
        for x in range(0, whole, WIDE):
            counts = counts + where(valid, y, x, load(frame, y, x))
            good = good + where(valid, y, x, spread(F32(1)))
        row, number = total(counts), total(good)
        for x in range(whole, frame.shape[1]):
            row += F32(frame[y, x]) if valid[y, x] else F32(0)
            number += F32(1) if valid[y, x] else F32(0)
        photons += row
        pixels += number
    return normaliser * pixels / photons if photons > 0.0 and normaliser > 0.0 else 1.0, pixels


@bare_kernel
def _feature_maps(frame, valid, normaliser, taps, scratch, maps):  # type: ignore[no-untyped-def]
    height, width = frame.shape
    ratio, _ = frame_scale(frame, valid, normaliser)
    scale = F32(ratio)
    open_window(frame, 0, scale, taps, scratch)
    top = np.int64(-REACH)
    for y in range(height):
        top = next_row(frame, y, top, scale, taps, scratch)
        for x in range(0, width, WIDE):
            found = feature_lanes(scratch.window, x // WIDE, y - top, y - height // 2, x - width // 2, taps)
            for f in range(8):
                store(scratch.tail, 0, 0, found[f])
                for i in range(min(WIDE, width - x)):
                    maps[f if f < 7 else 8, y, x + i] = scratch.tail[0, i]


@inlined
def open_window(frame, first, scale, taps, scratch):  # type: ignore[no-untyped-def]
    """The rows that row `first` needs before `next_row` brings its last one; the window's top is row `first` - REACH."""
    for i in range(2 * REACH):
        # Downwards first, then upwards: what lies above the frame mirrors rows that are there by now.
        y = first + i if i < REACH else first + REACH - 1 - i
        _bring(frame, y, first - REACH, scale, taps, scratch)


@inlined
def next_row(frame, y, top, scale, taps, scratch):  # type: ignore[no-untyped-def]
    """Bring the last row that row y needs; returns the row that is on top of the window."""
    window = scratch.window
    if y + REACH - top >= DEPTH:
        for v in range(window.shape[0]):
            for i in range(0, 2 * REACH * RECORD, WIDE):
                store(window, v, i, load(window, v, (DEPTH - 2 * REACH) * RECORD + i))
        top += DEPTH - 2 * REACH
    _bring(frame, y + REACH, top, scale, taps, scratch)
    return top


@inlined
def _bring(frame, y, top, scale, taps, scratch):  # type: ignore[no-untyped-def]
    """Row y into the window. A row beyond the edge is a copy of its mirror image (scipy's "reflect"), which is always in the window."""
    height = frame.shape[0]
    place = (y - top) * RECORD
    if 0 <= y < height:
        _scaled_line(frame, y, scale, scratch.line)
        _along(scratch.line, place, taps, scratch.window)
    else:
        source = (mirrored(y, height) - top) * RECORD
        for v in range(scratch.window.shape[0]):
            for i in range(0, RECORD, WIDE):
                store(scratch.window, v, place + i, load(scratch.window, v, source + i))


@inlined
def _scaled_line(frame, y, scale, line):  # type: ignore[no-untyped-def]
    """Row y of the frame, scaled, edges mirrored: the edge pixel is repeated."""
    width = frame.shape[1]
    whole = width - width % WIDE
    for x in range(0, whole, WIDE):
        store(line, 0, WIDE + x, load(frame, y, x) * scale)
    for x in range(whole, width):
        line[0, WIDE + x] = F32(frame[y, x]) * scale
    if width >= REACH:  # as many pixels as are looked at mirror at once
        store(line, 0, 0, backwards(load(line, 0, WIDE)))
        store(line, 0, WIDE + width, backwards(load(line, 0, width)))
    else:
        for x in range(REACH):
            line[0, WIDE - 1 - x] = line[0, WIDE + mirrored(-1 - x, width)]
            line[0, WIDE + width + x] = line[0, WIDE + mirrored(width + x, width)]


@inlined
def mirrored(i, n):  # type: ignore[no-untyped-def]
    while i < 0 or i >= n:  # a loop, since a remainder by a number known at run time takes longer than a row of registers
        i = -1 - i if i < 0 else 2 * n - 1 - i
    return i


@inlined
def _along(line, place, taps, window):  # type: ignore[no-untyped-def]
    """What a row of the window keeps, from a scaled line; every pixel is loaded once, its neighbours come out of registers."""
    left, c = load(line, 0, 0), load(line, 0, WIDE)
    for v in range(window.shape[0]):
        right = load(line, 0, (v + 2) * WIDE)
        before, after = moved(left, c, 15), moved(c, right, 1)
        before2, after2 = moved(left, c, 14), moved(c, right, 2)
        one, two = before + after, before2 + after2
        blur = taps[0] * c + taps[1] * one + taps[2] * two
        blur = blur + taps[3] * (moved(left, c, 13) + moved(c, right, 3)) + taps[4] * (moved(left, c, 12) + moved(c, right, 4))
        blur = blur + taps[5] * (moved(left, c, 11) + moved(c, right, 5)) + taps[6] * (moved(left, c, 10) + moved(c, right, 6))
        blur = blur + taps[7] * (moved(left, c, 9) + moved(c, right, 7)) + taps[8] * (moved(left, c, 8) + moved(c, right, 8))
        store(window, v, place + WIDE * ITSELF, c)
        store(window, v, place + WIDE * PAIR, one)
        store(window, v, place + WIDE * SLOPE, after - before)
        store(window, v, place + WIDE * BLUR, blur)
        store(window, v, place + WIDE * FIVE, one + two + c)
        store(window, v, place + WIDE * SQUARES, c * c + before * before + after * after + before2 * before2 + after2 * after2)
        left, c = c, right


@inlined
def _at(window, v, place, field):  # type: ignore[no-untyped-def]
    return load(window, v, place * RECORD + field * WIDE)


@inlined
def feature_lanes(window, v, p, down, across, taps):  # type: ignore[no-untyped-def]
    """Every feature of sixteen pixels but the angle (a map of its own, rarely used): the row at place p of the window, columns 16 v on.

    down and across, pixels from the beam to the first of them.
    """
    itself, pair, slope = _at(window, v, p, ITSELF), _at(window, v, p, PAIR), _at(window, v, p, SLOPE)
    up, under = _at(window, v, p - 1, ITSELF), _at(window, v, p + 1, ITSELF)
    cross, rise = up + under + pair, under - up
    mean = (_at(window, v, p - 1, PAIR) + _at(window, v, p + 1, PAIR) + cross + itself) * F32(1 / 9)
    gradient = F32(0.5) * root(slope * slope + rise * rise)
    columns, rows = ramp(F32(across)), F32(down)
    radius = root(columns * columns + rows * rows)
    log = _log1p(itself)
    residual = itself - _blurred(window, v, p, taps)
    return itself, log, mean, _deviation(window, v, p), cross - F32(4) * itself, gradient, radius, residual


@inlined
def _blurred(window, v, p, taps):  # type: ignore[no-untyped-def]
    """The Gaussian down the columns, of rows that are blurred along themselves."""
    blur = taps[0] * _at(window, v, p, BLUR)
    for j in range(1, REACH + 1):
        blur = blur + taps[j] * (_at(window, v, p - j, BLUR) + _at(window, v, p + j, BLUR))
    return blur


@inlined
def _deviation(window, v, p):  # type: ignore[no-untyped-def]
    """Standard deviation over 5x5 pixels; rounding may leave the variance of a flat patch just below zero."""
    counts, squares = _at(window, v, p, FIVE), _at(window, v, p, SQUARES)
    for j in range(1, 3):
        counts = counts + _at(window, v, p - j, FIVE) + _at(window, v, p + j, FIVE)
        squares = squares + _at(window, v, p - j, SQUARES) + _at(window, v, p + j, SQUARES)
    mean = counts * F32(1 / 25)
    return root(positive(squares * F32(1 / 25) - mean * mean))


@inlined
def positive(value):  # type: ignore[no-untyped-def]
    nothing = spread(F32(0))
    return choose(nothing, value, value, nothing)


@inlined
def _log1p(value):  # type: ignore[no-untyped-def]
    """log(1 + intensity), negative counts as 0.

    Exponent by its bits, mantissa by the polynomial of Abramowitz & Stegun 4.1.44 (absolute error below 3e-8).
    """
    above = F32(1) + positive(value)
    m = mantissa(above) - F32(1)
    p = F32(-0.0064535442) * m + F32(0.0360884937)
    p = p * m + F32(-0.0953293897)
    p = p * m + F32(0.1676540711)
    p = p * m + F32(-0.2407338084)
    p = p * m + F32(0.3317990258)
    p = p * m + F32(-0.4998741238)
    p = p * m + F32(0.9999964239)
    return exponent(above) * F32(0.69314718) + p * m
