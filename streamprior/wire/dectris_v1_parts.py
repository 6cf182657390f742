"""One part of a DECTRIS stream V1 message <-> what it says: JSON, the blob that it describes, the detector's configuration."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.records import Detector
from streamprior.wire.compression import decompress, decompress_block
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior.wire.told import MAX_INDEX, cut, is_count, plain, shown

DTYPES = {name: np.dtype(name).newbyteorder("<") for name in ("uint8", "uint16", "uint32", "float32")}

FLAT, MASK, COUNTRATE = "dflatfield-1.0", "dpixelmask-1.0", "dcountrate_table-1.0"
"""The tables of a header."""

_MOST_JSON = 2**20
"""Bytes of a part that is read as JSON; the longest recorded one, a configuration, has 1,231."""


def _whole_number(digits: str) -> int | float:
    """More digits than any number here has take quadratic time: such a one becomes a float, or infinity, and is no count then."""
    return int(digits) if len(digits) <= 20 else float(digits)


_JSON = json.JSONDecoder(parse_int=_whole_number)


@dataclass(frozen=True, slots=True)
class Pixels:
    """What a part says about the blob behind it. shape : (rows, columns). size : bytes of the blob; None where it is not told."""

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    encoding: str
    size: int | None

    @property
    def nbytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize


def json_part(item: Mapping[str, Any]) -> bytes:
    return json.dumps(item, separators=(",", ":")).encode()


def json_of(part: bytes) -> Mapping[str, Any] | None:
    """The JSON object that a part is, None where it is none."""
    if len(part) > _MOST_JSON or part[:1] != b"{":
        return None
    try:
        item = _JSON.decode(part.decode())
    except (ValueError, RecursionError):
        return None
    return item if isinstance(item, dict) else None


def is_text(part: bytes) -> bool:
    """An appendix is text; a blob hardly ever is, but for one of zeros."""
    try:
        return len(part) <= _MOST_JSON and b"\0" not in part and bool(part.decode())
    except UnicodeDecodeError:
        return False


def described(item: Mapping[str, Any], encoding: str | None) -> Pixels:
    """The part before a blob; `encoding` where it names none."""
    missing = [key for key in ("shape", "type") if key not in item] + (["encoding"] if encoding is None and "encoding" not in item else [])
    if missing:
        raise WireError("missing_key", f"{shown(item.get('htype'))} without {', '.join(missing)}")
    shape, name, size, how = item["shape"], item["type"], item.get("size"), item.get("encoding", encoding)
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise WireError("wrong_dtype", f"pixels of type {shown(name)}, none of {sorted(DTYPES)}")
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(is_count, shape))):
        raise WireError("wrong_shape", f"shape is {cut(str(shape))}; expected [x, y]")
    columns, rows = shape
    if not 0 < rows * columns * dtype.itemsize <= MAX_MESSAGE_BYTES:
        raise WireError("wrong_shape", f"an image of {rows} x {columns} of {dtype}")
    if not isinstance(how, str):
        raise WireError("bad_compression", f"encoding is {shown(how)}")
    return Pixels((rows, columns), dtype, how, size if is_count(size) else None)


def unpacked(pixels: Pixels, blob: bytes) -> npt.NDArray[Any]:
    if pixels.size is not None and pixels.size != len(blob):
        raise WireError("wrong_shape", f"{len(blob)} bytes where {pixels.size} were announced")
    if pixels.encoding == f"bs{8 * pixels.dtype.itemsize}-lz4<":
        return decompress("bslz4", blob, pixels.dtype, pixels.shape)
    if pixels.encoding == "lz4<":
        return decompress_block(blob, pixels.dtype, pixels.shape)
    if pixels.encoding != "<":
        raise WireError("bad_compression", f"encoding {cut(repr(pixels.encoding))} of {pixels.dtype}; known are bsN-lz4<, lz4< and <")
    if len(blob) != pixels.nbytes:
        raise WireError("wrong_shape", f"{len(blob)} bytes for {pixels.shape} of {pixels.dtype}")
    return np.frombuffer(blob, pixels.dtype).reshape(pixels.shape)


def series_of(item: Mapping[str, Any]) -> str:
    """The number of a series: it starts again at 1 when the detector restarts. Emulators make it a short text."""
    series = item.get("series")
    if series is None:
        raise WireError("missing_key", f"{shown(item.get('htype'))} without series")
    if not is_count(series) and not (isinstance(series, str) and series.isascii() and series.isprintable() and 0 < len(series) <= 200):
        raise WireError("wrong_type", f"series is {shown(series)}")
    return str(series)


def is_configuration(item: Mapping[str, Any]) -> bool:
    """A configuration names no htype, and neither does an appendix."""
    return "x_pixels_in_detector" in item or "nimages" in item


def expected_images(config: Mapping[str, Any]) -> int | None:
    """How many images the triggers make; None where it is not told, or beyond what a run can hold: so it stands for "until stopped"."""
    images, triggers = config.get("nimages"), config.get("ntrigger", 1)
    if config.get("trigger_mode") in ("exte", "inte"):
        images = 1  # a trigger's own length is that of its one image
    if not is_count(images) or not is_count(triggers):
        return None
    return images * triggers if 0 < images * triggers <= MAX_INDEX else None


def detector_of(config: Mapping[str, Any], shape: tuple[int, int] | None, tables: Mapping[str, npt.NDArray[Any]]) -> Detector:
    def number(key: str) -> float | None:
        """Firmware sends 0 for what nobody has told it."""
        value = config.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            return None
        return float(value) or None

    row, column = number("beam_center_y"), number("beam_center_x")
    mask, flat = tables.get(MASK), tables.get(FLAT)
    # It is sent all the same where the detector has multiplied by it itself.
    applied = config.get("flatfield_correction_applied") is True
    return Detector(
        shape=shape,
        mask=mask != 0 if mask is not None else None,
        flat=flat.astype(np.float32) if flat is not None and not applied else None,
        saturation=number("countrate_correction_count_cutoff"),
        beam_centre=(row, column) if row is not None and column is not None else None,
        pixel_m=number("x_pixel_size"),
        distance_m=number("detector_distance"),
        energy_ev=number("photon_energy"),
        frame_time_s=number("frame_time"),
    )


def metadata_of(told: Mapping[str, Any]) -> Any:
    """An appendix as metadata of the run; empty where it is nested beyond reason."""
    try:
        return plain(told)
    except ValueError:
        return {}


def unix_time(date: Any) -> float | None:
    """data_collection_date, ISO 8601; without an offset it is taken for this machine's local time."""
    try:
        return datetime.datetime.fromisoformat(date).timestamp() if isinstance(date, str) else None
    except (ValueError, OverflowError, OSError):
        return None


def configuration(detector: Detector, expected: int, dtype: np.dtype[Any], date: datetime.datetime | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "bit_depth_image": 8 * dtype.itemsize,
        "compression": "bslz4",
        # Counts that have not been multiplied by the flat field yet, where there is one.
        "flatfield_correction_applied": detector.flat is None,
        "nimages": expected,
        "ntrigger": 1,
        "trigger_mode": "ints",
    }
    if date is not None:
        config["data_collection_date"] = date.isoformat()
    if detector.shape is not None:
        config |= {"y_pixels_in_detector": detector.shape[0], "x_pixels_in_detector": detector.shape[1]}
    if detector.beam_centre is not None:
        config |= {"beam_center_y": float(detector.beam_centre[0]), "beam_center_x": float(detector.beam_centre[1])}
    numbers = {
        "countrate_correction_count_cutoff": detector.saturation,
        "x_pixel_size": detector.pixel_m,
        "y_pixel_size": detector.pixel_m,
        "detector_distance": detector.distance_m,
        "photon_energy": detector.energy_ev,
        "frame_time": detector.frame_time_s,
        "count_time": detector.frame_time_s,
    }
    return config | {key: float(value) for key, value in numbers.items() if value is not None}
