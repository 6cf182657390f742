"""A configuration -> what would go wrong with it, each finding with a remedy, before a beamtime finds out."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from starlette.applications import Starlette

from streamprior.arrays import check_backend, cuda_missing
from streamprior.config import (
    AlarmSettings,
    Config,
    HttpSettings,
    PositionSettings,
    SourceSettings,
    http_token,
    is_loopback,
    state_folder,
    tiled_api_key,
)
from streamprior.errors import ConfigError, PriorError, SinkUnavailable
from streamprior.mosaic.scan import check_trust, first_probe
from streamprior.prior import load_prior
from streamprior.records import SeriesStart
from streamprior.recovery import spool_folder
from streamprior.seams import Source
from streamprior.server import HttpServer
from streamprior.sinks.archive import claim, frame_bytes
from streamprior.sources.curve import key_files, load_clients, load_own
from streamprior.sources.document_feeds import DocumentFile
from streamprior.sources.files import file_source, open_recording
from streamprior.sources.pva import PvaMonitor
from streamprior.sources.tiled import tiled_source
from streamprior.sources.zmq import ZmqPull, ZmqSubscribe
from streamprior.stages.prepare import load_corrections
from streamprior.stages.recipe import judges_chi2, plan_of
from streamprior.tiled_api import probe
from streamprior.webhook import address_of, webhook_token

_WARNING = "warning: "

_LEAST_FREE_BYTES = 10 * 2**30
"""10 GiB hold about 100,000 frames of 128 x 128 with objects of 64 x 64."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, whether it is fine, and a sentence: what was found, and what to do where it is not fine."""

    what: str
    fine: bool
    sentence: str
    warns: bool = False
    """It works, and is worth a second thought."""


def inspect(config: Config) -> Iterator[Finding]:
    """Look at every part of the configuration; yields one finding each, in the order of the path."""
    looks: dict[str, Callable[[], str]] = {
        "prior": lambda: _prior(config),
        "corrections": lambda: _corrections(config),
        **({"mosaic": lambda: _mosaic(config)} if config.recipe == "ptycho" else {"refine": lambda: _refine(config)}),
        "source": lambda: _source(config),
        **({"positions": lambda: _positions(config)} if config.positions.x is not None else {}),
        "encryption": lambda: _encryption(config),
        "http": lambda: _http(config.http),
        "alarms": lambda: _alarms(config.alarms),
        "archive": lambda: _archive(config),
        "tiled": lambda: _tiled(config),
        "state folder": _state,
        "recovery": lambda: _recovery(config),
        "FFT": _fft,
        "GPU": lambda: _gpu(config),
    }
    for what, look in looks.items():
        try:
            sentence = look()
            yield Finding(what, True, sentence.removeprefix(_WARNING), sentence.startswith(_WARNING))
        except ConfigError as error:
            yield Finding(what, False, str(error))


def _prior(config: Config) -> str:
    prior = load_prior(config.prior)
    shape = prior.geometry.detector_shape
    return f"{config.prior}: {len(prior.class_names)} classes, for frames of {shape[0]} x {shape[1]}, hash {prior.content_hash[:12]}"


def _corrections(config: Config) -> str:
    files = [file for file in (config.prepare.mask, config.prepare.flat, config.prepare.dark) if file is not None]
    if files:
        load_corrections(config.prepare, load_prior(config.prior).geometry.detector_shape)
    return ", ".join(map(str, files)) or "none but what the start message brings"


def _refine(config: Config) -> str:
    if not config.refine.enabled:
        return "off: masks and drift only"
    plan = plan_of(config.refine)
    try:
        library = load_prior(config.prior).library
    except PriorError:  # one fault, and the look at the prior has told of it
        return f"{plan.schedule}; what is tried before it, the prior would tell"
    arms = 1 + (0 if library is None else min(config.refine.candidates, len(library.psi)))
    tried = f"{arms - 1} of {len(library.psi)} prototypes and a flat start" if library is not None and arms > 1 else "a flat start alone"
    words = f"{tried}, at most {plan.iterations(arms)} iterations, {plan.ffts(arms)} FFTs a frame: {plan.schedule}"
    return words if judges_chi2(config.refine) else f"{words}; chi2 raises no alarm, its baseline is that of the default settings"


