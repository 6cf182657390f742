"""One frame, its start and support -> error reduction as others do it: a plain loop over numpy.fft or scipy.fft, and cohere."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

Array = npt.NDArray[Any]
Solve = Callable[[], tuple[Array, list[float]]]
"""Solves one frame from its start: (object, centred and in our scale; misfit before each iteration, as chi2)."""


def scipy_er(counts: Array, start: Array, support: Array, iterations: int, workers: int = 1) -> Solve:
    forward, backward = (partial(transform, norm="ortho", workers=workers) for transform in (scipy.fft.fftn, scipy.fft.ifftn))
    return lambda: _loop(forward, backward, counts, start, support, iterations)


def numpy_er(counts: Array, start: Array, support: Array, iterations: int) -> Solve:
    forward, backward = (partial(transform, norm="ortho") for transform in (np.fft.fftn, np.fft.ifftn))
    return lambda: _loop(forward, backward, counts, start, support, iterations)


def _loop(
    forward: Callable[[Array], Array], backward: Callable[[Array], Array], counts: Array, start: Array, support: Array, iterations: int
) -> tuple[Array, list[float]]:
    """What one writes by hand, and well: single precision, in FFT order."""
    magnitude, psi, inside = np.sqrt(scipy.fft.ifftshift(counts)), scipy.fft.ifftshift(start), scipy.fft.ifftshift(support)
    history = []
    for _ in range(iterations):
        field = forward(psi)
        modulus = np.abs(field)
        history.append(float(((modulus - magnitude) ** 2).sum() / (magnitude**2).sum()))
        field *= magnitude / np.maximum(modulus, np.float32(1e-12))
        psi = backward(field) * inside
    return scipy.fft.fftshift(psi), history


def cohere_er(counts: Array, start: Array, support: Array, iterations: int, workers: int = 1) -> Solve:
    """cohere's `np` backend, in single precision; it reads its files before the clock runs, and its object's scale is lost (maximum 1).

    Raises ImportError where cohere is not installed.
    """
    from cohere_core.controller import phasing

    # Its forward transform has the other sign, so its object is the conjugate; its transforms are not unitary, its arrays not centred.
    first = (np.conj(scipy.fft.ifftshift(start)) / np.sqrt(np.float32(counts.size))).astype(np.complex64)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        np.save(Path(folder, "data.npy"), np.sqrt(counts))
        np.save(Path(folder, "image.npy"), first)
        np.save(Path(folder, "support.npy"), scipy.fft.ifftshift(support).astype(np.float32))
        settings = {"algorithm_sequence": f"{iterations}*ER", "continue_dir": folder}
        rec = phasing.create_rec(settings, str(Path(folder, "data.npy")), "np", -1, debug=True)

    def solve() -> tuple[Array, list[float]]:
        rec.ds_image, rec.errs = first, []
        # It says how long it took, among lines that are JSON; and divides by moduli that vanish before it leaves those out.
        with contextlib.redirect_stdout(io.StringIO()), np.errstate(divide="ignore", invalid="ignore"), scipy.fft.set_workers(workers):
            rec.iterate()
        return scipy.fft.fftshift(np.conj(rec.ds_image)), rec.errs

    return solve
