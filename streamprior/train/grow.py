"""Raw frames -> Prior: region, pixel classes, reference map, support and baselines, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from streamprior.prior import FEATURES, Geometry, Prior, freeze
from streamprior.records import Classes, Photons
from streamprior.stages.classify import classify
from streamprior.stages.drift import mask_numbers
from streamprior.stages.match import match
from streamprior.stages.prepare import Corrections, prepare
from streamprior.stages.refine import refine
from streamprior.train.classes import grow_classes, sample_pixels
from streamprior.train.region import Tick, find_geometry, find_invalid, mean_frame
from streamprior.train.settings import TrainSettings
from streamprior.train.support import find_support

Pairs = dict[str, tuple[float, float]]


def grow_prior(
    frames: Any,
    geometry: Geometry | None = None,
    settings: TrainSettings | None = None,
    progress: Tick | None = None,
    provenance: Mapping[str, Any] | None = None,
    corrections: Corrections | None = None,
) -> Prior:
    """Grow a prior from the frames of a scan.

    Parameters
    ----------
    frames : (N, rows, columns) array, or anything with `shape`, `len` and `[i]`, counts
        Raw frames as the detector gave them; an h5py dataset is read frame by frame, never whole.
    geometry : Geometry, optional
        Region of interest; found from the mean frame where it is None.
    settings : TrainSettings, optional
    progress : callable, optional
        progress(stage, done, total), for each part of the work.
    provenance : mapping, optional
        Kept in the prior beside the settings; not part of its hash.
    corrections : Corrections, optional
        Mask, dark and flat of the detector; pixels of the mask are invalid in the prior.

    Returns
    -------
    Prior
        Frozen. The same frames and settings give the same content hash.

    Raises
    ------
    ValueError
        No frames, frames that are not images, a region that does not fit, or not a single photon on a measured pixel.
    """
    chosen = settings or TrainSettings()
    tick = progress or (lambda stage, done, total: None)
    _check_frames(frames, geometry)
    # One thread: sums of many threads round differently from run to run, and the hash would change with them.
    with threadpool_limits(1):
        corrected = corrections or Corrections()
        empty = _with_region(frames, corrected, geometry, chosen, tick)
        photons = _useful(frames, corrected, empty, chosen, tick)
        classified = _with_classes(photons, empty, chosen, tick)
        brightest = np.argsort(-photons.counts.sum((1, 2)), kind="stable")[: chosen.solved]
        support = find_support(_take(photons, brightest), chosen.schedule, chosen.seed, tick)
        grown = replace(classified, support=support)
        baselines = _baselines(photons, grown, chosen, tick)
    story = {"frames": len(frames), "settings": chosen.model_dump(), **(provenance or {})}
    return freeze(replace(grown, baselines=baselines, provenance=story))


def _check_frames(frames: Any, geometry: Geometry | None) -> None:
    shape = tuple(frames.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"frames have shape {shape}; training needs (N, rows, columns) with at least one frame")
    if geometry is not None and geometry.detector_shape != shape[1:]:
        raise ValueError(f"frames are {shape[1:]}, the geometry was made for a detector of {geometry.detector_shape}")


def _spread(number: int, most: int) -> npt.NDArray[np.intp]:
    """At most so many indices, evenly spaced over 0..number-1."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(np.intp))


def _with_region(frames: Any, corrections: Corrections, geometry: Geometry | None, settings: TrainSettings, tick: Tick) -> Prior:
    """A prior that holds geometry and invalid pixels, and nothing else yet."""
    survey = _spread(len(frames), settings.survey)
    region = geometry or find_geometry(mean_frame(frames, survey, corrections.mask, tick), settings.shape, settings.binning)
    b, (height, width) = region.binning, region.shape
    fine = _empty(replace(region, shape=(height * b, width * b), binning=1))
    invalid = find_invalid(frames, survey, fine, corrections, tick)
    return replace(_empty(region), invalid=np.asarray(invalid.reshape(height, b, width, b).any((1, 3))))


def _empty(geometry: Geometry) -> Prior:
    nothing = np.zeros(geometry.shape, np.bool_)
    row = np.zeros(len(FEATURES), np.float32)
    return Prior(geometry, 0.0, row, row, row[None, :0], row[None, :0], (), nothing.astype(np.uint8), nothing, nothing)


