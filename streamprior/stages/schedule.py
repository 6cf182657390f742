"""Text -> Schedule: the field's notation for a plan of iterations, "10*ER+SW(2.0)+25*HIO+5*ER"."""

from __future__ import annotations

import re
from dataclasses import dataclass

GRAMMAR = 'a schedule is terms joined by "+": n*ER, n*HIO, n*RAAR or SW(sigma[, threshold]), such as "10*ER+SW(2.0)+25*HIO+5*ER"'

MAX_ITERATIONS = 100_000
"""A schedule is run on every frame; one longer than this is a slip of the keyboard."""

DEFAULT_THRESHOLD = 0.1
"""Of the maximum. cohere takes 0.1 where it finds the support of a finished crystal (`shrink_wrap(image, .1, 1.0)`); Marchesini 2003 took
0.2 for thin samples. The lower one loses less of a crystal's weak parts, and the guard on the area bounds what it may let in."""

BETA = 0.9
"""Feedback of HIO and relaxation of RAAR (Fienup 1982; docs/physics.md section 2)."""

# (old, new): outside the support psi becomes old * psi + new * P_M psi; inside it is P_M psi. ER, HIO: Fienup 1982. RAAR: Luke 2005.
OUTSIDE = {"ER": (0.0, 0.0), "HIO": (1.0, -BETA), "RAAR": (BETA, 1.0 - 2.0 * BETA)}


@dataclass(frozen=True, slots=True)
class Iterate:
    """`times` iterations of one update rule, a key of OUTSIDE."""

    rule: str
    times: int


@dataclass(frozen=True, slots=True)
class ShrinkWrap:
    """A new support: where |psi|, blurred by a Gaussian of `sigma` pixels, exceeds `threshold` of its maximum (Marchesini 2003)."""

    sigma: float
    threshold: float = DEFAULT_THRESHOLD


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps in order; their number, and so the cost of a frame, is known before the run."""

    steps: tuple[Iterate | ShrinkWrap, ...]

    @property
    def iterations(self) -> int:
        return sum(step.times for step in self.steps if isinstance(step, Iterate))

    @property
    def ffts(self) -> int:
        """Transforms a frame: two an iteration, and one for the numbers of the object that is returned."""
        return 2 * self.iterations + 1

    def __str__(self) -> str:
        return "+".join(
            f"{step.times}*{step.rule}" if isinstance(step, Iterate) else f"SW({step.sigma!r},{step.threshold!r})" for step in self.steps
        )


@dataclass(frozen=True, slots=True)
class Plan:
    """What is done to a frame: `trial` iterations of error reduction on every arm, the best of them goes on with `schedule`.

    A frame that has a single arm needs no trial. Where that arm is the flat start because no prototype is near (abstention), `alone`
    takes the place of both; None: the schedule, as for any other single arm.
    """

    schedule: Schedule
    trial: int = 0
    alone: Schedule | None = None

    @property
    def longest(self) -> int:
        """Most iterations that any object goes through."""
        return max(self.trial + self.schedule.iterations, 0 if self.alone is None else self.alone.iterations)

    def iterations(self, arms: int) -> int:
        """Most iterations a frame of so many arms costs, all arms together."""
        tried = self.schedule.iterations + (arms * self.trial if arms > 1 else 0)
        return max(tried, 0 if self.alone is None else self.alone.iterations)

    def ffts(self, arms: int) -> int:
        """Most transforms a frame of so many arms costs: two an iteration, one for the numbers of every object that is judged."""
        tried = self.schedule.ffts + (arms * (2 * self.trial + 1) if arms > 1 else 0)
        return max(tried, 0 if self.alone is None else self.alone.ffts)


_NUMBER = r"\d+(?:\.\d*)?|\.\d+"
_ITERATE = re.compile(r"\s*(?:(\d+)\s*\*\s*)?([A-Za-z]+)\s*")
_SHRINK = re.compile(rf"\s*SW\s*\(\s*({_NUMBER})\s*(?:,\s*({_NUMBER})\s*)?\)\s*")


def parse_schedule(schedule: str | int) -> Schedule:
    """Read a schedule; a plain number n means "n*ER".

    Raises
    ------
    ValueError
        A term that is none (the text names it, its position and the grammar), no iteration at all, or too many.
    """
    text = f"{schedule}*ER" if isinstance(schedule, int) else schedule
    steps: list[Iterate | ShrinkWrap] = []
    position = 0
    for term in text.split("+"):
        steps.append(_step(term, position))
        position += len(term) + 1
    parsed = Schedule(tuple(steps))
    if not 1 <= parsed.iterations <= MAX_ITERATIONS:
        raise ValueError(f"schedule {text!r} has {parsed.iterations} iterations; 1 to {MAX_ITERATIONS} are possible")
    return parsed


def _step(term: str, position: int) -> Iterate | ShrinkWrap:
    shrink = _SHRINK.fullmatch(term)
    if shrink:
        threshold = DEFAULT_THRESHOLD if shrink[2] is None else float(shrink[2])
        if not 0 < threshold < 1:
            raise ValueError(f"{term.strip()!r} at position {position}: the threshold is a part of the maximum, between 0 and 1; {GRAMMAR}")
        return ShrinkWrap(float(shrink[1]), threshold)
    iterate = _ITERATE.fullmatch(term)
    # Seven digits are more than MAX_ITERATIONS already; Python refuses to read integers of thousands of digits in its own words.
    if iterate is None or iterate[2] not in OUTSIDE or len(iterate[1] or "1") > 7:
        raise ValueError(f"{term.strip()!r} at position {position} is no term of a schedule; {GRAMMAR}")
    return Iterate(iterate[2], int(iterate[1] or 1))
