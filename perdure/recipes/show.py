"""Results as tables on the terminal, and as pages."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import FORMAT
from perdure.errors import NewerFormatError, RunError, StorageError
from perdure.training.display import Display

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "–"
SUMMARY = ("pooled", "average", "learning", "forgetting", "backward_transfer")
Results = dict[str, Any]
Section = dict[str, list[str]]


def read_results(path: Path) -> Results:
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
    """One table, a column for each run, a second by the loss where no answer was right, and where everything is."""
    from rich.console import Console
    from rich.text import Text

    from perdure.report import words

    names, results = [path.name for path in paths], [read_results(path) for path in paths]
    metric = words.main_metric(str(result["main_metric"]) for result in results)
    # A table of zeros alone tells nothing of what was learnt and forgotten.
    blank = metric != "loss" and not any(map(_right, results))
    console = getattr(display, "console", None) or Console()
    console.print()
    for name, result in zip(names, results, strict=True):
        if skipped := result.get("skipped"):
            console.print(Text(words.skipped(name, skipped, result["steps"]), style="bold red"), soft_wrap=False)
    _say_apart(zip(names, results, strict=True), console.print)
    heads, shown = zip(*_told_and_inferred(names, results), strict=True)
    sections = [*_scores(shown, metric), {} if blank else _loss(shown, metric), _probe(shown, metric)]
    console.print(_table(shown, heads, metric, [*sections, _cost(shown)]))
    if blank:
        console.print(_table(shown, heads, "loss", _scores(shown, "loss")))
    for path in paths:
        display.say(f"run:    {path}")
    for line in _pages(paths, report or paths[0] / "report.html"):
        display.say(line)


def _say_apart(results: Iterable[tuple[str, Results]], say: Callable[..., None]) -> None:
    from rich.text import Text

    from perdure.report import words

    for warning in words.scored_apart(list(results)):
        say(Text(warning, style="bold red"), soft_wrap=False)


def _told_and_inferred(names: Sequence[str], results: Sequence[Results]) -> Iterator[tuple[str, Results]]:
    """A column for each run; one that is told tasks has two, of which the second holds what it scores untold."""
    from perdure.report.identity import GUESSED, TOLD
    from perdure.report.read import INFERRED

    for name, result in zip(names, results, strict=True):
        untold = {
            m.removesuffix(INFERRED): values for m, values in result["metrics"].items() if m.endswith(INFERRED)
        }
        if not untold:
            yield f"{name}\n{TOLD}" if result.get("task_identity") == "told" else name, result
            continue
        yield f"{name}\n{TOLD}", {**result, "probe": {}}  # whose rows are of no task that could be told
        once = dict.fromkeys(("replay", "memory", "steps", "skipped", "seconds"))
        yield f"{name}\n{GUESSED}", {**result, **once, "metrics": untold}


def _table(results: Sequence[Results], names: Sequence[str], metric: str, sections: Sequence[Section]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from perdure.report import words

    better = words.direction(_higher(results, metric))
    title = Text(f"{words.label(metric)} of each task at the end ({better})")
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", max_width=45)
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True, overflow="ellipsis")
    for section in sections:
        for label, cells in section.items():
            table.add_row(Text(label), *cells)
        table.add_section()
    return table


def _right(result: Results) -> bool:
    """Whether any score of the run's main metric is more than 0."""
    scores = result["scores"].get(result["main_metric"]) or {
        "values": []
    }  # nothing, where no task has held-out rows
    return any(value for row in scores["values"] for value in row)


def _higher(results: Sequence[Results], metric: str) -> bool:
    return any(result["metrics"].get(metric, {}).get("higher_is_better") for result in results)


def _scores(results: Sequence[Results], metric: str) -> list[Section]:
    """Each task's score at the end, and what the matrix says in sum: a cell for each run."""
    from perdure.report import words
    from perdure.report.read import number

    found = [result["metrics"].get(metric) or {"per_task": {}} for result in results]
    tasks = {
        _task(task, results): [number(one["per_task"].get(task, {}).get("final")) for one in found]
        for task in dict.fromkeys(task for result in results for task in result["tasks"])
    }
    summary = {key: [number(one.get(key)) for one in found] for key in SUMMARY}
    digits = words.decimals(metric, (x for row in (*tasks.values(), *summary.values()) for x in row))
    higher = _higher(results, metric)
    return [
        {name: [words.value(metric, x, digits=digits) for x in row] for name, row in tasks.items()},
        _measured(
            {
                words.column(key, metric, higher): [words.of_summary(metric, key, x, digits) for x in row]
                for key, row in summary.items()
            }
        ),
    ]


