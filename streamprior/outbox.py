"""Path items -> one sink: a mailbox of its own and a loop that retries, so that a stuck sink delays nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import structlog

from streamprior.errors import DiskFull, SinkUnavailable
from streamprior.ledger import Ledger, account_line
from streamprior.mailbox import BEAT_S, Mailbox
from streamprior.metrics import Meters
from streamprior.records import Flag, MosaicImage, Positions, Result, RunEnded, RunStarted
from streamprior.seams import PathItem, Sink

log = structlog.get_logger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0

_BLOCK, _BLOCK_S = 256, 0.25
"""Most items that a sink is given at once, and how long a complete one waits for them."""

_LONGEST_FULL_S = 0.25
"""Longest pause on a full disk where the path may not be slowed: half a mailbox lasts longer than that."""

_SHOW_S = 0.02
"""Between two calls of a live sink: gauges and pages are looked at less often."""


@dataclass(frozen=True, slots=True)
class _Newest:
    """Stands in the queue for the newest of its kind (Result or MosaicImage) of one run, which is kept beside it."""

    kind: type
    run: str
    nbytes: int = 100


class Outbox:
    """One sink's room.

    A complete sink gets everything, in order and again until it takes it; its full mailbox slows the path. Any other sink gets the newest
    result of a run and forgets what it could not take. Of the images of a run every sink gets the newest alone.

    A full disk may last for hours. With `drop_when_full` a complete sink waits for room while its mailbox is less than half full, so that a
    short trouble costs nothing, and then counts the oldest as dropped, so that a long one never slows the path. Starts and ends of runs
    and what is noted are owed and told in their order before any result.

    feeds : outboxes that this sink puts items into; they stay open until it has left. every : the sink is given every result although it
    does not account for them to the ledger.
    """

    def __init__(
        self,
        sink: Sink,
        budget_bytes: int,
        ledger: Ledger,
        meters: Meters,
        feeds: Sequence[Outbox] = (),
        every: bool = False,
        drop_when_full: bool = False,
    ) -> None:
        self.sink = sink
        self._budget_bytes = budget_bytes
        self._drop_when_full = drop_when_full
        self._owed: dict[object, RunStarted | RunEnded | Positions | MosaicImage] = {}
        self._told = ""  # the trouble that the log has: the same one comes back with every try
        self._feeds = feeds
        self._writers = 1
        for one in feeds:
            one._writers += 1
        self.mailbox: Mailbox[PathItem | _Newest] = Mailbox(budget_bytes)
        # A complete sink writes in blocks (some chunks of the archive). A live one is called a few times a second: more is seen by nobody.
        self._linger_s = _BLOCK_S if sink.complete else _SHOW_S if not every else 0.0
        self._conflated = (MosaicImage,) if sink.complete or every else (MosaicImage, Result)
        self._newest: dict[_Newest, Result | MosaicImage] = {}
        self._changing = threading.Lock()
        self._ledger = ledger
        self._meters = meters
        self._open = False
        self._give_up = threading.Event()
        self.up = False

    def put(self, item: PathItem) -> None:
        self.put_all((item,))

    def put_all(self, items: Sequence[PathItem]) -> None:
        """Hand items over in their order."""
        queued = [one for item in items if (one := self._queued(item)) is not None]
        if queued:  # the room is not woken for what waits there already
            self.mailbox.put_all(queued)

    def _queued(self, item: PathItem) -> PathItem | _Newest | None:
        """What goes into the queue for an item; None where something there stands for it already."""
        if not isinstance(item, self._conflated):
            return item
        place = _Newest(type(item), item.run)
        with self._changing:
            waits = place in self._newest
            self._newest[place] = item
        return None if waits else place

    def leave(self) -> None:
        """One who puts items in has no more; with the last one the room closes."""
        with self._changing:
            self._writers -= 1
            last = not self._writers
        if last:
            self.mailbox.close()

    def step(self) -> bool:
        """Write what has gathered; False when the path has ended and the sink is closed."""
        if not self._open:
            self._open = self._attempt(self.sink.open)
        items = self.mailbox.take(_BLOCK, linger_s=self._linger_s, timeout_s=BEAT_S)
        if items is None:
            self._pay()
            self._attempt(self.sink.close)
            for one in self._feeds:
                one.leave()
            return False
        for kind, group in groupby(items, key=type):
            if kind is Result:
                self._write([item for item in group if isinstance(item, Result)])
            else:
                for item in group:
                    self._turn(item)
        return True

    def give_up(self) -> None:
        """Stop retrying: the time to drain is over."""
        self._give_up.set()
        self.mailbox.abort()

    def _write(self, results: Sequence[Result]) -> None:
        if not (self._pay() and self._attempt(lambda: self.sink.write(results))):
            reason = "unavailable" if self._give_up.is_set() else "disk_full"
            for result in results if self.sink.complete else ():
                self._ledger.dropped(result.run, result.index, self.sink.name, reason)
                self._meters.dropped(self.sink.name, reason)
            return
        for uid, of_run in groupby(results, key=lambda result: result.run):
            block = list(of_run)
            unrefined = {result.index: why for result in block if (why := _unrefined(result))}
            self._ledger.published(uid, self.sink.name, [result.index for result in block], unrefined)
            self._meters.published(self.sink.name, len(block))
            if self.sink.complete:
                self._meters.unrefined(unrefined.values())
        if self.sink.complete:
            self._meters.archived(results, time.time())

    def _turn(self, item: PathItem | _Newest) -> None:
        if isinstance(item, _Newest):
            with self._changing:
                newest = self._newest.pop(item)
            if isinstance(newest, Result):
                self._write([newest])
                return
            item = newest
        assert not isinstance(item, Result)
        if not (self._pay() and self._attempt(lambda: self._hand(item))):
            self._owe(item)
        if isinstance(item, RunEnded) and self.sink.complete:
            account = self._ledger.close_run(item)
            (log.info if account["balanced"] else log.error)("run closed", reason=item.reason, ledger=account_line(account))

    def _hand(self, item: RunStarted | RunEnded | Positions | MosaicImage) -> None:
        if isinstance(item, RunStarted):
            self.sink.begin(item)
        elif isinstance(item, RunEnded):
            self.sink.end(item)
        else:
            self.sink.note(item)

    def _owe(self, item: RunStarted | RunEnded | Positions | MosaicImage) -> None:
        """Tell it later, before anything else; of a run's images the newest. What is large is owed within the sink's own budget."""
        if not self.sink.complete or self._give_up.is_set():
            return
        if isinstance(item, RunStarted | RunEnded):
            self._owed[object()] = item
        elif sum(one.nbytes for one in self._owed.values()) + item.nbytes < self._budget_bytes:
            self._owed[(type(item), item.run) if isinstance(item, MosaicImage) else object()] = item
        else:
            log.error("left out on a full disk", sink=self.sink.name, what=type(item).__name__, run=item.run)

    def _pay(self) -> bool:
        """Hand over what is owed, in order; True where nothing is left."""
        for key, item in list(self._owed.items()):
            if not self._attempt(lambda item=item: self._hand(item)):  # type: ignore[misc]
                return False
            del self._owed[key]
        return True

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Call the sink; a complete one again and again with growing pauses while it is unavailable. False when it was given up, or
        where its disk is full and others wait.

        Given up while it was away, it is not called again: it would be asked to write into a run that it could not begin.
        """
        wait_s = _FIRST_WAIT_S
        if self._give_up.is_set() and not self.up:
            return False
        while True:
            try:
                call()
            except SinkUnavailable as error:
                self._complain(error)
                self._set_up(False)
                passing = self._drop_when_full and isinstance(error, DiskFull)
                if passing and 2 * self.mailbox.nbytes > self._budget_bytes:
                    return False
                if not self.sink.complete or self._give_up.wait(wait_s):
                    return False
                wait_s = min(2 * wait_s, _LONGEST_FULL_S if passing else _LONGEST_WAIT_S)
            else:
                if not self.up:
                    self._set_up(True)
                if self._told:
                    log.info("sink takes again what it is given", sink=self.sink.name)
                    self._told = ""
                return True

    def _complain(self, error: SinkUnavailable) -> None:
        if str(error) != self._told:
            tell = log.error if isinstance(error, DiskFull) else log.warning
            tell("sink unavailable", sink=self.sink.name, error=str(error))
            self._told = str(error)

    def _set_up(self, up: bool) -> None:
        self.up = up
        self._meters.sink_up(self.sink.name, up)


def _unrefined(result: Result) -> str:
    """Why a result's object was not refined, a reason of the ledger's; empty where it was, and where the recipe refines no frame."""
    if result.skipped or result.arm == "none":
        return result.skipped
    return "empty" if result.flags & _EMPTY else "no_support" if result.flags & _NO_SUPPORT else ""


_EMPTY, _NO_SUPPORT = int(Flag.EMPTY), int(Flag.NO_SUPPORT)
"""As ints: `&` on the enum itself takes a microsecond."""
