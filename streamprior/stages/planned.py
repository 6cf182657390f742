"""Frames -> the same, projected, over planned transforms: for the lengths that `blocks` does not do.

Working arrays are in FFT order (beam and object in the corner): frames are reordered once when they come and objects once when they leave,
not in every iteration.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.arrays import FftwPlan, corner_order, make_plan
from streamprior.records import Flag
from streamprior.stages.projections import iterate_fftw, load_counts, load_object, project_modulus, score, store_object, update_object
from streamprior.stages.schedule import OUTSIDE, Iterate, ShrinkWrap
from streamprior.stages.shrink import shrink_wrap

F32 = np.float32


class PlannedFrame:
    """Owns the FFT plan and the buffers of one frame in hand, for frames of one shape and one thread.

    free : centred flat indices of the pixels whose model is asked for. engine : as in `arrays.make_plan`.
    """

    def __init__(self, shape: tuple[int, ...], weight: float, free: npt.NDArray[np.intp], engine: str) -> None:
        self._plan, self._weight = make_plan(shape, engine), weight
        self.engine = self._plan.engine
        size = math.prod(shape)
        self._inverse = F32(1 / size)
        self._rows = corner_order(shape[:-1])
        self._free = np.argsort(corner_order(shape))[free]
        # sqrt(counts * size), the modulus that an unscaled FFT must have, or -1 where nothing was measured.
        self._target = np.empty(shape, F32)
        self._inside = np.empty(shape, np.bool_)
        self._anchor = np.zeros(2 * size, F32)
        self._best, self._best_inside, self._best_anchor = np.empty(shape, np.complex64), np.empty(shape, np.bool_), np.zeros(2 * size, F32)

    def load_counts(self, counts: npt.NDArray[Any], valid: npt.NDArray[Any], held_out: npt.NDArray[Any]) -> tuple[float, int, int]:
        """See `projections.load_counts`."""
        return load_counts(self._rows, rows(counts), rows(valid), rows(held_out), rows(self._target))  # type: ignore[no-any-return]

    def load_object(self, start: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> tuple[int, int]:
        """Take a start; returns its support's area and the flags of what is wrong with it. Without a support the object is zero."""
        area, flags = load_object(self._rows, rows(start), rows(support), rows(self._plan.psi), rows(self._inside))
        if not area:
            flags |= Flag.NO_SUPPORT
            self._plan.psi[...] = 0
        self._anchor[:] = flat(self._plan.psi)
        return int(area), int(flags)

    def iterate(self, step: Iterate, errors: npt.NDArray[np.float64]) -> None:
        """So many iterations; `errors` becomes the misfit before each."""
        plan, rule = self._plan, np.array([*OUTSIDE[step.rule], self._weight], F32)
        psi, field, target, inside = flat(plan.psi), flat(plan.field), flat(self._target), flat(self._inside)
        if isinstance(plan, FftwPlan):
            transforms = (plan.execute, plan.forward_plan, plan.backward_plan)
            iterate_fftw(*transforms, psi, field, target, inside, self._anchor, rule, self._inverse, errors)
            return
        for j in range(step.times):
            plan.forward()
            errors[j] = project_modulus(field, target, self._inverse)
            plan.backward()
            update_object(psi, field, inside, self._anchor, rule)

    def shrink_wrap(self, step: ShrinkWrap, area: int) -> None:
        """Tighten the support; `area` is the first one's."""
        shrink_wrap(self._plan.psi, step, area, self._inside)

    def score(self) -> tuple[float, float, float]:
        """Numbers of the object in hand over the measured pixels: see `projections.score`."""
        self._plan.forward()
        return score(flat(self._plan.field), flat(self._target))  # type: ignore[no-any-return]

    def misfit(self) -> float:
        """The first of them alone."""
        return self.score()[0]

    def model(self) -> npt.NDArray[np.float64]:
        """Photons of the model at the free pixels; after `score`."""
        field = self._plan.field.reshape(-1)[self._free].astype(np.complex128)
        return np.abs(field) ** 2 / self._target.size

    def keep(self) -> None:
        """Put the object in hand aside; another is loaded, or this recalled, before the next step."""
        self._best[...], self._best_inside[...], self._best_anchor[:] = self._plan.psi, self._inside, self._anchor

    def recall(self) -> None:
        """Take the object that was put aside in hand."""
        self._plan.psi[...], self._inside[...], self._anchor[:] = self._best, self._best_inside, self._best_anchor

    def store(self, psi: npt.NDArray[np.complex64], support: npt.NDArray[np.bool_]) -> None:
        """Write object and support, centred."""
        store_object(self._rows, rows(self._plan.psi), rows(self._inside), rows(psi), rows(support))


def flat(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A flat view; complex numbers as pairs (real, imaginary) of float32, which is what the kernels take."""
    return array.reshape(-1).view(F32) if array.dtype == np.complex64 else array.reshape(-1)


def rows(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same as rows along the last axis."""
    return flat(array).reshape(math.prod(array.shape[:-1]), -1)
