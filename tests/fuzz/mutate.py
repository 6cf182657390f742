"""Valid messages -> hostile ones: a value of the structure exchanged, parts dropped and repeated, bytes flipped, cut, spliced."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import cbor2

Input = list[tuple[bytes, ...]]
"""Messages in the order of their arrival, each of one or more parts."""

_NUMBERS = (0, 1, -1, 2, 3, 7, 8, 16, 255, 256, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**60, 2**63, 2**64 - 1, -(2**63))
_VALUES: tuple[Any, ...] = (
    *_NUMBERS, None, True, False, 0.5, -0.0, 1e300, float("nan"), float("inf"), 10**40, -(10**400), "", "a", "0", "../../etc/passwd", "\0",
    "\N{BLUE HEART}" * 3, "9" * 5000, b"", b"\0" * 9, [], [[]], [0] * 50, [1, 0], [[[[[[]]]]]], {}, {"a": {"b": []}}, {"": 0},
)  # fmt: skip
_TAGS = (
    0,
    1,
    2,
    3,
    4,
    5,
    24,
    25,
    28,
    29,
    30,
    35,
    36,
    37,
    40,
    64,
    65,
    66,
    69,
    70,
    71,
    77,
    80,
    84,
    85,
    86,
    87,
    100,
    256,
    258,
    260,
    1040,
    56500,
    55799,
)
_BLOCK = 12
"""Most bytes of a change in place; a cut or a splice is of any length."""


def changed(tree: Any, random_: random.Random, jsonable: bool) -> Any:
    """The same tree with one value exchanged, dropped, repeated or moved; it shares with the old one what is the same. jsonable : without
    tags and bytes."""
    if isinstance(tree, dict) and tree and random_.random() < 0.9:
        deep = [key for key, value in tree.items() if isinstance(value, dict | list | cbor2.CBORTag)]
        # Most keys hold a number; what is deep inside would hardly ever be reached.
        key = random_.choice(deep if deep and random_.random() < 0.5 else list(tree))
        dice = random_.random()
        if dice < 0.08:
            return {name: value for name, value in tree.items() if name != key}
        if dice < 0.12:
            return tree | {random_.choice(("", "a", "htype", "type", *map(str, tree))): tree[key]}
        return tree | {key: changed(tree[key], random_, jsonable)}
    if isinstance(tree, list | tuple) and tree and random_.random() < 0.9:
        at = random_.randrange(len(tree))
        dice = random_.random()
        before, one, after = list(tree[:at]), tree[at], list(tree[at + 1 :])
        if dice < 0.08:
            return before + after
        if dice < 0.14:
            return before + [one] * random_.choice((2, 3, 40)) + after
        if dice < 0.18:
            return random_.sample(list(tree), len(tree))
        return [*before, changed(one, random_, jsonable), *after]
    if isinstance(tree, cbor2.CBORTag) and random_.random() < 0.9:
        if random_.random() < 0.2:
            return cbor2.CBORTag(random_.choice(_TAGS), tree.value)
        return cbor2.CBORTag(tree.tag, changed(tree.value, random_, jsonable))
    return _instead(tree, random_, jsonable)


def _instead(value: Any, random_: random.Random, jsonable: bool) -> Any:
    dice = random_.random()
    if isinstance(value, bytes) and dice < 0.8:
        return torn(value, (value,), random_)
    if isinstance(value, bool | float | int) and dice < 0.4:
        return value + random_.choice(_NUMBERS)
    if isinstance(value, str) and value and dice < 0.4:
        at = random_.randrange(len(value))
        return value[:at] + random_.choice(("", "\0", "/", "..", "%s", value)) + value[at + 1 :]
    if not jsonable and dice > 0.9:
        return cbor2.CBORTag(random_.choice(_TAGS), value)
    found = random_.choice(_VALUES)
    return "b" if jsonable and isinstance(found, bytes) else found


def torn(data: bytes, others: Sequence[bytes], random_: random.Random) -> bytes:
    """Bytes with one to four changes; others : what is spliced in."""
    for _ in range(random_.choice((1, 1, 1, 2, 4))):
        at, kind = random_.randrange(len(data) + 1), random_.randrange(8)
        if kind == 0 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << random_.randrange(8)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + random_.randbytes(random_.randrange(1, _BLOCK)) + data[at + random_.randrange(_BLOCK) :]
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data = data[:at] + data[at + random_.randrange(len(data) + 1) :]
        elif kind == 4:
            other = random_.choice(others)
            data = data[:at] + other[random_.randrange(len(other) + 1) :]
        elif kind == 5:  # a length field
            size = random_.choice((1, 2, 4, 8))
            number = random_.choice((*_NUMBERS, len(data), len(data) - at)) % 256**size
            data = data[:at] + number.to_bytes(size, random_.choice(("big", "little"))) + data[at + size :]
        elif kind == 6 and at < len(data):
            data = (
                data[:at]
                + bytes([random_.choice(b'\x00\x01\x1f\x20\x5f\x7f\x80\x9f\xa0\xbf\xc0\xd8\xdf\xf4\xf6\xf9\xff {}[]"')])
                + data[at + 1 :]
            )
        elif kind == 7:
            piece = data[at : at + random_.randrange(1, 40)]
            data = data[:at] + piece * random_.choice((2, 3, 60)) + data[at:]
    return data


def shuffled(messages: Input, others: Sequence[Input], random_: random.Random) -> Input:
    """Messages with one of them, or a part, lost, repeated, flattened, joined to the next, torn, or of another series."""
    if not messages:
        return messages
    at = random_.randrange(len(messages))
    before, one, after = messages[:at], messages[at], messages[at + 1 :]
    kind = random_.randrange(8)
    if kind == 0 or not one:
        return before + after
    if kind == 1:
        return [*before, one, one, *after]
    if kind == 2:
        return [*before, *((part,) for part in one), *after]
    if kind == 3 and after:
        return [*before, one + after[0], *after[1:]]
    if kind == 4 and len(one) > 1:
        lost = random_.randrange(len(one))
        return [*before, one[:lost] + one[lost + 1 :], *after]
    if kind == 5:
        return before + random_.choice(others)[random_.randrange(2) :]
    which = random_.randrange(len(one))
    return [
        *before,
        (*one[:which], torn(one[which], [part for message in messages for part in message], random_), *one[which + 1 :]),
        *after,
    ]
