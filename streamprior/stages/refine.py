"""Photons, Start -> Reconstruction: a fixed number of iterations between what was measured and where the object may be, best arm kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import card_errors, check_backend, load_cupy
from streamprior.prior import Prior
from streamprior.records import FLAT, UNUSED, Batch, Flag, Photons, Reconstruction, Start
from streamprior.stages.blocks import BlockFrame
from streamprior.stages.lanes import can_transform
from streamprior.stages.planned import PlannedFrame
from streamprior.stages.refine_cuda import CudaSolver
from streamprior.stages.schedule import Iterate, Plan, Schedule, ShrinkWrap, parse_schedule

F32 = np.float32

ISLAND_RADIUS = 3
"""Held-out pixels come in islands, as neighbouring pixels of an oversampled pattern predict each other (Favre-Nicolin 2020)."""

ISLAND_CENTRE = 0.05
"""No island's centre is nearer to the beam than this part of the smallest extent: the low frequencies hold the object together."""


def refine(
    counts: Photons | npt.NDArray[Any],
    start: Start | npt.NDArray[Any],
    support: npt.NDArray[np.bool_] | None = None,
    iterations: int = 50,
    schedule: str | None = None,
    valid: npt.NDArray[np.bool_] | None = None,
    weight: float = 0.0,
    backend: str = "auto",
    trial: int = 10,
) -> Reconstruction:
    """Retrieve the phases of each frame by itself, from a given start, in a fixed number of iterations.

    Projections and update rules are those of docs/physics.md section 2: error reduction and hybrid input-output (Fienup 1982), RAAR
    (Luke 2005), shrink-wrap (Marchesini 2003). A frame's result does not depend on the batch it came in.

    Parameters
    ----------
    counts : Photons, or (B, H, W) or (B, D, H, W) real, photons
        Centred: the direct beam (or the Bragg peak) at (H//2, W//2).
    start : Start, or complex like counts
        The object to begin with, centred, in the scale of the unitary transform: sum |psi|^2 = photons. Of a Start with several arms each
        goes through the trial, and the one of lowest chi2 goes on.
    support : bool like counts or like one frame, optional
        Where the object may be non-zero. May be left out with a Start, which has its own.
    iterations : int
        Of error reduction, where no schedule is given.
    schedule : str, optional
        Such as "10*ER+SW(2.0)+25*HIO+5*ER" (`streamprior.stages.schedule`). Shrink-wraps are not counted as iterations.
    valid : bool like counts or like one frame, optional
        Measured pixels; all by default. With Photons both maps must agree that a pixel is measured.
    weight : float
        Proximal weight w >= 0: every iteration ends with psi <- (update(psi) + w * start) / (1 + w), which keeps the object near the start.
    backend : {"auto", "cpu", "cuda"}
    trial : int
        Iterations of error reduction that every arm gets before the best one is kept, in addition to the schedule; without meaning for a
        single arm.

    Returns
    -------
    Reconstruction
        psi and support like counts; history (B, trial and schedule) is chi2 = sum (|F psi| - m)^2 / sum m^2 over measured pixels,
        m = sqrt(counts), after each iteration, and chi2 its last column. A frame without photons, without support or with values that
        are no photon numbers (NaN, infinity, below 0) on measured pixels is flagged EMPTY, NO_SUPPORT or NONFINITE; its chi2 is NaN and
        its object stays the start (zero without a support).

    Raises
    ------
    ValueError
        Shapes or dtypes that do not fit together, a schedule that cannot be read, a negative weight.
    ConfigError
        A backend that cannot compute here.
    """
    plan = parse_schedule(iterations if schedule is None else schedule)
    flags: npt.NDArray[np.uint32] | None = None
    photons = np.asarray(counts.counts if isinstance(counts, Photons) else counts)
    known = _map_like("valid", np.ones(photons.shape[1:], np.bool_) if valid is None else valid, photons)
    if isinstance(counts, Photons):
        known = known & _map_like("counts.valid", counts.valid, photons)
        flags = counts.flags
    arms = _arms(start, support, photons)
    several = arms.unit.shape[1] > 1
    solver = make_solver(photons.shape[1:], Plan(plan, trial if several else 0), weight, backend=backend)
    return solver.solve(photons, arms, known, flags)


