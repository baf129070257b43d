"""Runs that are interrupted, killed, torn or out of disk: gone on with they end as if nothing had been."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from perdure.errors import NonFiniteError, RunError, StorageError
from perdure.tracking import read_events
from perdure.training.folder import FINAL, RunFolder
from perdure.training.interrupt import Interrupted
from perdure.training.plan import make_plan
from perdure.training.run import Run

BOTH = "replay+ewc"


@pytest.mark.parametrize(
    ("changes", "stop"),
    [
        ({"strategy": BOTH}, {"scoring": 1}),
        ({"strategy": BOTH}, {"step": 1}),
        ({"strategy": BOTH}, {"step": 6}),
        ({"strategy": BOTH}, {"scoring": 4}),
        ({"strategy": BOTH}, {"scoring": 5}),
        ({"strategy": BOTH}, {"step": 8}),
        ({"strategy": BOTH}, {"step": 12}),
        ({"strategy": BOTH, "tuning": "lora", "lora": {"dropout": 0.2}}, {"step": 8}),
        ({"strategy": BOTH, "tuning": "soft-prompt", "soft_prompt": {"tokens": 3}}, {"step": 8}),
        ({"strategy": "isolated", "tuning": "soft-prompt"}, {"step": 8}),
        ({"strategy": "naive", "schedule": {"type": "cosine", "at_boundary": "continue"}}, {"step": 6}),
        ({"strategy": "joint"}, {"step": 5}),
        ({"strategy": "isolated"}, {"step": 8}),
    ],
    ids=str,
)
def test_interrupted_and_gone_on_with_it_ends_the_same(
    finished: Any,
    settings: Any,
    tmp_path: Path,
    changes: dict[str, Any],
    stop: dict[str, int],
    execute: Any,
    Stop: Any,
    outcome: Any,
) -> None:
    """Scorings 1 and 2 are row 0, then the probe; 4 and 5 are tasks a and b after the first task."""
    with pytest.raises(Interrupted) as caught:
        execute(settings(**changes), tmp_path / "run", Stop(**stop))
    assert caught.value.exit_code == 130
    assert "perdure train --resume" in str(caught.value)
    execute(settings(**changes), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished(**changes))


@pytest.mark.parametrize("step", [1, 3, 5, 10])
def test_killed_it_goes_on_from_the_last_checkpoint(
    finished: Any, settings: Any, tmp_path: Path, step: int, execute: Any, Stop: Any, outcome: Any
) -> None:
    """Killed without a word, with a checkpoint every 2 steps: later lines of the log are of steps taken again."""

    def die() -> None:
        raise KeyboardInterrupt

    asked = settings(strategy=BOTH, checkpoint_every=2)
    with pytest.raises(KeyboardInterrupt):
        execute(asked, tmp_path / "run", Stop(step=step, act=die))
    execute(asked, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished(strategy=BOTH))


def test_a_second_interrupt_stops_at_once(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        execute(settings(), tmp_path / "run", Stop(step=2, act=twice))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("torn", [(FINAL,), (FINAL, "stage-001-step-00000006")], ids=["last", "all"])
def test_torn_checkpoints_are_gone_back_before(
    finished: Any, settings: Any, tmp_path: Path, torn: tuple[str, ...], execute: Any, Stop: Any, outcome: Any
) -> None:
    path = shutil.copytree(finished(strategy=BOTH), tmp_path / "run")
    for name in torn:
        (path / "checkpoints" / name / "state.safetensors").write_bytes(b"torn")
    display = Stop()
    execute(settings(strategy=BOTH), path, display)
    assert sum("going back to the one before it" in line for line in display.said) == len(torn)
    assert outcome(path) == outcome(finished(strategy=BOTH))
    assert RunFolder(path).newest()[1] == []


def test_a_full_disk_stops_it_with_its_state_intact(
    finished: Any,
    settings: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    execute: Any,
    Stop: Any,
    outcome: Any,
) -> None:
    def fill() -> None:
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", full)

    asked = settings(strategy=BOTH, checkpoint_every=2)
    with pytest.raises(StorageError, match="the disk is full"):
        execute(asked, tmp_path / "run", Stop(step=9, act=fill))
    monkeypatch.undo()
    execute(asked, tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished(strategy=BOTH))


def test_a_non_finite_loss_saves_what_was_before_it(settings: Any, tmp_path: Path, execute: Any) -> None:
    """A first update of 1e30 times the gradient makes the second loss infinite or nan."""
    asked = settings(optimizer={"type": "sgd", "lr": 1e30})
    with pytest.raises(NonFiniteError, match="step 2, task 'a'"):
        execute(asked, tmp_path / "run")
    state, _ = RunFolder(tmp_path / "run").newest()
    assert state is not None
    assert (state["learner"]["steps"], state["position"]) == (1, [0, 0, 1])


def test_nothing_to_take_up(settings: Any, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no checkpoint here that can be read"):
        Run(make_plan(settings()), RunFolder(tmp_path / "run")).load()


def test_another_machine_is_told_of(finished: Any, settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    path = shutil.copytree(finished(strategy=BOTH), tmp_path / "run")
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["recorded"]["machine"]["threads"] = 99
    config["recorded"]["versions"]["torch"] = "1.0"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    for expected in (2, 0):
        display = Stop()
        execute(settings(strategy=BOTH), path, display)
        warnings = [line for line in display.said if line.startswith("warning: ")]
        assert len(warnings) == expected
        if warnings:
            assert 'versions: torch: "1.0" there' in warnings[0]
            assert f"machine: threads: 99 there, {torch.get_num_threads()} now" in warnings[1]


def test_another_micro_batch_is_told_of_and_logged(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    path, display = tmp_path / "run", Stop()
    with pytest.raises(Interrupted):
        execute(settings(), path, Stop(step=3))
    execute(settings(micro_batch_size=1, log_every=3), path, display)
    assert [line for line in display.said if line.startswith("warning")] == [
        "warning: micro_batch_size: null there, 1 now: bit-exactness ends here, since sums are rounded "
        "otherwise, and dropout drops others"
    ]
    changes = [event for event in read_events(path / "metrics.jsonl") if event["event"] == "changed"]
    assert changes == [{"event": "changed", "step": 3, "setting": "micro_batch_size: null there, 1 now"}]


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "checkpoints"])
def test_what_is_removed_during_a_run_is_put_back(
    name: str, finished: Any, settings: Any, tmp_path: Path, execute: Any, Stop: Any, outcome: Any
) -> None:
    path = tmp_path / "run"

    def remove() -> None:
        (shutil.rmtree if name == "checkpoints" else os.remove)(path / name)

    execute(settings(strategy=BOTH), path, Stop(step=9, act=remove))
    assert outcome(path) == outcome(finished(strategy=BOTH))
    assert RunFolder(path).settings() == settings(strategy=BOTH)


def test_a_run_whose_folder_is_removed_says_so(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    path = tmp_path / "run"
    with pytest.raises(StorageError, match="the run's folder was removed while it was being trained"):
        execute(settings(), path, Stop(step=3, act=lambda: shutil.rmtree(path)))
    assert not path.exists()


def test_a_logged_change_outlives_a_kill(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    """The second run is killed before a checkpoint: its lines of the log are cut, and the change is told again."""
    path = tmp_path / "run"
    with pytest.raises(Interrupted):
        execute(settings(), path, Stop(step=3))

    def kill() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        execute(settings(micro_batch_size=1), path, Stop(step=1, act=kill))
    display = Stop()
    execute(settings(micro_batch_size=1), path, display)
    assert sum("bit-exactness ends here" in line for line in display.said) == 1
    changes = [event for event in read_events(path / "metrics.jsonl") if event["event"] == "changed"]
    assert changes == [{"event": "changed", "step": 3, "setting": "micro_batch_size: null there, 1 now"}]
    assert RunFolder(path).recorded()["changes"] == [{"step": 3, "setting": "micro_batch_size: null there, 1 now"}]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("a-test.jsonl", "task a: its held-out rows changed"),
        ("probe-test.jsonl", "the general probe: its rows changed"),
        ("model/model.safetensors", "its model.safetensors is another one now"),
        ("model/tokenizer_config.json", "its tokenizer_config.json is another one now"),
    ],
)
def test_scores_and_bases_that_would_not_compare_are_refused(
    file: str, message: str, settings: Any, tiny: Path, tmp_path: Path, execute: Any, Stop: Any
) -> None:
    world = shutil.copytree(tiny, tmp_path / "world")
    asked = settings(data=str(world), model=str(world / "model"))
    with pytest.raises(Interrupted):
        execute(asked, tmp_path / "run", Stop(step=8))
    place = world / file
    if file.endswith(".safetensors"):
        save_file({n: v * 1.5 for n, v in load_file(place).items()}, place, metadata={"format": "pt"})
    elif file.endswith(".json"):
        place.write_text(place.read_text() + "\n")
    else:
        place.write_text("".join(place.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(RunError, match=message):
        execute(asked, tmp_path / "run")


def test_going_on_does_not_score_tasks_that_have_nothing_to_score(
    settings: Any, tmp_path: Path, execute: Any, Stop: Any
) -> None:
    tasks = [{"name": name, "train": f"{name}.jsonl", "holdout": 0} for name in "ab"]
    asked = settings(stream={"tasks": tasks})
    with pytest.raises(Interrupted):
        execute(asked, tmp_path / "run", Stop(step=3))
    execute(asked, tmp_path / "run")
    assert [e for e in read_events(tmp_path / "run" / "metrics.jsonl") if e["event"] == "evaluation"] == []
