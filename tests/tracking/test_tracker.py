"""What all trackers share: what is tracked by which name, sending beside the training, failures, ids."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import ConfigError, RunError
from perdure.tracking import Tracker, build, forget, tracker, untracked
from perdure.tracking.state import EVENTS, IDS, read_ids, write_ids
from perdure.tracking.tracker import Point, flat, parameters, reason, summary


class Notes(Tracker):
    """Keeps what it is sent; a link that is down raises, one that is slow waits."""

    name = "json"  # a module that is there

    def __init__(self) -> None:
        self.said: list[str] = []
        super().__init__(self.said.append)
        self.sent: list[Point] = []
        self.down = False
        self.up = threading.Event()
        self.up.set()
        self.finished: list[str] = []
        self.status = ""

    def _open(self, facts: Mapping[str, Any]) -> str:
        return "notes"

    def _send(self, points: list[Point]) -> None:
        assert self.up.wait(10)
        while points:
            if self.down:
                raise OSError("the link is down\nand more")
            self.sent.append(points.pop(0))

    def _finish(self, results: Mapping[str, Any], files: Sequence[tuple[Path, str]]) -> None:
        self.finished = [name for _, name in files]

    def _close(self, status: str) -> None:
        self.status = status


def steps(notes: Notes, *numbers: int) -> None:
    for number in numbers:
        notes.event("step", {"step": number, "task": "a", "stage": 1, "loss": 1.0})


def test_settings_become_flat_parameters() -> None:
    settings = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "stream": {"tasks": [{"name": "a"}]}, "clip": None}
    assert flat(settings) == {"optimizer.lr": 0.1, "optimizer.betas": "[0.9, 0.99]", "stream.tasks.0.name": "a"}
    facts = {
        "name": "x",
        "folder": "runs/x",
        "settings": settings,
        "seed": 3,
        "versions": {"torch": "2"},
        "steps": 0,
    }
    assert parameters(facts) == {**flat(settings), "seed": 3, "versions.torch": "2"}
    assert parameters({}) == {}


def test_the_summary_leaves_out_what_is_no_number() -> None:
    figures = {"average": 0.5, "forgetting": None, "higher_is_better": True, "per_task": {"a": {}}}
    assert summary({"metrics": {"exact_match": figures}, "steps": 8, "memory": None, "tasks": ["a"]}) == {
        "summary/exact_match/average": 0.5,
        "summary/steps": 8.0,
    }
    assert summary({}) == {}


def test_events_become_points() -> None:
    notes = Notes()
    notes.begin({})
    notes.event("evaluation", {"step": 0, "row": 0, "task": "b", "metrics": {"loss": 2.0, "exact_match": None}})
    notes.event("task", {"step": 0, "task": "a", "stage": 1})
    notes.event("step", {"step": 1, "task": "a", "stage": 1, "loss": 1.5, "lr": None, "ok": True})
    notes.event(
        "epoch", {"step": 1, "task": "a", "stage": 1, "epoch": 0, "metrics": {"accuracy": 0.5}, "best": None}
    )
    notes.event("skipped", {"step": 2, "task": "a", "reason": "nan"})
    notes.event("probe", {"step": 2, "row": 1, "metrics": {"loss": 3.0}})
    notes.event("checkpoint", {"step": 2, "seconds": 1.0})
    notes.end({})
    assert [(point.step, point.scalars, point.stage, point.task) for point in notes.sent] == [
        (0, {"loss/b": 2.0}, 0, ""),
        (1, {"train/loss": 1.5}, 1, "a"),
        (1, {"epoch/epoch": 0.0, "epoch/accuracy": 0.5}, 1, "a"),
        (2, {"train/skipped": 1.0}, 1, "a"),
        (2, {"probe/loss": 3.0}, 1, "a"),
    ]
    assert notes.said == ["json: notes"]


def test_training_does_not_wait_for_a_slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SECONDS", 0.0)
    notes = Notes()
    notes.begin({})
    notes.up.clear()
    start = time.perf_counter()
    steps(notes, *range(1, 50))
    assert time.perf_counter() - start < 5
    assert notes.sent == []
    notes.up.set()
    notes.end({"finished": False})
    assert [point.step for point in notes.sent] == list(range(1, 50))
    assert notes.status == "FAILED"


def test_little_is_sent_late_and_much_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 3 points to a batch, the third of them sends; nothing else does within the 5 seconds."""
    monkeypatch.setattr(tracker, "POINTS", 3)
    notes = Notes()
    notes.begin({})
    steps(notes, 1, 2)
    assert notes._thread is None
    steps(notes, 3)
    assert notes._thread is not None
    notes._thread.join()
    assert [point.step for point in notes.sent] == [1, 2, 3]


def test_a_failure_is_told_of_once_and_made_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points wait in their order; the link is tried again after a pause that doubles, and at the end."""
    monkeypatch.setattr(tracker, "SECONDS", 0.0)
    notes = Notes()
    notes.begin({})
    steps(notes, 1)
    notes._flush(wait=True)
    notes.down = True
    for number in range(2, 8):
        steps(notes, number)
        if notes._thread is not None:
            notes._thread.join()
    assert [point.step for point in notes.sent] == [1]
    assert notes.said[1:] == [
        "warning: json: the link is down; the run goes on, and what is not sent yet is tried again later"
    ]
    assert notes._pause == 2 * tracker.PAUSE
    notes.down = False
    steps(notes, 8)
    assert [point.step for point in notes.sent] == [1]  # the pause is not over
    notes.end({}, [Path("results.json")])
    assert [point.step for point in notes.sent] == list(range(1, 9))
    assert (notes.finished, notes.status, len(notes.said)) == (["results.json"], "FINISHED", 2)


def test_a_link_that_stays_down_does_not_raise() -> None:
    notes = Notes()
    notes.begin({})
    steps(notes, 1)
    notes.down = True
    notes.end({}, [Path("results.json")])
    assert (notes.finished, len(notes.said)) == ([], 2)


def test_without_someone_to_tell_a_failure_is_a_python_warning() -> None:
    notes = Notes()
    notes._tell = None
    notes.begin({})
    notes.down = True
    steps(notes, 1)
    with pytest.warns(UserWarning, match="the link is down"):
        notes.stop()
    assert notes.status == "FAILED"


def test_files_keep_their_place_below_the_folder(tmp_path: Path) -> None:
    notes = Notes()
    notes.begin({"folder": str(tmp_path / "run")})
    notes.end({}, [tmp_path / "run" / "plots" / "a.png", tmp_path / "other.csv"])
    assert notes.finished == ["plots/a.png", "other.csv"]


def test_unknown_names_and_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"unknown tracker 'mflow'. Did you mean 'mlflow'\? Known: mlflow, tens"):
        build(["mflow"])
    assert build([]) == ()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("mlflow", "tensorboard"):
        with pytest.raises(ConfigError, match=rf'{name} is not installed; .* pip install "perdure\[{name}\]"'):
            build([name])


def test_a_command_without_its_trackers() -> None:
    plain = "perdure run 'my recipe.yaml' --out runs/a --set a.b=1"
    tracked = "perdure run 'my recipe.yaml' --track mlflow --out runs/a --track=tensorboard --set a.b=1"
    assert untracked(tracked) == plain == untracked(plain)
    assert untracked("") == ""


def test_ids_are_kept_by_store_and_forgotten(tmp_path: Path) -> None:
    assert read_ids(tmp_path, "s") == {}
    write_ids(tmp_path, "s", {"run": "1"})
    write_ids(tmp_path, "t", {"run": "2", "stages": {"1": "3"}})
    assert read_ids(tmp_path, "s") == {"run": "1"}
    assert read_ids(tmp_path, "t") == {"run": "2", "stages": {"1": "3"}}
    (tmp_path / EVENTS).mkdir()
    assert forget(tmp_path) == ["run 1 in s", "run 2 in t"]
    assert list(tmp_path.iterdir()) == []
    assert forget(tmp_path) == []
    (tmp_path / IDS).write_text('{"mlflow": [')
    with pytest.raises(RunError, match=r"tracking.json: not as it was written; remove it"):
        read_ids(tmp_path, "s")
    assert "could not be read" in forget(tmp_path)[0]


def test_a_reason_is_one_line() -> None:
    assert reason(ValueError("a\nb")) == "a"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("x" * 999))) == 204
