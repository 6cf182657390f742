"""Bytes -> the certainty that they are one CBOR item of bounded size, before a parser makes objects of them.

A parser trusts its input with memory and time: 16 MB of empty maps become 1.2 GB of objects, a ratio of two long integers is reduced in
quadratic time, a reference can stand for 2^40 items or for itself, and maps whose integer keys collide take hours. So the heads of all
items are walked first; the walk allocates nothing and stops at the first thing that no detector sends. What it lets through costs memory
and time in proportion to its length, with any version of the parser.
"""

from __future__ import annotations

import struct

from streamprior.errors import WireError

MAX_DEPTH = 40
"""Containers and tags within one another; a start message has 7."""

MAX_ITEMS = 200_000
"""Numbers, texts and containers of one message; 40,000 positions in user_data fit. 32 bytes of long text count as one."""

TAGS = frozenset((0, 1, 2, 3, 40, 55799, 56500, *range(64, 88)))
"""Dates, long integers, arrays, typed arrays (RFC 8746), self-description and compression: what stream V2 is made of."""

_BYTES, _TEXT, _ARRAY, _MAP, _TAG, _BREAK, _RESERVED = 2, 3, 4, 5, 6, 7, 8
_ENDLESS = 31
_STOP = 0xFF


def _reads(head: int) -> tuple[int, int]:
    """(bytes that a head takes, with a short string's own; what it begins: 0 where nothing more is to be known)."""
    major, low = head >> 5, head & 31
    following = 1 << (low - 24) if 24 <= low < 28 else 0
    if 28 <= low < _ENDLESS or (low == _ENDLESS and major in (0, 1, _TAG)):
        return 1, _RESERVED
    if major in (_BYTES, _TEXT) and low < 24:
        return 1 + low, 0
    if major < _BYTES or (major == 7 and low != _ENDLESS):
        return 1 + following, 0
    return 1 + following, major


_LONG_BYTES = 0x58
"""Of the four heads of a byte string whose length stands in 1, 2, 4 or 8 bytes behind it, the first."""

_MOST_HEADS = 200
"""Of a message that is outlined; an image has 40 to 60, a start message 100. It bounds what ever different messages cost."""

_Part = tuple[struct.Struct, tuple[bytes, ...], bool]
Outline = tuple[_Part, ...]
"""A checked message between its long byte strings: where heads and lengths stand, what they are, whether a long byte string follows. All
that `check` looks at is in it; texts, numbers and bytes are not."""

_NO_KEY = [head >> 5 != _TEXT and head != _STOP for head in range(256)]
_LENGTH, _KIND = zip(*(_reads(head) for head in range(256)), strict=True)


def check(message: bytes) -> None:
    """Raises WireError("not_cbor") unless the message is exactly one CBOR item within the bounds, its map keys text, its tags of `TAGS`."""
    at, left, keys, endless, budget = 0, 1, False, False, MAX_ITEMS
    outer: list[tuple[int, bool, bool]] = []
    try:
        while left or outer:
            if not left:
                if endless:
                    _within(budget, outer)
                left, keys, endless = outer.pop()
            while left:
                head = message[at]
                if keys and not left & 1 and _NO_KEY[head]:
                    raise WireError("not_cbor", f"a map key at byte {at} that is no text")
                at += _LENGTH[head]
                left -= 1
                if endless:
                    budget -= 1
                kind = _KIND[head]
                if not kind:
                    continue
                if kind == _BREAK and endless and not (keys and not left & 1):
                    left = 0
                    continue
                low = head & 31
                count = low if low < 24 else message[at - 1] if low == 24 else int.from_bytes(message[at - _LENGTH[head] + 1 : at])
                if kind in (_BYTES, _TEXT):
                    at, budget = _string(message, at, kind, low == _ENDLESS, count, budget)
                    continue
                if kind > _TAG or (kind == _TAG and count not in TAGS):
                    raise WireError("not_cbor", f"0x{head:02x} ({count}) before byte {at}: nothing that stream V2 is made of")
                outer.append((left, keys, endless))
                keys, endless = kind == _MAP, low == _ENDLESS
                # Endless: more than the budget holds, and even, so that keys stay told from values.
                left = budget // 2 * 2 + 2 if endless else 1 if kind == _TAG else count << keys
                budget -= 0 if endless else left
                _within(budget, outer)
        _within(budget, outer)
    except IndexError:
        at = len(message) + 1
    if at != len(message):
        raise WireError("not_cbor", f"{len(message)} bytes that {'end too early' if at > len(message) else 'go on after their item'}")


