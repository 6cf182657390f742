"""Frames as the detector gave them -> Photons: dark, flat, mask, crop around the beam centre, binning, valid-pixel map."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from streamprior.config import PrepareSettings
from streamprior.errors import ConfigError, WireError
from streamprior.jit import kernel
from streamprior.prior import Geometry, Prior
from streamprior.records import Batch, Detector, Flag, Photons


@dataclass(frozen=True, slots=True)
class Corrections:
    """What turns a detector's numbers into photons; every array has the detector's shape (rows, columns), None means no correction.

    mask : bool, True where a pixel is unusable. flat : float32 factor. dark : float32 counts, subtracted before the flat.
    saturation : counts at which a pixel stops counting, None for the dtype's maximum alone.
    """

    mask: npt.NDArray[np.bool_] | None = None
    flat: npt.NDArray[np.float32] | None = None
    dark: npt.NDArray[np.float32] | None = None
    saturation: float | None = None


def prepare(
    frames: npt.NDArray[Any],
    prior: Prior,
    mask: npt.NDArray[np.bool_] | None = None,
    flat: npt.NDArray[np.float32] | None = None,
    dark: npt.NDArray[np.float32] | None = None,
) -> Photons:
    """Correct, crop, mask and bin frames as the prior says.

    Parameters
    ----------
    frames : (B, rows, columns) or (rows, columns), uint8, uint16, uint32, signed integer or float, counts
        A value at the dtype's maximum, a negative integer or a NaN means that the pixel was not measured.
    prior : Prior
        Its geometry names the region of interest and the binning, its `invalid` map the pixels found unusable in training.
    mask, flat, dark : (rows, columns), optional
        True where unusable; factor; counts to subtract.

    Returns
    -------
    Photons
        counts (B, H, W) float32, photons; valid (H, W) bool, or (B, H, W) where a frame has bad pixels of its own.

    Raises
    ------
    ValueError
        The frames or a correction do not have the detector shape that the prior was made for.
    TypeError
        Pixels that are neither integers nor real numbers.
    """
    stack = np.asarray(frames)
    if stack.dtype.kind not in "uif":
        raise TypeError(f"frames are {stack.dtype}; photons are integers or real numbers")
    stack = stack[None] if stack.ndim == 2 else stack
    if stack.ndim != 3 or stack.shape[1:] != prior.geometry.detector_shape:
        rows, columns = prior.geometry.detector_shape
        raise ValueError(f"frames have shape {stack.shape}, this prior was made for (B, {rows}, {columns})")
    return _Region(prior.geometry, prior.invalid, Corrections(mask, flat, dark)).photons(list(stack))


def stacked(parts: Sequence[Photons]) -> Photons:
    """Frames of one run that were prepared one by one, as a batch whose `valid` is (B, H, W)."""
    shape = parts[0].counts.shape[1:]
    return Photons(
        counts=np.concatenate([one.counts for one in parts]),
        valid=np.stack([one.valid.reshape(shape) for one in parts]),
        flags=np.concatenate([one.flags for one in parts]),
        known=parts[0].known,
    )


def load_corrections(settings: PrepareSettings, shape: tuple[int, int]) -> Corrections:
    """The operator's mask, flat and dark from their files. Raises ConfigError where one cannot be read or has not the detector's shape."""

    def plane(file: Path | None) -> npt.NDArray[Any] | None:
        return None if file is None else _load_plane(file, shape)

    mask, flat, dark = plane(settings.mask), plane(settings.flat), plane(settings.dark)
    return Corrections(
        mask=mask != 0 if mask is not None else None,
        flat=flat.astype(np.float32) if flat is not None else None,
        dark=dark.astype(np.float32) if dark is not None else None,
        saturation=settings.saturation,
    )


def _load_plane(file: Path, shape: tuple[int, int]) -> npt.NDArray[Any]:
    name, _, inside = os.fspath(file).partition("::")
    try:
        if name.endswith(".npy"):
            plane: npt.NDArray[Any] = np.load(name, allow_pickle=False)
        else:
            with h5py.File(name) as opened:
                found = opened.get(inside) if inside else None
                if not isinstance(found, h5py.Dataset):
                    raise ValueError(f"no dataset {inside!r}")
                plane = np.asarray(found[()])
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: cannot be read as .npy or FILE::/dataset ({error})") from None
    # CXI keeps a stack of dark frames (data_dark); their mean is what is meant.
    plane = plane.mean(0) if plane.ndim == 3 else plane
    if plane.shape != shape:
        raise ConfigError(f"{file}: has shape {plane.shape}, the detector {shape}")
    return plane


class Preparer:
    """The stage: owns the corrections of the run in hand (they come with its start message)."""

    name = "prepare"

    def __init__(self, prior: Prior, corrections: Corrections | None = None) -> None:
        self._prior = prior
        self._corrections = corrections or Corrections()
        self._run = ""
        self._region: _Region | None = None

    def __call__(self, batch: Batch) -> Batch:
        if self._region is None or batch.run.uid != self._run:
            self._region = _Region(
                self._prior.geometry,
                self._prior.invalid,
                merged(self._corrections, batch.run.detector, self._prior.geometry.detector_shape),
            )
            self._run = batch.run.uid
        return replace(batch, photons=self._region.photons([frame.counts for frame in batch.frames]))


def check_shape(counts: npt.NDArray[Any], geometry: Geometry) -> None:
    """Raise WireError where a frame cannot be prepared with this geometry; called before a frame joins a batch."""
    if counts.shape != geometry.detector_shape:
        raise WireError("wrong_shape", f"the frame is {counts.shape}, the prior was made for {geometry.detector_shape}")
    if counts.dtype.kind not in "uif":
        raise WireError("wrong_dtype", f"pixels of type {counts.dtype}; photons are integers or real numbers")


def merged(own: Corrections, detector: Detector, shape: tuple[int, int]) -> Corrections:
    """The operator's corrections win over the detector's; a map of another shape than the frames' is of no use and left out."""

    def fitting(array: npt.NDArray[Any] | None) -> npt.NDArray[Any] | None:
        return array if array is not None and array.shape == shape else None

    masks = [mask for mask in (own.mask, fitting(detector.mask)) if mask is not None]
    return Corrections(
        mask=np.logical_or.reduce(masks) if masks else None,
        flat=own.flat if own.flat is not None else fitting(detector.flat),
        dark=own.dark,
        saturation=own.saturation if own.saturation is not None else detector.saturation,
    )


