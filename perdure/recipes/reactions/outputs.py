"""What a run of reactions leaves beside an ordinary run: tables for a spreadsheet, predictions, the baseline."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from perdure.evaluation.score import MAIN
from perdure.recipes.reactions.foretell import (
    FEWEST,
    Array,
    Foretold,
    Intervals,
    Method,
    calibrate,
    foretell,
    method_of,
    sets_width,
)
from perdure.recipes.reactions.trees import trees
from perdure.storage import write_json, write_text
from perdure.tracking import read_events
from perdure.training.folder import RunFolder
from perdure.types import Example

if TYPE_CHECKING:
    from perdure.training.run import Run

CALIBRATION, BASELINE = "calibration.json", "baseline.json"
HELD_OUT, TRAINING = "predictions_held_out.csv", "predictions_training.csv"
PREDICTIONS = ("key", "task", "reaction_smiles", "true", "predicted", "std", "lower", "upper", "calibration")
Teller = Callable[[Any, Sequence[Example], Method, int, int], Foretold]
EPOCHS = ("epoch", "training_loss", "held_out_loss", "held_out_rmse", "held_out_r2")


def write_outputs(run: Run, teller: Teller = foretell) -> None:
    """Write all of it into a finished run's folder.

    Args:
        run: at its end.
        teller: what foretells yields with the run's learner.
    """
    plan, folder = run.plan, run.folder
    run.display.doing("predictions")
    tasks = plan.stream.evaluations
    if plan.mode == "isolated":
        tasks = plan.stages[-1:]  # each task had a model of its own, and this is the last one's
    held = [row for task in tasks for row in task.evaluation]
    trained = [row for task in tasks for row in task.train]
    settings = plan.settings
    method = method_of(settings)
    samples = settings.evaluation.samples
    made = teller(run.learner, held, method, samples, settings.seed)
    fits = np.array([sets_width(row, settings.seed) for row in held], dtype=bool)
    intervals, found = calibrate(made, _true(held), fits, method)
    if found:
        write_json(folder.path / CALIBRATION, found)
    else:
        (folder.path / CALIBRATION).unlink(missing_ok=True)
        if held:
            run.display.say(
                f"note: no intervals: half of the held-out rows set their widths, at least {FEWEST}, and these are "
                f"{fits.sum()} of {len(held)}"
            )
    write_predictions(folder.path / HELD_OUT, held, made, intervals, fits)
    for metric in ("r2", "rmse"):
        if metric in run.scores.matrices:  # not where no row is held out
            run.scores.matrices[metric].to_csv(folder.path / f"{metric}_matrix.csv")
    write_epochs(folder, [task.name for task in plan.stages])
    baseline = trees(plan.stream.evaluations)
    if baseline is not None:
        write_json(folder.path / BASELINE, baseline)
    seen = teller(run.learner, trained, "none", 0, settings.seed)
    write_predictions(folder.path / TRAINING, trained, seen, None, None)  # the last, by which `written` goes


def written(folder: RunFolder) -> bool:
    """Whether a finished run has its tables; one that was stopped between its end and them has not."""
    return (folder.path / TRAINING).is_file()


def write_predictions(
    path: Path,
    rows: Sequence[Example],
    foretold: Foretold,
    intervals: Intervals | None,
    fits: Iterable[bool] | None,
) -> None:
    """One line a row; yields as fractions."""
    nothing: Array = np.full(len(rows), math.nan)
    lower, upper = (nothing, nothing) if intervals is None else intervals.bounds(foretold)
    marks = ["0"] * len(rows) if fits is None else [str(int(fit)) for fit in fits]
    values = zip(foretold.mean, foretold.std, lower, upper, strict=True)
    write_csv(
        path,
        PREDICTIONS,
        (
            [row.key, row.task, row.segments[0].text, _number(value), *map(_number, (mean, std, low, high)), mark]
            for row, value, (mean, std, low, high), mark in zip(rows, _true(rows), values, marks, strict=True)
        ),
    )


def write_epochs(folder: RunFolder, stages: Sequence[str]) -> None:
    """For each stage a file of its epochs: the mean training loss, and the held-out scores after each."""
    for old in folder.path.glob("epoch_losses_task_*.csv"):
        old.unlink()
    losses: dict[int, dict[tuple[int, int], list[tuple[int, float]]]] = {}  # by stage, then phase and epoch
    scored: dict[int, dict[tuple[int, int], Mapping[str, Any]]] = {}
    for event in read_events(folder.metrics):
        if event["event"] == "step":
            epochs = losses.setdefault(event["stage"], {})
            place = (event.get("phase", 0), event["epoch"])
            epochs.setdefault(place, []).append((event["tokens"], event["loss"]))
        elif event["event"] == "epoch":
            place = (event.get("phase", 0), event["epoch"])
            scored.setdefault(event["stage"], {})[place] = event["metrics"]
    for stage in range(1, len(stages) + 1):
        lines = []
        own, held = losses.get(stage, {}), scored.get(stage, {})
        for number, place in enumerate(sorted(own.keys() | held.keys()), start=1):
            found, steps = held.get(place, {}), own.get(place, [])
            rows = sum(n for n, _ in steps)
            mean = math.fsum(n * loss for n, loss in steps) / rows if rows else math.nan
            lines.append([number, _number(mean), *(_number(found.get(m)) for m in ("loss", "rmse", "r2"))])
        write_csv(folder.path / f"epoch_losses_task_{stage:02d}.csv", EPOCHS, lines)


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Replace a CSV file in one step."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    write_text(path, text.getvalue())


def print_summary(path: Path, say: Any) -> None:
    """What the run's model and the baseline reach over all held-out rows, in lines."""
    results = json.loads((path / "results.json").read_text(encoding="utf-8"))
    metrics = results["metrics"]
    main = MAIN["regression"][0]
    if metrics.get(main, {}).get("pooled") is None:
        return
    training = metrics["r2_training"]["pooled"]  # None where the yields that were trained on are all equal
    say(
        f"over all held-out rows: R² {metrics['r2']['pooled']:.3f}, RMSE {metrics['rmse']['pooled']:.3f}, MAE "
        f"{metrics['mae']['pooled']:.3f} (yields as fractions); over rows that were trained on: R² "
        + ("undefined" if training is None else f"{training:.3f}")
    )
    file = path / BASELINE
    if file.is_file():
        found = json.loads(file.read_text(encoding="utf-8"))
        say(
            f"baseline, boosted trees on the one-hot conditions, trained jointly: R² {found['r2']:.3f}, RMSE "
            f"{found['rmse']:.3f}, MAE {found['mae']:.3f}; mean R² of a task {found['mean_task_r2']:.3f}"
        )


def _true(rows: Sequence[Example]) -> Array:
    return np.array([math.nan if row.y is None else float(row.y) for row in rows])


def _number(value: Any) -> str:
    return "" if value is None or value != value else f"{value:.6g}"
