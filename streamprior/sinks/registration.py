"""A run's folder -> its nodes in Tiled: a container, arrays, a table and the mosaic's file, all of which stay where they are on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

import numpy as np
import pyarrow.parquet as pq

from streamprior.errors import SinkUnavailable
from streamprior.sinks.archive import read_about
from streamprior.sinks.mosaic_file import DIMS, IMAGES
from streamprior.sinks.rows import part_number, part_paths
from streamprior.tiled_api import TiledApi, TiledRefused, create, make_containers, node_path

RUN_SPEC = {"name": "StreampriorRun", "version": "1"}

BLOCK_BYTES = 32_000_000
"""A block of the arrays as Tiled tells it: several chunks on disk, because the list of blocks travels with every growth."""


class RunUnreadable(SinkUnavailable):
    """A folder in the archive whose run.json or parts cannot be read: this run waits, the others go on."""


@dataclass
class _Known:
    """What Tiled was told of one run: its state as the metadata have it, for each node its data source's id and extent (frames, or
    parts), and which image of the sample."""

    told: tuple[Any, ...]
    image: tuple[Any, ...] | None = None
    nodes: dict[str, tuple[int, int]] = field(default_factory=dict)
    readable: bool = False


class Registrar:
    """Brings Tiled up to what a run's folder holds. Each call starts from what Tiled has, so it may be repeated and cut at any point.

    Parameters
    ----------
    api : the server.
    parent : path of the container that holds the runs.
    seen_as : where Tiled's machine sees the archive folder.
    """

    def __init__(self, api: TiledApi, parent: Sequence[str], seen_as: PurePath) -> None:
        self._api = api
        self._parent = tuple(parent)
        self._seen_as = seen_as
        self._known: dict[str, _Known] = {}
        self._landmark: str | None = None  # a run that was told whole: where that is gone, so is all

    def greet(self) -> bool:
        """See that Tiled answers, and make the parent container. True where it was there already, with what it was told.

        That the container is there alone says little: the live sink makes it, too, and is quicker where Tiled has lost its memory.
        """
        landmark = [self._landmark] if self._landmark is not None else []
        if self._api.get(f"/metadata/{node_path([*self._parent, *landmark])}") is not None:
            return True
        self._landmark = None
        self.forget()
        make_containers(self._api, self._parent)
        return False

    def forget(self) -> None:
        """Trust nothing that was told before: Tiled was away, and may have come back empty."""
        self._known.clear()

    def sync(self, folder: Path) -> None:
        """Register the run, or tell Tiled how it has grown.

        Subscribers hear of frames past the last extent; late frames that fill gaps are seen by whoever reads again.

        Raises
        ------
        SinkUnavailable
            Tiled does not answer (then everything waits), or refuses, or cannot read the files (then this run waits).
        RunUnreadable
            The folder holds no readable run.
        """
        about, parts, schema = _read(folder)
        known = self._known.get(folder.name) or self._discover(folder.name, about)
        state, running = _state(about), about["status"] == "running"
        if known.told == state and not running:
            return
        self._known[folder.name] = known
        try:
            if about["extent"]:
                # The table first: whoever hears that the arrays have grown finds the rows of those frames.
                if parts:
                    self._sync_table(folder.name, parts, schema)
                for name, layout in about["arrays"].items():
                    self._sync_array(folder.name, name, layout, about["extent"])
                self._check_readable(folder, known)
            if about.get("mosaic"):
                self._sync_mosaic(folder.name, about["mosaic"])
            if not running or known.told[0] != "running":  # at the end, and when a run that had ended goes on
                path = f"/metadata/{node_path([*self._parent, folder.name])}"
                self._api.send("PUT", path, {"metadata": _metadata(about), "specs": [RUN_SPEC]}, drop_revision="true")
                known.told = state
        except SinkUnavailable:
            del self._known[folder.name]
            raise
        self._landmark = folder.name
        if not running:
            del self._known[folder.name]

    def _discover(self, key: str, about: Mapping[str, Any]) -> _Known:
        path = [*self._parent, key]
        node = self._api.get(f"/metadata/{node_path(path)}")
        if node is None:
            # Called running until its arrays are there, so that a catch-up that is cut short is taken up again.
            body = {"id": key, "structure_family": "container", "metadata": _metadata({**about, "status": "running"}), "specs": [RUN_SPEC]}
            create(self._api, self._parent, body)
            return _Known(("running",))
        known = _Known(_state(node["data"]["attributes"]["metadata"]))
        for name in (*about["arrays"], "frames"):
            child = self._api.get(f"/metadata/{node_path([*path, name])}", include_data_sources="true")
            if child is not None:
                (source,) = child["data"]["attributes"]["data_sources"]
                structure = source["structure"]
                known.nodes[name] = source["id"], structure["shape"][0] if "shape" in structure else structure["npartitions"]
        mosaic = self._api.get(f"/metadata/{node_path([*path, 'mosaic'])}") if about.get("mosaic") else None
        if mosaic is not None:
            known.image = _image(mosaic["data"]["attributes"]["metadata"])
        return known

    def _sync_array(self, key: str, name: str, layout: Mapping[str, Any], extent: int) -> None:
        _, told = self._known[key].nodes.get(name, (None, 0))
        if told >= extent:
            return
        # Without a `num` Tiled's own client drops every message about this array as malformed, and only logs it (seen in 0.2.20).
        asset = {"data_uri": self._uri(key, name), "is_directory": True, "parameter": "data_uri", "num": 0}
        source = _source("array", array_structure(layout, extent), "application/x-zarr", [asset])
        patch = {
            "patch_shape": ",".join(map(str, (extent - told, *layout["frame_shape"]))),
            "patch_offset": ",".join(map(str, (told, *(0 for _ in layout["frame_shape"])))),
        }
        self._tell(key, name, source, extent, patch)

    def _sync_table(self, key: str, parts: Sequence[Path], schema: Any) -> None:
        _, told = self._known[key].nodes.get("frames", (None, 0))
        if told == len(parts):  # rows added to a known part need no word: Tiled opens the files at every request
            return
        assets = [
            {"data_uri": self._uri(key, f"frames/{part.name}"), "is_directory": False, "parameter": "data_uris", "num": part_number(part)}
            # A part may also appear between others, when late frames fill a gap; Tiled knows those it has by their address.
            for part in parts
        ]
        source = _source("table", table_structure(schema, len(parts)), "application/x-parquet", assets)
        self._tell(key, "frames", source, len(parts), {})

    def _sync_mosaic(self, key: str, mosaic: Mapping[str, Any]) -> None:
        """The file as a container whose arrays Tiled takes from the file itself, at every request.

        As arrays of their own they would have a shape in Tiled's catalog, and until that is told anew whoever reads gets an error: most of
        the time, as the canvas grows with nearly every image (seen in 0.2.20).
        """
        known, path = self._known[key], [*self._parent, key]
        if known.image == _image(mosaic):
            return
        metadata = {**mosaic, "axes": DIMS}
        if known.image is not None:
            self._api.send("PUT", f"/metadata/{node_path([*path, 'mosaic'])}", {"metadata": metadata}, drop_revision="true")
        else:
            asset = {"data_uri": self._uri(key, mosaic["file"]), "is_directory": False, "parameter": "data_uris", "num": 0}
            source = _source("container", None, "application/x-hdf5", [asset]) | {"parameters": {"dataset": IMAGES}}
            body = {"id": "mosaic", "structure_family": "container", "metadata": metadata, "data_sources": [source]}
            if create(self._api, path, body, verb="register") is None:
                raise TiledRefused(409, f"Tiled holds {'/'.join([*path, 'mosaic'])} although it said no; trying again")
        known.image = _image(mosaic)

    def _tell(self, key: str, name: str, source: dict[str, Any], extent: int, patch: Mapping[str, str]) -> None:
        known = self._known[key]
        path = [*self._parent, key]
        if name in known.nodes:
            number = known.nodes[name][0]
            self._api.send("PUT", f"/data_source/{node_path([*path, name])}", {"data_source": source | {"id": number}}, **patch)
        else:
            body = {"id": name, "structure_family": source["structure_family"], "data_sources": [source]}
            answer = create(self._api, path, body, verb="register")
            if answer is None:
                raise TiledRefused(409, f"Tiled holds {'/'.join([*path, name])} although it said no; trying again")
            number = answer["data_sources"][0]["id"]
        known.nodes[name] = number, extent

    def _check_readable(self, folder: Path, known: _Known) -> None:
        """Tiled registers files it may not read without a word; a reader would be the first to know."""
        if known.readable:
            return
        path = node_path([*self._parent, folder.name, "classes"])
        try:
            self._api.read(f"/array/full/{path}", slice="0:1,0:1,0:1")
        except TiledRefused as refusal:
            raise TiledRefused(
                refusal.status,
                f"Tiled cannot read {self._seen_as / folder.name} ({refusal.status}); add {self._seen_as} to `readable_storage` in its"
                " configuration, let its user read there, and mount it under the same path (or set the path it has there)",
            ) from refusal
        known.readable = True

    def _uri(self, key: str, name: str) -> str:
        return f"file://localhost{quote(str(self._seen_as / key / name))}"


def array_structure(layout: Mapping[str, Any], extent: int) -> dict[str, Any]:
    """Tiled's structure of an array of `extent` frames of layout's frame_shape and dtype, in blocks of whole chunks."""
    from tiled.structures.array import ArrayStructure, BuiltinDtype

    shape = tuple(layout["frame_shape"])
    dtype = np.dtype(layout["dtype"])
    chunk = layout.get("chunk_frames", extent)
    block = chunk * max(1, BLOCK_BYTES // (chunk * dtype.itemsize * int(np.prod(shape))))
    blocks = (block,) * (extent // block) + ((extent % block,) if extent % block else ())
    structure = ArrayStructure(
        shape=(extent, *shape), chunks=(blocks, *((side,) for side in shape)), data_type=BuiltinDtype.from_numpy_dtype(dtype)
    )
    return asdict(structure)


def tiles_structure(tile: int, count: tuple[int, int]) -> dict[str, Any]:
    """Tiled's structure of a float16 image made of tiles of `tile` x `tile` pixels, so many down and across."""
    from tiled.structures.array import ArrayStructure, BuiltinDtype

    shape, chunks = tuple(tile * number for number in count), tuple((tile,) * number for number in count)
    return asdict(ArrayStructure(shape=shape, chunks=chunks, dims=DIMS, data_type=BuiltinDtype.from_numpy_dtype(np.dtype(np.float16))))


