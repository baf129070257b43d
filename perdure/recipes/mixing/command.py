"""`perdure mix`: phase A once, then phase B once for each selection."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import apply_overrides, validate
from perdure.errors import ConfigError, RunError
from perdure.memory.select import at_least_one, exact_share, order, policy_of
from perdure.memory.size import count_tokens
from perdure.models.load import positions_of
from perdure.recipes.mixing.data import FULL_CONTEXT, apart, key_of, task_of, with_sizes
from perdure.recipes.mixing.options import NONE, Options
from perdure.recipes.mixing.parallel import run_all, workers_for
from perdure.recipes.run import execute, quieten
from perdure.storage import write_bytes, write_text
from perdure.training.display import Display, Terminal
from perdure.training.folder import LOCK, RunFolder, remove
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.training.plan import Plan

CPU_ROWS = 8  # of a micro-batch without a GPU
GPU_TOKENS = 16384  # of a micro-batch with one; its logits, over a vocabulary of 32,000, must fit
STAMP = "mixing.stamp"
EXPORTED = ("adapter_config.json", "config.json")  # one of them, written last, says that phase A was exported
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
    if work.out.exists() and not work.out.is_dir():
        raise RunError(f"--out {work.out} is a file; give a folder")
    settings = _settings(work)
    plan = make_plan(settings)
    # What is wrong is said before hours are spent on phase A.
    _check_fields(options, plan)
    runs = {}
    for method in options.methods:
        own = settings.model_copy(update={"name": options.label(method), **_strategy(options, plan, method)})
        runs[method] = Selection(RunFolder(work.out / "runs" / options.slug(method)), own, _stamp(own, plan))
        runs[method].refuse_another()
    _refuse_another_experiment(work.out, _stamp(settings, plan))
    with _named():
        home = _phase_a(work, settings, plan)
    for method, run in runs.items():
        if run.finished:
            work.display.say(f"{method}: finished already: {run.folder.path}")
        elif not run.begun:
            _begin(work, run, _stamp(settings, plan), plan, home)
    workers = options.workers or workers_for(4 * count_parameters(plan.model)[1], len(runs))
    del plan
    left = {method: run for method, run in runs.items() if not run.finished}
    run_all(list(left), partial(_phase_b, left, again, track), workers, work.display, again)
    write_experiment(work, settings, {method: run.folder for method, run in runs.items()})


def _check_fields(options: Options, plan: Plan) -> None:
    """ConfigError where a policy goes by a column that the first task's rows do not have."""
    for method in options.methods:
        if method != NONE and policy_of(method).needs == {"field"}:
            try:
                order(plan.stages[0].train, method, seed=options.seed, field=options.field)
            except ConfigError as error:
                raise ConfigError(
                    f"--selection-method {method}: {error}. --difficulty-field names the column"
                ) from error


def _refuse_another_experiment(out: Path, stamp: str) -> None:
    """RunError where the folder holds selections that are not to be compared with those asked for."""
    for file in sorted((out / "runs").glob(f"*/{STAMP}")):
        if file.read_text(encoding="utf-8").split()[-1] != stamp:
            raise RunError(
                f"{file.parent} is of an experiment with another model, other rows, epochs, seed or other settings "
                "than this command's, and the two cannot stand in one table. Give another --out."
            )


