"""Scenario -> Twin: frames by index, and the truth behind each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior.records import Detector
from streamprior_sim.bragg import RockingCurve
from streamprior_sim.crystals import Collection, collection_of
from streamprior_sim.detector import expose, make_sensor, no_data
from streamprior_sim.gold_balls import Scan, scan_of
from streamprior_sim.optics import intensity, ramp
from streamprior_sim.scenario import CollectionSettings, CrystalSettings, Scenario, StepSettings

_HOT_BLOCK_PX = 4

Progress = Callable[[int, int], None]
"""Called with (done, total)."""


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """What stands behind a frame: `optics.intensity(object, probe)` are the photons expected, background aside, of a beam that keeps still
    during the exposure and is as coherent as its modes; `Twin.expected` knows vibration and coherence too.

    object : (H, W) complex64. Bragg: the exit wave, flux and the ramp of a shifted centre included. Ptychography: the patch of the
        sample's transmission under the probe.
    probe : (modes, H, W) complex64, flux, ramp, defocus and the position's fraction of a pixel included; None for Bragg.
    position : (x, y) where the probe was on the sample, metres, whatever the stage reports; None for Bragg.
    centre : (row, column) of the beam or peak on the detector, pixels. flux : relative to the scenario's dose.
    valid : (H, W) bool, False on every pixel that is dead, hot, in a gap or behind the beam stop, known to the detector or not.
        A pixel that saturates shows it by the dtype's maximum. All False where the readout failed.
    morphology : what the frame shows, by name; None but for a collection of crystals.
    """

    object: npt.NDArray[np.complex64]
    probe: npt.NDArray[np.complex64] | None
    position: tuple[float, float] | None
    centre: tuple[float, float]
    flux: float
    valid: npt.NDArray[np.bool_]
    morphology: str | None = None


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What befalls the beam from outside, beside the scenario's own drift, for as long as somebody wants it.

    flux : factor. centre_px : (rows, columns) that the beam moves on the detector, pixels.
    """

    flux: float = 1.0
    centre_px: tuple[float, float] = (0.0, 0.0)


class Recording(Protocol):
    """Anything with frames by index that can go on the wire or into a file: a twin, or a file that is replayed."""

    name: str

    def __len__(self) -> int: ...

    def frame(self, index: int) -> npt.NDArray[Any]: ...

    def position(self, index: int) -> tuple[float, float] | None: ...

    def origin(self, index: int) -> int: ...

    def detector(self) -> Detector: ...


