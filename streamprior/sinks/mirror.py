"""Runs that changed -> work on those that are due: a thread that keeps Tiled up with the archive, however often it goes away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from streamprior.errors import SinkUnavailable
from streamprior.sinks.archive import run_folders

log = structlog.get_logger(__name__)

MAX_WAITING = 1000
"""Folders remembered by name while Tiled is away; beyond, the archive folder itself is the memory and is scanned again."""

RUNS_A_PASS = 16
"""So that a long catch-up is interrupted by what is announced meanwhile."""

REFUSED_S = 30.0
"""How long a run that Tiled refused waits, while the others go on."""

LONGEST_PAUSE_S = 30.0
LAST_WORD_S = 1.0
"""Beyond the time to close, for work that was told to give up: it leaves its connection, or ends its process."""


@dataclass(frozen=True)
class Work:
    """What is done in Tiled. SinkUnavailable of `greet` or `tell` says that Tiled does not answer: everything is compared again later."""

    greet: Callable[[], bool]
    """See that Tiled answers, and make the container of it all. False where that was missing: Tiled is new, or has lost its memory."""

    tell: Callable[[Sequence[str], Callable[[], bool]], Iterable[tuple[str, str | None]]]
    """(names of run folders, has the time to close run out) -> each name with None, or with why it was refused. A name that does not come
    back is due again at once."""

    close: Callable[[], None]
    """Leave the connection."""

    forget: Callable[[], None] = lambda: None
    """Trust nothing that Tiled was told before: it was away, and may come back empty."""


class Mirror:
    """Does the work for what is announced and for all that the archive holds at the start, in a thread of its own.

    Reading `up` (Tiled answers and refuses nothing) and `error` (why not, and what to do; never the API key) is safe from any thread.

    Parameters
    ----------
    name : of the thread, and in the log.
    archive_folder : where the runs are.
    work : what is done with those that are due.
    period_s : pause between two passes.
    quiet_s : Tiled is asked for a sign of life this often when nothing changes, so that `up` is never older.
    newest_first : the order of the runs that are due; their folders' names begin with the time.
    """

    def __init__(self, name: str, archive_folder: Path, work: Work, period_s: float, quiet_s: float, newest_first: bool) -> None:
        self.up = False
        self.error = "Tiled was not asked yet"
        self._name, self._folder, self._work = name, archive_folder, work
        self._period_s, self._quiet_s, self._newest_first = period_s, quiet_s, newest_first
        self._lock = threading.Lock()
        self._waiting: dict[str, float] = {}  # folder's name -> not before this monotonic time; 0: at once
        self._rescan = True  # at start, and after Tiled was away: everything in the archive is compared
        self._greeted = 0.0
        self._closing = threading.Event()
        self._news = threading.Event()  # something was announced, or it is time to close
        self._gave_up = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin with everything the archive holds."""
        self._thread.start()

    def announce(self, run_folder: Path) -> None:
        """This run's folder has changed. Never waits."""
        with self._lock:
            if run_folder.name in self._waiting or len(self._waiting) < MAX_WAITING:
                self._waiting.setdefault(run_folder.name, 0.0)
            else:
                self._rescan = True
        self._news.set()

    def step(self) -> bool:
        """One pass over what waits. False where Tiled did not answer; then everything is compared again later."""
        try:
            refusal = self._pass()
        except SinkUnavailable as error:
            self._complain(str(error))
            self._rescan = True
            self._work.forget()
            return False
        if refusal is not None:
            self._complain(refusal)
        elif not self._refused():
            self.up, self.error = True, ""
        return True

    def pending(self) -> bool:
        """Something that was announced, or lies in the archive, is not yet known to be in Tiled."""
        with self._lock:
            return self._rescan or bool(self._waiting)

    def close(self, timeout_s: float) -> bool:
        """Tell Tiled the last of it, for at most `timeout_s`. True where nothing is left; what is left, the next start finds."""
        self._closing.set()
        self._news.set()
        if self._thread.ident is None:
            self._gave_up.set()
            self._work.close()
        else:
            self._thread.join(timeout_s)
            self._gave_up.set()
            self._thread.join(LAST_WORD_S)
        return not self._thread.is_alive() and not self.pending()

    def _run(self) -> None:
        try:
            pause = 0.0
            while not self._closing.wait(pause):
                if self.step():
                    self._rest()
                    pause = 0.0
                else:
                    pause = min(LONGEST_PAUSE_S, max(self._period_s, 2 * pause))
            self._finish()
        finally:
            self.up = False
            self._work.close()

    def _rest(self) -> None:
        """After a quiet time the first frames of a run are told of at once, further ones a period later."""
        if self._closing.wait(self._period_s):
            return
        if not self._due():
            self._news.wait(self._quiet_s)
        self._news.clear()

    def _finish(self) -> None:
        with self._lock:
            self._waiting = dict.fromkeys(self._waiting, 0.0)
        while self.pending() and not self._gave_up.is_set():
            if not self.step():
                self._gave_up.wait(self._period_s)
            elif not self._due():
                break  # only what Tiled refuses is left

    def _pass(self) -> str | None:
        """The last refusal of this pass."""
        if self._rescan or self._due() or time.monotonic() - self._greeted > self._quiet_s:
            if not self._work.greet():
                if self._greeted:
                    log.warning("Tiled has lost what it was told: the whole archive is told again", mirror=self._name)
                self._rescan = True
            self._greeted = time.monotonic()
        if self._rescan:
            self._scan()
        names = self._due()[:RUNS_A_PASS]
        with self._lock:
            # Taken out first: what is announced while Tiled is being told must be told again.
            left = {name: self._waiting.pop(name) for name in names}
        refusal: str | None = None
        for name, why in self._work.tell(names, self._gave_up.is_set):
            del left[name]
            if why is not None:
                refusal = why
                with self._lock:
                    self._waiting[name] = time.monotonic() + REFUSED_S
        with self._lock:
            self._waiting = dict.fromkeys(left, 0.0) | self._waiting
        return refusal

    def _scan(self) -> None:
        self._rescan = False
        try:
            found = [folder.name for folder in run_folders(self._folder)]
        except OSError as error:
            raise SinkUnavailable(f"archive {self._folder}: cannot be listed ({error}); bring it back, it is tried again") from error
        with self._lock:
            self._waiting = dict.fromkeys(found, 0.0) | self._waiting

    def _due(self) -> list[str]:
        now = time.monotonic()
        with self._lock:
            return sorted((name for name, earliest in self._waiting.items() if earliest <= now), reverse=self._newest_first)

    def _refused(self) -> bool:
        with self._lock:
            return any(self._waiting.values())

    def _complain(self, error: str) -> None:
        """Once for each new trouble: the same one comes back with every try."""
        if error != self.error:
            log.warning("Tiled lags behind the archive", mirror=self._name, error=error)
        self.up, self.error = False, error
