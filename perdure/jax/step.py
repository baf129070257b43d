"""One optimizer step, the Fisher information and predictions, as pure functions that are compiled once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from perdure.jax.adafactor import scale_by_adafactor
from perdure.jax.regressor import Regressor, row_losses
from perdure.jax.rows import Batch
from perdure.jax.settings import FitSettings


class Anchors(eqx.Module):
    """What EWC remembers of all earlier tasks: the sum of their quadratics is one quadratic.

    Attributes:
        importance: ΣF by weight.
        anchor: ΣFθ* / ΣF, where that quadratic has its minimum.
        offset: Σ over tasks of the quadratics' value there, for the value of the penalty.
    """

    importance: Any
    anchor: Any
    offset: Array


class State(eqx.Module):
    """All that a step changes or reads of earlier ones."""

    trained: Any
    optimizer: Any
    anchors: Anchors | None


def make_optimizer(settings: FitSettings) -> optax.GradientTransformation:
    """Gradient to change, without the learning rate and the minus sign."""
    parts = [] if settings.clip is None else [optax.clip_by_global_norm(settings.clip)]
    if settings.optimizer == "adamw":
        parts.append(optax.scale_by_adam(*settings.betas, settings.eps))
    else:
        parts.append(scale_by_adafactor())
    if settings.weight_decay:
        parts.append(optax.add_decayed_weights(settings.weight_decay))
    return optax.chain(*parts)


def weighted_loss(trained: Any, frozen: Any, batch: Batch, key: Array | None) -> Array:
    """Σ weight · ½(p − y)² over the rows of a batch."""
    model: Regressor = eqx.combine(trained, frozen)
    losses = row_losses(model(batch.ids, batch.mask, key), batch.y)
    return jnp.sum(batch.weight * losses)


def make_step(settings: FitSettings, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """A function (state, frozen, batch, lr, number) → (state, loss, penalty, gradient's norm).

    `number` is that of the step in the run, from which dropout follows. Where loss or gradient is not finite, the
    state comes back as it was.
    """
    root = jax.random.key(settings.seed)

    def step(
        state: State, frozen: Any, batch: Batch, lr: Array, number: Array
    ) -> tuple[State, Array, Array, Array]:
        key = jax.random.fold_in(root, number)
        loss, gradient = jax.value_and_grad(weighted_loss)(state.trained, frozen, batch, key)
        penalty = jnp.zeros(())
        if state.anchors is not None:
            penalty, pull = quadratic(state.trained, state.anchors)
            penalty = settings.ewc_strength * penalty
            gradient = jax.tree.map(lambda g, p: g + settings.ewc_strength * p, gradient, pull)
        norm = optax.tree.norm(gradient)
        change, moments = optimizer.update(gradient, state.optimizer, state.trained)
        moved = jax.tree.map(lambda p, c: p - lr * c, state.trained, change)
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        new = State(moved, moments, state.anchors)
        return jax.tree.map(lambda a, b: jnp.where(sound, a, b), new, state), loss, penalty, norm

    return step


def quadratic(trained: Any, anchors: Anchors) -> tuple[Array, Any]:
    """½ Σ_tasks Σ_i F_i (θ_i − θ*_i)², and its gradient ΣF (θ − anchor)."""
    gaps = jax.tree.map(jnp.subtract, trained, anchors.anchor)
    pull = jax.tree.map(jnp.multiply, gaps, anchors.importance)
    value = sum(jnp.vdot(g, p) for g, p in zip(jax.tree.leaves(gaps), jax.tree.leaves(pull), strict=True))
    return 0.5 * (value + anchors.offset), pull


def squared_gradients(trained: Any, frozen: Any, batch: Batch) -> Any:
    """Σ over the rows of a batch that have a weight of the squared gradient of the row's own loss, in eval mode."""

    def of_row(values: Any, ids: Array, mask: Array, y: Array) -> Array:
        one = Batch(ids[None], mask[None], y[None], jnp.ones(1))
        return weighted_loss(values, frozen, one, None)

    each = jax.vmap(jax.grad(of_row), (None, 0, 0, 0))(trained, batch.ids, batch.mask, batch.y)
    real = batch.weight > 0

    def summed(g: Array) -> Array:
        return jnp.sum(jnp.where(real.reshape(-1, *[1] * (g.ndim - 1)), g * g, 0), 0)

    return jax.tree.map(summed, each)


def fold(anchors: Anchors, new: Any, here: Any) -> Anchors:
    """Take in a task's importance at the weights as they are now."""
    total = jax.tree.map(jnp.add, anchors.importance, new)
    share = jax.tree.map(lambda f, t: jnp.where(t > 0, f / jnp.where(t > 0, t, 1), 1), new, total)
    gap = jax.tree.map(jnp.subtract, here, anchors.anchor)
    apart = jax.tree.map(lambda f, s, g: jnp.sum(f * s * g * g), anchors.importance, share, gap)
    anchor = jax.tree.map(lambda a, s, g: a + s * g, anchors.anchor, share, gap)
    offset: Array = anchors.offset + sum(jax.tree.leaves(apart))
    return Anchors(total, anchor, offset)


def predict(trained: Any, frozen: Any, batch: Batch) -> Array:
    """Predictions [B] in eval mode."""
    model: Regressor = eqx.combine(trained, frozen)
    return model(batch.ids, batch.mask)


def predict_dropped(trained: Any, frozen: Any, batch: Batch, keys: Array) -> Array:
    """Predictions [samples, B] with dropout, one sample a key: nothing is dropped before the last layers."""
    model: Regressor = eqx.combine(trained, frozen)
    pooled = model.head.pooled(model.states(batch.ids), batch.mask)
    found: Array = jax.vmap(model.head.answer, (None, 0))(pooled, keys)
    return found


def hidden_states(trained: Any, frozen: Any, ids: Array) -> Array:
    """The backbone's last hidden states [B, T, D]."""
    model: Regressor = eqx.combine(trained, frozen)
    return model.states(ids)
