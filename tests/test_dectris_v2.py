"""Stream V2: recordings decode, what we encode decodes to the same, and hostile bytes raise WireError and nothing else."""

from __future__ import annotations

import datetime
import os
import random
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.errors import WireError
from streamprior.ledger import Ledger
from streamprior.records import Batch, Detector, Flag, Frame, SeriesEnd, SeriesStart
from streamprior.runs import Runs
from streamprior.stages.prepare import Preparer
from streamprior.wire import compression
from streamprior.wire.cbor import MAX_DEPTH, MAX_ITEMS, check, follows, outlined
from streamprior.wire.compression import compress, decompress
from streamprior.wire.dectris_v2 import DTYPES, StreamV2Decoder, encode_end, encode_image, encode_start
from tests.builders import small_prior
from tests.fuzz.mutate import torn

DATE = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)


def image(counts: np.ndarray, index: int = 0, **settings) -> bytes:
    return encode_image(7, "S7", index, counts, 0.25, DATE, 0.01, **settings)


def decoded(message: bytes, **settings):
    return StreamV2Decoder("eiger", **settings).decode(message, received=1.0)[0]


@pytest.mark.parametrize(
    ("folder", "dtype", "mean"), [("bslz4_16bit", "u2", 1.717385), ("bslz4_32bit", "u4", 14.004588), ("lz4_8bit", "u1", 1.717608)]
)
def test_recorded_images_decode(data_folder: Path, folder: str, dtype: str, mean: float) -> None:
    files = sorted((data_folder / "wire" / "dectris_v2" / folder).glob("*.cbor"))
    decoder = StreamV2Decoder("eiger")
    records = [decoder.decode(file.read_bytes(), received=5.0)[0] for file in files]
    frames, end = records[:-1], records[-1]
    assert isinstance(end, SeriesEnd)
    assert [frame.index for frame in frames] == list(range(len(frames)))
    assert {frame.series for frame in frames} == {end.series}
    assert frames[0].counts.shape == (514, 1030)
    assert frames[0].counts.dtype == np.dtype(dtype)
    assert frames[0].counts.mean() == pytest.approx(mean, abs=1e-5)
    # A flat illumination: no pixel of threshold_1 stands out, so a wrong decode (a shuffled bit plane) would show.
    assert frames[0].counts.max() <= 2.5 * mean
    assert frames[0].detector_time == pytest.approx(decoder.decode(files[0].read_bytes(), 5.0)[0].detector_time)
    assert datetime.datetime.fromtimestamp(frames[0].detector_time, datetime.UTC).year == 2023


def test_the_channel_is_a_choice(data_folder: Path) -> None:
    message = (data_folder / "wire/dectris_v2/bslz4_16bit/000001.cbor").read_bytes()
    one, two = decoded(message), decoded(message, channel="threshold_2")
    assert (one.counts != two.counts).any()
    with pytest.raises(WireError, match="no_channel"):
        decoded(message, channel="threshold_3")


def test_recorded_start_message_with_stub_mask(data_folder: Path) -> None:
    start = decoded((data_folder / "wire/dectris_v2/eiger2_16m/start.cbor").read_bytes())
    assert isinstance(start, SeriesStart)
    assert start.expected == 1
    assert start.detector.shape == (4362, 4148)
    assert start.detector.energy_ev == pytest.approx(13500.3, abs=0.1)
    assert start.detector.distance_m == pytest.approx(0.23716, abs=1e-4)
    assert start.detector.mask is None
    assert start.detector.flat is None
    assert start.detector.saturation == 21517
    assert start.detector.beam_centre == pytest.approx((2163.62, 2049.38), abs=0.01)
    assert (start.detector.pixel_m, start.detector.frame_time_s) == (7.5e-5, pytest.approx(4.31757e-3, abs=1e-8))
    end = decoded((data_folder / "wire/dectris_v2/eiger2_16m/end.cbor").read_bytes())
    assert end == SeriesEnd("eiger", start.series)


def test_recorded_blobs_are_encoded_to_the_same_bytes(data_folder: Path) -> None:
    item = cbor2.loads((data_folder / "wire/dectris_v2/bslz4_32bit/000001.cbor").read_bytes())
    (shape, typed) = item["data"]["threshold_1"].value
    _, _, blob = typed.value.value
    assert compress("bslz4", decompress("bslz4", blob, np.dtype("<u4"), tuple(shape))) == blob


