"""Which row each episode of an online stream brings: drift says of what kind, the curriculum how hard.

Every draw follows from the seed, the number of the episode and how often each row came: no generator is kept.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from perdure.errors import ConfigError, unknown_name
from perdure.order import arrange, priority, uniform
from perdure.types import Example

Drift = Literal["off", "blocks", "gradual"]
Curriculum = Literal["off", "easy-first", "competence"]
RECENT, ENOUGH = 5, 4  # of so many answers at the hardest level that is open, so many right ones open the next
LEVEL = "level"
Cell = tuple[str, int]  # kind and level


class Episodes:
    """The rows of an online stream, one an episode.

    Of the rows that an episode may bring, the one that came least often is drawn, and among equals the one with the
    smallest keyed priority: so that every row comes once before any comes again.

    Args:
        rows: the pool; a row's kind is its task, its level the column "level".
        episodes: how many there will be.
        seed: of every draw.
        drift: "off", any kind at any time; "blocks", one kind after another, in equal stretches; "gradual", each
            kind fades into the next.
        curriculum: "off", any level; "easy-first", one level after another in equal stretches of the stream (of a
            block, under drift in blocks); "competence", of each kind the levels up to the hardest that is open: the
            next one opens when 4 of the last 5 answers at that level were right before learning.
        kinds: their order; None: as they are met in the rows.
        group: so many episodes in a row bring the same kind, drawn group by group.

    Raises:
        ConfigError: an unknown name, no rows, or a level that is missing where a curriculum needs it.
    """

    def __init__(
        self,
        rows: Sequence[Example],
        episodes: int,
        seed: int,
        *,
        drift: Drift = "off",
        curriculum: Curriculum = "off",
        kinds: Sequence[str] | None = None,
        group: int = 1,
    ) -> None:
        for setting, value, known in (("drift", drift, Drift), ("curriculum", curriculum, Curriculum)):
            if value not in get_args(known):
                raise ConfigError(unknown_name(setting, value, get_args(known)))
        if not rows:
            raise ConfigError("an online stream needs at least one row")
        self.rows = tuple(rows)
        self.episodes, self.seed, self.drift, self.curriculum = episodes, seed, drift, curriculum
        self.kinds = tuple(kinds or dict.fromkeys(row.task for row in rows))
        self.done = 0
        self._group = group
        self._cells = {i: (row.task, _level(row, curriculum)) for i, row in enumerate(self.rows)}
        if missing := [kind for kind in self.kinds if kind not in {cell[0] for cell in self._cells.values()}]:
            raise ConfigError(f"an online stream has no row of kind {missing[0]!r}")
        self.levels = sorted({level for _, level in self._cells.values()})
        self._uses: dict[int, int] = {}
        self._open: dict[str, int] = {}
        self._recent: dict[str, deque[bool]] = {}
        self._begin()

    def _begin(self) -> None:
        lowest = {kind: min(cell[1] for cell in self._cells.values() if cell[0] == kind) for kind in self.kinds}
        self._open = lowest if self.curriculum == "competence" else dict.fromkeys(self.kinds, max(self.levels))
        self._recent = {kind: deque(maxlen=RECENT) for kind in self.kinds}
        self._uses = {}
        self._heaps: dict[Cell, list[tuple[int, int, int]]] = {}
        self._fill()

    def _fill(self) -> None:
        self._heaps = {}
        for i, cell in self._cells.items():
            if cell[0] in self.kinds:
                self._heaps.setdefault(cell, []).append(self._rank(i))
        for heap in self._heaps.values():
            heapq.heapify(heap)

    def _rank(self, i: int) -> tuple[int, int, int]:
        uses = self._uses.get(i, 0)
        return uses, priority(self.seed, "episode", uses, key=self.rows[i].key), i

    @property
    def num_blocks(self) -> int:
        """Stretches of one kind: one where kinds do not come in blocks."""
        return len(self.kinds) if self.drift == "blocks" else 1

    def block_of(self, episode: int) -> int:
        """The block that an episode, counted from 0, belongs to."""
        return min(episode * self.num_blocks // self.episodes, self.num_blocks - 1)

    def rows_of(self, block: int) -> list[Example]:
        """The rows that a block may bring."""
        return [row for row in self.rows if self.drift != "blocks" or row.task == self.kinds[block]]

    def next(self) -> Example:
        """The row of the next episode."""
        cells = self._allowed(self.done)
        best = min((self._heaps[cell][0], cell) for cell in cells)
        (_, _, i), cell = best
        self._uses[i] = self._uses.get(i, 0) + 1
        heapq.heapreplace(self._heaps[cell], self._rank(i))
        self.done += 1
        return self.rows[i]

    def answered(self, row: Example, right: bool) -> None:
        """Take note of whether the model's answer was right before it learnt from the row."""
        if self.curriculum != "competence":
            return
        kind, level = row.task, _level(row, self.curriculum)
        if level != self._open[kind]:
            return
        recent = self._recent[kind]
        recent.append(right)
        harder = [cell[1] for cell in self._heaps if cell[0] == kind and cell[1] > level]
        if sum(recent) >= ENOUGH and harder:
            self._open[kind] = min(harder)
            recent.clear()

    def _allowed(self, episode: int) -> list[Cell]:
        kinds = self._kinds_at(episode)
        if self.curriculum == "easy-first":
            wanted = self.levels[int(self._progress(episode) * len(self.levels))]
            # A kind that lacks the level brings its nearest easier one, or its easiest.
            levels = {kind: self._nearest(kind, wanted) for kind in kinds}
            return [(kind, levels[kind]) for kind in kinds]
        return [cell for cell in self._heaps if cell[0] in kinds and cell[1] <= self._open[cell[0]]]

    def _nearest(self, kind: str, wanted: int) -> int:
        own = sorted(level for other, level in self._heaps if other == kind)
        return max((level for level in own if level <= wanted), default=own[0])

    def _kinds_at(self, episode: int) -> list[str]:
        if self.drift == "blocks":
            return [self.kinds[self.block_of(episode)]]
        if self.drift == "gradual":
            # Between the middles of two kinds' times their shares change linearly.
            start = episode - episode % self._group
            place = start / max(self.episodes - 1, 1) * (len(self.kinds) - 1)
            first = min(int(place), len(self.kinds) - 1)
            draw = uniform(self.seed, "drift", key=str(episode // self._group))
            return [self.kinds[min(first + (draw < place - first), len(self.kinds) - 1)]]
        if self._group > 1:
            number, position = divmod(episode // self._group, len(self.kinds))
            return [arrange(self.kinds, self.seed, "group", number, key=str)[position]]
        return list(self.kinds)

    def _progress(self, episode: int) -> float:
        """How far the stream, or the block, has come: 0 to below 1."""
        if self.drift != "blocks":
            return min(episode / self.episodes, 1 - 1e-9)
        block = self.block_of(episode)
        first = -(-block * self.episodes // self.num_blocks)
        after = -(-(block + 1) * self.episodes // self.num_blocks)
        return min((episode - first) / max(after - first, 1), 1 - 1e-9)

    def state_dict(self) -> dict[str, Any]:
        """How many episodes there were, how often each row came, and what levels are open."""
        return {
            "done": self.done,
            "uses": {self.rows[i].key: uses for i, uses in sorted(self._uses.items())},
            "open": dict(self._open),
            "recent": {kind: list(recent) for kind, recent in self._recent.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._begin()
        places = {row.key: i for i, row in enumerate(self.rows)}
        self.done = state["done"]
        self._uses = {places[key]: uses for key, uses in state["uses"].items()}
        self._open |= state["open"]
        for kind, recent in state["recent"].items():
            self._recent[kind].extend(recent)
        self._fill()


def _level(row: Example, curriculum: str) -> int:
    value = row.fields.get(LEVEL)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if curriculum != "off":
        raise ConfigError(
            f"curriculum {curriculum}: row {row.key!r} has no whole number in its column {LEVEL!r}; leave the "
            "curriculum off, or give the column"
        )
    return 0
