"""PackNet: old tasks to the bit, owners by hand and by brute force; known wrong versions are planted and caught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import ModelError, StrategyError
from perdure.models.load import load
from perdure.strategies import Chain, Naive, PackNet, Replay, Strategy, packnet
from perdure.strategies.masks import packable, prune
from perdure.strategies.packnet import apply_mask
from perdure.training.learner import Learner
from perdure.types import Example, Phase, Task

from .conftest import WORLDS
from .test_laws import everything, killed_and_resumed

TRAIN, RETRAIN = Phase("train", 1), Phase("retrain", 1)


class Mixed(nn.Module):
    """Embedding, convolution, batch norm, layer norm and two linear layers: token ids [B, 6] to three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 10, 3, padding=1)
        self.batch = nn.BatchNorm1d(10)
        self.hidden = nn.Linear(10, 12)
        self.layer = nn.LayerNorm(12)
        self.out = nn.Linear(12, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.batch(self.conv(self.embed(ids).transpose(1, 2))).relu().mean(2)
        return self.out(self.layer(self.hidden(x)).relu())


def ids(task: str, count: int = 8) -> list[Example]:
    rng = torch.Generator().manual_seed(sum(map(ord, task)))
    draw = [torch.randint(0, 9, (6,), generator=rng) for _ in range(count)]
    return [Example(f"{task}{i}", task, x=x, y=x.sum() % 3) for i, x in enumerate(draw)]


def texts(task: str, count: int = 1) -> list[Example]:
    rng = torch.Generator().manual_seed(sum(map(ord, task)))
    draw = [torch.randint(3, 200, (8,), generator=rng) for _ in range(count)]
    return [Example(f"{task}{i}", task, x=x, y=x.clone()) for i, x in enumerate(draw)]


def learner_of(model: nn.Module, strategy: Strategy, objective: str = "classification", **changes: Any) -> Learner:
    settings = {"optimizer": {"type": "adamw", "lr": 1e-2, "weight_decay": 0.1}, **changes}
    return Learner(model, strategy, objective, validate(TrainingSettings, settings, "test"), 0)


def train(learner: Learner, index: int, rows: Sequence[Example], steps: tuple[int, int] = (3, 2)) -> Iterator[str]:
    """One task, by hand; yields after training, after pruning, after retraining and at the end."""
    learner.begin_task(Task(rows[0].task, tuple(rows)), index)
    for phase, count in zip((TRAIN, RETRAIN), steps, strict=True):
        for _ in range(count):
            learner.step(rows)
        yield phase.name
        learner.end_phase(phase)
        yield f"end of {phase.name}"
    learner.end_task()
    yield "end"


def run(learner: Learner, *tasks: Sequence[Example], steps: tuple[int, int] = (3, 2)) -> Learner:
    for index, rows in enumerate(tasks):
        for _ in train(learner, index, rows, steps):
            pass
    return learner


def answer(learner: Learner, rows: Sequence[Example]) -> Tensor:
    """Logits in eval mode, through the strategy."""
    learner.model.eval()
    with torch.no_grad():
        return learner.strategy.forward(learner.model, learner.collate(rows)).logits


def check_kept(make: Callable[[], Strategy], steps: tuple[int, int] = (14, 6), **changes: Any) -> None:
    """Task a is answered to the bit as when it was finished, at every moment of task b."""
    torch.manual_seed(0)
    learner = run(learner_of(Mixed(), make(), **changes), ids("a"))
    before, plain = answer(learner, ids("a")), copy.deepcopy(learner.model.state_dict())
    for where in train(learner, 1, ids("b"), steps):
        assert torch.equal(answer(learner, ids("a")), before), where
    own = learner.model.state_dict()
    assert sum(not torch.equal(own[name], plain[name]) for name in own) == 3  # conv, hidden and out were trained


def test_old_outputs_are_bitwise_equal_after_1000_steps() -> None:
    check_kept(PackNet, (700, 300))


def test_old_outputs_are_bitwise_equal_where_weights_go_back_to_the_start() -> None:
    check_kept(lambda: PackNet(prune_to="start"))


class Remembers(PackNet):
    """PackNet, and the gradients that the optimizer was last given."""

    def gradient(self, ctx: Any, batches: Any) -> None:
        super().gradient(ctx, batches)
        self.last = {p: p.grad.clone() for p in ctx.model.parameters() if p.grad is not None}


def repeat(learner: Learner, strategy: Remembers, count: int) -> None:
    """So many updates with the last gradients: the hooks and the optimizer as in a step."""
    assert learner.optimizer is not None
    for _ in range(count):
        for p, gradient in strategy.last.items():
            p.grad = gradient
        learner.optimizer.step()
        strategy.after_step(learner.ctx, (), ())  # type: ignore[arg-type]
    learner.optimizer.zero_grad()


def test_old_outputs_of_nano_are_bitwise_equal_after_1000_steps() -> None:
    """The output layer of a language model is its embedding. One update of 20 has its own gradient, for speed."""
    settings = {"type": "adamw", "lr": 1e-3, "weight_decay": 0.1, "fused": True}
    strategy = Remembers()
    learner = run(learner_of(load("nano").model, strategy, "causal_lm", optimizer=settings), texts("a"))
    before = answer(learner, texts("a"))
    learner.begin_task(Task("b", texts("b")), 1)
    for phase, steps in ((TRAIN, 35), (RETRAIN, 15)):
        for _ in range(steps):
            learner.step(texts("b"))
            repeat(learner, strategy, 19)
        assert torch.equal(answer(learner, texts("a")), before), phase.name
        learner.end_phase(phase)
    learner.end_task()
    assert torch.equal(answer(learner, texts("a")), before)
    assert not torch.equal(learner.model(texts("a")[0].x[None]).logits, before)  # type: ignore[index]


@pytest.mark.parametrize("kind", ["sgd", "adam", "adafactor"])
def test_old_outputs_stay_under_other_optimizers_that_carry_on(kind: str) -> None:
    check_kept(PackNet, optimizer={"type": kind, "lr": 1e-2, "weight_decay": 0.1, "at_boundary": "continue"})


class GradientMasksOnly(PackNet):
    """Wrong: weight decay, and moments from before, move what is masked."""

    def after_step(self, *given: Any) -> None:
        pass


class RestoresBefore(PackNet):
    """Wrong: what is fixed is put back before the optimizer's step."""

    def gradient(self, ctx: Any, batches: Any) -> None:
        super().gradient(ctx, batches)
        super().after_step(ctx, batches, ())

    def after_step(self, *given: Any) -> None:
        pass


class NormsTrain(PackNet):
    """Wrong: norms, biases and embeddings are trained on."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        ctx.model.requires_grad_(True)


class StatisticsMove(PackNet):
    """Wrong: running means follow the new task."""

    def mix(self, ctx: Any, examples: Any) -> Any:
        return examples


class NoMask(PackNet):
    """Wrong: an old task is answered by all weights."""

    def _has_mask(self, task: str) -> bool:
        return False


class MasksLaterOnly(PackNet):
    """Wrong: the newest task's weights are left out, those that are free and being trained are not."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        owners = self.owners
        self.owners = {name: owner.where(owner > 0, 1) for name, owner in owners.items()}
        try:
            return super().forward(model, batch)
        finally:
            self.owners = owners


@pytest.mark.parametrize(
    "mutant", [GradientMasksOnly, RestoresBefore, NormsTrain, StatisticsMove, NoMask, MasksLaterOnly]
)
def test_what_moves_an_old_task_is_caught(mutant: type[PackNet]) -> None:
    with pytest.raises(AssertionError):
        check_kept(mutant)


@pytest.mark.parametrize("mutant", [GradientMasksOnly, RestoresBefore])
def test_moments_alone_move_what_is_masked(mutant: type[PackNet]) -> None:
    """Without any weight decay, where the optimizer's state is carried into the next task."""
    settings = {"type": "adamw", "lr": 1e-2, "weight_decay": 0.0, "at_boundary": "continue"}
    check_kept(PackNet, optimizer=settings)
    with pytest.raises(AssertionError):
        check_kept(mutant, optimizer=settings)


def check_pruned_are_zero(make: Callable[[], PackNet]) -> None:
    strategy = make()
    torch.manual_seed(0)
    learner = learner_of(Mixed(), strategy)
    for index, rows in enumerate((ids("a"), ids("b"))):
        for where in train(learner, index, rows, (5, 5)):
            if where != "train":
                own = dict(learner.model.named_parameters())
                assert all(bool((own[n][owner == 0] == 0).all()) for n, owner in strategy.owners.items()), where


def test_pruned_weights_are_zero_while_retraining() -> None:
    check_pruned_are_zero(PackNet)


@pytest.mark.parametrize("mutant", [GradientMasksOnly, RestoresBefore])
def test_pruned_weights_that_come_back_are_caught(mutant: type[PackNet]) -> None:
    """Also in the first task, where the moments are those of training."""
    with pytest.raises(AssertionError):
        check_pruned_are_zero(mutant)


def owners_by_hand(make: Callable[[], PackNet], start: float = 0.0) -> tuple[PackNet, nn.Linear]:
    """Two tasks on eight weights of one layer; training is a hand that writes values."""
    model = nn.Linear(4, 2, bias=False)
    nn.init.constant_(model.weight, start)
    learner = learner_of(model, strategy := make())
    given = ([[0.1, -0.8, 0.3, -0.05], [0.6, 0.2, -0.4, 0.7]], [[0.5, 9.0, -0.1, 0.25], [9.0, 0.3, 9.0, 9.0]])
    for index, values in enumerate(given):
        learner.begin_task(
            Task("ab"[index], [Example("r", "ab"[index], x=torch.ones(4), y=torch.tensor(0))]), index
        )
        with torch.no_grad():
            free = strategy.owners["weight"] == 0
            model.weight.copy_(torch.where(free, torch.tensor(values), model.weight))
        learner.end_phase(TRAIN)
        learner.end_phase(RETRAIN)
        learner.end_task()
    return strategy, model


def check_by_hand(make: Callable[[], PackNet]) -> None:
    """Half of what is free, twice.

    Task a: of 0.1 0.8 0.3 0.05 / 0.6 0.2 0.4 0.7 the four largest are 0.8, 0.6, 0.4 and 0.7. Task b may use the
    four others, which have become 0.5, 0.1, 0.25 and 0.3: the two largest are 0.5 and 0.3. On ones, task a answers
    (-0.8, 0.6 - 0.4 + 0.7) = (-0.8, 0.9), task b (0.5 - 0.8, 0.9 + 0.3) = (-0.3, 1.2).
    """
    strategy, model = owners_by_hand(make)
    assert strategy.owners["weight"].tolist() == [[2, 1, 0, 0], [1, 2, 1, 1]]
    expected = torch.tensor([[0.5, -0.8, 0, 0], [0.6, 0.3, -0.4, 0.7]])
    assert torch.equal(model.weight, expected)
    assert strategy.usage(model) == {"weight": {"a": 4, "b": 2, "free": 2}}
    ones = torch.ones(4)
    for task, logits in (("a", [-0.8, 0.9]), ("b", [-0.3, 1.2]), ("c", [-0.3, 1.2])):
        with strategy.serving(model, task):
            torch.testing.assert_close(model(ones), torch.tensor(logits))
    assert torch.equal(model.weight, expected)


def check_start_by_hand(make: Callable[[], PackNet]) -> None:
    """The same values over a layer that begins at 0.5 throughout: what counts is how far a weight has come from it.

    Task a: the distances are 0.4 1.3 0.2 0.55 / 0.1 0.3 0.9 0.2, so 0.1, -0.8, -0.05 and -0.4 are kept. The four
    that task b may use become -0.1, 9, 0.3 and 9, whose distances are 0.6, 8.5, 0.2 and 8.5: it keeps both nines.
    On ones, task a answers (0.1 - 0.8 + 0.5 - 0.05, 0.5 + 0.5 - 0.4 + 0.5), task b the same first, and then
    9 + 0.5 - 0.4 + 9.
    """
    strategy, model = owners_by_hand(make, 0.5)
    assert strategy.owners["weight"].tolist() == [[1, 1, 0, 1], [2, 0, 1, 2]]
    expected = torch.tensor([[0.1, -0.8, 0.5, -0.05], [9.0, 0.5, -0.4, 9.0]])
    assert torch.equal(model.weight, expected)
    for task, logits in (("a", [-0.25, 1.1]), ("b", [-0.25, 18.1])):
        with strategy.serving(model, task):
            torch.testing.assert_close(model(torch.ones(4)), torch.tensor(logits))
    assert torch.equal(model.weight, expected)


def test_two_tasks_that_go_back_to_the_start_by_hand() -> None:
    check_start_by_hand(lambda: PackNet(prune_percentage=0.5, prune_to="start"))


class ByMagnitude(PackNet):
    """Wrong: a weight that goes back to its start is judged by its size, not by how far it has come."""

    def _scores(self, ctx: Any) -> dict[str, Tensor]:
        return {name: p.detach().abs() for name, p in self._weights.items()}


@pytest.mark.parametrize(("mutant", "to"), [(ByMagnitude, "start"), (PackNet, "zero")])
def test_a_start_that_is_not_heeded_is_caught(mutant: type[PackNet], to: Any) -> None:
    with pytest.raises(AssertionError):
        check_start_by_hand(lambda: mutant(prune_percentage=0.5, prune_to=to))


def half() -> PackNet:
    return PackNet(prune_percentage=0.5)


def test_two_tasks_by_hand() -> None:
    check_by_hand(half)


def of_all_weights(owner: Tensor, score: Tensor, share: float, task: int) -> Tensor:
    """Wrong: the share is that of all weights, whoever owns them."""
    return prune(torch.zeros_like(owner), score, share, task).where(owner == 0, owner)


def below_the_quantile(owner: Tensor, score: Tensor, share: float, task: int) -> Tensor:
    """Wrong: off by one, for the score at the threshold is itself pruned."""
    free = owner == 0
    count = int(share * int(free.sum()))
    return owner.where(~free | (score <= score[free].sort().values[count]), task)


def keeps_the_smallest(owner: Tensor, score: Tensor, share: float, task: int) -> Tensor:
    """Wrong: the share is what is kept, and of the wrong end."""
    return prune(owner, -score, share, task)


def takes_from_others(owner: Tensor, score: Tensor, share: float, task: int) -> Tensor:
    """Wrong: weights of earlier tasks are handed on."""
    return prune(torch.zeros_like(owner), score, share, task)


WRONG_PRUNING = [of_all_weights, below_the_quantile, keeps_the_smallest, takes_from_others]


@pytest.mark.parametrize("wrong", WRONG_PRUNING)
def test_wrong_pruning_is_caught(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packnet, "prune", wrong)
    with pytest.raises(AssertionError):
        check_by_hand(half)


def check_shares(make: Callable[[], PackNet]) -> None:
    """Of every layer the same share of what is free, whatever its scale: 0.7 of 240, 120, 36; then of the rest."""
    torch.manual_seed(0)
    model = Mixed()
    with torch.no_grad():
        model.out.weight.mul_(100)
    strategy = make()
    run(learner_of(model, strategy), ids("a"), ids("b"))
    counts = {name: [layer["a"], layer["b"], layer["free"]] for name, layer in strategy.usage(model).items()}
    assert counts == {
        "conv": [240 - 168, 168 - 117, 117],  # 0.7 · 168 = 117.6
        "hidden": [120 - 84, 84 - 58, 58],  # 58.8
        "out": [36 - 25, 25 - 17, 17],  # 25.2, 17.5
    }


def seven_tenths() -> PackNet:
    return PackNet(prune_percentage=0.7)


def test_fractions_are_exact_in_every_layer() -> None:
    check_shares(seven_tenths)


class OneThreshold(PackNet):
    """Wrong: one threshold for all layers, so that a layer of small weights loses them all."""

    def after_phase(self, ctx: Any, phase: Phase) -> None:
        scores = self._scores(ctx)
        free = {name: owner == 0 for name, owner in self.owners.items()}
        limit = torch.cat([scores[name][free[name]] for name in scores]).quantile(self.prune_percentage)
        super().after_phase(ctx, phase)
        for name, owner in self.owners.items():
            self.owners[name] = owner.where(~free[name], (scores[name] > limit).byte() * len(self.tasks))


def test_one_threshold_for_all_layers_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_shares(lambda: OneThreshold(prune_percentage=0.7))


@pytest.mark.parametrize("wrong", [of_all_weights, below_the_quantile, takes_from_others])
def test_wrong_shares_are_caught(wrong: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packnet, "prune", wrong)
    with pytest.raises(AssertionError):
        check_shares(seven_tenths)


@pytest.mark.parametrize("share", [0.1, 0.29, 0.5, 0.58, 0.75, 0.999])
def test_pruning_by_brute_force(share: float) -> None:
    """With ties, against sorting in plain Python; 0.29 of 100 is 29, which it is not as a float."""
    rng = torch.Generator().manual_seed(int(share * 1000))
    score = torch.randint(0, 12, (10, 25), generator=rng).float()
    owner = torch.zeros(10, 25, dtype=torch.uint8)
    owner.view(-1)[torch.randperm(250, generator=rng)[:150]] = 1
    found = prune(owner, score, share, 2).flatten().tolist()
    free = [i for i in range(250) if owner.flatten()[i] == 0]
    order = sorted(free, key=lambda i: (float(score.flatten()[i]), i))
    pruned = round(share * 1000) * 100 // 1000
    assert [i for i in free if found[i] == 0] == sorted(order[:pruned])
    assert [i for i in range(250) if found[i] == 1] == [i for i in range(250) if owner.flatten()[i] == 1]
    assert sum(k == 2 for k in found) == 100 - pruned


def check_tied(make: Callable[[], PackNet]) -> None:
    """Two linear layers of one weight have one map, and half of it is pruned once."""
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    strategy = make()
    rows = [Example(f"{i}", "a", x=torch.randn(6), y=torch.tensor(i)) for i in range(6)]
    run(learner_of(model, strategy), rows)
    assert strategy.usage(model) == {"0": {"a": 18, "free": 18}}
    assert int((model[0].weight == 0).sum()) == 18


def test_a_tied_weight_has_one_mask() -> None:
    check_tied(half)


class TiedTwice(PackNet):
    """Wrong: a weight that two layers share is pruned once for each."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        twice = dict(ctx.model.named_parameters(remove_duplicate=False))
        self._weights = {name: p for name, p in twice.items() if p.dim() > 1}
        self.owners = {name: torch.zeros(p.shape, dtype=torch.uint8) for name, p in self._weights.items()}


def test_two_masks_of_a_tied_weight_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_tied(lambda: TiedTwice(prune_percentage=0.5))


def check_saliency(make: Callable[[], PackNet]) -> None:
    """|w·∂L/∂w| row by row, unbatched, with the dropout of the model off: which weights are kept, and of b too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.5), nn.Linear(7, 3))
    strategy = make()
    learner = learner_of(model, strategy)
    for index, task in enumerate("ab"):
        rows = [Example(f"{task}{i}", task, x=torch.randn(5), y=torch.tensor(i % 3)) for i in range(40)]
        learner.begin_task(Task(task, rows), index)
        for _ in range(3):
            learner.step(rows[:8])
        model.eval()
        weights = {n: p for n, p in model.named_parameters() if n in strategy.owners}
        total = {n: torch.zeros_like(p) for n, p in weights.items()}
        for row in rows:
            loss = nn.functional.cross_entropy(model(row.x), row.y)  # type: ignore[arg-type]
            for n, g in zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True):
                total[n] += g / len(rows)
        free = {n: (owner == 0).flatten().tolist() for n, owner in strategy.owners.items()}
        scores = {n: (p * total[n]).abs().flatten().tolist() for n, p in weights.items()}
        model.train()
        learner.end_phase(TRAIN)
        for name, owner in strategy.owners.items():
            places = sorted((i for i, open_ in enumerate(free[name]) if open_), key=lambda i: scores[name][i])
            kept = [i for i, k in enumerate(owner.flatten().tolist()) if k == index + 1]
            assert kept == sorted(places[len(places) // 2 :]), name
        learner.end_phase(RETRAIN)
        learner.end_task()


def by_gradient() -> PackNet:
    return PackNet(prune_percentage=0.5, use_magnitude_pruning=False)


def test_weight_times_gradient_by_brute_force(float64: None) -> None:
    check_saliency(by_gradient)


class GradientAlone(PackNet):
    """Wrong: |∂L/∂w|, whatever the weight."""

    def _scores(self, ctx: Any) -> dict[str, Tensor]:
        return {name: score / self._weights[name].detach().abs() for name, score in super()._scores(ctx).items()}


class LastRows(PackNet):
    """Wrong: the gradient of a part of the task's rows."""

    def _scores(self, ctx: Any) -> dict[str, Tensor]:
        return super()._scores(ctx.but(task=Task(ctx.task.name, ctx.task.train[-8:])))


class InTrainMode(PackNet):
    """Wrong: dropout takes part."""

    def _scores(self, ctx: Any) -> dict[str, Tensor]:
        return super()._scores(ctx.but(loss_of=lambda rows, reduction: ctx.loss_of(rows, None, reduction, True)))


class RowByRow(PackNet):
    """Wrong: the mean of |w·∂L_i/∂w| over rows, in which nothing cancels."""

    def _scores(self, ctx: Any) -> dict[str, Tensor]:
        one = [super(RowByRow, self)._scores(ctx.but(task=Task("", [row]))) for row in ctx.task.train]
        return {name: torch.stack([each[name] for each in one]).mean(0) for name in one[0]}


@pytest.mark.parametrize("mutant", [GradientAlone, LastRows, InTrainMode, RowByRow, PackNet])
def test_wrong_saliencies_are_caught(mutant: type[PackNet], float64: None) -> None:
    """PackNet itself stands for magnitudes where |w·∂L/∂w| was asked for."""
    with pytest.raises(AssertionError):
        check_saliency(lambda: mutant(prune_percentage=0.5, use_magnitude_pruning=mutant is PackNet))


def test_magnitudes_by_brute_force() -> None:
    torch.manual_seed(0)
    model, strategy = Mixed(), half()
    learner = learner_of(model, strategy)
    for where in train(learner, 0, ids("a")):
        if where == "train":
            trained = {name: p.detach().abs().flatten().tolist() for name, p in model.named_parameters()}
        if where == "end of train":
            for name, owner in strategy.owners.items():
                order = sorted(range(owner.numel()), key=lambda i: trained[name][i])
                kept = [i for i, k in enumerate(owner.flatten().tolist()) if k]
                assert kept == sorted(order[owner.numel() // 2 :]), name


def test_the_map_is_one_byte_a_weight() -> None:
    """After four tasks too: 240 + 120 + 36 weights."""
    strategy = PackNet()
    run(learner_of(Mixed(), strategy), *(ids(task) for task in "abcd"))
    assert not strategy.state_dict()["start"]
    held = strategy.state_dict()["owners"]
    assert {name: owner.dtype for name, owner in held.items()} == dict.fromkeys(held, torch.uint8)
    assert sum(owner.numel() * owner.element_size() for owner in held.values()) == 396
    assert not strategy._fixed


def test_the_256th_task_is_refused() -> None:
    learner = learner_of(Mixed(), PackNet())
    learner.begin_task(Task("first", ids("a")), 0)
    learner.begin_task(Task("last", ids("a")), 254)
    with pytest.raises(StrategyError, match="tells 255 tasks apart; task 'one more' would be number 256"):
        learner.begin_task(Task("one more", ids("a")), 255)


def test_what_is_packed() -> None:
    """Weights of layers, but no biases, norms, embeddings, nor what is frozen or shared with an embedding."""
    from transformers.pytorch_utils import Conv1D

    parts = {
        "linear": nn.Linear(3, 3), "conv": nn.Conv2d(2, 2, 3), "up": nn.ConvTranspose3d(2, 2, 2),
        "gpt2": Conv1D(3, 3), "lstm": nn.LSTM(3, 3), "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
        "norm": nn.BatchNorm2d(3), "layer": nn.LayerNorm([3, 3]), "words": nn.Embedding(5, 3),
        "tied": nn.Linear(3, 5), "frozen": nn.Linear(3, 3).requires_grad_(False),
    }  # fmt: skip
    parts["tied"].weight = parts["words"].weight
    assert set(packable(nn.ModuleDict(parts))) == {
        "linear.weight", "conv.weight", "up.weight", "gpt2.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
        "attention.in_proj_weight", "attention.out_proj.weight",
    }  # fmt: skip


def test_rows_of_several_tasks_in_one_batch() -> None:
    """Each as alone; a task that was not begun by the network as it is."""
    torch.manual_seed(0)
    learner = run(learner_of(Mixed(), PackNet()), ids("a"), ids("b"))
    for _ in zip(range(1), train(learner, 2, ids("c")), strict=False):
        pass
    rows = [row for group in zip(ids("a"), ids("z"), ids("c"), ids("b"), strict=True) for row in group]
    together = answer(learner, rows)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(answer(learner, [row])[0], logits)
    assert torch.equal(answer(learner, ids("z")), learner.model(torch.stack([row.x for row in ids("z")])))  # type: ignore[misc]
    assert not torch.equal(answer(learner, ids("a")), answer(learner, [row.but(task="b") for row in ids("a")]))


def test_the_network_that_serves_a_task_is_put_back() -> None:
    torch.manual_seed(0)
    strategy = PackNet()
    learner = run(learner_of(Mixed(), strategy), ids("a"), ids("b"))
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in learner.model.named_parameters()}
    x = torch.stack([row.x for row in ids("a")])  # type: ignore[misc]
    expected = answer(learner, ids("a"))

    def fails() -> None:
        with torch.no_grad(), strategy.serving(learner.model, "a"):
            assert torch.equal(learner.model(x), expected)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    for name, p in learner.model.named_parameters():
        assert (p.data_ptr(), True) == (before[name][0], torch.equal(p, before[name][1])), name


def test_a_row_whose_task_nobody_tells_goes_to_the_surest() -> None:
    """Entropies worked out from networks that were masked by hand; the unfinished third task is no choice."""
    torch.manual_seed(0)
    strategy = PackNet(infer="surest")
    learner = run(learner_of(Mixed(), strategy), ids("a"), ids("b"), steps=(30, 10))
    rows = [*ids("a"), *ids("b"), *ids("other")]
    for _ in zip(range(1), train(learner, 2, ids("c")), strict=False):
        pass
    learner.model.eval()
    entropies = []
    for number in (1, 2):
        alone = copy.deepcopy(learner.model)
        with torch.no_grad():
            for name, p in alone.named_parameters():
                if name in strategy.owners:
                    p[(strategy.owners[name] == 0) | (strategy.owners[name] > number)] = 0
            chances = alone(torch.stack([row.x for row in rows])).softmax(1)  # type: ignore[misc]
        entropies.append(-(chances * chances.log()).sum(1))
    expected = ["ab"[int(two < one)] for one, two in zip(*entropies, strict=True)]
    assert strategy.identify(learner.model, learner.collate(rows)) == expected
    assert len(set(expected)) == 2


def check_nearest(make: Callable[[], PackNet]) -> None:
    """Features are those of the first task's network, masked by hand, whenever they are asked for.

    The last linear layer takes in what layer norm and ReLU give; cosines are those from the mean of all three.
    """
    torch.manual_seed(0)
    strategy = make()
    tasks = [ids("a", 20), ids("b", 20), ids("c", 20)]
    learner = run(learner_of(Mixed(), strategy), *tasks, steps=(30, 10))
    alone = copy.deepcopy(learner.model).eval()
    with torch.no_grad():
        for name, owner in strategy.owners.items():
            alone.get_parameter(name)[owner != 1] = 0
    seen: list[Tensor] = []
    alone.out.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))  # type: ignore[union-attr]

    def look(rows: Sequence[Example]) -> Tensor:
        alone(torch.stack([row.x for row in rows]))  # type: ignore[misc]
        return seen[-1]

    means = torch.stack([look(rows).mean(0) for rows in tasks])
    for name, mean in zip("abc", means, strict=True):
        torch.testing.assert_close(strategy.prototypes.means[name], mean, rtol=0, atol=1e-6)
    held = [row.but(task="") for task in "abc" for row in ids(task, 40)[20:]]
    centred = nn.functional.cosine_similarity((look(held) - means.mean(0))[:, None], means - means.mean(0), dim=2)
    learner.model.eval()
    assert strategy.identify(learner.model, learner.collate(held)) == ["abc"[i] for i in centred.argmax(1)]


def test_a_row_goes_to_the_task_whose_rows_looked_most_like_it() -> None:
    check_nearest(PackNet)


class LooksThroughTheNewest(PackNet):
    """Wrong: features of later tasks come from later networks, so that they cannot be compared."""

    def _has_mask(self, task: str) -> bool:
        return False


def test_features_of_several_networks_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_nearest(LooksThroughTheNewest)


@pytest.mark.parametrize("to", ["zero", "start"])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_an_export_answers_as_the_run_does(
    to: Any, tuning: Any, make_lm: Callable[..., Any], make_lm_rows: Callable[..., Any], tmp_path: Path
) -> None:
    """Loaded by other libraries' own means and masked for each task: the same logits."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from perdure.models.adapters import tune

    base = make_lm("llama", spread=0.3, tie_word_embeddings=True)
    model = tune(copy.deepcopy(base), tuning, **({} if tuning == "full" else {"r": 4}))
    tasks = [make_lm_rows(4, seed, task) for seed, task in enumerate("abc")]
    learner = run(learner_of(model, PackNet(prune_percentage=0.5, prune_to=to), "causal_lm"), *tasks)
    learner.strategy.export(model, tmp_path)
    found = []
    for task in "abc":
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path) if tuning == "full" else copy.deepcopy(base)
        if tuning == "lora":
            loaded = PeftModel.from_pretrained(loaded, tmp_path)
        rows = [row.but(task=task) for row in tasks[0]]
        loaded = apply_mask(loaded.eval(), tmp_path, task)
        with torch.no_grad():
            found.append(loaded(input_ids=learner.collate(rows).x, use_cache=False).logits)
        assert torch.equal(found[-1], answer(learner, rows)), task
    assert not torch.equal(found[0], found[1])
    with pytest.raises(StrategyError, match=r"unknown task 'd'. Known: a, b, c"):
        apply_mask(loaded, tmp_path, "d")
    with pytest.raises(ModelError, match="masks are of another model"):
        apply_mask(Mixed(), tmp_path, "a")
    with pytest.raises(ModelError, match=r"holds no packnet.json"):
        apply_mask(loaded, tmp_path / "elsewhere", "a")


@cache
def undisturbed(world: str) -> str:
    torch.manual_seed(5)
    return everything(WORLDS[world], WORLDS[world].run(WORLDS[world].learner(half())))


@pytest.mark.parametrize("name", ["mlp", "llama", "llama-lora"])
@pytest.mark.parametrize(("epochs", "more"), [(3, -1), (3, 0), (5, 0), (6, -1), (6, 0)])
def test_killed_while_retraining_and_resumed_ends_the_same(
    name: str, epochs: int, more: int, tmp_path: Path
) -> None:
    """Three epochs a task, of which the last one retrains; after 5 it stands before the second pruning."""
    at = epochs * len(WORLDS[name].source(0)) + more
    resumed = killed_and_resumed(WORLDS[name], half, at, tmp_path / "saved")
    assert everything(WORLDS[name], resumed) == undisturbed(name)


@pytest.mark.parametrize("at", [11, 17])
def test_without_its_owners_the_resumed_run_differs(at: int, mlp_world: Any, tmp_path: Path) -> None:
    resumed = killed_and_resumed(mlp_world, half, at, tmp_path / "saved", lose="strategy")
    assert everything(mlp_world, resumed) != undisturbed("mlp")


def test_the_first_task_is_plain_training_until_it_is_pruned(mlp_world: Any) -> None:
    """Six of its nine steps, dropout included."""
    ends = []
    for strategy in (PackNet(), Naive()):
        torch.manual_seed(7)
        learner = mlp_world.learner(strategy)
        for step, _ in enumerate(mlp_world.train(learner, upto=1), start=1):
            if step == 6:
                break
        ends.append([p.detach().clone() for p in learner.model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


@pytest.mark.parametrize(("setting", "planned", "expected"), [(None, 1, 1), (None, 5, 3), (None, 10, 5), (4, 1, 4)])
def test_epochs_of_retraining(setting: int | None, planned: int, expected: int) -> None:
    phases = PackNet(retrain_epochs=setting).phases(Task("t", ()), [Phase("train", planned)])
    assert [(phase.name, phase.epochs) for phase in phases] == [("train", planned), ("retrain", expected)]


def test_the_norm_of_a_gradient_is_that_of_what_is_trained() -> None:
    """Else what is fixed would count when gradients are clipped."""
    torch.manual_seed(0)
    strategy = PackNet()
    learner = run(learner_of(Mixed(), strategy), ids("a"))
    learner.begin_task(Task("b", ids("b")), 1)
    learner.model.train()
    for module in learner.model.modules():
        module.training = not isinstance(module, nn.BatchNorm1d)
    x, y = (torch.stack([getattr(row, part) for row in ids("b")]) for part in "xy")
    own = {n: p for n, p in learner.model.named_parameters() if n in strategy.owners}
    found = torch.autograd.grad(nn.functional.cross_entropy(learner.model(x), y), list(own.values()))
    square = sum(float(g[strategy.owners[n] == 0].square().sum()) for n, g in zip(own, found, strict=True))
    assert learner.step(ids("b")).gradient_norm == pytest.approx(square**0.5, rel=1e-5)


def test_a_task_that_failed_can_be_begun_again() -> None:
    """What it owned is free again, and earlier tasks are as they were."""
    torch.manual_seed(0)
    strategy = PackNet()
    learner = run(learner_of(Mixed(), strategy), ids("a"))
    before, used = answer(learner, ids("a")), strategy.usage(learner.model)["hidden"]["a"]
    for where in train(learner, 1, ids("b")):
        if where == "end of train":
            break
    for _ in train(learner, 1, ids("b")):
        assert torch.equal(answer(learner, ids("a")), before)
    assert strategy.tasks == ["a", "b"]
    assert strategy.usage(learner.model)["hidden"] == {"a": used, "b": 90 - 67, "free": 67}  # 0.75 · 90 = 67.5


def test_a_network_without_free_weights_is_refused() -> None:
    """0.4 of 2 weights is none, so that the first task takes them all."""
    model = nn.Linear(2, 1, bias=False)
    learner = learner_of(model, PackNet(prune_percentage=0.4), "regression")
    rows = [Example("r", "a", x=torch.ones(2), y=torch.ones(()))]
    run(learner, rows)
    with pytest.raises(StrategyError, match=r"no weight is free for task 'b'.* a larger prune_percentage than 0.4"):
        learner.begin_task(Task("b", rows), 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prune_percentage": 0}, "prune_percentage"),
        ({"prune_percentage": 1.0}, "prune_percentage"),
        ({"prune_percentage": 75}, r"a share between 0 and 1 \(0.75 prunes 75 %\), got 75"),
        ({"retrain_epochs": 0}, "retrain_epochs"),
        ({"prune_to": "one"}, "prune_to"),
        ({"infer": "name"}, "unknown infer 'name'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=f"packnet: .*{message}"):
        PackNet(**settings)


def test_a_model_with_nothing_to_prune_is_refused() -> None:
    with pytest.raises(StrategyError, match="so there is nothing to prune"):
        learner_of(nn.Sequential(nn.Embedding(3, 3), nn.LayerNorm(3)), PackNet())


def test_rehearsal_beside_it_is_refused() -> None:
    with pytest.raises(StrategyError, match="would train nothing"):
        Chain([PackNet(), Replay()])


def test_in_bf16_every_task_has_its_own_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast keeps casts of a parameter whose values are swapped: rows of two tasks must not share one mask."""

    clear = torch.clear_autocast_cache

    def apart() -> float:
        learner = learner_of(Mixed(), PackNet(), precision="bf16")
        tasks = [ids("a"), ids("b"), ids("c")]
        run(learner, *tasks)
        found = []
        for rows in (tasks[0], tasks[1], [*tasks[0], *tasks[1]]):
            clear()
            with learner.autocast():
                found.append(answer(learner, rows))
        return float((found[2] - torch.cat(found[:2])).abs().max())

    assert apart() < 1e-6
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
    assert apart() > 1e-3
