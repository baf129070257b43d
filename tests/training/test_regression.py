"""Runs that regress yields: what is measured, on which rows; dropout; resuming; intervals; the boosted trees."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from perdure.config import validate
from perdure.errors import ConfigError, DataError
from perdure.evaluation.pooled import pooled
from perdure.models.heads import EnsembleHead
from perdure.recipes.reactions.foretell import (
    FLOOR,
    LEVELS,
    Foretold,
    Intervals,
    calibrate,
    foretell,
    method_of,
    sets_width,
)
from perdure.recipes.reactions.outputs import write_epochs
from perdure.recipes.reactions.trees import trees
from perdure.streams.reactions import Reaction, has_rdkit
from perdure.streams.reactions.encode import TOO_LONG, ReactionEncoder
from perdure.streams.spec import TaskSpec
from perdure.training.folder import FINAL, RunFolder
from perdure.training.interrupt import Interrupted
from perdure.training.plan import every_row, make_plan
from perdure.training.regression import pin_similarity
from perdure.training.run import Run
from perdure.training.settings import RunSettings
from perdure.training.telling import announcement
from perdure.types import Example, Task

HALIDES = {"chloride": "Clc1ccncc1", "bromide": "Brc1ccncc1", "iodide": "Ic1ccncc1"}
LIGANDS = {
    "none": "",
    "PPh3": "c1ccc(P(c2ccccc2)c2ccccc2)cc1",
    "PCy3": "C1CCC(P(C2CCCCC2)C2CCCCC2)CC1",
    "dppe": "CCP",
    "S": "CSC",
}
BASES = {"none": "", "NaOH": "[Na+].[OH-]", "KF": "[K+].[F-]", "Et3N": "CCN(CC)CC"}
COLUMNS = ("reaction_number", "reactant_1", "reactant_2", "ligand", "base", "reaction_smiles", "yield")


def reactions(halide: str, first: int = 0) -> list[dict[str, Any]]:
    """20 rows of a halide: each ligand with each base; a yield in percent that depends on all three."""
    rows = []
    at = list(HALIDES).index(halide) if halide in HALIDES else 7
    for i, ligand in enumerate(LIGANDS):
        for j, base in enumerate(BASES):
            compounds = [HALIDES.get(halide, halide), "OB(O)c1ccccc1", LIGANDS[ligand], BASES[base]]
            smiles = ".".join(filter(None, compounds)) + ">>c1ccc(-c2ccncc2)cc1"
            worth = 15 + 12 * ((i + at) % 5) + 9 * ((j * (at + 1)) % 4) + (i * j + at) % 5
            number = first + 20 * at + 4 * i + j
            rows.append(
                dict(zip(COLUMNS, (number, halide, "boronic acid", ligand, base, smiles, worth), strict=True))
            )
    return rows


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_model(path: Path, width: int = 16) -> Path:
    """A random BERT that reads SMILES letter by letter, between [CLS] and [SEP]."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    letters = ["[PAD]", "[CLS]", "[SEP]", "?", *"()[]+-=#.~>@/\\%0123456789BCFHIKNOPSacdehilnoprst"]
    tokenizer = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(letters), hidden_size=width, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    BertModel(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table of three tasks, a file of a fourth, and a model."""
    path = tmp_path_factory.mktemp("reactions")
    write_model(path / "model")
    write_table(path / "table.csv", [row for halide in HALIDES for row in reactions(halide)])
    write_table(path / "more.csv", reactions("CCOc1ccncc1"))
    return path


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERDURE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def settings_of(place: Path) -> Callable[..., RunSettings]:
    """Settings of a run on the table: `settings_of(strategy="replay", head={...}, reactions={...})`."""

    def make(reactions: dict[str, Any] | None = None, head: dict[str, Any] | None = None, **changes: Any) -> Any:
        values = {
            "model": str(place / "model"),
            "tuning": "head",
            "head": {"hidden": 12, **(head or {})},
            "stream": {"reactions": {"file": str(place / "table.csv"), **(reactions or {})}},
            "optimizer": {"type": "adamw", "lr": 5e-3},
            "batch_size": 8,
            "epochs": 2,
            "evaluation": {"each_epoch": True},
            "seed": 3,
        }
        return validate(RunSettings, {**values, **changes}, "test")

    return make


@pytest.fixture(scope="module")
def trained(settings_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """A run to its end; one for each of the settings."""
    done: dict[str, Run] = {}

    def get(**changes: Any) -> Run:
        name = json.dumps(changes, sort_keys=True)
        if name not in done:
            path = tmp_path_factory.mktemp("runs") / "run"
            done[name] = Run(make_plan(settings_of(**changes)), RunFolder(path))
            done[name].execute()
        return done[name]

    return get


def predicted(model: nn.Module, rows: Any) -> NDArray[np.float64]:
    """Row by row, in eval mode, without padding."""
    model.eval()
    with torch.no_grad():
        found = [model(row.x[None]) for row in rows]
    return np.array([float(getattr(one, "logits", one)) for one in found])


def true(rows: Any) -> NDArray[np.float64]:
    return np.array([float(row.y) for row in rows])


def by_hand(model: nn.Module, rows: Any) -> dict[str, float]:
    p, y = predicted(model, rows), true(rows)
    return {
        "loss": float((0.5 * (p - y) ** 2).mean()),
        "rmse": float(np.sqrt(((p - y) ** 2).mean())),
        "mae": float(np.abs(p - y).mean()),
        "r2": float(1 - ((p - y) ** 2).sum() / ((y - y.mean()) ** 2).sum()),
    }


def results(run: Run) -> dict[str, Any]:
    return dict(json.loads(run.folder.results.read_text()))


def test_losses_of_epochs_are_measured_on_held_out_rows(trained: Any) -> None:
    """The last epoch's are those of the model as it is at the end; the training loss is the steps' own mean.

    14 training rows are a batch of 8 and one of 6, so that a mean over batches is not one over rows.
    """
    run = trained(strategy="naive")
    tasks = run.plan.stages
    write_epochs(run.folder, [task.name for task in tasks])
    files = sorted(run.folder.path.glob("epoch_losses_task_*.csv"))
    assert [file.name for file in files] == [f"epoch_losses_task_0{i}.csv" for i in (1, 2, 3)]
    tables = [list(csv.DictReader(file.read_text().splitlines())) for file in files]
    assert all([row["epoch"] for row in table] == ["1", "2"] for table in tables)
    last = tables[2][-1]
    held, seen = by_hand(run.learner.model, tasks[2].evaluation), by_hand(run.learner.model, tasks[2].train)
    assert float(last["held_out_loss"]) == pytest.approx(held["loss"], rel=1e-4)
    assert float(last["held_out_rmse"]) == pytest.approx(held["rmse"], rel=1e-4)
    assert float(last["held_out_r2"]) == pytest.approx(held["r2"], rel=1e-4, abs=1e-4)
    assert seen["loss"] != pytest.approx(held["loss"], rel=0.01)  # the mistake: evaluation taken from training
    events = [json.loads(line) for line in run.folder.metrics.read_text().splitlines()]
    for stage, table in enumerate(tables, 1):
        for epoch, row in enumerate(table):
            steps = [e for e in events if (e["event"], e.get("stage"), e.get("epoch")) == ("step", stage, epoch)]
            assert [e["tokens"] for e in steps] == [8, 6]
            mean = (8 * steps[0]["loss"] + 6 * steps[1]["loss"]) / 14
            assert float(row["training_loss"]) == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("strategy", ["naive", "joint"])
def test_matrices_are_of_held_out_rows_and_training_ones_say_so(trained: Any, strategy: str) -> None:
    """The last rows of all matrices, by hand from the model that is there at the end."""
    run = trained(strategy=strategy)
    model, tasks = run.learner.model, run.plan.stream.evaluations
    assert [len(task.evaluation) for task in tasks] == [6, 6, 6]
    for task in tasks:
        for metric, value in by_hand(model, task.evaluation).items():
            assert last_row(run, metric)[task.name] == pytest.approx(value, rel=1e-4, abs=1e-4)
        for metric, value in by_hand(model, task.train).items():
            found = last_row(run, f"{metric}_training")[task.name]
            assert found == pytest.approx(value, rel=1e-4, abs=1e-4)
            assert found != pytest.approx(last_row(run, metric)[task.name], rel=1e-3)
    if strategy == "naive":  # a task that is still to come has no training rows yet
        values = run.scores.matrices["r2_training"].values
        assert np.isnan(values[0]).all()
        assert np.isnan(values[1]).tolist() == [False, True, True]
        assert np.isnan(values[2]).tolist() == [False, False, True]
        assert not np.isnan(run.scores.matrices["r2"].values).any()
    assert results(run)["main_metric"] == "r2"
    assert results(run)["metrics"]["r2_training"]["higher_is_better"] is True


def last_row(run: Run, metric: str) -> dict[str, float]:
    matrix = run.scores.matrices[metric]
    return dict(zip(matrix.tasks, matrix.values[-1], strict=True))


@pytest.mark.parametrize("strategy", ["naive", "joint"])
def test_pooled_metrics_are_over_all_rows(trained: Any, strategy: str) -> None:
    run = trained(strategy=strategy)
    tasks = run.plan.stream.evaluations
    for end, part in (("", "evaluation"), ("_training", "train")):
        rows = [row for task in tasks for row in getattr(task, part)]
        expected = by_hand(run.learner.model, rows)
        for metric in ("r2", "rmse", "mae"):
            found = results(run)["metrics"][metric + end]
            assert found["pooled"] == pytest.approx(expected[metric], abs=1e-5)
            assert found["pooled_by_stage"][-1] == found["pooled"]
            assert len(found["pooled_by_stage"]) == (3 if strategy == "naive" else 1)
    mean = np.mean(list(last_row(run, "r2").values()))
    assert results(run)["metrics"]["r2"]["pooled"] != pytest.approx(mean, abs=1e-3)
    first = tasks[0]
    if strategy == "naive":  # after the first stage one task was seen, which is pooled with itself
        stage = run.scores.matrices["r2"].values[1, 0]
        assert results(run)["metrics"]["r2"]["pooled_by_stage"][0] == pytest.approx(stage)
        assert pooled([1.0], [1.0], [true(first.evaluation)])["rmse"] == pytest.approx(1.0)


def test_a_task_without_held_out_rows_is_left_out_of_both(settings_of: Any, place: Path, tmp_path: Path) -> None:
    """One row cannot be split: the task is trained on, and neither score of it is there."""
    rows = [*reactions("chloride"), *reactions("bromide"), reactions("iodide")[0]]
    table = write_table(tmp_path / "small.csv", rows)
    run = Run(make_plan(settings_of(reactions={"file": str(table)}, epochs=1)), RunFolder(tmp_path / "run"))
    (told,) = [line for line in announcement(run.plan) if "too few rows" in line]  # what a table's reader noticed
    assert told.startswith("note: task ")
    run.execute()
    assert [len(task.evaluation) for task in run.plan.stages] == [6, 6, 0]
    metrics = results(run)["metrics"]
    for end, part in (("", "evaluation"), ("_training", "train")):
        scored = [row for task in run.plan.stages[:2] for row in getattr(task, part)]
        expected = by_hand(run.learner.model, scored)
        assert metrics["r2" + end]["pooled"] == pytest.approx(expected["r2"], abs=1e-5)


def test_the_size_of_evaluation_batches_changes_no_more_than_last_digits(trained: Any) -> None:
    """The mutant averages R² by batch."""
    run = trained(strategy="naive")
    rows = [row for task in run.plan.stages for row in task.evaluation]
    expected = by_hand(run.learner.model, rows)
    before = run.learner.settings
    try:
        for size in (1, 4, 5, 64):
            run.learner.settings = before.model_copy(update={"evaluation_batch_size": size})
            assert run.learner.score(rows) == pytest.approx(expected, abs=1e-5)
    finally:
        run.learner.settings = before
    batches = [by_hand(run.learner.model, rows[i : i + 5])["r2"] for i in range(0, len(rows), 5)]
    assert np.mean(batches) != pytest.approx(expected["r2"], abs=0.01)


def test_a_small_memory_cuts_no_task_short(trained: Any) -> None:
    """A memory of 5 rows beside 14 new ones: each of the 14 is trained on once an epoch."""
    for gradients in ("combined", "separate"):
        run = trained(strategy="replay", continual_strategy={"replay": {"capacity": 5, "gradients": gradients}})
        for number, task in enumerate(run.plan.stages, 1):
            lines = (run.folder.keys / f"stage-{number:03d}.jsonl").read_text().splitlines()
            counts = {(name, key): (new, kept) for name, key, new, kept, *_ in map(json.loads, lines)}
            own = {pair: new for pair, (new, _) in counts.items() if pair[0] == task.name}
            assert own == {(task.name, row.key): 2 for row in task.train}
            replayed = sum(kept for _, kept in counts.values())
            assert replayed == (0 if number == 1 else 28)
            assert len({pair for pair, (_, kept) in counts.items() if kept}) <= 5


def end_of(path: Path) -> dict[str, Any]:
    """What a run ends with but times."""
    found = json.loads((path / "results.json").read_text())
    told = ("metrics", "scores", "probe", "replay", "steps", "drift")
    state, _ = RunFolder(path).newest()
    assert state is not None
    events = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    log = [{k: v for k, v in e.items() if "second" not in k and k != "time"} for e in events]
    return {
        "results": json.dumps({name: found[name] for name in told}),
        "csv": {file.name: file.read_bytes() for file in path.glob("*.csv")},
        "learner": json.dumps(state["learner"], default=lambda tensor: tensor.tolist()),
        "head": next(path.glob("*/head.safetensors")).read_bytes(),
        "final": {p.name: p.read_bytes() for p in (path / "checkpoints" / FINAL).iterdir()},
        "log": [e for e in log if e["event"] in ("step", "epoch", "evaluation")],
    }


@pytest.mark.parametrize(
    ("tuning", "strategy", "step"), [("head", "replay", 9), ("head", "replay+ewc", 4), ("lora", "replay", 7)]
)
def test_killed_within_a_task_and_resumed_it_ends_the_same(
    settings_of: Any, Stop: Any, tmp_path: Path, tuning: str, strategy: str, step: int
) -> None:
    """12 steps, dropout on: stopped within a task or at an epoch's end; weights, memory and bytes are equal."""
    settings = settings_of(
        tuning=tuning,
        strategy=strategy,
        lora={"r": 2, "alpha": 4, "dropout": 0.1},
        continual_strategy={"replay": {"capacity": 7, "gradients": "separate"}, "ewc": {"strength": 3.0}},
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    Run(make_plan(settings), RunFolder(whole)).execute()
    with pytest.raises(Interrupted):
        Run(make_plan(settings), RunFolder(broken), Stop(step=step)).execute()
    state, _ = RunFolder(broken).newest()
    assert state is not None
    assert state["learner"]["steps"] == step
    torch.manual_seed(99)
    Run(make_plan(settings), RunFolder(broken)).execute()
    one, two = end_of(whole), end_of(broken)
    for part in one:
        assert one[part] == two[part], part


def learner_of(settings: RunSettings, path: Path) -> Run:
    """A run whose first task has begun."""
    run = Run(make_plan(settings), RunFolder(path))
    run.learner.begin_task(run.plan.stages[0], 0)
    return run


def test_dropout_acts_in_a_step(settings_of: Any, tmp_path: Path) -> None:
    """The same first step, but for which units are dropped; at 0 nothing is drawn."""

    def change(dropout: float, seed: int) -> torch.Tensor:
        run = learner_of(settings_of(head={"dropout": dropout}), tmp_path)
        run.learner.model.eval()  # the step itself turns dropout on
        before = nn.utils.parameters_to_vector(run.learner.model.head.parameters()).detach()  # type: ignore[union-attr]
        torch.manual_seed(seed)
        run.learner.step(run.plan.stages[0].train[:8])
        return nn.utils.parameters_to_vector(run.learner.model.head.parameters()).detach() - before  # type: ignore[union-attr]

    assert not torch.allclose(change(0.9, 0), change(0.0, 0))
    assert not torch.allclose(change(0.5, 0), change(0.5, 1))
    assert torch.equal(change(0.5, 0), change(0.5, 0))
    assert torch.equal(change(0.0, 0), change(0.0, 1))


def test_dropout_is_off_where_rows_are_scored(trained: Any) -> None:
    run = trained(strategy="naive")
    rows = run.plan.stages[0].evaluation
    run.learner.model.train()
    assert run.learner.score(rows) == run.learner.score(rows)
    assert run.learner.model.training
    one, two = (foretell(run.learner, rows, "none", 0, 0) for _ in range(2))
    assert (one.mean == two.mean).all()
    np.testing.assert_allclose(one.mean, predicted(run.learner.model, rows), atol=1e-6)
    assert not one.std.any()


@pytest.mark.parametrize("tuning", ["head", "full"])
def test_mc_dropout_spreads_as_drawing_by_hand_does(trained: Any, tuning: str) -> None:
    """Standard deviations of 4,000 draws through the whole model; each is uncertain by about 1/√8000."""
    run = trained(strategy="naive", tuning=tuning)
    rows = run.plan.stages[1].evaluation
    state = torch.get_rng_state()
    run.learner.model.eval()
    found = foretell(run.learner, rows, "mc-dropout", 4000, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module.training for module in run.learner.model.modules() if isinstance(module, nn.Dropout))
    model = run.learner.model.eval()
    for module in model.head.modules():
        module.training = isinstance(module, nn.Dropout)
    with torch.no_grad():
        x = rows[0].x[None]
        states = model.hidden(x).expand(4000, -1, -1)
        drawn = model.head(states, torch.ones(states.shape[:2], dtype=torch.bool)).double()
    model.eval()
    assert found.std[0] == pytest.approx(float(drawn.std()), rel=0.08)
    assert found.std.min() > 1e-3
    again, other = (foretell(run.learner, rows, "mc-dropout", 50, seed) for seed in (0, 1))
    assert (again.std == foretell(run.learner, rows, "mc-dropout", 50, 0).std).all()
    assert (again.std != other.std).any()
    assert (again.mean == other.mean).all()


@pytest.mark.parametrize(("strategy", "passes"), [("replay+ema", 2), ("packnet", 51)])
def test_only_a_strategys_own_way_through_the_model_is_taken_for_each_sample(
    trained: Any, monkeypatch: pytest.MonkeyPatch, strategy: str, passes: int
) -> None:
    """Of one batch: a pass for the prediction, one for what is dropped from, or one for each of 50 samples."""
    run = trained(strategy=strategy, tuning="full")
    rows, called = run.plan.stages[1].evaluation[:3], []
    right = type(run.learner.model).hidden
    monkeypatch.setattr(type(run.learner.model), "hidden", lambda model, x: (called.append(1), right(model, x))[1])
    foretell(run.learner, rows, "mc-dropout", 50, 0)
    assert len(called) == passes


def test_an_ensembles_spread_is_its_members(trained: Any) -> None:
    run = trained(strategy="naive", head={"ensemble": 3})
    head = run.learner.model.head
    assert isinstance(head, EnsembleHead)
    rows = [row for task in run.plan.stages for row in task.evaluation]
    assert method_of(run.plan.settings) == "ensemble"
    found = foretell(run.learner, rows, "ensemble", 0, 0)
    for i in (0, 7, 17):
        states = run.learner.model.hidden(rows[i].x[None])
        members = [one.eval()(states).item() for one in head.heads]
        assert found.mean[i] == pytest.approx(np.mean(members), abs=1e-6)
        assert found.std[i] == pytest.approx(np.std(members, ddof=1), abs=1e-6)
    shuffled = foretell(run.learner, rows[::-1], "ensemble", 0, 0)
    np.testing.assert_allclose(shuffled.mean[::-1], found.mean, atol=1e-6)


def test_how_the_spread_is_found(settings_of: Any) -> None:
    assert method_of(settings_of()) == "mc-dropout"
    assert method_of(settings_of(head={"type": "linear"})) == "none"
    assert method_of(settings_of(head={"dropout": 0.0})) == "none"
    assert method_of(settings_of(head={"ensemble": 2}, evaluation={"uncertainty": "mc-dropout"})) == "mc-dropout"
    assert method_of(settings_of(evaluation={"uncertainty": "none"})) == "none"
    with pytest.raises(ConfigError, match=r"ensemble needs head\.ensemble"):
        method_of(settings_of(evaluation={"uncertainty": "ensemble"}))
    for head in ({"type": "linear"}, {"dropout": 0.0}):
        with pytest.raises(ConfigError, match="mc-dropout needs a head with dropout"):
            method_of(settings_of(head=head, evaluation={"uncertainty": "mc-dropout"}))


def scores_as(values: list[float]) -> tuple[Foretold, NDArray[np.float64]]:
    """Rows whose scaled errors are these: the spread is 0, and the floor 0.02."""
    return Foretold(np.zeros(len(values)), np.zeros(len(values))), FLOOR * np.array(values)


def test_factors_by_hand() -> None:
    """Of 9 scores 1 … 9 the ⌈10 · level⌉-th: 0.9 the 9th, 0.5 the 5th, 0.1 the 1st; 0.95 would be a 10th."""
    factors = Intervals.fit(*scores_as([9, 2, 7, 4, 5, 6, 3, 8, 1])).factors
    assert list(factors) == list(LEVELS)
    for level, rank in ((0.9, 9), (0.85, 9), (0.5, 5), (0.45, 5), (0.1, 1), (0.8, 8)):
        assert factors[level] == pytest.approx(rank), level
    assert factors[0.95] == math.inf


@pytest.mark.parametrize("n", [1, 9, 19, 20, 39, 59, 199])
def test_ranks_are_exact(n: int) -> None:
    """As fractions: 20 · 0.55 is 11, and a little more in floating point."""
    factors = Intervals.fit(*scores_as(list(range(1, n + 1)))).factors
    for level in LEVELS:
        rank = math.ceil((n + 1) * Fraction(round(100 * level), 100))
        assert factors[level] == (pytest.approx(rank) if rank <= n else math.inf), level


def test_bounds_by_hand() -> None:
    """0.5 ± 2 · (0.08 + 0.02) = 0.3 to 0.7; 0.95 ± 2 · 0.02 ends at 0.99, ± 3 at 1; without a factor 0 to 1."""
    foretold = Foretold(np.array([0.5, 0.95]), np.array([0.08, 0.0]))
    lower, upper = Intervals({0.9: 2.0}).bounds(foretold)
    assert lower.tolist() == pytest.approx([0.3, 0.91])
    assert upper.tolist() == pytest.approx([0.7, 0.99])
    lower, upper = Intervals({0.9: math.inf, 0.8: 3.0}).bounds(foretold)
    assert (lower.tolist(), upper.tolist()) == ([0.0, 0.0], [1.0, 1.0])
    assert Intervals({0.8: 3.0}).bounds(foretold, 0.8)[1][1] == 1.0
    with pytest.raises(ConfigError, match=r"level 0.7: choose one of 0.9"):
        Intervals({0.9: 2.0}).bounds(foretold, 0.7)


def drawn(seed: int, count: int) -> tuple[Foretold, NDArray[np.float64]]:
    """Rows in which the spread says something of the error, but not enough."""
    rng = np.random.default_rng(seed)
    std = rng.uniform(0.01, 0.05, count)
    return Foretold(np.full(count, 0.5), std), np.clip(0.5 + rng.standard_t(3, count) * 2 * std, 0, 1)


def coverage(fit: Callable[[Foretold, NDArray[np.float64]], Intervals], n: int, level: float) -> float:
    """How many of 5 new rows are covered, over 600 draws of n rows to fit by and these."""
    covered = 0
    for seed in range(600):
        foretold, truth = drawn(seed, n + 5)
        made = fit(Foretold(foretold.mean[:n], foretold.std[:n]), truth[:n])
        lower, upper = made.bounds(Foretold(foretold.mean[n:], foretold.std[n:]), level)
        covered += int(((lower <= truth[n:]) & (truth[n:] <= upper)).sum())
    return covered / 3000


def plain_quantile(foretold: Foretold, truth: NDArray[np.float64]) -> Intervals:
    """Wrong: the ⌈n·level⌉-th score, as if the new row were one of those."""
    scores = np.sort(np.abs(truth - foretold.mean) / (foretold.std + FLOOR))
    return Intervals({level: float(scores[math.ceil(round(len(scores) * level, 9)) - 1]) for level in LEVELS})


@pytest.mark.parametrize(("n", "level"), [(19, 0.9), (10, 0.5), (24, 0.8)])
def test_intervals_cover_what_they_say(n: int, level: float) -> None:
    """The mean over draws is r / (n + 1) for the r-th score: 18, 6 and 20 of 20, 11 and 25.

    3,000 rows in 600 draws scatter by less than 0.015.
    """
    expected = math.ceil(round((n + 1) * level, 9)) / (n + 1)
    assert coverage(Intervals.fit, n, level) == pytest.approx(expected, abs=0.025)
    assert expected >= level


def test_too_small_a_quantile_is_caught() -> None:
    """Of 10 rows the 9th covers 9/11 = 0.82 of what should be 0.9; the rule takes the 10th: 10/11."""
    assert coverage(plain_quantile, 10, 0.9) < 0.86
    assert coverage(Intervals.fit, 10, 0.9) >= 0.89


def test_rows_that_set_the_width_do_not_test_it() -> None:
    """Errors of 0 fit factors of 0, which cover none of the others; were those tested too, half would be."""
    fits = np.arange(60) % 2 == 0
    truth = np.where(fits, 0.5, 0.9)
    foretold = Foretold(np.full(60, 0.5), np.full(60, 0.1))
    intervals, told = calibrate(foretold, truth, fits, "mc-dropout")
    assert intervals is not None
    assert set(intervals.factors.values()) == {0.0}
    assert told["observed"] == [0.0] * len(LEVELS)
    assert (told["rows"], told["fitted_on"], told["levels"]) == (30, 30, list(LEVELS))
    # Bare Gaussian intervals: an error of 4 standard deviations lies outside of all.
    assert told["observed_raw"] == [0.0] * len(LEVELS)
    near = np.where(fits, 0.5, 0.56)  # 0.6 standard deviations: within from 2Φ(0.6) − 1 = 0.451 on
    _, told = calibrate(foretold, near, fits, "ensemble")
    assert told["observed_raw"] == [float(level > 0.4515) for level in LEVELS]
    assert calibrate(foretold, near, fits, "none")[1]["observed_raw"] == []


def test_too_few_rows_make_no_intervals() -> None:
    foretold, truth = drawn(0, 60)
    for fits, there in ((np.arange(60) < 19, False), (np.arange(60) < 20, True), (np.ones(60, bool), False)):
        found = calibrate(foretold, truth, fits, "none")
        assert (found[0] is not None) is there
        assert bool(found[1]) is there


def test_half_of_the_held_out_rows_set_the_width() -> None:
    rows = [Example(str(i), "t") for i in range(2000)]
    chosen = {row.key for row in rows if sets_width(row, 1)}
    assert 0.45 < len(chosen) / 2000 < 0.55
    assert {row.key for row in reversed(rows) if sets_width(row, 1)} == chosen  # not by position
    assert {row.key for row in rows if sets_width(row, 2)} != chosen


def conditioned(count: int, worth: Callable[[int], float], **more: Callable[[int], str]) -> Task:
    """Rows with condition columns; the last quarter is held out."""
    rows = [
        Example(f"r{i}", "t", y=torch.tensor(worth(i)), fields={name: make(i) for name, make in more.items()})
        for i in range(count)
    ]
    cut = 3 * count // 4
    return Task("t", rows[:cut], rows[cut:])


def test_trees_find_what_the_conditions_say_and_nothing_else() -> None:
    """A yield that is its condition's alone is found; of one that no condition tells the mean is foretold."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    values = {"a": 0.1, "b": 0.4, "c": 0.9}
    clear = conditioned(
        240, lambda i: values["abc"[i % 3]], ligand=lambda i: "abc"[i % 3], base=lambda i: str(i % 2)
    )
    found = trees([clear])
    assert found is not None
    assert found["r2"] > 0.999
    assert found["rmse"] < 0.01
    assert found["mean_task_r2"] == pytest.approx(found["r2"])
    assert found["columns"] == ["base", "ligand"]
    blind = conditioned(240, lambda i: 0.2 + 0.6 * (i * i % 7 > 2), ligand=lambda i: "one")
    y, mean = true(blind.evaluation), true(blind.train).mean()
    expected = 1 - ((y - mean) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    told = trees([blind])
    assert told is not None
    assert told["r2"] == pytest.approx(expected, abs=1e-5)
    assert told["mae"] == pytest.approx(np.abs(y - mean).mean(), abs=1e-5)


def test_trees_of_a_small_table_are_parted_too() -> None:
    """Of 25 rows no leaf of 20 can be made, and the mean would be foretold: R² near 0."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    found = trees([conditioned(36, lambda i: 0.1 + 0.8 * (i % 2), ligand=lambda i: "ab"[i % 2])])
    assert found is not None
    assert found["r2"] > 0.99


def test_trees_do_not_train_on_copies_and_do_on_names_with_a_tilde() -> None:
    """Copies with other yields change nothing; were they trained on, the yields would be half as far apart."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    task = conditioned(160, lambda i: 0.1 + 0.8 * (i % 2), ligand=lambda i: "ab"[i % 2])
    copies = [row.but(key=f"{row.key}~1", y=1 - row.y) for row in task.train if row.y is not None]
    assert trees([Task("t", [*task.train, *copies], task.evaluation)]) == trees([task])
    named = [row.but(key=f"{row.key}~x") for row in task.train]
    assert trees([Task("t", named, task.evaluation)]) == trees([task])


def test_tasks_of_trees_are_scored_alone_too() -> None:
    """Both tasks have yields of their own in the same condition: pooled, trees foretell the mean of both."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    one = conditioned(80, lambda i: 0.2 + 0.1 * (i % 2), ligand=lambda i: "ab"[i % 2])
    two = Task("u", *[[row.but(task="u", y=row.y + 0.4) for row in part] for part in (one.train, one.evaluation)])  # type: ignore[operator]
    found = trees([one, two])
    assert found is not None
    # Each row is off by 0.2; of each task Σ(y − ȳ)² is 0.05² a row: R² is 1 − 0.04/0.0025 = −15.
    assert found["mean_task_r2"] == pytest.approx(-15, abs=0.01)
    assert found["mean_task_rmse"] == pytest.approx(0.2, abs=1e-3)
    assert found["r2"] == pytest.approx(1 - 0.04 / 0.0425, abs=1e-3)


def test_where_there_is_nothing_to_compare_there_are_no_trees(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    task = conditioned(20, lambda i: 0.5, ligand=lambda i: "a")
    assert trees([Task("t", task.train, [])]) is None
    assert trees([conditioned(20, lambda i: 0.5)]) is None
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    assert trees([task]) is None


def test_trees_of_tasks_whose_yields_are_all_equal() -> None:
    """No R² of a task is defined, and none is warned about."""
    pytest.importorskip("sklearn", reason="the baseline needs scikit-learn")
    found = trees([conditioned(40, lambda i: 0.5, ligand=lambda i: "ab"[i % 2])])
    assert found is not None
    assert math.isnan(found["mean_task_r2"])
    assert found["rmse"] == pytest.approx(0.0, abs=1e-6)


def test_reactions_are_encoded_as_the_tokenizer_writes_them(place: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    made = [
        Reaction("short", "t", "CC>>N", 0.25, {"ligand": "a"}),
        Reaction("long", "t", "C" * 30 + ">>N", 0.5, {}),
        Reaction("open", "t", "C>>O", None, {}),
    ]
    found, left_out = ReactionEncoder(tokenizer, 12).encode(made)
    assert left_out == ["long"]
    assert [row.key for row in found] == ["short", "open"]
    assert found[0].x is not None
    assert tokenizer.convert_ids_to_tokens(found[0].x.tolist()) == ["[CLS]", "C", "C", ">", ">", "N", "[SEP]"]
    assert (float(found[0].y), found[0].y.dtype) == (0.25, torch.float32)  # type: ignore[arg-type,union-attr]
    assert found[1].y is None
    assert found[0].fields == {"ligand": "a"}
    assert found[0].segments[0].text == "CC>>N"
    assert ReactionEncoder(tokenizer, 7).encode(made[:1])[1] == []
    assert ReactionEncoder(tokenizer, 6).encode(made[:1])[1] == ["short"]
    assert ReactionEncoder(tokenizer, 12).encode([]) == ([], [])


def test_a_plan_of_reactions(settings_of: Any) -> None:
    plan = make_plan(settings_of(strategy="joint"))
    assert plan.objective == "regression"
    assert [len(task.train) for task in plan.stages] == [42]
    assert [len(task.evaluation) for task in plan.stream.evaluations] == [6, 6, 6]
    assert plan.data["scale"] == "percent"
    assert [fact["train"]["kept"] for fact in plan.data["tasks"]] == [14, 14, 14]
    assert all(0 <= float(row.y) <= 1 for row in plan.stages[0].train)
    train = {row.segments[0].text for task in plan.stream for row in task.train}
    assert not train & {row.segments[0].text for task in plan.stream for row in task.evaluation}
    short = make_plan(settings_of(max_length=60))
    lengths = [len(row.x) for task in short.stages for row in task.train]
    assert max(lengths) <= 60
    facts = [fact["train"] for fact in short.data["tasks"]]
    assert sum(fact["left_out"].get(TOO_LONG, 0) for fact in facts) == 42 - len(lengths) > 0
    with pytest.raises(DataError, match="longer than 8 tokens"):
        make_plan(settings_of(max_length=8))


@pytest.mark.parametrize("tuning", ["head", "lora", "full"])
def test_what_is_trained(settings_of: Any, tuning: str) -> None:
    model = make_plan(settings_of(tuning=tuning)).model
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    head = {name for name in trained if name.startswith("head.")}
    assert head == {f"head.{name}" for name, _ in model.head.named_parameters()}
    rest = trained - head
    assert bool(rest) == (tuning != "head")
    if tuning == "lora":
        assert all("lora_" in name for name in rest)
    if tuning == "full":
        assert rest == {f"backbone.{name}" for name, _ in model.backbone.named_parameters()}
    assert (model.cache is not None) == (tuning == "head")


def test_first_weights_follow_the_seed(settings_of: Any) -> None:
    one, two, other = (make_plan(settings_of(seed=seed)).model for seed in (1, 1, 2))
    pairs = list(zip(one.parameters(), two.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(next(one.head.parameters()), next(other.head.parameters()))
    assert torch.equal(next(one.backbone.parameters()), next(other.backbone.parameters()))


def task_of(plan: Any, name: str) -> Task:
    return next(task for task in plan.stream if task.name == name)


def test_an_extension_is_read_by_the_tables_own_scale_and_split(
    settings_of: Any, place: Path, tmp_path: Path
) -> None:
    """Yields below 1.5 would pass for fractions by themselves; the table's are percents."""
    rows = [{**row, "yield": row["yield"] / 100} for row in reactions("CCOc1ccncc1")]
    poor = write_table(tmp_path / "poor.csv", rows)
    plan = make_plan(settings_of(extensions=[TaskSpec(name="poor", train=str(poor))]))
    task = task_of(plan, "poor")
    assert [t.name for t in plan.stages][-1] == "poor"
    assert (len(task.train), len(task.evaluation)) == (14, 6)
    worth = {str(row["reaction_number"]): row["yield"] / 100 for row in rows}
    assert {row.key: float(row.y) for row in (*task.train, *task.evaluation)} == pytest.approx(worth)
    assert {row.task for row in (*task.train, *task.evaluation)} == {"poor"}


def test_an_extension_leaks_no_row(settings_of: Any, place: Path, tmp_path: Path) -> None:
    """Rows that an earlier task is scored on are not trained on, and those it was trained on are not scored."""
    before = make_plan(settings_of())
    rows = [*reactions("chloride", 500), *reactions("CCOc1ccncc1")]
    for row in rows:
        row["reactant_1"] = "mixed"
    file = write_table(tmp_path / "mixed.csv", rows)
    plan = make_plan(settings_of(extensions=[TaskSpec(name="mixed", train=str(file))]))
    new = task_of(plan, "mixed")

    def texts(part: str, tasks: Any) -> set[str]:
        return {row.segments[0].text for task in tasks for row in getattr(task, part)}

    assert not texts("train", [new]) & texts("evaluation", before.stream)
    assert not texts("evaluation", [new]) & texts("train", before.stream)
    assert not texts("train", [new]) & texts("evaluation", [new])
    fact = plan.data["tasks"][-1]
    assert fact["name"] == "mixed"
    assert fact["train"]["overlapping"] > 0
    assert fact["train"]["kept"] == len(new.train)
    assert fact["evaluation"]["kept"] == len(new.evaluation)
    assert len(new.train) + fact["train"]["overlapping"] == 28
    assert len(new.evaluation) + fact["evaluation"]["overlapping"] == 12


def test_an_extension_of_several_tasks_or_with_rows_of_its_own_to_score(
    settings_of: Any, place: Path, tmp_path: Path
) -> None:
    both = write_table(tmp_path / "both.csv", [*reactions("CCOc1ccncc1"), *reactions("CSc1ccncc1", 300)])
    plan = make_plan(settings_of(extensions=[TaskSpec(name="both", train=str(both))]))
    names = [task.name for task in plan.stages]
    assert names[3:] == ["CCOc1ccncc1 + boronic acid", "CSc1ccncc1 + boronic acid"]
    held = write_table(tmp_path / "held.csv", reactions("CCOc1ccncc1", 700)[:5])
    spec = TaskSpec(name="more", train=str(place / "more.csv"), evaluation=str(held))
    task = task_of(make_plan(settings_of(extensions=[spec])), "more")
    assert (len(task.train), len(task.evaluation)) == (15, 5)
    with pytest.raises(DataError, match="holds 2 tasks"):
        make_plan(settings_of(extensions=[TaskSpec(name="both", train=str(both), evaluation=str(held))]))
    with pytest.raises(ConfigError, match="has a task 'chloride"):
        make_plan(settings_of(extensions=[TaskSpec(name="chloride + boronic acid", train=str(place / "more.csv"))]))
    with pytest.raises(DataError, match="no such file"):
        make_plan(settings_of(extensions=[TaskSpec(name="gone", train=str(tmp_path / "gone.csv"))]))


def test_an_erased_row_is_nowhere(settings_of: Any, place: Path) -> None:
    from perdure.order import fingerprint

    plan = make_plan(settings_of())
    gone = [plan.stages[0].train[0].key, plan.stages[1].evaluation[0].key]
    erased = tuple(map(fingerprint, gone))
    less = make_plan(settings_of(erased=erased))
    keys = {row.key for task in less.stream for row in (*task.train, *task.evaluation)}
    assert len(keys) == 58
    assert not keys & set(gone)
    assert len(every_row(plan, ())) == 60
    assert {row.key for row in every_row(plan, erased)} == keys


def test_settings_that_make_no_sense(settings_of: Any) -> None:
    with pytest.raises(ConfigError, match="soft prompt goes before text"):
        settings_of(tuning="soft-prompt")
    with pytest.raises(ConfigError, match="a regression has no general probe"):
        settings_of(probe={"name": "p", "train": "p.jsonl"})
    with pytest.raises(ConfigError, match=r"extensions\.x: .*the run's own columns hold"):
        settings_of(extensions=[{"name": "x", "train": "x.csv", "holdout": 0.2}])
    with pytest.raises(ConfigError, match="head is for regression"):
        validate(RunSettings, {"tuning": "head", "stream": {"tasks": [{"name": "a", "train": "a.jsonl"}]}}, "test")


def test_an_extension_is_read_again_as_it_was_written(settings_of: Any) -> None:
    """A run's config.yaml holds every setting of a task, also those that nobody gave."""
    settings = settings_of(extensions=[TaskSpec(name="x", train="x.csv")])
    assert validate(RunSettings, settings.model_dump(mode="json"), "config.yaml") == settings


def test_the_order_that_auto_stood_for_is_recorded(settings_of: Any) -> None:
    pinned = pin_similarity(settings_of(reactions={"order": "similarity"}))
    assert pinned.stream.reactions is not None
    assert pinned.stream.reactions.similarity == ("morgan" if has_rdkit() else "grams")
    assert pin_similarity(pinned) == pinned
    plain = settings_of()
    assert pin_similarity(plain) is plain
    plan = make_plan(settings_of(reactions={"order": "similarity"}))
    assert plan.settings.stream.reactions == pinned.stream.reactions


def test_hidden_states_are_worked_out_once_for_all_runs(
    settings_of: Any, Stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "kept"))
    said = []
    for number in range(2):
        display = Stop()
        Run(make_plan(settings_of(epochs=1)), RunFolder(tmp_path / str(number)), display).execute()
        said.append([line for line in display.said if "hidden states" in line])
    assert said[0] == [f"hidden states of 60 rows worked out, kept in {next((tmp_path / 'kept/hidden').iterdir())}"]
    assert said[1] == []
    assert (tmp_path / "0" / "scores.csv").read_bytes() == (tmp_path / "1" / "scores.csv").read_bytes()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PERDURE_CACHE", str(tmp_path / "file"))
    display = Stop()
    Run(make_plan(settings_of(epochs=1)), RunFolder(tmp_path / "2"), display).execute()
    (warning,) = [line for line in display.said if line.startswith("warning: hidden states were not kept")]
    assert "PERDURE_CACHE" in warning
    assert (tmp_path / "2" / "scores.csv").read_bytes() == (tmp_path / "1" / "scores.csv").read_bytes()


def test_a_table_of_known_rows_is_refused_and_a_new_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """New are other yields, other conditions, and what was erased; all paths are looked up as the run's are."""
    from perdure.order import fingerprint
    from perdure.training.regression import refuse_known

    row = {"key": "1", "rxn": "C>>N", "yield": 50, "pair": "a", "ligand": "x"}
    other = {"key": "2", "rxn": "O>>N", "yield": 0, "pair": "a", "ligand": "y"}
    write_table(tmp_path / "own.csv", [row, other])
    stream = {"reactions": {"file": "own.csv", "task_columns": ["pair"], "key_column": "key"}}
    values = {"model": "nano", "tuning": "head", "stream": stream, "data": str(tmp_path)}
    settings = validate(RunSettings, values, "test")
    monkeypatch.chdir(tmp_path.parent)

    def check(rows: list[dict[str, Any]], settings: RunSettings = settings) -> None:
        write_table(tmp_path / "new.csv", rows)
        refuse_known(settings, "new.csv", None)

    for known in ([row], [other, row], [{**row, "key": "9"}], [{**row, "rxn": "C>>N"}]):
        with pytest.raises(DataError, match=rf"new.csv: the run's tables have all rows of it \({len(known)}\)"):
            check(known)
    for change in ({"yield": 60}, {"ligand": "z"}, {"pair": "b"}, {"rxn": "P>>N"}):
        check([other, {**row, "key": "9", **change}])
    check([{**row, "key": "9"}], settings.model_copy(update={"erased": (fingerprint("1"),)}))
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        refuse_known(settings, "gone.csv", None)