@pytest.mark.parametrize("compression", ["bslz4", "lz4", None])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "u8", "i4", "f4"])
@pytest.mark.parametrize("shape", [(128, 128), (104, 104), (3, 5), (67, 129)])
def test_round_trip(compression: str | None, dtype: str, shape: tuple[int, int]) -> None:
    counts = np.random.default_rng(0).poisson(3, shape).astype(dtype)
    frame = decoded(image(counts, 3, compression=compression, user_data={"position_m": [1e-6, -2e-6], "origin": 41}))
    assert isinstance(frame, Frame)
    assert (frame.series, frame.index, frame.position, frame.origin) == ("S7", 3, (1e-6, -2e-6), 41)
    assert frame.detector_time == pytest.approx(DATE.timestamp() + 0.25)
    assert frame.counts.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(frame.counts, counts)


def test_start_and_end_round_trip() -> None:
    mask = np.zeros((8, 16), bool)
    mask[2, 3] = True
    detector = Detector((8, 16), mask, np.full((8, 16), 1.5, np.float32), 6e4, (4.0, 8.0), 75e-6, 0.5, 9000.0, 0.01)
    start = decoded(encode_start(7, "S7", detector, 400, np.dtype("u2"), {"scan": "S54"}))
    assert isinstance(start, SeriesStart)
    assert (start.series, start.expected, start.metadata["user_data"]) == ("S7", 400, {"scan": "S54"})
    np.testing.assert_array_equal(start.detector.mask, mask)
    np.testing.assert_array_equal(start.detector.flat, detector.flat)
    assert start.detector.saturation == 6e4
    assert (start.detector.beam_centre, start.detector.distance_m) == ((4.0, 8.0), 0.5)
    assert decoded(encode_end(7, "S7")) == SeriesEnd("eiger", "S7")


def bad_messages() -> list[tuple[str, str, bytes]]:
    good = image(np.ones((16, 16), np.uint16))
    item = dict(cbor2.loads(good))

    def with_(**changes) -> bytes:
        return cbor2.dumps(cbor2.CBORTag(55799, {key: value for key, value in (item | changes).items() if value is not None}))

    def pixels(typed_tag: int, payload, shape=(16, 16)) -> dict:
        return {"threshold_1": cbor2.CBORTag(40, [list(shape), cbor2.CBORTag(typed_tag, payload)])}

    blob = compress("bslz4", np.ones((16, 16), np.uint16))
    forged = (100 * 2**30).to_bytes(8, "big") + blob[8:]
    tiny = (2**22).to_bytes(8, "big") + (8).to_bytes(4, "big") + bytes(2**18)
    odd = (512).to_bytes(8, "big") + (17).to_bytes(4, "big") + blob[12:]
    much = (2**28).to_bytes(8, "big") + (2**28).to_bytes(4, "big") + (4).to_bytes(4, "big") + b"abcd"
    return [
        ("garbage", "not_cbor", b"\xff" * 100),
        ("empty", "not_cbor", b""),
        ("two messages in one", "not_cbor", good + good),
        ("text", "not_stream_v2", cbor2.dumps("hello")),
        ("list", "not_stream_v2", cbor2.dumps([1, 2])),
        ("unknown type", "not_stream_v2", with_(type="picture")),
        ("truncated message", "not_cbor", good[: len(good) // 2]),
        ("no series", "missing_key", with_(series_id=None, series_unique_id=None)),
        ("no index", "bad_index", with_(image_id=None)),
        ("negative index", "bad_index", with_(image_id=-1)),
        ("index of 2**60", "bad_index", with_(image_id=2**60)),
        ("boolean index", "bad_index", with_(image_id=True)),
        ("no data", "no_channel", with_(data=None)),
        ("data is a number", "no_channel", with_(data=3)),
        ("channel is a number", "wrong_type", with_(data={"threshold_1": 3})),
        ("shape of three", "wrong_type", with_(data=pixels(69, b"12" * 256, (1, 16, 16)))),
        ("shape is negative", "wrong_shape", with_(data=pixels(69, b"12" * 256, (-16, -16)))),
        ("shape is huge", "wrong_shape", with_(data=pixels(69, b"12" * 256, (2**31, 2**31)))),
        ("plain bytes too short", "wrong_shape", with_(data=pixels(69, b"12" * 255))),
        ("half precision", "wrong_dtype", with_(data=pixels(84, b"12" * 256))),
        ("truncated blob", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, blob[:-3]])))),
        ("blob of 4 bytes", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, b"1234"])))),
        ("blob claims 100 GB", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, forged])))),
        ("blob decompresses to nothing", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["lz4", 2, bytes(12)])))),
        ("unknown algorithm", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["zip", 2, blob])))),
        ("blob is text", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, "blob"])))),
        ("compression of two", "wrong_type", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", blob])))),
        ("blocks of 8 bytes", "bad_compression", with_(data=pixels(64, cbor2.CBORTag(56500, ["bslz4", 1, tiny]), (2048, 2048)))),
        ("blocks of half a pixel", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, odd])))),
        ("a few bytes for 256 MB", "bad_compression", with_(data=pixels(64, cbor2.CBORTag(56500, ["lz4", 0, much]), (2**14, 2**14)))),
        ("time without denominator", "wrong_type", with_(start_time=[1])),
        ("time over zero", "wrong_type", with_(start_time=[1, 0])),
    ]


