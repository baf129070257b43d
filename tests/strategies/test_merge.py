"""MagMax, TIES and EMA by hand, by brute force and against PEFT; the known wrong versions are planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.utils.merge_utils import ties as peft_ties
from torch import Tensor, nn

from perdure import ContinualTrainer
from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import EMA, EWC, TIES, Chain, MagMax, PackNet, Replay, Strategy
from perdure.strategies.merge import Merging, write
from perdure.strategies.ties import smallest_kept
from perdure.training import checkpoint
from perdure.training.learner import Learner
from perdure.types import Example, Task

pytestmark = pytest.mark.usefixtures("float64")
Weights = dict[str, Tensor]
ROWS = [
    Example(str(i), "t", x=torch.tensor(x, dtype=torch.float64), y=torch.tensor(i % 2))
    for i, x in enumerate(([1.3, 0.6], [-0.6, -1.5], [-0.3, -1.6], [-1.4, 0.7]))
]


def learner_of(model: nn.Module, strategy: Strategy) -> Learner:
    settings = {"optimizer": {"type": "sgd", "lr": 0.1}}
    return Learner(model, strategy, "classification", validate(TrainingSettings, settings, "test"), 0)


def drive(
    strategy: Strategy, base: Mapping[str, Tensor], ends: Sequence[Mapping[str, Tensor]]
) -> tuple[list[Weights], list[Weights]]:
    """Where each task starts and what is served after it, if task t ends at ends[t]."""
    model = nn.ParameterDict({name: nn.Parameter(value.clone()) for name, value in base.items()})
    learner = learner_of(model, strategy)
    starts, served = [], []
    for index, end in enumerate(ends):
        learner.begin_task(Task(str(index), []), index)
        starts.append({name: p.detach().clone() for name, p in model.items()})
        write(dict(model.named_parameters()), end)
        learner.end_task()
        served.append({name: p.detach().clone() for name, p in model.items()})
    return starts, served


def by_hand(strategy: Strategy, base: Any, ends: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    starts, served = drive(strategy, {"w": torch.tensor(base)}, [{"w": torch.tensor(end)} for end in ends])
    return [weights["w"] for weights in starts], [weights["w"] for weights in served]


def check_magmax(make: Callable[..., MagMax]) -> None:
    """θ₀ = [[1, 2], [3, 4]]; τ₁ = [[1, 0], [−2, ½]], τ₂ = [[−½, −1], [½, 0]], τ₃ = [[−2, 0], [2, ¼]].

    After two tasks τ = [[1, −1], [−2, ½]]; after three [[−2, −1], [2, ½]], the later of −2 and 2 being taken.
    """
    base = [[1.0, 2.0], [3.0, 4.0]]
    ends = [[[2.0, 2.0], [1.0, 4.5]], [[0.5, 1.0], [3.5, 4.0]], [[-1.0, 2.0], [5.0, 4.25]]]
    starts, served = by_hand(make(), base, ends)
    assert [start.tolist() for start in starts] == [base, ends[0], ends[1]]
    assert [weights.tolist() for weights in served] == [
        ends[0], [[2.0, 1.0], [1.0, 4.5]], [[-1.0, 1.0], [5.0, 4.5]]
    ]  # fmt: skip
    assert by_hand(make(scale=0.5), base, ends)[1][1].tolist() == [[1.5, 1.5], [2.0, 4.25]]


def test_magmax_by_hand() -> None:
    check_magmax(MagMax)


def check_ties(make: Callable[..., TIES]) -> None:
    """Half of four entries, two, are kept.

    τ₁ = [[4, −1], [3, ½]] → [[4, 0], [3, 0]]; τ₂ = [[−2, −½], [−5, 1]] → [[−2, 0], [−5, 0]];
    τ₃ = [[1, −3], [−2, ½]] → [[0, −3], [−2, 0]]. Two tasks: the sums 2 and −2 elect + and −, so [[4, 0], [−5, 0]].
    Three: 2, −3 and −4 elect +, − and −, so [[4, −3], [(−5 − 2)/2, 0]].
    """
    base = [[1.0, 2.0], [3.0, 4.0]]
    moved = [[[4.0, -1.0], [3.0, 0.5]], [[-2.0, -0.5], [-5.0, 1.0]], [[1.0, -3.0], [-2.0, 0.5]]]
    ends = [(torch.tensor(base) + torch.tensor(one)).tolist() for one in moved]
    starts, served = by_hand(make(density=0.5), base, ends)
    assert [start.tolist() for start in starts] == [base, base, base]
    assert [weights.tolist() for weights in served] == [
        ends[0], [[5.0, 2.0], [-2.0, 4.0]], [[5.0, -1.0], [-0.5, 4.0]]
    ]  # fmt: skip
    assert by_hand(make(density=0.5, scale=2.0), base, ends)[1][2].tolist() == [[9.0, -4.0], [-4.0, 4.0]]


def test_ties_by_hand() -> None:
    check_ties(TIES)


def test_signs_that_balance_leave_the_base() -> None:
    served = by_hand(TIES(density=1.0), [1.0, 1.0], [[3.0, 1.0], [-1.0, 4.0]])[1]
    assert served[1].tolist() == [1.0, 4.0]


def check_ema(make: Callable[..., EMA]) -> None:
    """¼·[[4, 0], [8, −4]] + ¾·[[0, 4], [0, 4]] = [[1, 3], [2, 2]].

    ¼ of that and ¾·[[5, −1], [2, 6]] = [[4, 0], [2, 5]].
    """
    base = [[9.0, 9.0], [9.0, 9.0]]
    ends = [[[4.0, 0.0], [8.0, -4.0]], [[0.0, 4.0], [0.0, 4.0]], [[5.0, -1.0], [2.0, 6.0]]]
    starts, served = by_hand(make(decay=0.25), base, ends)
    assert [start.tolist() for start in starts] == [base, ends[0], ends[1]]
    assert [weights.tolist() for weights in served] == [
        ends[0], [[1.0, 3.0], [2.0, 2.0]], [[4.0, 0.0], [2.0, 5.0]]
    ]  # fmt: skip


def test_ema_by_hand() -> None:
    check_ema(EMA)


def check_steps(make: Callable[..., EMA], start: str = "last") -> None:
    """Every weight after every step of three tasks, recorded, and averaged in plain arithmetic."""
    torch.manual_seed(4)
    model = nn.Linear(2, 2)
    learner = learner_of(model, make(decay=0.8, every="step", start=start))
    plain, slow, last = nn.Linear(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)
    plain.load_state_dict(model.state_dict())
    for index in range(3):
        rows = [row.but(y=(row.y + index) % 2) for row in ROWS]
        learner.begin_task(Task(str(index), rows), index)
        for _ in range(4):
            learner.step(rows)
            last = model.weight.detach().clone()
            if index:
                slow = 0.8 * slow + 0.2 * last
            loss = nn.functional.cross_entropy(
                plain(torch.stack([r.x for r in rows])), torch.stack([r.y for r in rows])
            )
            for p, g in zip(plain.parameters(), torch.autograd.grad(loss, list(plain.parameters())), strict=True):
                p.data -= 0.1 * g
            if start == "last":  # what is served never reaches the training
                torch.testing.assert_close(last, plain.weight.detach(), rtol=0, atol=1e-12)
        slow = slow if index else last
        learner.end_task()
        torch.testing.assert_close(model.weight.detach(), slow, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", ["last", "merged"])
def test_ema_by_step_follows_every_step(start: str) -> None:
    check_steps(EMA, start)


def tasks_of(seed: int, count: int = 4) -> tuple[Weights, list[Weights]]:
    """A base of two tensors of unlike size and spread, and the ends of tasks."""
    rng = torch.Generator().manual_seed(seed)
    base = {"a": torch.randn(3, 4, generator=rng), "b": torch.randn(38, generator=rng)}
    spread = {"a": 0.1, "b": 1.0}
    ends = [{n: v + spread[n] * torch.randn(v.shape, generator=rng) for n, v in base.items()} for _ in range(count)]
    return base, ends


def flat(weights: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([weights[name].flatten() for name in ("a", "b")])


def check_ties_against_peft(make: Callable[..., TIES]) -> None:
    """All task vectors, stored, through PEFT's TIES; after each of four tasks."""
    for seed in range(5):
        base, ends = tasks_of(seed)
        served = drive(make(density=0.3, scale=1.3, start="last"), base, ends)[1]
        vectors = [flat(end) - flat(base) for end in ends]
        for count in range(2, 5):
            expected = flat(base) + 1.3 * peft_ties(vectors[:count], torch.ones(count), 0.3)
            torch.testing.assert_close(flat(served[count - 1]), expected, rtol=0, atol=1e-12)


