"""Recorded frames -> the mosaic that an offline package makes of them: Pty-Chi (Argonne), on the CPU.

Pty-Chi and torch are not installed with streamprior; they are imported inside `ptychi_solve`, so that this module can be read without them.
What follows was found with ptychi 2.2.0 and torch 2.13.0:

* Its FFT is not scaled: a probe of ours, whose sum of |probe|^2 is photons under the orthonormal FFT, is smaller by sqrt(H W) there.
* It transforms arrays as they lie, and wants the direct beam of the frames at pixel (0, 0); a shift of the exit wave changes only phases.
* Its positions are centres of windows: row + origin - (H - 1) / 2 is the window's first row, rounded half to even, and the fraction moves
  the probe by Fourier shift - the first mode only. Frames with several modes are better given at whole positions.
* torch and torchvision must be of one build: beside a CPU torch, a torchvision built for CUDA ends its import with a RuntimeError.
* With two threads, torch's threads wait for each other spinning: beside any other busy process an epoch can take 30 times as long.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ALGORITHMS = {"ePIE": "EPIEOptions", "rPIE": "RPIEOptions", "LSQML": "LSQMLOptions", "DM": "DMOptions", "AD": "AutodiffPtychographyOptions"}
"""Our name -> the class of its options in ptychi.api; PIE, RAAR and BH exist there too."""

MARGIN = 2
"""Pixels around the outermost windows: Pty-Chi pads the object at every batch where a window would leave it."""


@dataclass(frozen=True, slots=True)
class PtyChiSettings:
    """How Pty-Chi is run; the defaults gave the lowest chi2 on the measured Siemens star (0.0128 after 12 epochs).

    Lowest chi2 is not best image: AD with strength 0.5 (0.0140) and ePIE with batch 1 (0.0188) agree better between odd and even frames.
    """

    algorithm: str = "ePIE"
    """One of ALGORITHMS."""
    epochs: int = 12
    batch: int = 8
    """Frames between two updates; DM takes all frames at once and uses it as the length of its chunks."""
    batching: str = "uniform"
    """random, uniform (each batch spread over the object) or compact (neighbours)."""
    probe_from: int | None = 3
    """The first epoch, counted from 0, that updates the probe; None: the probe is known."""
    strength: float = 1.0
    """alpha of ePIE and rPIE (Pty-Chi's default is 0.1, for ePIE a tenth of the published step), and the step of AD; others ignore it."""
    threads: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OfflineMosaic:
    """What an offline package made of a set of frames."""

    object: Array
    """(rows, columns) complex64, 1 where no light came."""
    corner: tuple[int, int]
    """(row, column) of the object's pixel (0, 0), in the pixels of the positions given."""
    probe: Array
    """(modes, H, W) complex64, scaled as given: the sum of |probe|^2 is photons under the orthonormal FFT."""
    epoch_s: tuple[float, ...]
    """Wall time of each epoch, without imports, set-up and copying."""
    frames: int

    @property
    def frame_passes_per_s(self) -> float:
        """Frames times epochs over the time of the epochs."""
        return self.frames * len(self.epoch_s) / sum(self.epoch_s)


def ptychi_solve(
    counts: Array, probe: Array, positions: Array, settings: PtyChiSettings | None = None, *, valid: Array | None = None
) -> OfflineMosaic:
    """Reconstruct a ptychography set with Pty-Chi from an object of ones.

    Parameters
    ----------
    counts : (N, H, W) any real dtype
        Photons, direct beam at (H // 2, W // 2).
    probe : (modes, H, W) complex
        Centred; the sum of |probe|^2 is the photons of a frame where the object is 1.
    positions : (N, 2) float64, pixels
        (row, column) of each window's first pixel, from any origin; fractions are kept.
    settings : PtyChiSettings, optional
    valid : (H, W) bool, optional
        True where a pixel was measured; the others are left free.

    Returns
    -------
    OfflineMosaic

    Raises
    ------
    ModuleNotFoundError
        Where ptychi or torch is not installed.
    KeyError
        Where the algorithm is not one of ALGORITHMS.

    Notes
    -----
    Pty-Chi seeds Python's, numpy's and torch's global generators and sets torch's default device and dtype; only the number of torch's
    threads is put back afterwards.
    """
    import ptychi.api as api
    from ptychi.api.task import PtychographyTask

    settings = settings or PtyChiSettings()
    shape, corner = _canvas(positions, counts.shape[1:])
    relative = np.asarray(positions, np.float64) - corner
    scale = np.sqrt(np.prod(probe.shape[-2:]))
    with _threads(settings.threads):
        task = PtychographyTask(
            _options(api, settings, counts.shape[1:]),
            diffraction_data=np.fft.ifftshift(counts, (1, 2)).astype(np.float32),
            object_data=np.ones((1, *shape), np.complex64),
            probe_data=(probe[None] / scale).astype(np.complex64),
            probe_position_x_px=relative[:, 1],
            probe_position_y_px=relative[:, 0],
            valid_pixel_mask=None if valid is None else np.fft.ifftshift(valid),
        )
        epoch_s = tuple(_timed(lambda: task.run(1)) for _ in range(settings.epochs))
        mosaic, refined = (task.get_data_to_cpu(name, as_numpy=True) for name in ("object", "probe"))
    return OfflineMosaic(mosaic[0].copy(), corner, (refined[0] * scale).astype(np.complex64), epoch_s, len(counts))


def _canvas(positions: Array, window: tuple[int, ...]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shape of the object, and the position of its pixel (0, 0)."""
    lowest = np.floor(positions.min(0)).astype(int) - MARGIN
    highest = np.ceil(positions.max(0)).astype(int) + window + MARGIN
    rows, columns = (int(n) for n in highest - lowest)
    return (rows, columns), (int(lowest[0]), int(lowest[1]))


def _options(api: Any, settings: PtyChiSettings, window: tuple[int, ...]) -> Any:
    """Pty-Chi's options for these settings, on the CPU and in single precision."""
    options = getattr(api, ALGORITHMS[settings.algorithm])()
    reconstructor, mosaic, probe = options.reconstructor_options, options.object_options, options.probe_options
    reconstructor.batch_size = settings.batch
    reconstructor.batching_mode = api.BatchingModes(settings.batching)
    reconstructor.default_device = api.Devices.CPU
    reconstructor.random_seed = settings.seed
    if settings.algorithm == "DM":
        reconstructor.chunk_length = settings.batch
    if settings.algorithm == "LSQML":
        reconstructor.rescale_probe_intensity_in_first_epoch = False  # it would spend the first epoch on that alone
    if settings.algorithm in {"ePIE", "rPIE"}:
        mosaic.alpha = probe.alpha = settings.strength
    if settings.algorithm == "AD":
        mosaic.step_size = probe.step_size = settings.strength
    mosaic.determine_position_origin_coords_by = api.ObjectPosOriginCoordsMethods.SPECIFIED
    mosaic.position_origin_coords = [(n - 1) / 2 for n in window]
    mosaic.remove_object_probe_ambiguity.enabled = False  # it rescales the probe that was given, even one that is held
    probe.optimizable = settings.probe_from is not None
    probe.optimization_plan.start = settings.probe_from or 0
    options.data_options.fft_shift = False
    return options


@contextmanager
def _threads(number: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _timed(act: Callable[[], object]) -> float:
    began = time.perf_counter()
    act()
    return time.perf_counter() - began
