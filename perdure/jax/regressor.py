"""A Mistral with a regression head: token ids to one number between 0 and 1."""

from __future__ import annotations

import equinox as eqx
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from perdure.jax.heads import MHAR
from perdure.jax.mistral import Mistral


class Regressor(eqx.Module):
    """Backbone and head; the backbone's own head, which would make logits, is left out."""

    backbone: Mistral
    head: MHAR

    def __init__(self, backbone: Mistral, head: MHAR) -> None:
        self.backbone = eqx.tree_at(lambda m: m.head, backbone, None, is_leaf=lambda leaf: leaf is None)
        self.head = head

    def __call__(
        self,
        ids: Int[Array, "B T"] | Float[Array, "B T D"],
        mask: Bool[Array, "B T"],
        key: PRNGKeyArray | None = None,
    ) -> Float[Array, " B"]:
        """Predictions of ids, or of the hidden states of a backbone that is not trained.

        `mask` is true where a token is real, `key` is that of dropout (None: eval mode).
        """
        return self.head(self.states(ids), mask, key)

    def states(self, ids: Int[Array, "B T"] | Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The backbone's last hidden states; those that are given already as they are."""
        return ids if jnp.issubdtype(ids.dtype, jnp.floating) else self.backbone.states(ids)


def row_losses(predictions: Float[Array, " B"], targets: Float[Array, " B"]) -> Float[Array, " B"]:
    """½(p − y)², row by row: the negative log-likelihood of a unit Gaussian, up to a constant."""
    return 0.5 * jnp.square(predictions - targets)
