"""The command line: teaches by --help, shows progress, and says what to do when something is wrong."""

from __future__ import annotations

import getpass
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from streamprior import __version__
from streamprior.errors import ConfigError, SinkUnavailable

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pixel classes, prior-started phase retrieval and drift metrics for every frame of an X-ray detector, while the scan runs.",
)
out = Console()
err = Console(stderr=True)

ToOption = Annotated[str, typer.Option("--to", help="ZMQ address of the receiver, tcp://HOST:PORT.")]
WireOption = Annotated[str | None, typer.Option("--wire", help="dectris-v2 (CBOR), dectris-v1 (JSON and blobs), or documents (Bluesky).")]
FramingOption = Annotated[
    str | None, typer.Option(help="V1: multipart, split_header, parts (each a message of its own) or headerless (three parts an image).")
]
DetailOption = Annotated[str | None, typer.Option(help="V1: all (mask and flat field too), basic (configuration alone) or none.")]
EncodingOption = Annotated[str | None, typer.Option(help="How pixels are compressed: bslz4, lz4 or none.")]
FaultsOption = Annotated[
    str | None,
    typer.Option(
        "--faults",
        help="What goes wrong on the way, kind=count,...: lost, duplicated, late, truncated, flipped_bit, garbage, aborted, two_receivers,"
        " ...; ? names them all.",
    ),
]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Decides which frames the faults strike.")]
SecretOption = Annotated[Path | None, typer.Option("--curve-secret", help="Our own key (NAME.key_secret) where the receiver asks for one.")]
ServerOption = Annotated[Path | None, typer.Option("--curve-server", help="The receiver's public key (daemon.key); with --curve-secret.")]
FramesOption = Annotated[str, typer.Option(help="Python slice of the frames, for example 0::2.")]

Report = Callable[[str, int, int], None]
"""(what, done, total): how long work says where it stands."""


_EXTRAS = {
    "matplotlib": "evaluate",
    "skimage": "evaluate",
    "minisom": "train",
    "sklearn": "train",
    "kneed": "train",
    "threadpoolctl": "train",
    "bluesky": "bluesky",
    "ophyd_async": "bluesky",
    "event_model": "bluesky",
    "bluesky_tiled_plugins": "bluesky",
    "databroker": "databroker",
    "fabio": "edf",
}
"""Module -> the extra that brings it."""


@contextmanager
def faults() -> Iterator[None]:
    """The operator's mistakes end with a sentence and exit code 2, not with a traceback."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        _fail(f"this needs {error.name}, which is not installed: pip install 'streamprior[{_EXTRAS[error.name]}]'")
    except (ConfigError, SinkUnavailable) as error:
        err.print("[bold red]error:[/] ", end="")
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2 if isinstance(error, ConfigError) else 1) from None


@contextmanager
def progress() -> Iterator[Report]:
    """Bars on standard error, one for each thing that is reported."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=False) as bars:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield report


