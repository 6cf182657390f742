"""Prepared frames of Set 1 -> their objects: many starts each, the best kept, then once more from the neighbours' objects."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import local
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from scipy.fft import fftshift, ifftn, ifftshift
from scipy.ndimage import binary_dilation

from streamprior import __version__
from streamprior.align import twin
from streamprior.prior import Library
from streamprior.records import FLAT, Photons, Start
from streamprior.stages.match import MARGIN, Nearest, cells
from streamprior.stages.refine import Solver
from streamprior.stages.schedule import Plan, parse_schedule
from streamprior.train.region import Tick

AUTOCORRELATION = 0.04
"""Part of the maximum at which the autocorrelation is cut for the first support (Marchesini 2003)."""

SMALLEST, LARGEST = 0.002, 0.25
"""Area of a support as part of the frame. Below, nothing can be refined; above, the sampling no longer determines a phase."""

SUPPORT = 0.1
"""Part of an object's largest modulus that still counts as the object."""

CELLS = 32
"""Fewest cells a side that frames are compared in: on 64 x 64 crystals 32 chose as well as 64, 16 a little worse."""


@dataclass(frozen=True)
class Solved:
    """Objects of N frames. psi : (N, ...) complex64, centre of mass in the middle, sum |psi|^2 = 1. support : (N, ...) bool.

    chi2, floor : (N,), of each object against its frame.
    """

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    chi2: npt.NDArray[np.float64]
    floor: npt.NDArray[np.float64]


@dataclass(frozen=True)
class SolveSettings:
    """How objects are solved offline: `starts` random ones through `schedule`, then `neighbours` objects through `polish`."""

    schedule: str
    starts: int
    polish: str
    neighbours: int
    seed: int = 0


def solve_frames(photons: Photons, settings: SolveSettings, tick: Tick, keep: Path | None = None) -> Solved:
    """Solve every frame by itself, then try its neighbours' objects as starts.

    Of a frame's runs the one of lowest chi2 is kept. On 56 simulated crystals chi2 ranked 16 runs of the same schedule like the object
    error (rank correlation 0.54), the free log-likelihood of 5 % held-out pixels less well (0.23): docs/decisions/0011.

    Parameters
    ----------
    photons : Photons
        counts (N, H, W) or (N, D, H, W); valid like counts.
    tick : callable
        tick(stage, done, total), with the stages "solve" and "polish".
    keep : Path, optional
        Folder in which each solved frame is kept, so that training goes on where it was stopped; a frame is known again by its counts,
        its valid map and the settings.
    """
    alone = _Runner(photons, settings.schedule)
    found = list(_each(lambda i: _kept(keep, alone, i, settings), len(photons.counts), "solve", tick))
    solved = Solved(*(np.stack(part) for part in zip(*found, strict=True)))
    if not settings.neighbours or len(found) < 2:
        return solved
    near = _neighbours(photons, solved, settings.neighbours)
    again = _Runner(photons, settings.polish)
    better = list(_each(lambda i: _polished(again, i, solved, near[i]), len(found), "polish", tick))
    return Solved(*(np.stack(part) for part in zip(*better, strict=True)))


One = tuple[npt.NDArray[np.complex64], npt.NDArray[np.bool_], float, float]
"""psi, support, chi2 and floor of one frame."""


