"""A running image of the sample <-> one NeXus file, `mosaic.nxs`, that any HDF5 viewer opens."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior.records import MosaicFrames, MosaicImage, Place
from streamprior.sinks.chunks import replace_whole

MOSAIC_FILE = "mosaic.nxs"
IMAGES = "/entry/mosaic"
"""The group that holds the images, with their coordinates `y` and `x`."""

DIMS = ("y", "x")
PLACES = tuple(place.name.lower() for place in Place)

_UNITS = {"m": "m", "px": "pixel"}
_FRAME_COLUMNS = (
    ("index", "", "frame"),
    ("place", "", "what became of the frame"),
    ("before", "", "chi2 of the prediction"),
    ("after", "", "chi2 of the update"),
    ("overlap", "", "light on known ground"),
)


def write_mosaic(image: MosaicImage, path: Path, about: Mapping[str, Any]) -> None:
    """Replace the file at `path`; a reader, and a kill, finds the old one or the new one whole.

    Parameters
    ----------
    image : amplitude and phase (float32, rad) are stored beside `object`, because few viewers make them from complex numbers.
    about : what else is known of the run, as JSON can hold it: `title`, `opened` (Unix seconds) and whatever is worth keeping beside it.

    Raises
    ------
    OSError
        The disk is full, read-only or gone.
    """
    # Made in memory: a full disk is then an OSError with its number, and no half-open HDF5 file is left in this process.
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        _fill(file, image, about)
    replace_whole(path, content.getbuffer())


def read_mosaic(path: Path) -> MosaicImage:
    """The image that `write_mosaic` stored.

    Raises
    ------
    ConfigError
        There is no such file, or it holds no mosaic.
    """
    try:
        with h5py.File(path, "r") as file:
            return _read(file["entry"])
    except (OSError, KeyError, ValueError, TypeError) as error:
        # All of these come from h5py for a file that is damaged or somebody else's.
        raise ConfigError(f"mosaic {path}: cannot be read ({error}); name the {MOSAIC_FILE} in a run's folder of the archive") from None


def summary(image: MosaicImage) -> dict[str, Any]:
    """What run.json tells of an image: everything but its arrays, None for what is not known."""
    counted = np.bincount(image.frames.place, minlength=len(PLACES)).tolist()
    numbers = {name: float(getattr(image, name)) for name in ("resolution", "disagreement", "chi2")}
    return {
        "file": MOSAIC_FILE,
        "shape": list(image.object.shape),
        "pixel": [float(side) for side in image.pixel],
        "origin": [float(place) for place in image.origin],
        "unit": image.unit,
        "serial": image.serial,
        "final": image.final,
        "frames_in": counted[Place.IN],
        "left_out": {PLACES[place]: counted[place] for place in Place if place != Place.IN},
        **{name: value if math.isfinite(value) else None for name, value in numbers.items()},
        "passes": image.passes,
        "warnings": list(image.warnings),
    }


def _fill(file: h5py.File, image: MosaicImage, about: Mapping[str, Any]) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    file.attrs.update(NX_class="NXroot", default="entry", creator="streamprior", file_time=now)
    entry = _group(file, "entry", "NXentry", default="mosaic")
    entry["title"] = str(about.get("title", f"image of the sample, run {image.run}"))
    entry["entry_identifier"] = image.run
    if about.get("opened") is not None:
        entry["start_time"] = datetime.fromtimestamp(about["opened"], UTC).isoformat(timespec="seconds")
    _fill_images(entry, image)
    _fill_probe(entry, image)
    _fill_frames(entry, image)
    _fill_ring_correlation(entry, image)
    _fill_process(entry, image, now, str(about.get("provenance", {}).get("version", "")))
    run = _group(entry, "run", "NXnote")
    run["type"] = "application/json"
    run["data"] = json.dumps(about, default=str)


def _fill_images(entry: h5py.Group, image: MosaicImage) -> None:
    facts = {
        "pixel": image.pixel,
        "origin": image.origin,
        "pixel_unit": image.unit,
        "dims": list(DIMS),
        "serial": image.serial,
        "final": image.final,
        "resolution": image.resolution,
        "disagreement": image.disagreement,
    }
    group = _data(entry, "mosaic", "phase", DIMS, ("amplitude", "light", "uncertainty"))
    for name, values, units, long_name in (
        ("object", image.object, "", "transmission"),
        ("amplitude", np.abs(image.object), "", "amplitude"),
        ("phase", np.angle(image.object), "rad", "phase (rad)"),
        ("light", image.light, "photons", "light (photons per pixel)"),
        ("uncertainty", image.uncertainty, "", "uncertainty, from odd and even frames"),
    ):
        # In one piece, for a reader in another process to take it at one moment; compressing noise costs ten times the writing.
        dataset = _dataset(group, name, values, units, long_name)
        # Here as well: Tiled shows a dataset with its own attributes and nothing of its group's.
        dataset.attrs.update(facts)
    for axis, name in enumerate(DIMS):
        places = image.origin[axis] + image.pixel[axis] * np.arange(image.object.shape[axis])
        _coordinate(group, name, places, image.unit)


def _fill_probe(entry: h5py.Group, image: MosaicImage) -> None:
    group = _data(entry, "probe", "modes", ("mode", *DIMS))
    _dataset(group, "modes", image.probe, "", "probe modes")
    _dataset(group, "mode", np.arange(len(image.probe)), "", "mode")
    for axis, name in enumerate(DIMS):
        side = image.probe.shape[1 + axis]
        _coordinate(group, name, image.pixel[axis] * (np.arange(side) - side // 2), image.unit)


def _fill_frames(entry: h5py.Group, image: MosaicImage) -> None:
    group = _data(entry, "frames", "after", ("index",), ("before", "overlap"))
    for name, units, long_name in _FRAME_COLUMNS:
        _dataset(group, name, getattr(image.frames, name), units, long_name)
    group["place"].attrs["names"] = list(PLACES)
    for axis, name in enumerate(DIMS):
        units = _UNITS[image.unit]
        _dataset(group, name, image.frames.position[:, axis], units, f"{name} of the probe on the sample ({units})")


def _fill_ring_correlation(entry: h5py.Group, image: MosaicImage) -> None:
    group = _data(entry, "frc", "correlation", ("frequency",), ("threshold",))
    units = f"1/{_UNITS[image.unit]}"
    _dataset(group, "frequency", image.frequency.astype(np.float64) / _side(image.pixel), units, f"spatial frequency ({units})")
    _dataset(group, "correlation", image.correlation, "", "Fourier ring correlation of odd and even frames")
    _dataset(group, "threshold", image.threshold, "", "half-bit threshold")


def _fill_process(entry: h5py.Group, image: MosaicImage, now: str, version: str) -> None:
    group = _group(entry, "process", "NXprocess")
    group["program"], group["version"], group["date"] = "streamprior", version, now
    for name in ("serial", "final", "passes", "chi2", "disagreement", "resolution"):
        group[name] = getattr(image, name)
    _dataset(group, "pixel", np.array(image.pixel, np.float64), _UNITS[image.unit], "edges of a pixel (y, x)")
    _dataset(group, "origin", np.array(image.origin, np.float64), _UNITS[image.unit], "centre of the first pixel (y, x)")
    group["resolution"].attrs["units"] = _UNITS[image.unit]
    group.create_dataset("warnings", data=list(image.warnings), shape=(len(image.warnings),), dtype=h5py.string_dtype())


def _read(entry: h5py.Group) -> MosaicImage:
    images, frames, rings, process = (entry[name] for name in ("mosaic", "frames", "frc", "process"))
    columns = {name: frames[name][...] for name, _, _ in _FRAME_COLUMNS}
    pixel, origin = (tuple(float(one) for one in process[name][...]) for name in ("pixel", "origin"))
    return MosaicImage(
        run=entry["entry_identifier"].asstr()[()],
        serial=int(process["serial"][()]),
        final=bool(process["final"][()]),
        object=images["object"][...],
        light=images["light"][...],
        uncertainty=images["uncertainty"][...],
        probe=entry["probe/modes"][...],
        unit={name: unit for unit, name in _UNITS.items()}[process["pixel"].attrs["units"]],
        pixel=(pixel[0], pixel[1]),
        origin=(origin[0], origin[1]),
        frequency=(rings["frequency"][...] * _side((pixel[0], pixel[1]))).astype(np.float32),
        correlation=rings["correlation"][...],
        threshold=rings["threshold"][...],
        resolution=float(process["resolution"][()]),
        disagreement=float(process["disagreement"][()]),
        chi2=float(process["chi2"][()]),
        passes=int(process["passes"][()]),
        frames=MosaicFrames(position=np.stack([frames[name][...] for name in DIMS], axis=1), **columns),
        warnings=tuple(process["warnings"].asstr()[...]),
    )


def _side(pixel: tuple[float, float]) -> float:
    """Rings are counted in cycles per pixel, whichever way: a pixel that is no square counts by its area."""
    return math.sqrt(pixel[0] * pixel[1])


def _group(parent: h5py.Group, name: str, nx_class: str, **attributes: Any) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs.update(NX_class=nx_class, **attributes)
    return group


def _data(parent: h5py.Group, name: str, signal: str, axes: Sequence[str], others: Sequence[str] = ()) -> h5py.Group:
    group = _group(parent, name, "NXdata", signal=signal, axes=list(axes))
    group.attrs.update({f"{axis}_indices": place for place, axis in enumerate(axes)})
    if others:
        group.attrs["auxiliary_signals"] = list(others)
    return group


def _dataset(group: h5py.Group, name: str, values: npt.NDArray[Any], units: str, long_name: str) -> h5py.Dataset:
    dataset = group.create_dataset(name, data=values)
    dataset.attrs.update(units=units, long_name=long_name)
    return dataset


def _coordinate(group: h5py.Group, name: str, places: npt.NDArray[Any], unit: str) -> None:
    _dataset(group, name, places, _UNITS[unit], f"{name} ({_UNITS[unit]})")
