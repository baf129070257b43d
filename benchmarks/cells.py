"""One run of the study: a strategy in a world on a seed, and the file that holds what came of it."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import encoder
from benchmarks.worlds import TABLE, TUNING_SEED, World
from perdure.evaluation import metrics
from perdure.storage import plain, write_json

Settings = Mapping[str, Mapping[str, Any]]
Scores = dict[str, float]
FORMAT = 1  # of a cell; a change of what is measured raises it, and every cell is run again


@dataclass(frozen=True, eq=False)
class Cell:
    """One run: a strategy with its settings in a world on a seed, and the file that holds what came of it."""

    world: World
    name: str
    build: str
    settings: Settings
    seed: int
    path: Path
    data: Path

    @property
    def spec(self) -> dict[str, Any]:
        """All that the result hangs on."""
        own = {"format": FORMAT, "build": self.build, "settings": self.settings, "seed": self.seed}
        if self.world.kind == "arena":
            # The recipe's text counts too: it holds the loop's settings.
            return {**own, "run": _arena_settings(self)[0].model_dump(mode="json", exclude_unset=True)}
        return {**own, "world": asdict(self.world), "order": self.world.order(self.seed)}

    @property
    def hash(self) -> str:
        """A short hash of the spec."""
        return hashlib.sha256(json.dumps(plain(self.spec), sort_keys=True).encode()).hexdigest()[:16]

    def read(self) -> dict[str, Any] | None:
        """What the file holds, if it is of this spec."""
        try:
            found: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("hash") == self.hash else None


def make_cell(out: Path, world: World, name: str, seed: int, changes: Mapping[str, Any] | None = None) -> Cell:
    """The cell of a row in a world; with changed settings it is a point of the tuning grid."""
    row = TABLE[name]
    flat = {**row.for_world(world.name), **(changes or {})}
    nested: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        strategy, _, setting = key.partition(".")
        nested.setdefault(strategy, {})[setting] = _rows(value, setting, world)
    if changes is None:
        path = out / world.name / name / f"{seed}.json"
    else:
        label = ",".join(f"{key}={value:g}" for key, value in changes.items()) or "as it is"
        path = out / world.name / "tune" / name / f"{label}.json"
    return Cell(world, name, row.build, nested, seed, path, out / "minilm")


def _rows(value: Any, setting: str, world: World) -> Any:
    """A share of rows as their number."""
    if not (isinstance(value, str) and value.endswith("%") and setting in ("capacity", "per_task")):
        return value
    rows = world.train_rows * (len(world.tasks) if setting == "capacity" else 1)
    return max(1, int(Fraction(value[:-1]) / 100 * rows))


# Running a cell


def run_cell(cell: Cell) -> dict[str, Any]:
    """Train and score, and write the cell's file."""
    start = time.perf_counter()
    found = _run_arena(cell) if cell.world.kind == "arena" else _run_minilm(cell)
    result = {
        "format": FORMAT,
        "hash": cell.hash,
        "world": cell.world.name,
        "strategy": cell.name,
        "seed": cell.seed,
        "spec": cell.spec,
        **found,
        "metrics": _metrics(cell.build, found["R"]),
        **({"inferred": _metrics(cell.build, found["R_inferred"])} if found.get("R_inferred") else {}),
        "wall": round(time.perf_counter() - start, 2),
    }
    cell.path.parent.mkdir(parents=True, exist_ok=True)
    write_json(cell.path, result)
    return result


def _metrics(build: str, R: Any) -> dict[str, float]:
    last = np.array(R, dtype=float)[-1]
    if build in ("joint", "isolated"):  # learnt once: there was no later task to forget it for
        return {"average": float(last.mean()), "learning": float(last.mean())}
    return {
        "average": metrics.average(R),
        "forgetting": metrics.forgetting(R),
        "learning": metrics.learning_accuracy(R),
        "backward_transfer": metrics.backward_transfer(R),
        "forward_transfer": metrics.forward_transfer(R),
    }


