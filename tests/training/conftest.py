"""Tasks that turn their classes round, and trainers to put through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perdure import ContinualTrainer


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
