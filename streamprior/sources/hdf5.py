"""HDF5 (CXI, NeXus, NXptycho, or a path in any file) -> a recording: frames less their dark, geometry and positions in SI units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the filters that detector files are compressed with
import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior.records import Detector
from streamprior.sources.recording import Recording, Stack, metres, whole

_JOULES_PER_EV = 1.602176634e-19
_EV_M = 1.239841984e-6
"""h c / e, electronvolt metres (CODATA 2018)."""

_EV = {"ev": 1.0, "kev": 1e3, "j": 1 / _JOULES_PER_EV, "joule": 1 / _JOULES_PER_EV, "joules": 1 / _JOULES_PER_EV}
_SECONDS = {"s": 1.0, "second": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6}

_PHOTON_EV = 0.1, 1e7
"""A number outside is no photon's energy: NXcxi_ptycho keeps the energy of the storage ring under source_1, and some writers put keV where
the format means joules."""

# Where the formats keep their frames, in the order of trying; the last resort is the only three-dimensional dataset.
_STACKS = (
    "entry_1/instrument_1/detector_1/data",  # CXI, NXcxi_ptycho
    "entry_1/data_1/data",
    "entry_1/data/data",
    "entry/data/data",  # NeXus, NXptycho
    "entry/instrument/detector/data",
    "entry1/data/data",
    "entry1/instrument/detector/data",
)

_DETECTORS = ("entry_1/instrument_1/detector_1", "entry/instrument/detector", "entry1/instrument/detector")

# Name -> unit where the file says none: CXI is in SI units throughout, NeXus files are written in electronvolts and angstroms.
_ENERGIES = {
    "entry_1/instrument_1/beam_1/energy": "J",
    "entry_1/instrument_1/beam_1/incident_beam_energy": "J",
    "entry_1/instrument_1/source_1/energy": "J",
    **{
        f"{entry}/instrument/{name}": "eV"
        for entry in ("entry", "entry1")
        for name in ("beam/incident_energy", "beam/incident_beam_energy", "beam/energy", "monochromator/energy")
    },
}
_WAVELENGTHS = {
    "entry_1/instrument_1/source_1/wavelength": "m",
    **{
        f"{entry}/instrument/{name}": "angstrom"
        for entry in ("entry", "entry1")
        for name in ("beam/incident_wavelength", "monochromator/wavelength")
    },
}

_PAIRS = (  # group, x and y in it, metres of sample motion where the file says no unit
    ("entry_1/sample_1/transformations", "x", "y"),
    ("entry_1/data", "x", "y"),  # NXcxi_ptycho: links to those of the sample
    ("entry/sample/transformations", "x", "y"),
    ("entry/sample/transformations", "x_translation", "y_translation"),
    ("entry/data", "x", "y"),
    ("entry1/sample/transformations", "x", "y"),
    ("entry1/data", "x", "y"),
)

_DAMAGE = (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError)
"""What h5py lets out of damaged files, found by cutting and overwriting some."""

_CXI_UNUSABLE = 0x7FF
"""Bits of CXI's pixel status that are reasons not to believe a pixel: invalid, saturated, hot, dead, shadowed, in a peak mask, to be
ignored, bad, out of resolution, missing, noisy. Those above are notes: corrected, 0x1000 "has signal above background" (which lit pixels
have in some ptychography files), background subtracted (Maia, Nature Methods 9, 854, 2012, and the format's document)."""


def open_hdf5(path: Path, inside: str = "", swmr: bool = False) -> Recording:
    """Every frame of the file.

    A CXI file's `data_dark` is averaged and subtracted, and what is below 0 is 0: counts are then float32, because an average of integers
    is none, and rounding it would shift every faint pixel by up to half a photon. A pixel that held no data (at its type's maximum, or
    negative) is NaN then, which says the same. Raster scans (lines, points, rows, columns) are rolled out line by line.

    Parameters
    ----------
    inside : path of the frames in the file; empty: where the formats keep them, or the only stack in it.
    swmr : the file is being written (single writer, multiple readers): positions, which may not be there yet, are left out.

    Raises
    ------
    ConfigError
        It cannot be read, has no such dataset, no stack of frames or several, or a dark of another shape.
    """
    try:
        file = h5py.File(path, "r", swmr=swmr)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read as HDF5 ({error}); copy it again") from None
    try:
        return _read(path, file, inside, swmr)
    except ConfigError:
        file.close()
        raise
    except _DAMAGE as error:
        file.close()
        raise ConfigError(f"{path}: cannot be read as HDF5 ({type(error).__name__}: {error}); copy it again") from None


def _read(path: Path, file: h5py.File, inside: str, swmr: bool) -> Recording:
    dataset = _dataset(path, file, inside)
    # `data_1` and `data` only link to the frames; what is known of them stands with the detector.
    detector = next((file[name] for name in _DETECTORS if isinstance(file.get(name), h5py.Group)), dataset.parent)
    stack: Stack = dataset if dataset.ndim <= 3 else Raster(dataset)
    recording = whole(path, stack)
    shape = recording.geometry.shape
    assert shape is not None
    geometry = Detector(
        shape=shape,
        mask=_mask(detector, shape),
        pixel_m=_pixel_m(detector),
        distance_m=_distance_m(detector),
        energy_ev=_energy_ev(file),
        frame_time_s=_quantity(detector.get("count_time"), _SECONDS, "s"),
    )
    dark = _dark(path, detector, shape)
    lead = dataset.shape[:-2]
    return whole(
        path,
        stack if dark is None else LessDark(stack, dark),
        geometry,
        positions=None if swmr else _positions(file, lead, geometry),
        metadata={"file": path.name, "title": _text(file.get("entry_1/title", file.get("entry/title")))},
    )


class Raster:
    """A dataset (..., rows, columns) of more than three dimensions as (N, rows, columns), the last of the leading axes fastest."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.dtype = dataset.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return math.prod(self.dataset.shape[:-2]), *self.dataset.shape[-2:]

    def __getitem__(self, index: int) -> Any:
        return self.dataset[tuple(int(one) for one in np.unravel_index(index, self.dataset.shape[:-2]))]


class LessDark:
    """Frames less the mean dark frame: (N, rows, columns) float32, at least 0, NaN where a pixel held no data.

    dark : (rows, columns), counts.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, raw: Stack, dark: npt.NDArray[np.float64]) -> None:
        self.raw = raw
        self._dark = dark.astype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.raw.shape

    def __getitem__(self, index: int) -> npt.NDArray[np.float32]:
        raw = np.asarray(self.raw[index])
        counts = raw.astype(np.float32)
        np.maximum(counts - self._dark, 0, out=counts)
        if raw.dtype.kind in "ui":
            counts[(raw == np.iinfo(raw.dtype).max) | (raw < 0)] = np.nan
        return counts


