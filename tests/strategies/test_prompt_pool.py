"""The prompt pool against brute force, row by row; the known wrong versions are planted and must be caught."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.config import TrainingSettings, validate
from perdure.errors import StrategyError
from perdure.models import prompts
from perdure.models.objectives import collate
from perdure.models.prompts import Prompts
from perdure.strategies import PromptPool
from perdure.strategies.base import FREE
from perdure.strategies.identity import prompt_ends
from perdure.training.learner import Learner
from perdure.types import Batch, Example, Task

pytestmark = pytest.mark.usefixtures("float64")
Make = Callable[..., PromptPool]


def begun(make_lm: Any, strategy: PromptPool, tasks: str = "t", kind: str = "llama", **changes: Any) -> Learner:
    """A learner that has begun these tasks, on a model whose answers vary and whose attention drops."""
    more = {} if kind == "lfm2" else {"attention_dropout": 0.5}
    settings = validate(TrainingSettings, {"optimizer": {"lr": 0.1, "weight_decay": 0.1}, **changes}, "test")
    learner = Learner(make_lm(kind, spread=0.3, **more).double(), strategy, "causal_lm", settings, 0)
    for index, name in enumerate(tasks):
        learner.begin_task(Task(name, ()), index)
    return learner


def pool_of(learner: Learner) -> Any:
    return learner.model.prompt_pool


# The query


def check_query(make_lm: Any, rows: list[Example], make: Make) -> None:
    """Row by row, unpadded, only its prompt, in a plain model: the mean of the last layer's output, to 1e-12."""
    learner = begun(make_lm, make(size=6, length=3))
    plain = make_lm("llama", spread=0.3).double()
    batch = collate(rows, "causal_lm")
    learner.model.train()
    found = learner.strategy.query(learner.model, batch)  # type: ignore[attr-defined]
    assert learner.model.training
    for row, query in zip(rows, found, strict=True):
        assert row.x is not None
        assert row.y is not None
        prompt = row.x[: next(i for i, label in enumerate(row.y) if label >= 0)]
        with torch.no_grad():
            expected = plain(prompt[None], output_hidden_states=True).hidden_states[-1][0].mean(0)
        torch.testing.assert_close(query, expected, rtol=0, atol=1e-12)
    # Not a token of the answers is seen, nor whether there are labels.
    assert all(row.x is not None and row.y is not None for row in rows)
    other = [row.but(x=torch.where(row.y >= 0, (row.x + 7) % 40, row.x)) for row in rows]  # type: ignore[operator]
    assert torch.equal(learner.strategy.query(learner.model, collate(other, "causal_lm")), found)  # type: ignore
    asked = [row.but(x=row.x[row.y < 0], y=row.y[row.y < 0]) for row in rows]  # type: ignore[index, operator]
    bare = learner.strategy.query(learner.model, collate(asked, "causal_lm"))  # type: ignore[attr-defined]
    torch.testing.assert_close(bare, found, rtol=0, atol=1e-12)


class WithAnswers(PromptPool):
    """Wrong: the mean is over the answer's tokens too."""

    def query(self, model: nn.Module, batch: Batch) -> Tensor:
        ends = torch.tensor([len(row.x) - 1 for row in batch.examples])  # type: ignore[arg-type]
        return prompts.queries(model, batch.x, ends)  # type: ignore[arg-type]


class WithPadding(PromptPool):
    """Wrong: the mean is over the width of the batch."""

    def query(self, model: nn.Module, batch: Batch) -> Tensor:
        ends = prompt_ends(batch)
        return prompts.queries(model, batch.x, torch.full_like(ends, int(ends.max())))  # type: ignore[arg-type]


class BehindItsPrompts(PromptPool):
    """Wrong: the query is that of the model with the pool's own prompts."""

    def query(self, model: Any, batch: Batch) -> Tensor:
        ends = prompt_ends(batch)
        own = torch.stack(list(model.prompt_pool.prompts))[: self.top].flatten(0, 1)
        inputs = torch.cat([own.expand(len(ends), -1, -1), model.get_input_embeddings()(batch.x)], 1)
        hidden = model.base_model(inputs_embeds=inputs).last_hidden_state[:, len(own) :]
        inside = torch.arange(hidden.shape[1]) <= ends[:, None]
        return (hidden * inside[..., None]).sum(1) / (ends + 1)[:, None]


