"""Builds report.html, one file that opens offline, and the plots of a run folder."""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from perdure.errors import StorageError
from perdure.report import words
from perdure.report.identity import apart, apart_where_they_differ, told_metrics
from perdure.report.read import INFERRED, TRAINING, Run, number, on_training_rows, read_run, read_runs

PAGE, COMPARISON = "report.html", "comparison.png"
ALL = 2  # see _depth
Table = dict[str, Any]


class Drawn(dict[str, bytes]):
    """The figures of one run by the names of their files, each drawn when it is first asked for."""

    def once(self, name: str, draw: Callable[[], bytes]) -> bytes:
        """The figure of that name."""
        if name not in self:
            self[name] = draw()
        return self[name]


def write_report(runs: Sequence[Path | str], out: Path | str, drawn: Drawn | None = None) -> Path:
    """Write one page about one run or several side by side.

    Several runs also get `comparison.png` beside the page, for a README.

    Args:
        runs: run folders, finished or not.
        out: the page's path; in a folder that exists it is called report.html.
        drawn: figures of the one run that there is, which are drawn already.

    Returns:
        The page's path.

    Raises:
        RunError: a folder is no run folder; the message says why.
        StorageError: the page cannot be written; an earlier one is intact.
    """
    out = Path(out)
    out = out / PAGE if out.is_dir() else out
    read = read_runs(runs)
    context = _context(read, Drawn() if drawn is None or len(read) > 1 else drawn)
    if "comparison" in context:
        write_file(out.with_name(COMPARISON), context.pop("comparison"))
    write_file(out, render(context).encode("utf-8", "replace"))
    return out


def write_plots(run: Path | str, drawn: Drawn | None = None) -> list[Path]:
    """Write the figures of one run into its folder `plots`; returns their paths. Older figures are removed.

    Args:
        run: its folder.
        drawn: is filled with the figures, for the page.
    """
    from perdure.report import drift, matrices, plots, reactions, usage

    read, folder = read_run(run), Path(run) / "plots"
    figures = Drawn() if drawn is None else drawn
    for metric in told_metrics(read):
        scores, views = read.scores[metric], apart_where_they_differ([read], metric)
        if not all(view.scores[metric].blank() for view in views):
            name = _file_name(metric)
            if (depth := _depth(metric, read.scores)) > 0:
                figures[f"matrix_{name}.png"] = matrices.heat_map(views, metric)
            if depth < ALL:
                continue
            figures[f"curves_{name}.png"] = plots.curves(views, metric)
            if scores.outlasted():
                figures[f"forgetting_{name}.png"] = plots.lost(views, metric)
            if scores.transfer():
                figures[f"transfer_{name}.png"] = matrices.transfer(views, metric)
    if read.steps:
        figures["training_loss.png"] = plots.training_loss([read])
    if any(read.drift):
        figures["drift.png"] = drift.drift([read])
    if used := read.used():
        figures["usage.png"] = usage.usage_figure(used)
    for name, content in figures.items():
        write_file(folder / name, content)
    for kind in ("matrix_*", "curves_*", "forgetting_*", "transfer_*", "drift", "usage"):
        for path in folder.glob(f"{kind}.png"):
            if path.name not in figures:
                path.unlink(missing_ok=True)
    names, predicted = list(figures), reactions.prediction_figures(Path(run))
    figures.update(predicted)
    return [*(folder / name for name in names), *reactions.draw_reactions(Path(run), predicted)]


def _file_name(metric: str) -> str:
    return re.sub(r"[^\w.-]", "_", metric)


def render(context: Mapping[str, Any]) -> str:
    """The page as HTML; every text is escaped, since names and settings come from data."""
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = resources.files("perdure.report").joinpath("page.html").read_text("utf-8")
    return environment.from_string(template).render(context)


