"""EPICS NTNDArrays (normative type of an areaDetector's image over pvAccess) -> SeriesStart, Frame, SeriesEnd.

Facts: `value` is a union of arrays and the selected one names the dtype; `dimension` begins with the fastest, the columns. A compressed
image is bytes, `codec.parameters` then holds the code of the dtype, and `codec.name` is what areaDetector's codec plugin calls it: lz4 is
one bare block, bslz4 the blocks of bitshuffle's own size without the 12 bytes of the HDF5 filter, lz4hdf5 has them. Simulators that
stream the chunks of an HDF5 file call those lz4 and bslz4 as well, so the 12 bytes are looked for.

There is no start, no end and no name of a series: `uniqueId` counts, and what it does is all that tells one acquisition from the next.
"""

from __future__ import annotations

import datetime
import itertools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from streamprior.config import PositionSettings
from streamprior.errors import WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Message
from streamprior.wire.compression import decompress, decompress_block
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior.wire.told import MAX_INDEX, cut, is_count, plain, shown

DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<i8"),
    5: np.dtype("u1"),
    6: np.dtype("<u2"),
    7: np.dtype("<u4"),
    8: np.dtype("<u8"),
    9: np.dtype("<f4"),
    10: np.dtype("<f8"),
}
"""pvData's codes of scalar types. areaDetector compresses what lies in memory and tells no byte order; IOCs are little-endian."""

_HEADER = struct.Struct(">QI")
_BLOCK_BYTES = 8192  # bitshuffle's own choice for elements of 1 to 8 bytes, which is what the plugin asks for
_METRES = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "nm": 1e-9}
_MONO = 0
_REORDERED = 64
"""A plugin with several threads hands images over out of order; an id that goes back farther is of another acquisition."""

_EPICS_EPOCH = 631152000
"""1990, in Unix seconds: what a driver that never set its clock is at."""

_MOST_ATTRIBUTES = 200
_MOST_AXES = 10
_MOST_EXTENT = 2**20


@dataclass(frozen=True, slots=True)
class _Series:
    """An acquisition. first, newest : ids. newest_time : of the newest, detector's clock. received : Unix seconds, of the last frame."""

    name: str
    first: int
    newest: int
    newest_time: float | None
    received: float
    like: tuple[tuple[int, int], np.dtype[Any]]


