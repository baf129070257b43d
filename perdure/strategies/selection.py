"""Which kept rows are replayed: a policy with what it goes by, and what it chose for a pass.

The policies themselves know no model: they are in `perdure.memory.policies`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from perdure.errors import ConfigError, StrategyError
from perdure.memory import Buffer
from perdure.memory.buffer import name_of
from perdure.memory.select import at_least_one, exact_share, first, order, policy_of
from perdure.strategies.measure import Measure, checked, row_features, row_losses
from perdure.strategies.quota import Unit, find
from perdure.types import Context, Example

__all__ = ["LEARNT", "Selection", "Selector", "row_losses"]

# Where a row's loss when it had been learnt is kept, in its extras.
LEARNT = "learnt_loss"


class Selector:
    """A policy with what it goes by.

    Args:
        strategy: whose errors these are.
        policy: a name in `perdure.memory.POLICIES`, or "mixed:NAME".
        field: the column of difficulty.
        share: of the kept rows of each task that is chosen anew for each pass; None: rows are chosen once, when
            their task ends.
        unit: what the share counts.

    Raises:
        StrategyError: an unknown policy, a share out of range, or "surprise" where rows are chosen once.
    """

    def __init__(self, strategy: str, policy: str, field: str, share: float | None, unit: Unit) -> None:
        self._strategy, self._policy, self._field, self._unit = strategy, policy, field, unit
        self._share = share
        try:
            self._needs = policy_of(policy).needs
        except ConfigError as error:
            raise StrategyError(f"{strategy}: select: {error}") from error
        try:
            self._exact = exact_share(1 if share is None else share)
        except ConfigError as error:
            raise StrategyError(f"{strategy}: resample: {error}") from error
        if share is None and "learnt" in self._needs:
            raise StrategyError(
                f"{strategy}: select {policy!r} goes by how much a loss has risen, and right after learning none "
                "has; give resample, the share of the kept rows that is chosen anew for each pass"
            )

    @property
    def wants_learnt(self) -> bool:
        """Whether the loss of a row when it had been learnt must be kept with it."""
        return "learnt" in self._needs

    def check(self, rows: Sequence[Example], is_first: bool) -> None:
        """Before rows are trained on: StrategyError where they lack the column that the policy goes by.

        A later task may lack it altogether: its rows are then taken in random order.
        """
        if self._needs == {"field"} and (is_first or not self._have_no_column(rows)):
            self._order(rows, self._policy, 0)

    def _have_no_column(self, rows: Sequence[Example]) -> bool:
        def can(row: Example) -> bool:
            try:
                return bool(order([row], self._policy, seed=0, field=self._field))
            except ConfigError:
                return False

        return self._needs == {"field"} and not any(map(can, rows))

    def check_held(self, held: Buffer) -> None:
        """StrategyError where rows that were kept elsewhere lack the loss that the policy goes by."""
        bare = [row.key for row in held if self.wants_learnt and LEARNT not in row.extras]
        if bare:
            raise StrategyError(
                f"{self._strategy}: the buffer holds rows without the loss when they had been learnt ({bare[0]!r} "
                "is one); start with an empty one"
            )

    def order(
        self, ctx: Context, rows: Sequence[Example], measure: Measure, draw: int = 0, limit: int | None = None
    ) -> list[Example]:
        """A task's rows in the policy's order, under the model as it is."""
        facts: dict[str, Any] = {}
        if "losses" in self._needs and rows:
            facts["losses"] = checked(self._strategy, rows, measure(ctx, rows))
        if self.wants_learnt:
            facts["learnt"] = {str(name_of(row)): row.extras[LEARNT] for row in rows}
        if "features" in self._needs and rows:
            facts["features"] = row_features(ctx, rows)
        policy = "random" if self._have_no_column(rows) else self._policy
        return self._order(rows, policy, ctx.seed, draw=draw, limit=limit, **facts)

    def _order(self, rows: Sequence[Example], policy: str, seed: int, **given: Any) -> list[Example]:
        try:
            return order(rows, policy, seed=seed, field=self._field, **given)
        except ConfigError as error:
            raise StrategyError(f"{self._strategy}: {error}") from error

    def choose(self, ctx: Context, held: Buffer, measure: Measure, draw: int) -> list[Example]:
        """The share of each task's kept rows that is best now."""
        assert self._share is not None
        tasks: dict[str, list[Example]] = {}
        for row in held:
            tasks.setdefault(row.task, []).append(row)
        found: list[Example] = []
        for rows in tasks.values():
            limit = at_least_one(self._exact, len(rows)) if self._unit == "examples" else None
            found += first(self.order(ctx, rows, measure, draw, limit), self._share, self._unit)
        return found


class Selection:
    """What was chosen for the pass that goes on now.

    Args:
        num_draws: how many draws a step takes from it, each of which goes through it on its own.
    """

    def __init__(self, num_draws: int) -> None:
        self._num_draws = num_draws
        self._number = 0
        self._names: list[str] = []
        self._given = [0] * num_draws
        self._rows: list[Example] | None = None

    def begin(self) -> None:
        """Count passes afresh for a task."""
        self.restore((0, [], [0] * self._num_draws))

    def at(self, number: int, held: Buffer, choose: Callable[[int], list[Example]]) -> list[Example]:
        """The rows of a pass, chosen now if it is a new one; a draw that lags behind gets the newest.

        Args:
            number: of the pass, from 1.
            held: where rows that were chosen before are found again.
            choose: from the number of a pass to its rows.
        """
        if number > self._number:
            self._rows = choose(number)
            self._names = [str(name_of(row)) for row in self._rows]
            self._number, self._given = number, [0] * self._num_draws
        elif self._rows is None:
            self._rows = find(held, self._names)
        return self._rows

    def current(self, draw: int, held: Buffer, choose: Callable[[int], list[Example]]) -> list[Example]:
        """The rows for a step that draws at random; after as many draws as there are rows they are chosen anew."""
        return self.at(self._number + (self._given[draw] >= len(self._names)), held, choose)

    def keep_to(self, held: Buffer) -> None:
        """Leave what has had to leave the memory since it was chosen."""
        names = {str(name_of(row)) for row in held}
        if not names.issuperset(self._names):
            self._names = [name for name in self._names if name in names]
            self._rows = None

    def count(self, draw: int, num_rows: int) -> None:
        """Take note that so many rows were drawn."""
        self._given = [given + num_rows * (i == draw) for i, given in enumerate(self._given)]

    def state(self) -> list[Any]:
        """The number of the pass, the names of its rows, and how many were drawn in it."""
        return [self._number, self._names, self._given]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from there."""
        self._number, self._names, self._given = state
        self._rows = None
