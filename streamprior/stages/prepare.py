"""Frames as the detector gave them -> Photons: dark, flat, mask, crop around the beam centre, binning, valid-pixel map."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from scipy.ndimage import distance_transform_edt

from streamprior.config import PrepareSettings
from streamprior.errors import ConfigError, WireError
from streamprior.jit import addresses, array_at, kernel
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
    """The crop of one geometry with its corrections cut to it, and what fills pixels that were not measured."""

    def __init__(self, geometry: Geometry, invalid: npt.NDArray[np.bool_], corrections: Corrections) -> None:
        self._shape, self._binning = geometry.shape, geometry.binning
        self._saturation = np.inf if corrections.saturation is None else float(corrections.saturation)
        height, width = (extent * geometry.binning for extent in geometry.shape)
        self._top = geometry.centre[0] - geometry.shape[0] // 2 * geometry.binning
        self._left = geometry.centre[1] - geometry.shape[1] // 2 * geometry.binning
        rows, columns = self._top + np.arange(height), self._left + np.arange(width)
        inside = ((rows >= 0) & (rows < geometry.detector_shape[0]))[:, None] & ((columns >= 0) & (columns < geometry.detector_shape[1]))
        window = np.ix_(np.clip(rows, 0, geometry.detector_shape[0] - 1), np.clip(columns, 0, geometry.detector_shape[1] - 1))

        def cut(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            if array.shape != geometry.detector_shape:
                raise ValueError(f"a correction has shape {array.shape}, the detector {geometry.detector_shape}")
            return np.ascontiguousarray(array[window])

        # A frame without corrections is corrected by nothing: that costs as little as leaving it out.
        self._dark = np.zeros((height, width), np.float32) if corrections.dark is None else cut(corrections.dark).astype(np.float32)
        self._flat = np.ones((height, width), np.float32) if corrections.flat is None else cut(corrections.flat).astype(np.float32)
        bad = ~inside | ~np.isfinite(self._flat) | ~np.isfinite(self._dark)
        if corrections.mask is not None:
            bad |= cut(corrections.mask)
        self._valid = ~(self._binned(bad) | invalid)
        self._valid_wide = self._valid.repeat(self._binning, 0).repeat(self._binning, 1)
        self._holes, self._nearest = _neighbours(self._valid)
        self._last = self._valid, self._holes, self._nearest  # of the last frame that had unmeasured pixels of its own

    def _binned(self, bad: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """A bin with one bad pixel is bad."""
        return np.asarray(bad.reshape(self._shape[0], self._binning, self._shape[1], self._binning).any((1, 3)))

    def photons(self, frames: Sequence[npt.NDArray[Any]]) -> Photons:
        counts = np.empty((len(frames), *self._shape), np.float32)
        found = np.empty(len(frames), np.uint32)
        at = 0
        for dtype, alike in groupby(frames, key=lambda frame: frame.dtype):  # one, unless the frames are of several series
            readable, limit = _reading(dtype, self._saturation)
            raw = [np.ascontiguousarray(frame, readable) for frame in alike]
            part = slice(at, at + len(raw))
            places = (addresses(raw), raw[0].shape, np.empty(0, readable))
            corrections = (self._dark, self._flat, self._valid_wide, self._holes, self._nearest)
            _prepare_all(*places, self._top, self._left, limit, *corrections, counts[part], found[part])
            at = part.stop
        flags = np.where(found & _LIT, 0, Flag.EMPTY).astype(np.uint32)
        own_valid: dict[int, npt.NDArray[np.bool_]] = {}
        for i in np.flatnonzero(found & _UNMEASURED).tolist():
            own_valid[i], flags[i] = self._without(frames[i], counts[i])
        valid = self._valid
        if own_valid:
            valid = np.stack([own_valid.get(i, self._valid) for i in range(len(frames))])
        return Photons(counts, valid, flags, self._valid)

    def _without(self, frame: npt.NDArray[Any], counts: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.bool_], int]:
        """(valid pixels, flags) of a frame that has unmeasured pixels of its own, which are filled in place."""
        readable, limit = _reading(frame.dtype, self._saturation)
        raw = frame.astype(readable, copy=False)
        height, width = self._valid_wide.shape
        inside = (
            slice(max(0, -self._top), min(height, raw.shape[0] - self._top)),
            slice(max(0, -self._left), min(width, raw.shape[1] - self._left)),
        )
        window = raw[inside[0].start + self._top : inside[0].stop + self._top, inside[1].start + self._left : inside[1].stop + self._left]
        known, infinite = self._valid_wide[inside], ~np.isfinite(window)
        outside = ~infinite & ~((window >= 0) & (window < limit))
        unmeasured = np.zeros((height, width), np.bool_)
        unmeasured[inside] = infinite | outside
        valid = self._valid & ~self._binned(unmeasured)
        if not np.array_equal(valid, self._last[0]):  # a pixel that is stuck is found again in every frame; to fill it takes 0.5 ms
            self._last = valid, *_neighbours(valid)
        _, holes, nearest = self._last
        pixels = counts.reshape(-1)
        pixels[holes] = pixels[nearest] if nearest.size else 0.0
        flags = Flag.NONFINITE * bool((infinite & known).any()) | Flag.SATURATED * bool((outside & known).any())
        return valid, flags | (0 if pixels.any() else Flag.EMPTY)


@lru_cache
def _reading(dtype: np.dtype[Any], saturation: float) -> tuple[np.dtype[Any], Any]:
    """(dtype in which compiled code reads such pixels, the counts in it from which a pixel holds no data).

    The dtype's maximum means "not measured" on every DECTRIS stream. Comparing integers in their own width is what makes the kernel quick;
    those of 64 bits and their limit are compared as float64.
    """
    if dtype.kind == "f":
        return np.dtype(np.float32 if dtype.itemsize < 8 else np.float64), saturation
    most = min(float(np.iinfo(dtype).max), saturation)
    if dtype.itemsize == 8:
        return np.dtype(np.float64), most
    native = dtype.newbyteorder("=")
    return native, native.type(max(0, math.ceil(most)))


def _neighbours(valid: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Flat indices of the pixels that were not measured, and of the nearest measured one of each; the latter empty where there is none."""
    holes = np.flatnonzero(~valid)
    if not holes.size or holes.size == valid.size:
        return holes, np.empty(0, np.intp)
    rows, columns = distance_transform_edt(~valid, return_distances=False, return_indices=True)
    return holes, np.ravel_multi_index((rows.ravel()[holes], columns.ravel()[holes]), valid.shape)


