"""No room for a batch, and a card that fails: the frames are computed again, in parts or on the CPU, and every one is accounted for."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import structlog
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior import portion
from streamprior.arrays import card_errors, cuda_missing
from streamprior.config import Config
from streamprior.daemon import build, run
from streamprior.errors import DeviceLost
from streamprior.metrics import Meters
from streamprior.portion import FIRST_WAIT_S, LONGEST_WAIT_S, Portion
from streamprior.prior import save_prior
from streamprior.records import Batch, Flag, Result, RunStarted
from streamprior.seams import Stage
from streamprior.sinks.archive import read_run, run_folders
from streamprior.stages.classify_cuda import CudaClassifier
from streamprior.stages.refine_cuda import CudaSolver
from tests.builders import diffraction, make_recipe, small_prior
from tests.host_cuda import Card, CudaError, CufftError
from tests.test_daemon import free_port
from tests.test_path import House, Kept, series

COUNT = 40
FRAMES = diffraction(count=COUNT)
RECIPE = make_recipe(small_prior())


class Failing:
    """A stage that does what another one does, after `before` has had its say about the batch: it may raise."""

    def __init__(self, stage: Stage, before: Callable[[Batch], None]) -> None:
        self.name, self._stage, self._before = stage.name, stage, before

    def __call__(self, batch: Batch) -> Batch:
        self._before(batch)
        return self._stage(batch)


def with_failing(name: str, before: Callable[[Batch], None]) -> Sequence[Stage]:
    return [Failing(stage, before) if stage.name == name else stage for stage in RECIPE.stages()]


def walked(house: House) -> House:
    """Room by room in this thread: every frame waits before the first is computed, so batches grow as large as they may."""
    for step in house.path.rooms().values():
        while step():
            pass
    return house


def undisturbed() -> list[Result]:
    archive = Kept()
    walked(House(series(FRAMES), [archive], workers=1))
    return archive.results


def assert_same(results: Sequence[Result], others: Sequence[Result]) -> None:
    assert [result.index for result in results] == [result.index for result in others]
    for one, other in zip(results, others, strict=True):
        assert np.array_equal(one.classes, other.classes)
        assert np.array_equal(one.object, other.object)
        assert (one.chi2, one.unit, one.arm, one.iou) == (other.chi2, other.unit, other.arm, other.iou)


def test_a_batch_without_room_is_computed_in_halves_and_nothing_is_lost() -> None:
    tried: list[int] = []

    def three_are_too_many(batch: Batch) -> None:
        tried.append(len(batch.frames))
        if len(batch.frames) > 2:
            raise MemoryError("Unable to allocate 3.00 GiB")

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing("refine", three_are_too_many))
    with structlog.testing.capture_logs() as log:
        walked(house)
    assert_same(archive.results, undisturbed())
    (account,) = house.ledger.runs()
    assert (account["published"], account["dropped"], account["balanced"]) == (COUNT, {}, True)
    assert house.crew.out_of_memory == sum(number > 2 for number in tried) == 1, "what went through is remembered"
    (said,) = [line for line in log if "out of memory" in line["event"]]
    assert said["stage"] == "refine"
    assert said["frames_at_once"] == said["tried"] // 2 > 0
    assert "compute.batch_frames" in said["event"]


def test_stages_that_ran_out_of_memory_are_gone_before_new_ones_are_made() -> None:
    made: list[weakref.ref[Failing]] = []

    def refuse_the_first(batch: Batch) -> None:
        if len(made) == 1:
            raise MemoryError

    def stages() -> Sequence[Stage]:
        assert all(one() is None for one in made), "the memory of these is still taken"
        fresh = with_failing("classify", refuse_the_first)
        made.extend(weakref.ref(one) for one in fresh if isinstance(one, Failing))
        return fresh

    archive = Kept()
    walked(House(series(FRAMES), [archive], workers=1, stages=stages))
    assert len(made) == 2
    assert_same(archive.results, undisturbed())


def test_a_frame_that_does_not_go_through_even_alone_is_left_out_by_name_and_the_run_goes_on() -> None:
    def never_the_seventh(batch: Batch) -> None:
        if any(frame.index == 7 for frame in batch.frames):
            raise MemoryError

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing("refine", never_the_seventh))
    with structlog.testing.capture_logs() as log:
        walked(house)
    assert_same(archive.results, [result for result in undisturbed() if result.index != 7])
    (account,) = house.ledger.runs()
    assert (account["published"], account["dropped"], account["balanced"]) == (COUNT - 1, {"refine/out_of_memory": 1}, True)
    assert house.ledger.frame(account["run"], 7) == "dropped at refine: out_of_memory"
    assert archive.turns == ["begin", "end: end", "close"]
    (said,) = [line for line in log if line["log_level"] == "error"]
    assert said["frame"] == 7
    assert "catchup" in said["event"]


def test_a_want_of_memory_that_lasts_is_said_once_and_counted_for_every_frame() -> None:
    def never(batch: Batch) -> None:
        raise MemoryError

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing("match", never))
    with structlog.testing.capture_logs() as log:
        walked(house)
    assert sum("out of memory" in line["event"] for line in log) <= 2
    (account,) = house.ledger.runs()
    assert (account["published"], account["dropped"], account["balanced"]) == (0, {"match/out_of_memory": COUNT}, True)


def test_what_a_card_has_no_room_for_even_alone_is_computed_on_the_cpu() -> None:
    def full(batch: Batch) -> None:
        raise MemoryError("Out of memory allocating 8,388,608 bytes")

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing("refine", full), spare=RECIPE.stages)
    walked(house)
    assert_same(archive.results, undisturbed())
    assert all(result.flags & Flag.AWAY_FROM_CARD for result in archive.results)
    assert (house.crew.away_from_card, house.crew.card_lost) == (1, False)
    assert house.ledger.is_balanced()


def test_a_card_that_had_no_room_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portion, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(portion, "LONGEST_WAIT_S", 0.0)
    calls: list[int] = []

    def full_at_first(batch: Batch) -> None:
        calls.append(len(batch.frames))
        if len(calls) < 3:
            raise MemoryError

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing("refine", full_at_first), spare=RECIPE.stages)
    walked(house)
    away = [bool(result.flags & Flag.AWAY_FROM_CARD) for result in archive.results]
    assert away[0]
    assert not away[-1]
    assert calls[-1] > 1
    assert house.crew.away_from_card == 0
    assert_same(archive.results, undisturbed())


def test_a_worker_for_whose_stages_a_card_has_no_room_computes_on_the_cpu() -> None:
    def no_room() -> Sequence[Stage]:
        raise MemoryError

    archive = Kept()
    house = House(series(FRAMES), [archive], stages=no_room, spare=RECIPE.stages).run()
    assert_same(archive.results, undisturbed())
    assert house.crew.away_from_card == 2


@pytest.mark.parametrize("stage", ["classify", "refine"])
def test_frames_in_hand_when_a_card_fails_are_computed_on_the_cpu(stage: str) -> None:
    healthy = [10]  # calls that it lives; both workers use the same card

    def fails(batch: Batch) -> None:
        healthy[0] -= 1
        if healthy[0] < 0:
            raise DeviceLost("cudaErrorIllegalAddress: an illegal memory access was encountered")

    archive = Kept()
    house = House(series(FRAMES), [archive], stages=lambda: with_failing(stage, fails), spare=RECIPE.stages)
    with structlog.testing.capture_logs() as log:
        house.run()
    assert_same(archive.results, undisturbed())
    assert (house.crew.card_lost, house.crew.away_from_card) == (True, 2)
    assert {bool(result.flags & Flag.AWAY_FROM_CARD) for result in archive.results} == {False, True}
    assert house.ledger.is_balanced()
    (said,) = [line for line in log if line["log_level"] == "error"]
    assert "restart the daemon" in said["event"]


def test_a_lost_card_is_not_asked_again() -> None:
    made: list[int] = []

    def lost() -> Sequence[Stage]:
        made.append(1)
        raise DeviceLost("cudaErrorECCUncorrectable")

    archive = Kept()
    house = walked(House(series(FRAMES), [archive], workers=1, stages=lost, spare=RECIPE.stages))
    assert len(made) == 1
    assert house.crew.card_lost
    assert_same(archive.results, undisturbed())


def test_an_error_of_our_own_still_stops_the_path() -> None:
    def ours(batch: Batch) -> None:
        raise ZeroDivisionError

    archive = Kept()
    house = House(series(FRAMES), [archive], stages=lambda: with_failing("refine", ours), spare=RECIPE.stages)
    house.path.start()
    assert house.path.join(60)
    assert isinstance(house.path.failure, ZeroDivisionError)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["fine", "full", "lost"]), max_size=25),
    st.sets(st.integers(0, COUNT - 1), max_size=5),
    st.sampled_from(["classify", "match", "refine"]),
    st.booleans(),
)
def test_whatever_fails_when_every_frame_is_published_or_left_out_by_name(
    turns: list[str], impossible: set[int], stage: str, has_card: bool
) -> None:
    script: Iterator[str] = iter(turns)

    def no_room_for_some(batch: Batch) -> None:
        if impossible & {frame.index for frame in batch.frames}:
            raise MemoryError

    def as_written(batch: Batch) -> None:
        turn = next(script, "fine")
        if turn == "full":
            raise MemoryError
        if turn == "lost" and has_card:
            raise DeviceLost("cudaErrorLaunchFailure")
        no_room_for_some(batch)

    archive = Kept()
    spare = (lambda: with_failing(stage, no_room_for_some)) if has_card else None
    house = walked(House(series(FRAMES), [archive], workers=1, stages=lambda: with_failing(stage, as_written), spare=spare))
    (account,) = house.ledger.runs()
    published = {result.index for result in archive.results}
    left_out = {index for index in range(COUNT) if house.ledger.frame(account["run"], index) == f"dropped at {stage}: out_of_memory"}
    assert impossible <= left_out
    assert has_card <= (impossible == left_out), "the CPU has room for the others"
    assert (published | left_out, published & left_out) == (set(range(COUNT)), set())
    assert [result.index for result in archive.results] == sorted(published)
    assert account["balanced"]


def test_a_portion_halves_and_grows_back_after_waits_that_get_longer() -> None:
    some = Portion(64, least=1)
    some.refused(40, now=0.0)
    assert some.frames == 20
    assert not some.grow(FIRST_WAIT_S - 1)
    assert some.grow(FIRST_WAIT_S)
    assert some.frames == 40
    some.refused(40, now=FIRST_WAIT_S)
    assert some.frames == 20
    assert not some.grow(2 * FIRST_WAIT_S)
    now = 2 * FIRST_WAIT_S
    while some.frames < 64:
        now += LONGEST_WAIT_S
        some.grow(now)
    assert not some.grow(now + LONGEST_WAIT_S), "it is whole"


def test_a_portion_ends_at_one_frame_or_at_none_where_somebody_else_takes_it() -> None:
    for least in (0, 1):
        some = Portion(2, least)
        some.refused(1, now=0.0)
        some.refused(1, now=0.0)
        assert some.frames == least
        assert some.grow(LONGEST_WAIT_S)
        assert some.frames == least + 1


def test_errors_of_a_card_say_what_they_mean(card: Card) -> None:
    for error in (CudaError(2, "cudaErrorMemoryAllocation"), CufftError(2, "CUFFT_ALLOC_FAILED")):
        with pytest.raises(MemoryError, match=r"ALLOC|Allocation"), card_errors(card):
            raise error
    for error in (CudaError(1, "cudaErrorInvalidValue"), CufftError(5, "CUFFT_INTERNAL_ERROR")):
        with pytest.raises(type(error)), card_errors(card):
            raise error  # the card goes on: this is a fault of ours
    card.launches_left = -1
    for error in (CudaError(700, "cudaErrorIllegalAddress"), CufftError(6, "CUFFT_EXEC_FAILED"), MemoryError("by the way")):
        with pytest.raises(DeviceLost), card_errors(card):
            raise error


BREAKS_A_CARD = """
import os
import cupy
import numpy as np
from streamprior.arrays import card_errors, cuda_missing
from streamprior.errors import DeviceLost
cupy.get_default_memory_pool().set_limit(size=2**20)
try:
    with card_errors(cupy):
        cupy.empty(2**24, np.uint8)
