"""A run in Tiled -> a recording: its frames in blocks, where the probe stood, and the start document that results are linked by."""

from __future__ import annotations

import io
import json
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from streamprior.config import PositionSettings, SourceSettings, TiledSettings, tiled_api_key
from streamprior.errors import ConfigError, SinkUnavailable
from streamprior.sources.files import FileSource
from streamprior.sources.recording import Recording, chosen, metres, whole
from streamprior.tiled_api import TiledApi, TiledRefused, node_path

_BLOCK_BYTES = 16 * 2**20
"""Of frames in one request: Tiled answers 10-40 requests a second, whatever their size."""

_ROW_BYTES = 256 * 2**20
"""A frame (or all those of one event) beyond is not asked for: so much is in memory at once."""

_TIMEOUT_S = 30.0

_NODES = 1000
"""Nodes of a run that are looked at, at most, and how deep: stream, group, array."""
_DEEP = 4

_START_BYTES = 100_000
"""Of a start document that travel with the results; a larger one is cut down to its plain entries."""


@dataclass(frozen=True, slots=True)
class _Node:
    """path : segments from the root. metadata : its own. specs : names."""

    path: tuple[str, ...]
    family: str
    structure: Mapping[str, Any]
    metadata: Mapping[str, Any]
    specs: tuple[str, ...]

    @property
    def text(self) -> str:
        return "/".join(self.path)


def open_tiled(
    uri: str,
    api_key: str | None,
    run: str = "latest",
    array: str | None = None,
    frames: str = ":",
    skip: Sequence[int] = (),
    positions: PositionSettings | None = None,
) -> Recording:
    """Open a run that is in Tiled, as Bluesky's TiledWriter writes it, or any stack of images.

    Parameters
    ----------
    uri, api_key : the server.
    run : uid or its beginning, scan number, key=value for the start document, or latest (by the start's time); the newest of several. With
        slashes before it: within that container.
    array : path of the frames within the run, or the end of it; None: the only stack of images there is.
    frames, skip : as for a file.
    positions : motors `x` and `y`, columns of the run's tables: event i belongs to frame i, or to the frames of its row.

    Returns
    -------
    Recording
        Named by the run's uid; metadata hold its start document under `start`.

    Raises
    ------
    ConfigError
        No answer, a key that is refused, no such run (the newest are named), no stack of images or several (they are named), no such motor.
    """
    api = TiledApi(uri, api_key, _TIMEOUT_S)
    try:
        found = _find_run(api, run)
        nodes = list(_walk(api, found))
        stack = _Blocks(api, _stack_of(found, nodes, array))
        places = _positions(api, stack, nodes, positions)
        start = found.metadata.get("start")
        metadata = {"tiled": api.base, "array": stack.node.text} | ({"start": _bounded(start)} if isinstance(start, Mapping) else {})
        return chosen(whole(PurePosixPath(*found.path), stack, positions=places, metadata=metadata), frames, skip)
    except TiledRefused as error:
        api.close()
        raise ConfigError(f"source.uri: {error}") from None
    except SinkUnavailable:
        api.close()
        raise ConfigError(f"source.uri: no Tiled answers at {api.base}; start it or correct the address") from None
    except ConfigError:
        api.close()
        raise


def tiled_source(source: SourceSettings, tiled: TiledSettings, positions: PositionSettings) -> FileSource:
    """The source that is a run in Tiled; it is looked for when the source is opened. Raises ConfigError where no server is named."""
    uri = source.uri or tiled.uri
    if uri is None:
        raise ConfigError("source.uri: a tiled source needs the address of a server, here or in tiled.uri")
    key = tiled_api_key(tiled)
    return FileSource(source, lambda: open_tiled(uri, key, source.run, source.array, source.frames, source.skip, positions))


