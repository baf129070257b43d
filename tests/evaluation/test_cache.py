"""A cache with room against Transformers' own, which copies everything for each token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

from perdure.evaluation import cache as module
from perdure.evaluation.cache import RoomyLayer, give_room, rows_can_leave


def states(length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(4, 2, length, 8, generator=rng), torch.randn(4, 2, length, 8, generator=rng)


def filled(lengths: list[int]) -> DynamicCache:
    found = DynamicCache()
    for index in range(2):
        for seed, length in enumerate(lengths):
            found.update(*states(length, seed), index)
    return found


@pytest.mark.parametrize("room", [1, 3, 64])
def test_it_holds_what_the_other_holds(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    monkeypatch.setattr(module, "ROOM", room)
    plain, roomy = filled([5]), filled([5])
    give_room(roomy)
    assert [type(layer) for layer in roomy.layers] == [RoomyLayer, RoomyLayer]
    for seed, length in enumerate([1, 1, 1, 2, 1, 4], start=1):
        for index in range(2):
            expected, found = (c.update(*states(length, seed), index) for c in (plain, roomy))
            assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
            assert roomy.get_seq_length(index) == plain.get_seq_length(index)


def test_rows_that_leave_take_nothing_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 2)
    plain, roomy = filled([5, 1]), filled([5])
    give_room(roomy)
    roomy.update(*states(1, 1), 0)
    roomy.update(*states(1, 1), 1)
    keep = torch.tensor([1, 3])
    for c in (plain, roomy):
        assert rows_can_leave(c)
        c.batch_select_indices(keep)
    for seed in (2, 3, 4):
        new = [x[keep] for x in states(1, seed)]
        expected, found = (c.update(*new, 0) for c in (plain, roomy))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.reorder_cache(torch.tensor([2, 0, 3, 1])),
        lambda c: c.batch_repeat_interleave(1),
        lambda c: c.crop(-2),
        lambda c: c.reset(),
    ],
    ids=["reorder", "repeat", "crop", "reset"],
)
def test_what_else_a_cache_can_do(change: Callable[[DynamicCache], None]) -> None:
    plain, roomy = filled([5]), filled([5])
    give_room(roomy)
    for c in (plain, roomy):
        c.update(*states(1, 1), 0)
        c.update(*states(1, 1), 1)
        change(c)
    for seed in (2, 3):
        expected, found = (c.update(*states(1, seed), 0) for c in (plain, roomy))
        assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
        assert roomy.get_seq_length() == plain.get_seq_length()


def test_further_tokens_are_written_in_place() -> None:
    roomy = filled([5])
    give_room(roomy)
    where = roomy.layers[0].keys.data_ptr()
    for seed in range(module.ROOM):
        roomy.update(*states(1, seed), 0)
    assert roomy.layers[0].keys.data_ptr() == where
    roomy.update(*states(1, 0), 0)
    assert roomy.layers[0].keys.data_ptr() != where


def test_under_autocast_it_keeps_what_attention_reads() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        roomy = filled([5])
        give_room(roomy)
        keys, _ = roomy.update(*states(1, 1), 0)
    assert keys.dtype == torch.bfloat16
    assert torch.equal(keys[:, :, 5:], states(1, 1)[0].bfloat16())


def test_layers_of_other_kinds_stay_as_they_are() -> None:
    class Other(DynamicLayer):
        """With a window, or a convolution's state beside it."""

    found = filled([5])
    other = Other()
    other.update(*states(5, 0))
    found.layers[0] = other
    give_room(found)
    assert found.layers[0] is other
    assert type(found.layers[1]) is RoomyLayer
    assert not rows_can_leave(found)
    give_room(object())
    assert not rows_can_leave(object())
