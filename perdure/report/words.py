"""How numbers and names are put into words: units, directions, shortened names, what the page says in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perdure.report.read import INFERRED, TRAINING, Run, Scores, mean, number, on_training_rows

# Shares of one: people say them in percent, and their differences in points.
SHARES = tuple(metric + end for end in ("", INFERRED) for metric in ("exact_match", "f1", "accuracy"))
# Directions of the summary's values for a metric where more is better; for a loss only the averages turn, since
# the differences are already signed so that forgetting is bad and transfer good.
AVERAGES = ("average", "learning", "anytime_average", "micro_average", "pooled")
COLUMNS = {
    "pooled": "over all rows",
    "average": "average",
    "micro_average": "average over rows",
    "learning": "learning accuracy",
    "anytime_average": "anytime average",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "intransigence": "intransigence",
}
# Where colours and axes of R² end. It is 0 for who foretells the mean of the rows, and has no lower bound: one lost
# task would leave the others no room.
FLOOR = -1.0
ERRORS = ("rmse", "mae")
FEW = 10  # evaluation rows; with fewer, one answer moves a score by more than 10 points


def label(metric: str) -> str:
    """A metric's name for people."""
    if metric.endswith(INFERRED):
        return f"{label(metric.removesuffix(INFERRED))}, task inferred"
    if metric.endswith(TRAINING):
        return f"{label(metric.removesuffix(TRAINING))} on training rows"
    return {"f1": "F1", "r2": "R²", "rmse": "RMSE", "mae": "MAE"}.get(metric, metric.replace("_", " "))


def opening(metric: str) -> str:
    """A metric's name at the beginning of a sentence."""
    name = label(metric)
    return name[:1].upper() + name[1:]


def direction(higher_is_better: bool) -> str:
    """Which way is better, in words."""
    return "higher is better" if higher_is_better else "lower is better"


def arrow(key: str, higher_is_better: bool) -> str:
    """Which way is better for a value of the summary, as an arrow."""
    if key in AVERAGES:
        return "↑" if higher_is_better else "↓"
    return "↓" if key in ("forgetting", "intransigence") else "↑"


def column(key: str, metric: str, higher_is_better: bool) -> str:
    """The name of a value of the summary, with which way is better; a loss is no accuracy."""
    name = "when learnt" if key == "learning" and metric not in SHARES else COLUMNS[key]
    return f"{name} {arrow(key, higher_is_better)}"


def main_metric(metrics: Iterable[str]) -> str:
    """The metric that stands for several runs, from those that stand for each: the loss only where all have it.

    Never one that was measured on training rows.
    """
    return next((metric for metric in metrics if metric != "loss" and not on_training_rows(metric)), "loss")


def unbounded(metric: str) -> bool:
    """Whether a metric is an R², which has no lower bound; see `FLOOR`."""
    return metric.removesuffix(INFERRED).removesuffix(TRAINING) == "r2"


def decimals(metric: str, values: Iterable[float], *, unit: bool = True) -> int | None:
    """How many decimals the values of one table or figure share; None for shares, which always have the same."""
    if metric in SHARES:
        return None
    if unbounded(metric):
        return 3 if unit else 2  # whatever a lost task's is: see `value`
    largest = max((abs(x) for x in values if math.isfinite(x) and abs(x) < 1e5), default=0.0)
    if not unit and metric.removesuffix(INFERRED).removesuffix(TRAINING) in ERRORS and largest < 1:
        return 3  # of an error in shares of one, two would hide what a task lost
    return (3 if largest < 100 else 2) if unit else (2 if largest < 100 else 0)


def value(metric: str, x: float, *, signed: bool = False, unit: bool = True, digits: int | None = None) -> str:
    """A score as text: shares in percent (differences in points), others with the digits that matter.

    `digits` is what `decimals` gave for the table or figure that the value stands in.
    """
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if metric in SHARES:
        text = f"{abs(x) * 100:.1f}" if unit else f"{abs(x) * 100:.0f}"
        text += (" pt" if signed else " %") if unit else ""
    elif abs(x) >= 1e5 or (digits is None and 0 < abs(x) < 0.0005):
        text = f"{abs(x):.1e}"
    else:
        if digits is None:
            digits = 3 if abs(x) < 10 and unit else 2 if abs(x) < 100 else 0
        if unbounded(metric) and abs(x) >= 9.995:  # so far below 0 the decimals say nothing
            digits = min(digits, 1 if abs(x) < 99.95 else 0)
        text = f"{abs(x):.{digits}f}"
    zero = not any(c in "123456789" for c in text.split("e")[0])
    sign = "" if zero else "−" if x < 0 else "+" if signed else ""
    return sign + text


def of_summary(metric: str, key: str, x: float, digits: int | None = None) -> str:
    """A value of the summary as text: averages as scores, differences as differences."""
    text = value(metric, x, digits=digits)
    return text if key in AVERAGES else text.replace(" %", " pt")


