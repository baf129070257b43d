"""Every memory is made by its name, and goes on from a saved state as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from perdure.errors import ConfigError
from perdure.memory import (
    BUFFERS,
    BalancedBuffer,
    RankedBuffer,
    ReservoirBuffer,
    RingBuffer,
    load_buffer,
    make_buffer,
)
from perdure.types import Example


def names(buffer: Any) -> list[tuple[str, str]]:
    return [(row.task, row.key) for row in buffer]


MADE = {
    "balanced": lambda: BalancedBuffer(20, 4),
    "by class": lambda: BalancedBuffer(20, 4, by="class"),
    "by field": lambda: BalancedBuffer(20, 4, by="level"),
    "in bytes": lambda: BalancedBuffer("400B", 4),
    "ring": lambda: RingBuffer(20, 4),
    "ring of all": lambda: RingBuffer(20, 4, by=None),
    "ring in bytes": lambda: RingBuffer("400B", 4),
    "reservoir in bytes": lambda: ReservoirBuffer("400B", 4),
    "ranked": lambda: RankedBuffer(20, 4),
    "ranked in bytes": lambda: RankedBuffer("400B", 4),
    "balanced in tokens": lambda: BalancedBuffer("20 tokens", 4),
}


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """What is not a tensor goes through JSON."""
    tensors = state["items"]["tensors"]
    plain = json.loads(json.dumps({**state, "items": {**state["items"], "tensors": None}}))
    plain["items"]["tensors"] = tensors
    return plain


def resumed_differs(make: Callable[[], Any], cut: int, spoil: Callable[[Any], None] = lambda state: None) -> bool:
    items = [
        Example(str(i), "abc"[i % 7 % 3], x=torch.zeros(i % 11), y=torch.tensor(i % 5), fields={"level": i % 3})
        for i in range(200)
    ]
    Random(1).shuffle(items)
    through, resumed = make(), make()
    for i, row in enumerate(items):
        if i == cut:
            state = saved(resumed.state_dict())
            spoil(state)
            resumed = load_buffer(state)
        lines = []
        for buffer in (through, resumed):
            if i in (60, 150):
                buffer.erase([str(k) for k in range(0, 200, 3)])
            held = buffer.offer(row)
            lines.append((held, names(buffer.sample(3)), names(buffer), buffer.used, buffer.seen, buffer.refused))
        if lines[0] != lines[1]:
            return True
    settings = [(b.kind, b.capacity, b.limit, b.seed, getattr(b, "by", 0)) for b in (through, resumed)]
    assert settings[0] == settings[1]
    return False


@pytest.mark.parametrize("cut", [0, 3, 70, 199])
@pytest.mark.parametrize("name", MADE)
def test_resumed_in_the_middle_of_a_stream_it_is_identical(name: str, cut: int) -> None:
    assert not resumed_differs(MADE[name], cut)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("balanced", {"thresholds": {}}),
        ("balanced", {"seed": 5}),
        ("balanced", {"draws": 0}),
        ("balanced", {"offers": 20}),
        ("balanced", {"capacity": 21}),
        ("by field", {"by": "task"}),
        ("ring", {"by": None}),
        ("ring", {"offers": 20}),
        ("reservoir in bytes", {"capacity": 400}),
        ("ranked", {"closed": []}),
        ("reservoir in bytes", {"threshold": str(1 << 64)}),
    ],
)
def test_the_resume_check_can_fail(name: str, change: dict[str, Any]) -> None:
    assert resumed_differs(MADE[name], 70, lambda state: state.update(change))


def test_buffers_are_made_by_name() -> None:
    made = {kind: make_buffer(kind, "2KB", 3) for kind in BUFFERS}
    assert {kind: (type(b), getattr(b, "by", None)) for kind, b in made.items()} == {
        "reservoir": (ReservoirBuffer, None),
        "balanced": (BalancedBuffer, "task"),
        "class-balanced": (BalancedBuffer, "class"),
        "ring": (RingBuffer, "task"),
    }
    for buffer in made.values():
        assert (buffer.capacity, buffer.limit, buffer.seed) == ("2KB", 2000, 3)
        again = load_buffer(buffer.state_dict())
        assert (type(again), vars(again).get("by")) == (type(buffer), vars(buffer).get("by"))
    with pytest.raises(ConfigError, match=r"unknown memory 'rign'\. Did you mean 'ring'"):
        make_buffer("rign", 10)


def test_a_state_goes_into_its_own_kind_only() -> None:
    whole = ReservoirBuffer(5)
    whole.extend(Example(str(i), "a") for i in range(20))
    old = whole.state_dict()
    for key in ("kind", "refused"):  # as the first version saved it
        del old[key]
    assert names(load_buffer(old)) == names(whole)
    with pytest.raises(
        ConfigError, match=r"a 'reservoir' buffer and cannot go into a 'ring' buffer; perdure\.memory\.lo"
    ):
        RingBuffer(3).load_state_dict(old)
    with pytest.raises(ConfigError, match="unknown memory 'heap'"):
        load_buffer({**old, "kind": "heap"})
