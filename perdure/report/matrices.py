"""Heat maps: scores of each task after each stage, and what each stage did to each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from perdure.report import words
from perdure.report.axes import title
from perdure.report.canvas import MAX_WIDTH, as_png, headline, panels
from perdure.report.read import Run, Scores, number, on_training_rows

NAME = 28  # characters of a task's name


@dataclass(frozen=True, slots=True)
class _Table:
    """A matrix to be drawn: a frame around the cell in row `trained[i]` of column i, a gap before column `own`."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Sequence[Sequence[float]]
    trained: Sequence[int | None]
    own: int | None = None

    @property
    def known(self) -> list[float]:
        return [x for row in self.values for x in row if math.isfinite(x)]


@as_png
def heat_map(runs: Sequence[Run], metric: str) -> Figure:
    """R of each run on one colour scale: a row after each stage, a column a task, the value in the cell."""
    tables = [run.scores[metric] for run in runs]
    drawn = [_after(run, metric) for run in runs]
    colours = colormaps["viridis" if tables[0].higher_is_better else "viridis_r"]
    figure = _draw(runs, drawn, metric, colours, colour_scale(tables), "after")
    text = f"{words.opening(metric)} of each task after each stage; {words.direction(tables[0].higher_is_better)}"
    if any(table.own is not None for table in drawn):
        text += "\nLast column: over all rows of the tasks trained so far together, which is not the mean of theirs"
    if on_training_rows(metric):
        text += "\nMeasured on rows that were TRAINED ON: this says nothing of what was learnt"
    _headline(figure, text + _clipped(metric, drawn, words.FLOOR))
    return figure


@as_png
def transfer(runs: Sequence[Run], metric: str) -> Figure:
    """What each task's training did to each task: blue where it helped, red where it harmed, white where neither.

    Runs in which a stage trained several tasks have no such matrix and are left out.
    """
    runs = [run for run in runs if run.scores[metric].transfer()]
    tables = [run.scores[metric] for run in runs]
    drawn = [_Table(t.stages, t.tasks, t.transfer(), range(len(t.tasks))) for t in tables]
    largest = max((abs(x) for table in drawn for x in table.known), default=0.0) or 1.0
    if words.unbounded(metric):
        largest = min(largest, -words.FLOOR)
    figure = _draw(runs, drawn, metric, colormaps["RdBu"], Normalize(-largest, largest), "training on", signed=True)
    unit = ", in points" if metric in words.SHARES else ""
    better = "is better" if tables[0].higher_is_better else f"where the {words.label(metric)} fell"
    _headline(
        figure,
        f"{words.opening(metric)}: what each task's training did to each task{unit}; positive {better}"
        + _clipped(metric, drawn, -largest, both=True),
    )
    return figure


def colour_scale(tables: Sequence[Scores]) -> Normalize:
    """One colour scale for all: 0 to 1 for shares, for R² from its lowest but not below -1, else what occurs."""
    known = [x for table in tables for row in table.values for x in row if math.isfinite(x)]
    if tables[0].metric in words.SHARES or not known:
        return Normalize(0, 1)
    low, high = min(known), max(known)
    if words.unbounded(tables[0].metric):
        return Normalize(max(words.FLOOR, min(0.0, low)), 1)
    return Normalize(low, high if high > low else low + 1)


def _headline(figure: Figure, text: str) -> None:
    """Lines on top; the cells keep their height, however many there are."""
    figure.set_figheight(figure.get_figheight() + 0.16 * text.count("\n"))
    headline(figure, text)


def _after(run: Run, metric: str) -> _Table:
    """R, and where it was measured a column over all rows of the tasks that were trained so far."""
    t = run.scores[metric]
    trained = [t.trained(i) for i in range(len(t.tasks))]
    together = run.summaries[metric].get("pooled_by_stage") or ()
    if len(together) != len(t.stages) or not together:
        return _Table(("start", *t.stages), t.tasks, t.values, trained)
    values = [(*row, number(x)) for row, x in zip(t.values, (None, *together), strict=True)]
    return _Table(("start", *t.stages), (*t.tasks, "all rows"), values, [*trained, None], len(t.tasks))


def _clipped(metric: str, tables: Sequence[_Table], end: float, *, both: bool = False) -> str:
    """That colours do not tell how far below the end of their scale a value is, where one is."""
    beyond = sum(x < end or (both and x > -end) for table in tables for x in table.known)
    if not words.unbounded(metric) or not beyond:
        return ""
    ends = f"at ±{-end:g}" if both else f"at −{-end:g}"
    return f"\nColours end {ends}: {beyond} value{'s lie' if beyond > 1 else ' lies'} beyond, as the numbers say"


