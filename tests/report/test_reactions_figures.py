"""The figures of runs on reactions: their values are those of the files, and training rows are no result."""

import csv
import itertools
import json
import math
import re

import numpy as np
import pytest
from matplotlib.patches import FancyBboxPatch
from matplotlib.text import Text

from perdure.errors import RunError
from perdure.report import matrices, plots, reactions, read_run, read_runs, words, write_plots, write_report
from perdure.report import reactions_plots as drawn
from perdure.report.canvas import style
from perdure.report.reactions_overview import ANSWER, BODY, draw_overview
from perdure.report.reactions_read import read_calibration, read_losses, read_predictions
from perdure.report.reactions_sweep import SweepRow, draw_sweep, short_count

PAIRS = [
    f"{one} + {two}"
    for two in ("2a, Boronic Acid", "2b, Boronic Ester", "2c, Trifluoroborate")
    for one in ("6-chloroquinoline", "6-Bromoquinoline", "6-triflatequinoline", "6-Iodoquinoline")
] + [
    "6-quinoline-boronic acid hydrochloride + 2d, Bromide",
    "Potassium quinoline-6-trifluoroborate + 2d, Bromide",
    "6-Quinolineboronic acid pinacol ester + 2d, Bromide",
]
METRICS = ("loss", "loss_training", "rmse", "rmse_training", "r2", "r2_training")
COLUMNS = ("key", "task", "true", "predicted", "std", "lower", "upper", "calibration")
# Σ(p − y)² = 0.01 + 0 + 0.04 + 0 = 0.05 and ȳ = 0.5, Σ(y − ȳ)² = 0.25 + 0.01 + 0.01 + 0.25 = 0.52 over the four.
ROWS = (
    ("k0", "a", 0.0, 0.1, 0.1, 0.05, 0.3, 0),
    ("k1", "a", 0.4, 0.4, 0.1, 0.2, 0.6, 0),
    ("k2", "b", 0.6, 0.8, 0.1, 0.7, 0.9, 1),
    ("k3", "b", 1.0, 1.0, "", "", "", 0),
)


def scored(row, column, metric, joint):
    """R²: −4 before training, 0.9 when learnt, 3 less each stage from then on; the others lie between 0 and 1."""
    age = row - (1 if joint else column + 1)
    fit = -4.0 if age < 0 else 0.9 - 3.0 * age
    return fit if metric.startswith("r2") else 0.05 + 0.01 * (1 - fit)


