"""The demo as a new user types it: ends by itself, every frame published, the places to look printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from streamprior.sinks.archive import read_run, run_folders


def test_the_headless_demo_publishes_every_frame_and_says_where_to_look(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "streamprior.cli", "demo", "--headless", "--frames", "60", "--port", "0", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("live page", "/metrics", "/ledger", "Tiled", "60 of 60 published, ledger balanced", "frames/s"):
        assert words in done.stdout
    for stage in ("decode", "prepare", "classify", "match", "refine", "latency of the mask", "latency of the reconstruction"):
        assert re.search(rf"{stage} .*\d+\.\d+", done.stdout), stage
    (folder,) = run_folders(tmp_path / "archive")
    run = read_run(folder)
    assert run.about["status"] == "complete"
    assert run.frames["index"].to_pylist() == list(range(60))
    # Grown on the same crystal: most masks look like the reference, and the reconstructions explain most of the photons.
    assert run.frames["chi2"].to_numpy().max() < 1
