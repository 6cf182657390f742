"""The prior on measured data: a gold nanocrystal's rocking curve in four splits, and as two volumes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.align import align
from streamprior.errors import ConfigError
from streamprior.evaluate.arms import compare_arms
from streamprior.evaluate.records import FULL_SOLVE
from streamprior.evaluate.study import choose
from streamprior.prior import Library
from streamprior.records import Photons
from streamprior.sources.files import open_recording
from streamprior.stages.match import match
from streamprior.stages.refine import refine
from streamprior.train.grow import grow_prior
from streamprior.train.prototypes import grow_library
from streamprior.train.settings import TrainSettings

SPLITS = (("0::2", "1::2"), ("1::2", "0::2"), (":100", "100:"), ("100:", ":100"))
"""Set 1 -> Set 2: interleaved and blocked, both directions."""

LONG = "+".join(["40*HIO+10*ER"] * 12 + ["40*ER"])
"""640 iterations, what 20 from the prior are compared with."""

VOLUME_STARTS = 2


def run(repeats: int = 1) -> Iterator[dict[str, Any]]:
    """One dict for each arm of each split, and one for each direction of the volumes; nothing is timed.

    The data are looked for in $STREAMPRIOR_DATA, or in ../shared/data. Raises ConfigError where they are not there.
    """
    folder = Path(os.environ.get("STREAMPRIOR_DATA", "../shared/data"))
    curve, volumes = folder / "bcdi_gold_rocking_curve.cxi", folder / "bcdi_gold_64cube_set1_set2.npz"
    for file in (curve, volumes):
        if not file.exists():
            raise ConfigError(f"{file}: no such file; set STREAMPRIOR_DATA to the folder of the measured data")
    for learned, judged in SPLITS:
        yield from _split(str(curve), learned, judged)
    with np.load(volumes) as stored:
        sets = [stored[name][None].astype(np.float32) for name in ("set1", "set2")]
    yield _volumes("set 1 -> set 2", *sets)
    yield _volumes("set 2 -> set 1", *sets[::-1])


def _split(curve: str, learned: str, judged: str) -> Iterator[dict[str, Any]]:
    prior = grow_prior(open_recording(curve, learned))
    chosen = choose(prior, open_recording(curve, judged))
    compared = compare_arms(chosen.photons, prior)
    full = next(arm for arm in compared.arms if arm.name == FULL_SOLVE)
    for arm in compared.arms:
        error = [align(psi, reference).error for psi, reference in zip(arm.psi, full.psi, strict=True)]
        yield {
            "split": f"{learned} -> {judged}",
            "arm": arm.name,
            "frames": len(chosen.frames),
            "iterations": arm.iterations,
            "chi2_at_10": _median(arm.history[:, 9]),
            "chi2_at_50": _median(arm.history[:, 49]),
            "chi2": _median(arm.chi2),
            "chi2_over_floor": _median(arm.chi2 / arm.floor),
            "free_llk": _median(arm.free_llk),
            "near_full_at_50": round(float(np.mean(arm.history[:, 49] <= 1.1 * full.chi2)), 3),
            "near_full": round(float(np.mean(arm.chi2 <= 1.1 * full.chi2)), 3),
            "area_px": _median(arm.support.sum((1, 2))),
            "unlike_full": _median(np.array(error)),
            "abstained": round(float(arm.abstained.mean()), 3),
        }


def _volumes(title: str, first: npt.NDArray[np.float32], second: npt.NDArray[np.float32]) -> dict[str, Any]:
    """20 iterations of error reduction from the other half's object, beside LONG from random phases in the same support."""
    photons = Photons(first, np.ones(first.shape, np.bool_), np.zeros(1, np.uint32))
    library: Library = grow_library(photons, TrainSettings(starts=4), lambda stage, done, total: None)
    start = match(second, library)
    rng = np.random.default_rng(0)
    level = np.sqrt(second.sum() / start.support.sum())
    long = []
    for _ in range(VOLUME_STARTS):
        phases = np.exp(2j * np.pi * rng.random(second.shape))
        long.append(
            float(refine(second, (level * start.support[:, 0] * phases).astype(np.complex64), start.support[:, 0], schedule=LONG).chi2[0])
        )
    flat = (level * start.support[:, 0]).astype(np.complex64)
    from_prior = float(refine(second, start, iterations=20).chi2[0])
    return {
        "volumes": title,
        "area_voxels": int(start.support.sum()),
        "prior_20_er": round(from_prior, 5),
        "flat_20_er": round(float(refine(second, flat, start.support[:, 0], iterations=20).chi2[0]), 5),
        "random_640_er_hio": round(min(long), 5),
        "prior_over_640": round(from_prior / min(long), 4),
    }


def _median(values: npt.NDArray[Any]) -> float:
    return round(float(np.nanmedian(values)), 5)
