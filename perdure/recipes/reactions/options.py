"""What is asked of a run of reactions: options of the command line to settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perdure.config import apply_overrides, validate
from perdure.errors import ConfigError, unknown_name
from perdure.strategies.build import STRATEGIES, settings_of
from perdure.training.plan import STREAM_MODES
from perdure.training.settings import RunSettings

SEED = 7193  # of the system that this replaces
SEQUENTIAL, REPLAY, ALL = "sequential", "replay", "all"
# Rows kept for replay where --memory says nothing.
MEMORY = "10%"
# With bf16 products a processor takes a step of torch in less than half the time of fp32; JAX was not measured.
PRECISION = {"torch": "bf16", "jax": "fp32"}
# Of a micro-batch without a GPU. They are sorted by length, so that less is padding.
CPU_ROWS = 16
MICRO = "micro_batch_size"


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `perdure reactions`; None where nothing was said. See `docs/reactions.md`."""

    data: Path | None = None
    setting: str = REPLAY
    tuning: str = "head"
    model: str | None = None
    head: str | None = None
    heads: int | None = None
    ensemble: int | None = None
    epochs: int | None = None
    rank: int | None = None
    lora_alpha: int | None = None
    lr: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    memory: str | None = None
    gradient: str | None = None
    smiles_column: str | None = None
    yield_column: str | None = None
    yield_scale: str | None = None
    task_columns: str | None = None
    order: str | None = None
    holdout: float | None = None
    augment: int | None = None
    canonical: bool = False
    seed: int | None = None
    out: Path | None = None


def settings_for(options: Options, overrides: Sequence[str] = (), backend: str = "torch") -> RunSettings:
    """The settings that these options stand for.

    Raises:
        ConfigError: an option that would do nothing, no table, or a value that cannot be; all mistakes together.
    """
    import torch

    from perdure.models.backbone import default_backbone

    if options.data is None:
        raise ConfigError(NO_DATA)
    if not options.data.is_file():
        raise ConfigError(f"--data {options.data}: no such file. {NO_DATA}")
    strategy = {SEQUENTIAL: "naive"}.get(options.setting, options.setting)
    _refuse_idle(options, strategy.split("+"))
    reactions: dict[str, Any] = {
        "file": str(options.data.resolve()),
        "smiles_column": options.smiles_column,
        "yield_column": options.yield_column,
        "yield_scale": options.yield_scale,
        "task_columns": _columns(options.task_columns),
        "order": options.order,
        "holdout": options.holdout,
        "augment": options.augment,
        "canonical": options.canonical or None,
    }
    values: dict[str, Any] = {
        "model": _model(options.model) or default_backbone(),
        "tuning": options.tuning,
        "strategy": strategy,
        "stream": {"reactions": {key: value for key, value in reactions.items() if value is not None}},
        "epochs": 15 if options.epochs is None else options.epochs,
        "batch_size": 32 if options.batch_size is None else options.batch_size,
        "optimizer": {"type": "adamw", "lr": 2e-4 if options.lr is None else options.lr, "weight_decay": 0.01},
        "clip": 1.0,
        "precision": options.precision or PRECISION[backend],
        "lora": {"r": 16 if options.rank is None else options.rank, "alpha": options.lora_alpha or 64},
        "evaluation": {"each_epoch": True},
        "continual_strategy": _strategy(options, strategy),
        "seed": SEED if options.seed is None else options.seed,
    }
    head = {"type": options.head, "heads": options.heads, "ensemble": options.ensemble}
    values["head"] = {key: value for key, value in head.items() if value is not None}
    values = apply_overrides(values, overrides)
    processor = values.get("device") == "cpu" or not torch.cuda.is_available()
    if MICRO not in values and backend == "torch" and processor:
        size = values["batch_size"]
        values[MICRO] = min(CPU_ROWS, size) if isinstance(size, int) and size > 0 else None
    return validate(RunSettings, values, "perdure reactions")


def cut_as_before(settings: RunSettings, theirs: RunSettings, overrides: Sequence[str]) -> RunSettings:
    """The settings to go on with a run: its own micro-batches, where nobody asked for others."""
    if any(override.partition("=")[0].strip() == MICRO for override in overrides):
        return settings
    return settings.model_copy(update={MICRO: theirs.micro_batch_size})


def default_out(settings: RunSettings, setting: str, backend: str = "torch") -> Path:
    """Where a run goes when nothing is said."""
    model = Path(settings.model).name
    end = "" if backend == "torch" else f"-{backend}"
    return Path("runs") / f"reactions-{setting}-{settings.tuning}-{model}-seed{settings.seed}{end}"


def _model(name: str | None) -> str | None:
    if name is not None and Path(name).expanduser().is_dir():
        return str(Path(name).expanduser().resolve())
    return name


def _columns(text: str | None) -> list[str] | None:
    """Columns between commas; an empty text stands for no column: all rows are one task."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _strategy(options: Options, strategy: str) -> dict[str, dict[str, Any]]:
    """The settings of the strategies that keep rows."""
    found: dict[str, dict[str, Any]] = {}
    for part in strategy.split("+"):
        if part in STRATEGIES and "capacity" in settings_of(part):
            memory = options.memory or MEMORY
            found[part] = {"capacity": "100%" if memory == ALL else _capacity(memory)}
    if options.gradient is not None:
        found.setdefault(REPLAY, {})["gradients"] = options.gradient
    return found


def _capacity(memory: str) -> int | str:
    return int(memory) if memory.isdecimal() else memory


def _refuse_idle(options: Options, parts: Sequence[str]) -> None:
    """Refuse options that nothing would look at."""
    keeps = [part for part in parts if part in STRATEGIES and "capacity" in settings_of(part)]
    known = (SEQUENTIAL, *STREAM_MODES, *STRATEGIES)
    named = [name for name in known if name != "naive"]  # which is "sequential" here
    idle = [
        "--setting: " + unknown_name("setting", part, named) + " Several are joined by +."
        for part in parts
        if part not in known
    ]
    if options.memory is not None and not keeps and not idle:
        idle.append(f"--memory: {options.setting} keeps no rows; take --setting replay")
    if options.gradient is not None and REPLAY not in parts:
        idle.append(f"--gradient: it is about replayed rows, and {options.setting} replays none")
    if options.tuning != "lora":
        idle += [
            f"--{name}: it is LoRA's; take --tuning lora"
            for name, value in (("rank", options.rank), ("lora-alpha", options.lora_alpha))
            if value is not None
        ]
    if options.heads is not None and options.head not in (None, "mhar"):
        idle.append(f"--heads: the head {options.head} has no attention")
    if idle:
        raise ConfigError("perdure reactions: " + "\n  ".join(idle))


NO_DATA = (
    "Give a table with --data: the spreadsheet aap9112_Data_File_S1.xlsx of Perera et al. 2018 (Science 359:429, "
    "doi 10.1126/science.aap9112, supplementary materials), or any CSV with a column of reaction SMILES "
    "(--smiles-column), a column of yields (--yield-column), and columns that say which rows are one task "
    "(--task-columns)."
)
