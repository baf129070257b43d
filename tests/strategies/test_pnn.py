"""PNN: what older columns answer, bit by bit; what a new one starts from; what it hears, by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from perdure import ContinualTrainer
from perdure.config import TrainingSettings, validate
from perdure.errors import NonFiniteError, StrategyError
from perdure.models.adapters import tune
from perdure.models.load import load
from perdure.strategies import PNN, Chain, Replay
from perdure.strategies.columns import Columns
from perdure.training.learner import Learner
from perdure.types import Example, Task

ADAMW = {"optimizer": {"lr": 0.01, "weight_decay": 0.1}}


class Net(nn.Module):
    """Ids [B, 6] through embedding, convolution, batch norm, dropout and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.conv = nn.Conv1d(4, 5, 3, padding=1)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(self.norm(self.conv(self.words(x).transpose(1, 2))).relu()).mean(-1)
        return self.head(self.fc(h).relu())


def net() -> nn.Module:
    torch.manual_seed(1)
    return Net()


def rows(task: str, seed: int, count: int = 6) -> list[Example]:
    """Classification rows for `Net`."""
    rng = torch.Generator().manual_seed(seed)
    return [
        Example(f"{task}{i}", task, x=torch.randint(0, 7, (6,), generator=rng), y=torch.tensor(i % 3))
        for i in range(count)
    ]


def texts(task: str, seed: int, count: int = 2) -> list[Example]:
    """Rows of a language model, of four and more tokens."""
    rng = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 40, (4 + i,), generator=rng) for i in range(count)]
    return [Example(f"{task}{i}", task, x=one, y=one) for i, one in enumerate(ids)]


def learner(model: nn.Module, objective: str = "classification", strategy: PNN | None = None) -> Learner:
    return Learner(model, strategy or PNN(rank=2), objective, validate(TrainingSettings, ADAMW, "test"), 0)


def train(own: Learner, tasks: Sequence[Sequence[Example]], steps: int, begun: int = 0) -> None:
    for index, task in enumerate(tasks, start=begun):
        own.begin_task(Task(task[0].task, task), index)
        for _ in range(steps):
            own.step(task)
        own.end_task()


@torch.no_grad()
def outputs(own: Learner, examples: Sequence[Example]) -> Tensor:
    """Of a mixed batch, in eval mode."""
    own.model.eval()
    return own.strategy.forward(own.model, own.collate(examples)).logits.clone()


def column(model: nn.Module, place: int) -> dict[str, nn.Parameter]:
    """A later column's parameters by their short names."""
    return dict(model.get_submodule(f"pnn.{place}").named_parameters())


# What older tasks are answered


def check_older_answers_stay(steps: int) -> None:
    """Three tasks; what the first two are answered, before and after the third is trained."""
    own = learner(net())
    tasks = [rows(name, seed) for seed, name in enumerate("abc")]
    train(own, tasks[:2], steps=5)
    older = [*tasks[0], *tasks[1]]
    before = outputs(own, older)
    new = outputs(own, tasks[2])
    train(own, tasks[2:], steps, begun=2)
    assert torch.equal(outputs(own, older), before)
    assert not torch.equal(outputs(own, tasks[2]), new)


def test_older_answers_stay_to_the_bit_over_a_thousand_steps() -> None:
    check_older_answers_stay(1000)


