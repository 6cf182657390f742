"""A twin -> an ophyd-async detector and motors: frames of a Bluesky plan into an HDF5 file, over DECTRIS stream V2, or both.

A plan that is paused or suspended in the middle of a point begins that point again, and the detector exposes again. ophyd-async by itself
then has a frame too many: the next read tells of two frames, which the RunEngine refuses, or skips one, of which Tiled then reads one too
few (seen with ophyd-async 0.21.3 and bluesky 1.15.1). Here what was exposed and not saved is taken back when the plan pauses, and the next
exposure has its number: frame i belongs to event i, whatever befell the plan. A receiver of stream V2 gets such a frame twice.
"""

from __future__ import annotations

import asyncio
import datetime
import time
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
from bluesky.protocols import Reading, StreamAsset
from bluesky.utils import NoReplayAllowed
from event_model import DataKey
from ophyd_async.core import (
    AsyncStatus,
    DetectorAcquireLogic,
    DetectorDataLogic,
    DetectorTriggerLogic,
    PathProvider,
    ReadableDataProvider,
    SignalR,
    StandardDetector,
    StreamableDataProvider,
    StreamResourceDataProvider,
    StreamResourceInfo,
    soft_signal_r_and_setter,
)
from ophyd_async.sim import SimMotor

from streamprior.errors import ConfigError
from streamprior.wire.dectris_v2 import encode_end, encode_image, encode_start
from streamprior_sim.emit import Sender, zmq_sender
from streamprior_sim.twin import Disturbance as Disturbance
from streamprior_sim.twin import Twin

DATASET = "/entry/data/data"
"""Where the frames are in the file."""

_MM = 1e-3


class TwinMotors(NamedTuple):
    """What moves the probe over the sample; both in millimetres. They move at once, or at their `velocity` where that is not 0."""

    x: SimMotor
    y: SimMotor


def twin_motors(twin: Twin) -> TwinMotors:
    """Motors named x and y, at the first position of the scenario's own scan; x moves along the columns of a frame.

    Raises ConfigError for a scenario without positions.
    """
    scan = twin.scan()
    if scan is None:
        raise ConfigError(f"scenario {twin.name}: has no positions; motors need one of ptychography, for example gold_balls")
    x_m, y_m = scan.position_m(0) or scan.true_position_m(0)
    return TwinMotors(SimMotor("x", initial_value=x_m / _MM, units="mm"), SimMotor("y", initial_value=y_m / _MM, units="mm"))


class TwinDetector(StandardDetector):
    """A detector for step scans (one frame a trigger) and fly scans, whose every frame the twin renders when it is exposed.

    Attributes
    ----------
    disturbance : what befalls the beam, or None; may be set at any time from any thread.
    frame : signal, number of the newest frame since the detector was staged, from 0; -1 before the first.

    Parameters
    ----------
    twin : frame i is its frame i, and a scan of more frames than it has fails with a ConfigError. An exposure lasts 1 / rate_hz where the
        plan does not say.
    path_provider : where to write HDF5 (SWMR, unsigned integers (N, rows, columns) at `DATASET`); None writes nothing, and an event then
        holds `frame`.
    wire : "tcp://HOST:PORT" of a PULL socket that gets every frame over DECTRIS stream V2, one series for each time that the detector is
        staged: it begins with the first frame and ends when the detector is unstaged. None sends nothing.
    motors : frames are of the sample where they stand; without them of the scenario's own positions.
    """

    def __init__(
        self,
        twin: Twin,
        path_provider: PathProvider | None,
        name: str = "twin",
        wire: str | None = None,
        motors: TwinMotors | None = None,
    ) -> None:
        self.disturbance: Disturbance | None = None
        self.frame, set_frame = soft_signal_r_and_setter(int, -1)
        self._exposures = _Exposures(_Camera(twin, wire), motors, lambda: self.disturbance, set_frame)
        self.add_detector_logics(_Trigger(self._exposures, 1 / twin.scenario.rate_hz), self._exposures)
        if path_provider is not None:
            self.add_detector_logics(_File(self._exposures, path_provider))
        else:
            self.add_detector_logics(_Counter(self._exposures, self.frame), _Unrecorded(self._exposures))
        super().__init__(name=name)

    @AsyncStatus.wrap
    async def trigger(self) -> None:
        """Expose one frame."""
        async with self._exposures.busy:
            await super().trigger()

    @AsyncStatus.wrap
    async def kickoff(self) -> None:
        """Begin to expose what was prepared, at its own pace."""
        self._exposures.flying = True
        await super().kickoff()

    @AsyncStatus.wrap
    async def complete(self) -> None:
        """Wait for the last of these frames; what an exposure failed with is raised."""
        await self._exposures.unless_failed(super().complete())

    async def pause(self) -> None:
        """Called by the RunEngine when a plan is paused or suspended: take back what was exposed and not saved.

        A flight comes to its end first, and is not begun again: what was told of it cannot be taken back, and the RunEngine no longer
        waits for one that goes on.
        """
        if self._exposures.flying:
            await self._exposures.landed()
            raise NoReplayAllowed
        await self._exposures.take_back()

    async def resume(self) -> None:
        """Called by the RunEngine when the plan goes on; it calls `pause` only of a device that has both."""


