"""Rows that share a line of a batch: as those that stand alone, logits and gradients; and less padding."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from perdure.teaching.packing import can_pack, packed, plan
from perdure.teaching.pupil import Pupil
from perdure.types import IGNORE, Batch

Make = Callable[..., Any]
PROMPTS = ["w1 " * n for n in (1, 30, 3, 7, 2, 12, 4)]


@pytest.fixture
def pupil(teacher: Make) -> Pupil:
    found: Pupil = teacher().pupil
    with torch.no_grad():  # lest the adapter adds nothing
        for name, parameter in found._trained().items():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return found


def batch_of(pupil: Pupil) -> Batch:
    rows = [pupil.row(prompt + f"w{i}", f"w{20 + i} w{i}") for i, prompt in enumerate(PROMPTS)]
    return pupil.learner.collate(rows)


def test_lines_hold_each_row_once_and_no_more_than_fits() -> None:
    rng = random.Random(0)
    for _ in range(50):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(1, 20))]
        width = max(lengths) + rng.randint(0, 40)
        lines = plan(lengths, width)
        assert sorted(i for line in lines for i in line) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in line) <= width for line in lines)
        # First fit: a row that begins a line fits into none before it.
        for k, line in enumerate(lines):
            for before in lines[:k]:
                longer = [i for i in before if (-lengths[i], i) < (-lengths[line[0]], line[0])]
                assert sum(lengths[i] for i in longer) + lengths[line[0]] > width


def check_packed(pupil: Pupil) -> None:
    """Logits of each row's own tokens, and gradients of the loss, against each row alone."""
    batch = batch_of(pupil)
    model = pupil.model.train()
    output = packed(model, batch)
    assert output is not None
    assert output.logits.shape == (*batch.x.shape, 40)
    loss: Any = 0.0
    for i, row in enumerate(batch.examples):
        assert row.x is not None
        alone = model(input_ids=row.x[None]).logits[0]
        assert torch.allclose(output.logits[i, : len(row.x)], alone, atol=1e-5)
        assert output.logits[i, len(row.x) :].abs().sum() == 0
        learnt = batch.y[i, 1 : len(row.x)] != IGNORE
        loss = loss + alone[:-1][learnt].log_softmax(-1).square().sum()
    ours: Any = 0.0
    for i in range(len(batch.examples)):
        learnt = batch.y[i, 1:] != IGNORE
        ours = ours + output.logits[i, :-1][learnt].log_softmax(-1).square().sum()
    trained = list(pupil._trained().values())
    for one, other in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(loss, trained), strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4)


def test_rows_that_share_a_line(pupil: Pupil) -> None:
    check_packed(pupil)
    assert pupil._rehearsed.packs
    assert can_pack(pupil.model, [batch_of(pupil)])


def test_rows_that_see_each_other_are_caught(pupil: Pupil, monkeypatch: pytest.MonkeyPatch) -> None:
    """The try finds a model that cannot do it, and the check above would too."""
    inner = pupil.model
    seeing = SeesOthers(inner)
    assert not can_pack(seeing, [batch_of(pupil)])
    monkeypatch.setattr(pupil, "model", seeing)
    with pytest.raises(AssertionError):
        check_packed(pupil)


class SeesOthers(torch.nn.Module):
    """A model that does not look at positions to tell rows apart."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Any, position_ids: Any = None, use_cache: bool = False) -> Any:
        positions = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        return self.inner(input_ids=input_ids, position_ids=positions, use_cache=use_cache)


def test_where_packing_saves_little_rows_stand_alone(pupil: Pupil) -> None:
    rows = [pupil.row(f"w{i} w{j} w1", f"w{i}") for i in range(3) for j in range(3)]
    assert packed(pupil.model, pupil.learner.collate(rows)) is None


def test_a_model_that_cannot_is_left_as_it_is(pupil: Pupil, teacher: Make) -> None:
    class Strict(torch.nn.Module):
        def forward(self, input_ids: Any) -> Any:
            raise TypeError("no positions here")

    assert not can_pack(Strict(), [batch_of(pupil)])
    assert not teacher(tuning="soft-prompt", lr=0.03).pupil._rehearsed.packs
