"""Greedy generation in batches, equal to one by one.

The loop is our own because a model's generation defaults (repetition penalty, forced tokens, several end tokens)
reach into the library's generate even where sampling is off; here the next token is the arg max, and nothing else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from perdure.evaluation.score import evaluating
from perdure.models.adapters import soft_prompt
from perdure.types import IGNORE, Batch, Example, Output


def generate(
    model: Any,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    end: int,
    batch_size: int = 64,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    max_length: int | None = None,
) -> list[list[int]]:
    """The greedy continuation of each prompt, up to but without the end token.

    Args:
        model: a Hugging Face causal LM or a PEFT model of one.
        prompts: token ids, int64 [T_i] each, at least one token.
        max_new_tokens: tokens generated at most.
        end: id of the token that ends an answer.
        batch_size: prompts that go together; those of like length do.
        autocast: context of the forward passes.
        max_length: tokens at most of prompt and answer together, for a model whose positions end there; those of a
            soft prompt are not counted.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model), autocast():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            for i, tokens in zip(
                chosen, _batch(model, [prompts[i] for i in chosen], max_new_tokens, end, max_length), strict=True
            ):
                answers[i] = tokens
    return answers


def _batch(
    model: Any, prompts: Sequence[Tensor], max_new_tokens: int, end: int, max_length: int | None
) -> list[list[int]]:
    from perdure.evaluation.cache import give_room, rows_can_leave

    device = next(model.parameters()).device
    soft = soft_prompt(model)
    virtual = 0 if soft is None else len(soft)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    width = virtual + int(lengths.max())
    # Left padding, before a soft prompt too, with positions that count real tokens only: a padded row then gives
    # what it would give alone.
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
    place = torch.arange(width) - (width - virtual - lengths[:, None])  # [B, W]: negative where padded
    ids, place, lengths = ids.to(device), place.to(device), lengths.to(device)
    mask = (place >= 0).long()
    positions = place.clamp(min=0)
    options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
    inputs = {"input_ids": ids}
    if soft is not None:
        # PEFT's own forward would put the soft prompt before the padding, and drops the positions.
        model = model.get_base_model()
        embedded = model.get_input_embeddings()(ids)  # [B, W, D]
        embedded[(place >= 0) & (place < virtual)] = soft.to(embedded.dtype).repeat(len(prompts), 1)
        inputs = {"inputs_embeds": embedded}
    cache = None
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    limit = max_length if max_length is not None else width + max_new_tokens
    room = limit - lengths  # [B]
    done |= room <= 0
    produced = torch.full((len(prompts), max_new_tokens), end, device=device)
    open_ = torch.arange(len(prompts), device=device)  # the prompts that the rows still belong to
    for step in range(max_new_tokens):
        output = model(
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            **inputs,
            **options,
        )
        if cache is None:
            give_room(output.past_key_values)
        cache = output.past_key_values
        token = output.logits[:, -1].argmax(-1)  # [B]
        token = torch.where(done, end, token)
        produced[open_, step] = token
        done |= (token == end) | (room <= step + 1)
        left = len(done) - int(done.sum())
        if not left:
            break
        positions = positions[:, -1:] + 1
        if 2 * left <= len(done) and rows_can_leave(cache):
            # Rows that are done would cost as much as the others to the end of the longest answer.
            keep = (~done).nonzero().flatten()
            cache.batch_select_indices(keep)
            token, mask, positions, room, open_, done = (
                value[keep] for value in (token, mask, positions, room, open_, done)
            )
        inputs = {"input_ids": token[:, None]}
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions.clamp(max=virtual + limit - 1)  # of rows that are done
    return [row[: row.index(end)] if end in row else row for row in produced.tolist()]


def generate_through(
    forward: Callable[[Any, Batch], Output],
    collate: Callable[[Sequence[Example]], Batch],
    model: Any,
    prompts: Sequence[Example],
    max_new_tokens: int,
    end: int,
    batch_size: int = 64,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    max_length: int | None = None,
) -> list[list[int]]:
    """As `generate`, through a forward pass of a strategy's own: no cache is kept, and every token costs a pass.

    Args:
        forward: (model, batch) -> logits [B, T, V].
        collate: rows to a batch, padded on the right.
        model: what `forward` is given.
        prompts: rows whose x is the prompt; tokens generated so far follow it, as labels too.
        max_new_tokens: as in `generate`, like the rest.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = sorted(range(len(prompts)), key=lambda i: len(ids_of(prompts[i])))
    with evaluating(model), autocast():
        for start in range(0, len(waiting), batch_size):
            open_ = waiting[start : start + batch_size]
            for _ in range(max_new_tokens):
                open_ = [
                    i for i in open_ if max_length is None or len(ids_of(prompts[i])) + len(answers[i]) < max_length
                ]
                if not open_:
                    break
                rows = [_continued(prompts[i], answers[i]) for i in open_]
                logits = forward(model, collate(rows)).logits
                last = torch.tensor([len(ids_of(row)) - 1 for row in rows], device=logits.device)
                tokens = logits[torch.arange(len(rows), device=logits.device), last].argmax(-1).tolist()
                for i, token in zip(open_, tokens, strict=True):
                    if token != end:
                        answers[i].append(token)
                open_ = [i for i, token in zip(open_, tokens, strict=True) if token != end]
    return answers


def ids_of(row: Example) -> Tensor:
    """The row's token ids, int64 [T]."""
    assert row.x is not None, "encode the row first"
    return row.x


def _continued(prompt: Example, answer: Sequence[int]) -> Example:
    ids = ids_of(prompt)
    more = torch.tensor(answer, dtype=ids.dtype)
    return prompt.but(x=torch.cat([ids, more]), y=torch.cat([torch.full_like(ids, IGNORE), more]))


def _keeps_logits(model: Any) -> bool:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters
