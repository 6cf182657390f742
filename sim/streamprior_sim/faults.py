"""A series of records -> its messages with faults among them, and a forecast of what a correct receiver makes of them.

Some faults strike records (an image is lost, doubled, of another shape), the others the message that a record became (a part is lost, a
bit flips). The forecast counts the very steps that are sent; what a receiver makes of each is written in `KINDS`.
"""

from __future__ import annotations

import bisect
import difflib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from streamprior.errors import ConfigError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Parts
from streamprior.wire.dectris_v1 import Framing
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior_sim.damage import LIKE_THE_FIRST, spoken
from streamprior_sim.wires import STREAM_V2, Dialect, Encoding, Wire

_V1, _V2, _DOCUMENTS = "dectris-v1", "dectris-v2", "documents"
_BOTH: Mapping[str, str | None] = {_V1: None, _V2: None}
_ALL: Mapping[str, str | None] = {**_BOTH, _DOCUMENTS: None}


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of fault.

    told : what happens, for people. reasons : wire, or "wire/encoding" where that differs -> the reason (`WireError.REASONS`) for which
    the image is quarantined, None where nothing is; a wire that is absent cannot have the fault.
    """

    told: str
    reasons: Mapping[str, str | None]


def _refused(
    v1: str | None, v2: str | None, v1_none: str | None = None, v2_none: str | None = None, documents: str | None = None
) -> Mapping[str, str | None]:
    """The reasons, with other ones where pixels are not compressed."""
    told = {_V1: v1, _V2: v2, f"{_V1}/none": v1_none, f"{_V2}/none": v2_none, _DOCUMENTS: documents}
    return {wire: reason for wire, reason in told.items() if reason is not None}


KINDS: Mapping[str, Kind] = {
    "start_missing": Kind("the start message went to another receiver", _BOTH),
    "end_missing": Kind("the end message went to another receiver, or is lost", _ALL),
    "two_receivers": Kind("a second receiver takes every other message, the start first", _BOTH),
    "late_subscriber": Kind("what came before this image is never heard", _BOTH),
    "aborted": Kind(
        "the series breaks off in the middle of this image, without an end", _refused("missing_part", "not_cbor", documents="not_document")
    ),
    "series_changes": Kind("from this image on it is another series, counted from 0, without an end or a start", _BOTH),
    "clock_jumps": Kind("from this image on the detector's clock is ten years ahead", _ALL),
    "lost": Kind("the image never comes", _ALL),
    "duplicated": Kind("the image comes twice", _ALL),
    "late": Kind("three images overtake it", _ALL),
    "position_missing": Kind("its position never comes", _ALL),
    "position_late": Kind("its position comes with a later image", _BOTH),
    "uncompressed": Kind("its pixels are not compressed", _BOTH),
    "flattened": Kind("its parts come as messages of their own", {_V1: None}),
    "dimage_lost": Kind("its first part, the header, is lost", {_V1: "stray_part"}),
    "dimage_d_lost": Kind("its second part, shape and encoding, is lost", {_V1: "missing_part"}),
    "blob_lost": Kind("its pixels are lost", {_V1: "missing_part"}),
    "dconfig_lost": Kind("the part with its times is lost", {_V1: None}),
    "garbage": Kind("random bytes come in its place", _refused("not_stream_v1", "not_cbor", documents="not_document")),
    "truncated": Kind(
        "the second half of the message, of its pixels on V1, is cut off", _refused("wrong_hash", "not_cbor", documents="not_document")
    ),
    "oversized": Kind("it is larger than the receiver's limit", _refused("too_large", "too_large", documents="too_large")),
    "flipped_bit": Kind(
        "a bit of its pixels is another; only V1 carries a hash, on other wires wrong pixels are published",
        {_V1: "wrong_hash", _V2: None, _DOCUMENTS: None},
    ),
    "short_blob": Kind(
        "its pixels were cut off before they were hashed",
        _refused("bad_compression", "bad_compression", "wrong_shape", "wrong_shape", "wrong_shape"),
    ),
    "empty_blob": Kind(
        "its pixels are 0 bytes unpacked",
        _refused("bad_compression", "bad_compression", "wrong_shape", "wrong_shape", "wrong_shape"),
    ),
    "wrong_dtype": Kind("its pixels are of another type", _refused("wrong_dtype", "wrong_dtype", documents="wrong_dtype")),
    "wrong_shape": Kind("it has half the rows", _refused("wrong_shape", "wrong_shape", documents="wrong_shape")),
    "index_leaps": Kind("its index is 4,000,000,000", _refused("bad_index", "bad_index", documents="bad_index")),
    "index_negative": Kind("its index is -1", _refused("bad_index", "bad_index", documents="bad_index")),
    "index_endless": Kind("its index is 2^70, which no integer type holds", _refused("bad_index", "bad_index")),
}
"""Every kind of fault that a sender can make."""

_OF_THE_SERIES = ("start_missing", "end_missing", "two_receivers")
_ALONE = ("two_receivers", "late_subscriber", "aborted", "series_changes")  # each says which part of a series comes, so there is one
_OF_THE_POSITION = ("position_missing", "position_late")
_ONCE = (*_OF_THE_SERIES, *_ALONE, "clock_jumps")
_LATE_BY = 3  # images that overtake a late one, or come before a late position does
_JUMP_S = 10 * 365.25 * 86400.0


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. `index` is the image it strikes, None for a fault of the series as a whole."""

    kind: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Trouble:
    """Faults of a series. seed : decides garbage and bits. oversized_bytes : of an oversized message; more than the receiver's limit."""

    faults: tuple[Fault, ...] = ()
    seed: int = 0
    oversized_bytes: int = MAX_MESSAGE_BYTES + 1


