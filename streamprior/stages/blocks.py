"""Frames -> the same, projected, in blocks of eight columns that the nearest cache holds; for lengths without a prime factor above 13."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import aligned
from streamprior.jit.written import LANES
from streamprior.records import Flag
from streamprior.stages.block_layout import (
    NOWHERE,
    Extent,
    Grid,
    Room,
    clear_object,
    load_counts,
    load_object,
    load_support,
    plan_grid,
    store_object,
)
from streamprior.stages.block_passes import iterate, score_columns, transform
from streamprior.stages.lanes import STEP, frequencies
from streamprior.stages.planned import rows
from streamprior.stages.schedule import OUTSIDE, Iterate, ShrinkWrap
from streamprior.stages.shrink import shrink_wrap

F32 = np.float32


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
        """Take a frame; returns photons and number of the pixels that take part, and flags: see `projections.load_counts`."""
        return load_counts(self._grid, self._seats, rows(counts), rows(valid), rows(held_out), self._target, self._room)  # type: ignore[no-any-return]

    def load_object(self, start: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Take a start; returns its support's area and the flags of what is wrong with it. Without a support the object is zero."""
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
        """So many iterations; `errors`, (step.times,) float64, becomes the misfit before each."""
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
        """Tighten the support; `area` is the first one's."""
        one = self._hand
        psi, inside = np.empty(self._shape, np.complex64), np.empty(self._shape, np.bool_)
        store_object(self._grid, one.psi, one.inside, rows(psi), rows(inside))
        shrink_wrap(psi, step, area, inside)
        one.support = Extent(*load_support(self._grid, rows(inside), one.inside))

    def misfit(self) -> float:
        """Sum of (|field| - t)^2 over the measured pixels, t = sqrt(counts * pixels)."""
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
        """Write object and support, centred."""
        store_object(self._grid, self._hand.psi, self._hand.inside, rows(psi), rows(support))

    def _refresh(self) -> None:
        """Rows of the object in hand in the field, transformed: what an iteration begins with, and ends with."""
        if not self._fresh:
            transform(self._grid, self._field, self._hand.psi, self._hand.held, self._room, True, False)
            self._fresh = True

    def _scored(self) -> tuple[float, float, float, float]:
        """Sums of `score_columns` over the whole transform of the object in hand, which is in the field after it."""
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
