"""SI against a path worked out by hand; the known wrong versions are planted and must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import EWC, SI, Chain, LwF, Strategy
from perdure.training.learner import Learner
from perdure.types import Example, Task

LR, XI, STRENGTH = 0.1, 0.05, 3.0


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def line(w: float) -> nn.Linear:
    """The model p = w·x."""
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(w)
    return model


def row(x: float, y: float) -> Example:
    return Example(f"{x}/{y}", "t", x=torch.tensor([x]), y=torch.tensor([y]))


def train(strategy: Strategy, optimizer: str = "sgd", **settings: Any) -> Learner:
    """Three steps on each of two tasks of one row: p = w·x from w = 0.5, loss ½(wx − y)²."""
    changes = {"optimizer": {"type": optimizer, "lr": LR}, **settings}
    learner = Learner(line(0.5), strategy, "regression", validate(TrainingSettings, changes, "test"), 0)
    for index, example in enumerate((row(1.0, 2.0), row(2.0, -1.0))):
        learner.begin_task(Task(f"{index}", (example,)), index)
        for _ in range(3):
            learner.step([example])
        learner.end_task()
    return learner


def by_hand(rival: Callable[[float, float], float] = lambda w, start: 0.0) -> tuple[float, float]:
    """Ω after both tasks and the last weight, by plain arithmetic.

    g = (wx − y)x is the loss's gradient alone; the step is −lr·(g + strength·Ω·(w − w*) + rival).
    """
    w, omega, anchor = 0.5, 0.0, 0.5
    for x, y in ((1.0, 2.0), (2.0, -1.0)):
        path, start = 0.0, w
        for _ in range(3):
            g = (w * x - y) * x
            step = -LR * (g + STRENGTH * omega * (w - anchor) + rival(w, start))
            path -= g * step
            w += step
        omega += max(0.0, path) / ((w - start) ** 2 + XI)
        anchor = w
    return omega, w


def check(make: Callable[[], SI]) -> None:
    strategy = make()
    learner = train(strategy)
    omega, w = by_hand()
    assert float(strategy.importance["weight"]) == pytest.approx(omega, abs=1e-12)
    assert learner.model.weight.item() == pytest.approx(w, abs=1e-12)
    assert float(strategy.anchor["weight"]) == pytest.approx(w, abs=1e-12)


def test_the_path_by_hand() -> None:
    check(lambda: SI(strength=STRENGTH, damping=XI))


def test_one_step_worked_out() -> None:
    """w = 0.5, x = 1, y = 2: g = −1.5, Δ = 0.15, ω = 0.225, Ω = 0.225/(0.15² + 0.05) = 0.225/0.0725."""
    strategy = SI(damping=XI)
    learner = Learner(
        line(0.5),
        strategy,
        "regression",
        validate(TrainingSettings, {"optimizer": {"type": "sgd", "lr": LR}}, "t"),
        0,
    )
    learner.begin_task(Task("t", (row(1.0, 2.0),)), 0)
    learner.step([row(1.0, 2.0)])
    assert float(strategy.path["weight"]) == pytest.approx(0.225, abs=1e-15)
    learner.end_task()
    assert float(strategy.importance["weight"]) == pytest.approx(0.225 / 0.0725, abs=1e-14)


def test_a_step_is_what_the_optimizer_made_of_it() -> None:
    """Adam's first step is −lr·sign(g) whatever g is: ω = |g|·lr, not lr·g²."""
    strategy = SI(damping=XI)
    changes = {"optimizer": {"type": "adam", "lr": LR}, "clip": 1e-3}
    learner = Learner(line(0.5), strategy, "regression", validate(TrainingSettings, changes, "t"), 0)
    learner.begin_task(Task("t", (row(1.0, 2.0),)), 0)
    learner.step([row(1.0, 2.0)])
    # g is taken before clipping: 1.5, not 0.001. eps is 1e-8 against a clipped gradient of 1e-3.
    assert float(strategy.path["weight"]) == pytest.approx(1.5 * LR, rel=2e-5)


