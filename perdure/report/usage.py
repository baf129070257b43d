"""The figure of a strategy's capacity: which share of each layer's weights belongs to which task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from perdure.report import words
from perdure.report.canvas import COLOURS, MAX_WIDTH, headline, panels, png, style

FREE = "free"  # stands in a strategy's usage for weights that no task owns
ROWS = 32  # rows that one picture can name; of a network with more layers, blocks are
HATCHES = ("", "///", "...")
WRITTEN = 0.06  # the smallest share of a bar that has room for its figure


def usage_figure(usage: Mapping[str, Mapping[str, int]]) -> bytes:
    """Shares of each layer's weights by task as stacked bars, with all layers together on top, as a PNG.

    Args:
        usage: layer -> task -> weights that it owns; tasks in the order of training, "free" for what none owns. It
            is what `Strategy.usage` gives.
    """
    with style():
        return png(_draw(usage))


def _draw(usage: Mapping[str, Mapping[str, int]]) -> Figure:
    layers = {name: dict(counts) for name, counts in usage.items()}
    if len(layers) > ROWS:
        layers = _folded(layers)
    tasks = [*dict.fromkeys(task for counts in layers.values() for task in counts if task != FREE)]
    if any(counts.get(FREE) for counts in layers.values()):
        tasks.append(FREE)
    names = ["all layers", *layers]
    counts = [_summed(layers), *layers.values()]
    labels = [words.short([name], 40)[0] for name in ["all layers", *_endings(list(layers))]]
    left = 0.075 * max(map(len, labels)) + 0.9
    legend = 0.6 + 0.075 * min(24, max(map(len, tasks)))
    height = max(0.27 * len(names) + 1.1, 0.19 * len(tasks) + 1.0)
    figure, (ax,) = panels(1, min(MAX_WIDTH - legend, left + 5.0), height, extra=legend)
    # The first row stands apart from its parts.
    places = [-0.4, *range(1, len(names))]
    begins = [0.0] * len(names)
    sizes = [sum(each.values()) for each in counts]
    for i, task in enumerate(tasks):
        look = _look(i, task)
        shares = [each.get(task, 0) / size if size else 0.0 for each, size in zip(counts, sizes, strict=True)]
        ax.barh(places, shares, left=begins, height=0.78, linewidth=0.6, **look)
        for y, begin, share in zip(places, begins, shares, strict=True):
            if share >= WRITTEN:
                ax.text(
                    begin + share / 2, y, f"{share * 100:.0f}", ha="center", va="center", fontsize=7,
                    color="#374151" if task == FREE or _pale(i) else "white",
                )  # fmt: skip
        begins = [begin + share for begin, share in zip(begins, shares, strict=True)]
    for y, size in zip(places, sizes, strict=True):
        ax.text(1.015, y, f"{size:,}", va="center", fontsize=7.5, color="#374151")
    ax.text(1.015, -1.15, "weights", va="center", fontsize=7.5, color="#374151")
    ax.set_yticks(places, labels)
    ax.get_yticklabels()[0].set_fontweight("bold")
    ax.set(xlim=(0, 1.13), ylim=(len(names) - 0.4, -1.5))
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_bounds(0, 1)
    handles = [
        Patch(**_look(i, task), label=name)
        for i, (task, name) in enumerate(zip(tasks, words.short(tasks, 24), strict=True))
    ]
    figure.legend(handles=handles, loc="outside right center", title="owned by")
    headline(figure, "Share of each layer's weights that each task owns, in percent")
    return figure


def _look(index: int, task: str) -> dict[str, Any]:
    """Colours first, then hatches, so that 21 tasks stay apart; what is free is nearly white."""
    if task == FREE:
        return {"facecolor": "#f3f4f6", "edgecolor": "#d1d5db"}
    n = len(COLOURS)
    return {"facecolor": COLOURS[index % n], "edgecolor": "white", "hatch": HATCHES[index // n % len(HATCHES)]}


def _pale(index: int) -> bool:
    return COLOURS[index % len(COLOURS)] in ("#E69F00", "#56B4E9", "#CC79A7")


def _folded(layers: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Layers of one block added up; of more blocks than a picture can name, those that differ in numbers alone."""
    found = _together(layers, r"^((?:.*?\.)?\d+)\..*$", r"\1")
    return found if len(found) <= ROWS else _together(layers, r"\d+", "*")


def _together(layers: Mapping[str, Mapping[str, int]], pattern: str, name: str) -> dict[str, dict[str, int]]:
    alike: dict[str, dict[str, Mapping[str, int]]] = {}
    for layer, counts in layers.items():
        alike.setdefault(re.sub(pattern, name, layer), {})[layer] = counts
    return {name: _summed(each) for name, each in alike.items()}


def _endings(names: Sequence[str]) -> list[str]:
    """Dotted names without the parts that all begin with, but for the last of these."""
    paths = [name.split(".") for name in names]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths):
        common += 1
    return [".".join(path[max(common - 1, 0) :]) for path in paths]


def _summed(layers: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for counts in layers.values():
        for task, count in counts.items():
            total[task] = total.get(task, 0) + count
    return total
