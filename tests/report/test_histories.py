"""The figures of histories: a line for each run in every panel, names in full, nothing outside the picture."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from perdure.errors import DataError
from perdure.report import histories as figures
from perdure.report.canvas import COLOURS, GREY, style
from perdure.report.history import History


def history(name: str, *values: float, method: str = "random", metric: str = "math_loss", **more: Any) -> History:
    curves = {metric: tuple(values), **more.pop("curves", {})}
    return History(name, tuple(range(0, 10 * len(values), 10)), curves, {"selection_method": method}, **more)


def drawn(draw: Callable[[], Figure]) -> Figure:
    """The figure, laid out; no text of it may leave the picture."""
    with style():
        figure = draw()
        figure.canvas.draw()
    page = figure.bbox.padded(1)
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and not _tick(text, figure):
            box = text.get_window_extent()
            assert page.contains(box.x0, box.y0), text.get_text()
            assert page.contains(box.x1, box.y1), text.get_text()
    return figure


def _tick(text: Text, figure: Figure) -> bool:
    """An axis keeps ticks beyond its limits, which it does not draw."""
    axes = [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]
    return any(text in (tick.label1, tick.label2) for axis in axes for tick in axis.majorTicks + axis.minorTicks)


def legend(figure: Figure) -> dict[str, Line2D]:
    (found,) = figure.legends
    handles = [line for line in found.legend_handles if isinstance(line, Line2D)]
    return {text.get_text(): line for text, line in zip(found.get_texts(), handles, strict=True)}


def test_a_panel_for_each_metric_and_a_line_for_each_history_that_has_it() -> None:
    """Losses come first, in order of first sight; each history looks the same in each panel and the legend."""
    one = history("one", 1.0, 2.0, curves={"em": (0.0, 0.5), "some_task_loss": (3.0, 4.0)})
    two = history("two", 5.0, math.nan, curves={"hotpot_loss": (6.0, 7.0), "nothing": (math.nan, math.nan)})
    figure = drawn(lambda: figures.draw_combined([one, two]))
    assert [ax.get_title() for ax in figure.axes] == ["MATH loss", "some task loss", "HotpotQA loss", "em"]
    lines = [[[*map(float, line.get_ydata())] for line in ax.lines] for ax in figure.axes]
    assert repr(lines) == repr([[[1.0, 2.0], [5.0, math.nan]], [[3.0, 4.0]], [[6.0, 7.0]], [[0.0, 0.5]]])
    assert [list(line.get_xdata()) for line in figure.axes[0].lines] == [[0, 10], [0, 10]]
    handles = legend(figure)
    assert list(handles) == ["one", "two"]
    places = {"one": [(0, 0), (1, 0), (3, 0)], "two": [(0, 1), (2, 0)]}
    for name, where in places.items():
        looks = {(to_hex(x.get_color()), x.get_linestyle(), x.get_marker()) for x in
                 (handles[name], *(figure.axes[i].lines[k] for i, k in where))}  # fmt: skip
        assert len(looks) == 1
    assert figure.get_suptitle() == "Measured over phase B, a line for each run; of a loss, lower is better"


def test_the_baseline_is_dashed_grey_and_takes_no_colour() -> None:
    runs = [history("none", 1.0, method="none"), history("random", 2.0), history("none again", 1.0, method="none")]
    handles = legend(drawn(lambda: figures.draw_combined(runs)))
    assert [to_hex(line.get_color()).upper() for line in handles.values()] == [
        GREY.upper(),
        COLOURS[0],
        GREY.upper(),
    ]
    dashes = [line._unscaled_dash_pattern for line in handles.values()]  # type: ignore[attr-defined]
    assert dashes[1][1] is None
    assert len({str(pattern) for pattern in dashes}) == 3


def test_long_names_stand_in_full_and_nine_runs_stay_apart() -> None:
    names = [
        f"TinyLlama-1.1B-Chat, MATH to HotpotQA, a long name of a method of selection, {i}, $5_x" for i in range(9)
    ]
    long = " ".join(["word"] * 36)
    figure = drawn(lambda: figures.draw_combined([history(name, 1.0, 2.0) for name in [*names, long]]))
    handles = legend(figure)
    assert [" ".join(name.split()) for name in handles] == [*names, long]
    assert len({(line.get_color(), line._unscaled_dash_pattern[1]) for line in handles.values()}) == 10  # type: ignore[attr-defined]
    again = drawn(lambda: figures.draw_combined([history("a", 1.0), history("a", 2.0)]))
    assert list(legend(again)) == ["a", "a (2)"]


@pytest.mark.parametrize("num", [1, 2, 3, 4])
def test_panels_are_as_many_as_metrics(num: int) -> None:
    one = history("a", 1.0, curves={f"m{i}": (1.0,) for i in range(1, num)})
    figure = drawn(lambda: figures.draw_combined([one]))
    assert len(figure.axes) == num
    tops = {round(ax.get_position().y1, 2) for ax in figure.axes}
    assert len(tops) == (2 if num == 4 else 1)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["0"]


def test_what_stands_along_x_is_said() -> None:
    """Iterations are whole; a point between two gaps has its marker; of 400 points one in ten has."""
    step, epoch = history("a", 1.0, 2.0), history("b", 1.0, 2.0, unit="epoch")
    counted = history("c", 1.0, math.nan, 2.0, math.nan, *range(400), unit="measurement")
    labels = {}
    for name, runs in (("one", [step]), ("two", [epoch]), ("three", [counted]), ("all", [step, counted])):
        figure = drawn(lambda runs=runs: figures.draw_combined(runs))  # type: ignore[misc]
        labels[name] = figure.axes[0].get_xlabel()
    assert labels == {
        "one": "step of phase B",
        "two": "epoch of phase B",
        "three": "measurement",
        "all": "step of phase B, measurement",
    }
    assert figure.axes[0].lines[1].get_markevery() == [0, 2, *range(10, 404, 10)]


def test_what_one_run_lost_stands_beside_its_last_value() -> None:
    """MATH rose from 1 to 1.5, HotpotQA fell from 2 to 1.25; the gap at the end is passed over. em is no loss."""
    one = history(
        "random", 1.0, 1.25, 1.5, math.nan, curves={"em": (0.0,) * 4, "hotpot_loss": (2.0, 1.75, 1.5, 1.25)}
    )
    figure = drawn(lambda: figures.forgetting_curve.__wrapped__(one))  # type: ignore[attr-defined]
    assert [ax.get_title() for ax in figure.axes] == ["MATH loss", "HotpotQA loss"]
    assert [[(t.get_text(), t.xy[1], t.get_weight()) for t in ax.texts] for ax in figure.axes] == [  # type: ignore[attr-defined]
        [("+0.500", 1.5, "bold")],
        [("−0.750", 1.25, "normal")],
    ]
    assert [list(ax.lines[1].get_ydata()) for ax in figure.axes] == [[1.0, 1.0], [2.0, 2.0]]
    assert "random: what phase B did to each loss; lower is better" in figure.get_suptitle()
    other = drawn(lambda: figures.forgetting_curve.__wrapped__(history("x", 0.5, metric="em")))  # type: ignore[attr-defined]
    assert [ax.get_title() for ax in other.axes] == ["em"]
    assert not other.axes[0].texts
    assert "lower is better" not in other.get_suptitle()


def test_what_cannot_be_drawn_is_refused() -> None:
    empty = history("empty", math.nan)
    for draw in (lambda: figures.combined([empty]), lambda: figures.forgetting_curve(empty)):
        with pytest.raises(DataError, match="nothing was measured in empty"):
            draw()
    many = [History(f"{i}", (0,), {f"m{i}-{k}": (1.0,) for k in range(60)}) for i in range(2)]
    with pytest.raises(DataError, match="120 metrics are too many"):
        figures.combined(many)


def test_equal_histories_give_equal_bytes_in_every_format() -> None:
    runs = [history("a", 1.0, 2.0)]
    for kind, beginning in (("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")):
        first = figures.combined_as(runs, kind)
        assert first.startswith(beginning)
        assert figures.combined_as(runs, kind) == first
    assert figures.combined(runs) == figures.combined_as(runs, "png")
    assert figures.forgetting_curve(runs[0]).startswith(b"\x89PNG")