NO_TROUBLE = Trouble()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a receiver must count when nothing but these faults went wrong. Images are named by their number in the undisturbed series.

    expected : frames that the start message announces, None where it is missing or does not say. received : messages that are no start
    or end. published : the images that come through, ascending. duplicates : frames that come a second time. quarantined : reason ->
    messages. missing : frames expected (or, without a start, up to the last one seen) that never came whole, over all series. positions :
    published images whose position comes too, with the image or later, where the recording has it. altered : published images whose
    pixels are not those that were measured, and nobody can know.
    """

    expected: int | None
    received: int
    published: tuple[int, ...]
    duplicates: int
    quarantined: Mapping[str, int]
    missing: int
    positions: tuple[int, ...]
    altered: tuple[int, ...] = ()

    def sentence(self, frames: int) -> str:
        """For people: what a correct receiver makes of a series of so many images."""
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.quarantined.items()))
        parts = [
            f"a correct receiver publishes {len(self.published)} of {frames} frames",
            f"quarantines {sum(self.quarantined.values())} ({reasons})" if self.quarantined else "quarantines none",
            *([f"drops {self.duplicates} duplicates"] if self.duplicates else []),
            f"misses {self.missing}",
            *([f"cannot know that {len(self.altered)} of the published have wrong pixels"] if self.altered else []),
        ]
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the table of wires and faults: what is sent and what must come of it. fault : None for an undisturbed series."""

    wire: Wire
    fault: str | None
    faults: tuple[Fault, ...]
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class _Step:
    """A message to come. number : of the image in the undisturbed series; -1 is the start, the number of images the end."""

    record: SeriesStart | Frame | SeriesEnd
    number: int
    kind: str | None = None


def scatter(counts: Mapping[str, int], frames: int, seed: int) -> tuple[Fault, ...]:
    """Faults of the given kinds and numbers, each on an image of its own, drawn at random.

    Image 0 is spared: a receiver learns from it which shape and dtype are right. What happens to a series happens once, whatever its count.

    Raises ConfigError for an unknown kind, for more faults than images, or for kinds that contradict each other.
    """
    for kind in counts:
        check_kind(kind)
    wanted = [kind for kind, count in counts.items() for _ in range(min(count, 1) if kind in _ONCE else count)]
    struck = [kind for kind in wanted if kind not in _OF_THE_SERIES]
    if len(struck) > frames - 1:
        raise ConfigError(f"{len(struck)} faults do not fit on the images 1 to {frames - 1}; ask for fewer, or for more frames")
    indices = np.random.default_rng(seed).permutation(np.arange(1, frames))
    faults = [Fault(kind) for kind in _OF_THE_SERIES if kind in wanted]
    faults += [Fault(kind, int(index)) for kind, index in zip(struck, indices, strict=False)]
    _check(faults, frames)
    return tuple(faults)


