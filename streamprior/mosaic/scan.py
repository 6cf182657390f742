"""Results of one run in order -> its mosaic: which frames take part and where, when it begins, settles and ends, and the image of it."""

from __future__ import annotations

import os
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from streamprior.config import MosaicSettings
from streamprior.errors import ConfigError
from streamprior.mosaic.agreement import agreement
from streamprior.mosaic.axes import TRIAL_FRAMES, oriented, trial
from streamprior.mosaic.mosaic import Mosaic, Passed, Picture, Shot
from streamprior.mosaic.overlap import Overlap, Rule
from streamprior.mosaic.probe import Modes, load_probe, modelled_probe, scaled, with_modes
from streamprior.prior import Prior
from streamprior.records import NOT_MEASURED, Detector, Flag, MosaicFrames, MosaicImage, Place, Positions, Result, RunStarted

log = structlog.get_logger(__name__)

FIRST_FRAMES = 8
"""Frames that are gathered before the mosaic begins: their photons scale the probe, their mean models it."""

SETTLE_FROM, SETTLE_EVERY = 16, 256
"""The mosaic settles after so many frames, then after twice as many each time, and then every so many."""

_SETTLE_SWEEPS = 2

_FLUX_FRAMES = 64
_PART_OF_PRIOR = 0.05
"""Part of the mean flux of the prior's frames that counts as usual before the run's own frames say what is."""

_MOST_FLUX = 5.0
"""A frame brighter than so many times the usual one is a readout gone wrong, or another dose than the probe's."""

_STAYS_BRIGHT = 8
"""Too bright frames in a row after which theirs is the usual flux: an attenuator has gone out."""

_MEASURED = 0.5
"""Least part of a frame's pixels that must hold data."""

_SCALE = 3.0
"""Factor between a probe's photons and the frames' up to which both are taken to be in photons; a larger one is a matter of units."""

_POLISHED = 256
"""Newest frames that are passed again while no frame comes."""

_MOST_ROWS = 2**20
"""Frames that the table tells of; of a longer run the oldest go. 40 MB."""

_ROW = np.dtype([("index", "i8"), ("position", "f8", 2), ("place", "u1"), ("before", "f4"), ("after", "f4"), ("overlap", "f4")])


def object_pixel_m(detector: Detector, prior: Prior) -> tuple[float, float] | None:
    """(y, x) edges of an object pixel: wavelength x distance / (pixels x detector pixel); None where the run does not say all of it."""
    reach = detector.reach_m
    if reach is None:
        return None
    rows, columns = prior.geometry.shape
    return reach / (rows * prior.geometry.binning), reach / (columns * prior.geometry.binning)


def first_probe(settings: MosaicSettings, own: Path | None, shape: tuple[int, int]) -> Modes | None:
    """The probe that the settings name; None where it is modelled from the frames. Raises ConfigError.

    own : recorded file of a file source, which may hold a probe.
    """
    if settings.probe == "frames" and not settings.refine:
        raise ConfigError("mosaic.probe: a probe that is modelled from the frames is only a beginning; set mosaic.refine: true")
    if settings.probe == "frames":
        return None
    file = settings.probe if settings.probe is not None else _holder(own)
    if file is None:
        raise ConfigError(
            'mosaic.probe: a mosaic begins with an illumination; name a file that holds it (.npy, CXI, an earlier mosaic.nxs), or "frames"'
            " to model it from the first frames together with mosaic.refine: true"
        )
    probe = load_probe(file, shape)
    if settings.modes > len(probe) and not settings.refine:
        raise ConfigError(
            f"mosaic.modes: {file} holds {len(probe)} and {settings.modes} are asked for; further ones need mosaic.refine: true"
        )
    return probe


