"""Results and images of the sample -> `latest/...` in Tiled: the newest only, for whoever subscribes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.records import MosaicImage, Positions, Result, RunEnded, RunStarted
from streamprior.sinks.registration import array_structure, tiles_structure
from streamprior.tiled_api import TiledApi, TiledRefused, create, make_containers, node_path

MESSAGE_BYTES = 900_000
"""A Tiled subscription with default settings ends without a word at a message above 1,000,000 bytes; the rest is the envelope."""

TILE = 512
"""Pixels along an edge of a mosaic's tile: half a megabyte as float16. A smaller one takes as long to send, 30-50 ms."""

Pair = tuple[int, int]


@dataclass
class _Tiles:
    """What Tiled holds of one node of a mosaic.

    run : whose image it shows. first, end : its first tile and the one after the last, (row, column) on the grid of tiles over the sample.
    count : tiles down and across that the node has, at least those. sent : a digest of each tile that was sent, by its place in the node.
    """

    run: str
    first: Pair
    end: Pair
    count: Pair
    sent: dict[tuple[int, ...], bytes]


class LatestArrays:
    """A live sink: each `write` sends its newest result and forgets the others, each `note` the tiles of the mosaic that have changed.

    Where they come faster than `max_hz`, it waits in its own thread, so that its queue does the dropping and the last one before a pause
    is always sent. Images of results above 1 MB are thinned by a whole stride, which the node's metadata tells.

    `mosaic_amplitude` and `mosaic_phase` (float16, NaN where no light was) are made of whole tiles on a grid over the sample, the node's
    metadata tell its first pixel's place. A node that must grow grows at its lower and right edges and keeps its subscribers; where its
    first pixel moves, metadata are told first and then every tile. It never becomes smaller, in a later run neither: only a daemon that
    starts, or finds it lost, makes it anew, and then its subscribers must subscribe again.

    Parameters
    ----------
    uri, api_key : the Tiled server.
    parent : path of the container that holds `latest`, segments divided by "/".
    max_hz : results and images a second at most; a result is two requests, an image two a tile, and all stay in Tiled's streaming cache
        for an hour.
    """

    name = "live"
    complete = False

    def __init__(self, uri: str, api_key: str | None, parent: str = "streamprior", max_hz: float = 10.0) -> None:
        self._api = TiledApi(uri, api_key)
        self._path = [*(part for part in parent.split("/") if part), "latest"]
        self._period_s = 1.0 / max_hz
        self._sent = 0.0
        self._told: dict[str, dict[str, Any]] = {}  # node -> what its metadata says
        self._tiles: dict[str, _Tiles] = {}

    def open(self) -> None:
        """Make the container.

        Raises
        ------
        SinkUnavailable
            Tiled does not answer or refuses.
        """
        make_containers(self._api, self._path)

    def begin(self, run: RunStarted) -> None:
        """Nothing to do: the first result of a run tells all there is to know."""

    def write(self, results: Sequence[Result]) -> None:
        """Send the newest result.

        Raises
        ------
        SinkUnavailable
            Tiled does not answer or refuses.
        """
        newest = results[-1]
        with self._paced():
            self._send("classes", newest.classes, newest.run)
            if newest.object.size:  # not every recipe makes one
                self._send("object", newest.object, newest.run)

    def note(self, item: Positions | MosaicImage) -> None:
        """Send what an image of the sample has changed; nobody subscribes to positions.

        Raises
        ------
        SinkUnavailable
            Tiled does not answer or refuses.
        """
        if not isinstance(item, MosaicImage):
            return
        lit = item.light > 0
        with self._paced():
            for name, values in (("mosaic_amplitude", np.abs(item.object)), ("mosaic_phase", np.angle(item.object))):
                self._send_tiles(name, np.where(lit, values, np.nan).astype(np.float16), item)

    def end(self, run: RunEnded) -> None:
        """The last result stays."""

    def close(self) -> None:
        self._api.close()

    @contextmanager
    def _paced(self) -> Iterator[None]:
        time.sleep(max(0.0, self._sent + self._period_s - time.monotonic()))
        try:
            yield
        except TiledRefused:
            self._told.clear()  # it may have come back empty: look again next time
            self._tiles.clear()
            raise
        self._sent = time.monotonic()

    def _send_tiles(self, name: str, values: npt.NDArray[np.float16], image: MosaicImage) -> None:
        corner = (round(image.origin[0] / image.pixel[0]), round(image.origin[1] / image.pixel[1]))
        before = self._tiles.get(name)
        tiles = _tiled(corner, values.shape, image.run, before)
        place = (corner[0] - TILE * tiles.first[0], corner[1] - TILE * tiles.first[1])
        whole = np.full((TILE * tiles.count[0], TILE * tiles.count[1]), np.nan, np.float16)
        whole[place[0] : place[0] + values.shape[0], place[1] : place[1] + values.shape[1]] = values
        if before is None:
            self._make_tiles(name, tiles.count)
        elif before.count != tiles.count:
            self._grow(name, tiles.count, whole)
        self._tiles[name] = tiles
        self._tell(name, image, place)
        for block in np.ndindex(tiles.count):
            content = _cut(whole, block)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if tiles.sent.get(block) != digest:
                self._api.put_bytes(self._at("/array/block", name), content, block=f"{block[0]},{block[1]}")
                tiles.sent[block] = digest

    def _make_tiles(self, name: str, count: Pair) -> None:
        make_containers(self._api, self._path)
        structure = tiles_structure(TILE, count)
        present = self._api.get(self._at("/metadata", name))
        if present is None or not _same(present["data"]["attributes"]["structure"], structure):
            self._replace(name, structure, {}, present)

    def _grow(self, name: str, count: Pair, whole: npt.NDArray[np.float16]) -> None:
        """The farthest tile, written beyond the end, makes room for all: the node stays the same one, for those who listen to it."""
        last = (count[0] - 1, count[1] - 1)
        where = {"offset": f"{TILE * last[0]},{TILE * last[1]}", "shape": f"{TILE},{TILE}", "extend": "true"}
        self._api.put_bytes(self._at("/array/full", name), _cut(whole, last), "PATCH", **where)

    def _tell(self, name: str, image: MosaicImage, place: Pair) -> None:
        about = {
            "run": image.run,
            "pixel": list(image.pixel),
            "origin": [image.origin[axis] - image.pixel[axis] * place[axis] for axis in (0, 1)],
            "unit": image.unit,
            "tile": [TILE, TILE],
            "final": image.final,
        }
        if self._told.get(name) != about:
            self._api.send("PUT", self._at("/metadata", name), {"metadata": about}, drop_revision="true")
            self._told[name] = about

    def _send(self, name: str, image: npt.NDArray[Any], run: str) -> None:
        stride = thinning(image)
        thinned = np.ascontiguousarray(image[(slice(None, None, stride),) * image.ndim])
        about = {"run": run, "stride": stride, "full_shape": list(image.shape)}
        if self._told.get(name) != about:
            self._prepare(name, thinned, about)
            self._told[name] = about
        self._api.put_bytes(self._at("/array/full", name), thinned.tobytes())

    def _prepare(self, name: str, image: npt.NDArray[Any], about: dict[str, Any]) -> None:
        """See that the node is there, has this shape and dtype, and tells which run it shows."""
        make_containers(self._api, self._path)
        structure = array_structure({"frame_shape": image.shape[1:], "dtype": image.dtype.name, "chunk_frames": len(image)}, len(image))
        present = self._api.get(self._at("/metadata", name))
        if present is not None and _same(present["data"]["attributes"]["structure"], structure):
            self._api.send("PUT", self._at("/metadata", name), {"metadata": about}, drop_revision="true")
        else:
            self._replace(name, structure, about, present)  # another prior, another box

    def _replace(self, name: str, structure: dict[str, Any], about: dict[str, Any], present: Any) -> None:
        if present is not None:
            self._api.delete(self._at("/metadata", name))
        source = {"structure_family": "array", "structure": structure, "parameters": {}, "assets": [], "management": "writable"}
        create(self._api, self._path, {"id": name, "structure_family": "array", "metadata": about, "data_sources": [source]})

    def _at(self, route: str, name: str) -> str:
        return f"{route}/{node_path([*self._path, name])}"