@pytest.mark.parametrize("order", [("si", "ewc"), ("ewc", "si")])
def test_what_others_add_to_the_gradient_does_not_count(order: tuple[str, str]) -> None:
    """Beside EWC the steps are others, but g stays the loss's own, whoever stands first."""
    members = {"si": SI(strength=0.0, damping=XI), "ewc": EWC(strength=STRENGTH)}
    train(Chain([members[name] for name in order]))
    w, omega, fisher, anchor = 0.5, 0.0, 0.0, 0.5
    for x, y in ((1.0, 2.0), (2.0, -1.0)):
        path, start = 0.0, w
        for _ in range(3):
            g = (w * x - y) * x
            step = -LR * (g + STRENGTH * fisher * (w - anchor))
            path -= g * step
            w += step
        omega += max(0.0, path) / ((w - start) ** 2 + XI)
        fisher, anchor = ((w * x - y) * x) ** 2, w
    assert float(members["si"].importance["weight"]) == pytest.approx(omega, abs=1e-12)  # type: ignore[attr-defined]


class PlainObserver(SI):
    """Wrong: penalties that go through autograd count."""

    wants_task_gradient = False


def check_beside_lwf(make: Callable[..., SI]) -> None:
    """LwF's term ½λ(wx − w_t x)² goes through autograd: the steps have its gradient, the path has not."""
    si = make(strength=0.0, damping=XI)
    train(Chain([si, LwF(strength=STRENGTH)]))
    w, omega, teacher = 0.5, 0.0, None
    for x, y in ((1.0, 2.0), (2.0, -1.0)):
        path, start = 0.0, w
        for _ in range(3):
            g = (w * x - y) * x
            pull = 0.0 if teacher is None else STRENGTH * (w - teacher) * x * x
            step = -LR * (g + pull)
            path -= g * step
            w += step
        omega += max(0.0, path) / ((w - start) ** 2 + XI)
        teacher = w
    assert float(si.importance["weight"]) == pytest.approx(omega, abs=1e-12)


def test_a_penalty_that_goes_through_autograd_does_not_count() -> None:
    check_beside_lwf(SI)
    with pytest.raises(AssertionError):
        check_beside_lwf(PlainObserver)


class WithPenalty(SI):
    """Wrong: the penalty's own gradient counts as the loss's."""

    def observe(self, ctx: Any, batches: object) -> None:
        pass

    def gradient(self, ctx: Any, batches: object) -> None:
        super().gradient(ctx, batches)
        super().observe(ctx, batches)


class Undamped(SI):
    """Wrong: no damping."""

    def after_task(self, ctx: Any) -> None:
        self.damping = 0.0
        super().after_task(ctx)


class GradientTimesRate(SI):
    """Wrong: lr·g in place of the step that was taken, which the penalty changed."""

    def after_step(self, ctx: Any, batches: object, outputs: object) -> None:
        for name, (gradient, before) in self._before.items():
            self.path[name] = self.path.get(name, torch.zeros_like(before)) + LR * gradient**2
        self._before = {}


class FromTheFirst(SI):
    """Wrong: the way is measured from the stream's first weights."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        self.first: dict[str, Tensor] = getattr(self, "first", dict(self._start))

    def after_task(self, ctx: Any) -> None:
        self.anchor = dict(self.first)
        super().after_task(ctx)


@pytest.mark.parametrize("mutant", [WithPenalty, Undamped, GradientTimesRate, FromTheFirst])
def test_wrong_versions_are_caught(mutant: type[SI]) -> None:
    with pytest.raises(AssertionError):
        check(lambda: mutant(strength=STRENGTH, damping=XI))


def test_holds_two_tensors_a_weight_between_tasks_whatever_their_number() -> None:
    strategy = SI(damping=XI)
    learner = Learner(
        nn.Linear(4, 1), strategy, "regression", validate(TrainingSettings, {"optimizer": {"type": "sgd"}}, "t"), 0
    )
    for index in range(4):
        example = Example(f"{index}", "t", x=torch.ones(4) * index, y=torch.ones(1))
        learner.begin_task(Task(f"{index}", (example,)), index)
        learner.step([example])
        learner.end_task()
        held = [t for part in strategy.state_dict().values() if isinstance(part, dict) for t in part.values()]
        assert sum(t.numel() for t in held) == 2 * 5


@pytest.mark.parametrize(("settings", "message"), [({"strength": -1}, "strength"), ({"damping": 0}, "damping")])
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(StrategyError, match=f"si: {message}"):
        SI(**settings)  # type: ignore[arg-type]
