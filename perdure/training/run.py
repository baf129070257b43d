"""Run a plan through its stream: train, score, save; stop and go on anywhere."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from perdure.callbacks import Callback
from perdure.errors import NonFiniteError, RunError, RunFailure, StorageError
from perdure.models.adapters import count_parameters, moving
from perdure.models.regressor import Regressor
from perdure.storage import guarded, plain, write_text
from perdure.strategies.build import describe
from perdure.tracking import untracked
from perdure.training import checkpoint
from perdure.training.cells import RunScores
from perdure.training.display import Display
from perdure.training.drift import Changes
from perdure.training.fitting import OutOfMemory, ran_out, what_fits
from perdure.training.folder import RunFolder, keys_name, stage_name, step_name
from perdure.training.interrupt import Interrupted, StopRequest, stop_on_signals
from perdure.training.learner import Learner, StepResult
from perdure.training.loop import KeyedSource, Position, fit, total_steps
from perdure.training.measure import Measure, rules_of
from perdure.training.plan import PROBE, Plan, changed_settings, machine, versions
from perdure.training.record import Record
from perdure.training.regression import RegressionMeasure
from perdure.training.results import main_metric, write_results, write_scores
from perdure.training.tally import Tally
from perdure.training.telling import announcement, changed_sources, export, facts_of, row_counts
from perdure.types import Example, Task

# Settings that a run may go on with changed, but not to the same last digit.
INEXACT = {"micro_batch_size", "evaluation_batch_size", "device", "compile", "gradient_checkpointing", "evaluation"}


class Run:
    """One run of a plan in a folder.

    Args:
        plan: what to do.
        folder: where to write; a run that is there already is gone on with.
        display: what a person sees.
        again: the command that goes on with this run, for messages.
        commands: what stands for the run in its records; by default the commands before, and `again` where it
            began the run or an extension.
        callbacks: begun before the first step and told of every event; whoever gave them ends them.
    """

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        display: Display | None = None,
        again: str = "",
        commands: Sequence[str] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.plan = plan
        self.folder = folder
        self.display = display or Display()
        self.again = again
        settings = plan.settings
        self.learner = Learner(plan.model, plan.strategy, plan.objective, settings, settings.seed)
        self.measure: Measure | RegressionMeasure = (
            RegressionMeasure(self.learner)
            if plan.encoder is None
            else Measure(self.learner, plan.encoder, settings.evaluation, settings.seed, rules_of(settings))
        )
        self.sources = [
            KeyedSource(task.train, settings.batch_size, settings.seed, task.name) for task in plan.stages
        ]
        self.phases = [self.learner.phases(task, plan.epochs(task.name)) for task in plan.stages]
        self.steps = [total_steps(s, p) for s, p in zip(self.sources, self.phases, strict=True)]
        self.scores = RunScores(plan)
        self.changes = Changes()
        self.stage = 0  # stages that are trained and scored
        self.begun = 0  # tasks that the learner has begun
        self.position: Position | None = None  # within the stage; None before its first step
        self.trained = False  # this stage's training is over, its scores may be missing
        self.tally = Tally()
        self.record = Record(folder.metrics, callbacks)
        self._commands: list[str] = []
        self._given_commands = commands
        self._changes: list[dict[str, Any]] = []  # settings that the run went on with changed
        self._initial: dict[str, torch.Tensor] | None = None

    def execute(self, stages: int | None = None) -> dict[str, Any] | None:
        """Train to the end, or to where it was asked to stop.

        Args:
            stages: stop after so many, and write no results; None: all of them.

        Returns:
            What results.json holds; None where stages are left.

        Raises:
            Interrupted: asked to stop, and saved.
            NonFiniteError: the loss or gradient was; the state before the step is saved.
            StorageError: the disk refused a write.
        """
        with stop_on_signals(self.display.say) as stop:
            try:
                return self._execute(stop, len(self.plan.stages) if stages is None else stages)
            except StorageError as error:
                if not (self.folder.exists and self.again):
                    raise
                raise StorageError(f"{error} Then go on with: {self.again} --resume") from error
            finally:
                self.display.stop()
                self.record.close()

    def load(self) -> None:
        """Take up the newest checkpoint without training.

        Raises:
            RunError: there is none, or it belongs to other data.
        """
        state, warnings = self.folder.newest()
        for warning in warnings:
            self.display.say(f"warning: {warning}")
        if state is None:
            raise RunError(f"{self.folder.path}: no checkpoint here that can be read; run it first")
        self._check(state)
        self._restore_scores(state)
        self._restore(state)

    def restore(self, state: dict[str, Any]) -> None:
        """Become what a checkpoint of this plan holds, its scores included."""
        self._restore_scores(state)
        self._restore(state)

    def adopt(self, source: RunFolder) -> None:
        """Begin this run where another ended its first stage, as if it had trained that stage itself.

        The other must have trained the same model on the same rows with the same settings, under a strategy that
        leaves a first stage as plain training would have it; and so must this one.

        Raises:
            RunError: the other has no readable checkpoint there, or its stage was another.
        """
        path = source.after_stage(1) or source.checkpoints / stage_name(self.steps[0], 1)
        state = source.load(path)
        saved, own = state["identity"], self.plan.identity
        first = self.plan.stages[0].name
        if saved["base"] != own["base"] or saved["stages"].get(first) != own["stages"][first]:
            raise RunError(
                f"{path}: this stage was trained on another model or other rows; it cannot be gone on with"
            )
        self._restore_scores(state)
        scored = self.plan.scored
        others = [name for name, rows in state["scored"].items() if scored.get(name) != rows]
        self.scores.forget(others)
        if PROBE in others:
            self.scores.probe = {}
        self.tally.load_totals(state)
        learner = self.learner
        learner.begin_task(self.plan.stages[0], 0, self._horizon(0), resuming=True)
        fresh = {"strategy": learner.strategy.state_dict(), "rng": state["learner"]["rng"]}
        fresh["rng"]["strategy"] = learner.rng.get_state()
        learner.load_state_dict({**state["learner"], **fresh})
        learner.end_task()
        self.stage, self.begun = 1, 1
        with guarded(self.folder.path):
            self.folder.keys.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.metrics, self.folder.metrics)
            shutil.copyfile(source.keys / keys_name(1), self.folder.keys / keys_name(1))
        self._commands = [untracked(self.again)]
        # Where the rest of it is trained, and with how many threads, is recorded when that begins.
        recorded = {name: value for name, value in self._recorded().items() if name != "machine"}
        self.folder.write_settings(self.plan.settings, recorded)
        self._open_log(state)
        self._save(stage_name(learner.steps, 1))
        self.record.close()

    def score_again(self, row: int, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
        """The model's scores on those of these tasks (or the probe) that row `row` has; nothing is recorded.

        The model is that of the row.
        """
        scored = self.scores.scored_after(row - 1) if row else self.plan.stream.evaluations
        rows: dict[str, Sequence[Example]] = {task.name: task.evaluation for task in scored}
        if self.plan.mode != "isolated" or row == 0:
            rows[PROBE] = self.plan.probe
        return {
            name: self.measure(name, rows[name], name != PROBE, trained=row > 0) for name in tasks if rows.get(name)
        }

    def remember(self) -> None:
        """Have the hidden states of all rows at hand, where the model has a frozen backbone that keeps them."""
        model = self.plan.model
        if not isinstance(model, Regressor) or model.cache is None:
            return
        tasks = (*self.plan.stages, *self.plan.stream.evaluations)
        rows = [row.x for task in tasks for row in (*task.train, *task.evaluation) if row.x is not None]
        with self.display.counting("hidden states") as tell:
            new = model.remember(rows, tell)
        if new:
            self.display.say(f"hidden states of {new:,} rows worked out, kept in {model.cache.folder}")
        if model.cache.unwritten:
            self.display.say(f"warning: {model.cache.unwritten}")

    def _check(self, state: dict[str, Any]) -> None:
        self.folder.refuse_changed(self.plan.differences(state))

    def _execute(self, stop: StopRequest, stages: int) -> dict[str, Any] | None:
        plan = self.plan
        self.folder.sweep()
        state, warnings = self.folder.newest() if self.folder.exists else (None, [])
        for warning in warnings:
            self.display.say(f"warning: {warning}")
        if state is not None:
            self._check(state)
        if warnings:
            self.folder.forget_final()
        if state is None:
            with guarded(self.folder.path):
                self.folder.path.mkdir(parents=True, exist_ok=True)
            self._commands = [untracked(self.again)]
        else:
            recorded = self.folder.recorded()
            self._commands = recorded.get("commands", [])
            before = self.folder.settings().model_dump(mode="json", include=INEXACT)
            step = state["learner"]["steps"]
            self._changes = recorded.get("changes", []) + [
                {"step": step, "setting": change}
                for change in changed_settings(before, plan.settings.model_dump(mode="json", include=INEXACT))
            ]
            for what, now in (("versions", versions()), ("machine", machine())):
                for change in changed_settings(recorded.get(what, now), now):
                    self.display.say(f"warning: {what}: {change}; results may differ in their last digits")
            for task in changed_sources(recorded.get("data") or {}, plan.data):
                self.display.say(
                    f"warning: task {task}: its data files were changed since; the rows that are used are the same"
                )
            if state["stage"] < len(plan.stages):
                if self.folder.finished:
                    self._commands.append(untracked(self.again))  # an extension begins
                self.folder.reopen(state["learner"]["steps"], state["stage"])
        if self._given_commands is not None:
            self._commands = list(self._given_commands)
        self.folder.write_settings(plan.settings, self._recorded())
        self._open_log(state)
        self.record.begin(facts_of(self.folder, plan.settings, self._recorded()))
        for event in self._changes:
            if state is not None and event["step"] >= state["learner"]["steps"]:  # the log was cut there
                inexact = "bit-exactness ends here, since sums are rounded otherwise, and dropout drops others"
                scored = "the scores after it are taken otherwise"
                what = scored if event["setting"].startswith("evaluation.") else inexact
                self.display.say(f"warning: {event['setting']}: {what}")
                self.record.write("changed", **event)
        self.changes.begin(plan.model)
        if plan.mode == "isolated":
            self._initial = {name: value.detach().clone() for name, value in moving(plan.model).items()}
        if state:
            self._restore_scores(state)
        for line in announcement(plan):
            self.display.say(line)
        self.remember()
        self._score(0, plan.stream.evaluations, stop)
        if state:
            self._restore(state)
            self.display.say(f"going on after step {self.learner.steps} of {sum(self.steps)}")
            if self.stage == len(plan.stages):
                return self._finish()
            if self.stage and self.position is None and not self.trained:
                # A task that has just joined the stream has no score yet under the model that is about to learn it.
                self._score(self.stage, self.scores.scored_after(self.stage - 1), stop)
        self.folder.drop_evaluations()
        self.display.start(sum(self.steps), self.learner.steps, plan.settings.strategy)
        while self.stage < stages:
            self._train_stage(stop)
            self._complete_stage(stop)
        return self._finish() if self.stage == len(plan.stages) else None

    def _open_log(self, state: Mapping[str, Any] | None) -> None:
        mark = self.record.open(state["mark"] if state else None)
        if state and mark is None:
            self.display.say(
                f"warning: {self.folder.metrics} lacks the mark of the checkpoint; the log starts afresh"
            )
        self.tally.seconds = float(mark.get("seconds", 0.0)) if mark else 0.0

    def _train_stage(self, stop: StopRequest) -> None:
        settings, learner, i = self.plan.settings, self.learner, self.stage
        task = self.plan.stages[i]
        if self.trained:
            return
        if self.begun <= i:
            if self._initial is not None:
                self._back_to_start()
            self.changes.begin_stage(learner, again=self._initial is not None)
            learner.begin_task(task, i, self._horizon(i))
            self.begun = i + 1
            self.position = Position()
            self.record.tell("task", step=learner.steps, task=task.name, stage=i + 1)
        clock = time.perf_counter()
        window = [clock, 0.0]
        full = False
        try:
            for position, result in fit(learner, self.sources[i], self.phases[i], self.position):
                self.position = position
                now = time.perf_counter()
                speed = result.tokens / max(now - clock, 1e-9)
                self.tally.seconds += now - clock
                clock = now
                window[1] = 0.9 * window[1] + 0.1 * speed if window[1] else speed
                self.tally.count(result, learner.steps, first=i == 0)
                if learner.steps % settings.log_every == 0 or result.skipped:
                    self._log_step(task, result, speed)
                self.display.step(task.name, result, window[1])
                if self._measures_here():
                    self._track()
                    clock = time.perf_counter()
                if settings.evaluation.each_epoch and position.batch == len(self.sources[i]):
                    self._end_epoch(task, position)
                    clock = time.perf_counter()
                if stop:
                    self._stop()
                if settings.checkpoint_every and learner.steps % settings.checkpoint_every == 0:
                    self._save(step_name(learner.steps))
                    self.folder.drop_steps(settings.checkpoint_keep)
                    clock = time.perf_counter()
        except NonFiniteError as error:
            if learner.steps:
                self._save(step_name(learner.steps))
            raise NonFiniteError(f"{error} Changed settings need a new --out.") from error
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            full = True
        if full:
            # Only here: until the handler is left, the error holds all that the step had made.
            raise self._out_of_memory()
        self.display.doing(f"after {task.name}")
        learner.end_task()
        self.tally.seconds += time.perf_counter() - clock
        self.trained = True
        self.record.tell("task_end", step=learner.steps, task=task.name, stage=i + 1)

    def _out_of_memory(self) -> OutOfMemory:
        """What to raise where a step did not fit; the state before it is saved, if it is still that."""
        saved = self.learner.whole and bool(self.learner.steps)
        if saved:
            self._save(step_name(self.learner.steps))
        rows = [row for stage in self.plan.stages[: self.stage + 1] for row in stage.train]
        again = f"{self.again} --resume" if self.again else ""
        return OutOfMemory(what_fits(self.learner, rows), self.learner.steps, again)

    @contextlib.contextmanager
    def _scoring(self) -> Iterator[None]:
        """Name the way out where held-out rows do not fit into memory."""
        size = self.plan.settings.evaluation_batch_size
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if self.begun:
                self._save(step_name(self.learner.steps))
            again = f" Go on with: {self.again} --resume --set evaluation_batch_size={max(1, size // 4)}"
            raise RunFailure(
                f"out of memory while scoring held-out rows, {size} at once (evaluation_batch_size). A smaller "
                "number gives the same scores but for their last digits." + (again if self.again else "")
            ) from error

    def _measures_here(self) -> bool:
        """Whether the loss is to be measured within the stage; after its last step it is anyway."""
        every = self.plan.settings.evaluation.every
        done = self.learner.steps - sum(self.steps[: self.stage])
        return bool(every) and done % (every or 1) == 0 and done < self.steps[self.stage]

    def _track(self) -> None:
        """Write every task's loss to the log, on the way through a stage."""
        for task in self.scores.scored_after(self.stage):
            if task.evaluation:
                with self._scoring():
                    found = self.learner.score_both(task.evaluation)
                self.record.write(
                    "evaluation", step=self.learner.steps, stage=self.stage + 1, task=task.name, metrics=found
                )

    def _end_epoch(self, task: Task, position: Position) -> None:
        """Write the held-out scores of the task under way to the log."""
        if task.evaluation:
            with self._scoring():
                found = self.learner.score_both(task.evaluation)
            self.record.write(
                "epoch",
                step=self.learner.steps,
                stage=self.stage + 1,
                task=task.name,
                phase=position.phase,
                epoch=position.epoch,
                metrics=found,
            )

    def _complete_stage(self, stop: StopRequest) -> None:
        row = self.stage + 1
        self._check_there()
        self._score(row, self.scores.scored_after(self.stage), stop)
        if line := self.scores.line(row):
            self.display.say(f"after {self.plan.stages[self.stage].name}: {line}")
        self._measure_changes(row)
        write_text(self.folder.keys / keys_name(row), self.tally.end_stage())
        self.stage, self.trained, self.position = row, False, None
        self._save(stage_name(self.learner.steps, row))
        self.folder.drop_steps(0)
        write_scores(self.folder.path, self.scores.matrices, main_metric(self.scores.matrices))
        if stop and self.stage < len(self.plan.stages):
            raise Interrupted(self._goodbye())

    def _measure_changes(self, row: int) -> None:
        found = self.changes.measure(row, self.learner)
        if found is None:
            self.display.say(
                f"warning: the drift of stage {row} is unknown: the checkpoint before it cannot be read"
            )
        else:
            self.record.write(
                "drift", step=self.learner.steps, task=self.plan.stages[self.stage].name, stage=row, **found
            )

    def _where_it_began(self) -> Mapping[str, torch.Tensor] | None:
        """The weights that a stage began with which was stopped in its middle."""
        if not self.stage or self.plan.mode == "isolated":
            return self.changes.start
        path = self.folder.after_stage(self.stage)
        with contextlib.suppress(RunError):
            return None if path is None else checkpoint.load(path)["learner"]["model"]
        return None

    def _score(self, stage: int, tasks: Sequence[Task], stop: StopRequest) -> None:
        """Measure what is not measured yet after so many stages; measured cells stay."""
        row = self.scores.row(stage)
        for task in tasks:
            if not task.evaluation or self.scores.measured(row, task.name):
                continue
            if stop:
                self._stop()
            self.display.doing(f"scoring {task.name}")
            with self._scoring():
                found = self.measure(task.name, task.evaluation, trained=row > 0)
                if isinstance(self.measure, RegressionMeasure) and self._learnt(task, stage):
                    found |= self.measure.of_training(task)
            self.scores.record(row, task.name, found)
            self.record.write("evaluation", step=self.learner.steps, row=row, task=task.name, metrics=found)
        if self.scores.wants_probe(stage):
            self.display.doing("scoring the general probe")
            with self._scoring():
                found = self.measure(PROBE, self.plan.probe, told=False, trained=row > 0)
            self.scores.record_probe(row, found)
            self.record.write("probe", step=self.learner.steps, row=row, metrics=found)

    def _learnt(self, task: Task, stage: int) -> bool:
        """Whether a task was trained on by the first so many stages."""
        return bool(stage) and (
            self.plan.mode == "joint" or task.name in [done.name for done in self.plan.stages[:stage]]
        )

    def _horizon(self, stage: int) -> int | None:
        schedule = self.plan.settings.schedule
        if schedule.at_boundary == "reset":
            return self.steps[stage]
        # Alone, a task is the whole stream.
        return schedule.total_steps or (self.steps[stage] if self.plan.mode == "isolated" else sum(self.steps))

    def _back_to_start(self) -> None:
        assert self._initial is not None
        with torch.no_grad():
            own: dict[str, torch.Tensor] = dict(self.plan.model.named_parameters())
            own |= dict(self.plan.model.named_buffers())
            for name, value in self._initial.items():
                own[name].copy_(value)
        self.learner.optimizer = None
        self.learner.schedule_step = 0

    def _log_step(self, task: Task, result: StepResult, speed: float) -> None:
        if result.skipped:
            self.display.say(f"warning: {result.skipped}")
            self.record.write("skipped", step=self.learner.steps, task=task.name, reason=result.skipped)
            return
        self.record.write(
            "step",
            step=self.learner.steps,
            task=task.name,
            stage=self.stage + 1,
            epoch=self.position.epoch if self.position else 0,
            **({"phase": self.position.phase} if self.position and self.position.phase else {}),
            loss=result.loss,
            lr=result.lr,
            tokens=result.tokens,
            tokens_per_second=round(speed, 1),
            gradient_norm=result.gradient_norm,
            replayed=result.replayed_rows,
            **result.logged,
        )

    # Stopping, saving, going on

    def _stop(self) -> None:
        if self.begun:
            self._save(step_name(self.learner.steps))
        raise Interrupted(self._goodbye())

    def _goodbye(self) -> str:
        if not self.folder.saved():
            return f"stopped before the first step; nothing to save. Start again with: {self.again} --resume"
        return f"stopped after step {self.learner.steps}, and saved. Go on with: {self.again} --resume"

    def _check_there(self) -> None:
        """Put back what was removed while the run was at work, unless that is all of it."""
        if not self.folder.path.is_dir():
            raise StorageError(f"{self.folder.path}: the run's folder was removed while it was being trained.")
        if not self.folder.exists:
            self.display.say(f"warning: {self.folder.config} was removed; it is written again")
            self.folder.write_settings(self.plan.settings, self._recorded())

    def _save(self, name: str) -> None:
        self._check_there()
        between = self.position is None and not self.trained
        keeps = not between or self.plan.settings.optimizer.at_boundary == "continue"
        # Times and the log's length differ from run to run; they stand in the log, so that equal runs have equal
        # checkpoints to the last byte.
        self.record.write("checkpoint", name=name, step=self.learner.steps, seconds=round(self.tally.seconds, 3))
        self.record.sync()
        self.folder.save(
            name,
            {
                "identity": self.plan.identity,
                "scored": self.plan.scored,
                "built": describe(self.plan.strategy),
                "stage": self.stage,
                "begun": self.begun,
                "trained": self.trained,
                "position": None
                if self.position is None
                else [self.position.phase, self.position.epoch, self.position.batch],
                **self.scores.state_dict(),
                "changes": self.changes.state_dict(),
                **self.tally.state_dict(),
                "mark": name,
                "learner": self.learner.state_dict(optimizer=keeps),
            },
        )

    def _restore_scores(self, state: dict[str, Any]) -> None:
        self.scores.load_state_dict(state)
        self.changes.load_state_dict(state.get("changes", {}))

    def _restore(self, state: dict[str, Any]) -> None:
        self.stage, self.begun, self.trained = state["stage"], state["begun"], state["trained"]
        self.tally.load_state_dict(state)
        self.position = None if state["position"] is None else Position(*state["position"])
        for i in range(self.begun):
            self.learner.begin_task(self.plan.stages[i], i, self._horizon(i), resuming=True)
        self.learner.load_state_dict(state["learner"])
        if self.begun > self.stage:
            self.changes.before = self._where_it_began()

    # Telling

    def _recorded(self) -> dict[str, Any]:
        return {
            "commands": self._commands,
            "changes": self._changes,
            "recipe_folder": None if self.plan.folder is None else str(self.plan.folder),
            "versions": versions(),
            "machine": machine(),
            "data": plain(self.plan.data),
        }

    def _finish(self) -> dict[str, Any]:
        self.display.stop()
        plan, settings = self.plan, self.plan.settings
        trainable, total = count_parameters(plan.model)
        write_scores(self.folder.path, self.scores.matrices, main_metric(self.scores.matrices))
        export(plan, self.folder)
        facts = {
            "name": settings.name or self.folder.path.name,
            "strategy": settings.strategy,
            "task_identity": "told" if plan.strategy.wants_task_ids else None,
            "model": settings.model,
            "tuning": settings.tuning,
            "seed": settings.seed,
            "tasks": [task.name for task in plan.stream.evaluations],
            "stages": [task.name for task in plan.stages],
            "command": " && ".join(filter(None, self._commands)) or None,
            "finished": True,
            "steps": self.learner.steps,
            "skipped": self.tally.skipped,
            "memory": plan.strategy.kept() or None,
            "seconds": round(self.tally.seconds, 3),
            "parameters": {"trainable": trainable, "total": total},
            "probe": self.scores.probe,
            "replay": self.tally.replay(),
            **self.changes.results(),
            "data": {fact["name"]: row_counts(fact) for fact in plan.data["tasks"]},
            "scored": plan.scored,
            "versions": versions(),
            "machine": machine(),
        }
        matrices = self.scores.matrices
        beside: dict[str, dict[str, Any]] = {}
        if isinstance(self.measure, RegressionMeasure):
            tasks = plan.stream.evaluations
            every = [task.name for task in tasks]
            seen = [every[:i] for i in range(1, len(every) + 1)] if plan.mode == "sequential" else [every]
            beside = self.measure.summaries(matrices, tasks, seen)
        results = write_results(self.folder.path, facts, matrices, main_metric(matrices), beside)
        # Last of all: an extension that could not write its results must not look finished by the older ones.
        self.folder.close(self.learner.steps, self.stage)
        return results
