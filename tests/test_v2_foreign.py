"""Stream V2 beside code that is not ours: the twin read by cbor2 and dectris-compression alone, the daemon's path fed with messages
made of cbor2 and the HDF5 filters alone. Nothing of `streamprior.wire` stands on the other side."""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cbor2
import h5py
import hdf5plugin
import numpy as np
import pytest
import zmq
from streamprior_sim.emit import emit, zmq_sender
from streamprior_sim.scenario import load_scenario
from streamprior_sim.twin import build
from streamprior_sim.wires import Wire as TwinWire

from streamprior.config import PositionSettings, SourceSettings
from streamprior.crew import ThreadCrew
from streamprior.join import Joiner
from streamprior.ledger import Ledger
from streamprior.metrics import Meters
from streamprior.outbox import Outbox
from streamprior.pipeline import Pipeline, Wire
from streamprior.runs import Runs
from streamprior.seams import Parts
from streamprior.sources.zmq import ZmqPull
from streamprior.wire.dectris_v2 import StreamV2Decoder, encode_image
from tests.builders import NAMES, diffraction, make_recipe, small_prior
from tests.test_path import Kept

DATE = datetime.datetime(2026, 3, 1, 12, 0, 0, tzinfo=datetime.UTC)
TYPED = {64: np.uint8, 69: np.uint16, 70: np.uint32, 85: np.float32}
"""RFC 8746."""


@pytest.fixture(scope="session")
def unpack() -> Callable[..., bytes]:
    module = pytest.importorskip("dectris.compression", reason="dectris-compression is built from source and needs a compiler")
    return module.decompress


def pixels(channel: Any, unpack: Callable[..., bytes]) -> np.ndarray:
    """Tag 40 [shape, typed array] as an independent reader takes it apart."""
    assert channel.tag == 40
    shape, typed = channel.value
    dtype = np.dtype(TYPED[typed.tag])
    blob = typed.value
    if not isinstance(blob, bytes):
        assert blob.tag == 56500
        algorithm, size, packed = blob.value
        blob = unpack(packed, algorithm, elem_size=size) if algorithm == "bslz4" else unpack(packed, algorithm)
    return np.frombuffer(blob, dtype.newbyteorder("<")).reshape(shape)


@pytest.mark.parametrize("encoding", ["bslz4", "lz4", "none"])
def test_the_twins_series_decodes_with_an_independent_decoder(encoding: Any, unpack: Callable[..., bytes]) -> None:
    one = build(load_scenario("bragg", None))
    with zmq.Context() as context, context.socket(zmq.PULL) as pull:
        port = pull.bind_to_random_port("tcp://127.0.0.1")
        pull.setsockopt(zmq.RCVTIMEO, 30_000)

        def send() -> None:
            with zmq_sender(f"tcp://127.0.0.1:{port}") as sender:
                emit(one, sender, None, slice(0, 12), wire=TwinWire(encoding=encoding))

        thread = threading.Thread(target=send)
        thread.start()
        raw = [pull.recv() for _ in range(14)]
        thread.join()
    assert all(message[:3] == b"\xd9\xd9\xf7" for message in raw)
    start, *images, end = (cbor2.loads(message) for message in raw)
    assert [item["type"] for item in (start, *images, end)] == ["start"] + 12 * ["image"] + ["end"]
    assert {item["series_unique_id"] for item in (start, *images, end)} == {start["series_unique_id"]}
    about, (rows, columns) = one.detector(), one.frame(0).shape
    assert (start["number_of_images"], start["image_size_y"], start["image_size_x"]) == (12, rows, columns)
    assert start["image_dtype"] == one.frame(0).dtype.name
    (channel,) = start["channels"]
    if about.mask is not None:
        np.testing.assert_array_equal(pixels(start["pixel_mask"][channel], unpack) != 0, about.mask)
    for index, item in enumerate(images):
        assert item["image_id"] == index
        assert isinstance(item["data"][channel].value[1].value, bytes) == (encoding == "none")
        assert item["series_date"].tzinfo is not None
        assert all(clock > 0 for _, clock in (item["start_time"], item["stop_time"], item["real_time"]))
        np.testing.assert_array_equal(pixels(item["data"][channel], unpack), one.frame(index))


@pytest.mark.parametrize("compression", ["bslz4", "lz4", None])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("shape", [(128, 128), (67, 129), (3, 5)])
def test_every_encoding_of_ours_is_read_by_others(
    compression: str | None, dtype: type, shape: tuple[int, int], unpack: Callable[..., bytes]
) -> None:
    counts = np.random.default_rng(0).poisson(3, shape).astype(dtype)
    item = cbor2.loads(encode_image(1, "S1", 0, counts, 0.0, DATE, compression=compression))
    np.testing.assert_array_equal(pixels(item["data"]["threshold_1"], unpack), counts)


