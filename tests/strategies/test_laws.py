"""The law table: every strategy, and some chains, under the same laws in the same worlds."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.osf import OSFLayer
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import NonFiniteError, StrategyError
from perdure.strategies import EWC, Chain, Naive, Replay, Strategy
from perdure.training import checkpoint
from perdure.training.learner import Learner
from perdure.training.loop import Position, fit

from .conftest import EPOCHS, EXEMPT, REFUSED, STRATEGIES, WORLDS


def digest(state: Any) -> str:
    """SHA-256 of a nested state, tensors bit by bit."""
    found = hashlib.sha256()

    def walk(value: Any) -> None:
        if isinstance(value, Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value):
                found.update(key.encode())
                walk(value[key])
        elif isinstance(value, list | tuple):
            found.update(str(len(value)).encode())
            for inner in value:
                walk(inner)
        else:
            found.update(repr(value).encode())

    walk(state)
    return found.hexdigest()


def everything(world: Any, learner: Learner) -> str:
    scores = [learner.score(task.evaluation) for task in world.tasks]
    return digest({"state": learner.state_dict(), "scores": scores})


def plain_loss(world: Any, model: nn.Module, rows: Any) -> Tensor:
    """The task loss as one would write it by hand."""
    x, y = [row.x for row in rows], [row.y for row in rows]
    if world.objective == "causal_lm":
        ids = nn.utils.rnn.pad_sequence(x, batch_first=True)
        labels = nn.utils.rnn.pad_sequence(y, batch_first=True, padding_value=-100)
        logits = model(input_ids=ids, use_cache=False).logits[:, -ids.shape[1] :]  # a soft prompt stands before
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))
    if world.objective == "regression":
        with torch.no_grad():  # row by row, and kept in half precision
            states = [model.backbone(input_ids=ids[None]).last_hidden_state[0].half().float() for ids in x]
        length = -(-max(map(len, x)) // 8) * 8  # a multiple of eight, for whose sake sums are rounded otherwise
        real = torch.arange(length) < torch.tensor([len(ids) for ids in x])[:, None]
        padded = [F.pad(own, (0, 0, 0, length - len(own))) for own in states]
        predicted = model.head(torch.stack(padded), real)
        return 0.5 * F.mse_loss(predicted, torch.stack(y))
    return F.cross_entropy(model(torch.stack(x)), torch.stack(y))


def test_first_task_equals_plain_training_bit_for_bit(
    world: Any, make_strategy: Callable[[], Strategy], saving: Saving
) -> None:
    """Law 1, against a loop written by hand that knows nothing of perdure's."""
    name = next(name for name, make in STRATEGIES.items() if make is make_strategy)
    if name in EXEMPT:
        pytest.skip(f"{name} {EXEMPT[name]}")
    run = saving(world.name, make_strategy)

    model = world.make_model()
    torch.set_rng_state(run.generator)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    model.train()
    for epoch in range(EPOCHS):
        for rows in world.source(0).batches(0, epoch):
            loss = plain_loss(world, model, rows)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    for (name, ours), theirs in zip(run.first.items(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    if world.objective == "regression":  # mean of halves against half of the mean: the last bit may differ
        assert run.losses == pytest.approx(losses, rel=1e-6)
    else:
        assert run.losses == losses


@pytest.mark.parametrize(("name", "where"), REFUSED)
def test_what_makes_no_sense_is_refused_at_construction(name: str, where: str) -> None:
    """Law 4: every other pair of strategy and world goes through all the other laws."""
    with pytest.raises(StrategyError, match=REFUSED[name, where]):
        WORLDS[where].learner(STRATEGIES[name]())


@dataclass(frozen=True)
class Save:
    """A run's state on the disk, and where it stood."""

    path: Path
    task: int
    position: Position


def killed_and_resumed(world: Any, make: Callable[[], Strategy], at: int, path: Path, lose: str = "") -> Learner:
    """Train `at` steps, save to disk, start afresh from the file, and train to the end."""
    torch.manual_seed(5)
    first = world.learner(make())
    for done, (index, position, _) in enumerate(world.train(first), start=1):
        if done == at:
            state = first.state_dict()
            if lose == "strategy":
                state["strategy"] = make_blank(world, make, index)
            elif lose == "rng":
                state["rng"]["torch"] = torch.Generator().manual_seed(99).get_state()
            checkpoint.save(path, state)
            return resumed(world, make, Save(path, index, position))
    raise AssertionError("too few steps")


def resumed(world: Any, make: Callable[[], Strategy], save: Save) -> Learner:
    """Start afresh from the file, and train to the end."""
    torch.manual_seed(1234)  # a new process would not know the old generator
    second = world.learner(make())
    for i in range(save.task + 1):
        second.begin_task(world.tasks[i], i, resuming=True)
    second.load_state_dict(checkpoint.load(save.path))
    finish_task(world, second, save.task, save.position)
    for i in range(save.task + 1, len(world.tasks)):
        second.begin_task(world.tasks[i], i)
        finish_task(world, second, i)
    return second


def finish_task(world: Any, learner: Learner, index: int, position: Position | None = None) -> list[float]:
    """Train on a task that was begun to its end; the losses of the steps."""
    phases = learner.phases(world.tasks[index], EPOCHS)
    losses = [result.loss for _, result in fit(learner, world.source(index), phases, position)]
    learner.end_task()
    return losses


def make_blank(world: Any, make: Callable[[], Strategy], index: int) -> dict[str, Any]:
    blank = world.learner(make())
    for i in range(index + 1):
        blank.begin_task(world.tasks[i], i)
    return blank.strategy.state_dict()


@dataclass(frozen=True)
class Whole:
    """A run to its end: what it begins with, is after the first task, and ends with; and what it saved, by step."""

    generator: Tensor
    losses: list[float]  # of the first task's steps
    first: dict[str, Tensor]  # the parameters after it
    strategy: dict[str, Any]
    everything: str
    frozen: dict[str, tuple[Tensor, Tensor]]  # before and at the end
    saves: dict[int, Save]


Saving = Callable[[str, Callable[[], Strategy]], Whole]
# In the first task, at its end (where the strategy adds no phase), and before the last step of the second.
KILLS: dict[str, Callable[[int], int]] = {
    "first step": lambda steps: 1,
    "end of the first task": lambda steps: steps,
    "second task": lambda steps: 2 * steps - 1,
}


@pytest.fixture(scope="module")
def saving(tmp_path_factory: pytest.TempPathFactory) -> Saving:
    """Train to the end and save on the way; one run for each strategy in each world.

    A save that disturbs the run is seen: what goes on from an earlier one meets no later one.
    """

    @cache
    def run(world_name: str, make: Callable[[], Strategy]) -> Whole:
        world, path = WORLDS[world_name], tmp_path_factory.mktemp("saves")
        wanted = {when(world.steps) for when in KILLS.values()}
        torch.manual_seed(5)
        learner = world.learner(make())
        generator = torch.get_rng_state()
        frozen = {n: p.detach().clone() for n, p in learner.model.named_parameters() if not p.requires_grad}
        losses, saves, done = [], {}, 0
        first: dict[str, Tensor] = {}
        for index, task in enumerate(world.tasks):
            learner.begin_task(task, index)
            for position, result in fit(learner, world.source(index), learner.phases(task, EPOCHS)):
                done += 1
                if index == 0:
                    losses.append(result.loss)
                if done in wanted:
                    checkpoint.save(path / str(done), learner.state_dict())
                    saves[done] = Save(path / str(done), index, position)
            learner.end_task()
            first = first or {n: p.detach().clone() for n, p in learner.model.named_parameters()}
        strategy = copy.deepcopy(learner.strategy.state_dict())
        end = dict(learner.model.named_parameters())
        kept = {name: (value, end[name].detach()) for name, value in frozen.items()}
        return Whole(generator, losses, first, strategy, everything(world, learner), kept, saves)

    return run


@pytest.mark.parametrize("at", KILLS)
def test_killed_and_resumed_ends_the_same(
    world: Any, make_strategy: Callable[[], Strategy], at: str, saving: Saving
) -> None:
    """Law 2."""
    whole = saving(world.name, make_strategy)
    second = resumed(world, make_strategy, whole.saves[KILLS[at](world.steps)])
    assert everything(world, second) == whole.everything


@pytest.mark.parametrize("make", [lambda: Replay(capacity=6), lambda: EWC(strength=5.0)])
def test_without_its_state_the_run_differs(world: Any, make: Callable[[], Strategy], tmp_path: Path) -> None:
    """Law 3's control: the comparison above can fail."""
    torch.manual_seed(5)
    undisturbed = world.run(world.learner(make()))
    resumed = killed_and_resumed(world, make, world.steps + 1, tmp_path / "saved", lose="strategy")
    assert everything(world, resumed) != everything(world, undisturbed)


def test_without_the_generator_the_run_differs(mlp_world: Any, tmp_path: Path) -> None:
    """The same control for dropout's generator."""
    torch.manual_seed(5)
    undisturbed = mlp_world.run(mlp_world.learner(Naive()))
    resumed = killed_and_resumed(mlp_world, Naive, 7, tmp_path / "saved", lose="rng")
    assert everything(mlp_world, resumed) != everything(mlp_world, undisturbed)


def test_state_round_trip_is_the_identity(
    world: Any, make_strategy: Callable[[], Strategy], saving: Saving, tmp_path: Path
) -> None:
    """Law 3: through the disk and back, into a strategy that has seen nothing."""
    state = saving(world.name, make_strategy).strategy
    checkpoint.save(tmp_path / "saved", state)
    other = world.learner(make_strategy())
    for i, task in enumerate(world.tasks):
        other.begin_task(task, i, resuming=True)
    other.strategy.load_state_dict(checkpoint.load(tmp_path / "saved"))
    assert digest(other.strategy.state_dict()) == digest(state)


def test_frozen_parameters_stay_bitwise(world: Any, make_strategy: Callable[[], Strategy], saving: Saving) -> None:
    """Law 5: the first tensor is frozen by hand; with LoRA the whole base is."""
    if world.name.startswith("llama-"):
        frozen = saving(world.name, make_strategy).frozen
    else:
        learner = world.learner(make_strategy())
        next(learner.model.parameters()).requires_grad_(False)
        before = {n: p.detach().clone() for n, p in learner.model.named_parameters() if not p.requires_grad}
        world.run(learner)
        end = dict(learner.model.named_parameters())
        frozen = {name: (value, end[name]) for name, value in before.items()}
    assert frozen
    for name, (value, kept) in frozen.items():
        assert torch.equal(kept, value), name


def test_micro_batches_equal_the_big_batch(world: Any, make_strategy: Callable[[], Strategy]) -> None:
    """Law 6, with ragged lengths where there are lengths; dropout off, for it draws by the batch.

    Language models, which take long, in fp64 alone, whose bound is the sharper one, and in uneven micro-batches; a
    head on kept hidden states, which are of half precision and handed on as fp32, in fp32 alone.
    Plain SGD: Adam divides by the root of a second moment that is near zero at first and blows rounding up.
    """
    if world.objective == "causal_lm":
        check_micro_batches(world, make_strategy, (3,), torch.float64, 1e-10)
    elif world.objective == "regression":
        check_micro_batches(world, make_strategy, (3,), torch.float32, 1e-5)
    else:
        check_micro_batches(world, make_strategy, (2, 3), torch.float64, 1e-10)
        check_micro_batches(world, make_strategy, (3,), torch.float32, 1e-5)


def check_micro_batches(
    world: Any, make: Callable[[], Strategy], sizes: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    torch.set_default_dtype(dtype)
    try:
        ends = []
        for micro in (None, *sizes):
            learner = world.learner(
                make(), micro_batch_size=micro, optimizer={"type": "sgd", "lr": 0.05, "momentum": 0.9}
            )
            learner.model.to(dtype)
            for module in learner.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
            tasks = tuple(cast(task, dtype) for task in world.tasks)
            small = copy.copy(world)
            object.__setattr__(small, "tasks", tasks)
            small.run(learner)
            ends.append(weights_of(learner.model))
        for other in ends[1:]:
            for one, two in zip(ends[0], other, strict=True):
                torch.testing.assert_close(one, two, rtol=0, atol=tolerance)
    finally:
        torch.set_default_dtype(torch.float32)


def weights_of(model: nn.Module) -> list[Tensor]:
    """The parameters; of a layer held as the factors of an SVD, whose signs are anybody's, what they make."""
    made = {f"{name}.": m for name, m in model.named_modules() if isinstance(m, OSFLayer)}
    found = [p.detach().clone() for name, p in model.named_parameters() if not name.startswith(tuple(made))]
    for layer in made.values():
        bias = layer.base_layer.bias
        change = layer.get_delta_weight(layer.active_adapters[0])
        found += [(layer.base_layer.weight + change).detach(), *([] if bias is None else [bias.detach().clone()])]
    return found


def cast(task: Any, dtype: torch.dtype) -> Any:
    def turned(value: Tensor) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    rows = tuple(row.but(x=turned(row.x), y=turned(row.y)) for row in task.train)
    return type(task)(task.name, rows, task.evaluation)


def test_a_chain_member_never_shifts_anothers_draws(mlp_world: Any) -> None:
    """EWC with drawn targets has the same Fisher alone and behind a strategy that draws nothing on its own."""
    alone = EWC(strength=0.0, fisher="true")
    behind = EWC(strength=0.0, fisher="true")
    front = EWC(strength=0.0, fisher="true")
    torch.manual_seed(0)
    mlp_world.run(mlp_world.learner(Chain([Naive(), alone])), upto=1)
    torch.manual_seed(0)
    mlp_world.run(mlp_world.learner(Chain([behind, Replay(capacity=4)])), upto=1)
    torch.manual_seed(0)
    mlp_world.run(mlp_world.learner(front), upto=1)
    for name in alone.importance:
        assert torch.equal(alone.importance[name], behind.importance[name])


def check_no_trace(world: Any, learner: Learner) -> None:
    """A step on a model that says nan, after two of each task, is refused; the state is as before it, draws too."""
    done = [0, 0]
    for index, _, _ in world.train(learner):
        done[index] += 1
        if done[index] == 2:
            before = digest(learner.state_dict())
            spoilt = learner.model.register_forward_hook(_nan)
            with pytest.raises(NonFiniteError):
                learner.step(world.tasks[index].train[:4])
            spoilt.remove()
            assert digest(learner.state_dict()) == before
            assert all(p.grad is None for p in learner.model.parameters())
            if index == 1:
                return
    raise AssertionError("too few steps")


def _nan(module: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output * torch.nan
    output.logits = output.logits * torch.nan
    return output


def test_a_step_that_failed_leaves_no_trace(world: Any, make_strategy: Callable[[], Strategy]) -> None:
    check_no_trace(world, world.learner(make_strategy()))


def _forgetful(make: Callable[[], Strategy]) -> Strategy:
    """The mutant: draws of a step that was not taken are not given back."""
    strategy = make()
    strategy.turn_back = lambda bookmark: None  # type: ignore[method-assign]
    return strategy


@pytest.mark.parametrize("name", ["replay", "replay-tokens", "replay-once", "derpp", "agem", "replay+ewc"])
def test_draws_that_are_not_given_back_are_caught(name: str, mlp_world: Any) -> None:
    with pytest.raises(AssertionError):
        check_no_trace(mlp_world, mlp_world.learner(_forgetful(STRATEGIES[name])))


def test_an_error_within_a_step_leaves_no_trace(mlp_world: Any) -> None:
    """Whatever is raised between the draws and the update: here by a strategy's own hook."""
    learner = mlp_world.learner(STRATEGIES["replay+ewc"]())
    for done, _ in enumerate(mlp_world.train(learner), start=1):
        if done == 8:
            break
    before = digest(learner.state_dict())
    gradient = learner.strategy.gradient

    def broken(ctx: Any, batches: Any) -> None:
        gradient(ctx, batches)
        raise RuntimeError("out of memory, say")

    learner.strategy.gradient = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="out of memory"):
        learner.step(mlp_world.tasks[1].train[:4])
    assert digest(learner.state_dict()) == before
    assert all(p.grad is None for p in learner.model.parameters())
