"""Five text classification tasks and MiniLM, a real encoder of 22 M weights: rows, tokens, features, two models."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perdure.errors import DataError, ModelError
from perdure.models.backbone import INSTALL, minilm_folder
from perdure.order import arrange, take
from perdure.types import Example

TASKS = ("agnews", "dbpedia", "yelp", "amazon", "imdb")
PARTS = ("train", "test")
# Features are taken once; a LoRA run pays for every token at every step.
FEATURE_TOKENS, LORA_TOKENS = 64, 32
WIDTH, HIDDEN = 384, 256
# Of a task's 1,000 training and 500 test rows the first, in an order by key, are for the report and the others for
# tuning, so that no row has a say in both.
REPORT = {"train": 500, "test": 300}


def find_data() -> Path:
    """The folder of the tasks' files.

    Raises:
        DataError: it is not there.
    """
    beside = Path(__file__).resolve().parents[2] / "shared"
    shared = Path(os.environ.get("PERDURE_SHARED", beside))
    path = shared / "data" / "cl_benchmark"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; name the one that holds data/cl_benchmark in PERDURE_SHARED")
    return path


def find_encoder() -> Path:
    """The folder of MiniLM's files inside its package.

    Raises:
        ModelError: the package is not installed.
    """
    folder = minilm_folder()
    if folder is None:
        raise ModelError(f"MiniLM is not installed; run: {INSTALL}")
    return folder


@cache
def read(task: str, part: str) -> list[dict[str, Any]]:
    """A task's rows as they stand in its file: id, text, label, options."""
    with gzip.open(find_data() / f"{task}_{part}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def labels() -> list[str]:
    """All labels of the five tasks, each once: yelp's and amazon's are the same five."""
    return list(dict.fromkeys(option for task in TASKS for option in read(task, "train")[0]["options"]))


class Pooled(nn.Module):
    """MiniLM's mean over a text's real tokens, of length √384: [B, 1 + T] of length and token ids to [B, 384]."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor) -> Tensor:
        """The mean of the last layer's states; the mask follows from the length, whatever the padding's id is."""
        length, ids = x[:, :1], x[:, 1:]  # [B, 1], [B, T]
        real = torch.arange(ids.shape[1], device=ids.device)[None] < length  # [B, T]
        # As a finished mask of four dimensions, since what builds one from two branches on its values, which
        # `torch.func.vmap` (Fisher information by example) refuses.
        mask = torch.zeros(real.shape).masked_fill(~real, torch.finfo(torch.float32).min)[:, None, None]
        states = self.encoder(input_ids=ids, attention_mask=mask.expand(-1, 1, ids.shape[1], -1)).last_hidden_state
        # Of one length for all, so that a head on top needs no scale of its own: a coordinate is about 1.
        return nn.functional.normalize((states * real[..., None]).sum(1), dim=-1) * WIDTH**0.5


def load_encoder() -> nn.Module:
    """MiniLM without its pooler, and without dropout: the few rows are the noise that there is."""
    from transformers import BertConfig, BertModel

    folder = find_encoder()
    config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = BertModel(config, add_pooling_layer=False)
    # Not by `from_pretrained`, which reports the pooler's weights at length.
    state = load_file(folder / "model.safetensors")
    missing = model.load_state_dict(state, strict=False).missing_keys
    if missing:
        raise ModelError(f"{folder}: the encoder's weights lack {missing[0]!r}; install the package anew")
    return model


def frozen_model(num_labels: int) -> nn.Module:
    """What is trained on frozen features: 384 → 256 → labels."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_labels))


def lora_model(num_labels: int) -> nn.Module:
    """MiniLM with LoRA on queries and values (r 8), mean pooling and a linear head."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["query", "value"])
    encoder: Any = get_peft_model(load_encoder(), config)
    return nn.Sequential(Pooled(encoder), nn.Linear(WIDTH, num_labels))


MODELS: dict[str, Callable[[int], nn.Module]] = {"features": frozen_model, "tokens": lora_model}


def prepare(folder: Path, kind: str) -> None:
    """Write the tokens or the features of all rows, once."""
    path = folder / f"{kind}.safetensors"
    if path.exists():
        return
    if kind == "tokens":
        _save(path, {f"{task}/{part}": _tokens(task, part, LORA_TOKENS) for task, part in _all()})
    else:
        model = Pooled(load_encoder()).eval()
        said = "MiniLM's features of all rows, once"
        _save(path, {f"{t}/{p}": _features(model, _tokens(t, p, FEATURE_TOKENS)) for t, p in track(_all(), said)})


def _all() -> list[tuple[str, str]]:
    return [(task, part) for task in TASKS for part in PARTS]


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    save_file(tensors, aside)
    aside.replace(path)


def _tokens(task: str, part: str, count: int) -> Tensor:
    """[N, 1 + T]: the number of tokens, then their ids, padded to `count`."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(find_encoder() / "tokenizer.json"))
    tokenizer.enable_truncation(count)
    tokenizer.enable_padding(length=count)
    found = tokenizer.encode_batch([row["text"] for row in read(task, part)])
    return torch.tensor([[sum(each.attention_mask), *each.ids] for each in found], dtype=torch.int64)


def _features(model: nn.Module, tokens: Tensor) -> Tensor:
    """[N, 384], as `Pooled` gives them."""
    with torch.no_grad():
        return torch.cat([model(chunk) for chunk in tokens.split(50)])


def examples(
    folder: Path, kind: str, task: str, part: str, count: int, seed: int, tuning: bool = False
) -> list[Example]:
    """A task's rows as tensors.

    Args:
        folder: where `prepare` wrote.
        kind: "features" or "tokens".
        task: one of TASKS.
        part: "train" or "test".
        count: rows at most.
        seed: which of them, where there are more.
        tuning: of the rows that are not for the report.
    """
    tensors = _load(folder / f"{kind}.safetensors")[f"{task}/{part}"]
    names = {label: index for index, label in enumerate(labels())}
    rows = [
        Example(row["id"], task, x=x, y=torch.tensor(names[row["label"]]))
        for row, x in zip(read(task, part), tensors, strict=True)
    ]
    ordered = arrange(rows, "study", part, key=_key)
    own: Sequence[Example] = ordered[REPORT[part] :] if tuning else ordered[: REPORT[part]]
    return take(own, count, seed, "study", part, key=_key)


@cache
def _load(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def _key(row: Example) -> str:
    return row.key