def _state(state: Any) -> tuple[int, int]:
    """Bytes of all tensors in a strategy's state, and how many rows it holds."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size(), 0
    if isinstance(state, Mapping):
        parts = [_state(each) for each in state.values()]
        rows = len(state["rows"]) if {"rows", "tensors"} <= state.keys() else 0  # what `perdure.memory.pack` gives
    elif isinstance(state, list | tuple):
        parts, rows = [_state(each) for each in state], 0
    else:
        return 0, 0
    return sum(size for size, _ in parts), rows + sum(count for _, count in parts)


class Watch:
    """Processor seconds of what runs inside `with`, less what `without` wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._runs = False

    def __enter__(self) -> None:
        self.seconds -= time.process_time()
        self._runs = True

    def __exit__(self, *_: object) -> None:
        self.seconds += time.process_time()
        self._runs = False

    def without(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action, not counted; nor is what it does within another such."""

        def uncounted(*arguments: Any, **named: Any) -> Any:
            if not self._runs:
                return action(*arguments, **named)
            self._runs = False
            start = time.process_time()
            try:
                return action(*arguments, **named)
            finally:
                self._runs = True
                self.seconds -= time.process_time() - start

        return uncounted


def _arena_settings(cell: Cell) -> tuple[Any, Path]:
    from perdure.recipes.run import settings_for

    given = {
        "strategy": cell.build,
        "seed": cell.seed,
        "epochs": cell.world.epochs,
        "stream": {
            "arena": {
                "kinds": list(cell.world.tasks),
                "train_rows": cell.world.train_rows,
                "evaluation_rows": cell.world.evaluation_rows,
            }
        },
        "continual_strategy": {name: dict(values) for name, values in cell.settings.items()},
    }
    changes = {**cell.world.training, **TABLE[cell.name].training.get(cell.world.name, {})}
    return settings_for("arena-tasks", given, [f"{key}={value}" for key, value in changes.items()])


def _run_arena(cell: Cell) -> dict[str, Any]:
    from perdure.training.folder import RunFolder
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    settings, base = _arena_settings(cell)
    place = cell.path.with_name(f"{cell.path.stem}-{cell.hash}.run")
    folder = RunFolder(place)
    with folder.locked():
        plan = make_plan(settings, base)
        run, watch = Run(plan, folder), Watch()
        run.measure = watch.without(run.measure)  # type: ignore[assignment]
        with watch:
            results = run.execute()
    size, rows = _state(plan.strategy.state_dict())
    shutil.rmtree(place)  # a few hundred cells with their checkpoints would fill a disk
    return {
        "metric": "exact_match",
        "tasks": results["tasks"],
        "R": results["scores"]["exact_match"]["values"],
        "R_inferred": results["scores"].get("exact_match_inferred", {}).get("values"),
        "seconds": round(watch.seconds, 3),
        "steps": results["steps"],
        "state_bytes": size,
        "rows_held": rows,
        "probe": results["probe"].get("exact_match"),
    }


def _run_minilm(cell: Cell) -> dict[str, Any]:
    import torch

    from perdure.strategies.build import build
    from perdure.training.trainer import ContinualTrainer

    world, order = cell.world, cell.world.order(cell.seed)
    tuning = cell.seed == TUNING_SEED
    train, held = (
        {task: encoder.examples(cell.data, world.kind, task, part, count, cell.seed, tuning) for task in order}
        for part, count in (("train", world.train_rows), ("test", world.evaluation_rows))
    )
    whole = cell.build in ("joint", "isolated")
    watch = Watch()

    def trainer() -> ContinualTrainer:
        torch.manual_seed(cell.seed)  # of the head's and the adapters' first weights
        model = encoder.MODELS[world.kind](len(encoder.labels()))
        strategy = build("naive" if whole else cell.build, cell.settings)
        made = ContinualTrainer(model, strategy, world.training, "classification", seed=cell.seed)
        made.learner.score = watch.without(made.learner.score)  # type: ignore[method-assign]
        made.learner.identified = watch.without(made.learner.identified)  # type: ignore[assignment, method-assign]
        return made

    def accuracies(made: ContinualTrainer) -> list[float]:
        return [made.learner.score(held[task])["accuracy"] for task in order]

    steps, untold = 0, None
    if whole:
        groups = [order] if cell.build == "joint" else [[task] for task in order]
        before: list[float] = []
        after = dict.fromkeys(order, math.nan)
        for group in groups:
            made = trainer()
            before = before or accuracies(made)
            with watch:
                made.train_task(
                    [row for task in group for row in train[task]], None, 0, "+".join(group), world.epochs
                )
            steps += made.learner.steps
            after |= {task: made.learner.score(held[task])["accuracy"] for task in group}
        R = [before, [after[task] for task in order]]
    else:
        made = trainer()
        for index, task in enumerate(order):
            with watch:
                made.train_task(train[task], held[task], index, task, world.epochs)
        steps = made.learner.steps
        R = made.scores.values.tolist()
        untold = made.matrices.get("accuracy_inferred")
    size, rows = _state(made.strategy.state_dict())
    return {
        "metric": "accuracy",
        "tasks": order,
        "R": R,
        "R_inferred": untold.values.tolist() if untold is not None else None,
        "seconds": round(watch.seconds, 3),
        "steps": steps,
        "state_bytes": size,
        "rows_held": rows,
    }
