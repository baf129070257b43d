"""Writes the figures of a run on reactions into its folder, from the files that lie there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from perdure.report.reactions_read import (
    CALIBRATION,
    HELD_OUT,
    TRAINED,
    read_calibration,
    read_losses,
    read_matrix,
    read_predictions,
)

if TYPE_CHECKING:
    from perdure.report.reactions_sweep import SweepRow

PARITY, PARITY_TRAINING, EPOCHS = "parity.png", "parity_training.png", "epoch_losses.png"
COVERAGE = "calibration.png"
FIGURES = (PARITY, PARITY_TRAINING, COVERAGE, EPOCHS)
# File, metric, whether higher is better: where the stages are named.
MATRICES = (("r2_matrix.csv", "r2", True), ("rmse_matrix.csv", "rmse", False))
TITLES = {
    PARITY: "Predicted and true yields of held-out rows",
    COVERAGE: "Calibration of the intervals",
    EPOCHS: "Loss by epoch",
    PARITY_TRAINING: "Predicted and true yields of rows that were trained on",
}


def draw_reactions(folder: Path, figures: Mapping[str, bytes] | None = None) -> list[Path]:
    """Write the figures of a run on reactions into its folder `plots`; those that its files allow.

    Figures of earlier files that are gone are removed.

    Args:
        folder: the run folder.
        figures: its `prediction_figures`, where they were drawn already.

    Returns:
        Their paths.

    Raises:
        RunError: a file is not as perdure writes it; the message names it.
        StorageError: a figure cannot be written.
    """
    from perdure.report.page import write_file

    figures = prediction_figures(folder) if figures is None else figures
    for name, content in figures.items():
        write_file(folder / "plots" / name, content)
    for name in FIGURES:
        if name not in figures:
            (folder / "plots" / name).unlink(missing_ok=True)
    return [folder / "plots" / name for name in figures]


def draw_overview(path: Path) -> Path:
    """Draw the workflow and the MHAR head, from no run; returns the path.

    Raises:
        StorageError: it cannot be written.
    """
    from perdure.report.page import write_file
    from perdure.report.reactions_overview import overview

    write_file(path, overview())
    return path


def draw_sweep(rows: Sequence[SweepRow], path: Path) -> Path:
    """Draw pooled R² and RMSE against LoRA rank; returns the path.

    Args:
        rows: one a run; several seeds of one rank become their mean with its 95 % interval.
        path: of the PNG.

    Raises:
        RunError: there is no run with a rank.
        StorageError: it cannot be written.
    """
    from perdure.report.page import write_file
    from perdure.report.reactions_sweep import sweep

    write_file(path, sweep(rows))
    return path


def prediction_figures(folder: Path, *, brief: bool = False) -> dict[str, bytes]:
    """PNGs by name of what was predicted and how sure it was, and of losses by epoch; held-out rows first.

    A brief set has held-out rows and calibration alone.
    """
    from perdure.report import reactions_plots as plots

    out: dict[str, bytes] = {}
    held_out, coverage = read_predictions(folder / HELD_OUT), read_calibration(folder / CALIBRATION)
    losses = [] if brief else read_losses(folder)
    trained = None if brief else read_predictions(folder / TRAINED)
    if held_out is not None:
        out[PARITY] = plots.parity(held_out)
    if coverage is not None:
        out[COVERAGE] = plots.calibration(coverage)
    if losses:
        out[EPOCHS] = plots.epoch_losses(losses, _stages(folder))
    if trained is not None:
        out[PARITY_TRAINING] = plots.parity(trained, True)
    return out


def _stages(folder: Path) -> tuple[str, ...]:
    for file, metric, higher in MATRICES:
        table = read_matrix(folder / file, metric, higher)
        if table is not None:
            return table.stages
    return ()
