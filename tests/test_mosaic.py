"""The mosaic against its obvious version, the truth of a simulated scan, and itself in other groupings; probe and agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.fft
from scipy.ndimage import gaussian_filter

from streamprior.errors import ConfigError
from streamprior.mosaic.agreement import agreement, onto, well_lit
from streamprior.mosaic.kernels import gather_window, illuminate
from streamprior.mosaic.mosaic import Mosaic, Shot
from streamprior.mosaic.overlap import DIM, CpuOverlap, Rule, Shots
from streamprior.mosaic.probe import ProbePlaces, centroid, load_probe, modelled_probe, scaled, with_modes
from tests.naive_mosaic import chi2_of, far, forward, fourier_shift, modulus, near, window_at

SHAPE = (32, 32)


# --- a scan whose truth is known ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sim:
    """object (rows, columns), probe (M, H, W), corners (N, 2) of the probe's window in the object, counts (N, H, W) with the beam in the
    middle."""

    object: np.ndarray
    probe: np.ndarray
    corners: np.ndarray
    counts: np.ndarray

    def __len__(self) -> int:
        return len(self.counts)


def a_probe(shape: tuple[int, int] = SHAPE, modes: int = 1, photons: float = 1e5, seed: int = 0) -> np.ndarray:
    """(M, H, W) complex64: a curved spot that no mirror brings onto itself, and further modes of a tenth of its light each."""
    random = np.random.default_rng(seed)
    y, x = (np.arange(n) - n // 2 for n in shape)
    spot = np.exp(-((y[:, None] / 5) ** 2) - (x / 4) ** 2 + 0.05j * (y[:, None] ** 2 + x**2) + 0.1j * y[:, None])
    spot = spot * (1 + 0.4 * (x > 2)) * (1 - 0.3 * (y[:, None] > 1))
    nodes = [1, y[:, None] / 4, x / 3][:modes]
    found = np.array([spot * node * (1 if i == 0 else 0.5) for i, node in enumerate(nodes)]) + 0 * random.normal()
    return (found * np.sqrt(photons / (np.abs(found) ** 2).sum())).astype(np.complex64)


def a_sample(rows: int, columns: int, seed: int = 0, phase: float = 0.5) -> np.ndarray:
    """(rows, columns) complex64, smooth over a few pixels."""
    random = np.random.default_rng(seed)
    smooth = [gaussian_filter(random.normal(size=(rows, columns)), 1.5) for _ in range(2)]
    shaped = [one / one.std() for one in smooth]
    return np.asarray(np.exp(phase * 1j * shaped[0]) * np.clip(1 - 0.12 * (1 + shaped[1]), 0.3, 1.2), np.complex64)


def simulated(
    side: int = 8,
    step: float = 4.0,
    shape: tuple[int, int] = SHAPE,
    modes: int = 1,
    seed: int = 0,
    photons: float = 1e5,
    fractions: int = 16,
) -> Sim:
    """side x side frames on a raster that is no exact grid, which would leave artefacts of its period; places on 1/fractions of a pixel."""
    random = np.random.default_rng(seed)
    raster = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2) * step
    corners = 2 + raster + random.uniform(-1, 1, raster.shape)
    corners = np.rint(corners * fractions) / fractions
    size = np.ceil(corners.max(0)).astype(int) + shape + 3
    sample, probe = a_sample(size[0], size[1], seed), a_probe(shape, modes, photons)
    return exposed(sample, probe, corners, seed)


def exposed(sample: np.ndarray, probe: np.ndarray, corners: np.ndarray, seed: int = 0) -> Sim:
    """Frames with photon noise."""
    random = np.random.default_rng(seed + 1000)
    frames = [random.poisson(intensity_at(sample, probe, corner)) for corner in corners]
    return Sim(sample, probe, corners, np.array(frames, np.float32))


def intensity_at(sample: np.ndarray, probe: np.ndarray, corner: np.ndarray) -> np.ndarray:
    whole = np.floor(corner)
    return np.asarray(modulus(forward(sample, fourier_shift(probe.astype(complex), tuple(corner - whole)), whole)) ** 2)


def target_of(counts: np.ndarray) -> np.ndarray:
    return np.fft.ifftshift(np.sqrt(counts * counts.size)).astype(np.float32)


def shots_of(sim: Sim, chosen: Sequence[int] | None = None) -> list[Shot]:
    return [Shot(i, (float(sim.corners[i, 0]), float(sim.corners[i, 1])), target_of(sim.counts[i])) for i in chosen or range(len(sim))]


def a_mosaic(sim: Sim, rule: Rule | None = None, probe: np.ndarray | None = None, **more: Any) -> Mosaic:
    probe = sim.probe if probe is None else probe
    return Mosaic(probe, rule or Rule(), lambda: CpuOverlap((probe.shape[1], probe.shape[2]), len(probe)), **more)


def error_of(mosaic: Mosaic, sim: Sim) -> float:
    """Of the picture against the truth where it is well lit, over the contrast; a factor and a linear phase are free."""
    picture = mosaic.picture()
    assert picture is not None
    return error_against(picture.image, picture.light, picture.origin, sim.object)


def error_against(image: np.ndarray, light: np.ndarray, origin: tuple[float, float], sample: np.ndarray) -> float:
    rows, columns = (round(first) for first in origin)
    margin = np.pad(sample, 64, constant_values=1)
    truth = margin[rows + 64 : rows + 64 + image.shape[0], columns + 64 : columns + 64 + image.shape[1]]
    lit = well_lit(light)
    found = onto(truth, image, lit)
    return float(np.sqrt(np.mean(np.abs(found - truth)[lit] ** 2)) / np.sqrt(np.mean(np.abs(truth[lit] - truth[lit].mean()) ** 2)))


def through(pieces: Any) -> list[float]:
    return list(pieces)


# --- one pass, in obvious words ----------------------------------------------------------------------------------------------------


def naive_passes(
    shots: Shots, places: ProbePlaces, shape: tuple[int, int], rule: Rule
) -> tuple[np.ndarray, np.ndarray, list[tuple[float, float, float]]]:
    """(image, light, misfits) in double precision with centred arrays."""
    image, light, misfits = np.ones(shape, complex), np.zeros(shape), []
    pixels = shots.targets[0].size
    for b, corner in enumerate(shots.corners):
        probe = places.probes[shots.slots[b]].astype(complex)
        here, own = window_at(corner, probe), (np.abs(probe) ** 2).sum(0)
        target = np.fft.fftshift(shots.targets[b]).astype(float) / np.sqrt(pixels)
        trust = np.fft.fftshift(shots.trust[b % len(shots.trust)])
        old, patch, found = image[here].copy(), image[here].copy(), []
        for _ in range(rule.iterations):
            field = far(probe * patch)
            size = modulus(field)
            found.append(float(((size - target)[target >= 0] ** 2).sum() * pixels))
            wave = near(field * np.where(target >= 0, 1 + trust * (target / size - 1), 1))
            share = own + rule.weight * places.peak + rule.memory * light[here]
            patch = old + (probe.conj() * (wave - probe * old)).sum(0) / share
        seen = own[light[here] > DIM * places.peak].sum() / own.sum()
        image[here], light[here] = patch, light[here] + own * rule.lit
        misfits.append((found[0], found[-1], float(seen)))
    return image, light, misfits


def stacked(sim: Sim, places: ProbePlaces, masked: bool = False, trust: float = 1.0) -> Shots:
    corners, slots = places.places(sim.corners)
    targets = np.stack([target_of(counts) for counts in sim.counts])
    if masked:
        targets[:, 5:9, 3:20] = -1
        targets[1::2, 20] = -1
    return Shots(corners, slots, targets, np.full((1, *targets.shape[1:]), trust, np.float32))


def assert_close(found: np.ndarray, wanted: np.ndarray, within: float = 1e-4) -> None:
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= within * np.abs(wanted).max()


@pytest.mark.parametrize("rule", [Rule(1, 0.05, 0.3), Rule(3, 0.3, 0.1), Rule(2, 1.0, 0.0, lit=False), Rule(1, 0.01, 1.0)])
@pytest.mark.parametrize(("modes", "masked", "trust"), [(1, False, 1.0), (3, False, 1.0), (3, True, 1.0), (1, True, 0.4)])
@pytest.mark.parametrize("shape", [(32, 32), (24, 40)])
def test_a_pass_is_that_of_the_obvious_version(shape: tuple[int, int], modes: int, masked: bool, trust: float, rule: Rule) -> None:
    sim = simulated(4, 5.0, shape, modes)
    places = ProbePlaces(sim.probe)
    shots = stacked(sim, places, masked, trust)
    overlap = CpuOverlap(shape, modes)
    canvas = overlap.canvas(*sim.object.shape)
    found = overlap.passes(canvas, shots, places, rule, False)
    image, light, misfits = naive_passes(shots, places, sim.object.shape, rule)
    assert_close(canvas.image, image)
    assert_close(1 + canvas.light, 1 + light)
    assert_close(found[:, :2], np.array(misfits)[:, :2])
    np.testing.assert_allclose(found[:, 2], np.array(misfits)[:, 2], atol=1e-4)


@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("modes", [1, 3])
def test_scipys_transforms_give_what_fftws_give(modes: int, refine: bool) -> None:
    sim = simulated(4, 5.0, modes=modes)
    places = ProbePlaces(sim.probe)
    shots = stacked(sim, places, masked=True)
    found = []
    for engine in ("auto", "scipy"):
        overlap = CpuOverlap(SHAPE, modes, engine)
        canvas, total = overlap.canvas(*sim.object.shape), overlap.canvas(*sim.object.shape)
        total.image[...] = 0
        first = overlap.passes(canvas, shots, places, Rule(2), refine)
        second = overlap.gather(canvas, total, shots, places, refine)
        overlap.project(canvas, total)
        gradient = overlap.take_gradient() if refine else ()
        found.append((canvas.image, canvas.light, total.image, first[:, :2], second, *gradient))
    for one, other in zip(*found, strict=True):
        assert_close(one, other)


def test_gathering_is_the_adjoint_of_illuminating() -> None:
    random = np.random.default_rng(3)
    probe = a_probe(modes=2)
    image = (random.normal(size=(50, 60)) + 1j * random.normal(size=(50, 60))).astype(np.complex64)
    field = (random.normal(size=(2, *SHAPE)) + 1j * random.normal(size=(2, *SHAPE))).astype(np.complex64)
    psi, total, light = np.zeros((2, *SHAPE), np.complex64), np.zeros_like(image), np.zeros(image.shape, np.float32)
    row, column = np.int64(11), np.int64(23)
    illuminate(pairs(image), row, column, pairs(probe), pairs(psi))
    gather_window(pairs(np.zeros_like(image)), pairs(total), light, row, column, pairs(probe), (np.abs(probe) ** 2).sum(0), pairs(field))
    assert np.vdot(psi, field) == pytest.approx(np.vdot(image, total), rel=1e-4)
    np.testing.assert_array_equal(psi, probe * image[11:43, 23:55])


def pairs(array: np.ndarray) -> np.ndarray:
    return array.view(np.float32)


def bare(frames: int) -> Sim:
    """Frames at one place that hold what an empty beam gives, brighter and darker by stripes: no pixel whose phase is left to rounding."""
    sim = simulated(1)
    empty = intensity_at(np.ones_like(sim.object), sim.probe, sim.corners[0])
    stripes = [1 + 0.5 * np.sin(np.arange(SHAPE[1]) / (3 + i)) for i in range(frames)]
    return Sim(sim.object, sim.probe, np.repeat(sim.corners, frames, 0), np.array([empty * stripe for stripe in stripes], np.float32))


def test_without_memory_a_step_is_that_of_rpie() -> None:
    sim, alpha = bare(1), 0.2
    places = ProbePlaces(sim.probe)
    shots = stacked(sim, places)
    overlap = CpuOverlap(SHAPE, 1)
    canvas = overlap.canvas(*sim.object.shape)
    overlap.passes(canvas, shots, places, Rule(1, alpha / (1 - alpha), 0.0), False)
    probe = places.probes[0, 0].astype(complex)
    field, power = far(probe), np.abs(probe) ** 2
    change = near(field / np.abs(field) * np.sqrt(sim.counts[0])) - probe
    # Maiden, Johnson & Li, Optica 4, 736, 2017, equation 18.
    rpie = 1 + probe.conj() * change / ((1 - alpha) * power + alpha * places.peak)
    # Their step is ours times (1 - alpha): our weight is that of a mean.
    ours = 1 + (1 - alpha) * (rpie - 1)
    assert_close(canvas.image[window_at(shots.corners[0], probe)], ours)


def test_with_full_memory_and_no_weight_a_place_is_the_running_mean_of_what_its_frames_ask() -> None:
    both = bare(3)
    places = ProbePlaces(both.probe)
    shots = stacked(both, places)
    overlap = CpuOverlap(SHAPE, 1)
    canvas = overlap.canvas(*both.object.shape)
    overlap.passes(canvas, shots, places, Rule(1, 1e-9, 1.0), False)
    probe = places.probes[0, 0].astype(complex)
    lit = np.abs(probe) ** 2 > 1e-3 * (np.abs(probe) ** 2).max()
    answers: list[np.ndarray] = []
    mean = np.ones(SHAPE, complex)
    for counts in both.counts:
        field = far(probe * mean)
        answers.append(near(field / np.abs(field) * np.sqrt(counts)) / probe)
        mean = np.asarray(np.mean(answers, 0))
    assert_close(canvas.image[window_at(shots.corners[0], probe)][lit], mean[lit], 1e-3)


def test_the_overlap_projection_is_the_mean_of_all_answers_weighted_by_their_light() -> None:
    sim = simulated(5)
    mosaic = a_mosaic(sim, halves=False)
    mosaic.add(shots_of(sim))
    before = mosaic.picture()
    assert before is not None
    origin = np.array(before.origin)
    answers, light = np.zeros(before.image.shape, complex), np.zeros(before.image.shape)
    probes = mosaic.places
    corners, slots = probes.places(sim.corners)
    for counts, corner, slot in zip(sim.counts, corners - origin, slots, strict=True):
        probe = probes.probes[slot].astype(complex)
        here = window_at(corner, probe)
        field = far(probe * before.image[here])
        answers[here] += (probe.conj() * near(field / modulus(field) * np.sqrt(counts))).sum(0)
        light[here] += (np.abs(probe) ** 2).sum(0)
    through(mosaic.average())
    after = mosaic.picture()
    assert after is not None
    lit = light > 0.05 * light.max()
    # Held by a thousandth of the largest light to what was there.
    wanted = before.image + (answers - light * before.image) / (light + 1e-3 * light.max())
    assert_close(after.image[lit], wanted[lit])
    assert np.abs(after.image - answers / np.where(lit, light, 1))[lit].max() < 0.03


def test_chi2_is_the_misfit_of_all_frames_over_their_photons_and_changes_nothing() -> None:
    sim = simulated(5, fractions=1)
    mosaic = a_mosaic(sim, halves=False)
    mosaic.add(shots_of(sim))
    picture = mosaic.picture()
    assert picture is not None
    wanted = chi2_of(sim.counts, picture.image.astype(complex), sim.probe.astype(complex), sim.corners - np.array(picture.origin))
    assert mosaic.chi2() == pytest.approx(wanted, rel=1e-4)
    again = mosaic.picture()
    assert again is not None
    np.testing.assert_array_equal(again.image, picture.image)
    assert mosaic.chi2() == pytest.approx(wanted, rel=1e-4)


def test_what_a_pass_says_of_a_frame_is_its_chi2_before_and_after_and_the_part_of_its_light_on_known_ground() -> None:
    sim = simulated(3, fractions=1)
    mosaic = a_mosaic(sim, Rule(4, 0.05, 0.3), halves=False)
    first, *others = mosaic.add(shots_of(sim))
    # The mosaic is 1 everywhere before the first frame.
    bare = chi2_of(sim.counts[:1], np.ones(SHAPE, complex), sim.probe.astype(complex), np.zeros((1, 2)))
    assert first.before == pytest.approx(bare, rel=1e-4)
    assert first.overlap == 0
    assert first.after < first.before
    assert all(one.after < one.before and 0 < one.overlap <= 1 for one in others)
    (same,) = mosaic.add([shots_of(sim)[4]])
    assert same.overlap > 0.95
    assert same.before < others[3].before


# --- an image of the sample --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [1, 2])
def test_the_mosaic_approaches_the_truth(modes: int) -> None:
    sim = simulated(modes=modes)
    mosaic = a_mosaic(sim, halves=False)
    mosaic.add(shots_of(sim))
    once = error_of(mosaic, sim)
    for seed in range(8):
        through(mosaic.sweep(seed=seed))
    for _ in range(4):
        through(mosaic.average())
    often = error_of(mosaic, sim)
    assert once < 0.8
    assert often < 0.5 * once
    assert often < 0.2
    assert mosaic.passes == 12 * len(sim)


def test_fractions_of_a_pixel_are_worth_their_trouble() -> None:
    sim = simulated(photons=1e7)
    errors = []
    for corners in (sim.corners, np.rint(sim.corners)):
        mosaic = a_mosaic(sim, halves=False)
        mosaic.add(shots_of(replace(sim, corners=corners)))
        for seed in range(6):
            through(mosaic.sweep(seed=seed))
        errors.append(mosaic.chi2())
    assert errors[0] < 0.5 * errors[1]


def test_a_place_that_is_visited_again_becomes_better() -> None:
    sim = simulated()
    mosaic = a_mosaic(sim, halves=False)
    chi2 = []
    for _ in range(3):
        mosaic.add(shots_of(sim))
        chi2.append(mosaic.chi2())
    assert chi2[2] < chi2[1] < chi2[0]


def bits(mosaic: Mosaic) -> list[np.ndarray]:
    picture = mosaic.picture()
    assert picture is not None
    return [one for one in (picture.image, picture.light, picture.odd, picture.even, picture.probe) if one is not None]


def add_one_by_one(mosaic: Mosaic, shots: list[Shot]) -> None:
    for shot in shots:
        mosaic.add([shot])


def add_at_once(mosaic: Mosaic, shots: list[Shot]) -> None:
    mosaic.add(shots)


def add_in_random_groups(mosaic: Mosaic, shots: list[Shot]) -> None:
    random = np.random.default_rng(4)
    at = 0
    while at < len(shots):
        step = int(random.integers(1, 14))
        mosaic.add(shots[at : at + step])
        at += step


Adding = Callable[[Mosaic, list[Shot]], None]


@pytest.mark.parametrize("gain", [0.0, 0.5])
@pytest.mark.parametrize("add", [add_one_by_one, add_in_random_groups])
def test_the_same_frames_give_the_same_bits_however_they_are_grouped(add: Adding, gain: float) -> None:
    sim = simulated(7, modes=2)
    found = []
    for way in (add_at_once, add):
        mosaic = a_mosaic(sim, gain=gain)
        way(mosaic, shots_of(sim))
        through(mosaic.sweep(seed=3))
        through(mosaic.average())
        found.append(bits(mosaic))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("add", [add_one_by_one, add_in_random_groups])
def test_grouping_makes_no_difference_when_positions_are_wrong_for_a_while(add: Adding) -> None:
    """The guard of the probe goes back to an earlier one then."""
    sim = simulated(16, 3.0)
    random = np.random.default_rng(0)
    shots = shots_of(sim)
    wrong = [replace(shot, position=tuple(random.uniform(0, 45, 2))) if 120 <= shot.index < 190 else shot for shot in shots]
    found = []
    for way in (add_at_once, add):
        mosaic = a_mosaic(sim, gain=0.5)
        way(mosaic, wrong)
        found.append(bits(mosaic))
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_halves_are_what_odd_and_even_frames_alone_give_and_do_not_change_the_whole() -> None:
    sim = simulated(6)
    both, whole = a_mosaic(sim), a_mosaic(sim, halves=False)
    halves = [a_mosaic(sim, halves=False), a_mosaic(sim, halves=False)]
    for shot in shots_of(sim):
        for mosaic in (both, whole, halves[shot.index % 2]):
            mosaic.add([shot])
    picture, alone = both.picture(), whole.picture()
    assert picture is not None
    assert alone is not None
    np.testing.assert_array_equal(picture.image, alone.image)
    for half, own in zip((picture.even, picture.odd), halves, strict=True):
        single = own.picture()
        assert half is not None
        assert single is not None
        row, column = (int(a - b) for a, b in zip(single.origin, picture.origin, strict=True))
        np.testing.assert_array_equal(half[row : row + single.image.shape[0], column : column + single.image.shape[1]], single.image)
    assert alone.odd is None
    assert alone.even is None


def test_a_canvas_that_grew_holds_what_one_that_was_large_from_the_beginning_holds() -> None:
    sim = simulated(6, step=40.0)  # beyond the margin that a canvas takes at once
    shots = shots_of(sim)
    grown, large = a_mosaic(sim), a_mosaic(sim)
    large._reach([shot.position for shot in shots])
    rows, columns = large._canvases[0].light.shape
    sizes = set()
    for shot in shots:
        grown.add([shot])
        large.add([shot])
        sizes.add(grown._canvases[0].light.shape)
    assert len(sizes) > 2
    assert large._canvases[0].light.shape == (rows, columns)
    for one, other in zip(bits(grown), bits(large), strict=True):
        np.testing.assert_array_equal(one, other)
    assert grown.picture().origin == large.picture().origin  # type: ignore[union-attr]


def test_positions_may_have_any_origin_and_any_sign() -> None:
    sim = simulated(5)
    found = []
    for offset in ((0, 0), (-1000, -70), (12345, -3)):
        mosaic = a_mosaic(sim)
        mosaic.add([replace(shot, position=(shot.position[0] + offset[0], shot.position[1] + offset[1])) for shot in shots_of(sim)])
        picture = mosaic.picture()
        assert picture is not None
        found.append((picture.image, picture.origin[0] - offset[0], picture.origin[1] - offset[1]))
    for image, row, column in found[1:]:
        np.testing.assert_array_equal(image, found[0][0])
        assert (row, column) == found[0][1:]


def test_a_wild_position_does_not_fit_and_the_canvas_stays_within_its_bound() -> None:
    sim = simulated(4)
    mosaic = a_mosaic(sim, canvas_bytes=2**20)
    mosaic.add(shots_of(sim))
    assert mosaic.fits((30.0, 30.0))
    for wild in ((1e8, 0.0), (0.0, -1e8), (1e300, 5.0)):
        assert not mosaic.fits(wild)
    reached = 0.0
    while mosaic.fits((reached, 2.0)):
        mosaic.add([replace(shots_of(sim)[0], position=(reached, 2.0))])
        assert sum(canvas.image.nbytes + canvas.light.nbytes for canvas in mosaic._canvases) <= 2**20
        reached += 16
    assert reached > 100


def test_kept_frames_are_bounded_and_the_oldest_go_first() -> None:
    sim = simulated(6)
    shots = shots_of(sim)
    mosaic = a_mosaic(sim, keep_bytes=10 * shots[0].nbytes)
    for shot in shots:
        mosaic.add([shot])
        assert sum(one.nbytes for one in mosaic.kept) <= 10 * shots[0].nbytes
    assert [shot.index for shot in mosaic.kept] == list(range(26, 36))
    before = bits(mosaic)[0].copy()
    through(mosaic.sweep())
    # What the sweep does not return to stays as it is.
    np.testing.assert_array_equal(bits(mosaic)[0][:10], before[:10])
    assert mosaic.passes == 10


def test_a_frame_larger_than_the_bound_is_kept_alone() -> None:
    sim = simulated(2)
    mosaic = a_mosaic(sim, keep_bytes=10)
    mosaic.add(shots_of(sim))
    assert [shot.index for shot in mosaic.kept] == [3]


def test_polishing_goes_once_over_the_newest_frames_adds_no_light_and_begins_again_with_a_new_frame() -> None:
    sim = simulated(6)
    mosaic = a_mosaic(sim)
    shots = shots_of(sim)
    mosaic.add(shots[:-1])
    light, chi2 = bits(mosaic)[1], mosaic.chi2()
    turns = 0
    while mosaic.polish(20):
        turns += 1
    assert turns == 3  # blocks of 8
    assert mosaic.passes == 20
    assert not mosaic.polish(20)
    np.testing.assert_array_equal(bits(mosaic)[1], light)
    assert mosaic.chi2() < chi2
    mosaic.add(shots[-1:])
    assert mosaic.polish(20)


def test_a_sweep_over_the_newest_frames_does_not_spoil_the_ground_beside_them() -> None:
    """Passed again as if nothing had been known, the newest frames would overwrite what many earlier ones agree on."""
    sim = simulated(12, photons=1e4)
    older = len(sim) // 2
    mosaic = a_mosaic(sim, halves=False)
    mosaic.add(shots_of(sim, range(older)))
    for seed in range(4):
        through(mosaic.sweep(seed=seed))
    mosaic.add(shots_of(sim, range(older, len(sim))))
    light = np.zeros(sim.object.shape)
    for corner in np.rint(sim.corners[:older]).astype(int):
        light[window_at(corner, sim.probe)] += (np.abs(sim.probe) ** 2).sum(0)
    ground = well_lit(light)

    def error() -> float:
        picture = mosaic.picture()
        assert picture is not None
        whole = np.ones(sim.object.shape, np.complex64)
        row, column = picture.origin
        rows, columns = (
            min(size, limit - first) for size, limit, first in zip(picture.image.shape, whole.shape, picture.origin, strict=True)
        )
        whole[row : row + rows, column : column + columns] = picture.image[:rows, :columns]
        difference = onto(sim.object, whole, ground) - sim.object
        return float(np.sqrt(np.mean(np.abs(difference[ground]) ** 2)) / sim.object[ground].std())

    before, told = error(), mosaic.chi2()
    for seed in range(2):
        through(mosaic.sweep(seed=seed, newest=len(sim) - older))
    assert mosaic.chi2() < told
    assert error() < 1.03 * before


def test_a_sweep_in_another_order_of_the_same_seed_is_the_same_sweep() -> None:
    sim = simulated(5)
    found = []
    for seeds in ((0, 1), (0, 1), (0, 2)):
        mosaic = a_mosaic(sim)
        mosaic.add(shots_of(sim))
        for seed in seeds:
            parts = through(mosaic.sweep(seed=seed))
        assert parts[-1] == 1.0
        assert parts == sorted(parts)
        found.append(bits(mosaic)[0])
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).any()


def test_before_the_first_frame_there_is_no_picture_and_nothing_to_do() -> None:
    sim = simulated(2)
    mosaic = a_mosaic(sim, gain=0.5)
    assert mosaic.picture() is None
    assert np.isnan(mosaic.chi2())
    assert not mosaic.polish(20)
    assert mosaic.add([]) == []
    assert through(mosaic.sweep()) == []
    assert through(mosaic.average()) == []
    mosaic.close()


# --- the probe ---------------------------------------------------------------------------------------------------------------------


def test_copies_of_the_probe_within_a_pixel_are_its_fourier_shifts() -> None:
    probe = a_probe(modes=2)
    places = ProbePlaces(probe)
    assert places.per_pixel == 16
    corners, slots = places.places(np.array([[3.0, 4.0], [3.25, 4.5], [-0.25, 7.0], [2.99, 4.01]]))
    np.testing.assert_array_equal(corners, [[3, 4], [3, 4], [-1, 7], [3, 4]])
    assert slots[0] == slots[3]
    np.testing.assert_array_equal(places.probes[slots[0]], probe)
    for slot, shift in ((slots[1], (0.25, 0.5)), (slots[2], (0.75, 0.0))):
        assert_close(places.probes[slot], fourier_shift(probe.astype(complex), shift), 1e-5)
        assert_close(places.power[slot], (np.abs(fourier_shift(probe.astype(complex), shift)) ** 2).sum(0), 1e-5)


def test_a_large_probe_keeps_fewer_places_within_a_pixel() -> None:
    assert ProbePlaces(np.ones((4, 512, 512), np.complex64)).per_pixel < 16


@pytest.mark.parametrize("place", ["entry_1/instrument_1/source_1/illumination", "entry/probe/modes", "probe", "somewhere/else"])
@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_a_probe_is_found_where_programs_leave_it(place: str, dtype: type, tmp_path: Path) -> None:
    probe = a_probe(modes=2)
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file[place] = probe.astype(dtype)
    named = f"{tmp_path / 'p.h5'}::/{place}" if place == "somewhere/else" else tmp_path / "p.h5"
    found = load_probe(named, SHAPE)
    assert found.dtype == np.complex64
    np.testing.assert_array_equal(found, probe)


def test_a_probe_of_one_mode_may_be_a_plain_array(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", a_probe()[0])
    np.testing.assert_array_equal(load_probe(tmp_path / "p.npy", SHAPE), a_probe())


def refused_probe(file: Path | str) -> str:
    with pytest.raises(ConfigError) as refused:
        load_probe(file, SHAPE)
    return str(refused.value)


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.full((1, *SHAPE), np.nan, np.complex64), "finite"),
        (np.zeros((1, *SHAPE), np.complex64), "finite"),
        (np.ones(SHAPE, np.uint16), "uint16"),
        (np.ones((2, 2, *SHAPE), np.complex64), "(H, W) or (modes, H, W)"),
        (np.ones((1, 40, 32), np.complex64), "40 x 32 pixels, prepared frames are 32 x 32"),
    ],
)
def test_an_array_that_is_no_probe_is_refused_with_what_it_is(array: np.ndarray, says: str, tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", array)
    sentence = refused_probe(tmp_path / "p.npy")
    assert sentence.startswith("mosaic.probe: ")
    assert "p.npy" in sentence
    assert says in sentence


def test_a_file_that_holds_no_probe_is_refused_with_a_remedy(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["data"] = np.ones(3)
        file.create_group("probe")
    (tmp_path / "text.h5").write_text("no HDF5")
    (tmp_path / "empty.npy").touch()
    (tmp_path / "text.npy").write_text("no array")
    for name in ("absent.h5", "absent.npy", "p.h5", f"{tmp_path / 'p.h5'}::/nowhere", "text.h5", "empty.npy", "text.npy"):
        sentence = refused_probe(tmp_path / name)
        assert "cannot be read" in sentence
        assert "name a .npy file, a CXI file or FILE::/dataset" in sentence


def test_a_modelled_probe_has_the_frames_photons_in_a_spot_of_the_size_that_was_asked_for() -> None:
    q2 = ((np.arange(96) - 48) ** 2)[:, None] + (np.arange(96) - 48) ** 2
    pupil = 100.0 / (1 + np.exp((np.sqrt(q2) - 24) / 2)) / (1 + np.exp((8 - np.sqrt(q2)) / 2))
    for spot_px in (24.0, 40.0):
        probe = modelled_probe(pupil, spot_px)
        assert probe.shape == (1, 96, 96)
        power = np.abs(probe[0]) ** 2
        assert power.sum() == pytest.approx(pupil.sum(), rel=1e-4)
        assert_close(np.abs(far(probe[0])) ** 2, pupil, 1e-3)
        assert centroid(power[None]) == pytest.approx((48, 48), abs=0.01)
        assert np.sqrt((power * q2).sum() / power.sum()) == pytest.approx(spot_px / 4, rel=0.1)


def test_further_modes_begin_dim_and_with_nodes_and_fewer_are_the_first_ones() -> None:
    probe = a_probe(modes=1)
    made = with_modes(probe, 4)
    assert made.shape == (4, *SHAPE)
    np.testing.assert_array_equal(made[0], probe[0])
    powers = (np.abs(made) ** 2).sum((1, 2))
    np.testing.assert_allclose(powers[1:] / powers[0], 0.01, rtol=1e-3)
    for mode in made[1:3]:
        assert abs(np.vdot(mode, probe[0])) < 0.02 * np.linalg.norm(mode) * np.linalg.norm(probe[0])
    np.testing.assert_array_equal(with_modes(made, 2), made[:2])
    assert np.linalg.matrix_rank(made.reshape(4, -1)) == 4


def test_refinement_brings_a_wrong_probe_nearer_to_the_truth_and_holds_its_photons() -> None:
    sim = simulated(10, modes=1)
    y, x = (np.arange(n) - n // 2 for n in SHAPE)
    wrong = scaled((sim.probe * np.exp(0.02j * (y[:, None] ** 2 + x**2))).astype(np.complex64), float((np.abs(sim.probe) ** 2).sum()))

    def overlap_of(probe: np.ndarray) -> float:
        """With the truth, 0..1; a phase, a shift and a tilt are the object's as well."""
        across = np.abs(scipy.fft.ifft2(scipy.fft.fft2(probe) * scipy.fft.fft2(sim.probe[0]).conj()))
        return float(across.max() / np.linalg.norm(probe) / np.linalg.norm(sim.probe[0]))

    mosaic = a_mosaic(sim, probe=wrong, halves=False, gain=0.5)
    mosaic.add(shots_of(sim))
    for seed in range(6):
        through(mosaic.sweep(seed=seed))
    refined = mosaic.places.modes
    assert 1 - overlap_of(refined) < 0.3 * (1 - overlap_of(wrong))
    assert float((np.abs(refined) ** 2).sum()) == pytest.approx(float((np.abs(wrong) ** 2).sum()), rel=1e-5)
    stiff = a_mosaic(sim, probe=wrong, halves=False)
    stiff.add(shots_of(sim))
    for seed in range(6):
        through(stiff.sweep(seed=seed))
    assert mosaic.chi2() < 0.3 * stiff.chi2()
    np.testing.assert_array_equal(stiff.places.modes, wrong)