def _dataset(path: Path, file: h5py.File, inside: str) -> Any:
    if inside:
        found = file.get(inside)
        if not isinstance(found, h5py.Dataset):
            raise ConfigError(f"{path}: no dataset {inside}")
        return found
    for name in _STACKS:
        if isinstance(file.get(name), h5py.Dataset):
            return file[name]
    stacks: list[str] = []
    file.visititems(lambda name, item: stacks.append(name) if isinstance(item, h5py.Dataset) and item.ndim == 3 else None)
    if len(stacks) != 1:
        listed = ", ".join(f"{path}::/{name}" for name in stacks[:8])
        raise ConfigError(
            f"{path}: {'several stacks of frames; name one: ' + listed if stacks else 'no stack of frames (N, rows, columns)'}"
        )
    return file[stacks[0]]


def _mask(detector: Any, shape: tuple[int, int]) -> npt.NDArray[np.bool_] | None:
    """True where unusable: `mask` holds CXI's status bits; any bit of NeXus's `pixel_mask` (gap, dead, noisy, ..., virtual) is bad."""
    for name, bits in (("mask", _CXI_UNUSABLE), ("pixel_mask", -1)):
        found = detector.get(name)
        if isinstance(found, h5py.Dataset):
            if found.shape != shape or found.dtype.kind not in "buif":
                return None
            return np.asarray((found[()].astype(np.int64) & bits) != 0)
    return None


def _dark(path: Path, detector: Any, shape: tuple[int, int]) -> npt.NDArray[np.float64] | None:
    """The mean of data_dark, (N, rows, columns) or (rows, columns), read frame by frame."""
    found = detector.get("data_dark")
    if not isinstance(found, h5py.Dataset):
        return None
    if found.shape[-2:] != shape or found.ndim not in (2, 3) or 0 in found.shape or found.dtype.kind not in "uif":
        raise ConfigError(f"{path}: {found.name} of shape {found.shape} is no dark of frames of {shape}; correct or remove it")
    if found.ndim == 2:
        return np.asarray(found[()], np.float64)
    total = np.zeros(shape)
    for number in range(found.shape[0]):
        total += found[number]
    mean: npt.NDArray[np.float64] = total / found.shape[0]
    return mean


def _pixel_m(detector: Any) -> float | None:
    """x_pixel_size, or the length of the detector's basis vectors, (2, 3) or (3, 2) metres: one step along rows and columns each."""
    pixel_m = _length(detector.get("x_pixel_size"))
    basis = detector.get("basis_vectors")
    if pixel_m is not None or not isinstance(basis, h5py.Dataset) or basis.shape not in ((2, 3), (3, 2)):
        return pixel_m
    steps = np.linalg.norm(np.asarray(basis[()], np.float64), axis=1 if basis.shape == (2, 3) else 0)
    # One size stands for both sides here: of oblong pixels it is that of the same area.
    length = float(np.sqrt(steps[0] * steps[1])) * (_scale(basis, "m") or math.nan)
    return length if math.isfinite(length) and length > 0 else None


