"""Newest result -> one compact picture for the live page: frame, class map, amplitude and phase as bytes."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.prior import Prior
from streamprior.records import Flag, Result, RunEnded, RunStarted


class LivePage:
    """Holds the newest result and nothing else; a picture is only made when somebody looks."""

    name = "page"
    complete = False

    def __init__(self, prior: Prior) -> None:
        self._prior = prior
        self._lock = threading.Lock()
        self._newest: Result | None = None
        self._serial = 0
        self._picture: tuple[int, bytes] = (0, b"")

    def open(self) -> None: ...

    def begin(self, run: RunStarted) -> None: ...

    def write(self, results: Sequence[Result]) -> None:
        with self._lock:
            self._newest = results[-1]
            self._serial += 1

    def end(self, run: RunEnded) -> None: ...

    def close(self) -> None: ...

    def picture(self, after: int = 0) -> bytes | None:
        """The newest result: header length (4 bytes, little endian), JSON header, image bytes. None when nothing is newer than `after`.

        Twenty open pages share one picture: it is made once for each result that is looked at.
        """
        with self._lock:
            serial, result = self._serial, self._newest
            made, picture = self._picture
        if result is None or serial <= after:
            return None
        if made == serial:
            return picture
        picture = _encode(result, serial, self._prior)
        with self._lock:
            self._picture = (serial, picture)
        return picture


def _encode(result: Result, serial: int, prior: Prior) -> bytes:
    logarithm = np.log1p(result.counts)
    images: dict[str, npt.NDArray[np.uint8]] = {
        "frame": _bytes(logarithm, float(logarithm.max())),
        "classes": np.ascontiguousarray(result.classes),
    }
    if not result.flags & Flag.NOT_REFINED:
        amplitude = np.abs(result.object)
        images["amplitude"] = _bytes(amplitude, float(amplitude.max()))
        images["phase"] = ((np.angle(result.object) / (2 * np.pi) + 0.5) * 255).astype(np.uint8)
    header: dict[str, Any] = {
        "serial": serial,
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
        "images": {name: list(image.shape) for name, image in images.items()},
    }
    text = json.dumps(header).encode()
    return len(text).to_bytes(4, "little") + text + b"".join(image.tobytes() for image in images.values())


def _bytes(values: npt.NDArray[np.floating[Any]], top: float) -> npt.NDArray[np.uint8]:
    return (values * (255.0 / top if top > 0 else 0.0)).astype(np.uint8)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None
