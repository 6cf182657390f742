"""Records of a series -> messages of a wire: what a detector sends for a start, an image and an end.

A message is a tuple of parts, one on stream V2, so that faults (`streamprior_sim.faults`) strike both wires alike.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

import cbor2
import msgpack
import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator

from streamprior.errors import ConfigError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.seams import Parts
from streamprior.wire import dectris_v1, dectris_v2
from streamprior.wire.documents import dump_document

Encoding = Literal["bslz4", "lz4", "none"]

_NO_BYTES = struct.pack(">QI", 0, 8192)
"""The header of a compressed blob that holds nothing: 0 bytes in blocks of 8192."""

_NO_LITERALS = b"\0"
"""A bare lz4 block that holds nothing: one token of no literals."""

_SELF_DESCRIBED, _COMPRESSED = 55799, 56500


class Wire(BaseModel):
    """What the twin speaks."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    kind: Annotated[
        Literal["dectris-v2", "dectris-v1", "documents"],
        BeforeValidator(lambda kind: kind.replace("_", "-") if isinstance(kind, str) else kind),
    ] = "dectris-v2"
    """DECTRIS stream V2 (CBOR), stream V1 (JSON and blobs), or Bluesky documents over 0MQ."""
    framing: dectris_v1.Framing = "multipart"
    """V1: one message for each; the header in two; every part a message of its own, as a proxy re-sends them; images of three parts alone,
    without header, times and positions."""
    header_detail: Literal["all", "basic", "none"] = "all"
    """V1: with mask and flat field, with the configuration alone, or with nothing but the series."""
    encoding: Encoding = "bslz4"
    """How pixels are compressed; documents carry them as they are."""

    @model_validator(mode="after")
    def _has_what_it_names(self) -> Wire:
        if self.kind != "dectris-v1" and (self.framing, self.header_detail) != ("multipart", "all"):
            raise ValueError(f"framing and header_detail are those of dectris-v1, not of {self.kind}; leave them out, or choose that wire")
        return self

    @property
    def packing(self) -> Encoding:
        """How pixels are compressed; documents carry them as they are."""
        return "none" if self.kind == "documents" else self.encoding

    @property
    def announces(self) -> bool:
        """The start message says how many images come."""
        return self.kind != "dectris-v1" or (self.framing != "headerless" and self.header_detail != "none")

    @property
    def annotates(self) -> bool:
        """An image's message has room for a position."""
        return self.kind != "dectris-v1" or self.framing != "headerless"


STREAM_V2 = Wire()


def wire_of(settings: Mapping[str, Any]) -> Wire:
    """The wire of these settings. Raises ConfigError for a value that is none."""
    try:
        return Wire.model_validate(settings)
    except ValidationError as error:
        told = [(" ".join(map(str, one["loc"])) or "wire", one["msg"]) for one in error.errors(include_url=False)]
        raise ConfigError("; ".join(f"{name}: {message}" for name, message in told)) from None


class Dialect(Protocol):
    """One wire, as one series of one detector speaks it."""

    @property
    def pixels(self) -> int:
        """Which part of an image holds the compressed pixels."""

    @property
    def hashed(self) -> bool:
        """A hash of the pixels travels with them."""

    def start(self, record: SeriesStart) -> Parts: ...

    def image(self, frame: Frame, encoding: Encoding) -> Parts: ...

    def end(self, record: SeriesEnd) -> Parts: ...

    def with_pixels(self, message: Parts, change: Callable[[bytes], bytes]) -> Parts:
        """An image whose compressed pixels are others, and all that is said about their bytes with them."""

    def nothing(self, encoding: Encoding) -> bytes:
        """Compressed pixels that are 0 bytes unpacked."""

    def sent(self, message: Parts, flattened: bool) -> Iterator[Parts]:
        """The messages on the socket that a message becomes; flattened : every part is one of its own."""


@dataclass(frozen=True, slots=True)
class Sensor:
    """What stays the same over a series. date : of its arming; times on the wire count from it. exposure_s : seconds."""

    dtype: np.dtype[Any]
    date: datetime.datetime
    exposure_s: float


@dataclass(frozen=True, slots=True)
class DectrisV2:
    """One CBOR map a message; a series is known by its unique id. number : its series_id."""

    sensor: Sensor
    number: int = 1

    pixels = 0
    hashed = False

    def start(self, record: SeriesStart) -> Parts:
        about = record.detector, record.expected or 0, self.sensor.dtype, record.metadata
        return (dectris_v2.encode_start(self.number, record.series, *about),)

    def image(self, frame: Frame, encoding: Encoding) -> Parts:
        date, exposure_s = self.sensor.date, self.sensor.exposure_s
        compression = None if encoding == "none" else encoding
        times = _since(frame, date), date, exposure_s
        return (dectris_v2.encode_image(self.number, frame.series, frame.index, frame.counts, *times, _told(frame), compression),)

    def end(self, record: SeriesEnd) -> Parts:
        return (dectris_v2.encode_end(self.number, record.series),)

    def with_pixels(self, message: Parts, change: Callable[[bytes], bytes]) -> Parts:
        item = dict(cbor2.loads(message[0]))
        data = {channel: _changed(array, change) for channel, array in item["data"].items()}
        return (cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item | {"data": data})),)

    def nothing(self, encoding: Encoding) -> bytes:
        return b"" if encoding == "none" else _NO_BYTES

    def sent(self, message: Parts, flattened: bool) -> Iterator[Parts]:
        yield message


