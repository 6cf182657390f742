"""A drift alarm of the daemon -> a RunEngine that is suspended while it stands, and that tries again when no frame can end it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bluesky.suspenders import SuspenderBase

from streamprior.bluesky.device import StreampriorDevice
from streamprior.bluesky.numbers import Numbers


class DriftSuspender(SuspenderBase):  # type: ignore[misc] # bluesky has no types here
    """Suspends the RunEngine while a drift alarm stands that is not muted: `RE.install_suspender(DriftSuspender(device))`.

    An alarm falls when good frames come, and a suspended plan takes none. So after `retry_s` without a new frame the plan goes on, from its
    last checkpoint; `retry_frames` frames later the alarm has fallen, or the plan is suspended again at once. Where the detector runs by
    itself, frames go on coming and nothing is tried. An alarm that stood when a run ended stands until a frame of the next one comes: the
    plan after it is held up for `retry_s` and then begins.

    While the daemon does not answer nobody knows about drift, and the plan goes on, unless `suspend_when_away`. As with every suspender, a
    plan that cannot be rewound (clear_checkpoint) is aborted instead.

    Parameters
    ----------
    device : connected in the RunEngine's event loop, as `init_devices` does.
    sleep_s : from the end of the alarm until the plan goes on.
    retry_s : without a new frame, until the plan is tried again.
    retry_frames : that are let through then before the alarm counts again: at least the daemon's drift.patience, which is how many good
        frames in a row it takes to end an alarm.
    suspend_when_away : suspend as well while the daemon does not answer.
    pre_plan, post_plan, tripped_message : as in bluesky.
    """

    def __init__(
        self,
        device: StreampriorDevice,
        *,
        sleep_s: float = 0.0,
        retry_s: float = 10.0,
        retry_frames: int = 3,
        suspend_when_away: bool = False,
        **of_bluesky: Any,
    ) -> None:
        super().__init__(_Alarm(device, Trial(retry_s, retry_frames), suspend_when_away), sleep=sleep_s, **of_bluesky)
        self._device = device

    def _should_suspend(self, value: bool) -> bool:
        return value

    def _should_resume(self, value: bool) -> bool:
        return not value

    def _get_justification(self) -> str:
        if not self.tripped:
            return ""
        return ": ".join(part for part in (justification(self._device), self._tripped_message) if part)


def justification(device: StreampriorDevice) -> str:
    """Why a plan is suspended, for whoever sits before it: `drift alarm: flux 8.1 sigma (streamprior, frame 17 of run ...)`."""
    numbers = device.numbers
    if not device.answers or numbers is None:
        return f"{device.name}: the daemon at {device.address} does not answer, so that nobody watches for drift; start it again"
    signals = ", ".join(f"{signal} {numbers.score.get(signal, float('nan')):.1f} sigma" for signal in numbers.holding)
    return f"drift alarm: {signals} ({device.name}, frame {numbers.frame} of run {numbers.run})"


class Trial:
    """Decides whether an alarm holds up the plan. Owns how long no frame came and how many are let through.

    Parameters
    ----------
    retry_s, retry_frames : as in `DriftSuspender`.
    """

    def __init__(self, retry_s: float, retry_frames: int) -> None:
        self._retry_s, self._retry_frames = retry_s, max(1, retry_frames)
        self._frame: tuple[str, int] | None = None
        self._since = 0.0  # seconds, when the newest frame came or the alarm began
        self._standing = False
        self._let_through = 0

    def holds(self, numbers: Numbers, now: float) -> bool:
        """Whether the plan has to wait at `now`, monotonic seconds."""
        came = self._came(numbers)
        if came or not self._standing:
            self._since = now
        self._standing = bool(numbers.holding)
        if not self._standing:
            self._let_through = 0
            return False
        if self._let_through:
            self._let_through = max(0, self._let_through - came)
            return not self._let_through
        if now - self._since >= self._retry_s:
            self._let_through = self._retry_frames
            return False
        return True

    def _came(self, numbers: Numbers) -> int:
        """Frames since the last look, at least."""
        frame = numbers.run, numbers.frame
        before, self._frame = self._frame, frame
        if before is None or frame == before:
            return 0
        return max(1, frame[1] - before[1]) if frame[0] == before[0] else frame[1] + 1


class _Alarm:
    """What bluesky's suspenders take for a signal: they call `subscribe` as ophyd has it, which signals of ophyd-async do not understand
    and outside their event loop refuse."""

    def __init__(self, device: StreampriorDevice, trial: Trial, suspend_when_away: bool) -> None:
        self.name = device.name
        self._device, self._trial, self._suspend_when_away = device, trial, suspend_when_away
        self._tell: Callable[..., None] | None = None

    def __repr__(self) -> str:
        return f"drift alarm of {self.name}"

    def subscribe(self, callback: Callable[..., None], event_type: str | None = None, run: bool = True) -> None:
        self._tell = callback
        if run:
            self._look()
        self._device.follow(self._look)

    def clear_sub(self, callback: Callable[..., None]) -> None:
        self._device.unfollow(self._look)
        self._tell = None

    def _look(self) -> None:
        tell, numbers = self._tell, self._device.numbers
        if tell is None:  # removed by another thread meanwhile
            return
        if self._device.answers and numbers is not None:
            tell(self._trial.holds(numbers, time.monotonic()))
        else:
            tell(self._suspend_when_away)
