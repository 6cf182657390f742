"""An archived run and the file with its raw frames -> the run made complete: what overload left out is computed and put in its place."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.config import Config
from streamprior.crew import REFINEMENT, think
from streamprior.errors import ConfigError
from streamprior.fates import InUse
from streamprior.ledger import catch_up, frames_up_to
from streamprior.prior import load_prior
from streamprior.records import Flag, Frame, Result, RunStarted
from streamprior.sinks.archive import Reopened, read_about
from streamprior.sinks.rows import NO_ORIGIN
from streamprior.sources.files import open_recording
from streamprior.stages.recipe import Recipe

_BATCH, _BATCH_BYTES = 16, 2**26
"""Frames that are computed, and written, at once: so many, or as many as have these bytes. Two batches a worker are in memory."""

_OTHER = 1e-3
"""Part of a class map's pixels that may differ from the archive's: a card, or another processor, rounds otherwise."""

_Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Gap:
    """What a run lacks, by frame index, (N,) each. unrefined : those with a mask alone. absent : those without a row."""

    unrefined: _Indices
    absent: _Indices

    @property
    def indices(self) -> _Indices:
        return np.sort(np.concatenate([self.unrefined, self.absent]))


class CatchUp:
    """One run that is caught up with; owns its arrays and its frames table while it lasts.

    Frames are read, compared and written by the caller's thread, in their order; in between they are computed by `workers` threads.

    Parameters
    ----------
    folder : of an archived run that has ended. file : its raw frames, as `open_recording` takes them: the archive keeps none.
    config : of the daemon that wrote it; `compute.workers` says how many threads, by default one a core. ledger : folder of the ledger.

    Raises
    ------
    ConfigError
        The run is still written, was made with another prior or a recipe that refines no frame, or the file does not hold its frames.
    """

    def __init__(self, folder: Path, file: str | os.PathLike[str], config: Config, ledger: Path) -> None:
        about = _about(folder)
        prior = load_prior(config.prior)
        made_with = str(about["provenance"].get("prior_hash"))
        if made_with != prior.content_hash:
            raise ConfigError(f"{folder}: was made with prior {made_with[:12]}, {config.prior} is {prior.content_hash[:12]}; name that one")
        recipe = Recipe(prior, config.prepare, config.refine, config.drift, config.recipe, config.compute.backend)
        if not recipe.refines:
            raise ConfigError(
                f"{folder}: the configuration refines no frame (recipe, refine.enabled); name that of the daemon that wrote it"
            )
        self._recording = open_recording(file)
        geometry = self._recording.geometry
        self._run = RunStarted(about["uid"], about["source"], about["series"], about["opened"], about["expected"], geometry)
        self._recipe = recipe
        self._workers = config.compute.workers or len(os.sched_getaffinity(0))
        self._reopened = Reopened(folder, recipe.drift_columns)
        index, origin, flags = self._reopened.columns("index", "origin", "flags")
        self._places = _places(index, origin)
        self._ledger = ledger
        # Where nobody said how many come, the ledger alone knows of frames after the last one in the archive.
        expected = about["expected"] or max(about["extent"], frames_up_to(ledger, about["uid"]))
        self.gap = Gap(index[(flags & _NOT_REFINED) > 0], np.setdiff1d(np.arange(expected), index))
        last = int(self._places(self.gap.indices).max(initial=-1))
        if last >= len(self._recording):
            raise ConfigError(f"{file}: has {len(self._recording)} frames, the run needs its frame {last}; name the file of this run")

    def work(self) -> Iterator[int]:
        """Compute and write what is lacking, some frames at a time; yields how many were written. What was written stays.

        Raises ConfigError where the file's frames are not those that the archive has masks of.
        """
        lacking = self.gap.indices
        size = max(1, min(_BATCH, _BATCH_BYTES // self._recording[0].nbytes)) if len(lacking) else 1
        batches = (self._batch(lacking[first : first + size].tolist()) for first in range(0, len(lacking), size))
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(min(self._workers, -(-len(lacking) // size))):
            idle.put(_Worker(self._recipe, self._run))
        for batch, results in _in_order(lambda batch: _compute(idle, batch), batches, self._workers):
            for result in results:
                self._check_like(result, batch.rows)
            self._reopened.write(results)
            yield len(results)
        self._reopened.finish(len(lacking))

    def tell_ledger(self) -> str:
        """Tell the ledger which frames the archive now has whole; returns what came of it, in words.

        Also those that an earlier call could not tell, or that a process wrote which was killed before it told.
        """
        index, flags = self._reopened.columns("index", "flags")
        uid, folder = self._run.uid, self._ledger
        try:
            number = catch_up(folder, uid, index[(flags & _NOT_REFINED) == 0])
        except KeyError:
            return f"the ledger in {folder} keeps no run {uid}: it was too long ago, or another state folder (STREAMPRIOR_STATE) has it"
        except InUse:
            return (
                f"run {uid} is not closed in the ledger in {folder}, so that was not told: once the daemon has closed it, or has"
                " started again if it was killed, the same command does"
            )
        except (OSError, ValueError, TypeError) as error:
            return f"the ledger in {folder} could not be told ({error}); the same command tells it when that is mended"
        return f"the ledger in {folder} was told of {number} frames"

    def _batch(self, indices: Sequence[int]) -> _Batch:
        """Frames with what the archive knows of them, and those just before them, which may need nothing: masks are compared with them."""
        before = sorted({index - 1 for index in indices if index} - set(indices))
        rows = self._reopened.rows([*indices, *before])
        return _Batch([self._frame(index, rows) for index in indices], [self._frame(index, rows) for index in before], rows)

    def _frame(self, index: int, rows: _Rows) -> Frame:
        row = rows.get(index, {})
        place = int(self._places(np.array([index]))[0])
        position = (float(row.get("position_x", math.nan)), float(row.get("position_y", math.nan)))
        when = float(row.get("detector_time", math.nan))
        return Frame(
            self._run.source,
            self._run.series,
            index,
            self._recording[place],
            float(row.get("received", math.nan)),
            detector_time=None if math.isnan(when) else when,
            position=None if math.isnan(position[0]) else position,
            origin=None if row.get("origin", NO_ORIGIN) == NO_ORIGIN and self._places is _same else place,
            flags=int(row.get("flags", 0)) & int(Flag.NO_POSITION),
        )

    def _check_like(self, result: Result, rows: _Rows) -> None:
        if result.index not in rows:
            return
        other = float(np.mean(self._reopened.classes(result.index) != result.classes))
        if other > _OTHER:
            place = int(self._places(np.array([result.index]))[0])
            raise ConfigError(
                f"{self._recording.path}: its frame {place} gives another mask than frame {result.index} of the run"
                f" has ({other:.1%} of the pixels); name the file of this run, and the configuration with its mask, dark and flat"
            )


_Rows = Mapping[int, Mapping[str, Any]]
"""Index -> row of the frames table, where there is one."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """frames : what is lacking. before : of the frames just before these, those that are not among them. rows : of both."""

    frames: Sequence[Frame]
    before: Sequence[Frame]
    rows: _Rows


class _Worker:
    """One thread's stages, which own buffers and FFT plans, and its drift watch."""

    def __init__(self, recipe: Recipe, run: RunStarted) -> None:
        self._prior, self._run = recipe.prior, run
        self._stages = recipe.stages()
        self._masks = [stage for stage in self._stages if stage.name not in REFINEMENT]
        (self._watch,) = recipe.watches()

    def compute(self, batch: _Batch) -> list[Result]:
        """Results of a batch's frames, with the numbers that compare a mask with the one before it."""
        results = think(self._stages, self._prior, self._run, batch.frames)
        before = think(self._masks, self._prior, self._run, batch.before) if batch.before else []
        by_index = {result.index: result for result in (*before, *results)}
        watched = []
        for result in results:
            self._watch.begin(self._run)
            one_before = by_index.get(result.index - 1)
            (*_, done) = self._watch([one_before, result] if one_before is not None else [result])
            # Alarms stay as they were raised: whether one stands depends on all that came before.
            standing = batch.rows.get(result.index, {}).get("alarms", "")
            watched.append(replace(done, alarms=tuple(standing.split(",")) if standing else ()))
        return watched