def _holder(recorded: Path | None) -> Path | None:
    """The file of a recorded run, if it is of a kind that may hold a probe beside its frames."""
    name = os.fspath(recorded).partition("::")[0] if recorded is not None else ""
    return Path(name) if Path(name).is_file() and not name.endswith(".npy") else None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What an image is made of. chi2 : with which the mosaic foretold the newest frames, or of all kept ones. passes : beyond the first of
    each frame."""

    picture: Picture
    frames: MosaicFrames
    chi2: float
    passes: int
    warnings: tuple[str, ...]


def check_trust(settings: MosaicSettings, prior: Prior) -> None:
    """Raise ConfigError where trust is given to a class that the prior does not have."""
    unknown = settings.trust.keys() - set(prior.class_names)
    if unknown:
        raise ConfigError(f"mosaic.trust: {', '.join(sorted(unknown))} is no class of this prior; it has {', '.join(prior.class_names)}")


class Scan:
    """Owns the mosaic of one run. Not for two threads at once; what it hands out (`Snapshot`, `suspicion`) may be worked on beside it.

    Parameters
    ----------
    run : the run. prior : its geometry and classes. settings : of the mosaic. probe : None to model it.
    overlap : makes what computes, for so many modes. clock : monotonic seconds.
    """

    def __init__(
        self,
        run: RunStarted,
        prior: Prior,
        settings: MosaicSettings,
        probe: Modes | None,
        overlap: Callable[[int], Overlap],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run = run
        self._settings, self._probe, self._overlap, self._clock = settings, probe, overlap, clock
        self._rule = Rule(settings.iterations, settings.weight, settings.memory)
        self._half = np.array([side // 2 for side in prior.geometry.shape])
        self.unit, self.pixel = _pixel(settings, run.detector, prior)
        self._trust = np.array([settings.trust.get(name, 1.0) for name in prior.class_names], np.float32)
        self._fluxes: deque[float] = deque(maxlen=_FLUX_FRAMES)
        self._bright = 0  # frames in a row that were too bright
        # Before any frame the prior's are the measure, with room for an attenuator: a shutter that opens late would else be the usual dose.
        self._least_usual = _PART_OF_PRIOR * prior.baselines.get("flux", (0.0, 0.0))[0]
        self._waiting: OrderedDict[int, tuple[float, Result]] = OrderedDict()
        self._come = bytearray()  # 1 at the index of every frame that has come
        self._early: dict[int, tuple[float, float]] = {}  # positions that came before their frames
        self._first: list[Shot] = []  # until the mosaic begins, and then until the trial of the axes
        self._stage: list[tuple[float, float]] = []  # (x, y) of the same, object pixels
        self._began_with: Modes | None = None
        self._mosaic: Mosaic | None = None
        self._table = np.zeros(0, _ROW)
        self._rows = 0
        self._newest: deque[float] = deque(maxlen=_FLUX_FRAMES)
        self._settle_at = SETTLE_FROM if settings.settle else None
        self._out: Counter[Place] = Counter()
        self._warnings: dict[str, str] = {}

    def take(self, results: Sequence[Result]) -> None:
        """Frames in the order of the run; those without a position wait for it. One that came before changes nothing."""
        ready = []
        for result in results:
            if not self._fresh(result.index):
                continue
            position = result.position or self._early.pop(result.index, None)
            if position is not None:
                ready.append((result, position))
            else:
                self._waiting[result.index] = (self._clock() + self._settings.wait_s, result)
        self._put(ready)
        self.tick()

    def locate(self, late: Positions) -> None:
        """Positions that came after their frames, or before them."""
        ready = []
        for index, position in late.positions.items():
            waiting = self._waiting.pop(index, None)
            if waiting is not None:
                ready.append((waiting[1], position))
            elif self._settings.wait_frames:
                self._early.pop(index, None)
                self._early[index] = position
        # The oldest go: they are most likely repetitions of what is in already.
        for index in list(self._early)[: max(0, len(self._early) - self._settings.wait_frames)]:
            del self._early[index]
        self._put(ready)

    def tick(self) -> None:
        """Frames that have waited long enough are left out."""
        while self._waiting:
            index, (until, result) = next(iter(self._waiting.items()))
            most = min(self._settings.wait_frames, self._settings.keep_mb * 2**20 // result.nbytes)
            if until > self._clock() and len(self._waiting) <= most:
                break
            del self._waiting[index]
            self._leave_out(index, None, Place.NO_POSITION)

    def close(self) -> None:
        """No frame comes any more: what waits is left out, and the mosaic of a short run begins after all."""
        for index in self._waiting:
            self._leave_out(index, None, Place.NO_POSITION)
        self._waiting.clear()
        if self._mosaic is None and self._first:
            self._begin()

    def polish(self) -> bool:
        """A few frames once more; False when there is nothing to gain."""
        return self._mosaic is not None and self._settings.polish and self._mosaic.polish(_POLISHED)

    def finish(self) -> Iterator[None]:
        """The passes after the run; each step is short."""
        average = self._settings.finish // 3
        for seed in range(self._settings.finish - average):
            for _ in self._mosaic.sweep(seed=seed) if self._mosaic is not None else ():
                yield
        for _ in range(average):
            for _ in self._mosaic.average() if self._mosaic is not None else ():
                yield

    def release(self) -> None:
        if self._mosaic is not None:
            self._mosaic.close()

    def suspicion(self) -> Callable[[], str | None] | None:
        """Once the frames for it are there, and only once: the trial of axes and probe, to be run beside the scan."""
        if self._began_with is None or len(self._first) < TRIAL_FRAMES:
            return None
        shots, stage, probe, settings = self._first[:TRIAL_FRAMES], np.array(self._stage[:TRIAL_FRAMES]), self._began_with, self._settings
        self._began_with, self._first, self._stage = None, [], []

        def overlap() -> Overlap:
            return self._overlap(len(probe))

        return lambda: trial(shots, stage, probe, settings.axes, settings.refine, overlap, self._rule)

    def warn(self, key: str, sentence: str) -> None:
        """Said with every image from now on, and once in the log."""
        if key not in self._warnings:
            log.warning("mosaic", run=self.run.uid, warning=sentence)
        self._warnings[key] = sentence

    def snapshot(self, whole: bool = False) -> Snapshot | None:
        """The mosaic as it stands; None before it has begun. whole : chi2 of all kept frames, which costs a pass."""
        picture = self._mosaic.picture() if self._mosaic is not None else None
        if picture is None or self._mosaic is None:
            return None
        chi2 = self._mosaic.chi2() if whole else float(np.mean(self._newest)) if self._newest else float("nan")
        rows = self._table[: self._rows]
        frames = MosaicFrames(**{name: rows[name].copy() for name in _ROW.names or ()})
        return Snapshot(picture, frames, chi2, self._mosaic.passes, (*self._warnings.values(), *map(self._left_out_of, self._out)))

    def image(self, shot: Snapshot, serial: int, final: bool) -> MosaicImage:
        """A snapshot, judged."""
        picture = shot.picture
        found = None
        if picture.odd is not None and picture.even is not None and picture.both is not None:
            found = agreement(picture.odd, picture.even, picture.both)
        nothing = np.empty(0, np.float32)
        return MosaicImage(
            run=self.run.uid,
            serial=serial,
            final=final,
            object=picture.image,
            light=picture.light,
            uncertainty=np.asarray(np.abs(found.difference) / 2 if found else np.full(picture.light.shape, np.nan), np.float32),
            probe=picture.probe,
            unit=self.unit,
            pixel=self.pixel,
            origin=(picture.origin[0] * self.pixel[0], picture.origin[1] * self.pixel[1]),
            frequency=found.frequency if found else nothing,
            correlation=found.correlation if found else nothing,
            threshold=found.threshold if found else nothing,
            resolution=found.resolution_px * float(np.mean(self.pixel)) if found else float("nan"),
            disagreement=found.disagreement if found else float("nan"),
            chi2=shot.chi2,
            passes=shot.passes,
            frames=shot.frames,
            warnings=shot.warnings,
        )

    def _fresh(self, index: int) -> bool:
        """True the first time that a frame of this index comes."""
        if index >= len(self._come):
            self._come.extend(bytes(index + 1 - len(self._come)))
        fresh = not self._come[index]
        self._come[index] = 1
        return fresh

    def _put(self, ready: Sequence[tuple[Result, tuple[float, float]]]) -> None:
        """Frames with positions into the mosaic, those that are fit for it."""
        shots: list[Shot] = []
        for result, position in ready:
            stage, corner = self._located(position)
            place = self._fitness(result)
            if self._mosaic is not None and (place is not Place.IN or not self._mosaic.holds(corner)):
                # Now, so that neither what fits nor the order of the table depends on how frames were handed over.
                self._add(shots)
                shots = []
                if place is Place.IN and not self._mosaic.fits(corner):
                    place = Place.OUTSIDE
            if place is not Place.IN:
                self._leave_out(result.index, corner, place)
                continue
            shot = Shot(result.index, corner, *self._target(result))
            if self._mosaic is not None:
                shots.append(shot)
            if self._mosaic is None or (self._began_with is not None and len(self._first) < TRIAL_FRAMES):
                self._first.append(shot)
                self._stage.append(stage)
            # At once, so that the probe's scale does not depend on it either.
            if self._mosaic is None and len(self._first) == FIRST_FRAMES:
                self._begin()
        if self._mosaic is not None:
            self._add(shots)

    def _located(self, position: tuple[float, float]) -> tuple[tuple[float, float], tuple[float, float]]:
        """(x, y) of the stage in object pixels, and (row, column) of the window's corner."""
        along_x, along_y = self.pixel if "yx" in self._settings.axes.replace("-", "") else self.pixel[::-1]
        stage = position[0] / along_x, position[1] / along_y
        row, column = oriented(np.array([stage]), self._settings.axes)[0] - self._half
        return stage, (float(row), float(column))

    def _fitness(self, result: Result) -> Place:
        """Whether a frame can take part: by its photons, its pixels and its classes."""
        measured = result.classes != NOT_MEASURED
        if np.count_nonzero(measured) < _MEASURED * measured.size:
            return Place.OUTLIER
        flux = float(result.counts[measured].sum(dtype=np.float64))
        usual = max(float(np.median(self._fluxes)) if self._fluxes else 0.0, self._least_usual * measured.size)
        if result.flags & Flag.EMPTY or flux <= self._settings.least_flux * usual or flux <= 0:
            return Place.NO_BEAM
        if len(self._fluxes) >= FIRST_FRAMES and flux > _MOST_FLUX * usual:
            self._bright += 1
            if self._bright < _STAYS_BRIGHT:
                return Place.OUTLIER
            self._fluxes.clear()
        self._bright = 0
        overlaps = [value for value in result.iou.values() if np.isfinite(value)]
        if overlaps and float(np.mean(overlaps)) < self._settings.least_iou:
            return Place.OUTLIER
        self._fluxes.append(flux)
        return Place.IN

    def _target(self, result: Result) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32] | None]:
        """sqrt(counts H W) in FFT order, -1 where not measured, and how far each is believed where not all are alike."""
        measured = result.classes != NOT_MEASURED
        target = np.where(measured, np.sqrt(np.maximum(result.counts, 0) * np.float32(measured.size)), np.float32(-1))
        trust = None
        if (self._trust != 1).any():
            trust = np.fft.ifftshift(np.append(self._trust, np.float32(1))[np.minimum(result.classes, len(self._trust))])
        return np.fft.ifftshift(target), trust

    def _begin(self) -> None:
        """The first frames are there: the probe in their photons, and the mosaic."""
        intensities = [np.maximum(shot.target, 0) ** 2 / shot.target.size for shot in self._first]
        photons = float(np.median([plane.sum(dtype=np.float64) for plane in intensities]))
        probe = self._probe
        if probe is None:
            probe = modelled_probe(np.fft.fftshift(np.mean(intensities, axis=0)), self._settings.spot_px)
        own = float((np.abs(probe) ** 2).sum())
        if not photons / _SCALE < own < photons * _SCALE:
            probe = scaled(probe, photons)
        probe = with_modes(probe, self._settings.modes or len(probe))
        self._began_with = probe
        modes = len(probe)
        settings = self._settings
        self._mosaic = Mosaic(
            probe,
            self._rule,
            lambda: self._overlap(modes),
            settings.halves,
            settings.gain if settings.refine else 0.0,
            settings.keep_mb * 2**20,
            settings.canvas_mb * 2**20,
        )
        self._gather_first(self._mosaic)

    def _gather_first(self, mosaic: Mosaic) -> None:
        """The first frames into the mosaic, but those too far from most of them: whatever was first would keep all others out."""
        corners = np.array([shot.position for shot in self._first])
        near: list[int] = []
        for i in np.argsort(np.abs(corners - np.median(corners, 0)).max(1), kind="stable").tolist():
            if mosaic.fits(*(self._first[k].position for k in [*near, i])):
                near.append(i)
        for i, shot in enumerate(self._first):
            if i not in near:
                self._leave_out(shot.index, shot.position, Place.OUTSIDE)
        self._stage = [self._stage[i] for i in sorted(near)]
        self._first = [self._first[i] for i in sorted(near)]
        self._add(self._first)

    def _add(self, shots: Sequence[Shot]) -> None:
        assert self._mosaic is not None
        at = 0
        while at < len(shots):
            # Up to where the mosaic settles next, so that the result does not depend on how frames were handed over.
            room = self._settle_at - self._mosaic.frames if self._settle_at is not None else len(shots)
            part = shots[at : at + room]
            for shot, passed in zip(part, self._mosaic.add(part), strict=True):
                self._note(shot, passed)
            at += len(part)
            if self._settle_at is not None and self._mosaic.frames >= self._settle_at:
                self._settle_at = min(2 * self._settle_at, self._settle_at + SETTLE_EVERY)
                for seed in range(_SETTLE_SWEEPS):
                    for _ in self._mosaic.sweep(seed=seed, newest=SETTLE_EVERY):
                        pass

    def _note(self, shot: Shot, passed: Passed) -> None:
        place = (np.array(shot.position) + self._half) * self.pixel
        self._row((shot.index, place, Place.IN, passed.before, passed.after, passed.overlap))
        self._newest.append(passed.before)

    def _leave_out(self, index: int, corner: tuple[float, float] | None, place: Place) -> None:
        where = (np.array(corner) + self._half) * self.pixel if corner is not None else np.full(2, np.nan)
        self._row((index, where, place, np.nan, np.nan, np.nan))
        self._out[place] += 1
        if self._out[place] == 1:
            log.warning("mosaic", run=self.run.uid, warning=self._left_out_of(place))

    def _left_out_of(self, place: Place) -> str:
        return _LEFT_OUT[place].format(n=self._out[place], seen=self._rows, settings=self._settings)

    def _row(self, row: tuple[Any, ...]) -> None:
        if self._rows == len(self._table):
            kept = self._table if self._rows < _MOST_ROWS else self._table[_MOST_ROWS // 2 :]
            self._rows = len(kept)
            self._table = np.concatenate([kept, np.zeros(max(1024, len(kept)), _ROW)])
        self._table[self._rows] = row
        self._rows += 1


_LEFT_OUT = {
    Place.NO_POSITION: "{n} of {seen} frames came without a position within {settings.wait_s:g} s and are not in the mosaic: is the stage's"
    " stream connected?",
    Place.OUTSIDE: "{n} of {seen} frames lie so far away that the canvas would take more than mosaic.canvas_mb: does the stage report"
    " nonsense?",
    Place.NO_BEAM: "{n} of {seen} frames have hardly any photons and are not in the mosaic: beam dump, shutter or beam stop?",
    Place.OUTLIER: "{n} of {seen} frames do not look like the prior's, or hold hardly any data, and are not in the mosaic",
}


def _pixel(settings: MosaicSettings, detector: Detector, prior: Prior) -> tuple[str, tuple[float, float]]:
    """Unit and (y, x) edges of an object pixel in it."""
    if settings.pixel_nm is not None:
        return "m", (settings.pixel_nm * 1e-9, settings.pixel_nm * 1e-9)
    known = object_pixel_m(detector, prior)
    return ("m", known) if known is not None else ("px", (1.0, 1.0))
