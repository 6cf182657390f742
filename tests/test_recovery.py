"""SIGKILL in mid-run -> a restart that goes on: nothing lost in `complete` mode, what was lost listed in `live` mode; real processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from streamprior_sim.documents import zmq_publisher
from streamprior_sim.emit import stream, zmq_sender

from streamprior.config import Config
from streamprior.daemon import build
from streamprior.errors import ConfigError
from streamprior.preflight import Finding, inspect
from streamprior.prior import save_prior
from streamprior.records import Detector
from streamprior.sinks.archive import ArchivedRun, read_run, run_folders
from streamprior.sinks.rows import read_table
from streamprior.wire.dectris_v2 import encode_end, encode_start
from tests.builders import diffraction, small_prior
from tests.test_daemon import Running, daemon, free_port
from tests.test_faults import WIRES, check_clean
from tests.test_path import image
from tests.test_wire_table import FIRST, SHAPE

COUNT = 60
OF_TIME = {"received", "published"}
"""Columns that tell when, and differ from run to run."""


class Hall:
    """A detector that keeps its address, and the daemon beside it, which is killed and started again."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        save_prior(small_prior(), folder / "prior.h5")
        self.folder, self.port = folder, free_port()
        self.settings = {"source": {"address": f"tcp://127.0.0.1:{self.port}"}, "http": {"port": free_port()}} | settings
        self.frames = diffraction(count=COUNT)
        self.spool = folder / "spool"

    @contextmanager
    def daemon(self, **changed: Any) -> Iterator[Running]:
        with daemon(self.folder, **self.settings | changed) as running:
            running.port, running.http = self.port, self.settings["http"]["port"]
            yield running

    @contextmanager
    def starting(self, **changed: Any) -> Iterator[Running]:
        """A daemon that does not listen yet."""
        running = Running(self.folder, self.settings | changed)
        yield running
        running.process.communicate()

    def start(self, series: int = 1) -> bytes:
        detector = Detector(shape=self.frames.shape[1:], energy_ev=9000.0)
        return encode_start(series, f"S{series}", detector, COUNT, self.frames.dtype, {"sample": "gold"})

    def images(self, first: int, end: int, series: int = 1) -> list[bytes]:
        return [image(self.frames[index], index, series) for index in range(first, end)]

    def runs(self) -> list[ArchivedRun]:
        return [read_run(folder) for folder in run_folders(self.folder / "archive")]

    def archived(self) -> set[int]:
        """Frames that the archive has; none of a run that was killed before its first row."""
        tables = [read_table(folder / "frames") for folder in run_folders(self.folder / "archive")]
        return {index for table in tables if table.num_rows for index in table["index"].to_pylist()}

    def recovery(self, mode: str = "complete") -> dict[str, Any]:
        return {"mode": mode, "folder": str(self.spool)}

    def account(self, running: Running, place: int = 0) -> Mapping[str, Any]:
        account: Mapping[str, Any] = running.get("/ledger")["runs"][place]
        return account


@pytest.fixture
def hall(tmp_path: Path) -> Hall:
    """Refinement takes so long that frames are on their way whenever the end comes."""
    return Hall(tmp_path, refine={"iterations": 2000}, overload={"furthest": "nothing"}, archive={"chunk_frames": 4})


def send(running: Running, messages: list[bytes]) -> None:
    with running.sender() as push:
        for message in messages:
            push.send(message)


def kill(running: Running) -> None:
    running.process.kill()
    running.process.communicate()


def received(running: Running, count: int) -> None:
    """Wait until the daemon has read so many frames off its socket."""
    while (running.get("/status")["ledger"] or {"received": 0})["received"] < count:
        time.sleep(0.01)


def undisturbed(tmp_path: Path, hall: Hall) -> ArchivedRun:
    """What the archive holds where nobody was killed."""
    folder = tmp_path / "undisturbed"
    folder.mkdir()
    other = Hall(folder, **{name: value for name, value in hall.settings.items() if name not in ("source", "http", "recovery")})
    with other.daemon() as running:
        send(running, [other.start(), *other.images(0, COUNT), encode_end(1, "S1")])
        running.until("run closed")
        assert running.leave()[0] == 0
    (run,) = other.runs()
    return run


