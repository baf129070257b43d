"""Find and load a causal language model: the embedded nano, a local folder, or a hub name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perdure.errors import ModelError
from perdure.storage import file_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NANO = Path(__file__).parent / "nano"
EMBEDDED = {"nano": NANO}
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HUB_SECONDS = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class LanguageModel:
    """A model with its tokenizer.

    Attributes:
        name: as asked for.
        source: folder or hub name that it was loaded from.
        model: in fp32, eval mode.
        tokenizer: its tokenizer.
        max_length: longest sequence it takes, in tokens.
    """

    name: str
    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int


def resolve(name: str) -> str:
    """The folder or hub name that `name` stands for; ModelError where it cannot be a model."""
    if name in EMBEDDED:
        return str(EMBEDDED[name])
    path = Path(name).expanduser()
    if path.is_dir():
        missing = _missing(path)
        if missing:
            raise ModelError(
                f"model folder {name!r} holds no {missing}. A model folder needs config.json, model.safetensors "
                "(or its shards with model.safetensors.index.json) and tokenizer files, as `save_pretrained` "
                "writes them."
            )
        return str(path.resolve())
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"model {name!r} is not a folder here, not a hub name (owner/name), and not embedded "
            f"({', '.join(EMBEDDED)}). Give the path of a model folder with --model."
        )
    return name


def _missing(path: Path) -> str | None:
    if not (path / "config.json").is_file():
        return "config.json"
    if not any((path / name).is_file() for name in WEIGHTS):
        return "weights (model.safetensors; pickled .bin weights are refused)"
    if not any(path.glob("tokenizer*")):
        return "tokenizer (tokenizer.json)"
    return None


def load(name: str, attention: str | None = None) -> LanguageModel:
    """Load a causal LM and its tokenizer by embedded name, folder or hub name.

    Remote code is never run and pickled weights are never read. Weights are loaded in fp32; mixed precision is
    the trainer's business.

    Args:
        name: "nano", a model's folder, or a hub name owner/name.
        attention: an attention implementation of `transformers`, such as "eager"; None: the model's default.

    Raises:
        ModelError: not found, not reachable, or not a causal LM.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from perdure.models import attention as attention_module

    source = resolve(name)
    with loading(name, source) as options:
        config = AutoConfig.from_pretrained(source, **options)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            **({"attn_implementation": attention} if attention else {}),
            **options,
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(f"model {name!r}: its tokenizer has no end-of-sequence token, which answers must end with")
    if attention is None:
        attention_module.use(model)
    return LanguageModel(name, source, model, tokenizer, max_positions(model))


@contextmanager
def loading(name: str, source: str) -> Iterator[dict[str, Any]]:
    """Options for `from_pretrained` of a resolved source; whatever goes wrong within becomes a ModelError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    local = Path(source).is_dir()
    reachable = local or _hub_answers(source)
    try:
        # A hub model that was fetched before is loaded from the cache where the hub cannot be reached.
        yield {"trust_remote_code": False, "local_files_only": local or not reachable}
    except Exception as error:
        # Transformers raises many types here (OSError, ValueError, KeyError, safetensors' own); all are the
        # same to the user: this model cannot be loaded.
        raise ModelError(_explain(name, local, reachable, error)) from error


def identify(language: LanguageModel) -> dict[str, str]:
    """What the base model is, whatever its folder is called: SHA-256 of its files, or the hub commit."""
    path = Path(language.source)
    if not path.is_dir():
        return {"hub commit": str(getattr(language.model.config, "_commit_hash", None))}
    named = {file for pattern in ("*.safetensors", "config.json", "tokenizer*") for file in path.glob(pattern)}
    return {f.name: _hash(f, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(named)}


@lru_cache(maxsize=64)
def _hash(file: Path, size: int, changed: int) -> str:
    """The hash of a file of this size and time of change, worked out once: weights may be many gigabytes."""
    return file_hash(file)


def max_positions(model: Any) -> int:
    """The longest sequence that the model's config allows, in tokens (2,048 where it does not say)."""
    return _positions(model.config)


def positions_of(name: str) -> int:
    """`max_positions` of the model of that name, without its weights; ModelError as in `load`."""
    from transformers import AutoConfig

    source = resolve(name)
    with loading(name, source) as options:
        return _positions(AutoConfig.from_pretrained(source, **options))


def _positions(config: Any) -> int:
    for attribute in ("max_position_embeddings", "n_positions", "max_seq_len"):
        value = getattr(config.get_text_config(), attribute, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2048


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached: one short try, since its client would go on trying for half a minute."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_SECONDS)
    except HfHubHTTPError:
        return True  # an answer, if not the hoped-for one: the loader says what is wrong
    except Exception:
        # The client's network errors have no common type over its versions.
        return False
    return True


def _explain(name: str, local: bool, reachable: bool, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if local:
        return f"model folder {name!r} cannot be loaded: {reason}"
    if not reachable:
        reason = "the hub cannot be reached, and the model is not in its cache"
    return (
        f"model {name!r} is not a folder here and could not be fetched from the hub ({reason}). "
        "Check the name and the network, or download it elsewhere and give the folder's path with --model."
    )
