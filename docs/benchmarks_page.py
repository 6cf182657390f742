"""What `streamprior bench --json` measured -> docs/benchmarks.md: the targets and whether they are met, then every row."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markdown_table import table

Row = Mapping[str, Any]
Rows = Mapping[tuple[str, str], Row]
"""(benchmark, what) -> its row."""

MOST_NS = {3: 6.0, 49: 20.0}
"""Classes -> nanoseconds a pixel that classification may take on one core, at each of CLASSIFIED."""

CLASSIFIED = (104, 2048)
LEAST_OF_FLOOR = 0.90
REFINED = ("104x104", "128x128", "256x256", "64x64x64")
LEAST_TWO_CORES = {"classify": 1.8, "refine": 1.85}

VARIANTS = ("HIO", "RAAR", "shrink-wrap", "valid map", "weight", "half support", "whole support")

PATH = (
    ("path_frames_per_s", "refinement off", "frames/s without refinement", 5000.0, True),
    ("mask_p99_ms", "half load", "p99 latency of the mask at half load, ms", 5.0, False),
    ("reconstruction_p99_ms", "half load", "p99 latency of the reconstruction at half load, ms", 25.0, False),
)
"""(key, in the row's name, words, bound, whether it is a least)."""

LEAST_OF_STAGES = 0.85

CARD = (
    ("cufft_per_s", "ER-50 128x128, kernels", "batched cuFFT, frames/s", 20_000.0),
    ("fused_per_s", "ER-50 128x128, kernels", "one fused kernel, frames/s", 60_000.0),
    ("cufft_per_s", "ER-50 64x64x64, kernels", "batched cuFFT, volumes/s", 1_500.0),
    ("threads_2_of_kernels", "ER-50 128x128, host to host", "part of the kernels' rate, two threads", 0.8),
)
"""(key, row, words, least)."""

MEASURES = {
    "classify": "counts to class ids and mean distance, nanoseconds a pixel. The limit is the longer of two times, measured in the same"
    " run: that of the operations a pixel (counted in `benchmarks/streamprior_bench/classify.py`, a multiply-add as two) at the rate at"
    " which this core does nothing but multiply-adds, and that of moving its bytes. scipy is scipy.ndimage with scikit-learn; minisom is"
    " MiniSom's `winner` alone, given the projected features. Two cores: a thread for each, one frame at a time; the limit is what"
    " multiply-adds gain.",
    "refine": "50 iterations on a frame whose support is a third as wide as the field. The floor is their 100 transforms of the whole"
    " field as FFTW plans them, alone: less is possible where rows outside the support are zero and need none. scipy and numpy are plain"
    " loops over scipy.fft and numpy.fft in single precision, cohere is its `np` backend. Two cores: a thread for each over frames; cohere"
    " and scipy use two workers on a volume. Variants differ from plain error reduction in one thing and are held against the transforms"
    " that they ask for; *over plain* is their part of the floor over its. The default plan is what a daemon does to a frame with its"
    " default settings.",
    "mosaic": "a frame-pass is one frame put into one mosaic once, 128 x 128; the floor is its planned transforms alone, and beside it are"
    " an ePIE in plain scipy and Pty-Chi's best rate.",
    "path": "socket to archive, the sender sharing the cores; beside it the stages alone on as many threads."
    " Latencies count from when a frame was due at the sender. Where the time goes: CPU microseconds a frame of each room"
    " ([profile](decisions/0024-rooms-hand-over-batches.md#what-profiling-showed-since)). Frames are"
    " decompressed with the extra `decode`; with bitshuffle alone the path without refinement reaches a little more than half.",
    "wire": "one thread, messages of a DECTRIS stream to frames; beside it a bare parser and decompressor that check nothing. Spreads"
    " here are half the distance between the quartiles.",
    "gpu": "the same on a CUDA card; engines alone with all data on the card, and from host memory to host memory.",
}
"""Benchmark -> what its numbers are of."""

UNITS = {
    "_ns_per_pixel": ", ns/pixel",
    "_ns": ", ns/pixel",
    "_us": ", us",
    "_ms": ", ms",
    "_gb_per_s": ", GB/s",
    "_gflops_per_s": ", Gflop/s",
    "_frames_per_s": ", frames/s",
    "_passes_per_s": ", passes/s",
    "_messages_per_s": ", messages/s",
    "_volumes_per_s": ", volumes/s",
}
"""End of a key -> how its unit is written."""


def benchmarks_page(results: Path, promises: Sequence[Path]) -> str:
    """The page of one file that `streamprior bench --json` printed; and of those that the studies with a verdict printed."""
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    machine = next(line["machine"] for line in lines if "machine" in line)
    rows = {(line["benchmark"], line.get("what", "")): line for line in lines if "benchmark" in line}
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    text = [
        "# Benchmarks\n",
        f"`streamprior bench --json > benchmarks/results/{results.name}` on {machine['cpu']}, {machine['cores']} cores, load "
        f"{machine['load_1min']:.1f} at the start; Python {machine['python']}, {versions}. Contestants of a row take turns, numbers are "
        "medians, and the spread is the distance from the 10th to the 90th percentile in medians. Ratios are taken within a row; absolute "
        "times hold for this machine.\n",
        "## Targets\n",
        table(("target", "limit", "ours", "part of the limit", "peers", "asked for", "", "again with `streamprior bench`"), _targets(rows)),
    ]
    for name in dict.fromkeys(line["benchmark"] for line in lines if "benchmark" in line):
        text.append(f"## {name}\n\n{_sentence(MEASURES.get(name, ''))}")
        text.extend(_tables([line for line in lines if line.get("benchmark") == name]))
    told = [json.loads(line) for file in promises for line in file.read_text().splitlines()]
    text.append(
        "## Nothing lost\n\nOverload, kills and half an hour's soak, each with what it found and whether that is what is promised.\n"
    )
    text.append(table(("study", "", "found", "promise"), (_promise(line) for line in told if "benchmark" in line)))
    return "\n".join(text)


def _promise(line: Row) -> Sequence[str]:
    found = {key: value for key, value in line.items() if isinstance(value, int | float) and key != "seed"}
    words = ", ".join(f"{head(key)} {shown(key, value)}" for key, value in found.items())
    return f"`{line['benchmark']}`", line["what"], words, line.get("verdict", "")


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}\n"


