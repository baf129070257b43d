"""`perdure reactions`, `extend`, `predict` and `evaluate` on a small table: files, settings, resuming, refusals."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.training.test_regression import HALIDES, reactions, write_model, write_table  # noqa: E402

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    "--epochs", "2", "--batch-size", "8", "--holdout", "0.5", "--lr", "0.005", "--set", "head.hidden=12",
    "--set", "evaluation.samples=5",
)  # fmt: skip


def unpaged() -> Any:
    """Runs without page and figures, which take most of a small one; for tests that look at other things."""
    return patch("perdure.recipes.run.write_pages", lambda folders: None)


EWC = ("--set", "continual_strategy.ewc.strength=3")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three tasks of 40 rows (two solvents), a file of a fourth, a model, and a folder for runs."""
    path = tmp_path_factory.mktemp("reactions")
    write_model(path / "model")
    write_table(path / "table.csv", doubled([row for halide in HALIDES for row in reactions(halide)]))
    write_table(path / "more.csv", doubled(reactions("CCOc1ccncc1")))
    return path


def doubled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row in a second solvent too, in which it yields a fifth less."""
    found = []
    for row in rows:
        for number, (solvent, part) in enumerate((("O", 1.0), ("CO", 0.8))):
            smiles = row["reaction_smiles"].replace(">>", f".{solvent}>>")
            changes = {
                "reaction_number": 2 * row["reaction_number"] + number,
                "reaction_smiles": smiles,
                "yield": round(part * row["yield"], 3),
            }
            found.append({**row, **changes, "solvent": solvent})
    return found


@pytest.fixture(scope="module")
def started(
    perdure: Callable[..., Any], place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Start a run on the table in a folder of its own: `started("--setting", "joint", out=…, data=…)`."""

    def start(*options: str, out: Path | None = None, data: Path | None = None, pages: bool = False) -> Any:
        where = out or tmp_path_factory.mktemp("runs") / "run"
        given = ("--data", data or place / "table.csv", "--model", place / "model", "--out", where)
        with nullcontext() if pages else unpaged():
            return where, perdure("reactions", *given, *SMALL, *options)

    return start


@pytest.fixture(scope="module")
def replayed(started: Callable[..., Any]) -> Path:
    """A run with all default settings but sizes; what was printed is in printed.txt."""
    run, done = started(pages=True)
    assert (done.code, done.err) == (0, ""), done.err
    (run / "printed.txt").write_text(done.out)
    return Path(run)


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def results(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "results.json").read_text()))


def values(run: Path, metric: str = "r2") -> np.ndarray:
    return np.array(results(run)["scores"][metric]["values"], dtype=float)


def of(rows: list[dict[str, str]]) -> dict[str, float]:
    """The metrics of a file of predictions."""
    y, p = (np.array([float(row[column]) for row in rows]) for column in ("true", "predicted"))
    error = y - p
    return {
        "r2": 1 - (error**2).sum() / ((y - y.mean()) ** 2).sum(),
        "rmse": np.sqrt((error**2).mean()),
        "mae": np.abs(error).mean(),
    }


def test_what_is_written(replayed: Path) -> None:
    """3 tasks of 40 rows, 20 to learn from."""
    for name in (
        "predictions_held_out.csv", "predictions_training.csv", "r2_matrix.csv", "rmse_matrix.csv",
        "epoch_losses_task_01.csv", "epoch_losses_task_02.csv", "epoch_losses_task_03.csv",
        "scores_r2_training.csv", "results.json", "report.html", "calibration.json",
    ):  # fmt: skip
        assert (replayed / name).is_file(), name
    config = (replayed / "config.yaml").read_text()
    assert "capacity: 10%" in config
    for part in ("held_out", "training"):
        assert len(table(replayed / f"predictions_{part}.csv")) == 60
    assert values(replayed).shape == (4, 3)
    assert results(replayed)["replay"]["rows"] == 2 * 2 * 20
    printed = (replayed / "printed.txt").read_text()
    found = results(replayed)["metrics"]["r2"]["pooled"]
    assert f"over all held-out rows: R² {found:.3f}" in printed
    assert "over rows that were trained on: R²" in printed


