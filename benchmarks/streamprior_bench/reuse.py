"""Centroids learned on one frame and used on later ones, beside a refit and the first mask: gold balls and a Siemens star."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import Twin

from streamprior.errors import ConfigError
from streamprior.evaluate.reuse import centroid_reuse, shifted_reuse
from streamprior.sources.files import open_recording
from streamprior.train.grow import grow_prior
from streamprior.train.settings import TrainSettings

FRAMES = 121
SHIFT_PX = (2, 0)
"""Rows and columns that the beam moves by."""

TRAIN_AT = (0, 100)
"""At the scan's beginning the beam is on the empty membrane; in its middle it is on the sample."""


def run(repeats: int = 1) -> Iterator[dict[str, Any]]:
    """The rows of `centroid_reuse` and of `shifted_reuse` with the set they belong to; nothing is timed."""
    folder = Path(os.environ.get("STREAMPRIOR_DATA", "../shared/data"))
    star, balls = folder / "ptycho_siemens_star.cxi", folder / "gold_balls_cxidb65_reconstruction.h5"
    for file in (star, balls):
        if not file.exists():
            raise ConfigError(f"{file}: no such file; set STREAMPRIOR_DATA to the folder of the measured data")
    twin = Twin(load_scenario("gold_balls", {"sample.data": str(balls.absolute())}))
    recording = open_recording(str(star), f":{FRAMES}")
    sets = {
        "Siemens star, measured": np.stack([np.asarray(recording[i]) for i in range(FRAMES)]),
        "gold balls, simulated": np.stack([twin.frame(i) for i in range(FRAMES)]),
    }
    for name, frames in sets.items():
        for train_at in TRAIN_AT:
            for row in centroid_reuse(frames, train_at, tuple(train_at + step for step in (5, 10, 15, 20))):
                yield {"set": name, "train_at": train_at, **row}
        prior = grow_prior(frames, settings=TrainSettings(library=0))
        for row in shifted_reuse(frames[:: FRAMES // 12].astype(np.float32), prior, SHIFT_PX):
            yield {"set": name, "shift_px": list(SHIFT_PX), **row}
