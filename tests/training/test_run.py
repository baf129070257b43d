"""Runs: what their folder holds, one more task, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from perdure.config import FORMAT, validate
from perdure.errors import ConfigError, RunError, StorageError
from perdure.streams.spec import TaskSpec
from perdure.streams.stream import text_of
from perdure.training.folder import FINAL, RunFolder
from perdure.training.interrupt import Interrupted
from perdure.training.measure import Measure
from perdure.training.plan import check_strategy, make_plan, notes_on_strategy, with_capacity
from perdure.training.run import Run
from perdure.training.settings import RunSettings

BOTH = "replay+ewc"


def R(path: Path, metric: str = "loss") -> Any:
    values = json.loads((path / "results.json").read_text())["scores"][metric]["values"]
    return np.array(values, dtype=float)


def test_the_folder_of_a_run(finished: Any, tiny: Path) -> None:
    path = finished(strategy=BOTH)
    names = {
        "config.yaml",
        "metrics.jsonl",
        "scores.csv",
        "scores_loss.csv",
        "results.json",
        "model",
        "keys",
        "checkpoints",
    }
    assert {p.name for p in path.iterdir()} == names
    assert {p.name for p in (path / "checkpoints").iterdir()} == {"stage-001-step-00000006", FINAL}
    assert {p.suffix for p in (path / "checkpoints").rglob("*") if p.is_file()} == {".safetensors", ".json"}

    results = json.loads((path / "results.json").read_text())
    assert (results["format"], results["strategy"], results["seed"]) == (FORMAT, BOTH, 0)
    assert (results["tasks"], results["steps"], results["finished"]) == (["a", "b"], 12, True)
    assert results["seconds"] > 0
    for metric, higher in (("exact_match", True), ("loss", False)):
        summary = results["metrics"][metric]
        assert summary["higher_is_better"] is higher
        assert set(summary["per_task"]) == {"a", "b"}
        keys = {"average", "forgetting", "backward_transfer", "forward_transfer", "learning"}
        assert keys <= set(summary)
        assert np.isfinite(R(path, metric)).all()
        assert R(path, metric).shape == (3, 2)
        assert all(len(column) == 3 for column in results["probe"].values())
    assert np.all(np.diagonal(R(path)[1:]) < R(path)[0])

    config = yaml.safe_load((path / "config.yaml").read_text())
    assert config["format"] == FORMAT
    assert {"versions", "machine", "data"} <= set(config["recorded"])
    assert config["recorded"]["machine"]["threads"] == torch.get_num_threads()
    assert RunFolder(path).settings().model == str(tiny / "model")

    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 13))
    assert [event["replayed"] for event in steps] == [0] * 6 + [2] * 6
    assert {"task", "loss", "lr", "tokens_per_second"} <= set(steps[0])
    assert results["replay"] == {
        "rows": 12, "row_share": 12 / 24, "targets": 36, "target_share": 36 / 72,
    }  # fmt: skip


@pytest.mark.parametrize("tuning", ["lora", "soft-prompt"])
def test_the_export_loads_with_its_own_libraries(finished: Any, tiny: Path, tuning: str) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = torch.tensor([[37, 0, 9]])
    full = AutoModelForCausalLM.from_pretrained(finished(strategy="naive") / "model")
    assert AutoTokenizer.from_pretrained(finished(strategy="naive") / "model").eos_token_id == 38
    path = finished(strategy="naive", tuning=tuning)
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, path / "adapter")
    run = Run(make_plan(RunFolder(path).settings()), RunFolder(path))
    run.load()
    with torch.no_grad():
        assert torch.equal(adapted(ids).logits, run.learner.model.eval()(ids).logits)
        assert not torch.equal(adapted(ids).logits[:, -3:], plain)
        assert not torch.equal(full(ids).logits, plain)


THIRD = TaskSpec(name="c", train="c.jsonl", evaluation="c-test.jsonl")


@pytest.mark.parametrize(
    "changes", [{"strategy": BOTH, "tuning": tuning} for tuning in ("full", "lora", "soft-prompt")], ids=str
)
def test_one_more_task(
    finished: Any, settings: Any, tmp_path: Path, changes: dict[str, Any], execute: Any, Stop: Any, outcome: Any
) -> None:
    """R grows from [3, 2] to [4, 3]: old cells as they were, R[0, c] and R[2, c] measured, R[1, c] never.

    Interrupted on the way it ends the same.
    """
    asked = settings(**changes, extensions=(THIRD,))
    paths = [shutil.copytree(finished(**changes), tmp_path / name) for name in ("one", "two", "three")]
    execute(asked, paths[0])
    for metric in ("loss", "exact_match"):
        old, new = R(finished(**changes), metric), R(paths[0], metric)
        assert (old.shape, new.shape) == ((3, 2), (4, 3))
        assert np.array_equal(new[:3, :2], old)
        assert np.isnan(new[:, 2]).tolist() == [False, True, False, False]
        assert np.isfinite(new[3]).all()
    before = Run(make_plan(settings(**changes)), RunFolder(finished(**changes)))
    rows = make_plan(asked).stream["c"].evaluation
    assert before.learner.score(rows)["loss"] == R(paths[0])[0, 2]
    before.load()
    assert before.learner.score(rows)["loss"] == R(paths[0])[2, 2]
    assert (paths[0] / "scores.csv").read_text().splitlines()[0] == "after,a,b,c"
    for path, stop in zip(paths[1:], ({"step": 3}, {"scoring": 2}), strict=True):
        with pytest.raises(Interrupted):
            execute(asked, path, Stop(**stop))
        execute(asked, path)
        assert outcome(path) == outcome(paths[0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": {"lr": 0.02}}, ["optimizer.lr: 0.01 there, 0.02 now"]),
        (
            {"batch_size": 3, "seed": 1, "strategy": "naive"},
            ["batch_size: 2 there, 3 now", "seed: 0 there, 1 now", f'strategy: "{BOTH}" there, "naive" now'],
        ),
        (
            {"continual_strategy": {"replay": {"capacity": 5}}},
            ["replay.capacity: 4 there, 5 now"],
        ),
    ],
)
def test_other_settings_are_refused_with_the_differences(
    finished: Any, settings: Any, changes: dict[str, Any], words: list[str], execute: Any
) -> None:
    path = finished(strategy=BOTH)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    with pytest.raises(RunError) as caught:
        execute(settings(**{"strategy": BOTH, **changes}), path)
    assert all(word in str(caught.value) for word in [*words, "config.yaml", "in another folder"])
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


def test_other_data_are_refused(finished: Any, settings: Any, tiny: Path, tmp_path: Path, execute: Any) -> None:
    path = shutil.copytree(finished(strategy=BOTH), tmp_path / "run")
    data = shutil.copytree(tiny, tmp_path / "data")
    execute(settings(strategy=BOTH, data=str(data), log_every=3, micro_batch_size=1), path)
    lines = (data / "b.jsonl").read_text().splitlines()
    (data / "b.jsonl").write_text("\n".join([*lines[:-1], lines[-1].replace("w5", "w6")]))
    with pytest.raises(RunError, match="task b: its training rows changed"):
        execute(settings(strategy=BOTH, data=str(data)), path)


def test_joint_and_isolated_have_one_row_after_the_first(finished: Any) -> None:
    for mode, stages in (("joint", ["joint"]), ("isolated", ["a", "b"])):
        path = finished(strategy=mode)
        results = json.loads((path / "results.json").read_text())
        assert results["stages"] == stages
        assert R(path).shape == (2, 2)
        assert np.isfinite(R(path)).all()
        assert np.all(R(path)[1] < R(path)[0])


def task(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "train": f"{name}.jsonl", "evaluation": f"{name}-test.jsonl", **changes}


@pytest.mark.parametrize(
    ("first", "metric"),
    [
        ({"name": "a", "train": "a.jsonl", "holdout": 0}, "loss"),
        (task("a", template=[{"text": "{prompt}{answer}", "learn": True}]), "exact_match"),
    ],
    ids=["no held-out rows", "plain text"],
)
def test_a_task_without_the_metric_keeps_its_place(
    settings: Any, tmp_path: Path, first: Any, metric: str, execute: Any
) -> None:
    """Task b is learnt in row 2 whether or not task a has a score: its column must not take over a's row."""
    results = execute(settings(stream={"tasks": [first, task("b")]}), tmp_path / "run")
    found = results["scores"][metric]
    assert (found["tasks"], found["stages"]) == (["a", "b"], ["a", "b"])
    values = np.array(found["values"], dtype=float)
    assert np.isnan(values[:, 0]).all()
    assert results["metrics"][metric]["per_task"]["b"]["learnt"] == values[2, 1]
    assert results["metrics"]["loss"]["per_task"]["b"]["learnt"] < results["scores"]["loss"]["values"][1][1]


