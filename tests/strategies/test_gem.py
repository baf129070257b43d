"""GEM and A-GEM against KKT, brute force and hand-worked numbers; the known wrong versions must be caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.strategies import AGEM, EWC, GEM, Chain, episodic, project_agem, project_gem
from perdure.strategies.episodic import Episodic
from perdure.training.learner import Learner
from perdure.types import Example, Task

Project = Callable[[Tensor, Tensor, float], Tensor]


pytestmark = pytest.mark.usefixtures("float64")


def conflicts() -> Iterator[tuple[Tensor, Tensor]]:
    """Gradients that go against some of 1 to 6 references, of very different lengths, some of them alike."""
    rng = torch.Generator().manual_seed(3)
    for count in (1, 2, 3, 4, 6):
        for _ in range(20):
            references = torch.randn(count, 12, generator=rng) * 10 ** torch.randn(count, 1, generator=rng)
            common = torch.randn(12, generator=rng)
            references = references + common  # near each other, so that several bind at once
            yield torch.randn(12, generator=rng) - common, references


def check_numbers(project: Project) -> None:
    """By hand. Against (1, 0) the part along it goes: (−1, 1) → (0, 1). Against (1, 0) and (0, 1), (−1, −2) → 0.

    Against (3, 4) alone, g = (−1, 0): v = −g·r / r·r = 3/25, so that g̃ = (−1 + 9/25, 12/25).
    With the margin 1 the bound v ≥ 1 binds: g̃ = (−1, 0) + (3, 4).
    """
    for g, refs, margin, expected in [
        ([-1.0, 1.0], [[1.0, 0.0]], 0.0, [0.0, 1.0]),
        ([-1.0, -2.0], [[1.0, 0.0], [0.0, 1.0]], 0.0, [0.0, 0.0]),
        ([-1.0, 0.0], [[3.0, 4.0]], 0.0, [-1 + 9 / 25, 12 / 25]),
        ([-1.0, 0.0], [[3.0, 4.0]], 1.0, [2.0, 4.0]),
    ]:
        found = project(torch.tensor(g), torch.tensor(refs), margin)
        torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-12)


def check_kkt(project: Project) -> None:
    """No product is negative; what was added is Σ v_k g_k with v ≥ 0, and v_k = 0 where the bound of k is slack."""
    for g, refs in conflicts():
        found = project(g, refs, 0.0)
        unit = refs / refs.norm(dim=1, keepdim=True)
        slack = unit @ found
        assert slack.min() > -1e-10
        weights, residual = nnls(unit.T.numpy(), (found - g).numpy())
        assert residual < 1e-10
        assert np.abs(weights * slack.numpy()).max() < 1e-9


def check_brute(project: Project, margin: float) -> None:
    """Every set of references that could have v above the margin is tried; the best feasible one is right."""
    for g, refs in conflicts():
        if bool((refs @ g >= 0).all()):
            assert torch.equal(project(g, refs, margin), g)
            continue
        refs = refs / refs.norm(dim=1, keepdim=True)
        best, value = g, float("inf")
        for size in range(len(refs) + 1):
            for free in map(list, combinations(range(len(refs)), size)):
                v = torch.full((len(refs),), margin)
                if free:
                    rest = g + v @ refs - v[free] @ refs[free]
                    v[free] = torch.linalg.solve(refs[free] @ refs[free].T, -refs[free] @ rest)
                    if (v[free] < margin).any():
                        continue
                step = g + v @ refs
                if float(step @ step) < value:
                    best, value = step, float(step @ step)
        torch.testing.assert_close(project(g, refs, margin), best, rtol=0, atol=1e-9)


def check_all(project: Project) -> None:
    check_numbers(project)
    check_kkt(project)
    check_brute(project, 0.0)
    check_brute(project, 0.3)


def test_the_projection() -> None:
    check_all(project_gem)


def wrong_sign(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """The dual's weights are subtracted: violations grow."""
    return 2 * g - project_gem(g, refs, margin)