class _Runner:
    """Owns a solver for each thread that runs one schedule on the frames at hand."""

    def __init__(self, photons: Photons, schedule: str) -> None:
        self.photons = photons
        self._valid = np.broadcast_to(photons.valid, photons.counts.shape)
        self._plan = Plan(parse_schedule(schedule))
        self._mine = local()

    def counts(self, i: int) -> npt.NDArray[np.float32]:
        """Frame i, zero where nothing was measured."""
        return np.where(self._valid[i], self.photons.counts[i], np.float32(0))

    def valid(self, i: int) -> npt.NDArray[np.bool_]:
        return np.asarray(self._valid[i])

    def run(self, i: int, psi: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> One:
        """One run on frame i; psi at any scale."""
        if not hasattr(self._mine, "solver"):
            self._mine.solver = Solver(self.photons.counts.shape[1:], self._plan, engine="repeatable")
        counts = self.counts(i)[None]
        scale = np.sqrt(counts.sum(dtype=np.float64) / max(float(np.sum(np.abs(psi) ** 2)), np.finfo(np.float32).tiny))
        one = Start(
            (psi * scale).astype(np.complex64)[None, None],
            support[None, None],
            np.full((1, 1), FLAT, np.int32),
            np.zeros((1, 1), np.float32),
        )
        found = self._mine.solver.solve(counts, one, self._valid[i][None], None)
        chi2 = float(found.chi2[0])
        return found.psi[0], found.support[0], chi2 if np.isfinite(chi2) else np.inf, float(found.floor[0])


def _each(work: Callable[[int], One], number: int, stage: str, tick: Tick) -> Iterator[One]:
    """The frames' results in order, on as many threads as there are cores: the kernels run without the GIL, and frames are independent."""
    tick(stage, 0, number)
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
        try:
            for done, one in enumerate(threads.map(work, range(number))):
                tick(stage, done + 1, number)
                yield one
        finally:  # of a training that is stopped nobody waits for the frames that have not begun
            threads.shutdown(cancel_futures=True)


def _kept(keep: Path | None, runner: _Runner, i: int, settings: SolveSettings) -> One:
    """Frame i from the folder where it was solved before, or solved now."""
    name = _digest(runner, i, settings)
    file = None if keep is None else keep / f"{name}-{__version__}.h5"
    before = None if file is None else _read(file)
    if before is not None:
        return before
    psi, support, chi2, floor = _solve(runner, i, settings, int(name, 16))
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Two frames may be equal to the last photon and be solved at the same time, and so may two trainings.
        partial = file.with_suffix(f".{os.getpid()}-{i}.partial")
        with h5py.File(partial, "w") as stored:
            stored["psi"], stored["support"] = psi, support
            stored.attrs["chi2"], stored.attrs["floor"] = chi2, floor
        partial.replace(file)
    return psi, support, chi2, floor


def _read(file: Path) -> One | None:
    """A frame that was solved before; None where it is not there, or cut short when training was stopped: it is then solved again."""
    try:
        with h5py.File(file) as stored:
            return stored["psi"][()], stored["support"][()], float(stored.attrs["chi2"]), float(stored.attrs["floor"])
    except (OSError, KeyError):
        return None


def _digest(runner: _Runner, i: int, settings: SolveSettings) -> str:
    plain = json.dumps([settings.schedule, settings.starts, settings.seed, runner.photons.counts.shape[1:]])
    digest = hashlib.blake2b(plain.encode(), digest_size=16)
    digest.update(runner.counts(i).tobytes())
    digest.update(np.packbits(runner.valid(i)).tobytes())
    return digest.hexdigest()


def _solve(runner: _Runner, i: int, settings: SolveSettings, seed: int) -> One:
    """The best of the random starts of frame i. Its random numbers are its own: they depend on no other frame, nor on the threads."""
    rng = np.random.default_rng(seed)
    support = autocorrelation_support(runner.photons.counts[i])
    best: One | None = None
    for _ in range(settings.starts):
        phases = np.exp(2j * np.pi * rng.random(support.shape))
        best = _better(best, runner.run(i, (support * phases).astype(np.complex64), support))
    assert best is not None
    return canonical(best[0]), *_shape_of(best)


def _polished(runner: _Runner, i: int, solved: Solved, near: npt.NDArray[np.intp]) -> One:
    best: One = (solved.psi[i], solved.support[i], float(solved.chi2[i]), float(solved.floor[i]))
    for j in near:
        best = _better(best, runner.run(i, solved.psi[j], binary_dilation(solved.support[j], iterations=MARGIN)))
    return canonical(best[0]), *_shape_of(best)


def _better(best: One | None, other: One) -> One:
    return other if best is None or other[2] < best[2] else best


def _shape_of(one: One) -> tuple[npt.NDArray[np.bool_], float, float]:
    """The support of the canonical object: by its own modulus, as shrink-wrap's is wider by its blur."""
    modulus = np.abs(canonical(one[0]))
    return modulus > SUPPORT * modulus.max(), one[2], one[3]


def _neighbours(photons: Photons, solved: Solved, number: int) -> npt.NDArray[np.intp]:
    """(N, number) the other frames whose objects' moduli are nearest to each frame."""
    nearest = Nearest(plain_library(photons, solved))
    wanted = min(number + 1, len(solved.psi))
    units, _, _ = nearest.order(photons, wanted)
    return np.stack([row[row != i][: wanted - 1] for i, row in enumerate(units)])


def plain_library(photons: Photons, solved: Solved, dark: npt.NDArray[np.bool_] | None = None) -> Library:
    """Every solved frame a prototype of its own, without a map; `dark` (N, ...) marks pixels whose counts are noise and taken as none."""
    number = len(solved.psi)
    cell = cell_of(photons.counts.shape[1:])
    counts = np.where(photons.valid if dark is None else photons.valid & ~dark, photons.counts, np.float32(0))
    return Library(
        psi=solved.psi,
        support=solved.support,
        control=control_of(solved.support),
        place=np.zeros((number, 2), np.int32),
        members=np.ones(number, np.int32),
        coherence=np.ones(number, np.float32),
        patterns=np.sqrt(np.stack([cells(one, cell, np.sum) for one in counts])).astype(np.float32),
        unit=np.arange(number, dtype=np.int32),
        cell=cell,
        gate=100.0,
    )


def control_of(supports: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The flat start's support: where three objects in ten are, widened as a prototype's is; the most frequent pixel where that is none."""
    votes = supports.mean(0)
    return np.asarray(binary_dilation(votes >= min(0.3, votes.max()), iterations=MARGIN))


def cell_of(shape: Iterable[int]) -> int:
    """Pixels a side of the cells that frames are compared in: the largest that divides every side and leaves CELLS of them."""
    sides = tuple(shape)
    return max(cell for cell in range(1, max(2, min(sides) // CELLS + 1)) if all(side % cell == 0 for side in sides))


def canonical(psi: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """One frame for all objects of the same diffraction: centre of mass in the middle, one of the two twins, the phase at rest, energy 1.

    Of the twins that whose modulus is skewed towards larger indices. The mean phase, weighed by |psi|^2, becomes 0. The phase ramp stays:
    it is where the frame's diffraction lies. Whole pixels, so that a support stays sharp.
    """
    centred = _centred(psi)
    weight = np.abs(centred) ** 2
    total = float(weight.sum())
    if not total > 0:
        return np.zeros_like(psi)
    skews = []
    for axis, size in enumerate(psi.shape):
        profile = weight.sum(tuple(a for a in range(psi.ndim) if a != axis))
        place = np.arange(size) - size // 2
        skews.append(float(profile @ (place - profile @ place / total) ** 3))
    if max(skews, key=abs) < 0:
        centred = _centred(twin(centred))
        weight = np.abs(centred) ** 2
    mean = complex((centred * weight).sum())
    turn = np.conj(mean) / abs(mean) if mean else 1.0
    return np.asarray(centred * (turn / np.sqrt(total)), np.complex64)


def _centred(psi: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The object with its centre of mass moved to the middle by whole pixels; the field is periodic, so the mean is that of angles."""
    weight = np.abs(psi) ** 2
    shifts = []
    for axis, size in enumerate(psi.shape):
        profile = weight.sum(tuple(a for a in range(psi.ndim) if a != axis))
        turn = np.angle(np.sum(profile * np.exp(2j * np.pi * np.arange(size) / size)))
        shifts.append(size // 2 - round(float(turn) * size / (2 * np.pi)))
    return np.roll(psi, shifts, tuple(range(psi.ndim)))


def autocorrelation_support(counts: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Where the autocorrelation of the object, the transform of its counts, exceeds AUTOCORRELATION of its maximum.

    Prepared counts, whose unmeasured pixels hold their nearest measured neighbour: zeros behind a beam stop take the low frequencies away,
    and the support comes out too large (full solve of crystals behind a stop of 3 px: object error 0.43 with zeros, 0.24 with neighbours).
    """
    autocorrelation = np.abs(fftshift(ifftn(ifftshift(counts))))
    inside = autocorrelation > AUTOCORRELATION * autocorrelation.max()
    area = np.count_nonzero(inside)
    allowed = min(max(area, int(np.ceil(SMALLEST * inside.size))), int(LARGEST * inside.size))
    if area == allowed:
        return np.asarray(inside)
    chosen = np.zeros(inside.size, np.bool_)
    chosen[np.argsort(-autocorrelation, axis=None, kind="stable")[:allowed]] = True
    return chosen.reshape(inside.shape)
