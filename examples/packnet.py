"""PackNet on four small image tasks in one network, beside naive training at equal steps.

Every task has four patterns of 12 by 12 pixels, one a class; an image is its pattern, moved by up to two pixels
each way, under noise. All tasks use the same four outputs. PackNet is told the task of an image, or works it out.
Two figures are drawn: packnet_parameter_usage.png, who owns the weights of each layer, and
packnet_task_accuracies.png, each task over time.
"""

from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from perdure import ContinualTrainer
from perdure.report import plots, read_runs
from perdure.report.usage import usage_figure

TASKS, CLASSES, SIZE = 4, 4, 12
CONFIG = {"optimizer": {"type": "adam", "lr": 0.001}}
PACKNET = {
    "packnet": {
        "enabled": True,
        "prune_percentage": 0.75,  # 75% of weights pruned per task
        "use_magnitude_pruning": True,
    }
}
# PackNet retrains for half as many epochs again, so that naive gets 12 for its 8.
RUNS = {"naive": ({}, 12), "packnet": (PACKNET, 8)}


def images(task: int, count: int, seed: int) -> TensorDataset:
    """Moved and noisy patterns [count, 1, 12, 12] of a task, and their classes [count]."""
    patterns = torch.randn(CLASSES, 1, 5, 5, generator=torch.Generator().manual_seed(task))
    patterns = nn.functional.interpolate(patterns, size=SIZE, mode="bicubic")
    rng = torch.Generator().manual_seed(100 * task + seed)
    classes = torch.randint(0, CLASSES, (count,), generator=rng)
    moves = torch.randint(-2, 3, (count, 2), generator=rng).tolist()
    moved = [
        patterns[k].roll((down, right), (1, 2)) for k, (down, right) in zip(classes.tolist(), moves, strict=True)
    ]
    return TensorDataset(torch.stack(moved) + 0.5 * torch.randn(count, 1, SIZE, SIZE, generator=rng), classes)


def network() -> nn.Module:
    """Two convolutions and two linear layers: images [B, 1, 12, 12] to logits [B, 4]."""
    torch.manual_seed(0)
    layers = {
        "conv_1": nn.Conv2d(1, 16, 3, padding=1), "relu_1": nn.ReLU(), "pool_1": nn.MaxPool2d(2),
        "conv_2": nn.Conv2d(16, 32, 3, padding=1), "relu_2": nn.ReLU(), "pool_2": nn.MaxPool2d(2),
        "flat": nn.Flatten(), "hidden": nn.Linear(288, 64), "relu_3": nn.ReLU(), "output": nn.Linear(64, CLASSES),
    }  # fmt: skip
    return nn.Sequential(OrderedDict(layers))


def main() -> None:
    """Train with both, print the accuracies in the end, and draw."""
    task_data = [
        (
            DataLoader(images(task, 400, seed=0), batch_size=32, shuffle=True),
            DataLoader(images(task, 200, seed=1), batch_size=200),
        )
        for task in range(TASKS)
    ]
    trainers = {}
    with TemporaryDirectory() as folder:
        for name, (strategy, num_epochs) in RUNS.items():
            trainer = ContinualTrainer(
                network(), config={**CONFIG, "continual_strategy": strategy}, output_dir=Path(folder) / name
            )
            for task_id, (train_loader, val_loader) in enumerate(task_data):
                trainer.train_task(train_loader, val_loader, task_id, f"task_{task_id}", num_epochs)
            trainers[name] = trainer
        figure = plots.curves(read_runs([Path(folder) / name for name in ("packnet", "naive")]), "accuracy")
    Path("packnet_task_accuracies.png").write_bytes(figure)
    packed = trainers["packnet"]
    Path("packnet_parameter_usage.png").write_bytes(usage_figure(packed.strategy.usage(packed.model)))

    matrices = {
        "naive": trainers["naive"].scores,
        "packnet, told": packed.scores,
        "packnet, inferred": packed.matrices["accuracy_inferred"],
    }
    print("accuracy in the end  " + "".join(f"{name:>8}" for name in packed.tasks) + "   average  forgetting")
    for name, matrix in matrices.items():
        summary = matrix.summary()
        last = "".join(f"{score:8.2f}" for score in matrix.values[-1])
        print(f"{name:21}{last}{summary['average']:10.2f}{summary['forgetting']:12.2f}")


if __name__ == "__main__":
    main()
