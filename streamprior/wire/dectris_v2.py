"""DECTRIS stream V2 messages (one CBOR map each) <-> SeriesStart, Frame, SeriesEnd.

Facts: tag 55799 around a map whose `type` is start, image or end; pixels are tag 40 [[rows, columns], typed array], the typed
array's tag (RFC 8746) names the dtype, and its bytes are plain or tag 56500 [algorithm, element size, bytes]. There is no hash
of the pixels, so length, dtype and shape are all that can be checked.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import cbor2
import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Message
from streamprior.wire.cbor import Outline, check, follows, outlined
from streamprior.wire.compression import compress, decompress
from streamprior.wire.told import MAX_INDEX, cut, is_count, late_positions, of_frame, plain, shown

_SELF_DESCRIBED = 55799
_MULTI_DIMENSIONAL = 40
_COMPRESSED = 56500
_EV_ANGSTROM = 12398.41984
_IMAGE = b"dtypeeimage"  # how an image's map begins: the key "type" and its value
"""h c / e; wavelengths come in angstrom."""

# RFC 8746: tag of a typed array -> dtype. Detectors send little-endian ones; the others are read as well, and made little.
DTYPES: dict[int, np.dtype[Any]] = {
    64: np.dtype("u1"),
    65: np.dtype(">u2"),
    66: np.dtype(">u4"),
    67: np.dtype(">u8"),
    69: np.dtype("<u2"),
    70: np.dtype("<u4"),
    71: np.dtype("<u8"),
    72: np.dtype("i1"),
    73: np.dtype(">i2"),
    74: np.dtype(">i4"),
    77: np.dtype("<i2"),
    78: np.dtype("<i4"),
    81: np.dtype(">f4"),
    82: np.dtype(">f8"),
    85: np.dtype("<f4"),
    86: np.dtype("<f8"),
}
_TAGS = {dtype: tag for tag, dtype in DTYPES.items() if dtype.byteorder != ">"}

# What the parser makes of a map, plain and behind a tag; to ask for a Mapping takes six times as long.
_MAPS = (dict, getattr(cbor2, "frozendict", Mapping))

# What is left for the parser to refuse once the structure is known: texts that are no UTF-8, dates that are none.
_PARSER_ERRORS = (cbor2.CBORDecodeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, OSError, MemoryError)

MAX_MESSAGE_BYTES = 256 * 2**20
"""An EIGER2 16M image of three uncompressed 32-bit channels has 217 MB; nothing larger is decoded, and no image is larger unpacked."""


class StreamV2Decoder:
    """Message bytes -> records. Owns what the current series' start message said, to check its images against it.

    Parameters
    ----------
    source : str
        Name of the source, part of every frame's identity.
    channel : str
        Threshold channel that is read; "difference" channels wrap around zero and are of no use as photons.
    max_message_bytes : int
        A larger message is refused before it is decoded.
    """

    def __init__(self, source: str, channel: str = "threshold_1", max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._source = source
        self._channel = channel
        self._max_message_bytes = max_message_bytes
        self._series = ""
        self._like: tuple[tuple[int, ...], np.dtype[Any]] | None = None  # shape and dtype of the series' first image
        self._announced: tuple[int, int] | None = None  # shape in the series' start message
        self._outline: Outline | None = None  # of the last message that was walked

    def decode(self, message: Message, received: float) -> tuple[SeriesStart | Frame | SeriesEnd]:
        """One message, one record; `received` in Unix seconds. Raises WireError and nothing else."""
        return (self._decoded(message, received),)

    def due(self, now: float) -> tuple[()]:
        """Nothing is ever held back."""
        return ()

    def expendable(self, message: Message) -> bool:
        return isinstance(message, bytes) and _IMAGE in message[:64]

    def _decoded(self, message: Message, received: float) -> SeriesStart | Frame | SeriesEnd:
        if not isinstance(message, bytes):
            raise WireError("not_stream_v2", f"{len(message) if isinstance(message, tuple) else 0} parts; stream V2 sends one a message")
        if len(message) > self._max_message_bytes:
            raise WireError("too_large", f"{len(message)} bytes, the limit is {self._max_message_bytes}")
        if self._outline is None or not follows(message, self._outline):
            check(message)
            self._outline = outlined(message)
        try:
            item = cbor2.loads(message)
        except _PARSER_ERRORS as error:
            raise WireError("not_cbor", f"{len(message)} bytes that are no CBOR item: {cut(str(error))}") from None
        kind = item.get("type") if isinstance(item, _MAPS) else None
        if kind not in ("start", "image", "end"):
            raise WireError("not_stream_v2", "no map with a type of start, image or end")
        try:
            if kind == "start":
                return self._start(item)
            return (
                self._image(item, received)
                if kind == "image"
                else SeriesEnd(self._source, _series(item), late=late_positions(item.get("user_data")))
            )
        except WireError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise WireError("wrong_type", f"{kind} message: {cut(str(error))}") from None

    def _start(self, item: Mapping[str, Any]) -> SeriesStart:
        series = _series(item)
        user_data = item.get("user_data")
        metadata = {
            "series_id": plain(item.get("series_id")),
            "detector_description": cut(str(plain(item.get("detector_description", "")))),
            "user_data": plain(user_data) if isinstance(user_data, Mapping) else {},
        }
        detector = self._detector(item)
        nbytes = 1000 + sum(int(plane.nbytes) for plane in (detector.mask, detector.flat) if plane is not None)
        start = SeriesStart(self._source, series, _expected(item), detector, metadata, nbytes)
        self._series, self._like, self._announced = series, None, start.detector.shape
        return start

    def _detector(self, item: Mapping[str, Any]) -> Detector:
        def number(key: str) -> float | None:
            value = item.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                return None
            return float(value)

        def length(key: str) -> float | None:
            """Of a quantity that is nothing at 0: there it is not known."""
            value = number(key)
            return value if value is not None and value > 0 else None

        rows, columns = item.get("image_size_y"), item.get("image_size_x")
        centre = number("beam_center_y"), number("beam_center_x")
        wavelength = length("incident_wavelength")
        mask = self._plane(item.get("pixel_mask"))
        flat = self._plane(item.get("flatfield"))
        return Detector(
            shape=(rows, columns) if _is_extent(rows) and _is_extent(columns) else None,
            mask=mask != 0 if mask is not None else None,
            flat=flat.astype(np.float32) if flat is not None else None,
            saturation=length("saturation_value"),  # were 0 believed, no pixel of the run would have measured anything
            beam_centre=(centre[0], centre[1]) if centre[0] is not None and centre[1] is not None else None,
            pixel_m=length("pixel_size_x"),
            distance_m=_distance(item.get("detector_translation")),
            energy_ev=length("incident_energy") or (_EV_ANGSTROM / wavelength if wavelength else None),
            frame_time_s=length("frame_time"),
        )

    def _plane(self, planes: Any) -> npt.NDArray[Any] | None:
        """A mask or flat field of our channel; recorded start messages carry 4-byte stubs instead, which say nothing."""
        plane = planes.get(self._channel) if isinstance(planes, Mapping) else None
        return None if plane is None or isinstance(plane, bytes) else _array(plane)

    def _image(self, item: Mapping[str, Any], received: float) -> Frame:
        series = _series(item)
        index = item.get("image_id")
        if not is_count(index) or index >= MAX_INDEX:
            raise WireError("bad_index", f"image_id is {shown(index)}; expected an integer from 0 to {MAX_INDEX - 1}")
        channels = item.get("data")
        if not isinstance(channels, _MAPS) or self._channel not in channels:
            present = cut(str(sorted(map(str, channels)))) if isinstance(channels, Mapping) else shown(channels)
            raise WireError("no_channel", f"no channel {self._channel!r} among {present}")
        counts = _photons(_array(channels[self._channel]))
        self._check_like(series, counts)
        user_data = item.get("user_data")
        if not user_data:  # an empty map beside every image is what detectors send
            return Frame(self._source, series, index, counts, received, _detector_time(item))
        position, origin = of_frame(user_data) if isinstance(user_data, Mapping) else (None, None)
        return Frame(self._source, series, index, counts, received, _detector_time(item), position, origin, late=late_positions(user_data))

    def _check_like(self, series: str, counts: npt.NDArray[Any]) -> None:
        """Shape and dtype may not change within a series: the start message says the shape, the first image what is left open."""
        if series != self._series:
            self._series, self._like, self._announced = series, None, None
        shape, dtype = self._like or (self._announced or counts.shape, counts.dtype)
        if counts.shape != shape:
            raise WireError("wrong_shape", f"image of {counts.shape} in a series of {shape}")
        if counts.dtype != dtype:
            raise WireError("wrong_dtype", f"image of {counts.dtype} in a series of {dtype}")
        self._like = shape, dtype


def encode_start(
    series: int,
    unique_id: str,
    detector: Detector,
    expected: int,
    dtype: np.dtype[Any],
    metadata: Mapping[str, Any],
    channel: str = "threshold_1",
) -> bytes:
    """A start message for the detector; `metadata` travels as user_data."""
    item: dict[str, Any] = {
        "type": "start",
        "series_id": series,
        "series_unique_id": unique_id,
        "number_of_images": expected,
        "channels": [channel],
        "image_dtype": np.dtype(dtype).name,
        "user_data": dict(metadata),
    }
    if detector.shape is not None:
        item |= {"image_size_y": detector.shape[0], "image_size_x": detector.shape[1]}
    if detector.beam_centre is not None:
        item |= {"beam_center_y": float(detector.beam_centre[0]), "beam_center_x": float(detector.beam_centre[1])}
    if detector.distance_m is not None:
        item["detector_translation"] = [0.0, 0.0, -float(detector.distance_m)]
    numbers = {
        "saturation_value": detector.saturation,
        "pixel_size_x": detector.pixel_m,
        "pixel_size_y": detector.pixel_m,
        "incident_energy": detector.energy_ev,
        "frame_time": detector.frame_time_s,
        "count_time": detector.frame_time_s,
    }
    item |= {key: float(value) for key, value in numbers.items() if value is not None}
    if detector.mask is not None:
        item["pixel_mask"] = {channel: _typed(detector.mask.astype(np.uint32), "bslz4")}
    if detector.flat is not None:
        item["flatfield"] = {channel: _typed(detector.flat.astype(np.float32), "bslz4")}
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item))


def encode_image(
    series: int,
    unique_id: str,
    index: int,
    counts: npt.NDArray[Any],
    start_time_s: float,
    series_date: datetime.datetime,
    exposure_s: float = 0.0,
    user_data: Mapping[str, Any] | None = None,
    compression: str | None = "bslz4",
    channel: str = "threshold_1",
) -> bytes:
    """An image message; start_time_s counts from series_date (timezone-aware). compression is "bslz4", "lz4" or None."""
    clock = 50_000_000  # ticks per second, as the recorded detectors have it
    start, stop = round(start_time_s * clock), round((start_time_s + exposure_s) * clock)
    item = {
        "type": "image",
        "series_id": series,
        "series_unique_id": unique_id,
        "image_id": index,
        "real_time": [stop - start, clock],
        "series_date": series_date,
        "start_time": [start, clock],
        "stop_time": [stop, clock],
        "user_data": dict(user_data or {}),
        "data": {channel: _typed(counts, compression)},
    }
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item))


def encode_end(series: int, unique_id: str, user_data: Mapping[str, Any] | None = None) -> bytes:
    """The end message of a series."""
    item: dict[str, Any] = {"type": "end", "series_id": series, "series_unique_id": unique_id}
    if user_data:
        item["user_data"] = dict(user_data)
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item))


def _typed(array: npt.NDArray[Any], compression: str | None) -> cbor2.CBORTag:
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    if little.dtype not in _TAGS:
        raise ValueError(f"pixels of type {array.dtype} have no place in stream V2; use one of {sorted(dtype.name for dtype in _TAGS)}")
    payload: Any = little.tobytes()
    if compression is not None:
        payload = cbor2.CBORTag(_COMPRESSED, [compression, little.itemsize if compression == "bslz4" else 0, compress(compression, little)])
    return cbor2.CBORTag(_MULTI_DIMENSIONAL, [list(array.shape), cbor2.CBORTag(_TAGS[little.dtype], payload)])


def _array(item: Any) -> npt.NDArray[Any]:
    """Tag 40 [[rows, columns], typed array] -> array."""
    if not isinstance(item, cbor2.CBORTag) or item.tag != _MULTI_DIMENSIONAL:
        raise WireError("wrong_type", "the pixels are no multi-dimensional array (tag 40)")
    (rows, columns), typed = item.value
    dtype: np.dtype[Any] | None = DTYPES.get(typed.tag) if isinstance(typed, cbor2.CBORTag) else None
    if dtype is None:
        raise WireError("wrong_dtype", f"typed array tag {getattr(typed, 'tag', None)!r} is none of {sorted(DTYPES)}")
    if not (is_count(rows) and is_count(columns) and 0 < rows * columns * dtype.itemsize <= MAX_MESSAGE_BYTES):
        raise WireError("wrong_shape", f"an image of {shown(rows)} x {shown(columns)} of {dtype}")
    payload = typed.value
    if isinstance(payload, cbor2.CBORTag) and payload.tag == _COMPRESSED:
        algorithm, _, blob = payload.value
        if not isinstance(blob, bytes):
            raise WireError("bad_compression", "the compressed pixels are no byte string")
        return decompress(cut(str(algorithm)), blob, dtype, (rows, columns))
    if not isinstance(payload, bytes) or len(payload) != rows * columns * dtype.itemsize:
        raise WireError("wrong_shape", f"{len(payload) if isinstance(payload, bytes) else 0} bytes for {rows} x {columns} of {dtype}")
    return np.frombuffer(payload, dtype).reshape(rows, columns)


def _photons(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pixels as frames hold them: little-endian integers or float32. What is too large for float32 becomes infinite: not measured."""
    if pixels.dtype.kind != "f":
        return pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    with np.errstate(over="ignore"):
        return pixels.astype(np.float32, copy=False)


