"""A target and a seed -> findings: inputs are run in a child process, so that one that kills it is known by its number."""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from tests.fuzz.mutate import Input
from tests.fuzz.targets import Target, kept, target

SLOW_S = 1.0
"""CPU seconds of one input."""

STUCK_S = 120.0
"""Seconds without the next input after which the child is taken to be stuck."""


@dataclass(frozen=True, slots=True)
class Finding:
    """kind : escaped (an error that is no WireError), slow, crashed, stuck. number : of the input."""

    kind: str
    number: int
    text: str


@dataclass(slots=True)
class Report:
    """inputs : how many were run. seconds : wall clock. grown_mb : by how much the child's memory grew at most."""

    inputs: int = 0
    seconds: float = 0.0
    grown_mb: float = 0.0
    findings: list[Finding] = field(default_factory=list)


def hunt(name: str, inputs: int, seed: int, most_findings: int = 20) -> Report:
    """Inputs 0 to `inputs` of a seed; after a crash the next child goes on behind the input that crashed."""
    report, first, begun = Report(), 0, time.perf_counter()
    context = multiprocessing.get_context("spawn")
    while first < inputs and len(report.findings) < most_findings:
        current = context.RawValue("q", first)
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_explore, args=(name, seed, first, inputs, current, theirs), daemon=True)
        child.start()
        theirs.close()
        stuck = _listen(ours, child, current, report)
        first = int(current.value) + 1
        if stuck or child.exitcode:
            report.findings.append(Finding("stuck" if stuck else "crashed", first - 1, f"exit code {child.exitcode}"))
    report.inputs, report.seconds = first, time.perf_counter() - begun
    return report


def _listen(ours: Connection, child: Any, current: Any, report: Report) -> bool:
    """Findings of the child until it ends; True where it had to be ended."""
    seen, since = -1, math.inf  # while the child imports, no input is late
    while True:
        if ours.poll(1.0):
            try:
                found = ours.recv()
            except EOFError:
                break
            if isinstance(found, Finding):
                report.findings.append(found)
            else:
                report.grown_mb, since = max(report.grown_mb, found), time.monotonic()
        if current.value != seen and since < math.inf:
            seen, since = current.value, time.monotonic()
        elif time.monotonic() - since > STUCK_S:
            child.kill()
            child.join()
            return True
    child.join()
    return False


def _explore(name: str, seed: int, first: int, last: int, current: Any, out: Connection) -> None:
    os.nice(5)
    one, corpus = target(name), kept(name)
    for messages in (*corpus, *(one.build(tree) for tree in one.trees)):
        one.run(messages)  # everything is imported, and the libraries' buffers are made
    out.send(0.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(first, last):
        current.value = number
        messages = one.input(seed, number, corpus)
        found = judged(one, messages, number)
        if found is not None:
            out.send(found)
    out.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def judged(one: Target, messages: Input, number: int = 0) -> Finding | None:
    """What is wrong with the answer to an input, if anything is."""
    begun = time.thread_time()
    try:
        one.run(messages)
    except Exception:  # noqa: BLE001 - it is what is looked for
        return Finding("escaped", number, traceback.format_exc(limit=-6))
    spent = time.thread_time() - begun
    return Finding("slow", number, f"{spent:.1f} s") if spent > SLOW_S else None


def lines_of(one: Target, messages: Input, files: Sequence[str]) -> set[tuple[str, int, int]]:
    """Steps from line to line that an input takes within these files."""
    import sys

    found: set[tuple[str, int, int]] = set()

    def step(frame: Any, event: str, argument: Any) -> Any:
        name = frame.f_code.co_filename
        if not name.endswith(tuple(files)):
            return None
        last = frame.f_lineno

        def line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal last
            found.add((name, last, frame.f_lineno))
            last = frame.f_lineno
            return line

        return line

    sys.settrace(step)
    try:
        judged(one, messages)
    finally:
        sys.settrace(None)
    return found
