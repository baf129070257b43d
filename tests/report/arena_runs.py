"""Folders of arena runs as the loop writes them, with numbers that are made up but could be true."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FIVE = ("comparison", "sequence", "causal", "math", "grid")
EIGHT = (*FIVE, "code", "reading", "summary")


def wilson(share: float, rows: int) -> list[float]:
    z = 1.959964
    middle = (share + z * z / (2 * rows)) / (1 + z * z / rows)
    half = z / (1 + z * z / rows) * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return [max(0.0, middle - half), min(1.0, middle + half)]


def results(
    name: str = "lora", *, method: str = "lora", kinds: Sequence[str] = FIVE, seed: int = 0, episodes: int = 80,
    start: float = 0.0, end: float = 0.78, rows: int = 500, plain: bool = True, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """The content of results.json: exact match rises from `start` towards `end`, each kind at its own pace."""
    draw = random.Random(f"{name}{seed}")
    each = rows // len(kinds)

    def score(kind: int, episode: float) -> float:
        top = min(1.0, max(0.0, end + 0.12 * math.sin(2.3 * kind + 1) + draw.uniform(-0.02, 0.02)))
        now = start + (top - start) * (1 - math.exp(-episode / (12 + 7 * kind)))
        return round(max(0.0, now) * each) / each

    history = []
    for episode in range(0, episodes + 1, max(1, episodes // 8)):
        found = {kind: score(i, episode) for i, kind in enumerate(kinds)}
        overall = sum(found.values()) / len(kinds)
        history.append(
            {
                "episode": episode, "exact_match": overall, "interval": wilson(overall, rows),
                "stated": min(1.0, overall + 0.04), "loss": 3.0 - 2 * overall, "kinds": found,
                "probe": {"exact_match": 0.81 - 0.01 * episode / episodes, "loss": 1.0},
            }
        )  # fmt: skip
    best = max(history, key=lambda entry: entry["exact_match"])
    moments = {"initial": history[0], "final": history[-1], "best": best}
    third = len(history) // 3
    cuts = [history[0], history[third], history[2 * third], history[-1]]
    phases = [
        {"name": word, "from": a["episode"], "to": b["episode"], "gain": b["exact_match"] - a["exact_match"]}
        for word, a, b in zip(("rapid learning", "steady gains", "stable"), cuts, cuts[1:], strict=False)
    ]
    content = {
        "format": 1, "recipe": "arena", "name": name, "method": method, "model": "nano", "strategy": "naive",
        "seed": seed, "finished": True, "episodes": episodes, "eval_every": 10, "eval_tasks": rows,
        "command": f"perdure arena --method {method} --seed {seed} --out runs/{name}-{seed}",
        "levels": [1, 2, 3], "forms": 3, "drift": "off", "curriculum": "off", "learn_on": "all", "window": 1,
        "tasks": list(kinds), **{key: entry["exact_match"] for key, entry in moments.items()},
        "best_episode": best["episode"], "intervals": {key: entry["interval"] for key, entry in moments.items()},
        "stated": {key: entry["stated"] for key, entry in moments.items()},
        "pretraining_wording": {
            "initial": {"exact_match": 0.7, "stated": 0.72}, "final": {"exact_match": 0.65, "stated": 0.67},
        } if plain else None,
        "kinds": {
            kind: {
                "rows": each, **{key: entry["kinds"][kind] for key, entry in moments.items()},
                "intervals": {key: wilson(entry["kinds"][kind], each) for key, entry in moments.items()},
                "stated": {key: min(1.0, entry["kinds"][kind] + 0.05) for key, entry in moments.items()},
                "plain": {"initial": 0.9 - 0.1 * i, "final": 0.85 - 0.1 * i} if plain and i < 5 else None,
                "elicitation": {"known": 0.7, "elicited": 0.6, "learnt": 0.2, "lost": 0.02},
            }
            for i, kind in enumerate(kinds)
        },
        "elicitation": {"known": 0.7, "elicited": 0.6, "learnt": 0.2, "lost": 0.02},
        "phases": phases, "history": history, "probe": {"exact_match": [0.81, 0.80], "loss": [1.0, 1.02]},
        "parameters": {"trainable": 12288, "total": 1_200_000}, "seconds": 12.0, "seconds_per_episode": 0.0421,
        "online": {"right_before": 0.3, "right_after": 0.7, "learnt_on": episodes}, "adapted": None,
        "inferred": None, "versions": {"perdure": "0.1.0", "torch": "2.8.0"},
        "machine": {"threads": 2, "processor": "a processor", "system": "Linux"}, "memory": None,
    }  # fmt: skip
    return {**content, **more}


def write(folder: Path, content: Mapping[str, Any], *, log: bool = True, lr: float = 1e-3) -> Path:
    """A run folder with these results; in its log the answers become right more often."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(content))
    keys = ("name", "model", "method", "strategy", "levels", "eval_tasks", "seed")
    online = {key: content[key] for key in ("episodes", "eval_every", "drift", "curriculum", "learn_on", "window")}
    config = {
        **{key: content[key] for key in keys},
        "kinds": content["tasks"],
        "online": online,
        "optimizer": {"lr": lr},
        "recorded": {"command": content["command"]},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # which YAML holds
    draw = random.Random(content["seed"])
    kinds, episodes = content["tasks"], content["episodes"]
    lines = []
    for episode in range(1, episodes + 1) if log else ():
        kind = kinds[(episode - 1) * len(kinds) // episodes] if content["drift"] == "blocks" else draw.choice(kinds)
        right = draw.random() < 0.8 * episode / episodes
        lines.append(
            {
                "event": "episode", "episode": episode, "kind": kind, "level": 2, "key": f"{episode:x}",
                "loss_before": 2.1, "loss": 2.1, "right_before": right, "right_after": right or draw.random() < 0.6,
                "before": "a", "after": "b", "learnt": True, "seconds": 0.05, "lr": 1e-3,
            }
        )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
