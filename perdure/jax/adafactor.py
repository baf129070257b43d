"""Adafactor as transformers has it, over weights whose layers are stacked: each layer's is a weight of its own."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from perdure.jax.tree import path_name

DECAY, TINY, LARGEST = 0.8, 1e-30, 1.0  # of the moments' rate, added to squares, RMS of a weight's change
STACKED = "layers."


class Moments(NamedTuple):
    """Second moments of a weight: means over rows and over columns of a matrix, [..., R] and [..., C], else all."""

    row: Array | None
    column: Array | None
    full: Array | None


class AdafactorState(NamedTuple):
    """Steps taken, and the moments of each weight."""

    steps: Array
    moments: Any


def scale_by_adafactor() -> optax.GradientTransformation:
    """Gradient to change, without learning rate and sign; clipped so that no weight's RMS exceeds 1.

    Source: Shazeer and Stern 2018, "Adafactor" (arXiv:1804.04235), algorithms 4 and 5, with an absolute rate.
    """

    def init(weights: Any) -> AdafactorState:
        made = jax.tree_util.tree_map_with_path(lambda path, w: _begin(path_name(path), w), weights)
        return AdafactorState(jnp.zeros((), jnp.int32), made)

    def update(gradient: Any, state: AdafactorState, weights: Any = None) -> tuple[Any, AdafactorState]:
        del weights
        steps = state.steps + 1
        keep = 1.0 - steps.astype(jnp.float32) ** -DECAY
        names = jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), gradient)
        both = jax.tree.map(lambda name, g, m: _advance(name, g, m, keep), names, gradient, state.moments)
        first, second = (jax.tree.map(lambda _, pair, i=i: pair[i], gradient, both) for i in (0, 1))
        return first, AdafactorState(steps, second)

    return optax.GradientTransformation(init, update)


def _begin(name: str, weight: Array) -> Moments:
    shape = weight.shape
    if weight.ndim - _stacked(name) < 2:
        return Moments(None, None, jnp.zeros(shape, jnp.float32))
    columns = (*shape[:-2], shape[-1])
    return Moments(jnp.zeros(shape[:-1], jnp.float32), jnp.zeros(columns, jnp.float32), None)


def _advance(name: str, gradient: Array, moments: Moments, keep: Array) -> tuple[Array, Moments]:
    squares = jnp.square(gradient) + TINY
    if moments.full is not None:
        full = keep * moments.full + (1 - keep) * squares
        new, change = Moments(None, None, full), gradient * jax.lax.rsqrt(full)
    else:
        assert moments.row is not None
        assert moments.column is not None
        row = keep * moments.row + (1 - keep) * squares.mean(-1)
        column = keep * moments.column + (1 - keep) * squares.mean(-2)
        new = Moments(row, column, None)
        scaled = jax.lax.rsqrt(row / row.mean(-1, keepdims=True))
        change = gradient * scaled[..., None] * jax.lax.rsqrt(column)[..., None, :]
    axes = tuple(range(_stacked(name), change.ndim))
    size = jnp.sqrt(jnp.square(change).mean(axes, keepdims=True))
    return change / jnp.maximum(1.0, size / LARGEST), new


def _stacked(name: str) -> int:
    return int(STACKED in f"{name}.")