_UNMEASURED, _LIT = 1, 2


@kernel
def _prepare_all(places, shape, like, top, left, limit, dark, flat, valid, holes, nearest, counts, found):  # type: ignore[no-untyped-def]
    """places: addresses of frames of this shape and of the type of `like`. found: what `_prepare` says of each."""
    for b in range(places.size):
        raw = array_at(places[b], shape, like)
        found[b] = _prepare(raw, top, left, limit, dark, flat, valid, holes, nearest, counts[b])


@kernel
def _prepare(raw, top, left, limit, dark, flat, valid, holes, nearest, counts):  # type: ignore[no-untyped-def]
    """One frame; `dark`, `flat` and `valid` are those of the unbinned crop, whose first pixel is [top, left] of the detector.

    Returns whether a valid pixel was not measured (_UNMEASURED) and whether one holds photons (_LIT). Pixels beside the detector are left
    to the filling, as is all that is invalid.
    """
    unmeasured, lit, zero = np.uint32(0), np.uint32(0), np.float32(0)
    binning = valid.shape[0] // counts.shape[0]
    line = np.zeros(valid.shape[1], np.float32)
    first = max(0, -left)
    last = max(first, min(valid.shape[1], raw.shape[1] - left))
    for y in range(max(0, -top), min(valid.shape[0], raw.shape[0] - top)):
        out = counts[y // binning]
        # Slices, and neither branches nor gathers: so it is vectorised, a tenth of the time.
        here = (out if binning == 1 else line)[first:last]
        read, known = raw[top + y, left + first : left + last], valid[y, first:last]
        less, factor = dark[y, first:last], flat[y, first:last]
        for x in range(here.size):
            photons = (np.float32(read[x]) - less[x]) * factor[x]
            here[x] = photons if photons > zero else zero
            unmeasured |= np.uint32(known[x] & ~((read[x] >= 0) & (read[x] < limit)))
            lit |= np.uint32(known[x] & (photons > zero))
        if binning > 1:
            if y % binning == 0:
                out[:] = zero
            for dx in range(binning):
                for x in range(out.size):
                    out[x] += line[x * binning + dx]
    pixels = counts.reshape(-1)
    for k in range(holes.size):
        pixels[holes[k]] = pixels[nearest[k]] if nearest.size else zero
    return unmeasured + 2 * lit
