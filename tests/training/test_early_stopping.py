"""Early stopping: when it stops, and that its end is that of having trained no further, bit for bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from perdure import ContinualTrainer
from perdure.callbacks import Callback
from perdure.config import EarlyStoppingSettings, validate
from perdure.errors import ConfigError, StrategyError
from perdure.strategies import SI, Chain, Naive, PackNet, Replay, Strategy
from perdure.strategies.build import STRATEGIES, build
from perdure.training import stopping
from perdure.training.learner import Learner
from perdure.training.settings import RunSettings
from perdure.training.stopping import Stopper
from perdure.types import Phase, Task

# The horizon is given, so that it does not follow from the number of epochs.
CONFIG = {
    "optimizer": {"type": "adam", "lr": 0.03, "at_boundary": "continue"},
    "schedule": {"type": "linear", "at_boundary": "continue", "total_steps": 400},
    "batch_size": 8,
}
STOPPING = {"patience": 3, "metric": "loss"}
TASKS = 2


def network() -> nn.Sequential:
    """Running statistics and dropout, so that buffers and generators matter."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 2))


def noisy(task: int) -> tuple[DataLoader[Any], TensorDataset]:
    """24 rows, a quarter of them with the wrong class, and 40 held-out ones without: it overfits."""
    rng = torch.Generator().manual_seed(task)
    x = torch.randn(64, 5, generator=rng)
    y = (x[:, task] > 0).long()
    wrong = torch.rand(24, generator=rng) < 0.25
    train = TensorDataset(x[:24], torch.where(wrong, 1 - y[:24], y[:24]))
    return DataLoader(train, batch_size=8, shuffle=True), TensorDataset(x[24:], y[24:])


class Seen(Callback):
    """Keeps every event of some names."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.events: list[dict[str, Any]] = []

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        if name in self.names:
            self.events.append(dict(values))


def stopped(strategy: Strategy, **config: Any) -> tuple[ContinualTrainer, list[list[dict[str, Any]]]]:
    """Tasks of at most 25 epochs, each stopped early; and the phases of each as they were trained."""
    seen = Seen("task_end")
    settings = {**CONFIG, "early_stopping": STOPPING, **config}
    trainer = ContinualTrainer(network(), strategy, settings, callbacks=[seen])
    for task in range(TASKS):
        trainer.train_task(*noisy(task), task_id=task, num_epochs=25)
    return trainer, [event["phases"] for event in seen.events]


def unstopped(strategy: Strategy, epochs: list[int]) -> ContinualTrainer:
    """As many epochs as are asked for."""
    trainer = ContinualTrainer(network(), strategy, CONFIG)
    for task, number in enumerate(epochs):
        trainer.train_task(*noisy(task), task_id=task, num_epochs=number)
    return trainer


def equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return bool(torch.equal(one, two))
    if isinstance(one, Mapping):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return bool(one == two)


def same_to_the_bit(one: ContinualTrainer, two: ContinualTrainer) -> bool:
    """All that a later step depends on, all scores, and the generators."""
    scores = [{name: R.to_dict() for name, R in trainer.matrices.items()} for trainer in (one, two)]
    return equal(one.learner.state_dict(), two.learner.state_dict()) and scores[0] == scores[1]


def fits(name: str) -> bool:
    try:
        build(name).check(network(), "classification")
    except StrategyError:
        return False
    return name != "packnet"  # it has two phases: below


@pytest.mark.parametrize("name", [*filter(fits, STRATEGIES), "replay+ewc", "si+replay"])
def test_stopping_with_the_best_epoch_is_having_trained_no_further(name: str) -> None:
    """Weights, buffers, optimizer, strategy, generators, steps; the first task was stopped, later ones may be."""
    early, phases = stopped(build(name))
    assert phases[0][0]["epochs"] == phases[0][0]["kept"] + 3 < 25
    kept = [one["kept"] for (one,) in phases]
    assert early.learner.steps == 3 * sum(kept)
    assert same_to_the_bit(early, unstopped(build(name), kept))


PARTS = ["model", "optimizer", "strategy", "rng", "steps", "schedule_step"]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_does_not_go_back_is_caught(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutants: all goes back but one part."""
    load = Learner.load_state_dict

    def without(self: Learner, state: Mapping[str, Any]) -> None:
        load(self, {**state, part: stopping._copied(self.state_dict()[part])})

    monkeypatch.setattr(Learner, "load_state_dict", without)
    early, phases = stopped(Chain([Replay(capacity=9), SI()]))
    monkeypatch.undo()
    kept = [one["kept"] for (one,) in phases]
    assert not same_to_the_bit(early, unstopped(Chain([Replay(capacity=9), SI()]), kept))


