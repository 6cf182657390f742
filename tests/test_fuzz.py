"""Nothing but a WireError ever leaves a decoder: the kept corpus, a bounded hunt, and that a hunt would see what it looks for."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import hunt as hunting
from tests.fuzz import targets
from tests.fuzz.hunt import Finding, hunt, judged
from tests.fuzz.mutate import Input
from tests.fuzz.targets import TARGETS, Target, dump_input, kept, load_input, target

INPUTS = {"v2": 5000, "v1": 4000, "loader": 5000, "documents": 2000, "compression": 8000}


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_kept_corpus_is_answered_as_it_should_be(name: str) -> None:
    corpus, one = kept(name), target(name)
    assert len(corpus) > 10
    for messages in corpus:
        found = judged(one, messages)
        assert found is None, f"{found} by {dump_input(messages).hex()}"


def test_the_corpus_is_small() -> None:
    assert sum(file.stat().st_size for file in targets.CORPUS.rglob("*.cbor")) < 200_000


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_nothing_but_a_wire_error_leaves_a_decoder(name: str) -> None:
    report = hunt(name, INPUTS[name], seed=7)
    assert report.inputs == INPUTS[name]
    assert report.findings == []
    assert report.grown_mb < 200


def test_an_input_is_the_same_whenever_it_is_asked_for_and_survives_its_file() -> None:
    one, corpus = target("v1"), kept("v1")
    first = [one.input(3, number, corpus) for number in range(50)]
    assert first == [one.input(3, number, corpus) for number in range(50)]
    assert len({dump_input(messages) for messages in first}) > 40
    assert [load_input(dump_input(messages)) for messages in first] == first


class Numbered(Target):
    """Its inputs are 0, 1, 2, 0, ..."""

    def input(self, seed: int, number: int, corpus: object) -> Input:
        return [(str(number % 3).encode(),)]


def faulty(fault: Callable[[], None]) -> Target:
    """A decoder that does something wrong with one input of three."""

    def run(messages: Input) -> None:
        if messages[0][0] == b"2":
            fault()

    return Numbered([], lambda tree: tree, run, jsonable=False)


def escaped() -> Target:
    return faulty(lambda: {}["a"])


def crashed() -> Target:
    return faulty(lambda: os.kill(os.getpid(), signal.SIGKILL))


def stuck() -> Target:
    return faulty(threading.Event().wait)


@pytest.mark.parametrize(("made", "inputs"), [(escaped, 9), (crashed, 6), (stuck, 3)])
def test_a_decoder_that_is_wrong_is_found_by_the_number_of_its_input(
    made: Callable[[], Target], inputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hunting, "STUCK_S", 2.0)
    report = hunt(f"{__name__}:{made.__name__}", inputs, seed=1)
    assert [(found.kind, found.number) for found in report.findings] == [(made.__name__, number) for number in range(2, inputs, 3)]
    assert report.inputs == inputs


def test_an_input_that_takes_long_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hunting, "SLOW_S", -1.0)
    found = judged(target("v2"), kept("v2")[0])
    assert isinstance(found, Finding)
    assert found.kind == "slow"


def test_recordings_are_read_in_place_and_none_are_needed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMPRIOR_DATA", str(tmp_path / "absent"))
    assert targets.recorded("dectris_v2/*/*.cbor") == []
    assert len(targets.v2().trees) > 10
