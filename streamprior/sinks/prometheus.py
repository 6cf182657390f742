"""Newest result and image -> gauges: chi2, mask IoU, drift scores, alarms and the mosaic for whoever scrapes /metrics."""

from __future__ import annotations

from collections.abc import Sequence

from streamprior.metrics import Meters
from streamprior.records import MosaicImage, Positions, Result, RunEnded, RunStarted


class Prometheus:
    """A live sink: a gauge shows one value, so the newest result is all it needs."""

    name = "prometheus"
    complete = False

    def __init__(self, meters: Meters) -> None:
        self._meters = meters

    def open(self) -> None: ...

    def begin(self, run: RunStarted) -> None: ...

    def write(self, results: Sequence[Result]) -> None:
        self._meters.newest(results[-1])

    def note(self, item: Positions | MosaicImage) -> None:
        if isinstance(item, MosaicImage):
            self._meters.mosaic(item)

    def end(self, run: RunEnded) -> None: ...

    def close(self) -> None: ...
