"""Path items -> one sink: a mailbox of its own and a loop that retries, so that a stuck sink delays nobody else."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby

import structlog

from streamprior.errors import SinkUnavailable
from streamprior.ledger import Ledger, account_line
from streamprior.mailbox import Mailbox
from streamprior.metrics import Meters
from streamprior.records import MosaicImage, Positions, Result, RunEnded, RunStarted
from streamprior.seams import PathItem, Sink

log = structlog.get_logger(__name__)

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 10.0


class _ImageWaits:
    """Stands in the queue for the newest images, which may be larger than everything else in it."""

    nbytes = 100


class Outbox:
    """One sink's room.

    A complete sink gets everything, in order and again until it takes it; its full mailbox slows the path. Any other sink gets the
    newest: its mailbox drops the oldest results, and what it could not take is forgotten. Of the images of a run every sink gets the
    newest alone.

    feeds : outboxes that this sink puts items into; they stay open until it has left. every : the sink is given every result although it
    does not account for them to the ledger.
    """

    def __init__(
        self, sink: Sink, budget_bytes: int, ledger: Ledger, meters: Meters, feeds: Sequence[Outbox] = (), every: bool = False
    ) -> None:
        self.sink = sink
        self._feeds = feeds
        self._writers = 1
        for one in feeds:
            one._writers += 1
        self.mailbox: Mailbox[PathItem | _ImageWaits] = Mailbox(
            budget_bytes,
            "block" if sink.complete or every else "drop_oldest",
            droppable=lambda item: isinstance(item, Result),
        )
        self._images: dict[str, MosaicImage] = {}  # the newest of each run
        self._changing = threading.Lock()
        self._ledger = ledger
        self._meters = meters
        self._open = False
        self._give_up = threading.Event()
        self.up = False

    def put(self, item: PathItem) -> None:
        if not isinstance(item, MosaicImage):
            self.mailbox.put(item)
            return
        with self._changing:
            waits = bool(self._images)
            self._images[item.run] = item
        if not waits:
            self.mailbox.put(_ImageWaits())

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
        # A complete sink writes in blocks (one chunk of the archive). A live one takes what is there, at once, and shows the last of it.
        items = self.mailbox.take(64, linger_s=0.25 if self.sink.complete else 0.0)
        if items is None:
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
        if not self._attempt(lambda: self.sink.write(results)):
            for result in results if self.sink.complete else ():
                self._ledger.dropped(result.run, result.index, self.sink.name, "unavailable")
                self._meters.dropped(self.sink.name, "unavailable")
            return
        for uid, of_run in groupby(results, key=lambda result: result.run):
            indices = [result.index for result in of_run]
            self._ledger.published(uid, self.sink.name, indices)
            self._meters.published(self.sink.name, len(indices))
        if self.sink.complete:
            self._meters.archived(results, time.time())

    def _turn(self, item: PathItem | _ImageWaits) -> None:
        if isinstance(item, RunStarted):
            self._attempt(lambda: self.sink.begin(item))
        elif isinstance(item, RunEnded):
            self._attempt(lambda: self.sink.end(item))
            if self.sink.complete:
                account = self._ledger.close_run(item)
                (log.info if account["balanced"] else log.error)("run closed", reason=item.reason, ledger=account_line(account))
        elif isinstance(item, Positions):
            self._attempt(lambda: self.sink.note(item))
        elif isinstance(item, _ImageWaits):
            with self._changing:
                images, self._images = list(self._images.values()), {}
            for image in images:
                self._attempt(partial(self.sink.note, image))

    def _attempt(self, call: Callable[[], None]) -> bool:
        """Call the sink; a complete one again and again with growing pauses while it is unavailable. False when it was given up.

        Given up while it was away, it is not called again: it would be asked to write into a run that it could not begin.
        """
        wait_s = _FIRST_WAIT_S
        if self._give_up.is_set() and not self.up:
            return False
        while True:
            try:
                call()
            except SinkUnavailable as error:
                if self.up or wait_s == _FIRST_WAIT_S:
                    log.warning("sink unavailable", sink=self.sink.name, error=str(error))
                self._set_up(False)
                if not self.sink.complete or self._give_up.wait(wait_s):
                    return False
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                if not self.up:
                    self._set_up(True)
                return True

    def _set_up(self, up: bool) -> None:
        self.up = up
        self._meters.sink_up(self.sink.name, up)
