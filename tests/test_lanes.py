"""What the transforms of eight columns promise: numpy's numbers in the stated order, and their own way back."""

from __future__ import annotations

import numpy as np
import pytest

from streamprior.jit.written import LANES
from streamprior.stages.lanes import backward, butterfly, can_transform, forward, frequencies, plan_axis

LENGTHS = [1, 2, 3, 4, 8, 13, 16, 22, 24, 32, 49, 60, 64, 104, 105, 128, 143, 256, 400, 512, 1024]


@pytest.mark.parametrize("length", LENGTHS)
def test_eight_columns_transform_as_numpy_transforms_them_and_come_back(length: int) -> None:
    rng = np.random.default_rng(length)
    columns = rng.normal(size=(length, 2, LANES)).astype(np.float32)
    axis = plan_axis(length)
    x = np.zeros(columns.size + 48, np.float32)  # something before and behind, which stays
    x[16:-32] = columns.ravel()
    forward(x, 16, axis, axis.radices.size)
    found = x[16:-32].reshape(columns.shape)
    expected = np.fft.fft(columns[:, 0] + 1j * columns[:, 1].astype(np.float64), axis=0)[frequencies(axis)]
    np.testing.assert_allclose(found[:, 0] + 1j * found[:, 1], expected, atol=3e-6 * np.sqrt(length) * 3)
    backward(x, 16, axis, axis.radices.size)
    np.testing.assert_allclose(x[16:-32].reshape(columns.shape) / length, columns, atol=3e-6)
    assert not x[:16].any()
    assert not x[-32:].any()


@pytest.mark.parametrize("points", [2, 3, 4, 5, 7, 8, 11, 13])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_butterfly_is_a_transform_of_plain_numbers_too(points: int, sign: int) -> None:
    rng = np.random.default_rng(points)
    real, imaginary = rng.normal(size=(2, points))
    found = butterfly(list(zip(real, imaginary, strict=True)), sign)  # type: ignore[arg-type]
    x = real + 1j * imaginary
    expected = np.fft.fft(x) if sign < 0 else points * np.fft.ifft(x)
    np.testing.assert_allclose([a + 1j * b for a, b in found], expected, atol=1e-12)


def test_a_length_with_a_large_prime_factor_is_left_to_others() -> None:
    assert [length for length in range(60) if not can_transform(length)] == [
        *(0, 17, 19, 23, 29, 31, 34, 37, 38, 41, 43, 46, 47, 51, 53, 57, 58, 59),
    ]
