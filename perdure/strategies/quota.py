"""How many kept rows go into each step, and which come next: a ratio, or every row once an epoch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from fractions import Fraction
from typing import Any, Literal

from perdure.memory import Buffer
from perdure.memory.buffer import name_of
from perdure.order import arrange
from perdure.types import Example

Unit = Literal["examples", "tokens"]


class Quota:
    """How much of the memory goes into each step, so that the sum over steps is exact.

    In examples, ⌊ratio · n⌋ rows were drawn after n new ones. In tokens (targets), rows are drawn as long as fewer
    than ratio · n targets were, so that the sum is at most one row ahead; no row is passed over for its length.

    Args:
        ratio: above 0; counts as the decimal that is written.
        unit: "examples" or "tokens".
    """

    def __init__(self, ratio: float, unit: Unit = "examples") -> None:
        # 0.29 as a float times 100 is below 29; the decimal that was written is meant.
        self._ratio = Fraction(repr(float(ratio)))
        self._unit = unit
        self.new = 0
        self.drawn = 0

    def draw(
        self,
        sample: Callable[[int], list[Example]],
        new: Sequence[Example],
        count: Callable[[Example], int],
    ) -> list[Example]:
        """What goes with these new rows.

        Args:
            sample: draws so many rows, or all where there are fewer; these are then gone through more than once.
            new: new rows of a step.
            count: how many targets a row holds.
        """
        rows: list[Example] = []
        if self._unit == "examples":
            self.new += len(new)
            while len(rows) < int(self._ratio * self.new) - self.drawn:
                rows += sample(int(self._ratio * self.new) - self.drawn - len(rows))
            self.drawn += len(rows)
            return rows
        self.new += sum(map(count, new))
        while self.drawn < self._ratio * self.new:
            for row in sample(max(len(new), 1)):
                if self.drawn >= self._ratio * self.new:
                    break
                rows.append(row)
                self.drawn += max(count(row), 1)  # a row that teaches nothing must not be drawn without end
        return rows

    def begin(self, num_new: int, *context: Hashable) -> None:
        """Count afresh for a task."""
        self.restore((0, 0))

    def state(self) -> list[Any]:
        """The two counts."""
        return [self.new, self.drawn]

    def restore(self, state: Sequence[Any]) -> None:
        """Count as then."""
        self.new, self.drawn = state


class Once:
    """Every row to be replayed exactly once for each pass over the task's new rows, spread evenly.

    After n of N new rows ⌊n · m / N⌋ of m rows were drawn, and after N all of them. Each pass goes in a new keyed
    order. Where the batches of an epoch leave rows out, a pass goes on in the next epoch.
    """

    def __init__(self) -> None:
        self._num_new = 1
        self._context: tuple[Hashable, ...] = ()
        self._passes = self._new = self._drawn = 0
        self._names: list[str] = []
        self._rows: list[Example] | None = None

    def begin(self, num_new: int, *context: Hashable) -> None:
        """Count afresh for a task.

        Args:
            num_new: N, the task's rows.
            context: of the keyed orders.
        """
        self._num_new = max(1, num_new)
        self._context = context
        self.restore((0, 0, 0, []))

    def draw(self, rows_of: Callable[[int], Sequence[Example]], num_new: int, held: Buffer) -> list[Example]:
        """What goes with so many new rows.

        Args:
            rows_of: from the number of a pass, 1 or more, to what is replayed in it; asked when the pass begins.
            num_new: new rows of a step.
            held: where rows of a pass that was begun before are found again.
        """
        found: list[Example] = []
        while num_new:
            if not self._passes or self._new == self._num_new:
                self._next_pass(rows_of)
            elif self._rows is None:
                self._rows = find(held, self._names)
            assert self._rows is not None
            step = min(num_new, self._num_new - self._new)
            num_new -= step
            self._new += step
            due = self._new * len(self._rows) // self._num_new
            found += self._rows[self._drawn : due]
            self._drawn = due
        return found

    def _next_pass(self, rows_of: Callable[[int], Sequence[Example]]) -> None:
        number = self._passes + 1
        self._rows = arrange(rows_of(number), *self._context, number, key=lambda row: str(name_of(row)))
        self._names = [str(name_of(row)) for row in self._rows]
        self._passes, self._new, self._drawn = number, 0, 0

    def state(self) -> list[Any]:
        """The number of the pass, the counts in it, and the names of its rows in order."""
        return [self._passes, self._new, self._drawn, self._names]

    def restore(self, state: Sequence[Any]) -> None:
        """Go on from there."""
        self._passes, self._new, self._drawn, self._names = state
        self._rows = None


def find(held: Buffer, names: Sequence[str]) -> list[Example]:
    """The rows of these names."""
    rows = {str(name_of(row)): row for row in held}
    return [rows[name] for name in names]
