"""O-LoRA: its penalty by hand, its adapters, and what it exports; wrong versions are planted and must be caught."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models.adapters import tune
from perdure.strategies import EWC, SI, Chain, LwF, OLoRA
from perdure.strategies.base import Strategy
from perdure.training.learner import Learner
from perdure.types import Example, Task


def learner_of(model: nn.Module, strategy: Strategy, objective: str = "causal_lm", **settings: Any) -> Learner:
    changes = {"optimizer": {"lr": 0.01, "weight_decay": 0.1}, **settings}
    return Learner(model, strategy, objective, validate(TrainingSettings, changes, "test"), 0)


def small(**config: Any) -> Any:
    """One linear layer, 2 -> 2, with LoRA of rank 2."""
    settings = {"r": 2, "lora_alpha": 2, "target_modules": ["0"], **config}
    return get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(**settings))


def vectors(n: int = 4) -> list[Example]:
    return [Example(str(i), "t", x=torch.randn(2), y=torch.tensor(i % 2)) for i in range(n)]


def texts(n: int = 4) -> list[Example]:
    ids = torch.tensor([3, 4, 5, 6, 7])
    return [Example(str(i), "t", x=ids[: 2 + i % 4] + i, y=ids[: 2 + i % 4] + i) for i in range(n)]


def factors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if f".{adapter}." in name}


def by_hand(make: Callable[[float], OLoRA], micro: int | None = None) -> None:
    """One layer; λ = 0.5, A_old = [[1, 2], [0, -1]], A_new = [[3, -1], [1, 1]].

    A_new·A_oldᵀ = [[1, 1], [3, -1]], so the penalty is 0.5 · (1 + 1 + 3 + 1) = 3, and its gradient by A_new
    0.5 · [[1, 1], [1, -1]]·A_old = [[0.5, 0.5], [0.5, 1.5]]. B_new is zero, so the loss has no gradient by A_new.
    """
    learner = learner_of(
        small(), make(0.5), "classification", micro_batch_size=micro, optimizer={"type": "sgd", "lr": 1.0}
    )
    rows = vectors()
    learner.begin_task(Task("a", rows), 0)
    learner.begin_task(Task("b", rows), 1)
    old, new = (factors(learner.model, name) for name in ("default", "task1"))
    (a_old,), (a_new,) = ([p for n, p in found.items() if "lora_A" in n] for found in (old, new))
    start = torch.tensor([[3.0, -1.0], [1.0, 1.0]])
    with torch.no_grad():
        a_old.copy_(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
        a_new.copy_(start)
    bare = float(learner.ctx.loss_of(rows).detach())  # type: ignore[union-attr]
    result = learner.step(rows)
    expected = start - torch.tensor([[0.5, 0.5], [0.5, 1.5]])
    torch.testing.assert_close(a_new.detach(), expected, rtol=0, atol=1e-6)
    assert result.loss - bare == pytest.approx(3.0, abs=1e-5)


@pytest.mark.parametrize("micro", [None, 1, 3])
def test_the_penalty_by_hand(micro: int | None) -> None:
    """The same however the step is cut into micro-batches."""
    by_hand(OLoRA, micro)


class ForEachMicroBatch(OLoRA):
    """Wrong: the whole penalty is added to each micro-batch, after the division by their number."""

    def penalty(self, ctx: Any, batch: Any, output: Any) -> Tensor:
        layer = self._layers[0]
        overlap = layer.lora_A["task1"].weight @ layer.lora_A["default"].weight.T
        return self.strength * overlap.abs().sum() * 4  # the step's targets, by which it is divided

    def gradient(self, ctx: Any, batches: Any) -> None:
        pass


class Squared(OLoRA):
    """Wrong here: the paper's squares in place of absolute values."""

    def gradient(self, ctx: Any, batches: Sequence[Any]) -> None:
        layer = self._layers[0]
        old, new = layer.lora_A["default"].weight, layer.lora_A["task1"].weight
        new.grad.add_(self.strength * 2 * (new @ old.T @ old))
        ctx.log("penalty", self.strength * float((new @ old.T).detach().square().sum()))


