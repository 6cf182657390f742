"""The nouns: frozen records that flow from the socket to the sinks."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

NOT_MEASURED = 255
"""Class id of a pixel that was not measured (dead, hot, gap, beam stop, saturated); priors hold at most 255 classes."""


_EV_M = 1.239841984e-6
"""h c / e, electronvolt metres (CODATA 2018)."""


class Flag(enum.IntFlag):
    """What is unusual about a frame; stored with every result, never a reason to stop a run."""

    EMPTY = 1  # no photon on any valid pixel: chi2 is undefined, the object stays the start
    NONFINITE = 2  # NaN or infinity in the frame: those pixels were treated as not measured
    SATURATED = 4  # pixels at the dtype's maximum (or the detector's saturation value) that the static mask does not hold
    NO_SUPPORT = 8  # the support is empty: nothing to reconstruct, the object is zero
    NOT_REFINED = 16  # refinement was skipped on purpose (settings or overload); the mask is complete
    ABSTAINED = 32  # no prototype is near this frame: it was refined from a flat start, as without a library
    NO_POSITION = 64  # a position was due and did not come within the bound; a later one is still written into the archive
    AWAY_FROM_CARD = 128  # computed on the CPU, because the card that the run is computed on had failed or had no room


@dataclass(frozen=True, slots=True)
class Detector:
    """What a series' start message says about the detector; None where it does not say.

    shape is (rows, columns); mask is True where a pixel is unusable; flat multiplies counts.
    """

    shape: tuple[int, int] | None = None
    mask: npt.NDArray[np.bool_] | None = None
    flat: npt.NDArray[np.float32] | None = None
    saturation: float | None = None  # counts
    beam_centre: tuple[float, float] | None = None  # (row, column), pixels
    pixel_m: float | None = None
    distance_m: float | None = None
    energy_ev: float | None = None
    frame_time_s: float | None = None

    @property
    def reach_m(self) -> float | None:
        """wavelength x distance / pixel: over the number of detector pixels along an axis it is the object pixel. None where not all of it
        is known."""
        if not (self.energy_ev and self.distance_m and self.pixel_m):
            return None
        return _EV_M / self.energy_ev * self.distance_m / self.pixel_m


@dataclass(frozen=True, slots=True)
class SeriesStart:
    """A start message as decoded: a hint that a run begins."""

    source: str
    series: str
    expected: int | None
    detector: Detector
    metadata: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 1000


@dataclass(frozen=True, slots=True)
class SeriesEnd:
    """An end message as decoded: a hint that a run is over. late : as in `Frame`."""

    source: str
    series: str
    nbytes: int = 200
    late: Mapping[int, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Frame:
    """One image. Its identity is (source, series, index), never its order of arrival.

    counts : (rows, columns) unsigned integer or float32, photons as the detector gave them.
    detector_time, received : Unix seconds; the first from the detector's own clock, None where it gives none.
    position : (x, y) of the probe on the sample in metres, sample frame.
    origin : index in the recorded file when the frame is replayed. late : positions of earlier frames that came with this one's message.
    flags : of `Flag`, what is known before the stages see the frame.
    """

    source: str
    series: str
    index: int
    counts: npt.NDArray[Any]
    received: float
    detector_time: float | None = None
    position: tuple[float, float] | None = None
    origin: int | None = None
    late: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    flags: int = 0

    @property
    def nbytes(self) -> int:
        return int(self.counts.nbytes) + 200


@dataclass(frozen=True, slots=True)
class Reading:
    """Where the motors of a scan stood: what an event document says. `number` counts the scan's events of one stream from 0.

    scan : uid of the Bluesky run. time : Unix seconds. position : (x, y) of the probe on the sample in metres.
    """

    source: str
    scan: str
    number: int
    time: float
    position: tuple[float, float]
    nbytes: int = 200


@dataclass(frozen=True, slots=True)
class Exposures:
    """Which frames of a scan belong to which readings: [first, first + frames) to [number, number + readings), in equal parts.

    What a stream_datum document says. Where a scan has none, frame i belongs to reading i.
    """

    source: str
    scan: str
    first: int
    frames: int
    number: int
    readings: int
    nbytes: int = 200


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A run is open: made from a SeriesStart, or from the first frame where that message never came."""

    uid: str
    source: str
    series: str
    opened: float  # Unix seconds
    expected: int | None
    detector: Detector
    metadata: Mapping[str, Any] = field(default_factory=dict)
    nbytes: int = 1000


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A run is over; `reason` is one of end, complete, new_series, idle, shutdown, interrupted."""

    uid: str
    reason: str
    closed: float  # Unix seconds
    nbytes: int = 200


@dataclass(frozen=True, slots=True)
class Photons:
    """Prepared frames: cropped around the beam centre, masked, dark and flat corrected, binned.

    counts : (B, H, W) float32, photons. Pixels that were not measured hold their nearest measured neighbour, so that
        stencils meet no cliff; `valid` says which they are.
    valid : (H, W) bool; (B, H, W) where a frame of the batch has bad pixels of its own.
    flags : (B,) uint32 of `Flag`.
    known : (H, W) bool, `valid` as far as it holds for every frame of the run: what can be worked out once for a run is worked out for
        these pixels. None where it is not told; then the frames at hand say it.
    """

    counts: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    flags: npt.NDArray[np.uint32]
    known: npt.NDArray[np.bool_] | None = None


@dataclass(frozen=True, slots=True)
class Classes:
    """Class maps.

    ids : (B, H, W) uint8, NOT_MEASURED on invalid pixels.
    distance : (B,) float32, mean Euclidean distance of a measured pixel from its centroid, in PCA units.
    """

    ids: npt.NDArray[np.uint8]
    distance: npt.NDArray[np.float32]


FLAT, UNUSED = -1, -2
"""Numbers in `Start.unit` that are no prototype."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where refinement begins, k candidates a frame: the arms.

    psi : (B, k, H, W) complex64. support : (B, k, H, W) bool. unit : (B, k) int32, prototype of the library; FLAT for constant in the
    control's support; UNUSED for an arm that is not to be tried, its psi zero. distance : (B, k) float32, part of the frame's photons that
    the modulus of the arm's prototype leaves unexplained, photon noise aside (0..1); NaN without one.
    """

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    unit: npt.NDArray[np.int32]
    distance: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Reconstruction:
    """Refined objects; numbers are NaN where they are undefined.

    psi : complex64, support : bool, both (B, H, W) or (B, D, H, W). chi2 : (B,) of the returned psi. history : (B, iterations),
    chi2 after each iteration of the arm that was kept. floor : (B,), the chi2 that photon noise alone gives. r_factor, free_llk : (B,).
    flags : (B,) of `Flag`. kept : (B,) int32, which arm of the start. trial : (B, k), chi2 of every arm after the trial; empty without one.
    """

    psi: npt.NDArray[np.complex64]
    support: npt.NDArray[np.bool_]
    chi2: npt.NDArray[np.float32]
    history: npt.NDArray[np.float32]
    floor: npt.NDArray[np.float32]
    r_factor: npt.NDArray[np.float32]
    free_llk: npt.NDArray[np.float32]
    flags: npt.NDArray[np.uint32]
    kept: npt.NDArray[np.int32]
    trial: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions that came later than their frames: index -> (x, y) metres, sample frame. `run` as in `Result`."""

    source: str
    series: str
    positions: Mapping[int, tuple[float, float]]
    run: str = ""

    @property
    def nbytes(self) -> int:
        return 200 + 100 * len(self.positions)