def write(path, head, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


@pytest.fixture
def make_reactions(make_run):
    """A run folder as one on reactions leaves it."""

    def make(name="naive", tasks=("a", "b", "c"), *, joint=False, metrics=METRICS):
        path = make_run(
            name, tasks, metrics=metrics, joint=joint, scored=scored, main_metric="r2", probe={},
            data={task: {"train": 269, "evaluation": 115} for task in tasks},
        )  # fmt: skip
        results = json.loads((path / "results.json").read_text())
        stages = results["stages"]
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (path / "metrics.jsonl").write_text("".join(line for line in lines if '"probe"' not in line))
        for metric, found in results["metrics"].items():
            if not metric.startswith("loss"):
                found["pooled_by_stage"] = [0.5 - 0.125 * t for t in range(len(stages))]
                found["pooled"] = found["pooled_by_stage"][-1]
        (path / "results.json").write_text(json.dumps(results))
        for metric, name in (("r2", "r2_matrix"), ("rmse", "rmse_matrix"), ("r2_training", "scores_r2_training")):
            if metric in results["scores"]:
                values = [["" if x is None else x for x in row] for row in results["scores"][metric]["values"]]
                rows = [[label, *row] for label, row in zip(["start", *stages], values, strict=True)]
                write(path / f"{name}.csv", ["after", *tasks], rows)
        for name in ("held_out", "training"):
            write(path / f"predictions_{name}.csv", COLUMNS, ROWS)
        coverage = {
            "format": 1, "method": "mc-dropout", "levels": [0.5, 0.9], "observed_raw": [0.25, 0.5],
            "observed": [0.5, 0.875], "rows": 64, "factors": {"0.9": 1.5},
        }  # fmt: skip
        (path / "calibration.json").write_text(json.dumps(coverage))
        for stage in range(1, len(stages) + 1):
            rows = [[epoch, 0.1 / epoch, 0.2 / epoch, 0.3, 0.25 * stage] for epoch in (1, 2)]
            head = ["epoch", "training_loss", "held_out_loss", "held_out_rmse", "held_out_r2"]
            write(path / f"epoch_losses_task_{stage:02d}.csv", head, rows)
        return path

    return make


def figure_of(draw, *arguments):
    with style():
        figure = draw.__wrapped__(*arguments)
        figure.canvas.draw()
    return figure


def test_parity_shows_the_rows_and_how_well_they_fit(make_reactions):
    """R² = 1 − 0.05 / 0.52 = 0.904, RMSE = √(0.05 / 4) = 0.112; of a: 1 − 0.01 / 0.08 = 0.88 and √0.005 = 0.071.

    Of the rows with an interval whose width they did not set, k0 lies outside (0 < 0.05) and k1 inside: 50 %.
    """
    found = read_predictions(make_reactions() / "predictions_held_out.csv")
    figure = figure_of(drawn.parity, found)
    whole, a, b = figure.axes
    assert whole.get_title() == "all 4 held-out rows\nR² 0.90, RMSE 0.112"
    assert a.get_title() == "a\nR² 0.88, RMSE 0.071, n 2"
    diagonal, points = a.lines
    assert list(diagonal.get_xdata()) == list(diagonal.get_ydata()) == [0, 1]
    assert (list(points.get_xdata()), list(points.get_ydata())) == ([0.0, 0.4], [0.1, 0.4])
    assert [s.tolist() for s in a.collections[0].get_segments()] == [
        [[0.0, 0.05], [0.0, 0.3]], [[0.4, 0.2], [0.4, 0.6]],
    ]  # fmt: skip
    assert not b.collections  # one row set the width, the other has no interval
    assert "they hold 50.0 % of the 2 rows" in figure.get_suptitle()


def test_parity_of_training_rows_says_that_it_is_no_result(make_reactions):
    figure = figure_of(drawn.parity, read_predictions(make_reactions() / "predictions_training.csv"), True)
    assert "TRAINED ON\nThis says nothing of what was learnt" in figure.get_suptitle()
    assert figure.axes[0].get_title().startswith("all 4 rows that were trained on")
    assert not any(ax.collections for ax in figure.axes)


def test_calibration_holds_both_curves_and_the_diagonal(make_reactions):
    figure = figure_of(drawn.calibration, read_calibration(make_reactions() / "calibration.json"))
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert lines == {
        "as they should": [[0, 0], [1, 1]],
        "raw: Gaussian, from the bare std": [[0.5, 0.25], [0.9, 0.5]],
        "calibrated": [[0.5, 0.5], [0.9, 0.875]],
    }
    assert figure.get_suptitle().startswith("Intervals from MC dropout on 64 held-out rows")


def test_intervals_without_a_std_have_no_raw_curve(make_reactions):
    path = make_reactions() / "calibration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"method": "none", "observed_raw": [None, None]}))
    labels = [line.get_label() for line in figure_of(drawn.calibration, read_calibration(path)).axes[0].lines]
    assert labels == ["as they should", "calibrated"]


def test_losses_have_a_panel_for_each_stage(make_reactions):
    figure = figure_of(drawn.epoch_losses, read_losses(make_reactions()), ("a", "b", "c"))
    training, held_out = figure.axes[1].lines
    assert training.get_xydata().tolist() == [[1, 0.1], [2, 0.05]]
    assert held_out.get_xydata().tolist() == [[1, 0.2], [2, 0.1]]
    assert [ax.get_title() for ax in figure.axes] == [f"{t}\nR² {0.25 * i:.2f}, RMSE 0.300" for i, t in
                                                      enumerate("abc", 1)]  # fmt: skip


def test_a_matrix_of_r2_ends_its_colours_and_says_so(make_reactions):
    """Naive of 3 tasks has −4 three times before training, then 2 and 1 above the diagonal; below it 0.9 − 3 and
    − 6, i.e. −2.1 twice and −5.1: nine values below −1 of twelve. The last column is what was pooled."""
    (run,) = read_runs([make_reactions()])
    figure = figure_of(matrices.heat_map, [run], "r2")
    image = figure.axes[0].images[0]
    assert image.get_clim() == (-1, 1)
    assert image.get_array()[1:, 3].tolist() == [0.5, 0.375, 0.25]
    assert image.get_array()[:, :3].tolist() == [list(row) for row in run.scores["r2"].values]
    assert "Colours end at −1: 9 values lie beyond" in figure.get_suptitle()
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:3] == ["−4.00"] * 3
    assert texts[-2:] == ["0.90", "0.25"]


