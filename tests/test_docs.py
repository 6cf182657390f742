"""The documents say what the code does: generated pages, links, and every setting, metric and function they name."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest

from streamprior.config import describe, load_config, make_config

ROOT = Path(__file__).parents[1]
GENERATOR: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES: dict[str, str] = GENERATOR["pages"]()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s]+)(?:#[^)]*)?\)")

# In pieces, so that this file does not find itself.
FOREIGN = re.compile(
    "|".join(
        [
            r"pypi\." + r"org|pythonhosted\." + r"org|npmjs\." + r"(?:org|com)|anaconda\." + r"org|(?:extra-)?index-" + r"url\b",
            r"(?<![\w.}/~])/(?:work|root|home/\w+|Users/\w+|tmp/\w+)" + r"/",
        ]
    )
)


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PAGES)
def test_a_generated_file_is_what_the_code_says(path: str) -> None:
    file = ROOT / path
    assert file.exists(), f"{path} is missing: run `python docs/generate.py`"
    assert file.read_text() == PAGES[path], f"{path} is stale: run `python docs/generate.py`"


def test_the_example_configuration_holds_the_defaults_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, *_ in describe():
        monkeypatch.delenv(f"STREAMPRIOR_{key.replace('.', '__').upper()}", raising=False)
    loaded = load_config(ROOT / "deploy" / "streamprior.yaml")
    assert loaded == make_config({"prior": "prior.h5"}, "defaults", relative_to=ROOT / "deploy")


def test_every_setting_metric_and_command_has_its_line() -> None:
    for key, _, _, reason in describe():
        assert f"| `{key}` |" in PAGES["docs/reference/settings.md"]
        assert reason, f"{key} does not say what it means"
    assert "| `streamprior_frames_dropped_total` | counter | `reason`, `stage` |" in PAGES["docs/reference/metrics.md"]
    assert "| `streamprior_stage_seconds` | histogram | `stage` |" in PAGES["docs/reference/metrics.md"]
    assert "| `-o, --output` | `Path` | `prior.h5` |" in PAGES["docs/reference/cli.md"]
    assert "| `FILE` | `str` | required |" in PAGES["docs/reference/cli.md"]


def test_the_benchmarks_page_is_made_from_timed_results_and_not_from_a_later_study() -> None:
    assert "-prior.jsonl" not in PAGES["docs/benchmarks.md"]
    assert "-scans.jsonl" not in PAGES["docs/benchmarks.md"]
    assert "## refine" in PAGES["docs/benchmarks.md"]


def doctored(folder: Path, photons: float, stop: float, arm: str, error: float) -> Path:
    """The newest results with another object error of one arm in the cells of this light and stop."""
    lines = [json.loads(line) for line in max(GENERATOR["RESULTS"].glob("*-prior.jsonl")).read_text().splitlines()]
    for line in lines:
        if line.get("benchmark") == "crystals" and (line["photons"], line["stop_px"], line["arm"]) == (photons, stop, arm):
            line["error"] = error
    file = folder / "doctored-prior.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return file


def test_the_page_on_the_prior_names_a_missed_target_by_its_number(tmp_path: Path) -> None:
    template = ROOT / "docs" / "prior.md.in"
    kept = GENERATOR["prior_page"](template, doctored(tmp_path, 1e5, 3.0, "full solve", 1e3))
    missed = GENERATOR["prior_page"](template, doctored(tmp_path, 1e5, 3.0, "full solve", 1e-3))
    target = "object error <= 1.10 x the full solve's at 1e5 photons"
    before, after = (next(line for line in page.splitlines() if target in line) for page in (kept, missed))
    assert int(re.findall(r"(\d+) of 6", after)[0]) == 2 + int((re.findall(r"(\d+) of 6", before) or ["0"])[0])
    assert re.search(r"\| 1e5 \| 3 \| 0% \|.* \*\*\d+\.\d\d\*\* \|", missed)


def mosaic_row(target: str, folder: Path, part: str, where: dict[str, Any], **changed: Any) -> str:
    """The line on a target of the page on the mosaic, made from the newest results with some numbers of some rows changed."""
    lines = [json.loads(line) for line in max(GENERATOR["RESULTS"].glob("*-scans.jsonl")).read_text().splitlines()]
    for line in lines:
        if line.get("part") == part and all(line.get(key) == value for key, value in where.items()):
            line.update(changed)
    file = folder / "doctored-scans.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page: str = GENERATOR["mosaic_page"](ROOT / "docs" / "mosaic.md.in", file)
    return next(line for line in page.splitlines() if line.startswith("|") and target in line)


STREAMED = {"arm": "streamed, then passes after the run"}


@pytest.mark.parametrize(
    ("target", "part", "where", "good", "bad"),
    [
        ("odd and even frames agree", "star", STREAMED, {"halves_disagreement": 0.26}, {"halves_disagreement": 0.27}),
        ("chi2 over all frames", "star", STREAMED, {"chi2": 0.0169}, {"chi2": 0.0171}),
        ("best of Pty-Chi", "star", STREAMED, {"halves_resolution_px": 0.01}, {"halves_resolution_px": 99.0}),
        ("the best offline one", "gold balls", {"arm": "streamed", "final": True}, {"error": 1e-6}, {"error": 9.0}),
        (
            "any of the",
            "gold balls",
            {"arm": "streamed", "final": False},
            {"worst_rise_of_any_region": 1.01},
            {"worst_rise_of_any_region": 1.5},
        ),
        ("are said", "faults", {"fault": "axes swapped"}, {"said": "check the signs"}, {"said": "nothing"}),
        ("10 % without position", "faults", {"fault": "10 % without position"}, {"error": 1e-6}, {"error": 9.0}),
    ],
)
def test_the_page_on_the_mosaic_says_which_targets_are_met(
    target: str, part: str, where: dict[str, Any], good: dict[str, Any], bad: dict[str, Any], tmp_path: Path
) -> None:
    assert mosaic_row(target, tmp_path, part, where, **good).endswith(" met |")
    if bad:
        assert mosaic_row(target, tmp_path, part, where, **bad).endswith(" **missed** |")


def test_an_error_that_rises_at_the_end_of_the_scan_is_a_missed_target(tmp_path: Path) -> None:
    last = max(json.loads(line).get("frames", 0) for line in max(GENERATOR["RESULTS"].glob("*-scans.jsonl")).read_text().splitlines())
    where = {"arm": "streamed", "final": False, "frames": last}
    assert mosaic_row("all that is well lit", tmp_path, "gold balls", where, error=9.0).endswith(" **missed** |")


def test_a_comparator_that_was_not_installed_is_named_and_no_target_is_called_met(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in max(GENERATOR["RESULTS"].glob("*-scans.jsonl")).read_text().splitlines()]
    for line in lines:
        if line.get("part") == "star" and line["arm"].startswith("Pty-Chi"):
            for key in ("chi2", "halves_disagreement", "halves_resolution_px", "seconds"):
                line.pop(key, None)
            line["note"] = "not run: No module named 'ptychi'"
    file = tmp_path / "doctored-scans.jsonl"
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    page = GENERATOR["mosaic_page"](ROOT / "docs" / "mosaic.md.in", file)
    assert next(line for line in page.splitlines() if "best of Pty-Chi" in line).endswith(" not measured |")
    assert "not run: No module named 'ptychi'" in page


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_every_relative_link_leads_somewhere(document: Path) -> None:
    targets = [target for _, target in LINK.findall(document.read_text()) if "://" not in target and not target.startswith("mailto:")]
    broken = [target for target in targets if not (document.parent / target).exists()]
    assert not broken, f"{named(document)}: no such file: {', '.join(broken)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_a_name_that_links_to_code_is_defined_there(document: Path) -> None:
    for text, target in LINK.findall(document.read_text()):
        if not (target.endswith(".py") and text.startswith("`")) or text == f"`{Path(target).name}`":
            continue
        name = text.strip("`").rpartition(".")[2]
        source = (document.parent / target).read_text()
        assert re.search(rf"\b(?:def|class) {re.escape(name)}\b", source), f"{named(document)}: {target} defines no {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_settings_metrics_and_tests_named_in_a_document_exist(document: Path) -> None:
    text = document.read_text()
    settings = {key for key, *_ in describe()}
    sections = {key.partition(".")[0] for key in settings if "." in key}
    for key in re.findall(r"`([a-z]+\.[a-z_]+)(?:: [^`]*)?`", text):
        assert key.partition(".")[0] not in sections or key.endswith((".py", ".nxs")) or key in settings, (
            f"{named(document)}: no setting {key}"
        )
    metrics = set(re.findall(r"streamprior_\w+", PAGES["docs/reference/metrics.md"])) | {"streamprior_sim", "streamprior_bench"}
    metrics.add("streamprior_runs")  # a container in Tiled
    unknown = {one for one in re.findall(r"\bstreamprior_[a-z_0-9]+", text) if re.sub(r"_(bucket|sum|count)$", "", one) not in metrics}
    assert not unknown, f"{named(document)}: no metric {', '.join(sorted(unknown))}"
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").glob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, f"{named(document)}: no test {test}"


CONFIGURATION = re.compile(r"^    (?:prior|recipe): .*\n(?:    .*\n)*", re.M)


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if CONFIGURATION.search(document.read_text())], ids=named)
def test_a_configuration_that_a_document_prints_is_one_that_the_daemon_takes(document: Path, tmp_path: Path) -> None:
    for block in CONFIGURATION.findall(document.read_text()):
        (tmp_path / "printed.yaml").write_text(textwrap.dedent(block).split("\nYAML")[0])
        load_config(tmp_path / "printed.yaml")


def tracked_files() -> list[Path]:
    """Files that git has, or would take."""
    listing = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout: nobody says which files belong to the repository")
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_package_registry_or_a_path_of_one_machine() -> None:
    found = []
    for file in tracked_files():
        try:
            text = file.read_text()
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{named(file)}: {match[0]}" for match in FOREIGN.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "foreign"),
    [
        ("https://py" + "pi.org/simple", True),
        ("--index-" + "url=x", True),
        ("/wo" + "rk/data", True),
        ("see /ho" + "me/ann/scan.cxi", True),
        ("~/data", False),
        ("../shared/data", False),
        ("/var/lib/streamprior", False),
    ],
)
def test_the_search_for_foreign_names_finds_what_it_is_for(text: str, foreign: bool) -> None:
    assert bool(FOREIGN.search(text)) == foreign
