"""Fixtures that every test file shares: measured data, a state folder of the test run's own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tests.card_fixture import card as card
from tests.card_fixture import card_of_the_session as card_of_the_session
from tests.tiled_fixture import tiled_server as tiled_server

# Kernels and FFT plans are cached between runs in a folder beside the developer's own, so that a test never changes that one.
os.environ.setdefault("STREAMPRIOR_STATE", str(Path(tempfile.gettempdir()) / "streamprior-test-state"))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Folder of the measured data and recorded messages; skips where it is absent."""
    folder = Path(os.environ.get("STREAMPRIOR_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no measured data at {folder}; set STREAMPRIOR_DATA to their folder")
    return folder
