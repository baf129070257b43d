"""The pinned Python interface: ContinualTrainer on plain networks and language models, its scores and files."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from perdure import ContinualTrainer
from perdure.errors import ConfigError, NonFiniteError, StrategyError, UsageError
from perdure.evaluation import metrics
from perdure.strategies import EWC, Chain, Naive, Replay

CONFIG = {"optimizer": {"type": "adam", "lr": 0.02}, "batch_size": 8}


def test_classification(make_mlp: Any, loaders: Any) -> None:
    model = make_mlp(5, 2)
    fresh = ContinualTrainer(copy.deepcopy(model))
    trainer = ContinualTrainer(model, config=CONFIG)
    assert trainer.scores.values.shape == (1, 0)
    found = trainer.train_task(*loaders(0), task_id=0, num_epochs=80)
    assert set(found) == {"loss", "accuracy"}
    assert trainer.scores.values.shape == (2, 1)
    before = trainer.evaluate(loaders(1)[1], task_id=1)
    trainer.train_task(*loaders(1), task_id=1, task_name="flipped", num_epochs=80)

    R = trainer.scores.values
    assert R.shape == (3, 2)
    assert (trainer.scores.metric, trainer.scores.higher_is_better) == ("accuracy", True)
    assert trainer.scores.tasks == ["task_0", "flipped"]
    assert R[0].tolist() == [fresh.evaluate(loaders(task)[1])["accuracy"] for task in range(2)]
    assert (R[1, 0], R[1, 1]) == (found["accuracy"], before["accuracy"])
    assert R[2].tolist() == [trainer.evaluate(loaders(task)[1])["accuracy"] for task in range(2)]
    assert (R[1, 0], R[2, 1]) == (1, 1)
    assert metrics.forgetting(R) > 0.5
    assert trainer.model is model


def test_regression(make_mlp: Any) -> None:
    """Against R², RMSE and MAE taken with numpy over all rows at once."""
    x = torch.linspace(-1, 1, 40).view(20, 2)
    y = (2 * x.sum(1)).sin()
    trainer = ContinualTrainer(
        make_mlp(2, 1), Naive(), {**CONFIG, "optimizer": {"lr": 0.05}}, objective="regression"
    )
    loader = DataLoader(TensorDataset(x, y), batch_size=7)
    found = trainer.train_task(loader, loader, num_epochs=100)
    with torch.no_grad():
        error = (trainer.model.eval()(x)[:, 0] - y).double().numpy()
    truth = y.double().numpy()
    assert found == pytest.approx(
        {
            "loss": 0.5 * np.mean(error**2),
            "rmse": np.sqrt(np.mean(error**2)),
            "mae": np.mean(np.abs(error)),
            "r2": 1 - np.sum(error**2) / np.sum((truth - truth.mean()) ** 2),
        },
        rel=1e-6,
    )
    assert found["r2"] > 0.9
    assert (trainer.scores.metric, trainer.scores.values.shape) == ("r2", (2, 1))
    assert {m: R.higher_is_better for m, R in trainer.matrices.items()} == {
        "loss": False, "rmse": False, "mae": False, "r2": True,
    }  # fmt: skip


class Text(Dataset[Any]):
    """Token rows as Transformers data sets give them, padded, with an attention mask."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels = self.rows[index].x.tolist(), self.rows[index].y.tolist()
        pad = 12 - len(ids)
        return {
            "input_ids": ids + [2] * pad,
            "attention_mask": [1] * len(ids) + [0] * pad,
            "labels": labels + [-100] * pad,
        }


def test_a_causal_language_model(make_lm: Any, make_lm_rows: Any) -> None:
    """Mappings and examples are the same rows; the loss is per learnt token."""
    rows = make_lm_rows(10)
    ends = []
    for data in (Text(rows), rows):
        trainer = ContinualTrainer(make_lm(), Replay(capacity=5), CONFIG, objective="causal_lm")
        first = trainer.evaluate(data)
        found = trainer.train_task(data, data, num_epochs=6)
        trainer.train_task(make_lm_rows(10, 1), task_id=1)
        assert set(found) == {"loss"}
        assert found["loss"] < first["loss"]
        assert trainer.scores.values[0, 0] == first["loss"]
        assert (trainer.scores.metric, trainer.scores.higher_is_better) == ("loss", False)
        ends.append(found["loss"])
    assert ends[0] == pytest.approx(ends[1], abs=0.2)


