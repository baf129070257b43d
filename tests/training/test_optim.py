"""Learning rates worked by hand, optimizers by name, and what a task boundary does to both."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from perdure.config import OptimizerSettings, ScheduleSettings, TrainingSettings, validate
from perdure.errors import ConfigError
from perdure.strategies import Naive, Strategy
from perdure.training.learner import Learner
from perdure.training.optim import build_optimizer, learning_rate, load_named_state, named_state
from perdure.types import Context, Example, Task

ROOT = math.sqrt(0.5)


def trace(total: int | None, steps: int, **schedule: Any) -> list[float]:
    return [
        learning_rate(OptimizerSettings(lr=0.8), ScheduleSettings(**schedule), step, total) for step in range(steps)
    ]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"type": "constant"}, [0.8] * 7),
        ({"type": "constant", "warmup": 4}, [0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]),
        ({"type": "constant", "warmup": 0.5}, [0.8 / 3, 1.6 / 3, 0.8, 0.8, 0.8, 0.8, 0.8]),
        ({"type": "linear"}, [0.8 * (1 - step / 6) for step in range(7)]),
        ({"type": "linear", "warmup": 2}, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ({"type": "linear", "warmup": 0.34}, [0.4, 0.8, 0.8, 0.6, 0.4, 0.2, 0.0]),
        ({"type": "cosine", "warmup": 2}, [0.4, 0.8, 0.8, 0.4 * (1 + ROOT), 0.4, 0.4 * (1 - ROOT), 0.0]),
        ({"type": "cosine"}, [0.8, 0.4 + 0.2 * 3**0.5, 0.6, 0.4, 0.2, 0.4 - 0.2 * 3**0.5, 0.0]),
    ],
)
def test_traces_of_six_steps_by_hand(schedule: dict[str, Any], expected: list[float]) -> None:
    """lr 0.8 over 6 steps, and what a seventh would have.

    Warm-up of w steps gives 0.8·1/w, 0.8·2/w … 0.8; a share is rounded down (0.5·6 = 3, 0.34·6 = 2.04). Then with
    d = (step − w)/(6 − w), linear is 0.8·(1 − d) and cosine 0.4·(1 + cos πd): with w = 2 d is 0, ¼, ½, ¾, 1 and the
    cosines 1, √½, 0, −√½, −1; with w = 0 they are 1, √3/2, ½, 0, −½, −√3/2, −1.
    """
    assert trace(6, 7, **schedule) == pytest.approx(expected, abs=1e-12)


def test_a_horizon_that_is_passed_stays_at_zero() -> None:
    assert trace(2, 5, type="linear") == pytest.approx([0.8, 0.4, 0, 0, 0])
    assert trace(2, 5, type="cosine") == pytest.approx([0.8, 0.4, 0, 0, 0])


def test_warm_up_in_steps_of_a_constant_rate_needs_no_horizon() -> None:
    assert trace(None, 4, type="constant", warmup=2) == pytest.approx([0.4, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("schedule", [{"type": "linear"}, {"type": "cosine", "warmup": 3}, {"warmup": 0.1}])
def test_a_schedule_without_its_horizon_says_what_to_give(schedule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"give schedule\.total_steps, or schedule\.at_boundary: reset"):
        trace(None, 1, **schedule)


def test_optimizers_by_name() -> None:
    from transformers.optimization import Adafactor

    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD, "adafactor": Adafactor}
    for name, kind in kinds.items():
        settings = OptimizerSettings(
            type=name, lr=0.25, weight_decay=0.5, momentum=0.75, betas=(0.5, 0.6), eps=1e-3
        )
        optimizer = build_optimizer([nn.Parameter(torch.ones(2))], settings)
        assert type(optimizer) is kind
        group = optimizer.param_groups[0]
        assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
        if name == "sgd":
            assert group["momentum"] == 0.75
        elif name != "adafactor":
            assert (group["betas"], group["eps"]) == ((0.5, 0.6), 1e-3)


def test_adafactor_takes_the_rate_as_it_is() -> None:
    """At step one β₂ is 0 and the second moment g²: the update is sign(g), of RMS 1, times 0.25: 1 → 0.75."""
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.tensor([2.0, 3.0, 4.0])
    build_optimizer([parameter], OptimizerSettings(type="adafactor", lr=0.25)).step()
    assert parameter.tolist() == pytest.approx([0.75] * 3)


def test_an_unknown_optimizer_lists_what_exists() -> None:
    with pytest.raises(ConfigError) as caught:
        validate(TrainingSettings, {"optimizer": {"type": "adamax"}}, "config")
    text = str(caught.value)
    assert "optimizer.type" in text
    assert "'adamax'" in text
    assert all(repr(name) in text for name in ("adam", "adamw", "sgd", "adafactor"))


def test_state_goes_by_name_not_by_position() -> None:
    one, two = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    first = build_optimizer([one, two], OptimizerSettings(type="adam"))
    one.grad, two.grad = torch.full((2,), 2.0), torch.full((3,), 5.0)
    first.step()
    new = nn.Parameter(torch.ones(4))
    second = build_optimizer([new, two], OptimizerSettings(type="adam"))
    load_named_state(second, ["new", "two"], named_state(first, ["one", "two"]))
    assert new not in second.state
    assert torch.equal(second.state[two]["exp_avg"], first.state[two]["exp_avg"])


ROW = Example("r", "t", x=torch.ones(1), y=torch.tensor(1.0))


def learner(strategy: Strategy | None = None, **settings: Any) -> Learner:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    checked = validate(TrainingSettings, settings, "test")
    return Learner(model, strategy or Naive(), "regression", checked, 0)


@pytest.mark.parametrize(("boundary", "expected"), [("reset", 0.75), ("continue", 1.0)])
def test_the_optimizer_at_a_boundary_by_hand(boundary: str, expected: float) -> None:
    """p = w, ½(w − 1)², so g = w − 1; SGD at 0.5 with momentum 0.5, from w = 0.

    Task one: g = −1, v = −1, w = ½. Task two: g = −½; afresh v = −½ and w = ¾; going on v = ½·(−1) − ½ = −1, w = 1.
    """
    one = learner(optimizer={"type": "sgd", "lr": 0.5, "momentum": 0.5, "at_boundary": boundary})
    for index in range(2):
        one.begin_task(Task(f"t{index}", [ROW]), index)
        one.step([ROW])
        one.end_task()
    assert one.model.get_parameter("weight").item() == expected


def check_schedule(boundary: str, total: int, expected: list[float], restart: bool = False) -> None:
    """Two tasks of 4 steps, warm-up 2, linear. Reset: ½ 1 1 ½ twice. Continue: ½ 1 and then 1 − (step − 2)/6."""
    one = learner(
        optimizer={"type": "sgd", "lr": 1.0}, schedule={"type": "linear", "warmup": 2, "at_boundary": boundary}
    )
    used = []
    for index in range(2):
        one.begin_task(Task(f"t{index}", [ROW]), index, total)
        if restart:
            one.schedule_step = 0
        used += [one.step([ROW]).lr for _ in range(4)]
        one.end_task()
    assert used == pytest.approx(expected)


BOUNDARIES = [
    ("reset", 4, [0.5, 1.0, 1.0, 0.5] * 2),
    ("continue", 8, [0.5, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
]


@pytest.mark.parametrize(("boundary", "total", "expected"), BOUNDARIES)
def test_the_schedule_at_a_boundary_by_hand(boundary: str, total: int, expected: list[float]) -> None:
    check_schedule(boundary, total, expected)


def test_a_silent_restart_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_schedule(*BOUNDARIES[1], restart=True)


class Grow(Strategy):
    """Puts a parameter in front of the others at the second task."""

    name = "grow"

    def prepare(self, ctx: Context) -> None:
        for name, parameter in ctx.model.named_parameters():
            parameter.requires_grad_(ctx.index > 0 or not name.startswith("0."))


def test_carried_state_survives_growth() -> None:
    """The first layer is frozen in task one: in task two the second layer's moments must not land on it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    settings = validate(TrainingSettings, {"optimizer": {"type": "adam", "at_boundary": "continue"}}, "test")
    one = Learner(model, Grow(), "regression", settings, 0)
    row = Example("r", "t", x=torch.ones(2), y=torch.ones(2))
    one.begin_task(Task("a", [row]), 0)
    one.step([row])
    assert one.optimizer is not None
    moments = one.optimizer.state[model[1].weight]["exp_avg"].clone()
    one.begin_task(Task("b", [row]), 1)
    assert one.names == ["0.weight", "1.weight"]
    assert model[0].weight not in one.optimizer.state
    assert torch.equal(one.optimizer.state[model[1].weight]["exp_avg"], moments)
