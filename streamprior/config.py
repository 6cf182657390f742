"""Every setting, written once: unit, default, reason. YAML and environment -> frozen models; unknown keys are errors."""

from __future__ import annotations

import difflib
import hashlib
import ipaddress
import os
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError

from streamprior.errors import ConfigError

_PREFIX = "STREAMPRIOR_"
TOKEN_VARIABLE = "STREAMPRIOR_HTTP_TOKEN"
_NOT_SETTINGS = {"STREAMPRIOR_STATE", "STREAMPRIOR_DATA", TOKEN_VARIABLE}


def state_folder() -> Path:
    """Where caches live between runs: $STREAMPRIOR_STATE, systemd's $STATE_DIRECTORY, or ~/.local/state/streamprior; made if absent.

    Raises ConfigError where it cannot be made.
    """
    named = os.environ.get("STREAMPRIOR_STATE") or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    folder = Path(named) if named else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "streamprior"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"state folder {folder} cannot be made ({error.strerror}); set STREAMPRIOR_STATE to one that can") from None
    return folder


def one_openmp_thread() -> None:
    """Keep OpenMP libraries that are loaded from now on to one thread, unless the operator has said otherwise.

    Their threads spin at barriers: two of them on two busy cores made the decompression of a 128 x 128 frame last 7 ms instead of 32 us.
    The path has threads of its own, one frame each.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class _Room(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _zmq_address(address: str) -> str:
    """ZMQ itself takes port 99999 for another one without a word."""
    port = address.rpartition(":")[2]
    fits = port == "*" or (port.isdecimal() and 0 < int(port) < 65536)
    if not address.startswith("ipc://") and not (address.startswith("tcp://") and fits):
        raise ValueError("write tcp://HOST:PORT with a port from 1 to 65535, or * for any free one")
    return address


class SourceSettings(_Room):
    """Where frames come from."""

    kind: Literal["dectris_v2", "dectris_v1", "documents", "pva", "tiled", "file"] = "dectris_v2"
    """dectris_v2, dectris_v1: DECTRIS streams over ZMQ. documents: Bluesky documents, over 0MQ or from a file (`path`), with their pixels
    inline or by reference. pva: NTNDArrays of an EPICS channel. tiled: a run that is in Tiled. file: a recorded run. The last two, and a
    file of documents, are read as fast as they can be processed, and the daemon ends with them."""
    name: str = "detector"
    """Part of every frame's identity and a label of the metrics."""
    address: Annotated[str, AfterValidator(_zmq_address)] = "tcp://127.0.0.1:31001"
    """ZMQ address; 31001 is the port of DECTRIS stream V2, 9999 that of V1, 5578 where a Bluesky proxy gives documents out. Loopback
    unless told otherwise."""
    attach: Literal["bind", "connect"] = "bind"
    """bind: senders connect to us (twin, replay, a Bluesky publisher without a proxy). connect: we connect to a detector's PUSH socket
    (EIGER2) or to a Bluesky proxy."""
    curve_secret_file: Path | None = None
    """Our own key (CurveZMQ, `streamprior keys`), which only we may read: frames are encrypted, and who has no key gets nothing in. Empty:
    the socket is open to whoever reaches it."""
    curve_clients_folder: Path | None = None
    """attach bind: folder of the public keys (.key) of those who may send."""
    curve_server_public_file: Path | None = None
    """attach connect: public key of whom we connect to."""
    pv: str | None = None
    """Name of the channel, for example 13SIM1:Pva1:Image."""
    channel: str = "threshold_1"
    """Threshold channel that is read. "difference" channels wrap around zero and are no photons."""
    path: Path | None = None
    """The recorded run of a file source: CXI, NeXus/HDF5 (FILE::/path/in/file picks a dataset), .npy, a folder of TIFFs or EDFs; or a file
    of documents (JSON, or a JSON line each)."""
    frames: str = ":"
    """Python slice of a file's frames, for example 1::2."""
    skip: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """Frames of a file that are left out, by their index in the file: outliers that somebody has found."""
    follow_s: Annotated[float, Field(ge=0)] = 0.0
    """A file that is still being written (HDF5, SWMR) is over when it has not grown for so many seconds; 0: what it holds now is all."""
    uri: str | None = None
    """Tiled server of a tiled source; empty: that of `tiled.uri`."""
    run: str = "latest"
    """Run in Tiled: its uid or the beginning of it, its scan number, key=value for a search in its start document, or latest."""
    array: str | None = None
    """Path of the frames within the run; empty: the only stack of images in it."""
    max_message_mb: Annotated[int, Field(gt=0, le=4096)] = 256
    """MiB. A larger message is quarantined before it is decoded; an EIGER2 16M image of three uncompressed channels has 217."""
    high_water_mark: Annotated[int, Field(gt=0)] = 256
    """Messages that ZMQ itself may hold; small, because the receive queue is counted in bytes and ZMQ's is not. Documents are small and
    their publisher never waits: of those it is 100 times as many."""


