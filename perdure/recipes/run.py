"""Commands on one run: start, go on, extend, evaluate."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import apply_overrides, read_yaml, validate
from perdure.errors import ConfigError, DataError, ModelError, RunError, StorageError
from perdure.recipes.find import read_recipe
from perdure.recipes.show import print_results, write_pages
from perdure.recipes.track import end, stopped, track_finished
from perdure.storage import there, write_json
from perdure.streams.spec import TaskSpec, check_inside
from perdure.tracking import build
from perdure.training.display import Display, Terminal
from perdure.training.folder import FINAL, LOCK, RunFolder
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.training.plan import Plan
    from perdure.training.run import Run


def settings_for(recipe: str, given: Mapping[str, Any], overrides: Sequence[str]) -> tuple[RunSettings, Path]:
    """A recipe's settings with those given on the command line, and the recipe's folder."""
    values, folder = read_recipe(recipe)
    values.setdefault("name", None)
    values |= {key: value for key, value in given.items() if value is not None}
    values = apply_overrides(values, overrides)
    if isinstance(values.get("data"), str):
        place = Path(values["data"]).expanduser()
        if not place.is_dir():
            raise DataError(f"--data {values['data']}: no such folder")
        values["data"] = str(place.resolve())
    if isinstance(values.get("model"), str) and Path(values["model"]).expanduser().is_dir():
        values["model"] = str(Path(values["model"]).expanduser().resolve())
    return validate(RunSettings, values, recipe), folder


def default_out(recipe: str, settings: RunSettings) -> Path:
    """Where a run goes when nothing is said."""
    name = Path(recipe).stem
    return Path("runs") / f"{name}-{settings.strategy}-{settings.tuning}-seed{settings.seed}"


def run_recipe(
    recipe: str,
    given: Mapping[str, Any],
    overrides: Sequence[str],
    out: Path | None,
    resume: bool,
    again: str,
    track: Sequence[str] = (),
) -> None:
    """Run a recipe in a folder and print what came of it."""
    settings, base = settings_for(recipe, given, overrides)
    folder = RunFolder(out or default_out(recipe, settings))
    display = Terminal()
    if folder.exists and not resume:
        raise RunError(f"{folder.path} holds a run already: add --resume to go on with it, or give another --out")
    if resume:
        from perdure.training.plan import changed_settings, fixed_settings

        if folder.exists:
            theirs = folder.settings()
            settings = pinned(settings, theirs)
            folder.refuse_changed(changed_settings(fixed_settings(theirs), fixed_settings(settings)))
        if not folder.exists:
            display.say(f"{folder.path}: no run here yet; starting")
        elif finished(folder):
            check_data(theirs.model_copy(update={"data": settings.data}), base, folder, display)
            display.say(f"{folder.path}: this run is finished; nothing to do")
            track_finished(folder, track, display)
            print_results([folder.path], display)
            return
        else:
            settings = settings.model_copy(update={"extensions": theirs.extensions, "erased": theirs.erased})
    execute(settings, base, folder, display, again, track)
    print_results([folder.path], display)


def pinned(settings: RunSettings, theirs: RunSettings) -> RunSettings:
    """The settings with the measure of likeness that "auto" stood for where the run began."""
    spec, own = settings.stream.reactions, theirs.stream.reactions
    if spec is None or own is None or spec.similarity != "auto":
        return settings
    stream = settings.stream.model_copy(
        update={"reactions": spec.model_copy(update={"similarity": own.similarity})}
    )
    return settings.model_copy(update={"stream": stream})


def execute(
    settings: RunSettings,
    base: Path | None,
    folder: RunFolder,
    display: Display,
    again: str,
    track: Sequence[str] = (),
    plan: Plan | None = None,
    stages: int | None = None,
) -> None:
    """Plan, run, and write plots and page; the trackers named hear of it all.

    Args:
        settings: of the run.
        base: the recipe's folder.
        folder: of the run.
        display: what a person sees.
        again: the command that goes on with the run.
        track: names of trackers.
        plan: of these settings, where it was made already.
        stages: stop after so many, without results; None: all.
    """
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    quieten()
    _check_folder(folder)
    trackers = build(track, folder.path, display.say)
    with folder.locked():
        if folder.erasing:
            raise RunError(
                f"{folder.path}: an erasure was stopped here; finish it first: perdure erase {folder.path} --resume"
            )
        plan = plan or make_plan(settings, base)
        with stopped(trackers):
            run = Run(plan, folder, display, again, callbacks=trackers)
            results = run.execute(stages)
            if results is not None:
                if plan.objective == "regression":
                    from perdure.recipes.reactions.outputs import write_outputs

                    write_outputs(run)
                write_pages([folder.path])
                end(trackers, results, folder)


def is_jax(folder: RunFolder) -> bool:
    """Whether the run here was trained by JAX."""
    return folder.recorded().get("backend") == "jax"


def quieten() -> None:
    """Keep other libraries' notices, which a user cannot act on, off the screen."""
    import logging

    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate)(\..*)?")


