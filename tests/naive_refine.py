"""The obvious version of refine: centred arrays, double precision, scipy.fft, one line a projection."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.prior import Geometry, Prior

Array = npt.NDArray[Any]


def forward(psi: Array) -> Array:
    return scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(psi), norm="ortho"))


def backward(field: Array) -> Array:
    return scipy.fft.fftshift(scipy.fft.ifftn(scipy.fft.ifftshift(field), norm="ortho"))


def chi2(psi: Array, magnitude: Array, valid: Array) -> float:
    return float((((np.abs(forward(psi)) - magnitude) ** 2)[valid].sum()) / (magnitude[valid] ** 2).sum())


def project_modulus(psi: Array, magnitude: Array, valid: Array) -> Array:
    field = forward(psi)
    return backward(np.where(valid, magnitude * np.exp(1j * np.angle(field)), field))


def iterate(rule: str, psi: Array, magnitude: Array, support: Array, valid: Array) -> Array:
    projected = project_modulus(psi, magnitude, valid)
    outside = {"ER": 0 * psi, "HIO": psi - 0.9 * projected, "RAAR": 0.9 * psi + (1 - 2 * 0.9) * projected}[rule]
    return np.where(support, projected, outside)


def refine(counts: Array, start: Array, support: Array, rules: list[str], valid: Array, weight: float = 0.0) -> tuple[Array, list[float]]:
    """One frame through a list of rules, one an iteration: psi and chi2 after each."""
    magnitude = np.sqrt(counts.astype(np.float64))
    psi = start.astype(np.complex128)
    history = []
    for rule in rules:
        psi = (iterate(rule, psi, magnitude, support, valid) + weight * start) / (1 + weight)
        history.append(chi2(psi, magnitude, valid))
    return psi, history


def centred_box(shape: tuple[int, ...], width: int) -> Array:
    """A made support: a box of this width around the centre."""
    box = np.zeros(shape, np.bool_)
    box[tuple(slice(n // 2 - width // 2, n // 2 - width // 2 + width) for n in shape)] = True
    return box


def prior_for(support: Array) -> Prior:
    """A prior that knows nothing but a support."""
    shape = support.shape
    return Prior(
        geometry=Geometry(shape, (shape[0] // 2, shape[1] // 2), shape),
        normaliser=1.0,
        feature_mean=np.zeros(9, np.float32),
        feature_scale=np.ones(9, np.float32),
        pca_components=np.eye(6, 9, dtype=np.float32),
        centroids=np.zeros((1, 6), np.float32),
        class_names=("everything",),
        reference=np.zeros(shape, np.uint8),
        support=support.astype(np.bool_),
        invalid=np.zeros(shape, np.bool_),
    )
