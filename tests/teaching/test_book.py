"""The folder of lessons: begun again from any moment it gives the same model, and the journal only grows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from perdure.errors import RunError, StorageError
from perdure.teaching import Teacher
from perdure.teaching.book import EACH, NEWEST, Book, chain_of, worth_keeping

Make = Callable[..., Any]
Fact = tuple[str, str]


@contextmanager
def opened(make: Make, path: Path, **settings: Any) -> Iterator[Teacher]:
    with make(path, **settings) as teacher:
        yield teacher


def state(teacher: Teacher) -> tuple[str, dict[str, bytes], list[Any]]:
    """Name, bytes and chain."""
    weights = {name: value.numpy().tobytes() for name, value in teacher.pupil.weights().items()}
    return teacher.address, weights, list(teacher._chain.entries)


@pytest.fixture(scope="module")
def made(make_teacher: Make, facts: list[Fact], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Three lessons, a row of the probe, and one more; and the state that they lead to."""
    path = tmp_path_factory.mktemp("made") / "lessons"
    with opened(make_teacher, path) as one:
        for fact in facts[:3]:
            assert one.teach(*fact).kept
        one.add_probe("w30 w31", "w32")
        assert one.teach(*facts[3]).kept
        return path, state(one)


@pytest.fixture
def folder(made: tuple[Path, Any], tmp_path: Path) -> tuple[Path, Any]:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(made[0], tmp_path / "lessons")), made[1]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "journal.jsonl").read_text().splitlines()]


def test_begun_again_it_is_the_same(teacher: Make, facts: list[Fact], folder: tuple[Path, Any]) -> None:
    path, before = folder
    with opened(teacher, path) as one, opened(teacher, path.parent / "other") as other:
        assert state(one) == before
        assert [entry.number for entry in one.lessons] == [1, 2, 3, 4]
        for fact in (*facts[:3], None, *facts[3:5]):
            if fact is None:
                other.add_probe("w30 w31", "w32")
            else:
                other.teach(*fact)
        lesson = one.teach(*facts[4])
        assert lesson.number == 5
        assert state(one) == state(other), "and goes on as one that was never closed"
        assert one.probe_right() == other.probe_right()
        assert one.distance() == other.distance()


@pytest.mark.parametrize("lost", [1, 2, 99])
def test_states_that_are_lost_are_taught_again(teacher: Make, folder: tuple[Path, Any], lost: int) -> None:
    path, before = folder
    addresses = [event["address"] for event in lines(path)]
    assert addresses[-1] == before[0]
    for address in addresses[-lost:]:
        shutil.rmtree(path / "states" / address)
    told: list[tuple[int, int]] = []
    with opened(teacher, path, watch=lambda *progress: told.append(progress)) as one:
        assert state(one) == before
    most = min(lost, 5)
    assert told == [(done, most) for done in range(most + 1)]


def test_a_state_that_was_torn_is_taught_again(teacher: Make, folder: tuple[Path, Any]) -> None:
    path, before = folder
    file = path / "states" / before[0] / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-7] + b"1234567")
    with opened(teacher, path) as one:
        assert state(one) == before


def test_a_state_that_comes_out_otherwise_is_an_error(
    teacher: Make, folder: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = folder
    shutil.rmtree(path / "states" / before[0])
    monkeypatch.setattr("perdure.teaching.trial._why", lambda lesson, gated: iter(["it is another machine"]))
    with pytest.raises(RunError, match="lesson 4 comes out otherwise than when it was taught"):
        teacher(path)


@pytest.mark.parametrize("cut", [1, 60, -1])
def test_a_torn_last_line_is_left_out(teacher: Make, facts: list[Fact], folder: tuple[Path, Any], cut: int) -> None:
    """Cut anywhere within its last line, the journal ends before it; that lesson may be taught again."""
    path, before = folder
    journal = path / "journal.jsonl"
    whole = journal.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    journal.write_bytes(whole[: start + cut] if cut > 0 else whole[:cut])
    with opened(teacher, path) as one:
        assert [entry.number for entry in one.lessons] == [1, 2, 3]
        assert journal.read_bytes() == whole[:start]
        assert one.teach(*facts[3]).number == 4
        assert state(one) == before
    assert len(lines(path)) == 5


def test_a_line_in_the_middle_that_is_no_json_is_an_error(teacher: Make, folder: tuple[Path, Any]) -> None:
    path, _ = folder
    journal = path / "journal.jsonl"
    rows = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([rows[0], rows[1][:20] + "\n", *rows[2:]]))
    with pytest.raises(RunError, match=r"journal.jsonl:2: not JSON; the journal was changed by other hands"):
        teacher(path)


ACTS: dict[str, Callable[[Teacher, list[Fact]], Any]] = {
    "teach": lambda one, facts: one.teach(*facts[4]),
    "forget": lambda one, facts: one.forget(2),
    "undo": lambda one, facts: one.undo(),
    "probe": lambda one, facts: one.add_probe("w33", "w34"),
}


