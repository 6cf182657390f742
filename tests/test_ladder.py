"""The overload ladder: what is left out, in which order, and that it is all undone."""

from __future__ import annotations

import itertools

import pytest

from streamprior.ladder import LEVELS, RUNGS, Furthest, Ladder, Rung


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def climb(ladder: Ladder, clock: Clock, age_s: float, seconds: float) -> None:
    """A frame of that age every 20 ms."""
    for _ in range(round(seconds / 0.02)):
        clock.now += 0.02
        ladder.observe(age_s)


def test_less_and_less_is_done_in_the_fixed_order_and_never_more_than_is_allowed() -> None:
    for furthest in LEVELS:
        clock, seen = Clock(), list[Rung]()
        ladder = Ladder(furthest, 1.0, 2.0, changed=seen.append, clock=clock)
        climb(ladder, clock, 1.5, 5.0)
        assert [rung.level for rung in seen] == sorted(rung.level for rung in seen)
        assert ladder.rung.level == LEVELS.index(furthest)
        assert seen == [rung for rung in RUNGS[1:] if rung.level <= LEVELS.index(furthest)]


def test_everything_is_done_again_once_frames_are_young() -> None:
    clock = Clock()
    ladder = Ladder("masks", 1.0, 2.0, clock=clock)
    climb(ladder, clock, 1.5, 5.0)
    climb(ladder, clock, 0.01, 2.0 * len(RUNGS) + 1)
    assert ladder.rung == RUNGS[0]


def test_frames_between_young_and_late_move_nothing() -> None:
    clock = Clock()
    ladder = Ladder("masks", 1.0, 2.0, clock=clock)
    climb(ladder, clock, 1.5, 0.15)
    before = ladder.rung
    assert before.level == 1
    climb(ladder, clock, 0.6, 60.0)
    assert ladder.rung == before


def test_under_a_steady_overload_the_ladder_settles() -> None:
    """Half of the refinement fits and all of it does not: each try to do all again comes later than the one before."""
    clock, seen = Clock(), list[tuple[float, Rung]]()
    ladder = Ladder("masks", 1.0, 2.0, changed=lambda rung: seen.append((clock.now, rung)), clock=clock)
    for _ in range(60_000):
        clock.now += 0.02
        ladder.observe(1.5 if ladder.rung.refine_every == 1 else 0.01)
    tries = [at for at, rung in seen if rung == RUNGS[0]]
    waits = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert waits == sorted(waits)
    assert len(tries) < 30
    assert waits[-1] >= 60


def test_frames_are_chosen_by_their_index() -> None:
    assert [index for index in range(10) if Rung(1, refine_every=4).refines(index)] == [0, 4, 8]
    assert not any(Rung(1, refine_every=0).refines(index) for index in range(10))
    assert [index for index in range(10) if Rung(2, 0, classify_every=2).classifies(index)] == [0, 2, 4, 6, 8]
    # What is kept on one rung was kept on every rung before it: frames are not refined here and left out there at random.
    for one, other in itertools.pairwise(RUNGS):
        assert all(one.refines(index) or not other.refines(index) for index in range(64))
        assert all(one.classifies(index) or not other.classifies(index) for index in range(64))


@pytest.mark.parametrize("furthest", ["refinement", "masks", "frames"])
def test_a_full_disk_holds_refinement_back_whatever_the_load(furthest: Furthest) -> None:
    clock = Clock()
    ladder = Ladder(furthest, 1.0, 2.0, clock=clock)
    ladder.hold("disk", True)
    climb(ladder, clock, 0.0, 10.0)
    assert (ladder.rung.level, ladder.rung.refine_every) == (1, 0)
    climb(ladder, clock, 1.5, 5.0)
    assert ladder.rung.level == LEVELS.index(furthest)
    climb(ladder, clock, 0.0, 100.0)
    ladder.hold("disk", False)
    assert ladder.rung == RUNGS[0]


def test_a_recipe_that_refines_nothing_begins_with_the_masks() -> None:
    clock = Clock()
    ladder = Ladder("masks", 1.0, 2.0, refines=False, clock=clock)
    climb(ladder, clock, 1.5, 0.1)
    assert (ladder.rung.level, ladder.rung.classify_every) == (2, 2)
