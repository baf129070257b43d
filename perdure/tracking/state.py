"""What a run folder keeps for its trackers: under which ids the run is known, and TensorBoard's files."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.errors import RunError
from perdure.storage import guarded, write_json

IDS = "tracking.json"
EVENTS = "tensorboard"


def read_ids(folder: Path, store: str) -> dict[str, Any]:
    """Under which ids an MLflow store knows the run; empty where it does not.

    Raises:
        RunError: the file is not as it was written.
    """
    return dict(_read(folder).get(store, {}))


def write_ids(folder: Path, store: str, ids: Mapping[str, Any]) -> None:
    """Keep the ids for when the run goes on; those of other stores stay."""
    write_json(folder / IDS, {"format": 1, "mlflow": {**_read(folder), store: dict(ids)}})


def forget(folder: Path) -> list[str]:
    """Remove all that the folder keeps for trackers; returns the MLflow runs, which lie elsewhere, in words."""
    try:
        left = [f"run {ids['run']} in {store}" for store, ids in _read(folder).items()]
    except (RunError, KeyError, TypeError):
        left = [f"the runs that {folder / IDS} named, which could not be read"]
    with guarded(folder):
        (folder / IDS).unlink(missing_ok=True)
        shutil.rmtree(folder / EVENTS, ignore_errors=True)
    return left


def untracked(command: str) -> str:
    """A command without its --track: where a run is told of is no part of the run."""
    if "--track" not in command:
        return command
    parts, kept = iter(shlex.split(command)), []
    for part in parts:
        if part == "--track":
            next(parts, None)
        elif not part.startswith("--track="):
            kept.append(part)
    return shlex.join(kept)


def _read(folder: Path) -> dict[str, Any]:
    path = folder / IDS
    if not path.is_file():
        return {}
    try:
        stores = json.loads(path.read_text(encoding="utf-8"))["mlflow"]
        return {str(store): dict(ids) for store, ids in stores.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise RunError(
            f"{path}: not as it was written; remove it, and the run is tracked as a new one from its log"
        ) from error
