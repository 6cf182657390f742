"""One frame's arrays -> the same, projected: the compiled passes between two transforms, each over a frame once.

Working arrays are in FFT order (beam and object in the corner); frames come and objects leave centred. Complex numbers are pairs
(real, imaginary) of float32, which vectorise where numba's complex ones do not.
"""

from __future__ import annotations

import numpy as np

from streamprior.jit import call, kernel

F32 = np.float32


@kernel
def load_counts(rows, counts, valid, held_out, target):  # type: ignore[no-untyped-def]
    """Fill `target` in FFT order; returns photons and number of the pixels that take part, and the flags of what was met.

    All arrays are (rows, columns), a volume's planes below each other; row y of the target is row rows[y] of the centred ones.
    """
    columns = counts.shape[1]
    half = columns // 2
    scale = F32(counts.size)
    photons = 0.0
    pixels = unfit = 0
    for y in range(rows.size):
        j = rows[y]
        for first, last, to in ((half, columns, 0), (0, half, columns - half)):
            goal = target[y, to : to + last - first]
            some, number, bad = load_row(counts[j, first:last], valid[j, first:last], held_out[j, first:last], scale, goal)
            photons += some
            pixels += number
            unfit += bad
    return photons, pixels, (2 if unfit else 0) | (0 if photons > 0.0 else 1)  # Flag.NONFINITE, Flag.EMPTY


@kernel
def load_row(counts, valid, held_out, scale, target):  # type: ignore[no-untyped-def]
    """sqrt(counts * scale) of the pixels that take part, -1 of the others; returns their photons, their number and that of unfit counts."""
    photons = 0.0
    pixels = unfit = 0
    for i in range(counts.size):
        fit = (counts[i] >= F32(0)) & (counts[i] < F32(np.inf))
        used = fit & valid[i] & (not held_out[i])
        target[i] = np.sqrt(counts[i] * scale) if used else F32(-1)
        photons += np.float64(counts[i]) if used else 0.0
        pixels += 1 if used else 0
        unfit += 1 if valid[i] & (not fit) else 0
    return photons, pixels, unfit


@kernel
def load_object(rows, start, support, psi, inside):  # type: ignore[no-untyped-def]
    """Start and support in FFT order; returns the support's area and Flag.NONFINITE where the start is none (it is zero there)."""
    columns = support.shape[1]
    half = columns // 2
    area = unfit = 0
    for y in range(rows.size):
        j = rows[y]
        for first, last, to in ((half, columns, 0), (0, half, columns - half)):
            end = to + last - first
            area += _copy_support(support[j, first:last], inside[y, to:end])
            unfit += _copy_object(start[j, 2 * first : 2 * last], psi[y, 2 * to : 2 * end])
    return area, 2 if unfit else 0


@kernel
def store_object(rows, psi, inside, object, support):  # type: ignore[no-untyped-def]
    """The way back of `load_object`."""
    columns = support.shape[1]
    half = columns // 2
    for y in range(rows.size):
        j = rows[y]
        for first, last, to in ((half, columns, 0), (0, half, columns - half)):
            end = to + last - first
            _copy_support(inside[y, to:end], support[j, first:last])
            _copy_object(psi[y, 2 * to : 2 * end], object[j, 2 * first : 2 * last])


@kernel
def _copy_support(source, target):  # type: ignore[no-untyped-def]
    area = 0
    for i in range(source.size):
        target[i] = source[i]
        area += 1 if source[i] else 0
    return area


@kernel
def _copy_object(source, target):  # type: ignore[no-untyped-def]
    unfit = 0
    for i in range(source.size):
        value = source[i]
        fit = abs(value) < F32(np.inf)
        target[i] = value if fit else F32(0)
        unfit += 0 if fit else 1
    return unfit


@kernel
def iterate_fftw(execute, forward, backward, psi, field, target, inside, anchor, rule, inverse, errors):  # type: ignore[no-untyped-def]
    """Iterations of one rule without coming back to Python: frames on several threads do not wait for each other's GIL."""
    for j in range(errors.size):
        call(execute, forward)
        errors[j] = project_modulus(field, target, inverse)
        call(execute, backward)
        update_object(psi, field, inside, anchor, rule)


