"""The chain of entries that makes a model, the names of the states between them, and the states themselves.

Knows no model: a state is weights under a name that is a hash of all that led to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from perdure.teaching.book import Book, worth_keeping
from perdure.teaching.lesson import PROBE, Entry, Matter, spelt
from perdure.training.interrupt import stop_on_signals


class Chain:
    """Entries in the order in which they were taught.

    Args:
        base: the name of the state before the first one.
        start: its weights.
        book: keeps states and the journal on the disk; None: nothing is written.

    Attributes:
        entries: lessons, and rows of the probe that were added.
        addresses: names of the states between them: one more than there are entries.
        held: weights by name, of the states that are worth keeping.
    """

    def __init__(self, base: str, start: Mapping[str, Tensor], book: Book | None) -> None:
        self.entries: list[Entry] = []
        self.addresses = [base]
        self.held: dict[str, Mapping[str, Tensor]] = {base: start}
        self.book = book

    @property
    def address(self) -> str:
        """The name of the state after the last entry."""
        return self.addresses[-1]

    @property
    def lessons(self) -> list[Entry]:
        """The lessons among the entries."""
        return [entry for entry in self.entries if entry.form != PROBE]

    def current(self) -> list[Entry]:
        """Those of them that no later one takes the place of."""
        found: list[Entry] = []
        for entry in self.lessons:
            found = [other for other in found if not replaces(entry.matter, other.matter)] + [entry]
        return found

    def append(self, entry: Entry) -> None:
        """One more; the state after it has a name now."""
        self.addresses.append(entry.address(self.address))
        self.entries.append(entry)

    def cut(self, count: int) -> list[Entry]:
        """Leave so many entries; the others are returned."""
        rest = self.entries[count:]
        del self.entries[count:], self.addresses[count + 1 :]
        return rest

    def weights(self, address: str) -> Mapping[str, Tensor]:
        """The weights of a state that is there."""
        found = self.find(address)
        assert found is not None
        return found

    def find(self, address: str) -> Mapping[str, Tensor] | None:
        """The weights of a state, if they are held here or in the book."""
        if address not in self.held and self.book is not None and (found := self.book.load(address)):
            self.held[address] = found
        return self.held.get(address)

    def last_known(self, count: int) -> int:
        """After how many entries, at most so many, there is the last state that is still known."""
        return next(i for i in range(count, -1, -1) if self.find(self.addresses[i]) is not None)

    def commit(self, event: str, **values: object) -> None:
        """Write the state, and then the line of the journal that makes it the model's."""
        kept = worth_keeping(self.addresses)
        if self.book is not None:
            for address in kept & set(self.held) - {self.addresses[0]}:
                self.book.save(address, self.held[address])
            with stop_on_signals(lambda text: None) as stop:
                self.book.write(event, **values, address=self.address)
            self.book.sweep(kept)
            if stop:
                raise KeyboardInterrupt
        for address in set(self.held) - kept:
            del self.held[address]


def replaces(new: Matter, old: Matter) -> bool:
    """Whether one lesson takes the place of another: its prompt is a taught wording of that one."""
    return spelt(new.prompt) in {spelt(prompt) for prompt in old.taught}
