"""kernels.cu on a CPU: the source compiled by g++ behind as much of cupy as streamprior asks of it, for machines without a card.

It stands in for a card where a card is strict. Nothing that a stream was given is done before somebody waits for it; memory is NaN until it
is written and has guards on both sides; an argument of another type than the kernel's is refused; threads of a block meet at
`__syncthreads`, all of them or none. What it cannot show: cupy's and the driver's own behaviour, races between threads, and speed.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import scipy.fft

SHIM = r"""
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <utility>
#include <vector>
#include <ucontext.h>
#define __global__
#define __device__ static inline
#define __shared__ static
#define __forceinline__
#define __launch_bounds__(...)
#define GUARDED_BYTES 256
struct float2 { float x, y; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index { unsigned x, y, z; };
static Index blockIdx, threadIdx, gridDim;
static inline unsigned __float_as_uint(float value) { unsigned bits; std::memcpy(&bits, &value, 4); return bits; }
static inline float __uint_as_float(unsigned bits) { float value; std::memcpy(&value, &bits, 4); return value; }
static inline int atomicAdd(int *sum, int value) { int before = *sum; *sum += value; return before; }

// What a launch asked for with shared_mem, and a guard behind it.
alignas(16) static char dynamic_shared[228 * 1024 + GUARDED_BYTES];

static ucontext_t scheduler, *running;
static int waiting;
static inline void __syncthreads() { ++waiting; swapcontext(running, &scheduler); }

struct Body { void (*call)(void *kernel, void **arguments); void *kernel; void **arguments; };
static Body body;
static void one_thread() { body.call(body.kernel, body.arguments); }

// Threads of a block in turns, each up to its next barrier. False where only some of them came to one.
static bool run_block(int threads, bool descending) {
    static std::vector<char> stacks;
    const size_t room = 64 * 1024;
    stacks.resize(threads * room);
    std::vector<ucontext_t> contexts(threads);
    for (int t = 0; t < threads; ++t) {
        getcontext(&contexts[t]);
        contexts[t].uc_stack.ss_sp = stacks.data() + t * room;
        contexts[t].uc_stack.ss_size = room;
        contexts[t].uc_link = &scheduler;
        makecontext(&contexts[t], one_thread, 0);
    }
    do {
        waiting = 0;
        for (int i = 0; i < threads; ++i) {
            int t = descending ? threads - 1 - i : i;
            threadIdx = {(unsigned)t, 0, 0};
            running = &contexts[t];
            swapcontext(&scheduler, running);
        }
    } while (waiting == threads);
    return waiting == 0;
}

template <class... A, size_t... I> void call_with(void (*kernel)(A...), void **arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A> *)arguments[I]...);
}
template <class... A> void call_it(void *kernel, void **arguments) {
    call_with((void (*)(A...))kernel, arguments, std::index_sequence_for<A...>());
}
// 0: done. 1: not all threads of a block came to a barrier. 2: a block wrote behind its dynamic shared memory.
template <class... A> int launch(void (*kernel)(A...), int across, int down, int threads, int shared, bool descending, void **arguments) {
    body = {call_it<A...>, (void *)kernel, arguments};
    gridDim = {(unsigned)across, (unsigned)down, 1};
    for (int i = 0; i < across * down; ++i) {
        int block = descending ? across * down - 1 - i : i;
        blockIdx = {(unsigned)(block % across), (unsigned)(block / across), 0};
        std::memset(dynamic_shared, 0xFF, shared + GUARDED_BYTES);  // NaN until it is written
        if (!run_block(threads, descending)) return 1;
        for (int k = 0; k < GUARDED_BYTES; ++k) {
            if (dynamic_shared[shared + k] != (char)0xFF) return 2;
        }
    }
    return 0;
}
"""

POINTERS = {
    "float2": np.complex64,
    "float": np.float32,
    "int": np.int32,
    "double": np.float64,
    "unsigned char": np.uint8,
    "unsigned short": np.uint16,
    "unsigned int": np.uint32,
}
VALUES = {"float": (np.float32, ctypes.c_float), "int": (np.int32, ctypes.c_int), "double": (np.float64, ctypes.c_double)}
SHARED_BYTES = 227 * 1024  # that a block of an H100 or H200 may ask for
Parameter = tuple[str, str, str]

GUARD = 256  # bytes
UNWRITTEN = 0xFF  # float32 and float64 of such bytes are NaN

_ONE_AT_A_TIME = threading.RLock()
"""blockIdx and threadIdx are global variables here."""


class CudaError(RuntimeError):
    """What a CUDA call answers; cupy has one for the runtime and one for the driver. status : of cudaError_t."""

    def __init__(self, status: int, name: str) -> None:
        super().__init__(name)
        self.status = status


class CufftError(RuntimeError):
    """What cuFFT answers. result : of cufftResult."""

    def __init__(self, result: int, name: str) -> None:
        super().__init__(name)
        self.result = result


class Array(np.ndarray):  # type: ignore[type-arg]
    """Memory of the card."""

    def set(self, host: np.ndarray, stream: Stream) -> None:  # type: ignore[type-arg]
        assert host.dtype == self.dtype
        assert host.shape == self.shape
        assert self.flags.c_contiguous
        stream.later(lambda: np.copyto(self, host))

    def get(self, stream: Stream | None = None, out: np.ndarray | None = None, blocking: bool = True) -> np.ndarray:  # type: ignore[type-arg]
        where = stream or Stream.current()
        if out is not None:
            assert not blocking
            assert out.dtype == self.dtype
            assert out.shape == self.shape
            assert out.flags.c_contiguous
            assert self.flags.c_contiguous
            where.later(lambda: np.copyto(out, self))
            return out
        where.synchronize()
        return np.array(self)


class Event:
    """A place in a stream that another one, or the CPU, waits for."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self.stream: Stream | None = None
        self.recorded = self.passed = 0

    def record(self, stream: Stream) -> None:
        self.stream = stream
        self.recorded += 1
        number = self.recorded
        stream.later(lambda: setattr(self, "passed", number))

    def synchronize(self) -> None:
        with _ONE_AT_A_TIME:
            self.reach(self.recorded)

    def reach(self, number: int) -> None:
        while self.passed < number:
            assert self.stream is not None
            self.stream.step()


