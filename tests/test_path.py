"""The bounded path: everything that enters leaves, in order, counted, whatever a sink or a sender does."""

from __future__ import annotations

import datetime
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import structlog
import zmq

from streamprior.config import PositionSettings, SourceSettings
from streamprior.crew import ThreadCrew, think
from streamprior.errors import SinkUnavailable, WireError
from streamprior.join import Joiner
from streamprior.ladder import Ladder
from streamprior.ledger import Ledger
from streamprior.mailbox import Mailbox
from streamprior.metrics import Meters
from streamprior.outbox import Outbox
from streamprior.pipeline import Pipeline, Received, Wire
from streamprior.prior import Prior
from streamprior.quarantine import MOST_A_SECOND, Quarantine
from streamprior.records import NOT_MEASURED, Batch, Detector, Flag, Positions, Reading, Result, RunEnded, RunStarted, SeriesStart
from streamprior.runs import Runs
from streamprior.seams import Decoded, Message, StageFactory
from streamprior.sequencer import Sequencer
from streamprior.sources.zmq import ZmqPull
from streamprior.stages.prepare import check_shape
from streamprior.wire.dectris_v2 import StreamV2Decoder, encode_end, encode_image, encode_start
from tests.builders import NAMES, diffraction, make_frame, make_recipe, make_run, small_prior

DATE = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)


class Scripted:
    """A source that hands over a list of messages and then has nothing more."""

    name = "eiger"

    def __init__(self, messages: Sequence[bytes]) -> None:
        self._messages = deque(messages)
        self.exhausted = False

    def open(self) -> None: ...

    def receive(self, timeout_s: float) -> bytes | None:
        self.exhausted = len(self._messages) <= 1
        return self._messages.popleft() if self._messages else None

    def close(self) -> None: ...


class Kept:
    """A sink that keeps what it is given, and can be told to fail or to get stuck."""

    def __init__(self, name: str = "archive", complete: bool = True) -> None:
        self.name, self.complete = name, complete
        self.results: list[Result] = []
        self.turns: list[str] = []
        self.failures = 0
        self.stuck: threading.Event | None = None

    def open(self) -> None: ...

    def begin(self, run: RunStarted) -> None:
        self.turns.append("begin")

    def write(self, results: Sequence[Result]) -> None:
        if self.stuck is not None:
            self.stuck.wait(30)
        if self.failures:
            self.failures -= 1
            raise SinkUnavailable("the disk is away")
        self.results += results

    def end(self, run: RunEnded) -> None:
        self.turns.append(f"end: {run.reason}")

    def close(self) -> None:
        self.turns.append("close")


class House:
    """The path with real stages and wire, a scripted source and sinks that the test holds."""

    def __init__(
        self,
        messages: Sequence[bytes],
        sinks: Sequence[Kept],
        prior: Prior | None = None,
        workers: int = 2,
        ladder: Ladder | None = None,
        stages: StageFactory | None = None,
        spare: StageFactory | None = None,
        ledger: Path | None = None,
    ) -> None:
        self.prior = prior or small_prior()
        self.recipe = make_recipe(self.prior)
        self.ledger = Ledger((sink.name for sink in sinks if sink.complete), ledger)
        self.meters = Meters("eiger", self.recipe.stage_names, [sink.name for sink in sinks], NAMES, self.recipe.signals)
        self.quarantined: list[str] = []
        self.crew = ThreadCrew(
            stages or self.recipe.stages, self.prior, workers, 4, 1.0, 2**20, self.meters.stage, ladder, spare, self.ledger.dropped
        )
        self.path = Pipeline(
            Wire(Scripted(messages), StreamV2Decoder("eiger", max_message_bytes=100_000)),
            Joiner(PositionSettings(), separate=False),
            Runs(self.ledger.distinct, late_s=0.1, idle_s=60),
            self.crew,
            self.recipe.watches(),
            [Outbox(sink, 2**20, self.ledger, self.meters) for sink in sinks],
            self.ledger,
            self.meters,
            2**20,
            admit=lambda counts: check_shape(counts, self.prior.geometry),
            keep=lambda message, error: self.quarantined.append(error.reason),
            ladder=ladder,
        )

    def run(self) -> House:
        self.path.start()
        assert self.path.join(60)
        assert self.path.failure is None
        return self


