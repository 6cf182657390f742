"""Who may send, who may look, and what is never told: keys, tokens and secrets, over real sockets."""

from __future__ import annotations

import stat
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any

import pytest
import zmq
from streamprior_sim.emit import Keys, load_keys
from typer.testing import CliRunner

from streamprior.cli import app
from streamprior.config import HttpSettings, PositionSettings, SourceSettings, http_token, is_loopback, load_config, state_folder
from streamprior.errors import ConfigError
from streamprior.preflight import inspect
from streamprior.prior import save_prior
from streamprior.sources.curve import key_files, load_own, make_keys, make_token
from streamprior.sources.zmq import ZmqPull, ZmqSubscribe
from tests.builders import diffraction, small_prior
from tests.test_daemon import Running, daemon
from tests.test_path import series

TOKEN = "a-token-that-nobody-else-knows-0123456789"
WAIT_S = 30.0


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STREAMPRIOR_HTTP_TOKEN", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs of the daemon, of a detector that may send and of somebody who may not."""
    for name in ("daemon", "detector", "stranger"):
        make_keys(tmp_path / "keys", name)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "detector.key").write_bytes((tmp_path / "keys" / "detector.key").read_bytes())
    save_prior(small_prior(), tmp_path / "prior.h5")
    return tmp_path


def binding(folder: Path) -> dict[str, Any]:
    return {"curve_secret_file": folder / "keys" / "daemon.key_secret", "curve_clients_folder": folder / "allowed"}


def connecting(folder: Path) -> dict[str, Any]:
    return {
        "curve_secret_file": folder / "keys" / "detector.key_secret",
        "curve_server_public_file": folder / "keys" / "daemon.key",
        "attach": "connect",
    }


def keys_of(folder: Path, name: str, server: str = "daemon") -> Keys:
    return load_keys(folder / "keys" / f"{name}.key_secret", folder / "keys" / f"{server}.key")


@contextmanager
def sending(kind: int, address: str, keys: Keys | None) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        if keys is not None:
            keys.give(socket)
        socket.connect(address)
        yield socket


def received(source: ZmqPull | ZmqSubscribe, wanted: Callable[[], bool]) -> list[Any]:
    """Everything that comes until `wanted`."""
    found, deadline = [], time.monotonic() + WAIT_S
    while not wanted():
        assert time.monotonic() < deadline, (found, source.refused)
        message = source.receive(0.05)
        if message is not None:
            found.append(message)
    return found


