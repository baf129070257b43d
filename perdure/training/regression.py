"""A run that regresses yields of reactions: its plan, and what is measured of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perdure.errors import ConfigError, DataError
from perdure.evaluation.matrix import ScoreMatrix
from perdure.evaluation.pooled import pooled
from perdure.evaluation.score import TRAINING
from perdure.models.adapters import add_lora
from perdure.models.backbone import load_backbone, width_of
from perdure.models.heads import make_head
from perdure.models.hidden import HiddenStates
from perdure.models.load import LanguageModel, identify
from perdure.models.regressor import Regressor
from perdure.order import fingerprint
from perdure.streams import reactions
from perdure.streams.reactions.encode import TOO_LONG, ReactionEncoder
from perdure.streams.reactions.table import COPY
from perdure.streams.spec import TaskSpec, locate
from perdure.streams.stream import Stream
from perdure.training.learner import Learner
from perdure.training.settings import RunSettings
from perdure.types import Example, Segment, Task


def make_regressor(settings: RunSettings) -> tuple[LanguageModel, Regressor]:
    """The backbone that the settings name, and the model on it that is to be trained."""
    import torch

    # A tokenizer's own threads slow the training threads down on small machines, and warn after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.manual_seed(settings.seed)
    language = load_backbone(settings.model)
    head = settings.head
    made = make_head(head.type, width_of(language.model), head.heads, head.hidden, head.dropout, head.ensemble)
    if settings.tuning == "head":
        return language, Regressor(language.model, made, HiddenStates(identify(language)))
    if settings.tuning == "lora":
        lora = settings.lora
        tuned = add_lora(language.model, lora.r, lora.alpha, lora.dropout, lora.targets, generates=False)
        return language, Regressor(tuned, made)
    language.model.requires_grad_(True)
    return language, Regressor(language.model, made)


def pin_similarity(settings: RunSettings) -> RunSettings:
    """The settings with the measure of likeness that "auto" stands for here.

    A run that goes on must order its tasks as it began, whether or not RDKit is still there.
    """
    spec = settings.stream.reactions
    if spec is None or spec.order != "similarity" or spec.similarity != "auto":
        return settings
    chosen = spec.model_copy(update={"similarity": "morgan" if reactions.has_rdkit() else "grams"})
    return settings.model_copy(update={"stream": settings.stream.model_copy(update={"reactions": chosen})})


def refuse_known(settings: RunSettings, file: str, folder: Path | None) -> None:
    """Refuse a table of a new task that holds nothing but rows that the run's tables have, yields included.

    Args:
        settings: of the run, before the new task.
        file: the new table.
        folder: where relative paths of the run are looked up after `settings.data`.
    """
    spec = settings.stream.reactions
    assert spec is not None
    places = [Path(place) for place in (settings.data, folder) if place is not None]
    names = [spec.file]
    names += [name for one in settings.extensions for name in (one.train, one.evaluation) if name]
    found = [locate(name, places) for name in (*names, file)]
    tables = [place for place in found if isinstance(place, Path)]
    if len(tables) < len(found):
        return  # what is missing is told by the plan
    known: set[Any] = set()
    for place in tables[:-1]:
        table = reactions.read(spec, place, fixed=True)
        spec = spec.model_copy(update={"yield_scale": table.facts["scale"]})
        known.update(_content(row) for row in table.rows if fingerprint(row.key) not in settings.erased)
    rows = reactions.read(spec, tables[-1], fixed=True).rows
    if all(_content(row) in known for row in rows):
        raise DataError(
            f"{file}: the run's tables have all rows of it ({len(rows)}) already, yields included; give a table of "
            "new ones"
        )


def _content(row: reactions.Reaction) -> Any:
    return reactions.normal(row.smiles), row.value, row.task, tuple(sorted(row.fields.items()))


class ReactionData:
    """The stream of a run's reactions, encoded, and the facts about them.

    Args:
        settings: of the run.
        encoder: reactions to tokens.
        folder: where relative paths are looked up after `settings.data`.
    """

    def __init__(self, settings: RunSettings, encoder: ReactionEncoder, folder: Path | None) -> None:
        assert settings.stream.reactions is not None
        self.settings, self.encoder = settings, encoder
        self.spec = settings.stream.reactions
        self.places = [Path(place) for place in (settings.data, folder) if place is not None]
        self.erased = frozenset(settings.erased)
        self.facts: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.scale = self.spec.yield_scale

    def stream(self) -> Stream:
        """The tasks of the table, in the settings' order, and behind them those of the extensions."""
        tasks = self._tasks(self.spec, self._find(self.spec.file))
        stream = Stream(tasks)
        for extension in self.settings.extensions:
            for task in self.extension(extension, stream):
                if task.name in stream.names:
                    raise ConfigError(
                        f"the stream has a task {task.name!r} already; give the new one another --name"
                    )
                stream = stream.extend(task)
        return stream

    def extension(self, spec: TaskSpec, before: Stream) -> list[Task]:
        """The tasks of a file that came later: one for each group of its rows, or one of that name.

        No row of them is trained on that an earlier task is scored on, and none is scored on that was trained on.
        """
        # By its own yields, a poor task's percents would pass for fractions.
        own = self.spec.model_copy(update={"file": spec.train, "order": "file", "yield_scale": self.scale})
        place = self._find(spec.train)
        names = list(reactions.tasks_of(reactions.read(own, place, fixed=True).rows))
        single = len(names) == 1
        # A pair that the stream has already comes again under the new task's name.
        taken = {name: f"{spec.name}/{name}" for name in names if name in before.names}
        if not single and spec.evaluation is not None:
            raise DataError(f"{place}: holds {len(names)} tasks, so that one evaluation file cannot be for all")
        known = {text: task.name for task in before for row in task.train if (text := _text(row))}
        held = {_text(row) for task in before.evaluations for row in task.evaluation}
        whole = own if spec.evaluation is None else own.model_copy(update={"holdout": 0.0})
        tasks = self._tasks(whole, place, rename={names[0]: spec.name} if single else taken)
        if spec.evaluation is not None:
            scored = own.model_copy(update={"file": spec.evaluation, "holdout": 0.0, "augment": 0})
            rows = reactions.read(scored, self._find(spec.evaluation), fixed=True).rows
            evaluation, _ = self._encode([*rows])
            train = self._without(tasks[0].train, {_text(row) for row in evaluation})
            tasks = [Task(tasks[0].name, train, [row.but(task=tasks[0].name) for row in evaluation])]
            self.facts[-1]["evaluation"]["rows"] = len(rows)
        found = []
        for task, fact in zip(tasks, self.facts[-len(tasks) :], strict=True):
            evaluation = [row for row in task.evaluation if _text(row) not in known]
            train = self._without(task.train, held)
            if not train:
                raise DataError(f"{place}: task {task.name!r} has no training rows that are not scored elsewhere")
            again, twice = (
                sum(_text(row) in met for row in rows) for met, rows in ((known, train), (held, evaluation))
            )
            if again:
                fact["notes"].append(f"task {task.name}: {again} of {len(train)} rows were trained on before")
            if twice:
                fact["notes"].append(
                    f"task {task.name}: {twice} of {len(evaluation)} held-out rows are held out in an earlier task "
                    "too, and count twice in what is said of all rows"
                )
            fact["train"] |= {"kept": len(train), "overlapping": len(task.train) - len(train)}
            fact["evaluation"] |= {
                "kept": len(evaluation),
                "overlapping": len(task.evaluation) - len(evaluation),
            }
            found.append(Task(task.name, train, evaluation))
        return found

    def every_row(self) -> list[Example]:
        """The rows of all files, also those that the split or their length leaves out; not those erased."""
        files = [self.spec.file]
        files += [file for one in self.settings.extensions for file in (one.train, one.evaluation) if file]
        rows = [row for file in files for row in reactions.read(self.spec, self._find(file)).rows]
        return [
            Example(row.key, row.task, (Segment(row.smiles),), fields=dict(row.fields))
            for row in rows
            if fingerprint(row.key) not in self.erased
        ]

    def _find(self, name: str) -> Path:
        place = locate(name, self.places)
        if not isinstance(place, Path):
            raise DataError(f"{name}: no such file; reactions are read from a table (.csv, .tsv, .xlsx)")
        return place

    def _tasks(
        self, spec: reactions.ReactionsSpec, place: Path, rename: Mapping[str, str] | None = None
    ) -> list[Task]:
        made, facts = reactions.build(spec, place, self.settings.seed)
        self.scale = facts["scale"]
        self.notes += facts["notes"]
        told = {fact["name"]: fact for fact in facts["tasks"]}
        tasks = []
        for task in made:
            name = (rename or {}).get(task.name, task.name)
            train, long = self._encode(task.train)
            held, long_held = self._encode(task.held_out)
            if not train:
                raise DataError(
                    f"{place}: task {name!r} has no training rows left: {len(long)} are longer than "
                    f"{self.encoder.max_length} tokens, the others were erased"
                )
            tasks.append(Task(name, [row.but(task=name) for row in train], [row.but(task=name) for row in held]))
            fact = told[task.name]
            self.facts.append(
                {
                    "name": name,
                    "sources": {str(place): facts["sha256"]},
                    "train": _part(fact["rows"], train, long, fact["overlapping"]),
                    "evaluation": _part(fact["held_out"], held, long_held, 0),
                    "notes": [f"task {name}: {len(long)} rows too long, left out"] if long else [],
                }
            )
        return tasks

    def _encode(self, rows: Sequence[reactions.Reaction]) -> tuple[list[Example], list[str]]:
        return self.encoder.encode([row for row in rows if fingerprint(self._key(row.key)) not in self.erased])

    def _key(self, key: str) -> str:
        """The key of a row, or of that which it is an augmented copy of."""
        return COPY.sub("", key) if self.spec.augment else key

    def _without(self, rows: Sequence[Example], texts: Set[str]) -> list[Example]:
        """The rows that are none of these reactions; a copy, which is spelt otherwise, goes with its row."""
        gone = {row.key for row in rows if _text(row) in texts}
        return [row for row in rows if self._key(row.key) not in gone]


