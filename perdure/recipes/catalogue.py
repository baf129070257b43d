"""What there is to choose from, one line each."""

from __future__ import annotations

from perdure.errors import ConfigError, unknown_name


def catalogue() -> dict[str, dict[str, str]]:
    """Kinds of things, and their names with a line each."""
    from perdure.evaluation.score import HIGHER_IS_BETTER
    from perdure.models.adapters import TUNINGS
    from perdure.recipes.find import shipped
    from perdure.strategies import STRATEGIES
    from perdure.streams.hotpot import PREPARATIONS
    from perdure.training.plan import STREAM_MODES

    strategies = {name: cls.summary for name, cls in STRATEGIES.items()}
    return {
        "strategies": {**strategies, **STREAM_MODES},
        "recipes": shipped(),
        "models": {
            "nano": "embedded: a small Llama that knows names, numbers and causes",
            "FOLDER": "any causal language model that save_pretrained wrote",
            "OWNER/NAME": "a hub name, where the hub can be reached",
        },
        "tunings": TUNINGS,
        "metrics": {name: f"{'higher' if up else 'lower'} is better" for name, up in HIGHER_IS_BETTER.items()},
        "preparations": {
            name: (function.__doc__ or "").strip().split("\n")[0] for name, function in PREPARATIONS.items()
        },
    }


def print_catalogue(what: str) -> None:
    """Print one kind of thing, or all."""
    kinds = catalogue()
    if what and what not in kinds:
        raise ConfigError(unknown_name("kind of things", what, kinds))
    chosen = {what: kinds[what]} if what else kinds
    for kind, things in chosen.items():
        if not what:
            print(f"{kind}:")
        width = max(map(len, things), default=0)
        for name, line in things.items():
            print(f"{'' if what else '  '}{name:<{width}}  {line}".rstrip())
