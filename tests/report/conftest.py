"""Run folders as training writes them, small and by hand."""

import json
import math

import pytest

from perdure.evaluation import ScoreMatrix
from perdure.evaluation.matrix import json_safe

FORGETS = 0.3


def score(row, column, metric, joint):
    """0.1 before a task is trained, 0.9 right after, 0.3 less each stage from then on, never under 0.1."""
    trained = 1 if joint else column + 1
    value = 0.1 if row < trained else max(0.1, 0.9 - FORGETS * (row - trained))
    return value if metric == "exact_match" else 4 * (1 - value)


def guessing(row, column, metric, joint):
    """Exact match 0.9 of what was trained, told the task; inferred half of that. The losses fit."""
    told = 0.9 if row > column else 0.1
    value = told / 2 if metric.endswith("_inferred") else told
    return value if metric.startswith("exact_match") else 4 * (1 - value)


TOLD = {
    "metrics": ("exact_match", "exact_match_inferred", "loss", "loss_inferred"),
    "task_identity": "told", "main_metric": "exact_match", "scored": guessing,
}  # fmt: skip


def moved(weights, new, since, start):
    """What a stage's drift holds of a group; shares of the norm, nothing where all is new."""
    none = since is None
    return {
        "weights": weights, "new": new, "change": None if none else 10 * since, "relative_change": since,
        "new_since_start": new, "change_from_start": None if none else 10 * start,
        "relative_change_from_start": None if none else start,
    }  # fmt: skip


@pytest.fixture
def told_run(make_run):
    """A run that is told tasks, with drift and usage."""

    def make(name="packnet", tasks=("a", "b", "c"), **options):
        groups = {"embeddings": moved(100, 0, 0.0, 0.001), "block 0": moved(200, 0, 0.25, 0.5)}
        late = {**groups, "pnn": moved(50, 50, None, None)}
        total = moved(350, 50, 0.2, 0.4)
        drift = [{"total": moved(300, 0, 0.1, 0.1), "groups": groups}, None, {"total": total, "groups": late}]
        usage = [{"layers.0": {"a": 50, "free": 150}}] * 2 + [{"layers.0": {"a": 50, "b": 100, "free": 50}}]
        return make_run(name, tasks, **{**TOLD, "drift": drift, "usage": usage, **options})

    return make


@pytest.fixture
def make_run(tmp_path):
    """Writes a run folder and returns its path."""

    def make(
        name="naive", tasks=("a", "b", "c"), *, metrics=("exact_match", "loss"), joint=False, results=True,
        folder=None, track=False, sparse=False, config="seed: 0\n", scored=score, **extra,
    ):  # fmt: skip
        path = tmp_path / "runs" / (folder or name)
        path.mkdir(parents=True)
        stages = ["joint"] if joint else list(tasks)
        matrices = {metric: ScoreMatrix(metric, not metric.startswith("loss")) for metric in metrics}
        events = []
        for row in range(len(stages) + 1):
            if row:
                for k in range(10):
                    step = (row - 1) * 10 + k + 1
                    task = tasks[k % len(tasks)] if joint else stages[row - 1]
                    step_event = {"step": step, "task": task, "stage": row, "loss": 4 * math.exp(-k), "tokens": 8}
                    events.append({"event": "step", **step_event, "tokens_per_second": 9000.0})
                    if track and k == 4:
                        found = {metrics[0]: 0.5}
                        events.append(
                            {"event": "evaluation", "step": step, "row": None, "task": task, "metrics": found}
                        )
                for matrix in matrices.values():
                    matrix.record_stage(stages[row - 1])
            for i, task in enumerate(tasks):
                if sparse and i > row:
                    continue
                found = {metric: scored(row, i, metric, joint) for metric in metrics}
                events.append({"event": "evaluation", "step": row * 10, "row": row, "task": task, "metrics": found})
                for metric, value in found.items():
                    matrices[metric].record(row, task, value)
            events.append(
                {"event": "probe", "step": row * 10, "row": row, "metrics": {"exact_match": 0.5 / (row + 1)}}
            )
        (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (path / "config.yaml").write_text(config)
        if results:
            content = {
                "format": 1, "name": name, "strategy": name, "model": "nano", "tuning": "full", "seed": 0,
                "tasks": list(tasks), "stages": stages, "finished": True,
                "steps": 10 * len(stages), "seconds": 12.5,
                "parameters": {"trainable": 1000, "total": 4000},
                "metrics": {metric: matrix.summary() for metric, matrix in matrices.items()},
                "scores": {metric: matrix.to_dict() for metric, matrix in matrices.items()},
                "probe": {"exact_match": [0.5, 0.25]},
                "replay": None,
                "data": {task: {"train": 300, "evaluation": 100, "left_out": 2} for task in tasks},
                "versions": {"perdure": "0.1.0"},
                **extra,
            }  # fmt: skip
            (path / "results.json").write_text(json.dumps(json_safe(content), allow_nan=False))
        return path

    return make
