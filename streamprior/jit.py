"""The only door to numba: nogil kernels whose machine code is cached in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

from streamprior.config import state_folder

numba.config.CACHE_DIR = str(state_folder() / "numba")

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile on first call: nogil, so that one frame a thread scales; fastmath without the assumption that NaN cannot occur."""
    # "nnan" and "ninf" are left out on purpose: kernels test for NaN.
    compiled: F = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"})(function)
    return compiled


def inlined(function: F) -> F:
    """A piece of a kernel, compiled into its callers."""
    compiled: F = numba.njit(nogil=True, error_model="numpy", inline="always", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"})(
        function
    )
    return compiled
