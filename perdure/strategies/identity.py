"""Which task a row belongs to, where nobody tells: the rule that strategies with a part for each task share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError, StrategyError, unknown_name
from perdure.types import IGNORE, Batch, Objective, Output

Forward = Callable[[nn.Module, Batch], Output]
Rule = Literal["nearest", "surest"]


def check_rule(strategy: str, rule: str) -> Rule:
    """The rule of that name by which tasks are inferred; StrategyError where there is none."""
    if rule not in get_args(Rule):
        raise StrategyError(f"{strategy}: {unknown_name('infer', rule, get_args(Rule))}")
    return cast(Rule, rule)


def by_task(batch: Batch) -> dict[str, list[int]]:
    """Positions of the batch's rows by task, in the order in which the tasks are met."""
    found: dict[str, list[int]] = {}
    for place, row in enumerate(batch.examples):
        found.setdefault(row.task, []).append(place)
    return found


def rows_of(batch: Batch, places: Sequence[int]) -> Batch:
    """The batch of some of its rows; inputs are tensors [B, ...] or mappings of such."""
    index = torch.as_tensor(places, device=batch.y.device)
    x = batch.x[index] if isinstance(batch.x, Tensor) else {name: value[index] for name, value in batch.x.items()}
    share = len(places) * batch.tokens // len(batch.examples)
    return Batch(
        tuple(batch.examples[i] for i in places), x, batch.y[index], tuple(batch.counts[i] for i in places), share
    )


def forward_by_task(batch: Batch, forward: Callable[[str, Batch], Tensor]) -> Output:
    """Each task's rows through its own forward pass, (task, rows) -> logits, put together in the batch's order."""
    groups = by_task(batch)
    if len(groups) == 1:
        return Output(forward(next(iter(groups)), batch))
    parts = [forward(task, rows_of(batch, places)) for task, places in groups.items()]
    order = torch.tensor([place for places in groups.values() for place in places], device=parts[0].device)
    return Output(torch.cat(parts)[order.argsort()])


def surest(
    forward: Forward, model: nn.Module, batch: Batch, tasks: Sequence[str], objective: Objective
) -> list[str]:
    """For each row the task under which the model is surest: the lowest entropy of its first prediction.

    That is the distribution over classes, or that of the first answer token, which follows the last token of the
    prompt. Labels are not looked at, other than to see where a prompt ends. Of equals the earliest task is taken.

    Args:
        forward: the strategy's forward pass, which reads a row's task.
        model: in eval mode.
        batch: rows; their own task is ignored.
        tasks: those to choose from; with none, it is "".
        objective: "classification" or "causal_lm".

    Raises:
        ConfigError: a regression, whose predictions say nothing of how sure they are.
    """
    if objective == "regression":
        raise ConfigError(
            "a regression gives no probabilities by which a row's task could be inferred: say it (task_id), or let "
            'the strategy infer by what is "nearest"'
        )
    if not tasks:
        return ["" for _ in batch.examples]
    found: list[Tensor] = []
    with torch.no_grad():
        for task in tasks:
            told = Batch(tuple(row.but(task=task) for row in batch.examples), batch.x, batch.y, batch.counts, 0)
            found.append(_entropy(forward(model, told).logits, batch, objective))
    return [tasks[i] for i in torch.stack(found).argmin(0).tolist()]


def _entropy(logits: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Of the first prediction of each row, in nats: [B]."""
    if objective == "causal_lm":
        logits = logits[torch.arange(len(logits), device=logits.device), prompt_ends(batch).to(logits.device)]
    logs = logits.float().flatten(1).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def prompt_ends(batch: Batch) -> Tensor:
    """Of causal-LM rows, the position of the last token before the first that is learnt: int64 [B].

    A row without any ends with its prompt; one that is learnt from its first token on has that as its prompt.
    """
    learnt = batch.y != IGNORE
    lengths = torch.tensor(
        [len(row.x) if row.x is not None else 1 for row in batch.examples], device=batch.y.device
    )
    first = torch.where(learnt.any(1), learnt.int().argmax(1), lengths)
    return (first - 1).clamp(min=0)
