"""What a kind of problem is made of, and the words that the kinds share."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Facts = dict[str, Any]


def words(text: str, separator: str = ",") -> tuple[str, ...]:
    """The entries of a list written as one string."""
    return tuple(text.split(separator))


NAMES = words(
    "Anna,Ben,Cleo,Dan,Emma,Finn,Gina,Hugo,Iris,Jack,Kate,Leo,Mia,Nick,Olga,Paul,Rosa,Sam,Tina,Will,Vera,Omar,Lucy,Max"
)
THINGS = words("cat,dog,fish,hen,cow,horse,ball,book,drum,kite,lamp,ring,cup,hat,key,boat")
TOWNS = words("Borvik,Cardan,Dolmar,Elmore,Farrow,Gelden,Hollin,Kelby,Lorrin,Morvan,Norby,Ostrel")


def _nothing(facts: Facts) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of problem.

    Attributes:
        name: as it is shown to people.
        draw: (random numbers, level) -> the facts of a problem; `facts["answer"]` is the bare answer: a string, a
            whole number, or a list of whole numbers in order.
        told: what the facts put into the places of `prompts`.
        prompts: the surface forms of the question; the answer has one form in all of them.
        answer: the answer's text in its frame, with the space in front.
        candidates: the answers that a problem of this kind could have, where they are phrases.
        others: phrases that make a statement one about something else than was asked for.
        plain: prompt and answer in the wording of nano's pretraining text; None where nano met no such problem.
        canonical: the facts as one text, the same for every order and wording of one problem; taken where `plain`
            is None.
        kin: what problems share of which one gives the other away; None where there are no such.
        several: an answer may state other candidates beside the right one.
    """

    name: str
    draw: Callable[[random.Random, int], Facts]
    told: Callable[[Facts], Mapping[str, object]]
    prompts: tuple[str, ...]
    answer: Callable[[Facts], str]
    candidates: Callable[[Facts], tuple[str, ...]] = _nothing
    others: Callable[[Facts], tuple[str, ...]] = _nothing
    plain: Callable[[Facts], tuple[str, str]] | None = None
    canonical: Callable[[Facts], str] | None = None
    kin: Callable[[Facts], str] | None = None
    several: bool = False


def capital(text: str) -> str:
    """The text with a capital first letter."""
    return text[0].upper() + text[1:]


def listed(entries: list[str]) -> str:
    """a, b and c."""
    return f"{', '.join(entries[:-1])} and {entries[-1]}"
