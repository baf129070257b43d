"""Prompts with keys for a frozen causal language model: what they are, and a forward pass behind them.

Knows nothing of tasks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.models.modes import looking

Keys = Literal["vocabulary", "uniform"]
NAME = "prompt_pool"  # of the module within the model, and of its file
DRAWN = 16  # tokens of which the query that a key starts from is taken


class Prompts(nn.Module):
    """M prompts of P virtual tokens, and a key for each.

    Each is a parameter of its own: one that no row of a step was given has no gradient there, so that neither
    weight decay nor the optimizer's moments move it.

    Args:
        keys: [M, Q], Q the size of a query.
        prompts: embeddings [M, P, D]; or keys and values at every layer of the model [M, 2·L, H, P, D/H].
    """

    def __init__(self, keys: Tensor, prompts: Tensor) -> None:
        super().__init__()
        self.keys = nn.ParameterList(nn.Parameter(key.clone()) for key in keys)
        self.prompts = nn.ParameterList(nn.Parameter(prompt.clone()) for prompt in prompts)
        self.deep = prompts.dim() == 5

    def distances(self, queries: Tensor) -> Tensor:
        """1 − cos of each query [B, Q] and each key: [B, M], without gradients."""
        # In bf16 1 − cos has steps of 1/256 where it matters, and ties would choose.
        with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):
            keys = torch.stack(list(self.keys)).to(queries.dtype)
            return 1 - F.normalize(queries, dim=-1) @ F.normalize(keys, dim=-1).T

    def pull(self, queries: Tensor, chosen: Tensor) -> Tensor:
        """Σ (1 − cos(key, query)) over each row's prompts [B, N]: [B], with gradients for their keys alone."""
        keys = _picked(self.keys, chosen).to(queries.dtype)  # [B, N, Q]
        return (1 - F.cosine_similarity(keys, queries[:, None], dim=-1)).sum(-1)

    def logits(self, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
        """The model's logits of each row [B, T] behind its prompts [B, N], in the order given: [B, T, V]."""
        own = _picked(self.prompts, chosen)  # [B, N, P, D] or [B, N, 2·L, H, P, D/H]
        if not self.deep:
            embedded = model.get_input_embeddings()(ids)
            before = own.flatten(1, 2).to(embedded.dtype)
            logits: Tensor = model(inputs_embeds=torch.cat([before, embedded], 1), use_cache=False).logits
            return logits[:, before.shape[1] :]
        from transformers import DynamicCache

        cache = DynamicCache()
        pairs = own.movedim(1, 3).flatten(3, 4)  # [B, 2·L, H, N·P, D/H]
        for layer in range(pairs.shape[1] // 2):
            cache.update(pairs[:, 2 * layer], pairs[:, 2 * layer + 1], layer)
        behind: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        return behind


def _picked(parameters: nn.ParameterList, chosen: Tensor) -> Tensor:
    """The parameters of each row, [B, N, ...]; those that no row has stay out of the graph."""
    used, places = chosen.unique(return_inverse=True)
    return torch.stack([parameters[i] for i in used.tolist()])[places]


def draw(model: Any, size: int, length: int, deep: bool, keys: Keys, rng: torch.Generator) -> Prompts:
    """Prompts that start as tokens drawn from the vocabulary.

    Args:
        model: a Hugging Face causal LM.
        size: M.
        length: P.
        deep: what the model itself keeps of these tokens at every layer, in place of their embeddings.
        keys: "vocabulary": the queries of other tokens drawn; "uniform": numbers drawn between -1 and 1.
        rng: all draws come from it; on the CPU.
    """
    words = model.get_input_embeddings()
    device, count = words.weight.device, words.weight.shape[0]
    ids = torch.randint(count, (size, length), generator=rng).to(device)
    others = torch.randint(count, (size, DRAWN), generator=rng).to(device)
    start = queries(model, others, torch.full((size,), DRAWN - 1, device=device))
    if keys == "uniform":
        start = 2 * torch.rand(start.shape, generator=rng, dtype=start.dtype).to(device) - 1
    with looking(model):
        if deep:
            layers = model(input_ids=ids, use_cache=True).past_key_values.layers
            prompts = torch.stack([kept for layer in layers for kept in (layer.keys, layer.values)], 1)
        else:
            prompts = words(ids)
    return Prompts(start, prompts)


def queries(model: Any, ids: Tensor, ends: Tensor) -> Tensor:
    """The mean of the last hidden states over positions 0 to `ends`: [B, Q], in eval mode without gradients.

    What stands after the longest prompt is not looked at, and causality keeps a row's prompt from what follows it.

    Args:
        model: a Hugging Face causal LM; it is called without any prompts.
        ids: token ids, int64 [B, T], padded on the right.
        ends: the last position of each row's prompt, int64 [B].
    """
    with looking(model):
        width = int(ends.max()) + 1
        hidden = model.base_model(input_ids=ids[:, :width], use_cache=False).last_hidden_state  # [B, W, Q]
        hidden = hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) else hidden
        inside = torch.arange(width, device=ids.device) <= ends[:, None]
        return (hidden * inside[..., None]).sum(1) / (ends + 1)[:, None]


def nearest(distances: Tensor, top: int, uses: Tensor | None = None) -> Tensor:
    """The `top` least distances of each row [B, M], as ascending positions: int64 [B, top].

    Of equal ones the first count. With `uses` [M], each distance is multiplied by its share of them first; of those
    that then are 0 the nearest count.
    """
    order = distances.argsort(dim=1, stable=True)
    if uses is not None:
        shares = (uses / uses.sum())[: distances.shape[1]]
        order = order.gather(1, (distances * shares).gather(1, order).argsort(dim=1, stable=True))
    return order[:, :top].sort(dim=1).values


def deep_enough(model: Any) -> bool:
    """Whether every layer of the model keeps the keys and values of all tokens, and nothing else."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def save(model: Any, folder: Path, facts: dict[str, Any]) -> None:
    """The model as it was before prompts were put into it, and beside it these in a file, and facts in another."""
    pool = model._modules.pop(NAME)
    try:
        model.save_pretrained(folder)
    finally:
        model.add_module(NAME, pool)
    values = {"keys": torch.stack(list(pool.keys)), "prompts": torch.stack(list(pool.prompts))}
    save_file(
        {name: v.detach().cpu().contiguous() for name, v in values.items()}, Path(folder) / f"{NAME}.safetensors"
    )
    text = json.dumps({"format": 1, **facts}, indent=2) + "\n"
    (Path(folder) / f"{NAME}.json").write_text(text, encoding="utf-8")


def put_back(model: Any, folder: Path) -> dict[str, Any]:
    """Put the prompts that `save` wrote into a model, freeze it, and return the facts."""
    facts: dict[str, Any] = json.loads((folder / f"{NAME}.json").read_text(encoding="utf-8"))
    values = load_file(folder / f"{NAME}.safetensors")
    model.requires_grad_(False)
    words = model.get_input_embeddings().weight
    model.add_module(NAME, Prompts(values["keys"], values["prompts"]).to(words.device))
    return facts