def turned_constraint(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """Products are made negative instead of positive."""
    return -project_gem(-g, refs, margin)


def no_bound(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """Weights may be negative: orthogonal to every reference."""
    return g - torch.linalg.pinv(refs) @ (refs @ g)


def one_after_another(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """Each reference in turn: the second projection undoes the first."""
    for r in refs:
        g = project_agem(g, r) + margin * r
    return g


def per_half(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """Tensor by tensor instead of on the whole vector."""
    half = len(g) // 2
    return torch.cat([project_gem(g[:half], refs[:, :half], margin), project_gem(g[half:], refs[:, half:], margin)])


def margin_as_product(g: Tensor, refs: Tensor, margin: float) -> Tensor:
    """The margin bounds the products instead of the weights."""
    return project_gem(g, refs, 0.0) + margin * refs.sum(0) / len(refs) ** 2


@pytest.mark.parametrize(
    "wrong", [wrong_sign, turned_constraint, no_bound, one_after_another, per_half, margin_as_product]
)
def test_wrong_projections_are_caught(wrong: Project) -> None:
    with pytest.raises(AssertionError):
        check_all(wrong)


def test_what_is_not_finite_stays_so() -> None:
    """The loop refuses a step by the gradient's norm; a solver's error would hide it."""
    bad = torch.tensor([[1.0, torch.nan], [2.0, 1.0]])
    assert project_gem(torch.tensor([-1.0, 0.0]), bad).isnan().any()
    assert project_gem(torch.ones(2), torch.tensor([[torch.inf, 1.0]])).isnan().any()


def test_with_one_past_task_it_is_agem() -> None:
    for g, refs in conflicts():
        torch.testing.assert_close(project_gem(g, refs[:1]), project_agem(g, refs[0]), rtol=1e-12, atol=1e-12)


def test_references_that_are_zero_or_the_same_do_no_harm() -> None:
    g, r = torch.tensor([-1.0, 2.0, 0.5]), torch.tensor([2.0, 1.0, -1.0])
    g = g - 3 * r
    many = torch.stack([r, torch.zeros(3), r, 5 * r])
    torch.testing.assert_close(project_gem(g, many), project_agem(g, r), rtol=0, atol=1e-12)


def check_agem(project: Callable[[Tensor, Tensor], Tensor]) -> None:
    """(−1, 0) against (3, 4) → (−16/25, 12/25), by hand; orthogonal where it went against, else the same object."""
    found = project(torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(found, torch.tensor([-16 / 25, 12 / 25]), rtol=0, atol=1e-12)
    for g, refs in conflicts():
        r = refs[0]
        found = project(g, r)
        if g @ r >= 0:
            assert torch.equal(found, g)
        else:
            assert abs(float(found @ r)) < 1e-12 * float(g.norm() * r.norm())
            assert float(found @ g) == pytest.approx(float(g @ g - (g @ r) ** 2 / (r @ r)), rel=1e-9, abs=1e-9)


def test_agem_is_orthogonal() -> None:
    check_agem(project_agem)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda g, r: g + (g @ r) / (r @ r) * r if g @ r < 0 else g,
        lambda g, r: g - (g @ r) / r.norm() * r if g @ r < 0 else g,
        lambda g, r: g - (g @ r) / (r @ r) * r,
        lambda g, r: g - (g @ r) / (r @ r) * r if g @ r > 0 else g,
    ],
    ids=["sign", "length not squared", "always", "turned condition"],
)
def test_wrong_agem_is_caught(wrong: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_agem(wrong)


def make_rows(task: str, turn: float, n: int = 12) -> list[Example]:
    """Rows of a task whose labels depend on another direction than the others'."""
    rng = torch.Generator().manual_seed(len(task))
    x = torch.randn(n, 4, generator=rng, dtype=torch.float64)
    way = torch.tensor([np.cos(turn), np.sin(turn), 0.5, 0.0], dtype=torch.float64)
    return [Example(f"{task}{i}", task, x=x[i], y=(x[i] @ way > 0).long()) for i in range(n)]


STREAM = [make_rows("a", 0.0), make_rows("bb", 2.5), make_rows("ccc", 4.5)]


def third_task(strategy: Any) -> Learner:
    """A learner with dropout that has learnt two tasks and begun the third."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 2))
    settings = {"optimizer": {"type": "sgd", "lr": 0.3}, "batch_size": 4}
    learner = Learner(model, strategy, "classification", validate(TrainingSettings, settings, "test"), 0)
    for index, rows in enumerate(STREAM):
        learner.begin_task(Task(rows[0].task, rows), index)
        if index == 2:
            return learner
        for _ in range(40):
            learner.step(rows)
        learner.end_task()
    raise AssertionError


def gradient_by_hand(model: nn.Module, rows: Sequence[Example]) -> Tensor:
    """The mean loss's gradient over rows, in eval mode, as one vector."""
    model.eval()
    x, y = torch.stack([r.x for r in rows]), torch.stack([r.y for r in rows])  # type: ignore[misc]
    found = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def check_steps(make: Callable[[], Episodic]) -> None:
    """In 15 steps of the third task no kept row's task is gone against, by gradients taken anew and by hand.

    The step's own gradient is looked at between the hook and the optimizer, by its mean over all weights.
    """
    learner = third_task(make())
    bound = 0
    after: list[Tensor] = []
    strategy: Any = learner.strategy
    inner = strategy.gradient

    def watched(ctx: Any, batches: Any) -> None:
        before = torch.cat([p.grad.flatten() for p in learner.model.parameters()])
        inner(ctx, batches)
        after[:] = [before, torch.cat([p.grad.flatten() for p in learner.model.parameters()])]

    strategy.gradient = watched
    for step in range(15):
        past = {name: rows for name, rows in strategy.rows.items() if name != "ccc"}
        assert [len(rows) for rows in past.values()] == [5, 5]
        references = torch.stack([gradient_by_hand(learner.model, rows) for rows in past.values()])
        learner.model.train()
        learner.step(STREAM[2][4 * (step % 3) : 4 * (step % 3) + 4])
        expected = project_gem(after[0], references)
        torch.testing.assert_close(after[1], expected, rtol=0, atol=1e-10)
        bound += int(not torch.equal(expected, after[0]))
    assert bound > 3  # else nothing was looked at


def test_every_step_is_projected_by_gradients_of_now() -> None:
    check_steps(lambda: GEM(per_task=5))


class KeptGradients(GEM):
    """Wrong: the references of a task are taken once."""

    def reference(self, ctx: Any, rows: Any, batches: Any) -> Tensor:
        if not hasattr(self, "known"):
            self.known: dict[str, Tensor] = {}
        if rows[0].key not in self.known:
            self.known[rows[0].key] = super().reference(ctx, rows, batches)
        return self.known[rows[0].key]


class TrainMode(GEM):
    """Wrong: the references are taken with dropout."""

    def reference(self, ctx: Any, rows: Any, batches: Any) -> Tensor:
        loss = ctx.loss_of(rows, train=True)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(ctx.model.parameters()))])


class SummedLoss(GEM):
    """Wrong by a factor: harmless to the direction of each bound, and so not a wrong projection; see the test."""

    def reference(self, ctx: Any, rows: Any, batches: Any) -> Tensor:
        return 5 * super().reference(ctx, rows, batches)


class TensorByTensor(GEM):
    """Wrong: each tensor is projected by itself."""

    def gradient(self, ctx: Any, batches: Any) -> None:
        past = [rows for name, rows in self.rows.items() if name != ctx.task.name]
        if not past:
            return
        refs = torch.stack([self.reference(ctx, rows, batches) for rows in past])
        start = 0
        for p in ctx.model.parameters():
            piece = refs[:, start : start + p.numel()]
            start += p.numel()
            p.grad.copy_(project_gem(p.grad.flatten(), piece).view_as(p))


@pytest.mark.parametrize("mutant", [KeptGradients, TrainMode, TensorByTensor])
def test_wrong_versions_are_caught(mutant: type[GEM]) -> None:
    with pytest.raises(AssertionError):
        check_steps(lambda: mutant(per_task=5))


def test_the_length_of_a_reference_does_not_matter() -> None:
    check_steps(lambda: SummedLoss(per_task=5))


def test_pieces_of_a_reference_add_up() -> None:
    """The reference is taken in pieces of the micro-batch's size: the mean over all targets whatever the size."""
    learner = third_task(GEM(per_task=11))
    strategy: Any = learner.strategy
    whole = gradient_by_hand(learner.model, strategy.rows["a"])
    for size in (1, 3, 4, 12):
        found = strategy.reference(learner.ctx, strategy.rows["a"], [learner.collate(STREAM[2][:size])])
        torch.testing.assert_close(found, whole, rtol=0, atol=1e-13)


def check_clipping(make: Callable[[], GEM]) -> None:
    """At rate 0.3 the step has the clipped length; the norm before clipping is that of the projected gradient."""
    learner = third_task(make())
    learner.settings = learner.settings.model_copy(update={"clip": 1e-3})
    before = torch.cat([p.detach().flatten().clone() for p in learner.model.parameters()])
    result = learner.step(STREAM[2][:4])
    moved = torch.cat([p.detach().flatten() for p in learner.model.parameters()]) - before
    assert result.logged["projected"] == 1.0
    assert float(moved.norm()) == pytest.approx(0.3e-3, rel=1e-4)
    assert result.gradient_norm == third_task(GEM(per_task=5)).step(STREAM[2][:4]).gradient_norm


def test_clipping_comes_after_the_projection() -> None:
    check_clipping(lambda: GEM(per_task=5))


class ClipsFirst(GEM):
    """Wrong: the gradient is clipped, then projected."""

    def gradient(self, ctx: Any, batches: Any) -> None:
        torch.nn.utils.clip_grad_norm_(ctx.model.parameters(), 1e-3)
        super().gradient(ctx, batches)


def test_clipping_first_is_caught() -> None:
    with pytest.raises(AssertionError):
        check_clipping(lambda: ClipsFirst(per_task=5))


def test_agem_draws_without_replacement_and_uniformly() -> None:
    """Over 600 steps, 6 of the 10 kept rows each: 360 of each, σ = 12."""
    learner = third_task(AGEM(per_task=5, sample=6))
    strategy: Any = learner.strategy
    counts: Counter[str] = Counter()
    reference = strategy.reference

    def counted(ctx: Any, rows: Sequence[Example], batches: Any) -> Tensor:
        assert len({row.key for row in rows}) == len(rows) == 6
        counts.update(row.key for row in rows)
        return reference(ctx, rows, batches)

    strategy.reference = counted
    for _ in range(600):
        learner.step(STREAM[2][:4])
    assert len(counts) == 10
    assert sum((count - 360) ** 2 / 360 for count in counts.values()) < 27.9  # χ², 9 degrees of freedom, 0.1 %


def test_agem_projects_every_step() -> None:
    """With a sample of all kept rows the reference is the gradient of their mean loss."""
    learner = third_task(AGEM(per_task=5, sample=10))
    strategy: Any = learner.strategy
    projected = 0
    for step in range(15):
        rows = [row for name in ("a", "bb") for row in strategy.rows[name]]
        reference = gradient_by_hand(learner.model, rows)
        before = torch.cat([p.detach().flatten().clone() for p in learner.model.parameters()])
        result = learner.step(STREAM[2][4 * (step % 3) : 4 * (step % 3) + 4])
        moved = torch.cat([p.detach().flatten() for p in learner.model.parameters()]) - before
        assert float(moved @ reference) < 1e-12  # downhill, or level, on the memory
        projected += int(result.logged["projected"])
        if result.logged["projected"]:
            assert abs(float(moved @ reference)) < 1e-12
    assert projected > 3


class Doubles(TorchDispatchMode):
    """Notes the largest float64 tensor that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if (
            isinstance(result, Tensor)
            and result.dtype == torch.float64
            and func is not torch.ops.aten.detach.default
        ):
            self.largest = max(self.largest, result.numel())
        return result


def check_doubles(project: Project) -> None:
    references = torch.randn(4, 1000, dtype=torch.float32)
    gradient = -references.sum(0)
    with Doubles() as doubles:
        found = project(gradient, references, 0.0)
    assert found.dtype == torch.float32
    assert 4 * 50 <= doubles.largest <= 4 * 50 * 2
    assert float((references @ found).min()) > -1e-2  # of products that were about −1000


def test_no_double_copy_of_tasks_times_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(episodic, "COLUMNS", 50)
    check_doubles(project_gem)

    def in_double(g: Tensor, refs: Tensor, margin: float) -> Tensor:
        """Wrong: all references are turned into float64 at once."""
        return project_gem(g.double(), refs.double(), margin).float()

    with pytest.raises(AssertionError):
        check_doubles(in_double)


def test_memory_between_steps_is_rows_alone() -> None:
    """Five tasks on 38 weights: what is saved is 5 rows a task and no gradient."""
    learner = third_task(GEM(per_task=5))
    packed = learner.strategy.state_dict()["rows"]
    assert {name: len(rows["rows"]) for name, rows in packed.items()} == {"a": 5, "bb": 5}
    held = [t for rows in packed.values() for t in rows["tensors"].values()]
    assert sum(t.nbytes for t in held) == 2 * 5 * (4 * 8 + 8)


def test_a_chain_that_would_break_the_bound_is_refused() -> None:
    for chain in ([GEM(), EWC()], [AGEM(), Chain([EWC()])]):
        with pytest.raises(StrategyError, match=r"after a?gem has bounded it"):
            Chain(chain)
    with pytest.raises(StrategyError, match="take one of them"):
        Chain([AGEM(), GEM()])


def test_in_a_chain_it_projects_what_those_before_it_made() -> None:
    """ewc+gem: what is projected is the loss's gradient with EWC's pull in it."""
    ewc, gem_ = EWC(strength=50.0), GEM(per_task=5)
    learner = third_task(Chain([ewc, gem_]))
    learner.step(STREAM[2][:4])  # away from the anchor
    references = torch.stack([gradient_by_hand(learner.model, rows) for rows in gem_.rows.values()])
    ctx: Any = learner.ctx
    loss = ctx.loss_of(STREAM[2][4:8])
    own = torch.autograd.grad(loss, list(learner.model.parameters()))
    for p, g in zip(learner.model.parameters(), own, strict=True):
        p.grad = g.clone()
    learner.strategy.gradient(ctx, [learner.collate(STREAM[2][4:8])])
    pulled = [
        g + 50.0 * ewc.importance[name] * (p.detach() - ewc.anchor[name])
        for (name, p), g in zip(learner.model.named_parameters(), own, strict=True)
    ]
    found = torch.cat([p.grad.flatten() for p in learner.model.parameters()])  # type: ignore[union-attr]
    expected = project_gem(torch.cat([g.flatten() for g in pulled]), references)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GEM(per_task=0), "gem: per_task"),
        (lambda: GEM(margin=-1), "gem: margin"),
        (lambda: AGEM(per_task=0), "agem: per_task"),
        (lambda: AGEM(sample=0), "agem: sample"),
    ],
)
def test_settings_that_cannot_be_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        make()
