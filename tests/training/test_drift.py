"""How far stages move the weights, and what of them each task has: by hand, by checkpoints, and after a stop."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from perdure import ContinualTrainer
from perdure.models.adapters import tune
from perdure.strategies import PNN, PackNet
from perdure.strategies.build import build
from perdure.tracking import read_events
from perdure.training import checkpoint
from perdure.training.drift import Changes, compare, grouping
from perdure.training.folder import FINAL
from perdure.training.interrupt import Interrupted
from perdure.training.plan import make_plan

CONFIG = {"optimizer": {"type": "adam", "lr": 0.02}, "batch_size": 8}


def test_norms_by_hand() -> None:
    """Block 0 went from (0, 4 | 1) to (3, 4 | 1), so by 3, from a norm of √17; at the start it was 0, so that
    there is no quotient, and ‖(3, 4, 1)‖ = √26. Block 1 went from 2 to 6. In sum: ‖(3, 4)‖ = 5 over √(17 + 4).
    Of the third, which has grown from one value to two, nothing can be compared.
    """
    now, before, start = (
        {name: torch.tensor(values) for name, values in each.items()}
        for each in (
            {"0.w": [3.0, 4.0], "0.b": [1.0], "1.w": [6.0], "2.w": [9.0, 9.0]},
            {"0.w": [0.0, 4.0], "0.b": [1.0], "1.w": [2.0], "2.w": [9.0], "gone": [1.0]},
            {"0.w": [0.0, 0.0], "0.b": [0.0], "1.w": [0.0]},
        )
    )
    found = compare(now, before, start, lambda name: f"block {name[0]}")
    none = pytest.approx(math.nan, nan_ok=True)
    assert found["groups"]["block 0"] == {
        "weights": 3, "new": 0, "change": 3.0, "relative_change": pytest.approx(3 / math.sqrt(17)),
        "new_since_start": 0, "change_from_start": pytest.approx(math.sqrt(26)), "relative_change_from_start": none,
    }  # fmt: skip
    assert found["groups"]["block 1"]["relative_change"] == 2.0
    assert found["groups"]["block 2"] == {
        "weights": 2, "new": 2, "change": none, "relative_change": none,
        "new_since_start": 2, "change_from_start": none, "relative_change_from_start": none,
    }  # fmt: skip
    total = found["total"]
    assert (total["weights"], total["new"], total["new_since_start"]) == (6, 2, 2)
    assert total["change"] == 5
    assert total["relative_change"] == pytest.approx(5 / math.sqrt(21))
    assert total["change_from_start"] == pytest.approx(math.sqrt(26 + 36))


def test_small_changes_of_many_values_are_not_rounded_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 ** 13 values of 1 that moved by 2 ** -20, cut into pieces: √(2 ** 13) · 2 ** -20 over √(2 ** 13)."""
    monkeypatch.setattr("perdure.training.drift.CHUNK", 1000)
    before = {"w": torch.ones(64, 128)}
    found = compare({"w": before["w"] + 2.0**-20}, before, before, lambda name: "w")
    assert found["total"]["relative_change"] == pytest.approx(2.0**-20, rel=1e-12)


def test_groups(make_lm: Any, make_mlp: Any) -> None:
    lm = make_lm()
    group_of = grouping(lm)
    groups = {name: group_of(name) for name, _ in lm.named_parameters()}
    assert set(groups.values()) == {"embeddings", "block 0", "block 1", "other"}
    assert groups["model.embed_tokens.weight"] == "embeddings"
    assert groups["model.layers.1.mlp.up_proj.weight"] == "block 1"
    assert groups["model.norm.weight"] == "other"
    assert group_of("pnn.1.own.weight") == "pnn"  # was not there when the model was built
    lora = grouping(tune(make_lm(), "lora", r=2))
    assert lora("base_model.model.model.layers.0.self_attn.q_proj.lora_A.task1.weight") == "block 0"
    assert [grouping(make_mlp())(name) for name in ("0.weight", "2.bias", "alone")] == [
        "block 0",
        "block 2",
        "other",
    ]
    named = nn.Module()
    named.add_module("hidden", nn.Linear(2, 2))
    named.add_module("out", nn.Linear(2, 2))
    assert [grouping(named)(name) for name in ("hidden.weight", "out.bias", "scale")] == ["hidden", "out", "other"]


