"""One frame's far field and the mosaic under its probe -> the mosaic after it: the compiled passes between two transforms.

Complex numbers are pairs (real, imaginary) of float32 along the last axis, which vectorise where numba's complex ones do not. Windows
are in the order of the mosaic, far fields and targets with the beam in the corner: the modulus of a far field does not know where in its
window the object lies.
"""

from __future__ import annotations

import numpy as np

from streamprior.jit import call, kernel

F32 = np.float32


@kernel
def pass_frames_fftw(  # type: ignore[no-untyped-def]
    execute, forward, backward, psi, field, probes, power, slots, corners, targets, trust, image, light, patch, rule, misfit, gradient, dose
):
    """Frames one after another without coming back to Python, so that two threads do not wait for each other's GIL.

    Parameters
    ----------
    execute, forward, backward : addresses of FFTW's execute and of its plans from psi to field and within field.
    psi, field : (M, H, 2W), buffers of the plan. probes : (S, M, H, 2W), the probe at S places within a pixel; power : (S, H, W), its
        intensity. slots : (B,) which of them a frame has. corners : (B, 2), row and column of its window.
    targets : (B, H, W), sqrt(counts H W), below 0 where not measured. trust : (B or 1, H, W), 1 where a pixel's modulus is believed.
    image : (R, 2C), light : (R, C): the mosaic and the illumination it has had. patch : (2, H, 2W) scratch.
    rule : (iterations, weight, memory, dim, lit); the first three as in `update_window`, weight and dim in units of `power`. Places with
        less light than dim count as not seen before. lit : 1 where the frame's light is added, 0 where it was there before.
    misfit : (B, 3), filled with sum (|field| - target)^2 before the frame's first and before its last update, and with the part of the
        probe's light that falls where the mosaic had been seen.
    gradient : (S, M, H, 2W), the probe's update at each place, added to; or empty. dose : (H, W), sum of |object|^2 under the probe, added
        to.
    """
    for b in range(slots.size):
        probe, intensity = probes[slots[b]], power[slots[b]]
        row, column = corners[b, 0], corners[b, 1]
        belief = trust[b if trust.shape[0] > 1 else 0]
        misfit[b, 2] = part_seen(light, row, column, intensity, F32(rule[3]))
        for step in range(int(rule[0])):
            if step == 0:
                illuminate(image, row, column, probe, psi)
            else:
                illuminate(patch[0], 0, 0, probe, psi)
            call(execute, forward)
            misfit[b, 1] = constrain(field, targets[b], belief, patch[1, 0])
            if step == 0:
                misfit[b, 0] = misfit[b, 1]
            call(execute, backward)
            update_window(image, light, row, column, probe, intensity, field, patch, rule)
        if gradient.shape[0] > 0:
            compare_probe(image, row, column, probe, field, gradient[slots[b]], dose)
        store_window(image, light, row, column, patch[0], intensity, F32(rule[4]))


@kernel
def gather_frames_fftw(  # type: ignore[no-untyped-def]
    execute,
    forward,
    backward,
    psi,
    field,
    probes,
    power,
    slots,
    corners,
    targets,
    trust,
    image,
    total,
    light,
    patch,
    misfit,
    gradient,
    dose,
):
    """All frames against one image that stands still: total += conj(probe) (field - probe image), light += |probe|^2.

    image + total / light is the overlap projection of the difference map (Thibault et al., Ultramicroscopy 109, 338, 2009). misfit : (B,),
    filled with sum (|field| - target)^2. The other arguments are those of `pass_frames_fftw`.
    """
    for b in range(slots.size):
        probe, intensity = probes[slots[b]], power[slots[b]]
        row, column = corners[b, 0], corners[b, 1]
        illuminate(image, row, column, probe, psi)
        call(execute, forward)
        misfit[b] = constrain(field, targets[b], trust[b if trust.shape[0] > 1 else 0], patch[1, 0])
        call(execute, backward)
        gather_window(image, total, light, row, column, probe, intensity, field)
        if gradient.shape[0] > 0:
            compare_probe(image, row, column, probe, field, gradient[slots[b]], dose)


