"""A daemon that is killed a hundred times at random moments under load: is a frame lost, is a value another one? And what that costs."""

from __future__ import annotations

import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from streamprior.config import SourceSettings
from streamprior.ledger import read_ledger
from streamprior.prior import save_prior
from streamprior.seams import Message
from streamprior.sinks.archive import ArchivedRun, read_run, run_folders
from streamprior.spool import spooled_images
from streamprior.wire.dectris_v2 import StreamV2Decoder
from streamprior_bench.measure import spread
from streamprior_bench.path import SIZE, make_path_config, path_prior, rate_through
from streamprior_bench.send_frames import repeated_frames

KILLS, SEED = 100, 7
LIFE_S = 2.5
"""Longest time from when a daemon listens to its end; every fifth one does not come so far."""

RATE_HZ = 1000.0
"""More than two cores refine: frames wait in every queue when the end comes, and in the sender."""

_OF_TIME = {"index", "detector_time", "received", "published"}
"""Columns that no two runs have in common; the index is compared by place."""


def run(repeats: int = 3) -> Iterator[dict[str, Any]]:
    """What the spool costs a path without refinement, which is the fastest there is; then the kills, in either mode."""
    with tempfile.TemporaryDirectory() as folder:
        yield _price(Path(folder), repeats)
    for mode in ("complete", "live"):
        with tempfile.TemporaryDirectory() as folder:
            yield killed(Path(folder), mode, KILLS, SEED)


def _price(place: Path, repeats: int, count: int = 30_000) -> dict[str, Any]:
    save_prior(path_prior(), place / "prior.h5")
    live = make_path_config(place, False)
    complete = live.model_copy(update={"recovery": live.recovery.model_copy(update={"mode": "complete"})})
    rates: dict[str, list[float]] = {"live": [], "complete": []}
    for _ in range(repeats):
        for name, config in (("live", live), ("complete", complete)):
            rates[name].append(rate_through(config, count)[0])
    return {
        "what": f"{SIZE}x{SIZE} uint16 without refinement, with and without a spool of images",
        **{f"{name}_frames_per_s": statistics.median(values) for name, values in rates.items()},
        **{f"{name}_spread": spread(values) for name, values in rates.items()},
        "complete_over_live": statistics.median(rates["complete"]) / statistics.median(rates["live"]),
    }


def killed(place: Path, mode: Literal["complete", "live"], kills: int, seed: int) -> dict[str, Any]:
    """A series sent without a pause while its daemon is killed and started again; what is archived beside a run that was left alone.

    accepted : frames that a killed daemon had written to its spool or to its ledger. listed : frames that `streamprior ledger --left-out`
    names at the end, which must be those that are not archived, each of them and no other.
    """
    moments = random.Random(seed)
    hall = _Hall(place, mode)
    reference = hall.left_alone()
    accepted: set[int] = set()
    with hall.sender() as sender:
        for number in range(kills):
            process = hall.daemon()
            begun = time.monotonic()
            hall.ready(process)
            start_s = time.monotonic() - begun
            if number % 5 == 4:
                process.kill()
                process = hall.daemon()
                time.sleep(moments.uniform(0.0, start_s))
            else:
                time.sleep(moments.uniform(0.0, LIFE_S))
            process.kill()
            process.wait()
            accepted |= hall.accepted()
        process = hall.daemon()
        hall.enough.touch()
        sent = int(sender.communicate()[0])
        account = hall.closed()
        process.terminate()
        code = process.wait()
    (folder,) = run_folders(place / "archive")
    archived = read_run(folder)
    have = set(archived.frames["index"].to_pylist())
    listed = hall.left_out(account["run"])
    wrong = _differing(archived, reference)
    kept = not wrong and not code and account["balanced"] and listed == set(range(sent)) - have
    if mode == "complete":
        kept = kept and accepted <= have and not account["dropped"]
    return {
        "what": f"{kills} kills, {mode}",
        "seed": seed,
        "sent": sent,
        "accepted_by_a_killed_daemon": len(accepted),
        "archived": len(have),
        "accepted_and_not_archived": len(accepted - have),
        "listed_as_left_out": len(listed),
        "of_these_on_their_way": sum(account["dropped"].values()),
        "of_these_never_received": account["missing"],
        "values_that_differ": wrong,
        "verdict": "kept" if kept else "MISSED",
    }


