"""What refinement promises: the naive version's numbers, cohere's numbers, the same bits everywhere, and no crash on any input."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

import streamprior as sp
from streamprior import arrays
from streamprior.config import state_folder
from streamprior.errors import ConfigError
from streamprior.records import FLAT, UNUSED, Batch, Detector, Flag, Photons, Reconstruction, RunStarted, Start
from streamprior.stages.refine import Refiner, Solver, free_islands, poisson_llk
from streamprior.stages.schedule import Iterate, Plan, Schedule, ShrinkWrap, parse_schedule
from streamprior.stages.shrink import blurred_modulus, shrink_wrap
from tests import naive_refine as naive

Array = npt.NDArray[Any]
DATA = "entry_1/instrument_1/detector_1/data"
RUN = RunStarted("r", "s", "1", 0.0, None, Detector())


@pytest.fixture(scope="module")
def rocking_curve(data_folder: Path) -> Array:
    """(B, 128, 128) int32, photons: every fourth bright frame of the measured rocking curve, its peak in the centre."""
    with h5py.File(data_folder / "bcdi_gold_rocking_curve.cxi") as file:
        curve = file[DATA][()]
    row, column = np.unravel_index(curve.sum(0).argmax(), curve.shape[1:])
    return curve[curve.sum((1, 2)) > 5e4][::4, row - 64 : row + 64, column - 64 : column + 64]


@pytest.fixture(scope="module")
def volume(data_folder: Path) -> Array:
    """(64, 64, 64) uint32, photons: a measured volume."""
    return np.load(data_folder / "bcdi_gold_64cube_set1_set2.npz")["set1"]


def rough(counts: Array, support: Array, seed: int = 0) -> Array:
    """A start of the frames' energy with random phases of up to 1 rad in the support, so that no symmetry hides a mistake."""
    phase = np.random.default_rng(seed).uniform(-1, 1, counts.shape)
    energy = counts.reshape(len(counts), -1).sum(1).reshape(-1, *[1] * support.ndim)
    return (support * np.sqrt(energy / support.sum()) * np.exp(1j * phase)).astype(np.complex64)


def simulated(number: int = 2, shape: tuple[int, ...] = (32, 28), seed: int = 0) -> tuple[Array, Array, Array]:
    """counts, start, support of a made object: what is fast to refine where measured frames add nothing."""
    rng = np.random.default_rng(seed)
    support = naive.centred_box(shape, 10)
    objects = support * rng.uniform(3, 9, (number, *shape)) * np.exp(1j * rng.uniform(0, 2, (number, *shape)))
    counts = np.stack([rng.poisson(np.abs(naive.forward(psi)) ** 2) for psi in objects])
    return counts, rough(counts, support), support


def single(start: Array, support: Array) -> Start:
    """The record of one arm a frame."""
    unit = np.full((len(start), 1), FLAT, np.int32)
    return Start(start[:, None], np.broadcast_to(support, start.shape)[:, None], unit, np.full(unit.shape, np.nan, np.float32))


