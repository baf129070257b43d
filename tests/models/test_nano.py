"""The embedded model as it ships: files, tokenizer, size, and the score it is said to have."""

import json
from importlib.resources import files
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from perdure.recipes import nano
from perdure.streams import arena, corpus

FOLDER = Path(str(files("perdure"))) / "models" / "nano"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def record():
    return json.loads((FOLDER / "training.json").read_text())


def test_files_are_small_and_the_model_has_one_to_two_million_parameters(model, record) -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 6_000_000
    count = sum(p.numel() for p in model.parameters())
    assert 1_000_000 <= count <= 2_000_000
    assert count == record["parameters"]
    assert model.dtype == torch.float32
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_special_tokens_agree_everywhere(model, tokenizer) -> None:
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(ids)) == 3
    for config in (model.config, model.generation_config):
        assert [config.bos_token_id, config.eos_token_id, config.pad_token_id] == ids
    assert len(tokenizer) == model.config.vocab_size
    assert model.config.max_position_embeddings == 512


def test_bos_once_in_front_and_no_eos_behind(tokenizer) -> None:
    ids = tokenizer("Anna has 12 pens.")["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids


def test_digits_stay_single(tokenizer) -> None:
    assert [t for t in tokenizer.tokenize("about 2048, 7") if t.isdigit()] == list("20487")


def test_any_text_comes_back(tokenizer) -> None:
    for text in ("Zürich – 12,5 °C\n\t¿qué?", " two  spaces ", "数独"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_prompt_and_answer_tokenised_apart_equal_the_joint_text(tokenizer) -> None:
    pairs = [
        pair
        for kind in arena.KINDS
        for item in arena.generate(kind, 60, seed=1)
        for pair in ((item.prompt, item.answer), arena.plain(item))
    ]
    pairs += [(row["prompt"], row["answer"]) for row in corpus.probe()]
    for prompt, answer in pairs:
        apart = tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert apart == tokenizer(prompt + answer)["input_ids"], prompt + answer


def test_arena_answers_are_short(tokenizer) -> None:
    for kind in arena.KINDS:
        for item in arena.generate(kind, 100, seed=2):
            assert len(tokenizer(item.answer, add_special_tokens=False)["input_ids"]) <= 12, item.answer


def test_the_shipped_probe_is_the_generated_one() -> None:
    shipped = [json.loads(line) for line in (FOLDER / "probe.jsonl").read_text().splitlines()]
    assert shipped == corpus.probe()


def test_greedy_probe_score_is_what_is_stated(model, tokenizer, record) -> None:
    """At most 2 of the 200 answers may fall differently on another processor: 0.01."""
    found = nano.score(model, tokenizer, corpus.probe())
    assert found["all"] == pytest.approx(record["probe"]["all"], abs=0.0101)


def test_documents_become_rows_with_bos_eos_and_weights(tokenizer) -> None:
    """A document's pieces are tokenised apart: that must give the tokens of its whole text."""
    rows = nano.Text(tokenizer, corpus.documents(5), seed=5).rows(300)
    for (ids, weights), document in zip(rows, islice(corpus.documents(5), 300), strict=True):
        assert ids == [*tokenizer(corpus.text_of(document))["input_ids"], tokenizer.eos_token_id]
        assert (weights[0], weights[-1]) == (0.0, 1.0)


def test_weighted_loss_by_hand() -> None:
    """Uniform logits over 4 tokens cost ln 4 = 1.3863 whatever the weights are."""

    class Flat(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            del use_cache
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 4)})

    ids = torch.tensor([[0, 1, 2], [0, 3, 2]])
    weights = torch.tensor([[0.0, 0.15, 1.0], [0.0, 1.0, 0.0]])
    assert nano.weighted_loss(Flat(), ids, weights).item() == pytest.approx(1.3862944)


def test_a_few_steps_write_a_loadable_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(nano, "check_apart", lambda probe, seed: None)
    monkeypatch.setattr(
        corpus, "probe", lambda: [{"id": "0", "skill": "math", "prompt": "1 + 1 =", "answer": " 2."}]
    )
    report = nano.make(tmp_path / "nano", seed=0, device="cpu", tokens=8000)
    assert report["tokens"] >= 8000
    assert LlamaForCausalLM.from_pretrained(tmp_path / "nano").num_parameters() == report["parameters"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "nano")) == report["vocabulary"]