def _part(rows: int, kept: Sequence[Example], long: Sequence[str], overlapping: int) -> dict[str, Any]:
    return {
        "rows": rows,
        "kept": len(kept),
        "cut": 0,
        "left_out": {TOO_LONG: len(long)} if long else {},
        "overlapping": overlapping,
        "duplicates": 0,
    }


def _text(row: Example) -> str:
    return reactions.normal(row.segments[0].text)


class RegressionMeasure:
    """Score rows of a regression: loss, RMSE, MAE and R² over all of them.

    Args:
        learner: whose model is scored.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.rules: dict[str, str] = {}

    def __call__(
        self, name: str, rows: Sequence[Example], told: bool = True, trained: bool = True
    ) -> dict[str, float]:
        """The metrics over these rows."""
        return self.learner.score_both(rows) if told else self.learner.score(self.learner.identified(rows))

    def of_training(self, task: Task) -> dict[str, float]:
        """The same over the rows that the task was trained on, each under its name and "_training"."""
        return {metric + TRAINING: value for metric, value in self.learner.score(task.train).items()}

    def summaries(
        self, matrices: Mapping[str, ScoreMatrix], tasks: Sequence[Task], seen: Sequence[Sequence[str]]
    ) -> dict[str, dict[str, Any]]:
        """What stands beside a metric's own summary: its value over all rows of all tasks seen.

        Args:
            matrices: R by metric.
            tasks: those that are scored.
            seen: names of the tasks that were trained on by each row of R, from row 1.

        Returns:
            By metric: "pooled", after the last stage, and "pooled_by_stage"; of the tasks that have held-out rows,
            since no other is measured.
        """
        found: dict[str, dict[str, Any]] = {}
        measured = {task.name for task in tasks if task.evaluation}
        for end, part in (("", "evaluation"), (TRAINING, "train")):
            if f"rmse{end}" not in matrices:
                continue
            truths = {task.name: _values(getattr(task, part)) for task in tasks}
            stages = [
                _pooled(matrices, end, row, [n for n in names if n in measured], truths)
                for row, names in enumerate(seen, start=1)
            ]
            for metric in ("r2", "rmse", "mae"):
                by_stage = [stage[metric] for stage in stages]
                found[metric + end] = {"pooled": by_stage[-1], "pooled_by_stage": by_stage}
        return found


def _pooled(
    matrices: Mapping[str, ScoreMatrix],
    end: str,
    row: int,
    names: Sequence[str],
    truths: Mapping[str, NDArray[np.floating]],
) -> dict[str, float]:
    def column(metric: str) -> list[float]:
        matrix = matrices[metric + end]
        return [float(matrix.values[row, matrix.tasks.index(name)]) for name in names]

    return pooled(column("rmse"), column("mae"), [truths[name] for name in names])


def _values(rows: Sequence[Example]) -> NDArray[np.floating]:
    return np.array([float(row.y) for row in rows if row.y is not None])
