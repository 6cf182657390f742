"""Image files (TIFF, EDF; one with several frames, or a folder of them) -> a recording; the only door to fabio and tifffile."""

from __future__ import annotations

import re
import struct
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile

from streamprior.errors import ConfigError
from streamprior.sources.recording import Recording, Stack, check_size, unmapped, whole

_TIFF = (".tif", ".tiff")
_EDF = (".edf", ".edf.gz", ".edf.bz2")

# What the two libraries let out of files that are cut or no images at all, found by cutting and overwriting some.
_DAMAGE = (
    *(OSError, EOFError, MemoryError, ValueError, ArithmeticError, LookupError, NameError, TypeError, AttributeError, AssertionError),
    *(RuntimeError, zlib.error, struct.error, tifffile.TiffFileError),
)


def is_image(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(_TIFF + _EDF)


def open_images(path: Path) -> Recording:
    """A folder of TIFFs or of EDFs, one frame each, by their names with numbers in order of size (img_2 before img_10); or one file.

    Only the first file of a folder is read now.

    Raises
    ------
    ConfigError
        The folder holds no images or both kinds, the first cannot be read, or fabio is absent and needed.
    """
    if not path.is_dir():
        return whole(path, _pages(path))
    files = [file for file in path.iterdir() if is_image(file)]
    if not files:
        raise ConfigError(f"{path}: a folder without TIFF files and without EDF files")
    kinds = {file.name.lower().endswith(_TIFF) for file in files}
    if len(kinds) > 1:
        raise ConfigError(f"{path}: a folder of TIFF and of EDF files; put them into a folder each")
    return whole(path, _Folder(sorted(files, key=_natural)))


def _natural(file: Path) -> tuple[Sequence[str | int], str]:
    """Names as people count: detectors without leading zeros write img_9 before img_10."""
    parts = re.split(r"(\d+)", file.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name


class _Folder:
    """Files with a frame each, opened when it is asked for."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        first = _pages(files[0])
        if first.shape[0] != 1:
            raise ConfigError(f"{files[0]}: holds {first.shape[0]} frames; name this file, a folder is of files with a frame each")
        self.shape = (len(files), *first.shape[1:])
        self.dtype = first.dtype

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        file = self._files[index]
        try:
            return np.asarray(_pages(file)[0])
        except ConfigError as error:
            raise OSError(str(error)) from None


def _pages(file: Path) -> Stack:
    """The frames of one file. Raises ConfigError where it cannot be read."""
    if file.name.lower().endswith(_TIFF):
        return _open_tiff(file)
    return _Edf(file)


def _open_tiff(file: Path) -> Stack:
    try:
        with tifffile.TiffFile(file) as tiff:
            series = tiff.series[0]
            pages, shape, dtype = len(series.pages), series.shape, np.dtype(series.dtype)
            check_size(file, shape, dtype)
            whole_file = tiff.asarray() if pages == 1 and len(shape) == 2 else None
        if whole_file is not None:
            return whole_file[None]
        if pages == 1:  # as ImageJ writes stacks: one page, and all frames behind each other
            return unmapped(file, tifffile.memmap(file, mode="r"))
    except _DAMAGE as error:
        raise ConfigError(f"{file}: cannot be read as TIFF ({error}); copy it again or take it out of the folder") from None
    return _TiffPages(file, (pages, *shape[-2:]), dtype)


class _TiffPages:
    """A file of many pages, read page by page."""

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._tiff = tifffile.TiffFile(file)
        # A recording has no end that anybody would tell: its file goes with it.
        weakref.finalize(self, self._tiff.close)
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._tiff.asarray(key=index))
        except _DAMAGE as error:
            raise OSError(str(error)) from None


class _Edf:
    """An EDF file, of one frame or more, packed or not."""

    def __init__(self, file: Path) -> None:
        try:
            import fabio
        except ModuleNotFoundError:
            raise ConfigError(f"{file}: EDF is read by fabio, which is not installed: pip install 'streamprior[edf]'") from None
        try:
            self._image = fabio.open(str(file))
            check_size(file, self._image.shape, np.dtype(self._image.dtype))
            first = np.asarray(self._image.data)
            self.shape: tuple[int, ...] = (int(self._image.nframes), *first.shape)
        except Exception as error:  # noqa: BLE001 - fabio raises this very class where a header is cut
            raise ConfigError(f"{file}: cannot be read as EDF ({error}); copy it again or take it out of the folder") from None
        self.dtype = first.dtype

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(self._image.get_frame(index).data)
        except _DAMAGE as error:
            raise OSError(str(error)) from None