def make_solver(
    shape: tuple[int, ...], plan: Plan, weight: float = 0.0, free_fraction: float = 0.0, backend: str = "auto"
) -> Solver | CudaSolver:
    """What refines frames of one shape on "cpu", "cuda", or "auto": a CUDA card where there is one.

    Raises ConfigError where the backend cannot compute here, MemoryError where the card has no room, DeviceLost where it has failed.
    """
    if check_backend(backend, ("cpu", "cuda")) == "cpu":
        return Solver(shape, plan, weight, free_fraction)
    with card_errors(load_cupy()):
        return CudaSolver(shape, plan, weight, free_islands(shape, free_fraction))


class Refiner:
    """The stage: owns a solver for the prior's frames; one for each thread.

    plan : what every frame goes through. weight : proximal weight. free_fraction : part of the pixels that is held out and judges the
    result (free_llk); 0 for none. backend : as of `make_solver`.
    """

    name = "refine"

    def __init__(self, prior: Prior, plan: Plan, weight: float = 0.0, free_fraction: float = 0.0, backend: str = "cpu") -> None:
        self._solver = make_solver(prior.geometry.shape, plan, weight, free_fraction, backend)

    def __call__(self, batch: Batch) -> Batch:
        photons = batch.photons
        if photons is None or batch.start is None:
            raise ValueError("the batch holds no photons or no start: prepare and match come before refine")
        arms = _arms(batch.start, None, photons.counts)
        valid = _map_like("photons.valid", photons.valid, photons.counts)
        return replace(batch, reconstruction=self._solver.solve(photons.counts, arms, valid, photons.flags))