@dataclass(frozen=True, slots=True)
class DectrisV1:
    """JSON and binary parts; a series is known by its number. Images carry an md5 of their compressed pixels."""

    sensor: Sensor
    wire: Wire

    pixels = 2
    hashed = True

    def start(self, record: SeriesStart) -> Parts:
        about = record.detector, record.expected or 0, self.sensor.dtype, record.metadata
        return dectris_v1.encode_start(int(record.series), *about, header_detail=self.wire.header_detail, date=self.sensor.date)

    def image(self, frame: Frame, encoding: Encoding) -> Parts:
        times = _since(frame, self.sensor.date), self.sensor.exposure_s
        whole = dectris_v1.encode_image(int(frame.series), frame.index, frame.counts, *times, _told(frame), encoding)
        return next(iter(dectris_v1.framed([whole], self.wire.framing))) if self.wire.framing == "headerless" else whole

    def end(self, record: SeriesEnd) -> Parts:
        return dectris_v1.encode_end(int(record.series))

    def with_pixels(self, message: Parts, change: Callable[[bytes], bytes]) -> Parts:
        header, shape, blob, *rest = message
        blob = change(blob)
        told = json.loads(header) | {"hash": hashlib.md5(blob, usedforsecurity=False).hexdigest()}
        return (json.dumps(told).encode(), json.dumps(json.loads(shape) | {"size": len(blob)}).encode(), blob, *rest)

    def nothing(self, encoding: Encoding) -> bytes:
        return {"bslz4": _NO_BYTES, "lz4": _NO_LITERALS, "none": b""}[encoding]

    def sent(self, message: Parts, flattened: bool) -> Iterator[Parts]:
        if flattened:
            return ((part,) for part in message)
        return dectris_v1.framed([message], self.wire.framing)


@dataclass(frozen=True, slots=True)
class Documents:
    """A Bluesky run with its pixels in the events, msgpack, without a prefix; a run is known by its uid. number : its scan_id.

    `streamprior_sim.documents` composes runs in every form; these are for what goes wrong with one.
    """

    sensor: Sensor
    number: int = 1

    pixels = 0
    hashed = False

    def start(self, record: SeriesStart) -> Parts:
        """The start document and the descriptor, each a message of its own."""
        at = self.sensor.date.timestamp()
        image = {"source": "SIM", "dtype": "array", "shape": list(record.detector.shape or ()), "dtype_numpy": self.sensor.dtype.str}
        motor = {"source": "SIM", "dtype": "number", "shape": [], "units": "um"}
        about = {"uid": record.series, "time": at, "scan_id": self.number, "plan_name": "scan", "num_points": record.expected or 0}
        described = {"uid": f"{record.series}-primary", "run_start": record.series, "time": at, "name": "primary"}
        keys = {"image": image, "x": motor, "y": motor}
        return dump_document("start", about), dump_document("descriptor", described | {"data_keys": keys, "configuration": {}})

    def image(self, frame: Frame, encoding: Encoding) -> Parts:
        at = frame.detector_time or 0.0
        data: dict[str, Any] = {"image": frame.counts}
        if frame.position is not None:
            data |= dict(zip(("x", "y"), (place * 1e6 for place in frame.position), strict=True))
        event = {"uid": f"{frame.series}-{frame.index}", "descriptor": f"{frame.series}-primary", "time": at, "seq_num": frame.index + 1}
        return (dump_document("event", event | {"data": data, "timestamps": dict.fromkeys(data, at), "filled": {}}),)

    def end(self, record: SeriesEnd) -> Parts:
        stop = {"uid": f"{record.series}-stop", "run_start": record.series, "time": self.sensor.date.timestamp(), "exit_status": "success"}
        return (dump_document("stop", stop),)

    def with_pixels(self, message: Parts, change: Callable[[bytes], bytes]) -> Parts:
        head, name, body = message[0].split(b" ", 2)
        event = msgpack.unpackb(body)
        event["data"]["image"][b"data"] = change(event["data"]["image"][b"data"])
        return (b" ".join((head, name, msgpack.packb(event))),)

    def nothing(self, encoding: Encoding) -> bytes:
        return b""

    def sent(self, message: Parts, flattened: bool) -> Iterator[Parts]:
        return ((part,) for part in message)


def dialect(wire: Wire, sensor: Sensor, series: int) -> Dialect:
    """How `wire` speaks."""
    if wire.kind == "documents":
        return Documents(sensor, series)
    return DectrisV2(sensor, series) if wire.kind == "dectris-v2" else DectrisV1(sensor, wire)


def _since(frame: Frame, date: datetime.datetime) -> float:
    return (frame.detector_time or 0.0) - date.timestamp()


def _told(frame: Frame) -> dict[str, object]:
    """What travels beside the pixels: user_data of stream V2, the appendix of stream V1."""
    told: dict[str, object] = {"origin": frame.origin}
    if frame.position is not None:
        told["position_m"] = list(frame.position)
    if frame.late:
        told["positions_m"] = [[index, *place] for index, place in frame.late.items()]
    return told


def _changed(array: cbor2.CBORTag, change: Callable[[bytes], bytes]) -> cbor2.CBORTag:
    """The same multi-dimensional array with its innermost bytes changed."""
    shape, typed = array.value
    payload = typed.value
    if isinstance(payload, bytes):
        inner: Any = change(payload)
    else:
        *how, blob = payload.value
        inner = cbor2.CBORTag(_COMPRESSED, [*how, change(blob)])
    return cbor2.CBORTag(array.tag, [shape, cbor2.CBORTag(typed.tag, inner)])