def test_running_ties_equals_pefts_on_stored_task_vectors() -> None:
    check_ties_against_peft(TIES)


def check_magmax_brute(make: Callable[..., MagMax]) -> None:
    """The entry of largest magnitude among all task vectors, stored; to the last bit at scale 1."""
    for seed in range(5):
        base, ends = tasks_of(seed)
        served = drive(make(), base, ends)[1]
        for count in range(2, 5):
            values = torch.stack([flat(end) for end in ends[:count]])
            best = (values - flat(base)).abs().argmax(0)
            assert torch.equal(flat(served[count - 1]), values.gather(0, best[None])[0])


def test_running_magmax_equals_brute_force() -> None:
    check_magmax_brute(MagMax)


def test_trimming_keeps_the_largest_of_all_weights_together() -> None:
    """Of 0.1, 0.2, 0.3 | 1, 2 … 7, ten entries, three tenths are 5, 6 and 7; one entry is kept at the least."""
    moved = {"a": torch.tensor([0.1, -0.2, 0.3]), "b": -torch.arange(1.0, 8.0)}
    assert float(smallest_kept(moved, 0.3)) == 5.0
    assert float(smallest_kept(moved, 1e-9)) == 7.0
    assert float(smallest_kept(moved, 1.0)) == 0.1