def image(counts: np.ndarray, index: int, series: int = 1) -> bytes:
    return encode_image(series, f"S{series}", index, counts, 0.0, DATE)


def series(frames: np.ndarray, number: int = 1) -> list[bytes]:
    start = encode_start(number, f"S{number}", Detector(shape=frames.shape[1:]), len(frames), frames.dtype, {})
    return [start, *(image(counts, i, number) for i, counts in enumerate(frames)), encode_end(number, f"S{number}")]


def test_every_frame_of_a_series_is_published_in_order_and_the_ledger_balances() -> None:
    archive = Kept()
    house = House(series(diffraction(count=40)), [archive]).run()
    assert [result.index for result in archive.results] == list(range(40))
    assert archive.turns == ["begin", "end: end", "close"]
    (account,) = house.ledger.runs()
    assert (account["received"], account["published"], account["in_flight"], account["missing"]) == (40, 40, 0, 0)
    assert account["balanced"]


def test_a_path_that_is_behind_leaves_out_refinement_by_index_and_every_frame_has_its_mask() -> None:
    archive, ladder = Kept(), Ladder("refinement", late_s=1.0, calm_s=2.0, clock=lambda: 0.0)
    ladder.observe(5.0)
    house = House(series(diffraction(count=40)), [archive], ladder=ladder).run()
    refined = [result.index for result in archive.results if not result.flags & Flag.NOT_REFINED]
    assert refined == list(range(0, 40, 2))
    assert all(np.isfinite(result.object).all() for result in archive.results if result.index in refined)
    assert [result.index for result in archive.results] == list(range(40))
    assert not any((result.classes == NOT_MEASURED).all() for result in archive.results)
    (account,) = house.ledger.runs()
    assert (account["published"], account["unrefined"], account["balanced"]) == (40, {"overload": 20}, True)
    assert house.ledger.frame(account["run"], 7) == "published without refinement: overload"
    assert 'streamprior_frames_unrefined_total{reason="overload"} 20.0' in house.meters.render("")[0].decode()


def test_on_a_nearly_full_disk_frames_without_refinement_have_another_reason() -> None:
    archive, ladder = Kept(), Ladder("masks", late_s=math.inf, calm_s=2.0)
    ladder.hold("a nearly full disk", True)
    house = House(series(diffraction(count=8)), [archive], ladder=ladder).run()
    (account,) = house.ledger.runs()
    assert account["unrefined"] == {"disk_short": 8}


def test_a_frame_without_light_is_published_and_said_not_to_be_refined() -> None:
    frames = diffraction(count=4)
    frames[2] = 0
    house = House(series(frames), [Kept()]).run()
    (account,) = house.ledger.runs()
    assert account["unrefined"] == {"empty": 1}
    assert "no photon" in house.ledger.why(account["run"], 2)["why"]


def test_what_the_ladder_leaves_out_altogether_is_dropped_by_name() -> None:
    archive, ladder = Kept(), Ladder("masks", late_s=1.0, calm_s=2.0, refines=False)
    ladder.observe(5.0)
    house = House(series(diffraction(count=40)), [archive], ladder=ladder).run()
    assert [result.index for result in archive.results] == list(range(0, 40, 2))
    (account,) = house.ledger.runs()
    assert (account["dropped"], account["in_flight"], account["balanced"]) == ({"classify/overload": 20}, 0, True)
    assert house.ledger.frame(account["run"], 7) == "dropped at classify: overload"
    assert archive.turns == ["begin", "end: end", "close"]


def test_a_full_receive_queue_drops_images_and_never_the_start_or_the_end() -> None:
    messages = series(diffraction(count=200))
    archive = Kept()
    house = House(messages, [archive], workers=1)
    path, size = house.path, len(messages[1])
    house.path.received = Mailbox(20 * size, "drop_newest", path._unheard, lambda item: item.wire.decoder.expendable(item.message))
    house.path._policy = "drop_newest"
    receive, *others = path.rooms().values()
    receiving = threading.Thread(target=lambda: [None for _ in iter(receive, False)], daemon=True)
    receiving.start()
    for step in others:  # the end waits at the full queue until the first of these makes room
        while step():
            pass
    receiving.join(30)
    accounts = house.ledger.runs()  # what was dropped before the run's start was read is no run's
    dropped = sum(account["dropped"].get("receive/queue_full", 0) for account in accounts)
    assert dropped > 0
    assert accounts[0]["published"] + dropped == 200
    assert accounts[0]["reason"] == "end"
    assert house.ledger.is_balanced()


