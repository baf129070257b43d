"""All settings of a run: what a recipe and a run's config.yaml hold."""

from __future__ import annotations

from pydantic import Field

from perdure.config import FORMAT, EvaluationSettings, LoraSettings, SoftPromptSettings, TrainingSettings
from perdure.models.adapters import Tuning
from perdure.streams.spec import StreamSpec, TaskSpec


class RunSettings(TrainingSettings):
    """A whole run: model, stream, strategy, training, evaluation."""

    format: int = FORMAT
    name: str | None = None
    description: str = ""
    model: str = "nano"
    tuning: Tuning = "full"
    lora: LoraSettings = LoraSettings()
    soft_prompt: SoftPromptSettings = SoftPromptSettings()
    strategy: str = "naive"
    stream: StreamSpec
    extensions: tuple[TaskSpec, ...] = ()
    # Fingerprints of the keys of rows that the run has to do without; see `perdure erase`.
    erased: tuple[str, ...] = ()
    probe: TaskSpec | None = None
    epochs: int = Field(1, ge=1)
    max_length: int | None = Field(None, ge=8)
    evaluation: EvaluationSettings = EvaluationSettings()
    seed: int = Field(0, ge=0, lt=1 << 63)
    data: str | None = None
    log_every: int = Field(1, ge=1)
    checkpoint_every: int | None = Field(None, ge=1)
    checkpoint_keep: int = Field(2, ge=1)