def test_refinement_leaves_a_right_probe_about_where_it_is() -> None:
    sim = simulated(8)
    mosaic = a_mosaic(sim, halves=False, gain=0.5)
    mosaic.add(shots_of(sim))
    for seed in range(20):
        through(mosaic.sweep(seed=seed))
    before, after = centroid(np.abs(sim.probe) ** 2), centroid(np.abs(mosaic.places.modes) ** 2)
    assert np.hypot(before[0] - after[0], before[1] - after[1]) < 0.3
    far_before, far_after = (centroid(np.abs(far(modes)) ** 2) for modes in (sim.probe, mosaic.places.modes))
    assert np.hypot(far_before[0] - far_after[0], far_before[1] - far_after[1]) < 0.3
    assert error_of(mosaic, sim) < 0.25


# --- agreement ---------------------------------------------------------------------------------------------------------------------


def lit_disc(side: int = 128) -> np.ndarray:
    y, x = np.ogrid[:side, :side]
    return (np.hypot(y - side / 2, x - side / 2) < side * 0.42).astype(np.float32)


def test_an_image_agrees_with_itself_to_the_pixel() -> None:
    image = a_sample(128, 128)
    found = agreement(image, image, lit_disc())
    # The mean, which is the innermost ring, is taken away.
    np.testing.assert_allclose(found.correlation[1:], 1, atol=1e-4)
    assert found.resolution_px == 1.0
    assert found.disagreement < 1e-4
    assert np.nanmax(np.abs(found.difference)) < 1e-4
    assert np.isnan(found.difference[0, 0])