def test_rooms_can_be_walked_by_hand_in_one_thread() -> None:
    archive = Kept()
    house = House(series(diffraction(count=3)), [archive], workers=1)
    for step in house.path.rooms().values():
        while step():
            pass
    assert [result.index for result in archive.results] == [0, 1, 2]


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
@pytest.mark.parametrize("room", ["decode", "compute-0"])
def test_a_jump_of_the_hosts_clock_makes_no_frame_late_and_no_time_negative(
    room: str, jump_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock is set while all frames are in front of `room`."""
    ladder = Ladder("masks", late_s=600.0, calm_s=2.0)
    house = House(series(diffraction(count=8)), [Kept()], workers=1, ladder=ladder)
    true = time.time
    for name, step in house.path.rooms().items():
        if name == room:
            monkeypatch.setattr(time, "time", lambda: true() + jump_s)
        while step():
            pass
        assert ladder.rung.level == 0
    sums = [sample for family in house.meters.registry.collect() for sample in family.samples if sample.name.endswith("_seconds_sum")]
    assert sums
    assert all(sample.value >= 0 for sample in sums)
    assert house.ledger.is_balanced()


def test_live_results_are_bit_identical_to_the_composed_stages_on_the_same_frames() -> None:
    frames = diffraction(count=24)
    archive = Kept()
    house = House(series(frames), [archive]).run()
    for batch in (1, 5, 24):
        stages = house.recipe.stages()
        for first in range(0, 24, batch):
            part = [make_frame(counts, first + i) for i, counts in enumerate(frames[first : first + batch])]
            for offline, live in zip(think(stages, house.prior, make_run(), part), archive.results[first : first + batch], strict=True):
                np.testing.assert_array_equal(offline.classes, live.classes)
                np.testing.assert_array_equal(offline.object, live.object)
                assert (offline.chi2, offline.class_distance) == (live.chi2, live.class_distance)


def test_bad_messages_between_good_ones_are_quarantined_and_every_good_one_is_published() -> None:
    frames = diffraction(count=12)
    messages = series(frames)
    good = messages[5]
    messages[5:5] = [
        b"garbage",
        good[: len(good) // 2],
        image(np.zeros((32, 16), np.uint16), 90),
        image(np.zeros((32, 32), np.uint8), 91),
        b"\0" * 200_000,
    ]
    archive = Kept()
    house = House(messages, [archive]).run()
    assert sorted(result.index for result in archive.results) == list(range(12))
    assert house.quarantined == ["not_cbor", "not_cbor", "wrong_shape", "wrong_dtype", "too_large"]
    (account,) = house.ledger.runs()
    assert account["balanced"]
    assert (account["received"], account["published"]) == (17, 12)
    assert house.meters.registry.get_sample_value("streamprior_frames_quarantined_total", {"reason": "too_large"}) == 1


def test_frames_of_another_shape_than_the_priors_are_quarantined_by_name() -> None:
    house = House(series(diffraction((16, 16), count=3)), [Kept()]).run()
    (account,) = house.ledger.runs()
    assert account["quarantined"] == {"wrong_shape": 3}
    assert account["balanced"]
    assert house.ledger.frame(account["run"], 1) == "quarantined: wrong_shape"


def test_duplicates_late_and_reordered_frames_are_recognised() -> None:
    frames = diffraction(count=6)
    start, *images, end = series(frames)
    messages = [start, images[1], images[0], images[1], *images[2:], end, images[3]]
    archive = Kept()
    house = House(messages, [archive]).run()
    assert sorted(result.index for result in archive.results) == list(range(6))
    (account,) = house.ledger.runs()
    assert account["dropped"] == {"decode/duplicate": 1, "decode/late": 1}
    assert account["balanced"]


def test_missing_start_and_end_and_a_second_series_make_two_runs() -> None:
    frames = diffraction(count=4)
    messages = [*series(frames, 1)[1:-1], *series(frames, 2)]
    archive = Kept()
    house = House(messages, [archive]).run()
    second, first = house.ledger.runs()
    assert (first["series"], first["reason"], first["published"]) == ("S1", "new_series", 4)
    assert (second["series"], second["reason"], second["published"]) == ("S2", "end", 4)
    assert archive.turns == ["begin", "end: new_series", "begin", "end: end", "close"]


def test_frames_without_photons_or_numbers_are_flagged_and_do_not_stop_the_run() -> None:
    frames = diffraction(count=4).astype(np.float32)
    frames[1] = 0
    frames[2] = np.nan
    frames[3, 5, 5] = np.inf
    archive = Kept()
    House(series(frames), [archive]).run()
    flags = [Flag(result.flags) for result in archive.results]
    assert flags[0] == Flag(0)
    assert Flag.EMPTY in flags[1]
    assert Flag.EMPTY in flags[2]
    assert Flag.NONFINITE in flags[2]
    assert flags[3] == Flag.NONFINITE
    assert np.isnan(archive.results[1].chi2)
    assert np.isfinite(archive.results[3].chi2), "one bad pixel is left free, the frame is refined"


def test_a_stuck_live_sink_does_not_delay_the_archive() -> None:
    archive, live = Kept(), Kept("live", complete=False)
    live.stuck = threading.Event()
    house = House(series(diffraction(count=60)), [archive, live])
    house.path.start()
    # Not from threading.enumerate(): a thread that is already done is no longer in it.
    (with_archive,) = [thread for thread in house.path._threads if thread.name == "publish-archive"]
    with_archive.join(30)
    assert len(archive.results) == 60
    assert len(live.results) == 0
    live.stuck.set()
    assert house.path.join(30)
    assert live.results[-1].index == 59, "the newest one wins"
    assert house.ledger.runs()[0]["balanced"]


def test_an_archive_that_is_away_for_a_while_loses_nothing() -> None:
    archive = Kept()
    archive.failures = 3
    house = House(series(diffraction(count=10)), [archive]).run()
    assert [result.index for result in archive.results] == list(range(10))
    assert house.ledger.runs()[0]["balanced"]
    assert house.meters.registry.get_sample_value("streamprior_sink_up", {"sink": "archive"}) == 1


def test_leaving_before_the_path_is_empty_counts_what_was_left_behind() -> None:
    archive = Kept()
    archive.failures = 10**9
    house = House(series(diffraction(count=10)), [archive])
    house.path.start()
    house.path.abandon()
    assert house.path.join(30)
    house.ledger.write_off()
    assert house.ledger.is_balanced()


def test_messages_that_nobody_has_read_yet_are_counted_when_the_path_is_left() -> None:
    messages = series(diffraction(count=300))
    house = House(messages, [Kept()])
    house.path.rooms()["receive"]()
    assert 0 < len(house.path.received) < len(messages), "so many go on together"
    house.path.abandon()
    while house.path.rooms()["receive"]():
        pass
    (account,) = house.ledger.runs()
    assert account["dropped"] == {"path/shutdown": len(messages)}
    assert house.ledger.is_balanced()


def test_an_error_of_our_own_stops_the_path_and_is_remembered() -> None:
    class Broken(Kept):
        def write(self, results: Sequence[Result]) -> None:
            raise ZeroDivisionError("a bug")

    house = House(series(diffraction(count=3)), [Broken()])
    house.path.start()
    assert house.path.ended.wait(30)
    assert isinstance(house.path.failure, ZeroDivisionError)


def test_an_error_in_the_crew_still_lets_the_archive_have_what_is_finished() -> None:
    house = House(series(diffraction(count=8)), [Kept()], workers=1)
    (archive,) = [outbox.sink for outbox in house.path._outboxes]

    class Stumbling:
        name = "prepare"

        def __init__(self) -> None:
            self.stages = house.recipe.stages()

        def __call__(self, batch: Batch) -> Batch:
            if any(frame.index == 5 for frame in batch.frames):
                raise ZeroDivisionError("a bug")
            for stage in self.stages:
                batch = stage(batch)
            return batch

    house.path._crew._factory = lambda: [Stumbling()]
    house.path._crew._batch_frames = 1
    archive.stuck = threading.Event()
    house.path.start()
    (crew,) = [thread for thread in house.path._threads if thread.name == "compute-0"]
    crew.join(30)
    archive.stuck.set()
    assert house.path.ended.wait(30)
    assert isinstance(house.path.failure, ZeroDivisionError)
    assert [result.index for result in archive.results] == list(range(5))
    assert house.ledger.write_off() == 3
    assert house.ledger.is_balanced()


def test_a_sink_that_never_began_a_run_is_not_asked_to_write_it_when_the_time_to_drain_is_over() -> None:
    class Away(Kept):
        def begin(self, run: RunStarted) -> None:
            began.set()
            raise SinkUnavailable("the disk is away")

        def write(self, results: Sequence[Result]) -> None:
            raise KeyError("no run was begun")

    began = threading.Event()
    house = House(series(diffraction(count=3)), [Away()])
    start, *_ = (step for name, step in house.path.rooms().items() if name == "publish-archive")
    for name, step in house.path.rooms().items():
        while name != "publish-archive" and step():
            pass
    writing = threading.Thread(target=start)
    writing.start()
    assert began.wait(30)
    house.path.abandon()
    writing.join(30)
    assert house.path.failure is None
    house.ledger.write_off()
    assert house.ledger.is_balanced()
    assert house.ledger.runs()[0]["dropped"] == {"archive/unavailable": 3}


def test_a_flood_of_garbage_fills_neither_the_folder_nor_the_log(tmp_path: Path) -> None:
    clock = iter(second for second, count in ((0.0, 1001), (1.0, 20), (2.0, 20), (3.0, 20)) for _ in range(count))
    quarantine = Quarantine(tmp_path, most_files=25, clock=lambda: next(clock))
    with structlog.testing.capture_logs() as said:
        for _ in range(1000):
            quarantine.keep(b"garbage", WireError("not_cbor", "garbage"))
        quarantine.keep(b"another", WireError("wrong_shape", "another reason is still heard"))
        assert len(said) == MOST_A_SECOND + 1
        for _ in range(60):
            quarantine.keep(b"garbage", WireError("not_cbor", "garbage"))
    assert said[MOST_A_SECOND + 1]["passed_over"] == 1000 - MOST_A_SECOND
    assert len(list(tmp_path.glob("*.message"))) == 25
    assert len(list(tmp_path.glob("*.txt"))) == 25


@pytest.mark.parametrize("attach", ["bind", "connect"])
def test_a_message_beyond_every_limit_does_not_make_the_socket_deaf(attach: str) -> None:
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 0)
        push.setsockopt(zmq.SNDTIMEO, 10_000)
        here = "tcp://127.0.0.1:*"
        if attach == "connect":
            push.bind(here)
            here = push.getsockopt_string(zmq.LAST_ENDPOINT)
        source = ZmqPull(SourceSettings(address=here, attach=attach, max_message_mb=1))
        source.open()
        if attach == "bind":
            push.connect(source.address)
        push.send(b"before")
        assert source.receive(10) == b"before"
        push.send(bytes(5 * 2**20))
        heard: set[bytes | None] = set()
        # What was on its way when the connection ended is lost with it, so the sender says it again.
        for _ in range(100):
            push.send(b"after")
            heard.add(source.receive(0.1))
            if b"after" in heard:
                break
        source.close()
    assert b"after" in heard


def test_the_sequencer_restores_the_order_and_lets_the_next_one_in_when_its_budget_is_spent() -> None:
    ended = [RunEnded(str(n), "end", 0.0) for n in range(5)]
    sequencer = Sequencer(budget_bytes=2 * ended[0].nbytes)
    sequencer.put([(2, ended[2])])
    sequencer.put([(1, ended[1])])
    assert sequencer.take(9, timeout_s=0) == []
    waiting = threading.Thread(target=sequencer.put, args=([(3, ended[3])],))
    waiting.start()
    sequencer.put([(0, ended[0])])
    assert [item.uid for item in sequencer.take(9)] == ["0", "1", "2"]
    waiting.join(5)
    assert [item.uid for item in sequencer.take(9)] == ["3"]
    sequencer.close()
    assert sequencer.take(9) is None


@pytest.mark.parametrize("enabled", [True, False])
def test_masks_go_on_when_refinement_is_off(enabled: bool) -> None:
    recipe = make_recipe(small_prior())
    recipe = type(recipe)(recipe.prior, recipe.prepare, recipe.refine.model_copy(update={"enabled": enabled}), recipe.drift)
    (result,) = think(recipe.stages(), recipe.prior, make_run(), [make_frame(diffraction()[0])])
    assert (Flag.NOT_REFINED in Flag(result.flags)) is not enabled
    assert set(np.unique(result.classes)) <= {0, 1, 2}


class Told:
    """A decoder of messages that are records already."""

    def decode(self, message: Message, received: float) -> Sequence[Decoded]:
        return (message,)  # type: ignore[return-value]

    def due(self, now: float) -> Sequence[Decoded]:
        return ()

    def expendable(self, message: Message) -> bool:
        return False


def test_a_position_that_was_received_in_time_is_not_late_because_the_path_is_behind() -> None:
    """200 frames and behind them their positions wait to be decoded, all of them received within a second, long ago."""
    archive = Kept()
    house = House([], [archive])
    frames, motors = Wire(Scripted([]), Told()), Wire(Scripted([]), Told())
    house.path._frames, house.path._readings = frames, motors
    house.path._joiner = Joiner(PositionSettings(x="x", wait_s=1.0), separate=True)
    counts = diffraction()[0]
    long_ago = time.monotonic() - 60
    records = [(motors, SeriesStart("documents", "scan-1", None, Detector())), (frames, SeriesStart("eiger", "S1", 200, Detector()))]
    records += [(frames, make_frame(counts, n)) for n in range(200)]  # type: ignore[list-item]
    records += [(motors, Reading("documents", "scan-1", n, 0.0, (n * 1e-6, 0.0))) for n in range(200)]  # type: ignore[list-item]
    for k, (wire, record) in enumerate(records):
        house.path.received.put(Received(record, time.time(), wire, heard=long_ago + 0.001 * k))
    house.path.received.close()
    house.run()
    assert [result.position for result in archive.results] == [(n * 1e-6, 0.0) for n in range(200)]
    assert not any(result.flags & Flag.NO_POSITION for result in archive.results)


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_jump_of_the_hosts_clock_between_a_scan_and_its_frames_costs_no_position(jump_s: float) -> None:
    archive = Kept()
    house = House([], [archive])
    frames, motors = Wire(Scripted([]), Told()), Wire(Scripted([]), Told())
    house.path._frames, house.path._readings = frames, motors
    house.path._joiner = Joiner(PositionSettings(x="x", wait_s=60.0), separate=True)
    counts, at = diffraction()[0], time.time()
    house.path.received.put(Received(SeriesStart("documents", "scan-1", None, Detector()), at, motors))  # type: ignore[arg-type]
    records = [(frames, make_frame(counts, n)) for n in range(4)]
    records += [(motors, Reading("documents", "scan-1", n, 0.0, (n * 1e-6, 0.0))) for n in range(4)]  # type: ignore[misc]
    for wire, record in records:
        house.path.received.put(Received(record, at + jump_s, wire))  # type: ignore[arg-type]
    house.path.received.close()
    house.run()
    assert [result.position for result in archive.results] == [(n * 1e-6, 0.0) for n in range(4)]
    assert not any(result.flags & Flag.NO_POSITION for result in archive.results)


def test_what_is_refused_on_the_wire_of_the_positions_is_no_frame_of_the_run() -> None:
    archive = Kept()
    house = House(series(diffraction(count=3))[:-1], [archive])
    motors = Wire(Scripted([]), StreamV2Decoder("motors"))
    house.path._readings = motors
    house.path._joiner = Joiner(PositionSettings(), separate=True)
    for message in series(diffraction(count=3))[:-1]:
        house.path.received.put(Received(message, time.time(), house.path._frames))
    house.path.received.put(Received(b"garbage", time.time(), motors))
    house.path.received.close()
    house.run()
    run, stray = house.ledger.runs()
    assert (run["received"], run["published"], run["quarantined"]) == (3, 3, {})
    assert (stray["run"], stray["quarantined"], stray["balanced"]) == (None, {"not_cbor": 1}, True)


def test_positions_that_come_after_their_run_are_told_once_a_run() -> None:
    house = House([], [Kept()])
    with structlog.testing.capture_logs() as said:
        for _ in range(3):
            house.path._locate(Positions("", "S1", {0: (0.0, 0.0)}))
        house.path._locate(Positions("", "S2", {0: (0.0, 0.0)}))
    assert [one["series"] for one in said] == ["S1", "S2"]
