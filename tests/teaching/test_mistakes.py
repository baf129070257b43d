"""Mistakes are said in words that name the way out, and change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import ConfigError, DataError, RunError
from perdure.teaching import Matter, Teacher
from perdure.teaching import probe as probes
from perdure.teaching.lesson import matter_of

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (("", "w1"), DataError, "a lesson needs a prompt and an answer"),
        (("w1", " \n"), DataError, "a lesson needs a prompt and an answer"),
        (("w1", "w2", ["w3", ""]), DataError, "no wording of it may be empty"),
        (("w1", "w2", [], [" "]), DataError, "no wording of it may be empty"),
        (("w1  w2", "w3", ["w1 w2"]), DataError, "the wording 'w1 w2' stands twice in the lesson; leave one out"),
        (("w1", "w3", ["w2"], ["w2 "]), DataError, "the wording 'w2' stands twice"),
        (("w1 " * 70, "w3"), DataError, "is longer than the model's 64 tokens; shorten it"),
        (("w1", "w3 " * 70), DataError, "'w1' with its answer is longer than the model's 64 tokens"),
        (("w1", "w3", [], ["w2 " * 70]), DataError, "is longer than the model's 64 tokens"),
        (("w1", "w3", [], [], ["0.3"]), ConfigError, "'0.3' is no form of a lesson; there are whole, more replay"),
        (("w1", "w3", [], [], ["probe"]), ConfigError, "'probe' is no form of a lesson"),
    ],
)
def test_what_cannot_be_taught(
    teacher: Make, tmp_path: Path, given: tuple[Any, ...], error: type[Exception], words: str
) -> None:
    one = teacher(tmp_path / "lessons", probe=[])
    before = one.address
    with pytest.raises(error, match=words):
        one.teach(*given)
    assert (one.address, one.lessons) == (before, [])
    assert (tmp_path / "lessons" / "journal.jsonl").read_bytes() == b""


def test_what_cannot_be_asked_forgotten_or_added(teacher: Make, facts: list[tuple[str, str]]) -> None:
    one = teacher(probe=[])
    with pytest.raises(DataError, match="the prompt is empty; ask something"):
        one.ask("  ")
    with pytest.raises(DataError, match="longer than the model's 64 tokens"):
        one.ask("w1 " * 80)
    with pytest.raises(DataError, match="the model has no lesson 1; it has none"):
        one.forget(1)
    with pytest.raises(ConfigError, match="is no form"):
        one.again("half")
    for fact in facts[:2]:
        assert one.teach(*fact).kept
    with pytest.raises(DataError, match="the model has no lesson 3; it has 1, 2"):
        one.forget(3)
    with pytest.raises(DataError, match="the model has no lesson 0"):
        one.forget(0)
    for row in (("", "w1"), ("w1", " "), ("w1 " * 70, "w2")):
        with pytest.raises(DataError):
            one.add_probe(*row)
    assert [entry.number for entry in one.lessons] == [1, 2]
    assert one.probe_count == 0


def test_a_folder_of_other_settings(teacher: Make, facts: list[tuple[str, str]], tmp_path: Path) -> None:
    path = tmp_path / "lessons"
    with teacher(path) as one:
        one.teach(*facts[0])
    for changed in ({"lr": 0.01}, {"tolerance": 0.1}, {"seed": 1}, {"probe": [{"prompt": "w1", "answer": "w2"}]}):
        with pytest.raises(RunError, match="started otherwise"):
            teacher(path, **changed)
    with pytest.raises(
        RunError, match=r"its probe is the rows in .*probe\.jsonl, and what is given holds other rows"
    ):
        teacher(path, probe=[{"prompt": "w1", "answer": "w2"}])
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "w1", "answer": "w2"}\n')
    with pytest.raises(RunError, match=r"other\.jsonl holds other rows\. Leave the probe out"):
        teacher(path, probe=other)
    with teacher(path, probe=None, max_new_tokens=3) as one:
        assert [entry.number for entry in one.lessons] == [1]
    with teacher(path, max_new_tokens=3) as one:
        assert [entry.number for entry in one.lessons] == [1]


def test_a_folder_that_holds_something_else(teacher: Make, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds something that is no lessons; give an empty folder"):
        teacher(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("model: nano\nrecorded: {versions: {}}\n")
    with pytest.raises(RunError, match="holds a run that is no lessons; give another folder"):
        teacher(run)
    assert (run / "config.yaml").read_text() == "model: nano\nrecorded: {versions: {}}\n"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "w1"}', "a row of a probe is"),
        ('{"prompt": "w1", "answer": " "}', "a row of a probe is"),
        ('{"prompt": "w1", "answer": 3}', "a row of a probe is"),
    ],
)
def test_a_bad_line_of_a_probe(teacher: Make, tmp_path: Path, line: str, words: str) -> None:
    file = tmp_path / "probe.jsonl"
    file.write_text('{"prompt": "w1", "answer": "w2"}\n' + line + "\n")
    with pytest.raises(DataError, match=words) as caught:
        teacher(probe=file)
    assert "probe.jsonl" in str(caught.value)
    assert "2" in str(caught.value)
    with pytest.raises(ConfigError, match="probe: row 2 lacks a prompt or an answer"):
        teacher(probe=[{"prompt": "w1", "answer": "w2"}, {"prompt": "w1"}])


def test_the_sides_of_a_probe_share_no_row(tmp_path: Path) -> None:
    """A row's side hangs on the row alone: another row more or less moves none."""
    rows = [{"prompt": f"w{i}", "answer": f"w{i + 1}"} for i in range(200)]
    file = tmp_path / "probe.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = probes.read(file, 1000)
    assert found == probes.of_rows(rows, 1000)
    assert not {row.prompt for row in found.measured} & {row.prompt for row in found.training}
    assert len(found.measured) + len(found.training) == 200
    assert 70 < len(found.measured) < 130, "4 deviations of a fair coin"
    fewer = probes.of_rows(rows[:150], 1000)
    assert set(fewer.measured) <= set(found.measured)
    assert set(fewer.training) <= set(found.training)
    assert set(probes.of_rows(rows, 20).measured) < set(found.measured)
    assert len(probes.of_rows(rows, 20).measured) == 20
    assert probes.of_rows(rows, 20).key != found.key
    nano = probes.of_nano(50, 30)
    assert len(nano.measured) == 50
    assert not {row.prompt for row in nano.measured} & {row.prompt for row in nano.training}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"prompt": "w1"}, "f.jsonl:3: no 'answer'; a lesson is"),
        ({"answer": "w1"}, "f.jsonl:3: no 'prompt'"),
        (
            {"prompt": "w1", "answer": "w2", "wording": "w3"},
            "f.jsonl:3: unknown key 'wording'; a lesson has prompt",
        ),
        ({"prompt": "w1", "answer": 2}, "f.jsonl:3: answer must be a text"),
        ({"prompt": ["w1"], "answer": "w2"}, "f.jsonl:3: prompt must be a text"),
        ({"prompt": "w1", "answer": "w2", "wordings": "w3"}, "f.jsonl:3: wordings must be a list of texts"),
        ({"prompt": "w1", "answer": "w2", "held_out": [1]}, "f.jsonl:3: held_out must be a list of texts"),
        ({"prompt": "w1", "answer": "w2", "held_out": ["w1"]}, "f.jsonl:3: the wording 'w1' stands twice"),
        ({"prompt": "", "answer": "w2"}, "f.jsonl:3: a lesson needs a prompt"),
    ],
)
def test_a_bad_line_of_lessons(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        matter_of(values, "f.jsonl:3")
    assert str(caught.value).startswith(words)


def test_a_line_of_lessons() -> None:
    values = {"prompt": "w1", "answer": "w2", "wordings": ["w3"], "held_out": ["w4", "w5"]}
    assert matter_of(values, "f.jsonl:1") == Matter("w1", "w2", ("w3",), ("w4", "w5"))
    assert matter_of({"prompt": "w1", "answer": "w2"}, "f.jsonl:1") == Matter("w1", "w2")


@pytest.mark.parametrize(
    "settings",
    [{"max_steps": 0}, {"tolerance": 1}, {"alpha": 0}, {"sure": 1}, {"lr": 0}, {"tuning": "full"}, {"x": 1}],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=name):
        Teacher("nano", settings=settings)
