"""Greedy generation in batches against a bare loop without cache or padding, one prompt at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from perdure.evaluation.generate import generate, generate_through
from perdure.models.adapters import tune
from perdure.models.load import load
from perdure.models.objectives import collate, forward
from perdure.types import IGNORE, Batch, Example, Output

END = 2


def prompts(lengths: tuple[int, ...] = (1, 9, 4, 4, 7, 2), seed: int = 0, pieces: int = 40) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(3, pieces, (length,), generator=rng) for length in lengths]


@torch.no_grad()
def by_hand(model: Any, prompt: Tensor, limit: int, end: int = END) -> tuple[list[int], list[Tensor]]:
    """The answer, and the logits of each of its tokens (of the end too)."""
    ids, answer, logits = prompt[None], [], []
    for _ in range(limit):
        last = model(input_ids=ids, use_cache=False).logits[0, -1]
        logits.append(last)
        token = int(last.argmax())
        if token == end:
            break
        answer.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return answer, logits


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_batched_equals_one_by_one(make_lm: Any, kind: str, batch_size: int) -> None:
    model = make_lm(kind, seed=3, spread=0.3)
    expected = [by_hand(model, prompt, 8)[0] for prompt in prompts()]
    assert len({tuple(answer) for answer in expected}) > 3
    assert generate(model, prompts(), 8, END, batch_size) == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "lfm2"])
@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("max_length", [None, 10])
def test_through_a_forward_pass_it_is_the_same(
    make_lm: Any, kind: str, batch_size: int, max_length: int | None
) -> None:
    """Without a cache, padded on the right; the prompt has no labels, what follows it has."""
    model = make_lm(kind, seed=3, spread=0.3)
    rows = [Example(str(i), "t", x=ids, y=torch.full_like(ids, IGNORE)) for i, ids in enumerate(prompts())]

    def passed(model: Any, batch: Batch) -> Output:
        for row in batch.examples:
            length = len(prompts()[int(row.key)])
            assert row.x is not None
            assert row.y is not None
            assert (row.y[:length] == IGNORE).all()
            assert torch.equal(row.y[length:], row.x[length:])
        return forward(model, batch)

    found = generate_through(
        passed, lambda rows: collate(rows, "causal_lm"), model, rows, 8, END, batch_size, max_length=max_length
    )
    assert found == generate(model, prompts(), 8, END, batch_size, max_length=max_length)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
def test_padded_logits_equal_those_alone(make_lm: Any, kind: str) -> None:
    """In fp32 to 1e-5, at the first token and at every later one, which comes from the cache."""
    model = make_lm(kind, seed=3, spread=0.3)
    seen: list[Tensor] = []
    hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
    generate(model, prompts(), 8, end=-1)
    hook.remove()
    order = sorted(range(len(prompts())), key=lambda i: len(prompts()[i]))
    for row, i in enumerate(order):
        _, alone = by_hand(model, prompts()[i], 8, end=-1)
        assert len(alone) == len(seen) == 8
        for together, one in zip(seen, alone, strict=True):
            torch.testing.assert_close(together[row], one, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(1, 9, 4, 4, 7, 2), (6, 6, 6)], ids=["padded", "alike"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bitnet", "lfm2"])
def test_under_autocast_it_is_as_near_to_fp32_as_a_pass_without_cache(
    make_lm: Any, kind: str, lengths: tuple[int, ...]
) -> None:
    """The logits of every token that was generated: their error and a bare bf16 pass's, root mean square."""
    model = make_lm(kind, seed=3, spread=0.3)
    given, seen = prompts(lengths), list[Tensor]()

    def bf16() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    hook = model.register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1].float()))
    found = generate(model, given, 8, end=-1, autocast=bf16)
    hook.remove()
    own, bare, spread = [], [], []
    for row, i in enumerate(sorted(range(len(given)), key=lambda i: len(given[i]))):
        whole = torch.cat([given[i], torch.tensor(found[i])])[None]
        with torch.no_grad():
            expected = model(input_ids=whole, use_cache=False).logits[0, len(given[i]) - 1 : -1]
            with bf16():
                passed = model(input_ids=whole, use_cache=False).logits[0, len(given[i]) - 1 : -1]
        own.append(torch.stack([one[row] for one in seen]) - expected)
        bare.append(passed.float() - expected)
        spread.append(expected)
    errors = [float(torch.cat(values).square().mean().sqrt()) for values in (own, bare, spread)]
    assert errors[0] < 1.1 * errors[1]
    assert errors[1] < 0.05 * errors[2]