def test_matrices_are_those_of_the_predictions_of_held_out_rows(replayed: Path) -> None:
    """The last rows of r2_matrix.csv and rmse_matrix.csv, by hand; those of training rows differ and say so."""
    for end, file in (("", "predictions_held_out.csv"), ("_training", "predictions_training.csv")):
        rows = table(replayed / file)
        for column, task in enumerate(results(replayed)["tasks"]):
            own = of([row for row in rows if row["task"] == task])
            for metric, value in own.items():
                assert values(replayed, metric + end)[-1, column] == pytest.approx(value, abs=1e-4)
        together = of(rows)
        for metric in ("r2", "rmse", "mae"):
            found = results(replayed)["metrics"][metric + end]["pooled"]
            assert found == pytest.approx(together[metric], abs=1e-4)
    assert np.abs(values(replayed)[-1] - values(replayed, "r2_training")[-1]).min() > 1e-3
    for metric in ("r2", "rmse"):
        last = table(replayed / f"{metric}_matrix.csv")[-1]
        cells = [float(cell) for cell in list(last.values())[1:] if cell]
        assert cells[:3] == pytest.approx(values(replayed, metric)[-1].tolist(), abs=1e-4)


def test_no_row_is_on_both_sides_and_yields_are_the_tables(replayed: Path, place: Path) -> None:
    worth = {row["reaction_number"]: float(row["yield"]) / 100 for row in table(place / "table.csv")}
    held, seen = (table(replayed / f"predictions_{name}.csv") for name in ("held_out", "training"))
    assert {row["key"] for row in held} | {row["key"] for row in seen} == set(worth)
    assert not {row["key"] for row in held} & {row["key"] for row in seen}
    texts = {row["reaction_number"]: row["reaction_smiles"] for row in table(place / "table.csv")}
    for row in held + seen:
        assert row["reaction_smiles"] == texts[row["key"]]
        assert float(row["true"]) == pytest.approx(worth[row["key"]], rel=1e-5)
        assert 0 < float(row["predicted"]) < 1


def test_calibration_is_of_the_half_that_did_not_set_the_width(replayed: Path) -> None:
    told = json.loads((replayed / "calibration.json").read_text())
    rows = table(replayed / "predictions_held_out.csv")
    fits = [row for row in rows if row["calibration"] == "1"]
    rest = [row for row in rows if row["calibration"] == "0"]
    assert (told["fitted_on"], told["rows"]) == (len(fits), len(rest))
    assert len(fits) >= 20
    inside = [float(row["lower"]) - 1e-6 <= float(row["true"]) <= float(row["upper"]) + 1e-6 for row in rest]
    assert told["observed"][told["levels"].index(0.9)] == pytest.approx(np.mean(inside))
    scores = sorted(abs(float(r["true"]) - float(r["predicted"])) / (float(r["std"]) + told["floor"]) for r in fits)
    rank = int(np.ceil(round((len(fits) + 1) * 0.9, 9)))
    assert told["factors"]["0.9"] == pytest.approx(scores[rank - 1], rel=1e-3)
    assert told["method"] == "mc-dropout"
    assert min(float(row["std"]) for row in rows) > 0


def test_the_baseline_is_beside_it(replayed: Path) -> None:
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    found = json.loads((replayed / "baseline.json").read_text())
    assert found["columns"] == ["base", "ligand", "reactant_1", "reactant_2", "solvent"]
    assert f"trained jointly: R² {found['r2']:.3f}" in (replayed / "printed.txt").read_text()