def counts_of(text: str) -> dict[str, int]:
    """ "lost=3,truncated" -> {"lost": 3, "truncated": 1}. Raises ConfigError where it is not of that form."""
    counts: dict[str, int] = {}
    for one in filter(None, (part.strip() for part in text.split(","))):
        kind, _, count = one.partition("=")
        check_kind(kind)
        if not (count or "1").isdecimal():
            raise ConfigError(f"{one!r}: {count!r} is no number of faults; write {kind}=3")
        counts[kind] = counts.get(kind, 0) + int(count or 1)
    return counts


def check_kind(kind: str) -> None:
    """Raises ConfigError, with the nearest kind, for one that is unknown."""
    if kind in KINDS:
        return
    near = difflib.get_close_matches(kind, KINDS, 1, cutoff=0.5)
    told = "".join(f"\n{name}: {one.told}" for name, one in KINDS.items())
    raise ConfigError(f"unknown fault {kind!r}; " + (f"did you mean {near[0]}?" if near else f"known are{told}"))


def inject(
    series: Iterable[SeriesStart | Frame | SeriesEnd], trouble: Trouble, wire: Wire, dialect: Dialect
) -> Iterator[tuple[Parts, ...]]:
    """The series on its wire with the faults in it: for each step the messages that leave together.

    A late position comes with a later image of the same series: the first one that is understood and at least three images later, else
    the last one that is understood.

    Parameters
    ----------
    series : a SeriesStart that tells the number of images, a Frame for each in order of its index, a SeriesEnd.
    """
    rng = np.random.default_rng(trouble.seed)
    for step in _steps(series, trouble.faults, wire):
        messages = tuple(spoken(step.record, step.kind, wire.packing, dialect, rng, trouble.oversized_bytes))
        if messages:
            yield messages


def forecast(faults: Sequence[Fault], frames: int, wire: Wire = STREAM_V2) -> Forecast:
    """The account of a series of `frames` images with these faults. Raises ConfigError where they contradict each other or the wire."""
    _check(faults, frames, wire)
    steps = tuple(_counted(_steps(_blank(frames), faults, wire)))
    started = [step.record for step in steps if isinstance(step.record, SeriesStart)]
    expected = started[0].expected if started and wire.announces else None
    images = [(step, step.record) for step in steps if isinstance(step.record, Frame)]
    reasons = [_reason(step.kind, wire) for step, _ in images]
    whole = {(frame.series, frame.index): step for (step, frame), reason in zip(images, reasons, strict=True) if reason is None}
    quarantined = Counter(reason for reason in reasons if reason is not None)
    published = tuple(sorted(step.number for step in whole.values()))
    silent = {fault.index for fault in faults if fault.kind == "position_missing"}
    return Forecast(
        expected=expected,
        received=len(images),
        published=published,
        duplicates=len(images) - len(whole) - quarantined.total(),
        quarantined=dict(quarantined),
        missing=_missing(whole, expected),
        positions=tuple(number for number in published if number not in silent) if wire.annotates else (),
        altered=tuple(step.number for step in whole.values() if step.kind == "flipped_bit"),
    )


def _counted(steps: Iterable[_Step]) -> Iterator[_Step]:
    """Garbage in front of an image that has lost its header may be that header: nobody can tell one loss from two."""
    before = None
    for step in steps:
        if (before, step.kind) != ("garbage", "dimage_lost"):
            yield step
        before = step.kind


def _missing(whole: Iterable[tuple[str, int]], expected: int | None) -> int:
    """Over all series; only the first one is announced."""
    indices: dict[str, list[int]] = {} if expected is None else {_SERIES: []}
    for series, index in whole:
        indices.setdefault(series, []).append(index)
    extents = {series: expected if series == _SERIES and expected is not None else max(seen) + 1 for series, seen in indices.items()}
    return sum(extents.values()) - sum(map(len, indices.values()))