@pytest.mark.parametrize("start", ["last", "merged", "base"])
@pytest.mark.parametrize("make", [MagMax, TIES, EMA])
def test_a_task_starts_where_it_is_told_to(make: Callable[..., Merging], start: str) -> None:
    base, ends = tasks_of(1)
    starts, served = drive(make(start=start), base, ends)
    before = {"last": ends, "merged": served, "base": [base] * 4}[start]
    assert torch.equal(flat(starts[0]), flat(base))
    for index in range(1, 4):
        assert torch.equal(flat(starts[index]), flat(before[index - 1]))


@pytest.mark.parametrize(
    ("make", "between", "within"),
    [
        (lambda: MagMax(), 3, 2),
        (lambda: MagMax(start="merged"), 2, 2),
        (lambda: TIES(), 5, 5),
        (lambda: TIES(start="last"), 6, 5),
        (lambda: EMA(), 2, 1),
        (lambda: EMA(every="step", start="merged"), 1, 1),
        (lambda: EMA(start="base"), 2, 2),
    ],
)
def test_what_is_held_does_not_grow_with_the_tasks(make: Callable[[], Merging], between: int, within: int) -> None:
    base, ends = tasks_of(2, 6)
    strategy = make()
    drive(strategy, base, ends)
    assert held(strategy) == between * 50
    learner = learner_of(nn.ParameterDict({n: nn.Parameter(v) for n, v in base.items()}), strategy := make())
    for index in range(5):
        learner.begin_task(Task(str(index), []), index)
        if index > 1:
            assert held(strategy) == within * 50
        learner.end_task()


def held(strategy: Merging) -> int:
    state = strategy.state_dict()
    return sum(
        v.numel() for values in (state["base"], state["last"], *state["held"].values()) for v in values.values()
    )


