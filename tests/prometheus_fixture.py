"""A real Prometheus for a test: it scrapes one daemon five times a second with the rules of deploy/, and answers over HTTP."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
OFTEN = "200ms"


@dataclass(frozen=True, slots=True)
class RunningPrometheus:
    """Its address."""

    url: str

    def ask(self, path: str, **query: str) -> Any:
        """What its API says; an expression that it cannot evaluate is an HTTPError."""
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10) as answer:
            told = json.load(answer)
        assert told["status"] == "success"
        assert not told.get("warnings")
        return told["data"]

    def values(self, expression: str) -> list[float]:
        """Of each series that an expression gives now."""
        return [float(series["value"][1]) for series in self.ask("query", query=expression)["result"]]

    def until(self, expression: str) -> None:
        """Ask until an expression gives something, for a minute at most."""
        deadline = time.monotonic() + 60
        while not self.values(expression):
            assert time.monotonic() < deadline, f"Prometheus never saw {expression}"


@contextmanager
def prometheus(folder: Path, port: int, target: int) -> Iterator[RunningPrometheus]:
    """Prometheus in a folder, on a port, beside the daemon at another; skips where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("Prometheus is not installed: apt-get install prometheus")
    folder.mkdir()
    config = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": OFTEN, "evaluation_interval": OFTEN}
    config["rule_files"] = [str(DEPLOY / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{target}"]}]
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    options = {"config.file": "prometheus.yaml", "storage.tsdb.path": "data", "web.listen-address": f"127.0.0.1:{port}"}
    words = [f"--{name}={value}" for name, value in options.items()]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            [program, *words, "--enable-feature=exemplar-storage"], cwd=folder, stdout=log, stderr=subprocess.PIPE, text=True
        )
        try:
            assert process.stderr is not None
            said = []
            while not said or "Server is ready to receive web requests" not in said[-1]:
                said.append(process.stderr.readline())
                assert said[-1], f"Prometheus did not start: {said}"
            yield RunningPrometheus(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            process.communicate(timeout=30)
