"""Which of a task's rows are chosen: all of them in the order of a policy, and a share of such an order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.memory.buffer import name_of
from perdure.memory.policies import POLICIES, Facts, Policy, policy_of
from perdure.memory.size import count_tokens
from perdure.order import prioritiser
from perdure.types import Example

__all__ = ["POLICIES", "Policy", "at_least_one", "exact_share", "first", "order", "policy_of"]

Unit = Literal["examples", "tokens"]


def order(
    rows: Sequence[Example],
    policy: str,
    *,
    seed: int,
    draw: int = 0,
    field: str = "level",
    losses: Mapping[str, float] | None = None,
    learnt: Mapping[str, float] | None = None,
    features: Tensor | None = None,
    limit: int | None = None,
) -> list[Example]:
    """A task's rows in the order of a policy, the first chosen first: any prefix of it is a selection.

    The order does not depend on that of the rows. Ties are broken by the keyed priority of (seed, draw, task, key).

    Args:
        rows: N rows.
        policy: a name in `POLICIES`, or "mixed:NAME".
        seed: of random orders and of ties.
        draw: another number gives other random orders and ties.
        field: the column of `Example.fields` that says how difficult a row is.
        losses: each row's loss now, by `perdure.memory.buffer.name_of(row)`.
        learnt: each row's loss when it had been learnt, by the same name.
        features: float [N, D], in the order of the rows.
        limit: how many rows will be used; `diverse` and `herding` stop there, and the others follow in keyed order.

    Raises:
        ConfigError: an unknown policy; what it needs is missing, or is no finite number for some row.
    """
    chosen = policy_of(policy)
    if not rows:
        return []
    canonical = _keyed(rows, seed, draw)
    ordered = [rows[i] for i in canonical]
    facts = Facts(
        ordered,
        field,
        _values(chosen, "losses", losses, ordered),
        _values(chosen, "learnt", learnt, ordered),
        _features(chosen, features, rows)[canonical],
        prioritiser(seed, "select group", draw),
        len(rows) if limit is None else min(limit, len(rows)),
    )
    return [ordered[i] for i in dict.fromkeys([*chosen.rank(facts), *range(len(rows))])]


def first(ordered: Sequence[Example], share: float, unit: Unit = "examples") -> list[Example]:
    """The first rows of an order, up to a share of it; at least one row.

    In examples the first ⌊share·n⌋ of n rows. In tokens the prefix with the number of learnt tokens nearest to
    share times that of all rows, of two equally near ones the shorter.

    Args:
        ordered: rows in the order of a policy.
        share: above 0, at most 1; counts as the decimal that is written.
        unit: "examples", or "tokens", which are targets: a row without token labels counts 1.

    Raises:
        ConfigError: for a share out of range, or another unit.
    """
    exact = exact_share(share)
    if unit == "examples":
        return list(ordered[: at_least_one(exact, len(ordered))])
    if unit != "tokens":
        raise ConfigError(f'unit must be "examples" or "tokens", got {unit!r}')
    sizes = [count_tokens(row) for row in ordered]
    wanted, total = exact * sum(sizes), 0
    best, nearest = 0, None
    for length, size in enumerate(sizes, start=1):
        total += size
        if nearest is None or abs(total - wanted) < nearest:
            best, nearest = length, abs(total - wanted)
    return list(ordered[:best])


def exact_share(share: float) -> Fraction:
    """A share in (0, 1] as the decimal that was written: 0.29 as a float times 100 is below 29.

    Raises:
        ConfigError: for anything else.
    """
    good = isinstance(share, int | float) and not isinstance(share, bool) and 0 < share <= 1
    if not good:
        raise ConfigError(f"a share of the rows must be above 0 and at most 1, got {share!r}")
    return Fraction(repr(float(share)))


def at_least_one(share: Fraction, num_rows: int) -> int:
    """⌊share · num_rows⌋, but at least 1."""
    return max(1, int(share * num_rows))


def _keyed(rows: Sequence[Example], seed: int, draw: int) -> list[int]:
    ranks = {task: prioritiser(seed, "select", draw, task) for task in {row.task for row in rows}}
    return sorted(range(len(rows)), key=lambda i: (ranks[rows[i].task](rows[i].key), name_of(rows[i])))


def _values(
    policy: Policy, need: str, given: Mapping[str, float] | None, rows: Sequence[Example]
) -> Sequence[float]:
    if need not in policy.needs:
        return ()
    what = "the loss of each row" + (" when it had been learnt" if need == "learnt" else "")
    if given is None:
        raise ConfigError(f"policy {policy.name!r} goes by {what}: give {need}, a mapping from name_of(row) to it")
    found = []
    for row in rows:
        value = given.get(str(name_of(row)))
        if value is None:
            raise ConfigError(
                f"policy {policy.name!r} goes by {what}, and {need} has none for row {row.key!r} of task "
                f"{row.task!r}"
            )
        if not math.isfinite(value):
            raise ConfigError(
                f"policy {policy.name!r}: in {need} row {row.key!r} of task {row.task!r} has {value}, which cannot "
                "be put in order"
            )
        found.append(float(value))
    return found


def _features(policy: Policy, given: Tensor | None, rows: Sequence[Example]) -> Tensor:
    if "features" not in policy.needs:
        return torch.zeros(len(rows), 0, dtype=torch.float64)
    if given is None or given.dim() != 2 or len(given) != len(rows):
        shape = "none" if given is None else list(given.shape)
        raise ConfigError(
            f"policy {policy.name!r} goes by what rows look like: give features, a tensor [{len(rows)}, D], got "
            f"{shape}"
        )
    found = given.detach().to("cpu", torch.float64)
    strange = (~found.isfinite().all(1)).nonzero().flatten().tolist()
    if strange:
        row = rows[strange[0]]
        raise ConfigError(
            f"policy {policy.name!r}: the features of row {row.key!r} of task {row.task!r} are not all finite"
        )
    return found
