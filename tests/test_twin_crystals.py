"""The twin's crystals: seven morphologies from shape, strain and defects."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from streamprior_sim.crystals import MORPHOLOGIES, grow_crystal
from streamprior_sim.cxi import save
from streamprior_sim.optics import far_field, intensity
from streamprior_sim.scenario import CollectionSettings, load_scenario
from streamprior_sim.twin import Twin, build

from streamprior.errors import ConfigError

TAIL, VORTEX, NEEDLE, DIFFUSE = "core with vertical tail", "ring / vortex", "needle streak", "diffuse cloud"

every_morphology = pytest.mark.parametrize("morphology", MORPHOLOGIES)


def crystals(**changes: object) -> Twin:
    """The bundled scenario with changes; a double underscore stands for the dot of a key."""
    return build(load_scenario("crystals", {key.replace("__", "."): value for key, value in changes.items()}))


def centre_of_mass(photons: np.ndarray) -> np.ndarray:
    """(row, column) relative to the frame's centre, pixels."""
    rows, columns = (np.arange(n) - n // 2 for n in photons.shape)
    return np.array([photons.sum(1) @ rows, photons.sum(0) @ columns]) / photons.sum()


def extent(psi: np.ndarray) -> np.ndarray:
    """Rows and columns that the object takes."""
    return np.array([np.ptp(np.flatnonzero(psi.any(axis))) + 1 for axis in (1, 0)])


def spread(photons: np.ndarray) -> np.ndarray:
    """(2,) standard deviations along the pattern's main axes, pixels, the smaller first."""
    rows, columns = (np.arange(n) - n // 2 for n in photons.shape)
    places = np.stack(np.broadcast_arrays(rows[:, None], columns)).reshape(2, -1)
    return np.sqrt(np.linalg.eigvalsh(np.cov(places, aweights=photons.ravel())))


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """The largest |<one, other>| over translations, for the other and for its twin: 1 where intensity cannot tell them apart."""
    spectrum = np.fft.fft2(one)
    return max(float(np.abs(np.fft.ifft2(spectrum * np.conj(np.fft.fft2(them)))).max()) for them in (other, other[::-1, ::-1].conj()))


# --- every crystal ---------------------------------------------------------------------------------------------------------------


@every_morphology
@pytest.mark.parametrize("shape", [(64, 64), (96, 48), (65, 80)])
def test_a_crystal_is_sampled_two_and_a_half_times_in_the_middle_of_its_frame(morphology: str, shape: tuple[int, int]) -> None:
    for seed in range(5):
        psi = grow_crystal(morphology, seed, shape)
        assert psi.shape == shape
        assert psi.dtype == np.complex64
        assert (extent(psi) <= 0.4 * np.array(shape)).all()
        middle = [np.flatnonzero(psi.any(axis)).mean() - n // 2 for axis, n in zip((1, 0), shape, strict=True)]
        assert np.abs(middle).max() <= 1
        assert np.sum(np.abs(psi) ** 2) == pytest.approx(1, rel=1e-4)


@every_morphology
def test_the_same_seed_is_the_same_crystal_and_another_seed_another_one(morphology: str) -> None:
    np.testing.assert_array_equal(grow_crystal(morphology, 3), grow_crystal(morphology, 3))
    grown = [grow_crystal(morphology, seed) for seed in range(10)]
    overlaps = [overlap(one, other) for number, one in enumerate(grown) for other in grown[:number]]
    assert np.median(overlaps) < 0.95
    # Two equiaxed crystals of one size are alike in life too; the object error between them is still over 0.14.
    assert max(overlaps) < 0.99
    assert overlap(grown[0], np.roll(grown[0], (3, -2), (0, 1))[::-1, ::-1].conj()) > 0.999


@pytest.mark.parametrize("morphology", ["compact symmetric core", "elongated core", NEEDLE, VORTEX, TAIL])
def test_a_pattern_does_not_depend_on_how_many_pixels_surround_it(morphology: str) -> None:
    """Pixels of the same size further out refine the sample's pitch; strong disorder, drawn voxel by voxel, would be another crystal."""
    small, large = intensity(grow_crystal(morphology, 1)), intensity(grow_crystal(morphology, 1, (128, 128)))[32:96, 32:96]
    assert np.corrcoef(small.ravel(), large.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("morphology", [name for name in MORPHOLOGIES if name != TAIL])
def test_diffraction_is_centred_by_its_mass(morphology: str) -> None:
    for seed in range(10):
        assert np.hypot(*centre_of_mass(intensity(grow_crystal(morphology, seed)))) < 0.1


def test_what_cannot_grow_says_so() -> None:
    with pytest.raises(ValueError, match="no morphology 'snowflake'; there are compact symmetric core"):
        grow_crystal("snowflake", 0)
    with pytest.raises(ValueError, match="at least 32 pixels"):
        grow_crystal(VORTEX, 0, (16, 64))
    with pytest.raises(ValueError, match="non-negative"):
        grow_crystal(VORTEX, -1)


# --- each its own physics --------------------------------------------------------------------------------------------------------


def test_a_vortex_winds_once_around_a_dark_line() -> None:
    signs = []
    for seed in range(12):
        psi = grow_crystal(VORTEX, seed)
        loop = [psi[:-1, :-1], psi[1:, :-1], psi[1:, 1:], psi[:-1, 1:]]
        steps = [np.angle(following * np.conj(here)) for here, following in zip(loop, [*loop[1:], loop[0]], strict=True)]
        winding = np.round(sum(steps) / (2 * np.pi)).astype(int)
        # The phase outside the crystal is no phase: count within its brighter part.
        rows, columns = np.nonzero(np.abs(psi) > 0.3 * np.abs(psi).max())
        inside = winding[rows.min() + 2 : rows.max() - 2, columns.min() + 2 : columns.max() - 2]
        assert abs(inside.sum()) == 1
        signs.append(int(inside.sum()))
    assert set(signs) == {-1, 1}


def test_a_vortex_diffracts_into_a_ring_with_a_dark_middle() -> None:
    radius = np.hypot(*np.ogrid[-32:32, -32:32])
    for seed in range(12):
        pattern = intensity(grow_crystal(VORTEX, seed))
        assert pattern[radius < 2].min() < 0.25 * pattern[radius < 6].max()
        azimuth = np.arange(8) * np.pi / 4
        on_ring = [max(pattern[32 + round(r * np.cos(a)), 32 + round(r * np.sin(a))] for r in (2, 3, 4)) for a in azimuth]
        assert min(on_ring) > pattern[radius < 2].min()


def test_a_tail_leaves_its_core_at_the_centre_and_runs_along_the_rows_to_one_side() -> None:
    sides = set()
    for seed in range(12):
        pattern = intensity(grow_crystal(TAIL, seed))
        peak = np.array(np.unravel_index(pattern.argmax(), pattern.shape)) - 32
        assert np.abs(peak).max() <= 1
        strip = pattern[:, 29:36].sum(1)
        up, down = strip[16:28].sum(), strip[37:49].sum()
        assert max(up, down) > 3 * min(up, down)
        across = pattern[29:36].sum(0)
        assert max(across[16:28].sum(), across[37:49].sum()) < 0.5 * max(up, down)
        sides.add(up > down)
    assert sides == {True, False}


def test_a_plate_scatters_along_its_normal() -> None:
    for seed in range(8):
        psi = grow_crystal(NEEDLE, seed)
        narrow, wide = spread(np.abs(psi) ** 2)
        assert wide > 3 * narrow
        thin, long = spread(intensity(psi))
        assert long > 2 * thin


def test_an_elongated_crystal_lies_between_a_compact_one_and_a_plate() -> None:
    def ratio(morphology: str) -> float:
        shapes = [spread(np.abs(grow_crystal(morphology, seed)) ** 2) for seed in range(10)]
        return float(np.median([wide / narrow for narrow, wide in shapes]))

    assert 1 < ratio("compact symmetric core") < 1.3 < ratio("elongated core") < 2.6 < ratio(NEEDLE)


def test_strain_takes_the_light_out_of_the_core() -> None:
    """The share of the photons in the brightest pixel's neighbourhood falls from nearly none to moderate to strong disorder."""

    def core_share(morphology: str) -> float:
        return float(np.median([np.sort(intensity(grow_crystal(morphology, seed)).ravel())[-30:].sum() for seed in range(10)]))

    assert core_share("compact symmetric core") > 0.7 > core_share("broad core + halo") > 1.3 * core_share(DIFFUSE)


def test_disorder_leaves_speckle_as_fine_as_the_crystal_is_wide() -> None:
    psi = grow_crystal(DIFFUSE, 2)
    field = far_field(psi)
    bright = np.abs(field) ** 2 > 0.05 * (np.abs(field) ** 2).max()
    assert bright.sum() > 150
    correlation = np.abs(np.fft.fftshift(np.fft.ifft2(np.abs(field) ** 2)))
    reach = np.argwhere(correlation > 1e-3 * correlation.max()) - 32
    assert (np.abs(reach).max(0) < extent(psi) + 1).all()


# --- the scenario ----------------------------------------------------------------------------------------------------------------


def test_morphologies_come_in_turn_and_the_truth_names_them() -> None:
    one = crystals()
    assert len(one) == 40 * len(MORPHOLOGIES)
    assert tuple(one.truth(index).morphology for index in range(7, 14)) == MORPHOLOGIES
    assert build(load_scenario("bragg")).truth(0).morphology is None
    truth = one.truth(5)
    assert intensity(truth.object).sum() == pytest.approx(1e6, rel=1e-3)
    assert one.frame(5).sum() == pytest.approx(1e6, rel=0.01)


def test_a_collection_goes_on_where_first_says() -> None:
    whole, rest = crystals(), crystals(sample__first=9, frames=4)
    np.testing.assert_array_equal(whole.truth(10).object, rest.truth(1).object)
    assert whole.truth(10).morphology == rest.truth(1).morphology


def test_another_seed_of_the_sample_is_another_collection_under_the_same_noise() -> None:
    one, other = crystals(), crystals(sample__seed=12)
    assert one.truth(3).morphology == other.truth(3).morphology
    assert np.corrcoef(intensity(one.truth(3).object).ravel(), intensity(other.truth(3).object).ravel())[0, 1] < 0.99
    np.testing.assert_array_equal(crystals(seed=4, sample__seed=11).truth(3).object, one.truth(3).object)


def test_stop_dead_pixels_and_dose_apply_as_to_every_sample() -> None:
    one = crystals(dose_photons=2e4, detector__beam_stop_radius_px=3, detector__dead=82, detector__unknown_share=1.0)
    truth, counts = one.truth(0), one.frame(0)
    assert intensity(truth.object).sum() == pytest.approx(2e4, rel=1e-3)
    assert not counts[30:35, 30:35].any()
    assert one.detector().mask.sum() == 25  # the stop; the dead ones are unknown
    assert (~truth.valid).sum() > 25 + 70


def test_the_file_holds_frames_and_no_truth(tmp_path: Path) -> None:
    path = save(crystals(), tmp_path / "set1.cxi", slice(14))
    names: list[str] = []
    with h5py.File(path) as file:
        file.visit(names.append)
        assert file["entry_1/data_1/data"].shape == (14, 64, 64)
    assert not [name for name in names if "morph" in name or "object" in name or "truth" in name]
    content = path.read_bytes()
    assert not [name for name in MORPHOLOGIES if name.encode() in content]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sample.frist": 7}, r"sample\.frist: unknown key; did you mean first\?"),
        ({"sample.first": -1}, r"sample\.first: Input should be greater than or equal to 0"),
        ({"sample.kind": "crystal"}, r"sample: .*'crystals'"),
        ({"detector.shape": [64, 16]}, r"detector\.shape \(64, 16\): crystals need at least 32 pixels"),
    ],
)
def test_a_scenario_that_cannot_be_says_why(edit: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(load_scenario("crystals", edit))


def test_every_setting_of_the_collection_says_what_it_means() -> None:
    assert [name for name, field in CollectionSettings.model_fields.items() if not field.description] == []