class _Camera:
    """Owns the file, the socket, and the one thread in which all of this is rendered, written, sent and closed."""

    def __init__(self, twin: Twin, wire: str | None) -> None:
        self._twin = twin
        self._wire = wire
        self._thread = ThreadPoolExecutor(1, "twin-detector")
        self._dataset: h5py.Dataset | None = None
        self._room = ExitStack()  # what is open
        self._sender: Sender | None = None
        self._series, self._series_name = 0, ""
        self._began = 0.0
        self._date = datetime.datetime.now(datetime.UTC)

    @property
    def shape(self) -> tuple[int, int]:
        return self._twin.scenario.detector.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self._twin.scenario.detector.dtype)

    async def run(self, work: Callable[..., None], *arguments: Any) -> None:
        """Call one of the methods below in the thread, while the event loop goes on."""
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    def open(self, path: str, make_folders: bool) -> None:
        if make_folders:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = self._room.enter_context(h5py.File(path, "w", libver="latest"))
        size = 0, *self.shape
        self._dataset = file.create_dataset(DATASET, size, self.dtype, maxshape=(None, *self.shape), chunks=(1, *self.shape))
        file.swmr_mode = True

    def expose(self, index: int, exposure_s: float, position_m: tuple[float, float] | None, disturbance: Disturbance | None) -> None:
        """Frame `index`, on disk and on the wire when this returns; one that was there before is replaced."""
        try:
            counts = self._twin.exposed(index, position_m, disturbance)
        except IndexError:
            raise ConfigError(
                f"the plan wants frame {index} of scenario {self._twin.name}, which has {len(self._twin)}; set its frames to the"
                " number of points of the plan"
            ) from None
        if self._dataset is not None:
            self._dataset.resize(max(index + 1, self._dataset.shape[0]), 0)
            self._dataset[index] = counts
            self._dataset.flush()
        if self._wire is not None:
            self._send(self._wire, index, counts, exposure_s)

    def close(self) -> None:
        """End the series, close the file; harmless where nothing is open."""
        try:
            if self._sender is not None:
                self._sender.send(encode_end(self._series, self._series_name))
        finally:
            self._sender = self._dataset = None
            self._room.close()

    def _send(self, wire: str, index: int, counts: npt.NDArray[Any], exposure_s: float) -> None:
        if self._sender is None:
            self._sender = self._room.enter_context(zmq_sender(wire))
            self._series, self._series_name = self._series + 1, f"{self._twin.name}-{uuid.uuid4().hex[:12]}"
            self._date, self._began = datetime.datetime.now(datetime.UTC), time.perf_counter()
            # How many there will be only the plan knows; 0 stands for that.
            self._sender.send(
                encode_start(self._series, self._series_name, self._twin.detector(), 0, counts.dtype, {"name": self._twin.name})
            )
        since_s = time.perf_counter() - self._began
        self._sender.send(encode_image(self._series, self._series_name, index, counts, since_s, self._date, exposure_s))


