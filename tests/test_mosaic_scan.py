"""A run's results become an image: axes, late and missing positions, bad frames, units, settling, and the hand that finishes runs."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import pytest
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import build as build_twin

from streamprior.config import Axes, MosaicSettings
from streamprior.errors import ConfigError
from streamprior.mosaic.axes import TRIAL_FRAMES, oriented, trial
from streamprior.mosaic.overlap import Canvas, CpuOverlap, Overlap, Rule
from streamprior.mosaic.room import MosaicRoom
from streamprior.mosaic.scan import FIRST_FRAMES, Scan, first_probe, object_pixel_m
from streamprior.records import NOT_MEASURED, Detector, Flag, MosaicImage, Place, Positions, Result, RunEnded, RunStarted
from streamprior.sources.files import open_recording
from tests.builders import NAMES, small_prior
from tests.test_mosaic import SHAPE, Sim, a_probe, error_against, exposed, shots_of, simulated

PRIOR = small_prior(SHAPE)
HALF = np.array(SHAPE) // 2
ALL_AXES: tuple[Axes, ...] = get_args(Axes)

Settings = MosaicSettings


def overlap(modes: int) -> Overlap:
    return CpuOverlap(SHAPE, modes)


def a_run(uid: str = "run-1", detector: Detector | None = None) -> RunStarted:
    return RunStarted(uid, "eiger", "S1", 0.0, None, detector or Detector(shape=SHAPE))


def a_result(sim: Sim, index: int, position: tuple[float, float] | None, run: str = "run-1") -> Result:
    unknown = np.full((1, 1), np.nan, np.complex64)
    return Result(
        run=run,
        index=index,
        classes=np.zeros(sim.counts.shape[1:], np.uint8),
        object=unknown,
        counts=sim.counts[index % len(sim)],
        received=0.0,
        detector_time=None,
        position=position,
        origin=None,
        class_distance=0.0,
        chi2=float("nan"),
        chi2_floor=float("nan"),
        r_factor=float("nan"),
        free_llk=float("nan"),
        unit=-1,
        distance=float("nan"),
        arm="none",
        flags=int(Flag.NOT_REFINED),
    )


def places(sim: Sim, axes: Axes = "xy", edge: float = 1.0) -> list[tuple[float, float]]:
    """(x, y) that the stage reports of each frame's probe centre, in units of which a pixel has `edge`."""
    return [(float(x), float(y)) for x, y in staged(sim.corners + HALF, axes) * edge]


def staged(rows_columns: np.ndarray, axes: Axes) -> np.ndarray:
    """The inverse of `oriented`."""
    columns_rows = rows_columns[:, ::-1]
    swapped = rows_columns if axes.replace("-", "") == "yx" else columns_rows
    return swapped * [-1 if "-x" in axes else 1, -1 if "-y" in axes else 1]


def results(sim: Sim, axes: Axes = "xy", edge: float = 1.0, run: str = "run-1") -> list[Result]:
    return [a_result(sim, i, place, run) for i, place in enumerate(places(sim, axes, edge))]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def a_scan(sim: Sim, settings: MosaicSettings | None = None, probe: np.ndarray | None = None, **more: Any) -> Scan:
    return Scan(
        more.pop("run", a_run()), more.pop("prior", PRIOR), settings or Settings(), sim.probe if probe is None else probe, overlap, **more
    )


def image_of(scan: Scan) -> MosaicImage:
    snapshot = scan.snapshot()
    assert snapshot is not None
    return scan.image(snapshot, 1, False)


def error(image: MosaicImage, sim: Sim) -> float:
    origin = tuple(one / edge for one, edge in zip(image.origin, image.pixel, strict=True))
    return error_against(image.object, image.light, origin, sim.object)  # type: ignore[arg-type]


