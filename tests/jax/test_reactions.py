"""`perdure reactions --backend jax` on a tiny Mistral and a table of 3 tasks: files, resuming, torch, refusals."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.training.test_regression import HALIDES, reactions, write_table

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = (
    "--epochs", "2", "--batch-size", "4", "--holdout", "0.5", "--lr", "0.005", "--heads", "2",
    "--set", "head.hidden=12", "--set", "evaluation.samples=5",
)  # fmt: skip
EWC = ("--setting", "ewc", "--set", "continual_strategy.ewc.strength=3")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Models are ported to a folder of these tests; what one run compiled, the next like it takes from disk."""
    import jax

    options = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PERDURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def write_mistral(path: Path) -> Path:
    """A random Mistral whose window (7) is shorter than any reaction, and a tokenizer of letters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", "?", *"()[]+-=#.~>@/\\%0123456789BCFHIKNOPSacdehilnoprst"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", pad_token="<pad>", bos_token="<s>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=len(letters), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=7, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of three tasks of 12 rows, a file of a fourth, and a model."""
    path = tmp_path_factory.mktemp("jax")
    write_mistral(path / "model")
    write_table(path / "table.csv", [row for halide in HALIDES for row in reactions(halide)[:12]])
    write_table(path / "more.csv", reactions("CCOc1ccncc1")[:12])
    return path


@pytest.fixture(scope="module")
def started(
    perdure: Callable[..., Any], place: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    """Start a run in a folder of its own: `started("--setting", "joint", out=…, backend="jax")`."""

    def start(*options: Any, out: Path | None = None, backend: str = "jax", pages: bool = False) -> Any:
        where = out or tmp_path_factory.mktemp("runs") / "run"
        given = ("--data", place / "table.csv", "--model", place / "model", "--out", where, "--backend", backend)
        if pages:
            return where, perdure("reactions", *given, *SMALL, *options)
        with (
            patch("perdure.recipes.run.write_pages", lambda folders: None),
            patch("perdure.recipes.reactions.jax_backend.write_pages", lambda folders: None),
        ):
            return where, perdure("reactions", *given, *SMALL, *options)

    return start


@pytest.fixture(scope="module")
def replayed(started: Callable[..., Any]) -> Path:
    """A run with all default settings but sizes; what was printed is in printed.txt."""
    from matplotlib.figure import Figure

    with patch.object(Figure, "savefig", lambda self, stream, **_: stream.write(b"\x89PNG\r\n\x1a\n")):
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


def said(done: Any) -> str:
    return " ".join(done.err.split())


def test_what_is_written(replayed: Path) -> None:
    for name in (
        "config.yaml", "metrics.jsonl", "results.json", "scores.csv", "r2_matrix.csv", "rmse_matrix.csv",
        "epoch_losses_task_01.csv", "epoch_losses_task_03.csv", "predictions_held_out.csv",
        "predictions_training.csv", "scores_r2_training.csv", "report.html", "model/head.safetensors",
    ):  # fmt: skip
        assert (replayed / name).is_file(), name
    found = results(replayed)
    assert found["backend"] == "jax"
    assert {"jax", "equinox", "torch"} <= found["versions"].keys()
    assert found["steps"] == 3 * 2 * 2
    # From the second task on a step of 4 or 2 new rows replays the one kept row (10 % of 18) as often.
    assert found["memory"] == 1
    assert found["replay"]["rows"] == 2 * 2 * 6
    assert found["parameters"]["trainable"] < found["parameters"]["total"]
    assert values(replayed).shape == (4, 3)
    assert np.isfinite(values(replayed, "rmse")).all()
    printed = " ".join((replayed / "printed.txt").read_text().split())
    assert "porting" in printed
    assert "hidden states of 36 rows worked out" in printed
    assert f"over all held-out rows: R² {found['metrics']['r2']['pooled']:.3f}" in printed
    rows = table(replayed / "predictions_held_out.csv")
    assert min(float(row["std"]) for row in rows) > 0
    for column, task in enumerate(found["tasks"]):
        own = [row for row in rows if row["task"] == task]
        error = np.array([float(row["true"]) - float(row["predicted"]) for row in own])
        assert values(replayed, "rmse")[-1, column] == pytest.approx(np.sqrt((error**2).mean()), abs=1e-4)


def test_report_and_predict_read_it(
    perdure: Callable[..., Any], replayed: Path, place: Path, tmp_path: Path
) -> None:
    """What is foretold of the table is what the run itself wrote of it; longer rows than it was trained on, too."""
    assert perdure("report", replayed, "--out", tmp_path / "page").code == 0
    done = perdure("predict", replayed, place / "table.csv", "-o", tmp_path / "p.csv")
    assert (done.code, done.err) == (0, ""), done.err
    written = {
        row["key"]: float(row["predicted"])
        for part in ("held_out", "training")
        for row in table(replayed / f"predictions_{part}.csv")
    }
    found = {row["key"]: float(row["predicted"]) / 100 for row in table(tmp_path / "p.csv")}
    assert found == pytest.approx(written, abs=1e-4)
    longer = [{**row, "reaction_smiles": "C" * 20 + row["reaction_smiles"]} for row in reactions("iodide")[:2]]
    done = perdure("predict", replayed, write_table(tmp_path / "long.csv", longer), "-o", tmp_path / "q.csv")
    assert (done.code, done.err) == (0, ""), done.err
    assert len(table(tmp_path / "q.csv")) == 2


def test_other_commands_take_it_up(
    perdure: Callable[..., Any], replayed: Path, place: Path, tmp_path: Path
) -> None:
    """Its model is scored as it was; it has no words to generate."""
    run = tmp_path / "run"
    shutil.copytree(replayed, run)
    assert perdure("evaluate", run).code == 0
    again = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))["scores"]
    assert [found["rmse"] for found in again.values()] == pytest.approx(list(values(run, "rmse")[-1]), abs=1e-6)
    refused = perdure("generate", run, "CC")
    assert refused.code == 2
    assert "perdure predict" in refused.err


