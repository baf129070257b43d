"""All settings of a run: what a recipe and a run's config.yaml hold."""

from __future__ import annotations

from pydantic import Field, model_validator

from perdure.config import (
    FORMAT,
    EvaluationSettings,
    HeadSettings,
    LoraSettings,
    SoftPromptSettings,
    TrainingSettings,
)
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
    head: HeadSettings = HeadSettings()
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

    @model_validator(mode="after")
    def _agree(self) -> RunSettings:
        if self.stream.reactions is None:
            if self.tuning == "head":
                raise ValueError("tuning: head is for regression, and this stream's tasks have text for answers")
            return self
        if self.tuning == "soft-prompt":
            raise ValueError("tuning: a regression takes head, lora or full; a soft prompt goes before text")
        asked, drops = self.evaluation.uncertainty, self.head.type != "linear" and self.head.dropout > 0
        if asked == "ensemble" and self.head.ensemble < 2:
            raise ValueError("evaluation.uncertainty: ensemble needs head.ensemble of 2 or more (--ensemble 5)")
        if asked == "mc-dropout" and not drops:
            raise ValueError("evaluation.uncertainty: mc-dropout needs a head with dropout; this one has none")
        if self.probe is not None:
            raise ValueError("probe: a regression has no general probe; leave it out")
        own = {"name", "train", "evaluation"}
        for task in self.extensions:
            # Not what was set: a run's config.yaml sets everything.
            more = [
                name
                for name, field in TaskSpec.model_fields.items()
                if name not in own and getattr(task, name) != field.get_default(call_default_factory=True)
            ]
            if more:
                raise ValueError(f"extensions.{task.name}: {more[0]} is for text; the run's own columns hold here")
        return self
