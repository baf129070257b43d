"""Causal attention that is fast in bf16 on a processor, where PyTorch's own is made for long sequences.

For rows of a few hundred tokens the scores in bands of queries, each as two batched products with a softmax
between, are faster. Everything else goes to PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "perdure_sdpa"
MOST_SCORES = 1 << 25  # of a layer; beyond them the matrix costs more than it saves
CACHED_SCORES = 1 << 22
BAND = 128  # queries that go together: of fewer the products are slow, of more most scores are of what is to come
OTHERS = (
    "position_bias",
    "softcap",
    "s_aux",
    "cache",
)  # what some models add to the scores, which is not done here


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of Transformers: query [B, H, T, D], key and value [B, H/g, S, D] -> [B, T, H, D].

    Under bf16 on a CPU, without a mask, it is softmax(QKᵀ·scaling)V over the positions up to a row's own, with
    scores in bf16; else PyTorch's, for a token that is being generated without a copy of the keys for every head,
    and Transformers' own way to it for the rest.
    """
    if _dense(module, query, key, attention_mask, options):
        return _causal(query, key, value, options.get("scaling")), None
    if _single(query, key, attention_mask, options):
        return _grouped(query, key, value, options.get("scaling")), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


def _dense(module: Any, query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> bool:
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    return (
        query.device.type == "cpu"
        and _in_bf16(query)
        and mask is None
        and bool(causal)
        and not options.get("dropout")
        and all(options.get(name) is None for name in OTHERS)
        and 1 < query.shape[2] == key.shape[2]
        and len(query) == len(key)
        and query.shape[0 if torch.is_grad_enabled() else 1 : 3].numel() * key.shape[2] <= MOST_SCORES
    )


def _single(query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> bool:
    return (
        query.device.type == "cpu"
        and query.shape[2] == 1
        and len(query) == len(key)
        and mask is None
        and not options.get("dropout")
        and all(options.get(name) is None for name in OTHERS)
    )


def _in_bf16(query: Tensor) -> bool:
    mixed = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    return mixed or query.dtype == torch.bfloat16


def _grouped(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One query a head: those of the heads that share their keys stand as rows of one matrix.

    Transformers does so itself where there is a mask.
    """
    batch, heads, _, width = query.shape
    asked = query.reshape(batch, key.shape[1], -1, width)
    return F.scaled_dot_product_attention(asked, key, value, scale=scaling).reshape(batch, 1, heads, -1)


def _causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    if torch.is_grad_enabled():
        return _banded(query, key, value, scaling)
    # Nothing is kept for a backward pass: some rows at a time, whose scores stay in the processor's cache.
    rows = max(1, CACHED_SCORES // (query.shape[1] * query.shape[2] ** 2))
    parts = zip(query.split(rows), key.split(rows), value.split(rows), strict=True)
    return torch.cat([_banded(q, k, v, scaling) for q, k, v in parts])


def _banded(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    batch, heads, length, width = query.shape
    groups = heads // key.shape[1]
    q, k, v = (
        x.to(torch.bfloat16).repeat_interleave(repeats, 1).reshape(batch * heads, length, -1)
        for x, repeats in ((query, 1), (key, groups), (value, groups))
    )
    scale = width**-0.5 if scaling is None else scaling
    found = [_band(q, k, v, start, scale) for start in range(0, length, BAND)]
    return torch.cat(found, 1).view(batch, heads, length, -1).transpose(1, 2).contiguous()


def _band(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float) -> Tensor:
    """The answers to a band of queries, [B·H, t, D], which look at no position after its last."""
    asked = q[:, start : start + BAND]
    end = start + asked.shape[1]
    later = torch.full((end - start, end), float("-inf"), dtype=q.dtype).triu(start + 1)
    scores = torch.baddbmm(later.expand(len(q), -1, -1), asked, k[:, :end].transpose(1, 2), alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), v[:, :end])


def use(model: Any) -> None:
    """Let a Transformers model attend this way, where it would go through PyTorch's function."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
    except ValueError:  # an architecture with attention of its own
        model.set_attn_implementation("sdpa")
