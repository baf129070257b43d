"""The mixing experiment on real data: every selection, three seeds, at equal rows and at equal tokens.

Runs `perdure mix` once for each seed and unit, and goes on where it was stopped. The histories are kept in
benchmarks/figures/mixing; from them the tables for docs/results.md are printed, mean ± 95 % t-interval over the
seeds, with paired differences from `none` and from `random`.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study_report import interval
from perdure.storage import write_bytes, write_json

FIGURES = Path(__file__).parent / "figures" / "mixing"
SHARED = Path(__file__).resolve().parents[2] / "shared"
POLICIES = "random,difficulty_hard,difficulty_easy,loss_descending,loss_ascending"
UNITS = {"examples": "all", "tokens": POLICIES}
Row = Mapping[str, Any]


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/mixing"), help="folder (runs/mixing)")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of data/ and models/")
    parser.add_argument("--seeds", default="42,43,44", help="42,43,44")
    parser.add_argument("--units", default="examples,tokens", help="examples,tokens")
    parser.add_argument("--report", action="store_true", help="only print tables of the runs there are")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    for unit in asked.units.split(","):
        for seed in seeds:
            if not asked.report and not complete(seed, unit):
                out = asked.out / f"seed{seed}"
                run(out, asked.shared, seed, unit)
                keep(out, seed)
        print(f"\n{unit}\n\n" + table(FIGURES, seeds, unit))
    image = asked.out / "selections.png"
    write_bytes(image, figure(FIGURES, seeds))
    print(f"\nfigure: {image}")


def run(out: Path, shared: Path, seed: int, unit: str) -> None:
    """One seed's selections, chosen by a unit; phase A and `none` are shared by both units."""
    model, data = shared / "models" / "bitstories-3.3M", shared / "data"
    command = [
        sys.executable, "-m", "perdure.cli", "mix", "--selection-method", UNITS[unit], "--mix-unit", unit,
        "--model", str(model), "--task-a", str(data / "math_train.jsonl.gz"),
        "--task-b", str(data / "hotpotqa_distractor.jsonl.gz"), "--n-train", "2000", "--n-val", "400",
        "--lr", "4e-3", "--seed", str(seed), "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def keep(out: Path, seed: int) -> None:
    """Write a seed's histories to where they are kept, the model by its name alone: where it lay is no result."""
    for file in out.glob("forgetting_history_*.json"):
        history = json.loads(file.read_text(encoding="utf-8"))
        write_json(FIGURES / f"seed{seed}" / file.name, {**history, "model": Path(history["model"]).name})


def complete(seed: int, unit: str) -> bool:
    """Whether every selection of a seed and unit is kept."""
    return names_of(unit) <= set(rows_of(FIGURES, seed))


def names_of(unit: str) -> set[str]:
    """The names that the selections' histories carry."""
    ending = " of tokens" if unit == "tokens" else ""
    return {"none", *(f"{name} 10 %{ending}" for name in POLICIES.split(","))}


def rows_of(out: Path, seed: int) -> dict[str, Row]:
    """Every finished selection of a seed, by name, with the share of what was replayed."""
    found = {}
    for file in sorted((out / f"seed{seed}").glob("forgetting_history_*.json")):
        history = json.loads(file.read_text())
        keys = [key for key in history if key.endswith("_loss")]
        found[history["name"]] = {
            "rows": history["replayed_rows"],
            "tokens": history["replayed_target_tokens"],
            "a": history[keys[0]],
            "b": history[keys[1]],
            "scores": history["scores"],
        }
    return found


def table(out: Path, seeds: Sequence[int], unit: str) -> str:
    """A line for each selection, in percent and nats."""
    cells = {seed: found for seed in seeds if (found := rows_of(out, seed))}
    ending = " of tokens" if unit == "tokens" else ""
    names = ["none", *(f"{name} 10 %{ending}" for name in POLICIES.split(","))]
    random = f"random 10 %{ending}"
    lines = [
        "| selection | seeds | rows replayed | target tokens replayed | MATH loss, rise | less than none's "
        "| less than random's | HotpotQA loss | MATH exact match | HotpotQA exact match | HotpotQA F1 |",
        "|---|" + "---:|" * 10,
    ]
    for name in names:
        own = [seed for seed in cells if name in cells[seed]]
        if not own:
            continue
        rise = {seed: cells[seed][name]["a"][-1] - cells[seed][name]["a"][0] for seed in own}
        found = [
            _mean([cells[s][name]["rows"] for s in own]),
            _mean([cells[s][name]["tokens"] for s in own]),
            _interval(list(rise.values()), 3),
            *(
                "–"
                if name == other
                else _interval(
                    [cells[s][other]["a"][-1] - cells[s][name]["a"][-1] for s in own if other in cells[s]], 3
                )
                for other in ("none", random)
            ),
            _interval([cells[s][name]["b"][-1] for s in own], 3),
            *(
                _interval([100 * cells[s][name]["scores"][metric][task] for s in own], 1)
                for metric, task in (("exact_match", "math"), ("exact_match", "hotpot"), ("f1", "hotpot"))
            ),
        ]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def figure(out: Path, seeds: Sequence[int]) -> bytes:
    """What each selection does to both losses, at equal rows and at equal tokens: a point a seed, and intervals."""
    from matplotlib.lines import Line2D

    from perdure.report.canvas import COLOURS, GREY, headline, panels, png, style

    cells = {seed: found for seed in seeds if (found := rows_of(out, seed))}
    endings = {"at equal rows": "", "at equal tokens": " of tokens"}
    parts: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("rise of MATH's loss over phase B (← better)", lambda row: row["a"][-1] - row["a"][0]),
        ("HotpotQA's loss at the end (← better)", lambda row: row["b"][-1]),
    )
    names = POLICIES.split(",")
    with style():
        drawn, axes = panels(2, 5.0, 3.4, sharey=True)
        for ax, (title, value) in zip(axes, parts, strict=True):
            for shift, colour, ending in zip((-0.14, 0.14), COLOURS, endings.values(), strict=False):
                for y, name in enumerate(names):
                    key = f"{name} 10 %{ending}"
                    values = [value(rows[key]) for rows in cells.values() if key in rows]
                    if not values:
                        continue
                    middle, half = interval(values)
                    ax.plot(values, [y + shift] * len(values), "o", color=colour, markersize=3, alpha=0.4)
                    ax.errorbar(
                        middle, y + shift, xerr=half if math.isfinite(half) else None,
                        fmt="D", color=colour, markersize=5, capsize=3,
                    )  # fmt: skip
            ax.set_xlabel(title)
            ax.locator_params(axis="x", nbins=5)
            ax.grid(axis="x")
        axes[0].axvline(0, color=GREY, linewidth=1)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        handles = [
            Line2D([], [], marker="D", color=colour, label=label)
            for label, colour in zip(endings, COLOURS, strict=False)
        ]
        drawn.legend(handles=handles, loc="outside lower center", ncols=2)
        rise, end = (_interval([value(rows["none"]) for rows in cells.values()], 2) for _, value in parts)
        headline(
            drawn,
            "A tenth of MATH, chosen in five ways: each seed, the mean and its 95 % interval\n"
            f"Without any of it MATH's loss rises by {rise}, and HotpotQA's ends at {end}",
        )
        return png(drawn)


def _mean(values: Sequence[float]) -> str:
    return f"{sum(values) / len(values):,.0f}"


def _interval(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    middle, half = interval(list(values))
    return f"{middle:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


if __name__ == "__main__":
    main()
