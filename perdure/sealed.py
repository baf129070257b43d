"""A checkpoint's folder: tensors and plain values with a checksum of each, written in one step; never pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perdure.config import FORMAT
from perdure.errors import NewerFormatError, RunError, StorageError
from perdure.storage import file_hash, folder

TENSORS, PLAIN = "state.safetensors", "state.json"


@contextmanager
def seal(path: Path, state: Any) -> Iterator[Path]:
    """Write plain values beside the file of tensors that the caller writes to the path given.

    Raises:
        StorageError: the disk refused; what was at `path` is intact.
    """
    with folder(path) as aside:
        yield aside / TENSORS
        record = {
            "format": FORMAT,
            "sha256": file_hash(aside / TENSORS),
            "state_sha256": _hash(state),
            "state": state,
        }
        (aside / PLAIN).write_text(json.dumps(record, allow_nan=True), encoding="utf-8")


@contextmanager
def unseal(path: Path, *malformed: type[Exception]) -> Iterator[tuple[Path, Any]]:
    """The file of tensors and the plain values that were written, after their checksums were compared.

    Args:
        path: of the folder.
        malformed: what a reader of the tensors raises where they are not as they should be.

    Raises:
        RunError: not a checkpoint, torn, altered, or of a newer format; also for what goes wrong in the context.
    """
    wrong: tuple[type[Exception], ...] = (OSError, KeyError, TypeError, ValueError, RecursionError, *malformed)
    try:
        record = json.loads((path / PLAIN).read_text(encoding="utf-8"))
        if record["format"] > FORMAT:
            raise NewerFormatError(
                f"{path}: format {record['format']} is newer than this perdure reads ({FORMAT}); upgrade perdure"
            )
        if record["sha256"] != file_hash(path / TENSORS):
            raise RunError(f"{path}: {TENSORS} does not have the checksum that was written with it")
        if record["state_sha256"] != _hash(record["state"]):
            raise RunError(f"{path}: {PLAIN} does not have the checksum that was written with it")
        yield path / TENSORS, record["state"]
    except StorageError:
        raise
    except wrong as error:
        raise RunError(f"{path}: not a readable checkpoint: {error}") from error


def _hash(tree: Any) -> str:
    # What JSON was written from and what it reads back are written alike.
    return hashlib.sha256(json.dumps(tree, allow_nan=True).encode()).hexdigest()
