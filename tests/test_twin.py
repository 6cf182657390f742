"""The digital twin: its forward model, its detector, its drift, its scenarios."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import xraydb
from streamprior_sim.gold_balls import _add_ball, transmission
from streamprior_sim.optics import back, far_field, intensity, ramp
from streamprior_sim.scenario import (
    CrystalSettings,
    DetectorSettings,
    DriftSettings,
    GoldBallSettings,
    Scenario,
    StepSettings,
    bundled,
    load_scenario,
)
from streamprior_sim.twin import Twin, build

from streamprior.errors import ConfigError


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
        # sqrt(Poisson) has variance 1/4 where photons are many: chi2 of the truth is its floor N / (4 total).
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


@pytest.mark.parametrize("seed", range(4))
def test_crystal_and_peak_stand_in_the_middle_whatever_the_facets_and_the_strain(seed: int) -> None:
    strained = {"sample__displacement_rms_nm": 0.06, "sample__correlation_nm": 150, "sample__facet_spread": 0.5}
    one = twin(seed=seed, frames=101, **strained)
    waves = [one.truth(index).object for index in range(101)]
    whole = np.max(np.abs(waves), axis=0)
    rows, columns = np.nonzero(whole > 0.3 * whole.max())
    assert abs((rows.min() + rows.max()) / 2 - 64) <= 1
    assert abs((columns.min() + columns.max()) / 2 - 64) <= 1
    patterns = [intensity(wave) for wave in waves]
    # A displacement with a slope would carry the peak away in the plane or along the rocking curve.
    assert 40 <= np.argmax([pattern.sum() for pattern in patterns]) <= 60
    brightest = np.unravel_index(np.argmax(np.max(patterns, axis=0)), (128, 128))
    assert np.hypot(brightest[0] - 64, brightest[1] - 64) < 5


def test_the_far_field_does_not_depend_on_how_finely_the_crystal_is_sampled() -> None:
    still = {"seed": 3, "frames": 51, "sample__displacement_rms_nm": 0}
    coarse, fine = twin(**still), twin(**still, detector__shape=[384, 384])
    a = np.sqrt(intensity(coarse.truth(35).object))
    b = np.sqrt(intensity(fine.truth(35).object))[128:256, 128:256]
    # Light scattered beyond the frame folds back into it; a crystal of whole voxels would differ by 0.15 here.
    assert np.abs(a / a.sum() - b / b.sum()).sum() < 0.1


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
    assert thickness.sum() * 1e9 * 2**2 == pytest.approx(4 / 3 * np.pi * 25**3, rel=0.01)  # nm3
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
    corners = np.argwhere(published[:507, :507] == truth.object[0, 0])
    assert any((published[row : row + 104, column : column + 104] == truth.object).all() for row, column in corners)
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


def test_dead_pixels_read_nothing_and_hot_ones_noise() -> None:
    one = twin(detector__dead=20, detector__hot=10, detector__background_photons=50.0)
    counts, truth = one.frame(0), one.truth(0)
    assert (counts == 0).sum() == 20
    assert (counts > 4000).sum() == 10
    np.testing.assert_array_equal(truth.valid, (counts > 0) & (counts < 4000))
    np.testing.assert_array_equal(one.detector().mask, ~truth.valid)


def test_a_saturation_beyond_the_dtype_is_the_dtypes() -> None:
    counts = twin(detector__dtype="uint8", detector__saturation_counts=300, detector__hot=0).frame(200)
    expected = intensity(twin().truth(200).object)
    assert (counts[expected > 400] == 255).all()
    assert (counts[(expected > 260) & (expected < 400)] > 150).all()


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
    still = twin(sample__rocking_range_deg=0)
    np.testing.assert_array_equal(still.truth(1).object, still.truth(2).object)
    assert (still.frame(1) != still.frame(2)).mean() > 0.05
    with pytest.raises(IndexError, match="frame 1200 of 1200"):
        one.frame(1200)


def test_drift_shows_in_the_truth_and_in_the_frames() -> None:
    one = twin("drift", drift__flux_rms=0.0)
    before, moved, hot, late = (one.truth(index) for index in (599, 600, 800, 1199))
    assert before.centre == (52, 52)
    assert moved.centre == (52, 53)
    assert before.flux == hot.flux == 1.0
    assert late.flux == pytest.approx(0.99**199)
    assert one.frame(1199)[late.valid].sum() / one.frame(999)[late.valid].sum() == pytest.approx(0.99**199, rel=0.1)
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
    assert {"bragg", "bragg_beam_stop", "crystals", "drift", "gold_balls"} <= set(bundled())
    for name in bundled():
        one = twin(name)
        counts, truth = one.frame(len(one) // 2), one.truth(len(one) // 2)
        assert counts[truth.valid].max() < np.iinfo(counts.dtype).max
        assert counts[truth.valid].sum() > 0.2 * one.scenario.dose_photons


def test_every_setting_says_what_it_means() -> None:
    for model in (Scenario, CrystalSettings, GoldBallSettings, DetectorSettings, DriftSettings, StepSettings):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"detector.beam_stop_radius": 3}, r"detector\.beam_stop_radius: unknown key; did you mean beam_stop_radius_px\?"),
        ({"sample.sizenm": 3}, r"sample\.sizenm: unknown key; did you mean size_nm\?"),
        ({"drift.steps": [{"frame": 1, "flx": 2}]}, r"drift\.steps\.0\.flx: unknown key; did you mean flux\?"),
        ({"zzzz": 1}, r"zzzz: unknown key; known here: name, seed, frames"),
        ({"frames": 0}, r"frames: Input should be greater than or equal to 1 \(found 0\)"),
        ({"sample.kind": "bone"}, r"sample: .*'bragg', 'crystals', 'gold_balls'"),
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