def test_recorded_pixels_are_those_of_an_independent_decoder(data_folder: Path, unpack: Callable[..., bytes]) -> None:
    read = 0
    for file in sorted((data_folder / "wire" / "dectris_v2").rglob("*.cbor")):
        item = cbor2.loads(file.read_bytes())
        for name in item.get("data", {}):
            if name == "difference":  # it wraps around zero: no photons
                continue
            frame = StreamV2Decoder("eiger", name).decode(file.read_bytes(), 0.0)[0]
            np.testing.assert_array_equal(frame.counts, pixels(item["data"][name], unpack))  # type: ignore[union-attr]
            read += 1
    assert read == 14


def packed(counts: np.ndarray, folder: Path, algorithm: str) -> Any:
    """Pixels as the HDF5 filters compress them: the same container, written by others."""
    if algorithm == "none":
        return counts.tobytes()
    plugin = hdf5plugin.Bitshuffle(cname="lz4") if algorithm == "bslz4" else hdf5plugin.LZ4()
    with h5py.File(folder / "packed.h5", "w") as file:
        stored = file.create_dataset("counts", data=counts, chunks=counts.shape, compression=plugin)
        _, blob = stored.id.read_direct_chunk((0, 0))
    return cbor2.CBORTag(56500, [algorithm, counts.itemsize if algorithm == "bslz4" else 0, bytes(blob)])


def series_of(frames: np.ndarray, folder: Path, algorithm: str, wrapped: bool) -> list[bytes]:
    """A start message, images of two channels, an end message: plain dictionaries through cbor2; wrapped : in tag 55799."""
    ids = {"series_id": 3, "series_unique_id": "01FOREIGN"}
    tag = next(tag for tag, dtype in TYPED.items() if frames.dtype == dtype)

    def channel(counts: np.ndarray) -> Any:
        return cbor2.CBORTag(40, [list(counts.shape), cbor2.CBORTag(tag, packed(counts, folder, algorithm))])

    rows, columns = frames.shape[1:]
    items: list[dict[str, Any]] = [
        {"type": "start", **ids, "number_of_images": len(frames), "image_size_x": columns, "image_size_y": rows, "channels": ["a", "b"]}
    ]
    for index, counts in enumerate(frames):
        times = {"series_date": DATE, "start_time": [index, 100], "stop_time": [index + 1, 100], "real_time": [1, 100]}
        data = {"threshold_2": channel(counts[::-1]), "threshold_1": channel(counts)}
        items.append({"type": "image", **ids, "image_id": index, **times, "user_data": None, "data": data})
    items.append({"type": "end", **ids})
    return [cbor2.dumps(cbor2.CBORTag(55799, item) if wrapped else item) for item in items]


class UntilAll(ZmqPull):
    """The daemon's own socket, over after so many messages: a test must end."""

    def __init__(self, messages: int) -> None:
        super().__init__(SourceSettings(address="tcp://127.0.0.1:*"))
        self._left = messages

    def receive(self, timeout_s: float) -> bytes | Parts | None:
        message = super().receive(timeout_s)
        self._left -= message is not None
        self.exhausted = not self._left
        return message


@pytest.mark.parametrize(("algorithm", "wrapped"), [("bslz4", True), ("lz4", True), ("none", True), ("bslz4", False)])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_a_foreign_series_goes_through_the_daemons_path(tmp_path: Path, algorithm: str, wrapped: bool, dtype: type) -> None:
    frames = diffraction(count=8).astype(dtype)
    messages = series_of(frames, tmp_path, algorithm, wrapped)
    prior, archive = small_prior(), Kept()
    recipe, ledger, source = make_recipe(prior), Ledger(["archive"]), UntilAll(len(messages))
    meters = Meters("detector", recipe.stage_names, ["archive"], NAMES, recipe.signals)
    refused: list[str] = []
    path = Pipeline(
        Wire(source, StreamV2Decoder("detector")),
        Joiner(PositionSettings(), separate=False),
        Runs(ledger.distinct, late_s=0.1, idle_s=60),
        ThreadCrew(recipe.stages, prior, 1, 4, 1.0, 2**20, meters.stage),
        recipe.watches(),
        [Outbox(archive, 2**20, ledger, meters)],
        ledger,
        meters,
        2**20,
        admit=lambda counts: None,
        keep=lambda message, error: refused.append(error.reason),
    )
    source.open()
    try:
        path.start()
        with zmq_sender(source.address) as sender:
            for message in messages:
                sender.send(message)
        assert path.join(60)
    finally:
        source.close()
    assert path.failure is None
    assert refused == []
    assert [result.index for result in archive.results] == list(range(8))
    for result, counts in zip(archive.results, frames, strict=True):
        np.testing.assert_array_equal(result.counts, counts)
        assert result.detector_time == pytest.approx(DATE.timestamp() + result.index / 100)
