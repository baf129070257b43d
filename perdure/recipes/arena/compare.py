"""The command that compares arena runs: which runs, what is written, the table on the terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perdure.errors import NewerFormatError, RunError
from perdure.storage import write_bytes, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from perdure.report.arena_pool import Group
    from perdure.report.arena_run import ArenaRun

DEEPEST = 3  # folders below one that holds runs


def compare(runs: Sequence[Path], out: Path | None) -> None:
    """Write figure, table and summary of arena runs, and print the table.

    Args:
        runs: folders of a run each, or folders that hold runs.
        out: where to write; None: the folder that holds them all.

    Runs that are not finished are left out, and named, where they lie in a folder with others.

    Raises:
        RunError: a folder is no arena run and holds none, or a run that was named is not finished, or not as
            `perdure arena` writes it; all of them are named.
        NewerFormatError: a later perdure wrote one.
        StorageError: a file cannot be written; an earlier one is intact.
    """
    from rich.console import Console

    from perdure.report.arena_comparison import COMPARISON, comparison
    from perdure.report.arena_pool import pooled
    from perdure.report.arena_summary import SUMMARY, summary
    from perdure.report.arena_table import TABLE, results_table
    from perdure.report.read import RESULTS

    found = find_runs(runs)
    finished = [path for path in found if (path / RESULTS).is_file() or path in runs]
    if finished:
        for path in found:
            if path not in finished:
                print(f"warning: {path} is not finished and is left out; `perdure arena ... --resume` ends it")
    groups = pooled(_read(finished or found))
    out = out or Path(os.path.commonpath([path.resolve() for path in runs]))
    write_bytes(out / COMPARISON, comparison(groups))
    write_bytes(out / TABLE, results_table(groups))
    write_text(out / SUMMARY, summary(groups))
    Console().print(_table(groups))
    print(f"figure:  {out / COMPARISON}")
    print(f"table:   {out / TABLE}")
    print(f"summary: {out / SUMMARY}")


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The folders of arena runs that are named or lie in a folder that is, each once; those within sorted by name.

    Raises:
        RunError: a path is no folder, or neither a run nor a folder that holds arena runs; all of them are named.
    """
    found: dict[Path, Path] = {}
    wrong = []
    for path in paths:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            wrong.append(f"{path} {what}; give folders that `perdure arena` wrote")
            continue
        inside = list(_within(path, DEEPEST))
        if not inside:
            wrong.append(
                f"{path}: no arena run here, nor in the folders below; give one that `perdure arena` wrote"
            )
        for run in inside:
            found.setdefault(run.resolve(), run)
    if not paths:
        wrong.append("no run was given; name at least one, for instance runs/arena-nano-lora-seed0")
    _refuse([RunError(text) for text in wrong])
    return list(found.values())


def _within(folder: Path, depth: int) -> Iterator[Path]:
    """Arena runs at this folder or below it; what lies in a run is its own."""
    from perdure.report.arena import is_arena_run

    if is_arena_run(folder):
        yield folder
    elif depth:
        below = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
        for path in below:
            yield from _within(path, depth - 1)


def _read(paths: Sequence[Path]) -> list[ArenaRun]:
    from perdure.report.arena import read_arena_run

    runs, refused = [], []
    for path in paths:
        try:
            runs.append(read_arena_run(path))
        except RunError as error:
            refused.append(error)
    _refuse(refused)
    return runs


def _refuse(errors: Sequence[RunError]) -> None:
    """Raise what went wrong, all of it in one error where there are several."""
    if len(errors) == 1:
        raise errors[0]
    if errors:
        newer = any(isinstance(error, NewerFormatError) for error in errors)
        lines = "\n  ".join(map(str, errors))
        raise (NewerFormatError if newer else RunError)(f"{len(errors)} runs cannot be compared:\n  {lines}")


def _table(groups: Sequence[Group]) -> Table:
    """A line for each group; scores in percent, so that 80 columns hold it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from perdure.report.arena_pool import labels
    from perdure.report.arena_table import cells

    table = Table(
        title=Text("Exact match on held-out rows, % (95 % interval)"), title_justify="left", title_style="bold",
        box=box.SIMPLE_HEAD, pad_edge=False,
    )  # fmt: skip
    table.add_column("run", overflow="fold", min_width=12)
    for head in ("initial", "final", "best", "gain", "probe", "s/episode"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, row in zip(labels(groups), cells(groups), strict=True):
        initial, final, best, gain, probe, seconds = (
            text.replace(" %", "").removesuffix(" pt") for text in row[4:]
        )
        table.add_row(Text(name), initial, final, best, gain, probe, seconds)
    return table
