"""Orthogonal subspace fine-tuning: the strongest directions of each weight stay, the rest is trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.strategies.settings import number, whole
from perdure.types import Batch, Context, Objective, Output

# They read the weights of their layers past the layers' own forward pass, where a wrapped layer would be bypassed.
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class OSF(Strategy):
    """Before each task W = U_high S_high V_high + U_low S_low V_low by SVD; only the second part is trained.

    U_low and V_low stay orthogonal to U_high and V_high, so that all that a task changes is
    (I − U_high U_highᵀ) ΔW (I − V_highᵀ V_high). PEFT's OSF layers hold the factors and project the gradients; an
    adaptive optimizer's step leaves the complement all the same, so the factors are projected after each step too.

    Args:
        effective_rank: share of each weight's directions that is preserved at task `start`, between 0 and 1,
            rounded down; a layer of which that is none is trained whole.
        growth: what the share grows by at each later task; one direction at least stays free.
        start: the task, from 0, before which weights are decomposed first; at 0 the given model's are preserved.
        rest: whether what has no such layer (embeddings, norms, biases, convolutions) is "frozen" from then on, as
            PEFT does, or "trained".

    Source: Nayak et al. 2025, "Sculpting Subspaces" (arXiv:2504.07097). Its shares by layer, measured on data, are
    left out.
    """

    name: ClassVar[str] = "osf"
    wants_outputs = False
    summary: ClassVar[str] = "each weight's strongest singular directions stay; tasks are learnt in the others"
    needs: ClassVar[str] = "the factors of each linear layer; all weights tuned; no task ids"
    cost: ClassVar[str] = "factors in every linear layer's forward pass; an SVD of each weight at a task's start"
    source: ClassVar[str] = "Nayak et al. 2025 (arXiv:2504.07097)"

    renames: bool = True
    adds_to_forward: bool = True
    owns_training: bool = True

    def __init__(
        self,
        effective_rank: float = 0.5,
        growth: float = 0.0,
        start: int = 1,
        rest: Literal["frozen", "trained"] = "frozen",
    ) -> None:
        self.effective_rank = number("osf", "effective_rank", effective_rank, above=True)
        if self.effective_rank >= 1:
            raise StrategyError(f"osf: effective_rank is a share and must be below 1, got {effective_rank}")
        self.growth = number("osf", "growth", growth)
        self.start = whole("osf", "start", start, least=0)
        if rest not in ("frozen", "trained"):
            raise StrategyError(f'osf: rest must be "frozen" or "trained", got {rest!r}')
        self.rest = rest
        self._tuner: Any = None
        self._adapter = ""
        self._own: list[nn.Parameter] = []
        self._layers: dict[str, Any] = {}

    @property
    def needs_boundaries(self) -> bool:
        """Not if it preserves what the model had from the beginning."""
        return self.start > 0

    def check(self, model: nn.Module, objective: Objective) -> None:
        """There must be linear layers with something to preserve, and no adapters."""
        if any(hasattr(module, "peft_config") for module in model.modules()):
            raise StrategyError("osf: it decomposes the model's own weights, not an adapter's; use --tuning full")
        if not any(self._ranks(model, self.start).values()):
            raise StrategyError(
                "osf: the model has no linear layer of its own to decompose, or none with a direction to preserve "
                f"at effective_rank {self.effective_rank:g}; choose another strategy"
            )

    def prepare(self, ctx: Context) -> None:
        """From task `start` on: fold what was learnt into the weights, and decompose them anew."""
        if ctx.index < self.start:
            return
        from peft import OSFConfig
        from peft.tuners.osf import OSFModel

        if self._tuner is not None:
            self._tuner.merge_and_unload()
        self._own = self._own or [p for p in ctx.model.parameters() if p.requires_grad]
        for parameter in self._own:
            parameter.requires_grad_(True)
        ranks = self._ranks(ctx.model, ctx.index)
        free = {p for name, rank in ranks.items() if not rank for p in ctx.model.get_submodule(name).parameters()}
        names = {name: rank for name, rank in ranks.items() if rank}
        # A name of its own for each task: moments of the optimizer must not be carried to another basis.
        self._adapter = f"task{ctx.index}"
        if names:
            config = OSFConfig(
                target_modules="|".join(map(re.escape, names)),
                rank_pattern={f"^{re.escape(name)}$": rank for name, rank in names.items()},
            )
            self._tuner = OSFModel(ctx.model, config, self._adapter)
        self._layers = {name: ctx.model.get_submodule(name) for name in names}
        decomposed = {layer.base_layer.weight for layer in self._layers.values()}
        for parameter in self._own:  # PEFT has frozen all of them
            parameter.requires_grad_(parameter not in decomposed and (self.rest == "trained" or parameter in free))

    def after_step(self, ctx: Context, batches: Sequence[Batch], outputs: Sequence[Output]) -> None:
        """Take out of the trained factors what the optimizer has brought in of the preserved directions."""
        with torch.no_grad():
            for layer in self._layers.values():
                factors = layer.osf_svd_params[self._adapter]
                for name, transposed in (("U", False), ("V", True)):
                    factor = factors[f"{name}_low"]
                    if not factor.requires_grad:
                        continue
                    high: Mapping[str, Tensor] = getattr(layer, f"_osf_{name}_high")
                    low = getattr(layer, f"_osf_{name}_low_init")[self._adapter]
                    columns = factor.T if transposed else factor
                    if self._adapter in high:
                        basis = high[self._adapter].T if transposed else high[self._adapter]
                        columns.sub_(basis @ (basis.T @ columns))
                    else:  # a square factor: PEFT holds only its other half, which spans the complement
                        basis = low.T if transposed else low
                        columns.copy_(basis @ (basis.T @ columns))

    def export(self, model: Any, folder: Path) -> None:
        """As `save_pretrained`, with each layer's factors folded into a plain weight; the model is only read."""
        tensors = dict(model.state_dict())
        for name, layer in self._layers.items():
            for key in [key for key in tensors if key.startswith(f"{name}.")]:
                del tensors[key]
            base = layer.get_base_layer()
            tensors |= {f"{name}.{key}": value for key, value in base.state_dict().items()}
            change = layer.get_delta_weight(self._adapter).detach()
            tensors[f"{name}.weight"] = (base.weight.detach() + change).to(base.weight.dtype)
        model.save_pretrained(folder, state_dict=tensors)

    def state_dict(self) -> dict[str, Any]:
        """Of each layer the weight that was decomposed and the parts that are not trained."""
        return {"layers": {name: _held(layer) for name, layer in self._layers.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back: the replayed decompositions were of weights that were not yet restored."""
        with torch.no_grad():
            for name, saved in state["layers"].items():
                for key, value in _held(self._layers[name]).items():
                    value.copy_(saved[key])

    def _ranks(self, model: nn.Module, index: int) -> dict[str, int]:
        """How many directions of each layer are preserved in a task; by config, index and shapes alone."""
        # As floats, 0.29 and 0.29 of 100 come to 57.
        share = Fraction(repr(self.effective_rank)) + Fraction(repr(self.growth)) * (index - self.start)
        sizes = {name: min(layer.weight.shape) for name, layer in linear_layers(model).items()}
        return {name: min(int(share * size), size - 1) for name, size in sizes.items()}


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The trainable linear layers inside a model, but a language model's output layer and shared weights."""
    names = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    find: Any = getattr(model, "get_output_embeddings", lambda: None)
    output = find()
    read = {child for module in model.modules() if isinstance(module, READERS) for child in module.children()}
    return {
        name: module
        for name, module in model.named_modules()
        if name and isinstance(module, nn.Linear) and module is not output and module not in read
        and module.weight.requires_grad and names.count(id(module.weight)) == 1
    }  # fmt: skip


def _held(layer: Any) -> dict[str, Tensor]:
    """What training leaves alone in a decomposed layer, or what no other state holds under this name."""
    found = {f"base_layer.{name}": p.detach() for name, p in layer.base_layer.named_parameters()}
    return found | dict(layer.named_buffers())
