"""SLAO: one LoRA adapter for all tasks, begun orthogonally at each and merged with its B slowing down."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.strategies.merge import Merging, write
from perdure.types import Context, Objective

A = ("lora_A", "lora_embedding_A")


class SLAO(Merging):
    """A ← A_t and B ← B + (B_t − B)/√t after task t; the next one begins with A = QR(A_tᵀ)ᵀ.

    The rows of A are then orthonormal and span what they spanned; R has a diagonal above 0, so that each row points
    the way it did. What is trained beside the adapters (a head, biases) is merged as B.

    Args:
        start: where B begins at the next task: at the B that was trained "last", the paper's, or the "merged" one.

    Source: Qiao & Mahdavi 2025 (arXiv:2512.23017).
    """

    name: ClassVar[str] = "slao"
    summary: ClassVar[str] = "one LoRA adapter: begun orthogonally at each task, merged by 1/√t in its B"
    needs: ClassVar[str] = (
        "LoRA; 1 value for each weight of B, with `start: last` 2 between tasks; no stored rows, no task ids"
    )
    cost: ClassVar[str] = "nothing a step; a QR decomposition of each A at the beginning of a task"
    source: ClassVar[str] = "Qiao & Mahdavi 2025 (arXiv:2512.23017)"

    def __init__(self, start: Literal["last", "merged"] = "last") -> None:
        if start not in ("last", "merged"):
            raise StrategyError(f"slao: start must be last or merged, got {start!r}")
        super().__init__(start)
        self.held = {"merged": {}}

    def check(self, model: nn.Module, objective: Objective) -> None:
        """Refuse a model without LoRA, and a rank that orthonormal rows cannot have."""
        found = factors(model)
        if not found:
            raise StrategyError(
                "slao: the model has no LoRA adapter that is trained, and it merges adapters; tune with LoRA "
                "(--tuning lora), or choose ema, which averages any weights"
            )
        for name, factor in found.items():
            rank, width = factor.flatten(1).shape
            if rank > width:
                raise StrategyError(
                    f"slao: {name} has rank {rank} and an input of {width}; so many rows cannot be orthonormal, "
                    "take a lower rank (lora.r)"
                )

    def takes_part(self, name: str) -> bool:
        """All but A, of which the newest stays in the model."""
        return not is_a(name)

    def prepare(self, ctx: Context) -> None:
        """From the second task on: B as `start` says, and A with orthonormal rows."""
        super().prepare(ctx)
        if self.tasks:
            found = factors(ctx.model)
            write(found, {name: orthonormal_rows(factor.detach()) for name, factor in found.items()})

    def fold(self, trained: Mapping[str, Tensor]) -> None:
        """B ← B + (B_t − B)/√t."""
        merged = self.held["merged"]
        for name, new in trained.items():
            merged[name] = torch.lerp(merged[name], new, self.tasks**-0.5) if name in merged else new

    def merged(self, name: str) -> Tensor:
        """B."""
        return self.held["merged"][name]


def factors(model: nn.Module) -> dict[str, Tensor]:
    """The A of every adapter that is trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad and is_a(name)}


def is_a(name: str) -> bool:
    """Whether a parameter of that name is an adapter's A, as PEFT names it."""
    return any(part in A for part in name.split("."))


def orthonormal_rows(factor: Tensor) -> Tensor:
    """QR(Aᵀ)ᵀ with the diagonal of R at least 0: orthonormal rows that span the rows of A.

    Args:
        factor: A, [r, ...] with r at most the product of the rest.
    """
    wide = factor.to(torch.promote_types(factor.dtype, torch.float32))
    q, r = torch.linalg.qr(wide.flatten(1).T)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs).T.reshape(factor.shape)
