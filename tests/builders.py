"""Small priors and frames that several test files start from."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from streamprior.config import DriftSettings, PrepareSettings, RefineSettings
from streamprior.prior import Geometry, Prior, freeze
from streamprior.records import Detector, Frame, RunStarted
from streamprior.stages.recipe import Recipe

NAMES = ("core", "ring", "background")


def small_prior(shape: tuple[int, int] = (32, 32), **changes: Any) -> Prior:
    """Three classes that tell pixels by brightness and radius, and a support of 8 x 8 in the middle."""
    height, width = shape
    support = np.zeros(shape, bool)
    support[height // 2 - 4 : height // 2 + 4, width // 2 - 4 : width // 2 + 4] = True
    scale = np.array([0, 1, 0, 0, 0, 0, 0.2, 0, 0], np.float32)
    centroids = np.array([[3, 0.5, 0, 0, 0, 0], [1, 1.5, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0]], np.float32)
    components = np.zeros((6, 9), np.float32)
    components[range(6), [1, 6, 0, 2, 3, 4]] = 1
    prior = Prior(
        geometry=Geometry(shape, (height // 2, width // 2), shape),
        normaliser=5.0,
        feature_mean=np.zeros(9, np.float32),
        feature_scale=scale,
        pca_components=components,
        centroids=centroids,
        class_names=NAMES,
        reference=np.zeros(shape, np.uint8),
        support=support,
        invalid=np.zeros(shape, bool),
        baselines={"flux": (5.0, 1.0), "chi2": (0.1, 0.02), "chi2_over_floor": (0.1, 0.02)},
    )
    return freeze(replace(prior, **changes))


def diffraction(shape: tuple[int, int] = (32, 32), count: int = 1, seed: int = 0, photons: float = 2e4) -> np.ndarray:
    """(count, H, W) uint16: Poisson diffraction of a small complex object that fits the support of `small_prior`."""
    random = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        psi = np.zeros(shape, complex)
        rows, columns = shape[0] // 2, shape[1] // 2
        psi[rows - 3 : rows + 3, columns - 3 : columns + 3] = np.exp(1j * random.uniform(0, 1, (6, 6)))
        intensity = np.abs(np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(psi)))) ** 2
        frames.append(random.poisson(intensity * photons / intensity.sum()))
    return np.array(frames, np.uint16)


def make_frame(counts: np.ndarray, index: int = 0, series: str = "S1", **more: Any) -> Frame:
    return Frame("eiger", series, index, counts, received=0.0, **more)


def make_run(uid: str = "run-1", expected: int | None = None, shape: tuple[int, int] = (32, 32)) -> RunStarted:
    return RunStarted(uid, "eiger", "S1", 0.0, expected, Detector(shape=shape))


def make_recipe(prior: Prior, iterations: int = 5) -> Recipe:
    return Recipe(prior, PrepareSettings(), RefineSettings(iterations=iterations), DriftSettings())
