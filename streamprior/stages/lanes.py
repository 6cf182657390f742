"""Eight columns -> their Fourier transforms, in place: what a frame that fits the cache is transformed with.

A column's eight neighbours lie in the lanes of a register: element i of eight columns is LANES real parts and then LANES imaginary ones, 64
bytes, so that no butterfly shuffles. `forward` decimates in frequency (Gentleman and Sande 1966) and leaves its output in the order of
`frequencies`; `backward` decimates in time (Cooley and Tukey 1965), takes that order and gives the natural one back. What is done between
them is done pixel by pixel and needs no order, so nothing is ever sorted. Neither scales.
"""

from __future__ import annotations

import cmath
import math
from functools import reduce
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import kernel
from streamprior.jit.written import LANES, Floats, Lanes, Place, written

F32 = np.float32

ODD = (13, 11, 7, 5, 3)
RADICES = (*ODD, 8, 4, 2)
"""Lengths of the butterflies; a length with a larger prime factor is not done here. One of 16 points gains nothing: it spills."""

STEP = 2 * LANES
"""Numbers in an element: the real parts of eight columns, then the imaginary parts."""

Pair = tuple[Lanes, Lanes]


class Axis(NamedTuple):
    """How one length is transformed; a record that kernels take.

    length : elements. radices : (stages,) int64, their product is the length. twiddles : float32, (real, imaginary) of the factors of each
    butterfly of each stage, in the order of use.
    """

    length: int
    radices: npt.NDArray[np.int64]
    twiddles: npt.NDArray[np.float32]


def can_transform(length: int) -> bool:
    """Whether the length is a product of butterflies."""
    return length > 0 and math.prod(_radices(length)) == length


def plan_axis(length: int) -> Axis:
    """An Axis of this length; see `can_transform`."""
    radices = _radices(length)
    twiddles: list[float] = []
    rest = length
    for radix in radices:
        whole, rest = rest, rest // radix
        for p in range(rest):
            for k in range(1, radix):
                factor = cmath.exp(-2j * math.pi * p * k / whole)
                twiddles += [factor.real, factor.imag]
    return Axis(length, np.array(radices, np.int64), np.array(twiddles, F32))


def frequencies(axis: Axis) -> npt.NDArray[np.int64]:
    """The frequency, 0 to length - 1, that `forward` leaves at each place."""
    order = np.zeros(1, np.int64)
    for radix in axis.radices[::-1]:
        order = (np.arange(radix)[:, None] + radix * order).ravel()
    return order


