"""A folder -> a running Tiled in a process of its own: for the demo and the tests; production points to a server by address.

`python -m streamprior.sinks.embedded FOLDER --readable DIR` prints one JSON line {"uri", "api_key"} when ready and serves until its
standard input ends, so that it never outlives the process that started it, however that one dies.
"""

from __future__ import annotations

import argparse
import json
import secrets
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streamprior.errors import SinkUnavailable

START_S = 90.0
"""A start takes 3-17 s, most of it imports; much longer on a busy machine."""


@dataclass(frozen=True, slots=True)
class EmbeddedTiled:
    """Where an embedded server answers: uri without the key, and the key."""

    uri: str
    api_key: str


@contextmanager
def embedded_tiled(folder: Path, readable: Sequence[Path], api_key: str | None = None, port: int = 0) -> Iterator[EmbeddedTiled]:
    """Serve Tiled on loopback while the block runs; its catalog stays in `folder`, so that a second start continues it.

    A process of its own, because Tiled and the daemon would otherwise share one interpreter lock.

    Parameters
    ----------
    folder : for Tiled's catalog, data and logs.
    readable : folders whose files may be registered.
    api_key : letters and digits only (Tiled refuses to start with others); made up if None.
    port : 0 takes a free one.

    Raises
    ------
    SinkUnavailable
        The server does not start; its own words are in `folder`/stderr.log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = api_key or secrets.token_hex(16)
    options = ["--port", str(port), *(part for one in readable for part in ("--readable", str(one)))]
    with (folder / "stderr.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(folder), *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    with server:
        try:
            yield _await_ready(server, key, folder)
        finally:
            assert server.stdin is not None
            server.stdin.close()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()


def _await_ready(server: subprocess.Popen[str], key: str, folder: Path) -> EmbeddedTiled:
    assert server.stdin is not None
    assert server.stdout is not None
    # Through the pipe, because a command line can be read by every user of the machine.
    server.stdin.write(key + "\n")
    server.stdin.flush()
    answered, _, _ = select.select([server.stdout], [], [], START_S)
    line = server.stdout.readline() if answered else ""
    if not line:
        server.kill()
        raise SinkUnavailable(f"the embedded Tiled did not start; see {folder / 'stderr.log'} and {folder / 'error.log'}")
    return EmbeddedTiled(**json.loads(line))


def serve(arguments: Sequence[str]) -> None:
    """Serve until standard input ends; its first line, if not empty, is the API key."""
    from tiled.server import SimpleTiledServer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Tiled's catalog, data and logs")
    parser.add_argument("--readable", type=Path, action="append", default=[], help="folder whose files may be registered; repeatable")
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    chosen = parser.parse_args(arguments)
    key = sys.stdin.readline().strip() or secrets.token_hex(16)
    readable = [one.resolve() for one in chosen.readable]
    with SimpleTiledServer(directory=chosen.folder, api_key=key, port=chosen.port, readable_storage=readable) as server:
        sys.stdout.write(json.dumps({"uri": f"http://127.0.0.1:{server.port}", "api_key": key}) + "\n")
        sys.stdout.flush()
        sys.stdin.read()


if __name__ == "__main__":
    serve(sys.argv[1:])
