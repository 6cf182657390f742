"""The digital twin: its forward model, its detector, its scenarios, its stream over a real socket, and its faults."""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
import xraydb
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from streamprior_sim.cxi import save
from streamprior_sim.emit import emit, pace, stream, zmq_sender
from streamprior_sim.faults import KINDS, Fault, forecast, inject, scatter
from streamprior_sim.gold_balls import _add_ball, transmission
from streamprior_sim.optics import back, far_field, intensity, ramp
from streamprior_sim.scenario import bundled, load_scenario
from streamprior_sim.twin import Prerendered, Twin, build

from streamprior.errors import ConfigError, WireError
from streamprior.records import Frame, SeriesEnd, SeriesStart
from streamprior.wire.dectris_v2 import StreamV2Decoder


def twin(name: str = "bragg", **changes: object) -> Twin:
    """A bundled scenario with changes; a double underscore stands for the dot of a key."""
    return build(load_scenario(name, {key.replace("__", "."): value for key, value in changes.items()}))


PERFECT = {"detector__dead": 0, "detector__hot": 0, "detector__dtype": "uint32"}


def naive_far_field(psi: np.ndarray) -> np.ndarray:
    """The centred unitary DFT as two matrices."""

    def matrix(n: int) -> np.ndarray:
        centred = np.arange(n) - n // 2
        return np.exp(-2j * np.pi * np.outer(centred, centred) / n) / np.sqrt(n)

    return matrix(psi.shape[0]) @ psi @ matrix(psi.shape[1]).T


# --- forward model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 16), (24, 17), (15, 32)])
def test_the_far_field_is_the_centred_unitary_transform(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(2, *shape)).view(np.float64) + 1j * rng.normal(size=(2, *shape))).astype(np.complex64)
    np.testing.assert_allclose(far_field(x), naive_far_field(x), atol=2e-5)
    np.testing.assert_allclose(np.vdot(y, far_field(x)), np.vdot(back(y), x), rtol=1e-4)
    np.testing.assert_allclose(intensity(x).sum(), (np.abs(x) ** 2).sum(), rtol=1e-5)


def test_a_ramp_moves_the_pattern_by_whole_pixels_and_by_fractions() -> None:
    psi = twin().truth(200).object
    moved = intensity(psi * ramp(psi.shape, (3.0, -2.0)))
    np.testing.assert_allclose(moved, np.roll(intensity(psi), (3, -2), (0, 1)), rtol=1e-3, atol=0.05)
    twice = intensity(psi * ramp(psi.shape, (0.5, 0.0)) * ramp(psi.shape, (0.5, 0.0)))
    np.testing.assert_allclose(twice, np.roll(intensity(psi), 1, 0), rtol=1e-3, atol=0.05)


@pytest.mark.parametrize("name", ["bragg", "gold_balls"])
def test_frames_are_poisson_counts_of_the_truth(name: str) -> None:
    one = twin(name, **PERFECT)
    ratios = []
    for index in range(150, 250, 20):
        truth, counts = one.truth(index), one.frame(index).astype(np.float64)
        expected = intensity(truth.object, truth.probe)
        # sqrt(Poisson) has variance 1/4 where photons are many: chi2 of the truth is its floor N / (4 total) (PHYSICS 2).
        bright = expected > 20
        chi2 = ((np.sqrt(expected) - np.sqrt(counts))[bright] ** 2).sum() / counts[bright].sum()
        ratios.append(chi2 / (bright.sum() / (4 * counts[bright].sum())))
        assert abs(counts.sum() - expected.sum()) < 5 * np.sqrt(expected.sum())
    assert np.mean(ratios) == pytest.approx(1.0, abs=0.1)


def test_the_dose_is_that_of_the_brightest_frame() -> None:
    for changes in ({}, {"frames": 1}, {"sample__rocking_range_deg": 0}, {"frames": 51, "sample__seed": 3}):
        one = twin(dose_photons=3.0e5, **changes)
        powers = [intensity(one.truth(index).object).sum() for index in range(len(one))]
        assert max(powers) == pytest.approx(3.0e5, rel=1e-4)


