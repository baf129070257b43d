"""Plots and the HTML page; reads run folders only, and needs no model to do so."""

from perdure.report.page import COMPARISON, write_plots, write_report
from perdure.report.read import Run, Scores, read_run, read_runs

__all__ = ["COMPARISON", "Run", "Scores", "read_run", "read_runs", "write_plots", "write_report"]
