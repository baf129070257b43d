"""Hidden states of a frozen backbone: worked out once a row, and held in memory as they were computed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from perdure.jax.rows import Batch, Row, collate

Tell = Callable[[int, int], None]


class HiddenStates:
    """The hidden states of token rows under one backbone that is not trained.

    Args:
        forward: ids [B, T] to hidden states [B, T, D].
        size: rows of a forward pass, B.
        length: least tokens of a row in it, T.
    """

    def __init__(self, forward: Callable[[np.ndarray], np.ndarray], size: int, length: int) -> None:
        self._forward, self._size, self._length = forward, size, length
        self._rows: dict[tuple[int, ...], np.ndarray] = {}  # each [T, D]

    def fill(self, rows: Iterable[Row], tell: Tell = lambda done, of: None) -> int:
        """Have the states of all these rows; how many had to be worked out.

        The same rows give the same bits, in whatever order they are given.
        """
        missing = sorted({row.ids for row in rows} - self._rows.keys(), key=lambda ids: (len(ids), ids))
        if not missing:
            return 0
        length = max(self._length, rounded(len(missing[-1])))
        for start in range(0, len(missing), self._size):
            part = missing[start : start + self._size]
            batch = collate([Row("", ids, 0.0) for ids in part], [1.0] * len(part), self._size, length)
            states = self._forward(batch.ids)
            for ids, each in zip(part, states, strict=False):
                self._rows[ids] = each[: len(ids)].copy()
            tell(min(start + self._size, len(missing)), len(missing))
        return len(missing)

    def into(self, batch: Batch, rows: Sequence[Row]) -> Batch:
        """The batch of these rows with hidden states [B, T, D] in the place of ids; zeros where a row has ended."""
        self.fill(rows)
        first = self._rows[rows[0].ids]
        states = np.zeros((*batch.ids.shape, first.shape[-1]), first.dtype)
        for i, row in enumerate(rows):
            states[i, : len(row.ids)] = self._rows[row.ids]
        return batch._replace(ids=states)


def rounded(length: int) -> int:
    """The next multiple of 8, so that lengths that differ a little share what is compiled."""
    return -(-length // 8) * 8
