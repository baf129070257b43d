"""Nano's text: seeded, weighted, and apart from the probe and the arena."""

from collections import Counter
from itertools import islice

import pytest

from perdure.streams import arena, corpus
from perdure.streams.arena import KINDS, generate, normalise, plain


def documents(count: int, seed: int = 0) -> list[corpus.Document]:
    return list(islice(corpus.documents(seed), count))


def test_documents_are_seeded_and_weighted() -> None:
    assert documents(200) == documents(200)
    assert documents(200) != documents(200, seed=1)
    for document in documents(2000):
        assert all(0 < weight <= 1 for _, weight in document)
        assert all(text[0] in " .!?;" and text[-1] != " " for text, _ in document[1:])


def test_corpus_probe_and_arena_share_no_normalised_text() -> None:
    probe, arena_texts = corpus.probe(), set()
    for kind in KINDS:
        for item in generate(kind, 300, seed=3):
            prompt, answer = plain(item)
            arena_texts |= {normalise(t) for t in (item.prompt, item.prompt + item.answer, prompt, prompt + answer)}
    probe_texts = {normalise(t) for row in probe for t in (row["prompt"], row["prompt"] + row["answer"])}
    corpus_texts = set()
    for document in documents(20_000):
        corpus_texts |= {normalise(corpus.text_of(document)), normalise(document[0][0])}
    assert not probe_texts & arena_texts
    assert not corpus_texts & probe_texts
    assert not corpus_texts & arena_texts


def test_lessons_bring_the_look_up_kinds_one_by_one_and_then_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = tuple((20, shares) for _, shares in corpus.LESSONS)
    monkeypatch.setattr(corpus, "LESSONS", plan)
    text = [corpus.text_of(document) for document in islice(corpus.lessons(0), 20 * len(plan) + 500)]
    assert text == [corpus.text_of(document) for document in islice(corpus.lessons(0), 580)]
    assert all(" than " in document for document in text[:20])
    assert all("hen " in document or " than " in document for document in text[20:40])
    assert any(" + " in document for document in text[-500:])
    assert set().union(*(shares for _, shares in plan)) < set(corpus.SHARES)


def test_probe_has_two_hundred_items_evenly_over_the_skills() -> None:
    probe = corpus.probe()
    assert Counter(row["skill"] for row in probe) == dict.fromkeys(corpus.SKILLS, 20)
    assert len({row["id"] for row in probe}) == 200
    assert probe == corpus.probe()
    assert not {row["id"] for row in probe} & {row["id"] for row in corpus.validation(500)}


def test_sums_are_right() -> None:
    for row in corpus.validation(500):
        if row["skill"] == "arithmetic":
            a, sign, b, _ = row["prompt"].split()
            value = {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign]
            assert row["answer"] == f" {value}."


def test_partition_is_stable_and_keeps_a_row_with_its_continuation() -> None:
    parts = Counter(arena.partition("math", {"n": n}) for n in range(16_000))
    assert abs(parts["arena"] / 16_000 - 4 / 16) < 0.02
    assert abs(parts["probe"] / 16_000 - 1 / 16) < 0.02
    short, long = ({"terms": [2, 4, 6, 8][: n + 4] + [10] * n} for n in (0, 1))
    assert arena.partition("sequence", short) == arena.partition("sequence", long)