@pytest.mark.parametrize(("reason", "message"), [case[1:] for case in bad_messages()], ids=[case[0] for case in bad_messages()])
def test_a_bad_message_is_the_senders_fault_and_says_why(reason: str, message: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decoded(message)
    assert caught.value.reason == reason
    assert len(caught.value.detail) > 10


def test_an_oversized_message_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(WireError, match="too_large"):
        decoded(image(np.ones((64, 64), np.uint32), compression=None), max_message_bytes=10_000)


def test_shape_and_dtype_may_not_change_within_a_series() -> None:
    decoder = StreamV2Decoder("eiger")
    decoder.decode(image(np.ones((16, 16), np.uint16)), 0.0)[0]
    with pytest.raises(WireError, match="wrong_shape"):
        decoder.decode(image(np.ones((16, 8), np.uint16)), 0.0)[0]
    with pytest.raises(WireError, match="wrong_dtype"):
        decoder.decode(image(np.ones((16, 16), np.uint32)), 0.0)[0]
    assert decoder.decode(image(np.ones((16, 16), np.uint16)), 0.0)[0].counts.sum() == 256
    assert decoder.decode(encode_image(8, "S8", 0, np.ones((4, 4), np.uint8), 0.0, DATE), 0.0)[0].counts.sum() == 16


GIANT = 2**30_000
"""Python refuses to write such an integer in decimal, or to make it a float."""


def hostile_starts() -> list[tuple[str, str, bytes]]:
    def start(**item) -> bytes:
        return cbor2.dumps(cbor2.CBORTag(55799, {"type": "start", "series_unique_id": "S7", **item}))

    endless: list = []
    endless.append(endless)
    doubled: list = [0]
    for _ in range(40):
        doubled = [doubled, doubled]
    shared = [cbor2.dumps({"type": "start", "series_id": 7, "user_data": {"a": value}}, value_sharing=True) for value in (endless, doubled)]
    long = b"\xc2\x5a" + (400_000).to_bytes(4, "big") + b"\x7f" * 400_000
    named_twice = cbor2.dumps({"type": "start", "series_id": 7, "user_data": {"a": ["much text"] * 2}}, string_referencing=True)
    return [
        ("giant number of images", "wrong_type", start(number_of_images=-GIANT)),
        ("giant series", "wrong_type", cbor2.dumps({"type": "start", "series_id": GIANT})),
        ("giant series at the end", "wrong_type", cbor2.dumps({"type": "end", "series_id": GIANT})),
        ("giant saturation", "wrong_type", start(saturation_value=GIANT)),
        ("giant distance", "wrong_type", start(detector_translation=[0, 0, GIANT])),
        ("mask without an array", "wrong_type", start(pixel_mask={"threshold_1": cbor2.CBORTag(40, 3)})),
        (
            "mask of a number",
            "wrong_type",
            start(pixel_mask={"threshold_1": cbor2.CBORTag(40, [[1, 1], cbor2.CBORTag(70, cbor2.CBORTag(56500, 5))])}),
        ),
        ("image index of a list", "bad_index", cbor2.dumps({"type": "image", "series_id": 7, "image_id": [[1] * 1000]})),
        ("image index of much text", "bad_index", cbor2.dumps({"type": "image", "series_id": 7, "image_id": "9" * 100_000})),
        ("channel of much text", "no_channel", cbor2.dumps({"type": "image", "series_id": 7, "image_id": 1, "data": {"c" * 100_000: 1}})),
        ("value that holds itself", "not_cbor", shared[0]),
        ("2**40 items in 400 bytes", "not_cbor", shared[1]),
        ("string reference", "not_cbor", named_twice),
        ("regular expression", "not_cbor", start(user_data={"a": re.compile("a+")})),
        ("mail", "not_cbor", start(user_data={"a": cbor2.CBORTag(36, "Subject: x")})),
        ("keys that are no text", "not_cbor", start(user_data={1: 2})),
        ("deep", "not_cbor", b"\x81" * 300 + b"\x00"),
        ("deep in tags", "not_cbor", b"\xd9\xd9\xf7" * 300 + b"\x00"),
        # A ratio is reduced, a decimal made exact, in quadratic time: 14 s for these.
        ("ratio of long integers", "not_cbor", b"\xd8\x1e\x82" + 2 * long),
        ("decimal of a long integer", "not_cbor", b"\xc4\x82\x01" + long),
        ("a million empty maps", "not_cbor", b"\x9a\x00\x0f\x42\x40" + b"\xa0" * 1_000_000),
        ("endless empty maps", "not_cbor", b"\x9f" + b"\xa0" * 1_000_000 + b"\xff"),
        ("endless within endless", "not_cbor", b"\x9f" * 39 + b"\x00" * 1_000_000),
        ("endless text", "not_cbor", b"\x7f" + b"\x61a" * 1_000_000 + b"\xff"),
        ("long text", "not_cbor", start(user_data={"a": "\N{BLUE HEART}" + "a" * 10_000_000})),
        ("half a map", "not_cbor", b"\xbf\x61a\xff"),
        ("a break without a beginning", "not_cbor", b"\x82\x01\xff"),
    ]


@pytest.mark.parametrize(("reason", "message"), [case[1:] for case in hostile_starts()], ids=[case[0] for case in hostile_starts()])
def test_a_hostile_message_is_answered_shortly(reason: str, message: bytes) -> None:
    with pytest.raises(WireError) as caught:
        decoded(message)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize(
    ("announced", "expected"), [(400, 400), (0, None), (10**9, None), (GIANT, None)], ids=["400", "0", "a thousand million", "giant"]
)
def test_a_number_of_images_that_no_run_can_hold_stands_for_unknown(announced: int, expected: int | None) -> None:
    start = decoded(cbor2.dumps({"type": "start", "series_id": 7, "number_of_images": announced}))
    assert isinstance(start, SeriesStart)
    assert start.expected == expected


def test_numbers_that_no_archive_can_hold_are_left_out() -> None:
    start = decoded(cbor2.dumps({"type": "start", "series_id": 7, "user_data": {"a": GIANT}, "detector_translation": [0, 0, float("nan")]}))
    assert isinstance(start, SeriesStart)
    assert start.metadata["user_data"]["a"] == hex(GIANT)
    assert start.detector.distance_m is None
    unknown = decoded(cbor2.dumps({"type": "start", "series_id": 7, "saturation_value": 0}))
    assert isinstance(unknown, SeriesStart)
    assert unknown.detector.saturation is None
    frame = decoded(image(np.ones((4, 4), np.uint8), user_data={"origin": 2**70}))
    assert isinstance(frame, Frame)
    assert frame.origin is None
    item = dict(cbor2.loads(image(np.ones((4, 4), np.uint8)))) | {"start_time": [1.0, float("nan")]}
    assert decoded(cbor2.dumps(item)).detector_time is None


def test_an_lz4_block_that_gives_less_than_it_should_is_refused_at_once() -> None:
    header = (4 * 16 * 16).to_bytes(8, "big") + (4 * 16 * 16).to_bytes(4, "big")
    nothing = (1).to_bytes(4, "big") + b"\0"
    with pytest.raises(WireError, match=r"0 bytes where 1024 were due"):
        decompress("lz4", header + 1000 * nothing, np.dtype("<u4"), (16, 16))


_GOOD = {
    name: image(np.random.default_rng(1).poisson(2, (24, 24)).astype(np.uint16), compression=name or None) for name in ("bslz4", "lz4", "")
} | {
    "start": encode_start(
        7, "S7", Detector((8, 8), np.eye(8, dtype=bool), np.ones((8, 8), np.float32), 6e4, (4.0, 4.0), 75e-6, 0.5, 9000.0, 0.01),
        400, np.dtype("u2"), {"scan": "S54", "positions": [1.5, None, {"deep": [True]}]},
    ),
    "end": encode_end(7, "S7"),
}  # fmt: skip


@given(st.sampled_from(sorted(_GOOD)), st.data())
@settings(max_examples=400, deadline=None)
def test_flipped_cut_and_spliced_bytes_raise_nothing_but_wire_errors(kind: str, data: st.DataObject) -> None:
    message = bytearray(_GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(message)))
    for candidate in (bytes(message), bytes(message[:cut]), bytes(message[cut:]) + bytes(message)):
        try:
            record = decoded(candidate)
        except WireError:
            continue
        assert isinstance(record, SeriesStart | Frame | SeriesEnd)


