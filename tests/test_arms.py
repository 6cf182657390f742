"""Several starts of a frame: each gets its trial, the best goes on, and the cost is what the plan says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import streamprior as sp
from streamprior import arrays
from streamprior.config import RefineSettings
from streamprior.errors import ConfigError
from streamprior.records import FLAT, UNUSED, Flag, Photons, Reconstruction, Start
from streamprior.stages import planned
from streamprior.stages import refine as stage
from streamprior.stages.recipe import plan_of
from streamprior.stages.refine import Solver, refine
from streamprior.stages.schedule import Plan, parse_schedule
from tests.naive_refine import centred_box, forward

Array = npt.NDArray[Any]
SHAPE = (32, 28)
TEXT = "3*ER+SW(1.0)+5*HIO+4*ER"
PLAN = Plan(parse_schedule(TEXT), trial=6, alone=parse_schedule("7*ER+SW(2.0)+2*HIO"))


def made(number: int = 3, arms: int = 4, seed: int = 0) -> tuple[Array, Start]:
    """counts and `arms` starts a frame of made objects: random phases in supports of different sizes, the last one flat.

    Each frame has its supports in another order, so that another arm is the best.
    """
    rng = np.random.default_rng(seed)
    box = centred_box(SHAPE, 10)
    objects = box * rng.uniform(3, 9, (number, *SHAPE)) * np.exp(1j * rng.uniform(0, 2, (number, *SHAPE)))
    counts = np.stack([rng.poisson(np.abs(forward(psi)) ** 2) for psi in objects]).astype(np.float32)
    support = np.stack([[centred_box(SHAPE, 8 + 2 * ((arm + i) % arms)) for arm in range(arms)] for i in range(number)])
    phases = np.exp(1j * rng.uniform(-1, 1, support.shape))
    phases[:, -1] = 1
    psi = (support * phases * np.sqrt(counts.sum((1, 2)) / box.sum())[:, None, None, None]).astype(np.complex64)
    unit = np.broadcast_to(np.array([*range(arms - 1), FLAT], np.int32), (number, arms)).copy()
    return counts, Start(psi, support, unit, np.zeros(unit.shape, np.float32))


def solved(counts: Array, start: Start, plan: Plan = PLAN, weight: float = 0.0) -> Reconstruction:
    return Solver(SHAPE, plan, weight).solve(counts, start, np.ones(counts.shape, bool), None)


def arm_alone(counts: Array, start: Start, i: int, arm: int, text: str, weight: float = 0.0) -> Reconstruction:
    return refine(counts[i : i + 1], start.psi[i : i + 1, arm], start.support[i : i + 1, arm], schedule=text, weight=weight)


def without(start: Start, *where: tuple[int, int]) -> Start:
    unit = start.unit.copy()
    for place in where:
        unit[place] = UNUSED
    return replace(start, unit=unit)


@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_the_best_of_several_arms_is_that_arm_run_alone_bit_for_bit(weight: float) -> None:
    counts, start = made()
    found = solved(counts, start, weight=weight)
    assert len(set(found.kept.tolist())) > 1, "the frames must differ in their best arm for this to show anything"
    for i, kept in enumerate(found.kept):
        alone = arm_alone(counts, start, i, kept, f"6*ER+{TEXT}", weight)
        for name in ("psi", "support", "chi2", "r_factor", "floor"):
            np.testing.assert_array_equal(getattr(found, name)[i], getattr(alone, name)[0], err_msg=name)
        np.testing.assert_array_equal(found.history[i, :18], alone.history[0])
    assert (found.flags == 0).all()


def test_the_trial_holds_every_arms_misfit_and_the_least_is_kept() -> None:
    counts, start = made()
    found = solved(counts, start)
    assert found.trial.shape == (3, 4)
    np.testing.assert_array_equal(found.kept, found.trial.argmin(1))
    for i in range(3):
        for arm in range(4):
            assert found.trial[i, arm] == arm_alone(counts, start, i, arm, "6*ER").chi2[0]
        assert found.trial[i, found.kept[i]] == pytest.approx(found.history[i, 5], rel=1e-5)


def test_the_order_of_the_arms_makes_no_difference() -> None:
    counts, start = made()
    turned = Start(start.psi[:, ::-1], start.support[:, ::-1], start.unit[:, ::-1], start.distance[:, ::-1])
    one, other = solved(counts, start), solved(counts, turned)
    np.testing.assert_array_equal(one.psi, other.psi)
    np.testing.assert_array_equal(one.kept, 3 - other.kept)
    np.testing.assert_array_equal(one.trial, other.trial[:, ::-1])


def test_an_arm_that_is_not_used_is_passed_over() -> None:
    counts, start = made()
    best = solved(counts, start).kept
    found = solved(counts, without(start, *enumerate(best)))
    assert (found.kept != best).all()
    assert np.isnan(found.trial[range(3), best]).all()
    spoiled = start.psi.copy()
    spoiled[range(3), best] = np.nan
    np.testing.assert_array_equal(solved(counts, replace(without(start, *enumerate(best)), psi=spoiled)).psi, found.psi)


@pytest.mark.parametrize("fault", ["no support", "nan"])
def test_an_arm_that_cannot_begin_is_passed_over_without_a_flag(fault: str) -> None:
    counts, start = made()
    best = solved(counts, start).kept
    psi, support = start.psi.copy(), start.support.copy()
    if fault == "nan":
        psi[range(3), best, 16, 14] = np.nan
    else:
        support[range(3), best] = False
    found = solved(counts, replace(start, psi=psi, support=support))
    expected = solved(counts, without(start, *enumerate(best)))
    np.testing.assert_array_equal(found.psi, expected.psi)
    np.testing.assert_array_equal(found.kept, expected.kept)
    assert (found.flags == 0).all()


def test_where_no_arm_can_begin_the_frame_is_flagged_and_its_neighbours_are_not() -> None:
    counts, start = made()
    support = start.support.copy()
    support[1] = False
    found, expected = solved(counts, replace(start, support=support)), solved(counts, start)
    assert found.flags.tolist() == [0, Flag.NO_SUPPORT, 0]
    assert not found.psi[1].any()
    assert np.isnan([found.chi2[1], *found.history[1], *found.trial[1]]).all()
    for i in (0, 2):
        np.testing.assert_array_equal(found.psi[i], expected.psi[i])
    psi = start.psi.copy()
    psi[1] = np.nan
    assert solved(counts, replace(start, psi=psi)).flags.tolist() == [0, Flag.NONFINITE, 0]


@pytest.mark.parametrize(("value", "flag"), [(0.0, Flag.EMPTY), (np.nan, Flag.NONFINITE | Flag.EMPTY), (1e37, Flag.NONFINITE)])
def test_a_hopeless_frame_of_several_arms_is_flagged_and_its_neighbours_do_not_notice(value: float, flag: Flag) -> None:
    counts, start = made()
    spoiled = counts.copy()
    spoiled[1] = value
    found, expected = solved(spoiled, start), solved(counts, start)
    assert found.flags.tolist() == [0, flag, 0]
    assert np.isfinite(found.psi).all()
    assert np.isnan([found.chi2[1], *found.history[1]]).all()
    for i in (0, 2):
        np.testing.assert_array_equal(found.psi[i], expected.psi[i])


def test_a_single_arm_has_no_trial() -> None:
    counts, start = made()
    only = without(start, *((i, arm) for i in range(3) for arm in (1, 2, 3)))
    found = solved(counts, only)
    assert (found.kept == 0).all()
    assert np.isnan(found.trial).all()
    for i in range(3):
        np.testing.assert_array_equal(found.psi[i], arm_alone(counts, start, i, 0, TEXT).psi[0])
    assert np.isnan(found.history[:, 12:]).all()


def test_a_flat_start_that_is_alone_goes_through_its_own_schedule() -> None:
    counts, start = made()
    found = solved(counts, without(start, *((1, arm) for arm in (0, 1, 2))))
    np.testing.assert_array_equal(found.psi[1], arm_alone(counts, start, 1, 3, "7*ER+SW(2.0)+2*HIO").psi[0])
    np.testing.assert_array_equal(found.psi[[0, 2]], solved(counts, start).psi[[0, 2]])
    plain = solved(counts, without(start, *((1, arm) for arm in (0, 1, 2))), replace(PLAN, alone=None))
    np.testing.assert_array_equal(plain.psi[1], arm_alone(counts, start, 1, 3, TEXT).psi[0])


def test_the_function_gives_each_arm_the_trial_it_is_told() -> None:
    counts, start = made()
    plan = Plan(parse_schedule(TEXT), trial=6)
    np.testing.assert_array_equal(refine(counts, start, schedule=TEXT, trial=6).psi, solved(counts, start, plan).psi)
    other = refine(counts, start, schedule=TEXT, trial=1)
    assert other.history.shape == (3, 13)
    untried = refine(counts, start, schedule=TEXT, trial=0)
    np.testing.assert_array_equal(untried.trial.argmin(1), untried.kept)
    for i, kept in enumerate(untried.kept):
        np.testing.assert_array_equal(untried.psi[i], arm_alone(counts, start, i, kept, TEXT).psi[0])


def test_pixels_that_were_not_measured_choose_no_arm() -> None:
    counts, start = made()
    valid = np.random.default_rng(1).random(SHAPE) > 0.1
    expected = refine(Photons(counts, valid, np.zeros(3, np.uint32)), start, schedule=TEXT)
    spoiled = np.where(valid, counts, np.float32(1e5))
    found = refine(Photons(spoiled, valid, np.zeros(3, np.uint32)), start, schedule=TEXT)
    np.testing.assert_array_equal(found.kept, expected.kept)
    np.testing.assert_array_equal(found.psi, expected.psi)


class Counting:
    """A scipy plan that counts its transforms."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._plan = arrays.ScipyPlan(shape)
        self.psi, self.field, self.engine = self._plan.psi, self._plan.field, "counting"
        self.transforms = 0

    def forward(self) -> None:
        self.transforms += 1
        self._plan.forward()

    def backward(self) -> None:
        self.transforms += 1
        self._plan.backward()


