"""Regression heads: from a backbone's hidden states to one number between 0 and 1.

Knows nothing of where the hidden states come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from perdure.errors import ModelError, unknown_name

Head = Literal["mhar", "mean", "linear"]
HEADS: dict[str, str] = {
    "mhar": "multi-head attention regression: attention over the tokens, a perceptron, attention pooling",
    "mean": "the mean over the tokens, then the perceptron that MHAR ends with",
    "linear": "the mean over the tokens, then one linear layer",
}
EPS = 1e-6  # of every RMSNorm
PLAIN_TOKENS = 512  # of a row; beyond, the scores of all pairs would take too much memory
THETA = 10_000.0  # base of the rotary frequencies


class Norm(nn.RMSNorm):
    """RMSNorm in fp32, or wider, whatever the precision around it."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return super().forward(x if x.dtype == torch.float64 else x.float())


class MHAR(nn.Module):
    """Multi-head attention regression.

    Rotary self-attention without a causal mask → RMSNorm(x + ·) → three linear layers with SiLU between →
    RMSNorm(x + ·) → attention pooling → linear → dropout → RMSNorm → SiLU → linear → sigmoid. Padding is neither
    attended to nor pooled.

    Args:
        width: of the hidden states, D.
        heads: of the self-attention; D must be an even multiple of it.
        hidden: units of the last hidden layer.
        dropout: share of those that are dropped in training.

    Shape:
        hidden states [B, T, D] and mask [B, T], true where a token is real (None: everywhere) → [B] in (0, 1).

    Raises:
        ModelError: the width cannot be shared among so many heads.
    """

    def __init__(self, width: int, heads: int = 4, hidden: int = 1024, dropout: float = 0.2) -> None:
        super().__init__()
        if width % (2 * heads):
            fitting = ", ".join(str(h) for h in range(1, 33) if width % (2 * h) == 0)
            raise ModelError(
                f"heads: hidden states of width {width} cannot be shared among {heads} heads, since rotary "
                f"positions need an even width a head; of up to 32 heads these would do: {fitting or 'none'}"
            )
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.attention_norm = Norm(width, eps=EPS)
        self.mlp = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.mlp_norm = Norm(width, eps=EPS)
        self.pool = nn.Linear(width, 1, bias=False)
        self.answer = Answer(width, hidden, dropout)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions [B] of hidden states [B, T, D]."""
        return self.answer(self.pooled(states, mask))

    def pooled(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the last layers read, [B, D]; no dropout comes before it."""
        x = self.attention_norm(states + self._attend(states, mask))
        inner = F.silu(self.mlp[0](x))
        inner = F.silu(self.mlp[1](inner))
        x = self.mlp_norm(x + self.mlp[2](inner))
        scores = self.pool(x).squeeze(-1)  # [B, T]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = scores.softmax(-1).to(x.dtype)  # softmax is fp32 under autocast
        return (weights[:, None] @ x).squeeze(1)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(batch, length, self.heads, -1).transpose(1, 2)  # [B, H, T, D / H]

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        q, k = rotate(q), rotate(k)
        seen = None if mask is None else mask[:, None, None]  # [B, 1, 1, T]: nobody looks at padding
        mixed = attend(q, k, v, seen)
        return self.output(mixed.transpose(1, 2).reshape(batch, length, width))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """Attention without a causal mask, [B, H, T, W] each; `seen` broadcasts over the scores, [B, H, T, T].

    On a processor short rows go through plain matrix products: its fused kernel takes several times as long there.
    """
    if q.device.type != "cpu" or q.shape[-2] > PLAIN_TOKENS:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill_(~seen, -torch.inf)
    return scores.softmax(-1).to(v.dtype) @ v


class Answer(nn.Module):
    """Linear → dropout → RMSNorm → SiLU → linear → sigmoid: [B, D] → [B]."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden)
        self.dropout = nn.Dropout(dropout)
        self.norm = Norm(hidden, eps=EPS)
        self.last = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Numbers in (0, 1)."""
        return torch.sigmoid(self.last(F.silu(self.norm(self.dropout(self.hidden(x)))))).squeeze(-1)


class MeanHead(nn.Module):
    """The mean over real tokens, then MHAR's last layers; shapes as of `MHAR`."""

    def __init__(self, width: int, hidden: int = 1024, dropout: float = 0.2) -> None:
        super().__init__()
        self.answer = Answer(width, hidden, dropout)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions [B] of hidden states [B, T, D]."""
        return self.answer(self.pooled(states, mask))

    def pooled(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """What the last layers read, [B, D]."""
        return mean_over_tokens(states, mask)


class LinearHead(nn.Module):
    """The mean over real tokens, one linear layer, sigmoid; shapes as of `MHAR`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.last = nn.Linear(width, 1)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Tensor:
        """Predictions [B] of hidden states [B, T, D]."""
        return torch.sigmoid(self.last(mean_over_tokens(states, mask))).squeeze(-1)


@dataclass(frozen=True, slots=True)
class Votes:
    """What an ensemble says.

    Attributes:
        logits: the mean over its members, [B].
        members: each member's prediction, [B, M].
    """

    logits: Tensor
    members: Tensor


class EnsembleHead(nn.Module):
    """Several heads on the same hidden states, each with first weights of its own, and trained by itself.

    Source: Lakshminarayanan et al. 2017, "Deep Ensembles" (arXiv:1612.01474), of heads alone.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, states: Tensor, mask: Tensor | None = None) -> Votes:
        """The heads' predictions of hidden states [B, T, D], and their mean."""
        members = torch.stack([head(states, mask) for head in self.heads], dim=1)
        return Votes(members.mean(1), members)


def mean_over_tokens(states: Tensor, mask: Tensor | None) -> Tensor:
    """The mean hidden state of each row, [B, D], padding left out."""
    if mask is None:
        return states.mean(1)
    shares = mask.to(states.dtype) / mask.sum(1, keepdim=True)  # [B, T]
    return (shares[:, None] @ states).squeeze(1)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions 0 to T − 1 on [B, H, T, W]: pairs (i, i + W/2) turn by position / 10000^(2i/W).

    Source: Su et al. 2021, "RoFormer" (arXiv:2104.09864), in the half-split layout of Llama.
    """
    length, half = x.shape[-2], x.shape[-1] // 2
    frequencies = THETA ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = torch.arange(length, device=x.device, dtype=torch.float32)[:, None] * frequencies  # [T, W / 2]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


def make_head(
    name: str, width: int, heads: int = 4, hidden: int = 1024, dropout: float = 0.2, ensemble: int = 1
) -> nn.Module:
    """A head by name, see `HEADS`, or several of them; first weights come from torch's global generator."""
    if ensemble > 1:
        return EnsembleHead([make_head(name, width, heads, hidden, dropout) for _ in range(ensemble)])
    if name == "mhar":
        return MHAR(width, heads, hidden, dropout)
    if name == "mean":
        return MeanHead(width, hidden, dropout)
    if name == "linear":
        return LinearHead(width)
    raise ModelError(unknown_name("head", name, HEADS))
