"""Bluesky documents on the wire (0MQ) <-> (name, document): msgpack, JSON, or pickle that is read and never run.

Facts (bluesky.callbacks.zmq): one message of one part: prefix, space, name, space, serialised document; the prefix may be empty and holds
no space. Bluesky's own default is pickle; arrays within msgpack are as msgpack-numpy writes them, a map {nd, type, kind, shape, data}
with keys of bytes.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, Literal

import msgpack
import numpy as np

from streamprior.errors import WireError
from streamprior.seams import Document
from streamprior.wire.claims import array_of, dtype_of
from streamprior.wire.pickles import MOST_OPCODES, read_pickle

Serializer = Literal["msgpack", "json", "pickle"]

NAMES = (
    "start",
    "stop",
    "descriptor",
    "event",
    "event_page",
    "bulk_events",
    "datum",
    "datum_page",
    "bulk_datum",
    "resource",
    "stream_resource",
    "stream_datum",
)
_NAMES = {name.encode(): name for name in NAMES}

REFUSED_BY_TRANSPORT = b"\x00 refused-by-transport \x00"
"""What a source hands over in place of a message that its socket would not take: `load_document` refuses it as too_large, so that the
ledger counts it like any other. A sender that writes it gets just that."""

MOST_ITEMS = 2**21
"""Values in one document, pixels in lists included: 100 bytes of message can be 10 kB of empty lists. Arrays count once."""

_SHARED = 4
"""Values a byte: none takes less than one, unless a pickle holds the same list many times."""

_MOST_DEPTH = 64
_MOST_BITS = 64


def load_document(message: bytes, prefix: bytes, serializer: Serializer, max_bytes: int) -> Document | None:
    """One message as (name, document); None where it is of another prefix, and so not ours.

    What comes out is dict with keys of text, list, tuple, str (no half characters), int of 64 bits, float, bool, None, bytes, complex, and
    numpy arrays and scalars of numbers, bool and text, read-only and in this machine's byte order; no two share a list or a dict, and
    none is nested deeper than 64.

    Parameters
    ----------
    message : one part, as it left the socket.
    prefix : of the publisher; empty: any.
    serializer : what the publisher uses; nothing else is tried.
    max_bytes : a larger message is refused before it is decoded; what is decoded is bounded by it too.

    Raises
    ------
    WireError
        too_large; not_document for what cannot be parsed; bad_document for an unknown name, or a body that is no mapping of plain values;
        unsafe_pickle for what would have run code; wrong_dtype, wrong_shape, wrong_type for an array whose claims disagree.
    """
    if message == REFUSED_BY_TRANSPORT:
        raise WireError("too_large", f"a message far beyond {max_bytes} bytes; the transport dropped it, and its connection was made anew")
    first = message.find(b" ")
    second = message.find(b" ", first + 1)
    if first < 0 or second < 0:
        raise WireError("not_document", f"{len(message)} bytes without prefix, space, name, space, document")
    if prefix and message[:first] != prefix:
        return None
    if len(message) > max_bytes:
        raise WireError("too_large", f"{len(message)} bytes, the limit is {max_bytes}")
    name = _NAMES.get(message[first + 1 : second])
    if name is None:
        raise WireError("bad_document", f"{message[first + 1 : second][:50]!r} is no document's name")
    body = message[second + 1 :]
    most = MOST_OPCODES if serializer == "pickle" else MOST_ITEMS
    document = _Plain(min(most, _SHARED * len(body) + 1000), max_bytes).copy(_LOADERS[serializer](body), 0)
    if not isinstance(document, dict):
        raise WireError("bad_document", f"a {name} document that is no mapping but a {type(document).__name__}")
    return name, document


def dump_document(name: str, document: Mapping[str, Any], serializer: Serializer = "msgpack", prefix: bytes = b"") -> bytes:
    """The message of a document, as a publisher of Bluesky sends it. JSON has no arrays: there they become lists."""
    if name not in NAMES or b" " in prefix:
        raise ValueError(f"a document {name!r} with prefix {prefix!r}; names are {', '.join(NAMES)}, a prefix holds no space")
    return b" ".join((prefix, name.encode(), dump_body(document, serializer)))


def dump_body(document: Mapping[str, Any], serializer: Serializer = "msgpack") -> bytes:
    """A document alone: what a publisher of Bluesky is given as its serializer."""
    return _DUMPERS[serializer](dict(document))


class _Plain:
    """Copies what a loader gave, as plain values; owns the count of what has been copied.

    Within a pickle a list may hold the same list many times, and that one another: as it is copied, each time counts.
    """

    def __init__(self, items: int, nbytes: int) -> None:
        self._items = items
        self._bytes = nbytes

    def copy(self, value: Any, depth: int) -> Any:
        kind = type(value)
        self._items -= 1
        if self._items < 0:
            raise WireError("too_large", "more values than a document may have, or far more than its bytes could hold once")
        if kind is float or kind is bool or value is None or kind is complex:
            pass
        elif kind is int:
            if value.bit_length() > _MOST_BITS:
                raise WireError("bad_document", f"an integer of {value.bit_length()} bits")
        elif kind is str:
            self._spend(len(value))
            _check_text(value)
        elif kind is bytes:
            self._spend(len(value))
        elif isinstance(value, np.ndarray | np.generic):
            self._spend(value.nbytes)
        elif depth >= _MOST_DEPTH:
            raise WireError("bad_document", f"nested deeper than {_MOST_DEPTH}")
        elif kind is list or kind is tuple:
            return self._sequence(value, depth)
        elif kind is dict:
            return self._mapping(value, depth)
        else:
            raise WireError("bad_document", f"it holds a {kind.__name__}, which is no plain value")
        return value

    def _sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> Any:
        # A row of pixels as JSON has it.
        if set(map(type, value)) == {int} and min(value) >= -(2**63) and max(value) < 2**64:
            self._items -= len(value)
            return value[:]
        return type(value)([self.copy(one, depth + 1) for one in value])

    def _mapping(self, value: dict[Any, Any], depth: int) -> Any:
        if b"nd" in value:
            array = _numpy(value)
            self._spend(array.nbytes)
            return array
        if b"complex" in value:
            return _complex(value.get(b"data"))
        copied = {}
        for key, one in value.items():
            if type(key) is not str:
                raise WireError("bad_document", f"a key of type {type(key).__name__}; keys are text")
            self._spend(len(key))
            _check_text(key)
            copied[key] = self.copy(one, depth + 1)
        return copied

    def _spend(self, nbytes: int) -> None:
        self._bytes -= nbytes
        if self._bytes < 0:
            raise WireError("too_large", "it holds the same things so often that together they are beyond the limit of a message")


def _check_text(text: str) -> None:
    """JSON can write half a character, which nothing downstream could write again."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise WireError("bad_document", "text with half a character (a lone surrogate)") from None


