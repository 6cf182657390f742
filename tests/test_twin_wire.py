"""The twin on the wire: its stream over a real socket, the file it saves, and the faults it injects."""

from __future__ import annotations

import itertools
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from streamprior_sim.cxi import save
from streamprior_sim.emit import Message, emit, pace, stream, zmq_sender
from streamprior_sim.faults import KINDS, Fault, Trouble, forecast, scatter
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Prerendered, Twin, build
from streamprior_sim.wires import Wire
from typer.testing import CliRunner

from streamprior.cli import app
from streamprior.errors import ConfigError, SinkUnavailable, WireError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.seams import Decoded
from streamprior.wire.dectris_v1 import StreamV1Decoder
from streamprior.wire.dectris_v2 import StreamV2Decoder


def twin(name: str = "bragg", changes: dict[str, object] | None = None) -> Twin:
    return build(load_scenario(name, changes))


class Collected:
    """A sender that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def send(self, message: Message) -> None:
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
            pace(itertools.repeat((bytes(1_000_000),)), sender, None)


def test_pace_sends_everything_in_order_and_counts_what_was_late() -> None:
    sender = Collected()
    done = pace(((b"%d" % number,) for number in range(50)), sender, 1e9)
    assert sender.messages == [b"%d" % number for number in range(50)]
    # No machine sends a thousand million messages a second: all but the first are late.
    assert (done.sent, done.late) == (50, 49)
    assert pace(iter([(b"a",), (b"b",)]), sender, None).late == 0


def test_the_parts_of_an_image_leave_together() -> None:
    sender = Collected()
    shown: list[tuple[int, int]] = []
    wire = Wire(kind="dectris-v1", framing="parts")
    done = emit(Prerendered(twin(), 1, 4), sender, 1e9, progress=lambda done, total: shown.append((done, total)), wire=wire)
    assert (done.sent, done.late) == (len(sender.messages), 5), "a start, four images and an end; all but the first are late"
    assert done.sent > 4 * 5
    assert shown == [(turn, 6) for turn in range(1, 7)]


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

LIMIT = 100_000  # bytes; a receiver's limit small enough that an oversized message costs little, and more than a clean one has
FRAMES = 40
RECORDING = Prerendered(build(load_scenario("bragg", {"detector.shape": [32, 32], "dose_photons": 1e5})), 5, FRAMES)
WIRES = (
    Wire(),
    Wire(encoding="none"),
    *(Wire(kind="dectris-v1", framing=framing) for framing in ("multipart", "split_header", "parts", "headerless")),
    Wire(kind="dectris-v1", framing="parts", header_detail="none", encoding="lz4"),
)


@dataclass
class Account:
    """What a receiver sees. order : images by their number in the undisturbed series, as they arrive; twice : those that come again."""

    starts: int = 0
    ends: int = 0
    order: list[int] = field(default_factory=list)
    twice: list[int] = field(default_factory=list)
    quarantined: Counter[str] = field(default_factory=Counter)


def account(messages: Iterable[Message], wire: Wire, changed_at: int = 0) -> Account:
    decoder = (StreamV2Decoder if wire.kind == "dectris-v2" else StreamV1Decoder)("twin", max_message_bytes=LIMIT)
    seen, first = Account(), ""

    def read(records: Iterable[Decoded | WireError]) -> None:
        nonlocal first
        for record in records:
            if isinstance(record, WireError):
                seen.quarantined[record.reason] += 1
            elif isinstance(record, Frame):
                first = first or record.series
                number = record.index + (changed_at if record.series != first else 0)
                (seen.twice if number in seen.order else seen.order).append(number)
            else:
                seen.starts += isinstance(record, SeriesStart)
                seen.ends += isinstance(record, SeriesEnd)

    for message in messages:
        try:
            read(decoder.decode(message, 0.0))
        except WireError as error:
            seen.quarantined[error.reason] += 1
    read(decoder.due(math.inf))
    return seen


def one_at_most(counts: dict[str, int]) -> bool:
    """Of the faults that each say which part of a series comes."""
    return sum(kind in ("two_receivers", "late_subscriber", "aborted", "series_changes") for kind in counts) <= 1


@given(st.sampled_from(WIRES), st.dictionaries(st.sampled_from(sorted(KINDS)), st.integers(1, 3)).filter(one_at_most), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_what_a_receiver_sees_is_what_was_forecast(wire: Wire, counts: dict[str, int], seed: int) -> None:
    counts = {kind: count for kind, count in counts.items() if wire.kind in KINDS[kind].reasons}
    faults = scatter(counts, FRAMES, seed)
    told = forecast(faults, FRAMES, wire)
    changed_at = next((fault.index for fault in faults if fault.kind == "series_changes"), None)
    seen = account(stream(RECORDING, None, wire=wire, trouble=Trouble(faults, seed, LIMIT + 1)), wire, changed_at or 0)
    assert sorted(seen.order) == list(told.published)
    assert len(seen.twice) == told.duplicates
    assert dict(seen.quarantined) == told.quarantined
    assert told.received == len(seen.order) + len(seen.twice) + sum(seen.quarantined.values())
    unheard = {"start_missing", "late_subscriber", "two_receivers"} & set(counts)
    assert seen.starts == (not unheard and wire.framing != "headerless")
    assert seen.ends == (not {"end_missing", "aborted"} & set(counts))
    known = not unheard and wire.announces
    assert told.expected == (FRAMES if known else None)
    if changed_at is None:
        assert told.missing == (FRAMES if known else max(seen.order, default=-1) + 1) - len(seen.order)


@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_late_frame_is_overtaken_and_none_is_lost_at_the_end(wire: Wire) -> None:
    seen = account(stream(RECORDING, None, wire=wire, trouble=Trouble((Fault("late", 5), Fault("late", 39)))), wire)
    assert seen.order == [0, 1, 2, 3, 4, 6, 7, 8, 5, *range(9, 40)]


@pytest.mark.parametrize(
    ("fault", "numbers"),
    [
        (Fault("two_receivers"), range(0, 40, 2)),
        (Fault("late_subscriber", 7), range(7, 40)),
        (Fault("aborted", 7), range(7)),
        (Fault("series_changes", 7), range(40)),
        (Fault("lost", 7), [*range(7), *range(8, 40)]),
        (Fault("uncompressed", 7), range(40)),
        (Fault("clock_jumps", 7), range(40)),
    ],
    ids=str,
)
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_a_fault_takes_what_its_name_says_and_nothing_else(wire: Wire, fault: Fault, numbers: Sequence[int]) -> None:
    seen = account(stream(RECORDING, None, wire=wire, trouble=Trouble((fault,))), wire, fault.index or 0)
    assert seen.order == list(numbers)
    assert sum(seen.quarantined.values()) == (fault.kind == "aborted")


def test_a_flipped_bit_is_told_apart_only_where_there_is_a_hash() -> None:
    fault = Fault("flipped_bit", 2)
    assert (forecast([fault], FRAMES).altered, forecast([fault], FRAMES).quarantined) == ((2,), {})
    for encoding in ("bslz4", "lz4", "none"):
        message = list(stream(RECORDING, None, slice(4), Wire(encoding=encoding), Trouble((fault,))))[3]
        (frame,) = StreamV2Decoder("twin").decode(message, 0.0)
        assert isinstance(frame, Frame)
        assert frame.counts.shape == (32, 32)
        assert (frame.counts != RECORDING.frame(2)).any()
    told = forecast([fault], FRAMES, Wire(kind="dectris-v1"))
    assert (told.altered, told.quarantined) == ((), {"wrong_hash": 1})


def test_after_its_clock_jumped_a_detector_is_ten_years_ahead() -> None:
    decoder = StreamV2Decoder("twin")
    messages = stream(RECORDING, 100.0, slice(6), trouble=Trouble((Fault("clock_jumps", 4),)))
    times = [record.detector_time for message in messages for record in decoder.decode(message, 0.0) if isinstance(record, Frame)]
    assert np.diff(times) == pytest.approx([0.01, 0.01, 0.01, 10 * 365.25 * 86400 + 0.01, 0.01], abs=1e-5)


def test_faults_take_messages_away_from_what_is_sent() -> None:
    clean, rough = Collected(), Collected()
    emit(RECORDING, clean, None)
    emit(RECORDING, rough, None, trouble=Trouble((Fault("lost", 3), Fault("end_missing"))))
    assert len(rough.messages) == len(clean.messages) - 2


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([Fault("flood", 1)], "unknown fault 'flood'; known are\nstart_missing: the start message"),
        ([Fault("truncted", 1)], "unknown fault 'truncted'; did you mean truncated"),
        ([Fault("lost")], "lost needs the index of an image"),
        ([Fault("end_missing", 2)], "end_missing needs no index"),
        ([Fault("lost", 40)], "lost at image 40, the run has 40"),
        ([Fault("lost", 4), Fault("late", 4)], "late and lost both strike image 4"),
        ([Fault("lost", 0), Fault("wrong_dtype", 1)], "wrong_dtype at image 1: no whole image comes before it"),
        ([Fault("aborted", 4), Fault("series_changes", 6)], "aborted and series_changes cannot both happen to one series"),
        ([Fault("blob_lost", 4)], "blob_lost cannot happen on dectris-v2"),
    ],
)
def test_faults_that_contradict_each_other_or_the_wire_are_refused(faults: list[Fault], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        forecast(faults, FRAMES)
    with pytest.raises(ConfigError, match=message):
        emit(RECORDING, Collected(), None, trouble=Trouble(tuple(faults)))


def test_more_faults_than_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="40 faults do not fit on the images 1 to 39"):
        scatter({"lost": 40}, FRAMES, 0)
    assert len(scatter({"aborted": 5, "start_missing": 2}, FRAMES, 0)) == 2, "what happens to a series happens once"


# --- the command line and the scenario ---------------------------------------------------------------------------------------------

STILL = """
name: still
seed: 1
frames: 12
rate_hz: 1000
dose_photons: 2.0e+5
energy_ev: 9000
sample: {kind: bragg, rocking_range_deg: 0.0}
detector: {shape: [32, 32], pixel_um: 55, distance_m: 0.5}
"""
ROUGH = "wire: {kind: dectris_v1, framing: split_header, encoding: lz4}\nfaults: {lost: 2, truncated: 1}\n"


def said_by(*words: object) -> str:
    said = CliRunner().invoke(app, [str(word) for word in words])
    assert said.exit_code == 0, said.output
    return said.output


@contextmanager
def receiving() -> Iterator[tuple[str, Callable[[], list[Message]]]]:
    """A receiver's address, and what has come until nothing more is on its way."""
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")

        def come() -> list[Message]:
            messages: list[Message] = []
            while pull.poll(10_000 if not messages else 500):
                parts = pull.recv_multipart()
                messages.append(parts[0] if len(parts) == 1 else tuple(parts))
            return messages

        yield f"tcp://127.0.0.1:{port}", come