def check_data(settings: RunSettings, base: Path | None, folder: RunFolder, display: Display) -> None:
    """Refuse a finished run whose rows or model are others by now; warn where they are gone."""
    from perdure.training.plan import make_plan

    quieten()
    try:
        plan = make_plan(settings, base)
    except (DataError, ModelError) as error:
        display.say(f"warning: what this run was made from cannot be compared: {error}")
        return
    folder.refuse_changed(plan.differences(folder.load(folder.checkpoints / FINAL)))


def _check_folder(folder: RunFolder) -> None:
    """Refuse a folder that cannot be written before anything is loaded."""
    path = folder.path
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file; give a folder with --out")
    if path.is_dir() and not folder.exists and any(p.name != LOCK for p in path.iterdir()):
        raise RunError(f"{path} is not empty and holds no run; give another folder with --out")


def finished(folder: RunFolder) -> bool:
    """Whether a run's results are there, and nothing is under way."""
    return folder.results.is_file() and folder.finished and folder.readable and not folder.erasing


def extend_run(
    path: Path,
    task: Path | None,
    name: str | None,
    evaluation: Path | None,
    resume: bool,
    again: str,
    track: Sequence[str] = (),
) -> None:
    """Train a finished run on one more task."""
    folder = RunFolder(path)
    settings = folder.settings()
    display = Terminal()
    if resume:
        if finished(folder):
            display.say(f"{path}: nothing is left to do")
            track_finished(folder, track, display)
            print_results([path], display)
            return
    else:
        if folder.finished and not folder.readable:
            raise RunError(f"{path}: its final checkpoint cannot be read; see `perdure audit {path}`")
        if not finished(folder):
            raise RunError(f"{path} is not finished; go on with it first, with --resume")
        if task is None:
            raise ConfigError("--task is missing: give the new task's data file, or a YAML file with its settings")
        new = task_spec(task, name, evaluation)
        if settings.stream.reactions is not None:
            from perdure.training.regression import refuse_known

            refuse_known(settings, new.train, folder.recipe_folder)
        settings = settings.model_copy(update={"extensions": (*settings.extensions, new)})
    if is_jax(folder):
        from perdure.recipes.reactions import jax_backend

        jax_backend.execute(settings, folder, display, again, track)
    else:
        execute(settings, folder.recipe_folder, folder, display, again, track)
    print_results([path], display)
    if settings.stream.reactions is not None:
        from perdure.recipes.reactions.outputs import print_summary

        print_summary(path, display.say)


def task_spec(
    task: Path, name: str | None = None, evaluation: Path | None = None, option: str = "--task"
) -> TaskSpec:
    """A task's settings from a data file, or from a YAML file that holds them."""
    if not there(task):
        raise DataError(f"{option} {task}: no such file or folder")
    if task.suffix in (".yaml", ".yml"):
        values = read_yaml(task)
        values.setdefault("name", task.stem)
        for key in ("train", "evaluation"):
            if isinstance(values.get(key), str):
                check_inside(values[key])
            if isinstance(values.get(key), str) and (task.parent / values[key]).exists():
                values[key] = str((task.parent / values[key]).resolve())
    else:
        values = {"name": task.name.split(".")[0], "train": str(task.resolve())}
    if name:
        values["name"] = name
    if evaluation is not None:
        if not evaluation.exists():
            raise DataError(f"--evaluation {evaluation}: no such file or folder")
        values["evaluation"] = str(evaluation.resolve())
    return _validate_task(values, str(task))