def _mosaic(config: Config) -> str:
    settings, prior = config.mosaic, load_prior(config.prior)
    own = config.source.path if config.source.kind == "file" else None
    probe = first_probe(settings, own, prior.geometry.shape)
    check_trust(settings, prior)
    rows, columns = prior.geometry.shape
    begins = f"from {settings.probe or own}" if probe is not None else f"modelled, {settings.spot_px:g} px wide"
    moves = "refined" if settings.refine else "held"
    pixel = f"{settings.pixel_nm:g} nm" if settings.pixel_nm is not None else "as the start message says, or positions in pixels"
    modes = settings.modes or (1 if probe is None else len(probe))
    ffts = 2 * modes * settings.iterations * (2 if settings.halves else 1)
    cost = f"{ffts} FFTs a frame" + (", as many again while the probe is refined" if settings.refine else "")
    return f"{modes} modes of {rows} x {columns}, {begins}, {moves}; {cost}; positions on {settings.axes}; object pixel {pixel}"


def _source(config: Config) -> str:
    settings = config.source
    if settings.kind in ("file", "tiled"):
        return _recorded(config)
    for folder in config.documents.folders if settings.kind == "documents" else ():
        if not folder.is_dir():
            raise ConfigError(f"documents.folders: {folder} is no folder; documents refer to files, which are read from there")
    source: Source = ZmqPull(settings)
    if settings.kind == "documents" and settings.path is not None:
        source = DocumentFile(settings)
    elif settings.kind == "documents":
        most = settings.max_message_mb * 2**20
        source = ZmqSubscribe(
            settings.name, settings.address, settings.attach, settings.high_water_mark, most, files=key_files(settings, "source")
        )
    elif settings.kind == "pva":
        source = PvaMonitor(settings)
    source.open()
    source.close()
    if settings.kind == "documents" and settings.path is not None:
        return f"{settings.path} can be read"
    if settings.kind == "pva":
        return f"{settings.pv} can be monitored; whether an IOC has it shows only in a run"
    if settings.attach == "bind":
        return f"{settings.address} can be bound"
    return f"{settings.address} is well formed; whether anybody sends there shows only in a run"


def _positions(config: Config) -> str:
    settings, source = config.positions, config.source
    motors = " and ".join(key for key in (settings.x, settings.y) if key is not None)
    if settings.address is None:
        if source.kind in ("dectris_v1", "dectris_v2"):
            raise ConfigError(f"positions.address: {source.kind} brings no documents, and so no {motors}; name where documents come from")
        return f"{motors}, out of the source itself"
    most = source.max_message_mb * 2**20
    keys = key_files(settings, "positions")
    socket = ZmqSubscribe("positions", settings.address, settings.attach, source.high_water_mark, most, "positions.address", keys)
    socket.open()
    socket.close()
    can = "can be bound" if settings.attach == "bind" else "is well formed; whether anybody sends there shows only in a run"
    return f"{motors}, in {config.documents.serializer}; {settings.address} {can}"


def _recorded(config: Config) -> str:
    settings = config.source
    if settings.kind == "file" and settings.follow_s:
        file_source(settings).open()
        return f"{settings.path}: followed until nothing new has come for {settings.follow_s:g} s"
    if settings.kind == "file":
        if settings.path is None:
            raise ConfigError("source.path: a file source needs the path of a recorded run")
        return f"{settings.path}: {len(open_recording(settings.path, settings.frames, settings.skip))} frames"
    source = tiled_source(settings, config.tiled, config.positions)
    source.open()
    start = source.receive(0)
    source.close()
    assert isinstance(start, SeriesStart)
    return f"run {start.series} in Tiled: {start.expected} frames"


def _encryption(config: Config) -> str:
    """Keys of the ZMQ sockets: looked at where the sockets are opened; here, who needs none and should have one."""
    sockets: list[tuple[str, SourceSettings | PositionSettings]] = []
    if config.source.kind in ("dectris_v1", "dectris_v2") or (config.source.kind == "documents" and config.source.path is None):
        sockets.append(("source", config.source))
    if config.positions.address is not None:
        sockets.append(("positions", config.positions))
    told, open_to_all = [], []
    for section, settings in sockets:
        files = key_files(settings, section)
        host = (settings.address or "").removeprefix("tcp://").rpartition(":")[0]
        if files is not None:
            own = load_own(files)
            others = f"{len(load_clients(files))} keys may send" if files.clients is not None else f"the other side's is in {files.server}"
            told.append(f"{section} has the key {own.public.decode()}, {others}")
        elif not (settings.address or "").startswith("ipc://") and not is_loopback(host):
            open_to_all.append(section)
    if open_to_all:
        names = " and ".join(f"{section}.address" for section in open_to_all)
        return (
            f"{_WARNING}{names} beyond loopback without keys: whoever is on that network can send or read frames; where the other side"
            " speaks CurveZMQ, `streamprior keys FOLDER` makes keys"
        )
    return "; ".join(told) or "none, and no ZMQ socket beyond loopback"


