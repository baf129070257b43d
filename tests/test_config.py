"""Settings: every mistake is reported, with its name, its value and the way out."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from perdure.config import FORMAT, TrainingSettings, apply_overrides, parse_yaml, read_yaml, validate
from perdure.errors import ConfigError, UsageError
from perdure.training.settings import RunSettings


def refused(values: dict[str, object]) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(TrainingSettings, values, "here.yaml")
    assert str(caught.value).startswith("here.yaml: ")
    return str(caught.value)


def test_all_mistakes_are_reported_together() -> None:
    text = refused(
        {
            "batch_size": 0,
            "optimizer": {"lr": -1, "type": "adamm", "beta": 1},
            "schedule": {"warmup": "soon"},
            "clip": float("nan"),
            "precison": "fp32",
        }
    )
    lines = text.splitlines()
    assert len(lines) == 1 + 7
    for key, value in {
        "batch_size": "got 0",
        "optimizer.lr": "got -1",
        "optimizer.type": "got 'adamm'",
        "schedule.warmup": "got 'soon'",
        "clip": "got nan",
    }.items():
        (line,) = (line for line in lines if line.strip().startswith(f"{key}: "))
        assert line.endswith(value)
    assert "'adam', 'adamw', 'sgd' or 'adafactor'" in text


def test_a_single_mistake_stands_on_one_line() -> None:
    assert refused({"batch_size": 1.5}).count("\n") == 0


def test_an_unknown_setting_lists_the_known_ones() -> None:
    text = refused({"precison": "fp32"})
    assert "unknown setting 'precison'. Did you mean 'precision'?" in text
    for known in TrainingSettings.model_fields:
        assert known in text


def test_an_unknown_setting_inside_another_lists_its_neighbours() -> None:
    text = refused({"optimizer": {"learning_rate": 1.0}})
    assert "unknown setting 'optimizer.learning_rate'" in text
    assert "optimizer.lr" in text
    assert "batch_size" not in text


def test_settings_that_contradict_each_other() -> None:
    assert "micro_batch_size (9) must not exceed batch_size (8)" in refused(
        {"batch_size": 8, "micro_batch_size": 9}
    )
    assert validate(TrainingSettings, {"batch_size": 8, "micro_batch_size": 8}, "").micro_batch_size == 8


def test_a_mapping_where_a_value_belongs_and_the_other_way_round() -> None:
    assert "optimizer: " in refused({"optimizer": "adam"})
    assert "batch_size: " in refused({"batch_size": {"train": 3}})
    assert "continual_strategy.ewc: " in refused({"continual_strategy": {"ewc": None}})


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", "1.0e-3"])
def test_numbers_that_yaml_leaves_as_text(tmp_path: Path, text: str) -> None:
    """YAML 1.1 wants a point and a sign: it reads 1e-3 as a string. Written so, the number is 0.001."""
    path = tmp_path / "a.yaml"
    path.write_text(f"optimizer:\n  lr: {text}\n")
    assert validate(TrainingSettings, read_yaml(path), "a").optimizer.lr == 0.001


@pytest.mark.parametrize("value", ["inf", "nan", float("inf"), "", "fast"])
def test_no_number(value: object) -> None:
    assert "optimizer.lr: " in refused({"optimizer": {"lr": value}})


def test_settings_do_not_change_after_validation() -> None:
    settings = validate(TrainingSettings, {}, "x")
    with pytest.raises(ValidationError):
        settings.batch_size = 3


def test_a_newer_format_is_refused_before_its_settings_are_read() -> None:
    text = refused({"format": FORMAT + 1, "something_new": 1})
    assert text == f"here.yaml: format {FORMAT + 1} is newer than this perdure reads ({FORMAT}); upgrade perdure"


def test_config_errors_are_usage_errors_and_value_errors() -> None:
    with pytest.raises(ValueError):
        validate(TrainingSettings, {"batch_size": 0}, "x")
    with pytest.raises(UsageError) as caught:
        validate(TrainingSettings, {"batch_size": 0}, "x")
    assert caught.value.exit_code == 2


def test_overrides_at_every_depth() -> None:
    values = {"a": {"b": {"c": 1}, "kept": 2}, "stream": {"tasks": [{"name": "x"}, {"name": "y"}]}, "empty": None}
    result = apply_overrides(
        values,
        [
            "a.b.c=3e-4", "new=true", "far.away.value=[1, 2]", "stream.tasks.1.name=z", "stream.tasks.0={k: v}",
            "empty.inside=1", "text=a=b", "nothing=", " spaced =1",
        ],
    )  # fmt: skip
    assert result == {
        "a": {"b": {"c": "3e-4"}, "kept": 2},
        "new": True,
        "far": {"away": {"value": [1, 2]}},
        "stream": {"tasks": [{"k": "v"}, {"name": "z"}]},
        "empty": {"inside": 1},
        "text": "a=b",
        "nothing": None,
        "spaced": 1,
    }
    assert values["a"] == {"b": {"c": 1}, "kept": 2}
    assert values["stream"] == {"tasks": [{"name": "x"}, {"name": "y"}]}
    assert values["empty"] is None


def test_a_later_override_wins() -> None:
    assert apply_overrides({}, ["a.b=1", "a.b=2"]) == {"a": {"b": 2}}


def test_an_override_reaches_the_settings_as_a_number() -> None:
    values = apply_overrides({}, ["optimizer.lr=3e-4", "batch_size=4"])
    settings = validate(TrainingSettings, values, "x")
    assert (settings.optimizer.lr, settings.batch_size) == (3e-4, 4)


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("lr", "must be key=value, as in --set optimizer.lr=3e-4"),
        ("=3", "must be key=value"),
        ("a=[1, 2", "the value is not valid YAML"),
        ("a.b.c=1", "'b' is a single value, it has no settings inside"),
        ("list.2=1", "'2' must be a position from 0 to 1"),
        ("list.-1=1", "'-1' must be a position from 0 to 1"),
        ("list.x.y=1", "'x' must be a position from 0 to 1"),
        ("list.²=1", "'²' must be a position from 0 to 1"),
    ],
)
def test_bad_overrides(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        apply_overrides({"a": {"b": 1}, "list": [1, 2]}, [assignment])
    assert str(caught.value).startswith(f"--set {assignment!r}: ")
    assert words in str(caught.value)


def test_a_yaml_mistake_names_file_and_line(tmp_path: Path) -> None:
    """The list that opens on line 2 is found to be unclosed where line 3 begins a mapping."""
    path = tmp_path / "broken.yaml"
    path.write_text("a: 1\nb: [1, 2\nc: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml, line 3: not valid YAML: "):
        read_yaml(path)


def test_a_yaml_tab_names_its_line(tmp_path: Path) -> None:
    path = tmp_path / "tab.yaml"
    path.write_text("a:\n  b: 1\n\tc: 2\n")
    with pytest.raises(ConfigError, match=r"tab\.yaml, line 3: "):
        read_yaml(path)


@pytest.mark.parametrize(("text", "kind"), [("- 1\n- 2\n", "list"), ("", "NoneType"), ("word\n", "str")])
def test_a_yaml_file_that_holds_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    path = tmp_path / "other.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"other\.yaml: must hold a mapping of settings, got {kind}"):
        read_yaml(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.yaml: no such file"):
        read_yaml(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        read_yaml(tmp_path / "binary.yaml")


def test_yaml_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="line 1"):
        read_yaml(path)


def test_mistakes_inside_lists_name_their_place_once() -> None:
    """A bad item makes its list too short as well, and a template is a mapping or a list: neither is said."""

    def said(task: dict[str, Any]) -> str:
        with pytest.raises(ConfigError) as caught:
            validate(RunSettings, {"stream": {"tasks": [{"name": "t", "train": "t.jsonl", **task}]}}, "here.yaml")
        return str(caught.value).removeprefix("here.yaml: ")

    assert said({"trian": 1}).startswith(
        "unknown setting 'stream.tasks.0.trian'. Did you mean 'stream.tasks.0.train'?"
    )
    assert said({"template": {"prompt": "a"}}) == "stream.tasks.0.template.answer: missing"
    assert said({"template": "{a}"}) == "stream.tasks.0.template: must be a mapping of settings, got '{a}'"
    assert said({"template": []}).startswith("stream.tasks.0.template: must hold at least 1, got []")
    pieces = said({"template": [{"text": "{a}", "lern": True}]})
    assert "Did you mean 'stream.tasks.0.template.0.learn'?" in pieces
    assert "answer" not in pieces
    assert said({"template": {"answer": "{a.b}"}}).endswith("write a literal brace twice.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghi")),
         "line 7: not valid YAML: aliases make it stand for over 1,000,000 values"),
        ("a: &a [*a]", "line 1: not valid YAML: an alias stands for what it is part of"),
        ("a: " + "[" * 3000 + "]" * 3000, "not valid YAML: nested too deeply"),
        ("a: " + "1" * 5000, "line 1: not valid YAML: a number of 5000 digits"),
        ("a: 2001-99-99", "a value is not what its tag says: month must be in 1..12"),
        ("a: !!timestamp x", "a value is not what its tag says"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
    ],
    ids=["aliases", "an alias in itself", "depth", "digits", "date", "tag", "object"],
)  # fmt: skip
def test_yaml_that_is_a_trap(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "trap.yaml").write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_yaml(tmp_path / "trap.yaml")


def test_a_huge_yaml_file_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(ConfigError, match="larger than 16 MiB"):
        read_yaml(tmp_path / "huge.yaml")


def test_aliases_and_merge_keys_mean_what_they_do_in_yaml() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }


@pytest.mark.parametrize("name", ["lr", "learning_rate"])
def test_a_setting_one_level_further_in_is_meant(name: str) -> None:
    assert f"unknown setting '{name}'. Did you mean 'optimizer.lr'?" in refused({name: 3})


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("epochs: 1\nseed: 0\nepochs: 2\n")
    with pytest.raises(ConfigError, match="line 3: not valid YAML: 'epochs' stands here for the second time"):
        read_yaml(tmp_path / "r.yaml")
