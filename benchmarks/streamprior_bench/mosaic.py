"""Ptychography passes a second at 128 x 128: ours on one and on two cores, the planned FFTs alone, a plain scipy ePIE, and Pty-Chi.

A frame-pass is one frame put into one mosaic once. With halves, every frame is put into two: the whole, and the half that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.arrays import cuda_missing, make_plan
from streamprior.mosaic.cuda import CudaOverlap
from streamprior.mosaic.mosaic import SWEEP, Mosaic, Shot
from streamprior.mosaic.overlap import CpuOverlap, Rule
from streamprior_bench.measure import interleaved

SIZE = 128
FRAMES = 196
STEP = 12
"""Pixels between positions: 14 x 14 of them, as in the line scans that the rates are for."""

Array = npt.NDArray[Any]


def run(repeats: int = 5) -> Iterator[dict[str, Any]]:
    """Yield rows for one core with one and two modes, for two cores, for a refined probe, for Pty-Chi, and for a card if there is one."""
    for modes in (1, 2):
        yield _one_core(modes, repeats)
    yield _two_cores(repeats)
    yield _daemon_defaults(repeats)
    yield _ptychi(repeats)
    yield from _card(repeats)


def _one_core(modes: int, repeats: int) -> dict[str, Any]:
    shots, probe = _scan(modes)
    mosaic = _mosaic(probe, halves=False)
    mosaic.add(shots)
    plan = make_plan((SIZE, SIZE), batch=modes)
    plan.psi[...] = np.random.default_rng(0).normal(size=plan.psi.shape)  # a constant would transform to denormal numbers, which are slow

    def floor() -> None:
        for _ in range(FRAMES):
            plan.forward()
            plan.backward()

    seconds = interleaved({"ours": lambda: mosaic.add(shots), "scipy": lambda: _scipy_epie(shots, probe), "floor": floor}, repeats)
    rates = {name: FRAMES / spent for name, spent in seconds.items()}
    return {
        "what": f"one pass a frame, {modes} mode{'s' if modes > 1 else ''}, one core",
        "engine": plan.engine,
        "ours_passes_per_s": rates["ours"],
        "scipy_epie_passes_per_s": rates["scipy"],
        "fft_floor_passes_per_s": rates["floor"],
        "ours_over_scipy": rates["ours"] / rates["scipy"],
        "ours_over_floor": rates["ours"] / rates["floor"],
    }


def _two_cores(repeats: int) -> dict[str, Any]:
    """The whole and its halves: in two threads as the daemon does it, and the same passes in one."""
    shots, probe = _scan(1)
    beside = _mosaic(probe, halves=True)
    alone = [_mosaic(probe, halves=False) for _ in range(3)]
    parts = [shots, shots[0::2], shots[1::2]]
    beside.add(shots)
    for mosaic, part in zip(alone, parts, strict=True):
        mosaic.add(part)

    def one_after_another() -> None:
        for mosaic, part in zip(alone, parts, strict=True):
            mosaic.add(part)

    seconds = interleaved({"one": one_after_another, "two": lambda: beside.add(shots)}, repeats)
    return {
        "what": "one pass a frame into the whole and its half, 1 mode",
        "one_core_frames_per_s": FRAMES / seconds["one"],
        "two_cores_frames_per_s": FRAMES / seconds["two"],
        "two_cores_passes_per_s": 2 * FRAMES / seconds["two"],
        "two_over_one": seconds["one"] / seconds["two"],
    }


def _daemon_defaults(repeats: int) -> dict[str, Any]:
    """What a frame costs with the probe refined, and in a pass after the run."""
    shots, probe = _scan(2)
    refined = Mosaic(probe, Rule(), lambda: CpuOverlap((SIZE, SIZE), 2), gain=0.5)
    plain = Mosaic(probe, Rule(), lambda: CpuOverlap((SIZE, SIZE), 2))
    for mosaic in (refined, plain):
        mosaic.add(shots)

    def swept(mosaic: Mosaic, pieces: Callable[[Mosaic], Iterator[float]]) -> None:
        mosaic.kept = type(mosaic.kept)(shots)
        for _ in pieces(mosaic):
            pass

    seconds = interleaved(
        {
            "plain": lambda: plain.add(shots),
            "refined": lambda: refined.add(shots),
            "sweep": lambda: swept(refined, lambda one: one.sweep(SWEEP)),
            "average": lambda: swept(refined, lambda one: one.average()),
        },
        repeats,
    )
    return {
        "what": "2 modes with halves, two cores",
        "frames_per_s": FRAMES / seconds["plain"],
        "probe_refined_frames_per_s": FRAMES / seconds["refined"],
        "sweep_frames_per_s": FRAMES / seconds["sweep"],
        "average_frames_per_s": FRAMES / seconds["average"],
    }


def _ptychi(repeats: int) -> dict[str, Any]:
    """Pty-Chi's best rate over its algorithms, batches and threads; its epochs are timed by itself."""
    shots, probe = _scan(1)
    mosaic = _mosaic(probe, halves=False)
    mosaic.add(shots)
    best: dict[str, Any] = {"what": "Pty-Chi, best of ePIE, rPIE, LSQML and AD, batches of 8, 32 and 96, 1 and 2 threads"}
    try:
        from streamprior_bench.offline import PtyChiSettings, ptychi_solve

        counts = np.stack([scipy.fft.fftshift(shot.target**2 / SIZE**2) for shot in shots])
        positions = np.array([shot.position for shot in shots])
        rates = {}
        for algorithm in ("ePIE", "rPIE", "LSQML", "AD"):
            for batch in (8, 32, 96):
                for threads in (1, 2):
                    settings = PtyChiSettings(algorithm=algorithm, epochs=4, batch=batch, threads=threads, probe_from=None, strength=0.1)
                    solved = ptychi_solve(counts, probe, positions, settings)
                    # The first epoch compiles and allocates.
                    rates[f"{algorithm}, batch {batch}, {threads} threads"] = FRAMES / float(np.median(solved.epoch_s[1:]))
    except (ModuleNotFoundError, RuntimeError) as error:
        return best | {"note": f"not run: {error}"}
    name = max(rates, key=lambda one: rates[one])
    beside = _mosaic(probe, halves=True)
    beside.add(shots)
    ours = interleaved({"one": lambda: mosaic.add(shots), "two": lambda: beside.add(shots)}, repeats)
    return best | {
        "fastest": name,
        "ptychi_passes_per_s": rates[name],
        "ours_one_core_passes_per_s": FRAMES / ours["one"],
        "ours_two_cores_passes_per_s": 2 * FRAMES / ours["two"],
        "ours_over_ptychi": 2 * FRAMES / ours["two"] / rates[name],
    }