class DocumentsSettings(_Room):
    """Bluesky documents, as a source of frames or of positions."""

    prefix: str = ""
    """That of the publisher; documents of another one are not ours."""
    serializer: Literal["msgpack", "json", "pickle"] = "msgpack"
    """Must be the publisher's. Bluesky's own default is pickle, which can execute code: here only numpy arrays, scalars and plain
    containers are unpickled, everything else is quarantined."""
    image: str | None = None
    """Data key of the frames; empty: the only two-dimensional one."""
    stream: str | None = None
    """Stream of events that frames are taken from; empty: the first that has the image. A scan with dark frames before it has two."""
    folders: tuple[Path, ...] = ()
    """Files that documents refer to are read from these folders and those within them, nowhere else."""
    moved: dict[str, Path] = {}
    """Folder as the documents name it -> where this machine has it."""
    flush_s: Annotated[float, Field(ge=0)] = 10.0
    """How long a frame is waited for that a document refers to and that its file does not hold yet."""


class PositionSettings(_Room):
    """Where the probe stood: motors of a Bluesky scan, joined to frames."""

    x: str | None = None
    """Data key of the motor that moves along the columns of a frame; empty: no positions out of documents."""
    y: str | None = None
    """The same along rows; empty: a scan along x alone."""
    unit: Literal["m", "mm", "um", "nm"] | None = None
    """Of both motors; empty: as the descriptor says, and mm where it says nothing."""
    address: Annotated[str, AfterValidator(_zmq_address)] | None = None
    """Where documents come from when frames come over another wire; 5578 on a Bluesky proxy. Empty: with the frames."""
    attach: Literal["bind", "connect"] = "connect"
    """connect: to a Bluesky proxy. bind: a publisher connects to us."""
    curve_secret_file: Path | None = None
    """As source.curve_secret_file, for `address`."""
    curve_clients_folder: Path | None = None
    """As source.curve_clients_folder."""
    curve_server_public_file: Path | None = None
    """As source.curve_server_public_file."""
    join: Literal["number", "time"] = "number"
    """number: frame i belongs to event i of the scan, or to the one that a stream_datum names. time: to where the motors stood at its time
    stamp, between two readings or near one; for fly scans whose motors are monitored."""
    near_s: Annotated[float, Field(gt=0)] = 0.5
    """Joined by time: farthest that a reading may be from the frame."""
    wait_s: Annotated[float, Field(ge=0)] = 1.0
    """How long a frame waits for its position, and a series' first one for its scan; then it is processed without and flagged. A position
    that comes while the run is open still goes into archive and mosaic."""
    hold_mb: Annotated[int, Field(gt=0)] = 64
    """MiB of frames that may wait; beyond, the oldest goes on without its position."""

    @model_validator(mode="after")
    def _x_first(self) -> Self:
        """Without x nothing is joined, and whoever sets the rest would wait for positions in vain."""
        for name in ("y", "address", "curve_secret_file", "curve_clients_folder", "curve_server_public_file"):
            if self.x is None and getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect without x: name the motor that moves along the columns of a frame")
        return self


