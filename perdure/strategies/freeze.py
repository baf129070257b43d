"""Freeze the bottom: after the first task, what is near the input is trained no more."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import ClassVar

from torch import nn

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.strategies.settings import whole
from perdure.types import Context, Example, Objective


class FreezeBottom(Strategy):
    """From task `start` on, the embeddings and the lowest `layers` blocks of the model stay as they are.

    The blocks are those of the `nn.ModuleList` or `nn.Sequential` that holds most weights, in order; members
    without weights do not count. Running statistics in frozen blocks stay too. Adapters in frozen blocks are frozen
    with them.

    Args:
        layers: how many blocks, or below 1 a share of them, rounded down.
        start: the task, from 0, at which they are frozen; 0 freezes from the beginning.

    Source: the partial fine-tuning of Yosinski et al. 2014 (arXiv:1411.1792); for forgetting in language models,
    Zheng et al. 2025, "Spurious Forgetting" (arXiv:2501.13453).
    """

    name: ClassVar[str] = "freeze-bottom"
    summary: ClassVar[str] = "after the first task, embeddings and the lowest blocks are trained no more"
    needs: ClassVar[str] = "nothing held; a model with a stack of blocks; no task ids"
    cost: ClassVar[str] = "none: backward passes get shorter"
    source: ClassVar[str] = "Zheng et al. 2025 (arXiv:2501.13453)"
    freezes = True

    def __init__(self, layers: float = 0.5, start: int = 1) -> None:
        if isinstance(layers, bool) or not 0 < layers < float("inf") or (layers >= 1 and layers != int(layers)):
            raise StrategyError(
                f"freeze-bottom: layers must be a whole number of blocks or a share between 0 and 1, got {layers}"
            )
        self.layers = layers
        self.start = whole("freeze-bottom", "start", start, least=0)
        self._frozen: list[nn.Module] = []

    @property
    def needs_boundaries(self) -> bool:
        """Not if it freezes from the beginning."""
        return self.start > 0

    def check(self, model: nn.Module, objective: Objective) -> None:
        """There must be blocks to freeze, and weights that stay trainable."""
        bottom = {parameter for module in self._bottom(model) for parameter in module.parameters()}
        own = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if own and not any(parameter in bottom for parameter in own):
            raise StrategyError(
                "freeze-bottom: none of what is trained lies in the model's lowest blocks; train adapters or all "
                "weights, or choose another strategy"
            )
        if own and all(parameter in bottom for parameter in own):
            raise StrategyError(
                f"freeze-bottom: with layers {self.layers:g} nothing would be left to train (a soft prompt is "
                "an embedding, and those are frozen); tune all weights or LoRA, or choose another strategy"
            )

    def prepare(self, ctx: Context) -> None:
        """Freeze, from task `start` on."""
        if ctx.index >= self.start:
            self._frozen = self._bottom(ctx.model)
            for module in self._frozen:
                module.requires_grad_(False)

    def mix(self, ctx: Context, examples: list[Example]) -> list[Example]:
        """The rows as they are; the loop has just set train mode, in which running statistics would move."""
        for module in self._frozen:
            for inner in module.modules():
                if getattr(inner, "running_mean", None) is not None:
                    inner.eval()
        return examples

    def _bottom(self, model: nn.Module) -> list[nn.Module]:
        blocks = stack(model)
        # As a float, 0.58 of 50 blocks is less than 29.
        count = int(self.layers if self.layers >= 1 else Fraction(repr(self.layers)) * len(blocks))
        if not 0 < count < len(blocks):
            if not blocks:
                raise StrategyError(
                    "freeze-bottom: the model has no stack of blocks (an nn.ModuleList or nn.Sequential), so no "
                    "bottom to freeze; choose another strategy"
                )
            raise StrategyError(
                f"freeze-bottom: the model has {len(blocks)} blocks with weights, so that layers "
                f"{self.layers:g} would freeze {'none' if count < 1 else 'all'} of them; give another number"
            )
        inside = {module for block in blocks for module in block.modules()}
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding) and m not in inside]
        return [*embeddings, *blocks[:count]]


def stack(model: nn.Module) -> Sequence[nn.Module]:
    """The model's blocks from input to output: of its lists of two and more, the one that holds most weights."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
    found = [[block for block in one if any(True for _ in block.parameters())] for one in lists]
    return max((one for one in found if len(one) > 1), key=_size, default=[])


def _size(blocks: Sequence[nn.Module]) -> int:
    return sum(parameter.numel() for block in blocks for parameter in block.parameters())