class Graph:
    """What was asked of a stream while it was captured."""

    def __init__(self, queue: list[Callable[[], None]]) -> None:
        self._queue = queue

    def launch(self, stream: Stream) -> None:
        for work in self._queue:
            stream.later(work)


class Stream:
    """What has been asked of the card and not been waited for."""

    _now = threading.local()

    def __init__(self, card: Card) -> None:
        self._card = card
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None

    @classmethod
    def current(cls) -> Stream:
        return cls._now.stack[-1]  # type: ignore[no-any-return]

    def __enter__(self) -> None:
        self._now.stack = [*getattr(self._now, "stack", []), self]

    def __exit__(self, *_: object) -> None:
        self._now.stack = self._now.stack[:-1]

    def later(self, work: Callable[[], None]) -> None:
        (self._queue if self._captured is None else self._captured).append(work)

    def begin_capture(self, mode: int) -> None:
        assert self._captured is None
        self._captured = []

    def end_capture(self) -> Graph:
        assert self._captured, "a capture without work, or one that was not begun"
        graph, self._captured = Graph(self._captured), None
        self._card.graphs += 1
        return graph

    def wait_event(self, event: Event) -> None:
        number = event.recorded
        self.later(lambda: event.reach(number))

    def step(self) -> None:
        """Do the next thing that was asked."""
        self._queue.pop(0)()

    def synchronize(self) -> None:
        assert self._captured is None, "a wait within a capture"
        self._card.ask()
        self._card.waits += 1
        with _ONE_AT_A_TIME:
            while self._queue:
                self.step()
            self._card.check_guards()


