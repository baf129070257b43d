"""What stands for all that a model could do before its first lesson: rows that are measured, and rows for
rehearsal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from perdure.errors import DataError
from perdure.models.load import NANO
from perdure.order import prioritiser
from perdure.teaching.lesson import Matter, digest, spelt

FILE = "probe.jsonl"
TRAINING = 400  # rows to rehearse, at most


@dataclass(frozen=True, slots=True)
class Probe:
    """A general probe in two sides that share no row.

    Attributes:
        measured: looked at by the gate, never learnt from.
        training: rehearsed during lessons; their answers are not learnt, the base's own are held.
    """

    measured: tuple[Matter, ...] = ()
    training: tuple[Matter, ...] = ()

    def text(self) -> str:
        """Its rows as JSON lines, each with its side."""
        sides = (("measured", self.measured), ("training", self.training))
        rows = [{"prompt": row.prompt, "answer": row.answer, "side": name} for name, side in sides for row in side]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    @property
    def key(self) -> str:
        """A hash of all rows."""
        return digest([[row.prompt, row.answer] for side in (self.measured, self.training) for row in side])


def of_nano(rows: int, training: int = TRAINING) -> Probe:
    """nano's general probe, and for rehearsal other problems of the same sorts; so many rows of each at most."""
    from perdure.streams import corpus

    kept = [json.loads(line) for line in (NANO / FILE).read_text(encoding="utf-8").splitlines()]
    return Probe(_some(_matters(kept), rows), _matters(corpus.validation(training)))


def load_probe(path: Path) -> Probe:
    """The probe that `Probe.text` was written from."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    sides = (
        tuple(Matter(r["prompt"], r["answer"]) for r in rows if r["side"] == s) for s in ("measured", "training")
    )
    return Probe(*sides)


def of_rows(rows: Sequence[Mapping[str, str]], most: int) -> Probe:
    """Rows with "prompt" and "answer" cut in two halves by a keyed hash; so many are measured at most."""
    first, second = list[Matter](), list[Matter]()
    rank = prioritiser("probe side")
    for row in _matters(rows):
        (first if rank(spelt(row.prompt)) % 2 else second).append(row)
    return Probe(_some(first, most), _some(second, TRAINING))


def read(path: Path, most: int) -> Probe:
    """A probe from a JSONL file whose lines have "prompt" and "answer".

    Raises:
        DataError: a line is not so; it is named.
    """
    from perdure.streams.sources import read_rows

    rows = []
    for row in read_rows(path):
        values = {key: row.values.get(key) for key in ("prompt", "answer")}
        if not all(isinstance(value, str) and value.strip() for value in values.values()):
            raise DataError(f'{row.place}: a row of a probe is {{"prompt": …, "answer": …}}, both texts')
        rows.append({key: str(value) for key, value in values.items()})
    return of_rows(rows, most)


def _matters(rows: Sequence[Mapping[str, str]]) -> tuple[Matter, ...]:
    found = {spelt(row["prompt"]): Matter(row["prompt"].strip(), row["answer"].strip()) for row in rows}
    return tuple(found.values())


def _some(rows: Sequence[Matter], most: int) -> tuple[Matter, ...]:
    rank = prioritiser("probe rows")
    return tuple(sorted(rows, key=lambda row: rank(row.key))[:most])
