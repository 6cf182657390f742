"""Documents on the wire: what publishers write is read the same, and what attacks is refused with a reason, in little memory."""

from __future__ import annotations

import collections
import itertools
import json
import os
import pickle
import struct
import tracemalloc
from typing import Any

import msgpack
import msgpack_numpy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamprior.errors import WireError
from streamprior.wire import documents
from streamprior.wire.documents import NAMES, REFUSED_BY_TRANSPORT, Serializer, dump_document, load_document
from streamprior.wire.pickles import MOST_OPCODES

LIMIT = 10_000_000
SERIALIZERS: tuple[Serializer, ...] = ("msgpack", "json", "pickle")
COUNTS = np.random.default_rng(0).poisson(3, (16, 24)).astype("u2")
EVENT: dict[str, Any] = {
    "uid": "e1",
    "descriptor": "d1",
    "seq_num": 1,
    "time": 1.5,
    "data": {"image": COUNTS, "x": 0.25, "name": "vis à vis", "gone": None, "on": True, "far": -(2**40)},
    "timestamps": {"image": 1.5, "x": 1.25},
    "filled": {},
}

RICH: dict[str, Any] = {
    "fortran": np.asfortranarray(COUNTS),
    "turned": COUNTS.reshape(16, 8, 3).transpose(1, 2, 0),
    "every other": COUNTS[:, ::2],
    "float": np.float64(1.5),
    "bool": np.bool_(True),
    "bools": np.array([True, False]),
    "complex": 1 + 2j,
    "complexes": np.array([1 + 2j], "c8"),
    "text": np.array(["ab", "ç"]),
    "bytes": np.array([b"ab", b"c"]),
    "one text": np.str_("x"),
    "none": np.zeros((0, 3)),
    "flat": np.array(5.0),
    "big": np.arange(4, dtype=">i4"),
    "raw": b"abc",
    "nested": [1, [2.5, None, {"a": [True]}], ""],
    "most": 2**63,
    "ordered": collections.OrderedDict(b=1, a=2),
}


def loaded(name: bytes, body: bytes, serializer: Serializer = "msgpack", max_bytes: int = LIMIT) -> tuple[str, Any] | None:
    return load_document(b"beam1 " + name + b" " + body, b"beam1", serializer, max_bytes)


def reason(body: bytes, serializer: Serializer, max_bytes: int = LIMIT) -> str:
    with pytest.raises(WireError) as caught:
        loaded(b"event", body, serializer, max_bytes)
    assert len(caught.value.detail) > 10
    return caught.value.reason


