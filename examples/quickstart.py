"""Three tasks on a small network, one after another: what is forgotten, and what three strategies do about it.

The points lie on a circle, those of each task on a third of it, and the question is in which half of the third. The
held-out rows of every task are scored after each. With pnn each task has a part of the network of its own, and the
caller says which part answers; the others are told nothing.
"""

import math

import torch
from torch import nn

from perdure import ContinualTrainer

CONFIG = {
    "optimizer": {"type": "adam", "lr": 0.01},
    "batch_size": 16,
    # At most 20 epochs a task; back to the best one when the loss on its held-out rows has not fallen for 5.
    "early_stopping": {"patience": 5, "metric": "loss"},
}
STRATEGIES = {
    "naive": {},
    "ewc": {"ewc": {"strength": 100.0}},
    "replay": {"replay": {"capacity": 30}},
    "pnn": {"pnn": {}},
}


def rows(task: int, count: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Points of a third of the circle, and in which half of it they lie."""
    rng = torch.Generator().manual_seed(1000 * task + seed)
    third = 2 * math.pi / 3
    angle = third * (task + torch.rand(count, generator=rng))
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    return [(point, int(half)) for point, half in zip(points, angle > third * (task + 0.5), strict=True)]


def main() -> None:
    """Train with each strategy and print the last row of R, with its metrics."""
    print("accuracy in the end    first  second   third   average  forgetting")
    for name, strategy in STRATEGIES.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 2))
        trainer = ContinualTrainer(model, config={**CONFIG, "continual_strategy": strategy})
        for task in range(3):
            trainer.train_task(rows(task, 120, seed=0), rows(task, 100, seed=1), task_id=task, num_epochs=20)
        summary = trainer.scores.summary()
        last = "".join(f"{score:8.2f}" for score in trainer.scores.values[-1])
        print(f"{name:20}{last}{summary['average']:10.2f}{summary['forgetting']:12.2f}")


if __name__ == "__main__":
    main()
