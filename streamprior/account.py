"""What happened to the frames of one run -> its account: sums, the story of one frame, ranges of those that were left out."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from streamprior.fates import SPAN, Fates, head_stamp, write_head
from streamprior.records import Detector, RunEnded, RunStarted

UNSEEN, IN_FLIGHT, PUBLISHED = 0, 1, 2

_SINK_SLOT = 256
"""In the file's head: below, messages without an index by their fate; from here on, frames that each sink took."""

_WHY = {
    ("classify", "overload"): "the path was behind, and its index one of those left out meanwhile; `streamprior catchup` computes it later",
    ("refine", "overload"): "the path was behind, and its index one of those left out meanwhile; `streamprior catchup` refines it later",
    ("refine", "disk_short"): "the archive's disk was nearly full; `streamprior catchup` refines it later",
    ("refine", "empty"): "it has no photon on any measured pixel, so there is nothing to refine",
    ("refine", "no_support"): "its support is empty, so there is nothing to refine",
    ("path", "shutdown"): "the daemon was told to leave and runs.drain_s was over before this frame was through",
    ("path", "crash"): "the process was killed while this frame was on its way",
    ("archive", "unavailable"): "the archive's folder could not be written, and the time to drain was over before it could be again",
}
"""Sentences for what stage and reason alone do not explain."""


_MADE_UP_FOR = ("overload", "disk_short")
"""Reasons of frames published without refinement that catching up does away with."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What can become of a frame; stage and reason where it was left out.

    Published at `refine` is a frame without refinement, and why; published at `catchup` one that was made up for, and its fate before.
    """

    kind: Literal["never received", "in flight", "published", "dropped", "quarantined"]
    stage: str = ""
    reason: str = ""

    @property
    def words(self) -> str:
        if self.kind == "published" and self.reason:
            return f"published {'without refinement' if self.stage == 'refine' else 'by catching up; it was'}: {self.reason}"
        where = f" at {self.stage}" if self.stage else ""
        return f"{self.kind}{where}: {self.reason}" if self.reason else self.kind

    @property
    def short(self) -> str:
        return f"{self.stage}/{self.reason}" if self.kind == "dropped" else self.reason

    @property
    def is_whole(self) -> bool:
        """Nothing of the frame was left out."""
        return self.kind == "published" and self.stage != "refine"


