"""What an NTNDArray says -> frames and series: dtypes, codecs, dimensions, ids that jump and go back, claims that are hostile."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import bitshuffle
import lz4.block
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamprior.config import PositionSettings
from streamprior.errors import WireError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.wire.ntnd import DTYPES, NtndDecoder

FIELDS = {
    "u1": "ubyteValue",
    "u2": "ushortValue",
    "u4": "uintValue",
    "u8": "ulongValue",
    "i1": "byteValue",
    "i2": "shortValue",
    "i4": "intValue",
    "i8": "longValue",
    "f4": "floatValue",
    "f8": "doubleValue",
}
CODES = {dtype.str[1:]: code for code, dtype in DTYPES.items()}
NOON = 1_772_366_400
"""1 March 2026, 12:00:00 UTC."""


def image(dtype: str = "u2", seed: int = 0, shape: tuple[int, int] = (6, 16)) -> np.ndarray:
    return np.random.default_rng(seed).poisson(3, shape).astype(dtype)


def update(pixels: np.ndarray, number: int = 0, at_s: float | None = None, /, **more: Any) -> tuple[str, dict[str, Any]]:
    """What the source hands over for an image; the detector takes one a second."""
    seconds = NOON + number if at_s is None else at_s
    rows, columns = pixels.shape
    size = {"offset": 0, "binning": 1, "reverse": False}
    fields = {
        "data": {FIELDS[pixels.dtype.str[1:]]: pixels.ravel()},
        "codec": {"name": "", "parameters": ({}, {})},
        "compressedSize": pixels.nbytes,
        "uncompressedSize": pixels.nbytes,
        "dimension": [{"size": columns, "fullSize": columns, **size}, {"size": rows, "fullSize": rows, **size}],
        "uniqueId": number,
        "dataTimeStamp": {"secondsPastEpoch": int(seconds), "nanoseconds": round(seconds % 1 * 1e9), "userTag": 0},
        "attribute": [attribute("ColorMode", 0)],
        "first": False,
    }
    return "ntnd", fields | more


def attribute(name: str, value: Any) -> dict[str, Any]:
    return {"name": name, "value": ({"value": value}, {"value": "type"})}


def packed(pixels: np.ndarray, codec: str, blob: bytes, number: int = 0, /, **more: Any) -> tuple[str, dict[str, Any]]:
    """The image as it comes compressed: bytes, and the code of the dtype they stand for."""
    told = {"name": codec, "parameters": ({"value": CODES[pixels.dtype.str[1:]]}, {})}
    fields = {"data": {"ubyteValue": np.frombuffer(blob, np.uint8)}, "codec": told, "compressedSize": len(blob)}
    return update(pixels, number, **(fields | more))


def bare_lz4(pixels: np.ndarray) -> bytes:
    return lz4.block.compress(pixels.tobytes(), store_size=False)


def bare_bslz4(pixels: np.ndarray) -> bytes:
    return bitshuffle.compress_lz4(pixels.ravel(), 0).tobytes()


def of_hdf5(pixels: np.ndarray, blocks: bytes, block_bytes: int) -> bytes:
    """As the HDF5 filters put it: size and block size before the blocks."""
    return struct.pack(">QI", pixels.nbytes, block_bytes) + blocks


def decoder(**more: Any) -> NtndDecoder:
    return NtndDecoder("pilatus", "13SIM1:Pva1:Image", **{"idle_s": 60.0, **more})


def decoded(one: NtndDecoder, *messages: tuple[str, Mapping[str, Any]], received: float = NOON) -> list[Any]:
    return [record for message in messages for record in one.decode(message, received)]


def frames(records: Iterable[Any]) -> list[Frame]:
    return [record for record in records if isinstance(record, Frame)]


def kinds(records: Iterable[Any]) -> list[str]:
    return [type(record).__name__ for record in records]


def refused(message: Any, **more: Any) -> str:
    with pytest.raises(WireError) as refusal:
        decoder(**more).decode(message, NOON)
    return refusal.value.reason


@pytest.mark.parametrize("dtype", FIELDS)
def test_every_numeric_type_of_the_union_is_a_frame(dtype: str) -> None:
    pixels = image(dtype)
    start, frame = decoded(decoder(), update(pixels))
    assert isinstance(start, SeriesStart)
    assert start.detector.shape == (6, 16)
    np.testing.assert_array_equal(frame.counts, pixels)
    assert frame.counts.dtype == ("f4" if dtype == "f8" else dtype)


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("shape", [(6, 16), (129, 131)], ids=str)
def test_every_codec_gives_the_pixels_back(dtype: str, shape: tuple[int, int]) -> None:
    pixels = image(dtype, shape=shape)
    lz4_block = bare_lz4(pixels)
    blobs = [
        ("lz4", lz4_block),
        ("lz4hdf5", of_hdf5(pixels, struct.pack(">I", len(lz4_block)) + lz4_block, pixels.nbytes)),
        ("lz4", of_hdf5(pixels, struct.pack(">I", len(lz4_block)) + lz4_block, pixels.nbytes)),
        ("bslz4", bare_bslz4(pixels)),
        ("bslz4", of_hdf5(pixels, bare_bslz4(pixels), 8192)),
    ]
    for codec, blob in blobs:
        (frame,) = frames(decoded(decoder(), packed(pixels, codec, blob)))
        np.testing.assert_array_equal(frame.counts, pixels)


def test_of_a_buffer_sent_whole_only_the_compressed_part_is_read() -> None:
    pixels = image("u4")
    blob = bare_bslz4(pixels)
    message = packed(pixels, "bslz4", blob + bytes(500), compressedSize=len(blob))
    (frame,) = frames(decoded(decoder(), message))
    np.testing.assert_array_equal(frame.counts, pixels)


def test_the_first_dimension_is_the_columns() -> None:
    pixels = np.arange(12, dtype=np.uint16).reshape(3, 4)
    message = update(pixels)
    assert [one["size"] for one in message[1]["dimension"]] == [4, 3]
    (frame,) = frames(decoded(decoder(), message))
    assert frame.counts.shape == (3, 4)
    np.testing.assert_array_equal(frame.counts[1], [4, 5, 6, 7])


def test_a_further_dimension_of_one_is_none() -> None:
    message = update(image())
    message[1]["dimension"].append({"size": 1})
    (frame,) = frames(decoded(decoder(), message))
    assert frame.counts.shape == (6, 16)


@pytest.mark.parametrize(
    ("stamp", "at"),
    [
        ({"secondsPastEpoch": NOON, "nanoseconds": 250_000_000}, NOON + 0.25),
        ({"secondsPastEpoch": 0, "nanoseconds": 0}, None),
        ({"secondsPastEpoch": 631152000, "nanoseconds": 0}, None),
        ({"secondsPastEpoch": -5, "nanoseconds": 0}, None),
        ({"secondsPastEpoch": 2**62, "nanoseconds": 0}, None),
        (None, None),
    ],
)
def test_time_stamps_count_from_1970_and_one_that_nobody_set_is_none(stamp: Any, at: float | None) -> None:
    (frame,) = frames(decoded(decoder(), update(image(), dataTimeStamp=stamp)))
    assert frame.detector_time == at
    assert frame.received == NOON


def test_indices_count_from_the_first_id_and_a_gap_stays_a_gap() -> None:
    records = decoded(decoder(), *(update(image(), number) for number in (1041, 1042, 1045)))
    assert kinds(records) == ["SeriesStart", "Frame", "Frame", "Frame"]
    assert [frame.index for frame in frames(records)] == [0, 1, 4]
    assert len({frame.series for frame in frames(records)} | {records[0].series}) == 1
    assert records[0].series.startswith("13SIM1:Pva1:Image@20260301T121721Z-")


def test_an_id_that_goes_back_begins_a_new_series() -> None:
    one = decoder()
    records = decoded(
        one, update(image(), 7, NOON), update(image(), 8, NOON + 1), update(image(), 7, NOON + 2), update(image(), 8, NOON + 3)
    )
    assert kinds(records) == ["SeriesStart", "Frame", "Frame", "SeriesEnd", "SeriesStart", "Frame", "Frame"]
    assert [frame.index for frame in frames(records)] == [0, 1, 0, 1]
    ends = [record.series for record in records if isinstance(record, SeriesEnd)]
    assert ends == [records[0].series] != [records[4].series]


def test_frames_out_of_order_stay_in_their_series() -> None:
    records = decoded(decoder(), *(update(image(), number) for number in (1, 3, 2, 5, 4, 6)))
    assert [frame.index for frame in frames(records)] == [0, 2, 1, 4, 3, 5]
    assert kinds(records).count("SeriesStart") == 1


def test_a_frame_out_of_order_before_the_first_has_no_index() -> None:
    one = decoder()
    decoded(one, update(image(), 5))
    with pytest.raises(WireError, match="before the first"):
        one.decode(update(image(), 4), NOON)
    (frame,) = frames(one.decode(update(image(), 6), NOON))
    assert frame.index == 1


def test_far_back_is_a_new_series_whatever_the_clock_says() -> None:
    records = decoded(decoder(), update(image(), 500), update(image(), 1, NOON - 1e6))
    assert kinds(records) == ["SeriesStart", "Frame", "SeriesEnd", "SeriesStart", "Frame"]


def test_after_a_silence_a_new_series_begins() -> None:
    one = decoder(idle_s=10.0)
    records = decoded(one, update(image(), 1), received=NOON)
    records += decoded(one, update(image(), 2), received=NOON + 10)
    records += decoded(one, update(image(), 3), received=NOON + 20.5)
    assert [frame.index for frame in frames(records)] == [0, 1, 0]


@pytest.mark.parametrize("other", [image("u4"), image(shape=(8, 16))], ids=["dtype", "shape"])
def test_another_geometry_is_another_acquisition(other: np.ndarray) -> None:
    records = decoded(decoder(), update(image(), 1), update(other, 2))
    assert kinds(records) == ["SeriesStart", "Frame", "SeriesEnd", "SeriesStart", "Frame"]


def test_an_id_beyond_what_a_run_can_hold_begins_a_new_series() -> None:
    records = decoded(decoder(), update(image(), -(2**31)), update(image(), 2**31 - 1))
    assert [frame.index for frame in frames(records)] == [0, 0]


def test_a_channel_without_an_image_yet_says_nothing() -> None:
    assert decoded(decoder(), update(image(), data={}, dimension=[])) == []


def test_what_stood_in_the_channel_begins_no_series_even_when_it_is_told_again() -> None:
    one = decoder()
    assert decoded(one, update(image(), 900, first=True), update(image(), 900)) == []
    records = decoded(one, update(image(), 901), update(image(), 902))
    assert [frame.index for frame in frames(records)] == [0, 1]


def test_what_stood_in_the_channel_at_a_reconnection_goes_on_with_the_series() -> None:
    one = decoder()
    records = decoded(one, update(image(), 1), update(image(), 1, first=True), update(image(), 4, first=True), update(image(), 5))
    assert [frame.index for frame in frames(records)] == [0, 3, 4]
    assert decoded(one, update(image(), 2, NOON + 50, first=True)) == []
    assert kinds(decoded(one, update(image(), 3, NOON + 51))) == ["SeriesEnd", "SeriesStart", "Frame"]


def test_without_a_clock_an_id_twice_is_no_repetition() -> None:
    nothing = {"secondsPastEpoch": 0, "nanoseconds": 0}
    records = decoded(decoder(), update(image(), 1, dataTimeStamp=nothing), update(image(), 1, dataTimeStamp=nothing))
    assert len(frames(records)) == 2


def test_a_refused_image_moves_no_series() -> None:
    one = decoder()
    decoded(one, update(image(), 10))
    with pytest.raises(WireError):
        one.decode(update(image(), 2, NOON + 20, attribute=[attribute("ColorMode", 2)]), NOON)
    (frame,) = one.decode(update(image(), 11, NOON + 21), NOON)
    assert frame.index == 1


def test_attributes_go_into_the_metadata_of_the_run() -> None:
    told = [attribute("ColorMode", 0), attribute("Energy", 8.5), attribute("Sample", "gold"), attribute("Nothing", None), {"name": "Bad"}]
    start, _ = decoded(decoder(), update(image(), attribute=told))
    assert start.metadata == {"pv": "13SIM1:Pva1:Image", "attributes": {"ColorMode": 0, "Energy": 8.5, "Sample": "gold"}}


@pytest.mark.parametrize(
    ("positions", "place"),
    [
        (PositionSettings(x="SamX", y="SamY"), (1.5e-3, -2e-3)),
        (PositionSettings(x="SamX", y="SamY", unit="um"), (1.5e-6, -2e-6)),
        (PositionSettings(x="SamX"), (1.5e-3, 0.0)),
        (PositionSettings(x="SamX", y="Absent"), None),
        (PositionSettings(x="Text", y="SamY"), None),
        (PositionSettings(x="NotANumber", y="SamY"), None),
        (PositionSettings(), None),
    ],
)
def test_attributes_named_like_the_motors_are_the_position(positions: PositionSettings, place: tuple[float, float] | None) -> None:
    told = [attribute("SamX", 1.5), attribute("SamY", -2), attribute("Text", "1.5"), attribute("NotANumber", math.nan)]
    (frame,) = frames(decoded(decoder(positions=positions), update(image(), attribute=told)))
    assert frame.position == (pytest.approx(place) if place else None)


PIXELS = image()
BLOB = bare_bslz4(PIXELS)
REFUSED: dict[str, tuple[Any, str]] = {
    "bytes": (b"ntnd", "wrong_type"),
    "another document": (("event", {}), "wrong_type"),
    "a scalar channel": (("ntnd", {"data": {}, "first": True}), "missing_key"),
    "a table": (("ntnd", {"labels": ["a"], "data": {}}), "missing_key"),
    "text": (update(PIXELS, data={"stringValue": ["a"]}), "wrong_type"),
    "booleans": (update(PIXELS, data={"booleanValue": np.zeros(96, bool)}), "wrong_type"),
    "no image with dimensions": (update(PIXELS, data={}), "wrong_type"),
    "an image without dimensions": (update(PIXELS, dimension=[]), "wrong_shape"),
    "one dimension": (update(PIXELS, dimension=[{"size": 96}]), "wrong_shape"),
    "three dimensions": (update(PIXELS, dimension=[{"size": 2}, {"size": 6}, {"size": 8}]), "wrong_shape"),
    "a thousand dimensions": (update(PIXELS, dimension=[{"size": 1}] * 1000), "wrong_shape"),
    "negative": (update(PIXELS, dimension=[{"size": -16}, {"size": -6}]), "wrong_shape"),
    "more pixels than there are": (update(PIXELS, dimension=[{"size": 17}, {"size": 6}]), "wrong_shape"),
    "fewer pixels than there are": (update(PIXELS, dimension=[{"size": 15}, {"size": 6}]), "wrong_shape"),
    "colour": (update(PIXELS, attribute=[attribute("ColorMode", 2)]), "wrong_shape"),
    "Bayer": (update(PIXELS, attribute=[attribute("ColorMode", 1)]), "wrong_shape"),
    "an id of text": (update(PIXELS, uniqueId="7"), "bad_index"),
    "an id without end": (update(PIXELS, uniqueId=10**400), "bad_index"),
    "terabytes": (packed(PIXELS, "bslz4", BLOB, dimension=[{"size": 2**19}, {"size": 2**19}], uncompressedSize=0), "too_large"),
    "jpeg": (packed(PIXELS, "jpeg", BLOB), "bad_compression"),
    "blosc": (packed(PIXELS, "blosc", BLOB), "bad_compression"),
    "a codec of any length": (packed(PIXELS, "x" * 10**6, BLOB), "bad_compression"),
    "no dtype": (packed(PIXELS, "bslz4", BLOB, codec={"name": "bslz4", "parameters": ({}, {})}), "missing_key"),
    "a dtype that is none": (packed(PIXELS, "bslz4", BLOB, codec={"name": "bslz4", "parameters": ({"value": 11}, {})}), "wrong_dtype"),
    "another dtype": (packed(PIXELS, "bslz4", BLOB, codec={"name": "bslz4", "parameters": ({"value": 7}, {})}), "bad_compression"),
    "another size": (packed(PIXELS, "bslz4", BLOB, uncompressedSize=100), "bad_compression"),
    "more than there is": (packed(PIXELS, "bslz4", BLOB, compressedSize=len(BLOB) + 1), "bad_compression"),
    "truncated": (packed(PIXELS, "bslz4", BLOB[:-3]), "bad_compression"),
    "truncated lz4": (packed(PIXELS, "lz4", bare_lz4(PIXELS)[:-3]), "bad_compression"),
    "lz4 of too little": (packed(PIXELS, "lz4", lz4.block.compress(b"abc", store_size=False)), "bad_compression"),
    "nothing": (packed(PIXELS, "lz4", b""), "bad_compression"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_image_of_ours_is_refused_with_its_reason(what: str) -> None:
    message, reason = REFUSED[what]
    assert refused(message) == reason


def test_an_image_beyond_the_limit_is_refused() -> None:
    assert refused(update(PIXELS), max_message_bytes=100) == "too_large"
    assert refused(packed(np.zeros((600, 600), np.uint32), "lz4", bare_lz4(np.zeros((600, 600), np.uint32))), max_message_bytes=10**6) == (
        "too_large"
    )


WORTHLESS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=40),
    st.just([]),
    st.just({}),
    st.just(({}, {})),
    st.builds(lambda value: ({"value": value}, {}), st.one_of(st.integers(-1, 12), st.floats(), st.text(max_size=3))),
    st.builds(lambda size: [{"size": size}, {"size": 6}], st.one_of(st.integers(-2, 2**40), st.none(), st.text(max_size=2))),
    st.builds(lambda blob: {"ubyteValue": np.frombuffer(blob, np.uint8)}, st.binary(max_size=200)),
    st.builds(lambda rows: {"x": np.zeros((rows, 2))}, st.integers(0, 3)),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([*update(PIXELS)[1], "name", "parameters"]), WORTHLESS), max_size=6), st.data()
)
def test_nothing_but_a_wire_error_leaves_the_decoder(changes: list[tuple[int, str, Any]], data: st.DataObject) -> None:
    one = decoder(positions=PositionSettings(x="SamX"), max_message_bytes=2**20)
    whole = [update(PIXELS, 3), packed(PIXELS, "bslz4", BLOB, 4), packed(PIXELS, "lz4", bare_lz4(PIXELS), 5)]
    messages = [(name, copy.deepcopy(fields)) for name, fields in whole]
    for which, key, value in changes:
        fields = messages[which][1]
        inside = fields.get("codec", fields) if key in ("name", "parameters") else fields
        if isinstance(inside, dict):
            if data.draw(st.booleans()):
                inside[key] = value
            else:
                inside.pop(key, None)
    for message in messages:
        try:
            records = one.decode(message, NOON)
        except WireError:
            continue
        assert set(kinds(records)) <= {"SeriesStart", "Frame", "SeriesEnd"}
    (frame,) = frames(decoded(one, update(PIXELS, 10**6, NOON + 9, first=False)))
    np.testing.assert_array_equal(frame.counts, PIXELS)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["lz4", "bslz4", "lz4hdf5"]), st.integers(0, 300), st.binary(min_size=1, max_size=8))
def test_a_blob_with_a_hole_is_refused_or_of_the_right_size(codec: str, place: int, bad: bytes) -> None:
    blob = bytearray(bare_lz4(PIXELS) if codec == "lz4" else BLOB)
    place %= len(blob)
    blob[place : place + len(bad)] = bad
    found = "a frame"
    try:
        (frame,) = frames(decoder().decode(packed(PIXELS, codec, bytes(blob)), NOON))
        assert frame.counts.shape == PIXELS.shape
    except WireError as error:
        found = error.reason
    assert found in ("a frame", "bad_compression")
