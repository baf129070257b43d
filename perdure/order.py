"""Keyed priorities: every order, split, cap and draw follows from them, none from a counter of random numbers.

A priority is a hash of (seed, purpose, context…, key). Sorting distinct keys by it is a uniform random
permutation, and it stays the same for the remaining keys when one key is added or removed. That is what lets a
run be resumed from anywhere and a record be erased exactly.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from hashlib import blake2b
from typing import TypeVar

T = TypeVar("T")
SPAN = 1 << 64


def prioritiser(*context: Hashable) -> Callable[[str], int]:
    """A function from key to a 64-bit priority, for one fixed context.

    The context may hold strings, integers, floats, booleans and None.
    """
    prefix = blake2b(json.dumps(context).encode(), digest_size=8)

    def priority(key: str) -> int:
        state = prefix.copy()
        state.update(key.encode())
        return int.from_bytes(state.digest(), "big")

    return priority


def priority(*context: Hashable, key: str) -> int:
    """The 64-bit priority of one key in a context; uniform over [0, 2**64)."""
    return prioritiser(*context)(key)


def arrange(items: Iterable[T], *context: Hashable, key: Callable[[T], str]) -> list[T]:
    """The items in the random order that the context and their keys give; equal keys keep their order."""
    rank = prioritiser(*context)
    return sorted(items, key=lambda item: rank(key(item)))


def take(items: Sequence[T], count: int, *context: Hashable, key: Callable[[T], str]) -> list[T]:
    """`count` items with the smallest priorities, in the order in which they came.

    With `count` at least `len(items)` all are returned.
    """
    if count >= len(items):
        return list(items)
    rank = prioritiser(*context)
    chosen = sorted(range(len(items)), key=lambda i: rank(key(items[i])))[:count]
    return [items[i] for i in sorted(chosen)]


def fingerprint(key: str) -> str:
    """What stands for a key where the key itself must not stand: 32 hex digits of BLAKE2b."""
    return blake2b(key.encode(), digest_size=16, person=b"perdure/key").hexdigest()


def uniform(*context: Hashable, key: str) -> float:
    """A uniform number in [0, 1) that follows from the context and the key."""
    return priority(*context, key=key) / SPAN
