"""Python that computes with registers -> kernel code that does, eight float32 at a time: no instruction is left to the compiler's guess."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 8
"""Numbers in a `Lanes`: a 256-bit register of float32; the compiler splits it where registers are narrower."""

_REGISTER = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(64)
_ORDER = ir.VectorType(ir.IntType(32), LANES)
_FUSE = ("contract", "nsz")  # a product and a sum may round once; nothing is reordered


class Lanes:
    """LANES float32 beside each other in a kernel that is being written: arithmetic emits vector instructions.

    A loop over many places of one array is not vectorised by compilers, as they cannot prove that the places differ; here nothing is left
    to them. A plain number takes part as the same number in every lane.
    """

    def __init__(self, builder: Any, value: Any) -> None:
        self._builder, self._value = builder, value

    def __add__(self, other: Lanes | float) -> Lanes:
        return self._made(self._builder.fadd(self._value, _register(other), flags=_FUSE))

    def __sub__(self, other: Lanes | float) -> Lanes:
        return self._made(self._builder.fsub(self._value, _register(other), flags=_FUSE))

    def __mul__(self, other: Lanes | float) -> Lanes:
        return self._made(self._builder.fmul(self._value, _register(other), flags=_FUSE))

    def __truediv__(self, other: Lanes | float) -> Lanes:
        return self._made(self._builder.fdiv(self._value, _register(other)))

    def __neg__(self) -> Lanes:
        return self._made(self._builder.fneg(self._value))

    def sqrt(self) -> Lanes:
        kind = ir.FunctionType(_REGISTER, [_REGISTER])
        function = cgutils.get_or_insert_function(self._builder.module, kind, f"llvm.sqrt.v{LANES}f32")
        return self._made(self._builder.call(function, [self._value]))

    def where(self, sign: str, bound: float, yes: Lanes | float, no: Lanes | float) -> Lanes:
        """`yes` in the lanes that are `sign` (">", ">=") `bound`, `no` in the others and where a lane is NaN."""
        holds = self._builder.fcmp_ordered(sign, self._value, _register(bound))
        return self._made(self._builder.select(holds, _register(yes), _register(no)))

    def shuffle(self, other: Lanes, order: tuple[int, ...]) -> Lanes:
        """Lanes picked from both: 0 to LANES - 1 are this one's, from LANES the other's."""
        return self._made(self._builder.shuffle_vector(self._value, other._value, ir.Constant(_ORDER, list(order))))

    def _made(self, value: Any) -> Lanes:
        return Lanes(self._builder, value)


def _register(one: Lanes | float) -> Any:
    return one._value if isinstance(one, Lanes) else ir.Constant(_REGISTER, [float(np.float32(one))] * LANES)


class Place:
    """An index in a kernel that is being written."""

    def __init__(self, builder: Any, value: Any) -> None:
        self._builder, self._value = builder, value

    def __add__(self, other: Place | int) -> Place:
        return Place(
            self._builder, self._builder.add(self._value, other._value if isinstance(other, Place) else ir.Constant(_INDEX, other))
        )


class Floats:
    """A contiguous float32 array in a kernel that is being written; nothing checks its bounds."""

    def __init__(self, builder: Any, pointer: Any) -> None:
        self._builder, self._pointer = builder, pointer

    def load(self, at: Place) -> Lanes:
        """The LANES numbers from `at` on."""
        return Lanes(self._builder, self._builder.load(self._address(at, _REGISTER), align=4))

    def store(self, lanes: Lanes, at: Place) -> None:
        self._builder.store(lanes._value, self._address(at, _REGISTER), align=4)

    def spread(self, at: Place) -> Lanes:
        """The number at `at` in every lane."""
        first = self._builder.insert_element(
            ir.Constant(_REGISTER, ir.Undefined), self._builder.load(self._address(at, ir.FloatType())), ir.Constant(ir.IntType(32), 0)
        )
        return Lanes(self._builder, first).shuffle(Lanes(self._builder, first), (0,) * LANES)

    def _address(self, at: Place, kind: Any) -> Any:
        return self._builder.bitcast(self._builder.gep(self._pointer, [at._value]), kind.as_pointer())


def written(write: Callable[..., None], cases: tuple[int, ...]) -> Any:
    """Kernel code that `write` writes, to be used inside kernels as `name(case, times, arguments, strides)`.

    It runs, `times` times, what `write(case, *arguments)` wrote; after each time an index among the arguments grows by its stride.

    write : called once for each case, with Floats for float32 arrays and Place for integers. Another case does nothing.
    """

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        case, times = (
            context.cast(builder, value, kind, numba.types.int64) for value, kind in zip(values[:2], signature.args, strict=False)
        )
        plain = [
            context.make_array(kind)(context, builder, value).data
            if isinstance(kind, numba.types.Array)
            else context.cast(builder, value, kind, numba.types.int64)
            for tuples, together in zip(signature.args[2:], values[2:], strict=True)
            for kind, value in zip(tuples, cgutils.unpack_tuple(builder, together), strict=True)
        ]
        builder.call(_written_function(builder.module, write, cases, [one.type for one in plain]), [case, times, *plain])
        return context.get_dummy_value()

    @intrinsic
    def run(typing, case, times, arguments, strides):  # type: ignore[no-untyped-def]
        return numba.types.void(case, times, arguments, strides), code

    return run


def _written_function(module: Any, write: Callable[..., None], cases: tuple[int, ...], kinds: list[Any]) -> Any:
    """The function of this name in the module: one for all callers, as a copy in each would take the compiler minutes."""
    name = f"{write.__module__}.{write.__name__}"
    if name in module.globals:
        return module.globals[name]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_INDEX, _INDEX, *kinds]), name)
    function.linkage = "linkonce_odr"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block())
    case, times, *rest = function.args
    arguments, strides = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    done = function.append_basic_block()
    choice = builder.switch(case, done)
    for one in cases:
        choice.add_case(ir.Constant(_INDEX, one), function.append_basic_block())
        builder.position_at_end(function.blocks[-1])
        with cgutils.for_range(builder, times) as turn:
            write(one, *(_argument(builder, *pair, turn.index) for pair in zip(arguments, strides, strict=True)))
        builder.branch(done)
    builder.position_at_end(done)
    builder.ret_void()
    return function


def _argument(builder: Any, value: Any, stride: Any, turn: Any) -> Floats | Place:
    if isinstance(value.type, ir.PointerType):
        return Floats(builder, value)
    return Place(builder, builder.add(value, builder.mul(turn, stride)))