class InTrainMode(PromptPool):
    """Wrong: dropout is on while the query is taken."""

    def query(self, model: Any, batch: Batch) -> Tensor:
        model.eval = model.train
        try:
            return super().query(model, batch)
        finally:
            del model.eval


def test_the_query_is_of_the_prompt_alone(make_lm: Any, make_lm_rows: Any) -> None:
    check_query(make_lm, make_lm_rows(7), PromptPool)


@pytest.mark.parametrize("mutant", [WithAnswers, WithPadding, BehindItsPrompts, InTrainMode])
def test_a_wrong_query_is_caught(mutant: type[PromptPool], make_lm: Any, make_lm_rows: Any) -> None:
    with pytest.raises(AssertionError):
        check_query(make_lm, make_lm_rows(7), mutant)


def test_a_row_that_is_learnt_from_its_first_token_on_is_asked_by_that(make_lm: Any) -> None:
    ids = torch.tensor([5, 6, 7])
    learner = begun(make_lm, PromptPool(size=2, length=1))
    batch = collate([Example("a", "t", x=ids, y=ids), Example("b", "t", x=ids[:1], y=ids[:1])], "causal_lm")
    first, alone = learner.strategy.query(learner.model, batch)  # type: ignore[attr-defined]
    torch.testing.assert_close(first, alone, rtol=0, atol=1e-12)


# The choice


def check_choice(make_lm: Any, rows: list[Example], make: Make) -> None:
    """Cosines number by number, for keys of many lengths; a row's prompts are the same alone and in any batch."""
    strategy = make(size=9, length=1, top=3, diversity="none")
    learner = begun(make_lm, strategy)
    pool, model = pool_of(learner), learner.model
    rng = torch.Generator().manual_seed(4)
    for i, key in enumerate(pool.keys):
        key.data = torch.randn(16, generator=rng) * 3.0 ** (i - 4)

    def chosen(some: list[Example]) -> list[list[int]]:
        batch = collate(some, "causal_lm")
        return strategy.choose(pool.distances(strategy.query(model, batch)), batch, True).tolist()

    expected = []
    for query in strategy.query(model, collate(rows, "causal_lm")).tolist():
        cosines = []
        for key in [key.tolist() for key in pool.keys]:
            dot = sum(k * q for k, q in zip(key, query, strict=True))
            cosines.append(dot / (sum(k * k for k in key) * sum(q * q for q in query)) ** 0.5)
        expected.append(sorted(sorted(range(9), key=lambda i: -cosines[i])[:3]))
    assert len({tuple(one) for one in expected}) > 1
    assert chosen(rows) == expected
    assert [chosen([row])[0] for row in rows] == expected


class Batchwise(PromptPool):
    """Wrong, as in the published code: all rows get the prompts that most rows of the batch chose."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        each = super().choose(distances, batch, training)
        often = each.flatten().bincount(minlength=self.size).topk(self.top).indices.sort().values
        return often.expand(len(each), -1)


def not_normalised(self: Prompts, queries: Tensor) -> Tensor:
    """Wrong: long keys win."""
    return -queries @ torch.stack(list(self.keys)).detach().T


def test_the_choice_by_brute_force(make_lm: Any, make_lm_rows: Any) -> None:
    check_choice(make_lm, make_lm_rows(12), PromptPool)


def test_a_wrong_choice_is_caught(make_lm: Any, make_lm_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        check_choice(make_lm, make_lm_rows(12), Batchwise)
    monkeypatch.setattr(Prompts, "distances", not_normalised)
    with pytest.raises(AssertionError):
        check_choice(make_lm, make_lm_rows(12), PromptPool)


def check_diversity(make: Make) -> None:
    """Distances .1 .2 .3 .4; earlier tasks chose the prompts 3, 1, 0 and 0 times.

    Times the shares .75 .25 0 0 that is .075 .05 0 0. Two prompts: the unused 2 and 3. Three: 1 as well, whose .05
    is less than .075. At inference the nearest: 0 and 1. Of the unused alone, one prompt: 2, the nearer one.
    """
    distances = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    batch = collate([Example("r", "c", x=torch.tensor([3, 4]), y=torch.tensor([3, 4]))], "causal_lm")

    def chosen(top: int, training: bool) -> list[int]:
        strategy = make(size=4, top=top, diversity="frequency")
        strategy.load_state_dict(
            {"tasks": ["a", "b", "c"], "chosen": {"a": [1, 1, 0, 0], "b": [2, 0, 0, 0], "c": [0, 0, 99, 0]}}
        )
        return strategy.choose(distances, batch, training)[0].tolist()

    assert chosen(2, True) == [2, 3]
    assert chosen(3, True) == [1, 2, 3]
    assert chosen(1, True) == [2]
    assert chosen(2, False) == [0, 1]


class CountsItself(PromptPool):
    """Wrong: the present task's own choices are held against it."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        self.tasks.append("")
        return super().choose(distances, batch, training)


