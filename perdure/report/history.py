"""Histories: what was measured in phase B of a mixing run, from a JSON file. Metrics are found, not assumed."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from perdure.errors import DataError

FORMAT = 1
LARGEST = 64 << 20  # bytes of a file
MOST = 100  # metrics of a file, or of a figure
PREFIX = "forgetting_history_"
# Names of the list along x, the preferred first, and what one entry of it is.
UNITS = {
    "steps": "step", "step": "step", "global_step": "step", "iterations": "iteration", "epochs": "epoch",
    "epoch": "epoch",
}  # fmt: skip
# Where curves stand when they do not stand at the top.
PLACES = ("history", "metrics")
Values = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """Metrics over phase B.

    Args:
        name: what the legend calls it.
        steps: [N], where along x it was measured, as numbers of `unit`.
        curves: each metric's values, [N], by key ("math_loss"); NaN where nothing was measured.
        facts: whatever else the file says, such as `selection_method`.
        unit: "step", "iteration", "epoch", or "measurement" where the file does not say when.

    Raises:
        ValueError: a curve has not as many values as there are steps.
    """

    name: str
    steps: tuple[float, ...]
    curves: Mapping[str, tuple[float, ...]]
    facts: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "step"

    def __post_init__(self) -> None:
        for key, values in self.curves.items():
            if len(values) != len(self.steps):
                raise ValueError(f"{key} has {len(values)} values for {len(self.steps)} steps")

    def measured(self, metric: str) -> list[tuple[float, float]]:
        """Where the metric was measured and what it was; empty where the history lacks it."""
        values = self.curves.get(metric, ())
        return [(x, y) for x, y in zip(self.steps, values, strict=bool(values)) if math.isfinite(y)]

    def change(self, metric: str) -> float:
        """From its first value to its last; NaN where it was measured less than twice."""
        points = self.measured(metric)
        return points[-1][1] - points[0][1] if len(points) > 1 else math.nan

    def as_json(self) -> dict[str, Any]:
        """The file's content, which `read_history` reads back; gaps are NaN.

        Raises:
            ValueError: a fact has a name that is taken, or is a list of numbers and would be read as a curve.
        """
        axis = {} if self.unit == "measurement" else {f"{self.unit}s": self.steps}
        own = {"format": FORMAT, "name": self.name, **axis, **self.curves}
        for key, value in self.facts.items():
            if key in own:
                raise ValueError(f"the fact {key!r} has the name of something else in a history")
            if key not in UNITS and isinstance(value, list | tuple) and any(map(_number, value)):
                raise ValueError(f"the fact {key!r} is a list of numbers, which would be read as a curve")
        return {"format": FORMAT, "name": self.name, **self.facts, **axis, **self.curves}


def read_histories(paths: Iterable[Path | str]) -> list[History]:
    """Read several histories; those of one name get their files' names too.

    Raises:
        DataError: some are no histories; each is named with its reason.
    """
    files = [Path(path) for path in paths]
    histories, refused = [], []
    for path in files:
        try:
            histories.append(read_history(path))
        except DataError as error:
            refused.append(str(error))
    if len(refused) > 1:
        raise DataError(f"{len(refused)} files are no histories:\n  " + "\n  ".join(refused))
    if refused:
        raise DataError(refused[0])
    return _apart(histories, files)


def read_history(path: Path | str) -> History:
    """Read one history, of perdure or of another program.

    A curve is a list with numbers in it; null, NaN and infinities are gaps. Curves stand at the top of the object
    or one level down, each as a list, or all in one list of objects. A list named as in `UNITS` is x, where it is
    as long as they are; without one the measurements are counted from 0.

    Raises:
        DataError: it is no history; the message names the file and what is wrong.
    """
    path = Path(path)
    try:
        return _history(_content(path), path.stem.removeprefix(PREFIX) or path.stem)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: {reason}") from error


def _content(path: Path) -> Any:
    if path.is_dir():
        raise ValueError("is a folder; name its files")
    if not path.is_file():
        raise ValueError("is not a file" if path.exists() else "does not exist")
    if path.stat().st_size > LARGEST:
        raise ValueError(f"larger than {LARGEST >> 20} MiB, so no history")
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON: not text in UTF-8 (byte {error.start})") from error
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read: nested too deep") from error


def _history(content: Any, name: str) -> History:
    """A history from a file's content; `name` is for one that states none."""
    content = {PLACES[0]: content} if isinstance(content, list) else content
    if not isinstance(content, dict):
        raise ValueError(f"no history: the file must hold a JSON object, got {_kind(content)}")
    top = dict(content)
    version: Any = top.get("format")
    if _number(version):
        if version > FORMAT:
            raise ValueError(f"format {version} is newer than this perdure reads ({FORMAT}); update perdure")
        del top["format"]
    stated = top.pop("name", None)
    if not isinstance(stated, str | None):
        raise ValueError(f"name must be text, got {_kind(stated)}")
    place, values = _place(top)
    lists = {key: value for key, value in values.items() if key not in UNITS and _numeric(key, value)}
    if not lists:
        raise ValueError("no history: no list of numbers in it, at the top or one level down")
    lists = _of_one_length(lists, {**top, **values})
    if len(lists) > MOST:
        raise ValueError(f"{len(lists)} lists of numbers are too many; at most {MOST} can be drawn")
    steps, key = _axis({**top, **values}, len(next(iter(lists.values()))))
    above = {k: v for k, v in top.items() if k != place} if values is not top else {}
    facts = {k: v for k, v in values.items() if k not in lists} | above
    return History(
        name=stated if stated and stated.strip() else name,
        steps=steps,
        curves={k: tuple(_float(k, value) for value in found) for k, found in lists.items()},
        facts={k: v for k, v in facts.items() if k != key},
        unit=UNITS.get(key, "measurement"),
    )