def test_axes_of_r2_end_where_it_says_no_more(make_reactions):
    """Of naive's 12 values 9 lie below −1; its first two tasks end there, at −5.1 and −2.1."""
    runs = read_runs([make_reactions(), make_reactions("joint", joint=True)])
    curves = figure_of(plots.curves, runs[:1], "r2")
    assert curves.axes[0].get_ylim()[0] == pytest.approx(-1.05)
    assert "9 of 12 values lie below" in curves.get_suptitle()
    lost = figure_of(plots.lost, runs[:1], "r2").axes[0]
    assert lost.get_xlim()[0] == -1
    assert [line.get_ydata()[0] for line in lost.lines if line.get_marker() == "<"] == [0, 1]
    assert [text.get_text() for text in lost.texts] == ["−6.00", "−3.00", "0.00"]
    compared = figure_of(plots.comparison, runs, "r2")
    assert compared.axes[0].get_title() == "over all rows ↑"
    assert compared.axes[-1].lines[0].get_ydata().tolist() == [0.5, 0.375, 0.25]


def test_figures_follow_the_files_that_are_there(make_reactions):
    path = make_reactions()
    names = {figure.name for figure in reactions.draw_reactions(path)}
    assert names == set(reactions.FIGURES) == {file.name for file in (path / "plots").iterdir()}
    kept = {"predictions_held_out.csv": "parity.png"}
    for file in [*path.glob("*.csv"), path / "calibration.json", path / "results.json"]:
        if file.name not in kept:
            file.unlink()
    assert {figure.name for figure in reactions.draw_reactions(path)} == set(kept.values())
    assert {file.name for file in (path / "plots").iterdir()} == set(kept.values())
    write(path / "predictions_held_out.csv", COLUMNS, [])
    assert reactions.draw_reactions(path) == []


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("predictions_held_out.csv", "key,task,true\nk,a,0.5\n", "no column 'predicted'"),
        ("predictions_held_out.csv", ",".join(COLUMNS) + "\nk,a,x,1,,,,0\n", "line 2: true must be a number or"),
        ("predictions_training.csv", ",".join(COLUMNS) + "\nk,a,1,,,,,0\n", "line 2: predicted must be a number"),
        ("predictions_training.csv", ",".join(COLUMNS) + "\nk,a,1,1,,,,2\n", "line 2: calibration must be 0 or 1"),
        ("predictions_training.csv", ",".join(COLUMNS) + "\nk,a,1\n", "line 2: must have 8 cells"),
        ("calibration.json", "{", "not as perdure writes it"),
        ("calibration.json", "[]", "not as perdure writes it"),
        ("calibration.json", '{"format": 2}', "format 2"),
        ("calibration.json", '{"format":1,"method":"x","levels":[0.5],"observed":[],"rows":3}', "1 levels"),
        ("epoch_losses_task_01.csv", "epoch,training_loss\n1,2\n", "no column 'held_out_loss'"),
        ("r2_matrix.csv", "after,a\nstart,1,2\n", "line 2: must have 2 cells, got 3"),
        ("rmse_matrix.csv", "a,b\n", "must begin with 'after'"),
        ("rmse_matrix.csv", "after,a\nstart,one\n", "line 2: a must be a number or empty, got 'one'"),
    ],
)
def test_a_malformed_file_is_named(make_reactions, name, text, says):
    path = make_reactions()
    for other in [*path.glob("*.csv"), path / "calibration.json"]:
        # A matrix says what the stages are called whose losses are drawn.
        if not (name.endswith("matrix.csv") and other.name.startswith("epoch_losses")):
            other.unlink()
    (path / name).write_text(text)
    with pytest.raises(RunError, match=re.escape(name)) as caught:
        reactions.draw_reactions(path)
    assert says in str(caught.value)


