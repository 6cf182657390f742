"""Bad messages -> a bounded folder, where a person can look at what the sender got wrong."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import structlog

from streamprior.errors import WireError
from streamprior.records import Frame
from streamprior.seams import Document, Message, Parts

log = structlog.get_logger(__name__)


MOST_A_SECOND = 10
"""Messages of one reason that are written and logged; a sender that sends nothing but garbage must not hold up the frames between."""


_REPR = 100_000
"""Characters of a document that are kept."""


class Quarantine:
    """Keeps the newest `most_files` messages and at most `most_bytes` of them; each has a .txt beside it that says what was wrong.

    Of a flood it keeps MOST_A_SECOND for each reason, and says how many it passed over.
    """

    def __init__(
        self, folder: Path, most_files: int = 100, most_bytes: int = 256 * 2**20, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._most_files = most_files
        self._most_bytes = most_bytes
        self._count = itertools.count()
        self._clock = clock
        self._second = 0
        self._this_second: Counter[str] = Counter()
        self._passed_over: Counter[str] = Counter()

    def keep(self, message: Message, error: WireError) -> None:
        """Write the message down. A disk that will not take it costs the message's copy, not the run: the ledger has counted it."""
        second = int(self._clock())
        if second != self._second:
            self._second = second
            self._this_second.clear()
        self._this_second[error.reason] += 1
        if self._this_second[error.reason] > MOST_A_SECOND:
            self._passed_over[error.reason] += 1
            return
        log.warning("message quarantined", reason=error.reason, detail=error.detail, passed_over=self._passed_over.pop(error.reason, 0))
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}-{next(self._count)}-{error.reason}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if isinstance(message, bytes):
                (self._folder / f"{stem}.message").write_bytes(message[: self._most_bytes // 4])
            elif isinstance(message, tuple):
                self._keep_parts(stem, message)
            elif isinstance(message, Frame):
                np.save(self._folder / f"{stem}.npy", message.counts)
            (self._folder / f"{stem}.txt").write_text(f"{error}\n")
            self._forget()
        except OSError as failure:
            log.warning("quarantine folder cannot be written", folder=str(self._folder), error=str(failure))

    def _keep_parts(self, stem: str, message: Parts | Document) -> None:
        """The parts of a message one after another, or a document as it prints."""
        whole = b"".join(part if isinstance(part, bytes) else repr(part)[:_REPR].encode() for part in message)
        (self._folder / f"{stem}.message").write_bytes(whole[: self._most_bytes // 4])

    def _forget(self) -> None:
        files = sorted(self._folder.iterdir())
        sizes = [file.stat().st_size for file in files]
        while files and (len(files) > 2 * self._most_files or sum(sizes) > self._most_bytes):
            files.pop(0).unlink(missing_ok=True)
            sizes.pop(0)