class AgainstThePrevious(MagMax):
    """Wrong: a task vector is the change since the task before."""

    def prepare(self, ctx: Any) -> None:
        super().prepare(ctx)
        self.base = {n: p.detach().clone() for n, p in ctx.model.named_parameters()}


class GoesOnFromMerged(MagMax):
    """Wrong: training goes on from what is served."""

    def prepare(self, ctx: Any) -> None:
        self.last = {}
        super().prepare(ctx)


class WithSign(MagMax):
    """Wrong: the largest entry, not that of largest magnitude."""

    def fold(self, trained: Any) -> None:
        farthest = self.held["farthest"]
        for name, new in trained.items():
            farthest[name] = torch.maximum(farthest.get(name, new), new)


class ServesLast(MagMax):
    """Wrong: nothing is merged; the weights that were trained last are served."""

    def merged(self, name: str) -> Tensor:
        return self.last[name]


class OverAll(TIES):
    """Wrong: the mean is over all tasks, the sum of those that agree being divided by their number."""

    def merged(self, name: str) -> Tensor:
        for side in ("num_above", "num_below"):
            self.held[side][name] = torch.full_like(self.held[side][name], self.tasks)
        return super().merged(name)


class OfBothSigns(TIES):
    """Wrong: those of the other sign are averaged too."""

    def merged(self, name: str) -> Tensor:
        held = self.held
        count = (held["num_above"][name] + held["num_below"][name]).clamp(min=1)
        return self.base[name] + self.scale * (held["above"][name] + held["below"][name]) / count


class TrimsLast(TIES):
    """Wrong: signs are elected and means taken untrimmed, and the merged change is trimmed."""

    def __init__(self, density: float = 0.2, **settings: Any) -> None:
        super().__init__(density=1.0, **settings)
        self._late = density

    def merged(self, name: str) -> Tensor:
        moved = {n: TIES.merged(self, n) - self.base[n] for n in self.base}
        least = smallest_kept(moved, self._late)
        return self.base[name] + torch.where(moved[name].abs() >= least, moved[name], 0.0)


class CountsVotes(TIES):
    """Wrong: each task has one vote on the sign, whatever its magnitude."""

    def merged(self, name: str) -> Tensor:
        up = self.held["num_above"][name] >= self.held["num_below"][name]
        above = self.held["above"][name] / self.held["num_above"][name].clamp(min=1)
        below = self.held["below"][name] / self.held["num_below"][name].clamp(min=1)
        return self.base[name] + self.scale * torch.where(up, above, below)


class TrimsEachTensor(TIES):
    """Wrong: every tensor keeps its own largest entries."""

    def fold(self, trained: Any) -> None:
        for name in trained:
            super().fold({name: trained[name]})


class Swapped(EMA):
    """Wrong: the decay is the share of what is new."""

    def __init__(self, decay: float = 0.3, **settings: Any) -> None:
        super().__init__(1 - decay, **settings)


class FromTheBase(EMA):
    """Wrong: the average begins at the weights before all training."""

    def prepare(self, ctx: Any) -> None:
        if not self.tasks:
            self.held["slow"] = {n: p.detach().clone() for n, p in ctx.model.named_parameters()}
            self.tasks = 1
        super().prepare(ctx)


class TrainsTheAverage(EMA):
    """Wrong: the average is written into the model at every step, so that training goes on from it."""

    def after_step(self, ctx: Any, batches: Any, outputs: Any) -> None:
        super().after_step(ctx, batches, outputs)
        if self.tasks:
            write(dict(ctx.model.named_parameters()), self.held["slow"])


class EndsOnly(EMA):
    """Wrong: by step as by task, the way is left out."""

    def __init__(self, decay: float = 0.3, every: Any = "task", start: Any = "last") -> None:
        super().__init__(decay, "task", start)


