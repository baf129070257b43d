"""A teacher: lessons one at a time, each with what it cost, behind a gate, and taken back exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from perdure.errors import ConfigError, DataError, RunError
from perdure.models.load import LanguageModel
from perdure.storage import folder as replaced
from perdure.teaching.assemble import Parts, assemble
from perdure.teaching.book import chain_of, next_number, worth_keeping
from perdure.teaching.lesson import FORMS, PROBE, WHOLE, Entry, Lesson, Matter, check_text, digest, spelt
from perdure.teaching.marks import Mark
from perdure.teaching.settings import TeachSettings
from perdure.teaching.trial import Rows, Situation, attempt, of_entries, of_held_out, rows_of
from perdure.training.interrupt import stop_on_signals

ADAPTER = "adapter_config.json"
NEW_PROMPTS = 32  # rows that the distance from the base is measured on


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
        self._watch = watch or (lambda done, total: None)
        pupil.rehearse([pupil.row(row.prompt, row.answer, "general") for row in probe.training])
        self._probe = rows_of(pupil, [PROBE] * len(probe.measured), probe.measured)
        self._distance = pupil.distance(self._probe.rows[:NEW_PROMPTS])
        self._chain: list[Entry] = []
        self._addresses = [base]  # of the states between entries: one more than there are
        self._held: dict[str, Mapping[str, Tensor]] = {base: pupil.weights()}
        self._marks: dict[str, tuple[str, list[Mark]]] = {}  # of the probe: at the start, and now, with their state
        self._number = 1
        self._refused: Matter | None = None
        if book is not None:
            self._number = next_number(book.events)
            for entry in chain_of(book.events):
                self._append(entry)
            self._return(len(self._chain))

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
        return self._addresses[-1]

    @property
    def lessons(self) -> list[Entry]:
        """The lessons that the model has, in the order in which they were taught."""
        return [entry for entry in self._chain if entry.form != PROBE]

    def current(self) -> list[Entry]:
        """Those of them that no later one takes the place of: one whose prompt is a taught wording of theirs."""
        found: list[Entry] = []
        for entry in self.lessons:
            found = [other for other in found if not _replaces(entry.matter, other.matter)] + [entry]
        return found

    def right(self) -> dict[int, bool]:
        """Of each current lesson, by number, whether all its taught wordings are answered rightly now."""
        entries = self.current()
        rows = of_entries(self.pupil, entries)
        wrong = {of for of, mark in zip(rows.of, self.pupil.marks(rows.rows), strict=True) if not mark.right}
        return {entry.number: f"lesson {entry.number}" not in wrong for entry in entries}

    def probe_right(self) -> tuple[float, float]:
        """Share of the probe's rows that are right before the first lesson and now; NaN without a probe."""
        rows = self._probe_rows()
        before, now = self._start_marks(rows), self._now_marks(rows)
        if not rows.rows:
            return float("nan"), float("nan")
        return sum(m.right for m in before) / len(before), sum(m.right for m in now) / len(now)

    @property
    def probe_count(self) -> int:
        """Rows of the probe that the gate looks at."""
        return len(self._probe_rows().rows)

    def distance(self) -> float:
        """KL(base ‖ model) of the next token on new prompts, in nats; NaN without a probe."""
        return self._distance(self.pupil.learner)

    def ask(self, prompt: str) -> str:
        """The model's greedy answer.

        Raises:
            DataError: the prompt is longer than the model takes, or empty.
        """
        if not prompt.strip():
            raise DataError("the prompt is empty; ask something")
        check_text(prompt)
        (answer,) = self.pupil.answers([self.pupil.row(prompt.strip(), "?")])
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
        forms = tuple(forms or tried)
        with self._wholly():
            number, self._number = self._number, self._number + 1
            for form in tried:
                lesson = self._try(number, matter, form, forms)
                if lesson.kept:
                    break
            self._commit("lesson", **lesson.plain(), offered=list(forms))
        self._refused = None if lesson.kept else matter
        return lesson

    def _try(self, number: int, matter: Matter, form: str, forms: Sequence[str]) -> Lesson:
        """Teach in one form; the model keeps it if it may, and is as it was if not."""
        probe = self._probe_rows()
        earlier = [entry for entry in self.current() if not _replaces(matter, entry.matter)]
        met = Situation(
            earlier=of_entries(self.pupil, earlier),
            held=of_held_out(self.pupil, earlier, matter),
            probe=probe,
            probe_marks=self._now_marks(probe),
            start_marks=self._start_marks(probe),
            distance=self._distance,
            replaces=next((e.number for e in self.current() if _replaces(matter, e.matter)), None),
        )
        lesson, marks = attempt(self.pupil, number, matter, form, met)
        if lesson.kept:
            self._append(Entry(number, matter, form, tuple(forms)))
            self._held[self.address] = self.pupil.weights()
            self._marks["now"] = (self.address, marks)
        else:
            self.pupil.put(self._weights(self.address))
        return lesson

    def undo(self) -> Entry:
        """Take the newest lesson back: the model is as it was before it.

        Raises:
            DataError: there is none.
        """
        if not self.lessons:
            raise DataError("there is no lesson to take back")
        return self._remove(self.lessons[-1], "undo")[0]

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
        return self._remove(entry, "forget")

    def add_probe(self, prompt: str, answer: str) -> None:
        """Add a row to the probe: an answer that the gate looks at from now on."""
        matter = Matter(prompt.strip(), answer.strip())
        matter.check()
        self.pupil.row(matter.prompt, matter.answer)
        with self._wholly():
            self._redo(Entry(0, matter, PROBE), [PROBE])
            self._commit("probe", prompt=matter.prompt, answer=matter.answer)

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

    # The chain of entries, and the states between them

    def _append(self, entry: Entry) -> None:
        self._addresses.append(entry.address(self.address))
        self._chain.append(entry)

    def _weights(self, address: str) -> Mapping[str, Tensor]:
        found = self._find(address)
        assert found is not None
        return found

    def _find(self, address: str) -> Mapping[str, Tensor] | None:
        """The weights of a state, if they are held here or in the book."""
        if address not in self._held and self.book is not None and (found := self.book.load(address)):
            self._held[address] = found
        return self._held.get(address)

    def _return(self, count: int) -> None:
        """Become the model after so many entries: from the last state before that is there, teaching on from it."""
        there = next(i for i in range(count, -1, -1) if self._find(self._addresses[i]) is not None)
        rest = self._chain[there:count]
        del self._chain[there:], self._addresses[there + 1 :]
        self.pupil.put(self._weights(self.address))
        for done, entry in enumerate(rest):
            self._watch(done, len(rest))
            if not self._redo(entry, [entry.form]):
                raise RunError(
                    f"lesson {entry.number} comes out otherwise than when it was taught, so the state after it "
                    "cannot be made again: go back to the machine and the versions that config.yaml names"
                )
        self._watch(len(rest), len(rest))

    def _redo(self, entry: Entry, forms: Sequence[str]) -> bool:
        """An entry once more, after what is the chain now; False where it may not be kept."""
        address = entry.address(self.address)
        if entry.form == PROBE:
            self._held[address] = self._weights(self.address)
        if forms[0] == entry.form and self._find(address) is not None:
            self._append(entry)
            self.pupil.put(self._weights(address))
            return True
        return any(self._try(entry.number, entry.matter, form, entry.forms).kept for form in forms)

    def _remove(self, gone: Entry, event: str) -> tuple[Entry, list[int]]:
        """The chain without an entry; what came after it is done again. Also the numbers of what could not be."""
        at = self._chain.index(gone)
        rest = self._chain[at + 1 :]
        dropped = []
        with self._wholly():
            self._return(at)
            for done, entry in enumerate(rest):
                self._watch(done, len(rest))
                if not self._redo(entry, [PROBE] if entry.form == PROBE else entry.forms):
                    dropped.append(entry.number)
            self._watch(len(rest), len(rest))
            forms = {entry.number: entry.form for entry in self._chain[at:] if entry.form != PROBE}
            self._commit(event, number=gone.number, dropped=dropped, forms=forms)
        self._refused = None
        return gone, dropped

    @contextmanager
    def _wholly(self) -> Iterator[None]:
        """All of what is done, or, where it is broken off before the journal has it, nothing of it."""
        before = list(self._chain), list(self._addresses), self._number
        told = 0 if self.book is None else len(self.book.events)
        try:
            yield
        except BaseException:
            if self.book is None or len(self.book.events) == told:
                self._chain, self._addresses, self._number = before
                self._return(len(self._chain))
            raise

    def _commit(self, event: str, **values: object) -> None:
        """Write the state, and then the line of the journal that makes it the model's."""
        kept = worth_keeping(self._addresses)
        if self.book is not None:
            for address in kept & set(self._held) - {self._addresses[0]}:
                self.book.save(address, self._held[address])
            with stop_on_signals(lambda text: None) as stop:
                self.book.write(event, **values, address=self.address)
            self.book.sweep(kept)
            if stop:
                raise KeyboardInterrupt
        for address in set(self._held) - kept:
            del self._held[address]

    # The probe

    def _probe_rows(self) -> Rows:
        """The probe's rows, with those that the chain adds."""
        added = [entry.matter for entry in self._chain if entry.form == PROBE]
        more = rows_of(self.pupil, [PROBE] * len(added), added)
        return Rows(self._probe.of + more.of, self._probe.matters + more.matters, self._probe.rows + more.rows)

    def _now_marks(self, probe: Rows) -> Sequence[Mark]:
        """How the probe's rows stand now."""
        if self._marks.get("now", ("",))[0] != self.address:
            self._marks["now"] = (self.address, self.pupil.marks(probe.rows))
        return self._marks["now"][1]

    def _start_marks(self, probe: Rows) -> Sequence[Mark]:
        """How they stood before the first lesson."""
        key = digest([row.key for row in probe.rows])
        if self._marks.get("start", ("",))[0] != key:
            now = self.pupil.weights()
            try:
                self.pupil.put(self._held[self._addresses[0]])
                self._marks["start"] = (key, self.pupil.marks(probe.rows))
            finally:
                self.pupil.put(now)
        return self._marks["start"][1]


def _replaces(new: Matter, old: Matter) -> bool:
    """Whether the prompt of one lesson is a taught wording of another."""
    return spelt(new.prompt) in {spelt(prompt) for prompt in old.taught}


def _check_forms(forms: Sequence[str]) -> None:
    for form in forms:
        if form not in FORMS:
            raise ConfigError(f"{form!r} is no form of a lesson; there are {', '.join(FORMS)}")