class Place(enum.IntEnum):
    """What became of a frame in the mosaic."""

    IN = 0  # it is part of the image
    NO_POSITION = 1  # no position came within the bound
    OUTSIDE = 2  # its position would make the canvas larger than it may be
    NO_BEAM = 3  # far fewer photons than the frames before it: a beam dump, a shutter, a beam stop
    OUTLIER = 4  # its pixel classes are not those of the prior, or most of its pixels hold no data


@dataclass(frozen=True, slots=True)
class MosaicFrames:
    """What became of each frame so far, in the order of their first pass; N of them.

    index : (N,) int64. position : (N, 2) float64, (y, x) of the probe on the sample in the mosaic's unit, NaN where none came. place : (N,)
    uint8 of `Place`. before, after : (N,) float32, chi2 of the mosaic's prediction of the frame and of its own update; NaN where it is out.
    overlap : (N,) float32, part of its light that fell where the mosaic had been seen.
    """

    index: npt.NDArray[np.int64]
    position: npt.NDArray[np.float64]
    place: npt.NDArray[np.uint8]
    before: npt.NDArray[np.float32]
    after: npt.NDArray[np.float32]
    overlap: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class MosaicImage:
    """The running image of the sample at one moment; arrays are (rows, columns), cropped to where light was.

    serial : counts the images of a run, from 1. final : no later one comes.
    object : complex64, transmission relative to an empty beam, 1 where hardly any light was. light : float32, photons that fell on a pixel.
    uncertainty : float32, half the modulus of the difference between the images from odd and from even frames; NaN without halves.
    probe : (modes, H, W) complex64, as refined. unit : "m", or "px" where the geometry is not known. pixel : (y, x), its edges. origin :
    (y, x) of the centre of the first pixel, in the frame of the positions.
    frequency, correlation, threshold : (K,) float32, Fourier ring correlation of the halves over cycles per pixel, and the half-bit curve.
    resolution : half period at which the correlation falls below it, in `unit`; NaN where it is not known.
    disagreement : rms difference of the halves over the contrast (rms deviation from the mean) of the image, both where it is well lit.
    chi2 : with which the mosaic foretold the newest 64 frames; of all kept frames in a final image. passes : beyond the first of each.
    warnings : sentences for people.
    """

    run: str
    serial: int
    final: bool
    object: npt.NDArray[np.complex64]
    light: npt.NDArray[np.float32]
    uncertainty: npt.NDArray[np.float32]
    probe: npt.NDArray[np.complex64]
    unit: str
    pixel: tuple[float, float]
    origin: tuple[float, float]
    frequency: npt.NDArray[np.float32]
    correlation: npt.NDArray[np.float32]
    threshold: npt.NDArray[np.float32]
    resolution: float
    disagreement: float
    chi2: float
    passes: int
    frames: MosaicFrames
    warnings: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return (
            int(self.object.nbytes + self.light.nbytes + self.uncertainty.nbytes + self.probe.nbytes) + 40 * len(self.frames.index) + 1000
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """Frames of one run on their way through the stages; each stage returns a copy with its own part filled in.

    clock holds (stage, Unix seconds when it was done) in order of execution. skipped : as in `Result`.
    """

    run: RunStarted
    frames: tuple[Frame, ...]
    photons: Photons | None = None
    classes: Classes | None = None
    start: Start | None = None
    reconstruction: Reconstruction | None = None
    clock: tuple[tuple[str, float], ...] = ()
    skipped: str = ""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one frame: the unit that sinks write.

    classes : (H, W) uint8. object : (h, w) complex64, cropped to the prior's object box; not archived where flags say NOT_REFINED.
    counts : (H, W) float32, the prepared frame (for the live page; the archive does not keep it).
    unit, arm : start that was kept, its prototype's number and its name (prototype, flat, none). distance : of the nearest prototype, kept
        or not.
    iou : class name -> IoU against the prior's reference mask. iou_previous : the same against the frame before.
    skipped : why refinement was left out although the recipe has it (`overload`, `disk_short`); empty where it was not.
    drift : signal name -> value (flux, centre_row, centre_column, ...). score : signal name -> deviation from the prior's baseline
        in its standard deviations. alarms : signals whose alarm is on. All three are filled by the drift stage.
    """

    run: str
    index: int
    classes: npt.NDArray[np.uint8]
    object: npt.NDArray[np.complex64]
    counts: npt.NDArray[np.float32]
    received: float
    detector_time: float | None
    position: tuple[float, float] | None
    origin: int | None
    class_distance: float
    chi2: float
    chi2_floor: float
    r_factor: float
    free_llk: float
    unit: int
    distance: float
    arm: str
    flags: int
    clock: tuple[tuple[str, float], ...] = ()
    iou: Mapping[str, float] = field(default_factory=dict)
    iou_previous: Mapping[str, float] = field(default_factory=dict)
    drift: Mapping[str, float] = field(default_factory=dict)
    score: Mapping[str, float] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    skipped: str = ""

    @property
    def nbytes(self) -> int:
        return int(self.classes.nbytes + self.object.nbytes + self.counts.nbytes) + 1000
