"""The model side of teaching: rows, steps, marks and weights. Knows nothing of gates, journals or people."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from perdure.teaching.packing import can_pack
from perdure.teaching.rehearse import Rehearsed
from perdure.teaching.settings import TeachSettings
from perdure.training.learner import Learner
from perdure.training.measure import Measure
from perdure.training.telling import write_model
from perdure.types import IGNORE, Example, Task

WEIGHT_DECAY, CLIP = 0.01, 1.0
MORE = 2  # times the rows of others, and the steps, where a lesson is taught with more replay


@dataclass(frozen=True, slots=True)
class Reply:
    """A greedy answer.

    Attributes:
        text: what it says.
        cut: whether it had not ended after `max_new_tokens`.
    """

    text: str
    cut: bool


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
        self._parameters = list(self._trained().values())
        self._seen: tuple[tuple[int, ...], dict[tuple[str, ...], list[Mark]]] = ((), {})
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
        self._rehearsed.packs = bool(rows) and can_pack(self.model, [self.learner.collate(rows[:4])])

    def rehearse_of(self, rows: Sequence[Example]) -> None:
        """Of those, take these."""
        self._rehearsed.choose(rows)

    # Looking

    def marks(self, rows: Sequence[Example]) -> list[Mark]:
        """How right the model is on each row; what was looked at since the last change is known still."""
        key = tuple(row.key for row in rows)
        known = self._known()
        if key not in known:
            known[key] = marks(self.learner, rows)
        return known[key]

    def marks_and_distance(self, rows: Sequence[Example], distance: Distance) -> tuple[list[Mark], float]:
        """As `marks`, and how far the model is from what it was, on those of the rows that the distance is of."""
        return distance.beside(self.learner, rows)

    def _known(self) -> dict[tuple[str, ...], list[Mark]]:
        """Marks of lists of rows by the model as it is."""
        now = tuple(parameter._version for parameter in self._parameters)
        if self._seen[0] != now:
            self._seen = (now, {})
        return self._seen[1]

    def distance(self, rows: Sequence[Example]) -> Distance:
        """Measures how far the model will have gone from what it is now."""
        return Distance(self.learner, rows)

    def answers(self, rows: Sequence[Example], most: int | None = None) -> list[str]:
        """Greedy answers to the rows' prompts."""
        return [answer.text for answer in self.replies(rows, most)]

    def replies(self, rows: Sequence[Example], most: int | None = None) -> list[Reply]:
        """As `answers`, with whether each was cut."""
        prompts = [prompt for row in rows if (prompt := self.measure.prompt(row)) is not None]
        if not prompts:
            return []
        longest = max(len(prompt.x) for prompt in prompts if prompt.x is not None)
        room = self.encoder.max_length - longest
        limit = min(most or self.settings.max_new_tokens, room)
        found = self.measure.tokens(prompts, limit)
        return [Reply(self.measure.text(tokens).strip(), len(tokens) >= limit) for tokens in found]

    def said(self, rows: Sequence[Example], found: Sequence[Mark]) -> list[str]:
        """As `answers`, given the rows' marks: what is right need not be generated to be known."""
        texts: dict[int, str] = {}
        for i, (row, mark) in enumerate(zip(rows, found, strict=True)):
            assert row.y is not None
            tokens = [token for token in row.y[row.y != IGNORE].tolist() if token != self.encoder.eos]
            if mark.right and len(tokens) <= self.settings.max_new_tokens:
                texts[i] = self.measure.text(tokens).strip()
        others = [i for i in range(len(rows)) if i not in texts]
        texts |= zip(others, self.answers([rows[i] for i in others]), strict=True)
        return [texts[i] for i in range(len(rows))]

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
        others = list(earlier) if settings.earlier else []
        wrong = others  # of those that are looked at beside the lesson: all, or those that were wrong then
        looking = False  # as long as the lesson is not sure, its own rows will do
        for step in range(settings.max_steps * factor):
            if looking or self._sure(self.marks(rows)):
                found = self.marks([*wrong, *rows])
                if wrong is not others and all(mark.right for mark in found):
                    wrong, found = others, self.marks([*others, *rows])
                looking = self._sure(found[len(wrong) :])
                if looking and all(mark.right for mark in found):
                    return step
                if looking and wrong is others:
                    self._rehearsed.focus([mark.sure for mark in found[: len(others)]])
                    wrong = [row for row, mark in zip(others, found, strict=False) if not mark.right]
            learner.step(rows)
        return settings.max_steps * factor

    def _sure(self, found: Sequence[Mark]) -> bool:
        return all(mark.right and mark.sure >= self.settings.sure for mark in found)

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
