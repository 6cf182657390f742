"""A record and what befalls it -> its messages: parts lost, bytes cut, bits flipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.seams import Parts
from streamprior.wire.compression import decompress
from streamprior_sim.wires import Dialect, Encoding

LIKE_THE_FIRST = ("wrong_dtype", "wrong_shape")
"""Faults that are an error only where a receiver has seen another image before."""

LEAPS = {"index_leaps": 4_000_000_000, "index_negative": -1, "index_endless": 2**70}
"""Index that an image says it has: a counter of 32 bits that ran over, one that began too low, and one that no integer type holds."""

_LOST_PARTS = {"dimage_lost": 0, "dimage_d_lost": 1, "blob_lost": 2, "dconfig_lost": 3}


def spoken(
    record: SeriesStart | Frame | SeriesEnd,
    kind: str | None,
    encoding: Encoding,
    dialect: Dialect,
    rng: np.random.Generator,
    oversized_bytes: int,
) -> Iterator[Parts]:
    """The messages on the socket that a record becomes; kind : of the fault that strikes it, where one does."""
    if isinstance(record, SeriesStart):
        yield from dialect.sent(dialect.start(record), False)
    elif isinstance(record, SeriesEnd):
        yield from dialect.sent(dialect.end(record), False)
    else:
        if kind in LIKE_THE_FIRST:
            record = replace(record, counts=_unlike(record.counts, kind))
        if kind in LEAPS:
            record = replace(record, index=LEAPS[kind])
        message = dialect.image(record, "none" if kind == "uncompressed" else encoding)
        message = _damaged(message, kind, record, encoding, dialect, rng, oversized_bytes)
        if message:
            yield from dialect.sent(message, kind == "flattened")


def _unlike(counts: npt.NDArray[Any], kind: str) -> npt.NDArray[Any]:
    """Pixels of another width, or half the rows."""
    if kind == "wrong_shape":
        return counts[: max(1, counts.shape[0] // 2)]
    return counts.astype(np.uint16 if counts.dtype == np.uint32 else np.uint32)


def _damaged(
    message: Parts, kind: str | None, frame: Frame, encoding: Encoding, dialect: Dialect, rng: np.random.Generator, oversized_bytes: int
) -> Parts:
    pixels = dialect.pixels
    if kind == "garbage":
        # 0xff is a break code, which no CBOR item begins with, and no text; random bytes alone are now and then a valid number. Without
        # a space it has no name that a document could have.
        return (b"\xff" + rng.bytes(len(message[pixels]) - 1).replace(b" ", b"_"),)
    if kind == "truncated":
        return _with_part(message, pixels, message[pixels][: len(message[pixels]) // 2])
    if kind == "oversized":
        return _with_part(message, pixels, message[pixels].ljust(oversized_bytes, b"\0"))
    if kind == "short_blob":
        return dialect.with_pixels(message, lambda blob: blob[: len(blob) // 2])
    if kind == "empty_blob":
        return dialect.with_pixels(message, lambda blob: dialect.nothing(encoding))
    if kind == "flipped_bit":
        if dialect.hashed:
            return _with_part(message, pixels, _flipped(message[pixels], rng, lambda blob: True))
        return dialect.with_pixels(message, lambda blob: _flipped(blob, rng, partial(_misread, encoding, frame.counts)))
    if kind == "aborted":
        return message[:2] if len(message) > 1 else (message[0][: len(message[0]) // 2],)
    if kind in _LOST_PARTS:
        return tuple(part for place, part in enumerate(message) if place != _LOST_PARTS[kind])
    return message


def _with_part(message: Parts, place: int, part: bytes) -> Parts:
    return (*message[:place], part, *message[place + 1 :])


def _flipped(blob: bytes, rng: np.random.Generator, will_do: Callable[[bytes], bool]) -> bytes:
    """The blob with the first bit flipped, of bits in random order, that will do."""
    for place in rng.permutation(8 * len(blob)):
        other = bytearray(blob)
        other[place // 8] ^= 1 << int(place % 8)
        if will_do(bytes(other)):
            return bytes(other)
    raise AssertionError("no bit of the pixels can flip and leave them readable")


def _misread(encoding: Encoding, counts: npt.NDArray[Any], blob: bytes) -> bool:
    """A receiver without a hash takes the blob for good, and its pixels are others."""
    if encoding == "none":
        return True
    try:
        return not np.array_equal(decompress(encoding, blob, counts.dtype, counts.shape), counts)
    except WireError:
        return False