def _numpy(item: Mapping[Any, Any]) -> Any:
    """An array or a number as msgpack-numpy writes them; its arrays of objects are pickles, and stay unread."""
    data = item.get(b"data")
    if item.get(b"kind") in (b"O", "O"):
        raise WireError("unsafe_pickle", "an array of objects, which only unpickling would bring back; send numbers")
    dtype = dtype_of(item.get(b"type"))
    return array_of(data, dtype, item.get(b"shape")) if item[b"nd"] is True else array_of(data, dtype, ())[()]


def _complex(text: object) -> complex:
    try:
        return complex(text if isinstance(text, str) and len(text) < 100 else "")
    except ValueError:
        raise WireError("wrong_type", "a complex number that is none") from None


def _load_msgpack(body: bytes) -> Any:
    _check_msgpack(body)
    try:
        # Keys are text or bytes: hashes of integers are chosen by the sender, and a map of colliding ones takes hours.
        return msgpack.unpackb(body, raw=False, strict_map_key=True)
    except ValueError as error:
        raise WireError("not_document", f"msgpack: {type(error).__name__} {_cut(str(error))}") from None


def _load_json(body: bytes) -> Any:
    if body.count(b",") + body.count(b"[") + body.count(b"{") > MOST_ITEMS:
        raise WireError("too_large", f"more than {MOST_ITEMS} values; send pixels as an array (msgpack), or a reference to a file")
    try:
        return json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise WireError("not_document", f"JSON: {_cut(str(error))}") from None


