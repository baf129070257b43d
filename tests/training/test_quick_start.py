"""An earlier system's quick start, as its README has it: it runs here with nothing but its imports changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from perdure import ContinualTrainer
from perdure.strategies import EWC, Chain, PackNet

QUICK_START = """\
from ml.training.continual import ContinualTrainer
from ml.continual_strategies import EWC, LwF, GEM, PackNet
import torch.nn as nn

# Initialize your model
model = nn.Sequential(...)  # Your model architecture

# Option 1: Using EWC, LwF, or GEM
trainer = ContinualTrainer(
    model=model,
    config={
        "optimizer": {"type": "adam", "lr": 0.001},
        "continual_strategy": {
            "ewc": {
                "enabled": True,
                "lambda": 100.0
            }
        }
    }
)

# Option 2: Using PackNet
trainer = ContinualTrainer(
    model=model,
    config={
        "optimizer": {"type": "adam", "lr": 0.001},
        "continual_strategy": {
            "packnet": {
                "enabled": True,
                "prune_percentage": 0.75,  # 75% of weights pruned per task
                "use_magnitude_pruning": True
            }
        }
    }
)

# Train on multiple tasks sequentially
for task_id, (train_loader, val_loader) in enumerate(task_data):
    trainer.train_task(
        train_loader=train_loader,
        val_loader=val_loader,
        task_id=task_id,
        task_name=f"task_{task_id}",
        num_epochs=10
    )
"""
IMPORTS = {
    "from ml.training.continual import ContinualTrainer": "from perdure import ContinualTrainer",
    "from ml.continual_strategies import": "from perdure.strategies import",
}
# What the reader fills in.
MODEL = "nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 2))"


def task_data(tasks: int = 3) -> list[tuple[DataLoader[Any], DataLoader[Any]]]:
    """Which side of a plane; the planes go through other axes from task to task."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for task in range(tasks):
        x = torch.randn(576, 8, generator=rng)
        rows = TensorDataset(x, (x[:, 2 * task] + x[:, 2 * task + 1] > 0).long())
        train, held = torch.utils.data.Subset(rows, range(512)), torch.utils.data.Subset(rows, range(512, 576))
        found.append((DataLoader(train, batch_size=16, shuffle=True), DataLoader(held, batch_size=64)))
    return found


def quick_start(option: int) -> ContinualTrainer:
    """Run it with the first option alone, or whole: then the second is the one that is trained."""
    code = QUICK_START.replace("nn.Sequential(...)", MODEL)
    for theirs, ours in IMPORTS.items():
        assert code.count(theirs) == 1
        code = code.replace(theirs, ours)
    if option == 1:
        before, _, rest = code.partition("# Option 2")
        code = before + rest[rest.index("# Train on") :]
    torch.manual_seed(0)
    namespace: dict[str, Any] = {"task_data": task_data()}
    exec(compile(code, f"quick start, option {option}", "exec"), namespace)
    trainer = namespace["trainer"]
    assert isinstance(trainer, ContinualTrainer)
    assert trainer.model is namespace["model"]
    return trainer


def test_with_ewc() -> None:
    trainer = quick_start(1)
    assert isinstance(trainer.strategy, EWC)
    assert trainer.strategy.strength == 100.0
    R = trainer.scores.values
    assert R.shape == (4, 3)
    assert R[1, 0] > 0.9


def test_with_packnet() -> None:
    """Every task is learnt, and in the end known to the last digit as when it was learnt."""
    trainer = quick_start(2)
    assert isinstance(trainer.strategy, PackNet)
    assert (trainer.strategy.prune_percentage, trainer.strategy.use_magnitude_pruning) == (0.75, True)
    R = trainer.scores.values
    assert R.shape == (4, 3)
    assert min(R[task + 1, task] for task in range(3)) > 0.8
    assert [R[3, task] for task in range(3)] == [R[task + 1, task] for task in range(3)]
    assert trainer.evaluate(task_data()[0][1], task_id=0)["accuracy"] == R[3, 0]


@pytest.mark.parametrize("order", [["lwf", "gem"], ["replay", "ewc", "lwf"]], ids="+".join)
def test_several_that_are_enabled_make_a_chain(order: list[str]) -> None:
    """In the order of the config; what is not enabled is not there."""
    strategies = {name: {"enabled": True} for name in order}
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    config = {
        "optimizer": {"type": "adam", "lr": 0.001},
        "continual_strategy": {"packnet": {"enabled": False}, **strategies},
    }
    trainer = ContinualTrainer(model=model, config=config)
    assert isinstance(trainer.strategy, Chain)
    assert [member.name for member in trainer.strategy.strategies] == order
    for task_id, (train_loader, val_loader) in enumerate(task_data(2)):
        trainer.train_task(train_loader=train_loader, val_loader=val_loader, task_id=task_id, num_epochs=2)
    assert trainer.scores.values.shape == (3, 2)