class PrepareSettings(_Room):
    """Corrections of the raw frame; each file is .npy or FILE::/dataset in HDF5, of the detector's shape."""

    mask: Path | None = None
    """True (or non-zero) where a pixel is unusable; joined with the mask of the start message."""
    flat: Path | None = None
    """Factor a pixel; wins over the start message's flat field."""
    dark: Path | None = None
    """Counts a pixel, subtracted first; a stack of dark frames is averaged."""
    saturation: Annotated[float, Field(gt=0)] | None = None
    """Counts from which a pixel holds no data; the start message's saturation_value where this is empty."""


class RefineSettings(_Room):
    """Phase retrieval: a fixed number of steps, known before the run."""

    enabled: bool = True
    """false: masks and drift only."""
    candidates: Annotated[int, Field(ge=0, le=16)] = 3
    """Nearest prototypes that are tried on each frame beside a flat start; 0: the flat start alone."""
    trial: Annotated[int, Field(gt=0, le=1000)] = 10
    """Error-reduction iterations that each of them gets; the one of lowest chi2 goes on."""
    schedule: str = "SW(1.5,0.1)+20*ER+SW(1.2,0.1)+20*ER+SW(1.0,0.1)+20*ER"
    """What the kept start goes through, in the field's notation. 4 trials and this are 100 iterations; of the schedules tried at that cost
    it had the lowest object error over doses and beam stops on simulated crystals (docs/decisions/0012)."""
    alone: str = "10*ER+SW(2.0)+25*HIO+5*ER+SW(1.5)+25*HIO+5*ER+SW(1.0)+15*HIO+15*ER"
    """What a flat start goes through when no prototype is near and none is tried: 100 iterations as well."""
    iterations: Annotated[int, Field(gt=0)] | None = None
    """Plain error reduction of so many iterations in place of both schedules."""
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Proximal weight that ties each iteration to the start; 0: none. Ptychography needs 0.05-0.3."""
    free_fraction: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pixels held out for the free log-likelihood; 0: none, and the number is NaN."""


Axes = Literal["xy", "-xy", "x-y", "-x-y", "yx", "-yx", "y-x", "-y-x"]


