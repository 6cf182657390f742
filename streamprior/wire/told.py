"""What a sender tells beside its pixels (user_data in stream V2, an appendix in V1) -> positions, indices, metadata.

A value here was written by a stranger: it may be of any type and any size, and it may never cost its frame more than itself.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

MAX_INDEX = 10_000_000
"""Frames of one run that the ledger keeps apart; an index beyond it is taken for garbage rather than for memory to allocate."""


def of_frame(user_data: Mapping[str, Any]) -> tuple[tuple[float, float] | None, int | None]:
    """What our own senders put beside an image: position_m [x, y] in metres and origin, the index in a recorded file."""
    position, origin = user_data.get("position_m"), user_data.get("origin")
    place = None
    if isinstance(position, list | tuple) and len(position) == 2:
        place = _place(*position)
    return place, origin if is_count(origin) and origin < 2**63 else None


def late_positions(user_data: Any) -> dict[int, tuple[float, float]]:
    """Positions of earlier frames: positions_m [[index, x, y], ...] in metres, for a stage that answers later than the detector."""
    rows = user_data.get("positions_m") if isinstance(user_data, Mapping) else None
    if not isinstance(rows, list | tuple):
        return {}
    found = {}
    for row in rows:
        if isinstance(row, list | tuple) and len(row) == 3 and is_count(row[0]) and row[0] < MAX_INDEX:
            place = _place(row[1], row[2])
            if place is not None:
                found[row[0]] = place
    return found


def is_count(value: Any) -> TypeGuard[int]:
    """A whole number from 0; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def plain(value: Any, depth: int = 40) -> Any:
    """Containers of a wire (frozendict, tuple) as the JSON types that run metadata are made of; anything else becomes its text.

    Raises ValueError for containers within more than `depth` others: whoever writes the metadata down would run out of stack.
    """
    if not depth:
        raise ValueError("metadata of containers within containers within containers ...")
    if isinstance(value, Mapping):
        return {_writable(str(key)): plain(one, depth - 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, depth - 1) for one in value]
    if isinstance(value, int) and value.bit_length() > 64:
        return hex(value)  # in decimal it takes quadratic time, and Python refuses
    if isinstance(value, int | float | bool) or value is None:
        return value
    # The text of anything else (bytes, an array) is longer than itself, and nobody's metadata.
    return _writable(str(value)) if isinstance(value, str | datetime.date) else shown(value)


def shown(value: Any) -> str:
    """A value in an error's text: scalars as they are, anything that can be of any size by its type."""
    short = value is None or isinstance(value, float | str) or (isinstance(value, int) and value.bit_length() <= 64)
    return cut(repr(value)) if short else f"of type {type(value).__name__}"


def cut(text: str) -> str:
    """At most 200 characters of it."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def _place(x: Any, y: Any) -> tuple[float, float] | None:
    """A position that is none (null, text, NaN) is one that never came; it costs its frame nothing else."""
    numbers = [float(one) for one in (x, y) if isinstance(one, int | float) and not isinstance(one, bool) and math.isfinite(one)]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else None


def _writable(text: str) -> str:
    """JSON can spell half a surrogate pair, which no file and no socket would take later on."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
