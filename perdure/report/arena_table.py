"""The table of arena runs, as cells and as a picture."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from perdure.report import words
from perdure.report.arena_comparison import probe_change, probe_metric
from perdure.report.arena_pool import Group, labels
from perdure.report.arena_words import SHARE, points, score, seconds
from perdure.report.canvas import as_png

TABLE = "results_table.png"
HEADS = (
    "run", "model", "method", "trained\nparameters", "initial", "final\n(95 % interval)", "best", "gain,\npoints",
    "probe,\nchange", "seconds an\nepisode",
)  # fmt: skip
TEXTS = 3  # columns of text, which stand at the left; numbers stand at the right
WRAPPED = (23, 22, 14)  # characters of a line of these
SIZE = 9  # points
LINE, PAD, RISE = 0.165, 0.11, 0.045  # inches; half of a capital's height is the last


def cells(groups: Sequence[Group]) -> list[list[str]]:
    """The rows of the table, a text for each of HEADS."""
    metric = probe_metric(groups)
    return [_row(group, name, metric) for group, name in zip(groups, labels(groups), strict=True)]


def _row(group: Group, name: str, metric: str) -> list[str]:
    run = group.first
    return [
        name,
        run.model,
        run.method,
        words.count(run.trainable),
        words.value(SHARE, group.share(lambda run: run.scores.exact.initial).value),
        score(group.share(lambda run: run.scores.exact.final)),
        words.value(SHARE, group.share(lambda run: run.scores.exact.best).value),
        points(group.value(lambda run: run.scores.exact.gain).value),
        words.value(metric, group.value(lambda run: probe_change(run, metric)).value, signed=True),
        seconds(group.value(lambda run: run.seconds_per_episode).value),
    ]


def draw_table(groups: Sequence[Group]) -> Figure:
    """The table as a picture that is as large as its texts; long names are broken over lines, none is cut."""
    rows = [[head.split("\n") for head in HEADS]]
    for row in cells(groups):
        broken = [textwrap.wrap(text, width) for text, width in zip(row, WRAPPED, strict=False)]
        rows.append([*broken, *([text] for text in row[TEXTS:])])
    figure = Figure()
    FigureCanvasAgg(figure)
    widths = [
        max(_inches(figure, row[i], _weight(n, i)) for n, row in enumerate(rows)) + 2 * PAD
        for i in range(len(HEADS))
    ]
    heights = [LINE * max(map(len, row)) + PAD for row in rows]
    width, height = sum(widths) + 2 * PAD, sum(heights) + 2 * PAD
    figure.set_size_inches(width, height)
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    for n, texts in enumerate(rows):
        top = PAD + sum(heights[:n])
        if n and n % 2 == 0:
            ax.axhspan(top, top + heights[n], color="#f3f4f6", linewidth=0)
        for i, lines in enumerate(texts):
            left = PAD + sum(widths[:i])
            x = left + PAD if i < TEXTS else left + widths[i] - PAD
            _cell(ax, x, top + heights[n] / 2, lines, "left" if i < TEXTS else "right", _weight(n, i))
    ax.axhline(PAD + heights[0], color="#374151", linewidth=1)
    return figure


results_table = as_png(draw_table)


def _cell(ax: Axes, x: float, middle: float, lines: Sequence[str], side: str, weight: str) -> None:
    """The lines of a cell, by their baselines: centred, one with a descender stands higher than its neighbours."""
    for k, line in enumerate(lines):
        y = middle + RISE + (k - (len(lines) - 1) / 2) * LINE
        ax.text(x, y, line, ha=side, va="baseline", fontsize=SIZE, weight=weight)


def _weight(row: int, column: int) -> str:
    return "bold" if row == 0 or column == 0 else "normal"


def _inches(figure: Figure, lines: Sequence[str], weight: str) -> float:
    """How wide the lines are drawn."""
    font = FontProperties(size=SIZE, weight=weight)
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    widths = [renderer.get_text_width_height_descent(line, font, False)[0] for line in lines]
    return float(max(widths) / figure.dpi)
