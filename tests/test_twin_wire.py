"""The twin on the wire: its stream over a real socket, the file it saves, and the faults it injects."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from streamprior_sim.cxi import save
from streamprior_sim.emit import emit, pace, stream, zmq_sender
from streamprior_sim.faults import KINDS, Fault, forecast, inject, scatter
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Prerendered, Twin, build

from streamprior.errors import ConfigError, SinkUnavailable, WireError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.wire.dectris_v2 import StreamV2Decoder


def twin(name: str = "bragg", changes: dict[str, object] | None = None) -> Twin:
    return build(load_scenario(name, changes))


class Collected:
    """A sender that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []

    def send(self, message: bytes) -> None:
        self.messages.append(message)


@pytest.mark.parametrize("name", ["bragg", "gold_balls"])
def test_frames_cross_a_real_socket_pixel_for_pixel(name: str) -> None:
    one = twin(name)
    seen: list[tuple[int, int]] = []
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        pull.setsockopt(zmq.RCVTIMEO, 30_000)

        def send() -> None:
            with zmq_sender(f"tcp://127.0.0.1:{port}") as sender:
                emit(one, sender, None, slice(100, 130, 2), lambda done, total: seen.append((done, total)))

        thread = threading.Thread(target=send)
        thread.start()
        decoder = StreamV2Decoder("twin")
        start, *frames, end = [decoder.decode(pull.recv(), 0.0)[0] for _ in range(17)]
        thread.join()
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert start.expected == 15
    about = one.detector()
    np.testing.assert_array_equal(start.detector.mask, about.mask)
    assert (start.detector.shape, start.detector.beam_centre) == (about.shape, about.beam_centre)
    assert (start.detector.distance_m, start.detector.energy_ev) == (about.distance_m, about.energy_ev)
    for number, frame in enumerate(frames):
        assert isinstance(frame, Frame)
        assert (frame.index, frame.origin, frame.position) == (number, 100 + 2 * number, one.position(100 + 2 * number))
        np.testing.assert_array_equal(frame.counts, one.frame(100 + 2 * number))
    assert seen == [(done, 17) for done in range(1, 18)]


def test_the_detector_clock_runs_at_the_rate() -> None:
    decoder = StreamV2Decoder("twin")
    times = [decoder.decode(message, 0.0)[0].detector_time for message in itertools.islice(stream(twin(), 200.0, slice(0, None, 3)), 1, 6)]
    assert np.diff(times) == pytest.approx(0.005, abs=1e-6)


def test_nobody_at_the_address_is_told_at_once() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        free = pull.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigError, match=f"nobody listens at tcp://127.0.0.1:{free}"), zmq_sender(f"tcp://127.0.0.1:{free}", 0.2):
        pass
    with pytest.raises(ConfigError, match="cannot send to nonsense"), zmq_sender("nonsense"):
        pass


def test_a_receiver_that_takes_nothing_more_is_told_and_not_waited_for_for_ever() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        pull.setsockopt(zmq.RCVHWM, 1)
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        address = f"tcp://127.0.0.1:{port}"
        with pytest.raises(SinkUnavailable, match=f"{address} took no message for 0.2 s"), zmq_sender(address, 0.2) as sender:
            pace(itertools.repeat(bytes(1_000_000)), sender, None)


def test_pace_sends_everything_in_order_and_counts_what_was_late() -> None:
    sender = Collected()
    done = pace((b"%d" % number for number in range(50)), sender, 1e9)
    assert sender.messages == [b"%d" % number for number in range(50)]
    # No machine sends a thousand million messages a second: all but the first are late.
    assert (done.sent, done.late) == (50, 49)
    assert pace(iter([b"a", b"b"]), sender, None).late == 0


def test_prerendered_frames_repeat_and_say_where_they_come_from() -> None:
    one = twin()
    few = Prerendered(one, 4, 10)
    assert len(few) == 10
    assert [few.origin(index) for index in range(6)] == [0, 100, 200, 300, 0, 100]
    np.testing.assert_array_equal(few.frame(6), one.frame(200))
    sender = Collected()
    emit(few, sender, None)
    frames = [StreamV2Decoder("twin").decode(message, 0.0)[0] for message in sender.messages[1:-1]]
    assert [(frame.index, frame.origin) for frame in frames] == [(index, few.origin(index)) for index in range(10)]


