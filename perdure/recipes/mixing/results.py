"""What a mixing experiment leaves behind: a history and a curve of each selection, a plot and a table of all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from perdure.recipes.history import write_history
from perdure.recipes.mixing.data import key_of
from perdure.recipes.mixing.options import NONE
from perdure.recipes.show import NOTHING, read_results
from perdure.report import write_report
from perdure.report.histories import combined, forgetting_curve
from perdure.report.history import History, read_histories
from perdure.storage import write_bytes, write_json, write_text
from perdure.tracking import read_events
from perdure.training.folder import RunFolder
from perdure.training.settings import RunSettings

if TYPE_CHECKING:
    from rich.table import Table

    from perdure.recipes.mixing.command import Experiment

TABLE_FORMAT = 1
PLOT = "forgetting_history_plot.png"


def write_experiment(work: Experiment, settings: RunSettings, folders: Mapping[str, RunFolder]) -> None:
    """Write histories and curves of these selections, and figure and table of all that stand in the folder."""
    options, out, say = work.options, work.out, work.display.say
    start = ""
    for method, folder in folders.items():
        results = read_results(folder.path)
        history = history_of(folder, results, work, method)
        start = "_to_".join(results["tasks"]).replace("/", "-")
        name = f"{start}_{options.slug(method)}"
        file = out / f"forgetting_history_{name}.json"
        write_history(file, history)
        write_bytes(out / f"sequential_forgetting_curve_{name}.png", forgetting_curve(history))
        say(f"history: {file}")
    histories = read_histories(sorted(out.glob(f"forgetting_history_{start}_*.json")))
    histories.sort(key=lambda history: (history.facts.get("selection_method") != NONE, history.name))
    runs = {history.name: out / str(history.facts.get("run")) for history in histories}
    for name in [name for name, path in runs.items() if not (path / "results.json").is_file()]:
        say(f"warning: {name} is left out of figure and table: its run is not in {out / 'runs'} any more")
        del runs[name]
    histories = [history for history in histories if history.name in runs]
    rows = [row_of(read_results(path), name) for name, path in runs.items()]
    report = write_report(list(runs.values()), out / "report.html")
    write_bytes(out / PLOT, combined(histories))
    write_json(out / "results.json", {"format": TABLE_FORMAT, "model": settings.model, "rows": rows})
    write_text(out / "results.md", markdown(rows))
    from rich.console import Console

    console = getattr(work.display, "console", None) or Console()
    console.print()
    console.print(_table(rows))
    say(f"runs:    {out / 'runs'}")
    say(f"report:  {report}")
    say(f"figure:  {out / PLOT}")
    say(f"table:   {out / 'results.md'}")


def history_of(folder: RunFolder, results: Mapping[str, Any], work: Experiment, method: str) -> History:
    """The losses of both tasks over phase B: before it, on the way, and after it."""
    options = work.options
    tasks = results["tasks"]
    matrix = results["scores"]["loss"]["values"]
    begin = _steps_of_first_stage(folder)
    last = results["steps"] - begin
    points: dict[int, dict[str, float]] = {
        0: dict(zip(tasks, matrix[1], strict=True)),
        last: dict(zip(tasks, matrix[2], strict=True)),
    }
    for event in read_events(folder.metrics):
        if event["event"] == "evaluation" and event.get("row") is None and event.get("stage") == 2:
            points.setdefault(event["step"] - begin, {})[event["task"]] = event["metrics"]["loss"]
    steps = sorted(points)
    curves = {f"{key_of(task)}_loss": tuple(_number(points[step].get(task)) for step in steps) for task in tasks}
    replay = results["replay"] or {"rows": 0, "targets": 0}
    return History(
        options.label(method),
        tuple(steps),
        curves,
        {
            "selection_method": method,
            "mix_percentage": 0.0 if method == NONE else options.mix,
            "mix_unit": options.unit,
            "resampled": options.resample,
            "model": results["model"],
            "precision": options.precision,
            "seed": results["seed"],
            "tasks": {key_of(task): task for task in tasks},
            "steps_per_epoch": last / options.epochs_b,
            "replayed_rows": replay["rows"],
            "replayed_target_tokens": replay["targets"],
            "scores": {
                metric: {key_of(task): value["final"] for task, value in summary["per_task"].items()}
                for metric, summary in results["metrics"].items()
            },
            "run": folder.path.relative_to(work.out).as_posix(),
        },
    )


def row_of(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A line of the table: what was replayed, and both tasks before and after phase B."""
    a, b = results["tasks"]
    scores = {metric: dict(enumerate(matrix["values"])) for metric, matrix in results["scores"].items()}

    def cell(metric: str, task: str, row: int) -> float | None:
        places = results["scores"].get(metric, {}).get("tasks", [])
        return scores[metric][row][places.index(task)] if task in places else None

    replay = results["replay"] or {"rows": 0, "targets": 0}
    return {
        "selection": name,
        "first": a,
        "second": b,
        "replayed_rows": replay["rows"],
        "replayed_target_tokens": replay["targets"],
        "first_loss_before": cell("loss", a, 1),
        "first_loss": cell("loss", a, 2),
        "second_loss_before": cell("loss", b, 1),
        "second_loss": cell("loss", b, 2),
        "first_exact_match_before": cell("exact_match", a, 1),
        "first_exact_match": cell("exact_match", a, 2),
        "second_exact_match": cell("exact_match", b, 2),
        "second_f1": cell("f1", b, 2),
    }


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The table's cells, by the heads of its columns; columns without any value are left out."""
    a, b = rows[0]["first"], rows[0]["second"]
    count, loss, share = _count, _loss, _share
    heads: dict[str, tuple[str, Callable[[Any], str]]] = {
        "selection": ("selection", str),
        "rows replayed": ("replayed_rows", count),
        "target tokens replayed": ("replayed_target_tokens", count),
        f"{a} loss before": ("first_loss_before", loss),
        f"{a} loss after": ("first_loss", loss),
        f"{b} loss before": ("second_loss_before", loss),
        f"{b} loss after": ("second_loss", loss),
        f"{a} exact match before": ("first_exact_match_before", share),
        f"{a} exact match after": ("first_exact_match", share),
        f"{b} exact match after": ("second_exact_match", share),
        f"{b} F1 after": ("second_f1", share),
    }
    found = {head: [show(row[key]) for row in rows] for head, (key, show) in heads.items()}
    return {head: cells for head, cells in found.items() if any(cell != NOTHING for cell in cells)}


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table for a page; before and after are of phase B."""
    found = columns(rows)
    lines = ["| " + " | ".join(found) + " |", "|---|" + "---:|" * (len(found) - 1)]
    lines += ["| " + " | ".join(cells) + " |" for cells in zip(*found.values(), strict=True)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The table in 80 columns: losses after phase B, and how far the first task's rose in it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    a, b = rows[0]["first"], rows[0]["second"]
    title = f"A: {a}. B: {b}, with some of A mixed in. After B; rise: of A's loss in it; EM: exact match"
    table = Table(
        title=Text(title), title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    heads: dict[str, tuple[str, Callable[[Any], str]]] = {
        "rows": ("replayed_rows", _count),
        "tokens": ("replayed_target_tokens", _count),
        "A loss": ("first_loss", _loss),
        "rise": ("rise", lambda x: NOTHING if x is None else f"{x:+.3f}"),
        "B loss": ("second_loss", _loss),
        "A EM": ("first_exact_match", _share),
        "B EM": ("second_exact_match", _share),
        "B F1": ("second_f1", _share),
    }
    rises = [{**row, "rise": _difference(row["first_loss"], row["first_loss_before"])} for row in rows]
    found = {head: [show(row[key]) for row in rises] for head, (key, show) in heads.items()}
    found = {head: cells for head, cells in found.items() if any(cell != NOTHING for cell in cells)}
    table.add_column("selection", no_wrap=True, min_width=min(24, max(len(row["selection"]) for row in rows)))
    for head in found:
        table.add_column(Text(head), justify="right")
    for row, cells in zip(rows, zip(*found.values(), strict=True), strict=True):
        table.add_row(Text(row["selection"]), *map(Text, cells))
    return table


def _difference(after: float | None, before: float | None) -> float | None:
    return None if after is None or before is None else after - before


def _steps_of_first_stage(folder: RunFolder) -> int:
    path = folder.after_stage(1)
    assert path is not None, "a finished run keeps the checkpoint of each stage"
    return int(path.name.rpartition("-")[2])


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _count(value: Any) -> str:
    return NOTHING if value is None else f"{value:,}"


def _loss(value: Any) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _share(value: Any) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"
