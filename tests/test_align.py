"""What no intensity can know is taken away before two objects are compared, and what is left is how much they differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamprior.align import align, transformed, twin
from tests.naive_refine import forward

Array = npt.NDArray[Any]

SHAPES = [(48, 48), (33, 41), (40, 27), (26, 30, 28), (27, 25, 31)]


def lump(shape: tuple[int, ...], seed: int = 0) -> Array:
    """Four complex Gaussians off the centre, without symmetry: smooth, so that a fraction of a pixel's shift is well defined."""
    rng = np.random.default_rng(seed)
    places = np.meshgrid(*((np.arange(n) - n // 2) / (0.1 * n) for n in shape), indexing="ij")
    psi = np.zeros(shape, complex)
    for _ in range(4):
        centre, slope = rng.uniform(-1, 1, len(shape)), rng.uniform(-0.7, 0.7, len(shape))
        exponent = sum(1j * s * place - (place - c) ** 2 for place, c, s in zip(places, centre, slope, strict=True))
        psi += np.exp(exponent + 2j * np.pi * rng.random())
    return psi


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("turned", [False, True])
def test_phase_scale_twin_shift_and_ramp_are_removed_together(shape: tuple[int, ...], turned: bool) -> None:
    goal = lump(shape)
    shift = np.array([1.3, -2.45, 1.7][: len(shape)])
    ramp = np.array([-1.6, 0.35, 1.2][: len(shape)])
    psi = 7.5 * np.exp(2j) * transformed(twin(goal) if turned else goal, shift, ramp)
    found = align(psi, goal)
    assert found.error < 2e-3
    assert found.twin == turned
    np.testing.assert_allclose(found.psi, goal, atol=4e-3 * np.abs(goal).max())
    assert found.psi.dtype == np.complex64


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_single_ambiguity_is_named(shape: tuple[int, ...]) -> None:
    goal, still = lump(shape), np.zeros(len(shape))
    one = np.array([1.5, -2.0, 0.25][: len(shape)])
    moved, turned = align(transformed(goal, one, still), goal), align(transformed(goal, still, one), goal)
    scaled, same = align(goal * (3 - 4j), goal), align(goal, goal)
    np.testing.assert_allclose(moved.shift, -one, atol=1e-3)
    np.testing.assert_allclose(moved.ramp, still, atol=1e-3)
    np.testing.assert_allclose(turned.ramp, -one, atol=1e-3)
    np.testing.assert_allclose(turned.shift, still, atol=1e-3)
    assert scaled.factor == pytest.approx(1 / (3 - 4j), rel=1e-6)
    assert same.factor == pytest.approx(1, rel=1e-6)
    for found in (moved, turned, scaled, same):
        assert not found.twin
        # 1 - cos^2 in double precision keeps eight digits of the sine.
        assert found.error < 1e-4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_record_says_how_the_object_was_brought_there(shape: tuple[int, ...]) -> None:
    goal = lump(shape)
    psi = transformed(twin(lump(shape, 1)), np.full(len(shape), 0.6), np.full(len(shape), -1.2))
    found = align(psi, goal)
    assert 0.05 < found.error < 1
    again = found.factor * transformed(twin(psi) if found.twin else psi, np.array(found.shift), np.array(found.ramp))
    np.testing.assert_allclose(found.psi, again, atol=1e-6)
    assert found.error == pytest.approx(np.linalg.norm(again - goal) / np.linalg.norm(goal), rel=1e-6)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.6])
def test_the_error_of_a_noisy_object_is_its_noise(share: float) -> None:
    goal = lump((64, 64))
    rng = np.random.default_rng(1)
    noise = rng.normal(size=goal.shape) + 1j * rng.normal(size=goal.shape)
    noise *= share * np.linalg.norm(goal) / np.linalg.norm(noise)
    psi = transformed(goal + noise, np.array([3.0, -2.5]), np.array([0.4, 1.0]))
    # The factor is the least-squares one: it shrinks the noise along with the object.
    assert align(psi, goal).error == pytest.approx(share / math.hypot(1, share), rel=0.01)
    assert align(goal, psi).error == pytest.approx(share / math.hypot(1, share), rel=0.01)


def test_what_is_left_of_another_object_is_large_and_alike_in_both_directions() -> None:
    one, other = lump((48, 48), 0), lump((48, 48), 1)
    there, back = align(one, other).error, align(other, one).error
    assert 0.3 < there < 1
    assert there == pytest.approx(back, abs=0.03)


@pytest.mark.parametrize("value", [0, np.nan, np.inf])
def test_an_object_that_is_nothing_has_no_error(value: float) -> None:
    goal = lump((12, 14)).astype(np.complex64)
    spoiled = np.full_like(goal, value)
    for found in (align(spoiled, goal), align(goal, spoiled)):
        assert math.isnan(found.error)
        assert not found.twin
    np.testing.assert_array_equal(align(goal, spoiled).psi, goal)


def test_objects_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"psi has shape \(8, 8\), the reference \(8, 9\)"):
        align(np.ones((8, 8), complex), np.ones((8, 9), complex))


@pytest.mark.parametrize("shape", [(8, 8), (7, 8), (9, 5), (4, 5, 6)], ids=str)
def test_the_twin_has_the_same_diffraction_and_is_its_own_inverse(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    psi = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    np.testing.assert_allclose(np.abs(forward(twin(psi))), np.abs(forward(psi)), atol=1e-12)
    np.testing.assert_array_equal(twin(twin(psi)), psi)
    centre = tuple(n // 2 for n in shape)
    assert twin(psi)[centre] == np.conj(psi[centre])


@pytest.mark.parametrize("shape", [(8, 8), (7, 10), (4, 5, 6)], ids=str)
def test_a_shift_moves_the_object_and_a_ramp_its_diffraction(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    psi = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    still, one, axes = np.zeros(len(shape)), np.arange(1.0, 1.0 + len(shape)), tuple(range(len(shape)))
    whole = [int(pixels) for pixels in one]
    np.testing.assert_allclose(transformed(psi, one, still), np.roll(psi, whole, axes), atol=1e-12)
    np.testing.assert_allclose(forward(transformed(psi, still, one)), np.roll(forward(psi), whole, axes), atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from([(6, 6), (5, 7), (8, 4), (3, 4, 5), (1, 6), (2, 2)]), st.integers(0, 2**31), st.booleans())
def test_an_error_lies_between_nothing_and_that_of_the_object_as_it_is(shape: tuple[int, ...], seed: int, real: bool) -> None:
    rng = np.random.default_rng(seed)
    one, other = (rng.normal(size=shape) + (0 if real else 1j) * rng.normal(size=shape) for _ in range(2))
    powers = float(np.vdot(one, one).real * np.vdot(other, other).real)
    unmoved = math.sqrt(max(0.0, 1 - abs(np.vdot(one, other)) ** 2 / powers))
    assert 0 <= align(one, other).error <= unmoved + 1e-6 <= 1 + 1e-6


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=2),
    st.lists(st.floats(-3, 3), min_size=2, max_size=2),
    st.floats(-3.14, 3.14),
    st.booleans(),
)
def test_any_trivial_change_leaves_no_error(shift: list[float], ramp: list[float], phase: float, turned: bool) -> None:
    goal = lump((36, 33))
    psi = np.exp(1j * phase) * transformed(twin(goal) if turned else goal, np.array(shift), np.array(ramp))
    assert align(psi, goal).error < 2e-3
