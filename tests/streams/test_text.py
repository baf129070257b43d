from __future__ import annotations

import pytest

from perdure.errors import ConfigError, DataError
from perdure.streams import Row, Template, to_examples
from perdure.types import Segment

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set messages = messages[1:] %}{% else %}{% set sys = '' %}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}<s>[INST] {{ sys if loop.first else '' }}{{ m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)
# Keeps only what follows the last thought, as templates of reasoning models do in earlier turns.
FORGETFUL = (
    "{% for m in messages %}{% if m.role == 'assistant' and not loop.last %}A:{{ m.content.split('</t>')[-1] }}|"
    "{% elif m.role == 'assistant' %}A:{{ m.content }}|{% else %}U:{{ m.content }}|{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2? "},
    {"role": "assistant", "content": " 4"},
    {"role": "user", "content": "4"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "thanks"},
]


class Chat:
    """A tokenizer as far as text.py knows one, with the library's own template engine."""

    eos_token = "</s>"

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        from transformers.utils.chat_template_utils import render_jinja_template

        assert not tokenize
        rendered, _ = render_jinja_template(
            [messages], chat_template=self.chat_template, add_generation_prompt=add_generation_prompt
        )
        return rendered[0]


def row(line: int = 1, **values) -> Row:
    return Row(values, "d.jsonl", line)


def only(one: Row, **settings):
    (example,), _ = to_examples([one], task="t", **settings)
    return example


def spoken(segments) -> list[str]:
    return [segment.text for segment in segments if segment.learn]


def test_a_template_fills_columns_and_keeps_literal_braces():
    template = Template.of({"context": "{c}", "prompt": "{{x}} {my col}:", "answer": "{n}"})
    example = only(row(id=7, c="ctx {c}", **{"my col": "q"}, n=3, level=2, tags=["a"]), template=template)
    assert example.segments == (
        Segment("ctx {c}", cut=True),
        Segment("{x} q:"),
        Segment("3", learn=True),
    )
    assert (example.key, example.task, dict(example.fields)) == ("7", "t", {"level": 2})


def test_a_template_of_pieces():
    template = Template.of([{"text": "{a}", "cut": True}, {"text": "{b}", "learn": True}])
    assert only(row(a="x", b="y"), template=template).segments == (Segment("x", cut=True), Segment("y", learn=True))
    assert template.columns == {"a", "b"}


@pytest.mark.parametrize(
    "pattern", ["{a.b}", "{a[0]}", "{a!r}", "{a:>3}", "{}", "{ }", "{", "a}", "{a.__class__}", "{a:{b}}"]
)
def test_a_placeholder_that_is_more_than_a_column_is_refused(pattern):
    with pytest.raises(ConfigError, match="template"):
        Template.of({"prompt": "p", "answer": pattern})


def test_a_template_must_end_with_what_is_learnt():
    with pytest.raises(ConfigError, match="last piece must be learnt"):
        Template.of([{"text": "{a}", "learn": True}, {"text": "."}])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": "x"}, r"d\.jsonl:5: no column 'b'\. The row has: 'a'"),
        ({"a": "x", "b": None}, r"d\.jsonl:5: column 'b' is None"),
        ({"a": "x", "b": float("nan")}, r"d\.jsonl:5: column 'b' is nan"),
        ({"a": "x", "b": ["y"]}, r"d\.jsonl:5: column 'b' is a list, not text\. Name a preparation"),
    ],
)
def test_a_column_that_cannot_be_filled_in_is_named_with_its_line(values, message):
    with pytest.raises(DataError, match=message):
        only(row(5, **values), template=Template.of({"prompt": "{a}", "answer": "{b}"}))


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ({"prompt": "p", "answer": "a"}, ["p", "a"]),
        ({"prompt": "p", "completion": "a"}, ["p", "a"]),
        ({"instruction": "i", "output": "o"}, ["i\n", "o"]),
        ({"instruction": "i", "input": "x", "output": "o"}, ["i\nx\n", "o"]),
        ({"instruction": "i", "input": "", "output": "o"}, ["i\n", "o"]),
        ({"question": "q", "answer": 4}, ["q\n", "4"]),
    ],
)
def test_rows_that_need_no_template(values, texts):
    example = only(row(**values))
    assert [segment.text for segment in example.segments] == texts
    assert [segment.learn for segment in example.segments] == [False, True]


def test_a_row_of_which_nothing_can_be_told_lists_what_would_do():
    with pytest.raises(DataError, match=r"d\.jsonl:1: cannot tell .*`messages`.*`prompt` and `answer`.*'text'"):
        only(row(text="once upon a time"))