def test_settings_from_a_mapping_and_from_yaml_are_the_same(
    make_mlp: Any, tmp_path: Path, trained: Any, same: Any
) -> None:
    """1e-2 is text to YAML 1.1; "lambda" is what earlier systems call the strength."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "optimizer: {type: sgd, lr: 1e-2, momentum: 0.9}\nbatch_size: 8\n"
        "continual_strategy:\n  ewc: {enabled: true, lambda: 7.5}\n  replay: {enabled: false}\n"
    )
    mapping = {
        "optimizer": {"type": "sgd", "lr": 0.01, "momentum": 0.9},
        "batch_size": 8,
        "continual_strategy": {"ewc": {"enabled": True, "lambda": 7.5}, "replay": {"enabled": False}},
    }
    both = [trained(ContinualTrainer(make_mlp(5, 2), config=config)) for config in (mapping, path, str(path))]
    assert [(type(t.strategy), t.strategy.strength) for t in both] == [(EWC, 7.5)] * 3  # type: ignore[attr-defined]
    for other in both[1:]:
        assert same(both[0], other)


def test_two_enabled_strategies_make_a_chain(make_mlp: Any) -> None:
    config = {"continual_strategy": {"replay": {"capacity": 5}, "ewc": {"strength": 2}}}
    strategy = ContinualTrainer(make_mlp(), config=config).strategy
    assert isinstance(strategy, Chain)
    assert [member.name for member in strategy.strategies] == ["replay", "ewc"]


def mistakes(**given: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        ContinualTrainer(nn.Linear(5, 2), **given)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_all_mistakes_are_told_together() -> None:
    text = mistakes(
        config={
            "optimiser": {},
            "optimizer": {"type": "adamax", "lr": -1},
            "batch_size": 0,
            "continual_strategy": {
                "ewc": {"strenght": 1, "fisher": "exact"},
                "ewcc": {},
                "replay": {"capacity": "x"},
            },
        }
    )
    for setting, *words in (
        ("optimiser", "Did you mean 'optimizer'?"),
        ("optimizer.type", "'adam', 'adamw', 'sgd' or 'adafactor'", "'adamax'"),
        ("optimizer.lr", "greater than 0", "-1"),
        ("batch_size", "greater than or equal to 1", "0"),
        ("'strenght'", "Did you mean 'strength'?"),
        ("ewc.fisher", "'exact'"),
        ("'ewcc'", "Did you mean 'ewc'?"),
        ("replay: capacity", "'x'"),
    ):
        assert re.search(".*".join(map(re.escape, (setting, *words))), text), (setting, text)


def test_other_mistakes_are_named(tmp_path: Path, loaders: Any, trained: Any) -> None:
    assert "unknown objective 'clasify'" in mistakes(objective="clasify")
    twice = mistakes(strategy=EWC(), config={"continual_strategy": {"replay": {}}})
    assert "given twice: as an object (ewc) and by continual_strategy (replay)" in twice
    assert "micro_batch_size (9) must not exceed batch_size (8)" in mistakes(
        config={"batch_size": 8, "micro_batch_size": 9}
    )
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "bad.yaml, line 2: not valid YAML" in mistakes(config=tmp_path / "bad.yaml")
    assert "none.yaml: " in mistakes(config=tmp_path / "none.yaml")
    trainer = trained(ContinualTrainer(nn.Linear(5, 2), config=CONFIG), stop=1)
    with pytest.raises(ConfigError, match="task 'task_0' was trained already"):
        trainer.train_task(*loaders(0), task_id=0)
    with pytest.raises(ConfigError, match="num_epochs must be at least 1, got 0"):
        trainer.train_task(*loaders(1), task_id=1, num_epochs=0)


def test_the_seed_decides(make_mlp: Any, trained: Any, same: Any) -> None:
    ends = [trained(ContinualTrainer(make_mlp(5, 2), Replay(), CONFIG, seed=seed)) for seed in (3, 3, 4)]
    assert same(ends[0], ends[1])
    assert not same(ends[0], ends[2])


def test_a_task_without_held_out_rows_has_an_empty_column(make_mlp: Any, loaders: Any) -> None:
    """R stays [T+1, T]; what was not measured is NaN, and the metrics skip it."""
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG)
    for task in range(3):
        train, held = loaders(task)
        found = trainer.train_task(train, held if task == 1 else None, task_id=task)
        assert bool(found) is (task == 1)
        R = trainer.scores.values
        assert R.shape == (task + 2, task + 1)
        assert np.isnan(R[:, [i for i in range(task + 1) if i != 1]]).all()
    assert np.isfinite(R[:, 1]).all()
    assert trainer.scores.tasks == ["task_0", "task_1", "task_2"]
    assert metrics.average(R) == R[3, 1]
    assert metrics.forgetting(R) == max(R[1, 1], R[2, 1]) - R[3, 1]


def test_row_0_of_a_later_task_is_before_any_training_in_every_way(loaders: Any, trained: Any) -> None:
    """The running statistics of a batch norm move with training as weights do."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))
    fresh = ContinualTrainer(copy.deepcopy(model))
    trainer = trained(ContinualTrainer(model, config=CONFIG))
    expected = [fresh.evaluate(loaders(task)[1])["loss"] for task in range(2)]
    assert trainer.matrices["loss"].values[0].tolist() == expected
    assert int(model[1].num_batches_tracked) == 2 * 4 * 3


