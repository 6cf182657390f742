"""The thread that keeps Tiled up with the archive: which runs it names when, to work that only writes down what it was told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from streamprior.errors import SinkUnavailable
from streamprior.sinks.archive import RUN_FILE
from streamprior.sinks.mirror import MAX_WAITING, RUNS_A_PASS, Mirror, Work


class Notebook:
    """Work on no Tiled: `told` is what it was told in which order. It refuses, leaves out and is away as the test says."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.refused: set[str] = set()
        self.left_out: set[str] = set()
        self.away = False
        self.remembers = True
        self.greetings = self.forgotten = self.closed = 0
        self.enough = threading.Event()
        self.wanted = 0
        self.meanwhile: Callable[[], None] = lambda: None

    def greet(self) -> bool:
        self.greetings += 1
        if self.away:
            raise SinkUnavailable("nobody there; start it")
        remembered, self.remembers = self.remembers, True
        return remembered

    def tell(self, names: Sequence[str], given_up: Callable[[], bool]) -> Iterator[tuple[str, str | None]]:
        for name in names:
            if given_up() or name in self.left_out:
                continue
            self.told.append(name)
            self.meanwhile()
            yield name, f"{name}: no" if name in self.refused else None
        if len(self.told) >= self.wanted:
            self.enough.set()

    def forget(self) -> None:
        self.forgotten += 1

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def work() -> Notebook:
    return Notebook()


def make_mirror(folder: Path, work: Notebook, newest_first: bool = True, period_s: float = 0.001, quiet_s: float = 1000.0) -> Mirror:
    return Mirror("mirror", folder, Work(work.greet, work.tell, work.close, work.forget), period_s, quiet_s, newest_first)


def make_runs(folder: Path, count: int) -> list[str]:
    """Folders of runs in an archive: their names, oldest first."""
    for number in range(count):
        (folder / f"run-{number:03}").mkdir()
        (folder / f"run-{number:03}" / RUN_FILE).write_text("{}")
    return [f"run-{number:03}" for number in range(count)]


@pytest.mark.parametrize("newest_first", [True, False])
def test_everything_in_the_archive_is_told_in_the_order_asked_for(tmp_path: Path, work: Notebook, newest_first: bool) -> None:
    names = make_runs(tmp_path, RUNS_A_PASS + 3)
    ordered = names[::-1] if newest_first else names
    mirror = make_mirror(tmp_path, work, newest_first)
    assert mirror.step()
    assert work.told == ordered[:RUNS_A_PASS]
    assert mirror.pending()
    assert mirror.step()
    assert work.told == ordered
    assert (mirror.pending(), mirror.up, mirror.error) == (False, True, "")


def test_more_runs_than_a_pass_takes_do_not_wait_for_news(tmp_path: Path, work: Notebook) -> None:
    work.wanted = len(make_runs(tmp_path, 3 * RUNS_A_PASS))
    mirror = make_mirror(tmp_path, work)
    mirror.start()
    assert work.enough.wait(60)
    assert mirror.close(60)
    assert work.closed == 1


def test_what_is_announced_in_a_quiet_time_is_told_at_once(tmp_path: Path, work: Notebook) -> None:
    mirror = make_mirror(tmp_path, work)
    mirror.start()
    assert work.enough.wait(60)
    work.wanted = 1
    work.enough.clear()
    mirror.announce(tmp_path / "run-000")
    assert work.enough.wait(60)
    assert mirror.close(60)
    assert work.told == ["run-000"]


def test_what_is_announced_while_it_is_told_is_told_again(tmp_path: Path, work: Notebook) -> None:
    (name,) = make_runs(tmp_path, 1)
    mirror = make_mirror(tmp_path, work)
    work.meanwhile = lambda: mirror.announce(tmp_path / name)
    mirror.step()
    assert mirror.pending()
    work.meanwhile = lambda: None
    mirror.step()
    assert (work.told, mirror.pending()) == ([name, name], False)