def test_images_of_another_shape_than_announced_do_not_turn_the_series_against_its_good_ones() -> None:
    decoder = StreamV2Decoder("eiger")
    decoder.decode(encode_start(7, "S7", Detector(shape=(16, 16)), 3, np.dtype(np.uint16), {}), 0.0)[0]
    with pytest.raises(WireError, match="wrong_shape"):
        decoder.decode(image(np.ones((16, 8), np.uint16)), 0.0)[0]
    assert decoder.decode(image(np.ones((16, 16), np.uint16)), 0.0)[0].counts.sum() == 256


def channels(**planes: Any) -> bytes:
    """An image of several channels; a plane is an array, or whatever stands in its place."""
    item = dict(cbor2.loads(image(np.ones((4, 4), np.uint16))))
    data = {
        name: cbor2.loads(image(plane))["data"]["threshold_1"] if isinstance(plane, np.ndarray) else plane for name, plane in planes.items()
    }
    return cbor2.dumps(item | {"data": data})


def test_one_channel_is_read_and_the_others_are_left_as_they_are() -> None:
    low, high = np.full((16, 16), 3, np.uint16), np.full((16, 16), 2, np.uint16)
    damaged = cbor2.CBORTag(40, [[16, 16], cbor2.CBORTag(69, cbor2.CBORTag(56500, ["bslz4", 2, b"no such thing"]))])
    message = channels(threshold_1=low, threshold_2=high, difference=damaged)
    np.testing.assert_array_equal(decoded(message).counts, low)
    np.testing.assert_array_equal(decoded(message, channel="threshold_2").counts, high)
    with pytest.raises(WireError, match="bad_compression"):
        decoded(message, channel="difference")
    with pytest.raises(WireError, match=r"no_channel.*difference"):
        decoded(channels(difference=low))