def assert_same(one: ArchivedRun, other: ArchivedRun) -> None:
    np.testing.assert_array_equal(one.classes, other.classes)
    np.testing.assert_array_equal(one.objects, other.objects)
    for name in set(other.frames.column_names) - OF_TIME:
        np.testing.assert_array_equal(one.frames[name].to_numpy(), other.frames[name].to_numpy(), err_msg=name)
    assert {**one.about["metadata"]} == {**other.about["metadata"]}


def test_in_complete_mode_a_kill_costs_no_frame_and_changes_no_value(hall: Hall, tmp_path: Path) -> None:
    with hall.daemon(recovery=hall.recovery()) as running:
        send(running, [hall.start(), *hall.images(0, 35)])
        received(running, 35)
        kill(running)
    assert len(hall.archived()) < 35, "nothing was on its way: this proves nothing"
    with hall.daemon(recovery=hall.recovery()) as running:
        send(running, [*hall.images(35, COUNT), encode_end(1, "S1")])
        running.until("run closed")
        account = hall.account(running)
        assert (account["received"], account["published"], account["missing"], account["balanced"]) == (COUNT, COUNT, 0, True)
        assert (account["dropped"], account["quarantined"], account["reason"]) == ({}, {}, "end")
        assert running.leave()[0] == 0
    (run,) = hall.runs()
    assert run.about["status"] == "complete"
    assert_same(run, undisturbed(tmp_path, hall))
    assert not [*hall.spool.glob("*/*")], "nothing is kept once all is archived"


def test_in_live_mode_the_run_goes_on_and_what_was_lost_is_listed(hall: Hall) -> None:
    with hall.daemon(recovery=hall.recovery("live")) as running:
        send(running, [hall.start(), *hall.images(0, 35)])
        received(running, 35)
        kill(running)
    with hall.daemon(recovery=hall.recovery("live")) as running:
        send(running, [*hall.images(35, COUNT), encode_end(1, "S1")])
        running.until("run closed")
        account = hall.account(running)
        told = running.get("/ledger?left_out")["left_out"]
        assert running.leave()[0] == 0
    (run,) = hall.runs()
    archived = set(run.frames["index"].to_pylist())
    assert (account["balanced"], account["reason"], run.about["metadata"]["user_data"]) == (True, "end", {"sample": "gold"})
    assert set(range(35, COUNT)) <= archived
    lost = {index for one in told for index in range(one["first"], one["last"] + 1)}
    assert lost == set(range(COUNT)) - archived
    assert account["dropped"].get("path/crash", 0) + account["missing"] == len(lost)


@pytest.mark.parametrize("mode", ["live", "complete"])
def test_a_run_of_which_nothing_comes_any_more_is_closed_as_interrupted_by_the_next(hall: Hall, mode: str) -> None:
    with hall.daemon(recovery=hall.recovery(mode)) as running:
        send(running, [hall.start(), *hall.images(0, 35)])
        received(running, 35)
        while hall.account(running)["published"] < 35:
            time.sleep(0.01)
        kill(running)
    with hall.daemon(recovery=hall.recovery(mode)) as running:
        send(running, [hall.start(2), *hall.images(0, COUNT, 2), encode_end(2, "S2")])
        running.until("run closed")
        running.until("run closed")
        second, first = hall.account(running, 0), hall.account(running, 1)
        assert running.leave()[0] == 0
    assert (first["series"], first["reason"], first["published"], first["balanced"]) == ("S1", "interrupted", 35, True)
    assert (second["series"], second["reason"], second["published"], second["balanced"]) == ("S2", "end", COUNT, True)
    assert [run.about["status"] for run in hall.runs()] == ["interrupted", "complete"]


def test_other_settings_begin_a_run_of_their_own_with_what_the_start_message_said(hall: Hall) -> None:
    with hall.daemon(recovery=hall.recovery()) as running:
        send(running, [hall.start(), *hall.images(0, 35)])
        received(running, 35)
        while hall.account(running)["published"] < 4:
            time.sleep(0.01)
        kill(running)
    before = hall.archived()
    with hall.daemon(recovery=hall.recovery(), refine={"iterations": 7}) as running:
        send(running, [*hall.images(35, COUNT), encode_end(1, "S1")])
        running.until("run closed")
        assert running.leave()[0] == 0
    first, second = hall.runs()
    assert first.about["status"] == "interrupted"
    assert set(first.frames["index"].to_pylist()) == before
    assert before | set(second.frames["index"].to_pylist()) == set(range(COUNT))
    assert second.about["metadata"] == first.about["metadata"]
    assert second.about["provenance"] != first.about["provenance"]


