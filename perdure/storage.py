"""Durable writes: aside, synced, renamed; a failed one raises StorageError and leaves what was there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perdure.errors import StorageError

FULL = "No space left on device"


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn a refused write into a StorageError that names the path and the way out."""
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        # Libraries that write for us (safetensors) wrap a full disk in errors of their own.
        if not isinstance(error, OSError) and FULL not in str(error):
            raise
        raise storage_error(path, error) from error


def storage_error(path: Path, error: Exception) -> StorageError:
    """A StorageError in words for a failed write."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or FULL in str(error):
        what = "the disk is full; free some space"
    elif getattr(error, "errno", None) in (errno.EACCES, errno.EROFS, errno.EPERM):
        what = "the folder cannot be written to; give another one with --out"
    else:
        what = f"{error}"
    return StorageError(f"{path}: could not be written: {what}. What was written before is intact.")


def write_text(path: Path, text: str) -> None:
    """Replace a file's text in one step."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with replaced_file(path) as aside:
        aside.write_bytes(content)


@contextmanager
def replaced_file(path: Path, writer: str = "") -> Iterator[Path]:
    """Write a file aside and put it in place of `path` in one step when the block ends well.

    Args:
        path: of the file.
        writer: names who writes, where several might at once.
    """
    aside = path.with_name(f".{path.name}{writer}.partial")
    with guarded(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield aside
            sync(aside)
            aside.replace(path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace a JSON file in one step; NaN is written as null."""
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value as strict JSON has it: NaN and infinities become None, tuples lists."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """Fill a folder aside and put it in place of `path` in one step when the block ends well."""
    aside = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    with guarded(path):
        try:
            _put_back(old, path)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            yield aside
            mode = 0o666 & ~_umask()
            for file in aside.rglob("*"):
                if file.is_file():
                    file.chmod(mode)  # some libraries write for the owner's eyes alone
                    sync(file)
            sync(aside)
            shutil.rmtree(old, ignore_errors=True)
            if path.exists():
                path.rename(old)
            aside.rename(path)
            sync(path.parent)
            shutil.rmtree(old, ignore_errors=True)
        except BaseException:
            _put_back(old, path)
            shutil.rmtree(aside, ignore_errors=True)
            raise


def _umask() -> int:
    # It can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _put_back(old: Path, path: Path) -> None:
    """Undo a replacement that stopped between its two renames."""
    if old.exists() and not path.exists():
        old.rename(path)


def there(path: Path) -> bool:
    """Whether something stands at the path; nothing does where a name is longer than the system takes."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def file_hash(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
