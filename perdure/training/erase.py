"""Exact erasure: a run becomes what it would be on files without some rows."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perdure.errors import NewerFormatError, RunError
from perdure.evaluation.matrix import ScoreMatrix
from perdure.order import fingerprint
from perdure.storage import file_hash, guarded, plain, write_text
from perdure.strategies.build import completed, describe
from perdure.tracking import forget, read_events
from perdure.training import checkpoint
from perdure.training.folder import FINAL, RunFolder, keys_name, remove
from perdure.training.plan import PROBE, Plan, every_row
from perdure.training.run import Run
from perdure.training.settings import RunSettings


@dataclass(frozen=True, slots=True)
class Way:
    """What an erasure has to do.

    Attributes:
        boundary: stages whose training stands; the run goes on from the checkpoint after them, 0 from the start.
        checkpoint: that checkpoint; None at the start.
        retrained: names of the stages that are trained again.
        rescored: names of the tasks whose held-out rows changed (the probe's among them).
    """

    boundary: int
    checkpoint: Path | None
    retrained: tuple[str, ...]
    rescored: tuple[str, ...]


def find_way(plan: Plan, folder: RunFolder, retrain: bool) -> Way | None:
    """What to do so that the run in the folder becomes one of this plan; None where nothing changed.

    Raises:
        RunError: no checkpoint from before the first stage that changed can be read, and `retrain` does not allow
            for starting over.
    """
    kept = task_ends(folder)
    if not kept:
        raise RunError(f"{folder.path}: no checkpoint here that can be read; run it again from the start")
    state = folder.load(kept[max(kept)])
    names = [task.name for task in plan.stages]
    there, here = state["identity"]["stages"], plan.identity["stages"]
    first = next((i for i, name in enumerate(names) if there.get(name) != here[name]), len(names))
    schedule = plan.settings.schedule
    horizon = schedule.at_boundary == "continue" and schedule.total_steps is None and plan.mode == "sequential"
    if first < len(names) and (horizon or completed(state["built"]) != describe(plan.strategy)):
        first = 0  # the schedule's length, or a capacity given as a share, hangs on the number of all rows
    rescored = tuple(name for name, rows in plan.scored.items() if state["scored"].get(name, rows) != rows)
    if first == len(names) and not rescored:
        return None
    start = max((n for n in kept if n <= first), default=0)
    if first and not start and not retrain:
        raise RunError(
            f"{folder.path}: the checkpoint from before task {names[first]!r} is gone or torn, so all "
            f"{len(names)} tasks would have to be trained again. Add --retrain to do that."
            if first < len(names)
            else f"{folder.path}: no checkpoint here that can be read. Add --retrain to train all tasks again."
        )
    return Way(start, kept.get(start), tuple(names[start:]), rescored)


def erase(
    folder: RunFolder,
    keys: Iterable[str],
    plan_for: Callable[[RunSettings], Plan],
    run_for: Callable[[Plan], Run],
    retrain: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Way | None:
    """Make the run in the folder what it would be with these rows gone from its files.

    Args:
        folder: of a finished run, or of one whose erasure was stopped.
        keys: fingerprints of the rows' keys.
        plan_for: makes a plan from settings.
        run_for: makes a run of a plan in the folder.
        retrain: start over where no early enough checkpoint is left.
        say: tells a person what is going on.

    Returns:
        What was done; None where no source of the run has such a row.
    """
    began = time.time()
    folder.sweep()
    pending = folder.erasing
    settings = RunSettings.model_validate(pending["settings"]) if pending else folder.settings()
    new = sorted(set(keys) - set(settings.erased))
    erased = settings.erased
    settings = settings.model_copy(update={"erased": tuple(sorted({*settings.erased, *new}))})
    plan = plan_for(settings)
    # A row that a cap or its length left out is in no stage, yet must not come in when a place is free.
    if pending is None:
        found = Counter(row.task for row in every_row(plan, erased) if fingerprint(row.key) in new)
        if not found:
            return None
        say("erasing rows: " + ", ".join(f"{task} {count}" for task, count in found.items()))
    # With no task's end left, an erasure has removed them all and was stopped before the first one that is new.
    rewound = pending is not None and not task_ends(folder)
    if rewound:
        with guarded(folder.path):
            for path in folder.saved():
                if not _readable(folder, path):
                    remove(path)  # one that the stopped erasure was about to remove
    way = None if rewound else find_way(plan, folder, retrain)
    before = pending["before"] if pending else hashes(folder)
    new = sorted({*new, *(pending["keys"] if pending else ())})
    done: Mapping[str, Any] = pending or {}
    changed = {
        "retrained": way.retrained if way and way.retrained else tuple(done.get("retrained", ())),
        "rescored": way.rescored if way and way.rescored else tuple(done.get("rescored", ())),
    }
    begun = {"event": "begun", "keys": new, "before": before, "time": round(began, 3), **changed}
    write_log(folder, {**begun, "settings": settings.model_dump(mode="json")})
    # From here on every plan of this folder does without the rows, whatever stops us.
    folder.write_settings(settings, folder.recorded())
    for left in forget(folder.path):
        say(f"note: {left} was tracked with the rows in it, and is yours to remove")
    folder.sweep(unreadable=True)
    folder.drop_evaluations()
    if way is not None:
        say(_words(way))
        _rewind(folder, way)
        if way.checkpoint is not None:
            _rescore(plan, folder, way, run_for)
    stages = len(plan.stages)
    del plan  # and its model, before the next one is loaded
    go_on(folder, settings, plan_for, run_for)
    folder.sweep(unreadable=True)
    write_log(
        folder,
        {
            "event": "done",
            "keys": new,
            "before": before,
            "after": hashes(folder),
            **changed,
            "seconds": round(time.time() - began, 3),
        },
    )
    return way or Way(stages, None, (), ())


def go_on(
    folder: RunFolder,
    settings: RunSettings,
    plan_for: Callable[[RunSettings], Plan],
    run_for: Callable[[Plan], Run],
) -> None:
    """Train from the newest checkpoint between two stages to the end, as it happened: extensions one by one."""
    state, _ = folder.newest()
    begun = state["begun"] if state else 0
    for count in range(len(settings.extensions) + 1):
        plan = plan_for(settings.model_copy(update={"extensions": settings.extensions[:count]}))
        if len(plan.stages) >= begun:  # an extension may bring several tasks
            run_for(plan).execute()


def write_log(folder: RunFolder, event: Mapping[str, Any]) -> None:
    """Add a line to erasures.jsonl."""
    before = folder.erasures.read_text(encoding="utf-8") if folder.erasures.exists() else ""
    write_text(folder.erasures, before + json.dumps(plain(event)) + "\n")


def task_ends(folder: RunFolder) -> dict[int, Path]:
    """Readable checkpoints between two stages, by the number of stages that they follow."""
    found = {}
    for path in folder.saved():
        try:
            state = folder.load(path)
        except RunError:
            continue
        if "built" in state and state["position"] is None and not state["trained"]:
            found[state["stage"]] = path
    return found


def _readable(folder: RunFolder, path: Path) -> bool:
    try:
        folder.load(path)
    except NewerFormatError:
        raise
    except RunError:
        return False
    return True


def _rewind(folder: RunFolder, way: Way) -> None:
    """Remove what was made of the rows: later checkpoints and what was exported from them."""
    if way.checkpoint is not None and way.checkpoint.name == FINAL:
        state = checkpoint.load(way.checkpoint)
        folder.reopen(state["learner"]["steps"], state["stage"])
    kept = task_ends(folder)
    keep = {kept[number] for number in kept if number <= way.boundary}
    with guarded(folder.path):
        for path in folder.saved():
            if path not in keep:
                remove(path)
        for path in folder.keys.glob("stage-*.jsonl"):
            if path.name > keys_name(way.boundary):
                path.unlink()
        for path in (folder.model, folder.adapter):
            if way.retrained:
                remove(path)


def _rescore(plan: Plan, folder: RunFolder, way: Way, run_for: Callable[[Plan], Run]) -> None:
    """Bring the scores of the checkpoints that stay up to the rows that stay."""
    kept = task_ends(folder)
    found: dict[int, dict[str, dict[str, float]]] = {}
    if way.rescored:
        run = run_for(plan)
        found[0] = run.score_again(0, way.rescored)
        for number in sorted(kept):
            run.restore(checkpoint.load(kept[number]))
            found[number] = run.score_again(number, way.rescored)
        _correct_log(folder.metrics, found, plan.mode)
    # The newest one last: it is the one that says whether this was done.
    for number in sorted(kept):
        state = checkpoint.load(kept[number])
        matrices = {metric: ScoreMatrix.from_dict(saved) for metric, saved in state["matrices"].items()}
        for row, scores in found.items():
            if row <= number:
                cell_row = row if plan.mode == "sequential" else min(row, 1)
                _correct(matrices, state["probe"], cell_row, way.rescored, scores)
        matrices = {metric: matrix for metric, matrix in matrices.items() if not np.isnan(matrix.values).all()}
        state["matrices"] = {metric: matrix.to_dict() for metric, matrix in matrices.items()}
        known = [task.name for task in plan.stages][: max(number, len(plan.stages) - len(plan.settings.extensions))]
        state["identity"] = {**plan.identity, "stages": {n: plan.identity["stages"][n] for n in known}}
        state["scored"] = {n: rows for n, rows in plan.scored.items() if n in state["scored"]}
        checkpoint.save(kept[number], state)


def _correct(
    matrices: Mapping[str, ScoreMatrix],
    probe: Mapping[str, list[float | None]],
    row: int,
    names: Sequence[str],
    scores: Mapping[str, Mapping[str, float]],
) -> None:
    for name in names:
        values = scores.get(name, {})
        if name == PROBE:
            for metric, value in values.items():
                probe[metric][row] = value
            continue
        for metric, matrix in matrices.items():
            # What was not measured at that time is not now; what has no row left to measure has no score.
            if name in matrix.tasks and not math.isnan(matrix.values[row, matrix.tasks.index(name)]):
                matrix.record(row, name, values.get(metric, math.nan))


def _correct_log(path: Path, found: Mapping[int, Mapping[str, Mapping[str, float]]], mode: str) -> None:
    """Put the new scores in place of those that the log has."""
    new = {
        (row if mode == "sequential" else min(row, 1), name): values
        for row, scores in found.items()
        for name, values in scores.items()
    }
    lines = []
    for event in read_events(path):
        name = {"evaluation": event.get("task"), "probe": PROBE}.get(event["event"])
        values = new.get((event.get("row"), name)) if name else None  # type: ignore[arg-type]
        lines.append(json.dumps(plain({**event, "metrics": values} if values else event)) + "\n")
    write_text(path, "".join(lines))


def hashes(folder: RunFolder) -> dict[str, str]:
    """SHA-256 of the files that stand for the run's result."""
    places: Sequence[Path] = (folder.checkpoints / FINAL, folder.model, folder.adapter)
    files = [path for place in places if place.is_dir() for path in sorted(place.rglob("*")) if path.is_file()]
    files += sorted(folder.path.glob("scores*.csv"))
    return {path.relative_to(folder.path).as_posix(): file_hash(path) for path in files}


def _words(way: Way) -> str:
    said = []
    if way.retrained:
        start = "from the start" if way.checkpoint is None else f"from {way.checkpoint.name}"
        said.append(f"training {', '.join(way.retrained)} again, {start}")
    if way.rescored:
        said.append(f"scoring {', '.join(way.rescored)} again")
    return "; ".join(said)
