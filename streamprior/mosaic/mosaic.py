"""Shots -> a running image of the sample: from all frames, and from odd and even ones apart, which tells how far it is right."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streamprior.mosaic.kernels import power_of
from streamprior.mosaic.overlap import Canvas, Overlap, Rule, Shots
from streamprior.mosaic.probe import Modes, ProbePlaces

SWEEP = Rule(1, 0.05, 0.3)
"""A further pass over frames that are in already, from no light on."""

POLISH = Rule(1, 1.0, 0.0, lit=False)
"""A further pass over a few frames, whose light is not counted again: the cautious step of ePIE (Maiden & Rodenburg, Ultramicroscopy 109,
1256, 2009), halved where the probe is brightest."""

BLOCK = 8
"""Frames after which the probe is moved: few enough for the next ones to gain by it, many enough to average."""

_AT_ONCE = 16
"""Frames that are stacked at a time where the probe stands: a megabyte of 128 x 128, which the cache still holds when they are used."""

_GUARDED, _WORSE, _KNOWN = 64, 2.0, 0.5
"""Frames over which the guard of the probe judges, how much worse they must be foretold, and their least overlap."""

_MARGIN = 64
"""Object pixels by which a canvas that has to grow grows at least, so that it seldom has to."""

_PIXEL_BYTES = 12
"""Of one pixel of one canvas: image and light."""

Extent = tuple[int, int, int, int]
"""First row, first column, row after the last, column after the last, in object pixels."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One frame with its place.

    index : of the frame. position : (row, column) of the window's corner, object pixels, any origin. target : (H, W) float32,
    sqrt(counts H W) with the beam in the corner, below 0 where not measured. trust : (H, W) float32, or None where every measured pixel
    is believed.
    """

    index: int
    position: tuple[float, float]
    target: npt.NDArray[np.float32]
    trust: npt.NDArray[np.float32] | None = None

    @property
    def nbytes(self) -> int:
        return int(self.target.nbytes) * (1 if self.trust is None else 2) + 200


@dataclass(frozen=True, slots=True)
class Passed:
    """What a frame's pass found. before, after : chi2 of the mosaic's prediction of the frame, and of the frame's last iteration.
    overlap : part of the probe's light that fell where earlier frames had been, 0..1."""

    index: int
    before: float
    after: float
    overlap: float


@dataclass(frozen=True, slots=True)
class Picture:
    """The mosaic at one moment, cropped to where light was; (rows, columns).

    image : complex64, relative to an empty beam. odd, even : complex64, from half of the frames each; None without halves. light : float32,
    photons per pixel that fell on it. both : float32, the lesser of what fell on the halves. origin : (row, column) of its first pixel,
    object pixels. probe : (M, H, W).
    """

    image: npt.NDArray[np.complex64]
    light: npt.NDArray[np.float32]
    odd: npt.NDArray[np.complex64] | None
    even: npt.NDArray[np.complex64] | None
    both: npt.NDArray[np.float32] | None
    origin: tuple[int, int]
    probe: Modes


