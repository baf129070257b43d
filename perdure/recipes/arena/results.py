"""What an arena run came to: results.json and the learning curves, from the history of its exams."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import FORMAT
from perdure.evaluation.intervals import wilson
from perdure.storage import write_bytes, write_json

if TYPE_CHECKING:
    from perdure.recipes.arena.options import ArenaSettings
    from perdure.training.folder import RunFolder
    from perdure.training.online import OnlinePlan

Entry = Mapping[str, Any]
CURVES = "learning_curves.png"
HALF, MOST = 0.5, 0.9
PHASES = ("rapid learning", "steady gains", "stable")


def finish(plan: OnlinePlan, history: Sequence[Entry], folder: RunFolder, command: str) -> dict[str, Any]:
    """Write results.json and learning_curves.png; what results.json holds."""
    from perdure.models.adapters import count_parameters
    from perdure.training.online import online_facts

    settings: Any = plan.settings
    trainable, total = count_parameters(plan.learner.model)
    facts = online_facts(folder.metrics)
    summary = summarise(history)
    if summary["adapted"]:
        summary["adapted"] |= {"shots": settings.meta.shots, "steps": settings.meta.inner_steps}
    results = {
        "format": FORMAT,
        "recipe": "arena",
        "name": settings.name or folder.path.name,
        "command": command or None,
        "finished": True,
        **_asked(settings),
        **summary,
        "parameters": {"trainable": trainable, "total": total},
        "seconds": round(facts.pop("seconds", 0.0), 3),
        "seconds_per_episode": facts.pop("seconds_per_episode", None),
        "online": facts,
        "memory": plan.learner.strategy.kept() or None,
        **{name: plan.recorded[name] for name in ("versions", "machine")},
    }
    write_json(folder.results, results)
    draw(folder)
    return results


def draw(folder: RunFolder) -> None:
    """Draw the learning curves of a finished run."""
    from perdure.report.arena import read_arena_run
    from perdure.report.arena_curves import learning_curves

    write_bytes(folder.path / CURVES, learning_curves(read_arena_run(folder.path)))


def _asked(settings: ArenaSettings) -> dict[str, Any]:
    online = settings.online
    return {
        "method": settings.method,
        "model": Path(settings.model).name,
        "strategy": settings.strategy,
        "memory_settings": settings.continual_strategy.get("replay"),
        "seed": settings.seed,
        "episodes": online.episodes,
        "eval_every": online.eval_every,
        "eval_tasks": settings.eval_tasks,
        "tasks": list(settings.kinds),
        "levels": list(settings.levels),
        "forms": settings.forms,
        "pool": settings.pool,
        "answers": settings.answers,
        "lr": settings.optimizer.lr,
        "precision": settings.precision,
        **{name: getattr(online, name) for name in ("drift", "curriculum", "learn_on", "window", "passes")},
    }


def summarise(history: Sequence[Entry]) -> dict[str, Any]:
    """The figures of a history: of the first, the last and the best exam, overall and by kind; phases; the probe.

    The best exam is that with the highest exact match, the earliest of equals.
    """
    first, last = history[0], history[-1]
    best = max(history, key=lambda entry: (entry["exact_match"], -entry["episode"]))
    moments = {"initial": first, "final": last, "best": best}
    plain = {name: moments[name]["plain"] for name in ("initial", "final")}
    return {
        **{name: entry["exact_match"] for name, entry in moments.items()},
        "best_episode": best["episode"],
        "intervals": {name: entry["interval"] for name, entry in moments.items()},
        "stated": {name: entry["stated"] for name, entry in moments.items()},
        "pretraining_wording": plain if plain["initial"] and plain["final"] else None,
        "kinds": {kind: _of_kind(kind, moments) for kind in first["kinds"]},
        "phases": phases(history),
        "probe": None
        if not first["probe"]
        else {name: [first["probe"][name], last["probe"][name]] for name in first["probe"]},
        "inferred": None
        if first["inferred"] is None
        else {name: entry["inferred"] for name, entry in moments.items()},
        "adapted": None if not first["adapted"] else {"initial": first["adapted"], "final": last["adapted"]},
        "rouge_l": None
        if first["rouge_l"] is None
        else {name: entry["rouge_l"] for name, entry in moments.items()},
        "elicitation": split(first["readings"], last["readings"]),
        "history": [{name: value for name, value in entry.items() if name != "readings"} for entry in history],
    }


def _of_kind(kind: str, moments: Mapping[str, Entry]) -> dict[str, Any]:
    shares = {name: entry["kinds"][kind] for name, entry in moments.items()}
    rows = moments["initial"]["rows_of"][kind]
    plain = {name: (moments[name]["plain_kinds"] or {}).get(kind) for name in ("initial", "final")}
    return {
        "rows": rows,
        **shares,
        "intervals": {name: list(wilson(round(share * rows), rows)) for name, share in shares.items()},
        "stated": {name: entry["stated_kinds"][kind] for name, entry in moments.items()},
        "plain": plain if None not in plain.values() else None,
        "elicitation": split(
            *({kind: moments[name]["readings"][kind]} for name in ("initial", "final")),
        ),
    }


def split(before: Mapping[str, Mapping[str, str]], after: Mapping[str, Mapping[str, str]]) -> dict[str, float]:
    """What the rise of exact match is made of, row by row, as shares of all rows.

    Args:
        before: before learning, by kind: "1" or "0" for each row in each reading: "exact", "stated", maybe "plain".
        after: the same after it.

    Returns:
        "known": right before in some reading; "elicited": exact after and not before, though known; "learnt": exact
        after, and known in no reading; "lost": exact before and not after. Exact match rises by elicited + learnt -
        lost.
    """
    counts = dict.fromkeys(("known", "elicited", "learnt", "lost"), 0)
    total = 0
    for kind, were in before.items():
        for *others, was, now in zip(
            *(marks for reading, marks in were.items() if reading != "exact"),
            were["exact"],
            after[kind]["exact"],
            strict=True,
        ):
            total += 1
            known = "1" in (was, *others)
            counts["known"] += known
            counts["elicited"] += known and was == "0" and now == "1"
            counts["learnt"] += not known and now == "1"
            counts["lost"] += was == "1" and now == "0"
    return {name: count / total for name, count in counts.items()}


def phases(history: Sequence[Entry]) -> list[dict[str, Any]]:
    """Stretches of the learning curve: until half of the whole rise was there, until nine tenths were, and after.

    The rise is from the first exam to the best one. A stretch without episodes is left out; a stream that never
    rose is stable throughout.
    """
    start, rise = (
        history[0]["exact_match"],
        max(entry["exact_match"] for entry in history) - history[0]["exact_match"],
    )
    ends = [
        next(entry for entry in history if entry["exact_match"] - start >= share * rise) for share in (HALF, MOST)
    ]
    found, before = [], history[0]
    for name, end in zip(PHASES, (*ends, history[-1]), strict=True):
        if end["episode"] > before["episode"]:
            gain = end["exact_match"] - before["exact_match"]
            found.append({"name": name, "from": before["episode"], "to": end["episode"], "gain": gain})
            before = end
    return found
