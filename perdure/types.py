"""The values that flow through perdure: frozen, and free of any library at run time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Objective = Literal["classification", "causal_lm", "regression"]
TASK = "task"
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of an example's text.

    Attributes:
        text: the text, tokenised on its own, so that a prompt has the same tokens in training and generation.
        learn: whether its tokens are targets.
        cut: whether it may be shortened when the example is too long (the context of a question, say).
        special: whether strings such as `</s>` in it stand for the special tokens (a chat template's markup); in
            text from data they are ordinary text.
    """

    text: str
    learn: bool = False
    cut: bool = False
    special: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training or evaluation row, unpadded.

    Attributes:
        key: stable name: the row's id, else a hash of its content; never a row number.
        task: name of the task it belongs to.
        segments: the text, in order; empty for tensor examples.
        x: input tensor. For a causal LM the token ids, int64 [T].
        y: target. A class (int64 []), a value (float [] or [K]); for a causal LM the labels, int64 [T], not
            shifted, -100 where not learnt.
        source: "task", or the name of the strategy that replayed it.
        group: rows of one group share a mean; the loss is the sum over groups of weight times mean.
        extras: whatever a strategy stored with it (logits, say): tensors and plain values.
        fields: the row's other columns (level, type, ...), plain values.
    """

    key: str
    task: str = ""
    segments: tuple[Segment, ...] = ()
    x: Tensor | None = None
    y: Tensor | None = None
    source: str = TASK
    group: str = TASK
    extras: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Example:
        """A copy with some attributes changed."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Examples collated for one forward pass.

    Attributes:
        examples: the rows, in order, B of them.
        x: what the model is called with: a tensor [B, ...] as its one argument, or keyword arguments.
        y: targets [B], [B, K], or labels [B, T] with -100 where not learnt.
        counts: how many targets each row holds (learnt tokens, values, or 1).
        tokens: how many real (unpadded) input tokens or rows it holds.
    """

    examples: tuple[Example, ...]
    x: Tensor | Mapping[str, Tensor]
    y: Tensor
    counts: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True, eq=False)
class Output:
    """What a forward pass gives.

    Attributes:
        logits: [B, T, V] of a causal LM, [B, C] of a classifier; of a regression the predictions, [B] or [B, K].
        members: of an ensemble for regression, each member's own predictions, [B, M]; the logits are their
            mean. The loss is the mean of the members' losses, so that each learns by itself.
    """

    logits: Tensor
    members: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Task:
    """One task of a stream.

    Attributes:
        name: unique within the stream.
        train: training examples.
        evaluation: held-out examples.
    """

    name: str
    train: Sequence[Example]
    evaluation: Sequence[Example] = ()


@dataclass(frozen=True, slots=True)
class Phase:
    """A stretch of training within a task; most strategies have one.

    Attributes:
        name: "train", or what the strategy calls it.
        epochs: passes over the task's rows.
    """

    name: str = "train"
    epochs: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Context:
    """What a strategy may see: never the trainer, never the optimizer.

    Attributes:
        model: the model being trained.
        task: the current task.
        index: its position in the stream, from 0.
        objective: what the model is trained for.
        forward: the strategy's own forward pass, `(model, batch) -> Output`.
        collate: examples to a batch on the model's device.
        loss_of: the task loss alone, `(examples, params=None, reduction="mean", train=False) -> Tensor`;
            "mean" is over targets, "sum" over targets, "none" gives one sum per example [B].
        rng: this strategy's own generator (CPU); nobody else draws from it.
        seed: the run's seed, for keyed priorities.
        log: records a named value for the step; "penalty" is added to the logged loss.
        autocast: the context of a forward pass at the run's precision; `loss_of` is in it already, except in fp16,
            where its gradients would underflow: it is then taken in fp32.
    """

    model: nn.Module
    task: Task
    index: int
    objective: Objective
    forward: Callable[[nn.Module, Batch], Output]
    collate: Callable[[Sequence[Example]], Batch]
    loss_of: Callable[..., Tensor]
    rng: torch.Generator
    seed: int
    log: Callable[[str, Any], None]
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext

    def but(self, **changes: Any) -> Context:
        """A copy with some attributes changed."""
        return replace(self, **changes)