def same(one: Reconstruction, other: Reconstruction) -> None:
    """Every bit of two reconstructions agrees."""
    for name in ("psi", "support", "chi2", "history", "floor", "r_factor", "free_llk", "flags", "kept"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("masked", [False, True])
def test_fifty_er_agree_with_the_naive_version_on_measured_frames(rocking_curve: Array, masked: bool) -> None:
    counts = rocking_curve[5:8]
    support = naive.centred_box((128, 128), 40)
    valid = np.ones((128, 128), bool)
    if masked:  # a gap and a beam stop
        valid[70:74] = False
        valid[62:67, 62:67] = False
    start = rough(counts, support)
    ours = sp.refine(counts, start, support, valid=valid)
    for i in range(len(counts)):
        psi, history = naive.refine(counts[i], start[i], support, ["ER"] * 50, valid)
        np.testing.assert_allclose(ours.history[i], history, rtol=1e-4)
        np.testing.assert_allclose(ours.psi[i], psi, atol=1e-3 * np.abs(psi).max())
    assert (ours.flags == 0).all()
    np.testing.assert_array_equal(ours.chi2, ours.history[:, -1])


def test_fifty_er_agree_with_the_naive_version_on_a_measured_volume(volume: Array) -> None:
    support = naive.centred_box(volume.shape, 24)
    start = rough(volume[None], support)
    ours = sp.refine(volume[None], start, support)
    psi, history = naive.refine(volume, start[0], support, ["ER"] * 50, np.ones(volume.shape, bool))
    np.testing.assert_allclose(ours.history[0], history, rtol=1e-4)
    np.testing.assert_allclose(ours.psi[0], psi, atol=1e-3 * np.abs(psi).max())


def test_fifty_er_agree_with_cohere_on_a_measured_volume(volume: Array, tmp_path: Path) -> None:
    phasing = pytest.importorskip("cohere_core.controller.phasing", reason="cohere-core is a comparator of the tests only")
    support = naive.centred_box(volume.shape, 24)
    start = rough(volume[None], support)
    # cohere's forward transform has the other sign, so its object is the conjugate; its transforms are not unitary, its arrays not centred.
    np.save(tmp_path / "data.npy", np.sqrt(volume.astype(np.float32)))
    np.save(tmp_path / "image.npy", np.conj(np.fft.ifftshift(start[0])) / np.sqrt(volume.size))
    np.save(tmp_path / "support.npy", np.fft.ifftshift(support).astype(np.float32))
    settings = {"algorithm_sequence": "51*ER", "continue_dir": str(tmp_path)}
    theirs = phasing.create_rec(settings, str(tmp_path / "data.npy"), "np", -1, debug=True)
    theirs.iterate()
    # cohere notes the error before each iteration, we after it.
    np.testing.assert_allclose(sp.refine(volume[None], start, support).history[0], theirs.errs[1:], rtol=0.01)


@pytest.mark.parametrize("rule", ["HIO", "RAAR"])
def test_feedback_rules_agree_with_the_naive_version(rocking_curve: Array, rule: str) -> None:
    counts = rocking_curve[6:7]
    support = naive.centred_box((128, 128), 40)
    start = rough(counts, support)
    ours = sp.refine(counts, start, support, schedule=f"5*ER+10*{rule}+5*ER")
    _, history = naive.refine(counts[0], start[0], support, ["ER"] * 5 + [rule] * 10 + ["ER"] * 5, np.ones((128, 128), bool))
    np.testing.assert_allclose(ours.history[0], history, rtol=1e-3)


@pytest.mark.parametrize("shape", [(31, 27), (15, 16, 13)])
def test_odd_extents_are_centred_as_the_naive_version_centres_them(shape: tuple[int, ...]) -> None:
    counts, start, support = simulated(1, shape)
    ours = sp.refine(counts, start, support, iterations=20)
    psi, history = naive.refine(counts[0], start[0], support, ["ER"] * 20, np.ones(shape, bool))
    np.testing.assert_allclose(ours.history[0], history, rtol=1e-4)
    np.testing.assert_allclose(ours.psi[0], psi, atol=1e-4 * np.abs(psi).max())


@pytest.mark.parametrize("rule", ["ER", "HIO"])
def test_a_proximal_weight_draws_every_iteration_to_the_start(rule: str) -> None:
    counts, start, support = simulated(1)
    ours = sp.refine(counts, start, support, schedule=f"12*{rule}", weight=0.3)
    psi, history = naive.refine(counts[0], start[0], support, [rule] * 12, np.ones(counts.shape[1:], bool), weight=0.3)
    np.testing.assert_allclose(ours.history[0], history, rtol=1e-4)
    np.testing.assert_allclose(ours.psi[0], psi, atol=1e-4 * np.abs(psi).max())


def test_the_numbers_of_a_reconstruction_are_those_of_its_object() -> None:
    counts, start, support = simulated()
    result = sp.refine(counts, start, support, iterations=7)
    for i in range(len(counts)):
        modulus, magnitude = np.abs(naive.forward(result.psi[i])), np.sqrt(counts[i])
        scale = (modulus * magnitude).sum() / (modulus**2).sum()
        assert result.chi2[i] == pytest.approx(((modulus - magnitude) ** 2).sum() / counts[i].sum(), rel=1e-4)
        assert result.floor[i] == pytest.approx(counts[i].size / (4 * counts[i].sum()), rel=1e-6)
        assert result.r_factor[i] == pytest.approx(np.abs(magnitude - scale * modulus).sum() / magnitude.sum(), rel=1e-4)
    assert np.isnan(result.free_llk).all()
    assert result.history.shape == (2, 7)
    assert not result.psi[:, ~support].any()


def test_a_known_object_is_its_own_fixed_point() -> None:
    rng = np.random.default_rng(3)
    support = naive.centred_box((16, 18, 14), 5)
    truth = (support * rng.normal(size=(2, *support.shape)) + 1j * support).astype(np.complex64)
    counts = np.abs(np.stack([naive.forward(psi) for psi in truth])) ** 2
    result = sp.refine(counts, truth, support, iterations=5)
    assert (result.chi2 < 1e-10).all()
    np.testing.assert_allclose(result.psi, truth, atol=1e-5)


def test_a_schedule_with_shrink_wrap_finds_a_tighter_support(rocking_curve: Array) -> None:
    counts = rocking_curve[6:7]
    loose = naive.centred_box((128, 128), 60)
    result = sp.refine(counts, rough(counts, loose), loose, schedule="10*ER+SW(2.0)+25*HIO+5*ER+SW(1.0)+10*ER")
    assert result.history.shape == (1, 50)
    assert 0.3 * loose.sum() <= result.support.sum() < loose.sum()
    assert np.array_equal(result.psi != 0, result.support & (result.psi != 0))
    assert result.flags[0] == 0


@pytest.mark.parametrize(("threshold", "expected"), [(0.99, 30), (0.001, 300)])
def test_shrink_wrap_neither_empties_nor_floods_the_support(threshold: float, expected: int) -> None:
    rows, columns = np.mgrid[:40, :40] - 20
    psi = np.exp(-np.hypot(rows, columns + 0.3 * rows + 0.01) / 9).astype(np.complex64)
    inside = np.zeros((40, 40), bool)
    shrink_wrap(psi, ShrinkWrap(0.5, threshold), 100, inside)
    assert abs(int(inside.sum()) - expected) <= 2
    assert inside[20, 20]
    assert not inside[0, 0]


def test_shrink_wrap_keeps_the_support_of_an_object_that_vanished() -> None:
    inside = naive.centred_box((20, 20), 6)
    shrink_wrap(np.zeros((20, 20), np.complex64), ShrinkWrap(1.0), 36, inside)
    np.testing.assert_array_equal(inside, naive.centred_box((20, 20), 6))


@pytest.mark.parametrize("shape", [(31, 40), (104, 104), (12, 9, 14)])
@pytest.mark.parametrize("sigma", [0.0, 0.6, 1.5, 4.0])
def test_the_blur_is_scipys_around_every_edge(shape: tuple[int, ...], sigma: float) -> None:
    rng = np.random.default_rng(0)
    psi = (rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64)
    expected = gaussian_filter(np.abs(psi).astype(np.float64), sigma, mode="wrap")
    ours = blurred_modulus(psi, sigma)
    np.testing.assert_allclose(ours, expected, rtol=2e-6)
    inside = np.zeros(shape, bool)
    shrink_wrap(psi, ShrinkWrap(sigma, 0.7), psi.size // 2, inside)
    by_hand = expected > 0.7 * expected.max()
    if 0.15 * psi.size < by_hand.sum():
        assert (inside != by_hand).mean() < 1e-3


BLOCKS = [(33, 30), (26, 40), (9, 8), (16, 7), (8, 104), (15, 14, 13), (16, 22, 24), (5, 9, 33)]


@pytest.mark.parametrize("shape", BLOCKS)
@pytest.mark.parametrize("rules", ["ER", "HIO", "RAAR", "ER ER ER HIO HIO RAAR ER HIO ER ER"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_blocks_agree_with_the_naive_version(shape: tuple[int, ...], rules: str, weight: float) -> None:
    rng = np.random.default_rng(1)
    steps = (rules.split() * 8)[:10]
    support = np.zeros(shape, bool)
    support[tuple(slice(n // 3, n // 3 + n // 2) for n in shape)] = True  # off the centre, and of rows that are no multiple of a block
    truth = support * rng.uniform(3, 9, shape) * np.exp(1j * rng.uniform(0, 2, shape))
    counts = rng.poisson(np.abs(naive.forward(truth)) ** 2)
    valid = rng.random(shape) > 0.05
    start = rough(counts[None], support)
    solver = Solver(shape, Plan(parse_schedule("+".join(steps))), weight, engine="blocks")
    ours = solver.solve(counts[None], single(start, support), valid[None], None)
    psi, history = naive.refine(counts, start[0], support, steps, valid, weight)
    np.testing.assert_allclose(ours.history[0], history, rtol=2e-4)
    np.testing.assert_allclose(ours.psi[0], psi, atol=2e-4 * np.abs(psi).max())


@pytest.mark.parametrize("shape", [(26, 40), (12, 14, 13)])
@pytest.mark.parametrize("weight", [0.0, 0.2])
def test_blocks_and_planned_transforms_go_the_same_way_through_trials_and_shrink_wraps(shape: tuple[int, ...], weight: float) -> None:
    counts, start, support = simulated(2, shape)
    several = np.stack([start, rough(counts, support, 5), 3 * rough(counts, support, 6)], 1)
    several[0, 1] = rough(counts, support | True)[0]  # an arm that begins outside its support
    unit = np.full(several.shape[:2], FLAT, np.int32)
    arms = Start(several, np.broadcast_to(support, several.shape), unit, np.full(unit.shape, np.nan, np.float32))
    valid = np.random.default_rng(3).random(counts.shape) > 0.03
    plan = Plan(parse_schedule("SW(1.5)+8*ER+SW(1.0)+2*HIO+4*ER+SW(0.7,0.2)+3*ER"), 4)
    blocks, planned = (Solver(shape, plan, weight, 0.05, engine) for engine in ("blocks", "fftw"))
    ours, theirs = blocks.solve(counts, arms, valid, None), planned.solve(counts, arms, valid, None)
    assert (blocks.engine, planned.engine) == ("blocks", "fftw")
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    np.testing.assert_array_equal(ours.support, theirs.support)
    for name in ("history", "chi2", "r_factor", "free_llk", "trial", "floor"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=2e-3, err_msg=name)
    np.testing.assert_allclose(ours.psi, theirs.psi, atol=5e-3 * np.abs(theirs.psi).max())


def test_a_support_that_moves_leaves_nothing_of_the_object_behind() -> None:
    counts, start, support = simulated(1, (40, 40))
    result = sp.refine(counts, start, support, schedule="6*HIO+SW(1.0,0.3)+1*ER")
    assert result.flags[0] == 0
    assert not result.psi[~result.support].any()
    assert result.psi[result.support].any()


def test_lengths_choose_what_transforms() -> None:
    plan = Plan(parse_schedule(1))
    for shape, engine in (((104, 96), "blocks"), ((7, 11, 13), "blocks"), ((1, 40), "blocks"), ((514, 16), "fftw"), ((16, 487), "fftw")):
        assert Solver(shape, plan).engine == engine
        assert Solver(shape, plan, engine="repeatable").engine == engine
    for engine in ("fftw", "scipy"):
        assert Solver((104, 96), plan, engine=engine).engine == engine


def test_a_result_does_not_depend_on_the_batch_it_came_in(rocking_curve: Array) -> None:
    counts = rocking_curve[:8]
    support = naive.centred_box((128, 128), 40)
    start = rough(counts, support)
    schedule = "10*ER+SW(2.0)+10*HIO+10*ER"
    together = sp.refine(counts, start, support, schedule=schedule)
    alone = [sp.refine(counts[i : i + 1], start[i : i + 1], support, schedule=schedule) for i in range(8)]
    np.testing.assert_array_equal(together.psi, np.concatenate([one.psi for one in alone]))
    np.testing.assert_array_equal(together.history, np.concatenate([one.history for one in alone]))
    same(together, sp.refine(counts, start, support, schedule=schedule))


def test_threads_give_the_same_bits() -> None:
    counts, start, support = simulated(16)
    expected = sp.refine(counts, start, support)
    found: dict[int, Reconstruction] = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: sp.refine(counts, start, support)})) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
    for result in found.values():
        same(result, expected)


IN_ANOTHER_PROCESS = """
import hashlib, sys
import numpy as np
from streamprior.stages.refine import refine
with np.load(sys.argv[1]) as file:
    result = refine(file["counts"], file["start"], file["support"])
print(hashlib.sha256(result.psi.tobytes() + result.history.tobytes()).hexdigest())
"""


def test_two_processes_that_plan_at_the_same_time_give_the_same_bits(tmp_path: Path) -> None:
    counts, start, support = simulated(2, (40, 44))
    np.savez(tmp_path / "input.npz", counts=counts, start=start, support=support)
    # A state folder without wisdom: whoever plans first decides, the other must follow. Compiled kernels are shared to save time.
    state = tmp_path / "state"
    state.mkdir()
    (state / "numba").symlink_to(state_folder() / "numba")
    environment = {**os.environ, "STREAMPRIOR_STATE": str(state)}
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path / "input.npz")]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate(timeout=120)[0].strip() for process in both)
    assert len(first) == len(hashlib.sha256().hexdigest())
    assert first == second


def test_the_same_results_come_without_fftw_to_single_precision() -> None:
    counts, start, support = simulated(2)
    valid = np.ones(counts.shape, bool)
    plan = Plan(parse_schedule("10*ER+5*HIO+SW(1.0)+5*ER"))
    fftw, scipy = (
        Solver(support.shape, plan, engine=engine).solve(counts, single(start, support), valid, None) for engine in ("fftw", "scipy")
    )
    np.testing.assert_allclose(scipy.history, fftw.history, rtol=1e-4)
    np.testing.assert_allclose(scipy.psi, fftw.psi, atol=1e-3 * np.abs(fftw.psi).max())
    np.testing.assert_array_equal(scipy.support, fftw.support)


def test_where_fftw_is_not_installed_scipy_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "_fftw", lambda: None)
    assert arrays.make_plan((8, 8)).engine == "scipy"
    with pytest.raises(ConfigError, match="install the extra"):
        arrays.make_plan((8, 8), "fftw")


