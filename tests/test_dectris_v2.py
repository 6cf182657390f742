"""Stream V2: recordings decode, what we encode decodes to the same, and hostile bytes raise WireError and nothing else."""

from __future__ import annotations

import datetime
import re
from pathlib import Path

import cbor2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.errors import WireError
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.wire.compression import compress, decompress
from streamprior.wire.dectris_v2 import StreamV2Decoder, encode_end, encode_image, encode_start

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


def test_recorded_blobs_are_encoded_to_the_same_bytes(data_folder: Path) -> None:
    item = cbor2.loads((data_folder / "wire/dectris_v2/bslz4_32bit/000001.cbor").read_bytes())
    (shape, typed) = item["data"]["threshold_1"].value
    _, _, blob = typed.value.value
    assert compress("bslz4", decompress("bslz4", blob, np.dtype("<u4"), tuple(shape))) == blob


@pytest.mark.parametrize("compression", ["bslz4", "lz4", None])
@pytest.mark.parametrize("dtype", ["u1", "u2", "u4", "f4"])
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
    return [
        ("garbage", "not_cbor", b"\xff" * 100),
        ("empty", "not_cbor", b""),
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
        ("unknown dtype", "wrong_dtype", with_(data=pixels(99, b"12" * 256))),
        ("truncated blob", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, blob[:-3]])))),
        ("blob of 4 bytes", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, b"1234"])))),
        ("blob claims 100 GB", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, forged])))),
        ("blob decompresses to nothing", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["lz4", 2, bytes(12)])))),
        ("unknown algorithm", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["zip", 2, blob])))),
        ("blob is text", "bad_compression", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", 2, "blob"])))),
        ("compression of two", "wrong_type", with_(data=pixels(69, cbor2.CBORTag(56500, ["bslz4", blob])))),
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
