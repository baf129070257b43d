"""OSF: what a task may change, against an SVD of its own; wrong versions are planted and must be caught."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models.adapters import tune
from perdure.strategies import EWC, GEM, OSF, Chain, LwF
from perdure.strategies.base import Strategy
from perdure.strategies.osf import linear_layers
from perdure.training.learner import Learner
from perdure.types import Example, Task


def learner_of(model: nn.Module, strategy: Strategy, objective: str = "classification", **settings: Any) -> Learner:
    changes = {"optimizer": {"lr": 0.01, "weight_decay": 0.1}, **settings}
    return Learner(model, strategy, objective, validate(TrainingSettings, changes, "test"), 0)


def vectors(width: int, n: int = 8) -> list[Example]:
    return [Example(str(i), "t", x=torch.randn(width), y=torch.tensor(i % 2)) for i in range(n)]


def texts(n: int = 4) -> list[Example]:
    ids = torch.tensor([3, 4, 5, 6, 7])
    return [Example(str(i), "t", x=ids[: 2 + i % 4] + i, y=ids[: 2 + i % 4] + i) for i in range(n)]


def net() -> nn.Sequential:
    """Wide, tall and square: the factor that PEFT leaves to be recovered is another in each."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 8))


def plain(model: nn.Module) -> dict[str, Tensor]:
    """Each linear layer's weight as it acts, read off the model's answers: columns are f(e_i) − f(0)."""
    found = {}
    for name in ("0", "2", "4"):
        layer = model.get_submodule(name)
        width = layer.in_features  # type: ignore[union-attr]
        with torch.no_grad():
            found[name] = (layer(torch.eye(width)) - layer(torch.zeros(width))).T.double()
    return found


def check_subspace(make: Callable[[float], OSF], steps: int = 100) -> None:
    """Two tasks after the first, 100 AdamW steps each, with decay: U_highᵀ ΔW = 0 and ΔW V_highᵀ = 0.

    U_high and V_high come from a float64 SVD, taken here, of the weights as they act when a task begins.
    """
    model, rows = net(), vectors(9)
    learner = learner_of(model, make(0.5))
    learner.begin_task(Task("a", rows), 0)
    learner.step(rows)
    learner.end_task()
    for index in (1, 2):
        before = plain(model)
        learner.begin_task(Task(str(index), rows), index)
        for name, weight in plain(model).items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5)
        for _ in range(steps):
            learner.step(rows)
        learner.end_task()
        for name, weight in plain(model).items():
            change = weight - before[name]
            u, _, v = torch.linalg.svd(before[name], full_matrices=False)
            kept = min(weight.shape) // 2
            leak = max(float((u[:, :kept].T @ change).abs().max()), float((change @ v[:kept].T).abs().max()))
            assert leak < 1e-4, (name, leak)
            assert float(change.abs().max()) > 0.05  # it has learnt


def test_preserved_directions_stay() -> None:
    check_subspace(OSF)


class HooksOnly(OSF):
    """Wrong: the gradient is projected and the step is not; Adam scales each weight by itself."""

    def after_step(self, ctx: Any, batches: Any, outputs: Any) -> None:
        pass


class Unloaded(OSF):
    """Wrong: the old factors are taken out without being folded in first, and what they learnt is gone."""

    def prepare(self, ctx: Any) -> None:
        if self._tuner is not None:
            self._tuner.unload()
        super().prepare(ctx)


class Unmerged(OSF):
    """Wrong: a second set of factors, of the weights before the first set learnt."""

    def prepare(self, ctx: Any) -> None:
        if self._tuner is not None:
            for layer in self._layers.values():
                factors = layer.osf_svd_params[self._adapter]
                for kind in "USV":
                    factors[f"{kind}_low"].data.copy_(getattr(layer, f"_osf_{kind}_low_init")[self._adapter])
        super().prepare(ctx)


class NotAnew(OSF):
    """Wrong: the directions of the first decomposition are kept for good."""

    def prepare(self, ctx: Any) -> None:
        if ctx.index <= self.start:
            super().prepare(ctx)


