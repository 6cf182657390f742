"""Compressed pixel bytes <-> arrays: the bslz4 and lz4 containers that DECTRIS streams share with the HDF5 filters.

Both begin with 12 bytes: the uncompressed size (8 bytes, big endian) and the block size in bytes (4 bytes, big endian). Every
block follows with its compressed length (4 bytes, big endian). The C decoder trusts those lengths, so they are walked and
checked here before it sees a byte: a truncated or forged blob must never make it read past the end of the message.

Stream V1 also knows an lz4 without them: one bare block.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt

from streamprior.config import one_openmp_thread
from streamprior.errors import WireError

one_openmp_thread()  # before the import below: the library reads it once
import bitshuffle  # noqa: E402

try:
    # 3 us instead of 18 for 128 x 128 of 16 bits, and other threads run meanwhile; but it is built from source, so it is a choice.
    from dectris.compression import decompress as _unpack_bslz4  # type: ignore[import-untyped, import-not-found, unused-ignore]
except ImportError:
    _unpack_bslz4 = None

_HEADER = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_BLOCK_BYTES = 8192  # what DECTRIS firmware and the HDF5 filter use
_MOST_LZ4 = 255  # bytes that a byte of an lz4 block can stand for
_MOST_BLOCKS = 2**17  # 1 GiB in blocks of 8192; tiny blocks would keep the walk over them busy for a minute
_MOST_BLOCK_BYTES = 2**30  # the HDF5 lz4 filter's own, and its largest


def decompress(algorithm: str, payload: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Payload of algorithm "bslz4" or "lz4" -> array of `dtype` and `shape`.

    Raises WireError("bad_compression") for anything that does not fit.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) < _HEADER.size:
        raise WireError("bad_compression", f"{len(payload)} bytes are too few for a {algorithm} header")
    size, block_bytes = _HEADER.unpack_from(payload)
    # libertem-dectris' mock detector leaves the header of a bslz4 blank, and its receiver never reads it: then the blocks alone must fit.
    blank = algorithm == "bslz4" and size == 0 and block_bytes == 0
    if size != expected and not blank:
        raise WireError("bad_compression", f"the {algorithm} header claims {size} bytes, {shape} {dtype} needs {expected}")
    block_bytes = block_bytes or _BLOCK_BYTES
    if expected > _MOST_LZ4 * len(payload) or expected > _MOST_BLOCKS * block_bytes or block_bytes > _MOST_BLOCK_BYTES:
        raise WireError("bad_compression", f"{len(payload)} bytes of {algorithm} cannot hold {expected} in blocks of {block_bytes}")
    if algorithm == "bslz4":
        return _unshuffle(payload, block_bytes, dtype, shape)
    if algorithm == "lz4":
        return np.frombuffer(_unlz4(payload, size, block_bytes), dtype).reshape(shape)
    raise WireError("bad_compression", f"unknown algorithm {algorithm!r}; known are bslz4 and lz4")


def decompress_block(payload: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Payload of one bare lz4 block -> array of `dtype` and `shape`.

    Raises WireError("bad_compression") for anything that does not fit.
    """
    expected = math.prod(shape) * dtype.itemsize
    if len(payload) * _MOST_LZ4 < expected:
        raise WireError("bad_compression", f"lz4: {len(payload)} bytes cannot hold the {expected} that {shape} {dtype} needs")
    try:
        block = lz4.block.decompress(payload, uncompressed_size=expected)
    except lz4.block.LZ4BlockError as error:
        raise WireError("bad_compression", f"lz4: {error}") from None
    if len(block) != expected:
        raise WireError("bad_compression", f"lz4: a block of {len(block)} bytes where {expected} were due")
    return np.frombuffer(block, dtype).reshape(shape)


def compress_block(array: npt.NDArray[Any]) -> bytes:
    """Array -> payload of one bare lz4 block."""
    block: bytes = lz4.block.compress(np.ascontiguousarray(array).tobytes(), store_size=False)
    return block


def compress(algorithm: str, array: npt.NDArray[Any]) -> bytes:
    """Array -> payload; `algorithm` is "bslz4" or "lz4"."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if algorithm == "bslz4":
        blocks: bytes = bitshuffle.compress_lz4(flat, _BLOCK_BYTES // flat.itemsize).tobytes()
        return _HEADER.pack(flat.nbytes, _BLOCK_BYTES) + blocks
    if algorithm == "lz4":
        block = compress_block(flat)
        return _HEADER.pack(flat.nbytes, flat.nbytes) + _LENGTH.pack(len(block)) + block
    raise ValueError(f"unknown algorithm {algorithm!r}; use bslz4 or lz4")


def _unshuffle(payload: bytes, block_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    elements = math.prod(shape)
    block = block_bytes // dtype.itemsize
    if block == 0 or block % 8 or block_bytes % dtype.itemsize:
        raise WireError("bad_compression", f"a bslz4 block of {block_bytes} bytes does not hold a multiple of 8 elements of {dtype}")
    # Whole blocks, one shorter block of a multiple of 8 elements, then up to 7 elements as they are.
    blocks = elements // block + (1 if elements % block >= 8 else 0)
    if _end_of_blocks(payload, blocks) + elements % 8 * dtype.itemsize != len(payload):
        raise WireError(
            "bad_compression", f"bslz4: {blocks} blocks do not fill the {len(payload)} bytes of the message exactly (truncated?)"
        )
    try:
        if _unpack_bslz4 is not None and any(payload[8:12]):
            return np.frombuffer(_unpack_bslz4(payload, "bslz4", elem_size=dtype.itemsize), dtype).reshape(shape)
        pixels = bitshuffle.decompress_lz4(np.frombuffer(payload, np.uint8, offset=_HEADER.size), shape, dtype, block)
    except (ValueError, RuntimeError) as error:
        raise WireError("bad_compression", f"bslz4: {error}") from None
    return np.asarray(pixels)


def _end_of_blocks(payload: bytes, blocks: int) -> int:
    """Where that many blocks end; behind the payload, or -1, where they do not fit."""
    at, length_at = _HEADER.size, _LENGTH.unpack_from  # 2,000 blocks in a large frame
    try:
        for _ in range(blocks):
            (length,) = length_at(payload, at)
            at += length + 4
    except struct.error:
        return -1
    return at


def _unlz4(payload: bytes, size: int, block_bytes: int) -> bytes:
    blocks: list[bytes] = []
    at, done = _HEADER.size, 0
    while done < size:
        if at + _LENGTH.size > len(payload):
            raise WireError("bad_compression", f"lz4: the message ends after {done} of {size} bytes")
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        want = min(block_bytes, size - done)
        chunk = payload[at : at + length]
        at += length
        try:
            # A block that does not shrink is stored as it is (HDF5 LZ4 filter).
            block = chunk if length == want else lz4.block.decompress(chunk, uncompressed_size=want)
        except lz4.block.LZ4BlockError as error:
            raise WireError("bad_compression", f"lz4: {error}") from None
        if len(block) != want:
            raise WireError("bad_compression", f"lz4: a block of {len(block)} bytes where {want} were due")
        blocks.append(block)
        done += want
    if at != len(payload):
        raise WireError("bad_compression", f"lz4: {len(payload) - at} bytes left over")
    return blocks[0] if len(blocks) == 1 else b"".join(blocks)
