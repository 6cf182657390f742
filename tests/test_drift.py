"""The drift watch: mask numbers beside an obvious version, alarms that follow what happened, and quiet where nothing did."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from streamprior.config import DriftSettings, PrepareSettings, RefineSettings
from streamprior.crew import think
from streamprior.prior import Geometry, Prior
from streamprior.records import NOT_MEASURED, Flag, Result
from streamprior.stages.drift import DriftWatch, MaskNumbers, mask_numbers, measured_here, signals
from streamprior.stages.recipe import Recipe
from tests.builders import NAMES, diffraction, make_frame, make_run, small_prior

SHAPE = (32, 32)


def make_result(classes: np.ndarray | None = None, counts: np.ndarray | None = None, **changes: Any) -> Result:
    given: dict[str, Any] = dict.fromkeys(("r_factor", "free_llk", "distance"), float("nan"))
    given |= {"chi2": 0.1, "chi2_floor": 1.0, "class_distance": 1.0, "unit": -1, "arm": "flat", "flags": 0, "received": 0.0}
    given |= dict.fromkeys(("detector_time", "position", "origin")) | {"index": 0}
    return Result(
        run="run-1",
        classes=np.zeros(SHAPE, np.uint8) if classes is None else classes,
        object=np.zeros((2, 2), np.complex64),
        counts=np.full(SHAPE, 5, np.float32) if counts is None else counts,
        **(given | changes),
    )


def watching(prior: Prior | None = None, **settings: Any) -> DriftWatch:
    watch = DriftWatch(prior or small_prior(), **settings)
    watch.begin(make_run())
    return watch


def seen(watch: DriftWatch, result: Result) -> Result:
    (one,) = watch([result])
    return one


def one(numbers: MaskNumbers) -> MaskNumbers:
    """Those of the first map alone."""
    return MaskNumbers(*(getattr(numbers, field.name)[0] for field in fields(numbers)))


def random_map(seed: int, bad: float = 0.1) -> np.ndarray:
    random = np.random.default_rng(seed)
    ids = random.integers(0, 3, SHAPE).astype(np.uint8)
    ids[random.random(SHAPE) < bad] = NOT_MEASURED
    return ids


def iou(one: np.ndarray, other: np.ndarray, k: int) -> float:
    both = (one != NOT_MEASURED) & (other != NOT_MEASURED)
    either = ((one == k) | (other == k)) & both
    return float(((one == k) & (other == k) & both).sum() / either.sum()) if either.any() else float("nan")


@pytest.mark.parametrize("seed", range(4))
def test_mask_numbers_are_those_of_the_obvious_version(seed: int) -> None:
    ids, reference, previous = (random_map(10 * seed + n) for n in range(3))
    counts = np.random.default_rng(seed).gamma(2, 3, SHAPE).astype(np.float32)
    numbers = one(mask_numbers(ids[None], counts[None], reference, previous, 3))
    measured = ids != NOT_MEASURED
    np.testing.assert_allclose(numbers.iou, [iou(ids, reference, k) for k in range(3)])
    np.testing.assert_allclose(numbers.iou_previous, [iou(ids, previous, k) for k in range(3)])
    np.testing.assert_allclose(numbers.fraction, [(ids == k).sum() / measured.sum() for k in range(3)])
    np.testing.assert_allclose(numbers.flux, counts[measured].mean(), rtol=1e-6)
    np.testing.assert_allclose([numbers.centre_row, numbers.centre_column], np.argwhere(ids == 0).mean(0))


def test_a_class_in_neither_map_has_no_iou_and_one_in_one_map_has_zero() -> None:
    ids, reference = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    reference[0, 0] = 1
    numbers = one(mask_numbers(ids[None], np.ones((1, *SHAPE), np.float32), reference, ids, 3))
    assert numbers.iou[0] == pytest.approx(1 - 1 / 1024)
    assert numbers.iou[1] == 0
    assert np.isnan(numbers.iou[2])
    assert numbers.iou_previous[0] == 1


def test_a_frame_without_a_measured_pixel_has_no_numbers_and_no_flux() -> None:
    nothing = np.full(SHAPE, NOT_MEASURED, np.uint8)
    numbers = one(mask_numbers(nothing[None], np.zeros((1, *SHAPE), np.float32), np.zeros(SHAPE, np.uint8), nothing, 3))
    assert np.isnan(numbers.iou).all()
    assert np.isnan([numbers.centre_row, numbers.centre_column]).all()
    assert numbers.flux == 0


def test_each_frame_is_compared_with_the_one_before_and_a_new_run_starts_anew() -> None:
    first, second = random_map(1, bad=0), random_map(2, bad=0)
    watch = watching()
    assert seen(watch, make_result(first)).iou_previous == {name: 1.0 for name in NAMES}, "the first has none before it"
    assert seen(watch, make_result(second)).iou_previous == {name: iou(second, first, k) for k, name in enumerate(NAMES)}
    assert seen(watch, make_result(second)).iou_previous["core"] == 1
    watch.begin(make_run("run-2"))
    assert seen(watch, make_result(first)).iou_previous["core"] == 1


def test_results_that_come_together_are_judged_as_if_they_came_one_by_one() -> None:
    chi2 = [0.1, 0.9, 0.9, 0.9, float("nan"), 0.1, 0.9, 0.1, 0.1, 0.1, 0.1]
    results = [make_result(random_map(n), chi2=value, index=n) for n, value in enumerate(chi2)]
    single, several = watching(), watching()
    apart = [seen(single, result) for result in results]
    together = several(results[:4]) + several(results[4:])
    assert [result.alarms for result in together] == [result.alarms for result in apart]
    assert any(result.alarms for result in apart)
    for a, b in zip(apart, together, strict=True):
        np.testing.assert_equal([a.iou, a.iou_previous, a.drift, a.score], [b.iou, b.iou_previous, b.drift, b.score])


def test_what_the_stage_names_is_what_it_fills_in() -> None:
    result = seen(watching(), make_result(random_map(3)))
    assert tuple(result.drift) == measured_here(NAMES)
    assert set(result.score) == set(signals(NAMES))
    assert tuple(result.iou) == NAMES


def test_scores_are_deviations_from_the_baseline_in_its_standard_deviations() -> None:
    prior = small_prior(baselines={"flux": (4.0, 0.5), "chi2_over_floor": (0.1, 0.02), "class_distance": (1.0, 0.0)})
    score = seen(watching(prior), make_result(chi2=0.16, class_distance=1.0)).score
    assert score["flux"] == pytest.approx(2)
    assert score["chi2"] == pytest.approx(3)
    assert score["class_distance"] == 0, "no spread, no deviation"
    assert np.isnan(score["centre_row"]), "no baseline"
    assert np.isfinite(seen(watching(prior), make_result(class_distance=1.1)).score["class_distance"])


def alarms(watch: DriftWatch, chi2: list[float], signal: str = "chi2") -> str:
    """ "1" for each frame with the alarm on, "0" without."""
    return "".join(str(int(signal in seen(watch, make_result(chi2=value)).alarms)) for value in chi2)


GOOD, BAD, UNDEFINED = 0.1, 0.9, float("nan")


@pytest.mark.parametrize(
    ("patience", "chi2", "expected"),
    [
        (3, [BAD] * 5, "00111"),
        (1, [BAD, GOOD, BAD], "101"),
        (3, [BAD] * 4 + [GOOD] * 5, "001111000"),
        (3, [BAD] * 20 + [GOOD] * 4, "00" + "1" * 20 + "00"),
        (3, [BAD] * 3 + [GOOD, GOOD, BAD] * 2, "001111111"),
        (3, [BAD, BAD, GOOD] * 4, "0" * 12),
        (2, [BAD, UNDEFINED, BAD, UNDEFINED, GOOD, UNDEFINED, GOOD], "0011110"),
        (3, [UNDEFINED] * 6, "000000"),
    ],
)
def test_an_alarm_goes_on_and_off_after_patience_frames_in_a_row(patience: int, chi2: list[float], expected: str) -> None:
    assert alarms(watching(patience=patience), chi2) == expected


def test_the_limit_counts_on_both_sides() -> None:
    watch = watching(limit=5.0, patience=1)
    flux = [5 + 4.9, 5 + 5.1, 5 - 4.9, 5 - 5.0001]
    beyond = ["flux" in seen(watch, make_result(counts=np.full(SHAPE, value, np.float32))).alarms for value in flux]
    assert beyond == [False, True, False, True]


def test_a_new_run_starts_without_alarms() -> None:
    watch = watching(patience=2)
    assert alarms(watch, [BAD] * 3) == "011"
    watch.begin(make_run("run-2"))
    assert alarms(watch, [BAD] * 2) == "01"


def test_an_empty_frame_raises_nothing_and_changes_no_alarm() -> None:
    watch = watching(patience=2)
    empty = make_result(counts=np.zeros(SHAPE, np.float32), chi2=float("nan"), flags=int(Flag.EMPTY))
    assert [seen(watch, empty).alarms for _ in range(10)] == [()] * 10
    assert alarms(watch, [BAD] * 3) == "011"
    assert seen(watch, empty).alarms == ()
    assert alarms(watch, [BAD]) == "1", "the alarm that was on is still on"


# The twin's frames, classified with a prior that is grown on its quiet stretch.


@pytest.fixture(scope="module")
def quiet() -> tuple[Any, Prior]:
    """(changes -> twin, prior): gold balls, a faint sample whose quiet frames differ little in flux."""
    from streamprior_sim.scenario import load_scenario
    from streamprior_sim.twin import build

    from streamprior.train.grow import grow_prior
    from streamprior.train.settings import TrainSettings

    def twin(**changes: Any) -> Any:
        base = {"frames": 40, "detector.shape": [64, 64], "drift.steps": [], "drift.start_frame": 16, "drift.flux_per_frame": 0.0}
        return build(load_scenario("drift", base | changes))

    still = twin()
    frames = np.stack([still.frame(i) for i in range(40)])
    geometry = Geometry(SHAPE_TWIN, (32, 32), SHAPE_TWIN)
    return twin, grow_prior(frames, geometry, TrainSettings(classes=3, pixels=10_000, control=1, library=0, schedule="5*ER"))


SHAPE_TWIN = (64, 64)


def watched(twin: Any, prior: Prior) -> list[Result]:
    """Every frame's drift numbers; refinement is left out, so chi2 is undefined."""
    from streamprior import classify, prepare

    watch = DriftWatch(prior)
    watch.begin(make_run(shape=SHAPE_TWIN))
    results = []
    for index in range(len(twin)):
        photons = prepare(twin.frame(index), prior)
        classes = classify(photons, prior)
        flags = int(photons.flags[0])
        one = make_result(classes.ids[0], photons.counts[0], chi2=float("nan"), class_distance=float(classes.distance[0]), flags=flags)
        results.append(seen(watch, replace(one, index=index)))
    return results