def test_a_crystal_is_compact_oversampled_and_another_one_with_another_seed() -> None:
    peak = np.abs(twin().truth(200).object)
    rows, columns = np.nonzero(peak > 0.05 * peak.max())
    assert max(np.ptp(rows), np.ptp(columns)) < 128 / 3
    assert abs((rows.min() + rows.max()) / 2 - 64) <= 1
    assert abs((columns.min() + columns.max()) / 2 - 64) <= 1
    other, same = np.abs(twin(seed=8).truth(200).object), np.abs(twin(seed=8, sample__seed=7).truth(200).object)
    assert np.abs(other - peak).max() > 0.1 * peak.max()
    np.testing.assert_array_equal(same, peak)


def test_a_facet_makes_a_streak_along_its_normal() -> None:
    # Facets leave power laws in a few directions: far out, a faceted crystal's light is far from evenly spread over the angle.
    pattern = intensity(twin(seed=3, sample__displacement_rms_nm=0).truth(200).object)
    rows, columns = np.mgrid[-64:64, -64:64]
    far = (np.hypot(rows, columns) > 25) & (np.hypot(rows, columns) < 60)
    sector = ((np.arctan2(rows, columns) + np.pi) / (2 * np.pi) * 36).astype(int) % 36
    by_angle = np.bincount(sector[far], pattern[far], 36)
    assert by_angle.max() > 8 * np.median(by_angle)
    # Without strain the density is real at the peak, so Friedel's law holds.
    assert by_angle[:18] == pytest.approx(by_angle[18:], rel=0.3, abs=0.05 * by_angle.max())


def test_a_crystal_too_large_for_the_geometry_is_refused_with_the_size_that_fits() -> None:
    with pytest.raises(ConfigError, match=r"sample\.size_nm 900: .* use at most \d+ nm"):
        twin(sample__size_nm=900)


def test_a_gold_ball_absorbs_and_delays_as_its_optical_constants_say() -> None:
    thickness = np.zeros((40, 40))
    _add_ball(thickness, np.array([20.0, 20.0]) * 2e-9, 25e-9, (2e-9, 2e-9))
    assert thickness.sum() * (2e-9) ** 2 == pytest.approx(4 / 3 * np.pi * 25e-9**3, rel=0.01)
    delta, beta, _ = xraydb.xray_delta_beta("Au", 19.3, 1000.0)
    wavenumber = 2 * np.pi / 1.23984e-9
    through = transmission(np.array(50e-9), ("Au", 19.3), 1000.0)
    assert abs(through) == pytest.approx(np.exp(-wavenumber * beta * 50e-9), rel=1e-3)
    assert np.angle(through) == pytest.approx(-wavenumber * delta * 50e-9, rel=1e-3)


def test_a_ptychography_frame_is_the_incoherent_sum_of_its_modes_at_its_position() -> None:
    one = twin("gold_balls", frames=30)
    truth = one.truth(12)
    assert truth.probe is not None
    naive = sum(np.abs(naive_far_field(mode * truth.object)) ** 2 for mode in truth.probe)
    np.testing.assert_allclose(intensity(truth.object, truth.probe), naive, rtol=1e-2, atol=1.0)
    assert (np.abs(truth.probe) ** 2).sum() == pytest.approx(1.1e7, rel=1e-4)
    # Neighbouring patches are one object: where two windows overlap they hold the same pixels.
    other = one.truth(13)
    assert truth.position is not None
    assert other.position is not None
    x, y = np.subtract(other.position, truth.position) / 11.128e-9
    dx, dy = round(x), round(y)
    assert (x, y) == pytest.approx((dx, dy), abs=0.02)
    a = truth.object[max(0, dy) : 104 + min(0, dy), max(0, dx) : 104 + min(0, dx)]
    b = other.object[max(0, -dy) : 104 + min(0, -dy), max(0, -dx) : 104 + min(0, -dx)]
    np.testing.assert_array_equal(a, b)


