"""Tables and figures of the study, from the cells that there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.cells import make_cell
from benchmarks.worlds import FAMILIES, TABLE, World, runs
from perdure.storage import write_text

Table = dict[str, dict[str, list[float]]]  # strategy → column → a value a seed

# Ends the name of a row that was told each row's task.
TOLD = " (told the task)"
COLUMNS = {
    "average": ("average, %", 100, 1),
    "forgetting": ("forgetting, pt", 100, 1),
    "learning": ("when learnt, %", 100, 1),
    "removed": ("naive's forgetting removed, %", 100, 0),
    "learns": ("of naive's learning, %", 100, 0),
    "of_joint": ("average of joint's, %", 100, 0),
    "time": ("processor time, × naive", 1, 2),
    "megabytes": ("state, MB", 1, 2),
    "rows": ("rows held", 1, 0),
}


def collect(out: Path, world: World, names: Sequence[str], seeds: Sequence[int]) -> Table:
    """For each strategy that has cells, each column's values over the seeds; ratios are taken seed by seed."""
    cells = {(name, seed): make_cell(out, world, name, seed).read() for name in names for seed in seeds}
    table: Table = {}
    for seed in seeds:
        naive, joint = cells.get(("naive", seed)), cells.get(("joint", seed))
        if naive is not None:
            found = table.setdefault("frozen base", {})
            start = float(np.nanmean(np.array(naive["R"][0], dtype=float)))
            found.setdefault("average", []).append(start)
            if joint is not None:
                found.setdefault("of_joint", []).append(_share({"metrics": {"average": start}}, joint, "average"))
        for name in names:
            cell = cells[name, seed]
            if cell is None:
                continue
            values = dict(cell["metrics"]) | {"rows": cell["rows_held"], "megabytes": cell["state_bytes"] / 1e6}
            if naive is not None:
                values["time"] = cell["seconds"] / cell["steps"] * naive["steps"] / naive["seconds"]
                if name not in ("joint", "isolated"):
                    values["removed"] = 1 - _share(cell, naive, "forgetting")
                    values["learns"] = _share(cell, naive, "learning")
            if joint is not None:
                values["of_joint"] = _share(cell, joint, "average")
            told = name + TOLD if cell.get("inferred") else name
            for key, value in values.items():
                if key in COLUMNS:
                    table.setdefault(told, {}).setdefault(key, []).append(math.nan if value is None else value)
            if cell.get("inferred"):
                row = table.setdefault(name, {})
                for key, value in _compared({"metrics": cell["inferred"]}, naive, joint).items():
                    row.setdefault(key, []).append(value)
    return table


def _compared(cell: Mapping[str, Any], naive: Any, joint: Any) -> dict[str, float]:
    """What is asked of scores alone, with the shares of naive's and joint's."""
    values = {key: cell["metrics"][key] for key in ("average", "forgetting", "learning")}
    if naive is not None:
        values |= {"removed": 1 - _share(cell, naive, "forgetting"), "learns": _share(cell, naive, "learning")}
    if joint is not None:
        values["of_joint"] = _share(cell, joint, "average")
    return values


