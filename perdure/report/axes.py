"""Pieces that figures are made of: axes by stage or by step, the cells of a matrix, bars with their values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.patches import Rectangle

from perdure.report import words
from perdure.report.canvas import COLOURS, GREY
from perdure.report.read import Run, Scores


def colour_scale(tables: Sequence[Scores]) -> Normalize:
    """One colour scale for all: 0 to 1 for shares, else what occurs."""
    known = [x for table in tables for row in table.values for x in row if math.isfinite(x)]
    if tables[0].metric in words.SHARES or not known:
        return Normalize(0, 1)
    low, high = min(known), max(known)
    return Normalize(low, high if high > low else low + 1)


def cells(ax: Axes, table: Scores, colours: Colormap, scale: Normalize, size: int) -> None:
    """Write each value into its cell, hatch what was not measured, frame what was just trained."""
    digits = words.decimals(table.metric, (x for row in table.values for x in row), unit=False)
    for t, row in enumerate(table.values):
        for i, x in enumerate(row):
            if not math.isfinite(x):
                ax.add_patch(
                    Rectangle((i - 0.5, t - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#b6bcc6", linewidth=0)
                )
            if not math.isnan(x):
                red, green, blue, _ = colours(scale(x))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 and math.isfinite(x)
                text = words.value(table.metric, x, unit=False, digits=digits)
                ax.text(i, t, text, ha="center", va="center", fontsize=size, color="white" if dark else "black")
        for i in range(len(row)):
            if table.trained(i) == t:  # the diagonal: the task was just trained
                ax.add_patch(
                    Rectangle((i - 0.5, t - 0.5), 1, 1, fill=False, edgecolor="black", linewidth=1.4, zorder=3)
                )


def bars(ax: Axes, texts: Sequence[str], values: Sequence[float]) -> None:
    """One horizontal bar a run with its value written beside it."""
    known = [x for x in values if math.isfinite(x)]
    low, high = min([0.0, *known]), max([0.0, *known])
    room = (high - low or 1.0) * 0.35
    for y, x in enumerate(values):
        ax.barh(y, x if math.isfinite(x) else 0.0, height=0.6, color=COLOURS[y % len(COLOURS)])
        tip = max(x, 0.0) if math.isfinite(x) else 0.0
        ax.text(tip + room * 0.08, y, texts[y], va="center", fontsize=8)
    ax.set_xlim(low - (room * 0.1 if low < 0 else 0), high + room)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.set_xticks([])
    ax.spines["bottom"].set_visible(False)


def stage_axis(ax: Axes, table: Scores) -> list[float]:
    """Rows of R along x: a line where each stage ended."""
    ends = list(range(len(table.values)))
    for x in ends:
        ax.axvline(x, color="#d1d5db", linewidth=0.8, zorder=0)
    ax.set_xticks(ends, ["start", *words.short(table.stages, 18)])
    ax.set_xlabel("after")
    tilt(ax, ("start", *table.stages))
    return [float(x) for x in ends]


def step_axis(ax: Axes, run: Run) -> list[float]:
    """Steps along x: a line where each stage ended, its name above; returns where each stage began."""
    ends = run.boundaries()
    begins = [0.0, *(float(step) for _, step in ends[:-1])]
    for _, step in ends[:-1]:
        ax.axvline(step, color="#9ca3af", linewidth=0.8, linestyle=(0, (3, 2)), zorder=0)
    ax.set_xlabel("step")
    if len(ends) > 1:
        ticks: list[tuple[float, str]] = []
        gap = 0.2 / _inches(ax) * ends[-1][1]
        for begin, (_, end), name in zip(begins, ends, words.short([name for name, _ in ends], 18), strict=True):
            if not ticks or (begin + end) / 2 >= ticks[-1][0] + gap:  # else the names would touch
                ticks.append(((begin + end) / 2, name))
        top = ax.secondary_xaxis("top")
        top.set_xticks(*zip(*ticks, strict=True), rotation=35, ha="left", rotation_mode="anchor", fontsize=8)
        top.tick_params(length=0, pad=1)
        top.spines[:].set_visible(False)
    return begins


def percent_axis(ax: Axes, metric: str) -> None:
    """For a share of one: the whole range from 0 to 100 %, so that panels and pages compare."""
    if metric in words.SHARES:
        ax.set_ylim(-0.03, 1.03)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def tilt(ax: Axes, names: Sequence[str]) -> None:
    """Slant the names under the x axis where they would touch."""
    needed = len(names) * (0.075 * min(18, max(map(len, names), default=0)) + 0.1)
    for text in ax.get_xticklabels() if needed > _inches(ax) else ():
        text.set(rotation=35, ha="right", rotation_mode="anchor", fontsize=8)


def _inches(ax: Axes) -> float:
    """About how wide a panel is drawn, before the layout is known."""
    spec = ax.get_subplotspec()
    columns = spec.get_gridspec().ncols / len(spec.colspan) if spec else 1
    return ax.figure.get_figwidth() / columns - 1  # type: ignore[union-attr]
