"""From settings to all that a run needs: strategy, stream, model. Cheap checks come before anything heavy."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from perdure.errors import ConfigError, unknown_name
from perdure.strategies.base import Strategy
from perdure.strategies.build import STRATEGIES, build, settings_of
from perdure.streams import spec
from perdure.training.settings import RunSettings
from perdure.types import Example, Objective, Task

if TYPE_CHECKING:
    from perdure.models.load import LanguageModel
    from perdure.streams.encode import Encoder
    from perdure.streams.stream import Stream

STREAM_MODES = {
    "joint": "all tasks at once: the upper reference",
    "isolated": "each task alone from the same start",
}
PROBE = "general probe"
EVERYTHING = 1 << 53  # rows that a memory of "100%" has room for
LIBRARIES = ("perdure", "torch", "transformers", "peft", "accelerate", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A run that is ready to start.

    Attributes:
        settings: as validated.
        objective: what the model is trained for: "causal_lm", or "regression" of yields.
        language: the base model with its tokenizer.
        model: what is trained (the base, or the base with adapters, a soft prompt or a head).
        encoder: text to tokens and back; None for a regression.
        stream: the tasks, encoded.
        stages: what is trained on, in order.
        mode: "sequential", "joint" or "isolated".
        strategy: how not to forget.
        probe: rows of the general probe, not part of any task.
        data: counts and hashes of the data, by task.
        base: hashes of the base model's files, or the hub commit they are from.
        folder: where relative data paths were looked up (the recipe's own folder).
    """

    settings: RunSettings
    language: LanguageModel
    model: Any
    encoder: Encoder | None
    stream: Stream
    stages: tuple[Task, ...]
    mode: str
    strategy: Strategy
    probe: tuple[Example, ...]
    data: Mapping[str, Any]
    base: Mapping[str, str]
    folder: Path | None = None
    objective: Objective = "causal_lm"

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change when a run goes on: settings that matter, and a hash of each stage's rows."""
        return {
            "settings": fixed_settings(self.settings),
            "stages": {task.name: hash_rows(task.train) for task in self.stages},
            "base": dict(self.base),
        }

    def epochs(self, stage: str) -> int:
        """Passes over the rows of a stage: its task's own number, or that of the settings."""
        tasks = (*(self.settings.stream.tasks or ()), *self.settings.extensions)
        return next((task.epochs for task in tasks if task.name == stage and task.epochs), self.settings.epochs)

    @property
    def scored(self) -> dict[str, str]:
        """A hash of the rows that each task is scored on, and of the probe's."""
        return {task.name: hash_rows(task.evaluation) for task in self.stream.evaluations} | {
            PROBE: hash_rows(self.probe)
        }

    def differences(self, state: Mapping[str, Any]) -> list[str]:
        """How what a checkpoint was saved under differs from this plan, in words; later tasks do not count."""
        saved, own = state["identity"], self.identity
        found = changed_settings(_completed(saved["settings"]), own["settings"])
        for name, there in saved.get("base", {}).items():
            if self.base.get(name) != there:
                found.append(
                    f"model {self.language.name}: its {name} "
                    + ("is another one now" if name in self.base else "is gone")
                )
        for name, rows in self.scored.items():
            if state.get("scored", {}).get(name, rows) != rows:
                found.append(
                    ("the general probe: its" if name == PROBE else f"task {name}: its held-out") + " rows changed"
                )
        for name, rows in saved["stages"].items():
            if own["stages"].get(name) != rows:
                found.append(
                    f"task {name}: " + ("its training rows changed" if name in own["stages"] else "is gone")
                )
        return found


def hash_rows(rows: Sequence[Example]) -> str:
    """Hex SHA-256 of rows, in order: their tasks and keys, and what they say, which an id does not."""
    return sha256(json.dumps([[row.task, row.key, *_content(row)] for row in rows]).encode()).hexdigest()


def _content(row: Example) -> list[Any]:
    """The text of a row, with what of it is learnt, and its yield, class or values."""
    number = row.y.tolist() if row.y is not None and not (row.segments and row.y.dim()) else None
    return [[(segment.text, segment.learn) for segment in row.segments], number]


