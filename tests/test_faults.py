"""Every fault that beamlines report -> the daemon as a process: what is counted and said of it, what is kept, and a whole run behind it.

The twin sends a series with the fault and a clean one, over a real socket. Table of it for people: docs/faults.md. What befalls the world
instead of the wire is elsewhere: disks in test_space.py, Tiled in test_outage.py, kills in test_daemon.py, keys in test_security.py.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import zmq
from prometheus_client.parser import text_string_to_metric_families
from streamprior_sim.documents import documents, zmq_publisher
from streamprior_sim.emit import Message, Sender, stream, zmq_sender
from streamprior_sim.faults import KINDS, Cell, Fault, Trouble, table
from streamprior_sim.twin import Prerendered, Recording
from streamprior_sim.wires import Wire

from streamprior.errors import WireError
from streamprior.metrics import DROP_REASONS
from streamprior.prior import save_prior
from streamprior.records import Flag
from streamprior.sinks.archive import read_about
from streamprior.sinks.rows import read_table
from streamprior.wire.dectris_v2 import encode_image
from tests.builders import small_prior
from tests.test_attacks import GROWTH_MB, peak_mb
from tests.test_daemon import Running, daemon, free_port
from tests.test_foreign_producers import until
from tests.test_path import DATE
from tests.test_wire_table import FIRST, FRAMES, SECOND, SHAPE

ROOT = Path(__file__).parents[1]
LIMIT_MB = 1
WIRES = {"v2": Wire(), "v1": Wire(kind="dectris-v1", framing="parts"), "documents": Wire(kind="documents", encoding="none")}
CELLS = [(name, cell) for name, wire in WIRES.items() for cell in table(FRAMES) if cell.wire == wire and cell.fault is not None]


class Seen(NamedTuple):
    """What a daemon shows since it was looked at before: accounts of new runs, oldest first; the log; what counters grew by."""

    accounts: list[Mapping[str, Any]]
    log: list[Mapping[str, Any]]
    counted: Counter[str]

    def total(self, key: str) -> int:
        return sum(one[key] for one in self.accounts)

    def told(self, event: str) -> list[Mapping[str, Any]]:
        return [one for one in self.log if one["event"] == event]


class Bench:
    """A daemon that gets series after series, and the sender that it gets them from."""

    def __init__(self, running: Running, wire: Wire, sender: Sender) -> None:
        self.running, self.wire, self.sender = running, wire, sender
        self.number = 0
        self._known: set[str] = set()
        self._counted = Counter(counters(running))
        self._read = len(running.log)

    def series(self, recording: Recording, faults: Sequence[Fault] = ()) -> list[Message]:
        """The messages of one more series."""
        self.number += 10  # a series that changes on its way takes the number behind its own
        trouble = Trouble(tuple(faults), seed=1, oversized_bytes=LIMIT_MB * 2**20 + 1)
        return [*stream(recording, None, wire=self.wire, trouble=trouble, unique_id=f"S{self.number}", series=self.number)]

    def send(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.sender.send(message)

    def seen(self) -> Seen:
        """Once every run that opened is closed, the last of them by the clean series behind the fault."""
        log = self.running.log
        while sum(one["event"] == "run closed" for one in log) < sum(one["event"] == "run opened" for one in log) or self._behind():
            self.running.until("run closed")
        accounts = [one for one in reversed(self.running.get("/ledger")["runs"]) if one["run"] not in self._known]
        self._known |= {one["run"] for one in accounts}
        counted = counters(self.running)
        grown, self._counted = Counter(counted) - self._counted, Counter(counted)
        new, self._read = log[self._read :], len(log)
        return Seen(accounts, new, grown)

    def _behind(self) -> bool:
        """The newest series has not opened its run yet."""
        opened = [one["series"] for one in self.running.log[self._read :] if one["event"] == "run opened"]
        newest = str(self.number) if self.wire.kind == "dectris-v1" else f"S{self.number}"
        return opened[-1:] != [newest]


def counters(running: Running) -> dict[str, float]:
    """Every counter by its name and labels."""
    return {
        " ".join((sample.name.removeprefix("streamprior_"), *sorted(sample.labels.values()))): sample.value
        for family in text_string_to_metric_families(running.get("/metrics"))
        for sample in family.samples
        if family.type == "counter"
    }


@contextmanager
def bench(folder: Path, name: str, environment: Mapping[str, str] | None = None, **settings: Any) -> Iterator[Bench]:
    """A daemon on a wire; it ends with exit code 0 and a balanced ledger."""
    wire = WIRES[name]
    save_prior(small_prior(SHAPE), folder / "prior.h5")
    source = {"kind": wire.kind.replace("-", "_"), "max_message_mb": LIMIT_MB}
    documents = {"positions": {"x": "x", "y": "y", "wait_s": 0.2}} if name == "documents" else {}
    settings = {"overload": {"late_s": 10}} | settings  # another process on these cores is no fault
    with daemon(folder, environment, source=source, refine={"iterations": 1}, **documents, **settings) as running:
        address = f"tcp://127.0.0.1:{running.port}"
        with zmq_publisher(address) if name == "documents" else zmq_sender(address) as sender:
            yield Bench(running, wire, sender)
        code, printed = running.leave()
        assert code == 0, printed


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Bench]]:
    """One daemon a wire for all faults, started when its first one comes."""
    with ExitStack() as stack:

        @cache
        def one(name: str) -> Bench:
            return stack.enter_context(bench(tmp_path_factory.mktemp(name), name))

        yield one


def archived(running: Running, accounts: Iterable[Mapping[str, Any]]) -> dict[str, pa.Table]:
    """uid -> the rows of these runs in the archive. A run's arrays are as long as its highest index says, more than memory may hold."""
    folders = [folder for one in accounts for folder in (running.folder / "archive").glob(f"*-{one['run'][:8]}")]
    return {read_about(folder)["uid"]: read_table(folder / "frames") for folder in folders}


