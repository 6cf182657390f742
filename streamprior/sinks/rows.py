"""Results -> the frames table: one row a frame, in Parquet parts by frame index."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from streamprior.records import Flag, Result
from streamprior.sinks.chunks import replace_whole

PART_ROWS = 1024
"""Frame indices a part: rewriting the growing part costs 0.6 ms, and a million frames make a thousand files."""

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

_LOCATED = ~int(Flag.NO_POSITION)
"""What stays of a frame's flags when its position has come; an int, as `&` on the enum itself takes a microsecond."""


def frames_schema(class_names: Sequence[str], drift_columns: Sequence[str]) -> pa.Schema:
    """Columns of the frames table: the fixed ones, two IoU for each class, the drift signals (float64, NaN where absent)."""
    measured = [*(f"iou_{name}" for name in class_names), *(f"iou_previous_{name}" for name in class_names), *drift_columns]
    return pa.schema([*_FIXED, *((name, pa.float64()) for name in measured)])


def frame_columns(
    results: Sequence[Result], late: Mapping[int, tuple[float, float]], class_names: Sequence[str], drift_columns: Sequence[str]
) -> dict[str, list[Any]]:
    """Values of one row a result, by the names of `frames_schema`; `published` is not among them.

    late : index -> (x, y) metres of frames whose position came later than the frame.
    """
    nowhere = (math.nan, math.nan)
    places = [late.get(one.index) or one.position or nowhere for one in results]
    return {
        "index": [one.index for one in results],
        "origin": [NO_ORIGIN if one.origin is None else one.origin for one in results],
        "detector_time": [math.nan if one.detector_time is None else one.detector_time for one in results],
        "received": [one.received for one in results],
        "position_x": [x for x, _ in places],
        "position_y": [y for _, y in places],
        "chi2": [one.chi2 for one in results],
        "chi2_floor": [one.chi2_floor for one in results],
        "r_factor": [one.r_factor for one in results],
        "free_llk": [one.free_llk for one in results],
        "class_distance": [one.class_distance for one in results],
        "unit": [one.unit for one in results],
        "distance": [one.distance for one in results],
        "arm": [one.arm for one in results],
        "flags": [one.flags & _LOCATED if one.index in late else one.flags for one in results],
        "alarms": [",".join(one.alarms) for one in results],
        **{f"iou_{name}": [one.iou.get(name, math.nan) for one in results] for name in class_names},
        **{f"iou_previous_{name}": [one.iou_previous.get(name, math.nan) for one in results] for name in class_names},
        **{name: [one.drift.get(name, math.nan) for one in results] for name in drift_columns},
    }


@dataclass(frozen=True, slots=True)
class _Part:
    """PART_ROWS rows, of which those that are `present` count.

    columns : name -> one array a column, (PART_ROWS,). numbers : the same memory as an Arrow table, without the texts.
    """

    columns: Mapping[str, npt.NDArray[Any]]
    present: npt.NDArray[np.bool_]
    numbers: pa.Table


def _empty_part(schema: pa.Schema) -> _Part:
    columns = {field.name: _blank(field.type) for field in schema}
    numeric = [field for field in schema if not pa.types.is_string(field.type)]
    # Arrow shares the memory of the columns, so what is put into them later is in the table: made once, not with every write.
    shared = [pa.Array.from_buffers(field.type, PART_ROWS, [None, pa.py_buffer(columns[field.name])]) for field in numeric]
    return _Part(columns, np.zeros(PART_ROWS, np.bool_), pa.Table.from_arrays(shared, schema=pa.schema(numeric)))


def _table(part: _Part, schema: pa.Schema) -> pa.Table:
    """The rows that are there, in order; numbers are copied only where rows are missing between them."""
    places = np.flatnonzero(part.present)
    first, count = int(places[0]), len(places)
    whole = places[-1] - first + 1 == count
    table = part.numbers.slice(first, count) if whole else part.numbers.take(places)
    for number, field in enumerate(schema):
        if pa.types.is_string(field.type):
            table = table.add_column(number, field, pa.array(part.columns[field.name][places].tolist(), field.type))
    return table


