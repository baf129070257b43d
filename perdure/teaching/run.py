"""The model of a finished run, to be taught on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from perdure.config import read_yaml
from perdure.errors import ConfigError, RunError
from perdure.models.load import LanguageModel, load
from perdure.teaching.settings import TeachSettings
from perdure.training.folder import RunFolder
from perdure.training.online import PREFIX

ADAPTER = "adapter_config.json"


def continued(path: Path, settings: TeachSettings) -> tuple[LanguageModel, Any]:
    """The base of a run, and its adapter or soft prompt as it was left, to be trained on.

    Of a run that trained all weights, the base is its model, and the adapter a fresh one: None.

    Raises:
        RunError: no run is here, or it has no model that can be taught on.
        ConfigError: it was tuned otherwise.
    """
    folder = RunFolder(path)
    if not folder.exists:
        raise RunError(f"{path}: no run here (it has no config.yaml)")
    place = _place(folder)
    if not (place / ADAPTER).is_file():
        return load(str(place)), None
    language = load(str(read_yaml(folder.config).get("model", "nano")))
    return replace(language, name=settings.model), _tuned(language, place, settings.tuning)


def _place(folder: RunFolder) -> Path:
    """Where the run left its model."""
    saved = sorted(
        (p for p in folder.path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()),
        key=lambda p: int(p.name.removeprefix(PREFIX)),
    )
    for place in (folder.adapter, folder.model, *reversed(saved)):
        if (place / ADAPTER).is_file() or (place / "config.json").is_file():
            return place
    raise RunError(
        f"{folder.path} has no adapter and no model of its own: let it end first. A strategy with a part for each "
        "task leaves no model that can be taught on"
    )


def _tuned(language: LanguageModel, place: Path, tuning: str) -> Any:
    from peft import PeftModel

    kind = json.loads((place / ADAPTER).read_text(encoding="utf-8")).get("peft_type")
    trained = {"PROMPT_TUNING": "soft-prompt", "LORA": "lora"}.get(kind)
    if trained is None:
        raise RunError(
            f"{place}: an adapter of kind {kind}, which is not taught on; there are lora and soft-prompt"
        )
    if trained != tuning:
        raise ConfigError(f"--tuning {tuning}: the run trained {trained}; give --tuning {trained}")
    tuned: Any = PeftModel.from_pretrained(language.model, str(place), is_trainable=trained == "lora")
    tuned.active_peft_config.base_model_name_or_path = language.source  # where it is now
    if trained == "soft-prompt":  # PEFT loads one to be looked at only
        tuned.active_peft_config.inference_mode = False
        tuned.prompt_encoder.requires_grad_(True)
    return tuned
