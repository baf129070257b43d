"""The model of a run, whichever command made it, ready to answer; and `perdure generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from perdure.errors import ConfigError, DataError, RunError, unknown_name
from perdure.recipes.run import notes_of, quieten
from perdure.streams.text import exchange
from perdure.training.display import Display, Terminal
from perdure.training.folder import RunFolder
from perdure.types import Example, Segment

if TYPE_CHECKING:
    from perdure.training.measure import Measure


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """A trained model that answers.

    Attributes:
        measure: with the model, its strategy and its tokenizer.
        tasks: the tasks, or kinds of problems, that it was trained on.
        strategy: the strategy's name.
        notes: what a user should know about which model this is.
        asked_in_turns: whether it was trained on questions and answers through the tokenizer's chat template.
    """

    measure: Measure
    tasks: tuple[str, ...]
    strategy: str
    notes: tuple[str, ...]
    asked_in_turns: bool = False


def serve(path: Path, display: Display) -> Served:
    """The newest model of a run of `perdure run`, `perdure mix` or `perdure arena`.

    Raises:
        RunError: no run is here, or it has no checkpoint that can be read.
    """
    return _of_arena(path, display) if RunFolder(path).is_arena else _of_run(path, display)


def _of_run(path: Path, display: Display) -> Served:
    from perdure.training.measure import Measure
    from perdure.training.plan import make_plan
    from perdure.training.run import Run

    folder = RunFolder(path)
    settings = folder.settings()
    if settings.stream.reactions is not None:
        raise RunError(f"{path} is a run of reactions, which has no words; use `perdure predict {path} FILE`")
    plan = make_plan(settings, folder.recipe_folder)
    run = Run(plan, folder, display)
    run.load()
    assert isinstance(run.measure, Measure)
    return Served(run.measure, tuple(plan.stream.names), settings.strategy, tuple(notes_of(run)))


def _of_arena(path: Path, display: Display) -> Served:
    from perdure.recipes.arena.command import make_plan, read_settings
    from perdure.training.online import Online

    folder = RunFolder(path)
    settings = read_settings(folder)
    plan = make_plan(settings, Display())
    online = Online(plan, folder, display)
    online.load()
    done, total = plan.episodes.done, settings.online.episodes
    notes = () if done == total else (f"note: the run is not finished; this is its model after episode {done}",)
    return Served(plan.measure, settings.kinds, settings.strategy, notes, asked_in_turns=True)


def generate_text(path: Path, prompt: str, max_new_tokens: int, task: str | None = None) -> None:
    """Print a run's greedy answer to a prompt, of a task that may be told to a strategy that wants to know."""
    quieten()
    display = Terminal(stderr=True)
    served = serve(path, display)
    for note in served.notes:
        display.say(note)
    if task is not None and task not in served.tasks:
        raise ConfigError(f"--task: {unknown_name('task', task, served.tasks)}")
    asked = _asked(served, prompt, task)
    wanted = served.measure.learner.strategy.wants_task_ids
    if task is None:
        (asked,) = served.measure.learner.identified([asked])
        if wanted:
            display.say(f"note: no --task was given; the prompt is taken for one of {asked.task}")
    elif not wanted:
        display.say(f"note: {served.strategy} needs no task to answer; --task changes nothing")
    print(_answer(served.measure, [asked], max_new_tokens).strip())


def _asked(served: Served, prompt: str, task: str | None) -> Example:
    """The prompt as a row that ends where the answer begins."""
    measure, encoder = served.measure, served.measure.encoder
    segments: tuple[Segment, ...] = (Segment(prompt), Segment(" ?", learn=True))
    if served.asked_in_turns:
        segments = exchange(prompt, " ?", encoder.tokenizer, "the prompt")
    row = encoder.encode(Example("prompt", task or "", segments=segments))
    if row is None:
        raise DataError(f"the prompt is longer than the model takes ({encoder.max_length} tokens)")
    asked = measure.prompt(row)
    if asked is None:
        raise DataError(
            "the prompt is empty, and this model's tokenizer puts nothing in front of it; give some text"
        )
    return asked


def _answer(measure: Measure, asked: Sequence[Example], max_new_tokens: int) -> str:
    assert asked[0].x is not None
    room = measure.encoder.max_length - len(asked[0].x)
    (answer,) = measure.answers(asked, min(max_new_tokens, room))
    return answer
