"""Scores over all rows at once: hand-worked numbers, and batches that equal one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.evaluation.score import HIGHER_IS_BETTER, MAIN, by_length, evaluating, regression_metrics, score
from perdure.models.objectives import collate, forward
from perdure.types import IGNORE, Batch, Example, Objective


def scored(model: nn.Module, rows: Sequence[Example], objective: Objective, batch_size: int) -> dict[str, float]:
    def collated(examples: Sequence[Example]) -> Batch:
        return collate(examples, objective)

    return score(model, rows, objective, forward, collated, batch_size)


def pairs(xs: Any, ys: Any) -> list[Example]:
    return [
        Example(str(i), x=torch.tensor(x), y=torch.tensor(y)) for i, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]


def check_regression(batch_size: int, by: Callable[..., dict[str, float]]) -> None:
    """Truth 1 2 3 6, predicted 1 3 3 4: errors 0 1 0 −2, so SSE = 5; the mean is 3, so SST = 4 + 1 + 0 + 9 = 14.

    RMSE √(5/4), MAE 3/4, R² = 1 − 5/14, loss ½·5/4. Averaged by batches of two, R² would be (−1 + 1/9)/2 and RMSE
    (√½ + √2)/2; by batches of three and one, MAE would be (1/3 + 2)/2.
    """
    rows = pairs([1.0, 3.0, 3.0, 4.0], [1.0, 2.0, 3.0, 6.0])
    found = by(nn.Identity(), rows, "regression", batch_size)
    assert found == pytest.approx({"loss": 5 / 8, "rmse": math.sqrt(5 / 4), "mae": 3 / 4, "r2": 1 - 5 / 14})


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_regression_is_over_all_rows(batch_size: int) -> None:
    check_regression(batch_size, scored)


def averaged_by_batch(
    model: nn.Module, rows: Sequence[Example], objective: Objective, size: int
) -> dict[str, float]:
    """Wrong: a mean of the batches' metrics."""
    parts = [scored(model, rows[i : i + size], objective, size) for i in range(0, len(rows), size)]
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}


@pytest.mark.parametrize("batch_size", [2, 3])
def test_metrics_averaged_by_batch_are_caught(batch_size: int) -> None:
    with pytest.raises(AssertionError):
        check_regression(batch_size, averaged_by_batch)


def test_regression_counts_every_value_of_a_row() -> None:
    """Truths (0, 2) and (4, 2), predicted (0, 0) and (4, 4): errors 0 −2 0 2, SSE = 8, SST = 4 + 0 + 4 + 0 = 8."""
    rows = pairs([[0.0, 0.0], [4.0, 4.0]], [[0.0, 2.0], [4.0, 2.0]])
    found = scored(nn.Identity(), rows, "regression", 1)
    assert found == pytest.approx({"loss": 1.0, "rmse": math.sqrt(2), "mae": 1.0, "r2": 0.0})


def test_r2_of_constant_targets_is_not_a_number() -> None:
    found = regression_metrics(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.0]))
    assert math.isnan(found["r2"])
    assert found["mae"] == 1.5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_accuracy_and_loss_are_over_all_rows(batch_size: int) -> None:
    """Logits (±ln 3, 0): p is 3/4 or 1/4. Four of five are right; by batches of three and two it would be 3/4.

    The loss is (4·ln 4/3 + ln 4)/5.
    """
    up, down = [math.log(3), 0.0], [-math.log(3), 0.0]
    rows = pairs([up, up, down, down, down], [0, 0, 1, 1, 0])
    found = scored(nn.Identity(), rows, "classification", batch_size)
    assert found == pytest.approx({"loss": (4 * math.log(4 / 3) + math.log(4)) / 5, "accuracy": 0.8})


