"""`perdure predict`: the yields that a run's model foretells for a table of reactions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perdure.errors import ConfigError, RunError
from perdure.evaluation.score import regression_metrics
from perdure.recipes.reactions.foretell import LEVEL, LEVELS, Intervals, foretell, method_of
from perdure.recipes.reactions.outputs import CALIBRATION, Teller, write_csv
from perdure.recipes.run import notes_of, quieten
from perdure.storage import there
from perdure.streams import reactions
from perdure.streams.reactions.chem import normal
from perdure.streams.reactions.encode import ReactionEncoder
from perdure.training.display import Terminal
from perdure.training.folder import RunFolder
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.streams.stream import Stream
    from perdure.training.run import Run

COLUMNS = ("key", "task", "reaction_smiles", "predicted", "lower", "upper", "std")
IN_RUN = "in_run"  # the last column
TRAINED, HELD_OUT = "training", "held out"  # what it holds


def predict(path: Path, file: Path, out: Path, level: float = LEVEL) -> None:
    """Write a table of predictions, in the units of the run's own table, with intervals.

    The column `in_run` tells the reactions that the run has met: those it was trained on, and those held out.
    """
    import torch

    folder = RunFolder(path)
    settings = folder.settings()
    spec = settings.stream.reactions
    if spec is None:
        raise RunError(f"{path} is no run of reactions; `perdure generate {path} PROMPT` lets its model answer")
    if not there(file):
        raise ConfigError(f"{file}: no such file; give a table of reactions")
    if out.is_dir():
        raise ConfigError(f"-o {out}: is a folder; give a file")
    if out.resolve() == file.resolve():
        raise ConfigError(f"-o {out}: is the table itself; give another file")
    intervals = _intervals(folder)
    (intervals or Intervals(dict.fromkeys(LEVELS, math.inf))).check(level)
    quieten()
    display = Terminal()
    run, teller = opened(settings, folder, display)
    plan = run.plan
    scale = 100.0 if plan.data["scale"] == "percent" else 1.0
    # What is foretold needs no conditions, which are the baseline's; and text has no sheets.
    sheet = spec.sheet if file.suffix.lower() == ".xlsx" else None
    own = spec.model_copy(update={"yield_scale": plan.data["scale"], "sheet": sheet, "condition_columns": None})
    table = reactions.read(own, file, labelled=False, fixed=True, molecules=True)
    limit = min(settings.max_length or plan.language.max_length, plan.language.max_length)
    encoded, long = ReactionEncoder(plan.language.tokenizer, limit).encode(table.rows)
    if not encoded:
        raise ConfigError(f"{file}: no row that the model can read ({len(long)} longer than {limit} tokens)")
    # The rows have no yields to learn from; a number must stand there for a batch to be made.
    rows = [row.but(y=torch.tensor(math.nan)) for row in encoded]
    known = set(plan.stream.names)
    if plan.strategy.wants_task_ids and not {row.task for row in rows} <= known:
        rows = run.learner.identified(rows)
        display.say("note: the strategy has a part for each task; tasks that the file does not name were inferred")
    with display.counting("hidden states") as tell:
        plan.model.remember([row.x for row in rows], tell)
    made = teller(run.learner, rows, method_of(settings), settings.evaluation.samples, settings.seed)
    lower, upper = (np.full(len(rows), math.nan),) * 2 if intervals is None else intervals.bounds(made, level)
    true = {row.key: math.nan if row.value is None else row.value for row in table.rows}
    values = np.array([true[row.key] for row in rows])
    whether = met(plan.stream)
    places = [whether.get(normal(row.segments[0].text), "") for row in rows]
    columns = [made.mean, lower, upper, made.std, *([values] if np.isfinite(values).any() else [])]
    write_csv(
        out,
        [*COLUMNS, *(["true"] if len(columns) > 4 else []), IN_RUN],
        (
            [row.key, row.task, row.segments[0].text, *(_text(column[i] * scale) for column in columns), places[i]]
            for i, row in enumerate(rows)
        ),
    )
    for note in (*notes_of(run), *(f"note: {note}" for note in table.facts["notes"])):
        display.say(note)
    if long:
        keys = ", ".join(long[:5])
        display.say(f"note: {len(long)} rows are longer than {limit} tokens and were left out: {keys}")
    unit = "percent" if scale == 100 else "fractions"
    width = (
        f"intervals of {level:.0%}"
        if intervals is not None
        else "no intervals, which need about 40 held-out rows of a finished run"
    )
    display.say(f"{len(rows)} predictions in {unit}, {width}")
    if trained := places.count(TRAINED):
        display.say(f"note: the run was trained on {trained} of these reactions; the column {IN_RUN} tells them")
    new = np.array([place != TRAINED for place in places]) & np.isfinite(values)
    if new.any():
        found = regression_metrics(torch.tensor(made.mean[new]), torch.tensor(values[new]))
        display.say(
            f"against {new.sum()} yields in the file that it was not trained on: R² {found['r2']:.3f}, "
            f"RMSE {found['rmse'] * scale:.3g}, MAE {found['mae'] * scale:.3g} ({unit})"
        )
    display.say(f"written: {out}")


def met(stream: Stream) -> dict[str, str]:
    """The reactions of a run's own tasks, compounds in order, and whether it was trained on each."""
    held = {normal(row.segments[0].text): HELD_OUT for task in stream for row in task.evaluation}
    return held | {normal(row.segments[0].text): TRAINED for task in stream for row in task.train}


def opened(settings: RunSettings, folder: RunFolder, display: Terminal) -> tuple[Run, Teller]:
    """The run in its newest state, and what foretells yields with it."""
    if folder.recorded().get("backend") == "jax":
        from perdure.recipes.reactions import jax_backend

        run = jax_backend.open_run(settings, folder, display)
        from perdure.recipes.reactions.jax_learner import foretell as in_jax

        return run, in_jax
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    run = Run(make_plan(settings, folder.recipe_folder), folder, display)
    run.load()
    return run, foretell


def _intervals(folder: RunFolder) -> Intervals | None:
    file = folder.path / CALIBRATION
    if not file.is_file():
        return None
    try:
        factors = json.loads(file.read_text(encoding="utf-8"))["factors"]
        return Intervals({float(level): math.inf if f is None else float(f) for level, f in factors.items()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file}: cannot be read ({error!r}); run the reactions again in a new folder") from error


def _text(value: float) -> str:
    return "" if value != value else f"{value:.5g}"
