"""What there is to choose from: one line each, and of strategies what they need and cost."""

from __future__ import annotations

from textwrap import wrap

from perdure.errors import ConfigError, unknown_name

WIDTH = 80
# What selection policies go by.
NEEDS = {
    "features": "what each row looks like to the model: a forward pass a row",
    "field": "a column of the rows",
    "learnt": "the loss of each row when its task ended",
    "losses": "the loss of each row: a forward pass a row",
}


def catalogue() -> dict[str, dict[str, str]]:
    """Kinds of things, and their names with a line each."""
    from perdure.evaluation.score import HIGHER_IS_BETTER
    from perdure.memory import BUFFERS, POLICIES
    from perdure.models.adapters import TUNINGS
    from perdure.recipes.find import shipped
    from perdure.strategies import STRATEGIES
    from perdure.streams.answers import RULES
    from perdure.streams.hotpot import PREPARATIONS
    from perdure.training.plan import STREAM_MODES

    strategies = {name: cls.summary for name, cls in STRATEGIES.items()}
    return {
        "strategies": {**strategies, **STREAM_MODES},
        "memories": BUFFERS,
        "policies": {name: policy.summary for name, policy in POLICIES.items()},
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
        "answers": {name: rule.summary for name, rule in RULES.items()},
    }


def facts(what: str) -> dict[str, dict[str, str]]:
    """What is told beside its line of a thing of this kind, by name and label."""
    from perdure.memory import POLICIES
    from perdure.strategies import STRATEGIES

    if what == "policies":
        return {
            name: {"needs": "; ".join(NEEDS[need] for need in sorted(policy.needs))}
            for name, policy in POLICIES.items()
            if policy.needs
        }
    if what != "strategies":
        return {}
    return {name: {"needs": s.needs, "cost": s.cost, "source": s.source} for name, s in STRATEGIES.items()}


def print_catalogue(what: str) -> None:
    """Print one kind of thing with all that is known of it, or a line for each thing of all kinds."""
    kinds = catalogue()
    if what and what not in kinds:
        raise ConfigError(unknown_name("kind of things", what, kinds))
    if what:
        _print_kind(kinds[what], facts(what))
        return
    for kind, things in kinds.items():
        print(f"{kind}:")
        width = max(map(len, things), default=0)
        for name, line in things.items():
            print(f"  {name:<{width}}  {line}".rstrip())


def _print_kind(things: dict[str, str], told: dict[str, dict[str, str]]) -> None:
    width = max(map(len, things), default=0)
    for name, line in things.items():
        print(_wrapped(f"{name:<{width}}  ", line))
        labels = told.get(name, {})
        label_width = max(map(len, labels), default=0)
        for label, text in labels.items():
            print(_wrapped(f"  {label:<{label_width}}  ", text))


def _wrapped(head: str, text: str) -> str:
    """The text behind its head, cut into lines that begin under one another."""
    lines = wrap(text, WIDTH - len(head), break_long_words=False, break_on_hyphens=False) or [""]
    return f"\n{'':<{len(head)}}".join([head + lines[0], *lines[1:]]).rstrip()