class _Exposures(DetectorAcquireLogic):
    """Owns the count of the frames that were exposed since the detector was staged.

    busy : held while a trigger lasts. keeper : says how many of the frames a run has saved.
    """

    def __init__(
        self, camera: _Camera, motors: TwinMotors | None, disturbance: Callable[[], Disturbance | None], tell: Callable[[int], None]
    ) -> None:
        self.camera, self._motors, self._disturbance, self._tell = camera, motors, disturbance, tell
        self.written, self._set_written = soft_signal_r_and_setter(int, 0)
        self.asked, self.exposure_s, self.period_s = 1, 0.0, 0.0
        self.flying = False
        self.busy = asyncio.Lock()
        self.keeper: _Documents | _Number | None = None
        self._count = 0
        self._flight: asyncio.Task[None] | None = None

    async def start_acquiring(self) -> None:
        """A trigger's exposure is over when this returns: what it fails with is then the trigger's failure, and not a time-out's."""
        if self.flying:
            self._flight = asyncio.create_task(self._expose())
        else:
            await self._expose()

    async def wait_for_idle(self) -> None:
        if self._flight is not None:
            await self._flight

    async def ensure_stopped(self) -> None:
        """At stage and unstage: the scan is over, the next one counts from 0."""
        flight, self._flight, self.flying = self._flight, None, False
        if flight is not None:
            flight.cancel()
            await asyncio.wait([flight])
        async with self.busy:
            await self.camera.run(self.camera.close)
            self.keeper = None
            self._tell_count(0)

    async def unless_failed(self, whole: AsyncStatus) -> None:
        """Wait for `whole`, or for the failure of the flight, which `whole` would not hear of."""
        if self._flight is not None:
            await asyncio.wait([whole.task, self._flight], return_when=asyncio.FIRST_EXCEPTION)
            if self._flight.done() and not self._flight.cancelled() and (failure := self._flight.exception()) is not None:
                whole.task.cancel()
                raise failure
        await whole

    async def take_back(self) -> None:
        async with self.busy:
            self._tell_count(self.keeper.saved() if self.keeper is not None else 0)

    async def landed(self) -> None:
        """What the flight failed with is told to whoever waits for its completion."""
        if self._flight is not None:
            await asyncio.wait([self._flight])

    async def _expose(self) -> None:
        due = time.monotonic()
        for _ in range(self.asked):
            due = max(due, time.monotonic() - self.period_s) + self.period_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            x_y = await self._position_m()
            await self.camera.run(self.camera.expose, self._count, self.exposure_s, x_y, self._disturbance())
            self._tell_count(self._count + 1)

    async def _position_m(self) -> tuple[float, float] | None:
        if self._motors is None:
            return None
        x, y = await asyncio.gather(*(motor.user_readback.get_value() for motor in self._motors))
        return x * _MM, y * _MM

    def _tell_count(self, count: int) -> None:
        self._count = count
        self._set_written(count)
        self._tell(count - 1)


class _Trigger(DetectorTriggerLogic):
    """What a plan asks for -> the exposures to come."""

    def __init__(self, exposures: _Exposures, exposure_s: float) -> None:
        self._exposures, self._exposure_s = exposures, exposure_s

    async def prepare_internal(self, num: int, livetime: float, deadtime: float) -> None:
        if num == 0:
            raise ConfigError("the twin does not expose until it is told to stop; give TriggerInfo a number_of_events")
        self._exposures.flying = False
        self._exposures.asked = num
        self._exposures.exposure_s = livetime or self._exposure_s
        self._exposures.period_s = self._exposures.exposure_s + deadtime