def count(x: object) -> str:
    """A whole number with commas between thousands; a dash for what is missing."""
    return f"{x:,}" if isinstance(x, int) else "–"


def duration(seconds: object) -> str:
    """Seconds as people say them."""
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return "–"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def percent(share: object) -> str:
    """A share of one as percent; a dash for what is missing."""
    return f"{share:.1%}".replace("%", " %") if isinstance(share, int | float) else "–"


def short(names: Sequence[str], width: int = 24) -> list[str]:
    """Names that fit a figure, still different from one another: long ones lose their middle.

    The two sides of a pair ("a + b") lose their ends, unless that would make two names one.
    """
    out: list[str] = []
    whole = [" ".join(name.split()) or "(no name)" for name in names]
    whole = [" " + text if text.startswith("_") else text for text in whole]  # else matplotlib hides it in legends
    cut = [_cut(text, width, ends=True) for text in whole]
    if len(set(cut)) < len(set(whole)):
        cut = [_cut(text, width) for text in whole]
    for text in cut:
        stem, copy = text, 2
        while text in out:
            text, copy = f"{stem} ({copy})", copy + 1
        out.append(text)
    return out


def _cut(text: str, width: int, *, ends: bool = False, side: bool = False) -> str:
    """At most `width` characters: the middle goes, of a pair that of each side, or their `ends`."""
    if len(text) <= width:
        return text
    sides = text.split(" + ")
    if len(sides) == 2 and width >= 16:
        room = width - len(" + ")
        left = min(len(sides[0]), max(room // 2, room - len(sides[1])))
        return " + ".join(_cut(s, n, ends=ends, side=True) for s, n in zip(sides, (left, room - left), strict=True))
    if side and ends:
        return text[: width - 1].rstrip(" ,") + "…"
    head = (width - 1) * 2 // 3
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def sentences(runs: Sequence[Run]) -> list[str]:
    """What the numbers say, in plain words; nothing that the run folders do not hold."""
    scored = [run for run in runs if run.held_out]
    out = [_forgot(run) for run in scored]
    joint = next((run for run in scored if run.strategy == "joint"), None)
    out += [_against(run, joint) for run in scored if joint is not None and run is not joint]
    out += [_general(run) for run in runs]
    for run in runs:
        if not run.finished:
            out.append(f"{run.name} is not finished: these are the numbers that it has written so far.")
        if run.unreadable:
            lines = "1 line" if run.unreadable == 1 else f"{run.unreadable} lines"
            out.append(f"{lines} of {run.name}'s metrics.jsonl could not be read and were left out.")
    return [sentence for sentence in out if sentence]


def _forgot(run: Run) -> str:
    metric, main = _lead(run), run.held_out[0]
    scores, summary, name = run.scores[metric], run.summaries[metric], label(metric)
    average, learnt, lost = (number(summary.get(key)) for key in ("average", "learning", "forgetting"))
    if math.isnan(average):
        return ""
    digits = decimals(metric, (average, learnt, lost))
    end, over = value(metric, average, digits=digits), _over(run, metric)
    if math.isnan(lost):
        before = mean(scores.before(i) for i in range(len(scores.tasks)) if not math.isnan(scores.final(i)))
        start = "" if math.isnan(before) else f", from {value(metric, before, digits=digits)} before training"
        text = f"{run.name} {'ended' if run.finished else 'stands'} at a mean {name} of {end} {over}{start}."
    else:
        size = value(metric, abs(lost), digits=digits).replace(" %", " points")
        best = f"each earlier task's {'best' if scores.higher_is_better else 'lowest'}, on average"
        if not any(digit in size for digit in "123456789"):
            text = f"{run.name}'s {name} ended at {best}"
        else:
            side = "below" if (lost > 0) == scores.higher_is_better else "above"
            text = f"{run.name}'s {name} ended {size} {side} {best}"
        text += f"; {over}, {value(metric, learnt, digits=digits)} when learnt and {end} at the end."
    whole = number(summary.get("pooled"))
    if not math.isnan(whole):
        text += f" Over the held-out rows of all tasks together its {name} is {value(metric, whole)}."
    text += _untold(run, metric)
    if metric != main:
        which = "earlier tasks" if run.scores[main].outlasted() else "tasks"
        text += f" By {label(main)} nothing was learnt on its {which}: none rose above its score before training."
    return text


def _untold(run: Run, metric: str) -> str:
    """What a run that was told tasks scores where it has to infer them."""
    if not run.told:
        return ""
    if metric + INFERRED not in run.summaries:
        return " It was told the task of each row."
    end = value(metric, number(run.summaries[metric + INFERRED].get("average")))
    return f" It was told the task of each row; where it infers the task, it is at {end}."


def _lead(run: Run) -> str:
    """The metric that a run is told by: its main one, but the loss where the main one never moved."""
    main = run.held_out[0]
    return main if moved(run.scores[main]) or "loss" not in run.scores else "loss"


def moved(scores: Scores) -> bool:
    """Whether any earlier task was ever better than before training; any task where there is no earlier one.

    Also true where none of them was measured, for then nothing is known.
    """
    values, last = scores.values[1:], len(scores.values) - 1
    measured = [i for i in range(len(scores.tasks)) if not all(math.isnan(row[i]) for row in values)]
    earlier = [i for i in measured if (scores.trained(i) or last) < last] or measured
    sign = 1 if scores.higher_is_better else -1
    scored = [(i, row[i]) for i in earlier for row in values if not math.isnan(row[i])]
    rose = [not sign * x <= sign * scores.before(i) for i, x in scored]  # an unknown start may have been lower
    return any(rose) or not rose


def _over(run: Run, metric: str) -> str:
    """Over how many tasks a mean at the end was taken."""
    scores, num_tasks = run.scores[metric], len(run.tasks)
    num_measured = sum(not math.isnan(scores.final(i)) for i in range(len(scores.tasks)))
    part = f"{num_measured} of " if num_measured < num_tasks else ""
    return f"over {part}{num_tasks} task{'s' * (num_tasks != 1)}"


def _against(run: Run, joint: Run) -> str:
    metric = _lead(run)
    if metric not in joint.summaries:
        return ""
    together = all(r.summaries[metric].get("pooled") is not None for r in (run, joint))
    key, mean_of = ("pooled", "{} over all rows") if together else ("average", "mean {}")
    ours, theirs = (number(r.summaries[metric].get(key)) for r in (run, joint))
    if math.isnan(ours) or math.isnan(theirs):
        return ""
    alone = number(run.summaries.get(metric + INFERRED, {}).get(key))
    guess = run.told and not math.isnan(alone)
    if metric in SHARES and theirs > 0:
        also = f", told the task; {alone / theirs:.0%} where it infers it" if guess else ""
        return f"{run.name} kept {ours / theirs:.0%} of {joint.name}'s average{also}.".replace("%", " %")
    gap = value(metric, ours - theirs, signed=True)
    also = f", told the task; {value(metric, alone - theirs, signed=True)} where it infers it" if guess else ""
    return f"{run.name}'s {mean_of.format(label(metric))} is {gap} against {joint.name}'s{also}."


def _general(run: Run) -> str:
    metric = main_metric(run.probe)  # a probe of plain text has a loss alone
    rows = run.probe.get(metric) or [math.nan]
    if len(rows) < 2 or math.isnan(rows[0]) or math.isnan(rows[-1]):
        return ""
    ends = f"from {value(metric, rows[0])} to {value(metric, rows[-1])}"
    return f"{run.name}'s {label(metric)} on the general probe went {ends}."


def skipped(name: str, num_skipped: int, num_steps: int | None) -> str:
    """That a run left out updates."""
    verb = "was" if num_skipped == 1 else "were"
    part = f"{count(num_skipped)} of {count(num_steps)} steps"
    return f"{name}: {part} {verb} skipped, since loss or gradient was not finite."


def scored_apart(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Which tasks runs of one seed were scored on by other rows, and which not all runs have.

    Args:
        runs: each run's name and results, of which "scored" is a hash of its held-out rows by task.
    """
    by_rows: dict[tuple[str, Any], dict[str, list[str]]] = {}
    for name, results in runs:
        for task, rows in (results.get("scored") or {}).items():
            by_rows.setdefault((task, results.get("seed")), {}).setdefault(rows, []).append(name)
    apart: dict[str, list[str]] = {}
    for (task, _), groups in by_rows.items():
        if len(groups) > 1:
            apart.setdefault(" | ".join(", ".join(names) for names in groups.values()), []).append(task)
    return [
        f"Not to be compared: {names} were scored on other rows of {_listed(tasks)}."
        for names, tasks in apart.items()
    ] + _other_tasks(runs)


def _other_tasks(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """A word where not all runs have the same tasks: what is said of all tasks together is of other ones then."""
    tasks = [(name, results["tasks"]) for name, results in runs if results.get("tasks")]
    shared = set.intersection(*(set(found) for _, found in tasks)) if tasks else set()
    own = [(name, [task for task in found if task not in shared]) for name, found in tasks]
    if not any(found for _, found in own):
        return []
    each = "; ".join(f"{name} also has {_listed(found)}" for name, found in own if found)
    told = "Not all runs have the same tasks, so that their means cannot be compared"
    return [f"{told}: {len(shared)} are in all; {each}."]


def _listed(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def few(data: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Which tasks have no evaluation rows, or too few for their scores to say much."""
    out = []
    for task, counts in data.items():
        rows = counts.get("evaluation")
        if rows == 0:
            out.append(f"{task} has no evaluation rows: it was not scored and stands in no mean.")
        elif isinstance(rows, int) and rows < FEW:
            out.append(
                f"{task} has {rows} evaluation row{'s' * (rows != 1)}: each is {percent(1 / rows)} of its score."
            )
    return out
