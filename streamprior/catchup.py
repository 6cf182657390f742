"""An archived run and the file with its raw frames -> the run made complete: what overload left out is computed and put in its place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from streamprior.config import Config
from streamprior.crew import REFINEMENT, think
from streamprior.errors import ConfigError
from streamprior.prior import load_prior
from streamprior.records import Flag, Frame, Result, RunStarted
from streamprior.sinks.archive import Reopened, read_about
from streamprior.sinks.rows import NO_ORIGIN
from streamprior.sources.files import open_recording
from streamprior.stages.recipe import Recipe

_BATCH = 16
"""Frames that are computed, and written, at once."""

_OTHER = 1e-3
"""Part of a class map's pixels that may differ from the archive's: a card, or another processor, rounds otherwise."""


@dataclass(frozen=True)
class Gap:
    """What a run lacks, by frame index. unrefined : those with a mask alone. absent : those without a row."""

    unrefined: tuple[int, ...]
    absent: tuple[int, ...]

    @property
    def indices(self) -> list[int]:
        return sorted((*self.unrefined, *self.absent))


class CatchUp:
    """One run that is caught up with; owns its arrays and its frames table while it lasts.

    Parameters
    ----------
    folder : of an archived run that has ended. file : its raw frames, as `open_recording` takes them. config : of the daemon that wrote it.

    Raises
    ------
    ConfigError
        The run is still written, was made with another prior or a recipe that refines no frame, or the file does not hold its frames.
    """

    def __init__(self, folder: Path, file: str | os.PathLike[str], config: Config) -> None:
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
        self._prior, self._stages, self._watch = prior, recipe.stages(), recipe.watches()[0]
        self._reopened = Reopened(folder, recipe.drift_columns)
        self._rows = _by_index(self._reopened)
        self._origin = _origins(self._rows)
        expected = about["expected"] or about["extent"]
        unrefined = tuple(index for index, row in self._rows.items() if row["flags"] & Flag.NOT_REFINED)
        self.gap = Gap(unrefined, tuple(index for index in range(expected) if index not in self._rows))
        last = max((self._origin(index) for index in self.gap.indices), default=-1)
        if last >= len(self._recording):
            raise ConfigError(f"{file}: has {len(self._recording)} frames, the run needs its frame {last}; name the file of this run")

    def work(self) -> Iterator[int]:
        """Compute and write what is lacking, some frames at a time; yields how many were written. What was written stays.

        Raises ConfigError where the file's frames are not those that the archive has masks of.
        """
        lacking = self.gap.indices
        for indices in (lacking[first : first + _BATCH] for first in range(0, len(lacking), _BATCH)):
            results = self._watched(think(self._stages, self._prior, self._run, [self._frame(index) for index in indices]))
            for result in results:
                self._check_like(result)
            self._reopened.write(results)
            yield len(results)
        self._reopened.finish(len(lacking))

    def _frame(self, index: int) -> Frame:
        row = self._rows.get(index, {})
        place = self._origin(index)
        position = (row.get("position_x", math.nan), row.get("position_y", math.nan))
        when = row.get("detector_time", math.nan)
        return Frame(
            self._run.source,
            self._run.series,
            index,
            self._recording[place],
            row.get("received", math.nan),
            detector_time=None if math.isnan(when) else when,
            position=None if math.isnan(position[0]) else position,
            origin=None if row.get("origin", NO_ORIGIN) == NO_ORIGIN and self._origin is _same else place,
            flags=int(row.get("flags", 0)) & int(Flag.NO_POSITION),
        )

    def _watched(self, results: Sequence[Result]) -> list[Result]:
        """With the numbers that compare a mask with the one before it, which may be of a frame that needs nothing."""
        masks_alone = [stage for stage in self._stages if stage.name not in REFINEMENT]
        watched = []
        for result in results:
            self._watch.begin(self._run)
            before = result.index - 1
            one_before = think(masks_alone, self._prior, self._run, [self._frame(before)]) if before >= 0 else []
            (*_, done) = self._watch([*one_before, result])
            # Alarms stay as they were raised: whether one stands depends on all that came before.
            standing = self._rows.get(result.index, {}).get("alarms", "")
            watched.append(replace(done, alarms=tuple(standing.split(",")) if standing else ()))
        return watched

    def _check_like(self, result: Result) -> None:
        if result.index not in self._rows:
            return
        other = float(np.mean(self._reopened.classes(result.index) != result.classes))
        if other > _OTHER:
            raise ConfigError(
                f"{self._recording.path}: its frame {self._origin(result.index)} gives another mask than frame {result.index} of the run"
                f" has ({other:.1%} of the pixels); name the file of this run, and the configuration with its mask, dark and flat"
            )


def _about(folder: Path) -> dict[str, Any]:
    try:
        about = read_about(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: is no archived run ({error}); name a folder with a run.json") from None
    if about["status"] == "running":
        raise ConfigError(f"{folder}: is still written; catch up with it when the run has ended")
    return about


def _by_index(reopened: Reopened) -> dict[int, Mapping[str, Any]]:
    return {row["index"]: row for row in reopened.rows()}


def _same(index: int) -> int:
    return index


def _origins(rows: Mapping[int, Mapping[str, Any]]) -> Callable[[int], int]:
    """Frame of the run -> frame of the file: the same, or as the rows of a replayed file tell."""
    told = {index: row["origin"] for index, row in rows.items() if row["origin"] != NO_ORIGIN}
    if not told:
        return _same
    first, last = min(told), max(told)
    step = (told[last] - told[first]) // (last - first) if last > first else 1
    return lambda index: told.get(index, told[first] + step * (index - first))