class Mosaic:
    """Owns canvases, probe and the newest frames of one run. Not for two threads at once.

    The same frames in the same order give the same bits, however they are grouped into calls.

    Parameters
    ----------
    probe : (M, H, W) complex64.
    rule : what a frame's first pass does.
    overlap : makes what computes; called twice with halves, as these are computed beside the whole.
    halves : whether odd and even frames are also put together apart.
    gain : of the probe's refinement, 0 for a probe that stands.
    keep_bytes : of frames that later passes can return to; the oldest go first.
    canvas_bytes : of all canvases together.
    """

    def __init__(
        self,
        probe: Modes,
        rule: Rule,
        overlap: Callable[[], Overlap],
        halves: bool = True,
        gain: float = 0.0,
        keep_bytes: int = 2**29,
        canvas_bytes: int = 2**29,
    ) -> None:
        self.places = ProbePlaces(probe)
        self._shape = (probe.shape[1], probe.shape[2])
        self._trust = np.ones(self._shape, np.float32)
        self._rule, self._gain = rule, gain
        self._overlaps = [overlap(), overlap()] if halves else [overlap()]
        self._helper = ThreadPoolExecutor(1, "mosaic-halves") if halves else None
        self._behind: Future[None] | None = None
        self._keep_bytes, self._canvas_bytes = keep_bytes, canvas_bytes
        self._canvases: list[Canvas] = []  # of all frames, of the even ones, of the odd ones
        self._extent: Extent | None = None
        self.kept: deque[Shot] = deque()
        self._kept_bytes = 0
        self._polished = 0
        self._guard = _Guard()
        self.frames = 0
        self.passes = 0  # beyond the first of each frame

    def close(self) -> None:
        if self._helper is not None:
            self._helper.shutdown()

    def holds(self, position: tuple[float, float]) -> bool:
        """Whether the canvas need not grow for a frame at this place."""
        return self._united([position]) == self._extent

    def fits(self, *positions: tuple[float, float]) -> bool:
        """Whether the canvas may grow to hold frames at these places; a stage that reports nonsense once must not take all memory."""
        return self._bytes(self._united(positions)) <= self._canvas_bytes

    def add(self, shots: Sequence[Shot]) -> list[Passed]:
        """Each frame's first pass, in the order given. Every position must fit."""
        found: list[Passed] = []
        at = 0
        while at < len(shots):
            step = BLOCK - self.frames % BLOCK if self._gain else _AT_ONCE
            found += self._first_pass(shots[at : at + step])
            at += step
        self._join()
        return found

    def _first_pass(self, block: Sequence[Shot]) -> list[Passed]:
        self._reach([shot.position for shot in block])
        misfit, power = self._pass(self._canvases, block, self._rule)
        self.frames += len(block)
        for shot in block:
            self._keep(shot)
        found = [
            Passed(shot.index, before / photons, after / photons, seen)
            for shot, (before, after, seen), photons in zip(block, misfit.tolist(), power.tolist(), strict=True)
        ]
        self._guard.hear(one.before for one in found if one.overlap > _KNOWN)
        if self._gain and self.frames % BLOCK == 0:
            self._move_probe(self._gain)
            self._guard.judge(self.places)
        return found

    def sweep(self, rule: Rule = SWEEP, seed: int = 0, newest: int | None = None) -> Iterator[float]:
        """One more pass over the kept frames, or the newest of them, in an order drawn by `seed`; yields the part that is done after each
        block.

        Of the light by which `rule` remembers, these frames' own is taken away first and comes back with their pass: ground that others
        have lit too holds as it would against new frames. No frame may be added before the sweep is through.
        """
        shots = list(self.kept)[-newest:] if newest is not None else list(self.kept)
        aside = self._without(shots)
        order = np.random.default_rng(seed).permutation(len(shots))
        for first in range(0, len(order), BLOCK):
            self._again(aside, [shots[i] for i in order[first : first + BLOCK]], rule)
            yield min(1.0, (first + BLOCK) / len(order))

    def polish(self, window: int, rule: Rule = POLISH) -> bool:
        """One more pass over a few of the last `window` frames; False when each of them has had its turn since the last new one."""
        recent = min(window, len(self.kept))
        if self._polished >= recent:
            return False
        first, last = self._polished, min(self._polished + BLOCK, recent)
        self._again(self._canvases, [self.kept[len(self.kept) - recent + i] for i in range(first, last)], rule)
        self._polished = last
        return True

    def average(self) -> Iterator[float]:
        """One overlap projection: every kept frame against a mosaic that stands still, then their weighted mean; yields the part that is
        done. It averages what the order of single passes leaves behind."""
        shots = list(self.kept)
        totals = [self._blank() for _ in self._canvases]
        for first in range(0, len(shots), BLOCK):
            self._gather(shots[first : first + BLOCK], totals)
            yield min(1.0, (first + BLOCK) / len(shots))
        for canvas, total in zip(self._canvases, totals, strict=True):
            self._overlaps[0].project(canvas, total)
        self.passes += len(shots)
        if self._gain and shots:
            self._move_probe(1.0)

    def chi2(self) -> float:
        """Of the mosaic over all kept frames (docs/physics.md section 2); nothing is changed. NaN before the first frame."""
        misfit = power = 0.0
        shots, spare = list(self.kept), self._blank() if self._canvases else None
        for first in range(0, len(shots), BLOCK):
            assert spare is not None
            stacked = self._stacked(shots[first : first + BLOCK])
            misfit += float(self._overlaps[0].gather(self._canvases[0], spare, stacked, self.places, False).sum())
            power += float(_power(stacked).sum())
        return misfit / power if power else float("nan")

    def picture(self) -> Picture | None:
        """The mosaic as it stands; None before the first frame."""
        if self._extent is None:
            return None
        (image, light), *halves = (self._overlaps[0].fetch(canvas) for canvas in self._canvases)
        rows, columns = (np.flatnonzero(light.any(axis)) for axis in (1, 0))
        cut = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        even, odd = (np.ascontiguousarray(half[cut]) for half, _ in halves) if halves else (None, None)
        origin = (self._extent[0] + int(rows[0]), self._extent[1] + int(columns[0]))
        both = np.minimum(halves[0][1][cut], halves[1][1][cut]) if halves else None
        cropped = np.ascontiguousarray(image[cut]), np.ascontiguousarray(light[cut])
        return Picture(*cropped, odd, even, both, origin, self.places.modes.copy())

    def _without(self, shots: Sequence[Shot]) -> list[Canvas]:
        """The canvases with the light of other frames than these."""
        if not shots or self._extent is None:
            return list(self._canvases)
        corners, slots = self.places.places(np.array([shot.position for shot in shots], np.float64))
        corners -= np.array(self._extent[:2])
        parity = np.array([shot.index % 2 for shot in shots])
        of_canvas = [np.ones(len(shots), np.bool_), parity == 0, parity == 1]
        return [
            self._overlaps[0].without(canvas, corners[chosen], slots[chosen], self.places)
            for canvas, chosen in zip(self._canvases, of_canvas, strict=False)
        ]

    def _again(self, canvases: Sequence[Canvas], block: Sequence[Shot], rule: Rule) -> None:
        self._pass(canvases, block, rule)
        self._join()
        self.passes += len(block)
        if self._gain:
            self._move_probe(self._gain)

    def _move_probe(self, gain: float) -> None:
        self._join()
        self.places.refine(*self._overlaps[0].take_gradient(), gain)

    def _pass(
        self, canvases: Sequence[Canvas], block: Sequence[Shot], rule: Rule
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """The block into every canvas, the halves in the other thread. Returns what `Overlap.passes` does for the whole, and the power."""
        stacked = self._stacked(block)

        def halves() -> None:
            for canvas, part in self._parts(block, stacked):
                self._overlaps[1].passes(canvases[canvas], part, self.places, rule, False)

        self._beside(halves)
        return self._overlaps[0].passes(canvases[0], stacked, self.places, rule, self._gain > 0), _power(stacked)

    def _gather(self, block: Sequence[Shot], totals: Sequence[Canvas]) -> None:
        stacked = self._stacked(block)

        def halves() -> None:
            for canvas, part in self._parts(block, stacked):
                self._overlaps[1].gather(self._canvases[canvas], totals[canvas], part, self.places, False)

        self._beside(halves)
        self._overlaps[0].gather(self._canvases[0], totals[0], stacked, self.places, self._gain > 0)
        self._join()

    def _beside(self, work: Callable[[], None]) -> None:
        """Hand work on the halves to the other thread, once it is through with what it has: it may be a block behind."""
        self._join()
        if self._helper is not None:
            self._behind = self._helper.submit(work)

    def _join(self) -> None:
        """Wait for the halves: before anything that they use is changed, and before anybody looks."""
        if self._behind is not None:
            self._behind.result()
            self._behind = None

    def _parts(self, block: Sequence[Shot], stacked: Shots) -> Iterator[tuple[int, Shots]]:
        """(canvas, frames) of the even and of the odd frames of a block."""
        parity = np.array([shot.index % 2 for shot in block])
        for half in (0, 1):
            chosen = np.flatnonzero(parity == half)
            if chosen.size:
                trust = stacked.trust[chosen] if len(stacked.trust) > 1 else stacked.trust
                yield 1 + half, Shots(stacked.corners[chosen], stacked.slots[chosen], stacked.targets[chosen], trust)

    def _stacked(self, block: Sequence[Shot]) -> Shots:
        assert self._extent is not None
        corners, slots = self.places.places(np.array([shot.position for shot in block], np.float64))
        trusts = [self._trust if shot.trust is None else shot.trust for shot in block]
        trust = self._trust[None] if all(one is self._trust for one in trusts) else np.stack(trusts)
        return Shots(corners - np.array(self._extent[:2]), slots, np.stack([shot.target for shot in block]), trust)

    def _keep(self, shot: Shot) -> None:
        self.kept.append(shot)
        self._kept_bytes += shot.nbytes
        while self._kept_bytes > self._keep_bytes and len(self.kept) > 1:
            self._kept_bytes -= self.kept.popleft().nbytes
        self._polished = 0

    def _blank(self) -> Canvas:
        """A canvas of nothing, as large as the others."""
        canvas = self._overlaps[0].canvas(*self._size())
        canvas.image[...] = 0
        return canvas

    def _size(self) -> tuple[int, int]:
        assert self._extent is not None
        top, left, bottom, right = self._extent
        return bottom - top, right - left

    def _reach(self, positions: Sequence[tuple[float, float]]) -> None:
        """See that the canvases hold windows at these places."""
        wanted, had = self._united(positions), self._extent
        if wanted == had:
            return
        self._join()
        roomy = self._with_margin(wanted)
        self._extent = roomy if self._bytes(roomy) <= self._canvas_bytes else wanted
        if had is None:
            self._canvases = [self._overlaps[0].canvas(*self._size()) for _ in range(3 if self._helper is not None else 1)]
            return
        place = (had[0] - self._extent[0], had[1] - self._extent[1])
        self._canvases = [self._overlaps[0].grow(canvas, *self._size(), *place) for canvas in self._canvases]

    def _united(self, positions: Sequence[tuple[float, float]]) -> Extent:
        """The extent that holds what there is and windows at these places, one pixel wider as a fraction of a pixel may round up."""
        rows, columns = ([position[axis] for position in positions] for axis in (0, 1))
        top, left = int(np.floor(min(rows))) - 1, int(np.floor(min(columns))) - 1
        bottom, right = int(np.ceil(max(rows))) + self._shape[0] + 1, int(np.ceil(max(columns))) + self._shape[1] + 1
        if self._extent is not None:
            top, left = min(top, self._extent[0]), min(left, self._extent[1])
            bottom, right = max(bottom, self._extent[2]), max(right, self._extent[3])
        return top, left, bottom, right

    def _with_margin(self, wanted: Extent) -> Extent:
        """Wider by half on the sides that moved: a scan that went there once goes there again."""
        top, left, bottom, right = wanted
        had = self._extent or wanted
        more = max(_MARGIN, (bottom - top) // 2), max(_MARGIN, (right - left) // 2)
        first = self._extent is None
        return (
            top - more[0] if first or top < had[0] else top,
            left - more[1] if first or left < had[1] else left,
            bottom + more[0] if first or bottom > had[2] else bottom,
            right + more[1] if first or right > had[3] else right,
        )

    def _bytes(self, extent: Extent) -> int:
        layers = 3 if self._helper is not None else 1
        return (extent[2] - extent[0]) * (extent[3] - extent[1]) * _PIXEL_BYTES * layers


class _Guard:
    """Remembers the probe with which frames on known ground were foretold best, and goes back to it when they no longer are: a stretch of
    frames whose positions are wrong would otherwise leave a spoilt probe behind."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque(maxlen=_GUARDED)
        self._best: tuple[float, Modes] | None = None

    def hear(self, foretold: Iterable[float]) -> None:
        self._newest.extend(foretold)

    def judge(self, places: ProbePlaces) -> None:
        if len(self._newest) < _GUARDED:
            return
        mean = float(np.mean(self._newest))
        if self._best is None or mean < self._best[0]:
            self._best = mean, places.modes
        elif mean > _WORSE * self._best[0]:
            places.replace(self._best[1])
            # What they are foretold like from here on is the new measure: the sample may simply be another.
            self._best = None
            self._newest.clear()


def _power(shots: Shots) -> npt.NDArray[np.float64]:
    """(B,) sum of the squared targets, at least 1: the denominator of chi2."""
    return np.asarray(power_of(shots.targets), np.float64)
