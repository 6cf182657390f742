"""Newest result and newest mosaic -> one compact picture each for the live page: arrays as bytes with their ranges, numbers as JSON."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from streamprior.prior import Prior
from streamprior.records import Flag, MosaicFrames, MosaicImage, Place, Positions, Result, RunEnded, RunStarted

SIDE = 1024
"""Pixels a side beyond which a mosaic is thinned for the page: four such maps are 4 MB, and few screens show more of each."""

UNLIT = 0.05
"""Part of the 90th percentile of the light below which a pixel of the mosaic is shown as not measured."""

RINGS, POINTS = 64, 256
"""Most points of the page's ring correlation and of its chi2 curve: more than a curve of a few centimetres shows."""

_TAILS = (0.5, 99.5)
"""Percentiles that a colour scale spans: a single wild pixel does not flatten the image."""

_MARGIN = 0.03
"""Of the lit area's sides, around it."""

_WEAK = math.pi / 2
"""Half the range of phases, in radians, up to which a linear scale is taken: far from where it would wrap."""

Picture = tuple[dict[str, Any], dict[str, npt.NDArray[np.uint8]]]
"""What a header says, and the images behind it."""

Range = tuple[float, float]

T = TypeVar("T")


class LivePage:
    """Holds the newest result and the newest mosaic and nothing else; a picture is only made when somebody looks."""

    name = "page"
    complete = False

    def __init__(self, prior: Prior) -> None:
        self._run = ""
        self._mosaic_run: str | None = None
        self._result: _Newest[Result] = _Newest(lambda result: _result_picture(result, prior))
        self._mosaic: _Newest[MosaicImage] = _Newest(_mosaic_picture)

    def open(self) -> None: ...

    def begin(self, run: RunStarted) -> None:
        self._run = run.uid

    def write(self, results: Sequence[Result]) -> None:
        self._result.put(results[-1])

    def note(self, item: Positions | MosaicImage) -> None:
        # The last image of a run may come when the next one is on the page already.
        if isinstance(item, MosaicImage) and (item.run == self._run or self._mosaic_run != self._run):
            self._mosaic_run = item.run
            self._mosaic.put(item)

    def end(self, run: RunEnded) -> None: ...

    def close(self) -> None: ...

    def picture(self, after: int = 0) -> bytes | None:
        """The newest result: header length (4 bytes, little endian), JSON header, image bytes. None when nothing is newer than `after`."""
        return self._result.picture(after)

    def mosaic_picture(self, after: int = 0) -> bytes | None:
        """The newest mosaic in the form of `picture`. None when nothing is newer than `after`.

        Every image is uint8, its values spread over `ranges` of the header: amplitude and phase (radians) of the transmission, light
        (photons a pixel), uncertainty (absent without halves), lit (1 where there was light enough to show) and the summed intensity of
        the probe's modes. All but the probe are cut to where light was: `origin` and `shape` are those of the cut, of which every
        `stride`-th pixel is here; `pixel` is the mosaic's. `cyclic` tells a phase over a full turn from one over a robust range.
        """
        return self._mosaic.picture(after)

    @property
    def newest(self) -> Result | None:
        """The newest result, of whatever run; None before the first."""
        return self._result.item

    @property
    def mosaic_serial(self) -> int:
        """Of the newest mosaic, counted over all runs; 0 before the first."""
        return self._mosaic.serial


class _Newest(Generic[T]):
    """Owns one thing and its picture. Twenty open pages share one picture: it is made once for each thing that is looked at."""

    def __init__(self, draw: Callable[[T], Picture]) -> None:
        self._draw = draw
        self._holding, self._drawing = threading.Lock(), threading.Lock()
        self.item: T | None = None
        self._drawn: tuple[int, bytes] = (0, b"")
        self.serial = 0

    def put(self, item: T) -> None:
        with self._holding:
            self.item = item
            self.serial += 1

    def picture(self, after: int) -> bytes | None:
        # Two locks: who looks waits for the picture in the making, who puts never does.
        with self._drawing:
            with self._holding:
                serial, item = self.serial, self.item
            if item is None or serial <= after:
                return None
            if self._drawn[0] != serial:
                header, images = self._draw(item)
                self._drawn = (serial, _packed({"serial": serial, **header}, images))
            return self._drawn[1]


