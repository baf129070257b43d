"""What of a model is trained: all of it, or LoRA adapters through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from perdure.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

Tuning = Literal["full", "lora"]
TUNINGS: dict[str, str] = {
    "full": "every weight is trained",
    "lora": "low-rank adapters on the linear layers (PEFT); the base is frozen",
}


def tune(
    model: Any,
    tuning: Tuning,
    *,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: list[str] | None = None,
) -> Any:
    """Make a model ready for a kind of tuning, and return what is to be trained.

    Args:
        model: a Hugging Face causal LM.
        tuning: "full" or "lora".
        r: LoRA rank.
        alpha: LoRA scale; the update is alpha / r times B·A.
        dropout: LoRA dropout.
        targets: names of the layers that get an adapter; None finds every linear layer but the output layer, since
            PEFT's own defaults leave some architectures undefined.

    Raises:
        ModelError: no layer of that name.
    """
    if tuning == "full":
        model.requires_grad_(True)
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA target modules {targets or 'all-linear'}: {error}") from error


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total number of parameters; tied weights count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers that are saved (running statistics, say)."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in saved}
