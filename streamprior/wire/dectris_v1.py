"""DECTRIS stream V1 messages (JSON and binary parts) <-> SeriesStart, Frame, SeriesEnd.

Facts: a header is dheader, the configuration (which names no htype), then for header detail "all" dflatfield, dpixelmask and
dcountrate_table, each followed by a blob; an image is dimage, dimage_d, a blob and dconfig; both may end in an appendix, any text. An end
is dseries_end. Shapes are [x, y] everywhere. "bsN-lz4<" has the 12 bytes before its blocks, "lz4<" is one bare block, "<" is plain.

How the parts are dealt out over messages differs: all in one, a header in two, every part alone (a proxy re-sends them so, and loses some),
images of three parts without a header. So the parts themselves are read, one by one, whatever message they come in.
"""

from __future__ import annotations

import datetime
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Decoded, Message, Parts
from streamprior.wire.compression import compress, compress_block
from streamprior.wire.dectris_v1_parts import (
    COUNTRATE,
    DTYPES,
    FLAT,
    MASK,
    Pixels,
    configuration,
    described,
    detector_of,
    expected_images,
    is_configuration,
    is_text,
    json_of,
    json_part,
    metadata_of,
    series_of,
    unix_time,
    unpacked,
)
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior.wire.told import MAX_INDEX, cut, is_count, late_positions, of_frame, plain, shown

Framing = Literal["multipart", "split_header", "parts", "headerless"]
Encoding = Literal["bslz4", "lz4", "none"]

_PACKED: dict[Encoding, tuple[str, Callable[[npt.NDArray[Any]], bytes]]] = {
    "bslz4": ("bs{}-lz4<", partial(compress, "bslz4")),
    "lz4": ("lz4<", compress_block),
    "none": ("<", lambda array: array.tobytes()),
}
"""What a blob's encoding is called, with the bits of a pixel, and what makes it."""

_DIMAGE, _DIMAGE_D, _BLOB, _DCONFIG, _APPENDIX = range(5)
"""The parts of an image in their order."""

_MOST_PARTS = 100
"""Parts of a message; a header of detail "all" has 9."""

_MOST_SERIES = 4
"""Series whose shape and clock are remembered."""

_HELD_S, _STALLED_S = 0.5, 5.0
"""How long nothing may come before a frame (or a header) goes out without the parts that may follow, and before one is given up whose
pixels (or configuration) did not come."""

_LONGEST_S = 86400.0
"""Times of a series count from its arming; recorded ones of 28 hours count from something else, the start of the detector perhaps."""

# What a hostile part can make the code below raise; none of it is our fault.
_SENDERS_FAULTS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


@dataclass(slots=True)
class _Image:
    """An image whose parts are coming. stage : the last part that came. good : False once it was refused; what else belongs to it is let
    by without another word, so that one broken image is one loss."""

    stage: int
    good: bool = False
    series: str = ""
    index: int = -1
    digest: str = ""
    size: int | None = None
    pixels: Pixels | None = None
    counts: npt.NDArray[Any] | None = None
    received: float = 0.0
    start_s: float | None = None
    told: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class _Header:
    """A header whose parts are coming. good : False where its first part was lost. problem : the first thing that was wrong with it."""

    good: bool = False
    series: str = ""
    detail: str = ""
    config: Mapping[str, Any] | None = None
    shape: tuple[int, int] | None = None  # (rows, columns) of the detector
    awaited: tuple[str, Pixels | None] | None = None  # the table whose blob comes next
    tables: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    told: Mapping[str, Any] | None = None
    problem: WireError | None = None

    @property
    def configured(self) -> bool:
        return self.config is not None or self.detail == "none"


@dataclass(slots=True)
class _Series:
    """What the header and the first image of a series said. armed : Unix seconds, from which the times of its images count."""

    armed: float | None = None
    shape: tuple[int, ...] | None = None
    dtype: np.dtype[Any] | None = None


