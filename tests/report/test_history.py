"""Histories: every form of file gives the same curves, and what is no history is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import DataError
from perdure.recipes.history import write_history
from perdure.report import history as module
from perdure.report.history import History, read_histories, read_history

MATH, HOTPOT = [1.0, 1.25, None, 1.5], [2.0, 1.75, 1.5, 1.25]
LISTS = {"math_loss": MATH, "hotpot_loss": HOTPOT}
STEPS = [0, 10, 20, 30]
ROWS = [
    {"step": s, "math_loss": m, "hotpot_loss": h, "phase": "B"} for s, m, h in zip(STEPS, MATH, HOTPOT, strict=True)
]
FORMS: dict[str, Any] = {
    "as written": {
        "format": 1, "name": "random", "selection_method": "random", "mix_percentage": 0.1, "steps": STEPS,
        "epochs": [0, 0.5, 1, 1.5], **LISTS,
    },
    "metrics below": {"name": "random", "steps": STEPS, "metrics": LISTS, "betas": [0.9, 0.999]},
    "all below": {"name": "random", "betas": [0.9, 0.999], "history": {**LISTS, "step": STEPS}},
    "below another key": {"name": "random", "settings": {"lr": 0.1}, "found": {**LISTS, "global_step": STEPS}},
    "rows": {"name": "random", "epoch": [1, 2], "log_history": ROWS},
    "rows without gaps": {"name": "random", "log": [{k: v for k, v in r.items() if v is not None} for r in ROWS]},
    "a list alone": ROWS,
}  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def file(content: Any, name: str = "forgetting_history_random.json") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return file


def gaps_as_none(values: tuple[float, ...]) -> list[float | None]:
    return [None if math.isnan(value) else value for value in values]


Read = Callable[[Path], History]


def check(read: Read, write: Callable[..., Path]) -> None:
    """Each form holds the same two curves of four measurements at steps 0 to 30, the third of MATH missing."""
    for content in FORMS.values():
        history = read(write(content))
        assert history.name == "random"
        assert list(history.steps) == STEPS
        assert history.unit == "step"
        assert {key: gaps_as_none(values) for key, values in history.curves.items()} == LISTS
    bare = read(write({"note": "of another program", "em": [0.5, 1]}, "forgetting_history_MATH_10pct.json"))
    assert (bare.name, bare.steps, bare.unit) == ("MATH_10pct", (0, 1), "measurement")
    assert bare.curves == {"em": (0.5, 1)}


def test_every_form_is_read(write: Callable[..., Path]) -> None:
    check(read_history, write)


def only_known_metrics(path: Path) -> History:
    history = read_history(path)
    known = {key: values for key, values in history.curves.items() if key in LISTS}
    return replace(history, curves=known)


def gaps_as_zeros(path: Path) -> History:
    history = read_history(path)
    return replace(history, curves={k: tuple(x if x == x else 0 for x in v) for k, v in history.curves.items()})


def always_counted(path: Path) -> History:
    history = read_history(path)
    return replace(history, steps=tuple(range(len(history.steps))))


def prefix_kept(path: Path) -> History:
    history = read_history(path)
    return replace(history, name=path.stem if history.unit == "measurement" else history.name)


@pytest.mark.parametrize("wrong", [only_known_metrics, gaps_as_zeros, always_counted, prefix_kept])
def test_wrong_readers_are_caught(wrong: Read, write: Callable[..., Path]) -> None:
    with pytest.raises(AssertionError):
        check(wrong, write)


@pytest.mark.parametrize(
    ("constant", "value"),
    [("UNITS", {"epochs": "epoch", "steps": "step"}), ("UNITS", {}), ("PLACES", ())],
)
def test_wrong_preferences_are_caught(
    constant: str, value: Any, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs before steps; steps as a curve; betas at the top before the curves below "history"."""
    monkeypatch.setattr(module, constant, value)
    with pytest.raises((AssertionError, DataError)):
        check(read_history, write)


def test_facts_are_all_that_is_neither_name_nor_axis_nor_curve(write: Callable[..., Path]) -> None:
    assert read_history(write(FORMS["as written"])).facts == {
        "selection_method": "random",
        "mix_percentage": 0.1,
        "epochs": [0, 0.5, 1, 1.5],
    }
    assert read_history(write(FORMS["metrics below"])).facts == {"betas": [0.9, 0.999]}
    assert read_history(write(FORMS["rows"])).facts == {"epoch": [1, 2], "phase": ["B"] * 4}
    below = {"a": {"loss": [1, 2], "loss_of": "MATH", "epochs": [1, 2]}, "seed": 3}
    history = read_history(write(below))
    assert (history.facts, history.unit, history.steps) == ({"loss_of": "MATH", "seed": 3}, "epoch", (1, 2))


