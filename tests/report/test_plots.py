"""The figures: every shape of stream, nothing outside the picture, equal bytes."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from perdure.report import drift, matrices, plots, read_runs, usage
from perdure.report.canvas import MAX_WIDTH, style

LONG = [f"task number {i} of a catalogue with long names, kind {'abcdefghijklmno'[i]}" for i in range(15)]
STREAMS = {
    "one task": [{"tasks": ["a"]}],
    "two tasks": [{"tasks": ["math", "hotpot"], "metrics": ("loss",)}],
    "fifteen": [{"tasks": LONG, "sparse": True}, {"name": "tracked", "tasks": LONG, "track": True}],
    "joint": [{"tasks": LONG[:5]}, {"name": "joint", "tasks": LONG[:5], "joint": True}],
    "odd names": [{"tasks": ["cost $5 & $6_{x", "_hidden", "日本", "a\nb", "%s \\frac{"]}],
    "unfinished": [{"results": False}],
}


def figures(runs, metric):
    yield matrices.heat_map, (runs, metric)
    yield plots.curves, (runs, metric)
    if any(run.scores[metric].transfer() for run in runs):
        yield matrices.transfer, (runs, metric)
    if any(run.scores[metric].outlasted() for run in runs):
        yield plots.lost, (runs, metric)
    yield plots.training_loss, (runs,)
    yield plots.comparison, (runs, metric)


@pytest.mark.parametrize("stream", STREAMS)
def test_no_text_leaves_the_picture(make_run, stream):
    runs = read_runs([make_run(**options) for options in STREAMS[stream]])
    for draw, arguments in figures(runs, next(iter(runs[0].scores))):
        with style():
            figure = draw.__wrapped__(*arguments)
            figure.canvas.draw()
            page = figure.bbox.padded(1)
            for text in figure.findobj(Text):
                if text.get_visible() and text.get_text().strip():
                    box = text.get_window_extent()
                    inside = page.contains(box.x0, box.y0) and page.contains(box.x1, box.y1)
                    assert inside or not _drawn(text, figure), (draw.__name__, text.get_text(), box)


@pytest.mark.parametrize("num", [1, 2])
def test_no_text_leaves_the_figures_of_weights(told_run, num):
    runs = read_runs([told_run(name) for name in ("packnet", "pnn")][:num])
    for draw in (drift.drift.__wrapped__, lambda runs: usage._draw(runs[0].used())):
        with style():
            figure = draw(runs)
            figure.canvas.draw()
            boxes = [
                text.get_window_extent()
                for text in figure.findobj(Text)
                if text.get_text() and _drawn(text, figure)
            ]
            assert all(figure.bbox.padded(1).contains(box.x0, box.y0) for box in boxes)


def test_drift_has_a_line_for_each_group_or_each_run(told_run):
    """A group that is new has nothing to show; a stage that was not measured leaves a gap."""
    one, two = read_runs([told_run("packnet"), told_run("pnn")])
    with style():
        alone, both = drift.drift.__wrapped__([one]), drift.drift.__wrapped__([one, two])
    lines = {line.get_label(): list(line.get_ydata()) for line in alone.axes[0].lines}
    assert list(lines) == ["embeddings", "block 0", "pnn", "all weights"]
    np.testing.assert_array_equal(lines["block 0"], [0.25, np.nan, 0.25])
    np.testing.assert_array_equal(lines["pnn"], [np.nan] * 3)
    np.testing.assert_array_equal(lines["all weights"], [0.1, np.nan, 0.2])
    assert [line.get_label() for line in both.axes[1].lines] == ["packnet", "pnn"]
    np.testing.assert_array_equal(both.axes[1].lines[1].get_ydata(), [0.1, np.nan, 0.4])


def test_a_deep_network_is_told_of_by_some_of_its_blocks():
    names = ["embeddings", *(f"block {i}" for i in range(28)), "other", "all weights"]
    assert drift._named(names) == [
        "embeddings", "block 0", "block 5", "block 11", "block 16", "block 22", "block 27", "other", "all weights",
    ]  # fmt: skip
    assert drift._named(names[:5]) == names[:5]


def test_usage_of_many_layers_is_added_up_by_block():
    """28 blocks of 7 layers are 28 rows; of 40 blocks the kinds of layers are left. Common beginnings go."""
    layers = {f"model.layers.{i}.mlp.{k}": {"a": 1, "free": k} for i in range(40) for k in range(7)}
    deep = usage._folded({name: counts for name, counts in layers.items() if int(name.split(".")[2]) < 28})
    assert list(deep) == [f"model.layers.{i}" for i in range(28)]
    assert deep["model.layers.3"] == {"a": 7, "free": 21}
    assert usage._folded(layers) == {"model.layers.*.mlp.*": {"a": 280, "free": 40 * 21}}
    assert usage._endings(["a.b.0", "a.b.1"]) == ["b.0", "b.1"]
    assert usage._endings(["a.b.0", "a.c"]) == ["a.b.0", "a.c"]
    assert usage._endings(["hidden", "out"]) == ["hidden", "out"]


def test_transfer_is_centred_at_zero_and_signed(make_run):
    """Naive of 3 tasks: each stage gains 80 points on its own task and costs every earlier one 30."""
    runs = read_runs([make_run(), make_run("joint", joint=True)])
    with style():
        figure = matrices.transfer.__wrapped__(runs, "exact_match")
        again = matrices.transfer.__wrapped__(runs[:1], "loss")
    ax = figure.axes[0]
    assert len(figure.axes) == 2  # joint has none; the other is the scale
    assert ax.images[0].get_clim() == pytest.approx((-0.8, 0.8))
    assert [text.get_text() for text in ax.texts] == ["+80", "0", "0", "−30", "+80", "0", "−30", "−30", "+80"]
    assert [text.get_text() for text in again.axes[0].texts][:4] == ["+3.20", "0.00", "0.00", "−1.20"]


def _drawn(text, figure):
    """Whether a text shows: an axis keeps ticks beyond its limits, which it does not draw."""
    for ax in figure.axes:
        for axis in (ax.xaxis, ax.yaxis):
            shown = {id(tick) for tick in axis._update_ticks()}
            for tick in [*axis.majorTicks, *axis.minorTicks]:
                if id(tick) not in shown and text in (tick.label1, tick.label2):
                    return False
    return True


def test_names_are_drawn_as_they_are_and_not_as_formulas(make_run):
    runs = read_runs([make_run(tasks=["cost $5 & $6", "b"])])
    with style():
        figure = plots.curves.__wrapped__(runs, "loss")
        figure.canvas.draw()
        texts = [text for text in figure.findobj(Text) if "$5" in text.get_text()]
    assert texts
    assert not any(text.get_parse_math() for text in texts)


def test_small_digits_have_strokes_of_one_width():
    """The top of a grey 0 holds nearly as much ink as its side; thinner tops look like a serif face."""
    with style():
        figure = Figure(figsize=(1, 1), dpi=150)
        canvas = FigureCanvasAgg(figure)
        figure.text(0.4, 0.4, "0", fontsize=8)
        canvas.draw()
        ink = 255.0 - np.asarray(canvas.buffer_rgba())[..., 0]
    rows, columns = np.flatnonzero(ink.sum(axis=1)), np.flatnonzero(ink.sum(axis=0))
    glyph = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = glyph.shape
    top = glyph[: height // 2, width // 2 - 1 : width // 2 + 1].sum(axis=0).max()
    side = glyph[height // 2 - 1 : height // 2 + 1, : width // 2].sum(axis=1).max()
    assert top > 0.75 * side


def test_runs_that_stop_where_they_learnt_have_no_panel_of_what_was_lost(make_run):
    runs = read_runs([make_run(), make_run("joint", joint=True)])
    with style():
        figure = plots.lost.__wrapped__(runs, "loss")
    assert len(figure.axes) == 1
    assert "\nNot shown: joint; nothing was measured after learning" in figure.get_suptitle()


def test_three_matrices_stand_side_by_side(make_run):
    """One row of panels and the scale; the second has its neighbour's stages and so no names of its own."""
    names = ("comparison", "sequence", "causal", "math", "grid")
    runs = read_runs([make_run(name, names, joint=name == "joint") for name in ("naive", "replay", "joint")])
    with style():
        figure = matrices.heat_map.__wrapped__(runs, "loss")
        figure.canvas.draw()
    assert len({round(ax.get_position().y0, 3) for ax in figure.axes[:3]}) == 1
    assert figure.get_figwidth() <= MAX_WIDTH
    shown = [[text.get_text() for text in ax.get_yticklabels() if text.get_visible()] for ax in figure.axes[:3]]
    assert shown == [["start", *names], [], ["start", "joint"]]
    assert [ax.get_ylim()[0] for ax in figure.axes[:3]] == [5.5, 5.5, 1.5]


