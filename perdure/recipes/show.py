"""Results as tables on the terminal, and as pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.errors import RunError
from perdure.training.display import Display


def read_results(path: Path) -> dict[str, Any]:
    """A finished run's results.json."""
    file = path / "results.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path}: no results.json here; is the run finished?") from error
    except ValueError as error:
        raise RunError(f"{file}: not valid JSON: {error}") from error


def print_results(paths: Sequence[Path], display: Display, report: Path | None = None) -> None:
    """One table over the runs, and where everything is."""
    from rich.console import Console
    from rich.table import Table

    runs = [(path, read_results(path)) for path in paths]
    metric = runs[0][1]["main_metric"]
    higher = runs[0][1]["metrics"][metric]["higher_is_better"]
    tasks = runs[0][1]["tasks"]
    table = Table(title=f"{metric.replace('_', ' ')} ({'higher' if higher else 'lower'} is better)")
    for name in ("run", *tasks, "average", "forgetting", "learning", "general probe", "steps", "seconds"):
        table.add_column(name, justify="left" if name == "run" else "right", overflow="fold")
    for path, result in runs:
        summary = result["metrics"].get(metric)
        if summary is None:
            continue
        cells = [_cell(summary["per_task"].get(task, {}).get("final")) for task in tasks]
        cells += [_cell(summary[key]) for key in ("average", "forgetting", "learning")]
        probe = [
            value for value in result["probe"].get(metric, result["probe"].get("loss", [])) if value is not None
        ]
        cells.append(f"{probe[0]:.2f} → {probe[-1]:.2f}" if len(probe) > 1 else "-")
        table.add_row(path.name, *cells, str(result["steps"]), f"{result['seconds']:.0f}")
    console = getattr(display, "console", None) or Console()
    console.print(table)
    for path, result in runs:
        if result["replay"]:
            share = result["replay"]
            display.say(
                f"{path.name}: replayed rows were {share['row_share']:.1%} of all rows trained on "
                f"and {share['target_share']:.1%} of all target tokens"
            )
    for path, _ in runs:
        display.say(f"run:    {path}")
    display.say(f"report: {report or paths[0] / 'report.html'}")


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def write_pages(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plots of each run, its page, and the joint page where there are several."""
    from perdure.report import write_plots, write_report

    for path in paths:
        write_plots(path)
    return write_report(paths, out or paths[0] / "report.html")


def rebuild(paths: Sequence[Path], out: Path | None) -> None:
    """Plots and page from what the run folders hold."""
    import os

    if out is None:
        out = paths[0] if len(paths) == 1 else Path(os.path.commonpath([p.resolve() for p in paths]))
    if out.suffix != ".html":
        out = out / "report.html"
    print(f"report: {write_pages(paths, out)}")