@pytest.mark.parametrize(
    ("options", "strategy", "expected"),
    [
        (["--memory", "all", "--gradient", "separate"], "replay", {"capacity": "100%", "gradients": "separate"}),
        (["--setting", "replay+ewc", "--memory", "25%", "--head", "mean", *EWC], "replay+ewc", {"capacity": "25%"}),
        (["--setting", "ewc", "--precision", "bf16", *EWC], "ewc", {}),
        (["--setting", "sequential", "--head", "linear"], "naive", {}),
        (["--setting", "joint", "--ensemble", "2"], "joint", {}),
        (["--setting", "sequential", "--tuning", "lora", "--rank", "2", "--lora-alpha", "4"], "naive", {}),
        (["--setting", "joint", "--tuning", "full", "--precision", "bf16", "--task-columns", ""], "joint", {}),
    ],
    ids=lambda given: "-".join(given).replace("--", "") if isinstance(given, list) else "",
)  # fmt: skip
def test_settings(started: Callable[..., Any], options: list[str], strategy: str, expected: dict[str, Any]) -> None:
    """Each to its end: a score for each task after each stage, and training lowers the loss of the last task."""
    from perdure.training.folder import RunFolder

    run, done = started(*options, "--epochs", "1")
    assert (done.code, done.err) == (0, ""), done.err
    settings = RunFolder(run).settings()
    assert settings.strategy == strategy
    assert settings.continual_strategy.get("replay", {}) == expected
    found = values(run)
    tasks = 1 if "--task-columns" in options else 3
    assert found.shape == (2 if strategy == "joint" else 4, tasks)
    assert np.isfinite(found).all()
    loss = values(run, "loss")
    assert loss[-1, -1] < loss[0, -1]
    if "--ensemble" in options:
        assert float(table(run / "predictions_held_out.csv")[0]["std"]) > 0
        assert settings.head.ensemble == 2
    if "linear" in options:
        assert {float(row["std"]) for row in table(run / "predictions_held_out.csv")} == {0.0}
    if expected.get("capacity") == "100%":
        assert results(run)["replay"]["rows"] == 2 * 20


@pytest.mark.parametrize(
    ("overrides", "backend", "gpu", "expected"),
    [
        ((), "torch", False, 16),
        (("batch_size=8",), "torch", False, 8),
        (("micro_batch_size=4",), "torch", False, 4),
        (("micro_batch_size=null",), "torch", False, None),
        ((), "torch", True, None),
        (("device=cpu",), "torch", True, 16),
        ((), "jax", False, None),
    ],
)
def test_rows_that_go_through_the_model_at_once(
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    backend: str,
    gpu: bool,
    expected: int | None,
) -> None:
    from perdure.recipes.reactions.options import Options, cut_as_before, settings_for

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    options = Options(data=place / "table.csv", model=str(place / "model"))
    settings = settings_for(options, overrides, backend)
    assert settings.micro_batch_size == expected
    # A run that was begun elsewhere is gone on with as it was, unless another number is asked for.
    asked = any(override.startswith("micro") for override in overrides)
    for theirs in (None, 2):
        before = settings.model_copy(update={"micro_batch_size": theirs})
        found = cut_as_before(settings, before, overrides).micro_batch_size
        assert found == (expected if asked else theirs)


