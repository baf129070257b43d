"""Rows to examples of text: templates of columns, and conversations. Knows no token ids and no lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from string import Formatter
from typing import Any

from perdure.errors import ConfigError, DataError
from perdure.streams.sources import Row
from perdure.types import Example, Segment

MESSAGES = "messages"
# Columns that need no template: prompt, what stands after it, answer. The last three take a line each.
DEFAULTS = (
    ("prompt", "", "answer"),
    ("prompt", "", "completion"),
    ("instruction", "\n", "output"),
    ("question", "\n", "answer"),
)


@dataclass(frozen=True, slots=True)
class Template:
    """Segments whose texts hold `{column}` placeholders; a literal brace is written twice.

    A placeholder is a plain column name: no attribute, index, conversion or format.

    Attributes:
        segments: in order; the last one is learnt.

    Raises:
        ConfigError: a placeholder that is not plain, or is in a special piece; a lone brace; a last segment that
            is not learnt.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        for segment in self.segments:
            names = [name for _, name in _placeholders(segment.text) if name is not None]
            if segment.special and names:
                raise ConfigError(
                    f"template: {segment.text!r} is marked special, so it must hold no column: text from data must "
                    f"not turn into special tokens. Give the column a piece of its own."
                )
        if not self.segments or not self.segments[-1].learn:
            raise ConfigError(
                "template: its last piece must be learnt (learn: true), for what follows the last learnt piece "
                "is never a target. Move or mark it."
            )

    @classmethod
    def of(cls, config: Mapping[str, str] | Sequence[Mapping[str, Any]]) -> Template:
        """From `{prompt, answer}` and perhaps `context` (in front, may be cut), or a list of pieces."""
        if not isinstance(config, Mapping):
            flags = ("learn", "cut", "special")
            return cls(tuple(Segment(p["text"], *(p.get(flag, False) for flag in flags)) for p in config))
        context = (Segment(config["context"], cut=True),) if config.get("context") else ()
        prompt = (Segment(config["prompt"]),) if config.get("prompt") else ()
        return cls((*context, *prompt, Segment(config["answer"], learn=True)))

    @property
    def columns(self) -> set[str]:
        """The columns that it fills in."""
        return {name for segment in self.segments for _, name in _placeholders(segment.text) if name is not None}

    def fill(self, row: Row) -> tuple[Segment, ...]:
        """The segments of one row.

        Raises:
            DataError: a column is missing, empty (null) or not plain text; names file and line.
        """
        return tuple(
            Segment(
                "".join(
                    text + ("" if name is None else _value(row, name)) for text, name in _placeholders(segment.text)
                ),
                segment.learn,
                segment.cut,
                segment.special,
            )
            for segment in self.segments
        )


def to_examples(
    rows: Sequence[Row],
    *,
    task: str,
    template: Template | None = None,
    key: str | None = None,
    tokenizer: Any = None,
    helpers: Collection[str] = (),
) -> tuple[list[Example], int]:
    """Unencoded examples, and how many rows were dropped because their key had come before.

    Without a template a row holds `messages`, or `prompt` and `answer`, `prompt` and `completion`, `instruction`
    (and perhaps `input`) and `output`, or `question` and `answer`.

    Args:
        rows: from `read_rows`.
        task: the task's name.
        template: how columns become text.
        key: the column that names a row; default: `id` where there is one, else a hash of the row's content.
        tokenizer: for `messages`: its chat template is used when it has one, its eos_token otherwise.
        helpers: columns that are there for templates alone, and no fields of the example.

    Raises:
        DataError: a row lacks what it needs; names file and line.
    """
    examples: dict[str, Example] = {}
    for row in rows:
        name = key_of(row, key)
        if name in examples:
            continue
        segments, used = _segments(row, template, tokenizer)
        fields = {
            column: value
            for column, value in row.values.items()
            if column not in {*used, *helpers, key or "id"} and (value is None or _plain(value))
        }
        examples[name] = Example(name, task, segments, fields=fields)
    return list(examples.values()), len(rows) - len(examples)


def key_of(row: Row, column: str | None = None) -> str:
    """A row's stable name: the column's value (default: `id`), else a hash of its content."""
    value = row.values.get(column or "id")
    if isinstance(value, str | int | float) and not isinstance(value, bool) and str(value) and _plain(value):
        if "\0" in str(value):
            raise DataError(
                f"{row.place}: column {column or 'id'!r} names the row and holds a NUL character. Remove it."
            )
        return str(value)
    if column is not None:
        _value(row, column)
        raise DataError(f"{row.place}: column {column!r} names the row, so it must not be empty. Give it a value.")
    canonical = json.dumps(dict(row.values), sort_keys=True, ensure_ascii=False, default=str, separators=(",", ":"))
    return blake2b(canonical.encode(), digest_size=16).hexdigest()


