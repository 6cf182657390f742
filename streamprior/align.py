"""Two complex objects -> one on top of the other: what no intensity can know is removed, and what is left is the object error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

Field = npt.NDArray[np.complexfloating[Any]]

ROUNDS = 4
"""Gauss-Newton steps from the nearest whole pixel."""

LONGEST_STEP = 1.0
"""Pixels a step may move: the start is a pixel off at most, and a longer step has left the peak."""


@dataclass(frozen=True, slots=True)
class Aligned:
    """An object brought onto a reference.

    psi : complex64 like the reference: factor * ramp * shift * (twin of) the object. error : |psi - reference| / |reference|, 0..1, NaN
    where either is zero or no number. twin : the conjugate inversion psi*(-r) was taken. shift : pixels along each axis that the object was
    moved by. ramp : pixels along each axis that its diffraction was moved by (a linear phase in the object). factor : phase and scale.
    """

    psi: npt.NDArray[np.complex64]
    error: float
    twin: bool
    shift: tuple[float, ...]
    ramp: tuple[float, ...]
    factor: complex


def align(psi: npt.NDArray[Any], reference: npt.NDArray[Any]) -> Aligned:
    """Remove the trivial ambiguities of phase retrieval: complex factor, translation, conjugate inversion and linear phase ramp.

    All are searched together in the complex domain, before any modulus or phase is taken (docs/physics.md section 2): the ramp from the
    correlation of the two far-field moduli and from none at all, the translation from the correlation of the objects, both to a whole pixel
    and for both twins; then Gauss-Newton steps on all of them at once.

    Parameters
    ----------
    psi, reference : (H, W) or (D, H, W) complex
        Centred fields of the same shape. The scale of either does not matter: the factor is the least-squares one.

    Raises
    ------
    ValueError
        The shapes differ.
    """
    if psi.shape != reference.shape:
        raise ValueError(f"psi has shape {psi.shape}, the reference {reference.shape}; both must be whole fields of one shape")
    goal = np.asarray(reference, np.complex128)
    field = np.asarray(psi, np.complex128)
    powers = float(np.sum(np.abs(field) ** 2)), float(np.sum(np.abs(goal) ** 2))
    still = (0.0,) * goal.ndim
    if not (0 < powers[0] < np.inf and 0 < powers[1] < np.inf):
        return Aligned(np.asarray(psi, np.complex64), float("nan"), False, still, still, 1 + 0j)
    candidates = [(one, turned) for turned, one in enumerate((field, twin(field)))]
    starts = [(*_coarse(one, goal, ramp), ramp, turned, one) for one, turned in candidates for ramp in _ramps(one, goal)]
    starts.sort(key=lambda start: -start[0])
    best = max((_refined(one, goal, shift, ramp, turned) for _, shift, ramp, turned, one in starts[:2]), key=lambda found: found[0])
    overlap, shift, ramp, turned = best
    moved = transformed(candidates[turned][0], shift, ramp)
    factor = complex(np.vdot(moved, goal)) / float(np.sum(np.abs(moved) ** 2))
    error = float(np.sqrt(max(0.0, 1.0 - overlap**2 / (powers[0] * powers[1]))))
    return Aligned((factor * moved).astype(np.complex64), error, bool(turned), _plain(shift), _plain(ramp), factor)


def twin(field: Field) -> Field:
    """psi*(-r) about the centre (H//2, W//2): the other object with the same diffraction."""
    flipped = np.conj(np.flip(field))
    return np.asarray(np.roll(flipped, [1 - n % 2 for n in field.shape], tuple(range(field.ndim))))


def transformed(field: Field, shift: npt.NDArray[np.float64], ramp: npt.NDArray[np.float64]) -> Field:
    """The field moved by `shift` pixels (fractions too, periodic) and then multiplied by the phase that moves its diffraction by `ramp`."""
    far = scipy.fft.fftn(field)
    for axis, pixels in enumerate(shift):
        far *= _along(np.exp(-2j * np.pi * scipy.fft.fftfreq(field.shape[axis]) * pixels), axis, field.ndim)
    moved = np.asarray(scipy.fft.ifftn(far))
    for axis, pixels in enumerate(ramp):
        moved *= _along(np.exp(1j * pixels * _places(field.shape[axis])), axis, field.ndim)
    return moved


def _ramps(field: Field, goal: Field) -> list[npt.NDArray[np.float64]]:
    """Ramps worth trying, whole pixels of the far field: none, and the one that brings the moduli together."""
    far, wanted = (np.abs(scipy.fft.fftn(one)) for one in (field, goal))
    _, found = _peak(scipy.fft.ifftn(np.conj(scipy.fft.fftn(far)) * scipy.fft.fftn(wanted)))
    return [found] if not found.any() else [np.zeros_like(found), found]


def _coarse(field: Field, goal: Field, ramp: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
    """Height and place, in whole pixels, of the correlation's peak after the ramp."""
    turned = transformed(field, np.zeros(goal.ndim), ramp) if ramp.any() else field
    return _peak(scipy.fft.ifftn(np.conj(scipy.fft.fftn(turned)) * scipy.fft.fftn(goal)))


def _peak(correlation: Field) -> tuple[float, npt.NDArray[np.float64]]:
    height = np.abs(correlation)
    place = np.unravel_index(int(height.argmax()), height.shape)
    signed = [(int(at) + n // 2) % n - n // 2 for at, n in zip(place, height.shape, strict=True)]
    return float(height[place]), np.array(signed, float)


def _refined(
    field: Field, goal: Field, shift: npt.NDArray[np.float64], ramp: npt.NDArray[np.float64], turned: int
) -> tuple[float, npt.NDArray[np.float64], npt.NDArray[np.float64], int]:
    """Fractions of a pixel: (overlap |<T psi, reference>|, shift, ramp, turned), never worse than the start."""
    best = (0.0, shift, ramp, turned)
    for turn in range(ROUNDS + 1):
        moved = transformed(field, shift, ramp)
        overlap = abs(complex(np.vdot(moved, goal)))
        if overlap > best[0]:
            best = (overlap, shift, ramp, turned)
        if turn < ROUNDS:
            # The shift is applied before the ramp: the other way round differs by a constant phase alone.
            step = _step(moved, goal)
            shift, ramp = shift + step[: goal.ndim], ramp + step[goal.ndim :]
    return best


def _step(moved: Field, goal: Field) -> npt.NDArray[np.float64]:
    """(2 * ndim,) pixels of shift and of ramp: Gauss-Newton, what is left as a linear combination of the object and its derivatives.

    The object is the mean of both: the derivatives of one alone hold its noise, which made steps a fifth too short at 20 % of noise.
    """
    factor = complex(np.vdot(moved, goal)) / float(np.sum(np.abs(moved) ** 2))
    scaled = factor * moved
    between = (scaled + goal) / 2
    far = scipy.fft.fftn(between)
    axes = range(goal.ndim)
    slopes = [scipy.fft.ifftn(far * _along(-2j * np.pi * scipy.fft.fftfreq(goal.shape[a]), a, goal.ndim)) for a in axes]
    turns = [between * _along(1j * _places(goal.shape[a]), a, goal.ndim) for a in axes]
    basis = np.stack([between.ravel(), 1j * between.ravel(), *(one.ravel() for one in (*slopes, *turns))])
    gram = np.real(np.conj(basis) @ basis.T)
    wanted = np.real(np.conj(basis) @ (goal - scaled).ravel())
    step = np.linalg.lstsq(gram, wanted, rcond=None)[0][2:]
    return np.asarray(step * min(1.0, LONGEST_STEP / max(float(np.abs(step).max()), 1e-30)))


def _places(size: int) -> npt.NDArray[np.float64]:
    """Phase of each pixel for a ramp of one pixel of the far field, zero at the centre."""
    return 2 * np.pi * (np.arange(size) - size // 2) / size


def _along(values: npt.NDArray[Any], axis: int, number: int) -> npt.NDArray[Any]:
    return values.reshape([-1 if a == axis else 1 for a in range(number)])


def _plain(pixels: npt.NDArray[np.float64]) -> tuple[float, ...]:
    return tuple(float(one) for one in pixels)
