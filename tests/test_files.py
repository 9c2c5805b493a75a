import errno
import os
import stat
from pathlib import Path

import pytest

from tvmq import files
from tvmq.errors import OutputError
from tvmq.files import atomic_path, atomic_write_text, data_folder


def _one_line(info: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(info.value)
    return str(info.value)


def test_the_file_appears_whole_at_the_end(tmp_path: Path):
    final = tmp_path / "out.txt"
    with atomic_path(final) as temporary:
        assert temporary.parent == tmp_path
        temporary.write_text("whole")
        assert not final.exists()
    assert final.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [final]


def test_an_old_file_stays_until_the_new_one_is_whole(tmp_path: Path):
    final = tmp_path / "out.txt"
    final.write_text("old")
    with atomic_path(final) as temporary:
        temporary.write_text("new")
        assert final.read_text() == "old"
    assert final.read_text() == "new"


@pytest.mark.parametrize(
    "failure", [ValueError("no"), KeyboardInterrupt(), SystemExit(1)], ids=lambda e: type(e).__name__
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: BaseException):
    final = tmp_path / "out.txt"
    final.write_text("old")
    with pytest.raises(type(failure)), atomic_path(final) as temporary:
        temporary.write_text("half")
        raise failure
    assert final.read_text() == "old"
    assert list(tmp_path.iterdir()) == [final]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, *_args: object, **_kwargs: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OutputError) as info:
        atomic_write_text(tmp_path / "out.txt", "text")
    assert "out.txt" in _one_line(info) and "No space left on device" in str(info.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_the_last_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        atomic_write_text(tmp_path / "out.txt", "text")
    assert list(tmp_path.iterdir()) == []


def test_no_room_for_the_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(**_kwargs: object) -> tuple[int, str]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.tempfile, "mkstemp", full)
    with pytest.raises(OutputError, match="No space left"):
        atomic_write_text(tmp_path / "out.txt", "text")


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(OutputError) as info:
        atomic_write_text(tmp_path / "absent" / "out.txt", "text")
    assert str(tmp_path / "absent") in _one_line(info)
    assert not (tmp_path / "absent").exists()


def test_a_folder_of_that_name(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        atomic_write_text(tmp_path / "out", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_result_is_as_readable_as_any_file(tmp_path: Path):
    atomic_write_text(tmp_path / "a", "text")
    (tmp_path / "b").write_text("text")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "b").stat().st_mode)


def test_text_is_utf8(tmp_path: Path):
    atomic_write_text(tmp_path / "a", "π\n")
    assert (tmp_path / "a").read_bytes() == "π\n".encode()


def test_data_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "tvmq"
    package.mkdir()
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    assert data_folder("targets") == tmp_path / "targets"  # a checkout
    (package / "_data" / "targets").mkdir(parents=True)
    assert data_folder("targets") == package / "_data" / "targets"  # an installed package
