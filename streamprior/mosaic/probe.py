"""An illumination from a file, a model or an earlier scan -> the probe of a run: its modes, its places within a pixel, its slow refinement.

A probe is (modes, H, W) complex64 in the order of the object, sum |probe|^2 = photons of an empty frame (unitary transform).
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.arrays import make_plan
from streamprior.errors import ConfigError

Modes = npt.NDArray[np.complex64]

_DATASETS = ("entry_1/instrument_1/source_1/illumination", "entry/probe/modes", "probe")
"""Where a file keeps its probe: CXI, our own mosaics, and the plain name that reconstruction programs use."""

_PLACES = (16, 8, 4, 2)
_PLACES_BYTES = 128 * 2**20
"""Probes are kept at 16 x 16 places within a pixel, at fewer where they would take more than this. 16 leave 0.02 px of rounding (rms)."""

_LONGEST_STEP = 0.3
"""Of the probe's norm."""

_MODE_SHARE = 0.1
"""Part of the first mode's modulus that a further mode begins with; refinement finds how much it truly has."""


def load_probe(file: str | os.PathLike[str], shape: tuple[int, int]) -> Modes:
    """Read the modes of a probe.

    Parameters
    ----------
    file : .npy, or HDF5: `FILE::/dataset`, or a CXI file or one of our mosaics, whose own place is known.
    shape : (H, W) of the prepared frames.

    Raises
    ------
    ConfigError
        The file cannot be read, holds no probe, or one of another shape than the prepared frames'.
    """
    name, _, inside = os.fspath(file).partition("::")
    try:
        if name.endswith(".npy"):
            array: npt.NDArray[Any] = np.load(name, allow_pickle=False)
        else:
            with h5py.File(name) as opened:
                places = [inside] if inside else [place for place in _DATASETS if place in opened]
                if not places or not isinstance(opened.get(places[0]), h5py.Dataset):
                    raise ValueError(f"no dataset {inside}" if inside else f"none of the datasets {', '.join(_DATASETS)}")
                array = opened[places[0]][()]
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"mosaic.probe: {file} cannot be read ({error}); name a .npy file, a CXI file or FILE::/dataset") from None
    modes = array[None] if array.ndim == 2 else array
    if modes.ndim != 3 or modes.dtype.kind not in "cf" or not np.isfinite(modes).all() or not modes.any():
        raise ConfigError(
            f"mosaic.probe: {file} holds {array.dtype} {array.shape}; a probe is complex, (H, W) or (modes, H, W), and finite"
        )
    if modes.shape[1:] != shape:
        raise ConfigError(
            f"mosaic.probe: {Path(name).name} is {modes.shape[1]} x {modes.shape[2]} pixels, prepared frames are {shape[0]} x {shape[1]};"
            " give a probe of that size, or a prior that keeps the frames whole (train --shape)"
        )
    return modes.astype(np.complex64)


def modelled_probe(mean_counts: npt.NDArray[np.floating[Any]], spot_px: float) -> Modes:
    """A first probe out of the frames themselves: the modulus of their mean, out of focus until it fills a spot.

    The mean frame of a weak object is the pupil (a disc, or a ring behind a central stop) that the optics project on the detector. A
    defocus sends its ray at q cycles per pixel to the distance c q from the axis; c is taken so that the pupil's rms radius becomes a
    quarter of the spot.

    Parameters
    ----------
    mean_counts : (H, W), photons, beam at (H//2, W//2). spot_px : diameter of the spot on the sample, object pixels.
    """
    rows, columns = mean_counts.shape
    q2 = (scipy.fft.fftfreq(rows)[:, None] ** 2 + scipy.fft.fftfreq(columns)[None, :] ** 2).astype(np.float64)
    counts = scipy.fft.ifftshift(np.asarray(mean_counts, np.float64))
    radius = np.sqrt((counts * q2).sum() / counts.sum())
    curvature = spot_px / 4 / radius
    field = np.sqrt(counts) * np.exp(-1j * np.pi * curvature * q2)
    return np.asarray(scipy.fft.fftshift(scipy.fft.ifft2(field, norm="ortho"))[None], np.complex64)


