"""Settings: each mistake ends in a sentence that names place, key and remedy; file and environment give the same configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from streamprior.config import Config, TiledSettings, describe, example_yaml, load_config, make_config, state_folder, tiled_api_key
from streamprior.errors import ConfigError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting from the developer's own environment."""
    monkeypatch.delenv("TILED_API_KEY", raising=False)


def write(folder: Path, text: str) -> Path:
    (folder / "beamline.yaml").write_text(text)
    return folder / "beamline.yaml"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["'prior' is missing", "streamprior train"]),
        ("- prior.h5\n", ["top level must be a mapping", "list"]),
        ("prior: [\n", ["not YAML"]),
        ("prior: p.h5\nsink: {}\n", ["unknown key 'sink'", "valid here", "archive"]),
        ("prior: p.h5\nsource: {adress: x}\n", ["unknown key 'source.adress'", "did you mean 'address'?"]),
        ("prior: p.h5\nqueues: {recieve_mb: 3}\n", ["'queues.recieve_mb'", "did you mean 'receive_mb'?"]),
        ("prior: p.h5\nsource: 5\n", ["source", "found 5"]),
        ("prior: p.h5\nhttp: {port: 70000}\n", ["http.port", "less than or equal to 65535", "found 70000"]),
        ("prior: p.h5\nhttp: {port: web}\n", ["http.port", "integer", "found 'web'"]),
        ("prior: p.h5\nsource: {kind: serial}\n", ["source.kind", "'dectris_v2', 'dectris_v1'", "found 'serial'"]),
        ("prior: p.h5\nprepare: {saturation: -1}\n", ["prepare.saturation", "greater than 0"]),
        ("prior: p.h5\nrefine: {iterations: 0}\ndrift: {limit: 0}\n", ["refine.iterations", "drift.limit"]),
        ("prior: p.h5\nrefine: {enabled: perhaps}\n", ["refine.enabled", "found 'perhaps'"]),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, text))
    for word in ["beamline.yaml", *words]:
        assert word in str(refused.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.yaml: no such file; `streamprior check --example`"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "binary.yaml")


def test_the_environment_wins_over_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, "prior: p.h5\nhttp: {host: 0.0.0.0, port: 1234}\n")
    monkeypatch.setenv("STREAMPRIOR_HTTP__PORT", "4321")
    monkeypatch.setenv("STREAMPRIOR_PRIOR", "/elsewhere/p.h5")
    config = load_config(file)
    assert (config.http.host, config.http.port) == ("0.0.0.0", 4321)
    assert config.prior == Path("/elsewhere/p.h5")


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("STREAMPRIOR_HTP__PORT", "1", ["'htp'", "did you mean 'http'?"]),
        ("STREAMPRIOR_HTTP__PROT", "1", ["'http.prot'", "did you mean 'port'?"]),
        ("STREAMPRIOR_HTTP__PORT", "web", ["http.port", "found 'web'"]),
        ("STREAMPRIOR_HTTP", "{no json", ["STREAMPRIOR_HTTP:", "JSON", "STREAMPRIOR_SECTION__KEY"]),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(
    variable: str, value: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as refused:
        load_config(write(tmp_path, "prior: p.h5\nhttp: {host: 127.0.0.1}\n"))
    for word in ["environment variable", variable[:16], *words]:
        assert word in str(refused.value)
    assert "beamline.yaml" not in str(refused.value)


def test_relative_paths_are_relative_to_the_file_and_absolute_ones_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    text = "prior: sub/p.h5\narchive: {folder: /data/archive}\nprepare: {mask: mask.npy}\nsource: {kind: file, path: '../scan.h5::/a/b'}\n"
    config = load_config(write(tmp_path, text))
    assert config.prior == tmp_path / "sub/p.h5"
    assert config.archive.folder == Path("/data/archive")
    assert config.prepare.mask == tmp_path / "mask.npy"
    assert str(config.source.path) == f"{tmp_path}/../scan.h5::/a/b"
    assert config.prepare.flat is None


def test_a_section_without_a_setting_has_its_defaults() -> None:
    assert make_config({"prior": "p.h5", "http": None}, "here") == make_config({"prior": "p.h5"}, "here")


def test_the_example_holds_every_setting_at_its_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, example_yaml()))
    assert config == load_config(write(tmp_path, "prior: prior.h5\n"))
    for key, *_ in describe():
        assert f"{key.rpartition('.')[2]}:" in example_yaml()