def _task(task: str, results: Sequence[Results]) -> str:
    """A task with the number of its evaluation rows, where the runs agree on it."""
    rows = {result.get("data", {}).get(task, {}).get("evaluation") for result in results}
    number = rows.pop() if len(rows) == 1 else None
    return task if number is None else f"{task} ({number:,} row{'s' * (number != 1)})"


def _loss(results: Sequence[Results], metric: str) -> Section:
    """The loss in sum, beside a main metric that is another."""
    from perdure.report import words
    from perdure.report.read import number

    if metric == "loss":
        return {}
    losses = [result["metrics"].get("loss") or {} for result in results]
    found = {key: [number(one.get(key)) for one in losses] for key in ("average", "forgetting")}
    digits = words.decimals("loss", (x for row in found.values() for x in row))
    return _measured(
        {
            f"loss, {words.column(key, 'loss', False)}": [words.of_summary("loss", key, x, digits) for x in row]
            for key, row in found.items()
        }
    )


def _probe(results: Sequence[Results], metric: str) -> Section:
    from perdure.report import words
    from perdure.report.read import number

    # A probe of plain text has no answers to match: it is scored by its loss alone.
    scored = metric if any(result["probe"].get(metric) for result in results) else "loss"
    columns = [result["probe"].get(scored) or [None] for result in results]
    name = "general probe" if scored == metric else f"general probe, {words.label(scored)}"
    arrow = words.arrow("average", scored == metric and _higher(results, metric))
    ends = {
        "before": [number(column[0]) for column in columns],
        "after": [number(column[-1] if len(column) > 1 else None) for column in columns],
    }
    digits = words.decimals(scored, (x for row in ends.values() for x in row))
    return _measured(
        {
            f"{name}, {when} {arrow}": [words.value(scored, x, digits=digits) for x in row]
            for when, row in ends.items()
        }
    )


def _cost(results: Sequence[Results]) -> Section:
    from perdure.report import words

    replay = [result["replay"] or {} for result in results]
    return _measured(
        {
            "memory, rows": [words.count(result.get("memory")) for result in results],
            "replayed share of rows since task 2": [words.percent(one.get("row_share")) for one in replay],
            "replayed share of target tokens since task 2": [
                # A class or a yield is one target a row, and no token.
                words.percent(None if one.get("targets") == one.get("rows") else one.get("target_share"))
                for one in replay
            ],
            "steps": [words.count(result["steps"]) for result in results],
            "steps skipped": [words.count(result.get("skipped") or None) for result in results],
            "seconds of training": [
                NOTHING if result["seconds"] is None else f"{result['seconds']:,.1f}" for result in results
            ],
        }
    )


def _measured(section: Section) -> Section:
    """The rows that any run has a value for."""
    return {label: cells for label, cells in section.items() if any(cell != NOTHING for cell in cells)}


def _pages(paths: Sequence[Path], page: Path) -> list[str]:
    """Where the page lies, and the figure that `write_report` leaves beside one about several runs."""
    from perdure.report import COMPARISON

    picture = page.with_name(COMPARISON)
    figure = [f"figure: {picture}"] if len(paths) > 1 and picture.is_file() else []
    return [f"report: {page}", *figure]


def write_pages(paths: Sequence[Path], out: Path | None = None) -> Path:
    """Plots of each run, its page, and the joint page where there are several."""
    from perdure.report import write_plots, write_report
    from perdure.report.page import Drawn

    out = out or paths[0] / "report.html"
    try:
        drawn = {path: Drawn() for path in paths}
        for path in paths:
            write_plots(path, drawn[path])
        return write_report(paths, out, drawn[paths[0]])
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
    from rich.console import Console

    page = write_pages(paths, out)
    _say_apart([(path.name, _results_there(path)) for path in paths], Console().print)
    print(*_pages(paths, page), sep="\n")


def _results_there(path: Path) -> Results:
    """A run's results; nothing where it is not finished."""
    return read_results(path) if (path / "results.json").is_file() else {}
