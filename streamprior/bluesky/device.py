"""The daemon's live numbers -> an ophyd-async device, for plans to record and for suspenders to heed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import structlog
from ophyd_async.core import (
    DEFAULT_TIMEOUT,
    AsyncStatus,
    DeviceConnector,
    DeviceMap,
    NotConnectedError,
    SignalR,
    StandardReadable,
    StandardReadableFormat,
    soft_signal_r_and_setter,
)

from streamprior.bluesky.numbers import NAN, Asker, NoAnswer, Numbers

log = structlog.get_logger(__name__)

_HASTE_S = 0.02
"""Between two questions while a plan waits for the answer."""


class StreampriorDevice(StandardReadable):  # type: ignore[misc] # mypy does not follow ophyd-async
    """A running daemon, as a plan sees it.

    Its signals follow the daemon from `connect` until `disconnect` or the end of the process. They are of the newest frame that has been
    through the path; `run` and `frame` say which. A daemon that goes away leaves them as they are and `up` False; it is found again.

    Parameters
    ----------
    url : the daemon's HTTP address, as its log names it.
    name : first part of every data key.
    period_s : seconds between two looks at the daemon.
    wait_frames : what `trigger` waits for. None: it takes the numbers of that moment. 0: for the frames that the daemon
        has read already. n: for n frames more than at the trigger before (or at `stage`), and for all that were read with them; where the
        detector is triggered in the same step of a scan and gives n frames a point, the numbers in an event are then those of its own
        frames. Frames inside documents cannot be waited for: the event that holds them is not there until this device has been read. Nor
        can frames whose positions the daemon takes from this plan's events (positions.address): they wait for the event themselves.
    wait_s : how long at most; then the event gets the numbers that there are, and `caught_up` False. A plan is never stopped for it.
    token : that a daemon beyond loopback asks for; None: $STREAMPRIOR_HTTP_TOKEN, where that is set.

    Attributes
    ----------
    chi2, prior_distance : as in the archive. mask_iou_mean, mask_iou : intersection over union with the prior's reference mask, mean and by
        class (`device.mask_iou["core"]`). drift : score by signal, standard deviations of the prior's baseline. NaN where there is none.
    alarm : whether a drift alarm stands. alarms : the signals, separated by commas.
    run, frame : what they are of; "" and -1 before the first. frames_behind : received and not through yet.
    up : whether the daemon answers. caught_up : whether the last trigger got what it waited for.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:9870",
        name: str = "streamprior",
        period_s: float = 0.2,
        wait_frames: int | None = None,
        wait_s: float = 5.0,
        token: str | None = None,
    ) -> None:
        self._token = token
        self._asker = Asker(url, token=token)
        self._period_s, self._wait_frames, self._wait_s = period_s, wait_frames, wait_s
        self._setters: dict[str, Callable[[Any], None]] = {}
        self._shown: dict[str, Any] = {}
        self._asking, self._showing = asyncio.Lock(), asyncio.Lock()
        self._live = False  # connected to a daemon: not a mock, not disconnected
        self._followers: list[Callable[[], None]] = []
        self._received = 0  # frames that the daemon had at the trigger before
        self._following: asyncio.Task[None] | None = None
        self.numbers: Numbers | None = None
        """The newest answer; None before the first."""
        self.answers = False
        """Whether the daemon answered when it was last asked; also for whoever is not in a plan."""
        self.chi2 = self._signal("chi2", float, NAN, precision=4)
        self.mask_iou_mean = self._signal("mask_iou_mean", float, NAN, precision=3)
        self.prior_distance = self._signal("prior_distance", float, NAN, precision=4)
        self.alarm = self._signal("alarm", bool, False)
        self.alarms = self._signal("alarms", str, "")
        self.run = self._signal("run", str, "")
        self.frame = self._signal("frame", int, -1)
        self.frames_behind = self._signal("frames_behind", int, 0, units="frames")
        self.up = self._signal("up", bool, False)
        self.caught_up = self._signal("caught_up", bool, False)
        self.url = self._signal("url", str, self._asker.url)
        self.version = self._signal("version", str, "")
        # add_children_as_readables would put them in another order in each process.
        self.add_readables([self.chi2, self.mask_iou_mean], StandardReadableFormat.HINTED_SIGNAL)
        self.add_readables(
            [self.prior_distance, self.alarm, self.alarms, self.run, self.frame, self.frames_behind, self.up, self.caught_up]
        )
        self.add_readables([self.url, self.version], StandardReadableFormat.CONFIG_SIGNAL)
        self.mask_iou: DeviceMap[SignalR[float]] = DeviceMap()
        self.drift: DeviceMap[SignalR[float]] = DeviceMap()
        super().__init__(name=name, connector=_Connector())

    @property
    def address(self) -> str:
        """Of the daemon; the signal `url` tells it to plans."""
        return self._asker.url

    def follow(self, look: Callable[[], None]) -> None:
        """Call `look` after every question to the daemon, answered or not, in the event loop that the device was connected in."""
        self._followers.append(look)

    def unfollow(self, look: Callable[[], None]) -> None:
        if look in self._followers:
            self._followers.remove(look)

    @AsyncStatus.wrap  # type: ignore[untyped-decorator]
    async def stage(self) -> None:
        await super().stage()
        if self._live:
            await self._ask()
        self._received = self.numbers.received if self.numbers is not None else 0

    @AsyncStatus.wrap  # type: ignore[untyped-decorator]
    async def trigger(self) -> None:
        """Ask the daemon now, and wait for what `wait_frames` says. A mock, which has no daemon, is done at once."""
        if not self._live:
            return
        deadline = time.monotonic() + self._wait_s
        least = self._received + (self._wait_frames or 0)
        while not (came := await self._ask() and self._has(least)) and self._wait_frames is not None and time.monotonic() < deadline:
            await asyncio.sleep(min(_HASTE_S, self._period_s))
        if self.numbers is not None:
            self._received = self.numbers.received
        self._set("caught_up", came)
        if not came and self._wait_frames is not None:
            log.warning("the daemon has not caught up", device=self.name, waited_s=self._wait_s, up=self.answers)

    async def read(self) -> dict[str, Any]:
        # An answer of the daemon that comes while the signals are read one by one would make an event of two frames' numbers.
        async with self._showing:
            readings: dict[str, Any] = await super().read()
            return readings

    async def disconnect(self) -> None:
        """Stop following the daemon; the signals stay as they are."""
        self._live = self.answers = False
        self._set("up", False)
        if self._following is not None:
            self._following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._following
            self._following = None

    async def begin(self, timeout_s: float) -> None:
        """Find the daemon, learn its classes and signals, follow it. Raises NotConnectedError where it is not found in time."""
        await self.disconnect()
        asker = self._asker = Asker(self.address, token=self._token)
        try:
            numbers = await _found(asker, timeout_s, self._period_s)
        except NoAnswer as error:
            await asker.close()
            raise NotConnectedError(str(error)) from None
        self._live = True
        self._learn(numbers)
        await self._show(numbers)
        self._following = asyncio.create_task(_following(weakref.ref(self), asker, self._period_s))
        # Without this a process that ends says that it destroyed a pending task.
        weakref.finalize(self, _cancel, asyncio.get_running_loop(), self._following)

    def _learn(self, numbers: Numbers) -> None:
        """Signals of the daemon's classes and drift signals; a restart with another prior adds those that are new."""
        added = [
            *self._more(self.mask_iou, "mask_iou", numbers.iou, None),
            *self._more(self.drift, "drift", numbers.score, "sigma"),
        ]
        self.add_readables(added)
        self.set_name(self.name)

    def _more(self, room: DeviceMap[SignalR[float]], prefix: str, names: Any, units: str | None) -> list[SignalR[float]]:
        new = [name for name in names if name not in room]
        for name in new:
            room[name] = self._signal(f"{prefix}-{name}", float, NAN, units=units, precision=3)
        return [room[name] for name in new]

    async def _ask(self) -> bool:
        """One question; False where it was not answered."""
        # One at a time: of two questions the one that was asked first could be answered last, with older numbers.
        async with self._asking:
            try:
                await self._show(await self._asker.ask())
            except NoAnswer as error:
                if self.answers:
                    log.warning("the daemon is away", device=self.name, error=str(error))
                self.answers = False
                self._set("up", False)
        for look in list(self._followers):
            look()
        return self.answers

    def _has(self, least: int) -> bool:
        return self.numbers is not None and self.numbers.received >= least and not self.numbers.behind

    async def _show(self, numbers: Numbers) -> None:
        async with self._showing:
            self.numbers, self.answers = numbers, True
            if numbers.received < self._received:  # another daemon, which counts anew
                self._received = 0
            told: dict[str, Any] = {
                "chi2": numbers.chi2,
                "mask_iou_mean": numbers.mean_iou,
                "prior_distance": numbers.distance,
                "alarm": bool(numbers.alarms),
                "alarms": ", ".join(numbers.alarms),
                "run": numbers.run,
                "frame": numbers.frame,
                "frames_behind": numbers.behind,
                "version": numbers.version,
                "up": True,
            }
            told |= {f"mask_iou-{name}": numbers.iou.get(name, NAN) for name in self.mask_iou}
            told |= {f"drift-{name}": numbers.score.get(name, NAN) for name in self.drift}
            for key, value in told.items():
                self._set(key, value)

    def _signal(self, key: str, datatype: type, value: Any, units: str | None = None, precision: int | None = None) -> SignalR[Any]:
        signal, self._setters[key] = soft_signal_r_and_setter(datatype, value, units=units, precision=precision)
        self._shown[key] = value
        return signal

    def _set(self, key: str, value: Any) -> None:
        """Change a signal whose value is another one; its time stamp is then that of the change."""
        before = self._shown[key]
        if value != before and not (isinstance(value, float) and math.isnan(value) and math.isnan(before)):
            self._shown[key] = value
            self._setters[key](value)


class _Connector(DeviceConnector):  # type: ignore[misc]
    """Asks the daemon what there is; a mock has the signals that every daemon has."""

    async def connect_mock(self, device: Any, mock: Any) -> None:
        await device.disconnect()
        await super().connect_mock(device, mock)

    async def connect_real(self, device: Any, timeout: float = DEFAULT_TIMEOUT, force_reconnect: bool = False) -> None:
        await device.begin(timeout)
        await super().connect_real(device, timeout, force_reconnect)


async def _found(asker: Asker, timeout_s: float, period_s: float) -> Numbers:
    """The daemon's first answer. Raises NoAnswer where there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return await asker.ask()
        except NoAnswer:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(min(period_s, timeout_s))


async def _following(whom: weakref.ref[StreampriorDevice], asker: Asker, period_s: float) -> None:
    """Ask over and over, for as long as somebody has the device."""
    try:
        while True:
            await asyncio.sleep(period_s)
            device = whom()
            if device is None:
                return
            await device._ask()
            del device
    finally:
        await asker.close()


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed already
        loop.call_soon_threadsafe(task.cancel)
