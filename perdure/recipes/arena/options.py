"""What is asked of an arena run: options of the command line to settings, with defaults by model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from perdure.config import (
    FORMAT,
    LoraSettings,
    Number,
    Settings,
    SoftPromptSettings,
    TrainingSettings,
    apply_overrides,
    validate,
)
from perdure.errors import ConfigError, unknown_name
from perdure.memory import BUFFERS, POLICIES
from perdure.models.adapters import Tuning
from perdure.streams.arena import ALL_KINDS, ALL_LEVELS, KINDS, LEVELS
from perdure.training.online import OnlineSettings

Method = Literal["lora", "soft-prompt", "full", "multi-lora", "reptile", "maml"]
METHODS: dict[str, str] = {
    "lora": "one LoRA adapter",
    "soft-prompt": "embeddings before every prompt",
    "full": "every weight",
    "multi-lora": "a LoRA adapter for each kind of problem, with routing",
    "reptile": "a LoRA adapter from which a few steps lead far, by Reptile",
    "maml": "the same by first-order MAML",
}
META = ("reptile", "maml")
OTHERS = {"lora": 1e-4, "multi-lora": 1e-4, "soft-prompt": 1e-3, "full": 1e-5, "reptile": 1e-4, "maml": 1e-4}
NANO = {"lora": 3e-4, "multi-lora": 1e-3, "soft-prompt": 0.1, "full": 1e-4, "reptile": 1e-3, "maml": 2e-3}
# What is chosen where nothing is said, by a part of the model's name; the first that fits counts. nano's were
# chosen on seeds 10 to 12, the others are those of the system that this replaces.
DEFAULTS: dict[str, dict[str, Any]] = {
    "nano": {"eval_tasks": 500, "lr": NANO, "window": {"soft-prompt": 8}, "init": "random"},
    "lfm2": {"eval_tasks": 25, "episodes": 60, "precision": "fp16", "lr": {**OTHERS, "lora": 5e-5}},
    "tinyllama": {"method": "soft-prompt", "episodes": 60},
    "": {
        "method": "lora",
        "eval_tasks": 30,
        "episodes": 80,
        "precision": "fp32",
        "lr": OTHERS,
        "window": {},
        "init": "vocabulary",
    },
}


class MetaSettings(Settings):
    """What Reptile and first-order MAML need."""

    shots: int = Field(5, ge=1, description="rows of one kind that the inner loop adapts to")
    inner_steps: int = Field(5, ge=1)
    inner_lr: Number | None = Field(None, gt=0, description="None: for Reptile the learning rate, for MAML 3e-4")
    step: Number = Field(0.5, gt=0, le=1, description="Reptile's share of the way")


class ArenaSettings(TrainingSettings):
    """A whole arena run."""

    format: int = FORMAT
    name: str | None = None
    model: str = "nano"
    method: Method = "lora"
    lora: LoraSettings = LoraSettings(r=16, alpha=32)
    soft_prompt: SoftPromptSettings = SoftPromptSettings()
    strategy: str = "naive"
    online: OnlineSettings = OnlineSettings()
    meta: MetaSettings = MetaSettings()
    kinds: tuple[str, ...] = KINDS
    levels: tuple[int, ...] = LEVELS
    forms: int = Field(3, ge=1, le=12, description="prompt wordings of each kind")
    answers: Literal["short", "framed"] = Field(
        "short", description="the bare answer, or a kind's own frame round it"
    )
    pool: int = Field(1000, ge=1, description="problems that episodes draw from; they may come again")
    eval_tasks: int = Field(500, ge=1, description="held-out problems")
    probe: bool = Field(True, description="whether nano's general probe is scored beside them")
    seed: int = Field(0, ge=0, lt=1 << 63)

    @field_validator("kinds")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in ALL_KINDS:
                raise ValueError(unknown_name("arena kind", kind, ALL_KINDS))
        if len(set(kinds)) < len(kinds) or not kinds:
            raise ValueError("at least one, each once")
        return kinds

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if not levels or not set(levels) <= set(ALL_LEVELS):
            raise ValueError(f"one or more of {', '.join(map(str, ALL_LEVELS))}, got {list(levels)}")
        return tuple(sorted(set(levels)))

    @model_validator(mode="after")
    def _enough(self) -> ArenaSettings:
        for name in ("pool", "eval_tasks"):
            if getattr(self, name) < len(self.kinds):
                raise ValueError(f"{name}: at least one for each of {len(self.kinds)} kinds")
        parts = self.strategy.split("+")
        if (self.method == "multi-lora") != ("multi-lora" in parts):
            raise ValueError("method: multi-lora and the strategy multi-lora go together; give --method multi-lora")
        if self.method in META:
            self._check_meta()
        self._check_stream()
        return self

    def _check_meta(self) -> None:
        """A meta-learner's loops take none of what belongs to the ordinary step."""
        online = self.online
        plain = self.strategy == "naive" and (online.window, online.passes, online.task_every) == (1, 1, None)
        if not plain:
            raise ValueError(
                f"method: {self.method} has a loop of its own: no strategy, window, passes or task_every beside it"
            )
        if self.precision == "fp16":
            raise ValueError(f"method: {self.method} does not scale its losses, which fp16 needs; use bf16 or fp32")

    def _check_stream(self) -> None:
        """Refuse what would change nothing."""
        online = self.online
        if online.drift != "off" and len(self.kinds) == 1:
            raise ValueError(f"online.drift: {online.drift} goes from one kind to the next, and there is one alone")
        if online.drift == "blocks" and online.episodes < len(self.kinds):
            raise ValueError(
                f"online.drift: blocks of {len(self.kinds)} kinds need as many episodes, got {online.episodes}"
            )
        if online.curriculum != "off" and len(self.levels) == 1:
            raise ValueError(f"online.curriculum: {online.curriculum} goes through levels, and there is one alone")
        every = online.task_every
        if every is None:
            return
        if every >= online.episodes:
            raise ValueError(
                f"online.task_every: no task ends within {online.episodes} episodes if each has {every}; give fewer"
            )
        continued = (self.optimizer.at_boundary, self.schedule.at_boundary) == ("continue", "continue")
        if self.strategy == "naive" and continued:
            raise ValueError(
                "online.task_every: nothing takes note of a task's end; give a strategy that does, as in "
                "--strategy online-ewc"
            )

    @property
    def tuning(self) -> Tuning:
        """What of the model is trained."""
        if self.method in ("full", "soft-prompt"):
            return self.method
        return "lora"


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `perdure arena`; None where nothing was said.

    Attributes: as the command line's.
    """

    method: str | None = None
    model: str | None = None
    episodes: int | None = None
    eval_tasks: int | None = None
    eval_every: int | None = None
    lora_r: int | None = None
    lora_alpha: int | None = None
    soft_tokens: int | None = None
    lr: float | None = None
    precision: str | None = None
    seed: int | None = None
    kinds: str | None = None
    levels: str | None = None
    forms: int | None = None
    strategy: str | None = None
    replay: str | None = None
    memory: str | None = None
    curriculum: str | None = None
    drift: str | None = None
    learn_on: str | None = None
    window: int | None = None
    passes: int | None = None
    task_every: int | None = None
    out: Path | None = None


def settings_of(options: Options, overrides: Sequence[str]) -> ArenaSettings:
    """The settings that the options, the model's defaults and the overrides come to.

    Raises:
        ConfigError: every mistake, with the way out.
    """
    model = options.model or "nano"
    if Path(model).expanduser().is_dir():
        model = str(Path(model).expanduser().resolve())
    chosen = _defaults(model)
    method = options.method or chosen["method"]
    if method not in get_args(Method):
        raise ConfigError(f"--method: {unknown_name('method', method, get_args(Method))}")
    _refuse_idle(options, method)
    strategy, given = _strategy(options, method)
    values: dict[str, Any] = {
        "model": model,
        "method": method,
        "strategy": strategy,
        "continual_strategy": given,
        "precision": options.precision or chosen["precision"],
        "optimizer": {
            "type": "adamw",
            "lr": options.lr if options.lr is not None else chosen["lr"][method],
            "weight_decay": 0.01,
            "at_boundary": "continue",
        },
        "schedule": {"at_boundary": "continue"},
        "clip": 1.0,
        "evaluation_batch_size": 128,
        "lora": {"r": 16, "alpha": 32, **_said(r=options.lora_r, alpha=options.lora_alpha)},
        "soft_prompt": {"init": chosen["init"], **_said(tokens=options.soft_tokens)},
        "online": {
            "episodes": options.episodes or chosen["episodes"],
            **_said(
                eval_every=options.eval_every,
                curriculum=options.curriculum,
                drift=options.drift,
                learn_on=options.learn_on,
                window=options.window or chosen["window"].get(method),
                passes=options.passes,
                task_every=options.task_every,
            ),
        },
        "kinds": None if options.kinds is None else [kind.strip() for kind in options.kinds.split(",")],
        "levels": None if options.levels is None else _levels(options.levels),
        "forms": options.forms,
        "eval_tasks": options.eval_tasks or chosen["eval_tasks"],
        "seed": options.seed,
    }
    return validate(ArenaSettings, apply_overrides(_said(**values), overrides), "perdure arena")


def _refuse_idle(options: Options, method: str) -> None:
    """Refuse an option that the method has no use for."""
    if method in ("full", "soft-prompt"):
        for name, value in (("--lora-r", options.lora_r), ("--lora-alpha", options.lora_alpha)):
            if value is not None:
                raise ConfigError(
                    f"{name}: --method {method} has no LoRA adapter; leave it out, or use --method lora"
                )
    if method != "soft-prompt" and options.soft_tokens is not None:
        raise ConfigError(f"--soft-tokens: --method {method} has no soft prompt; use --method soft-prompt")


def _said(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _defaults(model: str) -> dict[str, Any]:
    name = Path(model).name.lower()
    fitting = next(
        values for part, values in DEFAULTS.items() if (name == part if part == "nano" else part in name)
    )
    return {**DEFAULTS[""], **fitting}


def _levels(text: str) -> list[int]:
    """Levels as in "1-3" or "1,4"."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            raise ConfigError(f"--levels {text!r}: write them as in 1-3 or 1,2,5")
        found += range(int(first), int(last or first) + 1)
    return found


