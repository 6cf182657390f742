"""Fifty iterations on one frame: ours beside their planned transforms alone (the floor) and beside what one would take instead.

Contestants of a row are interleaved, and medians compared, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.arrays import FftwPlan, make_plan
from streamprior.config import RefineSettings
from streamprior.jit import call, kernel
from streamprior.records import FLAT, Start
from streamprior.stages.recipe import plan_of
from streamprior.stages.refine import Solver
from streamprior.stages.schedule import Plan, parse_schedule
from streamprior_bench.measure import Case, absent, beside, rows_of, spread, timed
from streamprior_bench.peers_refine import cohere_er, numpy_er, scipy_er

ITERATIONS = 50
PLACES = 4
SHAPES = ((64, 64), (104, 104), (128, 128), (256, 256), (512, 512), (64, 64, 64))
VARIED = ((104, 104), (128, 128), (256, 256), (64, 64, 64))
"""Shapes of the rows that are held against plain error reduction."""

PEERS = {"cohere": ("cohere_core.controller.phasing", "cohere-core")}

PIXELS_A_THREAD = 2**20
"""Of frames that each of two threads solves in a turn; handing a turn to a thread must cost nothing beside it."""

THIRD = 1 / 3
"""Width of the support in fields, where a row does not say otherwise."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What differs from plain error reduction. width : of the support, in fields. holes : whether pixels are missing."""

    schedule: str = f"{ITERATIONS}*ER"
    weight: float = 0.0
    holes: bool = False
    width: float = THIRD


VARIANTS = {
    "HIO": Variant(f"{ITERATIONS}*HIO"),
    "RAAR": Variant(f"{ITERATIONS}*RAAR"),
    "shrink-wrap": Variant("SW(1.5)+20*ER+SW(1.2)+20*ER+SW(1.0)+10*ER"),
    "valid map": Variant(holes=True),
    "weight": Variant(weight=0.1),
    "half support": Variant(width=1 / 2),
    "whole support": Variant(width=1.0),
}

Array = npt.NDArray[Any]


def run(repeats: int = 5, only: str = "") -> Iterator[dict[str, Any]]:
    """A row for each shape on one core and on two, for each variant of plain error reduction, and for what the daemon does by default."""
    missing = absent(PEERS)
    yield from missing.values()
    yield from rows_of(cases(missing), repeats, only)


def cases(missing: Collection[str]) -> list[Case]:
    """All rows, without the peers that are missing."""
    return [
        *(Case(f"ER-{ITERATIONS} {_spelt(shape)}, one core", partial(_one_core, shape, missing)) for shape in SHAPES),
        *(Case(f"ER-{ITERATIONS} {_spelt(shape)}, two cores", partial(_two_cores, shape, missing)) for shape in SHAPES),
        *(
            Case(f"{name}, {ITERATIONS} iterations {_spelt(shape)}", partial(_variant, shape, name))
            for name in VARIANTS
            for shape in VARIED
        ),
        *(
            Case(f"default plan, {arms} {_spelt(shape)}", partial(_default_plan, shape, arms))
            for arms in ("four arms", "no prototype near")
            for shape in VARIED
            if len(shape) == 2  # the daemon's frames
        ),
    ]


