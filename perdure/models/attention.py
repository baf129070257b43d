"""Attention that is fast in bf16 on a processor, where PyTorch's own is made for long sequences.

For rows of a few hundred tokens two batched products with a softmax between are faster: causal ones in bands of
queries, those under a mask at once, with dropout whose mask is cheap. Everything else goes to PyTorch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from perdure.models.dropout import drop

NAME = "perdure_sdpa"
_COMPARED = re.compile(r"_attn_implementation\s*(==|!=|in\b|not\b)")
_SDPA = re.compile(r"([\"'])sdpa\1")
MOST_SCORES = 1 << 25  # of a layer; beyond them the matrix costs more than it saves
CACHED_SCORES = 1 << 22
LARGE = 8.0  # of a number of a key: less, taken off, would cost more in rounding than it saves
BAND = 128  # queries that go together: of fewer the products are slow, of more most scores are of what is to come
# What some models add to the scores, or choose keys by, which is not done here.
OTHERS = ("position_bias", "softcap", "s_aux", "cache", "indices", "block_indices")


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of Transformers: query [B, H, T, D], key and value [B, H/g, S, D] -> [B, T, H, D].

    Under bf16 on a CPU it is softmax(QKᵀ·scaling)V: without a mask over the positions up to a row's own, or over
    all where the model is not causal; under a mask that all heads share, true where a query sees a key, over what
    that lets through. Scores are rounded to bf16, as in Transformers' own "eager": where they differ by much (more
    than 30) that costs more than PyTorch, which keeps them in fp32. A query that sees no key gets the values' mean.
    Else it is PyTorch's, for a token that is being generated without a copy of the keys for every head, and
    Transformers' own way to it for the rest. Of large batches that is so with gradients only, so that the same rows
    may differ between both as bf16 rounds.
    """
    if _dense(query, key, attention_mask, options):
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        rule = _banded if causal and attention_mask is None else _whole
        scaling, dropout = options.get("scaling"), options.get("dropout") or 0.0
        return _in_parts(rule, query, key, value, attention_mask, scaling, dropout), None
    if _single(query, key, attention_mask, options):
        return _grouped(query, key, value, options.get("scaling")), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, **options
    )
    return found


def _dense(query: Tensor, key: Tensor, mask: Tensor | None, options: Any) -> bool:
    return (
        query.device.type == "cpu"
        and _in_bf16(query)
        and (mask is None or _shared(mask, query, key))
        and all(options.get(name) is None for name in OTHERS)
        and 1 < query.shape[2] == key.shape[2]
        and len(query) == len(key)
        and query.shape[0 if _at_once(options) else 1 : 3].numel() * key.shape[2] <= MOST_SCORES
    )


def _at_once(options: Any) -> bool:
    """Whether all rows go together: their scores are kept for a backward pass, or dropped in one order of draws."""
    return torch.is_grad_enabled() or bool(options.get("dropout"))