def check_clean(account: Mapping[str, Any], rows: pa.Table) -> None:
    """A run of which nothing was lost, left out or refused."""
    assert (account["received"], account["published"], account["missing"]) == (FRAMES, FRAMES, 0)
    assert (account["dropped"], account["quarantined"], account["reason"], account["balanced"]) == ({}, {}, "end", True)
    assert rows["index"].to_pylist() == list(range(FRAMES))


@pytest.mark.parametrize(("name", "cell"), CELLS, ids=lambda one: one.fault if isinstance(one, Cell) else one)
def test_a_fault_on_the_wire_is_counted_by_its_reason_and_the_next_run_is_whole(
    name: str, cell: Cell, benches: Callable[[str], Bench]
) -> None:
    shared, told = benches(name), cell.forecast
    shared.send(shared.series(FIRST, cell.faults))
    shared.send(shared.series(SECOND))
    seen = shared.seen()
    *struck, clean = seen.accounts
    runs = archived(shared.running, seen.accounts)

    check_clean(clean, runs[clean["run"]])
    assert all(one["balanced"] and one["residue"] == 0 for one in struck)
    assert sum(one["published"] for one in struck) == len(told.published) == sum(len(runs[one["run"]]) for one in struck)
    assert sum(one["received"] for one in struck) == told.received
    assert sum(one["missing"] for one in struck) == told.missing == seen.counted["frames_missing_total"]
    assert sum((Counter(one["quarantined"]) for one in struck), Counter()) == told.quarantined
    assert sum((Counter(one["dropped"]) for one in struck), Counter()) == Counter({"decode/duplicate": told.duplicates})

    for reason, count in told.quarantined.items():
        assert seen.counted[f"frames_quarantined_total {reason}"] == count
        assert [one["reason"] for one in seen.told("message quarantined")] == [reason] * count
    assert seen.counted["frames_dropped_total decode duplicate"] == told.duplicates
    assert not seen.told("degradation level changed")


def test_a_second_receiver_on_the_stream_is_said_and_what_it_took_is_missing(benches: Callable[[str], Bench]) -> None:
    shared = benches("v2")
    with zmq.Context() as context, context.socket(zmq.PULL) as other, context.socket(zmq.PUSH) as detector:
        detector.setsockopt(zmq.LINGER, 5000)
        other.bind("tcp://127.0.0.1:*")
        # PUSH deals in turn between all it is connected to: every other message is the second receiver's.
        detector.connect(f"tcp://127.0.0.1:{shared.running.port}")
        detector.connect(other.getsockopt_string(zmq.LAST_ENDPOINT))
        for message in shared.series(Prerendered(FIRST, FRAMES, 120)):
            detector.send(message)
        said = shared.running.until(
            "only every n-th frame comes: another receiver takes the rest, as a PUSH socket deals them in turn; stop that one"
        )
        until(lambda: shared.running.get("/ledger")["runs"][0]["received"] == 60, "half of the frames never came")
    shared.send(shared.series(SECOND))
    seen = shared.seen()
    struck, clean = seen.accounts
    assert (said["n"], said["series"]) == (2, struck["series"])
    assert (struck["received"], struck["published"], struck["missing"], struck["balanced"]) == (60, 60, 60, True)
    assert seen.counted["frames_missing_total"] == 60
    check_clean(clean, archived(shared.running, [clean])[clean["run"]])


def test_a_leap_in_the_index_that_a_run_can_hold_costs_the_frames_between_and_no_memory(benches: Callable[[str], Bench]) -> None:
    shared = benches("v2")
    before = peak_mb(shared.running)
    messages = shared.series(FIRST)
    leapt = encode_image(shared.number, f"S{shared.number}", 9_000_000, FIRST.counts[0], 0.0, DATE, 0.0, {}, None)
    shared.send([*messages[:6], leapt, *messages[6:]])
    shared.send(shared.series(SECOND))
    struck, clean = shared.seen().accounts
    assert (struck["received"], struck["published"], struck["balanced"]) == (FRAMES + 1, FRAMES + 1, True)
    assert shared.running.get(f"/ledger?run={struck['run']}&frame=9000000")["fate"] == "published"
    assert archived(shared.running, [struck])[struck["run"]]["index"].to_pylist() == [*range(FRAMES), 9_000_000]
    check_clean(clean, archived(shared.running, [clean])[clean["run"]])
    assert peak_mb(shared.running) - before < GROWTH_MB


