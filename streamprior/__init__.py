"""streamprior: pixel classes, prior-started phase retrieval and drift metrics for every frame, while the scan runs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.6.0"

# Loaded on first use: `import streamprior` stays light, and `streamprior --help` does not wait for a compiler.
_WHERE = {
    "load_prior": "streamprior.prior",
    "prepare": "streamprior.stages.prepare",
    "classify": "streamprior.stages.classify",
    "match": "streamprior.stages.match",
    "refine": "streamprior.stages.refine",
}
_PACKAGES = ("evaluate",)  # not below: to import-linter it would be as if the daemon imported it

if TYPE_CHECKING:
    from streamprior.prior import load_prior as load_prior
    from streamprior.stages.classify import classify as classify
    from streamprior.stages.match import match as match
    from streamprior.stages.prepare import prepare as prepare
    from streamprior.stages.refine import refine as refine


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return import_module(f"streamprior.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'streamprior' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
