"""The twin's table of faults and the reasons of WireError -> docs/wires.md.

The words are in wires.md.in; what stands there in double braces is made here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import get_args

from markdown_table import table
from streamprior_sim.faults import KINDS, Cell, Forecast
from streamprior_sim.faults import table as cells_of
from streamprior_sim.wires import Encoding

from streamprior.errors import WireError

FRAMES = 8
"""Images of the series in the table."""

REASONS = {
    "not_cbor": ("V2", "no CBOR, or CBOR that breaks off, nests without end or shares its values"),
    "not_stream_v1": ("V1", "no part of a stream V1 message where one is due: garbage"),
    "not_stream_v2": ("V2", "CBOR, but no start, image or end; several parts"),
    "not_document": ("documents", "bytes without prefix, name and body, or a body that its serializer cannot read"),
    "bad_document": (
        "documents",
        "against the event model; what it refers to never came; several images and none chosen; motors in degrees",
    ),
    "missing_key": ("V1, V2, EPICS", "a key without which nobody knows what it is"),
    "wrong_type": ("all", "a value of another type than its key's; an image that is no array"),
    "wrong_dtype": ("all", "pixels of another type than the series has, or than the prior can use"),
    "wrong_shape": ("all", "another shape than the series has, or the prior was made for; pixels that do not fill their shape"),
    "bad_compression": ("V1, V2, EPICS", "a blob that does not unpack, unpacks to less than it should, or is of an unknown kind"),
    "no_channel": ("V2", "an image without `source.channel`"),
    "too_large": ("all", "larger than `source.max_message_mb`, or claims to become so; refused before memory is taken"),
    "bad_index": ("all", "a frame or event number that is none, or beyond what a run can hold"),
    "stray_part": ("V1", "a part without the parts that must come before it"),
    "missing_part": ("V1", "an image whose next part never came"),
    "wrong_hash": ("V1", "the pixels are not those that the md5 was made of"),
    "unsafe_pickle": (
        "documents",
        "it names something to be called that is no part of an array, or needs an opcode that plain values do not",
    ),
    "outside_folder": ("documents", "a reference to a file outside `documents.folders`, by whatever path or link"),
    "no_reader": ("documents", "a reference to a kind of file, or a part of one, that nothing here reads"),
    "file_absent": ("documents", "a file that was not there, or did not hold the frame, within `documents.flush_s`"),
    "file_damaged": ("documents, files", "a file, or a frame in it, that cannot be read"),
}
"""Reason -> wires that give it, and what was wrong."""

COLUMNS: dict[str, Callable[[Cell], bool]] = {
    "V2": lambda cell: cell.wire.kind == "dectris-v2",
    "V1, in one message, split, or part by part": lambda cell: cell.wire.kind == "dectris-v1" and cell.wire.framing != "headerless",
    "V1 without headers": lambda cell: cell.wire.framing == "headerless",
    "documents": lambda cell: cell.wire.kind == "documents",
}


def wires_page(template: Path) -> str:
    """The page: the template with the tables of reasons and faults."""
    cells = cells_of(FRAMES)
    made = {
        "reasons": _reasons(),
        "faults": _faults(cells),
        "cells": str(len(cells)),
        "frames": str(FRAMES),
    }
    text = template.read_text()
    for name, content in made.items():
        text = text.replace(f"{{{{{name}}}}}", content)
    return text


def _reasons() -> str:
    if set(REASONS) != set(WireError.REASONS):
        raise ValueError(f"docs/wires_page.py: REASONS and WireError.REASONS differ by {set(REASONS) ^ set(WireError.REASONS)}")
    return table(("reason", "wire", "what was wrong"), [(f"`{reason}`", *REASONS[reason]) for reason in WireError.REASONS])


def _faults(cells: Iterable[Cell]) -> str:
    """A row a fault; what differs between encodings is said in its cell."""
    rows = []
    for kind in (None, *KINDS):
        of_kind = [cell for cell in cells if cell.fault == kind]
        told = "nothing" if kind is None else f"`{kind}`: {KINDS[kind].told}"
        rows.append((told, *(_words([cell for cell in of_kind if belongs(cell)]) for belongs in COLUMNS.values())))
    return table(("what goes wrong", *COLUMNS), rows)


def _words(cells: Iterable[Cell]) -> str:
    found: dict[str, set[Encoding]] = {}
    for cell in cells:
        found.setdefault(_account(cell.forecast), set()).add(cell.wire.encoding)
    if len(found) < 2:
        return next(iter(found), "-")
    # Every framing of a column must agree, or the table would hide one of them.
    if sum(map(len, found.values())) != len(get_args(Encoding)):
        raise ValueError(f"docs/wires_page.py: framings of one column differ: {found}")
    return "; ".join(f"{', '.join(sorted(encodings))}: {words}" for words, encodings in found.items())


def _account(forecast: Forecast) -> str:
    parts = [
        str(len(forecast.published)) if len(forecast.published) < FRAMES else "all",
        *(f"{count} `{reason}`" for reason, count in forecast.quarantined.items()),
        *([f"{forecast.duplicates} duplicate"] if forecast.duplicates else []),
        *([f"{forecast.missing} missing"] if forecast.missing else []),
        *([f"{len(forecast.altered)} with a wrong pixel"] if forecast.altered else []),
        *(["the struck position is missing"] if forecast.positions and len(forecast.positions) < len(forecast.published) else []),
    ]
    return ", ".join(parts)
