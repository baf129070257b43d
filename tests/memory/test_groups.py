"""What a row's group is, for every kind of row; and what has none is refused in words."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError
from perdure.memory import BalancedBuffer, make_buffer
from perdure.memory.groups import class_of, group_of
from perdure.types import Example, Segment


def filled(cls: Any, capacity: int | str, items: Any, **settings: Any) -> Any:
    buffer = cls(capacity, **settings)
    buffer.extend(items)
    return buffer


def text(*segments: tuple[str, bool]) -> Example:
    return Example("k", segments=tuple(Segment(*segment) for segment in segments))


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (Example("k", x=torch.ones(3), y=torch.tensor(4)), 4),
        (Example("k", y=torch.tensor(True)), 1),
        (Example("k", y=torch.tensor(7, dtype=torch.uint8)), 7),
        (text(("What is it?", False), (" a ", True)), "a"),
        (text(("Q", False), (" one", True), ("mid", False), (" two\n", True)), "one two"),
        (text(("Q", False), (" yes", True)).but(x=torch.tensor([1, 2]), y=torch.tensor([-100, 2])), "yes"),
        (text(("a text with a class", True)).but(y=torch.tensor(2)), 2),
        (Example("k", x=torch.tensor([5, 6, 7]), y=torch.tensor([-100, 6, 7])), (6, 7)),
    ],
)
def test_class_of_every_kind_of_example(example: Example, expected: Any) -> None:
    assert class_of(example) == expected


@pytest.mark.parametrize("y", [torch.tensor(0.5), torch.tensor([0.5, 1.0]), torch.tensor(1.0).bfloat16()])
def test_numbers_to_be_predicted_have_no_classes(y: torch.Tensor) -> None:
    buffer = make_buffer("class-balanced", 10)
    with pytest.raises(ConfigError, match=r"row 'k' .* numbers to be predicted have no classes; use by='task'"):
        buffer.offer(Example("k", x=torch.ones(2), y=y))
    with pytest.raises(ConfigError, match="numbers to be predicted have no classes"):
        buffer.offer(text(("a text with a value", True)).but(y=y))
    assert len(buffer) == buffer.seen == 0


def test_what_has_no_group_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="row 'k' has neither y nor text to learn"):
        class_of(text(("only a prompt", False)))
    with pytest.raises(
        ConfigError, match=r"no field 'level'; its fields are kind, year\. Other choices: 'task', 'c"
    ):
        group_of(Example("k", fields={"kind": "a", "year": 1}), "level")
    with pytest.raises(ConfigError, match="its fields are none"):
        group_of(Example("k"), "level")
    for by in (None, "", 3):
        with pytest.raises(ConfigError, match="by must be 'task', 'class' or the name of a field"):
            BalancedBuffer(3, by=by)  # type: ignore[arg-type]


def test_by_class_and_by_field() -> None:
    items = [
        Example(str(i), y=torch.tensor(int(i % 10 == 0)), fields={"level": i % 4, "tags": [i % 2]})
        for i in range(200)
    ]
    assert filled(BalancedBuffer, 20, items, by="class").groups == {0: 10, 1: 10}
    assert filled(BalancedBuffer, 20, items, by="level").groups == {0: 5, 1: 5, 2: 5, 3: 5}
    assert filled(BalancedBuffer, 20, items, by="tags").groups == {"[0]": 10, "[1]": 10}


def test_a_number_and_its_name_are_two_groups() -> None:
    items = [Example(f"{value!r} {i}", fields={"f": value}) for value in (1, "1", None, "null") for i in range(9)]
    assert filled(BalancedBuffer, 8, items, by="f").groups == {1: 2, "1": 2, None: 2, "null": 2}


def plain(buffer: BalancedBuffer) -> str:
    state = buffer.state_dict()
    return json.dumps({**state, "items": state["items"]["rows"]})


def test_the_text_of_an_erased_row_is_not_in_the_state() -> None:
    """A class can be a row's answer; the threshold that stays is filed under its fingerprint."""
    buffer = BalancedBuffer(2, by="class")
    secrets = [text((f"secret {i}", True)).but(key=str(i)) for i in range(9)]
    buffer.extend(secrets)
    assert "secret" in plain(buffer)
    assert buffer.erase(map(str, range(9))) == 2
    assert len(buffer.state_dict()["thresholds"]) == 7
    assert "secret" not in plain(buffer)
