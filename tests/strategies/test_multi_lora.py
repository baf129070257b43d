"""multi-lora: each kind's adapter against a model that met that kind alone; routing; what is saved and exported."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from perdure import ContinualTrainer
from perdure.config import TrainingSettings, validate
from perdure.errors import NonFiniteError, StrategyError
from perdure.evaluation.generate import generate, generate_through
from perdure.models import objectives
from perdure.models.adapters import tune
from perdure.strategies import Chain, FreezeBottom, MultiLoRA, Naive, Replay, Strategy
from perdure.strategies.multi_lora import CHILD, Adapters
from perdure.training.learner import Learner
from perdure.types import Batch, Example, Task

ADAMW = {"optimizer": {"lr": 0.02, "weight_decay": 0.1}}
KINDS = ("math", "grid", "code")
TUNINGS: dict[str, dict[str, Any]] = {"lora": {"r": 2, "alpha": 4}, "soft-prompt": {"tokens": 2}}


@pytest.fixture(params=TUNINGS)
def make_model(request: pytest.FixtureRequest, make_lm: Callable[..., Any]) -> Callable[[], Any]:
    """The same tuned model at every call."""

    def make() -> Any:
        base = make_lm("llama", spread=0.3)
        torch.manual_seed(7)
        return tune(base, request.param, **TUNINGS[request.param])

    return make


def rows(kind: str, count: int = 4) -> list[Example]:
    """Rows whose tokens are of the kind's own third of the vocabulary; the answer is the last two."""
    place = KINDS.index(kind)
    rng = torch.Generator().manual_seed(place)
    found = []
    for i in range(count):
        ids = torch.randint(3 + 12 * place, 15 + 12 * place, (5 + i,), generator=rng)
        labels = ids.clone()
        labels[:-2] = -100
        found.append(Example(f"{kind}-{i}", kind, x=ids, y=labels))
    return found


def in_turn(count: int = 4) -> list[Example]:
    """Rows of all kinds, one after the other."""
    return [row for group in zip(*(rows(kind, count) for kind in KINDS), strict=True) for row in group]


def learner(
    model: nn.Module, strategy: Strategy | None = None, pool: Sequence[Example] = (), **more: Any
) -> Learner:
    settings = validate(TrainingSettings, {**ADAMW, **more}, "test")
    own = Learner(model, strategy or MultiLoRA(), "causal_lm", settings, 0)
    own.begin_task(Task("stream", tuple(pool)), 0)
    return own


def adapter(own: Learner, kind: str) -> dict[str, Tensor]:
    """A copy of a kind's adapter by the names in the model."""
    assert isinstance(own.strategy, MultiLoRA)
    place = own.strategy.kinds.index(kind)
    values = own.model.get_submodule(CHILD).values(own.model, place)  # type: ignore[operator]
    return {name: value.detach().clone() for name, value in values.items()}


@torch.no_grad()
def logits(own: Learner, examples: Sequence[Example]) -> Tensor:
    own.model.eval()
    return own.strategy.forward(own.model, own.collate(examples)).logits.clone()


# What is trained


def check_each_kind_is_alone(make: Callable[[], Any]) -> None:
    """One row a step, kinds in turn: each adapter is that of plain training on its kind's rows, bit by bit.

    AdamW with weight decay: in a step without its rows an adapter's moments do not fade and nothing decays.
    """
    own = learner(make(), pool=in_turn())
    for row in in_turn():
        own.step([row])
    for kind in KINDS:
        alone = learner(make(), Naive())
        for row in rows(kind):
            alone.step([row])
        wanted = {name: p for name, p in alone.model.named_parameters() if p.requires_grad}
        for name, value in adapter(own, kind).items():
            assert torch.equal(value, wanted[name]), (kind, name)


def test_each_kind_is_trained_as_if_it_were_alone(make_model: Callable[[], Any]) -> None:
    check_each_kind_is_alone(make_model)


def one_for_all(self: MultiLoRA, kind: str) -> int:
    """Wrong: all kinds share the first adapter."""
    return 0


def zero_gradients(self: MultiLoRA, ctx: Any, batches: Any) -> None:
    """Wrong: adapters without rows get gradients of zero, so that moments and decay move them."""
    for p in ctx.model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)


