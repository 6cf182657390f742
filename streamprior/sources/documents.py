"""Bluesky documents -> SeriesStart, Frame, Reading, Exposures, SeriesEnd; frames inline or by reference to a file.

Facts of the event model: a descriptor says what the events of one stream hold (shape of a data key: frames of an event, rows, columns);
an event's field is a number, an array or the id of a datum, which names a resource; a stream_datum says that rows `indices` of a
stream_resource are those of events `seq_nums`, both half open, the latter counted from 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from streamprior.config import DocumentsSettings, PositionSettings
from streamprior.errors import WireError
from streamprior.records import Detector, Exposures, Frame, Reading, SeriesEnd, SeriesStart
from streamprior.seams import Decoded, Document, Message
from streamprior.sources.assets import Assets, Awaited, Stack, resource_stack, stream_stack
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior.wire.documents import load_document
from streamprior.wire.told import MAX_INDEX, cut, is_count, plain, shown

T = TypeVar("T")

_METRES = {"m": 1.0, "mm": 1e-3, "um": 1e-6, "µm": 1e-6, "μm": 1e-6, "nm": 1e-9} | {
    f"{name}{plural}": size
    for name, size in (("meter", 1.0), ("metre", 1.0), ("millimeter", 1e-3), ("millimetre", 1e-3), ("micron", 1e-6), ("micrometer", 1e-6))
    for plural in ("", "s")
}
"""Units as descriptors spell them, in lower case; the two µ are U+00B5 and U+03BC."""

_BASELINE = "baseline"
"""Bluesky's stream of what is read once before and once after a scan: its events are no points of the scan."""

_RUNS = 16
"""Runs known at a time: nested ones, and those whose stop document was lost."""

_REMEMBERED_BYTES = 64 * 2**20
"""Of descriptors, of resources and of datums each, the newest: a datum takes about 200."""

_METADATA_BYTES = 100_000
"""A start document that takes more goes into the run's metadata by its four names alone."""

_EARLY = 100_000
"""Readings of a run that are kept until it turns out to have frames."""

_WAITING = 100_000
"""References that may wait for their files, all runs together."""

_HELD_BYTES = 64 * 2**20
"""Inline frames that may wait until the run before theirs has its last ones."""

_REFUSALS = 1_000
"""Frames of one reference that are refused one by one, each after a look at its file; of a reference to more the rest goes at once."""

# What a document that is not as the event model has it makes of the code below.
_MALFORMED = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError, MemoryError)


@dataclass(frozen=True, slots=True)
class _Stream:
    """What a descriptor says. shape : of the image's data key. metres : of one unit of x and of y, None where there are no positions."""

    run: str
    name: str
    image: bool
    shape: tuple[int, ...] = ()
    dtype: str = ""
    metres: tuple[float | None, float | None] = (None, None)


@dataclass(slots=True)
class _Wanted:
    """Frames that a document refers to and that have not been read yet: `left` of them from `index` on, at `row` of their stack; all three
    count events until the stack is known."""

    resource: str
    datum: str  # empty: `resource` is a stream_resource, and `row` counts its rows
    shape: tuple[int, ...]
    index: int
    row: int
    left: int
    until: float  # Unix seconds; a file that is not there by then is not waited for
    received: float
    time: float | None = None
    position: tuple[float, float] | None = None
    stack: Stack | None = None


@dataclass(slots=True)
class _Run:
    """A Bluesky run. It is announced (its SeriesStart is out) once it is known to have frames and the run before it has its last."""

    uid: str
    metadata: Mapping[str, Any] = field(default_factory=dict)
    points: int = 0  # as the start document has them; 0: it does not say
    announced: bool = False
    stopped: bool = False
    image: str = ""
    stream: str = ""  # that of the image
    motors: str = ""  # the stream whose events are the readings
    per_event: int = 1
    like: tuple[tuple[int, ...], np.dtype[Any]] | None = None
    told: set[str] = field(default_factory=set)  # complaints that are made once a run
    early: deque[Reading | Exposures] = field(default_factory=lambda: deque(maxlen=_EARLY))
    waiting: deque[Frame | _Wanted] = field(default_factory=deque)
    axes: dict[int, float] = field(default_factory=dict)  # the last value of each motor, for those that are monitored one by one
    offsets: dict[str, tuple[int, int]] = field(default_factory=dict)
    done: int = 0  # events that stream_datums have referred to


