"""Examples of text to token ids and labels. Knows one tokenizer and the lengths that fit; masks go by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from perdure.errors import ConfigError, DataError, ModelError
from perdure.types import IGNORE, Example

if TYPE_CHECKING:
    from torch import LongTensor

TOO_LONG = "too long"
ANSWER_TOO_LONG = "answer too long"
NOTHING_LEARNT = "nothing to learn"
FIRST_KEYS = 5


class Encoder:
    """Tokenise examples, segment by segment, so that a prompt has the same tokens in training and generation.

    A string such as `</s>` in a segment is the special token where the segment is `special`, else ordinary text.

    Args:
        tokenizer: of `transformers`; it must have an end token.
        max_length: most tokens an example may have, BOS and EOS counted.
        answer_limit: most learnt tokens, EOS counted; None: no limit of its own.

    Raises:
        ModelError: the tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, max_length: int, answer_limit: int | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos_token, so an answer could never end. Set tokenizer.eos_token and save it."
            )
        self.bos = _prefix(tokenizer)
        least = len(self.bos) + 2
        if max_length < least:
            raise ConfigError(f"max_length must be at least {least} tokens, got {max_length}.")
        if answer_limit is not None and answer_limit < 2:
            raise ConfigError(f"answer_limit must be at least 2 tokens (one and the end), got {answer_limit}.")
        self.tokenizer = tokenizer
        self.eos = int(tokenizer.eos_token_id)
        self.max_length = int(max_length)
        self.answer_limit = answer_limit
        self._kept = self._cut = self._cut_tokens = 0
        self._left_out: dict[str, int] = {}
        self._first: dict[str, list[str]] = {}

    def limited(self, answer_limit: int | None) -> Encoder:
        """The same encoder with another answer limit and a report of its own."""
        return Encoder(self.tokenizer, self.max_length, answer_limit)

    def encode(self, example: Example) -> Example | None:
        """The example with x (ids, int64 [T]) and y (labels, int64 [T], -100 where not learnt); None: left out."""
        return self.encode_many([example])[0]

    def encode_many(self, examples: Sequence[Example]) -> list[Example | None]:
        """`encode` for many, in one call of the tokenizer, which is much faster."""
        import torch

        encoded: list[Example | None] = []
        for example, pieces in zip(examples, self._tokens(examples), strict=True):
            encoded.append(None)
            if not any(ids and segment.learn for ids, segment in zip(pieces, example.segments, strict=True)):
                self._leave_out(example, NOTHING_LEARNT)
            elif (fitted := self._fit(example, pieces)) is None:
                self._leave_out(example, TOO_LONG)
            elif self.answer_limit is not None and sum(y != IGNORE for y in fitted[1]) > self.answer_limit:
                self._leave_out(example, ANSWER_TOO_LONG)
            else:
                ids, labels, lost = fitted
                self._kept += 1
                self._cut += lost > 0
                self._cut_tokens += lost
                encoded[-1] = example.but(x=torch.tensor(ids), y=torch.tensor(labels))
        return encoded

    def prompt_ids(self, example: Example) -> LongTensor:
        """Ids of everything before the last learnt stretch, as in training: what generation goes on from.

        Raises:
            DataError: the example does not fit.
        """
        import torch

        if example.x is not None and example.y is not None:
            ids, labels = example.x.tolist(), example.y.tolist()
        else:
            fitted = self._fit(example, self._tokens([example])[0])
            if fitted is None:
                raise DataError(
                    f"example {example.key!r} is longer than {self.max_length} tokens. Shorten it, or mark the "
                    f"part that may be shortened as context."
                )
            ids, labels, _ = fitted
        end = max((i for i, label in enumerate(labels) if label == IGNORE), default=-1) + 1
        return torch.tensor(ids[:end], dtype=torch.int64)  # type: ignore[return-value]

    def reference(self, example: Example) -> str:
        """Text of the last learnt stretch (the answer, the last assistant turn), without end and outer space."""
        texts: list[str] = []
        for segment in reversed(example.segments):
            if segment.learn:
                texts.insert(0, self._without_end(segment.text) if segment.special else segment.text)
            elif texts:
                break
        return "".join(texts).strip()

    def _without_end(self, text: str) -> str:
        ends = [end for end in {*self.tokenizer.all_special_tokens, *self.tokenizer.get_added_vocab()} if end]
        text = text.rstrip()
        while found := next((end for end in ends if text.endswith(end)), None):
            text = text.removesuffix(found).rstrip()
        return text

    def report(self) -> dict[str, Any]:
        """What became of the examples so far, as plain values: counts, and by reason the first keys left out."""
        return {
            "kept": self._kept,
            "cut": self._cut,
            "cut_tokens": self._cut_tokens,
            "left_out": dict(self._left_out),
            "first_left_out": {reason: list(keys) for reason, keys in self._first.items()},
        }

    def _leave_out(self, example: Example, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1
        keys = self._first.setdefault(reason, [])
        if len(keys) < FIRST_KEYS:
            keys.append(example.key)

    def _tokens(self, examples: Sequence[Example]) -> list[list[list[int]]]:
        """Ids of each example's segments."""
        segments = [segment for example in examples for segment in example.segments]
        found: dict[int, list[int]] = {}
        for special in (False, True):
            places = [i for i, segment in enumerate(segments) if segment.special == special]
            if places:
                encoded = self.tokenizer(
                    [segments[i].text for i in places],
                    add_special_tokens=False,
                    split_special_tokens=not special,
                    return_attention_mask=False,
                    verbose=False,  # lengths are our business: the tokenizer need not warn of them
                )
                found.update(zip(places, encoded["input_ids"], strict=True))
        flat = iter(found[i] for i in range(len(segments)))
        return [[next(flat) for _ in example.segments] for example in examples]

    def _fit(self, example: Example, pieces: list[list[int]]) -> tuple[list[int], list[int], int] | None:
        """Ids, labels and how many tokens were cut; None where it does not fit.

        Cut segments lose tokens from their end, the last such segment first.
        """
        # A chat template may have written BOS and EOS already; each stands once.
        filled = [(ids, segment.special) for ids, segment in zip(pieces, example.segments, strict=True) if ids]
        start = [] if filled and filled[0][1] and filled[0][0][: len(self.bos)] == self.bos else self.bos
        end = [] if filled and filled[-1][1] and filled[-1][0][-1] == self.eos else [self.eos]
        excess = sum(map(len, pieces)) + len(start) + len(end) - self.max_length
        lost = 0
        pieces = list(pieces)
        for i in reversed(range(len(pieces))):
            if example.segments[i].cut and lost < excess:
                keep = max(0, len(pieces[i]) - (excess - lost))
                lost += len(pieces[i]) - keep
                pieces[i] = pieces[i][:keep]
        if lost < excess:
            return None
        ids, labels = list(start), [IGNORE] * len(start)
        for piece, segment in zip(pieces, example.segments, strict=True):
            ids += piece
            labels += piece if segment.learn else [IGNORE] * len(piece)
        ids += end
        labels += end
        labels[-1] = ids[-1]
        return ids, labels, lost


def _prefix(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer itself puts in front of a text."""
    probe = "a b"
    plain = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
    full = list(tokenizer(probe)["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    return []
