"""The model side of teaching: rows, steps, marks and weights. Knows nothing of gates, journals or people."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perdure.config import EvaluationSettings, OptimizerSettings, TrainingSettings
from perdure.errors import DataError
from perdure.models.adapters import count_parameters, count_virtual_tokens, tune
from perdure.models.load import LanguageModel
from perdure.order import priority
from perdure.streams.encode import Encoder
from perdure.streams.text import exchange
from perdure.teaching.lesson import Matter, digest
from perdure.teaching.marks import Distance, Mark, log_probabilities, marks
from perdure.teaching.rehearse import Rehearsed
from perdure.teaching.settings import TeachSettings
from perdure.training.learner import Learner
from perdure.training.measure import Measure
from perdure.training.telling import write_model
from perdure.types import Example, Task

WEIGHT_DECAY, CLIP = 0.01, 1.0
MORE = 2  # times the rows of others, and the steps, where a lesson is taught with more replay


class Pupil:
    """A language model that learns a lesson in a few steps, beside rows of others.

    Args:
        language: the model and its tokenizer.
        settings: how it is tuned and taught.
        tuned: a model of PEFT that goes on being tuned; None: one is made from `language` and the seed.
    """

    def __init__(self, language: LanguageModel, settings: TeachSettings, tuned: Any = None) -> None:
        self.language, self.settings = language, settings
        if tuned is None:
            torch.manual_seed(settings.seed)
            tuned = tune(
                language.model,
                settings.tuning,
                **settings.lora.model_dump(),
                **settings.soft_prompt.model_dump(),
                tokenizer=language.tokenizer,
            )
        self.model = tuned
        self._rehearsed = Rehearsed(settings.earlier, settings.general, settings.anchor)
        training = TrainingSettings(
            optimizer=OptimizerSettings(lr=settings.lr, weight_decay=WEIGHT_DECAY),
            clip=CLIP,
            precision=settings.precision,
        )
        self.learner = Learner(tuned, self._rehearsed, "causal_lm", training, settings.seed)
        self.encoder = Encoder(language.tokenizer, language.max_length - count_virtual_tokens(tuned))
        self.measure = Measure(self.learner, self.encoder, EvaluationSettings(), settings.seed)

    @property
    def trainable(self) -> tuple[int, int]:
        """Trained and all parameters."""
        return count_parameters(self.model)

    # Rows

    def row(self, prompt: str, answer: str, task: str = "lesson") -> Example:
        """A question and its answer, encoded.

        Raises:
            DataError: it is longer than the model takes.
        """
        tokenizer = self.language.tokenizer
        spaced = answer if prompt[-1:].isspace() else " " + answer.strip()
        example = Example(digest([prompt, answer]), task, exchange(prompt, spaced, tokenizer, "a lesson"))
        row = self.encoder.encode(example)
        if row is None:
            raise DataError(
                f"{prompt[:60]!r} with its answer is longer than the model's {self.encoder.max_length} tokens; "
                "shorten it"
            )
        return row

    def taught(self, matter: Matter) -> list[Example]:
        """The rows that a lesson teaches: one for each wording."""
        return [self.row(prompt, matter.answer) for prompt in matter.taught]

    def held_out(self, matter: Matter) -> list[Example]:
        """The rows of the wordings that it does not."""
        return [self.row(prompt, matter.answer) for prompt in matter.held_out]

    def rehearse(self, rows: Sequence[Example]) -> None:
        """Take the rows of the probe's training side, and hold what the model says to them now."""
        self._rehearsed.hold(rows, log_probabilities(self.learner, rows))

    # Looking

    def marks(self, rows: Sequence[Example]) -> list[Mark]:
        """How right the model is on each row."""
        return marks(self.learner, rows)

    def distance(self, rows: Sequence[Example]) -> Distance:
        """Measures how far the model will have gone from what it is now."""
        return Distance(self.learner, rows)

    def answers(self, rows: Sequence[Example], most: int | None = None) -> list[str]:
        """Greedy answers to the rows' prompts."""
        prompts = [prompt for row in rows if (prompt := self.measure.prompt(row)) is not None]
        if not prompts:
            return []
        longest = max(len(prompt.x) for prompt in prompts if prompt.x is not None)
        room = self.encoder.max_length - longest
        found = self.measure.answers(prompts, min(most or self.settings.max_new_tokens, room))
        return [text.strip() for text in found]

    # Learning

    def learn(self, matter: Matter, earlier: Sequence[Example], sure: Sequence[float], more: bool = False) -> int:
        """Steps on a lesson until it is sure and no earlier one is wrong, or there were as many as there may be.

        What it leaves hangs on the weights, the lesson and the rows alone: the optimizer's state is fresh, and
        every draw is keyed by the lesson.

        Args:
            matter: the lesson.
            earlier: rows of earlier lessons.
            sure: how sure the model is of each of them.
            more: twice the rows of others in each step, and twice the steps.

        Returns:
            How many steps it took: none where all of it is known already.
        """
        settings, learner = self.settings, self.learner
        rows = self.taught(matter)
        factor = MORE if more else 1
        torch.manual_seed(priority(settings.seed, "lesson", key=matter.key) >> 1)
        self._rehearsed.begin(matter.key, settings.seed, earlier, sure, factor)
        learner.begin_task(Task("lesson", rows), 0)
        for step in range(settings.max_steps * factor):
            if self._sure(rows):
                found = self.marks(earlier) if settings.earlier else []
                if all(mark.right for mark in found):
                    return step
                self._rehearsed.focus([mark.sure for mark in found])
            learner.step(rows)
        return settings.max_steps * factor

    def _sure(self, rows: Sequence[Example]) -> bool:
        return all(mark.right and mark.sure >= self.settings.sure for mark in self.marks(rows))

    # Weights

    def weights(self) -> dict[str, Tensor]:
        """A copy of what is trained, by name."""
        return {name: p.detach().cpu().clone() for name, p in self._trained().items()}

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Become the model of these weights."""
        with torch.no_grad():
            for name, parameter in self._trained().items():
                parameter.copy_(weights[name])
                parameter.grad = None

    def _trained(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def export(self, path: Path) -> None:
        """Write the adapter and the tokenizer into a folder that is there, as PEFT loads them."""
        write_model(self._rehearsed, self.model, self.language.tokenizer, path)


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """A hash of names and bytes."""
    found = hashlib.sha256()
    for name, value in sorted(weights.items()):
        found.update(name.encode())
        found.update(value.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]


def scaled(before: Mapping[str, Tensor], after: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The share `scale` of the way from one set of weights to another."""
    return {name: before[name] + scale * (after[name] - before[name]) for name in before}
