"""Fields in the sample plane -> photons in the detector plane; the house's forward model, and the wave optics around it.

Fields are centred: the object at (H//2, W//2) of the sample plane, the direct beam or Bragg peak at (H//2, W//2) of the detector.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import scipy.constants
import scipy.fft

_PLANE = (-2, -1)


def wavelength_m(energy_ev: float) -> float:
    """Photon energy in electronvolts -> wavelength in metres."""
    return float(scipy.constants.h * scipy.constants.c / (energy_ev * scipy.constants.e))


def sample_pixel_m(shape: tuple[int, int], detector_pixel_m: float, distance_m: float, energy_ev: float) -> tuple[float, float]:
    """Pitch of the sample plane along rows and columns, metres: wavelength * distance / (pixels * detector pixel)."""
    reach = wavelength_m(energy_ev) * distance_m / detector_pixel_m
    return reach / shape[0], reach / shape[1]


def far_field(psi: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """(..., H, W) centred exit wave -> (..., H, W) centred far field, by the unitary FFT: no photon is made or lost."""
    spectrum = scipy.fft.fft2(scipy.fft.ifftshift(psi, axes=_PLANE), norm="ortho")
    return np.asarray(scipy.fft.fftshift(spectrum, axes=_PLANE))


def back(field: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """(..., H, W) centred far field -> exit wave: the inverse, and the adjoint, of `far_field`."""
    psi = scipy.fft.ifft2(scipy.fft.ifftshift(field, axes=_PLANE), norm="ortho")
    return np.asarray(scipy.fft.fftshift(psi, axes=_PLANE))


def intensity(psi: npt.NDArray[np.complex64], probe: npt.NDArray[np.complex64] | None = None) -> npt.NDArray[np.float64]:
    """Expected photons (H, W) of an exit wave psi (H, W), or of an object under the incoherent modes of a probe (modes, H, W)."""
    field = far_field(psi if probe is None else probe * psi)
    photons = np.square(field.real, dtype=np.float64) + np.square(field.imag, dtype=np.float64)
    return np.asarray(photons if probe is None else photons.sum(0))


def partially_coherent(
    psi: npt.NDArray[np.complex64], probe: npt.NDArray[np.complex64], coherence_px: tuple[float, float]
) -> npt.NDArray[np.float64]:
    """Expected photons (H, W) of an object under modes of limited transverse coherence: `intensity`, blurred, with not a photon lost.

    The Gaussian Schell model (Vartanyants & Singer, New J. Phys. 12, 035004, 2010) multiplies the exit wave's autocorrelation by
    exp(-r^2 / (2 xi^2)), xi = coherence_px object pixels (rows, columns). On the detector that is a convolution with a Gaussian of
    N / (2 pi xi) pixels rms, the source's picture: the incoherent sum of the frames that its points make, each at its own angle.
    Padding to twice the size keeps the autocorrelation's lags apart; blurring the sampled frame instead would be wrong below one pixel.
    """
    shape = psi.shape
    lags = [scipy.fft.fftfreq(2 * n, 1 / (2 * n)) for n in shape]
    degree = np.exp(-((lags[0] / coherence_px[0]) ** 2)[:, None] / 2 - (lags[1] / coherence_px[1]) ** 2 / 2)
    field = scipy.fft.fft2(probe * psi, s=(2 * shape[0], 2 * shape[1]))
    power = np.square(field.real, dtype=np.float64) + np.square(field.imag, dtype=np.float64)
    correlation = scipy.fft.ifft2(power.sum(0)) * degree
    folded = correlation.reshape(2, shape[0], 2, shape[1]).sum((0, 2))
    photons = scipy.fft.fftshift(scipy.fft.fft2(folded).real) / (shape[0] * shape[1])
    # Rounding leaves dark pixels a little below zero, which no Poisson distribution takes.
    return np.asarray(np.maximum(photons, 0.0))


def propagated(
    field: npt.NDArray[np.complex64],
    shifts_px: npt.NDArray[np.float64],
    distance_m: float,
    pixel_m: tuple[float, float],
    energy_ev: float,
) -> npt.NDArray[np.complex64]:
    """A field of the sample plane, `distance_m` further on and moved sideways; its power stays.

    Parameters
    ----------
    field : (..., H, W) complex64, centred.
    shifts_px : (K, 2) float64, (rows, columns) pixels, fractions too; what leaves the window on one side comes in on the other.

    Returns
    -------
    (K, ..., H, W) complex64: one for each shift.
    """
    shape = field.shape[-2], field.shape[-1]
    transfers = np.array([ramp(shape, (-rows, -columns)) for rows, columns in shifts_px])
    if distance_m:
        transfers *= fresnel(shape, pixel_m, energy_ev, distance_m).astype(np.complex64)
    return back(far_field(field) * transfers.reshape(len(shifts_px), *(1,) * (field.ndim - 2), *shape))


def fresnel(shape: tuple[int, int], pixel_m: tuple[float, float], energy_ev: float, distance_m: float) -> npt.NDArray[np.complex128]:
    """Fresnel propagation in the far field (H, W): exp(-i pi lambda z q^2) with q in cycles per metre."""
    rows, columns = (np.arange(n) - n // 2 for n in shape)
    spatial = (rows[:, None] / (shape[0] * pixel_m[0])) ** 2 + (columns / (shape[1] * pixel_m[1])) ** 2
    return np.asarray(np.exp(-1j * np.pi * wavelength_m(energy_ev) * distance_m * spatial))


def ramp(shape: tuple[int, int], shift_px: tuple[float, float]) -> npt.NDArray[np.complex64]:
    """Phase (H, W) that moves a field's diffraction by (rows, columns) pixels, fractions too."""
    rows = np.exp(2j * np.pi * shift_px[0] * (np.arange(shape[0]) - shape[0] // 2) / shape[0])
    columns = np.exp(2j * np.pi * shift_px[1] * (np.arange(shape[1]) - shape[1] // 2) / shape[1])
    return np.asarray(rows[:, None] * columns, np.complex64)


def zone_plate_probe(
    shape: tuple[int, int], pixel_m: tuple[float, float], energy_ev: float, defocus_m: float, second_mode: float
) -> npt.NDArray[np.complex64]:
    """Probe (modes, H, W) of unit power behind a zone plate with a central stop: a bright ring on the detector.

    The ring's radii are those of CXIDB 65, 4 and 12 of 104 detector pixels. The second mode carries the share `second_mode`
    of the power; it is the first with a node through its pupil, as a source of finite size makes it.
    """
    rows, columns = (np.arange(n) - n // 2 for n in shape)
    radius = np.hypot(rows[:, None] * (104 / shape[0]), columns * (104 / shape[1]))
    pupil = 1 / (1 + np.exp(np.clip((radius - 12) * 1.5, -50, 50))) - 1 / (1 + np.exp(np.clip((radius - 4) * 1.5, -50, 50)))
    first = pupil * fresnel(shape, pixel_m, energy_ev, defocus_m)
    modes = [first * np.sqrt(1 - second_mode) / np.linalg.norm(first)]
    if second_mode > 0:
        second = first * (rows[:, None] + 0.5 * columns)
        modes.append(second * np.sqrt(second_mode) / np.linalg.norm(second))
    return back(np.asarray(modes, np.complex64))