def test_a_run_s_drift_is_that_of_its_checkpoints(finished: Any, settings: Any) -> None:
    """With weights read from disk, and the model that a run begins with built anew."""
    path = finished(strategy="naive")
    states = [
        checkpoint.load(place)["learner"]
        for place in (*path.glob("checkpoints/stage-001*"), path / "checkpoints" / FINAL)
    ]
    weights = [dict(make_plan(settings(strategy="naive")).model.named_parameters())]
    weights += [{name: state["model"][name] for name in state["trained"]} for state in states]
    flat = [np.concatenate([each[name].detach().double().flatten() for name in weights[0]]) for each in weights]
    drift = json.loads((path / "results.json").read_text())["drift"]
    for stage, found in enumerate(drift, start=1):
        now, before, start = flat[stage], flat[stage - 1], flat[0]
        assert found["total"]["weights"] == len(now)
        assert found["total"]["change"] == pytest.approx(np.linalg.norm(now - before))
        relative = np.linalg.norm(now - before) / np.linalg.norm(before)
        assert found["total"]["relative_change"] == pytest.approx(relative)
        whole = np.linalg.norm(now - start) / np.linalg.norm(start)
        assert found["total"]["relative_change_from_start"] == pytest.approx(whole)
        assert sum(group["change"] ** 2 for group in found["groups"].values()) == pytest.approx(
            found["total"]["change"] ** 2
        )
    events = [event for event in read_events(path / "metrics.jsonl") if event["event"] == "drift"]
    assert [{key: event[key] for key in ("total", "groups")} for event in events] == drift
    assert [(event["step"], event["task"], event["stage"]) for event in events] == [(6, "a", 1), (12, "b", 2)]


def test_an_isolated_run_begins_each_stage_at_the_start(finished: Any) -> None:
    for found in json.loads((finished(strategy="isolated") / "results.json").read_text())["drift"]:
        assert found["total"]["change"] == found["total"]["change_from_start"] > 0


def test_a_run_records_usage_and_who_was_told(finished: Any) -> None:
    """O-LoRA: the first adapter stays as it is in the second task, whose own is as large, and new."""
    results = json.loads((finished(strategy="olora", tuning="lora") / "results.json").read_text())
    first, second = (stage["total"] for stage in results["drift"])
    assert (second["weights"], second["new"], second["change"]) == (2 * first["weights"], first["weights"], None)
    assert second["change_from_start"] == first["change"] > 0
    assert [sorted({task for layer in stage.values() for task in layer}) for stage in results["usage"]] == [
        ["a"], ["a", "b"],
    ]  # fmt: skip
    assert sum(layer["b"] for layer in results["usage"][1].values()) == second["new"]
    assert results["task_identity"] is None
    assert json.loads((finished(strategy="naive") / "results.json").read_text())["usage"] is None
    told = json.loads((finished(strategy="packnet", tuning="lora") / "results.json").read_text())
    assert told["task_identity"] == "told"
    one, two = ({name: sum(layer.values()) for name, layer in stage.items()} for stage in told["usage"])
    assert one == two
    assert list(next(iter(told["usage"][1].values()))) == ["a", "b", "free"]


def stopped(settings: Any, path: Path, execute: Any, Stop: Any) -> None:
    """A run that was stopped in the middle of its second stage."""
    with pytest.raises(Interrupted):
        execute(settings(strategy="naive"), path, Stop(step=8))


