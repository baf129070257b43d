"""The figures of a run on reactions: predicted against true yields, calibration of intervals, losses by epoch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from perdure.report import words
from perdure.report.canvas import COLOURS, GREY, as_png, headline, panels
from perdure.report.reactions_read import METHODS, Calibration, Losses, Predictions

COLUMNS = 5  # panels of tasks beside one another
NAME = 30  # characters of a task's name above such a panel
CROWD = 400  # rows; the intervals of more hide the points


@as_png
def parity(found: Predictions, trained: bool = False) -> Figure:
    """Predicted against true yields of all rows and, where there are several tasks, of each.

    Args:
        found: the rows.
        trained: these were trained on; drawn in another colour, without intervals, and said.
    """
    num = len(found.tasks) if len(found.tasks) > 1 else 0
    low = min(0.0, found.true.min(), found.predicted.min())
    high = max(1.0, found.true.max(), found.predicted.max())
    figure, axes = _parity_panels(num)
    names = words.short(found.tasks, NAME)
    for i, ax in enumerate(axes):
        rows = found if i == 0 else found.of(i - 1)
        intervals = not trained and (i > 0 or len(rows.true) <= CROWD)
        _points(ax, rows, COLOURS[1] if trained else COLOURS[0], intervals, (low, high))
        fit = f"R² {words.value('r2', rows.r2(), digits=2)}, RMSE {rows.rmse():.3f}"
        if i == 0:
            what = "rows that were trained on" if trained else "held-out rows"
            ax.set_title(f"all {words.count(len(rows.true))} {what}\n{fit}", fontsize=10)
        else:
            ax.set_title(f"{names[i - 1]}\n{fit}, n {len(rows.true)}", fontsize=7, weight="normal")
            ax.tick_params(labelsize=7)
        if i in (0, *_left(num)):
            ax.set_ylabel("predicted yield")
        if i == 0 or i > num - COLUMNS:
            ax.set_xlabel("true yield")
    headline(figure, _parity_text(found, trained))
    return figure


@as_png
def calibration(found: Calibration) -> Figure:
    """Share of held-out rows inside an interval against the share that should be, before and after calibration.

    The grey band is where 95 % of shares of so many rows lie if an interval keeps its word.
    """
    figure, (ax,) = panels(1, 5.6, 4.9)
    levels = np.linspace(0, 1, 101)
    half = 1.96 * np.sqrt(levels * (1 - levels) / found.rows)
    ax.fill_between(
        levels, np.clip(levels - half, 0, 1), np.clip(levels + half, 0, 1), color="#e5e7eb", linewidth=0,
        label=f"95 % by chance at n {words.count(found.rows)}",
    )  # fmt: skip
    ax.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="as they should")
    if any(map(math.isfinite, found.raw)):
        ax.plot(
            found.levels, found.raw, color=COLOURS[1], marker="s", markersize=4, linestyle=(0, (5, 2)),
            label="raw: Gaussian, from the bare std",
        )  # fmt: skip
    ax.plot(found.levels, found.observed, color=COLOURS[0], marker="o", markersize=4, label="calibrated")
    ticks = [0, 0.2, 0.4, 0.6, 0.8, 1]
    ax.set(xlim=(0, 1), ylim=(-0.02, 1.02), xticks=ticks, yticks=ticks)
    _percent(ax)
    ax.grid()
    ax.set(xlabel="share that an interval should hold", ylabel="share that it holds")
    ax.legend(loc="upper left", fontsize=8)
    method = METHODS.get(found.method, found.method)
    rows = words.count(found.rows)
    headline(figure, f"Intervals from {method} on {rows} held-out rows that did not set their width")
    return figure


@as_png
def epoch_losses(found: Sequence[Losses], stages: Sequence[str]) -> Figure:
    """Loss of training and on held-out rows after each epoch, a panel for each stage.

    Args:
        found: the stages that were measured.
        stages: the names of all stages; a stage beyond them is called by its number.
    """
    names = words.short(stages, NAME)
    wide = len(found) == 1
    figure, axes = panels(
        len(found), 6.0 if wide else 3.3 if len(found) < 4 else 1.98, 3.2 if wide else 1.9, sharey=True
    )
    for ax, losses in zip(axes, found, strict=True):
        epochs = losses.values["epoch"]
        # A single epoch is a point, not a line.
        alone = "s" if len(epochs) == 1 else ""
        for name, colour, marker in (("training_loss", COLOURS[1], alone), ("held_out_loss", COLOURS[0], "o")):
            ax.plot(epochs, losses.values[name], color=colour, marker=marker, markersize=2.5, linewidth=1.4)
        ax.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
        name = names[losses.stage - 1] if 0 < losses.stage <= len(names) else f"stage {losses.stage}"
        end = f"R² {words.value('r2', losses.values['held_out_r2'][-1], digits=2)}"
        end += f", RMSE {words.value('rmse', losses.values['held_out_rmse'][-1], digits=3)}"
        ax.set_title(f"{name}\n{end}", fontsize=9 if wide else 7, weight="normal")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        ax.tick_params(labelsize=7)
        ax.grid(axis="y")
        spec = ax.get_subplotspec()
        if spec is not None and spec.is_first_col():
            ax.set_ylabel("loss")
        ax.set_xlabel("epoch", fontsize=8)
    known = [x for losses in found for name in ("training_loss", "held_out_loss") for x in losses.values[name]]
    known = [x for x in known if math.isfinite(x)]
    if known and 0 < min(known) < max(known) / 20:
        axes[0].set_yscale("log")  # the panels share it
        axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0].yaxis.set_major_formatter(lambda x, _: f"{x:g}")  # the default writes mathtext
        axes[0].yaxis.set_minor_locator(NullLocator())
    handles = [
        Line2D([], [], color=COLOURS[1], label="training, with dropout"),
        Line2D([], [], color=COLOURS[0], marker="o", markersize=3, label="on held-out rows"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    figure.set_figheight(figure.get_figheight() + 1.0)  # for what stands above and below the panels
    headline(
        figure,
        "Loss after each epoch of each stage; lower is better\n"
        "Above each panel: R² and RMSE on held-out rows after the last epoch",
    )
    return figure


def _parity_panels(num: int) -> tuple[Figure, list[Axes]]:
    """A large panel and `num` small ones: beside it as many as fit, the others below."""
    if not num:
        return panels(1, 5.4, 5.6)
    beside = 2 * (COLUMNS - 2)
    rows = 2 + max(0, -(-(num - beside) // COLUMNS))
    columns = COLUMNS if num > 4 else 4 if num > 2 else 3
    figure, (spare,) = panels(1, 2.0 * columns, 2.15 * rows + 0.5)
    spare.remove()
    grid = figure.add_gridspec(rows, columns)
    cells = [(r, c) for r in range(2) for c in range(2, columns)]
    cells += [(r, c) for r in range(2, rows) for c in range(columns)]
    return figure, [
        figure.add_subplot(grid[0:2, 0:2]),
        *(figure.add_subplot(grid[cell]) for cell in cells[:num]),
    ]


def _left(num: int) -> range:
    """Numbers of the small panels that stand at the left edge."""
    return range(2 * (COLUMNS - 2) + 1, num + 1, COLUMNS)


def _points(ax: Axes, rows: Predictions, colour: str, intervals: bool, limits: tuple[float, float]) -> None:
    tested = ~rows.sets_width & np.isfinite(rows.lower) & np.isfinite(rows.upper)
    if intervals and tested.any():
        ax.vlines(
            rows.true[tested], rows.lower[tested], rows.upper[tested],
            color=colour, alpha=0.16, linewidth=0.8, zorder=1,
        )  # fmt: skip
    ax.plot(limits, limits, color="black", linewidth=0.8, zorder=2)
    ax.plot(
        rows.true, rows.predicted, linestyle="", marker="o", color=colour, markeredgewidth=0, zorder=3,
        markersize=3 if len(rows.true) <= CROWD else 2.5, alpha=0.6 if len(rows.true) <= CROWD else 0.35,
    )  # fmt: skip
    room = 0.02 * (limits[1] - limits[0])
    ends = (limits[0] - room, limits[1] + room)
    ax.set(xlim=ends, ylim=ends, xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.set_aspect("equal")
    _percent(ax)


def _percent(ax: Axes) -> None:
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda x, _: f"{x * 100:.0f} %")


def _parity_text(found: Predictions, trained: bool) -> str:
    if trained:
        return (
            "Predicted against true yields of rows that were TRAINED ON\n"
            "This says nothing of what was learnt: only the figure of held-out rows does"
        )
    text = "Predicted against true yields of held-out rows; on the black line the two agree"
    share, num = found.coverage()
    if num:
        text += (
            f"\nPale bars: 90 % intervals; they hold {words.percent(share)} of the {words.count(num)} rows that "
            "did not set their width"
        )
        if len(found.true) > CROWD and len(found.tasks) > 1:
            text += " (drawn in the small panels)"
    return text
