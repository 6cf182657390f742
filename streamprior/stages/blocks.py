"""Frames -> the same, projected, in blocks of eight columns: a pass does all it can on a block while the nearest cache holds it.

An iteration reads and writes the frame twice. One pass takes eight columns forward, projects them onto what was measured and takes them
back; the other takes eight rows back, projects them onto the support and takes them forward again. Rows outside the support are zero, so
error reduction neither transforms nor visits them. The object stays centred, as it came: its shift turns only phases of its transform, at
which no projection looks.

Layout ("x" is the last axis, "rows" the one before it, "z" a volume's first): the field is (blocks of 8 x, rows, z, part, 8), where part is
real or imaginary, and a picture has its rows in the place of z; the object is (z, blocks of 8 rows, x, part, 8). Between the two stands a
transposition of tiles of 8 x 8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.arrays import aligned
from streamprior.jit import LANES, Floats, Place, inlined, kernel, written
from streamprior.records import Flag
from streamprior.stages.lanes import RADICES, STEP, Axis, backward, butterfly, forward, frequencies, load_points, plan_axis, store_points
from streamprior.stages.planned import rows
from streamprior.stages.projections import load_row
from streamprior.stages.schedule import OUTSIDE, Iterate, ShrinkWrap
from streamprior.stages.shrink import shrink_wrap

F32 = np.float32


class Room(NamedTuple):
    """What passes write into and read from on the way; a record that kernels take.

    row : eight rows. sheet : one z of a volume. part : (8,) misfit of a block. inverse : (1,) 1 / pixels. scale : (1,) and sums :
    (4 * 8,) of a score. Beyond the columns, row and sheet are zero and stay so.
    """

    row: npt.NDArray[np.float32]
    sheet: npt.NDArray[np.float32]
    part: npt.NDArray[np.float32]
    inverse: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    sums: npt.NDArray[np.float32]


class Grid(NamedTuple):
    """Lengths and strides of one shape; a record that kernels take.

    depth, rows, columns : the shape; a picture is one z deep. tiles : blocks of 8 columns. pitch : elements from one column of the field to
    the next. sheet : rows of one z, rounded up to 8. first, middle, last : how its axes are transformed; a picture's middle one is 1.
    """

    depth: int
    rows: int
    columns: int
    tiles: int
    pitch: int
    sheet: int
    first: Axis
    middle: Axis
    last: Axis


class Extent(NamedTuple):
    """Where an object may differ from zero: z from z0 to below z1, blocks of 8 rows from row0 to below row1."""

    z0: int
    z1: int
    row0: int
    row1: int


NOWHERE = (1 << 30, 0, 1 << 30, 0)
"""The Extent of nothing: any other, united with it, stays as it is."""


def plan_grid(shape: tuple[int, ...]) -> Grid:
    depth, rows, columns = (1, *shape)[-3:]
    sheet = -(-rows // LANES) * LANES
    # A volume's columns are one element further apart than they are long: at a distance of a power of two they would all lie in one
    # set of the cache when a z is gathered.
    pitch = sheet if len(shape) == 2 else depth + 1
    first = plan_axis(shape[0])
    middle = plan_axis(rows if len(shape) == 3 else 1)
    return Grid(depth, rows, columns, -(-columns // LANES), pitch, sheet, first, middle, plan_axis(columns))


@kernel
def iterate(grid, field, target, psi, inside, anchor, rule, held, kept, room, errors):  # type: ignore[no-untyped-def]
    """Iterations of one rule on a field whose rows have been transformed; `errors` becomes the misfit before each of them.

    held, kept : Extent of the object at first, and after each iteration. rule : (old, new, weight) as in `_update`.
    """
    for j in range(errors.size):
        errors[j] = project_columns(grid, field, target, held if j == 0 else kept, room)
        project_rows(grid, field, psi, inside, anchor, rule, kept, room)


@inlined
def project_columns(grid, field, target, held, room):  # type: ignore[no-untyped-def]
    """Columns forward, onto the measured moduli, and back; returns the misfit, the sum of (|field| - target)^2 over measured pixels."""
    axis = grid.first
    stages = axis.radices.size - 1
    radix = axis.radices[stages] if stages >= 0 else 1
    error = 0.0
    part = room.part
    for column in range(grid.tiles * grid.middle.length):
        at = column * grid.pitch * STEP
        _clear(grid, field, at, held)
        forward(field, at, axis, stages)
        part[:] = F32(0)
        goal = column * axis.length * LANES
        strides = (0, radix * STEP, 0, radix * LANES, 0, 0, 0)
        _project(radix, axis.length // radix, (field, at, target, goal, room.inverse, part, 0), strides)
        for lane in range(LANES):
            error += np.float64(part[lane])
        backward(field, at, axis, stages)
    return error


@kernel
def transform(grid, field, psi, held, room, of_rows, of_columns):  # type: ignore[no-untyped-def]
    """Rows of the object into the field, columns of the field, or both; one kernel, as each takes seconds to compile."""
    if of_rows:
        _transform_rows(grid, field, psi, held, room)
    if of_columns:
        _transform_columns(grid, field, held)


@inlined
def _transform_columns(grid, field, held):  # type: ignore[no-untyped-def]
    """Columns forward: the field is the whole transform after it."""
    for column in range(grid.tiles * grid.middle.length):
        at = column * grid.pitch * STEP
        _clear(grid, field, at, held)
        forward(field, at, grid.first, grid.first.radices.size)


@inlined
def _clear(grid, field, at, held):  # type: ignore[no-untyped-def]
    """Zero what lies outside the extent in the column at `at`."""
    flat = grid.middle.length == 1 and grid.depth == 1
    low, high = (held.row0 * LANES, held.row1 * LANES) if flat else (held.z0, held.z1)
    field[at : at + min(low, grid.first.length) * STEP] = F32(0)
    if high < grid.first.length:
        field[at + high * STEP : at + grid.first.length * STEP] = F32(0)


@inlined
def project_rows(grid, field, psi, inside, anchor, rule, kept, room):  # type: ignore[no-untyped-def]
    """Rows back, onto the support (`_update`), and forward."""
    if grid.depth == 1:
        _project_sheet(grid, field, psi, inside, anchor, rule, 0, kept, room.row)
        return
    for z in range(kept.z0, kept.z1):
        _fetch_sheet(grid, field, z, room.sheet)
        for tile in range(grid.tiles):
            backward(room.sheet, tile * grid.sheet * STEP, grid.middle, grid.middle.radices.size)
        _project_sheet(grid, room.sheet, psi, inside, anchor, rule, z, kept, room.row)
        _forward_sheet(grid, room.sheet, field, z, kept)


@inlined
def _transform_rows(grid, field, psi, held, room):  # type: ignore[no-untyped-def]
    """Rows of the object forward, into the field."""
    size = grid.columns * STEP
    for z in range(held.z0, held.z1):
        sheet = field if grid.depth == 1 else room.sheet
        for block in range(held.row0, held.row1):
            at = (z * (grid.sheet // LANES) + block) * size
            room.row[:size] = psi[at : at + size]
            forward(room.row, 0, grid.last, grid.last.radices.size)
            _transpose(1, grid.tiles, (room.row, 0, sheet, block * LANES * STEP), (0, LANES * STEP, 0, grid.sheet * STEP))
        if grid.depth > 1:
            _forward_sheet(grid, room.sheet, field, z, held)


@inlined
def _forward_sheet(grid, sheet, field, z, held):  # type: ignore[no-untyped-def]
    for tile in range(grid.tiles):
        at = tile * grid.sheet * STEP
        sheet[at : at + held.row0 * LANES * STEP] = F32(0)
        sheet[at + held.row1 * LANES * STEP : at + grid.sheet * STEP] = F32(0)
        forward(sheet, at, grid.middle, grid.middle.radices.size)
    for tile in range(grid.tiles):
        for row in range(grid.rows):
            at, to = (tile * grid.sheet + row) * STEP, ((tile * grid.rows + row) * grid.pitch + z) * STEP
            for k in range(STEP):
                field[to + k] = sheet[at + k]


@inlined
def _fetch_sheet(grid, field, z, sheet):  # type: ignore[no-untyped-def]
    for tile in range(grid.tiles):
        for row in range(grid.rows):
            at, to = ((tile * grid.rows + row) * grid.pitch + z) * STEP, (tile * grid.sheet + row) * STEP
            for k in range(STEP):
                sheet[to + k] = field[at + k]


@inlined
def _project_sheet(grid, sheet, psi, inside, anchor, rule, z, kept, row):  # type: ignore[no-untyped-def]
    size, stages = grid.columns * STEP, grid.last.radices.size
    for block in range(kept.row0, kept.row1):
        _transpose(1, grid.tiles, (sheet, block * LANES * STEP, row, 0), (0, grid.sheet * STEP, 0, LANES * STEP))
        backward(row, 0, grid.last, stages)
        at = (z * (grid.sheet // LANES) + block) * size
        _update(row[:size], psi[at : at + size], inside[at : at + size], anchor[at : at + size], rule)
        forward(row, 0, grid.last, stages)
        _transpose(1, grid.tiles, (row, 0, sheet, block * LANES * STEP), (0, LANES * STEP, 0, grid.sheet * STEP))


@inlined
def _update(row, psi, inside, anchor, rule):  # type: ignore[no-untyped-def]
    """psi and row <- (row inside, old * psi + new * row outside), then drawn towards the anchor; rule is (old, new, weight)."""
    old, new, weight = rule
    if old == 0 and new == 0:
        for k in range(row.size):
            value = row[k]
            row[k] = value if inside[k] else F32(0)
    else:
        for k in range(row.size):
            value = row[k]
            outside = old * psi[k] + new * value
            row[k] = value if inside[k] else outside
    if weight > 0:
        share = F32(1) / (F32(1) + weight)
        for k in range(row.size):
            row[k] = (row[k] + weight * anchor[k]) * share
    for k in range(row.size):
        psi[k] = row[k]


def _write_project(radix: int, x: Floats, first: Place, target: Floats, at: Place, inverse: Floats, part: Floats, zero: Place) -> None:
    """The last stage forward, the modulus, and the first stage back, without leaving the registers.

    The field takes the modulus `target` and the factor `inverse` that the way back needs; where the target is below 0 it stays as it is. A
    vanishing field has no phase and takes phase 0. The rounds of division and square root run beside the butterflies' sums.
    """
    places, points = load_points(x, first, STEP, radix)
    scale, error = inverse.spread(zero), part.load(zero)
    for i, (real, imaginary) in enumerate(butterfly(points, -1)):
        wanted = target.load(at + i * LANES)
        modulus = (real * real + imaginary * imaginary).sqrt()
        off = wanted.where(">=", 0, modulus - wanted, 0)
        error = error + off * off
        factor = wanted.where(">=", 0, wanted / modulus, 1) * scale
        dark = wanted.where(">=", 0, wanted, 0) * scale
        points[i] = modulus.where(">", 0, real * factor, dark), modulus.where(">", 0, imaginary * factor, 0)
    part.store(error, zero)
    store_points(x, places, butterfly(points, 1))


_project = written(_write_project, (1, *RADICES))

# Three rounds of pairs, each pair one instruction where a register has halves: single numbers, pairs of them, halves.
_SINGLES = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
_DOUBLES = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
_HALVES = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)


def _write_transpose(_: int, source: Floats, at: Place, goal: Floats, to: Place) -> None:
    """A tile of 8 elements of 8 lanes, both parts, to 8 lanes of 8 elements."""
    for part in (0, LANES):
        a = [source.load(at + (i * STEP + part)) for i in range(LANES)]
        b = [a[i].shuffle(a[i + 1], order) for i in (0, 2, 4, 6) for order in _SINGLES]
        c = [b[i + j].shuffle(b[i + j + 2], order) for i in (0, 4) for j in (0, 1) for order in _DOUBLES]
        d = [c[i].shuffle(c[i + 4], order) for order in _HALVES for i in range(4)]
        for i, lanes in enumerate(d):
            goal.store(lanes, to + (i * STEP + part))


_transpose = written(_write_transpose, (1,))


@kernel
def score_columns(grid, field, target, scale, room):  # type: ignore[no-untyped-def]
    """Sums over measured pixels of a whole transform: (|field| - t)^2, |field| t, |field|^2, t; or, with a scale k >= 0, |t - k|field||."""
    sums = np.zeros(4)
    room.scale[0] = scale
    case = 1 if scale < 0 else 2
    length = grid.first.length
    for column in range(grid.tiles * grid.middle.length):
        room.sums[:] = F32(0)
        arguments = (field, column * grid.pitch * STEP, target, column * length * LANES, room.scale, room.sums, 0)
        _add_score(case, length, arguments, (0, STEP, 0, LANES, 0, 0, 0))
        for k in range(4 * LANES):
            sums[k // LANES] += np.float64(room.sums[k])
    return sums[0], sums[1], sums[2], sums[3]


def _write_add_score(case: int, x: Floats, at: Place, target: Floats, goal: Place, scale: Floats, sums: Floats, zero: Place) -> None:
    (real, imaginary), wanted = (x.load(at), x.load(at + LANES)), target.load(goal)
    modulus = wanted.where(">=", 0, (real * real + imaginary * imaginary).sqrt(), 0)
    wanted = wanted.where(">=", 0, wanted, 0)
    off = wanted - (modulus if case == 1 else modulus * scale.spread(zero))
    terms = (off * off, modulus * wanted, modulus * modulus, wanted) if case == 1 else (off.where(">=", 0, off, -off),)
    for i, term in enumerate(terms):
        sums.store(sums.load(zero + i * LANES) + term, zero + i * LANES)


_add_score = written(_write_add_score, (1, 2))


@kernel
def load_counts(grid, seats, counts, valid, held_out, target, room):  # type: ignore[no-untyped-def]
    """Fill `target` from centred rows; returns photons and number of the pixels that take part, and the flags of what was met.

    seats : centred index of each place of the field along first, middle and last axis.
    """
    first, middle, last = seats
    scale = F32(counts.size)
    photons = 0.0
    pixels = unfit = 0
    line = room.row[: grid.columns]
    for place in range(first.size):
        for between in range(middle.size):
            y = first[place] * middle.size + middle[between]
            some, number, bad = load_row(counts[y], valid[y], held_out[y], scale, line)
            photons += some
            pixels += number
            unfit += bad
            for x in range(grid.columns):
                tile, lane = x // LANES, x % LANES
                target[((tile * middle.size + between) * first.size + place) * LANES + lane] = line[last[x]]
    room.row[:] = F32(0)
    return photons, pixels, (2 if unfit else 0) | (0 if photons > 0.0 else 1)  # Flag.NONFINITE, Flag.EMPTY


@kernel
def load_object(grid, start, support, psi, inside):  # type: ignore[no-untyped-def]
    """Centred rows -> the object's blocks; returns the support's area, Flag.NONFINITE where the start is none (it is zero there), and the
    extents of start and support."""
    area = unfit = 0
    size = grid.columns * STEP
    held = within = NOWHERE
    for z in range(grid.depth):
        for block in range(grid.sheet // LANES):
            at = (z * (grid.sheet // LANES) + block) * size
            psi[at : at + size] = F32(0)
            inside[at : at + size] = False
            for lane in range(min(LANES, grid.rows - block * LANES)):
                y = z * grid.rows + block * LANES + lane
                if support[y].any():
                    within = _grown(within, z, block)
                    area += _fill_support(support[y], inside[at + lane : at + size])
                if start[y].any():
                    held = _grown(held, z, block)
                    unfit += _fill_object(start[y], psi[at + lane : at + size])
    return area, 2 if unfit else 0, held, within


@kernel
def load_support(grid, support, inside):  # type: ignore[no-untyped-def]
    """Centred rows of a support -> its blocks; returns its extent."""
    size = grid.columns * STEP
    within = NOWHERE
    for z in range(grid.depth):
        for row in range(grid.rows):
            y, block = z * grid.rows + row, row // LANES
            at = (z * (grid.sheet // LANES) + block) * size
            if support[y].any():
                within = _grown(within, z, block)
            _fill_support(support[y], inside[at + row % LANES : at + size])
    return within


@inlined
def _grown(extent, z, block):  # type: ignore[no-untyped-def]
    z0, z1, row0, row1 = extent
    return min(z0, z), max(z1, z + 1), min(row0, block), max(row1, block + 1)


@kernel
def _fill_support(row, inside):  # type: ignore[no-untyped-def]
    area = 0
    for x in range(row.size):
        inside[x * STEP] = inside[x * STEP + LANES] = row[x]
        area += 1 if row[x] else 0
    return area


@kernel
def _fill_object(row, psi):  # type: ignore[no-untyped-def]
    unfit = 0
    for x in range(row.size // 2):
        real, imaginary = row[2 * x], row[2 * x + 1]
        fit = (abs(real) < F32(np.inf)) & (abs(imaginary) < F32(np.inf))
        psi[x * STEP] = real if fit else F32(0)
        psi[x * STEP + LANES] = imaginary if fit else F32(0)
        unfit += 0 if fit else 1
    return unfit


@kernel
def store_object(grid, psi, inside, object, support):  # type: ignore[no-untyped-def]
    """The way back of `load_object`."""
    for z in range(grid.depth):
        for row in range(grid.rows):
            y = z * grid.rows + row
            at = (z * (grid.sheet // LANES) + row // LANES) * grid.columns * STEP + row % LANES
            for x in range(grid.columns):
                object[y, 2 * x], object[y, 2 * x + 1] = psi[at + x * STEP], psi[at + x * STEP + LANES]
                support[y, x] = inside[at + x * STEP]


@kernel
def clear_object(grid, psi, kept):  # type: ignore[no-untyped-def]
    """Zero the object outside an extent."""
    blocks, size = grid.sheet // LANES, grid.columns * STEP
    for z in range(grid.depth):
        for block in range(blocks):
            if not (kept.z0 <= z < kept.z1 and kept.row0 <= block < kept.row1):
                psi[(z * blocks + block) * size : (z * blocks + block + 1) * size] = F32(0)


class BlockFrame:
    """Owns what one frame in hand needs, for frames of one shape and one thread; the counterpart of `planned.PlannedFrame`.

    shape : 13-smooth lengths, in two or three dimensions. free : centred flat indices of the pixels whose model is asked for.
    """

    engine = "blocks"

    def __init__(self, shape: tuple[int, ...], weight: float, free: npt.NDArray[np.intp]) -> None:
        self._shape, self._weight, self._grid = shape, F32(weight), plan_grid(shape)
        grid = self._grid
        columns = grid.tiles * grid.middle.length
        self._field = _zeros(columns * grid.pitch * STEP)
        self._target = np.full(columns * grid.first.length * LANES, -1, F32)  # beyond the columns nothing is measured, and stays zero
        self._seats = tuple((frequencies(axis) + axis.length // 2) % axis.length for axis in (grid.first, grid.middle, grid.last))
        self._room = Room(
            _zeros(grid.tiles * LANES * STEP),
            _zeros(grid.tiles * grid.sheet * STEP),
            _zeros(LANES),
            np.full(1, 1 / math.prod(shape), F32),
            np.zeros(1, F32),
            _zeros(4 * LANES),
        )
        self._hand, self._best = _Object.blank(grid), _Object.blank(grid)
        self._whole = Extent(0, grid.depth, 0, grid.sheet // LANES)
        self._fresh = False  # the field holds the rows of the object in hand, transformed
        self._free = self._places(free)

    def load_counts(self, counts: npt.NDArray[Any], valid: npt.NDArray[Any], held_out: npt.NDArray[Any]) -> tuple[float, int, int]:
        return load_counts(self._grid, self._seats, rows(counts), rows(valid), rows(held_out), self._target, self._room)  # type: ignore[no-any-return]

    def load_object(self, start: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> tuple[int, int]:
        one = self._hand
        area, flags, held, within = load_object(self._grid, rows(start), rows(support), one.psi, one.inside)
        one.held, one.support = Extent(*held), Extent(*within)
        if not area:
            flags |= Flag.NO_SUPPORT
            one.psi[:] = 0
        one.anchored = one.held
        if self._weight:
            one.anchor[:] = one.psi
        self._fresh = False
        return int(area), int(flags)

    def iterate(self, step: Iterate, errors: npt.NDArray[np.float64]) -> None:
        """So many iterations; `errors` becomes the misfit before each."""
        self._refresh()
        one = self._hand
        kept = one.support if step.rule == "ER" else self._whole
        if self._weight:
            kept = _union(kept, one.anchored)
        if kept != one.held:
            clear_object(self._grid, one.psi, kept)
        old, new = OUTSIDE[step.rule]
        rule = (F32(old), F32(new), self._weight)
        iterate(self._grid, self._field, self._target, one.psi, one.inside, one.anchor, rule, one.held, kept, self._room, errors)
        one.held = kept

    def shrink_wrap(self, step: ShrinkWrap, area: int) -> None:
        one = self._hand
        psi, inside = np.empty(self._shape, np.complex64), np.empty(self._shape, np.bool_)
        store_object(self._grid, one.psi, one.inside, rows(psi), rows(inside))
        shrink_wrap(psi, step, area, inside)
        one.support = Extent(*load_support(self._grid, rows(inside), one.inside))

    def misfit(self) -> float:
        """Sum of (|field| - target)^2 over the measured pixels."""
        return self._scored()[0]

    def score(self) -> tuple[float, float, float]:
        """Sums over measured pixels, as in `projections.score`: the misfit, sum |t - k |field||, sum t."""
        squares, across, power, moduli = self._scored()
        scale = F32(across / power) if power > 0 else F32(0)
        return squares, score_columns(self._grid, self._field, self._target, scale, self._room)[0], moduli

    def model(self) -> npt.NDArray[np.float64]:
        """Photons of the model at the free pixels; after `score`."""
        real, imaginary = self._field[self._free].astype(np.float64), self._field[self._free + LANES].astype(np.float64)
        return (real**2 + imaginary**2) / math.prod(self._shape)

    def keep(self) -> None:
        """Put the object in hand aside; another is loaded, or this recalled, before the next step."""
        self._hand, self._best = self._best, self._hand
        self._fresh = False

    def recall(self) -> None:
        """Take the object that was put aside in hand."""
        self.keep()  # an exchange is its own way back

    def store(self, psi: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> None:
        store_object(self._grid, self._hand.psi, self._hand.inside, rows(psi), rows(support))

    def _refresh(self) -> None:
        if not self._fresh:
            transform(self._grid, self._field, self._hand.psi, self._hand.held, self._room, True, False)
            self._fresh = True

    def _scored(self) -> tuple[float, float, float, float]:
        transform(self._grid, self._field, self._hand.psi, self._hand.held, self._room, not self._fresh, True)
        self._fresh = False
        return score_columns(self._grid, self._field, self._target, F32(-1), self._room)  # type: ignore[no-any-return]

    def _places(self, centred: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """Where the field holds the real parts of these centred flat indices."""
        grid = self._grid
        first, middle, last = (np.argsort(seats) for seats in self._seats)
        z, y, x = np.unravel_index(centred, (grid.first.length, grid.middle.length, grid.columns))
        at = last[x]
        return ((at // LANES * grid.middle.length + middle[y]) * grid.pitch + first[z]) * STEP + at % LANES


@dataclass(slots=True)
class _Object:
    """An object, its support and what it is tied to, in blocks; and where each of the three may differ from zero."""

    psi: npt.NDArray[np.float32]
    inside: npt.NDArray[np.bool_]
    anchor: npt.NDArray[np.float32]
    held: Extent
    support: Extent
    anchored: Extent

    @classmethod
    def blank(cls, grid: Grid) -> _Object:
        size = grid.depth * grid.sheet * grid.columns * 2
        return cls(_zeros(size), np.zeros(size, np.bool_), _zeros(size), *[Extent(*NOWHERE)] * 3)


def _union(one: Extent, other: Extent) -> Extent:
    return Extent(min(one.z0, other.z0), max(one.z1, other.z1), min(one.row0, other.row0), max(one.row1, other.row1))


def _zeros(size: int) -> npt.NDArray[np.float32]:
    array = aligned((size,), F32)
    array[:] = 0
    return array