class AtInferenceToo(PromptPool):
    """Wrong: the penalty is for training."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        return super().choose(distances, batch, True)


def test_the_frequency_penalty_by_hand() -> None:
    check_diversity(PromptPool)


@pytest.mark.parametrize("mutant", [CountsItself, AtInferenceToo])
def test_a_wrong_penalty_is_caught(mutant: type[PromptPool]) -> None:
    with pytest.raises(AssertionError):
        check_diversity(mutant)


def check_told_in_training_only(make_lm: Any, rows: list[Example], make: Make) -> None:
    """Tasks x, y, z with two prompts each of seven: a row trains its own task's, replayed or not; inference cannot
    tell tasks apart by their names, and leaves out what nobody trained."""
    strategy = make(size=7, length=1, top=2)
    learner = begun(make_lm, strategy, "xyz")
    batch = collate([row.but(task=task) for row, task in zip(rows, "yzxzy", strict=True)], "causal_lm")
    distances = torch.rand(5, 7)
    distances[:, 6] = 0
    assert strategy.choose(distances, batch, True).tolist() == [[2, 3], [4, 5], [0, 1], [4, 5], [2, 3]]
    nearest = [sorted(sorted(range(6), key=lambda i: float(row[i]))[:2]) for row in distances]
    assert strategy.choose(distances, batch, False).tolist() == nearest
    untold = collate([row.but(task="?") for row in rows], "causal_lm")
    assert strategy.choose(distances, untold, False).tolist() == nearest
    learner.model.eval()
    assert torch.equal(
        strategy.forward(learner.model, batch).logits, strategy.forward(learner.model, untold).logits
    )
    # A fourth task finds one prompt left, and shares: nobody has used the last, and 4 least of the others.
    strategy.load_state_dict(
        {
            "tasks": list("xyzw"),
            "chosen": {"x": [9, 9, 0, 0, 0, 0, 0], "y": [0, 0, 9, 9, 0, 0, 0], "z": [0] * 4 + [1, 9, 0]},
        }
    )
    fourth = collate([rows[0].but(task="w"), rows[1].but(task="y")], "causal_lm")
    assert strategy.choose(torch.full((2, 7), 0.5), fourth, True).tolist() == [[4, 6], [2, 3]]


class Told(PromptPool):
    """Wrong: the row's task is looked at in inference."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        return super().choose(distances, batch, True)


class OfThePresentTask(PromptPool):
    """Wrong: replayed rows train the new task's prompts."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        rows = tuple(row.but(task=self.tasks[-1]) for row in batch.examples)
        return super().choose(distances, Batch(rows, batch.x, batch.y, batch.counts, 0), training)


class AmongUntrained(PromptPool):
    """Wrong: prompts that no task has trained are given at inference."""

    def choose(self, distances: Tensor, batch: Batch, training: bool) -> Tensor:
        if training:
            return super().choose(distances, batch, training)
        return distances.argsort(dim=1)[:, : self.top].sort(dim=1).values


def test_tasks_are_told_in_training_only(make_lm: Any, make_lm_rows: Any) -> None:
    check_told_in_training_only(make_lm, make_lm_rows(5), PromptPool)


@pytest.mark.parametrize("mutant", [Told, OfThePresentTask, AmongUntrained])
def test_what_is_told_wrongly_is_caught(mutant: type[PromptPool], make_lm: Any, make_lm_rows: Any) -> None:
    with pytest.raises(AssertionError):
        check_told_in_training_only(make_lm, make_lm_rows(5), mutant)


# The forward pass


def check_forward(make_lm: Any, rows: list[Example], kind: str = "llama") -> None:
    """A prompt starts as tokens of the vocabulary: the plain model on these tokens and the row's says the same."""
    strategy = PromptPool(size=6, length=3, top=2, diversity="none")
    learner = begun(make_lm, strategy, kind=kind)
    plain, model = make_lm(kind, spread=0.3).double(), learner.model
    table = plain.get_input_embeddings().weight
    tokens = [[int((table == one).all(1).nonzero()[0]) for one in prompt] for prompt in pool_of(learner).prompts]
    batch = collate(rows, "causal_lm")
    model.eval()
    with torch.no_grad():
        found = strategy.forward(model, batch).logits
        chosen = strategy.choose(pool_of(learner).distances(strategy.query(model, batch)), batch, False)
        assert len(chosen.unique(dim=0)) > 1
        for row, given, logits in zip(rows, chosen.tolist(), found, strict=True):
            assert row.x is not None
            before = torch.tensor([token for i in given for token in tokens[i]])
            expected = plain(torch.cat([before, row.x])[None]).logits[0, 6:]
            torch.testing.assert_close(logits[: len(row.x)], expected, rtol=0, atol=1e-10)


