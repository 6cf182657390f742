"""Stream V1: every framing and encoding, lost and stray parts, a recorded series, and bytes that nobody should send."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import get_args

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.errors import WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.seams import Parts
from streamprior.wire.compression import compress
from streamprior.wire.dectris_v1 import Encoding, Framing, StreamV1Decoder, encode_end, encode_image, encode_start, framed

DATE = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
FRAMINGS: tuple[Framing, ...] = get_args(Framing)
ENCODINGS: tuple[Encoding, ...] = get_args(Encoding)
SHAPE = (12, 20)
MASK = np.zeros(SHAPE, bool)
MASK[2, 3] = True
DETECTOR = Detector(SHAPE, MASK, np.full(SHAPE, 1.5, np.float32), 6e4, (4.0, 8.0), 75e-6, 0.5, 9000.0, 0.01)


def pixels(index: int, dtype: str = "u2", shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(index).poisson(3, shape).astype(dtype)


def image(index: int, series: int = 7, encoding: Encoding = "bslz4", told: bool = True, dtype: str = "u2") -> Parts:
    user_data = {"position_m": [index * 1e-6, -2e-6], "origin": index + 40} if told else None
    return encode_image(series, index, pixels(index, dtype), 0.01 * index, 0.01, user_data, encoding)


def series_of(frames: int = 4, series: int = 7, encoding: Encoding = "bslz4", told: bool = True) -> list[Parts]:
    start = encode_start(series, DETECTOR, frames, np.dtype("u2"), {"scan": "S54"}, date=DATE)
    return [start, *(image(index, series, encoding, told) for index in range(frames)), encode_end(series)]


def read(messages: Iterable[Parts], decoder: StreamV1Decoder | None = None) -> list[SeriesStart | Frame | SeriesEnd | WireError]:
    """Everything that the messages come to, given up at the end. A message of one part is handed over as a socket does."""
    decoder = decoder or StreamV1Decoder("eiger")
    found = []
    for message in messages:
        try:
            found += decoder.decode(message[0] if len(message) == 1 else message, 5.0)
        except WireError as error:
            found.append(error)
    return [*found, *decoder.due(math.inf)]


def told(records: Iterable[object]) -> list[object]:
    """Records as values that compare, arrays by their bytes."""

    def value(record: object) -> object:
        if isinstance(record, Frame):
            return replace(record, counts=None), record.counts.dtype, record.counts.shape, record.counts.tobytes()
        if isinstance(record, SeriesStart):
            detector = record.detector
            tables = [None if table is None else table.tobytes() for table in (detector.mask, detector.flat)]
            return replace(record, detector=replace(detector, mask=None, flat=None)), tables
        return record.reason if isinstance(record, WireError) else record

    return [value(record) for record in records]


def frames_of(records: Iterable[object]) -> list[int]:
    return [record.index for record in records if isinstance(record, Frame)]


def reasons(records: Iterable[object]) -> list[str]:
    return [record.reason for record in records if isinstance(record, WireError)]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("appendix", [True, False])
def test_a_series_arrives_whole_in_every_framing_and_encoding(framing: Framing, encoding: Encoding, appendix: bool) -> None:
    found = read(framed(series_of(4, encoding=encoding, told=appendix), framing))
    assert reasons(found) == []
    assert frames_of(found) == [0, 1, 2, 3]
    assert isinstance(found[-1], SeriesEnd)
    assert found[-1].series == "7"
    assert isinstance(found[0], SeriesStart) is (framing != "headerless")
    for frame in found:
        if isinstance(frame, Frame):
            np.testing.assert_array_equal(frame.counts, pixels(frame.index))
            assert (frame.series, frame.received) == ("7", 5.0)
            whole = framing != "headerless"
            assert frame.position == ((frame.index * 1e-6, -2e-6) if whole and appendix else None)
            assert frame.origin == (frame.index + 40 if whole and appendix else None)
            assert frame.detector_time == (pytest.approx(DATE.timestamp() + 0.01 * frame.index) if whole else None)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("framing", ["split_header", "parts"])
def test_part_by_part_gives_the_same_records_as_whole(encoding: Encoding, framing: Framing) -> None:
    whole = series_of(3, encoding=encoding) + series_of(2, 8, encoding, told=False)
    assert told(read(framed(whole, framing))) == told(read(whole))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
@pytest.mark.parametrize("shape", [(128, 128), (3, 5), (67, 129), (1, 8)])
def test_pixels_of_every_type_and_shape(encoding: Encoding, dtype: str, shape: tuple[int, int]) -> None:
    counts = pixels(1, dtype, shape)
    (frame,) = read([encode_image(7, 1, counts, 0.0, encoding=encoding)])
    assert isinstance(frame, Frame)
    assert frame.counts.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(frame.counts, counts)


@pytest.mark.parametrize(
    ("encoding", "names"), [("bslz4", ["bs8-lz4<", "bs16-lz4<", "bs32-lz4<"]), ("lz4", ["lz4<"] * 3), ("none", ["<"] * 3)]
)
def test_encodings_are_called_as_detectors_call_them(encoding: Encoding, names: list[str]) -> None:
    parts = [image(1, encoding=encoding, dtype=dtype) for dtype in ("u1", "u2", "u4")]
    assert [json.loads(one[1])["encoding"] for one in parts] == names
    assert all(json.loads(one[1])["size"] == len(one[2]) and json.loads(one[1])["shape"] == [20, 12] for one in parts)


def test_the_header_says_what_the_detector_is() -> None:
    start = read([series_of()[0]])[0]
    assert isinstance(start, SeriesStart)
    assert (start.source, start.series, start.expected) == ("eiger", "7", 4)
    assert start.metadata["user_data"] == {"scan": "S54"}
    np.testing.assert_array_equal(start.detector.mask, MASK)
    np.testing.assert_array_equal(start.detector.flat, DETECTOR.flat)
    assert replace(start.detector, mask=None, flat=None) == replace(DETECTOR, mask=None, flat=None)


@pytest.mark.parametrize("framing", ["multipart", "split_header", "parts"])
@pytest.mark.parametrize(("detail", "shape", "tables"), [("all", SHAPE, True), ("basic", SHAPE, False), ("none", None, False)])
def test_a_header_of_every_detail_opens_the_series(framing: Framing, detail: str, shape: tuple[int, int] | None, tables: bool) -> None:
    start = encode_start(7, DETECTOR, 4, np.dtype("u2"), {}, detail, DATE)
    first, frame, _ = read(framed([start, image(0), encode_end(7)], framing))
    assert isinstance(first, SeriesStart)
    assert isinstance(frame, Frame)
    assert (first.detector.shape, first.detector.mask is not None, first.detector.flat is not None) == (shape, tables, tables)
    assert first.expected == (4 if shape else None)
    assert (frame.detector_time is not None) is (shape is not None)


def test_a_header_split_after_its_configuration_keeps_its_tables() -> None:
    start = series_of()[0]
    records = read([start[:2], start[2:], image(0)])
    assert told(records) == told(read([start, image(0)]))


def configured(**changes: object) -> SeriesStart:
    header, config, *_ = series_of()[0]
    (start,) = read([(header, json.dumps(json.loads(config) | changes).encode())])
    assert isinstance(start, SeriesStart)
    return start


def test_a_flat_field_that_the_detector_has_applied_is_not_applied_again() -> None:
    header, config, *rest = series_of()[0]
    start = read([(header, json.dumps(json.loads(config) | {"flatfield_correction_applied": True}).encode(), *rest)])[0]
    assert isinstance(start, SeriesStart)
    assert start.detector.flat is None
    assert start.detector.mask is not None


@pytest.mark.parametrize(
    ("mode", "images", "triggers", "expected"),
    [
        ("ints", 10, 3, 30),
        ("exts", 10, 3, 30),
        ("exte", 1, 40, 40),
        ("inte", 5, 40, 40),
        ("ints", 10**9, 3, None),
        ("ints", "x", 1, None),
        ("ints", 0, 1, None),
    ],
)
def test_triggers_say_how_many_images_come(mode: str, images: object, triggers: int, expected: int | None) -> None:
    assert configured(trigger_mode=mode, nimages=images, ntrigger=triggers).expected == expected


def test_zeros_of_a_configuration_are_values_that_nobody_told() -> None:
    start = configured(
        beam_center_x=0.0, beam_center_y=0.0, detector_distance=0.0, photon_energy=math.nan, x_pixel_size="75 um", frame_time=True
    )
    detector = start.detector
    assert (detector.beam_centre, detector.distance_m, detector.energy_ev, detector.pixel_m, detector.frame_time_s) == (None,) * 5


@pytest.mark.parametrize("date", ["yesterday", None, 3, "0001-01-01T00:00:00+23:59", "9" * 5000])
def test_a_date_that_is_none_costs_frames_their_time_only(date: object) -> None:
    header, config, *rest = series_of()[0]
    found = read([(header, json.dumps(json.loads(config) | {"data_collection_date": date}).encode(), *rest), image(0)])
    assert frames_of(found) == [0]
    assert reasons(found) == []


@pytest.mark.parametrize("start", ["soon", None, -5, 1e30, math.nan, 103597359252740])
def test_a_start_time_that_cannot_be_one_of_the_series_is_none(start: object) -> None:
    parts = list(image(0))
    parts[3] = json.dumps({"htype": "dconfig-1.0", "start_time": start}).encode()
    frame = read([series_of()[0], tuple(parts)])[1]
    assert isinstance(frame, Frame)
    assert frame.detector_time is None


def test_a_late_image_of_the_series_before_does_not_take_the_clock_from_the_next() -> None:
    found = read([series_of(4, 7)[0], image(0, 7), series_of(4, 8)[0], image(1, 7), image(0, 8)])
    times = [record.detector_time for record in found if isinstance(record, Frame)]
    assert times == pytest.approx([DATE.timestamp(), DATE.timestamp() + 0.01, DATE.timestamp()])


# Losses

STRUCK = 2
LOST = {0: ["stray_part"], 1: ["missing_part"], 2: ["missing_part"], 3: [], 4: []}


SENT = [
    (framing, appendix, lost)
    for framing in FRAMINGS
    for appendix in (True, False)
    for lost in range(3 if framing == "headerless" else 5 if appendix else 4)
]


@pytest.mark.parametrize(("framing", "appendix", "lost"), SENT)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_lost_part_costs_its_own_frame_and_is_told_once(framing: Framing, lost: int, appendix: bool, encoding: Encoding) -> None:
    messages = series_of(5, encoding=encoding, told=appendix)
    struck = messages[1 + STRUCK]
    if framing == "headerless":
        struck = struck[:3]
    messages[1 + STRUCK] = struck[:lost] + struck[lost + 1 :]
    found = read(framed(messages, framing))
    assert reasons(found) == LOST[lost], "a frame that has its pixels is whole"
    assert frames_of(found) == [index for index in range(5) if index != STRUCK or not LOST[lost]]
    assert isinstance(found[-1], SeriesEnd)
    for frame in found:
        if isinstance(frame, Frame):
            np.testing.assert_array_equal(frame.counts, pixels(frame.index))
            if appendix and framing != "headerless" and not (frame.index == STRUCK and lost == 4):
                assert frame.position == (frame.index * 1e-6, -2e-6)
    if lost == 3:
        assert [frame.detector_time is None for frame in found if isinstance(frame, Frame)].count(True) == 1


@pytest.mark.parametrize("appendix", [True, False])
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("struck", [0, 1, 2])
def test_a_garbled_part_costs_its_own_frame_and_is_told_once(framing: Framing, struck: int, appendix: bool) -> None:
    messages = series_of(5, told=appendix)
    parts = list(messages[1 + STRUCK])
    parts[struck] = bytes([parts[struck][0] ^ 1]) + parts[struck][1:]
    messages[1 + STRUCK] = tuple(parts)
    found = read(framed(messages, framing))
    # Text behind a dconfig is an appendix of that image: then it is the dimage_d that finds itself without the part before it.
    damaged = "stray_part" if framing == "parts" and not appendix else "not_stream_v1"
    assert reasons(found) == [{0: damaged, 1: "missing_part", 2: "wrong_hash"}[struck]]
    assert frames_of(found) == [0, 1, 3, 4]


@pytest.mark.parametrize("framing", ["multipart", "split_header", "parts"])
@pytest.mark.parametrize("lost", range(7))
def test_a_lost_part_of_a_header_costs_no_frame(framing: Framing, lost: int) -> None:
    messages = series_of(3)
    messages[0] = messages[0][:lost] + messages[0][lost + 1 :]
    found = read(framed(messages, framing))
    assert frames_of(found) == [0, 1, 2]
    # 0 dheader, 1 configuration, 2 flat field, 4 mask, 6 appendix
    assert len(reasons(found)) == (0 if lost == 6 else 1)
    starts = [record for record in found if isinstance(record, SeriesStart)]
    assert len(starts) == (0 if lost == 0 else 1)
    if starts:
        assert (starts[0].detector.mask is None) is (lost in (4, 5))
        assert (starts[0].detector.flat is None) is (lost in (2, 3))


def test_stray_parts_are_told_once_a_frame() -> None:
    last = image(9)
    found = read([(part,) for part in (*last[1:], *last[3:], *last[4:])] + [image(0)])
    assert reasons(found) == ["stray_part"] * 3, "an image without its dimage, a dconfig with its appendix, an appendix alone"
    assert frames_of(found) == [0]


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("sent", [1, 2, 3])
def test_an_aborted_series_does_not_reach_into_the_next(framing: Framing, sent: int) -> None:
    broken = series_of(5, 7)[:3]
    broken[-1] = broken[-1][:sent]
    found = read(chain(framed(broken, framing), framed(series_of(3, 8), framing)))
    assert reasons(found) == ([] if sent == 3 else ["missing_part"])
    assert [(frame.series, frame.index) for frame in found if isinstance(frame, Frame)] == [
        ("7", 0),
        *([("7", 1)] if sent == 3 else []),
        ("8", 0),
        ("8", 1),
        ("8", 2),
    ]


def test_every_message_of_garbage_is_told() -> None:
    garbage = [(random.Random(seed).randbytes(200),) for seed in range(5)]
    assert reasons(read(garbage)) == ["not_stream_v1"] * 5
    assert reasons(read([image(0), *garbage, image(1)])) == ["not_stream_v1"] * 5


def test_a_blob_that_reads_like_a_part_is_still_the_blob() -> None:
    trap = json.dumps({"htype": "dseries_end-1.0", "series": 7}).encode().ljust(240)
    counts = np.frombuffer(trap, np.uint8).reshape(SHAPE)
    found = read(framed([encode_image(7, 0, counts, 0.0, encoding="none"), encode_end(7)], "parts"))
    assert frames_of(found) == [0]
    assert len(found) == 2
    np.testing.assert_array_equal(found[0].counts, counts)


# What is held back

LAST = {"with its times": 4, "without them": 3}


@pytest.mark.parametrize("sent", LAST.values(), ids=LAST)
def test_a_frame_that_waits_for_parts_goes_when_none_came_for_half_a_second(sent: int) -> None:
    decoder = StreamV1Decoder("eiger")
    for part in image(0)[:sent]:
        assert list(decoder.decode(part, 100.0)) == []
    assert list(decoder.due(100.4)) == []
    assert list(decoder.due(100.4)) == []
    assert frames_of(decoder.due(100.6)) == [0]
    assert list(decoder.due(math.inf)) == []


def test_a_frame_that_waits_for_parts_goes_as_soon_when_the_clock_was_set_back() -> None:
    decoder = StreamV1Decoder("eiger")
    for part in image(0)[:3]:
        assert list(decoder.decode(part, 10_000.0)) == []
    assert [list(decoder.due(at)) for at in (6400.0, 6400.4)] == [[], []]
    assert frames_of(decoder.due(6400.6)) == [0]


def test_a_frame_is_not_taken_from_its_last_parts_because_they_waited_in_a_queue() -> None:
    decoder = StreamV1Decoder("eiger")
    *first, times, appendix = image(0)
    for part in first:
        assert list(decoder.decode(part, 100.0)) == []
    assert list(decoder.due(130.0)) == [], "half a minute after it was received, but other parts may have come as early"
    found = [*decoder.decode(times, 100.1), *decoder.decode(appendix, 100.1)]
    assert frames_of(found) == [0]
    assert found[0].position is not None


def test_an_image_without_pixels_is_waited_for_longer_and_then_given_up() -> None:
    decoder = StreamV1Decoder("eiger")
    assert list(decoder.decode(image(0)[0], 100.0)) == []
    assert [list(decoder.due(at)) for at in (100.1, 101.0)] == [[], []]
    assert reasons(decoder.due(106.0)) == ["missing_part"]


def test_a_header_that_waits_for_an_appendix_goes_when_none_came() -> None:
    decoder = StreamV1Decoder("eiger")
    for part in encode_start(7, DETECTOR, 4, np.dtype("u2"), {}, "basic"):
        assert list(decoder.decode(part, 100.0)) == []
    assert list(decoder.due(100.1)) == []
    assert [type(record) for record in decoder.due(100.7)] == [SeriesStart]


def test_positions_of_earlier_frames_come_with_a_later_one() -> None:
    late = [[0, 1e-6, 2e-6], [1, None, 2e-6], [2.5, 1, 1], "x"]
    (frame,) = read([encode_image(7, 3, pixels(3), 0.0, user_data={"positions_m": late, "position_m": ["a", 1]})])
    assert isinstance(frame, Frame)
    assert (frame.position, frame.late) == (None, {0: (1e-6, 2e-6)})


# What nobody should send


def with_(part: int, raw: bytes | None = None, **changes: object) -> Parts:
    parts = list(image(1, told=False))
    item = {key: value for key, value in (json.loads(parts[part]) | changes).items() if value != "absent"} if raw is None else {}
    parts[part] = json.dumps(item).encode() if raw is None else raw
    return tuple(parts)


def with_blob(blob: bytes, **changes: object) -> Parts:
    header, layout, _, times = with_(1, **changes)
    digest = hashlib.md5(blob).hexdigest()
    layout = json.dumps(json.loads(layout) | {"size": len(blob)}).encode()
    return (json.dumps(json.loads(header) | {"hash": digest}).encode(), layout, blob, times)


BLOB = compress("bslz4", pixels(1))
BAD = {
    "no series": ("missing_key", with_(0, series="absent")),
    "series is a list": ("wrong_type", with_(0, series=[])),
    "series of half a surrogate": ("wrong_type", with_(0, series="\ud800")),
    "series is negative": ("wrong_type", with_(0, series=-1)),
    "no index": ("bad_index", with_(0, frame="absent")),
    "negative index": ("bad_index", with_(0, frame=-1)),
    "index of 2**60": ("bad_index", with_(0, frame=2**60)),
    "index of 5000 digits": ("bad_index", with_(0, b'{"htype":"dimage-1.0","series":7,"frame":' + b"1" * 5000 + b"}")),
    "boolean index": ("bad_index", with_(0, frame=True)),
    "hash is a number": ("wrong_type", with_(0, hash=5)),
    "hash of other bytes": ("wrong_hash", with_(0, hash="0" * 32)),
    "no shape": ("missing_key", with_(1, shape="absent")),
    "no encoding": ("missing_key", with_(1, encoding="absent")),
    "shape of three": ("wrong_shape", with_(1, shape=[1, 20, 12])),
    "shape is negative": ("wrong_shape", with_(1, shape=[-20, -12])),
    "shape is NaN": ("wrong_shape", with_(1, shape=[math.nan, 12])),
    "shape is huge": ("wrong_shape", with_(1, shape=[2**31, 2**31])),
    "shape of nothing": ("wrong_shape", with_(1, shape=[0, 12])),
    "shape is text": ("wrong_shape", with_(1, shape="20 x 12")),
    "unknown type": ("wrong_dtype", with_(1, type="uint64")),
    "type is a list": ("wrong_dtype", with_(1, type=["uint16"])),
    "unknown encoding": ("bad_compression", with_(1, encoding="zip<")),
    "big endian": ("bad_compression", with_(1, encoding="bs16-lz4>")),
    "bits of another type": ("bad_compression", with_(1, encoding="bs32-lz4<")),
    "encoding is a number": ("bad_compression", with_(1, encoding=4)),
    "size of another blob": ("wrong_shape", with_(1, size=len(BLOB) + 1)),
    "truncated blob": ("bad_compression", with_blob(BLOB[:-3])),
    "blob claims 100 GB": ("bad_compression", with_blob((100 * 2**30).to_bytes(8, "big") + BLOB[8:])),
    "blob of nothing": ("bad_compression", with_blob(bytes(12))),
    "no blob": ("bad_compression", with_blob(b"")),
    "no blob, uncompressed": ("wrong_shape", with_blob(b"", encoding="<")),
    "bare block of nothing": ("bad_compression", with_blob(b"\0", encoding="lz4<")),
    "bare block of garbage": ("bad_compression", with_blob(b"\xff" * 50, encoding="lz4<")),
    "a few bytes that are 200 MB": ("bad_compression", with_blob(b"\xff" * 50, encoding="lz4<", shape=[10000, 10000])),
    "uncompressed and too short": ("wrong_shape", with_blob(bytes(479), encoding="<")),
    "JSON that nests without end": ("not_stream_v1", with_(0, b'{"htype":' + b"[" * 100_000)),
    "no UTF-8": ("not_stream_v1", with_(0, b'{"htype":"dimage-1.0\xff"}')),
    "unknown htype": ("not_stream_v1", with_(0, htype="dimage-2.0")),
    "htype is a list": ("not_stream_v1", with_(0, htype=[])),
    "another shape than before": ("wrong_shape", encode_image(7, 1, pixels(1, shape=(6, 20)), 0.0)),
    "another dtype than before": ("wrong_dtype", encode_image(7, 1, pixels(1, "u4"), 0.0)),
}


@pytest.mark.parametrize("framing", ["multipart", "parts"])
@pytest.mark.parametrize(("reason", "message"), BAD.values(), ids=BAD)
def test_a_bad_image_is_the_senders_fault_and_says_why(reason: str, message: Parts, framing: Framing) -> None:
    found = read(framed([image(0), message, image(2)], framing))
    assert reasons(found) == [reason]
    assert frames_of(found) == [0, 2]


@pytest.mark.parametrize("message", [(), ("start", {}), (b"{}", "x"), Frame("e", "7", 0, pixels(0), 0.0)], ids=repr)
def test_what_is_no_message_of_parts_is_refused(message: object) -> None:
    with pytest.raises(WireError, match="not_stream_v1"):
        list(StreamV1Decoder("eiger").decode(message, 0.0))


@pytest.mark.parametrize("framing", ["multipart", "parts"])
def test_a_message_beyond_the_limit_costs_one_frame(framing: Framing) -> None:
    large = encode_image(7, 1, np.random.default_rng(0).integers(0, 2**16, (200, 200), np.uint16), 0.0)
    found = read(framed([image(0), large, image(2)], framing), StreamV1Decoder("eiger", max_message_bytes=10_000))
    assert reasons(found) == ["too_large"]
    assert frames_of(found) == [0, 2]


def test_a_message_of_a_thousand_parts_is_refused() -> None:
    assert reasons(read([(b"x",) * 1000])) == ["not_stream_v1"]


def test_hashes_are_checked_where_there_are_any() -> None:
    for absent in ("", "absent", None):
        header = with_(0, hash=absent)
        assert frames_of(read([header])) == [1]
    flipped = list(image(1))
    flipped[2] = flipped[2][:-1] + bytes([flipped[2][-1] ^ 1])
    assert reasons(read([tuple(flipped)])) == ["wrong_hash"]


def test_metadata_that_no_file_would_take_are_made_harmless() -> None:
    header, config, *_ = series_of()[0]
    appendix = b'{"name":"\\ud800","number":1e999,"many":' + b"1" * 3000 + b"}"
    (start,) = read([(header, config, appendix)])
    assert isinstance(start, SeriesStart)
    assert start.metadata["user_data"]["name"].encode()
    deep = b'{"a":' * 200 + b"1" + b"}" * 200
    (start,) = read([(header, config, deep)])
    assert start.metadata["user_data"] == {}


# Recorded


@pytest.mark.parametrize("framing", ["multipart", "split_header", "parts"])
def test_a_recorded_series_whose_blobs_are_cut(data_folder: Path, framing: Framing) -> None:
    with (data_folder / "wire/dectris_v1/eiger2_9m_header_detail_all.cbors").open("rb") as file:
        messages = [tuple(cbor2.load(file)) for _ in range(5)]
    assert len(messages[0]) == 9
    start, *errors, end = read(framed(messages, framing))
    assert isinstance(start, SeriesStart)
    assert isinstance(end, SeriesEnd)
    assert (start.series, start.expected) == ("6", 3)
    detector = start.detector
    assert (detector.shape, detector.pixel_m, detector.energy_ev, detector.saturation) == ((3262, 3108), 75e-6, 8041.0, 83270.0)
    assert (detector.mask, detector.beam_centre, detector.distance_m) == (None, None, None)
    assert start.metadata["detector_description"] == "Dectris EIGER2 CdTe 9M"
    assert start.metadata["user_data"]["collect_dict"]["col_id"] == 128579
    assert reasons(errors) == ["wrong_shape", *["wrong_hash"] * 3], "the tables, told once, and three images"


def test_the_recorded_header_is_read_whole_where_its_tables_are(data_folder: Path) -> None:
    with (data_folder / "wire/dectris_v1/eiger2_9m_header_detail_all.cbors").open("rb") as file:
        header, config, flat, _, mask, _, rates, table, appendix = cbor2.load(file)
    ones, bad = np.ones((3262, 3108), "<f4"), np.zeros((3262, 3108), "<u4")
    bad[3000, 10] = 1
    unapplied = json.dumps(json.loads(config) | {"flatfield_correction_applied": False}).encode()
    (start,) = read([(header, unapplied, flat, ones.tobytes(), mask, bad.tobytes(), rates, table, appendix)])
    assert isinstance(start, SeriesStart)
    np.testing.assert_array_equal(start.detector.mask, bad != 0)
    np.testing.assert_array_equal(start.detector.flat, ones)


# Anything at all

GOOD = [part for message in series_of(2) for part in message]


@st.composite
def anything(draw: st.DrawFn) -> Parts:
    """Parts of a series, cut, flipped, doubled and out of order, and bytes that never were parts."""
    part = st.one_of(st.sampled_from(GOOD), st.binary(max_size=60), st.builds(mutate, st.sampled_from(GOOD), st.integers(0, 2**30)))
    return tuple(draw(st.lists(part, min_size=1, max_size=10)))


def mutate(part: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    at = chance.randrange(len(part))
    wild = chance.choice([b"", b"null", b"1e999", b"-1", b"[]", b"NaN", b'"', b"{", bytes([chance.randrange(256)])])
    return part[:at] + wild + part[at + chance.randrange(12) :]


@settings(max_examples=400, deadline=None)
@given(st.lists(anything(), max_size=8), st.booleans())
def test_nothing_but_a_wire_error_ever_leaves_the_decoder(messages: list[Parts], closing: bool) -> None:
    decoder = StreamV1Decoder("eiger")
    for message in messages:
        for record in decoder.decode(message, 1.0):
            assert isinstance(record, SeriesStart | Frame | SeriesEnd | WireError)
        if closing:
            list(decoder.due(2.0))
    list(decoder.due(math.inf))
    assert frames_of(read([image(0, 9)], decoder)) == [0], "the next series is read as ever"
