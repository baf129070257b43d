"""What callbacks are told, when, and what happens when one of them raises."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from perdure import ContinualTrainer
from perdure.callbacks import Callback
from perdure.errors import ConfigError, NonFiniteError, UsageError
from perdure.strategies import EWC, Chain, Replay
from perdure.training import checkpoint

CONFIG = {"optimizer": {"type": "adam", "lr": 0.02}, "batch_size": 8}


class Notes(Callback):
    """Notes everything."""

    def __init__(self) -> None:
        self.begun: list[Mapping[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self.ended: list[tuple[Mapping[str, Any], list[str]]] = []

    def begin(self, facts: Mapping[str, Any]) -> None:
        self.begun.append(facts)

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        self.events.append({"event": name, **values})

    def end(self, results: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        self.ended.append((results, [path.name for path in files]))

    @property
    def names(self) -> list[str]:
        return [event["event"] for event in self.events]


class Tripwire(Callback):
    """Raises at the n-th event of a name; "begin" and "end" too."""

    def __init__(self, at: str, times: int = 1) -> None:
        self.at, self.left = at, times

    def _step_on(self, what: str) -> None:
        self.left -= what == self.at
        if what == self.at and self.left == 0:
            raise OSError(f"at {what}")

    def begin(self, facts: Mapping[str, Any]) -> None:
        self._step_on("begin")

    def event(self, name: str, values: Mapping[str, Any]) -> None:
        self._step_on(name)

    def end(self, results: Mapping[str, Any], files: Sequence[Path] = ()) -> None:
        self._step_on("end")


def test_callbacks_are_told_what_the_log_holds(make_mlp: Any, tmp_path: Path, trained: Any) -> None:
    """Two tasks of 4 epochs of 3 steps; the task's own row before it, and from the second on row 0 too."""
    notes = Notes()
    trainer = ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, output_dir=tmp_path / "out", callbacks=[notes])
    assert notes.begun == []
    with trainer as entered:
        assert entered is trainer
        trained(trainer)
        assert notes.ended == []
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert notes.events == [json.loads(line) for line in lines]
    epoch = ["step"] * 3 + ["epoch"]
    assert notes.names == [
        *["task", "evaluation", *epoch * 4, "evaluation", "drift", "task_end"],
        *["task", "evaluation", "evaluation", *epoch * 4, "evaluation", "evaluation", "drift", "task_end"],
    ]
    begun, end = notes.events[0], notes.events[-1]
    assert begun == {
        "event": "task", "step": 0, "task": "task_0", "stage": 1, "rows": 24, "held_out_rows": 16,
        "phases": [{"phase": "train", "epochs": 4}],
    }  # fmt: skip
    assert end["phases"] == [{"phase": "train", "epochs": 4, "kept": 4}]
    epochs = [event for event in notes.events if event["event"] == "epoch"]
    assert [(e["task"], e["stage"], e["epoch"], e["step"]) for e in epochs] == [
        (f"task_{i}", i + 1, e, 12 * i + 3 * (e + 1)) for i in range(2) for e in range(4)
    ]
    steps = [event["loss"] for event in notes.events if event["event"] == "step"]
    assert [e["train_loss"] for e in epochs] == pytest.approx([sum(steps[i : i + 3]) / 3 for i in range(0, 24, 3)])
    assert {(str(e["metrics"]), e["best"], e["back_to"]) for e in epochs} == {("{}", None, None)}


def test_it_begins_once_with_the_facts_and_ends_once_with_the_results(
    make_mlp: Any, tmp_path: Path, trained: Any
) -> None:
    notes = Notes()
    strategy = Chain([Replay(capacity=9), EWC(strength=2.0)])
    out = tmp_path / "out"
    trainer = trained(ContinualTrainer(make_mlp(5, 2), strategy, CONFIG, output_dir=out, seed=3, callbacks=[notes]))
    trainer.close()
    trainer.close()
    ((facts,), ((results, files),)) = notes.begun, notes.ended
    assert {key: facts[key] for key in ("name", "folder", "strategy", "model", "objective", "seed", "tasks")} == {
        "name": "out", "folder": str(out), "strategy": "replay+ewc", "model": "Sequential",
        "objective": "classification", "seed": 3, "tasks": [],
    }  # fmt: skip
    assert facts["settings"]["optimizer"]["lr"] == 0.02
    assert facts["settings"]["continual_strategy"]["ewc"]["strength"] == 2.0
    json.dumps(facts, allow_nan=False)
    assert results == json.loads((out / "results.json").read_text())
    assert (results["strategy"], results["finished"]) == ("replay+ewc", True)
    assert files == ["metrics.jsonl", "results.json", "scores.csv", "scores_loss.csv"]


