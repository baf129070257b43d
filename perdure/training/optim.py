"""Optimizers by name, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perdure.config import OptimizerSettings, ScheduleSettings
from perdure.errors import ConfigError


def build_optimizer(parameters: Sequence[Tensor], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of these settings over these parameters.

    Adafactor is used with its own step-size clipping and an absolute learning rate.
    """
    rest: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.type == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(parameters, scale_parameter=False, relative_step=False, warmup_init=False, **rest)
    if settings.fused:
        rest["fused"] = True
    if settings.type == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, **rest)
    cls = torch.optim.AdamW if settings.type == "adamw" else torch.optim.Adam
    return cls(parameters, betas=settings.betas, eps=settings.eps, **rest)


def learning_rate(settings: OptimizerSettings, schedule: ScheduleSettings, step: int, total: int | None) -> float:
    """The learning rate of optimizer step `step` (from 0) out of `total`.

    Warm-up rises linearly and reaches the full rate at its last step; "linear" and "cosine" then fall, and reach 0
    one step past the last.
    """
    if schedule.type == "constant" and schedule.warmup == 0:
        return settings.lr
    if total is None and (schedule.type != "constant" or schedule.warmup < 1):
        raise ConfigError(
            f"schedule {schedule.type!r} that continues over task boundaries needs its horizon: "
            "give schedule.total_steps, or schedule.at_boundary: reset"
        )
    warmup = schedule.warmup if schedule.warmup >= 1 else schedule.warmup * (total or 0)
    warmup = int(warmup)
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if schedule.type == "constant" or total is None:
        return settings.lr
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule.type == "linear":
        return settings.lr * (1 - done)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * done))


def named_state(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name; `names` are in the order of its parameters."""
    # Its own order is that in which parameters first had a gradient, which loading does not keep.
    saved = sorted(optimizer.state_dict()["state"].items())
    return {names[index]: dict(values) for index, values in saved}


def load_named_state(
    optimizer: torch.optim.Optimizer, names: Sequence[str], state: dict[str, dict[str, Any]]
) -> None:
    """Give the optimizer the state of the parameters it shares with `state`, by name."""
    full = optimizer.state_dict()
    full["state"] = {i: state[name] for i, name in enumerate(names) if name in state}
    optimizer.load_state_dict(full)