def test_training_metrics_are_never_the_headline(make_reactions):
    """They are no main metric, open no sentence, have no forgetting on the page, and no figure of it."""
    path = make_reactions(tasks=("a", "b"))
    run = read_run(path)
    assert list(run.scores) == ["r2", "rmse", "loss", "r2_training", "rmse_training", "loss_training"]
    assert run.held_out == ("r2", "rmse", "loss")
    assert [words.label(m) for m in list(run.scores)[3:]] == [
        "R² on training rows", "RMSE on training rows", "loss on training rows",
    ]  # fmt: skip
    assert words.main_metric(["r2_training", "rmse"]) == "rmse"
    assert words.main_metric(["r2_training"]) == "loss"
    names = {file.name for file in write_plots(path)}
    assert {n for n in names if n.endswith("_training.png")} == {
        "matrix_r2_training.png", "matrix_rmse_training.png", "parity_training.png",
    }  # fmt: skip
    page = write_report([path], path).read_text()
    before, _, after = page.partition("<h2>On rows that were trained on</h2>")
    assert "on training rows" not in before
    section = after.partition("What the columns mean")[0]
    assert "forgetting" not in section
    assert "backward" not in section
    assert "R² on training rows of each run" in section
    assert "its R² is 0.375" in before
    assert "over all rows ↑" in before
    for title in reactions.TITLES.values():
        assert f"<h3>{title}</h3>" in before


def test_a_run_with_training_scores_alone_has_no_sentence(make_reactions):
    path = make_reactions(metrics=("r2_training", "loss_training"))
    assert words.sentences(read_runs([path])) == []
    assert "Nothing was measured yet." in write_report([path], path).read_text()


def test_an_unfinished_run_knows_which_way_training_metrics_are_better(make_reactions):
    path = make_reactions()
    (path / "results.json").unlink()
    tables = read_run(path).scores
    assert {m: table.higher_is_better for m, table in tables.items()} == {m: m.startswith("r2") for m in tables}
    assert next(iter(tables)) == "r2"


def test_against_joint_all_rows_together_are_compared(make_reactions):
    """Pooled R² is 0.25 after naive's third stage, 0.5 after joint's only one."""
    runs = read_runs([make_reactions(), make_reactions("joint", joint=True)])
    assert words.sentences(runs)[-1] == "naive's R² over all rows is −0.250 against joint's."


def test_pairs_keep_the_beginnings_of_both_sides():
    assert words.short(PAIRS, 28)[0] == "6-chloroqui… + 2a, Boronic…"
    for width in (18, 24, 28, 30):
        short = words.short(PAIRS, width)
        assert len(set(short)) == 15
        assert max(map(len, short)) <= width
        assert not any("(2)" in name for name in short)


def test_values_of_r2_far_below_zero_lose_decimals_and_others_keep_theirs():
    values = [0.8765, -4.321, -12.34, -234.5]
    digits = words.decimals("r2", values, unit=False)
    assert [words.value("r2", x, unit=False, digits=digits) for x in values] == ["0.88", "−4.32", "−12.3", "−234"]
    assert words.decimals("rmse", [0.1234], unit=False) == 3


