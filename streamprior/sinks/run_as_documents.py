"""A finished run of the archive -> Bluesky documents: the numbers of its frames, linked to the raw run.

The arrays are not in them: the Bluesky family's readers know no zarr (bluesky-tiled-plugins 2.0). The start document says where they are.
"""

from __future__ import annotations

import math
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamprior.seams import Document
from streamprior.sinks.archive import read_about
from streamprior.sinks.rows import part_paths

STREAM = "primary"

_UNITS = {"detector_time": "s", "received": "s", "published": "s", "position_x": "m", "position_y": "m"}
_NAMESPACE = uuid.UUID("f2f5ad0c-1d0a-4a1e-9d5f-6f1d5b0c7f5e")
"""Of the uids of our documents, so that a run that is written again is the same run."""


def run_documents(folder: Path, archived_at: str) -> Iterator[Document]:
    """One run of the archive as Bluesky documents: start, a descriptor, an event page for each part of the frames table, stop.

    Events are in the order of the frames' indices; the column `index` says which frames there are. Their time is the detector's, or when
    the frame was received where the detector gives none; time stamps of the numbers are when the archive took them.

    Parameters
    ----------
    folder : of a run that is not running any more.
    archived_at : path in Tiled of the archive's own node, which holds class maps, objects and the image of the sample.
    """
    about = read_about(folder)
    uid, parts = about["uid"], part_paths(folder / "frames")
    yield "start", _start(about, archived_at)
    descriptor = _uid(uid, STREAM)
    if parts:
        yield "descriptor", _descriptor(uid, descriptor, about["opened"], pq.read_schema(parts[0]))
    events, last = 0, float(about["opened"])
    for part in parts:
        table = pq.read_table(part)
        page = _page(uid, descriptor, table, events)
        yield "event_page", page
        events, last = events + table.num_rows, max(last, *page["timestamps"]["index"])
    yield (
        "stop",
        {
            "uid": _uid(uid, "stop"),
            "run_start": uid,
            "time": about["closed"] or last,
            "exit_status": "success" if about["status"] == "complete" else "abort",
            "reason": about["end_reason"] or about["status"],
            "num_events": {STREAM: events} if parts else {},
        },
    )


def _start(about: Mapping[str, Any], archived_at: str) -> dict[str, Any]:
    raw = about["metadata"].get("start") if isinstance(about["metadata"].get("start"), Mapping) else {}
    links = {"raw": raw["uid"]} if isinstance(raw.get("uid"), str) else {}
    if isinstance(raw.get("scan_id"), int):
        links["scan_id"] = raw["scan_id"]
    return {
        **{_key(name): value for name, value in about["provenance"].items()},
        "uid": about["uid"],
        "time": about["opened"],
        "plan_name": "streamprior",
        "source": about["source"],
        "series": about["series"],
        "class_names": about["class_names"],
        "archive": archived_at,
        **links,
    }


def _descriptor(run: str, uid: str, opened: float, schema: pa.Schema) -> dict[str, Any]:
    keys = {_key(column.name): _data_key(column) for column in schema}
    return {
        "uid": uid,
        "run_start": run,
        "time": opened,
        "name": STREAM,
        "data_keys": keys,
        "object_keys": {"streamprior": list(keys)},
        "configuration": {"streamprior": {"data": {}, "timestamps": {}, "data_keys": {}}},
        "hints": {"streamprior": {"fields": ["chi2"]}},
    }


def _data_key(column: pa.Field) -> dict[str, Any]:
    key: dict[str, Any] = {"source": "streamprior", "shape": [], "object_name": "streamprior"}
    if pa.types.is_string(column.type):
        return key | {"dtype": "string"}
    key |= {"dtype": "number" if pa.types.is_floating(column.type) else "integer", "dtype_numpy": column.type.to_pandas_dtype()().dtype.str}
    return key | ({"units": _UNITS[column.name]} if column.name in _UNITS else {})


def _page(run: str, descriptor: str, table: pa.Table, before: int) -> dict[str, Any]:
    rows = table.to_pydict()
    times = [detector if math.isfinite(detector) else own for detector, own in zip(rows["detector_time"], rows["received"], strict=True)]
    return {
        "uid": [_uid(run, f"event {index}") for index in rows["index"]],
        "descriptor": descriptor,
        "seq_num": list(range(before + 1, before + table.num_rows + 1)),
        "time": times,
        "data": {_key(name): values for name, values in rows.items()},
        "timestamps": {_key(name): rows["published"] for name in rows},
        "filled": {},
    }


def _key(name: str) -> str:
    """A name as documents can have it: class names are free, and Bluesky reserves dots and slashes."""
    return re.sub(r"[./]", "_", name)


def _uid(run: str, name: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, f"{run} {name}"))
