"""Expected photons -> what the detector reads: Poisson noise, bad pixels, beam stop, gaps, saturation, dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior_sim.scenario import DetectorSettings, Scenario


@dataclass(frozen=True, eq=False)
class Sensor:
    """One detector as built; every map is (rows, columns) bool.

    dead, hot, gap, stop : pixels that read 0, read noise, read the dtype's maximum, lie behind the beam stop.
    mask : what the detector's own mask says is unusable: all of them but the unknown ones among dead and hot.
    """

    settings: DetectorSettings
    dead: npt.NDArray[np.bool_]
    hot: npt.NDArray[np.bool_]
    gap: npt.NDArray[np.bool_]
    stop: npt.NDArray[np.bool_]
    mask: npt.NDArray[np.bool_]

    @property
    def unusable(self) -> npt.NDArray[np.bool_]:
        """(rows, columns) bool: the truth, the unknown ones included."""
        return self.dead | self.hot | self.gap | self.stop


def make_sensor(scenario: Scenario) -> Sensor:
    """Draw the bad pixels. Raises ConfigError where there are more of them than pixels, or a gap lies outside."""
    settings = scenario.detector
    rng = np.random.default_rng(np.random.SeedSequence(scenario.seed, spawn_key=(2,)))
    height, width = settings.shape
    if settings.dead + settings.hot > height * width:
        raise ConfigError(
            f"scenario {scenario.name}: detector.dead + detector.hot: {settings.dead + settings.hot} of {height * width} pixels"
        )
    drawn = rng.permutation(height * width)[: settings.dead + settings.hot]
    known = rng.permutation(drawn)[round(settings.unknown_share * drawn.size) :]
    dead, hot, mask = (_at(places, settings.shape) for places in (drawn[: settings.dead], drawn[settings.dead :], known))
    rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
    stop = np.hypot(rows[:, None], columns) < settings.beam_stop_radius_px
    gap = _gaps(scenario)
    return Sensor(settings, dead, hot, gap, stop, mask | gap | stop)


def expose(
    expected: npt.NDArray[np.float64], sensor: Sensor, extra_hot: npt.NDArray[np.bool_], rng: np.random.Generator
) -> npt.NDArray[Any]:
    """One frame.

    Parameters
    ----------
    expected : (rows, columns) float64, photons that reach the detector.
    extra_hot : (rows, columns) bool, pixels that turned hot during the run.
    rng : the frame's own generator.

    Returns
    -------
    (rows, columns) of the detector's dtype; its maximum where a pixel saturates or lies in a gap.
    """
    settings = sensor.settings
    light = np.where(sensor.stop, 0.0, expected + settings.background_photons)
    counts = rng.poisson(np.where(sensor.hot | extra_hot, settings.hot_counts, light))
    counts[sensor.dead] = 0
    no_data = np.iinfo(settings.dtype).max
    counts[counts >= (settings.saturation_counts or no_data)] = no_data
    counts[sensor.gap] = no_data
    # A setting above the dtype's range must not wrap around.
    return np.minimum(counts, no_data).astype(settings.dtype)


def no_data(settings: DetectorSettings) -> npt.NDArray[Any]:
    """A frame (rows, columns) of the detector's dtype whose readout failed: every pixel reads the dtype's maximum."""
    return np.full(settings.shape, np.iinfo(settings.dtype).max, settings.dtype)


def _at(places: npt.NDArray[np.int64], shape: tuple[int, int]) -> npt.NDArray[np.bool_]:
    pixels = np.zeros(shape, np.bool_)
    pixels.ravel()[places] = True
    return pixels


def _gaps(scenario: Scenario) -> npt.NDArray[np.bool_]:
    settings = scenario.detector
    gap = np.zeros(settings.shape, np.bool_)
    for name, extent, ranges in (
        ("gap_rows", settings.shape[0], settings.gap_rows),
        ("gap_columns", settings.shape[1], settings.gap_columns),
    ):
        for first, end in ranges:
            if not 0 <= first < end <= extent:
                raise ConfigError(f"scenario {scenario.name}: detector.{name} [{first}, {end}]: give first < end within 0 to {extent}")
            lines = gap if name == "gap_rows" else gap.T
            lines[first:end] = True
    return gap