def _packed(header: dict[str, Any], images: dict[str, npt.NDArray[np.uint8]]) -> bytes:
    text = json.dumps({**header, "images": {name: image.shape for name, image in images.items()}}).encode()
    return len(text).to_bytes(4, "little") + text + b"".join(image.tobytes() for image in images.values())


def _result_picture(result: Result, prior: Prior) -> Picture:
    logarithm = np.log1p(result.counts)
    images: dict[str, npt.NDArray[np.uint8]] = {
        "frame": _bytes(logarithm, (0.0, float(logarithm.max()))),
        "classes": np.ascontiguousarray(result.classes),
    }
    if not result.flags & Flag.NOT_REFINED:
        amplitude = np.abs(result.object)
        images["amplitude"] = _bytes(amplitude, (0.0, float(amplitude.max())))
        images["phase"] = ((np.angle(result.object) / (2 * np.pi) + 0.5) * 255).astype(np.uint8)
    header = {
        "run": result.run,
        "index": result.index,
        "chi2": _finite(result.chi2),
        "chi2_floor": _finite(result.chi2_floor),
        "arm": result.arm,
        "unit": result.unit,
        "distance": _finite(result.distance),
        "abstained": bool(result.flags & Flag.ABSTAINED),
        "most_counts": float(result.counts.max()),
        "class_names": prior.class_names,
        "iou": {name: _finite(value) for name, value in result.iou.items()},
        "score": {name: _finite(value) for name, value in result.score.items()},
        "alarms": result.alarms,
    }
    return header, images


def _mosaic_picture(image: MosaicImage) -> Picture:
    dim = _dim(image.light)
    window = _window(image.light >= dim)
    shape = [part.stop - part.start for part in window]
    stride = _stride(shape)
    scales, images = _maps(image, [slice(part.start, part.stop, stride) for part in window], dim)
    frames = image.frames
    header = {
        "run": image.run,
        "image": image.serial,
        "final": image.final,
        "unit": image.unit,
        "pixel": image.pixel,
        "origin": [start + part.start * step for start, part, step in zip(image.origin, window, image.pixel, strict=True)],
        "shape": shape,
        "stride": stride,
        **scales,
        "frames": {place.name.lower(): int(np.count_nonzero(frames.place == place)) for place in Place},
        "newest": int(frames.index[-1]) if len(frames.index) else None,
        "position": _newest_position(frames),
        "resolution": _finite(image.resolution),
        "disagreement": _finite(image.disagreement),
        "chi2": _finite(image.chi2),
        "passes": image.passes,
        "warnings": image.warnings,
        "rings": _rings(image),
        "errors": _errors(frames),
    }
    return header, images


def _stride(shape: Sequence[int]) -> int:
    return max(1, math.ceil(max(shape) / SIDE))


def _dim(light: npt.NDArray[np.float32]) -> float:
    """The light below which a pixel is shown as not measured."""
    # Every so many pixels tell as much; those without light do not count, as a scan along a diagonal leaves most of its rectangle dark.
    stride = _stride(light.shape)
    some = light[::stride, ::stride]
    some = some[some > 0]
    return float(UNLIT * np.percentile(some, 90)) if some.size else math.inf


def _window(lit: npt.NDArray[np.bool_]) -> list[slice]:
    """Rows and columns that hold what is lit, and a little more: the faint rim that a probe leaves would make the sample small."""
    window = []
    for axis in (0, 1):
        side, found = lit.shape[axis], np.flatnonzero(lit.any(axis=1 - axis))
        first, last = (int(found[0]), int(found[-1]) + 1) if found.size else (0, side)
        margin = math.ceil(_MARGIN * (last - first))
        window.append(slice(max(0, first - margin), min(side, last + margin)))
    return window