def _context(runs: Sequence[Run], drawn: Drawn) -> dict[str, Any]:
    from perdure.report import drift, plots, usage

    context: dict[str, Any] = {
        "title": ", ".join(run.name for run in runs),
        "warnings": [
            *(words.skipped(run.name, run.skipped, run.num_steps) for run in runs if run.skipped),
            *words.scored_apart([(run.name, run.results) for run in runs]),
        ],
        "sentences": words.sentences(runs),
        "runs": _facts(runs),
        "metrics": [],
        "on_training_rows": [],
        "predictions": _predictions(runs, drawn),
        "training": None,
        "told": [run.name for run in runs if run.told],
        "drift": None,
        "probe": _probe(runs),
        "replay": _replay(runs),
        "data": _once((run.name, _data(run)) for run in runs),
        "versions": _once((run.name, _machine(run)) for run in runs),
        "configs": [(run.name, run.config) for run in runs if run.config],
        "commands": [_again(run) for run in runs],
    }
    main = words.main_metric(run.held_out[0] for run in runs if run.held_out)
    for metric in dict.fromkeys([main, *(metric for run in runs for metric in told_metrics(run))]):
        some = [run for run in runs if metric in run.scores and run.scores[metric].tasks]
        if some:
            section = "on_training_rows" if on_training_rows(metric) else "metrics"
            context[section].append(_metric(some, metric, context, drawn))
    trained = [run for run in runs if run.steps]
    if trained:
        loss = drawn.once("training_loss.png", lambda: plots.training_loss(trained))
        context["training"] = _figure(loss, "Training loss", "loss", trained)
    moved = [run for run in runs if any(run.drift)]
    if moved:
        content = drawn.once("drift.png", lambda: drift.drift(moved))
        figure = _figure(content, "Parameter drift after each stage", "weights", moved)
        context["drift"] = {"figure": figure, "table": _drift(moved), "runs": len(moved)}
    context["usage"] = [
        _figure(
            drawn.once(f"usage{i or ''}.png", partial(usage.usage_figure, used)),
            "Share of each layer's weights by task",
            "weights",
            [run],
        )
        | {"caption": run.name if len(runs) > 1 else ""}
        for i, run in enumerate(runs)
        if (used := run.used())
    ]
    return context


def _depth(metric: str, measured: Iterable[str]) -> int:
    """Which figures a metric has: `ALL`, 1 for the matrix alone, 0 for none.

    On training rows at most the matrix, since what was lost shows on held-out rows; less by one where RMSE already
    tells of the same errors.
    """
    own = metric.removesuffix(INFERRED).removesuffix(TRAINING)
    return ALL - on_training_rows(metric) - (own in ("mae", "loss") and "rmse" in measured)


def _metric(runs: Sequence[Run], metric: str, context: dict[str, Any], ready: Drawn) -> dict[str, Any]:
    """A metric's section; the first one that can be drawn of several runs leaves the comparison in the context."""
    from perdure.report import matrices, plots

    views, drawn = apart(runs, metric), apart_where_they_differ(runs, metric)
    tables = [view.scores[metric] for view in drawn]
    figures, depth, name = [], _depth(metric, runs[0].scores), _file_name(metric)
    shown = not all(table.blank() for table in tables)
    if shown and len(runs) > 1 and "comparison" not in context and not on_training_rows(metric):
        context["comparison"] = plots.comparison(drawn, metric)
        figures.append(_figure(context["comparison"], "The runs compared", metric, drawn))
    if shown and depth > 0:
        found = ready.once(f"matrix_{name}.png", lambda: matrices.heat_map(drawn, metric))
        figures.append(_figure(found, "Score matrix", metric, drawn))
    if shown and depth == ALL:
        found = ready.once(f"curves_{name}.png", lambda: plots.curves(drawn, metric))
        figures.append(_figure(found, "Scores over the stream", metric, drawn))
        if any(table.outlasted() and not table.blank() for table in tables):
            found = ready.once(f"forgetting_{name}.png", lambda: plots.lost(drawn, metric))
            figures.append(_figure(found, "Scores when learnt and at the end", metric, drawn))
        if any(table.transfer() and not table.blank() for table in tables):
            found = ready.once(f"transfer_{name}.png", lambda: matrices.transfer(drawn, metric))
            figures.append(_figure(found, "Pairwise transfer", metric, drawn))
    return {
        "name": words.label(metric),
        "direction": words.direction(runs[0].scores[metric].higher_is_better),
        "drawn": shown,
        "figures": figures,
        "summary": _summary(views, metric),
        "tasks": _tasks(views, metric),
    }


FACTS = ("strategy", "model", "tuning", "seed", "trained parameters", "steps", "time", "tokens/s", "state")


