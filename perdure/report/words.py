"""How numbers and names are put into words: units, directions, shortened names, the page's first sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from perdure.report.read import Run, mean, number

# Shares of one: people say them in percent, and their differences in points.
SHARES = ("exact_match", "accuracy")
# Directions of the summary's values for a metric where more is better; for a loss only the averages turn, since
# the differences are already signed so that forgetting is bad and transfer good.
AVERAGES = ("average", "learning", "anytime_average", "micro_average", "pooled")
COLUMNS = {
    "average": "average",
    "micro_average": "average over rows",
    "pooled": "pooled",
    "learning": "when learnt",
    "anytime_average": "along the way",
    "forgetting": "forgetting",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "intransigence": "intransigence",
}


def label(metric: str) -> str:
    """A metric's name for people."""
    return {"r2": "R²", "rmse": "RMSE", "mae": "MAE"}.get(metric, metric.replace("_", " "))


def direction(higher_is_better: bool) -> str:
    """Which way is better, in words."""
    return "higher is better" if higher_is_better else "lower is better"


def arrow(key: str, higher_is_better: bool) -> str:
    """Which way is better for a value of the summary, as an arrow."""
    if key in AVERAGES:
        return "↑" if higher_is_better else "↓"
    return "↓" if key in ("forgetting", "intransigence") else "↑"


def value(metric: str, x: float, *, signed: bool = False, unit: bool = True) -> str:
    """A score as text: shares in percent (differences in points), others with the digits that matter."""
    if math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    if metric in SHARES:
        text = f"{abs(x) * 100:.1f}" if unit else f"{abs(x) * 100:.0f}"
        text += (" pt" if signed else " %") if unit else ""
    elif abs(x) >= 1e5 or 0 < abs(x) < 0.0005:
        text = f"{abs(x):.1e}"
    else:
        text = f"{abs(x):.{3 if abs(x) < 10 and unit else 2 if abs(x) < 100 else 0}f}"
    zero = not any(c in "123456789" for c in text.split("e")[0])
    sign = "" if zero else "−" if x < 0 else "+" if signed else ""
    return sign + text


def of_summary(metric: str, key: str, x: float) -> str:
    """A value of the summary as text: averages as scores, differences as differences."""
    text = value(metric, x)
    return text if key in AVERAGES else text.replace(" %", " pt")


def count(x: object) -> str:
    """A whole number with thin spaces between thousands; a dash for what is missing."""
    return f"{x:,}".replace(",", "\u202f") if isinstance(x, int) else "–"


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
    """Names that fit a figure, still different from one another: long ones lose their middle."""
    out: list[str] = []
    for name in names:
        text = " ".join(name.split()) or "(no name)"
        if text.startswith("_"):  # matplotlib hides such a name in legends
            text = " " + text
        if len(text) > width:
            head = (width - 1) * 2 // 3
            text = text[:head] + "…" + text[len(text) - (width - 1 - head) :]
        stem, copy = text, 2
        while text in out:
            text, copy = f"{stem} ({copy})", copy + 1
        out.append(text)
    return out


def sentences(runs: Sequence[Run]) -> list[str]:
    """What the numbers say, in plain words; nothing that the run folders do not hold."""
    out = [_forgot(run) for run in runs if run.scores]
    joint = next((run for run in runs if run.strategy == "joint" and run.scores), None)
    out += [_against(run, joint) for run in runs if joint is not None and run is not joint and run.scores]
    out += [_general(run) for run in runs]
    for run in runs:
        if not run.finished:
            out.append(f"{run.name} is not finished: these are the numbers that it has written so far.")
        if run.unreadable:
            lines = "1 line" if run.unreadable == 1 else f"{run.unreadable} lines"
            out.append(f"{lines} of {run.name}'s metrics.jsonl could not be read and were left out.")
    return [sentence for sentence in out if sentence]


def _forgot(run: Run) -> str:
    metric, scores = next(iter(run.scores.items()))
    summary, name = run.summaries[metric], label(metric)
    average, learnt, lost = (number(summary.get(key)) for key in ("average", "learning", "forgetting"))
    end = value(metric, average)
    if math.isnan(average):
        return ""
    if math.isnan(lost):
        tasks, before = len(scores.tasks), mean(scores.values[0])
        start = "" if math.isnan(before) else f", from {value(metric, before)} before training"
        verb = "ended at" if run.finished else "stands at"
        return f"{run.name} {verb} a mean {name} of {end} over {tasks} task{'s' * (tasks != 1)}{start}."
    size = value(metric, abs(lost)).replace(" %", " points")
    then = f": {value(metric, learnt)} when learnt, {end} on average at the end."
    if not any(digit in size for digit in "123456789"):
        return f"{run.name} lost nothing of what it had learnt{then}"
    if not scores.higher_is_better:
        return f"{run.name}'s {name} on what it had learnt {'rose' if lost > 0 else 'fell'} by {size}{then}"
    return f"{run.name} {'lost' if lost > 0 else 'gained'} {size} of {name} on what it had learnt{then}"


def _against(run: Run, joint: Run) -> str:
    metric = next(iter(run.scores))
    if metric not in joint.summaries:
        return ""
    ours, theirs = (number(r.summaries[metric].get("average")) for r in (run, joint))
    if math.isnan(ours) or math.isnan(theirs):
        return ""
    if metric in SHARES and theirs > 0:
        return f"{run.name} kept {ours / theirs:.0%} of {joint.name}'s average.".replace("%", " %")
    gap = value(metric, ours - theirs, signed=True)
    return f"{run.name}'s mean {label(metric)} is {gap} against {joint.name}'s."


def _general(run: Run) -> str:
    for metric, rows in run.probe.items():
        if metric in SHARES and len(rows) > 1 and not math.isnan(rows[0]) and not math.isnan(rows[-1]):
            return (
                f"On the general probe, {run.name} went from {value(metric, rows[0])} "
                f"to {value(metric, rows[-1])} {label(metric)}."
            )
    return ""
