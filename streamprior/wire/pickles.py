"""A pickle -> plain values and numpy arrays: read, never run.

A pickle is a program: Python's unpickler imports and calls whatever its sender names. A list of allowed names is not enough either: an
allowed class can be changed for the whole process (BUILD), an index into the memo reserves gigabytes (LONG_BINPUT), integer keys of one
hash make a dictionary quadratic. So this reader knows the opcodes that containers, numbers, text and bytes are written with, and the few
names that numpy arrays are made of, for which it has makers of its own; no other opcode or name has a meaning here.

Opcodes: the standard library's pickletools. Numpy's part: what `ndarray.__reduce_ex__` writes, numpy 1.x and 2.x.
"""

from __future__ import annotations

import enum
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from streamprior.errors import WireError
from streamprior.wire.claims import array_of, dtype_of

MOST_OPCODES = 2**18
"""A document of the RunEngine has 40 to 250; the pixels of an array are one."""

_STOP = 0x2E
_PROTOCOLS = (3, 4, 5)


class _Name(enum.Enum):
    """The names that may be called; what they mean is `_called`'s."""

    ARRAY = enum.auto()
    BUFFER = enum.auto()
    SCALAR = enum.auto()
    DTYPE = enum.auto()
    NDARRAY = enum.auto()
    COMPLEX = enum.auto()
    ORDERED = enum.auto()


_NAMES = {
    ("numpy._core.multiarray", "_reconstruct"): _Name.ARRAY,
    ("numpy.core.multiarray", "_reconstruct"): _Name.ARRAY,
    ("numpy._core.numeric", "_frombuffer"): _Name.BUFFER,
    ("numpy.core.numeric", "_frombuffer"): _Name.BUFFER,
    ("numpy._core.multiarray", "scalar"): _Name.SCALAR,
    ("numpy.core.multiarray", "scalar"): _Name.SCALAR,
    ("numpy", "dtype"): _Name.DTYPE,
    ("numpy", "ndarray"): _Name.NDARRAY,
    ("builtins", "complex"): _Name.COMPLEX,
    ("collections", "OrderedDict"): _Name.ORDERED,
}


@dataclass
class _Type:
    """A dtype between the call that names it and the state that says its byte order."""

    code: str
    order: str = "|"

    def dtype(self) -> np.dtype[Any]:
        return dtype_of(self.order + self.code)


@dataclass
class _Unfilled:
    """An array between the call that makes it and the state that fills it."""

    array: Any = None


def read_pickle(body: bytes) -> Any:
    """What the pickle holds: dict (keys are text), list, tuple, str, int, float, bool, None, bytes, complex, numpy arrays and scalars.

    A list may be held many times, even by itself, and `_Type`, `_Unfilled` and `_Name` may be left among the values: the caller looks
    through what it takes over.

    Raises
    ------
    WireError
        unsafe_pickle for a name or an opcode that is not on the list, too_large beyond MOST_OPCODES, not_document for what is no pickle of
        protocol 3 to 5, bad_document for a key that is no text, and what `claims` has against an array.
    """
    if len(body) < 2 or body[0] != 0x80 or body[1] not in _PROTOCOLS:
        raise WireError("not_document", "no pickle of protocol 3, 4 or 5")
    try:
        return _Machine(body).run()
    except WireError:
        raise
    except (struct.error, LookupError, ValueError, TypeError) as error:
        raise WireError("not_document", f"a damaged pickle: {type(error).__name__}") from None