def test_adapters_of_older_tasks_stay_to_the_bit_over_a_thousand_steps() -> None:
    """On nano. Every 20th step has a gradient of its own; between them AdamW goes on with drawn ones."""
    torch.manual_seed(0)
    own = learner(tune(load("nano").model, "lora", r=2, alpha=4, targets=["q_proj", "down_proj"]), "causal_lm")
    first, second = texts("a", 0), texts("b", 1)
    train(own, [first], steps=5)
    before = outputs(own, first)
    own.begin_task(Task("b", second), 1)
    trained = [p for p in own.model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    for _ in range(50):
        own.step(second)
        for p in trained:
            p.grad = torch.randn_like(p)
        for _ in range(19):
            own.optimizer.step()
        own.optimizer.zero_grad()
    assert torch.equal(outputs(own, first), before)
    assert not any(map(torch.equal, trained, start))


def norms_go_on(self: Columns, model: nn.Module) -> None:
    """Wrong: norms of older columns are trained on."""
    freeze(self, model)
    for name, p in model.named_parameters():
        if "norm" in name:
            p.requires_grad_(True)


def one_statistic_for_all(self: Columns, model: nn.Module, column: int) -> dict[str, Tensor]:
    """Wrong: running statistics are the model's, in every column."""
    found = values(self, model, column)
    return {name: value for name, value in found.items() if isinstance(value, nn.Parameter) or not column}


@contextmanager
def in_train_mode(self: Columns, model: nn.Module) -> Iterator[None]:
    """Wrong: older columns run as the new one does."""
    with torch.no_grad():
        yield


freeze, values, unheard, lateral = Columns.freeze, Columns.values, Columns.unheard, Columns.lateral


def nothing_frozen(self: Columns, model: nn.Module) -> None:
    """Wrong: older columns get no gradient, and weight decay moves them on."""


def zero_gradients(own: PNN, ctx: Any, batches: Any) -> None:
    for p in ctx.model.parameters():
        if p.grad is None:
            p.grad = torch.zeros_like(p)


@pytest.mark.parametrize(
    ("method", "mutant"),
    [
        ("freeze", norms_go_on),
        ("values", one_statistic_for_all),
        ("aside", in_train_mode),
        ("freeze", nothing_frozen),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_older_columns_that_move_are_caught(method: str, mutant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Columns, method, mutant)
    if mutant in (nothing_frozen, norms_go_on):
        # Without a gradient the optimizer leaves a weight alone; a method that zeroes them does not freeze it.
        monkeypatch.setattr(PNN, "gradient", zero_gradients)
    with pytest.raises(AssertionError):
        check_older_answers_stay(5)


def check_older_columns_draw_nothing() -> None:
    """In train mode a pass of the third column draws for one dropout, as a pass of one network does."""
    own = learner(net())
    tasks = [rows(name, seed) for seed, name in enumerate("abc")]
    train(own, tasks, steps=1)
    batch = own.collate(tasks[2])
    own.model.train()
    torch.manual_seed(3)
    own.strategy.forward(own.model, batch)
    drawn = torch.get_rng_state()
    torch.manual_seed(3)
    own.model(batch.x)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_older_columns_have_no_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    check_older_columns_draw_nothing()
    monkeypatch.setattr(Columns, "aside", in_train_mode)
    with pytest.raises(AssertionError):
        check_older_columns_draw_nothing()


# What a new column starts from


def models(kind: str, make_lm: Callable[..., Any]) -> tuple[nn.Module, str, Callable[[str, int], list[Example]]]:
    if kind == "net":
        return net(), "classification", rows
    lm = make_lm("llama", spread=0.3)
    settings = {"tokens": 2} if kind == "soft-prompt" else {"r": 2, "alpha": 4, "dropout": 0.3}
    return tune(lm, kind, **settings), "causal_lm", texts  # type: ignore[arg-type]


def check_it_starts_from_the_base(kind: str, make_lm: Callable[..., Any]) -> None:
    """The second column, and the third, before their first step, against the model as it was before any."""
    model, objective, make = models(kind, make_lm)
    base = learner(copy.deepcopy(model), objective)
    own = learner(model, objective)
    tasks = [make(name, seed) for seed, name in enumerate("abc")]
    train(own, tasks[:1], steps=10)
    for index, new in enumerate(tasks[1:], start=1):
        assert not torch.equal(outputs(own, new), outputs(base, new))
        own.begin_task(Task(new[0].task, new), index)
        assert torch.equal(outputs(own, new), outputs(base, new))
        for _ in range(10):
            own.step(new)


KINDS = ["net", "lora", "soft-prompt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_column_computes_what_the_base_did(kind: str, make_lm: Callable[..., Any]) -> None:
    check_it_starts_from_the_base(kind, make_lm)


def from_the_previous(self: Columns, model: nn.Module, base: Any, name: str) -> Tensor:
    """Wrong: it starts from the column before."""
    return self.values(model, len(self) - 1)[name].detach()


def heard_from_the_start(self: Columns, *arguments: Any) -> list[Tensor]:
    """Wrong: lateral connections do not start at zero."""
    return [tensor + 0.1 for tensor in unheard(self, *arguments)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("method", "mutant"), [("start", from_the_previous), ("unheard", heard_from_the_start)])
def test_another_start_is_caught(
    method: str, mutant: Any, kind: str, make_lm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Columns, method, mutant)
    with pytest.raises(AssertionError):
        check_it_starts_from_the_base(kind, make_lm)


def test_a_saved_trainer_has_the_base_too(tmp_path: Path) -> None:
    """A third column, grown after loading into a network with other weights, starts from the first one's base."""
    trainer = ContinualTrainer(net(), PNN(), ADAMW)
    for task_id in range(2):
        trainer.train_task(rows("t", task_id), rows("t", task_id), task_id)
    trainer.save(tmp_path / "saved")
    other = Net()
    loaded = ContinualTrainer.load(tmp_path / "saved", other)
    third = rows("third", 5)
    assert not torch.equal(outputs(loaded.learner, third), outputs(learner(net()), third))
    loaded.learner.begin_task(Task("third", third), 2)
    assert torch.equal(outputs(loaded.learner, third), outputs(learner(net()), third))


# What it hears


class Chain2(nn.Module):
    """x ↦ v·(w·x), or with `twice` v·v·(w·x)."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        self.w, self.v = (nn.Linear(1, 1, bias=False) for _ in range(2))
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        h = self.v(self.w(x))
        return self.v(h) if self.twice else h


def by_hand(twice: bool = False) -> tuple[Learner, list[Example]]:
    """Three columns: w is 2, 3, 5 and v is 1, 7, 11; laterals into v are 13 (1 from 0), 17 and 19 (2 from 0, 1)."""
    model = Chain2(twice)
    own = learner(model, "regression")
    examples = [Example(name, name, x=torch.ones(1), y=torch.zeros(1)) for name in "abc"]
    for index, example in enumerate(examples):
        own.begin_task(Task(example.task, [example]), index)
    numbers = {
        "w.weight": 2, "v.weight": 1,
        "pnn.1.own.w/weight": 3, "pnn.1.own.v/weight": 7, "pnn.1.heard.0/v/weight": 13,
        "pnn.2.own.w/weight": 5, "pnn.2.own.v/weight": 11, "pnn.2.heard.0/v/weight": 17,
        "pnn.2.heard.1/v/weight": 19,
    }  # fmt: skip
    found = dict(model.named_parameters())
    assert set(found) == set(numbers)
    with torch.no_grad():
        for name, number in numbers.items():
            found[name].fill_(number)
    return own, examples


def check_numbers() -> None:
    """x = 1. The second layer takes in 2, 3, 5. It gives 2; 7·3 + 13·2 = 47; 11·5 + 17·2 + 19·3 = 146."""
    assert outputs(*by_hand()).flatten().tolist() == [2, 47, 146]


def test_two_layers_by_hand() -> None:
    check_numbers()


def test_a_layer_that_is_called_twice_hears_each_call() -> None:
    """The second call takes in 2, 47, 146. It gives 2; 7·47 + 13·2 = 355; 11·146 + 17·2 + 19·47 = 2533."""
    assert outputs(*by_hand(twice=True)).flatten().tolist() == [2, 355, 2533]


def only_from_the_newest(self: Columns, column: int, older: int, site: str) -> list[Tensor]:
    """Wrong: only the column before is heard."""
    return [tensor * (older == column - 1) for tensor in lateral(self, column, older, site)]


def test_another_sum_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Columns, "lateral", only_from_the_newest)
    with pytest.raises(AssertionError):
        check_numbers()


def check_gradients() -> None:
    """½y² at y = 146: ∂/∂U₂₀ = 146·2, ∂/∂U₂₁ = 146·3, ∂/∂v = 146·5, ∂/∂w = 146·11. Older ones get none at all,
    frozen or not, whatever they are heard through."""
    own, examples = by_hand()
    own.model.requires_grad_(True)
    output = own.strategy.forward(own.model, own.collate(examples[2:])).logits
    (0.5 * output.square().sum()).backward()
    found = {name: p.grad.item() for name, p in own.model.named_parameters() if p.grad is not None}
    assert found == {
        "pnn.2.heard.0/v/weight": 292, "pnn.2.heard.1/v/weight": 438,
        "pnn.2.own.v/weight": 730, "pnn.2.own.w/weight": 1606,
    }  # fmt: skip


def test_older_columns_get_no_gradient() -> None:
    check_gradients()


@contextmanager
def not_detached(self: Columns, model: nn.Module) -> Iterator[None]:
    """Wrong: the gradient goes on into older columns."""
    model.eval()
    yield
    model.train()


def test_a_gradient_into_older_columns_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Columns, "aside", not_detached)
    with pytest.raises(AssertionError):
        check_gradients()


def test_convolutions_in_plain_pytorch(float64: None) -> None:
    """A strided, dilated, grouped convolution with circular padding, two columns, all in functions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 2, 2, groups=2, padding_mode="circular"),
        nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip
    own = learner(model)
    x = torch.randn(2, 1, 9, 9)
    for index, name in enumerate("ab"):
        own.begin_task(Task(name, [Example(name, name, x=x[0], y=torch.tensor(0))]), index)
    p = column(model, 1)
    with torch.no_grad():
        for value in p.values():
            value.normal_()

    def convolve(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(F.pad(h, (2, 2, 2, 2), mode="circular"), weight, bias, 2, 0, 2, 2)

    first, second = model[0], model[2]
    h0 = first(x).relu()
    g0 = convolve(h0, second.weight, second.bias)
    h1 = F.conv2d(x, p["own.0/weight"], p["own.0/bias"]).relu()
    g1 = convolve(h1, p["own.2/weight"], p["own.2/bias"]) + convolve(h0, p["heard.0/2/weight"], None)
    wanted = F.linear(g1.flatten(1), p["own.4/weight"], p["own.4/bias"]) + g0.flatten(1) @ p["heard.0/4/weight"].T
    found = outputs(own, [Example("b", "b", x=one, y=torch.tensor(0)) for one in x])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_blocks_of_a_language_model_by_hand(make_lm: Callable[..., Any], float64: None) -> None:
    """Laterals into the last block: its output, plus U relu(V h/rms(h)), through the final norm and the head."""
    model = tune(make_lm("llama", spread=0.3).double(), "lora", r=2, alpha=4)
    base = copy.deepcopy(model)
    own = learner(model, "causal_lm")
    first, second = texts("a", 0), texts("b", 1, 1)
    train(own, [first], steps=10)
    own.begin_task(Task("b", second), 1)
    p = column(model, 1)
    last = "heard.0/base~model/model/model/layers/1"
    down, up = p[f"{last}/down"], p[f"{last}/up"]
    assert down.shape == (2, 16)
    with torch.no_grad():
        up.normal_()

    states = []
    for each in (model, base):
        llama = each.get_base_model().model
        handle = llama.norm.register_forward_pre_hook(lambda _, args: states.append(args[0].detach()))
        each.eval()(input_ids=second[0].x[None], use_cache=False)
        handle.remove()
    older, new = states
    scaled = older / (older.square().mean(-1, keepdim=True) + torch.finfo(torch.float64).eps).sqrt()
    wanted = model.get_base_model().lm_head(llama.norm(new + (scaled @ down.T).clamp(min=0) @ up.T))
    torch.testing.assert_close(outputs(own, second), wanted.detach(), rtol=1e-12, atol=1e-12)


# Which column answers, what each holds, what is written


def test_rows_go_to_their_tasks_column_and_unknown_ones_to_the_newest() -> None:
    own, examples = by_hand()
    strange = [examples[0].but(task="z"), examples[1]]
    assert outputs(own, strange).flatten().tolist() == [146, 47]
    assert isinstance(own.strategy.serving(own.model, "a"), nullcontext)
    assert own.strategy.serving(own.model, "b") is None


def test_the_surest_column_names_the_task() -> None:
    """Column 1 is made sure of itself by a large bias; then column 0 is."""
    own = learner(net(), strategy=PNN(infer="surest"))
    tasks = [rows(name, seed) for seed, name in enumerate("ab")]
    train(own, tasks, steps=1)
    own.model.eval()
    batch = own.collate([*tasks[0], *tasks[1]])
    for bias, task in ((column(own.model, 1)["own.head/bias"], "b"), (own.model.head.bias, "a")):
        with torch.no_grad():
            bias[0] += 100 if task == "b" else 1000
        assert own.strategy.identify(own.model, batch) == [task] * len(batch.examples)


def test_usage_counts_every_weight_once() -> None:
    own = learner(net())
    train(own, [rows(name, seed) for seed, name in enumerate("abc")], steps=1)
    found = own.strategy.usage(own.model)
    assert found["words"] == {"a": 28, "b": 28, "c": 28}
    assert found["conv"] == {"a": 65, "b": 65 + 60, "c": 65 + 2 * 60}
    assert found["fc"] == {"a": 24, "b": 24 + 20, "c": 24 + 2 * 20}
    total = sum(p.numel() for p in own.model.parameters())
    assert sum(size for layer in found.values() for size in layer.values()) == total


def test_the_export_holds_the_first_column_and_all_others(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    own = learner(tune(make_lm("llama", spread=0.3), "lora", r=2, alpha=4), "causal_lm")
    tasks = [texts(name, seed, 1) for seed, name in enumerate("ab")]
    train(own, tasks, steps=3)
    own.strategy.export(own.model, tmp_path)
    ids = tasks[0][0].x[None]
    again = PeftModel.from_pretrained(make_lm("llama", spread=0.3), tmp_path).eval()
    assert torch.equal(again(input_ids=ids).logits, outputs(own, tasks[0]))
    facts = json.loads((tmp_path / "pnn.json").read_text())
    assert facts["tasks"] == ["a", "b"]
    saved = load_file(tmp_path / "pnn.safetensors")
    lora = {name: p for name, p in own.model.named_parameters() if "lora_" in name}
    assert {name for name in saved if name.startswith("1.own.")} == {f"1.own.{name}" for name in lora}
    sizes = sum(p.numel() for p in own.model.get_submodule("pnn").parameters())
    assert sum(value.numel() for value in saved.values()) == sizes
    assert not any("pnn" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_task_that_failed_can_be_begun_again() -> None:
    """Its column is made anew; rows are trained on, not sent to the column of the first try."""
    trainer = ContinualTrainer(net(), PNN(), ADAMW)
    trainer.train_task(rows("a", 0), None, 0)
    fails = trainer.model.register_forward_hook(lambda module, inputs, output: output * torch.nan)
    with pytest.raises(NonFiniteError):
        trainer.train_task(rows("b", 1), None, 1)
    fails.remove()
    trainer.train_task(rows("b", 1), None, 1)
    assert trainer.strategy.tasks == ["task_0", "task_1"]
    assert len(trainer.model.get_submodule("pnn")) == 2


# What is refused


def test_what_cannot_have_columns_is_refused(make_lm: Callable[..., Any]) -> None:
    with pytest.raises(StrategyError, match="rank must be a whole number"):
        PNN(rank=0)
    with pytest.raises(StrategyError, match="tune LoRA or a soft prompt"):
        learner(make_lm("llama"), "causal_lm")
    own = learner(net())
    train(own, [rows("a", 0), rows("b", 1)], steps=1)
    with pytest.raises(StrategyError, match="give a fresh model"):
        learner(own.model)
    with pytest.raises(StrategyError, match="train nothing"):
        Chain([PNN(), Replay(capacity=4)])


def test_what_calls_the_model_another_way_is_refused(make_lm: Callable[..., Any]) -> None:
    settings = validate(TrainingSettings, {"gradient_checkpointing": True}, "test")
    own = Learner(tune(make_lm("llama"), "lora"), PNN(), "causal_lm", settings, 0)
    compiled = learner(net())
    compiled.model._compiled_call_impl = compiled.model._call_impl
    for each, task in ((own, texts("a", 0)), (compiled, rows("a", 0))):
        with pytest.raises(StrategyError, match="gradient_checkpointing and compile"):
            each.begin_task(Task("a", task), 0)
