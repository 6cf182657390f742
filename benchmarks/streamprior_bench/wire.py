"""Decoding: messages and GB of pixels a second, beside a bare parser and decompressor that check nothing."""

from __future__ import annotations

import datetime
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import bitshuffle
import cbor2
import lz4.block
import numpy as np

from streamprior.records import Frame
from streamprior.seams import Decoder
from streamprior.wire import dectris_v1, dectris_v2
from streamprior_bench.measure import timed

Unpack = Callable[[bytes, np.dtype[Any], tuple[int, int]], np.ndarray[Any, Any]]

try:
    from dectris.compression import decompress as dectris_decompress
except ImportError:  # it is built from source
    dectris_decompress = None

DATE = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
_HEADER_BYTES = 12
_PIXELS = 2**19
"""Pixels that a contestant decodes in one turn."""


@dataclass(frozen=True, slots=True)
class Case:
    """What is sent. shape : (rows, columns)."""

    wire: Literal["v2", "v1"]
    encoding: Literal["bslz4", "lz4"]
    dtype: str
    shape: tuple[int, int]


CASES = (
    Case("v2", "bslz4", "uint16", (128, 128)),
    Case("v2", "bslz4", "uint16", (514, 1030)),
    Case("v2", "bslz4", "uint32", (514, 1030)),
    Case("v2", "lz4", "uint16", (128, 128)),
    Case("v2", "lz4", "uint16", (514, 1030)),
    Case("v1", "bslz4", "uint16", (128, 128)),
    Case("v1", "bslz4", "uint16", (514, 1030)),
)


def run(repeats: int = 5) -> Iterator[dict[str, Any]]:
    """One measurement a dict: one thread, contestants interleaved within the run; medians, and half the spread of the middle half."""
    for case in CASES:
        yield one(case, repeats)


def one(case: Case, repeats: int) -> dict[str, Any]:
    messages, decoder = encoded(case), decoder_of(case)
    works: dict[str, Callable[[], object]] = {"ours": lambda: [pixels_of(decoder, message) for message in messages]}
    for name, unpack in bare_unpackers(case).items():
        works[name] = lambda unpack=unpack: [bare(case, message, unpack) for message in messages]  # type: ignore[misc]
    spent = {name: [seconds / len(messages) for seconds in times] for name, times in timed(works, repeats).items()}
    median = {name: statistics.median(times) for name, times in spent.items()}
    gigabytes = case.shape[0] * case.shape[1] * np.dtype(case.dtype).itemsize / 1e9
    row: dict[str, Any] = {
        "what": f"{case.wire} {case.encoding} {case.dtype} {case.shape[0]}x{case.shape[1]}",
        "message_bytes": round(statistics.mean(len(b"".join(parts)) for parts in messages)),
        "repeats": repeats,
        "ours_messages_per_s": round(1 / median["ours"]),
        "ours_gb_per_s": round(gigabytes / median["ours"], 3),
        "ours_us": round(1e6 * median["ours"], 1),
        "ours_spread": round(spread(spent["ours"]), 3),
    }
    for name in median:
        if name != "ours":
            row |= {
                f"{name}_messages_per_s": round(1 / median[name]),
                f"{name}_gb_per_s": round(gigabytes / median[name], 3),
                f"{name}_spread": round(spread(spent[name]), 3),
                f"{name}_over_ours": round(median[name] / median["ours"], 3),
            }
    return row


def spread(times: Sequence[float]) -> float:
    """Half the distance between the quartiles, in medians."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def frames(shape: tuple[int, int], dtype: str, count: int) -> list[np.ndarray[Any, Any]]:
    """Poisson counts of a core, a ring and a background, as a detector behind a sample gives them."""
    rows, columns = np.mgrid[: shape[0], : shape[1]] / min(shape) - np.array(shape).reshape(2, 1, 1) / min(shape) / 2
    radius = np.hypot(rows, columns)
    ideal = 900 * np.exp(-((radius / 0.03) ** 2)) + 60 * np.exp(-(((radius - 0.2) / 0.03) ** 2)) + 0.5
    rng = np.random.default_rng(0)
    return [rng.poisson(ideal).astype(dtype) for _ in range(count)]


def encoded(case: Case) -> list[tuple[bytes, ...]]:
    """Image messages of one series, a tuple of parts each."""
    count = max(4, _PIXELS // (case.shape[0] * case.shape[1]))
    told = {"position_m": [1e-6, 2e-6], "origin": 0}
    if case.wire == "v1":
        return [
            dectris_v1.encode_image(1, index, counts, 0.01 * index, 0.01, told, case.encoding)
            for index, counts in enumerate(frames(case.shape, case.dtype, count))
        ]
    return [
        (dectris_v2.encode_image(1, "S1", index, counts, 0.01 * index, DATE, 0.01, told, case.encoding),)
        for index, counts in enumerate(frames(case.shape, case.dtype, count))
    ]


def decoder_of(case: Case) -> Decoder:
    return dectris_v1.StreamV1Decoder("bench") if case.wire == "v1" else dectris_v2.StreamV2Decoder("bench")


def pixels_of(decoder: Decoder, parts: tuple[bytes, ...]) -> np.ndarray[Any, Any]:
    """As the daemon decodes a message of the socket."""
    (frame,) = decoder.decode(parts if len(parts) > 1 else parts[0], 0.0)
    assert isinstance(frame, Frame)
    return frame.counts


def bare(case: Case, parts: tuple[bytes, ...], unpack: Unpack) -> np.ndarray[Any, Any]:
    """Parsed and decompressed, with nothing checked: the md5 of V1 neither."""
    if case.wire == "v1":
        json.loads(parts[0])
        about = json.loads(parts[1])
        json.loads(parts[3])
        return unpack(parts[2], np.dtype(about["type"]), (about["shape"][1], about["shape"][0]))
    item = cbor2.loads(parts[0])
    shape, typed = item["data"]["threshold_1"].value
    return unpack(typed.value.value[2], dectris_v2.DTYPES[typed.tag], tuple(shape))


def bare_unpackers(case: Case) -> dict[str, Unpack]:
    """Name -> decompressor of the container that DECTRIS streams and the HDF5 filters share."""

    def shuffled(blob: bytes, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        block = int.from_bytes(blob[8:_HEADER_BYTES]) // dtype.itemsize
        return bitshuffle.decompress_lz4(np.frombuffer(blob, np.uint8, offset=_HEADER_BYTES), shape, dtype, block)

    def unpacked(blob: bytes, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        # One block, as `encoded` makes it.
        size = int.from_bytes(blob[:8])
        return np.frombuffer(lz4.block.decompress(blob[_HEADER_BYTES + 4 :], uncompressed_size=size), dtype).reshape(shape)

    def dectris(blob: bytes, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray[Any, Any]:
        return np.frombuffer(dectris_decompress(blob, case.encoding, elem_size=dtype.itemsize), dtype).reshape(shape)

    found: dict[str, Unpack] = {"bitshuffle": shuffled} if case.encoding == "bslz4" else {"lz4": unpacked}
    return found | ({"dectris": dectris} if dectris_decompress is not None else {})