def _useful(frames: Any, corrections: Corrections, empty: Prior, settings: TrainSettings, tick: Tick) -> Photons:
    """The prepared frames that teach: bright enough, and evenly spaced among those; valid is (B, H, W).

    Raises ValueError where there is no photon at all.
    """
    flux = np.empty(len(frames))
    for i in range(len(frames)):
        one = prepare(np.asarray(frames[i]), empty, corrections.mask, corrections.flat, corrections.dark)
        flux[i] = one.counts[0].sum(where=one.valid.reshape(empty.geometry.shape), dtype=np.float64)
        tick("frames", i + 1, len(frames))
    if not flux.any():
        raise ValueError("no frame holds a photon on a measured pixel of the region; check the frames, the mask and the geometry")
    bright = np.flatnonzero((flux > 0) & (flux >= settings.faintest * np.percentile(flux, 95)))
    taken = bright[_spread(len(bright), settings.frames)]
    stack = [prepare(np.asarray(frames[int(i)]), empty, corrections.mask, corrections.flat, corrections.dark) for i in taken]
    return Photons(
        counts=np.concatenate([one.counts for one in stack]),
        valid=np.stack([one.valid.reshape(empty.geometry.shape) for one in stack]),
        flags=np.concatenate([one.flags for one in stack]),
    )


def _take(photons: Photons, index: npt.NDArray[np.intp]) -> Photons:
    return Photons(photons.counts[index], photons.valid[index], photons.flags[index])


def _flux(photons: Photons) -> npt.NDArray[np.float64]:
    """(B,) mean photons per valid pixel."""
    total = photons.counts.sum((1, 2), where=photons.valid, dtype=np.float64)
    return np.asarray(total / np.maximum(photons.valid.sum((1, 2)), 1))


def _with_classes(photons: Photons, empty: Prior, settings: TrainSettings, tick: Tick) -> Prior:
    """The prior with its normaliser, its classes and its reference map."""
    normaliser = float(np.median(_flux(photons)))
    rng = np.random.default_rng(settings.seed)
    tick("classes", 0, 2)
    sample = sample_pixels(photons.counts, photons.valid, normaliser, settings.pixels, rng)
    tick("classes", 1, 2)
    grown = grow_classes(sample, settings.variance, settings.som_side, settings.som_epochs, settings.classes, settings.seed)
    tick("classes", 2, 2)
    prior = replace(
        empty,
        normaliser=normaliser,
        feature_mean=grown.feature_mean,
        feature_scale=grown.feature_scale,
        pca_components=grown.pca_components,
        centroids=grown.centroids,
        class_names=grown.names,
        training=grown.training,
    )
    mean = photons.counts.mean(0, dtype=np.float64).astype(np.float32)[None]
    return replace(prior, reference=classify(mean, prior).ids[0])


def _baselines(photons: Photons, prior: Prior, settings: TrainSettings, tick: Tick) -> Pairs:
    """Name -> (mean, standard deviation) over the frames that it is defined on."""
    classes = classify(photons, prior)
    pairs = {"flux": _pair(_flux(photons)), "class_distance": _pair(classes.distance), **_mask_baselines(photons, classes, prior)}
    control = _take(photons, _spread(len(photons.counts), settings.control))
    chi2, floor = np.empty(len(control.counts)), np.empty(len(control.counts))
    for i in range(len(chi2)):
        one = _take(control, np.array([i]))
        found = refine(one, match(one, prior), iterations=settings.iterations, backend="cpu")
        chi2[i], floor[i] = found.chi2[0], found.floor[0]
        tick("baselines", i + 1, len(chi2))
    return {**pairs, "chi2": _pair(chi2), "chi2_over_floor": _pair(chi2 / floor), "flux_least": (float(_flux(photons).min()), 0.0)}


def _mask_baselines(photons: Photons, classes: Classes, prior: Prior) -> Pairs:
    number = len(prior.class_names)
    numbers = [mask_numbers(ids, counts, prior.reference, ids, number) for ids, counts in zip(classes.ids, photons.counts, strict=True)]
    pairs = {
        "centre_row": _pair(np.array([one.centre_row for one in numbers])),
        "centre_column": _pair(np.array([one.centre_column for one in numbers])),
    }
    for k, name in enumerate(prior.class_names):
        pairs[f"fraction_{name}"] = _pair(np.array([one.fraction[k] for one in numbers]))
        pairs[f"iou_{name}"] = _pair(np.array([one.iou[k] for one in numbers]))
    return pairs


def _pair(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of the finite values; (0, 0) where there is none, which JSON can hold and NaN cannot."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 0.0)
