"""Sixteen float32 as one value inside kernels: a type with arithmetic, and what loads, stores, shifts and sums it.

The loop vectoriser gives up where a loop reads more than a few rows, because it cannot prove that they do not overlap; what is written with
lanes stays in registers from the first load to the class. A vector register of 64 bytes holds one value; where registers are narrower LLVM
takes two or four, and the result is the same.
"""

from __future__ import annotations

import operator
from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

WIDE = 16

_VECTOR = ir.VectorType(ir.FloatType(), WIDE)
_INTEGERS = ir.VectorType(ir.IntType(32), WIDE)
_BYTES = ir.VectorType(ir.IntType(8), WIDE)
_FAST = ("contract", "reassoc", "nsz", "arcp", "afn")


class Wide(numba.types.Type):  # type: ignore[misc]
    """The type of sixteen float32, for the compiler."""

    def __init__(self) -> None:
        super().__init__(name="Wide")


_SIXTEEN = Wide()


@register_model(Wide)
class _WideModel(PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


def _constant(kind: Any, number: float) -> Any:
    return ir.Constant(kind, [number] * WIDE)


def _order(first: int, step: int = 1, count: int = WIDE) -> Any:
    return ir.Constant(ir.VectorType(ir.IntType(32), count), [first + step * i for i in range(count)])


def _spread(builder: Any, value: Any, kind: Any = _VECTOR) -> Any:
    """The same number in every lane; lanes stay as they are."""
    if value.type == kind:
        return value
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, _constant(_INTEGERS, 0))


def _operator(symbol: Any, instruction: str) -> None:
    """Lanes with lanes, and lanes with one float32 on either side."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        left, right = (_spread(builder, value) for value in values)
        return getattr(builder, instruction)(left, right, flags=_FAST)

    @type_callable(symbol)
    def _typer(context):  # type: ignore[no-untyped-def]
        def kind(left, right):  # type: ignore[no-untyped-def]
            fits = _SIXTEEN in (left, right) and {left, right} <= {_SIXTEEN, numba.types.float32}
            return _SIXTEEN if fits else None

        return kind

    for left, right in ((_SIXTEEN, _SIXTEEN), (_SIXTEEN, numba.types.float32), (numba.types.float32, _SIXTEEN)):
        lower_builtin(symbol, left, right)(code)


_operator(operator.add, "fadd")
_operator(operator.sub, "fsub")
_operator(operator.mul, "fmul")


def _place(context: Any, builder: Any, kind: Any, position: Any, vector: Any) -> Any:
    """Where (array, row, column) is in memory; rows are contiguous, and an index is never negative."""
    array, row, column = position
    table = context.make_array(kind)(context, builder, array)
    pitch = cgutils.unpack_tuple(builder, table.strides)[0]
    bytes_each = 4 if vector == _VECTOR else vector.element.width // 8
    skip = builder.add(builder.mul(row, pitch), builder.mul(column, ir.Constant(ir.IntType(64), bytes_each)))
    start = builder.gep(builder.bitcast(table.data, ir.IntType(8).as_pointer()), [skip])
    return builder.bitcast(start, vector.as_pointer())


@intrinsic
def load(typing, array, row, column):  # type: ignore[no-untyped-def]
    """Lanes out of a row of an array (N, M) of float32 or unsigned integers, the first at `column`."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = signature.args[0]
        if kind.dtype == numba.types.float32:
            return builder.load(_place(context, builder, kind, values, _VECTOR), align=4)
        integers = ir.VectorType(ir.IntType(kind.dtype.bitwidth), WIDE)
        return builder.uitofp(builder.load(_place(context, builder, kind, values, integers), align=1), _VECTOR)

    return _SIXTEEN(array, numba.types.int64, numba.types.int64), code


@intrinsic
def store(typing, array, row, column, value):  # type: ignore[no-untyped-def]
    """Lanes into a row of a float32 array (N, M), the first at `column`."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        builder.store(values[3], _place(context, builder, signature.args[0], values[:3], _VECTOR), align=4)
        return context.get_dummy_value()

    return numba.types.void(array, numba.types.int64, numba.types.int64, _SIXTEEN), code


def _flags(context: Any, builder: Any, kind: Any, position: Any) -> Any:
    flags = builder.load(_place(context, builder, kind, position, _BYTES), align=1)
    return builder.icmp_unsigned("!=", flags, _constant(_BYTES, 0))


@intrinsic
def where(typing, flags, row, column, value):  # type: ignore[no-untyped-def]
    """The lanes whose flag is set in a row of an array (N, M) of bool; 0 in the others."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.select(_flags(context, builder, signature.args[0], values[:3]), values[3], _constant(_VECTOR, 0.0))

    return _SIXTEEN(flags, numba.types.int64, numba.types.int64, _SIXTEEN), code


