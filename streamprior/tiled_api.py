"""Calls -> Tiled over HTTP: the only door to Tiled. Small requests with bounds of our own, so that a missing server costs seconds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import httpx

from streamprior.errors import SinkUnavailable

REFUSALS = {
    401: "it does not know the API key; set the key of this Tiled in a file or the environment",
    403: "the API key may not write here; it needs the scopes read:metadata, read:data, create:node, register, write:metadata, write:data",
    405: "this tree cannot be written; serve a catalog there (`tiled serve catalog`)",
    413: "the request is larger than it accepts; raise the limit of the proxy before it",
}


class TiledRefused(SinkUnavailable):
    """Tiled answered, and said no: `status` is the HTTP status. The next request may do better, so only this one waits."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class TiledApi:
    """One connection pool to a Tiled server, with its API key. The key is in a header only, never in an address or a text.

    Tiled's Python client is left out on purpose: it retries for 45 s by itself, which a thread with back-off of its own must not
    wait for, and it brings dask and pandas into the daemon.

    Parameters
    ----------
    uri : server, with or without /api/v1; a key in its query is taken and removed.
    api_key : None where the uri carries it, or where Tiled is open to everybody.
    timeout_s : for each request.
    """

    def __init__(self, uri: str, api_key: str | None, timeout_s: float = 10.0) -> None:
        parts = urlsplit(uri)
        key = api_key or next(iter(parse_qs(parts.query).get("api_key", [])), None)
        path = parts.path.split("/api/v1")[0].rstrip("/")
        self.base = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{path}/api/v1"
        self._client = httpx.Client(
            timeout=timeout_s,
            headers={"Accept": "application/json"} | ({"Authorization": f"Apikey {key}"} if key else {}),
            # A proxy does not know this machine's loopback.
            trust_env=parts.hostname not in ("localhost", "127.0.0.1", "::1"),
        )

    def get(self, path: str, **query: str) -> Any:
        """JSON of `GET path`; None where there is no such node."""
        try:
            return self._json(self._call("GET", path, params=query))
        except TiledRefused as refusal:
            if refusal.status == 404:
                return None
            raise

    def read(self, path: str, **query: str) -> bytes:
        """Bytes of `GET path`."""
        return self._call("GET", path, params=query, headers={"Accept": "application/octet-stream"}).content

    def send(self, method: str, path: str, body: Mapping[str, Any], **query: str) -> Any:
        """JSON of a request with a JSON body; None where Tiled answers nothing."""
        content = json.dumps(body, allow_nan=False).encode()
        answer = self._call(method, path, params=query, content=content, headers={"Content-Type": "application/json"})
        return self._json(answer) if answer.content else None

    def put_bytes(self, path: str, content: bytes, method: str = "PUT", **query: str) -> None:
        """Send raw bytes of an array."""
        self._call(method, path, params=query, content=content, headers={"Content-Type": "application/octet-stream"})

    def delete(self, path: str) -> None:
        """Remove a node with its data, where it exists."""
        self._call("DELETE", path, params={"recursive": "true", "external_only": "false"})

    def close(self) -> None:
        self._client.close()

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            # A proxy's sign-in page, for example, with status 200.
            raise SinkUnavailable(f"Tiled at {self.base}: what answers there is no Tiled; correct its address, it is tried again") from None

    def _call(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, self.base + path, **parts)
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise SinkUnavailable(
                f"Tiled at {self.base}: no answer ({type(error).__name__}: {error}); start it or correct its address, it is tried again"
            ) from error
        if answer.status_code >= 300:  # a redirect, too: it would turn a POST elsewhere
            reason = REFUSALS.get(answer.status_code, answer.text[:200])
            raise TiledRefused(answer.status_code, f"Tiled at {self.base}: {method} {path} answered {answer.status_code}: {reason}")
        return answer


def node_path(segments: Sequence[str]) -> str:
    """Path of a node as it stands in an address: every segment quoted."""
    return "/".join(quote(segment, safe="") for segment in segments)


def make_containers(api: TiledApi, segments: Sequence[str]) -> None:
    """Make the container at this path and those above it, where they are missing."""
    for depth, key in enumerate(segments):
        if api.get(f"/metadata/{node_path(segments[: depth + 1])}") is None:
            create(api, segments[:depth], {"id": key, "structure_family": "container"})


def create(api: TiledApi, parent: Sequence[str], body: Mapping[str, Any], verb: str = "metadata") -> Any:
    """Make a node under `parent` and return Tiled's answer; None where it was there already."""
    whole = {"metadata": {}, "specs": [], "data_sources": []} | dict(body)
    try:
        return api.send("POST", f"/{verb}/{node_path(parent)}", whole)
    except TiledRefused as refusal:
        if refusal.status == 409:
            return None
        raise


def probe(uri: str, api_key: str | None) -> str | None:
    """None where Tiled answers and takes the key, otherwise what is wrong and what to do; for `streamprior check`."""
    api = TiledApi(uri, api_key, timeout_s=5.0)
    try:
        api.read("/metadata/")
    except SinkUnavailable as error:
        return str(error)
    finally:
        api.close()
    return None
