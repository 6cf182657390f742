"""Items from workers that finish as they can -> the items in the order in which they came in."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial

from streamprior.seams import PathItem


class Sequencer:
    """Items with tickets, in any order -> the items in the order of their tickets. Bounded: who is far ahead waits.

    None in place of an item: nothing comes with this ticket.
    """

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._waiting: dict[int, tuple[PathItem | None, int]] = {}
        self._bytes = 0
        self._next = 0
        self._closed = False
        self._changed = threading.Condition()

    @property
    def nbytes(self) -> int:
        return self._bytes

    def put(self, items: Sequence[tuple[int, PathItem | None]]) -> None:
        """Items with their tickets, ascending. Waits while the budget is spent, unless an item is the very next: that one always gets
        in, so nothing locks up."""
        with self._changed:
            for ticket, item in items:
                nbytes = item.nbytes if item is not None else 0
                if self._next in self._waiting and self._bytes + nbytes > self._budget:
                    self._changed.notify_all()  # of what this call has put in already
                self._changed.wait_for(partial(self._admits, ticket, nbytes))
                self._waiting[ticket] = item, nbytes
                self._bytes += nbytes
            if self._next in self._waiting:
                self._changed.notify_all()

    def _admits(self, ticket: int, nbytes: int) -> bool:
        return ticket == self._next or self._bytes + nbytes <= self._budget or self._closed

    def take(self, limit: int, timeout_s: float | None = None) -> list[PathItem] | None:
        """Up to `limit` items in order; an empty list after `timeout_s`; None when closed and nothing is left that could come in order."""
        with self._changed:
            self._changed.wait_for(lambda: self._next in self._waiting or self._closed, timeout_s)
            items: list[PathItem] = []
            first = self._next
            while len(items) < limit and self._next in self._waiting:
                item, nbytes = self._waiting.pop(self._next)
                self._next += 1
                self._bytes -= nbytes
                if item is not None:
                    items.append(item)
            if self._next > first:
                self._changed.notify_all()
            return items if items or not self._closed else None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
