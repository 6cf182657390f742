"""The ptychography twin's hard day: positions that err, a beam that shakes, blurs, drifts and is dumped, and what it tells of all that."""

from __future__ import annotations

import datetime
import itertools
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from streamprior_sim.cxi import save
from streamprior_sim.emit import records, stream
from streamprior_sim.faults import KINDS, Fault, Trouble, forecast, inject, scatter
from streamprior_sim.gold_balls import Scan
from streamprior_sim.optics import far_field, intensity, partially_coherent, propagated, ramp, zone_plate_probe
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Prerendered, Twin, build
from streamprior_sim.wires import STREAM_V2, Sensor, dialect

from streamprior.errors import ConfigError, WireError
from streamprior.records import Frame
from streamprior.wire.dectris_v2 import StreamV2Decoder

PIXEL_NM = 11.128


def twin(**changes: object) -> Twin:
    """gold_balls on a raster of 100 positions with changes; a double underscore stands for the dot of a key."""
    few = {"frames": 100, "sample.scan": "raster"} | {key.replace("__", "."): value for key, value in changes.items()}
    return build(load_scenario("gold_balls", few))


def scan_of(one: Twin) -> Scan:
    scan = one.scan()
    assert scan is not None
    return scan


def reported(one: Twin) -> np.ndarray:
    return np.array([one.position(index) for index in range(len(one))])


def true(one: Twin) -> np.ndarray:
    return np.array([one.truth(index).position for index in range(len(one))])


def naive_moved(field: np.ndarray, shift_px: tuple[float, float]) -> np.ndarray:
    """Trigonometric interpolation as two matrices: the field (..., H, W) read at r - shift."""

    def matrix(n: int, shift: float) -> np.ndarray:
        frequencies = np.arange(n) - n // 2
        places = np.arange(n)
        return np.exp(2j * np.pi * frequencies * ((places[:, None] - shift)[..., None] - places[None, :, None]) / n).sum(-1) / n

    return matrix(field.shape[-2], shift_px[0]) @ field @ matrix(field.shape[-1], shift_px[1]).T


