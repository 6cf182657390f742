"""A run's object and support -> files that offline phasing starts from: cohere's directory, and a CXI file as PyNX reads it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import tifffile

from streamprior.config import PrepareSettings
from streamprior.errors import ConfigError
from streamprior.evaluate.metrics import model_of
from streamprior.evaluate.records import Tick
from streamprior.prior import load_prior
from streamprior.records import Detector
from streamprior.sinks.archive import ArchivedRun, read_run
from streamprior.sources.files import open_recording
from streamprior.stages.prepare import load_corrections, merged, prepare

_JOULES_PER_EV = 1.602176634e-19
_CXI_VERSION = 150  # the version that PyNX writes
_BAD_PIXEL = 1


@dataclass(frozen=True, slots=True)
class Handoff:
    """Where offline phasing starts.

    psi : (H, W) or (D, H, W) complex64, centred, in the scale of the unitary transform: sum |psi|^2 = photons. support : bool, like psi.
    counts : like psi, photons; None where the measured frame is not at hand. valid : bool, like psi; None where every pixel was measured.
    detector : geometry for the CXI file.
    """

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    counts: npt.NDArray[np.float32] | None = None
    valid: npt.NDArray[np.bool_] | None = None
    detector: Detector | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """Where a run's counts are: the recorded file, the prior the run was made with, and the daemon's corrections."""

    file: str
    prior: Path
    corrections: PrepareSettings


def hand_over(
    run_folder: Path, frames: str, output: Path, form: str, measured: Measurement | None = None, progress: Tick | None = None
) -> int:
    """Write the chosen frames of an archived run, each into `output/frame-NNNNNN` (cohere) or `output/frame-NNNNNN.cxi`.

    Parameters
    ----------
    frames : a Python slice of the run's frame indices, or one index. Frames of a slice that were not retrieved are left out.
    form : "cohere" or "cxi".
    measured : the run's recording, for counts and mask.

    Returns
    -------
    int
        Frames written.

    Raises
    ------
    ConfigError
        The folder holds no run, no chosen frame has an object, or the prior is not the run's.
    """
    try:
        run = read_run(run_folder)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"{run_folder}: no archived run can be read there ({error}); name a run's folder in the archive, with run.json and its arrays"
        ) from None
    chosen = _chosen(run, frames)
    seen = _Measured(run, measured) if measured is not None else None
    for number, frame in enumerate(chosen):
        psi, support = archived_start(run, frame)
        start = Handoff(psi, support) if seen is None else seen.added(psi, support, frame)
        name = f"frame-{frame:06d}"
        if form == "cohere":
            write_cohere(output / name, start)
        else:
            write_cxi(output / f"{name}.cxi", start)
        if progress is not None:
            progress("frames", number + 1, len(chosen))
    return len(chosen)


def _chosen(run: ArchivedRun, frames: str) -> list[int]:
    if frames.lstrip("-").isdigit():
        return [int(frames)]
    try:
        wanted = range(len(run.objects))[slice(*(int(part) if part.strip() else None for part in frames.split(":")))]
    except (ValueError, TypeError):
        raise ConfigError(f"--frames {frames!r}: neither an index nor a Python slice; write for example 812 or 0::10") from None
    found = [frame for frame in wanted if _retrieved(run.objects[frame])]
    if not found:
        raise ConfigError(f"--frames {frames!r}: none of these {len(wanted)} frames of the run has a retrieved object")
    return found


class _Measured:
    """Owns the recording that a run came from, and how the run's prior prepares its frames."""

    def __init__(self, run: ArchivedRun, measured: Measurement) -> None:
        file, prior_file = measured.file, measured.prior
        self._prior = load_prior(prior_file)
        used = run.about["provenance"].get("prior_hash", self._prior.content_hash)
        if used != self._prior.content_hash:
            raise ConfigError(
                f"prior {prior_file}: has hash {self._prior.content_hash[:12]}, the run was made with {str(used)[:12]}; name that one"
            )
        self._recording = open_recording(file)
        if self._recording.shape[1:] != self._prior.geometry.detector_shape:
            raise ConfigError(
                f"{file}: its frames are {self._recording.shape[1:]}, the run's detector was {self._prior.geometry.detector_shape}"
            )
        shape = self._prior.geometry.detector_shape
        self._corrections = merged(load_corrections(measured.corrections, shape), self._recording.geometry, shape)
        rows = run.frames.select(["index", "origin"]).to_pydict()
        # A frame that was replayed knows its place in the file; of one that came off a detector the index is that place.
        self._place = {index: origin if origin >= 0 else index for index, origin in zip(rows["index"], rows["origin"], strict=True)}

    def added(self, psi: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_], frame: int) -> Handoff:
        place = self._place.get(frame, frame)
        if place >= len(self._recording):
            raise ConfigError(f"frame {frame}: the recording holds {len(self._recording)} frames; is it that run's?")
        geometry = self._recording.geometry
        own = self._corrections
        photons = prepare(self._recording[place], self._prior, own.mask, own.flat, own.dark)
        binned = None if geometry.pixel_m is None else geometry.pixel_m * self._prior.geometry.binning
        return Handoff(psi, support, photons.counts[0], photons.valid.reshape(psi.shape), replace(geometry, pixel_m=binned))


