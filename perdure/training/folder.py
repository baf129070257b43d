"""A run's folder: where things lie, and which checkpoint is the newest that can be read."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from perdure.config import Settings, read_yaml, validate
from perdure.errors import NewerFormatError, RunError
from perdure.storage import guarded, write_text
from perdure.tracking import read_events
from perdure.training import checkpoint
from perdure.training.settings import RunSettings

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no flock
    fcntl = None  # type: ignore[assignment]

RECORDED = "recorded"
LOCK = ".lock"
FINAL = "final"
REQUIRED = {"begun", "identity", "learner", "matrices", "position", "stage", "trained"}  # of a run's checkpoint


class RunFolder:
    """Paths of one run.

    Args:
        path: the folder; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.results = path / "results.json"
        self.erasures = path / "erasures.jsonl"
        self.checkpoints = path / "checkpoints"
        self.keys = path / "keys"
        self.adapter = path / "adapter"
        self.model = path / "model"
        self.report = path / "report.html"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config.is_file()

    @property
    def finished(self) -> bool:
        """Whether the run here came to its end, and no extension is under way."""
        return (self.checkpoints / FINAL).is_dir()

    @property
    def readable(self) -> bool:
        """Whether its final checkpoint is as it was written."""
        try:
            self.load(self.checkpoints / FINAL)
        except NewerFormatError:
            raise
        except RunError:
            return False
        return True

    @property
    def erasing(self) -> Mapping[str, Any] | None:
        """The record of an erasure that was begun here and not ended, if there is one."""
        events = read_events(self.erasures)
        return events[-1] if events and events[-1]["event"] == "begun" else None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it when the process ends, however it ends.

        A folder that holds nothing else at the end, since the run never began, is removed again.

        Raises:
            RunError: another process holds it.
        """
        lock = self.path / LOCK
        with guarded(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            file = _hold(lock)
        if file is None:
            holder = lock.read_text(encoding="utf-8").strip() or "another process"
            raise RunError(f"{self.path}: {holder} is at work here; wait for it, or give another --out")
        with file:
            try:
                yield
            finally:
                if [p.name for p in self.path.iterdir()] == [LOCK]:
                    lock.unlink()
                    self.path.rmdir()

    @property
    def is_arena(self) -> bool:
        """Whether the settings here are those of an arena run."""
        return self.config.is_file() and "online" in read_yaml(self.config)

    def settings(self) -> RunSettings:
        """The settings of the run that is here.

        Raises:
            RunError: no run is here.
            ConfigError: its config.yaml was changed into something unreadable.
        """
        if not self.exists:
            raise RunError(f"{self.path}: no run here (it has no config.yaml)")
        if self.is_arena:
            raise RunError(
                f"{self.path} is an arena run, which this command does not read; "
                f"`perdure arena compare {self.path}` writes its figures and tables, `perdure generate` lets its "
                "model answer"
            )
        values = read_yaml(self.config)
        values.pop(RECORDED, None)
        return validate(RunSettings, values, str(self.config))

    def refuse_changed(self, changed: Sequence[str]) -> None:
        """RunError where the run here differs from the one that is asked for."""
        if changed:
            raise RunError(
                f"{self.path}: this run was started otherwise, so going on would not give its result:\n  "
                + "\n  ".join(changed)
                + f"\nPut that back (its settings are in {self.config}), or start a new run in another folder."
            )

    def recorded(self) -> dict[str, Any]:
        """What was found when the run here was started: versions, machine, data, commands."""
        return dict(read_yaml(self.config).get(RECORDED) or {})

    @property
    def recipe_folder(self) -> Path | None:
        """The folder of the recipe that the run here came from: its relative data paths start there."""
        place = self.recorded().get("recipe_folder")
        return Path(place) if isinstance(place, str) else None

    def write_settings(self, settings: Settings, recorded: dict[str, Any]) -> None:
        """Write config.yaml: the settings, and what was found when the run was started."""
        values = {**settings.model_dump(mode="json"), RECORDED: recorded}
        write_text(self.config, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def saved(self) -> list[Path]:
        """Checkpoint folders, newest last."""
        if not self.checkpoints.is_dir():
            return []
        return sorted((p for p in self.checkpoints.iterdir() if not p.name.startswith(".")), key=_age)

    def after_stage(self, stage: int) -> Path | None:
        """The checkpoint between that stage and the next one, if there is one of that name."""
        found = [path for path in self.saved() if path.name.startswith(stage_name(0, stage).rpartition("-")[0])]
        return found[-1] if found else None

    def newest(self) -> tuple[dict[str, Any] | None, list[str]]:
        """The newest readable checkpoint's state, and a warning for each newer one that could not be read.

        Raises:
            NewerFormatError: a later perdure wrote one: going back before it would undo what that one did.
        """
        warnings: list[str] = []
        for path in reversed(self.saved()):
            try:
                return self.load(path), warnings
            except NewerFormatError:
                raise
            except RunError as error:
                warnings.append(f"{error}; going back to the one before it")
        return None, warnings

    @staticmethod
    def load(path: Path) -> dict[str, Any]:
        """What a run saved there.

        Raises:
            RunError: it cannot be read, or is not a run's.
        """
        state = checkpoint.load(path)
        missing = sorted(REQUIRED - state.keys())
        if missing:
            raise RunError(f"{path}: not a checkpoint of a run: it has no {missing[0]!r}")
        return state

    def save(self, name: str, state: dict[str, Any]) -> Path:
        """Write a checkpoint of that name."""
        path = self.checkpoints / name
        with guarded(path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.save(path, state)
        return path

    def close(self, step: int, stage: int) -> None:
        """Call the checkpoint of the last stage "final"."""
        last = self.checkpoints / stage_name(step, stage)
        if last.exists():
            with guarded(last):
                remove(self.checkpoints / FINAL)
                last.rename(self.checkpoints / FINAL)

    def reopen(self, step: int, stage: int) -> None:
        """Give the final checkpoint its name by step back, since the run goes on from it."""
        final = self.checkpoints / FINAL
        if final.exists():
            with guarded(final):
                remove(self.checkpoints / stage_name(step, stage))
                final.rename(self.checkpoints / stage_name(step, stage))

    def forget_final(self) -> None:
        """Put a final checkpoint that cannot be read aside, so that the run can end with one that can."""
        final, aside = self.checkpoints / FINAL, self.checkpoints / f".{FINAL}.unreadable"
        if final.exists():
            with guarded(final):
                shutil.rmtree(aside, ignore_errors=True)
                final.rename(aside)

    def sweep(self, unreadable: bool = False) -> None:
        """Remove what a killed process left half written; a replacement stopped between its renames is undone.

        Args:
            unreadable: also what was put aside because it could not be read.
        """
        endings = (".partial", ".old", ".unreadable") if unreadable else (".partial", ".old")
        with guarded(self.path):
            for place in (self.path, self.checkpoints, self.keys):
                for path in place.iterdir() if place.is_dir() else ():
                    if path.name.startswith(".") and path.name.endswith(endings):
                        original = place / path.name[1:].removesuffix(".old")
                        if path.name.endswith(".old") and not original.exists():
                            path.rename(original)
                        else:
                            remove(path)

    def drop_evaluations(self) -> None:
        """Remove what `evaluate` wrote: scores of a model that is about to change."""
        with guarded(self.path):
            for path in self.path.glob("evaluation*.json"):
                path.unlink()

    def drop_steps(self, keep: int) -> None:
        """Remove the mid-task checkpoints but the newest `keep`; those of a task's end stay."""
        steps = [path for path in self.saved() if path.name.startswith("step-")]
        for path in steps[: max(0, len(steps) - keep)]:
            shutil.rmtree(path, ignore_errors=True)


def remove(path: Path) -> None:
    """Remove a file, a folder with what is in it, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def keys_name(stage: int) -> str:
    """The name of the file that says which rows a stage was trained on."""
    return f"stage-{stage:03d}.jsonl"


def step_name(step: int) -> str:
    """The name of a mid-task checkpoint."""
    return f"step-{step:08d}"


def stage_name(step: int, stage: int) -> str:
    """The name of the checkpoint after a stage."""
    return f"stage-{stage:03d}-step-{step:08d}"


def _age(path: Path) -> tuple[int, int]:
    if path.name == FINAL:
        return (1 << 62, 0)
    found = re.search(r"step-(\d+)$", path.name)
    return (int(found.group(1)) if found else -1, int(path.name.startswith("stage-")))


def _hold(lock: Path) -> IO[str] | None:
    """The lock's file, locked and with this process's number in it; None where another process holds it."""
    while True:
        # For appending, so that a holder's note is not wiped by who only asks.
        file = lock.open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            if not lock.exists() or os.fstat(file.fileno()).st_ino != lock.stat().st_ino:
                file.close()  # its holder removed it in between: a lock on it keeps nobody out
                continue
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        return file
