"""A backend's name -> what puts frames into mosaics."""

from __future__ import annotations

from collections.abc import Callable

from streamprior.arrays import check_backend
from streamprior.mosaic.cuda import CudaOverlap
from streamprior.mosaic.overlap import CpuOverlap, Overlap


def overlap_maker(shape: tuple[int, int], backend: str) -> Callable[[int], Overlap]:
    """modes -> what computes frames of (H, W) on "cpu", "cuda", or "auto": a CUDA card where there is one.

    Raises ConfigError where the backend cannot compute here.
    """
    if check_backend(backend, ("cpu", "cuda")) == "cuda":
        return lambda modes: CudaOverlap(shape, modes)
    return lambda modes: CpuOverlap(shape, modes)
