"""Collation, forward pass and losses, against numbers worked by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.objectives import (
    check_objective,
    collate,
    forward,
    group_counts,
    group_losses,
    losses,
    total_loss,
)
from perdure.types import IGNORE, Batch, Example, Output

LN2, LN3, LN4 = math.log(2), math.log(3), math.log(4)


def lm(ids: list[int], labels: list[int], **changes: Any) -> Example:
    return Example(str(ids), "t", x=torch.tensor(ids), y=torch.tensor(labels), **changes)


def test_classification_by_hand() -> None:
    """Logits (ln 3, 0): p = (3/4, 1/4), so −ln p is ln 4/3 for class 0 and ln 4 for class 1. Sum: ln 16/3."""
    batch = collate([Example("a", x=torch.zeros(1), y=torch.tensor(c)) for c in (0, 1)], "classification")
    output = Output(torch.tensor([[LN3, 0.0], [LN3, 0.0]]))
    assert losses(output, batch, "classification").tolist() == pytest.approx([LN4 - LN3, LN4])
    assert float(total_loss(output, batch, "classification")) == pytest.approx(2 * LN4 - LN3)
    assert batch.counts == (1, 1)


def test_regression_by_hand() -> None:
    """½(3 − 1)² = 2 and ½(0 − 1)² = ½; two values a row add up: 2½."""
    rows = [Example("a", x=torch.zeros(1), y=torch.tensor(v)) for v in (1.0, 1.0)]
    batch = collate(rows, "regression")
    for shape in ((2,), (2, 1)):
        output = Output(torch.tensor([3.0, 0.0]).view(shape))
        assert losses(output, batch, "regression").tolist() == [2.0, 0.5]
        assert float(total_loss(output, batch, "regression")) == 2.5
    double = collate([Example("a", x=torch.zeros(1), y=torch.tensor([1.0, 1.0]))], "regression")
    assert losses(Output(torch.tensor([[3.0, 0.0]])), double, "regression").tolist() == [2.5]
    assert double.counts == (2,)


def test_whole_numbers_are_values_too() -> None:
    """½(3 − 1)² = 2 for an integer target."""
    batch = collate([Example("a", x=torch.zeros(1), y=torch.tensor(1))], "regression")
    assert batch.y.dtype == torch.float32
    assert losses(Output(torch.tensor([3.0])), batch, "regression").tolist() == [2.0]


@pytest.mark.parametrize(("given", "wanted"), [((3,), (3, 2)), ((3, 2), (3,)), ((2, 3), (3, 2)), ((3, 2), (3, 3))])
def test_regression_shapes_that_do_not_fit_are_refused(given: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    batch = Batch((), torch.zeros(3, 1), torch.zeros(wanted), (1, 1, 1), 3)
    with pytest.raises(ConfigError) as caught:
        total_loss(Output(torch.zeros(given)), batch, "regression")
    assert f"the model gives {given} and the targets are {wanted}" in str(caught.value)


def position_logits(table: list[list[float]]) -> Output:
    return Output(torch.tensor([table]).log())


def test_causal_lm_by_hand() -> None:
    """Ids 0 1 2 with labels − 1 2: position 0 gives token 1 a half, position 1 gives token 2 a quarter.

    ln 2 + ln 4 = 3 ln 2. Unshifted, position 1 would give token 1 an eighth and position 2 token 2 a third.
    """
    batch = collate([lm([0, 1, 2], [IGNORE, 1, 2])], "causal_lm")
    output = position_logits([[1 / 4, 1 / 2, 1 / 4], [5 / 8, 1 / 8, 1 / 4], [1 / 3, 1 / 3, 1 / 3]])
    assert losses(output, batch, "causal_lm").tolist() == pytest.approx([3 * LN2])
    assert float(total_loss(output, batch, "causal_lm")) == pytest.approx(3 * LN2)
    assert batch.counts == (2,)


def test_the_first_label_is_no_target() -> None:
    """Nothing predicts the first token: with or without its label the same two targets and ln 2 + ln 4."""
    output = position_logits([[1 / 4, 1 / 2, 1 / 4], [5 / 8, 1 / 8, 1 / 4], [1 / 3, 1 / 3, 1 / 3]])
    batch = collate([lm([0, 1, 2], [0, 1, 2])], "causal_lm")
    assert batch.counts == (2,)
    assert losses(output, batch, "causal_lm").tolist() == pytest.approx([3 * LN2])


def test_causal_lm_rows_are_padded_on_the_right_and_masked_by_position() -> None:
    """Two learnt tokens and three: five targets; a learnt token 0, the padding's id, stays a target."""
    batch = collate([lm([5, 0, 0], [IGNORE, 0, 0]), lm([5, 6, 7, 0], [IGNORE, 6, 7, 0])], "causal_lm")
    assert isinstance(batch.x, Tensor)
    assert batch.x[0].tolist() == [5, 0, 0, 0]
    assert batch.y[0].tolist() == [IGNORE, 0, 0, IGNORE]
    assert batch.counts == (2, 3)
    assert batch.tokens == 7
    assert (batch.y[:, 1:] != IGNORE).sum() == 5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
