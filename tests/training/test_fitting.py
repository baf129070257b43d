"""Out of memory: the state before the step is saved, what would fit is found by trying, and the run goes on."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.models import objectives
from perdure.training.fitting import Fits, OutOfMemory, ran_out, what_fits
from perdure.training.folder import RunFolder
from perdure.training.plan import make_plan
from perdure.training.run import Run


def small_device(monkeypatch: pytest.MonkeyPatch, most: int, after: int = 0) -> None:
    """A device that holds at most so many padded tokens of a training batch, from the n-th forward pass on."""
    forward, passes = objectives.forward, [0]

    def limited(model: Any, batch: Any) -> Any:
        passes[0] += model.training
        if model.training and passes[0] > after and batch.y.numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch)

    monkeypatch.setattr(objectives, "forward", limited)


def test_what_ran_out_is_told_apart() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert ran_out(caught.value)
    assert ran_out(MemoryError())
    assert ran_out(torch.OutOfMemoryError("full"))
    assert not ran_out(RuntimeError("shapes differ"))


def test_it_saves_says_what_fits_and_goes_on(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Any
) -> None:
    """Rows of 5 tokens, four at a time: 20; a device of 12 takes two. Both runs take the same effective batches."""
    folder = RunFolder(tmp_path / "run")
    changes = {"batch_size": 4, "epochs": 3}
    small_device(monkeypatch, 12, after=2)
    with pytest.raises(OutOfMemory) as caught:
        Run(make_plan(settings(**changes)), folder, again="perdure train").execute()
    message = str(caught.value)
    assert message.startswith("out of memory at step 3: 4 rows of up to 5 tokens")
    assert "micro_batch_size: 2" in message
    assert message.endswith("goes on with: perdure train --resume --set micro_batch_size=2")
    assert [path.name for path in folder.saved()] == ["step-00000002"]
    results = Run(make_plan(settings(**changes, micro_batch_size=2)), folder, again="perdure train").execute()
    monkeypatch.undo()
    whole = Run(make_plan(settings(**changes)), RunFolder(tmp_path / "whole")).execute()
    assert results is not None
    assert whole is not None
    assert results["steps"] == whole["steps"]
    for row, other in zip(results["scores"]["loss"]["values"], whole["scores"]["loss"]["values"], strict=True):
        assert row == pytest.approx(other, rel=1e-4)


def test_the_failed_step_is_let_go_of_before_anything_is_tried(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error's traceback holds the step's graph: while it lives, trying would find the memory full."""
    made: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    forward = objectives.forward

    def watched(model: Any, batch: Any) -> Any:
        output = forward(model, batch)
        if model.training:
            made.append(weakref.ref(output.logits))
        return output

    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def look(learner: Any, rows: Any) -> Fits:
        alive.append(made[-1]() is not None)
        return Fits(2, 5, 1, None, None)

    monkeypatch.setattr(objectives, "forward", watched)
    monkeypatch.setattr("perdure.training.run.what_fits", look)
    run = Run(make_plan(settings()), RunFolder(tmp_path / "run"))
    monkeypatch.setattr(run.learner.accelerator, "backward", fails)
    with pytest.raises(OutOfMemory):
        run.execute()
    assert alive == [False]


def test_an_update_that_was_begun_is_not_saved(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the third update itself: what is saved is the checkpoint before it, not a torn state."""
    folder = RunFolder(tmp_path / "run")
    run = Run(make_plan(settings(checkpoint_every=1)), folder, again="perdure train")
    step = torch.optim.AdamW.step
    count = [0]

    def fails(self: Any, *arguments: Any, **options: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", fails)
    with pytest.raises(OutOfMemory):
        run.execute()
    assert [path.name for path in folder.saved()][-1] == "step-00000002"
    monkeypatch.undo()
    resumed = Run(make_plan(settings(checkpoint_every=1)), folder).execute()
    whole = Run(make_plan(settings(checkpoint_every=1)), RunFolder(tmp_path / "whole")).execute()
    assert resumed is not None
    assert whole is not None
    assert resumed["scores"] == whole["scores"]


def test_everything_is_as_it_was(settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(settings(tuning="lora", lora={"dropout": 0.5}, batch_size=6))
    run = Run(plan, RunFolder(tmp_path / "run"))
    learner = run.learner
    learner.begin_task(plan.stages[0], 0)
    before = learner.state_dict()
    saved = {name: value.clone() for name, value in before["model"].items()}
    generator = torch.get_rng_state()
    small_device(monkeypatch, 18)
    fits = what_fits(learner, plan.stages[0].train)
    assert fits == Fits(rows=6, tokens=5, fitting_rows=3, fitting_tokens=None, checkpointing=False)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(saved[name], value) for name, value in learner.state_dict()["model"].items())
    assert all(p.grad is None for p in plan.model.parameters())
    assert not getattr(plan.language.model, "is_gradient_checkpointing", False)


def test_checkpointing_and_shorter_rows_are_tried(settings: Any, tmp_path: Path) -> None:
    """A stand-in for a device: two rows of 64 tokens fit only with checkpointing, or cut to 16 tokens."""

    own = settings(batch_size=2)

    class Device:
        settings = own
        checkpointing = False

        class model:
            supports_gradient_checkpointing = True

            @staticmethod
            def gradient_checkpointing_disable() -> None:
                Device.checkpointing = False

        def checkpoint_gradients(self) -> None:
            Device.checkpointing = True

        def fits(self, rows: Any) -> bool:
            return Device.checkpointing or sum(len(row.x) for row in rows) <= 32

    from perdure.types import Example

    rows = [Example(str(i), x=torch.arange(64), y=torch.arange(64)) for i in range(3)]
    fits = what_fits(Device(), rows)  # type: ignore[arg-type]
    assert fits == Fits(rows=2, tokens=64, fitting_rows=None, fitting_tokens=16, checkpointing=True)
    message = str(OutOfMemory(fits, 0, "perdure run x"))
    assert "gradient_checkpointing: true; max_length: 16 (other data, so a new --out)" in message
    assert "goes on with" not in message


def test_where_nothing_fits_it_says_so() -> None:
    message = str(OutOfMemory(Fits(1, 64, None, None, None), 4, "perdure run x"))
    assert "step 5" in message
    assert "not even one fits" in message
