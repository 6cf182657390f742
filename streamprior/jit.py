"""The only door to numba: nogil kernels whose machine code is cached in the state folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite import ir  # type: ignore[import-untyped]
from numba.extending import intrinsic

from streamprior.config import state_folder

numba.config.CACHE_DIR = str(state_folder() / "numba")


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call: nogil, so that one frame a thread scales; fastmath without the assumption that NaN cannot occur."""
    # "nnan" and "ninf" are left out on purpose: kernels test for NaN.
    compiled: Callable[..., Any] = numba.njit(
        nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}
    )(function)
    return compiled


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """A piece of a kernel, compiled into its callers."""
    compiled: Callable[..., Any] = numba.njit(
        nogil=True, error_model="numpy", inline="always", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}
    )(function)
    return compiled


@intrinsic
def call(typing, function, argument):  # type: ignore[no-untyped-def]
    """Inside a kernel: call the C function `void f(void *)` at the address `function`, without taking the GIL.

    Both are integers given at run time, so that the compiled kernel can be kept on disk while addresses change with every process.
    """

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        pointer = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [pointer]).as_pointer()
        builder.call(builder.inttoptr(values[0], kind), [builder.inttoptr(values[1], pointer)])
        return context.get_dummy_value()

    return numba.types.void(function, argument), code