def test_a_state_that_training_goes_on_changing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: what is kept of the best epoch are the weights themselves, not a copy."""
    monkeypatch.setattr(stopping, "_copied", lambda state: state)
    early, phases = stopped(Naive())
    monkeypatch.undo()
    assert not same_to_the_bit(early, unstopped(Naive(), [one["kept"] for (one,) in phases]))


class TwoPhases(Strategy):
    """So many epochs, then so many more on a halved output layer."""

    name = "two-phases"

    def __init__(self, first: list[int], second: list[int]) -> None:
        self.first, self.second = first, second
        self.tasks = 0

    def phases(self, task: Task, plan: Any) -> list[Phase]:
        self.tasks += 1
        return [Phase("whole", self.first[self.tasks - 1]), Phase("again", self.second[self.tasks - 1])]

    def after_phase(self, ctx: Any, phase: Phase) -> None:
        with torch.no_grad():
            ctx.model[4].weight.mul_(0.5)


def test_each_phase_stops_by_itself() -> None:
    """What happens between the phases (here the output layer is halved) happens to the best epoch's weights."""
    early, phases = stopped(TwoPhases([25] * TASKS, [25] * TASKS))
    assert [[one["phase"] for one in both] for both in phases] == [["whole", "again"]] * TASKS
    assert any(one["kept"] < one["epochs"] for one, _ in phases)
    assert any(one["kept"] < one["epochs"] for _, one in phases)
    first, second = ([both[i]["kept"] for both in phases] for i in range(2))
    assert same_to_the_bit(early, unstopped(TwoPhases(first, second), [1] * TASKS))


def test_packnets_phases_stop_each() -> None:
    """What is pruned is what the best epoch weighs least; retraining goes back to its own best."""
    early, phases = stopped(PackNet(retrain_epochs=20))
    assert [[one["phase"] for one in both] for both in phases] == [["train", "retrain"]] * TASKS
    assert phases[0][0]["kept"] < phases[0][0]["epochs"]
    assert any(retrained["kept"] < retrained["epochs"] for _, retrained in phases)
    plain = ContinualTrainer(network(), strategy := PackNet(retrain_epochs=20), CONFIG)
    for task, (first, second) in enumerate(phases):
        strategy.retrain_epochs = second["kept"]
        plain.train_task(*noisy(task), task_id=task, num_epochs=first["kept"])
    assert same_to_the_bit(early, plain)


def test_without_restore_best_it_stays_where_it_stopped() -> None:
    early, phases = stopped(Naive(), early_stopping={**STOPPING, "restore_best": False})
    assert all(one["kept"] == one["epochs"] for (one,) in phases)
    assert phases[0][0]["epochs"] < 25
    assert same_to_the_bit(early, unstopped(Naive(), [one["epochs"] for (one,) in phases]))


def test_the_last_epoch_goes_back_too() -> None:
    """Patience was never lost: the epochs ran out after the best one."""
    seen = Seen("task_end")
    trainer = ContinualTrainer(
        network(), None, {**CONFIG, "early_stopping": {"patience": 100, "metric": "loss"}}, callbacks=[seen]
    )
    found = trainer.train_task(*noisy(0), num_epochs=12)
    ((end,),) = (event["phases"] for event in seen.events)
    assert end["kept"] < end["epochs"] == 12
    assert found == unstopped(Naive(), [end["kept"]]).evaluate(noisy(0)[1])


