"""A stream of messages -> the same stream with faults, and a forecast of what a correct receiver makes of it."""

from __future__ import annotations

import bisect
import datetime
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import cbor2
import numpy as np

from streamprior.records import Frame
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES, StreamV2Decoder, encode_image

KINDS: Mapping[str, str | None] = {
    "start_missing": None,
    "end_missing": None,
    "lost": None,
    "duplicated": None,
    "late": None,
    "position_missing": None,
    "position_late": None,
    "garbage": "not_cbor",
    "truncated": "not_cbor",
    "oversized": "too_large",
    "wrong_dtype": "wrong_dtype",
    "wrong_shape": "wrong_shape",
}
"""Every kind of fault, and the reason (`WireError.REASONS`) for which its message is quarantined; None where nothing is."""

_OF_THE_SERIES = ("start_missing", "end_missing")
_OF_THE_POSITION = ("position_missing", "position_late")
_WHOLE = (None, "duplicated", "late", *_OF_THE_POSITION)  # what may befall an image that is understood in the end
_LATE_BY = 3  # images that overtake a late one, or come before a late position does
_SELF_DESCRIBED = 55799


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `index` is the image it strikes, None for a missing start or end message."""

    kind: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a receiver must count when nothing but these faults went wrong.

    expected : frames that the start message announces, None where it is missing. received : messages that are no start or end.
    published : indices of the frames that come through, ascending. duplicates : frames that come a second time.
    quarantined : reason -> messages. missing : frames expected (or, without a start, up to the last one seen) that never came whole.
    positions : indices of the published frames whose position comes too, with the image or later, where the recording has it.
    """

    expected: int | None
    received: int
    published: tuple[int, ...]
    duplicates: int
    quarantined: Mapping[str, int]
    missing: int
    positions: tuple[int, ...]


def scatter(counts: Mapping[str, int], frames: int, seed: int) -> tuple[Fault, ...]:
    """Faults of the given kinds and numbers, each on an image of its own, drawn at random.

    Image 0 is spared: a receiver learns from it which shape and dtype are right.

    Raises ValueError for an unknown kind or for more faults than images.
    """
    wanted = [kind for kind, count in counts.items() for _ in range(count)]
    struck = [kind for kind in wanted if kind not in _OF_THE_SERIES]
    if len(struck) > frames - 1:
        raise ValueError(f"{len(struck)} faults do not fit on the images 1 to {frames - 1}")
    indices = np.random.default_rng(seed).permutation(np.arange(1, frames))
    faults = [Fault(kind) for kind in _OF_THE_SERIES if kind in wanted]
    faults += [Fault(kind, int(index)) for kind, index in zip(struck, indices, strict=False)]
    _check(faults, frames)
    return tuple(faults)


def inject(
    messages: Iterable[bytes], faults: Sequence[Fault], seed: int = 0, oversized_bytes: int = MAX_MESSAGE_BYTES + 1
) -> Iterator[bytes]:
    """The stream with the faults in it.

    A late position comes in the user_data of a later image, as "positions_m": [[index, x, y], ...]: the first one that is understood
    and at least three images later, else the last one that is understood.

    Parameters
    ----------
    messages : a start message, images in order of their index, an end message.
    seed : decides the garbage.
    oversized_bytes : length of an oversized message; more than the receiver's limit.
    """
    by_index = {fault.index: fault.kind for fault in faults}
    missing = {fault.kind for fault in faults if fault.kind in _OF_THE_SERIES}
    rng = np.random.default_rng(seed)
    held: list[tuple[int, bytes]] = []  # (index after which it goes out, message)
    stream = iter(messages)
    if any(kind in _OF_THE_POSITION for kind in by_index.values()):
        stream = _withholding(stream, by_index)
    start = next(stream)
    if "start_missing" not in missing:
        yield start
    message = next(stream)
    index = 0
    # One message ahead: the last one is the end message.
    for following in stream:
        kind = by_index.get(index)
        if kind == "late":
            held.append((index + _LATE_BY, message))
        else:
            yield from _struck(message, kind, rng, oversized_bytes)
        while held and held[0][0] <= index:
            yield held.pop(0)[1]
        message, index = following, index + 1
    yield from (late for _, late in held)
    if "end_missing" not in missing:
        yield message


