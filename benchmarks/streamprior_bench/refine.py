"""Fifty iterations of error reduction: ours, the planned FFTs alone (the floor), and the plain scipy loop; then two threads beside one.

Everything computes one frame on one core but where threads are counted. Measurements are interleaved, and medians compared, so that a
busy machine slows all of them alike.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.arrays import FftwPlan, make_plan
from streamprior.jit import call, kernel
from streamprior.records import FLAT, Start
from streamprior.stages.refine import Solver
from streamprior.stages.schedule import Plan, parse_schedule
from streamprior_bench.measure import interleaved

ITERATIONS = 50
SHAPES = ((104, 104), (128, 128), (256, 256), (64, 64, 64))
FRAMES_A_THREAD = 16

Array = npt.NDArray[Any]


def run(repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Yield one row a shape, then one row for threads over frames; times in milliseconds, medians over `repeats`."""
    for shape in SHAPES:
        yield _one_frame(shape, repeats)
    yield _threads((128, 128), repeats)


def _one_frame(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    frames = _frames(shape, 1)
    solver = Solver(shape, Plan(parse_schedule(ITERATIONS)))
    floor = _floor(shape)
    seconds = interleaved(
        {"ours": lambda: solver.solve(*frames, None), "floor": floor, "scipy": lambda: _scipy_er(*_first(*frames[:2]))}, repeats
    )
    ours, alone, scipy_loop = (1e3 * seconds[name] for name in ("ours", "floor", "scipy"))
    return {
        "what": f"ER-{ITERATIONS} {'x'.join(map(str, shape))}",
        "engine": make_plan(shape).engine,
        "ours_ms": ours,
        "fft_floor_ms": alone,
        "scipy_loop_ms": scipy_loop,
        "floor_over_ours": alone / ours,
        "scipy_over_ours": scipy_loop / ours,
    }


def _threads(shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    frames = _frames(shape, FRAMES_A_THREAD)
    solvers = [Solver(shape, Plan(parse_schedule(ITERATIONS))) for _ in range(2)]

    def both() -> None:
        threads = [threading.Thread(target=solver.solve, args=(*frames, None)) for solver in solvers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    seconds = interleaved({"one": lambda: solvers[0].solve(*frames, None), "two": both}, repeats)
    return {
        "what": f"ER-{ITERATIONS} {'x'.join(map(str, shape))}, 2 threads over frames",
        "one_thread_frames_per_s": FRAMES_A_THREAD / seconds["one"],
        "two_threads_frames_per_s": 2 * FRAMES_A_THREAD / seconds["two"],
        "two_over_one": 2 * seconds["one"] / seconds["two"],
    }


def _frames(shape: tuple[int, ...], number: int) -> tuple[Array, Start, Array]:
    """counts, a flat start, valid of a made crystal."""
    rng = np.random.default_rng(0)
    support = np.zeros(shape, np.bool_)
    support[tuple(slice(n // 2 - n // 6, n // 2 + n // 6) for n in shape)] = True
    psi = support * np.exp(1j * rng.uniform(0, 1, (number, *shape)))
    axes = tuple(range(1, psi.ndim))
    field = scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(psi, axes), axes=axes, norm="ortho"), axes)
    counts = rng.poisson(10 * np.abs(field) ** 2).astype(np.float32)
    flat = np.repeat((3 * support).astype(np.complex64)[None, None], number, 0)
    unit, distance = np.full((number, 1), FLAT, np.int32), np.full((number, 1), np.nan, np.float32)
    return counts, Start(flat, np.broadcast_to(support, flat.shape), unit, distance), np.ones(counts.shape, np.bool_)


def _first(counts: Array, start: Start) -> tuple[Array, Array, Array]:
    """counts, start and support of the first frame."""
    return counts[0], start.psi[0, 0], start.support[0, 0]


def _floor(shape: tuple[int, ...]) -> Callable[[], object]:
    """The transforms of the iterations and nothing else."""
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


def _scipy_er(counts: Array, start: Array, support: Array) -> tuple[Array, list[float]]:
    """What one writes by hand: single precision, FFT order, one worker."""
    magnitude, psi, inside = np.sqrt(scipy.fft.ifftshift(counts)), scipy.fft.ifftshift(start), scipy.fft.ifftshift(support)
    history = []
    for _ in range(ITERATIONS):
        field = scipy.fft.fftn(psi, norm="ortho", workers=1)
        modulus = np.abs(field)
        history.append(float(((modulus - magnitude) ** 2).sum() / (magnitude**2).sum()))
        field *= magnitude / np.maximum(modulus, np.float32(1e-12))
        psi = scipy.fft.ifftn(field, norm="ortho", workers=1) * inside
    return scipy.fft.fftshift(psi), history
