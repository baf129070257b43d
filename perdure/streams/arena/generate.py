"""Items drawn without repetition, and cut into training and evaluation."""

from __future__ import annotations

import random
from collections.abc import Sequence, Set

from perdure.streams.arena.item import ASK, Item, partition, wording
from perdure.streams.arena.kind import Facts
from perdure.streams.arena.kinds import ALL_FORMS, FORMS, LEVELS, check_levels, count_forms, kind_of

# After so many draws in vain another level is tried, and after so many the kind counts as exhausted.
_PATIENCE = 500
_LIMIT = 5000


def draw(kind: str, level: int, rng: random.Random) -> Facts:
    """The structured content of one problem: premises in the order shown, the question and the answer."""
    made = kind_of(kind)
    check_levels((level,))
    return made.draw(rng, level)


def generate(
    kind: str,
    count: int,
    seed: int,
    level: int | None = None,
    exclude: Set[str] = frozenset(),
    levels: Sequence[int] = LEVELS,
    forms: int | None = FORMS,
    apart: bool = False,
    fewer: bool = False,
) -> list[Item]:
    """Draw `count` items, distinct by normalised prompt; no two are one problem in different words either.

    Args:
        kind: one of `ALL_KINDS`.
        count: how many items.
        seed: the same seed gives the same items in the same order.
        level: 1 (easy) to 5 (hard); None mixes `levels`.
        exclude: normalised texts that must not come up, as `Item.texts` gives them.
        levels: mixed evenly where `level` is None, as long as each has items left.
        forms: how many wordings of the prompt are used, 1 to 12 or None for all; evenly where it divides 12.
        apart: no two items are kin either (`Item.kin`): of rows of numbers that begin alike there is one.
        fewer: where the kind cannot supply so many distinct items, give those that were found.

    Raises:
        ValueError: for an unknown kind or level, or when the kind cannot supply so many, unless `fewer` are taken.
    """
    kind_of(kind)
    check_levels(levels if level is None else (level,))
    used = count_forms(forms)
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    rng = random.Random(f"arena/{kind}/{seed}/{level}")
    seen, items, misses = set(exclude), list[Item](), 0
    while len(items) < count:
        at = level or (levels[len(items) % len(levels)] if misses < _PATIENCE else rng.choice(levels))
        item = _item(kind, at, rng, used)
        texts = _texts(item, apart)
        if texts & seen or partition(kind, item.facts) != "arena":
            misses += 1
            if misses > _LIMIT and fewer:
                break
            if misses > _LIMIT:
                raise ValueError(_exhausted(kind, level, count, len(items)))
            continue
        misses = 0
        seen |= texts
        items.append(item)
    rng.shuffle(items)
    return items


def _texts(item: Item, apart: bool) -> frozenset[str]:
    return item.texts | {item.kin} if apart and item.kin else item.texts


def _item(kind: str, level: int, rng: random.Random, forms: int) -> Item:
    facts = draw(kind, level, rng)
    # One draw from all forms, however many are used: the problems are then the same in any number of forms.
    prompt, answer = wording(kind, facts, rng.randrange(ALL_FORMS), forms)
    return Item(kind, level, prompt + ASK, answer, facts)


def _exhausted(kind: str, level: int | None, count: int, found: int) -> str:
    where = "" if level is None else f" at level {level}"
    return (
        f"kind '{kind}'{where} cannot supply {count} distinct items: {found} were found; "
        "ask for fewer, or for another level"
    )


def split(
    kind: str,
    train: int,
    evaluate: int,
    seed: int,
    level: int | None = None,
    levels: Sequence[int] = LEVELS,
    forms: int | None = FORMS,
    apart: bool = False,
) -> tuple[list[Item], list[Item]]:
    """Training and evaluation items of one kind, disjoint by normalised text and by facts; as in `generate`."""
    items = generate(kind, train + evaluate, seed, level, levels=levels, forms=forms, apart=apart)
    first, second = items[:train], items[train:]
    check_disjoint(first, second, apart)
    return first, second


def check_disjoint(train: Sequence[Item], evaluate: Sequence[Item], apart: bool = False) -> None:
    """AssertionError where an item of one is an item of the other, by normalised text or in other words.

    With `apart`, also where two of them are kin.
    """
    shared = {text for item in train for text in _texts(item, apart)}
    shared &= {text for item in evaluate for text in _texts(item, apart)}
    assert not shared, f"training and evaluation share {len(shared)} texts, the first: {min(shared)!r}"
