"""The text of a key file <-> a CURVE key; the format of pyzmq's certificates, which Bluesky's proxies read too."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from streamprior.errors import ConfigError

_Z85 = r"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}"
_LINE = re.compile(rf"""^\s*(public-key|secret-key)\s*=\s*(["'])({_Z85})\2\s*$""", re.ASCII | re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Key:
    """40 characters of Z85 each. secret : None in the file that is given away; it is not shown where this is printed."""

    public: bytes
    secret: bytes | None = field(default=None, repr=False)


def parse_key(text: str, place: str) -> Key:
    """The key of a file. Raises ConfigError, which names `place` and none of the text, where there is none."""
    found = {name: value.encode("ascii") for name, _, value in _LINE.findall(text)}
    if "public-key" not in found:
        raise ConfigError(f"{place}: holds no CURVE key; `streamprior keys FOLDER` makes a pair of files")
    return Key(found["public-key"], found.get("secret-key"))


def key_text(key: Key) -> str:
    """What goes into a file; with its secret where it has one."""
    words = (
        "SECRET: stays on this machine" if key.secret is not None else "public: for those who connect to, or are connected to by, its owner"
    )
    lines = [f"# CURVE key of streamprior, {words}.", "metadata", "curve", f'    public-key = "{key.public.decode()}"']
    if key.secret is not None:
        lines.append(f'    secret-key = "{key.secret.decode()}"')
    return "\n".join(lines) + "\n"