class RunAccount:
    """One run's account: keeps `fates` and its sums in step. Not safe to call from several threads; the ledger holds a lock.

    What is counted without an index (duplicates, messages nobody could read) goes to disk at once, as the fates do. All other sums are
    written when the run closes, and counted anew from the fates where a process was killed before that.

    Parameters
    ----------
    started : None for messages that belong to no run.
    """

    def __init__(self, started: RunStarted | None, fates: Fates) -> None:
        self.started, self.fates = started, fates
        self.received = self.distinct = self.flying = 0
        self.beyond = 0  # different frames whose index the run did not expect: they stand for none that it lacks
        self.extent = 0  # highest index that came in, plus one
        self.closed: float | None = None
        self.reason: str | None = None
        # Fates beyond the first three are numbered as they first occur. Stages and reasons are words of the code, some forty in all.
        self._names = [Fate("never received"), Fate("in flight"), Fate("published")]
        self._numbers = {fate: number for number, fate in enumerate(self._names)}
        self._indexed: Counter[int] = Counter()  # by number of the fate
        self._others: Counter[int] = Counter()  # the same, of what has no index or had its index before
        self._sinks: Counter[str] = Counter()
        self._partly: dict[int, set[str]] = {}
        self._stamp: tuple[int, int, int] | None = None
        self.save()

    def arrive(self, index: int, at: float) -> bool:
        """A frame came in; False when the run had it already: it then counts among the messages without an index."""
        self.received += 1
        if self.fates.code(index) != UNSEEN:
            self._other(IN_FLIGHT, 1)
            return False
        self.distinct += 1
        self.beyond += index >= self._end()
        self.flying += 1
        self.extent = max(self.extent, index + 1)
        self.fates.arrive(index, IN_FLIGHT, at)
        return True

    def arrive_unread(self) -> None:
        self.received += 1
        self._other(IN_FLIGHT, 1)

    def turn_away(self, fate: Fate) -> None:
        """A message came in and was left out at once."""
        self.received += 1
        self._other(self._number(fate), 1)

    def settle(self, index: int | None, fate: Fate, at: float) -> None:
        """The fate of a frame, or of a message without an index. A frame whose fate is known keeps it."""
        if index is None:
            self._other(IN_FLIGHT, -1)
            self._other(self._number(fate), 1)
        elif self.fates.code(index) == IN_FLIGHT:
            self._partly.pop(index, None)
            number = self._number(fate)
            self.fates.decide_one(index, number, at)
            self._indexed[number] += 1
            self.flying -= 1

    def take(
        self, sink: str, indices: npt.NDArray[np.int64], complete: frozenset[str], at: float, unrefined: Mapping[int, str]
    ) -> int | None:
        """`sink` has these frames safe; those that all complete ones have are published. Returns the last such index, or None.

        unrefined : index -> why, of those with a mask alone.
        """
        first = sink not in self._sinks
        self._sinks[sink] += len(indices)
        if first:
            self.save()
        self.fates.put(_SINK_SLOT + [*self._sinks].index(sink), self._sinks[sink])
        if sink not in complete:
            return None
        fresh = np.unique(indices[self.fates.codes(indices) == IN_FLIGHT])
        if len(complete) > 1:
            fresh = np.array([index for index in fresh.tolist() if self._is_whole(index, sink, complete)], np.int64)
        if not len(fresh):
            return None
        for why in sorted(set(unrefined.values())):
            alone = np.array([index for index, reason in unrefined.items() if reason == why], np.int64)
            self._decide(np.intersect1d(fresh, alone), self._number(Fate("published", "refine", why)), at)
        whole = np.setdiff1d(fresh, np.fromiter(unrefined, np.int64)) if unrefined else fresh
        self._decide(whole, PUBLISHED, at)
        return int(indices[np.isin(indices, fresh)][-1])

    def settle_safe(self, indices: npt.NDArray[np.int64], at: float) -> None:
        """Those of these frames that are in flight are published: every complete sink has them, whoever did not say so any more."""
        fresh = np.unique(indices[self.fates.codes(indices) == IN_FLIGHT])
        if len(fresh):
            self._decide(fresh, PUBLISHED, at)

    def catch_up(self, indices: npt.NDArray[np.int64], at: float) -> int:
        """The archive now has these frames whole: those that were left out, in part or altogether, or never came are published.

        Returns how many that were. One that never came counts as received from now on.
        """
        self._take_sums(self._counted() | {"residue": self.residue()})  # not those of a process that was killed in here
        codes, count = self.fates.codes(indices), 0
        for number in np.unique(codes).tolist():
            was, these = self._names[number], indices[codes == number]
            if was.is_whole or (was.kind == "published" and was.reason not in _MADE_UP_FOR):
                continue
            now = self._number(Fate("published", "catchup", was.words))
            if number == UNSEEN:
                for index in these.tolist():
                    self.arrive(index, at)
            elif number != IN_FLIGHT:
                self._indexed[number] -= len(these)
                self.flying += len(these)
            self._decide(these, now, at)
            count += len(these)
        self.fates.release()
        self.save()
        return count

    def close(self, ended: RunEnded) -> None:
        self.closed, self.reason = ended.closed, ended.reason
        self.mend()
        self.fates.release()
        self.save()

    def mend(self) -> None:
        """Offer the disk what it did not take, if there is anything."""
        if not self.fates.failing:
            return
        self.fates.mend()
        for number, count in self._others.items():
            self.fates.put(number, count)
        for n, count in enumerate(self._sinks.values()):
            self.fates.put(_SINK_SLOT + n, count)
        if self.closed is not None:
            self.fates.release()
            self.save()

    def write_off(self, fate: Fate, at: float) -> int:
        """Whatever is in flight gets this fate. Returns how many."""
        count, others = 0, self._others[IN_FLIGHT]
        for number in self.fates.numbers() if self.flying else []:
            codes = self.fates.piece(number)
            lost = np.flatnonzero(codes == IN_FLIGHT) + number * SPAN
            if len(lost):
                self._decide(lost, self._number(fate), at)
                count += len(lost)
        self._partly.clear()
        if others:
            self._other(IN_FLIGHT, -others)
            self._other(self._number(fate), others)
        return count + others

    def reopen(self, fates: Fates, again: Iterable[Fate]) -> None:
        """The run goes on: what got one of the fates `again` has never come, so that it counts when it is read again."""
        self.fates, self.closed, self.reason = fates, None, None
        for number in map(self._number, again):
            count, others = fates.unmake(number), self._others[number]
            self._indexed[number] -= count
            self._other(number, -others)
            self.distinct -= count
            self.received -= count + others
        counted = self._counted()
        self.extent, self.beyond = counted["extent"], counted["beyond"]
        self.save()

    def in_flight(self) -> int:
        """From the frames themselves, not from the sums: a frame that a room lost stays visible here for ever."""
        return self.flying + self._others[IN_FLIGHT]

    def is_flying(self, indices: npt.NDArray[np.int64]) -> bool:
        """Whether one of these frames is on its way."""
        return bool(np.any(self.fates.codes(indices) == IN_FLIGHT))

    def missing(self) -> int:
        expected = self.started.expected if self.started is not None else None
        return max(0, (self.extent if expected is None else expected) - self.awaited())

    def awaited(self) -> int:
        """Different frames that came, of those that the run expected."""
        return self.distinct - self.beyond

    def _end(self) -> float:
        """The first index that the run does not expect."""
        expected = self.started.expected if self.started is not None else None
        return math.inf if expected is None else expected

    def residue(self) -> int:
        return self.received - sum(self._of(number) for number in range(PUBLISHED, len(self._names))) - self.in_flight()

    def unaccounted(self) -> int:
        """Frames whose fate nobody knows and nobody will: the residue, and what is in flight although the run is over."""
        return abs(self.residue()) + (abs(self.in_flight()) if self.started is None or self.closed is not None else 0)

    def sums(self) -> dict[str, Any]:
        """The account as JSON-able numbers; `balanced` is True when every frame's fate is known."""
        run, residue = self.started, self.residue()
        return {
            "run": run.uid if run else None,
            "source": run.source if run else None,
            "series": run.series if run else None,
            "opened": run.opened if run else None,
            "closed": self.closed,
            "reason": self.reason,
            "expected": run.expected if run else None,
            "received": self.received,
            "published": sum(self._of(number) for number, fate in enumerate(self._names) if fate.kind == "published"),
            "unrefined": self._by_reason("published", "refine"),
            "caught_up": sum(self._by_reason("published", "catchup").values()),
            "dropped": self._by_reason("dropped"),
            "quarantined": self._by_reason("quarantined"),
            "in_flight": self.in_flight(),
            "missing": self.missing(),
            "sinks": dict(sorted(self._sinks.items())),
            "residue": residue,
            # A run still open may have frames on their way; a closed one may not.
            "balanced": not self.unaccounted(),
        }

    def fate(self, index: int) -> Fate:
        return self._names[self.fates.code(index)]

    def names(self) -> list[Fate]:
        """The fates by their numbers."""
        return list(self._names)

    def story(self, index: int) -> dict[str, Any]:
        """What is known of one frame, JSON-able: fate, received and decided (Unix s or None) and `why`, a sentence.

        Of a frame that never came: `before` and `after`, the nearest that did (frame, received), `came` (different frames), `expected`,
        and `unread`, messages of this run whose index nobody read; it may be one of them.
        """
        number, received, decided = self.fates.row(index)
        fate = self._names[number]
        assert self.started is not None
        told: dict[str, Any] = {"run": self.started.uid, "series": self.started.series, "frame": index, "fate": fate.words}
        told |= {"received": received or None, "decided": decided or None}
        if number == UNSEEN:
            told |= self._absence(index)
            return told | {"why": _why_absent(told, self.closed)}
        came, later = f"received at {_clock(received)}", f"{decided - received:.3f} s later"
        if number == IN_FLIGHT:
            where = "on its way" if self.closed is None else "lost on the path, which is a fault of streamprior's own: please report it"
            return told | {"why": f"{came}; {where}"}
        if fate.stage == "catchup":
            return told | {"why": f"`streamprior catchup` computed it from the file and put it into the archive at {_clock(decided)}"}
        what = ("safe" if fate.is_whole else "its mask safe") if fate.kind == "published" else "left out"
        more = _WHY.get((fate.stage, fate.reason))
        return told | {"why": f"{came}, {what} {later}" + (f": {more}" if more else "")}

    def _absence(self, index: int) -> dict[str, Any]:
        unread = {fate.short: self._others[n] for n, fate in enumerate(self._names) if n > PUBLISHED and self._others[n]}
        unread.pop("decode/duplicate", None)  # these were read, and are frames that came
        return {
            "before": self._neighbour(min(index, self.extent), -1),
            "after": self._neighbour(min(index, self.extent), 1),
            "came": self.distinct,
            "expected": self.started.expected if self.started is not None else None,
            "unread": unread,
        }

    def _neighbour(self, index: int, towards: Literal[-1, 1]) -> dict[str, Any] | None:
        """The nearest frame on one side that came; None where there is none."""
        for number in self.fates.numbers()[::towards]:
            codes = self.fates.piece(number) if (index // SPAN - number) * towards <= 0 else None
            came = np.flatnonzero(codes) + number * SPAN if codes is not None else np.empty(0, np.int64)
            came = came[(came - index) * towards > 0]
            if len(came):
                nearest = int(came[0 if towards > 0 else -1])
                return {"frame": nearest, "received": self.fates.row(nearest)[1]}
        return None

    def _is_whole(self, index: int, sink: str, complete: frozenset[str]) -> bool:
        have = self._partly.setdefault(index, set())
        have.add(sink)
        if have != complete:
            return False
        del self._partly[index]
        return True

    def _decide(self, indices: npt.NDArray[np.int64], number: int, at: float) -> None:
        self.fates.decide(indices, number, at)
        self._indexed[number] += len(indices)
        self.flying -= len(indices)

    def _other(self, number: int, by: int) -> None:
        self._others[number] += by
        self.fates.put(number, self._others[number])

    def _number(self, fate: Fate) -> int:
        number = self._numbers.get(fate)
        if number is None:
            number = self._numbers[fate] = len(self._names)
            self._names.append(fate)
            self.save()  # before its number is in the file
        return number

    def _of(self, number: int) -> int:
        return self._indexed[number] + self._others[number]

    def _by_reason(self, kind: str, stage: str | None = None) -> dict[str, int]:
        alike = [(number, fate) for number, fate in enumerate(self._names) if fate.kind == kind and stage in (None, fate.stage)]
        counts = {fate.short: self._of(number) for number, fate in alike}
        return {name: count for name, count in sorted(counts.items()) if count}

    def save(self) -> None:
        """The head: what the file of the fates does not hold."""
        if self.fates.path is None or self.started is None:
            return
        run = self.started
        head = {"run": run.uid, "source": run.source, "series": run.series, "opened": run.opened, "expected": run.expected}
        head |= {"closed": self.closed, "reason": self.reason, "fates": [asdict(fate) for fate in self._names], "sinks": [*self._sinks]}
        sums = {"distinct": self.distinct, "beyond": self.beyond, "flying": self.flying, "extent": self.extent, "residue": self.residue()}
        indexed = [self._indexed[number] for number in range(len(self._names))]
        write_head(self.fates.path, head | {"sums": {**sums, "indexed": indexed} if self.closed is not None else None})
        self._stamp = head_stamp(self.fates.path)

    def is_stale(self) -> bool:
        """Whether another process has written about this run since it was closed: what was left out of it may be made up for."""
        if self.closed is None or self.fates.path is None or self.fates.failing:
            return False
        return head_stamp(self.fates.path) not in (None, self._stamp)

    @classmethod
    def read(cls, head: Mapping[str, Any], fates: Fates) -> RunAccount:
        """The account that was written. Raises KeyError, TypeError where the head is none of ours."""
        account = cls.__new__(cls)
        account.started = RunStarted(head["run"], head["source"], head["series"], head["opened"], head["expected"], Detector())
        account.fates, account.closed, account.reason = fates, head["closed"], head["reason"]
        account._names = [Fate(**one) for one in head["fates"]]
        account._numbers = {fate: number for number, fate in enumerate(account._names)}
        slots = fates.slots()
        account._others = Counter({number: slots[number] for number in range(len(account._names))})
        account._sinks = Counter({sink: slots[_SINK_SLOT + n] for n, sink in enumerate(head["sinks"])})
        account._partly = {}
        account._stamp = head_stamp(fates.path) if fates.path is not None else None
        account._take_sums(head["sums"] or account._counted())
        return account

    def _take_sums(self, sums: Mapping[str, Any]) -> None:
        self.distinct, self.flying, self.extent = sums["distinct"], sums["flying"], sums["extent"]
        self.beyond = sums.get("beyond", 0)
        self._indexed = Counter(dict(enumerate(sums["indexed"])))
        self.received = self.distinct + sum(self._others.values()) + sums["residue"]

    def _counted(self) -> dict[str, Any]:
        """The sums of a run that nobody closed, from its frames."""
        indexed, extent, beyond = np.zeros(256, np.int64), 0, 0
        for number in self.fates.numbers():
            codes = self.fates.piece(number)
            if codes is not None and codes.any():
                came = np.flatnonzero(codes)
                indexed += np.bincount(codes[came], minlength=256)
                extent = number * SPAN + int(came[-1]) + 1
                beyond += int(np.count_nonzero(came + number * SPAN >= self._end()))
        decided = indexed.copy()
        decided[IN_FLIGHT] = 0
        return {
            "distinct": int(indexed.sum()),
            "beyond": beyond,
            "flying": int(indexed[IN_FLIGHT]),
            "extent": extent,
            "residue": 0,
            "indexed": decided[: len(self._names)].tolist(),
        }


def stretches(pieces: Iterable[tuple[int, npt.NDArray[np.uint8]]]) -> Iterator[tuple[int, int, int]]:
    """Fates of consecutive frames -> (first, last, number of the fate) of each stretch of equal ones.

    pieces : (index of the first frame, fates), each where the one before it ends.
    """
    first, number, end = 0, -1, 0
    for begin, codes in pieces:
        bounds = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist()] if len(codes) else []
        for at, here in zip(bounds, codes[bounds].tolist(), strict=True):
            if here != number:
                if number >= 0:
                    yield first, begin + at - 1, number
                first, number = begin + at, here
        end = begin + len(codes)
    if number >= 0:
        yield first, end - 1, number