def forecast(faults: Sequence[Fault], frames: int) -> Forecast:
    """The account of a run of `frames` images with these faults. Raises ValueError where the faults contradict each other."""
    _check(faults, frames)
    kinds = Counter(fault.kind for fault in faults)
    gone = {fault.index for fault in faults if fault.kind == "lost" or KINDS[fault.kind] is not None}
    silent = {fault.index for fault in faults if fault.kind == "position_missing"}
    published = tuple(index for index in range(frames) if index not in gone)
    quarantined: Counter[str] = Counter()
    for kind, count in kinds.items():
        reason = KINDS[kind]
        if reason is not None:
            quarantined[reason] += count
    expected = None if kinds["start_missing"] else frames
    extent = (published[-1] + 1 if published else 0) if expected is None else expected
    return Forecast(
        expected=expected,
        received=frames - kinds["lost"] + kinds["duplicated"],
        published=published,
        duplicates=kinds["duplicated"],
        quarantined=dict(quarantined),
        missing=extent - len(published),
        positions=tuple(index for index in published if index not in silent),
    )


def _withholding(stream: Iterator[bytes], by_index: Mapping[int | None, str]) -> Iterator[bytes]:
    """The stream with its missing positions left out and its late ones on later images."""
    start = next(stream)
    carriers = _carriers(by_index, int(cbor2.loads(start)["number_of_images"]))
    yield start
    held: dict[int, list[list[float]]] = {}  # carrying image -> positions
    for index, message in enumerate(stream):
        if by_index.get(index) in _OF_THE_POSITION:
            message, position = _without_position(message)
            if index in carriers and position is not None:
                held.setdefault(carriers[index], []).append([index, *position])
        yield _with_user_data(message, {"positions_m": held.pop(index)}) if index in held else message


def _carriers(by_index: Mapping[int | None, str], frames: int) -> dict[int, int]:
    """Late position -> the image that brings it. There always is one: an image whose position is late is itself understood."""
    whole = [index for index in range(frames) if by_index.get(index) in _WHOLE]
    late = [index for index, kind in by_index.items() if index is not None and kind == "position_late"]
    return {index: whole[min(bisect.bisect_left(whole, index + _LATE_BY), len(whole) - 1)] for index in late}


def _without_position(message: bytes) -> tuple[bytes, Sequence[float] | None]:
    item = dict(cbor2.loads(message))
    told = dict(item["user_data"])
    position = told.pop("position_m", None)
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item | {"user_data": told})), position


def _with_user_data(message: bytes, more: Mapping[str, object]) -> bytes:
    item = dict(cbor2.loads(message))
    return cbor2.dumps(cbor2.CBORTag(_SELF_DESCRIBED, item | {"user_data": {**item["user_data"], **more}}))


def _struck(message: bytes, kind: str | None, rng: np.random.Generator, oversized_bytes: int) -> Iterator[bytes]:
    if kind == "lost":
        return
    if kind == "duplicated":
        yield message
    if kind == "garbage":
        # 0xff is a break code, which no CBOR item begins with; random bytes alone are now and then a valid number.
        message = b"\xff" + rng.bytes(len(message) - 1)
    elif kind == "truncated":
        message = message[: len(message) // 2]
    elif kind == "oversized":
        message = message.ljust(oversized_bytes, b"\0")
    elif kind in ("wrong_dtype", "wrong_shape"):
        message = _rewritten(message, kind)
    yield message


def _rewritten(message: bytes, kind: str) -> bytes:
    """The same image with pixels of another width, or with half its rows."""
    frame = StreamV2Decoder("faults").decode(message, received=0.0)[0]
    if not isinstance(frame, Frame):
        raise ValueError(f"{kind} strikes an image, this is a {type(frame).__name__}")
    counts = frame.counts
    if kind == "wrong_shape":
        counts = counts[: max(1, counts.shape[0] // 2)]
    else:
        counts = counts.astype(np.uint16 if counts.dtype == np.uint32 else np.uint32)
    date = datetime.datetime.fromtimestamp(frame.detector_time or 0.0, datetime.UTC)
    return encode_image(0, frame.series, frame.index, counts, 0.0, date)


def _check(faults: Sequence[Fault], frames: int) -> None:
    struck: dict[int, str] = {}
    for fault in faults:
        if fault.kind not in KINDS:
            raise ValueError(f"unknown fault {fault.kind!r}; known are {', '.join(KINDS)}")
        if (fault.index is None) != (fault.kind in _OF_THE_SERIES):
            raise ValueError(f"{fault.kind} needs {'no index' if fault.kind in _OF_THE_SERIES else 'the index of an image'}")
        if fault.index is None:
            continue
        if not 0 <= fault.index < frames:
            raise ValueError(f"{fault.kind} at image {fault.index}, the run has {frames}")
        if fault.index in struck:
            raise ValueError(f"{fault.kind} and {struck[fault.index]} both strike image {fault.index}")
        struck[fault.index] = fault.kind
    first_whole = next((index for index in range(frames) if struck.get(index) in (None, "duplicated", *_OF_THE_POSITION)), frames)
    for index, kind in struck.items():
        if kind in ("wrong_dtype", "wrong_shape") and index < first_whole:
            raise ValueError(f"{kind} at image {index}: no whole image comes before it, so a receiver would take it for the right one")