class _File(DetectorDataLogic):
    """A new file for each time that the detector is staged."""

    def __init__(self, exposures: _Exposures, path_provider: PathProvider) -> None:
        self._exposures, self._path_provider = exposures, path_provider

    async def prepare_unbounded(self, datakey_name: str) -> StreamableDataProvider:
        info, camera = self._path_provider(datakey_name), self._exposures.camera
        path = info.directory_path / f"{info.filename}.h5"
        await camera.run(camera.open, str(path), info.create_dir_depth != 0)
        self._exposures.keeper = _Documents(
            uri=f"{info.directory_uri}{info.filename}.h5",
            resources=[
                StreamResourceInfo(
                    data_key=datakey_name,
                    shape=camera.shape,
                    chunk_shape=(1, *camera.shape),
                    dtype_numpy=camera.dtype.str,
                    parameters={"dataset": DATASET},
                )
            ],
            mimetype="application/x-hdf5",
            collections_written_signal=self._exposures.written,
        )
        return self._exposures.keeper


class _Documents(StreamResourceDataProvider):
    """The file's frames as documents; knows which of them a run has taken."""

    _per_event = 1
    _last: dict[str, Any] | None = None

    async def make_datakeys(self, collections_per_event: int) -> dict[str, DataKey]:
        """Without a leading axis of 1, with which Tiled's live reads fail."""
        keys = await super().make_datakeys(collections_per_event)
        if collections_per_event == 1:
            for key in keys.values():
                key["shape"] = key["shape"][1:]
        return keys

    async def make_stream_docs(self, collections_written: int, collections_per_event: int) -> AsyncIterator[StreamAsset]:
        self._per_event = collections_per_event
        async for name, document in super().make_stream_docs(collections_written, collections_per_event):
            if name == "stream_datum":
                self._last = document
            yield name, document

    def saved(self) -> int:
        """Frames that a run knows of; the next documents begin with the one after them."""
        # The RunEngine writes the descriptor's uid into a stream_datum when it saves the event, and not before.
        if self._last is not None and not self._last["descriptor"]:
            self.last_emitted, self._last = self._last["indices"]["start"], None
        return int(self.last_emitted * self._per_event)


class _Counter(DetectorDataLogic):
    """Where no file is written an event holds the frame's number."""

    datakey_suffix = "-frame"

    def __init__(self, exposures: _Exposures, frame: SignalR[int]) -> None:
        self._exposures, self._frame = exposures, frame

    async def prepare_single(self, datakey_name: str) -> ReadableDataProvider:
        self._exposures.keeper = _Number(self._frame)
        return self._exposures.keeper

    def get_hinted_fields(self, datakey_name: str) -> list[str]:
        return [datakey_name]


class _Number(ReadableDataProvider):
    """The frame's number as a reading; knows which of them a run has taken."""

    def __init__(self, frame: SignalR[int]) -> None:
        self._frame = frame
        self._last: tuple[int, _Told] | None = None

    async def make_datakeys(self) -> dict[str, DataKey]:
        return await self._frame.describe()

    async def make_readings(self) -> dict[str, Reading[int]]:
        ((name, reading),) = (await self._frame.read(cached=False)).items()
        told = _Told(reading)
        self._last = reading["value"], told
        return {name: told}

    def saved(self) -> int:
        """Frames that a run knows of."""
        if self._last is None:
            return 0
        number, told = self._last
        return number + told.taken


class _Told(dict[str, Any]):
    """A reading that notices when it goes into an event: the RunEngine looks into it only then."""

    taken = False

    def __getitem__(self, key: str) -> Any:
        self.taken = True
        return super().__getitem__(key)


class _Unrecorded(DetectorDataLogic):
    """Counts the frames of a fly scan that goes into no file."""

    def __init__(self, exposures: _Exposures) -> None:
        self._exposures = exposures

    async def prepare_unbounded(self, datakey_name: str) -> StreamableDataProvider:
        return _Silent(self._exposures.written)


class _Silent(StreamableDataProvider):
    """Frames that no document tells of."""

    def __init__(self, written: SignalR[int]) -> None:
        self.collections_written_signal = written

    async def make_datakeys(self, collections_per_event: int) -> dict[str, DataKey]:
        return {}
