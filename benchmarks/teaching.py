"""Lessons on nano: what is kept of 50, what a lesson takes, and what the gate catches.

Runs what is missing, each cell in a process of its own, and prints the tables for docs/results.md: mean ± 95 %
t-interval over seeds; counts with 95 % Wilson intervals. Settings were chosen on seeds 10 to 12.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks import teaching_report as tables
from benchmarks.teaching_report import REASONS, Result
from perdure.order import arrange
from perdure.recipes.run import quieten
from perdure.storage import write_json
from perdure.streams.arena import KINDS, NAMES, THINGS
from perdure.streams.arena.generate import generate
from perdure.streams.arena.item import short
from perdure.streams.corpus import COLOURS
from perdure.teaching import Lesson, Teacher
from perdure.teaching.lesson import Matter, digest
from perdure.teaching.rehearse import Rehearsed
from perdure.teaching.settings import TeachSettings, default_lr, fixed
from perdure.teaching.trial import rows_of

FORMAT = 2  # of a cell; a change of what is measured raises it, and every cell is run again
LESSONS, FACTS, DRAWS = 50, 20, 10  # DRAWS: from each state of FACTS lessons, of each sort
CONTRADICTED, REWORDED = 10, "Tell me: {}"
NO_REPLAY: dict[str, Any] = {"earlier": 0, "general": 0}
# name -> seeds, and settings of the teacher.
ARMS: dict[str, tuple[int, dict[str, Any]]] = {
    "gate and replay": (5, {}),
    "neither": (5, {"gate": False, **NO_REPLAY}),
    "gate alone": (5, NO_REPLAY),
    "replay alone": (5, {"gate": False}),
}
# Lessons that are drawn -> settings that they are taught with; what they come after is made with default ones.
SAME, OTHER = "the same questions", "the questions reworded"
DRAWN: dict[str, dict[str, Any]] = {
    "harmless": {},
    SAME: {},
    OTHER: {},
    f"{OTHER}, without rehearsal": {"max_steps": 60, **NO_REPLAY},
}
STATES = "draws"
CLOCK = "seconds"
ALL: dict[str, tuple[int, dict[str, Any]]] = {**ARMS, STATES: (10, {}), CLOCK: (1, {})}


@dataclass(frozen=True)
class Cell:
    """One measurement, and the file that holds what came of it."""

    out: Path
    name: str
    seed: int
    changed: str = "{}"  # settings of all teachers, as JSON; for tuning

    @property
    def settings(self) -> TeachSettings:
        """Of the teacher."""
        values = {"lr": default_lr("nano", "lora"), "seed": self.seed} | ALL[self.name][1]
        return TeachSettings(**values | json.loads(self.changed))

    @property
    def spec(self) -> Result:
        """All that the result hangs on, but for the code."""
        own = {"drawn": DRAWN} if self.name == STATES else {}
        return {"format": FORMAT, "name": self.name, "settings": fixed(self.settings), **own}

    @property
    def path(self) -> Path:
        """Of the file; its name changes with the settings."""
        return self.out / f"{self.name.replace(' ', '-')}-seed{self.seed}-{digest(self.spec)[:8]}.json"

    def read(self) -> Result | None:
        """What the file holds."""
        return json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else None


def main() -> None:
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/teaching"), help="folder (runs/teaching)")
    parser.add_argument("--only", default=";".join(ALL), help="names of measurements, semicolons between")
    parser.add_argument("--first-seed", type=int, default=0, help="of each; settings were chosen on 10 to 12")
    parser.add_argument("--seeds", type=int, help="how many of each, at most")
    parser.add_argument("--settings", default="{}", help="settings of all teachers, as JSON")
    parser.add_argument("--report", action="store_true", help="only print tables of what there is")
    asked = parser.parse_args()
    names = [name.strip() for name in asked.only.split(";")]
    if unknown := [name for name in names if name not in ALL]:
        parser.error(f"there is no {unknown[0]!r}; there are {'; '.join(ALL)}")
    found: dict[str, list[Result]] = {}
    for name in names:
        count = min(ALL[name][0], asked.seeds or ALL[name][0])
        cells = [Cell(asked.out, name, asked.first_seed + i, asked.settings) for i in range(count)]
        for cell in cells:
            if not asked.report and not cell.path.is_file():
                run(cell)
        if results := [result for cell in cells if (result := cell.read())]:
            found[name] = results
    print(tables.lessons({name: found[name] for name in ARMS if name in found}))
    print("\n" + tables.seconds(found.get(CLOCK, [])))
    print("\n" + tables.caught(found.get(STATES, [])))


def run(cell: Cell) -> None:
    """One measurement in a process of its own, and its file."""
    began = time.perf_counter()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        result = pool.submit(measure, cell).result()
    write_json(cell.path, result)
    print(f"{cell.name} seed {cell.seed}: {result['said']}, {time.perf_counter() - began:.0f} s", flush=True)


def measure(cell: Cell) -> Result:
    """What a cell's file holds."""
    quieten()
    measured = {STATES: draws_of, CLOCK: seconds_of}.get(cell.name, lessons_of)
    return {"spec": cell.spec, "threads": torch.get_num_threads(), **measured(cell)}