def grown_mb(body: bytes, serializer: Serializer, max_bytes: int = LIMIT) -> tuple[str, float]:
    """Why it is refused, and MB that decoding took at its height."""
    tracemalloc.start()
    try:
        return reason(body, serializer, max_bytes), tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def as_lists(value: Any) -> Any:
    """A document as JSON has it."""
    if isinstance(value, dict):
        return {key: as_lists(one) for key, one in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    return [as_lists(one) for one in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("prefix", [b"", b"beam1"])
@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_dumped_is_loaded(name: str, serializer: Serializer, prefix: bytes) -> None:
    result = load_document(dump_document(name, EVENT, serializer, prefix), prefix, serializer, LIMIT)
    assert result is not None
    assert result[0] == name
    np.testing.assert_equal(result[1], as_lists(EVENT) if serializer == "json" else EVENT)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_every_array_that_numpy_pickles_is_read(protocol: int) -> None:
    _, document = loaded(b"event", pickle.dumps(RICH | {"pair": (1, "b")}, protocol), "pickle")
    np.testing.assert_equal(document, RICH | {"pair": (1, "b")})
    for key, value in RICH.items():
        assert type(document[key]) is (dict if key == "ordered" else type(value))
        if isinstance(value, np.ndarray):
            assert document[key].dtype == value.dtype.newbyteorder("=")


def test_pickles_of_numpy_1_are_read() -> None:
    old = pickle.dumps(EVENT, 4)
    assert b"\x16numpy._core.multiarray" in old
    # The name is two bytes shorter, its length and the frame's before it.
    frame = struct.pack("<Q", struct.unpack_from("<Q", old, 3)[0] - 1)
    old = old[:3] + frame + old[11:].replace(b"\x16numpy._core.multiarray", b"\x15numpy.core.multiarray")
    np.testing.assert_equal(loaded(b"event", old, "pickle"), ("event", EVENT))


def test_every_array_that_msgpack_numpy_packs_is_read() -> None:
    packed = msgpack.packb(RICH, default=msgpack_numpy.encode)
    _, document = loaded(b"event", packed)
    np.testing.assert_equal(document, RICH)


def test_msgpack_numpy_reads_what_is_dumped() -> None:
    body = dump_document("event", RICH).split(b" ", 2)[2]
    np.testing.assert_equal(msgpack.unpackb(body, object_hook=msgpack_numpy.decode), RICH)


def test_numbers_that_are_none_are_read_as_such() -> None:
    _, document = loaded(b"event", b'{"a": NaN, "b": -Infinity, "c": 1e999}', "json")
    np.testing.assert_equal(document, {"a": np.nan, "b": -np.inf, "c": np.inf})


def test_documents_of_another_prefix_are_not_ours_whatever_they_hold() -> None:
    assert load_document(b"beam2 event " + bytes(2000), b"beam1", "pickle", 1000) is None
    assert load_document(b" event \x80", b"beam1", "msgpack", LIMIT) is None
    assert load_document(b"beam2 event \x80", b"", "msgpack", LIMIT) == ("event", {})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", "not_document"),
        (b"beam1", "not_document"),
        (b"beam1 event", "not_document"),
        (b"beam1 events {}", "bad_document"),
        (b"beam1 \xff\xff {}", "bad_document"),
        (b"beam1  {}", "bad_document"),
        (b"beam1 event ", "not_document"),
        (b"beam1 event " + bytes(LIMIT), "too_large"),
        (REFUSED_BY_TRANSPORT, "too_large"),
    ],
)
@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_a_frame_that_is_no_documents(message: bytes, expected: str, serializer: Serializer) -> None:
    with pytest.raises(WireError) as caught:
        load_document(message, b"beam1", serializer, LIMIT)
    assert caught.value.reason == expected


def packed_array(**changes: Any) -> bytes:
    array = {b"nd": True, b"type": "<u2", b"kind": b"", b"shape": (16, 24), b"data": COUNTS.tobytes()}
    return msgpack.packb({"image": array | {key.encode(): value for key, value in changes.items()}})


