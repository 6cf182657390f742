"""The composition root: settings -> objects, wired once; signals; exit codes."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import platform
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import structlog

from streamprior import __version__
from streamprior.alarms import AlarmBook, Change, archived
from streamprior.arrays import check_backend
from streamprior.config import Config, LogSettings, http_token, state_folder, tiled_api_key
from streamprior.crew import ThreadCrew
from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.join import Joiner
from streamprior.ladder import Ladder, Rung
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.mosaic.backend import overlap_maker
from streamprior.mosaic.room import MosaicRoom
from streamprior.mosaic.scan import check_trust, first_probe
from streamprior.outbox import Outbox
from streamprior.pipeline import Pipeline, Wire
from streamprior.prior import Prior, load_prior
from streamprior.quarantine import Quarantine
from streamprior.records import MosaicImage
from streamprior.recovery import go_on, rereads, spool_of
from streamprior.runs import Runs
from streamprior.seams import Sink, Source, Watch
from streamprior.server import HttpServer, make_app
from streamprior.service import STALL_S, Service
from streamprior.sinks.archive import Archive
from streamprior.sinks.bluesky_run import mirror_as_documents
from streamprior.sinks.catalog import mirror_archive
from streamprior.sinks.live import LatestArrays
from streamprior.sinks.mirror import Mirror
from streamprior.sinks.page import LivePage
from streamprior.sinks.prometheus import Prometheus
from streamprior.sinks.space import SpaceWatch
from streamprior.sources.curve import key_files
from streamprior.sources.files import AsRead, file_source, open_recording
from streamprior.sources.zmq import ZmqPull, ZmqSubscribe
from streamprior.spool import Spool
from streamprior.stages.drift import baseline_means
from streamprior.stages.prepare import check_shape
from streamprior.stages.recipe import Recipe
from streamprior.troubles import Look, TroubleWatch
from streamprior.webhook import Webhook, address_of, message, webhook_token
from streamprior.wire.dectris_v1 import StreamV1Decoder
from streamprior.wire.dectris_v2 import StreamV2Decoder
from streamprior.wire.ntnd import NtndDecoder

log = structlog.get_logger(__name__)

EXIT_OK, EXIT_OURS, EXIT_CONFIG, EXIT_NOT_DRAINED = 0, 1, 2, 3

_MIB = 2**20


@dataclass(frozen=True)
class Daemon:
    """Everything that runs, in the order it is started; stopped in the opposite one."""

    config: Config
    recipe: Recipe
    ledger: Ledger
    sources: Sequence[Source]
    pipeline: Pipeline
    archive: Archive
    space: SpaceWatch
    mirrors: Mapping[str, Mirror]
    server: HttpServer
    go_on: Callable[[], None]
    spool: Spool | None
    troubles: TroubleWatch
    webhook: Webhook | None = None
    mosaic: MosaicRoom | None = None

    @property
    def source(self) -> Source:
        """What frames come from."""
        return self.sources[0]


def build(
    config: Config, watches: Sequence[Watch] = (), feed: Source | None = None, heard: Callable[[Rung], None] = lambda rung: None
) -> Daemon:
    """Make every object and connect them. Nothing is opened yet but the prior.

    `watches` are put behind the recipe's own (the demo's stopwatch). `feed` hands over documents from this process in place of the socket
    of a source of documents. `heard` is called with each rung of the overload ladder that is reached. Raises ConfigError.
    """
    prior = load_prior(config.prior)
    recipe = Recipe(prior, config.prepare, config.refine, config.drift, config.recipe, config.compute.backend)
    frames, readings = _frames(config, feed), _readings(config)
    joiner = Joiner(config.positions, separate=readings is not None)
    space = SpaceWatch(
        config.archive.folder,
        config.archive.short_mb * _MIB,
        config.archive.full_mb * _MIB,
        lambda short: ladder.hold("a nearly full disk", short),
    )
    provenance = _provenance(config, prior)
    webhook = _webhook(config, lambda: server.url)
    book = AlarmBook(
        baseline_means(prior), config.drift.limit, config.drift.patience, webhook.tell if webhook is not None else lambda change: None
    )
    mirrors, archive, live = _sinks(config, prior, recipe, space, provenance, book)
    ledger = Ledger((sink.name for sink in (archive, *live) if sink.complete), state_folder() / "ledger", rereads(config))
    spool = spool_of(config, frames.source, ledger)
    page = LivePage(prior)
    names = [archive.name, *(sink.name for sink in live), "page", "prometheus", *(["mosaic"] if config.recipe == "ptycho" else [])]
    meters = Meters(config.source.name, recipe.stage_names, names, prior.class_names, recipe.signals)
    meters.build_info(
        version=__version__, prior=prior.content_hash, configuration=config.content_hash, device=device(config.compute.backend)
    )
    meters.drift_limit.set(config.drift.limit)
    outboxes = _outboxes(config, ledger, meters, archive, [*live, page, Prometheus(meters)])
    room: MosaicRoom | None = None
    if config.recipe == "ptycho":
        room = _mosaic(config, prior, outboxes, lambda: pipeline.stopping, meters)
        outboxes = [Outbox(room, config.queues.outbox_mb * _MIB, ledger, meters, feeds=outboxes, every=True), *outboxes]

    def changed(rung: Rung) -> None:
        meters.degraded(rung)
        heard(rung)

    def left_out(uid: str, index: int, stage: str, reason: str) -> None:
        ledger.dropped(uid, index, stage, reason)
        meters.dropped(stage, reason)

    # Frames that lie in a file wait there for nothing.
    furthest = "nothing" if config.source.kind in ("file", "tiled", "documents") else config.overload.furthest
    ladder = Ladder(furthest, config.overload.late_s, config.overload.calm_s, recipe.refines, changed)
    crew = ThreadCrew(
        recipe.stages,
        prior,
        config.compute.workers or len(os.sched_getaffinity(0)),
        config.compute.batch_frames,
        config.compute.batch_s,
        config.queues.compute_mb * _MIB,
        meters.stage,
        ladder,
        spare=replace(recipe, backend="cpu").stages if recipe.on_card else None,
        left_out=left_out,
    )
    watches = [*recipe.watches(), book, *watches]
    pipeline = Pipeline(
        frames,
        joiner,
        Runs(ledger.distinct, config.runs.late_s, config.runs.idle_s),
        crew,
        watches,
        outboxes,
        ledger,
        meters,
        config.queues.receive_mb * _MIB,
        config.queues.receive_policy,
        admit=lambda counts: check_shape(counts, prior.geometry),
        keep=Quarantine(state_folder() / "quarantine").keep,
        readings=readings,
        ladder=ladder,
        spool=spool,
    )
    queues = {
        "receive": lambda: pipeline.received.nbytes,
        "compute": lambda: crew.queued_bytes,
        "sequence": lambda: crew.waiting_bytes,
        "positions": lambda: joiner.nbytes,
    }
    queues |= {outbox.sink.name: _bytes_of(outbox) for outbox in outboxes}
    sources = [wire.source for wire in (frames, readings) if wire is not None]
    doors = [source for source in sources if isinstance(source, ZmqPull | ZmqSubscribe)]
    meters.watch(ledger.in_flight, ledger.missing, queues, lambda: sum(door.refused for door in doors))
    meters.watch_path(lambda: bool(pipeline.stalled(STALL_S)))
    meters.watch_crew(lambda: crew.out_of_memory, lambda: crew.card_lost, lambda: crew.away_from_card)
    meters.watch_ledger(ledger.unaccounted, ledger.on_disk)
    meters.watch_space(lambda: space.free_bytes, lambda: space.level)
    if spool is not None:
        meters.watch_spool(lambda: spool.nbytes, lambda: not spool.failing)

    meters.watch_webhook(lambda: webhook is None or webhook.up, lambda: webhook.undelivered if webhook is not None else 0)
    ups = {outbox.sink.name: _up_of(outbox) for outbox in outboxes} | {name: _up_of(mirror) for name, mirror in mirrors.items()}
    looks = _looks(config, ledger, space, meters, ups) | {
        "card": Look(lambda: "the card has failed; frames are computed on the CPU until the daemon is restarted" if crew.card_lost else "")
    }

    def ready() -> dict[str, bool]:
        state = {f"sink_{outbox.sink.name}": outbox.up for outbox in outboxes}
        state |= {"path": bool(pipeline.started and pipeline.failure is None)}
        return state | {name: mirror.up for name, mirror in mirrors.items()}

    server = HttpServer(make_app(meters, ledger, page, ready, http_token(config.http), book), config.http)
    return Daemon(
        config,
        recipe,
        ledger,
        sources,
        pipeline,
        archive,
        space,
        mirrors,
        server,
        lambda: go_on(config, provenance, ledger, spool, pipeline, watches),
        spool,
        TroubleWatch(book, looks),
        webhook,
        room,
    )


def run(daemon: Daemon, until: Callable[[], bool] = lambda: False) -> int:
    """Start, serve until a signal, the end of a file source or `until()`; drain; leave. Returns the exit code.

    0: drained and balanced. 1: our own failure, or a ledger that does not balance. 3: the time to drain was over, or a second signal
    came; what was left behind is in the ledger as dropped. ConfigError (exit 2) is raised before anything is accepted.
    """
    try:
        # A folder that cannot be written now is the operator's to mend; one that goes away later is waited for.
        daemon.archive.open()
    except SinkUnavailable as error:
        raise ConfigError(f"archive.folder: {error}") from None
    daemon.go_on()
    daemon.space.look()
    log.info("warming up", kernels=str(state_folder()))
    _keep_freed_memory()
    daemon.recipe.warm_up()
    if daemon.mosaic is not None:
        daemon.mosaic.warm_up()
    # What is there now stays: a full collection in mid-run would otherwise look at all of it, which takes longer than a frame may.
    gc.collect()
    gc.freeze()
    daemon.server.start()
    daemon.space.start()
    daemon.troubles.start()
    if daemon.webhook is not None:
        daemon.webhook.start()
    try:
        for source in daemon.sources:
            source.open()
        drained = _serve(daemon, until)
        for mirror in daemon.mirrors.values():
            mirror.close(daemon.config.runs.drain_s if drained else 0.0)
        if daemon.spool is not None:
            daemon.spool.close(empty=drained and daemon.pipeline.failure is None)
    finally:
        daemon.troubles.stop()
        daemon.space.stop()
        if daemon.webhook is not None:
            daemon.webhook.stop()
        daemon.server.stop()
    if daemon.pipeline.failure is not None or not daemon.ledger.is_balanced():
        return EXIT_OURS
    return EXIT_OK if drained else EXIT_NOT_DRAINED


def _keep_freed_memory() -> None:
    """Let the C library use freed memory again instead of giving it back to the kernel and asking for it anew.

    Frames are made in one thread and freed in another, a thousand times a second: by default each thread has a heap of its own, whose end
    goes back at every chance, and zeroing fresh pages took a sixth of all CPU time (`perf`, 128 x 128), most of it under the interpreter's
    lock. What is kept is bounded by the queues. Other C libraries than glibc have no such call, or do without.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(_MALLOC_TRIM_THRESHOLD, 512 * _MIB)
        adjust(_MALLOC_MMAP_THRESHOLD, 32 * _MIB)
        adjust(_MALLOC_ARENA_MAX, 1)


