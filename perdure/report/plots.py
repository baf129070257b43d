"""The figures of one run or several that are no matrix: curves, what was lost, training loss, comparison.

Every function takes runs and gives a PNG's bytes, so that the page holds what the folder holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from perdure.report import words
from perdure.report.axes import bars, percent_axis, stage_axis, step_axis, tilt, title
from perdure.report.canvas import COLOURS, GREY, as_png, headline, line_style, panels
from perdure.report.read import Run, Scores, number

POINTS = 400  # of a training curve; more cannot be seen


@as_png
def curves(runs: Sequence[Run], metric: str) -> Figure:
    """Each task's score over the stream, pale until it is trained itself; a vertical line ends each stage.

    Against the step where the run also measured within tasks, else against the stage.
    """
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores[metric].tasks))
    styles = {task: line_style(i) for i, task in enumerate(tasks)}
    names = dict(zip(tasks, words.short(tasks), strict=True))
    legend = 0.5 + 0.075 * max(len(name) for name in names.values())
    height = max(2.6 + 0.045 * min(18, max(map(len, tasks))), 0.19 * len(tasks) + 0.8)
    stages = max(len(run.scores[metric].stages) for run in runs)
    width = 6.5 if stages > 8 or len(runs) == 1 else 2.7 if stages < 6 else 3.8
    figure, axes = panels(len(runs), width, height, extra=legend, sharey=True)
    for ax, run in zip(axes, runs, strict=True):
        table = run.scores[metric]
        tracked = [e for e in run.evaluations if e.get("row") is None and metric in e.get("metrics", {})]
        ticks = step_axis(ax, run) if tracked else stage_axis(ax, table)
        for i, task in enumerate(table.tasks):
            trained = table.trained(i)
            if tracked:
                x, y = _over_steps(run, metric, task)
                start = ticks[trained - 1] if trained is not None and trained <= len(ticks) else math.inf
            else:
                x, y = list(range(len(table.values))), [row[i] for row in table.values]
                start = math.inf if trained is None else trained - 1
            known = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)]
            early = [point for point in known if point[0] <= start]
            late = [point for point in known if point[0] >= start]
            look = styles[task]
            ax.plot(*_xy(early), **look | {"alpha": 0.3, "linewidth": 1, "markersize": 2.5})
            ax.plot(*_xy(late), **look | {"linewidth": 1.8})
        ax.grid(axis="y")
        percent_axis(ax, metric)
        title(ax, run, runs)
    ended = _ends_at_floor(axes, metric, [x for run in runs for row in run.scores[metric].values for x in row])
    handles = [Line2D([], [], label=names[task], **styles[task]) for task in tasks]
    figure.legend(handles=handles, loc="outside right center", title="task")
    text = f"{words.opening(metric)} of each task over the stream; {words.direction(table.higher_is_better)}"
    headline(figure, text + ended)
    return figure


@as_png
def lost(runs: Sequence[Run], metric: str) -> Figure:
    """What became of each task: its score when learnt (pale), at the end (solid), and the difference.

    Runs that stop where they learnt (joint, isolated) could only show zeros: they are named and not drawn.
    """
    left_out = [run for run in runs if not run.scores[metric].outlasted()]
    runs = [run for run in runs if run not in left_out]
    tasks = list(dict.fromkeys(task for run in runs for task in run.scores[metric].tasks))
    names = words.short(tasks)
    higher = runs[0].scores[metric].higher_is_better
    margin = 0.07 * max(len(name) for name in names)
    figure, axes = panels(
        len(runs), 2.9 if len(runs) > 1 else 4.0, 0.32 * len(tasks) + 1.0,
        extra=margin, sharey=True,
    )  # fmt: skip
    ends = [_learnt_and_final(run.scores[metric], tasks) for run in runs]
    known = [x for pairs in ends for pair in pairs for x in pair if math.isfinite(x)] or [1.0]
    low, high = min(0.0, *known), max(0.0, *known)
    beyond = words.unbounded(metric) and low < words.FLOOR
    if metric in words.SHARES or beyond:
        low, high = max(low, words.FLOOR), 1.0
    room = (high - low or 1.0) * 0.3
    digits = words.decimals(metric, (final - learnt for pairs in ends for learnt, final in pairs), unit=False)
    for ax, run, pairs in zip(axes, runs, ends, strict=True):
        for y, (learnt, final) in enumerate(pairs):
            ax.barh(y, learnt, height=0.72, color="#c7d7e8")
            ax.barh(y, final, height=0.36, color=COLOURS[0])
            change = final - learnt
            worse = change < 0 if higher else change > 0
            text = words.value(metric, change, signed=True, unit=False, digits=digits)
            tip = max([x for x in (learnt, final, 0.0) if math.isfinite(x)])
            if beyond and min(learnt, final) < low:
                ax.plot(low, y, marker="<", color="#9a3412", markersize=5, clip_on=False)
            ax.text(
                tip + room * 0.08, y, text, va="center", fontsize=8,
                color="#9a3412" if worse else "#374151", weight="bold" if worse else "normal",
            )  # fmt: skip
        ax.set_yticks(range(len(tasks)), names)
        ax.set(xlim=(low, high + room), ylim=(len(tasks) - 0.5, -0.5))
        ax.axvline(0, color=GREY, linewidth=0.8)
        if beyond:
            ax.set_xticks([words.FLOOR, words.FLOOR / 2, 0, 0.5, 1])
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        if metric in words.SHARES:
            ax.set_xticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
        title(ax, run, runs)
    handles = [Patch(color="#c7d7e8", label="when learnt"), Patch(color=COLOURS[0], label="at the end")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    unit = " in points" if metric in words.SHARES else ""
    text = f"{words.opening(metric)} when learnt and at the end, with the change{unit}; {words.direction(higher)}"
    if beyond:
        text += f"\n{_end()}: a bar with a tip goes on, as its number says"
    if left_out:
        names = words.short([run.name for run in left_out])
        text += f"\nNot shown: {', '.join(names)}; nothing was measured after learning"
    headline(figure, text)
    return figure


@as_png
def training_loss(runs: Sequence[Run]) -> Figure:
    """Loss of the steps: every step pale, a running mean solid, a vertical line at the end of each stage."""
    stages = [name for run in runs for name, _ in run.boundaries()]
    wide = len(runs) == 1 or len(stages) > 8 * len(runs)
    height = 2.3 + 0.045 * min(18, max(map(len, stages), default=0))
    figure, axes = panels(len(runs), 6.5 if wide else 3.3, height, sharey=True)
    lowest, highest = math.inf, -math.inf
    for ax, run in zip(axes, runs, strict=True):
        for steps, loss in _loss_by_stage(run):
            window = max(1, len(loss) // 20)
            smooth = np.convolve(loss, np.ones(window) / window, mode="valid")
            middle = steps[(window - 1) // 2 :][: len(smooth)]
            thin = slice(None, None, max(1, len(loss) // POINTS))
            ax.plot(steps[thin], loss[thin], color=COLOURS[5], linewidth=0.7, alpha=0.6)
            ax.plot(middle[thin], smooth[thin], color=COLOURS[0], linewidth=1.6)
            lowest, highest = min(lowest, loss.min()), max(highest, loss.max())
        step_axis(ax, run)
        ax.grid(axis="y")
        title(ax, run, runs)
    if 0 < lowest < highest / 20:
        axes[0].set_yscale("log")  # the panels share it
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes[0].yaxis.set_minor_locator(NullLocator())
    headline(figure, "Training loss over steps; lower is better")
    return figure


@as_png
def comparison(runs: Sequence[Run], metric: str) -> Figure:
    """Average, forgetting and learning of each run, and the mean score over the tasks seen so far.

    Where all runs have it, the score over all rows of these tasks together, and its course instead of the mean's.
    """
    names = words.short([run.name for run in runs])
    higher = runs[0].scores[metric].higher_is_better
    left = 0.3 + 0.075 * max(len(name) for name in names)
    tall = 0.3 * len(runs) + 0.8
    figure, _ = panels(1, max(8.0, left + 6.5), tall + 2.9)
    figure.clear()
    shared: Axes | None = None
    together = all(run.summaries[metric].get("pooled_by_stage") for run in runs)
    shown = {
        key: [number(run.summaries[metric].get(key)) for run in runs]
        for key in (*(["pooled"] if together else []), "average", "forgetting", "learning")
    }
    grid = figure.add_gridspec(2, len(shown), height_ratios=[tall, 2.9])
    digits = words.decimals(metric, (x for values in shown.values() for x in values))
    clipped = False
    for column, (key, values) in enumerate(shown.items()):
        ax = figure.add_subplot(grid[0, column], sharey=shared)
        # What is longer would leave the others no room, and its number stands beside it.
        lengths = [min(max(x, words.FLOOR), -words.FLOOR) for x in values] if words.unbounded(metric) else values
        clipped = clipped or lengths != values
        bars(ax, [words.of_summary(metric, key, x, digits) for x in values], lengths)
        ax.set_title(words.column(key, metric, higher))
        if shared is None:
            shared = ax
            ax.set_yticks(range(len(runs)), names)
            ax.set_ylim(len(runs) - 0.5, -0.5)
        ax.tick_params(axis="y", length=0, labelleft=column == 0)
    ax = figure.add_subplot(grid[1, :])
    stages = max((run.scores[metric].stages for run in runs), key=len)
    drawn: list[float] = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        seen = run.scores[metric].mean_seen()
        if together:
            seen = [number(x) for x in run.summaries[metric]["pooled_by_stage"]]
        drawn += seen
        look = line_style(i) | {"label": name}
        if len(seen) == 1 and len(stages) > 1:  # all tasks at once: a level to compare with, not a curve
            ax.axhline(seen[0], **look | {"marker": "", "linestyle": (0, (4, 2)), "linewidth": 1.6})
        else:
            ax.plot(range(1, len(seen) + 1), seen, **look | {"linewidth": 1.8})
    ax.set_xticks(range(1, len(stages) + 1), words.short(stages, 18))
    ax.set_xlabel("after")
    tilt(ax, stages)
    ax.set_xlim(0.8, len(stages) + 0.2)
    ax.grid(axis="y")
    percent_axis(ax, metric)
    ended = f"\nBars end at ±{-words.FLOOR:g}; their numbers go on" if clipped else ""
    ended += _ends_at_floor([ax], metric, drawn)
    what = "over all rows of the tasks" if together else "mean over the tasks"
    ax.set_title(f"{what} seen so far {words.arrow('average', higher)}")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(runs)))
    headline(figure, f"{words.opening(metric)} of each run; arrows say which way is better{ended}")
    return figure


def _end() -> str:
    return f"The axis ends at −{-words.FLOOR:g}"


def _ends_at_floor(axes: Sequence[Axes], metric: str, values: Sequence[float]) -> str:
    """Let the panels end where R² says no more, and the words for it; nothing where none of the values is lower."""
    num = sum(x < words.FLOOR for x in values)
    if not words.unbounded(metric) or not num:
        return ""
    for ax in axes:
        ax.set_ylim(words.FLOOR - 0.05, 1.05)
    return f"\n{_end()}: {num} of {len(values)} values lie{'s' * (num == 1)} below"


def _loss_by_stage(run: Run) -> list[tuple[np.ndarray, np.ndarray]]:
    """Steps and losses of each stage: a mean that ran across a boundary would mix two tasks."""
    points: dict[object, list[tuple[float, float]]] = {}
    for event in run.steps:
        if math.isfinite(loss := number(event.get("loss"))):
            points.setdefault(event.get("stage"), []).append((event["step"], loss))
    return [(np.array([x for x, _ in p]), np.array([y for _, y in p])) for p in points.values()]


def _learnt_and_final(table: Scores, tasks: Sequence[str]) -> list[tuple[float, float]]:
    index = {task: i for i, task in enumerate(table.tasks)}
    return [
        (table.learnt(index[task]), table.final(index[task])) if task in index else (math.nan, math.nan)
        for task in tasks
    ]


def _over_steps(run: Run, metric: str, task: str) -> tuple[list[float], list[float]]:
    """Every measurement of a task, within tasks or after them, by step; the last one at a step counts."""
    points = {
        float(event["step"]): number(event["metrics"][metric])
        for event in run.evaluations
        if event.get("task") == task and "step" in event and metric in event.get("metrics", {})
    }
    return sorted(points), [points[x] for x in sorted(points)]


def _xy(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
