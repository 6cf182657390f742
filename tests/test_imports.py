"""What an import loads, each in a fresh process, and which way imports point."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("cupy", "torch", "tiled", "bluesky", "numba", "zmq")
ROOT = Path(__file__).parents[1]


def loaded_by(statement: str) -> set[str]:
    """Names of all modules that are loaded after the statement."""
    code = f"{statement}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def of(modules: set[str], *names: str) -> set[str]:
    return {one for one in modules if any(one == name or one.startswith(f"{name}.") for name in names)}


def test_the_package_is_light() -> None:
    assert of(loaded_by("import streamprior"), *HEAVY, "numpy", "h5py", "scipy", "pydantic") == set()


def test_the_daemon_loads_no_training_no_twin_no_gpu_and_no_tiled_client() -> None:
    modules = loaded_by("import streamprior.daemon")
    unwanted = (
        "torch",
        "cupy",
        "minisom",
        "sklearn",
        "kneed",
        "threadpoolctl",
        "streamprior_sim",
        "streamprior_bench",
        "streamprior.train",
    )
    assert of(modules, *unwanted, "tiled.client", "tiled.server", "bluesky", "matplotlib", "pandas") == set()
    assert "numba" in modules, "its kernels are there before a socket opens"


def test_the_command_line_says_its_help_without_a_compiler() -> None:
    modules = loaded_by("import streamprior.cli")
    assert of(modules, *HEAVY, "scipy", "streamprior_sim", "streamprior.daemon") == set()


def test_the_twin_needs_no_daemon() -> None:
    modules = loaded_by("import streamprior_sim.twin, streamprior_sim.emit")
    assert of(modules, "streamprior.daemon", "streamprior.stages", "streamprior.sinks", "tiled") == set()


@pytest.mark.parametrize(
    "module", ["streamprior", "streamprior.daemon", "streamprior.cli", "streamprior.train.grow", "streamprior_sim.twin"]
)
def test_an_import_starts_no_thread_and_opens_no_socket(module: str) -> None:
    code = f"""
import {module}, os, threading
files = [os.path.realpath(f"/proc/self/fd/{{number}}") for number in os.listdir("/proc/self/fd")]
print(threading.active_count(), sum("socket:" in file for file in files))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["1", "0"], done.stderr


def test_imports_point_down_only() -> None:
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