_MALLOC_TRIM_THRESHOLD, _MALLOC_MMAP_THRESHOLD, _MALLOC_ARENA_MAX = -1, -3, -8
"""Of malloc.h."""


def _serve(daemon: Daemon, until: Callable[[], bool]) -> bool:
    """From the first message to the last; False when the path was left before it was empty."""
    with _Signals() as signals:
        for mirror in daemon.mirrors.values():
            mirror.start()
        daemon.pipeline.start()
        source = getattr(daemon.source, "address", daemon.source.name)
        log.info("ready", page=daemon.server.url, source=source)
        service = Service(daemon.pipeline.stalled)
        service.ready(f"frames from {source}, page at {daemon.server.url}")
        # A room that failed ends this too: another one may be stuck in a call to the world, and the path then never ends by itself.
        while not (signals.count or until() or daemon.pipeline.failure is not None or daemon.pipeline.ended.wait(0.1)):
            service.tick()
        service.stopping()
        return _drain(daemon, signals)


def _drain(daemon: Daemon, signals: _Signals) -> bool:
    """Let the rooms empty in order; False when that was cut short."""
    if not daemon.pipeline.ended.is_set():
        log.info("draining", most_s=daemon.config.runs.drain_s, in_flight=daemon.ledger.in_flight())
    daemon.pipeline.stop()
    waited = 0.0
    while not daemon.pipeline.ended.wait(0.1):
        waited += 0.1
        if waited >= daemon.config.runs.drain_s or signals.count > 1:
            daemon.pipeline.abandon()
            daemon.pipeline.join(2.0)
            left = daemon.ledger.write_off()
            log.error("left before the path was empty", frames_left_behind=left)
            return False
    if daemon.pipeline.failure is not None:
        daemon.ledger.write_off()
    return True


