"""Prepared frames and their class maps -> morphologies: seven numbers a frame, a frozen SOM over them, and its units gathered into groups.

No label is used: people name the groups afterwards. A group says what a diffraction pattern looks like; nothing downstream trusts it with
more than that, because the phase, and with it half of the object, is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.ndimage import binary_fill_holes, gaussian_filter, grey_closing, maximum_filter
from threadpoolctl import threadpool_limits

from streamprior.train.classes import train_map

DESCRIPTOR = ("log_size", "log_area", "log_foreground", "elongation", "tail", "hole", "speckle")
"""The numbers that describe a frame, in the order of every (F,) array.

None of them changes with the object's twin, place or global phase (intensity does not), with the frame's centre (moments are about the
centre of mass) or, but for noise, with the dose; only `tail` changes when the pattern is turned in the plane.

log_size : log of the pattern's radius, root mean square, pixels.
log_area : log of the pixels that the photons fill evenly, (sum I)^2 / sum I^2, without the share of Poisson noise in the denominator.
log_foreground : log of the share of measured pixels that are not background.
elongation : (a - b) / (a + b) of the main variances a >= b: 0 is round, 1 a line. Bounded, because a plate is not further from an elongated
    crystal than that one is from a compact one, as their ratio would have it.
tail : third moment along the rows over the cube of the radius, without its sign: 0 is symmetric.
hole : root of the share of photons that would fill the dark places within the bright part.
speckle : log of the number of bright maxima.
"""

NO_GROUP = 255
"""Group of a frame that cannot be described: without a photon in its foreground."""

BRIGHT = 0.3
"""Part of the largest smoothed count from which a pixel belongs to the bright part, whose holes are looked for."""

MAXIMUM = 0.08
"""Part of the largest smoothed count from which a maximum is counted: the first fringe of two parallel facets stays below (0.047)."""

SMOOTHING_PX = 0.7
"""Sigma against photon noise; speckle sampled 2.5 times is wider."""

HOLE_PX = 7
"""Widest hole, pixels; a wider dark place is the space between speckles."""

ROWS = 1000
"""Most rows of the dendrogram; its cost grows with their square."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MorphologyMap:
    """A frozen map of frames: U units, F descriptors (`DESCRIPTOR`).

    codebook : (U, F) float32, scaled descriptors (x - mean) * scale. mean, scale : (F,) float32, a scale of 0 switches a number off.
    group : (U,) uint8, ordered by the groups' mean size. share : (groups,) float32, part of the training frames in each.
    quantization_error, topographic_error : mean distance of a frame from its unit, share of frames whose two nearest are no neighbours;
        both of the map as it was trained.
    """

    codebook: npt.NDArray[np.float32]
    mean: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    group: npt.NDArray[np.uint8]
    share: npt.NDArray[np.float32]
    quantization_error: float
    topographic_error: float


def describe(
    counts: npt.NDArray[Any], ids: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_], background: int
) -> npt.NDArray[np.float32]:
    """Numbers that say what each frame's pattern looks like.

    Parameters
    ----------
    counts : (B, H, W) real, photons
    ids : (B, H, W) uint8
        Class maps. Only measured pixels that are not background are described, so that neither a beam stop nor a far count of noise
        draws a moment.
    valid : (H, W) or (B, H, W) bool
        To use a map behind a beam stop, grow it on frames that are described with the stop's pixels invalid as well.
    background : int
        Class id of the background: a prior's last class, `len(prior.class_names) - 1`.

    Returns
    -------
    (B, 7) float32
        In the order of `DESCRIPTOR`; NaN for a frame without a photon in its foreground.

    Raises
    ------
    ValueError
        The shapes do not belong together.
    """
    if counts.ndim != 3 or ids.shape != counts.shape or valid.shape not in (counts.shape, counts.shape[1:]):
        raise ValueError(f"counts {counts.shape}, ids {ids.shape} and valid {valid.shape} do not belong together; counts are (B, H, W)")
    masks = np.broadcast_to(valid, counts.shape)
    found = [_describe(*one, background) for one in zip(counts, ids, masks, strict=True)]
    return np.array(found, np.float32).reshape(len(counts), len(DESCRIPTOR))


def grow_morphology(
    descriptors: npt.NDArray[Any], groups: int = 7, side: int | None = None, epochs: int = 20, seed: int = 0
) -> MorphologyMap:
    """A map of described frames, without labels.

    A self-organising map (Kohonen 1982; MiniSom) on scaled descriptors, its units moved to the mean of their frames; Ward's clustering
    (1963) of the units, each weighed by its frames.

    Parameters
    ----------
    descriptors : (N, F) real
        From `describe`; rows that are not finite teach nothing.
    groups : int
        Seven morphologies have names.
    side : int, optional
        Units along each side of the map; where None, such that there are about 5 sqrt(N) units (Vesanto 2000).
    epochs : int
        Passes over the frames.
    seed : int
        Of the map.

    Raises
    ------
    ValueError
        Fewer finite rows than groups.
    """
    known = np.asarray(descriptors, np.float64)
    known = known[np.isfinite(known).all(1)]
    if len(known) < groups:
        raise ValueError(
            f"{len(known)} frames that can be described are fewer than {groups} groups; give more frames or ask for fewer groups"
        )
    mean, deviation = known.mean(0), known.std(0)
    scale = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=deviation > 1e-6)
    scaled = (known - mean) * scale
    with threadpool_limits(1):  # the same frames give the same map, bit for bit
        units, quality = train_map(scaled, side or round((5 * len(known) ** 0.5) ** 0.5), epochs, seed)
        units = _settled(scaled, units)
        nearest = _nearest(scaled, units)
        gathered = _gather(units, np.bincount(nearest, minlength=len(units)), groups)
    unit_group = _in_order(gathered, nearest, known[:, 0])
    return MorphologyMap(
        codebook=units.astype(np.float32),
        mean=mean.astype(np.float32),
        scale=scale.astype(np.float32),
        group=unit_group,
        share=(np.bincount(unit_group[nearest], minlength=groups) / len(known)).astype(np.float32),
        quantization_error=float(quality["quantization_error"]),
        topographic_error=float(quality["topographic_error"]),
    )


