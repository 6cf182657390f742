"""Bytes, dtype and shape as a sender claims them -> an array, or WireError; nothing is allocated before they agree."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError

# No objects, no structures, no dates; text and bytes of bounded width. Only what passes is shown to np.dtype, which understands a language.
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16|[US][1-9][0-9]{0,3})", re.ASCII)
_MOST_AXES = 8
_MOST_EXTENT = 2**31
_LAST_CHARACTER = 0x10FFFF


def dtype_of(code: object) -> np.dtype[Any]:
    """A dtype's text ("<u2") as a dtype.

    Raises WireError: unsafe_pickle for objects, wrong_dtype for what else is neither number, bool nor short text.
    """
    if not isinstance(code, str) or not _DTYPE.fullmatch(code):
        shown = repr(code)[:100] if isinstance(code, str) else f"a {type(code).__name__}"
        if isinstance(code, str) and code.lstrip("<>|=").startswith("O"):
            raise WireError("unsafe_pickle", "an array of objects, which only unpickling would bring back; send numbers")
        raise WireError("wrong_dtype", f"an array of {shown}; numbers, bool and short text are read")
    return np.dtype(code)


def array_of(data: object, dtype: np.dtype[Any], shape: object, fortran: bool = False) -> npt.NDArray[Any]:
    """An array over `data` (no copy where its byte order is this machine's), read-only.

    Raises WireError: wrong_shape where shape, dtype and number of bytes disagree; wrong_type where one of them is nothing of the kind.
    """
    if not isinstance(data, bytes) or not isinstance(shape, tuple | list):
        raise WireError("wrong_type", f"an array with data of {type(data).__name__} and shape of {type(shape).__name__}")
    if len(shape) > _MOST_AXES or not all(type(extent) is int and 0 <= extent <= _MOST_EXTENT for extent in shape):
        raise WireError("wrong_shape", f"an array of {len(shape)} axes, or one that is no plausible extent")
    claimed = math.prod(shape) * dtype.itemsize
    if claimed != len(data):
        raise WireError("wrong_shape", f"an array that claims {tuple(shape)} of {dtype}, {claimed} bytes, and has {len(data)}")
    try:
        array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # extents beside a zero that numpy cannot address
        raise WireError("wrong_shape", f"an array of {tuple(shape)}: {error}") from None
    if dtype.kind == "U":
        _check_text(array)
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _check_text(array: npt.NDArray[Any]) -> None:
    """Numpy keeps any 32 bits as a character and fails when somebody reads it."""
    points = np.frombuffer(array.tobytes(), np.dtype("u4").newbyteorder(array.dtype.byteorder))
    if points.size and (points.max() > _LAST_CHARACTER or ((points >= 0xD800) & (points < 0xE000)).any()):
        raise WireError("wrong_type", "an array of text with characters that are none")