def _maps(image: MosaicImage, window: Sequence[slice], dim: float) -> Picture:
    """The pixels of `window` of each map as bytes, with the values of the lowest and the highest byte."""
    thinned = (window[0], window[1])
    seen, light, doubt = image.object[thinned], image.light[thinned], image.uncertainty[thinned]
    lit = light >= dim
    phase, phase_range, cyclic = _phase(seen, lit)
    amplitude = np.abs(seen)
    probe = np.sum(np.abs(image.probe) ** 2, axis=0)
    ranges = {
        "amplitude": _spread(amplitude[lit]),
        "phase": phase_range,
        "light": (0.0, _spread(light[lit])[1]),
        "probe": (0.0, float(probe.max())),
    }
    images = {
        "amplitude": _bytes(amplitude, ranges["amplitude"]),
        "phase": _bytes(phase, phase_range),
        "light": _bytes(light, ranges["light"]),
        "lit": lit.astype(np.uint8),
        "probe": _bytes(probe, ranges["probe"]),
    }
    if (known := doubt[lit & np.isfinite(doubt)]).size:
        ranges["uncertainty"] = (0.0, _spread(known)[1])
        images["uncertainty"] = _bytes(np.where(np.isfinite(doubt), doubt, np.inf), ranges["uncertainty"])
    return {"ranges": ranges, "cyclic": cyclic}, images


def _phase(seen: npt.NDArray[np.complex64], lit: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.float32], Range, bool]:
    """Phase in radians, the range to show and whether that is the full turn. A weak object's few tenths of a radian would be one colour of
    it: such phases are counted from their middle, so that none wraps inside the range."""
    middle = float(np.angle(np.sum(seen[lit], dtype=np.complex128)))
    phase = np.angle(seen * np.exp(-1j * middle).astype(np.complex64))
    low, high = _spread(phase[lit])
    if max(-low, high) > _WEAK:
        return np.angle(seen), (-math.pi, math.pi), True
    return phase + np.float32(middle), (low + middle, high + middle), False


def _newest_position(frames: MosaicFrames) -> list[float] | None:
    """(y, x) of the newest frame that has one."""
    known = frames.position[np.isfinite(frames.position).all(axis=1)]
    return [float(value) for value in known[-1]] if len(known) else None


def _rings(image: MosaicImage) -> dict[str, list[float | None]]:
    """Means of neighbouring rings where there are more than the page draws; without the mean, which correlates with nothing."""
    rings = image.frequency > 0
    curves = {"frequency": image.frequency, "correlation": image.correlation, "threshold": image.threshold}
    return {name: [_finite(float(np.mean(part))) for part in _parts(curve[rings], RINGS)] for name, curve in curves.items()}


def _errors(frames: MosaicFrames) -> dict[str, list[float]]:
    """chi2 of the prediction of each frame over how many frames were in by then; medians of neighbours where there are many."""
    before = frames.before[np.isfinite(frames.before)]
    return {
        "frames": [float(np.median(part)) for part in _parts(np.arange(1, len(before) + 1), POINTS)],
        "before": [float(np.median(part)) for part in _parts(before, POINTS)],
    }


def _parts(curve: npt.NDArray[Any], most: int) -> list[npt.NDArray[Any]]:
    """A curve in at most `most` pieces of nearly equal length, none of them empty."""
    return np.array_split(curve, min(most, len(curve))) if len(curve) else []


def _spread(values: npt.NDArray[np.floating[Any]]) -> Range:
    """The range that shows most of these values; one of some width where all are the same."""
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, _TAILS))
    return (low, high) if high > low else (low, low + (abs(low) or 1.0) * 1e-3)


def _bytes(values: npt.NDArray[np.floating[Any]], span: Range) -> npt.NDArray[np.uint8]:
    low, high = span
    scale = np.float32(255.0 / (high - low) if high > low else 0.0)
    levels: npt.NDArray[np.uint8] = np.clip((values - np.float32(low)) * scale, 0, 255).astype(np.uint8)
    return levels


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return float(value) if np.isfinite(value) else None