@pytest.mark.parametrize("num", [1, 2, 5, 15])
def test_no_text_of_parity_and_losses_overlaps(make_reactions, num):
    path = make_reactions(tasks=PAIRS[:num])
    rng = np.random.default_rng(0)
    rows = [[f"{i}-{t}", t, y, y, "", "", "", 0] for t in PAIRS[:num] for i, y in enumerate(rng.random(20))]
    write(path / "predictions_held_out.csv", COLUMNS, rows)
    figures = [
        figure_of(drawn.parity, read_predictions(path / "predictions_held_out.csv")),
        figure_of(drawn.epoch_losses, read_losses(path), PAIRS[:num]),
    ]
    for figure in figures:
        titles = [ax.title for ax in figure.axes]
        assert len(titles) == (num + (num > 1 and figure is figures[0]))
        assert_apart([*titles, figure._suptitle])
        assert all(figure.bbox.padded(1).contains(*text.get_window_extent().min) for text in titles)


def test_the_overview_has_every_layer_and_no_text_on_another():
    with style():
        figure = draw_overview()
        figure.canvas.draw()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    said = [text.get_text() for text in texts]
    assert all(said.count(layer) >= (BODY + ANSWER).count(layer) for layer in BODY + ANSWER)
    assert_apart(texts)
    boxes = [patch.get_window_extent() for patch in figure.axes[0].patches if isinstance(patch, FancyBboxPatch)]
    for text in texts:
        box = text.get_window_extent()
        assert all(figure.bbox.contains(*corner) for corner in (box.min, box.max)), text
        for frame in boxes:  # within a box or beside it, never across its edge
            inside = frame.contains(*box.min) and frame.contains(*box.max)
            assert inside or not frame.overlaps(box), text


def test_a_sweep_shows_means_with_intervals_and_the_line_of_full(tmp_path):
    """Rank 4: 0.6 and 0.8 have mean 0.7 and s = 0.1·√2, so half = 12.706 · s / √2 = 1.2706; rank 8 has one seed."""
    rows = [
        SweepRow(8, 0, 0.75, 0.125, 20_000), SweepRow(4, 0, 0.6, 0.25, 10_000), SweepRow(4, 1, 0.8, 0.25, 10_000),
        SweepRow(None, 0, 0.9, 0.1, 22_713_216),
    ]  # fmt: skip
    with style():
        figure = draw_sweep(rows)
        figure.canvas.draw()
    r2, rmse = figure.axes[:2]
    assert list(r2.lines[0].get_ydata()) == [0.9, 0.9]
    means, _, (whiskers,) = r2.containers[0].lines
    np.testing.assert_allclose(means.get_xydata(), [[4, 0.7], [8, 0.75]])
    np.testing.assert_allclose(rmse.containers[0].lines[0].get_xydata()[:, 1], [0.25, 0.125])
    ends = np.array([segment[:, 1] for segment in whiskers.get_segments()], float)
    np.testing.assert_allclose(ends, [[0.7 - 1.2706, 0.7 + 1.2706], [0.75, 0.75]], atol=1e-4)
    top = r2.child_axes[0]
    assert [label.get_text() for label in top.get_xticklabels()] == ["10.0k", "20.0k"]
    assert "1 to 2 seeds" in figure.get_suptitle()
    assert reactions.draw_sweep(rows, tmp_path / "new" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(RunError, match="at least one run with a LoRA rank, got 1 without"):
        reactions.draw_sweep(rows[-1:], tmp_path / "sweep.png")


def test_numbers_of_weights_have_three_digits():
    assert [short_count(x) for x in (999, 98_304, 1_500_000, 22_713_216, 2_000_000_000)] == [
        "999", "98.3k", "1.50M", "22.7M", "2.00B",
    ]  # fmt: skip


def test_the_overview_is_written(tmp_path):
    path = reactions.draw_overview(tmp_path / "images" / "overview.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def assert_apart(texts: list[Text]) -> None:
    for one, other in itertools.combinations([text for text in texts if text.get_text()], 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


def test_equal_true_values_have_no_r2(tmp_path):
    write(tmp_path / "predictions_held_out.csv", COLUMNS, [("k", "a", 0.5, 0.25, "", "", "", 0)] * 2)
    found = read_predictions(tmp_path / "predictions_held_out.csv")
    assert math.isnan(found.r2())
    assert found.rmse() == 0.25
    assert figure_of(drawn.parity, found).axes[0].get_title() == "all 2 held-out rows\nR² –, RMSE 0.250"