class FrameTable:
    """Parquet files `part-00000.parquet`, ...: rows of PART_ROWS frame indices each, sorted, one row an index.

    A part is replaced whole (written beside, then renamed), so a reader sees the old one or the new one.

    Parameters
    ----------
    folder : made if absent, in a folder that is there; parts that lie there are continued.
    class_names, drift_columns : keys of `Result.iou` and of `Result.drift` that become columns.
    """

    def __init__(self, folder: Path, class_names: Sequence[str], drift_columns: Sequence[str]) -> None:
        self._folder = folder
        self._class_names = class_names
        self._drift_columns = drift_columns
        self._schema = frames_schema(class_names, drift_columns)
        self._parts: OrderedDict[int, _Part] = OrderedDict()
        self._counts: dict[int, int] = {}
        folder.mkdir(exist_ok=True)
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
        last = max(self._counts)
        return last * PART_ROWS + int(np.flatnonzero(self._part(last).present)[-1]) + 1

    def write(self, results: Sequence[Result], published: float, late: Mapping[int, tuple[float, float]]) -> None:
        """Put one row a result into their parts; when it returns, those parts are on disk.

        published : Unix seconds, when the archive took them. late : as `frame_columns` has it.
        """
        touched: dict[int, list[Result]] = {}
        for result in results:
            touched.setdefault(result.index // PART_ROWS, []).append(result)
        for number, new in touched.items():
            part = self._part(number)
            values = frame_columns(new, late, self._class_names, self._drift_columns)
            places = np.array(values["index"]) - number * PART_ROWS
            for name, column in values.items():
                part.columns[name][places] = column
            part.columns["published"][places] = published
            part.present[places] = True
            self._replace(number, part)
            self._counts[number] = int(np.count_nonzero(part.present))

    def read(self, indices: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Index -> row, a value a column, of those of these frames that have one."""
        found = {}
        for index in indices:
            part = self._part(index // PART_ROWS) if index // PART_ROWS in self._counts else None
            if part is not None and part.present[index % PART_ROWS]:
                found[index] = {name: column[index % PART_ROWS] for name, column in part.columns.items()}
        return found

    def forget(self) -> None:
        """Rows that a failed write put into memory are not written any more: the disk alone counts."""
        self._parts.clear()

    def locate(self, positions: Mapping[int, tuple[float, float]]) -> int:
        """Put positions, index -> (x, y) metres, into the rows that are there; returns how many. Their parts are then on disk."""
        touched: dict[int, list[int]] = {}
        for index in positions:
            if index // PART_ROWS in self._counts:
                touched.setdefault(index // PART_ROWS, []).append(index)
        found = 0
        for number, indices in touched.items():
            part = self._part(number)
            known = [index for index in indices if part.present[index % PART_ROWS]]
            for index in known:
                place = index % PART_ROWS
                part.columns["position_x"][place], part.columns["position_y"][place] = positions[index]
                part.columns["flags"][place] &= ~np.uint32(Flag.NO_POSITION)
            if known:
                self._replace(number, part)
            found += len(known)
        return found

    def _part(self, number: int) -> _Part:
        part = self._parts.pop(number, None)
        if part is None:
            part = _empty_part(self._schema)
            if number in self._counts:  # not `exists`, which says no where a disk hiccups: the part would be begun anew
                _fill(part, pq.read_table(self._path(number)), number * PART_ROWS)
        self._parts[number] = part
        while len(self._parts) > OPEN_PARTS:
            self._parts.popitem(last=False)
        return part

    def _replace(self, number: int, part: _Part) -> None:
        # Into memory first: to a file, Parquet writes every page by itself, which takes longer than making them. And uncompressed: numbers
        # that are measured shrink by an eighth, for twice the time.
        content = pa.BufferOutputStream()
        pq.write_table(_table(part, self._schema), content, compression="none", use_dictionary=["arm"], write_statistics=False)
        replace_whole(self._path(number), memoryview(content.getvalue()))

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:05d}.parquet"


def _blank(kind: pa.DataType) -> npt.NDArray[Any]:
    """A column without a value yet: NaN, 0 or an empty text."""
    empty = math.nan if pa.types.is_floating(kind) else "" if pa.types.is_string(kind) else 0
    return np.full(PART_ROWS, empty, kind.to_pandas_dtype())


def _fill(part: _Part, table: pa.Table, first: int) -> None:
    """Put a part as it was on disk into its columns; a column that it did not have stays blank."""
    places = table["index"].to_numpy() - first
    for name in part.columns.keys() & set(table.column_names):
        part.columns[name][places] = table[name].to_numpy()
    part.present[places] = True


def part_paths(folder: Path) -> list[Path]:
    """The parts of a frames table in the order of their frame indices."""
    return sorted(folder.glob("part-*.parquet"), key=part_number)


def part_number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def read_table(folder: Path) -> pa.Table:
    """The whole frames table, sorted by index; an empty table without columns where no part was written."""
    parts = part_paths(folder)
    return pa.concat_tables([pq.read_table(path) for path in parts]) if parts else pa.table({})


def read_newest(folder: Path, count: int) -> list[dict[str, Any]]:
    """The rows that were written last, at most `count` of the last parts, the newest last; each a mapping."""
    parts = [pq.read_table(path) for path in part_paths(folder)[-OPEN_PARTS:]]
    if not parts:
        return []
    rows: list[dict[str, Any]] = pa.concat_tables(parts).sort_by([("published", "ascending"), ("index", "ascending")]).to_pylist()
    return rows[-count:]


def read_columns(folder: Path, names: Sequence[str]) -> list[npt.NDArray[Any]]:
    """Columns of a frames table, (N,) each in the order of their frames' indices; nothing else of a long run is read."""
    parts = [pq.read_table(path, columns=[*names]) for path in part_paths(folder)]
    return [np.concatenate([part[name].to_numpy() for part in parts]) if parts else np.empty(0, np.int64) for name in names]


def read_indices(folder: Path) -> npt.NDArray[np.int64]:
    """(N,) indices of the frames in a frames table."""
    return read_columns(folder, ["index"])[0].astype(np.int64)