def _shared(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Whether a mask is [B or 1, 1, T, S]: one for all heads."""
    return (
        mask.dim() == 4
        and mask.shape[0] in (1, len(query))
        and mask.shape[1:] == (1, query.shape[2], key.shape[2])
        and mask.dtype == torch.bool  # what is added to scores may be more than a mask
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
    return (mixed and query.dtype != torch.float64) or query.dtype == torch.bfloat16


def _grouped(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """One query a head: those of the heads that share their keys stand as rows of one matrix.

    Transformers does so itself where there is a mask.
    """
    batch, heads, _, width = query.shape
    asked = query.reshape(batch, key.shape[1], -1, width)
    return F.scaled_dot_product_attention(asked, key, value, scale=scaling).reshape(batch, 1, heads, -1)


def _in_parts(
    rule: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    rows = len(query)
    if not torch.is_grad_enabled() and not dropout:
        # Nothing is kept for a backward pass: some rows at a time, whose scores stay in the processor's cache. Not
        # where draws would come in another order than with gradients.
        rows = max(1, CACHED_SCORES // (query.shape[1] * query.shape[2] ** 2))
    masks = [mask] * len(query) if mask is None or len(mask) == 1 else mask.split(rows)
    parts = zip(query.split(rows), key.split(rows), value.split(rows), masks, strict=False)
    found = [rule(q, k, v, m, scaling, dropout) for q, k, v, m in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _centred(key: Tensor, mask: Tensor | None) -> Tensor:
    """The keys less what all of them share, as the first two tell, where that is large (a bias, in some models).

    It adds the same to all scores of a query, which the softmax takes away again, but not what they were rounded
    by. One key alone may be an outlier; keys that a row's last query does not see are padding, of which there may
    be two. A bias that positions turn quickly is not shared by the keys, and stays.
    """
    first, second = key[:, :, :1].detach(), key[:, :, 1:2].detach()
    least = torch.where(first.abs() < second.abs(), first, second)
    shared = (first * second > 0) & (least.abs() > LARGE)
    if mask is not None:
        shared = shared & mask[:, :, -1:, :2].all(-1, keepdim=True)
    return key - torch.where(shared, least, 0.0)


def _matrices(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Each head of each row for itself: [B·H, T, D], in bf16."""
    batch, heads, length, _ = query.shape
    key = _centred(key, mask)
    groups = heads // key.shape[1]
    q, k, v = (
        x.to(torch.bfloat16).repeat_interleave(repeats, 1).reshape(batch * heads, length, -1)
        for x, repeats in ((query, 1), (key, groups), (value, groups))
    )
    return q, k, v


def _rows(found: Tensor, batch: int) -> Tensor:
    """[B·H, T, D] -> [B, T, H, D]."""
    return found.view(batch, -1, *found.shape[1:]).transpose(1, 2).contiguous()


def _banded(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """Causal attention: each query sees the positions up to its own."""
    q, k, v = _matrices(query, key, value, None)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    found = [_band(q, k, v, start, scale, dropout) for start in range(0, query.shape[2], BAND)]
    return _rows(torch.cat(found, 1), len(query))


def _band(q: Tensor, k: Tensor, v: Tensor, start: int, scale: float, dropout: float) -> Tensor:
    """The answers to a band of queries, [B·H, t, D], which look at no position after its last."""
    asked = q[:, start : start + BAND]
    end = start + asked.shape[1]
    later = torch.full((end - start, end), float("-inf"), dtype=q.dtype, device=q.device).triu(start + 1)
    scores = torch.baddbmm(later.expand(len(q), -1, -1), asked, k[:, :end].transpose(1, 2), alpha=scale)
    return torch.bmm(drop(torch.softmax(scores, -1), dropout), v[:, :end])


def _whole(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, dropout: float
) -> Tensor:
    """Attention to whatever the mask lets through, or to all positions; weights are dropped after the softmax."""
    batch, heads, length, width = query.shape
    q, k, v = _matrices(query, key, value, mask)
    # Nothing that is infinite, so that a query that sees no key is not nan.
    seen = q.new_zeros(1) if mask is None else mask.logical_not().to(q.dtype) * torch.finfo(q.dtype).min
    scale = width**-0.5 if scaling is None else scaling
    scores = torch.baddbmm(
        seen.expand(batch, heads, length, length).reshape(-1, length, length), q, k.transpose(1, 2), alpha=scale
    )
    return _rows(torch.bmm(drop(torch.softmax(scores, -1), dropout), v), batch)


def use(model: Any) -> None:
    """Let a Transformers model attend this way, where all of it goes through PyTorch's function."""
    from transformers import AttentionInterface, PreTrainedModel
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if not all(_can_change(part) for part in model.modules() if isinstance(part, PreTrainedModel)):
        return
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _can_change(part: Any) -> bool:
    """Whether a model's attention is PyTorch's, can be changed, and nothing else of it goes by that name.

    Some architectures make their masks, or choose the keys of a query, only where the implementation is called
    "sdpa"; under another name they would attend to everything, without a word.
    """
    if part.config._attn_implementation != "sdpa" or not part._can_set_attn_implementation():
        return False
    from transformers import PreTrainedModel

    kinds = [
        kind for kind in type(part).__mro__ if issubclass(kind, PreTrainedModel) and kind is not PreTrainedModel
    ]
    codes = [inspect.getsource(module) for module in {inspect.getmodule(kind) for kind in kinds} if module]
    return not any(_COMPARED.search(code) and _SDPA.search(code) for code in codes)
