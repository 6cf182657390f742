"""Shape -> FFT plan: aligned buffers and planned transforms on the CPU, and what a card needs; the only door to pyfftw and to cupy."""

from __future__ import annotations

import ctypes
import fcntl
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft

from streamprior.config import state_folder
from streamprior.errors import ConfigError, DeviceLost

C64 = np.complex64

# FFTW 3 manual, "Planner flags". PATIENT finds plans up to a third faster than MEASURE at 256 x 256; it takes seconds, once, then wisdom
# serves. Beyond 64^3 it would take minutes, and transforms that no longer fit the cache gain little from it.
_MEASURE = 0
_PATIENT = 1 << 5
_ESTIMATE = 1 << 6
_PATIENT_UP_TO = 64**3  # elements
_WISDOM_ONLY = 1 << 21
FORWARD, BACKWARD = -1, 1  # FFTW's words and cuFFT's

# FFTW's planner and its destructor share state and are not thread-safe; only executing is. Re-entrant, because a plan may be
# collected (and destroyed) by the very thread that is planning.
_PLANNER = threading.RLock()


def check_backend(backend: str, able: tuple[str, ...] = ("cpu",)) -> str:
    """What computes here: "cpu" or "cuda".

    Parameters
    ----------
    backend : {"auto", "cpu", "cuda"}
        auto is a CUDA card where there is one.
    able : what the caller has been written for.

    Raises
    ------
    ConfigError
        "cuda" was asked for where the caller, or this machine, cannot.
    ValueError
        A word that names no backend.
    """
    if backend not in ("auto", "cpu", "cuda"):
        raise ValueError(f"backend is {backend!r}; it is 'auto', 'cpu' or 'cuda'")
    if backend == "cuda" and "cuda" not in able:
        raise ConfigError("backend 'cuda': this version computes on the CPU only; set backend to 'auto' or 'cpu'")
    if backend == "cpu" or "cuda" not in able:
        return "cpu"
    missing = cuda_missing()
    if backend == "cuda" and missing is not None:
        raise ConfigError(f"backend 'cuda': {missing}, or set backend to 'auto' or 'cpu'")
    return "cpu" if missing is not None else "cuda"


def cuda_missing() -> str | None:
    """What keeps this process from a CUDA card, and what to do about it; None where nothing does. The first call imports cupy."""
    try:
        import cupy
    except ImportError as error:
        return f"cupy cannot be imported ({error}); install the extra: pip install 'streamprior[gpu]'"
    if not cupy.is_available():
        return f"cupy {cupy.__version__} finds no CUDA card; see that nvidia-smi lists one and that its driver is new enough"
    try:
        cupy.cuda.nvrtc.getVersion()
        cupy.cuda.cufft.getVersion()
    except (ImportError, RuntimeError) as error:
        return f"cupy {cupy.__version__} lacks NVRTC or cuFFT ({' '.join(str(error).split())}); install cupy with its extra 'ctk'"
    return None


def load_cupy() -> Any:
    """The module cupy. Raises ConfigError where it cannot compute."""
    check_backend("cuda", ("cuda",))
    import cupy

    return cupy


@contextmanager
def card_errors(cupy: Any, streams: Sequence[Any] = ()) -> Iterator[None]:
    """Say of an error within it what it means for who computes on the card.

    Parameters
    ----------
    streams : what has been asked of them is waited for, whatever the error: the memory that it uses goes back to a pool after this.

    Raises
    ------
    MemoryError
        There was no room, on the card or in main memory. The same with less may go through.
    DeviceLost
        The card failed, and will not do anything more for this process.
    RuntimeError
        CUDA refused something else: a fault of streamprior's, and raised as it came.
    """
    cuda = cupy.cuda
    try:
        yield
    except (MemoryError, cuda.runtime.CUDARuntimeError, cuda.driver.CUDADriverError, cuda.cufft.CuFFTError) as error:
        if _is_lost(cupy, streams):
            raise DeviceLost(str(error)) from error
        if isinstance(error, MemoryError) or _NO_ROOM not in (getattr(error, "status", None), getattr(error, "result", None)):
            raise
        raise MemoryError(str(error)) from error


