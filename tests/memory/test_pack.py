"""Examples survive being laid end to end: shapes, types, order, and everything that is stored with them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.memory.pack import pack, unpack
from perdure.types import Example, Segment

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool,
]  # fmt: skip


def same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def there_and_back(examples: list[Example]) -> list[Example]:
    packed = pack(examples)
    plain = json.loads(json.dumps(packed["rows"]))
    return unpack({"rows": plain, "tensors": packed["tensors"]})


def check(examples: list[Example]) -> None:
    found = there_and_back(examples)
    assert len(found) == len(examples)
    for old, new in zip(examples, found, strict=True):
        assert same(old.x, new.x)
        assert same(old.y, new.y)
        for name in ("key", "task", "source", "group", "segments", "fields"):
            assert getattr(old, name) == getattr(new, name)
        assert list(old.extras) == list(new.extras)
        for name, value in old.extras.items():
            other = new.extras[name]
            assert same(value, other) if isinstance(value, Tensor) else value == other


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=rng) * 50
    return drawn > 0 if dtype == torch.bool else drawn.abs().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ragged_tensors_of_one_type(dtype: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(3,), (), (2, 4), (0,), (1, 1, 5), (7,), (0, 3)]
    check([Example(str(i), x=values(shape, dtype, i), y=torch.tensor(i)) for i, shape in enumerate(shapes)])


def test_types_mixed_among_the_rows() -> None:
    check(
        [
            Example(str(i), x=values((i % 5,), DTYPES[i % 8], i), y=values((), DTYPES[(i + 3) % 8], i + 99))
            for i in range(40)
        ]
    )


def test_extras_and_fields() -> None:
    def extras(i: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "logits": values((i, 3), torch.float16, i),
            "level": i,
            "none": None,
            "words": ["a", i],
        }
        if i % 2:
            found = {"x": values((2,), torch.float32, i + 50), **found, "picked": torch.tensor([i, -i])}
        return found

    check(
        [
            Example(
                str(i), "task", (Segment("question ü ", cut=True), Segment("answer", learn=True)),
                x=values((i + 1,), torch.float32, i), source="replay", group="g",
                extras=extras(i), fields={"type": "algebra", "level": i, "nested": {"a": [1.5, None]}},
            )
            for i in range(6)
        ]
    )  # fmt: skip


def test_rows_without_tensors_among_others() -> None:
    check([Example("a"), Example("b", x=torch.ones(2)), Example("c", y=torch.tensor(1)), Example("d")])


def test_nothing() -> None:
    assert there_and_back([]) == []


def test_few_tensors_however_many_rows() -> None:
    packed = pack([Example(str(i), x=torch.ones(i), y=torch.tensor(0)) for i in range(100)])
    assert set(packed["tensors"]) == {"x.float32", "y.int64"}
    assert packed["tensors"]["x.float32"].shape == (4950,)


def test_views_gradients_and_strides_are_left_behind() -> None:
    whole = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    (found,) = there_and_back([Example("a", x=whole.T)])
    assert found.x is not None
    assert torch.equal(found.x, whole.T.detach())
    assert not found.x.requires_grad


def test_what_is_unpacked_shares_no_memory() -> None:
    packed = pack([Example("a", x=torch.zeros(2)), Example("b", x=torch.zeros(2))])
    first, second = unpack(packed)
    assert first.x is not None
    assert second.x is not None
    first.x.add_(1)
    assert float(second.x.sum()) == 0
    assert float(packed["tensors"]["x.float32"].sum()) == 0