def test_a_fourth_task_is_learnt_behind_three(
    perdure: Callable[..., Any], replayed: Path, place: Path, tmp_path: Path
) -> None:
    """Rows of the matrix before it stay, to the last digit."""
    run = tmp_path / "run"
    shutil.copytree(replayed, run)
    with patch("perdure.recipes.reactions.jax_backend.write_pages", lambda folders: None):
        done = perdure("extend", run, "--task", place / "more.csv", "--name", "ether")
    assert (done.code, done.err) == (0, ""), done.err
    old, new = values(replayed, "loss"), values(run, "loss")
    assert new.shape == (5, 4)
    np.testing.assert_array_equal(new[:4, :3], old)
    assert new[4, 3] < new[3, 3]
    assert results(run)["backend"] == "jax"


@pytest.mark.parametrize(
    "options",
    [
        ("--setting", "sequential", "--tuning", "lora", "--rank", "2", "--set", "optimizer.type=adafactor"),
        (
            "--memory",
            "all",
            "--gradient",
            "separate",
            "--epochs",
            "1",
            "--tuning",
            "full",
            "--precision",
            "bf16",
            "--set",
            "schedule.type=linear",
        ),
    ],
    ids=["sequential-lora", "replay-full"],
)
def test_settings(started: Callable[..., Any], options: tuple[str, ...]) -> None:
    run, done = started(*options)
    assert (done.code, done.err) == (0, ""), done.err
    assert values(run).shape == (4, 3)
    loss = values(run, "loss")
    assert loss[-1, -1] < loss[0, -1]
    if "all" in options:
        assert results(run)["replay"]["rows"] == 2 * 6  # as many as new ones, of two tasks
    if "lora" in options:
        assert (run / "adapter" / "lora.safetensors").is_file()
        assert any(stage["groups"]["backbone"]["change"] > 0 for stage in results(run)["drift"])