def test_a_refused_run_waits_while_the_others_go_on_and_is_tried_at_the_end(tmp_path: Path, work: Notebook) -> None:
    names = make_runs(tmp_path, 3)
    work.refused = {names[1]}
    mirror = make_mirror(tmp_path, work, newest_first=False)
    with capture_logs() as logs:
        for _ in range(3):
            assert mirror.step()
            mirror.announce(tmp_path / names[1])
    assert work.told == names
    assert (mirror.up, mirror.error, mirror.pending()) == (False, f"{names[1]}: no", True)
    assert [line["error"] for line in logs] == [f"{names[1]}: no"]
    work.refused = set()
    mirror.start()
    assert mirror.close(60)
    assert work.told == [*names, names[1]]


def test_a_run_that_is_refused_to_the_end_is_left_for_the_next_start(tmp_path: Path, work: Notebook) -> None:
    work.refused = set(make_runs(tmp_path, 1))
    mirror = make_mirror(tmp_path, work)
    mirror.start()
    assert work.enough.wait(60)
    assert not mirror.close(60)
    assert not mirror._thread.is_alive()


def test_a_run_that_the_work_left_out_is_due_again(tmp_path: Path, work: Notebook) -> None:
    names = make_runs(tmp_path, 2)
    work.left_out = {names[0]}
    mirror = make_mirror(tmp_path, work)
    mirror.step()
    assert mirror.pending()
    work.left_out = set()
    mirror.step()
    assert (work.told, mirror.pending()) == ([names[1], names[0]], False)


def test_after_an_outage_everything_is_compared_again(tmp_path: Path, work: Notebook) -> None:
    names = make_runs(tmp_path, 2)
    mirror = make_mirror(tmp_path, work, newest_first=False)
    mirror.step()
    work.away = True
    mirror.announce(tmp_path / names[0])
    with capture_logs() as logs:
        assert not mirror.step()
        assert not mirror.step()
    assert (mirror.up, mirror.error, work.forgotten) == (False, "nobody there; start it", 2)
    assert len(logs) == 1
    work.away = False
    assert mirror.step()
    assert (work.told, mirror.up, mirror.error) == (names + names, True, "")


def test_a_tiled_that_lost_its_memory_is_told_everything_again(tmp_path: Path, work: Notebook) -> None:
    names = make_runs(tmp_path, 2)
    mirror = make_mirror(tmp_path, work, newest_first=False)
    mirror.step()
    work.remembers = False
    mirror.announce(tmp_path / names[1])
    mirror.step()
    assert work.told == names + names


def test_tiled_is_asked_for_a_sign_of_life_when_nothing_changes(tmp_path: Path, work: Notebook) -> None:
    seldom, often = make_mirror(tmp_path, work), make_mirror(tmp_path, work, quiet_s=0.0)
    for mirror, greetings in ((seldom, 1), (often, 3)):
        work.greetings = 0
        for _ in range(3):
            mirror.step()
        assert work.greetings == greetings


def test_an_archive_that_cannot_be_listed_is_waited_for(tmp_path: Path, work: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(folder: Path) -> list[Path]:
        raise OSError(116, "Stale file handle")

    names = make_runs(tmp_path, 1)
    mirror = make_mirror(tmp_path, work)
    with monkeypatch.context() as away:
        away.setattr("streamprior.sinks.mirror.run_folders", stale)
        assert not mirror.step()
    assert "Stale file handle" in mirror.error
    assert mirror.step()
    assert work.told == names


def test_announcing_never_waits_and_is_bounded(tmp_path: Path, work: Notebook) -> None:
    mirror = make_mirror(tmp_path, work)
    mirror.step()
    for number in range(MAX_WAITING):
        mirror.announce(tmp_path / f"run-{number}")
    mirror.announce(tmp_path / "run-0")
    assert not mirror._rescan
    mirror.announce(tmp_path / "one-more")
    assert (len(mirror._waiting), mirror._rescan) == (MAX_WAITING, True)
    assert not mirror.close(0)
    assert work.closed == 1


def test_work_that_is_given_up_leaves_the_rest_for_the_next_start(tmp_path: Path, work: Notebook) -> None:
    make_runs(tmp_path, 3)
    begun, go_on = threading.Event(), threading.Event()

    def stuck() -> None:
        begun.set()
        go_on.wait(60)

    work.meanwhile = stuck
    mirror = make_mirror(tmp_path, work)
    mirror.start()
    assert begun.wait(60)
    assert not mirror.close(0)
    go_on.set()
    mirror._thread.join(60)
    assert len(work.told) == 1
    assert mirror.pending()
    assert not mirror.up