@pytest.mark.parametrize("strategy", ["naive", "joint", "isolated"])
def test_a_metric_of_one_task_alone(
    settings: Any, tmp_path: Path, strategy: str, execute: Any, Stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Task b is scored by HotpotQA's rule: a matrix of F1 with a column for task a too, empty; also when resumed.

    Every answer is "w5 w20 w9" against references "w5 w20", "w5 w21" and "w5 w22". Two words of three and two are
    in common with the first, one with the others: F1 = 4/5, 2/5, 2/5, mean 8/15. None is right, so the main metric
    is exact match at 0.
    """
    monkeypatch.setattr(Measure, "answers", lambda self, prompts, longest: ["w5 w20 w9"] * len(prompts))
    tasks = [task("a", answers="math"), task("b", answers="hotpot")]
    asked = settings(strategy=strategy, stream={"tasks": tasks})
    with pytest.raises(Interrupted):
        execute(asked, tmp_path / "run", Stop(step=5))
    results = execute(asked, tmp_path / "run")
    assert results["main_metric"] == "exact_match"
    assert list(results["scores"]) == ["loss", "exact_match", "f1"]
    found = results["scores"]["f1"]
    values = np.array(found["values"], dtype=float)
    assert (found["tasks"], values.shape) == (["a", "b"], (3, 2) if strategy == "naive" else (2, 2))
    assert np.isnan(values[:, 0]).all()
    assert values[:, 1] == pytest.approx(8 / 15)
    summary = results["metrics"]["f1"]
    assert (summary["average"], summary["learning"]) == (pytest.approx(8 / 15), pytest.approx(8 / 15))
    assert summary["forgetting"] is None
    assert results["metrics"]["exact_match"]["average"] == 0
    assert set(results["probe"]) == {"loss", "exact_match"}
    assert (tmp_path / "run" / "scores_f1.csv").read_text().startswith("after,a,b\nstart,,0.53")


def test_the_probe_has_a_rule_too(settings: Any, tmp_path: Path, execute: Any) -> None:
    probe = {"name": "probe", "train": "probe-test.jsonl", "answers": "hotpot"}
    results = execute(settings(probe=probe, strategy="naive"), tmp_path / "run")
    assert set(results["probe"]) == {"loss", "exact_match", "f1"}
    assert "f1" not in results["scores"]


def test_a_stream_without_held_out_rows_is_trained(settings: Any, tmp_path: Path, execute: Any) -> None:
    stream = {"tasks": [{"name": name, "train": f"{name}.jsonl", "holdout": 0} for name in "ab"]}
    results = execute(settings(stream=stream), tmp_path / "run")
    assert (results["steps"], results["metrics"]) == (12, {})


@pytest.mark.parametrize("boundary", ["reset", "continue"])
def test_an_isolated_task_is_trained_as_if_it_were_the_whole_stream(
    settings: Any, tmp_path: Path, boundary: str, execute: Any
) -> None:
    schedule = {"type": "cosine", "at_boundary": boundary}
    execute(settings(strategy="isolated", schedule=schedule), tmp_path / "both")
    execute(settings(strategy="naive", schedule=schedule, stream={"tasks": [task("b")]}), tmp_path / "alone")
    assert R(tmp_path / "both")[1, 1] == R(tmp_path / "alone")[1, 0]


def test_an_extension_is_not_finished_before_its_results_are_written(
    finished: Any, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, execute: Any
) -> None:
    """The results of the run before it are still there, and would be taken for its own."""

    def full(*_: Any) -> None:
        raise StorageError("the disk is full")

    path = shutil.copytree(finished(strategy=BOTH), tmp_path / "run")
    asked = settings(strategy=BOTH, extensions=(THIRD,))
    with monkeypatch.context() as during:
        during.setattr("perdure.training.run.write_results", full)
        with pytest.raises(StorageError):
            execute(asked, path)
    assert not RunFolder(path).finished
    execute(asked, path)
    assert RunFolder(path).finished
    assert R(path).shape == (4, 3)


def test_changed_files_are_told_of_and_changed_rows_under_the_same_keys_refused(
    settings: Any, tiny: Path, tmp_path: Path, execute: Any, Stop: Any
) -> None:
    data = shutil.copytree(tiny, tmp_path / "data")
    for name in "ab":
        rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        named = "".join(json.dumps({"id": i, **row}) + "\n" for i, row in enumerate(rows))
        (data / f"{name}.jsonl").write_text(named)
    asked = settings(data=str(data))
    with pytest.raises(Interrupted):
        execute(asked, tmp_path / "run", Stop(step=3))
    before = (data / "b.jsonl").read_text()
    (data / "b.jsonl").write_text(before.replace("w5", "w30"))
    with pytest.raises(RunError, match="task b: its training rows changed"):
        execute(asked, tmp_path / "run", Stop())
    (data / "b.jsonl").write_text(before.replace("{", "{ "))
    display = Stop()
    execute(asked, tmp_path / "run", display)
    assert [line for line in display.said if line.startswith("warning: ")] == [
        "warning: task b: its data files were changed since; the rows that are used are the same"
    ]


def test_a_capacity_in_percent_is_exact() -> None:
    """29 % of 100 rows are 29; as floats 0.29 * 100 is below."""
    found = [with_capacity({"replay": {"capacity": f"{p}%"}}, 100)["replay"]["capacity"] for p in range(1, 100)]
    assert found == list(range(1, 100))
    assert with_capacity({"replay": {"capacity": "100%"}}, 100)["replay"]["capacity"] > 1e15, "all, later ones too"
    assert with_capacity({"replay": {"capacity": "2.5%"}}, 1000)["replay"]["capacity"] == 25


def test_no_task_trains_on_the_probe(settings: Any, tiny: Path) -> None:
    """The probe is four of task a's and b's rows in other spacing: tasks of 6 rows keep 4 each, c keeps all 6."""
    rows = [line for name in "ab" for line in (tiny / f"{name}.jsonl").read_text().splitlines()[:2]]
    (tiny / "overlap.jsonl").write_text(
        "".join(row.replace("w9", " w9").replace("w1", " w1") + "\n" for row in rows)
    )
    plan = make_plan(settings(probe={"name": "probe", "train": "overlap.jsonl"}, extensions=(THIRD,)))
    probed = {text_of(row) for row in plan.probe}
    assert len(plan.probe) == 4
    assert [len(stage.train) for stage in plan.stages] == [4, 4, 6]
    assert not any(text_of(row) in probed for stage in plan.stages for row in stage.train)
    assert [fact["train"]["overlapping"] for fact in plan.data["tasks"]] == [2, 2, 0]


def test_what_may_have_been_overlooked_in_the_strategy_is_said() -> None:
    def notes(**settings: Any) -> list[str]:
        stream = {"arena": {"kinds": ["math"], "train_rows": 2, "evaluation_rows": 1}}
        return notes_on_strategy(validate(RunSettings, {"stream": stream, **settings}, "test"))

    assert notes() == []
    assert "so this is naive; there are settings for gem" in notes(continual_strategy={"gem": {}})[0]
    assert notes(strategy="gem", continual_strategy={"gem": {}}) == []
    assert "mas.strength is left at 1;" in notes(strategy="replay+mas")[0]
    assert notes(strategy="mas", continual_strategy={"mas": {"lambda": 3}}) == []


def test_a_strategy_that_is_enabled_but_not_chosen_is_refused() -> None:
    stream = {"arena": {"kinds": ["math"], "train_rows": 2, "evaluation_rows": 1}}
    given = {"stream": stream, "continual_strategy": {"gem": {"enabled": True}}}
    with pytest.raises(ConfigError, match="say strategy: gem, or --strategy gem"):
        check_strategy(validate(RunSettings, given, "test"), "naive")