def after_the_text(self: Prompts, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: the prompts stand after the row."""
    own = prompts._picked(self.prompts, chosen).flatten(1, 2)
    inputs = torch.cat([model.get_input_embeddings()(ids), own], 1)
    logits: Tensor = model(inputs_embeds=inputs, use_cache=False).logits
    return logits[:, : ids.shape[1]]


def from_position_nought(self: Prompts, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: the text's positions begin at 0, as if nothing stood before it."""
    own = prompts._picked(self.prompts, chosen).flatten(1, 2)
    width = own.shape[1]
    places = torch.cat([torch.arange(width), torch.arange(ids.shape[1])])[None]
    inputs = torch.cat([own, model.get_input_embeddings()(ids)], 1)
    logits: Tensor = model(inputs_embeds=inputs, position_ids=places, use_cache=False).logits
    return logits[:, width:]


def the_first_logits(self: Prompts, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: the logits of the virtual tokens are taken for the text's."""
    own = prompts._picked(self.prompts, chosen).flatten(1, 2)
    inputs = torch.cat([own, model.get_input_embeddings()(ids)], 1)
    logits: Tensor = model(inputs_embeds=inputs, use_cache=False).logits
    return logits[:, : ids.shape[1]]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
def test_prompts_stand_before_the_text(kind: str, make_lm: Any, make_lm_rows: Any) -> None:
    check_forward(make_lm, make_lm_rows(8), kind)


@pytest.mark.parametrize("mutant", [after_the_text, from_position_nought, the_first_logits])
def test_misplaced_prompts_are_caught(
    mutant: Any, make_lm: Any, make_lm_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prompts, "logits", mutant)
    with pytest.raises(AssertionError):
        check_forward(make_lm, make_lm_rows(8))


def check_deep(make_lm: Any, rows: list[Example]) -> None:
    """One deep prompt is at first what the plain model keeps of its tokens, so it says what the embeddings say; two
    are put one behind the other in a cache by hand, row by row."""
    batch = collate(rows, "causal_lm")
    said = []
    for deep in (False, True):
        learner = begun(make_lm, PromptPool(size=6, length=3, top=1, deep=deep, diversity="none"))
        learner.model.eval()
        with torch.no_grad():
            said.append(learner.strategy.forward(learner.model, batch).logits)
    torch.testing.assert_close(said[1], said[0], rtol=0, atol=1e-10)

    strategy = PromptPool(size=6, length=3, top=2, deep=True, diversity="none")
    learner = begun(make_lm, strategy)
    model: Any = learner.model.eval()
    plain = make_lm("llama", spread=0.3).double()
    from transformers import DynamicCache

    with torch.no_grad():
        for prompt in pool_of(learner).prompts:
            prompt.add_(torch.randn(prompt.shape))
        found = strategy.forward(model, batch).logits
        chosen = strategy.choose(pool_of(learner).distances(strategy.query(model, batch)), batch, False)
        for row, given, logits in zip(rows, chosen.tolist(), found, strict=True):
            assert row.x is not None
            cache = DynamicCache()
            first, second = (pool_of(learner).prompts[i] for i in given)
            for layer in range(2):
                pair = [torch.cat([first[2 * layer + j], second[2 * layer + j]], 1)[None] for j in range(2)]
                cache.update(pair[0], pair[1], layer)
            places = torch.arange(6, 6 + len(row.x))[None]
            expected = plain(row.x[None], past_key_values=cache, position_ids=places).logits[0]
            torch.testing.assert_close(logits[: len(row.x)], expected, rtol=0, atol=1e-10)


def values_first(self: Prompts, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: keys and values change places."""
    swapped = copy.deepcopy(self)
    for prompt in swapped.prompts if self.deep else ():
        prompt.data = prompt.data.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return LOGITS(swapped, model, ids, chosen)


def heads_mixed(self: Prompts, model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Wrong: a prompt's heads change places."""
    swapped = copy.deepcopy(self)
    for prompt in swapped.prompts if self.deep else ():
        prompt.data = prompt.data.flip(1)
    return LOGITS(swapped, model, ids, chosen)


LOGITS = Prompts.logits


def test_deep_prompts_by_hand(make_lm: Any, make_lm_rows: Any) -> None:
    check_deep(make_lm, make_lm_rows(8))


@pytest.mark.parametrize("mutant", [values_first, heads_mixed])
def test_wrong_deep_prompts_are_caught(
    mutant: Any, make_lm: Any, make_lm_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Prompts, "logits", mutant)
    with pytest.raises(AssertionError):
        check_deep(make_lm, make_lm_rows(8))


# The loss


def test_the_pull_by_hand() -> None:
    """Query (3, 4), keys (4, 3), (0, 2) and (-3, -4): cosines 24/25, 4/5, -1; so .04 + .2 for the first two, and
    .2 + 2 for the last two."""
    pool = Prompts(torch.tensor([[4.0, 3.0], [0.0, 2.0], [-3.0, -4.0]]), torch.zeros(3, 1, 2))
    query = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    found = pool.pull(query, torch.tensor([[0, 1], [1, 2]]))
    torch.testing.assert_close(found, torch.tensor([0.24, 2.2]), rtol=0, atol=1e-12)
    torch.testing.assert_close(pool.distances(query)[0], torch.tensor([0.04, 0.2, 2.0]), rtol=0, atol=1e-12)


def check_step(make_lm: Any, rows: list[Example], make: Make, deep: bool = False) -> None:
    """Loss and gradients of a step, row by row: keys by ∂(1 − cos)/∂k = −(q/|q| − cos · k/|k|)/|k|, prompts by the
    rows' loss alone."""
    seen: dict[str, Any] = {}

    class Watched(make):  # type: ignore[misc, valid-type]
        def gradient(self, ctx: Any, batches: Any) -> None:
            seen.update({n: None if p.grad is None else p.grad.clone() for n, p in ctx.model.named_parameters()})

    strategy = Watched(size=6, length=3, top=2, pull=0.7, deep=deep, diversity="none")
    learner = begun(make_lm, strategy)
    for module in learner.model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    pool, model = copy.deepcopy(pool_of(learner)), copy.deepcopy(learner.model).eval()
    targets = sum(int((row.y[1:] >= 0).sum()) for row in rows)  # type: ignore[index]
    batch = collate(rows, "causal_lm")
    queries = strategy.query(model, batch).detach()
    chosen = strategy.choose(pool.distances(queries), batch, True).tolist()
    total = 0.0
    expected = {f"prompt_pool.keys.{i}": torch.zeros(16) for one in chosen for i in one}
    for row, query, given in zip(rows, queries, chosen, strict=True):
        single = collate([row], "causal_lm")
        logits = pool.logits(model, single.x, torch.tensor([given]))  # type: ignore[arg-type]
        loss = F.cross_entropy(logits[0, :-1], single.y[0, 1:], reduction="sum") / targets
        loss.backward()
        count = int((single.y[0, 1:] >= 0).sum())
        total += loss.item()
        for i in given:
            key = pool.keys[i].detach()
            cosine = float(key @ query / key.norm() / query.norm())
            total += 0.7 * count * (1 - cosine) / targets
            slope = -(query / query.norm() - cosine * key / key.norm()) / key.norm()
            expected[f"prompt_pool.keys.{i}"] += 0.7 * count / targets * slope
    result = learner.step(rows)
    assert result.loss == pytest.approx(total, abs=1e-11)
    for i in range(6):
        used = any(i in one for one in chosen)
        assert (seen[f"prompt_pool.keys.{i}"] is not None) == used
        if used:
            torch.testing.assert_close(
                seen[f"prompt_pool.keys.{i}"], expected[f"prompt_pool.keys.{i}"], rtol=0, atol=1e-11
            )
            torch.testing.assert_close(seen[f"prompt_pool.prompts.{i}"], pool.prompts[i].grad, rtol=0, atol=1e-10)
    assert all(value is None for name, value in seen.items() if not name.startswith("prompt_pool."))
    assert strategy.chosen == {"t": [sum(i in one for one in chosen) for i in range(6)]}


class OnceARow(PromptPool):
    """Wrong: a row counts once in the pull, and once a target in the loss."""

    def penalty(self, ctx: Any, batch: Batch, output: Any) -> Any:
        counts = tuple(1 for _ in batch.counts)
        twin = Batch(batch.examples, batch.x, batch.y, counts, batch.tokens)
        self._step[id(twin)] = self._step[id(batch)]
        return super().penalty(ctx, twin, output)


class PullsThePrompts(BehindItsPrompts):
    """Wrong: the gradient of the pull flows through the query into the prompts."""


class OnAllKeys(PromptPool):
    """Wrong: keys of prompts that were not chosen are pulled too."""

    def penalty(self, ctx: Any, batch: Batch, output: Any) -> Any:
        _, asked, chosen = self._step[id(batch)]
        each = ctx.model.prompt_pool.pull(asked, torch.arange(self.size).expand(len(chosen), -1))
        return self.pull * (each * torch.tensor(batch.counts)).sum()


@pytest.mark.parametrize("deep", [False, True])
def test_a_step_by_hand(deep: bool, make_lm: Any, make_lm_rows: Any) -> None:
    check_step(make_lm, make_lm_rows(6), PromptPool, deep)


@pytest.mark.parametrize("mutant", [OnceARow, PullsThePrompts, OnAllKeys])
def test_a_wrong_step_is_caught(mutant: type[PromptPool], make_lm: Any, make_lm_rows: Any) -> None:
    with pytest.raises(AssertionError):
        check_step(make_lm, make_lm_rows(6), mutant)


# What stays


def check_what_stays(make_lm: Any, rows: list[Example]) -> None:
    """Under AdamW with weight decay and moments carried over: the base, and in task y all prompts of task x."""
    learner = begun(
        make_lm,
        PromptPool(size=5, length=2),
        "x",
        optimizer={"lr": 0.1, "weight_decay": 0.1, "at_boundary": "continue"},
    )
    base = {n: p.clone() for n, p in learner.model.named_parameters() if not n.startswith("prompt_pool.")}
    assert base
    for _ in range(3):
        learner.step([row.but(task="x") for row in rows])
    learner.end_task()
    learner.begin_task(Task("y", ()), 1)
    old = {n: p.detach().clone() for n, p in learner.model.named_parameters()}
    for _ in range(3):
        learner.step([row.but(task="y") for row in rows])
    moved = {n for n, p in learner.model.named_parameters() if not torch.equal(p, old[n])}
    assert moved == {f"prompt_pool.{part}.{i}" for part in ("keys", "prompts") for i in (2, 3)}
    own = dict(learner.model.named_parameters())
    assert all(torch.equal(own[name], value) for name, value in base.items())


def all_together(parameters: nn.ParameterList, chosen: Tensor) -> Tensor:
    """Wrong: prompts that were not chosen get a gradient of zeros, and decay and moments move them."""
    return torch.stack(list(parameters))[chosen]


def test_the_base_and_earlier_tasks_prompts_stay(make_lm: Any, make_lm_rows: Any) -> None:
    check_what_stays(make_lm, make_lm_rows(6))


def test_prompts_that_decay_are_caught(make_lm: Any, make_lm_rows: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "_picked", all_together)
    with pytest.raises(AssertionError):
        check_what_stays(make_lm, make_lm_rows(6))


def test_usage_names_the_task_that_trains_a_prompt(make_lm: Any) -> None:
    """A key of 16 and two virtual tokens of 16: 48 weights."""
    learner = begun(make_lm, PromptPool(size=5, length=2), "xy")
    owners = ["x", "x", "y", "y", FREE]
    assert learner.strategy.usage(learner.model) == {f"prompt {i}": {who: 48} for i, who in enumerate(owners)}
    shared = begun(make_lm, PromptPool(size=5, diversity="none"), "xy")
    assert shared.strategy.usage(shared.model) == {}


@pytest.mark.parametrize("deep", [False, True])
def test_an_exported_pool_answers_as_it_did(deep: bool, make_lm: Any, make_lm_rows: Any, tmp_path: Path) -> None:
    """And the base beside it loads without a weight too many or too few."""
    from transformers import AutoModelForCausalLM

    rows = make_lm_rows(6)
    learner = begun(make_lm, PromptPool(size=5, length=2, deep=deep), "xy", optimizer={"type": "sgd", "lr": 0.5})
    learner.step(rows)
    learner.strategy.export(learner.model, tmp_path)
    assert "prompt_pool.keys.0" in dict(learner.model.named_parameters())
    again, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[what] for what in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    facts = json.loads((tmp_path / "prompt_pool.json").read_text())
    assert facts["tasks"] == ["x", "y"]
    strategy = PromptPool.load(tmp_path, again)
    batch = collate(rows, "causal_lm")
    learner.model.eval()
    with torch.no_grad():
        expected = learner.strategy.forward(learner.model, batch).logits
        torch.testing.assert_close(strategy.forward(again.eval(), batch).logits, expected, rtol=0, atol=1e-12)
    assert not any(p.requires_grad for n, p in again.named_parameters() if not n.startswith("prompt_pool."))


def test_a_run_leaves_room_for_prompts_and_ends_with_a_folder_that_loads(
    perdure: Any, recipe: Path, tmp_path: Path
) -> None:
    """The tiny recipe's model has 64 positions; top · length is 6."""
    from transformers import AutoModelForCausalLM

    from perdure.recipes.run import settings_for
    from perdure.training.plan import make_plan

    torch.set_default_dtype(torch.float32)
    given = ["strategy=prompt-pool", "continual_strategy.prompt-pool.length=3"]
    plan = make_plan(settings_for(str(recipe), {}, given)[0], recipe.parent)
    assert plan.encoder.max_length == 64 - 6
    done = perdure("run", recipe, *(part for one in given for part in ("--set", one)), "--out", tmp_path / "run")
    assert (done.code, done.err) == (0, "")
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model", output_loading_info=True)
    assert not any(found[what] for what in ("unexpected_keys", "missing_keys", "mismatched_keys"))
    done = perdure("run", recipe, "--strategy", "prompt-pool", "--set", "continual_strategy.prompt-pool.length=40",
                   "--out", tmp_path / "other")  # fmt: skip
    assert done.code == 2
    assert "80 virtual tokens, and this model has room for 56 beside 8" in " ".join(done.err.split())


def test_mixed_precision_runs(make_lm: Any, make_lm_rows: Any) -> None:
    torch.set_default_dtype(torch.float32)
    for deep in (False, True):
        learner = Learner(
            make_lm("llama"), PromptPool(size=4, deep=deep), "causal_lm",
            validate(TrainingSettings, {"precision": "bf16", "device": "cpu"}, "test"), 0,
        )  # fmt: skip
        learner.begin_task(Task("t", ()), 0)
        assert learner.step(make_lm_rows(4)).loss > 0


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("llama", {"length": 29}, "58 virtual tokens, and this model has room for 56 beside 8 of text"),
        ("lfm2", {"deep": True}, "all of whose layers attend to all tokens"),
        ("mistral", {"deep": True, "length": 3}, "all of whose layers attend to all tokens"),
    ],
)
def test_models_that_cannot_be_prompted_are_refused(
    kind: str, settings: dict[str, Any], message: str, make_lm: Any
) -> None:
    with pytest.raises(StrategyError, match=message):
        begun(make_lm, PromptPool(**settings), kind=kind)


def test_deep_prompts_and_gradient_checkpointing_are_refused(make_lm: Any) -> None:
    with pytest.raises(StrategyError, match="gradient checkpointing drops deep prompts"):
        begun(make_lm, PromptPool(deep=True), gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size"),
        ({"length": 0.5}, "length"),
        ({"top": 21}, "top must be at most size, got 21 of 20"),
        ({"pull": -1.0}, "pull"),
        ({"diversity": "tasks"}, "unknown diversity 'tasks'. Did you mean 'task'"),
        ({"keys": "normal"}, "unknown keys 'normal'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=f"prompt-pool: {message}"):
        PromptPool(**settings)