class _Region:
    """The crop of one geometry with its corrections cut to it, and the map that fills pixels which were not measured."""

    def __init__(self, geometry: Geometry, invalid: npt.NDArray[np.bool_], corrections: Corrections) -> None:
        self._shape = geometry.shape
        self._binning = geometry.binning
        self._saturation = np.inf if corrections.saturation is None else float(corrections.saturation)
        rows = geometry.centre[0] - geometry.shape[0] // 2 * geometry.binning + np.arange(geometry.shape[0] * geometry.binning)
        columns = geometry.centre[1] - geometry.shape[1] // 2 * geometry.binning + np.arange(geometry.shape[1] * geometry.binning)
        inside = ((rows >= 0) & (rows < geometry.detector_shape[0]))[:, None] & ((columns >= 0) & (columns < geometry.detector_shape[1]))[
            None, :
        ]
        self._rows = np.clip(rows, 0, geometry.detector_shape[0] - 1)
        self._columns = np.clip(columns, 0, geometry.detector_shape[1] - 1)
        bad = ~inside
        if corrections.mask is not None:
            bad |= self._cut(corrections.mask, geometry)
        self._dark = (
            np.zeros(bad.shape, np.float32) if corrections.dark is None else self._cut(corrections.dark, geometry).astype(np.float32)
        )
        self._flat = (
            np.ones(bad.shape, np.float32) if corrections.flat is None else self._cut(corrections.flat, geometry).astype(np.float32)
        )
        bad |= ~np.isfinite(self._flat) | ~np.isfinite(self._dark)
        binned = bad.reshape(self._shape[0], self._binning, self._shape[1], self._binning).any((1, 3)) | invalid
        self._valid = ~binned
        self._fill = _Fill(self._valid)

    def _cut(self, array: npt.NDArray[Any], geometry: Geometry) -> npt.NDArray[Any]:
        if array.shape != geometry.detector_shape:
            raise ValueError(f"a correction has shape {array.shape}, the detector {geometry.detector_shape}")
        return np.ascontiguousarray(array[np.ix_(self._rows, self._columns)])

    def photons(self, frames: Sequence[npt.NDArray[Any]]) -> Photons:
        counts = np.empty((len(frames), *self._shape), np.float32)
        flags = np.zeros(len(frames), np.uint32)
        own_valid: dict[int, npt.NDArray[np.bool_]] = {}
        for i, frame in enumerate(frames):
            unmeasured = np.zeros(self._shape, np.bool_)
            found = _prepare(
                _readable(frame),
                self._rows,
                self._columns,
                self._binning,
                self._dark,
                self._flat,
                self._limit(frame.dtype),
                self._valid,
                counts[i],
                unmeasured,
            )
            flags[i] = found
            fill = self._fill
            if found & (Flag.NONFINITE | Flag.SATURATED):
                own_valid[i] = self._valid & ~unmeasured
                fill = _Fill(own_valid[i])
            if not fill.apply(counts[i]):
                flags[i] |= Flag.EMPTY
        valid = self._valid
        if own_valid:
            valid = np.stack([own_valid.get(i, self._valid) for i in range(len(frames))])
        return Photons(counts, valid, flags, self._valid)

    def _limit(self, dtype: np.dtype[Any]) -> float:
        """Counts from which a pixel holds no data: the dtype's maximum means "not measured" on every DECTRIS stream."""
        return min(self._saturation, float(np.iinfo(dtype).max)) if dtype.kind in "ui" else self._saturation