class Kernel:
    """One `extern "C" __global__` function."""

    def __init__(self, library: ctypes.CDLL, card: Card, name: str, parameters: list[Parameter]) -> None:
        self._run, self._card, self.name, self._parameters = getattr(library, f"launch_{name}"), card, name, parameters
        self._run.restype = ctypes.c_int
        self.max_dynamic_shared_size_bytes = 48 * 1024  # a kernel that wants more has to say so

    def __call__(self, grid: tuple[int, ...], block: tuple[int], arguments: tuple[Any, ...], shared_mem: int = 0) -> None:
        assert shared_mem <= min(self.max_dynamic_shared_size_bytes, SHARED_BYTES), f"{self.name}: {shared_mem} bytes of shared memory"
        assert len(arguments) == len(self._parameters), f"{self.name}: {len(arguments)} arguments for {len(self._parameters)} parameters"
        assert all(length > 0 for length in grid), f"{self.name}: an empty grid {grid}"
        values = [self._value(*pair) for pair in zip(self._parameters, arguments, strict=True)]
        across, down = (*grid, 1)[:2]

        def run() -> None:
            packed = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            wrong = self._run(across, down, block[0], shared_mem, self._card.descending, packed)
            assert wrong != 1, f"{self.name}: not all threads of a block came to a barrier"
            assert wrong != 2, f"{self.name}: a block wrote behind its shared memory"

        self._card.ask(launch=True)
        # A view keeps what it looks into; the closure keeps the views.
        Stream.current().later(lambda kept=arguments: run())  # type: ignore[misc]

    def _value(self, parameter: Parameter, argument: Any) -> Any:
        kind, pointer, name = parameter
        if pointer:
            assert isinstance(argument, Array), f"{self.name}: {name} is given {type(argument)}"
            assert argument.dtype == POINTERS[kind], f"{self.name}: {name} is given {argument.dtype}"
            return ctypes.c_void_p(argument.ctypes.data)
        wanted, passed_as = VALUES[kind]
        assert type(argument) is wanted, f"{self.name}: {name} is given {type(argument)}"
        return passed_as(argument)


class Plan:
    """cuFFT's PlanNd, for contiguous transforms without scaling."""

    def __init__(self, shape, inembed, istride, idist, onembed, ostride, odist, fft_type, batch, order, last_axis, last_size) -> None:  # type: ignore[no-untyped-def]
        assert inembed == onembed == shape
        assert (istride, ostride, fft_type, order, last_axis, last_size) == (1, 1, "C2C", "C", 1, None)
        assert idist == odist == np.prod(shape)
        self._shape = (batch, *shape)

    def fft(self, source: Array, goal: Array, direction: int) -> None:
        assert source.size == goal.size == np.prod(self._shape)
        axes = tuple(range(1, len(self._shape)))
        planes, filled = source.reshape(self._shape), goal.reshape(self._shape)
        transform = {-1: scipy.fft.fftn, 1: lambda array, axes: scipy.fft.ifftn(array, axes=axes, norm="forward")}[direction]

        def run() -> None:
            with np.errstate(invalid="ignore", over="ignore"):  # what lies behind the frames has not been written
                filled[...] = transform(np.asarray(planes), axes=axes)

        Stream.current().later(run)


