"""`perdure reactions sweep`: from which rank on is LoRA as good as full fine-tuning?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError
from perdure.recipes.reactions.options import Options, cut_as_before, settings_for
from perdure.recipes.reactions.outputs import write_csv
from perdure.recipes.run import execute, finished
from perdure.recipes.show import read_results
from perdure.report.arena_pool import over_seeds
from perdure.training.display import Terminal
from perdure.training.folder import RunFolder

COLUMNS = ("tuning", "rank", "seed", "trainable", "r2", "rmse", "r2_training")
FULL = "full"


def run_sweep(
    options: Options, ranks: str, seeds: str, full_lr: float | None, overrides: Sequence[str], again: str
) -> None:
    """Run what is missing, and write sweep.csv and sweep.png."""
    from perdure.report.reactions import draw_sweep
    from perdure.report.reactions_sweep import SweepRow

    rate = 2e-4 if options.lr is None else options.lr
    cells: list[tuple[str, Options]] = []
    for seed in _numbers(seeds, "--seeds", least=0):
        for rank in _numbers(ranks, "--rank", least=1):
            # alpha grows with the rank, so that an update of the factors is scaled alike at each.
            cells.append((f"rank{rank}-seed{seed}", replace(options, rank=rank, lora_alpha=4 * rank, seed=seed)))
        full = rate / 10 if full_lr is None else full_lr
        cells.append((f"full-seed{seed}", replace(options, tuning=FULL, lr=full, seed=seed)))
    from perdure.training.plan import changed_settings, fixed_settings

    out = options.out or Path("runs") / "reactions-sweep"
    display = Terminal()
    found = []
    for name, asked in cells:
        settings = settings_for(asked, overrides)
        assert settings.stream.reactions is not None
        if not settings.stream.reactions.holdout:
            raise ConfigError("stream.reactions.holdout: a sweep compares held-out rows; hold some out")
        folder = RunFolder(out / name)
        if folder.exists:
            theirs = folder.settings()
            folder.refuse_changed(changed_settings(fixed_settings(theirs), fixed_settings(settings)))
            settings = cut_as_before(settings, theirs, overrides)
        if not finished(folder):
            display.say(f"{name}:")
            execute(settings, None, folder, display, again)
        results = read_results(folder.path)
        metrics = results["metrics"]
        found.append(
            {
                "tuning": asked.tuning,
                "rank": asked.rank,
                "seed": settings.seed,
                "trainable": results["parameters"]["trainable"],
                "r2": metrics["r2"]["pooled"],
                "rmse": metrics["rmse"]["pooled"],
                "r2_training": metrics["r2_training"]["pooled"],
            }
        )
    write_csv(out / "sweep.csv", COLUMNS, ([row[column] for column in COLUMNS] for row in found))
    rows = [SweepRow(one["rank"], one["seed"], one["r2"], one["rmse"], one["trainable"]) for one in found]
    draw_sweep(rows, out / "sweep.png")
    _print(found, display)
    display.say(f"written: {out / 'sweep.csv'}, {out / 'sweep.png'}")


def _print(found: Sequence[dict[str, Any]], display: Terminal) -> None:
    from rich.table import Table

    table = Table(title="all tasks at once, over all held-out rows", title_justify="left")
    for column in ("", "trained parameters", "R²", "RMSE"):
        table.add_column(column, justify="right" if column else "left")
    for key in dict.fromkeys((row["tuning"], row["rank"]) for row in found):
        rows = [row for row in found if (row["tuning"], row["rank"]) == key]
        cells = []
        for metric in ("r2", "rmse"):
            over = over_seeds(row[metric] for row in rows)
            width = "" if not over.bounded else f" ± {over.high - over.value:.3f}"
            cells.append(f"{over.value:.3f}{width}")
        name = "full" if key[0] == FULL else f"LoRA, rank {key[1]}"
        table.add_row(name, f"{rows[0]['trainable']:,}", *cells)
    display.console.print(table)


def _numbers(text: str, option: str, least: int) -> list[int]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and int(part) >= least for part in parts):
        raise ConfigError(f"{option} {text!r}: must be whole numbers of at least {least}, as in 4,8,16")
    return list(dict.fromkeys(map(int, parts)))