def test_epochs_are_told_with_what_was_decided() -> None:
    """Of every epoch the score, the best so far, and in the end where it went back to."""
    seen = Seen("epoch")
    trainer = ContinualTrainer(network(), None, {**CONFIG, "early_stopping": STOPPING}, callbacks=[seen])
    trainer.train_task(*noisy(0), num_epochs=25)
    losses = [event["metrics"]["loss"] for event in seen.events]
    best = losses.index(min(losses))
    assert len(losses) == best + 4
    assert [event["epoch"] for event in seen.events] == list(range(len(losses)))
    assert [event["step"] for event in seen.events] == [3 * (i + 1) for i in range(len(losses))]
    assert [event["best"] for event in seen.events] == [
        losses.index(min(losses[: i + 1])) for i in range(len(losses))
    ]
    assert [event["back_to"] for event in seen.events] == [None] * (len(losses) - 1) + [3 * (best + 1)]
    assert trainer.learner.steps == 3 * (best + 1)
    assert trainer.evaluate(noisy(0)[1])["loss"] == losses[best]


class Tape:
    """Stands for a learner: its state is the number of the epoch."""

    def __init__(self, objective: str = "classification") -> None:
        self.objective = objective
        self.epoch = -1

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.epoch = state["epoch"]


def play(values: list[float], more: int = 0, **settings: Any) -> tuple[int, int]:
    """Epochs until it stops, and the epoch that it is left at, from 1."""
    tape = Tape()
    stopper = Stopper(tape, EarlyStoppingSettings(**settings))  # type: ignore[arg-type]
    for epoch, value in enumerate(values):
        tape.epoch = epoch
        if stopper.epoch_ended(epoch, {stopper.metric: value}, epoch + 1 == len(values) + more):
            return epoch + 1, tape.epoch + 1
    raise AssertionError("it did not stop")


LOSS = {"metric": "loss", "patience": 3}


@pytest.mark.parametrize(
    ("values", "settings", "expected"),
    [
        ([5, 4, 3, 2, 2.5, 2.2, 2.1, 1.0], LOSS, (7, 4)),  # the 8th would have been better: it was not waited for
        ([5, 4, 3, 2, 2.5, 2.2, 1.9, 2.0, 2.0], LOSS, (9, 7)),  # the 7th came in time; then the epochs ran out
        ([5, 4, 3, 2, 2, 2, 2], LOSS, (7, 4)),  # as good is no better, and the first of equals is kept
        ([5, 4.9, 4.85, 4.75, 4.6], {**LOSS, "min_delta": 0.2, "patience": 4}, (5, 4)),  # 4.75: the first by 0.2
        ([5, 4.9, 4.85, 4.75, 4.6], {**LOSS, "min_delta": 0.3, "patience": 3}, (4, 1)),
        ([0.5, 0.7, 0.6, 0.6], {"patience": 2}, (4, 2)),  # accuracy: more is better
        ([0.5, 0.4], {"patience": 1}, (2, 1)),  # the first epoch is the first best
        ([0.5, 0.6, 0.7], {"patience": 1}, (3, 3)),  # it ends with the best: nothing to go back to
        ([math.nan, 5, math.nan, math.nan], {**LOSS, "patience": 2}, (4, 2)),  # nan is no better than anything
    ],
)
def test_when_it_stops(values: list[float], settings: dict[str, Any], expected: tuple[int, int]) -> None:
    assert play(values, **settings) == expected


class Generous(Stopper):
    """The mutant: as good counts as better."""

    def _is_better(self, value: float) -> bool:
        return super()._is_better(value) or value == self._value


class Early(Stopper):
    """The mutant: epochs are counted from 1, so that patience is one shorter."""

    def epoch_ended(self, epoch: int, scores: Mapping[str, float], last: bool) -> bool:
        return super().epoch_ended(epoch, scores, last or epoch + 1 - self.best >= self._settings.patience)


class Turned(Stopper):
    """The mutant: lower is better, whatever the metric."""

    def _is_better(self, value: float) -> bool:
        return value < self._value


