"""Frames at their places on a canvas -> the canvas after them, on the CPU: one pass of each, or all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streamprior.arrays import FftwPlan, make_plan
from streamprior.mosaic.kernels import (
    F32,
    compare_probe,
    constrain,
    gather_frames_fftw,
    gather_window,
    illuminate,
    part_seen,
    pass_frames_fftw,
    store_window,
    update_window,
)
from streamprior.mosaic.probe import ProbePlaces


@dataclass(frozen=True, slots=True)
class Rule:
    """How a frame moves the mosaic.

    iterations : projections and updates of the frame's own patch before it goes into the mosaic. weight : of the proximal term, in units of
    the probe's largest intensity. memory : how much the light that the mosaic has had adds to it, 0 (none) to 1 (a running mean).
    lit : whether the frame's light is new; False for a further pass.
    """

    iterations: int = 1
    weight: float = 0.05
    memory: float = 0.3
    lit: bool = True


DIM = 0.1
"""Part of the probe's largest intensity; places that have had less light count as not seen before."""


@dataclass(frozen=True, slots=True)
class Shots:
    """Frames ready to be put in, B of them.

    corners : (B, 2) int64, row and column of each window on the canvas. slots : (B,) int64, place within a pixel. targets : (B, H, W)
    float32, sqrt(counts H W) with the beam in the corner, below 0 where not measured. trust : (B or 1, H, W) float32.
    """

    corners: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    targets: npt.NDArray[np.float32]
    trust: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(slots=True)
class Canvas:
    """A mosaic in the making; (rows, columns). image : complex64, 1 where no light was. light : float32, sum of the probe's intensity."""

    image: Any
    light: Any


Corners = npt.NDArray[np.int64]
"""(B, 2) row and column of windows on a canvas."""


class Overlap(Protocol):
    """What computes: one for each thread or card. Arrays of a canvas are its own; only `fetch` brings them to the host."""

    def canvas(self, rows: int, columns: int) -> Canvas: ...

    def grow(self, canvas: Canvas, rows: int, columns: int, row: int, column: int) -> Canvas: ...

    def passes(self, canvas: Canvas, shots: Shots, places: ProbePlaces, rule: Rule, refine: bool) -> npt.NDArray[np.float64]: ...

    def gather(self, canvas: Canvas, total: Canvas, shots: Shots, places: ProbePlaces, refine: bool) -> npt.NDArray[np.float64]: ...

    def project(self, canvas: Canvas, total: Canvas) -> None: ...

    def without(self, canvas: Canvas, corners: Corners, slots: npt.NDArray[np.int64], places: ProbePlaces) -> Canvas: ...

    def take_gradient(self) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]: ...

    def fetch(self, canvas: Canvas) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]: ...


FLOOR = 1e-3
"""Part of the largest light by which the overlap projection is held to what was there: where hardly any light was, nothing moves."""


