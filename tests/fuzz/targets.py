"""What is fuzzed: for each decoder its valid inputs, as trees that can be changed, and what it means to survive one."""

from __future__ import annotations

import atexit
import datetime
import functools
import importlib
import io
import json
import math
import os
import pickle
import random
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import cbor2
import h5py
import numpy as np
import tifffile

from streamprior.config import DocumentsSettings, PositionSettings
from streamprior.errors import WireError
from streamprior.records import Detector, Frame
from streamprior.seams import Decoded, Decoder
from streamprior.sources.documents import DocumentsDecoder
from streamprior.wire import dectris_v1, dectris_v2
from streamprior.wire.compression import compress, compress_block, decompress, decompress_block
from streamprior.wire.documents import Serializer, dump_document, load_document
from tests.fuzz.mutate import Input, changed, shuffled

DATE = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
MOST_BYTES = 2**20
"""Limit of a message, so that one beyond it is among the inputs; and of what an input may be unpacked to, which bounds the memory."""

CORPUS = Path(__file__).parent / "corpus"
_DTYPES = (np.uint8, np.uint16, np.uint32, np.float32)
_SERIALIZERS: tuple[Serializer, ...] = get_args(Serializer)
_ROOT = b"{{ root_path }}"


@dataclass(frozen=True)
class Target:
    """trees : valid inputs, each a list of messages in a form that `changed` knows; `build` makes the bytes. run : one input; raises what
    should not have been raised. jsonable : the trees are JSON."""

    trees: Sequence[Any]
    build: Callable[[Any], Input]
    run: Callable[[Input], None]
    jsonable: bool

    def input(self, seed: int, number: int, corpus: Sequence[Input]) -> Input:
        """Input `number` of this seed: the same whenever it is asked for."""
        random_ = random.Random(seed * 2**40 + number)
        if corpus and random_.random() < 0.2:
            messages = random_.choice(corpus)
        else:
            # The first trees are small and quick; recordings, at the end, are both not.
            tree = self.trees[int(len(self.trees) * random_.random() ** 2)]
            for _ in range(random_.choice((0, 1, 1, 2, 3))):
                tree = changed(tree, random_, self.jsonable)
            messages = self.build(tree)
        for _ in range(random_.choice((0, 1, 1, 2))):
            messages = shuffled(messages, corpus or [messages], random_)
        return messages


@functools.cache
def target(name: str) -> Target:
    """One of `TARGETS`, or what MODULE:FUNCTION makes."""
    module, _, function = name.partition(":")
    made: Callable[[], Target] = getattr(importlib.import_module(module), function) if function else TARGETS[name]
    return made()


def kept(name: str) -> list[Input]:
    """The corpus of a target."""
    return [load_input(file.read_bytes()) for file in sorted((CORPUS / name).glob("*.cbor"))]


def load_input(data: bytes) -> Input:
    return [tuple(message) for message in cbor2.loads(data)]


def dump_input(messages: Input) -> bytes:
    return cbor2.dumps([list(message) for message in messages])


def recorded(pattern: str) -> list[Path]:
    """Recordings, read in place; none where the data are absent."""
    folder = Path(os.environ.get("STREAMPRIOR_DATA", ""), "wire")
    return sorted(folder.glob(pattern)) if folder.is_dir() else []


def counts(dtype: Any, shape: tuple[int, int] = (12, 10)) -> np.ndarray:
    return np.random.default_rng(0).poisson(3, shape).astype(dtype)


def detector(shape: tuple[int, int] = (12, 10)) -> Detector:
    return Detector(shape, counts(bool, shape), np.full(shape, 1.5, np.float32), 6e4, (4.0, 8.0), 75e-6, 0.5, 9000.0, 0.01)


def listed(items: Any) -> list[Any]:
    """A list, whatever the changes made of it."""
    return list(items) if isinstance(items, list | tuple) else [items]


def thawed(item: Any) -> Any:
    """A CBOR item in containers that can be changed."""
    if isinstance(item, Mapping):
        return {key: thawed(value) for key, value in item.items()}
    if isinstance(item, list | tuple):
        return [thawed(one) for one in item]
    return cbor2.CBORTag(item.tag, thawed(item.value)) if isinstance(item, cbor2.CBORTag) else item


def survive(decoder: Decoder, messages: Iterable[Any]) -> None:
    """Every message decoded, and what is held back given up. Raises whatever is no WireError, AssertionError for a record that is none."""
    calls: list[Callable[[], Iterable[Decoded | WireError]]] = [functools.partial(decoder.decode, message, 0.0) for message in messages]
    for call in (*calls, functools.partial(decoder.due, 1.0), functools.partial(decoder.due, math.inf)):
        try:
            for record in call():
                check_record(record)
        except WireError as error:
            check_record(error)


def check_record(record: Any) -> None:
    if isinstance(record, WireError):
        assert len(record.detail) < 2000, "a detail that a log would choke on"
        record.detail.encode()
        return
    assert isinstance(record, get_args(Decoded)), f"a record of type {type(record)}"
    if isinstance(record, Frame):
        assert record.counts.ndim == 2
        assert record.counts.dtype.kind in "uif"
        assert record.counts.dtype.isnative
        assert 0 <= record.index < 2**31
        record.series.encode()