_NO_ROOM = 2
"""cudaErrorMemoryAllocation and CUDA_ERROR_OUT_OF_MEMORY (status), CUFFT_ALLOC_FAILED (result)."""


def _is_lost(cupy: Any, streams: Sequence[Any]) -> bool:
    """CUDA's errors tell less than one more call: after an illegal address, a failed launch or an uncorrectable memory error every one of
    them fails (CUDA Runtime API, cudaError_t: "the process must be terminated and relaunched")."""
    try:
        for stream in streams:
            stream.synchronize()  # sync: only after an error
        cupy.cuda.runtime.memGetInfo()
    except cupy.cuda.runtime.CUDARuntimeError:
        return True
    return False


def free_card_memory() -> None:
    """Give back what cupy's pools hold and nobody uses: another process may need it, and so may what CUDA allocates beside the pools.

    Raises as `card_errors` does, and ConfigError where there is no card.
    """
    cupy = load_cupy()
    with card_errors(cupy):
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()


def plan_cufft(cupy: Any, shape: tuple[int, ...], batch: int) -> Any:
    """cuFFT's plan for a contiguous (batch, *shape) complex64 array: `plan.fft(source, goal, FORWARD)` or BACKWARD transforms all its axes
    but the first, without scaling, on the current stream; the goal may be the source."""
    layout = (shape, 1, math.prod(shape))
    cufft = cupy.cuda.cufft
    return cufft.PlanNd(shape, *layout, *layout, cufft.CUFFT_C2C, batch, "C", 1, None)


def page_locked(cupy: Any, shape: tuple[int, ...], kind: npt.DTypeLike) -> npt.NDArray[Any]:
    """An uninitialised array that a card copies from and to while the CPU goes on. Its memory goes back to cupy's pool with it."""
    count = math.prod(shape)
    memory = cupy.cuda.alloc_pinned_memory(max(1, count) * np.dtype(kind).itemsize)
    return np.frombuffer(memory, kind, count).reshape(shape)


def make_plan(shape: tuple[int, ...], engine: str = "auto", batch: int | None = None) -> FftwPlan | ScipyPlan:
    """Plan the transforms of one shape, in two or three dimensions.

    Parameters
    ----------
    shape : (H, W) or (D, H, W)
    engine : {"auto", "fftw", "scipy", "repeatable"}
        auto is FFTW where pyFFTW is installed (the extra `fftw`), else scipy.fft, which is slower and rounds differently. repeatable is the
        same choice, but FFTW plans by rule and not by timing: the same bits whatever wisdom is kept, and a few parts in ten slower.
    batch : int, optional
        Fields that one call transforms beside each other (the modes of a probe); the buffers are then (batch, *shape).

    Raises
    ------
    ConfigError
        FFTW was asked for and is not there, or the state folder cannot keep its wisdom.
    """
    if engine == "scipy" or (engine in ("auto", "repeatable") and _fftw() is None):
        return ScipyPlan(shape, batch)
    return FftwPlan(shape, _by_rule if engine == "repeatable" else None, batch)


Planner = Callable[[ctypes.CDLL], AbstractContextManager[Any]]
"""library -> context that gives plan(source, target, sign, rank) -> address; the last `rank` axes are transformed."""


