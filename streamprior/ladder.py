"""How far behind the path is -> what it leaves out: refinement of some frames, then masks, then frames at the door; and back again."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import structlog

log = structlog.get_logger(__name__)

Furthest = Literal["nothing", "refinement", "masks", "frames"]
"""How much may be left out."""

LEVELS: tuple[Furthest, ...] = ("nothing", "refinement", "masks", "frames")
"""What each level of degradation leaves out, beyond those before it."""


@dataclass(frozen=True, slots=True)
class Rung:
    """What is done while the ladder stands here. Frames are chosen by index, so that two runs over the same frames choose alike.

    level : of `LEVELS`. refine_every : every n-th frame is refined, 0 for none. classify_every : every n-th frame is classified.
    drop : what does not fit into the receive queue is dropped. why : reason, in the ledger's words, for which frames are not refined here.
    """

    level: int
    refine_every: int = 1
    classify_every: int = 1
    drop: bool = False
    why: Literal["overload", "disk_short"] = field(default="overload", compare=False)

    def refines(self, index: int) -> bool:
        return self.refine_every > 0 and index % self.refine_every == 0

    def classifies(self, index: int) -> bool:
        return index % self.classify_every == 0


RUNGS = (
    Rung(0),
    *(Rung(1, refine_every=every) for every in (2, 4, 8, 16, 0)),
    *(Rung(2, refine_every=0, classify_every=every) for every in (2, 4, 8)),
    Rung(3, refine_every=0, classify_every=8, drop=True),
)
"""From everything to the least. Halving each time: whatever the overload is, a few steps find what fits."""


class Ladder:
    """Stands on one rung; steps down it when frames grow old on their way, and up again when they have been young for a while.

    A step towards less is taken while late frames grow no younger; a step back waits `calm_s`, and longer each time that it turned out
    to be too early: under a steady overload the ladder settles instead of swinging.

    Parameters
    ----------
    furthest : how much may be left out. refines : False for a recipe that refines no frame; its ladder begins with the masks.
    late_s : a frame that is older than this when it reaches the workers is late. calm_s : how long all must be young before a step back.
    changed : called with the new rung.
    """

    def __init__(
        self,
        furthest: Furthest,
        late_s: float,
        calm_s: float,
        refines: bool = True,
        changed: Callable[[Rung], None] = lambda rung: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        most = LEVELS.index(furthest)
        self._rungs = tuple(rung for rung in RUNGS if rung.level <= most and (refines or rung.level != 1))
        self._late_s, self._calm_s = late_s, calm_s
        self._changed, self._clock = changed, clock
        self._at = 0
        self._stepped = self._looked = -math.inf
        self._age_s = 0.0  # of the frames when they were looked at last, while they were late
        self._calm_since = clock()
        self._patience = calm_s
        self._by = 0  # the last step
        self._held: set[str] = set()
        self._unrefined = max((at for at, rung in enumerate(self._rungs) if rung.level <= 1), default=0)
        self._moving = threading.Lock()
        self.rung = self._rungs[0]

    def observe(self, age_s: float) -> None:
        """A frame has come as far as the workers, so long after it was received; 0 where nothing waits at all."""
        now = self._clock()
        with self._moving:
            if age_s > self._late_s:
                self._calm_since = now
                if now - self._looked < _STEP_S:
                    return
                falling, self._looked, self._age_s = age_s < self._age_s - _FALL * _STEP_S, now, age_s
                if not falling and self._at + 1 < len(self._rungs):
                    if self._by < 0:  # the step back that was the last one came too early, or held
                        early = now - self._stepped < 2 * self._patience
                        self._patience = min(2 * self._patience, _LONGEST_PATIENCE_S) if early else self._calm_s
                    self._move(+1, now, f"frames are {age_s:.1f} s old when their turn comes")
                return
            if age_s > _CALM * self._late_s:
                self._calm_since = now
            elif now - self._calm_since >= self._patience:
                self._calm_since, self._age_s = now, 0.0
                if self._at:
                    self._move(-1, now, "the load has fallen")

    def hold(self, cause: str, on: bool) -> None:
        """While `cause` stands, no frame is refined, whatever the load; `cause` is the disk's, in words for the log."""
        with self._moving:
            if on == (cause in self._held):
                return
            self._held ^= {cause}
            self._settle(cause if on else f"{cause} is over")

    def _move(self, by: int, now: float, why: str) -> None:
        self._at += by
        self._by, self._stepped = by, now
        self._settle(why)

    def _settle(self, why: str) -> None:
        at = max(self._at, self._unrefined if self._held else 0)
        rung, before = self._rungs[at], self.rung
        self.rung = replace(rung, why="disk_short") if at > self._at else rung
        if rung == before:
            return
        say = log.warning if at > self._rungs.index(before) else log.info
        say(
            "degradation level changed",
            level=rung.level,
            left_out=LEVELS[rung.level],
            refine_every=rung.refine_every,
            classify_every=rung.classify_every,
            why=why,
        )
        self._changed(self.rung)


_STEP_S, _FALL = 0.2, 0.05
"""Between two looks at frames that are late; and seconds by which they must grow younger in a second, or less is done: what has gathered
goes first, so a step that is enough shows in younger frames, not at once in young ones."""

_CALM = 0.25
"""Part of `late_s` below which a frame counts as young: a path that is only just late is not yet out of it."""

_LONGEST_PATIENCE_S = 60.0
