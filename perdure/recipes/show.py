"""Results as tables on the terminal, and as pages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perdure.config import FORMAT
from perdure.errors import NewerFormatError, RunError, StorageError
from perdure.training.display import Display

NOTHING = "–"
SUMMARY = {
    "average": "average",
    "learning": "learning accuracy",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
}


def read_results(path: Path) -> dict[str, Any]:
    """A finished run's results.json."""
    file = path / "results.json"
    try:
        results = dict(json.loads(file.read_text(encoding="utf-8")))
    except OSError as error:
        raise RunError(f"{path}: no results.json here; is the run finished?") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise RunError(f"{file}: not valid JSON: {error}") from error
    if results.get("format", FORMAT) > FORMAT:
        raise NewerFormatError(
            f"{file}: format {results['format']} is newer than this perdure reads ({FORMAT}); upgrade perdure"
        )
    return results


def print_results(paths: Sequence[Path], display: Display, report: Path | None = None) -> None:
    """One table, a column for each run, and where everything is."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from perdure.report import words

    runs = [(path.name, read_results(path)) for path in paths]
    metric = _shown_metric([result for _, result in runs])
    higher = runs[0][1]["metrics"][metric]["higher_is_better"]
    title = f"{words.label(metric)} of each task at the end ({words.direction(higher)})"
    table = Table(title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", max_width=44)
    for name, _ in runs:
        table.add_column(Text(name), justify="right", no_wrap=True, overflow="ellipsis")
    for section in _sections([result for _, result in runs], metric, higher):
        for label, cells in section.items():
            if any(cell != NOTHING for cell in cells):
                table.add_row(Text(label), *cells)
        table.add_section()
    console = getattr(display, "console", None) or Console()
    console.print()
    console.print(table)
    for path in paths:
        display.say(f"run:    {path}")
    display.say(f"report: {report or paths[0] / 'report.html'}")


def _shown_metric(results: Sequence[dict[str, Any]]) -> str:
    """The main metric; the loss where no run has one right answer, for zeros tell nothing."""
    main = str(results[0]["main_metric"])
    summaries = [result["metrics"].get(main, {}) for result in results]
    found = any(one.get(key) for one in summaries for key in ("average", "learning"))
    return main if found or "loss" not in results[0]["metrics"] else "loss"


def _sections(results: Sequence[dict[str, Any]], metric: str, higher: bool) -> list[dict[str, list[str]]]:
    """Groups of the table's rows: what each is called, and a cell for each run."""
    from perdure.report import words
    from perdure.report.read import number

    summaries = [result["metrics"].get(metric) or {"per_task": {}} for result in results]
    tasks = {
        task: [words.value(metric, number(s["per_task"].get(task, {}).get("final"))) for s in summaries]
        for task in dict.fromkeys(task for result in results for task in result["tasks"])
    }
    summary = {
        f"{name} {words.arrow(key, higher)}": [words.of_summary(metric, key, number(s.get(key))) for s in summaries]
        for key, name in SUMMARY.items()
    }
    losses = [] if metric == "loss" else [result["metrics"].get("loss") or {} for result in results]
    loss = {
        f"loss, {SUMMARY[key]} {words.arrow(key, False)}": [
            words.of_summary("loss", key, number(one.get(key))) for one in losses
        ]
        for key in ("average", "forgetting")
    }
    # A probe of plain text has no answers to match: it is scored by its loss alone.
    scored = metric if any(result["probe"].get(metric) for result in results) else "loss"
    probes = [result["probe"].get(scored) or [None] for result in results]
    name = "general probe" if scored == metric else f"general probe, {words.label(scored)}"
    arrow = words.arrow("average", higher and scored == metric)
    probe = {
        f"{name}, before {arrow}": [words.value(scored, number(column[0])) for column in probes],
        f"{name}, after {arrow}": [
            words.value(scored, number(column[-1] if len(column) > 1 else None)) for column in probes
        ],
    }
    replay = [result["replay"] or {} for result in results]
    cost = {
        "replayed share of rows": [words.percent(one.get("row_share")) for one in replay],
        "replayed share of target tokens": [words.percent(one.get("target_share")) for one in replay],
        "steps": [str(result["steps"]) for result in results],
        "seconds of training": [f"{result['seconds']:.1f}" for result in results],
    }
    return [tasks, summary, loss, probe, cost]


def write_pages(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plots of each run, its page, and the joint page where there are several."""
    from perdure.report import write_plots, write_report

    out = out or paths[0] / "report.html"
    try:
        for path in paths:
            write_plots(path)
        return write_report(paths, out)
    except StorageError as error:
        again = shlex.join(["perdure", "report", *map(str, paths), "--out", str(out)])
        raise StorageError(
            f"{error}. The runs are intact; free some space, then build the page with: {again}"
        ) from error


def rebuild(paths: Sequence[Path], out: Path | None) -> None:
    """Plots and page from what the run folders hold."""
    import os

    if out is None:
        out = paths[0] if len(paths) == 1 else Path(os.path.commonpath([p.resolve() for p in paths]))
    if out.suffix != ".html":
        out = out / "report.html"
    print(f"report: {write_pages(paths, out)}")
