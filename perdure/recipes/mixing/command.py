"""`perdure mix`: phase A once, then phase B once for each selection."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import apply_overrides, validate
from perdure.errors import RunError
from perdure.memory.select import at_least_one, exact_share
from perdure.memory.size import count_tokens
from perdure.models.load import positions_of
from perdure.recipes.mixing.data import FULL_CONTEXT, apart, key_of, task_of, with_sizes
from perdure.recipes.mixing.options import NONE, Options
from perdure.recipes.mixing.parallel import run_all, workers_for
from perdure.recipes.run import execute, quieten
from perdure.recipes.show import print_results, write_pages
from perdure.training.display import Display, Terminal
from perdure.training.folder import RunFolder
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.training.plan import Plan

CPU_ROWS = 8  # of a micro-batch without a GPU
EVALUATION_ROWS = 100
# How the settings are spelt that a run out of memory names.
NAMES = {
    "rows": "--micro-batch-size {0}, or --batch-size {0} (another effective batch, so a new --out)",
    "length": "--max-seq-length {}",
    "checkpointing": "--gradient-checkpointing",
    "resume": "{} --micro-batch-size {}",
}


@dataclass(frozen=True, slots=True)
class Experiment:
    """What the steps of an experiment share.

    Attributes:
        options: what was asked for.
        overrides: `key=value` settings of the runs.
        out: its folder.
        display: what a person sees.
        again: the command that goes on.
        track: names of trackers.
    """

    options: Options
    overrides: tuple[str, ...]
    out: Path
    display: Display
    again: str
    track: tuple[str, ...]


def run_mix(options: Options, overrides: Sequence[str], again: str, track: Sequence[str] = ()) -> None:
    """Run what is not finished yet, and write histories, figures, tables and pages of all selections asked for."""
    from perdure.models.adapters import count_parameters
    from perdure.recipes.mixing.results import write_experiment
    from perdure.training.plan import make_plan

    quieten()
    work = Experiment(options, tuple(overrides), options.folder, Terminal(), again, tuple(track))
    settings = _settings(work)
    plan = make_plan(settings)
    with _named():
        home = _phase_a(work, settings, plan)
    folders = {method: RunFolder(work.out / "runs" / options.slug(method)) for method in options.methods}
    left = {}
    for method, folder in folders.items():
        own = settings.model_copy(update={"name": options.label(method), **_strategy(options, plan, method)})
        if _begin(work, own, plan, home, folder, method):
            left[method] = own
    workers = options.workers or workers_for(4 * count_parameters(plan.model)[1], len(left))
    del plan
    run_all(list(left), partial(_phase_b, left, folders, again, track), workers, work.display, again)
    runs = [folder.path for folder in folders.values()]
    report = write_pages(runs, work.out / "report.html")
    print_results(runs, work.display, report)
    write_experiment(work, settings, folders)


@contextmanager
def _named() -> Iterator[None]:
    """Name the options of this command where a run is out of memory."""
    from perdure.training.fitting import OutOfMemory

    try:
        yield
    except OutOfMemory as error:
        raise OutOfMemory(error.fits, error.steps, error.again, NAMES) from error


def _settings(work: Experiment) -> RunSettings:
    """The settings of all runs, as they are without anything mixed in."""
    import torch

    options = work.options
    context = options.context
    if context == "auto":
        length = min(options.max_length, positions_of(options.model))
        context = "full" if length >= FULL_CONTEXT else "support"
    tasks = []
    for option, source, epochs in (
        ("--task-a", options.task_a, options.epochs_a),
        ("--task-b", options.task_b, options.epochs_b),
    ):
        spec, rows = task_of(source, option, context)
        tasks.append(with_sizes(spec, rows, options.n_train, options.n_val, epochs))
    if any(spec.prepare == "hotpot" for spec in tasks) and options.context == "auto":
        shown = "all paragraphs" if context == "full" else "the supporting sentences"
        work.display.say(f"HotpotQA questions stand behind {shown} (--context)")
    model = Path(options.model).expanduser()
    gpu = torch.cuda.is_available()
    # On a processor large micro-batches fall out of its caches and are slower; they need more memory too.
    micro = options.micro_batch_size or (options.batch_size if gpu else CPU_ROWS)
    values: dict[str, Any] = {
        "model": str(model.resolve()) if model.is_dir() else options.model,
        "tuning": "lora",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05},
        "strategy": "naive",
        "stream": {"tasks": [spec.model_dump(mode="json") for spec in apart(*tasks)]},
        "batch_size": options.batch_size,
        "micro_batch_size": micro if micro < options.batch_size else None,
        "evaluation_batch_size": EVALUATION_ROWS,
        "max_length": options.max_length,
        "precision": options.precision,
        "gradient_checkpointing": gpu if options.checkpointing is None else options.checkpointing,
        "optimizer": {"type": "adamw", "lr": options.lr},
        "schedule": {"type": "cosine", "warmup": 0.05},
        "clip": 1.0,
        "evaluation": {
            "every": options.eval_every,
            "generate_rows": options.generate_rows,
            "before_training": False,
        },
        "seed": options.seed,
    }
    return validate(RunSettings, apply_overrides(values, work.overrides), "perdure mix")


def _phase_a(work: Experiment, settings: RunSettings, plan: Plan) -> Path:
    """The folder of the first task's adapter, its run and its losses; trained where it is not there yet."""
    first = plan.stages[0].name
    model = Path(settings.model).name
    stamp = _stamp(settings, plan)
    home = work.out / f"{key_of(first)}_adapter_{model}_{work.options.precision}_{stamp[:8]}"
    folder = RunFolder(home / "run")
    if folder.after_stage(1) is None:
        work.display.say(f"phase A: {first}, in {home}")
        # On the way through phase A nothing is measured: it is phase B that is watched.
        quiet = settings.evaluation.model_copy(update={"every": None})
        own = settings.model_copy(update={"evaluation": quiet})
        execute(own, None, folder, work.display, work.again, plan=replace(plan, settings=own), stages=1)
        _export(plan, folder, home)
    elif not (home / "adapter_config.json").is_file() and not (home / "config.json").is_file():
        raise RunError(f"{home}: holds a run but no adapter; it was stopped in between. Remove it and begin again")
    else:
        work.display.say(f"phase A: {first} was trained before: {home}")
    return home


