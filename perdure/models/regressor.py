"""A backbone with a regression head, as one module: token ids to a number for each row."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from perdure.errors import ModelError
from perdure.models.heads import Votes
from perdure.models.hidden import HiddenStates
from perdure.models.objectives import PAD
from perdure.storage import write_json

# Rows are padded to a multiple of so many tokens: a processor's products of attention scores are slower where rows
# of a matrix begin anywhere. A training step of MHAR in bf16 took a seventh less.
EVEN = 8


class Regressor(nn.Module):
    """Hidden states of a backbone, read by a head.

    Args:
        backbone: a Hugging Face model without an output layer, or PEFT's wrapper of one.
        head: hidden states [B, T, D] and mask [B, T] to [B]; see `perdure.models.heads`.
        cache: keeps the hidden states of a backbone that is not trained; it is then frozen and in eval mode for
            good. None: the backbone is as its `requires_grad` says, and runs at every call.

    Shape:
        ids [B, T], int64, `PAD` where a row has ended → [B].
    """

    def __init__(self, backbone: nn.Module, head: nn.Module, cache: HiddenStates | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.cache = cache
        if cache is not None:
            backbone.requires_grad_(False)
            backbone.eval()

    def forward(self, x: Tensor) -> Tensor | Votes:
        """Predictions [B]; of an ensemble with each member's."""
        if self.cache is not None and x.device.type == "cpu":
            x = F.pad(x, (0, -x.shape[1] % EVEN), value=PAD)
        found: Tensor | Votes = self.head(self.hidden(x), x != PAD)
        return found

    def hidden(self, x: Tensor) -> Tensor:
        """The backbone's last hidden states, [B, T, D]; those of padding mean nothing."""
        return self._states(x) if self.cache is None else self.cache(x, self._frozen)

    def remember(self, rows: Sequence[Tensor], tell: Callable[[int, int], None] = lambda done, of: None) -> int:
        """Work out and keep the hidden states of these token rows, where there is a cache; how many were new."""
        if self.cache is None:
            return 0
        on_processor = next(self.backbone.parameters()).device.type == "cpu"
        return self.cache.fill(rows, self._frozen, tell, side_by_side=on_processor)

    def train(self, mode: bool = True) -> Regressor:
        """A frozen backbone stays in eval mode: its dropout would be noise on what the cache holds."""
        super().train(mode)
        if self.cache is not None:
            self.backbone.eval()
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """Work the backbone's activations out again in the backward pass."""
        if self.cache is not None:
            raise ModelError("gradient_checkpointing: the backbone is frozen, so there is nothing to save")
        self.backbone.gradient_checkpointing_enable(**options)  # type: ignore[operator]

    def save_pretrained(self, folder: Path) -> None:
        """Write the head, and the backbone or its adapters where they were trained."""
        if self.cache is None:
            self.backbone.save_pretrained(folder)  # type: ignore[operator]
        save_file(
            {name: value.contiguous() for name, value in self.head.state_dict().items()},
            folder / "head.safetensors",
        )
        shapes = {name: list(value.shape) for name, value in self.head.state_dict().items()}
        write_json(folder / "head.json", {"format": 1, "head": type(self.head).__name__, "shapes": shapes})

    def _states(self, x: Tensor) -> Tensor:
        mask = x != PAD
        output = self.backbone(input_ids=x.clamp(min=0), attention_mask=mask.long())
        states: Tensor = output.last_hidden_state
        return states

    @torch.no_grad()
    def _frozen(self, x: Tensor) -> Tensor:
        # At full precision whatever the run's: what is kept must not depend on who asked first.
        device = next(self.backbone.parameters()).device
        with torch.autocast(device.type, enabled=False), _OneDNN() if device.type == "cpu" else nullcontext():
            return self._states(x.to(device)).float()


class _OneDNN(TorchFunctionMode):
    """Linear layers in fp32 through oneDNN, without gradients.

    PyTorch takes MKL for them, which makes no use of AVX-512 on another maker's processor: there a third less time
    for all of MiniLM.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and len(args) == 3 and _plain(*args):
            return torch.ops.mkldnn._linear_pointwise(*args, "none", [], "")
        return func(*args, **(kwargs or {}))


def _plain(x: Any, weight: Any, bias: Any) -> bool:
    """Whether oneDNN's operator, which PyTorch keeps to itself, is there, and takes these: dense and fp32."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and platform.machine().lower() in ("x86_64", "amd64")
        and all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in (x, weight))
        and x.dtype == weight.dtype == torch.float32
        and weight.dim() == 2
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
    )
