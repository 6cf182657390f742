"""Functions -> nogil kernels, whose machine code is kept in the state folder: with the files beside it the only door to numba.

`written` and `wide` are two ways to compute with vector registers inside a kernel, for where the compiler's own vectoriser gives up:
`written` for code that Python writes out, case by case, and `wide` for a type that kernels name as they name a float.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.extending import intrinsic

from streamprior.config import state_folder

_KEPT_CACHES = 4


def _cache_folder() -> Path:
    """A folder for exactly these sources: numba looks at the file of the outermost kernel alone and would keep a stale one otherwise."""
    package = Path(__file__).parents[1]
    sources = [source for room in ("jit", "stages", "mosaic") for source in sorted((package / room).rglob("*.py"))]
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    root = state_folder() / "numba"
    folder = root / digest
    folder.mkdir(parents=True, exist_ok=True)
    folder.touch()
    for old in sorted(root.iterdir(), key=lambda one: one.stat().st_mtime)[:-_KEPT_CACHES]:
        shutil.rmtree(old, ignore_errors=True)
    return folder


numba.config.CACHE_DIR = str(_cache_folder())


def kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile on first call: nogil, so that one frame a thread scales; fastmath without the assumption that NaN cannot occur."""
    # "nnan" and "ninf" are left out on purpose: kernels test for NaN.
    compiled: Callable[..., Any] = numba.njit(
        nogil=True, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}
    )(function)
    return compiled


def bare_kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that allocates nothing and keeps no array: without numba's reference counts.

    They are two calls for every array that an inlined piece is handed, each of which spills all vector registers: a third of the
    classifier's time.
    """
    compiled: Callable[..., Any] = numba.njit(
        nogil=True, _nrt=False, cache=True, error_model="numpy", fastmath={"contract", "reassoc", "nsz", "arcp", "afn"}
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


@intrinsic
def _pointer(typing, address, like):  # type: ignore[no-untyped-def]
    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.inttoptr(values[0], context.get_value_type(signature.return_type))

    return numba.types.CPointer(like.dtype)(address, like), code


@inlined
def array_at(address, shape, like):  # type: ignore[no-untyped-def]
    """Inside a kernel: the C-contiguous array of this shape at the address, of the pixels' type of the array `like`."""
    return numba.carray(_pointer(address, like), shape)


def addresses(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint64]:
    """(N,), where the arrays lie: a kernel reads many that are not side by side in one call, which gives up the interpreter once.

    They must be C-contiguous, and the caller must hold them until the kernel is done.
    """
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)
