"""The book of lessons on the disk: an append-only journal, and the states that the lessons lead to.

A state's name is a hash of all that led to it, so that a state that was reached on two ways is found under one
name.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from perdure.errors import NewerFormatError, RunError
from perdure.storage import guarded
from perdure.teaching.lesson import PROBE, Entry, Matter
from perdure.tracking import MetricsLog
from perdure.training import checkpoint
from perdure.training.folder import remove

JOURNAL, STATES = "journal.jsonl", "states"
NEWEST, EACH = 12, 10  # states that are kept: the newest of the chain, and each tenth


class Book:
    """Lessons in a folder.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.journal, self.states = path / JOURNAL, path / STATES
        whole = _whole(self.journal)
        self.events = [json.loads(line) for line in whole.splitlines()]
        self._log = MetricsLog(self.journal, len(whole))

    def write(self, event: str, **values: Any) -> None:
        """Append to the journal; it is on the disk when this returns."""
        self._log.write(event, **values)
        self._log.sync()
        self.events.append({"event": event, **values})

    def close(self) -> None:
        """Close the journal."""
        self._log.close()

    def has(self, address: str) -> bool:
        """Whether this state is there."""
        return (self.states / address).is_dir()

    def save(self, address: str, weights: Mapping[str, Tensor]) -> None:
        """Write a state, unless it is there."""
        if not self.has(address):
            checkpoint.save(self.states / address, {"weights": dict(weights)})

    def load(self, address: str) -> dict[str, Tensor] | None:
        """The weights of a state; None where it is not there or cannot be read, so that it must be made again."""
        if not self.has(address):
            return None
        try:
            return dict(checkpoint.load(self.states / address)["weights"])
        except NewerFormatError:
            raise
        except RunError:
            remove(self.states / address)
            return None

    def sweep(self, kept: Collection[str]) -> None:
        """Remove all other states; what is removed can be made again."""
        for path in self.states.iterdir() if self.states.is_dir() else ():
            if path.name not in kept:
                remove(path)


def worth_keeping(chain: Sequence[str]) -> set[str]:
    """Of the addresses of a chain: the newest, and each tenth from the first on."""
    return {*chain[-NEWEST:], *chain[::EACH]}


def _whole(path: Path) -> bytes:
    """The whole lines of a file; a last one that was torn is left out."""
    if not path.is_file():
        return b""
    with guarded(path):
        content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError as error:
            raise RunError(f"{path}:{number}: not JSON; the journal was changed by other hands: {error}") from error
    return whole


def chain_of(events: Sequence[Mapping[str, Any]]) -> list[Entry]:
    """The entries that the model has been made by, from all that the journal holds."""
    chain: list[Entry] = []
    for event in events:
        if event["event"] == "lesson" and event["kept"]:
            chain.append(Entry(event["number"], matter(event["matter"]), event["form"], tuple(event["offered"])))
        elif event["event"] == "probe":
            chain.append(Entry(0, Matter(event["prompt"], event["answer"]), PROBE))
        elif event["event"] in ("undo", "forget"):
            forms = {int(number): form for number, form in event.get("forms", {}).items()}
            gone = {event["number"], *event.get("dropped", ())}
            chain = [
                replace(entry, form=forms.get(entry.number, entry.form))
                for entry in chain
                if not entry.number or entry.number not in gone
            ]
    return chain


def matter(values: Mapping[str, Any]) -> Matter:
    """What was taught, from plain values."""
    return Matter(values["prompt"], values["answer"], tuple(values["wordings"]), tuple(values["held_out"]))


def next_number(events: Sequence[Mapping[str, Any]]) -> int:
    """The number of the next lesson; one that was refused or forgotten keeps its own."""
    return 1 + max((event["number"] for event in events if event["event"] == "lesson"), default=0)