CLOCK = """
import pathlib, time
true, file = time.time, pathlib.Path({file!r})
def wrong():
    return true() + float(file.read_text())
time.time = wrong
"""
"""Loaded by the interpreter before anything else (sitecustomize): the process's clock goes as far wrong as a file says."""


def test_a_jump_of_the_hosts_clock_in_mid_run_costs_nothing(tmp_path: Path) -> None:
    clock = tmp_path / "clock"
    clock.write_text("0")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(CLOCK.format(file=str(clock)))
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")))}
    with bench(tmp_path, "v2", environment) as one:
        for ahead_s in (3600, 0):  # an hour on, then an hour back
            messages = one.series(FIRST)
            one.send(messages[:5])
            until(lambda: one.running.get("/status")["ledger"] and newest(one.running)["published"] == 4, "half a run is not archived")
            (tmp_path / "new").write_text(str(ahead_s))
            (tmp_path / "new").replace(clock)
            one.send(messages[5:])
            one.send(one.series(SECOND))
            seen = one.seen()
            struck, clean = seen.accounts
            assert clean["opened"] - struck["opened"] == pytest.approx(3600 if ahead_s else -3600, abs=300)
            for account in seen.accounts:
                check_clean(account, archived(one.running, [account])[account["run"]])
            assert not seen.told("degradation level changed")
        assert latencies(one.running)["count"] == 3 * 4 * FRAMES
        assert 0 <= latencies(one.running)["sum"] < 600


def newest(running: Running) -> Mapping[str, Any]:
    account: Mapping[str, Any] = running.get("/ledger")["runs"][0]
    return account


def latencies(running: Running) -> Counter[str]:
    """Observations of all outputs, and their sum in seconds."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(running.get("/metrics")):
        for sample in family.samples if family.name == "streamprior_latency_seconds" else ():
            found[sample.name.rpartition("_")[2]] += sample.value
    return found


def test_positions_that_come_behind_the_wait_are_filled_in_and_the_next_run_is_whole(tmp_path: Path) -> None:
    port = free_port()
    unplaced = [Fault("position_missing", index) for index in range(FRAMES)]
    lagging = {"x": "x", "y": "y", "wait_s": 0.3, "attach": "bind", "address": f"tcp://127.0.0.1:{port}"}
    with bench(tmp_path, "v2", positions=lagging, runs={"late_s": 5}) as one, zmq_publisher(f"tcp://127.0.0.1:{port}") as scan:
        start, descriptor, *readings = documents(FIRST, None)
        for document in (start, descriptor):
            scan.send(document)
        *frames, end = one.series(FIRST, unplaced)
        one.send(frames)
        until(lambda: [run["published"] for run in one.running.get("/ledger")["runs"]] == [FRAMES], "frames wait without a bound")
        (before,) = archived(one.running, [newest(one.running)]).values()
        assert all(before["flags"].to_numpy() & Flag.NO_POSITION), "the user sees which frames have none yet"
        for document in readings:
            scan.send(document)
        one.send([end])
        one.running.until("run closed")
        for document in documents(SECOND, None):
            scan.send(document)
        one.send(one.series(SECOND, unplaced))
        seen = one.seen()
        runs = archived(one.running, seen.accounts)
        for account in seen.accounts:
            check_clean(account, runs[account["run"]])
            rows = runs[account["run"]]
            np.testing.assert_allclose(rows["position_x"].to_numpy(), np.arange(FRAMES) * 1e-6)
            assert not any(rows["flags"].to_numpy() & Flag.NO_POSITION)


PAGE = (ROOT / "docs" / "faults.md").read_text()


def test_the_page_on_faults_names_every_fault_of_the_twin_and_every_reason_of_the_ledger() -> None:
    dropped = {f"{stage}/{reason}" for stage, reason in DROP_REASONS} | {"path/crash"}
    named = set(re.findall(r"`([^`]+)`", PAGE))
    assert not (set(KINDS) | set(WireError.REASONS) | dropped) - named
    assert {one for one in named if re.fullmatch(r"[a-z]+/[a-z_]+", one)} == dropped


def test_the_page_on_faults_quotes_the_log_and_the_alerts_as_they_are() -> None:
    code = "\n".join(file.read_text() for file in (ROOT / "streamprior").rglob("*.py"))
    quoted = re.findall(r'"([^"]{8,})"', re.sub(r"`[^`]*`", "", PAGE))
    assert len(quoted) > 10
    assert not [one for one in quoted if one not in code]
    alerts = re.findall(r"\bStreamprior[A-Z]\w+", PAGE)
    rules = (ROOT / "deploy" / "prometheus-rules.yaml").read_text()
    assert alerts
    assert not [one for one in alerts if f"alert: {one}\n" not in rules]
