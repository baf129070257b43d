"""Each architecture that adapters are found for: a step, an export that PEFT loads, and generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.config import TrainingSettings, validate
from perdure.evaluation.generate import generate
from perdure.models import objectives
from perdure.models.adapters import tune
from perdure.strategies import Naive
from perdure.training.learner import Learner
from perdure.types import Batch, Task

from .test_adapters import KINDS

TUNED = {"lora": {"r": 2, "alpha": 4}, "soft-prompt": {"tokens": 3}}
END = 39


def base(make_lm: Any, kind: str) -> Any:
    return make_lm(kind, seed=3, spread=0.3)


@pytest.fixture(params=TUNED)
def tuning(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def trained(make_lm: Any, make_lm_rows: Callable[..., Any], kind: str, tuning: Any) -> Any:
    """A model after three steps, large enough to change what it says."""
    torch.manual_seed(0)
    model = tune(base(make_lm, kind), tuning, **TUNED[tuning])
    settings = validate(TrainingSettings, {"optimizer": {"lr": 0.3}}, "test")
    learner = Learner(model, Naive(), "causal_lm", settings, 0)
    rows = make_lm_rows(6)
    learner.begin_task(Task("t", rows), 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(3):
        assert learner.step(rows).gradient_norm > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    return model.eval()


def logits(model: Any, ids: Tensor) -> Tensor:
    """Of one row alone: [T, V]."""
    with torch.no_grad():
        return objectives.forward(model, Batch((), ids[None], ids[None], (), 0)).logits[0]


def test_an_export_is_loaded_by_peft(trained: Any, make_lm: Any, kind: str, tmp_path: Path) -> None:
    from peft import PeftModel

    trained.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(make_lm, kind), tmp_path).eval()
    ids = torch.tensor([3, 9, 27, 5, 14, 31])
    assert torch.equal(logits(again, ids), logits(trained, ids))
    assert not torch.allclose(logits(base(make_lm, kind), ids), logits(trained, ids), atol=1e-2)


def test_batched_generation_equals_one_by_one(trained: Any) -> None:
    """Against a loop by hand through the training's own forward pass, without a cache or padding."""
    rng = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 38, (length,), generator=rng) for length in (1, 9, 4, 4, 7, 2)]
    expected = []
    for prompt in prompts:
        ids = prompt
        while len(ids) < len(prompt) + 6 and (token := int(logits(trained, ids)[-1].argmax())) != END:
            ids = torch.cat([ids, torch.tensor([token])])
        expected.append(ids[len(prompt) :].tolist())
    assert len({tuple(answer) for answer in expected}) > 2
    for size in (1, 4, 64):
        assert generate(trained, prompts, 6, END, size) == expected