def test_planes_of_the_start_message_are_those_of_the_channel() -> None:
    detector = Detector((4, 4), np.eye(4, dtype=bool), np.full((4, 4), 2, np.float32))
    message = encode_start(7, "S7", detector, 1, np.dtype("u2"), {}, channel="threshold_2")
    assert decoded(message).detector.mask is None
    other = decoded(message, channel="threshold_2").detector
    np.testing.assert_array_equal(other.mask, detector.mask)
    np.testing.assert_array_equal(other.flat, detector.flat)


def test_mask_flat_field_and_saturation_of_a_start_message_change_what_prepare_does() -> None:
    prior = small_prior()
    mask, flat = np.zeros((32, 32), bool), np.full((32, 32), 2, np.float32)
    mask[4, 5], flat[7] = True, 0.5
    counts = np.full((32, 32), 10, np.uint16)
    counts[20, 21] = 900

    def photons(detector: Detector) -> Any:
        decoder, runs = StreamV2Decoder("eiger"), Runs(Ledger([]).distinct, late_s=1, idle_s=60)
        (start,) = decoder.decode(encode_start(7, "S7", detector, 1, counts.dtype, {}), 0.0)
        (frame,) = decoder.decode(image(counts), 0.0)
        (run,) = runs.start(start)
        return Preparer(prior)(Batch(run, (frame,))).photons

    plain, told = photons(Detector((32, 32))), photons(Detector((32, 32), mask, flat, 900.0))
    assert plain.valid.all()
    assert (plain.counts[0][counts == 10] == 10).all()
    assert sorted(map(tuple, np.argwhere(~told.valid[0]))) == [(4, 5), (20, 21)]
    assert told.flags[0] & Flag.SATURATED
    assert (told.counts[0, 7] == 5).all()
    assert (told.counts[0, 8:] == 20).all()


