"""Code and measurements -> reference pages for settings, metrics and command line, wires, benchmarks, and the example configuration.

`python docs/generate.py` writes them; tests/test_docs.py fails where one is stale.
"""

from __future__ import annotations

import inspect
import typing
from pathlib import Path
from typing import Any

import typer.models
from benchmarks_page import benchmarks_page
from markdown_table import table
from mosaic_page import mosaic_page
from prior_page import prior_page
from wires_page import wires_page

from streamprior import cli, config
from streamprior.errors import WireError
from streamprior.metrics import DROP_REASONS, Meters

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
"""Files that `streamprior bench --json` printed; those of `bench prior` end in -prior.jsonl, of `bench scans` in -scans.jsonl."""

PROMISES = ("overload", "kills")
"""Studies with a verdict, a file each."""

MADE = "<!-- Made from the code by `python docs/generate.py`; edits here are overwritten. -->\n\n"


def pages() -> dict[str, str]:
    """Path in the repository -> content of every file that is made from the code."""
    return {
        "docs/reference/settings.md": settings_page(),
        "docs/reference/metrics.md": metrics_page(),
        "docs/reference/cli.md": cli_page(),
        "docs/benchmarks.md": MADE.replace("the code", "measurements")
        + benchmarks_page(newest_timed(), [max(RESULTS.glob(f"*-{study}.jsonl")) for study in PROMISES]),
        "docs/prior.md": MADE.replace("the code", "measurements")
        + prior_page(ROOT / "docs" / "prior.md.in", max(RESULTS.glob("*-prior.jsonl"))),
        "docs/mosaic.md": MADE.replace("the code", "measurements")
        + mosaic_page(ROOT / "docs" / "mosaic.md.in", max(RESULTS.glob("*-scans.jsonl"))),
        "docs/wires.md": MADE + wires_page(ROOT / "docs" / "wires.md.in"),
        "docs/decisions/index.md": decisions_page(),
        "deploy/streamprior.yaml": config.example_yaml(),
    }


def settings_page() -> str:
    rows = [
        (f"`{key}`", f"`{kind}`", "required" if default == "required" else "none" if default is None else f"`{default}`", reason)
        for key, kind, default, reason in config.describe()
    ]
    intro = (
        "Every setting of the daemon. The YAML file holds them by section; an environment variable wins over the file: "
        "`STREAMPRIOR_TILED__URI` sets `tiled.uri`. An unknown key is an error. Relative paths in the file are relative to the file. "
        "[deploy/streamprior.yaml](../../deploy/streamprior.yaml) holds all of them at their defaults.\n\n"
    )
    return f"{MADE}# Settings\n\n{intro}{table(('setting', 'type', 'default', 'meaning'), rows)}"


def metrics_page() -> str:
    rows = []
    for family in example_meters().registry.collect():
        suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        name = family.name.removesuffix(suffix) + suffix
        rows.append((f"`{name}`", family.type, ", ".join(f"`{label}`" for label in labels), family.documentation))
    dropped = [(f"`{stage}`", f"`{reason}`") for stage, reason in DROP_REASONS]
    return (
        f"{MADE}# Metrics\n\n"
        "What `/metrics` shows. Every label value is there from the start, so that an alert sees a zero and not an absence.\n\n"
        f"{table(('metric', 'type', 'labels', 'meaning'), sorted(rows))}"
        f"\n## Why a frame is dropped\n\n{table(('stage', 'reason'), dropped)}"
        f"\n## Why a message is quarantined\n\n{table(('reason',), [(f'`{reason}`',) for reason in WireError.REASONS])}"
    )


def decisions_page() -> str:
    """The list of decisions: links for who reads the folder, and the site's order of pages."""
    files = sorted((ROOT / "docs" / "decisions").glob("0*.md"))
    listed = "".join(f"* [{file.read_text().partition(chr(10))[0].removeprefix('# ')}]({file.name})\n" for file in files)
    pages_in_order = "".join(f"{file.stem}\n" for file in files)
    intro = "Choices that others may ask about: context, decision, consequences, and the measurement each rests on.\n"
    return f"{MADE}# Decisions\n\n{intro}\n{listed}\n```{{toctree}}\n:hidden:\n\n{pages_in_order}```\n"


def example_meters() -> Meters:
    """The daemon's meters with one value for each label that a deployment chooses."""
    meters = Meters("detector", ["prepare"], ["archive"], ["core"], ["flux"])
    meters.build_info(version="", prior="", configuration="", device="")
    meters.watch(lambda: 0, lambda: 0, {"receive": lambda: 0})
    meters.watch_ledger(lambda: 0, lambda: True)
    meters.watch_path(lambda: False)
    meters.watch_spool(lambda: 0, lambda: True)
    meters.watch_crew(lambda: 0, lambda: False, lambda: 0)
    meters.watch_webhook(lambda: True, lambda: 0)
    return meters


def newest_timed() -> Path:
    """The newest measurement, and no study."""
    studies = {file for study in ("prior", "scans", *PROMISES) for file in RESULTS.glob(f"*-{study}.jsonl")}
    return max(set(RESULTS.glob("*.jsonl")) - studies)


def cli_page() -> str:
    commands = [info.callback for info in cli.app.registered_commands if info.callback is not None]
    return f"{MADE}# Command line\n\n{cli.app.info.help}\n\n" + "\n".join(_command(one) for one in commands)


def _command(callback: Any) -> str:
    hints = typing.get_type_hints(callback, include_extras=True)
    rows = []
    for name, parameter in inspect.signature(callback).parameters.items():
        kind, told = typing.get_args(hints[name])[:2]
        needed = parameter.default is inspect.Parameter.empty
        default = "required" if needed else "none" if parameter.default is None else f"`{parameter.default}`"
        rows.append((f"`{_spelling(name, told)}`", f"`{config.spelled(kind)}`", default, told.help or ""))
    body = inspect.getdoc(callback) or ""
    lines = [f"    {line.removeprefix('Example: ')}" if line.startswith("Example: ") else line for line in body.splitlines()]
    text = "\n".join(lines)
    return f"## streamprior {callback.__name__}\n\n{text}\n\n{table(('argument', 'type', 'default', 'meaning'), rows)}"


def _spelling(name: str, told: Any) -> str:
    if isinstance(told, typer.models.ArgumentInfo):
        return name.upper()
    # Inside Annotated, Typer keeps the first spelling of an option where its default would stand.
    given = [one for one in (told.default, *(told.param_decls or ())) if isinstance(one, str)]
    return ", ".join(given or (f"--{name.replace('_', '-')}",))


def write() -> None:
    for path, content in pages().items():
        file = ROOT / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


if __name__ == "__main__":
    write()
