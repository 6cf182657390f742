"""`python -m tests.fuzz`: hunt in a target, replay an input, or keep a corpus that reaches the same lines with few and short inputs."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path

from tests.fuzz.hunt import hunt, judged, lines_of
from tests.fuzz.mutate import Input
from tests.fuzz.targets import CORPUS, TARGETS, Target, dump_input, kept, load_input, target

_FILES = (
    "dectris_v2.py",
    "cbor.py",
    "compression.py",
    "told.py",
    "dectris_v1.py",
    "dectris_v1_parts.py",
    "documents.py",
    "pickles.py",
    "claims.py",
    "assets.py",
)
_LONGEST = 5000
"""Bytes of an input that is kept."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", default="v2", help=f"{', '.join(TARGETS)}, or MODULE:FUNCTION that makes a Target")
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="folder for the inputs that were answered wrongly")
    parser.add_argument("--replay", type=Path, help="run one kept input again")
    parser.add_argument("--keep", action="store_true", help="instead of hunting: write the corpus anew out of so many inputs")
    parser.add_argument(
        "--atheris", action="store_true", help="guided by coverage, where atheris is installed; runs until it finds something"
    )
    given = parser.parse_args()
    one = target(given.target)
    if given.replay:
        finding = judged(one, load_input(given.replay.read_bytes()))
        _say(finding.text if finding else "answered as it should be")
        return 1 if finding else 0
    if given.keep:
        _say(json.dumps(keep(given.target, one, given.inputs, given.seed)))
        return 0
    if given.atheris:
        return guided(given.target, given.inputs, given.seed)
    report = hunt(given.target, given.inputs, given.seed)
    corpus = kept(given.target)
    for found in report.findings:
        given.findings.mkdir(parents=True, exist_ok=True)
        file = given.findings / f"{given.target}-{given.seed}-{found.number}-{found.kind}.cbor"
        file.write_bytes(dump_input(one.input(given.seed, found.number, corpus)))
        _say(f"{file}\n{found.text}")
    rate = round(report.inputs / report.seconds)
    told = {"target": given.target, "seed": given.seed, "inputs": report.inputs, "inputs_per_s": rate}
    _say(json.dumps(told | {"grown_mb": round(report.grown_mb, 1), "findings": len(report.findings)}))
    return 1 if report.findings else 0


def keep(name: str, one: Target, inputs: int, seed: int) -> dict[str, int]:
    """Of the corpus and so many inputs, those that take a step of their own; the shortest first, so that few bytes reach much."""
    old = kept(name)
    candidates: dict[bytes, Input] = {}
    seen: set[tuple[str, int, int]] = set()
    for number in range(-len(old), inputs):
        messages = old[number] if number < 0 else one.input(seed, number, old)
        new = lines_of(one, messages, _FILES) - seen
        data = dump_input(messages)
        if new and len(data) <= _LONGEST:
            seen |= new
            candidates[data] = messages
    (CORPUS / name).mkdir(parents=True, exist_ok=True)
    for file in (CORPUS / name).glob("*.cbor"):
        file.unlink()
    reached: set[tuple[str, int, int]] = set()
    for data in sorted(candidates, key=len):
        steps = lines_of(one, candidates[data], _FILES)
        if steps - reached:
            reached |= steps
            (CORPUS / name / f"{hashlib.sha1(data, usedforsecurity=False).hexdigest()[:12]}.cbor").write_bytes(data)
    files = list((CORPUS / name).iterdir())
    return {"files": len(files), "bytes": sum(file.stat().st_size for file in files), "steps": len(reached)}


def guided(name: str, inputs: int, seed: int) -> int:
    """libFuzzer with the coverage of our own modules; inputs are those of the corpus and what it makes of them."""
    import atheris

    one = target(name)
    for module in sorted(module for module in sys.modules if module.startswith(("streamprior.wire.", "streamprior.sources."))):
        for function in vars(sys.modules[module]).values():
            if getattr(function, "__module__", "") == module and callable(function) and not isinstance(function, type):
                setattr(sys.modules[module], function.__name__, atheris.instrument_func(function))

    def run(data: bytes) -> None:
        # A length of two bytes before each part but the last.
        parts, at = [], 0
        while at + 2 <= len(data) and len(parts) < 30:
            size = int.from_bytes(data[at : at + 2], "little")
            parts.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        one.run([tuple(parts)] if name != "v2" else [(data,)])

    atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-seed={seed}", "-max_len=65536"], run)
    atheris.Fuzz()
    return 0


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


if __name__ == "__main__":
    raise SystemExit(main())
