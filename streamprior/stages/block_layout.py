"""Centred frames -> blocks of eight columns, and the way back.

Layout ("x" is the last axis, "rows" the one before it, "z" a volume's first): the field is (blocks of 8 x, rows, z, part, 8), where part is
real or imaginary, and a picture has its rows in the place of z; the object is (z, blocks of 8 rows, x, part, 8). Between the two stands a
transposition of tiles of 8 x 8. The object stays centred, as it came: its shift turns only phases of its transform, at which no projection
looks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from streamprior.jit import inlined, kernel
from streamprior.jit.written import LANES
from streamprior.stages.lanes import STEP, Axis, plan_axis
from streamprior.stages.projections import load_row

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
