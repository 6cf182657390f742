"""A simulated beamtime, unattended: three grid scans, a drift that pauses the plan, and everything found afterwards."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from streamprior.sinks.archive import ArchivedRun, read_run, run_folders
from streamprior.sinks.bluesky_run import runs_path
from streamprior.sinks.embedded import EmbeddedTiled, embedded_tiled

pytest.importorskip("ophyd_async", reason="the extra bluesky is not installed")
pytest.importorskip("databroker", reason="the extra databroker is not installed")

pytestmark = [
    # databroker and the clients it stands on are older than the libraries below them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

SIDE = 20
POINTS = SIDE * SIDE


class Over(NamedTuple):
    """What a beamtime printed, its runs by the number of the scan, and the uids of the scans in their order."""

    code: int
    printed: str
    folder: Path
    runs: dict[int, ArchivedRun]
    uids: list[str]


@pytest.fixture(scope="module")
def over(tmp_path_factory: pytest.TempPathFactory) -> Over:
    """One beamtime for all tests here: 3 scans of 400 points, with the demo's own command."""
    folder = tmp_path_factory.mktemp("beamtime")
    command = [sys.executable, "-m", "streamprior.cli", "beamtime", "gold_balls", "--headless", "--port", "0", "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    uids = re.findall(r"scan \d begins: (\S+)", done.stdout)
    runs = {uids.index(run.about["metadata"]["start"]["uid"]) + 1: run for run in map(read_run, run_folders(folder / "archive"))}
    return Over(done.returncode, done.stdout + done.stderr, folder, runs, uids)


@pytest.fixture(scope="module")
def tiled(over: Over) -> Iterator[EmbeddedTiled]:
    """The beamtime's catalog, served again."""
    with embedded_tiled(over.folder / "tiled", [over.folder / "archive", over.folder / "detector"]) as server:
        yield server


@pytest.fixture
def root(tiled: EmbeddedTiled) -> Iterator[Any]:
    from tiled.client import from_uri

    client = from_uri(tiled.uri, api_key=tiled.api_key)
    yield client
    client.context.close()


def test_it_ends_by_itself_with_every_frame_of_every_scan(over: Over) -> None:
    assert over.code == 0, over.printed
    assert sorted(over.runs) == [1, 2, 3]
    for run in over.runs.values():
        assert run.frames["index"].to_pylist() == list(range(POINTS))
        assert len(run.classes) == POINTS
        assert run.about["status"] == "complete"
    assert over.printed.count("0 quarantined + 0 in flight; 0 missing; balanced") == 3


def test_every_result_carries_the_position_that_its_motors_had(over: Over) -> None:
    for run in over.runs.values():
        start = run.about["metadata"]["start"]
        assert start["plan_name"] == "grid_scan"
        (y_first, y_last), (x_first, x_last) = start["extents"]  # millimetres
        x, y = (run.frames[name].to_numpy() * 1e3 for name in ("position_x", "position_y"))
        np.testing.assert_allclose(x, np.tile(np.linspace(x_first, x_last, SIDE), SIDE), atol=1e-9)
        np.testing.assert_allclose(y, np.repeat(np.linspace(y_first, y_last, SIDE), SIDE), atol=1e-9)


def test_drift_in_the_second_scan_pauses_the_plan_and_it_goes_on_after_the_recovery(over: Over) -> None:
    said = [line.split(" ", 1)[1] for line in over.printed.splitlines() if re.match(r"\d\d:\d\d:\d\d ", line)]
    order = [
        next((n for n, line in enumerate(said) if line.startswith(words)), -1)
        for words in (
            "scan 2 begins",
            "the beam is disturbed",
            "the plan is paused: drift alarm: flux",
            "the beam has recovered",
            "the plan goes on",
            "scan 2 is over: success",
        )
    ]
    assert -1 not in order
    assert order == sorted(order), said
    alarms = {
        number: [index for index, on in enumerate(run.frames["alarms"].to_pylist()) if "flux" in on] for number, run in over.runs.items()
    }
    assert alarms[1] == alarms[3] == []
    assert alarms[2]
    assert min(alarms[2]) >= 100
    assert max(alarms[2]) < POINTS - 1


def test_raw_run_and_results_are_found_in_tiled_by_the_scan(over: Over, root: Any) -> None:
    from tiled.queries import Key

    for number, uid in enumerate(over.uids, 1):
        (raw,) = root["raw"].search(Key("start.scan_id") == number).values()
        (results,) = root["streamprior"].search(Key("start.uid") == uid).values()
        assert raw.metadata["start"]["uid"] == results.metadata["start"]["uid"] == uid
        assert raw.metadata["stop"]["exit_status"] == "success"
        np.testing.assert_array_equal(results["classes"][:], over.runs[number].classes)
        assert results["frames"].read()["position_x"].notna().all()


def test_the_raw_frames_in_tiled_are_those_that_were_classified(over: Over, root: Any) -> None:
    """The detector's file, read through Tiled, has the flux that our results say."""
    from tiled.queries import Key

    (raw,) = root["raw"].search(Key("start.uid") == over.uids[0]).values()
    frames = raw["primary"]["twin"][:]
    assert frames.shape == (POINTS, 104, 104)
    flux = frames.sum(axis=(1, 2), dtype=float)
    ours = over.runs[1].frames["flux"].to_numpy()
    assert np.corrcoef(flux, ours)[0, 1] > 0.999


def test_databroker_reads_the_numbers_of_each_scan(over: Over, root: Any) -> None:
    from tiled.queries import Eq

    runs = root["/".join(runs_path("streamprior"))]
    for number, uid in enumerate(over.uids, 1):
        (run,) = runs.search(Eq("raw", uid)).values()
        table = run["primary"].read()
        ours = over.runs[number].frames
        np.testing.assert_array_equal(table["chi2"], ours["chi2"].to_numpy())
        np.testing.assert_array_equal(table["position_x"], ours["position_x"].to_numpy())
        assert run.stop["num_events"]["primary"] == POINTS
        assert json.dumps(run.start["scan_id"]) == str(number)
