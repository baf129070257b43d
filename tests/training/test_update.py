"""Windows and meta-learners against their rules worked out by hand on a linear model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import OptimizerSettings, TrainingSettings
from perdure.errors import NonFiniteError
from perdure.strategies import Naive
from perdure.training import update
from perdure.training.learner import Learner
from perdure.training.update import FirstOrderMAML, MetaLearner, Reptile, Window
from perdure.types import Example, Task

LR, STEP = 0.01, 0.25


def rows(count: int, seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(count, generator=generator, dtype=torch.float64)
    return [Example(f"row{seed}-{i}", "a", x=x[i], y=y[i]) for i in range(count)]


def learner(clip: float | None = None) -> Learner:
    torch.manual_seed(0)
    model = nn.Linear(3, 1, bias=False).double()
    settings = TrainingSettings(optimizer=OptimizerSettings(type="sgd", lr=0.1), clip=clip, device="cpu")
    found = Learner(model, Naive(), "regression", settings, seed=0)
    found.begin_task(Task("stream", rows(8)), 0)
    return found


def weight(one: Learner) -> Tensor:
    return next(one.model.parameters()).detach()[0].clone()


def gradient(at: Tensor, given: list[Example]) -> Tensor:
    """Of the mean of ½(w·x − y)²: mean of (w·x − y)·x."""
    terms = [(at @ row.x - row.y) * row.x for row in given if row.x is not None and row.y is not None]
    return torch.stack(terms).mean(0)


def adapted(at: Tensor, given: list[Example], steps: int) -> Tensor:
    """Adam without momentum, written out: v ← 0.999·v + 0.001·g², w ← w − lr·g / (√(v/(1 − 0.999^t)) + 1e-8)."""
    v = torch.zeros_like(at)
    for t in range(1, steps + 1):
        g = gradient(at, given)
        v = 0.999 * v + 0.001 * g * g
        at = at - LR * g / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return at


def feed(teacher: Any, given: list[Example]) -> None:
    for row in given:
        teacher.learn(row)


def reptile(one: Learner, steps: int = 3) -> Reptile:
    return Reptile(one, 4, steps, LR, STEP)


def maml(one: Learner, steps: int = 3) -> FirstOrderMAML:
    return FirstOrderMAML(one, 2, steps, LR, OptimizerSettings(type="sgd", lr=0.1))


def off_by_reptile(make: Callable[[Learner], MetaLearner] = reptile) -> float:
    one = learner()
    start, given = weight(one), rows(4)
    feed(make(one), given)
    return float((weight(one) - (start + STEP * (adapted(start, given, 3) - start))).abs().max())


def off_by_maml(make: Callable[[Learner], MetaLearner] = maml) -> float:
    one = learner()
    start, given = weight(one), rows(4)
    feed(make(one), given)
    expected = start - 0.1 * gradient(adapted(start, given[:2], 3), given[2:])
    return float((weight(one) - expected).abs().max())


def test_reptile_goes_a_share_of_the_way() -> None:
    assert off_by_reptile() < 1e-12


def test_first_order_maml_steps_by_the_gradient_of_other_rows_where_the_inner_loop_ended() -> None:
    assert off_by_maml() < 1e-12


class WholeWay(Reptile):
    """Planted: plain training on a few rows."""

    def _meta_step(self, given: Any, start: Any) -> float:
        return self._adapt(given)


class SameRows(FirstOrderMAML):
    """Planted: the gradient is of the rows that were adapted to."""

    def _meta_step(self, given: Any, start: Any) -> float:
        return super()._meta_step([*given[: self._shots], *given[: self._shots]], start)


class AtTheStart(FirstOrderMAML):
    """Planted: no inner loop."""

    def _adapt(self, given: Any) -> float:
        return 0.0


class NotPutBack(FirstOrderMAML):
    """Planted: the outer step is taken from where the inner loop ended."""

    def _put(self, values: Any) -> None:
        return None


@pytest.mark.parametrize("planted", [SameRows, AtTheStart, NotPutBack], ids=lambda one: one.__name__)
def test_wrong_meta_steps_are_found(planted: type[FirstOrderMAML]) -> None:
    settings = OptimizerSettings(type="sgd", lr=0.1)
    assert off_by_maml(lambda one: planted(one, 2, 3, LR, settings)) > 1e-4
    assert off_by_reptile(lambda one: WholeWay(one, 4, 3, LR, STEP)) > 1e-4


@pytest.mark.parametrize("make", [reptile, maml])
def test_it_waits_for_its_rows_and_goes_on_with_them(make: Callable[[Learner], MetaLearner]) -> None:
    given = rows(8)
    whole = learner()
    feed(make(whole), given)
    half = learner()
    first = make(half)
    before = weight(half)
    feed(first, given[:3])
    assert torch.equal(weight(half), before)
    feed(first, given[3:6])
    other = learner()
    second = make(other)
    other.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict(), {row.key: row for row in given})
    feed(second, given[6:])
    assert torch.equal(weight(other), weight(whole))


def test_rows_of_another_kind_wait_for_their_own() -> None:
    """Four rows of one kind among others: the same meta-step as if they had come alone."""
    mixed, alone = learner(), learner()
    given = rows(4)
    others = [row.but(task="b") for row in rows(3, seed=1)]
    feed(reptile(mixed), [given[0], others[0], given[1], others[1], given[2], others[2], given[3]])
    feed(reptile(alone), given)
    assert torch.equal(weight(mixed), weight(alone))


def test_a_meta_learner_can_look_at_what_it_would_adapt_to() -> None:
    one = learner()
    start = weight(one)
    with reptile(one).adapted(rows(4)):
        assert (weight(one) - adapted(start, rows(4), 3)).abs().max() < 1e-12
    assert torch.equal(weight(one), start)


def test_the_inner_gradient_is_clipped() -> None:
    """Adam divides the gradient by its own size, so that a clip shows only from the second inner step on."""
    free, clipped = learner(), learner(clip=1e-3)
    feed(maml(free), rows(4))
    feed(maml(clipped), rows(4))
    moved = [float((weight(one) - weight(learner())).norm()) for one in (free, clipped)]
    assert moved[1] == pytest.approx(0.1 * 1e-3, rel=1e-3)
    assert moved[0] > 10 * moved[1]


def test_a_loss_that_is_no_number_is_refused() -> None:
    bad = rows(4)
    bad[0] = bad[0].but(y=torch.tensor(float("nan"), dtype=torch.float64))
    with pytest.raises(NonFiniteError, match="meta-learner"):
        feed(reptile(learner()), bad)


def test_a_window_steps_on_the_newest_rows() -> None:
    """Three rows, a window of two, two passes: gradient steps on {1}, {1}, {1, 2}, {1, 2}, {2, 3}, {2, 3}."""
    one = learner()
    at, given = weight(one), rows(3)
    feed(Window(one, 2, 2), given)
    for held in ([0], [0], [0, 1], [0, 1], [1, 2], [1, 2]):
        at = at - 0.1 * gradient(at, [given[i] for i in held])
    assert (weight(one) - at).abs().max() < 1e-12


def test_a_row_that_comes_again_stands_once_in_a_window() -> None:
    one, other = learner(), learner()
    row = rows(1)[0]
    feed(Window(one, 3), [row, row])
    feed(Window(other, 1), [row, row])
    assert torch.equal(weight(one), weight(other))


def test_a_window_goes_on_with_its_rows() -> None:
    given = rows(5)
    whole = learner()
    feed(Window(whole, 3), given)
    half, other = learner(), learner()
    first, second = Window(half, 3), Window(other, 3)
    feed(first, given[:3])
    other.load_state_dict(half.state_dict())
    second.load_state_dict(first.state_dict(), {row.key: row for row in given})
    feed(second, given[3:])
    assert torch.equal(weight(other), weight(whole))
    assert set(update.Window(learner(), 2).state_dict()) == {"window"}
