"""Every wire, framing and encoding with every fault, each a cell: a series with the fault and a clean one behind it, through the real path.

Good frames come out with the pixels that were sent, the others are quarantined for the reason that the twin's table says, the ledger
balances, and the clean series is whole.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from streamprior_sim.emit import Message, stream, zmq_sender
from streamprior_sim.faults import KINDS, Cell, Trouble, table
from streamprior_sim.wires import Wire as Spoken

from streamprior.config import DocumentsSettings, PositionSettings, SourceSettings
from streamprior.crew import ThreadCrew
from streamprior.join import Joiner
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.outbox import Outbox
from streamprior.pipeline import Pipeline, Wire
from streamprior.records import Detector, Positions
from streamprior.runs import Runs
from streamprior.seams import Decoder, Source
from streamprior.sources.documents import DocumentsDecoder
from streamprior.sources.zmq import ZmqPull
from streamprior.stages.prepare import check_shape
from streamprior.wire.dectris_v1 import StreamV1Decoder
from streamprior.wire.dectris_v2 import StreamV2Decoder
from tests.builders import NAMES, diffraction, make_recipe, small_prior
from tests.test_path import Kept

FRAMES, SHAPE = 8, (16, 16)
LIMIT = 20_000
CLEAN = 7
"""Number of the clean series; the one before it is 1, or 2 where it changes."""

PRIOR = small_prior(SHAPE)
RECIPE = make_recipe(PRIOR, iterations=1)
CELLS = table(FRAMES)


class Exposed:
    """A recording of different frames along a line."""

    def __init__(self, seed: int) -> None:
        self.name = f"exposed-{seed}"
        self.counts = diffraction(SHAPE, FRAMES, seed)

    def __len__(self) -> int:
        return FRAMES

    def frame(self, index: int) -> np.ndarray:
        return self.counts[index]

    def position(self, index: int) -> tuple[float, float]:
        return index * 1e-6, 1e-6

    def origin(self, index: int) -> int:
        return index

    def detector(self) -> Detector:
        return Detector(shape=SHAPE, mask=np.zeros(SHAPE, bool), beam_centre=(8, 8))


FIRST, SECOND = Exposed(1), Exposed(2)


class Located(Kept):
    """A sink that also keeps the positions that come after their frames."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[tuple[str, int], tuple[float, float]] = {}

    def note(self, item: Any) -> None:
        if isinstance(item, Positions):
            self.places |= {(item.run, index): place for index, place in item.positions.items()}


class Waiting:
    """A source of messages that are all there."""

    name = "eiger"

    def __init__(self, messages: Iterable[Message]) -> None:
        self._messages = deque(messages)
        self.exhausted = False

    def open(self) -> None: ...

    def receive(self, timeout_s: float) -> Message | None:
        message = self._messages.popleft() if self._messages else None
        self.exhausted = not self._messages
        return message

    def close(self) -> None: ...


class Counted:
    """A socket with nothing more to give after so many messages."""

    def __init__(self, socket: ZmqPull, messages: int) -> None:
        self.name = socket.name
        self._socket = socket
        self._left = messages
        self.exhausted = False

    def open(self) -> None: ...

    def receive(self, timeout_s: float) -> Message | None:
        message = self._socket.receive(10)
        assert message is not None, f"{self._left} messages never came"
        self._left -= 1
        self.exhausted = not self._left
        return message

    def close(self) -> None:
        self._socket.close()


def decoder_of(spoken: Spoken) -> Decoder:
    if spoken.kind == "documents":
        return DocumentsDecoder("eiger", DocumentsSettings(), PositionSettings(x="x", y="y"), True, LIMIT)
    return (StreamV2Decoder if spoken.kind == "dectris-v2" else StreamV1Decoder)("eiger", max_message_bytes=LIMIT)


class House:
    """The path with real stages, walked room by room; `admitted` are the counts that the stages get."""

    def __init__(self, source: Source, spoken: Spoken) -> None:
        self.archive = Located()
        self.ledger = Ledger([self.archive.name])
        self.admitted: list[bytes] = []
        self.quarantined: list[str] = []
        meters = Meters("eiger", RECIPE.stage_names, [self.archive.name], NAMES, RECIPE.signals)
        self.path = Pipeline(
            Wire(source, decoder_of(spoken)),
            Joiner(PositionSettings(), separate=False),
            Runs(self.ledger.distinct, late_s=60, idle_s=60),
            ThreadCrew(RECIPE.stages, PRIOR, 1, 16, 1.0, 2**24, meters.stage),
            RECIPE.watches(),
            [Outbox(self.archive, 2**24, self.ledger, meters)],
            self.ledger,
            meters,
            2**24,
            admit=self._admit,
            keep=lambda message, error: self.quarantined.append(error.reason),
        )

    def _admit(self, counts: np.ndarray) -> None:
        check_shape(counts, PRIOR.geometry)
        self.admitted.append(counts.tobytes())

    def run(self) -> House:
        for step in self.path.rooms().values():
            while step():
                pass
        return self


