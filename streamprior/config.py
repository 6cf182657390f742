"""Every setting, written once: unit, default, reason. YAML and environment; unknown keys are errors."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Where caches live between runs: $STREAMPRIOR_STATE, systemd's $STATE_DIRECTORY, or ~/.local/state/streamprior; made if absent."""
    named = os.environ.get("STREAMPRIOR_STATE") or os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    folder = Path(named) if named else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "streamprior"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
