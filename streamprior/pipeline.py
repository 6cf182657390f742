"""The bounded path on one screen: socket -> receive -> decode -> crew (prepare ... refine) -> drift -> one outbox a sink.

Every room is a `step()` that takes from the mailbox before it and puts into the one behind it; it answers False once the room before
it has left and nothing is left to take. Shutdown is therefore no second path: the source closes, and the rooms empty in order.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice

import structlog

from streamprior.crew import Job, ThreadCrew
from streamprior.errors import WireError
from streamprior.join import Joiner
from streamprior.ladder import Ladder
from streamprior.ledger import Ledger
from streamprior.mailbox import BEAT_S, Mailbox, Policy
from streamprior.metrics import Meters
from streamprior.outbox import Outbox
from streamprior.records import Frame, Positions, Result, RunEnded, RunStarted, SeriesEnd, SeriesStart
from streamprior.runs import LateFrame, Runs
from streamprior.seams import Admit, Decoded, Decoder, Keep, Message, PathItem, Source, Watch, document_nbytes
from streamprior.spool import Spool, Spooled

log = structlog.get_logger(__name__)

_GRACE_S = 0.5
"""How long a stop goes on taking what the socket holds."""

_MOST = 256
"""Items that a room takes at once: waking the next room for each of them costs more than what is done to it."""

_GATHER_S = 0.003
"""How long messages, and decoded frames, gather before they go on; large ones, which take longer each, go on one by one."""

_DRAIN_BYTES = 2**20
"""Of messages that gather: they are not yet in a mailbox, whose budget bounds them."""


@dataclass(frozen=True, slots=True)
class Wire:
    """A source with the decoder of what it hands over."""

    source: Source
    decoder: Decoder


@dataclass(slots=True)
class Received:
    """A raw message, when it left the socket (Unix seconds) and the wire that it came over.

    heard : that moment by a clock that nobody sets, which waits go by. number : the spool's, which it gets last. again : an earlier process
    received it, whose restart reads it again. counted : and had decoded it.
    """

    message: Message
    at: float
    wire: Wire
    number: int = 0
    again: bool = False
    counted: bool = False
    heard: float = field(default_factory=time.monotonic)

    @property
    def nbytes(self) -> int:
        if isinstance(self.message, bytes):
            return len(self.message)
        if isinstance(self.message, tuple):
            return sum(document_nbytes(part) if isinstance(part, Mapping) else len(part) for part in self.message)
        return self.message.nbytes


class Pipeline:
    """Carries frames from a source to the sinks in threads of its own, and knows when it is empty.

    Parameters
    ----------
    frames : the wire that frames come over; runs open and close by it, and the path ends with it.
    joiner : gives frames their positions. readings : the wire that positions come over where it is another one.
    admit : called with each frame's counts before it joins a batch; raises WireError where it cannot be processed.
    keep : called with each message that is quarantined and the reason (a bounded folder on disk).
    ladder : says what is left out while the path is behind.
    spool : what a restart needs is written there; None where the source can be read again, or its messages cannot be kept.
    """

    def __init__(
        self,
        frames: Wire,
        joiner: Joiner,
        runs: Runs,
        crew: ThreadCrew,
        watches: Sequence[Watch],
        outboxes: Sequence[Outbox],
        ledger: Ledger,
        meters: Meters,
        receive_bytes: int,
        receive_policy: Policy = "block",
        admit: Admit = lambda counts: None,
        keep: Keep = lambda message, error: None,
        readings: Wire | None = None,
        ladder: Ladder | None = None,
        spool: Spool | None = None,
    ) -> None:
        self._spool = spool
        self._recovered: Iterator[Spooled] = iter(())
        self._recovering = threading.Event()  # set while a restart reads again what an earlier process received
        self._recovered_at = -math.inf  # when the last of that was received first
        self._item: Received | None = None  # in the decoder's hands
        self._ladder = ladder or Ladder("nothing", math.inf, math.inf)
        self._frames, self._readings, self._joiner, self._runs, self._crew = frames, readings, joiner, runs, crew
        self._watches, self._outboxes, self._ledger, self._meters = watches, outboxes, ledger, meters
        self._admit, self._keep = admit, keep
        self._policy = receive_policy
        self.received: Mailbox[Received] = Mailbox(
            receive_bytes,
            receive_policy,
            dropped=self._unheard,
            droppable=lambda item: not item.again and item.wire.decoder.expendable(item.message),
        )
        self._receiving = 1 if readings is None else 2
        self._ticket = 0
        self._entered: list[Job] = []  # frames that are about to go to the crew
        self._lost_of = ""  # series of which it was said that positions came too late
        self._stopping = threading.Event()
        self._stopped_at = 0.0
        self.ended = threading.Event()
        self.failure: BaseException | None = None
        self.started = False
        self._threads: list[threading.Thread] = []
        self._inhabited = 0
        self._began: dict[str, float] = {}  # when each room's step began that it is in
        self._leaving = threading.Lock()

    def rooms(self) -> dict[str, Callable[[], bool]]:
        """Every room's step, in the order of the path; tests call them by hand, `start` gives each a thread."""
        return (
            {"receive": partial(self.receive, self._frames)}
            | ({} if self._readings is None else {"receive-readings": partial(self.receive, self._readings)})
            | {"decode": self.decode}
            | {f"compute-{n}": step for n, step in enumerate(self._crew.workers)}
            | {"sequence": self.sequence}
            | {f"publish-{outbox.sink.name}": outbox.step for outbox in self._outboxes}
        )

    def start(self) -> None:
        for name, step in self.rooms().items():
            self._threads.append(threading.Thread(target=self._inhabit, args=(name, step), name=name, daemon=True))
        self._inhabited = len(self._threads)
        self.started = True
        for thread in self._threads:
            thread.start()

    def go_on(self, recovered: Iterator[Spooled], interrupted: Sequence[RunStarted]) -> None:
        """Before `start`: what an earlier process received comes first, and the runs that it left open go on."""
        self._recovered = recovered
        self._recovering.set()
        self._runs.resume(interrupted)

    @property
    def stopping(self) -> bool:
        """Somebody has asked the path to end."""
        return self._stopping.is_set()

    def stop(self) -> None:
        """Stop receiving; what was received goes on to the sinks."""
        self._stopped_at = time.monotonic()
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for every room to be empty; False when `timeout_s` was not enough."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def stalled(self, after_s: float) -> str:
        """The room that holds the path up: the last on a frame's way whose step takes longer than `after_s`; "" where all move.

        A step waits a tenth of a second for something to do, and for room behind it. While the disk is away all may wait: that is said
        elsewhere, and would be no better after a restart. A live sink holds nobody up.
        """
        complete = [outbox for outbox in self._outboxes if outbox.sink.complete]
        if any(not outbox.up for outbox in complete):
            return ""
        now, aside = time.monotonic(), {f"publish-{outbox.sink.name}" for outbox in self._outboxes if outbox not in complete}
        stuck = [name for name in self.rooms() if name not in aside and now - self._began.get(name, now) > after_s]
        return stuck[-1] if stuck else ""

    def abandon(self) -> None:
        """The time to drain is over: empty every queue. Once the rooms are empty, `Ledger.write_off` counts what was inside."""
        self.stop()
        self.received.abort()
        self._crew.abort()
        for outbox in self._outboxes:
            outbox.give_up()

    def receive(self, wire: Wire) -> bool:
        """Socket -> mailbox. Only drains, stamps and hands over: nothing is decoded here."""
        source = wire.source
        if self._recovering.is_set():
            return self._receive_again(wire)
        stopping = self._stopping.is_set()
        drained: list[Received] = []
        try:
            self._drain(wire, drained, 0 if stopping else BEAT_S)
        finally:  # what came before a source failed has been accepted
            self._keep_safe(wire, drained)
            self.received.put_all(drained)
        # On a stop, what the socket already holds still counts as accepted; a sender that goes on for ever does not.
        over = source.exhausted or (stopping and (not drained or time.monotonic() > self._stopped_at + _GRACE_S))
        if over:
            source.close()
            if wire is self._frames and self._receiving > 1:
                self.stop()  # readings alone are of no use
            with self._leaving:
                self._receiving -= 1
                last = not self._receiving
            if last:
                self.received.close()
        return not over

    def _receive_again(self, wire: Wire) -> bool:
        """Spool -> mailbox; the sockets wait meanwhile, so that everything comes in the order that it was received."""
        if wire is not self._frames:
            time.sleep(BEAT_S)
            return True
        again: list[Received] = []
        found = [*islice(self._recovered, _MOST)]
        for one in found:
            of = self._readings if one.wire else self._frames
            if of is not None:
                heard = time.monotonic() - (time.time() - one.at)
                again.append(Received(one.message, one.at, of, one.number, again=True, counted=one.decoded, heard=heard))
                self._recovered_at = max(self._recovered_at, one.at)
        self.received.put_all(again)
        if len(found) < _MOST:
            self._recovering.clear()
        return True

    def _keep_safe(self, wire: Wire, drained: Sequence[Received]) -> None:
        """Messages into the spool, which numbers them."""
        if self._spool is None or not drained:
            return
        expendable = wire.decoder.expendable
        first = self._spool.keep(int(wire is not self._frames), [(one.message, one.at, expendable(one.message)) for one in drained])
        for number, one in enumerate(drained, first):
            one.number = number

    def _drain(self, wire: Wire, drained: list[Received], timeout_s: float) -> None:
        """The next message, and those that are there already."""
        message = wire.source.receive(timeout_s)
        until, room = time.monotonic() + _GATHER_S, _DRAIN_BYTES
        while message is not None:
            drained.append(Received(message, time.time(), wire))
            room -= drained[-1].nbytes
            if len(drained) == _MOST or room < 0 or time.monotonic() > until or wire.source.exhausted:
                return
            message = wire.source.receive(0)

    def decode(self) -> bool:
        """Raw messages -> jobs for the crew; runs open and close here."""
        batch = self.received.take(_MOST, timeout_s=BEAT_S)
        if batch is None:
            self._release(math.inf, math.inf)
            self._turn(self._runs.shutdown())
            self._submit()
            self._crew.close()
            return False
        self._ladder.observe(time.monotonic() - batch[0].heard if batch and not batch[0].again else 0.0)
        self.received.policy = "drop_newest" if self._ladder.rung.drop else self._policy
        for item in batch:
            self._decode_one(item)
        # While the path is behind, the position that a frame waits for may have been received and be waiting here as well.
        newest = batch[-1] if batch and len(self.received) else None
        now, heard = (newest.at, newest.heard) if newest is not None else (time.time(), time.monotonic())
        self._release(now, heard)
        self._turn(self._runs.tick())
        if self._spool is not None:
            self._spool.tidy(heard)
        self._submit()
        return True

    def _decode_one(self, item: Received) -> None:
        self._item = item
        try:
            for record in item.wire.decoder.decode(item.message, item.at):
                if not self._is_repetition(item, record):
                    self._take(item.wire, record, item.message, item.heard)
        except WireError as error:
            self._refuse(item.wire, item.message, error)
        if self._spool is not None:
            self._spool.decoded(int(item.wire is not self._frames), item.number)

    def _is_repetition(self, item: Received, record: Decoded | WireError) -> bool:
        """Whether a start message is read again that had opened no run, as its run was open. The spool hears of all that begin a series."""
        if self._spool is None or item.wire is not self._frames or not isinstance(record, SeriesStart | Frame):
            return False
        starts = isinstance(record, SeriesStart)
        if starts and item.counted and not self._spool.opened_by(item.number):
            return True
        self._spool.seen(record.series, item.number, starts)
        return False

    def _release(self, now: float, heard: float) -> None:
        """What decoders (by `now`, Unix seconds) and joiner (by `heard`, a clock that nobody sets) held back and may hold no longer;
        infinity: everything."""
        for wire in (self._frames, *([self._readings] if self._readings is not None else [])):
            for record in wire.decoder.due(now):
                self._take(wire, record, record if not isinstance(record, WireError) else b"", heard)
        for record in self._joiner.due(heard):
            self._hear(record, record)

    def _take(self, wire: Wire, record: Decoded | WireError, message: Message, heard: float) -> None:
        """A decoded record to the joiner, and what that lets go on."""
        if isinstance(record, WireError):
            self._refuse(wire, message, record)
            return
        joined = self._joiner.of_frames(record, heard) if wire is self._frames else self._joiner.of_scan(record, heard)
        for one in joined:
            self._hear(one, message if one is record else one)

    def _hear(self, record: Decoded, message: Message) -> None:
        if isinstance(record, SeriesStart):
            self._turn(self._runs.start(record, again=self._item is not None and self._item.counted))
        elif isinstance(record, SeriesEnd):
            self._locate(Positions(record.source, record.series, record.late))
            self._turn(self._runs.end(record))
        elif isinstance(record, Positions):
            self._locate(record)
        elif isinstance(record, Frame):
            self._enter(record, message)
            if record.late:
                self._locate(Positions(record.source, record.series, record.late))

    def _locate(self, late: Positions) -> None:
        """Positions that came after their frames, to the run in hand; for a run that is over they are of no use to anybody."""
        run = self._runs.current
        if not late.positions:
            return
        if run is not None and run.series == late.series:
            self._pass_on(replace(late, run=run.uid))
        elif late.series != self._lost_of:
            self._lost_of = late.series
            log.warning(
                "positions came after their run was over and are lost; positions.wait_s lets frames wait longer", series=late.series
            )

    def _enter(self, frame: Frame, message: Message) -> None:
        """A decoded frame joins its run, unless it is late, known already, or of no use to the prior."""
        again = frame.received <= self._recovered_at
        if not again:
            self._meters.received()
        try:
            changes = self._runs.frame(frame, again)
        except LateFrame as late:
            if not again:
                self._turn_away(late.uid, "decode", "late")
            return
        self._turn(changes)
        run = self._runs.current
        assert run is not None
        if again:
            if self._ledger.knows(run.uid, frame.index):
                return  # its fate was decided before the restart
            self._meters.received()
        if self._spool is not None:
            self._spool.entered(run.uid, frame.index)
        if not self._ledger.received(run.uid, frame.index, frame.received):
            self._ledger.dropped(run.uid, None, "decode", "duplicate")
            self._meters.dropped("decode", "duplicate")
            return
        try:
            self._admit(frame.counts)
        except WireError as error:
            self._quarantine(frame.index, message, error)
            return
        if not self._ladder.rung.classifies(frame.index):
            self._ledger.dropped(run.uid, frame.index, "classify", "overload")
            self._meters.dropped("classify", "overload")
            return
        now = time.time()
        self._entered.append(Job(self._next_ticket(), run, frame, now))
        # One message may refer to thousands of frames in a file.
        if len(self._entered) == _MOST or now > self._entered[0].decoded + _GATHER_S:
            self._submit()

    def _submit(self) -> None:
        """What has gathered, to the crew."""
        jobs, self._entered = self._entered, []
        if jobs:
            self._crew.submit(jobs)

    def _pass_on(self, item: RunStarted | Positions | RunEnded) -> None:
        # Behind every frame that came before it: it would otherwise wait for their results while they wait here.
        self._submit()
        self._crew.pass_on(self._next_ticket(), item)

    def _turn(self, changes: Sequence[RunStarted | RunEnded]) -> None:
        for change in changes:
            if isinstance(change, RunStarted):
                self._ledger.open_run(change)
                log.info("run opened", run=change.uid, series=change.series, expected=change.expected)
                if self._spool is not None:
                    self._spool.opened(change, self._item.number if self._item is not None else 0)
            elif self._spool is not None:
                self._spool.ended(change.uid)
            self._pass_on(change)

    def sequence(self) -> bool:
        """Results in order -> drift watch -> every outbox."""
        items = self._crew.take(_MOST, BEAT_S)
        if items is None:
            for outbox in self._outboxes:
                outbox.leave()
            return False
        watched: list[PathItem] = []
        for kind, group in groupby(items, key=type):
            of_kind = [*group]
            watched += self._watch(of_kind) if kind is Result else self._begin(of_kind)
        if watched:
            for outbox in self._outboxes:
                outbox.put_all(watched)
        return True

    def _watch(self, items: list[PathItem]) -> list[Result]:
        results = [item for item in items if isinstance(item, Result)]
        for watch in self._watches:
            results = watch(results)
        self._meters.thought(results)
        return results

    def _begin(self, items: list[PathItem]) -> list[PathItem]:
        """What is no result goes on as it is; the watches hear of a new run."""
        for item in items:
            if isinstance(item, RunStarted):
                for watch in self._watches:
                    watch.begin(item)
        return items

    def _next_ticket(self) -> int:
        self._ticket += 1
        return self._ticket - 1

    def _refuse(self, wire: Wire, message: Message, error: WireError) -> None:
        """A message that could not be read. One of the other wire is no frame of the run in hand."""
        if self._item is not None and self._item.counted:
            return  # before the restart
        self._quarantine(None, message, error, wire is self._frames)

    def _quarantine(self, index: int | None, message: Message, error: WireError, of_run: bool = True) -> None:
        run = self._runs.current
        uid = run.uid if run is not None and of_run else None
        if index is None:
            self._meters.received()
            self._ledger.received_unread(uid)
        self._ledger.quarantined(uid, index, error.reason)
        self._meters.quarantined(error.reason)
        self._keep(message, error)

    def _turn_away(self, uid: str | None, stage: str, reason: str) -> None:
        self._ledger.turned_away(uid, stage, reason)
        self._meters.dropped(stage, reason)

    def _unheard(self, item: Received) -> None:
        """A message that was left out unread, for want of room or of time: counted for the run in hand; nobody knows whose it was."""
        run = self._runs.current
        self._meters.received()
        stage, reason = ("path", "shutdown") if self.received.closed else ("receive", "queue_full")
        self._turn_away(run.uid if run is not None else None, stage, reason)

    def _fail(self, error: BaseException) -> None:
        """One room is lost: receive and compute nothing more, but let the sinks write what is finished."""
        self.failure = self.failure or error
        self.stop()
        self.received.abort()
        self._crew.abort()
        for outbox in self._outboxes:
            outbox.mailbox.close()

    def _inhabit(self, name: str, step: Callable[[], bool]) -> None:
        """A room's thread. Whatever escapes a step is our own fault: remembered, and the whole path stops (exit 1)."""
        try:
            self._began[name] = time.monotonic()
            while step():
                self._began[name] = time.monotonic()
        except BaseException as error:
            log.exception("a room failed", room=name)
            self._fail(error)
        finally:
            self._began.pop(name, None)
            with self._leaving:
                self._inhabited -= 1
                if self._inhabited == 0:
                    self.ended.set()