def _card(repeats: int) -> Iterator[dict[str, Any]]:
    """The same on a CUDA card, where there is one."""
    if cuda_missing() is not None:
        return

    shots, probe = _scan(1)
    for halves in (False, True):
        mosaic = Mosaic(probe, Rule(), lambda: CudaOverlap((SIZE, SIZE), 1), halves=halves)
        mosaic.add(shots)
        seconds = interleaved({"card": lambda mosaic=mosaic: mosaic.add(shots)}, repeats)
        yield {"what": f"one pass a frame, 1 mode, CUDA, {'with' if halves else 'no'} halves", "frames_per_s": FRAMES / seconds["card"]}


def _mosaic(probe: Array, halves: bool) -> Mosaic:
    return Mosaic(probe, Rule(), lambda: CpuOverlap((SIZE, SIZE), len(probe)), halves)


def _scan(modes: int) -> tuple[list[Shot], Array]:
    """Frames of a made object under a made probe, at positions between pixels."""
    rng = np.random.default_rng(0)
    y, x = np.indices((SIZE, SIZE)) - SIZE // 2
    first = np.exp(-(y**2 + x**2) / (2 * 14.0**2) + 2j * np.pi * (y**2 + x**2) / 900)
    probe = np.stack([first * np.where(m, 0.3 * x / 14, 1) for m in range(modes)]).astype(np.complex64)
    probe *= np.float32(np.sqrt(1e6 / (np.abs(probe) ** 2).sum()))
    side = STEP * 13 + SIZE + 8
    sample = np.exp(1j * scipy.fft.ifft2(scipy.fft.fft2(rng.normal(size=(side, side))) * np.exp(-200 * scipy.fft.fftfreq(side) ** 2)).real)
    shots = []
    for i in range(FRAMES):
        row, column = STEP * (i // 14) + 2, STEP * (i % 14) + 2
        field = scipy.fft.fft2(probe * sample[row : row + SIZE, column : column + SIZE], norm="ortho")
        counts = rng.poisson((np.abs(field) ** 2).sum(0))
        target = np.sqrt(counts.astype(np.float32) * np.float32(SIZE * SIZE))
        shots.append(Shot(i, (row + float(rng.integers(0, 16)) / 16, column + float(rng.integers(0, 16)) / 16), target))
    return shots, probe


def _scipy_epie(shots: list[Shot], probe: Array) -> Array:
    """What one writes by hand, and well: single precision, FFT order, one worker, whole pixels."""
    rows, columns = (int(max(shot.position[axis] for shot in shots)) + SIZE + 2 for axis in (0, 1))
    image = np.ones((rows, columns), np.complex64)
    brightest = (np.abs(probe) ** 2).sum(0).max()
    conjugate = probe.conj() / brightest
    for shot in shots:
        row, column = int(shot.position[0]), int(shot.position[1])
        seen = image[row : row + SIZE, column : column + SIZE]
        psi = probe * seen
        field = scipy.fft.fft2(psi, workers=1)
        modulus = np.sqrt((np.abs(field) ** 2).sum(0))
        field *= shot.target / np.maximum(modulus, np.float32(1e-12))
        seen += (conjugate * (scipy.fft.ifft2(field, workers=1) - psi)).sum(0)
    return image