def _of_one_length(lists: dict[str, list[Any]], values: Values) -> dict[str, list[Any]]:
    """The curves among lists of numbers: those as long as the axis, or as the losses; others are facts."""
    lengths = {len(value) for value in lists.values()}
    if len(lengths) == 1:
        return lists
    axes = [len(values[key]) for key in UNITS if isinstance(values.get(key), list)]
    losses = {len(value) for key, value in lists.items() if key.endswith("_loss")}
    wanted = next((n for n in axes if n in lengths), losses.pop() if len(losses) == 1 else None)
    if wanted is None:
        named = ", ".join(f"{key} {len(value)}" for key, value in list(lists.items())[:10])
        raise ValueError(f"the lists of numbers in it differ in length: {named}")
    return {key: value for key, value in lists.items() if len(value) == wanted}


def _place(top: Values) -> tuple[str | None, Values]:
    """The key under which the curves stand, None for the top, and what stands there."""
    below = {key: found for key, value in top.items() if (found := _columns(key, value)) is not None}
    named = [key for key in PLACES if key in below]
    for key in (*named, None, *(key for key in below if key not in named)):
        values = top if key is None else below[key]
        if any(k not in UNITS and _numeric(k, value) for k, value in values.items()):
            return key, values
    return None, top


def _columns(name: str, value: Any) -> Values | None:
    """What stands one level down: an object as it is, a list of objects as a list for each of their keys."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, list) or not value or not all(isinstance(row, dict) for row in value):
        return None
    keys = dict.fromkeys(key for row in value for key in row)
    if len(keys) > MOST:
        raise ValueError(f"the objects in {name!r} have {len(keys)} keys; at most {MOST} can be read")
    return {key: [row.get(key) for row in value] for key in keys}


def _axis(values: Values, length: int) -> tuple[tuple[float, ...], str]:
    """The list along x and its key; a count and no key where there is none of that length."""
    for key in UNITS:
        if _numeric(key, values.get(key)) and len(values[key]) == length:
            found = values[key]
            gap = next((i for i, x in enumerate(found) if math.isnan(_float(key, x))), None)
            if gap is not None:
                raise ValueError(f"{key}: value {gap + 1} is {_kind(found[gap])}, where a number must stand")
            return tuple(found), key
    return tuple(range(length)), ""


def _numeric(key: str, value: Any) -> bool:
    """Whether it is a list with numbers; then the rest of it may only be gaps."""
    if not isinstance(value, list) or not any(map(_number, value)):
        return False
    for i, x in enumerate(value):
        if x is not None and not _number(x):
            raise ValueError(f"{key}: value {i + 1} is {_kind(x)}, where a number or null must stand")
    return True


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _float(key: str, x: float | None) -> float:
    """The value, NaN for a gap."""
    try:
        value = math.nan if x is None else float(x)
    except OverflowError as error:
        raise ValueError(f"{key}: a number of it is too large") from error
    return value if math.isfinite(value) else math.nan


def _kind(value: Any) -> str:
    """What a JSON value is, for messages."""
    names = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return names.get(type(value)) or f"{value!s:.40}".lower()


def _apart(histories: Sequence[History], paths: Sequence[Path]) -> list[History]:
    """The histories, those of one name with as much of their files' paths as tells them apart."""
    many = Counter(history.name for history in histories)
    files = [path.resolve() for path in paths]
    out = []
    for history, file in zip(histories, files, strict=True):
        like = [f for h, f in zip(histories, files, strict=True) if h.name == history.name and f != file]
        depth = next(n for n in range(1, len(file.parts) + 1) if all(f.parts[-n:] != file.parts[-n:] for f in like))
        told = f"{history.name} ({'/'.join(file.parts[-depth:])})"
        out.append(replace(history, name=told) if many[history.name] > 1 else history)
    return out