@kernel
def project_modulus(field, target, inverse):  # type: ignore[no-untyped-def]
    """P_M in place, on an unscaled transform, with the factor that the way back needs; a target below 0 leaves the pixel as it is.

    Returns the sum of (|field| - target)^2 over the other pixels. A vanishing field has no phase and takes phase 0. Sums of 256 pixels in
    single precision vectorise; they are added in double.
    """
    error = 0.0
    zero = F32(0)
    for first in range(0, target.size, 256):
        pixels = min(256, target.size - first)
        block = field[2 * first : 2 * (first + pixels)]
        wanted = target[first : first + pixels]
        part = zero
        for i in range(pixels):
            real, imaginary = block[2 * i], block[2 * i + 1]
            modulus = np.sqrt(real * real + imaginary * imaginary)
            off = modulus - wanted[i] if wanted[i] >= zero else zero
            part += off * off
            # Added, not branched on: a branch around a division keeps the loop from being vectorised (ten times slower).
            dark = F32(1) if modulus == zero else zero
            factor = (wanted[i] / (modulus + dark) if wanted[i] >= zero else F32(1)) * inverse
            block[2 * i] = real * factor + dark * max(wanted[i], zero) * inverse
            block[2 * i + 1] = imaginary * factor
        error += np.float64(part)
    return error


@kernel
def update_object(psi, field, inside, anchor, rule):  # type: ignore[no-untyped-def]
    """psi <- (field inside, old * psi + new * field outside), then drawn towards the anchor; rule is (old, new, weight)."""
    if rule[0] == 0 and rule[1] == 0:
        _project_support(psi, field, inside)
    else:
        _feed_back(psi, field, inside, rule[0], rule[1])
    if rule[2] > 0:
        _draw(psi, anchor, rule[2])


@kernel
def _project_support(psi, field, inside):  # type: ignore[no-untyped-def]
    for i in range(inside.size):
        real, imaginary = field[2 * i], field[2 * i + 1]  # read on both sides of the choice, so that it vectorises
        psi[2 * i] = real if inside[i] else F32(0)
        psi[2 * i + 1] = imaginary if inside[i] else F32(0)


@kernel
def _feed_back(psi, field, inside, old, new):  # type: ignore[no-untyped-def]
    for i in range(inside.size):
        real, imaginary = field[2 * i], field[2 * i + 1]
        outside_real = old * psi[2 * i] + new * real
        outside_imaginary = old * psi[2 * i + 1] + new * imaginary
        psi[2 * i] = real if inside[i] else outside_real
        psi[2 * i + 1] = imaginary if inside[i] else outside_imaginary


@kernel
def _draw(psi, anchor, weight):  # type: ignore[no-untyped-def]
    share = F32(1) / (F32(1) + weight)
    for k in range(psi.size):
        psi[k] = (psi[k] + weight * anchor[k]) * share


@kernel
def score(field, target):  # type: ignore[no-untyped-def]
    """Numbers of an unscaled transform over the pixels that take part: sum (|field| - t)^2, sum |t - k |field||, sum t.

    k is the least-squares scale, so the second over the third is the R-factor.
    """
    squares = across = power = moduli = 0.0
    zero = F32(0)
    for i in range(target.size):
        used = target[i] >= zero
        modulus = np.sqrt(field[2 * i] * field[2 * i] + field[2 * i + 1] * field[2 * i + 1])
        wide = np.float64(modulus if used else zero)
        wanted = np.float64(max(target[i], zero))
        squares += (wide - wanted) * (wide - wanted)
        across += wide * wanted
        power += wide * wide
        moduli += wanted
    scale = F32(across / power) if power > 0 else zero
    residual = 0.0
    for i in range(target.size):
        modulus = np.sqrt(field[2 * i] * field[2 * i] + field[2 * i + 1] * field[2 * i + 1])
        off = abs(target[i] - scale * modulus)
        residual += np.float64(off if target[i] >= zero else zero)
    return squares, residual, moduli