class _Signals:
    """Counts SIGTERM and SIGINT; a handler only sets a number. Elsewhere than in the main thread it counts nothing."""

    def __init__(self) -> None:
        self.count = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _frames(config: Config, feed: Source | None) -> Wire:
    """What frames come over. The sources that need an extra, or a client of their own, are imported where they are asked for."""
    settings = config.source
    most = settings.max_message_mb * _MIB
    if settings.kind == "dectris_v2":
        return Wire(ZmqPull(settings), StreamV2Decoder(settings.name, settings.channel, most))
    if settings.kind == "dectris_v1":
        return Wire(ZmqPull(settings), StreamV1Decoder(settings.name, most))
    if settings.kind == "documents":
        return _documents(config, feed)
    if settings.kind == "pva":
        from streamprior.sources.pva import PvaMonitor

        return Wire(PvaMonitor(settings), NtndDecoder(settings.name, settings.pv or "", config.runs.idle_s, config.positions, most))
    if settings.kind == "tiled":
        from streamprior.sources.tiled import tiled_source

        return Wire(tiled_source(settings, config.tiled, config.positions), AsRead())
    if settings.path is not None and not settings.follow_s:
        open_recording(settings.path, settings.frames, settings.skip)  # a file that is not there shows before anything starts
    return Wire(file_source(settings), AsRead())