class MosaicSettings(_Room):
    """Ptychography: how frames with positions become an image of the sample (recipe ptycho)."""

    probe: Path | Literal["frames"] | None = None
    """The illumination to begin with: a file (.npy, FILE::/dataset, a CXI file with an illumination, an earlier run's mosaic.nxs), or
    "frames": a model out of the first frames (their mean is the pupil, out of focus until it is `spot_px` wide). Empty: the one that a
    file source itself holds."""
    spot_px: Annotated[float, Field(gt=0)] = 96.0
    """Width of the spot on the sample, object pixels, for a modelled probe. Rather too wide than too narrow: on the measured Siemens
    star, whose spot is about 75 wide, all from 75 to 128 ended alike, and 60 failed."""
    modes: Annotated[int, Field(ge=0, le=16)] = 0
    """Incoherent modes of the probe; more than the file has begin as the first with nodes, and need `refine`. 0: as many as the file has. A
    second one took the halves' disagreement on the measured Siemens star from 0.29 to 0.24."""
    refine: bool = False
    """Improve the probe as frames come. Its photons are held; switch it off for a probe that is known better than one scan tells."""
    gain: Annotated[float, Field(gt=0, le=1)] = 0.5
    """How far the probe moves towards what 8 frames ask of it. 0.5 mends a wrong probe within 100 frames; 0.1 disturbs one that is nearly
    right the less (docs/decisions/0017)."""
    axes: Axes = "xy"
    """What the positions' (x, y) are on the detector's (columns, rows): "-xy" turns the sign of x, "yx" exchanges the two. A trial on the
    first frames says where another setting explains them better."""
    pixel_nm: Annotated[float, Field(gt=0)] | None = None
    """Object pixel. Empty: wavelength x distance / (pixels x detector pixel) of the start message; where that does not say, positions are
    taken as object pixels."""
    iterations: Annotated[int, Field(gt=0, le=100)] = 1
    """Projections of each frame before it goes into the mosaic. Three took the halves of the measured Siemens star from 0.32 to 0.30 at
    three times the cost; a further pass over the frames gains more (docs/decisions/0014)."""
    weight: Annotated[float, Field(ge=0.001, le=10)] = 0.05
    """Proximal weight that ties a frame's patch to the mosaic, in units of the probe's brightest pixel."""
    memory: Annotated[float, Field(ge=0, le=1)] = 0.3
    """How much the light that a place has had adds to that weight: 0 forgets, 1 is a running mean. Weight and memory were chosen on the
    agreement of halves after one pass, on the measured Siemens star and on gold balls together (docs/decisions/0014)."""
    settle: bool = True
    """After 16, 32, 64, 128, 256 frames and then every 256, two further passes over the newest 256: every frame met a mosaic that did not
    know its surroundings yet, and the first ones an unrefined probe. It triples the cost of a frame."""
    halves: bool = True
    """Put odd and even frames together apart as well: it doubles the cost, and is what uncertainty and resolution are known from."""
    polish: bool = True
    """While no frame comes, further passes over the last 256. What it adds depends on the clock: switch it off where live and replayed
    runs must agree bit for bit."""
    finish: Annotated[int, Field(ge=0, le=1000)] = 11
    """Passes over all kept frames after the run: two thirds frame by frame, the rest averaging (overlap projection). 0: none."""
    trust: dict[str, Annotated[float, Field(ge=0, le=1)]] = {}
    """Class name -> how far the counts of its pixels are believed (1 where not named). Measured: less than 1 on the background costs
    resolution (docs/decisions/0014)."""
    least_flux: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """A frame with less than this part of the median of the 64 before it is left out: beam dump, shutter, beam stop."""
    least_iou: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """A frame whose classes overlap less than this with the prior's reference, on average, is left out."""
    wait_s: Annotated[float, Field(ge=0)] = 10.0
    """How long a frame waits for its position; then it is left out of the mosaic."""
    wait_frames: Annotated[int, Field(ge=0)] = 1024
    """Most frames that wait for positions, and no more than go into `keep_mb`; the oldest is left out first."""
    keep_mb: Annotated[int, Field(gt=0)] = 512
    """MiB of frames that settling, polishing and finishing can return to: 8,192 of 128 x 128. Older ones stay in the mosaic as they are."""
    canvas_mb: Annotated[int, Field(gt=0)] = 512
    """MiB that the canvases may take: 3,800 x 3,800 object pixels with halves. A frame beyond is left out."""
    live_hz: Annotated[float, Field(gt=0, le=10)] = 1.0
    """Images a second for archive, page and Tiled, whose streaming cache keeps every one of them for an hour; at most 10."""


class DriftSettings(_Room):
    """When a signal counts as drifted."""

    limit: Annotated[float, Field(gt=0)] = 5.0
    """Standard deviations of the prior's baseline. 5 sigma found a flux loss of 1 % a frame at once on a stationary simulated beam."""
    patience: Annotated[int, Field(gt=0)] = 3
    """Frames in a row beyond the limit before the alarm is raised."""


