"""Writes are whole or not made at all, and a refused one says so in words."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from perdure import storage
from perdure.errors import StorageError
from perdure.storage import folder, guarded, plain, write_json, write_text


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def test_text_is_written_whole_and_folders_are_made(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.txt"
    write_text(path, "one\nZürich\n")
    assert path.read_bytes() == "one\nZürich\n".encode()
    write_text(path, "two")
    assert path.read_text() == "two"
    assert names(path.parent) == ["a.txt"]


def test_the_new_text_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    seen = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (seen.append((path.read_text(), names(tmp_path))), real(fd)))
    write_text(path, "new")
    assert seen == [("old", [".a.txt.partial", "a.txt"])]
    assert path.read_text() == "new"


@pytest.mark.parametrize("place", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    monkeypatch.setattr(*((os, "fsync", full) if place == "fsync" else (Path, "replace", full)))
    with pytest.raises(StorageError) as caught:
        write_text(path, "new")
    assert str(caught.value) == (
        f"{path}: could not be written: the disk is full; free some space. What was written before is intact."
    )
    assert caught.value.exit_code == 1
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EDQUOT, "the disk is full; free some space"),
        (errno.EROFS, "give another one with --out"),
        (errno.EACCES, "give another one with --out"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_each_refusal_in_its_words(tmp_path: Path, code: int, words: str) -> None:
    with pytest.raises(StorageError) as caught, guarded(tmp_path / "f"):
        raise OSError(code, os.strerror(code))
    assert words in str(caught.value)
    assert str(tmp_path / "f") in str(caught.value)


def test_a_storage_error_is_not_wrapped_twice(tmp_path: Path) -> None:
    first = StorageError("inner")
    with pytest.raises(StorageError) as caught, guarded(tmp_path):
        raise first
    assert caught.value is first


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="could not be written"):
        write_text(tmp_path / "file" / "a.txt", "y")
    assert (tmp_path / "file").read_text() == "x"


def test_nan_and_infinities_are_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan, 1: True}})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [1.5, None, [None, None]],
        "b": {"c": None, "1": True},
    }
    assert plain({"n": 10**400, "s": "nan", "t": (None, False)}) == {"n": 10**400, "s": "nan", "t": [None, False]}


def fill(path: Path, text: str) -> None:
    with folder(path) as aside:
        (aside / "inner").mkdir()
        (aside / "inner" / "a.txt").write_text(text)


def held(path: Path) -> str:
    return (path / "inner" / "a.txt").read_text()


def test_a_folder_appears_whole_and_replaces_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "f"
    fill(path, "old")
    (path / "left-over").write_text("x")
    with folder(path) as aside:
        assert held(path) == "old"
        (aside / "b.txt").write_text("new")
    assert names(path) == ["b.txt"]
    assert names(tmp_path / "deep") == ["f"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_folder_whose_filling_fails_leaves_the_old_one(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    fill(path, "old")

    def fail() -> None:
        with folder(path) as aside:
            (aside / "a.txt").write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert held(path) == "old"
    assert names(tmp_path) == ["f"]


def test_a_full_disk_while_a_folder_is_filled(tmp_path: Path) -> None:
    path = tmp_path / "f"
    fill(path, "old")
    with pytest.raises(StorageError, match="disk is full"), folder(path):
        full()
    assert held(path) == "old"
    assert names(tmp_path) == ["f"]


def test_a_full_disk_while_a_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    fill(path, "old")
    monkeypatch.setattr(storage.os, "fsync", full)
    with pytest.raises(StorageError, match="disk is full"):
        fill(path, "new")
    assert held(path) == "old"
    assert names(tmp_path) == ["f"]


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "f"
    fill(path, "old")
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        return real(self, target) if not self.name.endswith(".partial") else full()  # type: ignore[return-value]

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="disk is full"):
        fill(path, "new")
    assert held(path) == "old"
    assert names(tmp_path) == ["f"]


def test_what_a_killed_write_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".f.partial").mkdir()
    (tmp_path / ".f.partial" / "stale").write_text("x")
    fill(tmp_path / "f", "new")
    assert held(tmp_path / "f") == "new"
    assert names(tmp_path / "f") == ["inner"]
    assert names(tmp_path) == ["f"]


def test_a_replacement_that_was_killed_halfway_is_undone(tmp_path: Path) -> None:
    path = tmp_path / "f"
    fill(tmp_path / ".f.old", "old")

    def fail() -> None:
        with folder(path):
            assert held(path) == "old"
            raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert held(path) == "old"
    assert names(tmp_path) == ["f"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if not made or made.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """100,000 bytes do not fit in 65,536; the 5,000 that were there stay, and room is not eaten up."""
    text, saved = small_disk / "a.txt", small_disk / "f"
    write_text(text, "o" * 5_000)
    fill(saved, "old")
    for _ in range(3):
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            write_text(text, "n" * 100_000)
        with pytest.raises(StorageError, match="the disk is full; free some space"):
            fill(saved, "n" * 100_000)
    assert text.read_text() == "o" * 5_000
    assert held(saved) == "old"
    assert names(small_disk) == ["a.txt", "f"]
    write_text(text, "n" * 20_000)
    assert len(text.read_text()) == 20_000


def test_files_of_a_folder_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    """Some libraries write for the owner's eyes alone."""
    with folder(tmp_path / "f") as aside:
        (aside / "x").write_text("x")
        (aside / "x").chmod(0o600)
    (tmp_path / "usual").write_text("x")
    assert (tmp_path / "f" / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode
