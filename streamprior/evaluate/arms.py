"""Frames of Set 2 and a prior -> every way to start, each with the same number of iterations: the baselines that could beat the prior."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from streamprior.config import RefineSettings
from streamprior.evaluate.records import DAEMON, FLAT, FULL_SOLVE, RANDOM, Arm, Comparison, Tick
from streamprior.prior import Library, Prior
from streamprior.records import FLAT as FLAT_UNIT
from streamprior.records import UNUSED, Photons, Reconstruction, Start
from streamprior.stages.match import Control, Matcher, Nearest, dark_pixels
from streamprior.stages.recipe import plan_of
from streamprior.stages.refine import Solver
from streamprior.stages.schedule import Plan, Schedule, parse_schedule
from streamprior.train.settings import TrainSettings
from streamprior.train.solve import autocorrelation_support

FREE = 0.05
"""Part of the pixels that a second run of every arm holds out for its free log-likelihood; the first, which is judged, sees them all."""

KEPT_RUNS = 5
"""Random runs whose objects are kept for the transfer function."""

FULL_STARTS = 2
"""Random starts of the full solve, the better one kept: 650 iterations each (docs/physics.md section 5)."""

Objects = npt.NDArray[np.complex64]
Maps = npt.NDArray[np.bool_]


def compare_arms(
    photons: Photons,
    prior: Prior | Library,
    title: str = "",
    frames: tuple[int, ...] = (),
    truth: Objects | None = None,
    settings: RefineSettings | None = None,
    seeds: int = 20,
    progress: Tick | None = None,
) -> Comparison:
    """Run all arms on the same frames.

    Every arm but the full solve costs at most as many iterations a frame as the daemon's (`RefineSettings`); an arm that tries fewer starts
    spends the rest on error reduction before its schedule.

    Parameters
    ----------
    photons : Photons
        Set 2, prepared: counts (B, H, W) or (B, D, H, W); valid like counts or like one frame.
    prior : Prior with a library, or Library
    truth : complex64 like counts, optional
        What the objects are compared with; without it the full solve's objects are.
    settings : RefineSettings, optional
        The daemon's; its defaults where it is None.
    seeds : int
        Random starts; their run of median chi2 stands for them.
    progress : callable, optional
        progress(what, done, total)

    Raises
    ------
    ValueError
        The prior holds no library.
    """
    library = prior.library if isinstance(prior, Prior) else prior
    if library is None:
        raise ValueError("this prior holds no library of prototypes: there is nothing to compare; grow it again without `library: 0`")
    tick = progress or (lambda what, done, total: None)
    bench = _Bench(photons, library, settings or RefineSettings(), tick, dark_pixels(photons, prior))
    full = bench.full_solve()
    reference = full.psi if truth is None else truth
    random, runs = bench.random(seeds)
    arms = [random, *bench.flat(), *bench.prototypes(), *bench.solved_frames(prior), bench.oracle(reference, truth is None), bench.daemon()]
    return Comparison(
        title=title,
        frames=frames or tuple(range(len(photons.counts))),
        counts=photons.counts,
        valid=bench.valid,
        reference=reference,
        reference_is=FULL_SOLVE if truth is None else "truth",
        arms=(*arms, full),
        notes=bench.notes,
        random_runs=runs,
        distance_gate=bench.gate,
    )


class _Bench:
    """Owns the frames, the library and the solvers of one comparison."""

    def __init__(self, photons: Photons, library: Library, settings: RefineSettings, tick: Tick, dark: Maps | None = None) -> None:
        self.valid = np.broadcast_to(photons.valid, photons.counts.shape)
        self._photons, self._library, self._tick = photons, library, tick
        self._plan = plan_of(settings)
        self._k = min(settings.candidates, len(library.psi))
        self._matcher = Matcher(library, settings.candidates)
        self._budget = self._plan.iterations(self._k + 1)
        nearest = Nearest(library)
        self._dark = dark
        self._near = nearest.starts(photons, max(1, self._k), dark)
        self.gate, self._supports = nearest.gate(photons), nearest.supports
        self._control = Control(library.control).starts(photons)

    @property
    def notes(self) -> tuple[str, ...]:
        beyond = int((self._near.distance[:, 0] > self.gate).sum())
        return (
            f"Abstained from {beyond} of {len(self.valid)} frames: nearer to no prototype than {self.gate:.3f}, which is percentile"
            f" {self._library.gate:g} of the training frames' own distances (each from its nearest prototype but its own).",
        )

    def random(self, seeds: int) -> tuple[Arm, Objects]:
        """Error reduction from random phases in the control's support: the run of median chi2 of each frame, and some runs' objects."""
        rng = np.random.default_rng(0)
        plan = Plan(parse_schedule(self._budget))
        runs: list[Arm] = []
        for seed in range(seeds):
            phases = np.exp(2j * np.pi * rng.random(self._control.psi.shape)).astype(np.complex64)
            # The free log-likelihood of one seed is enough: it is a number of the method, not of the draw.
            runs.append(self._arm(RANDOM, replace(self._control, psi=self._control.psi * phases), plan, judge=seed == 0))
            self._tick(RANDOM, seed + 1, seeds)
        order = np.argsort([run.chi2 for run in runs], axis=0)[len(runs) // 2]
        at = np.arange(len(order))
        median = replace(
            runs[0],
            **{
                name: np.stack([getattr(run, name) for run in runs])[order, at]
                for name in ("psi", "support", "chi2", "r_factor", "history")
            },
        )
        return median, np.stack([run.psi for run in runs[:KEPT_RUNS]])

    def flat(self) -> list[Arm]:
        alone = self._filled(self._plan.alone or self._plan.schedule, self._budget)
        return [self._arm(FLAT, self._control, Plan(parse_schedule(self._budget))), self._arm("flat + plan", self._control, Plan(alone))]

    def prototypes(self) -> list[Arm]:
        """From the library without a control: the nearest, without its phase, the best of k, and one that belongs to another frame."""
        one = _first(self._near)
        number = len(self._library.psi)
        away = np.random.default_rng(1).integers(1, number, len(one.unit)) if number > 1 else np.zeros(len(one.unit), np.int64)
        other = (one.unit[:, 0] + away) % number
        scale = np.sqrt(np.sum(np.abs(one.psi) ** 2, axis=tuple(range(2, one.psi.ndim)), keepdims=True))
        shuffled = Start(
            self._library.psi[other][:, None] * scale, self._supports[other][:, None], other[:, None].astype(np.int32), one.distance
        )
        arms = [
            self._arm("zero phase", replace(one, psi=np.abs(one.psi).astype(np.complex64)), self._padded(0)),
            self._arm("shuffled prototype", shuffled, self._padded(0)),
            self._arm("prototype", one, self._padded(0)),
        ]
        return [*arms, self._arm("best of k", self._near, self._padded(self._k))] if self._k > 1 else arms

    def solved_frames(self, prior: Prior | Library) -> list[Arm]:
        """From the nearest training frame's own object, no prototype: what gathering them costs. Only where the prior keeps them."""
        if not isinstance(prior, Prior) or "solved_psi" not in prior.training:
            return []
        psi = np.zeros((len(prior.training["solved_psi"]), *self._library.control.shape), np.complex64)
        psi[(slice(None), *prior.object_box)] = prior.training["solved_psi"]
        modulus = np.abs(psi)
        every = replace(
            self._library, psi=psi, support=modulus > 0.1 * modulus.max((1, 2), keepdims=True), unit=np.arange(len(psi), dtype=np.int32)
        )
        return [self._arm("nearest solved frame", Nearest(every).starts(self._photons, 1, self._dark), self._padded(0))]

    def oracle(self, reference: Objects, own: bool) -> Arm:
        """From the reference itself: what the schedule makes of a perfect start."""
        modulus = np.abs(reference)
        support = modulus > 0.1 * modulus.max(tuple(range(1, modulus.ndim)), keepdims=True)
        start = replace(_first(self._near), psi=_scaled(reference, self._photons, self.valid)[:, None], support=support[:, None])
        arm = self._arm("oracle", replace(start, unit=np.full_like(start.unit, FLAT_UNIT)), self._padded(0))
        return replace(arm, kept=("full solve" if own else "truth",) * len(reference))

    def daemon(self) -> Arm:
        start, strange = self._matcher.starts(self._photons, self._dark)
        return replace(self._arm(DAEMON, start, self._plan), abstained=strange, distance=start.distance[:, 0])

    def full_solve(self) -> Arm:
        """Random starts in the autocorrelation's support, the better kept: nothing from the prior."""
        plan = Plan(parse_schedule(TrainSettings().schedule))
        counts = np.where(self.valid, self._photons.counts, np.float32(0))
        support = np.stack([autocorrelation_support(one) for one in self._photons.counts])
        axes = tuple(range(1, counts.ndim))
        level = np.sqrt(counts.sum(axes, keepdims=True) / np.maximum(support.sum(axes, keepdims=True), 1))
        rng, best = np.random.default_rng(2), None
        for done in range(FULL_STARTS):
            phases = np.exp(2j * np.pi * rng.random(counts.shape))
            start = replace(self._control, psi=(level * support * phases).astype(np.complex64)[:, None], support=support[:, None])
            arm = self._arm(FULL_SOLVE, start, plan)
            best = arm if best is None else _better(best, arm)
            self._tick(FULL_SOLVE, done + 1, FULL_STARTS)
        assert best is not None
        return replace(best, iterations=FULL_STARTS * best.iterations, ffts=FULL_STARTS * best.ffts)

    def _padded(self, arms: int) -> Plan:
        """The daemon's schedule with as much error reduction before it as the budget leaves; `arms` are tried first."""
        schedule = self._filled(self._plan.schedule, self._budget - arms * self._plan.trial)
        return Plan(schedule, self._plan.trial if arms else 0)

    def _filled(self, schedule: Schedule, iterations: int) -> Schedule:
        """The schedule with as much error reduction before it as makes up so many iterations."""
        left = iterations - schedule.iterations
        return Schedule((*parse_schedule(left).steps, *schedule.steps)) if left > 0 else schedule

    def _arm(self, name: str, start: Start, plan: Plan, judge: bool = True) -> Arm:
        """Run one arm; a second run with held-out pixels gives its free log-likelihood."""
        found = self._solve(start, plan, 0.0)
        llk = self._solve(start, plan, FREE).free_llk if judge else np.full(len(found.chi2), np.nan, np.float32)
        tried = max(1, int((start.unit != UNUSED).sum(1).max()))
        unit = start.unit[np.arange(len(found.kept)), found.kept]
        return Arm(
            name=name,
            psi=found.psi,
            support=found.support,
            chi2=found.chi2,
            floor=found.floor,
            r_factor=found.r_factor,
            free_llk=llk,
            history=found.history,
            iterations=plan.iterations(tried),
            ffts=plan.ffts(tried),
            unit=unit,
            distance=start.distance[:, 0],
            abstained=np.zeros(len(unit), np.bool_),
            kept=tuple("flat" if one == FLAT_UNIT else f"prototype {one}" for one in unit),
        )

    def _solve(self, start: Start, plan: Plan, free: float) -> Reconstruction:
        solver = Solver(self._photons.counts.shape[1:], plan, free_fraction=free)
        return solver.solve(self._photons.counts, start, self.valid, None)


def _first(start: Start) -> Start:
    return Start(start.psi[:, :1], start.support[:, :1], start.unit[:, :1], start.distance[:, :1])


def _better(one: Arm, other: Arm) -> Arm:
    """Frame by frame the arm of lower chi2."""
    better = other.chi2 < one.chi2
    names = ("psi", "support", "chi2", "r_factor", "free_llk", "history")
    chosen = {}
    for name in names:
        first, second = getattr(one, name), getattr(other, name)
        chosen[name] = np.where(better.reshape(-1, *(1 for _ in first.shape[1:])), second, first)
    return replace(one, **chosen)


def _scaled(psi: Objects, photons: Photons, valid: Maps) -> Objects:
    """Objects with the energy of their frames' measured photons."""
    axes = tuple(range(1, psi.ndim))
    energy = np.sum(photons.counts, axis=axes, where=valid, dtype=np.float64, keepdims=True)
    own = np.sum(np.abs(psi) ** 2, axis=axes, keepdims=True)
    return np.asarray(psi * np.sqrt(energy / np.maximum(own, np.finfo(np.float32).tiny)), np.complex64)