@app.callback(invoke_without_command=True)
def main(version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


@app.command()
def demo(
    headless: Annotated[bool, typer.Option("--headless", help="End by itself after one run, print the ledger.")] = False,
    frames: Annotated[int | None, typer.Option(min=8, help="Frames of a run (default: the scenario's, 400 for bragg).")] = None,
    rate: Annotated[float, typer.Option(min=0.1, help="Frames a second.")] = 100.0,
    scenario: Annotated[str, typer.Option(help="Scenario of the digital twin: a bundled name or a YAML file.")] = "bragg",
    folder: Annotated[Path | None, typer.Option(help="Keep archive, prior and Tiled's catalog here (default: a temporary folder).")] = None,
    port: Annotated[int, typer.Option(help="Port of page and metrics; 0 takes a free one.")] = 9870,
) -> None:
    """The digital twin over a real socket into an embedded Tiled, with page and metrics on; prints where to look.

    Example: streamprior demo --headless --frames 400
    """
    with faults():
        from streamprior import demo as show

        made = _twin(scenario)
        with show.workplace(folder) as place:
            prior = place / f"prior-{Path(scenario).stem}.h5"
            if not prior.exists():
                _grow_from_twin(scenario, prior)
            probe = None
            if made.scan() is not None:
                probe = place / f"probe-{Path(scenario).stem}.npy"
                np.save(probe, made.scan().probe)
            settings = show.DemoSettings(scenario, frames or len(made), rate, headless, port, probe)
            raise typer.Exit(show.run(settings, place, prior, out))


@app.command()
def beamtime(
    scenario: Annotated[str, typer.Argument(help="Scenario of the twin that has positions: a bundled name or a YAML file.")] = "gold_balls",
    headless: Annotated[bool, typer.Option("--headless", help="End by itself; exit 1 unless every scan is whole and found.")] = False,
    scans: Annotated[int, typer.Option(min=1, help="How many scans.")] = 3,
    rows: Annotated[int, typer.Option(min=2, help="Lines of a scan.")] = 20,
    columns: Annotated[int, typer.Option(min=2, help="Points of a line.")] = 20,
    disturbed: Annotated[int, typer.Option(min=0, help="Scan during which the beam loses half its flux for a while; 0: none.")] = 2,
    folder: Annotated[Path | None, typer.Option(help="Keep archive, frames, prior and catalog here (default: a temporary folder).")] = None,
    port: Annotated[int, typer.Option(help="Port of page and metrics; 0 takes a free one.")] = 9870,
) -> None:
    """A whole beamtime on this machine: a RunEngine scans the twin; frames go over DECTRIS V2, positions over documents, all into Tiled.

    A drift alarm pauses the plan, and it goes on when the beam has recovered. Needs pip install 'streamprior[bluesky]'.

    Example: streamprior beamtime gold_balls --headless
    """
    if disturbed > scans:
        raise typer.BadParameter(f"of {scans} scans none is number {disturbed}; 0 disturbs none", param_hint="--disturbed")
    with faults():
        from streamprior import beamtime as whole
        from streamprior import demo as show

        changes = _on_a_grid(rows, columns)
        made = _twin(scenario, changes)
        _box_of(made)
        with show.workplace(folder) as place:
            prior, probe = place / f"prior-{Path(scenario).stem}.h5", place / f"probe-{Path(scenario).stem}.npy"
            if not prior.exists():
                _grow_from_twin(scenario, prior, changes)
            np.save(probe, made.scan().probe)
            settings = whole.BeamtimeSettings(scenario, scans, rows, columns, disturbed, headless, port, probe)
            with progress() as report:
                raise typer.Exit(whole.run(settings, place, prior, out, report))


def _on_a_grid(rows: int, columns: int) -> dict[str, Any]:
    """Changes to a scenario that make its scan as large as a grid of these points."""
    return {"frames": max(rows, columns) ** 2, "sample.scan": "raster"}


def _box_of(twin: Any) -> Any:
    from streamprior_sim.beamline import box_of

    return box_of(twin)


@app.command()
def beamline(
    scenario: Annotated[str, typer.Argument(help="Scenario of the twin that has positions: a bundled name or a YAML file.")],
    to: ToOption = "tcp://127.0.0.1:31001",
    documents: Annotated[str, typer.Option(help="HOST:PORT of a Bluesky proxy's in-address.")] = "127.0.0.1:5577",
    daemon: Annotated[str, typer.Option(help="HTTP address of the daemon.")] = "http://127.0.0.1:9870",
    tiled: Annotated[str, typer.Option(help="Tiled server for the raw runs; its key in $TILED_API_KEY.")] = "http://127.0.0.1:8000",
    folder: Annotated[Path, typer.Option(help="Where the detector writes its files.")] = Path("detector"),
    scans: Annotated[int, typer.Option(min=1, help="How many scans.")] = 3,
    rows: Annotated[int, typer.Option(min=2, help="Lines of a scan.")] = 20,
    columns: Annotated[int, typer.Option(min=2, help="Points of a line.")] = 20,
    disturbed: Annotated[int, typer.Option(min=0, help="Scan during which the beam loses half its flux for a while; 0: none.")] = 2,
    lines: Annotated[bool, typer.Option("--json", help="A JSON object a line on standard output for everything that happens.")] = False,
) -> None:
    """The beamline's half of a beamtime: a RunEngine, the twin as its detector, motors, and a suspender that heeds the daemon's alarms.

    Example: streamprior beamline gold_balls --to tcp://127.0.0.1:31001 --documents 127.0.0.1:5577
    """

    def say(what: str, told: Any) -> None:
        if lines:
            sys.stdout.write(json.dumps({"what": what, **told}) + "\n")
            sys.stdout.flush()
        elif what != "event":
            out.print(what, ", ".join(f"{name} {value}" for name, value in told.items()), markup=False, highlight=False, soft_wrap=True)

    with faults():
        from streamprior_sim.beamline import Beamtime, run_beamtime, station

        from streamprior.bluesky.engine import Beside, engine_beside

        made = _twin(scenario, _on_a_grid(rows, columns))
        folder.mkdir(parents=True, exist_ok=True)
        engine, _ = engine_beside(Beside(documents, daemon, tiled, os.environ.get("TILED_API_KEY", "")), say)
        detector, motors = station(engine, made, folder, to)
        run_beamtime(engine, detector, motors, _box_of(made), Beamtime(scans, rows, columns, disturbed), say)


def _grow_from_twin(scenario: str, path: Path, changes: dict[str, Any] | None = None) -> None:
    """The demo's prior: grown on every fourth frame of the twin's scan without its drift, as last month's quiet scan would be."""
    from streamprior.prior import save_prior
    from streamprior.train.grow import grow_prior
    from streamprior.train.settings import TrainSettings

    twin = _twin(scenario, {"drift": {}, **(changes or {})})
    # Somebody waits to see something: a third of the time that the whole library takes. A ptychography frame alone has no object to solve.
    quick = TrainSettings(library=0 if twin.scan() is not None else 48, starts=3)
    with progress() as report:
        frames = []
        for i in range(0, len(twin), 4):
            frames.append(twin.frame(i))
            report("rendering", i + 4, len(twin))
        prior = grow_prior(np.stack(frames), settings=quick, progress=report, provenance={"twin": scenario, "frames": "0::4"})
    save_prior(prior, path)


def _twin(scenario: str, changes: dict[str, Any] | None = None) -> Any:
    from streamprior_sim.scenario import load_scenario
    from streamprior_sim.twin import build

    return build(load_scenario(scenario, changes))


@app.command()
def run(config: Annotated[Path, typer.Argument(help="YAML configuration; `streamprior check --example` prints one.")]) -> None:
    """The daemon: receive, classify, refine, archive, until SIGTERM.

    Exit codes: 0 drained and balanced, 1 our own failure, 2 configuration, 3 left before everything was out.

    Example: streamprior run beamline.yaml
    """
    with faults():
        # Kernels find their cache as they are imported: a state folder that cannot be made shows here.
        from streamprior import daemon
        from streamprior.config import load_config

        settings = load_config(config)
        daemon.configure_logging(settings.log)
        running = daemon.build(settings)
        code = daemon.run(running)
    _print_accounts(running.ledger.runs())
    raise typer.Exit(code)


@app.command()
def check(
    config: Annotated[Path | None, typer.Argument(help="YAML configuration.")] = None,
    example: Annotated[bool, typer.Option("--example", help="Print a configuration with every setting and its reason.")] = False,
) -> None:
    """Pre-flight: every setting, socket, path, prior, Tiled and GPU; says what to do about each failure. Exit 2 if any fails.

    Example: streamprior check beamline.yaml
    """
    from streamprior.config import example_yaml, load_config

    if example:
        out.print(example_yaml(), markup=False, highlight=False, soft_wrap=True, end="")
        return
    if config is None:
        raise typer.BadParameter("name a configuration, or print one to start from with --example", param_hint="CONFIG")
    with faults():
        from streamprior.preflight import inspect

        findings = list(inspect(load_config(config)))
    for finding in findings:
        mark = "[yellow]warn[/]" if finding.warns else "[green]ok  [/]" if finding.fine else "[bold red]FAIL[/]"
        out.print(f"{mark} {finding.what:13}", end="")
        out.print(finding.sentence, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if all(finding.fine for finding in findings) else 2)


@app.command()
def replay(
    file: Annotated[str, typer.Argument(help="CXI, NeXus/HDF5 (FILE::/path/in/file), .npy or a folder of TIFFs.")],
    to: ToOption = "tcp://127.0.0.1:31001",
    wire: WireOption = "dectris-v2",
    rate: Annotated[float, typer.Option(min=0.001, help="Frames a second.")] = 100.0,
    frames: FramesOption = ":",
    framing: FramingOption = None,
    header_detail: DetailOption = None,
    encoding: EncodingOption = None,
    trouble: FaultsOption = None,
    seed: SeedOption = None,
    secret: SecretOption = None,
    server: ServerOption = None,
) -> None:
    """A recorded beamtime, on the wire: each frame as the detector would send it, with its position where the file has one.

    Example: streamprior replay scan.cxi --to tcp://127.0.0.1:31001 --frames 1::2 --rate 100
    """
    from streamprior_sim.faults import counts_of
    from streamprior_sim.wires import wire_of

    from streamprior.sources.files import open_recording

    with faults():
        spoken = wire_of(_given(kind=wire, framing=framing, header_detail=header_detail, encoding=encoding))
        counts = counts_of(trouble or "")
        recording = open_recording(file, frames)
        _send(recording, to, rate, f"replay {recording.path.name}", spoken, counts, seed or 0, _keys(secret, server))


@app.command()
def twin(
    scenario: Annotated[str, typer.Argument(help="A bundled scenario (bragg, gold_balls, ...) or a YAML file.")],
    to: Annotated[str | None, typer.Option("--to", help="ZMQ address of the receiver, tcp://HOST:PORT.")] = None,
    rate: Annotated[float | None, typer.Option(min=0.001, help="Frames a second (default: the scenario's).")] = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="How many frames: fewer are spread over the scenario's, more repeat them.")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Write the frames to a CXI file instead of sending them.")] = None,
    data: Annotated[Path | None, typer.Option(help="gold_balls: a published reconstruction (HDF5) in place of the made sample.")] = None,
    wire: WireOption = None,
    framing: FramingOption = None,
    header_detail: DetailOption = None,
    encoding: EncodingOption = None,
    trouble: FaultsOption = None,
    seed: SeedOption = None,
    secret: SecretOption = None,
    server: ServerOption = None,
) -> None:
    """The digital twin: simulated frames of a physical forward model, on the wire or in a file.

    Wire and faults are the scenario's (dectris-v2 and none) unless told otherwise; what a correct receiver makes of them is printed.

    Example: streamprior twin bragg --to tcp://127.0.0.1:9999 --wire dectris-v1 --framing parts --faults lost=3,truncated=1 --seed 7
    """
    from streamprior_sim.cxi import save as save_frames
    from streamprior_sim.faults import counts_of
    from streamprior_sim.twin import Prerendered
    from streamprior_sim.wires import wire_of

    if (to is None) == (save is None):
        raise typer.BadParameter("give either --to ADDRESS or --save FILE", param_hint="--to / --save")
    with faults():
        made = _twin(scenario, {"sample.data": data.absolute()} if data is not None else None)
        if save is not None:
            _refuse_unwritable(save)
            with progress() as report:
                save_frames(made, save, slice(frames), lambda done, total: report("writing", done, total))
            return
        assert to is not None
        own = made.scenario.wire
        told = own.model_dump(exclude_unset=True) if wire in (None, own.kind) else {}
        spoken = wire_of(told | _given(kind=wire, framing=framing, header_detail=header_detail, encoding=encoding))
        counts = made.scenario.faults if trouble is None else counts_of(trouble)
        # Rendered beforehand: the physics of a frame takes longer than a fast detector gives it.
        wanted = frames or len(made)
        with progress() as report:
            rendered = Prerendered(made, min(wanted, len(made)), wanted, lambda done, total: report("rendering", done, total))
        chosen = made.scenario.seed if seed is None else seed
        _send(rendered, to, rate or made.scenario.rate_hz, f"twin {scenario}", spoken, counts, chosen, _keys(secret, server))


