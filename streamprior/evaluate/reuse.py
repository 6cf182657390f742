"""Frames of a scan -> how long frozen centroids hold: against a refit, against the first frame's mask, at less flux, off the centre."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import linear_sum_assignment
from threadpoolctl import threadpool_limits

from streamprior.prior import Geometry, Prior
from streamprior.records import NOT_MEASURED, Photons
from streamprior.stages.classify import classify
from streamprior.train.classes import PixelClasses, grow_classes, regrow_classes, sample_pixels
from streamprior.train.describe import class_names, describe_classes
from streamprior.train.grow import empty_prior, with_centroids
from streamprior.train.settings import TrainSettings

REFITS = 3
"""Trainings on the same frame with a seed of their own: how well they agree bounds what any reuse can reach."""

Ids = npt.NDArray[np.uint8]


def centroid_reuse(
    frames: Any,
    train_at: int = 0,
    apply_at: Sequence[int] = (5, 10, 15, 20),
    flux: Sequence[float] = (1.0, 0.3, 0.1),
    settings: TrainSettings | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Train centroids on one frame and apply them to later ones, as the gold-ball study does.

    Every number is the IoU of one class. Ids of a refit are matched to those of the map it is compared with, for each comparison anew, so
    that no baseline suffers from another's matching (linear assignment; Kuhn 1955).

    Parameters
    ----------
    frames : Photons, or (N, H, W) array, or anything with `[i]`, counts
        Prepared frames (`streamprior.prepare`); with a plain array every pixel counts as measured.
    train_at : int
        Frame the centroids come from, at full flux.
    apply_at : sequence of int
        Frames they are applied to.
    flux : sequence of float, 0 < flux <= 1
        Part of the photons that is left, by binomial thinning of the counts: exactly what a weaker beam gives.
    settings : TrainSettings, optional
        Of every training; its seed decides thinning and refits.
    progress : callable, optional
        progress(stage, done, total)

    Returns
    -------
    list of dict
        For each flux, frame and class: flux, frame, photons (left in the frame), class (name), and the IoUs, None where both maps lack the
        class. reused: frozen centroids against a refit on the frame. null: the training frame's mask as it is against that refit. ceiling:
        the refit against refits with other seeds. full_dose: frozen centroids against themselves on the frame at full flux.

    Raises
    ------
    ValueError
        A flux outside 0 < flux <= 1.
    """
    if not all(0 < part <= 1 for part in flux):
        raise ValueError(f"flux {tuple(flux)}: thinning leaves a part of the photons, above 0 and up to 1")
    chosen = settings or TrainSettings()
    tick = progress or (lambda stage, done, total: None)
    rows: list[dict[str, Any]] = []
    with threadpool_limits(1):
        first = _photons(frames, train_at)
        frozen = _prior(first, grow_classes(_sample(first, chosen), chosen))
        mask = classify(first, frozen).ids[0]
        names = class_names(describe_classes(mask[None], first, frozen.normaliser, len(frozen.centroids)))
        total = len(flux) * len(apply_at)
        for part in flux:
            for index in apply_at:
                whole = _photons(frames, index)
                thin = thinned(whole, part, np.random.default_rng([chosen.seed, index, round(part * 1e6)]))
                measured = _measures(thin, whole, mask, frozen, chosen)
                photons = float(thin.counts.sum(dtype=np.float64))
                for k, name in enumerate(names):
                    numbers = {what: _plain(values[k]) for what, values in measured.items()}
                    rows.append({"flux": float(part), "frame": int(index), "photons": photons, "class": name, **numbers})
                tick("reuse", len(rows) // len(names), total)
    return rows


def shifted_reuse(counts: Photons | npt.NDArray[Any], prior: Prior, shift: tuple[int, int] = (2, 0)) -> list[dict[str, Any]]:
    """How a prior's classes hold when the beam moves on the detector by whole pixels.

    Parameters
    ----------
    counts : Photons, or (B, H, W), prepared frames
    prior : Prior
    shift : (rows, columns)

    Returns
    -------
    list of dict
        For each class: class (name), and the mean over the frames of two IoUs, None where no frame has the class. followed: the map of the
        moved frame, moved back, against the map of the frame. static: the map of the frame, not moved at all, in its place.
    """
    photons = counts if isinstance(counts, Photons) else _whole(counts)
    number = len(prior.class_names)
    valid = np.broadcast_to(photons.valid, photons.counts.shape)
    still = classify(photons, prior).ids
    moved = Photons(np.roll(photons.counts, shift, (1, 2)), np.roll(valid, shift, (1, 2)), photons.flags)
    back = np.roll(classify(moved, prior).ids, (-shift[0], -shift[1]), (1, 2))
    # What came in over the opposite edge was never there, and stencils reach 8 pixels further.
    inner = np.zeros(still.shape[1:], np.bool_)
    inner[abs(shift[0]) + 8 : -abs(shift[0]) - 8, abs(shift[1]) + 8 : -abs(shift[1]) - 8] = True
    static = np.roll(still, shift, (1, 2))
    followed, fixed = (
        np.array([iou(one, other, number, inner) for one, other in zip(still, maps, strict=True)]) for maps in (back, static)
    )
    return [{"class": name, "followed": _mean(followed[:, k]), "static": _mean(fixed[:, k])} for k, name in enumerate(prior.class_names)]


def thinned(photons: Photons, part: float, rng: np.random.Generator) -> Photons:
    """The frames as a beam of this part of the flux gives them: each photon is kept with this probability.

    Counts that a dark or a flat made fractional are rounded first.
    """
    kept = rng.binomial(np.rint(photons.counts).astype(np.int64), part)
    return Photons(kept.astype(np.float32), photons.valid, photons.flags)


def iou(one: Ids, other: Ids, number: int, inside: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.float64]:
    """(number,) IoU of each class of two maps (H, W) over the pixels measured in both; NaN where neither holds it."""
    return np.asarray(np.diag(_overlaps(one, other, number, inside)))


def matched_iou(one: Ids, other: Ids, number: int) -> npt.NDArray[np.float64]:
    """As `iou`, with the ids of `other` matched to those of `one` for the largest sum."""
    overlaps = _overlaps(one, other, number, None)
    rows, columns = linear_sum_assignment(np.nan_to_num(overlaps), maximize=True)
    return np.asarray(overlaps[rows, columns])


def _overlaps(one: Ids, other: Ids, number: int, inside: npt.NDArray[np.bool_] | None) -> npt.NDArray[np.float64]:
    """(number, number) IoU of each class of one map with each of the other."""
    both = (one != NOT_MEASURED) & (other != NOT_MEASURED)
    if inside is not None:
        both &= inside
    pairs = one[both].astype(np.intp) * number + other[both]
    shared = np.bincount(pairs, minlength=number * number).reshape(number, number)
    either = shared.sum(1)[:, None] + shared.sum(0)[None, :] - shared
    return np.asarray(np.divide(shared, either, out=np.full(shared.shape, np.nan), where=either > 0))


def _measures(thin: Photons, whole: Photons, mask: Ids, frozen: Prior, settings: TrainSettings) -> dict[str, npt.NDArray[np.float64]]:
    """The four IoUs of one thinned frame, each (K,), in the order of the frozen prior's classes."""
    number = len(frozen.centroids)
    reused = classify(thin, frozen).ids[0]
    refits = []
    for i in range(REFITS):
        again = settings.model_copy(update={"seed": settings.seed + i})
        refits.append(classify(thin, _prior(thin, regrow_classes(_sample(thin, again), number, again))).ids[0])
    # The refits' own ids mean nothing: they are compared in the order that fits the frozen classes.
    first = _renamed(refits[0], reused, number)
    return {
        "reused": matched_iou(reused, refits[0], number),
        "null": matched_iou(mask, refits[0], number),
        "ceiling": np.mean([matched_iou(first, other, number) for other in refits[1:]], axis=0),
        "full_dose": iou(reused, classify(whole, frozen).ids[0], number),
    }


def _renamed(ids: Ids, like: Ids, number: int) -> Ids:
    """The map with its classes named as those of another that they overlap with most."""
    rows, columns = linear_sum_assignment(np.nan_to_num(_overlaps(like, ids, number, None)), maximize=True)
    names = np.full(256, NOT_MEASURED, np.uint8)
    names[columns] = rows
    return names[ids]


def _sample(photons: Photons, settings: TrainSettings) -> npt.NDArray[np.float32]:
    """(N, 9) features of one frame (1, H, W)."""
    return sample_pixels(photons.counts, photons.valid, _flux(photons), settings.pixels, np.random.default_rng(settings.seed))


def _prior(photons: Photons, grown: PixelClasses) -> Prior:
    """A prior that knows the classes of one frame (1, H, W) and nothing else."""
    height, width = photons.counts.shape[1:]
    geometry = Geometry((height, width), (height // 2, width // 2), (height, width))
    return with_centroids(empty_prior(geometry), grown, _flux(photons))


def _flux(photons: Photons) -> float:
    """Mean photons per valid pixel."""
    return float(photons.counts.sum(where=photons.valid, dtype=np.float64) / max(1, np.count_nonzero(photons.valid)))


def _photons(frames: Any, index: int) -> Photons:
    """One frame as (1, H, W), with a valid map of its own."""
    if isinstance(frames, Photons):
        valid = np.broadcast_to(frames.valid, frames.counts.shape)[index]
        return Photons(frames.counts[index][None], np.ascontiguousarray(valid)[None], frames.flags[index : index + 1])
    return _whole(np.asarray(frames[index])[None])


def _whole(counts: npt.NDArray[Any]) -> Photons:
    """Frames (B, H, W) of which every pixel was measured."""
    return Photons(np.ascontiguousarray(counts, np.float32), np.ones(counts.shape, np.bool_), np.zeros(len(counts), np.uint32))


def _mean(values: npt.NDArray[np.float64]) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else None


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
