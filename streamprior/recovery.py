"""What a killed process left (spool, ledger, archive) -> a path whose runs go on where their archived frames end."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import structlog
import zarr

from streamprior.alarms import AlarmBook
from streamprior.config import Config, state_folder
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger, account_line
from streamprior.pipeline import Pipeline
from streamprior.records import RunStarted
from streamprior.seams import Source, Watch
from streamprior.sinks.archive import archived_frames, archived_run, read_about
from streamprior.sinks.rows import read_newest
from streamprior.sources.zmq import ZmqPull, ZmqSubscribe
from streamprior.spool import Spool
from streamprior.stages.drift import DriftWatch

log = structlog.get_logger(__name__)

_MIB = 2**20


def rereads(config: Config) -> bool:
    """Whether what was on its way is received again after a restart. Documents are kept in any case: a run cannot do without them."""
    return config.recovery.mode == "complete" or config.source.kind == "documents"


def spool_folder(config: Config) -> Path:
    """Where a daemon's spool lies. One archive has one daemon: its folder tells whose spool it is, also where several share this place."""
    whose = hashlib.sha256(str(config.archive.folder.absolute()).encode()).hexdigest()[:8]
    return (config.recovery.folder or state_folder() / "spool") / f"{config.source.name}-{whose}"


def spool_of(config: Config, source: Source, ledger: Ledger) -> Spool | None:
    """The spool of a daemon's sockets; None where frames lie in a file, or come another way.

    Raises ConfigError where `complete` is asked for and cannot be had.
    """
    if not isinstance(source, ZmqPull | ZmqSubscribe):
        if config.recovery.mode == "complete" and config.source.kind not in ("file", "tiled") and config.source.path is None:
            raise ConfigError(
                f"recovery.mode: complete keeps messages of a ZMQ socket, and there is none where source.kind is {config.source.kind}"
                " or documents come from this process; set it to live"
            )
        return None
    folder = spool_folder(config)
    hold_s = config.positions.wait_s if config.positions.x is not None else 0.0
    images = config.recovery.mode == "complete"
    return Spool(folder, images, config.recovery.most_mb * _MIB, hold_s, ledger.settled, ledger.is_over)


def go_on(
    config: Config, provenance: Mapping[str, str], ledger: Ledger, spool: Spool | None, pipeline: Pipeline, watches: Sequence[Watch]
) -> None:
    """Before the path starts: what an earlier process had not finished comes first. The archive is open.

    A run goes on if it was made with the same prior and settings; what is read again of another one begins a run of its own.
    """
    folder = config.archive.folder
    closed = ledger.recall(lambda uid: _archived(folder, uid))
    # Not only those that it has closed now: the process before this one may have been killed while it started.
    interrupted = {account["run"]: account for account in ledger.earlier() if account["reason"] == "interrupted"}
    found = spool.open() if spool is not None else []
    # The image of the sample cannot be made from the frames that are still to come: the one that there is stays.
    same = [run for run in found if run.uid in interrupted and config.recipe != "ptycho" and _is_same(folder, run, provenance)]
    going = {run.uid for run in same}
    for account in closed:
        if account["run"] not in going:
            log.warning("run was interrupted: the process that had it open was killed", run=account["run"], ledger=account_line(account))
    for run in same:
        log.warning("run goes on: the process that had it open was killed", run=run.uid, ledger=account_line(interrupted[run.uid]))
        for watch in watches:
            if isinstance(watch, DriftWatch):
                _remind(watch, run.uid, archived_run(folder, run.uid))
            elif isinstance(watch, AlarmBook):
                _remind_of_alarms(watch, run.uid, archived_run(folder, run.uid))
    if spool is not None:
        pipeline.go_on(spool.recovered(), same)


def _archived(folder: Path, uid: str) -> list[int]:
    """Frames of a run that the archive has; none where what a kill left of it cannot be read."""
    try:
        return [int(index) for index in archived_frames(folder, uid)]
    except (OSError, ValueError, KeyError) as error:
        log.warning("the archive of an interrupted run cannot be read: what was on its way counts as lost", run=uid, error=str(error))
        return []


def _is_same(folder: Path, run: RunStarted, provenance: Mapping[str, str]) -> bool:
    """Whether what is still to come of a run would be made as what is in the archive, where there is any."""
    archived = archived_run(folder, run.uid)
    return archived is None or provenance.items() <= read_about(archived)["provenance"].items()


def _remind(watch: DriftWatch, uid: str, archived: Path | None) -> None:
    """Tell the drift watch of the frames that it saw last."""
    rows = read_newest(archived / "frames", watch.patience) if archived is not None else []
    if archived is not None and rows:
        watch.resume(uid, np.asarray(zarr.open_array(archived / "classes", mode="r")[rows[-1]["index"]]), rows)


def _remind_of_alarms(book: AlarmBook, uid: str, archived: Path | None) -> None:
    """Tell the book of the alarms that the run had, and of those that were on in its last frame."""
    rows = read_newest(archived / "frames", 1) if archived is not None else []
    if archived is not None and rows:
        on = [signal for signal in rows[-1]["alarms"].split(",") if signal]
        book.resume(uid, read_about(archived).get("alarms", []), on)
