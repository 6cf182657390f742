"""A RunEngine's documents -> a daemon in the same process, for as long as a `with` block lasts."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog

from streamprior import daemon
from streamprior.config import Config, load_config
from streamprior.errors import ConfigError
from streamprior.ledger import Ledger
from streamprior.seams import Watch
from streamprior.sources.document_feeds import Subscription


@dataclass(frozen=True, slots=True)
class Attached:
    """A daemon that listens to a RunEngine: the address of its page, and its ledger."""

    url: str
    ledger: Ledger


@contextmanager
def attach(run_engine: Any, config: Config | str | os.PathLike[str], watches: Sequence[Watch] = ()) -> Iterator[Attached]:
    """Run a daemon in threads of this process, fed by what the RunEngine emits; at the end of the block it drains.

    It is ready when the block begins: kernels are compiled, and the next plan's documents are heard from the first. While its queues are
    full the RunEngine waits. A signal (Ctrl-C) remains the RunEngine's.

    Parameters
    ----------
    run_engine : bluesky's RunEngine, or whatever else has `subscribe` and `unsubscribe`.
    config : settings, or the file that holds them; `source.kind` must be documents, without a `path`.
    watches : see each result in order, behind the drift watch.

    Raises
    ------
    ConfigError
        The configuration is not one of documents, or cannot be had here: port taken, no such prior, no room for the archive.
    RuntimeError
        At the end: the daemon failed, or what it holds did not leave it within `runs.drain_s`. Its log says what happened.
    """
    settings = config if isinstance(config, Config) else load_config(config)
    if settings.source.kind != "documents" or settings.source.path is not None:
        raise ConfigError(
            f"source.kind is {settings.source.kind!r}{' with a path' if settings.source.path is not None else ''}; "
            "a daemon that is attached to a RunEngine takes documents: write kind: documents and no path"
        )
    if not structlog.is_configured():
        daemon.configure_logging(settings.log)
    feed = Subscription(settings.source.name)
    running = daemon.build(settings, watches, feed=feed)
    thread = _Running(running)
    try:
        thread.start()
        token = run_engine.subscribe(feed)
        try:
            yield Attached(running.server.url, running.ledger)
        finally:
            run_engine.unsubscribe(token)
    finally:
        thread.leave()
    if thread.code != daemon.EXIT_OK:
        raise RuntimeError(f"the attached daemon did not end well (exit code {thread.code}); its log says why")


class _Running:
    """Owns the thread in which a daemon runs, and what it ended with."""

    def __init__(self, running: daemon.Daemon) -> None:
        self._daemon = running
        self._ready, self._leaving = threading.Event(), threading.Event()
        self._refusal: ConfigError | None = None
        self._listening = False
        self._thread = threading.Thread(target=self._run, name="streamprior", daemon=True)
        self.code: int | None = None

    def start(self) -> None:
        """Returns once the path listens. Raises what keeps it from that."""
        self._thread.start()
        self._ready.wait()
        if self._refusal is not None:
            raise self._refusal
        if not self._listening:
            raise RuntimeError("the attached daemon ended before it listened; its log says why")

    def leave(self) -> None:
        """Drain; returns once the daemon has ended."""
        self._leaving.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            self.code = daemon.run(self._daemon, self._until)
        except ConfigError as error:
            # This process goes on, and would hold the folder against the next try.
            self._daemon.archive.close()
            self._refusal = error
        finally:
            self._ready.set()

    def _until(self) -> bool:
        """Asked over and over, for the first time when the path listens."""
        self._listening = True
        self._ready.set()
        return self._leaving.is_set()
