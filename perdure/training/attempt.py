"""What the model answers to one row, and how the right answer looks to it: usually one forward pass for both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perdure.evaluation.generate import ids_of
from perdure.evaluation.score import evaluating
from perdure.models.objectives import total_loss
from perdure.streams.answers import matches
from perdure.training.measure import Measure
from perdure.types import IGNORE, Example


@dataclass(frozen=True, slots=True)
class Attempt:
    """An answer to one row.

    Attributes:
        text: the greedy answer.
        loss: of the right answer, mean over its tokens.
        right: whether the greedy answer is the right one, but for white space at its ends and its amount.
    """

    text: str
    loss: float
    right: bool


def attempt(measure: Measure, row: Example, max_new_tokens: int) -> Attempt:
    """Answer one encoded row greedily.

    The right answer is put through the model once. As long as each of its tokens is the arg max after those before
    it, a greedy answer has the same tokens; only from the first that is not is anything generated.

    Args:
        measure: with the model and the tokenizer.
        row: the last stretch of what is learnt is its answer.
        max_new_tokens: of the greedy answer.
    """
    learner = measure.learner
    prompt = measure.prompt(row)
    start = 0 if prompt is None else len(ids_of(prompt))
    batch = learner.collate([row])
    with evaluating(learner.model), learner.autocast():
        output = learner.strategy.forward(learner.model, batch)
        loss = float(total_loss(output, batch, learner.objective)) / max(batch.counts[0], 1)
    if prompt is None:
        return Attempt("", loss, False)  # there is nothing to go on from
    wanted = ids_of(row)[start:].tolist()
    greedy = output.logits[0, start - 1 : -1].argmax(-1).tolist()
    agreed = next((i for i, pair in enumerate(zip(greedy, wanted, strict=True)) if pair[0] != pair[1]), len(wanted))
    answer = wanted[:agreed]
    end = measure.encoder.eos
    if agreed < len(wanted) and agreed < max_new_tokens and greedy[agreed] != end:
        answer.append(greedy[agreed])
        if len(answer) < max_new_tokens:
            ids = ids_of(row).new_tensor(answer)
            longer = prompt.but(x=torch.cat([ids_of(prompt), ids]), y=ids.new_full((start + len(ids),), IGNORE))
            answer += measure.tokens([longer], max_new_tokens - len(answer))[0]
    text = measure.text([token for token in answer[:max_new_tokens] if token != end])
    return Attempt(text, loss, matches(text, measure.encoder.reference(row)))