def moved(field: np.ndarray, rows: float, columns: float) -> np.ndarray:
    return propagated(field, np.array([[rows, columns]]), 0.0, (1e-8, 1e-8), 1000.0)[0]


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# --- positions ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (15, 24)])
def test_a_field_is_moved_by_fractions_of_a_pixel_with_its_power_and_back_again(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    field = (rng.normal(size=(2, *shape)) + 1j * rng.normal(size=(2, *shape))).astype(np.complex64)
    there = moved(field, 0.3, -1.7)
    assert relative(there, naive_moved(field, (0.3, -1.7))) < 1e-5
    assert np.linalg.norm(there) == pytest.approx(np.linalg.norm(field), rel=1e-6)
    assert relative(moved(there, -0.3, 1.7), field) < 1e-5
    assert relative(moved(field, 2, -3), np.roll(field, (2, -3), (1, 2))) < 1e-5
    further = propagated(field, np.array([[0.0, 0.0], [1.0, 0.0]]), 1e-6, (1e-8, 1e-8), 1000.0)
    assert further.shape == (2, *field.shape)
    assert np.linalg.norm(further[0]) == pytest.approx(np.linalg.norm(field), rel=1e-6)
    assert relative(further[1], np.roll(further[0], 1, 1)) < 1e-5


def test_without_faults_a_frame_is_the_bare_forward_model_bit_for_bit() -> None:
    one = twin()
    scan = scan_of(one)
    assert (scan.corners == np.rint(scan.corners)).all()
    np.testing.assert_array_equal(scan.corners, scan.reported)
    for index in (0, 37):
        row, column = scan.corners[index].astype(int)
        bare = intensity(scan.object[row : row + 104, column : column + 104], scan.probe * ramp((104, 104), (0, 0)))
        np.testing.assert_array_equal(one.expected(index), bare)
        np.testing.assert_array_equal(one.frame(index), np.random.default_rng([65, index]).poisson(bare))
        assert one.position(index) == one.truth(index).position


def test_a_frame_at_a_whole_pixel_is_that_of_the_path_without_fractions() -> None:
    scan = scan_of(twin(sample__subpixel=True))
    whole = replace(scan, corners=np.rint(scan.corners))
    nearly = replace(scan, corners=whole.corners + 1e-9)
    one = np.ones((104, 104), np.complex64)
    np.testing.assert_array_equal(whole.probe_of(5), scan.probe)
    assert relative(nearly.photons(5, one), whole.photons(5, one)) < 1e-6
    # From just below to just above half a pixel the patch changes by one and the probe by the other way: the frame hardly does.
    below, above = (replace(scan, corners=whole.corners + 0.5 + step) for step in (-1e-4, 1e-4))
    assert (below.patch(5) != above.patch(5)).any()
    assert relative(below.photons(5, one), above.photons(5, one)) < 1e-3


def test_the_frame_follows_the_true_position_and_the_stage_reports_the_other() -> None:
    one = twin(sample__jitter_nm=8.0)
    scan = scan_of(one)
    for index in (0, 37):
        whole = np.rint(scan.corners[index]).astype(int)
        probe = naive_moved(scan.probe, tuple(scan.corners[index] - whole))
        patch = scan.object[whole[0] : whole[0] + 104, whole[1] : whole[1] + 104]
        assert relative(one.expected(index), intensity(patch, probe)) < 1e-5
        truth = one.truth(index)
        assert relative(intensity(truth.object, truth.probe), one.expected(index)) < 1e-6
    np.testing.assert_allclose(true(one), (scan.corners[:, ::-1] + 52) * scan.pixel_m[1])
    np.testing.assert_allclose(reported(one), (scan.reported[:, ::-1] + 52) * scan.pixel_m[1])


def test_jitter_has_its_rms_on_each_axis_is_independent_and_the_same_whatever_the_number_of_frames() -> None:
    one = twin(frames=1000, sample__jitter_nm=8.0)
    error_nm = (true(one) - reported(one)) * 1e9
    assert np.std(error_nm, axis=0) == pytest.approx([8, 8], rel=0.1)
    assert abs(np.corrcoef(error_nm[1:, 0], error_nm[:-1, 0])[0, 1]) < 0.1
    assert abs(np.corrcoef(error_nm.T)[0, 1]) < 0.1
    fewer = twin(frames=900, sample__jitter_nm=8.0)
    np.testing.assert_allclose((true(fewer) - reported(fewer)) * 1e9, error_nm[:900], atol=1e-6)
    other = twin(frames=1000, sample__jitter_nm=8.0, seed=66, sample__seed=65)
    assert np.abs((true(other) - reported(other)) * 1e9 - error_nm).max() > 8


def test_drift_takes_the_beam_away_from_what_is_reported() -> None:
    one = twin(sample__drift_nm_per_frame=[0.5, -2.0])
    error_nm = (true(one) - reported(one)) * 1e9
    np.testing.assert_allclose(error_nm, np.outer(np.arange(100), [-2.0, 0.5]), atol=1e-6)


def test_positions_with_fractions_are_reported_as_they_are() -> None:
    one, rounded = twin(sample__subpixel=True), twin()
    np.testing.assert_array_equal(true(one), reported(one))
    off_px = (reported(one) - reported(rounded)) * 1e9 / PIXEL_NM
    assert 0.2 < np.abs(off_px).max() <= 0.501
    np.testing.assert_allclose(np.diff(reported(one)[:10, 0]) * 1e9, 30)


def test_the_same_seed_is_the_same_sample_whatever_befalls_the_positions() -> None:
    plain, rough = scan_of(twin()), scan_of(twin(sample__subpixel=True, sample__jitter_nm=30.0, sample__drift_nm_per_frame=[1, -1]))
    before = np.rint(rough.reported[0] - plain.reported[0]).astype(int)
    assert (before > 0).all()
    inside = rough.object[before[0] : before[0] + plain.object.shape[0], before[1] : before[1] + plain.object.shape[1]]
    np.testing.assert_array_equal(inside, plain.object)
    # What is around it is bare membrane, and no frame looks beyond.
    assert len(np.unique(rough.object[: before[0]])) == 1
    assert all(rough.patch(index).shape == (104, 104) for index in range(100))


def test_a_beam_that_leaves_the_published_object_is_refused_with_the_remedy(data_folder: Path) -> None:
    path = str(data_folder / "gold_balls_cxidb65_reconstruction.h5")
    with pytest.raises(ConfigError, match=r"the beam leaves its object by \d+ pixels; make sample\.drift_nm_per_frame"):
        twin(sample__data=path, sample__drift_nm_per_frame=[50, 0])
    # Its reported positions keep their fractions when asked to, and repeat when there are more frames than positions.
    one = twin(sample__data=path, sample__subpixel=True, frames=1600, sample__jitter_nm=2.0)
    with h5py.File(path) as file:
        translation = file["translation"][:, :2]
    assert np.ptp(reported(one)[:1595] + translation, axis=0).max() < 1e-12
    np.testing.assert_array_equal(reported(one)[1595:], reported(one)[:5])
    assert (true(one)[1595:] != true(one)[:5]).all()


# --- the beam ----------------------------------------------------------------------------------------------------------------------


def test_vibration_is_the_average_over_the_places_where_the_beam_is_during_an_exposure() -> None:
    still, shaking = twin(), twin(sample__vibration_nm=10.0)
    np.testing.assert_array_equal(twin(sample__vibration_nm=0.0).frame(7), still.frame(7))
    scan = scan_of(still)
    sigma_px = 10.0 / PIXEL_NM
    steps = np.linspace(-4, 4, 17)
    weights = np.exp(-(steps**2) / 2)
    weights /= weights.sum()
    dense = sum(
        p * q * intensity(scan.patch(55), moved(scan.probe, row * sigma_px, column * sigma_px))
        for p, row in zip(weights, steps, strict=True)
        for q, column in zip(weights, steps, strict=True)
    )
    assert relative(shaking.expected(55), dense) < 0.05 * relative(still.expected(55), dense)
    # The truth behind it is the probe at rest.
    np.testing.assert_array_equal(shaking.truth(55).probe, still.truth(55).probe)
    assert shaking.expected(55).sum() == pytest.approx(still.expected(55).sum(), rel=0.01)


def test_partial_coherence_is_the_incoherent_sum_of_the_sources_points() -> None:
    coherence_px = 20.0
    scan = scan_of(twin())
    patch = scan.patch(55)
    blurred = partially_coherent(patch, scan.probe, (coherence_px, coherence_px / 2))
    steps = np.linspace(-6, 6, 31)
    weights = np.exp(-(steps**2) / 2)
    weights /= weights.sum()
    # A source point at an angle moves the pattern; sigma of the source's picture is N / (2 pi xi) pixels.
    sigma_px = 104 / (2 * np.pi * coherence_px)
    summed = sum(
        p * q * intensity(patch, scan.probe * ramp((104, 104), (row * sigma_px, 2 * column * sigma_px)))
        for p, row in zip(weights, steps, strict=True)
        for q, column in zip(weights, steps, strict=True)
    )
    assert relative(blurred, summed) < 1e-5
    assert relative(intensity(patch, scan.probe), summed) > 0.1


@pytest.mark.parametrize("shape", [(16, 16), (15, 24)])
def test_partial_coherence_loses_no_photon_and_full_coherence_changes_nothing(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    psi, probe = (rng.normal(size=(n, *shape)).astype(np.complex64) for n in (1, 2))
    sharp = intensity(psi[0], probe)
    assert relative(partially_coherent(psi[0], probe, (1e6, 1e6)), sharp) < 1e-6
    for xi in (0.5, 5.0, 50.0):
        blurred = partially_coherent(psi[0], probe, (xi, xi))
        assert blurred.sum() == pytest.approx(sharp.sum(), rel=1e-6)
        assert blurred.min() >= 0


def test_the_coherence_length_means_on_the_detector_what_its_formula_says() -> None:
    one, half = twin(), twin(sample__coherence_um=0.4)
    # The width of what a source of finite size does to the centre of gravity's second moment: it adds up, whatever the sample.
    pixels = np.arange(104) - 52

    def variance(photons: np.ndarray) -> float:
        profile = photons.sum(1) / photons.sum()
        return float(profile @ pixels**2 - (profile @ pixels) ** 2)

    wavelength_m, distance_m, pixel_m = 1.2399787e-9, 0.0252, 27e-6
    sigma_px = wavelength_m * distance_m / (2 * np.pi * 0.4e-6) / pixel_m
    assert variance(half.expected(55)) - variance(one.expected(55)) == pytest.approx(sigma_px**2, rel=0.05)


def test_the_probe_goes_out_of_focus_frame_by_frame() -> None:
    one = twin(sample__defocus_um_per_frame=0.01)
    scan = scan_of(one)
    np.testing.assert_array_equal(one.truth(0).probe, scan.probe)
    defocused = zone_plate_probe((104, 104), scan.pixel_m, 999.902, 2.19e-6, 0.06) * np.sqrt(1.1e7)
    probe = one.truth(99).probe
    assert probe is not None
    assert relative(probe, defocused) < 1e-5
    assert relative(scan.probe, defocused) > 0.2
    # The focus changes phases on the detector, and no ring that the probe itself leaves there.
    np.testing.assert_allclose(np.abs(far_field(probe)), np.abs(far_field(scan.probe)), atol=0.05)


def test_a_beam_dump_passes_and_what_a_step_without_an_end_does_stays() -> None:
    steps = [
        {"frame": 10, "frames": 5, "flux": 0.0},
        {"frame": 12, "frames": 2, "hot_block": [20, 70], "centre_px": [0, 3]},
        {"frame": 30, "flux": 0.5},
    ]
    one = twin(drift__steps=steps)
    assert [one.truth(index).flux for index in (9, 10, 14, 15, 29, 30, 99)] == [1, 0, 0, 1, 1, 0.5, 0.5]
    assert one.frame(10).sum() == one.frame(14).sum() == 0
    np.testing.assert_array_equal(one.frame(15), twin().frame(15))
    assert [one.truth(index).centre for index in (11, 12, 13, 14)] == [(52, 52), (52, 55), (52, 55), (52, 52)]
    assert [bool(one.truth(index).valid.all()) for index in (11, 12, 13, 14)] == [True, False, False, True]
    assert one.frame(13)[20:24, 70:74].min() > 1000


def test_a_failed_readout_is_all_at_the_dtypes_maximum_and_invalid() -> None:
    one = twin(detector__no_data_frames=[3, 4])
    for index, failed in ((2, False), (3, True), (4, True), (5, False)):
        assert (one.frame(index) == 65535).all() == failed
        assert (not one.truth(index).valid.any()) == failed
    assert one.frame(3).dtype == np.uint16
    np.testing.assert_array_equal(one.frame(5), twin().frame(5))
    assert one.expected(3).sum() == pytest.approx(twin().expected(3).sum())


def test_the_hard_day_is_the_same_frame_by_frame_in_any_order() -> None:
    one, again = (build(load_scenario("gold_balls_rough")) for _ in range(2))
    indices = (3, 610, 900, 1594)
    forward = [one.frame(index) for index in indices]
    backward = [again.frame(index) for index in indices[::-1]][::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(a, b)
    assert [one.truth(index).flux > 0 for index in (599, 600, 619, 620)] == [True, False, False, True]
    positions = [one.position(index) for index in range(len(one))]
    assert sum(position is None for position in positions) == pytest.approx(160, abs=40)
    away_nm = [np.subtract(one.truth(index).position, place) * 1e9 for index, place in enumerate(positions) if place is not None]
    assert 3 < np.std(away_nm) < 8


# --- on the wire and in a file -----------------------------------------------------------------------------------------------------

FRAMES = 40
DATE = datetime.datetime(2026, 3, 1, tzinfo=datetime.UTC)
RECORDS = list(records(Prerendered(twin(), 5, FRAMES), range(FRAMES), 100.0, "S1", DATE))


def rough(*faults: Fault, seed: int = 0) -> list[bytes]:
    """The same series on stream V2, with faults."""
    speech = dialect(STREAM_V2, Sensor(RECORDS[1].counts.dtype, DATE, 0.01), 1)
    return [message for (message,) in itertools.chain(*inject(RECORDS, Trouble(faults, seed, 1000), STREAM_V2, speech))]


CLEAN = rough()


def positions_of(messages: list[bytes]) -> dict[int, tuple[float, float]]:
    """What a receiver that waits for late positions knows in the end, of the frames that came through."""
    decoder = StreamV2Decoder("twin")
    known: dict[int, tuple[float, float]] = {}
    seen: set[int] = set()
    for message in messages:
        try:
            record = decoder.decode(message, 0.0)[0]
        except WireError:
            continue
        if isinstance(record, Frame):
            seen.add(record.index)
            if record.position is not None:
                known[record.index] = record.position
            known |= {index: (x, y) for index, x, y in user_data(message).get("positions_m", [])}
    assert set(known) <= seen
    return known


def user_data(message: bytes) -> dict[str, Any]:
    return dict(cbor2.loads(message)["user_data"])


ALL_POSITIONS = positions_of(CLEAN)


# What changes the numbers of images, and what a receiver of V2 at no limit takes for whole, is left to test_wire_table.
ON_V2 = sorted(kind for kind in KINDS if "dectris-v2" in KINDS[kind].reasons and kind not in ("oversized", "series_changes"))


def one_at_most(counts: dict[str, int]) -> bool:
    """Of the faults that each say which part of a series comes."""
    return sum(kind in ("two_receivers", "late_subscriber", "aborted") for kind in counts) <= 1


@given(st.dictionaries(st.sampled_from(ON_V2), st.integers(1, 3)).filter(one_at_most), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_the_positions_that_come_are_those_that_were_forecast(counts: dict[str, int], seed: int) -> None:
    faults = scatter(counts | {"position_late": 3}, FRAMES, seed)
    known = positions_of(rough(*faults, seed=seed))
    told = forecast(faults, FRAMES)
    assert sorted(known) == list(told.positions)
    assert known == {index: ALL_POSITIONS[index] for index in told.positions}
    silent = {fault.index for fault in faults if fault.kind == "position_missing"}
    assert set(told.published) - set(told.positions) == silent & set(told.published)


def test_a_frame_without_a_position_keeps_everything_else() -> None:
    faults = [Fault("position_missing", 7)]
    messages = rough(*faults)
    assert [index for index, (a, b) in enumerate(zip(messages, CLEAN, strict=True)) if a != b] == [8]
    assert user_data(messages[8]) == {"origin": user_data(CLEAN[8])["origin"]}
    before, after = (StreamV2Decoder("twin").decode(message, 0.0)[0] for message in (CLEAN[8], messages[8]))
    assert isinstance(before, Frame)
    assert isinstance(after, Frame)
    np.testing.assert_array_equal(after.counts, before.counts)
    assert (after.index, after.origin, after.position, after.detector_time) == (7, before.origin, None, before.detector_time)
    assert forecast(faults, FRAMES).positions == tuple(index for index in range(FRAMES) if index != 7)


@pytest.mark.parametrize(
    ("faults", "carried"),
    [
        ([Fault("position_late", 7)], {10: [7]}),
        ([Fault("position_late", 7), Fault("position_late", 8), Fault("lost", 10)], {11: [7, 8]}),
        ([Fault("position_late", 7), Fault("garbage", 10), Fault("wrong_dtype", 11), Fault("position_late", 12)], {12: [7], 15: [12]}),
        ([Fault("position_late", 38), Fault("position_late", 39)], {39: [38, 39]}),
        ([Fault("position_late", 37), Fault("lost", 38), Fault("truncated", 39)], {37: [37]}),
    ],
)
def test_a_late_position_comes_with_the_first_whole_image_three_later_or_with_the_last(
    faults: list[Fault], carried: dict[int, list[int]]
) -> None:
    messages = rough(*faults)
    decoder = StreamV2Decoder("twin")
    found: Counter[tuple[int, int]] = Counter()
    for message in messages:
        try:
            record = decoder.decode(message, 0.0)[0]
        except WireError:
            continue
        if isinstance(record, Frame):
            found.update((record.index, index) for index, _, _ in user_data(message).get("positions_m", []))
    assert found == Counter((image, index) for image, indices in carried.items() for index in indices)


def test_a_position_that_the_stage_never_reports_is_not_on_the_wire() -> None:
    one = twin(sample__position_missing_share=0.3)
    silent = [index for index in range(100) if one.position(index) is None]
    assert 15 < len(silent) < 45
    messages = list(stream(one, None))[1:-1]
    assert [index for index, message in enumerate(messages) if "position_m" not in user_data(message)] == silent
    assert all(one.truth(index).position is not None for index in silent)


def test_a_saved_scan_holds_what_was_reported_and_what_was_true(tmp_path: Path) -> None:
    one = build(load_scenario("gold_balls_rough", {"frames": 60}))
    scan = scan_of(one)
    path = save(one, tmp_path / "rough.cxi", slice(0, 60, 2))
    with h5py.File(path) as file:
        moved_m = file["entry_1/sample_1/geometry_1/translation"][()]
        probe = file["entry_1/instrument_1/source_1/illumination"][()]
        truth = file["entry_1/twin"]
        assert (truth["object"].dtype, truth["corners"].dtype, probe.dtype) == (np.complex64, np.float64, np.complex64)
        np.testing.assert_array_equal(truth["object"], scan.object)
        assert tuple(truth["object"].attrs["pixel_m"]) == scan.pixel_m
        corners = truth["corners"][()]
        counts = file["entry_1/data_1/data"][()]
    np.testing.assert_array_equal(probe, scan.probe)
    expected = [one.position(index) or (np.nan, np.nan) for index in range(0, 60, 2)]
    assert 0 < np.isnan(expected).all(1).sum() < 30
    np.testing.assert_array_equal(-moved_m[:, :2], expected)
    # The file alone makes its frames: object, probe and true corners give what was counted, blur and noise aside.
    assert corners.shape == (30, 2)
    whole = np.rint(corners[20]).astype(int)
    patch = scan.object[whole[0] : whole[0] + 104, whole[1] : whole[1] + 104]
    model = intensity(patch, moved(probe, *(corners[20] - whole)))
    valid = one.truth(40).valid
    chi2 = ((np.sqrt(counts[20]) - np.sqrt(model)) ** 2)[valid].sum() / counts[20][valid].sum()
    elsewhere = ((np.sqrt(counts[20]) - np.sqrt(intensity(scan.patch(0), probe))) ** 2)[valid].sum() / counts[20][valid].sum()
    assert chi2 < 0.001 < elsewhere
    with h5py.File(save(build(load_scenario("bragg", {"frames": 2})), tmp_path / "bragg.cxi")) as file:
        assert "twin" not in file["entry_1"]
        assert "illumination" not in file["entry_1/instrument_1/source_1"]
