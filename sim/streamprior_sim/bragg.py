"""Crystal settings -> exit waves along a rocking curve: a faceted polyhedron with a smooth displacement, coherent in three dimensions.

The rocking angle moves the Ewald sphere through the peak along q_z, taken perpendicular to the detector; the curvature of the
sphere and the shear of a real rocking geometry are left out. A frame is one slice of the three-dimensional far field, so its
two-dimensional exit wave is psi(x, y) = sum over z of rho(x, y, z) exp(i Q u) exp(-i q_z z) (projection-slice theorem).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter
from scipy.spatial import HalfspaceIntersection
from scipy.spatial.transform import Rotation

from streamprior.errors import ConfigError
from streamprior_sim.optics import sample_pixel_m
from streamprior_sim.scenario import CrystalSettings, Scenario

Array = npt.NDArray[np.floating[Any]]

_LEAST_OVERSAMPLING = 2.0
"""Below it neighbouring pixels of a frame no longer determine its phases (Sayre 1952)."""

TRUNCATION = 2 / np.sqrt(3) * 0.95
"""Distance of the {100} facets over that of the {111}: Wulff's for gold is near 1.15, a little less makes them visible."""


class RockingCurve:
    """Owns one crystal; gives the exit wave of each frame.

    Raises ConfigError where the crystal is too large for the geometry: its diffraction would be sampled less than twice.
    """

    def __init__(self, scenario: Scenario, settings: CrystalSettings) -> None:
        detector = scenario.detector
        pitch = sample_pixel_m(detector.shape, detector.pixel_um * 1e-6, detector.distance_m, scenario.energy_ev)
        rng = np.random.default_rng(np.random.SeedSequence(scenario.seed if settings.seed is None else settings.seed, spawn_key=(1,)))
        normals, heights, extent_m = _polyhedron(settings, rng)
        self.oversampling = float(min(detector.shape[axis] * pitch[axis] / extent_m[axis] for axis in (0, 1)))
        if self.oversampling < _LEAST_OVERSAMPLING:
            raise ConfigError(
                f"scenario {scenario.name}: sample.size_nm {settings.size_nm:g}: this crystal's diffraction is sampled"
                f" {self.oversampling:.2f} times, it needs {_LEAST_OVERSAMPLING:g}; use at most"
                f" {settings.size_nm * self.oversampling / _LEAST_OVERSAMPLING:.0f} nm, a larger detector.distance_m or smaller pixels"
            )
        peak = 2 * np.pi * float(np.linalg.norm(settings.hkl)) / (settings.lattice_nm * 1e-9)
        half_turn = np.deg2rad(settings.rocking_range_deg) / 2
        self._q_z = peak * (np.linspace(-half_turn, half_turn, scenario.frames) if scenario.frames > 1 else np.zeros(1))
        # Along z twice as fine as in the plane, and never so coarse that the ends of the rocking curve alias.
        z_step = min(min(pitch) / 2, 0.5 * np.pi / max(peak * float(half_turn), 1.0))
        crystal = _crystal((normals, heights, extent_m), (*pitch, z_step), settings, peak, rng)
        crystal *= np.sqrt(scenario.dose_photons / _slice_powers(crystal, self._q_z, z_step).max())
        self._z = (np.arange(crystal.shape[2]) - crystal.shape[2] // 2) * z_step
        self._plane = crystal.shape[:2]
        self._shape = detector.shape
        self._crystal = crystal.astype(np.complex64).reshape(-1, self._z.size)

    def exit_wave(self, index: int) -> npt.NDArray[np.complex64]:
        """(H, W) complex64; its squared modulus sums to the frame's expected photons."""
        twist = np.exp(-1j * self._q_z[index] * self._z).astype(np.complex64)
        wave = np.zeros(self._shape, np.complex64)
        top, left = (full // 2 - part // 2 for full, part in zip(self._shape, self._plane, strict=True))
        wave[top : top + self._plane[0], left : left + self._plane[1]] = np.einsum("pz,z->p", self._crystal, twist).reshape(self._plane)
        return wave


def _crystal(
    polyhedron: tuple[Array, Array, Array],
    steps: tuple[float, float, float],
    settings: CrystalSettings,
    peak: float,
    rng: np.random.Generator,
) -> npt.NDArray[np.complex128]:
    """rho exp(i Q u) on a grid (rows, columns, z) of these steps in metres, just large enough; peak is |Q| in 1/m."""
    normals, heights, extent_m = polyhedron
    halves = [int(np.ceil(extent / 2 / step)) + 1 for extent, step in zip(extent_m, steps, strict=True)]
    density = coverage([np.arange(-half, half + 1) * step for half, step in zip(halves, steps, strict=True)], normals, heights)
    sigmas = [settings.correlation_nm * 1e-9 / step for step in steps]
    displacement = settings.displacement_rms_nm * 1e-9 * smooth_field(density, sigmas, rng)
    return np.asarray(density * np.exp(1j * peak * displacement))


def _polyhedron(settings: CrystalSettings, rng: np.random.Generator) -> tuple[Array, Array, Array]:
    """Facets of a randomly turned crystal: normals (F, 3) in (row, column, z), heights (F,) metres, extent (3,) metres, box centred."""
    octahedron = np.array(list(itertools.product((-1, 1), repeat=3))) / np.sqrt(3)
    cube = np.concatenate([np.eye(3), -np.eye(3)])
    heights = np.concatenate([np.ones(8), np.full(6, TRUNCATION)]) * settings.size_nm * 1e-9 / 2
    heights *= 1 + settings.facet_spread * rng.uniform(-1, 1, heights.size)
    normals = Rotation.from_quat(rng.normal(size=4)).apply(np.concatenate([octahedron, cube]))
    corners = HalfspaceIntersection(np.column_stack([normals, -heights]), np.zeros(3)).intersections
    middle = (corners.min(0) + corners.max(0)) / 2
    return normals, heights - normals @ middle, np.ptp(corners, axis=0)


def coverage(axes: list[Array], normals: Array, heights: Array) -> Array:
    """How much of each voxel lies inside the crystal, 0..1: a hard edge would send streaks around the frame's border (aliasing)."""
    rows, columns, depth = np.meshgrid(*axes, indexing="ij", sparse=True)
    steps = np.array([axis[1] - axis[0] for axis in axes])
    inside = np.ones([axis.size for axis in axes])
    for normal, height in zip(normals, heights, strict=True):
        above = normal[0] * rows + normal[1] * columns + normal[2] * depth - height
        np.minimum(inside, 0.5 - above / float(np.linalg.norm(normal * steps)), out=inside)
    return np.clip(inside, 0, 1)


def smooth_field(density: Array, sigmas: Sequence[float], rng: np.random.Generator) -> Array:
    """Smooth random field of unit rms in the crystal, without the mean and the slopes, which would only move the peak; sigmas in voxels."""
    field = gaussian_filter(rng.normal(size=density.shape), sigmas)
    inside = density > 0.5
    places = np.argwhere(inside) - np.array(density.shape) // 2
    plane = np.column_stack([np.ones(len(places)), places])
    slopes = np.linalg.lstsq(plane, field[inside], rcond=None)[0]
    grid = np.meshgrid(*[np.arange(n) - n // 2 for n in density.shape], indexing="ij", sparse=True)
    field = field - slopes[0] - sum(slope * axis for slope, axis in zip(slopes[1:], grid, strict=True))
    return np.asarray(field / field[inside].std())


def _slice_powers(crystal: npt.NDArray[np.complex128], q_z: Array, z_step: float) -> Array:
    """Sum of |psi|^2 of every frame's exit wave, no frame rendered: the Fourier series of the crystal's autocorrelation along z."""
    depth = crystal.shape[2]
    lags = np.fft.ifft((np.abs(np.fft.fft(crystal, 2 * depth, axis=2)) ** 2).sum((0, 1)))
    forward = np.arange(1, depth)
    turn = np.exp(-1j * np.multiply.outer(q_z, forward * z_step))
    return np.asarray(lags[0].real + 2 * (turn @ lags[1:depth]).real)