@pytest.mark.parametrize("engine", ["fftw", "scipy"])
@pytest.mark.parametrize("shape", [(16, 16), (9, 13), (4, 6, 10)])
def test_the_backward_transform_is_the_adjoint_of_the_forward_one(engine: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, y = ((rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(np.complex64) for _ in range(2))
    plan = arrays.make_plan(shape, engine)
    assert plan.engine == engine
    plan.psi[...] = x
    plan.forward()
    np.testing.assert_array_equal(plan.psi, x)
    transformed = plan.field.copy()
    np.testing.assert_allclose(transformed, np.fft.fftn(x), atol=1e-4)
    plan.field[...] = y
    plan.backward()
    assert np.vdot(y, transformed) == pytest.approx(np.vdot(plan.field, x), rel=1e-4)


def test_wisdom_that_is_damaged_is_planned_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMPRIOR_STATE", str(tmp_path))
    (tmp_path / "fftw-wisdom").write_bytes(b"(not wisdom")
    library = arrays._fftw()
    assert library is not None
    library.fftwf_forget_wisdom()  # this process may know the shape from an earlier run of the tests
    arrays.FftwPlan((6, 22))
    assert (tmp_path / "fftw-wisdom").read_bytes().startswith(b"(fftw")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fftw-wisdom", "fftw-wisdom.lock"]


@pytest.mark.parametrize("taken", ["fftw-wisdom.lock", "fftw-wisdom.partial"])
def test_plans_that_cannot_be_kept_are_the_operators_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: str) -> None:
    monkeypatch.setenv("STREAMPRIOR_STATE", str(tmp_path))
    (tmp_path / taken).mkdir()
    library = arrays._fftw()
    assert library is not None
    library.fftwf_forget_wisdom()
    with pytest.raises(ConfigError, match="STREAMPRIOR_STATE"):
        arrays.FftwPlan((6, 26))


def test_a_backend_that_is_not_here_is_refused_with_a_remedy() -> None:
    counts, start, support = simulated(1)
    with pytest.raises(ConfigError, match="set backend to 'auto' or 'cpu'"):
        sp.refine(counts, start, support, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        sp.refine(counts, start, support, backend="gpu")
    same(sp.refine(counts, start, support, backend="cpu"), sp.refine(counts, start, support))


def test_importing_the_engine_brings_no_gpu_library() -> None:
    code = "import sys, streamprior.arrays; sys.exit('cupy' in sys.modules or 'pyfftw' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


HOSTILE = {
    "empty": (lambda counts, start, support: counts.fill(0), Flag.EMPTY),
    "nan": (lambda counts, start, support: counts.__setitem__((3, 4), np.nan), Flag.NONFINITE),
    "infinity": (lambda counts, start, support: counts.__setitem__((3, 4), np.inf), Flag.NONFINITE),
    "negative": (lambda counts, start, support: counts.__setitem__((3, 4), -1), Flag.NONFINITE),
    "beyond single precision": (lambda counts, start, support: counts.__setitem__((3, 4), 1e300), Flag.NONFINITE),
    "squares beyond single precision": (lambda counts, start, support: counts.__setitem__((3, 4), 1e37), Flag.NONFINITE),
    "nan in the start": (lambda counts, start, support: start.__setitem__((3, 4), np.nan), Flag.NONFINITE),
    "start beyond single precision": (lambda counts, start, support: start.fill(1e30), Flag.NONFINITE),
    "no support": (lambda counts, start, support: support.fill(False), Flag.NO_SUPPORT),
    "nothing at all": (
        lambda counts, start, support: (counts.fill(0), start.fill(0), support.fill(False)),
        Flag.EMPTY | Flag.NO_SUPPORT,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hopeless_frame_is_flagged_and_its_neighbours_do_not_notice(name: str) -> None:
    spoil, flag = HOSTILE[name]
    counts, start, support = simulated(3)
    counts, supports = counts.astype(np.float64), np.repeat(support[None], 3, 0)
    expected = sp.refine(counts, start, supports, schedule="5*ER+SW(1)+5*HIO")
    spoil(counts[1], start[1], supports[1])
    result = sp.refine(counts, start, supports, schedule="5*ER+SW(1)+5*HIO")
    assert result.flags[1] == flag
    assert np.isnan([result.chi2[1], result.r_factor[1], result.floor[1], result.free_llk[1], *result.history[1]]).all()
    assert np.isfinite(result.psi).all()
    np.testing.assert_array_equal(result.support[1], supports[1])
    if flag & Flag.NO_SUPPORT:
        assert not result.psi[1].any()
    elif name == "empty":
        np.testing.assert_array_equal(result.psi[1], start[1])
    for i in (0, 2):
        np.testing.assert_array_equal(result.psi[i], expected.psi[i])
        np.testing.assert_array_equal(result.history[i], expected.history[i])


def test_a_start_of_zero_and_one_hot_pixel_are_refined_without_a_complaint() -> None:
    counts, start, support = simulated(2)
    start[0] = 0
    counts[1] = 0
    counts[1, 10, 10] = 2_000_000_000
    result = sp.refine(counts, start, support)
    assert (result.flags == 0).all()
    assert np.isfinite(result.chi2).all()
    assert np.isfinite(result.psi).all()


def test_values_on_pixels_that_were_not_measured_change_nothing() -> None:
    counts, start, support = simulated(2)
    valid = np.random.default_rng(5).random(counts.shape[1:]) > 0.05
    expected = sp.refine(counts, start, support, valid=valid)
    spoiled = counts.astype(np.float32)
    spoiled[:, ~valid] = np.nan
    same(sp.refine(spoiled, start, support, valid=np.repeat(valid[None], 2, 0)), expected)
    photons = Photons(spoiled, valid, np.array([0, Flag.SATURATED], np.uint32))
    flagged = sp.refine(photons, start, support)
    assert flagged.flags.tolist() == [0, Flag.SATURATED]
    same(replace(flagged, flags=expected.flags), expected)


@pytest.mark.parametrize("change", ["astype >u2", "fortran", "readonly", "strided", "list"])
def test_any_layout_of_the_same_photons_gives_the_same_bits(change: str) -> None:
    counts, start, support = simulated(2)
    expected = sp.refine(counts.astype(np.float32), start, support)
    frozen = counts.copy()
    frozen.flags.writeable = False
    layouts: dict[str, Any] = {
        "astype >u2": counts.astype(">u2"),
        "fortran": np.asfortranarray(counts),
        "readonly": frozen,
        "strided": np.repeat(counts, 2, axis=2)[:, :, ::2],
        "list": counts.tolist(),
    }
    same(sp.refine(layouts[change], start, support), expected)


def test_a_batch_without_frames_gives_no_results() -> None:
    counts, start, support = simulated(1)
    result = sp.refine(counts[:0], start[:0], support, iterations=4)
    assert result.psi.shape == (0, *support.shape)
    assert result.history.shape == (0, 4)


WRONG = {
    "counts are one frame": (lambda c, s, m: (c[0], s[0], m), {}, "counts are int64"),
    "counts are complex": (lambda c, s, m: (s, s, m), {}, "counts are complex64"),
    "counts are text": (lambda c, s, m: (c.astype(str), s, m), {}, "counts are <U"),
    "start of another shape": (lambda c, s, m: (c, s[:, 1:], m), {}, "start is complex64"),
    "start of integers": (lambda c, s, m: (c, c, m), {}, "start is int64"),
    "support of another shape": (lambda c, s, m: (c, s, m[1:]), {}, "support is bool"),
    "support of integers": (lambda c, s, m: (c, s, m.astype(np.uint8)), {}, "support is uint8"),
    "no support": (lambda c, s, m: (c, s, None), {}, "support is missing"),
    "valid of another shape": (lambda c, s, m: (c, s, m), {"valid": np.ones((3, 3), bool)}, "valid is bool"),
    "negative weight": (lambda c, s, m: (c, s, m), {"weight": -0.1}, "weight is -0.1"),
    "weight that is no number": (lambda c, s, m: (c, s, m), {"weight": float("nan")}, "weight is nan"),
    "no iterations": (lambda c, s, m: (c, s, m), {"iterations": 0}, "0 iterations"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_that_do_not_fit_are_named(name: str) -> None:
    arrange, settings, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        sp.refine(*arrange(*simulated(2)), **settings)


def test_a_start_record_brings_its_own_support() -> None:
    counts, start, support = simulated(2)
    record = single(start, support)
    expected = sp.refine(counts, start, support)
    same(sp.refine(counts, record), expected)
    same(sp.refine(counts, replace(record, support=record.support & False), support), expected)
    with pytest.raises(ValueError, match=r"it is \(B, k, ...\)"):
        sp.refine(counts, replace(record, psi=record.psi[:, :, 1:]))
    with pytest.raises(ValueError, match=r"it is \(B, k, ...\)"):
        sp.refine(counts, replace(record, psi=record.psi[:1]))
    with pytest.raises(ValueError, match="leaves a frame without an arm"):
        sp.refine(counts, replace(record, unit=np.array([[UNUSED], [0]], np.int32)))


def test_the_stage_gives_what_the_function_gives() -> None:
    counts, _, support = simulated(3)
    prior = naive.prior_for(support)
    photons = Photons(counts.astype(np.float32), np.ones(support.shape, bool), np.zeros(3, np.uint32))
    stage = Refiner(prior, Plan(parse_schedule("5*ER+SW(1.5)+5*HIO")), weight=0.1)
    batch = stage(Batch(RUN, (), photons=photons, start=sp.match(photons, prior)))
    assert stage.name == "refine"
    assert batch.reconstruction is not None
    same(batch.reconstruction, sp.refine(photons, sp.match(photons, prior), schedule="5*ER+SW(1.5)+5*HIO", weight=0.1))
    again = stage(batch)
    assert again.reconstruction is not None
    same(again.reconstruction, batch.reconstruction)
    with pytest.raises(ValueError, match="prepare and match come before refine"):
        stage(Batch(RUN, (), photons=photons))


def test_held_out_pixels_judge_an_object_that_never_saw_them() -> None:
    counts, start, support = simulated(2, (64, 64))
    prior = naive.prior_for(support)
    held = free_islands(support.shape, 0.05)
    stage = Refiner(prior, Plan(parse_schedule(30)), free_fraction=0.05)

    def judged(frames: Array) -> Reconstruction:
        photons = Photons(frames.astype(np.float32), np.ones(support.shape, bool), np.zeros(2, np.uint32))
        result = stage(Batch(RUN, (), photons=photons, start=single(start, support))).reconstruction
        assert result is not None
        return result

    result = judged(counts)
    spoiled = counts.copy()
    spoiled[:, held] += 1000
    np.testing.assert_array_equal(judged(spoiled).psi, result.psi)
    assert (judged(spoiled).free_llk > 10 * result.free_llk).all()
    never_measured = sp.refine(counts, start, support, iterations=30, valid=~held)
    same(replace(result, free_llk=never_measured.free_llk), never_measured)
    for i in range(2):
        model = np.abs(naive.forward(result.psi[i])) ** 2
        assert result.free_llk[i] == pytest.approx(poisson_llk(counts[i][held].astype(float), model[held]), rel=1e-3)


def test_islands_are_about_the_fraction_asked_for_and_spare_the_centre() -> None:
    for shape in [(104, 104), (128, 128), (64, 64, 64)]:
        held = free_islands(shape, 0.05)
        assert held.mean() == pytest.approx(0.05, abs=0.003)
        assert not held[tuple(slice(n // 2 - 3, n // 2 + 4) for n in shape)].any()
        np.testing.assert_array_equal(held, free_islands(shape, 0.05))
    assert not free_islands((20, 20), 0.0).any()
    with pytest.raises(ValueError, match="free_fraction is 1"):
        free_islands((20, 20), 1.0)


def test_a_perfect_model_of_poisson_counts_has_likelihood_one() -> None:
    rng = np.random.default_rng(0)
    model = rng.uniform(20, 200, 20000)
    assert poisson_llk(rng.poisson(model).astype(float), model) == pytest.approx(1, abs=0.03)
    assert poisson_llk(np.array([0.0, 0.0]), np.array([0.0, 0.0])) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(poisson_llk(np.array([5.0]), np.array([0.0])))


def test_a_schedule_is_read_as_the_field_writes_it() -> None:
    schedule = parse_schedule("10*ER + SW(2.0)+25*HIO+5 * RAAR+SW(.5, 0.2)+ER")
    assert schedule.steps == (
        Iterate("ER", 10),
        ShrinkWrap(2.0, 0.1),
        Iterate("HIO", 25),
        Iterate("RAAR", 5),
        ShrinkWrap(0.5, 0.2),
        Iterate("ER", 1),
    )
    assert schedule.iterations == 41
    assert schedule.ffts == 83
    assert parse_schedule(50) == Schedule((Iterate("ER", 50),))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("10*ER+5*ERR", "'5\\*ERR' at position 6"),
        ("10*ER++5*ER", "'' at position 6"),
        ("", "'' at position 0"),
        ("3*SW(1)+ER", "'3\\*SW\\(1\\)' at position 0"),
        ("ER+SW()", "'SW\\(\\)' at position 3"),
        ("ER+SW(nan)", "'SW\\(nan\\)' at position 3"),
        ("ER+SW(-1)", "'SW\\(-1\\)' at position 3"),
        ("ER+SW(1,2)", "between 0 and 1"),
        ("-5*ER", "'-5\\*ER' at position 0"),
        ("9" * 5000 + "*ER", "at position 0"),
        ("999999*ER", "1 to 100000 are possible"),
        ("SW(1)", "0 iterations"),
        ("er", "'er' at position 0"),
    ],
)
def test_a_schedule_that_cannot_be_read_is_named_with_its_place(text: str, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        parse_schedule(text)


STEPS = st.one_of(
    st.builds(Iterate, st.sampled_from(["ER", "HIO", "RAAR"]), st.integers(0, 1000)),
    st.builds(ShrinkWrap, st.integers(0, 80).map(lambda n: n / 8), st.integers(1, 99).map(lambda n: n / 100)),
)


@given(st.lists(STEPS, max_size=8))
def test_a_schedule_reads_back_as_it_was_written(steps: list[Iterate | ShrinkWrap]) -> None:
    schedule = Schedule((*steps, Iterate("ER", 1)))
    assert parse_schedule(str(schedule)) == schedule


@given(st.text(alphabet="0123456789.*+()ERSWHIO, ", max_size=30))
def test_no_text_makes_the_schedule_parser_fail_in_another_way(text: str) -> None:
    with contextlib.suppress(ValueError):
        schedule = parse_schedule(text)
        assert parse_schedule(str(schedule)) == schedule
