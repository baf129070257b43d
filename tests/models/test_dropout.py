"""Dropout against its law: how often, by how much, and through the gradient; elsewhere it is PyTorch's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perdure.models.adapters import tune
from perdure.models.dropout import Dropout, use


def test_the_law_of_dropout() -> None:
    """p = 0.05 is 3277/65536. Of 4e6 elements 200,012 are dropped in the mean, σ = √(4e6·p·(1 − p)) = 436."""
    torch.manual_seed(0)
    x = torch.ones(2000, 2000)
    y = Dropout(0.05)(x)
    dropped = int((y == 0).sum())
    assert abs(dropped - 4e6 * 3277 / 65536) < 4 * 436
    assert y[y != 0].unique().tolist() == [pytest.approx(65536 / (65536 - 3277))]
    rows, columns = (y == 0).sum(0), (y == 0).sum(1)
    for counts in (rows.double(), columns.double()):  # binomial: variance 2000·p·(1 − p) = 95
        assert 80 < float(counts.var()) < 110


def test_neighbours_are_independent() -> None:
    """Four elements come from one draw of 64 bits: all 16 patterns of them, χ² with 15 degrees of freedom."""
    torch.manual_seed(1)
    dropped = (Dropout(0.5)(torch.ones(400_000)) == 0).view(-1, 4)
    counts = torch.bincount((dropped * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16).double()
    expected = 100_000 / 16
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7  # 0.1 %


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 11)])
def test_the_gradient_goes_where_the_value_went(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = Dropout(0.5)(x)
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.where(y == 0, 0.0, 2.0))
    assert torch.allclose(y, x * x.grad)


def test_draws_follow_from_torchs_generator() -> None:
    x = torch.ones(100)
    layer = Dropout(0.3)
    torch.manual_seed(5)
    first, second = layer(x), layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)


def test_nothing_happens_in_eval_mode_or_without_p() -> None:
    x = torch.randn(10)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros(10))


def test_lora_has_it(make_lm: Any) -> None:
    model = tune(make_lm(), "lora", r=2, alpha=4, dropout=0.1)
    found = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert found
    assert all(type(module) is Dropout and module.p == 0.1 for module in found)


def test_a_models_own_dropout_is_replaced() -> None:
    class Own(torch.nn.Dropout):
        pass

    model = torch.nn.Sequential(torch.nn.Dropout(0.25), torch.nn.Sequential(torch.nn.Dropout(0.5), Own(0.1))).eval()
    use(model)
    inner = model[1]
    assert isinstance(inner, torch.nn.Sequential)
    assert [type(part) for part in (model[0], inner[0], inner[1])] == [Dropout, Dropout, Own]
    assert [part.p for part in (model[0], inner[0])] == [0.25, 0.5]
    assert not model[0].training


def test_one_dropout_under_two_names_is_replaced_under_both() -> None:
    model = torch.nn.Module()
    model.first = model.second = torch.nn.Dropout(0.25)
    use(model)
    assert (type(model.first), type(model.second)) == (Dropout, Dropout)


def test_a_compiler_is_given_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.manual_seed(5)
    found = Dropout(0.25)(torch.ones(50))
    torch.manual_seed(5)
    assert torch.equal(found, torch.nn.functional.dropout(torch.ones(50), 0.25))


def test_another_default_device_changes_nothing() -> None:
    torch.manual_seed(5)
    found = Dropout(0.25)(x := torch.ones(50))
    torch.manual_seed(5)
    with torch.device("meta"):
        assert torch.equal(Dropout(0.25)(x), found)