def _radices(length: int) -> tuple[int, ...]:
    """Odd ones first, then eights and at most two fours: the fewest stages whose butterflies stay in 32 registers."""
    found = []
    for radix in ODD:
        while length % radix == 0:
            found.append(radix)
            length //= radix
    twos = (length & -length).bit_length() - 1  # how often two divides what is left
    if twos == 1:
        return (*found, 2)
    fours = -twos % 3
    return (*found, *[8] * ((twos - 2 * fours) // 3), *[4] * fours)


@kernel
def forward(x, at, axis, stages):  # type: ignore[no-untyped-def]
    """The first `stages` stages on eight columns, whose elements begin at x[at]."""
    length, row = axis.length, 0
    for stage in range(stages):
        radix = axis.radices[stage]
        rest = length // radix
        step = rest * STEP
        _decimate_frequency(-radix, axis.length // length, (x, at, step, axis.twiddles, row), (0, length * STEP, 0, 0, 0))
        row += 2 * (radix - 1)
        for base in range(at, at + axis.length * STEP, length * STEP):
            _decimate_frequency(radix, rest - 1, (x, base + STEP, step, axis.twiddles, row), (0, STEP, 0, 0, 2 * (radix - 1)))
        row += (rest - 1) * 2 * (radix - 1)
        length = rest


@kernel
def backward(x, at, axis, stages):  # type: ignore[no-untyped-def]
    """The way back from so many stages, the other way round."""
    length, row = axis.length, 0
    for stage in range(stages):
        length //= axis.radices[stage]
        row += length * 2 * (axis.radices[stage] - 1)
    for stage in range(stages - 1, -1, -1):
        radix = axis.radices[stage]
        rest, length = length, length * radix
        step = rest * STEP
        row -= (rest - 1) * 2 * (radix - 1)
        for base in range(at, at + axis.length * STEP, length * STEP):
            _decimate_time(radix, rest - 1, (x, base + STEP, step, axis.twiddles, row), (0, STEP, 0, 0, 2 * (radix - 1)))
        row -= 2 * (radix - 1)
        _decimate_time(-radix, axis.length // length, (x, at, step, axis.twiddles, row), (0, length * STEP, 0, 0, 0))


def load_points(x: Floats, first: Place, step: Place | int, number: int) -> tuple[list[Place], list[Pair]]:
    """Elements of eight columns, `step` numbers apart: their places and their values."""
    places = [first]
    while len(places) < number:
        places.append(places[-1] + step)
    return places, [(x.load(place), x.load(place + LANES)) for place in places]


def store_points(x: Floats, places: list[Place], points: list[Pair]) -> None:
    for place, (real, imaginary) in zip(places, points, strict=True):
        x.store(real, place)
        x.store(imaginary, place + LANES)


def _write_decimate_frequency(case: int, x: Floats, first: Place, step: Place, twiddles: Floats, row: Place) -> None:
    """A butterfly of |case| points; a negative case is one whose factors are all 1."""
    places, points = load_points(x, first, step, abs(case))
    points = butterfly(points, -1)
    if case > 0:
        points[1:] = [_turned(point, twiddles, row + 2 * k, 1) for k, point in enumerate(points[1:])]
    store_points(x, places, points)


def _write_decimate_time(case: int, x: Floats, first: Place, step: Place, twiddles: Floats, row: Place) -> None:
    places, points = load_points(x, first, step, abs(case))
    if case > 0:
        points[1:] = [_turned(point, twiddles, row + 2 * k, -1) for k, point in enumerate(points[1:])]
    store_points(x, places, butterfly(points, 1))


def _turned(point: Pair, twiddles: Floats, at: Place, sign: int) -> Pair:
    """Times the factor at `at`, or (sign -1) times its conjugate."""
    (real, imaginary), cosine, sine = point, twiddles.spread(at), twiddles.spread(at + 1)
    if sign > 0:
        return real * cosine - imaginary * sine, real * sine + imaginary * cosine
    return real * cosine + imaginary * sine, imaginary * cosine - real * sine


_CASES = (*RADICES, *(-radix for radix in RADICES))
_decimate_frequency = written(_write_decimate_frequency, _CASES)
_decimate_time = written(_write_decimate_time, _CASES)


def butterfly(x: list[Pair], sign: int) -> list[Pair]:
    """The transform sum_i x_i exp(sign 2 pi i k / n) of a few points, written out; powers of two or odd."""
    if len(x) == 1:
        return x
    if len(x) == 2:
        return [_plus(*x), _minus(*x)]
    if len(x) == 4:
        even, odd = butterfly(x[::2], sign), butterfly(x[1::2], sign)
        turned = _times_i(odd[1], sign)
        return [_plus(even[0], odd[0]), _plus(even[1], turned), _minus(even[0], odd[0]), _minus(even[1], turned)]
    if len(x) == 8:
        even, odd = butterfly(x[::2], sign), butterfly(x[1::2], sign)
        odd = [odd[0], _times_eighth(odd[1], sign), _times_i(odd[2], sign), _times_i(_times_eighth(odd[3], sign), sign)]
        return [*map(_plus, even, odd), *map(_minus, even, odd)]
    return _odd_butterfly(x, sign)


def _odd_butterfly(x: list[Pair], sign: int) -> list[Pair]:
    """Sums and differences of the points i and n - i: the cosine parts of outputs k and n - k are equal, the sine parts opposite."""
    n = len(x)
    sums = [_plus(x[i], x[n - i]) for i in range(1, n // 2 + 1)]
    differences = [_minus(x[i], x[n - i]) for i in range(1, n // 2 + 1)]
    low, high = [], []
    for k in range(1, n // 2 + 1):
        angles = [2 * math.pi * (i * k % n) / n for i in range(1, n // 2 + 1)]
        cosine_part = reduce(_plus, [_scaled(one, math.cos(angle)) for one, angle in zip(sums, angles, strict=True)], x[0])
        sine_part = reduce(_plus, [_scaled(one, math.sin(angle)) for one, angle in zip(differences, angles, strict=True)])
        turned = _times_i(sine_part, sign)
        low.append(_plus(cosine_part, turned))
        high.append(_minus(cosine_part, turned))
    return [reduce(_plus, sums, x[0]), *low, *reversed(high)]


def _plus(a: Pair, b: Pair) -> Pair:
    return a[0] + b[0], a[1] + b[1]


def _minus(a: Pair, b: Pair) -> Pair:
    return a[0] - b[0], a[1] - b[1]


def _scaled(a: Pair, factor: float) -> Pair:
    return a[0] * factor, a[1] * factor


def _times_i(a: Pair, sign: int) -> Pair:
    """Times i, or (sign -1) times -i."""
    return (-a[1], a[0]) if sign > 0 else (a[1], -a[0])


def _times_eighth(a: Pair, sign: int) -> Pair:
    """Times exp(sign i pi / 4)."""
    return _scaled(_plus(a, _times_i(a, sign)), math.sqrt(0.5))
