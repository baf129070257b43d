"""Fixtures that several rooms' tests need."""

from __future__ import annotations

import gc
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores. Torch reads this when it is imported, here and in the processes that tests start.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Torch and transformers hold many objects: to look less often for what can go saves a twentieth of the time.
gc.set_threshold(10_000, 10, 10)

LONG = {"test_teach.py", "test_examples.py", "test_mix.py"}
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the laws of one strategy in one world beside each other: the worker that has them shares their runs.

    Files with long tests come first, so that no worker waits for one at the end.
    """
    places, laws = [], []
    pairs: dict[tuple[Path, int, int], int] = {}
    for place, item in enumerate(items):
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if {"make_strategy", "world"} <= given.keys():
            pair = (item.path, id(given["make_strategy"]), id(given["world"]))
            places.append(place)
            laws.append((pairs.setdefault(pair, len(pairs)), item))
    for place, (_, item) in zip(places, sorted(laws, key=lambda law: law[0]), strict=True):
        items[place] = item
    items.sort(key=lambda item: item.path.name not in LONG)


def _below_shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(
            f"{'/'.join(('shared', *parts))} is not beside the repository: real data and models are not shipped"
        )
    return path


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the repository."""
    return _below_shared()


@pytest.fixture(scope="session")
def bitstories() -> Path:
    """A real 3.3M-parameter causal LM."""
    return _below_shared("models", "bitstories-3.3M")


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """A real 0.26M-parameter causal LM."""
    return _below_shared("models", "stories260K")


LANGUAGE_MODELS = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "mistral": "Mistral",
    "bitnet": "BitNet",
    "lfm2": "Lfm2",
    "phi3": "Phi3",
}


@pytest.fixture(scope="session")
def make_lm() -> Callable[..., Any]:
    """Build a random causal LM of a few thousand weights: `make_lm(kind, seed, spread, **config)`, in eval mode.

    `spread` is the standard deviation of its matrices; 0.3 makes answers that vary with the prompt.
    """
    import torch
    import transformers

    def make(kind: str = "llama", seed: int = 0, spread: float | None = None, **changes: Any) -> Any:
        settings: dict[str, Any] = {
            "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
            "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
        }  # fmt: skip
        if kind == "lfm2":
            settings["layer_types"] = ["conv", "full_attention"]
        name = LANGUAGE_MODELS[kind]
        torch.manual_seed(seed)
        config = getattr(transformers, f"{name}Config")(**{**settings, **changes})
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        if spread is not None:
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=spread)
        return model

    return make


@pytest.fixture(scope="session")
def make_mlp() -> Callable[..., Any]:
    """Build a small seeded network: `make_mlp(inputs, outputs, seed)`."""
    import torch
    from torch import nn

    def make(inputs: int = 5, outputs: int = 3, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

    return make


@pytest.fixture(scope="session")
def make_lm_rows() -> Callable[..., Any]:
    """Build causal-LM examples of ragged lengths, part of each not learnt: `make_lm_rows(count, seed)`."""
    import torch

    from perdure.types import Example

    def make(count: int, seed: int = 0, task: str = "t", longest: int = 12) -> Any:
        rng = torch.Generator().manual_seed(seed)
        rows = []
        for i in range(count):
            length = int(torch.randint(4, longest + 1, (), generator=rng))
            ids = torch.randint(3, 40, (length,), generator=rng)
            labels = ids.clone()
            labels[: int(torch.randint(1, length - 1, (), generator=rng))] = -100
            rows.append(Example(f"{task}-{seed}-{i}", task, x=ids, y=labels))
        return rows

    return make


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> Iterator[None]:
    """Nothing is read here after the machine went down; what is no open file is refused as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: os.fstat(file) and None)
        yield


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and not drawn, for tests that look at other things: their layout takes most of a small run.

    A fixture of a module or session is made without this one, so that its figures are drawn.
    """
    from matplotlib.figure import Figure

    def blank(self: Figure, stream: Any, **_: Any) -> None:
        stream.write(b"\x89PNG\r\n\x1a\n")

    monkeypatch.setattr(Figure, "savefig", blank)


@dataclass(frozen=True)
class Done:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def perdure() -> Callable[..., Done]:
    """Run the command line in this process, exactly as the installed command does: `perdure("run", recipe, …)`."""
    from perdure.cli import main

    def run(*arguments: str | Path) -> Done:
        out, err = StringIO(), StringIO()
        with (
            patch.object(sys, "argv", ["perdure", *map(str, arguments)]),
            patch.dict(os.environ, {"COLUMNS": "80"}),
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
            pytest.raises(SystemExit) as stopped,
        ):
            main()
        code = stopped.value.code
        assert isinstance(code, int)
        return Done(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture(scope="session")
def recipe(make_lm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe of two tasks and a probe on a model of a few thousand weights; 8 steps, over in a second."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("recipe")
    make_lm("llama").save_pretrained(folder / "model")
    words = {f"w{i}": i for i in range(37)} | {"<s>": 37, "</s>": 38, "?": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder / "model")

    def rows(first: int, count: int, step: int) -> str:
        pairs = [(f"w{i % 37} w{(i + step) % 37}", f"w{(i + 2 * step) % 37}") for i in range(first, first + count)]
        return "".join(json.dumps({"prompt": f"{p} ", "answer": a}) + "\n" for p, a in pairs)

    for name, step in (("ones", 1), ("threes", 3), ("fives", 5)):
        (folder / f"{name}.jsonl").write_text(rows(0, 16, step))
        (folder / f"{name}-held.jsonl").write_text(rows(20, 8, step))
    (folder / "probe.jsonl").write_text(rows(0, 8, 2))
    path = folder / "tiny.yaml"
    path.write_text(
        "model: " + json.dumps(str(folder / "model")) + "\n"
        "stream:\n"
        "  tasks:\n"
        "    - {name: ones, train: ones.jsonl, evaluation: ones-held.jsonl}\n"
        "    - {name: threes, train: threes.jsonl, evaluation: threes-held.jsonl}\n"
        "probe: {name: probe, train: probe.jsonl}\n"
        "batch_size: 4\n"
        "optimizer: {lr: 0.01}\n"
        "continual_strategy: {replay: {capacity: 8}}\n"
        "strategy: replay\n"
    )
    return path


@pytest.fixture(scope="session")
def finished_run(perdure: Callable[..., Done], recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe, run, with what was printed in printed.txt; a test that changes it takes a copy."""
    out = tmp_path_factory.mktemp("finished") / "run"
    done = perdure("run", recipe, "--out", out)
    assert (done.code, done.err) == (0, "")
    (out / "printed.txt").write_text(done.out)
    return out
