"""A real Tiled in a process of its own, one for the test session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from streamprior.sinks.embedded import embedded_tiled


class RunningTiled(NamedTuple):
    """uri without the key; readable is a folder whose files this server may be given."""

    uri: str
    api_key: str
    readable: Path


@pytest.fixture(scope="session")
def tiled_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningTiled]:
    """A Tiled that runs as long as the test session; starting it takes seconds."""
    readable = tmp_path_factory.mktemp("readable")
    with embedded_tiled(tmp_path_factory.mktemp("tiled"), [readable]) as server:
        yield RunningTiled(server.uri, server.api_key, readable)