class AlarmSettings(_Room):
    """Who is told of alarms, besides the page, /metrics and Bluesky."""

    webhook: str | None = None
    """Address (http or https) that is sent a JSON message when an alarm is raised and when it is cleared; empty: nobody. Its path is kept
    out of the log, as chat services put a secret there."""
    webhook_token_file: Path | None = None
    """File that holds a token, sent as `Authorization: Bearer TOKEN` with each message."""
    page: str | None = None
    """Address of the live page as those who get a message reach it; empty: as the daemon itself has it (http.host, http.port)."""
    sink_down_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that a sink must be down before that is an alarm: a restart of Tiled should wake nobody."""


class ComputeSettings(_Room):
    """The crew that runs the stages."""

    workers: Annotated[int, Field(ge=0)] = 0
    """Threads; 0: one a core. One FFT runs on one thread, frames run beside each other."""
    backend: Literal["auto", "cpu", "cuda"] = "auto"
    """What classifies and refines frames and puts the mosaic together: a CUDA card where there is one (auto), or as said. The daemon first
    compares what the card makes of two frames with what the CPU does, and does not start where they differ."""
    batch_frames: Annotated[int, Field(gt=0, le=1024)] = 64
    """Most frames a worker takes at once. It takes what is there: idle, that is one, and costs no latency."""
    batch_s: Annotated[float, Field(gt=0)] = 0.02
    """Seconds that a batch should take at most: what batches add to the latency. A frame that takes longer by itself goes alone."""


class QueueSettings(_Room):
    """Bounds of the path, MiB."""

    receive_mb: Annotated[int, Field(gt=0)] = 256
    """Raw messages that wait to be decoded: 2 s of 1,000 frames/s of 128 x 128 uint16 would need 64."""
    receive_policy: Literal["block", "drop_oldest", "drop_newest"] = "block"
    """block: the pressure reaches the sender. The others drop messages, and count them."""
    compute_mb: Annotated[int, Field(gt=0)] = 64
    """Decoded frames that wait for a worker, and as much again for results that wait for an earlier one."""
    outbox_mb: Annotated[int, Field(gt=0)] = 256
    """Results that wait for the archive: what a disk may hesitate before the path slows down."""


class OverloadSettings(_Room):
    """What is left out, by frame index, when frames come faster than they can be computed; undone when the load falls."""

    furthest: Literal["nothing", "refinement", "masks", "frames"] = "masks"
    """How far that may go: nothing (the sender waits), refinement of every other frame up to all (`streamprior catchup` makes up for it
    afterwards), then also the masks of most frames, then frames at the receive queue, whatever `queues.receive_policy` says."""
    late_s: Annotated[float, Field(gt=0)] = 1.0
    """A frame that waits longer than this for a worker is late."""
    calm_s: Annotated[float, Field(gt=0)] = 2.0
    """How long all frames must be young before the next step back."""


class RunSettings(_Room):
    """When a run is over, whatever the wire lost."""

    late_s: Annotated[float, Field(gt=0)] = 1.0
    """Seconds that frames may still come after the end message (or after the last expected frame, when no end comes)."""
    idle_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds without a message after which a run is closed; a frame of a closed series that comes so long after it opens another run."""
    drain_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds that SIGTERM gives the path to empty itself. A second signal leaves at once."""


class RecoverySettings(_Room):
    """What a restart finds after this process was killed: every run that was open goes on where its series does."""

    mode: Literal["live", "complete"] = "live"
    """live: frames that were on their way are lost, and listed (`streamprior ledger --left-out`). complete: every message is written down
    before it goes on and read again after a restart, so that none is lost; that takes the stream's rate of the disk. For sources on a ZMQ
    socket; documents are kept in any case."""
    folder: Path | None = None
    """Where messages are kept until their frames are archived: a local disk, as receiving waits for it. Default: in the state folder."""
    most_mb: Annotated[int, Field(ge=64)] = 4096
    """Most that is kept, MiB; beyond it the oldest images go, with an alarm. It never fills while the archive keeps up."""


class ArchiveSettings(_Room):
    """The complete output, on disk."""

    folder: Path = Path("archive")
    """One folder a run is made here."""
    chunk_frames: Annotated[int, Field(gt=0, le=4096)] = 64
    """Frames in one chunk file. Chunks are written whole, so a kill leaves whole chunks."""
    short_mb: Annotated[int, Field(ge=0)] = 2048
    """MiB free on the disk of `folder` below which it is nearly full: told aloud, and refinement, most of the bytes, is left out.
    At 1,000 frames/s with objects (25 MB/s) this lasts 80 s; without, ten minutes."""
    full_mb: Annotated[int, Field(ge=0)] = 256
    """MiB free below which no results are written, so that starts and ends of runs still find room."""
    when_full: Literal["auto", "drop", "wait"] = "auto"
    """What becomes of results on a full disk. drop: they wait while they fill less than half of queues.outbox_mb, then the oldest are
    counted as dropped at archive: disk_full, with their indices, and the path goes on. wait: nothing is lost and the path stops. auto: wait
    where the source can (kinds file and tiled), drop for a detector."""


class TiledSettings(_Room):
    """Where the archive is made known."""

    uri: str | None = None
    """Address of the Tiled server; empty: the archive stays on disk alone."""
    api_key_file: Path | None = None
    """File that holds the API key; $TILED_API_KEY where this is empty. Keys never stand in the configuration itself."""
    parent: str = "streamprior"
    """Container in Tiled under which runs appear."""
    live_hz: Annotated[float, Field(gt=0, le=10)] = 5.0
    """Updates a second of the arrays under `latest`; at most 10."""
    documents: bool = False
    """Write each run's numbers as a Bluesky run of its own too, linked to the raw one, for clients that read those (databroker)."""


