"""`perdure teach`: a conversation in a terminal, or lines from a file or a pipe."""

from __future__ import annotations

import io
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.config import apply_overrides
from perdure.errors import ConfigError, RunFailure
from perdure.recipes.run import quieten
from perdure.recipes.teach.conversation import Conversation
from perdure.recipes.teach.lines import COMMANDS

if TYPE_CHECKING:
    from rich.console import Console


PROMPT = "> "


def teach(given: Mapping[str, Any], overrides: Sequence[str], out: Path | None, probe: Path | None = None) -> None:
    """Open the folder of lessons, or begin one, and talk until there are no more lines.

    Lines that come from a file or a pipe are said again, each before its answer.

    Args:
        given: settings of the command line; None where nothing was said.
        overrides: `key=value` assignments.
        out: the folder; None: named by the model.
        probe: a JSONL file with the general probe.

    Raises:
        UsageError: a mistake in what was asked.
        RunFailure: a line of a file or a pipe could not be done, or its lesson was not kept; the others were done.
    """
    from rich.console import Console

    from perdure.teaching import Teacher

    values = apply_overrides({key: value for key, value in given.items() if value is not None}, overrides)
    if values.get("run") is not None:
        if values.get("model") is not None:
            raise ConfigError("--run says which model: leave --model out")
        values["run"] = str(Path(values["run"]).expanduser().resolve())
    model = values.pop("model", None)
    folder = out or default_out(values, model)
    console = Console(highlight=False)
    quieten()
    with (
        console.status("loading") as status,
        Teacher(
            model,
            out=folder,
            settings=values,
            probe=probe,
            watch=lambda done, total: status.update(
                f"teaching lessons again: {done} of {total}" if total else "loading"
            ),
        ) as teacher,
    ):
        status.stop()
        talk = Conversation(teacher, console, folder)
        _greet(talk)
        typed = sys.stdin.isatty() and console.is_terminal
        for line in _typed(console) if typed else _read():
            if not typed and line.strip():
                talk.say(f"{PROMPT}{line.strip()}", style="dim")
            if not _heard(talk, line):
                break
        talk.say(f"lessons are in {folder}; go on with: {shlex.join(['perdure', 'teach', '--out', str(folder)])}")
    if talk.refused and not typed:
        raise RunFailure(f"{talk.refused} of the lines or lessons were refused, as is said above; the rest is done")


def default_out(values: Mapping[str, Any], model: str | None) -> Path:
    """Where lessons go when nothing is said."""
    name = Path(values.get("run") or model or "nano").name
    tuning = values.get("tuning") or "lora"
    return Path("runs") / f"teach-{name}{'' if tuning == 'lora' else f'-{tuning}'}"


def _greet(talk: Conversation) -> None:
    teacher, settings = talk.teacher, talk.teacher.settings
    trained, total = teacher.pupil.trainable
    count = len(teacher.lessons)
    there = f"{count} lesson{'' if count == 1 else 's'} so far" if count else "no lesson yet"
    name = settings.model if settings.run is None else f"the model of {settings.run}"
    talk.say(
        f"{name} ({settings.tuning}, {trained:,} of {total:,} parameters trained); {there}; "
        f"probe of {teacher.probe_count} rows; in {talk.out}"
    )
    for note in teacher.notes:
        talk.say(f"warning: {note}")
    talk.say("Type a question; correct the answer with `no: ANSWER`; /help lists the rest.")


def _heard(talk: Conversation, line: str) -> bool:
    try:
        return talk.hear(line)
    except KeyboardInterrupt:
        talk.say("interrupted: the lesson in progress is dropped, the model is as it was before it")
        return True


def _read() -> Iterator[str]:
    """The lines of standard input."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    yield from sys.stdin


def _typed(console: Console) -> Iterator[str]:
    """Lines that a person types, with history and completion."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.completion import WordCompleter

    words = WordCompleter([f"/{name}" for name in COMMANDS], sentence=True)
    session: PromptSession[str] = PromptSession(completer=words, complete_while_typing=False)
    while True:
        try:
            yield session.prompt(PROMPT)
        except KeyboardInterrupt:
            console.print("Ctrl-D or /quit leaves")
        except EOFError:
            return
