"""A language model of a few thousand weights that learns a lesson in a twentieth of a second, and its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

SETTINGS: dict[str, Any] = {
    "probe_rows": 20, "general": 2, "earlier": 4, "max_steps": 20, "lr": 0.02, "sure": 0.3, "anchor": 1.0,
    "lora": {"r": 8, "alpha": 16}, "max_new_tokens": 6,
}  # fmt: skip
PROBE = [{"prompt": f"w{i} w{j}", "answer": f"w{(i + j) % 37}"} for i in range(4, 12) for j in range(3)]
FACTS = [(f"w{3 * i} w{2 * i + 1} w5", f"w{20 + i}") for i in range(8)]


@pytest.fixture(scope="session")
def tiny(make_lm: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random causal LM whose words are w0 to w36."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    make_lm("llama", 0, 0.2, hidden_size=32, intermediate_size=64, num_hidden_layers=1).save_pretrained(folder)
    words = {f"w{i}": i for i in range(37)} | {"<s>": 37, "</s>": 38, "?": 39}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="?", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def facts() -> list[tuple[str, str]]:
    """Questions and answers that the small model learns."""
    return FACTS


@pytest.fixture(scope="session")
def make_teacher(tiny: Path) -> Callable[..., Any]:
    """Make a teacher of the small model: `make_teacher(out=None, cls=Teacher, probe=…, watch=None, **settings)`."""
    from perdure.teaching import Teacher

    def make(
        out: Path | None = None, cls: Any = Teacher, probe: Any = PROBE, watch: Any = None, **settings: Any
    ) -> Any:
        return cls(str(tiny), out=out, settings={**SETTINGS, **settings}, probe=probe, watch=watch)

    return make


@pytest.fixture
def teacher(make_teacher: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """As `make_teacher`; what it made is closed in the end."""
    with ExitStack() as stack:
        yield lambda *given, **settings: stack.enter_context(make_teacher(*given, **settings))