@intrinsic
def store_bytes(typing, array, flags, row, column, value, other):  # type: ignore[no-untyped-def]
    """Lanes as bytes into a row of a uint8 array (N, M), `other` where the flag at the same place in an array of bool is not set."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        array, flags, row, column, value, other = values
        good = _flags(context, builder, signature.args[1], (flags, row, column))
        numbers = builder.select(good, builder.trunc(builder.fptosi(value, _INTEGERS), _BYTES), _spread(builder, other, _BYTES))
        builder.store(numbers, _place(context, builder, signature.args[0], (array, row, column), _BYTES), align=1)
        return context.get_dummy_value()

    place = numba.types.int64
    return numba.types.void(array, flags, place, place, _SIXTEEN, numba.types.uint8), code


@intrinsic
def spread(typing, value):  # type: ignore[no-untyped-def]
    """The same float32 in every lane."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return _spread(builder, values[0])

    return _SIXTEEN(numba.types.float32), code


@intrinsic
def ramp(typing, start):  # type: ignore[no-untyped-def]
    """start, start + 1, ... start + 15."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.fadd(_spread(builder, values[0]), ir.Constant(_VECTOR, [float(i) for i in range(WIDE)]))

    return _SIXTEEN(numba.types.float32), code


@intrinsic(prefer_literal=True)
def moved(typing, left, right, by):  # type: ignore[no-untyped-def]
    """Lanes `by` ... `by` + 15 of the thirty-two in left and right: a neighbour without a load that straddles two cache lines."""
    first = by.literal_value

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.shuffle_vector(values[0], values[1], _order(first))

    return _SIXTEEN(_SIXTEEN, _SIXTEEN, by), code


@intrinsic
def backwards(typing, value):  # type: ignore[no-untyped-def]
    """The last lane first."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.shuffle_vector(values[0], values[0], _order(WIDE - 1, -1))

    return _SIXTEEN(_SIXTEEN), code


@intrinsic
def root(typing, value):  # type: ignore[no-untyped-def]
    """Square root, correctly rounded."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        kind = ir.FunctionType(_VECTOR, [_VECTOR])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{WIDE}f32"), values)

    return _SIXTEEN(_SIXTEEN), code


@intrinsic
def choose(typing, left, right, less, other):  # type: ignore[no-untyped-def]
    """less where left < right, other elsewhere."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        return builder.select(builder.fcmp_ordered("<", values[0], values[1]), values[2], values[3])

    return _SIXTEEN(_SIXTEEN, _SIXTEEN, _SIXTEEN, _SIXTEEN), code


@intrinsic
def exponent(typing, value):  # type: ignore[no-untyped-def]
    """floor(log2) of positive numbers, by their bits."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        bits = builder.lshr(builder.bitcast(values[0], _INTEGERS), _constant(_INTEGERS, 23))
        return builder.sitofp(builder.sub(bits, _constant(_INTEGERS, 127)), _VECTOR)

    return _SIXTEEN(_SIXTEEN), code


@intrinsic
def mantissa(typing, value):  # type: ignore[no-untyped-def]
    """Positive numbers over the power of two at or below them: from 1 to 2."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        bits = builder.and_(builder.bitcast(values[0], _INTEGERS), _constant(_INTEGERS, 0x7FFFFF))
        return builder.bitcast(builder.or_(bits, _constant(_INTEGERS, 0x3F800000)), _VECTOR)

    return _SIXTEEN(_SIXTEEN), code


@intrinsic
def total(typing, value):  # type: ignore[no-untyped-def]
    """The sum of the lanes, halves on halves: always in the same order."""

    def code(context, builder, signature, values):  # type: ignore[no-untyped-def]
        vector, count = values[0], WIDE // 2
        while count:
            low = builder.shuffle_vector(vector, vector, _order(0, 1, count))
            vector = builder.fadd(low, builder.shuffle_vector(vector, vector, _order(count, 1, count)))
            count //= 2
        return builder.extract_element(vector, ir.Constant(ir.IntType(32), 0))

    return numba.types.float32(_SIXTEEN), code