def test_gaps_are_null_nan_and_infinities(write: Callable[..., Path]) -> None:
    history = read_history(
        write('{"math_loss": [1, null, NaN, Infinity, -Infinity, 1e999, 2.5], "all_gaps": [null]}')
    )
    assert gaps_as_none(history.curves["math_loss"]) == [1, None, None, None, None, None, 2.5]
    assert list(history.curves) == ["math_loss"]
    assert history.measured("math_loss") == [(0, 1), (6, 2.5)]
    assert history.measured("other") == []
    assert history.change("math_loss") == 1.5
    assert math.isnan(history.change("other"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Also the text: a list of steps, gaps as null, the format first."""
    path = tmp_path / "made" / "one.json"
    for unit in ("step", "epoch", "iteration", "measurement"):
        x = (0, 1) if unit == "measurement" else (0, 40)
        facts = {"selection_method": "none", "examples": 400, "epochs" if unit == "step" else "note": [1, 2]}
        if unit != "step":
            facts["note"] = "of phase B"
        history = History("none 10 %", x, {"math_loss": (1.5, math.nan), "em": (0.0, 0.5)}, facts, unit)
        write_history(path, history)
        again = read_history(path)
        assert repr(again) == repr(history)
    assert json.loads(path.read_text())["math_loss"] == [1.5, None]
    assert next(iter(json.loads(path.read_text()))) == "format"


def test_a_history_that_would_not_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="math_loss has 1 values for 2 steps"):
        History("a", (0, 1), {"math_loss": (1.0,)})
    for facts, said in (
        ({"sizes": [1, 2]}, "'sizes' is a list of numbers"),
        ({"steps": 3}, "'steps' has the name"),
    ):
        with pytest.raises(ValueError, match=said):
            write_history(tmp_path / "a.json", History("a", (0, 1), {"loss": (1.0, 2.0)}, facts))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "not JSON: Expecting value"),
        ('{"math_loss": [1, 2', "not JSON"),
        ("[" * 100_000, "nested too deep"),
        ('"text"', "must hold a JSON object, got text"),
        ("3", "must hold a JSON object, got 3"),
        ("{}", "no list of numbers in it"),
        ("[]", "no list of numbers in it"),
        ('{"steps": [1, 2], "math_loss": []}', "no list of numbers in it"),
        ('{"math_loss": [[1, 2]]}', "no list of numbers in it"),
        ('{"math_loss": [true, false]}', "no list of numbers in it"),
        ('{"math_loss": [1, 2], "hotpot_loss": [1]}', "differ in length: math_loss 2, hotpot_loss 1"),
        ('{"math_loss": [1, "2"]}', "math_loss: value 2 is text, where a number or null must stand"),
        ('{"math_loss": [1, true]}', "math_loss: value 2 is true, where a number"),
        ('{"name": 7, "math_loss": [1]}', "name must be text, got 7"),
        ('{"format": 2, "math_loss": [1]}', "format 2 is newer than this perdure reads (1); update perdure"),
        ('{"steps": [0, null], "math_loss": [1, 2]}', "steps: value 2 is null, where a number must stand"),
        ('{"math_loss": [1' + "0" * 400 + "]}", "math_loss: a number of it is too large"),
        (json.dumps({f"m{i}": [1] for i in range(101)}), "101 lists of numbers are too many; at most 100"),
        (
            json.dumps({"log": [{f"m{i}": 1} for i in range(101)]}),
            "the objects in 'log' have 101 keys; at most 100",
        ),
    ],
)
def test_what_is_no_history_is_refused(content: str, said: str, write: Callable[..., Path]) -> None:
    path = write(content)
    with pytest.raises(DataError) as caught:
        read_history(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)


def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"gone\.json: does not exist"):
        read_history(tmp_path / "gone.json")
    with pytest.raises(DataError, match="is a folder"):
        read_history(tmp_path)
    with pytest.raises(DataError, match="is not a file"):
        read_history("/dev/null")
    (tmp_path / "picture.json").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"picture\.json: not JSON: not text in UTF-8 \(byte 0\)"):
        read_history(tmp_path / "picture.json")
    monkeypatch.setattr(module, "LARGEST", 3 << 20)
    path = write('{"math_loss": [1], "text": "' + "x" * (3 << 20) + '"}')
    with pytest.raises(DataError, match="larger than 3 MiB"):
        read_history(path)


def test_a_mark_at_the_beginning_and_empty_names_are_passed_over(write: Callable[..., Path]) -> None:
    assert read_history(write("\ufeff" + json.dumps({"name": " ", "loss": [1]}))).name == "random"
    assert (
        read_history(write({"name": None, "loss": [1]}, "forgetting_history_.json")).name == "forgetting_history_"
    )


def test_all_files_that_are_none_are_named(write: Callable[..., Path]) -> None:
    good, bad, worse = write(LISTS, "good.json"), write("{}", "bad.json"), write("{", "worse.json")
    with pytest.raises(DataError) as caught:
        read_histories([bad, good, worse])
    head, *lines = str(caught.value).split("\n  ")
    assert head == "2 files are no histories:"
    assert [line.split(": ")[0] for line in lines] == [str(bad), str(worse)]
    with pytest.raises(DataError, match=r"^[^:]*bad\.json: no history: "):
        read_histories([good, bad])


def test_files_of_one_name_are_told_apart_by_as_much_of_their_paths_as_is_needed(
    write: Callable[..., Path],
) -> None:
    named = {"name": "random", **LISTS}
    paths = [write(named, name) for name in ("a/one.json", "a/two.json", "b/two.json")]
    paths.append(write({"name": "none", **LISTS}, "a/three.json"))
    names = [history.name for history in read_histories(paths)]
    assert names == ["random (one.json)", "random (a/two.json)", "random (b/two.json)", "none"]
