"""The rules by which rows are chosen: from what is known of a task's rows to their order.

Knows no model: losses and features are measured elsewhere.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConfigError, unknown_name
from perdure.types import Example

MIXED = "mixed"
_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a policy may go by; the rows stand in keyed random order, so that of equals the first comes first.

    Attributes:
        rows: N rows.
        field: the column of difficulty.
        losses: the loss of each row now.
        learnt: the loss of each row when it had been learnt.
        features: float64 [N, D].
        group_rank: the keyed place of a group.
        limit: how many rows are wanted, N at most.
    """

    rows: Sequence[Example]
    field: str
    losses: Sequence[float]
    learnt: Sequence[float]
    features: Tensor
    group_rank: Callable[[str], int]
    limit: int


@dataclass(frozen=True, slots=True)
class Policy:
    """A rule that puts a task's rows in order, the first chosen first.

    Attributes:
        name: as in settings.
        summary: one line for `perdure list policies`.
        needs: what it goes by: of "field", "losses", "learnt" and "features".
        rank: from facts to positions of rows in order. It may stop at the limit: the others follow in keyed order.
    """

    name: str
    summary: str
    needs: frozenset[str]
    rank: Callable[[Facts], Iterable[int]]


def policy_of(name: str) -> Policy:
    """The policy of that name: one of `POLICIES`, or "mixed:NAME".

    Raises:
        ConfigError: there is none of that name.
    """
    head, colon, inner = str(name).partition(":")
    if head == MIXED and colon and inner in POLICIES and inner != MIXED:
        return _mixed(POLICIES[inner])
    if name not in POLICIES:
        raise ConfigError(
            unknown_name("policy", str(name), POLICIES) + f" {MIXED}:NAME alternates NAME with random rows."
        )
    return POLICIES[name]


def _in_order(keys: Sequence[Any]) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__)


def _random(facts: Facts) -> Sequence[int]:
    return range(len(facts.rows))


def _difficulty(sign: int) -> Callable[[Facts], list[int]]:
    def rank(facts: Facts) -> list[int]:
        levels = [_level(row, facts.field) for row in facts.rows]
        if all(level is None for level in levels):
            raise ConfigError(
                f"no row of task {facts.rows[0].task!r} has a number in its column {facts.field!r}, to tell its "
                "difficulty by"
            )
        return _in_order([(level is None, sign * (level or 0.0)) for level in levels])

    return rank


def _level(row: Example, field: str) -> float | None:
    if field not in row.fields:
        raise ConfigError(
            f"row {row.key!r} of task {row.task!r} has no column {field!r} to tell its difficulty by; its columns "
            f"are: {', '.join(map(str, row.fields)) or 'none'}"
        )
    value = row.fields[field]
    if isinstance(value, str):
        found = _NUMBER.search(value)
        value = None if found is None else float(found[0])
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _by_loss(key: Callable[[float], float]) -> Callable[[Facts], list[int]]:
    return lambda facts: _in_order([key(loss) for loss in facts.losses])


def _surprise(facts: Facts) -> list[int]:
    # A loss that was measured beside other rows differs in its last digits: that is no rise.
    return _in_order([-round(now - before, 4) for now, before in zip(facts.losses, facts.learnt, strict=True)])


def _boundary(facts: Facts) -> list[int]:
    middle = median(facts.losses)
    return _in_order([abs(loss - middle) for loss in facts.losses])


def _balanced(facts: Facts) -> list[int]:
    labels = [_group(row, facts.field) for row in facts.rows]
    ranks = {label: (facts.group_rank(label), label) for label in set(labels)}
    counts = dict.fromkeys(ranks, 0)
    places = []
    for label in labels:
        places.append((counts[label], *ranks[label]))
        counts[label] += 1
    return _in_order(places)


def _group(row: Example, field: str) -> str:
    found = {column: row.fields[column] for column in ("type", field) if column in row.fields}
    if found:
        return json.dumps(found, sort_keys=True, default=str)
    raise ConfigError(
        f"row {row.key!r} of task {row.task!r} has neither a column 'type' nor {field!r} to balance by; its "
        f"columns are: {', '.join(map(str, row.fields)) or 'none'}"
    )


def _diverse(facts: Facts) -> Iterator[int]:
    points = facts.features  # [N, D]
    squares = points.square().sum(1)
    # N times the distance from the mean: sums of whole numbers stay exact, so that ties are ties.
    chosen = int((len(points) * points - points.sum(0)).square().sum(1).argmin())
    gaps = torch.full_like(squares, torch.inf)
    for _ in range(facts.limit):
        yield chosen
        gaps = torch.minimum(gaps, squares + squares[chosen] - 2 * (points @ points[chosen]))
        gaps[chosen] = -torch.inf
        chosen = int(gaps.argmax())


def _herding(facts: Facts) -> Iterator[int]:
    points, n = facts.features, len(facts.features)
    squares, total = points.square().sum(1), points.sum(0)
    left = torch.zeros_like(squares)
    held = torch.zeros_like(total)
    for k in range(1, facts.limit + 1):
        # ‖(held + x)/k − total/n‖², times k²·n, less what is the same for all x.
        scores = n * squares - 2 * (points @ (k * total - n * held)) + left
        chosen = int(scores.argmin())
        yield chosen
        held = held + points[chosen]
        left[chosen] = torch.inf


def _mixed(best: Policy) -> Policy:
    def rank(facts: Facts) -> list[int]:
        everything = range(len(facts.rows))
        queues = iter(everything), iter(dict.fromkeys([*best.rank(facts), *everything]))
        taken: dict[int, None] = {}
        for turn in everything:
            taken[next(place for place in queues[turn % 2] if place not in taken)] = None
        return list(taken)

    return Policy(f"{MIXED}:{best.name}", f"a random row, then the next of {best.name}, in turn", best.needs, rank)


_RULES: tuple[tuple[str, str, str, Callable[[Facts], Iterable[int]]], ...] = (
    ("random", "a keyed random order", "", _random),
    ("difficulty_hard", "the highest level first; rows without one last", "field", _difficulty(-1)),
    ("difficulty_easy", "the lowest level first; rows without one last", "field", _difficulty(1)),
    ("loss_descending", "the largest loss first", "losses", _by_loss(lambda loss: -loss)),
    ("loss_ascending", "the smallest loss first", "losses", _by_loss(lambda loss: loss)),
    ("balanced", "types and levels in turn; random rows of each", "field", _balanced),
    ("diverse", "greedy k-centre: always the row farthest from those chosen", "features", _diverse),
    ("herding", "always the row that brings the mean of the chosen nearest to that of all", "features", _herding),
    ("surprise", "the largest rise of the loss since the row was learnt first", "losses learnt", _surprise),
    ("boundary", "the loss nearest to the median first", "losses", _boundary),
)
POLICIES: dict[str, Policy] = {
    name: Policy(name, summary, frozenset(needs.split()), rank) for name, summary, needs, rank in _RULES
}
"""The policies by name. "mixed" stands for mixed:loss_descending; any other may stand behind the colon."""
POLICIES[MIXED] = _mixed(POLICIES["loss_descending"])
