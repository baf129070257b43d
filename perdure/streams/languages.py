"""Small artificial languages: tasks in which the same words, in another order, mean other things. Generated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from random import Random
from typing import Literal

from perdure.errors import ConfigError
from perdure.streams.stream import Stream
from perdure.types import IGNORE, Example, Task

ROLES = "SVO"
Meaning = tuple[int, int, int]


@dataclass(frozen=True)
class Language:
    """Sentences of four words: a particle that only this language has, then subject, verb and object in its order.

    Attributes:
        name: its place in the family and its order, such as "1-SOV".
        order: in which order the roles stand, a permutation of "SVO".
        particle: the word that begins every sentence.
        lexicon: the word for each concept, by the concept's number.
    """

    name: str
    order: str
    particle: int
    lexicon: tuple[int, ...]

    def say(self, meaning: Meaning) -> tuple[int, ...]:
        """The sentence, four token ids, that says a meaning: the concepts of subject, verb and object."""
        roles = dict(zip(ROLES, meaning, strict=True))
        return (self.particle, *(self.lexicon[roles[role]] for role in self.order))

    def read(self, sentence: tuple[int, ...]) -> Meaning:
        """The meaning of a sentence of this language: concepts of subject, verb and object."""
        concepts = dict(zip(self.order, map(self.lexicon.index, sentence[1:]), strict=True))
        return concepts["S"], concepts["V"], concepts["O"]


@dataclass(frozen=True)
class Languages:
    """A family of languages for the same concepts, which differ in their words and in the order of these.

    Concepts are numbered, nouns before verbs. All languages draw their words from one pool: if that is as large as
    the number of concepts, every word means something in every language, and mostly something else. What is learnt
    of one language is then wrong for the next, and only the particle says which one is spoken.

    Token ids: concepts from 0, then the words of the pool, then the particles. A family of more languages has the
    same ones at its beginning.

    Attributes:
        count: languages; the first six have different orders.
        nouns: concepts that can be subject and object, at least 2.
        verbs: concepts that can be the verb.
        words: words in the pool; None for as many as there are concepts, which is the fewest.
        seed: of orders, words and sentences.

    Raises:
        ConfigError: fewer than one language or verb, fewer than two nouns, or fewer words than concepts.

    Example:
        >>> family = Languages(count=3, seed=0)
        >>> stream = family.stream(train_rows=200, evaluation_rows=100)
        >>> trainer.train_task(stream[0].train, stream[0].evaluation, task_id=0, num_epochs=20)
    """

    count: int = 4
    nouns: int = 10
    verbs: int = 5
    words: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("nouns", 2), ("verbs", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"languages: {name} must be at least {least}, got {getattr(self, name)}")
        if self.words is not None and self.words < self.concepts:
            raise ConfigError(
                f"languages: words must be at least {self.concepts}, one for each noun and verb, got {self.words}"
            )

    @property
    def concepts(self) -> int:
        """How many concepts there are."""
        return self.nouns + self.verbs

    @property
    def vocabulary(self) -> int:
        """How many token ids there are."""
        return self.concepts + (self.words or self.concepts) + self.count

    @cached_property
    def languages(self) -> tuple[Language, ...]:
        """The languages, in order."""
        orders = ["".join(order) for order in permutations(ROLES)]
        Random(f"languages/{self.seed}/orders").shuffle(orders)
        pool = range(self.concepts, self.vocabulary - self.count)
        return tuple(
            Language(
                name=f"{i + 1}-{orders[i % len(orders)]}",
                order=orders[i % len(orders)],
                particle=pool.stop + i,
                lexicon=tuple(Random(f"languages/{self.seed}/words/{i}").sample(pool, self.concepts)),
            )
            for i in range(self.count)
        )

    def stream(
        self,
        objective: Literal["classification", "causal_lm"] = "classification",
        train_rows: int = 200,
        evaluation_rows: int = 100,
    ) -> Stream:
        """A task for each language: to say what a sentence means. No sentence comes twice.

        Args:
            objective: "classification": x is the sentence, int64 [4], and y the concept of its subject, so that
                there are as many classes as nouns. "causal_lm": x is the sentence followed by the concepts of
                subject, verb and object, int64 [7], and only these three are learnt.
            train_rows: training rows of each task.
            evaluation_rows: held-out rows of each task.

        Raises:
            ConfigError: another objective, no training rows, or more rows than a language has sentences.
        """
        if objective not in ("classification", "causal_lm"):
            raise ConfigError(f'languages: objective must be "classification" or "causal_lm", got {objective!r}')
        meanings = [
            (subject, verb, object_)
            for subject in range(self.nouns)
            for verb in range(self.nouns, self.concepts)
            for object_ in range(self.nouns)
            if object_ != subject
        ]
        rows = train_rows + evaluation_rows
        if train_rows < 1 or evaluation_rows < 0 or rows > len(meanings):
            raise ConfigError(
                f"languages: {train_rows} training and {evaluation_rows} held-out rows of each language were asked "
                f"for; there must be 1 and 0 at least, and {len(meanings)} at most in all, one for each sentence. "
                "More nouns or verbs make more"
            )
        tasks = []
        for i, language in enumerate(self.languages):
            drawn = Random(f"languages/{self.seed}/sentences/{i}").sample(meanings, rows)
            examples = [_example(language, meaning, objective) for meaning in drawn]
            tasks.append(Task(language.name, examples[:train_rows], examples[train_rows:]))
        return Stream(tasks)


def _example(language: Language, meaning: Meaning, objective: str) -> Example:
    import torch

    sentence = language.say(meaning)
    key = " ".join(map(str, sentence))
    if objective == "classification":
        return Example(key, language.name, x=torch.tensor(sentence), y=torch.tensor(meaning[0]))
    ids = torch.tensor([*sentence, *meaning])
    labels = torch.tensor([*[IGNORE] * len(sentence), *meaning])
    return Example(key, language.name, x=ids, y=labels)
