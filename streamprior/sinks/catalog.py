"""Folders of runs that grow -> Tiled: registered, and told of their growth, the newest run first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

from streamprior.sinks.mirror import Mirror, Work
from streamprior.sinks.registration import Registrar, RunUnreadable
from streamprior.tiled_api import TiledApi, TiledRefused

QUIET_S = 10.0
"""Tiled is asked for a sign of life this often when nothing grows."""


def mirror_archive(
    uri: str,
    api_key: str | None,
    archive_folder: Path,
    parent: str = "streamprior",
    period_s: float = 0.5,
    seen_as: PurePath | None = None,
) -> Mirror:
    """What registers the archive in Tiled, the growing run before all others.

    Parameters
    ----------
    uri, api_key : the Tiled server; a key in the uri's query is taken too.
    archive_folder : where the runs are.
    parent : path of the container for the runs, segments divided by "/".
    period_s : growth is told this often; every time is a database transaction in Tiled.
    seen_as : the archive folder as Tiled's machine sees it, where that differs.
    """
    folder = archive_folder.resolve()
    api = TiledApi(uri, api_key)
    registrar = Registrar(api, [part for part in parent.split("/") if part], seen_as or folder)

    def tell(names: Sequence[str], given_up: Callable[[], bool]) -> Iterator[tuple[str, str | None]]:
        for name in names:
            if given_up():
                return
            try:
                registrar.sync(folder / name)
            except (TiledRefused, RunUnreadable) as refusal:
                yield name, str(refusal)
            else:
                yield name, None

    work = Work(registrar.greet, tell, api.close, registrar.forget)
    return Mirror("catalog", folder, work, period_s, QUIET_S, newest_first=True)
