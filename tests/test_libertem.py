"""Stream V1 against LiberTEM's: their mock detector and replayer -> our socket and decoder, our encoder -> their receiver."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from streamprior.config import SourceSettings
from streamprior.records import Detector, Frame, SeriesEnd, SeriesStart
from streamprior.sources.zmq import ZmqPull
from streamprior.wire.dectris_v1 import Encoding, StreamV1Decoder, encode_end, encode_image, encode_start, framed

libertem_dectris = pytest.importorskip("libertem_dectris", reason="libertem-dectris is not installed (no wheel for this machine?)")

SERIES = 34


def counts_of(index: int, shape: tuple[int, int], dtype: str) -> np.ndarray:
    return np.random.default_rng(index).poisson(2, shape).astype(dtype)


def received(address: str, send: Callable[[], None]) -> list[SeriesStart | Frame | SeriesEnd]:
    """What comes over a connected socket up to the end of the series, while `send` runs in a thread."""
    source = ZmqPull(SourceSettings(kind="dectris_v1", address=address, attach="connect"))
    decoder = StreamV1Decoder("eiger")
    source.open()
    sender = threading.Thread(target=send)
    sender.start()
    found: list[SeriesStart | Frame | SeriesEnd] = []
    try:
        while not found or not isinstance(found[-1], SeriesEnd):
            message = source.receive(30.0)
            assert message is not None, f"nothing came after {len(found)} records"
            found += decoder.decode(message, 0.0)
    finally:
        sender.join()
        source.close()
    assert list(decoder.due(math.inf)) == []
    return found


def sent_by(simulator: libertem_dectris.DectrisSim) -> list[SeriesStart | Frame | SeriesEnd]:
    def send() -> None:
        simulator.send_headers()
        simulator.send_frames()
        simulator.send_footer()

    return received(simulator.get_uri(), send)


def test_the_mock_detector_is_understood() -> None:
    start, *frames, end = sent_by(libertem_dectris.DectrisSim.new_mocked("tcp://127.0.0.1", 100, random_port=True))
    assert isinstance(start, SeriesStart)
    assert (start.series, start.expected, start.detector.shape, start.detector.saturation) == ("34", 100, (512, 512), 3825.0)
    assert start.metadata["detector_description"] == "Dectris QUADRO Si 250K"
    assert [frame.index for frame in frames] == list(range(100))
    for frame in frames:
        assert (frame.counts.dtype, frame.counts.shape) == (np.uint16, (512, 512))
        assert (frame.counts == frame.index).all(), "the mock's pixels are the number of their frame"
    assert end == SeriesEnd("eiger", "34")


@pytest.mark.parametrize("dtype", ["u1", "u2", "u4"])
@pytest.mark.parametrize("encoding", ["bslz4", "lz4"])
def test_a_log_of_ours_that_their_replayer_sends_comes_back_as_it_was(encoding: Encoding, dtype: str, tmp_path: Path) -> None:
    """Their log is each part behind its length (8 bytes, little endian)."""
    shape = (48, 80)
    messages = [
        encode_start(SERIES, Detector(shape), 20, np.dtype(dtype), {}, "basic"),
        *(encode_image(SERIES, index, counts_of(index, shape, dtype), index * 0.01, 0.01, None, encoding) for index in range(20)),
        encode_end(SERIES),
    ]
    log = tmp_path / "zmqlog"
    log.write_bytes(b"".join(struct.pack("<q", len(part)) + part for message in messages for part in message))
    start, *frames, _ = sent_by(libertem_dectris.DectrisSim("tcp://127.0.0.1", str(log), random_port=True))
    assert isinstance(start, SeriesStart)
    assert (start.expected, start.detector.shape) == (20, shape)
    assert [frame.index for frame in frames] == list(range(20))
    for frame in frames:
        np.testing.assert_array_equal(frame.counts, counts_of(frame.index, shape, dtype), strict=True)


@pytest.fixture
def push() -> Iterator[tuple[zmq.Socket[bytes], str]]:
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDTIMEO, 30_000)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    yield socket, f"tcp://127.0.0.1:{port}"
    socket.close()
    context.term()


@pytest.mark.parametrize("framing", ["multipart", "split_header", "parts"])
@pytest.mark.parametrize(("encoding", "dtype"), [("bslz4", "u2"), ("lz4", "u2"), ("bslz4", "u4"), ("bslz4", "u1")])
def test_their_receiver_gets_a_whole_series_of_ours(
    encoding: Encoding, dtype: str, framing: str, push: tuple[zmq.Socket[bytes], str], tmp_path: Path
) -> None:
    """It takes a header of detail "basic" and images of four parts."""
    socket, address = push
    shape, frames = (40, 72), 50
    connection = libertem_dectris.DectrisConnection(
        uri=address,
        frame_stack_size=8,
        handle_path=str(tmp_path / "shm"),
        num_slots=100,
        bytes_per_frame=2 * 4 * math.prod(shape),
        huge=False,
    )
    client = None
    try:
        connection.start_passive()
        messages = [
            encode_start(SERIES, Detector(shape), frames, np.dtype(dtype), {}, "basic"),
            *(encode_image(SERIES, index, counts_of(index, shape, dtype), index * 0.01, 0.01, None, encoding) for index in range(frames)),
            encode_end(SERIES),
        ]
        for message in framed(messages, framing):
            socket.send_multipart(message)
        armed = connection.wait_for_arm(timeout=30.0)
        assert armed is not None, "the receiver did not hear the header"
        config, series = armed
        assert (series, config.get_num_frames()) == (SERIES, frames)
        client = libertem_dectris.CamClient(connection.get_socket_path())
        index = 0
        while (stack := connection.get_next_stack(max_size=16)) is not None:
            assert tuple(reversed(stack.get_shape())) == shape
            pixels = np.zeros((len(stack), *shape), np.dtype(dtype))
            client.decode_range_into_buffer(stack, pixels, 0, len(stack))
            client.done(stack)
            for counts in pixels:
                np.testing.assert_array_equal(counts, counts_of(index, shape, dtype))
                index += 1
        assert index == frames
    finally:
        connection.close()
        if client is not None:
            client.close()