def _tables(lines: Sequence[Row]) -> Iterator[str]:
    """Rows of one form make a table; peers that were not there are said below."""
    rows = [{key: value for key, value in line.items() if key != "benchmark"} for line in lines if "skipped" not in line]
    for columns in dict.fromkeys(tuple(row) for row in rows):
        same = [[shown(key, value) for key, value in row.items()] for row in rows if tuple(row) == columns]
        yield table([head(column) for column in columns], same)
    for line in lines:
        if "skipped" in line:
            yield f"Not measured: {line['skipped']}.\n"


def head(key: str) -> str:
    """A row's key as the head of a column, with its unit."""
    if key.endswith("_spread"):
        return f"spread of {head(key.removesuffix('_spread'))}"
    if "_over_" in key:
        return " / ".join(part.replace("_", " ") for part in key.split("_over_", 1))
    for end, unit in UNITS.items():
        if f"_{key}".endswith(end):
            return f"{f'_{key}'.removesuffix(end).strip('_')}{unit}".removeprefix(", ").replace("_", " ")
    return key.replace("_", " ")


def shown(key: str, value: Any) -> str:
    """Three significant digits; a spread in percent; nothing where a peer was not there."""
    if value is None:
        return "-"
    if key.endswith("_spread"):
        return f"{value:.0%}"
    if key == "label_agreement":  # its digits are the nines
        return f"{value:.7g}"
    return short(value) if isinstance(value, float) or key.endswith("_per_s") else str(value)