class Twin:
    """One experiment. Every frame has its own random generator, so frames do not depend on the order in which they are asked for."""

    def __init__(self, scenario: Scenario) -> None:
        self.name = scenario.name
        self.scenario = scenario
        self._sensor = make_sensor(scenario)
        _check_blocks(scenario)
        self._source = _source_of(scenario)

    def __len__(self) -> int:
        return self.scenario.frames

    def frame(self, index: int) -> npt.NDArray[Any]:
        """(rows, columns) of the detector's dtype, counts. Raises IndexError outside 0 <= index < len."""
        return self.exposed(index)

    def exposed(
        self, index: int, position_m: tuple[float, float] | None = None, disturbance: Disturbance | None = None
    ) -> npt.NDArray[Any]:
        """Frame `index` as it is when something else than the scenario moves the stage or the beam.

        Parameters
        ----------
        position_m : (x, y) of the probe on the sample, metres, as `position` tells it; the scenario's own where it is None.
        disturbance : what befalls the beam beside the scenario's drift.

        Returns
        -------
        (rows, columns) of the detector's dtype, counts; at its own position and undisturbed it is `frame`.

        Raises
        ------
        IndexError
            Outside 0 <= index < len.
        ConfigError
            The probe would leave the sample there, or the scenario has no stage (Bragg).
        """
        expected = self._expected(index, position_m, disturbance)
        if index in self.scenario.detector.no_data_frames:
            return no_data(self.scenario.detector)
        rng = np.random.default_rng([self.scenario.seed, index])
        return expose(expected, self._sensor, self._hot_blocks(index), rng)

    def expected(self, index: int) -> npt.NDArray[np.float64]:
        """(rows, columns) photons that reach the detector on average, background aside. Raises IndexError outside 0 <= index < len."""
        return self._expected(index)

    def _expected(
        self, index: int, position_m: tuple[float, float] | None = None, disturbance: Disturbance | None = None
    ) -> npt.NDArray[np.float64]:
        self._check(index)
        field = self._field(index)
        if disturbance is not None:
            field = field * np.sqrt(np.float32(disturbance.flux)) * ramp(self.scenario.detector.shape, disturbance.centre_px)
        if isinstance(self._source, Scan):
            return self._source.photons(index, field, position_m)
        if position_m is not None:
            raise ConfigError(f"scenario {self.name}: there is no stage to move in {self.scenario.sample.kind}; leave the position out")
        return intensity(self._source.exit_wave(index) * field)

    def truth(self, index: int) -> Truth:
        """What is behind frame `index`. Raises IndexError outside 0 <= index < len."""
        self._check(index)
        shift = self._shift(index)
        height, width = self.scenario.detector.shape
        psi, probe = self._psi_and_probe(index)
        failed = index in self.scenario.detector.no_data_frames
        return Truth(
            object=psi,
            probe=probe,
            position=self._source.true_position_m(index) if isinstance(self._source, Scan) else None,
            centre=(height // 2 + shift[0], width // 2 + shift[1]),
            flux=self._flux(index),
            valid=~(self._sensor.unusable | self._hot_blocks(index) | failed),
            morphology=self._source.morphology(index) if isinstance(self._source, Collection) else None,
        )

    def position(self, index: int) -> tuple[float, float] | None:
        """(x, y) of the probe on the sample as the stage reports it, metres: x along the columns of a frame, y along its rows.

        None for Bragg and where the stage reports nothing.
        """
        return self._source.position_m(index) if isinstance(self._source, Scan) else None

    def scan(self) -> Scan | None:
        """Object, probe and positions of a ptychography run; None for Bragg."""
        return self._source if isinstance(self._source, Scan) else None

    def origin(self, index: int) -> int:
        """Index of the frame in the twin: itself."""
        return index

    def detector(self) -> Detector:
        """What the start message says: shape, the mask of known bad pixels, geometry."""
        settings = self.scenario.detector
        return Detector(
            shape=settings.shape,
            mask=self._sensor.mask,
            saturation=None if settings.saturation_counts is None else float(settings.saturation_counts),
            beam_centre=(settings.shape[0] // 2, settings.shape[1] // 2),
            pixel_m=settings.pixel_um * 1e-6,
            distance_m=settings.distance_m,
            energy_ev=self.scenario.energy_ev,
            frame_time_s=1 / self.scenario.rate_hz,
        )

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")

    def _psi_and_probe(self, index: int) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.complex64] | None]:
        """Where the drift's flux and ramp belong: into the exit wave, or into the illumination, which leaves the sample as it is."""
        if isinstance(self._source, Scan):
            return self._source.patch(index), self._source.probe_of(index) * self._field(index)
        return self._source.exit_wave(index) * self._field(index), None

    def _field(self, index: int) -> npt.NDArray[np.complex64]:
        """(H, W): the frame's flux and the ramp of its shifted centre, as a factor of the wave."""
        return np.asarray(np.sqrt(np.float32(self._flux(index))) * ramp(self.scenario.detector.shape, self._shift(index)))

    def _drifting(self, index: int) -> int:
        return max(0, index - self.scenario.drift.start_frame)

    def _flux(self, index: int) -> float:
        drift = self.scenario.drift
        flux = (1 + drift.flux_per_frame) ** self._drifting(index)
        for step in self._steps(index):
            flux *= step.flux
        # A generator of its own: the Poisson noise of a frame stays the same whether the flux fluctuates or not.
        jitter = np.random.default_rng([self.scenario.seed, index, 1]).normal() if drift.flux_rms else 0.0
        return max(0.0, flux * (1 + drift.flux_rms * float(jitter)))

    def _shift(self, index: int) -> tuple[float, float]:
        drift = self.scenario.drift
        count = self._drifting(index)
        jumps = [step.centre_px for step in self._steps(index)]
        rows = drift.centre_px_per_frame[0] * count + sum(jump[0] for jump in jumps)
        columns = drift.centre_px_per_frame[1] * count + sum(jump[1] for jump in jumps)
        return rows, columns

    def _steps(self, index: int) -> list[StepSettings]:
        """Those that frame `index` shows."""
        steps = self.scenario.drift.steps
        return [step for step in steps if step.frame <= index and (step.frames == 0 or index < step.frame + step.frames)]

    def _hot_blocks(self, index: int) -> npt.NDArray[np.bool_]:
        hot = np.zeros(self.scenario.detector.shape, np.bool_)
        for step in self._steps(index):
            if step.hot_block is not None:
                row, column = step.hot_block
                hot[row : row + _HOT_BLOCK_PX, column : column + _HOT_BLOCK_PX] = True
        return hot


class Prerendered:
    """Some frames of a recording, held in memory and shown in turn: a detector that is faster than its simulation.

    Parameters
    ----------
    count : frames that are rendered, spread evenly over the recording.
    length : frames of the new recording, the old one's number where it is None. Frame i shows rendered frame i modulo `count`;
        `origin` tells which one that was.
    progress : called with (frames rendered, frames in all).
    """

    def __init__(self, recording: Recording, count: int, length: int | None = None, progress: Progress | None = None) -> None:
        self.name = recording.name
        self._recording = recording
        self._length = len(recording) if length is None else length
        total = max(1, min(count, len(recording)))
        self._origins = [number * len(recording) // total for number in range(total)]
        self._frames: list[npt.NDArray[Any]] = []
        for index in self._origins:
            self._frames.append(recording.frame(index))
            if progress is not None:
                progress(len(self._frames), total)

    def __len__(self) -> int:
        return self._length

    def frame(self, index: int) -> npt.NDArray[Any]:
        return self._frames[index % len(self._frames)]

    def position(self, index: int) -> tuple[float, float] | None:
        return self._recording.position(self.origin(index))

    def origin(self, index: int) -> int:
        return self._origins[index % len(self._origins)]

    def detector(self) -> Detector:
        return self._recording.detector()


def build(scenario: Scenario) -> Twin:
    """Make the sample and the detector of a scenario. Raises ConfigError, naming the key, where they do not fit together."""
    return Twin(scenario)


def _source_of(scenario: Scenario) -> RockingCurve | Collection | Scan:
    sample = scenario.sample
    if isinstance(sample, CrystalSettings):
        return RockingCurve(scenario, sample)
    return collection_of(scenario, sample) if isinstance(sample, CollectionSettings) else scan_of(scenario, sample)


def _check_blocks(scenario: Scenario) -> None:
    for number, step in enumerate(scenario.drift.steps):
        block = step.hot_block
        if block is not None and not all(0 <= at <= n - _HOT_BLOCK_PX for at, n in zip(block, scenario.detector.shape, strict=True)):
            raise ConfigError(f"scenario {scenario.name}: drift.steps.{number}.hot_block {block} does not lie on the detector")
