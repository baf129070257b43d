"""Which settings of a run of reactions the JAX backend takes, and what it makes of them; the others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import ConfigError, StrategyError, unknown_name
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from perdure.jax.settings import FitSettings

# Of the command line; "sequential" is the strategy "naive" in the settings.
SETTINGS = ("joint", "sequential", "replay", "ewc")
OWN = {"naive": "sequential", "joint": "sequential", "replay": "replay", "ewc": "ewc"}
# Of each strategy, what may be set.
TAKEN: Mapping[str, tuple[str, ...]] = {
    "replay": ("capacity", "gradients", "ratio"),
    "ewc": ("strength", "lambda", "samples"),
}
LAYERS = {
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "gate_proj": "gate",
    "up_proj": "up", "down_proj": "down",
}  # fmt: skip
NO_MODEL = (
    "--backend jax needs --model FOLDER: a Mistral or a Llama in Hugging Face's layout (config.json and "
    "safetensors), in Mistral's own (params.json), or as `perdure port SOURCE DEST` writes it, with a tokenizer in "
    "the folder"
)


def check_asked(setting: str, model: str | None) -> None:
    """Refuse what no setting could mend, before anything is read.

    Raises:
        StrategyError: a setting that this backend has not.
        ConfigError: no folder of a model.
    """
    if setting not in SETTINGS:
        raise StrategyError(
            unknown_name("--setting of the jax backend", setting, SETTINGS) + " The torch backend has the others."
        )
    if model is None:
        raise ConfigError(NO_MODEL)
    if not Path(model).expanduser().is_dir():
        raise ConfigError(f"--model {model}: no such folder. {NO_MODEL}")


def check(settings: RunSettings) -> None:
    """Refuse settings that only torch obeys; all of them together.

    Raises:
        ConfigError: naming each.
    """
    head, optimizer = settings.head, settings.optimizer
    only = "the jax backend has"
    wrong = []
    if head.type != "mhar" or head.ensemble > 1:
        what = f"head.type {head.type}" if head.type != "mhar" else f"head.ensemble {head.ensemble}"
        wrong.append(f"{what}: {only} one head, mhar")
    if settings.precision == "fp16":
        wrong.append(f"precision fp16: {only} fp32 and bf16")
    if optimizer.type not in ("adamw", "adafactor"):
        wrong.append(f"optimizer.type {optimizer.type}: {only} adamw and adafactor")
    if settings.lora.dropout:
        wrong.append(f"lora.dropout {settings.lora.dropout:g}: {only} none; leave it at 0")
    strange = [name for name in settings.lora.targets or () if LAYERS.get(name, name) not in LAYERS.values()]
    if strange:
        wrong.append(f"lora.targets {', '.join(strange)}: must be some of {', '.join(LAYERS)}")
    idle = {
        "micro_batch_size": settings.micro_batch_size is not None,
        "compile": settings.compile,
        "skip_bad_batches": settings.skip_bad_batches,
        "device": settings.device != "auto",
        "optimizer.fused": optimizer.fused,
        "evaluation_batch_size": settings.evaluation_batch_size != usual("evaluation_batch_size"),
        "gradient_checkpointing (with a frozen backbone)": settings.gradient_checkpointing
        and settings.tuning == "head",
    }
    wrong += [f"{name}: the jax backend has no such setting; leave it out" for name, given in idle.items() if given]
    for name, values in settings.continual_strategy.items():
        more = [key for key in values if key not in TAKEN.get(name, ())] if name == settings.strategy else []
        wrong += [
            f"continual_strategy.{name}.{key}: the jax backend takes {', '.join(TAKEN.get(name, ())) or 'none'}"
            for key in more
        ]
    capacity = settings.continual_strategy.get("replay", {}).get("capacity", 0)
    if settings.strategy == "replay" and isinstance(capacity, str) and not capacity.strip().endswith("%"):
        wrong.append(
            f"continual_strategy.replay.capacity {capacity!r} (--memory): the jax backend counts rows; give a "
            "number of them, a share such as 10%, or all"
        )
    ratio = settings.continual_strategy.get("replay", {}).get("ratio", 1)
    if not isinstance(ratio, int | float):
        wrong.append(f"continual_strategy.replay.ratio {ratio!r}: the jax backend takes a number")
    if wrong:
        raise ConfigError("perdure reactions --backend jax: " + "\n  ".join(wrong))


def usual(name: str) -> Any:
    """A setting's default."""
    return RunSettings.model_fields[name].default


def targets(settings: RunSettings) -> tuple[str, ...]:
    """LoRA's layers by the names that they have in JAX."""
    asked = settings.lora.targets
    return tuple(LAYERS.values()) if asked is None else tuple(LAYERS.get(name, name) for name in asked)


def fit_settings(settings: RunSettings, strategy: Mapping[str, Mapping[str, Any]], length: int) -> FitSettings:
    """What the training in JAX is asked for.

    Args:
        settings: of the run, checked.
        strategy: the settings by strategy, capacities as numbers of rows.
        length: tokens of a row.
    """
    from perdure.jax import FitSettings

    optimizer = settings.optimizer
    replay, ewc = strategy.get("replay", {}), strategy.get("ewc", {})
    return FitSettings(
        strategy=OWN[settings.strategy],
        tuning=settings.tuning,  # type: ignore[arg-type]  # a regression has no soft prompt
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        length=length,
        optimizer=optimizer.type,  # type: ignore[arg-type]  # checked
        lr=optimizer.lr,
        weight_decay=optimizer.weight_decay,
        betas=optimizer.betas,
        eps=optimizer.eps,
        clip=settings.clip,
        precision=settings.precision,  # type: ignore[arg-type]  # checked
        at_boundary=optimizer.at_boundary,
        memory=int(replay.get("capacity", 1000)),
        ratio=float(replay.get("ratio", 1)),
        gradient=replay.get("gradients", "combined"),
        ewc_strength=float(ewc.get("strength", ewc.get("lambda", 100.0))),
        fisher_rows=ewc.get("samples"),
        seed=settings.seed,
    )
