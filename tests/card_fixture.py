"""A stand-in for cupy that runs a card's kernels on the CPU, for a test."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest

from tests.host_cuda import Card


@pytest.fixture(scope="session")
def card_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Card:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels of the card cannot be compiled for this CPU")
    return Card(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def card(card_of_the_session: Card, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """In the place of the module cupy as long as the test runs."""
    monkeypatch.setitem(sys.modules, "cupy", card_of_the_session)
    yield card_of_the_session
    card_of_the_session.forget()