def _facts(runs: Sequence[Run]) -> Table:
    head, rows = ["run", *FACTS], [[run.name, *_fact(run)] for run in runs]
    if any(run.told for run in runs):
        head.append("task of a row")
        rows = [[*row, _identity(run)] for run, row in zip(runs, rows, strict=True)]
    return _table("Runs", head, rows)


def _identity(run: Run) -> str:
    """Who says which task a row is of that is scored."""
    if not run.told:
        return "not needed"
    return "told, and inferred" if any(metric.endswith(INFERRED) for metric in run.scores) else "told"


def _fact(run: Run) -> list[str]:
    results = run.results
    parameters = results.get("parameters") or {}
    trainable, total = parameters.get("trainable"), parameters.get("total")
    share = f" ({words.percent(trainable / total)})" if trainable is not None and total else ""
    speeds = [float(s["tokens_per_second"]) for s in run.steps if s.get("tokens_per_second") is not None]
    return [
        *(str(results.get(key, "–")) for key in ("strategy", "model", "tuning", "seed")),
        words.count(trainable) + share,
        words.count(run.num_steps),
        words.duration(results.get("seconds")),
        words.count(round(statistics.median(speeds))) if speeds else "–",
        "finished" if run.finished else "not finished",
    ]


def _summary(runs: Sequence[Run], metric: str) -> Table:
    higher = runs[0].scores[metric].higher_is_better
    shown = words.AVERAGES if on_training_rows(metric) else words.COLUMNS
    keys = [
        key for key in words.COLUMNS
        if key in shown and any(run.summaries[metric].get(key) is not None for run in runs)
    ]  # fmt: skip
    found = [[number(run.summaries[metric].get(key)) for key in keys] for run in runs]
    digits = words.decimals(metric, (x for row in found for x in row))
    return _table(
        f"{words.label(metric)} of each run",
        ["run", *(words.column(key, metric, higher) for key in keys)],
        (
            [run.name, *(words.of_summary(metric, key, x, digits) for key, x in zip(keys, row, strict=True))]
            for run, row in zip(runs, found, strict=True)
        ),
    )


def _tasks(runs: Sequence[Run], metric: str) -> Table:
    found = [
        (task, run, [scores.before(i), scores.learnt(i), scores.final(i), scores.changed(i)])
        for run in runs
        for scores in [run.scores[metric]]
        for i, task in enumerate(scores.tasks)
    ]
    digits = words.decimals(metric, (x for _, _, values in found for x in values))
    rows, trained = [], on_training_rows(metric)
    shown = slice(1, 3) if trained else slice(None)
    for task, run, values in found:
        name = [run.name] if len(runs) > 1 else []
        kind = "train" if trained else "evaluation"
        scored = words.count((run.results.get("data") or {}).get(task, {}).get(kind))
        texts = [words.value(metric, x, signed=i == 3, digits=digits) for i, x in enumerate(values)]
        rows.append([task, *name, scored, *texts[shown]])
    name = ["run"] if len(runs) > 1 else []
    columns = ["before training", "when learnt", "at the end", "change since learnt"]
    head = ["task", *name, "training rows" if trained else "evaluation rows", *columns[shown]]
    order = {task: i for i, task in enumerate(dict.fromkeys(row[0] for row in rows))}
    return _table(f"{words.label(metric)} of each task", head, sorted(rows, key=lambda row: order[row[0]]))


def _predictions(runs: Sequence[Run], drawn: Drawn) -> list[dict[str, Any]]:
    """What runs on reactions predicted: of one run every figure, of several each one's on held-out rows."""
    from perdure.report import reactions

    out = []
    for run in runs:
        found = {name: drawn[name] for name in reactions.FIGURES if name in drawn}
        found = found or reactions.prediction_figures(run.path, brief=len(runs) > 1)
        for name, content in found.items():
            figure = _figure(content, reactions.TITLES[name], "yields", [run])
            caption = reactions.TITLES[name] + (f" of {run.name}" if len(runs) > 1 else "")
            out.append(figure | {"caption": caption, "trained": name == reactions.PARITY_TRAINING})
    return out


