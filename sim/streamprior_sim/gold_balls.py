"""Gold-ball settings -> object, probe and scan of a ptychography run at 1 keV: synthetic, or from a published reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import xraydb

from streamprior.errors import ConfigError
from streamprior_sim.optics import (
    intensity,
    partially_coherent,
    propagated,
    sample_pixel_m,
    wavelength_m,
    zone_plate_probe,
)
from streamprior_sim.scenario import GoldBallSettings, Scenario

_GOLD = "Au", 19.3  # g/cm3 (xraydb)
_MEMBRANE = "Si3N4", 3.17  # g/cm3, stoichiometric bulk nitride
_MARGIN_PX = 2


@dataclass(frozen=True)
class Beam:
    """How the beam differs from modes that are steady.

    vibration_px : (rows, columns), rms during one exposure, object pixels. coherence_px : (rows, columns), transverse coherence length of
    each mode, object pixels; None where it is beyond all others. defocus_m_per_frame : the probe is that much further from its focus
    with every frame, metres.
    """

    energy_ev: float
    vibration_px: tuple[float, float] = (0.0, 0.0)
    coherence_px: tuple[float, float] | None = None
    defocus_m_per_frame: float = 0.0


@dataclass(frozen=True, eq=False)
class Scan:
    """A ptychography run.

    object : (rows, columns) complex64, transmission. probe : (modes, H, W) complex64 of frame 0 on whole pixels, sum of |probe|^2 = photons
    of an empty frame.
    corners : (N, 2) float64, (row, column) of the probe window in the object, pixels: where the beam was on each frame.
    reported : (N, 2) float64, the same as the stage tells it; NaN where it tells nothing.
    pixel_m : pitch of object and probe along rows and columns, metres.
    errors : (N, 2) float64, how far the beam was from where the stage stood, pixels.
    """

    object: npt.NDArray[np.complex64]
    probe: npt.NDArray[np.complex64]
    corners: npt.NDArray[np.float64]
    reported: npt.NDArray[np.float64]
    pixel_m: tuple[float, float]
    beam: Beam
    errors: npt.NDArray[np.float64]

    @property
    def reach_m(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """((first, last) along x, (first, last) along y): where the stage may stand, metres, its errors aside."""
        last = np.array(self.object.shape, np.float64) - self.probe.shape[1:]
        (left, top), (right, bottom) = self._place_m(np.zeros(2)), self._place_m(last)
        return (left, right), (top, bottom)

    def corner(self, index: int, position_m: tuple[float, float] | None = None) -> npt.NDArray[np.float64]:
        """(row, column), pixels: where the beam is on frame `index`; with `position_m` (x, y) as if the stage stood there, its error added.

        Raises ConfigError where the probe would leave the object.
        """
        if position_m is None:
            return self.corners[index]
        told = np.array(position_m[::-1]) / self.pixel_m - np.array(self.probe.shape[1:]) // 2
        # A place that was a whole pixel before it was metres is one again, and is then rendered without interpolation.
        corner = np.round(told + self.errors[index], 6)
        if not ((np.rint(corner) >= 0).all() and (np.rint(corner) + self.probe.shape[1:] <= self.object.shape).all()):
            (left, right), (top, bottom) = ((first * 1e6, last * 1e6) for first, last in self.reach_m)
            raise ConfigError(
                f"the probe at x {position_m[0] * 1e6:.4g}, y {position_m[1] * 1e6:.4g} um leaves the sample; stay within"
                f" x {left:.4g} to {right:.4g} um and y {top:.4g} to {bottom:.4g} um, or choose a scenario of more frames or larger steps"
            )
        return np.asarray(corner)

    def patch(self, index: int, position_m: tuple[float, float] | None = None) -> npt.NDArray[np.complex64]:
        """(H, W) complex64: the part of the object that frame `index` sees, the nearest whole pixels; `position_m` as in `corner`."""
        row, column = np.rint(self.corner(index, position_m)).astype(np.int64)
        return self.object[row : row + self.probe.shape[1], column : column + self.probe.shape[2]]

    def probe_of(self, index: int) -> npt.NDArray[np.complex64]:
        """(modes, H, W) complex64: the probe of frame `index` on its patch; it holds the fraction of a pixel that the patch does not."""
        return self._probes(index, self.corners[index], np.zeros((1, 2)))[0]

    def photons(
        self, index: int, field: npt.NDArray[np.complex64], position_m: tuple[float, float] | None = None
    ) -> npt.NDArray[np.float64]:
        """Expected photons (H, W) float64 of frame `index`, its probe multiplied by `field` (H, W): flux and tilt. `position_m` as in
        `corner`."""
        weights, offsets = _shakes(self.beam.vibration_px)
        patch, probes = self.patch(index, position_m), self._probes(index, self.corner(index, position_m), offsets)
        shaken = probes * np.sqrt(weights, dtype=np.float32)[:, None, None, None] * field
        probe = shaken.reshape(-1, *field.shape)
        if self.beam.coherence_px is None:
            return intensity(patch, probe)
        return partially_coherent(patch, probe, self.beam.coherence_px)

    def position_m(self, index: int) -> tuple[float, float] | None:
        """(x, y) of the probe's centre as the stage reports it, metres from the object's first pixel: x along columns, y along rows."""
        return None if np.isnan(self.reported[index]).any() else self._place_m(self.reported[index])

    def true_position_m(self, index: int) -> tuple[float, float]:
        """(x, y) of the probe's centre where it was, metres from the object's first pixel."""
        return self._place_m(self.corners[index])

    def _place_m(self, corner: npt.NDArray[np.float64]) -> tuple[float, float]:
        y = (corner[0] + self.probe.shape[1] // 2) * self.pixel_m[0]
        x = (corner[1] + self.probe.shape[2] // 2) * self.pixel_m[1]
        return float(x), float(y)

    def _probes(self, index: int, corner: npt.NDArray[np.float64], offsets_px: npt.NDArray[np.float64]) -> npt.NDArray[np.complex64]:
        """(K, modes, H, W): the probe of frame `index` on the patch at `corner`, moved by each of the offsets (K, 2)."""
        shifts_px = corner - np.rint(corner) + offsets_px
        defocus_m = self.beam.defocus_m_per_frame * index
        # On whole pixels nothing is transformed, so that not even rounding tells such a frame from one of a scan without fractions.
        if not shifts_px.any() and not defocus_m:
            return self.probe[None]
        return propagated(self.probe, shifts_px, defocus_m, self.pixel_m, self.beam.energy_ev)


def _shakes(vibration_px: tuple[float, float]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Weights (K,) and offsets (K, 2), pixels, of the places where a shaking probe is during one exposure; they add up incoherently.

    Gauss-Hermite quadrature with three nodes an axis: exact for what the frame does with the offset up to its fifth power.
    """
    if not any(vibration_px):
        return np.ones(1), np.zeros((1, 2))
    nodes = ((1 / 6, -(3**0.5)), (2 / 3, 0.0), (1 / 6, 3**0.5))
    weights = np.array([p * q for p, _ in nodes for q, _ in nodes])
    return weights, np.array([(row, column) for _, row in nodes for _, column in nodes]) * vibration_px