def _segments(row: Row, template: Template | None, tokenizer: Any) -> tuple[tuple[Segment, ...], set[str]]:
    values = row.values
    if template is not None:
        return template.fill(row), template.columns
    if values.get(MESSAGES) is not None:
        return conversation(row, tokenizer), {MESSAGES}
    for prompt, between, answer in DEFAULTS:
        if prompt in values and answer in values:
            text = _value(row, prompt) + between
            extra = {"input"} if prompt == "instruction" and values.get("input") else set()
            if extra:
                text += _value(row, "input") + between
            return (Segment(text), Segment(_value(row, answer), learn=True)), {prompt, answer, *extra}
    raise DataError(
        f"{row.place}: cannot tell what to learn. A row needs `messages`, or {_known()}, or give a template, "
        f'say {{prompt: "{{question}} ", answer: "{{answer}}"}}. Its columns: {_columns(row)}.'
    )


def conversation(row: Row, tokenizer: Any) -> tuple[Segment, ...]:
    """Segments of a row's `messages`; every assistant turn is learnt with its end of turn, nothing after the last.

    With a chat template the text is exactly what it renders. Without one a turn is `User:`, a line break, the
    text and an empty line; an assistant's turn ends with the tokenizer's eos_token.
    """
    messages = _messages(row)
    if getattr(tokenizer, "chat_template", None):
        return _rendered(row, messages, tokenizer)
    end = getattr(tokenizer, "eos_token", None) or ""
    pieces: list[Segment] = []
    for message in messages:
        pieces.append(Segment(f"{message['role'].capitalize()}:\n"))
        if message["role"] == "assistant":
            pieces += [Segment(message["content"], True), Segment(end, True, special=True), Segment("\n\n")]
        else:
            pieces.append(Segment(message["content"] + "\n\n"))
    return _merge(pieces)


def exchange(prompt: str, answer: str, tokenizer: Any, place: str) -> tuple[Segment, ...]:
    """Segments of one question and its answer, through a chat template where the tokenizer has one.

    Args:
        prompt: the question.
        answer: what is learnt.
        tokenizer: of `transformers`.
        place: where it is from, for errors.
    """
    if not getattr(tokenizer, "chat_template", None):
        return Segment(prompt), Segment(answer, learn=True)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer.strip()}]
    return conversation(Row({MESSAGES: turns}, place, 0), tokenizer)


def _messages(row: Row) -> list[dict[str, str]]:
    raw = row.values[MESSAGES]
    hint = 'It must be [{"role": "user", "content": "…"}, …].'
    if not isinstance(raw, list) or not raw:
        raise DataError(f"{row.place}: `messages` is not a list of turns. {hint}")
    messages: list[dict[str, str]] = []
    for i, message in enumerate(raw):
        turn = {k: message.get(k) for k in ("role", "content")} if isinstance(message, Mapping) else {"role": None}
        if not all(isinstance(text, str) for text in turn.values()):
            raise DataError(f"{row.place}: messages[{i}] lacks a text as role or content. {hint}")
        messages.append({name: str(text) for name, text in turn.items()})
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=None)
    if last is None:
        raise DataError(f"{row.place}: `messages` has no assistant turn, so nothing is learnt. Leave the row out.")
    return messages[: last + 1]


