"""Weights of a module by name: the path of their fields, joined by dots, as in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

Tree = TypeVar("Tree")


def path_name(path: tuple[Any, ...]) -> str:
    """A path of JAX as one name."""
    parts = []
    for key in path:
        if isinstance(key, GetAttrKey):
            parts.append(key.name)
        elif isinstance(key, SequenceKey):
            parts.append(str(key.idx))
        elif isinstance(key, DictKey | FlattenedIndexKey):
            parts.append(str(key.key))
        else:
            raise TypeError(f"no name for the key {key!r}")
    return ".".join(parts)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name, in its own order."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_named(change: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The tree with each leaf changed by (name, leaf)."""
    mapped: Tree = jax.tree_util.tree_map_with_path(lambda path, leaf: change(path_name(path), leaf), tree)
    return mapped


def filled(tree: Tree, leaves: Mapping[str, Any]) -> Tree:
    """The tree with its leaves replaced by those of the same names; KeyError where one is missing."""
    return map_named(lambda name, _: leaves[name], tree)
