"""What an arena run is examined on: held-out problems, the same in nano's own wording, and the probe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from perdure.errors import ConfigError
from perdure.evaluation.intervals import wilson
from perdure.streams.arena import IN_PRETRAINING, Item, plain
from perdure.streams.arena.judge import scores
from perdure.streams.encode import Encoder
from perdure.streams.text import exchange
from perdure.training.measure import Measure
from perdure.training.plan import PROBE
from perdure.types import Example

Adapt = Callable[[str], AbstractContextManager[None]]
Marks = list[tuple[str, Mapping[str, float]]]  # kind and scores of each problem


@dataclass(frozen=True, slots=True, eq=False)
class Paper:
    """Problems as rows: encoded, and up to their answers.

    Attributes:
        items: the problems.
        rows: encoded, in the same order.
        prompts: the rows without their answers.
        longest: tokens that an answer may have.
    """

    items: tuple[Item, ...]
    rows: tuple[Example, ...]
    prompts: tuple[Example, ...]
    longest: int


def to_rows(items: Sequence[Item], encoder: Encoder) -> list[Example]:
    """Encoded rows of problems: through the tokenizer's chat template where it has one.

    Raises:
        ConfigError: a problem is longer than the model's positions.
    """
    rows = encoder.encode_many([to_example(item, encoder.tokenizer) for item in items])
    for item, row in zip(items, rows, strict=True):
        if row is None:
            raise ConfigError(
                f"a {item.kind} problem of level {item.level} is longer than the model's {encoder.max_length} "
                "tokens; leave that level or kind out with --levels or --kinds"
            )
    return [row for row in rows if row is not None]


def to_example(item: Item, tokenizer: Any) -> Example:
    """A problem as an example, not yet encoded; its kind is its task."""
    segments = exchange(item.prompt, item.answer, tokenizer, f"arena problem {item.key}")
    return Example(item.key, item.kind, segments, fields={"kind": item.kind, "level": item.level})


def in_plain_words(items: Sequence[Item]) -> list[Item]:
    """The problems that have one in the wording of nano's pretraining, in it."""
    found = []
    for item in items:
        if item.kind in IN_PRETRAINING:
            prompt, answer = plain(item)
            found.append(Item(item.kind, item.level, prompt, answer, item.facts))
    return found


