"""Gold-ball settings -> object, probe and scan of a ptychography run at 1 keV: synthetic, or from a published reconstruction."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import xraydb

from streamprior.errors import ConfigError
from streamprior_sim.optics import sample_pixel_m, wavelength_m, zone_plate_probe
from streamprior_sim.scenario import GoldBallSettings, Scenario

_GOLD = "Au", 19.3  # g/cm3 (xraydb)
_MEMBRANE = "Si3N4", 3.17  # g/cm3, stoichiometric bulk nitride
_MARGIN_PX = 2


@dataclass(frozen=True, eq=False)
class Scan:
    """A ptychography run. Positions are whole object pixels, so that a frame's patch is its truth without interpolation.

    object : (rows, columns) complex64, transmission. probe : (modes, H, W) complex64, sum of |probe|^2 = photons of an empty frame.
    corners : (N, 2) int, (row, column) of the probe window in the object; frame i is at corner i modulo N.
    pixel_m : pitch of object and probe along rows and columns, metres.
    """

    object: npt.NDArray[np.complex64]
    probe: npt.NDArray[np.complex64]
    corners: npt.NDArray[np.int64]
    pixel_m: tuple[float, float]

    def patch(self, index: int) -> npt.NDArray[np.complex64]:
        """(H, W) complex64: the part of the object that frame `index` sees."""
        row, column = self.corners[index % len(self.corners)]
        return self.object[row : row + self.probe.shape[1], column : column + self.probe.shape[2]]

    def position_m(self, index: int) -> tuple[float, float]:
        """(x, y) of the probe's centre, metres from the object's first pixel: x along columns, y along rows."""
        row, column = self.corners[index % len(self.corners)]
        y = (row + self.probe.shape[1] // 2) * self.pixel_m[0]
        x = (column + self.probe.shape[2] // 2) * self.pixel_m[1]
        return float(x), float(y)


def scan_of(scenario: Scenario, settings: GoldBallSettings) -> Scan:
    """The scenario's scan. Raises ConfigError where the published file is absent or does not fit the detector."""
    detector = scenario.detector
    pixel_m = sample_pixel_m(detector.shape, detector.pixel_um * 1e-6, detector.distance_m, scenario.energy_ev)
    if settings.data is not None:
        return _published(scenario, settings.data, pixel_m)
    rng = np.random.default_rng(np.random.SeedSequence(scenario.seed if settings.seed is None else settings.seed, spawn_key=(1,)))
    places_m = _raster(scenario.frames, settings.step_nm * 1e-9)
    if settings.scan == "fermat":
        places_m = _fermat(scenario.frames, settings.step_nm * 1e-9)
    corners = np.rint((places_m - places_m.min(0)) / pixel_m).astype(np.int64) + _MARGIN_PX
    size = corners.max(0) + np.array(detector.shape) + _MARGIN_PX
    probe = zone_plate_probe(detector.shape, pixel_m, scenario.energy_ev, settings.defocus_um * 1e-6, settings.second_mode)
    return Scan(
        object=_balls((int(size[0]), int(size[1])), pixel_m, scenario.energy_ev, settings, rng),
        probe=(probe * np.sqrt(scenario.dose_photons)).astype(np.complex64),
        corners=corners,
        pixel_m=pixel_m,
    )


def transmission(thickness_m: npt.NDArray[np.float64], material: tuple[str, float], energy_ev: float) -> npt.NDArray[np.complex128]:
    """exp(-k (beta + i delta) T) of a thickness in metres; material is (formula, g/cm3), constants from xraydb."""
    delta, beta, _ = xraydb.xray_delta_beta(*material, energy_ev)
    wavenumber = 2 * np.pi / wavelength_m(energy_ev)
    return np.asarray(np.exp(-wavenumber * (beta + 1j * delta) * thickness_m))


def _balls(
    shape: tuple[int, int], pixel_m: tuple[float, float], energy_ev: float, settings: GoldBallSettings, rng: np.random.Generator
) -> npt.NDArray[np.complex64]:
    extent = np.array(shape) * pixel_m
    radius = settings.ball_nm * 1e-9 / 2
    clusters = rng.poisson(settings.clusters_per_um2 * float(extent.prod()) * 1e12)
    thickness = np.zeros(shape)
    for cluster in rng.uniform(0, 1, (clusters, 2)) * extent:
        for ball in _cluster(cluster, 2 * radius, max(1, int(rng.poisson(settings.balls_per_cluster))), rng):
            _add_ball(thickness, ball, radius, pixel_m)
    membrane = transmission(np.array(settings.membrane_nm * 1e-9), _MEMBRANE, energy_ev)
    return np.asarray(membrane * transmission(thickness, _GOLD, energy_ev), np.complex64)


