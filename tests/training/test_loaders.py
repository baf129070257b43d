"""DataLoaders, Datasets and lists to examples: what is read, in what order, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from perdure.errors import ConfigError, DataError
from perdure.training.loaders import GivenSource, read_rows, read_source
from perdure.training.loop import KeyedSource, Source, total_steps
from perdure.types import Example, Phase

X, Y = torch.arange(14.0).view(7, 2), torch.tensor([0, 1, 0, 1, 0, 1, 0])
PAIRS = TensorDataset(X, Y)


def firsts(source: Source, epoch: int = 0) -> list[list[float]]:
    """The first value of every row's x, by batch."""
    return [[float(row.x[0]) for row in rows] for rows in source.batches(0, epoch) if rows[0].x is not None]


def flat(batches: list[list[float]]) -> list[float]:
    return [value for batch in batches for value in batch]


ALL = [float(x) for x in X[:, 0]]


@pytest.mark.parametrize(
    "data",
    [
        PAIRS,
        [(x, y) for x, y in zip(X, Y, strict=True)],
        [{"x": x, "y": y} for x, y in zip(X, Y, strict=True)],
        [{"input_ids": x.tolist(), "label": int(y)} for x, y in zip(X, Y, strict=True)],
        [Example("", x=x, y=y) for x, y in zip(X, Y, strict=True)],
        DataLoader(PAIRS, batch_size=3, shuffle=True),
    ],
    ids=["dataset", "pairs", "mappings", "plain values", "examples", "loader"],
)
def test_all_rows_are_read_in_their_own_order(data: Any) -> None:
    rows = read_rows(data, "t", "classification")
    assert torch.equal(torch.stack([row.x for row in rows if row.x is not None]), X)
    assert torch.equal(torch.stack([row.y for row in rows if row.y is not None]), Y)
    assert {row.task for row in rows} == {"t"}
    assert len({row.key for row in rows}) == 7


def test_keys_are_content_or_given_and_equal_rows_differ() -> None:
    """A row's key does not depend on where it stands; a second equal row gets one of its own."""
    pairs = [(X[0], Y[0]), (X[1], Y[1]), (X[0], Y[0])]
    keys = [row.key for row in read_rows(pairs, "t", "classification")]
    assert keys[2] == f"{keys[0]}#1"
    assert [row.key for row in read_rows(pairs[:2][::-1], "t", "classification")] == keys[:2][::-1]
    assert read_rows([(X[0], Y[1])], "t", "classification")[0].key not in keys
    named = [{"id": 7, "x": X[0], "y": Y[0]}, {"key": "k", "x": X[0], "y": Y[0]}]
    assert [row.key for row in read_rows(named, "t", "classification")] == ["7", "k"]


def test_a_loaders_batch_size_shuffle_and_drop_last_count() -> None:
    _, source = read_source(DataLoader(PAIRS, batch_size=3), "t", "classification", 99, 0)
    assert firsts(source) == [ALL[:3], ALL[3:6], ALL[6:]]
    _, source = read_source(DataLoader(PAIRS, batch_size=3, drop_last=True), "t", "classification", 99, 0)
    assert firsts(source) == [ALL[:3], ALL[3:6]]
    assert len(source) == 2
    assert total_steps(source, [Phase("a", 2), Phase("b", 3)]) == 10
    _, source = read_source(PAIRS, "t", "classification", 2, 0)
    assert [len(batch) for batch in firsts(source)] == [2, 2, 2, 1]


def test_a_shuffled_order_follows_from_seed_task_and_epoch_alone() -> None:
    def order(seed: int = 0, task: str = "t", epoch: int = 0) -> list[float]:
        torch.manual_seed(int(torch.randint(1000, ())))
        _, source = read_source(DataLoader(PAIRS, batch_size=3, shuffle=True), task, "classification", 99, seed)
        assert isinstance(source, KeyedSource)
        return flat(firsts(source, epoch))

    assert order() == order()
    assert sorted(order()) == ALL
    assert len({tuple(o) for o in (order(), order(seed=1), order(task="u"), order(epoch=1))}) == 4


def test_reading_draws_no_random_number() -> None:
    before = torch.get_rng_state()
    _, source = read_source(DataLoader(PAIRS, batch_size=3, shuffle=True), "t", "classification", 99, 0)
    firsts(source)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_collate_function_is_applied_to_each_row() -> None:
    def doubled(rows: list[Any]) -> dict[str, Any]:
        return {"x": torch.stack([x for x, _ in rows]) * 2, "labels": torch.stack([y for _, y in rows])}

    loader = DataLoader(PAIRS, batch_size=3, collate_fn=doubled)
    rows, source = read_source(loader, "t", "classification", 99, 0)
    assert torch.equal(torch.stack([row.x for row in rows if row.x is not None]), 2 * X)
    assert firsts(source)[1] == [2 * value for value in ALL[3:6]]


