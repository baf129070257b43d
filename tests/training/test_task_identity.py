"""Who says which task a row is of: the caller, by task_id, or the strategy, by its own rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perdure import ContinualTrainer
from perdure.errors import ConfigError
from perdure.strategies import PNN, Naive, PackNet, Strategy
from perdure.strategies.identity import forward_by_task
from perdure.types import Batch, Context, Output

CONFIG = {"optimizer": {"type": "adam", "lr": 0.02}, "batch_size": 8}


class Turned(Strategy):
    """The second task is answered with the classes changed round, all others as they come.

    It grows by a parameter a task, and takes every row for one of the task that came last.
    """

    name = "turned"
    wants_task_ids = True

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.asked: list[list[str]] = []

    def prepare(self, ctx: Context) -> None:
        self.tasks[ctx.index :] = [ctx.task.name]
        ctx.model.register_parameter(f"grown{ctx.index}", nn.Parameter(torch.zeros(3)))

    def forward(self, model: nn.Module, batch: Batch) -> Output:
        def answer(task: str, rows: Batch) -> torch.Tensor:
            logits: torch.Tensor = model(rows.x)
            return logits.flip(1) if self.tasks[1:2] == [task] else logits

        return forward_by_task(batch, answer)

    def identify(self, model: nn.Module, batch: Batch) -> list[str]:
        self.asked.append([row.task for row in batch.examples])
        return [self.tasks[-1] if self.tasks else row.task for row in batch.examples]

    def state_dict(self) -> dict[str, Any]:
        return {"tasks": list(self.tasks)}

    def load_state_dict(self, state: Any) -> None:
        self.tasks = list(state["tasks"])


def two_tasks(model: nn.Module, loaders: Any, **more: Any) -> ContinualTrainer:
    """The sides of the second task are the first's changed round, so that this strategy need not forget."""
    trainer = ContinualTrainer(model, Turned(), CONFIG, **more)
    trainer.train_task(*loaders(0), task_id=7, task_name="left", num_epochs=60)
    trainer.train_task(*loaders(1), task_id=3, num_epochs=60)
    return trainer


def test_told_and_inferred(make_mlp: Any, loaders: Any, tmp_path: Path) -> None:
    """Told, both tasks are known; taken for the second, rows of the first are answered the wrong way round.

    Inferred accuracy of the first task is then 1 − told, whatever the model is.
    """
    model = make_mlp(5, 2)
    fresh = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = two_tasks(model, loaders, output_dir=tmp_path / "out")
    assert trainer.scores.tasks == ["left", "task_3"]
    told, inferred = (trainer.matrices[name].values for name in ("accuracy", "accuracy_inferred"))
    assert (told[2] == 1).all()
    assert inferred[2].tolist() == [0, 1]
    assert inferred[1].tolist() == told[1].tolist()
    assert set(trainer.matrices) == {"loss", "accuracy", "loss_inferred", "accuracy_inferred"}
    assert trainer.scores.metric == "accuracy"

    naive = ContinualTrainer(plain := make_mlp(5, 2), Naive())
    plain.load_state_dict(fresh)
    start = [naive.evaluate(loaders(task)[1]) for task in range(2)]
    for metric in ("loss", "accuracy"):
        row = [scores[metric] for scores in start]
        assert trainer.matrices[metric].values[0].tolist() == row
        assert trainer.matrices[f"{metric}_inferred"].values[0].tolist() == row

    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["task_identity"] == "told"
    assert results["metrics"]["accuracy_inferred"]["average"] == 0.5
    assert (tmp_path / "out" / "scores_accuracy_inferred.csv").is_file()


def test_evaluate_is_told_by_the_id_or_asks(make_mlp: Any, loaders: Any, tmp_path: Path) -> None:
    """Ids stand for the tasks' names, also in a trainer that was saved and loaded."""
    trainer = two_tasks(make_mlp(5, 2), loaders)
    again = ContinualTrainer.load(trainer.save(tmp_path / "saved"), make_mlp(5, 2), Turned())
    held = loaders(0)[1]
    for one in (trainer, again):
        assert one.evaluate(held, task_id=7)["accuracy"] == 1
        assert one.evaluate(held, task_id=3)["accuracy"] == 0
        assert one.evaluate(held)["accuracy"] == 0
        with pytest.raises(ConfigError, match=r"task_id 0 was not trained, .* known: 7 \(left\), 3 \(task_3\)"):
            one.evaluate(held, task_id=0)
    strategy: Any = trainer.strategy
    strategy.asked.clear()
    trainer.evaluate(held, task_id=7)
    assert strategy.asked == []
    trainer.evaluate(held)
    assert {name for names in strategy.asked for name in names} == {"evaluation"}


