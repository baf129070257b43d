"""Reads run folders into plain values; knows no model, so that a report needs only what a run left behind."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perdure.errors import RunError

FORMAT = 1
RESULTS, EVENTS, CONFIG = "results.json", "metrics.jsonl", "config.yaml"
# Ends the name of a metric for which a run's strategy was not told the task of each row, where it otherwise is.
INFERRED = "_inferred"
# Ends the name of a metric that was measured on rows that were trained on: it says nothing of what was learnt.
TRAINING = "_training"
# Only asked where a run left no results.json, which states the direction of every metric.
LOWER_IS_BETTER = ("loss", "error", "rmse", "mse", "mae", "perplexity")


@dataclass(frozen=True, slots=True)
class Scores:
    """The score matrix of one metric: `values` is [rows, T] with NaN where nothing was measured.

    Row 0 is before training, row t after `stages[t - 1]`; columns are `tasks`.
    """

    metric: str
    higher_is_better: bool
    tasks: tuple[str, ...]
    stages: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    def trained(self, task: int) -> int | None:
        """The row after the stage that trained a task; a lone stage with no task's name trained them all."""
        if self.tasks[task] in self.stages:
            return self.stages.index(self.tasks[task]) + 1
        return 1 if len(self.stages) == 1 and self.stages[0] not in self.tasks else None

    def before(self, task: int) -> float:
        """Score before any training."""
        return self.values[0][task]

    def learnt(self, task: int) -> float:
        """Score after its own training; NaN if it was not trained yet."""
        row = self.trained(task)
        return math.nan if row is None else self.values[row][task]

    def final(self, task: int) -> float:
        """Score in the last row."""
        return self.values[-1][task]

    def changed(self, task: int) -> float:
        """What became of its score since it was learnt; NaN where no stage came after any."""
        return self.final(task) - self.learnt(task) if self.outlasted() else math.nan

    def outlasted(self) -> bool:
        """Whether a stage came after one that trained a task with this metric: else nothing could be forgotten."""
        last = len(self.values) - 1
        return any(
            (self.trained(i) or last) < last and not math.isnan(self.learnt(i)) for i in range(len(self.tasks))
        )

    def transfer(self) -> tuple[tuple[float, ...], ...]:
        """What training each task did to each, [T, T]: how much better it was after that stage than before it.

        Empty unless every stage trained one task, and there are several.
        """
        if self.tasks != self.stages or len(self.tasks) < 2:
            return ()
        sign = 1 if self.higher_is_better else -1
        return tuple(
            tuple(sign * (now - before) for before, now in zip(*rows, strict=True))
            for rows in zip(self.values, self.values[1:], strict=False)
        )

    def blank(self) -> bool:
        """Whether there is nothing to draw: every score that was measured is 0."""
        return not any(value and not math.isnan(value) for row in self.values for value in row)

    def mean_seen(self) -> list[float]:
        """Mean score over the tasks trained so far, for rows 1 and up."""
        rows = [self.trained(i) for i in range(len(self.tasks))]
        return [
            mean(self.values[t][i] for i, row in enumerate(rows) if row is not None and row <= t)
            for t in range(1, len(self.values))
        ]


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder. What an unfinished run has not written yet is empty; `scores` begin with the main metric."""

    path: Path
    name: str
    results: Mapping[str, Any]
    scores: Mapping[str, Scores]
    summaries: Mapping[str, Mapping[str, Any]]
    steps: tuple[Mapping[str, Any], ...] = ()
    evaluations: tuple[Mapping[str, Any], ...] = ()
    probe: Mapping[str, Sequence[float]] = field(default_factory=dict)
    drift: tuple[Mapping[str, Any] | None, ...] = ()
    usage: tuple[Mapping[str, Mapping[str, int]], ...] = ()
    config: str = ""
    skipped: int = 0
    unreadable: int = 0

    @property
    def finished(self) -> bool:
        """Whether the run says that it reached its end."""
        return bool(self.results.get("finished"))

    @property
    def strategy(self) -> str:
        """Name of the strategy, or of the stream where that is joint or isolated."""
        return str(self.results.get("strategy", ""))

    @property
    def told(self) -> bool:
        """Whether its strategy was told the task of each row that it was scored on."""
        return self.results.get("task_identity") == "told" or any(m.endswith(INFERRED) for m in self.scores)

    @property
    def held_out(self) -> tuple[str, ...]:
        """The metrics that were measured on rows that no task trains, the main one first."""
        return tuple(metric for metric in self.scores if not on_training_rows(metric))

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages, of those that were begun where the run has no results yet."""
        return tuple(self.results.get("stages") or [name for name, _ in self.boundaries()])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks, in order."""
        names: dict[str, None] = dict.fromkeys(str(task) for task in self.results.get("tasks") or ())
        for scores in self.scores.values():
            names.update(dict.fromkeys(scores.tasks))
        return tuple(names)

    @property
    def num_steps(self) -> int | None:
        """Steps that were taken, skipped ones included."""
        return self.results.get("steps", self.steps[-1]["step"] if self.steps else None)

    def used(self) -> Mapping[str, Mapping[str, int]]:
        """How many weights of each layer belong to each task at the end; empty where weights are shared."""
        return self.usage[-1] if self.usage else {}

    def boundaries(self) -> list[tuple[str, int]]:
        """Each stage's name and the step at which it ended (so far), in order."""
        ends: dict[int, int] = {}
        names: dict[int, dict[str, None]] = {}
        for event in self.steps:
            stage = event.get("stage")
            if isinstance(stage, int):
                ends[stage] = max(ends.get(stage, 0), event["step"])
                names.setdefault(stage, {})[str(event.get("task", ""))] = None
        return [(_stage_name(names[stage], stage), ends[stage]) for stage in sorted(ends)]