def scan_of(scenario: Scenario, settings: GoldBallSettings) -> Scan:
    """The scenario's scan. Raises ConfigError where the published file is absent, does not fit the detector or is left by the beam."""
    detector = scenario.detector
    pixel_m = sample_pixel_m(detector.shape, detector.pixel_um * 1e-6, detector.distance_m, scenario.energy_ev)
    told = _made(scenario, settings, pixel_m) if settings.data is None else _published(scenario, settings, settings.data, pixel_m)
    return _with_room(_astray(told, scenario, settings), scenario, settings)


def _made(scenario: Scenario, settings: GoldBallSettings, pixel_m: tuple[float, float]) -> Scan:
    detector = scenario.detector
    rng = np.random.default_rng(np.random.SeedSequence(scenario.seed if settings.seed is None else settings.seed, spawn_key=(1,)))
    places_m = _raster(scenario.frames, settings.step_nm * 1e-9)
    if settings.scan == "fermat":
        places_m = _fermat(scenario.frames, settings.step_nm * 1e-9)
    places = (places_m - places_m.min(0)) / pixel_m
    # The sample's size is that of the rounded scan, so that the same seed is the same sample whatever befalls the positions.
    size = np.rint(places).astype(np.int64).max(0) + np.array(detector.shape) + 2 * _MARGIN_PX
    probe = zone_plate_probe(detector.shape, pixel_m, scenario.energy_ev, settings.defocus_um * 1e-6, settings.second_mode)
    corners = _MARGIN_PX + (places if settings.subpixel else np.rint(places))
    return Scan(
        object=_balls((int(size[0]), int(size[1])), pixel_m, scenario.energy_ev, settings, rng),
        probe=(probe * np.sqrt(scenario.dose_photons)).astype(np.complex64),
        corners=corners,
        reported=corners,
        pixel_m=pixel_m,
        beam=Beam(scenario.energy_ev),
        errors=np.zeros_like(corners),
    )