def from_what_it_is_now(self: Adapters, model: nn.Module, base: Any, name: str) -> Tensor:
    """Wrong: a new adapter starts as the first one is now."""
    return self.values(model, 0)[name].detach()


@pytest.mark.parametrize(
    ("owner", "method", "mutant"),
    [(MultiLoRA, "_place", one_for_all), (MultiLoRA, "gradient", zero_gradients)],
)
def test_kinds_that_reach_one_another_are_caught(
    owner: Any, method: str, mutant: Any, make_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, method, mutant)
    with pytest.raises(AssertionError):
        check_each_kind_is_alone(make_model)


def check_a_later_kind_starts_from_the_base(make: Callable[[], Any]) -> None:
    """Met in the second block, when the first has been trained."""
    own = learner(make(), pool=rows("math"))
    for _ in range(3):
        own.step(rows("math"))
    own.end_task()
    own.begin_task(Task("block 2", (*rows("grid"), *rows("math"))), 1)
    base = learner(make(), Naive())
    assert torch.equal(logits(own, rows("grid")), logits(base, rows("grid")))
    assert not torch.equal(logits(own, rows("math")), logits(base, rows("math")))


def test_a_later_kind_starts_from_the_base(make_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    check_a_later_kind_starts_from_the_base(make_model)
    monkeypatch.setattr(Adapters, "start", from_what_it_is_now)
    with pytest.raises(AssertionError):
        check_a_later_kind_starts_from_the_base(make_model)


def test_a_mixed_step_gives_each_adapter_its_own_rows_part(make_model: Callable[[], Any]) -> None:
    """The step's loss is the mean over all its targets: 2 rows of each kind, 2 targets each, so that a kind's
    gradient is half of that of its own mean. To 1e-6 of the largest."""
    own = learner(make_model(), pool=in_turn(), optimizer={"type": "sgd", "lr": 1.0})
    mixed = [row for pair in zip(rows("math", 2), rows("grid", 2), strict=True) for row in pair]
    before = {kind: adapter(own, kind) for kind in KINDS}
    result = own.step(mixed)
    assert (result.rows, result.targets) == (4, 8)
    for kind in KINDS:
        alone = learner(make_model(), Naive(), optimizer={"type": "sgd", "lr": 0.5})
        if kind != "code":
            alone.step(rows(kind, 2))
        wanted = {name: p.detach() for name, p in alone.model.named_parameters() if p.requires_grad}
        for name, value in adapter(own, kind).items():
            if kind == "code":
                assert torch.equal(value, before[kind][name])
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6 * float(wanted[name].abs().max() + 1))


def test_a_row_of_no_known_kind_is_answered_by_the_base_and_not_trained_on(make_model: Callable[[], Any]) -> None:
    pool = [*rows("math"), *rows("grid")]
    own = learner(make_model(), pool=pool)
    for row in pool:
        own.step([row])
    base = learner(make_model(), Naive())
    assert torch.equal(logits(own, rows("code")), logits(base, rows("code")))
    ids = [row.x for row in rows("code") if row.x is not None]
    with own.strategy.serving(own.model, "code") or torch.no_grad():
        served = generate(own.model, ids, 4, 39)
    assert served == generate(base.model, ids, 4, 39)
    before = copy.deepcopy(own.state_dict()["model"])
    with pytest.raises(StrategyError, match="kind 'code' is to be trained on, and no row of the task was"):
        own.step([*pool[:1], *rows("code")])
    for name, value in own.state_dict()["model"].items():
        assert torch.equal(value, before[name])


# Who is who


def features_by_hand(model: Any, row: Example) -> Tensor:
    """The mean of what the output layer takes in over the prompt's tokens, of one row alone."""
    inner, seen = model.get_base_model(), []
    handle = inner.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    assert row.x is not None
    with torch.no_grad():
        model.eval()(input_ids=row.x[None], use_cache=False)
    handle.remove()
    hidden = seen[0][0, -len(row.x) :]
    return hidden[: len(row.x) - 2].mean(0)


