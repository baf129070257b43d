"""Every strategy in three worlds, three seeds each, at equal steps: cells that are run once, tables and figures."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from benchmarks import encoder
from benchmarks.cells import Cell, make_cell, run_cell
from benchmarks.study_report import report
from benchmarks.worlds import TABLE, TUNING_SEED, WORLDS, World, runs
from perdure.errors import PerdureError, UsageError, unknown_name
from perdure.storage import write_json

SEEDS = (0, 1, 2)
LEARNS = 0.9  # of what naive learns; less is no way to remember


def run_cells(cells: Sequence[Cell], workers: int, console: Console) -> int:
    """Run what has no result yet, and return how many failed.

    Args:
        cells: what is wanted.
        workers: processes of one thread each; 0 runs in this one.
        console: for the bar and a line a cell.
    """
    todo = [cell for cell in cells if cell.read() is None]
    if len(todo) < len(cells):
        console.print(f"{len(cells) - len(todo)} of {len(cells)} cells are there already")
    for kind in dict.fromkeys(cell.world.kind for cell in todo if cell.world.kind != "arena"):
        encoder.prepare(todo[0].data, kind)
    walls = {cell.world.name: [found["wall"]] for cell in cells if (found := cell.read())}
    left = set(todo)
    failed = 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("cells", total=len(todo), left="")
        for cell, error in _results(todo, workers):
            left.remove(cell)
            what = f"{cell.world.name} {cell.path.parent.name} {cell.path.stem}"
            found = None if error else cell.read()
            if found is None:
                failed += 1
                console.print(f"{what}: failed: {error}", markup=False)
            else:
                walls.setdefault(cell.world.name, []).append(found["wall"])
                values = "  ".join(f"{name} {value:.3f}" for name, value in list(found["metrics"].items())[:3])
                console.print(f"{what}: {values}  ({found['wall']:.0f} s)", highlight=False, markup=False)
            known = [time for times in walls.values() for time in times] or [60.0]
            rest = sum(float(np.mean(walls.get(c.world.name, known))) for c in left) / max(workers, 1)
            progress.update(bar, advance=1, left=f"about {rest / 60:.0f} min left")
    return failed


def _results(cells: Sequence[Cell], workers: int) -> Iterator[tuple[Cell, str | None]]:
    if not workers:
        for cell in cells:
            try:
                run_cell(cell)
            except Exception as error:  # one that fails does not stop the others
                yield cell, _said(error)
            else:
                yield cell, None
        return
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
        futures: dict[Future[Any], Cell] = {pool.submit(run_cell, cell): cell for cell in cells}
        try:
            for future in as_completed(futures):
                problem = future.exception()
                yield futures[future], None if problem is None else _said(problem)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _one_thread() -> None:
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)


def check_rows(names: Sequence[str], worlds: Sequence[World], out: Path) -> None:
    """Build every strategy before the first cell is run; all mistakes together."""
    from perdure.strategies.build import build

    mistakes = []
    for world, name in product(worlds, names):
        cell = make_cell(out, world, name, 0)
        if not runs(name, world) or cell.build in ("joint", "isolated"):
            continue
        try:
            build(cell.build, cell.settings)
        except UsageError as error:
            mistakes.append(f"{name} in {world.name}: {error}")
    if mistakes:
        raise UsageError("\n".join(mistakes))


def tune(out: Path, world: World, names: Sequence[str], workers: int, console: Console) -> int:
    """Try every point of each row's grid on the tuning stream, and write and print what is best."""
    points = {
        name: [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        for name in names
        if (grid := TABLE[name].grid_for(world.name)) and runs(name, world)
    }
    naive = make_cell(out, world, "naive", TUNING_SEED, {})
    cells = {name: [make_cell(out, world, name, TUNING_SEED, p) for p in grid] for name, grid in points.items()}
    failed = run_cells([naive, *(cell for each in cells.values() for cell in each)], workers, console)
    reference = naive.read()
    assert reference is not None, "naive failed: see above"
    floor = LEARNS * reference["metrics"]["learning"]
    for name, each in cells.items():
        tried = [
            {"settings": point, **{key: found["metrics"][key] for key in ("average", "forgetting", "learning")}}
            for point, cell in zip(points[name], each, strict=True)
            if (found := cell.read())
        ]
        if not tried:
            continue
        best = best_of(tried, floor)
        table = {"world": world.name, "strategy": name, "seed": TUNING_SEED, "rule": RULE, "best": best["settings"]}
        table |= {"naive": reference["metrics"], "tried": tried}
        write_json(out / world.name / "tune" / f"{name}.json", table)
        console.print(f"\n{world.name}, {name} (naive learns {reference['metrics']['learning']:.3f}, "
                      f"ends at {reference['metrics']['average']:.3f})", highlight=False)  # fmt: skip
        edges = [
            key
            for key, values in TABLE[name].grid_for(world.name).items()
            if len(values) > 2 and best["settings"][key] in (values[0], values[-1])
        ]
        for one in tried:
            point = ", ".join(f"{key} {value:g}" for key, value in one["settings"].items())
            console.print(
                f"  {point:<24} average {one['average']:.3f}  forgetting {one['forgetting']:.3f}  "
                f"learning {one['learning']:.3f}{'   <- best' if one is best else ''}",
                highlight=False,
            )
        if edges:
            console.print(f"  the best {' and '.join(edges)} is at the edge of the grid: widen it", highlight=False)
    return failed


RULE = (
    f"the highest average at the end among the points that learn at least {LEARNS} of what naive learns; "
    "where none does, the highest average"
)


def best_of(tried: Sequence[dict[str, Any]], floor: float) -> dict[str, Any]:
    """The point that RULE names; the first of equals."""
    able = [one for one in tried if one["learning"] >= floor]
    return max(able or tried, key=lambda one: one["average"])


def _chosen(text: str | None, known: Sequence[str], what: str) -> list[str]:
    names = list(known) if text is None else [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise UsageError(unknown_name(what, name, known))
    return names


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="the study's folder (runs/study)")
    parser.add_argument("--world", help=f"some of {', '.join(WORLDS)}, by commas; default: all")
    parser.add_argument("--only", help="some of the strategies, by commas; default: all of the table")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="default: 0,1,2")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--tune", metavar="NAMES", help="tune these strategies, by commas, on the tuning stream")
    parser.add_argument(
        "--report", action="store_true", help="only write tables and figures of the cells there are"
    )
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        worlds = [WORLDS[name] for name in _chosen(given.world, list(WORLDS), "world")]
        names = _chosen(given.tune or given.only, list(TABLE), "strategy")
        seeds = [int(seed) for seed in given.seeds.split(",")]
        if not given.report:
            check_rows(names, worlds, given.out)
        failed = 0
        if given.tune:
            for world in worlds:
                failed += tune(given.out, world, names, given.workers, console)
        else:
            if not given.report:
                cells = [
                    make_cell(given.out, world, name, seed)
                    for world, seed, name in product(worlds, seeds, names)
                    if runs(name, world)
                ]
                failed = run_cells(cells, given.workers, console)
            # Of all worlds, or a look at one would leave the others out of results.md.
            report(given.out, list(WORLDS.values()), seeds, console)
    except KeyboardInterrupt:
        sys.exit("stopped; the cells that are done stay, the same command goes on")
    except PerdureError as error:
        sys.exit(str(error))
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
