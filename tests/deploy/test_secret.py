"""Files of secrets: whose, who may read them, and where a client looks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tvmq.deploy import secret as secrets
from tvmq.deploy.secret import find_secret, read_secret
from tvmq.errors import DeviceError

SECRET = "0123456789abcdef0123456789abcdef"


def write(path: Path, text: str = SECRET, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.delenv(secrets.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("text", [SECRET, f"  {SECRET}\n"])
@pytest.mark.parametrize("mode", [0o600, 0o400])
def test_the_space_around_a_secret_is_none_of_it(home, text, mode):
    assert read_secret(write(home / "s", text, mode)) == SECRET.encode()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_others_must_not_read_it(home, mode):
    with pytest.raises(DeviceError, match=f"expected mode 0600, saw {mode:04o}; chmod 600"):
        read_secret(write(home / "s", mode=mode))


@pytest.mark.parametrize("text", ["", "\n", SECRET[:-1], f"{SECRET} {SECRET}"])
def test_what_is_no_secret(home, text):
    with pytest.raises(DeviceError, match="expected one word of 32 bytes or more, saw .* words; .* makes one"):
        read_secret(write(home / "s", text))


def test_a_missing_file(home):
    with pytest.raises(DeviceError, match="secret .*/none: saw No such file"):
        read_secret(home / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_somebody_else(home, monkeypatch):
    path = write(home / "s")
    os.chown(path, 12345, -1)
    with pytest.raises(DeviceError, match="expected a file of this user, saw one of user 12345"):
        read_secret(path)


def test_where_a_client_looks(home, monkeypatch):
    assert find_secret() is None
    usual = write(home / ".config" / "tvmq" / "secret", "a" * 32)
    assert find_secret() == b"a" * 32
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "other"))
    assert find_secret() is None
    monkeypatch.setenv(secrets.VARIABLE, str(write(home / "v", "b" * 32)))
    assert find_secret() == b"b" * 32
    assert find_secret("~/n" if write(home / "n", "c" * 32) else "") == b"c" * 32
    assert find_secret("none") is None
    monkeypatch.setenv(secrets.VARIABLE, str(home / "missing"))
    with pytest.raises(DeviceError, match="missing"):
        find_secret()
    assert usual.exists()
