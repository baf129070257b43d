"""How lessons are taught and what a lesson may cost."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from perdure.config import FORMAT, LoraSettings, Number, Settings, SoftPromptSettings

Tuning = Literal["lora", "soft-prompt"]
# What is chosen where nothing is said, for nano and for others; nano's were chosen on seeds 10 to 12.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "nano": {"lora": 5e-4, "soft-prompt": 0.03},
    "": {"lora": 2e-4, "soft-prompt": 1e-3},
}


LORA = LoraSettings(r=16, alpha=32)


class TeachSettings(Settings):
    """Settings of a teacher; a folder of lessons keeps the ones that it was begun with."""

    format: int = FORMAT
    model: str = "nano"
    run: str | None = Field(None, description="the run whose model is taught on, in place of a model")
    tuning: Tuning = "lora"
    lora: LoraSettings = LORA
    soft_prompt: SoftPromptSettings = SoftPromptSettings()
    lr: Number = Field(2e-4, gt=0, description="of AdamW, whose state begins anew with each lesson")
    precision: Literal["fp32", "bf16"] = "fp32"
    max_steps: int = Field(30, ge=1, description="optimizer steps of a lesson, at most")
    sure: Number = Field(
        0.8, gt=0, lt=1, description="a lesson ends once each token of its answers has this probability"
    )
    earlier: int = Field(8, ge=0, description="rows of earlier lessons in each step")
    general: int = Field(8, ge=0, description="rows of the probe's training side in each step")
    anchor: Number = Field(5.0, ge=0, description="weight of KL(base ‖ model) on these rows in the loss")
    gate: bool = Field(True, description="whether a lesson that does harm is refused")
    tolerance: Number = Field(
        0.02, ge=0, lt=1, description="fall of the share of right answers that is put up with"
    )
    alpha: Number = Field(0.05, gt=0, lt=1, description="of the gate's tests")
    probe_rows: int = Field(200, ge=0, description="rows of the probe that the gate looks at")
    max_new_tokens: int = Field(48, ge=1, description="of an answer")
    seed: int = Field(0, ge=0, lt=1 << 63)


def default_lr(model: str, tuning: str) -> float:
    """The learning rate of a model and a tuning where nothing is said."""
    return LEARNING_RATES["nano" if model == "nano" else ""][tuning]


def fixed(settings: TeachSettings) -> dict[str, Any]:
    """The settings that lessons depend on; the others may change from one to the next."""
    return settings.model_dump(mode="json", exclude={"max_new_tokens"})