def _given(**options: str | None) -> dict[str, str]:
    return {name: value for name, value in options.items() if value is not None}


def _keys(secret: Path | None, server: Path | None) -> Any:
    from streamprior_sim.emit import load_keys

    if (secret is None) != (server is None):
        raise typer.BadParameter("give both or neither", param_hint="--curve-secret / --curve-server")
    return load_keys(secret, server) if secret is not None and server is not None else None


def _send(recording: Any, to: str, rate: float, what: str, wire: Any, counts: Mapping[str, int], seed: int, keys: Any) -> None:
    from streamprior_sim.emit import foreseen, send
    from streamprior_sim.faults import Trouble, scatter

    trouble = Trouble(scatter(counts, len(recording), seed), seed)
    with progress() as report:
        emitted = send(recording, to, rate, wire, trouble, lambda done, total: report(what, done, total), keys)
    late = f", {emitted.late} later than their turn" if emitted.late else ""
    err.print(f"{emitted.sent} messages sent in {emitted.seconds:.1f} s{late}", highlight=False)
    err.print(foreseen(recording, wire, trouble).sentence(len(recording)), highlight=False, soft_wrap=True)


@app.command()
def train(
    files: Annotated[list[str], typer.Argument(help="Recorded frames: CXI, NeXus/HDF5 (FILE::/path/in/file), .npy, folder of TIFFs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the prior goes.")] = Path("prior.h5"),
    frames: Annotated[str, typer.Option(help="Python slice of the frames of each file, for example 0::2.")] = ":",
    classes: Annotated[
        int | None, typer.Option(min=2, max=32, help="Number of classes (default: three, unless the frames clearly show more).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and SOM: the same seed, input and settings give the same prior.")] = 0,
    mask: Annotated[
        Path | None, typer.Option(help="True where a pixel is unusable, beside the file's own mask: .npy or FILE::/dataset.")
    ] = None,
    dark: Annotated[Path | None, typer.Option(help="Counts to subtract: .npy or FILE::/dataset; give the daemon the same.")] = None,
    library: Annotated[
        int | None, typer.Option(min=0, help="Most frames that are solved for the library of prototypes; 0 grows none (default: 512).")
    ] = None,
    starts: Annotated[int | None, typer.Option(min=1, help="Random starts of each frame's solve, the best one kept (default: 8).")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a prior that is there.")] = False,
) -> None:
    """Grow a prior from recorded frames, without labels, and freeze it.

    Solved frames are kept in OUTPUT.solving until the prior is written: the same command goes on where an interrupted one was.

    Example: streamprior train scan.cxi --frames 0::2 -o prior.h5
    """
    with faults():
        from streamprior.config import PrepareSettings
        from streamprior.sources.files import open_recordings
        from streamprior.stages.prepare import load_corrections, merged
        from streamprior.train.settings import TrainSettings

        recording = open_recordings(files, frames)
        shape = (recording.shape[1], recording.shape[2])
        _refuse_unwritable(output)
        if output.exists() and not force:
            raise ConfigError(f"{output}: is there already; name another file with -o, or replace it with --force")
        told = {"classes": classes, "seed": seed, "library": library, "starts": starts}
        settings = TrainSettings.model_validate({name: value for name, value in told.items() if value is not None})
        story = {"files": [one.name for one in recording.members], "frames": frames, "version": __version__}
        story |= {name: str(given) for name, given in (("mask", mask), ("dark", dark)) if given is not None}
        corrections = merged(load_corrections(PrepareSettings(mask=mask, dark=dark), shape), recording.geometry, shape)
        started = time.monotonic()
        prior = _grow(recording, settings, story, corrections, output)
    _print_prior(prior, output, time.monotonic() - started)


def _grow(recording: Any, settings: Any, story: dict[str, Any], corrections: Any, output: Path) -> Any:
    """Grow the prior and write it; what was solved lies beside it until then."""
    from streamprior.prior import save_prior
    from streamprior.train.grow import grow_prior

    keep = output.with_name(f"{output.name}.solving")
    before = len(list(keep.glob("*.h5")))
    if before:
        err.print(f"{before} frames solved before lie in {keep}; those solved with these settings are taken over", highlight=False)
    with progress() as report:
        try:
            grown = grow_prior(recording, settings=settings, progress=report, provenance=story, corrections=corrections, keep=keep)
        except ValueError as error:
            raise ConfigError(f"{recording.name}: {error}") from error
        except OSError as error:
            raise ConfigError(f"{keep}: solved frames cannot be kept there ({error}); make it writable, or name another output") from error
    try:
        prior = save_prior(grown, output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot be written ({error.strerror}); name a file in a folder that can") from error
    if keep.exists():
        shutil.rmtree(keep)
    return prior


def _refuse_unwritable(file: Path) -> None:
    """Said before the work, not after it."""
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder; name a file in it")
    if not os.access(file.parent, os.W_OK):
        raise ConfigError(f"{file}: {file.parent} is no folder that can be written to; make it first, or name another")


@app.command()
def evaluate(
    prior: Annotated[Path, typer.Argument(help="Prior that `streamprior train` wrote.")],
    file: Annotated[str, typer.Argument(help="Recorded frames that the prior never saw: CXI, HDF5 (FILE::/path/in/file), .npy, TIFFs.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of report.html, report.json and pictures/.")] = Path("report"),
    frames: FramesOption = ":",
    most: Annotated[int, typer.Option(min=1, help="Frames that are judged, evenly spaced over those that are bright enough.")] = 200,
    swap: Annotated[bool, typer.Option("--swap", help="Also the other direction: grow on these frames, judge on the prior's.")] = False,
    mask: Annotated[Path | None, typer.Option(help="True where a pixel is unusable, as given to train: .npy or FILE::/dataset.")] = None,
    dark: Annotated[Path | None, typer.Option(help="Counts to subtract, as given to train: .npy or FILE::/dataset.")] = None,
) -> None:
    """Error analysis on frames the prior never saw: every baseline that could beat it, in numbers and pictures.

    Example: streamprior evaluate prior.h5 scan.cxi --frames 1::2 -o report
    """
    with faults():
        from streamprior.config import PrepareSettings
        from streamprior.evaluate.report import write_report
        from streamprior.evaluate.study import choose, study, swapped, title_of
        from streamprior.prior import load_prior
        from streamprior.sources.files import open_recording
        from streamprior.stages.prepare import load_corrections

        first = load_prior(prior)
        own = load_corrections(PrepareSettings(mask=mask, dark=dark), first.geometry.detector_shape)
        _refuse_no_folder(output)
        with progress() as report:
            recording = open_recording(file, frames)
            directions = [(first, recording, title_of(first, recording, frames))]
            if swap:
                directions.append(swapped(first, file, frames, report, own))
            comparisons = [study(one, choose(one, shown, most, report, own), title, report) for one, shown, title in directions]
            written = write_report(output, first, comparisons, {"file": recording.name, "frames": frames, "most": most}, progress=report)
    _print_comparisons(written)


@app.command()
def catchup(
    run: Annotated[Path, typer.Argument(help="Folder of an archived run that has ended.")],
    file: Annotated[str, typer.Argument(help="The run's raw frames: CXI, HDF5 (FILE::/path/in/file), .npy, a folder of TIFFs.")],
    config: Annotated[Path, typer.Option("--config", "-c", help="Configuration of the daemon that wrote the run.")],
) -> None:
    """Refine what a run left out while it was behind, or its disk was full: exactly those frames, from their file, into the archive.

    The archive keeps masks, objects and numbers but no raw frames, so these come from FILE; all cores work (compute.workers). Frame i of
    the run is frame i of FILE, or the one that its row names where a file was replayed. The masks that the archive has must be those of
    FILE's frames; otherwise nothing more is written and the exit code is 2. Stopped, it goes on where it was. The ledger in the state
    folder is told: `streamprior ledger --frame N` then knows what had become of the frame, and when it was caught up with.

    Example: streamprior catchup archive/20260301-101500-1f0c2d3e scan.h5 --config beamline.yaml
    """
    with faults():
        from streamprior.catchup import CatchUp
        from streamprior.config import load_config, state_folder

        task = CatchUp(run, file, load_config(config), state_folder() / "ledger")
        gap = task.gap
        out.print(f"{len(gap.unrefined)} frames have a mask and no object, {len(gap.absent)} are absent")
        done = 0
        with progress() as report:
            for written in task.work():
                done += written
                report("catching up", done, len(gap.indices))
    out.print(f"{done} frames computed and written; the run is complete")
    out.print(task.tell_ledger(), markup=False, highlight=False, soft_wrap=True)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of an archived run.")],
    frames: Annotated[str, typer.Option(help="Python slice or index of the run's frames, for example 812 or 0::10.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder that the frames go into.")] = Path("handoff"),
    form: Annotated[str, typer.Option("--format", help="cohere (a folder a frame) or cxi (a file a frame, as PyNX reads it).")] = "cohere",
    data: Annotated[str | None, typer.Option(help="Recorded frames of the run: their counts go along. Needs --prior.")] = None,
    prior: Annotated[Path | None, typer.Option(help="The run's prior: says how the recorded frames were cropped.")] = None,
    mask: Annotated[Path | None, typer.Option(help="The daemon's prepare.mask, for --data.")] = None,
    dark: Annotated[Path | None, typer.Option(help="The daemon's prepare.dark, for --data.")] = None,
    flat: Annotated[Path | None, typer.Option(help="The daemon's prepare.flat, for --data.")] = None,
) -> None:
    """Hand objects and supports of a run to offline phasing, as the start of cohere or PyNX.

    Example: streamprior export archive/20260102-030405-0a1b2c3d --frames 812 --format cxi -o handoff
    """
    if form not in ("cohere", "cxi"):
        raise typer.BadParameter(f"{form!r}: choose cohere or cxi", param_hint="--format")
    if (data is None) != (prior is None):
        raise typer.BadParameter("give --data and --prior together, or neither", param_hint="--data / --prior")
    with faults():
        from streamprior.config import PrepareSettings
        from streamprior.evaluate.handoff import Measurement, hand_over

        _refuse_no_folder(output)
        corrections = PrepareSettings(mask=mask, dark=dark, flat=flat)
        measured = Measurement(data, prior, corrections) if data is not None and prior is not None else None
        with progress() as report:
            written = hand_over(run, frames, output, form, measured, report)
    out.print(f"{written} frames in [bold]{output}[/]", highlight=False, soft_wrap=True)
    if form == "cohere":
        words = f'in cohere\'s config_rec: init_guess = "continue", continue_dir = "{output.absolute()}/frame-..."'
    else:
        words = "PyNX: data=FILE object=FILE support=FILE auto_center_resize=False"
    out.print(words, markup=False, highlight=False, soft_wrap=True)


def _refuse_no_folder(folder: Path) -> None:
    """Said before the work, not after it."""
    nearest = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(f"{folder}: {nearest} is no folder that can be written to; name another")


@app.command()
def keys(
    folder: Annotated[Path, typer.Argument(help="Folder that the files go into; made where it is not there.")],
    name: Annotated[str, typer.Option(help="First part of the files' names: whose keys these are.")] = "daemon",
    token: Annotated[bool, typer.Option("--token", help="Make a token for the HTTP port (NAME.token) in place of keys.")] = False,
) -> None:
    """Make a pair of keys for encrypted ZMQ (CurveZMQ), or a token for the HTTP port; says what to copy where.

    Example: streamprior keys keys --name daemon
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise typer.BadParameter(f"{name!r}: letters, digits, dots and dashes", param_hint="--name")
    with faults():
        from streamprior.sources.curve import make_keys, make_token

        if token:
            file = make_token(folder, name)
            lines = [
                f"{file}: the token; only you may read it.",
                f"The daemon: `http: {{token_file: {file}}}`, or the token itself in $STREAMPRIOR_HTTP_TOKEN.",
                "Programs: $STREAMPRIOR_HTTP_TOKEN, or --token-file. A browser: http://HOST:PORT/?token=TOKEN, once.",
            ]
        else:
            secret, public = make_keys(folder, name)
            lines = [
                f"{secret}: the secret; it stays on this machine, and only you may read it (curve_secret_file, --curve-secret).",
                f"{public}: goes to the other side. Who binds keeps those of all who may connect in a folder (curve_clients_folder);",
                "who connects names the one of whom it connects to (curve_server_public_file, --curve-server).",
            ]
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def ledger(
    url: Annotated[str, typer.Option(help="Address of the daemon's HTTP port.")] = "http://127.0.0.1:9870",
    run: Annotated[str | None, typer.Option(help="Uid of a run or the beginning of it (default: all; with --frame the newest).")] = None,
    frame: Annotated[int | None, typer.Option(min=0, help="Index of a frame: what became of it, and why?")] = None,
    left_out: Annotated[
        bool, typer.Option("--left-out", help="Ranges of frames that are not published, or without refinement, and why.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Read this state folder in place of asking a daemon: what processes left there, running or not.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of sentences.")] = False,
    token_file: Annotated[Path | None, typer.Option(help="The daemon's token (default: $STREAMPRIOR_HTTP_TOKEN).")] = None,
) -> None:
    """What became of every frame. Exit 1 if a ledger does not balance.

    Example: streamprior ledger --url http://127.0.0.1:9870 --frame 812
    Example: streamprior ledger --folder ~/.local/state/streamprior --run 80b22e86 --left-out
    """
    found = _asked_of(url, token_file, run, frame, left_out) if folder is None else _read_in(folder, run, frame, left_out)
    if as_json:
        out.print_json(data=found)
    elif "fate" in found:
        words = f"frame {found['frame']} of run {found['run']}: {found['fate']}" + (f" ({found['why']})" if "why" in found else "")
        out.print(words, markup=False, highlight=False, soft_wrap=True)
    elif "left_out" in found:
        _print_left_out(found)
    else:
        _print_accounts(found.get("runs", [found]), found.get("earlier", ()))
    raise typer.Exit(0 if found.get("balanced", True) else 1)


def _asked_of(url: str, token_file: Path | None, run: str | None, frame: int | None, left_out: bool) -> Any:
    """The daemon's answer."""
    return _answered(url, token_file, "/ledger", {"run": run, "frame": frame, "left_out": 1 if left_out else None})


def _answered(url: str, token_file: Path | None, path: str, wanted: Mapping[str, Any], method: str = "GET") -> Any:
    """What a daemon says; `wanted` without those that are None is the query."""
    query = urllib.parse.urlencode({key: value for key, value in wanted.items() if value is not None})
    try:
        asked = urllib.request.Request(f"{url.rstrip('/')}{path}?{query}", headers=_authorised(token_file), method=method)
        with urllib.request.urlopen(asked, timeout=10) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        _fail(_reason(error))
    except (OSError, ValueError, http.client.HTTPException) as error:
        _fail(f"no daemon answers at {url} ({error}); is it running, and is http.port the same?")


@app.command()
def alarms(
    url: Annotated[str, typer.Option(help="Address of the daemon's HTTP port.")] = "http://127.0.0.1:9870",
    run: Annotated[str | None, typer.Option(help="Uid of a run or the beginning of it: all alarms that it had.")] = None,
    acknowledge: Annotated[str | None, typer.Option(metavar="SIGNAL", help="Say that its alarm was seen.")] = None,
    mute: Annotated[
        str | None,
        typer.Option(metavar="SIGNAL", help="For --minutes its alarm holds up no plan and is sent to nobody; the page shows it."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0, help="For how long; 0: no longer muted.")] = 30.0,
    by: Annotated[str | None, typer.Option(help="Who acknowledges (default: the user's name).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON instead of sentences.")] = False,
    token_file: Annotated[Path | None, typer.Option(help="The daemon's token (default: $STREAMPRIOR_HTTP_TOKEN).")] = None,
) -> None:
    """The alarms that stand; acknowledge one, mute a signal. Exit 1 while one stands that is not muted.

    Example: streamprior alarms --acknowledge flux
    Example: streamprior alarms --mute centre_row --minutes 30
    """
    if acknowledge is not None:
        _answered(url, token_file, f"/alarms/{urllib.parse.quote(acknowledge, '')}/acknowledge", {"by": by or _user()}, "POST")
    if mute is not None:
        _answered(url, token_file, f"/alarms/{urllib.parse.quote(mute, '')}/mute", {"minutes": minutes}, "POST")
    found = _answered(url, token_file, "/alarms", {"run": run})
    listed = found["standing"] if run is None else found["alarms"]
    if as_json:
        out.print_json(data=found)
    else:
        _print_alarms(listed, found)
    loud = [one for one in listed if run is None and not (one["muted_until"] or 0) > found["at"]]
    raise typer.Exit(1 if loud else 0)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        return ""


def _print_alarms(listed: Sequence[dict[str, Any]], found: Mapping[str, Any]) -> None:
    """A line each, and one for what is muted without an alarm."""
    for one in listed:
        frames = "" if one["first_frame"] is None else f", from frame {one['first_frame']}"
        frames += "" if one["last_frame"] is None else f" to {one['last_frame']}"
        words = f"{one['cause']}{frames}, raised {_clock(one['raised'])}"
        words += f", cleared {_clock(one['cleared'])}" if one["cleared"] is not None else ""
        if one["acknowledged"] is not None:
            words += f", acknowledged {_clock(one['acknowledged'])} by {one['acknowledged_by'] or 'somebody'}"
        out.print(words, markup=False, highlight=False, soft_wrap=True)
    if not listed:
        out.print("no alarm stands" if "standing" in found else f"no alarm in run {found['run']}", markup=False, highlight=False)
    for signal, until in found.get("muted", {}).items():
        out.print(f"{signal} is muted until {_clock(until)}", markup=False, highlight=False, soft_wrap=True)


def _clock(at: float) -> str:
    return time.strftime("%H:%M:%S", time.localtime(at))


def _read_in(folder: Path, run: str | None, frame: int | None, left_out: bool) -> dict[str, Any]:
    """The same answer from what lies in a state folder."""
    from streamprior.ledger import answer, read_ledger

    within = folder if folder.name == "ledger" else folder / "ledger"
    if not within.is_dir():
        _fail(f"{within} is no folder; name the state folder of the daemon (STREAMPRIOR_STATE), which keeps its ledger in `ledger`")
    try:
        return answer(read_ledger(within), run, frame, left_out)
    except KeyError:
        _fail(f"no run {run or 'yet'} in {within}; without --run all that there are are listed")


def _print_left_out(found: dict[str, Any]) -> None:
    for one in found["left_out"]:
        frames = f"{one['first']}" if one["first"] == one["last"] else f"{one['first']} to {one['last']}"
        frames += f", {one['frames']} of every {one['period']}" if "period" in one else ""
        out.print(f"{frames}: {one['fate']}", markup=False, highlight=False, soft_wrap=True)
    if found["more"]:
        out.print(f"and {found['more']} more ranges; --frame answers for any one of them")
    if not found["left_out"]:
        out.print(f"every frame of run {found['run']} is published", markup=False, highlight=False, soft_wrap=True)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="Timed: classify, refine, mosaic, path, wire, gpu, or all of them. Studies: crystals, measured, morphology, reuse, or"
            " prior for these four; scans; overload, kills and soak (half an hour), with verdicts."
        ),
    ] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line each instead of a table.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Interleaved repeats of each measurement.")] = 5,
    only: Annotated[str, typer.Option(help="Nothing but the rows with this in their name (what): 128x128, or 'two cores'.")] = "",
) -> None:
    """The benchmarks: ours beside the limit and beside what one would take instead, as ratios within one run; and the studies of the prior.

    Example: streamprior bench refine --json
    Example: streamprior bench refine --only 128x128
    """
    from streamprior_bench import BENCHMARKS, PRIOR, STUDIES, machine, rows

    known = {**BENCHMARKS, **STUDIES}
    chosen = {"all": tuple(BENCHMARKS), "prior": PRIOR}.get(what, (what,))
    if chosen[0] not in known:
        raise typer.BadParameter(f"{what!r}: choose from {', '.join(known)}, all, prior", param_hint="what")
    if as_json:
        print(json.dumps({"machine": machine()}), flush=True)  # noqa: T201 - exact lines, without a console's wrapping
    with faults():
        from streamprior.config import LogSettings
        from streamprior.daemon import configure_logging

        # What stages have to say goes to standard error, beside the lines.
        configure_logging(LogSettings(level="error"))
        measured = 0
        for name in chosen:
            found = []
            for row in rows(name, repeats, only):
                found.append(row)
                if as_json:
                    print(json.dumps({"benchmark": name, **row}), flush=True)  # noqa: T201
            if not as_json and found:
                _print_rows(name, found)
            measured += sum("skipped" not in row for row in found)
        if only and not measured:
            raise typer.BadParameter(f"no row of {', '.join(chosen)} has {only!r} in its name", param_hint="--only")