def find_by_start(uri: str, api_key: str | None, uid: str) -> set[str]:
    """What Tiled holds, at any depth, of the raw run of this uid: `raw`, the run itself; `results`, our folder; `documents`, our numbers as
    a Bluesky run. Raises SinkUnavailable."""
    api = TiledApi(uri, api_key, _TIMEOUT_S)
    try:
        same = _deep_search(api, "uid", uid)
        ours = _deep_search(api, "raw", uid)
    finally:
        api.close()
    kinds = {"results" if "StreampriorRun" in node.specs else "raw" for node in same}
    return kinds | ({"documents"} if ours else set())


class _Blocks:
    """An array in Tiled, (rows, ..., H, W), as frames (N, H, W). Keeps the block that was read last: frames are asked for in order.

    node : where it is. each : frames in a row, of an event with several. Raises ConfigError where it is not to be read so.
    """

    def __init__(self, api: TiledApi, node: _Node) -> None:
        shape = tuple(int(side) for side in node.structure["shape"])
        kind = node.structure["data_type"]
        self.node = node
        self.dtype = np.dtype(f"{'>' if kind['endianness'] == 'big' else '<'}{kind['kind']}{kind['itemsize']}")
        self.each = int(np.prod(shape[1:-2]))
        self.shape = (shape[0] * self.each, *shape[-2:])
        self._api = api
        # A recording has no end that anybody would tell: its connections go with it.
        weakref.finalize(self, api.close)
        self._row = (self.each, *shape[-2:])
        self._row_bytes = int(np.prod(self._row)) * self.dtype.itemsize
        if not 0 < self._row_bytes <= _ROW_BYTES:
            raise ConfigError(f"{node.text} in Tiled: {self._row_bytes} bytes at a time, the limit is {_ROW_BYTES}; name another array")
        self._rows = max(1, _BLOCK_BYTES // self._row_bytes)
        self._first = -1
        self._block = np.empty((0, *self._row), self.dtype)
        self._refused = -1  # a block that Tiled could not read whole: its rows are asked for one by one

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        row, part = divmod(index, self.each)
        first = row // self._rows * self._rows
        if not self._first <= row < self._first + len(self._block) or self._first < 0:
            self._block, self._first = self._fetch(row, first)
        # A copy: a frame that waits for its turn must not hold the whole block.
        return np.array(self._block[row - self._first, part])

    def _fetch(self, row: int, first: int) -> tuple[npt.NDArray[Any], int]:
        if self._refused != first:
            try:
                return self._read(first, min(first + self._rows, self.shape[0] // self.each)), first
            except TiledRefused:
                self._refused = first
        try:
            return self._read(row, row + 1), row
        except TiledRefused as error:
            raise OSError(str(error)) from None

    def _read(self, first: int, last: int) -> npt.NDArray[Any]:
        path, rows = f"/array/full/{node_path(self.node.path)}", f"{first}:{last}"
        try:
            content = self._api.read(path, slice=rows)
        except TiledRefused:
            raise
        except SinkUnavailable:
            # Tiled's server drops a connection on which it has failed, and the pool learns of it with the next request.
            content = self._api.read(path, slice=rows)
        if len(content) != (last - first) * self._row_bytes:
            raise OSError(f"{len(content)} bytes came for {last - first} rows of {self._row_bytes}")
        return np.frombuffer(content, self.dtype).reshape(last - first, *self._row)


def _find_run(api: TiledApi, text: str) -> _Node:
    *inside, run = [part for part in text.split("/") if part] or [""]
    if run == "latest":
        found = _search(api, inside, "like", "uid", "%")
    elif "=" in run:
        key, _, value = run.partition("=")
        found = _search(api, inside, "eq", key.strip().removeprefix("start."), _literal(value.strip()))
    else:
        found = _named(api, inside, run)
    if not found:
        raise ConfigError(f"source.run: no run {text!r} in Tiled at {api.base}; {_newest(api, inside)}")
    return found[0]


def _named(api: TiledApi, inside: Sequence[str], run: str) -> list[_Node]:
    """By key, by scan number (the newest of that number), by the beginning of the uid."""
    node = api.get(f"/metadata/{node_path([*inside, run])}") if run else None
    if node is not None:
        return [_node(inside, node["data"])]
    by_number = _search(api, inside, "eq", "scan_id", int(run)) if run.isdecimal() else []
    if by_number or not run:
        return by_number
    # `_` and `%` stand for anything, so what comes is looked at again.
    begins = [node for node in _search(api, inside, "like", "uid", f"{run}%") if str(node.metadata["start"]["uid"]).startswith(run)]
    if len(begins) > 1:
        raise ConfigError(f"source.run: {run!r} begins the uid of several runs: {', '.join(map(_shown, begins))}; write more of it")
    return begins


def _search(api: TiledApi, inside: Sequence[str], operator: str, key: str, value: Any) -> list[_Node]:
    """Runs whose start document fits, newest first, the first few. Tiled compares times as text, which agrees until the year 2286."""
    query = {
        f"filter[{operator}][condition][key]": f"start.{key}",
        f"filter[{operator}][condition][{'pattern' if operator == 'like' else 'value'}]": json.dumps(value),
        "sort": "-start.time",
        "page[limit]": "5",
    }
    answer = api.get(f"/search/{node_path(inside)}", **query)
    return [_node(inside, item) for item in answer["data"]] if answer is not None else []


def _deep_search(api: TiledApi, key: str, value: str) -> list[_Node]:
    """Containers at any depth whose start document has this entry; Tiled sorts no deep search."""
    query = {"filter[eq][condition][key]": f"start.{key}", "filter[eq][condition][value]": json.dumps(value)}
    answer = api.get("/search-deep/", **query)
    return [_node((), item) for item in answer["data"]] if answer is not None else []


def _newest(api: TiledApi, inside: Sequence[str]) -> str:
    newest = _search(api, inside, "like", "uid", "%")
    return f"the newest are {', '.join(map(_shown, newest))}" if newest else f"there is none{' in ' + '/'.join(inside) if inside else ''}"


def _shown(node: _Node) -> str:
    start = node.metadata["start"]
    return f"{str(start.get('uid'))[:8]} (scan {start.get('scan_id')})"


def _literal(text: str) -> Any:
    """A value of a search as the document has it: a number where it is one, otherwise text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float | str) else text


def _node(inside: Sequence[str], item: Mapping[str, Any]) -> _Node:
    attributes = item["attributes"]
    structure, metadata = attributes.get("structure") or {}, attributes.get("metadata") or {}
    specs = tuple(str(spec["name"]) for spec in attributes.get("specs") or ())
    return _Node((*inside, item["id"]), attributes["structure_family"], structure, metadata, specs)


def _walk(api: TiledApi, top: _Node) -> Iterator[_Node]:
    """Every array and table of the run, and the containers they are in, from the top down."""
    yield top
    waiting, seen = [top], 1
    while waiting:
        node = waiting.pop(0)
        if node.family != "container" or len(node.path) - len(top.path) >= _DEEP:
            continue
        for child in _children(api, node):
            if seen >= _NODES:
                return
            seen += 1
            yield child
            waiting.append(child)


def _children(api: TiledApi, node: _Node) -> Iterator[_Node]:
    offset = 0
    while True:
        answer = api.get(f"/search/{node_path(node.path)}", **{"page[offset]": str(offset), "page[limit]": "100"})
        items = answer["data"] if answer is not None else []
        yield from (_node(node.path, item) for item in items)
        offset += len(items)
        if not items or not (answer.get("links") or {}).get("next"):
            return


def _stack_of(run: _Node, nodes: Sequence[_Node], array: str | None) -> _Node:
    arrays = [node for node in nodes if node.family == "array"]
    if array is None:
        fitting = [node for node in arrays if _is_stack(node)]
    else:
        fitting = [node for node in arrays if f"/{node.text}".endswith("/" + array.strip("/"))]
    if len(fitting) == 1 and _is_stack(fitting[0]):
        return fitting[0]
    if fitting and _is_stack(fitting[0]):
        found = f"several stacks of images: {_listed(run, fitting)}; name one"
    elif fitting:
        found = f"{_listed(run, fitting)} is no stack of images (N, rows, columns) of numbers; name another array"
    elif array is not None:
        found = f"no array {array!r} among {_listed(run, arrays) or 'none'}"
    else:
        found = f"no stack of images (N, rows, columns) among its arrays: {_listed(run, arrays) or 'it has none'}"
    raise ConfigError(f"source.array: run {run.text} in Tiled holds {found}")


def _is_stack(node: _Node) -> bool:
    shape = node.structure["shape"]
    return len(shape) >= 3 and 0 not in shape and node.structure["data_type"].get("kind") in ("u", "i", "f")


def _listed(run: _Node, nodes: Sequence[_Node]) -> str:
    return ", ".join("/".join(node.path[len(run.path) :]) or node.text for node in nodes[:8])


def _positions(api: TiledApi, stack: _Blocks, nodes: Sequence[_Node], settings: PositionSettings | None) -> npt.NDArray[np.float64] | None:
    """(N, 2) metres, NaN beyond the last event. Motors that come over a wire of their own are not looked for here."""
    if settings is None or settings.x is None or settings.address is not None:
        return None
    stream = stack.node.path[:-1]
    # Those of the frames' own stream first: others may have a motor of that name, too.
    near = sorted(nodes, key=lambda node: node.path[:-1] != stream)
    places = np.full((stack.shape[0], 2), np.nan)
    for side, motor in enumerate((settings.x, settings.y)):
        if motor is None:
            places[:, side] = 0.0
            continue
        values = np.repeat(_column(api, near, motor, "x" if side == 0 else "y") * _unit_m(nodes, near, motor, settings), stack.each)
        count = min(len(values), len(places))
        places[:count, side] = values[:count]
    return places


def _column(api: TiledApi, nodes: Sequence[_Node], motor: str, side: str) -> npt.NDArray[np.float64]:
    for node in nodes:
        if node.family == "table" and motor in node.structure["columns"]:
            content = api.read(f"/table/full/{node_path(node.path)}", column=motor, format="application/vnd.apache.arrow.file")
            return np.asarray(pa.ipc.open_file(io.BytesIO(content)).read_all()[motor].to_numpy(), np.float64)
        if node.family == "array" and node.path[-1] == motor and len(node.structure["shape"]) == 1:
            kind = node.structure["data_type"]
            dtype = f"{'>' if kind['endianness'] == 'big' else '<'}{kind['kind']}{kind['itemsize']}"
            return np.frombuffer(api.read(f"/array/full/{node_path(node.path)}"), dtype).astype(np.float64)
    columns = sorted({name for node in nodes if node.family == "table" for name in node.structure["columns"]})
    raise ConfigError(f"positions.{side}: the run has no column {motor!r}; it has {', '.join(columns[:20]) or 'none'}")


def _unit_m(nodes: Sequence[_Node], near: Sequence[_Node], motor: str, settings: PositionSettings) -> float:
    """Metres in the motor's unit: as the settings say, as the stream's descriptor says, millimetres."""
    said = [node.metadata.get("data_keys", node.metadata).get(motor) for node in near]
    said += [node.metadata for node in nodes if node.path[-1] == motor]
    unit: str = settings.unit or next((str(one["units"]) for one in said if isinstance(one, Mapping) and one.get("units")), "mm")
    scale = metres(unit)
    if scale is None:
        raise ConfigError(f"positions.unit: {motor!r} is in {unit!r}, which is no length; name the unit, or another motor")
    return scale


def _bounded(start: Mapping[str, Any]) -> dict[str, Any]:
    if len(json.dumps(start)) <= _START_BYTES:
        return dict(start)
    short = {key: value for key, value in start.items() if not isinstance(value, Mapping | list) and len(str(value)) <= 1000}
    # Of thousands of entries, the first hundred; the uid is what counts.
    return dict(list(short.items())[:100]) | {"uid": start.get("uid")}