def _astray(told: Scan, scenario: Scenario, settings: GoldBallSettings) -> Scan:
    """The scan of a beam that is not where the stage says, and does not keep still there."""
    index = np.arange(scenario.frames)
    reported = told.corners[index % len(told.corners)]
    # One generator for all frames: a frame's numbers come from its place in the sequence, whatever the number of frames.
    jitter, silence = (np.random.default_rng(np.random.SeedSequence(scenario.seed, spawn_key=(key,))) for key in (3, 4))
    error_nm = settings.jitter_nm * jitter.standard_normal(reported.shape) + np.multiply.outer(index, settings.drift_nm_per_frame)
    silent = silence.random(scenario.frames) < settings.position_missing_share
    rows, columns = told.pixel_m
    coherence_m, vibration_m = settings.coherence_um * 1e-6, settings.vibration_nm * 1e-9
    errors = error_nm * 1e-9 / told.pixel_m
    return replace(
        told,
        corners=reported + errors,
        errors=errors,
        reported=np.where(silent[:, None], np.nan, reported),
        beam=Beam(
            energy_ev=scenario.energy_ev,
            vibration_px=(vibration_m / rows, vibration_m / columns),
            coherence_px=(coherence_m / rows, coherence_m / columns) if coherence_m else None,
            defocus_m_per_frame=settings.defocus_um_per_frame * 1e-6,
        ),
    )


def _with_room(scan: Scan, scenario: Scenario, settings: GoldBallSettings) -> Scan:
    """The scan with as much bare membrane around its object as the beam's errors need; none is known around a published one."""
    before = np.maximum(0, np.ceil(-scan.corners.min(0))).astype(np.int64)
    reach = np.ceil(scan.corners.max(0)).astype(np.int64) + scan.probe.shape[1:]
    after = np.maximum(0, reach - scan.object.shape)
    if not before.any() and not after.any():
        return scan
    if settings.data is not None:
        raise ConfigError(
            f"scenario {scenario.name}: sample.data {settings.data}: the beam leaves its object by {max(before.max(), after.max())} pixels;"
            " make sample.drift_nm_per_frame or sample.jitter_nm smaller"
        )
    membrane = _membrane(scenario.energy_ev, settings)
    return replace(
        scan,
        object=np.pad(scan.object, tuple(zip(before, after, strict=True)), constant_values=membrane),
        corners=scan.corners + before,
        reported=scan.reported + before,
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
    return np.asarray(_membrane(energy_ev, settings) * transmission(thickness, _GOLD, energy_ev), np.complex64)


def _membrane(energy_ev: float, settings: GoldBallSettings) -> npt.NDArray[np.complex128]:
    return transmission(np.array(settings.membrane_nm * 1e-9), _MEMBRANE, energy_ev)


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


def _published(scenario: Scenario, settings: GoldBallSettings, path: Path, pixel_m: tuple[float, float]) -> Scan:
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
    corners = places - places.min(0) + margin
    corners = corners if settings.subpixel else np.rint(corners)
    scale = np.sqrt(scenario.dose_photons / float((np.abs(probe) ** 2).sum()))
    beam = Beam(scenario.energy_ev)
    return Scan(
        full.astype(np.complex64), (probe * scale).astype(np.complex64), corners, corners, own_m, beam, errors=np.zeros_like(corners)
    )