def _authorised(token_file: Path | None) -> dict[str, str]:
    from streamprior.config import own_token, read_secret

    with faults():
        token = own_token() if token_file is None else read_secret(token_file, "--token-file").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _reason(error: urllib.error.HTTPError) -> str:
    """The daemon's own sentence; whatever else listens there does not answer in JSON."""
    try:
        return str(json.load(error)["error"])
    except (ValueError, LookupError, TypeError):
        return f"{error.url} answered {error.code}; is that a streamprior daemon?"


def _fail(sentence: str) -> NoReturn:
    err.print("[bold red]error:[/] ", end="")
    err.print(sentence, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(2)


_MOST_COLUMNS = 8


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=title, title_justify="left")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if len(columns) > _MOST_COLUMNS:  # a terminal would show none of them
        table.add_column("what")
        table.add_column("")
        for row in rows:
            named = [(key, value) for key, value in row.items() if key != "what" and value is not None]
            table.add_row(str(row.get("what", "")), ", ".join(f"{key} {_cell(value)}" for key, value in named), end_section=True)
    else:
        for column in columns:
            table.add_column(column)
        for row in rows:
            table.add_row(*(_cell(row.get(key, "")) for key in columns))
    out.print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_accounts(accounts: Sequence[dict[str, Any]], earlier: Sequence[dict[str, Any]] = ()) -> None:
    """A line each; `earlier` are those of processes before this one."""
    from streamprior.ledger import account_line

    for account in (*accounts, *earlier):
        out.print(account_line(account), markup=False, highlight=False, soft_wrap=True)
    if not accounts and not earlier:
        out.print("no run yet")


