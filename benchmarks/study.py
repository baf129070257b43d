"""Every strategy in three worlds, three seeds each, at equal steps: cells that are run once, tables and figures."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks import encoder
from perdure.errors import PerdureError, UsageError, unknown_name
from perdure.evaluation import metrics
from perdure.storage import plain, write_json, write_text

Settings = Mapping[str, Mapping[str, Any]]
Scores = dict[str, float]
Table = dict[str, dict[str, list[float]]]  # strategy → column → a value a seed
FORMAT = 1  # of a cell; a change of what is measured raises it, and every cell is run again
SEEDS = (0, 1, 2)
TUNING_SEED = 10
MINILM = ("minilm-frozen", "minilm-lora")
LEARNS = 0.9  # of what naive learns; less is no way to remember


@dataclass(frozen=True)
class Row:
    """A strategy of the study.

    Attributes:
        build: what `perdure.strategies.build` takes: names joined by "+", or "joint" or "isolated".
        family: what the figure's colour says.
        settings: by world, "*" for all of them: constructor settings as "strategy.setting". A `capacity` may be a
            share of the stream's rows, a `per_task` one of a task's rows; at 5% both hold equally many in the end.
        grid: what `--tune` tries, by world: setting → values.
        worlds: where it runs; None is everywhere.
    """

    build: str
    family: str
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    grid: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    worlds: tuple[str, ...] | None = None

    def for_world(self, world: str) -> dict[str, Any]:
        """The settings in one world, flat."""
        return {**self.settings.get("*", {}), **self.settings.get(world, {})}

    def grid_for(self, world: str) -> Mapping[str, Sequence[Any]]:
        """What is tried there; nothing where there is nothing to tune."""
        return self.grid.get(world, self.grid.get("*", {}))


def _by_world(setting: str, arena: Any, frozen: Any, lora: Any) -> dict[str, dict[str, Any]]:
    return {"arena": {setting: arena}, "minilm-frozen": {setting: frozen}, "minilm-lora": {setting: lora}}


TWO, FIVE = {"replay.capacity": "2%"}, {"replay.capacity": "5%"}
POWERS = [0.1, 1.0, 10.0, 100.0, 1e3, 1e4]

# One row a strategy. Strengths have no scale of their own: they come from `--tune`, world by world.
TABLE: dict[str, Row] = {
    "naive": Row("naive", "baseline"),
    "joint": Row("joint", "baseline"),
    "isolated": Row("isolated", "baseline"),
    "replay-2%": Row("replay", "rehearsal", {"*": TWO}),
    "replay-5%": Row("replay", "rehearsal", {"*": FIVE}),
    "replay-balanced": Row("replay", "rehearsal", {"*": {**FIVE, "replay.memory": "balanced"}}),
    "replay-ring": Row("replay", "rehearsal", {"*": {**FIVE, "replay.memory": "ring"}}),
    "replay-class-balanced": Row(
        "replay", "rehearsal", {"*": {**FIVE, "replay.memory": "class-balanced"}}, worlds=MINILM
    ),
    "derpp-2%": Row(
        "derpp",
        "rehearsal",
        {"*": {"derpp.capacity": "2%", "derpp.beta": 1.0}, **_by_world("derpp.alpha", 0.05, 0.5, 0.5)},
        {"*": {"derpp.alpha": [0.1, 0.3, 1.0]}, "arena": {"derpp.alpha": [0.01, 0.05, 0.2]}},
    ),
    "derpp-5%": Row(
        "derpp",
        "rehearsal",
        {"*": {"derpp.capacity": "5%", "derpp.beta": 1.0}, **_by_world("derpp.alpha", 0.05, 0.5, 0.5)},
    ),
    # Each step goes through all that GEM holds: with 5 % of the arena's rows it would take six times naive's time.
    "gem-2%": Row("gem", "gradients", {"*": {"gem.per_task": "2%"}}, {"*": {"gem.margin": [0.0, 0.5]}}),
    "agem-5%": Row("agem", "gradients", {"*": {"agem.per_task": "5%", "agem.sample": 16}}),
    "ewc": Row(
        "ewc",
        "weights",
        _by_world("ewc.strength", 300.0, 10.0, 100.0),
        {
            "minilm-frozen": {"ewc.strength": POWERS},
            "minilm-lora": {"ewc.strength": [30.0, 300.0, 3e3, 3e4]},
            "arena": {"ewc.strength": [100.0, 300.0, 600.0]},
        },
    ),
    "ewc-weight": Row(
        "ewc",
        "weights",
        {"*": {"ewc.space": "weight"}, "minilm-lora": {"ewc.strength": 100.0}},
        {"*": {"ewc.strength": [30.0, 300.0, 3e3, 3e4]}},
        worlds=("minilm-lora",),
    ),
    "si": Row(
        "si",
        "weights",
        _by_world("si.strength", 3e3, 10.0, 10.0),
        {
            "minilm-frozen": {"si.strength": [1.0, 3.0, 10.0, 30.0, 100.0]},
            "minilm-lora": {"si.strength": [10.0, 100.0, 1e3, 1e4]},
            "arena": {"si.strength": [1e3, 2e3, 3e3, 5e3]},
        },
    ),
    "mas": Row(
        "mas",
        "weights",
        _by_world("mas.strength", 2e-4, 0.1, 1.0),
        {
            "minilm-frozen": {"mas.strength": [0.01, 0.03, 0.1, 0.3]},
            "minilm-lora": {"mas.strength": [0.03, 0.3, 3.0, 30.0]},
            "arena": {"mas.strength": [5e-5, 1e-4, 2e-4, 3e-4]},
        },
    ),
    "lwf": Row(
        "lwf",
        "outputs",
        _by_world("lwf.strength", 1.0, 30.0, 1.0),
        {"*": {"lwf.strength": [1.0, 3.0, 10.0, 30.0, 100.0]}, "arena": {"lwf.strength": [1.0, 3.0, 10.0]}},
    ),
    "freeze-bottom": Row("freeze-bottom", "freezing", worlds=("arena", "minilm-lora")),
    "replay-5%+ewc": Row(
        "replay+ewc",
        "chains",
        {world: {**FIVE, **own} for world, own in _by_world("ewc.strength", 100.0, 10.0, 100.0).items()},
        {"*": {"ewc.strength": [3.0, 10.0, 30.0]}, "arena": {"ewc.strength": [30.0, 100.0, 300.0]}},
    ),
    "replay-5%+lwf": Row(
        "replay+lwf", "chains", {"*": {**FIVE, "lwf.strength": 1.0}}, {"*": {"lwf.strength": [0.3, 1.0, 3.0]}}
    ),
}
FAMILIES = ("baseline", "rehearsal", "weights", "gradients", "outputs", "freezing", "chains")


@dataclass(frozen=True)
class World:
    """What is learnt, and how.

    Attributes:
        name: of the world.
        kind: "arena", "features" or "tokens".
        tasks: the tasks of the first order, by name.
        train_rows: of a task.
        evaluation_rows: of a task.
        epochs: passes over a task's rows.
        training: settings of the loop; for the arena what differs from the recipe.
    """

    name: str
    kind: str
    tasks: tuple[str, ...]
    train_rows: int
    evaluation_rows: int
    epochs: int
    training: Mapping[str, Any]

    def order(self, seed: int) -> list[str]:
        """The tasks in a seed's order; reversed on the tuning seed. The arena's seeds change the rows instead."""
        if self.kind == "arena":
            return list(self.tasks)
        if seed == TUNING_SEED:
            return list(reversed(self.tasks))
        return [self.tasks[i % len(self.tasks)] for i in ORDERS[seed % len(ORDERS)][: len(self.tasks)]]


# Each task is early in one order and late in another, and the two reviews with their shared labels are neighbours
# in one order only.
ORDERS = ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1), (3, 0, 4, 1, 2))
WORLDS: dict[str, World] = {
    "arena": World("arena", "arena", ("comparison", "sequence", "causal", "math", "grid"), 800, 100, 1, {}),
    "minilm-frozen": World(
        "minilm-frozen", "features", encoder.TASKS, 500, 300, 8,
        {"optimizer": {"type": "adamw", "lr": 1e-3}, "batch_size": 20, "evaluation_batch_size": 300},
    ),
    "minilm-lora": World(
        "minilm-lora", "tokens", encoder.TASKS, 160, 100, 3,
        {"optimizer": {"type": "adamw", "lr": 2e-3}, "batch_size": 16, "clip": 1.0, "evaluation_batch_size": 50,
         "precision": "bf16"},
    ),
}  # fmt: skip


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

    def without(self, action: Callable[..., Scores]) -> Callable[..., Scores]:
        """The action, not counted."""

        def uncounted(*arguments: Any) -> Scores:
            start = time.process_time()
            try:
                return action(*arguments)
            finally:
                if self._runs:
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
        **cell.world.training,
    }
    return settings_for("arena-tasks", given, ())


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
        return made

    def accuracies(made: ContinualTrainer) -> list[float]:
        return [made.learner.score(held[task])["accuracy"] for task in order]

    steps = 0
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
    size, rows = _state(made.strategy.state_dict())
    return {
        "metric": "accuracy",
        "tasks": order,
        "R": R,
        "seconds": round(watch.seconds, 3),
        "steps": steps,
        "state_bytes": size,
        "rows_held": rows,
    }


# Many cells


def run_cells(cells: Sequence[Cell], workers: int, console: Console) -> int:
    """Run what has no result yet, and return how many failed.

    Args:
        cells: what is wanted.
        workers: processes of one thread each; 0 runs in this one.
        console: for the bar and a line a cell.
    """
    todo = [cell for cell in cells if cell.read() is None]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    for kind in dict.fromkeys(cell.world.kind for cell in todo if cell.world.kind != "arena"):
        encoder.prepare(todo[0].data, kind)
    walls = {cell.world.name: [found["wall"]] for cell in cells if (found := cell.read())}
    left = set(todo)
    failed = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cells", total=len(todo), left="")
        for cell, error in _results(todo, workers):
            left.remove(cell)
            what = f"{cell.world.name} {cell.path.parent.name} {cell.path.stem}"
            found = None if error else cell.read()
            if found is None:
                failed += 1
                console.print(f"{what}: failed: {error}", markup=False)
            else:
                walls.setdefault(cell.world.name, []).append(found["wall"])
                values = "  ".join(f"{name} {value:.3f}" for name, value in list(found["metrics"].items())[:3])
                console.print(f"{what}: {values}  ({found['wall']:.0f} s)", highlight=False, markup=False)
            known = [time for times in walls.values() for time in times] or [60.0]
            rest = sum(float(np.mean(walls.get(c.world.name, known))) for c in left) / max(workers, 1)
            progress.update(bar, advance=1, left=f"about {rest / 60:.0f} min left")
    return failed


def _results(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, str | None]]:
    if not workers:
        for cell in cells:
            try:
                run_cell(cell)
            except Exception as error:  # one that fails does not stop the others
                yield cell, _said(error)
            else:
                yield cell, None
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures: dict[Future[Any], Cell] = {pool.submit(run_cell, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                problem = future.exception()
                yield futures[future], None if problem is None else _said(problem)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _one_thread() -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)


def check_rows(names: Sequence[str], worlds: Sequence[World], out: Path) -> None:
    """Build every strategy before the first cell is run; all mistakes together."""
    from perdure.strategies.build import build

    mistakes = []
    for world, name in product(worlds, names):
        cell = make_cell(out, world, name, 0)
        if not _runs(name, world) or cell.build in ("joint", "isolated"):
            continue
        try:
            build(cell.build, cell.settings)
        except UsageError as error:
            mistakes.append(f"{name} in {world.name}: {error}")
    if mistakes:
        raise UsageError("\n".join(mistakes))


def _runs(name: str, world: World) -> bool:
    places = TABLE[name].worlds
    return places is None or world.name in places


# Tuning


def tune(out: Path, world: World, names: Sequence[str], workers: int, console: Console) -> int:
    """Try every point of each row's grid on the tuning stream, and write and print what is best."""
    points = {
        name: [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        for name in names
        if (grid := TABLE[name].grid_for(world.name)) and _runs(name, world)
    }
    naive = make_cell(out, world, "naive", TUNING_SEED, {})
    cells = {name: [make_cell(out, world, name, TUNING_SEED, p) for p in grid] for name, grid in points.items()}
    failed = run_cells([naive, *(cell for each in cells.values() for cell in each)], workers, console)
    reference = naive.read()
    assert reference is not None, "naive failed: see above"
    floor = LEARNS * reference["metrics"]["learning"]
    for name, each in cells.items():
        tried = [
            {"settings": point, **{key: found["metrics"][key] for key in ("average", "forgetting", "learning")}}
            for point, cell in zip(points[name], each, strict=True)
            if (found := cell.read())
        ]
        if not tried:
            continue
        best = best_of(tried, floor)
        table = {"world": world.name, "strategy": name, "seed": TUNING_SEED, "rule": RULE, "best": best["settings"]}
        table |= {"naive": reference["metrics"], "tried": tried}
        write_json(out / world.name / "tune" / f"{name}.json", table)
        console.print(f"\n{world.name}, {name} (naive learns {reference['metrics']['learning']:.3f}, "
                      f"ends at {reference['metrics']['average']:.3f})", highlight=False)  # fmt: skip
        edges = [
            key
            for key, values in TABLE[name].grid_for(world.name).items()
            if len(values) > 2 and best["settings"][key] in (values[0], values[-1])
        ]
        for one in tried:
            point = ", ".join(f"{key} {value:g}" for key, value in one["settings"].items())
            console.print(
                f"  {point:<24} average {one['average']:.3f}  forgetting {one['forgetting']:.3f}  "
                f"learning {one['learning']:.3f}{'   <- best' if one is best else ''}",
                highlight=False,
            )
        if edges:
            console.print(f"  the best {' and '.join(edges)} is at the edge of the grid: widen it", highlight=False)
    return failed


RULE = (
    f"the highest average at the end among the points that learn at least {LEARNS} of what naive learns; "
    "where none does, the highest average"
)


def best_of(tried: Sequence[dict[str, Any]], floor: float) -> dict[str, Any]:
    """The point that RULE names; the first of equals."""
    able = [one for one in tried if one["learning"] >= floor]
    return max(able or tried, key=lambda one: one["average"])


# The report

COLUMNS = {
    "average": ("average, %", 100, 1),
    "forgetting": ("forgetting, pt", 100, 1),
    "learning": ("when learnt, %", 100, 1),
    "removed": ("naive's forgetting removed, %", 100, 0),
    "learns": ("of naive's learning, %", 100, 0),
    "of_joint": ("average of joint's, %", 100, 0),
    "time": ("processor time, × naive", 1, 2),
    "megabytes": ("state, MB", 1, 2),
    "rows": ("rows held", 1, 0),
}


def collect(out: Path, world: World, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """For each strategy that has cells, each column's values over the seeds; ratios are taken seed by seed."""
    cells = {(name, seed): make_cell(out, world, name, seed).read() for name in names for seed in seeds}
    table: Table = {}
    for seed in seeds:
        naive, joint = cells.get(("naive", seed)), cells.get(("joint", seed))
        if naive is not None:
            found = table.setdefault("frozen base", {})
            start = float(np.nanmean(np.array(naive["R"][0], dtype=float)))
            found.setdefault("average", []).append(start)
            if joint is not None:
                found.setdefault("of_joint", []).append(_share({"metrics": {"average": start}}, joint, "average"))
        for name in names:
            cell = cells[name, seed]
            if cell is None:
                continue
            values = dict(cell["metrics"]) | {"rows": cell["rows_held"], "megabytes": cell["state_bytes"] / 1e6}
            if naive is not None:
                values["time"] = cell["seconds"] / cell["steps"] * naive["steps"] / naive["seconds"]
                if name not in ("joint", "isolated"):
                    values["removed"] = 1 - _share(cell, naive, "forgetting")
                    values["learns"] = _share(cell, naive, "learning")
            if joint is not None:
                values["of_joint"] = _share(cell, joint, "average")
            for key, value in values.items():
                if key in COLUMNS:
                    table.setdefault(name, {}).setdefault(key, []).append(math.nan if value is None else value)
    return table


def _share(cell: Mapping[str, Any], reference: Mapping[str, Any], key: str) -> float:
    """A metric as a share of a reference's; nan where that has none."""
    whole = reference["metrics"][key]
    return float(cell["metrics"][key] / whole) if whole > 0 else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval; nan for the width of one value."""
    from scipy.stats import t

    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return (known[0] if known else math.nan), math.nan
    half = t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known))
    return float(np.mean(known)), float(half)


def markdown(table: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table for the documents, by average within a family's order in TABLE."""
    lines = [f"| strategy | {' | '.join(title for title, _, _ in COLUMNS.values())} |"]
    lines.append("| --- |" + " ---: |" * len(COLUMNS))
    for name, values in table.items():
        cells = []
        for key, (_, scale, digits) in COLUMNS.items():
            mean, half = interval(values.get(key, ()))
            if not math.isfinite(mean):
                cells.append("–")
            elif not math.isfinite(half) or key in ("rows", "megabytes", "time"):
                cells.append(f"{mean * scale:.{digits}f}")
            else:
                cells.append(f"{mean * scale:.{digits}f} ± {half * scale:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(out: Path, worlds: Sequence[World], seeds: Sequence[int], console: Console) -> None:
    """Print each world's table, and write results.md and a figure a world."""
    text = []
    for world in worlds:
        here = [name for name in TABLE if _runs(name, world)]
        table = collect(out, world, here, seeds)
        if not table:
            continue
        counts = sorted({len(values["average"]) for values in table.values()})
        over = "1 seed" if counts == [1] else f"{'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
        text.append(f"## {world.name}\n\nMean over {over} ± 95 % t-interval.\n\n{markdown(table)}")
        if any(values.get("forgetting") for values in table.values()):
            image = out / f"{world.name}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            aside = image.with_name(f".{image.name}.partial")
            aside.write_bytes(figure(world.name, table))
            aside.replace(image)
    if text:
        write_text(out / "results.md", "\n".join(text))
        console.out("\n".join(text), highlight=False)


def figure(title: str, table: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Forgetting against learning: a labelled point a strategy, with a pale one for each seed."""
    from matplotlib.lines import Line2D

    from perdure.report.canvas import COLOURS, GREY, headline, panels, png, style

    clouds = {
        name: np.array([values["forgetting"], values["learning"]]) * 100  # [2, seeds]
        for name, values in table.items()
        if name in TABLE and values.get("forgetting")
    }
    middles = {name: (float(cloud[0].mean()), float(cloud[1].mean())) for name, cloud in clouds.items()}
    levels = {name: 100 * float(np.mean(table[name]["average"])) for name in ("isolated", "joint") if name in table}
    colours = dict(zip(FAMILIES, (GREY, *COLOURS), strict=False))
    with style():
        drawn, (ax,) = panels(1, 7.6, 5.2)
        for name, cloud in clouds.items():
            colour, (x, y) = colours[TABLE[name].family], middles[name]
            for one in cloud.T if cloud.shape[1] > 1 else ():
                ax.plot([x, one[0]], [y, one[1]], color=colour, linewidth=0.5, alpha=0.3, zorder=2)
                ax.plot(*one, "o", color=colour, markersize=3, alpha=0.3, zorder=2, markeredgewidth=0)
            ax.plot(x, y, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
        every = np.concatenate(list(clouds.values()), axis=1)
        low, high = [min(0.0, every[0].min()), min(every[1].min(), *levels.values(), math.inf)], every.max(axis=1)
        high[1] = max(high[1], *levels.values(), -math.inf)
        room = np.maximum(4.0, high - low) * 0.1
        ax.set_xlim(low[0] - room[0] / 2, high[0] + room[0])
        ax.set_ylim(low[1] - room[1], high[1] + room[1])
        for (name, level), look in zip(levels.items(), ((0, (4, 2)), (0, (1, 1.5))), strict=False):
            ax.axhline(level, color=GREY, linewidth=1, linestyle=look, zorder=1)
            above = level >= max(levels.values())  # two that lie close together keep apart
            ax.annotate(
                f"{name} {level:.0f} %", (1, level), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", fontsize=8, color=GREY, va="bottom" if above else "top",
            )  # fmt: skip
        ax.grid()
        ax.set_xlabel("forgetting, points (← better)")
        ax.set_ylabel("score when learnt, % (better ↑)")
        shown = [family for family in FAMILIES if any(TABLE[name].family == family for name in clouds)]
        handles = [Line2D([], [], marker="o", linestyle="", color=colours[f], label=f) for f in shown]
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        seeds = max(cloud.shape[1] for cloud in clouds.values())
        pale = f"; pale: each of {seeds} seeds" if seeds > 1 else ""
        headline(drawn, f"{title}: what strategies learn and forget; the upper left corner is best{pale}")
        drawn.canvas.draw()  # the layout settles first: labels are placed in pixels
        drawn.set_layout_engine("none")
        _label(ax, middles, colours)
        return png(drawn)


def _label(ax: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write each name beside its point: where it hides least of points, names and edges, and nearest."""
    from matplotlib.patheffects import withStroke

    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    scale = ax.figure.dpi / 72
    dots = {name: ax.transData.transform(point) for name, point in points.items()}
    taken: list[tuple[float, float, float, float]] = []
    # Those with the nearest neighbours have the least choice, so they choose first.
    crowded = sorted(
        dots, key=lambda n: min((float(np.hypot(*(dots[n] - dots[m]))) for m in dots if m != n), default=0.0)
    )
    for name in crowded:
        probe = ax.text(0, 0, name, fontsize=8)
        box = probe.get_window_extent(renderer)
        probe.remove()
        width, height = box.width, box.height
        best: tuple[float, float, float, float] | None = None
        for distance, angle in product((8.0, 15.0, 24.0, 36.0), range(0, 360, 30)):
            away = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
            centre = dots[name] + away * (distance * scale + np.array([width / 2, height / 2]) * abs(away))
            x0, y0 = centre[0] - width / 2, centre[1] - height / 2
            own = (x0, y0, x0 + width, y0 + height)
            cost: float = distance + sum(40 + _overlap(own, other) for other in taken if _overlap(own, other))
            for x, y in dots.values():
                dot = (x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale)
                cost += 60 * (_overlap(own, dot) > 0)
            cost += 200 * (own[0] < frame.x0 or own[1] < frame.y0 or own[2] > frame.x1 or own[3] > frame.y1)
            if best is None or cost < best[0]:
                best = (cost, x0, y0, distance)
        assert best is not None
        _, x0, y0, distance = best
        taken.append((x0, y0, x0 + width, y0 + height))
        colour = colours[TABLE[name].family]
        at = ax.transData.inverted().transform((x0, y0))
        halo = [withStroke(linewidth=2, foreground="white")]
        ax.text(*at, name, fontsize=8, color=colour, ha="left", va="bottom", zorder=4, path_effects=halo)
        if distance > 15:
            near = (min(max(dots[name][0], x0), x0 + width), min(max(dots[name][1], y0), y0 + height))
            line = ax.transData.inverted().transform([dots[name], near])
            ax.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.6, zorder=2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _chosen(text: str | None, known: Sequence[str], what: str) -> list[str]:
    names = list(known) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(unknown_name(what, name, known))
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the study's folder (runs/study)")
    parser.add_argument("--world", help=f"some of {', '.join(WORLDS)}, by commas; default: all")
    parser.add_argument("--only", help="some of the strategies, by commas; default: all of the table")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: 0,1,2")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--tune", metavar="NAMES", help="tune these strategies, by commas, on the tuning stream")
    parser.add_argument(
        "--report", action="store_true", help="only write tables and figures of the cells there are"
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        worlds = [WORLDS[name] for name in _chosen(given.world, list(WORLDS), "world")]
        names = _chosen(given.tune or given.only, list(TABLE), "strategy")
        seeds = [int(seed) for seed in given.seeds.split(",")]
        if not given.report:
            check_rows(names, worlds, given.out)
        failed = 0
        if given.tune:
            for world in worlds:
                failed += tune(given.out, world, names, given.workers, console)
        else:
            if not given.report:
                cells = [
                    make_cell(given.out, world, name, seed)
                    for world, seed, name in product(worlds, seeds, names)
                    if _runs(name, world)
                ]
                failed = run_cells(cells, given.workers, console)
            # Of all worlds, or a look at one would leave the others out of results.md.
            report(given.out, list(WORLDS.values()), seeds, console)
    except KeyboardInterrupt:
        sys.exit("stopped; the cells that are done stay, the same command goes on")
    except PerdureError as error:
        sys.exit(str(error))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
