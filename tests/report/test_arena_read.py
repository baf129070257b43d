"""Folders of arena runs: what is read, what may be null, and errors that name file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from perdure.errors import NewerFormatError, RunError
from perdure.report.arena import arena_run, is_arena_run, read_arena_run
from perdure.report.arena_run import Estimate

from .arena_runs import FIVE, results, write

Change = Callable[[dict[str, Any]], Any]


def test_what_a_run_holds(tmp_path: Path) -> None:
    """The numbers are those of results.json; the log's episodes are counted from 1."""
    content = results(seed=3)
    run = read_arena_run(write(tmp_path / "a", content))
    assert (run.name, run.method, run.model, run.seed, run.episodes) == ("lora", "lora", "nano", 3, 80)
    assert (run.trainable, run.total, run.seconds_per_episode) == (12288, 1_200_000, 0.0421)
    exact = run.scores.exact
    assert (exact.final.value, exact.final.low, exact.final.high) == (
        content["final"],
        *content["intervals"]["final"],
    )
    assert exact.gain == content["final"] - content["initial"]
    assert (run.scores.stated.best.value, run.scores.plain.final.value) == (content["stated"]["best"], 0.65)
    assert tuple(run.kinds) == FIVE
    assert run.kinds["math"].plain.initial.value == pytest.approx(0.6)
    assert [point.episode for point in run.history] == [*range(0, 81, 10)]
    assert [(phase.begin, phase.end) for phase in run.phases] == [(0, 30), (30, 60), (60, 80)]
    assert run.probe == {"exact_match": (0.81, 0.8), "loss": (1.0, 1.02)}
    assert run.probe_change() == ("exact_match", pytest.approx(-0.01))
    assert [episode.number for episode in run.log] == [*range(1, 81)]
    assert run.config["optimizer"] == {"lr": 1e-3}
    assert run.blocks() == []


def test_null_where_the_format_says_so(tmp_path: Path) -> None:
    content = results(plain=False, probe=None, seconds_per_episode=None)
    content["kinds"]["math"]["plain"] = None
    for entry in content["history"]:
        entry["probe"] = None
    run = read_arena_run(write(tmp_path / "a", content, log=False))
    assert math.isnan(run.scores.plain.initial.value)
    assert run.probe == {}
    assert run.probe_change()[0] == ""
    assert math.isnan(run.history[0].probe)
    assert math.isnan(run.seconds_per_episode)
    assert run.log == ()
    shown = {"initial": {"exact_match": 0.1, "kinds": {}}, "final": {"exact_match": 0.6, "kinds": {}}}
    more = arena_run(results(adapted={"shots": 5, **shown}, inferred={"initial": 0.0, "final": 0.5}))
    assert (more.adapted.final.value, more.inferred.final.value) == (0.6, 0.5)


def test_the_log_of_a_resumed_run(tmp_path: Path) -> None:
    """Half a line is passed over; an episode that comes again counts as it came last; null is no answer."""
    folder = write(tmp_path / "a", results(drift="blocks", episodes=4), log=False)
    kinds = ("math", "math", "grid", "math")
    lines = [{"event": "episode", "episode": i + 1, "kind": kind, "right_before": False, "right_after": True}
             for i, kind in enumerate(kinds)]  # fmt: skip
    again = {**lines[1], "right_before": None, "right_after": False}
    text = "\n".join(json.dumps(line) for line in [*lines, {"event": "evaluation", "episode": 4}, again])
    (folder / "metrics.jsonl").write_text(text + '\n{"event": "episo')
    run = read_arena_run(folder)
    assert [(episode.before, episode.after) for episode in run.log][::2] == [(0.0, 1.0), (0.0, 1.0)]
    assert math.isnan(run.log[1].before)
    assert run.log[1].after == 0.0
    assert run.blocks() == [("math", 1, 2), ("grid", 3, 3), ("math", 4, 4)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("recipe"), "no arena run: recipe must be 'arena', got None"),
        (lambda c: c.update(format="1"), "format must be a whole number, 0 or more, got text"),
        (lambda c: c.update(finished=False), "finished is not true"),
        (lambda c: c.pop("kinds"), "the key kinds is missing"),
        (lambda c: c["kinds"].pop("math"), "the key kinds.math is missing"),
        (lambda c: c["kinds"]["math"].pop("final"), "the key kinds.math.final is missing"),
        (lambda c: c["kinds"]["math"].update(rows=-1), "kinds.math.rows must be a whole number, 0 or more, got -1"),
        (lambda c: c.update(final=78), "final must be a share from 0 to 1, got 78"),
        (lambda c: c.update(final="0.78"), "final must be a number or null, got text"),
        (lambda c: c["intervals"].update(best=[0.5]), "intervals.best must be two numbers, got a list"),
        (lambda c: c.update(history=[]), "history must be at least one evaluation, got a list"),
        (lambda c: c["history"][2].pop("kinds"), r"the key history\[2\].kinds is missing"),
        (lambda c: c["history"][1].update(episode=True), r"history\[1\].episode must be a whole number"),
        (lambda c: c["phases"][0].update(gain=None), r"phases\[0\].gain must be a number, got null"),
        (lambda c: c.update(pretraining_wording=[1]), "pretraining_wording must be an object, got a list"),
        (lambda c: c.update(seed=None), "seed must be a whole number, 0 or more, got null"),
        (lambda c: c.update(parameters=[]), "parameters must be an object, got a list"),
        (lambda c: c.update(tasks=[""]), r"tasks\[0\] must be text"),
    ],
)
def test_errors_name_file_and_key(tmp_path: Path, change: Change, message: str) -> None:
    content = results()
    change(content)
    folder = write(tmp_path / "a", results())
    (folder / "results.json").write_text(json.dumps(content))
    with pytest.raises(RunError, match=message) as error:
        read_arena_run(folder)
    assert str(error.value).startswith(f"{folder / 'results.json'}: ")
    assert error.value.exit_code == 2


def test_folders_that_are_no_finished_run(tmp_path: Path) -> None:
    begun = write(tmp_path / "begun", results())
    (begun / "results.json").unlink()
    assert is_arena_run(begun)
    newer = write(tmp_path / "newer", results(format=2))
    broken = write(tmp_path / "broken", results())
    (broken / "results.json").write_text("{")
    listed = write(tmp_path / "listed", results())
    (listed / "results.json").write_text("[]")
    config = write(tmp_path / "config", results())
    (config / "config.yaml").write_text("a: [")
    (tmp_path / "empty").mkdir()
    assert not is_arena_run(tmp_path / "empty")
    for name, message in {
        "gone": "does not exist", "begun": "is not finished: it has no results.json yet", "broken": "not JSON",
        "listed": "the file must be a JSON object, got a list", "config": "config.yaml: not YAML",
        "empty": "is no arena run: it has no results.json", "newer/results.json": "is a file, not a run folder",
    }.items():  # fmt: skip
        with pytest.raises(RunError, match=message) as error:
            read_arena_run(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)
    with pytest.raises(NewerFormatError, match="format 2 is newer than this perdure reads"):
        read_arena_run(newer)


def test_when_intervals_overlap() -> None:
    """Touching ends overlap; where either has no interval nothing is shown to differ."""
    one = Estimate(0.5, 0.4, 0.6)
    assert one.overlaps(Estimate(0.7, 0.6, 0.8))
    assert not one.overlaps(Estimate(0.7, 0.61, 0.8))
    assert not Estimate(0.7, 0.61, 0.8).overlaps(one)
    assert one.overlaps(Estimate(0.9))