class Card:
    """What stands in for the module cupy. descending : threads and blocks in the opposite order. waits : how often somebody waited.
    graphs : how many were captured. room_bytes : of one array; for a larger one there is no memory. launches_left : until a kernel reads an
    illegal address, after which the card answers nothing any more, as CUDA's would. freed : how often its pools gave memory back."""

    __version__ = "0, on the CPU"
    maximum = staticmethod(np.maximum)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._memory: list[np.ndarray] = []  # type: ignore[type-arg]
        self._modules: dict[str, tuple[ctypes.CDLL, dict[str, list[Parameter]]]] = {}
        self.descending = False
        self.waits = self.graphs = self.freed = 0
        self.room_bytes: float = math.inf
        self.launches_left: float = math.inf
        limits = {"MaxSharedMemoryPerBlockOptin": SHARED_BYTES, "MaxSharedMemoryPerMultiprocessor": 228 * 1024, "MultiProcessorCount": 2}
        self.cuda = SimpleNamespace(
            Stream=lambda non_blocking=False: Stream(self),
            Event=lambda disable_timing: Event(self),
            Device=lambda: SimpleNamespace(attributes=limits),
            runtime=SimpleNamespace(streamCaptureModeThreadLocal=1, CUDARuntimeError=CudaError, memGetInfo=self.ask),
            driver=SimpleNamespace(CUDADriverError=CudaError),
            alloc_pinned_memory=lambda nbytes: bytearray([UNWRITTEN]) * (nbytes + 32),  # cupy, too, gives more than was asked for
            cufft=SimpleNamespace(PlanNd=Plan, CUFFT_C2C="C2C", getVersion=lambda: 0, CuFFTError=CufftError),
            nvrtc=SimpleNamespace(getVersion=lambda: 0),
        )

    def is_available(self) -> bool:
        return True

    def ask(self, launch: bool = False) -> None:
        """Any call: refused by a card that has failed."""
        self.launches_left -= launch
        if self.launches_left < 0:
            raise CudaError(700, "cudaErrorIllegalAddress: an illegal memory access was encountered")

    def get_default_memory_pool(self) -> Any:
        return SimpleNamespace(free_all_blocks=self._free)

    get_default_pinned_memory_pool = get_default_memory_pool

    def _free(self) -> None:
        self.ask()
        self.freed += 1

    def RawModule(self, code: str, options: tuple[str, ...] = ()) -> Any:  # noqa: N802
        if code not in self._modules:
            self._modules[code] = compiled(code, self._folder)
        library, kernels = self._modules[code]
        return SimpleNamespace(get_function=lambda name: Kernel(library, self, name, kernels[name]))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        self.ask()
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if nbytes > self.room_bytes:
            raise MemoryError(f"Out of memory allocating {nbytes} bytes")  # cupy's own is one
        raw = np.full(nbytes + 2 * GUARD, UNWRITTEN, np.uint8)
        self._memory.append(raw)
        return raw[GUARD : GUARD + nbytes].view(dtype).reshape(shape).view(Array)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def ones(self, shape: tuple[int, ...], dtype: Any) -> Array:
        array = self.empty(shape, dtype)
        array[...] = 1
        return array

    def asarray(self, host: np.ndarray) -> Array:  # type: ignore[type-arg]
        array = self.empty(host.shape, host.dtype)
        array[...] = host
        return array

    def forget(self) -> None:
        """Begin again for the next test."""
        self._memory.clear()
        self.descending, self.waits, self.graphs, self.freed = False, 0, 0, 0
        self.room_bytes = self.launches_left = math.inf

    def check_guards(self) -> None:
        for raw in self._memory:
            assert (raw[:GUARD] == UNWRITTEN).all(), "a kernel wrote before its array"
            assert (raw[-GUARD:] == UNWRITTEN).all(), "a kernel wrote behind its array"


_NUMBERS = itertools.count()


def compiled(code: str, folder: Path) -> tuple[ctypes.CDLL, dict[str, list[Parameter]]]:
    """The source as a library, and (type, "*" or nothing, name) of each kernel's parameters."""
    code = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1 *const \2 = (\1 *)dynamic_shared;", code)
    found = re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\)', code)
    aliases = {alias: kind for kind, alias in re.findall(r"typedef ([\w ]+) (\w+);", code)}
    kernels: dict[str, list[Parameter]] = {}
    for name, parameters in found:
        typed = re.findall(r"(?:const )?(\w+) (\*?)(\w+)(?:,|$)", parameters)
        kernels[name] = [(aliases.get(kind, kind), pointer, parameter) for kind, pointer, parameter in typed]
    doors = "\n".join(
        f'extern "C" int launch_{name}(int across, int down, int threads, int shared, bool descending, void **arguments) '
        f"{{ return launch({name}, across, down, threads, shared, descending, arguments); }}"
        for name in kernels
    )
    target = folder / f"kernels{next(_NUMBERS)}.so"
    source = target.with_suffix(".cpp")
    source.write_text(SHIM + code + doors)
    done = subprocess.run(
        [
            "g++",
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Werror",
            "-Wno-sign-compare",
            "-Wno-unknown-pragmas",
            "-Wno-parentheses",
            "-fPIC",
            "-shared",
            "-o",
            str(target),
            str(source),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(target)), kernels
