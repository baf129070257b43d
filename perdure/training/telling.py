"""What a run tells of itself: to people, to callbacks, and as a model that other libraries load."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from perdure.models.adapters import count_parameters
from perdure.storage import folder as replaced
from perdure.strategies.base import Strategy
from perdure.training.folder import RunFolder
from perdure.training.plan import Plan, notes_on_strategy
from perdure.training.settings import RunSettings


def announcement(plan: Plan) -> Iterator[str]:
    """What is going to be trained, on what, and what of it a person should know."""
    settings = plan.settings
    trainable, total = count_parameters(plan.model)
    rows = ", ".join(f"{task.name} {len(task.train)}" for task in plan.stages)
    held = ", ".join(f"{task.name} {len(task.evaluation)}" for task in plan.stream.evaluations)
    yield (
        f"{settings.strategy} on {settings.model} ({settings.tuning}): {trainable:,} of {total:,} parameters "
        f"trainable ({trainable / total:.2%}); training rows: {rows}; held-out rows: {held}"
    )
    if plan.strategy.owns_training or plan.strategy.adds_to_forward or plan.strategy.isolates:
        yield (
            f"note: {plan.strategy.name} adds or freezes parameters as tasks come; results.json has the counts "
            "at the end"
        )
    for note in notes_on_strategy(settings):
        yield f"note: {note}"
    for note in plan.data.get("notes", ()):
        yield f"note: {note}"
    for task in plan.data["tasks"]:
        for note in task["notes"]:
            yield f"note: {note}"
    for task in plan.stream.evaluations:
        if not task.evaluation:
            yield f"note: task {task.name} has no held-out rows, so it is not scored"


def export(plan: Plan, folder: RunFolder) -> None:
    """The trained model in the layout that Transformers and PEFT load."""
    with replaced(folder.adapter if plan.settings.tuning in ("lora", "soft-prompt") else folder.model) as aside:
        write_model(plan.strategy, plan.model, plan.language.tokenizer, aside)


def write_model(strategy: Strategy, model: Any, tokenizer: Any, path: Path) -> None:
    """Write a model or its adapters, and the tokenizer, into a folder that is there."""
    strategy.export(model, path)
    tokenizer.save_pretrained(path)
    for config in path.rglob("adapter_config.json"):
        # PEFT writes sets in an order that changes from process to process.
        values = json.loads(config.read_text(encoding="utf-8"))
        if isinstance(values.get("target_modules"), list):
            values["target_modules"] = sorted(values["target_modules"])
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def facts_of(folder: RunFolder, settings: RunSettings, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """What callbacks begin with: plain values; where the run lies, its settings, and what it found."""
    return {
        "name": settings.name or folder.path.name,
        "folder": str(folder.path),
        "log": str(folder.metrics),
        "strategy": settings.strategy,
        "model": settings.model,
        "tuning": settings.tuning,
        "seed": settings.seed,
        "settings": settings.model_dump(mode="json", exclude={"name", "erased"}),
        "versions": recorded.get("versions", {}),
        "machine": recorded.get("machine", {}),
    }


def changed_sources(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Names of the tasks whose sources have other contents than recorded, wherever they lie."""
    recorded = {task["name"]: sorted(task["sources"].values()) for task in there.get("tasks", ())}
    now = {task["name"]: sorted(task["sources"].values()) for task in here["tasks"]}
    return [name for name, hashes in recorded.items() if name in now and now[name] != hashes]


def row_counts(fact: Mapping[str, Any]) -> dict[str, Any]:
    """How many rows of a task there are of each kind, from its data facts."""
    train, evaluation = fact["train"], fact["evaluation"]
    return {
        "train": train["kept"],
        "evaluation": evaluation["kept"],
        "cut": train["cut"] + evaluation["cut"],
        "left_out": sum(train["left_out"].values()) + sum(evaluation["left_out"].values()),
        "overlapping": train["overlapping"],
        "duplicates": train.get("duplicates", 0) + evaluation.get("duplicates", 0),
    }