def first(source: ZmqPull | ZmqSubscribe, send: Callable[[], object] = lambda: None) -> Any:
    """The first message that comes; publishers, who drop what nobody has subscribed to yet, say it again."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        send()
        message = source.receive(0.05)
        if message is not None:
            return message
    raise AssertionError(f"nothing came, {source.refused} refused")


def bound(kind: str, folder: Path) -> ZmqPull | ZmqSubscribe:
    settings = SourceSettings(address="tcp://127.0.0.1:*", **binding(folder))
    if kind == "pull":
        return ZmqPull(settings)
    return ZmqSubscribe("bluesky", settings.address, "bind", 256, 2**20, files=key_files(settings, "source"))


@pytest.mark.parametrize("kind", ["pull", "subscribe"])
def test_only_a_sender_whose_key_is_in_the_folder_gets_anything_in(kind: str, folder: Path) -> None:
    source = bound(kind, folder)
    source.open()
    socket = zmq.PUSH if kind == "pull" else zmq.PUB
    try:
        for keys in (None, keys_of(folder, "stranger"), keys_of(folder, "detector", server="stranger")):
            before = source.refused
            with sending(socket, source.address, keys) as push:
                if kind == "pull":
                    push.send(b"forged")
                assert received(source, lambda before=before: source.refused > before) == []
        with sending(socket, source.address, keys_of(folder, "detector")) as push:
            assert first(source, lambda: push.send(b"good") if push.poll(0, zmq.POLLOUT) else None) == b"good"
    finally:
        source.close()


def test_a_key_that_is_added_or_removed_counts_from_the_next_connection_on(folder: Path) -> None:
    source = bound("pull", folder)
    source.open()
    try:
        (folder / "allowed" / "detector.key").rename(folder / "detector.key")
        with sending(zmq.PUSH, source.address, keys_of(folder, "detector")) as push:
            push.send(b"too early")
            assert received(source, lambda: source.refused > 0) == []
        (folder / "detector.key").rename(folder / "allowed" / "detector.key")
        with sending(zmq.PUSH, source.address, keys_of(folder, "detector")) as push:
            push.send(b"good")
            assert first(source) == b"good"
        (folder / "allowed" / "broken.key").write_text("no key at all")
        before = source.refused
        with sending(zmq.PUSH, source.address, keys_of(folder, "detector")):
            received(source, lambda: source.refused > before)
    finally:
        source.close()


@contextmanager
def server(folder: Path, kind: int, name: str = "daemon") -> Iterator[tuple[zmq.Socket[bytes], str]]:
    """The other side of a daemon that connects."""
    own = keys_of(folder, name).own
    with zmq.Context() as context, context.socket(kind) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.CURVE_SERVER, 1)
        assert own.secret is not None
        socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        socket.bind("tcp://127.0.0.1:*")
        yield socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)


@pytest.mark.parametrize("kind", ["pull", "subscribe"])
def test_a_daemon_that_connects_takes_frames_from_the_server_it_knows_and_from_no_other(kind: str, folder: Path) -> None:
    socket = zmq.PUSH if kind == "pull" else zmq.PUB

    def connected(address: str) -> ZmqPull | ZmqSubscribe:
        settings = SourceSettings(address=address, **connecting(folder))
        files = key_files(settings, "source")
        return ZmqPull(settings) if kind == "pull" else ZmqSubscribe("bluesky", address, "connect", 256, 2**20, files=files)

    with server(folder, socket) as (push, address):
        source = connected(address)
        source.open()
        assert first(source, lambda: push.send(b"good") if push.poll(0, zmq.POLLOUT) else None) == b"good"
        source.close()
    with server(folder, socket, "stranger") as (push, address):
        source = connected(address)
        source.open()
        assert received(source, lambda: source.refused > 1) == [], "and it tries again"
        source.close()


def test_keys_are_made_once_and_the_secret_is_for_its_owner_alone(tmp_path: Path) -> None:
    made = CliRunner().invoke(app, ["keys", str(tmp_path / "keys"), "--name", "daemon"])
    assert made.exit_code == 0
    secret, public = tmp_path / "keys" / "daemon.key_secret", tmp_path / "keys" / "daemon.key"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    own = load_own(key_files(SourceSettings(curve_secret_file=secret, curve_clients_folder=tmp_path), "source"))  # type: ignore[arg-type]
    assert own.secret is not None
    assert own.secret.decode() not in made.output + public.read_text() + repr(own)
    before = secret.read_bytes()
    again = CliRunner().invoke(app, ["keys", str(tmp_path / "keys"), "--name", "daemon"])
    assert (again.exit_code, secret.read_bytes()) == (2, before)
    token = CliRunner().invoke(app, ["keys", str(tmp_path / "keys"), "--token"])
    file = tmp_path / "keys" / "daemon.token"
    assert (token.exit_code, stat.S_IMODE(file.stat().st_mode)) == (0, 0o600)
    assert file.read_text().strip() not in token.output
    assert http_token(HttpSettings(host="0.0.0.0", token_file=file)) == file.read_text().strip()


def test_keys_serve_bluesky_too(folder: Path) -> None:
    from zmq.auth import load_certificate, load_certificates

    own = keys_of(folder, "daemon").own
    assert load_certificate(folder / "keys" / "daemon.key_secret") == (own.public, own.secret)
    assert load_certificates(folder / "allowed") == {keys_of(folder, "detector").own.public: True}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda files: files["secret"].chmod(0o604), ["curve_secret_file", "chmod 600"]),
        (lambda files: files["secret"].unlink(), ["curve_secret_file", "cannot be read"]),
        (lambda files: files["secret"].write_text("nothing"), ["curve_secret_file", "holds no CURVE key"]),
        (lambda files: files["secret"].write_bytes(files["public"].read_bytes()), ["holds a public key alone"]),
        (
            lambda files: files["secret"].write_text(
                files["secret"]
                .read_text()
                .replace(*[load_keys(files[n], files["public"]).own.public.decode() for n in ("secret", "other")])
            ),
            ["of different pairs"],
        ),
        (lambda files: (files["allowed"] / "x.key").write_text("nothing"), ["curve_clients_folder", "x.key", "holds no CURVE key"]),
        (lambda files: files["allowed"].rename(files["allowed"].with_name("gone")), ["curve_clients_folder", "cannot be read"]),
    ],
)
def test_what_is_wrong_with_keys_is_said_before_the_socket_opens(
    spoil: Callable[[dict[str, Path]], object], words: list[str], folder: Path
) -> None:
    place = folder / "keys"
    files = {"secret": place / "daemon.key_secret", "public": place / "daemon.key", "other": place / "stranger.key_secret"}
    secret = keys_of(folder, "daemon").own.secret
    assert secret is not None
    spoil(files | {"allowed": folder / "allowed"})
    with pytest.raises(ConfigError) as refused:
        ZmqPull(SourceSettings(address="tcp://127.0.0.1:*", **binding(folder))).open()
    for word in words:
        assert word in str(refused.value)
    assert secret.decode() not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"curve_secret_file": Path("a")}, "source.curve_clients_folder: is missing"),
        ({"curve_clients_folder": Path("a")}, "source.curve_secret_file: is missing"),
        ({"curve_secret_file": Path("a"), "attach": "connect"}, "source.curve_server_public_file: is missing"),
        ({"curve_secret_file": Path("a"), "curve_server_public_file": Path("b")}, "source.curve_server_public_file: has no effect"),
    ],
)
def test_half_of_what_encryption_takes_is_an_error(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        key_files(SourceSettings(**changes), "source")
    with pytest.raises(ConfigError, match=words.replace("source.", "positions.")):
        key_files(PositionSettings(**{"x": "m", "attach": "bind"} | changes), "positions")


@pytest.mark.parametrize(
    ("settings", "mark", "words"),
    [
        ("source: {address: 'tcp://127.0.0.1:*'}", "fine", "no ZMQ socket beyond loopback"),
        ("source: {address: 'tcp://0.0.0.0:*'}", "warns", "source.address beyond loopback without keys"),
        (
            "source: {address: 'tcp://0.0.0.0:*', curve_secret_file: keys/daemon.key_secret, curve_clients_folder: allowed}",
            "fine",
            "1 keys may send",
        ),
        ("source: {curve_secret_file: keys/daemon.key_secret}", "fails", "curve_clients_folder: is missing"),
    ],
)
def test_check_looks_at_the_keys(settings: str, mark: str, words: str, folder: Path) -> None:
    (folder / "daemon.yaml").write_text(f"prior: prior.h5\n{settings}\n")
    (found,) = [one for one in inspect(load_config(folder / "daemon.yaml")) if one.what == "encryption"]
    assert {"fine": (True, False), "warns": (True, True), "fails": (False, False)}[mark] == (found.fine, found.warns)
    assert words in found.sentence


def test_a_port_beyond_loopback_takes_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost", "0.0.0.0", "::", "10.0.0.1", "beamline")] == [
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert http_token(HttpSettings()) is None
    with pytest.raises(ConfigError, match=r"http\.host: 0\.0\.0\.0 is beyond loopback.*streamprior keys FOLDER --token"):
        http_token(HttpSettings(host="0.0.0.0"))
    file = make_token(tmp_path, "daemon")
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="can be read or changed by others"):
        http_token(HttpSettings(token_file=file))
    monkeypatch.setenv("STREAMPRIOR_HTTP_TOKEN", "short")
    with pytest.raises(ConfigError, match=r"\$STREAMPRIOR_HTTP_TOKEN holds no token") as refused:
        http_token(HttpSettings())
    assert "short" not in str(refused.value)
    monkeypatch.setenv("STREAMPRIOR_HTTP_TOKEN", TOKEN)
    assert http_token(HttpSettings(host="0.0.0.0")) == TOKEN


def code(opener: urllib.request.OpenerDirector, url: str, **headers: str) -> int:
    try:
        with opener.open(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def look_without_and_with_a_token(running: Running) -> None:
    url = f"http://127.0.0.1:{running.http}"
    bare = urllib.request.build_opener()
    for path in ("/metrics", "/healthz"):
        assert code(bare, url + path) == 200
    for path in (
        "/",
        "/status",
        "/ledger",
        "/alarms",
        "/live",
        "/mosaic",
        "/page_mosaic.js",
        "/nothing",
        f"/status?token={TOKEN}",
        "//metrics",
    ):
        assert code(bare, url + path) == 401, path
        assert code(bare, url + path, Authorization=f"Bearer {TOKEN}x") == 401, path
    assert code(bare, url + "/status", Authorization="Bearer \xe9\xff") == 401
    assert code(bare, url + "/status", Authorization=f"Bearer {TOKEN}") == 200
    assert code(bare, url + "/?token=wrong") == 401
    jar = CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    with browser.open(f"{url}/?token={TOKEN}", timeout=10) as answer:
        assert (answer.status, answer.url) == (200, f"{url}/"), "no token stays in the address"
    (cookie,) = jar
    assert cookie.has_nonstandard_attr("HttpOnly")
    assert TOKEN not in str(cookie.value)
    assert code(browser, url + "/status") == 200


def test_a_daemon_with_keys_and_a_token_lets_the_right_ones_in_and_tells_its_secrets_to_nobody(folder: Path) -> None:
    frames = diffraction(count=20)
    (folder / "tiled.key").write_text("tiled-secret-0123456789")
    token = folder / "http.token"
    token.touch(0o600)
    token.write_text(TOKEN)
    source = {name: str(file) for name, file in binding(folder).items()}
    http, tiled = {"token_file": "http.token"}, {"uri": "http://127.0.0.1:1", "api_key_file": "tiled.key"}
    with daemon(folder, source=source, http=http, tiled=tiled, log={"level": "debug", "format": "json"}) as running:
        look_without_and_with_a_token(running)
        with sending(zmq.PUSH, f"tcp://127.0.0.1:{running.port}", None) as push:
            push.send(b"forged")
            said = running.until("connection refused")
        assert "no keys" in said["why"]
        with sending(zmq.PUSH, f"tcp://127.0.0.1:{running.port}", keys_of(folder, "detector")) as push:
            push.setsockopt(zmq.LINGER, 5000)
            push.send(b"garbage")
            for message in series(frames):
                push.send_multipart(message) if isinstance(message, tuple) else push.send(message)
            running.until("run closed")
        asked = CliRunner().invoke(app, ["ledger", "--url", f"http://127.0.0.1:{running.http}", "--token-file", str(token)])
        assert asked.exit_code == 0, asked.output
        assert "20" in asked.output
        refused = CliRunner().invoke(app, ["ledger", "--url", f"http://127.0.0.1:{running.http}"])
        assert refused.exit_code == 2
        scraped = running.get("/metrics")
        assert "streamprior_connections_refused_total 0.0" not in scraped
        running.process.terminate()
        printed, logged = running.process.communicate(timeout=60)
    checked = CliRunner().invoke(app, ["check", str(folder / "daemon.yaml")])
    secrets = [
        TOKEN,
        "tiled-secret-0123456789",
        *(file.read_text().split('secret-key = "')[1][:40] for file in (folder / "keys").glob("*_secret")),
    ]
    told = [printed, logged, str(running.log), checked.output, scraped, asked.output, refused.output]
    ours = {token, folder / "tiled.key", *(folder / "keys").iterdir()}
    written = [file for file in folder.rglob("*") if file.is_file() and file not in ours]
    written += [file for file in (state_folder() / "quarantine").iterdir() if file.suffix == ".txt"]
    assert any("archive" in file.parts for file in written)
    told += [file.read_bytes().decode("latin-1") for file in written]
    for secret in secrets:
        assert not [text[:80] for text in told if secret in text]
