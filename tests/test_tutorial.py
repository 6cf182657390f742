"""The tutorial, typed block by block as a new user would, keeps what it promises: a prior, an alarm, results in Tiled, nothing left out."""

from __future__ import annotations

import os
import queue
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs" / "tutorial.md").read_text(), re.M | re.S)
INSTALL, TERMINAL, *TYPED = BLOCKS


def block(beginning: str) -> str:
    """The only block that begins with these words."""
    (found,) = [one for one in TYPED if one.startswith(beginning)]
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Terminal:
    """A shell in the tutorial's folder, with this environment's programs, ports that are free, and a library that takes no minutes."""

    def __init__(self, home: Path) -> None:
        wire, page, tiled = free_port(), free_port(), free_port()
        self._instead = {
            "31001": str(wire),
            "127.0.0.1:8000": f"127.0.0.1:{tiled}",
            "tiled serve catalog": f"exec tiled serve catalog --port {tiled}",
            "streamprior run": "exec streamprior run",
            "streamprior ledger": f"streamprior ledger --url http://127.0.0.1:{page}",
            "streamprior train": "streamprior train --library 8 --starts 1",
        }
        self._environment = {
            **os.environ,
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "STREAMPRIOR_HTTP__PORT": str(page),
        }

    def script(self, text: str) -> list[str]:
        whole = TERMINAL.removeprefix(". .venv/bin/activate\n") + text
        for typed, meant in self._instead.items():
            whole = whole.replace(typed, meant)
        return ["bash", "-euc", whole]

    def type(self, beginning: str) -> str:
        done = subprocess.run(
            self.script(block(beginning)), env=self._environment, capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, f"{beginning}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def left_open(self, beginning: str) -> Iterator[Foreground]:
        """What stays in the foreground of a terminal of its own, until it is told to leave."""
        process = subprocess.Popen(
            self.script(block(beginning)), env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        said: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=listen, args=(process, said))
        reader.start()
        try:
            yield Foreground(process, said)
        finally:
            process.terminate()
            process.wait(timeout=60)
            reader.join()


class Foreground(NamedTuple):
    process: subprocess.Popen[str]
    said: queue.Queue[str | None]

    def until(self, words: str) -> str:
        """What it says up to these words."""
        heard = ""
        while (line := self.said.get(timeout=180)) is not None:
            heard += line
            if words in line:
                return heard
        raise AssertionError(f"it ended without {words!r}: {heard}")


def listen(process: subprocess.Popen[str], said: queue.Queue[str | None]) -> None:
    """Read on when nobody waits for a word: a full pipe would stop the program."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.put(line)
    said.put(None)


def test_the_tutorial_installs_as_the_readme_does() -> None:
    assert INSTALL.strip() in (ROOT / "README.md").read_text()
    assert TERMINAL.startswith(". .venv/bin/activate\n")


@pytest.mark.long
def test_every_block_of_the_tutorial_does_what_the_tutorial_says(tmp_path: Path) -> None:
    for library in ("minisom", "sklearn", "kneed"):
        pytest.importorskip(library, reason=f"{library} is not installed; it comes with the extra `train`")
    first = Terminal(tmp_path)
    first.type("streamprior twin bragg")
    assert "core" in first.type("streamprior train")
    with first.left_open("tiled serve") as tiled:
        tiled.until("Uvicorn running")
        assert "FAIL" not in first.type("cat > beamline.yaml")
        with first.left_open("streamprior run") as daemon:
            daemon.until(" ready ")
            first.type("streamprior replay monday.cxi --to tcp://127.0.0.1:31001 --frames 1::2")
            daemon.until("run closed")
            said = first.type("streamprior ledger\nstreamprior ledger --frame 17")
            assert "200 received = 200 published + 0 dropped + 0 quarantined + 0 in flight; 0 missing; balanced" in said
            assert re.search(r"frame 17 of run .*: published", said)
            first.type("cat > tuesday.yaml")
            assert re.search(r"drift alarm .*frame=20[0-9] ", daemon.until("run closed"))
            first.type("streamprior replay monday.cxi --to tcp://127.0.0.1:31001 --rate 5000")
            daemon.until("run closed")
            assert "400 received = 400 published" in first.type("streamprior ledger\nstreamprior ledger --left-out")
            assert "in flight; 0 missing; balanced" in first.type("streamprior catchup")
            read = first.type("cat > read.py")
            assert "(400, 128, 128)" in read
            assert "prior_hash" in read
            daemon.process.terminate()
            assert "draining" in daemon.until("draining")
            assert daemon.process.wait(timeout=60) == 0
