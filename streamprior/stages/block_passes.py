"""A field in blocks -> the same, projected: a pass does all it can on a block while the nearest cache holds it.

An iteration reads and writes the frame twice. One pass takes eight columns forward, projects them onto what was measured and takes them
back; the other takes eight rows back, projects them onto the support and takes them forward again. Rows outside the support are zero, so
error reduction neither transforms nor visits them.
"""

from __future__ import annotations

import numpy as np

from streamprior.jit import inlined, kernel
from streamprior.jit.written import LANES, Floats, Place, written
from streamprior.stages.lanes import RADICES, STEP, backward, butterfly, forward, load_points, store_points

F32 = np.float32


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
            for k in range(size):  # an assignment of slices brings its error's text along: two seconds of compiling
                room.row[k] = psi[at + k]
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