class StreamV1Decoder:
    """Parts -> records: a machine whose state is the image and the header in hand, and what the series' header and first image said.

    A part that does not fit refuses the image it belongs to, once, and the machine goes on with the next part that it knows. A frame goes
    out with the part that completes it: the end of a message of several parts, an appendix, or the next part; where none comes, `due` lets
    it go. A frame that has its pixels is never refused for want of its times. An image of 0 bytes is bad_compression, an uncompressed one
    wrong_shape.

    Parameters
    ----------
    source : str
        Name of the source, part of every frame's identity.
    max_message_bytes : int
        A message whose parts have more bytes together is refused before it is looked at.
    """

    def __init__(self, source: str, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._source = source
        self._max_message_bytes = max_message_bytes
        self._image: _Image | None = None
        self._header: _Header | None = None
        self._heard, self._quiet = -math.inf, False  # when a message came last; nothing came since `due` was asked last
        self._known: dict[str, _Series] = {}
        self._kinds: dict[str, Callable[[Mapping[str, Any]], Iterator[Decoded | WireError]]] = {
            "dheader-1.0": self._dheader,
            "dimage-1.0": self._dimage,
            "dimage_d-1.0": self._dimage_d,
            "dconfig-1.0": self._dconfig,
            "dseries_end-1.0": self._dseries_end,
        } | dict.fromkeys((FLAT, MASK, COUNTRATE), self._table)

    def decode(self, message: Message, received: float) -> Iterator[Decoded | WireError]:
        """What the parts of a message complete; `received` in Unix seconds. Read it to its end. Raises WireError and nothing else."""
        parts = _parts(message)
        self._heard, self._quiet = received, False
        nbytes = sum(map(len, parts))
        if nbytes > self._max_message_bytes or len(parts) > _MOST_PARTS:
            self._refuse_image()
            reason = "too_large" if nbytes > self._max_message_bytes else "not_stream_v1"
            raise WireError(reason, f"{nbytes} bytes in {len(parts)} parts, the limits are {self._max_message_bytes} and {_MOST_PARTS}")
        return self._records(parts, received)

    def due(self, now: float) -> Iterable[Decoded | WireError]:
        """A frame or a header whose last parts did not come. Messages may wait in a queue before they are decoded: so nothing goes
        unless no message came between this call and the one before it."""
        image, header = self._image, self._header
        whole = (image is None or not image.good or image.stage >= _BLOB) and (header is None or header.configured)
        self._heard = min(self._heard, now)  # a clock that was set back would make it wait until it is that late again
        over = self._quiet and now >= self._heard + (_HELD_S if whole else _STALLED_S)
        self._quiet = True
        return [*self._settle_header(), *self._settle_image()] if over or now == math.inf else ()

    def expendable(self, message: Message) -> bool:
        """Whole images only; of parts that come one by one, none may be missing."""
        return isinstance(message, tuple) and len(message) > 2 and isinstance(message[0], bytes) and b'"dimage-1.0"' in message[0]

    def _records(self, parts: Parts, received: float) -> Iterator[Decoded | WireError]:
        for part in parts:
            try:
                yield from self._accept(part, received)
            except WireError as error:
                yield error
            except _SENDERS_FAULTS as error:
                yield WireError("wrong_type", cut(f"a part of {len(part)} bytes: {error}"))
        if len(parts) == 1:
            return
        header = self._header
        # A header in two messages of several parts each breaks before its tables.
        if header is not None and header.configured and (header.detail != "all" or header.tables or header.told is not None):
            yield from self._settle_header()
        yield from self._settle_image()

    def _accept(self, part: bytes, received: float) -> Iterator[Decoded | WireError]:
        image, header = self._image, self._header
        if image is not None and image.stage == _DIMAGE_D and (len(part) == image.size or self._kind(json_of(part)) is None):
            self._blob(image, part, received)
            return
        if header is not None and header.awaited is not None:
            name, pixels = header.awaited
            header.awaited = None
            if (pixels is not None and len(part) == pixels.nbytes) or json_of(part) is None:
                self._fill(header, name, pixels, part)
                return
            header.problem = header.problem or WireError("missing_part", f"{name} of series {header.series} without its blob")
        item = json_of(part)
        kind = self._kind(item)
        if kind is not None and item is not None:
            yield from self._kinds[kind](item)
        else:
            yield from self._unnamed(part, item)

    def _kind(self, item: Mapping[str, Any] | None) -> str | None:
        """The htype of a part, None where it is none that is known."""
        kind = item.get("htype") if item is not None else None
        return kind if isinstance(kind, str) and kind in self._kinds else None

    # Parts of a header

    def _dheader(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        yield from self._settle_header()
        yield from self._settle_image()
        self._header = header = _Header()
        detail = item.get("header_detail")
        header.series, header.detail, header.good = series_of(item), detail if isinstance(detail, str) else "basic", True

    def _configure(self, header: _Header, part: bytes, item: Mapping[str, Any] | None) -> None:
        """The part behind the dheader."""
        if item is None:
            header.problem = header.problem or WireError("not_stream_v1", f"{len(part)} bytes where the configuration was due")
        header.config = item or {}
        shape = header.config.get("y_pixels_in_detector"), header.config.get("x_pixels_in_detector")
        if is_count(shape[0]) and is_count(shape[1]) and 0 < shape[0] * shape[1] <= MAX_MESSAGE_BYTES:
            header.shape = shape[0], shape[1]

    def _table(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        name = str(item["htype"])
        if self._header is None:
            self._header = _Header(awaited=(name, None))
            raise WireError("stray_part", f"{name} without a dheader before it")
        header = self._header
        header.awaited = name, None
        try:
            header.awaited = name, described(item, "<")
        except WireError as error:
            header.problem = header.problem or error
        yield from ()

    def _fill(self, header: _Header, name: str, pixels: Pixels | None, blob: bytes) -> None:
        if pixels is None or not header.good or name == COUNTRATE:
            return
        try:
            table = unpacked(pixels, blob)
            if table.shape != (header.shape or table.shape):
                raise WireError("wrong_shape", f"{table.shape} for a detector of {header.shape}")
            header.tables[name] = table
        except WireError as error:
            header.problem = header.problem or WireError(error.reason, f"{name}: {error.detail}")

    def _settle_header(self) -> Iterator[Decoded | WireError]:
        header, self._header = self._header, None
        if header is None or not header.good:
            return
        config = header.config or {}
        description = config.get("description")
        detector = detector_of(config, header.shape, header.tables)
        metadata = {
            "series_id": header.series,
            "detector_description": plain(cut(description)) if isinstance(description, str) else "",
            "user_data": metadata_of(header.told or {}),
        }
        self._remember(header.series, _Series(unix_time(config.get("data_collection_date")), detector.shape))
        nbytes = 1000 + sum(int(table.nbytes) for table in (detector.mask, detector.flat) if table is not None)
        yield SeriesStart(self._source, header.series, expected_images(config), detector, metadata, nbytes)
        if not header.configured or header.awaited is not None:
            lost = "its configuration" if header.awaited is None else f"the blob of {header.awaited[0]}"
            header.problem = header.problem or WireError("missing_part", f"header of series {header.series} without {lost}")
        if header.problem is not None:
            yield header.problem

    # Parts of an image

    def _dimage(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        yield from self._settle_header()
        yield from self._settle_image()
        self._image = image = _Image(_DIMAGE)
        image.series, index, digest = series_of(item), item.get("frame"), item.get("hash") or ""
        if not is_count(index) or index >= MAX_INDEX:
            raise WireError("bad_index", f"frame is {shown(index)}; expected an integer from 0 to {MAX_INDEX - 1}")
        if not isinstance(digest, str):
            raise WireError("wrong_type", f"hash is {shown(digest)}; expected an md5 in hexadecimal")
        image.index, image.digest, image.good = index, digest.lower(), True

    def _dimage_d(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        size = item.get("size")
        size = size if is_count(size) else None
        image = self._image
        if image is None or image.stage >= _DIMAGE_D:
            yield from self._settle_image()
            self._image = _Image(_DIMAGE_D, size=size)
            raise WireError("stray_part", "dimage_d without a dimage before it")
        image.stage, image.size = _DIMAGE_D, size
        if image.good:
            image.good = False
            image.pixels = described(item, None)
            image.good = True

    def _blob(self, image: _Image, part: bytes, received: float) -> None:
        image.stage = _BLOB
        if not image.good or image.pixels is None:
            return
        image.good = False
        if image.digest and hashlib.md5(part, usedforsecurity=False).hexdigest() != image.digest:
            raise WireError("wrong_hash", f"frame {image.index}: {len(part)} bytes ({shown(image.size)} announced) of another md5")
        image.counts = unpacked(image.pixels, part)
        self._check_like(image.series, image.counts)
        image.received, image.good = received, True

    def _dconfig(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        image = self._image
        if image is None or image.stage >= _DCONFIG:
            yield from self._settle_image()
            self._image = _Image(_DCONFIG)
            raise WireError("stray_part", "dconfig without an image before it")
        missing = image.good and image.stage < _BLOB
        image.stage = _DCONFIG
        if missing:
            image.good = False
            raise WireError("missing_part", f"frame {image.index}: dconfig where its pixels were due")
        start = item.get("start_time")
        if isinstance(start, int | float) and 0 <= start < _LONGEST_S * 1e9:
            image.start_s = start * 1e-9

    def _dseries_end(self, item: Mapping[str, Any]) -> Iterator[Decoded | WireError]:
        yield from self._settle_header()
        yield from self._settle_image()
        yield SeriesEnd(self._source, series_of(item))

    def _unnamed(self, part: bytes, item: Mapping[str, Any] | None) -> Iterator[Decoded | WireError]:
        """A part without an htype that is known and no blob that was due: a configuration, an appendix, a blob whose dimage_d was lost, or
        garbage. Garbage between the last parts of an image costs it nothing."""
        image, header = self._image, self._header
        told = "htype" not in item if item is not None else is_text(part)
        if image is not None and image.good and image.stage == _DIMAGE:
            image.stage, image.good = _DIMAGE_D, False
            raise WireError("missing_part", f"frame {image.index}: {len(part)} bytes where its dimage_d was due")
        if image is not None and told and (image.stage == _DCONFIG or (image.stage == _BLOB and item is not None)):
            image.told = item or {}
            yield from self._settle_image()
        elif header is not None and not header.configured and (item is None or is_configuration(item)):
            self._configure(header, part, item)
        elif header is not None and header.told is None and told:
            header.told = item or {}
        elif item is not None and is_configuration(item):
            yield from self._settle_header()
            self._header = _Header(config=item)
            raise WireError("stray_part", "a configuration without a dheader before it")
        else:
            if header is None and (image is None or not image.good):
                self._image = _Image(_DIMAGE)  # perhaps it was one, damaged: the parts that belong to it are let by
            if told and item is not None:
                raise WireError("stray_part", "JSON without an htype where no appendix was due")
            raise WireError("not_stream_v1", f"{len(part)} bytes that are no part of a header or an image")

    def _settle_image(self) -> Iterator[Decoded | WireError]:
        """The image in hand goes out, or is given up."""
        image, self._image = self._image, None
        if image is None or not image.good:
            return
        if image.counts is None:
            yield WireError("missing_part", f"frame {image.index} of series {image.series}: its pixels never came")
            return
        armed = self._known[image.series].armed if image.series in self._known else None
        at = armed + image.start_s if armed is not None and image.start_s is not None else None
        position, origin = of_frame(image.told)
        late = late_positions(image.told)
        yield Frame(self._source, image.series, image.index, image.counts, image.received, at, position, origin, late=late)

    def _refuse_image(self) -> None:
        """A message was refused that may have been the next part of the image in hand."""
        if self._image is not None and self._image.stage < _BLOB:
            self._image.stage, self._image.good = _BLOB, False

    def _remember(self, name: str, series: _Series) -> _Series:
        """The newest series stay known: an image of the one before may come after the header of the next."""
        self._known.pop(name, None)
        self._known[name] = series
        while len(self._known) > _MOST_SERIES:
            del self._known[next(iter(self._known))]
        return series

    def _check_like(self, name: str, counts: npt.NDArray[Any]) -> None:
        """Shape and dtype may not change within a series: the header says the shape, the first image what is left open."""
        series = self._known.get(name) or self._remember(name, _Series())
        shape = series.shape or counts.shape
        dtype = series.dtype or counts.dtype
        if counts.shape != shape:
            raise WireError("wrong_shape", f"image of {counts.shape} in a series of {shape}")
        if counts.dtype != dtype:
            raise WireError("wrong_dtype", f"image of {counts.dtype} in a series of {dtype}")
        series.shape, series.dtype = shape, dtype


def encode_start(
    series: int,
    detector: Detector,
    expected: int,
    dtype: np.dtype[Any],
    metadata: Mapping[str, Any],
    header_detail: Literal["all", "basic", "none"] = "all",
    date: datetime.datetime | None = None,
) -> Parts:
    """The header of a series of `expected` images; `metadata`, where there is any, is its appendix. date : of the arming, from which the
    times of the images count. A mask and a flat field are sent with header detail "all"."""
    parts = [json_part({"htype": "dheader-1.0", "series": series, "header_detail": header_detail})]
    if header_detail != "none":
        parts.append(json_part(configuration(detector, expected, np.dtype(dtype), date)))
    if header_detail == "all":
        if detector.flat is not None:
            parts += _encoded_table(FLAT, detector.flat.astype("<f4"))
        if detector.mask is not None:
            parts += _encoded_table(MASK, detector.mask.astype("<u4"))
    if metadata:
        parts.append(json_part(dict(metadata)))
    return tuple(parts)


def encode_image(
    series: int,
    index: int,
    counts: npt.NDArray[Any],
    start_time_s: float,
    exposure_s: float = 0.0,
    user_data: Mapping[str, Any] | None = None,
    encoding: Encoding = "bslz4",
) -> Parts:
    """An image in 4 parts, 5 with user_data; start_time_s counts from the arming of the detector.

    Raises ValueError for pixels that are neither 8, 16 or 32 bit unsigned nor float32.
    """
    little = np.ascontiguousarray(counts, counts.dtype.newbyteorder("<"))
    if little.dtype.name not in DTYPES:
        raise ValueError(f"pixels of type {counts.dtype} have no place in stream V1; use one of {sorted(DTYPES)}")
    name, pack = _PACKED[encoding]
    blob = pack(little)
    digest = hashlib.md5(blob, usedforsecurity=False).hexdigest()
    rows, columns = little.shape
    start, stop = round(start_time_s * 1e9), round((start_time_s + exposure_s) * 1e9)
    layout = {
        "htype": "dimage_d-1.0",
        "shape": [columns, rows],
        "type": little.dtype.name,
        "encoding": name.format(8 * little.itemsize),
        "size": len(blob),
    }
    parts = (
        json_part({"htype": "dimage-1.0", "series": series, "frame": index, "hash": digest}),
        json_part(layout),
        blob,
        json_part({"htype": "dconfig-1.0", "start_time": start, "stop_time": stop, "real_time": stop - start}),
    )
    return parts if user_data is None else (*parts, json_part(dict(user_data)))


def encode_end(series: int) -> Parts:
    """The end message of a series."""
    return (json_part({"htype": "dseries_end-1.0", "series": series}),)


def framed(messages: Iterable[Parts], framing: Framing) -> Iterator[Parts]:
    """Messages of whole headers, images and ends -> the messages that `framing` makes of them.

    "headerless" leaves headers out, and of an image all but its first three parts.
    """
    for parts in messages:
        item = json_of(parts[0])
        kind = item.get("htype") if item is not None else None
        if framing == "parts":
            yield from ((part,) for part in parts)
        elif framing == "split_header" and kind == "dheader-1.0":
            yield parts[:1]
            if len(parts) > 1:
                yield parts[1:]
        elif framing != "headerless":
            yield parts
        elif kind != "dheader-1.0":
            yield parts[:3]


def _encoded_table(htype: str, table: npt.NDArray[Any]) -> list[bytes]:
    rows, columns = table.shape
    return [json_part({"htype": htype, "shape": [columns, rows], "type": table.dtype.name}), table.tobytes()]


def _parts(message: Message) -> Parts:
    if isinstance(message, bytes):
        return (message,)
    parts = tuple(part for part in message if isinstance(part, bytes)) if isinstance(message, tuple) else ()
    if not isinstance(message, tuple) or not parts or len(parts) < len(message):
        raise WireError("not_stream_v1", f"a message of type {type(message).__name__}; stream V1 sends parts of bytes")
    return parts
