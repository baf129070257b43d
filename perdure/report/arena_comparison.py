"""The figure of several arena runs: six panels, a colour for each group of runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from perdure.report import words
from perdure.report.arena_pool import Group, labels, other_evaluation
from perdure.report.arena_run import ArenaRun, Estimate, Moments
from perdure.report.arena_words import reworded
from perdure.report.axes import percent_axis, tilt
from perdure.report.canvas import COLOURS, GREY, as_png, headline, line_style, panels

COMPARISON = "complete_comparison.png"
WIDTH, HEIGHT = 4.9, 3.1  # inches of a panel
WIDEST = 0.8  # share of a place that its bars take
LEAST = 0.05  # of an axis of changes: 5 points of exact match
# Bars whose colours come again.
HATCHES = ("", "///", "xxx")
MOMENTS = ("initial", "final", "best")
WORDINGS = ("exact match", "right answer\nstated", "exact match in\npretraining wording")


@dataclass(frozen=True, slots=True)
class Bars:
    """Bars side by side at each of several places: values[group][place]."""

    places: Sequence[str]
    values: Sequence[Sequence[Estimate]]


def draw_comparison(groups: Sequence[Group]) -> Figure:
    """Held-out exact match over episodes; initial, final and best; by kind; gain by phase; strict, stated and in
    the wording of pretraining, before and after; general probe, trained parameters and seconds an episode.

    Intervals are of 95 %: over held-out rows of a lone run, over seeds where a group has several.
    """
    lowest = 1.0 + 0.34 * len(groups)
    figure, axes = panels(6, WIDTH, [HEIGHT] * 4 + [max(HEIGHT, lowest)] * 2)
    _over_episodes(axes[0], groups)
    _bars(axes[1], _by_moment(groups))
    axes[1].set_title("initial, final and best")
    _bars(axes[2], _by_kind(groups))
    axes[2].set_title("final score of each kind")
    _bars(axes[3], _by_phase(groups))
    axes[3].set_title("gain by phase of learning, points")
    for ax in axes[:3]:
        percent_axis(ax, "exact_match")
        ax.set_ylim(-0.03, 1.09)  # room for a number above an interval that ends at 100 %
    _points_axis(axes[3])
    _wordings(axes[4], groups)
    _costs(axes[5], groups)
    _legend(figure, labels(groups))
    seeds = any(len(group.runs) > 1 for group in groups)
    over = "over seeds where n is above 1, else over held-out rows" if seeds else "over held-out rows"
    text = f"Held-out exact match in the arena; higher is better. Intervals of 95 % {over}"
    if any(other_evaluation(groups[0], group) for group in groups[1:]):
        text += "\nNot all were scored on the same held-out rows or kinds: compare those that were"
    headline(figure, text)
    return figure


comparison = as_png(draw_comparison)


def _look(index: int) -> dict[str, Any]:
    return {**line_style(index), "linewidth": 1.6}


def _legend(figure: Figure, names: Sequence[str]) -> None:
    """The names below the panels, in as many columns as fit; the figure grows by its height."""
    texts = [textwrap.fill(name, 62) for name in names]
    lines = [line for text in texts for line in text.split("\n")]
    columns = max(1, min(len(texts), int(figure.get_figwidth() / (0.8 + 0.075 * max(map(len, lines))))))
    rows, tallest = -(-len(texts) // columns), max(text.count("\n") + 1 for text in texts)
    figure.set_figheight(figure.get_figheight() + 0.1 + 0.19 * rows * tallest)
    handles = [Line2D([], [], label=text, **_look(i)) for i, text in enumerate(texts)]
    figure.legend(handles=handles, loc="outside lower center", ncols=-(-len(texts) // rows), handlelength=4)


def _over_episodes(ax: Axes, groups: Sequence[Group]) -> None:
    for i, group in enumerate(groups):
        places = [point.episode for point in group.first.history]
        curve = [(x, one) for x in places if (one := group.share(_measured(x))).known]
        x = [episode for episode, _ in curve]
        ax.plot(x, [one.value for _, one in curve], **_look(i), markevery=max(1, len(x) // 20))
        known = [(episode, one) for episode, one in curve if one.bounded]
        ax.fill_between(
            [episode for episode, _ in known], [one.low for _, one in known], [one.high for _, one in known],
            color=COLOURS[i % len(COLOURS)], alpha=0.15, linewidth=0,
        )  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.set_xlabel("episode")
    ax.set_title("exact match over episodes")
    ax.grid(axis="y")


def _measured(episode: int) -> Callable[[ArenaRun], Estimate]:
    return lambda run: next((point.exact for point in run.history if point.episode == episode), Estimate())


def _by_moment(groups: Sequence[Group]) -> Bars:
    def at(moment: str) -> Callable[[ArenaRun], Estimate]:
        return lambda run: getattr(run.scores.exact, moment)

    return Bars(MOMENTS, [[group.share(at(moment)) for moment in MOMENTS] for group in groups])


def _by_kind(groups: Sequence[Group]) -> Bars:
    kinds = list(dict.fromkeys(kind for group in groups for kind in group.first.kinds))

    def of(kind: str) -> Callable[[ArenaRun], Estimate]:
        return lambda run: run.kinds[kind].exact.final if kind in run.kinds else Estimate()

    names = words.short([words.label(kind) for kind in kinds], 16)
    return Bars(names, [[group.share(of(kind)) for kind in kinds] for group in groups])


def _by_phase(groups: Sequence[Group]) -> Bars:
    names = phase_names(groups) or ["none"]
    return Bars(words.short(names, 18), [[phase_gain(group, name) for name in names] for group in groups])


def phase_names(groups: Sequence[Group]) -> list[str]:
    """The phases of all groups, in the order of the run that has most of them."""
    runs = sorted((run for group in groups for run in group.runs), key=lambda run: -len(run.phases))
    return list(dict.fromkeys(phase.name for run in runs for phase in run.phases))


def phase_gain(group: Group, name: str) -> Estimate:
    """What a phase of that name gained, over the seeds that had one."""
    return group.value(lambda run: next((phase.gain for phase in run.phases if phase.name == name), math.nan))


def _bars(ax: Axes, table: Bars) -> None:
    """Bars with intervals and, where they are wide enough for it, their numbers."""
    width = WIDEST / len(table.values)
    inches = width * (WIDTH - 0.9) / max(len(table.places), 1)
    for i, row in enumerate(table.values):
        for place, one in enumerate(row):
            if not one.known:
                continue
            x = place + (i - (len(table.values) - 1) / 2) * width
            hatch = HATCHES[i // len(COLOURS) % len(HATCHES)]
            ax.bar(x, one.value, width * 0.92, color=COLOURS[i % len(COLOURS)], hatch=hatch, edgecolor="white")
            if one.bounded:
                ax.vlines(x, one.low, one.high, color="#374151", linewidth=1 if inches > 0.1 else 0.6)
            if inches >= 0.2:
                _number(ax, x, one)
    ax.set_xticks(range(len(table.places)), table.places)
    ax.set_xlim(-0.5, len(table.places) - 0.5)
    tilt(ax, table.places)
    ax.tick_params(axis="x", length=0)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.grid(axis="y")


def _number(ax: Axes, x: float, one: Estimate) -> None:
    """A bar's value in percent or points, beyond its end and its interval."""
    below = one.value < 0
    end = (one.low if below else one.high) if one.bounded else one.value
    ax.annotate(
        words.value("exact_match", one.value, unit=False), (x, end), xytext=(0, -2 if below else 2),
        textcoords="offset points", ha="center", va="top" if below else "bottom", fontsize=7.5, color="#374151",
    )  # fmt: skip


