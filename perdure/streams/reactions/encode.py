"""Reactions to token ids, as the backbone's own tokenizer writes them; nothing is cut."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perdure.streams.reactions.reaction import Reaction
from perdure.types import Example, Segment

TOO_LONG = "too long"


class ReactionEncoder:
    """Tokenise reaction SMILES, with the special tokens that the tokenizer itself adds.

    Args:
        tokenizer: of `transformers`.
        max_length: most tokens of a row; a longer one is left out, since half a reaction is another one.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length

    def encode(self, rows: Sequence[Reaction]) -> tuple[list[Example], list[str]]:
        """Examples of x (ids, int64 [T]) and y (yield as a fraction, float32 []; None where unknown).

        Returns:
            The examples, in order, and the keys of the rows that were left out as too long.
        """
        import torch

        if not rows:
            return [], []
        texts = [row.smiles for row in rows]
        encoded = self.tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
        found, left_out = [], []
        for row, ids in zip(rows, encoded, strict=True):
            if len(ids) > self.max_length:
                left_out.append(row.key)
                continue
            found.append(
                Example(
                    row.key,
                    row.task,
                    (Segment(row.smiles),),
                    x=torch.tensor(ids),
                    y=None if row.value is None else torch.tensor(row.value, dtype=torch.float32),
                    fields=dict(row.fields),
                )
            )
        return found, left_out
