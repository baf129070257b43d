"""The figures of histories: several side by side, a panel for each metric; and what one of them lost."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from perdure.errors import DataError
from perdure.report import words
from perdure.report.canvas import DASHES, DPI, GREY, MARKERS, as_png, headline, line_style, panels, style
from perdure.report.history import MOST, History

Look = dict[str, Any]
TASKS = {"math": "MATH", "hotpot": "HotpotQA", "hotpotqa": "HotpotQA"}
# What each format writes of the date and of the program, which would make equal figures differ.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
FEW = 40  # points of a line that each have their marker
LONGEST = 200  # characters of a name in the legend
CHARACTER, LINE = 0.075, 0.17  # inches of a legend


def draw_combined(histories: Sequence[History]) -> Figure:
    """A panel for each metric that any history has, losses first, and a line for each history that has it.

    Drawn with matplotlib's settings as they are; `combined` sets this package's.

    Raises:
        DataError: nothing was measured, or more metrics than one figure has panels for.
    """
    metrics = _metrics(histories)
    if len(metrics) > MOST:
        raise DataError(f"{len(metrics)} metrics are too many for one figure ({MOST}); draw fewer files at once")
    width = 6.5 if len(metrics) == 1 else 3.3 if len(metrics) % 3 == 0 else 4.8
    figure, axes = panels(len(metrics), width, 3.0)
    looks = _looks(histories)
    for ax, metric in zip(axes, metrics, strict=True):
        drawn = [history for history in histories if metric in history.curves]
        for history, look in zip(histories, looks, strict=True):
            if metric in history.curves:
                _line(ax, history, metric, look)
        _x_axis(ax, drawn)
        ax.set_title(words.short([title(metric)], 40)[0])
        ax.grid(axis="y")
    _legend(figure, [history.name for history in histories], looks)
    losses = [metric for metric in metrics if _is_loss(metric)]
    better = "; lower is better" if losses == metrics else "; of a loss, lower is better" if losses else ""
    headline(figure, f"Measured over phase B, a line for each run{better}")
    return figure


combined = as_png(draw_combined)


def combined_as(histories: Sequence[History], kind: str) -> bytes:
    """The figure of several histories as "png", "pdf" or "svg"; the same histories give the same bytes."""
    with style(), matplotlib.rc_context({"svg.hashsalt": "perdure"}):
        figure, stream = draw_combined(histories), io.BytesIO()
        figure.savefig(stream, format=kind, dpi=DPI, metadata=METADATA[kind])
    return stream.getvalue()


@as_png
def forgetting_curve(history: History) -> Figure:
    """The losses of one history over phase B, one above the other; every metric where it has no loss.

    A thin line stands at each one's first value, its change from first to last beside the last.

    Raises:
        DataError: nothing was measured.
    """
    metrics = [metric for metric in _metrics([history]) if _is_loss(metric)] or _metrics([history])
    figure, axes = panels(len(metrics), 6.5, 2.2, sharex=True)
    for i, (ax, metric) in enumerate(zip(axes, metrics, strict=True)):
        look = line_style(i)
        _line(ax, history, metric, look)
        points = history.measured(metric)
        ax.axhline(points[0][1], color=look["color"], linewidth=0.8, alpha=0.6, zorder=1)
        _change(ax, history, metric)
        ax.set_title(words.short([title(metric)], 60)[0])
        ax.set_xmargin(0.02)
        ax.grid(axis="y")
    _x_axis(axes[-1], [history])
    (name,) = words.short([history.name], LONGEST)
    better = "; lower is better" if all(map(_is_loss, metrics)) else ""
    headline(
        figure,
        f"{name}: what phase B did to each {'loss' if better else 'metric'}{better}\n"
        "Thin line: the first value. At the right: the change from first to last.",
    )
    return figure


def title(metric: str) -> str:
    """A metric's name for people: "math_loss" is MATH loss, "some_task_loss" some task loss."""
    first, *rest = words.label(metric).split(" ")
    return " ".join([TASKS.get(first, first), *rest])


def _metrics(histories: Sequence[History]) -> list[str]:
    """What was measured in any history in order of first sight, losses first."""
    seen = dict.fromkeys(key for history in histories for key in history.curves if history.measured(key))
    if not seen:
        raise DataError(
            f"nothing was measured in {', '.join(history.name for history in histories) or 'no history'}"
        )
    return sorted(seen, key=lambda metric: not _is_loss(metric))


def _is_loss(metric: str) -> bool:
    return metric == "loss" or metric.endswith("_loss")


def _looks(histories: Sequence[History]) -> list[Look]:
    """A style for each history: dashed grey where nothing was mixed in, so that it stands behind the others."""
    looks: list[Look] = []
    baselines = 0
    for history in histories:
        if history.facts.get("selection_method") == "none":
            dashes, marker = DASHES[1 + baselines % 2], MARKERS[baselines % len(MARKERS)]
            looks.append({"color": GREY, "linestyle": dashes, "marker": marker, "markersize": 2.5, "zorder": 1.5})
            baselines += 1
        else:
            looks.append(line_style(len(looks) - baselines))
    return looks


def _line(ax: Axes, history: History, metric: str, look: Look) -> None:
    """A metric's line, broken at gaps, with markers that can be told apart and one where a point stands alone."""
    y = history.curves[metric]
    known = [False, *map(math.isfinite, y), False]
    every = max(1, len(y) // FEW)
    marked = [i for i in range(len(y)) if i % every == 0 or not (known[i] or known[i + 2])]
    ax.plot(history.steps, y, **look, linewidth=1.6, markevery=marked)


def _change(ax: Axes, history: History, metric: str) -> None:
    change = history.change(metric)
    if not math.isfinite(change):
        return
    worse = _is_loss(metric) and change > 0
    ax.annotate(
        words.value(metric, change, signed=True),
        (1, history.measured(metric)[-1][1]), xycoords=("axes fraction", "data"), annotation_clip=False,
        xytext=(4, 0), textcoords="offset points", va="center", fontsize=9,
        color="#9a3412" if worse else "#374151", weight="bold" if worse else "normal",
    )  # fmt: skip


def _x_axis(ax: Axes, histories: Sequence[History]) -> None:
    """Whole numbers, unless all are epochs; what they count below. A lone place is its own tick."""
    units = list(dict.fromkeys(history.unit for history in histories))
    ax.set_xlabel(", ".join(unit if unit == "measurement" else f"{unit} of phase B" for unit in units))
    places = {x for history in histories for x in history.steps}
    if len(places) == 1:
        ax.set_xticks([*places])
    elif units != ["epoch"]:
        ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _legend(figure: Figure, names: Sequence[str], looks: Sequence[Look]) -> None:
    """The names in full below the panels, in as many columns as fit; the figure grows by its height."""
    width = figure.get_figwidth()
    characters = int((width - 1.0) / CHARACTER)
    labels = [textwrap.fill(name, characters) for name in words.short(names, LONGEST)]
    lines = [line for label in labels for line in label.split("\n")]
    columns = max(1, min(len(labels), int(width / (0.8 + CHARACTER * max(map(len, lines))))))
    rows = -(-len(labels) // columns)
    columns = -(-len(labels) // rows)
    tallest = max(label.count("\n") + 1 for label in labels)
    figure.set_figheight(figure.get_figheight() + 0.1 + LINE * 1.1 * rows * tallest)
    handles = [
        Line2D([], [], label=label, linewidth=1.6, **look) for label, look in zip(labels, looks, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, handlelength=4)