@pytest.mark.parametrize(
    ("start_time", "series_date", "expected"),
    [
        ([1, 4], DATE, 0.25),
        ([10**40, 4 * 10**40], DATE, 0.25),
        ([-1, 2], DATE, -0.5),
        ([3.0, 2], DATE, 1.5),
        ([0, 50_000_000], cbor2.CBORTag(1, int(DATE.timestamp())), 0.0),
        ([1, 2], cbor2.CBORTag(1, DATE.timestamp() + 0.5), 1.0),
        ([1, 2], cbor2.CBORTag(0, "2026-03-01T13:00:00.000000+01:00"), 0.5),
        ([10**400, 1], DATE, None),
        ([1, 2], "yesterday", None),
        (7, DATE, None),
    ],
)
def test_rational_times_count_from_the_date_of_the_series(start_time: Any, series_date: Any, expected: float | None) -> None:
    item = dict(cbor2.loads(image(np.ones((4, 4), np.uint8)))) | {"start_time": start_time, "series_date": series_date}
    message = cbor2.dumps(item)
    if start_time == [10**400, 1]:
        with pytest.raises(WireError, match="wrong_type"):
            decoded(message)
    elif expected is None:
        assert decoded(message).detector_time is None
    else:
        assert decoded(message).detector_time == pytest.approx(DATE.timestamp() + expected, abs=1e-6)


@pytest.mark.parametrize("tag", sorted(DTYPES))
@pytest.mark.parametrize("algorithm", ["bslz4", "lz4", None])
def test_every_typed_array_is_read_in_the_machines_order_and_real_numbers_as_float32(tag: int, algorithm: str | None) -> None:
    dtype = DTYPES[tag]
    counts = np.random.default_rng(tag).poisson(40, (9, 13)).astype(dtype)
    payload = counts.tobytes() if algorithm is None else cbor2.CBORTag(56500, [algorithm, dtype.itemsize, compress(algorithm, counts)])
    frame = decoded(channels(threshold_1=cbor2.CBORTag(40, [[9, 13], cbor2.CBORTag(tag, payload)])))
    assert frame.counts.dtype.isnative
    assert frame.counts.dtype == (np.float32 if dtype.kind == "f" else dtype.newbyteorder("="))
    np.testing.assert_array_equal(frame.counts, counts)


def test_a_count_beyond_float32_is_a_pixel_that_was_not_measured() -> None:
    counts = np.ones((4, 4))
    counts[1, 1] = 1e300
    assert np.isinf(decoded(image(counts)).counts[1, 1])


def test_what_a_start_message_does_not_know_is_not_made_up() -> None:
    nothing = {"saturation_value": True, "incident_energy": 0.0, "pixel_size_x": -1.0, "image_size_x": 0, "image_size_y": GIANT}
    start = decoded(cbor2.dumps({"type": "start", "series_id": 7, **nothing}))
    assert start.detector == Detector()
    wave = decoded(cbor2.dumps({"type": "start", "series_id": 7, "incident_wavelength": 0.918381073013}))
    assert wave.detector.energy_ev == pytest.approx(13500.3, abs=0.1)