class _Hall:
    """A sender and the daemon beside it, which keep their address; owns the folder they work in."""

    def __init__(self, place: Path, mode: str) -> None:
        self._place, self._log = place, place / "log"
        self.enough = place / "enough"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
        save_prior(path_prior(), place / "prior.h5")
        for name in ("archive", "alone"):
            told = {
                "prior": "prior.h5",
                "source": {"address": self._address},
                "refine": {"iterations": 20},
                "overload": {"furthest": "nothing"},
                "recovery": {"mode": mode, "folder": str(place / "spool")},
                "archive": {"folder": name},
                "http": {"port": 0},
            }
            (place / f"{name}.yaml").write_text(yaml.safe_dump(told))

    def daemon(self, name: str = "archive") -> subprocess.Popen[bytes]:
        environment = os.environ | {"STREAMPRIOR_STATE": str(self._place / "state")}
        command = [sys.executable, "-m", "streamprior.cli", "run", f"{name}.yaml"]
        with self._log.open("wb") as log:
            return subprocess.Popen(command, cwd=self._place, env=environment, stdout=subprocess.DEVNULL, stderr=log)

    def ready(self, process: subprocess.Popen[bytes]) -> None:
        """Wait until it listens; the first one compiles its kernels, for all that come after it."""
        while b" ready " not in (said := self._log.read_bytes()):
            if process.poll() is not None:
                raise RuntimeError(f"the daemon did not start: {said.decode()}")
            time.sleep(0.02)

    @contextmanager
    def sender(self, count: int = 10**6) -> Iterator[subprocess.Popen[bytes]]:
        script = Path(__file__).with_name("send_frames.py")
        command = [sys.executable, str(script), self._address, str(SIZE), str(count), "--long", "--rate-hz", str(RATE_HZ)]
        process = subprocess.Popen([*command, "--until", str(self.enough)], stdout=subprocess.PIPE)
        try:
            yield process
        finally:
            process.kill()
            process.wait()

    def left_alone(self) -> ArchivedRun:
        """Every different frame three times over, in a daemon that nobody disturbs."""
        process = self.daemon("alone")
        self.ready(process)
        with self.sender(3 * _different()) as sender:
            sender.wait()
        self.closed()
        process.terminate()
        process.wait()
        (folder,) = run_folders(self._place / "alone")
        return read_run(folder)

    def closed(self) -> Mapping[str, Any]:
        """The account of the newest run, once its end has come: a restart first closes it as interrupted."""
        while True:
            accounts = read_ledger(self._place / "state" / "ledger").earlier()
            if accounts and accounts[0]["reason"] == "end":
                return accounts[0]
            time.sleep(0.2)

    def accepted(self) -> set[int]:
        """Frames that a killed daemon's ledger has, and those in its spool."""
        ledger = read_ledger(self._place / "state" / "ledger")
        found: set[int] = set()
        for account in ledger.earlier()[:1]:
            if account["reason"] is None or account["reason"] == "interrupted":
                unseen = _indices(ledger.left_out(account["run"])["left_out"], ["never received"])
                found = set(range(account["received"] + account["missing"])) - unseen
        decoder = StreamV2Decoder("detector", SourceSettings().channel, 2**28)
        return found | {index for message in spooled_images(self._place / "spool") for index in _index(decoder, message)}

    def left_out(self, uid: str) -> set[int]:
        return _indices(read_ledger(self._place / "state" / "ledger").left_out(uid)["left_out"])


def _index(decoder: StreamV2Decoder, message: Message) -> Iterator[int]:
    for record in decoder.decode(message, 0.0):
        if hasattr(record, "index"):
            yield record.index


def _indices(ranges: Sequence[Mapping[str, Any]], fates: Sequence[str] = ()) -> set[int]:
    return {index for one in ranges if not fates or one["fate"] in fates for index in range(one["first"], one["last"] + 1)}


def _different() -> int:
    """Of the sender's frames, which come over and over."""
    frames = repeated_frames(SIZE, 1000)
    return next(n for n in range(1, 1000) if np.array_equal(frames[n], frames[0]))


def _differing(run: ArchivedRun, reference: ArchivedRun) -> int:
    """Frames of which anything in the archive differs from the same image's in the undisturbed run."""
    period = _different()
    rows = {name: run.frames[name].to_numpy() for name in run.frames.column_names}
    told = {name: reference.frames[name].to_numpy() for name in reference.frames.column_names}
    indices = rows["index"]
    place = np.where(indices < period, indices, period + indices % period)  # the first frame of all has none before it
    wrong = np.zeros(len(indices), np.bool_)
    for n, (index, same) in enumerate(zip(indices, place, strict=True)):
        wrong[n] = not (
            np.array_equal(run.classes[index], reference.classes[same])
            and np.array_equal(run.objects[index], reference.objects[same], equal_nan=True)
        )
    after_gap = np.diff(indices, prepend=-1) != 1  # the first one of all, too, unless it is frame 0
    for name in set(rows) - _OF_TIME:
        if rows[name].dtype.kind == "f":
            differs = ~((rows[name] == told[name][place]) | (np.isnan(rows[name]) & np.isnan(told[name][place])))
        else:
            differs = rows[name] != told[name][place]
        # Beside another frame than in the undisturbed run, as the one between was lost on its way to the daemon.
        wrong |= differs & ~(after_gap & name.startswith("iou_previous"))
    return int(np.count_nonzero(wrong))