def test_keys_come_from_the_id_a_column_or_the_content():
    first, second = row(1, prompt="p", answer="a"), row(9, answer="a", prompt="p")
    assert only(first).key == only(second).key  # neither line nor column order counts
    assert only(first).key != only(row(1, prompt="p", answer="b")).key
    assert only(row(id="", prompt="p", answer="a")).key != ""
    assert only(row(name="n", prompt="p", answer="a"), key="name").key == "n"
    with pytest.raises(DataError, match="no column 'name'"):
        only(first, key="name")


def test_of_two_rows_with_one_key_the_first_is_kept():
    rows = [
        row(1, id="x", prompt="p", answer="1"),
        row(2, id="x", prompt="p", answer="2"),
        row(3, prompt="p", answer="3"),
    ]
    examples, duplicates = to_examples(rows, task="t")
    assert [example.segments[1].text for example in examples] == ["1", "3"]
    assert duplicates == 1


def test_a_conversation_without_a_chat_template_has_the_documented_form():
    segments = only(row(messages=TALK), tokenizer=Chat()).segments
    assert segments == (
        Segment("System:\nBe brief.\n\nUser:\n2+2? \n\nAssistant:\n"),
        Segment(" 4", learn=True),
        Segment("</s>", learn=True, special=True),
        Segment("\n\nUser:\n4\n\nAssistant:\n"),
        Segment("4", learn=True),
        Segment("</s>", learn=True, special=True),
    )


def test_only_a_chat_template_and_a_marked_piece_may_write_special_tokens():
    segments = only(row(messages=TALK), tokenizer=Chat(CHATML)).segments
    assert all(segment.special for segment in segments)
    piece = {"text": "<|im_start|>", "special": True}
    template = Template.of([piece, {"text": "{q}"}, {"text": "{a}", "learn": True}])
    assert [s.special for s in only(row(q="</s>", a="b"), template=template).segments] == [True, False, False]
    with pytest.raises(ConfigError, match="marked special, so it must hold no column"):
        Template.of([{"text": "<s>{q}", "special": True}, {"text": "{a}", "learn": True}])


def test_chatml_learns_each_answer_with_its_end_of_turn_and_nothing_else():
    pytest.importorskip("transformers")
    segments = only(row(messages=TALK), tokenizer=Chat(CHATML)).segments
    assert spoken(segments) == [" 4<|im_end|>", "4<|im_end|>"]
    full = Chat(CHATML).apply_chat_template(TALK[:5], tokenize=False, add_generation_prompt=False)
    assert "".join(segment.text for segment in segments) == full.rstrip()
    before = Chat(CHATML).apply_chat_template(TALK[:4], tokenize=False, add_generation_prompt=True)
    assert "".join(segment.text for segment in segments[:-1]) == before


def test_a_template_that_strips_and_folds_the_system_turn():
    segments = only(row(messages=TALK), tokenizer=Chat(LLAMA2)).segments
    assert [segment.text for segment in segments] == [
        "<s>[INST] <<SYS>>Be brief.<</SYS>>2+2? [/INST] ",
        "4 </s>",
        "<s>[INST] 4 [/INST] ",
        "4 </s>",
    ]


def test_a_template_that_refuses_the_roles_is_a_data_error():
    talk = [TALK[1], TALK[1], TALK[2]]
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*chat template refuses.*alternate"):
        only(row(messages=talk), tokenizer=Chat(LLAMA2))


def test_a_template_that_changes_earlier_turns_is_split_where_it_can_be_and_else_refused():
    plain = [TALK[1], TALK[2], TALK[3], TALK[4]]
    assert spoken(only(row(messages=plain), tokenizer=Chat(FORGETFUL)).segments) == [" 4|", "4|"]
    thought = {"role": "assistant", "content": "<t>hm</t>4"}
    assert spoken(only(row(messages=[TALK[1], thought]), tokenizer=Chat(FORGETFUL)).segments) == ["<t>hm</t>4|"]
    with pytest.raises(DataError, match="changes earlier turns"):
        only(row(messages=[TALK[1], thought, TALK[3], TALK[4]]), tokenizer=Chat(FORGETFUL))


def test_a_template_that_transforms_contents_is_split_by_its_beginnings():
    shouting = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    segments = only(
        row(messages=[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]),
        tokenizer=Chat(shouting),
    ).segments
    assert spoken(segments) == ["HO<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "not a list of turns"),
        ("hello", "not a list of turns"),
        ([{"role": "user"}], r"messages\[0\] lacks a text"),
        ([{"role": "assistant", "content": ["x"]}], r"messages\[0\] lacks a text"),
        (["hi"], r"messages\[0\] lacks a text"),
        ([{"role": "user", "content": "hi"}], "no assistant turn"),
    ],
)
def test_messages_that_cannot_be_learnt_are_refused(messages, message):
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{message}"):
        only(row(messages=messages), tokenizer=Chat())