def _share(cell: Mapping[str, Any], reference: Mapping[str, Any], key: str) -> float:
    """A metric as a share of a reference's; nan where that has none."""
    whole = reference["metrics"][key]
    return float(cell["metrics"][key] / whole) if whole > 0 else math.nan


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of its 95 % t-interval; nan for the width of one value."""
    from scipy.stats import t

    known = [value for value in values if math.isfinite(value)]
    if len(known) < 2:
        return (known[0] if known else math.nan), math.nan
    half = t.ppf(0.975, len(known) - 1) * np.std(known, ddof=1) / math.sqrt(len(known))
    return float(np.mean(known)), float(half)


def markdown(table: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The table for the documents, by average within a family's order in TABLE."""
    lines = [f"| strategy | {' | '.join(title for title, _, _ in COLUMNS.values())} |"]
    lines.append("| --- |" + " ---: |" * len(COLUMNS))
    for name, values in table.items():
        cells = []
        for key, (_, scale, digits) in COLUMNS.items():
            mean, half = interval(values.get(key, ()))
            if not math.isfinite(mean):
                cells.append("–")
            elif not math.isfinite(half) or key in ("rows", "megabytes", "time"):
                cells.append(f"{mean * scale:.{digits}f}")
            else:
                cells.append(f"{mean * scale:.{digits}f} ± {half * scale:.{digits}f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report(out: Path, worlds: Sequence[World], seeds: Sequence[int], console: Console) -> None:
    """Print each world's table, and write results.md and a figure a world."""
    text = []
    for world in worlds:
        here = [name for name in TABLE if runs(name, world)]
        table = collect(out, world, here, seeds)
        if not table:
            continue
        counts = sorted({len(values["average"]) for values in table.values()})
        over = "1 seed" if counts == [1] else f"{'–'.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} seeds"
        text.append(f"## {world.name}\n\nMean over {over} ± 95 % t-interval.\n\n{markdown(table)}")
        if any(values.get("forgetting") for values in table.values()):
            image = out / f"{world.name}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            aside = image.with_name(f".{image.name}.partial")
            aside.write_bytes(figure(world.name, table))
            aside.replace(image)
    if text:
        write_text(out / "results.md", "\n".join(text))
        console.out("\n".join(text), highlight=False)


def figure(title: str, table: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Forgetting against learning: a labelled point a strategy, with a pale one for each seed."""
    from matplotlib.lines import Line2D

    from perdure.report.canvas import COLOURS, GREY, headline, panels, png, style

    clouds = {
        name: np.array([values["forgetting"], values["learning"]]) * 100  # [2, seeds]
        for name, values in table.items()
        if name in TABLE and values.get("forgetting")
    }
    middles = {name: (float(cloud[0].mean()), float(cloud[1].mean())) for name, cloud in clouds.items()}
    levels = {name: 100 * float(np.mean(table[name]["average"])) for name in ("isolated", "joint") if name in table}
    colours = dict(zip(FAMILIES, (GREY, *COLOURS, "#8c564b", "#7f7f00", "#5e4fa2"), strict=True))
    with style():
        drawn, (ax,) = panels(1, 7.6, 5.2)
        for name, cloud in clouds.items():
            colour, (x, y) = colours[_family(name)], middles[name]
            for one in cloud.T if cloud.shape[1] > 1 else ():
                ax.plot([x, one[0]], [y, one[1]], color=colour, linewidth=0.5, alpha=0.3, zorder=2)
                ax.plot(*one, "o", color=colour, markersize=3, alpha=0.3, zorder=2, markeredgewidth=0)
            ax.plot(x, y, "o", color=colour, markersize=7, markeredgecolor="white", zorder=3)
        every = np.concatenate(list(clouds.values()), axis=1)
        low, high = [min(0.0, every[0].min()), min(every[1].min(), *levels.values(), math.inf)], every.max(axis=1)
        high[1] = max(high[1], *levels.values(), -math.inf)
        room = np.maximum(4.0, high - low) * 0.1
        ax.set_xlim(low[0] - room[0] / 2, high[0] + room[0])
        ax.set_ylim(low[1] - room[1], high[1] + room[1])
        for (name, level), look in zip(levels.items(), ((0, (4, 2)), (0, (1, 1.5))), strict=False):
            ax.axhline(level, color=GREY, linewidth=1, linestyle=look, zorder=1)
            above = level >= max(levels.values())  # two that lie close together keep apart
            ax.annotate(
                f"{name} {level:.0f} %", (1, level), xycoords=("axes fraction", "data"), xytext=(4, 0),
                textcoords="offset points", fontsize=8, color=GREY, va="bottom" if above else "top",
            )  # fmt: skip
        ax.grid()
        ax.set_xlabel("forgetting, points (← better)")
        ax.set_ylabel("score when learnt, % (better ↑)")
        shown = [family for family in FAMILIES if any(_family(name) == family for name in clouds)]
        handles = [Line2D([], [], marker="o", linestyle="", color=colours[f], label=f) for f in shown]
        drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        seeds = max(cloud.shape[1] for cloud in clouds.values())
        pale = f"; pale: each of {seeds} seeds" if seeds > 1 else ""
        headline(drawn, f"{title}: what strategies learn and forget; the upper left corner is best{pale}")
        drawn.canvas.draw()  # the layout settles first: labels are placed in pixels
        drawn.set_layout_engine("none")
        _label(ax, middles, colours)
        return png(drawn)


def _label(ax: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write each name beside its point: where it hides least of points, names and edges, and nearest."""
    from matplotlib.patheffects import withStroke

    renderer = ax.figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    scale = ax.figure.dpi / 72
    dots = {name: ax.transData.transform(point) for name, point in points.items()}
    taken: list[tuple[float, float, float, float]] = []
    # Those with the nearest neighbours have the least choice, so they choose first.
    crowded = sorted(
        dots, key=lambda n: min((float(np.hypot(*(dots[n] - dots[m]))) for m in dots if m != n), default=0.0)
    )
    for name in crowded:
        probe = ax.text(0, 0, name, fontsize=8)
        box = probe.get_window_extent(renderer)
        probe.remove()
        width, height = box.width, box.height
        best: tuple[float, float, float, float] | None = None
        for distance, angle in product((8.0, 15.0, 24.0, 36.0), range(0, 360, 30)):
            away = np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])
            centre = dots[name] + away * (distance * scale + np.array([width / 2, height / 2]) * abs(away))
            x0, y0 = centre[0] - width / 2, centre[1] - height / 2
            own = (x0, y0, x0 + width, y0 + height)
            cost: float = distance + sum(40 + _overlap(own, other) for other in taken if _overlap(own, other))
            for x, y in dots.values():
                dot = (x - 5 * scale, y - 5 * scale, x + 5 * scale, y + 5 * scale)
                cost += 60 * (_overlap(own, dot) > 0)
            cost += 200 * (own[0] < frame.x0 or own[1] < frame.y0 or own[2] > frame.x1 or own[3] > frame.y1)
            if best is None or cost < best[0]:
                best = (cost, x0, y0, distance)
        assert best is not None
        _, x0, y0, distance = best
        taken.append((x0, y0, x0 + width, y0 + height))
        colour = colours[_family(name)]
        at = ax.transData.inverted().transform((x0, y0))
        halo = [withStroke(linewidth=2, foreground="white")]
        ax.text(*at, name, fontsize=8, color=colour, ha="left", va="bottom", zorder=4, path_effects=halo)
        if distance > 15:
            near = (min(max(dots[name][0], x0), x0 + width), min(max(dots[name][1], y0), y0 + height))
            line = ax.transData.inverted().transform([dots[name], near])
            ax.plot(line[:, 0], line[:, 1], color=colour, linewidth=0.6, alpha=0.6, zorder=2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """The area that two boxes share."""
    wide = min(a[2], b[2]) - max(a[0], b[0])
    tall = min(a[3], b[3]) - max(a[1], b[1])
    return wide * tall if wide > 0 and tall > 0 else 0.0


def _family(name: str) -> str:
    """That of the strategy in whose name a row of the table begins."""
    return TABLE[name.removesuffix(TOLD)].family
