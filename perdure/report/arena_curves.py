"""The learning curves of one arena run: held-out scores, each kind's, and answers before and after each step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from perdure.report import words
from perdure.report.arena_run import ArenaRun, Point
from perdure.report.axes import percent_axis
from perdure.report.canvas import COLOURS, GREY, as_png, headline, line_style, panels

CURVES = "learning_curves.png"
LAST = 20  # episodes of the running share; a twentieth of a run where that is more
CHARACTER = 0.066  # inches


def draw_curves(run: ArenaRun) -> Figure:
    """Over episodes: held-out exact match with its 95 % interval, the lenient score and the general probe; exact
    match of each kind; and the share of the last episodes that were answered right before and after the step.

    The last panel is left out where the log is gone. Drift blocks are shaded in their kinds' colours.
    """
    answered = [episode for episode in run.log if math.isfinite(episode.before) or math.isfinite(episode.after)]
    heights = [3.0, 2.8, 2.5] if answered else [3.0, 3.1]
    figure, axes = panels(len(heights), 8.0, heights, sharex=True)
    _overall(axes[0], run)
    _kinds(axes[1], run)
    if answered:
        _online(axes[2], run)
    looks = {kind: line_style(i)["color"] for i, kind in enumerate(run.kinds)}
    for ax in axes:
        for kind, begin, end in run.blocks():
            ax.axvspan(begin - 1, end, color=looks.get(kind, GREY), alpha=0.09, linewidth=0, zorder=0)
        percent_axis(ax, "exact_match")
        ax.grid(axis="y")
        # Beside the panel: curves may run anywhere in it.
        ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=3)
    _block_names(axes[0], run)
    axes[-1].set_xlabel("episode")
    axes[-1].xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
    axes[-1].set_xlim(-0.01 * run.episodes, 1.01 * max(run.episodes, run.history[-1].episode, 1))
    (name,), (model,) = words.short([run.name], 80), words.short([run.model], 60)
    how = run.method if run.name == run.method else f"{name}: {run.method}"
    headline(figure, f"{how} on {model}, measured on {words.count(run.scores.rows)} held-out rows")
    return figure


learning_curves = as_png(draw_curves)


def _overall(ax: Axes, run: ArenaRun) -> None:
    band(ax, run.history, COLOURS[0])
    ax.plot(*_xy(run.history, [point.exact.value for point in run.history]), **_look(0), label="exact match")
    ax.plot(*_xy(run.history, [point.stated for point in run.history]), **_look(2), label="answer stated (lenient)")
    probe = _xy(run.history, [point.probe for point in run.history])
    if probe[0]:
        ax.plot(*probe, color=GREY, linestyle=(0, (5, 2)), marker="d", markersize=4, label="general probe")
    ax.set_title("held-out rows, with the 95 % interval of exact match", pad=18 if run.blocks() else None)


def band(ax: Axes, points: Sequence[Point], colour: str) -> None:
    """The 95 % interval of exact match as a pale band."""
    known = [point for point in points if point.exact.bounded]
    ax.fill_between(
        [point.episode for point in known], [point.exact.low for point in known],
        [point.exact.high for point in known], color=colour, alpha=0.18, linewidth=0, label="95 % interval",
    )  # fmt: skip


def _kinds(ax: Axes, run: ArenaRun) -> None:
    names = words.short([words.label(kind) for kind in run.kinds], 24)
    for i, (kind, name) in enumerate(zip(run.kinds, names, strict=True)):
        values = [point.kinds.get(kind, math.nan) for point in run.history]
        ax.plot(*_xy(run.history, values), **_look(i), label=name)
    ax.set_title("exact match of each kind on held-out rows")


def _online(ax: Axes, run: ArenaRun) -> None:
    """A pale area lies between the two lines: what the step changed."""
    numbers = [episode.number for episode in run.log]
    width = max(LAST, len(numbers) // 20)
    before = running([episode.before for episode in run.log], width)
    after = running([episode.after for episode in run.log], width)
    ax.fill_between(numbers, before, after, color=COLOURS[2], alpha=0.12, linewidth=0)
    ax.plot(numbers, after, color=COLOURS[2], linewidth=1.6, label="right after the step")
    ax.plot(numbers, before, color=COLOURS[1], linewidth=1.6, linestyle=(0, (5, 2)), label="right before it")
    ax.set_title(f"episodes answered right, over the last {width}")


def running(values: Sequence[float], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of fewer at the beginning; NaN are left out of it."""
    known = [0.0 if math.isnan(value) else 1.0 for value in values]
    sums = [0.0, *accumulate(0.0 if math.isnan(value) else value for value in values)]
    counts = [0.0, *accumulate(known)]
    out = []
    for end in range(1, len(values) + 1):
        begin = max(0, end - width)
        count = counts[end] - counts[begin]
        out.append((sums[end] - sums[begin]) / count if count else math.nan)
    return out


def _block_names(ax: Axes, run: ArenaRun) -> None:
    """Each block's kind above it, where the name fits."""
    inches = 5.6 / max(run.episodes, 1)
    for kind, begin, end in run.blocks():
        (name,) = words.short([words.label(kind)], 18)
        if CHARACTER * len(name) <= (end - begin + 1) * inches:
            place = ((begin - 1 + end) / 2, 1.015)
            ax.text(
                *place, name, transform=ax.get_xaxis_transform(), ha="center", va="bottom", fontsize=8, color=GREY
            )


def _look(index: int) -> dict[str, Any]:
    return {**line_style(index), "linewidth": 1.6}


def _xy(points: Sequence[Point], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Where it was measured and what it was."""
    known = [(point.episode, y) for point, y in zip(points, values, strict=True) if math.isfinite(y)]
    return [x for x, _ in known], [y for _, y in known]