def test_the_quiet_twin_raises_no_alarm(quiet: Any) -> None:
    twin, prior = quiet
    assert {alarm for result in watched(twin(), prior) for alarm in result.alarms} == set()


def test_a_flux_that_falls_by_a_percent_a_frame_raises_flux(quiet: Any) -> None:
    twin, prior = quiet
    results = watched(twin(**{"drift.flux_per_frame": -0.01}), prior)
    first = next(result.index for result in results if result.alarms)
    assert results[first].alarms == ("flux",)
    assert first > 16
    assert "flux" in results[-1].alarms
    assert results[-1].score["flux"] < -5


def test_a_beam_that_moves_by_a_pixel_raises_the_centre_of_mass(quiet: Any) -> None:
    twin, prior = quiet
    results = watched(twin(**{"drift.steps": [{"frame": 16, "centre_px": [0, 1]}]}), prior)
    assert not any(result.alarms for result in results[:16])
    assert "centre_column" in results[18].alarms, "three frames after the step"
    assert not any({"flux", "centre_row"} & set(result.alarms) for result in results)
    assert results[20].drift["centre_column"] - results[10].drift["centre_column"] == pytest.approx(1, abs=0.3)


def test_a_beam_that_is_away_leaves_empty_frames_and_no_alarm(quiet: Any) -> None:
    twin, prior = quiet
    results = watched(twin(**{"drift.steps": [{"frame": 16, "flux": 0.0}]}), prior)
    assert all(result.flags & Flag.EMPTY for result in results[16:])
    assert not any(result.alarms for result in results)


