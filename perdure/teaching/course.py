"""A model on its way along the chain of its lessons: one more, back to an earlier state, and on from there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from perdure.errors import RunError
from perdure.teaching.book import Book, chain_of, next_number
from perdure.teaching.chain import Chain, replaces
from perdure.teaching.lesson import PROBE, Entry, Lesson, Matter
from perdure.teaching.probe import Probe
from perdure.teaching.pupil import Pupil
from perdure.teaching.standing import Standing
from perdure.teaching.trial import Rows, Situation, attempt, of_entries, of_held_out


class Course:
    """The model is at all times what the chain says, or becomes that again where something is broken off.

    Args:
        pupil: as it is before the first lesson; it becomes what the book's chain makes of it.
        probe: the general probe.
        book: keeps states and the journal on the disk; None: nothing is written.
        base: the name of the state before the first lesson.
        watch: is told how many lessons of how many were taught again, while that goes on.
    """

    def __init__(
        self, pupil: Pupil, probe: Probe, book: Book | None, base: str, watch: Callable[[int, int], None]
    ) -> None:
        self.pupil, self.standing = pupil, Standing(pupil, probe)
        self.chain = Chain(base, pupil.weights(), book)
        self._book, self._watch = book, watch
        self._number = 1  # of the next lesson
        if book is not None:
            self._number = next_number(book.events)
            for entry in chain_of(book.events):
                self.chain.append(entry)
            self._return(len(self.chain.entries))

    def probe_rows(self, *new: Matter) -> Rows:
        """The probe's rows that are measured beside the current lessons, and a new one."""
        added = [entry.matter for entry in self.chain.entries if entry.form == PROBE]
        return self.standing.rows(added, [*(entry.matter for entry in self.chain.current()), *new])

    def teach(self, matter: Matter, tried: Sequence[str], forms: tuple[str, ...]) -> Lesson:
        """Teach a lesson in the first of the forms in which it may be kept.

        Args:
            matter: the lesson.
            tried: the forms, at least one.
            forms: those that it was offered in so far, these included.

        Returns:
            The last attempt.
        """
        with self._wholly():
            number, self._number = self._number, self._number + 1
            for form in tried:
                lesson = self._try(number, matter, form, forms)
                if lesson.kept:
                    break
            self.chain.commit("lesson", **lesson.plain(), offered=list(forms))
        return lesson

    def add_probe(self, matter: Matter) -> None:
        """Add a row to the probe."""
        with self._wholly():
            self._redo(Entry(0, matter, PROBE), [PROBE])
            self.chain.commit("probe", prompt=matter.prompt, answer=matter.answer)

    def remove(self, gone: Entry, event: str) -> tuple[Entry, list[int]]:
        """The chain without an entry; what came after it is done again. Also the numbers of what could not be."""
        at = self.chain.entries.index(gone)
        rest = self.chain.entries[at + 1 :]
        dropped = []
        with self._wholly():
            self._return(at)
            for done, entry in enumerate(rest):
                self._watch(done, len(rest))
                if not self._redo(entry, [PROBE] if entry.form == PROBE else entry.forms):
                    dropped.append(entry.number)
            self._watch(len(rest), len(rest))
            forms = {entry.number: entry.form for entry in self.chain.entries[at:] if entry.form != PROBE}
            self.chain.commit(event, number=gone.number, dropped=dropped, forms=forms)
        return gone, dropped

    def _try(self, number: int, matter: Matter, form: str, forms: tuple[str, ...]) -> Lesson:
        """Teach in one form; the model keeps it if it may, and is as it was if not."""
        chain, standing, current = self.chain, self.standing, self.chain.current()
        earlier = [entry for entry in current if not replaces(matter, entry.matter)]
        probe = self.probe_rows(matter)
        standing.leave_out([*(entry.matter for entry in current), matter])
        met = Situation(
            earlier=of_entries(self.pupil, earlier),
            held=of_held_out(self.pupil, earlier, matter),
            probe=probe,
            start_marks=standing.start(probe),
            probe_marks=standing.now(chain.address, probe)[0],
            distance=standing.distance,
            replaces=next((entry.number for entry in current if replaces(matter, entry.matter)), None),
        )
        lesson, marks = attempt(self.pupil, number, matter, form, met)
        if lesson.kept:
            chain.append(Entry(number, matter, form, forms))
            chain.held[chain.address] = self.pupil.weights()
            standing.note(chain.address, probe, marks, lesson.kl)
        else:
            self.pupil.put(chain.weights(chain.address))
        return lesson

    def _return(self, count: int) -> None:
        """Become the model after so many entries: from the last state before that is there, teaching on from it."""
        self.chain.cut(count)
        rest = self.chain.cut(self.chain.last_known(count))
        self.pupil.put(self.chain.weights(self.chain.address))
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
        chain = self.chain
        address = entry.address(chain.address)
        if entry.form == PROBE:
            chain.held[address] = chain.weights(chain.address)
        if forms[0] == entry.form and (found := chain.find(address)) is not None:
            chain.append(entry)
            self.pupil.put(found)
            return True
        return any(self._try(entry.number, entry.matter, form, entry.forms).kept for form in forms)

    @contextmanager
    def _wholly(self) -> Iterator[None]:
        """All of what is done, or, where it is broken off before the journal has it, nothing of it."""
        chain, book = self.chain, self._book
        before = list(chain.entries), list(chain.addresses), self._number
        told = 0 if book is None else len(book.events)
        try:
            yield
        except BaseException:
            if book is None or len(book.events) == told:
                chain.entries, chain.addresses, self._number = before
                self._return(len(chain.entries))
            raise
