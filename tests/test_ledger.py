"""The account of a run balances whatever happens, and says what became of each frame."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.ledger import KEPT_RUNS, Ledger, account_line
from streamprior.records import Detector, RunEnded, RunStarted


def run(uid: str = "u", expected: int | None = None) -> RunStarted:
    return RunStarted(uid, "eiger", "S1", 0.0, expected, Detector())


def opened(*, expected: int | None = None, sinks: tuple[str, ...] = ("archive",)) -> Ledger:
    ledger = Ledger(sinks)
    ledger.open_run(run(expected=expected))
    return ledger


def test_a_published_frame_balances_and_one_in_flight_does_not_yet() -> None:
    ledger = opened(expected=3)
    for index in range(2):
        assert ledger.received("u", index)
    ledger.published("u", "archive", [0])
    account = ledger.balance("u")
    assert (account["received"], account["published"], account["in_flight"], account["missing"]) == (2, 1, 1, 1)
    assert account["balanced"]
    assert (ledger.frame("u", 0), ledger.frame("u", 1), ledger.frame("u", 2)) == ("published", "in flight", "never received")


def test_a_frame_that_a_room_lost_leaves_a_closed_run_unbalanced() -> None:
    ledger = opened()
    ledger.received("u", 0)
    account = ledger.close_run(RunEnded("u", "end", 1.0))
    assert not account["balanced"]
    assert "NOT BALANCED" in account_line(account)


def test_a_duplicate_is_recognised_and_does_not_change_the_first_ones_fate() -> None:
    ledger = opened()
    assert ledger.received("u", 5)
    ledger.published("u", "archive", [5])
    assert not ledger.received("u", 5)
    ledger.dropped("u", None, "decode", "duplicate")
    account = ledger.close_run(RunEnded("u", "end", 1.0))
    assert account["balanced"]
    assert (account["received"], account["published"], account["dropped"]) == (2, 1, {"decode/duplicate": 1})
    assert ledger.frame("u", 5) == "published"
    ledger.published("u", "archive", [5])
    assert ledger.balance("u")["published"] == 1, "a repeated write is harmless"


def test_why_a_frame_is_not_there_is_answered_in_words() -> None:
    ledger = opened()
    for index in range(2):
        ledger.received("u", index)
    ledger.dropped("u", 0, "archive", "unavailable")
    ledger.quarantined("u", 1, "wrong_shape")
    assert ledger.frame("u", 0) == "dropped at archive: unavailable"
    assert ledger.frame("u", 1) == "quarantined: wrong_shape"


def test_a_run_is_found_by_the_beginning_of_its_uid_or_by_its_series() -> None:
    ledger = Ledger(["archive"])
    for uid in ("80b22e86-1", "80b22e86-2", "9c"):
        ledger.open_run(run(uid))
    assert ledger.find("9") == "9c"
    assert ledger.find("80b22e86-2") == "80b22e86-2"
    assert ledger.find("S1") == "9c", "the newest of a series"
    for name in ("80b", "nobody"):
        with pytest.raises(KeyError):
            ledger.find(name)


def test_messages_outside_any_run_are_counted_too() -> None:
    ledger = Ledger(["archive"])
    ledger.received_unread(None)
    ledger.quarantined(None, None, "not_cbor")
    assert ledger.is_balanced()
    assert ledger.runs()[-1]["quarantined"] == {"not_cbor": 1}


def test_with_two_complete_sinks_a_frame_is_published_once_both_have_it() -> None:
    ledger = opened(sinks=("archive", "mirror"))
    ledger.received("u", 0)
    ledger.published("u", "archive", [0])
    assert ledger.balance("u")["published"] == 0
    ledger.published("u", "mirror", [0])
    assert ledger.balance("u")["published"] == 1


def test_a_write_off_names_what_was_left_behind() -> None:
    ledger = opened()
    for index in range(3):
        ledger.received("u", index)
    ledger.published("u", "archive", [1])
    assert ledger.write_off() == 2
    assert ledger.close_run(RunEnded("u", "shutdown", 1.0))["balanced"]
    assert ledger.frame("u", 2) == "dropped at path: shutdown"


def test_closed_runs_are_forgotten_and_open_ones_are_not() -> None:
    ledger = Ledger(["archive"])
    ledger.open_run(run("first, still open"))
    for n in range(KEPT_RUNS + 5):
        ledger.open_run(run(str(n)))
        ledger.received(str(n), 0)
        ledger.published(str(n), "archive", [0])
        ledger.close_run(RunEnded(str(n), "end", 1.0))
    assert ledger.total_received() == KEPT_RUNS + 5, "messages of those that are forgotten still count"
    assert ledger.last_published() == (str(KEPT_RUNS + 4), 0)
    uids = [account["run"] for account in ledger.runs()]
    assert len(uids) <= KEPT_RUNS + 2
    assert "first, still open" in uids
    assert "0" not in uids
    with pytest.raises(KeyError):
        ledger.frame("0", 0)


def test_a_frame_that_two_sinks_give_up_is_dropped_once() -> None:
    ledger = opened(sinks=("archive", "mirror"))
    ledger.received("u", 0)
    ledger.dropped("u", 0, "archive", "unavailable")
    ledger.dropped("u", 0, "mirror", "unavailable")
    account = ledger.close_run(RunEnded("u", "end", 1.0))
    assert account["dropped"] == {"archive/unavailable": 1}
    assert account["balanced"]


def test_a_message_turned_away_while_its_run_opens_unbalances_nothing() -> None:
    ledger = Ledger(["archive"])
    ledger.turned_away("u", "receive", "queue_full")
    ledger.open_run(run())
    ledger.turned_away("u", "receive", "queue_full")
    assert ledger.is_balanced()
    assert [account["received"] for account in ledger.runs()] == [1, 1]


def test_the_ledger_does_not_keep_the_detectors_masks() -> None:
    mask = np.zeros((64, 64), np.bool_)
    ledger = Ledger(["archive"])
    before = sys.getrefcount(mask)
    ledger.open_run(RunStarted("u", "eiger", "S1", 0.0, None, Detector(mask=mask)))
    assert sys.getrefcount(mask) == before


def test_missing_frames_are_counted_up_to_the_highest_index_where_nobody_said_how_many_come() -> None:
    ledger = opened()
    for index in (7, 2, 2):
        ledger.received("u", index)
    assert ledger.balance("u")["missing"] == 6


EVENTS = st.sampled_from(["frame", "unread", "publish", "drop", "quarantine", "quarantine_unread", "drop_duplicate"])


@given(st.lists(st.tuples(EVENTS, st.integers(0, 12)), max_size=80))
@settings(max_examples=300, deadline=None)
def test_received_is_the_sum_of_all_fates_after_any_history(history: list[tuple[str, int]]) -> None:
    ledger = opened()
    in_flight: set[int] = set()
    seen: set[int] = set()
    unread = duplicates = arrived = 0
    for event, index in history:
        if event == "frame":
            arrived += 1
            if ledger.received("u", index):
                assert index not in seen
                in_flight.add(index)
                seen.add(index)
            else:
                duplicates += 1
        elif event == "unread":
            arrived += 1
            unread += 1
            ledger.received_unread("u")
        elif event == "quarantine_unread" and unread:
            unread -= 1
            ledger.quarantined("u", None, "not_cbor")
        elif event == "drop_duplicate" and duplicates:
            duplicates -= 1
            ledger.dropped("u", None, "decode", "duplicate")
        elif index in in_flight and event in ("publish", "drop", "quarantine"):
            in_flight.discard(index)
            if event == "publish":
                ledger.published("u", "archive", [index])
            elif event == "drop":
                ledger.dropped("u", index, "archive", "unavailable")
            else:
                ledger.quarantined("u", index, "wrong_shape")
    account = ledger.balance("u")
    assert account["received"] == arrived
    assert account["in_flight"] == len(in_flight) + unread + duplicates
    assert account["residue"] == 0
    ledger.write_off()
    assert ledger.close_run(RunEnded("u", "end", 1.0))["balanced"]