class HttpSettings(_Room):
    """Metrics, health, ledger and the live page, on one port."""

    host: str = "127.0.0.1"
    """Loopback unless told otherwise. Beyond it everything but /metrics, /healthz and /readyz takes a token."""
    token_file: Path | None = None
    """File that holds the token of page, ledger and status (`streamprior keys FOLDER --token` makes one); $STREAMPRIOR_HTTP_TOKEN where
    this is empty. With a token loopback asks for it too."""
    port: Annotated[int, Field(ge=0, le=65535)] = 9870
    """0: any free port, which the log names."""


class LogSettings(_Room):
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severity that is written."""
    format: Literal["console", "json"] = "console"
    """json: a line each, for a log collector."""


class Config(BaseSettings):
    """The daemon's settings. Environment wins over file: STREAMPRIOR_TILED__URI sets tiled.uri."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=_PREFIX, env_nested_delimiter="__", use_attribute_docstrings=True
    )

    prior: Path
    """The frozen prior that `streamprior train` wrote."""
    recipe: Literal["bragg", "ptycho"] = "bragg"
    """Which stages run: bragg is prepare, classify, match, refine, drift; ptycho is prepare, classify, drift, mosaic."""
    source: SourceSettings = SourceSettings()
    documents: DocumentsSettings = DocumentsSettings()
    positions: PositionSettings = PositionSettings()
    prepare: PrepareSettings = PrepareSettings()
    refine: RefineSettings = RefineSettings()
    mosaic: MosaicSettings = MosaicSettings()
    drift: DriftSettings = DriftSettings()
    alarms: AlarmSettings = AlarmSettings()
    compute: ComputeSettings = ComputeSettings()
    queues: QueueSettings = QueueSettings()
    overload: OverloadSettings = OverloadSettings()
    runs: RunSettings = RunSettings()
    recovery: RecoverySettings = RecoverySettings()
    archive: ArchiveSettings = ArchiveSettings()
    tiled: TiledSettings = TiledSettings()
    http: HttpSettings = HttpSettings()
    log: LogSettings = LogSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings

    @property
    def content_hash(self) -> str:
        """SHA-256 of every setting that can change a result or its place; the same for file and environment."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load_config(path: str | os.PathLike[str]) -> Config:
    """Read the YAML file, let the environment win, check every key and value.

    Relative paths in the file are relative to the file.

    Raises
    ------
    ConfigError
        Names the file (or environment variable), the key, what is wrong, and the nearest valid key for an unknown one.
    """
    file = Path(path)
    try:
        given = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file; `streamprior check --example` prints a configuration to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {error}") from None
    if not isinstance(given, dict):
        raise ConfigError(f"{file}: the top level must be a mapping of settings, found {type(given).__name__}")
    return make_config(given, str(file), relative_to=file.parent)


def make_config(given: Mapping[str, Any], origin: str, relative_to: Path | None = None) -> Config:
    """A configuration from a mapping, as `load_config`; `origin` is what errors name."""
    _refuse_unknown_variables()
    try:
        # A section whose every line is commented out reads as empty, not as wrong.
        config = Config(**{str(key): value for key, value in given.items() if value is not None})
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(one, given, origin) for one in error.errors())) from None
    except SettingsError as error:
        whole = [one for one in os.environ if one.startswith(_PREFIX) and "__" not in one and one not in _NOT_SETTINGS]
        raise ConfigError(
            f"environment variable {' or '.join(whole)}: {error}; a whole section is written as JSON, a single key as {_PREFIX}SECTION__KEY"
        ) from None
    return _rooted(config, relative_to) if relative_to is not None else config


def describe(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, Any, str]]:
    """(key, type, default, reason) of every setting, in order; the reference page is made from it."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from describe(field.annotation, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.default
            yield f"{prefix}{name}", spelled(field.annotation), default, " ".join((field.description or "").split())