class Table(nn.Module):
    """Gives after token 0 a half to token 1; after any other a quarter to each of four."""

    def forward(self, ids: Tensor) -> Tensor:
        first = torch.tensor([1 / 6, 1 / 2, 1 / 6, 1 / 6]).log()
        rest = torch.full((4,), 1 / 4).log()
        return torch.where((ids == 0)[..., None], first, rest)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_language_models_loss_is_a_mean_over_tokens(batch_size: int) -> None:
    """Row one has a single target at ln 2, row two three at ln 4: (ln 2 + 3 ln 4)/4 = 7/4 ln 2, not 3/2 ln 2."""
    rows = pairs([[0, 1], [2, 3, 2, 3]], [[IGNORE, 1], [IGNORE, 3, 2, 3]])
    assert scored(Table(), rows, "causal_lm", batch_size) == {"loss": pytest.approx(7 / 4 * math.log(2))}


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
def test_batched_equals_one_by_one(make_lm: Any, make_lm_rows: Any, kind: str) -> None:
    """Ragged rows, together and alone: the loss against the sum over rows divided by all targets; logits too."""
    model, rows = make_lm(kind, spread=0.3), make_lm_rows(7)
    total, targets = 0.0, 0
    alone = {}
    for row in rows:
        batch = collate([row], "causal_lm")
        with torch.no_grad():
            alone[row.key] = forward(model, batch).logits[0]
        total += scored(model, [row], "causal_lm", 1)["loss"] * batch.counts[0]
        targets += batch.counts[0]
    for size in (2, 3, 64):
        assert scored(model, rows, "causal_lm", size)["loss"] == pytest.approx(total / targets, abs=1e-5)
    together = collate(rows, "causal_lm")
    with torch.no_grad():
        logits = forward(model, together).logits
    for row, found in zip(rows, logits, strict=True):
        torch.testing.assert_close(found[: len(row.x)], alone[row.key], rtol=0, atol=1e-5)


def test_a_real_model_batched_equals_one_by_one(stories260k: Any) -> None:
    from perdure.models.load import load

    language = load(str(stories260k))
    texts = ["Once upon a time", "The cat sat on the mat and looked at the big red ball.", "Tom ran."]
    ids = [language.tokenizer(text)["input_ids"] + [language.tokenizer.eos_token_id] for text in texts]
    rows = pairs(ids, ids)
    alone = [(scored(language.model, [row], "causal_lm", 1)["loss"], len(row.x) - 1) for row in rows]
    expected = sum(loss * count for loss, count in alone) / sum(count for _, count in alone)
    assert scored(language.model, rows, "causal_lm", 64)["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_no_gradient_is_made(make_mlp: Any, training: bool) -> None:
    model = nn.Sequential(make_mlp(2, 2), nn.Dropout(0.5)).train(training)
    seen = []
    model.register_forward_hook(lambda module, *_: seen.append((module.training, torch.is_grad_enabled())))
    rows = pairs([[0.0, 1.0], [1.0, 0.0]], [0, 1])
    assert scored(model, rows, "classification", 2) == scored(model, rows, "classification", 2)
    assert set(seen) == {(False, False)}
    assert all(module.training is training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_the_mode_comes_back_after_an_error(make_mlp: Any) -> None:
    model = make_mlp().train()

    def fail() -> None:
        with evaluating(model):
            assert not model.training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert model.training
    assert torch.is_grad_enabled()


def test_no_rows_have_no_scores(make_mlp: Any) -> None:
    assert scored(make_mlp(), [], "classification", 4) == {}


def test_chunks_go_by_length_and_lose_nothing(make_lm_rows: Any) -> None:
    rows = make_lm_rows(7)
    chunks = list(by_length(rows, 3))
    assert [len(chunk) for chunk in chunks] == [3, 3, 1]
    lengths = [len(row.x) for chunk in chunks for row in chunk]
    assert lengths == sorted(lengths, reverse=True)
    assert {row.key for chunk in chunks for row in chunk} == {row.key for row in rows}


def test_every_main_metric_has_a_direction() -> None:
    assert {metric for metrics in MAIN.values() for metric in metrics} <= set(HIGHER_IS_BETTER)
    assert not any(HIGHER_IS_BETTER[metric] for metric in ("loss", "rmse", "mae"))
    assert all(HIGHER_IS_BETTER[metric] for metric in ("accuracy", "exact_match", "r2"))