@pytest.mark.parametrize("mutant", [Generous, Early, Turned])
def test_wrong_rules_are_caught(mutant: type[Stopper], monkeypatch: pytest.MonkeyPatch) -> None:
    cases: list[tuple[list[float], dict[str, Any]]] = [
        ([5, 4, 3, 2, 2, 2, 2], LOSS),
        ([5, 4, 3, 2, 2.5, 2.2, 1.9, 2.0, 2.0], LOSS),
        ([0.5, 0.7, 0.6, 0.6], {"patience": 2}),
    ]
    right = [play(values, **settings) for values, settings in cases]
    monkeypatch.setitem(globals(), "Stopper", mutant)
    assert [play(values, **settings) for values, settings in cases] != right


def refused(settings: Mapping[str, Any], objective: str = "classification") -> str:
    with pytest.raises(ConfigError) as caught:
        ContinualTrainer(nn.Linear(5, 2), None, {"early_stopping": settings}, objective)
    return str(caught.value)


def test_mistakes_are_named(make_mlp: Any) -> None:
    assert "early_stopping.metric: 'r2' is not measured for classification; known: accuracy, loss" in refused(
        {"metric": "r2"}
    )
    assert "'accuracy' is not measured for causal_lm; known: loss" in refused({"metric": "accuracy"}, "causal_lm")
    assert "early_stopping.patience: must be greater than or equal to 1, got 0" in refused({"patience": 0})
    assert "early_stopping.min_delta" in refused({"min_delta": -1})
    assert "Did you mean 'early_stopping.patience'?" in refused({"patienc": 2})
    assert "unknown objective 'clasify'" in refused({}, "clasify")
    trainer = ContinualTrainer(make_mlp(5, 2), None, {"early_stopping": {}})
    with pytest.raises(ConfigError, match="task 'task_0': early_stopping needs held-out rows; give val_loader"):
        trainer.train_task(noisy(0)[0])
    assert trainer.train_task(*noisy(0), num_epochs=2)


def test_a_metric_that_says_nothing_is_refused_before_training(make_mlp: Any) -> None:
    """R² of targets that are all alike is nan."""
    rows = [(torch.randn(5), torch.tensor(1.0)) for _ in range(4)]
    trainer = ContinualTrainer(make_mlp(5, 1), None, {"early_stopping": {}}, "regression")
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(ConfigError, match=r"metric: r2 is nan on the held-out rows .*: loss, rmse, mae"):
        trainer.train_task(rows, rows)
    assert all(map(torch.equal, before, trainer.model.parameters()))
    assert trainer.scores.tasks == []


@pytest.mark.parametrize("key", ["early_stopping", "score_epochs"])
def test_a_recipe_refuses_it(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}: only ContinualTrainer takes it"):
        validate(RunSettings, {"stream": {"arena": {}}, key: {}}, "recipe.yaml")


def test_the_metric_is_the_main_one_unless_said(make_mlp: Any, make_lm: Any) -> None:
    trainers = (
        ContinualTrainer(make_mlp(5, 2), None, {"early_stopping": {}}),
        ContinualTrainer(make_mlp(5, 1), None, {"early_stopping": {}}, "regression"),
        ContinualTrainer(make_lm(), None, {"early_stopping": {}}, "causal_lm"),
        ContinualTrainer(make_mlp(5, 2), None, {"early_stopping": {"metric": "loss"}}),
    )
    assert [t._stopper and t._stopper.metric for t in trainers] == ["accuracy", "r2", "loss", "loss"]


def test_it_comes_through_save_and_load(make_mlp: Any, tmp_path: Any) -> None:
    trainer = ContinualTrainer(make_mlp(5, 2), None, {**CONFIG, "early_stopping": STOPPING})
    trainer.train_task(*noisy(0), num_epochs=10)
    again = ContinualTrainer.load(trainer.save(tmp_path / "saved"), make_mlp(5, 2))
    for one in (trainer, again):
        torch.manual_seed(3)
        one.train_task(*noisy(1), task_id=1, num_epochs=10)
    assert again.settings.early_stopping == trainer.settings.early_stopping
    assert same_to_the_bit(trainer, again)