def _probe(runs: Sequence[Run]) -> Table | None:
    found = [
        (run, metric, [values[0], last, last - values[0]])
        for run in runs
        for metric, values in run.probe.items()
        if values
        for last in [values[-1] if len(values) > 1 else math.nan]
    ]
    rows = []
    for run, metric, values in found:
        digits = words.decimals(metric, (x for _, other, row in found if other == metric for x in row))
        texts = [words.value(metric, x, signed=i == 2, digits=digits) for i, x in enumerate(values)]
        rows.append([run.name, words.label(metric), *texts])
    head = ["run", "metric", "before training", "at the end", "change"]
    return _table("General probe", head, rows) if rows else None


def _replay(runs: Sequence[Run]) -> Table | None:
    rows = []
    for run in runs:
        shares, memory = run.results.get("replay") or {}, run.results.get("memory")
        if shares or memory is not None:
            rows.append(
                [
                    run.name,
                    words.count(memory),
                    words.count(shares.get("rows")),
                    words.percent(shares.get("row_share")),
                    words.count(shares.get("targets")),
                    words.percent(shares.get("target_share")),
                ]
            )
    head = ["run", "memory, rows", "replayed rows", "replayed share of rows since task 2"]
    head += ["replayed target tokens", "replayed share of target tokens since task 2"]
    return _table("Replay", head, rows) if rows else None


def _drift(runs: Sequence[Run]) -> Table:
    """Of one run a row for each stage, of several one for each run, at its end."""
    rows = []
    for run in runs:
        stages = [(name, found["total"]) for name, found in zip(run.stages, run.drift, strict=False) if found]
        for name, total in stages if len(runs) == 1 else [(run.name, stages[-1][1])]:
            rows.append(
                [
                    name,
                    words.count(total["weights"]),
                    words.count(total["new"] if len(runs) == 1 else total["new_since_start"]),
                    *([words.percent(total["relative_change"])] if len(runs) == 1 else []),
                    words.percent(total["relative_change_from_start"]),
                ]
            )
    if len(runs) == 1:
        head = ["after", "trained weights", "of these new", "change since the stage before", "since the start"]
    else:
        head = ["run", "trained weights", "of these new since the start", "change since the start"]
    return _table("Parameter drift" if len(runs) == 1 else "Parameter drift at the end", head, rows)


def _data(run: Run) -> Table | None:
    data = run.results.get("data") or {}
    columns = list(dict.fromkeys(key for counts in data.values() for key in counts))
    rows = [[task, *(_plain(counts.get(key)) for key in columns)] for task, counts in data.items()]
    table = _table("Rows of each task", ["task", *(words.label(key) for key in columns)], rows)
    return {**table, "notes": words.few(data)} if rows else None


def _machine(run: Run) -> dict[str, str]:
    """Versions, threads and processor: what decides whether a run can be repeated to the last bit."""
    stated = {**(run.results.get("versions") or {}), **(run.results.get("machine") or {})}
    return {str(key): str(value) for key, value in stated.items()}


def _once(named: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """What several runs have in common is shown once, under all their names."""
    shown: list[tuple[list[str], Any]] = []
    for name, value in named:
        same = next((names for names, other in shown if other == value), None)
        if same is not None:
            same.append(name)
        elif value:
            shown.append(([name], value))
    return [(", ".join(names), value) for names, value in shown]


def _again(run: Run) -> str:
    """The command that makes the run again, as the run states it or from its settings."""
    stated = run.results.get("command")
    if isinstance(stated, str) and stated:
        return stated
    return shlex.join(["perdure", "run", str(run.path / "config.yaml"), "--out", f"{run.path}-again"])


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    return {"caption": caption[:1].upper() + caption[1:], "head": list(head), "rows": [list(row) for row in rows]}


def _figure(content: bytes, what: str, metric: str, runs: Sequence[Run]) -> dict[str, Any]:
    names = ", ".join(run.name for run in runs)
    return {
        "src": "data:image/png;base64," + base64.b64encode(content).decode("ascii"),
        "alt": f"{what}: {words.label(metric)} of {names}. The tables on this page hold the numbers.",
        "width": int.from_bytes(content[16:20], "big"),  # as the PNG's header says
        "height": int.from_bytes(content[20:24], "big"),
    }


def _plain(value: Any) -> str:
    return words.count(value) if isinstance(value, int) or value is None else str(value)


def write_file(path: Path, content: bytes) -> None:
    """Write a file and its folder: aside, sync, rename: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise StorageError(f"could not write {path}: {error.strerror or error}") from error