def name_of(cell: Cell) -> str:
    wire = cell.wire
    framing = (wire.framing,) if wire.kind == "dectris-v1" else ()
    return "-".join((wire.kind, *framing, wire.encoding, cell.fault or "clean"))


def two_series(cell: Cell) -> list[Message]:
    trouble = Trouble(cell.faults, seed=1, oversized_bytes=LIMIT + 1)
    rough = stream(FIRST, None, wire=cell.wire, trouble=trouble, unique_id="S1")
    return [*rough, *stream(SECOND, None, wire=cell.wire, unique_id="S7", series=CLEAN)]


def check(house: House, cell: Cell) -> None:
    told = cell.forecast
    right = {FIRST.counts[number].tobytes() for number in told.published if number not in told.altered}
    clean = {counts.tobytes() for counts in SECOND.counts}
    came = Counter(house.admitted)
    assert set(came.values()) == {1}, "no frame is processed twice"
    assert right | clean <= set(came)
    assert len(came) == len(told.published) + FRAMES
    assert Counter(house.quarantined) == told.quarantined

    last, *before = house.ledger.runs()
    assert house.ledger.is_balanced()
    assert all(account["balanced"] for account in (last, *before))
    assert sum(account["published"] for account in before) == len(told.published)
    assert sum(account["missing"] for account in before) == told.missing
    assert sum(account["received"] for account in before) == told.received
    dropped = {"decode/duplicate": told.duplicates} if told.duplicates else {}
    assert sum((Counter(account["dropped"]) for account in before), Counter()) == dropped
    announced = cell.wire.announces
    assert before[-1]["expected"] == told.expected

    assert (last["published"], last["received"], last["missing"]) == (FRAMES, FRAMES, 0), "the next series is as if nothing had been"
    assert (last["quarantined"], last["dropped"], last["expected"]) == ({}, {}, FRAMES if announced else None)
    assert last["reason"] == "end"
    located = house.archive.places | {(one.run, one.index): one.position for one in house.archive.results if one.position is not None}
    assert len(located) == len(told.positions) + (FRAMES if cell.wire.annotates else 0)


@pytest.mark.parametrize("cell", CELLS, ids=name_of)
def test_good_frames_are_published_and_bad_ones_quarantined_whatever_the_wire(cell: Cell) -> None:
    check(House(Waiting(two_series(cell)), cell.wire).run(), cell)


ON_SOCKETS = [cell for cell in CELLS if cell.wire.encoding == "bslz4" and (cell.wire.kind == "dectris-v2" or cell.wire.framing == "parts")]


@pytest.mark.parametrize("cell", ON_SOCKETS, ids=name_of)
def test_the_same_holds_over_real_sockets(cell: Cell) -> None:
    socket = ZmqPull(SourceSettings(address="tcp://127.0.0.1:*", name="eiger"))
    socket.open()
    messages = two_series(cell)
    with zmq_sender(socket.address) as sender:
        for message in messages:  # fewer than the two sockets hold
            sender.send(message)
        check(House(Counted(socket, len(messages)), cell.wire).run(), cell)


@pytest.mark.parametrize("detail", ["all", "basic", "none"])
@pytest.mark.parametrize("framing", ["multipart", "split_header", "parts"])
def test_a_header_says_as_much_as_it_is_told_to(framing: Any, detail: Any) -> None:
    wire = Spoken(kind="dectris-v1", framing=framing, header_detail=detail)
    house = House(Waiting(stream(FIRST, None, wire=wire)), wire).run()
    (account,) = house.ledger.runs()
    assert (account["published"], account["quarantined"], account["reason"]) == (FRAMES, {}, "end")
    assert account["expected"] == (None if detail == "none" else FRAMES)


def test_the_table_has_every_fault_of_every_wire() -> None:
    rows: Sequence[Cell] = CELLS
    for wire in ("dectris-v1", "dectris-v2", "documents"):
        faults = {cell.fault for cell in rows if cell.wire.kind == wire}
        assert faults == {None, *(kind for kind, one in KINDS.items() if wire in one.reasons)}
    assert len({name_of(cell) for cell in rows}) == len(rows) == 3 * 25 + 12 * 30 + 18