def test_the_published_reconstruction_is_the_sample_when_it_is_given(data_folder: Path) -> None:
    path = data_folder / "gold_balls_cxidb65_reconstruction.h5"
    one = twin("gold_balls", sample__data=str(path))
    with h5py.File(path) as file:
        published, probe, translation = file["object"][()], file["probe"][()], file["translation"][()]
    truth = one.truth(800)
    assert truth.probe is not None
    assert np.abs(np.vdot(probe[0], truth.probe[0])) == pytest.approx(np.linalg.norm(probe[0]) * np.linalg.norm(truth.probe[0]), rel=1e-4)
    windows = np.lib.stride_tricks.sliding_window_view(published, (104, 104))
    assert (windows[150:350, 150:350] == truth.object).all((2, 3)).any()
    # The file's positions, whole pixels, the probe's way: (x, y) = -(translation x, y) up to an offset.
    ours = np.array([one.position(index) for index in range(len(translation))])
    difference = ours + translation[:, :2]
    assert np.ptp(difference, axis=0).max() < 11.2e-9
    with pytest.raises(ConfigError, match=r"set detector\.shape"):
        twin("gold_balls", sample__data=str(path), detector__shape=[128, 128])
    with pytest.raises(ConfigError, match=r"change detector\.distance_m to 0\.0252"):
        twin("gold_balls", sample__data=str(path), detector__distance_m=0.05)


# --- detector and drift ----------------------------------------------------------------------------------------------------------


def test_bad_pixels_beam_stop_gaps_and_saturation_show_in_frame_mask_and_truth() -> None:
    one = twin(
        detector__dead=20, detector__hot=10, detector__unknown_share=0.5, detector__beam_stop_radius_px=4, detector__gap_rows=[[100, 104]],
        detector__saturation_counts=3000, detector__background_photons=2.0,
    )  # fmt: skip
    truth, counts, about = one.truth(200), one.frame(200), one.detector()
    assert about.mask is not None
    assert about.saturation == 3000
    assert (counts[100:104] == 65535).all()
    assert about.mask[100:104].all()
    assert (counts[62:67, 62:67] == 0).sum() >= 24  # a bad pixel may lie there
    assert about.mask[62:67, 62:67].all()
    unknown = ~truth.valid & ~about.mask
    assert 10 <= unknown.sum() <= 15  # half of 30; a few may fall under the stop or into the gap
    assert not (truth.valid & about.mask).any()
    expected = intensity(truth.object) + 2.0
    assert (counts[truth.valid & (expected > 3500)] == 65535).all()
    assert counts[truth.valid & (counts < 65535)].max() < 3000
    dim = truth.valid & (expected < 2.05)
    assert counts[dim].mean() == pytest.approx(2.0, abs=0.2)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_counts_beyond_the_dtype_clip_to_its_maximum_and_never_wrap(dtype: str) -> None:
    one = twin(detector__dtype=dtype, dose_photons=1e8, detector__dead=0, detector__hot=0)
    counts, expected = one.frame(200), intensity(one.truth(200).object)
    top = np.iinfo(dtype).max
    assert counts.dtype == np.dtype(dtype)
    assert (counts[expected > 1.1 * top] == top).all()
    below = expected < 0.8 * top
    assert np.abs(counts[below] - expected[below]).max() < 7 * np.sqrt(expected[below].max()) + 10


