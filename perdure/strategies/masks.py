"""Owner maps: which weights can be packed, who owns each, and a model that shows one task's share of them.

An owner map is a uint8 tensor of its parameter's shape: 0 is free, k belongs to the k-th task.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perdure.errors import ModelError, StrategyError, unknown_name
from perdure.storage import write_json

OWNERS, START, FACTS = "packnet.safetensors", "packnet-start.safetensors", "packnet.json"
HOW = (
    f"{OWNERS} holds for each packed parameter, by name, an array of its shape: 0 where no task owns the weight, k "
    "where tasks[k - 1] does. In the network of tasks[k - 1] each weight with 0 or more than k is zero, or where "
    f"there is a {START}, what that has."
)
_LAYERS = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def packable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights of linear, convolution, recurrent and attention layers by name, tied ones once.

    Biases are none of them, nor are weights that an embedding shares.
    """
    layers: set[nn.Parameter] = set()
    embeddings: set[nn.Parameter] = set()
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            embeddings.update(own.values())
        elif (
            isinstance(module, _LAYERS) or type(module).__name__ == "Conv1D"
        ):  # Transformers' linear layer of GPT-2
            layers.update(p for name, p in own.items() if p.dim() > 1 and "bias" not in name)
    return {n: p for n, p in model.named_parameters() if p.requires_grad and p in layers and p not in embeddings}


def prune(owner: Tensor, score: Tensor, share: float, task: int) -> Tensor:
    """The owner map after a task has taken the best of the free weights.

    Args:
        owner: uint8, before.
        score: of each weight, of the same shape.
        share: of the n free weights the ⌊share · n⌋ of lowest score stay free; of equals, the first.
        task: its number, from 1.
    """
    free = (owner.flatten() == 0).nonzero().flatten()
    # As a float, 0.29 of 100 weights is less than 29.
    pruned = int(Fraction(repr(share)) * len(free))
    order = score.flatten()[free].argsort(stable=True)
    after = owner.flatten().clone()
    after[free[order[pruned:]]] = task
    return after.view(owner.shape)


@contextmanager
def masked(
    weights: Mapping[str, nn.Parameter], owners: Mapping[str, Tensor], task: int, start: Mapping[str, Tensor]
) -> Iterator[None]:
    """For a while, zero or the start's value in place of every weight that none of the first `task` tasks owns.

    The values themselves are set aside and come back as they were. No gradient may be taken through it.
    """
    aside = {name: p.data for name, p in weights.items()}
    try:
        for name, p in weights.items():
            p.data = shown(p.data, owners[name], task, start.get(name))
        # Autocast keeps a parameter's cast by the parameter, whose values are others now.
        torch.clear_autocast_cache()
        yield
    finally:
        for name, p in weights.items():
            p.data = aside[name]
        torch.clear_autocast_cache()


def shown(values: Tensor, owner: Tensor, task: int, start: Tensor | None = None) -> Tensor:
    """The values that one of the first `task` tasks owns, and zero or the start's in place of the others."""
    owned = (owner > 0) & (owner <= task)
    return torch.where(owned, values, 0 if start is None else start)


def write_masks(folder: Path, owners: Mapping[str, Tensor], tasks: list[str], start: Mapping[str, Tensor]) -> None:
    """Owner maps, the tasks' names in order, and any start, beside a model that was saved in the folder."""
    for name, tensors in ((OWNERS, owners), (START, start)):
        if tensors:
            save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, folder / name)
    write_json(folder / FACTS, {"format": 1, "tasks": tasks, "how": HOW})


def apply_mask(model: nn.Module, folder: str | Path, task: str) -> Any:
    """Make a model that was loaded from a folder answer for one of its tasks, for good.

    Args:
        model: with the folder's weights: of a language model what `from_pretrained` gives.
        folder: that PackNet was exported to.
        task: a name out of the folder's packnet.json.

    Returns:
        The model itself.

    Raises:
        ModelError: the folder holds no masks, or those of another model.
        StrategyError: no task of that name.
    """
    folder = Path(folder)
    if not (folder / FACTS).is_file() or not (folder / OWNERS).is_file():
        raise ModelError(f"{folder}: holds no {FACTS} and {OWNERS}; give the folder that packnet was exported to")
    tasks = json.loads((folder / FACTS).read_text(encoding="utf-8"))["tasks"]
    if task not in tasks:
        raise StrategyError(f"packnet: {unknown_name('task', task, tasks)}")
    owners = load_file(folder / OWNERS)
    start = load_file(folder / START) if (folder / START).is_file() else {}
    own = dict(model.named_parameters())
    for name, owner in owners.items():
        if name not in own or own[name].shape != owner.shape:
            raise ModelError(
                f"{folder}: its masks are of another model: this one has no {name} of {list(owner.shape)}"
            )
    with torch.no_grad():
        for name, owner in owners.items():
            own[name].copy_(shown(own[name].cpu(), owner, tasks.index(task) + 1, start.get(name)))
    return model
