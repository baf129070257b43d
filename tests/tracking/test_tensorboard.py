"""TensorBoard: what its own reader finds in a run's event files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard")

from perdure.tracking import TensorBoard


def read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(found: Any, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in found.Scalars(tag)]


def logged(folder: Path) -> list[tuple[int, Any]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(e["step"], pytest.approx(e["loss"], rel=1e-6)) for e in events if e["event"] == "step"]


def test_a_run(perdure: Callable[..., Any], recipe: Path, tmp_path: Path, interrupt: Callable[..., None]) -> None:
    """Stopped and gone on with: every step stands once, for the files are written anew from the log."""
    command = ("run", recipe, "--out", tmp_path / "a", "--track", "tensorboard")
    interrupt(3)
    assert perdure(*command).code == 130
    assert len(scalars(read(tmp_path / "a" / "tensorboard"), "train/loss")) == 3
    done = perdure(*command, "--resume")
    assert done.code == 0, done.err
    assert "tensorboard --logdir" in done.out
    found = read(tmp_path / "a" / "tensorboard")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert scalars(found, "train/loss") == logged(tmp_path / "a")
    for metric, matrix in results["scores"].items():
        for j, task in enumerate(matrix["tasks"]):
            column = [pytest.approx(row[j], rel=1e-6) for row in matrix["values"]]
            assert [value for _, value in scalars(found, f"{metric}/{task}")] == column
    ((_, average),) = scalars(found, "summary/loss/average")
    assert average == pytest.approx(results["metrics"]["loss"]["average"], rel=1e-6)
    assert set(found.Tags()["images"]) == {f"plots/{path.stem}" for path in (tmp_path / "a" / "plots").iterdir()}
    (text,) = found.Tensors("scores/loss/text_summary")
    table = text.tensor_proto.string_val[0].decode().splitlines()
    assert table[0] == "|  | ones | threes |"
    assert (
        table[2]
        == "| before training | " + " | ".join(f"{v:.4f}" for v in results["scores"]["loss"]["values"][0]) + " |"
    )
    assert table[4].startswith("| after threes | ")
    (parameters,) = found.Tensors("parameters/text_summary")
    assert "| optimizer.lr | 0.01 |" in parameters.tensor_proto.string_val[0].decode()


def hyper_parameters(folder: Path) -> dict[str, Any]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    found: dict[str, Any] = {}
    for path in folder.iterdir():
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                    for key, part in data.session_start_info.hparams.items():
                        found[key] = getattr(part, part.WhichOneof("kind"))
    return found


def test_a_script(tmp_path: Path, make_mlp: Callable[..., Any]) -> None:
    import torch

    from perdure import ContinualTrainer

    rows = [(torch.randn(5, generator=torch.Generator().manual_seed(i)), i % 3) for i in range(16)]
    board = TensorBoard(tmp_path / "board")
    config = {"batch_size": 4, "optimizer": {"lr": 0.25}}
    with ContinualTrainer(make_mlp(), None, config, seed=3, callbacks=[board]) as trainer:
        trainer.train_task(rows[:8], rows[8:], num_epochs=2)
    found = read(tmp_path / "board")
    assert [step for step, _ in scalars(found, "train/loss")] == [1, 2, 3, 4]
    assert len(scalars(found, "accuracy/task_0")) == 2
    chosen = hyper_parameters(tmp_path / "board")
    assert {"optimizer.lr": 0.25, "seed": 3.0, "batch_size": 4.0}.items() <= chosen.items()


def test_without_a_folder_each_training_has_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    board = TensorBoard()
    board.begin({"name": "training"})
    board.end({})
    (folder,) = (tmp_path / "tensorboard").iterdir()
    assert folder.name.startswith("training-")
    assert read(folder).Tags()["scalars"] == []
