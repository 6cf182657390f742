"""Chunk files that are encoded without zarr: what zarr makes of them, and of an array that an earlier version began."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import zarr
from zarr.codecs import BloscCodec, ZstdCodec

from streamprior.sinks.chunks import OPEN_CHUNKS, FrameArray, Layout, replace_whole

SHAPE = (6, 5)
CHUNK = 4
CLASSES = Layout("classes", SHAPE, np.dtype(np.uint8), 255, CHUNK)
OBJECTS = Layout("objects", SHAPE, np.dtype(np.complex64), complex("nan+nanj"), CHUNK)


def images(count: int, layout: Layout) -> list[npt.NDArray[Any]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 3, SHAPE).astype(layout.dtype) for _ in range(count)]


def files(array: Path) -> dict[str, bytes]:
    """Everything in an array's folder but its metadata."""
    return {str(path.relative_to(array)): path.read_bytes() for path in array.rglob("*") if path.is_file() and path.name != "zarr.json"}


@pytest.mark.parametrize("layout", [CLASSES, OBJECTS], ids=lambda layout: layout.name)
def test_chunks_are_byte_for_byte_what_zarr_writes(tmp_path: Path, layout: Layout) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    written = images(2 * CHUNK, layout)
    FrameArray(ours, layout, len(written)).write(range(len(written)), written)
    theirs.mkdir()
    (theirs / "zarr.json").write_bytes((ours / "zarr.json").read_bytes())
    zarr.open_array(theirs, mode="r+")[:] = np.stack(written)
    assert files(ours) == files(theirs)
    assert len(files(ours)) == 2
    np.testing.assert_array_equal(zarr.open_array(ours, mode="r")[:], np.stack(written))


def test_a_chunk_without_an_image_has_no_file_until_an_image_comes(tmp_path: Path) -> None:
    array = FrameArray(tmp_path / "objects", OBJECTS, None)
    array.write(range(2 * CHUNK), [None] * 2 * CHUNK)
    assert not files(tmp_path / "objects")
    assert np.isnan(zarr.open_array(tmp_path / "objects", mode="r")[: 2 * CHUNK]).all()
    (image,) = images(1, OBJECTS)
    array.write([1, CHUNK], [image, None])
    read = zarr.open_array(tmp_path / "objects", mode="r")[: 2 * CHUNK]
    np.testing.assert_array_equal(read[1], image)
    assert np.isnan(np.delete(read, 1, 0)).all()
    assert len(files(tmp_path / "objects")) == 1


@pytest.mark.parametrize("between", [0, OPEN_CHUNKS + 1], ids=["in memory", "long on disk"])
def test_an_image_that_is_taken_back_is_the_fill_value_again(tmp_path: Path, between: int) -> None:
    array = FrameArray(tmp_path / "objects", OBJECTS, None)
    first, second, *others = images(2 + between, OBJECTS)
    array.write([0, 1], [first, second])
    for number, image in enumerate(others, 1):
        array.write([number * CHUNK], [image])
    array.write([0], [None])
    read = zarr.open_array(tmp_path / "objects", mode="r")[:2]
    assert np.isnan(read[0]).all()
    np.testing.assert_array_equal(read[1], second)


def test_memory_of_a_chunk_that_fell_out_brings_nothing_into_a_new_one(tmp_path: Path) -> None:
    array = FrameArray(tmp_path / "classes", CLASSES, None)
    chunks = 3 * OPEN_CHUNKS
    for number, image in enumerate(images(chunks, CLASSES)):
        array.write(range(number * CHUNK, (number + 1) * CHUNK), [image] * CHUNK)
    array.write([chunks * CHUNK + 1], images(1, CLASSES))
    read = zarr.open_array(tmp_path / "classes", mode="r")[chunks * CHUNK : (chunks + 1) * CHUNK]
    assert (np.delete(read, 1, 0) == 255).all()
    np.testing.assert_array_equal(read[1], images(1, CLASSES)[0])


@pytest.mark.parametrize(
    "codec", [ZstdCodec(level=1), BloscCodec(cname="lz4", clevel=1, shuffle="shuffle", typesize=1)], ids=["zstd", "blosc"]
)
def test_an_array_with_another_chunk_length_codec_and_key_is_continued_as_it_is(tmp_path: Path, codec: ZstdCodec | BloscCodec) -> None:
    path, length = tmp_path / "classes", 3
    earlier = zarr.create_array(path, shape=(6, *SHAPE), chunks=(length, *SHAPE), dtype=np.uint8, fill_value=255, compressors=codec)
    written = images(10, CLASSES)
    earlier[:5] = np.stack(written[:5])
    array = FrameArray(path, CLASSES, None)
    array.write(range(5, 10), written[5:])
    array.trim(10)
    read = zarr.open_array(path, mode="r")
    assert (read.chunks[0], read.compressors) == (length, earlier.compressors)
    np.testing.assert_array_equal(read[:], np.stack(written))
    assert set(files(path)) == {f"c/{number}/0/0" for number in range(4)}


def test_a_disk_that_takes_only_a_part_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "chunk"
    replace_whole(file, b"the old one")
    write = os.write

    def room(*rooms: int) -> Iterator[int]:
        yield from rooms
        raise OSError(errno.ENOSPC, "No space left on device")

    left = room(3, 4)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda target, content: write(target, content[: next(left)]))
        with pytest.raises(OSError, match="No space left"):
            replace_whole(file, b"the new one")
    assert file.read_bytes() == b"the old one"
    replace_whole(file, b"the new one")
    assert file.read_bytes() == b"the new one"
    assert [path.name for path in tmp_path.iterdir()] == ["chunk"]
