"""From examples to a batch, through the model, to the loss: once for each objective.

Knows nothing of strategies or of the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from perdure.errors import ConfigError, unknown_name
from perdure.types import IGNORE, Batch, Example, Objective, Output

OBJECTIVES: tuple[Objective, ...] = ("classification", "causal_lm", "regression")
# Stands where a row of tokens has ended, in batches for models that are no causal LMs; no token has this id.
PAD = -1


def check_objective(name: str) -> Objective:
    """The objective of that name; ConfigError lists the known ones."""
    if name not in OBJECTIVES:
        raise ConfigError(unknown_name("objective", name, OBJECTIVES))
    return name


def collate(examples: Sequence[Example], objective: Objective, device: torch.device | str = "cpu") -> Batch:
    """Pad and stack examples.

    Causal-LM rows are padded on the right and get no attention mask: causality keeps real tokens from seeing the
    padding, and labels of -100 keep it out of the loss, whatever its id is. For other objectives, token rows (int64
    [T]) of unequal length are padded on the right with `PAD`, which the model must look out for.
    """
    rows = tuple(examples)
    xs = [_tensor(row.x, row) for row in rows]
    ys = [_tensor(row.y, row) for row in rows]
    x: Tensor | dict[str, Tensor]
    if objective == "causal_lm":
        x = pad_sequence(xs, batch_first=True)  # [B, T]
        y = pad_sequence(ys, batch_first=True, padding_value=IGNORE)  # [B, T]
        counts = (y[:, 1:] != IGNORE).sum(1).tolist()
        tokens = sum(map(len, xs))
    else:
        ragged = len({len(row) if row.dim() else 0 for row in xs}) > 1 and xs[0].dtype == torch.long
        x = pad_sequence(xs, batch_first=True, padding_value=PAD) if ragged else torch.stack(xs)
        y = torch.stack(ys)
        if objective == "regression":
            y = y.to(torch.get_default_dtype()) if not y.is_floating_point() else y
            counts = [y[0].numel()] * len(rows)
        else:
            y = y if y.is_floating_point() else y.long()
            counts = [1] * len(rows)
        tokens = len(rows)
    return Batch(rows, x.to(device), y.to(device), tuple(counts), tokens)


def _tensor(value: Tensor | None, row: Example) -> Tensor:
    if value is None:
        raise ConfigError(f"example {row.key!r} of task {row.task!r} has no tensors: encode its text first")
    return value


def is_language_model(model: nn.Module) -> bool:
    """Whether the model takes `input_ids` and has a config, as Hugging Face models and PEFT's wrappers do."""
    return hasattr(model, "config") and hasattr(model, "generate")


def forward(model: nn.Module, batch: Batch) -> Output:
    """Call the model the way its kind wants; its output may be a tensor or carry `.logits`.

    Returns:
        Of a language model, logits [B, T, V] for the T tokens of a row: those of a soft prompt are left out.
    """
    if isinstance(batch.x, Mapping):
        result = model(**batch.x)
    elif is_language_model(model):
        logits = model(input_ids=batch.x, use_cache=False).logits
        return Output(logits[:, logits.shape[1] - batch.x.shape[1] :])
    else:
        result = model(batch.x)
    if isinstance(result, Tensor):
        return Output(result)
    return Output(result.logits, getattr(result, "members", None))


def losses(output: Output, batch: Batch, objective: Objective) -> Tensor:
    """The loss of each example, summed over its targets: [B], fp32 or wider."""
    if output.members is not None:
        return _of_members(output.members, batch.y).mean(1)
    return _LOSSES[objective](_wide(output.logits), batch.y, "none")


def total_loss(output: Output, batch: Batch, objective: Objective) -> Tensor:
    """The loss summed over all targets of the batch: a scalar, fp32 or wider."""
    if output.members is not None:
        return _of_members(output.members, batch.y).mean(1).sum()
    return _LOSSES[objective](_wide(output.logits), batch.y, "sum")