def _series(item: Mapping[str, Any]) -> str:
    """series_unique_id where the firmware gives one: series_id starts again at 1 when the detector restarts."""
    series = item.get("series_unique_id") or item.get("series_id")
    if not isinstance(series, str | int) or isinstance(series, bool) or len(str(series)) > 200:
        raise WireError("missing_key", "neither series_unique_id nor series_id")
    return str(series)


def _expected(item: Mapping[str, Any]) -> int | None:
    """number_of_images; None where it is absent, or where it is 0 or beyond what a run can hold: so it stands for "until stopped"."""
    expected = item.get("number_of_images")
    if expected is None:
        return None
    if not is_count(expected):
        raise WireError("wrong_type", f"number_of_images is {shown(expected)}")
    return expected if 0 < expected <= MAX_INDEX else None


def _detector_time(item: Mapping[str, Any]) -> float | None:
    date, start = item.get("series_date"), item.get("start_time")
    if not isinstance(date, datetime.datetime) or not isinstance(start, list | tuple):
        return None
    numerator, denominator = start
    seconds = date.timestamp() + numerator / denominator
    return seconds if math.isfinite(seconds) else None


def _is_extent(value: Any) -> TypeGuard[int]:
    return is_count(value) and 0 < value < 2**20


def _distance(translation: Any) -> float | None:
    """The detector's distance in metres is the z of its translation; its sign depends on the handedness of the firmware's axes."""
    if isinstance(translation, list | tuple) and len(translation) == 3 and isinstance(translation[2], int | float):
        metres = abs(float(translation[2]))
        return metres if math.isfinite(metres) else None
    return None
