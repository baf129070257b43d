"""Pieces that figures are made of: axes by stage or by step, bars with their values, a panel's title."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from perdure.report import words
from perdure.report.canvas import COLOURS, GREY
from perdure.report.read import Run, Scores


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


def title(ax: Axes, run: Run, runs: Sequence[Run]) -> None:
    """Name a panel by its run, where there is another."""
    if len(runs) > 1:
        ax.set_title(words.short([run.name], 32)[0])


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