@pytest.mark.parametrize("mutant", [AgainstThePrevious, GoesOnFromMerged, WithSign, ServesLast])
def test_wrong_magmax_is_caught(mutant: type[MagMax]) -> None:
    with pytest.raises(AssertionError):
        check_magmax(mutant)


@pytest.mark.parametrize("mutant", [OverAll, OfBothSigns, TrimsLast, CountsVotes])
def test_wrong_ties_is_caught(mutant: type[TIES]) -> None:
    with pytest.raises(AssertionError):
        check_ties(mutant)


@pytest.mark.parametrize("mutant", [OverAll, OfBothSigns, TrimsLast, CountsVotes, TrimsEachTensor])
def test_wrong_ties_is_caught_by_peft(mutant: type[TIES]) -> None:
    with pytest.raises(AssertionError):
        check_ties_against_peft(mutant)


@pytest.mark.parametrize("mutant", [AgainstThePrevious, WithSign])
def test_wrong_magmax_is_caught_by_brute_force(mutant: type[MagMax]) -> None:
    with pytest.raises(AssertionError):
        check_magmax_brute(mutant)


@pytest.mark.parametrize("mutant", [Swapped, FromTheBase])
def test_wrong_ema_is_caught(mutant: type[EMA]) -> None:
    with pytest.raises(AssertionError):
        check_ema(mutant)


@pytest.mark.parametrize("mutant", [Swapped, FromTheBase, TrainsTheAverage, EndsOnly])
def test_wrong_ema_by_step_is_caught(mutant: type[EMA]) -> None:
    with pytest.raises(AssertionError):
        check_steps(mutant)


def rows_of(task: int) -> list[tuple[Tensor, int]]:
    rng = torch.Generator().manual_seed(task)
    return [(torch.randn(2, generator=rng), i % 2) for i in range(12)]


def trained(make: Callable[[], Strategy], stop: int | None = None, path: Path | None = None) -> ContinualTrainer:
    """Three tasks; with `stop`, saved between two and loaded into a new model."""
    torch.manual_seed(0)
    trainer = ContinualTrainer(nn.Linear(2, 2), make(), {"optimizer": {"lr": 0.1}, "batch_size": 4})
    for task in range(3):
        if task == stop:
            assert path is not None
            trainer.save(path)
            torch.manual_seed(99)
            trainer = ContinualTrainer.load(path, nn.Linear(2, 2))
        trainer.train_task(rows_of(task), rows_of(task), task)
    return trainer


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        MagMax,
        lambda: TIES(start="last"),
        TIES,
        EMA,
        lambda: EMA(start="merged"),
        lambda: EMA(every="step"),
        lambda: Chain([EWC(strength=1.0), EMA()]),
    ],
)
def test_a_run_saved_between_two_tasks_ends_the_same(make: Any, stop: int, tmp_path: Path) -> None:
    """The model on disk holds the merged weights, and the strategy those that training goes on from."""
    whole, resumed = trained(make), trained(make, stop, tmp_path / "saved")
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert torch.equal(torch.tensor(whole.scores.values), torch.tensor(resumed.scores.values)) or (
        str(whole.scores.values) == str(resumed.scores.values)
    )


