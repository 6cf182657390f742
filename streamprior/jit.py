"""The only door to numba: nogil kernels whose machine code is cached in the state folder, and float32 many at a time inside them."""

from __future__ import annotations

import hashlib
import operator
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils
from numba.core.datamodel.models import PrimitiveModel
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

from streamprior.config import state_folder

_KEPT_CACHES = 4

LANES = 8
"""Numbers in a `Lanes`: a 256-bit register of float32; the compiler splits it where registers are narrower."""

_REGISTER = ir.VectorType(ir.FloatType(), LANES)
_INDEX = ir.IntType(64)
_ORDER = ir.VectorType(ir.IntType(32), LANES)
_FUSE = ("contract", "nsz")  # a product and a sum may round once; nothing is reordered


def _cache_folder() -> Path:
    """A folder for exactly these sources: numba looks at the file of the outermost kernel alone and would keep a stale one otherwise."""
    package = Path(__file__).parent
    sources = [package / "jit.py", *sorted((package / "stages").glob("*.py")), *sorted((package / "mosaic").glob("*.py"))]
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


# Sixteen float32 as one value. The loop vectoriser gives up where a loop reads more than a few rows, because it cannot prove that they
# do not overlap; what is written with lanes stays in registers from the first load to the class. A vector register of 64 bytes holds
# one value; where registers are narrower LLVM takes two or four, and the result is the same.

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