def read_runs(paths: Iterable[Path | str]) -> list[Run]:
    """Read several run folders and give each a name of its own; see `read_run`."""
    runs = [read_run(path) for path in paths]
    if not runs:
        raise RunError("no run folder was given; name at least one, for instance runs/demo/naive")
    names = [run.name for run in runs]
    taken: set[str] = set()
    for i, run in enumerate(runs):
        name = run.name
        if names.count(name) > 1:
            resolved = run.path.resolve()
            name = f"{resolved.parent.name}/{resolved.name}"
        label, copy = name, 2
        while label in taken:
            label, copy = f"{name} ({copy})", copy + 1
        taken.add(label)
        runs[i] = replace(run, name=label)
    return runs


def read_run(path: Path | str) -> Run:
    """Read one run folder, finished or not.

    Raises:
        RunError: it is no run folder, or its results are of a newer format or not as perdure writes them.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file, not a run folder" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}; give the folder that --out named")
    if not any((path / name).is_file() for name in (RESULTS, EVENTS)):
        inside = sorted(p.name for p in path.iterdir() if any((p / name).is_file() for name in (RESULTS, EVENTS)))
        hint = f" It holds runs: give them by name ({', '.join(inside[:5])})." if inside else ""
        raise RunError(f"{path} is not a run folder: it has neither {RESULTS} nor {EVENTS}.{hint}")
    results = read_results(path / RESULTS)
    if results.get("recipe") == "arena":
        raise RunError(
            f"{path} is an arena run, which this page does not show: `perdure arena compare {path}` writes its "
            "figures and tables"
        )
    events, unreadable = _read_events(path / EVENTS)
    try:
        return _build(path, results, events, unreadable)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunError(
            f"{path / RESULTS} is not as perdure writes it ({error!r}); rebuild it from the run"
        ) from error


def number(value: Any) -> float:
    """A float from JSON, where null is NaN and an infinity is its name."""
    return math.nan if value is None else float(value)


def on_training_rows(metric: str) -> bool:
    """Whether a metric was measured on rows that were trained on, and so is no result."""
    return metric.removesuffix(INFERRED).endswith(TRAINING)


def mean(values: Iterable[float]) -> float:
    """Mean over what was measured; NaN over nothing."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _build(path: Path, results: dict[str, Any], events: list[dict[str, Any]], unreadable: int) -> Run:
    steps = _latest(event for event in events if event.get("event") == "step")
    evaluations = tuple(event for event in events if event.get("event") == "evaluation")
    scores = {
        metric: Scores(
            metric,
            bool(state["higher_is_better"]),
            tuple(str(task) for task in state["tasks"]),
            tuple(str(stage) for stage in state["stages"]),
            tuple(tuple(number(value) for value in row) for row in state["values"]),
        )
        for metric, state in (results.get("scores") or {}).items()
    } or _scores_from_events(steps, evaluations)
    for table in scores.values():
        if len(table.values) != len(table.stages) + 1 or any(len(r) != len(table.tasks) for r in table.values):
            raise ValueError(f"the scores of {table.metric} do not fit their tasks and stages")
    order = sorted(scores, key=lambda metric: (_place(metric, results.get("main_metric")), metric))
    stated = results.get("metrics") or {}
    return Run(
        path=path,
        name=str(results.get("name") or path.resolve().name),
        results=results,
        scores={metric: scores[metric] for metric in order},
        summaries={metric: stated.get(metric) or _measured(scores[metric]) for metric in order},
        steps=steps,
        evaluations=evaluations,
        probe=_probe(results, events),
        drift=_drift(results, events),
        usage=tuple(results.get("usage") or ()),
        config=(path / CONFIG).read_text("utf-8", "replace") if (path / CONFIG).is_file() else "",
        skipped=results.get("skipped", len({e.get("step") for e in events if e.get("event") == "skipped"})),
        unreadable=unreadable,
    )