@pytest.mark.parametrize("arms", [1, 2, 4])
def test_a_frame_costs_the_transforms_that_the_plan_states(arms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made_plans: list[Counting] = []

    def make_plan(shape: tuple[int, ...], engine: str) -> Counting:
        made_plans.append(Counting(shape))
        return made_plans[-1]

    monkeypatch.setattr(planned, "make_plan", make_plan)
    monkeypatch.setattr(stage, "can_transform", lambda length: False)  # planned transforms can be counted
    counts, start = made(1, arms)
    plan = Plan(PLAN.schedule, PLAN.trial)
    solved(counts, start, plan)
    assert made_plans[-1].transforms == plan.ffts(arms)
    assert plan.ffts(arms) == 2 * plan.iterations(arms) + 1 + (arms if arms > 1 else 0)
    # Abstained from: less than the most that is stated.
    solved(counts, without(start, *((0, arm) for arm in range(arms - 1))))
    assert made_plans[-1].transforms == PLAN.alone.ffts <= PLAN.ffts(arms)  # type: ignore[union-attr]


def test_the_daemons_plan_is_a_hundred_iterations_however_many_arms_it_finds() -> None:
    plan = plan_of(RefineSettings())
    assert plan.iterations(1 + RefineSettings().candidates) == 100
    assert plan.alone is not None
    assert plan.alone.iterations == 100
    assert plan.longest == 100
    assert plan.iterations(1) == 100, "the flat start that is alone costs most"
    plain = plan_of(RefineSettings(iterations=7))
    assert (str(plain.schedule), str(plain.alone), plain.iterations(1)) == ("7*ER", "7*ER", 7)


def test_a_schedule_that_is_none_is_named_by_its_key() -> None:
    for key in ("schedule", "alone"):
        with pytest.raises(ConfigError, match=rf"refine\.{key}: '5\*XYZ' at position 0"):
            plan_of(RefineSettings(**{key: "5*XYZ"}))
    with pytest.raises(ValueError, match="trial is -1"):
        Solver(SHAPE, Plan(parse_schedule(1), trial=-1))


def test_a_volume_keeps_its_best_arm_too() -> None:
    rng = np.random.default_rng(0)
    box = centred_box((10, 12, 14), 5)
    truth = box * np.exp(1j * rng.uniform(0, 2, box.shape)) * 5
    counts = np.abs(forward(truth))[None] ** 2
    psi = np.stack([box * np.exp(1j * rng.uniform(0, 6, box.shape)) * 5, truth])[None].astype(np.complex64)
    start = Start(psi, np.broadcast_to(box, psi.shape), np.array([[0, 1]], np.int32), np.zeros((1, 2), np.float32))
    found = sp.refine(counts, start, iterations=3)
    assert found.kept.tolist() == [1]
    assert found.chi2[0] < 1e-6 < found.trial[0, 0]
