"""Compressed pixel bytes <-> arrays: the bslz4 and lz4 containers that DECTRIS streams share with the HDF5 filters.

Both begin with 12 bytes: the uncompressed size (8 bytes, big endian) and the block size in bytes (4 bytes, big endian). Every
block follows with its compressed length (4 bytes, big endian). The C decoder trusts those lengths, so they are walked and
checked here before it sees a byte: a truncated or forged blob must never make it read past the end of the message.
"""

from __future__ import annotations

import struct
from typing import Any

import lz4.block
import numpy as np
import numpy.typing as npt

from streamprior.config import one_openmp_thread
from streamprior.errors import WireError

one_openmp_thread()  # before the import below: the library reads it once
import bitshuffle  # noqa: E402

_HEADER = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")
_BLOCK_BYTES = 8192  # what DECTRIS firmware and the HDF5 filter use


def decompress(algorithm: str, payload: bytes, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    """Payload of algorithm "bslz4" or "lz4" -> array of `dtype` and `shape`.

    Raises WireError("bad_compression") for anything that does not fit.
    """
    expected = int(np.prod(shape)) * dtype.itemsize
    if len(payload) < _HEADER.size:
        raise WireError("bad_compression", f"{len(payload)} bytes are too few for a {algorithm} header")
    size, block_bytes = _HEADER.unpack_from(payload)
    if size != expected:
        raise WireError("bad_compression", f"the {algorithm} header claims {size} bytes, {shape} {dtype} needs {expected}")
    if algorithm == "bslz4":
        return _unshuffle(payload, block_bytes or _BLOCK_BYTES, dtype, shape)
    if algorithm == "lz4":
        return np.frombuffer(_unlz4(payload, size, block_bytes), dtype).reshape(shape)
    raise WireError("bad_compression", f"unknown algorithm {algorithm!r}; known are bslz4 and lz4")


def compress(algorithm: str, array: npt.NDArray[Any]) -> bytes:
    """Array -> payload; `algorithm` is "bslz4" or "lz4"."""
    flat = np.ascontiguousarray(array).reshape(-1)
    if algorithm == "bslz4":
        blocks: bytes = bitshuffle.compress_lz4(flat, _BLOCK_BYTES // flat.itemsize).tobytes()
        return _HEADER.pack(flat.nbytes, _BLOCK_BYTES) + blocks
    if algorithm == "lz4":
        block: bytes = lz4.block.compress(flat.tobytes(), store_size=False)
        return _HEADER.pack(flat.nbytes, flat.nbytes) + _LENGTH.pack(len(block)) + block
    raise ValueError(f"unknown algorithm {algorithm!r}; use bslz4 or lz4")


def _unshuffle(payload: bytes, block_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]) -> npt.NDArray[Any]:
    elements = int(np.prod(shape))
    block = block_bytes // dtype.itemsize
    if block == 0 or block % 8:
        raise WireError("bad_compression", f"a bslz4 block of {block_bytes} bytes does not hold a multiple of 8 elements of {dtype}")
    # Whole blocks, one shorter block of a multiple of 8 elements, then up to 7 elements as they are.
    blocks = elements // block + (1 if elements % block >= 8 else 0)
    if _end_of_blocks(payload, blocks) + elements % 8 * dtype.itemsize != len(payload):
        raise WireError(
            "bad_compression", f"bslz4: {blocks} blocks do not fill the {len(payload)} bytes of the message exactly (truncated?)"
        )
    try:
        pixels = bitshuffle.decompress_lz4(np.frombuffer(payload, np.uint8, offset=_HEADER.size), shape, dtype, block)
    except (ValueError, RuntimeError) as error:
        raise WireError("bad_compression", f"bslz4: {error}") from None
    return np.asarray(pixels)


def _end_of_blocks(payload: bytes, blocks: int) -> int:
    at = _HEADER.size
    for _ in range(blocks):
        if at + _LENGTH.size > len(payload):
            return -1
        at += _LENGTH.size + _LENGTH.unpack_from(payload, at)[0]
    return at


def _unlz4(payload: bytes, size: int, block_bytes: int) -> bytearray:
    out = bytearray()
    at = _HEADER.size
    while len(out) < size:
        if at + _LENGTH.size > len(payload) or block_bytes == 0:
            raise WireError("bad_compression", f"lz4: the message ends after {len(out)} of {size} bytes")
        (length,) = _LENGTH.unpack_from(payload, at)
        at += _LENGTH.size
        want = min(block_bytes, size - len(out))
        chunk = payload[at : at + length]
        at += length
        try:
            # A block that does not shrink is stored as it is (HDF5 LZ4 filter).
            block = chunk if length == want else lz4.block.decompress(chunk, uncompressed_size=want)
        except lz4.block.LZ4BlockError as error:
            raise WireError("bad_compression", f"lz4: {error}") from None
        if len(block) != want:
            raise WireError("bad_compression", f"lz4: a block of {len(block)} bytes where {want} were due")
        out += block
    if at != len(payload):
        raise WireError("bad_compression", f"lz4: {len(payload) - at} bytes left over")
    return out
