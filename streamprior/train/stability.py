"""Prepared frames -> how well their classes are found again: with other seeds, and in the other half of the frames."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.metrics import adjusted_rand_score

from streamprior.records import Photons
from streamprior.train.classes import PixelClasses, regrow_classes, sample_pixels
from streamprior.train.region import Tick
from streamprior.train.settings import TrainSettings

SEEDS = 3
"""Trainings with a seed of their own; their pairs are compared."""

SPLITS = 3
"""Ways of parting the frames into two halves: the mean of three tells a poor class from a poor split."""


def stability(photons: Photons, grown: PixelClasses, normaliser: float, settings: TrainSettings, tick: Tick) -> dict[str, npt.NDArray[Any]]:
    """Adjusted Rand index (Hubert & Arabie 1985) between trainings, on the same sample of pixels; 1 is agreement, 0 is chance.

    Parameters
    ----------
    photons : Photons
        The frames `grown` was made from; valid is (B, H, W).
    grown : PixelClasses
    normaliser : float, as in `Prior`
    settings : TrainSettings
    tick : callable
        tick(stage, done, total)

    Returns
    -------
    dict
        stability_seeds : float64, one for each pair of SEEDS trainings on all frames, whose sample, map and k-means have other seeds.
        stability_frames : float64, one for each of SPLITS pairs of trainings on disjoint halves of the frames.
    """
    everything = np.arange(len(photons.counts))
    judge = _sample(photons, everything, normaliser, settings.pixels // 4, settings.seed)
    total = SEEDS - 1 + 2 * SPLITS
    done = 0

    def labels(frames: npt.NDArray[np.intp], seed: int) -> npt.NDArray[np.intp]:
        nonlocal done
        # Half the pixels of the training itself: their number is not what is judged, and eight trainings take their time.
        sample = _sample(photons, frames, normaliser, settings.pixels // 2, seed)
        again = regrow_classes(sample, len(grown.centroids), settings.model_copy(update={"seed": seed}))
        done += 1
        tick("stability", done, total)
        return again.label(judge)

    tick("stability", 0, total)
    seeds = [grown.label(judge), *(labels(everything, settings.seed + i) for i in range(1, SEEDS))]
    halves = []
    for i in range(SPLITS):
        shuffled = np.random.default_rng([settings.seed, i]).permutation(everything)
        one, other = np.sort(shuffled[::2]), np.sort(shuffled[1::2])
        halves.append(adjusted_rand_score(labels(one, settings.seed), labels(other, settings.seed)))
    return {
        "stability_seeds": np.array([adjusted_rand_score(one, other) for one, other in combinations(seeds, 2)]),
        "stability_frames": np.array(halves, np.float64),
    }


def _sample(photons: Photons, frames: npt.NDArray[np.intp], normaliser: float, pixels: int, seed: int) -> npt.NDArray[np.float32]:
    return sample_pixels(photons.counts[frames], photons.valid[frames], normaliser, pixels, np.random.default_rng(seed))