def _compute(idle: SimpleQueue[_Worker], batch: _Batch) -> list[Result]:
    """By a worker that has nothing to do; there are as many as threads."""
    worker = idle.get()
    try:
        return worker.compute(batch)
    finally:
        idle.put(worker)


def _in_order(compute: Callable[[_Batch], list[Result]], batches: Iterable[_Batch], workers: int) -> Iterator[tuple[_Batch, list[Result]]]:
    """Batches with their results in the order of the batches; so many are computed at once, and as many more are read ahead."""
    waiting: deque[tuple[_Batch, Future[list[Result]]]] = deque()
    pool = ThreadPoolExecutor(workers, "catchup")
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(compute, batch)))
            if len(waiting) >= 2 * workers:
                first, results = waiting.popleft()
                yield first, results.result()
        while waiting:
            first, results = waiting.popleft()
            yield first, results.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = read_about(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: is no archived run ({error}); name a folder with a run.json") from None
    if about["status"] == "running":
        raise ConfigError(f"{folder}: is still written; catch up with it when the run has ended")
    return about


_NOT_REFINED = np.uint32(Flag.NOT_REFINED)


def _same(indices: _Indices) -> _Indices:
    return indices


def _places(index: _Indices, origin: _Indices) -> Callable[[_Indices], _Indices]:
    """Frames of the run -> frames of the file: the same, or as the rows (N,) of a replayed file tell, and between them by their step."""
    told = origin != NO_ORIGIN
    if not told.any():
        return _same
    index, origin = index[told], origin[told]
    first, last = int(index[0]), int(index[-1])
    step = int(origin[-1] - origin[0]) // (last - first) if last > first else 1

    def places(indices: _Indices) -> _Indices:
        near = np.minimum(np.searchsorted(index, indices), len(index) - 1)
        return np.where(index[near] == indices, origin[near], origin[0] + step * (indices - first))

    return places