class LosesLast(MagMax):
    """Wrong: what was trained last is not saved."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last": {}}


def test_losing_the_trained_weights_is_caught(tmp_path: Path) -> None:
    """From the second task on they differ from what is served."""
    ends = []
    for cut in (False, True):
        strategy = LosesLast() if cut else MagMax()
        torch.manual_seed(3)
        learner = learner_of(nn.Linear(2, 2), strategy)
        for index in range(3):
            if cut and index == 2:
                checkpoint.save(tmp_path / "saved", learner.state_dict())
                learner = learner_of(nn.Linear(2, 2), LosesLast())
                for i in range(2):
                    learner.begin_task(Task(str(i), ()), i, resuming=True)
                learner.load_state_dict(checkpoint.load(tmp_path / "saved"))
            rows = [row.but(y=(row.y + index) % 2) for row in ROWS]
            learner.begin_task(Task(str(index), rows), index)
            for _ in range(3):
                learner.step(rows)
            learner.end_task()
        ends.append([p.detach().clone() for p in learner.model.parameters()])
    assert not all(torch.equal(one, two) for one, two in zip(*ends, strict=True))


def test_what_is_scored_and_kept_after_a_task_is_merged() -> None:
    """Row 2 of R is that of the merged weights, worked out from a naive run's ends."""
    naive = [trained_ends(count) for count in (1, 2)]
    torch.manual_seed(0)
    trainer = ContinualTrainer(nn.Linear(2, 2), EMA(decay=0.25), {"optimizer": {"lr": 0.1}, "batch_size": 4})
    for task in range(2):
        trainer.train_task(rows_of(task), rows_of(task), task)
    model = nn.Linear(2, 2)
    model.load_state_dict({n: 0.25 * naive[0][n] + 0.75 * naive[1][n] for n in naive[0]})
    torch.testing.assert_close(trainer.model.weight, model.weight, rtol=0, atol=1e-12)
    x, y = zip(*rows_of(0), strict=True)
    loss = nn.functional.cross_entropy(model(torch.stack(x)), torch.tensor(y))
    assert trainer.matrices["loss"].values[2][0] == pytest.approx(loss.item(), abs=1e-12)


def trained_ends(count: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    trainer = ContinualTrainer(nn.Linear(2, 2), None, {"optimizer": {"lr": 0.1}, "batch_size": 4})
    for task in range(count):
        trainer.train_task(rows_of(task), rows_of(task), task)
    return trainer.model.state_dict()


def test_buffers_stay_those_of_the_training() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    learner = learner_of(model, EMA(decay=0.5))
    for index in range(2):
        learner.begin_task(Task(str(index), ROWS), index)
        learner.step(ROWS)
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        learner.end_task()
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name]), name


def test_a_weight_that_is_frozen_later_keeps_its_value() -> None:
    model = nn.Linear(2, 2)
    learner = learner_of(model, TIES(density=0.5))
    learner.begin_task(Task("0", ROWS), 0)
    learner.step(ROWS)
    learner.end_task()
    model.bias.requires_grad_(False)
    bias = model.bias.detach().clone()
    for index in (1, 2):
        learner.begin_task(Task(str(index), ROWS), index)
        learner.step(ROWS)
        learner.end_task()
    assert torch.equal(model.bias, bias)


def test_averages_of_half_precision_are_taken_in_single() -> None:
    """A thousandth of the way is below the last place of bf16 at 1, and would be rounded away."""
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(1, dtype=torch.bfloat16))})
    strategy = EMA(decay=0.999)
    learner = learner_of(model, strategy)
    for index, end in enumerate((1.0, *([2.0] * 20))):
        learner.begin_task(Task(str(index), []), index)
        write(dict(model.named_parameters()), {"w": torch.tensor([end])})
        learner.end_task()
    assert float(strategy.held["slow"]["w"]) == pytest.approx(2 - 0.999**20, rel=1e-5)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((EMA, TIES), "ema and ties both decide which weights are served"),
        ((PackNet, EMA), "ema changes weights when a task ends, which packnet must keep"),
    ],
)
def test_chains_that_make_no_sense_are_refused(members: Any, message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        Chain([make() for make in members])
    Chain([Replay(capacity=2), members[-1]()])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (MagMax, {"scale": -1}, "magmax: scale"),
        (MagMax, {"start": "best"}, "magmax: start must be one of last, merged, base"),
        (TIES, {"density": 0}, "ties: density"),
        (TIES, {"density": 20}, "ties: density is a share"),
        (TIES, {"scale": float("nan")}, "ties: scale"),
        (EMA, {"decay": 1}, "ema: decay must be below 1"),
        (EMA, {"decay": -0.1}, "ema: decay"),
        (EMA, {"every": "epoch"}, "ema: every must be task or step"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        make(**settings)
