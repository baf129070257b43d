"""`perdure arena tasks`, the arena's settings in a recipe, and whether its problems fit nano."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

import perdure
from perdure.errors import ConfigError, DataError
from perdure.recipes.arena.tasks import print_tasks
from perdure.streams.arena import ALL_KINDS, ALL_LEVELS, DISPLAY_NAMES, generate, split, wording
from perdure.streams.encode import Encoder
from perdure.streams.spec import ArenaSpec, StreamSpec, build

NANO = Path(perdure.__file__).parent / "models" / "nano"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(NANO)


def test_all_kinds_are_printed_in_eighty_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks(None, None, 3, 0)
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*ALL_KINDS, *DISPLAY_NAMES.values()))
    assert max(map(len, printed.splitlines())) <= 80
    assert printed.count("level ") == 30
    assert "\x1b" not in printed


def test_one_kind_and_level_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    print_tasks("code", 5, 4, 1)
    printed = capsys.readouterr().out
    for item in generate("code", 4, 1, 5, forms=None):
        assert "\n".join(f"  {line}" for line in (item.prompt + "\n" + item.answer.strip()).split("\n")) in printed
    print_tasks("code", 5, 4, 1)
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gird", None, 5, 0), r"--kind: unknown arena kind 'gird'. Did you mean 'grid'\? Known: .*cipher"),
        (("grid", 6, 5, 0), r"--level 6: there are levels 1 \(easy\) to 5 \(hard\)"),
        (("grid", 1, 0, 0), "-n 0: ask for at least 1"),
        (("operator", 1, 500, 0), "-n 500: kind 'operator' at level 1 cannot supply 500"),
    ],
)
def test_what_there_is_not_is_said_in_words(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        print_tasks(*arguments)


def test_a_recipe_takes_all_kinds_levels_and_wordings(tokenizer) -> None:
    settings = {
        "kinds": ["operator", "grid"],
        "train_rows": 12,
        "evaluation_rows": 4,
        "levels": [4, 5],
        "forms": 12,
    }
    stream, _ = build(StreamSpec.model_validate({"arena": settings}), None, 0, Encoder(tokenizer, 512))
    assert stream.names == ("operator", "grid")
    for task in stream:
        train, _ = split(task.name, 12, 4, 0, levels=(4, 5), forms=12)
        assert [example.key for example in task.train] == [item.key for item in train]
        assert {example.fields["level"] for example in task.train} == {4, 5}


def test_the_defaults_are_what_they_were() -> None:
    spec = ArenaSpec()
    assert (spec.kinds, spec.levels, spec.forms) == (ALL_KINDS[:5], (1, 2, 3), 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ["chess"]}, "unknown arena kind 'chess'.*summary"),
        ({"levels": [1, 6]}, "level must be one of 1, 2, 3, 4, 5, got 6"),
        ({"levels": [2, 2]}, "must differ"),
        ({"levels": []}, "levels"),
        ({"forms": 13}, "forms must be 1 to 12"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ArenaSpec.model_validate(settings)


def test_more_rows_than_a_kind_has_is_a_mistake_in_words(tokenizer) -> None:
    settings = {"kinds": ["operator"], "train_rows": 50, "levels": [1]}
    with pytest.raises(
        DataError, match=r"stream\.arena: kind 'operator'.*cannot supply 150 .*stream\.arena\.levels"
    ):
        build(StreamSpec.model_validate({"arena": settings}), None, 0, Encoder(tokenizer, 512))


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_wording_fits_nano_and_is_cut_between_prompt_and_answer(kind: str, tokenizer) -> None:
    for level in ALL_LEVELS:
        for item in generate(kind, 3, 4, level):
            for form in range(12):
                prompt, answer = wording(kind, item.facts, form, None)
                whole = tokenizer(prompt + " Answer:" + answer)["input_ids"]
                apart = tokenizer(prompt + " Answer:")["input_ids"]
                apart += tokenizer(answer, add_special_tokens=False)["input_ids"]
                assert whole == apart
                assert len(whole) < 256, (level, prompt)
