"""A morphology's name and a seed -> the exit wave of a crystal that diffracts so: shape, strain and defects in three dimensions, projected.

A crystal is a polyhedron of {111} and {100} facets with a phase Q u(r), at the top of its rocking curve:
psi(x, y) = sum over z of rho(x, y, z) exp(i Q u(x, y, z)) (projection-slice theorem). Lengths are in 64ths of the field of view, which is
square whatever the detector's shape (wavelength * distance / detector pixel): a pattern is the same on 64 pixels and in the middle of 128.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.spatial import HalfspaceIntersection
from scipy.spatial.transform import Rotation

from streamprior.errors import ConfigError
from streamprior_sim.bragg import TRUNCATION, coverage, smooth_field
from streamprior_sim.optics import intensity, ramp
from streamprior_sim.scenario import CollectionSettings, Scenario

Floats = npt.NDArray[np.floating[Any]]
Wave = npt.NDArray[np.complex64]

_UNITS = 64
"""Units of length across the field of view; a phase slope of 2 pi / 64 a unit moves diffraction by one pixel of the detector."""

_LEAST_PX = 32
"""Smallest frame: on fewer pixels the thinnest plate is thinner than one."""

_MOST = 0.4
"""Largest share of the field that an object takes along each axis: its diffraction is then sampled 2.5 times."""

_CORE_PX = 3
"""Radius around the brightest pixel whose centre of mass is the core's place, pixels."""


@dataclass(frozen=True)
class Habit:
    """One crystal before it is cut into voxels; lengths in 64ths of the field of view, directions as (row, column, z).

    size : distance of opposite {111} facets. spread : how much the facets' distances differ, a fraction of it.
    axis, stretch : the crystal is this many times longer along this direction.
    plate : normal and thickness of a slab that the crystal is cut to. rounding : diameter of a ball that it is cut to.
    strain_rad, correlation : rms of the smooth random Q u, and the length over which it changes (sigma of a Gaussian).
    screw : a dislocation line along the beam: (row, column) in the middle plane, (row, column) it moves per unit of z, sign.
    tail : where the bend begins, as a fraction of the crystal along the rows; how far the end's diffraction is bent, detector pixels.
    """

    size: float
    spread: float = 0.1
    axis: tuple[float, float, float] = (1.0, 0.0, 0.0)
    stretch: float = 1.0
    plate: tuple[tuple[float, float, float], float] | None = None
    rounding: float | None = None
    strain_rad: float = 0.0
    correlation: float = 5.0
    screw: tuple[float, float, float, float, int] | None = None
    tail: tuple[float, float] | None = None


