"""The Protocols: what a source, a stage, a recipe and a sink must offer to stand in the path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.records import (
    Batch,
    Exposures,
    Frame,
    MosaicImage,
    Positions,
    Reading,
    Result,
    RunEnded,
    RunStarted,
    SeriesEnd,
    SeriesStart,
)

Decoded = SeriesStart | Frame | Positions | Reading | Exposures | SeriesEnd
Parts = tuple[bytes, ...]
"""A ZMQ message of several parts."""
Document = tuple[str, Mapping[str, Any]]
"""(name, document) of Bluesky's event model, from a RunEngine in this process or from a file."""
Message = bytes | Parts | Document | Decoded
"""What a source hands over: bytes off a wire, documents, or records where there is nothing to decode (files)."""
PathItem = RunStarted | Result | Positions | MosaicImage | RunEnded


def document_nbytes(document: Mapping[str, Any]) -> int:
    """What a document takes in memory, roughly: the arrays in it, and some for all the rest."""
    data = document.get("data")
    return 2000 + sum(getattr(value, "nbytes", 0) for value in data.values()) if isinstance(data, Mapping) else 2000


class Source(Protocol):
    """Where raw messages come from. It owns a socket (or a file) and never decodes."""

    name: str

    @property
    def exhausted(self) -> bool:
        """True once nothing more can come: a file has an end, a socket has none."""

    def open(self) -> None:
        """Bind or connect. Raises ConfigError where the operator must act (port taken, no such file)."""

    def receive(self, timeout_s: float) -> Message | None:
        """The next raw message, or None when none came within `timeout_s`."""

    def close(self) -> None:
        """Leave the socket; what was not received stays with the sender."""


class Decoder(Protocol):
    """Raw messages -> records. What the sender got wrong is a WireError, and nothing else ever is.

    A message may hold no record (a part of a frame) or many (a reference to a file of frames): those are read one by one as they are
    asked for, so that the pressure of the path reaches the file. A WireError among the records stands for what could not be had; one that
    is raised refuses the message as a whole.
    """

    def decode(self, message: Message, received: float) -> Iterable[Decoded | WireError]: ...

    def due(self, now: float) -> Iterable[Decoded | WireError]:
        """What was held back (for a part that may follow, for a file that is not flushed yet) and is ready, or may wait no longer, at
        `now`, Unix seconds; infinity: everything. Called some ten times a second."""

    def expendable(self, message: Message) -> bool:
        """Whether a message is surely one image and nothing else, without decoding it: all that a full queue may leave out. A run without
        its start has no mask, one without its end stays open."""


class Stage(Protocol):
    """One step of thinking: reads what earlier stages left in the batch and returns a copy with its part filled in.

    It may raise MemoryError, and DeviceLost where it computes on a card; the frames are then computed again, by stages that are made anew.
    Whatever else it raises is our own fault.
    """

    name: str

    def __call__(self, batch: Batch) -> Batch: ...


class Watch(Protocol):
    """A stage that must see a run's results in order (drift): it runs after the sequencer, and gives back what it was given, completed."""

    name: str

    def begin(self, run: RunStarted) -> None: ...

    def __call__(self, results: Sequence[Result]) -> list[Result]: ...


class Sink(Protocol):
    """Where results leave. A sink thread calls these in order: open, then for each run begin, write..., end; at last close.

    `complete` sinks account for every frame and must have it safe when `write` returns; others show the newest only.
    Every call may raise SinkUnavailable and is then repeated, so a write of the same index twice must be harmless.
    """

    name: str
    complete: bool

    def open(self) -> None: ...

    def begin(self, run: RunStarted) -> None: ...

    def write(self, results: Sequence[Result]) -> None: ...

    def note(self, item: Positions | MosaicImage) -> None:
        """What else comes by: most sinks have no use for one or the other. An image of a run may come after the run has ended."""

    def end(self, run: RunEnded) -> None: ...

    def close(self) -> None: ...


StageFactory = Callable[[], Sequence[Stage]]
"""Makes a fresh set of composed stages: one set a worker, because stages own buffers and FFT plans."""

LeftOut = Callable[[str, int, str, str], None]
"""(uid of the run, frame index, stage, reason) of a frame that cannot be computed."""

Admit = Callable[[npt.NDArray[Any]], None]
"""Looks at a frame's counts before it joins a batch; raises WireError where the stages could not process it."""

Keep = Callable[[Message, WireError], None]
"""Puts a quarantined message where a person can look at it."""

Timing = Callable[[str, float], None]
"""(stage, seconds a frame): called once a batch and stage."""