def check_prototypes(make: Callable[[], Any]) -> None:
    """After any number of steps the mean is over the rows trained on so far, in the model before training."""
    strategy = MultiLoRA()
    own = learner(make(), strategy, in_turn())
    base = make()
    met: dict[str, list[Tensor]] = {}
    for start in range(0, 12, 2):
        step = in_turn()[start : start + 2]
        own.step(step)
        for row in step:
            met.setdefault(row.task, []).append(features_by_hand(base, row))
        assert strategy.prototypes.means.keys() == met.keys()
        for kind, each in met.items():
            torch.testing.assert_close(
                strategy.prototypes.means[kind], torch.stack(each).mean(0), rtol=0, atol=1e-5
            )
    assert strategy.prototypes.counts == dict.fromkeys(KINDS, 4)


def test_prototypes_are_means_in_the_model_before_training(make_model: Callable[[], Any]) -> None:
    check_prototypes(make_model)


def with_adapters(self: MultiLoRA, ctx: Any, batch: Batch) -> None:
    """Wrong: features are taken in the model as it is now, which changes from step to step."""
    from perdure.strategies.identity import by_task
    from perdure.strategies.nearest import features

    found = features(ctx.model, batch, ctx.objective)
    for kind, places in by_task(batch).items():
        self.prototypes.add(kind, found[places])


def the_newest(self: Any, task: str, found: Tensor) -> None:
    """Wrong: the newest step's mean."""
    self.means[task] = found.mean(0)
    self.counts[task] = self.counts.get(task, 0) + len(found)


