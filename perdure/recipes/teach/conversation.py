"""A conversation in which a model is asked and corrected, line by line. Knows a console, and no terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import DataError, PerdureError
from perdure.recipes.teach import show
from perdure.recipes.teach.lines import ASK, COMMANDS, Line, parse
from perdure.teaching.lesson import REPLAY, SCALES, matter_of

if TYPE_CHECKING:
    from rich.console import Console

    from perdure.teaching import Lesson, Teacher

ADAPTER = "adapter"


class Conversation:
    """Answers lines.

    Args:
        teacher: teaches.
        console: what is said goes there.
        out: the folder of the lessons.
    """

    def __init__(self, teacher: Teacher, console: Console, out: Path) -> None:
        self.teacher, self.console, self.out = teacher, console, out
        self.asked: str | None = None  # the last question
        self.answered: str | None = None  # and the model's answer
        self.refused = 0  # lines that could not be done, and lessons that were not kept
        self._cut = False  # whether that answer was
        self._also: list[str] = []
        self._check: list[str] = []
        self._noted: list[str] = []  # those that no lesson was given yet
        self._last: Lesson | None = None

    def hear(self, text: str) -> bool:
        """Do what a line asks for; False where it ends the conversation. Mistakes are said, and nothing is lost."""
        try:
            line = parse(text)
            if line is not None and line.command == "quit":
                return False
            if line is not None:
                self._do(line)
        except PerdureError as error:
            self.refused += 1
            self.say(f"error: {error}")
        return True

    def say(self, text: str, style: str | None = None) -> None:
        """One line to the person."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)

    def _do(self, line: Line) -> None:
        doing: dict[str, Callable[[str], None]] = {
            ASK: self._ask,
            "correct": self._correct,
            "also": lambda text: self._wording(self._also, text, "taught"),
            "check": lambda text: self._wording(self._check, text, "looked at"),
            "good": lambda text: self._good(),
            "bad": lambda text: self._bad(),
            "replay": lambda text: self._again(REPLAY),
            "scale": lambda text: self._again(text or SCALES[0]),
            "drop": lambda text: self._drop(),
            "why": lambda text: self._why(),
            "lessons": lambda text: self._lessons(),
            "undo": lambda text: self._undo(),
            "forget": self._forget,
            "probe": self._probe,
            "import": lambda text: self._import(_path(text)),
            "save": lambda text: self._export(self.out / ADAPTER),
            "export": lambda text: self._export(_path(text)),
            "help": lambda text: self._help(),
        }
        doing[line.command](line.text)

    # Asking and correcting

    def _ask(self, prompt: str) -> None:
        reply = self.teacher.reply(prompt)
        if self._noted:
            self.say(f"left out, for no correction followed: {', '.join(repr(w) for w in self._noted)}")
        self.asked, self.answered, self._cut = prompt, reply.text, reply.cut
        self._also, self._check, self._noted = [], [], []
        self.teacher.note("asked", prompt=prompt, answer=reply.text)
        self.say(f"{reply.text or '(nothing)'}{' …' if reply.cut else ''}", style="bold")
        if reply.cut:
            most = self.teacher.pupil.settings.max_new_tokens
            self.say(f"cut at {most} tokens; begin with --set max_new_tokens={2 * most} to see more", style="dim")

    def _question(self) -> str:
        if self.asked is None:
            raise DataError("nothing was asked yet: type a question first, then correct the answer")
        return self.asked

    def _correct(self, answer: str) -> None:
        prompt = self._question()
        with self.console.status("teaching"):
            lesson = self.teacher.teach(prompt, answer, self._also, self._check)
        self._told(lesson)

    def _wording(self, where: list[str], text: str, how: str) -> None:
        self._question()
        where.append(text)
        self._noted.append(text)
        self.say(f"noted: this wording is {how} with the next correction of this question")

    def _good(self) -> None:
        prompt, answer = self._question(), self.answered or ""
        if self._cut:
            raise DataError(
                "the answer was cut, and would be taught as if it ended there: give it whole, `no: ANSWER`"
            )
        self.teacher.note("good", prompt=prompt, answer=answer)
        with self.console.status("teaching"):
            lesson = self.teacher.teach(prompt, answer, self._also, self._check)
        self._told(lesson)

    def _bad(self) -> None:
        self.teacher.note("bad", prompt=self._question(), answer=self.answered)
        self.say("noted. What is the right answer? `no: ANSWER` teaches it")

    def _again(self, form: str) -> None:
        with self.console.status("teaching"):
            lesson = self.teacher.again(form)
        self._told(lesson)

    def _drop(self) -> None:
        self.say("left as it is" if self.teacher.waits else "nothing waits")
        self.teacher.drop()

    def _told(self, lesson: Lesson) -> None:
        self._last, self._noted = lesson, []
        self.refused += not lesson.kept
        first = lesson.answers[0]
        if first.prompt == self.asked and lesson.kept:
            self.answered, self._cut = lesson.matter.answer, False
        self.say(f"before: {first.before or '(nothing)'}")
        self.say(f"after:  {first.after or '(nothing)'}", style="bold")
        self.say(show.headline(lesson), style="green" if lesson.kept else "red")
        self.say(show.gauge(lesson), style="dim")
        if not lesson.kept:
            self.say(show.offers())

    def _why(self) -> None:
        if self._last is None:
            raise DataError("no lesson was taught yet in this conversation")
        self.say(show.headline(self._last))
        lines = show.broken(self._last)
        for text in lines or ["it broke no answer"]:
            self.say(text)

    # Lessons

    def _lessons(self) -> None:
        if not self.teacher.lessons:
            self.say("no lesson yet: ask something, and correct the answer with `no: ANSWER`")
            return
        self.console.print(show.table(self.teacher))
        before, now = self.teacher.probe_right()
        if now == now:
            self.say(f"probe {100 * before:.1f} % -> {100 * now:.1f} % · KL {self.teacher.distance():.4f}")

    def _undo(self) -> None:
        entry = self.teacher.undo()
        self.say(f"lesson {entry.number} is taken back: {entry.matter.prompt} {entry.matter.answer}")

    def _forget(self, text: str) -> None:
        if not text.isdecimal():
            raise DataError(f"/forget {text}: give the number of a lesson, as /lessons shows them")
        with self.console.status("teaching the later lessons again"):
            entry, dropped = self.teacher.forget(int(text))
        self.say(f"lesson {entry.number} is forgotten: {entry.matter.prompt} {entry.matter.answer}")
        if dropped:
            self.say(f"without it, these are refused, and gone too: {', '.join(map(str, dropped))}", style="red")

    def _probe(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word == "add":
            prompt, arrow, answer = rest.partition("=>")
            if not arrow:
                raise DataError("/probe add QUESTION => ANSWER: an arrow => stands between them")
            self.teacher.add_probe(prompt, answer)
            self.say("noted: the gate looks at it from now on, as at every row of the probe")
            return
        if word:
            raise DataError(f"/probe {word}: it is /probe, or /probe add QUESTION => ANSWER")
        before, now = self.teacher.probe_right()
        self.say(
            f"{self.teacher.probe_count} rows; {100 * before:.1f} % right before the first lesson, "
            f"{100 * now:.1f} % now; KL from the base {self.teacher.distance():.4f}"
            if now == now
            else "there is no probe"
        )

    def _import(self, path: Path) -> None:
        lessons = read_lessons(path)
        for matter in lessons:  # what is too long is said before any is taught
            self.teacher.pupil.taught(matter)
            self.teacher.pupil.held_out(matter)
        kept = 0
        for number, matter in enumerate(lessons, start=1):
            with self.console.status(f"lesson {number} of {len(lessons)}"):
                lesson = self.teacher.teach(matter.prompt, matter.answer, matter.wordings, matter.held_out)
            kept += lesson.kept
            self._last = lesson
            self.refused += not lesson.kept
            if not lesson.kept:
                self.say(f"{show.headline(lesson)}: {matter.prompt} {matter.answer}", style="red")
        self.say(f"{kept} of {len(lessons)} lessons are kept")
        if self._last is not None and lessons:
            self.say(show.gauge(self._last), style="dim")

    def _export(self, path: Path) -> None:
        self.teacher.export(path)
        self.teacher.note("saved", path=str(path))
        self.say(f"the adapter is in {path}")

    def _help(self) -> None:
        width = max(len(f"/{name} {what}") for name, (what, _) in COMMANDS.items())
        self.say("Type a question; correct the answer with `no: ANSWER`.")
        for name, (what, text) in COMMANDS.items():
            self.say(f"{f'/{name} {what}':<{width}}  {text}")


def _path(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # no such user
        raise DataError(f"{text}: {error}") from error


def read_lessons(path: Path) -> list[Any]:
    """The lessons of a JSONL file, all of them checked before any is taught.

    Raises:
        DataError: the file, or a line of it, is not as it should be; the line is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(values, dict):
            raise DataError(f'{path}:{number}: a lesson is {{"prompt": …, "answer": …}}')
        found.append(matter_of(values, f"{path}:{number}"))
    if not found:
        raise DataError(f"{path}: holds no lesson")
    return found