def test_wrong_positions_would_be_seen(make_lm: Any) -> None:
    """The check above can fail: without explicit positions learnt position embeddings count the padding.

    Rotary ones do not (attention sees differences alone), so the control is GPT-2, with and without.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=32, n_embd=16, n_layer=1, n_head=2)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = [by_hand(model, prompt, 8)[0] for prompt in prompts()]
    assert generate(model, prompts(), 8, END) == expected
    plain = model.forward

    def without_positions(*, position_ids: Tensor, past_key_values: Any = None, **rest: Any) -> Any:
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        positions = torch.arange(past, past + position_ids.shape[1]).expand_as(position_ids)
        return plain(position_ids=positions, past_key_values=past_key_values, **rest)

    model.forward = without_positions
    assert generate(model, prompts(), 8, END) != expected


def test_an_adapted_model_generates_with_its_adapter(make_lm: Any) -> None:
    model = tune(make_lm(seed=3, spread=0.3), "lora", r=2, alpha=4)
    before = generate(model, prompts(), 8, END)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                torch.nn.init.normal_(parameter, std=1.0)
    after = generate(model, prompts(), 8, END)
    assert after == [by_hand(model, prompt, 8)[0] for prompt in prompts()]
    assert after != before


def test_the_end_token_ends_an_answer_and_is_not_part_of_it(make_lm: Any) -> None:
    """Whatever token stands third in the first answer is made the end: the answer is then what comes before it."""
    model = make_lm(seed=3, spread=0.3)
    free = [by_hand(model, prompt, 8, end=-1)[0] for prompt in prompts()]
    end = free[0][2]
    expected = [answer[: answer.index(end)] if end in answer else answer for answer in free]
    assert len(expected[0]) <= 2
    assert len({len(answer) for answer in expected}) > 1
    assert generate(model, prompts(), 8, end) == expected


def test_an_answer_may_be_empty_and_others_go_on(make_lm: Any) -> None:
    model = make_lm(seed=3, spread=0.3)
    end = by_hand(model, prompts()[1], 1, end=-1)[0][0]
    found = generate(model, prompts(), 8, end)
    assert found[1] == []
    assert max(map(len, found)) == 8


def test_generation_stops_when_every_answer_has_ended(make_lm: Any) -> None:
    model = make_lm(seed=3, spread=0.3)
    one = prompts()[:1]
    end = by_hand(model, one[0], 1, end=-1)[0][0]
    calls: list[int] = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    assert generate(model, one, 100, end) == [[]]
    hook.remove()
    assert len(calls) == 1


@pytest.mark.parametrize("limit", [0, 1, 5])
def test_no_answer_is_longer_than_asked(make_lm: Any, limit: int) -> None:
    model = make_lm(seed=3, spread=0.3)
    found = generate(model, prompts(), limit, end=-1)
    assert [len(answer) for answer in found] == [limit] * len(prompts())
    assert [answer[:limit] for answer in generate(model, prompts(), 8, end=-1)] == found


def test_no_prompts_no_answers(make_lm: Any) -> None:
    assert generate(make_lm(), [], 8, END) == []


def test_a_padding_id_that_is_a_real_token_does_not_matter(make_lm: Any) -> None:
    """Padding is by position: a model whose pad is its end, and prompts that hold the end and id 0 as tokens."""
    model = make_lm(seed=3, spread=0.3, pad_token_id=END)
    given = [
        torch.tensor([END, 5]),
        torch.tensor([0, 0, 7, END, 0, 9, END]),
        torch.tensor([0]),
        torch.tensor([END]),
    ]
    assert generate(model, given, 8, END) == [by_hand(model, prompt, 8)[0] for prompt in given]


def test_a_models_own_generation_settings_do_not_reach_in(make_lm: Any) -> None:
    model = make_lm(seed=3, spread=0.3)
    expected = generate(model, prompts(), 8, END)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.do_sample = True
    model.generation_config.eos_token_id = [END, *range(3, 20)]
    assert generate(model, prompts(), 8, END) == expected


def test_a_real_model_equals_its_librarys_own_greedy_search(stories260k: Path) -> None:
    """Its pad is its end. Transformers generates one prompt at a time; we all of them at once."""
    language = load(str(stories260k))
    model, tokenizer = language.model, language.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == END
    texts = ["Once upon a time", "Tom", "Lily and her mom went to the park. They saw a", "The dog was"]
    given = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    expected = []
    for prompt in given:
        whole = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=END,
            pad_token_id=END,
        )[0, len(prompt) :].tolist()
        expected.append(whole[: whole.index(END)] if END in whole else whole)
    assert generate(model, given, 24, END) == expected
    assert expected == [by_hand(model, prompt, 24)[0] for prompt in given]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_comes_back_and_dropout_is_off(make_lm: Any, training: bool) -> None:
    model = make_lm(seed=3, spread=0.3, attention_dropout=0.9)
    expected = generate(model, prompts(), 8, END)
    model.train(training)
    assert generate(model, prompts(), 8, END) == expected
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("batch_size", [1, 4])
def test_an_answer_ends_where_the_models_positions_do(batch_size: int) -> None:
    """Sixteen learnt positions: a prompt of 14 leaves two tokens, one of 16 none, and short ones their eight."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    asked = prompts((14, 3, 16, 8))
    room = [2, 8, 0, 8]
    expected = [by_hand(model, prompt, limit)[0] for prompt, limit in zip(asked, room, strict=True)]
    assert [len(answer) for answer in expected] == room
    assert generate(model, asked, 8, END, batch_size, max_length=16) == expected