def test_images_are_read_without_a_start_and_the_next_series_without_an_end() -> None:
    decoder = StreamV2Decoder("eiger")
    for series in (7, 8):
        for index in range(2):
            counts = np.full((8, 8 * series), index, np.uint16)
            (frame,) = decoder.decode(encode_image(series, f"S{series}", index, counts, 0.0, DATE), 0.0)
            assert (frame.series, frame.index, frame.counts.shape) == (f"S{series}", index, counts.shape)
    assert decoder.decode(encode_end(8, "S8"), 0.0) == (SeriesEnd("eiger", "S8"),)


def test_without_the_compiled_unpacker_the_pixels_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(0).poisson(3, (67, 129)).astype(np.uint16)
    message = image(counts)
    np.testing.assert_array_equal(decoded(message).counts, counts)
    monkeypatch.setattr(compression, "_unpack_bslz4", None)
    np.testing.assert_array_equal(decoded(message).counts, counts)


plain_items = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text()
    | st.binary()
    | st.datetimes(timezones=st.just(datetime.UTC)),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(plain_items)
@settings(max_examples=300, deadline=None)
def test_the_walk_over_a_message_ends_where_the_parser_does(item: Any) -> None:
    message = cbor2.dumps(item, timezone=datetime.UTC)
    check(message)
    for damaged in (message[:-1], message + b"\x00"):
        with pytest.raises(WireError, match="not_cbor"):
            check(damaged)


@given(st.binary(max_size=200))
@settings(max_examples=2000, deadline=None)
def test_what_the_walk_refuses_as_cut_short_the_parser_never_reads(message: bytes) -> None:
    try:
        check(message)
    except WireError as error:
        if "end too early" in error.detail:
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the parser says
                cbor2.loads(message)


def checked(message: bytes) -> bool:
    try:
        check(message)
    except WireError:
        return False
    return True


def odd_items() -> list[bytes]:
    """Items that no encoder of ours writes: strings and containers without a length, long byte strings side by side and alone."""
    parts = b"\x5f\x43abc\x58\x03def\xff", b"\x7f\x61a\x78\x01b\xff", b"\x58\x02ab", b"\x5a\x00\x00\x00\x01a", b"\xf8\x20", b"\xfb12345678"
    return [
        *parts,
        b"\x86" + b"".join(parts),
        b"\x9f" + b"".join(parts) + b"\xff",
        b"\xbf\x61a" + parts[0] + b"\x61b" + parts[2] + b"\xff",
        b"\x00",
    ]


def test_what_follows_a_checked_message_passes_the_check_too() -> None:
    walked = [*_GOOD.values(), channels(threshold_1=np.ones((24, 24), np.uint16), threshold_2=np.ones((9, 9), np.uint8)), *odd_items()]
    assert all(map(checked, walked))
    random_, followed, left = random.Random(1), 0, 0
    for message in walked:
        outline = outlined(message)
        assert outline is not None
        assert follows(message, outline)
        assert not follows(b"", outline)
        for _ in range(2000):
            other = torn(message, walked, random_)
            if follows(other, outline):
                followed += other != message
                assert checked(other), other.hex()
            else:
                left += 1
    # Were all of them the same, or none, nothing would have been tried.
    assert followed > 1000
    assert left > 1000


def test_a_long_byte_string_may_have_any_length_and_nothing_else_may_stand_in_its_place() -> None:
    outline = outlined(b"\x58\x02ab")
    assert outline is not None
    for head in range(256):
        message = bytes([head]) + (2).to_bytes(1 << (head & 7)) + b"ab"
        assert follows(message, outline) == (0x58 <= head <= 0x5B)
    assert not follows(b"\x58", outline)
    assert not follows(b"\x5b" + b"\xff" * 8, outline)


@given(st.binary(max_size=60), st.binary(max_size=60))
@settings(max_examples=2000, deadline=None)
def test_every_checked_message_follows_itself_and_a_follower_is_one(one: bytes, other: bytes) -> None:
    if checked(one):
        outline = outlined(one)
        assert outline is not None
        assert follows(one, outline)
        assert checked(other) or not follows(other, outline)


