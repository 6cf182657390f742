"""Refinement on a card: the numbers of the CPU and of the naive version, from its kernels run on the CPU, and on a card if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from streamprior_bench import gpu

import streamprior as sp
from streamprior.arrays import cuda_missing
from streamprior.errors import ConfigError
from streamprior.records import FLAT, UNUSED, Batch, Flag, Photons, Reconstruction, Start
from streamprior.stages.iterate_cuda import (
    SOURCE,
    FusedEngine,
    Layout,
    Objects,
    centred_places,
    frequency_order,
    fused_layout,
    turns,
)
from streamprior.stages.refine import Refiner, Solver, free_islands, make_solver
from streamprior.stages.refine_cuda import KERNELS, CudaSolver
from streamprior.stages.schedule import OUTSIDE, Plan, parse_schedule
from tests import naive_refine as naive
from tests.host_cuda import SHARED_BYTES, Card
from tests.test_refine import HOSTILE, RUN, same, simulated, single

Array = npt.NDArray[Any]
Maker = Callable[..., CudaSolver]

H100 = (SHARED_BYTES, 228 * 1024)
"""Bytes of shared memory that a block may ask for, and that a multiprocessor has."""


@pytest.fixture(params=["cufft, kernels on the cpu", "fused, kernels on the cpu", "cufft, cuda", "fused, cuda"])
def maker(request: pytest.FixtureRequest) -> Maker:
    """CudaSolver of one engine, with room for few frames, so that every call is cut into chunks."""
    engine, _, where = request.param.partition(", ")
    if where == "cuda":
        missing = cuda_missing()
        if missing is not None:
            pytest.skip(f"no CUDA card: {missing}")
    else:
        request.getfixturevalue("card")

    def make(shape: tuple[int, ...], plan: Plan, weight: float = 0.0, free_fraction: float = 0.0, room: int = 2) -> CudaSolver:
        fits = len(shape) == 2
        return CudaSolver(shape, plan, weight, free_islands(shape, free_fraction), engine if fits else "cufft", room)

    return make


def plan_of(text: str | int, trial: int = 0, alone: str | None = None) -> Plan:
    return Plan(parse_schedule(text), trial, None if alone is None else parse_schedule(alone))


def plain(shape: tuple[int, ...], plan: Plan, weight: float = 0.0, free_fraction: float = 0.0) -> Solver:
    """The CPU's solver over scipy.fft, whose rounding does not depend on what a planner measured."""
    return Solver(shape, plan, weight, free_fraction, engine="scipy")


def everywhere(counts: Array) -> Array:
    return np.broadcast_to(np.ones(counts.shape[1:], np.bool_), counts.shape)


def alike(ours: Reconstruction, theirs: Reconstruction, tolerance: float = 1e-4) -> None:
    """Every number of two reconstructions, but for rounding that a schedule has magnified."""
    np.testing.assert_array_equal(ours.flags, theirs.flags)
    np.testing.assert_array_equal(ours.kept, theirs.kept)
    np.testing.assert_array_equal(ours.support, theirs.support)
    np.testing.assert_allclose(ours.psi, theirs.psi, atol=tolerance * max(1e-30, float(np.abs(theirs.psi).max())))
    for name in ("chi2", "history", "floor", "r_factor", "free_llk", "trial"):
        np.testing.assert_allclose(getattr(ours, name), getattr(theirs, name), rtol=tolerance, atol=1e-12, err_msg=name)
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("rule", sorted(OUTSIDE))
def test_every_rule_agrees_with_the_naive_version_in_double_precision(maker: Maker, rule: str, weight: float) -> None:
    counts, start, support = simulated(3)
    valid = np.ones(counts.shape, bool)
    valid[:, 18:21] = False  # a gap, and bad pixels of each frame's own
    valid[1, 3:9, 5] = False
    ours = maker(support.shape, plan_of(f"3*ER+9*{rule}"), weight).solve(counts, single(start, support), valid, None)
    for i in range(len(counts)):
        psi, history = naive.refine(counts[i], start[i], support, ["ER"] * 3 + [rule] * 9, valid[i], weight)
        np.testing.assert_allclose(ours.history[i], history, rtol=1e-4)
        np.testing.assert_allclose(ours.psi[i], psi, atol=1e-4 * np.abs(psi).max())


