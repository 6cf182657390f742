"""The path benchmark's sender, a process of its own: encodes everything first, then sends as fast as the receiver takes it."""

from __future__ import annotations

import argparse
import datetime
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
    given = parser.parse_args()
    date = datetime.datetime.now(datetime.UTC)
    detector = Detector(shape=(given.size, given.size))
    messages = [encode_start(1, "bench", detector, given.count, np.dtype(np.uint16), {})]
    messages += [encode_image(1, "bench", i, counts, 0.0, date) for i, counts in enumerate(repeated_frames(given.size, given.count))]
    messages.append(encode_end(1, "bench"))
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.setsockopt(zmq.LINGER, 10_000)
        push.connect(given.address)
        for message in messages:
            push.send(message)


if __name__ == "__main__":
    main()
