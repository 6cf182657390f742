"""Offline error analysis: a prior and frames it never saw -> numbers, pictures and a report that a person can judge."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# Loaded on first use, as in `streamprior`: matplotlib and scikit-image are in an extra, and `import streamprior` knows neither.
_WHERE = {
    "align": ("compare", "compare"),
    "prtf": ("metrics", "prtf"),
    "Arm": ("records", "Arm"),
    "Comparison": ("records", "Comparison"),
    "write_report": ("report", "write_report"),
    "leaks": ("study", "leaks"),
    "compare_arms": ("arms", "compare_arms"),
}

if TYPE_CHECKING:
    from streamprior.evaluate.arms import compare_arms as compare_arms
    from streamprior.evaluate.compare import compare as align
    from streamprior.evaluate.metrics import prtf as prtf
    from streamprior.evaluate.records import Arm as Arm
    from streamprior.evaluate.records import Comparison as Comparison
    from streamprior.evaluate.report import write_report as write_report
    from streamprior.evaluate.study import leaks as leaks

__all__ = ["Arm", "Comparison", "align", "compare_arms", "leaks", "prtf", "write_report"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'streamprior.evaluate' has no attribute {name!r}")
    module, attribute = _WHERE[name]
    return getattr(import_module(f"streamprior.evaluate.{module}"), attribute)
