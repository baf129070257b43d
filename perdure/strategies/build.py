"""From names and settings to strategies; the settings are the constructor's own arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import ConfigDict, ValidationError, create_model

from perdure.errors import ConfigError, UsageError, unknown_name
from perdure.strategies.agem import AGEM
from perdure.strategies.base import Strategy
from perdure.strategies.chain import Chain
from perdure.strategies.derpp import DERpp
from perdure.strategies.ema import EMA
from perdure.strategies.ewc import EWC
from perdure.strategies.freeze import FreezeBottom
from perdure.strategies.gem import GEM
from perdure.strategies.lwf import LwF
from perdure.strategies.magmax import MagMax
from perdure.strategies.mas import MAS
from perdure.strategies.multi_lora import MultiLoRA
from perdure.strategies.naive import Naive
from perdure.strategies.olora import OLoRA
from perdure.strategies.osf import OSF
from perdure.strategies.packnet import PackNet
from perdure.strategies.pnn import PNN
from perdure.strategies.prompt_pool import PromptPool
from perdure.strategies.replay import Replay
from perdure.strategies.si import SI
from perdure.strategies.slao import SLAO
from perdure.strategies.ties import TIES

STRATEGIES: dict[str, type[Strategy]] = {
    s.name: s
    for s in (
        Naive,
        Replay,
        DERpp,
        EWC,
        SI,
        MAS,
        LwF,
        GEM,
        AGEM,
        FreezeBottom,
        OLoRA,
        OSF,
        PackNet,
        SLAO,
        MagMax,
        TIES,
        EMA,
        PNN,
        PromptPool,
        MultiLoRA,
    )
}
"""The classes by the names that the command line and configs know them by."""
# What configs of earlier systems call a setting.
ALIASES = {"lambda": "strength"}


def settings_of(name: str) -> dict[str, inspect.Parameter]:
    """The settings of a strategy that a config may give: its constructor's, less those that take objects."""
    parameters = inspect.signature(STRATEGIES[name].__init__).parameters
    return {key: p for key, p in parameters.items() if key not in ("self", "buffer", "args", "kwargs")}


def build_one(name: str, settings: Mapping[str, Any]) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: unknown name or setting, or a value of the wrong kind; all mistakes together.
    """
    if name not in STRATEGIES:
        raise ConfigError(unknown_name("strategy", name, STRATEGIES))
    cls = STRATEGIES[name]
    known = settings_of(name)
    hints = get_type_hints(cls.__init__) if known else {}
    given = {ALIASES.get(key, key): value for key, value in settings.items() if key != "enabled"}
    fields: dict[str, Any] = {key: (hints.get(key, Any), p.default) for key, p in known.items()}
    model = create_model(f"{name} settings", __config__=ConfigDict(extra="forbid"), **fields)
    try:
        checked = model.model_validate(given)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            key = ".".join(map(str, problem["loc"]))
            if problem["type"] == "extra_forbidden":
                lines.append(unknown_name(f"setting of {name}", key, known or ["(none)"]))
            else:
                lines.append(f"{name}.{key}: {problem['msg']}, got {problem['input']!r}")
        raise ConfigError("continual_strategy: " + "; ".join(lines)) from error
    return cls(**{key: getattr(checked, key) for key in known})


def build(names: str | list[str], settings: Mapping[str, Mapping[str, Any]] | None = None) -> Strategy:
    """A strategy from names joined by "+" (or a list), with the settings of each by name.

    Args:
        names: of `STRATEGIES`; no name makes "naive", several make a `Chain` in that order.
        settings: by name, what its class is made with; "lambda" means "strength".

    Raises:
        ConfigError: an unknown name or setting, or a value of the wrong kind; all mistakes together.
        StrategyError: a value out of range, or strategies that cannot stand together.
    """
    parts = names.split("+") if isinstance(names, str) else names
    parts = [part.strip() for part in parts if part.strip()]
    strategies: list[Strategy] = []
    mistakes: list[UsageError] = []
    for part in parts or ["naive"]:
        try:
            strategies.append(build_one(part, (settings or {}).get(part, {})))
        except UsageError as error:
            mistakes.append(error)
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes:
        raise ConfigError("\n".join(map(str, mistakes)))
    return strategies[0] if len(strategies) == 1 else Chain(strategies)


def enabled(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names that a `continual_strategy` mapping enables: all but those with `enabled: false`."""
    return [name for name, values in settings.items() if (values or {}).get("enabled", True)]


def completed(described: Mapping[str, Mapping[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
    """What `describe` gave, with the defaults of settings that came later."""
    if described is None:
        return None
    known = [name for name in described if name in STRATEGIES]  # not what stands for another backend's
    defaults = {name: {key: p.default for key, p in settings_of(name).items()} for name in known}
    return {name: {**defaults.get(name, {}), **values} for name, values in described.items()}


def describe(strategy: Strategy) -> dict[str, dict[str, Any]] | None:
    """Names and settings that `build` makes the same strategy from; None for a class of the user's own.

    A stand-in for what another backend has built says so itself, by an attribute `description`.
    """
    if (own := getattr(strategy, "description", None)) is not None:
        return dict(own)
    members = strategy.strategies if isinstance(strategy, Chain) else (strategy,)
    if any(STRATEGIES.get(member.name) is not type(member) for member in members):
        return None
    return {member.name: {key: getattr(member, key) for key in settings_of(member.name)} for member in members}