MSGPACK = {
    "a claim of 10 GB": ("wrong_shape", packed_array(shape=(50_000, 100_000))),
    "a claim of 2**64 x 2**63": ("wrong_shape", packed_array(shape=(2**64 - 1, 2**63))),
    "nothing of everything": ("wrong_shape", packed_array(shape=(0,) + (2**31,) * 7, data=b"")),
    "too many axes": ("wrong_shape", packed_array(shape=(1,) * 100, data=b"12")),
    "a negative extent": ("wrong_shape", packed_array(shape=(-16, -24))),
    "an extent that is a float": ("wrong_shape", packed_array(shape=(16.0, 24))),
    "an extent that is true": ("wrong_shape", packed_array(shape=(True, 384))),
    "no shape": ("wrong_type", packed_array(shape=None)),
    "data as text": ("wrong_type", packed_array(data="ab" * 384)),
    "objects": ("unsafe_pickle", packed_array(kind=b"O", data=pickle.dumps(COUNTS))),
    "objects by dtype": ("unsafe_pickle", packed_array(type="|O")),
    "a structure": ("wrong_dtype", packed_array(kind=b"V", type=[["a", "<u2"]])),
    "a dtype of many": ("wrong_dtype", packed_array(type="(100000,100000)u2")),
    "a dtype of a list": ("wrong_dtype", packed_array(type="u2," * 100)),
    "a date": ("wrong_dtype", packed_array(type="<M8[s]")),
    "text of no width": ("wrong_dtype", packed_array(type="<U0")),
    "characters that are none": ("wrong_type", packed_array(type="<U1", shape=(1,), data=b"\xff" * 4)),
    "half a character": ("wrong_type", packed_array(type="<U1", shape=(1,), data=b"\x00\xd8\x00\x00")),
    "a number of no bytes": ("wrong_shape", packed_array(nd=False, data=b"")),
    "a number of many": ("wrong_shape", packed_array(nd=False)),
    "a complex call": ("wrong_type", msgpack.packb({"a": {b"complex": True, b"data": "__import__('os')"}})),
    "a list that claims 4 G": ("not_document", b"\xdd\xff\xff\xff\xff"),
    "lists within lists that claim": ("not_document", b"\xdd\x00\xff\xff\xff" * 500 + bytes(1000)),
    "a map that claims 4 G": ("not_document", b"\xdf\xff\xff\xff\xff"),
    "bytes that claim 4 G": ("not_document", b"\xc6\xff\xff\xff\xff"),
    "an extension": ("not_document", msgpack.packb({"a": msgpack.ExtType(5, b"abc")})),
    "a time stamp": ("not_document", msgpack.packb({"a": msgpack.Timestamp(1)})),
    "two values": ("not_document", b"\x80\x80"),
    "cut short": ("not_document", packed_array()[:-3]),
    "keys of numbers": ("not_document", b"\x81\x01\x01"),
    "keys of bytes": ("bad_document", b"\x81\xc4\x01a\x01"),
    "half a character of text": ("not_document", b"\x81\xa1a\xa3\xed\xa0\x80"),
    "deep": ("bad_document", b"\x81\xa1a" + b"\x91" * 200 + b"\x90"),
    "deeper": ("not_document", b"\x81\xa1a" + b"\x91" * 50_000 + b"\x90"),
    "empty lists": ("too_large", b"\x81\xa1a\xdd\x00\x0f\x42\x40" + b"\x90" * 1_000_000),
    "a list": ("bad_document", b"\x90"),
    "a number": ("bad_document", b"\x01"),
}


@pytest.mark.parametrize("case", MSGPACK)
def test_msgpack_that_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_ITEMS", 2**16)
    expected, body = MSGPACK[case]
    found, grown = grown_mb(body, "msgpack", 20_000_000)
    assert found == expected
    assert grown < 2 * len(body) / 1e6 + 4


