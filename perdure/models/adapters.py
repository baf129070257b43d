"""What of a model is trained: all of it, or LoRA adapters or a soft prompt through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from perdure.errors import ConfigError, ModelError, unknown_name
from perdure.models.load import max_positions

if TYPE_CHECKING:
    from torch import Tensor, nn

Tuning = Literal["full", "lora", "soft-prompt", "head"]
Init = Literal["vocabulary", "random", "text"]
TUNINGS: dict[str, str] = {
    "full": "every weight is trained",
    "lora": "low-rank adapters on the linear layers (PEFT); the base is frozen",
    "soft-prompt": "embeddings before every row (PEFT); the base is frozen",
    "head": "a regression head on the hidden states of the frozen base",
}
LEAST_ROOM = 8  # tokens of text that a soft prompt must leave room for


def tune(
    model: Any,
    tuning: Tuning,
    *,
    r: int = 8,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: list[str] | None = None,
    tokens: int = 8,
    init: Init = "vocabulary",
    text: str | None = None,
    tokenizer: Any = None,
) -> Any:
    """Make a model ready for a kind of tuning, and return what is to be trained.

    Args:
        model: a Hugging Face causal LM.
        tuning: "full", "lora" or "soft-prompt".
        r: LoRA rank.
        alpha: LoRA scale; the update is alpha / r times B·A.
        dropout: LoRA dropout.
        targets: names of the layers that get an adapter; None finds every linear layer but the output layer, since
            PEFT's own defaults leave some architectures undefined.
        tokens: length of the soft prompt, in virtual tokens; each takes one of the model's positions.
        init: what the soft prompt starts from: embeddings of pieces drawn from the vocabulary ("vocabulary"),
            normal numbers as widely spread as those ("random"), or the embeddings of `text` ("text"), repeated or
            cut to `tokens`. Draws come from torch's global generator.
        text: for "text".
        tokenizer: for "text"; the model's.

    Raises:
        ConfigError: no tuning of that name; "text" without text or tokenizer.
        ModelError: no layer of that name; a soft prompt that the model has no room for.

    Sources:
        LoRA: Hu et al. 2021 (arXiv:2106.09685). Soft prompts: Lester et al. 2021 (arXiv:2104.08691).
    """
    if tuning == "full":
        model.requires_grad_(True)
        return model
    if tuning == "lora":
        return add_lora(model, r, alpha, dropout, targets)
    if tuning == "head":
        raise ConfigError("tuning head is for regression: this stream's tasks have text for answers")
    if tuning == "soft-prompt":
        return _with_soft_prompt(model, tokens, init, text, tokenizer)
    raise ConfigError(unknown_name("tuning", tuning, TUNINGS))


def add_lora(
    model: Any, r: int, alpha: int, dropout: float, targets: list[str] | None, *, generates: bool = True
) -> Any:
    """A model with LoRA adapters, see `tune`; `generates` says whether it is a causal LM, with its output layer."""
    from peft import LoraConfig, TaskType, get_peft_model
    from torch import nn

    from perdure.models.dropout import Dropout

    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM if generates else TaskType.FEATURE_EXTRACTION,
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or "all-linear",
    )
    try:
        tuned = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA target modules {targets or 'all-linear'}: {error}") from error
    for module in list(tuned.modules()):
        if isinstance(module, nn.ModuleDict):
            module.update({name: Dropout(part.p) for name, part in module.items() if type(part) is nn.Dropout})
    return tuned


def _with_soft_prompt(model: Any, tokens: int, init: Init, text: str | None, tokenizer: Any) -> Any:
    import torch
    from peft import PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

    positions = max_positions(model)
    if tokens > positions - LEAST_ROOM:
        raise ModelError(
            f"soft_prompt.tokens: {tokens} virtual tokens are too many for a model of {positions} positions, of "
            f"which {LEAST_ROOM} at least must be left for text; give at most {positions - LEAST_ROOM}"
        )
    words = model.get_input_embeddings()
    ids = _text_ids(text, tokenizer, tokens) if init == "text" else None
    model.requires_grad_(False)
    config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM,
        num_virtual_tokens=tokens,
        prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB,
        token_dim=words.weight.shape[1],  # PEFT would take the hidden size, which may be another
    )
    try:
        tuned: Any = get_peft_model(model, config)
    except (ValueError, AttributeError) as error:
        raise ModelError(f"soft prompt: PEFT cannot put one before this model: {error}") from error
    if tuned.word_embeddings is not words:
        # PEFT takes the first table that has as many rows as the vocabulary has pieces.
        raise ModelError("soft prompt: PEFT takes another table of this model for its embeddings; use lora")
    with torch.no_grad():
        weight = tuned.prompt_encoder[tuned.active_adapter].embedding.weight  # [P, D]
        if init == "random":
            weight.normal_(std=float(weight.std()))
        elif ids is not None:
            weight.copy_(words(ids.to(words.weight.device)))
    return tuned


def _text_ids(text: str | None, tokenizer: Any, tokens: int) -> Tensor:
    """The text's ids, repeated or cut to so many: int64 [tokens]."""
    import torch

    if text is None or tokenizer is None:
        raise ConfigError("soft_prompt.init: text needs soft_prompt.text, and a tokenizer to read it with")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(f"soft_prompt.text: the tokenizer makes nothing of {text!r}; give some words")
    return torch.tensor((list(ids) * tokens)[:tokens])


def soft_prompt(model: Any) -> Tensor | None:
    """The soft prompt before every row, [P, D] for P virtual tokens; None where the model has none."""
    config = getattr(model, "active_peft_config", None)
    if config is None or config.peft_type != "PROMPT_TUNING":
        return None
    prompt: Tensor = model.get_prompt(batch_size=1)[0]
    return prompt


def count_virtual_tokens(model: Any) -> int:
    """How many positions a soft prompt takes before every row."""
    prompt = soft_prompt(model)
    return 0 if prompt is None else len(prompt)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable and total number of parameters; tied weights count once."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)


def moving(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters, and buffers that are saved (running statistics, say)."""
    found: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    saved = model.state_dict()
    return found | {name: buffer for name, buffer in model.named_buffers() if name in saved}
