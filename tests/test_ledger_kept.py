"""The ledger outlives its process, costs a long run no memory, and goes on where the disk does not: real files, real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from streamprior import ledger as module
from streamprior.account import account_line, folded, stretches
from streamprior.fates import SPAN, InUse
from streamprior.ledger import KEPT_RUNS, Ledger, answer, catch_up, read_ledger
from streamprior.metrics import Meters
from streamprior.records import Detector, RunEnded, RunStarted
from tests.test_cli import streamprior


def opened(folder: Path | None, *sinks: str, uid: str = "u", expected: int | None = None, at: float = 1000.0) -> Ledger:
    ledger = Ledger(sinks or ("archive",), folder)
    ledger.open_run(RunStarted(uid, "eiger", "S1", at, expected, Detector()))
    return ledger


def recalled(folder: Path) -> Ledger:
    ledger = Ledger(["archive"], folder)
    ledger.recall()
    return ledger


def in_a_process(code: str, *words: object) -> subprocess.CompletedProcess[str]:
    """A process of its own with a ledger's names at hand; it may kill itself."""
    head = (
        "import json, os, resource, signal, sys; from pathlib import Path; from streamprior.fates import SPAN;"
        "from streamprior.ledger import Ledger; from streamprior.records import Detector, RunEnded, RunStarted\n"
    )
    command = [sys.executable, "-c", head + code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_restart_answers_as_the_process_before_it_did(tmp_path: Path) -> None:
    ledger = opened(tmp_path, expected=9)
    for index in (0, 1, 2, 5, 5, 6):
        ledger.received("u", index, 1001.0 + index)
    ledger.dropped("u", None, "decode", "duplicate")
    ledger.turned_away("u", "receive", "queue_full")
    ledger.published("u", "archive", [0, 2, 5])
    ledger.dropped("u", 1, "archive", "unavailable")
    ledger.quarantined("u", 6, "wrong_shape")
    account = ledger.close_run(RunEnded("u", "end", 1100.0))
    again = recalled(tmp_path)
    assert again.earlier() == [account]
    assert again.runs() == []
    assert [again.why("u", index) for index in range(10)] == [ledger.why("u", index) for index in range(10)]
    assert again.left_out("u") == ledger.left_out("u")
    assert again.find("S1") == "u"
    assert (again.total_received(), again.is_balanced(), again.in_flight()) == (0, True, 0), "of this process: nothing yet"


def test_a_killed_process_leaves_all_it_knew_and_the_next_one_says_what_was_lost(tmp_path: Path) -> None:
    done = in_a_process(
        """
ledger = Ledger(["archive"], Path(sys.argv[1]))
ledger.open_run(RunStarted("u", "eiger", "S1", 1000.0, 400, Detector()))
for index in range(300):
    ledger.received("u", index, 1001.0 + index)
ledger.published("u", "archive", range(200))
ledger.dropped("u", 250, "archive", "disk_full")
ledger.received("u", 7)
ledger.received_unread("u")
ledger.turned_away("u", "receive", "queue_full")
os.kill(os.getpid(), signal.SIGKILL)
""",
        tmp_path,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    ledger = Ledger(["archive"], tmp_path)
    (account,) = ledger.recall()
    assert (account["reason"], account["received"], account["published"]) == ("interrupted", 303, 200)
    assert account["dropped"] == {"archive/disk_full": 1, "path/crash": 101, "receive/queue_full": 1}
    assert (account["in_flight"], account["missing"], account["balanced"]) == (0, 100, True)
    assert ledger.left_out("u")["left_out"] == [
        {"fate": "dropped at path: crash", "first": 200, "last": 249},
        {"fate": "dropped at archive: disk_full", "first": 250, "last": 250},
        {"fate": "dropped at path: crash", "first": 251, "last": 299},
        {"fate": "never received", "first": 300, "last": 399},
    ]
    assert "killed while this frame was on its way" in ledger.why("u", 260)["why"]
    assert recalled(tmp_path).earlier() == [account], "and it stays so"
    assert Ledger(["archive"], tmp_path).recall() == []


def killed(folder: Path) -> Path:
    """What is left in a ledger's folder when its process is killed now: a copy, which has no lock."""
    return Path(shutil.copytree(folder, folder.parent / "killed"))


def test_frames_that_the_archive_has_are_not_lost_though_the_ledger_was_not_told(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger")
    for index in range(5):
        ledger.received("u", index)
    ledger.published("u", "archive", [0])
    again = Ledger(["archive"], killed(tmp_path / "ledger"))
    (account,) = again.recall(lambda uid: [0, 1, 2] if uid == "u" else [])
    assert (account["published"], account["dropped"], account["balanced"]) == (3, {"path/crash": 2}, True)
    assert [again.frame("u", index) for index in (2, 3)] == ["published", "dropped at path: crash"]


def test_a_frame_beyond_the_expected_number_stands_for_none_that_is_missing(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger", expected=8)
    for index in (*range(7), SPAN + 3):
        ledger.received("u", index)
    assert ledger.distinct("u") == 7
    assert ledger.balance("u")["missing"] == 1
    (account,) = Ledger(["archive"], killed(tmp_path / "ledger")).recall()
    assert (account["received"], account["missing"]) == (8, 1)


def test_an_interrupted_run_that_goes_on_keeps_its_losses_where_nothing_is_read_again(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger", expected=8)
    for index in range(4):
        ledger.received("u", index)
    ledger.published("u", "archive", [0, 1])
    again = Ledger(["archive"], killed(tmp_path / "ledger"))
    again.recall()
    again.open_run(RunStarted("u", "eiger", "S1", 1000.0, 8, Detector()))
    assert [again.received("u", index) for index in (4, 5)] == [True, True]
    again.published("u", "archive", [4, 5])
    account = again.close_run(RunEnded("u", "end", 2000.0))
    assert (account["received"], account["published"], account["missing"], account["balanced"]) == (6, 4, 2, True)
    left_out = [(one["fate"], one["first"], one["last"]) for one in again.left_out("u")["left_out"]]
    assert left_out == [("dropped at path: crash", 2, 3), ("never received", 6, 7)]


def test_an_interrupted_run_that_goes_on_counts_what_is_read_again_once(tmp_path: Path) -> None:
    ledger = opened(tmp_path / "ledger", expected=8)
    for index in (0, 1, 2, 3, SPAN):
        ledger.received("u", index)
    ledger.received_unread("u")
    ledger.published("u", "archive", [0, 1])
    folder = killed(tmp_path / "ledger")
    again = Ledger(["archive"], folder, reread=True)
    again.recall()
    again.open_run(RunStarted("u", "eiger", "S1", 1000.0, 8, Detector()))
    account = again.balance("u")
    assert (account["received"], account["published"], account["dropped"], account["closed"]) == (2, 2, {}, None)
    assert again.earlier() == []
    assert [again.received("u", index) for index in (1, 2, 3, 4)] == [False, True, True, True]
    again.dropped("u", None, "decode", "duplicate")
    again.published("u", "archive", [2, 3, 4])
    account = again.close_run(RunEnded("u", "end", 2000.0))
    assert (account["received"], account["published"], account["missing"], account["balanced"]) == (6, 5, 3, True)
    assert recalled(folder).earlier() == [account]


def test_a_run_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.received("u", 0)
    other = Ledger(["archive"], tmp_path)
    assert other.recall() == []
    assert other.earlier() == []
    ledger.published("u", "archive", [0])
    assert ledger.close_run(RunEnded("u", "end", 1.0))["published"] == 1


def test_looking_changes_nothing_and_shows_an_open_run_as_it_is(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for index in range(3):
        ledger.received("u", index)
    ledger.published("u", "archive", [1])
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    seen = read_ledger(tmp_path)
    (account,) = seen.earlier()
    assert (account["received"], account["published"], account["in_flight"], account["closed"]) == (3, 1, 2, None)
    assert seen.frame("u", 0) == "in flight"
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_leap_in_the_index_costs_one_piece_of_disk_and_a_long_run_a_few_mapped_ones(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    ledger.received("u", 0)
    ledger.received("u", 9_999_999)
    (file,) = tmp_path.glob("*.fates")
    assert file.stat().st_blocks * 512 < 3 * 2**20
    assert ledger.balance("u")["missing"] == 9_999_998
    assert ledger.left_out("u")["left_out"][1] == {"fate": "never received", "first": 1, "last": 9_999_998}
    assert ledger.why("u", 5_000_000)["before"]["frame"] == 0
    for piece in range(20):
        ledger.received("u", piece * SPAN + 1)
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(file) in line]
    assert 1 <= len(mapped) <= 4
    descriptors = len(os.listdir("/proc/self/fd"))
    ledger.published("u", "archive", [0, 9_999_999, *(piece * SPAN + 1 for piece in range(20))])
    assert ledger.close_run(RunEnded("u", "end", 1.0))["balanced"]
    assert len(os.listdir("/proc/self/fd")) < descriptors


def test_an_answer_is_of_bounded_length_whatever_was_left_out(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    came = [n * n for n in range(2, 52)]
    for index in came:
        ledger.received("u", index)
    ledger.published("u", "archive", came)
    found = ledger.left_out("u", most=10)
    assert (len(found["left_out"]), found["more"]) == (10, 40)


def test_what_was_left_out_at_equal_distances_is_told_as_one_and_two_single_frames_are_not() -> None:
    ledger = opened(None)
    for index in range(100):
        ledger.received("u", index)
    for index in (1, 3, 5, 7, 9, 50, 70):  # the ladder, and two that have nothing to do with each other
        ledger.dropped("u", index, "classify", "overload")
    alone = {index: "overload" for index in range(10, 50) if index % 8}
    ledger.published("u", "archive", range(100), alone)
    overload, mask = "dropped at classify: overload", "published without refinement: overload"
    assert ledger.left_out("u")["left_out"] == [
        {"fate": overload, "first": 1, "last": 9, "frames": 1, "period": 2},
        {"fate": mask, "first": 10, "last": 15},
        {"fate": mask, "first": 17, "last": 47, "frames": 7, "period": 8},
        {"fate": mask, "first": 49, "last": 49},
        {"fate": overload, "first": 50, "last": 50},
        {"fate": overload, "first": 70, "last": 70},
    ]


@given(st.lists(st.sampled_from([0, 0, 1, 2, 3]), max_size=200), st.integers(1, 70))
def test_folded_stretches_are_the_same_frames(codes: list[int], piece: int) -> None:
    """Every frame is in one of them, and in no other."""
    found = dict[int, int]()
    pieces = ((first, np.array(codes[first : first + piece], np.uint8)) for first in range(0, len(codes), piece))
    for one in folded(stretches(pieces)):
        for n in range(one.count):
            for index in range(one.first + n * one.period, one.first + n * one.period + one.length):
                assert index not in found
                assert index <= one.last
                found[index] = one.number
    assert [found[index] for index in range(len(codes))] == codes


def test_a_range_that_crosses_two_pieces_is_one(tmp_path: Path) -> None:
    ledger = opened(tmp_path)
    for index in (0, 2 * SPAN + 1):
        ledger.received("u", index)
    assert [(one["first"], one["last"]) for one in ledger.left_out("u")["left_out"]] == [
        (0, 0),
        (1, 2 * SPAN),
        (2 * SPAN + 1, 2 * SPAN + 1),
    ]


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ledger = opened(tmp_path / "file" / "ledger")
    assert not ledger.on_disk()
    assert ledger.recall() == []
    for index in range(3):
        assert ledger.received("u", index)
    assert not ledger.received("u", 1)
    ledger.dropped("u", None, "decode", "duplicate")
    ledger.published("u", "archive", range(3))
    assert ledger.close_run(RunEnded("u", "end", 1.0))["balanced"]
    assert ledger.frame("u", 2) == "published"


def test_runs_that_could_not_be_written_are_once_the_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "ledger"
    ledger = opened(folder)
    for index in range(3):
        ledger.received("u", index)
    ledger.turned_away("u", "receive", "queue_full")
    ledger.published("u", "archive", range(3))
    account = ledger.close_run(RunEnded("u", "end", 1.0))
    assert not ledger.on_disk()
    (tmp_path / "file").unlink()
    ledger.open_run(RunStarted("v", "eiger", "S2", 2000.0, None, Detector()))
    assert ledger.on_disk()
    (found,) = recalled(folder).earlier()
    assert found == account
    assert ledger.why("u", 1) == recalled(folder).why("u", 1)


def test_a_full_disk_costs_no_fate_and_what_it_did_not_take_is_written_once_there_is_room(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: the same call fails at the same place."""
    done = in_a_process(
        """
def room(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

ledger = Ledger(["archive"], Path(sys.argv[1]))
room(2**21)
ledger.open_run(RunStarted("u", "eiger", "S1", 1000.0, None, Detector()))
assert ledger.on_disk()
indices = [*range(0, 3 * SPAN, 1000)]
for index in indices:
    assert ledger.received("u", index, 1001.0)
assert not ledger.on_disk()
ledger.published("u", "archive", indices[:-1])
assert ledger.frame("u", indices[-1]) == "in flight" and ledger.frame("u", indices[-2]) == "published"
room(resource.RLIM_INFINITY)
ledger.dropped("u", indices[-1], "archive", "disk_full")
account = ledger.close_run(RunEnded("u", "end", 1100.0))
assert ledger.on_disk() and account["balanced"]
print(json.dumps([account, ledger.left_out("u")]))
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    account, left_out = json.loads(done.stdout.splitlines()[-1])
    assert "goes on in memory" in done.stdout + done.stderr
    again = recalled(tmp_path)
    assert again.earlier() == [account]
    assert again.left_out("u") == left_out


def test_kept_runs_are_bounded_in_number_over_restarts(tmp_path: Path) -> None:
    for process in range(2):
        ledger = recalled(tmp_path)
        for n in range(KEPT_RUNS // 2 + 5):
            uid = f"{process}-{n:02d}"
            ledger.open_run(RunStarted(uid, "eiger", "S1", 1000.0 * (process + 1) + n, None, Detector()))
            ledger.received(uid, 0)
            ledger.published(uid, "archive", [0])
            ledger.close_run(RunEnded(uid, "end", 1.0))
    last = recalled(tmp_path)
    uids = [account["run"] for account in last.earlier()]
    assert len(uids) == KEPT_RUNS
    assert (uids[0], "0-00" in uids) == (f"1-{KEPT_RUNS // 2 + 4}", False)
    assert len([*tmp_path.iterdir()]) == 2 * KEPT_RUNS


def test_kept_runs_are_bounded_in_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(["archive"], tmp_path)
    for n in range(4):
        ledger.open_run(RunStarted(f"{n}", "eiger", "S1", n, None, Detector()))
        for index in (0, SPAN):
            ledger.received(f"{n}", index)
        ledger.published(f"{n}", "archive", (0, SPAN))
        ledger.close_run(RunEnded(f"{n}", "end", 1.0))
    monkeypatch.setattr(module, "KEPT_BYTES", 5 * 2**20)
    assert {account["run"] for account in recalled(tmp_path).earlier()} == {"2", "3"}
    assert {path.stem for path in tmp_path.iterdir()} == {"2", "3"}


def test_what_cannot_be_read_is_said_and_hides_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for n, uid in enumerate(("cut", "garbled", "headless", "whole")):
        ledger = opened(tmp_path, uid=uid, at=n)
        ledger.received(uid, 0)
        ledger.published(uid, "archive", [0])
        ledger.close_run(RunEnded(uid, "end", 1.0))
    os.truncate(tmp_path / "cut.fates", 100_000)
    (tmp_path / "garbled.json").write_text("{")
    (tmp_path / "headless.json").write_text("[]")
    assert [account["run"] for account in recalled(tmp_path).earlier()] == ["whole"]
    said = capsys.readouterr().out
    for name in ("cut.fates", "garbled.json", "headless.json"):
        assert name in said
    assert (tmp_path / "cut.fates").exists(), "left for a person to look at"


def test_files_that_cannot_be_read_are_bounded_in_number_too(tmp_path: Path) -> None:
    living = opened(tmp_path, uid="living")
    for n in range(KEPT_RUNS + 10):
        (tmp_path / f"{n:03d}.json").write_text("{")
        (tmp_path / f"{n:03d}.fates").write_text("")
        for suffix in ("json", "fates"):
            os.utime(tmp_path / f"{n:03d}.{suffix}", (n, n))
    recalled(tmp_path)
    left = {path.stem for path in tmp_path.glob("*.fates")}
    assert len(left) <= KEPT_RUNS
    assert {"living", f"{KEPT_RUNS + 9:03d}"} <= left
    assert "000" not in left
    living.close_run(RunEnded("living", "end", 1.0))


def test_a_frame_that_never_came_is_told_with_its_neighbours_and_what_was_left_out_unread() -> None:
    ledger = opened(None, expected=10)
    for index in (1, 2, 5):
        ledger.received("u", index, 1001.0 + index)
    told = ledger.why("u", 3)
    assert (told["fate"], told["received"], told["decided"], told["came"], told["expected"]) == ("never received", None, None, 3, 10)
    assert (told["before"], told["after"]) == ({"frame": 2, "received": 1003.0}, {"frame": 5, "received": 1006.0})
    assert re.search(r"between frame 2 \(.*\) and frame 5 \(.*\) came; 3 came of 10 expected$", told["why"])
    assert "between the start of the run and frame 1" in ledger.why("u", 0)["why"]
    assert "the last frame that came so far is 5" in ledger.why("u", 8)["why"]
    assert "the run expected 10 frames, 0 to 9" in ledger.why("u", 2**70)["why"]
    ledger.turned_away("u", "receive", "queue_full")
    ledger.turned_away("u", "decode", "duplicate")
    assert "1 messages were left out unread (receive/queue_full 1), and it may be one of them" in ledger.why("u", 3)["why"]


def test_a_frame_is_told_with_its_times() -> None:
    ledger = opened(None)
    for index in range(3):
        ledger.received("u", index, 1001.25)
    ledger.published("u", "archive", [0])
    ledger.dropped("u", 1, "archive", "unavailable")
    safe, lost, flying = (ledger.why("u", index) for index in range(3))
    assert safe["received"] == 1001.25
    assert safe["decided"] > 1.7e9
    assert re.search(r"received at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.250, safe \d+\.\d{3} s later", safe["why"])
    assert "left out" in lost["why"]
    assert "folder could not be written" in lost["why"]
    assert (flying["decided"], "on its way" in flying["why"]) == (None, True)
    ledger.close_run(RunEnded("u", "end", 1.0))
    assert "please report it" in ledger.why("u", 2)["why"]


def test_a_frame_that_a_room_lost_is_a_residue_and_an_alert_asks_for_it() -> None:
    ledger = opened(None)
    meters = Meters("eiger", ["classify"], ["archive"], ("core",), ["flux"])
    meters.watch_ledger(ledger.unaccounted, ledger.on_disk)

    def scraped() -> dict[str, float]:
        families = text_string_to_metric_families(meters.render("text/plain")[0].decode())
        return {sample.name: sample.value for family in families for sample in family.samples}

    ledger.received("u", 0)
    assert (scraped()["streamprior_ledger_residue"], scraped()["streamprior_ledger_on_disk"]) == (0, 0)
    ledger.close_run(RunEnded("u", "end", 1.0))
    assert scraped()["streamprior_ledger_residue"] == 1
    for n in range(KEPT_RUNS + 1):
        ledger.open_run(RunStarted(f"{n}", "eiger", "S1", 0.0, None, Detector()))
        ledger.close_run(RunEnded(f"{n}", "end", 1.0))
    assert scraped()["streamprior_ledger_residue"] == 1, "though the run is forgotten"


def test_the_command_reads_a_folder_without_a_daemon(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    assert streamprior("ledger", "--folder", tmp_path).exit_code == 2
    ledger = opened(folder, expected=6)
    for index in range(4):
        ledger.received("u", index)
    ledger.published("u", "archive", [0, 1])
    ledger.dropped("u", 2, "archive", "unavailable")
    ledger.published("u", "archive", [3])
    ledger.close_run(RunEnded("u", "end", 1.0))
    said = streamprior("ledger", "--folder", tmp_path)
    assert said.exit_code == 0
    assert "4 received = 3 published + 1 (archive/unavailable 1) dropped" in said.output
    assert (
        "frame 2 of run u: dropped at archive: unavailable (received at" in streamprior("ledger", "--folder", folder, "--frame", 2).output
    )
    said = streamprior("ledger", "--folder", tmp_path, "--run", "u", "--left-out")
    assert said.output.splitlines() == ["2: dropped at archive: unavailable", "4 to 5: never received"]
    said = streamprior("ledger", "--folder", tmp_path, "--run", "v")
    assert (said.exit_code, "no run v in" in said.output) == (2, True)


def test_frames_published_with_a_mask_alone_are_told_apart_and_with_their_reason(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    ledger = opened(folder)
    for index in range(6):
        ledger.received("u", index, 1001.0)
    ledger.published("u", "archive", range(6), {1: "overload", 2: "overload", 4: "disk_short", 5: "empty"})
    account = ledger.close_run(RunEnded("u", "end", 1100.0))
    assert (account["published"], account["balanced"]) == (6, True)
    assert account["unrefined"] == {"disk_short": 1, "empty": 1, "overload": 2}
    assert "6 received = 6 published (of these 4 without refinement: disk_short 1, empty 1, overload 2) + 0 dropped" in account_line(
        account
    )
    again = recalled(folder)
    assert again.balance("u") == account
    assert again.frame("u", 1) == "published without refinement: overload"
    assert re.search(r"its mask safe .* later: the path was behind.*streamprior catchup", again.why("u", 1)["why"])
    said = streamprior("ledger", "--folder", tmp_path, "--left-out")
    assert said.output.splitlines() == [
        "1 to 2: published without refinement: overload",
        "4: published without refinement: disk_short",
        "5: published without refinement: empty",
    ]


def test_what_was_caught_up_with_is_published_and_its_fate_before_is_kept(tmp_path: Path) -> None:
    ledger = opened(tmp_path, expected=7)
    for index in range(6):
        ledger.received("u", index, 1001.0)
    ledger.published("u", "archive", range(4), {1: "overload", 2: "empty"})
    ledger.dropped("u", 4, "archive", "disk_full")
    ledger.quarantined("u", 5, "wrong_shape")
    with pytest.raises(InUse):
        catch_up(tmp_path, "u", np.arange(7))
    ledger.close_run(RunEnded("u", "end", 1100.0))
    with pytest.raises(KeyError):
        catch_up(tmp_path, "nobody", np.arange(7))
    assert catch_up(tmp_path, "u", np.arange(7)) == 4
    account = ledger.balance("u")
    assert (account["received"], account["published"], account["missing"], account["balanced"]) == (7, 7, 0, True)
    assert (account["caught_up"], account["unrefined"], account["dropped"]) == (4, {"empty": 1}, {})
    assert [ledger.frame("u", index) for index in (0, 2)] == ["published", "published without refinement: empty"]
    was = ["published without refinement: overload", "dropped at archive: disk_full", "quarantined: wrong_shape", "never received"]
    assert [ledger.frame("u", index) for index in (1, 4, 5, 6)] == [f"published by catching up; it was: {fate}" for fate in was]
    assert "`streamprior catchup` computed it from the file" in ledger.why("u", 4)["why"]
    assert ledger.runs() == [account] == recalled(tmp_path).earlier()
    ledger.turned_away("u", "decode", "late")  # a fate that the run did not know, after one that another process gave it
    assert ledger.balance("u")["dropped"] == {"decode/late": 1}
    assert ledger.frame("u", 4) == "published by catching up; it was: dropped at archive: disk_full"
    assert ledger.is_balanced()


INDICES = st.sampled_from([0, 1, 2, 3, 4, 7, SPAN - 1, SPAN, 3 * SPAN + 5])
EVENTS = st.sampled_from(
    ["frame"] * 4
    + [
        "unread",
        "archive",
        "mirror",
        "archive_alone",
        "mirror_alone",
        "page",
        "drop",
        "quarantine",
        "unread_out",
        "duplicate_out",
        "turned_away",
        "write_off",
    ]
)


class Naive:
    """The same account as an obvious program: every message in one list, with what became of it."""

    def __init__(self) -> None:
        self.frames: dict[int, str] = {}
        self.have: dict[int, set[str]] = {}
        self.others: Counter[str] = Counter()

    def settle(self, index: int, fate: str) -> None:
        if self.frames.get(index) == "in flight":
            self.frames[index] = fate

    def fates(self) -> Counter[str]:
        return Counter(self.frames.values()) + self.others


def tell(ledger: Ledger, naive: Naive, event: str, index: int) -> None:
    """One event to both."""
    if event == "frame":
        new = ledger.received("u", index, 1001.0 + index)
        assert new == (index not in naive.frames)
        if new:
            naive.frames[index] = "in flight"
        else:
            naive.others["in flight"] += 1
    elif event == "unread":
        ledger.received_unread("u")
        naive.others["in flight"] += 1
    elif event in ("unread_out", "duplicate_out"):
        if naive.others["in flight"]:
            naive.others["in flight"] -= 1
            fate = "quarantined: not_cbor" if event == "unread_out" else "dropped at decode: duplicate"
            naive.others[fate] += 1
            ledger.quarantined("u", None, "not_cbor") if event == "unread_out" else ledger.dropped("u", None, "decode", "duplicate")
    elif event == "turned_away":
        ledger.turned_away("u", "receive", "queue_full")
        naive.others["dropped at receive: queue_full"] += 1
    elif event == "write_off":
        lost = [one for one, fate in naive.frames.items() if fate == "in flight"]
        assert ledger.write_off() == len(lost) + naive.others["in flight"]
        for one in lost:
            naive.frames[one] = "dropped at path: shutdown"
        naive.others["dropped at path: shutdown"] += naive.others.pop("in flight", 0)
    elif event in ("archive", "mirror", "page", "archive_alone", "mirror_alone"):
        # A block of two, as sinks take them; again and again, as they may; the second frame perhaps with a mask alone.
        sink, _, alone = event.partition("_")
        ledger.published("u", sink, [index, index + 1], {index + 1: "overload"} if alone else {})
        for one in (index, index + 1):
            if naive.frames.get(one) == "in flight" and sink != "page":
                naive.have.setdefault(one, set()).add(sink)
                if naive.have[one] == {"archive", "mirror"}:
                    naive.frames[one] = "published without refinement: overload" if alone and one > index else "published"
    elif event == "drop":
        ledger.dropped("u", index, "archive", "unavailable")
        naive.settle(index, "dropped at archive: unavailable")
    else:
        ledger.quarantined("u", index, "wrong_shape")
        naive.settle(index, "quarantined: wrong_shape")


def check(account: dict[str, Any], naive: Naive) -> None:
    """The account's numbers are the naive ones, and their sum balances."""
    fates = naive.fates()
    assert account["received"] == sum(fates.values())
    assert account["published"] == sum(n for words, n in fates.items() if words.startswith("published"))
    assert sum(account["unrefined"].values()) == fates["published without refinement: overload"]
    assert account["caught_up"] == sum(n for words, n in fates.items() if words.startswith("published by"))
    assert account["in_flight"] == fates["in flight"]
    assert account["quarantined"] == {words.removeprefix("quarantined: "): n for words, n in fates.items() if words[0] == "q" and n}
    dropped = {words.removeprefix("dropped at ").replace(": ", "/"): n for words, n in fates.items() if words[0] == "d" and n}
    assert account["dropped"] == dropped
    assert account["residue"] == 0
    assert account["received"] == account["published"] + sum(account["quarantined"].values()) + sum(dropped.values()) + account["in_flight"]


@given(st.lists(st.tuples(EVENTS, INDICES), max_size=60), st.sampled_from([None, 5, 2 * SPAN]))
@settings(max_examples=150, deadline=None)
def test_after_any_history_the_sum_balances_and_disk_says_what_memory_said(history: list[tuple[str, int]], expected: int | None) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "ledger"
        ledger, naive = opened(folder, "archive", "mirror", expected=expected), Naive()
        for event, index in history:
            tell(ledger, naive, event, index)
            check(ledger.balance("u"), naive)
        for index in range(SPAN + 2) if len(history) < 3 else (*range(9), SPAN - 1, SPAN, 3 * SPAN + 5):
            assert ledger.frame("u", index) == naive.frames.get(index, "never received")
        # A copy has no lock: what a kill at this moment leaves.
        shutil.copytree(folder, Path(scratch) / "killed")
        account = ledger.close_run(RunEnded("u", "end", 2000.0))
        assert account["balanced"] == (account["in_flight"] == 0)
        again = recalled(folder)
        assert again.earlier() == [account]
        assert again.left_out("u") == ledger.left_out("u")
        assert [again.why("u", index) for index in (0, 3, 6, SPAN)] == [ledger.why("u", index) for index in (0, 3, 6, SPAN)]
        assert answer(read_ledger(folder), None, 7, False) == answer(ledger, None, 7, False)

        # Both the process that wrote the run and those that read it hear of what another one makes up for.
        caught = Naive()
        caught.frames, caught.others = {**naive.frames}, naive.others.copy()
        for index in (0, 3, 4, SPAN):
            was = caught.frames.get(index, "never received")
            caught.frames[index] = was if was == "published" else f"published by catching up; it was: {was}"
        number = sum(caught.frames[index] != "published" for index in (0, 3, 4, SPAN))
        assert [catch_up(folder, "u", np.array([0, 3, 4, SPAN])) for _ in range(2)] == [number, 0]
        for one in (ledger, again, recalled(folder), read_ledger(folder)):
            check(one.balance("u"), caught)
            assert [one.frame("u", index) for index in (0, 3, 4, SPAN)] == [caught.frames[index] for index in (0, 3, 4, SPAN)]
        assert ledger.left_out("u") == read_ledger(folder).left_out("u")

        (killed,) = Ledger(["archive"], Path(scratch) / "killed").recall()
        for index, fate in naive.frames.items():
            naive.frames[index] = "dropped at path: crash" if fate == "in flight" else fate
        naive.others["dropped at path: crash"] += naive.others.pop("in flight", 0)
        check(killed, naive)
        assert killed["balanced"]
        assert {name: killed[name] for name in ("missing", "sinks")} == {name: account[name] for name in ("missing", "sinks")}