def changed_settings(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """How a saved run's settings differ from those given now, in words."""
    there, here = _flat(saved), _flat(now)
    return [
        f"{key}: {json.dumps(there.get(key))} there, {json.dumps(here.get(key))} now"
        for key in sorted(set(there) | set(here))
        if there.get(key) != here.get(key)
    ]


def fixed_settings(settings: RunSettings) -> dict[str, Any]:
    """The settings that a run cannot go on without."""
    return settings.model_dump(mode="json", exclude=CHANGEABLE)


def _completed(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Saved settings, and the defaults of those that came later, so that an older run can be gone on with."""
    try:
        return fixed_settings(RunSettings.model_validate(saved))
    except ValidationError:
        return saved


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, list | tuple):
        values = {str(index): value for index, value in enumerate(values)}
    if isinstance(values, Mapping):
        pairs = [(f"{prefix}.{key}".lstrip("."), inner) for key, inner in values.items()]
        return {name: value for key, inner in pairs for name, value in _flat(inner, key).items()}
    return {prefix: values}


# Settings that may differ when a run is resumed, and what names or grows it.
CHANGEABLE = {
    "name", "description", "extensions", "erased", "data", "micro_batch_size", "evaluation_batch_size",
    "evaluation", "probe", "log_every", "checkpoint_every", "checkpoint_keep", "skip_bad_batches", "device",
    "compile", "gradient_checkpointing",
}  # fmt: skip


def make_plan(settings: RunSettings, folder: Path | None = None, like: Plan | None = None) -> Plan:
    """Build everything that the settings name.

    Args:
        settings: of the run.
        folder: where relative data paths are looked up after `settings.data` (the recipe's own folder).
        like: a plan whose settings differ in the strategy alone: its rows are taken over, which saves time.

    Raises:
        UsageError: any mistake in what was asked.
    """
    # A tokenizer's own threads slow the training threads down on small machines, and warn after a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    mode = settings.strategy if settings.strategy in STREAM_MODES else "sequential"
    name = "naive" if mode != "sequential" else settings.strategy
    check_strategy(settings, name)
    if mode != "sequential" and settings.extensions:
        raise ConfigError(f"a {mode} run cannot be extended: it has no order of tasks; start a new run")

    if settings.stream.reactions is not None:
        return _regression(settings, folder, mode, name)
    import torch

    from perdure.models.adapters import count_virtual_tokens, tune
    from perdure.models.load import identify, load
    from perdure.streams.encode import Encoder

    torch.manual_seed(settings.seed)
    language = load(settings.model)
    model = tune(
        language.model,
        settings.tuning,
        **settings.lora.model_dump(),
        **settings.soft_prompt.model_dump(),
        tokenizer=language.tokenizer,
    )
    # Before any data is read: where prompts leave no room, every row would be called too long.
    ahead = build(name, with_capacity(settings.continual_strategy, 100))
    ahead.check(model, "causal_lm")
    room = language.max_length - count_virtual_tokens(model) - ahead.virtual_tokens
    limit = min(settings.max_length or room, room)
    encoder = Encoder(language.tokenizer, limit)
    places = (Path(settings.data) if settings.data else None, settings.seed, encoder, folder)
    erased = frozenset(settings.erased)
    if like is not None:
        strategy = build(
            name, with_capacity(settings.continual_strategy, sum(len(task.train) for task in like.stream))
        )
        return replace(like, settings=settings, language=language, model=model, mode=mode, strategy=strategy)
    probe = spec.build_task(_probe_spec(settings), *places, erased=erased)[0].train
    stream, facts = spec.build(settings.stream, *places, probe=probe, erased=erased)
    rows = sum(len(task.train) for task in stream)
    for extension in settings.extensions:
        if extension.name in stream.names:
            raise ConfigError(f"the stream has a task {extension.name!r} already; give the new one another --name")
        task, fact = spec.build_task(extension, *places, earlier=stream.tasks, probe=probe, erased=erased)
        stream = stream.extend(task)
        facts["tasks"] += fact["tasks"]
    stages = tuple(stream.joint() if mode == "joint" else stream)
    strategy = build(name, with_capacity(settings.continual_strategy, rows))
    return Plan(
        settings, language, model, encoder, stream, stages, mode, strategy, tuple(probe), facts,
        identify(language), folder,
    )  # fmt: skip


def _regression(settings: RunSettings, folder: Path | None, mode: str, name: str) -> Plan:
    from perdure.models.load import identify
    from perdure.streams.reactions.encode import ReactionEncoder
    from perdure.training.regression import ReactionData, make_regressor, pin_similarity

    settings = pin_similarity(settings)
    language, model = make_regressor(settings)
    # Before any data is read: what makes no sense for the model is known now.
    build(name, with_capacity(settings.continual_strategy, 100)).check(model, "regression")
    limit = min(settings.max_length or language.max_length, language.max_length)
    data = ReactionData(settings, ReactionEncoder(language.tokenizer, limit), folder)
    stream = data.stream()
    if settings.head.ensemble > 1 and (own := [n for n in name.split("+") if _owns_forward(n)]):
        raise ConfigError(
            f"head.ensemble: {own[0]} has a way of its own through the model, in which members would not be "
            "trained each by itself; take one head (--ensemble 1), or another strategy"
        )
    stages = tuple(stream.joint() if mode == "joint" else stream)
    later = {task.name for task in settings.extensions}
    rows = sum(len(task.train) for task in stream if task.name not in later)
    strategy = build(name, with_capacity(settings.continual_strategy, rows))
    facts = {"tasks": data.facts, "notes": data.notes, "scale": data.scale}
    return Plan(
        settings, language, model, None, stream, stages, mode, strategy, (), facts, identify(language), folder,
        "regression",
    )  # fmt: skip


def _owns_forward(name: str) -> bool:
    return STRATEGIES[name.strip()].forward is not Strategy.forward


def every_row(plan: Plan, erased: Sequence[str]) -> list[Example]:
    """The rows of all sources of a plan, also those that caps, splits or lengths leave out; not those erased."""
    settings = plan.settings.model_copy(update={"erased": tuple(erased)})
    if plan.encoder is None:
        from perdure.streams.reactions.encode import ReactionEncoder
        from perdure.training.regression import ReactionData

        encoder = ReactionEncoder(plan.language.tokenizer, plan.language.max_length)
        return ReactionData(settings, encoder, plan.folder).every_row()
    places = (Path(settings.data) if settings.data else None, settings.seed, plan.encoder, plan.folder)
    gone = frozenset(erased)
    rows = spec.rows_of(settings.stream, *places, erased=gone)
    for task in (_probe_spec(settings), *settings.extensions):
        rows += spec.rows_of(spec.StreamSpec(tasks=[task]), *places, erased=gone)
    return rows


def check_strategy(settings: RunSettings, name: str) -> None:
    """Refuse unknown strategies and settings before anything is loaded."""
    known = [*STRATEGIES, *STREAM_MODES]
    parts = [part.strip() for part in name.split("+")]
    for part in parts:
        if part not in known:
            raise ConfigError(unknown_name("strategy", part, known) + " Several are joined by +.")
        if part in STREAM_MODES:
            raise ConfigError(f"strategy {name!r}: {part} stands alone: it is a way to arrange the tasks")
    asked = [
        key for key, values in settings.continual_strategy.items() if values.get("enabled") and key not in parts
    ]
    if asked:
        raise ConfigError(
            f"continual_strategy.{asked[0]}.enabled: a run takes its strategies by name; say strategy: "
            f"{'+'.join(asked)}, or --strategy {'+'.join(asked)}"
        )
    for key in settings.continual_strategy:
        if "+" in key:
            first = key.split("+")[0].strip()
            raise ConfigError(
                f"continual_strategy.{key}: the members of a chain have their settings each under its own name, as "
                f"in continual_strategy.{first}.SETTING"
            )
    # Settings of strategies that this run does not use are checked too, or a misspelt one would go unnoticed.
    for key in dict.fromkeys([*parts, *settings.continual_strategy]):
        build(key, with_capacity(settings.continual_strategy, 100))
    build(name, with_capacity(settings.continual_strategy, 100))


def notes_on_strategy(settings: RunSettings) -> list[str]:
    """What a user may have overlooked in choosing a strategy and its settings."""
    given = settings.continual_strategy
    parts = [part.strip() for part in settings.strategy.split("+")]
    if "strategy" not in settings.model_fields_set and given:
        return [
            f"no strategy was chosen, so this is naive; there are settings for {', '.join(given)}: --strategy NAME"
        ]
    notes = []
    for part in parts:
        for scale in ("strength", "alpha"):
            known = settings_of(part) if part in STRATEGIES else {}
            if scale in known and not {scale, "lambda"} & given.get(part, {}).keys():
                notes.append(
                    f"{part}.{scale} is left at {known[scale].default:g}; it has no scale of its own and may do "
                    "nothing, or stop all learning: docs/strategies/index.md says where to start"
                )
    return notes


def with_capacity(settings: Mapping[str, Mapping[str, Any]], rows: int) -> dict[str, dict[str, Any]]:
    """Strategy settings in which a capacity given as a share ("5%") is the number of rows it comes to.

    "100%" is no number: it keeps those of tasks that are added later too.
    """
    resolved = {name: dict(values) for name, values in settings.items()}
    for name, values in resolved.items():
        share = values.get("capacity")
        if isinstance(share, str) and share.strip().endswith("%"):
            try:
                # As a float, 29 % of 100 rows comes to less than 29.
                part = Fraction(share.strip()[:-1]) / 100
            except (ValueError, ZeroDivisionError):
                part = Fraction(-1)
            if not 0 < part <= 1:
                raise ConfigError(f'{name}.capacity: a share must be above 0% and at most 100%, got "{share}"')
            values["capacity"] = EVERYTHING if part == 1 else max(1, int(part * rows))
    return resolved


def _probe_spec(settings: RunSettings) -> spec.TaskSpec:
    """The general probe's rows: the settings' own, or nano's set where none is given."""
    from perdure.models.load import NANO

    own = settings.probe or spec.TaskSpec(name=PROBE, train=str(NANO / "probe.jsonl"))
    return own.model_copy(update={"holdout": 0})


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """Threads and processor, which floating-point results depend on."""
    import torch

    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"threads": torch.get_num_threads(), "processor": processor, "system": platform.system()}
