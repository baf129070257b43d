"""A teacher: lessons one at a time, each with what it cost, behind a gate, and taken back exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from perdure.errors import ConfigError, DataError
from perdure.models.load import LanguageModel
from perdure.storage import folder as replaced
from perdure.teaching.assemble import Parts, assemble
from perdure.teaching.chain import replaces
from perdure.teaching.course import Course
from perdure.teaching.lesson import FORMS, WHOLE, Entry, Lesson, Matter, check_text
from perdure.teaching.pupil import Reply
from perdure.teaching.settings import TeachSettings
from perdure.teaching.trial import of_entries

ADAPTER = "adapter_config.json"


class Teacher:
    """Teaches a language model lesson by lesson; sees at once what each of them cost.

    A state hangs on the base, the settings and the chain of lessons alone: the same lessons give the same bytes
    on the same machine, and a lesson that is forgotten leaves the bytes of one that was never taught.

    Args:
        model: "nano", a model's folder, a hub name, or a model that is loaded; in a folder that holds lessons
            already it may be left out.
        out: a folder that keeps all of it, and in which lessons go on where they stopped; None: nothing is written.
        settings: see `TeachSettings`; a mapping, or what is left out has its default.
        probe: rows with "prompt" and "answer", or a JSONL file of them: half of them are measured, half rehearsed;
            None: nano's general probe.
        watch: is told how many lessons of how many were taught again, while that goes on.

    Raises:
        UsageError: a mistake in what was asked, or another process teaches in the folder.

    Example:
        >>> teacher = Teacher("nano")  # doctest: +SKIP
        >>> lesson = teacher.teach("Who found the red ball?", "Anna.")  # doctest: +SKIP
        >>> lesson.kept, lesson.right, lesson.earlier_lessons, lesson.kl  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | LanguageModel | None = None,
        *,
        out: Path | str | None = None,
        settings: TeachSettings | Mapping[str, Any] | None = None,
        probe: Sequence[Mapping[str, str]] | Path | str | None = None,
        watch: Callable[[int, int], None] | None = None,
    ) -> None:
        self._stack = ExitStack()
        try:
            self._open(assemble(model, out, settings, probe, self._stack), watch)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, parts: Parts, watch: Callable[[int, int], None] | None) -> None:
        pupil, probe, book, base = parts.pupil, parts.probe, parts.book, parts.base
        self.pupil, self.settings, self.book, self.notes = pupil, pupil.settings, book, parts.notes
        self._course = Course(pupil, probe, book, base, watch or (lambda done, total: None))
        self._chain, self._standing = self._course.chain, self._course.standing
        self._refused: Matter | None = None

    def close(self) -> None:
        """Let go of the folder."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # What there is

    @property
    def address(self) -> str:
        """The name of the model's state: equal chains have equal names, and equal bytes."""
        return self._chain.address

    @property
    def lessons(self) -> list[Entry]:
        """The lessons that the model has, in the order in which they were taught."""
        return self._chain.lessons

    def current(self) -> list[Entry]:
        """Those of them that no later one takes the place of: one whose prompt is a taught wording of theirs."""
        return self._chain.current()

    def right(self) -> dict[int, bool]:
        """Of each current lesson, by number, whether all its taught wordings are answered rightly now."""
        entries = self.current()
        rows = of_entries(self.pupil, entries)
        wrong = {of for of, mark in zip(rows.of, self.pupil.marks(rows.rows), strict=True) if not mark.right}
        return {entry.number: f"lesson {entry.number}" not in wrong for entry in entries}

    def probe_right(self) -> tuple[float, float]:
        """Share of the probe's rows that are right before the first lesson and now; NaN without a probe."""
        rows = self._course.probe_rows()
        before, (now, _) = self._standing.start(rows), self._standing.now(self.address, rows)
        if not rows.rows:
            return float("nan"), float("nan")
        return sum(m.right for m in before) / len(before), sum(m.right for m in now) / len(now)

    @property
    def probe_count(self) -> int:
        """Rows of the probe that the gate looks at."""
        return len(self._course.probe_rows().rows)

    def distance(self) -> float:
        """KL(base ‖ model) of the next token on new prompts, in nats; NaN without a probe."""
        return self._standing.now(self.address, self._course.probe_rows())[1]

    def ask(self, prompt: str) -> str:
        """The model's greedy answer, as `reply` without whether it was cut."""
        return self.reply(prompt).text

    def reply(self, prompt: str) -> Reply:
        """The model's greedy answer, and whether it was cut at `max_new_tokens`.

        Raises:
            DataError: the prompt is longer than the model takes, or empty.
        """
        if not prompt.strip():
            raise DataError("the prompt is empty; ask something")
        check_text(prompt)
        (answer,) = self.pupil.replies([self.pupil.row(prompt.strip(), "?")])
        return answer

    # Lessons

    def teach(
        self,
        prompt: str,
        answer: str,
        wordings: Sequence[str] = (),
        held_out: Sequence[str] = (),
        otherwise: Sequence[str] = (),
    ) -> Lesson:
        """Teach the right answer to a prompt, in a bounded number of steps.

        A lesson that is not learnt, or that does harm by the gate, is not kept: the model is as it was before. It
        is then taught in each of the forms of `otherwise` until one is kept.

        Args:
            prompt: the question.
            answer: the right answer.
            wordings: other wordings of the question that are taught too.
            held_out: wordings that are not, and show whether the lesson generalised.
            otherwise: "more replay", "0.5", "0.25": the forms to try where the whole lesson is refused.

        Raises:
            ConfigError: an unknown form.
            DataError: an empty text, one that stands twice, or one that is longer than the model takes.
        """
        _check_forms(otherwise)
        matter = Matter(
            prompt.strip(), answer.strip(), tuple(w.strip() for w in wordings), tuple(w.strip() for w in held_out)
        )
        matter.check()
        return self._teach(matter, [WHOLE, *otherwise])

    def again(self, form: str) -> Lesson:
        """Teach the lesson that was refused last, in another form.

        Raises:
            ConfigError: an unknown form, or no lesson was refused last.
        """
        _check_forms([form])
        if self._refused is None:
            raise ConfigError("no lesson waits to be taught in another form")
        return self._teach(self._refused, [form], [WHOLE, form])

    @property
    def waits(self) -> bool:
        """Whether a lesson that was refused may be taught in another form."""
        return self._refused is not None

    def drop(self) -> None:
        """Leave the lesson that was refused last."""
        self._refused = None

    def _teach(self, matter: Matter, tried: Sequence[str], forms: Sequence[str] = ()) -> Lesson:
        lesson = self._course.teach(matter, tried, tuple(forms or tried))
        self._refused = None if lesson.kept else matter
        return lesson

    def undo(self) -> Entry:
        """Take the newest lesson back: the model is as it was before it.

        Raises:
            DataError: there is none.
        """
        if not self.lessons:
            raise DataError("there is no lesson to take back")
        self._refused = None
        return self._course.remove(self.lessons[-1], "undo")[0]

    def forget(self, number: int) -> tuple[Entry, list[int]]:
        """Make the model what it would be if this lesson had never been taught: later ones are taught again.

        A later lesson is taught in the forms that it was offered in, in their order, as it would have been. Where
        none may be kept now, it is dropped; the journal says so. One that was refused stays out.

        Returns:
            What was forgotten, and the numbers of the lessons that were dropped.

        Raises:
            DataError: the model has no lesson of that number.
        """
        entry = next((entry for entry in self.lessons if entry.number == number), None)
        if entry is None:
            there = ", ".join(str(entry.number) for entry in self.lessons) or "none"
            raise DataError(f"the model has no lesson {number}; it has {there}")
        self._refused = None
        return self._course.remove(entry, "forget")

    def add_probe(self, prompt: str, answer: str) -> None:
        """Add a row to the probe: an answer that the gate looks at from now on."""
        matter = Matter(prompt.strip(), answer.strip())
        matter.check()
        self.pupil.row(matter.prompt, matter.answer)
        if teaches := [entry for entry in self.current() if replaces(matter, entry.matter)]:
            raise DataError(
                f"lesson {teaches[0].number} teaches the answer to {matter.prompt!r}: the gate looks at it already"
            )
        self._course.add_probe(matter)

    def note(self, event: str, **values: object) -> None:
        """A line in the journal that changes nothing: what was asked, what was called good or bad."""
        if self.book is not None:
            self.book.write(event, **values)

    def export(self, path: Path) -> None:
        """Write the adapter and the tokenizer as PEFT and inference servers load them; one there is replaced.

        Raises:
            ConfigError: the folder holds something else.
        """
        path = path.absolute()
        own = None if self.book is None else self.book.path.absolute()
        if path == own or (own is not None and path in own.parents):
            raise ConfigError(f"{path} is, or holds, the folder of these lessons; give another one")
        if path.is_file() or (path.is_dir() and any(path.iterdir()) and not (path / ADAPTER).is_file()):
            raise ConfigError(f"{path} holds something else than an adapter; give a new folder, or an empty one")
        with replaced(path) as aside:
            self.pupil.export(aside)


def _check_forms(forms: Sequence[str]) -> None:
    for form in forms:
        if form not in FORMS:
            raise ConfigError(f"{form!r} is no form of a lesson; there are {', '.join(FORMS)}")
