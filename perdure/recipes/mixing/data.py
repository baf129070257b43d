"""From what `--task-a` and `--task-b` name to the settings of a task."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perdure.errors import DataError
from perdure.recipes.run import task_spec
from perdure.storage import there
from perdure.streams.sources import Row, is_hub_name, read_rows
from perdure.streams.spec import TaskSpec
from perdure.streams.text import DEFAULTS, MESSAGES

# Names that the hub has given an owner since.
RENAMED = {"hotpot_qa": "hotpotqa/hotpot_qa:distractor"}
KEYS = {"MATH": "math", "HotpotQA": "hotpot"}
FULL_CONTEXT = 2048  # tokens that hold ten paragraphs, a question and its answer
MATH = {"prompt": "Problem: {problem}\n\nSolution:\n", "answer": "{solution}"}
LEAST_SHARE = 5  # at most one row in so many is held out


def hotpot_template(context: str) -> list[dict[str, Any]]:
    """Supporting sentences or all paragraphs, then question and answer.

    Paragraphs are cut where they are too long. Supporting sentences are not: a question without its support cannot
    be answered, so that a row in which they do not fit is left out.
    """
    whole = context == "support"
    return [
        {"text": "{support}" if whole else "{paragraphs}", "cut": not whole},
        {"text": "\n\nQuestion: {question}\nAnswer:\n"},
        {"text": "{answer}", "learn": True},
    ]


def task_of(source: str, option: str, context: str) -> tuple[TaskSpec, int]:
    """The task's settings as far as its data say, and how many rows there are.

    Args:
        source: a hub name, a data file or folder, or a YAML file with a task's settings.
        option: the option that named it, for messages.
        context: of HotpotQA: "support" or "full".

    Raises:
        DataError: nothing is there, or its columns are none of those that are known.
    """
    path = Path(source).expanduser()
    if path.suffix in (".yaml", ".yml"):
        spec = task_spec(path, option=option)
        return spec, len(read_rows(spec.train, split=spec.split, config=spec.config))
    if there(path):
        place, stem = str(path.resolve()), path.name.split(".")[0]
    else:
        place = RENAMED.get(source, source)
        stem = place.partition(":")[0].rpartition("/")[2]
    if not there(path) and not is_hub_name(place):
        raise DataError(f"{option} {source}: no such file or folder, and no hub name (owner/name); check the path")
    try:
        rows = read_rows(place)
    except DataError as error:
        raise DataError(f"{option} {error}") from error
    return TaskSpec.model_validate({"train": place, "name": stem, **_kind(rows[0], option, context)}), len(rows)


def _kind(row: Row, option: str, context: str) -> dict[str, Any]:
    """Settings that follow from the columns of the first row."""
    columns = set(row.values)
    if {"problem", "solution"} <= columns:
        return {"name": "MATH", "prepare": "math", "template": MATH, "answers": "math"}
    if {"question", "answer", "context", "supporting_facts"} <= columns:
        template = hotpot_template(context)
        return {"name": "HotpotQA", "prepare": "hotpot", "template": template, "answers": "hotpot"}
    if MESSAGES in columns or any({prompt, answer} <= columns for prompt, _, answer in DEFAULTS):
        return {}
    raise DataError(
        f"{option} {row.place}: its columns are {', '.join(row.values)}. Known are MATH's (problem, solution, "
        "level), HotpotQA's (question, answer, context, supporting_facts), and prompt or question with answer. For "
        "others give a YAML file with `train` and a `template` (docs/mixing.md)."
    )


def with_sizes(spec: TaskSpec, rows: int, n_train: int, n_val: int, epochs: int) -> TaskSpec:
    """The settings with caps and epochs, where a YAML file has not set them itself.

    Validation rows are held out by key hash unless a file of their own is named: at most a fifth of the rows, so
    that small files keep most of theirs for training.
    """
    sizes: dict[str, Any] = {"train_rows": n_train, "evaluation_rows": n_val, "epochs": epochs}
    if spec.evaluation is None and spec.holdout is None:
        held = max(1, min(n_val, rows // LEAST_SHARE))
        sizes |= {"holdout": held, "train_rows": max(1, min(n_train, rows - held)), "evaluation_rows": held}
    return spec.model_copy(update={key: value for key, value in sizes.items() if key not in spec.model_fields_set})


def apart(first: TaskSpec, second: TaskSpec) -> tuple[TaskSpec, TaskSpec]:
    """The two with names that differ."""
    if first.name != second.name:
        return first, second
    return first.model_copy(update={"name": f"{first.name}-A"}), second.model_copy(
        update={"name": f"{second.name}-B"}
    )


def key_of(task: str) -> str:
    """A task's name as it stands in keys and names of files: "math", "hotpot", or the name in plain letters."""
    return KEYS.get(task) or re.sub(r"\W+", "_", task).strip("_").lower() or "task"


def describe(spec: Mapping[str, Any] | TaskSpec) -> str:
    """The file name, or hub name, of a task's data."""
    values = spec.model_dump() if isinstance(spec, TaskSpec) else spec
    return str(values["train"])
