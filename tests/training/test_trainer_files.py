"""What a trainer writes: saved and loaded it goes on bit for bit; an output folder; nothing without one."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from perdure import ContinualTrainer
from perdure.errors import ConfigError, RunError, StrategyError, UsageError
from perdure.evaluation import metrics
from perdure.strategies import EWC, Chain, Naive, Replay, Strategy
from perdure.training import checkpoint

CONFIG = {"optimizer": {"type": "adam", "lr": 0.02}, "batch_size": 8}
STRATEGIES = {
    "naive": Naive,
    "replay": lambda: Replay(capacity=9),
    "ewc": lambda: EWC(strength=3.0, decay=0.5),
    "chain": lambda: Chain([Replay(capacity=9, ratio=0.5), EWC(strength=3.0, fisher="true")]),
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("boundary", ["reset", "continue"])
def test_saved_and_loaded_goes_on_as_if_nothing_had_been(
    make_mlp: Any, tmp_path: Path, make: Any, boundary: str, trained: Any, same: Any
) -> None:
    config = {**CONFIG, "optimizer": {"lr": 0.02, "at_boundary": boundary}}
    first = trained(ContinualTrainer(make_mlp(5, 2), make(), config, seed=5), stop=1)
    assert first.save(tmp_path / "saved") == tmp_path / "saved"
    trained(first, 1, 3)
    torch.manual_seed(99)
    second = ContinualTrainer.load(tmp_path / "saved", make_mlp(5, 2, seed=8))
    assert second.scores.values.shape == (2, 1)
    trained(second, 1, 3)
    assert same(first, second)
    assert second.scores.values.shape == (4, 3)


class Own(Strategy):
    """A class of the user's own."""

    name = "own"


def test_loading_says_what_it_needs(make_mlp: Any, tmp_path: Path, trained: Any, same: Any) -> None:
    trainer = trained(ContinualTrainer(make_mlp(5, 2), Own(), CONFIG), stop=1)
    path = trainer.save(tmp_path / "saved")
    with pytest.raises(StrategyError, match="a strategy of your own class; give it as strategy="):
        ContinualTrainer.load(path, make_mlp(5, 2))
    assert same(ContinualTrainer.load(path, make_mlp(5, 2, seed=1), Own()), trainer)
    with pytest.raises(UsageError, match="of another model"):
        ContinualTrainer.load(path, make_mlp(4, 2), Own())
    with pytest.raises(RunError, match="not a readable checkpoint"):
        ContinualTrainer.load(tmp_path / "nowhere", make_mlp(5, 2))
    checkpoint.save(tmp_path / "other", {"identity": {}, "stage": 1})
    with pytest.raises(RunError, match="holds a run's checkpoint, not a trainer's"):
        ContinualTrainer.load(tmp_path / "other", make_mlp(5, 2))


def test_without_output_dir_nothing_is_written(
    make_mlp: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(ContinualTrainer(make_mlp(5, 2), Replay(), CONFIG))
    assert not list(tmp_path.iterdir())


def test_the_output_folder(make_mlp: Any, tmp_path: Path, loaders: Any, trained: Any, same: Any) -> None:
    out = tmp_path / "out"
    trainer = trained(ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, output_dir=out))
    names = {"metrics.jsonl", "scores.csv", "scores_loss.csv", "results.json", "checkpoints"}
    assert {path.name for path in out.iterdir()} == names
    events = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "step" for event in events) == 2 * 4 * 3
    assert sum(event["event"] == "evaluation" for event in events) == np.isfinite(trainer.scores.values).sum()
    results = json.loads((out / "results.json").read_text())
    assert (results["strategy"], results["seed"], results["tasks"]) == ("ewc", 0, ["task_0", "task_1"])
    assert results["metrics"]["accuracy"]["average"] == metrics.average(trainer.scores.values)
    assert results["metrics"]["loss"]["higher_is_better"] is False
    assert results["scores"]["accuracy"]["values"] == trainer.scores.values.tolist()
    lines = (out / "scores.csv").read_text().splitlines()
    assert lines[0] == "after,task_0,task_1"
    assert [line.split(",")[0] for line in lines[1:]] == ["start", "task_0", "task_1"]
    with pytest.raises(ConfigError, match=r"holds the metrics.jsonl of an earlier training"):
        ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, output_dir=out)
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(events)
    loaded = ContinualTrainer.load(out / "checkpoints" / "task-002", make_mlp(5, 2))
    assert same(loaded, trainer)
    assert math.isfinite(loaded.evaluate(loaders(0)[1])["loss"])
