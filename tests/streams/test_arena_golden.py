"""What is published was measured on these rows: at default settings the arena's five kinds may not change."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable
from itertools import islice

import pytest

from perdure.streams import arena, corpus
from perdure.streams.arena import KINDS, Item, generate, plain, split


def hashed(values: Iterable[object]) -> str:
    state = hashlib.blake2b(digest_size=12)
    for value in values:
        state.update(json.dumps(value, sort_keys=True).encode() + b"\n")
    return state.hexdigest()


def told(items: Iterable[Item]) -> list[object]:
    return [[item.row(), item.facts, plain(item)] for item in items]


def splits(kind: str) -> str:
    """What the recipe and the demo use, for the seeds of the published tables."""
    return hashed(told(part) for seed in (0, 10) for part in split(kind, 800, 100, seed))


def levels(kind: str) -> str:
    return hashed(told(generate(kind, 40, seed, level)) for level in (1, 2, 3) for seed in (0, 5))


def draws(kind: str) -> str:
    """Facts and all wordings of a stream of draws, as nano's text takes them."""
    rng, found = random.Random(7), list[object]()
    for number in range(300):
        facts = arena.draw(kind, 1 + number % 3, rng)
        wordings = [arena.wording(kind, facts, form) for form in range(12)]
        found.append([facts, wordings, arena.plain_wording(kind, facts), arena.partition(kind, facts)])
    found.append(rng.random())
    return hashed(found)


def texts() -> str:
    """Nano's training text, lessons, probe and validation rows."""
    return hashed(
        [
            list(islice(corpus.documents(0), 1500)),
            list(islice(corpus.lessons(0), 700)),
            corpus.probe(),
            corpus.validation(200),
        ]
    )


GOLDEN: dict[str, dict[str, str]] = {
    "comparison": {
        "splits": "f427384a6ff80ddfacb2f698",
        "levels": "bf8f62e9b900d4b6d153e9be",
        "draws": "1f38ec0a6630efe6515d0411",
    },
    "sequence": {
        "splits": "050e3fda09d3d0baaef62282",
        "levels": "0adbed9953fed255668fa0f7",
        "draws": "cd5d9163a22616e6287efb9f",
    },
    "causal": {
        "splits": "9739d57a3b0956b7d9028f9c",
        "levels": "5375c98f0f2960be771fd342",
        "draws": "e6b5893a970f28f000b0420d",
    },
    "math": {
        "splits": "c76529893c0285a6cc217fb6",
        "levels": "1fe017ebd77a8def248000a9",
        "draws": "0053da38636a6b871f32f55b",
    },
    "grid": {
        "splits": "2e3df71e586e5c0a3aa68e02",
        "levels": "0cdc08754333eada3b2d3c86",
        "draws": "8853892dfb2c702d27e4da09",
    },
}
GOLDEN_TEXTS = "b23d9926e6dca8d3dd1c62a6"


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_rows_stay(kind: str) -> None:
    assert {"splits": splits(kind), "levels": levels(kind), "draws": draws(kind)} == GOLDEN[kind]


def test_nanos_text_stays() -> None:
    assert texts() == GOLDEN_TEXTS
