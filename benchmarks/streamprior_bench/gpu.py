"""Refinement and classification on a CUDA card: kernels beside their limits and beside peers, and the way from host memory to host memory.

Fifty iterations of error reduction on made crystals. What is compared is measured in turn, so that the
card's clock hits all alike. Without a card there is one row that says why.
"""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import cuda_missing, load_cupy, page_locked
from streamprior.records import Start
from streamprior.stages.classify_cuda import CudaClassifier
from streamprior.stages.iterate_cuda import SOURCE, Objects, make_engine
from streamprior.stages.refine import free_islands
from streamprior.stages.refine_cuda import KERNELS, CudaSolver
from streamprior.stages.schedule import Iterate, Plan, parse_schedule
from streamprior_bench.classify import synthetic_frames, synthetic_prior
from streamprior_bench.measure import beside, interleaved
from streamprior_bench.refine import made_frames

ITERATIONS = 50
FRAMES = 4096
"""Of 128 x 128 that one call gets: half a gigabyte of objects."""

VOLUMES = 64
LANES_OF_A_PROCESSOR = 128
"""Multiplications with addition in single precision that a multiprocessor of an H100 or H200 does at once (CUDA C programming guide)."""

Array = npt.NDArray[Any]


def run(repeats: int = 5, only: str = "") -> Iterator[dict[str, Any]]:
    """Yield a row for each measurement whose name holds `only`; rates a second, sizes in bytes."""
    missing = cuda_missing()
    if missing is not None:
        yield {"what": "a CUDA card", "skipped": missing}
        return
    cupy = load_cupy()
    limits = _limits(cupy, repeats)
    rows: dict[str, Callable[[], dict[str, Any]]] = {"the card": lambda: limits}
    for shape in ((64, 64), (104, 104), (128, 128), (256, 256), (64, 64, 64)):
        rows[f"ER-{ITERATIONS} {_spelt(shape)}, kernels"] = lambda shape=shape: _kernels(cupy, shape, limits, repeats)  # type: ignore[misc]
    rows[f"ER-{ITERATIONS} 128x128, frames in hand"] = lambda: _rooms(cupy, (128, 128), repeats)
    for shape, number in (((128, 128), FRAMES), ((64, 64, 64), VOLUMES)):
        rows[f"ER-{ITERATIONS} {_spelt(shape)}, host to host"] = lambda shape=shape, number=number: _path(  # type: ignore[misc]
            cupy, shape, number, limits, repeats
        )
    for size in (128, 512, 2048):
        for kind in ("uint16", "float32"):
            rows[f"classify {size}x{size} {kind}"] = lambda size=size, kind=kind: _classify(size, kind, repeats)  # type: ignore[misc]
    for what, row in rows.items():
        if only in what:
            yield {"what": what, **row()}


