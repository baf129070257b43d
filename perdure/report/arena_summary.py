"""RESULTS_SUMMARY.md: arena runs in tables and plain sentences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from perdure.report import words
from perdure.report.arena_comparison import COMPARISON, phase_gain, phase_names, wordings
from perdure.report.arena_pool import Group, labels, other_evaluation, over_seeds, plain
from perdure.report.arena_run import ArenaRun, Estimate, Scores
from perdure.report.arena_table import HEADS, TABLE, TEXTS, cells
from perdure.report.arena_words import (
    elicitation,
    other_scores,
    points,
    reworded,
    score,
    unsigned,
)

SUMMARY = "RESULTS_SUMMARY.md"
ASKED = ("episodes", "strategy", "levels", "drift", "curriculum", "learn_on", "window")
READINGS = ("exact match", "right answer stated", "exact match in the wording of pretraining")


def summary(groups: Sequence[Group]) -> str:
    """The whole page, in Markdown; the two pictures stand beside it."""
    names = dict(zip((group.name for group in groups), labels(groups), strict=True))
    blocks = [
        "# Results in the arena",
        _intervals(groups),
        f"![Comparison of the runs: the tables below hold the numbers]({COMPARISON})",
        f"![Table of results: the table below holds the numbers]({TABLE})",
        "## Headline",
        table([head.replace("\n", " ") for head in HEADS], cells(groups), texts=TEXTS),
        *(f"{names[group.name]}: {text}" for group in groups for text in other_scores(group)),
        *(["## Against the first", *against_first(groups)] if len(groups) > 1 else []),
        "## By kind",
        *(block for group in groups for block in _titled(names[group.name], kinds(group))),
        "## Phases of learning",
        phases(groups),
        "## Elicitation or learning",
        WHICH,
        *(block for group in groups for block in _elicitation(names[group.name], group)),
        "## What was run",
        *_what_was_run(groups),
    ]
    return "\n\n".join(blocks) + "\n"


WHICH = (
    "An answer can be wrong for its form alone. So the same held-out rows are read in two more ways: whether the "
    "right answer is stated, by written rules, and exact match in the wording that the model was pretrained on. "
    "A row is known if it was right in any of them before training. Of the rows that became right, those that were "
    "known count as elicitation of the format, the others as learning."
)


def _intervals(groups: Sequence[Group]) -> str:
    rows = (
        "The best is the highest of all examinations, so it is biased upwards, which its interval does not tell. "
        "Intervals are of 95 %. That of one run is over its held-out rows (Wilson)"
    )
    if not any(len(group.runs) > 1 for group in groups):
        return f"{rows}; it does not say what another seed would give."
    return f"{rows}, that of several seeds over these (Student's t); n is the number of seeds."


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int = 1) -> str:
    """A Markdown table; the first `texts` columns stand at the left, others at the right."""
    marks = ["---" if i < texts else "---:" for i in range(len(heads))]
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (heads, marks, *rows))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _titled(name: str, block: str) -> list[str]:
    return [f"### {' '.join(name.split())}", block]


def against_first(groups: Sequence[Group]) -> list[str]:
    """A sentence for each later group: better, worse, no difference, or not to be compared."""
    first, *others = groups
    ours = first.share(_final)
    lines = []
    for group in others:
        theirs = group.share(_final)
        between = f"{score(theirs)} against {score(ours)}"
        if differs := other_evaluation(first, group):
            lines.append(f"- {group.name}: not compared, since what was measured differs ({'; '.join(differs)}).")
        elif (paired := _paired(first, group)).n > 1:
            lines.append(f"- {group.name}: {_by_seed(paired, first)}: {between}.")
        elif theirs.overlaps(ours):
            lines.append(f"- {group.name}: no difference from {first.name} that these intervals show: {between}.")
        else:
            gap = theirs.value - ours.value
            side = "above" if gap > 0 else "below"
            lines.append(f"- {group.name} ended {unsigned(gap)} points {side} {first.name}: {between}.")
    seeds = [{run.seed for run in group.runs} for group in groups]
    other = any(found != seeds[0] for found in seeds[1:])
    note = "Runs of other seeds are scored on other held-out rows of the same sort, drawn with their seeds."
    return ["\n".join(lines), *([note] if other else [])]


def _paired(first: Group, group: Group) -> Estimate:
    """How much higher the later group ended, over the seeds that both have: they share their held-out rows."""
    ours = {run.seed: _final(run).value for run in first.runs}
    return over_seeds(_final(run).value - ours[run.seed] for run in group.runs if run.seed in ours)


def _by_seed(paired: Estimate, first: Group) -> str:
    """The differences by seed in words; without spread they have no interval, and are told as they are."""
    seeds = f"seed by seed, over {paired.n}"
    if not paired.bounded:
        if not paired.value:
            return f"equal to {first.name} {seeds}"
        side = "above" if paired.value > 0 else "below"
        return f"{unsigned(paired.value)} points {side} {first.name} on each of {paired.n} seeds"
    ends = f"{points(paired.value)} points ({points(paired.low)} to {points(paired.high)}) {seeds}"
    if paired.low <= 0 <= paired.high:
        return f"no difference from {first.name} that can be told: {ends}"
    near, far = sorted((abs(paired.low), abs(paired.high)))
    side = "above" if paired.value > 0 else "below"
    ends = f"({unsigned(near)} to {unsigned(far)}) {seeds}"
    return f"{unsigned(paired.value)} points {side} {first.name} {ends}"


def _final(run: ArenaRun) -> Estimate:
    return run.scores.exact.final


def kinds(group: Group) -> str:
    """Initial and final score of each kind with intervals, and the change."""

    def of(kind: str, part: Callable[[Scores], Estimate]) -> Callable[[ArenaRun], Estimate]:
        return lambda run: part(run.kinds[kind])

    rows = []
    for kind, scores in group.first.kinds.items():
        initial = group.share(of(kind, lambda s: s.exact.initial))
        final = group.share(of(kind, lambda s: s.exact.final))
        change = points(final.value - initial.value)
        rows.append([words.label(kind), words.count(scores.rows), score(initial), score(final), change])
    return table(["kind", "held-out rows", "initial", "final", "change, points"], rows)


def phases(groups: Sequence[Group]) -> str:
    """What each phase of learning gained, and over which episodes."""
    rows = []
    for group, name in zip(groups, labels(groups), strict=True):
        for phase in phase_names([group]):
            found = [one for run in group.runs for one in run.phases if one.name == phase]
            spans = {f"{one.begin}–{one.end}" for one in found}
            gain = phase_gain(group, phase)
            missing = f" ({gain.n} of {len(group.runs)} seeds)" if gain.n < len(group.runs) else ""
            span = spans.pop() if len(spans) == 1 else "differ by seed"
            rows.append([name, phase + missing, span, _gain(gain)])
    return table(["run", "phase", "episodes", "gain, points"], rows, texts=2)


def _gain(one: Estimate) -> str:
    """A gain in points with its interval over seeds, where there is one."""
    return f"{points(one.value)} ({points(one.low)} to {points(one.high)})" if one.bounded else points(one.value)


def _elicitation(name: str, group: Group) -> list[str]:
    readings = list(READINGS)
    if part := reworded(group):
        readings[-1] += f" ({part})"
    pairs = zip(readings, wordings(group), strict=True)
    whole = table(
        ["reading", "before", "after"], [[text, score(pair.initial), score(pair.final)] for text, pair in pairs]
    )
    heads = ["kind", *READINGS, "known before", "elicitation", "learning"]
    rows = [[words.label(kind), *readings_of(group, kind)] for kind in group.first.kinds]
    return [*_titled(name, whole), elicitation(group), table(heads, rows)]


def readings_of(group: Group, kind: str) -> list[str]:
    """A kind before and after in each reading, and its gain parted; in percent and points."""

    def mean(of: Callable[[Scores], float]) -> float:
        return group.value(lambda run: of(run.kinds[kind])).value

    def pair(initial: float, final: float) -> str:
        if math.isnan(initial) and math.isnan(final):
            return "–"
        return f"{words.value('exact_match', initial)} → {words.value('exact_match', final)}"

    return [
        pair(mean(lambda s: s.exact.initial.value), mean(lambda s: s.exact.final.value)),
        pair(mean(lambda s: s.stated.initial.value), mean(lambda s: s.stated.final.value)),
        pair(mean(lambda s: s.plain.initial.value), mean(lambda s: s.plain.final.value)),
        words.value("exact_match", mean(lambda s: s.split.known)),
        unsigned(mean(lambda s: s.split.elicited)),
        unsigned(mean(lambda s: s.split.learnt)),
    ]


def _settings(groups: Sequence[Group]) -> str:
    """How each was run, as far as its results say."""
    rows = []
    for group, name in zip(groups, labels(groups), strict=True):
        seeds = ", ".join(str(run.seed) for run in group.runs)
        rows.append([name, seeds, *(plain(group.first.results.get(key)) for key in ASKED)])
    return table(["run", "seeds", *map(words.label, ASKED)], rows, texts=len(ASKED) + 2)


def _what_was_run(groups: Sequence[Group]) -> list[str]:
    """The commands as they were given, and once each what they ran with."""
    runs = [run for group in groups for run in group.runs]
    commands = [str(run.results.get("command") or f"# {run.name}, seed {run.seed}: not recorded") for run in runs]
    blocks = [_settings(groups), "```console\n" + "\n".join(commands) + "\n```"]
    for title, key in (("Versions", "versions"), ("Machine", "machine")):
        found: dict[str, list[str]] = {}
        for run in runs:
            stated = run.results.get(key) or {}
            text = ", ".join(f"{name} {value}" for name, value in stated.items()) or "not recorded"
            found.setdefault(text, []).append(f"{run.name} (seed {run.seed})")
        for text, names in found.items():
            whose = f" of {', '.join(names)}" if len(found) > 1 else ""
            blocks.append(f"{title}{whose}: {text}.")
    return blocks