def spelled(annotation: Any) -> str:
    """A type as a person writes it: `float | None`, whatever bounds it carries and wherever this Python keeps its classes."""
    parts = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return spelled(parts[0])
    if get_origin(annotation) is Literal:
        return " | ".join(map(repr, parts))
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(map(spelled, parts))
    if parts:
        return f"{annotation.__name__}[{', '.join(map(spelled, parts))}]"
    if annotation is Ellipsis:
        return "..."
    return "None" if annotation is NoneType else str(annotation.__name__)


def example_yaml() -> str:
    """A configuration with every setting at its default and the reason beside it; what has no default of its own is commented out."""
    lines = ["# streamprior: every setting with its default. Remove what you do not change; unknown keys are errors.", ""]
    section = ""
    for key, _, default, reason in describe():
        group, _, name = key.rpartition(".")
        if group != section:
            lines += ["", f"{group}:"]
            section = group
        indent = "  " if group else ""
        lines += [f"{indent}# {line}" for line in textwrap.wrap(reason, 110)]
        value = {"prior": "prior.h5"}.get(key, default)
        shown = f"{name}: {yaml.safe_dump(_scalar(value), default_flow_style=True).splitlines()[0]}"
        lines.append(f"{indent}# {name}:" if value is None else f"{indent}{shown}")
    return "\n".join(lines) + "\n"


