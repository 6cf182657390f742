"""A prior and a recording it never saw -> a Comparison: frames prepared and chosen, leaks looked for, all arms run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.errors import ConfigError
from streamprior.evaluate.arms import compare_arms
from streamprior.evaluate.records import LEAK, Comparison, Tick
from streamprior.prior import Prior, frame_hashes
from streamprior.records import Photons
from streamprior.sources.files import Recording, open_recording
from streamprior.stages.prepare import Corrections, merged, prepare, stacked

MOST = 200
"""Frames of a study: medians and quartiles of 200 frames stand, and the full solve of each takes a while."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """Prepared frames of a recording: photons of the chosen ones, their indices in the file, and the hashes of the raw frames; how many
    others were too faint."""

    photons: Photons
    frames: tuple[int, ...]
    faint: int
    hashes: npt.NDArray[np.uint8]


def choose(
    prior: Prior, recording: Recording, most: int = MOST, progress: Tick | None = None, corrections: Corrections | None = None
) -> Chosen:
    """Prepare the frames that are bright enough to be judged, at most so many and evenly spaced.

    corrections : mask, dark and flat beside the file's own mask; the same as in training.

    Raises
    ------
    ConfigError
        The recording has another frame size than the prior, no frame is bright enough, or the prior was grown with a dark and none is
        given.
    """
    tick = progress or (lambda what, done, total: None)
    rows, columns = prior.geometry.detector_shape
    if recording.shape[1:] != (rows, columns):
        found = " x ".join(map(str, recording.shape[1:]))
        raise ConfigError(
            f"{recording.path}: its frames are {found}, the prior was grown on {rows} x {columns}; "
            "name a recording of that detector, or grow a prior on this one with `streamprior train`"
        )
    known = merged(corrections or Corrections(), recording.geometry, prior.geometry.detector_shape)
    if prior.provenance.get("dark") and known.dark is None:
        raise ConfigError(f"the prior was grown with --dark {prior.provenance['dark']}; give the same, or its numbers mean nothing here")
    least = prior.baselines.get("flux_least", (0.0, 0.0))[0]
    bright: list[int] = []
    for i in range(len(recording)):
        one = prepare(recording[i], prior, known.mask, known.flat, known.dark)
        flux = one.counts[0].sum(where=one.valid.reshape(one.counts.shape[1:]), dtype=np.float64) / max(int(one.valid.sum()), 1)
        if flux > 0 and flux >= least:
            bright.append(i)
        tick("frames", i + 1, len(recording))
    if not bright:
        raise ConfigError(f"{recording.path}: none of its {len(recording)} frames is as bright as the faintest of the prior's training")
    taken = [bright[int(at)] for at in np.unique(np.linspace(0, len(bright) - 1, min(len(bright), most)).round())]
    return Chosen(
        photons=stacked([prepare(recording[i], prior, known.mask, known.flat, known.dark) for i in taken]),
        frames=tuple(int(recording.origin(i)) for i in taken),
        faint=len(recording) - len(bright),
        hashes=np.concatenate([frame_hashes(np.asarray(recording[i])[None]) for i in taken]),
    )


def study(prior: Prior, chosen: Chosen, title: str, progress: Tick | None = None) -> Comparison:
    """Run every arm on the chosen frames, and add what a reader must know: the leak check, and the frames that were left out.

    Raises
    ------
    ConfigError
        The prior holds no library of prototypes.
    """
    if prior.library is None:
        raise ConfigError(
            "this prior holds no library of prototypes, so there is no start to compare; grow it again with `streamprior train`"
        )
    compared = compare_arms(chosen.photons, prior, title=title, frames=chosen.frames, progress=progress)
    left = (f"{chosen.faint} frames are fainter than any training frame and were left out.",) if chosen.faint else ()
    return replace(compared, notes=(leak_note(prior, chosen), *left, *compared.notes))


def leaks(prior: Prior, frames: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """Positions of the frames that are among the prior's training frames, by content.

    Parameters
    ----------
    frames : (B, rows, columns), counts
        As the detector gave them: no correction can hide a frame.

    Raises
    ------
    ValueError
        The prior does not say what it was grown on (training/frame_hashes is missing).
    """
    return _seen_before(prior, frame_hashes(frames))


def _seen_before(prior: Prior, hashes: npt.NDArray[np.uint8]) -> npt.NDArray[np.intp]:
    known = prior.training.get("frame_hashes")
    if known is None:
        raise ValueError("this prior holds no hashes of its training frames; grow it again with this version to have leaks checked")
    training = {bytes(row) for row in known}
    return np.array([i for i, row in enumerate(hashes) if bytes(row) in training], np.intp)


def leak_note(prior: Prior, chosen: Chosen) -> str:
    """One sentence: whether any of the frames is among those that the prior was grown on."""
    try:
        found = _seen_before(prior, chosen.hashes)
    except ValueError as error:
        return f"Leak check: {error}."
    total = len(chosen.frames)
    if not found.size:
        return f"Leak check: none of the {total} frames is among the prior's training frames (compared by content)."
    named = ", ".join(str(chosen.frames[i]) for i in found[:10]) + (", ..." if found.size > 10 else "")
    return f"{LEAK}: {found.size} of the {total} frames are among the prior's training frames ({named}); these numbers prove nothing."


def title_of(prior: Prior, recording: Recording, frames: str) -> str:
    """What was learned on -> what it is judged on: the slices alone where both are of one file."""
    grown_on, slice_grown = _training_file(prior), str(prior.provenance.get("frames", "?"))
    if grown_on == recording.path.name:
        return f"{slice_grown} -> {frames}"
    return f"{grown_on or 'unknown'} [{slice_grown}] -> {recording.path.name} [{frames}]"


def _training_file(prior: Prior) -> str:
    """Name of the one file that the prior was grown on, empty where it was none or several."""
    files = prior.provenance.get("files") or [prior.provenance.get("file", "")]
    return str(files[0]) if len(files) == 1 else ""


def swapped(
    prior: Prior, file: str, frames: str, progress: Tick | None = None, corrections: Corrections | None = None
) -> tuple[Prior, Recording, str]:
    """The other direction: a prior grown on the judged frames with the same settings, and the first prior's training frames to judge it on.

    Raises
    ------
    ConfigError
        The prior was grown on another file, does not say on which frames, or none can be grown on the judged ones.
    """
    # SOM and k-means take their time to import: only this direction needs them.
    from streamprior.train.grow import grow_prior
    from streamprior.train.settings import TrainSettings

    recording = open_recording(file, frames)
    if _training_file(prior) != recording.path.name or not isinstance(prior.provenance.get("frames"), str):
        raise ConfigError(
            f"--swap: the prior was grown on {_training_file(prior) or 'frames it does not name'}, not on frames of {recording.path.name}; "
            "leave --swap out, and evaluate the other direction with a prior of its own"
        )
    training = open_recording(file, prior.provenance["frames"])
    if not len(_seen_before(prior, np.concatenate([frame_hashes(np.asarray(training[i])[None]) for i in range(len(training))]))):
        raise ConfigError(
            f"--swap: the prior was not grown on this {recording.path.name}, but on another file of that name; leave --swap out"
        )
    story = {"file": recording.path.name, "frames": frames, "swapped": prior.content_hash, "dark": prior.provenance.get("dark")}
    known = merged(corrections or Corrections(), recording.geometry, (recording.shape[1], recording.shape[2]))
    try:
        other = grow_prior(
            recording,
            settings=TrainSettings.model_validate(prior.provenance.get("settings", {})),
            progress=progress,
            provenance=story,
            corrections=known,
        )
    except ValueError as error:
        raise ConfigError(f"--swap: {recording.path} [{frames}]: {error}") from error
    return other, training, title_of(other, training, prior.provenance["frames"])