def test_every_setting_has_a_reason_and_a_default_or_is_required() -> None:
    rows = list(describe())
    assert [key for key, _, default, _ in rows if default == "required"] == ["prior"]
    assert [key for key, _, _, reason in rows if len(reason) < 20] == []
    assert [key for key, kind, _, _ in rows if not kind or "typing" in kind] == []

    def leaves(value: Any, prefix: str) -> list[str]:
        return [one for k, v in value.items() for one in leaves(v, f"{prefix}{k}.")] if isinstance(value, dict) and value else [prefix[:-1]]

    assert [key for key, *_ in rows] == leaves(Config(prior=Path("p.h5")).model_dump(), "")


def test_the_hash_is_that_of_the_settings_wherever_they_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from_file = load_config(write(tmp_path, "prior: /p.h5\nhttp: {port: 1}\ndrift: {limit: 4.5}\n"))
    other_order = load_config(write(tmp_path, "drift: {limit: 4.5}\nhttp: {port: 1}\nprior: /p.h5\n"))
    monkeypatch.setenv("STREAMPRIOR_DRIFT__LIMIT", "4.5")
    from_environment = load_config(write(tmp_path, "prior: /p.h5\nhttp: {port: 1}\n"))
    assert from_file.content_hash == other_order.content_hash == from_environment.content_hash
    monkeypatch.setenv("STREAMPRIOR_DRIFT__LIMIT", "4.6")
    assert load_config(write(tmp_path, "prior: /p.h5\nhttp: {port: 1}\n")).content_hash != from_file.content_hash


def test_settings_cannot_be_changed_afterwards() -> None:
    config = make_config({"prior": "p.h5"}, "here")
    with pytest.raises(ValueError, match="frozen"):
        config.prior = Path("other.h5")
    with pytest.raises(ValueError, match="frozen"):
        config.http.port = 1  # type: ignore[misc]


def test_the_api_key_comes_from_its_file_or_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiled_api_key(TiledSettings()) is None
    monkeypatch.setenv("TILED_API_KEY", "from-the-environment")
    assert tiled_api_key(TiledSettings()) == "from-the-environment"
    (tmp_path / "key").write_text("from-the-file\n")
    assert tiled_api_key(TiledSettings(api_key_file=tmp_path / "key")) == "from-the-file"
    with pytest.raises(ConfigError, match=r"tiled\.api_key_file: .*missing cannot be read"):
        tiled_api_key(TiledSettings(api_key_file=tmp_path / "missing"))


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe"])
def test_a_key_file_without_a_key_is_the_operators_fault(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tiled\.api_key_file"):
        tiled_api_key(TiledSettings(api_key_file=tmp_path / "key"))


def test_the_state_folder_is_where_the_operator_or_systemd_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMPRIOR_STATE", str(tmp_path / "own"))
    monkeypatch.setenv("STATE_DIRECTORY", f"{tmp_path / 'systemd'}:{tmp_path / 'second'}")
    assert state_folder() == tmp_path / "own"
    monkeypatch.delenv("STREAMPRIOR_STATE")
    assert state_folder() == tmp_path / "systemd"
    monkeypatch.delenv("STATE_DIRECTORY")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home" / "streamprior"
    assert (tmp_path / "home" / "streamprior").is_dir()


def test_a_state_folder_that_cannot_be_made_is_the_operators_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("STREAMPRIOR_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(ConfigError, match=r"state folder .* set STREAMPRIOR_STATE"):
        state_folder()