def grow_crystal(morphology: str, seed: int, shape: tuple[int, int] = (64, 64)) -> Wave:
    """Grow one crystal; every seed is another shape, size, turn and strain.

    Parameters
    ----------
    morphology : one of MORPHOLOGIES.
    seed : at least 0.
    shape : (H, W) of the frame, pixels, at least 32 along each axis.

    Returns
    -------
    (H, W) complex64
        Exit wave with sum |psi|^2 = 1, in the middle of the frame and at most 0.4 of it wide along each axis. A linear phase centres its
        diffraction too: the intensity's centre of mass lies at (H//2, W//2); of a core with a tail, the core's.

    Raises
    ------
    ValueError
        No such morphology, a negative seed, or a frame below 32 pixels.
    """
    if morphology not in _HABITS:
        raise ValueError(f"no morphology {morphology!r}; there are {', '.join(MORPHOLOGIES)}")
    if min(shape) < _LEAST_PX:
        raise ValueError(f"shape {shape}: a thin plate needs at least {_LEAST_PX} pixels along each axis")
    rng = np.random.default_rng([MORPHOLOGIES.index(morphology), seed])
    habit = _HABITS[morphology](rng)
    psi = np.zeros(shape, np.complex64)
    flake = _projected(habit, shape, rng)
    top, left = (full // 2 - part // 2 for full, part in zip(shape, flake.shape, strict=True))
    psi[top : top + flake.shape[0], left : left + flake.shape[1]] = flake
    psi /= np.linalg.norm(psi)
    return _centred(psi, _core_place if habit.tail else _mass_place)


def _compact(rng: np.random.Generator) -> Habit:
    return Habit(size=rng.uniform(12, 19), spread=0.2, strain_rad=rng.uniform(0.1, 0.5), correlation=rng.uniform(4, 7))


def _halo(rng: np.random.Generator) -> Habit:
    size = rng.uniform(9, 13)
    return Habit(size, 0.2, rounding=size * 1.1, strain_rad=rng.uniform(0.7, 1.0), correlation=rng.uniform(1.4, 2.2))


def _elongated(rng: np.random.Generator) -> Habit:
    stretch = rng.uniform(1.6, 2.5)
    habit = Habit(rng.uniform(19, 23) / stretch, 0.15, _in_plane(rng, 0.3), stretch)
    return replace(habit, strain_rad=rng.uniform(0.1, 0.4), correlation=rng.uniform(4, 7))


def _needle(rng: np.random.Generator) -> Habit:
    plate = (_in_plane(rng, 0.06), rng.uniform(2.2, 4.0))
    return Habit(rng.uniform(16, 23), 0.15, plate=plate, strain_rad=rng.uniform(0.1, 0.4), correlation=rng.uniform(4, 7))


def _diffuse(rng: np.random.Generator) -> Habit:
    return Habit(rng.uniform(17, 21), 0.2, strain_rad=rng.uniform(2.2, 3.0), correlation=rng.uniform(3.2, 4.0))


def _vortex(rng: np.random.Generator) -> Habit:
    size = rng.uniform(10, 16)
    row, column = rng.uniform(-0.1, 0.1, 2) * size
    tilt = rng.uniform(-0.08, 0.08, 2)
    screw = (float(row), float(column), float(tilt[0]), float(tilt[1]), int(rng.choice((-1, 1))))
    return Habit(size, 0.2, strain_rad=rng.uniform(0.1, 0.4), correlation=rng.uniform(4, 7), screw=screw)


def _tailed(rng: np.random.Generator) -> Habit:
    """Cut across its length, as on a substrate: a pointed end would hold too little of the crystal for its tail to be seen."""
    along = np.array([1.0, *rng.uniform(-0.12, 0.12, 2)])
    axis = _direction(along / np.linalg.norm(along))
    bend = float(rng.uniform(11, 18) * rng.choice((-1, 1)))
    habit = Habit(rng.uniform(15, 18), 0.12, axis, rng.uniform(1.3, 1.5), plate=(axis, rng.uniform(18, 22)))
    return replace(habit, strain_rad=rng.uniform(0.1, 0.4), correlation=rng.uniform(4, 7), tail=(rng.uniform(0.35, 0.5), bend))


_HABITS: dict[str, Callable[[np.random.Generator], Habit]] = {
    "compact symmetric core": _compact,
    "broad core + halo": _halo,
    "elongated core": _elongated,
    "needle streak": _needle,
    "diffuse cloud": _diffuse,
    "ring / vortex": _vortex,
    "core with vertical tail": _tailed,
}

MORPHOLOGIES = tuple(_HABITS)
"""The seven names, in the order of their numbers."""


def _in_plane(rng: np.random.Generator, out_of_plane: float) -> tuple[float, float, float]:
    """A random direction, at most so many radians out of the detector's plane."""
    turn, rise = rng.uniform(0, np.pi), rng.uniform(-out_of_plane, out_of_plane)
    return _direction(np.array([np.cos(rise) * np.cos(turn), np.cos(rise) * np.sin(turn), np.sin(rise)]))


def _direction(vector: Floats) -> tuple[float, float, float]:
    row, column, depth = vector.tolist()
    return row, column, depth


def _projected(habit: Habit, shape: tuple[int, int], rng: np.random.Generator) -> npt.NDArray[np.complex128]:
    """The crystal on voxels as wide as the frame's pixels, summed along the beam; the box's middle is the array's."""
    normals, heights, extent = _polyhedron(habit, rng)
    # A voxel's soft edge takes at most a pixel on either side.
    fit = min(1.0, *((_MOST * n - 2) / n * _UNITS / length for n, length in zip(shape, extent[:2], strict=True)))
    per_unit = np.array([*shape, min(shape)]) / _UNITS * fit
    axes = [np.arange(-half, half + 1) / pixels for half, pixels in zip(np.ceil(extent * per_unit / 2).astype(int), per_unit, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij", sparse=True)
    density = coverage(axes, normals, heights)
    if habit.rounding is not None:
        radius = np.sqrt(grid[0] ** 2 + grid[1] ** 2 + grid[2] ** 2)
        density = np.minimum(density, np.clip(0.5 - (radius - habit.rounding / 2) * per_unit.min(), 0, 1))
    phase = habit.strain_rad * smooth_field(density, habit.correlation * per_unit, rng)
    phase = phase + _screw_phase(habit, grid) + _tail_phase(habit, grid, float(extent[0]))
    return np.asarray((density * np.exp(1j * phase)).sum(2))


def _polyhedron(habit: Habit, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Facets of the crystal in a random turn: normals (F, 3), heights (F,), extent (3,), its box centred."""
    octahedron = np.array(list(itertools.product((-1, 1), repeat=3))) / np.sqrt(3)
    cube = np.concatenate([np.eye(3), -np.eye(3)])
    heights = np.concatenate([np.ones(8), np.full(6, TRUNCATION)]) * habit.size / 2
    heights *= 1 + habit.spread * rng.uniform(-1, 1, heights.size)
    normals = Rotation.from_quat(rng.normal(size=4)).apply(np.concatenate([octahedron, cube]))
    axis = np.asarray(habit.axis)
    normals = normals + (1 / habit.stretch - 1) * np.outer(normals @ axis, axis)
    lengths = np.linalg.norm(normals, axis=1)
    normals, heights = normals / lengths[:, None], heights / lengths
    if habit.plate is not None:
        across = np.asarray(habit.plate[0])
        normals = np.concatenate([normals, [across, -across]])
        heights = np.append(heights, [habit.plate[1] / 2] * 2)
    corners = HalfspaceIntersection(np.column_stack([normals, -heights]), np.zeros(3)).intersections
    middle = (corners.min(0) + corners.max(0)) / 2
    return normals, heights - normals @ middle, np.ptp(corners, axis=0)


def _screw_phase(habit: Habit, grid: tuple[Floats, ...]) -> Floats | float:
    """Q u of a screw dislocation with Q b = 2 pi: the angle around its line (Hirth & Lothe 1982, chapter 3)."""
    if habit.screw is None:
        return 0.0
    row, column, row_tilt, column_tilt, sign = habit.screw
    return np.asarray(sign * np.arctan2(grid[1] - column - column_tilt * grid[2], grid[0] - row - row_tilt * grid[2]))


def _tail_phase(habit: Habit, grid: tuple[Floats, ...], extent: float) -> Floats | float:
    """Q u of a crystal whose end is bent: straight up to a row, then a tilt that grows with the distance from it.

    The straight part makes the core; the growing slope draws the rest of the light out from there to the full bend.
    """
    if habit.tail is None:
        return 0.0
    start, bend = habit.tail
    bent = np.maximum(grid[0] / extent + 0.5 - start, 0) * extent
    return np.asarray(np.pi * bend / _UNITS * bent**2 / ((1 - start) * extent))


def _centred(psi: Wave, place: Callable[[Floats], tuple[float, float]]) -> Wave:
    """The same wave with the place of its diffraction moved to the frame's middle by a linear phase."""
    # A shift takes light around the frame's border, so one step does not arrive.
    for _ in range(4):
        rows, columns = place(intensity(psi))
        psi = psi * ramp((psi.shape[0], psi.shape[1]), (-rows, -columns))
    return psi


def _mass_place(photons: Floats) -> tuple[float, float]:
    """Centre of mass relative to (H//2, W//2), pixels."""
    rows, columns = (np.arange(n) - n // 2 for n in photons.shape)
    return float(photons.sum(1) @ rows / photons.sum()), float(photons.sum(0) @ columns / photons.sum())


def _core_place(photons: Floats) -> tuple[float, float]:
    """Centre of mass of the brightest pixel's surroundings, relative to (H//2, W//2), pixels."""
    peak = np.unravel_index(int(photons.argmax()), photons.shape)
    distance = np.hypot(*np.ogrid[[slice(-at, n - at) for at, n in zip(peak, photons.shape, strict=True)]])
    return _mass_place(np.where(distance <= _CORE_PX, photons, 0))


@dataclass(frozen=True)
class Collection:
    """Crystals by number, the morphologies in turn.

    seed : the collection's. first : number of the crystal on frame 0. photons : of every frame. shape : (rows, columns) of the frames.
    """

    seed: int
    first: int
    photons: float
    shape: tuple[int, int]

    def exit_wave(self, index: int) -> Wave:
        """(H, W) complex64; its squared modulus sums to the frame's expected photons."""
        number = self.first + index
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1, np.uint64)[0])
        return grow_crystal(self.morphology(index), seed, self.shape) * np.float32(np.sqrt(self.photons))

    def morphology(self, index: int) -> str:
        """Name of what frame `index` shows."""
        return MORPHOLOGIES[(self.first + index) % len(MORPHOLOGIES)]


def collection_of(scenario: Scenario, settings: CollectionSettings) -> Collection:
    """The collection a scenario asks for. Raises ConfigError where its detector is too small for a crystal."""
    shape = scenario.detector.shape
    if min(shape) < _LEAST_PX:
        raise ConfigError(f"scenario {scenario.name}: detector.shape {shape}: crystals need at least {_LEAST_PX} pixels along each axis")
    return Collection(scenario.seed if settings.seed is None else settings.seed, settings.first, scenario.dose_photons, shape)