def test_frames_depend_on_seed_and_index_alone() -> None:
    one, again = twin("drift"), twin("drift")
    forward = [one.frame(index) for index in (3, 650, 1100)]
    backward = [again.frame(index) for index in (1100, 650, 3)][::-1]
    for a, b in zip(forward, backward, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (twin("drift", seed=12, sample__seed=11).frame(3) != forward[0]).any()
    with pytest.raises(IndexError, match="frame 1200 of 1200"):
        one.frame(1200)


def test_drift_shows_in_the_truth_and_in_the_frames() -> None:
    one = twin("drift", drift__flux_rms=0.0)
    before, moved, hot, late = (one.truth(index) for index in (599, 600, 800, 1199))
    assert before.centre == (52, 52)
    assert moved.centre == (52, 53)
    assert before.flux == hot.flux == 1.0
    assert late.flux == pytest.approx(0.99**199)
    assert not hot.valid[20:24, 70:74].any()
    assert moved.valid[20:24, 70:74].all()
    assert one.frame(800)[20:24, 70:74].min() > 1000
    assert one.frame(799)[20:24, 70:74].max() < 1000
    columns = np.arange(104)

    def centre(first: int) -> float:
        return float(np.mean([(one.frame(index).sum(0) @ columns) / one.frame(index).sum() for index in range(first, first + 20)]))

    assert centre(600) - centre(580) == pytest.approx(1.0, abs=0.1)
    still = twin("drift")
    fluxes = [still.truth(index).flux for index in range(500)]
    assert np.std(fluxes) == pytest.approx(0.005, rel=0.2)


# --- scenarios -------------------------------------------------------------------------------------------------------------------


def test_every_bundled_scenario_builds_and_does_not_saturate() -> None:
    assert {"bragg", "bragg_beam_stop", "drift", "gold_balls"} <= set(bundled())
    for name in bundled():
        one = twin(name)
        counts, truth = one.frame(len(one) // 2), one.truth(len(one) // 2)
        assert counts[truth.valid].max() < np.iinfo(counts.dtype).max
        assert counts[truth.valid].sum() > 0.2 * one.scenario.dose_photons


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"detector.beam_stop_radius": 3}, r"detector\.beam_stop_radius: unknown key; did you mean beam_stop_radius_px\?"),
        ({"sample.sizenm": 3}, r"sample\.sizenm: unknown key; did you mean size_nm\?"),
        ({"drift.steps": [{"frame": 1, "flx": 2}]}, r"drift\.steps\.0\.flx: unknown key; did you mean flux\?"),
        ({"zzzz": 1}, r"zzzz: unknown key; known here: name, seed, frames"),
        ({"frames": 0}, r"frames: Input should be greater than or equal to 1 \(found 0\)"),
        ({"sample.kind": "bone"}, r"sample: .*'bragg', 'gold_balls'"),
        ({"seed.deep": 1}, r"change seed\.deep: seed is no section"),
    ],
)
def test_a_wrong_key_is_named_with_its_remedy(edit: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_scenario("bragg", edit)


def test_a_scenario_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read .* or one of bragg, "):
        load_scenario(tmp_path / "nowhere.yaml")
    for text, message in (("a: [", "no YAML"), ("- 1", "holds no keys"), ("name: x", "sample: Field required")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(ConfigError, match=rf"bad\.yaml: .*{message}"):
            load_scenario(tmp_path / "bad.yaml")
    for edit, message in (
        ({"sample.data": "absent.h5"}, r"sample\.data .*absent\.h5: cannot be read"),
        ({"detector.dead": 20000}, r"detector\.dead \+ detector\.hot: 20000 of 10816 pixels"),
        ({"detector.gap_rows": [[100, 200]]}, r"detector\.gap_rows \[100, 200\]: give first < end within 0 to 104"),
        ({"drift.steps": [{"frame": 1, "hot_block": [102, 0]}]}, r"drift\.steps\.0\.hot_block \(102, 0\) does not lie on the detector"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(load_scenario("gold_balls", edit))


# --- the wire and the file -------------------------------------------------------------------------------------------------------


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
        start, *frames, end = [decoder.decode(pull.recv(), 0.0) for _ in range(17)]
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
    times = [decoder.decode(message, 0.0).detector_time for message in itertools.islice(stream(twin(), 200.0), 1, 6)]
    assert np.diff(times) == pytest.approx(0.005, abs=1e-6)


def test_nobody_at_the_address_is_told_at_once() -> None:
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        free = pull.bind_to_random_port("tcp://127.0.0.1")
    with pytest.raises(ConfigError, match=f"nobody listens at tcp://127.0.0.1:{free}"), zmq_sender(f"tcp://127.0.0.1:{free}", 0.2):
        pass
    with pytest.raises(ConfigError, match="cannot send to nonsense"), zmq_sender("nonsense"):
        pass


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
    frames = [StreamV2Decoder("twin").decode(message, 0.0) for message in sender.messages[1:-1]]
    assert [(frame.index, frame.origin) for frame in frames] == [(index, few.origin(index)) for index in range(10)]


def test_a_saved_run_holds_frames_geometry_and_positions(tmp_path: Path) -> None:
    one = twin("gold_balls", detector__dead=5)
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
            record = decoder.decode(message, 0.0)
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