def test_without_an_output_folder_they_hear_the_same(make_mlp: Any, tmp_path: Path, trained: Any) -> None:
    heard = []
    for out in (tmp_path / "out", None):
        notes = Notes()
        with ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, output_dir=out, callbacks=[notes]) as trainer:
            trained(trainer)
        ((results, files),) = notes.ended
        assert bool(files) is (out is not None)
        for event in notes.events:
            event.pop("tokens_per_second", None)
        heard.append((notes.events, {**results, "name": "", "seconds": 0}))
    assert heard[0] == heard[1]


def test_on_methods_get_the_values(make_mlp: Any, loaders: Any) -> None:
    class Own(Callback):
        def __init__(self) -> None:
            self.seen: list[tuple[int, str, float]] = []

        def on_evaluation(self, row: int, task: str, metrics: Mapping[str, float], **rest: Any) -> None:
            self.seen.append((row, task, metrics["accuracy"]))

    own = Own()
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG, callbacks=(own,))
    trainer.train_task(*loaders(0))
    R = trainer.scores.values
    assert own.seen == [(0, "task_0", R[0, 0]), (1, "task_0", R[1, 0])]


def test_epochs_are_scored_where_that_is_asked_for(make_mlp: Any, loaders: Any, same: Any) -> None:
    """It changes nothing of the training; a task without held-out rows is trained without scores."""
    trainers = []
    for asked in (True, False):
        notes = Notes()
        trainer = ContinualTrainer(make_mlp(5, 2), config={**CONFIG, "score_epochs": asked}, callbacks=[notes])
        found = trainer.train_task(*loaders(0), num_epochs=3)
        epochs = [event["metrics"] for event in notes.events if event["event"] == "epoch"]
        assert epochs[-1] == (found if asked else {})
        assert len({str(metrics) for metrics in epochs}) == (3 if asked else 1)
        trainer.train_task(loaders(1)[0], task_id=1)
        assert notes.events[-4]["event"] == "epoch"
        assert notes.events[-4]["metrics"] == {}
        trainers.append(trainer)
    assert same(*trainers)


def test_an_error_at_a_step_loses_nothing(make_mlp: Any, tmp_path: Path, loaders: Any, trained: Any) -> None:
    """The fifth step of the second task was taken and logged; all other callbacks hear of it; R is as before."""
    notes, out = Notes(), tmp_path / "out"
    trainer = ContinualTrainer(
        make_mlp(5, 2), EWC(), CONFIG, output_dir=out, callbacks=[Tripwire("step", 12 + 5), notes]
    )
    trained(trainer, 0, 1)
    R = trainer.scores.values
    with pytest.raises(OSError, match="at step"):
        trainer.train_task(*loaders(1), task_id=1, num_epochs=4)
    assert trainer.learner.steps == 17
    assert notes.events[-1]["event"] == "step"
    assert notes.events[-1]["step"] == 17
    assert json.loads((out / "metrics.jsonl").read_text().splitlines()[-1]) == notes.events[-1]
    assert trainer.scores.values.tolist() == R.tolist()

    other = ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, callbacks=[Tripwire("epoch", 4 + 2)])
    trained(other, 0, 1)
    with pytest.raises(OSError, match="at epoch"):
        other.train_task(*loaders(1), task_id=1, num_epochs=4)
    assert other.learner.steps == 18  # one more: the epoch's last
    assert not torch.equal(other.model[0].weight, trainer.model[0].weight)
    trainer.train_task(*loaders(1), task_id=1, num_epochs=4)  # the wire is broken; the task is trained anew
    assert trainer.tasks == ["task_0", "task_1"]
    assert trainer.scores.values.shape == (3, 2)


@pytest.mark.parametrize("at", ["evaluation", "task_end"])
def test_an_error_after_the_training_leaves_the_task_trained(
    make_mlp: Any, tmp_path: Path, trained: Any, same: Any, at: str
) -> None:
    """Scores, files and checkpoint are there, and are those of a training that nobody listened to."""
    notes, out = Notes(), tmp_path / "out"
    wire = Tripwire(at, 2 if at == "evaluation" else 1)
    trainer = ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG, output_dir=out, callbacks=[wire, notes])
    with pytest.raises(OSError, match=f"at {at}"):
        trained(trainer, 0, 1)
    assert notes.names[-3:] == ["evaluation", "drift", "task_end"]
    quiet = trained(ContinualTrainer(make_mlp(5, 2), EWC(), CONFIG), 0, 1)
    assert same(trainer, quiet)
    assert json.loads((out / "results.json").read_text())["tasks"] == ["task_0"]
    state = checkpoint.load(out / "checkpoints" / "task-001")["learner"]
    assert torch.equal(state["model"]["0.weight"], trainer.model[0].weight)
    assert same(trained(trainer, 1, 2), trained(quiet, 1, 2))


