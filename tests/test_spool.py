"""Messages into the spool -> what a restart reads again: all that has no fate, nothing else, in the order that it was received."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.records import Detector, RunStarted
from streamprior.spool import Spool, Spooled, spooled_images
from tests.test_space import disk as disk
from tests.test_space import fill

HEADS, IMAGES = False, True


class World:
    """Which frames have a fate and which runs are over, as a ledger would say."""

    def __init__(self) -> None:
        self.settled: set[tuple[str, int]] = set()
        self.over: set[str] = set()

    def spool(self, folder: Path, images: bool = True, most_bytes: int = 2**30, hold_s: float = 0.0) -> Spool:
        return Spool(folder, images, most_bytes, hold_s, lambda uid, told: {(uid, i) for i in told} <= self.settled, self.over.__contains__)


def run(uid: str = "u", series: str = "S1") -> RunStarted:
    return RunStarted(uid, "eiger", series, 1000.0, None, Detector())


def again(world: World, folder: Path, **more: Any) -> tuple[list[RunStarted], list[Spooled]]:
    """What the next process finds."""
    spool = world.spool(folder, **more)
    runs = spool.open()
    found = [*spool.recovered()]
    spool.close(empty=False)
    return runs, found


def tidied(spool: Spool, now: float = 0.0) -> None:
    """As time goes by."""
    spool._looked = float("-inf")
    spool.tidy(now)


def played(spool: Spool, count: int, size: int = 10, first: int = 0) -> None:
    """A start and images are received and decoded, and their frames join a run."""
    messages = [(b"start", 0.0, HEADS), *((b"%d" % n + bytes(size), 1.0 + n, IMAGES) for n in range(first, first + count))]
    number = spool.keep(0, messages)
    spool.seen("S1", number, starts=True)
    spool.opened(run(), number)
    for place in range(len(messages)):
        if place:
            spool.entered("u", first + place - 1)
        spool.decoded(0, number + place)


@pytest.mark.parametrize("message", [b"", b"one", (b"a", b"", b"ccc"), (b"alone",)])
def test_a_message_comes_back_as_it_was_received(tmp_path: Path, message: bytes | tuple[bytes, ...]) -> None:
    world = World()
    spool = world.spool(tmp_path)
    assert spool.open() == []
    assert [spool.keep(0, [(b"start", 1.5, HEADS)]), spool.keep(1, [(message, 2.5, HEADS)]), spool.keep(0, [(message, 3.5, IMAGES)])] == [
        0,
        1,
        2,
    ]
    _, found = again(world, tmp_path)
    assert [(one.number, one.at, one.wire, one.message, one.decoded) for one in found] == [
        (0, 1.5, 0, b"start", False),
        (1, 2.5, 1, message, False),
        (2, 3.5, 0, message, False),
    ]


def test_what_did_not_come_off_a_wire_is_not_written(tmp_path: Path) -> None:
    spool = World().spool(tmp_path)
    spool.open()
    with pytest.raises(TypeError, match="did not come off a wire"):
        spool.keep(0, [(("event", {}), 0.0, HEADS)])


def test_live_mode_keeps_what_a_run_cannot_do_without_and_no_image(tmp_path: Path) -> None:
    world = World()
    spool = world.spool(tmp_path, images=False)
    spool.open()
    played(spool, 5)
    runs, found = again(world, tmp_path, images=False)
    assert [(one.uid, one.series, one.opened) for one in runs] == [("u", "S1", 1000.0)]
    assert [(one.message, one.decoded) for one in found] == [(b"start", True)]
    assert [*spooled_images(tmp_path)] == []


def test_images_go_once_all_their_frames_have_a_fate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprior.spool._SEGMENT_BYTES", 1)  # a file an image
    world = World()
    spool = world.spool(tmp_path)
    spool.open()
    for n in range(4):
        spool.keep(0, [(b"%d" % n, 1.0, IMAGES)])
        spool.entered("u", n)
        spool.decoded(0, n)
        tidied(spool)
    assert [*spooled_images(tmp_path)] == [b"0", b"1", b"2", b"3"]
    world.settled |= {("u", 0), ("u", 2)}
    tidied(spool)
    assert [*spooled_images(tmp_path)] == [b"1", b"2", b"3"], "in their order: 2 goes with 1"
    world.settled.add(("u", 1))
    tidied(spool)
    assert [*spooled_images(tmp_path)] == [b"3"]
    assert spool.nbytes == sum(path.stat().st_size for path in tmp_path.glob("images-*"))


def test_images_stay_while_their_frames_may_still_wait_for_a_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamprior.spool._SEGMENT_BYTES", 1)
    world = World()
    spool = world.spool(tmp_path, hold_s=5.0)
    spool.open()
    spool.keep(0, [(b"0", 1.0, IMAGES)])
    spool.decoded(0, 0)
    tidied(spool, 100.0)
    tidied(spool, 104.9)
    assert [*spooled_images(tmp_path)] == [b"0"]
    spool.entered("u", 0)
    tidied(spool, 105.0)
    assert [*spooled_images(tmp_path)] == [b"0"], "the frame has joined its run and has no fate"
    world.settled.add(("u", 0))
    tidied(spool, 105.0)
    assert [*spooled_images(tmp_path)] == []


def test_of_a_run_that_is_over_nothing_is_read_again(tmp_path: Path) -> None:
    world = World()
    spool = world.spool(tmp_path)
    spool.open()
    played(spool, 3)
    number = spool.keep(0, [(b"end", 9.0, HEADS), (b"next start", 9.5, HEADS)])
    spool.ended("u")
    spool.decoded(0, number)
    spool.seen("S2", number + 1, starts=True)
    spool.opened(run("v", "S2"), number + 1)
    spool.decoded(0, number + 1)
    tidied(spool)
    runs, found = again(world, tmp_path)
    assert [one.uid for one in runs] == ["u", "v"], "closed in the path, but not yet in the archive"
    assert [one.message for one in found][-2:] == [b"end", b"next start"]
    world.over.add("u")
    world.settled |= {("u", n) for n in range(3)}
    tidied(spool)
    runs, found = again(world, tmp_path)
    assert [one.uid for one in runs] == ["v"]
    assert [one.message for one in found] == [b"next start"]


def test_a_start_that_opened_no_run_is_told_from_one_that_did(tmp_path: Path) -> None:
    world = World()
    spool = world.spool(tmp_path)
    spool.open()
    played(spool, 2)
    spool.keep(0, [(b"start again", 2.0, HEADS)])
    later = world.spool(tmp_path)
    later.open()
    assert [later.opened_by(one.number) for one in later.recovered()] == [True, False, False, False]


def test_what_was_received_before_the_second_kill_comes_before_what_came_after_it(tmp_path: Path) -> None:
    world = World()
    spool = world.spool(tmp_path)
    spool.open()
    played(spool, 3)
    second = world.spool(tmp_path)
    second.open()
    messages = [one.message for one in second.recovered()]
    second.keep(0, [(b"new", 50.0, IMAGES)])
    _, found = again(world, tmp_path)
    assert [one.message for one in found] == [*messages, b"new"]
    assert [one.number for one in found] == [*range(5)]
    assert [one.decoded for one in found] == [True] * 4 + [False]


@settings(deadline=None)  # files are written
@given(st.data())
def test_a_kill_in_the_middle_of_a_write_costs_nothing_but_the_message_that_was_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("spool")
    world = World()
    spool = world.spool(folder)
    spool.open()
    messages = data.draw(
        st.lists(st.tuples(st.binary(max_size=40) | st.tuples(st.binary(max_size=9), st.binary()), st.booleans()), min_size=1)
    )
    for n, (message, image) in enumerate(messages):
        spool.keep(0, [(message, float(n), image)])
    spool.close(empty=False)
    path = data.draw(st.sampled_from(sorted(folder.glob("[hi]*"))))
    of_file = [n for n, (_, image) in enumerate(messages) if image == (path.name != "heads")]
    whole = path.stat().st_size
    cut = data.draw(st.integers(0, whole))
    os.truncate(path, cut)
    _, found = again(world, folder)
    left = [one.number for one in found]
    lost = [n for n in of_file if n not in left]
    assert lost == of_file[len(of_file) - len(lost) :], "what was written before the cut is there"
    assert set(left) | set(lost) == set(range(len(messages)))
    assert bool(lost) == (cut < whole)
    assert [(one.message, one.at) for one in found] == [(messages[n][0], float(n)) for n in left]
    later = world.spool(folder)
    later.open()
    later.keep(0, [(b"after", 99.0, HEADS), (b"and an image", 99.0, IMAGES)])
    assert [one.message for one in again(world, folder)[1]][-2:] == [b"after", b"and an image"]


def test_beyond_its_bound_the_oldest_images_go_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world = World()
    spool = world.spool(tmp_path, most_bytes=5000)
    spool.open()
    played(spool, 1)
    for n in range(1, 20):
        spool.keep(0, [(b"%02d" % n + bytes(1000), 1.0, IMAGES)])
    assert spool.nbytes <= 5000
    assert [message[:2] for message in spooled_images(tmp_path) if isinstance(message, bytes)][-1] == b"19"
    assert again(world, tmp_path)[1][0].message == b"start"
    assert capsys.readouterr().out.count("the spool is full") == 1


def test_a_full_disk_stops_nothing_and_is_offered_more_later(disk: Path) -> None:
    world = World()
    folder = disk / "spool"
    spool = world.spool(folder)
    spool.open()
    played(spool, 1)
    ballast = fill(disk, 0)
    spool.keep(0, [(bytes(2**20), 1.0, IMAGES), (b"head", 2.0, HEADS)])
    assert spool.failing
    ballast.unlink()
    spool._refused = float("-inf")
    spool.keep(0, [(b"later", 3.0, IMAGES), (b"later head", 4.0, HEADS)])
    assert not spool.failing
    found = [one.message for one in again(world, folder)[1]]
    assert found[0] == b"start"
    assert found[-2:] == [b"later", b"later head"]


def test_a_clean_end_leaves_nothing(tmp_path: Path) -> None:
    world = World()
    spool = world.spool(tmp_path)
    spool.open()
    played(spool, 3)
    spool.close(empty=True)
    assert [*tmp_path.iterdir()] == []
    assert again(world, tmp_path) == ([], [])