def _cluster(centre_m: npt.NDArray[np.float64], diameter_m: float, members: int, rng: np.random.Generator) -> list[npt.NDArray[np.float64]]:
    """Balls (row, column) that stick where they touch: each new one beside a random one that is there, if no other is in its way."""
    balls = [centre_m]
    for angle, draw in rng.uniform(0, 1, (10 * members, 2)):
        beside = balls[int(draw * len(balls))] + diameter_m * np.array([np.sin(2 * np.pi * angle), np.cos(2 * np.pi * angle)])
        if np.linalg.norm(np.array(balls) - beside, axis=1).min() > 0.8 * diameter_m and len(balls) < members:
            balls.append(beside)
    return balls


def _add_ball(thickness: npt.NDArray[np.float64], centre_m: npt.NDArray[np.float64], radius: float, pixel_m: tuple[float, float]) -> None:
    """Add the path through one ball, averaged over 4 x 4 points a pixel: its edge is steep and would alias."""
    first = np.maximum(np.floor((centre_m - radius) / pixel_m).astype(int), 0)
    last = np.minimum(np.ceil((centre_m + radius) / pixel_m).astype(int) + 1, thickness.shape)
    if (last <= first).any():
        return
    offsets = (np.arange(4) - 1.5) / 4
    rows, columns = ((np.arange(a, b)[:, None] + offsets).ravel() for a, b in zip(first, last, strict=True))
    squared = ((rows * pixel_m[0] - centre_m[0]) ** 2)[:, None] + (columns * pixel_m[1] - centre_m[1]) ** 2
    path = 2 * np.sqrt(np.maximum(radius**2 - squared, 0))
    size = last - first
    thickness[first[0] : last[0], first[1] : last[1]] += path.reshape(size[0], 4, size[1], 4).mean((1, 3))


def _raster(count: int, step_m: float) -> npt.NDArray[np.float64]:
    """(N, 2) metres (row, column), a square of rows."""
    side = int(np.ceil(np.sqrt(count)))
    index = np.arange(count)
    return np.asarray(np.column_stack([index // side, index % side]) * step_m, np.float64)


def _fermat(count: int, step_m: float) -> npt.NDArray[np.float64]:
    """(N, 2) metres: radius c sqrt(n), n golden angles, with as many positions an area as a raster of that step.

    Source: Huang et al., Optics Express 22, 12634 (2014).
    """
    index = np.arange(count)
    radius, angle = step_m / np.sqrt(np.pi) * np.sqrt(index), index * np.pi * (3 - np.sqrt(5))
    return np.column_stack([radius * np.sin(angle), radius * np.cos(angle)])


def _published(scenario: Scenario, path: Path, pixel_m: tuple[float, float]) -> Scan:
    where = f"scenario {scenario.name}: sample.data {path}"
    try:
        with h5py.File(path, "r") as file:
            full, probe = file["object"][()], file["probe"][()]
            basis, translation = file["basis"][()], file["translation"][()]
    except (OSError, KeyError) as error:
        raise ConfigError(f"{where}: cannot be read ({error}); it must hold object, probe, translation and basis") from None
    own_m = float(np.linalg.norm(basis[:, 0])), float(np.linalg.norm(basis[:, 1]))
    if probe.shape[1:] != scenario.detector.shape:
        raise ConfigError(f"{where}: its probe is {probe.shape[1:]}; set detector.shape to that (now {scenario.detector.shape})")
    if not np.allclose(own_m, pixel_m, rtol=0.01):
        raise ConfigError(
            f"{where}: its pixel is {own_m[0] * 1e9:.3f} nm, this geometry's {pixel_m[0] * 1e9:.3f}; change detector.distance_m"
            f" to {scenario.detector.distance_m * own_m[0] / pixel_m[0]:.5g}"
        )
    places = translation @ np.linalg.pinv(basis).T
    # The reconstruction pads the scanned region by the same margin on every side.
    margin = (np.array(full.shape) - np.ptp(places, axis=0) - probe.shape[1:]) / 2
    corners = np.rint(places - places.min(0) + margin).astype(np.int64)
    scale = np.sqrt(scenario.dose_photons / float((np.abs(probe) ** 2).sum()))
    return Scan(full.astype(np.complex64), (probe * scale).astype(np.complex64), corners, own_m)