@pytest.mark.parametrize("shape", [(15, 21), (16, 26), (6, 10, 9)])
def test_a_schedule_gives_what_the_cpu_gives(maker: Maker, shape: tuple[int, ...]) -> None:
    """Odd and even extents, a support that shrinks, held-out pixels, more frames than there is room for."""
    counts, start, support = simulated(5, shape)
    support[:2] = False  # rows without any, at one side
    plan, arms = plan_of("6*ER+SW(1.0)+4*HIO+SW(0.0,0.2)+3*RAAR+0*ER+3*ER"), single(start, support)
    expected = plain(shape, plan, 0.0, 0.05).solve(counts, arms, everywhere(counts), None)
    alike(maker(shape, plan, 0.0, 0.05).solve(counts, arms, everywhere(counts), None), expected, 1e-3)


@pytest.mark.parametrize("side", [64, 104])
def test_frames_of_a_detector_give_what_the_cpu_gives(maker: Maker, side: int) -> None:
    counts, start, support = simulated(2, (side, side))
    arms, plan = single(start, support), plan_of("5*ER+SW(1.5)+3*HIO+2*ER")
    alike(
        maker((side, side), plan).solve(counts, arms, everywhere(counts), None),
        plain((side, side), plan).solve(counts, arms, everywhere(counts), None),
    )


@pytest.mark.parametrize("lengths", [(2, 338), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16), (24, 45), (96, 128)])
def test_the_fused_kernels_transform_is_the_transform(card: Card, lengths: tuple[int, int]) -> None:
    """Every radix up to 16, in one to three stages; frequencies in the order that is told."""
    layout = fused_layout(lengths, *H100)
    assert layout is not None
    rng = np.random.default_rng(0)
    psi = (rng.normal(size=(2, *lengths)) + 1j * rng.normal(size=(2, *lengths))).astype(np.complex64)
    engine = FusedEngine(card, layout, 2)
    engine.prepare(2, 0)
    stream = card.cuda.Stream()
    with stream:
        objects = Objects(card.asarray(psi), None, None, None, None, None)
        engine.transform(objects, 2)
        field = engine.field.get()
    order = np.ix_([0, 1], frequency_order(layout.column_radices), frequency_order(layout.row_radices))
    wanted = np.fft.fft2(psi)
    np.testing.assert_allclose(field, wanted[order], atol=2e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("lengths", [(2, 338), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16), (24, 45)])