def _http(settings: HttpSettings) -> str:
    token = http_token(settings)
    server = HttpServer(Starlette(), settings)
    server.listen()
    server.stop()
    return f"{settings.host}:{settings.port} is free, {'with a token' if token is not None else 'without a token'}"


def _alarms(settings: AlarmSettings) -> str:
    token = webhook_token(settings)
    if settings.webhook is None:
        return "shown on the page, in /metrics and to Bluesky; sent to nobody (alarms.webhook)"
    address = address_of(settings.webhook)
    told = f"each is sent to {address.place} when it is raised and when it is cleared, {'with' if token else 'without'} a token"
    if token and not address.secure and not is_loopback(address.host):
        return f"{_WARNING}{told} that the network sees; use https"
    return f"{told}; whether it is taken there shows only in a run"


def _check_writable(folder: Path, setting: str) -> None:
    """Make the folder where it is absent. Raises ConfigError, naming the setting, where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"{setting}: {folder} cannot be written ({error.strerror}); name another or change its owner") from None


def _archive(config: Config) -> str:
    folder = config.archive.folder
    _check_writable(folder, "archive.folder")
    try:
        claim(folder).close()
    except SinkUnavailable as error:
        raise ConfigError(f"archive.folder: {error}") from None
    free = shutil.disk_usage(folder).free
    found = f"{free / 2**30:.1f} GiB are free on {folder}"
    if free < max(_LEAST_FREE_BYTES, config.archive.short_mb * 2**20):
        raise ConfigError(f"archive.folder: only {found}; make room or name another folder")
    try:
        room = (free - config.archive.full_mb * 2**20) // frame_bytes(load_prior(config.prior), config.recipe != "ptycho")
    except PriorError:  # one fault, and the look at the prior has told of it
        return f"can be written, {found}"
    expected = _expected(config)
    if expected > room:
        raise ConfigError(
            f"archive.folder: {found}, room for {room} frames, and the source has {expected}; make room or name another folder"
        )
    return f"can be written, {found}, room for {room:,} frames at least"


def _expected(config: Config) -> int:
    """Frames that a recorded source will send; 0 where that is not known before."""
    settings = config.source
    if settings.kind != "file" or settings.path is None or settings.follow_s:
        return 0
    try:
        return len(open_recording(settings.path, settings.frames, settings.skip))
    except ConfigError:  # the look at the source tells of it
        return 0


def _tiled(config: Config) -> str:
    if config.tiled.uri is None:
        return "none named; results stay on disk"
    problem = probe(config.tiled.uri, tiled_api_key(config.tiled))
    if problem is not None:
        raise ConfigError(f"tiled.uri: {problem}")
    return f"{config.tiled.uri} answers"


def _state() -> str:
    folder = state_folder()
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(f"state folder {folder} cannot be written ({error.strerror}); set STREAMPRIOR_STATE to one that can") from None
    return f"{folder} keeps compiled kernels, FFT plans, the ledger and quarantined messages"


def _recovery(config: Config) -> str:
    if config.source.kind in ("file", "tiled") or config.source.path is not None:
        return "frames lie in a file or in Tiled: name it again after a kill"
    if config.recovery.mode == "live":
        return "after a kill a run goes on, and lacks what was on its way; recovery.mode: complete would keep that, at the stream's rate"
    if config.source.kind == "pva":
        raise ConfigError("recovery.mode: complete keeps messages of a ZMQ socket, and source.kind is pva; set it to live")
    folder = spool_folder(config)
    _check_writable(folder, "recovery.folder")
    free = shutil.disk_usage(folder).free
    if free < config.recovery.most_mb * 2**20:
        raise ConfigError(
            f"recovery.folder: {free / 2**30:.1f} GiB are free on {folder}, and recovery.most_mb may take"
            f" {config.recovery.most_mb / 1024:.1f} GiB; make room, name another folder or lower it"
        )
    return f"messages are kept in {folder} until their frames are archived ({free / 2**30:.1f} GiB free)"


def _fft() -> str:
    ours = "frames whose sides have no prime factor above 13 are refined by transforms of our own"
    if find_spec("pyfftw") is None:
        return f"{ours}; others, and mosaics, by scipy.fft: `pip install streamprior[fftw]` about doubles their rate (FFTW is GPL)"
    return f"{ours}; others, and mosaics, by FFTW through pyFFTW"


def _gpu(config: Config) -> str:
    if check_backend(config.compute.backend, ("cpu", "cuda")) == "cuda":
        return "frames are computed on the CUDA card"
    return f"frames are computed on the CPU ({'as compute.backend says' if config.compute.backend == 'cpu' else cuda_missing()})"
