"""Results -> the frames table: one row a frame, in Parquet parts by frame index."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from streamprior.records import Flag, Result

PART_ROWS = 1024
"""Frame indices a part: rewriting the growing part costs 2 ms, and a million frames make a thousand files."""

OPEN_PARTS = 4
"""Parts kept in memory a run: the growing one, and a few for frames that come late."""

NO_ORIGIN = -1
"""`origin` of a frame that was not replayed from a file: an integer column then stays one when pandas reads it."""

_FIXED: tuple[tuple[str, pa.DataType], ...] = (
    ("index", pa.int64()),
    ("origin", pa.int64()),
    ("detector_time", pa.float64()),  # Unix seconds, NaN where the detector gives none
    ("received", pa.float64()),  # Unix seconds
    ("published", pa.float64()),  # Unix seconds, when the archive took the row
    ("position_x", pa.float64()),  # metres, sample frame
    ("position_y", pa.float64()),
    ("chi2", pa.float64()),
    ("chi2_floor", pa.float64()),
    ("r_factor", pa.float64()),
    ("free_llk", pa.float64()),
    ("class_distance", pa.float64()),
    ("unit", pa.int32()),
    ("distance", pa.float64()),
    ("arm", pa.string()),
    ("flags", pa.uint32()),
    ("alarms", pa.string()),  # signals whose drift alarm is on, divided by commas
)

_X, _Y, _FLAGS = ([name for name, _ in _FIXED].index(name) for name in ("position_x", "position_y", "flags"))


def frames_schema(class_names: Sequence[str], drift_columns: Sequence[str]) -> pa.Schema:
    """Columns of the frames table: the fixed ones, two IoU for each class, the drift signals (float64, NaN where absent)."""
    measured = [*(f"iou_{name}" for name in class_names), *(f"iou_previous_{name}" for name in class_names), *drift_columns]
    return pa.schema([*_FIXED, *((name, pa.float64()) for name in measured)])


def frame_row(result: Result, published: float, class_names: Sequence[str], drift_columns: Sequence[str]) -> tuple[Any, ...]:
    """One row, in the order of `frames_schema`."""
    x, y = result.position or (math.nan, math.nan)
    return (
        result.index,
        NO_ORIGIN if result.origin is None else result.origin,
        math.nan if result.detector_time is None else result.detector_time,
        result.received,
        published,
        x,
        y,
        result.chi2,
        result.chi2_floor,
        result.r_factor,
        result.free_llk,
        result.class_distance,
        result.unit,
        result.distance,
        result.arm,
        result.flags,
        ",".join(result.alarms),
        *_values(result.iou, class_names),
        *_values(result.iou_previous, class_names),
        *_values(result.drift, drift_columns),
    )


def located(row: tuple[Any, ...], place: tuple[float, float]) -> tuple[Any, ...]:
    """The row of a frame whose position, (x, y) in metres, came later than the frame."""
    changed = list(row)
    changed[_X], changed[_Y] = place
    changed[_FLAGS] = row[_FLAGS] & ~Flag.NO_POSITION
    return tuple(changed)


def _values(measured: Mapping[str, float], names: Sequence[str]) -> list[float]:
    return [float(measured.get(name, math.nan)) for name in names]


class FrameTable:
    """Parquet files `part-00000.parquet`, ...: rows of PART_ROWS frame indices each, sorted, one row an index.

    A part is replaced whole (written beside, then renamed), so a reader sees the old one or the new one.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self._folder = folder
        self._schema = schema
        self._parts: OrderedDict[int, dict[int, tuple[Any, ...]]] = OrderedDict()
        self._counts: dict[int, int] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in part_paths(folder):
            self._counts[part_number(path)] = int(pq.read_metadata(path).num_rows)

    @property
    def rows(self) -> int:
        """Distinct frame indices written."""
        return sum(self._counts.values())

    @property
    def extent(self) -> int:
        """Highest index written, plus one."""
        if not self._counts:
            return 0
        return max(self._part(max(self._counts))) + 1

    def write(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """Put rows (index first) in their parts; when it returns, those parts are on disk."""
        touched: dict[int, list[tuple[Any, ...]]] = {}
        for row in rows:
            touched.setdefault(row[0] // PART_ROWS, []).append(row)
        for number, new in touched.items():
            part = self._part(number)
            part.update((row[0], row) for row in new)
            self._replace(number, part)
            self._counts[number] = len(part)

    def locate(self, positions: Mapping[int, tuple[float, float]]) -> int:
        """Put positions, index -> (x, y) metres, into the rows that are there; returns how many. Their parts are then on disk."""
        touched: dict[int, list[int]] = {}
        for index in positions:
            if index // PART_ROWS in self._counts:
                touched.setdefault(index // PART_ROWS, []).append(index)
        found = 0
        for number, indices in touched.items():
            part = self._part(number)
            known = {index: located(part[index], positions[index]) for index in indices if index in part}
            if known:
                part.update(known)
                self._replace(number, part)
            found += len(known)
        return found

    def _part(self, number: int) -> dict[int, tuple[Any, ...]]:
        part = self._parts.pop(number, None)
        if part is None:
            path = self._path(number)
            table = pq.read_table(path) if path.exists() else self._schema.empty_table()
            part = {row[0]: row for row in zip(*(column.to_pylist() for column in table.columns), strict=True)}
        self._parts[number] = part
        while len(self._parts) > OPEN_PARTS:
            self._parts.popitem(last=False)
        return part

    def _replace(self, number: int, part: Mapping[int, tuple[Any, ...]]) -> None:
        columns = zip(*(part[index] for index in sorted(part)), strict=True)
        arrays = [pa.array(column, type=field.type) for column, field in zip(columns, self._schema, strict=True)]
        partial = self._path(number).with_suffix(".partial")
        pq.write_table(pa.Table.from_arrays(arrays, schema=self._schema), partial, compression="zstd", use_dictionary=["arm"])
        partial.replace(self._path(number))

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.parquet"


def part_paths(folder: Path) -> list[Path]:
    """The parts of a frames table in the order of their frame indices."""
    return sorted(folder.glob("part-*.parquet"), key=part_number)


def part_number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def read_table(folder: Path) -> pa.Table:
    """The whole frames table, sorted by index; an empty table without columns where no part was written."""
    parts = part_paths(folder)
    return pa.concat_tables([pq.read_table(path) for path in parts]) if parts else pa.table({})