class OfB(OLoRA):
    """Wrong: keeps the columns of B apart, of which the new ones are zero."""

    def gradient(self, ctx: Any, batches: Sequence[Any]) -> None:
        layer = self._layers[0]
        old, new = layer.lora_B["default"].weight, layer.lora_B["task1"].weight
        new.grad.add_(self.strength * (old @ (old.T @ new).sign()))


@pytest.mark.parametrize(("mutant", "micro"), [(ForEachMicroBatch, 1), (Squared, None), (OfB, None)])
def test_another_penalty_is_caught(mutant: type[OLoRA], micro: int | None) -> None:
    with pytest.raises(AssertionError):
        by_hand(mutant, micro)


def check_three_tasks(make: Callable[[float], OLoRA], model: Any) -> None:
    """The third task's penalty and its gradient, in all layers against both adapters, by autograd."""
    strategy = make(0.3)
    learner = learner_of(tune(model, "lora", r=2, alpha=4), strategy)
    rows = texts()
    for index in range(3):
        learner.begin_task(Task(f"t{index}", rows), index)
    logged: dict[str, float] = {}
    ctx = learner.ctx.but(log=lambda name, value: logged.update({name: value}))  # type: ignore[union-attr]
    newest = {n: p for n, p in factors(learner.model, "task2").items() if "lora_A" in n}
    total: Any = 0.0
    for name, new in newest.items():
        for other in ("default", "task1"):
            old = dict(learner.model.named_parameters())[name.replace("task2", other)]
            total = total + 0.3 * (old.detach() @ new.T).abs().sum()
    expected = torch.autograd.grad(total, list(newest.values()))
    strategy.gradient(ctx, [])
    assert logged["penalty"] == pytest.approx(float(total.detach()), rel=1e-5)
    for new, gradient in zip(newest.values(), expected, strict=True):
        torch.testing.assert_close(new.grad, gradient, rtol=0, atol=1e-5)
    assert all(p.grad is None for name, p in learner.model.named_parameters() if name not in newest)


def test_three_tasks_by_autograd(make_lm: Callable[..., Any]) -> None:
    check_three_tasks(OLoRA, make_lm("llama"))


class OnlyTheLast(OLoRA):
    """Wrong: the new adapter is kept apart from the last one alone."""

    def gradient(self, ctx: Any, batches: Sequence[Any]) -> None:
        kept, self._adapters = self._adapters, self._adapters[-2:]
        super().gradient(ctx, batches)
        self._adapters = kept