def test_chi2_is_judged_by_how_far_above_its_noise_it_lies() -> None:
    watch = watching()
    assert seen(watch, make_result(chi2=0.1, chi2_floor=1.0)).score["chi2"] == pytest.approx(0)
    assert seen(watch, make_result(chi2=0.4, chi2_floor=4.0)).score["chi2"] == pytest.approx(0)
    assert seen(watch, make_result(chi2=0.1, chi2_floor=0.5)).score["chi2"] == pytest.approx(5)


@pytest.mark.parametrize(("baseline", "score"), [((0.1, 0.05), 4.0), ((0.0, 0.0), None), (None, None)])
def test_the_distance_from_the_prototypes_is_watched_where_the_prior_knows_it(baseline: tuple[float, float] | None, score: Any) -> None:
    baselines = {"flux": (5.0, 1.0)} | ({} if baseline is None else {"distance": baseline})
    found = seen(watching(small_prior(baselines=baselines)), make_result(distance=0.3)).score["prior_distance"]
    assert np.isnan(found) if score is None else found == pytest.approx(score)
    assert np.isnan(seen(watching(small_prior(baselines=baselines)), make_result()).score["prior_distance"]), "a frame without one"


def test_a_frame_fainter_than_any_of_the_training_is_judged_by_its_flux_alone() -> None:
    prior = small_prior(
        baselines={"flux": (5.0, 0.5), "flux_least": (4.0, 0.0), "class_distance": (1.0, 0.1), "chi2_over_floor": (0.1, 0.02)}
    )
    faint = make_result(counts=np.full(SHAPE, 3, np.float32), chi2=9.0, class_distance=50.0)
    bright = make_result(counts=np.full(SHAPE, 4, np.float32), chi2=9.0, class_distance=50.0)
    watch = watching(prior, patience=1)
    assert seen(watch, faint).score["flux"] == pytest.approx(-4)
    assert seen(watch, faint).alarms == ()
    assert set(seen(watch, bright).alarms) == {"chi2", "class_distance"}


def test_chi2_is_judged_only_where_frames_go_through_what_its_baseline_was_made_with() -> None:
    prior = small_prior(baselines={"flux": (5.0, 1.0), "chi2_over_floor": (0.1, 0.001)})
    frames = [make_frame(diffraction()[0])]
    scores = {}
    for name, settings in (("default", RefineSettings()), ("other", RefineSettings(iterations=5)), ("weighed", RefineSettings(weight=0.1))):
        recipe = Recipe(prior, PrepareSettings(), settings, DriftSettings())
        (result,) = think(recipe.stages(), prior, make_run(), frames)
        (watch,) = recipe.watches()
        watch.begin(make_run())
        scores[name] = seen(watch, result).score["chi2"]
    assert abs(scores["default"]) > 5
    assert np.isnan(scores["other"])
    assert np.isnan(scores["weighed"])