class Streamed(IterableDataset[Any]):
    """Rows that come one after another."""

    def __iter__(self) -> Iterator[Any]:
        return iter(PAIRS)


COLLATIONS = {
    "default": None,
    "as they are": lambda rows: rows,
    "columns": lambda rows: tuple(zip(*rows, strict=True)),
    "mappings": lambda rows: [{"x": x, "y": y} for x, y in rows],
    "two stacks": lambda rows: [torch.stack(column) for column in zip(*rows, strict=True)],
}


@pytest.mark.parametrize("collate", COLLATIONS.values(), ids=COLLATIONS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_given_batch_is_split_into_its_rows_however_it_was_collated(collate: Any, size: int) -> None:
    """Two rows of two look like two columns of two: which they are is told by what they are made of."""
    loader = DataLoader(Streamed(), batch_size=size, collate_fn=collate)
    rows, source = read_source(loader, "t", "classification", 99, 0)
    assert isinstance(source, GivenSource)
    assert torch.equal(torch.stack([row.x for row in rows if row.x is not None]), X)
    assert [int(row.y) for row in rows if row.y is not None] == Y.tolist()
    assert flat(firsts(source)) == flat(firsts(source, 1)) == ALL
    assert len(firsts(source)[0]) == size


def test_a_sampler_of_ones_own_runs_as_it_is() -> None:
    sampler = WeightedRandomSampler([0, 0, 1, 0, 0, 0, 0], num_samples=4)
    loader = DataLoader(PAIRS, batch_size=2, sampler=sampler)
    rows, source = read_source(loader, "t", "classification", 99, 0)
    assert isinstance(source, GivenSource)
    assert firsts(source) == [[4.0, 4.0], [4.0, 4.0]]
    assert len(source) == 2
    assert len({row.key for row in rows}) == 4


def test_a_stream_without_length_is_refused_where_a_length_is_needed() -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(PAIRS)

        def __len__(self) -> int:
            raise TypeError

    source = GivenSource(DataLoader(Endless(), batch_size=2), "t", "classification")
    with pytest.raises(ConfigError, match="the loader's length is unknown, and this schedule needs it"):
        len(source)


def test_causal_lm_rows_lose_their_padding_and_learn_everything_by_default() -> None:
    rows = read_rows(
        [
            {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 6, 7]},
            {"input_ids": [8, 9]},
        ],
        "t",
        "causal_lm",
    )
    assert [row.x.tolist() for row in rows if row.x is not None] == [[5, 6, 7], [8, 9]]
    assert [row.y.tolist() for row in rows if row.y is not None] == [[-100, 6, 7], [8, 9]]


class Nameless(Dataset[Any]):
    """Has no length."""

    def __getitem__(self, index: int) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    ("data", "objective", "words"),
    [
        ([], "classification", "task 't': there are no rows"),
        (Nameless(), "classification", "give a DataLoader, a Dataset with a length, or a list; got Nameless"),
        (5, "classification", "got int"),
        ([(1, 2, 3)], "classification", "a row must be a pair"),
        ([{"x": 1}], "classification", r"got dict with \['x'\]"),
        (TensorDataset(X), "classification", "a row must be a pair"),
        ([([1, 2], [1, 2, 3])], "causal_lm", r"of one length; got \(2,\) and \(3,\)"),
        ([([[1, 2]], [[1, 2]])], "causal_lm", "of one length"),
        ([([1, 2], [1, -100])], "causal_lm", "a causal_lm row has no target: every label is -100"),
    ],
)
def test_what_is_no_row_is_refused_in_words(data: Any, objective: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_rows(data, "t", objective)


@pytest.mark.parametrize("how", ["sampler", "batch sampler"])
def test_held_out_rows_are_those_that_a_loaders_sampler_gives(how: str) -> None:
    """One dataset split by samplers, as is common: the training rows must not be scored as held out."""
    sampler = SubsetRandomSampler([5, 6])
    loader: DataLoader[Any] = (
        DataLoader(PAIRS, batch_size=2, sampler=sampler)
        if how == "sampler"
        else DataLoader(PAIRS, batch_sampler=BatchSampler(sampler, 2, drop_last=False))
    )
    rows = read_rows(loader, "t", "classification")
    assert sorted(float(row.x[0]) for row in rows if row.x is not None) == ALL[5:]


def test_a_loader_that_would_train_nothing_is_refused() -> None:
    """Seven rows and drop_last leave no batch of eight; a generator is empty the second time."""
    with pytest.raises(DataError, match="its 7 rows do not fill one batch of 8, and drop_last leaves out"):
        read_source(DataLoader(PAIRS, batch_size=8, drop_last=True), "t", "classification", 99, 0)

    class Once(IterableDataset[Any]):
        left = iter(PAIRS)

        def __iter__(self) -> Iterator[Any]:
            return self.left

    _, source = read_source(DataLoader(Once(), batch_size=2), "t", "classification", 99, 0)
    with pytest.raises(DataError, match="'t': the loader gave no rows in epoch 1"):
        firsts(source)