class NtndDecoder:
    """("ntnd", what a channel's update says) -> records. Owns the series in hand, to tell where the next one begins.

    A new series begins where the id goes back (by less than 64 and with an earlier time stamp it is a frame out of order), where shape or
    dtype change, after a silence of `idle_s`, and where the index would be beyond what a run can hold. What stood in the channel when it
    was connected to begins none: it may be the last image of yesterday.

    A message is a mapping of the fields of an NTNDArray in plain values, a union as (value by name, ...) and of the union `value` the
    selected array alone, as `data`; `first` is True for what was there at the connection.

    Parameters
    ----------
    source : str
        Name of the source, part of every frame's identity.
    channel : str
        Name of the EPICS channel; series are called after it.
    idle_s : float
        Seconds of silence after which a frame is of a new series; that of the runs.
    positions : PositionSettings
        Attributes named like its motors are a frame's position, in its unit, or in mm.
    max_message_bytes : int
        A larger update, or one that would unpack to more, is refused before anything is allocated.
    """

    def __init__(
        self,
        source: str,
        channel: str,
        idle_s: float,
        positions: PositionSettings | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._source, self._channel, self._idle_s = source, channel, idle_s
        self._positions = positions or PositionSettings()
        self._max_message_bytes = max_message_bytes
        self._series: _Series | None = None
        self._heard: tuple[int, float | None] | None = None  # id and time of the last image, taken or not
        self._count = itertools.count(1)

    def decode(self, message: Message, received: float) -> Sequence[SeriesStart | Frame | SeriesEnd]:
        """An update that brings no new image has no record; `received` in Unix seconds. Raises WireError and nothing else."""
        fields = message[1] if isinstance(message, tuple) and len(message) == 2 and message[0] == "ntnd" else None
        if not isinstance(fields, Mapping):
            raise WireError("wrong_type", "no update of an EPICS channel")
        try:
            return tuple(self._decoded(fields, received))
        except WireError:
            raise
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, OSError) as error:
            raise WireError("wrong_type", f"NTNDArray: {cut(str(error))}") from None

    def due(self, now: float) -> tuple[()]:
        """Nothing is ever held back."""
        return ()

    def expendable(self, message: Message) -> bool:
        """All are images: what begins a run is told of by the first."""
        return True

    def _decoded(self, fields: Mapping[str, Any], received: float) -> Iterator[SeriesStart | Frame | SeriesEnd]:
        if "dimension" not in fields or "uniqueId" not in fields:
            raise WireError("missing_key", f"{self._channel} is no NTNDArray: it has {cut(', '.join(sorted(map(str, fields))))}")
        if not fields.get("data") and not fields["dimension"]:
            return  # a server says so when it has no image yet
        number, at, series = _number(fields["uniqueId"]), _time(fields.get("dataTimeStamp")), self._series
        heard, self._heard = self._heard, (number, at)
        if at is not None and heard == self._heard:
            return  # the same image again: another field was written, or the connection was made anew
        first = fields.get("first") is True
        if first and series is None:
            return
        attributes = _attributes(fields.get("attribute"))
        counts = _counts(fields, attributes, self._max_message_bytes)
        if series is None or self._begins(series, number, at, counts, received):
            if first:
                return
            if series is not None:
                yield SeriesEnd(self._source, series.name)
            series = self._opened(number, at, counts, received)
            metadata = {"pv": self._channel, "attributes": plain(attributes)}
            detector = Detector(shape=(counts.shape[0], counts.shape[1]))
            yield SeriesStart(self._source, series.name, None, detector, metadata, 1000 + 300 * len(attributes))
        index = number - series.first
        if index < 0:
            raise WireError("bad_index", f"uniqueId {number} is out of order, and before the first of its series, {series.first}")
        newest = (number, at) if number > series.newest else (series.newest, series.newest_time)
        self._series = replace(series, newest=newest[0], newest_time=newest[1], received=received)
        yield Frame(self._source, series.name, index, counts, received, at, self._position(attributes))

    def _begins(self, series: _Series, number: int, at: float | None, counts: npt.NDArray[Any], received: float) -> bool:
        """Whether this image is of another acquisition than those before it."""
        if received - series.received > self._idle_s or (counts.shape, counts.dtype) != series.like or number - series.first >= MAX_INDEX:
            return True
        if number > series.newest:
            return False
        earlier = at is not None and series.newest_time is not None and at < series.newest_time
        return not (earlier and number > series.newest - _REORDERED)

    def _opened(self, number: int, at: float | None, counts: npt.NDArray[Any], received: float) -> _Series:
        """A series that begins with this image. The count keeps two of one second apart, the time those of two processes."""
        began = at if at is not None and abs(at - received) < 1e9 else received
        stamp = datetime.datetime.fromtimestamp(began, datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
        name = f"{self._channel}@{stamp}-{next(self._count)}"
        return _Series(name, number, number, at, received, ((counts.shape[0], counts.shape[1]), counts.dtype))

    def _position(self, attributes: Mapping[str, Any]) -> tuple[float, float] | None:
        """(x, y) in metres; None where an attribute that is named is absent, or no number."""
        if self._positions.x is None:
            return None
        scale = _METRES[self._positions.unit or "mm"]
        place = [0.0 if name is None else attributes.get(name) for name in (self._positions.x, self._positions.y)]
        x, y = (one * scale if _is_number(one) else math.nan for one in place)
        return (x, y) if math.isfinite(x) and math.isfinite(y) else None


def _counts(fields: Mapping[str, Any], attributes: Mapping[str, Any], most: int) -> npt.NDArray[Any]:
    """(rows, columns), as frames hold them."""
    colours = attributes.get("ColorMode", _MONO)
    shape = _shape(fields["dimension"])
    if colours != _MONO:
        raise WireError("wrong_shape", f"ColorMode is {shown(colours)}; only mono (0) holds photons")
    data = fields.get("data")
    value = next(iter(data.values()), None) if isinstance(data, Mapping) else None
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.kind not in "uif":
        raise WireError("wrong_type", f"the value is {shown(value)}; expected an array of numbers")
    codec = fields["codec"] if isinstance(fields.get("codec"), Mapping) else {}
    name = codec.get("name")
    dtype = _packed_dtype(codec) if name else value.dtype
    size = math.prod(shape) * dtype.itemsize
    if max(size, value.nbytes) > most:
        raise WireError("too_large", f"{value.nbytes} bytes for an image of {size}, the limit is {most}")
    if name:
        if fields.get("uncompressedSize") not in (None, 0, size):
            told = fields["uncompressedSize"]
            raise WireError("bad_compression", f"uncompressedSize is {shown(told)}, an image of {shape} {dtype} has {size}")
        return _photons(_unpacked(name, _payload(value, fields.get("compressedSize")), dtype, shape))
    if value.size != math.prod(shape):
        raise WireError("wrong_shape", f"{value.size} pixels for an image of {shape}")
    return _photons(value.reshape(shape))


def _number(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) >= 2**63:
        raise WireError("bad_index", f"uniqueId is {shown(value)}; expected an integer")
    return value


def _shape(dimension: Any) -> tuple[int, int]:
    """(rows, columns): the first dimension is the fastest. Further ones of extent 1 are no dimensions."""
    sizes = [one["size"] for one in dimension] if len(dimension) <= _MOST_AXES else []
    while len(sizes) > 2 and sizes[-1] == 1:
        sizes.pop()
    if len(sizes) != 2 or not all(is_count(size) and 0 < size < _MOST_EXTENT for size in sizes):
        raise WireError("wrong_shape", f"dimensions {cut(', '.join(map(shown, sizes)))}; expected columns and rows")
    return sizes[1], sizes[0]


def _packed_dtype(codec: Mapping[str, Any]) -> np.dtype[Any]:
    code = _chosen(codec.get("parameters"))
    if code is None:
        raise WireError("missing_key", "codec.parameters does not say which dtype was compressed")
    if not is_count(code) or code not in DTYPES:
        raise WireError("wrong_dtype", f"codec.parameters is {shown(code)}; expected the code of a numeric type, 1 to 10")
    return DTYPES[code]


def _payload(value: npt.NDArray[Any], length: Any) -> bytes:
    """The compressed bytes: some servers send their whole buffer, of which only the first `length` mean anything."""
    held = value.view(np.uint8)
    if length is None or length == 0:
        length = held.size
    if not is_count(length) or length > held.size:
        raise WireError("bad_compression", f"compressedSize is {shown(length)}, there are {held.size} bytes")
    return held[:length].tobytes()


def _unpacked(name: Any, payload: bytes, dtype: np.dtype[Any], shape: tuple[int, int]) -> npt.NDArray[Any]:
    size = math.prod(shape) * dtype.itemsize
    # areaDetector's own begins with a block (00 00 02 a4 is one of 676 bytes). None begins with the size: bslz4's first length and lz4's
    # first offset would be 0.
    headed = len(payload) >= _HEADER.size and _HEADER.unpack_from(payload)[0] == size
    if name == "lz4hdf5" or (name == "lz4" and headed):
        return decompress("lz4", payload, dtype, shape)
    if name == "lz4":
        return decompress_block(payload, dtype, shape)
    if name == "bslz4":
        return decompress("bslz4", payload if headed else _HEADER.pack(size, _BLOCK_BYTES) + payload, dtype, shape)
    raise WireError("bad_compression", f"codec {shown(name)}; set the codec plugin to LZ4, BSLZ4 or none")


def _photons(pixels: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pixels as frames hold them: integers or float32. What is too large for float32 becomes infinite: not measured."""
    if pixels.dtype.kind != "f":
        return pixels
    with np.errstate(over="ignore"):
        return pixels.astype(np.float32, copy=False)


def _time(stamp: Any) -> float | None:
    """Unix seconds; None where the driver has set no clock."""
    seconds, nanoseconds = (stamp.get("secondsPastEpoch"), stamp.get("nanoseconds")) if isinstance(stamp, Mapping) else (None, None)
    if not is_count(seconds) or not is_count(nanoseconds) or seconds in (0, _EPICS_EPOCH) or seconds >= 2**33 or nanoseconds >= 2**31:
        return None
    return seconds + nanoseconds * 1e-9


def _attributes(listed: Any) -> dict[str, Any]:
    """Name -> number or text of what the beamline adds to its images; the first 200, and no arrays."""
    found: dict[str, Any] = {}
    for one in listed[:_MOST_ATTRIBUTES] if isinstance(listed, list | tuple) else ():
        name, value = (one.get("name"), _chosen(one.get("value"))) if isinstance(one, Mapping) else (None, None)
        if isinstance(name, str) and isinstance(value, int | float | str):
            found[cut(name)] = cut(value) if isinstance(value, str) else value
    return found


def _chosen(union: Any) -> Any:
    """The selected value of a union, (value by name, ...); None where none is."""
    members = union[0] if isinstance(union, tuple | list) and union else None
    return next(iter(members.values()), None) if isinstance(members, Mapping) else None


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