def test_other_prototypes_are_caught(make_model: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for path, mutant in (
        ("perdure.strategies.multi_lora.MultiLoRA._take_in", with_adapters),
        ("perdure.strategies.nearest.Prototypes.add", the_newest),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(path, mutant)
            with pytest.raises(AssertionError):
                check_prototypes(make_model)


def test_the_kind_is_that_of_the_nearest_prototype(make_model: Callable[[], Any]) -> None:
    """By hand, row by row: the largest cosine with a mean, seen from their centre. Labels do not matter."""
    strategy = MultiLoRA()
    own = learner(make_model(), strategy, in_turn())
    for row in in_turn(2):
        own.step([row])
    means = torch.stack([strategy.prototypes.means[kind] for kind in KINDS])
    centre, base = means.mean(0), make_model()
    fresh = [row.but(task="?", key=f"new{i}") for i, row in enumerate(in_turn(6))]
    wanted = []
    for row in fresh:
        seen = features_by_hand(base, row) - centre
        wanted.append(KINDS[int(torch.cosine_similarity(means - centre, seen[None]).argmax())])
    assert len(set(wanted)) == 3
    assert [row.task for row in own.identified(fresh)] == wanted
    others = [row.but(y=torch.where(row.y == -100, row.y, 5)) for row in fresh if row.y is not None]
    assert [row.task for row in own.identified(others)] == wanted


def test_kinds_that_look_different_are_told_apart_mid_stream(make_model: Callable[[], Any]) -> None:
    """Prompts of one repeated token a kind, of lengths that were never met."""
    words = dict(zip(KINDS, (5, 17, 29), strict=True))

    def row(kind: str, length: int) -> Example:
        ids = torch.full((length,), words[kind])
        labels = torch.where(torch.arange(length) < length - 2, -100, ids)
        return Example(f"{kind}-{length}", kind, x=ids, y=labels)

    own = learner(make_model(), pool=[row(kind, 6) for kind in KINDS])
    for length in (6, 8):
        for kind in KINDS:
            own.step([row(kind, length)])
    held = [row(kind, length) for kind in KINDS for length in (7, 9)]
    assert [r.task for r in own.identified([r.but(task="?") for r in held])] == [r.task for r in held]
    scores = own.score_both(held)
    assert scores["loss_inferred"] == scores["loss"]


def test_replayed_rows_are_not_counted_twice(make_model: Callable[[], Any]) -> None:
    strategy = MultiLoRA()
    own = learner(make_model(), Chain([strategy, Replay(capacity=8, offer="step")]), in_turn())
    replayed = sum(own.step([row]).replayed_rows for row in in_turn())
    assert replayed == 11
    assert strategy.prototypes.counts == dict.fromkeys(KINDS, 4)


def test_the_surest_adapter_names_the_kind(make_model: Callable[[], Any]) -> None:
    """Nothing is kept for it. By brute force: entropies of the first answer token under each adapter."""
    strategy = MultiLoRA("surest")
    own = learner(make_model(), strategy, in_turn())
    for row in in_turn():
        own.step([row])
    assert strategy.prototypes.means == {}
    chosen = [row.task for row in own.identified([row.but(task="?") for row in in_turn()])]
    for row, kind in zip(in_turn(), chosen, strict=True):
        first = [logits(own, [row.but(task=k)])[0, len(row.x) - 3].softmax(-1) for k in KINDS]
        entropies = [float(-(p * p.log()).sum()) for p in first]
        assert kind == KINDS[min(range(3), key=entropies.__getitem__)]


# Generation, saving, export


def test_generation_with_a_cache_is_that_of_the_forward_pass(make_model: Callable[[], Any]) -> None:
    own = learner(make_model(), pool=in_turn())
    for row in in_turn():
        own.step([row])
    before = {name: p.detach().clone() for name, p in own.model.named_parameters()}
    for kind in KINDS:
        prompts = [row.but(x=row.x[:-2], y=torch.full_like(row.x[:-2], -100)) for row in rows(kind)]
        with own.strategy.serving(own.model, kind) or torch.no_grad():
            found = generate(own.model, [row.x for row in prompts if row.x is not None], 5, 39)
        assert found == generate_through(own.strategy.forward, own.collate, own.model, prompts, 5, 39)
    for name, p in own.model.named_parameters():
        assert torch.equal(p, before[name])


def test_a_resumed_stream_ends_the_same(make_model: Callable[[], Any]) -> None:
    """In the middle of a second block, which brought a kind; rows known when it is begun again, or not."""
    own = learner(make_model(), pool=[*rows("math"), *rows("grid")])
    for row in (*rows("math"), *rows("grid")):
        own.step([row])
    own.end_task()
    second = (*rows("code"), *rows("math"))
    own.begin_task(Task("two", second), 1)
    for row in second[:3]:
        own.step([row])
    saved = copy.deepcopy(own.state_dict())
    ends = [own]
    for known in (True, False):
        other = learner(make_model(), pool=[*rows("math"), *rows("grid")] if known else ())
        other.begin_task(Task("two", second if known else ()), 1, resuming=True)
        other.load_state_dict(copy.deepcopy(saved))
        ends.append(other)
    for each in ends:
        torch.set_rng_state(saved["rng"]["torch"])
        for row in second[3:]:
            each.step([row])
    state = ends[0].state_dict()
    for other in ends[1:]:
        found = other.state_dict()
        assert found["model"].keys() == state["model"].keys()
        for name, value in state["model"].items():
            assert torch.equal(value, found["model"][name]), name
        assert found["optimizer"].keys() == state["optimizer"].keys()
        for key in ("kinds", "known"):
            assert found["strategy"][key] == state["strategy"][key]
        for kind, mean in state["strategy"]["prototypes"]["means"].items():
            assert torch.equal(mean, found["strategy"]["prototypes"]["means"][kind])


def test_a_saved_trainer_goes_on(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    def model() -> Any:
        torch.manual_seed(7)
        return tune(make_lm("llama", spread=0.3), "lora", r=2, alpha=4)

    trainer = ContinualTrainer(model(), MultiLoRA(), ADAMW, "causal_lm")
    for i, kind in enumerate(KINDS[:2]):
        trainer.train_task(rows(kind), rows(kind), i)
    trainer.save(tmp_path / "saved")
    again = ContinualTrainer.load(tmp_path / "saved", model())
    for one in (trainer, again):
        torch.manual_seed(3)
        one.train_task(rows("code"), rows("code"), 2)
    assert isinstance(again.strategy, MultiLoRA)
    assert len(again.strategy.kinds) == 3
    for ours, theirs in zip(trainer.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_each_kind_is_exported_as_peft_loads_it(make_lm: Callable[..., Any], tmp_path: Path) -> None:
    from peft import PeftModel

    for tuning, settings in TUNINGS.items():
        torch.manual_seed(7)
        odd = [row.but(task="odd/kind ü") if row.task == "code" else row for row in in_turn()]
        own = learner(tune(make_lm("llama", spread=0.3), tuning, **settings), pool=odd)  # type: ignore[arg-type]
        for row in odd:
            own.step([row])
        folder = tmp_path / tuning
        own.strategy.export(own.model, folder)
        facts = json.loads((folder / "multi_lora.json").read_text())
        assert facts["kinds"] == {"math": "1-math", "grid": "2-grid", "odd/kind ü": "3-odd-kind-"}
        for kind, name in facts["kinds"].items():
            again = PeftModel.from_pretrained(make_lm("llama", spread=0.3), folder / name).eval()
            own_rows = [row for row in odd if row.task == kind]
            with torch.no_grad():
                assert torch.equal(objectives.forward(again, own.collate(own_rows)).logits, logits(own, own_rows))


def test_usage_counts_every_trained_weight_once(make_model: Callable[[], Any]) -> None:
    own = learner(make_model(), pool=in_turn())
    found = own.strategy.usage(own.model)
    assert all(set(layer) == set(KINDS) for layer in found.values())
    total = sum(p.numel() for p in own.model.parameters() if p.requires_grad)
    assert sum(size for layer in found.values() for size in layer.values()) == total


# What is refused, and what may fail


def test_what_has_no_adapter_is_refused(make_lm: Callable[..., Any], make_mlp: Callable[..., Any]) -> None:
    with pytest.raises(StrategyError, match="unknown infer 'told'"):
        MultiLoRA("told")  # type: ignore[arg-type]
    with pytest.raises(StrategyError, match=r"has no adapter.* tune LoRA or a soft prompt"):
        learner(make_lm("llama"))
    with pytest.raises(StrategyError, match="has no adapter"):
        MultiLoRA().check(make_mlp(), "classification")
    own = learner(tune(make_lm("llama"), "lora"), pool=in_turn())
    with pytest.raises(StrategyError, match="give a fresh model"):
        learner(own.model)
    with pytest.raises(StrategyError, match="decides alone on what is trained"):
        Chain([MultiLoRA(), FreezeBottom()])
    with pytest.raises(StrategyError, match="gradient_checkpointing and compile"):
        learner(tune(make_lm("llama"), "lora"), gradient_checkpointing=True)


def test_a_task_that_failed_is_begun_again_with_other_kinds(make_lm: Callable[..., Any]) -> None:
    own = learner(tune(make_lm("llama", spread=0.3), "lora", r=2), pool=rows("math"))
    own.step(rows("math"))
    kept = adapter(own, "math")
    own.begin_task(Task("two", rows("grid")), 1)
    spoilt = own.model.register_forward_hook(_nan)
    with pytest.raises(NonFiniteError):
        own.step(rows("math"))
    spoilt.remove()
    own.begin_task(Task("two", rows("code")), 1)
    assert isinstance(own.strategy, MultiLoRA)
    assert own.strategy.kinds == ["math", "code"]
    assert len(own.model.get_submodule(CHILD)) == 2  # type: ignore[arg-type]
    own.step(rows("code"))
    for name, value in adapter(own, "math").items():
        assert torch.equal(value, kept[name])


def _nan(module: nn.Module, inputs: Any, output: Any) -> Any:
    output.logits = output.logits * torch.nan
    return output


def test_kinds_trained_elsewhere_are_taken_in_at_the_end(make_model: Callable[[], Any]) -> None:
    """As after the first stage of a branch, of which it saw no step; what it saw is not counted again."""
    whole, part = MultiLoRA(), MultiLoRA()
    own = learner(make_model(), whole, in_turn())
    for row in in_turn():
        own.step([row])
    own.end_task()
    assert whole.prototypes.counts == dict.fromkeys(KINDS, 4)
    learner(make_model(), part, in_turn()).end_task()
    for kind in KINDS:
        torch.testing.assert_close(part.prototypes.means[kind], whole.prototypes.means[kind], rtol=0, atol=1e-5)
