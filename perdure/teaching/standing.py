"""How the general probe stands: before the first lesson, and now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from perdure.teaching.lesson import PROBE, Matter, spelt
from perdure.teaching.marks import Mark
from perdure.teaching.probe import Probe
from perdure.teaching.pupil import Pupil
from perdure.teaching.trial import Rows, rows_of

NEW_PROMPTS = 32  # rows that the distance from the base is measured on


class Standing:
    """The probe's rows and their marks.

    A row whose question a lesson teaches stands for itself from then on, not for what the model could do before:
    it is neither measured nor rehearsed as long as the model has that lesson.

    Args:
        pupil: as it is before the first lesson.
        probe: both sides.
    """

    def __init__(self, pupil: Pupil, probe: Probe) -> None:
        self._pupil = pupil
        self._measured = rows_of(pupil, [PROBE] * len(probe.measured), probe.measured)
        self._training = [(row, pupil.row(row.prompt, row.answer, "general")) for row in probe.training]
        pupil.rehearse([row for _, row in self._training])
        self.distance = pupil.distance(self._measured.rows[:NEW_PROMPTS])
        self._start_weights = pupil.weights()
        self._start: dict[str, Mark] = {}
        self._now: tuple[str, dict[str, Mark], float] = ("", {}, 0.0)

    def rows(self, added: Sequence[Matter], lessons: Iterable[Matter]) -> Rows:
        """Those that are measured, with the ones that were added, beside these lessons."""
        taught = _prompts(lessons)
        more = rows_of(self._pupil, [PROBE] * len(added), added)
        every = zip(
            (*self._measured.of, *more.of),
            (*self._measured.matters, *more.matters),
            (*self._measured.rows, *more.rows),
            strict=True,
        )
        kept = [(of, matter, row) for of, matter, row in every if spelt(matter.prompt) not in taught]
        return Rows(tuple(of for of, _, _ in kept), tuple(m for _, m, _ in kept), tuple(row for *_, row in kept))

    def leave_out(self, lessons: Iterable[Matter]) -> None:
        """Rehearse the rows whose questions none of these lessons teaches."""
        taught = _prompts(lessons)
        self._pupil.rehearse_of([row for matter, row in self._training if spelt(matter.prompt) not in taught])

    def start(self, rows: Rows) -> list[Mark]:
        """How the rows stood before the first lesson."""
        missing = [row for row in rows.rows if row.key not in self._start]
        if missing:
            now = self._pupil.weights()
            try:
                self._pupil.put(self._start_weights)
                self._start |= zip((row.key for row in missing), self._pupil.marks(missing), strict=True)
            finally:
                self._pupil.put(now)
        return [self._start[row.key] for row in rows.rows]

    def now(self, address: str, rows: Rows) -> tuple[list[Mark], float]:
        """How the rows stand in the state of this name, which the model has; and how far it is from the base."""
        known, marks, kl = self._now
        if known != address or not {row.key for row in rows.rows} <= marks.keys():
            found, kl = self._pupil.marks_and_distance(rows.rows, self.distance)
            self.note(address, rows, found, kl)
            return found, kl
        return [marks[row.key] for row in rows.rows], kl

    def note(self, address: str, rows: Rows, found: Sequence[Mark], kl: float) -> None:
        """What was found in a state."""
        self._now = (address, dict(zip((row.key for row in rows.rows), found, strict=True)), kl)


def _prompts(lessons: Iterable[Matter]) -> set[str]:
    return {spelt(prompt) for matter in lessons for prompt in matter.taught}