def _readable(frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same numbers as compiled code reads them: in this machine's byte order, real numbers of 32 or 64 bits. No copy where they are."""
    real = np.dtype(np.float32 if frame.dtype.itemsize < 8 else np.float64)
    return frame.astype(real if frame.dtype.kind == "f" else frame.dtype.newbyteorder("="), copy=False)


class _Fill:
    """Writes into each pixel that was not measured the value of the nearest one that was."""

    def __init__(self, valid: npt.NDArray[np.bool_]) -> None:
        self._any_valid = bool(valid.any())
        self._holes = np.flatnonzero(~valid)
        self._nearest = np.empty(0, np.intp)
        if self._holes.size and self._any_valid:
            rows, columns = distance_transform_edt(~valid, return_distances=False, return_indices=True)
            self._nearest = np.ravel_multi_index((rows.ravel()[self._holes], columns.ravel()[self._holes]), valid.shape)

    def apply(self, counts: npt.NDArray[np.float32]) -> bool:
        """Fill in place; False when no photon is left on any pixel."""
        flat = counts.reshape(-1)
        if self._holes.size:
            flat[self._holes] = flat[self._nearest] if self._any_valid else 0.0
        return bool(counts.any())


@kernel
def _prepare(raw, rows, columns, binning, dark, flat, limit, valid, counts, unmeasured):  # type: ignore[no-untyped-def]
    """One frame: returns the flags of what it met; `unmeasured` marks prepared pixels that are bad in this frame alone."""
    flags = 0
    for y in range(counts.shape[0]):
        for x in range(counts.shape[1]):
            total = np.float32(0)
            for dy in range(binning):
                for dx in range(binning):
                    i = y * binning + dy
                    j = x * binning + dx
                    value = np.float64(raw[rows[i], columns[j]])
                    if not np.isfinite(value):
                        unmeasured[y, x] = True
                        flags |= 2 if valid[y, x] else 0
                    elif value >= limit or value < 0:
                        unmeasured[y, x] = True
                        flags |= 4 if valid[y, x] else 0
                    else:
                        photons = (np.float32(value) - dark[i, j]) * flat[i, j]
                        total += photons if photons > 0 else np.float32(0)
            counts[y, x] = total
    return flags