def test_a_daemon_that_is_killed_again_and_again_still_loses_nothing(hall: Hall, tmp_path: Path) -> None:
    with hall.daemon(recovery=hall.recovery()) as running:
        send(running, [hall.start(), *hall.images(0, 20)])
        received(running, 20)
        while hall.account(running)["published"] < 4:
            time.sleep(0.01)
        kill(running)
    with hall.starting(recovery=hall.recovery()) as running:
        running.until("warming up")
        kill(running)
    for first in (20, 30):
        with hall.daemon(recovery=hall.recovery()) as running:
            send(running, hall.images(first, first + 10))
            received(running, first + 10)
            kill(running)
    with hall.daemon(recovery=hall.recovery()) as running:
        send(running, [*hall.images(40, COUNT), encode_end(1, "S1")])
        running.until("run closed")
        account = hall.account(running)
        assert running.leave()[0] == 0
    assert (account["received"], account["published"], account["balanced"]) == (COUNT, COUNT, True)
    (run,) = hall.runs()
    assert_same(run, undisturbed(tmp_path, hall))


@pytest.mark.parametrize("name", ["v1", "documents"])
def test_on_every_wire_a_series_that_is_cut_by_a_kill_is_one_run_with_all_its_frames_and_positions(tmp_path: Path, name: str) -> None:
    """Parts of one image before the kill and after it; documents, of which the frames' positions come apart from the frames."""
    wire = WIRES[name]
    mode = {"recovery": {"mode": "complete"}} if name == "v1" else {"positions": {"x": "x", "y": "y"}}
    hall = Hall(tmp_path, refine={"iterations": 2000}, **mode)
    save_prior(small_prior(SHAPE), tmp_path / "prior.h5")
    hall.settings["source"] |= {"kind": wire.kind.replace("-", "_")}
    messages = [*stream(FIRST, None, wire=wire, unique_id="S1", series=1)]
    cut = len(messages) * 2 // 3
    for part, last in ((messages[:cut], False), (messages[cut:], True)):
        with hall.daemon(recovery={"folder": str(hall.spool)} | hall.settings.get("recovery", {})) as running:
            address = f"tcp://127.0.0.1:{hall.port}"
            with zmq_publisher(address) if name == "documents" else zmq_sender(address) as sender:
                for message in part:
                    sender.send(message)
            if last:
                running.until("run closed")
                account = hall.account(running)
                assert running.leave()[0] == 0
            else:
                all_read(running)
                kill(running)
    (run,) = hall.runs()
    check_clean(account, run.frames)
    if name == "documents":
        assert not np.isnan(run.frames["position_x"].to_numpy()).any()


def all_read(running: Running) -> None:
    """Wait until nothing more has come for a second, of what was sent."""
    count, since = -1, time.monotonic()
    while time.monotonic() < since + 1.0 or count < 1:
        account = running.get("/status")["ledger"]
        if account is not None and account["received"] != count:
            count, since = account["received"], time.monotonic()
        time.sleep(0.05)


def test_the_check_looks_at_the_spools_folder(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")

    def found(**recovery: Any) -> Finding:
        config = Config(prior=tmp_path / "prior.h5", archive={"folder": tmp_path / "archive"}, recovery={"folder": tmp_path} | recovery)
        return next(one for one in inspect(config) if one.what == "recovery")

    assert "lacks what was on its way" in found().sentence
    good = found(mode="complete", most_mb=64)
    assert good.fine
    assert str(tmp_path) in good.sentence
    assert "lower it" in found(mode="complete", most_mb=2**40).sentence
    (tmp_path / "file").touch()
    assert "cannot be written" in found(mode="complete", folder=tmp_path / "file").sentence


def test_a_channel_that_comes_over_no_socket_of_ours_cannot_be_kept(tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    config = Config(prior=tmp_path / "prior.h5", source={"kind": "pva", "pv": "13SIM1"}, recovery={"mode": "complete"})
    with pytest.raises(ConfigError, match=r"recovery\.mode: complete keeps messages of a ZMQ socket"):
        build(config)