def thinning(image: npt.NDArray[Any]) -> int:
    """Smallest stride along every axis that brings an image under MESSAGE_BYTES."""
    stride = 1
    while image[(slice(None, None, stride),) * image.ndim].nbytes > MESSAGE_BYTES:
        stride += 1
    return stride


def _same(present: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return [*map(tuple, present["chunks"])] == [*map(tuple, wanted["chunks"])] and all(
        present["data_type"][key] == wanted["data_type"][key] for key in ("kind", "itemsize")
    )


def _tiled(corner: Pair, shape: tuple[int, ...], run: str, before: _Tiles | None) -> _Tiles:
    """The tiles that hold an image with its first pixel at `corner` and what the node held of its run, in a node no smaller than it was."""
    first = (corner[0] // TILE, corner[1] // TILE)
    end = (-(-(corner[0] + shape[0]) // TILE), -(-(corner[1] + shape[1]) // TILE))
    if before is not None and before.run == run:
        first = (min(first[0], before.first[0]), min(first[1], before.first[1]))
        end = (max(end[0], before.end[0]), max(end[1], before.end[1]))
    least = before.count if before is not None else (1, 1)
    count = (max(end[0] - first[0], least[0]), max(end[1] - first[1], least[1]))
    return _Tiles(run, first, end, count, before.sent if before is not None else {})


def _cut(whole: npt.NDArray[np.float16], block: tuple[int, ...]) -> bytes:
    row, column = (TILE * number for number in block)
    return whole[row : row + TILE, column : column + TILE].tobytes()
