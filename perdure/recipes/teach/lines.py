"""What a line of the conversation asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from perdure.errors import ConfigError, unknown_name

ASK = "ask"
COMMANDS: dict[str, tuple[str, str]] = {
    "ask": ("QUESTION", "ask it as it stands, whatever it looks like"),
    "correct": ("ANSWER", "the right answer to what was asked last; `no: ANSWER` is the same"),
    "also": ("WORDING", "another wording of the question, to be taught with the next correction"),
    "check": ("WORDING", "a wording that is not taught, but looked at: did the lesson generalise?"),
    "good": ("", "the last answer is right, and must stay so"),
    "bad": ("", "the last answer is wrong; the right one is asked for"),
    "replay": ("", "teach what was refused with more replay"),
    "scale": ("[0.5|0.25]", "teach what was refused, and keep so much of the change"),
    "drop": ("", "leave what was refused"),
    "why": ("", "which answers the last lesson broke"),
    "lessons": ("", "all lessons, and whether each is still right"),
    "undo": ("", "take the newest lesson back"),
    "forget": ("N", "as if lesson N had never been taught; later ones are taught again"),
    "probe": ("[add QUESTION => ANSWER]", "the general probe; `add` gives it one more row"),
    "import": ("FILE.jsonl", "teach the lessons of a file, one after another"),
    "save": ("", "write the adapter into the folder (lessons are saved as they come)"),
    "export": ("FOLDER", "write the adapter there, in PEFT's format"),
    "help": ("", "this list"),
    "quit": ("", "leave; Ctrl-D does too"),
}
_NO = re.compile(r"no\s*:\s*", re.I)
_ALMOST_NO = re.compile(r"no\b[\s,;.!–—-]*(?P<answer>[^?]*)", re.I)
_NUMBERED = re.compile(r"(?P<name>forget|scale)\s+(?P<number>[\d.]+)", re.I)
_OTHERS = {"exit": "quit", "bye": "quit", "q": "quit", ":q": "quit"}
NEED_TEXT = ("ask", "correct", "also", "check", "forget", "import", "export")


@dataclass(frozen=True, slots=True)
class Line:
    """One line.

    Attributes:
        command: a name in `COMMANDS`, or "ask".
        text: what stands after it.
    """

    command: str
    text: str


def parse(line: str) -> Line | None:
    """What a line asks for; None for an empty one.

    Raises:
        ConfigError: no command of that name, a text that it needs is missing, or what looks like a command is none.
    """
    line = line.strip()
    if not line:
        return None
    if found := _NO.match(line):
        line = f"/correct {line[found.end() :]}"
    if not line.startswith("/"):
        if meant := _meant(line):
            raise ConfigError(f"did you mean `{meant}`? To ask it as it stands: /{ASK} {line}")
        return Line(ASK, line)
    name, _, text = line[1:].partition(" ")
    if name not in COMMANDS:
        near = [_OTHERS[name]] if name in _OTHERS else []
        raise ConfigError(f"/{name}: {unknown_name('command', name, COMMANDS, near)} /help explains them.")
    if name in NEED_TEXT and not text.strip():
        raise ConfigError(f"/{name} needs {COMMANDS[name][0]}: {COMMANDS[name][1]}")
    return Line(name, text.strip())


def _meant(line: str) -> str | None:
    """The command that a line without a slash or a colon is likely to stand for."""
    word = line.casefold().rstrip(".!")
    if word in COMMANDS or word in _OTHERS:
        return f"/{_OTHERS.get(word, word)}"
    if found := _NUMBERED.fullmatch(line):
        return f"/{found['name'].casefold()} {found['number']}"
    if found := _ALMOST_NO.fullmatch(line):
        return f"no: {found['answer'] or 'ANSWER'}"
    return None