def table(frames: int = 8) -> tuple[Cell, ...]:
    """Every wire, framing and encoding with every fault that it can have, on a series of at least 8 frames."""
    encodings: tuple[Encoding, ...] = get_args(Encoding)
    wires = [Wire(kind="dectris-v2", encoding=encoding) for encoding in encodings]
    wires += [Wire(kind="dectris-v1", framing=framing, encoding=encoding) for framing in get_args(Framing) for encoding in encodings]
    wires.append(Wire(kind="documents", encoding="none"))
    cells = []
    for wire in wires:
        for kind in (None, *(kind for kind in KINDS if wire.kind in KINDS[kind].reasons)):
            faults = () if kind is None else (Fault(kind, None if kind in _OF_THE_SERIES else 3),)
            cells.append(Cell(wire, kind, faults, forecast(faults, frames, wire)))
    return tuple(cells)


# --- records: which of them leave, when, and as what -------------------------------------------------------------------------------


def _steps(series: Iterable[SeriesStart | Frame | SeriesEnd], faults: Sequence[Fault], wire: Wire) -> Iterator[_Step]:
    """The series as it leaves, step by step, each with what is to happen to its message."""
    records = iter(series)
    start = next(records)
    assert isinstance(start, SeriesStart)
    frames = start.expected or 0
    by_index = {fault.index: fault.kind for fault in faults if fault.index is not None}
    places = _places(faults)
    steps = (_Step(record, number, by_index.get(number)) for number, record in enumerate(itertools.chain([start], records), -1))
    steps = _with_positions(steps, by_index, _carriers(by_index, places, frames, wire))
    if "clock_jumps" in places:
        steps = _with_jump(steps, places["clock_jumps"])
    if "series_changes" in places:
        steps = _with_change(steps, places["series_changes"])
    return (step for step in _reordered(steps) if _reaches(step.number, places, frames))


def _places(faults: Iterable[Fault]) -> dict[str, int]:
    """What happens to the series, and where; 0 for what has no place."""
    return {fault.kind: fault.index or 0 for fault in faults if fault.kind in _ONCE}


def _with_positions(steps: Iterator[_Step], by_index: Mapping[int, str], carriers: Mapping[int, int]) -> Iterator[_Step]:
    """Missing positions are left out, late ones are put on later images."""
    held: dict[int, dict[int, tuple[float, float]]] = {}  # carrying image -> positions of earlier ones
    for step in steps:
        frame = step.record
        if isinstance(frame, Frame):
            if by_index.get(step.number) in _OF_THE_POSITION:
                if step.number in carriers and frame.position is not None:
                    held.setdefault(carriers[step.number], {})[frame.index] = frame.position
                frame = replace(frame, position=None)
            step = replace(step, record=replace(frame, late=held.pop(step.number, {})))
        yield step


def _with_jump(steps: Iterator[_Step], first: int) -> Iterator[_Step]:
    for step in steps:
        frame = step.record
        if isinstance(frame, Frame) and frame.detector_time is not None and step.number >= first:
            step = replace(step, record=replace(frame, detector_time=frame.detector_time + _JUMP_S))
        yield step


def _with_change(steps: Iterator[_Step], first: int) -> Iterator[_Step]:
    for step in steps:
        record = step.record
        if step.number >= first and not isinstance(record, SeriesStart):
            series = str(int(record.series) + 1) if record.series.isdigit() else f"{record.series}-again"
            late = {index - first: place for index, place in record.late.items()}
            record = replace(record, series=series, late=late)
            step = replace(step, record=replace(record, index=record.index - first) if isinstance(record, Frame) else record)
        yield step


def _reordered(steps: Iterator[_Step]) -> Iterator[_Step]:
    """Lost images gone, doubled ones doubled, late ones behind those that overtake them."""
    held: list[_Step] = []
    for step in steps:
        # Nothing is left behind by an end; and an image that came after another series had begun would be late for good.
        if isinstance(step.record, SeriesEnd) or step.kind == "series_changes":
            yield from held
            held.clear()
        if step.kind == "late":
            held.append(step)
        elif step.kind != "lost":
            yield from (step,) * (2 if step.kind == "duplicated" else 1)
        while held and step.number >= held[0].number + _LATE_BY:
            yield held.pop(0)