def _validate_task(values: Mapping[str, Any], where: str) -> TaskSpec:
    from pydantic import ValidationError

    from perdure.config import explain

    try:
        return TaskSpec.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(explain(error, where, TaskSpec)) from error


def evaluate_run(path: Path, data: Path | None) -> None:
    """Score a run's newest state, on its own tasks or on a file."""
    from perdure.streams import spec
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    folder = RunFolder(path)
    settings = folder.settings()
    extra = None if data is None else task_spec(data, option="--data")
    if extra is not None and settings.stream.reactions is not None:
        raise ConfigError(f"--data: {path} is a run of reactions; use `perdure predict {path} FILE`")
    reader = _reader(extra, settings, folder.recipe_folder) if extra is not None else None
    if extra is not None and reader is not None:
        own = {name: getattr(extra, name) for name in extra.model_fields_set}
        extra = reader.model_copy(update={"split": None, "where": {}, **own})
    quieten()
    display = Terminal()
    if is_jax(folder):
        from perdure.recipes.reactions import jax_backend

        run: Run = jax_backend.open_run(settings, folder, display)
        plan = run.plan
    else:
        plan = make_plan(settings, folder.recipe_folder)
        run = Run(plan, folder, display)
        run.load()
        run.remember()
    if extra is not None and plan.encoder is not None:
        places = (Path(settings.data) if settings.data else None, settings.seed, plan.encoder)
        whole = {"holdout": 0, "evaluation": None, "train_rows": None, "evaluation_rows": None}
        tasks = spec.build_task(extra.model_copy(update=whole), *places)[0]
        rows = {tasks.name: tasks.train}
        run.measure.rules[tasks.name] = extra.answers
        if reader is not None:
            display.say(f"{data} is read as the run's task {reader.name} is")
    else:
        rows = {task.name: task.evaluation for task in plan.stream.evaluations}
        rows |= {"general probe": plan.probe} if plan.probe else {}
    from rich.table import Table

    from perdure.report import words

    known = plan.stream.names
    found = {name: run.measure(name, examples, name in known) for name, examples in rows.items()}
    metrics = list(dict.fromkeys(metric for values in found.values() for metric in values))
    table = Table(title=f"{path}", title_justify="left")
    for column in ("", "rows", *map(words.label, metrics)):
        table.add_column(column, justify="left" if not column else "right")
    for name, values in found.items():
        cells = [f"{values[m]:.4f}" if m in values else "-" for m in metrics]
        table.add_row(name, str(len(rows[name])), *cells)
    display.console.print(table)
    if plan.strategy.wants_task_ids:
        told = [name for name in rows if name in known]
        if told:
            display.say(f"note: told their task, but in columns that say inferred: {', '.join(told)}")
        if untold := [name for name in rows if name not in known]:
            display.say(f"note: tasks were inferred, since nothing says them, for: {', '.join(untold)}")
    for note in notes_of(run):
        display.say(note)
    part = "" if extra is None else "-" + re.sub(r"[^\w.-]", "_", extra.name)
    target = folder.path / f"evaluation{part}.json"
    try:
        write_json(target, {"format": 1, "data": str(data) if data else None, "scores": found})
    except StorageError as error:
        display.say(f"warning: {error}")
    else:
        display.say(f"written: {target}")


def notes_of(run: Run) -> list[str]:
    """What a user of the run's model should know about which model it is."""
    notes = []
    if not run.folder.finished:
        notes.append(f"note: the run is not finished; this is its model after step {run.learner.steps}")
    if run.plan.mode == "isolated":
        notes.append(f"note: an isolated run has a model a task; this is that of {run.plan.stages[-1].name}")
    return notes


def _reader(extra: TaskSpec, settings: RunSettings, base: Path | None) -> TaskSpec | None:
    """The task of a run, if any, that these rows belong to by its name or by its files."""
    places = [Path(place) for place in (settings.data, base) if place is not None]
    for task in (*(settings.stream.tasks or ()), *settings.extensions):
        files = [place / source for source in (task.train, task.evaluation) if source for place in places]
        if extra.name == task.name or any(there(f) and f.resolve() == Path(extra.train) for f in files):
            return task
    return None
