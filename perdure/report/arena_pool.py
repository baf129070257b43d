"""Arena runs that differ by their seed alone, as one: means over seeds with their 95 % t-intervals."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from perdure.report import words
from perdure.report.arena_run import ArenaRun, Estimate

# Keys of config.yaml that say which run it is and what it found, and not how it learns.
OWN = ("seed", "name", "out", "recorded")
# What decides which held-out rows a run was scored on, beside the seed.
EVALUATION = {
    "eval_tasks": "held-out rows", "tasks": "kinds", "levels": "levels", "forms": "wordings of each kind",
    "answers": "form of answers",
}  # fmt: skip
# Settings whose value alone is understood.
BARE = ("method", "model", "strategy")
LONGEST = 60  # characters of a group's name


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of equal settings, each with a seed of its own.

    Args:
        name: what figures and tables call it; different from all others beside it.
        runs: one or more.
    """

    name: str
    runs: tuple[ArenaRun, ...]

    @property
    def first(self) -> ArenaRun:
        """The run that stands for what all have in common."""
        return self.runs[0]

    def share(self, of: Callable[[ArenaRun], Estimate]) -> Estimate:
        """A share of one: the lone run's own with its interval, or the mean over seeds with theirs, within 0–1."""
        found = [of(run) for run in self.runs]
        if len(found) == 1:
            return found[0]
        mean = over_seeds(one.value for one in found)
        return replace(mean, low=max(0.0, mean.low), high=min(1.0, mean.high)) if mean.bounded else mean

    def value(self, of: Callable[[ArenaRun], float]) -> Estimate:
        """Any number of a run; the interval is that over seeds, and none where there is one."""
        return over_seeds(map(of, self.runs))


def over_seeds(values: Iterable[float]) -> Estimate:
    """Mean with its 95 % t-interval, mean ± t(0.975, n − 1) · s / √n; NaN are left out.

    One value has no interval, nor have equal ones: without spread nothing says what another seed would give.
    """
    known = [value for value in values if math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    if len(set(known)) < 2:
        return Estimate(mean, n=len(known))
    half = t_quantile(len(known) - 1) * statistics.stdev(known) / math.sqrt(len(known))
    return Estimate(mean, mean - half, mean + half, len(known))


def t_quantile(degrees: int) -> float:
    """The t beyond which 2.5 % of Student's distribution with that many degrees of freedom lie.

    By bisection of P(|T| < t), a finite sum for whole degrees of freedom.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| < t)."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for k in range(degrees // 2):
        total += term
        term *= math.cos(angle) ** 2 * (2 * k + 1 + odd) / (2 * k + 2 + odd)
    total *= math.sin(angle)
    return (angle + total) * 2 / math.pi if odd else total


def pooled(runs: Sequence[ArenaRun]) -> list[Group]:
    """Runs of equal settings together, in order of first sight; a seed that comes again begins another group.

    A run whose config.yaml is gone is like no other.
    """
    groups: list[tuple[str, list[ArenaRun]]] = []
    for run in runs:
        key = json.dumps(settings(run) or str(run.path), sort_keys=True)
        fits = (found for k, found in groups if k == key and run.seed not in [other.seed for other in found])
        home = next(fits, None)
        if home is None:
            groups.append((key, [run]))
        else:
            home.append(run)
    found = [members for _, members in groups]
    names = words.short(_names(found), LONGEST)
    return [Group(name, tuple(members)) for name, members in zip(names, found, strict=True)]


def settings(run: ArenaRun) -> dict[str, str]:
    """All that config.yaml asks for but the seed, the name and the folder, as text by dotted keys."""
    return dict(_flat({key: value for key, value in run.config.items() if key not in OWN}, ""))


def other_evaluation(one: Group, other: Group) -> list[str]:
    """What differs between the sorts of held-out rows of two groups, in words; empty where nothing is known to."""
    out = []
    for key, name in EVALUATION.items():
        ours, theirs = (plain(group.first.results.get(key)) for group in (one, other))
        if ours != theirs:
            out.append(f"{name}: {ours} against {theirs}")
    counts = [{kind: scores.rows for kind, scores in group.first.kinds.items()} for group in (one, other)]
    return out or ["other numbers of rows of each kind"] * (counts[0] != counts[1])


def labels(groups: Sequence[Group]) -> list[str]:
    """Names for a legend, with the number of seeds where any group has several."""
    several = any(len(group.runs) > 1 for group in groups)
    return [f"{group.name} (n = {len(group.runs)})" if several else group.name for group in groups]


def plain(value: object) -> str:
    """A setting as text; a list without brackets, a dash for none."""
    if value is None:
        return "–"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _flat(value: object, key: str) -> Iterator[tuple[str, str]]:
    """The values of nested settings by dotted keys."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, plain(value)


def _names(groups: Sequence[Sequence[ArenaRun]]) -> list[str]:
    """The name that all runs of a group have, else their method; where groups share one, what tells them apart."""
    bases = [runs[0].name if len({run.name for run in runs}) == 1 else runs[0].method for runs in groups]
    asked = [settings(runs[0]) for runs in groups]
    names = []
    for base, own in zip(bases, asked, strict=True):
        like = [other for name, other in zip(bases, asked, strict=True) if name == base and other]
        keys = dict.fromkeys(key for one in like for key in one)
        telling = [key for key in keys if key in own and len({one.get(key) for one in like}) > 1]
        names.append(", ".join([base, *(_told(key, own) for key in telling)]))
    return names


def _told(key: str, own: Mapping[str, str]) -> str:
    return own[key] if key in BARE else f"{words.label(key.rpartition('.')[2])} {own[key]}"