def morphology_of(descriptors: npt.NDArray[Any], frozen: MorphologyMap) -> npt.NDArray[np.uint8]:
    """(B,) uint8, the group of each frame's nearest unit; NO_GROUP where a descriptor is not finite."""
    given = np.asarray(descriptors, np.float64)
    known = np.isfinite(given).all(1)
    found = np.full(len(given), NO_GROUP, np.uint8)
    scaled = (given[known] - frozen.mean) * frozen.scale
    found[known] = frozen.group[_nearest(scaled, frozen.codebook.astype(np.float64))]
    return found


def _describe(counts: npt.NDArray[Any], ids: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_], background: int) -> list[float]:
    foreground = valid & (ids < background)
    photons = np.where(foreground, counts, 0).astype(np.float64)
    total = photons.sum()
    if not total > 0:
        return [np.nan] * len(DESCRIPTOR)
    size, elongation, tail = _moments(photons / total)
    smooth = gaussian_filter(np.where(valid, counts, 0).astype(np.float64), SMOOTHING_PX)
    smooth /= np.maximum(gaussian_filter(valid.astype(np.float64), SMOOTHING_PX), 0.05)
    # The variance of a Poisson count is its mean: sum n (n - 1) is what sum n^2 would be without noise.
    evenness = max(float((photons * (photons - 1)).sum()), total)
    return [
        np.log(size),
        np.log(total**2 / evenness),
        np.log(foreground.sum() / valid.sum()),
        elongation,
        tail,
        _hole(smooth, valid),
        np.log(max(_maxima(smooth, valid), 1)),
    ]


def _moments(share: Floats) -> tuple[float, float, float]:
    """Size in pixels, elongation and tail of photons that sum to 1, about their centre of mass."""
    rows, columns = (np.arange(n, dtype=np.float64) for n in share.shape)
    down, across = share.sum(1), share.sum(0)
    rows -= down @ rows
    columns -= across @ columns
    along_rows, along_columns, mixed = down @ rows**2, across @ columns**2, rows @ share @ columns
    # A single bright pixel has the width of a pixel, not none.
    square = along_rows + along_columns + 1 / 6
    difference = np.hypot(along_rows - along_columns, 2 * mixed)
    return float(np.sqrt(square)), float(difference / square), float(abs(down @ rows**3) / square**1.5)


def _hole(smooth: Floats, valid: npt.NDArray[np.bool_]) -> float:
    """What a morphological closing adds within the filled bright part, as the root of a share of its light."""
    bright = smooth > BRIGHT * smooth.max()
    added = (grey_closing(smooth, size=(HOLE_PX, HOLE_PX)) - smooth)[binary_fill_holes(bright) & valid].sum()
    return float(np.sqrt(added / smooth[bright].sum()))


def _maxima(smooth: Floats, valid: npt.NDArray[np.bool_]) -> int:
    highest = (smooth == maximum_filter(smooth, size=3)) & (smooth > MAXIMUM * smooth.max()) & valid
    return int(np.count_nonzero(highest))


def _nearest(scaled: Floats, units: Floats) -> npt.NDArray[np.intp]:
    return np.asarray(((scaled[:, None] - units) ** 2).sum(2).argmin(1))


def _settled(scaled: Floats, units: Floats) -> Floats:
    """Units at the mean of their frames: those that the map's stiffness holds between two groups would otherwise join them."""
    nearest = _nearest(scaled, units)
    return np.stack([scaled[nearest == k].mean(0) if (nearest == k).any() else unit for k, unit in enumerate(units)])


def _gather(units: Floats, hits: npt.NDArray[np.intp], groups: int) -> npt.NDArray[np.intp]:
    """(U,) group of each unit, any numbers: Ward's clusters of the units that frames fell on; the others join their nearest."""
    taken = np.flatnonzero(hits)
    # A row for each frame weighs its unit; of many frames, a row for each share of them.
    repeats = np.ceil(hits[taken] * min(1.0, ROWS / hits.sum())).astype(np.intp)
    rows = np.repeat(units[taken], repeats, axis=0)
    labels = fcluster(linkage(rows, "ward"), groups, "maxclust") - 1
    of_taken = labels[np.cumsum(repeats) - 1]
    return np.asarray(of_taken[_nearest(units, units[taken])])


def _in_order(groups: npt.NDArray[np.intp], nearest: npt.NDArray[np.intp], log_size: Floats) -> npt.NDArray[np.uint8]:
    """The same groups, numbered by the mean size of their frames, so that two trainings count alike."""
    members = groups[nearest]
    present = np.unique(members)
    order = present[np.argsort([log_size[members == one].mean() for one in present], kind="stable")]
    number = np.empty(int(groups.max()) + 1, np.uint8)
    number[order] = np.arange(len(order))
    return np.asarray(number[groups])
