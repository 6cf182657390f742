"""The mosaic on a card: the same suite over the CPU's overlap, the card's own kernels run on the CPU, and a card where there is one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.fft
from scipy.ndimage import gaussian_filter

from streamprior.arrays import check_backend, cuda_missing
from streamprior.errors import ConfigError
from streamprior.mosaic import cuda
from streamprior.mosaic.cuda import CudaOverlap, independent
from streamprior.mosaic.mosaic import Mosaic, Shot
from streamprior.mosaic.overlap import DIM, CpuOverlap, Overlap, Rule, Shots
from streamprior.mosaic.probe import ProbePlaces
from tests.host_cuda import Card

SHAPE = (24, 20)  # neither square nor a multiple of a block of threads
MODES = 2
CANVAS = (64, 70)

Maker = Callable[[], Overlap]


@pytest.fixture(params=["cpu", "kernels on the cpu", "cuda"])
def overlap(request: pytest.FixtureRequest) -> Maker:
    if request.param == "cpu":
        return lambda: CpuOverlap(SHAPE, MODES)
    if request.param == "cuda":
        missing = cuda_missing()
        if missing is not None:
            pytest.skip(f"no CUDA card: {missing}")
    else:
        request.getfixturevalue("card")
    return lambda: CudaOverlap(SHAPE, MODES)


def a_probe(random: np.random.Generator) -> np.ndarray:
    """(M, H, W): a spot of light with some phase and a weaker one with a node, 1e4 photons."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    spot = np.exp(-((y - 12) ** 2 + (x - 10) ** 2) / 40 + 0.02j * (y - 12) * (x - 9))
    modes = np.stack([spot, 0.3 * (x - 10) / 5 * spot]) + 0.003 * random.normal(size=(MODES, *SHAPE))
    return (modes * np.sqrt(1e4 / (np.abs(modes) ** 2).sum())).astype(np.complex64)