def _scalar(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def tiled_api_key(settings: TiledSettings) -> str | None:
    """The key from its file or from $TILED_API_KEY. Raises ConfigError where the file cannot be read."""
    if settings.api_key_file is None:
        return os.environ.get("TILED_API_KEY")
    try:
        key = settings.api_key_file.read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(f"tiled.api_key_file: {settings.api_key_file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        key = ""
    if not key:
        raise ConfigError(f"tiled.api_key_file: {settings.api_key_file} holds no key; write the key alone on its first line")
    return key


def read_secret(file: Path, setting: str) -> str:
    """The text of a file that nobody but its owner and group may read. Raises ConfigError, which shows nothing of it."""
    try:
        if file.stat().st_mode & _FOR_OTHERS:
            raise ConfigError(
                f"{setting}: {file} can be read or changed by others; `chmod 600 {file}`, and make a new one if others had it"
            )
        return file.read_text("ascii")
    except OSError as error:
        raise ConfigError(f"{setting}: {file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{setting}: {file} is no text") from None


_FOR_OTHERS = 0o027
"""Mode bits: a group may be let in to read (a service's), others not at all."""


def http_token(settings: HttpSettings) -> str | None:
    """The token from its file or from $STREAMPRIOR_HTTP_TOKEN; None where none is set and the port is on loopback.

    Raises ConfigError where the file cannot be read or others may, the token is too short to keep anybody out, or there is none and the
    port is beyond loopback.
    """
    token = own_token() if settings.token_file is None else read_secret(settings.token_file, "http.token_file").strip()
    place = f"http.token_file: {settings.token_file}" if settings.token_file is not None else f"${TOKEN_VARIABLE}"
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError(
            f"{place} holds no token; it takes 16 characters or more of A-Z a-z 0-9 - _ . ~ (`streamprior keys FOLDER --token`)"
        )
    if token is None and not is_loopback(settings.host):
        raise ConfigError(
            f"http.host: {settings.host} is beyond loopback, where everybody could read page and ledger; make a token with"
            f" `streamprior keys FOLDER --token` and name it in http.token_file or ${TOKEN_VARIABLE}"
        )
    return token


_TOKEN = re.compile(r"[A-Za-z0-9._~-]{16,512}", re.ASCII)


def own_token() -> str | None:
    """$STREAMPRIOR_HTTP_TOKEN; None where it is empty."""
    return os.environ.get(TOKEN_VARIABLE) or None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a host. A name that we do not know is taken for one that others reach."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _rooted(config: Config, folder: Path) -> Config:
    """Relative paths made absolute against the configuration file's folder."""

    def rooted(model: BaseModel) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, Path) and not value.is_absolute():
                changes[name] = (folder / value).absolute()
            elif isinstance(value, tuple) and any(isinstance(one, Path) for one in value):
                changes[name] = tuple((folder / one).absolute() for one in value)
            elif isinstance(value, dict) and any(isinstance(one, Path) for one in value.values()):
                changes[name] = {key: (folder / one).absolute() for key, one in value.items()}
            elif isinstance(value, BaseModel):
                changes[name] = value.model_copy(update=rooted(value))
        return changes

    return config.model_copy(update=rooted(config))


def _refuse_unknown_variables() -> None:
    """pydantic-settings passes over variables it does not know; a misspelt one must not be silently without effect."""
    for variable in os.environ:
        if variable.startswith(_PREFIX) and variable not in _NOT_SETTINGS:
            first = variable.removeprefix(_PREFIX).split("__")[0].lower()
            if first not in Config.model_fields:
                raise ConfigError(f"environment variable {variable}: unknown setting {first!r}{_nearest(first, list(Config.model_fields))}")


def _sentence(error: Any, given: Mapping[str, Any], origin: str) -> str:
    """One of pydantic's findings as a sentence that names place, key and remedy."""
    keys = [str(part) for part in error["loc"]]
    key = ".".join(keys)
    place = origin if _holds(given, keys) or error["type"] == "missing" else f"environment variable {_PREFIX}{'__'.join(keys).upper()}"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key {key!r}{_nearest(keys[-1], _keys_at(keys[:-1]))}"
    if error["type"] == "missing":
        return f"{place}: key {key!r} is missing; {_description(keys)}"
    return f"{place}: {key}: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _nearest(key: str, valid: list[str]) -> str:
    close = difflib.get_close_matches(key.lower(), valid, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; valid here: {', '.join(valid)}"


def _keys_at(path: list[str]) -> list[str]:
    model: Any = Config
    for part in path:
        model = model.model_fields[part].annotation
    return list(model.model_fields)


def _description(path: list[str]) -> str:
    model: Any = Config
    for part in path[:-1]:
        model = model.model_fields[part].annotation
    return str(model.model_fields[path[-1]].description)


def _holds(given: Any, keys: list[str]) -> bool:
    for key in keys:
        if not isinstance(given, Mapping) or key not in given:
            return False
        given = given[key]
    return True