def test_the_images_of_a_series_follow_the_first_of_them() -> None:
    random_ = np.random.default_rng(3)

    def message(index: int) -> bytes:
        user_data = {"position_m": [random_.random(), -random_.random()], "origin": index}
        return encode_image(7, "S7", index, random_.poisson(index % 9, (32, 32)).astype(np.uint16), index / 1e3, DATE, 0.01, user_data)

    outline = outlined(message(2000))
    assert outline is not None
    messages = [message(index) for index in range(2001, 2100)]
    assert len(set(map(len, messages))) > 5
    assert all(follows(one, outline) for one in messages)
    assert not follows(encode_end(7, "S7"), outline)


def test_a_message_of_very_many_items_is_walked_every_time() -> None:
    message = cbor2.dumps({"type": "end", "series_id": 7, "user_data": {"a": [0.5] * 10_000}})
    assert outlined(message) is None
    decoder = StreamV2Decoder("eiger")
    assert [decoder.decode(message, 0.0) for _ in range(2)] == [(SeriesEnd("eiger", "7"),)] * 2


def test_a_damaged_message_behind_a_good_one_is_refused_as_it_is_alone() -> None:
    good = image(np.ones((16, 16), np.uint16), 300)
    for reason, message in ((reason, message) for _, reason, message in (*bad_messages(), *hostile_starts())):
        decoder = StreamV2Decoder("eiger")
        for index in range(2):
            assert isinstance(decoder.decode(good, 0.0)[0], Frame)
            with pytest.raises(WireError) as caught:
                decoder.decode(message, float(index))
            assert caught.value.reason == reason


def test_endless_containers_and_strings_are_read_within_the_same_bounds() -> None:
    parts = b"\xbf\x64type\x7f\x62en\x61d\xff\x69series_id\x07\x69user_data\xbf\x61a\x9f\x01\x02\xff\xff\xff"
    assert decoded(parts) == SeriesEnd("eiger", "7")
    check(b"\x9f" + b"\x00" * (MAX_ITEMS - 10) + b"\xff")
    check(b"\x81" * MAX_DEPTH + b"\x00")


def test_a_hostile_message_takes_no_memory_to_speak_of() -> None:
    messages = [message for _, _, message in hostile_starts()]
    decoder = StreamV2Decoder("eiger")
    tracemalloc.start()
    try:
        for message in messages:
            with pytest.raises(WireError):
                decoder.decode(message, 0.0)
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


def test_arrays_in_user_data_are_named_and_not_spelled_out() -> None:
    start = decoded(cbor2.dumps({"type": "start", "series_id": 7, "user_data": {"a": bytes(10_000_000), "date": DATE}}))
    assert start.metadata["user_data"] == {"a": "of type bytes", "date": str(DATE)}


@pytest.fixture
def other_cbor2() -> dict[str, str]:
    """Environment of a Python that imports cbor2 5."""
    folder = os.environ.get("CBOR2_5_FOLDER", "")
    if not Path(folder, "cbor2").is_dir():
        pytest.skip("no cbor2 5: pip install --target FOLDER 'cbor2<6', and set CBOR2_5_FOLDER to the folder")
    # Without the variable this test is skipped there.
    return {key: value for key, value in os.environ.items() if key != "CBOR2_5_FOLDER"} | {"PYTHONPATH": folder}


def test_all_of_this_holds_with_the_older_generation_of_cbor2(other_cbor2: dict[str, str]) -> None:
    script = "import sys, importlib.metadata as m, pytest; assert m.version('cbor2')[0] == '5'; sys.exit(pytest.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "-p", "no:cacheprovider", __file__], env=other_cbor2, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_one_generation_of_cbor2_encodes_the_other_decodes(other_cbor2: dict[str, str], tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(3, (24, 24)).astype(np.uint16)
    (tmp_path / "six").write_bytes(image(counts))
    script = (
        "import sys, pathlib; from tests.test_dectris_v2 import image, decoded; place = pathlib.Path(sys.argv[1]);"
        "counts = decoded((place / 'six').read_bytes()).counts; (place / 'five').write_bytes(image(counts))"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], env=other_cbor2, cwd=Path(__file__).parents[1], check=True)
    np.testing.assert_array_equal(decoded((tmp_path / "five").read_bytes()).counts, counts)