def test_a_scenario_says_wire_and_faults_and_the_command_line_says_what_comes_of_them(tmp_path: Path) -> None:
    (tmp_path / "rough.yaml").write_text(STILL + ROUGH)
    with receiving() as (address, come):
        said = said_by("twin", tmp_path / "rough.yaml", "--to", address)
        messages = come()
    assert "publishes 9 of 12 frames, quarantines 1 (wrong_hash 1), misses 3" in said
    seen = account(messages, Wire(kind="dectris-v1"))
    assert (seen.starts, len(seen.order), seen.quarantined, seen.ends) == (1, 9, {"wrong_hash": 1}, 1)
    assert [isinstance(message, tuple) for message in messages[:3]] == [False, True, True], "a header in two messages"


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        (
            ("--wire", "dectris-v1", "--framing", "parts", "--encoding", "none", "--faults", "blob_lost=2,late", "--seed", 3),
            {"missing_part": 2},
        ),
        (("--wire", "dectris-v1", "--header-detail", "none"), {}),
        (("--wire", "dectris-v2", "--encoding", "lz4", "--faults", "garbage=2"), {"not_cbor": 2}),
    ],
)
@pytest.mark.parametrize("command", ["twin", "replay"])
def test_options_choose_wire_and_faults(command: str, options: tuple[object, ...], counts: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "still.yaml").write_text(STILL)
    what = tmp_path / "still.yaml"
    if command == "replay":
        what = save(build(load_scenario(what)), tmp_path / "still.cxi")
    with receiving() as (address, come):
        said = said_by(command, what, "--to", address, "--rate", 1000, *options)
        seen = account(come(), Wire(kind=str(options[1])))
    assert len(seen.order) == 12 - sum(counts.values())
    assert seen.quarantined == counts
    assert f"publishes {len(seen.order)} of 12 frames" in said