def _within(budget: int, outer: list[tuple[int, bool, bool]]) -> None:
    if budget < 0 or len(outer) > MAX_DEPTH:
        raise WireError("not_cbor", f"more than {MAX_ITEMS} items, or {MAX_DEPTH} within one another")


def _string(message: bytes, at: int, kind: int, endless: bool, count: int, budget: int) -> tuple[int, int]:
    """Behind a string of `count` bytes, or behind the chunks of an endless one; and what it left of the budget."""
    if not endless:
        return at + count, budget - (count >> 5 if kind == _TEXT else 0)
    while message[at] != _STOP and budget >= 0:
        head = message[at]
        low = head & 31
        if head >> 5 != kind or low >= 28:
            raise WireError("not_cbor", f"byte {at} is 0x{head:02x}: no part of the string that it stands in")
        at += _LENGTH[head]
        if low >= 24:
            count = int.from_bytes(message[at - _LENGTH[head] + 1 : at])
            at, budget = _string(message, at, kind, False, count, budget)
        budget -= 1
    return at + 1, budget


def outlined(message: bytes) -> Outline | None:
    """The outline of a message that passed `check`; None where it has too many strings and numbers to be worth it.

    In a checked message nesting need not be followed: its items stand one behind another, and each head says where the next one is.
    """
    parts: list[_Part] = []
    at = part = heads = 0
    layout = ""
    for _ in range(_MOST_HEADS):
        if at == len(message):
            return (*parts, _part(message, part, f"{layout}{at - heads}s", False))
        major, low = message[at] >> 5, message[at] & 31
        following = 1 << (low - 24) if 24 <= low < 28 else 0
        begin = at + 1 + following
        if major in (_BYTES, _TEXT) and low != _ENDLESS:
            count = int.from_bytes(message[at + 1 : begin]) if following else low
            if major == _BYTES and following:
                parts.append(_part(message, part, f"{layout}{at - heads}s", True))
                layout, part = "", begin + count
            else:
                layout += f"{begin - heads}s{count}x"
            at = heads = begin + count
        elif following and major not in (_ARRAY, _MAP, _TAG):
            layout += f"{at + 1 - heads}s{following}x"
            at = heads = begin
        else:
            at = begin
    return None


def follows(message: bytes, outline: Outline) -> bool:
    """Whether a message has the same heads at the same places as the outlined one, but for the lengths of long byte strings.

    It passes `check` then, because the one that was outlined did, and takes a tenth of the time. The images of a series follow the first of
    them, until a number grows by a byte. A message that does not follow is no worse: it has to be walked.
    """
    at = 0
    for heads, expected, bytes_follow in outline:
        end = at + heads.size
        if end > len(message) or heads.unpack_from(message, at) != expected:
            return False
        if not bytes_follow:
            return end == len(message)
        width = message[end] - _LONG_BYTES if end < len(message) else -1
        if not 0 <= width < 4:
            return False
        at = end + 1 + (1 << width)
        at += int.from_bytes(message[end + 1 : at])
    return False


def _part(message: bytes, at: int, layout: str, bytes_follow: bool) -> _Part:
    heads = struct.Struct(layout)
    return heads, heads.unpack_from(message, at), bytes_follow
