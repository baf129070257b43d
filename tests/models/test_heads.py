"""Regression heads against numpy worked row by row and head by head; padding, rotary positions, ensembles."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import ModelError
from perdure.models import heads
from perdure.models.heads import HEADS, MHAR, EnsembleHead, LinearHead, MeanHead, Votes, make_head, rotate
from perdure.models.objectives import collate, forward, group_losses, losses, total_loss
from perdure.types import Example, Output

WIDTH, HEADS_OF_IT = 16, 4
LENGTHS = (7, 1, 4, 5)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def made(kind: Callable[..., nn.Module] = MHAR, **changes: Any) -> nn.Module:
    """A head in eval mode whose norms do not multiply by 1 alone."""
    torch.manual_seed(1)
    head = kind(WIDTH, **({"heads": HEADS_OF_IT, "hidden": 24} | changes))
    for name, parameter in head.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return head.eval()


def batch(junk: float = 50.0) -> tuple[Tensor, Tensor]:
    """Four rows of 7, 1, 4 and 5 tokens, [4, 7, 16]; where a row has ended stand large numbers."""
    states = torch.randn(len(LENGTHS), max(LENGTHS), WIDTH)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return torch.where(mask[..., None], states, junk * torch.randn_like(states)), mask


def softmax(scores: np.ndarray) -> np.ndarray:
    raised = np.exp(scores - scores.max())
    return raised / raised.sum()


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def answer(w: dict[str, np.ndarray], x: np.ndarray) -> float:
    inner = rms(w["answer.hidden.weight"] @ x + w["answer.hidden.bias"], w["answer.norm.weight"])
    last = w["answer.last.weight"] @ silu(inner) + w["answer.last.bias"]
    return 1 / (1 + math.exp(-float(last[0])))


def by_hand(head: nn.Module, states: Tensor) -> float:
    """MHAR of one row's real tokens [T, D], in loops; q·k after rotary positions is Re Σ z_q conj(z_k)."""
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    x = states.double().numpy()
    length, width = x.shape
    size = width // HEADS_OF_IT
    mixed = np.zeros((length, width))
    for h in range(HEADS_OF_IT):
        part = slice(h * size, (h + 1) * size)
        q, k, v = (x @ w[f"{name}.weight"][part].T for name in ("query", "key", "value"))
        z = [y[:, : size // 2] + 1j * y[:, size // 2 :] for y in (q, k)]
        turn = np.array([[t / 10_000 ** (2 * i / size) for i in range(size // 2)] for t in range(length)])
        zq, zk = z[0] * np.exp(1j * turn), z[1] * np.exp(1j * turn)
        for t in range(length):
            scores = np.array([(zq[t] * zk[s].conj()).sum().real for s in range(length)]) / math.sqrt(size)
            mixed[t, part] = sum(p * v[s] for s, p in enumerate(softmax(scores)))
    x = rms(x + mixed @ w["output.weight"].T, w["attention_norm.weight"])
    inner = silu(x @ w["mlp.0.weight"].T + w["mlp.0.bias"])
    inner = silu(inner @ w["mlp.1.weight"].T + w["mlp.1.bias"])
    x = rms(x + inner @ w["mlp.2.weight"].T + w["mlp.2.bias"], w["mlp_norm.weight"])
    return answer(w, softmax(x @ w["pool.weight"][0]) @ x)


def check(head: nn.Module) -> None:
    """Rows that are padded in a batch are what numpy makes of them alone, and what the head itself does."""
    states, mask = batch()
    with torch.no_grad():
        found = head(states, mask)
        alone = torch.cat([head(states[i : i + 1, :n]) for i, n in enumerate(LENGTHS)])
    expected = torch.tensor([by_hand(head, states[i, :n]) for i, n in enumerate(LENGTHS)])
    assert expected.std() > 0.02  # the rows are told apart
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


class Causal(MHAR):
    """Wrong: a token sees only those before it."""

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        def causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        with patch.object(heads, "attend", causal):
            return super()._attend(x, mask)


class AttendsToPadding(MHAR):
    """Wrong: what stands where a row has ended is looked at."""

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super()._attend(x, None)


class PoolsPadding(MHAR):
    """Wrong: what stands where a row has ended has a share in the pooled state."""

    def pooled(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        found = super().pooled(states, mask)
        assert mask is not None
        kept: list[Tensor] = []
        hook = self.mlp_norm.register_forward_hook(lambda module, given, x: kept.append(x))
        super().pooled(states, mask)
        hook.remove()
        weights = self.pool(kept[0]).squeeze(-1).softmax(-1)
        return torch.where(mask.all(1)[:, None], found, (weights[:, None] @ kept[0]).squeeze(1))


class Unrotated(MHAR):
    """Wrong: tokens have no positions."""

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        with patch.object(heads, "rotate", lambda y: y):
            return super()._attend(x, mask)


class WithoutResidual(MHAR):
    """Wrong: RMSNorm(·) for RMSNorm(x + ·) about the attention."""

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return super()._attend(x, mask) - x


@pytest.mark.parametrize("plain", [True, False])
def test_mhar_equals_loops_by_hand(plain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By plain products, as of short rows on a processor, and by PyTorch's kernel."""
    assert max(LENGTHS) < heads.PLAIN_TOKENS
    if not plain:
        monkeypatch.setattr(heads, "PLAIN_TOKENS", 0)
    check(made())


@pytest.mark.parametrize("mutant", [Causal, AttendsToPadding, PoolsPadding, Unrotated, WithoutResidual])
def test_wrong_heads_are_caught(mutant: type[MHAR]) -> None:
    with pytest.raises(AssertionError):
        check(made(mutant))


def test_without_a_mask_all_tokens_are_real() -> None:
    states, _ = batch()
    everywhere = torch.ones(states.shape[:2], dtype=torch.bool)
    for name in HEADS:
        head = make_head(name, WIDTH).eval()
        torch.testing.assert_close(head(states), head(states, everywhere), rtol=0, atol=1e-6)


def test_rotary_positions_are_a_complex_multiplication() -> None:
    x = torch.randn(2, 3, 9, 8, dtype=torch.float64)
    z = torch.complex(x[..., :4], x[..., 4:])
    turns = torch.tensor([[t / 10_000 ** (i / 4) for i in range(4)] for t in range(9)], dtype=torch.float64)
    expected = z * torch.polar(torch.ones_like(turns), turns)
    torch.testing.assert_close(rotate(x), torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-5)
    assert torch.equal(rotate(x)[..., 0, :], x[..., 0, :])  # position 0 does not turn


def test_pooling_shares_sum_to_one_over_real_tokens() -> None:
    """A first column of ones over real tokens and of a million over padding is pooled to 1."""
    head = made()
    states, mask = batch()

    def mark(module: nn.Module, given: Any, x: Tensor) -> Tensor:
        first = torch.where(mask, 1.0, 1e6)[..., None]
        return torch.cat((first, x[..., 1:]), -1)

    head.mlp_norm.register_forward_hook(mark)
    with torch.no_grad():
        head.pool.weight[:, 0] = 0.0
        torch.testing.assert_close(head.pooled(states, mask)[:, 0], torch.ones(4), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("width", "number", "others"), [(312, 16, "1, 2, 3, 4, 6, 12, 13, 26"), (6, 6, "1, 3")])
def test_heads_that_do_not_share_the_width_are_refused(width: int, number: int, others: str) -> None:
    """312 = 2³·3·13: an even width a head leaves divisors of 156; 6 over 6 heads is 1 each, which is odd."""
    with pytest.raises(ModelError, match=rf"width {width} .* {number} heads.*would do: {others}$"):
        MHAR(width, number)
    for one in map(int, others.split(", ")):
        MHAR(width, one, hidden=2)


def mean_by_hand(head: nn.Module, states: Tensor) -> float:
    w = {name: value.double().numpy() for name, value in head.state_dict().items()}
    mean = states.double().numpy().mean(0)
    if isinstance(head, LinearHead):
        return 1 / (1 + math.exp(-float((w["last.weight"] @ mean + w["last.bias"])[0])))
    return answer(w, mean)


@pytest.mark.parametrize("kind", [MeanHead, LinearHead])
def test_baselines_pool_the_mean_of_real_tokens(kind: type[nn.Module]) -> None:
    head = kind(WIDTH).eval()
    states, mask = batch()
    with torch.no_grad():
        found = head(states, mask)
    expected = torch.tensor([mean_by_hand(head, states[i, :n]) for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    over_all = torch.tensor([mean_by_hand(head, row) for row in states])
    assert (found - over_all).abs()[1:].max() > 1e-3  # the mutant that averages padding too


def test_dropout_acts_in_training_and_not_in_evaluation() -> None:
    states, mask = batch()
    for name in ("mhar", "mean"):
        head = make_head(name, WIDTH)
        assert not torch.equal(head.train()(states, mask), head(states, mask))
        assert torch.equal(head.eval()(states, mask), head(states, mask))
        still = make_head(name, WIDTH, dropout=0.0).train()
        assert torch.equal(still(states, mask), still(states, mask))


def test_share_of_units_dropped() -> None:
    """Of 100,000 units a fifth is dropped, and the others are five quarters of what they were."""
    head = make_head("mean", WIDTH, hidden=100_000, dropout=0.2).train()
    seen: list[tuple[Tensor, Tensor]] = []
    head.answer.dropout.register_forward_hook(lambda module, given, x: seen.append((given[0], x)))
    head(torch.randn(1, 3, WIDTH))
    given, left = seen[0]
    assert float((left == 0).double().mean()) == pytest.approx(0.2, abs=0.005)
    torch.testing.assert_close(left[left != 0], given[left != 0] * 1.25)


def test_in_half_precision_the_prediction_is_near() -> None:
    head, (states, mask) = made(), batch(junk=1.0)
    with torch.no_grad():
        wide = head(states, mask)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = head(states, mask)
    torch.testing.assert_close(narrow.float(), wide, rtol=0, atol=0.02)


def test_double_precision_stays_double() -> None:
    """All but the rotary angles, which are float32's."""
    head, (states, mask) = made().double(), batch()
    expected = [by_hand(head, states[i, :n]) for i, n in enumerate(LENGTHS)]
    with torch.no_grad():
        found = head(states.double(), mask)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def ensemble() -> tuple[EnsembleHead, Tensor, Tensor]:
    torch.manual_seed(2)
    head = make_head("mhar", WIDTH, hidden=24, dropout=0.0, ensemble=3)
    assert isinstance(head, EnsembleHead)
    return (head, *batch())


def test_an_ensemble_says_the_mean_of_members_that_differ() -> None:
    head, states, mask = ensemble()
    votes = head(states, mask)
    assert isinstance(votes, Votes)
    alone = torch.stack([one(states, mask) for one in head.heads], 1)
    torch.testing.assert_close(votes.members, alone)
    torch.testing.assert_close(votes.logits, alone.sum(1) / 3)
    assert votes.members.shape == (4, 3)
    assert votes.members.std(1).min() > 1e-3


class Fixed(nn.Module):
    """A head on hidden states that are given."""

    def __init__(self, head: nn.Module, states: Tensor, mask: Tensor) -> None:
        super().__init__()
        self.head, self.states, self.mask = head, states, mask

    def forward(self, x: Tensor) -> Any:
        return self.head(self.states, self.mask)


def rows_of(values: Tensor) -> Any:
    return collate([Example(str(i), x=torch.zeros(1), y=y) for i, y in enumerate(values)], "regression")


def test_an_ensembles_loss_by_hand() -> None:
    """½(0.5 − 0)² = ⅛ and ½(1 − 0)² = ½ have the mean 5/16; of the mean prediction ¾ it would be 9/32."""
    output = Output(torch.tensor([0.75]), torch.tensor([[0.5, 1.0]]))
    made = rows_of(torch.tensor([0.0]))
    assert losses(output, made, "regression").tolist() == [5 / 16]
    assert float(total_loss(output, made, "regression")) == 5 / 16
    assert float(total_loss(Output(output.logits), made, "regression")) == 9 / 32


def gradients_of_members(loss_of: Callable[[Output, Any], Tensor]) -> bool:
    """Whether each member's gradient is that of its own loss alone, a third of it for three members."""
    head, states, mask = ensemble()
    truth = rows_of(torch.rand(4))
    loss_of(forward(Fixed(head, states, mask), truth), truth).backward()
    together = [[p.grad.clone() for p in one.parameters()] for one in head.heads]
    for one, found in zip(head.heads, together, strict=True):
        head.zero_grad()
        (0.5 * (one(states, mask) - truth.y).square().sum()).backward()
        for mine, own in zip(found, one.parameters(), strict=True):
            if not torch.allclose(3 * mine, own.grad, rtol=1e-4, atol=1e-7):
                return False
    return True


def test_each_member_learns_by_itself() -> None:
    assert gradients_of_members(lambda output, truth: total_loss(output, truth, "regression"))
    assert gradients_of_members(lambda output, truth: group_losses(output, truth, "regression")["task"])
    # The mutant: one loss of the mean, under which members make up for each other's errors.
    assert not gradients_of_members(lambda output, truth: 0.5 * (output.logits - truth.y).square().sum())


def test_unknown_heads_are_named_with_the_known() -> None:
    with pytest.raises(ModelError, match="mhar"):
        make_head("mahr", WIDTH)