def _rendered(row: Row, messages: list[dict[str, str]], tokenizer: Any) -> tuple[Segment, ...]:
    """A chat template's text, split at the assistant's turns.

    A template is a program, so where a turn begins and ends is found by running it on marked contents: the text
    around the marks is the template's own. It counts only if filling the marks in gives the true rendering.
    """

    def render(turns: list[dict[str, str]], opened: bool = False) -> str:
        try:
            return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=opened))
        except Exception as error:  # whatever the template's own code raises
            raise DataError(
                f"{row.place}: the tokenizer's chat template refuses these messages ({error}). Change their roles, "
                f"or save the tokenizer with another template."
            ) from error

    full = render(messages)
    marks = [f"@@perdure{i}@@" for i in range(len(messages))]
    marked = render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    for clean in (str, str.strip, str.rstrip, str.lstrip):
        contents = [clean(message["content"]) for message in messages]
        if _substitute(marked, marks, contents) == full:
            break
    else:
        return _by_prefix(row, messages, full, render)
    end = marked[marked.index(marks[-1]) + len(marks[-1]) :].rstrip()
    pieces: list[Segment] = []
    at = 0
    for message, mark, content in zip(messages, marks, contents, strict=True):
        start = marked.find(mark, at)
        if start < 0:
            continue  # the template leaves this turn out
        pieces.append(Segment(marked[at:start], special=True))
        at = start + len(mark)
        learn = message["role"] == "assistant"
        if learn and marked.startswith(end, at):
            content, at = content + end, at + len(end)
        pieces.append(Segment(content, learn, special=True))
    return _checked(row, pieces, full)


def _substitute(marked: str, marks: Sequence[str], contents: Sequence[str]) -> str:
    parts, at = [], 0
    for mark, content in zip(marks, contents, strict=True):
        start = marked.find(mark, at)
        if start < 0:
            continue
        parts += [marked[at:start], content]
        at = start + len(mark)
    return "".join([*parts, marked[at:]])


def _by_prefix(
    row: Row, messages: list[dict[str, str]], full: str, render: Callable[..., str]
) -> tuple[Segment, ...]:
    """Turns by rendering ever longer beginnings; holds for a template that only ever adds to its text."""
    pieces: list[Segment] = []
    at = 0
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:i], True), render(messages[: i + 1])
        if not (full.startswith(before) and full.startswith(after) and at <= len(before) < len(after)):
            raise DataError(
                f"{row.place}: cannot tell the assistant's words from the rest of what the tokenizer's chat "
                f"template renders (it changes earlier turns). Write the row with `prompt` and `answer` instead."
            )
        end = len(after.rstrip())
        asked, answered = full[at : len(before)], full[len(before) : end]
        pieces += [Segment(asked, special=True), Segment(answered, True, special=True)]
        at = end
    return _checked(row, pieces, full)


def _checked(row: Row, pieces: Sequence[Segment], full: str) -> tuple[Segment, ...]:
    segments = _merge(pieces)
    if not segments or not full.startswith("".join(segment.text for segment in segments)):
        raise DataError(
            f"{row.place}: the tokenizer's chat template leaves the assistant's turns out, so nothing is learnt. "
            f"Write the row with `prompt` and `answer` instead."
        )
    return segments


def _merge(pieces: Sequence[Segment]) -> tuple[Segment, ...]:
    """Neighbours of one kind joined, empty ones dropped, and nothing after the last learnt one."""
    merged: list[Segment] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last and (last.learn, last.special) == (piece.learn, piece.special):
            merged[-1] = replace(last, text=last.text + piece.text)
        elif piece.text:
            merged.append(piece)
    while merged and not merged[-1].learn:
        merged.pop()
    return tuple(merged)


def _placeholders(pattern: str) -> list[tuple[str, str | None]]:
    """Literal text and the column after it, in turn."""
    try:
        parsed = list(Formatter().parse(pattern))
    except ValueError as error:
        raise ConfigError(
            f"template: {pattern!r} cannot be read ({error}). Write a literal brace twice: {{{{ and }}}}."
        ) from error
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.strip() or any(c in name for c in ".[]{}")):
            raise ConfigError(
                f"template: {pattern!r} must name plain columns, as in {{question}}: no index, attribute, "
                f"conversion or format; write a literal brace twice."
            )
    return [(text, name) for text, name, _, _ in parsed]


def _plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | bool)


def _value(row: Row, column: str) -> str:
    if column not in row.values:
        raise DataError(
            f"{row.place}: no column {column!r}. The row has: {_columns(row)}. "
            f"Name one of these instead, or correct the file."
        )
    value = row.values[column]
    if _plain(value):
        return str(value)
    if value is None or isinstance(value, float):
        raise DataError(f"{row.place}: column {column!r} is {value!r}. Give it a value, or leave the row out.")
    raise DataError(
        f"{row.place}: column {column!r} is a {type(value).__name__}, not text. Name a preparation (prepare) that "
        f"turns it into text, or change the file."
    )


def _columns(row: Row) -> str:
    return ", ".join(map(repr, row.values)) or "none"


def _known() -> str:
    return ", or ".join(f"`{prompt}` and `{answer}`" for prompt, _, answer in DEFAULTS)
