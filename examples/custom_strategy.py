"""A strategy of one's own in twenty lines: kept of each task are rows from the easiest to the hardest.

How hard a row is says its loss when the task ends. All else comes with the interface: it runs on any model, joins
chains, and is saved and resumed with the rest.
"""

import torch
from torch import nn

from perdure import ContinualTrainer
from perdure.memory.pack import pack, unpack
from perdure.strategies import Naive, Strategy


class Spread(Strategy):
    """Beside the new rows of a step, as many kept rows of earlier tasks."""

    name = "spread"

    def __init__(self, per_task: int = 10) -> None:
        self.per_task = per_task
        self.rows = []

    def mix(self, ctx, examples):
        """Add rows to a step; draws come from the strategy's own generator, so that they can be repeated."""
        if not self.rows:
            return examples
        drawn = torch.randint(len(self.rows), (len(examples),), generator=ctx.rng)
        return [*examples, *(self.rows[i].but(source=self.name) for i in drawn)]

    def after_task(self, ctx):
        """Order the task's rows by their loss, and keep some at equal distances."""
        with torch.no_grad():
            order = ctx.loss_of(ctx.task.train, reduction="none").argsort()
        places = torch.linspace(0, len(order) - 1, self.per_task).long()
        self.rows += [ctx.task.train[i] for i in order[places]]

    def state_dict(self):
        """All that it holds."""
        return {"rows": pack(self.rows)}

    def load_state_dict(self, state):
        """Hold what was saved."""
        self.rows = unpack(state["rows"])


def rows(task: int, count: int, seed: int) -> list[tuple[torch.Tensor, int]]:
    """Points of the upper half of a circle, then of the lower: which of the two quarters?"""
    rng = torch.Generator().manual_seed(10 * task + seed)
    angle = torch.pi * (torch.rand(count, generator=rng) + task)
    points = torch.stack([angle.cos(), angle.sin()], dim=1)
    return [(point, int(point.prod() > 0)) for point in points]


def main() -> None:
    """Two tasks, without and with it."""
    print("accuracy   first task   after the second   second task")
    for strategy in (Naive(), Spread(per_task=10)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2))
        trainer = ContinualTrainer(model, strategy, {"optimizer": {"type": "adam", "lr": 0.01}})
        for task in range(2):
            trainer.train_task(rows(task, 300, seed=0), rows(task, 100, seed=1), task_id=task, num_epochs=15)
        R = trainer.scores.values  # row i: after task i; column i: of task i
        print(f"{strategy.name:8}{R[1, 0]:13.2f}{R[2, 0]:19.2f}{R[2, 1]:14.2f}")


if __name__ == "__main__":
    main()
