"""nano by LoRA and by a soft prompt, and a model with a chat template: taught, forgotten, exported to PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.models.load import load
from perdure.teaching import Teacher

SETTINGS = {"probe_rows": 20, "general": 2, "earlier": 2, "max_steps": 20, "max_new_tokens": 8}
FACTS = [
    ("Who found the red ball?", "Anna."),
    ("What colour is the hat of Ben?", "Green."),
]
NANO_PROBE = [{"prompt": f"What is {i} plus {j}?", "answer": f"{i + j}."} for i in range(2, 6) for j in range(2, 7)]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 with one layer and random weights, a tokenizer of bytes trained on the facts, and its chat template."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    path = tmp_path_factory.mktemp("models") / "qwen2"
    bytes_ = Tokenizer(models.BPE())
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_.train_from_iterator(
        [text for fact in FACTS for text in fact],
        trainers.BpeTrainer(vocab_size=400, special_tokens=marks, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bytes_, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = transformers.Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def logits(model: Any, teacher: Teacher) -> torch.Tensor:
    row = teacher.pupil.row(*FACTS[0])
    assert row.x is not None
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=row.x[None]).logits
    return found[:, -len(row.x) :]  # a soft prompt's own places come before


def check_life(
    model: str, tmp_path: Path, probe: Any, settings: dict[str, Any], make: Callable[..., Teacher] = Teacher
) -> None:
    """Two lessons; the exported adapter is what PEFT loads; without the first, the bytes of the second alone."""
    from peft import PeftModel

    given = {**SETTINGS, **settings}
    with make(model, out=tmp_path / "one", settings=given, probe=probe) as one:
        for question, answer in FACTS:
            lesson = one.teach(question, answer)
            assert lesson.kept, lesson.why
            assert one.ask(question) == answer == lesson.answers[0].after
        assert one.distance() > 0
        one.export(tmp_path / "adapter")
        there = PeftModel.from_pretrained(load(model).model, str(tmp_path / "adapter"))
        assert torch.allclose(logits(there, one), logits(one.pupil.model, one), atol=1e-5)
        with there.disable_adapter():
            assert not torch.allclose(logits(there, one), logits(one.pupil.model, one), atol=1e-3)
        assert (tmp_path / "adapter" / "tokenizer_config.json").is_file()
        one.forget(1)
        kept, address = one.pupil.weights(), one.address
    with make(model, settings=given, probe=probe) as never:
        for fact in FACTS[1:]:
            assert never.teach(*fact).kept
        assert never.address == address
        found = never.pupil.weights()
        assert all(torch.equal(kept[name], found[name]) for name in kept)
    with make(out=tmp_path / "one", probe=probe) as again:  # as it was begun, where nothing is said
        assert [entry.number for entry in again.lessons] == [2]
        assert again.address == address
        assert again.settings.tuning == settings.get("tuning", "lora")
        assert all(torch.equal(kept[name], value) for name, value in again.pupil.weights().items())


def test_nano_by_lora(tmp_path: Path) -> None:
    check_life("nano", tmp_path, NANO_PROBE, {"lr": 2e-3})


def test_nano_by_a_soft_prompt(tmp_path: Path) -> None:
    check_life("nano", tmp_path, NANO_PROBE, {"tuning": "soft-prompt", "max_steps": 40, "sure": 0.5})


def test_a_chat_template(qwen: Path, tmp_path: Path) -> None:
    probe = [{"prompt": f"Who found ball {i}?", "answer": str(i)} for i in range(20)]
    check_life(str(qwen), tmp_path, probe, {"lr": 0.02, "sure": 0.3})


def test_the_template_s_end_is_learnt_too(qwen: Path) -> None:
    """The prompt is the user's turn up to where the assistant begins; learnt is the answer and the turn's end."""
    with Teacher(str(qwen), settings=SETTINGS, probe=[]) as one:
        row = one.pupil.row("Who?", "Anna.")
    tokenizer = one.pupil.language.tokenizer
    assert row.x is not None
    assert row.y is not None
    learnt = tokenizer.decode(row.x[row.y != -100].tolist())
    prompt = tokenizer.decode(row.x[: int((row.y != -100).nonzero()[0])].tolist())
    assert learnt.startswith("Anna.<|im_end|>")
    assert prompt == "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
