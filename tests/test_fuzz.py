"""Some cases of `make torture`'s mutated input, among them all that ever went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import fuzz

# A list of keys that was cut or changed.
PAST = (65, 83, 113, 116, 3081, 4331)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "fuzz"
    fuzz.prepare(path)
    return path


def test_mutated_input_is_taken_or_refused_in_words(base: Path) -> None:
    faults = {number: fuzz.one(number, base) for number in (*PAST, *range(1000, 1045))}
    assert {number: fault for number, fault in faults.items() if fault} == {}


def test_a_mutated_recipe_as_a_command(base: Path) -> None:
    assert fuzz.whole(3, base) is None