class WrongEnd(OSF):
    """Wrong: the weakest directions are preserved."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        for layer in self._layers.values():
            u, s, v = torch.linalg.svd(layer.base_layer.weight, full_matrices=False)
            rank = len(layer.osf_svd_params[self._adapter]["S_low"])
            for kind, value in (("U", u[:, :rank]), ("S", s[:rank]), ("V", v[:rank])):
                getattr(layer, f"_osf_{kind}_low_init")[self._adapter].copy_(value)
                layer.osf_svd_params[self._adapter][f"{kind}_low"].data.copy_(value)
            for kind, value in (("U", u[:, rank:]), ("V", v[rank:])):
                if self._adapter in getattr(layer, f"_osf_{kind}_high"):
                    getattr(layer, f"_osf_{kind}_high")[self._adapter].copy_(value)


@pytest.mark.parametrize("mutant", [HooksOnly, Unloaded, Unmerged, NotAnew, WrongEnd])
def test_another_subspace_is_caught(mutant: type[OSF]) -> None:
    with pytest.raises(AssertionError):
        check_subspace(mutant)


def test_a_step_of_sgd_in_closed_form() -> None:
    """One layer y = Wx, squared error, one SGD step at rate η from the factors of W's SVD.

    With G = ∂L/∂W and P_U, P_V the projections onto the complements of the preserved directions:
    U ← U − η P_U G Vᵀ S, S ← S − η diag(Uᵀ G Vᵀ), V ← V − η S Uᵀ G P_V, and W = W_high + U S V.
    """
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4, bias=False))
    rows = [Example(str(i), "t", x=torch.randn(5), y=torch.randn(4)) for i in range(6)]
    learner = learner_of(
        model, OSF(0.5, start=0), "regression", optimizer={"type": "sgd", "lr": 0.1, "momentum": 0}
    )
    w = model[0].weight.detach().double()
    x, y = (torch.stack([getattr(row, name) for row in rows]).double() for name in "xy")
    gradient = (x @ w.T - y).T @ x / y.numel()
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    high, (lu, ls, lv) = (u[:, :2] * s[:2]) @ v[:2], (u[:, 2:], s[2:], v[2:])
    pu, pv = torch.eye(4).double() - u[:, :2] @ u[:, :2].T, torch.eye(5).double() - v[:2].T @ v[:2]
    nu = lu - 0.1 * pu @ gradient @ lv.T * ls
    ns = ls - 0.1 * (lu.T @ gradient @ lv.T).diagonal()
    nv = lv - 0.1 * ls[:, None] * (lu.T @ gradient @ pv)
    learner.begin_task(Task("a", rows), 0)
    learner.step(rows)
    with torch.no_grad():
        acting = model(torch.eye(5)).T.double()
    torch.testing.assert_close(acting, high + (nu * ns) @ nv, rtol=0, atol=1e-5)


def test_the_share_grows_and_one_direction_stays_free() -> None:
    """Of 6, 0.1, 0.3, 0.5 … come to 0, 1, 3, 4, then 5 at most. Of 100, 0.29 + 0.29 is 58; floats say 57."""
    strategy, model = OSF(effective_rank=0.1, growth=0.2), net()
    found = [strategy._ranks(model, index)["2"] for index in range(1, 8)]
    assert found == [0, 1, 3, 4, 5, 5, 5]
    assert OSF(effective_rank=0.29, growth=0.29)._ranks(nn.Sequential(nn.Linear(100, 100)), 2) == {"0": 58}


def trained_in(model: nn.Module, strategy: OSF, rows: list[Example], objective: str = "classification") -> set[str]:
    learner = learner_of(model, strategy, objective)
    for index in range(2):
        learner.begin_task(Task(str(index), rows), index)
    return {name.split(".osf_")[0] for name, p in model.named_parameters() if p.requires_grad}


def test_the_rest_is_frozen_or_trained() -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten(), nn.LayerNorm(6), nn.Linear(6, 5), nn.Linear(5, 1))

    rows = [Example(str(i), "t", x=torch.randn(1, 4), y=torch.tensor(0.5)) for i in range(4)]
    # Of the last layer's one direction nothing is preserved: it is trained whole.
    assert trained_in(model(), OSF(), rows, "regression") == {"3", "4.weight", "4.bias"}
    assert trained_in(model(), OSF(rest="trained"), rows, "regression") == {
        "0.weight", "0.bias", "2.weight", "2.bias", "3", "3.base_layer.bias", "4.weight", "4.bias",
    }  # fmt: skip


def test_layers_that_are_decomposed(make_lm: Callable[..., Any]) -> None:
    """Every linear layer but the output layer; none that is frozen, shared, or read past its forward pass."""
    model = make_lm("llama")
    names = set(linear_layers(model))
    assert names == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {"lm_head"}
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    first.weight.requires_grad_(False)
    odd = nn.Sequential(first, second, nn.TransformerEncoderLayer(4, 1, 8), nn.Linear(4, 4), nn.Linear(4, 2))
    odd[3].weight = second.weight  # type: ignore[assignment]
    assert set(linear_layers(odd)) == {"4"}


def test_a_model_that_ends_alike_is_not_mistaken() -> None:
    """PEFT takes names as endings: "0" would be "1.0" too, which is frozen."""
    inner = nn.Sequential(nn.Linear(4, 4))
    inner.requires_grad_(False)
    model = nn.Sequential(nn.Linear(4, 4), inner)
    assert trained_in(model, OSF(), vectors(4)) == {"0"}
    assert isinstance(inner[0], nn.Linear)


def test_resumed_on_another_decomposition_it_is_the_same() -> None:
    """The replayed SVDs are of the model as it was given; all that they made is taken from the state."""
    rows = vectors(9)

    def begun() -> Learner:
        return learner_of(net(), OSF(growth=0.1))

    first = begun()
    for index in range(3):
        first.begin_task(Task(str(index), rows), index)
        first.step(rows)
        if index < 2:
            first.end_task()
    state = copy.deepcopy(first.state_dict())
    second = begun()
    for index in range(3):
        second.begin_task(Task(str(index), rows), index, resuming=True)
    second.load_state_dict(state)
    for learner in (first, second):
        learner.step(rows)
        learner.end_task()
        learner.begin_task(Task("3", rows), 3)
        learner.step(rows)
    for (name, ours), theirs in zip(first.model.named_parameters(), second.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def check_export(strategy: OSF, make_lm: Callable[..., Any], folder: Path, kind: str = "llama") -> None:
    learner = learner_of(make_lm(kind), strategy, "causal_lm")
    for index in range(3):
        learner.begin_task(Task(str(index), texts()), index)
        for _ in range(3):
            learner.step(texts())
        learner.end_task()
    model: Any = learner.model
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    strategy.export(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        n: p.shape for n, p in make_lm(kind).named_parameters()
    }
    ids = torch.tensor([[3, 5, 7, 9, 11]])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    after = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    assert list(after) == list(before)
    assert all(torch.equal(after[n][0], p) and after[n][1] == flag for n, (p, flag) in before.items())
    learner.step(texts())


@pytest.mark.parametrize("kind", ["llama", "qwen2"])  # qwen2's layers have biases
def test_the_exported_model_is_plain_and_says_the_same(
    kind: str, make_lm: Callable[..., Any], tmp_path: Path
) -> None:
    check_export(OSF(), make_lm, tmp_path, kind)


def test_an_export_before_any_decomposition_is_plain_too(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    check_export(OSF(start=5), make_lm, tmp_path)


class BaseOnly(OSF):
    """Wrong: the weight that was decomposed, without what the factors have learnt since."""

    def export(self, model: Any, folder: Path) -> None:
        tensors = {name.replace(".base_layer", ""): value for name, value in model.state_dict().items()}
        kept = {name: value for name, value in tensors.items() if ".osf_" not in name and "._osf_" not in name}
        model.save_pretrained(folder, state_dict=kept)


def test_an_export_of_the_base_is_caught(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        check_export(BaseOnly(), make_lm, tmp_path)


@pytest.mark.parametrize(
    ("make_model", "message"),
    [
        (lambda lm: tune(lm, "lora", r=2, alpha=2), "use --tuning full"),
        (lambda lm: tune(lm, "soft-prompt", tokens=2), "use --tuning full"),
        (lambda lm: nn.Sequential(nn.Conv1d(1, 1, 2)), "no linear layer of its own"),
        (lambda lm: nn.Linear(4, 2), "no linear layer of its own"),
        (lambda lm: nn.Sequential(nn.Linear(4, 1)), "none with a direction to preserve"),
    ],
)
def test_what_it_cannot_decompose_is_refused(
    make_model: Callable[[Any], nn.Module], message: str, make_lm: Callable[..., Any]
) -> None:
    with pytest.raises(StrategyError, match=message):
        learner_of(make_model(make_lm("llama")), OSF())


@pytest.mark.parametrize("other", [EWC, LwF])
def test_what_holds_weights_by_name_is_refused_beside_it(other: type[Strategy]) -> None:
    """Their weights are under other names in the next task: the pull would be gone without a word."""
    with pytest.raises(StrategyError, match=f"what {other.name} holds of them"):
        Chain([OSF(), other()])
    Chain([OSF(), GEM()])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"effective_rank": 0.0}, "effective_rank"),
        ({"effective_rank": 1.0}, "effective_rank is a share"),
        ({"growth": -0.1}, "growth"),
        ({"start": -1}, "start"),
        ({"rest": "loose"}, "rest must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=f"osf: {message}"):
        OSF(**settings)