def _export(plan: Plan, folder: RunFolder, home: Path) -> None:
    """The adapter as PEFT writes it, beside its run."""
    from perdure.training.telling import export

    export(plan, folder)
    for exported in (folder.adapter, folder.model):
        for file in exported.iterdir() if exported.is_dir() else ():
            shutil.copyfile(file, home / f".{file.name}.partial")
            (home / f".{file.name}.partial").replace(home / file.name)


def _stamp(settings: RunSettings, plan: Plan) -> str:
    """Hex SHA-256 of all that phase A depends on: model, rows and settings, wherever their files lie."""
    from perdure.recipes.mixing.losses import rows_hash
    from perdure.training.plan import fixed_settings

    values = fixed_settings(settings)
    for key in ("model", "strategy", "continual_strategy", "stream"):
        values.pop(key)
    first = plan.stages[0]
    values |= {
        "base": dict(plan.base),
        "epochs": plan.epochs(first.name),
        "train": rows_hash(first.train),
        "evaluation rows": rows_hash(first.evaluation),
        "evaluation": settings.evaluation.model_dump(mode="json", exclude={"every"}),
    }
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _begin(work: Experiment, own: RunSettings, plan: Plan, home: Path, folder: RunFolder, method: str) -> bool:
    """Begin a selection's run where phase A ended, unless it was begun before; whether any of it is left to do."""
    from perdure.training.plan import changed_settings, fixed_settings, make_plan
    from perdure.training.run import Run

    if folder.exists and folder.saved():
        folder.refuse_changed(changed_settings(fixed_settings(folder.settings()), fixed_settings(own)))
        if folder.results.is_file() and folder.finished:
            work.display.say(f"{method}: finished already: {folder.path}")
            return False
        return True
    shutil.rmtree(folder.path, ignore_errors=True)  # stopped before it held anything
    with folder.locked():
        _adopt(work, Run(make_plan(own, like=plan), folder, work.display, work.again), home)
    return True


def _phase_b(
    settings: Mapping[str, RunSettings],
    folders: Mapping[str, RunFolder],
    again: str,
    track: Sequence[str],
    method: str,
    display: Display,
) -> None:
    """Train the second task with what was chosen of the first."""
    with _named():
        execute(settings[method], None, folders[method], display, again, track)


def _adopt(work: Experiment, run: Any, home: Path) -> None:
    """Begin a run where phase A ended; the losses that its selection goes by are measured once for all."""
    from perdure.recipes.mixing.losses import CachedLosses
    from perdure.strategies.rehearsal import Rehearsal

    strategy = run.plan.strategy
    if isinstance(strategy, Rehearsal):
        name = key_of(run.plan.stages[0].name)
        strategy.measure_losses = CachedLosses(home, name, run.plan.base, strategy.measure_losses, work.display.say)
    run.adopt(RunFolder(home / "run"))


def _strategy(options: Options, plan: Plan, method: str) -> Mapping[str, Any]:
    """The settings that make a replay of a method; every chosen row is replayed once an epoch."""
    if method == NONE:
        return {}
    rows = plan.stages[0].train
    share = exact_share(options.mix)
    replay: dict[str, Any] = {"select": method, "ratio": "once", "field": options.field}
    if options.resample:
        replay |= {"capacity": len(rows), "resample": options.mix, "unit": options.unit}
    elif options.unit == "tokens":
        replay["capacity"] = f"{at_least_one(share, sum(map(count_tokens, rows)))} tokens"
    else:
        replay["capacity"] = at_least_one(share, len(rows))
    return {"strategy": "replay", "continual_strategy": {"replay": replay}}