_FOLDED = 4
"""Stretches that come at equal distances before they are told as one: two or three may be chance."""


@dataclass(frozen=True, slots=True)
class Repeated:
    """Stretches of one fate (its number) and one length, `period` frames from one to the next; a single one has count 1."""

    first: int
    number: int
    length: int
    period: int = 0
    count: int = 1

    @property
    def last(self) -> int:
        return self.first + (self.count - 1) * self.period + self.length - 1

    def joined(self, other: Repeated) -> Repeated | None:
        """With one more stretch; None where that is not the next one."""
        distance = other.first - self.first - (self.count - 1) * self.period
        if other.length != self.length or self.period not in (0, distance):
            return None
        return replace(self, period=distance, count=self.count + 1)

    def told(self) -> Iterator[Repeated]:
        """As one where they are many, else one by one."""
        if self.count >= _FOLDED:
            yield self
        else:
            yield from (Repeated(self.first + n * self.period, self.number, self.length) for n in range(self.count))


def folded(found: Iterable[tuple[int, int, int]]) -> Iterator[Repeated]:
    """`stretches` -> the same, those that come at equal distances as one: under overload each n-th frame is what the ladder left."""
    growing: dict[int, Repeated] = {}
    for first, last, number in found:
        new, before = Repeated(first, number, last - first + 1), growing.get(number)
        longer = before.joined(new) if before is not None else new
        if longer is None and before is not None:
            yield from before.told()
        growing[number] = longer or new
    for one in growing.values():
        yield from one.told()