def test_cells_of_a_matrix_have_as_many_decimals(make_run):
    runs = read_runs([make_run(scored=lambda row, column, metric, joint: 0.0001 if row else 12.5)])
    with style():
        ax = matrices.heat_map.__wrapped__(runs, "loss").axes[0]
    assert {text.get_text() for text in ax.texts} == {"12.50", "0.00"}


def test_equal_runs_give_equal_bytes_without_a_date(make_run):
    runs = read_runs([make_run()])
    first, again = matrices.heat_map(runs, "loss"), matrices.heat_map(runs, "loss")
    assert first == again
    assert first.startswith(b"\x89PNG")
    assert b"Creation" not in first
    assert b"Software" not in first


def test_a_user_s_matplotlib_settings_change_nothing(make_run):
    import matplotlib

    runs = read_runs([make_run()])
    before = plots.lost(runs, "loss")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        assert plots.lost(runs, "loss") == before
        assert matplotlib.rcParams["font.size"] == 30


def test_a_cell_shows_its_value_and_one_not_measured_is_hatched(make_run):
    """3 tasks, sparse: row 0 holds a alone, row 1 a and b, so 2 + 1 cells of the 12 are hatched."""
    runs = read_runs([make_run(sparse=True)])
    with style():
        ax = matrices.heat_map.__wrapped__(runs, "exact_match").axes[0]
    assert sum(patch.get_hatch() is not None for patch in ax.patches) == 3
    assert [text.get_text() for text in ax.texts] == ["10", "90", "10", "60", "90", "10", "30", "60", "90"]