@kernel
def illuminate(image, row, column, probe, psi):  # type: ignore[no-untyped-def]
    """psi = probe times the window of the image at (row, column), for each mode."""
    for m in range(psi.shape[0]):
        for y in range(psi.shape[1]):
            light, goal = probe[m, y], psi[m, y]
            seen = image[row + y, 2 * column : 2 * column + light.size]
            for x in range(light.size // 2):
                a, b = light[2 * x], light[2 * x + 1]
                c, d = seen[2 * x], seen[2 * x + 1]
                goal[2 * x] = a * c - b * d
                goal[2 * x + 1] = a * d + b * c


@kernel
def constrain(field, target, trust, factor):  # type: ignore[no-untyped-def]
    """P_M for incoherent modes, in place, on an unscaled transform, with the factor that the way back needs.

    All modes of a pixel are scaled alike, so that the sum of their intensities is what was counted (Thibault & Menzel, Nature 494, 68,
    2013); only by the part `trust` of it. A target below 0 leaves the pixel as it is. Returns the sum of (modulus - target)^2. factor is
    scratch, a row long.
    """
    inverse = F32(1.0 / target.size)
    zero, one = F32(0), F32(1)
    error = 0.0
    columns = target.shape[1]
    for y in range(target.shape[0]):
        wanted, belief = target[y], trust[y]
        for x in range(columns):
            factor[x] = zero
        for m in range(field.shape[0]):
            line = field[m, y]
            for x in range(columns):
                factor[x] += line[2 * x] * line[2 * x] + line[2 * x + 1] * line[2 * x + 1]
        part = zero
        for x in range(columns):
            modulus = np.sqrt(factor[x])
            off = modulus - wanted[x] if wanted[x] >= zero else zero
            part += off * off
            # Added, not branched on: a branch around a division keeps the loop from being vectorised. A dark pixel has no phase, and stays.
            dark = one if modulus == zero else zero
            ratio = wanted[x] / (modulus + dark) - one if wanted[x] >= zero else zero
            factor[x] = (one + belief[x] * ratio) * inverse
        error += np.float64(part)
        for m in range(field.shape[0]):
            line = field[m, y]
            for x in range(columns):
                line[2 * x] *= factor[x]
                line[2 * x + 1] *= factor[x]
    return error


@kernel
def update_window(image, light, row, column, probe, intensity, field, patch, rule):  # type: ignore[no-untyped-def]
    """patch[0] = argmin over o of sum_m |probe_m o - field_m|^2 + (weight + memory light) |o - image|^2, pixel by pixel.

    The proximal step: the frame moves the mosaic the less, the more light the mosaic has had there. With memory 0, (1 + weight) times this
    step is rPIE (Maiden, Johnson & Li, Optica 4, 736, 2017) with alpha = weight / (1 + weight); with memory 1 and weight 0 it is the
    running weighted mean.
    """
    weight, memory = F32(rule[1]), F32(rule[2])
    columns = intensity.shape[1]
    gained = patch[1, 0]
    for y in range(intensity.shape[0]):
        for x in range(2 * columns):
            gained[x] = F32(0)
        for m in range(probe.shape[0]):
            add_adjoint(probe[m, y], field[m, y], gained)
        move_row(
            image[row + y, 2 * column : 2 * (column + columns)],
            light[row + y, column : column + columns],
            intensity[y],
            gained,
            weight,
            memory,
            patch[0, y],
        )


@kernel
def add_adjoint(probe, field, gained):  # type: ignore[no-untyped-def]
    """gained += conj(probe) field, along a row."""
    for x in range(field.size // 2):
        a, b = probe[2 * x], probe[2 * x + 1]
        c, d = field[2 * x], field[2 * x + 1]
        gained[2 * x] += a * c + b * d
        gained[2 * x + 1] += a * d - b * c


@kernel
def move_row(old, had, own, gained, weight, memory, new):  # type: ignore[no-untyped-def]
    """new = old + (gained - own old) / (own + weight + memory had), along a row."""
    for x in range(own.size):
        share = F32(1) / (own[x] + weight + memory * had[x])
        new[2 * x] = old[2 * x] + (gained[2 * x] - own[x] * old[2 * x]) * share
        new[2 * x + 1] = old[2 * x + 1] + (gained[2 * x + 1] - own[x] * old[2 * x + 1]) * share


@kernel
def compare_probe(image, row, column, probe, field, gradient, dose):  # type: ignore[no-untyped-def]
    """gradient += conj(object) (field - probe object) for each mode, dose += |object|^2; the object as it was before the frame."""
    columns = dose.shape[1]
    for y in range(dose.shape[0]):
        seen, had = image[row + y, 2 * column : 2 * (column + columns)], dose[y]
        for m in range(probe.shape[0]):
            add_residual(seen, probe[m, y], seen, field[m, y], gradient[m, y])
        for x in range(columns):
            had[x] += seen[2 * x] * seen[2 * x] + seen[2 * x + 1] * seen[2 * x + 1]


@kernel
def gather_window(image, total, light, row, column, probe, intensity, field):  # type: ignore[no-untyped-def]
    """One frame's part of the overlap projection."""
    columns = intensity.shape[1]
    for y in range(intensity.shape[0]):
        first, last = 2 * column, 2 * (column + columns)
        for m in range(probe.shape[0]):
            add_residual(probe[m, y], probe[m, y], image[row + y, first:last], field[m, y], total[row + y, first:last])
        had, own = light[row + y, column : column + columns], intensity[y]
        for x in range(columns):
            had[x] += own[x]


@kernel
def part_seen(light, row, column, intensity, dim):  # type: ignore[no-untyped-def]
    """Part of the probe's light that falls where the mosaic has had more light than `dim`."""
    columns = intensity.shape[1]
    everywhere = seen = 0.0
    for y in range(intensity.shape[0]):
        had, own = light[row + y, column : column + columns], intensity[y]
        line = part = F32(0)
        for x in range(columns):
            line += own[x]
            part += own[x] if had[x] > dim else F32(0)
        everywhere += np.float64(line)
        seen += np.float64(part)
    return seen / everywhere if everywhere > 0.0 else 0.0


@kernel
def store_window(image, light, row, column, patch, intensity, lit):  # type: ignore[no-untyped-def]
    """The frame's window into the mosaic, and its light, `lit` times, to the light that the mosaic has had."""
    columns = intensity.shape[1]
    for y in range(intensity.shape[0]):
        goal, new = image[row + y, 2 * column : 2 * (column + columns)], patch[y]
        had, own = light[row + y, column : column + columns], intensity[y]
        for x in range(2 * columns):
            goal[x] = new[x]
        for x in range(columns):
            had[x] += lit * own[x]


@kernel
def power_of(targets):  # type: ignore[no-untyped-def]
    """(B,) float64: sum of the squares of what was measured, at least 1."""
    power = np.ones(targets.shape[0])
    for b in range(targets.shape[0]):
        total = 0.0
        for y in range(targets.shape[1]):
            line, part = targets[b, y], F32(0)
            for x in range(line.size):
                part += line[x] * line[x] if line[x] > F32(0) else F32(0)
            total += np.float64(part)
        power[b] = max(total, 1.0)
    return power


@kernel
def add_residual(adjoint, probe, object, field, gained):  # type: ignore[no-untyped-def]
    """gained += conj(adjoint) (field - probe object), along a row."""
    for x in range(field.size // 2):
        a, b = probe[2 * x], probe[2 * x + 1]
        c, d = object[2 * x], object[2 * x + 1]
        real = field[2 * x] - (a * c - b * d)
        imaginary = field[2 * x + 1] - (a * d + b * c)
        e, f = adjoint[2 * x], adjoint[2 * x + 1]
        gained[2 * x] += e * real + f * imaginary
        gained[2 * x + 1] += e * imaginary - f * real