def test_padding_changes_nothing(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """A row's loss is the same alone, padded among others, and whatever id the padding has."""
    model, rows = make_lm(kind, spread=0.3), make_lm_rows(4)
    batch = collate(rows, "causal_lm")
    assert isinstance(batch.x, Tensor)
    longest = batch.x.shape[1]
    assert len({len(row.x) for row in rows}) > 1
    together = losses(forward(model, batch), batch, "causal_lm").detach()
    alone = []
    for row in rows:
        one = collate([row], "causal_lm")
        alone.append(losses(forward(model, one), one, "causal_lm").item())
    assert together.tolist() == pytest.approx(alone, rel=1e-5)
    x = batch.x.clone()
    for i, row in enumerate(rows):
        x[i, len(row.x) :] = torch.arange(longest - len(row.x)) + 7
    assert not torch.equal(x, batch.x)
    other = Batch(batch.examples, x, batch.y, batch.counts, batch.tokens)
    assert torch.equal(losses(forward(model, other), other, "causal_lm").detach(), together)


def test_groups_add_up_by_group() -> None:
    """Logits (ln 3, 0) and classes 0, 1, 1: group a has ln 4/3 + ln 4 (rows 0, 2), group b ln 4 (row 1)."""
    rows = [Example("r", x=torch.zeros(1), y=torch.tensor(c), group=g) for c, g in ((0, "a"), (1, "b"), (1, "a"))]
    batch = collate(rows, "classification")
    output = Output(torch.tensor([[LN3, 0.0]] * 3))
    sums = group_losses(output, batch, "classification")
    assert list(sums) == ["a", "b"]
    assert float(sums["a"]) == pytest.approx(2 * LN4 - LN3)
    assert float(sums["b"]) == pytest.approx(LN4)
    lone = group_losses(output, collate([row.but(group="c") for row in rows], "classification"), "classification")
    assert list(lone) == ["c"]
    assert float(lone["c"]) == pytest.approx(3 * LN4 - LN3)


def test_group_counts_are_targets_not_rows() -> None:
    """Group a: 2 targets in the first batch and 1 in the second; group b: 3."""
    first = collate(
        [lm([1, 2, 3], [IGNORE, 2, 3], group="a"), lm([1, 2, 3, 4], [IGNORE, 2, 3, 4], group="b")], "causal_lm"
    )
    second = collate([lm([1, 2, 3], [IGNORE, IGNORE, 3], group="a")], "causal_lm")
    assert group_counts([first, second]) == {"a": 3, "b": 3}


def test_half_precision_is_widened_before_the_loss() -> None:
    """Σ of 4,096 equal logits: ln 4096 = 8.3178 needs more digits than bf16's 8.3125."""
    batch = collate([lm([0, 1], [IGNORE, 1])], "causal_lm")
    found = total_loss(Output(torch.zeros(1, 2, 4096, dtype=torch.bfloat16)), batch, "causal_lm")
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(math.log(4096), abs=1e-5)
    double = total_loss(Output(torch.zeros(1, 2, 4096, dtype=torch.float64)), batch, "causal_lm")
    assert double.dtype == torch.float64


def test_forward_takes_tensors_mappings_and_carriers_of_logits() -> None:
    linear = nn.Linear(2, 2)
    x = torch.ones(1, 2)

    class Carrier(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(logits=linear(x))

    class Named(nn.Module):
        def forward(self, *, first: Tensor, second: Tensor) -> Tensor:
            return linear(first + second)

    expected = linear(x)
    whole = Batch((), x, torch.zeros(1), (1,), 1)
    named = Batch((), {"first": x / 2, "second": x / 2}, torch.zeros(1), (1,), 1)
    for model, batch in ((linear, whole), (Carrier(), whole), (Named(), named)):
        assert torch.equal(forward(model, batch).logits, expected)


def test_an_example_that_is_not_encoded_is_named() -> None:
    with pytest.raises(ConfigError, match="example 'k' of task 't' has no tensors: encode its text first"):
        collate([Example("k", "t")], "causal_lm")


def test_an_unknown_objective_lists_the_known() -> None:
    assert check_objective("causal_lm") == "causal_lm"
    with pytest.raises(
        ConfigError, match="Did you mean 'causal_lm'\\? Known: causal_lm, classification, regression"
    ):
        check_objective("casual_lm")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (5, "Target 5 is out of bounds. The model gives 2 classes, so labels are 0 to 1"),
        (0.5, "must be class numbers"),
    ],
)
def test_a_label_that_is_no_class_is_refused(label: float, message: str) -> None:
    batch = collate([Example("k", "t", x=torch.ones(3), y=torch.tensor(label))], "classification")
    with pytest.raises(ConfigError, match=message):
        total_loss(Output(torch.zeros(1, 2)), batch, "classification")
