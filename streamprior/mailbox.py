"""A queue between two rooms, bounded in bytes, with a named policy for what happens when it is full."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Literal, Protocol, TypeVar

Policy = Literal["block", "drop_oldest", "drop_newest"]


BEAT_S = 0.1
"""How long a room waits for something to do before it looks up: how late an idle run closes, and a stop is noticed; and a room that has not
looked up for much longer is stuck."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class Mailbox(Generic[T]):
    """Bounded in bytes; an item larger than the whole budget is let in alone, so that it cannot block for ever.

    Parameters
    ----------
    budget_bytes : int
    policy : "block", "drop_oldest" or "drop_newest"
        block: `put` waits, and the pressure reaches the sender. The other two call `dropped(item)` for what they leave out.
    droppable : callable
        Says which items a policy may drop; the start and the end of a run never are.

    `policy` may be changed at any time; who waits then goes by the new one with the next item that leaves.
    """

    def __init__(
        self,
        budget_bytes: int,
        policy: Policy = "block",
        dropped: Callable[[T], None] | None = None,
        droppable: Callable[[T], bool] | None = None,
    ) -> None:
        self._budget = budget_bytes
        self.policy = policy
        self._dropped = dropped or (lambda item: None)
        self._droppable = droppable or (lambda item: True)
        self._items: deque[tuple[T, int]] = deque()  # with their sizes: working one out twice costs as much as the rest
        self._bytes = 0
        self._closed = False
        self._wanted = 1  # so many items, and the other room is woken
        lock = threading.Lock()
        # Two, so that an item that goes out wakes nobody who waits for one to come in.
        self._filled, self._emptied = threading.Condition(lock), threading.Condition(lock)

    @property
    def nbytes(self) -> int:
        return self._bytes

    @property
    def closed(self) -> bool:
        return self._closed

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: T) -> None:
        """Hand an item over; waits under "block". Into a closed mailbox nothing goes any more: the item counts as dropped."""
        self.put_all((item,))

    def put_all(self, items: Iterable[T]) -> None:
        """Hand items over in their order, waking the other room once: at thousands a second its waking costs more than the items."""
        losers: list[T] = []
        with self._filled:
            for item in items:
                self._put(item, item.nbytes, losers)
            if len(self._items) >= self._wanted or self._bytes >= self._budget:
                self._filled.notify()
        for loser in losers:
            self._dropped(loser)

    def take(self, limit: int, linger_s: float = 0.0, timeout_s: float | None = None, takers: int = 1, at_least: int = 1) -> list[T] | None:
        """Up to `limit` items, oldest first, and where several take no more than one's share, or `at_least`.

        Waits for the first one (at most `timeout_s`, then returns an empty list); once there is one, waits up to `linger_s` for the
        batch to fill. None when the mailbox is closed and empty: the room upstream has left.
        """
        with self._filled:
            if not self._items:
                self._filled.wait_for(lambda: self._items or self._closed, timeout_s)
            if not self._items:
                return None if self._closed else []
            if linger_s > 0 and not self._plenty(limit):
                self._wanted = limit
                self._filled.wait_for(lambda: self._plenty(limit), linger_s)
                self._wanted = 1
            batch = []
            for _ in range(min(limit, max(at_least, -(-len(self._items) // takers)), len(self._items))):
                item, nbytes = self._items.popleft()
                self._bytes -= nbytes
                batch.append(item)
            if self._items:
                self._filled.notify()  # the next who takes
            self._emptied.notify_all()
            return batch

    def close(self) -> None:
        """No further items; what is inside can still be taken."""
        with self._filled:
            self._closed = True
            self._wake_all()

    def abort(self) -> None:
        """Close and empty at once; what was inside counts as dropped."""
        with self._filled:
            self._closed = True
            losers = [item for item, _ in self._items]
            self._items.clear()
            self._bytes = 0
            self._wake_all()
        for loser in losers:
            self._dropped(loser)

    def _put(self, item: T, nbytes: int, losers: list[T]) -> None:
        """One item, with the lock held; what is left out for it, or it itself, joins the losers."""
        # Who may be dropped is asked only of a full mailbox: it costs a look into the message.
        while self._full(nbytes) and not self._closed and not self._make_room(nbytes, losers):
            if self.policy != "block" and self._droppable(item):
                break
            self._filled.notify()  # of what this call has put in already
            self._emptied.wait()
        if self._closed or (self.policy == "drop_newest" and self._full(nbytes) and self._droppable(item)):
            losers.append(item)
        else:
            self._items.append((item, nbytes))
            self._bytes += nbytes

    def _wake_all(self) -> None:
        self._filled.notify_all()
        self._emptied.notify_all()

    def _plenty(self, limit: int) -> bool:
        """No reason to wait for more."""
        return len(self._items) >= limit or self._closed or self._bytes >= self._budget

    def _full(self, nbytes: int) -> bool:
        return bool(self._items) and self._bytes + nbytes > self._budget

    def _make_room(self, nbytes: int, losers: list[T]) -> bool:
        """Under drop_oldest: move the oldest droppable items out until so many bytes fit. True when they do."""
        if self.policy != "drop_oldest":
            return False
        while self._full(nbytes):
            candidate = next((at for at, (one, _) in enumerate(self._items) if self._droppable(one)), None)
            if candidate is None:
                break
            loser, size = self._items[candidate]
            del self._items[candidate]
            self._bytes -= size
            losers.append(loser)
        return not self._full(nbytes)
