"""What is measured of a language model on a task: loss, and exact match of greedy answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from perdure.config import EvaluationSettings
from perdure.evaluation.generate import generate, matches
from perdure.order import take
from perdure.streams.encode import Encoder
from perdure.training.learner import Learner
from perdure.types import Example


class Measure:
    """Score sets of rows; prompts and references are worked out once a set.

    Args:
        learner: whose model is scored.
        encoder: makes prompts and reads answers.
        settings: what to generate.
        seed: of the choice of rows to generate for.
    """

    def __init__(self, learner: Learner, encoder: Encoder, settings: EvaluationSettings, seed: int) -> None:
        self.learner = learner
        self.encoder = encoder
        self.settings = settings
        self.seed = seed
        self._prepared: dict[str, tuple[list[Any], list[str], int]] = {}

    def __call__(self, name: str, rows: Sequence[Example]) -> dict[str, float]:
        """Loss over all rows and, where settings ask for it, exact match."""
        found = self.learner.score(rows)
        if self.settings.exact_match and rows:
            prompts, references, longest = self._prepare(name, rows)
            if prompts:
                answers = self.answers(prompts, longest)
                right = sum(map(matches, answers, references))
                found["exact_match"] = right / len(prompts)
        return found

    def answers(self, prompts: Sequence[Any], max_new_tokens: int) -> list[str]:
        """The model's greedy answers as text."""
        found = generate(
            self.learner.model,
            prompts,
            max_new_tokens,
            self.encoder.eos,
            self.learner.settings.evaluation_batch_size,
            self.learner.autocast,
            self.encoder.max_length,
        )
        return [self._text(tokens) for tokens in found]

    def _text(self, tokens: list[int]) -> str:
        # Some tokenizers tidy the spaces before punctuation away, which references keep.
        return str(
            self.encoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _prepare(self, name: str, rows: Sequence[Example]) -> tuple[list[Any], list[str], int]:
        if name not in self._prepared:
            chosen = list(rows)
            if self.settings.generate_rows is not None:
                chosen = take(
                    rows, self.settings.generate_rows, self.seed, "generate", name, key=lambda row: row.key
                )
            prompts, references, lengths = [], [], [1]
            for row in chosen:
                if all(segment.learn for segment in row.segments):
                    continue  # plain text has no question to answer: it is scored by its loss alone
                prompt = self.encoder.prompt_ids(row)
                if not len(prompt):
                    continue  # nothing stands before the answer, not even BOS: there is nothing to go on from
                prompts.append(prompt)
                references.append(self.encoder.reference(row))
                lengths.append(len(row.x) - len(prompt) if row.x is not None else 1)
            limit = self.settings.max_new_tokens or max(lengths)
            self._prepared[name] = (prompts, references, limit)
        return self._prepared[name]