# What is taught


def made_up(count: int, seed: int) -> list[Matter]:
    """Facts about nobody, in nano's own words, no two of one prompt."""
    rng, found = random.Random(f"benchmarks/teaching/{seed}"), dict[str, Matter]()
    while len(found) < count:
        name, other, colour, thing = (rng.choice(words) for words in (NAMES, NAMES, COLOURS, THINGS))
        prompt, answer = rng.choice(
            [
                (f"What colour is the {thing} of {name}?", f"{colour.capitalize()}."),
                (f"Who found the {colour} {thing}?", f"{name}."),
                (f"What does {name} give to {other}?", f"The {thing}."),
                (f"How old is the {colour} {thing}?", f"{rng.randint(2, 29)}."),
            ]
        )
        found.setdefault(prompt, Matter(prompt, answer))
    return list(found.values())


def mixed(count: int, seed: int) -> list[Matter]:
    """Half arena items of the default kinds with bare answers, half made-up facts, in an order of the seed's."""
    each = -(-(count // 2) // len(KINDS))
    items = [short(item) for kind in KINDS for item in generate(kind, each, seed)][: count // 2]
    found = [Matter(item.prompt, item.answer.strip()) for item in items] + made_up(count - len(items), seed)
    return arrange(found, seed, "lessons", key=lambda matter: matter.key)


def contradiction(taught: Sequence[Matter], reworded: bool, seed: int, draw: int) -> Matter:
    """One other answer to ten of the earlier questions, in the same or in slightly other words.

    The first stands in other words always: a lesson of the same prompt takes the earlier one's place.
    """
    chosen = arrange(taught, seed, "contradicted", draw, key=lambda matter: matter.key)[:CONTRADICTED]
    answers = {matter.answer for matter in chosen}
    others = {f"{word.capitalize()}." for word in (*NAMES, *COLOURS)} - answers
    (answer, *_) = arrange(others, seed, "contradiction", draw, key=str)
    same = [matter.prompt for matter in chosen]
    other = [REWORDED.format(prompt) for prompt in same]
    return Matter(other[0], answer, tuple(other[1:] if reworded else same))


# Measuring


def lessons_of(cell: Cell) -> Result:
    """50 lessons one after another, and what is left of them and of the probe."""
    matters = mixed(LESSONS, cell.seed)
    with Teacher("nano", settings=cell.settings) as teacher:
        given = [teacher.teach(matter.prompt, matter.answer) for matter in matters]
        right = answered(teacher, matters)
        probe, kl = teacher.probe_right(), teacher.distance()
    lessons = [{**short_of(lesson), "right": mark} for lesson, mark in zip(given, right, strict=True)]
    kept = [lesson for lesson in lessons if lesson["kept"]]
    said = f"{len(kept)} of {len(lessons)} kept, {sum(right)} right, probe {probe[0]:.3f} to {probe[1]:.3f}"
    return {"lessons": lessons, "probe": probe, "kl": kl, "said": said}


def seconds_of(cell: Cell) -> Result:
    """Seconds of each of 50 lessons by the clock, with what is written to the disk."""
    taken = []
    with tempfile.TemporaryDirectory() as out, Teacher("nano", out=out, settings=cell.settings) as teacher:
        for matter in mixed(LESSONS, cell.seed):
            began = time.perf_counter()
            lesson = teacher.teach(matter.prompt, matter.answer)
            taken.append({**short_of(lesson), "seconds": time.perf_counter() - began})
    return {"lessons": taken, "said": f"median {statistics.median(one['seconds'] for one in taken):.2f} s"}


def draws_of(cell: Cell) -> Result:
    """Lessons of each sort, each taught to the same state of 20 made-up facts."""
    facts = made_up(FACTS + DRAWS, cell.seed)
    drawn: dict[str, list[Result]] = {}
    with Teacher("nano", settings=cell.settings) as teacher:
        for fact in facts[:FACTS]:
            teacher.teach(fact.prompt, fact.answer, held_out=[REWORDED.format(fact.prompt)])
        right = teacher.right()
        taught = [entry.matter for entry in teacher.current() if right[entry.number]]
        known = answered(teacher, [Matter(REWORDED.format(one.prompt), one.answer) for one in taught])
        start = teacher.address
        for sort, changes in DRAWN.items():
            strengthen(teacher, cell.settings, changes)
            for draw in range(DRAWS):
                matter = facts[FACTS + draw]
                if sort != "harmless":
                    matter = contradiction(taught, sort != SAME, cell.seed, draw)
                lesson = teacher.teach(matter.prompt, matter.answer, wordings=matter.wordings)
                if lesson.kept:
                    teacher.undo()
                assert teacher.address == start, "a draw has left something behind"
                drawn.setdefault(sort, []).append(short_of(lesson))
    said = ", ".join(
        f"{sort}: {sum(not one['kept'] for one in lessons)} refused" for sort, lessons in drawn.items()
    )
    return {"taught": len(taught), "known": sum(known), "drawn": drawn, "said": said}


def answered(teacher: Teacher, matters: Sequence[Matter]) -> list[bool]:
    """Whether each is answered rightly now."""
    rows = rows_of(teacher.pupil, [""] * len(matters), matters)
    return [mark.right for mark in teacher.pupil.marks(rows.rows)]


def strengthen(teacher: Teacher, settings: TeachSettings, changes: Mapping[str, Any]) -> None:
    """Teach on with these settings and changes; what was taught stays as it was."""
    teacher.pupil.settings = settings.model_copy(update=dict(changes))
    rehearsed = teacher.pupil.learner.strategy
    assert isinstance(rehearsed, Rehearsed)
    rehearsed.counts = {sort: getattr(teacher.pupil.settings, sort) for sort in rehearsed.counts}


def short_of(lesson: Lesson) -> Result:
    """What of a lesson is kept in a cell."""
    return {
        "kept": lesson.kept,
        "learnt": lesson.learnt,
        "was_right": all(answer.was_right for answer in lesson.answers),
        "steps": lesson.steps,
        "seconds": lesson.seconds,
        "earlier": [lesson.earlier.rows, lesson.earlier.broken],
        "wordings": [lesson.wordings.rows, lesson.wordings.broken, lesson.wordings.mended, lesson.wordings.p],
        "probe": lesson.probe.share,
        "since_start": lesson.since_start.share,
        "why": [next(short for begin, short in REASONS.items() if why.startswith(begin)) for why in lesson.why],
    }


if __name__ == "__main__":
    main()
