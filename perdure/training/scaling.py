"""Loss scaling for fp16, whose smallest number is 6e-8: gradients are taken of a multiple of the loss.

Knows nothing of strategies or steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

START, FLOOR, PATIENCE = 2.0**12, 1.0, 2000


class Scaling:
    """A scale that is halved where gradients overflow, and doubled after 2,000 steps in a row where none did.

    It begins at 4,096: with PyTorch's own 65,536 the logits of a row with one target overflow at once, and in an
    online stream no row is to be lost to warming up. At 1 it is lowered no further.

    Args:
        device: of the gradients.

    Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv:1710.03740), as in `torch.amp.GradScaler`.
    """

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type, init_scale=START, growth_interval=PATIENCE)

    @property
    def scale(self) -> float:
        """What losses are multiplied by now."""
        return float(self._scaler.get_scale())

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        found: Tensor = self._scaler.scale(loss)
        return found

    def unscale(self, optimizer: torch.optim.Optimizer, aside: Mapping[Tensor, Tensor]) -> bool:
        """Divide a step's gradients by the scale, in place, and take note of whether they are all finite.

        Args:
            optimizer: whose parameters' `.grad` are divided.
            aside: other gradients, taken of a scaled loss too.

        Returns:
            Whether all are finite.
        """
        found = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if aside:
            torch._foreach_mul_(list(aside.values()), 1 / self.scale)
        everything = [*found, *aside.values()]
        if found:
            self._scaler.unscale_(optimizer)
        finite = not everything or bool(torch.nn.utils.get_total_norm(everything).isfinite())
        if found and finite:
            self._scaler.update()
        elif not finite:
            self._scaler.update(self.scale)  # the gradients are forgotten; `lower` decides on the scale
        return finite

    def lower(self) -> bool:
        """Halve the scale after an overflow; False where it was as low as it goes, so that it was not the cause."""
        state = self.state_dict()
        if state["scale"] <= FLOOR:
            return False
        self.load_state_dict({**state, "scale": max(state["scale"] / 2, FLOOR), "_growth_tracker": 0})
        return True

    def state_dict(self) -> dict[str, Any]:
        """The scale, and for how many steps it has held."""
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._scaler.load_state_dict(dict(state))