def short(number: float) -> str:
    """Three significant digits, never with an exponent: 0.0123, 4.5, 13,800."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 1000 else f"{rounded:.3g}"


def _targets(rows: Rows) -> Iterator[Sequence[str]]:
    for size in CLASSIFIED:
        for classes, most in MOST_NS.items():
            yield _classify(rows, f"{size}x{size} K={classes} float32, one core", most)
    for size in CLASSIFIED:
        yield _two_cores(rows, "classify", f"{size}x{size} K=3 float32, two cores", "limit_two_over_one", {})
    for shape in REFINED:
        yield _refine(rows, f"ER-50 {shape}, one core")
    for shape in REFINED:
        peers = {name: f"{name}_two_cores_frames_per_s" for name in ("scipy", "cohere")}
        yield _two_cores(rows, "refine", f"ER-50 {shape}, two cores", "floor_two_over_one", peers)
    for name in VARIANTS:
        yield _variant(rows, name)
    yield _path_share(rows)
    for key, what, words, bound, least in PATH:
        yield _path(rows, key, what, words, bound, least)
    for key, what, words, bound in CARD:
        yield _card(rows, key, what, words, bound)


def _classify(rows: Rows, what: str, most: float) -> Sequence[str]:
    asked, row = f"<= {most:g} ns/pixel", rows.get(("classify", what))
    if row is None:
        return _not_measured("classify", what, asked)
    peers = _peers({"scipy + scikit-learn": row["scipy_ns"], "MiniSom": row["minisom_ns"]}, "ns")
    bound = "arithmetic" if row["arithmetic_ns"] >= row["memory_ns"] else "memory"
    numbers = (f"{short(row['limit_ns'])} ns ({bound})", f"{short(row['ours_ns'])} ns", f"{row['limit_over_ours']:.2f}")
    return (f"classify {what}", *numbers, peers, asked, met(row["ours_ns"] <= most), _again("classify", what))


def _refine(rows: Rows, what: str) -> Sequence[str]:
    asked, row = f">= {LEAST_OF_FLOOR:.2f} of the transforms alone", rows.get(("refine", what))
    if row is None:
        return _not_measured("refine", what, asked)
    part = row["floor_over_ours"]
    peers = _peers({name: row[f"{name}_ms"] for name in ("scipy", "numpy", "cohere")}, "ms")
    numbers = (f"{short(row['floor_ms'])} ms", f"{short(row['ours_ms'])} ms", f"{part:.2f}")
    return (f"refine {what}", *numbers, peers, asked, met(part >= LEAST_OF_FLOOR), _again("refine", what))


def _two_cores(rows: Rows, benchmark: str, what: str, limit: str, peers: Mapping[str, str]) -> Sequence[str]:
    least = LEAST_TWO_CORES[benchmark]
    asked, row = f">= {least:g} x one core", rows.get((benchmark, what))
    if row is None:
        return _not_measured(benchmark, what, asked)
    ours = row["two_over_one"]
    numbers = (f"{row[limit]:.2f} x", f"{ours:.2f} x, {short(row['two_cores_frames_per_s'])} frames/s", f"{ours / row[limit]:.2f}")
    beside = _peers({name: row[key] for name, key in peers.items()}, "frames/s")
    return (f"{benchmark} {what}", *numbers, beside, asked, met(ours >= least), _again(benchmark, what))


def _variant(rows: Rows, name: str) -> Sequence[str]:
    """All shapes of one variant: they were asked to run at the same part of the floor as plain error reduction."""
    asked = f">= {LEAST_OF_FLOOR:.2f} of the transforms alone"
    found = [row for (one, what), row in rows.items() if one == "refine" and what.startswith(f"{name}, ")]
    if not found:
        return _not_measured("refine", name, asked)
    parts, plain = ([row[key] for row in found] for key in ("floor_over_ours", "plain_floor_over_ours"))
    told = f"plain ER {span(plain)} of them"
    return (
        f"refine {name}, {len(found)} shapes",
        told,
        "",
        span(parts),
        "",
        asked,
        met(min(parts) >= LEAST_OF_FLOOR),
        _again("refine", f"{name},"),
    )


def _path_share(rows: Rows) -> Sequence[str]:
    asked, words = f">= {LEAST_OF_STAGES} of the stages alone", "refinement on"
    row = _with(rows, "path", words, "path_over_stages")
    if row is None:
        return _not_measured("path", words, asked)
    rates = (f"{short(row[key])} frames/s" for key in ("stages_alone_frames_per_s", "path_frames_per_s"))
    share = row["path_over_stages"]
    return (f"path {row['what']}", *rates, f"{share:.2f}", "", asked, met(share >= LEAST_OF_STAGES), _again("path", words))


def _path(rows: Rows, key: str, what: str, words: str, bound: float, least: bool) -> Sequence[str]:
    asked, row = f"{'>=' if least else '<'} {short(bound)}", _with(rows, "path", what, key)
    if row is None:
        return _not_measured("path", words, asked)
    good = row[key] >= bound if least else row[key] < bound
    return f"path {words}", "", short(row[key]), "", "", asked, met(good), _again("path", what)


def _card(rows: Rows, key: str, what: str, words: str, least: float) -> Sequence[str]:
    asked, row = f">= {short(least)}", _with(rows, "gpu", what, key)
    if row is None:
        return _not_measured("gpu", f"{what}: {words}", asked)
    return f"gpu {what}: {words}", "", short(row[key]), "", "", asked, met(row[key] >= least), _again("gpu", what)


def _with(rows: Rows, benchmark: str, what: str, key: str) -> Row | None:
    """The first row of a benchmark that has the key, and the words in its name."""
    return next((row for (one, name), row in rows.items() if one == benchmark and what in name and key in row), None)


def _not_measured(benchmark: str, what: str, asked: str) -> Sequence[str]:
    return f"{benchmark} {what}", "", "not measured", "", "", asked, "", ""


def _peers(values: Mapping[str, float | None], unit: str) -> str:
    return ", ".join(f"{name} {short(value)} {unit}" for name, value in values.items() if value is not None)


def _again(benchmark: str, what: str) -> str:
    return f'`{benchmark} --only "{what}"`'


def met(good: bool) -> str:
    return "met" if good else "**missed**"


def span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