def _msgpack_heads() -> list[tuple[int, int, int, int] | None]:
    """By first byte: (width of a length field, bytes that follow, items that follow, items a unit of the length: 0 where it counts bytes).

    None for what has no place here: the byte that is never used, and extension types.
    """
    heads: list[tuple[int, int, int, int] | None] = [(0, 0, 0, 0)] * 256
    for low in range(16):
        heads[0x80 + low] = (0, 0, 2 * low, 0)
        heads[0x90 + low] = (0, 0, low, 0)
    for low in range(32):
        heads[0xA0 + low] = (0, low, 0, 0)
    for code, size in {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}.items():
        heads[code] = (0, size, 0, 0)
    for code, width in {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}.items():
        heads[code] = (width, 0, 0, 0)
    for code, width, unit in ((0xDC, 2, 1), (0xDD, 4, 1), (0xDE, 2, 2), (0xDF, 4, 2)):
        heads[code] = (width, 0, 0, unit)
    for code in (0xC1, 0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8):
        heads[code] = None
    return heads


_HEADS = _msgpack_heads()


def _check_msgpack(body: bytes) -> None:
    """Walk over the items without making any: a list's head alone makes the parser reserve what it claims."""
    at, due, left, size = 0, 1, MOST_ITEMS, len(body)
    while due:
        if at + due > size:
            raise WireError("not_document", f"msgpack that ends before what it announces: {due} more values in {max(0, size - at)} bytes")
        head = _HEADS[body[at]]
        left -= 1
        if head is None or left < 0:
            raise _refused_msgpack(body[at], left)
        width, skipped, items, unit = head
        at += 1 + skipped
        if width:
            length = int.from_bytes(body[at : at + width], "big")
            at += width
            if unit:
                items = unit * length
            else:
                at += length
        due += items - 1
    if at != size:
        raise WireError("not_document", f"msgpack of {size} bytes whose one value has {at}")


def _refused_msgpack(code: int, left: int) -> WireError:
    if left < 0:
        return WireError("too_large", f"more than {MOST_ITEMS} values; send pixels as an array")
    return WireError("not_document", f"msgpack: {code:#x} is an extension type or nothing, and has no place in a document")


def _dump_msgpack(document: dict[str, Any]) -> bytes:
    packed: bytes = msgpack.packb(document, default=_packable)
    return packed


def _packable(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.dtype.kind not in "OV":
        return {b"nd": True, b"type": value.dtype.str, b"kind": b"", b"shape": value.shape, b"data": value.tobytes()}
    if isinstance(value, np.generic):
        return {b"nd": False, b"type": value.dtype.str, b"data": value.tobytes()}
    if isinstance(value, complex):
        return {b"complex": True, b"data": repr(value)}
    raise TypeError(f"a {type(value).__name__} has no place in a document")


def _dump_json(document: dict[str, Any]) -> bytes:
    return json.dumps(document, default=_listed).encode()


def _listed(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no place in a document")


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


_LOADERS: dict[str, Callable[[bytes], Any]] = {"msgpack": _load_msgpack, "json": _load_json, "pickle": read_pickle}
_DUMPERS: dict[str, Callable[[dict[str, Any]], bytes]] = {"msgpack": _dump_msgpack, "json": _dump_json, "pickle": pickle.dumps}
