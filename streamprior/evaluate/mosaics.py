"""A recorded ptychography scan -> its mosaic, by the very stages that the daemon runs, at any point of the scan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.config import DriftSettings, MosaicSettings, PrepareSettings, RefineSettings
from streamprior.crew import think
from streamprior.mosaic.backend import overlap_maker
from streamprior.mosaic.probe import Modes
from streamprior.mosaic.scan import Scan
from streamprior.prior import Prior
from streamprior.records import Frame, MosaicImage, RunStarted
from streamprior.sources.files import Recording
from streamprior.stages.recipe import Recipe

_BATCH = 16


def stream_mosaic(
    recording: Recording,
    prior: Prior,
    settings: MosaicSettings,
    probe: Modes | None,
    at: Sequence[int] = (),
    positions: npt.NDArray[np.float64] | None = None,
    backend: str = "cpu",
) -> Iterator[MosaicImage]:
    """Stream the frames of a recording into a mosaic, in their order, and then do the passes after the run.

    Parameters
    ----------
    recording : frames with positions. prior : pixel classes and geometry. settings : of the mosaic. probe : as `first_probe` gives it.
    at : numbers of frames after which an image is wanted.
    positions : (N, 2) float64 (x, y), by index in the file, in place of the recording's own; NaN for a frame that has none.

    Yields
    ------
    MosaicImage
        After so many frames each, after the last one, and `final` after the passes; its chi2 is over all kept frames.
    """
    recipe = Recipe(prior, PrepareSettings(), RefineSettings(), DriftSettings(), "ptycho")
    stages, watches = recipe.stages(), recipe.watches()
    run = RunStarted("offline", recording.name, recording.name, 0.0, len(recording), recording.geometry)
    for watch in watches:
        watch.begin(run)
    scan = Scan(run, prior, settings, probe, overlap_maker(prior.geometry.shape, backend), clock=lambda: 0.0)
    stops = sorted({*at, len(recording)})
    done = serial = 0
    for stop in stops:
        while done < stop:
            batch = [_frame(recording, i, positions) for i in range(done, min(done + _BATCH, stop))]
            results = think(stages, prior, run, batch)
            for watch in watches:
                results = watch(results)
            scan.take(results)
            done += len(batch)
        serial += 1
        if stop == len(recording):
            scan.close()
        yield from _image(scan, serial, final=False)
    for _ in scan.finish():
        pass
    yield from _image(scan, serial + 1, final=True)
    scan.release()


def _frame(recording: Recording, i: int, positions: npt.NDArray[np.float64] | None) -> Frame:
    position: Any = recording.position(i)
    if positions is not None:
        x, y = positions[recording.origin(i)]
        position = (float(x), float(y)) if np.isfinite(x) and np.isfinite(y) else None
    return Frame(recording.name, recording.name, i, recording.frame(i), 0.0, position=position, origin=recording.origin(i))


def _image(scan: Scan, serial: int, final: bool) -> Iterator[MosaicImage]:
    doubt = scan.suspicion()
    sentence = doubt() if doubt is not None else None
    if sentence is not None:
        scan.warn("axes", sentence)
    snapshot = scan.snapshot(final)
    if snapshot is not None:
        yield scan.image(snapshot, serial, final)