def test_before_any_task_there_is_none_to_tell(make_mlp: Any, loaders: Any) -> None:
    trainer = ContinualTrainer(make_mlp(5, 2), Turned(), CONFIG)
    assert trainer.evaluate(loaders(0)[1]) == ContinualTrainer(make_mlp(5, 2)).evaluate(loaders(0)[1])
    with pytest.raises(ConfigError, match="known: none yet"):
        trainer.evaluate(loaders(0)[1], task_id=0)


def test_an_id_is_one_tasks_alone_where_it_tells_something(make_mlp: Any, loaders: Any) -> None:
    """Other strategies never ask for it, and a task that failed gives its id back."""
    for strategy in (Turned(), Naive()):
        trainer = ContinualTrainer(make_mlp(5, 2), strategy, CONFIG)
        with pytest.raises(ConfigError, match="num_epochs"):
            trainer.train_task(*loaders(0), task_name="a", num_epochs=0)
        with pytest.raises(ValueError, match="no rows"):
            trainer.train_task([], task_name="a")
        trainer.train_task(*loaders(0), task_name="b")
        if strategy.wants_task_ids:
            with pytest.raises(ConfigError, match="task_id 0 is task 'b' already, and turned answers by task"):
                trainer.train_task(*loaders(1), task_name="c")
        else:
            trainer.train_task(*loaders(1), task_name="c")
            assert trainer.evaluate(loaders(1)[1], task_id=9) == trainer.evaluate(loaders(1)[1])


def test_strategies_without_task_ids_say_nothing_of_it(make_mlp: Any, loaders: Any, tmp_path: Path) -> None:
    trainer = ContinualTrainer(make_mlp(5, 2), Naive(), CONFIG, output_dir=tmp_path / "out")
    trainer.train_task(*loaders(0))
    assert set(trainer.matrices) == {"loss", "accuracy"}
    assert json.loads((tmp_path / "out" / "results.json").read_text())["task_identity"] is None


@pytest.mark.parametrize("make", [PackNet, PNN])
def test_a_regression_is_inferred_by_what_is_nearest(make: Any) -> None:
    trainer = ContinualTrainer(nn.Sequential(nn.Linear(5, 1)), make(), CONFIG, "regression")
    rows = {task: [(torch.randn(5) + 9 * task, torch.randn(())) for _ in range(8)] for task in range(2)}
    for task in range(2):
        trainer.train_task(rows[task], rows[task], task_id=task)
    assert {"r2_inferred", "rmse_inferred", "mae_inferred", "loss_inferred"} <= set(trainer.matrices)
    for task in range(2):
        assert trainer.evaluate(rows[task]) == trainer.evaluate(rows[task], task_id=task)


def test_a_regression_must_be_told_where_the_surest_would_have_it(make_mlp: Any) -> None:
    rows = [(torch.randn(5), torch.randn(())) for _ in range(8)]
    trainer = ContinualTrainer(make_mlp(5, 1), PackNet(infer="surest"), CONFIG, "regression")
    trainer.train_task(rows, rows, task_id=1)
    assert set(trainer.matrices) == {"loss", "rmse", "mae", "r2"}
    assert set(trainer.evaluate(rows, task_id=1)) == {"loss", "rmse", "mae", "r2"}
    with pytest.raises(ConfigError, match="task_id"):
        trainer.evaluate(rows)


@pytest.mark.parametrize("make", [PackNet, PNN])
def test_opposite_tasks_are_kept_apart(make: Any, loaders: Any, tmp_path: Path) -> None:
    """The rows of the two tasks are alike and their classes opposite: only who is told can know both."""

    def network(seed: int = 0) -> nn.Sequential:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 2))

    trainer = ContinualTrainer(network(), make(), CONFIG)
    start = [ContinualTrainer(network()).evaluate(loaders(task)[1])["loss"] for task in range(2)]
    for task in range(2):
        trainer.train_task(*loaders(task), task_id=task, task_name=f"side {task}", num_epochs=60)
    told = trainer.matrices["loss"].values
    assert told[0].tolist() == start
    assert told[2, 0] == told[1, 0]
    assert (trainer.scores.values[2] == 1).all()
    again = ContinualTrainer.load(trainer.save(tmp_path / "saved"), network(seed=1))
    for task in range(2):
        found = again.evaluate(loaders(task)[1], task_id=task)
        assert found["loss"] == told[2, task]
        assert trainer.evaluate(loaders(task)[1])["loss"] == trainer.matrices["loss_inferred"].values[2, task]