def _draw(
    runs: Sequence[Run],
    tables: Sequence[_Table],
    metric: str,
    colours: Colormap,
    scale: Normalize,
    rows: str,
    signed: bool = False,
) -> Figure:
    """A panel for each run; `rows` says what a row's name stands for."""
    most_tasks = max(len(table.columns) for table in tables)
    longest = min(NAME, max(len(name) for table in tables for name in (*table.rows, *table.columns)))
    size = 7 if most_tasks > 8 else 8
    digits = words.decimals(metric, (x for table in tables for row in table.values for x in row), unit=False)
    known = [x for table in tables for x in table.known]
    written = max((len(words.value(metric, x, unit=False, digits=digits, signed=signed)) for x in known), default=1)
    cell = (max(0.42, written * size * 0.0088 + 0.08), 0.27 if most_tasks > 8 else 0.34)
    # Names slant beyond the last column; beside other panels there is no room to keep for that.
    beyond = longest * 0.055 if len(runs) == 1 else 0.0
    inner, names = max(1.8, most_tasks * cell[0] + 0.2) + beyond, longest * 0.065 + 0.4
    # Beside a panel with the same stages, a panel needs no names of its own; so more fit beside one another.
    own = [i == 0 or table.rows != tables[i - 1].rows for i, table in enumerate(tables)]
    width = inner + names * sum(own) / len(own)
    figure, axes = panels(
        len(runs),
        width if width * len(runs) + 0.8 <= MAX_WIDTH else inner + names,
        [max(0.9, len(table.values) * cell[1]) + longest * 0.045 + 0.6 for table in tables],
        extra=0.8,
    )
    image = None
    for ax, run, table, alone in zip(axes, runs, tables, own, strict=True):
        masked = np.ma.masked_invalid(np.array(table.values))
        image = ax.imshow(masked, cmap=colours, norm=scale, aspect="auto")
        _cells(ax, table, metric, colours, scale, size, signed)
        ax.set_xticks(range(len(table.columns)), words.short(table.columns, NAME))
        ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
        for text in ax.get_xticklabels():
            text.set(rotation=35, ha="left", rotation_mode="anchor")
        ax.set_yticks(range(len(table.rows)), words.short(table.rows, NAME))
        spec = ax.get_subplotspec()
        if alone or (spec is not None and spec.is_first_col()):
            ax.set_ylabel(rows)
        else:
            ax.tick_params(labelleft=False)
        ax.set(xlim=(-0.5, most_tasks - 0.5), ylim=(len(table.values) - 0.5, -0.5))
        ax.spines[:].set_visible(False)
        if table.own is not None:
            ax.axvline(table.own - 0.5, color="white", linewidth=3, zorder=2)
        title(ax, run, runs)
    below = any(x < (scale.vmin or 0.0) for x in known)
    above = any(x > (scale.vmax or 0.0) for x in known)
    extend = "both" if below and above else "min" if below else "max" if above else "neither"
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=25, shrink=0.8, extend=extend) if image else None
    if bar is not None and metric in words.SHARES:
        unit = " pt" if signed else " %"
        bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x * 100:.0f}{unit}".replace("-", "−"))
    return figure


def _cells(
    ax: Axes, table: _Table, metric: str, colours: Colormap, scale: Normalize, size: int, signed: bool
) -> None:
    """Write each value into its cell, hatch what was not measured, frame what was just trained."""
    digits = words.decimals(metric, (x for row in table.values for x in row), unit=False)
    for t, row in enumerate(table.values):
        for i, x in enumerate(row):
            if not math.isfinite(x):
                ax.add_patch(
                    Rectangle((i - 0.5, t - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#b6bcc6", linewidth=0)
                )
            if not math.isnan(x):
                red, green, blue, _ = colours(scale(x))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 and math.isfinite(x)
                text = words.value(metric, x, unit=False, digits=digits, signed=signed)
                ax.text(i, t, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        for i in range(len(row)):
            if table.trained[i] == t:  # the diagonal: the task was just trained
                ax.add_patch(
                    Rectangle(
                        (i - 0.5, t - 0.5),
                        1,
                        1,
                        fill=False,
                        edgecolor="black",
                        linewidth=1.4,
                        zorder=3,
                        clip_on=False,
                    )
                )