def _print_prior(prior: Any, path: Path, seconds: float) -> None:
    geometry = prior.geometry
    out.print(f"[bold]{path}[/]: grown in {seconds:.0f} s, content hash {prior.content_hash}", highlight=False, soft_wrap=True)
    out.print(
        f"frames of {geometry.detector_shape[0]} x {geometry.detector_shape[1]}, cropped to {geometry.shape[0]} x {geometry.shape[1]}"
        f" around {geometry.centre}, support of {int(prior.support.sum())} pixels",
        highlight=False,
    )
    known = prior.training
    table = Table("class", "share of pixels", "radius, px", "mean photons")
    for k, name in enumerate(prior.class_names):
        radius = f"{known['class_mean_radius'][k]:.1f} +- {known['class_std_radius'][k]:.1f}"
        table.add_row(name, f"{known['class_share'][k]:.3f}", radius, f"{known['class_mean_intensity'][k]:.2f}")
    out.print(table)
    seeds, halves = known["stability_seeds"], known["stability_frames"]
    out.print(
        f"classes found again (adjusted Rand index): {seeds.mean():.2f} with other seeds (least {seeds.min():.2f}), "
        f"{halves.mean():.2f} in the other half of the frames (least {halves.min():.2f})",
        highlight=False,
        soft_wrap=True,
    )
    out.print(
        f"map of {len(known['som_codebook'])} units: quantisation error {known['quantization_error'].item():.2f}, "
        f"topographic error {known['topographic_error'].item():.3f}",
        highlight=False,
        soft_wrap=True,
    )
    _print_library(prior.library)