class DocumentsDecoder:
    """Documents -> records. Owns what the runs in hand have told, what waits for files, and the files that are open.

    Parameters
    ----------
    source : name of the source, part of every frame's identity.
    documents, positions : which data keys are what, and which folders may be read.
    pixels : False where frames come over another wire: then no image is looked at and no file is touched.
    max_message_bytes : a larger message, or inline frame, is refused.
    """

    def __init__(
        self,
        source: str,
        documents: DocumentsSettings,
        positions: PositionSettings,
        pixels: bool = True,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._source, self._documents, self._positions, self._pixels = source, documents, positions, pixels
        self._max_message_bytes = max_message_bytes
        self._assets = Assets(documents.folders, documents.moved)
        self._runs: OrderedDict[str, _Run] = OrderedDict()
        self._streams = _Newest[_Stream]()
        self._resources = _Newest[Mapping[str, Any]]()
        self._datums = _Newest[tuple[str, Mapping[str, Any]]]()
        self._wanted = 0
        self._held = 0
        self._handlers = {
            "start": self._start,
            "stop": self._stop,
            "descriptor": self._descriptor,
            "event": self._event,
            "event_page": self._event_page,
            "bulk_events": self._bulk_events,
            "resource": self._resource,
            "stream_resource": self._resource,
            "datum": self._datum,
            "datum_page": self._datum_page,
            "bulk_datum": self._bulk_datum,
            "stream_datum": self._stream_datum,
        }

    def decode(self, message: Message, received: float) -> Iterator[Decoded | WireError]:
        """One document, bytes off a wire or (name, document); `received` in Unix seconds. Raises WireError and nothing else."""
        document = self._loaded(message)
        if document is None:
            return
        name, doc = document
        try:
            yield from self._handlers[name](doc, received)
        except WireError:
            raise
        except _MALFORMED as error:
            raise WireError("bad_document", f"a {name} document: {_said(error)}") from None

    def due(self, now: float) -> Iterator[Decoded | WireError]:
        """Frames whose file holds them by now; those that were waited for too long are refused. Infinity: nothing waits any longer."""
        for run in list(self._runs.values()):
            yield from self._settle(run, now)

    def expendable(self, message: Message) -> bool:
        """Any document may say where many frames are."""
        return False

    def _loaded(self, message: Message) -> Document | None:
        if isinstance(message, bytes):
            documents = self._documents
            return load_document(message, documents.prefix.encode(), documents.serializer, self._max_message_bytes)
        if isinstance(message, tuple) and len(message) == 2:
            name, doc = message
            if isinstance(name, str) and name in self._handlers and isinstance(doc, Mapping):
                return name, doc
        raise WireError("not_document", "neither a message of one part nor the name and body of a document")

    def _start(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        run = self._runs.setdefault(uid := _uid(doc, "uid"), _Run(uid))
        points = doc.get("num_points")
        run.metadata, run.points = _metadata(doc), points if is_count(points) and points <= MAX_INDEX else 0
        while len(self._runs) > _RUNS:
            oldest = next(iter(self._runs.values()))
            oldest.stopped = True
            yield from self._settle(oldest, math.inf)
        if not self._pixels:
            yield from self._announce(run)

    def _stop(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        run = self._runs.get(uid := _uid(doc, "run_start"))
        if run is None:
            raise WireError("bad_document", f"a stop document of run {uid!r}, of which nothing was heard before")
        run.stopped = True
        yield from self._settle(run, received)

    def _descriptor(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        uid, name = _uid(doc, "run_start"), str(doc.get("name", ""))[:200]
        # A late subscriber has missed the start document: the run is known by what it does have.
        run = self._runs.setdefault(uid, _Run(uid))
        keys = {str(key): told for key, told in doc["data_keys"].items() if isinstance(told, Mapping)}
        yield from self._choose(run, keys, name)
        image = bool(run.image) and run.image in keys and name == run.stream
        shape = _shape(keys[run.image]) if image else ()
        if image:
            run.per_event = max(1, math.prod(shape[:-2]))
        metres: list[float | None] = [None, None]
        for axis, key in enumerate((self._positions.x, self._positions.y)):
            if key is not None and key in keys:
                unit = self._positions.unit or keys[key].get("units") or "mm"
                metres[axis] = _METRES.get(str(unit).strip().lower())
                if metres[axis] is None:
                    yield from _once(
                        run, "units", f"{key} is in {shown(unit)}; set positions.unit, or choose a motor that moves along a line"
                    )
        dtype = str(keys[run.image].get("dtype_numpy", ""))[:20] if image else ""
        self._streams.put(_uid(doc, "uid"), _Stream(uid, name, image, shape, dtype, (metres[0], metres[1])), 1000)
        if image:
            yield from self._settle(run, received)

    def _choose(self, run: _Run, keys: Mapping[str, Mapping[str, Any]], stream: str) -> Iterator[WireError]:
        """Which data key is the image: the one that is set, otherwise the only one that could be; its stream likewise, or the first."""
        named = self._documents.image
        if self._documents.stream not in (None, stream):
            return
        could = [key for key, told in keys.items() if (key == named if named is not None else _is_image(told))]
        if not run.image and len(could) == 1:
            run.image, run.stream = could[0], stream
        elif set(could) - {run.image}:
            yield from _once(
                run,
                "images",
                f"several data keys could be the image: {', '.join(sorted({*could, run.image} - {''}))[:500]}; name one in documents.image",
            )

    def _announce(self, run: _Run) -> Iterator[Decoded]:
        """The run's beginning and what was learnt of it before; nothing while it has no frames, or another run waits for its last ones."""
        if run.announced or (
            self._pixels and (not run.image or any(one.stopped for one in self._runs.values() if one is not run and one.announced))
        ):
            return
        run.announced = True
        # Scans of several frames a point are often taken in one sweep, whose points are something else.
        expected = run.points if run.points and run.per_event == 1 else None
        yield SeriesStart(self._source, run.uid, expected, Detector(), run.metadata, 1000 + len(str(run.metadata)))
        yield from run.early
        run.early.clear()

    def _settle(self, run: _Run, now: float) -> Iterator[Decoded | WireError]:
        """Whatever of a run may go on at `now`; with the last of it, after its stop document, the run is over."""
        if self._runs.get(run.uid) is not run:
            return
        yield from self._announce(run)
        absent: set[str] = set()  # one look a turn at a file that is not there, however many wait for it
        for _ in range(len(run.waiting) if run.announced else 0):
            item = run.waiting.popleft()
            if isinstance(item, Frame):
                self._held -= item.nbytes
                yield item
                continue
            self._wanted -= 1
            item.until = min(item.until, now + self._documents.flush_s)  # also where the clock was set back meanwhile
            if item.resource not in absent or now >= item.until:
                yield from self._frames(run, item, now)
            if item.left:
                absent.add(item.resource)
                run.waiting.append(item)
                self._wanted += 1
        if run.stopped and not run.waiting:
            del self._runs[run.uid]
            if not any(one.announced for one in self._runs.values()):
                self._assets.close()
            if run.announced:
                yield SeriesEnd(self._source, run.uid)
            for other in list(self._runs.values()):
                yield from self._settle(other, now)

    def _offer(self, run: _Run, item: Frame | _Wanted, now: float) -> Iterator[Decoded | WireError]:
        """Give frames out, or keep them until they may or can be."""
        if run.announced:
            if isinstance(item, Frame):
                yield item
                return
            yield from self._frames(run, item, now)
            if not item.left:
                return
        run.waiting.append(item)
        if isinstance(item, Frame):
            self._held += item.nbytes
        else:
            self._wanted += 1
        if self._held > _HELD_BYTES or self._wanted > _WAITING:
            yield from self._settle(next((one for one in self._runs.values() if one.announced and one.waiting), run), math.inf)

    def _inform(self, run: _Run, record: Reading | Exposures) -> Iterator[Decoded]:
        if run.announced:
            yield record
        else:
            run.early.append(record)

    def _frames(self, run: _Run, wanted: _Wanted, now: float) -> Iterator[Frame | WireError]:
        """Read frames while they are there; those that cannot be had, or may be waited for no longer, are refused."""
        refused = 0
        while wanted.left:
            try:
                if wanted.stack is None:
                    self._find(wanted)
                assert wanted.stack is not None
                counts = _alike(run, _counts(self._assets.frame(wanted.stack, wanted.row)))
            except WireError as error:
                if isinstance(error, Awaited) and now < wanted.until:
                    return
                refused += 1
                many = wanted.left if wanted.stack is None or refused == _REFUSALS else 1
                what = f"frame {wanted.index} of run {run.uid!r}{f' and the {many - 1} after it' if many > 1 else ''}"
                record: Frame | WireError = WireError(error.reason, f"{what}: {error.detail}")
            else:
                many = 1
                record = Frame(self._source, run.uid, wanted.index, counts, wanted.received, wanted.time, wanted.position)
            wanted.index, wanted.row, wanted.left = wanted.index + many, wanted.row + many, wanted.left - many
            yield record

    def _find(self, wanted: _Wanted) -> None:
        """Where the frames lie; from now on `wanted` counts frames. Raises WireError; Awaited while a document is still to come."""
        found = self._datums.get(wanted.datum) if wanted.datum else (wanted.resource, {})
        if found is None:
            raise Awaited("bad_document", f"its datum {wanted.datum!r} never came")
        resource = self._resources.get(found[0])
        if resource is None:
            raise Awaited("bad_document", f"its resource {found[0]!r} never came")
        try:
            stack, row = resource_stack(resource, found[1], wanted.shape) if wanted.datum else (stream_stack(resource, wanted.shape), 0)
        except WireError:
            raise
        except _MALFORMED as error:
            raise WireError("bad_document", f"its resource {found[0]!r}: {_said(error)}") from None
        many = stack.per_event
        if (wanted.index + wanted.left) * many > MAX_INDEX:
            raise WireError("bad_index", f"a run holds at most {MAX_INDEX} frames")
        wanted.resource, wanted.stack = found[0], stack
        wanted.index, wanted.row, wanted.left = wanted.index * many, wanted.row * many + row, wanted.left * many

    def _resource(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        if self._pixels:
            size = len(repr(doc))
            if size > _METADATA_BYTES:
                raise WireError("bad_document", f"a resource document of {size} characters")
            self._resources.put(_uid(doc, "uid"), doc, size + 1000)
        yield from ()

    def _datum(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        self._know(doc["datum_id"], doc["resource"], doc.get("datum_kwargs") or {})
        yield from ()

    def _datum_page(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        columns = doc.get("datum_kwargs") or {}
        for i, name in enumerate(doc["datum_id"]):
            self._know(name, doc["resource"], {key: column[i] for key, column in columns.items()})
        yield from ()

    def _bulk_datum(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        for name, kwargs in zip(doc["datum_ids"], doc["datum_kwarg_list"], strict=True):
            self._know(name, doc["resource"], kwargs)
        yield from ()

    def _know(self, name: Any, resource: Any, kwargs: Mapping[str, Any]) -> None:
        if not self._pixels:
            return
        size = len(repr(kwargs))
        if not isinstance(name, str) or not isinstance(resource, str) or not isinstance(kwargs, Mapping) or size + len(name) > 10_000:
            raise WireError("bad_document", f"a datum {shown(name)} of resource {shown(resource)}")
        self._datums.put(name, (resource, kwargs), size + len(name) + 200)

    def _stream_datum(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        uid = _uid(doc, "stream_resource")
        stream, run = self._known(doc)
        resource = self._resources.get(uid)
        if not stream.image or (resource is not None and resource.get("data_key", run.image) != run.image):
            return
        (start, stop), (number, beyond) = _range(doc["indices"]), _range(doc["seq_nums"])
        if stop == start:
            return
        first, row = _counted_on(run, uid, start, stop)
        wanted = _Wanted(uid, "", stream.shape, first, row, stop - start, received + self._documents.flush_s, received)
        yield from self._refer(run, wanted, number - 1, beyond - number)

    def _refer(self, run: _Run, wanted: _Wanted, number: int, readings: int) -> Iterator[Decoded | WireError]:
        """Say which readings frames belong to, then the frames."""
        if wanted.index + wanted.left > MAX_INDEX:
            raise WireError("bad_index", f"events up to {wanted.index + wanted.left}; a run holds at most {MAX_INDEX} frames")
        many = run.per_event
        first, frames = wanted.index * many, wanted.left * many
        if self._pixels:
            try:
                self._find(wanted)
                first, frames = wanted.index, wanted.left
            except Awaited:
                pass  # documents may be late, too
        # Where nothing else is said, frame i belongs to reading i.
        if number >= 0 and readings > 0 and (not wanted.datum or frames > 1):
            yield from self._inform(run, Exposures(self._source, run.uid, first, frames, number, readings))
        if self._pixels:
            yield from self._offer(run, wanted, wanted.received)

    def _event(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        stream, run = self._known(doc)
        number, data, stamps = doc["seq_num"], doc["data"], doc.get("timestamps") or {}
        if not is_count(number) or not 0 < number <= MAX_INDEX:
            raise WireError("bad_index", f"an event whose seq_num is {shown(number)}; expected an integer from 1 to {MAX_INDEX}")
        position = self._position(run, stream, data)
        if position is not None and self._is_point(run, stream):
            times = [_real(stamps.get(key)) for key in (self._positions.x, self._positions.y) if key in data]
            time = max((one for one in times if one is not None), default=_real(doc.get("time")))
            yield from self._inform(run, Reading(self._source, run.uid, number - 1, received if time is None else time, position))
        if not stream.image or run.image not in data:
            return
        value, time = data[run.image], _real(stamps.get(run.image, doc.get("time")))
        if isinstance(value, str) or not self._pixels:
            until = received + self._documents.flush_s
            datum = value if isinstance(value, str) else "-"
            wanted = _Wanted(datum, datum, stream.shape, number - 1, 0, 1, until, received, time, position)
            yield from self._refer(run, wanted, number - 1, 1)
            return
        frames = _inline(value, stream.dtype, self._max_message_bytes)
        if len(frames) != run.per_event:
            raise WireError("wrong_shape", f"{len(frames)} frames in an event whose descriptor has {run.per_event}")
        first = (number - 1) * len(frames)
        if first + len(frames) > MAX_INDEX:
            raise WireError("bad_index", f"a run holds at most {MAX_INDEX} frames")
        if len(frames) > 1:
            yield from self._inform(run, Exposures(self._source, run.uid, first, len(frames), number - 1, 1))
        for k, counts in enumerate(frames):
            yield from self._offer(run, Frame(self._source, run.uid, first + k, _alike(run, counts), received, time, position), received)

    def _event_page(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        """Events whose fields are columns; one of them that is wrong does not take the others with it."""
        data, stamps, times = doc["data"], doc.get("timestamps") or {}, doc.get("time") or []
        for i, number in enumerate(doc["seq_num"]):
            event = {
                "descriptor": doc["descriptor"],
                "seq_num": number,
                "time": times[i] if i < len(times) else None,
                "data": {key: column[i] for key, column in data.items()},
                "timestamps": {key: column[i] for key, column in stamps.items()},
            }
            yield from self._one_of_many(event, received)

    def _bulk_events(self, doc: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        for events in doc.values():
            for event in events:
                yield from self._one_of_many(event, received)

    def _one_of_many(self, event: Mapping[str, Any], received: float) -> Iterator[Decoded | WireError]:
        try:
            yield from self._event(event, received)
        except WireError as error:
            yield error

    def _known(self, doc: Mapping[str, Any]) -> tuple[_Stream, _Run]:
        """The stream and the run that a document belongs to."""
        stream = self._streams.get(uid := _uid(doc, "descriptor"))
        if stream is None:
            raise WireError("bad_document", f"its descriptor {uid!r} never came")
        run = self._runs.get(stream.run)
        if run is None:
            raise WireError("bad_document", f"its run {stream.run!r} is over")
        return stream, run

    def _position(self, run: _Run, stream: _Stream, data: Mapping[str, Any]) -> tuple[float, float] | None:
        """(x, y) in metres. Motors that are monitored come one by one: joined by time, the other one stands where it last was."""
        keys = (self._positions.x, self._positions.y)
        due = [axis for axis, key in enumerate(keys) if key is not None]
        fresh = 0
        for axis in due:
            value, metres = _real(data.get(keys[axis] or "")), stream.metres[axis]
            if value is not None and metres is not None:
                run.axes[axis] = value * metres
                fresh += 1
        enough = fresh == len(due) if self._positions.join == "number" else fresh and all(axis in run.axes for axis in due)
        return (run.axes[0], run.axes.get(1, 0.0)) if enough and 0 in run.axes else None

    def _is_point(self, run: _Run, stream: _Stream) -> bool:
        """Events are numbered within their stream: joined by number, those of one stream are the points of the scan."""
        if self._positions.join == "time":
            return True
        if stream.name != _BASELINE and not run.motors:
            run.motors = stream.name
        return stream.name == run.motors


class _Newest(Generic[T]):
    """What documents have told, by uid: the newest of it, up to `_REMEMBERED_BYTES`."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self._bytes = 0

    def put(self, uid: str, value: T, nbytes: int) -> None:
        self._bytes += nbytes - self._found.pop(uid, (value, 0))[1]
        self._found[uid] = value, nbytes
        while self._bytes > _REMEMBERED_BYTES:
            self._bytes -= self._found.popitem(last=False)[1][1]

    def get(self, uid: str) -> T | None:
        return self._found.get(uid, (None, 0))[0]


def _counted_on(run: _Run, uid: str, start: int, stop: int) -> tuple[int, int]:
    """First event of the run, and first row of its file, for rows from `start` of a stream_resource.

    A scan may go on in a second file. Some writers count their rows on from the first one's, others from 0 again.
    """
    if uid not in run.offsets:
        if len(run.offsets) >= 10_000:
            raise WireError("bad_document", f"run {run.uid!r} has its frames in more than 10,000 resources")
        run.offsets[uid] = (0, -run.done) if start >= run.done else (run.done, 0)
    later, earlier = run.offsets[uid]
    run.done = max(run.done, later + stop)
    return later + start, max(0, earlier + start)


def _once(run: _Run, what: str, text: str) -> Iterator[WireError]:
    """A complaint that holds for the whole run is made once."""
    if what not in run.told:
        run.told.add(what)
        yield WireError("bad_document", f"run {run.uid!r}: {text}")


def _alike(run: _Run, counts: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Shape and dtype may not change within a run: the first frame says what they are."""
    shape, dtype = run.like = run.like or (counts.shape, counts.dtype)
    if counts.shape != shape:
        raise WireError("wrong_shape", f"a frame of {counts.shape} in a run of {shape}")
    if counts.dtype != dtype:
        raise WireError("wrong_dtype", f"a frame of {counts.dtype} in a run of {dtype}")
    return counts


def _inline(value: Any, dtype: str, most_bytes: int) -> npt.NDArray[Any]:
    """The frames of an event's field, (N, rows, columns). Lists (JSON) have the dtype that the descriptor says."""
    if not isinstance(value, np.ndarray | list | tuple):
        raise WireError("wrong_type", f"the image of an event is {shown(value)}")
    array = np.asarray(value)
    if array.nbytes > most_bytes:
        raise WireError("too_large", f"{array.nbytes} bytes of pixels in an event, the limit is {most_bytes}")
    if array.ndim < 2 or not array.size:
        raise WireError("wrong_shape", f"the image of an event has shape {array.shape}")
    if not isinstance(value, np.ndarray) and array.dtype.kind in "iu":
        array = array.astype(_told_dtype(array, dtype))
    return _counts(array).reshape(-1, *array.shape[-2:])


def _told_dtype(array: npt.NDArray[Any], dtype: str) -> np.dtype[Any]:
    """What whole numbers of a list become: the descriptor's type, where it is one that can hold them."""
    low, high = int(array.min()), int(array.max())
    for code in (dtype, "<u4", "<i8"):
        if code in _WHOLE and np.iinfo(code).min <= low and high <= np.iinfo(code).max:
            return np.dtype(code)
    return np.dtype(np.float32)


_WHOLE = {f"{order}{kind}{size}" for order in "<>|=" for kind in "ui" for size in "1248"} - {">u1", ">i1"} | {"u1", "u2", "u4", "u8"}


def _counts(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pixels in a type that the stages take: whole numbers as they are, real ones as float32, this machine's byte order."""
    if array.dtype.kind not in "uifb":
        raise WireError("wrong_dtype", f"pixels of type {cut(str(array.dtype))}; photons are integers or real numbers")
    if array.dtype.kind in "fb":
        with np.errstate(over="ignore"):  # too large for float32 is infinite: not measured
            return array.astype(np.float32 if array.dtype.kind == "f" else np.uint8, copy=False)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _metadata(start: Mapping[str, Any]) -> dict[str, Any]:
    """A start document as JSON types."""
    told = plain(start)
    if len(str(told)) > _METADATA_BYTES:
        told = {
            key: cut(str(told[key])) if isinstance(told[key], str) else told[key]
            for key in ("uid", "scan_id", "time", "plan_name")
            if isinstance(told.get(key), str | int | float)
        }
    return {"start": told}


def _uid(doc: Mapping[str, Any], key: str) -> str:
    uid = doc.get(key)
    if not isinstance(uid, str) or not 0 < len(uid) <= 200 or "\0" in uid:
        raise WireError("bad_document", f"a document whose {key} is {shown(uid)}")
    return uid


def _range(told: Mapping[str, Any]) -> tuple[int, int]:
    start, stop = told["start"], told["stop"]
    if not is_count(start) or not is_count(stop) or not start <= stop < 2**40:
        raise WireError("bad_document", f"a range from {shown(start)} to {shown(stop)}")
    return start, stop


def _shape(told: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a data key; empty where it is no shape of frames."""
    shape = told.get("shape")
    fits = isinstance(shape, list | tuple) and 2 <= len(shape) <= 8 and all(is_count(one) and 0 < one <= 1_000_000 for one in shape)
    # Extents between the first and the last two are colours or energies.
    return tuple(shape) if fits and shape is not None and all(one == 1 for one in shape[1:-2]) else ()


def _is_image(told: Mapping[str, Any]) -> bool:
    shape = _shape(told)
    return len(shape) > 1 and shape[-2] > 1 and shape[-1] > 1


def _real(value: Any) -> float | None:
    """A finite number, also as NumPy and single-element arrays have it."""
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    elif isinstance(value, list | tuple) and len(value) == 1:
        (value,) = value
    if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {cut(ascii(str(error)))}"