def counted(probe: np.ndarray, corners: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Targets (B, H, W) of a smooth object with photon noise; frames that contradict each other would let rounding grow without bound."""
    across = np.ptp(corners, 0) + SHAPE + 1
    sample = np.exp(4j * gaussian_filter(random.normal(size=across), 2))
    windows = (sample[row : row + SHAPE[0], column : column + SHAPE[1]] for row, column in corners - corners.min(0))
    counts = [random.poisson((np.abs(scipy.fft.fft2(probe * window, norm="ortho")) ** 2).sum(0)) for window in windows]
    return np.sqrt(np.array(counts) * SHAPE[0] * SHAPE[1]).astype(np.float32)


@dataclass(frozen=True)
class Scene:
    places: ProbePlaces
    shots: Shots


def a_scene(seed: int = 0, frames: int = 11, own_trust: bool = False) -> Scene:
    """Frames at random places with fractions of a pixel, some far from each other; parts of them are not measured, parts not believed."""
    random = np.random.default_rng(seed)
    places = ProbePlaces(a_probe(random))
    corners, slots = places.places(random.uniform(0, np.subtract(CANVAS, SHAPE) - 1, (frames, 2)).round(1))
    targets = counted(places.modes, corners, random)
    targets[:, 3:5] = -1
    trust = random.uniform(0.2, 1, (frames if own_trust else 1, *SHAPE)).astype(np.float32)
    return Scene(places, Shots(corners, slots, targets, trust))


class NaivePass:
    """The obvious version of an overlap, in double precision: whole windows, one frame at a time. See kernels.py for the formulas."""

    def __init__(self, places: ProbePlaces) -> None:
        self.image, self.light = np.ones(CANVAS, complex), np.zeros(CANVAS)
        self.total, self.total_light = np.zeros(CANVAS, complex), np.zeros(CANVAS)
        self.probes, self.peak = places.probes.astype(complex), places.peak
        self.gradient, self.dose = np.zeros(self.probes.shape, complex), np.zeros(SHAPE)

    def window(self, shots: Shots, b: int) -> tuple[slice, slice]:
        row, column = shots.corners[b]
        return slice(row, row + SHAPE[0]), slice(column, column + SHAPE[1])

    def held(self, shots: Shots, b: int, under: np.ndarray) -> tuple[np.ndarray, float]:
        """The exit waves after the modulus constraint, and the misfit before it."""
        field = scipy.fft.fft2(self.probes[shots.slots[b]] * under)
        modulus = np.sqrt((np.abs(field) ** 2).sum(0))
        measured, trust = shots.targets[b] >= 0, shots.trust[b % len(shots.trust)]
        factor = np.where(measured, 1 + trust * (shots.targets[b] / modulus - 1), 1)
        return scipy.fft.ifft2(field * factor), float((np.where(measured, modulus - shots.targets[b], 0) ** 2).sum())

    def asked(self, shots: Shots, b: int, under: np.ndarray, wave: np.ndarray) -> np.ndarray:
        probe = self.probes[shots.slots[b]]
        self.gradient[shots.slots[b]] += under.conj() * (wave - probe * under)
        self.dose += np.abs(under) ** 2
        return (probe.conj() * (wave - probe * under)).sum(0)

    def passes(self, shots: Shots, rule: Rule) -> np.ndarray:
        found = []
        for b in range(len(shots)):
            here = self.window(shots, b)
            own = (np.abs(self.probes[shots.slots[b]]) ** 2).sum(0)
            seen = own[self.light[here] > DIM * self.peak].sum() / own.sum()
            old, patch, misfits = self.image[here].copy(), self.image[here].copy(), []
            for _ in range(rule.iterations):
                wave, misfit = self.held(shots, b, patch)
                misfits.append(misfit)
                change = (self.probes[shots.slots[b]].conj() * (wave - self.probes[shots.slots[b]] * old)).sum(0)
                patch = old + change / (own + rule.weight * self.peak + rule.memory * self.light[here])
            self.asked(shots, b, old, wave)
            self.image[here] = patch
            self.light[here] += own * rule.lit
            found.append((misfits[0], misfits[-1], seen))
        return np.array(found)

    def gather(self, shots: Shots) -> np.ndarray:
        found = []
        for b in range(len(shots)):
            here = self.window(shots, b)
            wave, misfit = self.held(shots, b, self.image[here])
            self.total[here] += self.asked(shots, b, self.image[here], wave)
            self.total_light[here] += (np.abs(self.probes[shots.slots[b]]) ** 2).sum(0)
            found.append(misfit)
        return np.array(found)

    def project(self) -> None:
        self.image += self.total / (self.total_light + 1e-3 * self.total_light.max())


def assert_close(found: np.ndarray, wanted: np.ndarray, within: float = 1e-4) -> None:
    """Relative to the largest value; by default more than the rounding of float32 in one pass."""
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= within * np.abs(wanted).max()


def assert_same_gradient(made: Overlap, naive: NaivePass) -> None:
    gradient, dose = made.take_gradient()
    assert_close(gradient, naive.gradient[: len(gradient)])
    assert not naive.gradient[len(gradient) :].any()
    assert_close(dose, naive.dose)


@pytest.mark.parametrize("own_trust", [False, True], ids=["one trust", "a trust for each frame"])
@pytest.mark.parametrize(
    "rule", [Rule(), Rule(1, 0.0, 1.0), Rule(3, 0.2, 0.3), Rule(2, 1.0, 0.0, lit=False)], ids=["first", "mean", "thrice", "again"]
)
def test_a_pass_is_that_of_the_obvious_version(overlap: Maker, rule: Rule, own_trust: bool) -> None:
    scene = a_scene(own_trust=own_trust)
    naive, made = NaivePass(scene.places), overlap()
    canvas = made.canvas(*CANVAS)
    # Twice, so that the second call finds light, buffers that have been used, and a gradient that it adds to.
    for half in (slice(0, 6), slice(6, 11)):
        part = cut(scene.shots, half)
        found = made.passes(canvas, part, scene.places, rule, True)
        wanted = naive.passes(part, rule)
        assert_close(found[:, :2], wanted[:, :2])
        assert_close(1 + found[:, 2], 1 + wanted[:, 2])
    image, light = made.fetch(canvas)
    assert_close(image, naive.image)
    assert_close(1 + light, 1 + naive.light)
    assert_same_gradient(made, naive)


def cut(shots: Shots, part: slice) -> Shots:
    trust = shots.trust if len(shots.trust) == 1 else shots.trust[part]
    return Shots(shots.corners[part], shots.slots[part], shots.targets[part], trust)


@pytest.mark.parametrize("own_trust", [False, True], ids=["one trust", "a trust for each frame"])
def test_the_overlap_projection_is_that_of_the_obvious_version(overlap: Maker, own_trust: bool) -> None:
    scene = a_scene(1, own_trust=own_trust)
    naive, made = NaivePass(scene.places), overlap()
    canvas, total = made.canvas(*CANVAS), made.canvas(*CANVAS)
    total.image[...] = 0
    made.passes(canvas, scene.shots, scene.places, Rule(), False)
    naive.passes(scene.shots, Rule())
    naive.gradient[...], naive.dose[...] = 0, 0
    for half in (slice(0, 4), slice(4, 11)):
        found = made.gather(canvas, total, cut(scene.shots, half), scene.places, True)
        assert_close(found, naive.gather(cut(scene.shots, half)))
    made.project(canvas, total)
    naive.project()
    assert_close(made.fetch(canvas)[0], naive.image)
    assert_close(made.fetch(total)[1], naive.total_light)
    assert_same_gradient(made, naive)


def test_a_gradient_that_has_been_taken_begins_anew(overlap: Maker) -> None:
    scene, made = a_scene(2), overlap()
    canvas = made.canvas(*CANVAS)
    made.passes(canvas, scene.shots, scene.places, Rule(), True)
    assert made.take_gradient()[0].any()
    made.passes(canvas, scene.shots, scene.places, Rule(), False)
    gradient, dose = made.take_gradient()
    assert not gradient.any()
    assert not dose.any()


def test_a_canvas_that_grows_keeps_what_it_holds(overlap: Maker) -> None:
    scene, made = a_scene(3), overlap()
    canvas = made.canvas(*CANVAS)
    made.passes(canvas, scene.shots, scene.places, Rule(), False)
    image, light = made.fetch(canvas)
    grown, brighter = made.fetch(made.grow(canvas, CANVAS[0] + 9, CANVAS[1] + 7, 5, 3))
    assert grown.shape == (CANVAS[0] + 9, CANVAS[1] + 7)
    assert np.array_equal(grown[5 : 5 + CANVAS[0], 3 : 3 + CANVAS[1]], image)
    assert np.array_equal(brighter[5 : 5 + CANVAS[0], 3 : 3 + CANVAS[1]], light)
    assert grown[0, 0] == 1
    assert brighter.sum() == pytest.approx(light.sum())


def test_frames_after_a_refined_probe_see_the_new_one(overlap: Maker) -> None:
    scene, made = a_scene(4), overlap()
    canvas = made.canvas(*CANVAS)
    made.passes(canvas, scene.shots, scene.places, Rule(), True)
    version = scene.places.version
    scene.places.refine(*made.take_gradient(), 1.0)
    assert scene.places.version != version
    positions = np.array([[3.3, 4.7], [30.1, 40.2]])
    corners, slots = scene.places.places(positions)
    shots = replace(cut(scene.shots, slice(0, 2)), corners=corners, slots=slots)
    fresh, naive = made.canvas(*CANVAS), NaivePass(scene.places)
    assert_close(made.passes(fresh, shots, scene.places, Rule(), False)[:, :2], naive.passes(shots, Rule())[:, :2])
    assert_close(made.fetch(fresh)[0], naive.image)


def test_a_block_without_frames_is_nothing(overlap: Maker) -> None:
    scene, made = a_scene(5), overlap()
    canvas, none = made.canvas(*CANVAS), cut(scene.shots, slice(0, 0))
    assert made.passes(canvas, none, scene.places, Rule(), False).shape == (0, 3)
    assert made.gather(canvas, canvas, none, scene.places, False).shape == (0,)


@pytest.mark.parametrize("modes", [1, 2])
def test_a_mosaic_comes_out_alike_on_the_card_and_on_the_cpu(card: Card, modes: int) -> None:
    """With halves in a second thread, a probe that is refined, a canvas that grows, and further passes."""
    random = np.random.default_rng(6)
    probe = a_probe(random)[:modes]
    positions = np.cumsum(random.uniform(0, 9, (20, 2)), 0)
    targets = counted(probe, np.rint(positions).astype(int), random)
    pictures = []
    for backend in (CpuOverlap, CudaOverlap):
        mosaic = Mosaic(probe, Rule(), lambda backend=backend: backend(SHAPE, modes), gain=0.1)  # type: ignore[misc]
        passed = mosaic.add(
            [Shot(i, (row, column), target) for i, ((row, column), target) in enumerate(zip(positions, targets, strict=True))]
        )
        for _ in mosaic.sweep():
            pass
        for _ in mosaic.average():
            pass
        pictures.append((mosaic.picture(), mosaic.chi2(), np.array([(one.before, one.overlap) for one in passed])))
        mosaic.close()
    (ours, chi2, found), (theirs, wanted_chi2, wanted) = pictures[1], pictures[0]
    assert ours is not None
    assert theirs is not None
    assert_close(found, wanted)
    assert chi2 == pytest.approx(wanted_chi2, rel=1e-4)
    for name in ("image", "odd", "even", "light", "probe"):
        assert_close(getattr(ours, name), getattr(theirs, name), 1e-3)  # rounding grows with the passes


def test_the_order_of_threads_changes_no_bit(card: Card) -> None:
    scene, results = a_scene(7), []
    for descending in (False, True):
        card.descending = descending
        made = CudaOverlap(SHAPE, MODES)
        canvas, total = made.canvas(*CANVAS), made.canvas(*CANVAS)
        misfit = made.passes(canvas, scene.shots, scene.places, Rule(2), True)
        gathered = made.gather(canvas, total, scene.shots, scene.places, True)
        results.append((misfit, gathered, *made.fetch(canvas), *made.fetch(total), *made.take_gradient()))
    for one, other in zip(*results, strict=True):
        assert np.array_equal(one, other)


def test_a_call_waits_for_the_card_once(card: Card) -> None:
    scene, made = a_scene(8, frames=30), CudaOverlap(SHAPE, MODES)
    canvas = made.canvas(*CANVAS)
    before = card.waits
    made.passes(canvas, scene.shots, scene.places, Rule(3), True)
    assert card.waits == before + 1
    made.gather(canvas, canvas, scene.shots, scene.places, True)
    assert card.waits == before + 2


def test_batches_larger_than_the_buffers_are_cut(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = a_scene(9)
    # Spread out, so that all frames make one group.
    corners = np.stack(np.divmod(np.arange(11), 4), 1) * SHAPE
    shots = replace(scene.shots, corners=corners)
    results = []
    for largest in (cuda._LARGEST_BATCH, 3):
        monkeypatch.setattr(cuda, "_LARGEST_BATCH", largest)
        made = CudaOverlap(SHAPE, MODES)
        canvas, total = made.canvas(72, 80), made.canvas(72, 80)
        misfit = made.passes(canvas, shots, scene.places, Rule(2), False)
        gathered = made.gather(canvas, total, scene.shots, scene.places, False)
        results.append((misfit, gathered, *made.fetch(canvas), *made.fetch(total)))
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("seed", range(5))
def test_groups_hold_apart_what_overlaps_and_keep_its_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    corners = random.integers(-40, 60, (60, 2))
    groups = independent(corners, SHAPE)
    assert sorted(np.concatenate(groups)) == list(range(60))
    group_of = {int(frame): number for number, group in enumerate(groups) for frame in group}

    def overlapping(a: int, b: int) -> bool:
        return bool((np.abs(corners[a] - corners[b]) < SHAPE).all())

    for late in range(60):
        before = [group_of[early] for early in range(late) if overlapping(early, late)]
        assert group_of[late] == max(before, default=-1) + 1


def test_groups_of_windows_that_touch_are_one() -> None:
    touching = np.array([[0, 0], [0, SHAPE[1]], [SHAPE[0], 0], [SHAPE[0], SHAPE[1]]])
    assert [group.tolist() for group in independent(touching, SHAPE)] == [[0, 1, 2, 3]]
    assert [group.tolist() for group in independent(touching - [[0, 0], [0, 1], [1, 0], [1, 1]], SHAPE)] == [[0], [1], [2], [3]]
    assert independent(np.zeros((0, 2), np.int64), SHAPE) == []


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_kernels_compile_for_a_card(architecture: str, tmp_path: Path) -> None:
    """A100; H100 and H200."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the kernels cannot be compiled for a card")
    command = [nvcc, "-cubin", f"-arch={architecture}", "--Werror", "all-warnings", "-o", str(tmp_path / "k.cubin"), str(cuda.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = (tmp_path / "k.cubin").read_bytes()
    assert all(name.encode() in code for name in cuda.KERNELS)


def test_auto_takes_a_card_where_there_is_one_and_the_caller_can(card: Card) -> None:
    assert check_backend("auto", ("cpu", "cuda")) == "cuda"
    assert check_backend("cuda", ("cpu", "cuda")) == "cuda"
    assert check_backend("cpu", ("cpu", "cuda")) == "cpu"
    assert check_backend("auto") == "cpu"
    with pytest.raises(ConfigError, match="computes on the CPU only"):
        check_backend("cuda")


def without_a_library() -> int:
    raise RuntimeError("CuPy failed to load libnvrtc.so.13:\n no such file")


@pytest.mark.parametrize(
    ("cupy", "says"),
    [
        (None, r"cupy cannot be imported .*pip install 'streamprior\[gpu\]'"),
        (SimpleNamespace(__version__="14", is_available=lambda: False), "cupy 14 finds no CUDA card; see that nvidia-smi lists one"),
        (
            SimpleNamespace(
                __version__="14", is_available=lambda: True, cuda=SimpleNamespace(nvrtc=SimpleNamespace(getVersion=without_a_library))
            ),
            "lacks NVRTC or cuFFT .*libnvrtc.so.13: no such file.*extra 'ctk'",
        ),
    ],
    ids=["no cupy", "no card", "no compiler"],
)
def test_without_a_card_auto_is_the_cpu_and_cuda_says_what_is_missing(cupy: Any, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert check_backend("auto", ("cpu", "cuda")) == "cpu"
    with pytest.raises(ConfigError, match=says):
        check_backend("cuda", ("cpu", "cuda"))
    with pytest.raises(ConfigError, match=says):
        CudaOverlap(SHAPE, MODES)


def test_a_word_that_names_no_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="'rocm'"):
        check_backend("rocm", ("cpu", "cuda"))
