"""What a run can show for itself: where its data came from, which rows it saw when, and that it can be repeated."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import RunError
from perdure.sealed import PLAIN, TENSORS
from perdure.storage import file_hash
from perdure.training import checkpoint
from perdure.training.erase import go_on, hashes, task_ends
from perdure.training.folder import FINAL, RunFolder
from perdure.training.plan import Plan
from perdure.training.run import Run
from perdure.training.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Link:
    """One checkpoint of the chain: name, step, its files' SHA-256, and what is wrong with it, if anything."""

    name: str
    step: int | None
    hashes: tuple[str, ...]
    fault: str | None


@dataclass(frozen=True, slots=True)
class Seen:
    """How often a stage trained on a row and replayed it, and at which steps first and last."""

    stage: str
    task: str
    key: str
    trained: int
    replayed: int
    first: int
    last: int


def chain(folder: RunFolder) -> list[Link]:
    """The run's checkpoints, oldest first, each verified."""
    links = []
    for path in folder.saved():
        try:
            step, fault = int(checkpoint.load(path)["learner"]["steps"]), None
        except (RunError, KeyError, TypeError) as error:
            step, fault = None, str(error)
        files = [path / PLAIN, path / TENSORS]
        links.append(Link(path.name, step, tuple(file_hash(file) for file in files if file.is_file()), fault))
    return links


def seen(folder: RunFolder, keys: frozenset[str] = frozenset()) -> Iterator[Seen]:
    """Which rows each finished stage was trained on, all of them or those with these keys."""
    for path in sorted(folder.keys.glob("stage-*.jsonl")):
        for number, line in enumerate(path.read_bytes().splitlines(), start=1):
            try:
                task, key, *counts = json.loads(line)
                row = Seen(path.stem, task, key, *map(int, counts))
            except (ValueError, TypeError, RecursionError) as error:
                raise RunError(f"{path}:{number}: not as it was written; it cannot be trusted") from error
            if not keys or key in keys:
                yield row


def verify(
    folder: RunFolder,
    settings: RunSettings,
    plan_for: Callable[[RunSettings], Plan],
    run_for: Callable[[Plan, RunFolder], Run],
) -> tuple[str, dict[str, tuple[str | None, str | None]]]:
    """Train the last stage again, elsewhere, from the checkpoint before it.

    Returns:
        Where it began, and the files that came out otherwise with their SHA-256 there and here.

    Raises:
        RunError: the run is not finished, or nothing of it can be read.
    """
    if not folder.finished:
        raise RunError(f"{folder.path} is not finished; go on with it first, with --resume")
    ends = task_ends(folder)
    last = max(ends, default=0)
    if not last or ends[last].name != FINAL:
        raise RunError(
            f"{folder.path}: its final checkpoint cannot be read; `perdure audit` says what is wrong with it, and "
            "`perdure run … --resume` trains again from the one before"
        )
    start = max((number for number in ends if number < last), default=0)
    folder.refuse_changed(plan_for(settings).differences(folder.load(ends[last])))
    with tempfile.TemporaryDirectory(prefix="perdure-verify-") as aside:
        copy = RunFolder(Path(aside) / folder.path.resolve().name)
        copy.checkpoints.mkdir(parents=True)
        for path in (folder.config, folder.metrics):
            if path.is_file():
                shutil.copyfile(path, copy.path / path.name)
        for number in range(1, start + 1):
            if number in ends:
                # Contents without permissions: the run may be read-only.
                target = copy.checkpoints / ends[number].name
                target.mkdir()
                for file in (PLAIN, TENSORS):
                    shutil.copyfile(ends[number] / file, target / file)
        go_on(copy, settings, plan_for, lambda plan: run_for(plan, copy))
        there, here = hashes(folder), hashes(copy)
    differ = {
        name: (there.get(name), here.get(name))
        for name in sorted(there | here)
        if there.get(name) != here.get(name)
    }
    return ends[start].name if start else "the start", differ