class FftwPlan:
    """Owns two aligned buffers and the FFTW plans between them, for one thread at a time.

    psi, field : complex64 of the plan's shape, (batch, *shape) where there is a batch. `forward` fills field from psi and leaves psi;
    `backward` transforms field in place.
    Neither scales: the pair multiplies by the number of elements, and the unitary factor is folded into the caller's own pass.
    execute, forward_plan, backward_plan : addresses, for a compiled loop that calls FFTW without coming back to Python.
    """

    engine = "fftw"

    def __init__(self, shape: tuple[int, ...], planner: Planner | None = None, batch: int | None = None) -> None:
        library = _fftw()
        if library is None:
            raise ConfigError("FFTW is not installed; install the extra: pip install 'streamprior[fftw]'")
        self.psi, self.field = _buffers(shape, batch)
        self._run = library.fftwf_execute
        with (planner or _planner)(library) as plan:
            self.forward_plan = plan(self.psi, self.field, FORWARD, len(shape))
            self.backward_plan = plan(self.field, self.field, BACKWARD, len(shape))
        self.execute = _address(library.fftwf_execute)
        self.psi[...] = 0
        self.field[...] = 0
        # Not at exit: a daemon thread may still be inside the plan when the interpreter ends.
        weakref.finalize(self, _destroy, library, (self.forward_plan, self.backward_plan)).atexit = False

    def forward(self) -> None:
        self._run(self.forward_plan)

    def backward(self) -> None:
        self._run(self.backward_plan)


class ScipyPlan:
    """The same buffers and transforms over scipy.fft, for machines without FFTW."""

    engine = "scipy"

    def __init__(self, shape: tuple[int, ...], batch: int | None = None) -> None:
        self.psi, self.field = _buffers(shape, batch)
        self._axes = tuple(range(-len(shape), 0))
        self.psi[...] = 0
        self.field[...] = 0

    def forward(self) -> None:
        self.field[...] = scipy.fft.fftn(self.psi, axes=self._axes, workers=1)

    def backward(self) -> None:
        self.field[...] = scipy.fft.ifftn(self.field, axes=self._axes, norm="forward", workers=1)


def _buffers(shape: tuple[int, ...], batch: int | None) -> tuple[npt.NDArray[np.complex64], npt.NDArray[np.complex64]]:
    whole = shape if batch is None else (batch, *shape)
    return aligned(whole), aligned(whole)


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike = C64) -> npt.NDArray[Any]:
    """An uninitialised array that begins on a cache line, as vector instructions and FFTW's fastest codelets want it."""
    wanted = np.dtype(dtype)
    nbytes = math.prod(shape) * wanted.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    offset = -raw.ctypes.data % 64
    return raw[offset : offset + nbytes].view(wanted).reshape(shape)


def far_field(psi: npt.NDArray[np.complex64]) -> npt.NDArray[np.complex64]:
    """(B, ...) centred objects -> their centred far fields, by the unitary FFT of each; for what is not done frame by frame."""
    axes = tuple(range(1, psi.ndim))
    return np.asarray(scipy.fft.fftshift(scipy.fft.fftn(scipy.fft.ifftshift(psi, axes), axes=axes, norm="ortho", workers=1), axes))


def corner_order(shape: tuple[int, ...]) -> npt.NDArray[np.intp]:
    """Flat indices that take a centred array to FFT order: `array.ravel()[corner_order(shape)]` is its ifftshift, flat."""
    return np.fft.ifftshift(np.arange(math.prod(shape), dtype=np.intp).reshape(shape)).ravel()


@cache
def _fftw() -> ctypes.CDLL | None:
    """The single-precision FFTW that pyFFTW brings, or None.

    pyFFTW's compiled module is opened as a library and not imported (which takes a second and a half where dask is installed); a symbol
    is looked up in a library's dependencies too, so this finds a bundled FFTW with a mangled name as well as the system's.
    """
    package = find_spec("pyfftw")
    places = [] if package is None else package.submodule_search_locations or []
    modules = [Path(place, f"pyfftw{suffix}") for place in places for suffix in EXTENSION_SUFFIXES]
    found = next((module for module in modules if module.exists()), None)
    if found is None:
        return None
    try:
        library = ctypes.CDLL(str(found))
        library.fftwf_plan_many_dft.restype = ctypes.c_void_p
        library.fftwf_execute.restype = None
        library.fftwf_destroy_plan.restype = None
    except (OSError, AttributeError):
        return None
    pointer = ctypes.c_void_p
    integer = ctypes.c_int
    side: list[Any] = [pointer, pointer, integer, integer]
    library.fftwf_plan_many_dft.argtypes = [integer, pointer, integer, *side, *side, integer, ctypes.c_uint]
    library.fftwf_execute.argtypes = [pointer]
    library.fftwf_destroy_plan.argtypes = [pointer]
    library.fftwf_import_wisdom_from_filename.argtypes = [ctypes.c_char_p]
    library.fftwf_export_wisdom_to_filename.argtypes = [ctypes.c_char_p]
    return library