def test_every_radix_goes_back_as_it_came(card: Card, lengths: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    support = rng.random(lengths) < 0.4
    support[lengths[0] // 2 :] = False
    counts = rng.poisson(30, (1, *lengths))
    start = (support + 0.5j * rng.random(lengths)).astype(np.complex64)[None]
    plan, arms = plan_of("4*ER+2*HIO+2*ER"), single(start, support)
    fused = CudaSolver(lengths, plan, 0.0, free_islands(lengths, 0.0), "fused", 1)
    alike(fused.solve(counts, arms, everywhere(counts), None), plain(lengths, plan).solve(counts, arms, everywhere(counts), None), 1e-4)


def several_arms() -> tuple[Array, Start]:
    """Five frames: three arms, one, two beside an unused one, a flat one alone, one that cannot begin beside one that can."""
    counts, good, support = simulated(5)
    rng = np.random.default_rng(2)
    psi = np.stack([good * np.exp(1j * rng.uniform(-spread, spread, good.shape)) for spread in (2.5, 0.0, 1.5)], 1).astype(np.complex64)
    unit = np.array([[4, 2, FLAT], [UNUSED, 3, UNUSED], [1, UNUSED, 0], [FLAT, UNUSED, UNUSED], [7, 8, UNUSED]], np.int32)
    psi[unit == UNUSED] = 0
    supports = np.broadcast_to(support, psi.shape).copy()
    supports[4, 1] = False
    return counts, Start(psi, supports, unit, np.full(unit.shape, np.nan, np.float32))


@pytest.mark.parametrize("room", [2, 5, 16])
@pytest.mark.parametrize("trial", [0, 4])
def test_the_best_arm_goes_on_and_each_frame_has_its_own_schedule(maker: Maker, trial: int, room: int) -> None:
    counts, arms = several_arms()
    plan = plan_of("3*ER+SW(1.0)+2*HIO+2*ER", trial, "9*ER")
    expected = plain(counts.shape[1:], plan, 0.1).solve(counts, arms, everywhere(counts), None)
    assert len(set(expected.kept.tolist())) > 1
    ours = maker(counts.shape[1:], plan, 0.1, room=room)
    for _ in range(2):
        alike(ours.solve(counts, arms, everywhere(counts), None), expected, 1e-3)


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("arms", [1, 2])
def test_a_hopeless_frame_is_flagged_and_its_neighbours_do_not_notice(maker: Maker, name: str, arms: int) -> None:
    spoil, flag = HOSTILE[name]
    counts, start, support = simulated(3)
    wide, supports = counts.astype(np.float64), np.repeat(support[None], 3, 0)
    plan = plan_of("3*ER+SW(1)+2*HIO", 2 if arms > 1 else 0)
    solver = maker(support.shape, plan, room=4)

    def solved(by: Any) -> Reconstruction:
        one = single(start, supports)
        both = Start(*(np.concatenate([array] * arms, 1) for array in (one.psi, one.support, one.unit, one.distance)))
        return by.solve(wide, both, everywhere(counts), None)  # type: ignore[no-any-return]

    untouched = solved(solver)
    spoil(wide[1], start[1], supports[1])
    result = solved(solver)
    alike(result, solved(plain(support.shape, plan)), 1e-3)
    assert result.flags[1] == flag
    assert np.isfinite(result.psi).all()
    for i in (0, 2):
        np.testing.assert_array_equal(result.psi[i], untouched.psi[i])
        np.testing.assert_array_equal(result.history[i], untouched.history[i])


@pytest.mark.parametrize(("threshold", "guarded"), [(0.99, 0.3), (0.001, 3.0), (0.2, None)])
def test_shrink_wrap_keeps_within_its_guard(maker: Maker, threshold: float, guarded: float | None) -> None:
    counts, start, support = simulated(2, (32, 32))
    arms, plan = single(start, support), plan_of(f"2*ER+SW(1.5,{threshold})+0*ER")
    ours = maker(support.shape, plan).solve(counts, arms, everywhere(counts), None)
    expected = plain(support.shape, plan).solve(counts, arms, everywhere(counts), None)
    assert np.mean(ours.support != expected.support) < 1e-3
    if guarded is not None:
        assert ours.support[0].sum() == round(guarded * support.sum())


def test_shrink_wrap_keeps_the_support_of_an_object_that_vanished(maker: Maker) -> None:
    counts, start, support = simulated(1)
    start[:] = 0
    nothing = np.zeros(counts.shape, np.bool_)
    nothing[0, 0, 0] = True  # one measured pixel without photons: the object stays zero
    counts[0, 0, 0] = 0
    plan = plan_of("SW(1)+2*ER")
    result = maker(support.shape, plan).solve(counts, single(start, support), nothing, None)
    assert result.flags[0] == Flag.EMPTY
    np.testing.assert_array_equal(result.support[0], support)


def test_a_result_does_not_depend_on_its_neighbours_or_its_place_and_a_call_repeated_gives_the_same_bits(maker: Maker) -> None:
    counts, start, support = simulated(7)
    arms, plan = single(start, support), plan_of("4*ER+SW(1.0)+3*HIO+2*ER")
    solver = maker(support.shape, plan, room=4)
    together = solver.solve(counts, arms, everywhere(counts), None)
    for _ in range(2):  # captured in graphs from the second call on
        same(solver.solve(counts, arms, everywhere(counts), None), together)
    for i in (0, 5):
        alone = solver.solve(counts[i : i + 1], single(start[i : i + 1], support), everywhere(counts[:1]), None)
        np.testing.assert_array_equal(alone.psi[0], together.psi[i])
        np.testing.assert_array_equal(alone.history[0], together.history[i])


@pytest.mark.parametrize("engine", ["cufft", "fused"])
def test_the_order_of_threads_changes_no_bit(card: Card, engine: str) -> None:
    counts, arms = several_arms()
    results = []
    for descending in (False, True):
        card.descending = descending
        solver = CudaSolver(counts.shape[1:], plan_of("3*ER+SW(1.0,0.99)+2*HIO", 3), 0.2, free_islands(counts.shape[1:], 0.05), engine, 3)
        results.append(solver.solve(counts, arms, everywhere(counts), None))
    same(*results)


def test_a_call_waits_for_the_card_once_however_many_chunks_it_has(card: Card) -> None:
    counts, start, support = simulated(9)
    solver = CudaSolver(support.shape, plan_of("3*ER+SW(1.0)+2*HIO"), 0.0, free_islands(support.shape, 0.0), "cufft", 2)
    for graphs in (1, 1):
        before = card.waits
        solver.solve(counts, single(start, support), everywhere(counts), None)
        assert card.waits == before + 1
        assert card.graphs == graphs


@pytest.mark.parametrize("change", ["astype >u2", "fortran", "readonly", "strided"])
def test_any_layout_of_the_same_photons_gives_the_same_bits(maker: Maker, change: str) -> None:
    counts, start, support = simulated(3)
    arms, solver = single(start, support), maker(support.shape, plan_of(3))
    expected = solver.solve(counts.astype(np.float32), arms, everywhere(counts), None)
    frozen = counts.copy()
    frozen.flags.writeable = False
    layouts: dict[str, Any] = {
        "astype >u2": counts.astype(">u2"),
        "fortran": np.asfortranarray(counts),
        "readonly": frozen,
        "strided": np.repeat(counts, 2, axis=2)[:, :, ::2],
    }
    same(solver.solve(layouts[change], arms, everywhere(counts), None), expected)


def test_a_map_for_each_frame_is_read_as_one_for_all_is(maker: Maker) -> None:
    counts, start, support = simulated(3)
    solver = maker(support.shape, plan_of(4))
    valid = np.random.default_rng(0).random(support.shape) < 0.9
    one = solver.solve(counts, single(start, support), np.broadcast_to(valid, counts.shape), None)
    own = single(start, np.repeat(support[None], 3, 0))
    same(solver.solve(counts, own, np.repeat(valid[None], 3, 0), None), one)


def test_a_batch_without_frames_gives_no_results(maker: Maker) -> None:
    counts, start, support = simulated(1)
    result = maker(support.shape, plan_of(4)).solve(counts[:0], single(start[:0], support), everywhere(counts[:0]), None)
    assert result.psi.shape == (0, *support.shape)
    assert result.history.shape == (0, 4)


def test_refine_and_its_stage_compute_on_the_card_that_is_there(card: Card) -> None:
    counts, rough, support = simulated(2)
    prior = naive.prior_for(support)
    photons = Photons(counts.astype(np.float32), np.ones(support.shape, bool), np.array([0, Flag.SATURATED], np.uint32))
    start = single(rough, support)  # a flat one has zeros in its transform, whose phase is whatever rounding makes it
    result = sp.refine(photons, start, schedule="4*ER", backend="cuda")
    assert card.waits
    alike(result, sp.refine(photons, start, schedule="4*ER", backend="cpu"))
    stage = Refiner(prior, plan_of(4), backend="auto")
    same(stage(Batch(RUN, (), photons=photons, start=start)).reconstruction, result)  # type: ignore[arg-type]
    assert isinstance(make_solver(support.shape, plan_of(4)), CudaSolver)
    assert isinstance(make_solver(support.shape, plan_of(4), backend="cpu"), Solver)


def test_a_card_that_is_not_there_is_refused_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert isinstance(make_solver((8, 8), plan_of(1)), Solver)
    with pytest.raises(ConfigError, match="set backend to 'auto' or 'cpu'"):
        make_solver((8, 8), plan_of(1), backend="cuda")


def test_what_does_not_fit_the_fused_kernel_goes_by_cufft(card: Card) -> None:
    held = free_islands((8, 34), 0.0)
    assert CudaSolver((8, 34), plan_of(1), 0.0, held).engine == "cufft"  # 34 = 2 * 17
    assert CudaSolver((8, 32), plan_of(1), 0.0, held[:, :32]).engine == "fused"
    with pytest.raises(ValueError, match="do not fit the fused kernel"):
        CudaSolver((8, 34), plan_of(1), 0.0, held, "fused")
    with pytest.raises(ValueError, match="engine is 'fftw'"):
        CudaSolver((8, 34), plan_of(1), 0.0, held, "fftw")
    with pytest.raises(ValueError, match="weight is nan"):
        CudaSolver((8, 34), plan_of(1), float("nan"), held)
    with pytest.raises(ValueError, match="trial is -1"):
        CudaSolver((8, 34), replace(plan_of(1), trial=-1), 0.0, held)


@pytest.mark.parametrize(
    ("shape", "radices", "blocks"), [((64, 64), (8, 8), 4), ((96, 96), (12, 8), 2), ((104, 104), (13, 8), 2), ((128, 128), (16, 8), 1)]
)
def test_frames_of_detectors_share_a_multiprocessor_as_far_as_they_fit(
    shape: tuple[int, int], radices: tuple[int, int], blocks: int
) -> None:
    layout = fused_layout(shape, *H100)
    assert layout is not None
    assert layout.row_radices == layout.column_radices == radices
    assert layout.blocks == blocks
    assert layout.blocks * layout.shared_bytes < H100[1]
    assert layout.pitch % 2 == 1


@pytest.mark.parametrize("shape", [(64, 64, 64), (256, 256), (1, 64), (34, 34)])
def test_frames_that_do_not_fit_have_no_layout(shape: tuple[int, ...]) -> None:
    assert fused_layout(shape, *H100) is None


@pytest.mark.parametrize("shape", [(4, 6), (5, 7), (3, 4, 5)])
def test_places_and_orders_are_those_of_the_library(shape: tuple[int, ...]) -> None:
    centred = np.arange(np.prod(shape)).reshape(shape)
    rows, columns = centred_places(shape)
    np.testing.assert_array_equal(centred.reshape(-1, shape[-1])[np.ix_(rows, columns)].reshape(shape), np.fft.ifftshift(centred))
    assert frequency_order((3, 2)).tolist() == [0, 3, 1, 4, 2, 5]
    np.testing.assert_allclose(turns(6)[1], np.exp(-2j * np.pi / 6), rtol=1e-6)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("side", [None, 64, 96, 104, 128])
def test_the_kernels_compile_for_a_card_and_keep_their_numbers_in_registers(architecture: str, side: int | None, tmp_path: Path) -> None:
    """A100; H100 and H200."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc: the kernels cannot be compiled for a card")
    layout = None if side is None else fused_layout((side, side), *H100)
    names = KERNELS if layout is None else ("iterate_objects", "transform_objects")
    (tmp_path / "k.cu").write_text(SOURCE.read_text() if layout is None else layout.source)
    command = [nvcc, "-cubin", "-std=c++17", f"-arch={architecture}", "--Werror", "all-warnings", "-Xptxas", "-v", "-o", "k.cubin", "k.cu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(name.encode() in (tmp_path / "k.cubin").read_bytes() for name in names)
    assert set(re.findall(r"(\d+) bytes spill", done.stderr)) == {"0"}


def test_without_a_card_its_benchmark_is_one_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    (row,) = gpu.run(1)
    assert "pip install 'streamprior[gpu]'" in row["skipped"]


def test_a_layout_says_what_the_compiler_needs() -> None:
    source = Layout(64, 48, 49, (8, 6), (8, 8), 128, 4).source
    assert "#define ROW_RADICES 8, 6\n" in source
    assert "#define PITCH 49\n" in source