def test_the_twin_publishes_documents(tmp_path: Path) -> None:
    pytest.importorskip("event_model")
    from streamprior.wire.documents import load_document

    (tmp_path / "still.yaml").write_text(STILL)
    with zmq.Context() as context, context.socket(zmq.SUB) as subscriber:
        subscriber.subscribe(b"")
        port = subscriber.bind_to_random_port("tcp://127.0.0.1")
        said: list[str] = []
        words = ("twin", tmp_path / "still.yaml", "--to", f"tcp://127.0.0.1:{port}", "--wire", "documents")
        # A bound subscriber tells a publisher what it wants when it next looks at its socket.
        thread = threading.Thread(target=lambda: said.append(said_by(*words)))
        thread.start()
        names = []
        while subscriber.poll(10_000):
            document = load_document(subscriber.recv(), b"", "msgpack", 2**20)
            assert document is not None
            names.append(document[0])
            if names[-1] == "stop":
                break
        thread.join(30)
    assert names == ["start", "descriptor", *["event"] * 12, "stop"]
    assert "15 messages sent" in said[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"faults": {"losst": 1}}, "did you mean lost"),
        ({"faults": {"lost": 0}}, "faults.lost"),
        ({"wire.framing": "parts"}, "framing and header_detail are those of dectris-v1"),
        ({"wire.kind": "dectris-v3"}, "wire.kind"),
        ({"wire.frames": "parts"}, "wire.frames: unknown key; did you mean framing"),
    ],
)
def test_a_wire_or_a_fault_that_is_none_is_refused_by_its_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_scenario("bragg", changes)


def test_the_scenario_of_a_rough_wire_can_be_forecast() -> None:
    scenario = load_scenario("rough_wire")
    told = forecast(scatter(scenario.faults, scenario.frames, scenario.seed), scenario.frames, scenario.wire)
    assert told.quarantined
    assert 0.5 * scenario.frames < len(told.published) < scenario.frames
