"""Artificial languages: what they say can be read back, and one language misleads about another."""

from __future__ import annotations

import pytest
import torch

from perdure.errors import ConfigError
from perdure.streams.languages import Language, Languages
from perdure.types import IGNORE


def test_a_sentence_by_hand() -> None:
    """Concept 0 is word 7, 1 is 5, 2 is 6. "1 does 2 to 0" in the order OVS: particle 9, then 7, 6, 5."""
    language = Language("1-OVS", "OVS", particle=9, lexicon=(7, 5, 6))
    assert language.say((1, 2, 0)) == (9, 7, 6, 5)
    assert language.read((9, 7, 6, 5)) == (1, 2, 0)


@pytest.mark.parametrize("words", [None, 40])
def test_every_row_says_what_its_target_holds(words: int | None) -> None:
    family = Languages(count=7, nouns=6, verbs=3, words=words, seed=3)
    classes, texts = family.stream("classification", 60, 20), family.stream("causal_lm", 60, 20)
    for language, task, same in zip(family.languages, classes, texts, strict=True):
        rows, long = [*task.train, *task.evaluation], [*same.train, *same.evaluation]
        assert len({row.key for row in rows}) == 80
        for row, text in zip(rows, long, strict=True):
            meaning = language.read(tuple(row.x.tolist()))
            assert (row.task, row.y.item()) == (language.name, meaning[0])
            assert meaning[0] != meaning[2]
            assert text.x.tolist() == [*row.x.tolist(), *meaning]
            assert text.y.tolist() == [IGNORE] * 4 + list(meaning)
            assert max(text.x.tolist()) < family.vocabulary


def test_ids_do_not_overlap() -> None:
    family = Languages(count=3, nouns=4, verbs=2, words=9)
    assert family.vocabulary == 6 + 9 + 3
    for i, language in enumerate(family.languages):
        assert set(language.lexicon) <= set(range(6, 15))
        assert len(set(language.lexicon)) == 6
        assert language.particle == 15 + i


def test_orders_differ_and_words_mislead() -> None:
    """With the smallest pool every language uses all words; few of them mean the same in two languages."""
    family = Languages(count=6, nouns=10, verbs=5)
    assert sorted(language.order for language in family.languages) == ["OSV", "OVS", "SOV", "SVO", "VOS", "VSO"]
    first, *others = family.languages
    for other in others:
        assert set(other.lexicon) == set(first.lexicon)
        assert sum(a == b for a, b in zip(first.lexicon, other.lexicon, strict=True)) <= 4


def test_the_seed_decides_and_a_larger_family_begins_the_same() -> None:
    few, many = Languages(count=2, words=20, seed=5), Languages(count=4, words=20, seed=5)
    assert few.languages == many.languages[:2]
    for a, b in zip(few.stream(), list(many.stream())[:2], strict=True):
        assert all(torch.equal(x.x, y.x) and x.key == y.key for x, y in zip(a.train, b.train, strict=True))
    assert Languages(seed=6).languages != Languages(seed=5).languages


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="nouns must be at least 2, got 1"):
        Languages(nouns=1)
    with pytest.raises(ConfigError, match="words must be at least 15"):
        Languages(words=14)
    with pytest.raises(ConfigError, match="450 at most"):
        Languages().stream(train_rows=400, evaluation_rows=51)
    with pytest.raises(ConfigError, match="objective must be"):
        Languages().stream("regression")  # type: ignore[arg-type]
