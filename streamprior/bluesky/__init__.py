"""For a beamline's profile: the daemon as a device, a suspender that heeds its alarms, the daemon inside the RunEngine's process."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamprior.errors import ConfigError

# Loaded on first use: a profile that only wants the device must not wait for the daemon's compiler, nor the daemon for ophyd-async.
_WHERE = {
    "StreampriorDevice": "streamprior.bluesky.device",
    "DriftSuspender": "streamprior.bluesky.suspender",
    "attach": "streamprior.bluesky.in_process",
}
_STRANGERS = ("bluesky", "ophyd_async", "event_model")

if TYPE_CHECKING:
    from streamprior.bluesky.device import StreampriorDevice as StreampriorDevice
    from streamprior.bluesky.in_process import attach as attach
    from streamprior.bluesky.suspender import DriftSuspender as DriftSuspender


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'streamprior.bluesky' has no attribute {name!r}; it offers {', '.join(_WHERE)}")
    try:
        return getattr(import_module(_WHERE[name]), name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _STRANGERS:
            raise
        raise ConfigError(f"{name} needs {missing}, which is not installed here: pip install 'streamprior[bluesky]'") from None
