"""References of Bluesky documents -> pixels: HDF5, TIFF and .npy files within the folders that the operator has listed.

Documents come from a stranger and name files of this machine, so nothing that they name is opened before it has been resolved (`moved`,
links, ..) and found within a listed folder, and no library is left to follow a link out of a file by itself.
"""

from __future__ import annotations

import errno
import math
import os
import re
import stat
import struct
import tokenize
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import h5py
import hdf5plugin  # noqa: F401 - registers the filters that detectors' writers compress with
import numpy as np
import numpy.typing as npt
import tifffile

from streamprior.errors import WireError
from streamprior.wire.dectris_v2 import MAX_MESSAGE_BYTES
from streamprior.wire.told import cut, shown

_OPEN_FILES = 8
"""Kept open between frames: a detector's file, or a master file and what it links to or is made of."""

_CHUNK_CACHE = 32 * 2**20
"""Bytes of decompressed chunks that HDF5 keeps of a dataset: with its default of 1 MiB a chunk of 100 frames is decompressed 100 times."""

_HOPS = 16
"""Links that may lead to a dataset one after another."""

_SOURCES = 256
"""Datasets that a virtual one may be made of."""

_NOT_NOW = (errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EAGAIN, errno.ESTALE, errno.EBUSY)

# What damaged or hostile files make the libraries raise; none of it is our fault.
_LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    AssertionError,
    MemoryError,
    SyntaxError,
    ImportError,
    EOFError,
    struct.error,
    zlib.error,
    tokenize.TokenError,
    tifffile.TiffFileError,
)

_NUMBER = re.compile(r"%([-+ #0]*)(\d{0,2})(?:\.(\d{1,2}))?d|\{(?:0?:(0?)(\d{0,2})d?)?\}")
"""Where a template has the file's number: %06d, %6.6d, {:06d}, {}. Widths are bounded: "%1000000000d" is a gigabyte."""

_HDF5_SPECS = {
    "HDF5": "/entry/data/data",
    "AD_HDF5": "/entry/data/data",
    "AD_HDF5_SINGLE": "/entry/data/data",
    "AD_HDF5_SWMR": "/entry/data/data",
    "AD_HDF5_SWMR_STREAM": "/entry/data/data",
    "AD_HDF5_SWMR_SLICE": "/entry/data/data",
    "TPX_HDF5": "/entry/instrument/detector/data",
}
"""Specs of old resource documents that are one dataset of frames, and where it is unless the document says otherwise."""


