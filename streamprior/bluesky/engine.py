"""A running daemon -> a RunEngine beside it: its documents go out over 0MQ and into Tiled, and it pauses while a drift alarm stands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bluesky import RunEngine
from bluesky.callbacks.buffer import BufferingWrapper
from bluesky.callbacks.zmq import Publisher
from bluesky_tiled_plugins import TiledWriter
from tiled.client import from_uri
from tiled.structures.core import Spec

from streamprior.bluesky.device import StreampriorDevice
from streamprior.bluesky.suspender import DriftSuspender, justification
from streamprior.wire.documents import dump_body


@dataclass(frozen=True, slots=True)
class Beside:
    """What an engine works with. documents : HOST:PORT of a Bluesky proxy's in-address. daemon : its HTTP address. tiled, api_key,
    container : server that raw runs are written to, and the container there. retry_s : as in DriftSuspender."""

    documents: str
    daemon: str
    tiled: str
    api_key: str
    container: str = "raw"
    retry_s: float = 10.0


def engine_beside(where: Beside, said: Callable[[str, Mapping[str, Any]], None]) -> tuple[RunEngine, StreampriorDevice]:
    """A RunEngine with the daemon's device connected and its suspender installed.

    said : told of "paused" (why) and "resumed".
    """
    engine = RunEngine({}, call_returns_result=True)
    engine.subscribe(Publisher(where.documents, serializer=dump_body))
    client = from_uri(where.tiled, api_key=where.api_key)
    # With this name the container is databroker's catalog: runs by scan number, by the beginning of a uid, the newest.
    specs = [Spec("CatalogOfBlueskyRuns", version="3.0")]
    raw = client[where.container] if where.container in client else client.create_container(where.container, specs=specs)
    # Tiled takes some ten requests a second: written within the plan, every point would wait for several.
    engine.subscribe(BufferingWrapper(TiledWriter(raw, batch_size=32)))
    device = StreampriorDevice(where.daemon)
    asyncio.run_coroutine_threadsafe(device.connect(), engine.loop).result()
    suspender = DriftSuspender(device, retry_s=where.retry_s)
    engine.install_suspender(suspender)
    _tell(device, suspender, said)
    return engine, device


def _tell(device: StreampriorDevice, suspender: DriftSuspender, said: Callable[[str, Mapping[str, Any]], None]) -> None:
    """Say when the plan is held up and when it goes on; the engine's own state is `running` as soon as it waits."""
    held = False

    def look() -> None:
        nonlocal held
        if suspender.tripped != held:
            held = suspender.tripped
            said("paused", {"why": justification(device)}) if held else said("resumed", {})

    device.follow(look)