def test_gone_on_with_in_a_stage_it_reads_where_that_began(
    finished: Any, settings: Any, tmp_path: Path, execute: Any, Stop: Any, outcome: Any
) -> None:
    stopped(settings, tmp_path / "run", execute, Stop)
    execute(settings(strategy="naive"), tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(finished(strategy="naive"))


def test_where_a_stage_began_may_be_gone(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    path = tmp_path / "run"
    stopped(settings, path, execute, Stop)
    (place,) = path.glob("checkpoints/stage-001*")
    shutil.rmtree(place)
    display = Stop()
    results = execute(settings(strategy="naive"), path, display)
    assert "warning: the drift of stage 2 is unknown: the checkpoint before it cannot be read" in display.said
    assert results["drift"][0]["total"]["change"] > 0
    assert results["drift"][1] is None


def test_a_run_of_an_older_version_is_gone_on_with(settings: Any, tmp_path: Path, execute: Any, Stop: Any) -> None:
    """Whose checkpoints have neither drift nor usage: those of its later stages are measured."""
    path = tmp_path / "run"
    stopped(settings, path, execute, Stop)
    for place in path.glob("checkpoints/*"):
        state = checkpoint.load(place)
        del state["changes"]
        checkpoint.save(place, state)
    first, second = execute(settings(strategy="naive"), path)["drift"]
    assert first is None
    assert second["total"]["change_from_start"] > second["total"]["change"] > 0


def test_a_trainer_measures_what_checkpoints_hold(make_mlp: Any, tmp_path: Path, trained: Any) -> None:
    model = make_mlp(5, 2)
    out = tmp_path / "out"
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = trained(ContinualTrainer(model, PackNet(0.5), CONFIG, output_dir=out))
    results = json.loads((out / "results.json").read_text())
    before = checkpoint.load(out / "checkpoints" / "task-001")["learner"]["model"]
    for name, layer in (("block 0", "0"), ("block 2", "2")):
        parts = [f"{layer}.weight", f"{layer}.bias"]
        own = {part: value.detach() for part, value in model.named_parameters()}
        for key, other in (("change", before), ("change_from_start", start)):
            squares = sum(float((own[part] - other[part]).double().square().sum()) for part in parts)
            assert results["drift"][1]["groups"][name][key] == pytest.approx(math.sqrt(squares))
    assert results["usage"][1] == trainer.strategy.usage(model)
    assert [sum(stage["0"].values()) for stage in results["usage"]] == [40, 40]
    assert list(results["usage"][1]["0"]) == ["task_0", "task_1", "free"]
    events = [event for event in read_events(out / "metrics.jsonl") if event["event"] == "drift"]
    assert [event["stage"] for event in events] == [1, 2]


@pytest.mark.parametrize("make", [PNN, lambda: build(["ewc"], {})], ids=["pnn", "ewc"])
def test_a_trainer_that_was_loaded_measures_the_same(
    make_mlp: Any, tmp_path: Path, trained: Any, make: Any
) -> None:
    """The model that it is loaded into is another one, and what the strategy grows has no counterpart."""
    one = trained(ContinualTrainer(make_mlp(5, 2), make(), CONFIG), stop=1)
    one.save(tmp_path / "saved")
    trained(one, 1, 3)
    other = trained(ContinualTrainer.load(tmp_path / "saved", make_mlp(5, 2, seed=8)), 1, 3)
    for found in zip(one._changes.drift, other._changes.drift, strict=True):
        assert repr(found[0]) == repr(found[1])
    assert one._changes.usage == other._changes.usage
    assert len(one._changes.drift) == 3


def test_a_stage_that_is_trained_again_is_recorded_once(make_mlp: Any) -> None:
    class Learner:
        model = make_mlp(5, 2)
        trained = ("0.weight",)
        strategy = PackNet()

    changes = Changes()
    changes.begin(Learner.model)
    changes.before = changes.start
    for stage in (1, 2, 3, 2):
        changes.measure(stage, Learner)  # type: ignore[arg-type]
    assert [len(changes.drift), len(changes.usage)] == [2, 2]
    changes.measure(5, Learner)  # type: ignore[arg-type]
    assert [found is None for found in changes.drift] == [False, False, True, True, False]
    assert changes.usage[2:] == [{}, {}, {}]
