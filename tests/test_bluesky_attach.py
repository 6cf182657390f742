"""A daemon inside a RunEngine's process: it hears every document of the plans in its block, and has them all safe at its end."""

from __future__ import annotations

import json
import socket
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import bluesky.plans as bp
import numpy as np
import pytest
import structlog
from bluesky import RunEngine
from ophyd.sim import NullStatus, motor

from streamprior.bluesky import StreampriorDevice, attach, in_process
from streamprior.config import Config
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger
from streamprior.prior import save_prior
from streamprior.records import Result, RunStarted
from streamprior.sinks.archive import read_run, run_folders
from tests.builders import diffraction, small_prior
from tests.test_bluesky_device import call, until_looked
from tests.test_bluesky_device import engine as engine

FRAMES = diffraction(count=12)


class Seen:
    """A watch that keeps results."""

    name = "seen"

    def __init__(self) -> None:
        self.results: list[Result] = []

    def begin(self, run: RunStarted) -> None: ...

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        self.results += results
        return list(results)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """A process whose log is set up already: the daemon leaves it as it is."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.fixture
def config(tmp_path: Path) -> Config:
    save_prior(small_prior(), tmp_path / "prior.h5")
    return settings(tmp_path)


def settings(folder: Path, **changes: Any) -> Config:
    given: dict[str, Any] = {
        "prior": folder / "prior.h5",
        "source": {"kind": "documents"},
        "positions": {"x": "motor", "unit": "mm"},
        "archive": {"folder": folder / "archive"},
        "runs": {"late_s": 0.1},
        "http": {"port": 0},
    }
    return Config(**(given | changes))


class Camera:
    """A detector whose pixels ride in the events themselves."""

    name, parent = "image", None

    def __init__(self) -> None:
        self._coming = iter(FRAMES)
        self._pixels = np.zeros((32, 32), np.uint16)

    def trigger(self) -> NullStatus:
        self._pixels = next(self._coming)
        return NullStatus()

    def read(self) -> dict[str, Any]:
        return {"image": {"value": self._pixels, "timestamp": time.time()}}

    def describe(self) -> dict[str, Any]:
        return {"image": {"source": "test", "dtype": "array", "shape": [32, 32], "dtype_numpy": "<u2"}}

    def read_configuration(self) -> dict[str, Any]:
        return {}

    describe_configuration = read_configuration


def test_every_frame_of_the_plans_is_archived_with_its_position(engine: RunEngine, config: Config) -> None:
    seen, image = Seen(), Camera()
    with attach(engine, config, [seen]) as daemon:
        first = engine(bp.scan([image], motor, 0, 4, 5)).run_start_uids
        second = engine(bp.scan([image], motor, 10, 16, 7)).run_start_uids
    assert [(account["series"], account["received"], account["published"]) for account in daemon.ledger.runs()] == [
        (*second, 7, 7),
        (*first, 5, 5),
    ]
    assert daemon.ledger.is_balanced()
    np.testing.assert_array_equal([result.counts for result in seen.results], FRAMES)
    assert [result.position for result in seen.results] == [
        pytest.approx((place * 1e-3, 0.0)) for place in (0, 1, 2, 3, 4, 10, 11, 12, 13, 14, 15, 16)
    ]
    runs = [read_run(folder) for folder in run_folders(config.archive.folder)]
    assert sorted(len(run.classes) for run in runs) == [5, 7]
    assert {run.about["status"] for run in runs} == {"complete"}


def test_a_session_that_is_cut_short_is_drained_and_its_error_passes(engine: RunEngine, config: Config) -> None:
    image = Camera()
    ledgers: list[Ledger] = []

    def session() -> None:
        with attach(engine, config) as daemon:
            ledgers.append(daemon.ledger)
            engine(bp.count([image], num=3))
            raise KeyError("of the session")

    with pytest.raises(KeyError, match="of the session"):
        session()
    (account,) = ledgers[0].runs()
    assert (account["published"], account["balanced"]) == (3, True)


def test_it_hears_nothing_after_its_block(engine: RunEngine, config: Config) -> None:
    image = Camera()
    with attach(engine, config) as daemon:
        engine(bp.count([image]))
    engine(bp.count([image], num=2))
    assert [account["received"] for account in daemon.ledger.runs()] == [1]


def test_a_device_in_the_same_process_reads_its_numbers(engine: RunEngine, config: Config) -> None:
    with attach(engine, config) as daemon:
        device = StreampriorDevice(daemon.url, wait_frames=0, wait_s=30, period_s=0.02)
        call(engine, device.connect())
        try:
            engine(bp.count([Camera()], num=4))
            until_looked(device, lambda: device.numbers.frame == 3)
            seen: list[dict[str, Any]] = []
            engine(bp.count([device]), {"event": [lambda _, event: seen.append(event["data"])]})
        finally:
            call(engine, device.disconnect())
        with urllib.request.urlopen(f"{daemon.url}/status", timeout=10) as answer:
            said = json.load(answer)
    assert (seen[0]["streamprior-frame"], seen[0]["streamprior-caught_up"]) == (3, True)
    assert 0 < seen[0]["streamprior-chi2"] == said["chi2"] < 1


def test_a_configuration_of_another_source_is_refused(engine: RunEngine, config: Config, tmp_path: Path) -> None:
    for source in ({"kind": "dectris_v2"}, {"kind": "documents", "path": tmp_path / "documents.json"}):
        with pytest.raises(ConfigError, match="write kind: documents and no path"), attach(engine, settings(tmp_path, source=source)):
            pass


def test_what_cannot_be_had_is_said_before_the_block_begins(engine: RunEngine, config: Config, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = settings(tmp_path, http={"port": holder.getsockname()[1]})
        with pytest.raises(ConfigError, match=r"http\.port: cannot listen"), attach(engine, taken):
            raise AssertionError("never reached")
    with attach(engine, settings(tmp_path)):
        pass  # the folder of the archive is free again


def test_a_session_that_is_interrupted_while_the_daemon_starts_leaves_nothing_running(
    engine: RunEngine, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = in_process._Running.start

    def interrupted(self: in_process._Running) -> None:
        self._thread.start()
        raise KeyboardInterrupt

    monkeypatch.setattr(in_process._Running, "start", interrupted)
    with pytest.raises(KeyboardInterrupt), attach(engine, config):
        raise AssertionError("never reached")
    monkeypatch.setattr(in_process._Running, "start", started)
    with attach(engine, config):
        pass  # the folder of the archive is free again