def v2() -> Target:
    def build(items: Any) -> Input:
        return [(cbor2.dumps(cbor2.CBORTag(55799, item)),) for item in listed(items)]

    def run(messages: Input) -> None:
        survive(dectris_v2.StreamV2Decoder("x", max_message_bytes=MOST_BYTES), [one[0] if len(one) == 1 else one for one in messages])

    start = dectris_v2.encode_start(7, "S7", detector(), 3, np.dtype("u2"), {"scan": "S54", "positions": [1.5, None, {"deep": [True]}]})
    late = {"position_m": [1e-6, 2e-6], "origin": 4, "positions_m": [[0, 1e-6, 2e-6], [1, 0.0, 0.0]]}
    packed = [
        dectris_v2.encode_image(7, "S7", index, counts(dtype), 0.25, DATE, 0.01, late, compression)
        for index, (dtype, compression) in enumerate((d, c) for d in _DTYPES for c in ("bslz4", "lz4", None))
    ]
    end = dectris_v2.encode_end(7, "S7", late)
    wide = dectris_v2.encode_image(7, "S7", 1, counts(np.uint16, (130, 67)), 0.25, DATE)
    valid = [[start, packed[3], end], *([one] for one in packed), [wide], [start]]
    valid += [[file.read_bytes()] for file in recorded("dectris_v2/*/*.cbor") if file.stat().st_size < 600_000]
    trees = [[thawed(cbor2.loads(one)) for one in messages] for messages in valid]
    return Target(trees, build, run, jsonable=False)


def v1() -> Target:
    def build(messages: Any) -> Input:
        return [
            tuple(part if isinstance(part, bytes) else json.dumps(part, default=repr).encode() for part in listed(message))
            for message in listed(messages)
        ]

    def run(messages: Input) -> None:
        survive(dectris_v1.StreamV1Decoder("x", max_message_bytes=MOST_BYTES), [one[0] if len(one) == 1 else one for one in messages])

    def tree(messages: Iterable[Sequence[bytes]]) -> list[list[Any]]:
        return [[_json_or_bytes(part) for part in message] for message in messages]

    told = {"position_m": [1e-6, 2e-6], "origin": 4}
    trees = []
    for number, dtype in enumerate(_DTYPES):
        for encoding in ("bslz4", "lz4", "none"):
            header = dectris_v1.encode_start(7, detector(), 3, np.dtype(dtype), told)
            images = [dectris_v1.encode_image(7, index, counts(dtype), 0.1 * index, 0.01, told, encoding) for index in range(2)]
            whole = [header, *images, dectris_v1.encode_end(7)]
            framing = ("multipart", "split_header", "parts", "headerless")[number]
            trees.append(tree(dectris_v1.framed(whole, framing)))
    for file in recorded("dectris_v1/*.cbors"):
        with file.open("rb") as stream:
            trees.append(tree(_cbor_sequence(stream)))
    return Target(trees, build, run, jsonable=False)


def _cbor_sequence(stream: io.BufferedReader) -> Iterable[Sequence[bytes]]:
    parts: list[bytes] = []
    while True:
        try:
            item = cbor2.load(stream)
        except cbor2.CBORDecodeError:
            return [parts] if parts else []
        if isinstance(item, bytes):
            parts.append(item)
        else:
            return [list(item)]


def _json_or_bytes(part: bytes) -> Any:
    try:
        return json.loads(part)
    except ValueError:
        return part


def loader() -> Target:
    """Messages on the wire of documents; the first part of each says how it is serialised."""

    def build(messages: Any) -> Input:
        return [_dumped(*(*listed(message), None, None, None)[:3]) for message in listed(messages)]

    def run(messages: Input) -> None:
        for message in messages:
            how, data = (*message, b"", b"")[:2]
            try:
                load_document(data, b"", _serializer(how), MOST_BYTES)
            except WireError as error:
                check_record(error)

    pixels: dict[str, Any] = {
        "a": counts(np.uint16),
        "b": np.float64(2),
        "c": [counts(np.float32)[:2], 1 + 2j, b"12"],
        "d": np.array(["x", "yz"]),
    }
    event = ["event", {"uid": "e", "descriptor": "d", "seq_num": 1, "time": 1.0, "data": pixels, "timestamps": {}}]
    trees: list[Any] = [[[serializer, *document]] for serializer in _SERIALIZERS for run_ in [[event] * 9, *_runs()] for document in run_]
    others = (
        {1.5, 2},
        datetime.datetime(2026, 3, 1),
        OrderedDict(a=1),
        Fraction(1, 3),
        np.dtype("u2"),
        Path("a"),
        os.system,
        bytearray(9),
        {1: 2},
    )
    trees += [[["pickle", "start", pickle.dumps({"uid": "r", "a": other}, protocol)]] for other in others for protocol in (0, 2, 5)]
    return Target(trees, build, run, jsonable=False)


