"""What `perdure arena` prints at its end: one run's scores, by kind, and what of them is learning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from perdure.report import words

if TYPE_CHECKING:
    from rich.table import Table

    from perdure.report.arena_pool import Group
    from perdure.report.arena_run import ArenaRun


def print_results(results: Mapping[str, Any]) -> None:
    """Print the results of one finished run, as its results.json holds them, in at most 80 columns.

    Raises:
        RunError: a key is missing or wrong.
    """
    from rich.console import Console
    from rich.text import Text

    from perdure.report.arena import arena_run
    from perdure.report.arena_pool import Group

    run = arena_run(results)
    console = Console()
    width = min(console.width, 80)
    console.print()
    console.print(Text(_headline(run)), width=width)
    console.print(_by_kind(run), width=width)
    for sentence in _sentences(Group(run.name, (run,)), run):
        console.print(Text(sentence), width=width)


def _headline(run: ArenaRun) -> str:
    """What was trained, and exact match at its three moments."""
    from perdure.report.arena_words import score

    exact = run.scores.exact
    rows, episodes = words.count(run.scores.rows), words.count(run.episodes)
    at = run.results.get("best_episode")
    best = f"best {score(exact.best)}" + (f" after episode {at}" if at is not None else "")
    return (
        f"{run.method} on {run.model}: {episodes} episodes, measured on {rows} held-out rows\n"
        f"exact match {score(exact.initial)} -> {score(exact.final)}\n"
        f"{best}; intervals are of 95 %"
    )


def _by_kind(run: ArenaRun) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from perdure.report.arena_words import points, score

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("kind, %", overflow="fold", min_width=10)
    for head in ("rows", "initial", "final", "change", "known"):
        table.add_column(head, justify="right", no_wrap=True)
    for kind, scores in run.kinds.items():
        exact = scores.exact
        known = words.value("exact_match", scores.split.known).removesuffix(" %")
        ends = score(exact.initial, unit=False), score(exact.final, unit=False)
        table.add_row(Text(words.label(kind)), words.count(scores.rows), *ends, points(exact.gain), known)
    return table


def _sentences(group: Group, run: ArenaRun) -> list[str]:
    """What of the gain is learning, other scores of the method, the general probe, and the time."""
    from perdure.report.arena_words import elicitation, other_scores, seconds

    metric, change = run.probe_change()
    lines = [elicitation(group), *other_scores(group)]
    if metric:
        before, after = (words.value(metric, x) for x in run.probe[metric])
        change_text = words.value(metric, change, signed=True)
        lines.append(f"general probe, {words.label(metric)}: {before} -> {after} ({change_text})")
    trained, total = words.count(run.trainable), words.count(run.total)
    lines.append(f"{seconds(run.seconds_per_episode)} s an episode; {trained} of {total} parameters trained")
    return lines