def _documents(config: Config, feed: Source | None) -> Wire:
    """Frames in or behind documents: from this process, from a file or from a socket."""
    from streamprior.sources.document_feeds import DocumentFile
    from streamprior.sources.documents import DocumentsDecoder

    settings = config.source
    most = settings.max_message_mb * _MIB
    decoder = DocumentsDecoder(settings.name, config.documents, config.positions, True, most)
    if feed is None and settings.path is not None:
        feed = DocumentFile(settings)
    keys = key_files(settings, "source")
    socket = ZmqSubscribe(settings.name, settings.address, settings.attach, settings.high_water_mark, most, files=keys)
    return Wire(feed or socket, decoder)


def _readings(config: Config) -> Wire | None:
    """What positions come over, where that is another wire."""
    positions, settings = config.positions, config.source
    if positions.address is None:
        return None
    from streamprior.sources.documents import DocumentsDecoder

    most, name = settings.max_message_mb * _MIB, f"{settings.name}-positions"
    keys = key_files(positions, "positions")
    source = ZmqSubscribe(name, positions.address, positions.attach, settings.high_water_mark, most, "positions.address", keys)
    return Wire(source, DocumentsDecoder(source.name, config.documents, positions, False, most))


def _provenance(config: Config, prior: Prior) -> dict[str, str]:
    return {
        "prior_hash": prior.content_hash,
        "configuration_hash": config.content_hash,
        "version": __version__,
        "recipe": config.recipe,
        "device": device(config.compute.backend),
    }


def _outboxes(config: Config, ledger: Ledger, meters: Meters, archive: Archive, shown: Sequence[Sink]) -> list[Outbox]:
    """A room for each sink. One that shows things holds no more than a few results: it shows the newest."""
    drop = config.archive.when_full == "drop" or (config.archive.when_full == "auto" and config.source.kind not in ("file", "tiled"))
    complete = Outbox(archive, config.queues.outbox_mb * _MIB, ledger, meters, drop_when_full=drop)
    return [complete, *(Outbox(sink, _MIB, ledger, meters) for sink in shown)]