class Solver:
    """Owns what refines frames of one shape, for one thread.

    Frames are done one by one, so that a result never depends on its neighbours.

    engine : "blocks" works within the cache, on lengths without a prime factor above 13; "fftw" and "scipy" are planned transforms of any
    length. "auto" takes the first of these that can. "repeatable" does too, and chooses nothing by timing: the same bits whatever the state
    folder holds.
    """

    def __init__(self, shape: tuple[int, ...], plan: Plan, weight: float = 0.0, free_fraction: float = 0.0, engine: str = "auto") -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight is {weight}; the proximal weight is a finite number from 0")
        if plan.trial < 0:
            raise ValueError(f"trial is {plan.trial}; an arm is tried for 0 iterations or more")
        self._shape, self._steps = shape, plan
        self._trial = Schedule((Iterate("ER", plan.trial),) if plan.trial else ())
        self._held_out = free_islands(shape, free_fraction)
        self._free = np.flatnonzero(self._held_out)
        able = all(can_transform(length) for length in shape)
        in_blocks = engine == "blocks" or (able and engine in ("auto", "repeatable"))
        self._frame: BlockFrame | PlannedFrame = (
            BlockFrame(shape, weight, self._free) if in_blocks else PlannedFrame(shape, weight, self._free, engine)
        )
        # Copies of the frame in hand, of one dtype and layout whatever came in: one compiled variant of each kernel serves all.
        self._counts, self._start = np.empty(shape, F32), np.empty(shape, np.complex64)
        self._valid, self._support = np.empty(shape, np.bool_), np.empty(shape, np.bool_)
        self._area = 0  # of the support as it came
        # The misfit before each iteration of the arm in hand, and of the best so far.
        self._errors, self._best_errors = np.zeros(plan.longest + 1), np.zeros(plan.longest + 1)

    @property
    def engine(self) -> str:
        """What transforms: "blocks", "fftw" or "scipy"."""
        return self._frame.engine

    def solve(
        self, counts: npt.NDArray[Any], arms: Start, valid: npt.NDArray[np.bool_], flags: npt.NDArray[np.uint32] | None
    ) -> Reconstruction:
        """Refine frames: counts and valid (B, *shape), arms (B, k, *shape); see `refine`."""
        number, tried = len(counts), arms.unit.shape[1] if arms.unit.shape[1] > 1 else 0
        result = self._blank(number, tried, flags)
        for i in range(number):
            with np.errstate(over="ignore", invalid="ignore"):  # a double too large for a float becomes infinite and is flagged
                np.copyto(self._counts, counts[i], casting="unsafe")
            np.copyto(self._valid, valid[i])
            self._refine_one(result, i, arms)
            self._frame.store(result.psi[i], result.support[i])
        return result

    def _blank(self, number: int, tried: int, flags: npt.NDArray[np.uint32] | None) -> Reconstruction:
        def undefined(*shape: int) -> npt.NDArray[np.float32]:
            return np.full((number, *shape), np.nan, F32)

        return Reconstruction(
            psi=np.empty((number, *self._shape), np.complex64),
            support=np.empty((number, *self._shape), np.bool_),
            chi2=undefined(),
            history=undefined(self._steps.longest),
            floor=undefined(),
            r_factor=undefined(),
            free_llk=undefined(),
            flags=np.zeros(number, np.uint32) if flags is None else flags.astype(np.uint32),
            kept=np.zeros(number, np.int32),
            trial=undefined(tried),
        )

    def _refine_one(self, result: Reconstruction, i: int, arms: Start) -> None:
        photons, pixels, found = self._frame.load_counts(self._counts, self._valid, self._held_out)
        power = photons * self._counts.size
        used = np.flatnonzero(arms.unit[i] != UNUSED)
        alone = len(used) == 1 or bool(found)
        kept, done, flags = (int(used[0]), 0, self._begin(arms, i, int(used[0]))) if alone else self._best_of(result, i, arms, used, power)
        found |= flags
        if not found:
            schedule = self._steps.schedule
            if alone and self._steps.alone is not None and arms.unit[i, kept] == FLAT:
                schedule = self._steps.alone
            done = self._run(schedule, done)
            squares, residual, moduli = self._frame.score()
            self._errors[done] = squares
            if not np.isfinite(self._errors[: done + 1]).all():  # counts or a start beyond what single precision can square
                found |= Flag.NONFINITE
                self._begin(arms, i, kept)
        result.flags[i] |= found
        result.kept[i] = kept
        if found:
            return
        result.history[i, :done] = self._errors[1 : done + 1] / power
        result.chi2[i] = result.history[i, done - 1]
        result.floor[i] = pixels / (4 * photons)
        result.r_factor[i] = residual / moduli
        result.free_llk[i] = self._free_likelihood()

    def _best_of(self, result: Reconstruction, i: int, arms: Start, used: npt.NDArray[np.intp], power: float) -> tuple[int, int, int]:
        """Try the arms; object, support and history of the best are in hand after it. Returns (arm, iterations done, flags).

        An arm that cannot begin is left out; where none can, the flags are those of the first.
        """
        kept, least, area = int(used[0]), math.inf, 0
        for arm in used:
            if self._begin(arms, i, int(arm)):
                continue
            done = self._run(self._trial, 0)
            squares = self._frame.misfit()
            self._errors[done] = squares
            result.trial[i, arm] = squares / power
            if squares < least:
                kept, least, area = int(arm), squares, self._area
                self._frame.keep()
                self._best_errors[: done + 1] = self._errors[: done + 1]
        if least == math.inf:
            return kept, 0, self._begin(arms, i, kept)
        self._area = area
        self._frame.recall()
        self._errors[: self._steps.trial + 1] = self._best_errors[: self._steps.trial + 1]
        return kept, self._steps.trial, 0

    def _begin(self, arms: Start, i: int, arm: int) -> int:
        """Put one arm of frame i in hand, as it came; returns the flags of what is wrong with it."""
        with np.errstate(over="ignore", invalid="ignore"):
            np.copyto(self._start, arms.psi[i, arm], casting="unsafe")
        np.copyto(self._support, arms.support[i, arm])
        self._area, flags = self._frame.load_object(self._start, self._support)
        return flags

    def _run(self, schedule: Schedule, done: int) -> int:
        """All steps of a schedule on the object in hand; `_errors[j]` is the misfit before iteration j. Returns the iterations done."""
        for step in schedule.steps:
            if isinstance(step, ShrinkWrap):
                self._frame.shrink_wrap(step, self._area)
            else:
                self._frame.iterate(step, self._errors[done : done + step.times])
                done += step.times
        return done

    def _free_likelihood(self) -> float:
        """Poisson log-likelihood of the held-out pixels, 1 for a perfect model (docs/physics.md section 2); NaN where none is held out."""
        measured = self._valid.reshape(-1)[self._free]
        photons = self._counts.reshape(-1)[self._free[measured]].astype(np.float64)
        return poisson_llk(photons, self._frame.model()[measured]) if photons.size else math.nan


