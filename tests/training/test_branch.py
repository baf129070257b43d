"""Runs that begin where another's first stage ended, stages with epochs of their own, and losses on the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import RunError
from perdure.training.folder import RunFolder
from perdure.training.interrupt import Interrupted
from perdure.training.plan import make_plan
from perdure.training.run import Run

CHOSEN = {"strategy": "replay", "continual_strategy": {"replay": {"select": "loss_descending", "ratio": "once"}}}
CHAIN = {
    "strategy": "replay+ewc",
    "continual_strategy": {"replay": {"select": "herding", "capacity": 3}, "ewc": {"strength": 2.0}},
}


def first_stage(settings: Any, path: Path, **changes: Any) -> RunFolder:
    folder = RunFolder(path)
    assert Run(make_plan(settings(**changes)), folder, again="perdure train").execute(stages=1) is None
    return folder


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


@pytest.mark.parametrize(
    "changes", [CHOSEN, CHAIN, {"tuning": "lora", "lora": {"dropout": 0.3}, **CHOSEN}], ids=str
)
def test_adopted_it_ends_as_if_it_had_trained_all_itself(
    settings: Any, finished: Any, outcome: Any, execute: Any, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """To the bit: weights, memory, generators, scores, log; a stage under naive is that of the strategy."""
    common = {key: value for key, value in changes.items() if key in ("tuning", "lora")}
    source = first_stage(settings, tmp_path / "first", **common)
    assert not source.finished
    folder = RunFolder(tmp_path / "run")
    Run(make_plan(settings(**changes)), folder, again="perdure train").adopt(source)
    execute(settings(**changes), folder.path)
    assert outcome(folder.path) == outcome(finished(**changes))


def test_one_first_stage_serves_several(settings: Any, execute: Any, tmp_path: Path) -> None:
    source = first_stage(settings, tmp_path / "first")
    before = {p: p.read_bytes() for p in source.path.rglob("*") if p.is_file()}
    for policy in ("random", "loss_ascending"):
        changes = {"strategy": "replay", "continual_strategy": {"replay": {"select": policy, "capacity": 2}}}
        folder = RunFolder(tmp_path / policy)
        Run(make_plan(settings(**changes)), folder).adopt(source)
        assert execute(settings(**changes), folder.path)["replay"]["rows"] == 12
    assert {p: p.read_bytes() for p in source.path.rglob("*") if p.is_file()} == before


def test_another_stage_is_not_adopted(settings: Any, tmp_path: Path) -> None:
    source = first_stage(settings, tmp_path / "first")
    other = settings(stream={"tasks": [{"name": "a", "train": "c.jsonl"}, {"name": "b", "train": "b.jsonl"}]})
    with pytest.raises(RunError, match="another model or other rows"):
        Run(make_plan(other), RunFolder(tmp_path / "run")).adopt(source)
    shutil.rmtree(source.checkpoints)
    with pytest.raises(RunError):
        Run(make_plan(settings(**CHOSEN)), RunFolder(tmp_path / "run")).adopt(source)


def test_scores_of_tasks_with_other_held_out_rows_are_taken_again(
    settings: Any, execute: Any, tmp_path: Path
) -> None:
    """The second task has other held-out rows than the first stage saw: its column is measured anew."""
    source = first_stage(settings, tmp_path / "first")
    tasks = [
        {"name": "a", "train": "a.jsonl", "evaluation": "a-test.jsonl"},
        {"name": "b", "train": "b.jsonl", "evaluation": "c-test.jsonl"},
    ]
    changes = {"stream": {"tasks": tasks}, **CHOSEN}
    folder = RunFolder(tmp_path / "run")
    Run(make_plan(settings(**changes)), folder).adopt(source)
    execute(settings(**changes), folder.path)
    execute(settings(**changes), tmp_path / "whole")
    for name in ("scores.csv", "scores_loss.csv"):
        assert (folder.path / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_the_checks_can_fail(settings: Any, outcome: Any, finished: Any, execute: Any, tmp_path: Path) -> None:
    """Without the generator of the first stage the second draws other dropout masks."""
    changes = {"tuning": "lora", "lora": {"dropout": 0.3}, **CHOSEN}
    source = first_stage(settings, tmp_path / "first", tuning="lora", lora={"dropout": 0.3})
    folder = RunFolder(tmp_path / "run")
    run = Run(make_plan(settings(**changes)), folder)
    load = source.load

    def forgetful(path: Path) -> dict[str, Any]:
        state = load(path)
        state["learner"]["rng"]["torch"] = run.learner.state_dict()["rng"]["torch"]
        return state

    source.load = forgetful  # type: ignore[method-assign]
    run.adopt(source)
    execute(settings(**changes), folder.path)
    assert outcome(folder.path) != outcome(finished(**changes))


def test_tasks_have_epochs_of_their_own(settings: Any, execute: Any, tmp_path: Path) -> None:
    """Six rows in batches of two: three steps an epoch; one epoch, then the run's two."""
    tasks = [{"name": "a", "train": "a.jsonl", "epochs": 1}, {"name": "b", "train": "b.jsonl"}]
    execute(settings(stream={"tasks": tasks}), tmp_path / "run")
    steps = events(tmp_path / "run", "step")
    assert [step["task"] for step in steps] == ["a"] * 3 + ["b"] * 6


def test_losses_within_a_stage(settings: Any, execute: Any, finished: Any, outcome: Any, tmp_path: Path) -> None:
    """Six steps a stage, every second: after the second and the fourth; after the sixth it is scored anyway."""
    path = tmp_path / "run"
    execute(settings(evaluation={"every": 2}), path)
    found = [e for e in events(path, "evaluation") if "row" not in e]
    assert [(e["step"], e["stage"], e["task"]) for e in found] == [
        (step, stage, task) for step, stage in ((2, 1), (4, 1), (8, 2), (10, 2)) for task in ("a", "b")
    ]
    assert all(set(e["metrics"]) == {"loss"} for e in found)
    plain = outcome(finished())
    measured = outcome(path)
    for part in ("scores", "exported"):  # looking changes nothing
        assert measured[part] == plain[part]


def test_losses_within_a_stage_are_there_once_when_it_was_stopped(
    settings: Any, execute: Any, Stop: Any, outcome: Any, tmp_path: Path
) -> None:
    changes = {"evaluation": {"every": 2}, "tuning": "lora", "lora": {"dropout": 0.3}}
    execute(settings(**changes), tmp_path / "whole")
    with pytest.raises(Interrupted):
        execute(settings(**changes), tmp_path / "run", Stop(step=4))
    execute(settings(**changes), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_answers_may_wait_until_something_is_trained(settings: Any, execute: Any, tmp_path: Path) -> None:
    results = execute(settings(evaluation={"before_training": False}), tmp_path / "run")
    assert results["scores"]["exact_match"]["values"][0] == [None, None]
    assert None not in results["scores"]["loss"]["values"][0]
    assert None not in results["scores"]["exact_match"]["values"][1]
    assert results["probe"]["exact_match"][0] is None