class ArenaExam:
    """Examines a model on held-out problems.

    Args:
        measure: with the model and the tokenizer.
        items: held-out problems.
        probe: rows of the general probe; none: it is not scored.
        plain_too: whether the problems are also asked in the wording of nano's pretraining.
        last: the episode after which everything is asked; at others the plain wording is left out, as before any.
        adapt: of a meta-learner: kind -> a context in which the model has adapted to a few rows of that kind.
    """

    def __init__(
        self,
        measure: Measure,
        items: Sequence[Item],
        probe: Sequence[Example],
        plain_too: bool,
        last: int,
        adapt: Adapt | None = None,
    ) -> None:
        self._measure, self._probe, self._last, self._adapt = measure, list(probe), last, adapt
        self.paper = self._paper(items)
        plain_items = in_plain_words(items) if plain_too else []
        self.plain = self._paper(plain_items) if plain_items else None

    @property
    def longest(self) -> int:
        """Tokens that an answer may have."""
        return self.paper.longest

    def _paper(self, items: Sequence[Item]) -> Paper:
        rows = to_rows(items, self._measure.encoder)
        prompts = [prompt for row in rows if (prompt := self._measure.prompt(row)) is not None]
        answers = [len(_ids(row)) - len(_ids(prompt)) for row, prompt in zip(rows, prompts, strict=True)]
        # A few more than the longest: an answer that goes on where it should end must be seen to.
        return Paper(tuple(items), tuple(rows), tuple(prompts), max(answers) + 4)

    def __call__(self, episode: int) -> dict[str, Any]:
        """The entry of this episode in the history: plain values."""
        learner = self._measure.learner
        marks = self._marks(self.paper)
        entry = {
            "episode": episode,
            **_summary(marks),
            "loss": learner.score(self.paper.rows)["loss"],
            "kinds": {kind: mean["exact_match"] for kind, mean in _by_kind(marks).items()},
            "stated_kinds": {kind: mean["stated"] for kind, mean in _by_kind(marks).items()},
            "rows_of": {kind: mean["rows"] for kind, mean in _by_kind(marks).items()},
            "rouge_l": _mean([m["rouge_l"] for _, m in marks if "rouge_l" in m]),
            "probe": self._measure(PROBE, self._probe, told=False) if self._probe else None,
            "inferred": None,
            "plain": None,
            "plain_kinds": None,
            "adapted": None,
            "readings": None,
        }
        if learner.infers:
            entry["inferred"] = _summary(self._marks(self.paper, told=False))["exact_match"]
        if episode in (0, self._last):
            found: Marks = []
            if self.plain is not None:
                found = self._marks(self.plain)
                entry["plain"] = {name: _summary(found)[name] for name in ("exact_match", "stated")}
                entry["plain_kinds"] = {kind: mean["exact_match"] for kind, mean in _by_kind(found).items()}
            if self._adapt is not None:
                entry["adapted"] = self._adapted(self._adapt)
            entry["readings"] = readings(marks, found)
        return entry

    def _adapted(self, adapt: Adapt) -> dict[str, Any]:
        """Exact match by kind, of the model adapted to each kind in turn."""
        marks = []
        for kind in dict.fromkeys(item.kind for item in self.paper.items):
            with adapt(kind):
                marks += self._marks(self.paper, kind)
        kinds = {kind: mean["exact_match"] for kind, mean in _by_kind(marks).items()}
        return {"exact_match": _summary(marks)["exact_match"], "kinds": kinds}

    def _marks(self, paper: Paper, kind: str | None = None, told: bool = True) -> Marks:
        """Kind and scores of each problem."""
        chosen = [i for i, item in enumerate(paper.items) if kind is None or item.kind == kind]
        prompts = [paper.prompts[i] for i in chosen]
        if not told:
            prompts = self._measure.learner.identified(prompts)
        answers = self._measure.answers(prompts, paper.longest)
        return [
            (paper.items[i].kind, scores(paper.items[i], answer)) for i, answer in zip(chosen, answers, strict=True)
        ]


def readings(asked: Marks, plain: Marks) -> dict[str, dict[str, str]]:
    """By kind, a "1" or "0" for each problem in order, in each reading of its answers: "exact", "stated", "plain".

    Args:
        asked: marks of the problems as they are asked.
        plain: marks of those in the wording of pretraining; all of a kind, or none of it, which leaves "plain" out.
    """
    found: dict[str, dict[str, str]] = {}
    for marks, names in ((asked, {"exact": "exact_match", "stated": "stated"}), (plain, {"plain": "exact_match"})):
        for kind, mark in marks:
            own = found.setdefault(kind, {})
            for reading, score in names.items():
                own[reading] = own.get(reading, "") + ("1" if mark[score] else "0")
    return found


def _ids(row: Example) -> Any:
    assert row.x is not None
    return row.x


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _summary(marks: Marks) -> dict[str, Any]:
    right = sum(mark["exact_match"] for _, mark in marks)
    return {
        "rows": len(marks),
        "exact_match": right / len(marks),
        "interval": list(wilson(int(right), len(marks))),
        "stated": sum(mark["stated"] for _, mark in marks) / len(marks),
    }


def _by_kind(marks: Marks) -> dict[str, dict[str, Any]]:
    kinds: dict[str, list[Mapping[str, float]]] = {}
    for kind, mark in marks:
        kinds.setdefault(kind, []).append(mark)
    return {
        kind: {
            "rows": len(found),
            **{name: sum(mark[name] for mark in found) / len(found) for name in ("exact_match", "stated")},
        }
        for kind, found in kinds.items()
    }
