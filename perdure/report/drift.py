"""The figure of how far each stage moved the weights, by layer group or by run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perdure.report import words
from perdure.report.axes import tilt
from perdure.report.canvas import as_png, headline, line_style, panels
from perdure.report.read import Run, number

SINCE = {
    "relative_change": "since the stage before",
    "relative_change_from_start": "since the start",
}
NAMED = 9  # lines that a legend names one by one
BLOCK = "block "


@as_png
def drift(runs: Sequence[Run]) -> Figure:
    """‖change‖ / ‖weights‖ after each stage: a line for each layer group of one run, or each of several runs."""
    stages = max((run.stages for run in runs), key=len)
    lines = _groups(runs[0]) if len(runs) == 1 else _totals(runs)
    named = _named(list(lines))
    legend = 0.6 + 0.075 * max(len(name) for name in words.short(named, 28))
    figure, axes = panels(
        2, 3.6 if len(stages) <= 8 else 6.5, 2.9 + 0.045 * min(18, max(map(len, stages))), extra=legend
    )
    looks = _looks(list(lines))
    drawn = [number(entry.get(key)) for entries in lines.values() for entry in entries if entry for key in SINCE]
    for ax, (key, since) in zip(axes, SINCE.items(), strict=True):
        for name, entries in lines.items():
            values = [math.nan if entry is None else number(entry.get(key)) for entry in entries]
            ax.plot(range(1, len(values) + 1), values, **looks[name], label=name)
        _stages(ax, stages)
        ax.set_ylim(0, 1.08 * max([x for x in drawn if x > 0], default=1.0))
        _spread(ax, [x for x in drawn if x > 0])
        ax.yaxis.set_major_formatter(lambda x, _: f"{x * 100:g} %")
        ax.grid(axis="y")
        ax.set_title(since)
    known = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        [known[name] for name in named], words.short(named, 28), loc="outside right center",
        title="weights of" if len(runs) == 1 else None,
    )  # fmt: skip
    headline(figure, "Parameter drift after each stage: the norm of the change over that of the weights before it")
    return figure


def _groups(run: Run) -> dict[str, list[Mapping[str, Any] | None]]:
    """Each group's entry after each stage, and that of all weights together."""
    names = dict.fromkeys(name for stage in run.drift if stage for name in stage["groups"])
    lines = {name: [stage["groups"].get(name) if stage else None for stage in run.drift] for name in names}
    whole = {"all weights": [stage["total"] if stage else None for stage in run.drift]} if len(names) > 1 else {}
    return {**lines, **whole}


def _totals(runs: Sequence[Run]) -> dict[str, list[Mapping[str, Any] | None]]:
    return {run.name: [stage["total"] if stage else None for stage in run.drift] for run in runs}


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Blocks from dark to light by their depth, all others by their own colours; all weights together in black."""
    blocks = [name for name in names if name.startswith(BLOCK)]
    depth = colormaps["viridis"]
    others = iter(range(len(names)))
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in blocks:
            shade = depth(0.9 * blocks.index(name) / max(len(blocks) - 1, 1))
            found[name] = {"color": shade, "marker": ".", "linewidth": 1.2}
        elif name == "all weights":
            found[name] = {"color": "black", "marker": "o", "markersize": 4, "linewidth": 2.2}
        else:
            found[name] = line_style(next(others) + bool(blocks)) | {"linewidth": 1.6}
    return found


def _named(names: Sequence[str]) -> list[str]:
    """What the legend names: all of a few; of many blocks the first, the last and some between."""
    blocks = [name for name in names if name.startswith(BLOCK)]
    if len(names) <= NAMED or len(blocks) < 3:
        return list(names)
    room = max(3, NAMED - (len(names) - len(blocks)))
    chosen = {blocks[round(i * (len(blocks) - 1) / (room - 1))] for i in range(room)}
    return [name for name in names if name not in blocks or name in chosen]


def _spread(ax: Axes, values: Sequence[float]) -> None:
    """A scale by powers of ten where the least would not be seen beside the largest; 0 stays at the bottom."""
    if values and max(values) > 20 * min(values):
        lowest = math.floor(math.log10(max(min(values), 1e-3 * max(values))))
        highest = math.ceil(math.log10(max(values)))
        ax.set_yscale("symlog", linthresh=10.0**lowest, linscale=0.5)
        ax.set_yticks([0.0, *(10.0**power for power in range(lowest, highest + 1))])
        ax.set_ylim(0, 2 * max(values))


def _stages(ax: Axes, stages: Sequence[str]) -> None:
    ax.set_xticks(range(1, len(stages) + 1), words.short(stages, 18))
    ax.set_xlim(0.8, len(stages) + 0.2)
    ax.set_xlabel("after")
    tilt(ax, stages)
