"""A recording -> a CXI file (HDF5) that `train`, `evaluate` and `replay` read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.constants

from streamprior.errors import ConfigError
from streamprior_sim.gold_balls import Scan
from streamprior_sim.optics import sample_pixel_m
from streamprior_sim.twin import Progress, Recording, Twin

_CXI_VERSION = 140
_BAD_PIXEL = 1  # CXI 1.4, pixel status: "pixel is invalid"


def save(recording: Recording, path: str | os.PathLike[str], frames: slice | None = None, progress: Progress | None = None) -> Path:
    """Write frames, detector and positions; the file appears whole or not at all.

    Parameters
    ----------
    frames : which of the recording's frames.
    progress : called with (frames written, frames in all).

    Returns
    -------
    Path
        Of the file: `/entry_1/instrument_1/detector_1/data` (N, rows, columns) and, where the recording has positions,
        `/entry_1/sample_1/geometry_1/translation` (N, 3) metres of *sample* motion, the negative of the probe's as the stage reports it;
        NaN where it reports nothing. A ptychography twin adds its probe and, under `/entry_1/twin`, its truth.

    Raises
    ------
    ConfigError
        No frame is chosen.
    """
    chosen = range(*(frames or slice(None)).indices(len(recording)))
    if not chosen:
        raise ConfigError(f"{recording.name}: no frame is left of {len(recording)} by {frames}; choose others")
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    with h5py.File(partial, "w") as file:
        file["cxi_version"] = _CXI_VERSION
        file["entry_1/title"] = recording.name
        detector = file.create_group("entry_1/instrument_1/detector_1")
        _describe(file, detector, recording)
        _write_frames(detector, recording, chosen, progress)
        file["entry_1/data_1/data"] = h5py.SoftLink(detector.name + "/data")
        _write_positions(file, recording, chosen)
        # A recording that is replayed knows no truth; only the twin does.
        scan = recording.scan() if isinstance(recording, Twin) else None
        if scan is not None:
            _write_truth(file, scan, chosen)
    partial.replace(target)
    return target


def _describe(file: Any, detector: Any, recording: Recording) -> None:
    about = recording.detector()
    if about.energy_ev is not None:
        file["entry_1/instrument_1/source_1/energy"] = about.energy_ev * scipy.constants.e
    if about.distance_m is not None:
        detector["distance"] = about.distance_m
    if about.pixel_m is not None:
        detector["x_pixel_size"] = detector["y_pixel_size"] = about.pixel_m
        # Columns are the steps along (row, column); frames are not flipped, so y grows with the rows and x with the columns.
        detector["basis_vectors"] = np.array([[0, about.pixel_m], [about.pixel_m, 0], [0, 0]])
    if about.mask is not None:
        detector["mask"] = np.where(about.mask, _BAD_PIXEL, 0).astype(np.uint32)
    if about.frame_time_s is not None:
        detector["count_time"] = about.frame_time_s
    if about.shape and about.pixel_m and about.distance_m and about.energy_ev:
        detector["sample_pixel_m"] = sample_pixel_m(about.shape, about.pixel_m, about.distance_m, about.energy_ev)


def _write_positions(file: Any, recording: Recording, chosen: range) -> None:
    positions = [recording.position(index) for index in chosen]
    if all(position is None for position in positions):
        return
    moved = np.zeros((len(chosen), 3))
    moved[:, :2] = [(np.nan, np.nan) if position is None else (-position[0], -position[1]) for position in positions]
    file["entry_1/sample_1/geometry_1/translation"] = moved
    file["entry_1/sample_1/geometry_1/translation"].attrs["units"] = "m, sample motion (x, y, z); NaN where none was reported"


def _write_truth(file: Any, scan: Scan, chosen: range) -> None:
    """What a reconstruction should find: probe (modes, H, W), object, and the corners (N, 2) of the probe window, in its pixels."""
    file["entry_1/instrument_1/source_1/illumination"] = scan.probe
    file["entry_1/twin/object"] = scan.object
    file["entry_1/twin/object"].attrs["pixel_m"] = scan.pixel_m
    file["entry_1/twin/corners"] = scan.corners[list(chosen)]
    file["entry_1/twin/corners"].attrs["units"] = "object pixels (row, column); where the beam was"


def _write_frames(detector: Any, recording: Recording, chosen: range, progress: Progress | None) -> None:
    first = recording.frame(chosen[0])
    data = detector.create_dataset(
        "data", (len(chosen), *first.shape), first.dtype, chunks=(1, *first.shape), compression="gzip", compression_opts=1, shuffle=True
    )
    for number, index in enumerate(chosen):
        data[number] = recording.frame(index)
        if progress is not None:
            progress(number + 1, len(chosen))