def _print_library(library: Any) -> None:
    from streamprior.train.prototypes import summary

    if library is None:
        out.print("no library of prototypes: every frame starts flat in the support")
        return
    told = summary(library)
    out.print(
        f"library of {told['prototypes']} prototypes ({told['means']} of them means of several frames) from {told['frames']} frames; "
        f"a frame that is further from all of them than {library.gate:g} % of these frames are from another's prototype starts flat",
        highlight=False,
        soft_wrap=True,
    )


def _print_comparisons(page: Path) -> None:
    """The summary of each comparison, with what went wrong beneath it; a leak is red."""
    from streamprior.evaluate.page import shown

    # What fits into 80 columns; the page has them all.
    columns = {"chi2_over_floor": "chi2/fl.", "free_llk": "free", "error": "error", "error_p75": "p75", "near_full_at_50": "near@50"}
    columns |= {"abstained": "abst."}
    for one in json.loads(page.with_name("report.json").read_text())["comparisons"]:
        title = f"{one['title']}: {len(one['frames'])} frames; object error against the {one['reference_is']}"
        table = Table(Column("arm", no_wrap=True), *columns.values(), title=title, title_justify="left")
        for row in one["summary"]:
            table.add_row(row["arm"], *(shown(row[name]) for name in columns))
        out.print(table)
        for note in (*one["findings"], *one["notes"]):
            out.print(note, markup=False, highlight=False, soft_wrap=True, style="bold red" if note.startswith("LEAK") else None)
    out.print(f"[bold]{page}[/]", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