JSON = {
    "garbage": ("not_document", b"\xff\xfe{}"),
    "UTF-16": ("not_document", '{"a": 1}'.encode("utf-16")),
    "two values": ("not_document", b"{} {}"),
    "deep": ("not_document", b"[" * 50_000),
    "less deep": ("bad_document", b'{"a":' * 200 + b"1" + b"}" * 200),
    "many digits": ("not_document", b'{"a": ' + b"9" * 100_000 + b"}"),
    "some digits": ("bad_document", b'{"a": ' + b"9" * 100 + b"}"),
    "some digits in a row": ("bad_document", b'{"a": [1, ' + b"9" * 100 + b"]}"),
    "half a character": ("bad_document", b'{"a": "\\ud800"}'),
    "half a character in a key": ("bad_document", b'{"\\ud800": 1}'),
    "a list": ("bad_document", b"[]"),
    "empty lists": ("too_large", b'{"a": [' + b"[]," * 2**16 + b"1]}"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MOST_ITEMS", 2**16)
    expected, body = JSON[case]
    found, grown = grown_mb(body, "json")
    assert found == expected
    assert grown < 2 * len(body) / 1e6 + 4


class Runs:
    """Pickles as a call of whatever it is given."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self._calls = call, arguments

    def __reduce__(self) -> Any:
        return self._calls


class Stated:
    """Pickles as an array that is filled with whatever it is given."""

    def __init__(self, *state: Any, make: Any = np._core.multiarray._reconstruct) -> None:  # type: ignore[attr-defined]
        self._make, self._state = make, state

    def __reduce__(self) -> Any:
        return self._make, (np.ndarray, (0,), b"b"), self._state


def called(module: bytes, name: bytes, arguments: bytes = b")", then: bytes = b"") -> bytes:
    """A pickle that names, calls, and goes on with the result; written by hand where Python would refuse to write it."""
    return b"\x80\x04" + b"c" + module + b"\n" + name + b"\n" + arguments + b"R" + then + b"."


def text(value: bytes) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value


DTYPE = b"cnumpy\ndtype\n" + text(b"u2") + b"\x89\x88\x87R(K\x03" + text(b">") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
BOMB = b"\x80\x04]\x94" + b"".join(b"]\x94(h" + bytes([i]) + (b"h" + bytes([i])) * 9 + b"e" for i in range(60)) + b"."
ITSELF = b"\x80\x04}\x94" + text(b"a") + b"h\x00s."
COPIES = (
    b"\x80\x05}("  # the same MB, made to an array of the other byte order again and again
    + text(b"x") + b"\x96" + (2**20).to_bytes(8, "little") + bytes(2**20) + b"\x94"
    + b"".join(
        text(b"a%d" % i) + b"cnumpy._core.numeric\n_frombuffer\n(h\x00" + DTYPE + b"J\x00\x00\x08\x00\x85" + text(b"C") + b"tR"
        for i in range(2000)
    )
    + b"u."
)  # fmt: skip

PICKLES = {
    "os.system": ("unsafe_pickle", pickle.dumps({"a": Runs(os.system, "touch pwned")})),
    "os.system as the document": ("unsafe_pickle", pickle.dumps(Runs(os.system, "touch pwned"))),
    "eval": ("unsafe_pickle", pickle.dumps({"a": Runs(eval, "open('pwned', 'w')")})),
    "getattr": ("unsafe_pickle", called(b"builtins", b"getattr")),
    "a dotted name": ("unsafe_pickle", b"\x80\x04" + text(b"numpy") + text(b"dtype.__class__") + b"\x93."),
    "a name within numpy": ("unsafe_pickle", called(b"numpy.f2py.diagnose", b"run")),
    "numpy.load": ("unsafe_pickle", called(b"numpy", b"load", text(b"/etc/passwd") + b"\x85")),
    "a name that is a list": ("unsafe_pickle", b"\x80\x04]]\x93."),
    "bytearray of 10 GB": ("unsafe_pickle", pickle.dumps({"a": Runs(bytearray, 10**10)})),
    "ndarray of 20 GB": ("unsafe_pickle", pickle.dumps({"a": Runs(np.ndarray, (10**10,), "u2")})),
    "zeros of 80 GB": ("unsafe_pickle", pickle.dumps({"a": Runs(np.zeros, (10**10,))})),
    "objects": ("unsafe_pickle", pickle.dumps({"a": np.array([None, {}], object)})),
    "objects that run": ("unsafe_pickle", pickle.dumps({"a": np.array([Runs(os.system, "touch pwned")], object)})),
    "a structure": ("wrong_dtype", pickle.dumps({"a": np.zeros(2, [("x", "f8")])})),
    "a date": ("wrong_dtype", pickle.dumps({"a": np.array(["2026-01-01"], "M8[D]")})),
    "a set": ("unsafe_pickle", pickle.dumps({"a": {1, 2}})),
    "an instance": ("unsafe_pickle", pickle.dumps({"a": collections.Counter(a=1)})),
    "protocol 0": ("not_document", pickle.dumps({"a": 1}, 0)),
    "protocol 2": ("not_document", pickle.dumps({"a": 1}, 2)),
    "protocol 9": ("not_document", b"\x80\x09}."),
    "an extension": ("unsafe_pickle", b"\x80\x04\x82\x01."),
    "a persistent id": ("unsafe_pickle", b"\x80\x04Pabc\n."),
    "INST": ("unsafe_pickle", b"\x80\x04(ios\nsystem\n."),
    "OBJ": ("unsafe_pickle", b"\x80\x04(cnumpy\ndtype\no."),
    "NEWOBJ": ("unsafe_pickle", b"\x80\x04cnumpy\nndarray\n)\x81."),
    "no opcode": ("not_document", b"\x80\x04\x00."),
    "a dtype as a value": ("bad_document", pickle.dumps({"a": np.dtype("u2")})),
    "an array that is never filled": (
        "bad_document",
        b"\x80\x04}" + text(b"a") + called(b"numpy._core.multiarray", b"_reconstruct", b"NNN\x87")[2:-1] + b"s.",
    ),
    "a name as a value": ("bad_document", b"\x80\x04}" + text(b"a") + b"cnumpy\nndarray\ns."),
    "a state for a name": ("unsafe_pickle", b"\x80\x04cnumpy\nndarray\nN}\x86b."),
    "a state for a list": ("unsafe_pickle", b"\x80\x04]}b."),
    "a call of text": ("unsafe_pickle", b"\x80\x04" + text(b"os") + b")R."),
    "ndarray itself": ("unsafe_pickle", called(b"numpy", b"ndarray", b"J\x00\x00\x00\x10\x85")),
    "an array of 10 GB of 6 bytes": ("wrong_shape", pickle.dumps({"a": Stated(1, (10**5, 10**5), np.dtype("u1"), False, b"123456")})),
    "an array of no bytes object": ("wrong_type", pickle.dumps({"a": Stated(1, (2,), np.dtype("u1"), False, [1, 2])})),
    "an array of a number": ("not_document", pickle.dumps({"a": Stated(1, (2,), np.dtype("u1"), False, 12)})),
    "a call of None": ("unsafe_pickle", b"\x80\x04NNR."),
    "text that claims 8 EB": ("not_document", b"\x80\x04\x8d" + b"\xff" * 7 + b"\x7f."),
    "bytes that claim 10 GB": ("not_document", b"\x80\x04\x8e" + struct.pack("<Q", 10**10) + b"."),
    "a bytearray that claims 10 GB": ("not_document", b"\x80\x05\x96" + struct.pack("<Q", 10**10) + b"."),
    "a memo of 4 G": ("bad_document", b"\x80\x04]r\xff\xff\xff\xff."),
    "no such memo": ("not_document", b"\x80\x04h\x05."),
    "an empty stack": ("not_document", b"\x80\x04."),
    "no mark": ("not_document", b"\x80\x04]e."),
    "no end": ("not_document", b"\x80\x04}"),
    "an odd dictionary": ("not_document", b"\x80\x04}(" + text(b"a") + b"u."),
    "items for a number": ("not_document", b"\x80\x04K\x01" + text(b"a") + b"Ns."),
    "keys of numbers": ("bad_document", pickle.dumps({"a": {i * (2**61 - 1): None for i in range(1000)}})),
    "a list as a key": ("bad_document", b"\x80\x04}]Ns."),
    "an integer of 255 bytes": ("bad_document", b"\x80\x04}" + text(b"a") + b"\x8a\xff" + b"\x7f" * 255 + b"s."),
    "integers of 255 bytes": ("bad_document", b"\x80\x04}" + text(b"a") + b"](K\x01\x8a\xff" + b"\x7f" * 255 + b"es."),
    "billion laughs": ("too_large", BOMB),
    "billion laughs behind many bytes": ("too_large", b"\x80\x04B" + struct.pack("<I", 600_000) + bytes(600_000) + BOMB[2:]),
    "itself": ("bad_document", ITSELF),
    "deep": ("bad_document", b"\x80\x04}" + text(b"a") + b"]" * 20_000 + b"a" * 19_999 + b"s."),
    "opcodes": ("too_large", b"\x80\x04" + b"N" * (MOST_OPCODES + 1) + b"."),
    "copies": ("too_large", COPIES),
    "one text many times": ("too_large", pickle.dumps({"a": ["x" * 100_000] * 1000})),
}


@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_are_refused(case: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(documents, "MOST_OPCODES", 2**14)  # under tracemalloc every value counts tenfold
    expected, body = PICKLES[case]
    found, grown = grown_mb(body, "pickle")
    assert found == expected
    assert grown < 4 * len(body) / 1e6 + 20
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("serializer", ["msgpack", "json"])
def test_a_pickle_is_never_read_unless_it_is_asked_for(serializer: Serializer) -> None:
    assert reason(pickle.dumps(EVENT), serializer) == "not_document"


def test_the_same_list_twice_comes_out_as_two() -> None:
    shared = [1, 2]
    _, document = loaded(b"event", pickle.dumps({"a": shared, "b": shared}), "pickle")
    assert document["a"] == document["b"] == shared
    assert document["a"] is not document["b"]


VALID: list[tuple[Serializer, bytes]] = [(serializer, dump_document("event", EVENT, serializer)) for serializer in SERIALIZERS]
VALID += [("pickle", b" event " + pickle.dumps(RICH, protocol)) for protocol in (3, 4, 5)]
VALID += [("msgpack", b" event " + msgpack.packb(RICH, default=msgpack_numpy.encode)), ("pickle", b" event " + COPIES[:3000])]


def only_wire_errors(message: bytes, serializer: Serializer) -> None:
    try:
        result = load_document(message, b"", serializer, LIMIT)
    except WireError:
        return
    assert result is not None
    repr(result).encode()
    json.dumps(as_lists(result), default=lambda value: repr(value))


@given(st.sampled_from(SERIALIZERS), st.binary(max_size=200))
@example("pickle", b"\x80\x04")
@settings(max_examples=600, deadline=None)
def test_random_bytes_raise_wire_errors_only(serializer: Serializer, body: bytes) -> None:
    for head in (b" event ", b"", b" event \x80\x04"):
        only_wire_errors(head + body, serializer)


@given(st.sampled_from(VALID), st.data())
@settings(max_examples=600, deadline=None)
def test_mutated_documents_raise_wire_errors_only(valid: tuple[Serializer, bytes], data: st.DataObject) -> None:
    serializer, message = valid
    changed = bytearray(message)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(changed) - 1))
        kind = data.draw(st.sampled_from(["byte", "cut", "insert", "repeat"]))
        if kind == "byte":
            changed[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del changed[at : at + data.draw(st.integers(1, 8))]
        elif kind == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=8))
        else:
            changed[at:at] = changed[at : at + data.draw(st.integers(1, 40))]
        if not changed:
            break
    only_wire_errors(bytes(changed), serializer)


PROGRAM = [bytes([code]) for code in itertools.chain(b"N]})(etausRb.", (0x88, 0x85, 0x86, 0x87, 0x93, 0x94))]
PROGRAM += [b"h\x00", b"h\x01", b"K\x01", text(b"a"), text(b"numpy"), text(b"dtype"), DTYPE, b"C\x02ab"]
PROGRAM += [b"c%s\n%s\n" % name for name in ((b"numpy._core.multiarray", b"_reconstruct"), (b"numpy._core.multiarray", b"scalar"))]
PROGRAM += [b"c%s\n%s\n" % name for name in ((b"numpy._core.numeric", b"_frombuffer"), (b"builtins", b"complex"), (b"numpy", b"dtype"))]


@given(st.lists(st.sampled_from(PROGRAM), max_size=40))
@settings(max_examples=600, deadline=None)
def test_programs_of_known_opcodes_raise_wire_errors_only(program: list[bytes]) -> None:
    only_wire_errors(b" event \x80\x04" + b"".join(program) + b".", "pickle")
