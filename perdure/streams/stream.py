"""A stream: tasks in the order in which they arrive, and what is scored along the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from perdure.errors import ConfigError, DataError, unknown_name
from perdure.order import arrange, uniform
from perdure.types import Example, Task

JOINT = "joint"


@dataclass(frozen=True, slots=True, eq=False)
class Stream:
    """Tasks in order.

    Attributes:
        tasks: what is trained on, in order; names differ and none has an empty training set.
        evaluations: the tasks that are scored, in order; by default the stream's own.

    Raises:
        ConfigError: no task, or one name twice.
        DataError: a task without training rows.
    """

    tasks: Sequence[Task]
    evaluations: Sequence[Task] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "evaluations", tuple(self.evaluations) or self.tasks)
        if not self.tasks:
            raise ConfigError("a stream needs at least one task; none was given.")
        twice = [name for name, count in Counter(task.name for task in self.tasks).items() if count > 1]
        if twice:
            raise ConfigError(f"task names must differ, but {twice} stand(s) more than once. Rename one.")
        for task in self.tasks:
            if not len(task.train):
                raise DataError(f"task {task.name!r} has no training rows. Give it some, or leave the task out.")

    def __len__(self) -> int:
        return len(self.tasks)

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __getitem__(self, which: int | str) -> Task:
        """A task by its position or its name."""
        if isinstance(which, int):
            return self.tasks[which]
        for task in self.tasks:
            if task.name == which:
                return task
        raise ConfigError(unknown_name("task", which, self.names))

    @property
    def names(self) -> tuple[str, ...]:
        """The tasks' names, in order."""
        return tuple(task.name for task in self.tasks)

    def joint(self) -> Stream:
        """One task with all training rows at once (the upper reference); scored on the original tasks."""
        train = tuple(example for task in self.tasks for example in task.train)
        evaluation = tuple(example for task in self.tasks for example in task.evaluation)
        return Stream((Task(JOINT, train, evaluation),), self.evaluations)

    def isolated(self, which: int | str) -> Stream:
        """One task alone, from the same start (the reference of intransigence)."""
        return Stream((self[which],))

    def extend(self, task: Task) -> Stream:
        """The same stream with one more task at its end, which is also scored."""
        return Stream((*self.tasks, task), (*self.evaluations, task))


def text_of(example: Example) -> str:
    """An example's text as it is compared: case and runs of white space do not count."""
    return " ".join(" ".join(segment.text for segment in example.segments).casefold().split())


def disjoint(tasks: Sequence[Task]) -> tuple[list[Task], dict[str, int]]:
    """Drop every training row whose normalised text is also an evaluation row of any of the tasks.

    Rows without text are left alone.

    Returns:
        The tasks, and how many training rows each lost, by name.
    """
    held_out = {text for task in tasks for example in task.evaluation if (text := text_of(example))}
    kept, counts = [], {}
    for task in tasks:
        train = [example for example in task.train if text_of(example) not in held_out]
        counts[task.name] = len(task.train) - len(train)
        kept.append(replace(task, train=train) if counts[task.name] else task)
    return kept, counts


Encode = Callable[[Sequence[Example]], Sequence[Example | None]]


def first_encoded(
    examples: Sequence[Example], count: int | None, encode: Encode, *context: Hashable
) -> dict[str, Example]:
    """By key, the encoded examples with the smallest priorities of those that can be encoded.

    Args:
        examples: with keys that differ.
        count: how many at most; None: all.
        encode: gives None for one that cannot be. It is asked for as many at once as are still missing.
        context: of the priorities.
    """
    found: dict[str, Example] = {}
    waiting = arrange(examples, *context, key=lambda example: example.key)
    while waiting and (count is None or len(found) < count):
        missing = len(waiting) if count is None else count - len(found)
        batch, waiting = waiting[:missing], waiting[missing:]
        found.update({example.key: example for example in encode(batch) if example is not None})
    return found


def hold_out(
    examples: Sequence[Example], holdout: float | int, seed: int, name: str, encode: Encode | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, by key hash.

    A share decides for each row alone, so that a new row never moves another. A number takes the rows with the
    smallest priorities of those that can be encoded (of all, without `encode`); the others stay in training, where
    they are left out and counted. The examples come back as they were given, in their order.
    """
    context = (seed, "split", name)
    held: Collection[str]
    if isinstance(holdout, float):
        held = {example.key for example in examples if uniform(*context, key=example.key) < holdout}
    else:
        held = first_encoded(examples, holdout, encode or list, *context)
    train = [example for example in examples if example.key not in held]
    return train, [example for example in examples if example.key in held]