def test_evaluation_records_nothing_and_changes_nothing(make_mlp: Any, loaders: Any, trained: Any) -> None:
    trainer = trained(ContinualTrainer(make_mlp(5, 2), config=CONFIG), stop=1)
    before, R = copy.deepcopy(trainer.model.state_dict()), trainer.scores.values
    trainer.model.train()
    loader = loaders(0)[1]
    rows = [loader.dataset[i] for i in range(16)]
    assert trainer.evaluate(loader) == trainer.evaluate(rows) == trainer.evaluate(loader.dataset, task_id=0)
    assert trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert np.array_equal(trainer.scores.values, R)


def test_a_task_that_failed_leaves_no_trace_in_the_scores(make_mlp: Any, loaders: Any) -> None:
    """Task 1 was scored before its training failed; task 2 is then the second, and R is [3, 2]."""
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG)
    trainer.train_task(*loaders(0), task_id=0)
    x, y = next(iter(loaders(1)[0]))
    with pytest.raises(NonFiniteError):
        trainer.train_task(TensorDataset(x * math.nan, y), loaders(1)[1], task_id=1)
    assert (trainer.scores.tasks, trainer.scores.values.shape) == (["task_0"], (2, 1))
    trainer.train_task(*loaders(1), task_id=2)
    assert trainer.scores.tasks == trainer.scores.stages == ["task_0", "task_2"]
    assert np.isfinite(trainer.scores.values).all()
    assert trainer.scores.values.shape == (3, 2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool])
def test_classes_may_be_any_whole_numbers(make_mlp: Any, dtype: torch.dtype) -> None:
    x, y = torch.eye(5), torch.tensor([0, 1, 0, 1, 1])
    losses = [ContinualTrainer(make_mlp(5, 2)).evaluate(TensorDataset(x, labels)) for labels in (y, y.to(dtype))]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda model: ContinualTrainer(model, "ewc"), "must be a Strategy object, such as EWC"),
        (lambda model: ContinualTrainer(model, EWC), r"must be a Strategy object, such as EWC\(\)"),
        (lambda model: ContinualTrainer("nano"), "must be an nn.Module, got 'nano'"),
        (lambda model: ContinualTrainer(model, seed=-1), "seed must be 0 or more"),
        (
            lambda model: Replay(capacity="5%"),
            "capacity must be a whole number of rows or a size such as \"2MB\", got '5%'",
        ),
    ],
    ids=["name", "class", "model", "seed", "share"],
)
def test_what_is_no_strategy_or_model_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(nn.Linear(2, 2))


def test_a_strategy_serves_one_training(make_mlp: Any) -> None:
    """Its memory or anchors would come along."""
    used = Replay(capacity=4)
    ContinualTrainer(make_mlp(), used)
    with pytest.raises(StrategyError, match="replay: this object has served another training"):
        ContinualTrainer(make_mlp(), used)
    with pytest.raises(StrategyError, match="replay: this object has served another training"):
        ContinualTrainer(make_mlp(), Chain([EWC(), used]))


def test_another_strategy_than_the_saved_one_is_refused(make_mlp: Any, tmp_path: Path) -> None:
    ContinualTrainer(make_mlp(), EWC(strength=2.0)).save(tmp_path / "saved")
    with pytest.raises(StrategyError, match=r"was saved with ewc\(strength=2.0.*the strategy given is replay\("):
        ContinualTrainer.load(tmp_path / "saved", make_mlp(), Replay())
    with pytest.raises(StrategyError, match=r"the strategy given is ewc\(strength=3"):
        ContinualTrainer.load(tmp_path / "saved", make_mlp(), EWC(strength=3.0))
    ContinualTrainer.load(tmp_path / "saved", make_mlp(), EWC(strength=2.0))
