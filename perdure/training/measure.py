"""What is measured of a language model on a task: loss, and how right its greedy answers are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from perdure.config import EvaluationSettings
from perdure.evaluation.generate import generate, generate_through, ids_of
from perdure.evaluation.score import INFERRED
from perdure.order import take
from perdure.streams.answers import PLAIN, RULES
from perdure.streams.encode import Encoder
from perdure.training.learner import Learner
from perdure.training.plan import PROBE
from perdure.training.settings import RunSettings
from perdure.types import IGNORE, Example


class Measure:
    """Score sets of rows; prompts and references are worked out once a set.

    Args:
        learner: whose model is scored.
        encoder: makes prompts and reads answers.
        settings: what to generate.
        seed: of the choice of rows to generate for.
        rules: by which the answers of a set are scored, by its name (see `perdure.streams.answers.RULES`); of a set
            that is not named, "plain".
    """

    def __init__(
        self,
        learner: Learner,
        encoder: Encoder,
        settings: EvaluationSettings,
        seed: int,
        rules: Mapping[str, str] | None = None,
    ) -> None:
        self.learner = learner
        self.encoder = encoder
        self.settings = settings
        self.seed = seed
        self.rules = dict(rules or {})
        self._prepared: dict[str, tuple[list[Example], list[str], int]] = {}

    def __call__(
        self, name: str, rows: Sequence[Example], told: bool = True, trained: bool = True
    ) -> dict[str, float]:
        """Loss over all rows and, where settings ask for it, every metric of the set's rule, a mean over rows.

        Args:
            name: of the set.
            rows: the set.
            told: whether a strategy that wants to be told tasks is; it is then measured untold too, as
                "exact_match_inferred" and so on. False for rows of no task.
            trained: whether anything was trained yet.
        """
        learner = self.learner
        found = learner.score_both(rows) if told else learner.score(learner.identified(rows))
        if self.settings.exact_match and rows and (trained or self.settings.before_training):
            prompts, references, longest = self._prepare(name, rows)
            rule = self.rules.get(name, PLAIN)
            if prompts and not told:
                found |= mean_scores(rule, self.answers(learner.identified(prompts), longest), references)
            elif prompts:
                answers = self.answers(prompts, longest)
                found |= mean_scores(rule, answers, references)
                if learner.infers:
                    untold = learner.identified(prompts)
                    others = [i for i, row in enumerate(untold) if row.task != prompts[i].task]
                    for i, answer in zip(others, self.answers([untold[i] for i in others], longest), strict=True):
                        answers[i] = answer
                    inferred = mean_scores(rule, answers, references)
                    found |= {metric + INFERRED: value for metric, value in inferred.items()}
        return found

    def answers(self, prompts: Sequence[Example], max_new_tokens: int) -> list[str]:
        """The model's greedy answers as text; a strategy that is told tasks is told those of the prompts."""
        return [self.text(tokens) for tokens in self.tokens(prompts, max_new_tokens)]

    def tokens(self, prompts: Sequence[Example], max_new_tokens: int) -> list[list[int]]:
        """The model's greedy answers as token ids, without the end token."""
        learner, strategy = self.learner, self.learner.strategy
        size, autocast, limit = learner.settings.evaluation_batch_size, learner.autocast, self.encoder.max_length
        found: dict[int, list[int]] = {}
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(prompt.task if strategy.wants_task_ids else "", []).append(i)
        for task, places in groups.items():
            chosen = [prompts[i] for i in places]
            serving = strategy.serving(learner.model, task)
            ends = (max_new_tokens, self.encoder.eos, size, autocast, limit)
            if serving is None:
                tokens = generate_through(strategy.forward, learner.collate, learner.model, chosen, *ends)
            else:
                with serving:
                    tokens = generate(learner.model, [ids_of(prompt) for prompt in chosen], *ends)
            found |= dict(zip(places, tokens, strict=True))
        return [found[i] for i in range(len(prompts))]

    def prompt(self, row: Example) -> Example | None:
        """The row up to its answer; None where nothing stands before it."""
        ids = self.encoder.prompt_ids(row)
        return row.but(x=ids, y=torch.full_like(ids, IGNORE)) if len(ids) else None

    def text(self, tokens: Sequence[int]) -> str:
        """What the tokens stand for, without special ones."""
        # Some tokenizers tidy the spaces before punctuation away, which references keep.
        return str(
            self.encoder.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )

    def _prepare(self, name: str, rows: Sequence[Example]) -> tuple[list[Example], list[str], int]:
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
                prompt = self.prompt(row)
                if prompt is None:
                    continue  # nothing stands before the answer, not even BOS: there is nothing to go on from
                prompts.append(prompt)
                references.append(self.encoder.reference(row))
                lengths.append(len(row.x) - len(ids_of(prompt)) if row.x is not None else 1)
            limit = self.settings.max_new_tokens or max(lengths)
            self._prepared[name] = (prompts, references, limit)
        return self._prepared[name]


def mean_scores(rule: str, answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean over rows of every metric that a rule gives, by metric; there must be a row."""
    rows = [RULES[rule].score(*pair) for pair in zip(answers, references, strict=True)]
    return {metric: math.fsum(row[metric] for row in rows) / len(rows) for metric in rows[0]}


def rules_of(settings: RunSettings) -> dict[str, str]:
    """The rule by which each task's answers are scored, and the general probe's; arena tasks have the default."""
    tasks = {task.name: task.answers for task in (*(settings.stream.tasks or ()), *settings.extensions)}
    return tasks | ({PROBE: settings.probe.answers} if settings.probe else {})