def test_a_saved_run_holds_frames_geometry_and_positions(tmp_path: Path) -> None:
    one = twin("gold_balls", {"detector.dead": 5})
    path = save(one, tmp_path / "run.cxi", slice(0, 20, 2))
    assert [file.name for file in tmp_path.iterdir()] == ["run.cxi"]
    with h5py.File(path) as file:
        detector = file["entry_1/instrument_1/detector_1"]
        np.testing.assert_array_equal(detector["data"][3], one.frame(6))
        np.testing.assert_array_equal(detector["mask"][()] != 0, one.detector().mask)
        assert file["entry_1/data_1/data"].shape == (10, 104, 104)
        assert file["entry_1/instrument_1/source_1/energy"][()] == pytest.approx(999.902 * 1.602176634e-19)
        assert detector["distance"][()] == 0.0252
        moved = file["entry_1/sample_1/geometry_1/translation"][()]
    np.testing.assert_allclose(-moved[:, :2], [one.position(index) for index in range(0, 20, 2)])
    with h5py.File(save(twin(), tmp_path / "bragg.cxi", slice(2)), "r") as file:
        assert "sample_1" not in file["entry_1"]
    with pytest.raises(ConfigError, match="no frame is left"):
        save(one, tmp_path / "none.cxi", slice(0, 0))


# --- faults ----------------------------------------------------------------------------------------------------------------------

LIMIT = 40_000  # bytes; a receiver's limit small enough that an oversized message costs nothing


def account(messages: list[bytes]) -> tuple[dict[str, int], list[int], list[int], Counter[str]]:
    """What a receiver sees: {start, end} messages, indices in order of arrival, those seen twice, quarantined reasons."""
    decoder = StreamV2Decoder("twin", max_message_bytes=LIMIT)
    hints, order, twice, quarantined = {"start": 0, "end": 0}, [], [], Counter()
    for message in messages:
        try:
            record = decoder.decode(message, 0.0)[0]
        except WireError as error:
            quarantined[error.reason] += 1
            continue
        if isinstance(record, Frame):
            (twice if record.index in order else order).append(record.index)
        else:
            hints["start" if isinstance(record, SeriesStart) else "end"] += 1
    return hints, order, twice, quarantined


FRAMES = 40
CLEAN = list(stream(Prerendered(twin(), 5, FRAMES), None))

counts_of_faults = st.dictionaries(st.sampled_from(sorted(KINDS)), st.integers(1, 3))


@given(counts_of_faults, st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_what_a_receiver_sees_is_what_was_forecast(counts: dict[str, int], seed: int) -> None:
    faults = scatter(counts, FRAMES, seed)
    told = forecast(faults, FRAMES)
    messages = list(inject(CLEAN, faults, seed, LIMIT + 1))
    hints, order, twice, quarantined = account(messages)
    assert sorted(order) == list(told.published)
    assert len(twice) == told.duplicates == counts.get("duplicated", 0)
    assert dict(quarantined) == told.quarantined
    assert told.received == len(order) + len(twice) + sum(quarantined.values())
    assert hints == {"start": "start_missing" not in counts, "end": "end_missing" not in counts}
    assert told.expected == (None if "start_missing" in counts else FRAMES)
    extent = FRAMES if told.expected else max(order) + 1
    assert told.missing == extent - len(order)


def test_a_late_frame_is_overtaken_and_none_is_lost_at_the_end() -> None:
    _, order, _, _ = account(list(inject(CLEAN, [Fault("late", 5), Fault("late", 39)])))
    assert order == [0, 1, 2, 3, 4, 6, 7, 8, 5, *range(9, 40)]


def test_a_stream_without_faults_is_left_as_it_is() -> None:
    assert list(inject(CLEAN, [])) == CLEAN
    sender = Collected()
    emit(Prerendered(twin(), 5, FRAMES), sender, None, faults=[Fault("lost", 3), Fault("end_missing")])
    assert len(sender.messages) == len(CLEAN) - 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault("flood", 1)], "unknown fault 'flood'"),
        ([Fault("lost")], "lost needs the index of an image"),
        ([Fault("end_missing", 2)], "end_missing needs no index"),
        ([Fault("lost", 40)], "lost at image 40, the run has 40"),
        ([Fault("lost", 4), Fault("late", 4)], "late and lost both strike image 4"),
        ([Fault("lost", 0), Fault("wrong_dtype", 1)], "wrong_dtype at image 1: no whole image comes before it"),
    ],
)
def test_faults_that_contradict_each_other_are_refused(faults: list[Fault], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forecast(faults, FRAMES)
