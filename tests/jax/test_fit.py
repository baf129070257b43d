"""Training: one step of both backends, replay's two gradients, EWC, one compilation, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from perdure.errors import ConfigError, DataError, NonFiniteError
from perdure.jax import FitSettings, Learner, Row, RowTask, train
from perdure.jax.heads import to_torch_names
from perdure.jax.layouts import HUGGINGFACE
from perdure.jax.tree import named
from perdure.models.heads import MHAR


def weights(learner: Any) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in named(learner.state.trained).items()}


def gap(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    assert a.keys() == b.keys()
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


class Twin:
    """The same regressor by hand in torch."""

    def __init__(self, mistral: Any, head: Any, lr: float) -> None:
        self.body = copy.deepcopy(mistral).model.train()
        self.head = MHAR(32, 4, 24, dropout=0.0)
        self.head.load_state_dict({name: torch.tensor(v) for name, v in to_torch_names(head).items()})
        self.parameters = [*self.body.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr, weight_decay=0.01)

    def predict(self, rows: Any) -> torch.Tensor:
        length = max(len(row.ids) for row in rows)
        ids = torch.tensor([[*row.ids, *[0] * (length - len(row.ids))] for row in rows])
        mask = torch.arange(length) < torch.tensor([len(row.ids) for row in rows])[:, None]
        states = self.body(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        return self.head(states, mask)

    def losses(self, rows: Any) -> torch.Tensor:
        return 0.5 * (self.predict(rows) - torch.tensor([row.y for row in rows])) ** 2

    def step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.parameters if p.grad is not None], 0.01)
        self.optimizer.step()
        return loss.item()

    def gap(self, learner: Any) -> float:
        """The largest difference of a weight."""
        ours = weights(learner)
        body = {name: value.detach().numpy() for name, value in self.body.named_parameters(prefix="model")}
        found = 0.0
        for path, name in HUGGINGFACE.items():
            if path == "head.weight":
                continue
            theirs = np.stack([body[name.format(i)] for i in range(3)]) if "{}" in name else body[name]
            found = max(found, float(np.abs(ours[f"backbone.{path}"] - theirs).max()))
        for name, value in self.head.named_parameters():
            found = max(found, float(np.abs(ours[f"head.{name}"] - value.detach().numpy()).max()))
        return found


FULL = {"tuning": "full", "lr": 1e-3, "weight_decay": 0.01, "clip": 0.01, "dropout": 0.0}


@pytest.mark.parametrize("gradient", ["combined", "separate"])
def test_steps_are_those_of_torch(gradient: str, mistral: Any, make_learner: Any, make_tasks: Any) -> None:
    """A step on 4 new rows, then one on 4 new and 3 replayed rows: AdamW, decay and clipping as torch's."""
    learner = make_learner(strategy="replay", gradient=gradient, **FULL)
    twin = Twin(mistral, learner.model.head, 1e-3)
    first, second = make_tasks(2, seed=2)  # in which the two means are apart
    learner.begin_task([], first)
    ours = learner.step(first.rows[:4])
    assert (ours.new, ours.replayed) == (4, 0)
    assert ours.loss == pytest.approx(twin.step(twin.losses(first.rows[:4]).mean()), abs=1e-4)
    assert twin.gap(learner) < 1e-4
    learner.begin_task([first], second)  # which begins with a new optimizer
    twin.optimizer = torch.optim.AdamW(twin.parameters, lr=1e-3, weight_decay=0.01)
    old = learner._replayed.draw(0, 3)
    assert len(old) == 3
    ours = learner.step(second.rows[:4])
    new, replayed = twin.losses(second.rows[:4]), twin.losses(old)
    whole = torch.cat((new, replayed)).mean() if gradient == "combined" else new.mean() / 2 + replayed.mean() / 2
    assert ours.loss == pytest.approx(twin.step(whole), abs=1e-4)
    assert twin.gap(learner) < 1e-4
    np.testing.assert_allclose(learner.predict(second.rows), twin.predict(second.rows).detach(), atol=1e-4)
    other = new.mean() / 2 + replayed.mean() / 2 if gradient == "combined" else torch.cat((new, replayed)).mean()
    assert abs(ours.loss - other.item()) > 1e-4


CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "joint": {"strategy": "joint"},
    "sequential": {"strategy": "sequential"},
    "replay": {"strategy": "replay", "gradient": "separate", "at_boundary": "continue"},
    "ewc": {"strategy": "ewc", "optimizer": "adafactor"},
}


@pytest.mark.parametrize("strategy", CONFIGURATIONS)
def test_all_is_compiled_once(strategy: str, make_learner: Any, make_tasks: Any) -> None:
    """Ragged rows, last batches that are not full, three tasks, memory growing from nothing: one program.

    What is compiled is counted by ourselves and, after the first step of the last task, by JAX: with EWC the end of
    the first task compiles the Fisher information.
    """
    learner, tasks = make_learner(tuning="head", **CONFIGURATIONS[strategy]), make_tasks(3)
    compiled: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        compiled.append(event) if "compile" in event else None

    results = []
    learner.predict(tasks[0].rows)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for position, result in train(learner, tasks):
            if not results:
                assert strategy == "ewc" or compiled  # the listener hears the first step; the check can fail
            if (position.task, position.batch) == (0 if strategy == "joint" else 2, 1):
                compiled.clear()
            results.append(result)
        learner.predict(tasks[1].rows)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert learner.compilations["step"] == learner.compilations["predict"] == 1
    assert learner.compilations["fisher"] == (strategy == "ewc")
    assert [result.new for result in results] == ([4, 4, 4, 4, 4, 1] * 2 if strategy == "joint" else [4, 3] * 6)
    assert [result.replayed for result in results] == [0] * 4 + ([3, 2] * 4 if strategy == "replay" else [0] * 8)
    assert np.isfinite([result.norm for result in results]).all()


@pytest.mark.parametrize(
    ("ratio", "drawn"), [(1, [4, 3, 4, 3]), (0.5, [2, 1, 2, 2]), (2, [8, 6, 8, 6]), (0.1, [0, 0, 1, 0])]
)
def test_replayed_rows_are_as_many_as_the_ratio_says(
    ratio: float, drawn: list[int], make_learner: Any, make_tasks: Any
) -> None:
    """Batches of 4 and 3 new rows, two epochs: ⌊ratio · n⌋ after n of them, as torch's; also from one row kept."""
    from perdure.strategies.quota import Quota
    from perdure.types import Example

    counts = []
    for memory in (None, 1):
        learner = make_learner(tuning="head", strategy="replay", memory=memory, ratio=ratio)
        first, second = make_tasks(2, 7)
        learner.begin_task([first], second)
        batches = [second.rows[:4], second.rows[4:]] * 2
        counts.append([learner.step(part).replayed for part in batches])
        learner.begin_task([first], second, 3)
        assert learner.step(batches[3]).replayed == drawn[3], "gone on with after three steps"
    torchs = Quota(ratio)
    one = [Example("k")]
    assert counts == [drawn, drawn]
    assert [len(torchs.draw(lambda k: one * k, [Example("n")] * len(b), lambda row: 1)) for b in batches] == drawn


def test_only_what_is_trained_moves(make_learner: Any, make_tasks: Any) -> None:
    learner = make_learner(strategy="sequential", tuning="lora")
    before, held = weights(learner), {n: np.array(v) for n, v in named(learner._frozen).items()}
    for _ in train(learner, make_tasks(1)):
        pass
    after = weights(learner)
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    assert all(name.startswith("head.") or name.endswith((".a", ".b")) for name in after)
    assert all(np.array_equal(value, named(learner._frozen)[name]) for name, value in held.items())


EWC = {"strategy": "ewc", "tuning": "head", "dropout": 0.0, "ewc_strength": 1e4}
PLAIN = {"strategy": "sequential", "tuning": "head", "dropout": 0.0}


