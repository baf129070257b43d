"""Cipher: words in an invented code, the same in all items and told in none: it can only be learnt from them.

Ten nouns each stand for a digit. A level has as many words as its number. Who sends them to whom changes nothing:
it makes problems of one word that are new where the word is not.
"""

from __future__ import annotations

import random

from perdure.order import arrange
from perdure.streams.arena.kind import NAMES, THINGS, Facts, Kind

NOUNS = tuple(sorted(arrange(THINGS, "arena/cipher", "nouns", key=str)[:10]))
CODE = {noun: digit for digit, noun in enumerate(arrange(NOUNS, "arena/cipher", "code", key=str))}


def _draw(rng: random.Random, level: int) -> Facts:
    sender, receiver = rng.sample(NAMES, 2)
    shown = rng.sample(NOUNS, level)
    return {"from": sender, "to": receiver, "words": shown, "answer": [CODE[word] for word in shown]}


def _message(facts: Facts) -> str:
    return f"{facts['from']} tells {facts['to']}: {' '.join(facts['words'])}."


CIPHER = Kind(
    name="cipher",
    draw=_draw,
    told=lambda facts: {"message": _message(facts)},
    prompts=(
        "Encode. {message} Code:",
        "Put into code. {message} The code:",
        "Write it in code. {message} In code:",
        "{message} The same in code:",
        "Turn this into code. {message} It becomes:",
        "In our code. {message} What is written?",
        "Words: {message} Code for them:",
        "Say it in code. {message} That is:",
        "Use the code. {message} The message is now:",
        "Give the code. {message} Each word in turn:",
        "Code each word. {message} Digits:",
        "A message. {message} How is it written in code?",
    ),
    answer=lambda facts: f" code {' '.join(map(str, facts['answer']))}",
    canonical=_message,
)