def check_kills(
    make: Make, folder: tuple[Path, Any], facts: list[Fact], act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of the folder before each write is what a kill there leaves.

    Begun again it is as before the act or as after it, never otherwise; and doing it again leads to the same.
    """
    path, before = folder
    copies: list[Path] = []

    def watched(name: str) -> Any:
        method = getattr(Book, name)

        def call(self: Book, *given: Any, **values: Any) -> None:
            copies.append(path.parent / f"copy{len(copies)}")
            shutil.copytree(path, copies[-1])
            method(self, *given, **values)

        return call

    with monkeypatch.context() as patch:
        for name in ("save", "write", "sweep"):
            patch.setattr(Book, name, watched(name))
        with opened(make, path) as one:
            copies.clear()
            ACTS[act](one, facts)
            after = state(one)
    copies.append(path)
    assert after[0] != before[0]
    found = []
    for copy in copies:
        with opened(make, copy) as one:
            now = state(one)
            assert now in (before, after), copy.name
            found.append(now == after)
            if now == before:
                ACTS[act](one, facts)
                assert state(one) == after, copy.name
    assert found == sorted(found), "what a line of the journal made so stays so"
    assert set(found) == {False, True}


@pytest.mark.parametrize("act", list(ACTS))
def test_a_kill_between_any_two_writes(
    teacher: Make, folder: tuple[Path, Any], facts: list[Fact], act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_kills(teacher, folder, facts, act, monkeypatch)


class LineByLine(Teacher):
    """To forget is to write down that it is undone, and then each later lesson anew."""

    def forget(self, number: int) -> Any:
        later = [entry for entry in self.lessons if entry.number >= number]
        for _ in later:
            self.undo()
        for entry in later[1:]:
            self._teach(entry.matter, [entry.form])
        return later[0], []


def test_more_than_one_line_for_an_act_is_caught(
    teacher: Make, folder: tuple[Path, Any], facts: list[Fact], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(AssertionError, match="copy"):
        check_kills(lambda path: teacher(path, cls=LineByLine), folder, facts, "forget", monkeypatch)


def test_the_journal_only_grows(teacher: Make, facts: list[Fact], tmp_path: Path) -> None:
    path = tmp_path / "lessons"
    before = b""
    with opened(teacher, path, earlier=0, general=0) as one:
        journal = path / "journal.jsonl"
        steps: list[Callable[[], Any]] = [
            lambda: one.teach(*facts[0], held_out=["w1 w2 w4"]),
            lambda: one.teach(*facts[1]),
            lambda: one.teach(*facts[3]),
            lambda: one.add_probe("w1", "w2"),
            lambda: one.forget(1),
            lambda: one.note("good", prompt="w1"),
            one.undo,
        ]
        for number, step in enumerate(steps, 1):
            step()
            now = journal.read_bytes()
            assert now.startswith(before)
            assert now.count(b"\n") == number
            before = now
        assert chain_of(lines(path)) == one._chain.entries
        assert one.book is not None
        assert json.loads(json.dumps(one.book.events)) == lines(path)
    found = lines(path)
    assert [event["event"] for event in found] == ["lesson", "lesson", "lesson", "probe", "forget", "good", "undo"]
    assert [event["kept"] for event in found[:3]] == [True, False, True]
    assert found[1]["address"] == found[0]["address"], "a refused lesson is a line and no more"
    assert found[1]["why"] == ["it breaks 1 of 1 earlier answers (p = 0.02)"]


def test_without_a_probe_what_is_not_known_is_null(teacher: Make, facts: list[Fact], tmp_path: Path) -> None:
    with opened(teacher, tmp_path / "lessons", probe=[]) as one:
        assert one.teach(*facts[0]).kept
    (line,) = lines(tmp_path / "lessons")
    assert (line["kl"], line["probe_right"]) == (None, [None, None])


def test_a_full_disk_leaves_everything_as_it_was(
    teacher: Make, facts: list[Fact], folder: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = folder

    def full(*_: Any, **__: Any) -> None:
        raise StorageError("the disk is full")

    with opened(teacher, path) as one:
        for name in ("save", "write"):
            for act in ACTS.values():
                with monkeypatch.context() as patch:
                    patch.setattr(Book, name, full)
                    with pytest.raises(StorageError):
                        act(one, facts)
                assert state(one) == before
        assert one.teach(*facts[4]).number == 5
        before = state(one)
    with opened(teacher, path) as one:
        assert state(one) == before


def test_one_folder_one_teacher(teacher: Make, folder: tuple[Path, Any]) -> None:
    path, before = folder
    with opened(teacher, path) as one:
        with pytest.raises(RunError, match=r"process \d+ is at work here"):
            teacher(path)
        assert state(one) == before
    teacher(path)


def test_states_that_are_kept() -> None:
    """Of 35 the newest twelve, 23 to 34, and 0, 10, 20 and 30."""
    assert (NEWEST, EACH) == (12, 10)
    chain = [str(i) for i in range(35)]
    assert worth_keeping(chain) == {str(i) for i in (0, 10, 20, *range(23, 35))}
    assert worth_keeping(chain[:1]) == {"0"}
    assert worth_keeping(chain[:13]) == set(chain[:13])
    assert worth_keeping(chain[:14]) == set(chain[:14]) - {"1"}


def test_others_are_swept(
    teacher: Make, facts: list[Fact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perdure.teaching.book.NEWEST", 2)
    monkeypatch.setattr("perdure.teaching.book.EACH", 3)
    path = tmp_path / "lessons"
    with opened(teacher, path) as one:
        for number, fact in enumerate(facts[:6], 1):
            assert one.teach(*fact).kept
            kept = {*range(number - 1, number + 1), *range(0, number + 1, 3)} - {0}
            there = {p.name for p in (path / "states").iterdir() if not p.name.startswith(".")}
            assert there == {one._chain.addresses[i] for i in kept}
            assert set(one._chain.held) == there | {one._chain.addresses[0]}
        before = one.pupil.weights()
        one.forget(2)
        one.forget(5)
        assert [entry.number for entry in one.lessons] == [1, 3, 4, 6]
    with opened(teacher, tmp_path / "other") as other:
        for number in (0, 2, 3, 5):
            other.teach(*facts[number])
        assert any(not torch.equal(before[name], now) for name, now in other.pupil.weights().items())
        wanted = state(other)[:2]
    with opened(teacher, path) as one:
        assert state(one)[:2] == wanted
