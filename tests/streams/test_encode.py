from __future__ import annotations

import pytest

from perdure.errors import ConfigError, DataError, ModelError
from perdure.streams import Encoder, Row, to_examples
from perdure.types import IGNORE, Example, Segment

torch = pytest.importorskip("torch")
tokenizers = pytest.importorskip("tokenizers")
WORDS = ["<s>", "</s>", "<end>", "<unk>", *"abcdefghij", ":", "="]


def make(bos: bool = True, eos: str | None = "</s>"):
    """One word a token; ids are positions in WORDS: a is 4, `:` is 14, `=` is 15."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>"} | ({"eos_token": eos, "pad_token": eos} if eos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, **tokens)


def example(*pieces: tuple, key: str = "k") -> Example:
    """Pieces are (text, flags) with l for learnt, c for cut and s for special."""
    return Example(key, "t", tuple(Segment(text, *(flag in flags for flag in "lcs")) for text, flags in pieces))


def ids_and_labels(encoded):
    assert encoded.x.dtype == encoded.y.dtype == torch.int64
    return encoded.x.tolist(), encoded.y.tolist()


def test_bos_once_and_eos_learnt_once():
    encoded = Encoder(make(), 16).encode(example(("a b :", ""), ("c d", "l")))
    assert ids_and_labels(encoded) == ([0, 4, 5, 14, 6, 7, 1], [IGNORE] * 4 + [6, 7, 1])


def test_no_bos_where_the_tokenizer_puts_none():
    encoded = Encoder(make(bos=False), 16).encode(example(("a", ""), ("b", "l")))
    assert ids_and_labels(encoded) == ([4, 5, 1], [IGNORE, 5, 1])


def test_what_a_chat_template_wrote_already_is_not_added_again():
    encoded = Encoder(make(), 16).encode(example(("<s> a", "s"), ("b </s>", "ls"), ("c", "s"), ("d </s>", "ls")))
    assert ids_and_labels(encoded) == ([0, 4, 5, 1, 6, 7, 1], [IGNORE, IGNORE, 5, 1, IGNORE, 7, 1])


def test_masks_go_by_position_when_the_answer_holds_pad_and_unknown_tokens():
    encoded = Encoder(make(), 16).encode(example(("a", ""), ("</s> zzz", "l")))
    assert encoded.y.tolist() == [IGNORE, IGNORE, 1, 3, 1]


def test_the_context_is_cut_from_its_end_and_nothing_else():
    """BOS + 4 + 2 + 1 + EOS is 9 tokens; 7 fit, so the context loses its last two."""
    encoder = Encoder(make(), 7)
    encoded = encoder.encode(example(("a b c d", "c"), ("e :", ""), ("f", "l")))
    assert encoded.x.tolist() == [0, 4, 5, 8, 14, 9, 1]
    assert encoder.report() == {"kept": 1, "cut": 1, "cut_tokens": 2, "left_out": {}, "first_left_out": {}}


def test_of_two_contexts_the_last_is_cut_first():
    encoded = Encoder(make(), 6).encode(example(("a b", "c"), ("c d", "c"), ("e", ""), ("f", "l")))
    assert encoded.x.tolist() == [0, 4, 5, 8, 9, 1]
    encoded = Encoder(make(), 4).encode(example(("a b", "c"), ("c d", "c"), ("e", ""), ("f", "l")))
    assert encoded.x.tolist() == [0, 8, 9, 1]


def test_what_does_not_fit_is_left_out_and_counted_by_reason():
    """The longest that fits is max_length exactly; learnt tokens count EOS."""
    encoder = Encoder(make(), 6, answer_limit=3)
    fits, long = example(("a b", ""), ("c d", "l"), key="fits"), example(("a b c", ""), ("c d", "l"), key="long")
    wordy, empty = example(("a", ""), ("b c d", "l"), key="wordy"), example(("a", ""), (" ", "l"), key="empty")
    assert [one is not None for one in encoder.encode_many([fits, long, wordy, empty])] == [
        True,
        False,
        False,
        False,
    ]
    assert encoder.report()["left_out"] == {"too long": 1, "answer too long": 1, "nothing to learn": 1}
    assert encoder.report()["first_left_out"]["answer too long"] == ["wordy"]
    assert encoder.limited(4).encode(wordy) is not None
    assert encoder.limited(4).report()["kept"] == 0


def test_the_prompt_of_generation_is_the_prompt_of_training():
    encoder = Encoder(make(), 8)
    raw = example(("a b c d e", "c"), ("f :", ""), ("g", "l"))
    encoded = encoder.encode(raw)
    for one in (raw, encoded):
        prompt = encoder.prompt_ids(one)
        assert prompt.dtype == torch.int64
        assert prompt.tolist() == encoded.x.tolist()[:6]
    assert encoder.report()["kept"] == 1  # looking at a prompt counts nothing
    with pytest.raises(DataError, match="'k' is longer than 8 tokens"):
        encoder.prompt_ids(example(("a " * 9, ""), ("b", "l")))


def test_the_reference_of_a_conversation_is_its_last_answer():
    encoder = Encoder(make(), 32)
    talk = example(("<s> a", "s"), ("b </s>", "ls"), ("c", "s"), ("  d  e </s>", "ls"))
    assert encoder.reference(talk) == "d  e"
    assert encoder.prompt_ids(talk).tolist() == [0, 4, 5, 1, 6]
    assert encoder.reference(example(("a", ""), (" 42\n", "l"))) == "42"


def test_a_prompt_may_be_empty():
    encoder = Encoder(make(), 8)
    assert encoder.prompt_ids(example(("a b", "l"))).tolist() == [0]
    assert Encoder(make(bos=False), 8).prompt_ids(example(("a b", "l"))).tolist() == []


def test_settings_that_cannot_work_are_refused():
    with pytest.raises(ModelError, match="eos_token"):
        Encoder(make(eos=None), 8)
    with pytest.raises(ConfigError, match="max_length must be at least 3 tokens, got 2"):
        Encoder(make(), 2)
    with pytest.raises(ConfigError, match="answer_limit must be at least 2 tokens"):
        Encoder(make(), 8, answer_limit=1)


def test_a_chat_template_of_a_real_tokenizer_class_is_learnt_exactly():
    """`<s> a = b <end>`: only the answers and their <end> are learnt, BOS is not doubled, EOS follows once."""
    tokenizer = make()
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %} {{ ':' if m.role == 'user' else '=' }} {{ m.content }} "
        "{% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} = {% endif %}"
    )
    talk = [
        {"role": r, "content": c}
        for r, c in (("user", "a"), ("assistant", "b c"), ("user", "d"), ("assistant", "e"))
    ]
    (one,), _ = to_examples([Row({"messages": talk}, "d.jsonl", 1)], task="t", tokenizer=tokenizer)
    ids, labels = ids_and_labels(Encoder(tokenizer, 32).encode(one))
    assert [WORDS[i] for i in ids] == ["<s>", ":", "a", "=", "b", "c", "<end>", ":", "d", "=", "e", "<end>", "</s>"]
    assert [WORDS[i] if i != IGNORE else "" for i in labels] == [
        "",
        "",
        "",
        "",
        "b",
        "c",
        "<end>",
        *[""] * 3,
        "e",
        "<end>",
        "</s>",
    ]


def test_a_real_tokenizer_with_pad_equal_to_eos(bitstories):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(bitstories)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    encoder = Encoder(tokenizer, 64)
    encoded = encoder.encode(example(("Once upon a time", ""), (" there was a cat.", "l")))
    ids, labels = ids_and_labels(encoded)
    assert ids.count(tokenizer.bos_token_id) == ids.count(tokenizer.eos_token_id) == 1
    assert labels[-1] == tokenizer.eos_token_id
    assert ids[: len(encoder.prompt_ids(encoded))] == tokenizer("Once upon a time")["input_ids"]
    assert (
        tokenizer.decode([i for i in labels if i != IGNORE], skip_special_tokens=True).strip() == "there was a cat."
    )


ORDINARY = [
    "Once upon a time, there was a cat.", " leading", "trailing ", "a\n\nb", "\n\nQuestion: why?\nAnswer:",
    "2 < 3 > 1", "größer 'quoted' {x} 100%", "s> /s <", "<div>text</div>", "日本語 🙂", "-12 + 7 = -5",
]  # fmt: skip


@pytest.fixture(params=["nano", "stories260k"])
def real(request):
    from transformers import AutoTokenizer

    from perdure.models.load import NANO

    folder = NANO if request.param == "nano" else request.getfixturevalue(request.param)
    return AutoTokenizer.from_pretrained(folder)


def test_special_tokens_spelt_out_in_data_are_ordinary_text(real):
    specials = [token for token in real.all_special_tokens if token != real.unk_token]
    text = f"before {' '.join(specials)} after{real.eos_token}"
    encoder = Encoder(real, 128)
    encoded = encoder.encode(example((text, ""), (text, "l")))
    ids, labels = ids_and_labels(encoded)
    inside = ids[len(encoder.bos) : -1]
    assert not set(inside) & set(real.all_special_ids)
    assert ids[: len(encoder.bos)] == encoder.bos
    assert labels[-1] == ids[-1] == real.eos_token_id
    assert real.decode([i for i in labels[:-1] if i != IGNORE]).strip() == text
    assert encoder.reference(example(("q", ""), (text, "l"))) == text


def test_special_pieces_still_hold_special_tokens(real):
    ids = Encoder(real, 32).encode(example(("a", ""), ("b", "l"), (real.eos_token, "ls"))).x.tolist()
    assert ids.count(real.eos_token_id) == 1
    assert real("a", add_special_tokens=False)["input_ids"][0] in ids


def test_ordinary_text_is_encoded_as_the_tokenizer_does(real):
    """Mixed with rows that hold special tokens, and whichever kind was encoded last."""
    encoder = Encoder(real, 256)
    plain = [real(text, add_special_tokens=False)["input_ids"] for text in ORDINARY]
    rows = [example((text, ""), ("</s>", "l"), ("</s>", "ls")) for text in ORDINARY]
    for _ in range(2):
        found = [encoder.prompt_ids(one).tolist() for one in encoder.encode_many(rows)]
        assert found == [encoder.bos + ids for ids in plain]
    assert [real(text, add_special_tokens=False)["input_ids"] for text in ORDINARY] == plain


def test_many_rows_cost_one_call_of_the_tokenizer():
    encoder, calls = Encoder(make(), 64), []
    tokenizer = encoder.tokenizer

    def counted(texts, **settings):
        calls.append(len(texts))
        return tokenizer(texts, **settings)

    encoder.tokenizer = counted
    rows = [example(("a b c", ""), ("h i j", "l"), key=str(i)) for i in range(1000)]
    assert None not in encoder.encode_many(rows)
    assert calls == [2000]
    assert encoder.encode_many([]) == []
