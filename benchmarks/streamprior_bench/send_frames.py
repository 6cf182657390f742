"""The path benchmark's sender, a process of its own: encodes everything first and sends as fast as the receiver takes it, or by a clock."""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zmq

from streamprior.records import Detector
from streamprior.wire.dectris_v2 import encode_end, encode_image, encode_start
from streamprior_bench.classify import synthetic_frames


def repeated_frames(size: int, count: int) -> list[np.ndarray[Any, Any]]:
    """A few different frames over and over, uint16: what they show does not matter to the cost."""
    different = synthetic_frames(size).astype(np.uint16)
    return [different[i % len(different)] for i in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("size", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("--rate-hz", type=float, help="frames a second; left out: as fast as they are taken")
    parser.add_argument("--then", type=float, nargs=2, metavar=("AFTER", "RATE_HZ"), help="another rate after so many frames")
    parser.add_argument("--long", action="store_true", help="encode each frame when it is due: a long run fits no memory")
    parser.add_argument("--until", type=Path, help="stop once this file is there, and print how many frames were sent")
    given = parser.parse_args()
    detector = Detector(shape=(given.size, given.size))
    start = encode_start(1, "bench", detector, given.count if given.until is None else 0, np.dtype(np.uint16), {})
    frames = repeated_frames(given.size, given.count)
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 10_000)
        push.connect(given.address)
        if given.rate_hz is None:
            images: Iterable[bytes] = _at_once(frames)
        elif given.long:
            images = _for_long(frames, given.rate_hz)
        else:
            images = _by_clock(frames, _due(given.count, given.rate_hz, given.then))
        push.send(start)
        sent = 0
        for image in images:
            if given.until is not None and given.until.exists():
                break
            push.send(image)
            sent += 1
        push.send(encode_end(1, "bench"))
        sys.stdout.write(f"{sent}\n" if given.until is not None else "")
        sys.stdout.flush()
    # Giving back every frame to the allocator takes a second of one of the cores that are measured.
    os._exit(0)


def _at_once(frames: list[np.ndarray[Any, Any]]) -> list[bytes]:
    return _encoded(frames, datetime.datetime.now(datetime.UTC), [0.0] * len(frames))


def _due(count: int, rate_hz: float, then: tuple[float, float] | None) -> list[float]:
    """Seconds after the first frame at which each is due."""
    after, later_hz = then or (count, rate_hz)
    return [min(i, after) / rate_hz + max(0, i - after) / later_hz for i in range(count)]


def _by_clock(frames: list[np.ndarray[Any, Any]], due_s: list[float]) -> Iterator[bytes]:
    """Each when its time has come, stamped with the moment it was due: a sender that is late by itself does not shorten a latency.

    Encoded before the first is due: a detector does not compress on the receiver's cores.
    """
    begun = time.time() + _ENCODE_S * len(frames)
    images = _encoded(frames, datetime.datetime.fromtimestamp(begun, datetime.UTC), due_s)
    for image, due in zip(images, due_s, strict=True):
        time.sleep(max(0.0, begun + due - time.time()))
        yield image


def _for_long(frames: list[np.ndarray[Any, Any]], rate_hz: float) -> Iterator[bytes]:
    begun = time.time()
    date = datetime.datetime.fromtimestamp(begun, datetime.UTC)
    for i, counts in enumerate(frames):
        yield encode_image(1, "bench", i, counts, i / rate_hz, date)
        time.sleep(max(0.0, begun + (i + 1) / rate_hz - time.time()))


_ENCODE_S = 400e-6
"""More than encoding a frame of 128 x 128 takes."""


def _encoded(frames: list[np.ndarray[Any, Any]], date: datetime.datetime, due_s: list[float]) -> list[bytes]:
    return [encode_image(1, "bench", i, counts, due, date) for i, (counts, due) in enumerate(zip(frames, due_s, strict=True))]


if __name__ == "__main__":
    main()
