"""Raw frames -> Prior: region, pixel classes, reference map, support and baselines, one after another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from streamprior.config import RefineSettings
from streamprior.prior import FEATURES, Geometry, Prior, frame_hashes, freeze
from streamprior.records import Classes, Photons, Start
from streamprior.stages.classify import classify
from streamprior.stages.drift import mask_numbers
from streamprior.stages.match import Control, Nearest, dark_pixels
from streamprior.stages.prepare import Corrections, prepare, stacked
from streamprior.stages.recipe import plan_of
from streamprior.stages.refine import Solver
from streamprior.train.classes import PixelClasses, grow_classes, sample_pixels
from streamprior.train.describe import class_names, describe_classes
from streamprior.train.prototypes import gather, solve_library
from streamprior.train.region import Tick, find_geometry, find_invalid, mean_frame
from streamprior.train.settings import TrainSettings
from streamprior.train.solve import SolveSettings, control_of, solve_frames
from streamprior.train.stability import stability

Pairs = dict[str, tuple[float, float]]

BRIGHTEST = 8
"""Frames that are solved for the support of the flat start where no library is grown."""

FEWEST = 2
"""Frames a prior takes: from one frame no class, support or baseline can be found again in another."""


def grow_prior(
    frames: Any,
    geometry: Geometry | None = None,
    settings: TrainSettings | None = None,
    progress: Tick | None = None,
    provenance: Mapping[str, Any] | None = None,
    corrections: Corrections | None = None,
    keep: Path | None = None,
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
    keep : Path, optional
        Folder in which solved frames are kept, so that training goes on where it was stopped.

    Returns
    -------
    Prior
        Frozen. The same frames and settings give the same content hash.

    Raises
    ------
    ValueError
        No frames, frames that are not images, a region that does not fit, or fewer than FEWEST frames that hold photons.
    """
    chosen = settings or TrainSettings()
    tick = progress or (lambda stage, done, total: None)
    _check_frames(frames, geometry)
    # One thread: sums of many threads round differently from run to run, and the hash would change with them.
    with threadpool_limits(1):
        corrected = corrections or Corrections()
        empty = _with_region(frames, corrected, geometry, chosen, tick)
        photons, hashes = _useful(frames, corrected, empty, chosen, tick)
        classified = _with_classes(photons, empty, chosen, tick)
        grown = _with_library(photons, classified, chosen, tick, keep)
        baselines = _baselines(photons, grown, chosen, tick)
        training = {**grown.training, "frame_hashes": hashes}
    story = {"frames": len(frames), "settings": chosen.model_dump(), **(provenance or {})}
    return freeze(replace(grown, baselines=baselines, training=training, provenance=story))


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
    fine = empty_prior(replace(region, shape=(height * b, width * b), binning=1))
    invalid = find_invalid(frames, survey, fine, corrections, tick)
    return replace(empty_prior(region), invalid=np.asarray(invalid.reshape(height, b, width, b).any((1, 3))))


def empty_prior(geometry: Geometry) -> Prior:
    """A prior that holds a geometry and nothing else yet."""
    nothing = np.zeros(geometry.shape, np.bool_)
    row = np.zeros(len(FEATURES), np.float32)
    return Prior(geometry, 0.0, row, row, row[None, :0], row[None, :0], (), nothing.astype(np.uint8), nothing, nothing)


def with_centroids(prior: Prior, grown: PixelClasses, normaliser: float) -> Prior:
    """The prior with what `classify` needs; names, reference and baselines come later."""
    return replace(
        prior,
        normaliser=normaliser,
        feature_mean=grown.feature_mean,
        feature_scale=grown.feature_scale,
        pca_components=grown.pca_components,
        centroids=grown.centroids,
    )


def _useful(
    frames: Any, corrections: Corrections, empty: Prior, settings: TrainSettings, tick: Tick
) -> tuple[Photons, npt.NDArray[np.uint8]]:
    """The prepared frames that teach: bright enough, and evenly spaced among those; valid is (B, H, W). And the raw frames' hashes.

    Raises ValueError where they are fewer than FEWEST.
    """
    flux = np.empty(len(frames))
    for i in range(len(frames)):
        one = prepare(np.asarray(frames[i]), empty, corrections.mask, corrections.flat, corrections.dark)
        flux[i] = one.counts[0].sum(where=one.valid.reshape(empty.geometry.shape), dtype=np.float64)
        tick("frames", i + 1, len(frames))
    if not flux.any():
        raise ValueError("no frame holds a photon on a measured pixel of the region; check the frames, the mask and the geometry")
    bright = np.flatnonzero((flux > 0) & (flux >= settings.faintest * np.percentile(flux, 95)))
    if len(bright) < FEWEST:
        raise ValueError(
            f"training needs {FEWEST} frames bright enough to learn from, found {len(bright)} among {len(frames)}: give more of the scan"
        )
    taken = bright[_spread(len(bright), max(settings.frames, settings.library))]
    raw = [np.asarray(frames[int(i)]) for i in taken]
    photons = stacked([prepare(one, empty, corrections.mask, corrections.flat, corrections.dark) for one in raw])
    return photons, np.concatenate([frame_hashes(one[None]) for one in raw])


def _take(photons: Photons, index: npt.NDArray[np.intp]) -> Photons:
    return Photons(photons.counts[index], photons.valid[index], photons.flags[index], photons.known)


