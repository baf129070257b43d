"""Continual learning for language models and any `nn.Module`: train through a stream, see what was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perdure.streams.stream import Stream
    from perdure.teaching import Teacher
    from perdure.training.trainer import ContinualTrainer
    from perdure.types import Example, Segment, Task

__all__ = ["ContinualTrainer", "Example", "Segment", "Stream", "Task", "Teacher"]

_HOMES = {
    "ContinualTrainer": "perdure.training.trainer",
    "Example": "perdure.types",
    "Segment": "perdure.types",
    "Stream": "perdure.streams.stream",
    "Task": "perdure.types",
    "Teacher": "perdure.teaching",
}


def __getattr__(name: str) -> Any:
    # Imported when first used, so that `perdure --help` does not wait for torch.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'perdure' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