class CpuOverlap:
    """One thread's FFT plan and buffers. It owns no canvas.

    Parameters
    ----------
    shape : (H, W) of a frame. modes : of the probe. engine : as in `arrays.make_plan`.
    """

    def __init__(self, shape: tuple[int, int], modes: int, engine: str = "auto") -> None:
        self._plan = make_plan(shape, engine, modes)
        self._patch = np.zeros((2, shape[0], 2 * shape[1]), F32)
        self._gradient = np.zeros((0, modes, shape[0], 2 * shape[1]), F32)
        self._nothing = self._gradient
        self._dose = np.zeros(shape, F32)
        self._asked = 0  # slots of the gradient that are in use

    def canvas(self, rows: int, columns: int) -> Canvas:
        return Canvas(np.ones((rows, columns), np.complex64), np.zeros((rows, columns), F32))

    def grow(self, canvas: Canvas, rows: int, columns: int, row: int, column: int) -> Canvas:
        """A canvas of (rows, columns) that holds the old one from (row, column) on."""
        grown = self.canvas(rows, columns)
        height, width = canvas.light.shape
        grown.image[row : row + height, column : column + width] = canvas.image
        grown.light[row : row + height, column : column + width] = canvas.light
        return grown

    def passes(self, canvas: Canvas, shots: Shots, places: ProbePlaces, rule: Rule, refine: bool) -> npt.NDArray[np.float64]:
        """Put frames in, one after another. Returns (B, 3): sum (|field| - target)^2 before the first and the last update of each, and the
        part of its light that fell where others had been."""
        misfit = np.zeros((len(shots), 3))
        gradient = self._room(places, shots) if refine else self._nothing
        numbers = np.array([rule.iterations, rule.weight * places.peak, rule.memory, DIM * places.peak, rule.lit])
        plan = self._plan
        common = (_pairs(plan.psi), _pairs(plan.field), _pairs(places.probes), places.power, shots.slots, shots.corners, shots.targets)
        rest = (shots.trust, _pairs(canvas.image), canvas.light, self._patch, numbers, misfit, gradient, self._dose)
        if isinstance(plan, FftwPlan):
            pass_frames_fftw(plan.execute, plan.forward_plan, plan.backward_plan, *common, *rest)
        else:
            self._pass_frames(*common, *rest)
        return misfit

    def _pass_frames(self, *arrays: Any) -> None:
        """`pass_frames_fftw` with another library's transforms."""
        psi, field, probes, power, slots, corners, targets, trust, image, light, patch, rule, misfit, gradient, dose = arrays
        for b, (row, column) in enumerate(corners):
            probe, intensity = probes[slots[b]], power[slots[b]]
            misfit[b, 2] = part_seen(light, row, column, intensity, F32(rule[3]))
            for step in range(int(rule[0])):
                illuminate(*((image, row, column) if step == 0 else (patch[0], 0, 0)), probe, psi)
                self._plan.forward()
                misfit[b, 1] = constrain(field, targets[b], trust[b % len(trust)], patch[1, 0])
                if step == 0:
                    misfit[b, 0] = misfit[b, 1]
                self._plan.backward()
                update_window(image, light, row, column, probe, intensity, field, patch, rule)
            if len(gradient):
                compare_probe(image, row, column, probe, field, gradient[slots[b]], dose)
            store_window(image, light, row, column, patch[0], intensity, F32(rule[4]))

    def gather(self, canvas: Canvas, total: Canvas, shots: Shots, places: ProbePlaces, refine: bool) -> npt.NDArray[np.float64]:
        """Add to `total` what frames ask of a canvas that stands still; `project` then moves it. Returns (B,): sum (|field| - target)^2."""
        misfit = np.zeros(len(shots))
        gradient = self._room(places, shots) if refine else self._nothing
        plan = self._plan
        common = (_pairs(plan.psi), _pairs(plan.field), _pairs(places.probes), places.power, shots.slots, shots.corners, shots.targets)
        rest = (shots.trust, _pairs(canvas.image), _pairs(total.image), total.light, self._patch, misfit, gradient, self._dose)
        if isinstance(plan, FftwPlan):
            gather_frames_fftw(plan.execute, plan.forward_plan, plan.backward_plan, *common, *rest)
        else:
            self._gather_frames(*common, *rest)
        return misfit

    def _gather_frames(self, *arrays: Any) -> None:
        """`gather_frames_fftw` with another library's transforms."""
        psi, field, probes, power, slots, corners, targets, trust, image, total, light, patch, misfit, gradient, dose = arrays
        for b, (row, column) in enumerate(corners):
            probe, intensity = probes[slots[b]], power[slots[b]]
            illuminate(image, row, column, probe, psi)
            self._plan.forward()
            misfit[b] = constrain(field, targets[b], trust[b % len(trust)], patch[1, 0])
            self._plan.backward()
            gather_window(image, total, light, row, column, probe, intensity, field)
            if len(gradient):
                compare_probe(image, row, column, probe, field, gradient[slots[b]], dose)

    def project(self, canvas: Canvas, total: Canvas) -> None:
        """The overlap projection: image += total / light."""
        canvas.image += total.image / (total.light + F32(FLOOR) * max(F32(total.light.max()), F32(1e-30)))

    def without(self, canvas: Canvas, corners: Corners, slots: npt.NDArray[np.int64], places: ProbePlaces) -> Canvas:
        """The same image with the light of all frames but these, for passing them again as if they came for the first time."""
        return Canvas(canvas.image, light_without(canvas.light.copy(), corners, slots, places))

    def take_gradient(self) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]:
        """What the frames since the last call ask of the probe (slots used, modes, H, W), and the sum of |object|^2 under it (H, W)."""
        gradient, dose = self._gradient[: self._asked].view(np.complex64).copy(), self._dose.copy()
        self._gradient[: self._asked] = 0
        self._dose[...] = 0
        self._asked = 0
        return gradient, dose

    def fetch(self, canvas: Canvas) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.float32]]:
        return canvas.image.copy(), canvas.light.copy()

    def _room(self, places: ProbePlaces, shots: Shots) -> npt.NDArray[np.float32]:
        self._asked = max(self._asked, int(shots.slots.max(initial=-1)) + 1)
        if len(self._gradient) < len(places.probes):
            grown = np.zeros((len(places.probes), *self._gradient.shape[1:]), F32)
            grown[: len(self._gradient)] = self._gradient
            self._gradient = grown
        return self._gradient


def light_without(
    light: npt.NDArray[np.float32], corners: Corners, slots: npt.NDArray[np.int64], places: ProbePlaces
) -> npt.NDArray[np.float32]:
    """(rows, columns) of light, in place less that of frames at these corners."""
    rows, columns = places.power.shape[1:]
    for (row, column), slot in zip(corners.tolist(), slots.tolist(), strict=True):
        light[row : row + rows, column : column + columns] -= places.power[slot]
    # A probe that has moved since leaves a little less or more than there was.
    return np.maximum(light, 0, out=light)


def _pairs(array: npt.NDArray[np.complex64]) -> npt.NDArray[np.float32]:
    """Complex numbers as pairs of float32 along the last axis."""
    return array.view(F32)
