"""A cache of keys and values with room for the tokens to come: what is there is not copied for each of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

ROOM = 64  # tokens, at least, by which it grows
SHARE = 4  # a longer one grows by a quarter


class RoomyLayer(DynamicLayer):
    """A layer's keys and values [B, H, S, D]: the front of buffers that are longer.

    Under autocast they are kept in its precision, to which attention would bring all of them at every token.

    Args:
        keys: [B, H, S, D] of the prompts.
        values: likewise.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers: tuple[Tensor, Tensor] | None = None
        self.keys = self.values = None
        self.update(keys, values)

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values of new tokens; those of all tokens are given back."""
        if self.keys is None or self.values is None:
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        start, more = self.keys.shape[-2], key_states.shape[-2]
        if self._buffers is None or start + more > self._buffers[0].shape[-2]:
            room = max(ROOM, (start + more) // SHARE)
            self._buffers = (_longer(self.keys, more + room), _longer(self.values, more + room))
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : start + more, :] = new
        self.keys, self.values = (buffer[..., : start + more, :] for buffer in self._buffers)
        self.is_initialized = True
        return self.keys, self.values

    # What follows leaves tensors without room, which the next token makes.

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        super().batch_select_indices(indices)
        self._buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row so many times."""
        super().batch_repeat_interleave(repeats)
        self._buffers = None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Put the rows in this order."""
        super().reorder_cache(beam_idx)
        self._buffers = None

    def reset(self) -> None:
        """Start afresh."""
        super().reset()
        self._buffers = None


def give_room(cache: Any) -> None:
    """Let a model's cache, filled by the prompts, take further tokens in place."""
    for i, layer in enumerate(getattr(cache, "layers", [])):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[i] = RoomyLayer(layer.keys, layer.values)


def rows_can_leave(cache: Any) -> bool:
    """Whether all of a cache is keys and values by row: what convolutions keep is not selected with them."""
    return all(type(layer) in (DynamicLayer, RoomyLayer) for layer in getattr(cache, "layers", [None]))


def _longer(old: Tensor, more: int) -> Tensor:
    """A buffer that begins with what there is."""
    kind = old.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else old.dtype
    new = old.new_zeros(*old.shape[:-2], old.shape[-2] + more, old.shape[-1], dtype=dtype)
    new[..., : old.shape[-2], :] = old
    return new