def _serializer(how: bytes) -> Serializer:
    return _SERIALIZERS[how[0] % len(_SERIALIZERS)] if how else "json"


def _dumped(serializer: Any, name: Any, doc: Any) -> tuple[bytes, ...]:
    which = _SERIALIZERS.index(serializer) if serializer in _SERIALIZERS else 0
    if isinstance(doc, bytes):
        return bytes([which]), f" {name} ".encode(errors="replace") + doc
    try:
        data = dump_document(name, doc, _SERIALIZERS[which])
    except (TypeError, ValueError, LookupError, OverflowError):  # no publisher could write that
        data = f" {name} ".encode(errors="replace") + json.dumps(doc, default=repr).encode()
    return bytes([which]), data


def documents() -> Target:
    """Runs: the first part of the first message says how all are serialised."""
    folder = _assets()

    def build(messages: Any) -> Input:
        return [_dumped("json", *(*listed(message), None, None)[:2]) for message in listed(messages)]

    def run(messages: Input) -> None:
        how = messages[0][0] if messages and messages[0] else b""
        decoder = DocumentsDecoder(
            "x",
            DocumentsSettings(serializer=_serializer(how), folders=(folder,), flush_s=0.0),
            PositionSettings(x="x", y="y", unit="mm"),
            max_message_bytes=MOST_BYTES,
        )
        survive(decoder, [part.replace(_ROOT, bytes(folder)) for message in messages for part in message[1:]])

    return Target(_runs(), build, run, jsonable=True)


def _runs() -> list[list[list[Any]]]:
    """Runs of documents: inline images and motors, then the recorded ones."""
    keys = {
        "det": {"source": "sim", "dtype": "array", "shape": [1, 3, 4], "dtype_numpy": "<u2"},
        "x": {"source": "sim", "dtype": "number", "shape": [], "units": "um"},
        "y": {"source": "sim", "dtype": "number", "shape": [], "units": "um"},
    }
    image = [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    told = {"descriptor": "d", "timestamps": {}}
    inline: list[list[Any]] = [
        ["start", {"uid": "r", "time": 1.0, "scan_id": 3}],
        ["descriptor", {"uid": "d", "run_start": "r", "time": 1.0, "name": "primary", "data_keys": keys}],
        *(["event", {**told, "uid": f"e{n}", "time": 1.0, "seq_num": n, "data": {"det": [image], "x": 0.5, "y": n}}] for n in (1, 2)),
        ["event_page", {**told, "uid": ["e3"], "time": [1.0], "seq_num": [3], "data": {"det": [[image]], "x": [1], "y": [2]}}],
        ["stop", {"uid": "s", "run_start": "r", "time": 2.0, "exit_status": "success"}],
    ]
    runs: list[list[list[Any]]] = [inline] * 4
    for file in recorded("bluesky_documents/*.json"):
        runs.append([[one["name"], one["doc"]] for one in json.loads(file.read_text().replace("{{ uuid }}", "u"))])
    return runs


@functools.cache
def _assets() -> Path:
    """A folder with the files that the recorded documents refer to."""
    folder = Path(tempfile.mkdtemp(prefix="streamprior-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    for name in ("dataset.h5", "dataset_part2.h5"):
        with h5py.File(folder / name, "w") as file:
            file["/entry/data/data_1"] = np.arange(5.0)
            file["/entry/data/data_2"] = np.arange(5 * 13 * 17, dtype="<i8").reshape(5, 13, 17)
    (folder / "tiff_files").mkdir()
    for number in range(2):
        tifffile.imwrite(folder / "tiff_files" / f"img_{number:05d}.tif", counts(np.uint8, (10, 15)))
    return folder


def compression() -> Target:
    """Blobs; the first part of a message says what they claim to be."""

    def build(messages: Any) -> Input:
        return [tuple(part if isinstance(part, bytes) else b"" for part in listed(message)) for message in listed(messages)]

    def run(messages: Input) -> None:
        for message in messages:
            claim, blob = (*message, b"", b"")[:2]
            how, kind, rows, columns = (*claim, 0, 0, 0, 0)[:4]
            dtype, shape = np.dtype(_DTYPES[kind % len(_DTYPES)]), (1 + rows, 1 + columns)
            try:
                container = ("bslz4", "lz4", "")[how % 3]
                found = decompress(container, blob, dtype, shape) if container else decompress_block(blob, dtype, shape)
                assert (found.dtype, found.shape) == (dtype, shape)
            except WireError as error:
                check_record(error)

    trees = []
    for kind, dtype in enumerate(_DTYPES):
        for rows, columns in ((3, 5), (12, 10), (130, 67), (250, 250)):
            pixels = counts(dtype, (rows, columns))
            blobs = (compress("bslz4", pixels), compress("lz4", pixels), compress_block(pixels))
            trees += [[[bytes((how, kind, rows - 1, columns - 1)), blob]] for how, blob in enumerate(blobs)]
    return Target(sorted(trees, key=lambda tree: len(tree[0][1])), build, run, jsonable=False)


TARGETS: dict[str, Callable[[], Target]] = {"v2": v2, "v1": v1, "loader": loader, "documents": documents, "compression": compression}