def test_a_factor_and_a_linear_phase_between_two_images_are_taken_away() -> None:
    image = a_sample(128, 96)
    light = np.ones(image.shape, np.float32)
    y, x = np.ogrid[:128, :96]
    other = (image * 0.7 * np.exp(1j * (2.1 + 0.2 * y - 0.31 * x))).astype(np.complex64)
    found = agreement(image, other, light)
    assert found.disagreement < 2e-3
    assert found.resolution_px == 1.0
    assert np.abs(onto(image, other, light > 0) - image).max() < 2e-3


@pytest.mark.parametrize("seed", range(8))
def test_independent_noise_has_no_resolution_worth_the_name(seed: int) -> None:
    random = np.random.default_rng(seed)
    first, second = (1 + 0.1 * (random.normal(size=(128, 128)) + 1j * random.normal(size=(128, 128))) for _ in range(2))
    found = agreement(first, second, lit_disc())
    # A ring of few points may lie above half a bit by chance.
    assert np.isnan(found.resolution_px) or found.resolution_px > 8
    assert found.disagreement == pytest.approx(np.sqrt(2), rel=0.1)
    assert np.abs(found.correlation[10:]).max() < 0.3


@pytest.mark.parametrize("cut", [0.08, 0.17, 0.3])
def test_a_known_cut_off_is_found(cut: float) -> None:
    random = np.random.default_rng(5)

    def coloured() -> np.ndarray:
        return random.normal(size=(256, 256)) + 1j * random.normal(size=(256, 256))

    shared, noise = scipy.fft.fft2(coloured()), [scipy.fft.fft2(coloured()) for _ in range(2)]
    radius = np.hypot(scipy.fft.fftfreq(256)[:, None], scipy.fft.fftfreq(256))
    first, second = (10 + scipy.fft.ifft2(np.where(radius < cut, shared, own)) for own in noise)
    found = agreement(first, second, np.ones((256, 256), np.float32))
    assert found.resolution_px == pytest.approx(0.5 / cut, rel=0.1)


def test_without_light_there_is_nothing_to_agree_about() -> None:
    image = a_sample(64, 64)
    found = agreement(image, image, np.zeros((64, 64), np.float32))
    assert np.isnan(found.resolution_px)
    assert np.isnan(found.disagreement)
    assert found.frequency.size == found.correlation.size == found.threshold.size == 0
    assert np.isnan(found.difference).all()


@pytest.mark.parametrize("lit", [1, 3, 9])
def test_a_handful_of_lit_pixels_or_a_flat_image_is_answered_without_a_number(lit: int) -> None:
    light = np.zeros((40, 40), np.float32)
    light[20 : 20 + lit, 20] = 1
    found = agreement(np.ones((40, 40), np.complex64), np.ones((40, 40), np.complex64), light)
    assert np.isnan(found.disagreement)
    assert np.isnan(found.resolution_px)