def with_prompt(model: Any) -> Any:
    """The model behind a soft prompt of three."""
    torch.manual_seed(5)
    tuned = tune(model, "soft-prompt", tokens=3, init="random").eval()
    assert generate(tuned.get_base_model(), prompts(), 8, END) != generate(tuned, prompts(), 8, END)
    return tuned


def gpt2(positions: int) -> Any:
    """A model whose learnt positions tell where a token stands."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_positions=positions, n_embd=16, n_layer=1, n_head=2)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2", "gpt2", "nano"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_soft_prompt_batched_equals_one_by_one(make_lm: Any, kind: str, batch_size: int) -> None:
    """The loop by hand goes through PEFT's own forward pass, which training takes."""
    base = {"gpt2": lambda: gpt2(32), "nano": lambda: load("nano").model}.get(
        kind, lambda: make_lm(kind, seed=3, spread=0.3)
    )()
    model = with_prompt(base)
    expected = [by_hand(model, prompt, 8)[0] for prompt in prompts()]
    assert len({tuple(answer) for answer in expected}) > 3
    assert generate(model, prompts(), 8, END, batch_size) == expected


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "bitnet", "lfm2"])
def test_logits_behind_a_soft_prompt_equal_those_alone(make_lm: Any, kind: str) -> None:
    model = with_prompt(make_lm(kind, seed=3, spread=0.3))
    seen: list[Tensor] = []
    hook = model.get_base_model().register_forward_hook(lambda *call: seen.append(call[-1].logits[:, -1]))
    generate(model, prompts(), 8, end=-1)
    hook.remove()
    order = sorted(range(len(prompts())), key=lambda i: len(prompts()[i]))
    for row, i in enumerate(order):
        _, alone = by_hand(model, prompts()[i], 8, end=-1)
        for together, one in zip(seen, alone, strict=True):
            torch.testing.assert_close(together[row], one, rtol=0, atol=1e-5)


def test_padding_behind_a_soft_prompt_would_be_seen() -> None:
    """The checks above can fail: PEFT's forward puts the soft prompt before the padding and counts it as tokens."""
    model = with_prompt(gpt2(32))
    longest = max(map(len, prompts()))
    ids, mask = torch.zeros(2, len(prompts()), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts()):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask).logits[:, -1].argmax(-1).tolist()
    alone = [by_hand(model, prompt, 1, end=-1)[0][0] for prompt in prompts()]
    assert first != alone
    assert [answer[0] for answer in generate(model, prompts(), 1, end=-1)] == alone


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_soft_prompt_takes_positions_of_its_own(batch_size: int) -> None:
    """Nineteen learnt positions, three of them the soft prompt's: for the rest it is a model of sixteen."""
    model = with_prompt(gpt2(19))
    asked = prompts((14, 3, 16, 8))
    room = [2, 8, 0, 8]
    expected = [by_hand(model, prompt, limit)[0] for prompt, limit in zip(asked, room, strict=True)]
    assert len(expected[0]) == 2
    assert generate(model, asked, 8, END, batch_size, max_length=16) == expected
