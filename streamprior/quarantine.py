"""Bad messages -> a bounded folder, where a person can look at what the sender got wrong."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import numpy as np
import structlog

from streamprior.errors import WireError
from streamprior.records import Frame
from streamprior.seams import Message

log = structlog.get_logger(__name__)


class Quarantine:
    """Keeps the newest `most_files` messages and at most `most_bytes` of them; each has a .txt beside it that says what was wrong."""

    def __init__(self, folder: Path, most_files: int = 100, most_bytes: int = 256 * 2**20) -> None:
        self._folder = folder
        self._most_files = most_files
        self._most_bytes = most_bytes
        self._count = itertools.count()

    def keep(self, message: Message, error: WireError) -> None:
        """Write the message down. A disk that will not take it costs the message's copy, not the run: the ledger has counted it."""
        stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{time.time_ns() % 10**9:09d}-{next(self._count)}-{error.reason}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if isinstance(message, bytes):
                (self._folder / f"{stem}.message").write_bytes(message[: self._most_bytes // 4])
            elif isinstance(message, Frame):
                np.save(self._folder / f"{stem}.npy", message.counts)
            (self._folder / f"{stem}.txt").write_text(f"{error}\n")
            self._forget()
        except OSError as failure:
            log.warning("quarantine folder cannot be written", folder=str(self._folder), error=str(failure))
        log.warning("message quarantined", reason=error.reason, detail=error.detail)

    def _forget(self) -> None:
        files = sorted(self._folder.iterdir())
        sizes = [file.stat().st_size for file in files]
        while files and (len(files) > 2 * self._most_files or sum(sizes) > self._most_bytes):
            files.pop(0).unlink(missing_ok=True)
            sizes.pop(0)