def assert_same(one: MosaicImage, other: MosaicImage) -> None:
    for name in ("object", "light", "uncertainty", "probe"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert one.origin == other.origin


# --- axes and probe on trial -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", ALL_AXES)
def test_every_orientation_is_one_of_eight_and_can_be_undone(axes: Axes) -> None:
    random = np.random.default_rng(0)
    there = random.normal(size=(5, 2))
    np.testing.assert_allclose(oriented(staged(there, axes), axes), there)
    others = [oriented(staged(there, axes), one) for one in ALL_AXES if one != axes]
    assert len(others) == 7
    assert all(np.abs(other - there).max() > 0.1 for other in others)


def test_the_words_mean_what_the_settings_say() -> None:
    stage = np.array([[3.0, 5.0]])  # x, y
    said = {"xy": (5, 3), "-xy": (5, -3), "x-y": (-5, 3), "-x-y": (-5, -3), "yx": (3, 5), "-yx": (3, -5), "y-x": (-3, 5), "-y-x": (-3, -5)}
    assert {axes: tuple(oriented(stage, axes)[0]) for axes in ALL_AXES} == said


def tried(sim: Sim, truth: Axes, used: Axes, probe: np.ndarray | None = None, refined: bool = False) -> str | None:
    stage = staged(sim.corners + HALF, truth)
    probe = sim.probe if probe is None else probe
    return trial(shots_of(sim), stage, probe, used, refined, lambda: overlap(len(probe)), Rule())


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("truth", ALL_AXES)
def test_a_wrong_orientation_is_found_and_the_right_one_named(truth: Axes, refined: bool) -> None:
    used: Axes = "xy" if truth != "xy" else "-xy"
    sentence = tried(simulated(seed=3), truth, used, refined=refined)
    assert sentence is not None
    assert "the residual rises with overlap: check the signs and the order of the positions" in sentence
    assert f"with mosaic.axes {used!r}" in sentence
    assert sentence.endswith(f"with {truth!r}")


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("photons", [1e4, 1e6])
def test_when_all_is_right_nothing_is_said(seed: int, photons: float) -> None:
    sim = simulated(seed=seed, photons=photons)
    assert tried(sim, "xy", "xy") is None
    assert tried(sim, "xy", "xy", refined=True) is None


def symmetric_probe() -> np.ndarray:
    y, x = (np.arange(n) - n // 2 for n in SHAPE)
    r2 = y[:, None] ** 2 + x**2
    spot = np.exp(-r2 / 40 + 0.06j * r2)
    return (spot * np.sqrt(1e5 / (np.abs(spot) ** 2).sum()))[None].astype(np.complex64)


@pytest.mark.parametrize("seed", range(3))
def test_where_there_is_nothing_to_see_nobody_is_accused(seed: int) -> None:
    like = simulated(seed=seed)
    for probe in (symmetric_probe(), like.probe):
        flat = exposed(np.ones_like(like.object), probe, like.corners, seed)
        assert tried(flat, "xy", "xy") is None
        assert tried(flat, "xy", "-yx") is None


@pytest.mark.parametrize("seed", range(3))
def test_a_symmetric_probe_raises_no_alarm(seed: int) -> None:
    like = simulated(seed=seed)
    assert tried(exposed(like.object, symmetric_probe(), like.corners, seed), "xy", "xy") is None


def wrong_probe(sim: Sim) -> np.ndarray:
    y, x = (np.arange(n) - n // 2 for n in SHAPE)
    return np.asarray(sim.probe * np.exp(0.08j * (y[:, None] ** 2 + x**2)), np.complex64)


def test_a_wrong_probe_is_said_to_be_one_and_not_taken_for_wrong_positions() -> None:
    sim = simulated(seed=1, photons=1e6)
    sentence = tried(sim, "xy", "xy", wrong_probe(sim))
    assert sentence is not None
    assert sentence.startswith("the probe does not fit")
    assert "mosaic.refine" in sentence


@pytest.mark.parametrize("axes", ["xy", "-xy", "yx"])
def test_the_measured_siemens_star_says_which_axes_it_has(axes: Axes, data_folder: Path) -> None:
    recorded = open_recording(data_folder / "ptycho_siemens_star.cxi", ":64")
    shape = (recorded.shape[1], recorded.shape[2])
    settings = Settings(axes=axes, refine=True, modes=2, settle=False, halves=False)
    probe = first_probe(settings, data_folder / "ptycho_siemens_star.cxi", shape)
    scan = Scan(a_run(), small_prior(shape), settings, probe, lambda modes: CpuOverlap(shape, modes))
    frames = np.array([recorded.frame(i) for i in range(TRIAL_FRAMES)], np.float32)
    sim = Sim(np.ones((1, 1)), np.ones((1, *shape)), np.zeros((TRIAL_FRAMES, 2)), frames)
    scan.take([a_result(sim, i, recorded.position(i)) for i in range(TRIAL_FRAMES)])
    doubt = scan.suspicion()
    assert doubt is not None
    sentence = doubt()
    if axes == "xy":
        assert sentence is None
    else:
        assert sentence is not None
        assert sentence.endswith("with 'xy'")


def test_the_trial_comes_once_when_its_frames_are_there() -> None:
    sim = simulated(9, seed=3)
    scan = a_scan(sim, Settings(axes="-xy"))
    scan.take(results(sim)[: TRIAL_FRAMES - 1])
    assert scan.suspicion() is None
    scan.take(results(sim)[TRIAL_FRAMES - 1 :])
    doubt = scan.suspicion()
    assert doubt is not None
    sentence = doubt()
    assert sentence is not None
    assert sentence.endswith("'xy'")
    assert scan.suspicion() is None
    scan.warn("axes", sentence)
    assert sentence in image_of(scan).warnings


def test_frames_are_not_hoarded_for_a_trial_that_nobody_asks_for() -> None:
    sim = simulated(12)
    scan = a_scan(sim)
    scan.take(results(sim))
    assert len(scan._first) <= TRIAL_FRAMES + FIRST_FRAMES


# --- positions that are late, early or never come ----------------------------------------------------------------------------------


def without_positions(sim: Sim, chosen: Sequence[int] | None = None) -> list[Result]:
    return [replace(one, position=None) if chosen is None or one.index in chosen else one for one in results(sim)]


def positions(sim: Sim, chosen: Sequence[int]) -> Positions:
    whole = places(sim)
    return Positions("eiger", "S1", {i: whole[i] for i in chosen}, "run-1")


def test_frames_that_wait_for_their_positions_become_the_same_image() -> None:
    sim = simulated(6)
    prompt, late = a_scan(sim), a_scan(sim)
    prompt.take(results(sim))
    late.take(without_positions(sim))
    assert late.snapshot() is None
    for index in range(len(sim)):
        late.locate(positions(sim, [index]))
    assert_same(image_of(late), image_of(prompt))


def test_positions_that_come_before_their_frames_are_kept_for_them() -> None:
    sim = simulated(6)
    prompt, early = a_scan(sim), a_scan(sim)
    prompt.take(results(sim))
    early.locate(positions(sim, range(len(sim))))
    early.take(without_positions(sim))
    assert_same(image_of(early), image_of(prompt))


def test_a_frame_waits_so_long_and_is_then_left_out_and_said() -> None:
    sim, clock = simulated(6), Clock()
    scan = a_scan(sim, Settings(wait_s=2.0), clock=clock)
    scan.take(without_positions(sim, [3, 20]))
    clock.now = 1.9
    scan.tick()
    scan.locate(positions(sim, [3]))
    clock.now = 2.1
    scan.tick()
    scan.locate(positions(sim, [20]))
    image = image_of(scan)
    places_of = dict(zip(image.frames.index.tolist(), image.frames.place.tolist(), strict=True))
    assert places_of[3] == Place.IN
    assert places_of[20] == Place.NO_POSITION
    assert np.isnan(image.frames.position[list(places_of).index(20)]).all()
    assert any("1 of 36 frames came without a position within 2 s" in warning for warning in image.warnings)


def test_only_so_many_frames_wait_and_the_oldest_goes_first() -> None:
    sim, clock = simulated(6), Clock()
    scan = a_scan(sim, Settings(wait_frames=5), clock=clock)
    scan.take(without_positions(sim))
    assert len(scan._waiting) == 5
    scan.locate(positions(sim, range(len(sim))))
    scan.close()
    image = image_of(scan)
    assert image.frames.index[image.frames.place == Place.IN].tolist() == [31, 32, 33, 34, 35]


def test_a_position_that_comes_again_and_again_changes_nothing_and_takes_no_room_from_those_that_are_early() -> None:
    sim = simulated(8)
    prompt, chatty = a_scan(sim), a_scan(sim, Settings(wait_frames=16))
    prompt.take(results(sim))
    for index in range(0, len(sim), 8):
        block = range(index, index + 8)
        chatty.locate(positions(sim, range(index)))
        chatty.locate(positions(sim, block))
        chatty.take(without_positions(sim)[index : index + 8])
    assert_same(image_of(chatty), image_of(prompt))
    assert len(chatty._early) <= 16


def test_a_frame_that_is_handed_over_twice_counts_once() -> None:
    sim = simulated(6)
    once, twice = a_scan(sim), a_scan(sim)
    once.take(results(sim))
    for one in results(sim):
        twice.take([one, one])
    twice.take(results(sim)[10:20])
    assert_same(image_of(twice), image_of(once))
    assert image_of(twice).frames.index.tolist() == list(range(36))


def test_a_run_whose_positions_never_come_has_no_image_and_counts_its_frames() -> None:
    sim = simulated(4)
    scan = a_scan(sim)
    scan.take(without_positions(sim))
    scan.close()
    assert scan.snapshot() is None
    assert list(scan.finish()) == []
    assert not scan.polish()
    scan.release()


# --- frames that are no good -------------------------------------------------------------------------------------------------------


def not_measured(one: Result) -> Result:
    """What the crew makes of a frame of NaN, or of one at the dtype's maximum throughout."""
    return replace(
        one, counts=np.zeros_like(one.counts), classes=np.full_like(one.classes, NOT_MEASURED), flags=int(Flag.NONFINITE | Flag.EMPTY)
    )


def dark(one: Result) -> Result:
    return replace(one, counts=one.counts * np.float32(1e-3))


def astray(one: Result) -> Result:
    return replace(one, position=(1e8, -3e7))


def strange(one: Result) -> Result:
    return replace(one, iou={"core": 0.01, "ring": 0.02, "background": float("nan")})


SPOILED: dict[str, tuple[Callable[[Result], Result], Sequence[int], Place]] = {
    "a NaN frame": (not_measured, [30], Place.OUTLIER),
    "a failed readout at once": (not_measured, [0], Place.OUTLIER),
    "a beam dump": (dark, range(25, 45), Place.NO_BEAM),
    "a wild position": (astray, [40], Place.OUTSIDE),
    "a wild position among the first": (astray, [3], Place.OUTSIDE),
    "a wild position first of all": (astray, [0], Place.OUTSIDE),
    "another sample's frame": (strange, [20, 21], Place.OUTLIER),
    "a tenth without position": (lambda one: replace(one, position=None), range(5, 64, 10), Place.NO_POSITION),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_bad_frame_is_left_out_counted_and_said_and_the_image_is_that_of_the_others(case: str) -> None:
    spoil, chosen, place = SPOILED[case]
    sim = simulated(8)
    good = [one for one in results(sim) if one.index not in chosen]
    mixed = [spoil(one) if one.index in chosen else one for one in results(sim)]
    clean, spoiled, at_once = a_scan(sim), a_scan(sim), a_scan(sim)
    for scan, handed in ((clean, good), (spoiled, mixed)):
        for result in handed:
            scan.take([result])
        scan.close()
    at_once.take(mixed)
    at_once.close()
    one, other, third = image_of(clean), image_of(spoiled), image_of(at_once)
    assert_same(one, other)
    assert_same(one, third)
    np.testing.assert_array_equal(other.frames.index, third.frames.index)
    assert other.warnings == third.warnings
    assert sorted(other.frames.index[other.frames.place == place].tolist()) == list(chosen)
    assert sorted(other.frames.index.tolist()) == list(range(64))
    assert len(other.warnings) == 1
    assert f"{len(chosen)} of" in other.warnings[0]
    assert not one.warnings


def test_an_image_with_a_tenth_of_its_frames_missing_is_about_as_right() -> None:
    sim = simulated(12)
    errors = []
    for every in (10**6, 10):
        scan = a_scan(sim)
        scan.take([one for one in results(sim) if (one.index + 5) % every])
        scan.close()
        for _ in scan.finish():
            pass
        errors.append(error(image_of(scan), sim))
    assert errors[1] < errors[0] + 0.02


def test_a_wild_position_does_not_make_the_trial_of_the_axes_large() -> None:
    sim, sides = simulated(9), []

    class Measured(CpuOverlap):
        def canvas(self, rows: int, columns: int) -> Canvas:
            sides.append(max(rows, columns))
            return super().canvas(rows, columns)

    scan = Scan(a_run(), PRIOR, Settings(canvas_mb=2), sim.probe, lambda modes: Measured(SHAPE, modes))
    mixed = [replace(one, position=(6000.0, 0.0)) if one.index == 2 else one for one in results(sim)]
    scan.take(mixed)
    doubt = scan.suspicion()
    assert doubt is not None
    assert doubt() is None
    assert max(sides) < 1000


def test_two_wild_positions_handed_over_together_keep_the_canvas_within_its_bound() -> None:
    sim = simulated(4)
    settings = Settings(canvas_mb=1)
    found = []
    for together in (True, False):
        scan = a_scan(sim, settings)
        scan.take(results(sim))
        far = [a_result(sim, 100 + i, place) for i, place in enumerate(((300.0, 20.0), (20.0, 300.0), (-300.0, 20.0), (20.0, -300.0)))]
        for group in [far] if together else [[one] for one in far]:
            scan.take(group)
        assert scan._mosaic is not None
        assert sum(canvas.image.nbytes + canvas.light.nbytes for canvas in scan._mosaic._canvases) <= 2**20
        found.append(image_of(scan))
    assert_same(*found)
    assert found[0].frames.place.tolist() == found[1].frames.place.tolist()
    assert (found[0].frames.place == Place.OUTSIDE).any()


@pytest.mark.parametrize("case", ["a readout that is far too bright", "a shutter that opens late"])
def test_frames_of_a_quite_different_dose_do_not_spoil_the_image(case: str) -> None:
    sim = simulated(9)
    random = np.random.default_rng(5)
    errors = []
    for spoil in (False, True):
        scan = a_scan(sim)
        for one in results(sim):
            if spoil and case.startswith("a readout") and one.index == 40:
                one = replace(one, counts=np.full(SHAPE, 1e4, np.float32))
            if spoil and case.startswith("a shutter") and one.index < 12:
                one = replace(one, counts=random.poisson(0.02, SHAPE).astype(np.float32))
            scan.take([one])
        for _ in scan.finish():
            pass
        errors.append(error(image_of(scan), sim))
    assert errors[1] < 2 * errors[0]


def test_frames_after_a_change_of_dose_are_taken_again_once_they_are_usual() -> None:
    sim = simulated(8)
    scan = a_scan(sim, Settings(least_flux=0.5))
    scan.take([replace(one, counts=one.counts * np.float32(0.6 if one.index > 30 else 1.0)) for one in results(sim)])
    assert (image_of(scan).frames.place == Place.IN).all()


def test_pixels_that_are_not_measured_are_left_free() -> None:
    sim = simulated(8)
    errors = []
    for name in ("whole", "named", "unnamed"):
        scan = a_scan(sim)
        for one in results(sim):
            counts, classes = one.counts.copy(), one.classes.copy()
            if name != "whole":
                counts[14:16, 17:20] = 0
            if name == "named":
                classes[14:16, 17:20] = NOT_MEASURED
            scan.take([replace(one, counts=counts, classes=classes)])
        for _ in scan.finish():
            pass
        errors.append(error(image_of(scan), sim))
    assert errors[1] < 1.3 * errors[0]
    assert errors[2] > 1.5 * errors[1]


# --- the image ---------------------------------------------------------------------------------------------------------------------


def hand_over(scan: Scan, handed: list[Result], way: str) -> None:
    random = np.random.default_rng(7)
    at = 0
    while at < len(handed):
        step = {"one by one": 1, "at once": len(handed), "random": int(random.integers(1, 20))}[way]
        scan.take(handed[at : at + step])
        at += step


@pytest.mark.parametrize(
    "settings",
    [Settings(), Settings(settle=False), Settings(refine=True, modes=2), Settings(refine=True, probe="frames", spot_px=12.0)],
    ids=["settled", "unsettled", "refined", "modelled"],
)
@pytest.mark.parametrize("photons", [1.0, 1e9], ids=["as given", "probe in other units"])
def test_settling_and_the_probes_scale_do_not_depend_on_how_frames_are_handed_over(settings: MosaicSettings, photons: float) -> None:
    sim = simulated(9)
    # Frames become brighter, so that it would show which of them the probe is scaled by.
    handed = [replace(one, counts=one.counts * np.float32(1 + 0.05 * one.index)) for one in results(sim)]
    found = []
    for way in ("one by one", "at once", "random"):
        scan = a_scan(sim, settings, np.asarray(sim.probe * np.sqrt(photons), np.complex64))
        if settings.probe == "frames":
            scan._probe = None
        hand_over(scan, handed, way)
        scan.close()
        for _ in scan.finish():
            pass
        found.append(image_of(scan))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_settling_makes_the_image_of_few_frames_better() -> None:
    sim = simulated(8)
    errors = []
    for settle in (True, False):
        scan = a_scan(sim, Settings(settle=settle))
        scan.take(results(sim))
        errors.append(error(image_of(scan), sim))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("axes", ALL_AXES)
def test_the_image_is_the_same_whatever_the_stages_axes_are_called(axes: Axes) -> None:
    sim = simulated(6)
    plain, other = a_scan(sim), a_scan(sim, Settings(axes=axes))
    plain.take(results(sim))
    other.take(results(sim, axes))
    assert_same(image_of(plain), image_of(other))


METRES = Detector(shape=SHAPE, pixel_m=75e-6, distance_m=2.0, energy_ev=8000.0)


def test_positions_in_metres_and_in_pixels_make_one_image() -> None:
    sim = simulated(6)
    edge_m = 1.239841984e-6 / 8000 * 2.0 / (32 * 75e-6)
    assert object_pixel_m(METRES, PRIOR) == pytest.approx((edge_m, edge_m))
    by_pixels, by_geometry, by_settings = a_scan(sim), a_scan(sim, run=a_run(detector=METRES)), a_scan(sim, Settings(pixel_nm=edge_m * 1e9))
    by_pixels.take(results(sim))
    by_geometry.take(results(sim, edge=edge_m))
    by_settings.take(results(sim, edge=edge_m))
    pixels, *metres = (image_of(scan) for scan in (by_pixels, by_geometry, by_settings))
    assert pixels.unit == "px"
    assert pixels.pixel == (1.0, 1.0)
    for image in metres:
        assert image.unit == "m"
        np.testing.assert_array_equal(image.object, pixels.object)
        assert image.origin == pytest.approx([one * edge_m for one in pixels.origin])
        assert image.pixel == pytest.approx((edge_m, edge_m))
        np.testing.assert_allclose(image.frames.position, pixels.frames.position * edge_m)
        if np.isfinite(pixels.resolution):
            assert image.resolution == pytest.approx(pixels.resolution * edge_m)


def test_the_table_tells_where_each_frames_probe_was() -> None:
    sim = simulated(6)
    scan = a_scan(sim)
    scan.take(results(sim))
    frames = image_of(scan).frames
    np.testing.assert_allclose(frames.position, sim.corners + HALF)
    np.testing.assert_array_equal(frames.index, range(36))
    assert np.isfinite(frames.before).all()
    assert (frames.after <= frames.before).all()
    assert frames.overlap[0] == 0
    assert frames.overlap[20:].mean() > 0.3


def test_gold_balls_lie_where_they_truly_lie() -> None:
    twin = build_twin(load_scenario("gold_balls", {"frames": 81, "sample.scan": "raster", "sample.subpixel": True}))
    truth = twin.scan()
    assert truth is not None
    shape = (104, 104)
    detector = twin.detector()
    scan = Scan(a_run(detector=detector), small_prior(shape), Settings(halves=False), truth.probe, lambda modes: CpuOverlap(shape, modes))
    sim = Sim(truth.object, truth.probe, truth.corners, np.array([twin.frame(i) for i in range(81)], np.float32))
    scan.take([a_result(sim, i, twin.position(i)) for i in range(81)])
    for _ in scan.finish():
        pass
    image = image_of(scan)
    assert image.pixel == pytest.approx(truth.pixel_m, rel=1e-3)
    # Pixel by pixel, by physical coordinates from the truth's first pixel.
    rows, columns = (
        np.rint((image.origin[a] + image.pixel[a] * np.arange(image.object.shape[a])) / truth.pixel_m[a]).astype(int) for a in (0, 1)
    )
    inside = np.ix_((rows >= 0) & (rows < truth.object.shape[0]), (columns >= 0) & (columns < truth.object.shape[1]))
    found, light = image.object[inside], image.light[inside]
    wanted = truth.object[
        np.ix_(rows[(rows >= 0) & (rows < truth.object.shape[0])], columns[(columns >= 0) & (columns < truth.object.shape[1])])
    ]
    lit = light > 0.5 * light.max()
    assert lit.sum() > 500

    def likeness(down: int, across: int) -> float:
        shifted = np.roll(wanted, (down, across), (0, 1))
        a, b = found[lit] - found[lit].mean(), shifted[lit] - shifted[lit].mean()
        return float(np.abs(np.vdot(a, b)) / np.linalg.norm(a) / np.linalg.norm(b))

    alike = {(down, across): likeness(down, across) for down in range(-3, 4) for across in range(-3, 4)}
    best = max(alike, key=lambda at: alike[at])
    assert best == (0, 0)
    assert alike[best] > 0.9


def test_a_class_that_is_not_trusted_loses_its_word_and_full_trust_changes_nothing() -> None:
    sim = simulated(6)
    classed = [replace(one, classes=np.asarray(np.indices(SHAPE)[0] // 12, np.uint8)) for one in results(sim)]
    found = []
    for trust in ({}, {name: 1.0 for name in NAMES}, {"background": 0.0}):
        scan = a_scan(sim, Settings(trust=trust))
        scan.take(classed)
        found.append(image_of(scan))
    assert_same(found[0], found[1])
    assert (found[2].object != found[0].object).any()
    # The counts of a class without trust may be anything.
    lies = [replace(one, counts=np.where(one.classes == 2, one.counts + 3, one.counts).astype(np.float32)) for one in classed]
    scan = a_scan(sim, Settings(trust={"background": 0.0}))
    scan.take(lies)
    np.testing.assert_allclose(image_of(scan).object, found[2].object, atol=2e-3)


@pytest.mark.parametrize("frames", [1, FIRST_FRAMES - 1, FIRST_FRAMES])
def test_a_run_of_few_frames_still_has_an_image(frames: int) -> None:
    sim = simulated(4)
    scan = a_scan(sim)
    scan.take(results(sim)[:frames])
    scan.close()
    for _ in scan.finish():
        pass
    image = image_of(scan)
    assert image.frames.index.tolist() == list(range(frames))
    assert np.isfinite(image.object).all()


def test_a_run_without_any_frame_has_none() -> None:
    scan = a_scan(simulated(2))
    scan.close()
    assert scan.snapshot() is None
    assert not scan.polish()
    assert list(scan.finish()) == []


def test_without_halves_uncertainty_and_resolution_are_not_known() -> None:
    sim = simulated(6)
    scan = a_scan(sim, Settings(halves=False))
    scan.take(results(sim))
    image = image_of(scan)
    assert np.isnan(image.uncertainty).all()
    assert np.isnan([image.resolution, image.disagreement]).all()
    assert image.frequency.size == image.correlation.size == image.threshold.size == 0


def test_uncertainty_is_half_of_what_the_halves_differ_by_and_about_the_true_error() -> None:
    sim = simulated(12, step=3.0)
    scan = a_scan(sim)
    scan.take(results(sim))
    for _ in scan.finish():
        pass
    image = image_of(scan)
    rows, columns = (int(one) for one in image.origin)
    lit = image.light > 0.6 * image.light.max()
    truth = np.pad(sim.object, 64, constant_values=1)[rows + 64 : rows + 64 + lit.shape[0], columns + 64 : columns + 64 + lit.shape[1]]
    phase = np.vdot(image.object[lit], truth[lit])
    off = np.abs(image.object * phase / abs(phase) - truth)[lit]
    assert 0.3 < np.median(image.uncertainty[lit]) / np.median(off) < 3


def test_the_probe_of_a_file_source_is_its_own_unless_the_settings_name_one(tmp_path: Path) -> None:
    probe = a_probe(modes=2)
    with h5py.File(tmp_path / "scan.cxi", "w") as file:
        file["entry_1/instrument_1/source_1/illumination"] = probe
        file["entry_1/instrument_1/detector_1/data"] = np.ones((3, *SHAPE), np.float32)
    np.save(tmp_path / "other.npy", a_probe())
    own = tmp_path / "scan.cxi"
    np.testing.assert_array_equal(first_probe(Settings(), own, SHAPE), probe)  # type: ignore[arg-type]
    np.testing.assert_array_equal(first_probe(Settings(probe=tmp_path / "other.npy"), own, SHAPE), a_probe())  # type: ignore[arg-type]
    assert first_probe(Settings(probe="frames", refine=True), own, SHAPE) is None
    # The stack that the source picks is not its illumination.
    named = Path(f"{own}::/entry_1/instrument_1/detector_1/data")
    np.testing.assert_array_equal(first_probe(Settings(), named, SHAPE), probe)  # type: ignore[arg-type]


def test_frames_are_not_taken_for_a_probe(tmp_path: Path) -> None:
    np.save(tmp_path / "frames.npy", np.ones((5, *SHAPE), np.float32))
    tiffs = tmp_path / "tiffs"
    tiffs.mkdir()
    for own in (tmp_path / "frames.npy", tiffs, None):
        with pytest.raises(ConfigError, match=r"mosaic\.probe: "):
            first_probe(Settings(), own, SHAPE)


def test_more_modes_than_the_file_holds_need_refinement(tmp_path: Path) -> None:
    np.save(tmp_path / "p.npy", a_probe())
    with pytest.raises(ConfigError, match=r"holds 1 and 3 are asked for.*mosaic\.refine: true"):
        first_probe(Settings(probe=tmp_path / "p.npy", modes=3), None, SHAPE)
    assert first_probe(Settings(probe=tmp_path / "p.npy", modes=3, refine=True), None, SHAPE) is not None


# --- the room and its hand ---------------------------------------------------------------------------------------------------------


class Shown:
    """Keeps the images that are published."""

    def __init__(self) -> None:
        self.images: list[MosaicImage] = []
        self.news = threading.Condition()

    def __call__(self, image: MosaicImage) -> None:
        with self.news:
            self.images.append(image)
            self.news.notify_all()

    def wait_for(self, true: Callable[[list[MosaicImage]], bool], timeout_s: float = 20.0) -> None:
        with self.news:
            assert self.news.wait_for(lambda: true(self.images), timeout_s)

    def final(self, run: str = "run-1") -> MosaicImage:
        (image,) = [one for one in self.images if one.run == run and one.final]
        return image


@contextmanager
def room(sim: Sim, settings: MosaicSettings | None = None, **more: Any) -> Iterator[tuple[MosaicRoom, Shown]]:
    shown = Shown()
    made = MosaicRoom(
        PRIOR, settings or Settings(polish=False), sim.probe, more.pop("overlap", overlap), more.pop("publish", shown), **more
    )
    made.open()
    try:
        yield made, shown
    finally:
        made._closing.set()
        if made._hand is not None:
            made._hand.join(20)


def ended(uid: str = "run-1", reason: str = "end") -> RunEnded:
    return RunEnded(uid, reason, 0.0)


def test_a_run_ends_with_one_final_image_after_its_passes() -> None:
    sim = simulated(6)
    with room(sim) as (made, shown):
        made.begin(a_run())
        made.write(results(sim))
        shown.wait_for(lambda images: len(images) > 0)
        made.end(ended())
        made.close()
    final = shown.final()
    assert final is shown.images[-1]
    # Two settlings of two sweeps (at 16 and 32 frames), then eleven passes over all.
    assert final.passes == 2 * 16 + 2 * 32 + 11 * 36
    assert [image.serial for image in shown.images] == list(range(1, len(shown.images) + 1))
    scan = a_scan(sim)
    scan.take(results(sim))
    for _ in scan.finish():
        pass
    assert_same(final, image_of(scan))


def test_two_runs_back_to_back_each_have_their_image() -> None:
    first, second = simulated(6), simulated(5, seed=2)
    with room(first) as (made, shown):
        made.begin(a_run("run-1"))
        made.write(results(first, run="run-1"))
        made.end(ended("run-1"))
        made.begin(a_run("run-2"))
        for one in results(second, run="run-2"):
            made.write([one])
        made.end(ended("run-2"))
        made.close()
    for sim, uid in ((first, "run-1"), (second, "run-2")):
        scan = a_scan(sim, probe=first.probe)
        scan.take(results(sim))
        for _ in scan.finish():
            pass
        assert_same(shown.final(uid), image_of(scan))


def test_a_run_without_frames_has_no_image_and_the_next_one_has() -> None:
    sim = simulated(4)
    with room(sim) as (made, shown):
        made.begin(a_run("run-1"))
        made.end(ended("run-1"))
        made.begin(a_run("run-2"))
        made.write(results(sim, run="run-2"))
        made.end(ended("run-2"))
        made.close()
    assert {image.run for image in shown.images} == {"run-2"}
    assert shown.final("run-2").frames.index.size == 16


@pytest.mark.parametrize("hurry", [True, False])
def test_a_shutdown_leaves_the_last_passes_undone_and_still_shows_what_there_is(hurry: bool) -> None:
    sim = simulated(6)
    with room(sim, hurry=lambda: hurry) as (made, shown):
        made.begin(a_run())
        made.write(results(sim))
        made.end(ended(reason="end" if hurry else "shutdown"))
        made.close()
    assert shown.final().passes == 2 * 16 + 2 * 32
    assert shown.final().frames.index.size == 36


def test_late_positions_reach_a_run_in_the_room() -> None:
    sim = simulated(6)
    with room(sim) as (made, shown):
        made.begin(a_run())
        made.write(without_positions(sim))
        made.note(positions(sim, range(20)))
        made.note(replace(positions(sim, range(20, 36)), run="another"))
        made.end(ended())
        made.note(positions(sim, range(20, 36)))
        made.close()
    frames = shown.final().frames
    assert (frames.place == Place.IN).sum() == 20
    assert (frames.place == Place.NO_POSITION).sum() == 16


def test_while_no_frame_comes_the_image_is_polished() -> None:
    sim = simulated(6)
    with room(sim, Settings(live_hz=10.0)) as (made, shown):
        made.begin(a_run())
        made.write(results(sim))
        shown.wait_for(lambda images: bool(images) and images[-1].passes == 2 * 16 + 2 * 32 + 36)
        made.end(ended(reason="shutdown"))
        made.close()


@pytest.mark.parametrize("patience", ["wait for an image", "end at once"])
def test_wrong_axes_are_said_however_fast_the_run_was(patience: str) -> None:
    sim = simulated(8, seed=3)
    with room(sim, Settings(polish=False, axes="-xy", finish=1)) as (made, shown):
        made.begin(a_run())
        made.write(results(sim))
        if patience != "end at once":
            shown.wait_for(lambda images: bool(images) and bool(images[-1].warnings))
        made.end(ended())
        made.close()
    assert any("check the signs" in warning for warning in shown.final().warnings)


def test_a_failure_of_the_hand_ends_the_path_at_the_next_frame_and_at_the_end() -> None:
    sim = simulated(4)

    def broken(image: MosaicImage) -> None:
        raise ArithmeticError("no image today")

    with room(sim, publish=broken) as (made, _):
        made.begin(a_run())
        made.write(results(sim))
        deadline = time.monotonic() + 20
        while made.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="the mosaic's hand failed"):
            made.write(results(sim)[:1])
        with pytest.raises(RuntimeError, match="the mosaic's hand failed") as failed:
            made.close()
        assert isinstance(failed.value.__cause__, ArithmeticError)


def test_a_room_that_is_closed_in_mid_run_shows_what_there_is() -> None:
    sim = simulated(4)
    with room(sim) as (made, shown):
        made.begin(a_run())
        made.write(results(sim))
        made.close()
    assert shown.final().frames.index.size == 16


def test_results_of_a_run_that_never_began_are_passed_over() -> None:
    sim = simulated(3)
    with room(sim) as (made, shown):
        made.write(results(sim))
        made.end(ended())
        made.note(positions(sim, [1]))
        made.close()
    assert not shown.images


def test_many_short_runs_come_and_go_while_others_are_finished() -> None:
    sim = simulated(3)
    with room(sim, Settings(polish=False, finish=2)) as (made, shown):
        for number in range(40):
            made.begin(a_run(f"run-{number}"))
            for one in results(sim, run=f"run-{number}"):
                made.write([one])
            made.end(ended(f"run-{number}"))
        made.close()
    # Not in order: the passes of an older run are cut short where younger ones wait.
    assert sorted(image.run for image in shown.images if image.final) == sorted(f"run-{number}" for number in range(40))
    assert not made._jobs
