"""Detector frames to photons: crop, bin, correct, mask and fill, each beside a version that can be read at a glance."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from scipy.spatial.distance import cdist

import streamprior as sp
from streamprior.config import PrepareSettings
from streamprior.errors import ConfigError, WireError
from streamprior.prior import Geometry, Prior
from streamprior.records import Batch, Detector, Flag, Photons
from streamprior.stages.prepare import Corrections, Preparer, _prepare, check_shape, load_corrections
from streamprior.wire.dectris_v2 import StreamV2Decoder, encode_image
from tests.builders import diffraction, make_frame, make_recipe, make_run, small_prior

DETECTOR = (20, 24)


def geometry_prior(centre: tuple[int, int] = (10, 12), shape: tuple[int, int] = (8, 6), binning: int = 1, **changes: Any) -> Prior:
    geometry = Geometry(DETECTOR, centre, shape, binning)
    empty = np.zeros(shape, bool)
    return replace(small_prior(), geometry=geometry, reference=empty.astype(np.uint8), support=empty, **({"invalid": empty} | changes))


def stack(count: int = 3, dtype: Any = np.uint16, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).poisson(9, (count, *DETECTOR)).astype(dtype)


def naive(frame: np.ndarray, prior: Prior, mask: Any, flat: Any, dark: Any, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """(counts before filling, valid) of one frame, a pixel at a time."""
    geometry, (height, width) = prior.geometry, prior.geometry.shape
    counts, valid = np.zeros((height, width)), ~prior.invalid
    for y in range(height * geometry.binning):
        for x in range(width * geometry.binning):
            row = geometry.centre[0] - height // 2 * geometry.binning + y
            column = geometry.centre[1] - width // 2 * geometry.binning + x
            at = y // geometry.binning, x // geometry.binning
            on_detector = 0 <= row < DETECTOR[0] and 0 <= column < DETECTOR[1]
            value = float(frame[row, column]) if on_detector else 0.0
            if not on_detector or mask[row, column] or not np.isfinite(value) or not 0 <= value < limit:
                valid[at] = False
            else:
                counts[at] += max(0.0, (value - dark[row, column]) * flat[row, column])
    return counts, valid


def filled(counts: np.ndarray, valid: np.ndarray) -> list[set[float]]:
    """For each pixel in turn the values it may hold: its own, or those of its nearest measured neighbours (several, at equal distance)."""
    known = np.argwhere(valid)
    distance = cdist(np.argwhere(np.ones_like(valid)), known)
    return [{float(np.float32(counts[tuple(known[k])])) for k in np.flatnonzero(row == row.min())} for row in distance]


def photons_of(prior: Prior, frames: np.ndarray, own: Corrections | None = None, detector: Detector | None = None) -> Photons:
    """Through the stage, as in the daemon."""
    run = replace(make_run(shape=DETECTOR), detector=detector or Detector(shape=DETECTOR))
    batch = Batch(run, tuple(make_frame(frame, index) for index, frame in enumerate(frames)))
    photons = Preparer(prior, own)(batch).photons
    assert photons is not None
    return photons


@pytest.mark.parametrize(
    ("centre", "shape", "binning"),
    [
        ((10, 12), (8, 6), 1),
        ((10, 12), (5, 7), 2),
        ((10, 12), (20, 24), 1),
        ((2, 22), (8, 6), 1),
        ((19, 0), (6, 8), 2),
        ((9, 13), (4, 6), 3),
    ],
)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int32, np.float32])
def test_photons_are_those_of_the_obvious_version(centre: Any, shape: Any, binning: int, dtype: Any) -> None:
    random = np.random.default_rng(1)
    prior = geometry_prior(centre, shape, binning, invalid=random.random(shape) < 0.05)
    frames = stack(dtype=dtype)
    mask, flat = random.random(DETECTOR) < 0.05, random.uniform(0.5, 2, DETECTOR).astype(np.float32)
    dark = random.uniform(0, 12, DETECTOR).astype(np.float32)
    photons = sp.prepare(frames, prior, mask, flat, dark)
    assert photons.counts.shape == (3, *shape)
    assert photons.counts.dtype == np.float32
    assert not photons.flags.any()
    limit = float(np.iinfo(dtype).max) if np.dtype(dtype).kind in "ui" else np.inf
    for frame, counts in zip(frames, photons.counts, strict=True):
        expected, valid = naive(frame, prior, mask, flat, dark, limit)
        np.testing.assert_array_equal(photons.valid, valid)
        np.testing.assert_allclose(counts[valid], expected[valid], rtol=1e-5, atol=1e-4)
        # What was not measured holds a measured neighbour, to the last bit.
        for value, allowed in zip(counts.ravel(), filled(counts, valid), strict=True):
            assert float(value) in allowed


def test_the_centre_pixel_of_the_detector_becomes_the_centre_of_the_frame() -> None:
    frame = np.zeros((1, *DETECTOR), np.uint16)
    frame[0, 7, 15] = 3
    prepared = sp.prepare(frame, geometry_prior(centre=(7, 15), shape=(8, 6)))
    assert np.argwhere(prepared.counts[0]).tolist() == [[4, 3]]


def test_binning_sums_and_a_bin_with_a_bad_pixel_is_not_measured() -> None:
    frame = np.ones((1, *DETECTOR), np.uint16)
    mask = np.zeros(DETECTOR, bool)
    mask[10, 12] = True
    photons = sp.prepare(frame, geometry_prior(shape=(4, 4), binning=3), mask)
    assert (photons.counts == 9).all()
    assert np.argwhere(~photons.valid).tolist() == [[2, 2]]


def test_dark_comes_before_flat_and_nothing_falls_below_zero() -> None:
    frame = np.full((1, *DETECTOR), 10, np.uint16)
    dark, flat = np.full(DETECTOR, 4, np.float32), np.full(DETECTOR, 2, np.float32)
    dark[10, 12] = 11
    counts = sp.prepare(frame, geometry_prior(), flat=flat, dark=dark).counts[0]
    assert counts[4, 3] == 0
    assert sorted(set(counts.ravel())) == [0, 12]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_correction_that_is_no_number_marks_its_pixel(bad: float) -> None:
    flat = np.ones(DETECTOR, np.float32)
    flat[10, 12] = bad
    for name in ("flat", "dark"):
        photons = sp.prepare(stack(), geometry_prior(), **{name: flat})
        assert np.argwhere(~photons.valid).tolist() == [[4, 3]]
        assert np.isfinite(photons.counts).all()


def test_masks_of_the_operator_and_of_the_start_message_join() -> None:
    own, sent = np.zeros(DETECTOR, bool), np.zeros(DETECTOR, bool)
    own[10, 12], sent[9, 12] = True, True
    photons = photons_of(geometry_prior(), stack(), Corrections(mask=own), Detector(shape=DETECTOR, mask=sent))
    assert np.argwhere(~photons.valid).tolist() == [[3, 3], [4, 3]]


def test_the_operators_flat_and_saturation_win_over_the_start_messages() -> None:
    two, three = np.full(DETECTOR, 2, np.float32), np.full(DETECTOR, 3, np.float32)
    sent = Detector(shape=DETECTOR, flat=three, saturation=1000.0)
    frames = np.full((1, *DETECTOR), 100, np.uint16)
    prior = geometry_prior()
    assert (photons_of(prior, frames, None, sent).counts == 300).all()
    assert (photons_of(prior, frames, Corrections(flat=two), sent).counts == 200).all()
    dark_from_100 = photons_of(prior, frames, Corrections(saturation=100), sent)
    assert not dark_from_100.valid.any()


def test_a_map_of_another_shape_in_the_start_message_is_left_out() -> None:
    stub = Detector(shape=DETECTOR, mask=np.ones((2, 2), bool), flat=np.full((2, 2), 9, np.float32))
    photons = photons_of(geometry_prior(), stack(), None, stub)
    np.testing.assert_array_equal(photons.counts, sp.prepare(stack(), geometry_prior()).counts)
    assert photons.valid.all()


def test_the_next_runs_start_message_counts_for_the_next_run() -> None:
    stage, frames = Preparer(geometry_prior()), (make_frame(stack()[0]),)
    sent = np.zeros(DETECTOR, bool)
    sent[10, 12] = True
    first = replace(make_run("one", shape=DETECTOR), detector=Detector(shape=DETECTOR, mask=sent))
    second = make_run("two", shape=DETECTOR)
    seen = [stage(Batch(run, frames)).photons for run in (first, first, second)]
    assert [int((~photons.valid).sum()) for photons in seen if photons is not None] == [1, 1, 0]


@pytest.mark.parametrize(
    ("dtype", "value", "flag"),
    [
        (np.uint8, 255, Flag.SATURATED),
        (np.uint16, 65535, Flag.SATURATED),
        (np.uint32, 2**32 - 1, Flag.SATURATED),
        (np.int32, 2**31 - 1, Flag.SATURATED),
        (np.int32, -1, Flag.SATURATED),
        (np.float32, -2.5, Flag.SATURATED),
        (np.float32, np.nan, Flag.NONFINITE),
        (np.float32, np.inf, Flag.NONFINITE),
    ],
)
def test_a_pixel_without_data_is_invalid_in_its_own_frame_alone(dtype: Any, value: float, flag: Flag) -> None:
    frames = stack(dtype=dtype)
    frames[1, 10, 12] = value
    photons = sp.prepare(frames, geometry_prior())
    assert photons.valid.shape == (3, 8, 6)
    assert np.argwhere(~photons.valid).tolist() == [[1, 4, 3]]
    assert photons.flags.tolist() == [0, int(flag), 0]
    assert photons.counts[1, 4, 3] in {float(photons.counts[1, y, x]) for y, x in ((3, 3), (5, 3), (4, 2), (4, 4))}


def test_the_detectors_saturation_value_counts_too() -> None:
    frames = np.full((2, *DETECTOR), 5, np.uint16)
    frames[0, 10, 12] = 900
    photons = photons_of(geometry_prior(), frames, None, Detector(shape=DETECTOR, saturation=900.0))
    assert photons.flags.tolist() == [Flag.SATURATED, 0]
    assert photons.counts.max() == 5


def test_a_gap_that_every_frame_and_the_mask_know_raises_no_flag() -> None:
    frames = stack(dtype=np.uint32)
    frames[:, 10, :] = 2**32 - 1
    gap = np.zeros(DETECTOR, bool)
    gap[10] = True
    known = sp.prepare(frames, geometry_prior(), gap)
    assert known.valid.shape == (8, 6)
    assert not known.flags.any()
    unknown = sp.prepare(frames, geometry_prior())
    assert unknown.valid.shape == (3, 8, 6)
    assert (unknown.flags == Flag.SATURATED).all()
    np.testing.assert_array_equal(unknown.counts, known.counts)
    np.testing.assert_array_equal(unknown.valid[0], known.valid)


@pytest.mark.parametrize(
    "frame", [np.zeros(DETECTOR, np.uint16), np.full(DETECTOR, 65535, np.uint16), np.full(DETECTOR, np.nan, np.float32)]
)
def test_a_frame_without_a_photon_is_empty_and_finite(frame: np.ndarray) -> None:
    photons = sp.prepare(frame, geometry_prior())
    assert photons.flags[0] & Flag.EMPTY
    assert not photons.counts.any()


def test_no_pixel_left_by_the_mask_is_empty_too() -> None:
    photons = sp.prepare(stack(), geometry_prior(), np.ones(DETECTOR, bool))
    assert (photons.flags == Flag.EMPTY).all()
    assert not photons.counts.any()
    assert not photons.valid.any()


def test_photons_do_not_depend_on_how_frames_are_batched() -> None:
    frames = stack(12, np.float32)
    frames[2, 8, 11], frames[7, 12, 12], frames[9] = np.nan, -1, 0
    prior = geometry_prior()
    whole = sp.prepare(frames, prior)
    for size in (1, 5):
        parts = [sp.prepare(frames[i : i + size], prior) for i in range(0, 12, size)]
        np.testing.assert_array_equal(np.concatenate([part.counts for part in parts]), whole.counts)
        np.testing.assert_array_equal(np.concatenate([part.flags for part in parts]), whole.flags)
        valid = [np.broadcast_to(part.valid, part.counts.shape) for part in parts]
        np.testing.assert_array_equal(np.concatenate(valid), whole.valid)


@pytest.mark.parametrize("dtype", [">u2", ">u4", ">i4", ">f4", "f2", ">f8", np.longdouble])
def test_another_byte_order_or_width_gives_the_same_photons(dtype: Any) -> None:
    np.testing.assert_array_equal(sp.prepare(stack().astype(dtype), geometry_prior()).counts, sp.prepare(stack(), geometry_prior()).counts)


@pytest.mark.parametrize("layout", ["every second column", "read-only", "column by column"])
def test_another_memory_layout_gives_the_same_photons(layout: str) -> None:
    frames = stack()
    other = {
        "every second column": np.repeat(frames, 2, axis=2)[:, :, ::2],
        "read-only": np.frombuffer(frames.tobytes(), frames.dtype).reshape(frames.shape),
        "column by column": np.asfortranarray(frames),
    }[layout]
    np.testing.assert_array_equal(sp.prepare(other, geometry_prior()).counts, sp.prepare(frames, geometry_prior()).counts)


def exact(frame: np.ndarray, prior: Prior, flat: np.ndarray, dark: np.ndarray) -> np.ndarray:
    """Counts before filling, in float32 and in the order of the detector's rows and columns: to the last bit."""
    geometry = prior.geometry
    (height, width), binning = geometry.shape, geometry.binning
    rows = np.clip(geometry.centre[0] - height // 2 * binning + np.arange(height * binning), 0, DETECTOR[0] - 1)
    columns = np.clip(geometry.centre[1] - width // 2 * binning + np.arange(width * binning), 0, DETECTOR[1] - 1)
    photons = np.maximum((frame.astype(np.float32) - dark) * flat, np.float32(0))[np.ix_(rows, columns)]
    counts = np.zeros(geometry.shape, np.float32)
    for dy in range(binning):
        for dx in range(binning):
            counts += photons[dy::binning, dx::binning]
    return counts


@pytest.mark.parametrize("binning", [1, 2, 3])
@pytest.mark.parametrize("centre", [(10, 12), (3, 21), (0, 0), (19, 2)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.uint64, np.int16, np.int32, np.int64, np.float32, np.float64])
def test_measured_pixels_are_exact_to_the_last_bit(binning: int, centre: tuple[int, int], dtype: Any) -> None:
    random = np.random.default_rng(2)
    frames = random.integers(0, 100, (3, *DETECTOR)).astype(dtype)
    if np.dtype(dtype).itemsize >= 4:
        frames[0] = random.integers(0, 2**30, DETECTOR)  # more digits than float32 has
    flat, dark = random.uniform(0.5, 2, DETECTOR).astype(np.float32), random.uniform(0, 12, DETECTOR).astype(np.float32)
    prior = geometry_prior(centre, (7, 6), binning)
    photons = sp.prepare(frames, prior, None, flat, dark)
    for frame, counts in zip(frames, photons.counts, strict=True):
        np.testing.assert_array_equal(counts[photons.valid], exact(frame, prior, flat, dark)[photons.valid])


def test_a_limit_between_two_counts_parts_them() -> None:
    own = Corrections(saturation=11.5)
    for dtype in (np.uint8, np.int16, np.uint32, np.uint64, np.float32):
        frames = np.full((2, *DETECTOR), 11, dtype)
        frames[1, 10, 12] = 12
        photons = photons_of(geometry_prior(), frames, own)
        assert np.argwhere(~photons.valid).tolist() == [[1, 4, 3]]
        assert photons.flags.tolist() == [0, Flag.SATURATED]


def test_a_crop_beside_the_detector_holds_nothing() -> None:
    for centre in ((40, 12), (10, 60), (-30, -30)):
        photons = sp.prepare(stack(), geometry_prior(centre))
        assert not photons.valid.any()
        assert not photons.counts.any()
        assert (photons.flags == Flag.EMPTY).all()


def test_frames_of_one_batch_may_differ_in_dtype_and_in_their_bad_pixels() -> None:
    dtypes = (np.float64, np.uint16, np.uint16, np.uint16, np.float32, np.uint16)
    frames = [frame.astype(dtype) for frame, dtype in zip(stack(len(dtypes)), dtypes, strict=True)]
    for number, (row, column) in {1: (10, 12), 2: (10, 12), 3: (9, 11), 5: (10, 12)}.items():
        frames[number][row, column] = 65535
    batch = Batch(make_run(shape=DETECTOR), tuple(make_frame(frame, index) for index, frame in enumerate(frames)))
    together = Preparer(geometry_prior())(batch).photons
    assert together is not None
    for number, frame in enumerate(frames):
        alone = sp.prepare(frame, geometry_prior())
        np.testing.assert_array_equal(together.counts[number], alone.counts[0])
        np.testing.assert_array_equal(together.valid[number], alone.valid.reshape(alone.counts[0].shape))
        assert together.flags[number] == alone.flags[0]


def test_frames_are_left_as_they_were() -> None:
    frames = stack()
    before = frames.copy()
    sp.prepare(frames, geometry_prior(), dark=np.ones(DETECTOR, np.float32))
    np.testing.assert_array_equal(frames, before)


def test_what_cannot_be_prepared_is_said() -> None:
    prior = geometry_prior()
    with pytest.raises(ValueError, match=r"\(2, 5, 5\), this prior was made for \(B, 20, 24\)"):
        sp.prepare(np.ones((2, 5, 5)), prior)
    with pytest.raises(ValueError, match=r"correction has shape \(5, 5\)"):
        sp.prepare(stack(), prior, mask=np.ones((5, 5), bool))
    with pytest.raises(TypeError, match="complex64"):
        sp.prepare(stack().astype(np.complex64), prior)


def test_a_frame_that_the_prior_was_not_made_for_is_refused_before_the_batch() -> None:
    geometry = geometry_prior().geometry
    check_shape(stack()[0], geometry)
    with pytest.raises(WireError) as refused:
        check_shape(np.ones((5, 5), np.uint16), geometry)
    assert refused.value.reason == "wrong_shape"
    with pytest.raises(WireError) as refused:
        check_shape(np.ones(DETECTOR, complex), geometry)
    assert refused.value.reason == "wrong_dtype"


def test_corrections_are_read_from_npy_and_hdf5(tmp_path: Path) -> None:
    mask, dark, flat = np.eye(*DETECTOR, dtype=np.uint32), np.full(DETECTOR, 1.5), np.full(DETECTOR, 2, np.uint8)
    np.save(tmp_path / "mask.npy", mask)
    with h5py.File(tmp_path / "calibration.h5", "w") as file:
        file["run_7/dark"] = np.stack([dark - 1, dark + 1])  # a stack of dark frames, as CXI keeps it
        file["flat"] = flat
    settings = PrepareSettings(
        mask=tmp_path / "mask.npy",
        dark=Path(f"{tmp_path / 'calibration.h5'}::/run_7/dark"),
        flat=Path(f"{tmp_path / 'calibration.h5'}::/flat"),
        saturation=77,
    )
    read = load_corrections(settings, DETECTOR)
    assert read.mask is not None
    assert read.dark is not None
    assert read.flat is not None
    np.testing.assert_array_equal(read.mask, mask != 0)
    np.testing.assert_array_equal(read.dark, dark)
    np.testing.assert_array_equal(read.flat, flat)
    assert (read.dark.dtype, read.flat.dtype, read.saturation) == (np.float32, np.float32, 77)
    assert load_corrections(PrepareSettings(), DETECTOR) == Corrections()


def test_corrections_that_cannot_be_used_are_the_operators_fault(tmp_path: Path) -> None:
    np.save(tmp_path / "small.npy", np.zeros((3, 3)))
    (tmp_path / "garbage.npy").write_bytes(b"no array")
    (tmp_path / "garbage.h5").write_bytes(b"no file")
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["group/dark"] = np.zeros(DETECTOR)
    for name, words in (
        ("small.npy", r"shape \(3, 3\), the detector \(20, 24\)"),
        ("missing.npy", "missing.npy"),
        ("garbage.npy", "cannot be read"),
        ("garbage.h5::/dark", "cannot be read"),
        ("file.h5::/nothing", "nothing"),
        ("file.h5::/group", "FILE::/dataset"),
        ("file.h5", "FILE::/dataset"),
    ):
        for key in ("mask", "flat", "dark"):
            with pytest.raises(ConfigError, match=words):
                load_corrections(PrepareSettings(**{key: tmp_path / name}), DETECTOR)


@pytest.mark.parametrize("compression", ["bslz4", "lz4", None])
def test_nothing_is_compiled_for_the_first_frame_after_the_warm_up(compression: str | None) -> None:
    recipe = make_recipe(small_prior())
    recipe.warm_up()
    compiled = len(_prepare.signatures)  # type: ignore[attr-defined]
    message = encode_image(1, "S", 0, diffraction()[0], 0.0, datetime.datetime.now(datetime.UTC), compression=compression)
    frame = StreamV2Decoder("eiger").decode(message, 0.0)[0]
    batch = Batch(make_run(), (frame,))  # type: ignore[arg-type]
    for stage in recipe.stages():
        batch = stage(batch)
    assert len(_prepare.signatures) == compiled  # type: ignore[attr-defined]


def test_the_measured_int32_frames_are_prepared(data_folder: Path) -> None:
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        raw = file["entry_1/instrument_1/detector_1/data"][98:102]
    assert raw.dtype == np.int32
    shape = raw.shape[1:]
    prior = replace(small_prior((64, 64)), geometry=Geometry(shape, (shape[0] // 2, shape[1] // 2), (64, 64), 2))
    photons = sp.prepare(raw, prior)
    rows, columns = slice(shape[0] // 2 - 64, shape[0] // 2 + 64), slice(shape[1] // 2 - 64, shape[1] // 2 + 64)
    expected = raw[:, rows, columns].reshape(4, 64, 2, 64, 2).sum((2, 4))
    np.testing.assert_array_equal(photons.counts, expected)
    assert photons.valid.all()