@pytest.mark.parametrize("options", [(), EWC], ids=["replay", "ewc"])
def test_stopped_and_resumed_it_ends_with_the_same_bytes(
    started: Callable[..., Any], replayed: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Ctrl-C in the 7th of 12 steps, within the second task's second epoch."""
    from perdure.jax import Learner

    whole = replayed if not options else started(*options)[0]
    step, taken = Learner.step, []

    def counted(self: Any, *given: Any) -> Any:
        taken.append(1)
        if len(taken) == 7:
            signal.raise_signal(signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(Learner, "step", counted)
    run, done = started(*options)
    assert done.code == 130
    assert "--resume" in done.err + done.out
    assert not (run / "results.json").exists()
    assert "add --resume" in said(started(*options, out=run)[1])
    other = started(*options, "--resume", out=run, backend="torch")[1]
    assert (other.code, "of the jax backend" in said(other)) == (2, True)
    _, again = started(*options, "--resume", out=run)
    assert again.code == 0, again.err
    assert len(taken) == 12
    for name in ("predictions_held_out.csv", "predictions_training.csv", "scores.csv", "epoch_losses_task_02.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    weights = [path.relative_to(run) for path in run.rglob("*.safetensors")]
    assert len(weights) >= 2
    for weight in weights:
        assert (run / weight).read_bytes() == (whole / weight).read_bytes(), weight
    assert results(run)["scores"] == results(whole)["scores"]
    _, finished = started(*options, "--resume", out=run)
    assert (finished.code, "nothing to do" in finished.out) == (0, True)


def test_an_erased_row_was_never_there(
    perdure: Callable[..., Any], started: Callable[..., Any], replayed: Path, place: Path, tmp_path: Path
) -> None:
    """By the backend that trained it; a tenth of one row less is another memory, so all tasks are trained again."""
    run, data = tmp_path / "run", place / "table.csv"
    shutil.copytree(replayed, run)
    gone = str(reactions(list(HALIDES)[1])[1]["reaction_number"])
    with patch("perdure.recipes.erase.write_pages", lambda folders: None):
        done = perdure("erase", run, "--key", gone)
    assert (done.code, done.err) == (0, ""), done.err
    recorded = results(run)
    assert recorded["backend"] == "jax"
    rows = [row for row in table(data) if row["reaction_number"] != gone]
    assert len(rows) == 35
    less = write_table(tmp_path / "less.csv", rows)
    clean, done = started("--data", less, out=tmp_path / "clean")
    assert done.code == 0, done.err
    for name in ("model/head.safetensors", "r2_matrix.csv", "predictions_held_out.csv"):
        assert (run / name).read_bytes() == (clean / name).read_bytes(), name
    again = perdure("predict", run, data, "-o", tmp_path / "p.csv")
    assert again.code == 0, again.err


def test_torch_scores_the_same_rows_alike(
    started: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With torch's head copied, both begin with the same scores, go the same way, and hold the same rows out."""
    from perdure.jax.heads import from_torch_names
    from perdure.training import regression

    made: list[Any] = []
    original = regression.make_head

    def kept(*given: Any, **more: Any) -> Any:
        made.append(original(*given, **more))
        made.append({name: value.numpy().copy() for name, value in made[0].state_dict().items()})
        return made[0]

    monkeypatch.setattr(regression, "make_head", kept)
    alike = ("--setting", "sequential", "--epochs", "1", "--precision", "fp32", "--set", "head.dropout=0")
    one, done = started(*alike, backend="torch")
    assert done.code == 0, done.err
    import perdure.jax

    monkeypatch.setattr(perdure.jax, "MHAR", lambda *given: from_torch_names(made[1], 2), raising=False)
    two, done = started(*alike)
    assert done.code == 0, done.err
    for metric in ("r2", "rmse", "loss"):
        assert values(one, metric).shape == values(two, metric).shape == (4, 3)
        np.testing.assert_allclose(values(one, metric)[0], values(two, metric)[0], atol=1e-3)
    # Torch keeps hidden states in float16, and Adam's first steps are much alike whatever the gradient's size.
    np.testing.assert_allclose(values(one, "rmse"), values(two, "rmse"), atol=6e-3)
    assert np.abs(np.diff(values(one, "rmse"), axis=0)).max() > 0.05
    held = [[row["key"] for row in table(run / "predictions_held_out.csv")] for run in (one, two)]
    assert held[0] == held[1]
    assert results(one)["stages"] == results(two)["stages"]
    assert results(one).keys() | {"backend"} == results(two).keys()


REFUSALS = {
    "setting": (["--setting", "agem"], "of the jax backend 'agem'. Known: ewc, joint, replay, sequential."),
    "chain": (["--setting", "replay+ewc"], "The torch backend has the others"),
    "head": (["--set", "head.type=mean"], "head.type mean: the jax backend has one head, mhar"),
    "ensemble": (["--ensemble", "2"], "head.ensemble 2"),
    "precision": (["--precision", "fp16"], "precision fp16: the jax backend has fp32 and bf16"),
    "optimizer": (["--set", "optimizer.type=sgd"], "adamw and adafactor"),
    "memory in bytes": (["--memory", "2KB"], "counts rows; give a number of them, a share such as 10%, or all"),
    "checkpointing": (["--set", "gradient_checkpointing=true"], "gradient_checkpointing (with a frozen backbone)"),
    "scoring": (["--set", "evaluation_batch_size=4"], "evaluation_batch_size: the jax backend has no such setting"),
    "strategy": (["--set", "continual_strategy.replay.unit=tokens"], "takes capacity, gradients, ratio"),
    "heads": (["--heads", "3"], "of up to 32 heads these would do: 1, 2, 4, 8"),
    "memory": (["--setting", "sequential", "--memory", "10%"], "sequential keeps no rows"),
    "model": (["--model", "minilm"], "--model minilm: no such folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_and_how(started: Callable[..., Any], tmp_path: Path, name: str) -> None:
    options, words = REFUSALS[name]
    run, done = started(*options, out=tmp_path / "run")
    assert done.code == 2, done.err
    assert words in said(done)
    assert "Traceback" not in done.err
    assert not run.exists()


def test_what_model_is_needed(perdure: Callable[..., Any], place: Path, tmp_path: Path) -> None:
    given = ("reactions", "--data", place / "table.csv", "--backend", "jax", "--out", tmp_path / "run")
    done = perdure(*given)
    assert (done.code, "needs --model FOLDER: a Mistral or a Llama" in said(done)) == (2, True)
    bare = tmp_path / "bare"
    shutil.copytree(place / "model", bare, ignore=shutil.ignore_patterns("tokenizer*"))
    done = perdure(*given, "--model", bare)
    assert (done.code, "no tokenizer here, which reaction SMILES need" in said(done)) == (2, True)
    (other := tmp_path / "other").mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (other / "model.safetensors").write_bytes((place / "model" / "model.safetensors").read_bytes())
    done = perdure(*given, "--model", other)
    assert (done.code, "model_type 'bert': not an architecture read here" in said(done)) == (2, True)