def archived_start(run: ArchivedRun, frame: int) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.bool_]]:
    """psi and support (H, W) of one frame of an archived run, put back into the whole field.

    The archive keeps objects cropped to the prior's object box. The last step of a schedule that ends in ER leaves exact zeros outside the
    support, which is how the support is known again; where there are none, the whole box is the support.

    Raises
    ------
    ConfigError
        The run has no such frame, or its object was not retrieved.
    """
    if not 0 <= frame < len(run.objects):
        raise ConfigError(f"frame {frame}: the run holds frames 0 to {len(run.objects) - 1}")
    part = run.objects[frame]
    if not _retrieved(part):
        raise ConfigError(f"frame {frame}: no object was retrieved (dropped, empty, or refinement was skipped); choose another frame")
    row, column = run.about["object_offset"]
    psi = np.zeros(run.about["arrays"]["classes"]["frame_shape"], np.complex64)
    psi[row : row + part.shape[0], column : column + part.shape[1]] = part
    return psi, psi != 0


def _retrieved(part: npt.NDArray[np.complex64]) -> bool:
    """The archive fills frames that never came with NaN; an object without support is zero."""
    return bool(np.isfinite(part).all() and part.any())


def write_cohere(folder: Path, start: Handoff) -> Path:
    """Write `image.npy` and `support.npy` as cohere 4.5 reads them from its `continue_dir`, and `data.tif` where counts are known.

    cohere goes to reciprocal space by the unscaled inverse transform: its object is the complex conjugate of ours, divided by the square
    root of the number of pixels. Its data are magnitudes, transposed on disk. It has no mask: pixels that were not measured are filled with
    the object's own magnitude, which leaves them as the start has them.

    Returns
    -------
    Path
        Of the folder, for `init_guess = "continue"` and `continue_dir` in cohere's config_rec.
    """
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "image.npy", (np.conj(start.psi) / np.sqrt(start.psi.size)).astype(np.complex64))
    np.save(folder / "support.npy", start.support.astype(np.uint8))
    if start.counts is not None:
        magnitude = np.sqrt(np.maximum(start.counts, 0.0))
        filled = magnitude if start.valid is None else np.where(start.valid, magnitude, model_of(start.psi))
        tifffile.imwrite(folder / "data.tif", filled.astype(np.float32).T)
    return folder


def write_cxi(file: Path, start: Handoff) -> Path:
    """Write object, support and, where known, the frame with its mask into one CXI file.

    PyNX takes it for all three: `data=FILE object=FILE support=FILE`; it reads `/entry_1/instrument_1/detector_1/{data,mask}`,
    `/entry_1/image_1/data` and `/entry_1/image_1/mask` (1 inside the support). Its transform is ours, so there is no conjugation.

    Returns
    -------
    Path
        Of the file, which appears whole or not at all.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    with h5py.File(partial, "w") as cxi:
        cxi["cxi_version"] = _CXI_VERSION
        entry = cxi.create_group("entry_1")
        _write_image(entry.create_group("image_1"), start)
        if start.counts is not None:
            _write_detector(cxi, start, start.counts)
        main = "instrument_1/detector_1" if start.counts is not None else "image_1"
        entry["data_1/data"] = h5py.SoftLink(f"/entry_1/{main}/data")
    partial.replace(file)
    return file


def _write_image(image: Any, start: Handoff) -> None:
    image["data"] = start.psi
    image["mask"] = start.support.astype(np.int8)
    image["support"] = h5py.SoftLink("/entry_1/image_1/mask")
    image["data_type"] = "electron density"
    image["data_space"] = "real"
    image["is_fft_shifted"] = 0  # CXI 1.5: the object lies in the middle of the array
    image["process_1/command"] = "streamprior export"


def _write_detector(cxi: Any, start: Handoff, counts: npt.NDArray[np.float32]) -> None:
    detector = cxi.create_group("entry_1/instrument_1/detector_1")
    valid = np.ones(counts.shape, np.bool_) if start.valid is None else start.valid
    detector["data"] = np.where(valid, counts, np.float32(0))
    detector["mask"] = np.where(valid, 0, _BAD_PIXEL).astype(np.int8)
    about = start.detector
    if about is None:
        return
    if about.distance_m is not None:
        detector["distance"] = about.distance_m
    if about.pixel_m is not None:
        detector["x_pixel_size"] = detector["y_pixel_size"] = about.pixel_m
    if about.energy_ev is not None:
        cxi["entry_1/instrument_1/source_1/energy"] = about.energy_ev * _JOULES_PER_EV