def test_a_stopped_run_goes_on_to_the_same_end(
    started: Callable[..., Any], replayed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ctrl-C in the 11th of 18 steps, within the second task's second epoch."""
    import signal

    from perdure.training.learner import Learner

    step, taken = Learner.step, []

    def counted(self: Any, rows: Any) -> Any:
        taken.append(len(rows))
        if len(taken) == 11:
            signal.raise_signal(signal.SIGINT)
        return step(self, rows)

    monkeypatch.setattr(Learner, "step", counted)
    run, done = started(out=tmp_path / "run")
    assert done.code != 0
    assert "--resume" in done.err + done.out
    assert not (run / "results.json").exists()
    assert len(taken) == 11
    refused = started(out=run)[1]
    assert refused.code == 2
    assert "add --resume" in refused.err
    other = started("--resume", "--memory", "20%", out=run)[1]
    assert other.code == 2
    assert "capacity" in other.err
    _, again = started("--resume", out=run)
    assert again.code == 0, again.err
    assert len(taken) == 18
    for name in (
        "predictions_held_out.csv", "predictions_training.csv", "r2_matrix.csv", "rmse_matrix.csv", "scores.csv",
        "epoch_losses_task_02.csv", "calibration.json",
    ):  # fmt: skip
        assert (run / name).is_file() == (replayed / name).is_file()
        if (run / name).is_file():
            assert (run / name).read_bytes() == (replayed / name).read_bytes(), name
    (head,) = run.glob("*/head.safetensors")
    assert head.read_bytes() == (replayed / head.relative_to(run)).read_bytes()
    _, finished = started("--resume", out=run)
    assert finished.code == 0
    assert "nothing to do" in finished.out
    assert len(taken) == 18
    for name in ("predictions_training.csv", "r2_matrix.csv", "report.html"):
        (run / name).unlink(missing_ok=True)
    _, finished = started("--resume", out=run)
    assert (finished.code, finished.err) == (0, ""), finished.err
    assert "writing its tables" in finished.out
    assert len(taken) == 18
    for name in ("predictions_training.csv", "r2_matrix.csv"):
        assert (run / name).read_bytes() == (replayed / name).read_bytes(), name


def test_a_finished_run_of_a_table_that_has_changed_is_refused(
    started: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    data = tmp_path / "table.csv"
    shutil.copy(place / "table.csv", data)
    run, done = started("--setting", "sequential", "--epochs", "1", data=data)
    assert done.code == 0, done.err
    rows = table(data)
    write_table(data, [{**rows[0], "yield": float(rows[0]["yield"]) + 1}, *rows[1:]])
    _, again = started("--setting", "sequential", "--epochs", "1", "--resume", out=run, data=data)
    assert again.code == 2, again.out
    assert "rows" in again.err


def test_a_run_in_the_order_of_similarity_goes_on(started: Callable[..., Any]) -> None:
    """What "auto" stood for is recorded, and "auto" asks for it again."""
    run, done = started("--setting", "sequential", "--order", "similarity", "--epochs", "1")
    assert done.code == 0, done.err
    _, again = started("--setting", "sequential", "--order", "similarity", "--epochs", "1", "--resume", out=run)
    assert again.code == 0, again.err
    assert "nothing to do" in again.out


REFUSALS = {
    "memory": (["--setting", "sequential", "--memory", "10%"], "sequential keeps no rows; take --setting replay"),
    "gradient": (["--setting", "ewc", "--gradient", "separate"], "ewc replays none"),
    "rank": (["--rank", "4"], "--rank: it is LoRA's; take --tuning lora"),
    "alpha": (["--lora-alpha", "4", "--tuning", "full"], "--lora-alpha: it is LoRA's"),
    "heads": (["--head", "mean", "--heads", "2"], "the head mean has no attention"),
    "soft-prompt": (["--tuning", "soft-prompt"], "a regression takes head, lora or full"),
    "setting": (["--setting", "sequental"], "'sequental'. Did you mean 'sequential'? Known: agem,"),
    "head": (["--head", "mhra"], "mhar"),
    "shares": (["--heads", "3"], "of up to 32 heads these would do: 1, 2, 4, 8"),
    "smiles": (["--smiles-column", "smiles"], "The file has: reaction_number, reactant_1"),
    "yield": (["--yield-column", "worth"], "yield_column is 'worth', but there is no such column"),
    "task": (["--task-columns", "reactant_1,pair"], "task_columns is 'pair'"),
    "scale": (["--yield-scale", "fraction"], "a fraction lies between 0 and 1"),
    "share": (["--memory", "0%"], "must be above 0%"),
    "negative": (["--memory", "-3"], "capacity"),
    "gradients": (["--gradient", "apart"], "combined"),
    "backend": (["--backend", "tpu"], "torch"),
    "model": (["--model", "minlm"], "not a folder"),
    "holdout": (["--holdout", "1.5"], "holdout"),
    "order": (["--order", "similar"], "similarity"),
    "precision": (["--precision", "fp8"], "precision"),
    "class": (["--set", "continual_strategy.replay.memory=class-balanced"], "a regression has none"),
    "unknown": (["--set", "head.size=3"], "head.size"),
    "spread": (["--set", "evaluation.uncertainty=ensemble"], "needs head.ensemble of 2 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_and_how(started: Callable[..., Any], tmp_path: Path, name: str) -> None:
    options, said = REFUSALS[name]
    run, done = started(*options, out=tmp_path / "run")
    assert done.code == 2, done.err
    assert said in " ".join(done.err.split())
    assert "Traceback" not in done.err
    assert not (run / "results.json").exists()


def test_without_a_table_the_way_to_one_is_told(perdure: Callable[..., Any], tmp_path: Path) -> None:
    for options in ((), ("--data", tmp_path / "gone.csv"), ("--data", tmp_path)):
        done = perdure("reactions", *options)
        assert done.code == 2
        said = " ".join(done.err.split())
        for word in (
            "aap9112_Data_File_S1.xlsx", "10.1126/science.aap9112", "--smiles-column", "--yield-column",
            "--task-columns",
        ):  # fmt: skip
            assert word in said
    assert "gone.csv" in perdure("reactions", "--data", tmp_path / "gone.csv").err
    assert "no such file" in perdure("reactions", "sweep", "--data", tmp_path / "gone.csv").err


def test_a_table_without_its_columns(started: Callable[..., Any], tmp_path: Path) -> None:
    rows = [{"a": "C>>N", "b": 4}, {"a": "CC>>N", "b": 5}]
    _, done = started(data=write_table(tmp_path / "odd.csv", rows), out=tmp_path / "run")
    assert done.code == 2
    said = " ".join(done.err.split())
    assert "Name it with smiles_column (--smiles-column). The file has: a, b." in said


def test_any_other_table(
    started: Callable[..., Any], perdure: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    """Other names, yields as fractions, a task column of two values; what is foretold of it are fractions."""
    rows = [
        {"rxn": row["reaction_smiles"], "conv": row["yield"] / 100, "plate": row["solvent"], "lig": row["ligand"]}
        for row in doubled(reactions("bromide") + reactions("iodide"))
    ]
    other = write_table(tmp_path / "other.csv", rows)
    options = ("--yield-column", "conv", "--task-columns", "plate", "--setting", "sequential", "--order", "sorted")
    options += ("--holdout", "0.2")
    run, done = started(*options, data=other)
    assert done.code == 0, done.err
    assert results(run)["tasks"] == ["CO", "O"]
    assert "no intervals: half of the held-out rows set their widths, at least 20, and" in " ".join(
        done.out.split()
    )
    assert not (run / "calibration.json").exists()
    from perdure.training.folder import RunFolder

    assert RunFolder(run).recorded()["data"]["scale"] == "fraction"
    worth = sorted(row["conv"] for row in rows)
    held, seen = (table(run / f"predictions_{name}.csv") for name in ("held_out", "training"))
    assert sorted(float(row["true"]) for row in held + seen) == pytest.approx(worth, rel=1e-4)
    done = perdure("predict", run, other, "-o", tmp_path / "p.csv")
    assert done.code == 0, done.err
    assert "in fractions" in done.out
    assert all(0 < float(row["predicted"]) < 1 for row in table(tmp_path / "p.csv"))


def test_without_held_out_rows_nothing_is_scored(started: Callable[..., Any]) -> None:
    run, done = started("--holdout", "0", "--setting", "sequential", "--epochs", "1")
    assert done.code == 0, done.err
    assert len(table(run / "predictions_training.csv")) == 120
    assert not table(run / "predictions_held_out.csv")


@pytest.fixture(scope="module")
def extended(
    perdure: Callable[..., Any], replayed: Path, place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The run with a fourth task, from a copy."""
    run = tmp_path_factory.mktemp("extended") / "run"
    shutil.copytree(replayed, run)
    with unpaged():
        done = perdure("extend", run, "--task", place / "more.csv", "--name", "ether")
    assert (done.code, done.err) == (0, ""), done.err
    return run


def test_extend_adds_a_task_and_keeps_what_was(extended: Path, replayed: Path) -> None:
    """Rows before the extension keep their scores; the new task has one before it was trained on, too."""
    assert results(extended)["tasks"] == [*results(replayed)["tasks"], "ether"]
    for metric in ("r2", "rmse", "r2_training"):
        old, new = values(replayed, metric), values(extended, metric)
        assert new.shape == (5, 4)
        np.testing.assert_array_equal(new[:4, :3], old)
        assert np.isfinite(new[-1]).all()
    assert np.isfinite(values(extended)[3, 3])
    loss = values(extended, "loss")
    assert loss[4, 3] < loss[3, 3]
    assert (extended / "epoch_losses_task_04.csv").is_file()
    one, two = (table(path / "epoch_losses_task_01.csv") for path in (replayed, extended))
    assert one == two
    rows = table(extended / "predictions_held_out.csv")
    assert len(rows) == 80
    assert {row["task"] for row in rows} == set(results(extended)["tasks"])
    together = of(rows)
    assert results(extended)["metrics"]["r2"]["pooled"] == pytest.approx(together["r2"], abs=1e-4)
    before = results(replayed)["metrics"]["r2"]["pooled_by_stage"]
    assert results(extended)["metrics"]["r2"]["pooled_by_stage"][:3] == pytest.approx(before)


def test_a_memory_of_all_keeps_the_rows_of_later_tasks_too(
    started: Callable[..., Any], perdure: Callable[..., Any], place: Path, tmp_path: Path
) -> None:
    """A fourth and a fifth task of 20 rows come to three of 20: the memory is as large as what was learnt."""
    run, done = started("--memory", "all", "--epochs", "1")
    assert done.code == 0, done.err
    more = table(place / "more.csv")
    measured = [{**row, "yield": float(row["yield"]) / 2} for row in more]  # again, with other yields
    again = write_table(tmp_path / "again.csv", measured)
    with unpaged():
        for name, file in (("ether", place / "more.csv"), ("ester", again)):
            extended = perdure("extend", run, "--task", file, "--name", name)
            assert extended.code == 0, extended.err
            words = " ".join(extended.out.split())
            assert ("20 of 20 rows were trained on before" in words) == (name == "ester")
            assert ("20 of 20 held-out rows are held out in an earlier task too" in words) == (name == "ester")
            assert "over all held-out rows: R²" in words
    assert results(run)["memory"] == 5 * 20


def test_extend_refuses_what_cannot_be(
    perdure: Callable[..., Any], extended: Path, place: Path, tmp_path: Path
) -> None:
    def said(*options: Any) -> str:
        done = perdure("extend", extended, *options)
        assert done.code == 2
        assert "Traceback" not in done.err
        return " ".join(done.err.split())

    same = said("--task", place / "more.csv", "--name", "ester")
    assert "the run's tables have all rows of it (40) already, yields included" in same
    assert "all rows of it (120)" in said("--task", place / "table.csv")
    other = write_table(tmp_path / "other.csv", doubled(reactions("COc1ccncc1")))
    assert "another --name" in said("--task", other, "--name", "ether")
    assert "no such file" in said("--task", tmp_path / "gone.csv")
    odd = write_table(tmp_path / "odd.csv", [{"a": "C>>N", "b": 4}])
    assert "The file has: a, b" in said("--task", odd)
    again = perdure("extend", extended, "--resume")
    assert again.code == 0
    named = write_table(tmp_path / "named.csv", [{"reaction_smiles": "C>>N", "worth": 4}])
    assert "Give the columns the names that they have in the run's own table" in said("--task", named)
    done = perdure("predict", extended, place / "more.csv", "-o", tmp_path / "p.csv")
    assert done.code == 0, done.err
    assert len(table(tmp_path / "p.csv")) == 40


def asked(path: Path, labelled: bool) -> Path:
    columns = ["reaction_number", "reactant_1", "reactant_2", "reaction_smiles", *(["yield"] if labelled else [])]
    rows = [{column: row[column] for column in columns} for row in doubled(reactions("chloride"))[:6]]
    return write_table(path, rows)


@pytest.mark.parametrize("labelled", [True, False])
def test_predict(perdure: Callable[..., Any], replayed: Path, tmp_path: Path, labelled: bool) -> None:
    """In percent as the table is; what the run itself wrote of these rows; compared where there are yields."""
    file = asked(tmp_path / "new.csv", labelled)
    done = perdure("predict", replayed, file, "-o", tmp_path / "p.csv")
    assert (done.code, done.err) == (0, ""), done.err
    rows = table(tmp_path / "p.csv")
    columns = ["key", "task", "reaction_smiles", "predicted", "lower", "upper", "std"]
    assert list(rows[0]) == columns + (["true", "in_run"] if labelled else ["in_run"])
    written = {
        row["key"]: row for name in ("held_out", "training") for row in table(replayed / f"predictions_{name}.csv")
    }
    factors = json.loads((replayed / "calibration.json").read_text())["factors"]
    for row in rows:
        own = written[row["key"]]
        predicted, std = float(row["predicted"]), float(row["std"])
        assert predicted == pytest.approx(100 * float(own["predicted"]), rel=1e-3)
        assert std > 0
        width = (factors["0.9"] or np.inf) * (std + 2)
        assert float(row["lower"]) == pytest.approx(max(0, predicted - width), abs=0.02)
        assert float(row["upper"]) == pytest.approx(min(100, predicted + width), abs=0.02)
        if labelled:
            assert float(row["true"]) == pytest.approx(100 * float(own["true"]), rel=1e-4)
    assert "6 predictions in percent, intervals of 90%" in " ".join(done.out.split())
    trained = {row["key"] for row in table(replayed / "predictions_training.csv")}
    assert [row["in_run"] for row in rows] == ["training" if row["key"] in trained else "held out" for row in rows]
    new = [row for row in rows if row["in_run"] == "held out"]
    assert 1 < len(new) < len(rows), "both sorts are needed"
    said = " ".join(done.out.split())
    assert f"trained on {len(rows) - len(new)} of these reactions" in said
    if labelled:
        found = of(new)
        assert f"against {len(new)} yields in the file that it was not trained on: R² {found['r2']:.3f}" in said
        assert f"RMSE {found['rmse']:.3g}" in said
    else:
        assert "against" not in done.out


def test_narrower_intervals_lie_within(perdure: Callable[..., Any], replayed: Path, tmp_path: Path) -> None:
    file = asked(tmp_path / "new.csv", False)
    for level in ("0.5", "0.9"):
        assert perdure("predict", replayed, file, "-o", tmp_path / f"{level}.csv", "--level", level).code == 0
    for one, two in zip(table(tmp_path / "0.5.csv"), table(tmp_path / "0.9.csv"), strict=True):
        assert one["predicted"] == two["predicted"]
        assert float(two["lower"]) <= float(one["lower"]) <= float(one["upper"]) <= float(two["upper"])
        assert float(one["upper"]) - float(one["lower"]) < float(two["upper"]) - float(two["lower"])


def test_predict_refuses_what_cannot_be(
    perdure: Callable[..., Any], replayed: Path, finished_run: Path, tmp_path: Path
) -> None:
    file = asked(tmp_path / "new.csv", False)

    def said(*options: Any) -> str:
        done = perdure("predict", *options)
        assert done.code == 2, done.err
        assert "Traceback" not in done.err
        return " ".join(done.err.split())

    assert "--level 0.99: choose one of 0.1, 0.15" in said(
        replayed, file, "-o", tmp_path / "p.csv", "--level", "0.99"
    )
    assert "is no run of reactions" in said(finished_run, file)
    assert "no such file" in said(replayed, tmp_path / "gone.csv")
    assert "is a folder" in said(replayed, file, "-o", tmp_path)
    assert "is the table itself" in said(replayed, file, "-o", file)
    odd = write_table(tmp_path / "odd.csv", [{"a": "C>>N", "b": 4}])
    assert "The file has: a, b" in said(replayed, odd)
    long = write_table(tmp_path / "long.csv", [{"reaction_smiles": "C" * 300 + ">>N"}])
    assert "longer than 128 tokens" in said(replayed, long)
    without = tmp_path / "run"
    shutil.copytree(replayed, without)
    (without / "calibration.json").unlink()
    assert "--level 95: choose one of 0.1, 0.15" in said(without, file, "--level", "95")


def test_a_reaction_too_long_is_named_and_the_others_foretold(
    perdure: Callable[..., Any], replayed: Path, tmp_path: Path
) -> None:
    rows = [{"id": "good", "rxn": "CC>>N"}, {"id": "endless", "rxn": "C" * 300 + ">>N"}]
    file = write_table(tmp_path / "long.csv", [{"id": row["id"], "reaction_smiles": row["rxn"]} for row in rows])
    done = perdure("predict", replayed, file, "-o", tmp_path / "p.csv")
    assert done.code == 0, done.err
    assert "left out: endless" in " ".join(done.out.split())
    assert [row["key"] for row in table(tmp_path / "p.csv")] == ["good"]


def test_evaluate_scores_as_the_run_did(perdure: Callable[..., Any], replayed: Path, place: Path) -> None:
    done = perdure("evaluate", replayed)
    assert (done.code, done.err) == (0, ""), done.err
    found = json.loads((replayed / "evaluation.json").read_text())["scores"]
    for column, task in enumerate(results(replayed)["tasks"]):
        for metric in ("loss", "rmse", "mae", "r2"):
            assert found[task][metric] == pytest.approx(values(replayed, metric)[-1, column], abs=1e-6)
    refused = perdure("evaluate", replayed, "--data", place / "more.csv")
    assert refused.code == 2
    assert "perdure predict" in refused.err


def test_generate_is_refused_in_words(perdure: Callable[..., Any], replayed: Path) -> None:
    done = perdure("generate", replayed, "CC>>N")
    assert done.code == 2
    assert "run of reactions, which has no words" in " ".join(done.err.split())
    assert "perdure predict" in done.err


def test_report_compares_runs(perdure: Callable[..., Any], replayed: Path, extended: Path, tmp_path: Path) -> None:
    done = perdure("report", replayed, extended, "-o", tmp_path / "report.html")
    assert done.code == 0, done.err
    page = (tmp_path / "report.html").read_text()
    assert "R²" in page
    assert re.search(r"Not all runs have the same tasks.*: 3 are in all; \S*run also has ether\.", page)
    assert "Not all runs have the same tasks" in " ".join(done.out.split())


def test_sweep(perdure: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    """Two ranks and full tuning; alpha is four times the rank; a second call runs nothing."""
    from perdure.training.folder import RunFolder

    given = (
        "reactions", "sweep", "--rank", "1,2", "--data", place / "table.csv", "--model", place / "model",
        "--epochs", "1", "--batch-size", "32", "--lr", "0.002", "--set", "head.hidden=12",
        "--set", "evaluation.samples=2", "--set", "evaluation.each_epoch=false", "--out", tmp_path / "sweep",
    )  # fmt: skip
    with unpaged():
        done = perdure(*given)
    assert (done.code, done.err) == (0, ""), done.err
    rows = table(tmp_path / "sweep" / "sweep.csv")
    assert [(row["tuning"], row["rank"], row["seed"]) for row in rows] == [
        ("lora", "1", "7193"), ("lora", "2", "7193"), ("full", "", "7193"),
    ]  # fmt: skip
    one, two, full = (int(row["trainable"]) for row in rows)
    assert one < two < full
    for name, row in zip(("rank1", "rank2", "full"), rows, strict=True):
        run = tmp_path / "sweep" / f"{name}-seed7193"
        assert float(row["r2"]) == pytest.approx(results(run)["metrics"]["r2"]["pooled"])
        settings = RunFolder(run).settings()
        assert (settings.lora.alpha, settings.optimizer.lr) == {
            "rank1": (4, 0.002), "rank2": (8, 0.002), "full": (64, pytest.approx(0.0002)),
        }[name]  # fmt: skip
        assert settings.strategy == "joint"
    again = perdure(*given)
    assert again.code == 0
    assert "rank1-seed7193:" not in again.out
    before = perdure("reactions", "--epochs", "2", "--data", place / "table.csv", "sweep", "--rank", "1")
    assert before.code == 2
    said = " ".join(before.err.split())
    assert "--data, --epochs" in said
    assert "put it behind sweep" in said
    for option, value in (("--rank", "4,x"), ("--seeds", "-1"), ("--rank", "0")):
        refused = perdure("reactions", "sweep", option, value, "--data", place / "table.csv")
        assert refused.code == 2
        assert "whole numbers" in refused.err
