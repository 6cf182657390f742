"""Folders of runs that grow -> Tiled: one thread that registers them and mirrors their growth, however often Tiled goes away."""

from __future__ import annotations

import threading
import time
from pathlib import Path, PurePath

import structlog

from streamprior.errors import SinkUnavailable
from streamprior.sinks.archive import run_folders
from streamprior.sinks.registration import Registrar, RunUnreadable
from streamprior.tiled_api import TiledApi, TiledRefused

log = structlog.get_logger(__name__)

MAX_WAITING = 1000
"""Folders remembered by name while Tiled is away; beyond, the archive folder itself is the memory and is scanned again."""

RUNS_A_PASS = 16
"""So that the growing run, which is the newest and goes first, never waits for a long catch-up."""

REFUSED_S = 30.0
"""How long a run that Tiled refused waits, while the others go on."""

LONGEST_PAUSE_S = 30.0
QUIET_S = 10.0
"""Tiled is asked for a sign of life this often when nothing grows, so that `up` is never older."""


class Catalog:
    """Mirrors the archive in Tiled. `announce` is all the archive sees of it, and never waits.

    Reading `up` (Tiled answers and refuses nothing) and `error` (why not, and what to do; never the API key) is safe from any thread.

    Parameters
    ----------
    uri, api_key : the Tiled server; a key in the uri's query is taken too.
    archive_folder : where the runs are.
    parent : path of the container for the runs, segments divided by "/".
    period_s : growth is told this often; every time is a database transaction in Tiled.
    seen_as : the archive folder as Tiled's machine sees it, where that differs.
    """

    def __init__(
        self,
        uri: str,
        api_key: str | None,
        archive_folder: Path,
        parent: str = "streamprior",
        period_s: float = 0.5,
        seen_as: PurePath | None = None,
    ) -> None:
        self.up = False
        self.error = "Tiled was not asked yet"
        self._folder = archive_folder.resolve()
        self._api = TiledApi(uri, api_key)
        self._registrar = Registrar(self._api, [part for part in parent.split("/") if part], seen_as or self._folder)
        self._period_s = period_s
        self._lock = threading.Lock()
        self._waiting: dict[str, float] = {}  # folder's name -> not before this monotonic time
        self._rescan = True  # at start, and after Tiled was away: everything in the archive is compared
        self._spoke = -QUIET_S
        self._closing = threading.Event()
        self._news = threading.Event()  # something was announced, or it is time to close
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._work, name="catalog", daemon=True)

    def start(self) -> None:
        """Begin with everything the archive holds."""
        self._thread.start()

    def announce(self, run_folder: Path) -> None:
        """This run's folder has changed."""
        with self._lock:
            if len(self._waiting) < MAX_WAITING:
                self._waiting.setdefault(run_folder.name, 0.0)
            else:
                self._rescan = True
        self._news.set()

    def step(self) -> bool:
        """One pass over what waits, newest run first. False where Tiled did not answer; then everything is compared again later."""
        try:
            refusal = self._pass()
        except SinkUnavailable as error:
            self._complain(error)
            self._rescan = True
            self._registrar.forget()
            return False
        if refusal is not None:
            self._complain(refusal)
        elif not self._refused():
            self.up, self.error = True, ""
        return True

    def _complain(self, error: SinkUnavailable) -> None:
        """Once for each new trouble: the same one comes back with every try."""
        if str(error) != self.error:
            log.warning("Tiled lags behind the archive", error=str(error))
        self.up, self.error = False, str(error)

    def pending(self) -> bool:
        """Something that was announced, or lies in the archive, is not yet known to be in Tiled."""
        with self._lock:
            return self._rescan or bool(self._waiting)

    def close(self, timeout_s: float) -> bool:
        """Tell Tiled the last of it, for at most `timeout_s`. True where nothing is left; what is left, the next start finds."""
        self._closing.set()
        self._news.set()
        if self._thread.ident is None:
            self._api.close()
        else:
            self._thread.join(timeout_s)
        self._gave_up.set()
        return not self._thread.is_alive() and not self.pending()

    def _work(self) -> None:
        pause = 0.0
        try:
            while not self._closing.wait(pause):
                answered = self.step()
                pause = self._period_s if answered else min(LONGEST_PAUSE_S, max(self._period_s, 2 * pause))
                if answered and not self._closing.wait(self._period_s):
                    # After a quiet time the first frames of a run are told of at once, further ones a period later.
                    self._news.wait(QUIET_S)
                    self._news.clear()
                    pause = 0.0
            with self._lock:
                self._waiting = dict.fromkeys(self._waiting, 0.0)
            while self.pending() and not self._gave_up.is_set():
                if not self.step():
                    self._gave_up.wait(self._period_s)
                elif not self._due():
                    break  # only what Tiled refuses is left
        finally:
            self.up = False
            self._api.close()

    def _pass(self) -> SinkUnavailable | None:
        if self._rescan or self._due() or time.monotonic() - self._spoke > QUIET_S:
            if not self._registrar.greet():
                self._rescan = True
            self._spoke = time.monotonic()
        if self._rescan:
            self._rescan = False
            found = [folder.name for folder in run_folders(self._folder)]
            with self._lock:
                self._waiting = dict.fromkeys(found, 0.0) | self._waiting
        refusal: SinkUnavailable | None = None
        for name in self._due()[:RUNS_A_PASS]:
            if self._gave_up.is_set():
                break
            refusal = self._sync(name) or refusal
        return refusal

    def _sync(self, name: str) -> SinkUnavailable | None:
        with self._lock:
            # Taken out first: what is announced while Tiled is being told must be told again.
            del self._waiting[name]
        try:
            self._registrar.sync(self._folder / name)
        except (TiledRefused, RunUnreadable) as error:
            with self._lock:
                self._waiting[name] = time.monotonic() + REFUSED_S
            return error
        return None

    def _due(self) -> list[str]:
        now = time.monotonic()
        with self._lock:
            return sorted((name for name, earliest in self._waiting.items() if earliest <= now), reverse=True)

    def _refused(self) -> bool:
        with self._lock:
            return any(self._waiting.values())