def _sinks(
    config: Config, prior: Prior, recipe: Recipe, space: SpaceWatch, provenance: Mapping[str, str], book: AlarmBook
) -> tuple[dict[str, Mirror], Archive, list[Sink]]:
    """The archive, what mirrors it in Tiled where the configuration names one, and what shows the newest there."""
    mirrors: dict[str, Mirror] = {}
    live: list[Sink] = []
    if config.tiled.uri is not None:
        key = tiled_api_key(config.tiled)
        mirrors["tiled"] = mirror_archive(config.tiled.uri, key, config.archive.folder, config.tiled.parent)
        if config.tiled.documents:
            mirrors["tiled_documents"] = mirror_as_documents(config.tiled.uri, key, config.archive.folder, config.tiled.parent)
        live.append(LatestArrays(config.tiled.uri, key, config.tiled.parent, config.tiled.live_hz))

    def growth(folder: Path) -> None:
        for mirror in mirrors.values():
            mirror.announce(folder)

    archive = Archive(
        config.archive.folder,
        prior,
        provenance,
        growth,
        recipe.drift_columns,
        config.archive.chunk_frames,
        config.recipe != "ptycho",
        space,
        lambda uid: archived(book, uid),
    )
    return mirrors, archive, live


def _mosaic(config: Config, prior: Prior, outboxes: Sequence[Outbox], hurry: Callable[[], bool], meters: Meters) -> MosaicRoom:
    """The room that puts frames together. Raises ConfigError where the probe cannot be had or the backend does not compute."""
    settings, shape = config.mosaic, prior.geometry.shape
    own = config.source.path if config.source.kind == "file" else None
    check_trust(settings, prior)

    def publish(image: MosaicImage) -> None:
        for outbox in outboxes:
            outbox.put(image)

    return MosaicRoom(
        prior, settings, first_probe(settings, own, shape), overlap_maker(shape, config.compute.backend), publish, hurry, meters.stage
    )


def _webhook(config: Config, page: Callable[[], str]) -> Webhook | None:
    """Who hears of alarms; None where nobody is named. page : address of our own. Raises ConfigError."""
    settings = config.alarms
    token = webhook_token(settings)
    if settings.webhook is None:
        return None

    def compose(change: Change) -> dict[str, Any]:
        return message(change, config.source.name, (settings.page or page()).rstrip("/"))

    return Webhook(address_of(settings.webhook), token, compose)


def _looks(config: Config, ledger: Ledger, space: SpaceWatch, meters: Meters, ups: Mapping[str, Callable[[], bool]]) -> dict[str, Look]:
    """What is an alarm besides drift. ups : sink or mirror -> whether it takes what it is given."""

    def residue() -> str:
        frames = ledger.unaccounted()
        return f"{frames} frames whose fate nobody knows: a fault of streamprior's, please report it with its log" if frames else ""

    def overload() -> str:
        level = meters.degradation_level
        return f"overload: not every frame is classified (level {level}); slow the detector or add cores" if level > 1 else ""

    full = f"the disk of {config.archive.folder} is full: nothing is archived; free space on it"
    short = f"the disk of {config.archive.folder} is nearly full: nothing is refined; free space on it"
    return {
        "ledger": Look(residue),
        "disk_short": Look(lambda: short if space.level else ""),
        "disk_full": Look(lambda: full if space.level > 1 else ""),
        "overload": Look(overload),
        **{f"sink_{name}": Look(_down(name, up), config.alarms.sink_down_s) for name, up in ups.items()},
    }


def _down(name: str, up: Callable[[], bool]) -> Callable[[], str]:
    return lambda: "" if up() else f"{name} takes no results; the log says why"


def _up_of(room: Outbox | Mirror) -> Callable[[], bool]:
    return lambda: room.up


def _bytes_of(outbox: Outbox) -> Callable[[], int]:
    return lambda: outbox.mailbox.nbytes


def device(backend: str) -> str:
    """What computed: part of every result's provenance."""
    return f"{check_backend(backend, ('cpu', 'cuda'))} {platform.machine()} {platform.processor() or ''}".strip()


def configure_logging(settings: LogSettings) -> None:
    """structlog to standard error: for people, or a JSON line each for a collector."""
    renderer: Any = structlog.processors.JSONRenderer() if settings.format == "json" else structlog.dev.ConsoleRenderer(colors=False)
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(settings.level.upper())),
        logger_factory=structlog.PrintLoggerFactory(file=open(2, "w", buffering=1, closefd=False)),  # noqa: SIM115 - as long as the process
    )