def _reaches(number: int, places: Mapping[str, int], frames: int) -> bool:
    """Whether our receiver is sent the message of this number: -1 is the start, `frames` the end."""
    if "late_subscriber" in places and number < places["late_subscriber"]:
        return False
    if "aborted" in places and number > places["aborted"]:
        return False
    if "two_receivers" in places and number % 2:  # -1, the start, is odd
        return False
    return not (number == -1 and "start_missing" in places) and not (number == frames and "end_missing" in places)


def _carriers(by_index: Mapping[int, str], places: Mapping[str, int], frames: int, wire: Wire) -> dict[int, int]:
    """Late position -> the image that brings it. There always is one: an image whose position is late is itself understood."""
    whole = [number for number in range(frames) if _comes_whole(number, by_index, places, frames, wire)]
    change = places.get("series_changes", 0)
    found = {}
    for number in whole:
        if by_index.get(number) == "position_late":
            same = [one for one in whole if (one >= change) == (number >= change)]
            found[number] = same[min(bisect.bisect_left(same, number + _LATE_BY), len(same) - 1)]
    return found


def _comes_whole(number: int, by_index: Mapping[int, str], places: Mapping[str, int], frames: int, wire: Wire) -> bool:
    kind = by_index.get(number)
    return kind != "lost" and _reaches(number, places, frames) and _reason(kind, wire) is None


def _reason(kind: str | None, wire: Wire) -> str | None:
    """Why an image with this fault is quarantined on this wire; None where it is not."""
    if kind is None:
        return None
    reasons = KINDS[kind].reasons
    return reasons.get(f"{wire.kind}/{wire.encoding}", reasons.get(wire.kind))


_SERIES = "1"
_NO_COUNTS = np.zeros((1, 1), np.uint16)


def _blank(frames: int) -> Iterator[SeriesStart | Frame | SeriesEnd]:
    """A series of which nothing but its numbers matters."""
    yield SeriesStart("twin", _SERIES, frames, Detector())
    for number in range(frames):
        yield Frame("twin", _SERIES, number, _NO_COUNTS, 0.0, 0.0, (0.0, 0.0), number)
    yield SeriesEnd("twin", _SERIES)


def _check(faults: Sequence[Fault], frames: int, wire: Wire | None = None) -> None:
    struck: dict[int, str] = {}
    for fault in faults:
        check_kind(fault.kind)
        if wire is not None and wire.kind not in KINDS[fault.kind].reasons:
            raise ConfigError(f"{fault.kind} cannot happen on {wire.kind}; leave it out, or choose another wire")
        if (fault.index is None) != (fault.kind in _OF_THE_SERIES):
            raise ConfigError(f"{fault.kind} needs {'no index' if fault.kind in _OF_THE_SERIES else 'the index of an image'}")
        if fault.index is None:
            continue
        if not 0 <= fault.index < frames:
            raise ConfigError(f"{fault.kind} at image {fault.index}, the run has {frames}")
        if fault.index in struck:
            raise ConfigError(f"{fault.kind} and {struck[fault.index]} both strike image {fault.index}")
        struck[fault.index] = fault.kind
    alone = [fault.kind for fault in faults if fault.kind in _ALONE]
    if len(alone) > 1:
        raise ConfigError(f"{alone[0]} and {alone[1]} cannot both happen to one series; leave one of them out")
    _check_first(faults, struck, frames, wire or STREAM_V2)


def _check_first(faults: Sequence[Fault], struck: Mapping[int, str], frames: int, wire: Wire) -> None:
    """Some images are refused for what came before them, so something must have."""
    places = _places(faults)
    whole = (number for number in range(frames) if struck.get(number) != "late" and _comes_whole(number, struck, places, frames, wire))
    first = next(whole, frames)
    # On stream V1, garbage between a header and its first image might be a part of the header.
    told_apart = (*LIKE_THE_FIRST, *(("garbage",) if wire.kind == _V1 else ()))
    for number, kind in struck.items():
        if kind in told_apart and number < first and _reaches(number, places, frames):
            raise ConfigError(f"{kind} at image {number}: no whole image comes before it, so a receiver would take it for the right one")