@dataclass(frozen=True, slots=True)
class Selection:
    """The run of one selection.

    Attributes:
        folder: of the run.
        settings: of the run.
        stamp: a hash of all that it depends on; it stands in the folder.
    """

    folder: RunFolder
    settings: RunSettings
    stamp: str

    @property
    def begun(self) -> bool:
        """Whether it can be gone on with."""
        return self.folder.exists and bool(self.folder.saved())

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        return self.begun and self.folder.results.is_file() and self.folder.finished

    def refuse_another(self) -> None:
        """RunError where the folder holds a run that was trained on other rows or with other settings."""
        from perdure.training.plan import changed_settings, fixed_settings

        path = self.folder.path
        if not self.begun:
            if self.folder.results.is_file():
                raise RunError(
                    f"{path}: holds results but no checkpoint to go on from; remove it, or give another --out"
                )
            return
        self.folder.refuse_changed(
            changed_settings(fixed_settings(self.folder.settings()), fixed_settings(self.settings))
        )
        try:
            there = (path / STAMP).read_text(encoding="utf-8").strip()
        except OSError:
            there = "none"
        if there.split()[0] != self.stamp:
            raise RunError(
                f"{path}: this run was begun with another model, other rows or held-out rows, or measured "
                "otherwise (the files have changed since, or --n-val, --generate-rows or --eval-every). Put that "
                "back, or give another --out."
            )


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
    length = min(options.max_length, positions_of(options.model))
    if context == "auto":
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
    micro = options.micro_batch_size or (max(1, GPU_TOKENS // length) if gpu else CPU_ROWS)
    if any(override.partition("=")[0].strip() == "epochs" for override in work.overrides):
        raise ConfigError("--set epochs: each phase has its own: --task-a-epochs and --task-b-epochs")
    values: dict[str, Any] = {
        "model": str(model.resolve()) if model.is_dir() else options.model,
        "tuning": "lora",
        "lora": {"r": 8, "alpha": 16, "dropout": 0.05},
        "strategy": "naive",
        "stream": {"tasks": [spec.model_dump(mode="json") for spec in apart(*tasks)]},
        "batch_size": options.batch_size,
        "micro_batch_size": min(micro, options.batch_size),
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
    from perdure.training.run import Run

    first = plan.stages[0].name
    model = Path(settings.model).name
    stamp = _stamp_a(settings, plan)
    home = work.out / f"{key_of(first)}_adapter_{model}_{work.options.precision}_{stamp[:8]}"
    folder = RunFolder(home / "run")
    # On the way through phase A nothing is measured: it is phase B that is watched.
    quiet = settings.evaluation.model_copy(update={"every": None})
    own = settings.model_copy(update={"evaluation": quiet})
    aside = replace(plan, settings=own)
    if folder.after_stage(1) is None:
        work.display.say(f"phase A: {first}, in {home}")
        try:
            execute(own, None, folder, work.display, work.again, plan=aside, stages=1)
        finally:
            if folder.after_stage(1) is not None:  # stopped or not, its weights are in place
                _export(aside, folder, home)
    elif any((home / name).is_file() for name in EXPORTED):
        work.display.say(f"phase A: {first} was trained before: {home}")
    else:
        work.display.say(f"phase A: {first} was trained before; its adapter is written: {home}")
        Run(aside, folder, work.display).load()
        _export(aside, folder, home)
    return home


def _export(plan: Plan, folder: RunFolder, home: Path) -> None:
    """The adapter as PEFT writes it, beside its run; its config comes last and says that all is there."""
    from perdure.training.telling import export

    export(plan, folder)
    files = [file for place in (folder.adapter, folder.model) if place.is_dir() for file in place.iterdir()]
    for file in sorted(files, key=lambda file: file.name in EXPORTED):
        write_bytes(home / file.name, file.read_bytes())


def _stamp_a(settings: RunSettings, plan: Plan) -> str:
    """Hex SHA-256 of all that phase A depends on: model, rows and settings, wherever their files lie."""
    from perdure.recipes.mixing.losses import rows_hash
    from perdure.training.plan import fixed_settings

    values = fixed_settings(settings)
    for key in ("model", "strategy", "continual_strategy", "stream"):
        values.pop(key)
    first, second = plan.stages
    if settings.schedule.at_boundary == "continue":  # the rate then follows from the steps of both phases
        values["horizon"] = [len(second.train), plan.epochs(second.name)]
    values |= {
        "base": dict(plan.base),
        "epochs": plan.epochs(first.name),
        "train": rows_hash(first.train),
        "evaluation rows": rows_hash(first.evaluation),
        "evaluation": settings.evaluation.model_dump(mode="json", exclude={"every"}),
    }
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _stamp(settings: RunSettings, plan: Plan) -> str:
    """Hex SHA-256 of all that a selection's run depends on."""
    from perdure.recipes.mixing.losses import rows_hash

    second = plan.stages[1]
    values = [
        _stamp_a(settings, plan),
        settings.evaluation.every,
        settings.strategy,
        settings.continual_strategy,
        plan.epochs(second.name),
        rows_hash(second.train),
        rows_hash(second.evaluation),
        rows_hash(plan.probe),
    ]
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _begin(work: Experiment, selection: Selection, common: str, plan: Plan, home: Path) -> None:
    """Begin a selection's run where phase A ended."""
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    folder = selection.folder
    with folder.locked():
        for path in folder.path.iterdir():
            if path.name != LOCK:
                remove(path)  # of a beginning that was stopped before it held a checkpoint
        write_text(folder.path / STAMP, f"{selection.stamp}\n{common}\n")
        _adopt(work, Run(make_plan(selection.settings, like=plan), folder, work.display, work.again), home)


def _phase_b(
    runs: Mapping[str, Selection], again: str, track: Sequence[str], method: str, display: Display
) -> None:
    """Train the second task with what was chosen of the first."""
    display.say(f"phase B, {runs[method].settings.name}: {runs[method].folder.path}")
    with _named():
        execute(runs[method].settings, None, runs[method].folder, display, again, track)


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
