"""Which batches went through -> how many frames a worker takes at once while memory is short."""

from __future__ import annotations

import math

FIRST_WAIT_S, LONGEST_WAIT_S = 60.0, 600.0
"""Until twice as many are tried again: who took the memory of a card (another process, as a rule) seldom gives it back within seconds, and
a try that fails computes frames twice."""


class Portion:
    """Halves when a batch did not go through, and doubles again after a while; one for each worker and place of computing.

    Parameters
    ----------
    whole : frames that go together while there is no want of memory.
    least : 1, or 0 where somebody else computes what does not go through even one by one.
    """

    def __init__(self, whole: int, least: int) -> None:
        self._whole, self._least = whole, least
        self.frames = whole
        self._wait_s = FIRST_WAIT_S
        self._again = self._refused = -math.inf

    def refused(self, frames: int, now: float) -> None:
        """So many frames did not go through together. now : seconds, of any clock that never goes back."""
        if now > self._refused + 2 * LONGEST_WAIT_S:  # the last want of memory was another one
            self._wait_s = FIRST_WAIT_S
        self._refused = now
        self.frames = max(self._least, frames // 2)
        self._again = now + self._wait_s
        self._wait_s = min(2 * self._wait_s, LONGEST_WAIT_S)

    def grow(self, now: float) -> bool:
        """Whether it is time to try more; `frames` says how many."""
        if self.frames >= self._whole or now < self._again:
            return False
        self.frames = min(self._whole, max(1, 2 * self.frames))
        self._again = now + self._wait_s
        return True
