"""Results -> `latest/classes` and `latest/object` in Tiled: the newest only, for whoever subscribes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.records import Result, RunEnded, RunStarted
from streamprior.sinks.registration import array_structure
from streamprior.sinks.tiled_api import TiledApi, TiledRefused, create, make_containers, node_path

MESSAGE_BYTES = 900_000
"""A Tiled subscription with default settings ends without a word at a message above 1,000,000 bytes; the rest is the envelope."""


class LatestArrays:
    """A live sink: each `write` sends its newest result and forgets the others.

    Where results come faster than `max_hz`, `write` waits in its own thread, so that its queue does the dropping and the last result
    before a pause is always sent. Images above 1 MB are thinned by a whole stride, which the node's metadata tells.

    Parameters
    ----------
    uri, api_key : the Tiled server.
    parent : path of the container that holds `latest`, segments divided by "/".
    max_hz : results a second at most; every one is two requests, and stays in Tiled's streaming cache for an hour.
    """

    name = "live"
    complete = False

    def __init__(self, uri: str, api_key: str | None, parent: str = "streamprior", max_hz: float = 10.0) -> None:
        self._api = TiledApi(uri, api_key)
        self._path = [*(part for part in parent.split("/") if part), "latest"]
        self._period_s = 1.0 / max_hz
        self._sent = 0.0
        self._told: dict[str, dict[str, Any]] = {}  # node -> what its metadata says

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
        time.sleep(max(0.0, self._sent + self._period_s - time.monotonic()))
        try:
            self._send("classes", newest.classes, newest.run)
            self._send("object", newest.object, newest.run)
        except TiledRefused:
            self._told.clear()  # it may have come back empty: look again next time
            raise
        self._sent = time.monotonic()

    def end(self, run: RunEnded) -> None:
        """The last result stays."""

    def close(self) -> None:
        self._api.close()

    def _send(self, name: str, image: npt.NDArray[Any], run: str) -> None:
        stride = thinning(image)
        thinned = np.ascontiguousarray(image[(slice(None, None, stride),) * image.ndim])
        about = {"run": run, "stride": stride, "full_shape": list(image.shape)}
        if self._told.get(name) != about:
            self._prepare(name, thinned, about)
            self._told[name] = about
        self._api.put_bytes(f"/array/full/{node_path([*self._path, name])}", thinned.tobytes())

    def _prepare(self, name: str, image: npt.NDArray[Any], about: dict[str, Any]) -> None:
        """See that the node is there, has this shape and dtype, and tells which run it shows."""
        make_containers(self._api, self._path)
        path = f"/metadata/{node_path([*self._path, name])}"
        structure = array_structure({"frame_shape": image.shape[1:], "dtype": image.dtype.name, "chunk_frames": len(image)}, len(image))
        present = self._api.get(path)
        if present is not None and _same(present["data"]["attributes"]["structure"], structure):
            self._api.send("PUT", path, {"metadata": about}, drop_revision="true")
            return
        if present is not None:
            self._api.delete(path)  # another prior, another box
        source = {"structure_family": "array", "structure": structure, "parameters": {}, "assets": [], "management": "writable"}
        create(self._api, self._path, {"id": name, "structure_family": "array", "metadata": about, "data_sources": [source]})


def thinning(image: npt.NDArray[Any]) -> int:
    """Smallest stride along every axis that brings an image under MESSAGE_BYTES."""
    stride = 1
    while image[(slice(None, None, stride),) * image.ndim].nbytes > MESSAGE_BYTES:
        stride += 1
    return stride


def _same(present: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return tuple(present["shape"]) == tuple(wanted["shape"]) and all(
        present["data_type"][key] == wanted["data_type"][key] for key in ("kind", "itemsize")
    )