def test_one_older_adapter_is_not_enough(make_lm: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        check_three_tasks(OnlyTheLast, make_lm("llama"))


def check_older_stay(make: Callable[[float], OLoRA]) -> None:
    """A hundred AdamW steps with weight decay: bitwise the same, and the new adapter has learnt."""
    learner = learner_of(small(), make(0.1), "classification")
    rows = vectors()
    learner.begin_task(Task("a", rows), 0)
    learner.step(rows)
    learner.end_task()
    with torch.no_grad():
        before = learner.model(torch.ones(1, 2))
    learner.begin_task(Task("b", rows), 1)
    with torch.no_grad():
        assert torch.equal(learner.model(torch.ones(1, 2)), before)  # a new adapter changes nothing yet
    old = {name: p.detach().clone() for name, p in factors(learner.model, "default").items()}
    for _ in range(100):
        learner.step(rows)
    for name, p in factors(learner.model, "default").items():
        assert torch.equal(p, old[name]), name
    assert all(p.abs().sum() > 0 for p in factors(learner.model, "task1").values())


def test_older_adapters_stay_bitwise() -> None:
    check_older_stay(OLoRA)


class NotFrozen(OLoRA):
    """Wrong: `set_adapter` has made every adapter trainable, and nobody looked."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        for layer in self._layers:
            layer.requires_grad_(True).base_layer.requires_grad_(False)


class NotActive(OLoRA):
    """Wrong: only the newest adapter takes part in the forward pass."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        ctx.model.base_model.set_adapter(self._adapters[-1])


@pytest.mark.parametrize("mutant", [NotFrozen, NotActive])
def test_adapters_that_are_not_kept_are_caught(mutant: type[OLoRA]) -> None:
    with pytest.raises(AssertionError):
        check_older_stay(mutant)


def check_draws(make: Callable[[float], OLoRA]) -> None:
    """A is uniform on ±1/√in (Kaiming with a = √5), B zero, and torch's own generator stays where it was."""
    found = []
    rows = vectors()
    for seed in (1, 2):
        learner = learner_of(tune_wide(), make(0.1), "classification")
        learner.begin_task(Task("a", rows), 0)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        learner.begin_task(Task("b", rows), 1)
        assert torch.equal(torch.get_rng_state(), before)
        found.append({n: p.detach().clone() for n, p in factors(learner.model, "task1").items()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
        if "lora_A" in name:
            assert 0.95 / 10 < float(value.abs().max()) <= 1 / 10
            assert float(value.std()) == pytest.approx(0.1 / 3**0.5, rel=0.1)
        else:
            assert not value.any()


def tune_wide() -> Any:
    return get_peft_model(nn.Sequential(nn.Linear(100, 2)), LoraConfig(r=8, target_modules=["0"]))


def test_new_adapters_are_drawn_from_the_strategys_generator() -> None:
    check_draws(OLoRA)


class DrawnByPeft(OLoRA):
    """Wrong: PEFT's own draws, from the generator that everybody shares."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        if len(self._adapters) > 1:
            for layer in self._layers:
                layer.reset_lora_parameters(self._adapters[-1], True)


def test_draws_from_the_global_generator_are_caught() -> None:
    with pytest.raises(AssertionError):
        check_draws(DrawnByPeft)


def grown(model: Any, strategy: OLoRA) -> Learner:
    """After three tasks of two steps each, with adapters that all say something; scale 2."""
    learner = learner_of(tune(model, "lora", r=2, alpha=4), strategy)
    for index in range(3):
        learner.begin_task(Task(f"t{index}", texts()), index)
        for _ in range(2):
            learner.step(texts())
        learner.end_task()
    return learner


def check_export(strategy: OLoRA, make_lm: Callable[..., Any], folder: Path) -> None:
    base = make_lm("llama")
    learner = grown(copy.deepcopy(base), strategy)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in learner.model.named_parameters()}
    strategy.export(learner.model, folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
    learner.model.eval()
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    with torch.no_grad():
        ours, theirs = learner.model(input_ids=ids).logits, loaded(input_ids=ids).logits
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    assert list(loaded.peft_config) == ["default"]
    assert loaded.peft_config["default"].r == 6
    assert not list(folder.glob("*/"))
    after = {name: (p, p.requires_grad) for name, p in learner.model.named_parameters()}
    assert list(after) == list(before)
    assert all(torch.equal(after[n][0], p) and after[n][1] == flag for n, (p, flag) in before.items())
    learner.step(texts())


def test_one_adapter_for_all_has_the_same_logits(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    check_export(OLoRA(0.1), make_lm, tmp_path)


class Scattered(OLoRA):
    """Wrong: PEFT's own way, one folder for each adapter; whoever loads the whole gets the first task's."""

    export = Strategy.export


class Unscaled(OLoRA):
    """Wrong: factors side by side without their scale."""

    def export(self, model: Any, folder: Path) -> None:
        scales = [dict(layer.scaling) for layer in self._layers]
        for layer in self._layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 1.0))
        super().export(model, folder)
        for layer, scale in zip(self._layers, scales, strict=True):
            layer.scaling.update(scale)


@pytest.mark.parametrize("mutant", [Scattered, Unscaled])
def test_another_export_is_caught(mutant: type[OLoRA], make_lm: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_export(mutant(0.1), make_lm, tmp_path)


def test_ranks_that_differ_by_layer_are_exported(tmp_path: Path) -> None:
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["0", "1"], rank_pattern={"1": 3}, use_rslora=True)
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    strategy = OLoRA()
    learner = learner_of(get_peft_model(copy.deepcopy(base), config), strategy, "classification")
    rows = [Example(str(i), "t", x=torch.randn(4), y=torch.tensor(i % 2)) for i in range(4)]
    for index in range(2):
        learner.begin_task(Task(str(index), rows), index)
        learner.step(rows)
    strategy.export(learner.model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    x = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), learner.model(x), rtol=0, atol=1e-6)


def test_capacity_by_layer_and_task() -> None:
    """Rank 2 on 2 -> 2: 2·2 weights in A and 2·2 in B for each task."""
    strategy = OLoRA()
    learner = learner_of(small(), strategy, "classification")
    for index, name in enumerate(("first", "second")):
        learner.begin_task(Task(name, vectors()), index)
    assert strategy.usage(learner.model) == {"base_model.model.0": {"first": 8, "second": 8}}


class WithHead(nn.Module):
    """LoRA inside, a head outside, as an encoder and its classifier."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.encoder = small(**config)
        self.head = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


def test_what_is_trained_outside_of_the_adapters_stays_trained() -> None:
    model = WithHead()
    model.encoder.base_model.model[0].base_layer.bias.requires_grad_(True)
    learner = learner_of(model, OLoRA(), "classification")
    learner.begin_task(Task("a", vectors()), 0)
    first = {name for name, p in model.named_parameters() if p.requires_grad}
    learner.begin_task(Task("b", vectors()), 1)
    second = {name for name, p in model.named_parameters() if p.requires_grad}
    assert second == {name.replace("default", "task1") for name in first}
    assert {"head.weight", "encoder.base_model.model.0.base_layer.bias"} < second


def test_a_layer_whose_adapter_was_frozen_stays_frozen() -> None:
    model = small()
    for p in model.parameters():
        p.requires_grad_(False)
    layer = model.base_model.model[0]
    layer.base_layer.bias.requires_grad_(True)
    learner = learner_of(model, OLoRA(), "classification")
    for index in range(2):
        learner.begin_task(Task(str(index), vectors()), index)
    learner.step(vectors())
    assert not any(p.requires_grad for p in layer.lora_A.parameters())
    assert not layer.lora_B["task1"].weight.any()


def two_adapters() -> Any:
    model = small()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0"]))
    return model


def two_models() -> nn.Module:
    return nn.ModuleList([small(), small()])


def convolution() -> Any:
    return get_peft_model(nn.Sequential(nn.Conv2d(1, 1, 2)), LoraConfig(r=2, target_modules=["0"]))


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda: nn.Linear(2, 2), "no LoRA adapter; tune with LoRA"),
        (two_models, "2 PEFT models"),
        (two_adapters, "has 2 adapters"),
        (convolution, "no plain LoRA of a linear layer"),
        (lambda: small(use_dora=True), "no plain LoRA of a linear layer"),
        (lambda: small(lora_bias=True), "no plain LoRA of a linear layer"),
        (lambda: small(bias="lora_only"), "adapter's bias would be trained"),
        (
            lambda: get_peft_model(
                nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
                LoraConfig(target_modules=["0"], modules_to_save=["1"]),
            ),
            "adapter's modules_to_save",
        ),
    ],
)
def test_what_it_cannot_train_is_refused(make_model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        learner_of(make_model(), OLoRA(), "classification")


@pytest.mark.parametrize("other", [EWC, SI, LwF])
def test_what_holds_weights_by_name_has_no_place_beside_it(other: type[Strategy]) -> None:
    """What they hold is of the frozen adapters, and LwF's teacher would have the new one in it."""
    with pytest.raises(StrategyError, match=f"what {other.name} holds of them"):
        Chain([OLoRA(), other()])
    Chain([OLoRA(), EWC(space="weight")])


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(StrategyError, match="olora: strength"):
        OLoRA(strength=-1.0)


def test_a_task_that_failed_can_be_begun_again() -> None:
    """Its adapter is drawn anew, and the first task's is never frozen by it."""
    learner = learner_of(small(), OLoRA(), "classification")
    for name in ("x", "a"):
        learner.begin_task(Task(name, vectors()), 0)
        learner.step(vectors())
    assert {n for n, p in learner.model.named_parameters() if p.requires_grad} == set(
        factors(learner.model, "default")
    )
    learner.end_task()
    for name in ("y", "b"):
        learner.begin_task(Task(name, vectors()), 1)
        learner.step(vectors())
    learner.end_task()
    usage = learner.strategy.usage(learner.model)
    assert {task for layer in usage.values() for task in layer} == {"a", "b"}
    assert {n for n, p in learner.model.named_parameters() if p.requires_grad} == set(
        factors(learner.model, "task1")
    )
