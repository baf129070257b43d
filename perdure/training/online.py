"""The loop over episodes: answer, learn, answer again; examine, save, and go on anywhere."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from perdure.callbacks import Callback
from perdure.config import Settings
from perdure.errors import NewerFormatError, NonFiniteError, RunError, StorageError
from perdure.storage import folder as replaced
from perdure.storage import plain
from perdure.tracking import MetricsLog, find_mark
from perdure.training import checkpoint
from perdure.training.attempt import Attempt, attempt
from perdure.training.display import Display
from perdure.training.episodes import Curriculum, Drift, Episodes
from perdure.training.folder import RunFolder, remove
from perdure.training.interrupt import Interrupted, StopRequest, stop_on_signals
from perdure.training.learner import Learner
from perdure.training.measure import Measure
from perdure.training.plan import changed_settings
from perdure.training.update import Update, Updates
from perdure.types import Example, Task

STATE = "state"  # within a checkpoint: what going on needs, beside the model for others to load
PREFIX = "checkpoint_ep"
KEEP = 2  # of the newest checkpoints, beside the best


class OnlineSettings(Settings):
    """An online stream: how many episodes, which rows they bring, and when it is learnt and examined."""

    episodes: int = Field(80, ge=1)
    eval_every: int = Field(10, ge=1, description="episodes between two examinations")
    checkpoint_every: int | None = Field(None, ge=1, description="episodes; after each examination anyway")
    learn_on: Literal["all", "errors"] = "all"
    window: int = Field(1, ge=1, description="of the newest rows, so many make a step")
    passes: int = Field(1, ge=1, description="steps an episode")
    drift: Drift = "off"
    curriculum: Curriculum = "off"
    task_every: int | None = Field(None, ge=1, description="episodes of a task, for strategies that need an end")


class Exam(Protocol):
    """Examines the model as it is, on rows that are never learnt from."""

    def __call__(self, episode: int) -> dict[str, Any]:
        """Plain values; "exact_match" is one of them, and says which checkpoint is the best."""


@dataclass(frozen=True, slots=True, eq=False)
class OnlinePlan:
    """An online stream that is ready to start.

    Attributes:
        settings: all of them, for config.yaml.
        recorded: what was found: versions, machine, data.
        online: those of the stream.
        learner: what is trained.
        updates: how it learns from a row.
        episodes: which rows come.
        measure: reads answers.
        exam: examines.
        max_new_tokens: of an answer.
        export: writes the model into a folder, for others to load.
        identity: what must not change when it goes on; plain values.
        adds: callbacks.
    """

    settings: Settings
    recorded: Mapping[str, Any]
    online: OnlineSettings
    learner: Learner
    updates: Updates
    episodes: Episodes
    measure: Measure
    exam: Exam
    max_new_tokens: int
    export: Callable[[Path], None]
    identity: Mapping[str, Any]
    callbacks: Sequence[Callback] = field(default=())


class Online:
    """One online stream in a folder.

    Args:
        plan: what to do.
        folder: where to write; a stream that is there already is gone on with.
        display: what a person sees.
        again: the command that goes on with it, for messages.
    """

    def __init__(
        self, plan: OnlinePlan, folder: RunFolder, display: Display | None = None, again: str = ""
    ) -> None:
        self.plan, self.folder, self.again = plan, folder, again
        self.display = display or Display()
        self.history: list[dict[str, Any]] = []
        self.begun = 0  # tasks that the learner has begun
        self.ended = True  # whether the last of them has ended
        self._seen: list[Example] = []  # rows of this task that were learnt from
        self._rows = {row.key: row for row in plan.episodes.rows}
        self._log: MetricsLog | None = None

    def execute(self) -> list[dict[str, Any]]:
        """Go through all episodes.

        Returns:
            What the exams found, the first one before any learning.

        Raises:
            Interrupted: asked to stop, and saved.
            NonFiniteError: the loss or gradient was; the newest checkpoint is from before its episode.
            StorageError: the disk refused a write.
        """
        with stop_on_signals(self.display.say) as stop:
            try:
                return self._execute(stop)
            except StorageError as error:
                raise StorageError(f"{error} Then go on with: {self.again} --resume") from error
            finally:
                self.display.stop()
                if self._log is not None:
                    self._log.close()

    def load(self) -> None:
        """Take up the newest checkpoint without learning.

        Raises:
            RunError: there is none, or it belongs to another stream.
        """
        _, state = self._newest(remove_torn=False)
        if state is None:
            raise RunError(f"{self.folder.path}: no checkpoint here that can be read; run it first")
        self.folder.refuse_changed(changed_settings(state["identity"], plain(self.plan.identity)))
        self._restore(state)

    def _execute(self, stop: StopRequest) -> list[dict[str, Any]]:
        plan, total = self.plan, self.plan.online.episodes
        self.folder.sweep()
        name, state = self._newest()
        if state is not None:
            self.folder.refuse_changed(changed_settings(state["identity"], plain(plan.identity)))
        recorded = dict(plan.recorded)
        if state is not None:
            recorded["changes"] = self._changes(recorded, state["episodes"]["done"])
        self.folder.write_settings(plan.settings, recorded)
        mark = find_mark(self.folder.metrics, name) if state is not None else None
        self._log = MetricsLog(self.folder.metrics, mark[0] if mark else 0)
        for callback in plan.callbacks:
            callback.begin({"settings": plan.settings.model_dump(mode="json"), **plan.recorded})
        if state is None:
            self.display.doing("examining")
            self._examine()
        else:
            self._restore(state)
            self.display.say(f"going on after episode {plan.episodes.done} of {total}")
        self.display.start(total, plan.episodes.done, "arena", ("loss", "right"))
        while plan.episodes.done < total:
            if stop:
                self._stop()
            self._begin_task()
            try:
                self._episode()
            except NonFiniteError as error:
                # The row that failed comes again: the newest checkpoint is from before its episode.
                raise NonFiniteError(f"{error} Changed settings need a new --out.") from error
            self._after_episode()
        return self.history

    def _changes(self, now: Mapping[str, Any], episode: int) -> list[dict[str, Any]]:
        """What changed of versions and machine since the stream was last run; told, and kept with the rest."""
        before = self.folder.recorded()
        found = list(before.get("changes", []))
        for what in ("versions", "machine"):
            for change in changed_settings(before.get(what, now[what]), now[what]):
                self.display.say(f"warning: {what}: {change}; results may differ in their last digits")
                found.append({"episode": episode, "changed": change})
        return found

    # One episode

    def _episode(self) -> None:
        plan = self.plan
        clock = time.perf_counter()
        row = plan.episodes.next()
        before = self._attempt(row)
        plan.episodes.answered(row, before.right)
        update: Update | None = None
        learns = plan.online.learn_on == "all" or not before.right
        if learns:
            update = plan.updates.learn(row)
            self._seen.append(row)
        after = before if update is None else self._attempt(row)
        seconds = time.perf_counter() - clock
        self._write(
            "episode",
            episode=plan.episodes.done,
            kind=row.task,
            level=row.fields.get("level"),
            key=row.key,
            loss_before=before.loss,
            loss_after=after.loss,
            loss=None if update is None else update.loss,
            right_before=before.right,
            right_after=after.right,
            before=before.text,
            after=after.text,
            learnt=learns,
            rows=0 if update is None else update.rows,
            steps=0 if update is None else update.steps,
            replayed=0 if update is None else update.replayed,
            lr=None if update is None else update.lr,
            seconds=round(seconds, 4),
            **({"skipped": update.skipped} if update is not None and update.skipped else {}),
        )
        self.display.advance(row.task, loss=f"{before.loss:.3f}", right="yes" if before.right else "no")

    def _attempt(self, row: Example) -> Attempt:
        return attempt(self.plan.measure, row, self.plan.max_new_tokens)

    def _after_episode(self) -> None:
        plan, online, done = self.plan, self.plan.online, self.plan.episodes.done
        last = done == online.episodes
        if self._boundary(done):
            plan.learner.end_task(list(self._seen))
            self.ended, self._seen = True, []
        block_over = plan.episodes.num_blocks > 1 and plan.episodes.block_of(done - 1) != plan.episodes.block_of(
            done
        )
        if done % online.eval_every == 0 or block_over or last:
            self.display.doing("examining")
            self._examine()
        if self._scheduled(done):
            self._save()

    def _scheduled(self, done: int) -> bool:
        """Whether the state after so many episodes is kept, stopped or not."""
        every = self.plan.online.checkpoint_every
        if not done or done >= self.plan.online.episodes:
            return bool(done)
        return bool(every and done % every == 0) or any(entry["episode"] == done for entry in self.history)

    # Tasks: stretches of episodes that a strategy sees an end of

    def _boundary(self, done: int) -> bool:
        """Whether a task ends after so many episodes."""
        episodes, every = self.plan.episodes, self.plan.online.task_every
        if done >= self.plan.online.episodes:
            return True
        return bool(every and done % every == 0) or episodes.block_of(done - 1) != episodes.block_of(done)

    def _begin_task(self) -> None:
        if self.ended:
            self._begin(self.begun, self.plan.episodes.done)
            self.begun, self.ended = self.begun + 1, False

    def _begin(self, index: int, episode: int, resuming: bool = False) -> None:
        plan = self.plan
        block = plan.episodes.block_of(episode)
        named = plan.episodes.num_blocks > 1 and not plan.online.task_every
        name = plan.episodes.kinds[block] if named else f"task {index + 1}"
        settings = plan.learner.settings
        after = self._task_end(episode) if settings.schedule.at_boundary == "reset" else plan.online.episodes
        start = episode if settings.schedule.at_boundary == "reset" else 0
        horizon = (after - start) * plan.online.passes
        plan.learner.begin_task(Task(name, plan.episodes.rows_of(block)), index, horizon, resuming)

    def _task_end(self, episode: int) -> int:
        """How many episodes are over when the task that begins after so many ends."""
        return next(done for done in range(episode + 1, self.plan.online.episodes + 1) if self._boundary(done))

    def _starts(self) -> list[int]:
        """The episode before which each task begins."""
        return [0, *(done for done in range(1, self.plan.online.episodes) if self._boundary(done))]

    # Examining, saving, going on

    def _examine(self) -> None:
        entry = plain(self.plan.exam(self.plan.episodes.done))
        self.history.append(entry)
        self._write("evaluation", **entry)
        share = f"exact match {entry['exact_match']:.3f}"
        self.display.say(f"after episode {self.plan.episodes.done}: {share}")

    @property
    def best(self) -> dict[str, Any]:
        """The exam with the highest exact match, the earliest of equals."""
        return max(self.history, key=lambda entry: (entry["exact_match"], -entry["episode"]))

    def _write(self, event: str, **values: Any) -> None:
        assert self._log is not None
        self._log.write(event, **values)
        for callback in self.plan.callbacks:
            callback.event(event, plain(values))

    def _stop(self) -> None:
        done = self.plan.episodes.done
        self._save()
        raise Interrupted(f"stopped after episode {done}, and saved. Go on with: {self.again} --resume")

    def _save(self) -> None:
        assert self._log is not None
        plan = self.plan
        name = f"{PREFIX}{plan.episodes.done:05d}"
        self._write("checkpoint", name=name, episode=plan.episodes.done)
        self._log.sync()
        state = {
            "identity": plain(plan.identity),
            "episodes": plan.episodes.state_dict(),
            "history": self.history,
            "begun": self.begun,
            "ended": self.ended,
            "seen": [row.key for row in self._seen],
            "updates": plan.updates.state_dict(),
            "learner": plan.learner.state_dict(),
        }
        with replaced(self.folder.path / name) as aside:
            plan.export(aside)
            checkpoint.save(aside / STATE, state)
        self._drop()

    def _drop(self) -> None:
        """Remove all checkpoints but the newest and the best."""
        saved = self._saved()
        best = f"{PREFIX}{self.best['episode']:05d}"
        newest = saved[-1:]
        # One that was saved only because the run was stopped goes: a run leaves the same, however often it was.
        kept = [path for path in saved if self._scheduled(int(path.name.removeprefix(PREFIX)))][-KEEP:]
        for path in saved:
            if path not in (*kept, *newest) and path.name != best:
                remove(path)

    def _saved(self) -> list[Path]:
        found = [path for path in self.folder.path.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdecimal()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))

    def _newest(self, remove_torn: bool = True) -> tuple[str, dict[str, Any] | None]:
        unreadable = []
        for path in reversed(self._saved()):
            try:
                state = checkpoint.load(path / STATE)
            except NewerFormatError:
                raise
            except RunError as error:
                self.display.say(f"warning: {error}; going back to the one before it")
                unreadable.append(path)
                continue
            for torn in unreadable if remove_torn else ():
                remove(torn)  # else it would count as newer than what is saved from here on
            return path.name, state
        return "", None

    def _restore(self, state: Mapping[str, Any]) -> None:
        plan = self.plan
        self.history = list(state["history"])
        self.begun, self.ended = state["begun"], state["ended"]
        self._seen = [self._rows[key] for key in state["seen"]]
        for index, episode in enumerate(self._starts()[: self.begun]):
            self._begin(index, episode, resuming=True)
        plan.episodes.load_state_dict(state["episodes"])
        plan.updates.load_state_dict(state["updates"], self._rows)
        plan.learner.load_state_dict(state["learner"])


def online_facts(metrics: Path) -> dict[str, Any]:
    """What the episodes of a log come to: shares of right answers, rows learnt from, and median seconds."""
    lines = [json.loads(line) for line in metrics.read_bytes().splitlines() if b'"event": "episode"' in line]
    if not lines:
        return {}
    seconds = sorted(line["seconds"] for line in lines)
    middle = len(seconds) // 2
    return {
        "right_before": sum(line["right_before"] for line in lines) / len(lines),
        "right_after": sum(line["right_after"] for line in lines) / len(lines),
        "learnt_on": sum(line["rows"] for line in lines),
        "replayed": sum(line["replayed"] for line in lines),
        "steps": sum(line["steps"] for line in lines),
        "seconds_per_episode": (seconds[middle] + seconds[~middle]) / 2,
        "seconds": sum(seconds),
    }