def _flux(photons: Photons) -> npt.NDArray[np.float64]:
    """(B,) mean photons per valid pixel."""
    total = photons.counts.sum((1, 2), where=photons.valid, dtype=np.float64)
    return np.asarray(total / np.maximum(photons.valid.sum((1, 2)), 1))


def _with_classes(photons: Photons, empty: Prior, settings: TrainSettings, tick: Tick) -> Prior:
    """The prior with its normaliser, its classes and its reference map."""
    photons = _take(photons, _spread(len(photons.counts), settings.frames))
    normaliser = float(np.median(_flux(photons)))
    rng = np.random.default_rng(settings.seed)
    tick("classes", 0, 2)
    sample = sample_pixels(photons.counts, photons.valid, normaliser, settings.pixels, rng)
    tick("classes", 1, 2)
    grown = grow_classes(sample, settings)
    tick("classes", 2, 2)
    prior = with_centroids(empty, grown, normaliser)
    mean = photons.counts.mean(0, dtype=np.float64).astype(np.float32)[None]
    described = describe_classes(classify(photons, prior).ids, photons, normaliser, len(grown.centroids))
    return replace(
        prior,
        class_names=class_names(described),
        reference=classify(mean, prior).ids[0],
        training={**grown.training, **described, **stability(photons, grown, normaliser, settings, tick)},
    )


def _with_library(photons: Photons, prior: Prior, settings: TrainSettings, tick: Tick, keep: Path | None) -> Prior:
    """The prior with its prototypes and the support of the flat start; without a library a few bright frames give the support alone."""
    if not settings.library:
        brightest = np.argsort(-photons.counts.sum((1, 2)), kind="stable")[:BRIGHTEST]
        how = SolveSettings(settings.schedule, 1, settings.polish, 0, settings.seed)
        return replace(prior, support=control_of(solve_frames(_take(photons, brightest), how, tick, keep).support))
    chosen = _take(photons, _spread(len(photons.counts), settings.library))
    solved = solve_library(chosen, settings, tick, keep)
    library = gather(chosen, solved, settings, tick, dark_pixels(chosen, prior))
    grown = replace(prior, library=library, support=library.control)
    # Cropped as the archive crops objects: an evaluation starts from the nearest of them to show what gathering them costs.
    return replace(grown, training={**prior.training, "solved_psi": solved.psi[(slice(None), *grown.object_box)]})


def _baselines(photons: Photons, prior: Prior, settings: TrainSettings, tick: Tick) -> Pairs:
    """Name -> (mean, standard deviation) over the frames that it is defined on."""
    few = _take(photons, _spread(len(photons.counts), settings.frames))
    classes = classify(few, prior)
    pairs = {"flux": _pair(_flux(few)), "class_distance": _pair(classes.distance), **_mask_baselines(few, classes, prior)}
    chosen = _spread(len(photons.counts), settings.control)
    solver = Solver(prior.geometry.shape, plan_of(RefineSettings()), engine="repeatable")
    nearest = None if prior.library is None or len(prior.library.psi) < 2 else Nearest(prior.library)
    chi2, floor, distance = np.empty((3, len(chosen)))
    for done, i in enumerate(chosen):
        one = _take(photons, chosen[done : done + 1])
        own = np.flatnonzero(_spread(len(photons.counts), settings.library) == i)
        start = _unseen(one, own, prior, nearest)
        found = solver.solve(one.counts, start, one.valid, None)
        chi2[done], floor[done], distance[done] = found.chi2[0], found.floor[0], start.distance[0, 0]
        tick("baselines", done + 1, len(chosen))
    retrieved = {"chi2": _pair(chi2), "chi2_over_floor": _pair(chi2 / floor), "distance": _pair(distance)}
    return {**pairs, **retrieved, "flux_least": (float(_flux(photons).min()), 0.0)}


def _unseen(one: Photons, own: npt.NDArray[np.intp], prior: Prior, nearest: Nearest | None) -> Start:
    """What the daemon would start a training frame from if it had not been trained on: its own prototype is left out.

    own : its place among the frames of the library; empty where it is none of them.
    """
    control = Control(prior.support).starts(one)
    library, wanted = prior.library, RefineSettings().candidates
    if library is None or nearest is None:
        return control
    near = nearest.starts(one, min(wanted + 1, len(library.psi)), dark_pixels(one, prior))
    others = np.flatnonzero(~np.isin(near.unit[0], library.unit[own]))[:wanted]
    return Start(
        psi=np.concatenate([near.psi[:, others], control.psi], axis=1),
        support=np.concatenate([near.support[:, others], control.support], axis=1),
        unit=np.concatenate([near.unit[:, others], control.unit], axis=1),
        distance=np.concatenate([near.distance[:, others], control.distance], axis=1),
    )


def _mask_baselines(photons: Photons, classes: Classes, prior: Prior) -> Pairs:
    number = len(prior.class_names)
    numbers = mask_numbers(list(classes.ids), list(photons.counts), prior.reference, classes.ids[0], number)
    pairs = {"centre_row": _pair(numbers.centre_row), "centre_column": _pair(numbers.centre_column)}
    for k, name in enumerate(prior.class_names):
        pairs[f"fraction_{name}"] = _pair(numbers.fraction[:, k])
        pairs[f"iou_{name}"] = _pair(numbers.iou[:, k])
    return pairs


def _pair(values: npt.NDArray[Any]) -> tuple[float, float]:
    """Mean and standard deviation of the finite values; (0, 0) where there is none, which JSON can hold and NaN cannot."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return (float(finite.mean()), float(finite.std())) if finite.size else (0.0, 0.0)