class _Machine:
    """Stack, marks and memo of one pickle."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 2
        self._room = len(body)
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MOST_OPCODES):
            code = self._body[self._at]
            self._at += 1
            if code == _STOP:
                return self._stack.pop()
            step = _STEPS.get(code)
            if step is None:
                _refuse(code)
            step(self)
        raise WireError("too_large", f"a pickle of more than {MOST_OPCODES} opcodes")

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def number(self, layout: str) -> Any:
        """The fixed-size argument of an opcode."""
        (value,) = struct.unpack_from(layout, self._body, self._at)
        self._at += struct.calcsize(layout)
        return value

    def blob(self, layout: str) -> bytes:
        """A length and so many bytes; the length is compared with what is there before anything is made of it."""
        size = self.number(layout)
        if size > len(self._body) - self._at:
            raise ValueError
        self._at += size
        return self._body[self._at - size : self._at]

    def line(self) -> str:
        end = self._body.index(b"\n", self._at)
        text = self._body[self._at : end].decode()
        self._at = end + 1
        return text

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def marked(self) -> list[Any]:
        """Everything above the last mark, taken off the stack."""
        mark = self._marks.pop()
        values = self._stack[mark:]
        del self._stack[mark:]
        return values

    def taken(self, count: int) -> tuple[Any, ...]:
        """The last `count` values, taken off the stack."""
        if count > len(self._stack):
            raise IndexError
        values = tuple(self._stack[len(self._stack) - count :])
        del self._stack[len(self._stack) - count :]
        return values

    def extend(self, values: list[Any] | tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError
        target.extend(values)

    def update(self, items: list[Any] | tuple[Any, ...]) -> None:
        target = self._stack[-1]
        if type(target) is not dict:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Hashes of text are secret, those of integers and tuples are the sender's choice.
            if type(key) is not str:
                raise WireError("bad_document", f"a key of type {type(key).__name__}; keys are text")
            target[key] = value

    def remember(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def recall(self, index: int) -> None:
        value = self._memo[index]
        self.push(value.array if isinstance(value, _Unfilled) and value.array is not None else value)

    def name(self, module: Any, name: Any) -> None:
        known = _NAMES.get((module, name)) if type(module) is str and type(name) is str else None
        if known is None:
            raise WireError("unsafe_pickle", f"it names {str(module)[:100]}.{str(name)[:100]}, which would be imported and called")
        self.push(known)

    def call(self) -> None:
        name, arguments = self.taken(2)
        if not isinstance(name, _Name) or type(arguments) is not tuple:
            raise WireError("unsafe_pickle", f"it calls a {type(name).__name__}")
        self.push(self.called(name, arguments))

    def called(self, name: _Name, arguments: tuple[Any, ...]) -> Any:
        if name is _Name.DTYPE and len(arguments) == 3 and type(arguments[0]) is str:
            return _Type(arguments[0])
        if name is _Name.ARRAY and len(arguments) == 3:
            return _Unfilled()
        if name is _Name.SCALAR and len(arguments) == 2 and isinstance(arguments[0], _Type):
            return self.array(arguments[1], arguments[0], ())[()]
        if name is _Name.BUFFER and len(arguments) in (4, 5) and isinstance(arguments[1], _Type):
            data, dtype, shape, order, *axes = arguments
            return _turned(self.array(data, dtype, shape, order == "F"), *axes)
        if name is _Name.COMPLEX and len(arguments) == 2 and all(type(part) is float for part in arguments):
            return complex(*arguments)
        if name is _Name.ORDERED and not arguments:
            return {}
        raise WireError("unsafe_pickle", f"it calls {name.name} with arguments that no pickle of an array has")

    def build(self) -> None:
        """The state that a dtype or an array is completed with."""
        target, state = self.taken(2)
        if type(state) is not tuple:
            raise WireError("unsafe_pickle", f"it sets the state of a {type(target).__name__}")
        if isinstance(target, _Type):
            if len(state) < 5 or any(part is not None for part in state[2:5]) or state[1] not in ("<", ">", "|", "="):
                raise WireError("wrong_dtype", "a structured dtype; numbers, bool and short text are read")
            target.order = state[1]
            self.push(target)
        elif isinstance(target, _Unfilled) and len(state) == 5 and isinstance(state[2], _Type):
            _, shape, dtype, fortran, data = state
            target.array = self.array(data, dtype, shape, fortran is True)
            self.push(target.array)
        else:
            raise WireError("unsafe_pickle", f"it sets the state of a {type(target).__name__}")

    def array(self, data: Any, dtype: _Type, shape: Any, fortran: bool = False) -> npt.NDArray[Any]:
        # The same bytes can be named many times over, and turning their byte order makes a copy each time.
        self._room -= len(data)
        if self._room < 0:
            raise WireError("too_large", "a pickle whose arrays share their bytes, more of them than it holds")
        return array_of(data, dtype.dtype(), shape, fortran)


def _turned(array: npt.NDArray[Any], axes: Any = None) -> npt.NDArray[Any]:
    """The axes in another order than the memory has them."""
    if axes is None:
        return array
    if type(axes) is not tuple or not all(type(axis) is int for axis in axes) or sorted(axes) != list(range(array.ndim)):
        raise WireError("wrong_shape", f"an array of {array.ndim} axes in no order of them")
    return array.transpose(axes)


def _refuse(code: int) -> NoReturn:
    name = next((one.name for one in pickletools.opcodes if one.code == chr(code)), None)
    if name is None:
        raise WireError("not_document", f"a damaged pickle: {code:#x} is no opcode")
    raise WireError("unsafe_pickle", f"opcode {name}, which no document of plain values and arrays needs")


def _integer(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


_STEPS: dict[int, Callable[[_Machine], None]] = {
    0x95: lambda m: m.number("<Q"),  # FRAME: a hint for readers of files
    0x28: _Machine.mark,
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(m.number("<i")),
    ord("K"): lambda m: m.push(m.number("<B")),
    ord("M"): lambda m: m.push(m.number("<H")),
    0x8A: lambda m: m.push(_integer(m.blob("<B"))),  # LONG1: 255 bytes at most, and the caller refuses integers beyond 64 bits
    ord("G"): lambda m: m.push(m.number(">d")),
    0x8C: lambda m: m.push(m.blob("<B").decode()),
    ord("X"): lambda m: m.push(m.blob("<I").decode()),
    0x8D: lambda m: m.push(m.blob("<Q").decode()),
    ord("C"): lambda m: m.push(m.blob("<B")),
    ord("B"): lambda m: m.push(m.blob("<I")),
    0x8E: lambda m: m.push(m.blob("<Q")),
    0x96: lambda m: m.push(m.blob("<Q")),  # BYTEARRAY8
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.extend(m.taken(1)),
    ord("e"): lambda m: m.extend(m.marked()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.update(m.taken(2)),
    ord("u"): lambda m: m.update(m.marked()),
    ord(")"): lambda m: m.push(()),
    ord("t"): lambda m: m.push(tuple(m.marked())),
    0x85: lambda m: m.push(m.taken(1)),
    0x86: lambda m: m.push(m.taken(2)),
    0x87: lambda m: m.push(m.taken(3)),
    0x94: lambda m: m.remember(len(m._memo)),
    ord("q"): lambda m: m.remember(m.number("<B")),
    ord("r"): lambda m: m.remember(m.number("<I")),
    ord("h"): lambda m: m.recall(m.number("<B")),
    ord("j"): lambda m: m.recall(m.number("<I")),
    ord("c"): lambda m: m.name(m.line(), m.line()),
    0x93: lambda m: m.name(*m.taken(2)),
    ord("R"): _Machine.call,
    ord("b"): _Machine.build,
}
