"""`streamprior catchup`: what overload left out is computed from the file, and the run is as if nothing had been left out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from streamprior import catchup
from streamprior.cli import app
from streamprior.config import state_folder
from streamprior.fates import Fates, forget
from streamprior.ladder import Ladder
from streamprior.ledger import Ledger
from streamprior.prior import save_prior
from streamprior.records import Flag
from streamprior.sinks.archive import Archive, ArchivedRun, read_run, run_folders
from tests.builders import diffraction, make_recipe, small_prior
from tests.test_path import House, series

COUNT = 40


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(catchup, "_BATCH", 3)  # so that several workers have something to do
    save_prior(small_prior(), tmp_path / "prior.h5")
    np.save(tmp_path / "scan.npy", diffraction(count=COUNT))
    (tmp_path / "daemon.yaml").write_text("prior: prior.h5\nrefine: {iterations: 5}\ncompute: {workers: 3}\n")
    return tmp_path


def archived(place: Path, name: str, ladder: Ladder | None) -> Path:
    """Folder of a run that went through the path with this ladder."""
    return watched(place, name, ladder)[0]


def watched(place: Path, name: str, ladder: Ladder | None) -> tuple[Path, Ledger]:
    """The same, and the ledger of the process that wrote it."""
    prior = small_prior()
    columns_of_drift = make_recipe(prior).drift_columns
    archive = Archive(
        place / name, prior, {"prior_hash": prior.content_hash}, lambda folder: None, drift_columns=columns_of_drift, chunk_frames=8
    )
    sinks: Any = [archive]
    house = House(series(diffraction(count=COUNT)), sinks, prior, ladder=ladder, ledger=state_folder() / "ledger").run()
    (folder,) = run_folders(place / name)
    return folder, house.ledger


def behind(furthest: Any) -> Ladder:
    """A ladder on its first rung that leaves out anything; its clock stands still, so it stays there however slow the machine is."""
    ladder = Ladder(furthest, late_s=1.0, calm_s=2.0, refines=furthest != "masks", clock=lambda: 0.0)
    ladder.observe(5.0)
    return ladder


def columns(run: ArchivedRun) -> dict[str, list[Any]]:
    """What does not depend on the moment at which a frame came or was written."""
    return {name: run.frames[name].to_pylist() for name in run.frames.column_names if name not in ("received", "published")}


def call(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [*map(str, words)])
    return done.exit_code, done.output + (done.stderr if done.stderr_bytes else "")


@pytest.mark.parametrize("furthest", ["refinement", "masks"])
def test_the_ledger_hears_what_was_caught_up_with_and_keeps_what_had_become_of_it(place: Path, furthest: str) -> None:
    folder, ledger = watched(place, "behind", behind(furthest))
    (before,) = ledger.runs()
    assert before["published"] == (COUNT if furthest == "refinement" else COUNT // 2)
    was = "published without refinement: overload" if furthest == "refinement" else "dropped at classify: overload"
    assert ledger.frame(before["run"], 7) == was
    code, said = call("catchup", folder, place / "scan.npy", "--config", place / "daemon.yaml")
    number = COUNT // 2 if furthest == "refinement" else COUNT
    assert (code, f"was told of {number} frames" in " ".join(said.split())) == (0, True)
    (after,) = ledger.runs()  # of the process that wrote the run
    assert (after["published"], after["caught_up"], after["received"]) == (COUNT, number, COUNT)
    assert (after["unrefined"], after["dropped"], after["balanced"]) == ({}, {}, True)
    assert ledger.frame(before["run"], 7) == f"published by catching up; it was: {was}"
    assert ledger.left_out(before["run"])["left_out"] == []
    assert f"of these {number} by catching up" in call("ledger", "--folder", state_folder(), "--run", before["run"])[1]


def test_a_ledger_that_cannot_be_told_is_said_and_told_by_the_next_call(place: Path) -> None:
    folder, ledger = watched(place, "behind", behind("refinement"))
    (account,) = ledger.runs()
    command = ("catchup", folder, place / "scan.npy", "--config", place / "daemon.yaml")
    held = Fates(state_folder() / "ledger" / f"{account['run']}.fates", "again")
    code, said = call(*command)
    assert (code, "is not closed in the ledger" in " ".join(said.split())) == (0, True)
    assert ledger.runs() == [account]
    held.release()
    code, said = call(*command)
    assert (code, f"was told of {COUNT // 2} frames" in " ".join(said.split())) == (0, True)
    forget(state_folder() / "ledger" / f"{account['run']}.fates")
    code, said = call(*command)
    assert (code, "keeps no run" in " ".join(said.split())) == (0, True)


@pytest.mark.parametrize("furthest", ["refinement", "masks"])
def test_a_run_that_was_behind_is_afterwards_as_one_that_was_not(place: Path, furthest: str) -> None:
    whole = read_run(archived(place, "whole", None))
    folder = archived(place, "behind", behind(furthest))
    before = read_run(folder)
    assert before.frames.num_rows == (COUNT if furthest == "refinement" else COUNT // 2)
    code, said = call("catchup", folder, place / "scan.npy", "--config", place / "daemon.yaml")
    assert code == 0, said
    after = read_run(folder)
    np.testing.assert_array_equal(after.classes, whole.classes)
    np.testing.assert_array_equal(after.objects, whole.objects)
    for name, values in columns(whole).items():
        if name in ("detector_time", "alarms") and furthest == "masks":
            continue  # a frame that was dropped left no time and raised no alarm
        np.testing.assert_array_equal(np.array(columns(after)[name]), np.array(values), err_msg=name)
    assert not any(flags & Flag.NOT_REFINED for flags in after.frames["flags"].to_pylist())
    assert after.about["caught_up"]["frames"] == (COUNT // 2 if furthest == "refinement" else COUNT)
    assert after.about["status"] == "complete"
    code, said = call("catchup", folder, place / "scan.npy", "--config", place / "daemon.yaml")
    assert (code, "0 frames have a mask and no object, 0 are absent" in said) == (0, True)


def test_the_file_of_another_run_changes_nothing(place: Path) -> None:
    folder = archived(place, "behind", behind("refinement"))
    before = read_run(folder)
    np.save(place / "other.npy", diffraction(count=COUNT, seed=9, photons=200))
    code, said = call("catchup", folder, place / "other.npy", "--config", place / "daemon.yaml")
    assert code == 2
    assert "gives another mask than frame" in " ".join(said.split())
    for name, values in columns(read_run(folder)).items():
        np.testing.assert_array_equal(np.array(values), np.array(columns(before)[name]), err_msg=name)


def test_what_cannot_be_caught_up_with_is_said(place: Path) -> None:
    folder = archived(place, "behind", behind("refinement"))
    np.save(place / "short.npy", diffraction(count=COUNT // 2))
    save_prior(small_prior(normaliser=3.0), place / "another.h5")
    (place / "another.yaml").write_text("prior: another.h5\n")
    (place / "off.yaml").write_text("prior: prior.h5\nrefine: {enabled: false}\n")
    for file, config, words in (
        ("short.npy", "daemon.yaml", f"has {COUNT // 2} frames"),
        ("scan.npy", "another.yaml", "was made with prior"),
        ("scan.npy", "off.yaml", "refines no frame"),
    ):
        code, said = call("catchup", folder, place / file, "--config", place / config)
        assert code == 2
        assert words in " ".join(said.split())
    code, said = call("catchup", place, place / "scan.npy", "--config", place / "daemon.yaml")
    assert (code, "is no archived run" in " ".join(said.split())) == (2, True)


def test_however_many_frames_are_lacking_two_batches_a_worker_are_in_memory_and_they_come_in_order() -> None:
    made, taken = [], 0

    def batches() -> Iterator[Any]:
        for number in range(50):
            made.append(number)
            yield number

    for taken, (batch, result) in enumerate(catchup._in_order(lambda number: 10 * number, batches(), workers=3)):  # type: ignore[arg-type, return-value]
        assert (batch, result) == (taken, 10 * taken)
        assert len(made) - taken <= 6
    assert taken == 49