def test_a_first_task_under_ewc_is_plain_training(make_learner: Any, make_tasks: Any) -> None:
    found = []
    for settings in (PLAIN, EWC):
        learner = make_learner(**settings)
        losses = [result.loss for _, result in train(learner, make_tasks(1))]
        found.append((losses, weights(learner)))
    (plain, bare), (ewc, pulled) = found
    # Two programs, in which sums may be taken in another order.
    np.testing.assert_allclose(plain, ewc, rtol=1e-5)
    assert gap(bare, pulled) < 1e-4


def test_fisher_is_the_mean_of_squares_not_the_square_of_the_mean(make_learner: Any, make_tasks: Any) -> None:
    learner = make_learner(**EWC)
    task = make_tasks(1)[0]
    found = named(learner.fisher(task))
    from perdure.jax.step import weighted_loss

    one = jax.jit(jax.grad(weighted_loss))
    rows = [one(learner.state.trained, learner._frozen, learner.batch([row]), None) for row in task.rows]
    each = [named(gradient) for gradient in rows]
    for name, value in found.items():
        brute = np.mean([np.square(gradient[name]) for gradient in each], 0)
        np.testing.assert_allclose(value, brute, rtol=1e-3, atol=1e-9)
    squared_mean = np.square(np.mean([gradient["head.pool.weight"] for gradient in each], 0))
    assert np.abs(found["head.pool.weight"] - squared_mean).max() > 1e-3 * np.abs(squared_mean).max()


def test_ewc_is_the_sum_over_tasks(make_learner: Any, make_tasks: Any) -> None:
    """Value and pull of the one quadratic against those of a quadratic a task, added up."""
    from perdure.jax.step import quadratic

    learner = make_learner(**EWC)
    past = []
    for t, task in enumerate(tasks := make_tasks(3)):
        learner.begin_task(tasks[:t], task)
        result = learner.step(task.rows[:4])
        if t == 0:
            assert result.penalty == 0
        past.append((named(jax.tree.map(np.array, learner.fisher(task))), weights(learner)))
        learner.end_task(task)
    learner.begin_task(tasks, tasks[0])
    here = weights(learner)
    wanted = sum(0.5 * np.sum(f[n] * (here[n] - at[n]) ** 2, dtype=np.float64) for f, at in past for n in here)
    value, pull = quadratic(learner.state.trained, learner.state.anchors)
    assert float(value) == pytest.approx(wanted, rel=1e-3)
    assert wanted > 0
    assert learner.step(tasks[0].rows[:4]).penalty == pytest.approx(1e4 * wanted, rel=1e-3)
    for name, ours in named(pull).items():
        brute = sum(f[name] * (here[name] - at[name]) for f, at in past)
        np.testing.assert_allclose(ours, brute, rtol=1e-3, atol=1e-3 * np.abs(brute).max())


def test_ewc_holds_what_it_protects(make_learner: Any, make_tasks: Any) -> None:
    moved = []
    for settings in (EWC, PLAIN):
        learner = make_learner(**settings)
        first, second = make_tasks(2)
        for _ in train(learner, [first]):
            pass
        if settings is EWC:
            importance = {n: np.array(v) for n, v in named(learner.state.anchors.importance).items()}
        before = weights(learner)
        learner.begin_task([first], second)
        for start in (0, 3) * 4:
            learner.step(second.rows[start : start + 4])
        after = weights(learner)
        moved.append(sum(np.sum(importance[n] * (after[n] - before[n]) ** 2) for n in before))
    assert moved[0] < moved[1] / 2


def test_dropout_is_of_the_step_and_the_seed(make_learner: Any, make_tasks: Any) -> None:
    rows = make_tasks(1)[0].rows[:4]

    def losses(**changes: Any) -> list[float]:
        learner = make_learner(**{"strategy": "sequential", "tuning": "head", **changes})
        return [learner.step(rows, lr=0.0).loss for _ in range(2)]

    first, second = losses()
    assert first != second
    assert losses() == [first, second]
    assert losses(seed=4) != [first, second]
    plain = losses(dropout=0.0)
    assert plain[0] == plain[1]