def test_an_error_at_the_beginning_trains_nothing(make_mlp: Any, loaders: Any) -> None:
    """Who had begun already does not begin again."""
    first, last = Notes(), Notes()
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG, callbacks=[first, Tripwire("begin"), last])
    with pytest.raises(OSError, match="at begin"):
        trainer.train_task(*loaders(0))
    assert (trainer.learner.steps, trainer.tasks, first.names, last.begun) == (0, [], [], [])
    trainer.train_task(*loaders(0))
    assert (len(first.begun), len(last.begun)) == (1, 1)
    assert first.names == last.names


def test_an_error_at_the_end_lets_the_others_end(make_mlp: Any, loaders: Any) -> None:
    notes = Notes()
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG, callbacks=[Tripwire("end"), notes])
    trainer.train_task(*loaders(0))
    with pytest.raises(OSError, match="at end"):
        trainer.close()
    trainer.close()
    assert len(notes.ended) == 1


def test_an_error_within_the_block_comes_out_and_callbacks_end(make_mlp: Any, loaders: Any) -> None:
    """Results say that it is not finished; an error of a callback then does not hide the first one."""
    notes = Notes()
    x, y = next(iter(loaders(1)[0]))
    spoilt = [(row * torch.nan, int(label)) for row, label in zip(x, y, strict=True)]

    def train() -> None:
        with ContinualTrainer(make_mlp(5, 2), config=CONFIG, callbacks=[Tripwire("end"), notes]) as trainer:
            trainer.train_task(*loaders(0))
            trainer.train_task(spoilt, task_id=1)

    with pytest.raises(NonFiniteError) as caught:
        train()
    assert caught.value.__notes__ == ["A callback could not end either: OSError('at end')"]
    ((results, _),) = notes.ended
    assert (results["finished"], results["tasks"]) == (False, ["task_0"])


def test_after_close_nothing_is_trained_but_all_else_goes_on(make_mlp: Any, loaders: Any, tmp_path: Path) -> None:
    notes = Notes()
    trainer = ContinualTrainer(make_mlp(5, 2), config=CONFIG, callbacks=[notes])
    trainer.train_task(*loaders(0))
    trainer.close()
    with pytest.raises(UsageError, match="was closed; train all tasks first"):
        trainer.train_task(*loaders(1), task_id=1)
    assert trainer.evaluate(loaders(0)[1])["loss"] == trainer.matrices["loss"].values[1, 0]
    again = ContinualTrainer.load(trainer.save(tmp_path / "saved"), make_mlp(5, 2), callbacks=[notes])
    again.train_task(*loaders(1), task_id=1)
    assert [facts["tasks"] for facts in notes.begun] == [[], ["task_0"]]


def test_who_never_trained_is_told_nothing(make_mlp: Any) -> None:
    notes = Notes()
    with ContinualTrainer(make_mlp(), callbacks=[notes]):
        pass
    assert (notes.begun, notes.events, notes.ended) == ([], [], [])


def test_what_is_no_callback_is_refused() -> None:
    for wrong in (print, Notes):
        with pytest.raises(ConfigError, match=r"callbacks must be perdure\.callbacks\.Callback objects, got"):
            ContinualTrainer(nn.Linear(2, 2), callbacks=[wrong])  # type: ignore[list-item]


def test_skipped_steps_are_told(make_mlp: Any) -> None:
    """The second of three batches is left out; the epoch's loss is the mean of the others'."""
    notes = Notes()
    rows = [(torch.full((5,), torch.nan if i in (2, 3) else 1.0), i % 2) for i in range(6)]
    config = {"batch_size": 2, "skip_bad_batches": True}
    trainer = ContinualTrainer(make_mlp(5, 2), config=config, callbacks=[notes])
    loader = torch.utils.data.DataLoader(rows, batch_size=2)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="step 2, task 'task_0'") as caught:
        trainer.train_task(loader)
    assert caught[0].filename == __file__
    assert notes.names == ["task", "step", "skipped", "step", "epoch", "drift", "task_end"]
    losses = [event["loss"] for event in notes.events if event["event"] == "step"]
    assert notes.events[4]["train_loss"] == pytest.approx(sum(losses) / 2)
