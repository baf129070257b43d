"""Orthogonal LoRA: each task has an adapter of its own, kept apart from the frozen ones before it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from perdure.errors import StrategyError
from perdure.strategies.base import Strategy
from perdure.strategies.settings import number
from perdure.types import Batch, Context, Objective


class OLoRA(Strategy):
    """loss + strength · Σ ‖A_old A_newᵀ‖₁ over all adapted layers and all older adapters, which stay as they are.

    A layer computes W₀x + Σ_t s·B_t A_t x: every adapter takes part in every forward pass, so that no task is named
    when the model answers. The first task is plain LoRA.

    Args:
        strength: λ, at least 0; 0 stacks adapters without keeping them apart.

    Source: Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning"
    (arXiv:2310.14152), with the absolute values of the authors' code; the paper's equation squares them.
    """

    name: ClassVar[str] = "olora"
    summary: ClassVar[str] = "a LoRA adapter a task; older ones are frozen, the new one is kept orthogonal to them"
    needs: ClassVar[str] = "LoRA on linear layers; an adapter's weights a task; no task ids"
    cost: ClassVar[str] = "every task's adapter in each forward pass; two products of small matrices a layer a step"
    source: ClassVar[str] = "Wang et al. 2023 (arXiv:2310.14152)"

    renames: bool = True

    adds_to_forward: bool = True
    needs_boundaries = True

    def __init__(self, strength: float = 0.5) -> None:
        self.strength = number("olora", "strength", strength)
        self._adapters: list[str] = []  # PEFT's names, oldest first
        self._tasks: list[str] = []
        self._layers: list[Any] = []

    def check(self, model: nn.Module, objective: Objective) -> None:
        """There must be one PEFT model with one adapter, plain LoRA on linear layers."""
        config = _first_config(model)
        for name, layer in _adapted(model).items():
            factors = [*layer.lora_A.values(), *layer.lora_B.values()]
            plain = factors and all(isinstance(factor, nn.Linear) and factor.bias is None for factor in factors)
            if not plain or any(layer.use_dora.values()) or getattr(layer, "lora_variant", None):
                raise StrategyError(
                    f"olora: the adapter on {name} is no plain LoRA of a linear layer; leave that layer without an "
                    "adapter, or use plain LoRA"
                )
        more = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
        if more or config.bias != "none":
            raise StrategyError(
                f"olora: the adapter's {more[0] if more else 'bias'} would be trained in every task's adapter, and "
                "only one can be in use; leave it out, or train such a layer outside of the PEFT model"
            )

    def prepare(self, ctx: Context) -> None:
        """From the second task on: freeze the newest adapter and add one, drawn from the strategy's generator."""
        model = _peft_models(ctx.model)[0]
        self._layers = list(_adapted(model).values())
        self._tasks[ctx.index :] = [ctx.task.name]
        if not ctx.index:
            self._adapters = [next(iter(model.peft_config))]
            return
        for left in self._adapters[ctx.index :]:  # of a task that failed and is begun again
            model.delete_adapter(left)
        self._adapters = self._adapters[: ctx.index]
        first, newest, name = self._adapters[0], self._adapters[-1], f"task{ctx.index}"
        config = copy.deepcopy(model.peft_config[first])
        config.init_lora_weights, config.inference_mode = True, False
        trained = {parameter for parameter in ctx.model.parameters() if parameter.requires_grad}
        with torch.random.fork_rng(devices=[]):  # PEFT draws from the global generator
            model.add_adapter(name, config)
        self._adapters.append(name)
        model.base_model.set_adapter(self._adapters)
        for parameter in ctx.model.parameters():  # both of these decide anew on what is trained
            parameter.requires_grad_(parameter in trained)
        for layer in self._layers:
            for factors in (layer.lora_A, layer.lora_B):
                factors[name].requires_grad_(factors[newest].weight in trained)
                factors[newest].requires_grad_(False)
            layer.lora_dropout[name] = copy.deepcopy(layer.lora_dropout[first])
            weight = layer.lora_A[name].weight
            drawn = torch.empty(weight.shape)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=ctx.rng)
            with torch.no_grad():
                weight.copy_(drawn)

    def gradient(self, ctx: Context, batches: Sequence[Batch]) -> None:
        """Add strength · sign(A_new A_oldᵀ) A_old to the newest A's gradient in each layer."""
        if len(self._adapters) < 2 or not self.strength:
            return
        *older, newest = self._adapters
        values: list[Tensor] = []
        with torch.no_grad():
            for layer in self._layers:
                new = layer.lora_A[newest].weight  # [r, in]
                if not new.requires_grad:
                    continue
                old = torch.cat([layer.lora_A[name].weight for name in older])  # [Σr, in]
                overlap = new @ old.T
                pull = self.strength * (overlap.sign() @ old)
                new.grad = pull if new.grad is None else new.grad.add_(pull)
                values.append(overlap.abs().sum())
        ctx.log("penalty", self.strength * float(sum(values)))

    def usage(self, model: nn.Module) -> dict[str, dict[str, int]]:
        """Weights of each task's adapter in each layer."""
        return {
            name: {
                task: layer.lora_A[adapter].weight.numel() + layer.lora_B[adapter].weight.numel()
                for task, adapter in zip(self._tasks, self._adapters, strict=True)
            }
            for name, layer in _adapted(model).items()
        }

    def export(self, model: Any, folder: Path) -> None:
        """Write one PEFT adapter that is the sum of all: s·B_t side by side, A_t on top of one another.

        Its rank is the sum of the ranks, its scale 1; the model is only read.
        """
        from safetensors.torch import save_file

        inner = _peft_models(model)[0]
        config = copy.deepcopy(inner.peft_config[next(iter(inner.peft_config))])
        tensors: dict[str, Tensor] = {}
        ranks: dict[str, int] = {}
        for name, layer in _adapted(inner).items():
            used = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
            down = [layer.lora_A[adapter].weight.detach() for adapter in used]
            up = [layer.scaling[adapter] * layer.lora_B[adapter].weight.detach() for adapter in used]
            tensors[f"{name}.lora_A.weight"] = torch.cat(down).cpu().contiguous()
            tensors[f"{name}.lora_B.weight"] = torch.cat(up, 1).cpu().contiguous()
            ranks[name.removeprefix("base_model.model.")] = sum(len(factor) for factor in down)
        config.r = config.lora_alpha = max(ranks.values())
        config.rank_pattern = {name: rank for name, rank in ranks.items() if rank != config.r}
        config.alpha_pattern = dict(config.rank_pattern)
        config.use_rslora, config.init_lora_weights, config.inference_mode = False, True, True
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def _adapted(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def _peft_models(model: nn.Module) -> list[Any]:
    from peft import PeftModel

    return [module for module in model.modules() if isinstance(module, PeftModel)]


def _first_config(model: nn.Module) -> Any:
    """The settings of the model's one adapter."""
    found = _peft_models(model)
    if len(found) > 1:
        raise StrategyError(f"olora: the model holds {len(found)} PEFT models; wrap one part of it only")
    if not found or not _adapted(found[0]):
        raise StrategyError("olora: the model has no LoRA adapter; tune with LoRA (--tuning lora, or PEFT)")
    configs = found[0].peft_config
    if len(configs) != 1:
        raise StrategyError(
            f"olora: the model has {len(configs)} adapters ({', '.join(configs)}), and adds those of later tasks "
            "itself; begin with one"
        )
    return next(iter(configs.values()))