def _layout(source: npt.NDArray[np.complex64], target: npt.NDArray[np.complex64], rank: int) -> tuple[Any, ...]:
    """The first arguments of fftwf_plan_many_dft: contiguous transforms over the last `rank` axes, one behind the other."""
    lengths = (ctypes.c_int * rank)(*source.shape[-rank:])
    apart = math.prod(source.shape[-rank:])
    side = (None, 1, apart)
    return rank, lengths, source.size // apart, source.ctypes.data, *side, target.ctypes.data, *side


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address is not None
    return address


@contextmanager
def _by_rule(library: ctypes.CDLL) -> Iterator[Any]:
    """Hand out a planning function that depends on the shape alone.

    FFTW estimates costs instead of timing them, but takes a timed plan where wisdom holds one: so wisdom is forgotten first. It is read
    again from its file when the next timed plan is made.
    """

    def plan(source: npt.NDArray[np.complex64], target: npt.NDArray[np.complex64], sign: int, rank: int) -> int:
        library.fftwf_forget_wisdom()
        return int(library.fftwf_plan_many_dft(*_layout(source, target, rank), sign, _ESTIMATE))

    with _PLANNER:
        if hasattr(library, "fftwf_plan_with_nthreads"):
            library.fftwf_plan_with_nthreads(1)
        yield plan


@contextmanager
def _planner(library: ctypes.CDLL) -> Iterator[Any]:
    """Hand out a planning function that gives every process on this machine the same plan for the same shape.

    FFTW chooses among plans by timing them, and plans differ in how they round: without shared wisdom a live run and its replay
    would agree only by luck. So wisdom is read first, and a new plan is made and written under a lock that all processes take.
    """

    def plan(source: npt.NDArray[np.complex64], target: npt.NDArray[np.complex64], sign: int, rank: int) -> int:
        arguments = (*_layout(source, target, rank), sign)
        effort = _PATIENT if source.size <= _PATIENT_UP_TO else _MEASURE
        made = library.fftwf_plan_many_dft(*arguments, effort | _WISDOM_ONLY) if path.exists() else None
        if made is None:
            with _locked(path.with_name("fftw-wisdom.lock")):
                _import(library, path)
                made = library.fftwf_plan_many_dft(*arguments, effort)
                _export(library, path)
        return int(made)

    path = state_folder() / "fftw-wisdom"
    with _PLANNER:
        if hasattr(library, "fftwf_plan_with_nthreads"):  # another user of FFTW in this process may have asked for more
            library.fftwf_plan_with_nthreads(1)
        _import(library, path)
        yield plan


def _import(library: ctypes.CDLL, path: Path) -> None:
    """Read wisdom; FFTW refuses a file that is absent, damaged or from another build, and it is then written anew."""
    library.fftwf_import_wisdom_from_filename(bytes(path))


def _export(library: ctypes.CDLL, path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    if not library.fftwf_export_wisdom_to_filename(bytes(partial)):
        raise ConfigError(f"the FFT plans cannot be kept in {path.parent}: make it writable, or set STREAMPRIOR_STATE to a folder that is")
    partial.replace(path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        file = path.open("a")
    except OSError as error:
        raise ConfigError(f"the FFT plans cannot be kept in {path.parent} ({error}): set STREAMPRIOR_STATE to a writable folder") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _destroy(library: ctypes.CDLL, plans: tuple[int, ...]) -> None:
    with _PLANNER:
        for plan in plans:
            library.fftwf_destroy_plan(plan)
