"""From a DataLoader, a Dataset or a list to examples and their order."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler, default_collate

from perdure.errors import ConfigError, DataError
from perdure.training.loop import KeyedSource, Source
from perdure.types import IGNORE, Example, Objective


class GivenSource:
    """Batches exactly as a DataLoader with a sampler of its own gives them, epoch by epoch.

    Its order cannot be asked for again, so such a task can be taken up at the start of an epoch only.
    """

    def __init__(self, loader: DataLoader[Any], task: str, objective: Objective) -> None:
        self._loader, self._task, self._objective = loader, task, objective

    def __len__(self) -> int:
        try:
            return len(self._loader)
        except TypeError as error:
            raise ConfigError(
                "the loader's length is unknown, and this schedule needs it: use a constant one, warm-up in steps"
            ) from error

    def batches(self, phase: int, epoch: int) -> Iterator[Sequence[Example]]:
        """One pass over the loader."""
        seen: Counter[str] = Counter()
        for batch in self._loader:
            yield _named(_split(batch, self._objective), self._task, seen)
        if not seen:
            raise DataError(
                f"task {self._task!r}: the loader gave no rows in epoch {epoch + 1}. It must hold some, and give "
                "them anew each time it is gone through (a generator gives them once)."
            )


def read_source(
    data: Any, task: str, objective: Objective, batch_size: int, seed: int
) -> tuple[list[Example], Source]:
    """All rows of a task, and the order in which they are trained on.

    A DataLoader says which dataset, batch size, shuffle flag and `collate_fn`; the order of shuffled rows follows
    from the seed and the rows' keys. A loader with a sampler of its own, or over an iterable dataset, runs as is.

    Args:
        data: a DataLoader, a map-style Dataset, or a sequence, of `(x, y)` pairs, of mappings with `input_ids` and
            `labels`, or of `Example`.
        task: the task's name.
        objective: what x and y must be.
        batch_size: where `data` is no DataLoader.
        seed: of the order.

    Raises:
        DataError: no rows, or rows of another shape.
    """
    if isinstance(data, DataLoader):
        if _chooses_rows(data) or data.batch_size is None:
            source = GivenSource(data, task, objective)
            return [row for batch in source.batches(0, 0) for row in batch], source
        assert data.batch_size is not None
        rows = read_rows(data, task, objective)
        shuffle = isinstance(data.sampler, RandomSampler)
        keyed = KeyedSource(rows, data.batch_size, seed, task, shuffle, data.drop_last)
        if not len(keyed):
            raise DataError(
                f"task {task!r}: its {len(rows)} rows do not fill one batch of {data.batch_size}, and drop_last "
                "leaves out what is not full. Give a smaller batch_size, or drop_last=False."
            )
        return rows, keyed
    rows = read_rows(data, task, objective)
    return rows, KeyedSource(rows, batch_size, seed, task)


def _chooses_rows(loader: DataLoader[Any]) -> bool:
    """Whether a loader gives other rows than its dataset's, each once: by a sampler of its own, or as a stream."""
    sampler = loader.sampler
    if isinstance(sampler, RandomSampler):
        chooses = bool(sampler.replacement or sampler._num_samples)
    else:
        chooses = not isinstance(sampler, SequentialSampler)
    own_batches = loader.batch_size is None and loader.batch_sampler is not None
    return chooses or own_batches or isinstance(loader.dataset, IterableDataset)


def read_rows(data: Any, task: str, objective: Objective) -> list[Example]:
    """All rows of a DataLoader, Dataset or sequence as examples; a loader with a sampler of its own is asked."""
    collate = None
    items: Any = data
    if isinstance(data, DataLoader):
        if _chooses_rows(data):
            rows = [row for batch in data for row in _split(batch, objective)]
            if not rows:
                raise DataError(f"task {task!r}: there are no rows")
            return _named(rows, task)
        items = data.dataset
        collate = None if data.collate_fn is default_collate else data.collate_fn
    try:
        count = len(items)
    except TypeError as error:
        raise DataError(
            f"task {task!r}: give a DataLoader, a Dataset with a length, or a list; got {type(data).__name__}"
        ) from error
    found = []
    for index in range(count):
        item = items[index]
        if collate is not None and not isinstance(item, Example):
            (example,) = _split(collate([item]), objective)
        else:
            example = _example(item, objective)
        found.append(example)
    if not found:
        raise DataError(f"task {task!r}: there are no rows")
    return _named(found, task)


def _split(batch: Any, objective: Objective) -> list[Example]:
    """A collated batch back to rows."""
    if isinstance(batch, Mapping):
        columns = {key: value for key, value in batch.items() if isinstance(value, Tensor | list | tuple)}
        size = len(next(iter(columns.values())))
        return [_example({key: value[i] for key, value in columns.items()}, objective) for i in range(size)]
    # Two rows of two values look like two columns of two: a list of tuples is rows, as `collate_fn=list` gives.
    rows = isinstance(batch[0], Example | Mapping) or (isinstance(batch, list) and isinstance(batch[0], tuple))
    if isinstance(batch, list | tuple) and len(batch) == 2 and not rows:
        return [_example((batch[0][i], batch[1][i]), objective) for i in range(len(batch[0]))]
    return [_example(item, objective) for item in batch]


def _example(item: Any, objective: Objective) -> Example:
    if isinstance(item, Example):
        return item
    key = None
    if isinstance(item, Mapping):
        key = item.get("key", item.get("id"))
        x = item.get("input_ids", item.get("x"))
        y = item.get("labels", item.get("label", item.get("y")))
        if y is None and objective == "causal_lm":
            y = x
    elif isinstance(item, list | tuple) and len(item) == 2:
        x, y = item
    else:
        x = y = None
    if x is None or y is None:
        raise DataError(
            "a row must be a pair (x, y), a mapping with input_ids and labels (or x and y), or an Example; "
            f"got {type(item).__name__}" + (f" with {sorted(item)}" if isinstance(item, Mapping) else "")
        )
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    if objective == "causal_lm":
        mask = item.get("attention_mask") if isinstance(item, Mapping) else None
        if mask is not None:
            real = torch.as_tensor(mask).bool()
            x, y = x[real], y[real]
        if x.shape != y.shape or x.dim() != 1:
            raise DataError(
                f"causal_lm rows need token ids and labels of one length; got {tuple(x.shape)} and {tuple(y.shape)}"
            )
        if not bool((y[1:] != IGNORE).any()):
            raise DataError("a causal_lm row has no target: every label is -100")
    return Example(key=str(key) if key is not None else _hash(x, y), x=x, y=y)


def _hash(x: Tensor, y: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for value in (x, y):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(rows: Sequence[Example], task: str, seen: Counter[str] | None = None) -> list[Example]:
    """The rows under the task's name; equal rows get keys of their own, since a loader gives each of them."""
    seen = Counter() if seen is None else seen
    named = []
    for row in rows:
        again = seen[row.key]
        seen[row.key] += 1
        named.append(row.but(task=task, key=f"{row.key}#{again}" if again else row.key))
    return named
