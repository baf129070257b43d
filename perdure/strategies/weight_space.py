"""LoRA seen from the full weights: what an adapter adds to them, and how a pull on that reaches its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError

WEIGHT = ".base_layer.weight"


def layers(model: nn.Module) -> dict[str, Any]:
    """The layers with a LoRA adapter, by the name of their full weight's parameter."""
    return {f"{name}{WEIGHT}": module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def check(model: nn.Module) -> None:
    """Refuse models without LoRA, and adapters whose change of the weights is not scaling · B·A.

    Raises:
        StrategyError: says which layer.
    """
    found = layers(model)
    if not found:
        raise StrategyError(
            'ewc: space "weight": the model has no LoRA adapter, and without one the parameters are the weights; '
            'use space "parameter", or tune with LoRA (--tuning lora)'
        )
    own = {name for name, _ in model.named_parameters()}
    for name, layer in found.items():
        if name not in own:
            raise StrategyError(
                f'ewc: space "weight": the weight of {name.removesuffix(WEIGHT)} is shared with another layer; use '
                'space "parameter", or leave that layer without an adapter'
            )
        plain = len(layer.lora_A) and all(isinstance(factor, nn.Linear) for factor in layer.lora_A.values())
        if not plain or any(layer.use_dora.values()) or getattr(layer, "lora_variant", None):
            raise StrategyError(
                f'ewc: space "weight": the adapter on {name.removesuffix(WEIGHT)} is no plain LoRA of a linear '
                'layer; use space "parameter"'
            )


def values(model: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ΔW of every adapted layer in place of its factors, beside the other trained parameters.

    Args:
        model: with LoRA adapters.
        own: its trained parameters by name.
    """
    found = layers(model)
    factors = {
        f"{name.removesuffix(WEIGHT)}.{kind}.{adapter}.weight"
        for name, layer in found.items()
        for kind in ("lora_A", "lora_B")
        for adapter in layer.lora_A
    }
    rest = {name: parameter for name, parameter in own.items() if name not in factors}
    with torch.no_grad():
        return rest | {
            name: sum(map(layer.get_delta_weight, layer.active_adapters)) for name, layer in found.items()
        }


def push(layer: Any, pull: Tensor) -> None:
    """Add what a pull on ΔW = scaling · B·A means for its factors: scaling · pull·Aᵀ and scaling · Bᵀ·pull.

    Args:
        layer: a linear layer with LoRA.
        pull: ∂/∂ΔW, in the layout of the layer's weight.
    """
    if layer.fan_in_fan_out:
        pull = pull.T
    for adapter in layer.active_adapters:
        a, b, scaling = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight, layer.scaling[adapter]
        for factor, gradient in ((a, scaling * (b.T @ pull)), (b, scaling * (pull @ a.T))):
            if not factor.requires_grad:
                continue
            if factor.grad is None:
                factor.grad = torch.zeros_like(factor)
            factor.grad.add_(gradient)