def _strategy(options: Options, method: str) -> tuple[str, dict[str, Any]]:
    """The strategy's name, with replay and the method's own in it, and settings of the memory."""
    parts = [part.strip() for part in (options.strategy or "").split("+") if part.strip() not in ("", "naive")]
    given: dict[str, Any] = {}
    if method == "multi-lora" and "multi-lora" not in parts:
        parts.insert(0, "multi-lora")
    if method in META and (parts or options.replay):
        raise ConfigError(f"--method {method} has a loop of its own: it takes neither --strategy nor --replay")
    if options.replay is not None:
        memory = _memory(options.replay, options.memory)
        if "replay" not in parts:
            parts.append("replay")
        given["replay"] = memory
    elif options.memory is not None:
        raise ConfigError("--memory says how much replay keeps; say --replay too, as in --replay reservoir")
    return "+".join(parts) or "naive", given


def _memory(name: str, capacity: str | None) -> Mapping[str, Any]:
    """Settings of replay for a kind of memory, or for a policy that chooses from a reservoir for each pass."""
    known = [*BUFFERS, *POLICIES]
    size = capacity or "200"
    room: dict[str, Any] = {"capacity": int(size) if size.isdecimal() else size, "offer": "step"}
    if name in BUFFERS:
        return {"memory": name, **room}
    if name in POLICIES or name.startswith("mixed:"):
        return {"select": name, "resample": 0.5, **room}
    raise ConfigError(f"--replay: {unknown_name('memory or policy', name, known)}")


def default_out(settings: ArenaSettings) -> Path:
    """Where a run goes when nothing is said: named by what is most often compared."""
    online, parts = settings.online, ["arena", Path(settings.model).name, settings.method]
    if settings.strategy not in ("naive", "multi-lora"):
        parts.append(settings.strategy)
    parts += [value for value in (online.drift, online.curriculum) if value != "off"]
    if online.learn_on != "all":
        parts.append(online.learn_on)
    if settings.kinds != KINDS:
        parts.append("+".join(settings.kinds))
    if settings.levels != LEVELS:
        parts.append("levels" + "".join(map(str, settings.levels)))
    return Path("runs") / "-".join([*parts, f"seed{settings.seed}"])
