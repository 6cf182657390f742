"""A recipe's name -> its stages: what runs in the crew, batch by batch, and what watches the results in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from streamprior.arrays import check_backend, free_card_memory
from streamprior.config import DriftSettings, PrepareSettings, RefineSettings
from streamprior.errors import ConfigError, DeviceLost
from streamprior.prior import Prior
from streamprior.records import Batch, Detector, Frame, RunStarted
from streamprior.seams import Stage, Watch
from streamprior.stages.classify_cuda import make_classifier
from streamprior.stages.drift import DriftWatch, mask_numbers, measured_here, signals
from streamprior.stages.match import Matcher
from streamprior.stages.prepare import Preparer, load_corrections
from streamprior.stages.refine import Refiner, refine
from streamprior.stages.schedule import Plan, Schedule, parse_schedule


@dataclass(frozen=True)
class Recipe:
    """`bragg`: prepare, classify, match, refine in the crew; drift in order behind it. `ptycho`: prepare, classify; drift; then the mosaic,
    in a room of its own, because each of its frames builds on all that came before.

    backend : where frames are classified and refined, "cpu", "cuda" or "auto".

    Built from settings and a prior alone; holds no socket, sink or ledger, so that it can be made anew in any worker.
    """

    prior: Prior
    prepare: PrepareSettings
    refine: RefineSettings
    drift: DriftSettings
    name: str = "bragg"
    backend: str = "cpu"

    @property
    def on_card(self) -> bool:
        """Whether a card computes here. Raises ConfigError where the backend cannot."""
        return check_backend(self.backend, ("cpu", "cuda")) == "cuda"

    @property
    def refines(self) -> bool:
        """Whether frames get objects of their own: one frame of a ptychography scan does not determine any."""
        return self.name == "bragg" and self.refine.enabled

    @property
    def stage_names(self) -> tuple[str, ...]:
        own = ("match", "refine") if self.refines else ()
        return ("prepare", "classify", *own, *(("mosaic",) if self.name == "ptycho" else ()))

    @property
    def signals(self) -> tuple[str, ...]:
        """The scalars that the drift watch follows."""
        return signals(self.prior.class_names)

    @property
    def drift_columns(self) -> tuple[str, ...]:
        """Columns that the drift watch adds to the archive."""
        return measured_here(self.prior.class_names)

    def stages(self) -> Sequence[Stage]:
        """A fresh set for one worker. Raises ConfigError for a schedule that is none, and on a card what `make_classifier` does."""
        if self.on_card:
            free_card_memory()  # of a set that this one stands in for, because it ran out of memory
        always: tuple[Stage, ...] = (
            Preparer(self.prior, load_corrections(self.prepare, self.prior.geometry.detector_shape)),
            make_classifier(self.prior, self.backend),
        )
        if not self.refines:
            return always
        refiner = Refiner(self.prior, plan_of(self.refine), self.refine.weight, self.refine.free_fraction, self.backend)
        return (*always, Matcher(self.prior, self.refine.candidates), refiner)

    def watches(self) -> Sequence[Watch]:
        prior = self.prior
        if not judges_chi2(self.refine):
            prior = replace(prior, baselines={name: pair for name, pair in prior.baselines.items() if name != "chi2_over_floor"})
        return (DriftWatch(prior, self.drift.limit, self.drift.patience),)

    def warm_up(self) -> None:
        """Compile the kernels and plan the FFTs on a blank frame of each dtype: the first frame of a run is as quick as the last.

        Raises ConfigError where a card gives other results than the CPU, has no room, or fails.
        """
        if not self.on_card:
            self._run_blank()
            return
        try:
            self._run_blank()
            self._compare_with_cpu()
        except (MemoryError, DeviceLost) as error:
            raise ConfigError(
                f"compute.backend: the CUDA card cannot compute ({error}); see with nvidia-smi who else uses it and whether it is healthy,"
                " set compute.workers or compute.batch_frames lower, or compute.backend to cpu"
            ) from error

    def _run_blank(self) -> None:
        """Every stage once on each dtype."""
        stages = self.stages()
        shape = self.prior.geometry.detector_shape
        run = RunStarted("warm-up", "", "", 0.0, None, Detector(shape=shape))
        for dtype in (np.uint8, np.uint16, np.uint32):
            blank = np.ones(shape, dtype)
            batch = Batch(run, (Frame("", "", 0, blank, 0.0), Frame("", "", 1, blank, 0.0)))
            for stage in stages:
                batch = stage(batch)
            assert batch.photons is not None
            assert batch.classes is not None
            reference = self.prior.reference
            mask_numbers(list(batch.classes.ids), list(batch.photons.counts), reference, reference, len(self.prior.class_names))

    def _compare_with_cpu(self) -> None:
        """A driver, a compiler or a card that computes wrongly would show in no error, only in the results of a beamtime."""
        shape, rng = self.prior.geometry.shape, np.random.default_rng(0)
        counts = rng.poisson(10.0, (2, *shape)).astype(np.float32)
        valid = np.ones(shape, np.bool_)
        maps = [make_classifier(self.prior, backend).classes(counts, valid).ids for backend in ("cuda", "cpu")]
        other = float(np.mean(maps[0] != maps[1]))
        # Error reduction from rough phases: shrink-wrap on noise, and a flat start's zeros, turn on a rounding.
        inside = np.zeros(shape, np.bool_)
        inside[shape[0] // 4 : -(shape[0] // 4), shape[1] // 4 : -(shape[1] // 4)] = True
        start = (inside * np.exp(2j * np.pi * rng.random(counts.shape))).astype(np.complex64)
        psi = [refine(counts, start, inside, iterations=10, backend=backend).psi for backend in ("cuda", "cpu")]
        apart = float(np.abs(psi[0] - psi[1]).max() / np.abs(psi[1]).max())
        if not (other < _OTHER_CLASS and apart < _OTHER_OBJECT):
            raise ConfigError(
                f"compute.backend: the CUDA card gives {other:.2%} of the pixels another class than the CPU, and an object that differs by"
                f" {apart:.2%}; set compute.backend to cpu, and report the card, its driver and the version of cupy"
            )


_OTHER_CLASS, _OTHER_OBJECT = 1e-3, 1e-3
"""Differences that rounding may make on frames of noise, where many pixels lie between two classes."""


def judges_chi2(settings: RefineSettings) -> bool:
    """Whether the prior's baseline of chi2 is for what a frame goes through: training makes it with the default settings."""
    usual = RefineSettings()
    alike = settings.candidates == usual.candidates and settings.weight == usual.weight and settings.free_fraction == usual.free_fraction
    return alike and plan_of(settings) == plan_of(usual)


def plan_of(settings: RefineSettings) -> Plan:
    """What a frame goes through, out of the settings. Raises ConfigError for a schedule that is none."""
    plain = settings.iterations
    return Plan(
        schedule=_schedule("schedule", settings.schedule if plain is None else plain),
        trial=settings.trial,
        alone=_schedule("alone", settings.alone if plain is None else plain),
    )


def _schedule(key: str, text: str | int) -> Schedule:
    try:
        return parse_schedule(text)
    except ValueError as error:
        raise ConfigError(f"refine.{key}: {error}") from None