def _points_axis(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(lambda y, _: words.value("exact_match", y, signed=True, unit=False))
    ax.yaxis.set_major_locator(MaxNLocator(nbins=6))
    ax.margins(y=0.12)
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, 0.0), max(high, LEAST))


def wordings(group: Group) -> list[Moments]:
    """Before and after: the strict score, the lenient one, and the same rows in the wording of pretraining."""

    def pair(of: Callable[[ArenaRun], Moments]) -> Moments:
        return Moments(group.share(lambda run: of(run).initial), group.share(lambda run: of(run).final))

    return [
        pair(lambda run: run.scores.exact),
        pair(lambda run: run.scores.stated),
        pair(lambda run: run.scores.plain),
    ]


def _wordings(ax: Axes, groups: Sequence[Group]) -> None:
    width = WIDEST / len(groups)
    for i, group in enumerate(groups):
        look = {"color": COLOURS[i % len(COLOURS)], "marker": line_style(i)["marker"], "linestyle": ""}
        for place, pair in enumerate(wordings(group)):
            x = place + (i - (len(groups) - 1) / 2) * width
            before, after = pair.initial.value, pair.final.value
            if math.isfinite(before) and math.isfinite(after):
                ax.vlines(x, min(before, after), max(before, after), color=look["color"], linewidth=1.4, zorder=1)
            ax.plot(x, before, **look, markersize=6, markerfacecolor="white", zorder=2)
            ax.plot(x, after, **look, markersize=6, zorder=3)
    part = f"\n({reworded(groups[0])})" if reworded(groups[0]) else ""
    ax.set_xticks(range(len(WORDINGS)), [*WORDINGS[:-1], WORDINGS[-1] + part])
    ax.set_xlim(-0.5, len(WORDINGS) - 0.5)
    ax.tick_params(axis="x", length=0)
    ax.grid(axis="y")
    percent_axis(ax, "exact_match")
    ax.set_title("before (hollow) and after (filled)")


