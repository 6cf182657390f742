"""The documentation as a site: it builds without a warning and without a network, and its pages load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

import streamprior
import streamprior.bluesky

ROOT = Path(__file__).parents[1]

# What Sphinx would run in, but for sockets: whoever opens one has reached for the network.
BUILD = """
import socket, sys

def refuse(*arguments):
    raise AssertionError(f"the documentation asks for the network: {arguments}")

socket.socket.connect = socket.getaddrinfo = refuse
from sphinx.cmd.build import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(library, reason=f"{library} is not installed; it comes with the extra `docs`", exc_type=ModuleNotFoundError)
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-c", BUILD, "-W", "--keep-going", "-q", "-d", str(folder / "doctrees"), str(ROOT / "docs"), str(folder / "html")],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    return folder / "html"


class Loaded(HTMLParser):
    """Collects what a browser fetches by itself when it shows a page; a link that a reader may click is not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        wanted = {"link": ("href",)}.get(tag, ("src", "srcset", "data", "poster") if tag != "a" else ())
        self.addresses += [value for name, value in attributes if value and name in wanted]


def outside(addresses: list[str]) -> list[str]:
    return [address for address in addresses if re.match(r"\s*(?:[a-z]+:)?//", address)]


def loaded(site: Path) -> Iterator[tuple[Path, list[str]]]:
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text())
        yield page, parser.addresses
    for sheet in site.rglob("*.css"):
        yield sheet, re.findall(r"(?:url\(|@import\s)\s*[\"']?([^\"')\s]+)", sheet.read_text())


def test_no_page_loads_anything_from_another_machine(site: Path) -> None:
    pages = dict(loaded(site))
    assert sum(len(addresses) for addresses in pages.values()) > 100
    assert not {str(page): outside(addresses) for page, addresses in pages.items() if outside(addresses)}


@pytest.mark.parametrize(
    ("html", "found"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<link href="//cdn.example/x.css">', 1),
        ('<img src="http://example/x.png">', 1),
        ('<a href="https://example"><img src="pictures/x.png"></a>', 0),
    ],
)
def test_the_search_for_foreign_addresses_finds_what_it_is_for(html: str, found: int) -> None:
    parser = Loaded()
    parser.feed(html)
    assert len(outside(parser.addresses)) == found


def test_every_document_is_a_page_that_the_contents_lead_to(site: Path) -> None:
    """A document that no table of contents names is a warning, and so has failed the build."""
    for document in (ROOT / "docs").rglob("*.md"):
        assert (site / document.relative_to(ROOT / "docs").with_suffix(".html")).is_file()


def test_every_public_function_and_class_has_its_place_with_shapes_and_dtypes(site: Path) -> None:
    page = (site / "reference" / "python.html").read_text()
    public = [
        *(f"streamprior.{name}" for name in streamprior._WHERE),
        *(f"streamprior.bluesky.{name}" for name in streamprior.bluesky._WHERE),
    ]
    assert not [name for name in public if f'id="{name}"' not in page]
    assert "psi (B, k, H, W) complex64" in re.sub(r"<[^>]+>", "", page)
