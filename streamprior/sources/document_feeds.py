"""Documents that come over no socket: from a file, or from a RunEngine in this process."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from streamprior.config import SourceSettings
from streamprior.errors import ConfigError
from streamprior.seams import Document, document_nbytes


class DocumentFile:
    """The source that is a file of documents: a JSON list, or a JSON line each, of {"name": ..., "doc": ...} or [name, document].

    Lines are read one by one; a list is read as a whole. What is no document goes on as one without a name, for the decoder to refuse.
    Raises ConfigError from `open` where there is no such file, it is no JSON, or a list larger than `max_message_mb`.
    """

    def __init__(self, settings: SourceSettings) -> None:
        self.name = settings.name
        self.exhausted = False
        self._settings = settings
        self._file: IO[bytes] | None = None
        self._documents: Iterator[Any] = iter(())

    def open(self) -> None:
        path, most = self._settings.path, self._settings.max_message_mb * 2**20
        if path is None:
            raise ConfigError("source.path: a source of recorded documents needs the path of their file")
        try:
            file = open(path, "rb")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise ConfigError(f"source.path: {path} cannot be read ({error.strerror})") from None
        self._file = file
        first = _parsed(file.readline(most))
        file.seek(0)
        if _is_document(first):
            self._documents = (_parsed(line) for line in iter(lambda: file.readline(most), b"") if line.strip())
            return
        size = path.stat().st_size
        listed = _parsed(file.read()) if size <= most else None
        if not isinstance(listed, list):
            why = "no list of documents in JSON" if size <= most else f"a list of {size} bytes; source.max_message_mb allows {most}"
            raise ConfigError(f"source.path: {path} is {why}; write one JSON document a line")
        self._documents = iter(listed)

    def receive(self, timeout_s: float) -> Document | None:
        try:
            found = next(self._documents)
        except StopIteration:
            self.exhausted = True
            return None
        if not _is_document(found):
            return "", {}
        return (found["name"], found["doc"]) if isinstance(found, dict) else (found[0], found[1])

    def close(self) -> None:
        self._documents = iter(())
        if self._file is not None:
            self._file.close()


class Subscription:
    """The source that is a callback of a RunEngine in this process: `RE.subscribe(subscription)`.

    It holds at most `most_bytes` of documents and then makes the RunEngine wait: nothing is ever left out. `close` lets it go on alone.
    """

    def __init__(self, name: str = "documents", most_bytes: int = 64 * 2**20) -> None:
        self.name = name
        self._most_bytes = most_bytes
        self._held: deque[tuple[Document, int]] = deque()
        self._bytes = 0
        self._closed = False
        self._turn = threading.Condition()

    def __call__(self, name: str, doc: Mapping[str, Any]) -> None:
        nbytes = document_nbytes(doc)
        with self._turn:
            # One document alone is always taken, however large.
            self._turn.wait_for(lambda: self._closed or not self._held or self._bytes + nbytes <= self._most_bytes)
            if not self._closed:
                self._held.append(((name, doc), nbytes))
                self._bytes += nbytes
                self._turn.notify_all()

    @property
    def exhausted(self) -> bool:
        return self._closed and not self._held

    def open(self) -> None:
        """Nothing: whoever has the RunEngine subscribes."""

    def receive(self, timeout_s: float) -> Document | None:
        with self._turn:
            self._turn.wait_for(lambda: self._closed or bool(self._held), timeout_s)
            if not self._held:
                return None
            document, nbytes = self._held.popleft()
            self._bytes -= nbytes
            self._turn.notify_all()
            return document

    def close(self) -> None:
        """No further document is taken; those that are held can still be received."""
        with self._turn:
            self._closed = True
            self._turn.notify_all()


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_document(value: Any) -> bool:
    parts: Sequence[Any] = [value.get("name"), value.get("doc")] if isinstance(value, dict) else value if isinstance(value, list) else []
    return len(parts) == 2 and isinstance(parts[0], str) and isinstance(parts[1], dict)