def _place(metric: str, main: str | None) -> int:
    """Where a metric stands, whatever the writer's order: the main one first, the loss last, behind all of them
    what was measured on training rows. A run without results has not said which is its main one."""
    own = metric.removesuffix(INFERRED)
    if on_training_rows(metric):
        return 6 + _place(own.removesuffix(TRAINING), main)
    first = (main, "exact_match", "accuracy", "r2")
    return first.index(own) if own in first else 4 + (own == "loss")


def read_results(path: Path) -> dict[str, Any]:
    """What results.json holds; nothing where there is none."""
    if not path.is_file():
        return {}
    try:
        results = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} cannot be read as JSON ({error}); it can be rebuilt by resuming the run") from error
    if not isinstance(results, dict):
        raise RunError(f"{path} must hold a JSON object, got {type(results).__name__}")
    if isinstance(results.get("format"), int) and results["format"] > FORMAT:
        raise RunError(
            f"{path} has format {results['format']}, this perdure reads up to {FORMAT}; update perdure to read it"
        )
    return results


def _read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events of metrics.jsonl and how many lines could not be read (a killed run leaves half a line)."""
    events, unreadable = [], 0
    if path.is_file():
        for line in path.read_text("utf-8", "replace").split("\n"):
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if isinstance(event, dict) and isinstance(event.get("step", 0), int):
                events.append(event)
            elif line.strip():
                unreadable += 1
    return events, unreadable


def _latest(events: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """One event a step, in order: a resumed run repeats those after its checkpoint, and the last word counts."""
    by_step = {event["step"]: event for event in events if "step" in event}
    return tuple(by_step[step] for step in sorted(by_step))


def _scores_from_events(
    steps: Sequence[Mapping[str, Any]], evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Scores]:
    """The matrices of a run that has no results yet, as far as it was measured."""
    cells: dict[str, dict[tuple[int, str], float]] = {}
    for event in evaluations:
        if isinstance(event.get("row"), int):
            for metric, value in event["metrics"].items():
                cells.setdefault(metric, {})[event["row"], str(event["task"])] = number(value)
    trained: dict[int, dict[str, None]] = {}
    for step in steps:
        trained.setdefault(step.get("stage", 0), {})[str(step.get("task", ""))] = None
    out = {}
    for metric, found in cells.items():
        tasks = tuple(dict.fromkeys(task for _, task in found))
        rows = 1 + max(row for row, _ in found)
        out[metric] = Scores(
            metric,
            metric.removesuffix(INFERRED).removesuffix(TRAINING) not in LOWER_IS_BETTER,
            tasks,
            tuple(_stage_name(trained.get(row, {}), row) for row in range(1, rows)),
            tuple(tuple(found.get((row, task), math.nan) for task in tasks) for row in range(rows)),
        )
    return out


def _stage_name(tasks: Mapping[str, None], stage: int) -> str:
    """A stage is called by the task that it trained; several at once are joint training."""
    return next(iter(tasks)) if len(tasks) == 1 else "joint" if tasks else f"stage {stage}"


def _measured(scores: Scores) -> dict[str, Any]:
    """What can be said of an unfinished run; the rest waits for its results.json."""
    columns = range(len(scores.tasks))
    return {
        "average": mean(scores.values[-1]),
        "learning": mean(scores.learnt(i) for i in columns),
        "higher_is_better": scores.higher_is_better,
    }


def _drift(results: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any] | None, ...]:
    """Of each stage; an older run has measured none."""
    if results:
        return tuple(results.get("drift") or ())
    by_stage = {event["stage"]: event for event in events if event.get("event") == "drift"}
    return tuple(by_stage.get(stage) for stage in range(1, max(by_stage, default=0) + 1))


def same(one: Scores, other: Scores) -> bool:
    """Whether two tables hold the same numbers."""
    return [[repr(x) for x in row] for row in one.values] == [[repr(x) for x in row] for row in other.values]


def _probe(results: Mapping[str, Any], events: Iterable[Mapping[str, Any]]) -> dict[str, list[float]]:
    stated = results.get("probe")
    if stated:
        return {metric: [number(value) for value in values] for metric, values in stated.items()}
    rows: dict[str, dict[int, float]] = {}
    for event in events:
        if event.get("event") == "probe" and isinstance(event.get("row"), int):
            for metric, value in event["metrics"].items():
                rows.setdefault(metric, {})[event["row"]] = number(value)
    return {m: [found.get(row, math.nan) for row in range(max(found) + 1)] for m, found in rows.items()}