def _spelt(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _one_core(shape: tuple[int, ...], missing: Collection[str], repeats: int) -> dict[str, Any]:
    counts, start, valid = made_frames(shape, 1)
    solver = Solver(shape, Plan(parse_schedule(ITERATIONS)))
    works: dict[str, Callable[[], object]] = {"ours": lambda: solver.solve(counts, start, valid, None), "floor": _floor(shape)}
    first = (counts[0], start.psi[0, 0], start.support[0, 0], ITERATIONS)
    works |= {"scipy": scipy_er(*first), "numpy": numpy_er(*first)}
    if "cohere" not in missing:
        works["cohere"] = cohere_er(*first)
    spent = timed(works, repeats)
    ms = {name: 1e3 * statistics.median(times) for name, times in spent.items()}
    peers = {name: ms.get(name) for name in ("scipy", "numpy", "cohere")}
    return {
        "engine": solver.engine,
        "floor_ms": ms["floor"],
        "ours_ms": ms["ours"],
        "floor_over_ours": ms["floor"] / ms["ours"],
        "ours_spread": spread(spent["ours"]),
        "floor_spread": spread(spent["floor"]),
        **{f"{name}_ms": peer for name, peer in peers.items()},
        **{f"{name}_over_ours": None if peer is None else peer / ms["ours"] for name, peer in peers.items()},
        "repeats": repeats,
    }


def _two_cores(shape: tuple[int, ...], missing: Collection[str], repeats: int) -> dict[str, Any]:
    """Ours on two threads over frames, as a daemon has it, beside one; the transforms alone likewise, which is what the machine gives.

    Peers have both cores too: scipy a frame a thread in two dimensions, scipy and cohere two workers within a volume.
    """
    number = max(1, PIXELS_A_THREAD // math.prod(shape))
    counts, start, valid = made_frames(shape, number)
    ours = [partial(Solver(shape, Plan(parse_schedule(ITERATIONS))).solve, counts, start, valid, None) for _ in range(2)]
    floors = [_again(_floor(shape), number) for _ in range(2)]
    works = {"one": ours[0], "two": beside(*ours), "one floor": floors[0], "two floors": beside(*floors)}
    frames = {"one": number, "two": 2 * number, "one floor": number, "two floors": 2 * number, "scipy": 2 * number, "cohere": 1}
    first = (counts[0], start.psi[0, 0], start.support[0, 0], ITERATIONS)
    if len(shape) == 2:
        works["scipy"] = beside(*(_again(scipy_er(*first), number) for _ in range(2)))
    else:
        works["scipy"], frames["scipy"] = scipy_er(*first, workers=2), 1
        if "cohere" not in missing:
            works["cohere"] = cohere_er(*first, workers=2)
    spent = timed(works, repeats)
    rate = {name: frames[name] / statistics.median(times) for name, times in spent.items()}
    return {
        "one_core_frames_per_s": rate["one"],
        "two_cores_frames_per_s": rate["two"],
        "two_over_one": rate["two"] / rate["one"],
        "floor_two_over_one": rate["two floors"] / rate["one floor"],
        "two_spread": spread(spent["two"]),
        "scipy_two_cores_frames_per_s": rate["scipy"],
        "cohere_two_cores_frames_per_s": rate.get("cohere"),
        "ours_over_scipy": rate["two"] / rate["scipy"],
        "ours_over_cohere": rate["two"] / rate["cohere"] if "cohere" in rate else None,
    }


def _again(work: Callable[[], object], number: int) -> Callable[[], None]:
    """As often as there are frames in a turn."""

    def works() -> None:
        for _ in range(number):
            work()

    return works


def _variant(shape: tuple[int, ...], name: str, repeats: int) -> dict[str, Any]:
    """As many iterations that differ in one thing, against their transforms and against plain error reduction."""
    variant = VARIANTS[name]
    counts, start, valid = made_frames(shape, 1, variant.width)
    solver = Solver(shape, Plan(parse_schedule(variant.schedule)), variant.weight)
    measured = valid & _seen(shape) if variant.holes else valid
    return _against_floor(shape, lambda: solver.solve(counts, start, measured, None), 2 * ITERATIONS, repeats)


def _default_plan(shape: tuple[int, ...], arms: str, repeats: int) -> dict[str, Any]:
    """What a frame goes through in a daemon whose settings are the defaults, with prototypes near it and without."""
    settings = RefineSettings()
    counts, start, valid = made_frames(shape, 1)
    if arms == "four arms":
        start = with_prototypes(start, settings.candidates)
    plan = plan_of(settings)
    transforms = plan.ffts(start.unit.shape[1]) if arms == "four arms" or plan.alone is None else plan.alone.ffts
    solver = Solver(shape, plan)
    return _against_floor(shape, lambda: solver.solve(counts, start, valid, None), transforms, repeats)


def _against_floor(shape: tuple[int, ...], ours: Callable[[], object], transforms: int, repeats: int) -> dict[str, Any]:
    """`ours` and its so many transforms alone, and their ratio beside that of plain error reduction in the same run."""
    counts, start, valid = made_frames(shape, 1)
    plain = Solver(shape, Plan(parse_schedule(ITERATIONS)))
    spent = timed({"ours": ours, "plain": lambda: plain.solve(counts, start, valid, None), "floor": _floor(shape)}, repeats)
    ms = {name: 1e3 * statistics.median(times) for name, times in spent.items()}
    floor = ms["floor"] * transforms / (2 * ITERATIONS)
    return {
        "transforms": transforms,
        "floor_ms": floor,
        "ours_ms": ms["ours"],
        "floor_over_ours": floor / ms["ours"],
        "plain_floor_over_ours": ms["floor"] / ms["plain"],
        "over_plain": (floor / ms["ours"]) / (ms["floor"] / ms["plain"]),
        "ours_spread": spread(spent["ours"]),
    }


def _seen(shape: tuple[int, ...]) -> Array:
    """Measured pixels of a detector with a beam stop and one pixel in a hundred dead, centred."""
    distance = np.sqrt(sum((axis - n // 2) ** 2 for axis, n in zip(np.indices(shape), shape, strict=True)))
    seen: Array = (np.random.default_rng(1).random(shape) >= 0.01) & (distance > 0.03 * min(shape))
    return seen


def made_frames(shape: tuple[int, ...], number: int, width: float = THIRD) -> tuple[Array, Start, Array]:
    """counts, a flat start, valid of a made crystal that is so many fields wide."""
    rng = np.random.default_rng(0)
    support = np.zeros(shape, np.bool_)
    support[tuple(slice(n // 2 - int(n * width / 2), n // 2 + int(n * width / 2)) for n in shape)] = True
    psi = support * np.exp(1j * rng.uniform(0, 1, (number, *shape)))
    axes = tuple(range(1, psi.ndim))
    field = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(psi, axes), axes=axes, norm="ortho"), axes)
    counts = rng.poisson(10 * np.abs(field) ** 2).astype(np.float32)
    flat = np.repeat((3 * support).astype(np.complex64)[None, None], number, 0)
    unit, distance = np.full((number, 1), FLAT, np.int32), np.full((number, 1), np.nan, np.float32)
    return counts, Start(flat, np.broadcast_to(support, flat.shape), unit, distance), np.ones(counts.shape, np.bool_)


def with_prototypes(flat: Start, candidates: int) -> Start:
    """So many arms before the flat one: it, with phases drawn at random up to a radian."""
    rng = np.random.default_rng(2)
    phases = rng.uniform(0, 1, (len(flat.psi), candidates, *flat.psi.shape[2:]))
    psi = np.concatenate([flat.psi * np.exp(1j * phases).astype(np.complex64), flat.psi], 1)
    unit = np.concatenate([np.tile(np.arange(candidates, dtype=np.int32), (len(psi), 1)), flat.unit], 1)
    return replace(flat, psi=psi, support=np.broadcast_to(flat.support, psi.shape), unit=unit, distance=np.zeros(unit.shape, np.float32))


def _floor(shape: tuple[int, ...]) -> Callable[[], object]:
    """The planned transforms of the iterations and nothing else, in the luckiest of several places.

    Where its buffers lie in memory decides up to a third of a large transform's time (which lines of the caches their pages
    share), and is drawn anew with every plan: so several are made, and the fastest is the floor.
    """
    drawn = [_planned_transforms(shape) for _ in range(PLACES)]
    spent = timed({str(i): one for i, one in enumerate(drawn)}, 1)
    return min(enumerate(drawn), key=lambda one: statistics.median(spent[str(one[0])]))[1]


def _planned_transforms(shape: tuple[int, ...]) -> Callable[[], object]:
    plan = make_plan(shape)
    plan.psi[...] = np.random.default_rng(0).normal(size=shape)  # a constant would transform to denormal numbers, which are slow
    if isinstance(plan, FftwPlan):
        return lambda: _transforms(plan.execute, plan.forward_plan, plan.backward_plan, ITERATIONS)

    def transforms() -> None:
        for _ in range(ITERATIONS):
            plan.forward()
            plan.backward()

    return transforms


@kernel
def _transforms(execute, forward, backward, times):  # type: ignore[no-untyped-def]
    for _ in range(times):
        call(execute, forward)
        call(execute, backward)