def _why_absent(told: Mapping[str, Any], closed: float | None) -> str:
    index, before, after = told["frame"], told["before"], told["after"]
    expected, came = told["expected"], told["came"]
    if expected is not None and index >= expected:
        text = f"the run expected {expected} frames, 0 to {expected - 1}"
    elif after is not None:
        since = f"frame {before['frame']} ({_clock(before['received'])})" if before is not None else "the start of the run"
        text = f"none of those between {since} and frame {after['frame']} ({_clock(after['received'])}) came"
    elif before is not None:
        until = "so far" if closed is None else "before the run was closed"
        text = f"the last frame that came {until} is {before['frame']} ({_clock(before['received'])})"
    else:
        text = "no frame of this run came"
    text += f"; {came} came" + (f" of {expected} expected" if expected is not None else "")
    unread = told["unread"]
    if unread:
        text += f"; {sum(unread.values())} messages were left out unread ({_listed(unread)}), and it may be one of them"
    return text


def account_line(account: Mapping[str, Any]) -> str:
    """One run's account as a line for people: 400 received = 400 published + 0 dropped + 0 quarantined + 0 in flight."""

    def by_reason(total: dict[str, int]) -> str:
        return f"{sum(total.values())}" + (f" ({_listed(total)})" if total else "")

    opened = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(account["opened"])) if account["opened"] else "-"
    whose = f"{account['series'] or 'no run'} ({(account['run'] or '-')[:8]})"
    # Accounts of a daemon of an older version have neither.
    within = (
        [f"{sum(account['unrefined'].values())} without refinement: {_listed(account['unrefined'])}"] if account.get("unrefined") else []
    )
    within += [f"{account['caught_up']} by catching up"] if account.get("caught_up") else []
    of_these = f" (of these {'; '.join(within)})" if within else ""
    return (
        f"{opened} {whose}: {account['received']} received = {account['published']} published{of_these}"
        f" + {by_reason(account['dropped'])} dropped + {by_reason(account['quarantined'])} quarantined + {account['in_flight']} in flight;"
        f" {account['missing']} missing;{' interrupted;' if account['reason'] == 'interrupted' else ''}"
        f" {'balanced' if account['balanced'] else 'NOT BALANCED, residue ' + str(account['residue'])}"
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _clock(at: float) -> str:
    """Local time to the millisecond."""
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(at))}.{int(at * 1000) % 1000:03d}"
