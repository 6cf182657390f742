"""The bounded queue: bytes, policies, and that nothing waits for ever."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import pytest

from streamprior.mailbox import Mailbox


@dataclass(frozen=True)
class Item:
    name: str
    nbytes: int = 10
    must_stay: bool = False


def names(items: list[Item] | None) -> list[str]:
    return [item.name for item in items or []]


def test_items_come_out_in_order_and_in_batches() -> None:
    box: Mailbox[Item] = Mailbox(100)
    for name in "abcde":
        box.put(Item(name))
    assert names(box.take(3)) == ["a", "b", "c"]
    assert names(box.take(3)) == ["d", "e"]
    assert box.nbytes == 0


def test_an_empty_mailbox_answers_after_the_timeout_and_a_closed_one_says_it_is_over() -> None:
    box: Mailbox[Item] = Mailbox(100)
    assert box.take(1, timeout_s=0.0) == []
    box.put(Item("a"))
    box.close()
    assert names(box.take(1)) == ["a"]
    assert box.take(1) is None


def test_block_makes_the_sender_wait_until_there_is_room() -> None:
    box: Mailbox[Item] = Mailbox(20)
    box.put(Item("a"))
    box.put(Item("b"))
    through = threading.Event()

    def send() -> None:
        box.put(Item("c"))
        through.set()

    thread = threading.Thread(target=send)
    thread.start()
    assert not through.wait(0.05)
    assert names(box.take(1)) == ["a"]
    assert through.wait(5)
    thread.join()
    assert box.nbytes == 20


@pytest.mark.parametrize(("policy", "left", "dropped"), [("drop_oldest", "bc", "a"), ("drop_newest", "ab", "c")])
def test_a_full_mailbox_drops_what_its_policy_says_and_reports_it(policy: str, left: str, dropped: str) -> None:
    lost: list[Item] = []
    box: Mailbox[Item] = Mailbox(20, policy, dropped=lost.append)
    for name in "abc":
        box.put(Item(name))
    assert (names(box.take(9)), names(lost)) == (list(left), [dropped])
    assert box.nbytes == 0


@pytest.mark.parametrize("policy", ["drop_oldest", "drop_newest"])
def test_the_start_and_end_of_a_run_are_never_dropped(policy: str) -> None:
    lost: list[Item] = []
    box: Mailbox[Item] = Mailbox(20, policy, dropped=lost.append, droppable=lambda item: not item.must_stay)
    box.put(Item("start", must_stay=True))
    for name in "abc":
        box.put(Item(name))
    taken = names(box.take(9))
    assert taken[0] == "start"
    assert len(taken) + len(lost) == 4


def test_the_oldest_are_dropped_until_a_larger_one_fits_and_what_must_stay_stays_in_front() -> None:
    lost: list[Item] = []
    box: Mailbox[Item] = Mailbox(40, "drop_oldest", dropped=lost.append, droppable=lambda item: not item.must_stay)
    for item in (Item("start", must_stay=True), Item("a"), Item("b"), Item("c"), Item("large", nbytes=20)):
        box.put(item)
    assert (names(box.take(9)), names(lost)) == (["start", "c", "large"], ["a", "b"])
    assert box.nbytes == 0


def test_an_item_larger_than_the_budget_passes_alone() -> None:
    box: Mailbox[Item] = Mailbox(20)
    box.put(Item("elephant", nbytes=1000))
    assert names(box.take(1)) == ["elephant"]


def test_what_is_put_into_a_closed_mailbox_counts_as_dropped() -> None:
    lost: list[Item] = []
    box: Mailbox[Item] = Mailbox(20, dropped=lost.append)
    box.close()
    box.put(Item("late"))
    assert names(lost) == ["late"]


def test_what_was_inside_an_aborted_mailbox_counts_as_dropped() -> None:
    lost: list[Item] = []
    box: Mailbox[Item] = Mailbox(20, dropped=lost.append)
    box.put(Item("a"))
    box.put(Item("b"))
    box.abort()
    assert names(lost) == ["a", "b"]
    assert box.nbytes == 0


def test_abort_wakes_a_waiting_sender() -> None:
    box: Mailbox[Item] = Mailbox(10)
    box.put(Item("a"))
    thread = threading.Thread(target=box.put, args=(Item("b"),))
    thread.start()
    box.abort()
    thread.join(5)
    assert not thread.is_alive()
    assert box.take(1) is None