def test_a_step_that_is_not_finite_is_not_made(make_learner: Any, make_tasks: Any) -> None:
    learner = make_learner(tuning="head", strategy="sequential")
    before = weights(learner)
    bad = Row("bad", (1, 2), float("nan"), "t0")
    with pytest.raises(NonFiniteError, match=r"step 1: loss nan.* the update was not made"):
        learner.step([bad])
    assert gap(weights(learner), before) == 0
    assert np.isfinite(learner.step(make_tasks(1)[0].rows[:4]).loss)


@pytest.mark.parametrize(
    "changes", [{"optimizer": "adafactor", "tuning": "head"}, {"precision": "bf16"}], ids=["adafactor", "bf16"]
)
def test_it_learns(changes: Any, make_learner: Any, make_tasks: Any) -> None:
    learner = make_learner(**{"tuning": "lora", "dropout": 0.0, **changes})
    rows = make_tasks(1)[0].rows[:4]
    losses = [learner.step(rows).loss for _ in range(40)]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) / 3
    kinds = {name: str(leaf.dtype) for name, leaf in named(learner.model).items()}
    expected = "bfloat16" if "precision" in changes else "float32"
    inner = "base.weight" if "precision" in changes else "weight"
    assert kinds[f"backbone.layers.mlp.up.{inner}"] == kinds["backbone.embed"] == expected
    assert {kind for name, kind in kinds.items() if "norm" in name or name.startswith("head.")} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(learner.state.trained)} == {"float32"}


def test_adafactor_is_that_of_transformers() -> None:
    """Absolute rate, own clipping, factors of every matrix: five steps on uneven gradients.

    Of stacked layers each is a weight of its own: LoRA's factors are as small as here, and norms are vectors.
    """
    from transformers.optimization import Adafactor

    from perdure.jax.step import make_optimizer

    rng = np.random.default_rng(0)
    shapes = {"head.last": (130, 129), "head.bias": (40,), "layers.a": (3, 16, 256), "layers.norm": (3, 64)}
    start = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    uneven = {name: rng.lognormal(0, 2, size=shape) for name, shape in shapes.items()}
    apart = [(name, i) for name, shape in shapes.items() for i in (range(3) if "layers" in name else (None,))]
    theirs = {
        (name, i): torch.nn.Parameter(torch.tensor(start[name] if i is None else start[name][i]).float())
        for name, i in apart
    }
    optimizer = Adafactor(
        theirs.values(), lr=1e-2, scale_parameter=False, relative_step=False, warmup_init=False, weight_decay=0.1
    )
    ours = {name: jnp.asarray(value, jnp.float32) for name, value in start.items()}
    made = make_optimizer(FitSettings(optimizer="adafactor", clip=None, weight_decay=0.1))
    state = made.init(ours)
    for _ in range(5):
        gradient = {name: uneven[name] * rng.normal(size=shape) for name, shape in shapes.items()}
        for (name, i), parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name] if i is None else gradient[name][i]).float()
        optimizer.step()
        change, state = made.update({n: jnp.asarray(g, jnp.float32) for n, g in gradient.items()}, state, ours)
        ours = {name: value - 1e-2 * change[name] for name, value in ours.items()}
    for (name, i), parameter in theirs.items():
        found = ours[name] if i is None else ours[name][i]
        np.testing.assert_allclose(found, parameter.detach().numpy(), atol=1e-5, err_msg=f"{name} {i}")
    sizes = {name.rpartition("moments.")[2]: leaf.shape for name, leaf in named(state).items() if "moments" in name}
    assert sizes == {
        "head.last.row": (130,), "head.last.column": (129,), "head.bias.full": (40,),
        "layers.a.row": (3, 16), "layers.a.column": (3, 256), "layers.norm.full": (3, 64),
    }  # fmt: skip


def test_an_empty_task_is_refused(make_learner: Any, make_regressor: Any) -> None:
    with pytest.raises(DataError, match="task 'none': there are no rows"):
        make_learner(tuning="head").begin_task([], RowTask("none", ()))
    with pytest.raises(ConfigError, match="the backbone has no LoRA"):
        Learner(make_regressor(lora=False), FitSettings(tuning="lora"))