def _costs(ax: Axes, groups: Sequence[Group]) -> None:
    """What the general probe lost or gained as a bar; beside it what training cost."""
    metric = probe_metric(groups)
    changes = [group.value(lambda run: probe_change(run, metric)) for group in groups]
    known = [end for one in changes for end in (one.value, one.low, one.high) if math.isfinite(end)]
    # A change too small to matter must look small.
    low, high = min([-LEAST, *known]), max([LEAST, *known])
    for y, (group, one) in enumerate(zip(groups, changes, strict=True)):
        hatch = HATCHES[y // len(COLOURS) % len(HATCHES)]
        value = one.value if one.known else 0.0
        ax.barh(y, value, 0.6, color=COLOURS[y % len(COLOURS)], hatch=hatch, edgecolor="white")
        if one.bounded:
            ax.hlines(y, one.low, one.high, color="#374151", linewidth=1)
        change = words.value(metric, one.value, signed=True) if one.known else "no probe"
        cost = f"{words.count(group.first.trainable)} parameters trained"
        text = f"{change}, {seconds(group)} an episode\n{cost}"
        ax.text(high + 0.04 * (high - low), y, text, va="center", fontsize=7.5, linespacing=1.15)
    ax.set_xlim(low - 0.03 * (high - low), low + 1.75 * (high - low))
    ax.set_ylim(len(groups) - 0.5, -0.5)
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.axvline(0, color=GREY, linewidth=0.8)
    ax.grid(axis="x")
    unit = 100 if metric in words.SHARES else 1
    ticks = MaxNLocator(nbins=5, integer=unit == 100).tick_values(unit * low, unit * high)
    places = [tick / unit for tick in ticks if unit * low <= tick <= unit * high]
    ax.set_xticks(places, [words.value(metric, x, signed=True, unit=False) for x in places])
    ax.set_title(f"general probe: change of {words.label(metric)}{', points' * (metric in words.SHARES)}")


def probe_metric(groups: Sequence[Group]) -> str:
    """The metric of the general probe that stands for all groups; exact match where none was scored."""
    found = [metric for group in groups if (metric := group.first.probe_change()[0])]
    return words.main_metric(found or ["exact_match"])


def probe_change(run: ArenaRun, metric: str) -> float:
    """The change of one metric of the general probe; NaN where it was not scored."""
    before, after = run.probe.get(metric, (math.nan, math.nan))
    return after - before


def seconds(group: Group) -> str:
    """Seconds an episode took, without evaluation."""
    value = group.value(lambda run: run.seconds_per_episode).value
    return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"