def _distance_m(detector: Any) -> float | None:
    """Distance, or where CXI leaves it out the z of the detector's corner."""
    distance_m = _length(detector.get("distance"))
    corner = detector.get("corner_position")
    if distance_m is None and isinstance(corner, h5py.Dataset) and corner.shape == (3,):
        z = abs(float(corner[2])) * (_scale(corner, "m") or math.nan)
        return z if math.isfinite(z) and z > 0 else None
    return distance_m


def _energy_ev(file: h5py.File) -> float | None:
    found = [_quantity(file.get(name), _EV, unit) for name, unit in _ENERGIES.items()]
    waves = [_length(file.get(name), unit) for name, unit in _WAVELENGTHS.items()]
    low, high = _PHOTON_EV
    return next((ev for ev in (*found, *(_EV_M / wave if wave else None for wave in waves)) if ev is not None and low < ev < high), None)


def _positions(file: h5py.File, lead: tuple[int, ...], geometry: Detector) -> npt.NDArray[np.float64] | None:
    """Probe positions, x then y. CXI's translation and the sample's transformations of NeXus are the motion of the sample: the probe moves
    the other way on it. position_px is (row, column) of the probe's window in object pixels, as programs that cannot know the pixel's
    size leave it."""
    count = math.prod(lead)
    for name in ("translation", "position_px"):
        found = file.get(f"entry_1/sample_1/geometry_1/{name}")
        if not (isinstance(found, h5py.Dataset) and found.ndim == 2 and found.shape[0] == count and found.shape[1] >= 2):
            continue
        pairs = np.asarray(found[:, :2], np.float64)
        if name == "translation":
            scale = _scale(found, "m")
            return None if scale is None else -pairs * scale
        # Where the file tells the pixel's size after all, they are metres like any other.
        pixels = geometry.reach_m / np.array(geometry.shape) if geometry.reach_m is not None and geometry.shape is not None else 1.0
        return np.ascontiguousarray((pairs * pixels)[:, ::-1])
    for group, x, y in _PAIRS:
        along, across = _side(file.get(f"{group}/{x}"), lead, 1), _side(file.get(f"{group}/{y}"), lead, 0)
        if along is not None and across is not None:
            return -np.column_stack((along, across))
    return None


def _side(dataset: Any, lead: tuple[int, ...], axis: int) -> npt.NDArray[np.float64] | None:
    """One coordinate of every point, metres: a number a point; or on a raster (lines, points) one a line (y), or one a point of it (x)."""
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind not in "uif":
        return None
    scale = _scale(dataset, "m")
    raster = len(lead) == 2 and dataset.shape == (lead[axis],)
    if scale is None or not (raster or dataset.size == math.prod(lead)):
        return None
    values = np.asarray(dataset[()], np.float64) * scale
    if raster and dataset.size != math.prod(lead):
        values = np.broadcast_to(values[None] if axis == 1 else values[:, None], lead)
    return values.ravel()


def _length(dataset: Any, default: str = "m") -> float | None:
    value = _number(dataset)
    scale = _scale(dataset, default) if value is not None else None
    return value * scale if value is not None and scale is not None else None


def _scale(dataset: Any, default: str) -> float | None:
    """Metres in the dataset's unit; None for a unit that is no length, so that a number is rather not known than wrong."""
    return metres(_unit(dataset, default))


def _quantity(dataset: Any, units: Mapping[str, float], default: str) -> float | None:
    value = _number(dataset)
    scale = units.get(_unit(dataset, default).lower()) if value is not None else None
    return value * scale if value is not None and scale is not None else None


def _unit(dataset: Any, default: str) -> str:
    """The `units` attribute up to a comma: some writers add a remark."""
    value = dataset.attrs.get("units", b"")
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        value = next(iter(value), b"")
    text = value.decode(errors="replace") if isinstance(value, bytes) else str(value)
    return text.partition(",")[0].strip() or default


def _number(dataset: Any) -> float | None:
    """A scalar, or an array that holds a single number, as some writers leave it."""
    if not isinstance(dataset, h5py.Dataset) or dataset.size != 1 or dataset.dtype.kind not in "uif":
        return None
    return float(np.asarray(dataset[()]).item())


def _text(dataset: Any) -> str:
    value = dataset[()] if isinstance(dataset, h5py.Dataset) and dataset.shape == () else b""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