def poisson_llk(counts: npt.NDArray[np.float64], model: npt.NDArray[np.float64]) -> float:
    """(2/N) [sum_{I>0} (I ln(I/J) + J - I) + sum_{I=0} J] for counts I and a model of J photons (docs/physics.md section 2)."""
    expected = np.maximum(model, 1e-12)  # a model of exactly no photons would be infinitely wrong about one
    terms = expected - counts
    seen = counts > 0
    terms[seen] += counts[seen] * np.log(counts[seen] / expected[seen])
    return float(2 * terms.mean())


def free_islands(shape: tuple[int, ...], fraction: float) -> npt.NDArray[np.bool_]:
    """Centred map of about `fraction` of the pixels, in discs (balls) of radius 3 px; the same for every frame of this shape."""
    if not 0 <= fraction < 0.5:
        raise ValueError(f"free_fraction is {fraction}; from 0 (none) to below 0.5 of the pixels can be held out")
    held = np.zeros(shape, np.bool_)
    wanted = round(fraction * held.size)
    place = np.indices(shape).reshape(len(shape), -1)
    centre = np.array([[n // 2] for n in shape])
    allowed = np.flatnonzero(((place - centre) ** 2).sum(0) > (ISLAND_CENTRE * min(shape) + ISLAND_RADIUS) ** 2)
    disc = np.indices((2 * ISLAND_RADIUS + 1,) * len(shape)).reshape(len(shape), -1) - ISLAND_RADIUS
    disc = disc[:, (disc**2).sum(0) <= ISLAND_RADIUS**2]
    for pixel in np.random.default_rng(0).permutation(allowed):
        if np.count_nonzero(held) >= wanted:
            break
        island = place[:, pixel, None] + disc
        island = island[:, ((island >= 0) & (island < np.array(shape)[:, None])).all(0)]
        held[tuple(island)] = True
    return held


def _arms(start: Start | npt.NDArray[Any], support: npt.NDArray[np.bool_] | None, counts: npt.NDArray[Any]) -> Start:
    """Arms of (B, k, *shape) like counts, from either form of a start."""
    if isinstance(start, Start):
        if start.psi.ndim != counts.ndim + 1 or start.psi.shape[2:] != counts.shape[1:] or len(start.psi) != len(counts):
            raise ValueError(f"start.psi has shape {start.psi.shape}; with these counts it is (B, k, ...), {counts.shape} with k arms")
        if not (start.unit != UNUSED).any(1).all():
            raise ValueError("start.unit leaves a frame without an arm; each needs one that is not UNUSED")
        if support is None:
            return start
        return replace(start, support=np.broadcast_to(_map_like("support", support, counts)[:, None], start.psi.shape))
    if support is None:
        raise ValueError("the support is missing: only a Start record brings its own")
    psi = np.asarray(start)
    if psi.shape != counts.shape or psi.dtype.kind not in "cf":
        raise ValueError(f"start is {psi.dtype} {psi.shape}; it must be complex and like counts, {counts.shape}")
    inside = _map_like("support", support, counts)
    unit = np.full((len(psi), 1), FLAT, np.int32)
    return Start(psi[:, None], inside[:, None], unit, np.full(unit.shape, np.nan, F32))


def _map_like(name: str, array: npt.NDArray[np.bool_], counts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """A bool map of each frame or of all frames -> (B, *shape); checks counts on the way, as everything is measured by them."""
    if counts.ndim not in (3, 4) or counts.dtype.kind not in "uif" or 0 in counts.shape[1:]:
        raise ValueError(f"counts are {counts.dtype} {counts.shape}; they must be real photon numbers, (B, H, W) or (B, D, H, W)")
    given = np.asarray(array)
    if given.dtype != np.bool_ or given.shape not in (counts.shape, counts.shape[1:]):
        raise ValueError(f"{name} is {given.dtype} {given.shape}; it must be bool and like counts {counts.shape} or one frame of them")
    return np.broadcast_to(given, counts.shape)
