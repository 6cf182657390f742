"""The demo as a new user types it: ends by itself, every frame published, the places to look printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from streamprior.demo import time_spent
from streamprior.sinks.archive import read_run, run_folders


def test_the_headless_demo_publishes_every_frame_and_says_where_to_look(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamprior.cli", "demo", "--headless", "--frames", "60", "--port", "0", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("live page", "/metrics", "/ledger", "Tiled", "60 of 60 published, ledger balanced", "frames/s"):
        assert words in done.stdout
    for choice in ("nothing was left out|frames have a mask alone", "no drift alarm|drift alarm: .*, in [0-9]+ frames"):
        assert re.search(choice, done.stdout), choice
    for stage in ("decode", "prepare", "classify", "match", "refine", "latency of the mask", "latency of the reconstruction"):
        assert re.search(rf"{stage} .*\d+\.\d+", done.stdout), stage
    (folder,) = run_folders(tmp_path / "archive")
    run = read_run(folder)
    assert run.about["status"] == "complete"
    assert run.frames["index"].to_pylist() == list(range(60))
    # Grown on the same crystal: most masks look like the reference, and the reconstructions explain most of the photons.
    assert run.frames["chi2"].to_numpy().max() < 1


def test_frames_that_missed_a_stage_under_overload_do_not_count_for_it() -> None:
    mask = (("classify", 2.0), ("drift", 4.0))
    whole = (("classify", 3.0), ("refine", 7.0), ("drift", 8.0))
    spent = time_spent([(1.0, mask), (1.0, whole), (1.0, mask)])
    assert list(spent.items()) == [("classify", [1.0, 2.0, 1.0]), ("refine", [4.0]), ("drift", [2.0, 1.0, 2.0])]