def table_structure(schema: Any, parts: int) -> dict[str, Any]:
    """Tiled's structure of a table of `parts` files with this Arrow schema."""
    from tiled.structures.table import TableStructure

    return asdict(TableStructure.from_schema(schema, npartitions=parts))


def _source(family: str, structure: Mapping[str, Any] | None, mimetype: str, assets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "structure_family": family,
        "structure": structure,
        "mimetype": mimetype,
        "parameters": {},
        "assets": list(assets),
        "management": "external",
    }


def _metadata(about: Mapping[str, Any]) -> dict[str, Any]:
    """Content of run.json as Tiled has it: the start document of the raw run stands on top, where it stands with the raw run itself, so
    that one search for start.uid finds both."""
    metadata = about.get("metadata") or {}
    if not isinstance(metadata.get("start"), Mapping):
        return dict(about)
    return {**about, "metadata": {key: value for key, value in metadata.items() if key != "start"}, "start": metadata["start"]}


def _state(about: Mapping[str, Any]) -> tuple[Any, ...]:
    return about.get("status"), about.get("extent"), about.get("frames"), _image(about.get("mosaic") or {})


def _image(mosaic: Mapping[str, Any]) -> tuple[Any, ...]:
    return mosaic.get("serial"), mosaic.get("final")


def _read(folder: Path) -> tuple[dict[str, Any], list[Path], Any]:
    try:
        about = read_about(folder)
        missing = {"status", "extent", "frames", "arrays"} - about.keys()
        if missing:
            raise ValueError(f"run.json lacks {', '.join(sorted(missing))}")
        parts = part_paths(folder / "frames")
        return about, parts, pq.read_schema(parts[0]) if parts else None
    except (OSError, ValueError, AttributeError) as error:  # the last: JSON that is no object
        raise RunUnreadable(
            f"run {folder}: cannot be read ({type(error).__name__}: {error}); restore it or move it out of the archive"
        ) from error