except MemoryError:
    print("no room")
kernel = cupy.RawKernel('extern "C" __global__ void bad(int *p) { *p = 1; }', "bad")
stream = cupy.cuda.Stream(non_blocking=True)
for _ in range(2):
    try:
        with card_errors(cupy, (stream,)), stream:
            kernel((1,), (1,), (np.intp(16),))
            stream.synchronize()
    except DeviceLost:
        print("lost", flush=True)
os._exit(0)
"""


def test_a_real_card_says_the_same_when_it_is_full_and_when_it_has_failed() -> None:
    missing = cuda_missing()
    if missing is not None:
        pytest.skip(f"no CUDA card: {missing}")
    # In a process of its own: no other test could use a card after this.
    done = subprocess.run([sys.executable, "-c", BREAKS_A_CARD], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split("\n")[:3] == ["no room", "lost", "lost"], done.stderr


def on_the_card(card: Card, **wrong: float) -> tuple[House, list[Result]]:
    """The path with real stages of the card, which goes wrong when the path has begun to compute."""
    recipe = replace(RECIPE, backend="cuda")
    made: list[weakref.ref[CudaSolver | CudaClassifier]] = []

    def stages() -> Sequence[Stage]:
        assert all(one() is None for one in made), "these still have memory of the card"
        fresh = recipe.stages()
        owned = [value for stage in fresh for value in (stage, *vars(stage).values())]
        made.extend(weakref.ref(value) for value in owned if isinstance(value, CudaSolver | CudaClassifier))
        assert len(made) > 1
        return fresh

    archive = Kept()
    house = House(series(FRAMES), [archive], workers=1, stages=stages, spare=RECIPE.stages)
    for name, value in wrong.items():
        setattr(card, name, value)
    return walked(house), archive.results


def test_on_a_card_with_little_room_frames_go_in_smaller_batches_with_the_same_bits(card: Card) -> None:
    _, expected = on_the_card(card)
    # Room for the objects of two frames on their way, and not of four.
    house, results = on_the_card(card, room_bytes=2 * 32 * 32 * 8)
    assert house.crew.out_of_memory > 0
    assert not any(result.flags & Flag.AWAY_FROM_CARD for result in results)
    assert card.freed > 0
    assert_same(results, expected)
    assert house.ledger.is_balanced()


def test_when_a_kernel_reads_an_illegal_address_the_path_goes_on_without_the_card(card: Card) -> None:
    _, expected = on_the_card(card)
    house, results = on_the_card(card, launches_left=100)
    away = [bool(result.flags & Flag.AWAY_FROM_CARD) for result in results]
    assert sorted(away) == away
    assert set(away) == {False, True}
    first = away.index(True)
    assert_same(results[:first], expected[:first])
    assert_same(results[first:], undisturbed()[first:])
    assert house.ledger.is_balanced()


class BreaksTheCard:
    """A watch that lets a card live for some launches more once a run has begun."""

    name = "breaks"

    def __init__(self, card: Card) -> None:
        self._card = card

    def begin(self, run: RunStarted) -> None:
        self._card.launches_left = 200

    def __call__(self, results: Sequence[Result]) -> list[Result]:
        return list(results)


def test_a_card_that_fails_in_mid_run_costs_the_receiver_no_frame_and_shows_in_the_metrics(card: Card, tmp_path: Path) -> None:
    save_prior(small_prior(), tmp_path / "prior.h5")
    address = f"tcp://127.0.0.1:{free_port()}"
    settings = {
        "prior": tmp_path / "prior.h5",
        "source": {"address": address},
        "archive": {"folder": tmp_path / "archive"},
        "compute": {"backend": "cuda", "workers": 2},
        "overload": {"furthest": "nothing"},
        "http": {"port": 0},
    }
    daemon = build(Config.model_validate(settings), watches=[BreaksTheCard(card)])
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 0)
        push.connect(address)
        for message in series(FRAMES):
            push.send(message)
        assert run(daemon, until=lambda: any(account["reason"] == "end" for account in daemon.ledger.runs())) == 0
    meters: Meters = daemon.pipeline._meters
    for name, value in (("card_lost", 1), ("workers_away_from_card", 2), ("out_of_memory_total", 0)):
        assert meters.registry.get_sample_value(f"streamprior_{name}") == value
    (account,) = daemon.ledger.runs()
    assert (account["received"], account["published"], account["missing"], account["balanced"]) == (COUNT, COUNT, 0, True)
    (folder,) = run_folders(tmp_path / "archive")
    flags = read_run(folder).frames["flags"].to_pylist()
    assert {bool(one & Flag.AWAY_FROM_CARD) for one in flags} == {False, True}
