"""From a script's config, and perhaps a strategy, to settings and the strategy to train with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.config import TrainerSettings, read_yaml, validate
from perdure.errors import ConfigError, UsageError
from perdure.strategies.base import Strategy
from perdure.strategies.build import build, enabled


def configure(
    config: Mapping[str, Any] | str | Path | None, strategy: Strategy | None
) -> tuple[TrainerSettings, Strategy]:
    """Settings and strategy of a script.

    Raises:
        UsageError: what is wrong with either, all of it together; or a strategy given twice.
    """
    if strategy is not None and not isinstance(strategy, Strategy):
        made = f"{strategy.__name__}()" if isinstance(strategy, type) else "EWC(strength=100.0)"
        raise ConfigError(
            f"strategy must be a Strategy object, such as {made}, got {strategy!r}; a name goes into the config: "
            '{"continual_strategy": {"ewc": {}}}'
        )
    where = str(config) if isinstance(config, str | Path) else "config"
    values = read_yaml(Path(config)) if isinstance(config, str | Path) else config or {}
    mistakes: list[UsageError] = []
    settings = TrainerSettings()
    try:
        settings = validate(TrainerSettings, values, where)
    except ConfigError as error:
        mistakes.append(error)
    given = values.get("continual_strategy") or {}
    if isinstance(given, Mapping) and all(isinstance(each, Mapping) for each in given.values()):
        asked = enabled(given)
        if strategy is None:
            try:
                strategy = build(asked, given)
            except UsageError as error:
                mistakes.append(error)
        elif asked:
            mistakes.append(
                ConfigError(
                    f"the strategy is given twice: as an object ({strategy.name}) and by continual_strategy "
                    f"({', '.join(asked)}); drop one"
                )
            )
    if len(mistakes) == 1:
        raise mistakes[0]
    if mistakes or strategy is None:
        raise ConfigError("\n".join(map(str, mistakes)))
    return settings, strategy