def _spelt(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _limits(cupy: Any, repeats: int) -> dict[str, Any]:
    """What the card and its bus can do: copies measured, arithmetic from the clock and the number of lanes."""
    attributes = cupy.cuda.Device().attributes
    stream = cupy.cuda.Stream(non_blocking=True)
    size = 2**28
    source, goal = (cupy.zeros(size, np.uint8) for _ in range(2))
    host = page_locked(cupy, (size,), np.uint8)
    copies: dict[str, Callable[[], object]] = {
        "memory": lambda: cupy.cuda.runtime.memcpyAsync(goal.data.ptr, source.data.ptr, size, 3, stream.ptr),
        "up": lambda: source.set(host, stream),
        "down": lambda: source.get(stream=stream, out=host, blocking=False),
    }
    seconds = interleaved({name: _waiting(copy, stream) for name, copy in copies.items()}, repeats)
    clock_hz = 1e3 * attributes.get("ClockRate", 0)
    return {
        "name": cupy.cuda.runtime.getDeviceProperties(0)["name"].decode(),
        "memory_bytes_per_s": 2 * size / seconds["memory"],
        "bus_up_bytes_per_s": size / seconds["up"],
        "bus_down_bytes_per_s": size / seconds["down"],
        "flops_per_s": 2 * LANES_OF_A_PROCESSOR * attributes["MultiProcessorCount"] * clock_hz,
    }


def _waiting(work: Callable[[], object], stream: Any) -> Callable[[], None]:
    def done() -> None:
        work()
        stream.synchronize()

    return done


def _kernels(cupy: Any, shape: tuple[int, ...], limits: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Iterations alone, all data on the card: both engines, and what others do there."""
    contestants, frames = {}, {}
    for name in ("cufft", "fused"):
        with contextlib.suppress(ValueError):  # frames that do not fit the fused kernel
            contestants[name], frames[name] = _engine(cupy, shape, name)
            if name == "fused":  # which spares rows that the support leaves empty; here it leaves none
                contestants["fused_all_rows"], frames["fused_all_rows"] = _engine(cupy, shape, name, everywhere=True)
    contestants["naive"], frames["naive"] = _naive_loop(cupy, shape)
    row: dict[str, Any] = {}
    try:
        contestants["cohere"], frames["cohere"] = _cohere(shape)
    except ImportError as error:
        row["cohere_skipped"] = f"cohere's cp path cannot be had ({error}): pip install cohere-core cupy-cuda13x"
    seconds = interleaved(contestants, repeats)
    row |= {f"{name}_per_s": frames[name] / seconds[name] for name in contestants}
    size = math.prod(shape)
    # cuFFT reads and writes a field once a pass, and makes one or more an axis; the projections read and write one, target and support.
    touched = ITERATIONS * size * (2 * len(shape) * 16 + (16 + 4) + (16 + 1))
    flops = ITERATIONS * 2 * 5 * size * math.log2(size)
    row["cufft_bytes_of_memory"] = row["cufft_per_s"] * touched / limits["memory_bytes_per_s"]
    for name in ("cufft", "fused_all_rows"):
        if f"{name}_per_s" in row and limits["flops_per_s"]:
            row[f"{name}_flops_of_peak"] = row[f"{name}_per_s"] * flops / limits["flops_per_s"]
    return row


def _engine(
    cupy: Any, shape: tuple[int, ...], name: str, room: int | None = None, everywhere: bool = False
) -> tuple[Callable[[], None], int]:
    """An engine's iterations as the solver launches them, and the frames of a launch; with support a third as wide as the frame, or all."""
    module = cupy.RawModule(code=SOURCE.read_text())
    kernels = {kernel: module.get_function(kernel) for kernel in KERNELS}
    counts, start, _ = made_frames(shape, 1)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        engine = make_engine(cupy, kernels, shape, name, room)
        number = engine.room
        engine.prepare(number, ITERATIONS)
        # The same crystal everywhere, and in whatever order: what is computed costs the same.
        target = np.sqrt(np.fft.ifftshift(counts[0]) * counts[0].size).astype(np.float32)
        psi, support = np.fft.ifftshift(start.psi[0, 0]), np.fft.ifftshift(start.support[0, 0]).astype(np.uint8)
        support |= np.uint8(everywhere)
        fields = [cupy.asarray(np.repeat(array[None], number, 0)) for array in (psi, support, target)]
        frame_of, numbers = cupy.asarray(np.arange(number, dtype=np.int32)), cupy.zeros((number, 16 + ITERATIONS), np.float64)
        objects = Objects(fields[0], fields[0], fields[1], fields[2], frame_of, numbers)
        step = Iterate("ER", ITERATIONS)
        engine.iterate(objects, number, step, 0.0, 0)
        stream.synchronize()
        if not engine.fixed:

            def launched() -> None:
                with stream:
                    engine.iterate(objects, number, step, 0.0, 0)

            return _waiting(launched, stream), number
        stream.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
        engine.iterate(objects, number, step, 0.0, 0)
        graph = stream.end_capture()
    return _waiting(lambda: graph.launch(stream=stream), stream), number


def _naive_loop(cupy: Any, shape: tuple[int, ...]) -> tuple[Callable[[], None], int]:
    """What one writes by hand in CuPy, on a batch as large as cuFFT's engine takes."""
    number = max(1, 2**20 // math.prod(shape))
    counts, start, _ = made_frames(shape, 1)
    axes = tuple(range(1, 1 + len(shape)))
    magnitude, first, inside = (
        cupy.asarray(np.repeat(np.fft.ifftshift(array)[None], number, 0))
        for array in (np.sqrt(counts[0]).astype(np.float32), start.psi[0, 0], start.support[0, 0])
    )

    def loop() -> None:
        psi, history = first, []
        for _ in range(ITERATIONS):
            field = cupy.fft.fftn(psi, axes=axes, norm="ortho")
            modulus = cupy.abs(field)
            history.append(((modulus - magnitude) ** 2).sum(axes))
            field *= magnitude / cupy.maximum(modulus, np.float32(1e-12))
            psi = cupy.fft.ifftn(field, axes=axes, norm="ortho") * inside
        cupy.cuda.get_current_stream().synchronize()

    return loop, number


def _cohere(shape: tuple[int, ...]) -> tuple[Callable[[], None], int]:
    """cohere's `cp` path, one frame at a time, as it comes. Raises ImportError where it is not installed."""
    from cohere_core.controller import phasing

    counts, start, _ = made_frames(shape, 1)
    first = (np.conj(np.fft.ifftshift(start.psi[0, 0])) / np.sqrt(np.float32(counts[0].size))).astype(np.complex64)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        np.save(Path(folder, "data.npy"), np.sqrt(counts[0]))
        np.save(Path(folder, "image.npy"), first)
        np.save(Path(folder, "support.npy"), np.fft.ifftshift(start.support[0, 0]).astype(np.float32))
        settings = {"algorithm_sequence": f"{ITERATIONS}*ER", "continue_dir": folder}
        rec = phasing.create_rec(settings, str(Path(folder, "data.npy")), "cp", 0, debug=True)
    began = rec.ds_image

    def solve() -> None:
        rec.ds_image, rec.errs = began, []
        with contextlib.redirect_stdout(io.StringIO()):
            rec.iterate()
        load_cupy().cuda.get_current_stream().synchronize()

    return solve, 1


def _rooms(cupy: Any, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Frames a second by the number of them in hand together: where launches cost more than work, and where the card's cache ends."""
    contestants, frames = {}, {}
    for name, rooms in (("cufft", (8, 32, 64, 128, 256)), ("fused", (32, 132, 264, 528, 1056))):
        for room in rooms:
            contestants[f"{name}_{room}"], frames[f"{name}_{room}"] = _engine(cupy, shape, name, room)
    seconds = interleaved(contestants, repeats)
    return {f"{name}_per_s": frames[name] / seconds[name] for name in contestants}


def _path(cupy: Any, shape: tuple[int, ...], number: int, limits: dict[str, Any], repeats: int) -> dict[str, Any]:
    """`solve` from host memory to host memory, on one, two and four threads, beside the kernels and the bus."""
    counts, start, valid = _many(shape, number)
    plan, held = Plan(parse_schedule(ITERATIONS)), free_islands(shape, 0.0)
    solvers = [CudaSolver(shape, plan, 0.0, held) for _ in range(4)]
    kernels, frames = _engine(cupy, shape, solvers[0].engine)
    contestants: dict[str, Callable[[], object]] = {"kernels": kernels}
    for threads in (1, 2, 4):
        works = [lambda solver=solver: solver.solve(counts, start, valid, None) for solver in solvers[:threads]]
        contestants[f"threads_{threads}"] = beside(*works)
    seconds = interleaved(contestants, repeats)
    alone = frames / seconds["kernels"]
    row: dict[str, Any] = {"engine": solvers[0].engine, "kernels_per_s": alone}
    for threads in (1, 2, 4):
        row[f"threads_{threads}_per_s"] = threads * number / seconds[f"threads_{threads}"]
        row[f"threads_{threads}_of_kernels"] = row[f"threads_{threads}_per_s"] / alone
    size = math.prod(shape)
    bus = min(limits["bus_up_bytes_per_s"] / (size * (4 + 8)), limits["bus_down_bytes_per_s"] / (size * (8 + 1)))
    return row | {"bus_allows_per_s": bus, "limit": "bus" if bus < alone else "kernels"}


def _many(shape: tuple[int, ...], number: int) -> tuple[Array, Start, Array]:
    """Some made frames over and over; support and valid one map for all, as a prior's."""
    some = min(number, 16)
    counts, start, valid = made_frames(shape, some)
    again = -(-number // some)
    psi = np.concatenate([start.psi] * again)[:number]
    support = np.broadcast_to(start.support[0, 0], psi.shape)
    unit, distance = (np.concatenate([array] * again)[:number] for array in (start.unit, start.distance))
    return np.concatenate([counts] * again)[:number], Start(psi, support, unit, distance), np.broadcast_to(valid[0], (number, *shape))


def _classify(size: int, kind: str, repeats: int) -> dict[str, Any]:
    """Nanoseconds a pixel from host memory to host memory, K = 3, of frames enough to fill the way."""
    some = synthetic_frames(size)
    prior = synthetic_prior(some, 3)
    counts = np.concatenate([some.astype(kind)] * max(1, 2**26 // some.size))
    classifiers = [CudaClassifier(prior) for _ in range(2)]
    works = [lambda one=one: one.classes(counts, ~prior.invalid) for one in classifiers]
    seconds = interleaved({"one": works[0], "two": beside(*works)}, repeats)
    return {"one_thread_ns_per_pixel": 1e9 * seconds["one"] / counts.size, "two_threads_ns_per_pixel": 5e8 * seconds["two"] / counts.size}