class Awaited(WireError):  # noqa: N818 - an answer, not a failure
    """It may be there a moment later: the file is absent, not whole, or does not hold that frame yet."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Where the frames of one resource lie.

    name : the file, or what the names of numbered files begin with, as the documents have it. template : with the number of the file;
    empty: there is one file. per_file : frames in each numbered file. dataset : path within HDF5. per_event : frames of one event.
    rows : of a frame where that is known, for datasets (N x rows, columns).
    """

    kind: Literal["hdf5", "tiff", "npy"]
    name: str
    per_event: int = 1
    template: str = ""
    per_file: int = 1
    dataset: str = ""
    rows: int | None = None

    def place(self, row: int) -> tuple[str, int]:
        """File and place in it of frame `row` of the resource."""
        if not self.template:
            return self.name, row
        tail = _filled_in(self.template, row // self.per_file)
        return self.name + (tail.lstrip("/") if self.name.endswith("/") else tail), row % self.per_file


def stream_stack(resource: Mapping[str, Any], shape: Sequence[int]) -> Stack:
    """A stream_resource document as a stack.

    Parameters
    ----------
    resource : uri, mimetype, parameters (dataset, template, filename, chunk_shape, join_method, multiplier, files_per_datum).
    shape : of the data key in the descriptor, (..., rows, columns).

    Raises
    ------
    WireError
        no_reader: another scheme, mimetype or parameter; bad_document.
    """
    if "mimetype" not in resource:  # event-model before 1.20
        return resource_stack(resource, {}, shape)[0]
    parameters = _mapping(resource, "parameters")
    mimetype = resource["mimetype"]
    per_event = _frames_an_event(parameters, shape)
    name = path_of_uri(resource["uri"])
    rows = shape[-2] if len(shape) > 1 else None
    if parameters.get("slice") or parameters.get("squeeze"):
        raise WireError("no_reader", "a dataset of which the documents take a slice; refer to a dataset that is frames as a whole")
    if mimetype == "application/x-hdf5" and not parameters.get("template"):
        return Stack("hdf5", name, per_event, dataset=_dataset_path(parameters), rows=rows)
    kinds: dict[str, Literal["hdf5", "tiff", "npy"]] = {
        "application/x-hdf5": "hdf5",
        "multipart/related;type=image/tiff": "tiff",
        "multipart/related;type=application/x-npy": "npy",
    }
    kind = kinds.get(mimetype) if isinstance(mimetype, str) else None
    if kind is None:
        raise WireError("no_reader", f"files of type {shown(mimetype)}; read are {', '.join(kinds)}")
    return Stack(
        kind,
        name,
        per_event,
        # Whatever its parameters say, this type has one naming: that of ophyd's simulated cameras.
        _compiled("_%d.npy" if kind == "npy" else parameters.get("template"), parameters.get("filename", "")),
        per_event if kind == "npy" else _frames_a_file(parameters, shape, per_event),
        _dataset_path(parameters) if kind == "hdf5" else "",
        rows,
    )


def resource_stack(resource: Mapping[str, Any], datum: Mapping[str, Any], shape: Sequence[int]) -> tuple[Stack, int]:
    """An old resource document, and the kwargs of one of its datums, as a stack and the first frame of that datum.

    Raises WireError: no_reader, bad_document.
    """
    spec = resource.get("spec")
    kwargs = dict(_mapping(resource, "resource_kwargs")) | dict(datum)
    per_event = _frames_an_event(kwargs, shape)
    root, path = resource.get("root") or "", resource.get("resource_path")
    if not isinstance(root, str) or not isinstance(path, str):
        raise WireError("bad_document", "a resource whose root or resource_path is no text")
    # Writers begin resource_path with a slash and mean it relative to the root all the same.
    name = _forward(f"{root.rstrip('/')}/{path.lstrip('/')}" if root else path)
    rows = shape[-2] if len(shape) > 1 else None
    named = [key for key in ("point_number", "index", "frame") if key in datum]
    point = datum[named[0]] if named else 0
    if not isinstance(point, int) or isinstance(point, bool) or not 0 <= point < 2**40:
        raise WireError("bad_document", f"a datum whose {named[0]} is {shown(point)}")
    if spec == "NPY_SEQ":
        return Stack("npy", name, per_event, "_%d.npy", per_event, rows=rows), point * per_event
    if spec in ("AD_TIFF", "AD_HDF5_SINGLE"):
        template = _compiled(kwargs.get("template"), kwargs.get("filename", ""))
        kind: Literal["hdf5", "tiff"] = "tiff" if spec == "AD_TIFF" else "hdf5"
        dataset = _dataset_path(kwargs, _HDF5_SPECS[spec]) if kind == "hdf5" else ""
        return Stack(kind, f"{name.rstrip('/')}/", per_event, template, 1, dataset, rows), point * per_event
    if spec in _HDF5_SPECS:
        return Stack("hdf5", name, per_event, dataset=_dataset_path(kwargs, _HDF5_SPECS[spec]), rows=rows), point * per_event
    raise WireError("no_reader", f"a resource of spec {shown(spec)}; read are AD_TIFF, NPY_SEQ, {', '.join(_HDF5_SPECS)}")


def path_of_uri(uri: Any) -> str:
    """file://localhost/data/x.h5 -> /data/x.h5. Raises WireError: no_reader for what is not a file of this machine."""
    try:
        parts = urlsplit(uri)
        scheme, host, path = parts.scheme, parts.netloc, parts.path
    except (ValueError, TypeError, AttributeError) as error:
        raise WireError("bad_document", f"a URI that is none: {cut(str(error))}") from None
    if not isinstance(uri, str) or scheme != "file" or host not in ("", "localhost"):
        raise WireError("no_reader", f"{cut(str(uri))}: read are file://localhost/... alone; mount what is elsewhere")
    return _forward(unquote(path))


class Assets:
    """Reads frames, one at a time. Owns the few files that are open.

    Parameters
    ----------
    folders : what lies within them is read, nothing else. moved : folder as the documents name it -> where this machine has it.
    most_bytes : a larger frame, or chunk of a file, is refused before memory is taken for it.
    """

    def __init__(self, folders: Sequence[Path], moved: Mapping[str, Path], most_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._folders = [os.path.realpath(folder) for folder in folders]
        self._moved = sorted(((_forward(was).rstrip("/"), os.fspath(now)) for was, now in moved.items()), key=lambda one: -len(one[0]))
        self._most_bytes = most_bytes
        self._files: OrderedDict[tuple[str, int, int], _Hdf5 | _Tiff] = OrderedDict()

    def frame(self, stack: Stack, row: int) -> npt.NDArray[Any]:
        """Frame `row` of a stack, (rows, columns), as it is in the file.

        Raises
        ------
        Awaited
            file_absent, file_damaged: it may be there, or whole, a moment later.
        WireError
            outside_folder, no_reader, wrong_shape, wrong_dtype, too_large.
        """
        name, at = stack.place(row)
        try:
            path = self.resolve(name)
            if stack.kind == "npy":
                return self._npy(path, at)
            return self._tiff(path, at) if stack.kind == "tiff" else self._hdf5(path, stack, at)
        except WireError:
            # Opened anew next time: without SWMR an open file never shows that it has grown.
            self.close()
            raise
        except _LIBRARY_ERRORS as error:
            self.close()
            reason = "file_absent" if isinstance(error, OSError) and error.errno in _NOT_NOW else "file_damaged"
            raise Awaited(reason, f"{cut(ascii(name))}: {cut(ascii(str(error)))}") from None
        finally:
            while len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)[1].close()

    def resolve(self, name: str) -> str:
        """Where this machine has the file that the documents call `name`, without links and '..'.

        Raises WireError: outside_folder where that is not within a listed folder.
        """
        for was, now in self._moved:
            if name == was or name.startswith(f"{was}/"):
                name = now + name[len(was) :]
                break
        if not name.startswith("/") or "\0" in name:
            raise WireError("outside_folder", f"{cut(name)!r} is no absolute path; say in documents.moved where this machine has it")
        path = os.path.realpath(name)
        if not any(path == folder or path.startswith(f"{folder.rstrip('/')}/") for folder in self._folders):
            raise WireError(
                "outside_folder",
                f"{path!r} is in none of documents.folders; list its folder there (and in documents.moved if it is elsewhere here)",
            )
        return path

    def close(self) -> None:
        """Close what is open."""
        while self._files:
            self._files.popitem()[1].close()

    def _opened(self, path: str, kind: type[_Hdf5] | type[_Tiff]) -> _Hdf5 | _Tiff:
        """The file, open; one of the same name that was put in its place is another."""
        found = _regular(path)
        key = (path, found.st_dev, found.st_ino)
        if key not in self._files:
            self._files[key] = kind.at(path)
        self._files.move_to_end(key)
        return self._files[key]

    def _hdf5(self, path: str, stack: Stack, row: int) -> npt.NDArray[Any]:
        dataset, sources = self._dataset(path, stack.dataset, _HOPS)
        if dataset.ndim < 2:
            raise WireError("wrong_shape", f"{path!r}: {stack.dataset!r} has shape {dataset.shape}; frames are (..., rows, columns)")
        # Frames that were joined along their rows: (N x rows, columns).
        rows = stack.rows if dataset.ndim == 2 and stack.rows is not None else dataset.shape[-2]
        self._admit(path, dataset.dtype, (rows, dataset.shape[-1]))
        if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > self._most_bytes:
            raise WireError("too_large", f"{path!r}: chunks of {dataset.chunks} {dataset.dtype}, each of which must be read as a whole")
        if row >= _held(dataset, rows):
            dataset.id.refresh()  # SWMR: the writer may have gone on
        if row >= (held := _held(dataset, rows)):
            raise Awaited("file_absent", f"{path!r}: {stack.dataset!r} holds {held} frames and is asked for number {row}, counted from 0")
        corner = (row * rows, 0) if dataset.ndim == 2 else (*map(int, np.unravel_index(row, dataset.shape[:-2])), 0, 0)
        _check_written(path, dataset, corner, sources)
        found = dataset[corner[0] : corner[0] + rows] if dataset.ndim == 2 else dataset[corner[:-2]]
        return np.asarray(found)

    def _dataset(self, path: str, inside: str, hops: int) -> tuple[h5py.Dataset, list[_Source]]:
        """The dataset, found link by link, and what it is made of where it is virtual: HDF5 itself would follow any link anywhere."""
        opened = self._opened(path, _Hdf5)
        assert isinstance(opened, _Hdf5)
        known, sources = opened.datasets.get(inside, (None, []))
        if known and all(source.dataset for source in sources):  # an object of a file that was closed since is false
            return known, sources
        node: Any = opened.file
        steps = [step for step in inside.split("/") if step not in ("", ".")]
        while steps:
            step = steps.pop(0).encode()
            if not isinstance(node, h5py.Group) or not node.id.links.exists(step):
                raise Awaited("file_absent", f"{path!r} holds no {inside!r}")
            kind = node.id.links.get_info(step).type
            if kind == h5py.h5l.TYPE_HARD:
                node = node[step]
                continue
            hops -= 1
            if hops <= 0:
                raise WireError("no_reader", f"{path!r}: {inside!r} lies behind too many links")
            if kind != h5py.h5l.TYPE_SOFT:
                file, within = (os.fsdecode(part) for part in node.id.links.get_val(step))
                return self._dataset(self.resolve(os.path.join(os.path.dirname(path), file)), "/".join([within, *steps]), hops)
            target = os.fsdecode(node.id.links.get_val(step))
            node = opened.file if target.startswith("/") else node
            steps[:0] = [part for part in target.split("/") if part not in ("", ".")]
        if not isinstance(node, h5py.Dataset):
            raise WireError("no_reader", f"{path!r}: {inside!r} is no dataset")
        sources = self._sources(path, node, hops - 1)
        if len(opened.datasets) < _SOURCES:
            opened.datasets[inside] = node, sources
        return node, sources

    def _sources(self, path: str, dataset: h5py.Dataset, hops: int) -> list[_Source]:
        """What a dataset takes its numbers from beside its own file. Raises WireError where that is outside, or beyond counting."""
        layout = dataset.id.get_create_plist()
        if layout.get_external_count():
            raise WireError("outside_folder", f"{path!r}: {dataset.name} keeps its numbers in files that are no HDF5")
        if layout.get_layout() != h5py.h5d.VIRTUAL:
            return []
        count = layout.get_virtual_count()
        if count > _SOURCES or hops <= 0:
            raise WireError("no_reader", f"{path!r}: {dataset.name} is virtual, of {count} others; {_SOURCES} are followed")
        sources = []
        for i in range(count):
            file, within = layout.get_virtual_filename(i), layout.get_virtual_dsetname(i)
            if "%" in file:
                raise WireError("no_reader", f"{path!r}: {dataset.name} is made of files whose number is open")
            other = path if file == "." else self.resolve(os.path.join(os.path.dirname(path), file))
            source, _ = self._dataset(other, within, hops)
            sources.append(_Source(source, _slab(path, layout.get_virtual_vspace(i)), _slab(path, layout.get_virtual_srcspace(i))))
        return sources

    def _tiff(self, path: str, at: int) -> npt.NDArray[Any]:
        opened = self._opened(path, _Tiff)
        assert isinstance(opened, _Tiff)
        try:
            page = opened.file.pages[at]
        except IndexError:
            raise Awaited("file_absent", f"{path!r} has no page {at}, counted from 0") from None
        assert isinstance(page, tifffile.TiffPage | tifffile.TiffFrame)
        page = page.aspage()
        if page.dtype is None:
            raise WireError("wrong_dtype", f"{path!r}: pixels that are no numbers")
        if len(page.shape) != 2:
            raise WireError("wrong_shape", f"{path!r}: a page of {page.shape}; expected (rows, columns)")
        self._admit(path, page.dtype, page.shape)
        packed = sum(page.databytecounts)
        # Compression never doubles a size: more is made to be unpacked to far more than the page says that it holds.
        if packed > 2 * page.nbytes + 65536 or math.prod(page.chunks) * page.dtype.itemsize > self._most_bytes:
            raise WireError("too_large", f"{path!r}: {packed} bytes for a page of {page.shape} {page.dtype}")
        end = max((start + length for start, length in zip(page.dataoffsets, page.databytecounts, strict=True)), default=0)
        if end > opened.file.filehandle.size or not packed:
            raise Awaited("file_damaged", f"{path!r} ends before its pixels do")
        return np.asarray(page.asarray())

    def _npy(self, path: str, at: int) -> npt.NDArray[Any]:
        _regular(path)
        # Not mapped into memory: a file that somebody cuts short would then end this process.
        with open(path, "rb") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = header(file)
            if len(shape) < 2:
                raise WireError("wrong_shape", f"{path!r} has shape {shape}; frames are (..., rows, columns)")
            self._admit(path, dtype, shape if fortran else shape[-2:])
            if at >= math.prod(shape[:-2]):
                raise WireError("wrong_shape", f"{path!r} has shape {shape} and is asked for frame {at}, counted from 0")
            count = math.prod(shape) if fortran else math.prod(shape[-2:])
            file.seek(0 if fortran else at * count * dtype.itemsize, os.SEEK_CUR)
            data = file.read(count * dtype.itemsize)
        if len(data) < count * dtype.itemsize:
            raise Awaited("file_damaged", f"{path!r} ends before its pixels do")
        array = np.frombuffer(data, dtype)
        return array.reshape(shape, order="F").reshape(-1, *shape[-2:])[at] if fortran else array.reshape(shape[-2:])

    def _admit(self, path: str, dtype: np.dtype[Any], shape: Sequence[Any]) -> None:
        if dtype.kind not in "uifb" or dtype.itemsize > 8:
            raise WireError("wrong_dtype", f"{path!r}: pixels of type {cut(str(dtype))}; photons are integers or real numbers")
        if len(shape) < 2 or min(shape) < 1 or math.prod(shape[:-2]) > 1_000_000:
            raise WireError("wrong_shape", f"{path!r}: frames of shape {tuple(shape)}; expected (rows, columns)")
        if math.prod(shape) * dtype.itemsize > self._most_bytes:
            raise WireError("too_large", f"{path!r}: a frame of {tuple(shape)} {dtype}, the limit is {self._most_bytes} bytes")


_Slab = tuple[int, int, float, int]
"""Rows of a selection, along its first axis: start, stride, number of blocks (infinite where it is open), rows of a block."""


@dataclass(frozen=True, slots=True)
class _Source:
    """A part of a virtual dataset: rows `here` of it are rows `there` of another dataset, in their order."""

    dataset: h5py.Dataset
    here: _Slab
    there: _Slab


@dataclass(slots=True)
class _Hdf5:
    """An open file with the datasets of it that were found, and what each is made of."""

    file: h5py.File
    datasets: dict[str, tuple[h5py.Dataset, list[_Source]]] = field(default_factory=dict)

    @staticmethod
    def at(path: str) -> _Hdf5:
        try:
            # Reads any file, one that is being written included, and holds no lock that would keep its writer out.
            return _Hdf5(h5py.File(path, "r", swmr=True, rdcc_nbytes=_CHUNK_CACHE))
        except OSError:
            # Somebody in this process has it open without; HDF5 wants the two alike.
            return _Hdf5(h5py.File(path, "r", rdcc_nbytes=_CHUNK_CACHE))

    def close(self) -> None:
        self.datasets.clear()
        self.file.close()


@dataclass(slots=True)
class _Tiff:
    file: tifffile.TiffFile

    @staticmethod
    def at(path: str) -> _Tiff:
        return _Tiff(tifffile.TiffFile(path))

    def close(self) -> None:
        self.file.close()


def _held(dataset: h5py.Dataset, rows: int) -> int:
    """Frames that a dataset holds."""
    return dataset.shape[0] // rows if dataset.ndim == 2 else math.prod(dataset.shape[:-2])


def _check_written(path: str, dataset: h5py.Dataset, corner: Sequence[int], sources: Sequence[_Source]) -> None:
    """A dataset may be made as long as the scan before its first frame is taken, and HDF5 gives zeros for what is not there yet."""
    absent = "file_absent", f"{path!r}: frame {corner[0]} of {dataset.name} is not written yet"
    for source in sources:
        start, stride, blocks, block = source.here
        turn, within = divmod(corner[0] - start, stride)
        if not (0 <= turn < blocks and within < block):
            continue
        begin, step, _, run = source.there
        many = turn * block + within
        row = begin + many // run * step + many % run
        if source.dataset.ndim < dataset.ndim:  # a frame each
            continue
        if row >= source.dataset.shape[0]:
            source.dataset.id.refresh()
        if row >= source.dataset.shape[0]:
            raise Awaited(*absent)
        _check_written(path, source.dataset, (row, *(0 for _ in source.dataset.shape[1:])), ())
    if not sources and dataset.chunks and dataset.id.get_chunk_info_by_coord(tuple(corner)).byte_offset is None:
        raise Awaited(*absent)


def _slab(path: str, space: Any) -> _Slab:
    kind = space.get_select_type()
    if kind == h5py.h5s.SEL_ALL:
        return 0, 1, math.inf, 1
    if kind != h5py.h5s.SEL_HYPERSLABS or not space.is_regular_hyperslab():
        raise WireError("no_reader", f"{path!r}: a virtual dataset of parts that are no regular blocks")
    start, stride, count, block = (int(part[0]) for part in space.get_regular_hyperslab())
    unlimited = not 0 <= count < 2**40
    # One block without an end has the count in its other number.
    return (start, 1, math.inf, 1) if not 0 <= block < 2**40 else (start, stride, math.inf if unlimited else count, block)


def _regular(path: str) -> os.stat_result:
    """What the file system says of a file. Raises WireError where it is none: a pipe would never stop being read."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise WireError("no_reader", f"{path!r} is no regular file")
    return found


def _frames_an_event(parameters: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Frames of one event: the leading extents of the data key, or what the file's writer was told (multiplier, frame_per_point)."""
    told = parameters.get("multiplier", parameters.get("frame_per_point"))
    described = math.prod(shape[:-2])
    if told is None:
        return described
    if not isinstance(told, int) or isinstance(told, bool) or not 0 < told <= 1_000_000 or described not in (1, told):
        raise WireError("bad_document", f"{shown(told)} frames an event, and a data key of shape {cut(str(tuple(shape)))}")
    return told


def _frames_a_file(parameters: Mapping[str, Any], shape: Sequence[int], per_event: int) -> int:
    """How many frames a numbered file holds: a divisor of the frames of an event, as chunk_shape or files_per_datum has it."""
    chunk = parameters.get("chunk_shape") or (1,)
    files = parameters.get("files_per_datum")
    joined = parameters.get("join_method") == "concat"
    if len(shape) < 3 or per_event == 1:
        if joined and chunk[0] not in (1, *shape[:1]):
            raise WireError("no_reader", "frames of which each is spread over several files")
        return per_event
    if files is not None:
        number = files
    elif joined:
        number = per_event // chunk[0] if per_event % chunk[0] == 0 else 1
    elif "multiplier" in parameters or "frame_per_point" in parameters:
        number = per_event
    else:
        fits = len(chunk) == len(shape) and tuple(chunk[1:]) == tuple(shape[1:]) and per_event % chunk[0] == 0
        number = per_event // chunk[0] if fits else 1
    if not isinstance(number, int) or number < 1 or per_event % number:
        raise WireError("bad_document", f"{per_event} frames an event in {shown(number)} files")
    return per_event // number


def _dataset_path(parameters: Mapping[str, Any], otherwise: str = "") -> str:
    path = parameters.get("dataset") or parameters.get("path") or parameters.get("key") or otherwise
    if isinstance(path, str) and 0 < len(path) <= 1000 and "\0" not in path:
        return path
    raise WireError("bad_document", f"an HDF5 resource whose dataset is {shown(path)}")


def _compiled(template: Any, filename: Any) -> str:
    """A template of file names with its %s filled in: the folder, which comes before it anyway, and the name that is common to all."""
    if not isinstance(template, str) or not isinstance(filename, str) or len(template) + len(filename) > 1000:
        raise WireError("bad_document", f"a template of file names that is {shown(template)}")
    if template.count("%s") > 1:
        template = template.replace("%s", "", 1).removeprefix("/")
    compiled: str = template.replace("%s", filename, 1).replace("%s", "")
    if _NUMBER.search(filename) or len(_NUMBER.findall(compiled)) != 1:
        raise WireError("no_reader", f"a template of file names without a single number: {shown(template)}")
    return compiled


def _filled_in(template: str, number: int) -> str:
    def digits(match: re.Match[str]) -> str:
        flags, width, least, zero, braced = (group or "" for group in match.groups())
        # In C, a precision fills up with zeros whatever the flags; both widths are of two digits at most.
        text, wide = str(number).zfill(int(least or 0)), int(width or braced or 0)
        return text.zfill(wide) if "0" in flags + zero else text.ljust(wide) if "-" in flags else text.rjust(wide)

    return _NUMBER.sub(digits, template, count=1)


def _mapping(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = document.get(key) or {}
    if not isinstance(found, Mapping):
        raise WireError("bad_document", f"a resource whose {key} are {shown(found)}")
    return found


def _forward(path: str) -> str:
    """A path with slashes; a file server of Windows writes Z:\\data, or /Z:/data in a URI."""
    if re.match(r"^/?[A-Za-z]:[\\/]|^\\\\", path):
        return path.lstrip("/").replace("\\", "/")
    return path
