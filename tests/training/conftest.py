"""Tasks that turn their classes round and trainers to put through them; a tiny language model and its tasks."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perdure import ContinualTrainer
from perdure.config import validate
from perdure.training.display import Display
from perdure.training.folder import FINAL, RunFolder
from perdure.training.plan import make_plan
from perdure.training.run import Run
from perdure.training.settings import RunSettings


def blobs(task: int, rows: int = 24, seed: int = 0) -> TensorDataset:
    """Two classes left and right of zero; the sides change from task to task."""
    rng = torch.Generator().manual_seed(100 * task + seed)
    y = torch.randint(0, 2, (rows,), generator=rng)
    x = torch.randn(rows, 5, generator=rng)
    x[:, 0] = (2.0 * y - 1) * (-1) ** task + 0.1 * x[:, 0]
    return TensorDataset(x, y)


@pytest.fixture(scope="session")
def loaders() -> Callable[[int], tuple[DataLoader[Any], DataLoader[Any]]]:
    """Build a task's training and held-out loader: `loaders(task)`; 24 and 16 rows, batches of 8 and 5."""

    def make(task: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
        return DataLoader(blobs(task), batch_size=8, shuffle=True), DataLoader(blobs(task, 16, 1), batch_size=5)

    return make


@pytest.fixture(scope="session")
def trained(loaders: Any) -> Callable[..., ContinualTrainer]:
    """Put a trainer through tasks `start` to `stop`, 4 epochs of 3 steps each, and return it."""

    def train(trainer: ContinualTrainer, start: int = 0, stop: int = 2) -> ContinualTrainer:
        for task in range(start, stop):
            trainer.train_task(*loaders(task), task_id=task, num_epochs=4)
        return trainer

    return train


@pytest.fixture(scope="session")
def same() -> Callable[[ContinualTrainer, ContinualTrainer], bool]:
    """Whether two trainers have the same weights, to the bit, and the same scores."""

    def compare(one: ContinualTrainer, two: ContinualTrainer) -> bool:
        scores = [{m: matrix.to_dict() for m, matrix in trainer.matrices.items()} for trainer in (one, two)]
        return same_weights(one.model, two.model) and scores[0] == scores[1]

    return compare


def same_weights(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.fixture(scope="session")
def tiny(make_lm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of words w0 … w36 and the rows of three tasks and a probe, as JSON lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("tiny")
    make_lm(spread=0.1, bos_token_id=37, eos_token_id=38).save_pretrained(path / "model")
    words = {f"w{i}": i for i in range(37)} | {"<s>": 37, "</s>": 38, "?": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path / "model")
    for number, name in enumerate(["a", "b", "c", "probe"]):
        rows = [{"prompt": f"w{number} w{9 + i}", "answer": f" w{4 + number} w{20 + i % 3}"} for i in range(9)]
        for part, chosen in (("", rows[:6]), ("-test", rows[6:])):
            text = "".join(json.dumps(row) + "\n" for row in chosen)
            (path / f"{name}{part}.jsonl").write_text(text)
    return path


@pytest.fixture(scope="session")
def settings(tiny: Path) -> Callable[..., RunSettings]:
    """Settings of a run of tasks a and b, 6 steps each: `settings(strategy="naive", **changes)`."""

    def make(**changes: Any) -> RunSettings:
        def task(name: str) -> dict[str, Any]:
            return {"name": name, "train": f"{name}.jsonl", "evaluation": f"{name}-test.jsonl"}

        values = {
            "model": str(tiny / "model"),
            "data": str(tiny),
            "stream": {"tasks": [task("a"), task("b")]},
            "probe": {"name": "probe", "train": "probe-test.jsonl"},
            "optimizer": {"type": "adamw", "lr": 0.01},
            "batch_size": 2,
            "epochs": 2,
            "continual_strategy": {"replay": {"capacity": 4}, "ewc": {"strength": 2.0}},
        }
        return validate(RunSettings, {**values, **changes}, "test")

    return make


@pytest.fixture(scope="session")
def execute() -> Callable[..., dict[str, Any]]:
    """Run settings in a folder, or go on with what is there: `execute(settings, path, display)`."""

    def run(settings: RunSettings, path: Path, display: Display | None = None) -> dict[str, Any]:
        return Run(make_plan(settings), RunFolder(path), display, "perdure train").execute()

    return run


class _Stop(Display):
    """Ctrl-C at the n-th step, or at the n-th scoring."""

    def __init__(self, step: int = 0, scoring: int = 0, act: Callable[[], Any] | None = None) -> None:
        self.left = {"step": step, "scoring": scoring}
        self.act = act or (lambda: signal.raise_signal(signal.SIGINT))
        self.said: list[str] = []

    def count(self, what: str) -> None:
        self.left[what] -= 1
        if self.left[what] == 0:
            self.act()

    def step(self, *_: Any) -> None:
        self.count("step")

    def doing(self, what: str) -> None:
        if what.startswith("scoring"):
            self.count("scoring")

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="session")
def Stop() -> type[_Stop]:
    return _Stop


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], dict[str, Any]]:
    """All that a run ends with but times: weights, scores, memory, generators, and the log."""

    def look(path: Path) -> dict[str, Any]:
        results = json.loads((path / "results.json").read_text())
        state, _ = RunFolder(path).newest()
        assert state is not None
        exported = next(path.glob("*/*model.safetensors"))
        told = ("metrics", "scores", "probe", "replay", "steps", "drift", "usage")
        found: dict[str, Any] = {
            "scores": {name: results[name] for name in told},
            "csv": {p.name: p.read_text() for p in path.glob("*.csv")},
            "exported": {name: value.tolist() for name, value in load_file(exported).items()},
            "learner": json.dumps(state["learner"], default=lambda tensor: tensor.tolist()),
            "final": {p.name: p.read_bytes() for p in (path / "checkpoints" / FINAL).iterdir()},
        }
        events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        found["log"] = [
            (e["event"], e.get("step"), e.get("loss"), e.get("metrics"))
            for e in events
            if e["event"] != "checkpoint"
        ]
        return found

    return look


@pytest.fixture(scope="session")
def finished(execute: Any, settings: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a run that was never disturbed; one a setting."""
    done: dict[str, Path] = {}

    def get(**changes: Any) -> Path:
        name = json.dumps(changes)
        if name not in done:
            done[name] = tmp_path_factory.mktemp("runs") / "run"
            execute(settings(**changes), done[name])
        return done[name]

    return get