def with_modes(probe: Modes, number: int) -> Modes:
    """The first `number` modes; where the probe has fewer, further ones begin as the first with nodes through its centre.

    A source of finite size makes such modes: the first times a coordinate is what a small shift of the beam adds to it.
    """
    if len(probe) >= number:
        return np.ascontiguousarray(probe[:number])
    first = probe[0]
    row, column = centroid(np.abs(probe[:1]) ** 2)
    y = (np.arange(first.shape[0]) - row)[:, None]
    x = (np.arange(first.shape[1]) - column)[None, :]
    modes = list(probe)
    for order in range(len(probe), number):
        node = y if order % 2 else x + 0 * y
        made = first * node ** ((order + 1) // 2)
        modes.append(made * (_MODE_SHARE * np.linalg.norm(first) / np.linalg.norm(made)))
    return np.asarray(modes, np.complex64)


def scaled(probe: Modes, photons: float) -> Modes:
    """The probe with so many photons."""
    return np.asarray(probe * np.sqrt(photons / float((np.abs(probe) ** 2).sum())), np.complex64)


def centroid(intensity: npt.NDArray[np.floating[Any]]) -> tuple[float, float]:
    """(row, column) of the centre of mass of (M, H, W), pixels."""
    plane = intensity.sum(0, dtype=np.float64)
    total = plane.sum()
    return float(plane.sum(1) @ np.arange(plane.shape[0]) / total), float(plane.sum(0) @ np.arange(plane.shape[1]) / total)


@lru_cache(256)
def _ramp(side: int, shift_px: float) -> npt.NDArray[np.complex64]:
    return np.asarray(np.exp(-2j * np.pi * shift_px * scipy.fft.fftfreq(side)), np.complex64)


def ramps(shape: tuple[int, int], shift_px: tuple[float, float]) -> npt.NDArray[np.complex64]:
    """(H, W): what the spectrum of a field is multiplied with to move it by (rows, columns), fractions of a pixel too."""
    return np.asarray(_ramp(shape[0], shift_px[0])[:, None] * _ramp(shape[1], shift_px[1]), np.complex64)


class ProbePlaces:
    """Owns the probe of a run, its copies at the places within a pixel that frames have needed, and its refinement.

    A frame at a fraction of a pixel sees the probe moved by that fraction. Copies are made when a place is first needed, and again after
    the probe has changed.

    modes : (M, H, W), the probe itself. probes : (S, M, H, W) complex64. power : (S, H, W) float32, their intensity. peak : largest
    intensity, the unit of the proximal weight. version : changes with the probe; while it stays, what is at a slot stays, and further slots
    may come.
    """

    def __init__(self, probe: Modes) -> None:
        self.modes = np.ascontiguousarray(probe, np.complex64)
        self._shape = (probe.shape[1], probe.shape[2])
        self.per_pixel = next((n for n in _PLACES if n * n * self.modes.nbytes <= _PLACES_BYTES), _PLACES[-1])
        self._plan = make_plan(self._shape, batch=len(probe))
        self._photons = float((np.abs(probe) ** 2).sum())
        self._slots: dict[tuple[int, int], int] = {}
        self.version = 0
        self.probes = np.empty((0, *probe.shape), np.complex64)
        self.power = np.empty((0, *self._shape), np.float32)
        self.peak = _peak(self.modes)

    def places(self, positions: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(B, 2) window corners in pixels -> whole pixels (B, 2) and the slot (B,) of the fraction that is left."""
        steps = np.rint(positions * self.per_pixel).astype(np.int64)
        corners, fractions = np.divmod(steps, self.per_pixel)
        keys = [(int(row), int(column)) for row, column in fractions]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._slots]
        if fresh:
            self._make(fresh)
        return corners, np.array([self._slots[key] for key in keys], np.int64)

    def refine(self, gradient: npt.NDArray[np.complex64], dose: npt.NDArray[np.float32], gain: float) -> None:
        """Move the probe along what a block of frames asks of it.

        Its photons are held, as an object that brightens the other way explains the frames as well; and no step is longer than a part of
        the probe, so that a block of frames without sense cannot carry it away.

        Parameters
        ----------
        gradient : (S, M, H, W), sum over frames of conj(object) (field - probe object), by slot. dose : (H, W), sum of |object|^2 over
            the same frames. gain : 1 moves it to the least-squares answer of this block alone.
        """
        spectrum = np.zeros(self.modes.shape, np.complex64)
        for key, slot in self._slots.items():
            if slot < len(gradient) and gradient[slot].any():
                spectrum += self._transformed(gradient[slot]) * self._ramps(key).conj()
        step = np.float32(gain) * self._returned(spectrum) / (dose + np.float32(0.1) * dose.max())
        length = float(np.linalg.norm(step) / np.linalg.norm(self.modes))
        if np.isfinite(length) and length > 0:
            self.replace(scaled(self.modes + step * np.float32(min(1.0, _LONGEST_STEP / length)), self._photons))

    def replace(self, modes: Modes) -> None:
        """Another probe from now on."""
        self.modes = modes
        self.peak = _peak(modes)
        self._slots.clear()
        self.version += 1

    def _make(self, keys: list[tuple[int, int]]) -> None:
        first = len(self._slots)
        if first + len(keys) > len(self.probes):
            room = min(self.per_pixel**2, max(2 * len(self.probes), first + len(keys)))
            self.probes = np.concatenate([self.probes, np.empty((room - len(self.probes), *self.probes.shape[1:]), np.complex64)])
            self.power = np.concatenate([self.power, np.empty((room - len(self.power), *self._shape), np.float32)])
        spectrum = self._transformed(self.modes)
        for slot, key in enumerate(keys, first):
            self.probes[slot] = self.modes if key == (0, 0) else self._returned(spectrum * self._ramps(key))
            self.power[slot] = (np.abs(self.probes[slot]) ** 2).sum(0)
            self._slots[key] = slot

    def _ramps(self, key: tuple[int, int]) -> npt.NDArray[np.complex64]:
        return ramps(self._shape, (key[0] / self.per_pixel, key[1] / self.per_pixel))

    def _transformed(self, modes: Modes) -> Modes:
        self._plan.psi[...] = modes
        self._plan.forward()
        return self._plan.field.copy()

    def _returned(self, spectrum: Modes) -> Modes:
        self._plan.field[...] = spectrum
        self._plan.backward()
        return self._plan.field * np.float32(1 / (self._shape[0] * self._shape[1]))


def _peak(modes: Modes) -> float:
    """Largest intensity of the probe: the unit of the proximal weight."""
    return float((np.abs(modes) ** 2).sum(0).max())
