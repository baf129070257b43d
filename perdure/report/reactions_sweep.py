"""The figure of a sweep over LoRA ranks: when is LoRA as good as training all weights?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from perdure.errors import RunError
from perdure.report import words
from perdure.report.arena_pool import over_seeds
from perdure.report.arena_run import Estimate
from perdure.report.canvas import COLOURS, as_png, headline, panels


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One run of a sweep: its R² and RMSE over all held-out rows together, and how many weights it trained."""

    rank: int | None  # of LoRA; None: full fine-tuning
    seed: int
    r2: float
    rmse: float
    parameters: int


def draw_sweep(rows: Sequence[SweepRow]) -> Figure:
    """Pooled R² and RMSE against LoRA rank, mean and 95 % t-interval over seeds, with full fine-tuning as a line.

    Raises:
        RunError: there is no run with a rank.
    """
    ranks = sorted({row.rank for row in rows if row.rank is not None})
    if not ranks:
        raise RunError(f"rows: a sweep needs at least one run with a LoRA rank, got {len(rows)} without")
    full = [row for row in rows if row.rank is None]
    figure, axes = panels(2, 4.9, 4.1)
    for ax, metric, better in zip(axes, ("r2", "rmse"), ("↑", "↓"), strict=True):
        found = [over_seeds(getattr(row, metric) for row in rows if row.rank == rank) for rank in ranks]
        whole = over_seeds(getattr(row, metric) for row in full)
        _full(ax, whole)
        errors = [[_half(x, x.low) for x in found], [_half(x, x.high) for x in found]]
        ax.errorbar(
            ranks, [x.value for x in found], yerr=errors, color=COLOURS[0], marker="o", markersize=5,
            capsize=3, elinewidth=1.2,
        )  # fmt: skip
        _axes(ax, ranks, [next(row.parameters for row in rows if row.rank == rank) for rank in ranks])
        ax.set_ylabel(f"{words.label(metric)} over all held-out rows {better}")
        ax.grid(axis="y")
    handles: list[Line2D | Patch] = [Line2D([], [], color=COLOURS[0], marker="o", label="LoRA")]
    if full:
        label = f"full fine-tuning, {short_count(full[0].parameters)} weights"
        handles.append(Line2D([], [], color=COLOURS[1], linestyle=(0, (5, 2)), label=label))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    headline(figure, _text(rows))
    return figure


sweep = as_png(draw_sweep)


def short_count(num: int) -> str:
    """A number of weights in three digits: 98,304 is "98.3k"."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if num >= unit:
            scaled = num / unit
            return f"{scaled:.{max(0, 2 - int(math.log10(scaled)))}f}{name}"
    return str(num)


def _full(ax: Axes, whole: Estimate) -> None:
    if whole.known:
        ax.axhline(whole.value, color=COLOURS[1], linestyle=(0, (5, 2)), linewidth=1.4)
    if whole.bounded:
        ax.axhspan(whole.low, whole.high, color=COLOURS[1], alpha=0.12, linewidth=0)


def _half(x: Estimate, end: float) -> float:
    """Length of a whisker; none without an interval."""
    return abs(x.value - end) if x.bounded else 0.0


def _axes(ax: Axes, ranks: Sequence[int], parameters: Sequence[int]) -> None:
    """Ranks below, on a scale of doublings, and above them the weights that each trains."""
    ax.set_xscale("log", base=2)
    ax.set_xlim(ranks[0] / 1.4, ranks[-1] * 1.4)
    top = ax.secondary_xaxis("top")
    for axis, texts in ((ax.xaxis, map(str, ranks)), (top.xaxis, map(short_count, parameters))):
        axis.set_major_locator(FixedLocator(list(ranks)))
        axis.set_major_formatter(FixedFormatter(list(texts)))
        axis.set_minor_locator(NullLocator())
    ax.set_xlabel("LoRA rank")
    top.set_xlabel("weights that are trained", fontsize=9)
    top.spines[:].set_visible(False)


def _text(rows: Sequence[SweepRow]) -> str:
    counts = {rank: sum(row.rank == rank for row in rows) for rank in {row.rank for row in rows}}
    least, most = min(counts.values()), max(counts.values())
    seeds = "one seed" if most == 1 else f"{most} seeds" if least == most else f"{least} to {most} seeds"
    text = f"LoRA by rank against full fine-tuning, {seeds} each"
    return text + ("; whiskers and band: 95 % intervals of the means" if most > 1 else "; so without intervals")