def _of_members(predictions: Tensor, values: Tensor) -> Tensor:
    """Each member's loss on each row, [B, M], for targets [B]."""
    return 0.5 * (_wide(predictions) - values[:, None]) ** 2


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _causal_lm(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    vocabulary = logits.shape[-1]
    flat = F.cross_entropy(
        logits[:, :-1].reshape(-1, vocabulary),
        labels[:, 1:].reshape(-1),
        ignore_index=IGNORE,
        reduction=reduction,
    )
    return flat if reduction == "sum" else flat.view(labels.shape[0], -1).sum(1)


def _classification(logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
    if labels.is_floating_point() and labels.shape != logits.shape:
        raise ConfigError(
            f"classification: labels must be class numbers, or as many shares as the model gives classes "
            f"({logits.shape[-1]}), got {labels.dtype}; to predict a number, use the objective regression"
        )
    try:
        return F.cross_entropy(logits, labels, reduction=reduction)
    except IndexError as error:  # not on every device, where it would cost a look at the labels
        raise ConfigError(
            f"classification: {error} The model gives {logits.shape[-1]} classes, so labels are 0 to "
            f"{logits.shape[-1] - 1}"
        ) from error


def _regression(predictions: Tensor, values: Tensor, reduction: str) -> Tensor:
    """½(p − y)²: the negative log-likelihood of a unit Gaussian, up to a constant."""
    given, wanted = tuple(predictions.shape), tuple(values.shape)
    if (*given, 1) == wanted or given == (*wanted, 1):
        predictions = predictions.view_as(values)
    if predictions.shape != values.shape:
        raise ConfigError(
            f"regression: the model gives {tuple(predictions.shape)} and the targets are {tuple(values.shape)}; "
            "they must have the same shape (a trailing 1 aside)"
        )
    each = 0.5 * (predictions - values) ** 2
    return each.sum() if reduction == "sum" else each.flatten(1).sum(1) if each.dim() > 1 else each


_LOSSES: dict[str, Callable[[Tensor, Tensor, str], Tensor]] = {
    "causal_lm": _causal_lm,
    "classification": _classification,
    "regression": _regression,
}


def answers(output: Output, batch: Batch, objective: Objective) -> Tensor:
    """What the model says where there is a target, row after row.

    Returns:
        [N, V] logits for N targets (of a causal LM, those that predict a learnt token), [B, C] logits, or [B, K]
        predictions; fp32 or wider. Row i of the batch has `batch.counts[i]` of them (of [B, K], one).
    """
    logits = _wide(output.logits)
    if objective == "causal_lm":
        return logits[:, :-1][batch.y[:, 1:] != IGNORE]  # the logits at t predict the label at t + 1
    return logits.flatten(1) if logits.dim() > 1 else logits[:, None]


def count_targets(example: Example, objective: Objective) -> int:
    """How many targets a row holds: learnt tokens, values, or 1."""
    y = _tensor(example.y, example)
    if objective == "causal_lm":
        return int((y[1:] != IGNORE).sum())
    return y.numel() if objective == "regression" else 1


def group_losses(output: Output, batch: Batch, objective: Objective) -> dict[str, Tensor]:
    """Loss sums by group: the plain sum where there is one group, so that unused groups cost nothing."""
    groups = dict.fromkeys(row.group for row in batch.examples)
    if len(groups) == 1:
        return dict.fromkeys(groups, total_loss(output, batch, objective))
    each = losses(output, batch, objective)
    return {g: each[[i for i, row in enumerate(batch.examples) if row.group == g]].sum() for g in groups}


def group_counts(batches: Sequence[Batch]) -> dict[str, int]:
    """How many targets each group holds in these batches together."""
    totals: dict[str, int] = {}
    for batch in batches:
        for row, count in zip(batch.examples, batch.counts, strict=True):
            totals[row.group] = totals.get(row.group, 0) + count
    return totals
